"""DPM-Solver and DPM-Solver++ of one step: orders 2 and 3 by stages, in λ = log(α/σ), at levels between the grid's or on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import checks
from ...errors import choose
from ...table import Level
from ..grids import Grid, Step, levels_at
from ..processes import Process
from .base import EPS, X0, FewSteps, SolverRow, SolverRows, ddim_step, finished, split_noise
from .integrals import lambdas


@dataclass(frozen=True)
class DPMSolver(FewSteps):
    """DPM-Solver-1, -2, -3 (Lu et al. 2022a: eq. 3.7, Alg. 1 with r_1 = ½, Alg. 2 with r_1 = ⅓, r_2 = ⅔):

        u_i = α_i/α x − σ_i (e^{r_i h} − 1) ε − [i = 2] σ_2 r_2/r_1 ((e^{r_2 h} − 1)/(r_2 h) − 1) (ε_1 − ε)
        x' = α'/α x − σ' (e^h − 1) ε_1                                              (order 2)
        x' = α'/α x − σ' (e^h − 1) ε − σ'/r_2 ((e^h − 1)/h − 1) (ε_2 − ε)           (order 3)

    with ε_i = ε(u_i): `order` network calls a step, one in a step into σ' = 0. Order 1 is DDIM.
    """

    order: int = 2
    name: ClassVar[str] = "dpm_solver"
    one_more: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 3)

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        middles = [_between(process, grid.steps, k / self.order) for k in range(1, self.order)]
        steps: SolverRows = []
        for i, step in enumerate(grid.steps):
            here, there = step.level, step.next
            whole, b = ddim_step(here, there)
            if there.sigma == 0 or self.order == 1:
                steps.append([SolverRow(here, self.name, whole, (b,), EPS)])
                continue
            first, *others = (levels[i] for levels in middles)
            a, b_first = ddim_step(here, first)
            rows = [SolverRow(here, self.name, a, (b_first,), EPS, saves_base=True)]
            if self.order == 2:
                rows.append(SolverRow(first, self.name, 0.0, (b,), EPS, e=whole))
            else:
                # each with a weight d on the difference of ε at the stage before and that at `here`, the base; of the two
                # the first stage's is read by no later row
                second = others[0]
                a, b_second = ddim_step(here, second)
                d = -2 * second.sigma * _curvature(here, second)
                rows.append(SolverRow(first, self.name, 0.0, (d, b_second - d), EPS, e=a, keeps_prediction=False))
                d = -1.5 * there.sigma * _curvature(here, there)
                rows.append(SolverRow(second, self.name, 0.0, (d, b - d), EPS, e=whole))
            steps.append(rows)
        return steps


def _between(process: Process, steps: Sequence[Step], part: float) -> list[Level]:
    """In each step, but one into σ' = 0, the level at λ + part·h."""
    ends = np.array([(step.level.sigma_hat, step.next.sigma_hat) for step in steps if step.next.sigma > 0])
    high, low = ends.reshape(-1, 2).T
    return levels_at(process, high ** (1 - part) * low**part)


def _curvature(here: Level, there: Level) -> float:
    """(e^h − 1)/h − 1."""
    h = math.log(here.sigma / here.alpha * there.alpha / there.sigma)
    return math.expm1(h) / h - 1


