"""Euler and Heun on the probability-flow ODE, in process time or in the noise ratio, with churn (Karras et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..grids import Grid, Step, level_at, step_between
from ..processes import Process
from ..table import Level
from .draft import EPS, Draft, Drafts, Meaning


def _velocity(level: Level, drift: float, diffusion: float) -> Meaning:
    """dx/dt = f x − ½ g² score = α' x0 + σ' ε, with α' = f α and σ' = f σ + g²/(2σ)."""
    return drift * level.alpha, drift * level.sigma + diffusion**2 / (2 * level.sigma)


def _linear(step: Step, in_sigma: bool) -> tuple[float, float, Meaning]:
    """(A, B, h) of the Euler step x' = A x + B h: in t, h = dx/dt; in σ̂ = σ/α on x/α, h = d(x/α)/dσ̂ = ε."""
    if not in_sigma:
        return 1.0, step.dt, _velocity(step.level, step.drift, step.diffusion)
    here, there = step.level, step.next
    return there.alpha / here.alpha, there.sigma - there.alpha * here.sigma / here.alpha, EPS


def euler_ode(grid: Grid) -> Drafts:
    """Euler's method: x' = x + Δt dx/dt, or x'/α' = x/α + Δσ̂ ε on grids of noise ratios (which is DDIM)."""
    drafts: Drafts = []
    for step in grid.steps:
        a, b, meaning = _linear(step, grid.in_sigma)
        drafts.append([Draft(step.level, "euler", a, (b,), meaning)])
    return drafts


def heun(process: Process, grid: Grid, s_churn: float, s_min: float, s_max: float, s_noise: float) -> Drafts:
    """Heun's second-order method, Karras et al. 2022, Alg. 1, and with churn Alg. 2 (σ̂ = σ/α, x̂ = x/α):

    γ = min(S_churn/N, √2 − 1) if S_min ≤ σ̂ ≤ S_max,   σ̂' = σ̂ (1 + γ),   x̂ ← x̂ + S_noise √(σ̂'² − σ̂²) z
    d = dx/dt there,   x ← x + Δ d,   d' at the next level,   x ← base + ½Δ (d + d')   (Euler where σ = 0)

    One limit beside the printed ones: σ̂' stays within the process, as the network knows nothing beyond T.
    """
    drafts: Drafts = []
    top = np.array([float(process.T)])
    highest = float((process.sigma(top) / process.alpha(top))[0])
    for step in grid.steps:
        rows: list[Draft] = []
        ratio = step.level.sigma / step.level.alpha
        gamma = (
            min(s_churn / len(grid.steps), math.sqrt(2) - 1, highest / ratio - 1) if s_min <= ratio <= s_max else 0.0
        )
        if gamma > 1e-12:
            raised = level_at(process, ratio * (1 + gamma))
            noise = raised.alpha * s_noise * ratio * math.sqrt((1 + gamma) ** 2 - 1)
            rows.append(Draft(step.level, "churn", raised.alpha / step.level.alpha, c=noise))
            step = step_between(process, raised, step.next)
        rows.extend(_heun_step(process, step, grid.in_sigma))
        drafts.append(rows)
    return drafts


def _heun_step(process: Process, step: Step, in_sigma: bool) -> Sequence[Draft]:
    a, b, meaning = _linear(step, in_sigma)
    if step.next.sigma == 0:
        return [Draft(step.level, "euler", a, (b,), meaning)]
    euler = Draft(step.level, "euler", a, (b,), meaning, opens=True)
    t = step.next.t
    second = EPS if in_sigma else _velocity(step.next, float(process.drift(t)), float(process.diffusion(t)))
    return [euler, Draft(step.next, "heun", 0.0, (b / 2, b / 2), second, e=a)]
