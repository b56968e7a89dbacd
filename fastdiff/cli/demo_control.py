"""The demo's controlled part: digits of a class that was asked for, and digits given a part, or a blurred picture, of them."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import inverse
from ..metrics import nearest, sbc_ranks
from ..model import ScoreModel
from ..networks import UNet
from ..planning.processes import VP
from ..sampling import posterior, sample
from ..training import load, load_data, save, train
from . import pictures

Array = NDArray[np.float64]

SCALES = (1.0, 3.0)
EACH = 10  # digits of each class, by each scale
SHOWN, DRAWS = 10, 19  # held-out digits that are measured, draws of each one's posterior: with the truth 20 ranks
NOISE = 0.1  # of the blurred pictures, whose numbers are in [−1, 1]
BLUR = 1.0  # its standard deviation, in pixels


@dataclass(frozen=True)
class Findings:
    """What was drawn and measured.

    classes  scale -> digits [10 · EACH, 64], in each row of ten one of each class
    named    scale -> the share of them whose nearest held-out digit is of the class that was asked for
    strips   title -> [SHOWN, columns, 64]
    within   title -> the share of hidden pixels that are neither the least nor the greatest of the draws and themselves
    off      title -> the RMS distance of the draws' mean from the truth there
    """

    classes: dict[float, Array]
    named: dict[float, float]
    strips: dict[str, Array]
    within: dict[str, float]
    off: dict[str, float]


JOBS = len(SCALES) + 2  # and the training's steps: what the progress bar counts


def run(pool: Executor, out: Path, train_steps: int, progress: Any) -> Findings:
    """Train a model of digits and their labels, and draw from it and from the demo's VP model, as jobs of the pool."""
    known = [pool.submit(_measured, out, title, progress) for title in OPERATORS]
    pool.submit(_train, out, train_steps, progress).result()
    drawn = {scale: pool.submit(_of_classes, out, scale, progress) for scale in SCALES}
    classes = {scale: job.result() for scale, job in drawn.items()}
    _, held_out = load_data("digits").split(0.5, seed=0)
    asked = torch.arange(10).repeat(EACH)
    real = pictures.unit(held_out.batch(range(len(held_out)), (-1.0, 1.0)).flatten(1).double().numpy(), (-1.0, 1.0))
    named = {
        scale: float((held_out.labels[nearest(x, real).indices] == asked).double().mean())
        for scale, x in classes.items()
    }
    found = dict(zip(OPERATORS, (job.result() for job in known)))
    return Findings(
        classes,
        named,
        {title: strip for title, (strip, *_) in found.items()},
        {title: within for title, (_, within, _) in found.items()},
        {title: off for title, (*_, off) in found.items()},
    )


def draw(out: Path, findings: Findings) -> None:
    """The pictures."""
    groups = {f"guidance={scale:g}": pictures.squares(x) for scale, x in findings.classes.items()}
    pictures.beside(out / "classes.png", groups)
    for title, strip in findings.strips.items():
        shown = f"held-out digits, {title}, eight draws given that, the draws' mean and twice their standard deviation"
        pictures.strip(out / f"{slug(title)}.png", strip, shown)


def slug(title: str) -> str:
    """As a file name."""
    return title.replace(" ", "-")


def report(findings: Findings) -> list[str]:
    """The numbers as lines of Markdown."""
    shares = ", ".join(f"{100 * share:.0f} % with guidance {scale:g}" for scale, share in findings.named.items())
    lines = [
        "## Control",
        "",
        "Ten digits of each class, a column each, by a model that was trained with labels, one in ten left out. The nearest "
        f"held-out digit is of the class that was asked for in {shares}.",
        "",
        "![digits by their class](classes.png)",
        "",
        "Held-out digits of which the VP model, which was trained for no such task, is told a part, or a blurred and noisy "
        f"picture: {DRAWS} draws of each one's posterior (MMPS, 50 ancestral steps).",
        "",
        "| | RMS from the truth of the draws' mean (pixels in [0, 1]) | true pixels between the draws (exact: 90 %) |",
        "|---|---|---|",
    ]
    for title in findings.strips:
        lines.append(f"| {title} | {findings.off[title]:.3f} | {100 * findings.within[title]:.0f} % |")
    return [*lines, "", *(f"![{title}]({slug(title)}.png)" for title in findings.strips), ""]


