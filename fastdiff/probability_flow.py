"""A network as the adaptive runner's right-hand side: the probability-flow ODE in its variables, and the reverse SDE in time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .errors import ConfigError, SolverError
from .execution import monitor, ops
from .execution.adaptive import Progress, Solution, Stage, integrate
from .execution.adaptive_sde import integrate_sde
from .execution.monitor import bar
from .execution.noise import SAMPLER
from .model import Condition, call, check_output, evaluating, single_tensor
from .planning import predictions
from .planning.ode_variables import OdePoint, OdeVariables
from .planning.predictions import Pair
from .planning.processes import require_linear
from .planning.samplers import Adaptive, AdaptiveSDE
from .subject import Subject, check_path, dtype_of, layout_of, picked, takes_features

# (network, its input [B, *], which samples) -> its output, and estimates of tr ∂output/∂input and of tr 1 (execution.divergence)
Trace = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

MAX_FEATURES = 2**26  # bytes of what a network makes of the times of one step; beyond, it is asked in each stage


class Flow:
    """dy/du of the probability-flow ODE in its variables, and with a trace the divergence of that, for one batch.

    With x = s·y, every prediction m and all variables it is P·y + q·m, and its divergence P·tr 1 + q·i·tr ∂m/∂(input), where
    the network sees i·y: one call of the network for both.
    """

    def __init__(
        self, subject: Subject, variables: OdeVariables, shape: Sequence[int], cond: Condition, dtype: torch.dtype,
        device: torch.device, trace: Trace | None = None,
    ) -> None:  # fmt: skip
        net = subject.net
        self.subject, self.variables, self.cond, self.device, self.trace = subject, variables, cond, device, trace
        self.shape, self.dtype = tuple(shape), dtype
        self.net_dtype = dtype_of(net, dtype)
        self.layout = layout_of(net, len(shape) + 1)
        self.knows_times = takes_features(net)
        self.last: tuple[Tensor, Condition] | None = None

    def target(self, point: OdePoint) -> Pair:
        """(r, w) of what moves y: r·x̂0 + w·ε̂."""
        return point.slopes

    def at(self, u: Tensor, samples: Tensor) -> list[Stage]:
        subject, process = self.subject, self.subject.process
        point = self.variables.point(_exact(u))
        t, alpha, sigma = point.t, point.alpha, point.sigma
        source = predictions.coordinates(subject.prediction, process, t, alpha, sigma)
        p, q = predictions.convert(source, self.target(point), alpha, sigma)
        own = p * point.scale
        inner = predictions.input_scale(subject.prediction, process, alpha, sigma) * point.scale
        time = predictions.network_time(subject.time_input, process, t, alpha, sigma)
        inner, own, q, time = (torch.as_tensor(value, device=self.device) for value in (inner, own, q, time))
        times, features = time.to(self.dtype), self._features(time.to(self.dtype))
        columns = torch.stack((inner, own, q)).to(self.dtype).view(3, *u.shape, *[1] * len(self.shape))
        cond = self._condition(samples)

        def stage(k: int) -> Stage:
            scale, mine, theirs = columns[:, k].unbind()

            def network(x: Tensor) -> Tensor:
                x = x.to(self.net_dtype).contiguous(memory_format=self.layout)
                output = call(
                    subject.net, x, times[k].expand(len(x)).clone(), cond, None if features is None else features[k]
                )
                return check_output(single_tensor(output), x.shape, self.device, subject.variance)[0].to(self.dtype)

            def rates(y: Tensor) -> tuple[Tensor, Tensor | None]:
                if self.trace is None:
                    return torch.addcmul(mine * y, theirs, network(scale * y).detach()), None
                m, traces, of_unit = self.trace(network, scale * y, samples)
                divergence = torch.addcmul(own[k, :, None] * of_unit, (q[k] * inner[k])[:, None], traces)
                return torch.addcmul(mine * y, theirs, m), divergence

            return rates

        return [stage(k) for k in range(len(u))]

    def _features(self, times: Tensor) -> Tensor | None:
        """What the network makes of the times [S, B], [S, B, *], if it can do so beforehand."""
        if not self.knows_times:
            return None
        one = self.subject.net.time_features(times[0, :1])
        if one.nbytes * times.numel() > MAX_FEATURES:
            return None
        return self.subject.net.time_features(times.flatten()).view(*times.shape, *one.shape[1:])  # type: ignore[no-any-return]

    def _condition(self, samples: Tensor) -> Condition:
        if self.cond is None:
            return None
        if self.last is None or self.last[0] is not samples:
            self.last = (samples, picked(self.cond, samples))
        return self.last[1]


class ReverseSDE(Flow):
    """dx = (f x − g² score) dt + g dw, backwards in time (Song et al. 2021, eq. 6)."""

    def __init__(self, operations: ModuleType, first: int, seed: int, count: int, *flow: Any) -> None:
        super().__init__(*flow)
        self.operations, self.first, self.seed, self.count = operations, first, seed, count

    def target(self, point: OdePoint) -> Pair:
        process = self.subject.process
        f, g = process.drift(point.t), process.diffusion(point.t)
        return f * point.alpha, f * point.sigma + g**2 / point.sigma

    def diffusion(self, u: Tensor) -> Tensor:
        g = torch.as_tensor(self.subject.process.diffusion(_exact(u)), dtype=u.dtype, device=self.device)
        return g.expand(u.shape)

    def noise(self, attempt: int, samples: Tensor) -> Tensor:
        # the counter names consecutive samples: those that are done are drawn for too, and left out
        z = torch.empty((self.count, *self.shape), dtype=self.dtype, device=self.device)
        self.operations.normal(z, ops.cursor(attempt, self.first, self.seed, self.device), SAMPLER)
        return z if len(samples) == self.count else z[samples]


def _exact(u: Tensor) -> Any:
    """u as an array where it is on the host: numpy's functions round alike wherever in a batch a number stands, torch's do
    not, and no sample's numbers may depend on what is beside it. (A GPU computes each number by itself.)"""
    return u.numpy() if u.device.type == "cpu" else u


