"""The capture of CUDA graphs, on a torch.cuda that only notes what is asked of it: in which order, on which stream and device."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from watching import NOT_WHILE_CAPTURING

import fastdiff
from fastdiff.errors import GraphError
from fastdiff.execution import cuda_graph, graphs, torch_private


class Stream:
    def __init__(self, cuda, device):
        self.cuda, self.device, self.thread = cuda, device, None  # the thread that captures on it

    def meet(self, what):
        """An operation, or an event of another stream's, comes to this one."""
        self.cuda.note(what, self.device)
        if self.thread not in (None, threading.get_ident()):
            self.cuda.mixed.append(what)

    def wait_stream(self, other):
        for stream in (self, other):
            stream.meet("wait_stream")

    def wait_event(self, event):
        self.meet("wait_event")


class Cuda:
    """torch.cuda without a device.

    notes   what was asked for, and on which device's account
    mixed   what came to a stream while another thread captured on it
    most    captures at a time
    """

    def __init__(self, monkeypatch):
        self.notes, self.mixed, self.captures, self.most, self.local = [], [], 0, 0, threading.local()
        self.defaults, self.pool, self.is_held, self.fails = {}, (0, 1), False, None
        monkeypatch.setattr(torch, "cuda", self)
        monkeypatch.setattr(torch, "zeros", lambda *size, device: self.note("zeros", device))
        monkeypatch.setattr(cuda_graph, "_places", {})
        for name in ("end_allocate_to_pool", "release_pool"):
            monkeypatch.setattr(torch_private, name, self.noted(name))
        monkeypatch.setattr(torch_private, "clear_cublas_workspaces", lambda: None)

    def note(self, what, device):
        self.notes.append((what, device))

    def noted(self, what):
        def call(index, pool):
            assert pool == self.pool
            self.note(what, torch.device("cuda", index))
            if what == "release_pool":
                self.is_held = False

        return call

    def here(self):
        return getattr(self.local, "device", torch.device("cuda", 0))

    @contextlib.contextmanager
    def device(self, device):
        before, self.local.device = self.here(), torch.device(device)
        try:
            yield
        finally:
            self.local.device = before

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.local.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self.local.stream = before

    def current_stream(self, device=None):
        device = self.here() if device is None else device
        self.note("current_stream", device)
        current = getattr(self.local, "stream", None)
        default = self.defaults.setdefault((device, threading.get_ident()), Stream(self, device))
        return current if current is not None and current.device == device else default

    def Stream(self, device, priority):
        return Stream(self, device)

    def Event(self, **options):
        return SimpleNamespace(
            record=lambda stream: stream.meet("record"), synchronize=lambda: None, elapsed_time=lambda end: 3.0
        )

    def CUDAGraph(self):
        return SimpleNamespace(reset=lambda: self.note("reset", self.here()), replay=None)

    def graph_pool_handle(self):
        return self.pool

    @contextlib.contextmanager
    def graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        self.note("capture" if pool else "again", stream.device)
        self.captures += 1
        self.most = max(self.most, self.captures)
        stream.thread = threading.get_ident()
        try:
            with self.stream(stream):
                yield
        except BaseException as error:
            self.is_held = True  # the pool
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from error
        finally:
            stream.thread = None
            self.captures -= 1

    def is_current_stream_capturing(self):
        return self.current_stream().thread is not None

    def synchronize(self):
        self.note("synchronize", self.here())

    def empty_cache(self):
        self.note("empty_cache", self.here())

    def memory_snapshot(self):
        parts = [{"segment_pool_id": (0, 7), "active_size": 0}, {"segment_pool_id": self.pool, "active_size": 512}]
        return parts + [{"segment_pool_id": self.pool, "active_size": 0}] * self.is_held


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def operation():
    torch.cuda.current_stream(torch.device("cuda", 0)).meet("operation")
    time.sleep(0.0002)


def test_nothing_comes_to_a_stream_while_another_thread_captures_on_it(cuda):
    """Warm-ups run on the stream of the captures."""
    errors = []

    def work():
        try:
            for _ in range(4):
                cuda_graph.capture(operation, [operation] * 2, torch.device("cuda", 0))
        except Exception as error:
            errors.append(error)

    run([work] * 8)
    assert not errors
    assert sum(what == "operation" for what, _ in cuda.notes) == 8 * 4 * 3
    assert not cuda.mixed
    assert cuda.most == 1


