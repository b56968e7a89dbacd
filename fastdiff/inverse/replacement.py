"""Data of which a part is known: after each row the known part is set to what it is at that level of noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, DataError, DTypeError, ShapeError
from ..execution import tensor_checks
from ..guidance.base import Guidance, Setting
from .operators import Mask
from .problem import Measurement, Problem
from .projection import Projection
from .state import StateBound


@dataclass(frozen=True, eq=False)
class Replacement(Guidance):
    """The replacement method (Song et al. 2021, App. I.2 and I.3; of annealed Langevin steps Song & Ermon 2019, Alg. 2): after
    each row, also one that draws no noise otherwise,

        x ← α known + σ z where known,      in general      x ← x − A⁺(A x − (α y + σ A z)),        z ~ N(0, 1),

    at the level (α, σ) on which the row ends; after the last row known, or y, themselves. On any process, by any sampler of fixed
    steps. One call of the network a step, and nothing else; but what is unknown is never told how well it fits what is known, and
    the samples are not those of p(x0 | y), whatever the number of steps (docs/inpainting.md has the size of it). Of grey values
    (Grayscale) it is the colorization of App. I.3, whose orthonormal matrix has A as its first column, but for a factor.

    problem   a Problem of exact data, or (known, mask): known [*data_shape] for all samples or [num_samples, *data_shape], in
              the units of the samples; mask of bool or of 0 and 1, True where it is known, which broadcasts to known. None: where
              known is not NaN
    """

    problem: Problem | tuple[Tensor, Tensor | None]

    def bind(self, setting: Setting) -> StateBound:
        name = f"inverse.{type(self).__name__}"
        if not isinstance(self.problem, Problem):
            if not isinstance(self.problem, (tuple, list)) or len(self.problem) != 2:
                raise ConfigError(
                    f"{name} takes an inverse.Problem, or a pair (known, mask), got {type(self.problem).__name__}"
                )
            known, mask = arranged(*self.problem, setting.model.data_shape, setting.count, setting.device)
            setting.model.look_at_units("known", known.masked_select(mask))
            return Known(known, mask, setting)
        measured = Measurement(self.problem, setting).needs_linear(name)
        if measured.noise_std > 0:
            raise ConfigError(
                f"{name} takes y as it is, and noise_std={measured.noise_std:g}: use inverse.NoisedMeasurement or inverse.MMPS, "
                "or noise_std=0"
            )
        operator = self.problem.operator
        if not isinstance(operator, Mask):
            return Projection(measured, setting)
        mask = operator.A_adjoint(torch.ones_like(measured.each)) > 0
        return Known(operator.A_adjoint(measured.each), mask, setting)


@dataclass(frozen=True, eq=False)
class RePaint(Replacement):
    """RePaint (Lugmayr et al. 2022, Alg. 1): replacement, with jumps back to noisier levels, from which the unknown part is drawn
    again, in harmony with what was known below.

    jump_length  j, levels of a jump
    resamplings  r, passes through each stretch of j levels, the first included; 1 is replacement alone

    A run of N steps makes j (r − 1) more for each of ⌊(N − 1)/j⌋ jumping points: r times as many calls of the network, nearly.
    Samplers whose steps stand alone only: no multistep, no Heun.
    """

    jump_length: int = 10
    resamplings: int = 10

    def bind(self, setting: Setting) -> StateBound:
        j = checks.integer("jump_length", self.jump_length, 1, 10**6)
        r = checks.integer("resamplings", self.resamplings, 1, 10**6)
        bound = super().bind(setting)
        bound.jumps = (j, r)
        return bound


class Known(StateBound):
    """x0's part, set by the step of each row itself."""

    follows = False

    def __init__(self, known: Tensor, mask: Tensor, setting: Setting) -> None:
        """known, mask   [count, *], in the data's units"""
        super().__init__()
        self.data, self.mask = known, mask
        known = known.masked_fill(~mask, 0.0)
        self.known = setting.model.standardized(known).to(setting.dtype), mask

    def finish(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, self.data.to(x.dtype), x)


def arranged(known: Any, mask: Any, shape: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """known and mask as [count, *shape], checked."""
    full = (count, *shape)
    tensor_checks.check_dense("known", known)
    tensor_checks.check_floating("known", known)
    tensor_checks.check_device("known", known, device)
    if tuple(known.shape) not in (shape, full):
        raise ShapeError(
            f"known must have the shape {shape} of a sample, or {full} for num_samples={count}, got {tuple(known.shape)}"
        )
    known = known.detach().expand(full)
    return known, checked_mask(mask, known)


def checked_mask(mask: Any, known: Tensor) -> Tensor:
    """Where known [count, *] is known, of bool; ConfigError and its kin where that cannot be."""
    if mask is None:
        mask = ~known.isnan()
    else:
        tensor_checks.check_dense("mask", mask)
        tensor_checks.check_device("mask", mask, known.device)
        mask = as_bool(mask)
        try:
            mask = mask.expand(known.shape)
        except RuntimeError as error:
            raise ShapeError(
                f"mask must broadcast to known, [num_samples, *sample] = {tuple(known.shape)}, got shape {tuple(mask.shape)}"
            ) from error
    bad = mask & ~known.isfinite()
    if bool(bad.any()):
        index = tuple(torch.nonzero(bad)[0].tolist())
        raise DataError(
            f"known must be finite where it is known, got {known[index].item()} at index {index}: set mask to False there"
        )
    return mask


def as_bool(mask: Tensor) -> Tensor:
    """A mask of bool, or of numbers 0 and 1, as one of bool."""
    if mask.dtype == torch.bool:
        return mask
    if mask.is_complex():
        raise DTypeError(f"mask must be of bool, or of numbers 0 and 1, got {mask.dtype}: use mask != 0")
    other = (mask != 0) & (mask != 1)
    if bool(other.any()):
        raise DataError(
            f"mask must hold 1 where known has the data and 0 elsewhere, got {mask[other][0].item():g}: use mask > 0.5"
        )
    return mask != 0
