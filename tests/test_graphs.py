"""The graph engine. Each case runs twice: on CUDA graphs where there is a device (mark `gpu`), and on a tape.

The tape is a CUDA graph's stand-in on a machine without one: it records what the dispatcher sees of a row, tensors by
their memory and numbers by their value, and repeats it without any Python of the row's. So a number that was baked in, a
tensor that moved or a value read on the host shows in the results or is refused, as on a device.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
from runs import one_of_each_kind
from step_cases import dispatched
from torch import nn
from watching import NOT_WHILE_CAPTURING, Tape, on_tape

import fastdiff
from fastdiff import guidance, inverse
from fastdiff.errors import ConfigError, GraphError, NonFiniteError
from fastdiff.execution import cuda_graph, graphs, loop, ops
from fastdiff.networks import MLP


class Clock:
    """Time that passes by so many seconds in each row, where it runs eagerly and where it is replayed."""

    def __init__(self, eager=0.002, replay=0.001):
        self.now, self.eager, self.replay, self.read = 0.0, eager, replay, 0

    def watch(self, device):
        marks = []

        def seconds():
            self.read += 1
            return [end - begin for begin, end in zip(marks[::2], marks[1::2])]

        return SimpleNamespace(mark=lambda: marks.append(self.now), seconds=seconds)


class Timed:
    """A graph whose replays take time."""

    def __init__(self, graph, clock):
        self.graph, self.clock = graph, clock

    def replay(self):
        self.clock.now += self.clock.replay
        self.graph.replay()


@pytest.fixture(params=["tape", pytest.param("cuda", marks=pytest.mark.gpu)])
def captures(request, monkeypatch):
    """A list that grows by one with each capture; `.device` is where, `.alive` how many of the graphs are in memory."""

    class Captures(list):
        device = torch.device("cpu" if request.param == "tape" else "cuda")
        clock = Clock()

        @property
        def alive(self):
            gc.collect()
            return sum(graph() is not None for graph in self)  # (weak references)

    seen, capture = Captures(), graphs.capture

    def counted(warm, bodies, device):
        first = len(seen)
        seen.extend(lambda: None for _ in bodies)
        made = (on_tape if request.param == "tape" else capture)(warm, bodies, device)
        made = [Timed(graph, seen.clock) for graph in made]
        seen[first : first + len(made)] = map(weakref.ref, made)
        return made

    def row(*args):
        seen.clock.now += seen.clock.eager
        return eager_row(*args)

    eager_row = loop.Loop.row
    monkeypatch.setattr(loop.Loop, "row", row)
    monkeypatch.setattr(graphs, "Stopwatch", seen.clock.watch)
    monkeypatch.setattr(graphs, "capture", counted)
    if request.param == "tape":
        known = graphs.obstacle
        monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: getattr(Tape.capturing, "now", False))
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
        out = out if t.is_floating_point() else out * 0.9
        out = out if cond is None else out + (cond if cond.is_floating_point() else cond * 0.5 - 0.25)
        return out if label is None else out * (1 + label * 0.1)


def draw(net, **options):
    options = {"sde": "vp", "steps": 12, "shape": (3, 5), "num_samples": 4, "device": options.pop("place"), **options}
    return fastdiff.sample(net, **options)


def both(net, captures, **options):
    """The captured run and the eager one."""
    return [draw(net, engine=engine, place=captures.device, **options) for engine in ("graph", "eager")]


@pytest.mark.parametrize(("sde", "sampler", "steps"), one_of_each_kind(), ids=str)
def test_every_solver_replays_to_the_bit(captures, monkeypatch, sde, sampler, steps):
    net = Net(captures.device)
    options = {"sde": sde, "sampler": sampler, "steps": steps, "trajectory": 5, "check": "off"}
    ours, theirs = both(net, captures, **options)
    kinds = len(captures)
    assert kinds <= 12
    draw(net, engine="graph", place=captures.device, seed=1, **options)
    assert len(captures) == kinds
    # two rows eagerly, two as replays, the others eagerly
    monkeypatch.setattr(graphs, "TIMED", 2)
    captures.clock.replay = 0.003
    mixed = draw(net, place=captures.device, **options)
    assert captures.clock.read
    for a, b, c in zip(ours, theirs, mixed):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert torch.equal(a.nan_to_num(), c.nan_to_num())
    assert captures.alive == 0


@pytest.mark.parametrize(("sde", "sampler", "count"), [("vp", "euler_maruyama", 2), ("ve", "pc", 2), ("ve", "heun", 5)])
def test_few_graphs_serve_many_rows(captures, sde, sampler, count):
    """However many rows: two where all are alike but the last, which feeds no network; Heun's have five plans."""
    net = Net(captures.device)
    for steps in (100, 300):
        both(net, captures, sde=sde, steps=steps, sampler=sampler, check="off")
    assert len(captures) == count


def planted(defect):
    """The step with what a graph would not repeat."""
    rows, pair = [], []

    def step(out, table, cursor, stream, x, *rest, **others):
        rows.append(1)
        if defect == "a row's number from the host":
            cursor = torch.stack((torch.full_like(cursor[0], len(rows) % 12), *cursor[1:]))
        elif defect == "another buffer in each row":
            pair.extend(torch.zeros_like(x) for _ in range(2 - len(pair)))
            pair[len(rows) % 2].copy_(x)
            x = x + 0.1 * pair[(len(rows) + 1) % 2]
        torch.ops.fastdiff.step(out, table, cursor, stream, x, *rest, **others)

    return step


