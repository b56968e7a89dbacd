"""A run of a table, and a run of a solver that chooses its steps: both take a Request and return a Result."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, DataError, DTypeError, GraphError, SolverError, warn
from .execution import cuda_graph, graphs, monitor, ops, tensor_checks, verify
from .execution.adaptive import Solution
from .execution.calls import answer, dtype_of, memory_format_of, owned, picked, takes_features, time_features
from .execution.loop import UNCHANGED, Change, Condition, Draw, Loop, network_times
from .execution.modes import evaluating
from .execution.noise import PRIOR
from .model import ScoreModel  # fmt: skip
from .planning import samplers
from .probability_flow import Flow, ReverseSDE, Trace, denoised, end_time
from .table import StepTable

MAX_FEATURES = 2**28  # bytes of the time features of a whole run; beyond, the network makes them in each row


class Guide(Protocol):
    """What gives rows that guide a second output (fastdiff.guidance).

    net   that of the run, or a module of it and another
    key   what a capture bakes in beside the network
    """

    net: Any
    key: tuple[Any, ...]

    def weighed(self, table: StepTable) -> StepTable:
        """The table with the weights of its rows."""

    def conditions(self, cond: Condition) -> Condition:
        """A run's condition as a call is given it."""

    def features(self, times: Tensor, rows: int, most: int) -> Tensor | None:
        """Time features, as execution.calls.time_features makes them, or None."""

    def __call__(self, x: Tensor, time: Tensor, features: Tensor | None, cond: Any, guides: bool = False) -> Any:
        """A Network of fastdiff.execution.loop."""


class Changes(Protocol):
    """What a run of a table does to its states beside what the rows say."""

    masks: bool  # whether part of the states is known
    uncaptured: str | None  # why its rows cannot be captured

    def of(self, table: StepTable, lo: int, hi: int) -> Change:
        """For samples lo … hi − 1."""


class _Stopped(Exception):
    """Carries a network's StopIteration out of a loop, which is a generator and would take it for a fault of its own."""

    def __init__(self, error: StopIteration) -> None:
        super().__init__()
        self.error = error


@dataclass(frozen=True)
class Request:
    """The arguments of every run; tensors are checked when it is made.

    count          samples
    x_init         their start [count, *data_shape], called `start_name` in messages; None: the prior's draw
    dtype, device  of the state
    backend, engine, check    as the caller named them
    """

    model: ScoreModel
    count: int
    seed: int
    first_sample: int
    cond: Condition
    x_init: Tensor | None
    dtype: torch.dtype
    device: torch.device
    backend: str
    engine: str
    check: str
    start_name: str = "x_init"
    guide: Guide | None = None

    def __post_init__(self) -> None:
        if self.x_init is not None:
            tensor_checks.check_tensor(self.start_name, self.x_init, self.shape, self.device, self.finite)
            object.__setattr__(self, "x_init", tensor_checks.resolved(self.x_init))
        finite = self.finite and not self.model.cond_shape  # of which the model looks for itself: NaN may mean "none"
        tensor_checks.check_condition(self.cond, self.count, self.device, finite)
        cond = self.model.condition(tensor_checks.resolved(self.cond), self.count, looks=True)
        object.__setattr__(self, "cond", cond if self.guide is None else self.guide.conditions(cond))

    @property
    def net(self) -> Any:
        """The network, or a module of all networks that the run calls."""
        return self.model.net if self.guide is None else self.guide.net

    @property
    def shape(self) -> tuple[int, ...]:
        """[count, *data_shape]."""
        return (self.count, *self.model.data_shape)

    @property
    def finite(self) -> bool:
        """Whether inputs must be finite."""
        return self.check != "off"

    def resolve(self, uncaptured: str | None) -> tuple[str, str, str]:
        """(backend, engine, why), for rows that cannot be captured for the reason `uncaptured`."""
        return ops.resolve(self.backend, self.engine, self.device, self.dtype, uncaptured)

    @functools.cached_property
    def resolved(self) -> tuple[str, str, str]:
        """(backend, engine, why) of a run without rows."""
        return self.resolve("a sampler that chooses its steps has no rows to replay")

    @property
    def operations(self) -> Any:
        """The backend's module, in a run without rows."""
        return ops.backend_module(self.resolved[0])


