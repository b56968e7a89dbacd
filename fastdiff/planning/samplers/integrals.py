"""What the formulas of many steps share: their orders, and the integrals of their interpolating polynomials."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..grids import Step

Array = NDArray[np.float64]

# exact to float64 for the integrands here: a polynomial of degree three times an exponential e^{kh} with kh < 50
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def weights(
    low: float,
    high: float,
    nodes: Sequence[float],
    density: Callable[[Array], Array] = np.ones_like,
    variable: Callable[[Array], Array] | None = None,
) -> list[float]:
    """∫ density(u) ℓ_j(v(u)) du from `low` to `high`, of the Lagrange polynomials ℓ_j over `nodes`; v(u) = u by default."""
    u = (low + high) / 2 + (high - low) / 2 * _POINTS
    measure = (high - low) / 2 * _WEIGHTS * density(u)
    v = u if variable is None else variable(u)
    factors = [v - node for node in nodes]
    integrals = []
    for j, node in enumerate(nodes):
        values, scale = measure, 1.0
        for k, other in enumerate(nodes):
            if k != j:
                values, scale = values * factors[k], scale * (node - other)
        integrals.append(float(values.sum()) / scale)
    return integrals


def exponential(lam: Sequence[float], i: int, nodes: Sequence[int], growth: float) -> list[float]:
    """∫₀ʰ e^{growth (h−u)} ℓ_j(λ_i + u) du over step i, ℓ_j over the levels `nodes`; h may be infinite for one node."""
    h = lam[i + 1] - lam[i]
    if len(nodes) == 1:
        return [math.expm1(growth * h) / growth]
    return weights(0.0, h, [lam[n] - lam[i] for n in nodes], lambda u: np.exp(growth * (h - u)))


def middle(total: float, slope: float, r: float) -> list[float]:
    """Weights of m_0 and of m_1 at −r steps: total·m_0 + slope·½(m_0 − m_1)/r, exact where slope = total and κh is small."""
    return [total + slope / (2 * r), -slope / (2 * r)]


def linear(step: Step, eta: float) -> tuple[float, float, float]:
    """(A, s, c) of x' = A x + s ∫₀ʰ e^{−κ(h−u)} x̂_0 du + c z, κ = 1 + η."""
    here, there = step.level, step.next
    if there.sigma == 0:
        return 0.0, (1 + eta) * there.alpha, 0.0
    h = math.log(here.sigma / here.alpha * there.alpha / there.sigma)
    noise = there.sigma * math.sqrt(-math.expm1(-2 * eta * h))
    return there.sigma / here.sigma * math.exp(-eta * h), (1 + eta) * there.alpha, noise


def lambdas(steps: Sequence[Step]) -> list[float]:
    """λ = log(α/σ) of each level; where σ = 0 it is infinite."""
    levels = [*(step.level for step in steps), steps[-1].next]
    return [math.log(level.alpha / level.sigma) if level.sigma > 0 else math.inf for level in levels]


def orders(steps: Sequence[Step], order: int, lower_order_final: bool) -> list[int]:
    """Each step's order: 1, 2, … at the start, where older predictions are missing, and where σ = 0 follows (there λ is
    infinite) again 1; with `lower_order_final` … 2, 1 at the end."""
    count = len(steps)
    return [
        1 if step.next.sigma == 0 else min(order, i + 1, count - i if lower_order_final else order)
        for i, step in enumerate(steps)
    ]