@pytest.mark.parametrize("defect", ["none", "a row's number from the host", "another buffer in each row"])
def test_the_tape_shows_what_is_planted(captures, monkeypatch, defect):
    if captures.device.type == "cuda":
        pytest.skip("asks the tape")
    monkeypatch.setattr(ops, "backend_module", lambda name: dispatched(step=planted(defect)))
    ours, theirs = both(Net(captures.device), captures)
    assert torch.equal(ours, theirs) == (defect == "none")


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


@pytest.mark.parametrize("sampler", ["euler_maruyama", "ddim", "heun", "pc"])
def test_known_parts_are_read_by_each_replay(captures, sampler):
    """Graphs with a mask serve every mask, and those without none."""
    net, kinds = Net(captures.device), 0
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        known, mask = torch.randn(4, 3, 5, generator=g), torch.rand(4, 3, 5, generator=g) < 0.5
        replacement = inverse.Replacement((known.to(captures.device), mask.to(captures.device)))
        replayed, eager = both(net, captures, guidance=replacement, sampler=sampler, batch_size=2)
        assert torch.equal(replayed, eager)
        assert torch.equal(replayed.cpu()[mask], known[mask])
        kinds = kinds or len(captures)
        assert len(captures) == kinds
    assert torch.equal(*both(net, captures, sampler=sampler, batch_size=2))
    assert len(captures) > kinds
    dps = inverse.DPS(inverse.Problem(torch.zeros(15), inverse.Mask(torch.ones(5) > 0), 0.0))
    with pytest.raises(
        ConfigError, match="engine='graph' cannot run here: the guidance changes the state after each row"
    ):
        draw(net, engine="graph", place=captures.device, guidance=dps, sampler="ancestral")


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
    assert captures.alive == 2
    del net
    assert captures.alive == 0


def test_a_whole_generation_retires_at_once(captures):
    """(g)"""
    net = Net(captures.device)
    for count in range(1, graphs.LIMIT + 1):
        both(net, captures, num_samples=count)
    assert len(captures) == 2 * graphs.LIMIT
    both(net, captures, num_samples=1)  # all are kept
    assert len(captures) == 2 * graphs.LIMIT
    assert captures.alive == 2 * graphs.LIMIT
    assert torch.equal(*both(net, captures, num_samples=graphs.LIMIT + 1))
    assert captures.alive == 2
    assert torch.equal(*both(net, captures, num_samples=1))


def test_a_generation_is_of_all_networks(captures):
    """(g)"""
    nets = [Net(captures.device) for _ in range(3)]
    for count in range(1, 4):
        for net in nets:
            both(net, captures, num_samples=count)
    assert len(captures) == 2 * 9
    assert captures.alive == 2
    inner = []

    def callback(row, t, x):  # nine others come while a loop is in use, and it goes on
        if row == 3:
            inner.extend(both(nets[0], captures, num_samples=count)[0] for count in range(5, 14))

    options = {"num_samples": 2, "place": captures.device}
    x = draw(nets[1], engine="graph", callback=callback, **options)
    assert torch.equal(x, draw(nets[1], engine="eager", **options))
    assert len(inner) == 9
    assert captures.alive <= 2 * graphs.LIMIT


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
    with pytest.warns(RuntimeWarning, match="cannot be captured as CUDA graphs") as warned:
        ours, info = draw(net, return_info=True, place=captures.device)
    assert len(warned) == 1
    assert info.engine == "eager"
    reason = f"the network cannot be captured as CUDA graphs ({NOT_WHILE_CAPTURING})"
    assert f"its loop runs eagerly: {reason}" in info.why
    tried = len(captures)
    again, info = draw(net, return_info=True, place=captures.device)  # no second warning, which would be an error
    assert len(captures) == tried
    assert "cannot be captured" in info.why
    eager = draw(net, engine="eager", place=captures.device)
    assert torch.equal(ours, eager)
    assert torch.equal(again, eager)
    with pytest.raises(ConfigError, match="engine='graph' cannot run here: the network cannot be captured"):
        draw(net, engine="graph", place=captures.device)
    with pytest.raises(GraphError, match=r"cannot be captured as CUDA graphs \(.*\): use engine='auto'"):
        draw(Reading(captures.device), engine="graph", place=captures.device)
    assert torch.equal(*both(Net(captures.device), captures))  # the device is in order


def test_plain_callables_are_captured_for_their_run_alone(captures):
    weight = torch.tensor(-0.3, device=captures.device)
    for steps in (120, 12):
        weight = weight - 0.1
        assert torch.equal(*both(lambda x, t, w=weight: x * w, captures, steps=steps))
    assert len(captures) == 4
    assert captures.alive == 0
    for steps, engine in ((graphs.WORTHWHILE - 1, "eager"), (graphs.WORTHWHILE, "graph")):
        _, info = draw(lambda x, t: -x, steps=steps, place=captures.device, return_info=True)
        assert info.engine == engine


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


