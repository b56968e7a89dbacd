"""Decoupled annealing: x0 drawn given a clean estimate and the measurements, and noise put on it again."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..execution import ops
from ..execution.noise import SAMPLER
from ..guidance.base import together
from .own_steps import OwnSteps, Steps
from .posterior_mean import GaussianBound
from .problem import Problem, conjugate_gradients

ITERATIONS = 100  # of conjugate gradients at the most, which call no network


@dataclass(frozen=True, eq=False)
class DAPS(OwnSteps):
    """Decoupled annealing posterior sampling (Zhang et al. 2024, Alg. 1): at each level x̂0 by the probability-flow ODE, x0 drawn
    given x̂0 and y, and noise of the next level put on it.

    x0 is drawn from N(x̂0, σ̂² 1) · N(y; A x0, σ_y²), which is a Gaussian: exactly, by conjugate gradients, where the paper
    takes a hundred Langevin steps of a size of its own for each task.

    ode_steps   calls of the network for each x̂0, Euler in σ̂ on Karras et al.'s grid
    """

    problem: Problem
    ode_steps: int = 5

    def run(self, steps: Steps) -> tuple[Tensor, int]:
        calls = checks.integer("ode_steps", self.ode_steps, 1, 10**4)
        setting, table = steps.setting, steps.table
        count, process = setting.count, setting.model.process
        bound = GaussianBound(self.problem, setting, "inverse.DAPS")
        parts = together(setting.cond, [])
        levels = [(row.level.alpha, row.level.sigma / row.level.alpha) for row in table.rows]
        ends = [*levels[1:], (table.end.alpha, table.end.sigma / table.end.alpha)]
        lowest = min(ends[-1][1], levels[-1][1])
        x = steps.start(count, setting.first_sample) / levels[0][0]
        for k, _ in steps.rows():
            sigma = levels[k][1]
            for high, low in _downward(sigma, lowest, calls):
                t = float(process.time(high))
                alpha = float(process.alpha(t))
                x0 = steps.prediction(alpha * x, t, parts)
                x = x0 + (low / high) * (x - x0)
            x = _drawn(steps, bound, x, sigma, 3 * k)
            if k + 1 < len(table) or table.rows[-1].c != 0:
                x = x + ends[k][1] * steps.normal(count, setting.first_sample, 3 * k + 2)
        end = ends[-1][0] if table.rows[-1].c != 0 else 1.0
        return end * x, len(table) * calls * math.ceil(count / steps.batch)


def _downward(sigma: float, lowest: float, calls: int) -> list[tuple[float, float]]:
    """So many steps from a noise ratio by `lowest` to 0 (Karras et al. 2022, eq. 5, ρ = 7)."""
    if calls == 1 or sigma <= lowest:
        return [(sigma, 0.0)]
    high, low = sigma ** (1 / 7), lowest ** (1 / 7)
    at = [(high + (low - high) * k / (calls - 1)) ** 7 for k in range(calls)]
    return list(zip(at, [*at[1:], 0.0]))


def _drawn(steps: Steps, bound: GaussianBound, mean: Tensor, spread: float, draw: int) -> Tensor:
    """A draw of N(mean, spread² 1) · N(y; A x, σ_y²) by perturbation: the most probable x for a draw of the prior and noise put
    on y (Papandreou & Yuille 2010)."""
    setting, measured = steps.setting, bound.measured
    x = mean + spread * steps.normal(setting.count, setting.first_sample, draw)
    z = torch.empty_like(measured.each, memory_format=torch.contiguous_format)
    at = ops.cursor(draw + 1, setting.first_sample, setting.seed, setting.device)
    steps.operations.normal(z, at, SAMPLER)
    residual = measured.each + measured.noise_std * z - measured.of(x)

    def apply(u: Tensor) -> Tensor:
        return spread**2 * measured.forward(measured.adjoint(u)) + bound.variance * u

    many = min(ITERATIONS, math.prod(measured.shape))
    return x + spread**2 * measured.adjoint(conjugate_gradients(apply, residual, many))
