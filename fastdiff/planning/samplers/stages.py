"""Samplers of several network calls a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ... import checks
from .. import solvers
from ..grids import Grid
from ..processes import Process
from ..solvers.draft import Drafts
from .base import FewSteps


@dataclass(frozen=True)
class _Churned(FewSteps):
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        for argument in ("s_churn", "s_min", "s_noise"):
            checks.number(argument, getattr(self, argument), 0)
        if self.s_max != math.inf:
            checks.number("s_max", self.s_max, self.s_min)

    @property
    def churn(self) -> solvers.Churn:
        return solvers.Churn(self.s_churn, self.s_min, self.s_max, self.s_noise)


@dataclass(frozen=True)
class Heun(_Churned):
    """Heun's method with churn (Karras et al. 2022, Alg. 1–2), on the Karras grid unless another is named."""

    name: ClassVar[str] = "heun"

    def predict(self, process: Process, grid: Grid) -> Drafts:
        return solvers.heun(process, grid, self.churn)


@dataclass(frozen=True)
class DPM2(_Churned):
    """The midpoint method in the grid's own variable, with Heun's churn. `eta` from 0 (ODE) to 1 (ancestral): the share of
    DDIM's noise, then in σ̂ on any grid."""

    eta: float = 0.0
    name: ClassVar[str] = "dpm_2"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("eta", self.eta, 0, 1)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        return solvers.dpm_2(process, grid, self.eta, self.churn)


@dataclass(frozen=True)
class DPMSolver(FewSteps):
    """DPM-Solver-1, -2 or -3 (Lu et al. 2022a): `order` network calls a step, one in a step into σ = 0."""

    order: int = 2
    name: ClassVar[str] = "dpm_solver"

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 3)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        return solvers.dpm_solver(process, grid.steps, self.order)


@dataclass(frozen=True)
class DPMSolverPP2S(FewSteps):
    """DPM-Solver++(2S) (Lu et al. 2022b, Alg. 1): two network calls a step, one in a step into σ = 0.

    `eta` from 0 (ODE) to 1 (ancestral) is the share of DDIM's noise, as in k-diffusion; `sde`: the stage between has noise
    too (its dpmpp_sde, where not, its dpmpp_2s_ancestral).
    """

    eta: float = 0.0
    sde: bool = False
    name: ClassVar[str] = "dpmpp_2s"

    def __post_init__(self) -> None:
        checks.number("eta", self.eta, 0, 1)
        checks.flag("sde", self.sde)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        return solvers.dpmpp_2s(process, grid.steps, self.eta, self.sde)
