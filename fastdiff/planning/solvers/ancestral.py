"""Samplers that draw x_s given x_t and the predicted x_0."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...table import Level
from ..grids import Step
from .draft import EPS, Draft, Drafts, score


def ancestral(steps: Sequence[Step], variance: str = "posterior") -> Drafts:
    """Ancestral sampling on any process, with α_{t|s} = α_t/α_s and σ²_{t|s} = σ_t² − α²_{t|s} σ_s²:

        x_s = (x_t + σ²_{t|s} score)/α_{t|s} + c z

    Ho et al. 2020, Alg. 2 (α_{t|s}² = 1 − β, σ²_{t|s} = β); Song et al. 2021, eq. 47 for VE. c² is the "posterior"
    variance β̃ = σ²_{t|s} σ_s²/σ_t², "beta" = σ²_{t|s}, or "learned_range" between them by the network (Nichol &
    Dhariwal 2021, eq. 15), whose lower bound at σ_s = 0 is that of the step before.
    """
    drafts: Drafts = []
    low = -math.inf
    for step in steps:
        c, bounds = 0.0, None
        if variance == "learned_range":
            low = math.log(step.posterior) if step.posterior > 0 else low
            bounds = (low, math.log(step.var)) if low > -math.inf else None
        else:
            c = math.sqrt(step.posterior if variance == "posterior" else step.var)
        b = (step.var / step.ratio,)
        row = Draft(step.level, "ancestral", 1 / step.ratio, b, score(step.level), c=c, log_variance=bounds)
        drafts.append([row])
    return drafts


def ddim(steps: Sequence[Step], eta: float = 0.0) -> Drafts:
    """x_s = α_s x̂_0 + √(σ_s² − c²) ε + c z,  c = η √(σ²_{t|s} σ_s²/σ_t²).

    Song, Meng & Ermon 2021, eq. 12 and 16, for any process; η = 1 is ancestral sampling with the posterior variance.
    """
    drafts: Drafts = []
    for step in steps:
        c = eta * math.sqrt(step.posterior)
        ratio = step.next.alpha / step.level.alpha
        b = math.sqrt(max(step.next.sigma**2 - c * c, 0.0)) - ratio * step.level.sigma
        drafts.append([Draft(step.level, "ddim", ratio, (b,), EPS, c=c)])
    return drafts


def split(here: Level, there: Level, eta: float) -> tuple[float, float]:
    """(c, σ_↓) of a step down to `there`: DDIM's noise c = η σ' √(1 − σ̂'²/σ̂²), σ̂ = σ/α, and σ_↓² = σ'² − c²."""
    fall = there.sigma / there.alpha * here.alpha / here.sigma
    c = eta * there.sigma * math.sqrt((1 - fall) * (1 + fall))
    return c, there.sigma * math.hypot(math.sqrt((1 - eta) * (1 + eta)), eta * fall)
