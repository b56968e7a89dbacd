"""Euler, Heun and the midpoint method (DPM-2) on the probability-flow ODE, in the grid's own variable; churn.

On grids of times that is dx/dt in t; on grids of σ̂ = σ/α it is x/α in σ̂, where d(x/α)/dσ̂ = ε.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ... import checks
from ...errors import ConfigError
from ...table import Level
from ..grids import Grid, Step, level_at, levels_at, step_between
from ..processes import Process
from .base import EPS, Combination, FewSteps, SolverRow, SolverRows, ddim_step, split_noise, velocity


def _euler(step: Step, in_sigma: bool) -> tuple[float, float, Combination]:
    """(A, B, h) of the Euler step x' = A x + B h."""
    if in_sigma:
        return *ddim_step(step.level, step.next), EPS
    return 1.0, step.dt, velocity(step.level, step.drift, step.diffusion)


@dataclass(frozen=True)
class _Churned(FewSteps):
    """How much noise is added again before each step (Karras et al. 2022, Alg. 2)."""

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        for argument in ("s_churn", "s_min", "s_noise"):
            checks.number(argument, getattr(self, argument), 0)
        if self.s_max != math.inf:
            checks.number("s_max", self.s_max, self.s_min)

    def _churned(self, process: Process, grid: Grid) -> Iterator[tuple[list[SolverRow], Step]]:
        """Each step from where churn leaves the state, and churn's own row where there is one (x̂ = x/α):

        γ = min(S_churn/N, √2 − 1) if S_min ≤ σ̂ ≤ S_max,   σ̂' = σ̂ (1 + γ),   x̂ ← x̂ + S_noise √(σ̂'² − σ̂²) z

        One limit beside the printed ones: σ̂' stays within the process, as the network knows nothing beyond T.
        """
        if self.s_churn == 0:
            yield from (([], step) for step in grid.steps)
            return
        if grid.reference:
            raise ConfigError(f"s_churn={self.s_churn:g} has no steps on grid='score_sde': use grid='uniform'")
        highest = float(process.sigma_hat(process.t_start))
        for step in grid.steps:
            rows: list[SolverRow] = []
            sigma_hat = step.level.sigma_hat
            most = min(self.s_churn / len(grid.steps), math.sqrt(2) - 1, highest / sigma_hat - 1)
            gamma = most if self.s_min <= sigma_hat <= self.s_max else 0.0
            if gamma > 1e-12:
                raised = level_at(process, sigma_hat * (1 + gamma))
                noise = raised.alpha * self.s_noise * sigma_hat * math.sqrt((1 + gamma) ** 2 - 1)
                rows.append(SolverRow(step.level, "churn", raised.alpha / step.level.alpha, c=noise))
                step = step_between(process, raised, step.next)
            yield rows, step


@dataclass(frozen=True)
class ODE(_Churned):
    """Euler's method: x' = x + Δt dx/dt, or x'/α' = x/α + Δσ̂ ε on grids of σ̂ (which is DDIM); with churn k-diffusion's
    sample_euler."""

    name: ClassVar[str] = "ode"
    reference_grid: ClassVar[bool] = True

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        steps: SolverRows = []
        for rows, step in self._churned(process, grid):
            a, b, h0 = _euler(step, grid.in_sigma)
            steps.append([*rows, SolverRow(step.level, "euler", a, (b,), h0)])
        return steps


@dataclass(frozen=True)
class Heun(_Churned):
    """Heun's second-order method (Karras et al. 2022, Alg. 1, and with churn Alg. 2), on the Karras grid by default:

    d = dx/dt,   x ← x + Δ d,   d' at the next level,   x ← base + ½Δ (d + d')   (Euler where σ' = 0)
    """

    name: ClassVar[str] = "heun"

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        steps = []
        for rows, step in self._churned(process, grid):
            a, b, h0 = _euler(step, grid.in_sigma)
            two = step.next.sigma > 0
            rows.append(SolverRow(step.level, "euler", a, (b,), h0, saves_base=two))
            if two:
                t = step.next.t
                if not grid.in_sigma:
                    h0 = velocity(step.next, float(process.drift(t)), float(process.diffusion(t)))
                rows.append(SolverRow(step.next, "heun", 0.0, (b / 2, b / 2), h0, e=a))
            steps.append(rows)
        return steps


@dataclass(frozen=True)
class DPM2(_Churned):
    """The midpoint method, with Heun's churn: d = dx/dt,   x_1 = x + Δ_1 d,   x ← base + Δ d(x_1).

    In t the middle is halfway. In σ̂ it is √(σ̂ σ̂'), as in k-diffusion, which is DPM-Solver-2 (Lu et al. 2022a, Alg. 1),
    Euler where σ' = 0. `eta` from 0 (ODE) to 1 (ancestral): the share of DDIM's noise; η > 0 goes in that way, on any grid,
    to σ_↓ = √(σ'² − c²), and adds c z (k-diffusion's dpm_2_ancestral).
    """

    eta: float = 0.0
    name: ClassVar[str] = "dpm_2"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("eta", self.eta, 0, 1)

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        churned = list(self._churned(process, grid))
        if not grid.in_sigma and self.eta == 0:
            return [[*rows, *_halfway(process, step)] for rows, step in churned]
        splits = [split_noise(step.level, step.next, self.eta) for _, step in churned]
        middles = iter(levels_at(process, np.array([
            math.sqrt(step.level.sigma_hat * down / step.next.alpha)
            for (_, step), (_, down) in zip(churned, splits)
            if step.next.sigma > 0
        ])))  # fmt: skip
        for (rows, step), (c, down) in zip(churned, splits):
            here, there = step.level, step.next
            a, b = there.alpha / here.alpha, down - there.alpha * here.sigma / here.alpha
            if there.sigma == 0:
                rows.append(SolverRow(here, "dpm_2", a, (b,), EPS))
                continue
            middle = next(middles)
            first = middle.alpha / here.alpha
            rows += [
                SolverRow(here, "dpm_2", first, (middle.sigma - first * here.sigma,), EPS, saves_base=True),
                SolverRow(middle, "dpm_2", 0.0, (b,), EPS, e=a, c=c),
            ]
        return [rows for rows, _ in churned]


def _halfway(process: Process, step: Step) -> list[SolverRow]:
    """The midpoint method's rows in t."""
    t = step.level.t + step.dt / 2
    middle = Level(t, float(process.alpha(t)), float(process.sigma(t)))
    first = velocity(step.level, step.drift, step.diffusion)
    second = velocity(middle, float(process.drift(t)), float(process.diffusion(t)))
    return [
        SolverRow(step.level, "dpm_2", 1.0, (step.dt / 2,), first, saves_base=True),
        SolverRow(middle, "dpm_2", 0.0, (step.dt,), second, e=1.0),
    ]
