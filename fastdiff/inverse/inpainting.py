"""Inpainting and colorization as problems, for each of the methods by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError, choose, short, warn
from ..execution import tensor_checks
from ..guidance.base import Bound, Guidance, Moment, Setting
from .daps import DAPS
from .ddrm import DDRM
from .dps import DPS
from .operators import Grayscale, Mask, Operator
from .posterior_mean import MMPS, TMPD, DiffPIR, PiGDM, ScoreALD
from .problem import Problem
from .projection import ILVR, NoisedMeasurement
from .replacement import RePaint, Replacement, arranged
from .smc import SMC

METHODS: dict[str, Callable[[Any], Any]] = {
    "mmps": MMPS,
    "replacement": Replacement,
    "repaint": RePaint,
    "tmpd": TMPD,
    "pigdm": PiGDM,
    "diffpir": DiffPIR,
    "dps": DPS,
    "ilvr": ILVR,
    "noised": NoisedMeasurement,
    "score_ald": ScoreALD,
    "ddrm": DDRM,
    "daps": DAPS,
    "smc": SMC,
}


class Looked(Problem):
    """A problem whose y the caller calls by another name, and looks at by it."""

    looked = True


class Task(NamedTuple):
    """What to guide a run by, and what to make of its samples [count, *], in the units of the data."""

    guidance: Any
    finish: Callable[[Tensor], Tensor]


def method_of(method: Any) -> Callable[[Any], Any]:
    """A method by its name, or as a function of the problem."""
    return method if callable(method) else METHODS[choose("method", method, METHODS)]


def inpainting(known: Any, mask: Any, shape: tuple[int, ...], count: int, device: torch.device, method: Any) -> Task:
    """Samples of `shape` whose part under the mask is known: see fastdiff.inpaint."""
    made = method_of(method)
    shared = isinstance(known, Tensor) and known.ndim == len(shape) and count > 0
    known, mask = arranged(known, mask, shape, count, device)

    def finish(x: Tensor) -> Tensor:
        return torch.where(mask, known.to(x.dtype), x)

    nothing_to_do = not bool(mask.any()) or bool(mask.all())
    if nothing_to_do:
        what = (
            "is True everywhere: nothing is drawn" if mask.any() else "is True nowhere: the samples are the model's own"
        )
        warn(f"mask {what}. Did you mean ~mask? It is True where known holds the data")
    if nothing_to_do or (isinstance(made, type) and issubclass(made, Replacement)):
        return Task((Replacement if nothing_to_do else made)((known, mask)), finish)
    if bool((mask == mask[:1]).all()):
        operator = Mask(mask[0])
        y = operator.A(known[:1])[0] if shared else operator.A(known)
        return Task(made(Looked(y, operator, 0.0)), finish)
    return Task(EachMasked(known.masked_fill(~mask, 0.0), mask, made), finish)


def colorization(gray: Any, weights: Any, shape: tuple[int, ...], method: Any) -> Task:
    """Samples of `shape` [C, *] whose weighted mean over the channels is known: see fastdiff.colorize."""
    made, operator = method_of(method), Grayscale(weights)
    tensor_checks.check_dense("gray", gray)
    tensor_checks.check_floating("gray", gray)
    tensor_checks.check_finite("gray", gray)
    if len(shape) < 2 or shape[0] < 2:
        raise ShapeError(f"colorize needs a model of samples [C, *] with two channels or more, got one of {shape}")
    plain = gray[None] if tuple(gray.shape) == shape[1:] else gray
    if tuple(plain.shape[-len(shape) :]) != (1, *shape[1:]) or plain.ndim > len(shape) + 1:
        raise ShapeError(
            f"gray must be one channel {(1, *shape[1:])}, for all samples or [num_samples, …], got {tuple(gray.shape)}"
        )

    def finish(x: Tensor) -> Tensor:
        wide = x.double()
        missing = plain.to(wide) - operator.A(wide)
        ones = torch.ones_like(missing)
        return (wide + operator.A_adjoint(missing / operator.A(operator.A_adjoint(ones)))).to(x.dtype)

    return Task(made(Looked(plain, operator, 0.0)), finish)


@dataclass(frozen=True, eq=False)
class EachMasked(Guidance):
    """A method for a mask of each sample's own, mask and known [count, *], 0 where it is not known."""

    known: Tensor
    mask: Tensor
    method: Callable[[Problem], Any]

    def bind(self, setting: Setting) -> Bound:
        operator = OwnMask(self.mask[:1])
        method = self.method(Looked(self.known, operator, 0.0))
        inner = method.bind(setting) if isinstance(method, Guidance) else None
        if inner is None or getattr(inner, "follows", False):
            raise ConfigError(
                f"method={short(self.method.__name__ if isinstance(self.method, type) else self.method)} is for one mask of all "
                "samples, and mask differs between them: use method='mmps', 'replacement' or 'repaint'"
            )
        return OwnMasked(inner, operator, self.mask)


class OwnMask(Operator):
    """A x = x where a mask of each sample [B, *], or of all [1, *], is True, else 0; its own adjoint."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def A(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x, 0.0)

    A_adjoint = A


class OwnMasked(Bound):
    """The method within, whose operator is given the masks of the samples at hand."""

    def __init__(self, inner: Bound, operator: OwnMask, mask: Tensor) -> None:
        super().__init__()
        self.inner, self.operator = inner, operator
        self.parts, self.differentiates = {**inner.parts, "mask": mask}, inner.differentiates

    def __call__(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        self.operator.mask = parts["mask"]
        return self.inner(moment, parts)
