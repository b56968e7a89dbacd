"""One CUDA graph: its capture on a stream of fastdiff's, the repair of torch's state where that fails, the settings it bakes in.

Experimental: no device has run it yet.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..errors import GraphError
from . import torch_private

_capturing = threading.Lock()  # torch takes one capture at a time


def capture(warm: Callable[[], None], body: Callable[[], None], device: torch.device, pool: Any) -> tuple[Any, Any]:
    """A CUDA graph of `body`, after some calls of `warm` (libraries set up, kernels compile), and its memory pool.

    Raises GraphError, with torch in order, where `body` cannot be captured; what `warm` raises goes through.
    """
    # (the inner context restores the caller's stream: torch leaves another after a capture that failed)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        stream, current = _stream(device), torch.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for _ in range(3):
                    warm()
        finally:
            current.wait_stream(stream)
        graph, first = torch.cuda.CUDAGraph(), None
        pool = torch.cuda.graph_pool_handle() if pool is None else pool
        with _capturing, _no_collection():
            torch_private.clear_cublas_workspaces()  # so that the graph's own lie in its own pool, and not where others' do
            try:
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    try:
                        body()
                    except Exception as error:
                        first = error  # which says more than what the end of the capture raises
                        raise
            except Exception as error:  # what worked in the warm-up cannot be captured
                _recover(graph, pool, stream, device)
                raise GraphError(first_line(first or error)) from (first or error)
            finally:
                torch_private.clear_cublas_workspaces()
    return graph, pool


def _recover(graph: Any, pool: Any, stream: Any, device: torch.device) -> None:
    """Bring torch back from a capture that failed, of which it leaves the allocator and the generator in the midst."""
    graph.reset()
    with contextlib.suppress(RuntimeError):  # where torch has done so itself
        torch_private.end_allocate_to_pool(device.index, pool)
    # the generator is told of the end of a capture only by one that succeeds
    again = torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local")
    with contextlib.suppress(RuntimeError), again:
        torch.zeros(1, device=device)
    torch.cuda.synchronize()
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


_streams: dict[torch.device, Any] = {}


def _stream(device: torch.device) -> Any:
    """The stream of all captures on a device: what libraries keep for a stream is then made once."""
    if device not in _streams:
        # of high priority, of which users ask for few: torch hands out the same streams again and again
        _streams[device] = torch.cuda.Stream(device, priority=-1)
    return _streams[device]


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
