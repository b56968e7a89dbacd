"""sample(): names become objects, objects a table, the table a run."""

from __future__ import annotations

import contextlib
import functools
import math
import secrets
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import capture, checks, graphs, grids, inputs, marks, ops, processes, runner, samplers
from .errors import ConfigError, DataError, DTypeError, GraphError, choose, names_keywords
from .model import Condition, call, check_output, evaluating, single_tensor
from .models.layers import TimeConditioned
from .plan import MAX_STEPS, plan
from .reference import noise as fdn1
from .subject import Subject, layout_of, parameters, place_of, sliced, subject_of, takes_features
from .table import StepTable

MAX_FEATURES = 2**28  # bytes of what a network makes of all times of a run; beyond, it is asked in each row


@dataclass(frozen=True)
class SampleInfo:
    """What a run was: the seed that repeats it, its network calls and rows, its time, what ran it and why."""

    seed: int
    network_calls: int
    rows: int
    seconds: float
    backend: str
    engine: str
    why: str
    table: StepTable


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left out of what torch.compile traces: of a loop's host code it could make nothing."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


@_untraced
@names_keywords
def sample(
    model: Any,
    sde: Any = None,
    steps: int | None = None,
    *,
    sampler: Any = None,
    num_samples: int = 16,
    shape: Sequence[int] | None = None,
    prediction: str | None = None,
    time_input: str | None = None,
    cond: Any = None,
    seed: int | None = 0,
    first_sample: int = 0,
    batch_size: int | None = None,
    x_init: Tensor | None = None,
    noise: Tensor | Callable[[int], Tensor] | None = None,
    grid: Any = None,
    t_min: float | None = None,
    clip: tuple[float, float] | None = None,
    denoise: bool = True,
    guidance: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    engine: str = "auto",
    check: str = "final",
    progress: bool | None = None,
    callback: Callable[[int, float, Tensor], object] | None = None,
    trajectory: int = 0,
    return_info: bool = False,
) -> Any:
    """Draw samples [num_samples, *shape] from a score-based model, in the units of its `data_range` (not clamped to it).

    model         a ScoreModel, or any callable (x [B, *shape], t [B]) -> [B, *shape]: then `sde` and `shape` are needed,
                  `prediction` is "score" and t the process time unless said otherwise. x and t are the run's own buffers,
                  overwritten for the next call: a model that keeps them must clone them
    sde           "ve", "vp", "subvp", "ddpm", "ncsn", "edm", "ou" or a process; default the model's own. A discrete
                  chain whose levels lie on the model's path (DDPM on VP, NCSN on VE) runs on it
    steps         predictor steps (annealed Langevin: levels × steps per level); default 1000, all steps of a chain, or
                  what an explicit grid says
    sampler       a name or an object of fastdiff.samplers; default the process's own
    seed          0 … 2**64 − 1, None for a fresh one (`return_info` tells it). Sample i is a function of (seed,
                  first_sample + i) alone: for any batch_size, machine or thread count it meets the same noise
    batch_size    samples in one network call; None: all
    x_init, noise the start [num_samples, *shape]; the noise [rows, num_samples, *shape], or a callable row -> [num_samples,
                  *shape] that is called once for each row that draws, in order
    grid, t_min   where the steps stand and end: "uniform" "quadratic" "logsnr" "karras" "trained" "score_sde", decreasing
                  times, or fastdiff.grids.sigmas([...])
    clip          (lo, hi) for the predicted x0
    denoise       leave out the last predictor row's noise; annealed Langevin adds x + σ² score
    cond          a tensor or a dict of tensors with a leading num_samples axis, passed to the model
    dtype         of the result; the run is float32, or float64 when that is asked for
    check         "final", "every" row or "off": where a run that is not finite is refused with NonFiniteError
    callback      (row, t, x) after each row, once for each batch; x is a copy, t its process time
    trajectory    k > 0 adds k states [k, num_samples, *shape], evenly spaced from the start to the end
    backend       "auto": the device's fused kernels where there are any ("cpu": compiled, "triton": GPU), else "reference",
                  plain PyTorch; all make the same bits. `fastdiff doctor` says what there is
    engine        "auto": rows replay as CUDA graphs where they can be captured, else run eagerly (`return_info` says why).
                  A module's graphs are kept and see its parameters change, but none of its Python runs in a replay: a
                  network that counts its calls wants "eager"; after a change of an attribute, fastdiff.graphs.clear()
    return_info   adds a SampleInfo

    Returns x, or a tuple x[, states][, info]. Inputs, the model's mode and every global state are left as they were.

    Raises ConfigError, ShapeError, DTypeError, DeviceError or DataError before any work, ModelOutputError on what a network
    returns, NonFiniteError on a run that leaves the finite numbers. The equations and papers are in fastdiff.solvers.
    """
    began = time.perf_counter()
    choose("check", check, runner.CHECKS)
    if guidance is not None:
        raise ConfigError("guidance is not built in this version: wrap the model instead, or leave guidance=None")
    seed = secrets.randbits(64) if seed is None else checks.integer("seed", seed, 0, 2**64 - 1)
    first_sample = checks.integer("first_sample", first_sample, 0, 2**32 - 1)
    num_samples = checks.integer("num_samples", num_samples, 0, 2**32 - first_sample)
    batch = max(num_samples, 1) if batch_size is None else checks.integer("batch_size", batch_size, 1, 2**32)
    trajectory = checks.integer("trajectory", trajectory, 0, 10**7)
    checks.function("callback", callback)
    subject = subject_of(model, sde, shape, prediction, time_input, samplers.variance_of(sampler))
    table = _table(subject, sde, steps, sampler, grid, t_min, clip, denoise)
    if table.couples_batch and batch < num_samples:
        raise ConfigError(
            f"batch_size={batch} < num_samples={num_samples} would change the samples: norm='batch' takes its step from "
            "the whole batch; use norm='sample', corrector='ald' or one batch"
        )
    if num_samples * math.prod(subject.shape) >= 2**48:
        raise ConfigError(
            f"num_samples={num_samples} of shape {subject.shape} need more than 2**48 numbers: ask for fewer"
        )
    if x_init is None and math.isnan(table.prior_std):
        raise ConfigError(
            f"grid starts at t = {table.rows[0].level.t:g}, where the data still show: give x_init, or start at T"
        )
    dtype, state_dtype = _dtypes(dtype, x_init)
    run = _Run(
        subject, table, (num_samples, *subject.shape), seed=seed, first_sample=first_sample, noise=noise, cond=cond,
        x_init=x_init, dtype=state_dtype, device=place_of(device, x_init, subject.net), check=check, backend=backend,
        engine=engine,
    )  # fmt: skip
    x, states, calls = run.execute(batch, trajectory, callback, progress)
    x = _like_start(_narrowed(x, dtype, check), x_init)
    if states is None and not return_info:
        return x
    seconds = time.perf_counter() - began
    info = SampleInfo(seed, calls, len(table), seconds, run.backend, run.engine, run.why, table)
    return (x, *([] if states is None else [_narrowed(states, dtype, check)]), *([info] if return_info else []))