def check(subject: Subject, sde: Any, t_min: float | None, default: float) -> float:
    """The time at which the data stand; refused is what has no flow, or cannot be asked there or between a chain's steps."""
    process = subject.process
    require_linear(process, "the probability flow", "integrate a flow of your own on model.score(x, t)")
    check_path(sde, process)
    if subject.time_input == "index":
        raise ConfigError(
            "time_input='index' has whole steps only, and an adaptive solver stands between them: use a sampler of fixed "
            "steps, such as 'ddim', or a network that takes time_input='t'"
        )
    if t_min is None:
        return default
    if sde not in (None, process.name, process):
        raise ConfigError(
            f"t_min={t_min!r} is a time of the model's own process {process.name!r}, and sde={sde!r:.40} has another clock: "
            "leave sde out"
        )
    low, high = process.t_noisy if process.discrete else 0.0, float(process.T)
    end = checks.number("t_min", t_min, low, high, above=low == 0)
    if not float(process.sigma(np.float64(end))) > 1e-150:
        raise ConfigError(f"t_min must have noise, sigma > 0, for the network to see, got {t_min!r}: give a larger one")
    return end


def follow(
    subject: Subject,
    x: Tensor,
    start: float,
    end: float,
    solver: Adaptive | AdaptiveSDE,
    *,
    operations: ModuleType,
    cond: Condition = None,
    traces: Callable[[int, int], Trace] | None = None,
    integrals: int = 0,
    states: int = 0,
    seed: int = 0,
    first_sample: int = 0,
    batch: int = 2**32,
    progress: bool | None = None,
    what: str = "integrate",
    denoise: bool = False,
) -> Solution:
    """x [B, *] taken along the flow (or the reverse SDE) from time `start` to `end`, batch by batch.

    traces, integrals  (lo, hi) -> the trace for samples lo … hi − 1, and how many estimates it makes
    states             so many states, evenly spaced in the solver's variable, from the start to the end
    denoise            at the end of an SDE the mean of x0 (Tweedie's formula) instead of the sample

    Raises SolverError with the process time and the index of the sample.
    """
    total = len(x)
    found: list[Solution] = []
    with contextlib.ExitStack() as stack:
        for context in (evaluating(subject.net), torch.no_grad(), monitor.range(what)):
            stack.enter_context(context)
        shown = stack.enter_context(bar(progress, total, what, "sample"))
        for lo in range(0, total, batch):
            hi = min(lo + batch, total)
            trace = None if traces is None else traces(lo, hi)
            leg = _Leg(subject, x[lo:hi], start, end, picked(cond, slice(lo, hi)), trace, operations)
            try:
                if isinstance(solver, AdaptiveSDE):
                    found.append(leg.random(solver, first_sample + lo, seed, shown.update, denoise))
                else:
                    found.append(leg.flow(solver, integrals, states, shown.update))
            except SolverError as error:
                raise SolverError(error.reason, lo + error.sample, error.t, error.nfe, error.last_step) from None
    return found[0] if len(found) == 1 else _joined(found, x, integrals, states)


