"""Predictor–corrector formulas of many steps that call the network once a step: UniPC, SA-Solver.

Either predicts x̃' = A x + Σ_j p_j m_j + c z from the predictions m_j so far, asks the network there, m' = m(x̃'), and
corrects to A x + q m' + Σ_j q_j m_j + c z with the same A and z. That is x̃' + q m' + Σ_j (q_j − p_j) m_j, so that a
correction and the next prediction are one row, whose x is x̃; the state x itself is never stored. The last step is not
corrected, as in the authors' codes: that would take a call more.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

from ..grids import Step
from .draft import EPS, X0, Draft, Drafts, Meaning
from .integrals import orders
from .multistep import exponential, lambdas, linear, middle


class _Update(NamedTuple):
    """x̃' = a x + Σ_j p_j m_j + c z, newest m first; q: the corrector's, whose first is of m'."""

    a: float
    p: list[float]
    q: list[float]
    c: float


def _rows(steps: Sequence[Step], updates: list[_Update], label: str, meaning: Meaning) -> Drafts:
    drafts: Drafts = []
    correction: list[float] = []
    for step, update in zip(steps, updates):
        b = [p + update.a * d for p, d in zip_longest(update.p, correction, fillvalue=0.0)]
        drafts.append([Draft(step.level, label, update.a, tuple(b), meaning, c=update.c)])
        correction = [q - p for q, p in zip_longest(update.q, [0.0, *update.p], fillvalue=0.0)] if update.q else []
    return drafts


def unipc(steps: Sequence[Step], order: int, variant: str, predicts: str, lower_order_final: bool) -> Drafts:
    """UniPC-p of Zhao et al. 2023 (multistep): UniP-p predicts, UniC-p corrects to order p + 1.

    "x0":   x' = σ'/σ x + α' [(1 − e^{−h}) m_0 + B Σ_k ρ_k D_k],      D_k = (m_k − m_0)/r_k,  r_k = (λ_k − λ)/h
    "eps":  x' = α'/α x − σ' [(e^h − 1) m_0 + B Σ_k ρ_k D_k]

    ρ solves R ρ = φ/B, which is to integrate the polynomial through m_0 and the m_k exactly, whatever B is, but for one
    D: there ρ = ½ in UniP-2 and UniC-1, with B = h ("bh1") or |e^{∓h} − 1| ("bh2").
    """
    updates: list[_Update] = []
    lam = lambdas(steps)
    growth = -1.0 if predicts == "x0" else 1.0
    for i, (step, k) in enumerate(zip(steps, orders(steps, order, lower_order_final))):
        if predicts == "x0":
            a, scale, _ = linear(step, 0.0)
        else:
            a, scale = step.next.alpha / step.level.alpha, -step.next.sigma
        if step.next.sigma == 0:
            b = step.next.alpha if predicts == "x0" else -a * step.level.sigma
            updates.append(_Update(a, [b], [], 0.0))
            continue
        h = lam[i + 1] - lam[i]
        (total,) = exponential(lam, i, [i], growth)
        slope = h if variant == "bh1" else total
        p, q = [total], middle(total, slope, -1.0)[::-1]
        if k == 2:
            p = middle(total, slope, (lam[i] - lam[i - 1]) / h)
        elif k > 2:
            p = exponential(lam, i, range(i, i - k, -1), growth)
        if k > 1:
            q = exponential(lam, i, range(i + 1, i - k, -1), growth)
        updates.append(_Update(a, [scale * v for v in p], [scale * v for v in q], 0.0))
    return _rows(steps, updates, "unipc", X0 if predicts == "x0" else EPS)


def sa(steps: Sequence[Step], predictor: int, corrector: int, tau: float, lower_order_final: bool) -> Drafts:
    """SA-Solver of Xue et al. 2023 (Alg. 1), τ constant, κ = 1 + τ²:

        x' = σ'/σ e^{−τ²h} x + α' κ ∫₀ʰ e^{−κ(h−u)} x̂_0(λ + u) du + σ' √(1 − e^{−2τ²h}) z

    with the polynomial through the last `predictor` predictions, then through `corrector` of them, the new one included
    (0: no corrector). Integrals are exact, as printed; the authors' code changes those of order 2 by a term of O(h³).
    """
    updates: list[_Update] = []
    lam, eta = lambdas(steps), tau * tau
    for i, (step, k) in enumerate(zip(steps, orders(steps, predictor, lower_order_final))):
        a, scale, c = linear(step, eta)
        p = exponential(lam, i, range(i, i - k, -1), -1 - eta)
        reach = min(corrector, i + 2, len(steps) - i + 1 if lower_order_final else corrector)
        q: list[float] = []
        if reach and i + 1 < len(steps):
            q = exponential(lam, i, range(i + 1, i + 1 - reach, -1), -1 - eta)
        updates.append(_Update(a, [scale * v for v in p], [scale * v for v in q], c))
    return _rows(steps, updates, "sa", X0)
