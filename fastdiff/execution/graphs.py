"""The graph engine: rows captured as CUDA graphs, one for each plan of a row, and replayed.

A replay reads its row's number, its coefficients, its times and the seed from device memory, so one graph serves every row
of its plan, every seed, grid and condition, and sees parameters that are updated in place. Graphs are kept for a module
and reused while it is made of the same parts and its tensors stay where they are (`fingerprint_of`). A network may keep what its
first call makes (caches), and nothing that later ones make: a replay would not renew it. What a capture bakes in and nobody
can see changing is a network's Python: counters, plain attributes, what a callable closes over. Call `clear()` after
changing an attribute; run a network that counts its calls with engine="eager".

Where the engine is not named, the first run with new graphs takes some rows both ways, and the loop keeps the faster.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, GraphError
from ..table import StepTable
from . import modules, monitor, ops
from .cuda_graph import Stopwatch, capture, first_line
from .loop import UNCHANGED, Change, Condition, Draw, Loop, Network, RowPlan, raise_if_bad

LIMIT = 8  # loops kept while nobody runs them; one more retires all of them
WORTHWHILE = 100  # rows that pay for capturing a callable whose graphs cannot be cached
TIMED = 6  # rows that are timed each way
REBINDS = "its forward rebinds parameters, buffers or other tensors that it keeps"


class _Cached(NamedTuple):
    """A module's loops that nobody is running, by what they were captured under."""

    fingerprint: Any
    loops: dict[Any, list[GraphLoop]]


