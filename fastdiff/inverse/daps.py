"""Decoupled annealing: x0 drawn given a clean estimate and the measurements, and noise put on it again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..execution import ops
from ..execution.noise import SAMPLER
from ..guidance.base import together
from .own_steps import Drawn, OwnSteps, Steps
from .problem import Measurement, Problem

Solved = Callable[[Tensor, Any, float], Tensor]  # as Measurement.solver gives it


@dataclass(frozen=True, eq=False)
class DAPS(OwnSteps):
    """Decoupled annealing posterior sampling (Zhang et al. 2024, Alg. 1): at each level x̂0 by the probability-flow ODE, x0 drawn
    given x̂0 and y, and noise of the next level put on it.

    x0 is drawn from N(x̂0, σ̂² 1) · N(y; A x0, σ_y²), which is a Gaussian: exactly, by conjugate gradients, where the paper
    takes a hundred Langevin steps of a size of its own for each task.

    ode_steps   calls of the network for each x̂0, Euler in σ̂ on Karras et al.'s grid; of a network that knows the steps of a
                chain alone, on those nearest to it, each once
    """

    problem: Problem
    ode_steps: int = 5

    def run(self, steps: Steps) -> Drawn:
        ode_steps, calls = checks.integer("ode_steps", self.ode_steps, 1, 10**4), 0
        setting, table = steps.setting, steps.table
        count, process = setting.count, setting.model.process
        measured = Measurement(self.problem, setting).needs_linear("inverse.DAPS")
        parts, ladder, solved = together(setting.cond, []), steps.ladder(), measured.solver()
        lowest = min(table.end.sigma_hat or math.inf, ladder[-2][1])
        x = steps.start(count, setting.first_sample) / ladder[0][0]
        for k, _ in steps.rows():
            (_, sigma), (below, after) = ladder[k : k + 2]
            at = _downward(sigma, lowest, ode_steps)
            if setting.model.time_input == "index":
                at = list(dict.fromkeys(float(process.sigma_hat(round(float(process.time(each))))) for each in at))
            for high, low in zip(at, [*at[1:], 0.0]):
                t, calls = float(process.time(high)), calls + math.ceil(count / steps.batch)
                t = round(t) if setting.model.time_input == "index" else t
                alpha = float(process.alpha(t))
                x0 = steps.prediction(alpha * x, t, parts)
                x = x0 + (low / high) * (x - x0)
            x = drawn(steps, measured, solved, x, sigma, 3 * k)
            if after > 0:
                x = x + after * steps.normal(count, setting.first_sample, 3 * k + 2)
            steps.notice(k, x)
        return Drawn(below * x, calls)


def _downward(sigma: float, lowest: float, calls: int) -> list[float]:
    """So many noise ratios from one to `lowest` (Karras et al. 2022, eq. 5, ρ = 7)."""
    if calls == 1 or sigma <= lowest:
        return [sigma]
    high, low = sigma ** (1 / 7), lowest ** (1 / 7)
    return [(high + (low - high) * k / (calls - 1)) ** 7 for k in range(calls)]


def drawn(steps: Steps, measured: Measurement, solved: Solved, mean: Tensor, spread: float, draw: int) -> Tensor:
    """A draw of N(mean, spread² 1) · N(y; A x, σ_y²) by perturbation: the most probable x for a draw of the prior and noise put
    on y (Papandreou & Yuille 2010)."""
    setting = steps.setting
    x = mean + spread * steps.normal(setting.count, setting.first_sample, draw)
    z = torch.empty_like(measured.each, memory_format=torch.contiguous_format)
    at = ops.cursor(draw + 1, setting.first_sample, setting.seed, setting.device)
    steps.operations.normal(z, at, SAMPLER)
    residual = measured.each + measured.noise_std * z - measured.of(x)
    return x + spread**2 * measured.adjoint(solved(residual, spread**2, measured.noise_std**2))
