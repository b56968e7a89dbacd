"""Multistep samplers that correct each step with the next step's prediction, at one network call a step: UniPC, SA-Solver.

Either predicts x̃' = A x + Σ_j p_j m_j + c z from the predictions m_j so far, calls the network there, m' = m(x̃'), and
corrects to A x + q m' + Σ_j q_j m_j + c z with the same A and z. That is x̃' + q m' + Σ_j (q_j − p_j) m_j, so that a
correction and the next prediction are one row, whose x is x̃; the state x itself is never stored. The last step is not
corrected, as in the authors' codes: that would take a call more. Neither serves as a predictor of another corrector, which
would move x in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar, NamedTuple

from ... import checks
from ...errors import choose
from ...table import Level
from ..grids import Grid, Step
from ..processes import Process
from .base import EPS, X0, Combination, FewSteps, SolverRow, SolverRows, finished
from .integrals import exponential, lambdas, linear, middle, orders


class _Update(NamedTuple):
    """x̃' = a x + Σ_j p_j m_j + c z, newest m first; q: the corrector's, whose first is of m'; empty: none."""

    a: float
    p: list[float]
    q: list[float]
    c: float


def _rows(steps: Sequence[Step], updates: list[_Update], label: str, h0: Combination) -> SolverRows:
    rows: SolverRows = []
    correction: list[float] = []
    for step, update in zip(steps, updates):
        b = [p + update.a * d for p, d in zip_longest(update.p, correction, fillvalue=0.0)]
        rows.append([SolverRow(step.level, label, update.a, tuple(b), h0, c=update.c)])
        correction = [q - p for q, p in zip_longest(update.q, [0.0, *update.p], fillvalue=0.0)] if update.q else []
    return rows


@dataclass(frozen=True)
class UniPC(FewSteps):
    """UniPC of `order` p, 1 to 3 (Zhao et al. 2023, multistep): UniP-p predicts, UniC-p corrects to order p + 1.

    "x0":   x' = σ'/σ x + α' [(1 − e^{−h}) m_0 + B Σ_k ρ_k D_k],      D_k = (m_k − m_0)/r_k,  r_k = (λ_k − λ)/h
    "eps":  x' = α'/α x − σ' [(e^h − 1) m_0 + B Σ_k ρ_k D_k]

    ρ solves R ρ = φ/B, which is to integrate the polynomial through m_0 and the m_k exactly, whatever B is, but for one
    D: there ρ = ½ in UniP-2 and UniC-1, with B = h (`variant` "bh1") or |e^{∓h} − 1| ("bh2"). Defaults are diffusers'.

    `corrector` False is UniP alone; with "bh2" and order 2 that is DPM-Solver-2 ("eps") and DPM-Solver++ 2M ("x0") by the
    midpoint rule, as in their authors' multistep codes.
    """

    order: int = 2
    variant: str = "bh2"
    predicts: str = "x0"
    lower_order_final: bool = True
    corrector: bool = True
    name: ClassVar[str] = "unipc"
    one_more: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.integer("order", self.order, 1, 3)
        choose("variant", self.variant, ("bh1", "bh2"))
        choose("predicts", self.predicts, ("x0", "eps"))
        checks.flag("lower_order_final", self.lower_order_final)
        checks.flag("corrector", self.corrector)

    @property
    def stores_state(self) -> bool:
        return not self.corrector

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[SolverRows, Level]:
        updates: list[_Update] = []
        lam = lambdas(grid.steps)
        h0, growth = (X0, -1.0) if self.predicts == "x0" else (EPS, 1.0)
        for i, (step, k) in enumerate(zip(grid.steps, orders(grid.steps, self.order, self.lower_order_final))):
            if self.predicts == "x0":
                a, scale, _ = linear(step, 0.0)
            else:
                a, scale = step.next.alpha / step.level.alpha, -step.next.sigma
            if step.next.sigma == 0:
                b = step.next.alpha if self.predicts == "x0" else -a * step.level.sigma
                updates.append(_Update(a, [b], [], 0.0))
                continue
            h = lam[i + 1] - lam[i]
            (total,) = exponential(lam, i, [i], growth)
            slope = h if self.variant == "bh1" else total
            p, q = [total], middle(total, slope, -1.0)[::-1]
            if k == 2:
                p = middle(total, slope, (lam[i] - lam[i - 1]) / h)
            elif k > 2:
                p = exponential(lam, i, range(i, i - k, -1), growth)
            if not self.corrector:
                q = []
            elif k > 1:
                q = exponential(lam, i, range(i + 1, i - k, -1), growth)
            updates.append(_Update(a, [scale * v for v in p], [scale * v for v in q], 0.0))
        return finished(_rows(grid.steps, updates, self.name, h0), grid, denoise)


@dataclass(frozen=True)
class SA(FewSteps):
    """SA-Solver, stochastic Adams (Xue et al. 2023, Alg. 1), with constant τ, κ = 1 + τ²:

        x' = σ'/σ e^{−τ²h} x + α' κ ∫₀ʰ e^{−κ(h−u)} x̂_0(λ + u) du + σ' √(1 − e^{−2τ²h}) z

    with the polynomial through the last `predictor` predictions (1 to 3), then through `corrector` of them (0 to 4), the new
    one included (0: no corrector). `tau` is the noise: 0 the ODE, 1 the reverse SDE; the orders are diffusers'. Integrals are
    exact, as printed; the authors' code changes those of order 2 by a term of O(h³).
    """

    predictor: int = 2
    corrector: int = 2
    tau: float = 1.0
    lower_order_final: bool = True
    name: ClassVar[str] = "sa"
    one_more: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.integer("predictor", self.predictor, 1, 3)
        checks.integer("corrector", self.corrector, 0, 4)
        checks.number("tau", self.tau, 0)
        checks.flag("lower_order_final", self.lower_order_final)

    @property
    def stores_state(self) -> bool:
        return self.corrector == 0

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[SolverRows, Level]:
        updates: list[_Update] = []
        lam, eta, count = lambdas(grid.steps), self.tau * self.tau, len(grid.steps)
        for i, (step, k) in enumerate(zip(grid.steps, orders(grid.steps, self.predictor, self.lower_order_final))):
            a, scale, c = linear(step, eta)
            p = exponential(lam, i, range(i, i - k, -1), -1 - eta)
            reach = min(self.corrector, i + 2, count - i + 1 if self.lower_order_final else self.corrector)
            q: list[float] = []
            if reach and i + 1 < count:
                q = exponential(lam, i, range(i + 1, i + 1 - reach, -1), -1 - eta)
            updates.append(_Update(a, [scale * v for v in p], [scale * v for v in q], c))
        return finished(_rows(grid.steps, updates, self.name, X0), grid, denoise)