@dataclass(frozen=True)
class Result:
    """The samples, the states of the trajectory, and what ran: `nfe` [B] and no table where a solver chose its steps; `effective`
    as in fastdiff.SampleInfo."""

    x: Tensor
    states: Tensor | None
    calls: int
    backend: str
    engine: str
    why: str
    table: StepTable | None = None
    nfe: Tensor | None = None
    effective: Tensor | None = None


@contextlib.contextmanager
def _running(net: Any, progress: bool | None, total: int, what: str, unit: str) -> Iterator[Any]:
    """Evaluation mode, no gradients, an NVTX range and a progress bar, which is what it yields."""
    with evaluating(net), torch.no_grad(), monitor.range(what), monitor.bar(progress, total, what, unit) as bar:
        yield bar


# --- a table ---------------------------------------------------------------------------------------------------------


def run_table(
    request: Request,
    table: StepTable,
    *,
    noise: Tensor | Callable[[int], Tensor] | None = None,
    batch: int,
    trajectory: int = 0,
    callback: Callable[[int, float, Tensor], object] | None = None,
    progress: bool | None = None,
    changes: Changes | None = None,
) -> Result:
    """Run the table for all samples, `batch` at a time. Arguments as in `fastdiff.sample`."""
    if request.x_init is None and math.isnan(table.prior_std):
        raise ConfigError(
            f"grid starts at t = {table.rows[0].level.t:g}, where the data still show: give x_init, or start at T"
        )
    if table.couples_batch and batch < request.count:
        _refuse_batch(
            batch, request.count, "norm='batch' takes its step from the whole batch; use norm='sample', corrector='ald'"
        )
    if request.guide is not None:
        table = request.guide.weighed(table)
    elif table.guides:
        raise ConfigError(
            "table has rows with a guidance weight, and the run has no second output for them: give "
            "guidance=guidance.ClassifierFree(scale), or the table that it was made of"
        )
    draws = None if noise is None else _CallersNoise(request, table, noise, changes is not None and changes.masks)
    loops = _Loops(request, table, noise, changes)
    result = torch.empty(request.shape, dtype=request.dtype, device=request.device)
    states = result.new_empty((trajectory, *request.shape)) if trajectory else None
    bounds = [(lo, min(lo + batch, request.count)) for lo in range(0, request.count, batch)] if result.numel() else []
    # a noise callable is called once for each row, so then all batches walk the rows together
    groups = [bounds] if callable(noise) else [[bound] for bound in bounds]
    slots, last = _slots(trajectory, len(table)), len(table) - 1
    with _running(request.net, progress, len(table) * len(bounds), "sample", "row") as bar, loops:
        for group in groups:
            runs = [loops.run(lo, hi, len(group) > 1, None if draws is None else draws.of(lo, hi)) for lo, hi in group]
            for k, now in enumerate(zip(*runs, strict=True), start=-1):
                for (lo, hi), x in zip(group, now):
                    for slot in slots.get(k, ()):
                        states[slot, lo:hi] = x  # type: ignore[index]
                    if k >= 0 and callback is not None:
                        after = table.rows[k + 1].level if k < last else table.end
                        callback(k, after.t, x.clone())
                    if k == last:
                        result[lo:hi] = x
                bar.update(len(group) if k >= 0 else 0)
        used = ops.ran(request.device, *loops.used())
    return Result(result, states, table.calls * len(bounds), *used, table)


