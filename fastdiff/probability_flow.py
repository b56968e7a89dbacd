"""The right-hand sides that adaptive solvers integrate: the probability-flow ODE and the reverse SDE of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .errors import ConfigError, SolverError, short
from .execution import ops
from .execution.adaptive import Progress, Solution, Stage, integrate
from .execution.adaptive_sde import integrate_sde
from .execution.calls import answer, dtype_of, memory_format_of, picked, takes_features, time_features
from .execution.loop import Condition
from .execution.noise import SAMPLER
from .model import ScoreModel, check_path
from .planning import predictions
from .planning.ode_variables import OdePoint, OdeVariables
from .planning.processes import Pair, require_linear

# (network, its input [B, *], which samples) -> its output, and estimates of tr ∂output/∂input and of tr 1 (execution.divergence)
Trace = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

MAX_FEATURES = 2**26  # bytes of the time features of one step; beyond, they are made in each stage


class Flow:
    """dy/du of the probability-flow ODE after a change of variables x = s·y, and with `trace` its divergence, for one batch.

    Every prediction m makes dy/du = P·y + q·m with the network's input i·y, and the divergence P·tr 1 + q·i·tr ∂m/∂(input):
    one call of the network for both.
    """

    def __init__(
        self, model: ScoreModel, variables: OdeVariables, x: Tensor, cond: Condition, operations: ModuleType,
        trace: Trace | None = None, integrals: int = 0, states: int = 0,
    ) -> None:  # fmt: skip
        """x [B, *] is where `integrate` starts; with so many integrals of the trace's estimates, and states on the way."""
        self.model, self.variables, self.x, self.cond, self.operations = model, variables, x, cond, operations
        self.trace, self.integrals, self.states = trace, integrals, states
        self.rank, self.dtype, self.device = x.ndim, x.dtype, x.device
        self.net_dtype = dtype_of(model.net, x.dtype)
        self.memory_format = memory_format_of(model.net, x.ndim)
        self.ahead = takes_features(model.net)
        self.last: tuple[Tensor, Condition] | None = None

    def target(self, point: OdePoint) -> Pair:
        """(r, w) of what moves y: r·x̂0 + w·ε̂."""
        return point.slopes

    def at(self, u: Tensor, samples: Tensor) -> list[Stage]:
        model, process = self.model, self.model.process
        point = self.variables.point(_exact(u))
        t, alpha, sigma = point.t, point.alpha, point.sigma
        p, q = model.conversion(self.target(point), t, alpha, sigma)
        state_weight = p * point.scale
        inner = predictions.input_scale(model.prediction, process, alpha, sigma) * point.scale
        time = predictions.network_time(model.time_input, process, t, alpha, sigma)
        inner, state_weight, q, time = (
            torch.as_tensor(value, device=self.device) for value in (inner, state_weight, q, time)
        )
        times = time.to(self.dtype)
        features = time_features(model.net, times, times.numel(), MAX_FEATURES) if self.ahead else None
        columns = torch.stack((inner, state_weight, q)).to(self.dtype).view(3, *u.shape, *[1] * (self.rank - 1))
        cond = self._condition(samples)

        def stage(k: int) -> Stage:
            scale, of_y, of_m = columns[:, k].unbind()

            def network(x: Tensor) -> Tensor:
                x = x.to(self.net_dtype).contiguous(memory_format=self.memory_format)
                time, ahead = times[k].expand(len(x)).clone(), None if features is None else features[k]
                return answer(model.net, model.variance, x, time, ahead, cond)[0].to(self.dtype)

            def rates(y: Tensor) -> tuple[Tensor, Tensor | None]:
                if self.trace is None:
                    return torch.addcmul(of_y * y, of_m, network(scale * y).detach()), None
                m, traces, of_unit = self.trace(network, scale * y, samples)
                divergence = torch.addcmul(state_weight[k, :, None] * of_unit, (q[k] * inner[k])[:, None], traces)
                return torch.addcmul(of_y * y, of_m, m), divergence

            return rates

        return [stage(k) for k in range(len(u))]

    def integrate(self, start: float, end: float, solver: Any, progress: Progress) -> Solution:
        """x from time `start` to `end`, the integrals less D log s, the states evenly spaced in u. Raises SolverError at a
        process time."""
        x, states = self.x, self.states
        variables = self.variables
        a, b = variables.of_time(start), variables.of_time(end)
        times = [a + (b - a) * k / max(states - 1, 1) for k in range(states)]
        if times:
            times[-1] = b
        scales = variables.point(np.array([a, b, *times])).scale.tolist()
        try:
            solution = integrate(
                self, x / scales[0], a, b, solver, operations=self.operations, integrals=self.integrals, times=times,
                progress=progress,
            )  # fmt: skip
        except SolverError as error:
            t, after = variables.point(np.array([error.t, error.t + math.copysign(error.last_step, b - a)])).t.tolist()
            raise SolverError(error.reason, error.sample, t, error.nfe, abs(after - t)) from None
        # log p_x = log p_y − D log s
        shift = math.prod(x.shape[1:]) * (math.log(scales[1]) - math.log(scales[0]))
        for k in range(states):
            solution.states[k] *= scales[2 + k]  # type: ignore[index]
        return Solution(
            solution.y * scales[1], solution.integrals + shift, solution.nfe, solution.states, solution.calls
        )

    def _condition(self, samples: Tensor) -> Condition:
        if self.cond is None:
            return None
        if self.last is None or self.last[0] is not samples:
            self.last = (samples, picked(self.cond, samples))
        return self.last[1]


