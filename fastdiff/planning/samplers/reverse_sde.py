"""Discretisations of the reverse SDE dx = [f x − ½(1 + λ²) g² score] dt + λ g dw̄ (Song et al. 2021, eq. 6; Zhang & Chen
2023, eq. 3): `lam` λ = 1 is the reverse-time SDE, λ = 0 the probability-flow ODE (Song et al. 2021, eq. 13)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ... import checks
from ...errors import ConfigError
from ..grids import Grid
from ..processes import Process
from .base import Sampler, SolverRow, SolverRows, score


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """x_s = x + [f x − ½(1 + λ²) g² score] Δ + λ g √|Δ| z,  Δ = s − t < 0; `lam` from 0 (ODE) to 1 (SDE)."""

    lam: float = 1.0
    name: ClassVar[str] = "euler_maruyama"
    reference_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.number("lam", self.lam, 0, 1)

    @property
    def in_time(self) -> bool:
        return True

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        if grid.in_sigma:
            raise ConfigError(
                "euler_maruyama steps in process time, not in sigma: use a grid of times, or ancestral or ode"
            )
        rows: SolverRows = []
        for step in grid.steps:
            variance = step.diffusion**2 * -step.dt
            a, b, c = (
                1 + step.drift * step.dt,
                0.5 * (1 + self.lam * self.lam) * variance,
                self.lam * math.sqrt(variance),
            )
            rows.append([SolverRow(step.level, "euler_maruyama", a, (b,), score(step.level), c=c)])
        return rows


@dataclass(frozen=True)
class ReverseDiffusion(Sampler):
    """The forward step x_t = x_s + (α_{t|s} − 1) x_s + σ_{t|s} z reversed (Song et al. 2021, eq. 46, Alg. 2–3):

        x_s = (2 − α_{t|s}) x + ½(1 + λ²) σ²_{t|s} score + λ σ_{t|s} z

    with α_{t|s}, σ_{t|s} as in ancestral sampling; `lam` from 0 (ODE) to 1 (SDE).
    """

    lam: float = 1.0
    name: ClassVar[str] = "reverse_diffusion"
    reference_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.number("lam", self.lam, 0, 1)

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        rows: SolverRows = []
        for step in grid.steps:
            a, b, c = 2 - step.ratio, 0.5 * (1 + self.lam * self.lam) * step.var, self.lam * math.sqrt(step.var)
            rows.append([SolverRow(step.level, "reverse_diffusion", a, (b,), score(step.level), c=c)])
        return rows