def test_threads_and_streams_have_loops_of_their_own(captures):
    """(i) One thread within its callback waits for the others: nobody waits for a loop."""
    nets, results, meet = [Net(captures.device), nn_of_products(captures.device)], {}, threading.Barrier(4, timeout=60)

    def work(which, seed):
        def callback(row, t, x):
            if row == 2:
                meet.wait()

        stream = torch.cuda.Stream() if captures.device.type == "cuda" else None
        with torch.cuda.stream(stream):
            options = {"engine": "graph", "seed": seed, "place": captures.device}
            for _ in range(3):
                results[which, seed] = draw(nets[which], callback=callback if seed < 2 else None, **options)

    threads = [threading.Thread(target=work, args=(k % 2, k // 2), daemon=True) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 8
    for (which, seed), x in results.items():
        expected = draw(nets[which], engine="eager", seed=seed, place=captures.device)
        assert torch.equal(x, expected) if which == 0 else torch.allclose(x, expected, rtol=1e-4, atol=1e-4)


def nn_of_products(device):
    """A network with a matrix product, for which libraries keep workspaces."""
    torch.manual_seed(0)

    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(15, 15)

        def forward(self, x, t):
            return self.last(x.flatten(1)).view_as(x) * 0.1

    return Products().to(device)


def test_a_run_that_is_not_finite_is_found(captures):
    net = Net(captures.device)
    both(net, captures)
    with torch.no_grad():
        net.weight.fill_(float("inf"))
    for check, seen in (("final", 13), ("every", 1)):  # the start is one more state
        states = []

        def callback(row, t, x, states=states):
            states.append(row)

        with pytest.raises(NonFiniteError, match="from row 0 "):
            draw(net, engine="graph", check=check, place=captures.device, callback=callback)
        assert len(states) == seen - 1
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


def test_what_a_capture_bakes_in_is_part_of_the_key(captures):
    """Each pair differs in one thing; the same network is asked for one after the other, and both answers are right."""
    net, g = Net(captures.device), torch.Generator().manual_seed(0)

    def fresh(*shape):
        return torch.randn(shape, generator=g).to(captures.device)

    pairs = [
        (lambda: {"cond": fresh(4, 3, 5)}, lambda: {"cond": {"cond": fresh(4, 3, 5)}}),
        (lambda: {"cond": fresh(4, 1, 1)}, lambda: {"cond": fresh(4, 3, 5)}),
        (lambda: {"cond": fresh(4, 3, 5)}, lambda: {"cond": (3 * fresh(4, 3, 5)).round().long()}),
        (lambda: {"cond": {"cond": fresh(4, 3, 5)}}, lambda: {"cond": {"label": fresh(4, 3, 5)}}),
        (lambda: {"cond": fresh(4, 3, 5)}, lambda: {}),
        (
            lambda: {"time_input": "t"},
            lambda: {"time_input": "index", "sde": "ddpm", "prediction": "eps", "steps": 1000},
        ),
        (lambda: {"steps": 1000, "sampler": "ddim"}, lambda: {"steps": 1100, "sampler": "ddim"}),
        (lambda: {"check": "final"}, lambda: {"check": "off"}),
    ]
    for pair in pairs:
        graphs.clear()
        for options in (*pair, *pair):
            given = options()
            ours, theirs = both(net, captures, **given)
            assert torch.equal(ours, theirs), given
    graphs.clear()
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            assert torch.equal(*both(net, captures))
    graphs.clear()
    default, tried = torch.get_default_dtype(), len(captures)
    for dtype in (torch.float64, default, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(*both(net, captures))
        finally:
            torch.set_default_dtype(default)
    assert len(captures) == tried + 4


def test_tables_longer_than_a_loop_has_room_for(captures):
    net = Net(captures.device)
    for steps in (1500, 12, 1500):
        assert torch.equal(*both(net, captures, steps=steps, sde="vp", sampler="ddim"))


def test_weights_loaded_averaged_or_replaced_are_seen(captures):
    """(e)"""
    net, other = Net(captures.device), Net(captures.device)
    with torch.no_grad():
        other.weight.fill_(-0.7)
    both(net, captures)
    net.load_state_dict(other.state_dict())
    assert torch.equal(*both(net, captures))
    assert len(captures) == 2
    net.register_buffer("shift", torch.tensor(0.3, device=captures.device))
    assert torch.equal(*both(net, captures))
    assert len(captures) == 4
    net.register_forward_hook(lambda module, args, out: out * 0.5)
    assert torch.equal(*both(net, captures))
    assert len(captures) == 6


def test_parts_that_are_replaced_are_noticed(captures):
    class Shell(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.Tanh()
            self.loose = torch.tensor(0.5, device=captures.device)  # no parameter, no buffer

        def forward(self, x, t):
            return self.act(x) * self.loose

    net = Shell()
    both(net, captures)
    net.act = nn.ReLU()
    assert torch.equal(*both(net, captures))
    net.loose = torch.tensor(0.1, device=captures.device)
    assert torch.equal(*both(net, captures))


class Moving(Net):
    """Puts another tensor in a buffer's place at each call."""

    def forward(self, x, t):
        self.shift = self.shift.clone()
        return super().forward(x, t)


def test_networks_whose_tensors_cannot_be_followed_run_eagerly(captures):
    lazy = nn.Sequential()
    lazy.add_module("unused", nn.LazyLinear(3))

    class Lazy(Net):
        def __init__(self, device):
            super().__init__(device)
            self.lazy = lazy

    class Sparse(Net):
        def __init__(self, device):
            super().__init__(device)
            self.register_buffer("graph", torch.eye(3, device=device).to_sparse())

    for kind, reason in ((Moving, "rebinds parameters"), (Lazy, "no storage"), (Sparse, "no storage")):
        with pytest.warns(RuntimeWarning, match=f"cannot be captured as CUDA graphs .*{reason}"):
            ours = draw(kind(captures.device), place=captures.device)
        assert torch.equal(ours, draw(kind(captures.device), engine="eager", place=captures.device)), kind


def moved(value):
    return value.clone()


class Kept(Net):
    """Keeps tensors that it makes, from its `first` call on (or in each `every`-th), where nobody but itself finds them."""

    def __init__(self, device, first=1, every=1, where="attribute"):
        super().__init__(device)
        self.calls, self.first, self.every, self.where = 0, first, every, where
        self.inner = {"list": [torch.tensor(0.01, device=device)]}

    def forward(self, x, t):
        self.calls += 1
        if self.calls >= self.first and self.calls % self.every == 0:
            if self.where == "attribute":
                self.shift = moved(self.shift)
            elif self.where == "list":
                self.inner["list"][0] = moved(self.inner["list"][0])
            else:  # the same name for another tensor
                del self.shift
                self.shift = torch.full((), 0.01, device=x.device)
        return super().forward(x, t) + self.inner["list"][0]


class Swapping(Net):
    """Two tensors take turns."""

    def __init__(self, device):
        super().__init__(device)
        self.pair = torch.tensor(0.2, device=device), torch.tensor(0.4, device=device)
        self.now, self.last = self.pair

    def forward(self, x, t):
        self.now, self.last = self.last, self.now
        return super().forward(x, t) * (self.now + self.last)


class Object:
    """A callable that is no module."""

    def __init__(self, device):
        self.state = {"shift": torch.tensor(0.01, device=device)}

    def __call__(self, x, t):
        self.state["shift"] = moved(self.state["shift"])
        return x * -0.3 + self.state["shift"]


def closure(device):
    last = torch.tensor(0.01, device=device)

    def network(x, t):
        nonlocal last
        last = (x * 0 + last)[:1]
        return x * -0.3 + last

    return network


class Holding(Net):
    """Adds a tenth of its last answer, which it keeps in a place of some kind."""

    def __init__(self, device, kind):
        super().__init__(device)
        self.kind, self.place = kind, PLACES[kind](torch.zeros((), device=device))

    def forward(self, x, t):
        out = super().forward(x, t) + 0.1 * self.place.send(None)
        self.place.send(out)
        return out


def in_turns(get, put):
    """What `send(None)` gets from a place and the next `send` puts there."""
    return SimpleNamespace(send=lambda value: get() if value is None else put(value))


class Slotted:
    __slots__ = ("__last",)  # whose name in the class is another

    def __init__(self, last):
        self.__last = last

    def send(self, value):
        if value is None:
            return self.__last
        self.__last = value
        return None


class Shared:
    """A class as a place; each is another one."""

    def __new__(cls, last):
        class Place:
            kept = last

            @classmethod
            def send(cls, value):
                if value is None:
                    return cls.kept
                cls.kept = value
                return None

        return Place


def in_a_deque(last):
    kept = deque(maxlen=1)
    return in_turns(lambda: kept[0] if kept else last, kept.append)


def in_a_set(last):
    kept = set()
    return in_turns(lambda: next(iter(kept), last), lambda value: (kept.clear(), kept.add(value)))


def in_a_long_list(last):
    kept = [last] * 2000
    return in_turns(lambda: kept[-1], functools.partial(kept.__setitem__, -1))


class Parts(nn.ModuleList):
    """A place in the last of many parts."""

    def __init__(self, last):
        super().__init__(nn.Identity() for _ in range(1500))
        self[-1].kept = last

    def send(self, value):
        if value is None:
            return self[-1].kept
        self[-1].kept = value
        return None


def in_a_namespace(last):
    kept = SimpleNamespace(last=last)
    return in_turns(lambda: kept.last, functools.partial(setattr, kept, "last"))


KEPT_GLOBALLY = None


def in_a_global(last):
    def put(value):
        global KEPT_GLOBALLY
        KEPT_GLOBALLY = value

    return in_turns(lambda: last if KEPT_GLOBALLY is None else KEPT_GLOBALLY, put)


PLACES = {
    "slots": Slotted, "a class": Shared, "a deque": in_a_deque, "a set": in_a_set, "a long list": in_a_long_list,
    "one of many parts": Parts, "a namespace": in_a_namespace, "a global": in_a_global,
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_kept_is_found_and_put_back_wherever_it_is(captures, monkeypatch, kind):
    monkeypatch.setitem(globals(), "KEPT_GLOBALLY", None)
    with pytest.warns(RuntimeWarning, match="rebinds"):
        ours = draw(Holding(captures.device, kind), place=captures.device)
    monkeypatch.setitem(globals(), "KEPT_GLOBALLY", None)
    assert torch.equal(ours, draw(Holding(captures.device, kind), engine="eager", place=captures.device))


def test_what_a_generator_keeps_is_found(captures):
    """(which nobody can put back)"""
    last = torch.zeros((), device=captures.device)

    def outputs():
        out = last
        while True:
            x = yield out
            out = x * -0.3 + 0.1 * out

    class Sending(Net):
        def __init__(self, device):
            super().__init__(device)
            self.outputs = outputs()
            next(self.outputs)

        def forward(self, x, t):
            return self.outputs.send(x)

    with pytest.warns(RuntimeWarning, match="rebinds"):
        draw(Sending(captures.device), place=captures.device)


KEEPING = {
    "from the first call on": Kept,
    "from the third": functools.partial(Kept, first=3),
    "from the fourth": functools.partial(Kept, first=4),
    "in each second": functools.partial(Kept, every=2),
    "in a list": functools.partial(Kept, where="list"),
    "in the place of what it deleted": functools.partial(Kept, where="name"),
    "in turns": Swapping,
    "an object": Object,
    "a closure": closure,
}


@pytest.mark.parametrize("kind", KEEPING)
def test_a_network_that_keeps_what_it_makes_runs_eagerly(captures, kind):
    """Its warm-up says so, before a capture would leave it with tensors that nobody computed."""
    make = KEEPING[kind]
    with pytest.warns(RuntimeWarning, match="cannot be captured .*rebinds parameters, buffers or other"):
        ours, info = draw(make(captures.device), steps=120, place=captures.device, return_info=True)
    assert info.engine == "eager"
    assert torch.equal(ours, draw(make(captures.device), steps=120, engine="eager", place=captures.device))
    assert captures.alive == 0


class Remembering(Net):
    """Adds a part of its last answer, which it keeps in a tuple in a list."""

    def __init__(self, device):
        super().__init__(device)
        self.last = [(None, "none yet")]

    def forward(self, x, t):
        out = super().forward(x, t)
        if self.last[0][0] is not None:
            out = out + 0.1 * self.last[0][0]
        self.last[0] = out, "the last"
        return out


def test_the_warm_up_of_a_network_that_remembers_is_forgotten(captures):
    with pytest.warns(RuntimeWarning, match="rebinds"):
        ours = draw(Remembering(captures.device), place=captures.device)
    assert torch.equal(ours, draw(Remembering(captures.device), engine="eager", place=captures.device))


@pytest.mark.parametrize("where", ["a closure", "a list", "a dict"])
def test_what_a_capture_leaves_in_other_places_is_put_back(captures, where):
    """As it fails in the midst."""
    shift = torch.tensor(0.01, device=captures.device)
    held = {"a list": [shift], "a dict": {0: shift}}.get(where)

    def network(x, t):
        nonlocal shift
        if torch.cuda.is_current_stream_capturing():
            if held is None:
                shift = moved(shift)
            else:
                held[0] = moved(held[0])
            float(x[0, 0, 0])
        return x * -0.3 + (shift if held is None else held[0])

    with pytest.warns(RuntimeWarning, match="operation not permitted"):
        ours = draw(network, steps=120, place=captures.device)
    assert torch.equal(ours, draw(lambda x, t: x * -0.3 + 0.01, steps=120, engine="eager", place=captures.device))


@pytest.mark.parametrize("then", ["is refused", "fails"])
def test_a_network_that_keeps_what_its_capture_makes_gets_its_tensors_back(captures, then):
    class Late(Net):
        def forward(self, x, t):
            if torch.cuda.is_current_stream_capturing():
                self.weight = nn.Parameter(moved(self.weight))
                self.shift, self.new = moved(self.shift), moved(self.shift)
                vars(self).pop("old", None)
                assert then != "fails"
            return super().forward(x, t)

    net = Late(captures.device)
    net.old = torch.ones(2, device=captures.device)
    before = net.weight, net.shift, net.old
    with pytest.warns(RuntimeWarning, match="rebinds parameters" if then == "is refused" else "assert"):
        ours = draw(net, place=captures.device)
    assert all(a is b for a, b in zip((net.weight, net.shift, net.old), before, strict=True))
    assert not hasattr(net, "new")
    assert torch.equal(ours, draw(Net(captures.device), engine="eager", place=captures.device))


def test_what_the_first_call_makes_may_stay(captures):
    """Caches, which later calls use."""

    class Caching(Net):
        table, by_shape = None, None

        def forward(self, x, t):
            if self.table is None:
                self.table = torch.linspace(0, 1, 5, device=x.device)
                self.by_shape = {x.shape: self.table * 0.5}
            return super().forward(x, t) + self.table * self.by_shape[x.shape]

    net = Caching(captures.device)
    for _ in range(2):
        assert torch.equal(*both(net, captures))
        assert len(captures) == 2  # and so may the graphs
    net.table = torch.ones(5, device=captures.device)
    assert torch.equal(*both(net, captures))
    assert len(captures) == 4


def test_a_network_that_samples_in_its_forward_runs_eagerly(captures):
    """And waits for nobody: its warm-up captures graphs of the inner run, while it holds the stream of the captures."""
    inner = Net(captures.device)

    class Outer(Net):
        def forward(self, x, t):
            return super().forward(x, t) + draw(inner, steps=2, num_samples=1, seed=1, place=captures.device)

    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        ours = draw(Outer(captures.device), place=captures.device)
    assert torch.equal(ours, draw(Outer(captures.device), engine="eager", place=captures.device))


# --- the faster engine -----------------------------------------------------------------------------------------------

TIMED = [("vp", "euler_maruyama", 20), ("ve", "heun", 9), ("vp", "dpmpp_2m", 14), ("ve", "pc", 40), ("vp", "lms", 24)]


@pytest.mark.parametrize(("sde", "sampler", "steps"), TIMED, ids=str)
@pytest.mark.parametrize("faster", ["eager", "graph"])
def test_the_faster_engine_is_kept(captures, sde, sampler, steps, faster):
    """A run begins eagerly, goes on with replays and ends as is faster: the samples are the same to the bit."""
    net, options = Net(captures.device), {"sde": sde, "sampler": sampler, "steps": steps, "place": captures.device}
    captures.clock.replay = 0.003 if faster == "eager" else 0.001
    expected = draw(net, engine="eager", trajectory=steps, **options)
    for seed in (0, 0, 1):
        *ours, info = draw(net, trajectory=steps, seed=seed, return_info=True, **options)
        if seed == 0:
            assert all(map(torch.equal, ours, expected))
        took = "3 ms" if faster == "eager" else "1 ms"
        how = "its loop runs eagerly: a row" if faster == "eager" else "its loop replays CUDA graphs (a row"
        assert f"{how} takes {took} as CUDA graphs and 2 ms without" in info.why
        assert info.engine == faster
        assert captures.clock.read == 1  # later runs know
    tried = len(captures)
    assert captures.alive == (0 if faster == "eager" else tried)
    ours = draw(net, engine="graph", trajectory=steps, **options)  # by name it is as said
    assert all(map(torch.equal, ours, expected))
    assert len(captures) == (2 * tried if faster == "eager" else tried)
    graphs.clear()
    draw(net, **options)
    assert captures.clock.read == 2


def test_what_is_timed_is_a_network_for_a_shape(captures):
    nets = [Net(captures.device) for _ in range(2)]
    for net in nets:
        for count in (2, 3, 2):
            draw(net, num_samples=count, place=captures.device)
    assert captures.clock.read == 4
    draw(nets[0], num_samples=2, steps=2 * graphs.TIMED - 1, sampler="ddim", sde="ve", place=captures.device)
    assert captures.clock.read == 4
    draw(nets[0], num_samples=7, steps=2 * graphs.TIMED - 1, place=captures.device)  # too short
    draw(nets[0], num_samples=8, engine="graph", place=captures.device)  # by name
    assert captures.clock.read == 4
    *_, info = draw(nets[0], num_samples=8, place=captures.device, return_info=True)
    assert captures.clock.read == 5
    assert "a row takes 1 ms" in info.why


def test_batches_and_broken_runs_are_timed_once(captures):
    net, options = Net(captures.device), {"num_samples": 9, "batch_size": 2, "place": captures.device}
    captures.clock.replay = 0.003

    def interrupt(row, t, x):
        if row == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(net, callback=interrupt, **options)
    assert captures.clock.read == 0
    ours, info = draw(net, return_info=True, **options)
    assert captures.clock.read == 2  # four batches of 2 samples and one of 1
    assert info.engine == "eager"
    assert torch.equal(ours, draw(net, engine="eager", **options))


def test_a_run_that_ends_eagerly_finds_what_is_not_finite(captures):
    net = Net(captures.device)
    captures.clock.replay = 0.003
    with torch.no_grad():
        net.weight.fill_(float("inf"))
    for _ in range(2):
        for check in ("every", "final"):
            with pytest.raises(NonFiniteError, match="from row 0 "):
                draw(net, check=check, place=captures.device)


def test_a_caller_who_takes_his_time_is_not_timed(captures):
    """(what a callback does between two rows)"""
    net = Net(captures.device)

    def callback(row, t, x):
        captures.clock.now += 1.0

    *_, info = draw(net, callback=callback, place=captures.device, return_info=True)
    assert "a row takes 1 ms as CUDA graphs and 2 ms without" in info.why


# --- networks with graphs of their own -------------------------------------------------------------------------------


OWN_GRAPHS = {"mode": "reduce-overhead"}  # nothing is compiled before the first call


def compiled_in_place(net):
    net.compile(**OWN_GRAPHS)
    return net


def compiled_part(net):
    net.part = nn.Sequential(nn.Tanh(), torch.compile(nn.Tanh(), **OWN_GRAPHS))
    return net


def compiled_function(net):
    net.helper = torch.compile(lambda x: x + 1, **OWN_GRAPHS)
    return net


def compiled_forward(net):
    net.forward = torch.compile(net.forward, **OWN_GRAPHS)
    return net


def helper(x):
    return doubled(x)


def doubled(x):
    return 2 * x


class Calling(Net):
    def forward(self, x, t):
        return super().forward(helper(x), t)


class Holder:
    def __init__(self, net):
        self.net = net

    def __call__(self, x, t):
        return self.net(x, t)

    def call(self, x, t):
        return self.net(x, t)


OWN = {
    "a module": lambda net: torch.compile(net, **OWN_GRAPHS),
    "a module, in place": compiled_in_place,
    "a part": compiled_part,
    "a function that it holds": compiled_function,
    "a function that a function that it names names": lambda net: Calling(net.weight.device),
    "its forward": compiled_forward,
    "in a default": lambda net: (lambda compiled: lambda x, t, inner=compiled: inner(x, t))(compiled_in_place(net)),
    "in a closure": lambda net: (lambda inner: lambda x, t: inner(x, t))(compiled_in_place(net)),
    "in a partial": lambda net: functools.partial(lambda inner, x, t: inner(x, t), compiled_in_place(net)),
    "by a method": lambda net: Holder(compiled_in_place(net)).call,
    "by an object": lambda net: Holder(compiled_in_place(net)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it imports its compiler
@pytest.mark.parametrize("kind", OWN)
def test_networks_with_cuda_graphs_of_their_own_are_not_captured(captures, monkeypatch, kind):
    if "names" in kind:
        monkeypatch.setitem(globals(), "doubled", torch.compile(doubled, **OWN_GRAPHS))
    net = OWN[kind](Net(captures.device))
    with pytest.raises(ConfigError, match=r"engine='graph' cannot run here: torch.compile gave .*mode='default'.*use"):
        draw(net, engine="graph", place=captures.device)
    part = {"a part": "its part 'part.1'", "a function that it holds": "its part 'helper'"}.get(kind, "")
    for _ in range(2):
        assert f"torch.compile gave {part}" in graphs.obstacle(net, captures.device, 120, None, "auto")
    assert not captures


def test_other_compiled_networks_are_captured(captures):
    net = torch.compile(Net(captures.device), backend="eager")
    assert torch.equal(*both(net, captures))
    assert len(captures) == 2


def test_any_failure_in_a_capture_ends_in_an_eager_run(captures):
    """(a) Not all that goes wrong there is an error of CUDA's."""

    def network(x, t):
        assert not torch.cuda.is_current_stream_capturing(), "not while capturing"
        return x * -0.3

    with pytest.warns(RuntimeWarning, match="not while capturing"):
        x = draw(network, steps=120, place=captures.device)
    assert torch.equal(x, draw(lambda x, t: x * -0.3, steps=120, engine="eager", place=captures.device))
    _, info = draw(network, steps=120, place=captures.device, return_info=True)  # functions are remembered too
    assert info.engine == "eager"


@pytest.mark.parametrize(
    ("kind", "says"), [(torch.OutOfMemoryError, "CUDA out of memory"), (RuntimeError, "CUDA error: out of memory")]
)
def test_memory_that_runs_out_in_a_capture_is_not_held_against_the_network(captures, monkeypatch, kind, says):
    """(j) It is the allocator's that runs out, or that of the driver, which instantiates the graph."""
    net, capture = Net(captures.device), graphs.capture

    def lacking(*args):
        try:
            raise kind(says)
        except kind as error:
            raise GraphError(str(error)) from error

    monkeypatch.setattr(graphs, "capture", lacking)
    with pytest.warns(RuntimeWarning, match=says):
        draw(net, place=captures.device)
    monkeypatch.setattr(graphs, "capture", capture)
    assert torch.equal(*both(net, captures))

    others = list(captures)

    def lacking_until_others_go(*args):  # in the warm-up
        if any(graph() is not None for graph in others):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return capture(*args)

    monkeypatch.setattr(graphs, "capture", lacking_until_others_go)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert captures.alive
    assert torch.equal(*both(net, captures, num_samples=3))


def test_a_condition_that_the_network_changes_starts_afresh(captures):
    class Counting(Net):
        def forward(self, x, t, cond):
            return super().forward(x, t) + cond.add_(0.01)

    cond = torch.zeros(4, 3, 5, device=captures.device)
    net = Counting(captures.device)
    for _ in range(2):
        ours = draw(net, engine="graph", cond=cond.clone(), place=captures.device)
        assert torch.equal(ours, draw(net, engine="eager", cond=cond.clone(), place=captures.device))


def test_learned_variances_and_answers_that_are_the_input(captures):
    class Double(Net):
        def forward(self, x, t):
            return torch.cat([super().forward(x, t), 0.5 * x.tanh()], 1)

    options = {"sde": "ddpm", "steps": 1000, "prediction": "eps", "num_samples": 2}
    sampler = fastdiff.samplers.Ancestral(variance="learned_range")
    net = Double(captures.device)
    ours, theirs = both(net, captures, sampler=sampler, check="off", **options)
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())

    class Same(nn.Module):
        def forward(self, x, t):
            return x

    assert torch.equal(*both(Same(), captures, prediction="x0", sampler="ddim"))


def test_autocast_within_the_network_is_not_cached(captures):
    """(j) Its cast of a weight belongs to the graph, or a replay would read that of the weight before."""
    kind = captures.device.type

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(5, 5, device=captures.device)

        def forward(self, x, t):
            with torch.autocast(kind, dtype=torch.bfloat16):
                return self.net(x)

    net = Inner()
    for outer in (None, False, True):
        context = torch.autocast(kind, dtype=torch.bfloat16, enabled=bool(outer)) if outer is not None else None
        for _ in range(2):
            if context is None:
                assert torch.equal(*both(net, captures))
            else:
                with torch.autocast(kind, dtype=torch.bfloat16, enabled=bool(outer)):
                    assert torch.equal(*both(net, captures))
            with torch.no_grad():
                net.net.weight.mul_(0.5)


def test_sample_is_left_out_of_a_compiled_function(captures):
    """(j)"""
    net = Net(captures.device)
    counted = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counted)
    def use(scale):
        return draw(net, engine="graph", place=captures.device) * scale

    assert torch.equal(
        use(torch.tensor(2.0, device=captures.device)), 2 * draw(net, engine="eager", place=captures.device)
    )
    assert counted.frame_count <= 6


@pytest.mark.gpu
def test_the_device_is_in_order_after_a_capture_that_failed(captures):
    """(b)"""
    if captures.device.type != "cuda":
        pytest.skip("needs a device")
    before, memory = torch.cuda.current_stream(), torch.cuda.memory_reserved()
    for kind in (Reading, Moving):
        with pytest.warns(RuntimeWarning, match="cannot be captured"):
            draw(kind(captures.device), place=captures.device)
        assert torch.cuda.current_stream() == before
        assert not torch.cuda.is_current_stream_capturing()
        assert torch.rand(3, device="cuda").isfinite().all()
    graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= memory + 2**25


@pytest.mark.gpu
def test_a_capture_that_failed_gives_its_activations_back(captures):
    if captures.device.type != "cuda":
        pytest.skip("needs a device")

    class Large(Net):
        def forward(self, x, t):
            hidden = x.sum() + x.new_zeros(25, 10**6)  # 100 MB
            return super().forward(x, t) * (1.0 if float(hidden[0, 0]) > 0 else 0.5)

    net = Large(captures.device)
    draw(net, engine="eager", place=captures.device)
    gc.collect()
    torch.cuda.empty_cache()
    memory = torch.cuda.memory_reserved()
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        draw(net, place=captures.device)
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= memory + 2**25


@pytest.mark.gpu
def test_the_stopwatch_reads_the_devices_time(captures):
    if captures.device.type != "cuda":
        pytest.skip("needs a device")
    watch, x = cuda_graph.Stopwatch(torch.device("cuda", 0)), torch.randn(2**24, device="cuda")
    x = x * 0.99  # whose kernel is loaded at its first use
    for times in (1, 100):
        watch.mark()
        for _ in range(times):
            x = x * 0.99
        watch.mark()
    few, many = watch.seconds()
    assert 0 < few < many < 10


@pytest.mark.gpu
def test_memory_goes_with_the_network(captures):
    """(f)"""
    if captures.device.type != "cuda":
        pytest.skip("needs a device")
    draw(nn_of_products(captures.device), engine="graph", place=captures.device)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        draw(nn_of_products(captures.device), engine="graph", num_samples=64, place=captures.device)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.gpu
def test_graphs_that_go_leave_the_others_whole(captures):
    """(g) Libraries keep workspaces for a stream: those of a graph must be its own."""
    if captures.device.type != "cuda":
        pytest.skip("needs a device")
    net, weight = nn_of_products(captures.device), torch.randn(5, 5, device="cuda")
    x = draw(net, engine="graph", place=captures.device)
    for _ in range(3):
        draw(lambda x, t: x @ weight * 0.1, steps=120, place=captures.device)
        gc.collect()
        torch.cuda.empty_cache()
        torch.full((2**24,), float("nan"), device="cuda")
        assert torch.equal(x, draw(net, engine="graph", place=captures.device))


@pytest.mark.gpu
def test_the_callers_own_capture_is_refused(captures):
    """(j)"""
    if captures.device.type != "cuda":
        pytest.skip("needs a capture of the device's")
    net, graph = Net(captures.device), torch.cuda.CUDAGraph()
    draw(net, place=captures.device)
    with torch.cuda.graph(graph):
        kept = net.weight + 1  # a capture of nothing is an error of its own
        with pytest.raises(ConfigError, match="while the current stream is capturing"):
            draw(net, place=captures.device)
    del kept
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


# --- guidance ------------------------------------------------------------------------------------------------------------


class Labelled(Net):
    """Net of a label beside x."""

    def forward(self, x, t, y):
        return super().forward(x, t) + 0.3 * y.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def labelled(device, net=None):
    net = Labelled(device) if net is None else net
    return fastdiff.ScoreModel(net, "vp", "score", "t", (3, 5), num_classes=3, cond_dropout=0.1)


@pytest.mark.parametrize(("sampler", "count"), [("euler_maruyama", 3), ("heun", 6), ("pc", 3)])
def test_guided_rows_are_captured_with_both_outputs(captures, sampler, count):
    """Each with the weight that the table holds then, and those beyond the interval with one output."""
    device = captures.device
    model, weaker = labelled(device), labelled(device)
    cond = torch.arange(4, device=device) % 3
    auto, steps = guidance.Auto(weaker, 2.0, interval=(0.3, 50.0)), {"steps": 12, "num_samples": 4, "sampler": sampler}
    for given in (guidance.ClassifierFree(3.0, interval=(0.3, 50.0)), auto):
        captures.clear()
        for seed, labels in ((0, cond), (1, cond.flip(0))):
            options = {**steps, "cond": labels, "seed": seed}
            runs = [fastdiff.sample(model, engine=engine, guidance=given, **options) for engine in ("graph", "eager")]
            assert torch.equal(*runs)
            assert not torch.equal(runs[0], fastdiff.sample(model, engine="eager", **options))
        kinds = len(captures)
        assert kinds >= count
        other = type(given)(*([weaker] if given is auto else []), 1.5, interval=(0.3, 50.0))
        runs = [
            fastdiff.sample(model, engine=engine, guidance=other, cond=cond, **steps) for engine in ("graph", "eager")
        ]
        assert torch.equal(*runs)
        # classifier-free guidance is the model's own network, whose graphs any later run finds
        assert (len(captures) == kinds) == (given is not auto)
        with torch.no_grad():
            weaker.net.weight.fill_(-0.2)
            model.net.shift.fill_(0.3)
        options = {**steps, "cond": cond, "guidance": given}
        assert torch.equal(*(fastdiff.sample(model, engine=engine, **options) for engine in ("graph", "eager")))


def test_graphs_of_guided_rows_are_not_those_of_a_condition_of_the_same_names(captures):
    class Two(Net):
        def forward(self, x, t, cond=None, null=None):
            return super().forward(x, t, cond) + (0 if null is None else 0.7 * null)

    net = Two(captures.device)
    cond = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).to(captures.device)
    given = guidance.ClassifierFree(2.0, interval=(0.3, 50.0), null=torch.ones(3, 5, device=captures.device))
    for options in ({"cond": {"cond": cond, "null": cond + 1}}, {"cond": cond, "guidance": given}):
        assert torch.equal(*both(net, captures, **options))