class Denoised(Flow):
    """x̂0 itself, E[x_0 | x_t] by Tweedie's formula."""

    def target(self, point: OdePoint) -> Pair:
        return 0.0 * point.sigma + 1.0, 0.0 * point.sigma


def denoised(field: Flow, solution: Solution, end: float) -> Solution:
    """The solution with the mean of x0 at time `end` in place of x there, also in the last of its states."""
    x = solution.y
    times = torch.full((1, len(x)), end, dtype=torch.float64, device=x.device)
    variables = OdeVariables(field.model.process, "t", "x")
    stage = Denoised(field.model, variables, x, field.cond, field.operations).at(
        times, torch.arange(len(x), device=x.device)
    )[0]
    mean, _ = stage(x)
    if solution.states is not None and len(solution.states):
        solution.states[-1] = mean
    return Solution(mean, solution.integrals, solution.nfe + 1, solution.states, solution.calls + 1)


class ReverseSDE(Flow):
    """dx = (f x − g² score) dt + g dw, backwards in time (Song et al. 2021, eq. 6)."""

    def __init__(
        self, model: ScoreModel, x: Tensor, cond: Condition, operations: ModuleType, first_sample: int, seed: int, denoise: bool
    ) -> None:  # fmt: skip
        """With `denoise` the end is the mean of x0 there (Tweedie's formula)."""
        super().__init__(model, OdeVariables(model.process, "t", "x"), x, cond, operations)
        self.first_sample, self.seed, self.denoise = first_sample, seed, denoise

    def target(self, point: OdePoint) -> Pair:
        process = self.model.process
        f, g = process.drift(point.t), process.diffusion(point.t)
        return f * point.alpha, f * point.sigma + g**2 / point.sigma

    def diffusion(self, u: Tensor) -> Tensor:
        g = torch.as_tensor(self.model.process.diffusion(_exact(u)), dtype=u.dtype, device=self.device)
        return g.expand(u.shape)

    def noise(self, attempt: int, samples: Tensor) -> Tensor:
        # the counter names consecutive samples: those that are done are drawn for too, and left out
        z = torch.empty_like(self.x)
        self.operations.normal(z, ops.cursor(attempt, self.first_sample, self.seed, self.device), SAMPLER)
        return z if len(samples) == len(z) else z[samples]

    def integrate(self, start: float, end: float, solver: Any, progress: Progress) -> Solution:
        """x along the SDE from time `start` to `end`."""
        x = self.x
        solution = integrate_sde(self, x, start, end, solver, operations=self.operations, progress=progress)
        if not self.denoise or not x.numel():
            return solution
        return denoised(self, solution, end)


def end_time(model: ScoreModel, sde: Any, t_min: float | None, default: float) -> float:
    """The time at which the data stand. Refuses a model that has no flow, or that no adaptive solver can ask."""
    process = model.process
    require_linear(process, "the probability flow", "integrate a flow of your own on model.score(x, t)")
    check_path(sde, process)
    start = np.array([process.t_start])
    alpha, sigma = process.alpha(start), process.sigma(start)
    pair = predictions.coordinates(model.prediction, process, start, alpha, sigma)
    predictions.check_determined(model.prediction, pair, start, alpha, sigma)
    if model.time_input == "index":
        raise ConfigError(
            "time_input='index' has whole steps only, and an adaptive solver stands between them: use a sampler of fixed "
            "steps, such as 'ddim', or time_input='fractional_index'"
        )
    if t_min is None:
        return default
    if sde not in (None, process.name, process):
        raise ConfigError(
            f"t_min={short(t_min, 30)} is a time of the model's own process {process.name!r}, and sde={short(sde, 30)} has "
            "another clock: leave sde out"
        )
    low, high = process.t_noisy if process.discrete else 0.0, float(process.T)
    end = checks.number("t_min", t_min, low, high, above=low == 0)
    if not float(process.sigma(np.float64(end))) > 1e-150:
        raise ConfigError(
            f"t_min must have noise, sigma > 0, for the network to see, got {short(t_min)}: give a larger one"
        )
    return end


def _exact(u: Tensor) -> Any:
    """u as an array where it is on the host: numpy's functions round alike wherever in a batch a number stands, torch's do
    not, and no sample's numbers may depend on what is beside it. (A GPU computes each number by itself.)"""
    return u.numpy() if u.device.type == "cpu" else u