class _Leg:
    """One batch on its way."""

    def __init__(
        self, subject: Subject, x: Tensor, start: float, end: float, cond: Condition, trace: Trace | None,
        operations: ModuleType,
    ) -> None:  # fmt: skip
        self.subject, self.x, self.start, self.end, self.trace = subject, x, start, end, trace
        self.operations = operations
        self.common = (x.shape[1:], cond, x.dtype, x.device)

    def flow(self, solver: Adaptive, integrals: int, states: int, progress: Progress) -> Solution:
        variables = solver.variables(self.subject.process)
        a, b = variables.of_time(self.start), variables.of_time(self.end)
        times = [a + (b - a) * k / max(states - 1, 1) for k in range(states)]
        if times:
            times[-1] = b
        scales = variables.point(np.array([a, b, *times])).scale.tolist()
        try:
            found = integrate(
                Flow(self.subject, variables, *self.common, self.trace), self.x / scales[0], a, b,
                operations=self.operations, tableau=solver.tableau, rtol=solver.rtol, atol=solver.atol,
                couple=solver.couple, max_nfe=solver.max_nfe, integrals=integrals, times=times, progress=progress,
            )  # fmt: skip
        except SolverError as error:
            t, after = variables.point(np.array([error.t, error.t + math.copysign(error.last_step, b - a)])).t.tolist()
            raise SolverError(error.reason, error.sample, t, error.nfe, abs(after - t)) from None
        # log p_x = log p_y − D log s
        shift = math.prod(self.x.shape[1:]) * (math.log(scales[1]) - math.log(scales[0]))
        kept = found.states
        for k in range(states):
            kept[k] *= scales[2 + k]  # type: ignore[index]
        return Solution(found.y * scales[1], found.integrals + shift, found.nfe, kept, found.calls)

    def random(self, solver: AdaptiveSDE, first: int, seed: int, progress: Progress, denoise: bool) -> Solution:
        variables = OdeVariables(self.subject.process, "t", "x")
        field = ReverseSDE(self.operations, first, seed, len(self.x), self.subject, variables, *self.common)
        found = integrate_sde(
            field, self.x, self.start, self.end, operations=self.operations, rtol=solver.rtol, atol=solver.atol,
            max_nfe=solver.max_nfe, progress=progress,
        )  # fmt: skip
        if not denoise:
            return found
        every = torch.arange(len(self.x), device=self.x.device)
        end = torch.full((1, len(self.x)), self.end, dtype=torch.float64, device=self.x.device)
        mean, _ = _Mean(self.subject, variables, *self.common).at(end, every)[0](found.y)
        return Solution(mean, found.integrals, found.nfe + 1, None, found.calls + 1)


class _Mean(Flow):
    """x̂0 itself."""

    def target(self, point: OdePoint) -> Pair:
        return 0.0 * point.sigma + 1.0, 0.0 * point.sigma


def _joined(parts: list[Solution], x: Tensor, integrals: int, states: int) -> Solution:
    if not parts:
        none = torch.zeros(0, integrals, dtype=torch.float64, device=x.device)
        kept = x.new_empty((states, *x.shape)) if states else None
        return Solution(x.clone(), none, torch.zeros(0, dtype=torch.int64, device=x.device), kept, 0)
    kept = torch.cat([part.states for part in parts], 1) if states else None  # type: ignore[misc]
    y, q, nfe = (torch.cat([getattr(part, name) for part in parts]) for name in ("y", "integrals", "nfe"))
    return Solution(y, q, nfe, kept, sum(part.calls for part in parts))