def _table(
    subject: Subject, sde: Any, steps: int | None, sampler: Any, grid: Any, t_min: Any, clip: Any, denoise: bool
) -> StepTable:
    process, chosen = _process_and_sampler(subject, sde, steps, sampler)
    if subject.variance is not None:
        chosen = samplers.with_variance(chosen, subject.variance)
    return plan(
        process, steps, sampler=chosen, prediction=subject.prediction, grid=grid, t_min=t_min, clip=clip,
        denoise=denoise, time_input=subject.time_input, clock=subject.process,
    )  # fmt: skip


def _process_and_sampler(
    subject: Subject, sde: Any, steps: int | None, sampler: Any
) -> tuple[processes.Process, samplers.Sampler]:
    """The process to run on the model's path, by the rules of `sample`'s `sde`."""
    own = subject.process
    process = own if sde is None or sde == own.name else sde
    if isinstance(process, str):
        choose("sde", process, processes.PROCESSES)
        if type(own) is not grids.CHAINS.get(process):
            raise _another_process(process, own)
        trial = samplers.get(sampler, processes.get(process))
        count = trial.default_steps(own, own.t_min) if steps is None else checks.integer("steps", steps, 1, MAX_STEPS)
        # a ladder has the sampler's own levels; a chain is fine enough for every step to be one of its own
        process = grids.chain_on(
            own, process, trial.intervals(own, count) + 1 if process == "ncsn" else max(count, 1000)
        )
    elif not isinstance(process, processes.Process):
        raise ConfigError(f"sde must be a name or a process such as fastdiff.VP(), got {type(process).__name__}")
    if process != own and not grids.on_path(process, own):
        raise _another_process(process, own)
    return process, samplers.get(sampler, process)


