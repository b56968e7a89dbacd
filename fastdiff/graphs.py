"""The graph engine: rows captured as CUDA graphs, one for each kind of row, and replayed.

A replay reads its row's number, its coefficients, its times and the seed from device memory, so one graph serves every row
of its kind, every seed, grid and condition, and sees parameters that are updated in place. Graphs are kept for a module
and reused while its parameters stay where they are. What a capture bakes in and nobody can see changing are a module's
plain Python attributes: call `clear()` after changing one.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import marks
from .errors import ConfigError, GraphError
from .runner import Condition, Draw, Kind, Loop, Network, raise_if_bad
from .table import StepTable

LIMIT = 8  # loops kept; one more retires all of them, as graphs that were captured together share workspaces
WORTHWHILE = 100  # rows that pay for capturing a callable whose graphs cannot be kept

_lock = threading.RLock()
_here = threading.local()  # .held: how many loops this thread has borrowed
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[Any, GraphLoop]]] = weakref.WeakKeyDictionary()
_refused: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def obstacle(net: Any, device: torch.device, rows: int, noise: Any, asked: bool) -> str | None:
    """Why a run is not captured, or None. `asked`: graphs were asked for by name, so whether they pay is not a question."""
    if device.type != "cuda":
        return f"CUDA graphs need a CUDA device, not {device.type}"
    if torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "sample() cannot run while the current stream is capturing, as it copies its table to the device: call it "
            "outside, it captures its own rows"
        )
    if torch.compiler.is_compiling():
        return "it is being compiled"
    if noise is not None:
        return "the noise comes from the caller"
    if not isinstance(net, nn.Module) and rows < WORTHWHILE and not asked:
        return f"a plain callable is captured anew for each run, and this one has {rows} rows"
    return refusal(net)


def refusal(net: Any) -> str | None:
    """Why this network's capture failed before, or None."""
    return _refused.get(net) if isinstance(net, nn.Module) else None


def refuse(net: Any, reason: str) -> None:
    """Remember that a module cannot be captured."""
    if isinstance(net, nn.Module):
        with _lock:
            _refused[net] = reason


def clear() -> None:
    """Forget all graphs (those in use go when their run ends) and all refusals."""
    with _lock:
        _kept.clear()
        _refused.clear()


@contextlib.contextmanager
def borrowed(net: Any, key: Any, make: Callable[[], GraphLoop]) -> Iterator[GraphLoop]:
    """The loop kept for a module under this key, or a new one, for this thread alone.

    key   all that a capture bakes in, but for the module's parameters: these are compared here
    """
    loop = _found(net, key, make) if isinstance(net, nn.Module) else make()
    held = getattr(_here, "held", 0)
    # a thread that holds a loop already waits for no other, or two threads might wait for each other
    if not loop.lock.acquire(blocking=not held):
        loop = make()
        loop.lock.acquire()
    _here.held = held + 1
    try:
        loop.follow()
        yield loop
        loop.leave()
    finally:
        _here.held = held
        loop.lock.release()


def _found(net: nn.Module, key: Any, make: Callable[[], GraphLoop]) -> GraphLoop:
    now = tuple((p.data_ptr(), p.dtype, p.shape, p.stride()) for p in [*net.parameters(), *net.buffers()])
    with _lock:
        before, loops = _kept.get(net, (now, {}))
        if before != now or (key not in loops and sum(len(own) for _, own in _kept.values()) >= LIMIT):
            _kept.clear()
            loops = {}
        if key not in loops:
            loops[key] = make()
            _kept[net] = (now, loops)
        return loops[key]


