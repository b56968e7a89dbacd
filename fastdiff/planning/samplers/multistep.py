"""Samplers of one network call a step that remember predictions.

`lower_order_final` ends with steps of order …, 2, 1; None: in runs of fewer than 15 steps, as in DPM-Solver's code. A step
into σ = 0 is of order 1 in any case, except LMS's, whose variable is finite there. UniPC and SA, whose row corrects the
step before, do not `predict` for another corrector, which would move x in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import checks
from ...errors import choose
from ...table import Level
from .. import solvers
from ..grids import Grid
from ..processes import Process
from ..solvers.draft import Drafts
from .base import FewSteps, finished


def _lowers(lower_order_final: bool | None, grid: Grid) -> bool:
    return len(grid.steps) < 15 if lower_order_final is None else lower_order_final


@dataclass(frozen=True)
class LMS(FewSteps):
    """Adams–Bashforth of `order` 1 to 4, in the grid's own variable: in t, or in σ̂ = σ/α on x/α (k-diffusion's LMS)."""

    order: int = 4
    name: ClassVar[str] = "lms"

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 4)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        return solvers.lms(grid, self.order)


@dataclass(frozen=True)
class DEIS(FewSteps):
    """DEIS (Zhang & Chen 2023) of `order` 1 to 4: as many predictions, so that the paper's tAB3 is order 4.

    `variable`: ε is a polynomial in "t" (tAB-DEIS) or in "lambda" = log(α/σ) (what diffusers has, as "logrho").
    """

    order: int = 3
    variable: str = "t"
    lower_order_final: bool | None = None
    name: ClassVar[str] = "deis"

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 4)
        choose("variable", self.variable, ("t", "lambda"))
        _check_final(self.lower_order_final)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        lower = _lowers(self.lower_order_final, grid)
        return solvers.deis(process, grid.steps, self.order, self.variable, lower)


@dataclass(frozen=True)
class DPMSolverPP(FewSteps):
    """DPM-Solver++ of many steps (Lu et al. 2022b): `order` 1, 2 (2M) or 3 (3M).

    `eta` >= 0 is the rate of the SDE's noise, as in k-diffusion: 0 the ODE, 1 the reverse SDE.
    """

    order: int = 2
    eta: float = 0.0
    lower_order_final: bool | None = None
    name: ClassVar[str] = "dpmpp_2m"

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 3)
        checks.number("eta", self.eta, 0)
        _check_final(self.lower_order_final)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        return solvers.dpmpp_multistep(grid.steps, self.order, self.eta, _lowers(self.lower_order_final, grid))


@dataclass(frozen=True)
class UniPC(FewSteps):
    """UniPC of `order` 1 to 3 (Zhao et al. 2023); corrected, it converges as `order` + 1. Defaults are diffusers'.

    `variant`: B(h), "bh1" or "bh2". `predicts`: polynomials of "x0" or of "eps".
    """

    order: int = 2
    variant: str = "bh2"
    predicts: str = "x0"
    lower_order_final: bool = True
    name: ClassVar[str] = "unipc"

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 3)
        choose("variant", self.variant, ("bh1", "bh2"))
        choose("predicts", self.predicts, ("x0", "eps"))
        checks.flag("lower_order_final", self.lower_order_final)

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[Drafts, Level]:
        drafts = solvers.unipc(grid.steps, self.order, self.variant, self.predicts, self.lower_order_final)
        return finished(drafts, grid, denoise)


@dataclass(frozen=True)
class SA(FewSteps):
    """SA-Solver (Xue et al. 2023): stochastic Adams, `predictor` predictions (1 to 3), corrected with `corrector` (0 to 4,
    0: not), the new one among them. `tau`: the noise, 0 the ODE, 1 the reverse SDE; the orders are diffusers'."""

    predictor: int = 2
    corrector: int = 2
    tau: float = 1.0
    lower_order_final: bool = True
    name: ClassVar[str] = "sa"

    def __post_init__(self) -> None:
        checks.integer("predictor", self.predictor, 1, 3)
        checks.integer("corrector", self.corrector, 0, 4)
        checks.number("tau", self.tau, 0)
        checks.flag("lower_order_final", self.lower_order_final)

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[Drafts, Level]:
        drafts = solvers.sa(grid.steps, self.predictor, self.corrector, self.tau, self.lower_order_final)
        return finished(drafts, grid, denoise)


def _check_final(value: bool | None) -> None:
    if value is not None:
        checks.flag("lower_order_final", value)
