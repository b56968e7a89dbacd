"""Discretisations of the reverse SDE dx = [f x − ½(1 + λ²) g² score] dt + λ g dw̄ (Song et al. 2021, eq. 6; Zhang & Chen
2023, eq. 3): λ = 1 is the reverse-time SDE, λ = 0 the probability-flow ODE (Song et al. 2021, eq. 13)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..grids import Step
from .draft import Draft, Drafts, score


def euler_maruyama(steps: Sequence[Step], lam: float = 1.0) -> Drafts:
    """x_s = x + [f x − ½(1 + λ²) g² score] Δ + λ g √|Δ| z,  Δ = s − t < 0."""
    drafts: Drafts = []
    for step in steps:
        variance = step.diffusion**2 * -step.dt
        a, b = 1 + step.drift * step.dt, 0.5 * (1 + lam * lam) * variance
        drafts.append([Draft(step.level, "euler_maruyama", a, (b,), score(step.level), c=lam * math.sqrt(variance))])
    return drafts


def reverse_diffusion(steps: Sequence[Step], lam: float = 1.0) -> Drafts:
    """The forward step x_t = x_s + (α_{t|s} − 1) x_s + σ_{t|s} z reversed (Song et al. 2021, eq. 46, Alg. 2–3):

    x_s = (2 − α_{t|s}) x + ½(1 + λ²) σ²_{t|s} score + λ σ_{t|s} z
    """
    drafts: Drafts = []
    for step in steps:
        b, c = 0.5 * (1 + lam * lam) * step.var, lam * math.sqrt(step.var)
        drafts.append([Draft(step.level, "reverse_diffusion", 2 - step.ratio, (b,), score(step.level), c=c)])
    return drafts
