"""A plugin of pytest's with which benchmarks/test_gpu.py takes a CPU for a GPU: `pytest benchmarks --quick -p stand_in`.

torch.cuda only notes what it is asked, a graph is a tape of what torch's dispatcher saw, nothing is compiled. So all that is
done for a device is done, and its numbers mean nothing.
"""

from __future__ import annotations

import gc
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch._dynamo  # which the tape would import
from step_cases import dispatched
from watching import on_tape


class Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e6 * (end.at - self.at)  # a device so slow is asked for few calls


def compiled(function, **options):
    """A module of torch.compile's class, or the function, with nothing compiled."""
    module = isinstance(function, torch.nn.Module)
    return torch._dynamo.OptimizedModule(function, lambda call: call) if module else function


@pytest.hookimpl(tryfirst=True)  # before benchmarks/conftest.py looks at the device
def pytest_configure(config):
    import recorder

    from fastdiff.execution import conditions, cuda_graph, graphs, ops
    from fastdiff.training import optimisers

    recorder.is_cuda = lambda device: True
    nothing = {name: lambda *args, **kwargs: None for name in ("synchronize", "empty_cache", "reset_peak_memory_stats")}
    numbers = {name: lambda *args, **kwargs: 0 for name in ("memory_allocated", "max_memory_allocated")}
    for name, function in {**nothing, **numbers, "get_device_name": lambda *args: "a stand-in", "Event": Event}.items():
        setattr(torch.cuda, name, function)
    torch.compile = compiled
    torch.compiler.reset = torch.compiler.cudagraph_mark_step_begin = lambda: None
    activities = torch.profiler.ProfilerActivity
    torch.profiler.ProfilerActivity = SimpleNamespace(CUDA=activities.CPU)
    graphs.capture = cuda_graph.capture = on_tape
    graphs.obstacle = lambda net, device, rows, noise, engine: (
        None if noise is None else "the noise comes from the caller"
    )
    conditions.are_seen = lambda value, looks=False: False
    optimisers.on_cpu_alike = lambda weights: False
    operations = ModuleType("operations")
    vars(operations).update(vars(dispatched()))
    ops.backend_module = lambda name: operations
    gc.collect()
    gc.freeze()  # as each measurement collects first


def pytest_unconfigure():
    gc.unfreeze()