@dataclass(frozen=True)
class DPMSolverPP2S(FewSteps):
    """DPM-Solver++(2S) (Lu et al. 2022b, Alg. 1, r_1 = ½), with DDIM's noise c = η σ' √(1 − σ̂'²/σ̂²), σ_↓² = σ'² − c²:

        u = σ_1/σ x + α_1 (1 − σ̂_1/σ̂) x̂_0,     x' = σ_↓/σ x + α' (1 − σ̂_↓/σ̂) x̂_0(u) + c z

    two network calls a step, one in a step into σ' = 0. `eta` from 0 (ODE) to 1 (ancestral), as in k-diffusion. The middle
    σ̂_1² is σ̂ σ̂_↓, and u has no noise (its dpmpp_2s_ancestral); or with `sde` σ̂ σ̂', and u has noise of its own, as x' has (its
    dpmpp_sde).
    """

    eta: float = 0.0
    sde: bool = False
    name: ClassVar[str] = "dpmpp_2s"
    one_more: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.number("eta", self.eta, 0, 1)
        checks.flag("sde", self.sde)

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        splits = [split_noise(step.level, step.next, self.eta) for step in grid.steps]
        middles = levels_at(process, np.array([
            math.sqrt(step.level.sigma_hat * (step.next.sigma if self.sde else down) / step.next.alpha)
            for step, (_, down) in zip(grid.steps, splits)
            if step.next.sigma > 0
        ]))  # fmt: skip
        rows: SolverRows = []
        for i, (step, (c, down)) in enumerate(zip(grid.steps, splits)):
            a, b = _toward_x0(step.level, step.next, down)
            if step.next.sigma == 0:
                rows.append([SolverRow(step.level, self.name, a, (b,), X0)])
                continue
            noise, low = split_noise(step.level, middles[i], self.eta if self.sde else 0.0)
            a_first, b_first = _toward_x0(step.level, middles[i], low)
            rows.append([
                SolverRow(step.level, self.name, a_first, (b_first,), X0, c=noise, saves_base=True),
                SolverRow(middles[i], self.name, 0.0, (b,), X0, e=a, c=c),
            ])  # fmt: skip
        return rows


@dataclass(frozen=True)
class DPMSolverSinglestep(FewSteps):
    """DPM-Solver and DPM-Solver++ of one step whose stages are the grid's own levels, one network call each, as diffusers'
    DPMSolverSinglestepScheduler (solver_type="midpoint"): `order` grid steps from a level s make one step of that order,

        x' = σ'/σ x + α' [(1 − e^{−h}) m_0 + w D],     D = (m − m_0)/r,  r = (λ_m − λ_s)/h,  m_0 = m(s), m the last stage

    with w = ½ (1 − e^{−h}) in order 2 and 1 − (1 − e^{−h})/h in order 3, by `predicts` "x0" (++); by "eps" with α'/α, −σ' and
    e^h. Each stage is the end of a step of lower order from s. `lower_order_final`: the last step is of order 1 where the
    grid ends with a whole block; into σ' = 0 it always is.
    """

    order: int = 2
    predicts: str = "x0"
    lower_order_final: bool = True
    name: ClassVar[str] = "dpm_singlestep"
    one_more: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 3)
        choose("predicts", self.predicts, ("x0", "eps"))
        checks.flag("lower_order_final", self.lower_order_final)

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[SolverRows, Level]:
        lam, count = lambdas(grid.steps), len(grid.steps)
        orders = [i % self.order + 1 for i in range(count)]
        if (self.lower_order_final and count % self.order == 0) or grid.steps[-1].next.sigma == 0:
            orders[-1] = 1
        h0, growth = (X0, -1.0) if self.predicts == "x0" else (EPS, 1.0)
        rows: SolverRows = []
        for i, (step, k) in enumerate(zip(grid.steps, orders)):
            start = i + 1 - k
            here, there = grid.steps[start].level, step.next
            if self.predicts == "x0":
                a, b = _toward_x0(here, there, there.sigma)
            else:
                a, b = ddim_step(here, there)
            if k == 1:
                rows.append([SolverRow(here, self.name, a, (b,), h0, saves_base=True)])
                continue
            h, part = lam[i + 1] - lam[start], lam[i] - lam[start]
            total = math.expm1(growth * h) / growth
            slope = total / 2 if k == 2 else growth * (total / h - 1)
            of_stage = b / total * slope * h / part
            b_row = (of_stage, *[0.0] * (k - 2), b - of_stage)
            rows.append([SolverRow(step.level, self.name, 0.0, b_row, h0, e=a)])
        return finished(rows, grid, denoise)


def _toward_x0(here: Level, there: Level, down: float) -> tuple[float, float]:
    """(A, B) of x' = A x + B x̂_0, exact where x̂_0 is constant, with σ_↓ = `down` for σ'."""
    return down / here.sigma, there.alpha - down * here.alpha / here.sigma
