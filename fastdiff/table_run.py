"""A run of a table: its inputs checked, its batches, its noise, eager or as CUDA graphs."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, DTypeError, GraphError
from .execution import cuda_graph, graphs, monitor, ops, tensor_checks
from .execution import loop as runner
from .execution import noise as fdn1
from .execution.monitor import bar
from .model import Condition, call, check_output, evaluating, single_tensor
from .subject import Subject, dtype_of, layout_of, picked, takes_features
from .table import StepTable

MAX_FEATURES = 2**28  # bytes of what a network makes of all times of a run; beyond, it is asked in each row


class TableRun:
    """What `fastdiff.sample` was asked for, as a table; `calls` and `nfe` are known after `execute`."""

    nfe: Tensor | None = None

    @property
    def couples_batch(self) -> str | None:
        """How samples depend on each other, and the way out; None: they do not."""
        coupled = "norm='batch' takes its step from the whole batch; use norm='sample', corrector='ald'"
        return coupled if self.table.couples_batch else None

    def __init__(
        self, subject: Subject, table: StepTable, full: tuple[int, ...], *, seed: int, first_sample: int, noise: Any,
        cond: Any, x_init: Tensor | None, dtype: torch.dtype, device: torch.device, check: str, backend: str, engine: str,
    ) -> None:  # fmt: skip
        if x_init is None and math.isnan(table.prior_std):
            raise ConfigError(
                f"grid starts at t = {table.rows[0].level.t:g}, where the data still show: give x_init, or start at T"
            )
        self.asked, self.calls = (backend, engine), 0
        uncaptured = graphs.obstacle(subject.net, device, len(table), noise, engine == "graph")
        self.backend, self.engine, self.why = ops.resolve(backend, engine, device, dtype, uncaptured)
        self.operations = ops.backend_module(self.backend)
        finite = check != "off"
        if x_init is not None:
            tensor_checks.check_tensor("x_init", x_init, full, device, finite)
        if isinstance(noise, Tensor):
            tensor_checks.check_tensor("noise", noise, (len(table), *full), device, finite=False)
            drawn = [k for k, row in enumerate(table.rows) if row.draws]
            if finite and not math.isfinite(noise.detach().sum(dtype=torch.float64)):
                tensor_checks.check_finite("noise", noise[drawn])  # rows that draw none may hold anything
        elif noise is not None and not callable(noise):
            raise DTypeError(f"noise must be a tensor or a callable row -> tensor, got {type(noise).__name__}")
        tensor_checks.check_condition(cond, full[0], device, finite)
        self.subject, self.table, self.full, self.seed, self.first_sample = subject, table, full, seed, first_sample
        self.noise, self.cond, self.x_init = noise, cond, x_init
        self.dtype, self.device, self.check = dtype, device, check
        index = subject.time_input == "index"
        self.times: list[Any] = [round(time) if index else time for time in table.times]
        self.time_dtype = torch.int64 if index else dtype
        self.loops: dict[int, runner.Loop] = {}
        self.variance = subject.variance
        self.net_dtype = dtype_of(subject.net, dtype)
        self.given: tuple[int, Tensor] | None = None  # the last row's noise from a callable

    def execute(
        self, batch: int, trajectory: int, callback: Any, progress: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """The result and the kept states."""
        result = torch.empty(self.full, dtype=self.dtype, device=self.device)
        states = torch.empty((trajectory, *self.full), dtype=self.dtype, device=self.device) if trajectory else None
        if not result.numel():
            return result, states
        keep, last = _kept_rows(trajectory, len(self.table)), len(self.table) - 1
        bounds = [(lo, min(lo + batch, self.full[0])) for lo in range(0, self.full[0], batch)]
        # a noise callable is asked once for each row, so then all batches walk the rows together
        groups = [bounds] if callable(self.noise) else [[bound] for bound in bounds]
        total = len(self.table) * len(bounds)
        with contextlib.ExitStack() as stack:
            for context in (evaluating(self.subject.net), torch.no_grad(), monitor.range("sample")):
                stack.enter_context(context)
            shown = stack.enter_context(bar(progress, total, "sample", "row"))
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
                    shown.update(len(group) if k >= 0 else 0)
        self.calls = self.table.calls * len(bounds)
        return result, states

    def chain(
        self, lo: int, hi: int, features: Tensor | None, beside: bool, stack: contextlib.ExitStack
    ) -> Iterator[Tensor]:
        """The states of samples lo … hi − 1: the start, then one after each row; the next overwrites it.

        beside  whether other chains run at the same time, so that this one needs buffers of its own
        stack   where to leave what must be given back after the run
        """
        cond, first = picked(self.cond, slice(lo, hi)), self.first_sample + lo
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
                cuda_graph.surroundings(self.device),
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
        if not takes_features(net):
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
            tensor_checks.check_tensor(f"noise({k})", noise, self.full, self.device, self.check != "off")
            self.given = (k, noise)
        return self.given[1][lo:hi].to(self.dtype).resolve_neg()


def _kept_rows(count: int, rows: int) -> dict[int, list[int]]:
    """Which states a trajectory of `count` keeps: row number (−1 the start) -> its slots; the end is always kept."""
    kept: dict[int, list[int]] = {}
    for slot in range(count):
        k = rows - 1 if count == 1 else round(slot * rows / (count - 1)) - 1
        kept.setdefault(k, []).append(slot)
    return kept
