"""The demo's controlled part: digits of a class that was asked for, and digits given a part, or a blurred picture, of them."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import inverse
from ..metrics import nearest, sbc_ranks
from ..sampling import sample
from ..training import Data, load, load_data
from . import pictures

Array = NDArray[np.float64]

SCALES = (1.0, 3.0)
EACH = 10  # digits of each class, by each scale
STEPS = 50  # of a posterior's sampler, at most
SHOWN, DRAWS = 10, 19  # held-out digits that are measured, draws of each one's posterior: with the truth 20 ranks
UPPER = (torch.arange(8) < 4)[None, :, None].expand(1, 8, 8)


@dataclass(frozen=True)
class Task:
    """What is told of a digit, whose numbers are in [−1, 1], with noise of this deviation; which of its pixels that hides."""

    operator: inverse.Mask | inverse.Blur
    noise_std: float
    hidden: Tensor


TASKS = {
    "the upper half": Task(inverse.Mask(UPPER), 0.0, ~UPPER),
    "blurred": Task(inverse.Blur.gaussian(1.0), 0.1, torch.ones_like(UPPER)),
}


class Posterior(NamedTuple):
    """Draws of digits given what a task tells of them.

    strip   [SHOWN, columns, 64]: truth, what is told, eight draws, the mean and twice the standard deviation of all
    within  the share of hidden pixels that are neither the least nor the greatest of the draws and themselves
    off     the RMS distance of the draws' mean from the truth there
    """

    strip: Array
    within: float
    off: float


@dataclass(frozen=True)
class Findings:
    """What was drawn and measured.

    classes     scale -> digits [10 · EACH, 64], in each row of ten one of each class
    named       scale -> the share of them whose nearest held-out digit is of the class that was asked for
    posteriors  by the task's title; steps: of each one's sampler
    """

    classes: dict[float, Array]
    named: dict[float, float]
    posteriors: dict[str, Posterior]
    steps: int


JOBS = len(SCALES) + len(TASKS)  # what the progress bar counts
MODEL = "classes"  # the name of the model of digits and their labels


def run(pool: Executor, out: Path, steps: int, progress: Any) -> Findings:
    """Draw from the model of digits and their labels and, in at most so many steps, from the demo's VP model, by the pool."""
    steps = min(steps, STEPS)
    known = [pool.submit(_measured, out, title, steps, progress) for title in TASKS]
    drawn = {scale: pool.submit(_of_classes, out, scale, progress) for scale in SCALES}
    classes = {scale: job.result() for scale, job in drawn.items()}
    held_out = halves()[1]
    asked = torch.arange(10).repeat(EACH)
    real = pictures.unit(held_out.batch(range(len(held_out)), (-1.0, 1.0)).flatten(1).double().numpy(), (-1.0, 1.0))
    named = {
        scale: float((held_out.labels[nearest(x, real).indices] == asked).double().mean())
        for scale, x in classes.items()
    }
    return Findings(classes, named, {title: job.result() for title, job in zip(TASKS, known)}, steps)


def draw(out: Path, findings: Findings) -> None:
    """The pictures."""
    groups = {f"guidance={scale:g}": pictures.squares(x) for scale, x in findings.classes.items()}
    pictures.beside(out / "classes.png", groups)
    for title, found in findings.posteriors.items():
        shown = f"held-out digits, {title}, eight draws given that, the draws' mean and twice their standard deviation"
        pictures.strip(out / f"{slug(title)}.png", found.strip, shown)


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
        f"picture: {DRAWS} draws of each one's posterior (MMPS, {findings.steps} ancestral steps).",
        "",
        "| | RMS from the truth of the draws' mean (pixels in [0, 1]) | true pixels between the draws (exact: 90 %) |",
        "|---|---|---|",
    ]
    for title, found in findings.posteriors.items():
        lines.append(f"| {title} | {found.off:.3f} | {100 * found.within:.0f} % |")
    return [*lines, "", *(f"![{title}]({slug(title)}.png)" for title in findings.posteriors), ""]


def halves() -> tuple[Data, Data]:
    """The digits with their labels in two random halves: to train on, and held out."""
    return load_data("digits").split(0.5, seed=0)


def _measured(out: Path, title: str, steps: int, progress: Any) -> Posterior:
    """What the demo's VP model makes of what the task tells of held-out digits (in a worker process)."""
    model, task = load(out / "digits-vp.safetensors"), TASKS[title]
    x = halves()[1].batch(range(SHOWN), model.data_range)
    y = task.operator.A(x)
    y = y + task.noise_std * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    shown, hidden = y if y.shape == x.shape else task.operator.A_adjoint(y), task.hidden.flatten()
    problem = inverse.Problem(y.repeat_interleave(DRAWS, 0), task.operator, task.noise_std)
    x_given = sample(
        model, steps=steps, sampler="ancestral", grid="logsnr", num_samples=SHOWN * DRAWS, seed=1, progress=False,
        guidance=inverse.MMPS(problem),
    )  # fmt: skip
    draws = x_given.view(SHOWN, DRAWS, *model.data_shape)
    # as pixels have 17 levels, most of them the lowest, draws are rounded to these, and ties broken at random
    low, high = model.data_range
    step = (high - low) / 16
    alike = [((v - low) / step).round().flatten(v.ndim - 3)[..., hidden].double() for v in (x, draws)]
    ranks = sbc_ranks(*alike).ranks
    mean, spread = draws.mean(1), draws.std(1)
    of = lambda v: pictures.unit(v.flatten(-3).double().numpy(), model.data_range)  # noqa: E731
    off = (mean - x).flatten(1)[:, hidden].double().square().mean().sqrt() / (high - low)
    columns = [of(x), of(shown), *of(draws[:, :8].transpose(0, 1)), of(mean), of(low + 2 * spread)]
    progress.put(1)
    within = float(((ranks > 0) & (ranks < DRAWS)).double().mean())
    return Posterior(np.stack(columns, 1), within, float(off))


def _of_classes(out: Path, scale: float, progress: Any) -> Array:
    """EACH digits of each class (in a worker process)."""
    model = load(out / f"digits-{MODEL}.safetensors")
    labels = torch.arange(10).repeat(EACH)
    x = sample(
        model, steps=18, sampler="heun", num_samples=len(labels), cond=labels, guidance=scale, seed=1, progress=False
    )
    progress.put(1)
    return pictures.unit(x.flatten(1).double().numpy(), model.data_range)