class GraphLoop(Loop):
    """A runner.Loop that replays. Everything that its graphs touch is made once and stays where it is.

    capacity  rows of the longest table that it takes
    """

    def __init__(self, capacity: int, *args: Any, **kwargs: Any) -> None:
        self.capacity = capacity
        self.graphs: dict[Kind, Any] = {}
        self.static: dict[str, Tensor] = {}
        self.lock = threading.Lock()
        self.pool: Any = None
        self.done: Any = None
        super().__init__(*args, **kwargs)
        self.home = torch.cuda.current_stream(self.start.device) if self.start.is_cuda else None
        self.cursor = torch.zeros(3, dtype=torch.int64, device=self.start.device)

    def load(self, table: StepTable, times: Sequence[float], features: Tensor | None, seed: int) -> None:
        super().load(table, times, features, seed)
        self.row_times = self.placed("times", torch.tensor(times, dtype=self.time.dtype))

    def placed(self, name: str, values: Tensor) -> Tensor:
        """The values on the device, in the first rows of a tensor that stays in its place."""
        if name not in self.static:
            self.static[name] = self.start.new_zeros((self.capacity, *values.shape[1:]), dtype=values.dtype)
        self.static[name][: len(values)].copy_(values)
        return self.static[name]

    def run(self, network: Network, cond: Condition, first_sample: int, noise: Draw | None = None) -> Iterator[Tensor]:
        """As Loop.run. Raises GraphError before the first row, and leaves `start` as it was, where capture fails."""
        if noise is not None:
            raise GraphError("a captured row draws its own noise")
        own = self._conditioned(cond)
        if not self.graphs.keys() >= set(self.kinds):
            start = self.start.clone()
            try:
                for kind in dict.fromkeys(self.kinds):
                    if kind not in self.graphs:
                        self._capture(kind, network, own, first_sample)
            finally:
                self.start.copy_(start)
        self.begin()
        self._stand_at(0, first_sample)
        every = self.check == "every" and self.first_bad is not None
        replay = marks.marked("row", lambda kind: self.graphs[kind].replay())
        for kind in self.kinds:
            replay(kind)
            if every:
                raise_if_bad(self.table, self.first_bad, first_sample)  # type: ignore[arg-type]
            yield self.buffers[kind.out]
        if self.first_bad is not None:
            raise_if_bad(self.table, self.first_bad, first_sample)

    def follow(self) -> None:
        """Wait, on the current stream, for the run before."""
        if self.done is not None:
            torch.cuda.current_stream(self.start.device).wait_event(self.done)

    def leave(self) -> None:
        """Note, on the current stream, where this run ends."""
        if self.start.is_cuda:
            self.done = torch.cuda.Event()
            self.done.record(torch.cuda.current_stream(self.start.device))
            self.home.wait_event(self.done)  # whoever gets this memory next, gets it on that stream

    def _stand_at(self, row: int, first_sample: int) -> None:
        seed = self.seed - 2**64 if self.seed >= 2**63 else self.seed
        self.cursor.copy_(torch.tensor([row, first_sample, seed]))

    def _conditioned(self, cond: Condition) -> Condition:
        """The condition in memory of the loop's own, which the graphs read."""
        if isinstance(cond, dict):
            return {name: self._keep(f"cond {name}", value) for name, value in cond.items()}
        return None if cond is None else self._keep("cond", cond)

    def _keep(self, name: str, value: Tensor) -> Tensor:
        if name not in self.static:
            self.static[name] = torch.empty_like(value)
        return self.static[name].copy_(value)

    def _capture(self, kind: Kind, network: Network, cond: Condition, first_sample: int) -> None:
        at, device = self.kinds.index(kind), self.start.device

        def body() -> None:
            number = self.cursor[:1]
            features = None
            if kind.calls and self.features is None:
                self.time.copy_(self.row_times.index_select(0, number))
            elif kind.calls and self.features is not None:
                features = self.features.index_select(0, number)
            self.row(kind, network, cond, self.cursor, features, None)
            number.add_(1)

        def warm() -> None:
            self.begin()
            self._stand_at(at, first_sample)
            body()

        with _lock, _uncached_casts(device):
            self.graphs[kind], self.pool = capture(warm, body, device, self.pool)


def capture(warm: Callable[[], None], body: Callable[[], None], device: torch.device, pool: Any) -> tuple[Any, Any]:
    """A CUDA graph of `body`, after some calls of `warm` (libraries set up, kernels compile), and its memory pool."""
    with torch.cuda.device(device):
        stream, current = _stream(device), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):
                warm()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                body()
        except RuntimeError as error:  # what worked in the warm-up cannot be captured
            graph.reset()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            raise GraphError(str(error).partition("\n")[0]) from error
    return graph, pool


_streams: dict[torch.device, Any] = {}


def _stream(device: torch.device) -> Any:
    """The stream of all captures on a device: what libraries keep for a stream is then made once."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def surroundings(device: torch.device) -> tuple[Any, ...]:
    """The caller's settings that a capture bakes in."""
    kind = device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return cast, torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()


def _uncached_casts(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast's casts of the weights as part of the graph: one that was cached outside would be stale in a replay."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)
