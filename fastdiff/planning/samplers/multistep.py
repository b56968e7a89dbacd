"""Samplers of one network call a step that remember predictions: LMS, DEIS, DPM-Solver++ (2M, 3M, ODE and SDE).

- Each integrates the polynomial ℓ through its last predictions, fewer at the start.
- `lower_order_final` ends with steps of order …, 2, 1; None: in runs of fewer than 15 steps, as in DPM-Solver's code.
- A step into σ' = 0, where λ' is infinite, is of order 1, except LMS's, whose variable is finite there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import checks
from ...errors import choose
from ..grids import Grid, Step
from ..processes import Process
from .base import EPS, X0, FewSteps, SolverRow, SolverRows, velocity
from .integrals import Array, exponential, lambdas, linear, middle, orders, weights


def _check_final(lower_order_final: bool | None) -> None:
    if lower_order_final is not None:
        checks.flag("lower_order_final", lower_order_final)


def _orders(steps: Sequence[Step], order: int, lower_order_final: bool | None) -> list[int]:
    return orders(steps, order, len(steps) < 15 if lower_order_final is None else lower_order_final)


@dataclass(frozen=True)
class LMS(FewSteps):
    """Adams–Bashforth of `order` 1 to 4 on a grid of any spacing (the linear multistep method of k-diffusion):

    in t:  x' = x + Σ_j ∫ℓ_j(t) dt · (dx/dt)_j,     in σ̂:  x'/α' = x/α + Σ_j ∫ℓ_j(σ̂) dσ̂ · ε_j

    in the grid's own variable. In σ̂ this is ρAB-DEIS (Zhang & Chen 2023).
    """

    order: int = 4
    name: ClassVar[str] = "lms"

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 4)

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        rows: SolverRows = []
        points = [level.sigma_hat if grid.in_sigma else level.t for level in grid.levels]
        for i, step in enumerate(grid.steps):
            w = weights(points[i], points[i + 1], points[max(i - self.order + 1, 0) : i + 1][::-1])
            if grid.in_sigma:
                a, b, h0 = step.next.alpha / step.level.alpha, [step.next.alpha * v for v in w], EPS
            else:
                a, b, h0 = 1.0, w, velocity(step.level, step.drift, step.diffusion)
            rows.append([SolverRow(step.level, self.name, a, tuple(b), h0)])
        return rows


@dataclass(frozen=True)
class DEIS(FewSteps):
    """DEIS (Zhang & Chen 2023, eq. 13–15) of `order` 1 to 4: as many predictions, so that the paper's tAB3 is order 4.

        x'/α' = x/α + Σ_j ∫ℓ_j(v) dσ̂ · ε_j

    The linear part is exact, and ε a polynomial in `variable` v: "t" (tAB-DEIS, which the authors find best) or
    "lambda" = log(α/σ) (what diffusers calls "logrho").
    """

    order: int = 3
    variable: str = "t"
    lower_order_final: bool | None = None
    name: ClassVar[str] = "deis"
    one_more: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 4)
        choose("variable", self.variable, ("t", "lambda"))
        _check_final(self.lower_order_final)

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        rows: SolverRows = []
        lam = lambdas(grid.steps)
        for i, (step, k) in enumerate(zip(grid.steps, _orders(grid.steps, self.order, self.lower_order_final))):
            if k == 1:
                b = [step.next.sigma - step.next.alpha * step.level.sigma_hat]
            elif self.variable == "lambda":
                b = [-step.next.sigma * w for w in exponential(lam, i, range(i, i - k, -1), 1.0)]
            else:
                b = [-step.next.alpha * w for w in _in_time(process, grid.steps, i, k)]
            rows.append([SolverRow(step.level, self.name, step.next.alpha / step.level.alpha, tuple(b), EPS)])
        return rows


def _in_time(process: Process, steps: Sequence[Step], i: int, order: int) -> list[float]:
    """−∫ℓ_j(t(σ̂)) dσ̂ over step i, taken over u = λ − λ_i, in which it is smooth: σ̂ = σ̂_i e^{−u}."""
    start = steps[i].level.sigma_hat
    h = math.log(start / steps[i].next.sigma * steps[i].next.alpha)
    here = steps[i].level.t

    def sigma_hat(u: Array) -> Array:
        return start * np.exp(-u)

    def t(u: Array) -> Array:
        return np.asarray(process.time(sigma_hat(u)) - here)

    return weights(0.0, h, [steps[i - j].level.t - here for j in range(order)], sigma_hat, t)


@dataclass(frozen=True)
class DPMSolverPP(FewSteps):
    """DPM-Solver++ of many steps, of `order` 1, 2 (2M) or 3 (3M), on the SDE whose noise has rate `eta`; κ = 1 + η:

        x' = σ'/σ e^{−ηh} x + α' κ ∫₀ʰ e^{−κ(h−u)} x̂_0(λ + u) du + σ' √(1 − e^{−2ηh}) z

    `eta` >= 0 as in k-diffusion: 0 the ODE, 1 the reverse SDE. Order 2 takes x̂_0 constant at the middle,
    (1 + 1/2r) x̂_0 − 1/2r x̂_0', r = h'/h of the step before: Lu et al. 2022b, Alg. 2 (2M), and its SDE form as in k-diffusion.
    Order 3 integrates the parabola through three predictions exactly; the third-order formula in the authors' code and in
    k-diffusion has half of its coefficient on the second difference, which leaves the method at order 2. `third` is "exact", or
    as published: "k_diffusion" (its dpmpp_3m_sde), or "authors", whose steps of order 2 on the way are 2M's (diffusers' too).
    """

    order: int = 2
    eta: float = 0.0
    lower_order_final: bool | None = None
    third: str = "exact"
    name: ClassVar[str] = "dpmpp_2m"
    one_more: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 3)
        checks.number("eta", self.eta, 0)
        _check_final(self.lower_order_final)
        choose("third", self.third, ("exact", "k_diffusion", "authors"))

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        rows: SolverRows = []
        lam = lambdas(grid.steps)
        for i, (step, k) in enumerate(zip(grid.steps, _orders(grid.steps, self.order, self.lower_order_final))):
            a, scale, c = linear(step, self.eta)
            if k == 2 and (self.order == 2 or self.third == "authors"):
                (total,) = exponential(lam, i, [i], -1 - self.eta)
                w = middle(total, total, (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i]))
            else:
                w = exponential(lam, i, range(i, i - k, -1), -1 - self.eta)
            if k == 3 and self.third != "exact":
                w = [v - half for v, half in zip(w, _half_of_second_difference(lam, i, -1 - self.eta))]
            rows.append([SolverRow(step.level, "dpmpp", a, tuple(scale * v for v in w), X0, c=c)])
        return rows


def _half_of_second_difference(lam: Sequence[float], i: int, growth: float) -> list[float]:
    """½ ∫₀ʰ e^{growth (h−u)} u² du · D on each of three predictions, D their second divided difference in λ."""
    h, r, s = lam[i + 1] - lam[i], lam[i] - lam[i - 1], lam[i - 1] - lam[i - 2]
    (square,) = weights(0.0, h, [0.0], lambda u: np.exp(growth * (h - u)) * u * u)
    return [0.5 * square / (r + s) * d for d in (1 / r, -1 / r - 1 / s, 1 / s)]
