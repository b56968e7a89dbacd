"""The graph engine. Each case runs twice: on CUDA graphs where there is a device (mark `gpu`), and on a tape.

The tape is a CUDA graph's stand-in on a machine without one: it records what the dispatcher sees of a row, tensors by
their memory and numbers by their value, and repeats it without any Python of the row's. So a number that was baked in, a
tensor that moved or a value read on the host shows in the results or is refused, as on a device.
"""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from test_runner import dispatched
from test_sample import every_run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdiff
from fastdiff import graphs, ops
from fastdiff.errors import ConfigError, GraphError, NonFiniteError
from fastdiff.models import MLP


class Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        out = func(*args, **kwargs)
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        made = [v for v in tree_leaves(out) if isinstance(v, torch.Tensor)]
        is_new = any(not any(torch._C._is_alias_of(v, w) for w in given) for v in made)
        self.calls.append((func, args, kwargs, made, is_new))
        return out

    def replay(self):
        for func, args, kwargs, made, is_new in self.calls:
            again = func(*args, **kwargs)
            if is_new:
                for kept, value in zip(made, tree_leaves(again), strict=True):
                    kept.copy_(value)


@pytest.fixture(params=["tape", pytest.param("cuda", marks=pytest.mark.gpu)])
def captures(request, monkeypatch):
    """A list that grows by one with each capture; `.device` is where."""

    class Captures(list):
        device = torch.device("cpu" if request.param == "tape" else "cuda")

    seen, capture = Captures(), graphs.capture

    def on_tape(warm, body, device, pool):
        for _ in range(3):
            warm()
        tape = Tape()
        try:
            with tape:
                body()
        except RuntimeError as error:
            raise GraphError(str(error).partition("\n")[0]) from error
        return tape, pool

    def counted(*args):
        seen.append(1)
        return (on_tape if request.param == "tape" else capture)(*args)

    monkeypatch.setattr(graphs, "capture", counted)
    if request.param == "tape":
        known = graphs.obstacle
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(ops, "backend_module", lambda name: dispatched())
        monkeypatch.setattr(graphs, "obstacle", lambda net, device, *rest: known(net, torch.device("cuda"), *rest))
    graphs.clear()
    yield seen
    graphs.clear()


class Net(nn.Module):
    """Pointwise, with a parameter, a buffer and a condition."""

    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(-0.3, device=device))
        self.register_buffer("shift", torch.tensor(0.01, device=device))

    def forward(self, x, t, cond=None, label=None):
        out = x * self.weight + self.shift + 0.1 * t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        out = out if cond is None else out + cond
        return out if label is None else out + label


def draw(net, **options):
    options = {"sde": "vp", "steps": 12, "shape": (3, 5), "num_samples": 4, "device": options.pop("place"), **options}
    return fastdiff.sample(net, **options)


def both(net, captures, **options):
    """The captured run and the eager one."""
    return [draw(net, engine=engine, place=captures.device, **options) for engine in ("graph", "eager")]


@pytest.mark.parametrize(("sde", "sampler", "steps"), list(every_run()), ids=str)
def test_every_solver_replays_to_the_bit(captures, sde, sampler, steps):
    net = Net(captures.device)
    ours, theirs = both(net, captures, sde=sde, sampler=sampler, steps=steps, trajectory=5, check="off")
    for a, b in zip(ours, theirs):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    kinds = len(captures)
    assert kinds <= 12
    draw(net, sde=sde, sampler=sampler, steps=steps, check="off", engine="graph", place=captures.device, seed=1)
    assert len(captures) == kinds


def test_few_graphs_serve_many_rows(captures):
    net = Net(captures.device)
    for steps in (100, 300):
        both(net, captures, steps=steps, sampler="euler_maruyama")
    assert len(captures) == 2  # the last row feeds no network


def test_seeds_are_read_by_each_replay(captures):
    """(c)"""
    net = Net(captures.device)
    runs = [draw(net, seed=seed, engine="graph", place=captures.device) for seed in [*range(100), 2**64 - 1]]
    assert len(captures) == 2
    for seed in (0, 50, 99):
        assert torch.equal(runs[seed], draw(net, seed=seed, engine="eager", place=captures.device))
        assert torch.equal(runs[seed], draw(net, seed=seed, engine="graph", place=captures.device))
    assert torch.equal(runs[-1], draw(net, seed=2**64 - 1, engine="eager", place=captures.device))
    assert len({float(run.sum()) for run in runs}) == len(runs)


def test_grids_starts_offsets_and_batches_are_read_by_each_replay(captures):
    net, start = Net(captures.device), torch.randn(4, 3, 5, device=captures.device)
    for options in (
        {}, {"grid": "quadratic"}, {"t_min": 0.1}, {"first_sample": 7}, {"x_init": start}, {"batch_size": 3},
        {"batch_size": 2}, {"denoise": False},
    ):  # fmt: skip
        assert torch.equal(*both(net, captures, **options))