class _Loops(contextlib.ExitStack):
    """The loops of one run of a table, one for each number of samples; as a context it gives borrowed graphs back."""

    def __init__(self, request: Request, table: StepTable, noise: Any, changes: Changes | None) -> None:
        super().__init__()
        net, device = request.net, request.device
        self.request, self.table, self.changes = request, table, changes
        self.masked = changes is not None and changes.masks
        uncaptured = graphs.obstacle(net, device, len(table), noise, request.engine)
        if changes is not None and uncaptured is None:
            uncaptured = changes.uncaptured
        if table.finishing and uncaptured is None:
            uncaptured = "some rows have operations of their own after the step"
        self.backend, self.engine, self.why = request.resolve(uncaptured)
        self.operations = ops.backend_module(self.backend)
        self.net_dtype = dtype_of(net, request.dtype)
        self.time_dtype = torch.int64 if request.model.time_input == "index" else request.dtype
        self.loops: dict[int, Loop] = {}

    def __exit__(self, *raised: Any) -> bool | None:
        stopped = super().__exit__(*raised)
        if isinstance(raised[1], _Stopped):
            raise raised[1].error
        return stopped

    def _answer(self, *args: Any) -> Any:
        request = self.request
        try:
            return (
                answer(request.model.net, request.model.variance, *args)
                if request.guide is None
                else request.guide(*args)
            )
        except StopIteration as error:
            raise _Stopped(error) from None

    def run(self, lo: int, hi: int, beside: bool, noise: Draw | None) -> Iterator[Tensor]:
        """The states of samples lo … hi − 1: the start, then one after each row; the next overwrites it.

        beside  whether other batches run at the same time, so that this one needs buffers of its own
        """
        request = self.request
        cond, first = owned(picked(request.cond, slice(lo, hi))), request.first_sample + lo
        x_init = None if request.x_init is None else request.x_init[lo:hi].detach()
        change = UNCHANGED if self.changes is None else self.changes.of(self.table, lo, hi)
        loop = None if beside else self.loops.get(hi - lo)
        if loop is None:
            loop = self.loops[hi - lo] = self._loop(hi - lo, cond)
        states = loop.run(self._answer, cond, first, x_init, noise, change)
        try:
            start = next(states)
        except GraphError as error:
            self._fall_back(error)
            loop = self.loops[hi - lo] = self._loop(hi - lo, cond)
            states = loop.run(self._answer, cond, first, x_init, noise, change)
            start = next(states)
        return itertools.chain((start,), states)

    @functools.cached_property
    def features(self) -> Tensor | None:
        """The time features of each row, [rows, *], if the network can make them beforehand."""
        net, guide = self.request.model.net, self.request.guide
        if not takes_features(net):
            return None
        times = torch.tensor(
            network_times(self.table, self.time_dtype), dtype=self.time_dtype, device=self.request.device
        )
        make = functools.partial(time_features, net) if guide is None else guide.features
        return make(times, self.capacity, MAX_FEATURES)

    @property
    def capacity(self) -> int:
        """Rows that a loop makes room for."""
        return len(self.table) if self.engine == "eager" else max(1024, 1 << (len(self.table) - 1).bit_length())

    def _loop(self, count: int, cond: Condition) -> Loop:
        """A loop for `count` samples at a time."""
        request, net = self.request, self.request.net
        shape, dtype, device = (count, *request.model.data_shape), request.dtype, request.device

        def make(make_loop: Callable[..., Any] = Loop) -> Any:
            start = torch.empty(shape, dtype=dtype, device=device)
            layout = memory_format_of(net, len(shape))
            net_input = torch.empty(shape, dtype=self.net_dtype, device=device, memory_format=layout)
            time = torch.empty(count, dtype=self.time_dtype, device=device)
            return make_loop(
                self.table,
                self.operations,
                start,
                net_input,
                time,
                self.features,
                seed=request.seed,
                check=request.check,
                masked=self.masked,
            )

        if self.engine == "graph":
            parts = cond if isinstance(cond, dict) else {None: cond}
            of_cond = tuple((name, value.shape, value.dtype) for name, value in parts.items() if value is not None)
            # what follows from the network's own tensors, such as its dtype, is in its fingerprint
            key = (
                shape, dtype, device, self.time_dtype, request.check, self.backend, of_cond, self.capacity,
                self.masked, cuda_graph.surroundings(device), None if request.guide is None else request.guide.key,
            )  # fmt: skip
            graph_loop = functools.partial(graphs.GraphLoop, self.capacity, net)
            try:
                loop = self.enter_context(graphs.borrowed(net, key, lambda: make(graph_loop)))
            except GraphError as error:
                self._fall_back(error)
            else:
                loop.load(self.table, self.features, request.seed)
                loop.chooses = request.engine == "auto"
                return loop
        return make()  # type: ignore[no-any-return]

    def used(self) -> tuple[str, str, str]:
        """(backend, engine, why) of what has run; where a loop chose by time, of the first."""
        timed = next((loop for loop in self.loops.values() if isinstance(loop, graphs.GraphLoop) and loop.timing), None)
        if self.engine == "eager" or timed is None:
            return self.backend, self.engine, self.why
        if timed.prefers_eager:
            return self.request.resolve(str(timed.timing))
        return self.backend, self.engine, f"{self.why} ({timed.timing})"

    def _fall_back(self, error: GraphError) -> None:
        """From here on, and for this network in later runs, eager loops."""
        refused = verify.refusal(self.request.device)  # of which a warning has been given
        reason = refused or f"the network cannot be captured as CUDA graphs ({error})"
        if not refused and "out of memory" not in str(error):  # which a smaller batch need not meet
            graphs.refuse(self.request.net, reason)
        if self.request.engine == "graph":
            raise GraphError(f"{reason}: use engine='auto' or 'eager'") from error
        _, self.engine, self.why = self.request.resolve(reason)
        if not refused:
            warn(
                f"{reason}, so its loop runs eagerly, slower where the network is small; engine='eager' does so without this "
                "warning",
                RuntimeWarning,
            )