def run(works):
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "they wait for each other"


def test_a_warm_up_that_captures_waits_for_nobody(cuda):
    """A network that samples in its forward."""
    device = torch.device("cuda", 0)
    run(
        [lambda: cuda_graph.capture(lambda: cuda_graph.capture(operation, [operation], device), [operation], device)]
        * 2
    )
    assert not cuda.mixed
    assert cuda.most == 1


def test_warm_ups_on_two_devices_may_wait_for_each_other(cuda):
    """As networks do that exchange values between the devices, each in its own thread."""
    meet = threading.Barrier(2, timeout=10)
    run([lambda n=n: cuda_graph.capture(meet.wait, [operation], torch.device("cuda", n)) for n in range(2)])
    assert not meet.broken
    assert cuda.most == 1


class Held:
    """What a network makes in a call."""


def failing(made, error=RuntimeError):
    held = Held()
    made.append(weakref.ref(held))
    try:
        raise ValueError("first")
    except ValueError:
        raise error(f"{NOT_WHILE_CAPTURING}\nand more") from None


def test_a_capture_that_failed_gives_its_pool_back(cuda):
    made, device = [], torch.device("cuda", 0)
    with pytest.raises(GraphError, match=f"^{NOT_WHILE_CAPTURING}$") as caught:
        cuda_graph.capture(lambda: None, [lambda: None, lambda: failing(made)], device)
    order = [what for what, _ in cuda.notes if what not in ("current_stream", "wait_stream")]
    assert order == [
        "capture", "capture", "reset", "end_allocate_to_pool", "again", "zeros", "synchronize", "empty_cache", "release_pool",
        "empty_cache",
    ]  # fmt: skip
    assert not cuda.is_held
    assert made[0]() is None, "its error holds what the network had made"
    assert caught.value.__cause__.__traceback__ is not None


def test_a_pool_that_torch_has_released_is_not_released_again(cuda, monkeypatch):
    def reset():
        cuda.is_held = False

    monkeypatch.setattr(cuda, "CUDAGraph", lambda: SimpleNamespace(reset=reset))
    with pytest.raises(GraphError):
        cuda_graph.capture(lambda: None, [lambda: failing([])], torch.device("cuda", 0))
    assert "release_pool" not in dict(cuda.notes)


def test_an_interrupt_in_a_capture_is_not_taken_for_a_network_that_cannot_be_captured(cuda):
    with pytest.raises(KeyboardInterrupt):
        cuda_graph.capture(lambda: None, [lambda: failing([], KeyboardInterrupt)], torch.device("cuda", 0))


def test_a_run_on_one_device_leaves_the_others_alone(cuda):
    """A context takes some 400 MB, and the stream that is asked whether it captures must be the run's."""
    device = torch.device("cuda", 1)

    def capture(body):
        return cuda_graph.capture(lambda: None, [body], device)

    assert graphs.obstacle(torch.nn.Tanh(), device, 12, None, "auto") is None
    capture(lambda: None)
    with pytest.raises(GraphError):
        capture(lambda: failing([]))
    watch = cuda_graph.Stopwatch(device)
    watch.mark()
    watch.mark()
    assert watch.seconds() == [0.003]
    tensor = SimpleNamespace(device=device, is_cuda=True, record_stream=lambda stream: None)
    loop = graphs.GraphLoop.__new__(graphs.GraphLoop)
    loop.buffers, loop.static, loop.done = [tensor], {}, None
    loop.net_input = loop.time = loop.measured = loop.cursor = loop.first_bad = tensor
    loop.known = loop.mask = None
    loop.leave()
    loop.follow()
    noted = {what for what, _ in cuda.notes}
    assert noted >= {"current_stream", "wait_stream", "wait_event", "record", "synchronize", "empty_cache", "zeros"}
    assert {at.index for _, at in cuda.notes} == {1}


def test_a_stream_that_captures_is_found_on_the_device_of_the_run(cuda):
    device = torch.device("cuda", 1)
    stream = Stream(cuda, device)
    net = torch.nn.Tanh()
    with cuda.graph(cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        assert graphs.obstacle(net, torch.device("cuda", 0), 12, None, "eager") is None
        with pytest.raises(fastdiff.errors.ConfigError, match="while the current stream is capturing"):
            graphs.obstacle(net, device, 12, None, "eager")