@pytest.mark.parametrize("named", [False, True])
def test_conditions_are_refreshed(captures, named):
    """(d)"""
    net = Net(captures.device)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(4, 3, 5, generator=g).to(captures.device) for _ in range(2))
        assert torch.equal(*both(net, captures, cond={"cond": a, "label": b} if named else a, batch_size=2))
    assert len(captures) == 2


def test_parameters_changed_in_place_are_seen_and_new_ones_noticed(captures):
    """(e)"""
    net = Net(captures.device)
    before = both(net, captures)
    with torch.no_grad():
        net.weight.fill_(-0.5)
        net.shift.fill_(0.5)
    after = both(net, captures)
    assert torch.equal(*after)
    assert not torch.equal(before[0], after[0])
    assert len(captures) == 2
    net.weight = nn.Parameter(torch.tensor(-0.1, device=captures.device))
    assert torch.equal(*both(net, captures))
    assert len(captures) == 4
    net.to(torch.float64)
    assert torch.equal(*both(net, captures))
    assert len(captures) == 6


def test_graphs_go_with_their_network(captures):
    """(f)"""
    net = Net(captures.device)
    draw(net, engine="graph", place=captures.device)
    ((_, loops),) = graphs._kept.values()
    (loop,) = (weakref.ref(loop) for loop in loops.values())
    del loops
    assert loop() is not None
    del net
    gc.collect()
    assert loop() is None
    assert not graphs._kept


def test_a_whole_generation_retires_at_once(captures):
    """(g)"""
    net = Net(captures.device)
    for count in range(1, graphs.LIMIT + 1):
        both(net, captures, num_samples=count)
    assert len(captures) == 2 * graphs.LIMIT
    both(net, captures, num_samples=1)  # all are kept
    assert len(captures) == 2 * graphs.LIMIT
    assert torch.equal(*both(net, captures, num_samples=graphs.LIMIT + 1))
    ((_, loops),) = graphs._kept.values()
    assert len(loops) == 1
    assert torch.equal(*both(net, captures, num_samples=1))


def test_a_result_is_the_callers_own(captures):
    """(h)"""
    net = Net(captures.device)
    first = draw(net, engine="graph", place=captures.device)
    kept = first.clone()
    draw(net, engine="graph", place=captures.device, seed=5)
    assert torch.equal(first, kept)


class Reading(Net):
    """Reads a number on the host, as a capture cannot."""

    def forward(self, x, t):
        return super().forward(x, t) * (1.0 if float(t[0]) > 0.5 else 0.5)


def test_a_network_that_cannot_be_captured_runs_eagerly_with_one_warning(captures):
    """(a), (b)"""
    net = Reading(captures.device)
    with pytest.warns(RuntimeWarning, match="cannot be captured as a CUDA graph") as warned:
        ours, info = draw(net, return_info=True, place=captures.device)
    assert len(warned) == 1
    assert info.engine == "eager"
    assert "could not be captured" in info.why
    tried = len(captures)
    again, info = draw(net, return_info=True, place=captures.device)  # no second warning, which would be an error
    assert len(captures) == tried
    assert "cannot be captured" in info.why
    eager = draw(net, engine="eager", place=captures.device)
    assert torch.equal(ours, eager)
    assert torch.equal(again, eager)
    with pytest.raises(ConfigError, match="engine='graph' cannot run here: the network cannot be captured"):
        draw(net, engine="graph", place=captures.device)
    with pytest.raises(GraphError, match=r"cannot be captured as a CUDA graph \(.*\): use engine='auto'"):
        draw(Reading(captures.device), engine="graph", place=captures.device)
    assert torch.equal(*both(Net(captures.device), captures))  # the device is in order


def test_plain_callables_are_captured_for_their_run_alone(captures):
    weight = torch.tensor(-0.3, device=captures.device)
    for steps in (120, 12):
        weight = weight - 0.1
        assert torch.equal(*both(lambda x, t, w=weight: x * w, captures, steps=steps))
    assert len(captures) == 4
    assert not graphs._kept
    for steps, engine in ((graphs.WORTHWHILE - 1, "eager"), (graphs.WORTHWHILE, "graph")):
        _, info = draw(lambda x, t: -x, steps=steps, place=captures.device, return_info=True)
        assert info.engine == engine