def _another_process(sde: Any, own: processes.Process) -> ConfigError:
    return ConfigError(
        f"sde={sde!r:.60} is not the process of this model, {own!r:.60}: leave sde out, or use sde={own.name!r}"
    )


class _Run:
    """One run: its inputs checked, its batches, its noise."""

    def __init__(
        self, subject: Subject, table: StepTable, full: tuple[int, ...], *, seed: int, first_sample: int, noise: Any,
        cond: Any, x_init: Tensor | None, dtype: torch.dtype, device: torch.device, check: str, backend: str, engine: str,
    ) -> None:  # fmt: skip
        self.asked = (backend, engine)
        uncaptured = graphs.obstacle(subject.net, device, len(table), noise, engine == "graph")
        self.backend, self.engine, self.why = ops.resolve(backend, engine, device, dtype, uncaptured)
        self.operations = ops.backend_module(self.backend)
        finite = check != "off"
        if x_init is not None:
            inputs.check_tensor("x_init", x_init, full, device, finite)
        if isinstance(noise, Tensor):
            inputs.check_tensor("noise", noise, (len(table), *full), device, finite=False)
            drawn = [k for k, row in enumerate(table.rows) if row.draws]
            if finite and not math.isfinite(noise.detach().sum(dtype=torch.float64)):
                inputs.check_finite("noise", noise[drawn])  # rows that draw none may hold anything
        elif noise is not None and not callable(noise):
            raise DTypeError(f"noise must be a tensor or a callable row -> tensor, got {type(noise).__name__}")
        inputs.check_condition(cond, full[0], device, finite)
        self.subject, self.table, self.full, self.seed, self.first_sample = subject, table, full, seed, first_sample
        self.noise, self.cond, self.x_init = noise, cond, x_init
        self.dtype, self.device, self.check = dtype, device, check
        index = subject.time_input == "index"
        self.times: list[Any] = [0 if not row.calls else round(row.time) if index else row.time for row in table.rows]
        self.time_dtype = torch.int64 if index else dtype
        self.loops: dict[int, runner.Loop] = {}
        self.variance = subject.variance
        parameter = next((p for p in parameters(subject.net) if p.is_floating_point()), None)
        self.net_dtype = dtype if parameter is None else parameter.dtype
        self.given: tuple[int, Tensor] | None = None  # the last row's noise from a callable

    def execute(
        self, batch: int, trajectory: int, callback: Any, progress: bool | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """The result, the kept states, and how often the network was called."""
        result = torch.empty(self.full, dtype=self.dtype, device=self.device)
        states = torch.empty((trajectory, *self.full), dtype=self.dtype, device=self.device) if trajectory else None
        if not result.numel():
            return result, states, 0
        keep, last = _kept_rows(trajectory, len(self.table)), len(self.table) - 1
        bounds = [(lo, min(lo + batch, self.full[0])) for lo in range(0, self.full[0], batch)]
        # a noise callable is asked once for each row, so then all batches walk the rows together
        groups = [bounds] if callable(self.noise) else [[bound] for bound in bounds]
        total = len(self.table) * len(bounds)
        with contextlib.ExitStack() as stack:
            for context in (evaluating(self.subject.net), torch.no_grad(), marks.range("sample")):
                stack.enter_context(context)
            bar = stack.enter_context(_bar(progress, total))
            features = self.features()
            for group in groups:
                chains = [self.chain(lo, hi, features, len(group) > 1, stack) for lo, hi in group]
                for k, now in enumerate(zip(*chains, strict=True), start=-1):
                    for (lo, hi), x in zip(group, now):
                        for slot in keep.get(k, ()):
                            states[slot, lo:hi] = x  # type: ignore[index]
                        if k >= 0 and callback is not None:
                            after = self.table.rows[k + 1].level if k < last else self.table.end
                            callback(k, after.t, x.clone())
                        if k == last:
                            result[lo:hi] = x
                    bar.update(len(group) if k >= 0 else 0)
        return result, states, self.table.calls * len(bounds)

    def chain(
        self, lo: int, hi: int, features: Tensor | None, beside: bool, stack: contextlib.ExitStack
    ) -> Iterator[Tensor]:
        """The states of samples lo … hi − 1: the start, then one after each row; the next overwrites it.

        beside  whether other chains run at the same time, so that this one needs buffers of its own
        stack   where to leave what must be given back after the run
        """
        cond, first = sliced(self.cond, lo, hi), self.first_sample + lo
        loop = None if beside else self.loops.get(hi - lo)
        if loop is None:
            loop = self.loops[hi - lo] = self.loop(hi - lo, features, cond, stack)
        if self.x_init is not None:
            loop.start.copy_(self.x_init[lo:hi].detach())
        else:
            self.operations.normal(loop.start, ops.cursor(0, first, self.seed, self.device), fdn1.PRIOR)
            loop.start.mul_(self.table.prior_std)
        yield loop.start
        shape = loop.start.shape

        def network(x: Tensor, time: Tensor, known: Tensor | None, cond: Condition) -> tuple[Tensor, Tensor | None]:
            output = call(self.subject.net, x, time, cond, known)
            output = (output if isinstance(output, Tensor) else single_tensor(output)).detach()
            return check_output(output, shape, self.device, self.variance)

        noise = None if self.noise is None else lambda k: self.draw(k, lo, hi)
        try:
            yield from loop.run(network, cond, first, noise)
        except GraphError as error:  # before the first row
            self.fall_back(error)
            start, loop = loop.start, self.loop(hi - lo, features, cond, stack)
            self.loops[hi - lo] = loop
            loop.start.copy_(start)
            yield from loop.run(network, cond, first, noise)

    def fall_back(self, error: GraphError) -> None:
        """From here on, and for this network in later runs, eager loops."""
        reason = f"the network cannot be captured as CUDA graphs ({error})"
        if not isinstance(error.__cause__, torch.OutOfMemoryError):  # which a smaller batch need not meet
            graphs.refuse(self.subject.net, reason)
        backend, engine = self.asked
        if engine == "graph":
            raise GraphError(f"{reason}: use engine='auto' or 'eager'") from error
        _, self.engine, self.why = ops.resolve(backend, engine, self.device, self.dtype, reason)
        warnings.warn(
            f"{reason}, so its loop runs eagerly, slower where the network is small; engine='eager' does so without this "
            "warning",
            RuntimeWarning,
            stacklevel=2,
        )

    def loop(self, count: int, features: Tensor | None, cond: Condition, stack: contextlib.ExitStack) -> runner.Loop:
        """A loop for `count` samples at a time."""
        shape, layout = (count, *self.full[1:]), layout_of(self.subject.net, len(self.full))

        def make(kind: Callable[..., Any] = runner.Loop) -> Any:
            net_input = torch.empty(shape, dtype=self.net_dtype, device=self.device, memory_format=layout)
            return kind(
                self.table, self.operations, torch.empty(shape, dtype=self.dtype, device=self.device), net_input,
                torch.empty(count, dtype=self.time_dtype, device=self.device), self.times, features,
                seed=self.seed, check=self.check,
            )  # fmt: skip

        if self.engine == "graph":
            parts = cond if isinstance(cond, dict) else {None: cond}
            of_cond = tuple((name, value.shape, value.dtype) for name, value in parts.items() if value is not None)
            # what follows from the network's own tensors, such as its dtype, is in its fingerprint
            key = (
                shape, self.dtype, self.device, self.time_dtype, self.check, self.backend, of_cond, self.capacity,
                capture.surroundings(self.device),
            )  # fmt: skip
            kind = functools.partial(graphs.GraphLoop, self.capacity, self.subject.net)
            try:
                loop = stack.enter_context(graphs.borrowed(self.subject.net, key, lambda: make(kind)))
            except GraphError as error:
                self.fall_back(error)
            else:
                loop.load(self.table, self.times, features, self.seed)
                return loop
        return make()  # type: ignore[no-any-return]

    @property
    def capacity(self) -> int:
        """Rows that a loop makes room for."""
        return len(self.table) if self.engine == "eager" else max(1024, 1 << (len(self.table) - 1).bit_length())

    def features(self) -> Tensor | None:
        """What the network makes of each row's time, [rows, *], if it can do so beforehand."""
        net = self.subject.net
        if not isinstance(net, TimeConditioned) or not takes_features(net):
            return None
        times = torch.tensor(self.times, dtype=self.time_dtype, device=self.device)
        if net.time_features(times[:1]).nbytes * self.capacity > MAX_FEATURES:
            return None
        return net.time_features(times)

    def draw(self, k: int, lo: int, hi: int) -> Tensor:
        """The noise that the caller gives row k for samples lo … hi − 1."""
        if isinstance(self.noise, Tensor):
            return self.noise[k, lo:hi].to(self.dtype).resolve_neg()
        if self.given is None or self.given[0] != k:
            noise = self.noise(k)
            inputs.check_tensor(f"noise({k})", noise, self.full, self.device, self.check != "off")
            self.given = (k, noise)
        return self.given[1][lo:hi].to(self.dtype).resolve_neg()


def _dtypes(dtype: torch.dtype | None, x_init: Any) -> tuple[torch.dtype, torch.dtype]:
    """The result's dtype and the state's."""
    if x_init is not None:
        inputs.check_floating("x_init", x_init)
    asked = dtype if dtype is not None else torch.float32 if x_init is None else x_init.dtype
    if asked not in inputs.DTYPES:
        raise DTypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")
    return asked, torch.float64 if asked == torch.float64 else torch.float32


def _kept_rows(count: int, rows: int) -> dict[int, list[int]]:
    """Which states a trajectory of `count` keeps: row number (−1 the start) -> its slots; the end is always kept."""
    kept: dict[int, list[int]] = {}
    for slot in range(count):
        k = rows - 1 if count == 1 else round(slot * rows / (count - 1)) - 1
        kept.setdefault(k, []).append(slot)
    return kept


def _narrowed(x: Tensor, dtype: torch.dtype, check: str) -> Tensor:
    """x in the result's dtype, which must be able to hold it."""
    narrow = x.to(dtype)
    if dtype != x.dtype and check != "off" and not bool(narrow.isfinite().all()):
        raise DataError(f"dtype={dtype} cannot hold samples as large as {x.abs().max():.3g}: ask for torch.float32")
    return narrow


def _like_start(x: Tensor, x_init: Tensor | None) -> Tensor:
    """The result in the start's memory format, if that is channels-last."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if x_init is None or wanted is None or x_init.is_contiguous():
        return x
    return x.contiguous(memory_format=wanted) if x_init.is_contiguous(memory_format=wanted) else x


def _bar(progress: bool | None, total: int) -> Any:
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, desc="sample", unit="row", disable=not shown, leave=False)