class _CallersNoise:
    """The noise [rows, count, *] that the caller gives, a tensor or a callable row -> [count, *]."""

    def __init__(self, request: Request, table: StepTable, noise: Any, masked: bool) -> None:
        self.request, self.noise = request, noise
        self.last: tuple[int, Tensor] | None = None  # a callable is called once for each row
        if isinstance(noise, Tensor):
            tensor_checks.check_tensor("noise", noise, (len(table), *request.shape), request.device, finite=False)
            drawn = [k for k, row in enumerate(table.rows) if row.draws or (masked and k + 1 < len(table))]
            if request.finite and not math.isfinite(noise.detach().sum(dtype=torch.float64)):
                tensor_checks.check_finite("noise", noise[drawn])  # rows that draw none may hold anything
        elif not callable(noise):
            raise DTypeError(f"noise must be a tensor or a callable row -> tensor, got {type(noise).__name__}")

    def of(self, lo: int, hi: int) -> Draw:
        """row -> its noise for samples lo … hi − 1."""
        return lambda k: tensor_checks.resolved(self._row(k)[lo:hi]).to(self.request.dtype)

    def _row(self, k: int) -> Tensor:
        if isinstance(self.noise, Tensor):
            return self.noise[k]
        if self.last is None or self.last[0] != k:
            try:
                z = self.noise(k)
            except StopIteration as error:
                raise DataError(f"noise({k}) raised StopIteration, such as next() of an iterator at its end") from error
            tensor_checks.check_tensor(f"noise({k})", z, self.request.shape, self.request.device, self.request.finite)
            self.last = (k, z)
        return self.last[1]


def _slots(trajectory: int, rows: int) -> dict[int, list[int]]:
    """Which states a trajectory keeps: row number (−1 the start) -> its slots; the end always has one."""
    slots: dict[int, list[int]] = {}
    for slot in range(trajectory):
        k = rows - 1 if trajectory == 1 else round(slot * rows / (trajectory - 1)) - 1
        slots.setdefault(k, []).append(slot)
    return slots


# --- a solver that chooses its steps ---------------------------------------------------------------------------------


def adaptive_span(
    model: ScoreModel, sde: Any, t_min: float | None, solver: samplers.Adaptive | samplers.AdaptiveSDE
) -> tuple[float, float]:
    """The process times between which a solver that chooses its steps runs, checked."""
    process = model.process
    end = end_time(model, sde, t_min, solver.default_t_min(process))
    if end >= process.t_start:
        raise ConfigError(
            f"t_min must be below {process.t_start:g}, where the run starts, got {end:g}: give a smaller one"
        )
    return process.t_start, end


