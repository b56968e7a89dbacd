"""What the formulas of many steps share: their orders, and the integrals of their interpolating polynomials."""

from __future__ import annotations

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
    found = []
    for j, node in enumerate(nodes):
        values, scale = measure, 1.0
        for k, other in enumerate(nodes):
            if k != j:
                values, scale = values * factors[k], scale * (node - other)
        found.append(float(values.sum()) / scale)
    return found


def orders(steps: Sequence[Step], order: int, lower_order_final: bool) -> list[int]:
    """Each step's order: 1, 2, … at the start, where older predictions are missing, and where σ = 0 follows (there λ is
    infinite) again 1; with `lower_order_final` … 2, 1 at the end."""
    count = len(steps)
    return [
        1 if step.next.sigma == 0 else min(order, i + 1, count - i if lower_order_final else order)
        for i, step in enumerate(steps)
    ]
