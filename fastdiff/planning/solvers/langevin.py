"""Langevin dynamics x ← x + δ score + √(2δ) z at one level or down a ladder of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...table import Level, Measure
from ..grids import Step
from .draft import Draft, Drafts, score


def _langevin(level: Level, label: str, delta: float) -> Draft:
    b, c = (delta,), math.sqrt(2 * delta)
    return Draft(level, label, 1.0, b, score(level), c=c, keeps_prediction=False, clips=False)


def annealed_langevin(levels: Sequence[Level], steps_per_level: int, eta: float) -> Drafts:
    """T steps at each level with δ_i = η σ_i², i.e. ε σ_i²/σ_L² for ε = η σ_L² (Song & Ermon 2019, Alg. 1).

    (The paper prints ½δ score + √δ z; its authors' code, and every step size they publish, means this form.)
    """
    return [[_langevin(level, "langevin", eta * level.sigma**2)] * steps_per_level for level in levels]


def denoising(level: Level) -> Draft:
    """x ← x + σ² score, the expected α x_0 (Song & Ermon 2020, §3.3; Jolicoeur-Martineau et al. 2021)."""
    return Draft(level, "denoise", 1.0, (level.sigma**2,), score(level))


def ula(level: Level, delta: float, count: int) -> Drafts:
    """The unadjusted Langevin algorithm: `count` steps of one size at one level (Roberts & Tweedie 1996)."""
    return [[_langevin(level, "ula", delta)] for _ in range(count)]


def corrector(kind: str, level: Level, step: Step, snr: float, norm: str, count: int) -> list[Draft]:
    """`count` corrector steps at `level` of `step`, with α = α_t²/α_s² of that step (1 for VE).

    "ald": δ = 2α (snr·σ)². "langevin": δ = 2α (snr·‖z‖/‖score‖)² (Song et al. 2021, Alg. 4–5) by batch-mean norms, or
    by each sample's own, then at most twice "ald"'s.
    """
    alpha = step.ratio**2
    ald = 2 * alpha * (snr * level.sigma) ** 2
    if kind == "ald":
        return [_langevin(level, "corrector", ald)] * count
    measure = Measure(norm, gain=2 * alpha * snr**2, cap=2 * ald if norm == "sample" else math.inf)
    row = Draft(level, "corrector", 1.0, (0.0,), score(level), keeps_prediction=False, clips=False, measure=measure)
    return [row] * count
