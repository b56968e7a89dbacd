"""Pictures (matplotlib): grids of digits, strips, loss curves, nearest neighbours, histograms, solvers' errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import files
from ..errors import ShapeError
from ..metrics import nearest

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("pictures need matplotlib, which is missing: pip install 'fastdiff[demo]'") from error

Images = NDArray[np.float64]


def unit(x: NDArray[np.floating], data_range: tuple[float, float]) -> NDArray[np.float64]:
    """Numbers in their data range as numbers in [0, 1]."""
    low, high = data_range
    return np.clip((x.astype(np.float64) - low) / (high - low), 0, 1)


def mosaic(images: Images, columns: int) -> Images:
    """Images [N, H, W, C] in [0, 1] side by side, `columns` in a row, one pixel apart."""
    count, height, width, channels = images.shape
    canvas = np.full((-(-count // columns) * (height + 1) + 1, columns * (width + 1) + 1, channels), 0.35)
    for k, picture in enumerate(images):
        top, left = (k // columns) * (height + 1) + 1, (k % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = picture
    return canvas


def squares(rows: Images) -> Images:
    """Grey square images as rows [N, side²] to [N, side, side, 1]."""
    side = math.isqrt(rows.shape[1])
    return rows.reshape(-1, side, side, 1)


def grids(path: Path, real: Images, samples: Images, title: str) -> None:
    """Real digits on the left, samples on the right."""
    beside(path, {"real digits (held out)": squares(real), title: squares(samples)})


def beside(path: Path, groups: dict[str, Images]) -> None:
    """Images [N, H, W, C] in [0, 1] of several groups, ten in a row, side by side under their names."""
    figure = Figure(figsize=(5 * len(groups), 5.3), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(1, len(groups)), groups.items()):
        _show(axes, mosaic(images, 10))
        axes.set_title(name)
    _save(figure, path, 80)


def columns(path: Path, groups: dict[str, NDArray[np.float64]]) -> None:
    """The distribution of each column, at most twelve, of groups of vectors [N, D] over each other."""
    shown = min(12, next(iter(groups.values())).shape[1])
    across = min(4, shown)
    down = -(-shown // across)
    figure = Figure(figsize=(3.2 * across + 0.6, 2.4 * down + 0.5), layout="constrained")
    for column, axes in enumerate(figure.subplots(down, across, squeeze=False).flat):
        if column >= shown:
            axes.set_axis_off()
            continue
        values = {name: rows[:, column] for name, rows in groups.items()}
        bins = np.histogram_bin_edges(np.concatenate(list(values.values())), 50)
        for k, (name, numbers) in enumerate(values.items()):
            axes.hist(numbers, bins, density=True, histtype="step", linewidth=1.4, color=f"C{k}", label=name)
        axes.set(title=f"column {column}", yticks=[])
    figure.axes[0].legend(fontsize=8)
    _save(figure, path, 100)


def strip(path: Path, states: NDArray[np.float64], title: str) -> None:
    """One line for each sample, its states from left to right: [samples, states, 64]."""
    samples, count, size = states.shape
    figure = Figure(figsize=(count * 0.8, samples * 0.8 + 0.5), layout="constrained")
    axes = figure.subplots()
    _show(axes, mosaic(squares(states.reshape(-1, size)), count))
    axes.set_title(title)
    _save(figure, path, 100)


def banner(path: Path, states: NDArray[np.float64], zoom: int = 7) -> None:
    """As `strip`, without title or margins: [samples, states, 64], a number of a sample is `zoom` pixels wide."""
    _bare(path, mosaic(squares(states.reshape(-1, states.shape[-1])), states.shape[1]), zoom)


def losses(path: Path, curves: dict[str, NDArray[np.float64]]) -> None:
    """The loss of each model by training step, averaged over 50 steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        width = min(50, len(curve))
        axes.plot(np.arange(width, len(curve) + 1), np.convolve(curve, np.ones(width) / width, "valid"), label=name)
    axes.set(xlabel="training step", ylabel="loss", yscale="log", title="training loss (mean of 50 steps)")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path, 100)


def neighbours(path: Path, samples: Images, training: Images) -> None:
    """Samples above the training images nearest to them."""
    pairs = np.concatenate([samples, training[nearest(samples, training).indices]])
    figure = Figure(figsize=(len(samples) * 0.8, 2.4), layout="constrained")
    axes = figure.subplots()
    _show(axes, mosaic(squares(pairs), len(samples)))
    axes.set_title("samples (above) and their nearest training digits (below)")
    _save(figure, path, 100)


def histograms(path: Path, groups: dict[str, NDArray[np.float64]], label: str, title: str) -> None:
    """The distributions of two groups or more over each other, with their means."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(min(map(np.min, groups.values())), max(map(np.max, groups.values())), 50)
    for k, (name, values) in enumerate(groups.items()):
        axes.hist(values, bins, alpha=0.65, color=f"C{k}", label=f"{name}: {values.mean():.2f}")
        axes.axvline(values.mean(), color=f"C{k}", linestyle="--", linewidth=1)
    axes.set(xlabel=label, ylabel="samples", title=title)
    axes.legend()
    _save(figure, path, 100)


def convergence(path: Path, panels: dict[str, dict[str, list[tuple[float, float]]]], across: str, up: str) -> None:
    """Curves of (x, y) on logarithmic axes; those that are in every panel are black, dashed and dotted."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    common = sorted(set.intersection(*map(set, panels.values())))
    for axes, (title, curves) in zip(
        figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0], panels.items()
    ):
        for name, marker in zip([name for name in curves if name not in common], "osD^vPX"):
            axes.plot(*zip(*curves[name]), marker=marker, markersize=4, linewidth=1.3, label=name)
        for name, style in zip(common, ("--", ":")):
            axes.plot(*zip(*curves[name]), marker=".", color="black", linestyle=style, linewidth=1.3, label=name)
        axes.set(xscale="log", yscale="log", xlabel=across, title=title)
        axes.set_xticks(ticks := [6, 12, 24, 48, 96], [str(n) for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
    figure.axes[0].set_ylabel(up)
    _save(figure, path, 80)


def check_drawable(count: int, shape: tuple[int, ...]) -> None:
    """Refuse samples that cannot be drawn: no sample, no pixel, or a shape that is not (1 or 3, H, W)."""
    if len(shape) != 3 or shape[0] not in (1, 3) or 0 in (count, *shape):
        raise ShapeError(f"a picture needs samples (1 or 3, H, W), got {count} of {shape}: write a .npy file instead")


def image(path: Path, x: NDArray[np.floating], data_range: tuple[float, float]) -> None:
    """Samples [N, 1 or 3, H, W] in their data range as one mosaic."""
    check_drawable(len(x), x.shape[1:])
    canvas = mosaic(unit(x, data_range).transpose(0, 2, 3, 1), math.ceil(math.sqrt(len(x))))
    _bare(path, canvas, max(1, 512 // canvas.shape[1]))


def _bare(path: Path, canvas: Images, zoom: int) -> None:
    """An image and nothing else, its pixels `zoom` wide."""
    figure = Figure(figsize=(canvas.shape[1] * zoom / 100, canvas.shape[0] * zoom / 100), dpi=100)
    _show(figure.add_axes((0, 0, 1, 1)), canvas)
    _save(figure, path, 100)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    with files.replacing(path) as handle:
        figure.savefig(handle, dpi=dpi, format=path.suffix[1:])


def _show(axes: object, image: Images) -> None:
    axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")  # type: ignore[attr-defined]
    axes.set_axis_off()  # type: ignore[attr-defined]
