"""DPM-Solver and DPM-Solver++ of one step: orders 2 and 3 by stages at intermediate levels.

λ = log(α/σ), h = λ' − λ > 0 for a step from (α, σ) down to (α', σ'), σ̂ = σ/α. Into σ' = 0 a step is of order 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...table import Level
from ..grids import Step, levels_at
from ..processes import Process
from .ancestral import split
from .draft import EPS, X0, Draft, Drafts


def dpm_solver(process: Process, steps: Sequence[Step], order: int) -> Drafts:
    """DPM-Solver-1, -2, -3 of Lu et al. 2022a: eq. 3.7, Alg. 1 (r_1 = ½) and Alg. 2 (r_1 = ⅓, r_2 = ⅔).

        u_i = α_i/α x − σ_i (e^{r_i h} − 1) ε − [i = 2] σ_2 r_2/r_1 ((e^{r_2 h} − 1)/(r_2 h) − 1) (ε_1 − ε)
        x' = α'/α x − σ' (e^h − 1) ε_1                                              (order 2)
        x' = α'/α x − σ' (e^h − 1) ε − σ'/r_2 ((e^h − 1)/h − 1) (ε_2 − ε)           (order 3)

    with ε_i = ε(u_i). Order 1 is DDIM.
    """
    middles = [_between(process, steps, k / order) for k in range(1, order)]
    drafts: Drafts = []
    for i, step in enumerate(steps):
        here, there = step.level, step.next
        if there.sigma == 0 or order == 1:
            drafts.append([Draft(here, "dpm_solver", there.alpha / here.alpha, (_ddim(here, there),), EPS)])
            continue
        first, *others = (levels[i] for levels in middles)
        rows = [Draft(here, "dpm_solver", first.alpha / here.alpha, (_ddim(here, first),), EPS, saves_base=True)]
        if order == 2:
            rows.append(Draft(first, "dpm_solver", 0.0, (_ddim(here, there),), EPS, e=there.alpha / here.alpha))
        else:
            second = others[0]
            # the middle stage's prediction is nobody's but its own
            rows.append(
                _stage(here, first, second, -2 * second.sigma * _curvature(here, second), keeps_prediction=False)
            )
            rows.append(_stage(here, second, there, -1.5 * there.sigma * _curvature(here, there)))
        drafts.append(rows)
    return drafts


def _between(process: Process, steps: Sequence[Step], part: float) -> list[Level]:
    """In each step, but one into σ = 0, the level at λ + part·h."""
    ends = np.array([(s.level.sigma / s.level.alpha, s.next.sigma / s.next.alpha) for s in steps if s.next.sigma > 0])
    high, low = ends.reshape(-1, 2).T
    return levels_at(process, high ** (1 - part) * low**part)


def _ddim(here: Level, there: Level) -> float:
    """−σ' (e^h − 1)."""
    return there.sigma - there.alpha * here.sigma / here.alpha


def _curvature(here: Level, there: Level) -> float:
    """(e^h − 1)/h − 1."""
    h = math.log(here.sigma / here.alpha * there.alpha / there.sigma)
    return math.expm1(h) / h - 1


def _stage(here: Level, at: Level, there: Level, b: float, keeps_prediction: bool = True) -> Draft:
    """From x at `here` (the base) to `there`, with weight b on the difference of the prediction at `at` and that at `here`."""
    return Draft(
        at,
        "dpm_solver",
        0.0,
        (b, _ddim(here, there) - b),
        EPS,
        e=there.alpha / here.alpha,
        keeps_prediction=keeps_prediction,
    )


def dpmpp_2s(process: Process, steps: Sequence[Step], eta: float, sde: bool) -> Drafts:
    """DPM-Solver++(2S) of Lu et al. 2022b, Alg. 1 (r_1 = ½), with DDIM's noise c = η σ' √(1 − σ̂'²/σ̂²):

        u = σ_1/σ x + α_1 (1 − σ̂_1/σ̂) x̂_0,     x' = σ_↓/σ x + α' (1 − σ̂_↓/σ̂) x̂_0(u) + c z,     σ_↓² = σ'² − c²

    The middle σ̂_1² is σ̂ σ̂_↓, and u has no noise (k-diffusion's dpmpp_2s_ancestral); or with `sde` it is σ̂ σ̂', and u has
    noise of its own, as x' has (its dpmpp_sde).
    """
    splits = [split(step.level, step.next, eta) for step in steps]
    ratios = [
        math.sqrt(step.level.sigma / step.level.alpha * (step.next.sigma if sde else down) / step.next.alpha)
        for step, (_, down) in zip(steps, splits)
        if step.next.sigma > 0
    ]
    middles = levels_at(process, np.array(ratios))
    drafts: Drafts = []
    for i, (step, (c, down)) in enumerate(zip(steps, splits)):
        a, b = _data(step.level, step.next, down)
        if step.next.sigma == 0:
            drafts.append([Draft(step.level, "dpmpp_2s", a, (b,), X0)])
            continue
        noise, low = split(step.level, middles[i], eta if sde else 0.0)
        first = _data(step.level, middles[i], low)
        drafts.append([
            Draft(step.level, "dpmpp_2s", first[0], first[1:], X0, c=noise, saves_base=True),
            Draft(middles[i], "dpmpp_2s", 0.0, (b,), X0, e=a, c=c),
        ])  # fmt: skip
    return drafts


def _data(here: Level, there: Level, down: float) -> tuple[float, float]:
    """(A, B) of x' = A x + B x̂_0 down to `there` with σ_↓ for its σ."""
    return down / here.sigma, there.alpha - down * here.alpha / here.sigma
