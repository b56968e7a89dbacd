"""Formulas of many steps: LMS, DEIS, DPM-Solver++ (2M, 3M, ODE and SDE), each from integrals of a polynomial.

λ = log(α/σ), h = λ_s − λ_t > 0 for a step from t down to s, σ̂ = σ/α = e^{−λ}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..grids import Grid, Step
from ..processes import Process
from .draft import EPS, X0, Draft, Drafts
from .heun import velocity
from .integrals import Array, orders, weights


def lms(grid: Grid, order: int) -> Drafts:
    """Adams–Bashforth on a grid of any spacing (the linear multistep method of Katherine Crowson's k-diffusion):

    in t:  x' = x + Σ_j ∫ℓ_j(t) dt · (dx/dt)_j,     in σ̂:  x'/α' = x/α + Σ_j ∫ℓ_j(σ̂) dσ̂ · ε_j

    with ℓ_j over the last `order` levels, fewer at the start. In σ̂ this is Zhang & Chen 2023's ρAB-DEIS.
    """
    drafts: Drafts = []
    points = [level.sigma / level.alpha if grid.in_sigma else level.t for level in grid.levels]
    for i, step in enumerate(grid.steps):
        w = weights(points[i], points[i + 1], points[max(i - order + 1, 0) : i + 1][::-1])
        if grid.in_sigma:
            a, b, meaning = step.next.alpha / step.level.alpha, [step.next.alpha * v for v in w], EPS
        else:
            a, b, meaning = 1.0, w, velocity(step.level, step.drift, step.diffusion)
        drafts.append([Draft(step.level, "lms", a, tuple(b), meaning)])
    return drafts


def deis(process: Process, steps: Sequence[Step], order: int, variable: str, lower_order_final: bool) -> Drafts:
    """x'/α' = x/α + Σ_j ∫ℓ_j(v) dσ̂ · ε_j: the linear part exact, ε a polynomial in v = t or λ.

    Zhang & Chen 2023, eq. 13–15: tAB-DEIS in t, which they find best; in λ it is what diffusers calls "logrho".
    """
    drafts: Drafts = []
    ratios = [step.level.sigma / step.level.alpha for step in steps]
    lam = lambdas(steps)
    for i, (step, k) in enumerate(zip(steps, orders(steps, order, lower_order_final))):
        if k == 1:
            b = [step.next.sigma - step.next.alpha * ratios[i]]
        elif variable == "lambda":
            b = [-step.next.sigma * w for w in exponential(lam, i, range(i, i - k, -1), 1.0)]
        else:
            b = [-step.next.alpha * w for w in _in_time(process, steps, i, k)]
        drafts.append([Draft(step.level, "deis", step.next.alpha / step.level.alpha, tuple(b), EPS)])
    return drafts


def _in_time(process: Process, steps: Sequence[Step], i: int, order: int) -> list[float]:
    """−∫ℓ_j(t(σ̂)) dσ̂ over step i, taken over u = λ − λ_i, in which it is smooth: σ̂ = σ̂_i e^{−u}."""
    ratio = steps[i].level.sigma / steps[i].level.alpha
    h = math.log(ratio / steps[i].next.sigma * steps[i].next.alpha)
    here = steps[i].level.t

    def sigma_hat(u: Array) -> Array:
        return ratio * np.exp(-u)

    def t(u: Array) -> Array:
        return np.asarray(process.time(sigma_hat(u)) - here)

    return weights(0.0, h, [steps[i - j].level.t - here for j in range(order)], sigma_hat, t)


def dpmpp_multistep(steps: Sequence[Step], order: int, eta: float, lower_order_final: bool) -> Drafts:
    """DPM-Solver++ of many steps on the SDE whose noise has rate η (0: the ODE), κ = 1 + η:

        x' = σ'/σ e^{−ηh} x + α' κ ∫₀ʰ e^{−κ(h−u)} x̂_0(λ + u) du + σ' √(1 − e^{−2ηh}) z

    `order` 2 takes x̂_0 constant at the middle, D = (1 + 1/2r) x̂_0 − 1/2r x̂_0', r = h'/h of the step before: Lu et al.
    2022b, Alg. 2 (2M), and its SDE form as in k-diffusion. Order 3 (3M) integrates the parabola through three
    predictions exactly; the third-order formula in the authors' code and in k-diffusion has half of its coefficient on the
    second difference, which leaves the method at order 2.
    """
    drafts: Drafts = []
    lam = lambdas(steps)
    for i, (step, k) in enumerate(zip(steps, orders(steps, order, lower_order_final))):
        a, scale, c = linear(step, eta)
        if k == 2 and order == 2:
            (total,) = exponential(lam, i, [i], -1 - eta)
            w = middle(total, total, (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i]))
        else:
            w = exponential(lam, i, range(i, i - k, -1), -1 - eta)
        drafts.append([Draft(step.level, "dpmpp", a, tuple(scale * v for v in w), X0, c=c)])
    return drafts


def lambdas(steps: Sequence[Step]) -> list[float]:
    """λ of each level; where σ = 0 it is infinite."""
    levels = [*(step.level for step in steps), steps[-1].next]
    return [math.log(level.alpha / level.sigma) if level.sigma > 0 else math.inf for level in levels]


def linear(step: Step, eta: float) -> tuple[float, float, float]:
    """(A, s, c) of x' = A x + s ∫₀ʰ e^{−κ(h−u)} x̂_0 du + c z, κ = 1 + η."""
    here, there = step.level, step.next
    if there.sigma == 0:
        return 0.0, (1 + eta) * there.alpha, 0.0
    h = math.log(here.sigma / here.alpha * there.alpha / there.sigma)
    noise = there.sigma * math.sqrt(-math.expm1(-2 * eta * h))
    return there.sigma / here.sigma * math.exp(-eta * h), (1 + eta) * there.alpha, noise


def exponential(lam: Sequence[float], i: int, nodes: Sequence[int], growth: float) -> list[float]:
    """∫₀ʰ e^{growth (h−u)} ℓ_j(λ_i + u) du over step i, ℓ_j over the levels `nodes`; h may be infinite for one node."""
    h = lam[i + 1] - lam[i]
    if len(nodes) == 1:
        return [math.expm1(growth * h) / growth]
    return weights(0.0, h, [lam[n] - lam[i] for n in nodes], lambda u: np.exp(growth * (h - u)))


def middle(total: float, slope: float, r: float) -> list[float]:
    """Weights of m_0 and of m_1 at −r steps: total·m_0 + slope·½(m_0 − m_1)/r, exact where slope = total and κh is small."""
    return [total + slope / (2 * r), -slope / (2 * r)]
