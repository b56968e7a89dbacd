"""Simulation-based inference on two moons: the posterior of θ given x, learned from pairs (θ, x) alone.

The task of sbibm (Lueckmann et al. 2021, "Benchmarking simulation-based inference", appendix T.8): θ ~ U(−1, 1)², and

    x = (r cos a + 1/4, r sin a) + (−|θ₁ + θ₂|, −θ₁ + θ₂)/√2,   a ~ U(−π/2, π/2),   r ~ N(0.1, 0.01²).

    python examples/two_moons.py

trains on 10,000 simulations and compares draws of ten posteriors with exact ones by a classifier's accuracy (C2ST: 0.5 where it
cannot tell them apart; published for neural posterior estimation at 10,000 simulations: 0.606).
"""

from __future__ import annotations

import math

import numpy as np


def moon(count: int, rng: np.random.Generator) -> np.ndarray:
    """x at θ = 0, [count, 2]."""
    a, r = rng.uniform(-math.pi / 2, math.pi / 2, count), rng.normal(0.1, 0.01, count)
    return np.stack((r * np.cos(a) + 0.25, r * np.sin(a)), 1)


def simulate(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x [N, 2] of θ [N, 2]."""
    plus, minus = theta.sum(1), theta[:, 1] - theta[:, 0]
    return moon(len(theta), rng) + np.stack((-np.abs(plus), minus), 1) / math.sqrt(2)


def posterior(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Exact draws of θ [count, 2] given one x [2].

    Given x, θ ↦ x − (−|θ₁ + θ₂|, −θ₁ + θ₂)/√2 keeps areas and takes two θ to each point; so with a flat prior these points are
    distributed as a moon, where they have θ in the prior's square, and either sign of θ₁ + θ₂ is as likely.
    """
    found = np.empty((0, 2))
    while len(found) < count:
        plus, minus = ((moon(count, rng) - x) * math.sqrt(2) * [1, -1]).T
        plus, possible = plus * rng.choice([-1, 1], count), plus >= 0
        theta = np.stack((plus - minus, plus + minus), 1) / 2
        found = np.concatenate((found, theta[possible & (np.abs(theta) <= 1).all(1)]))
    return found[:count]