def run_adaptive(
    request: Request,
    solver: samplers.Adaptive | samplers.AdaptiveSDE,
    start: float,
    end: float,
    *,
    batch: int,
    trajectory: int = 0,
    progress: bool | None = None,
    denoise: bool = True,
) -> Result:
    """Take all samples from process time `start` to `end`, `batch` at a time. Arguments as in `fastdiff.sample`."""
    if trajectory and isinstance(solver, samplers.AdaptiveSDE):
        raise ConfigError(f"trajectory={trajectory} needs a smooth path, and {solver.name!r} has none: leave it out")
    if isinstance(solver, samplers.Adaptive) and solver.couple and batch < request.count:
        _refuse_batch(batch, request.count, "couple=True takes its step from the whole batch; use couple=False")
    if request.x_init is None:
        x = torch.empty(request.shape, dtype=request.dtype, device=request.device)
        cursor = ops.cursor(0, request.first_sample, request.seed, request.device)
        request.operations.normal(x, cursor, PRIOR)
        x.mul_(request.model.process.prior_std)
    else:
        x = request.x_init.detach().to(request.dtype).contiguous()
    solution = follow(
        request,
        x,
        start,
        end,
        solver,
        batch=batch,
        states=trajectory,
        progress=progress,
        what="sample",
        denoise=denoise,
    )
    ran = ops.ran(request.device, *request.resolved)
    return Result(solution.y, solution.states, solution.calls, *ran, nfe=solution.nfe)


def follow(
    request: Request,
    x: Tensor,
    start: float,
    end: float,
    solver: samplers.Adaptive | samplers.AdaptiveSDE,
    *,
    batch: int,
    traces: Callable[[int, int], Trace] | None = None,
    integrals: int = 0,
    states: int = 0,
    progress: bool | None = None,
    what: str,
    denoise: bool = False,
) -> Solution:
    """x [B, *] taken along the flow (or the reverse SDE) from time `start` to `end`, batch by batch.

    traces, integrals  (lo, hi) -> the trace for samples lo … hi − 1, and how many estimates it makes
    states             so many states, evenly spaced in the solver's variable, from the start to the end
    denoise            at the end of an SDE the mean of x0 (Tweedie's formula) instead of the sample

    Raises SolverError with the process time and the index of the sample.
    """
    operations = request.operations
    parts: list[Solution] = []
    with _running(request.net, progress, len(x), what, "sample") as bar:
        for lo in range(0, len(x), batch):
            hi = min(lo + batch, len(x))
            x_part, cond = x[lo:hi], picked(request.cond, slice(lo, hi))
            if isinstance(solver, samplers.AdaptiveSDE):
                first = request.first_sample + lo
                field: Flow = ReverseSDE(request.model, x_part, cond, operations, first, request.seed, denoise)
            else:
                trace, variables = None if traces is None else traces(lo, hi), solver.variables(request.model.process)
                field = Flow(request.model, variables, x_part, cond, operations, trace, integrals, states)
            try:
                with np.errstate(all="ignore"):  # what overflows is refused below
                    part = field.integrate(start, end, solver, bar.update)
                    if isinstance(solver, samplers.Adaptive) and solver.denoise and len(part.y):
                        part = denoised(field, part, end)
            except SolverError as error:
                raise SolverError(error.reason, lo + error.sample, error.t, error.nfe, error.last_step) from None
            if not math.isfinite(part.y.sum(dtype=torch.float64)) and not bool(part.y.isfinite().all()):
                raise ConfigError(
                    f"the flow of {request.model.process!r:.60} from t = {start:g} to {end:g} leaves the finite numbers: use "
                    "a process whose alpha and sigma float64 tells from 0 there, or a larger t_min"
                )
            parts.append(part)
    return parts[0] if len(parts) == 1 else _joined(parts, x, integrals, states)


def _joined(parts: list[Solution], x: Tensor, integrals: int, states: int) -> Solution:
    if not parts:
        none = torch.zeros(0, integrals, dtype=torch.float64, device=x.device)
        stored = x.new_empty((states, *x.shape)) if states else None
        return Solution(x.clone(), none, torch.zeros(0, dtype=torch.int64, device=x.device), stored, 0)
    stored = torch.cat([part.states for part in parts], 1) if states else None  # type: ignore[misc]
    y, q, nfe = (torch.cat([getattr(part, name) for part in parts]) for name in ("y", "integrals", "nfe"))
    return Solution(y, q, nfe, stored, sum(part.calls for part in parts))


def _refuse_batch(batch: int, count: int, reason: str) -> None:
    raise ConfigError(f"batch_size={batch} < num_samples={count} would change the samples: {reason}, or one batch")
