"""Pictures (matplotlib): grids of digits, a denoising strip, loss curves, nearest neighbours."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import ShapeError

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("pictures need matplotlib, which is missing: pip install 'fastdiff[demo]'") from error

Images = NDArray[np.float64]


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
    figure = Figure(figsize=(10, 5.3), layout="constrained")
    for axes, rows, name in zip(figure.subplots(1, 2), (real, samples), ("real digits (held out)", title)):
        _show(axes, mosaic(squares(rows), 10))
        axes.set_title(name)
    figure.savefig(path, dpi=80)


def strip(path: Path, states: NDArray[np.float64], title: str) -> None:
    """One line for each sample, its states from left to right: [samples, states, 64]."""
    samples, count, size = states.shape
    figure = Figure(figsize=(count * 0.8, samples * 0.8 + 0.5), layout="constrained")
    axes = figure.subplots()
    _show(axes, mosaic(squares(states.reshape(-1, size)), count))
    axes.set_title(title)
    figure.savefig(path, dpi=100)


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
    figure.savefig(path, dpi=100)


def neighbours(path: Path, samples: Images, training: Images) -> None:
    """Samples above the training images nearest to them."""
    distance = ((samples[:, None] - training[None]) ** 2).sum(-1)
    pairs = np.concatenate([samples, training[distance.argmin(1)]])
    figure = Figure(figsize=(len(samples) * 0.8, 2.4), layout="constrained")
    axes = figure.subplots()
    _show(axes, mosaic(squares(pairs), len(samples)))
    axes.set_title("samples (above) and their nearest training digits (below)")
    figure.savefig(path, dpi=100)


def check_drawable(count: int, shape: tuple[int, ...]) -> None:
    """Refuse samples that are no pictures."""
    if len(shape) != 3 or shape[0] not in (1, 3) or 0 in (count, *shape):
        raise ShapeError(f"a picture needs samples (1 or 3, H, W), got {count} of {shape}: write a .npy file instead")


def image(path: Path, x: NDArray[np.floating], data_range: tuple[float, float]) -> None:
    """Samples [N, 1 or 3, H, W] in their data range as one mosaic."""
    check_drawable(len(x), x.shape[1:])
    low, high = data_range
    unit = np.clip((x - low) / (high - low), 0, 1).transpose(0, 2, 3, 1)
    canvas = mosaic(unit, math.ceil(math.sqrt(len(unit))))
    scale = max(1, 512 // canvas.shape[1])
    figure = Figure(figsize=(canvas.shape[1] * scale / 100, canvas.shape[0] * scale / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    _show(axes, canvas)
    figure.savefig(path)


def _show(axes: object, image: Images) -> None:
    axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")  # type: ignore[attr-defined]
    axes.set_axis_off()  # type: ignore[attr-defined]
