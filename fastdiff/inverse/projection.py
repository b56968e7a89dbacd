"""Measurements with the noise of x_t put on them, to which the state is moved after each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..execution import ops
from ..execution.noise import MEASUREMENTS
from ..guidance.base import Guidance, Setting
from .problem import Measurement, Problem
from .state import Arrival, StateBound


class Projection(StateBound):
    """x ← x − w A⁺(A x − y_t) with y_t = α y + σ A z, A⁺ = Aᵀ(A Aᵀ)⁻¹, z ~ N(0, 1) of a stream of its own; y itself after the
    last row.

    until  process time below which the state is left alone
    """

    def __init__(self, measured: Measurement, setting: Setting, weight: float = 1.0, until: float = 0.0) -> None:
        super().__init__()
        self.measured, self.setting, self.weight, self.until = measured, setting, weight, until
        self.zero = measured.of(torch.zeros((1, *setting.model.data_shape), dtype=setting.dtype, device=setting.device))
        self.solved = measured.solver()

    def residual(self, arrival: Arrival, x: Tensor) -> Tensor:
        """A x − y_t."""
        level, y = arrival.level, self.measured.each[arrival.samples] - self.zero
        target = level.alpha * y
        if level.sigma > 0:
            s = self.setting
            first = s.first_sample + arrival.samples.start
            z = ops.normal(
                len(x), x.shape[1:], seed=s.seed, draw=arrival.number, first_sample=first, stream=MEASUREMENTS, device=x.device
            )  # fmt: skip
            target = target + level.sigma * self.measured.forward(z.to(x.dtype))
        return self.measured.forward(x) - target

    def after(self, arrival: Arrival, x: Tensor) -> None:
        if arrival.level.t >= self.until:
            step = self.measured.adjoint(self.solved(self.residual(arrival, x), 1.0, 0.0))
            x.sub_(step, alpha=self.weight)


@dataclass(frozen=True, eq=False)
class ILVR(Guidance):
    """Iterative latent variable refinement (Choi et al. 2021, eq. 8 and Alg. 1): x ← x − φ(x) + φ(y_t) after each row with
    φ = A⁺A, the projection onto what A measures: a low-pass filter where A is Downsampling. Samples that share what y says.

    until   process time at which the conditioning ends (the paper's range of steps); 0: y holds in the end
    """

    problem: Problem
    until: float = 0.0

    def bind(self, setting: Setting) -> StateBound:
        until = checks.number("until", self.until, 0, setting.model.process.T)
        measured = Measurement(self.problem, setting).needs_linear("inverse.ILVR")
        return Projection(measured, setting, until=until)


@dataclass(frozen=True, eq=False)
class NoisedMeasurement(Guidance):
    """The measurement with the noise of x_t put on it, y_t = α y + σ A z (Song et al. 2021, App. I.4; Song, Shen, Xing & Ermon
    2022, eq. 8): p(y_t | x_t) = N(A x_t, α² σ_y²), the gradient of whose logarithm is added to the score, by an implicit step

        x ← x − δ Aᵀ(δ A Aᵀ + α² σ_y²)⁻¹(A x − y_t),       δ = α² (σ̂_t² − σ̂²), what the row took off the noise,

    which for σ_y = 0 is the projection x ← x − A⁺(A x − y_t). For samplers that draw noise; on a Langevin row δ is c²/2.

    weight   λ of the projection instead, as in their eq. 8: 0 leaves the sample alone, 1 makes it obey y
    """

    problem: Problem
    weight: float | None = None

    def bind(self, setting: Setting) -> StateBound:
        measured = Measurement(self.problem, setting).needs_linear("inverse.NoisedMeasurement")
        if self.weight is not None:
            return Projection(measured, setting, weight=checks.number("weight", self.weight, 0, 1))
        return Projection(measured, setting) if measured.noise_std == 0 else Implicit(measured, setting)


class Implicit(Projection):
    """The implicit step for noisy measurements."""

    def after(self, arrival: Arrival, x: Tensor) -> None:
        row, level = arrival.row, arrival.level
        delta = level.alpha**2 * (row.level.sigma_hat**2 - level.sigma_hat**2)
        delta = row.c**2 / 2 if delta <= 0 else delta
        if delta > 0:
            noise = (level.alpha * self.measured.noise_std) ** 2
            x.sub_(self.measured.adjoint(self.solved(self.residual(arrival, x), delta, noise)), alpha=delta)
