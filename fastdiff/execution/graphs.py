"""The graph engine: rows captured as CUDA graphs, one for each plan of a row, and replayed.

A replay reads its row's number, its coefficients, its times and the seed from device memory, so one graph serves every row
of its plan, every seed, grid and condition, and sees parameters that are updated in place. Graphs are kept for a module
and reused while it is made of the same parts and its tensors stay where they are (`fingerprint`). What a capture bakes in
and nobody can see changing is a network's Python: counters, plain attributes, what a callable closes over. Call `clear()`
after changing an attribute; run a network that counts its calls with engine="eager".
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, GraphError
from ..table import StepTable
from . import monitor, ops
from .cuda_graph import capture, first_line
from .loop import Condition, Draw, Loop, Network, RowPlan, raise_if_bad

LIMIT = 8  # loops kept while nobody runs them; one more retires all of them
WORTHWHILE = 100  # rows that pay for capturing a callable whose graphs cannot be cached


class _Cached(NamedTuple):
    """A module's loops that nobody is running, by what they were captured under."""

    fingerprint: Any
    loops: dict[Any, list[GraphLoop]]


_lock = threading.Lock()  # of these two
_cache: weakref.WeakKeyDictionary[nn.Module, _Cached] = weakref.WeakKeyDictionary()
_refused: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def obstacle(net: Any, device: torch.device, rows: int, noise: Any, named: bool) -> str | None:
    """Why a run is not captured, or None. `named`: the caller asked for graphs by name, whether or not they pay."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, not {device.type}"
    if torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "sample() cannot run while the current stream is capturing, as it copies its table to the device: call it "
            "outside, it captures its own rows"
        )
    if noise is not None:
        return "the noise comes from the caller"
    if not isinstance(net, nn.Module) and rows < WORTHWHILE and not named:
        return f"a plain callable is captured anew for each run, and this one has {rows} rows"
    try:
        return _refused.get(net)
    except TypeError:  # a callable without weak references
        return None


def refuse(net: Any, reason: str) -> None:
    """Remember that a network cannot be captured."""
    with _lock, contextlib.suppress(TypeError):
        _refused[net] = reason
        _cache.pop(net, None)


def clear() -> None:
    """Forget all graphs (those in use go when their run ends) and all refusals."""
    _retire()
    with _lock:
        _refused.clear()


def _retire() -> None:
    """Free all graphs that nobody is running."""
    with _lock:
        for cached in _cache.values():
            cached.loops.clear()  # which a run of this network holds too
        _cache.clear()


@contextlib.contextmanager
def borrowed(net: Any, key: Any, make: Callable[[], GraphLoop]) -> Iterator[GraphLoop]:
    """A loop that was captured for this network under this key, or a new one, for the caller alone.

    key   all that a capture bakes in, but for the network itself
    """
    cached, loop = None, None
    if isinstance(net, nn.Module):
        now = fingerprint(net)
        with _lock:
            cached = _cache.get(net)
            if cached is None or cached.fingerprint != now:
                cached = _cache[net] = _Cached(now, {})
            free = cached.loops.get(key)
            loop = free.pop() if free else None
    loop = make() if loop is None else loop
    loop.follow()
    try:
        yield loop
    finally:
        loop.leave()
        if cached is not None and loop.graphs:
            _keep(net, cached, key, loop)


def _keep(net: nn.Module, cached: _Cached, key: Any, loop: GraphLoop) -> None:
    with _lock:
        if _cache.get(net) is not cached:  # retired, or the module has changed, while the loop ran
            return
        if sum(len(free) for cached in _cache.values() for free in cached.loops.values()) >= LIMIT:
            _cache.clear()
            cached = _cache[net] = _Cached(cached.fingerprint, {})
        cached.loops.setdefault(key, []).append(loop)


def fingerprint(net: nn.Module) -> Any:
    """What a module is made of, and where its tensors lie. Raises GraphError where that cannot be told."""
    modules = list(net.modules())
    loose = [v for module in modules for v in vars(module).values() if isinstance(v, Tensor)]
    try:
        tensors = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in [*net.parameters(), *net.buffers(), *loose]]
    except (RuntimeError, ValueError) as error:
        raise GraphError(
            f"one of its tensors has no storage (meta, fake or functional): {first_line(error)}"
        ) from error
    if any(not address and shape.numel() for address, _, shape, _ in tensors):
        raise GraphError("one of its tensors has no storage (meta, fake or functional)")
    parts = [
        (id(module), type(module), len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules
    ]
    return parts, tensors


class GraphLoop(Loop):
    """A Loop that replays. Everything that its graphs touch is made once and stays where it is.

    capacity  rows of the longest table that it takes
    net       of whose graphs these are; not held
    """

    def __init__(self, capacity: int, net: Any, *args: Any, **kwargs: Any) -> None:
        self.capacity = capacity
        self.net = weakref.ref(net) if isinstance(net, nn.Module) else lambda: None
        self.graphs: dict[RowPlan, Any] = {}
        self.static: dict[str, Tensor] = {}
        self.pool: Any = None
        self.done: Any = None
        super().__init__(*args, **kwargs)
        self.cursor = torch.zeros(3, dtype=torch.int64, device=self.start.device)

    def load(self, table: StepTable, features: Tensor | None, seed: int) -> None:
        super().load(table, features, seed)
        self.row_times = self.placed("times", torch.tensor(self.times, dtype=self.time.dtype))

    def placed(self, name: str, values: Tensor) -> Tensor:
        """The values on the device, in the first rows of a tensor that stays in its place."""
        if name not in self.static:
            self.static[name] = self.start.new_zeros((self.capacity, *values.shape[1:]), dtype=values.dtype)
        self.static[name][: len(values)].copy_(values)
        return self.static[name]

    def run(
        self, network: Network, cond: Condition, first_sample: int, x_init: Tensor | None = None, noise: Draw | None = None
    ) -> Iterator[Tensor]:  # fmt: skip
        """As Loop.run, without noise of the caller's. Raises GraphError, before it yields, where capture fails."""
        self.begin(first_sample, x_init)
        if not self.graphs.keys() >= set(self.plans):
            self._capture_plans(network, self._conditioned(cond), first_sample)
            self.begin(first_sample, x_init)
        self._conditioned(cond)  # a network may have changed it in the warm-up
        yield self.start
        self._stand_at(0, first_sample)
        every = self.check == "every"
        replay: Callable[[RowPlan], None] = monitor.marker()("row", lambda plan: self.graphs[plan].replay())
        for plan in self.plans:
            replay(plan)
            if every and self.first_bad is not None:
                raise_if_bad(self.table, self.first_bad, first_sample)
            yield self.buffers[plan.out]
        if self.first_bad is not None:
            raise_if_bad(self.table, self.first_bad, first_sample)

    def renew_input(self) -> None:
        raise GraphError("it moves or resizes the memory of its input")

    def follow(self) -> None:
        """Wait, on the current stream, for the run before."""
        if self.done is not None:
            torch.cuda.current_stream(self.start.device).wait_event(self.done)

    def leave(self) -> None:
        """Note where on the current stream this run ends: the next one, and whoever gets the memory after, waits for it."""
        if self.start.is_cuda:
            stream = torch.cuda.current_stream(self.start.device)
            self.done = torch.cuda.Event()
            self.done.record(stream)
            static = (self.net_input, self.time, self.measured, self.cursor, self.first_bad)
            for tensor in (*self.buffers, *self.static.values(), *static):
                if tensor is not None:
                    tensor.record_stream(stream)

    def _stand_at(self, row: int, first_sample: int) -> None:
        self.cursor.copy_(ops.cursor(row, first_sample, self.seed))

    def _conditioned(self, cond: Condition) -> Condition:
        """The condition in the loop's memory, which the graphs read."""
        if isinstance(cond, dict):
            return type(cond)({name: self._copied(f"cond {name}", value) for name, value in cond.items()})
        return None if cond is None else self._copied("cond", cond)

    def _copied(self, name: str, value: Tensor) -> Tensor:
        if name not in self.static:
            self.static[name] = torch.empty_like(value)
        return self.static[name].copy_(value)

    def _capture_plans(self, network: Network, cond: Condition, first_sample: int) -> None:
        net = self.net()
        before = None if net is None else fingerprint(net)
        try:
            for plan in dict.fromkeys(self.plans):
                if plan not in self.graphs:
                    self._capture(plan, network, cond, first_sample)
            if net is not None and fingerprint(net) != before:
                raise GraphError("its forward rebinds parameters or buffers")
        except GraphError:
            self.graphs.clear()
            self.pool = None
            raise

    def _capture(self, plan: RowPlan, network: Network, cond: Condition, first_sample: int) -> None:
        at, device = self.plans.index(plan), self.start.device

        def body() -> None:
            number = self.cursor[:1]
            features = None
            if plan.calls_network and self.features is None:
                self.time.copy_(self.row_times.index_select(0, number))
            elif plan.calls_network and self.features is not None:
                features = self.features.index_select(0, number)
            self.row(plan, network, cond, self.cursor, features, None)
            number.add_(1)

        def warm() -> None:
            self.feed()
            self._stand_at(at, first_sample)
            body()

        # casts of the weights as part of the graph: one that autocast had kept from before would be stale in a replay
        cast = torch.get_autocast_dtype(device.type)
        enabled = torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, dtype=cast, enabled=enabled, cache_enabled=False):
            try:
                self.graphs[plan], self.pool = capture(warm, body, device, self.pool)
            except torch.OutOfMemoryError:  # graphs that nobody runs may hold what is lacking
                _retire()
                torch.cuda.empty_cache()
                self.graphs[plan], self.pool = capture(warm, body, device, self.pool)