_lock = threading.Lock()  # of these two
_cache: weakref.WeakKeyDictionary[nn.Module, _Cached] = weakref.WeakKeyDictionary()
_refused: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def obstacle(net: Any, device: torch.device, rows: int, noise: Any, engine: str) -> str | None:
    """Why a run is not captured, or None where it can be, or the caller has named the other engine."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, not {device.type}"
    with torch.cuda.device(device):  # or another device's stream is asked, and gets a context of some 400 MB there
        capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        raise ConfigError(
            "sample() and train() cannot run while the current stream is capturing, as they copy numbers to the device: call "
            "them outside, they capture their own graphs"
        )
    if engine == "eager":
        return None
    if noise is not None:
        return "the noise comes from the caller"
    if not isinstance(net, nn.Module) and rows < WORTHWHILE and engine != "graph":
        return f"a plain callable is captured anew for each run, and this one has {rows} rows"
    with contextlib.suppress(TypeError):  # a callable without weak references
        known = _refused.get(net)
        if known is not None:
            return known
    if not isinstance(net, nn.Module) or net not in _cache:
        part = modules.part_with_graphs(net)
        if part is not None:
            reason = (
                f"torch.compile gave {part} CUDA graphs of its own (mode='reduce-overhead' or 'max-autotune'), which cannot be "
                "part of others: compile it with mode='default'"
            )
            refuse(net, reason)
            return reason
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
        now = fingerprint_of(net)
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
        if cached is not None and (loop.graphs or loop.timing):
            _keep(net, cached, key, loop)


def _keep(net: nn.Module, cached: _Cached, key: Any, loop: GraphLoop) -> None:
    with _lock:
        if _cache.get(net) is not cached:  # retired, or the module has changed, while the loop ran
            return
        if loop.fingerprint != cached.fingerprint:  # the network has filled a cache before the capture
            cached = _cache[net] = _Cached(loop.fingerprint, {})
        if sum(len(free) for cached in _cache.values() for free in cached.loops.values()) >= LIMIT:
            _cache.clear()
            cached = _cache[net] = _Cached(cached.fingerprint, {})
        cached.loops.setdefault(key, []).append(loop)


def fingerprint_of(net: Any) -> Any:
    """What a module is made of, and where its tensors lie; of another callable nothing is known. Raises GraphError where that
    cannot be told."""
    if not isinstance(net, nn.Module):
        return None
    parts = list(net.modules())
    loose = [v for part in parts for v in vars(part).values() if isinstance(v, Tensor)]
    try:
        tensors = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in [*net.parameters(), *net.buffers(), *loose]]
    except (RuntimeError, ValueError) as error:
        raise GraphError(
            f"one of its tensors has no storage (meta, fake or functional): {first_line(error)}"
        ) from error
    if any(not address and shape.numel() for address, _, shape, _ in tensors):
        raise GraphError("one of its tensors has no storage (meta, fake or functional)")
    return [(id(part), type(part), len(part._forward_hooks), len(part._forward_pre_hooks)) for part in parts], tensors


class _Contents:
    """The tensors that a network and its functions hold, where they lie, and what holds them."""

    def __init__(self, net: Any) -> None:
        reached = [part for _, part in modules.reach(net)]
        # held, so that no others come to their places
        self.tensors = [(part, _place(part)) for part in reached if isinstance(part, Tensor)]
        others = ((part, modules.entries(part)) for part in reached if not isinstance(part, Tensor))
        self.holders = [(part, entries) for part, entries in others if entries is not None]

    def have_moved(self) -> bool:
        """Whether calls have put other tensors in their places, or these elsewhere."""
        if any(_place(tensor) != place for tensor, place in self.tensors):
            return True
        return any(_places(now.get(name)) != _places(before.get(name)) for _, name, now, before in self._replaced())

    def put_back(self) -> None:
        """Undo what calls have put in their places; what a capture has, nobody has computed."""
        for part, name, now, before in list(self._replaced()):
            if _tensors(now.get(name)) != _tensors(before.get(name)):
                modules.put(part, name, before)

    def _replaced(self) -> Iterator[tuple[Any, Any, dict[Any, Any], dict[Any, Any]]]:
        """(holder, name, its entries now, those before), of each entry that is another one."""
        for part, before in self.holders:
            now = modules.entries(part) or {}
            for name in before.keys() | now.keys():
                if now.get(name) is not before.get(name):
                    yield part, name, now, before


def _tensors(value: Any) -> list[int]:
    """Those that a value holds, by identity."""
    return [id(part) for _, part in modules.reach(value) if isinstance(part, Tensor)]


def _places(value: Any) -> list[Any]:
    """Where they lie."""
    return [_place(part) for _, part in modules.reach(value) if isinstance(part, Tensor)]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    try:
        return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    except (RuntimeError, ValueError):  # without storage
        return (id(tensor),)


def record(
    net: Any,
    calls: Callable[[], Iterator[None]],
    bodies: Sequence[Callable[[], None]],
    device: torch.device,
    known: Any = None,
) -> tuple[list[Any], Any]:
    """CUDA graphs of `bodies`, and the network's fingerprint under them.

    calls   makes the calls of the network that the bodies hold, one after another, for the warm-up
    known   the fingerprint under which there are graphs already

    Raises GraphError, with the network's tensors in their places, where it moves or replaces them, or cannot be captured.
    """
    before = steady = _Contents(net)
    fingerprint: Any = None

    def refuse_moved() -> None:
        if steady.have_moved() or fingerprint_of(net) != fingerprint:
            raise GraphError(REBINDS)

    def warm() -> None:
        nonlocal steady, fingerprint
        for _ in calls():
            pass
        steady, fingerprint = _Contents(net), fingerprint_of(net)  # with caches that the first calls have filled
        if known is not None and fingerprint != known:
            raise GraphError(REBINDS)
        for _ in itertools.chain(calls(), calls()):
            refuse_moved()

    # casts of the weights as part of the graph: one that autocast had kept from before would be stale in a replay
    cast = torch.get_autocast_dtype(device.type)
    enabled = torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, dtype=cast, enabled=enabled, cache_enabled=False):
        try:
            try:
                graphs = capture(warm, bodies, device)
            except torch.OutOfMemoryError:  # graphs that nobody runs may hold what is lacking
                _retire()
                with torch.cuda.device(device):
                    torch.cuda.empty_cache()
                graphs = capture(warm, bodies, device)
            refuse_moved()
        except BaseException:
            before.put_back()  # the eager run is then the one that it would have been
            raise
    return graphs, fingerprint


class Timing(NamedTuple):
    """Seconds a row takes."""

    eager: float
    replay: float

    def __str__(self) -> str:
        eager, replay = (f"{1000 * seconds:.3g} ms" for seconds in self)
        return f"a row takes {replay} as CUDA graphs and {eager} without"


class GraphLoop(Loop):
    """A Loop that replays. Everything that its graphs touch is made once and stays where it is.

    capacity  rows of the longest table that it takes
    net       of whose graphs these are; a module is not held
    chooses   whether its runs may go eagerly where that is faster
    """

    def __init__(self, capacity: int, net: Any, *args: Any, **kwargs: Any) -> None:
        self.capacity = capacity
        self.net = weakref.ref(net) if isinstance(net, nn.Module) else lambda: net
        self.graphs: dict[RowPlan, Any] = {}
        self.fingerprint: Any = None
        self.timing: Timing | None = None
        self.chooses = False
        self.static: dict[str, Tensor] = {}
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
        self, network: Network, cond: Condition, first_sample: int, x_init: Tensor | None = None, noise: Draw | None = None,
        change: Change = UNCHANGED,
    ) -> Iterator[Tensor]:  # fmt: skip
        """As Loop.run, without noise of the caller's or changes after a row. Raises GraphError, before it yields, where capture
        fails."""
        if self.prefers_eager:
            self.graphs.clear()  # which may be another run's, that asked for them by name
            yield from super().run(network, cond, first_sample, x_init, change=change)
            return
        self.hold(change)
        self.begin(first_sample, x_init)
        missing = [plan for plan in dict.fromkeys(self.plans) if plan not in self.graphs]
        if missing:
            self._capture(missing, network, self._conditioned(cond), first_sample)
            self.begin(first_sample, x_init)
        cond = self._conditioned(cond)  # a network may have changed it in the warm-up
        yield self.start
        start, stop = 0, len(self.plans)
        if self.chooses and self.timing is None and stop >= 2 * TIMED:
            yield from self._time(network, cond, first_sample)
            start = 2 * TIMED
        if self.prefers_eager:
            self.graphs.clear()
            yield from self.rows(start, stop, network, cond, first_sample)
        else:
            yield from self.replays(start, stop, first_sample)
        if self.first_bad is not None:
            raise_if_bad(self.table, self.first_bad, first_sample)

    def replays(self, start: int, stop: int, first_sample: int) -> Iterator[Tensor]:
        """As Loop.rows."""
        self._stand_at(start, first_sample)
        every = self.check == "every"
        replay: Callable[[RowPlan], None] = monitor.marker()("row", lambda plan: self.graphs[plan].replay())
        for plan in self.plans[start:stop]:
            replay(plan)
            if every and self.first_bad is not None:
                raise_if_bad(self.table, self.first_bad, first_sample)
            yield self.buffers[plan.out]

    @property
    def prefers_eager(self) -> bool:
        """Whether its runs go eagerly, as that is faster."""
        return self.chooses and self.timing is not None and self.timing.eager < self.timing.replay

    def _time(self, network: Network, cond: Condition, first_sample: int) -> Iterator[Tensor]:
        """The first rows, some eagerly and then some as replays, and what they took: each row by itself, as the caller may do
        what he likes in between."""
        watch = Stopwatch(self.start.device)
        for rows in (
            self.rows(0, TIMED, network, cond, first_sample),
            self.replays(TIMED, 2 * TIMED, first_sample),
        ):
            for _ in range(TIMED):
                watch.mark()
                state = next(rows)
                watch.mark()
                yield state
        took = list(zip(self.plans, watch.seconds()))
        least = (
            min((seconds for plan, seconds in part if plan.calls_network), default=0.0)
            for part in (took[:TIMED], took[TIMED:])
        )
        self.timing = Timing(*least)

    def renew_input(self) -> None:
        if not self.prefers_eager:
            raise GraphError("it moves or resizes the memory of its input")
        super().renew_input()

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
            static = (self.net_input, self.time, self.measured, self.cursor, self.first_bad, self.known, self.mask)
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

    def _capture(self, plans: Sequence[RowPlan], network: Network, cond: Condition, first_sample: int) -> None:
        bodies = [functools.partial(self._replayed, plan, network, cond) for plan in plans]

        def calls() -> Iterator[None]:
            for plan, body in zip(plans, bodies):
                self.feed()
                self._stand_at(self.plans.index(plan), first_sample)
                body()
                yield

        known = self.fingerprint if self.graphs else None
        try:
            graphs, self.fingerprint = record(self.net(), calls, bodies, self.start.device, known)
        except BaseException:
            self.graphs.clear()
            raise
        self.graphs.update(zip(plans, graphs))

    def _replayed(self, plan: RowPlan, network: Network, cond: Condition) -> None:
        """A row as its graph has it: it stands where the cursor says, and moves it on."""
        number = self.cursor[:1]
        features = None
        if plan.calls_network and self.features is None:
            self.time.copy_(self.row_times.index_select(0, number))
        elif plan.calls_network and self.features is not None:
            features = self.features.index_select(0, number)
        self.row(plan, network, cond, self.cursor, features, None)
        number.add_(1)