def _half() -> Tensor:
    """A mask of the upper half."""
    return (torch.arange(8) < 4)[None, :, None].expand(1, 8, 8)


OPERATORS = {
    "the upper half": lambda: inverse.Mask(_half()),
    "blurred": lambda: inverse.Blur.gaussian(BLUR),
}


def _measured(out: Path, title: str, progress: Any) -> tuple[Array, float, float]:
    """truth | measured | eight draws | mean | twice the standard deviation, of each digit; the share of hidden pixels between the
    draws; how far their mean is off (in a worker process)."""
    model, operator = load(out / "digits-vp.safetensors"), OPERATORS[title]()
    x = load_data("digits").split(0.5, seed=0)[1].batch(range(SHOWN), model.data_range)
    y, noise_std = operator.A(x), 0.0
    shown = operator.A_adjoint(y)
    hidden = torch.ones_like(x, dtype=torch.bool)
    if isinstance(operator, inverse.Mask):
        hidden = ~_half().expand_as(x)
    else:
        noise_std = NOISE
        y = shown = y + NOISE * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    problem = inverse.Problem(y.repeat_interleave(DRAWS, 0), operator, noise_std)
    options = {"num_samples": SHOWN * DRAWS, "seed": 1, "progress": False}
    drawn = posterior(model, inverse.MMPS(problem), steps=50, sampler="ancestral", grid="logsnr", **options)
    draws = drawn.view(SHOWN, DRAWS, *model.data_shape)
    # as pixels have 17 levels, most of them the lowest, draws are rounded to these, and ties broken at random
    low, high = model.data_range
    step = (high - low) / 16
    alike = [((v - low) / step).round().flatten(v.ndim - 3)[..., hidden[0].flatten()].double() for v in (x, draws)]
    ranks = sbc_ranks(*alike).ranks
    mean, spread = draws.mean(1), draws.std(1)
    of = lambda v: pictures.unit(v.flatten(-3).double().numpy(), model.data_range)  # noqa: E731
    off = (mean - x)[hidden].double().square().mean().sqrt() / (high - low)
    columns = [of(x), of(shown), *of(draws[:, :8].transpose(0, 1)), of(mean), of(low + 2 * spread)]
    progress.put(1)
    return np.stack(columns, 1), float(((ranks > 0) & (ranks < DRAWS)).double().mean()), float(off)


def _train(out: Path, steps: int, progress: Any) -> None:
    """Train the model of digits and their labels, and save it to `out` (in a worker process)."""
    torch.manual_seed(0)
    net = UNet((1, 8, 8), channels=32, multipliers=(1, 2), blocks=1, num_classes=10)
    model, seen = ScoreModel(net, VP(), "edm", data_shape=(1, 8, 8), data_range=(-1.0, 1.0)), 0

    def advance(step: int, loss: float) -> None:
        nonlocal seen
        progress.put(step - seen)
        seen = step

    train(
        model, load_data("digits").split(0.5, seed=0)[0], steps=steps, loss="simple", lr=2e-3, warmup=100, decay=True,
        cond_dropout=0.1, progress=False, callback=advance,
    )  # fmt: skip
    save(model, out / "digits-classes")


def _of_classes(out: Path, scale: float, progress: Any) -> Array:
    """EACH digits of each class (in a worker process)."""
    model = load(out / "digits-classes.safetensors")
    labels = torch.arange(10).repeat(EACH)
    x = sample(
        model, steps=18, sampler="heun", num_samples=len(labels), cond=labels, guidance=scale, seed=1, progress=False
    )
    progress.put(1)
    return pictures.unit(x.flatten(1).double().numpy(), model.data_range)