def test_two_threads_that_each_need_the_others_loop_do_not_wait_for_each_other(captures):
    """A run within a callback borrows a loop while its thread holds another; the other thread does so in reverse."""
    net, meet, results = Net(captures.device), threading.Barrier(2, timeout=60), {}

    def work(outer, inner):
        def callback(row, t, x):
            if row == 0:
                meet.wait()
                results[inner, "inner"] = draw(net, num_samples=inner, engine="graph", place=captures.device)

        results[outer, "outer"] = draw(net, num_samples=outer, engine="graph", place=captures.device, callback=callback)

    threads = [threading.Thread(target=work, args=sizes, daemon=True) for sizes in ((3, 4), (4, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 4
    for (count, _), x in results.items():
        assert torch.equal(x, draw(net, num_samples=count, engine="eager", place=captures.device))


def test_the_callers_noise_is_not_captured(captures):
    net, noise = Net(captures.device), torch.randn(12, 4, 3, 5, device=captures.device)
    _, info = draw(net, noise=noise, return_info=True, place=captures.device)
    assert info.engine == "eager"
    with pytest.raises(ConfigError, match="the noise comes from the caller"):
        draw(net, noise=noise, engine="graph", place=captures.device)


def test_runs_within_a_callback_and_broken_runs_do_no_harm(captures):
    net, inner = Net(captures.device), []
    expected = draw(net, engine="eager", place=captures.device)

    def callback(row, t, x):
        if row == 5:
            inner.append(draw(net, engine="graph", seed=3, place=captures.device))

    assert torch.equal(draw(net, engine="graph", place=captures.device, callback=callback), expected)
    assert torch.equal(inner[0], draw(net, engine="eager", seed=3, place=captures.device))

    def interrupt(row, t, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(net, engine="graph", place=captures.device, callback=interrupt)
    assert torch.equal(draw(net, engine="graph", place=captures.device), expected)


def test_threads_take_turns(captures):
    """(i)"""
    net, results = Net(captures.device), {}

    def work(seed):
        stream = torch.cuda.Stream() if captures.device.type == "cuda" else None
        with torch.cuda.stream(stream):
            results[seed] = draw(net, engine="graph", seed=seed, place=captures.device)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, x in results.items():
        assert torch.equal(x, draw(net, engine="eager", seed=seed, place=captures.device))
    assert len(results) == 4


def test_a_run_that_is_not_finite_is_found(captures):
    net = Net(captures.device)
    both(net, captures)
    with torch.no_grad():
        net.weight.fill_(float("inf"))
    for check in ("final", "every"):
        with pytest.raises(NonFiniteError, match="from row 0 "):
            draw(net, engine="graph", check=check, place=captures.device)
    x = draw(net, engine="graph", check="off", place=captures.device)
    assert not x.isfinite().all()


def test_time_features_and_dtypes(captures):
    torch.manual_seed(0)
    net = MLP((3, 5), hidden=16).to(captures.device)
    nn.init.normal_(net.out.weight, std=0.1)
    model = fastdiff.ScoreModel(net, "vp", data_shape=(3, 5))
    for options in ({}, {"grid": "quadratic", "seed": 2}):
        runs = [
            fastdiff.sample(model, steps=12, num_samples=4, engine=engine, device=captures.device, **options)
            for engine in ("graph", "eager")
        ]
        assert torch.equal(*runs) if captures.device.type == "cpu" else torch.allclose(*runs, atol=1e-4)
    assert len(captures) == 2
    half = Net(captures.device).to(torch.bfloat16)
    assert torch.equal(*both(half, captures))


def test_autocast_is_part_of_the_key(captures):
    """(j)"""
    net = nn.Linear(5, 5).to(captures.device)
    network = type("Cast", (nn.Module,), {"forward": lambda self, x, t: self.net(x)})()
    network.net = net
    kind = captures.device.type
    for dtype in (None, torch.bfloat16, None):
        with torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            assert torch.equal(*both(network, captures))
        with torch.no_grad():
            net.weight.mul_(0.5)
    assert len(captures) == 4


@pytest.mark.gpu
def test_the_callers_own_capture_is_refused(captures):
    """(j)"""
    if captures.device.type != "cuda":
        pytest.skip("needs a capture of the device's")
    net, graph = Net(captures.device), torch.cuda.CUDAGraph()
    draw(net, place=captures.device)
    with pytest.raises(ConfigError, match="while the current stream is capturing"), torch.cuda.graph(graph):
        draw(net, place=captures.device)
    torch.cuda.synchronize()
    assert torch.equal(*both(net, captures))


@pytest.mark.gpu
def test_a_loader_that_pins_memory_does_not_break_a_capture(captures):
    """(j)"""
    if captures.device.type != "cuda":
        pytest.skip("needs pinned memory")
    stop = threading.Event()

    def pin():
        while not stop.is_set():
            torch.empty(1 << 20).pin_memory().to("cuda", non_blocking=True)

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        assert torch.equal(*both(Net(captures.device), captures))
    finally:
        stop.set()
        thread.join()


def test_without_a_device_the_reason_is_said():
    with pytest.raises(ConfigError, match="engine='graph' cannot run here: CUDA graphs need a CUDA device, not cpu"):
        fastdiff.sample(lambda x, t: -x, "vp", 5, shape=(2,), engine="graph", device="cpu")
    _, info = fastdiff.sample(lambda x, t: -x, "vp", 5, shape=(2,), return_info=True, device="cpu")
    assert info.engine == "eager"
    assert "CUDA graphs need a CUDA device" in info.why
