"""Euler, Heun and the midpoint method (DPM-2) on the probability-flow ODE, in process time or in the noise ratio; churn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ...table import Level
from ..grids import Grid, Step, level_at, levels_at, step_between
from ..processes import Process
from .ancestral import split
from .draft import EPS, Draft, Drafts, Meaning


def velocity(level: Level, drift: float, diffusion: float) -> Meaning:
    """dx/dt = f x − ½ g² score = α' x0 + σ' ε, with α' = f α and σ' = f σ + g²/(2σ)."""
    return drift * level.alpha, drift * level.sigma + diffusion**2 / (2 * level.sigma)


def _linear(step: Step, in_sigma: bool) -> tuple[float, float, Meaning]:
    """(A, B, h) of the Euler step x' = A x + B h: in t, h = dx/dt; in σ̂ = σ/α on x/α, h = d(x/α)/dσ̂ = ε."""
    if not in_sigma:
        return 1.0, step.dt, velocity(step.level, step.drift, step.diffusion)
    here, there = step.level, step.next
    return there.alpha / here.alpha, there.sigma - there.alpha * here.sigma / here.alpha, EPS


def euler_ode(grid: Grid) -> Drafts:
    """Euler's method: x' = x + Δt dx/dt, or x'/α' = x/α + Δσ̂ ε on grids of noise ratios (which is DDIM)."""
    drafts: Drafts = []
    for step in grid.steps:
        a, b, meaning = _linear(step, grid.in_sigma)
        drafts.append([Draft(step.level, "euler", a, (b,), meaning)])
    return drafts


class Churn(NamedTuple):
    """How much noise is added again before each step (Karras et al. 2022, Alg. 2)."""

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0


def heun(process: Process, grid: Grid, churn: Churn) -> Drafts:
    """Heun's second-order method, Karras et al. 2022, Alg. 1, and with churn Alg. 2:

    d = dx/dt,   x ← x + Δ d,   d' at the next level,   x ← base + ½Δ (d + d')   (Euler where σ = 0)
    """
    return [[*rows, *_heun_step(process, step, grid.in_sigma)] for rows, step in _churned(process, grid, churn)]


def dpm_2(process: Process, grid: Grid, eta: float, churn: Churn) -> Drafts:
    """The midpoint method: x_1 = x + Δ_1 d,   x ← base + Δ d(x_1),  with churn as Heun's.

    In t the middle is halfway. In σ̂ it is √(σ̂ σ̂'), as in k-diffusion, which is DPM-Solver-2 (Lu et al. 2022a, Alg. 1),
    Euler where σ' = 0; η > 0 goes to σ_↓ in that way and adds DDIM's noise (its dpm_2_ancestral).
    """
    steps = list(_churned(process, grid, churn))
    if not grid.in_sigma and eta == 0:
        return [[*rows, *_midpoint_in_t(process, step)] for rows, step in steps]
    splits = [split(step.level, step.next, eta) for _, step in steps]
    middles = np.array([
        math.sqrt(step.level.sigma / step.level.alpha * down / step.next.alpha)
        for (_, step), (_, down) in zip(steps, splits)
        if step.next.sigma > 0
    ])  # fmt: skip
    levels = iter(levels_at(process, middles))
    return [[*rows, *_midpoint_in_sigma(step, *ends, levels)] for (rows, step), ends in zip(steps, splits)]


def _midpoint_in_t(process: Process, step: Step) -> Sequence[Draft]:
    t = step.level.t + step.dt / 2
    middle = Level(t, float(process.alpha(t)), float(process.sigma(t)))
    first = velocity(step.level, step.drift, step.diffusion)
    second = velocity(middle, float(process.drift(t)), float(process.diffusion(t)))
    return [
        Draft(step.level, "dpm_2", 1.0, (step.dt / 2,), first, saves_base=True),
        Draft(middle, "dpm_2", 0.0, (step.dt,), second, e=1.0),
    ]


def _midpoint_in_sigma(step: Step, c: float, down: float, levels: Iterator[Level]) -> Sequence[Draft]:
    """By the next of the middle levels, but for a step into σ = 0."""
    here, there = step.level, step.next
    a, b = there.alpha / here.alpha, down - there.alpha * here.sigma / here.alpha
    if there.sigma == 0:
        return [Draft(here, "dpm_2", a, (b,), EPS)]
    middle = next(levels)
    ratio = middle.alpha / here.alpha
    return [
        Draft(here, "dpm_2", ratio, (middle.sigma - ratio * here.sigma,), EPS, saves_base=True),
        Draft(middle, "dpm_2", 0.0, (b,), EPS, e=a, c=c),
    ]


def _churned(process: Process, grid: Grid, churn: Churn) -> Iterator[tuple[list[Draft], Step]]:
    """Each step from where churn leaves the state, and churn's own row where there is one (σ̂ = σ/α, x̂ = x/α):

    γ = min(S_churn/N, √2 − 1) if S_min ≤ σ̂ ≤ S_max,   σ̂' = σ̂ (1 + γ),   x̂ ← x̂ + S_noise √(σ̂'² − σ̂²) z

    One limit beside the printed ones: σ̂' stays within the process, as the network knows nothing beyond T.
    """
    top = np.array([float(process.T)])
    highest = float((process.sigma(top) / process.alpha(top))[0])
    for step in grid.steps:
        rows: list[Draft] = []
        ratio = step.level.sigma / step.level.alpha
        most = min(churn.s_churn / len(grid.steps), math.sqrt(2) - 1, highest / ratio - 1)
        gamma = most if churn.s_min <= ratio <= churn.s_max else 0.0
        if gamma > 1e-12:
            raised = level_at(process, ratio * (1 + gamma))
            noise = raised.alpha * churn.s_noise * ratio * math.sqrt((1 + gamma) ** 2 - 1)
            rows.append(Draft(step.level, "churn", raised.alpha / step.level.alpha, c=noise))
            step = step_between(process, raised, step.next)
        yield rows, step


def _heun_step(process: Process, step: Step, in_sigma: bool) -> Sequence[Draft]:
    a, b, meaning = _linear(step, in_sigma)
    if step.next.sigma == 0:
        return [Draft(step.level, "euler", a, (b,), meaning)]
    euler = Draft(step.level, "euler", a, (b,), meaning, saves_base=True)
    t = step.next.t
    second = EPS if in_sigma else velocity(step.next, float(process.drift(t)), float(process.diffusion(t)))
    return [euler, Draft(step.next, "heun", 0.0, (b / 2, b / 2), second, e=a)]
