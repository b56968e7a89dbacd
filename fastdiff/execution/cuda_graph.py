"""CUDA graphs: their capture on a stream of fastdiff's, the repair of torch's state where that fails, the settings they bake
in, and the clock that tells whether they pay.

Experimental: no device has run it yet.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import GraphError
from . import torch_private


class _Place(NamedTuple):
    """Where the graphs of a device are captured, one caller at a time."""

    stream: Any
    lock: Any


_capturing = threading.RLock()  # torch takes one capture at a time
_places: dict[torch.device, _Place] = {}
_failed: list[Any] = []


def capture(warm: Callable[[], None], bodies: Sequence[Callable[[], None]], device: torch.device) -> list[Any]:
    """CUDA graphs of `bodies`, which share their memory, after a call of `warm` (libraries set up, kernels compile).

    Raises GraphError, with torch in order, where a body cannot be captured; what `warm` raises goes through.
    """
    device = torch.cuda.current_stream(device).device  # with its number
    place = _place(device)
    # Warm-ups run on the stream of the captures, so they hold its lock too: the kernels of one that came in another thread's
    # capture would become part of that graph. A stream for each thread would not do: torch has 32, which it hands out again
    # and again. The locks let a thread in twice, for networks that sample in their forward; a capture holds the second one,
    # a warm-up only its device's, as a thread for each device may wait for the others in its forward (collectives).
    # (the inner context restores the caller's stream: torch leaves another after a capture that failed)
    with place.lock, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        stream, current = place.stream, torch.cuda.current_stream(device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                warm()
        finally:
            current.wait_stream(stream)
        with _capturing, _no_collection():
            torch_private.clear_cublas_workspaces()  # so that the graphs' own lie in their pool, and not where others' do
            try:
                return _captured(bodies, stream, device)
            finally:
                torch_private.clear_cublas_workspaces()


def _captured(bodies: Sequence[Callable[[], None]], stream: Any, device: torch.device) -> list[Any]:
    graphs, pool = list[Any](), torch.cuda.graph_pool_handle()
    for body in bodies:
        graph = torch.cuda.CUDAGraph()
        try:
            _record(graph, body, pool, stream)
        except BaseException as error:  # what worked in the warm-up cannot be captured
            graphs.clear()
            _recover(graph, pool, stream, device, error)
            if isinstance(error, Exception):
                raise GraphError(first_line(error)) from error
            raise
        graphs.append(graph)
    return graphs


def _record(graph: Any, body: Callable[[], None], pool: Any, stream: Any) -> None:
    """Capture a body. Raises its error rather than that of the capture's end, which says less."""
    first: BaseException | None = None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                body()
            except BaseException as error:
                first = error
                raise
    except BaseException as error:
        raise (first or error) from None


def _recover(graph: Any, pool: Any, stream: Any, device: torch.device, error: BaseException | None) -> None:
    """Bring torch back from a capture that failed, of which it leaves the allocators and the generator in the midst, and give
    back the memory of its pool, which no other graph has by now."""
    _failed.append(graph)  # torch 2.11's allocator of pinned memory keeps a pointer to it
    graph.reset()
    with contextlib.suppress(RuntimeError):  # where torch has done so itself
        torch_private.end_allocate_to_pool(device.index, pool)
    # the generator is told of the end of a capture only by one that succeeds
    again = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local")
    with contextlib.suppress(RuntimeError), again:
        torch.zeros(1, device=device)
    while error is not None:  # its frames hold what the network had made
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with contextlib.suppress(RuntimeError):  # other allocators than torch's keep no pools
        # Up to torch 2.13 reset() leaves the pool one user too many: then what nobody uses is still there.
        if any(part["segment_pool_id"] == pool and not part["active_size"] for part in torch.cuda.memory_snapshot()):
            torch_private.release_pool(device.index, pool)
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A collection during a capture might free another graph."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _place(device: torch.device) -> _Place:
    """The one of a device: what libraries keep for a stream is then made once."""
    with _capturing:
        if device not in _places:
            # of high priority, of which users ask for few, as torch hands out the same streams to all
            _places[device] = _Place(torch.cuda.Stream(device, priority=-1), threading.RLock())
        return _places[device]


class Stopwatch:
    """The time that pieces of work take on a device's current stream, waits for the host among them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.marks = device, list[Any]()

    def mark(self) -> None:
        """The begin of a piece, or its end."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """Each piece's; waits for the last."""
        self.marks[-1].synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in zip(self.marks[::2], self.marks[1::2])]


def surroundings(device: torch.device) -> tuple[Any, ...]:
    """The caller's settings that a capture bakes in."""
    kind, cuda, cudnn = device.type, torch.backends.cuda, torch.backends.cudnn
    return (
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        (cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision),  # type: ignore[attr-defined]
        (cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction),
        cuda.matmul.allow_fp16_accumulation,
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
    )


def first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
