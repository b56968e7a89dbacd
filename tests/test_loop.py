"""The runner on tables written by hand, against a loop in float64 that knows nothing of it; what its loop may do."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from step_cases import dispatched
from test_sample import every_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdiff
from fastdiff.execution import cpu, noise, ops, reference
from fastdiff.execution import loop as runner
from fastdiff.table import Level, Measure, Row, StepTable

SEED = 2**63 + 12345


def table(rows):
    """Rows with a multistep history, a base state that lies several rows back, rows without a call, scaled inputs."""
    lines = []
    for k in range(rows):
        calls = k % 5 != 3
        reach = min(k, 2)
        lines.append(
            Row(
                Level(1 - k / rows, 1.0, 1.0), "made up", a=0.6, e=0.2 if k % 3 else 0.0, c=0.1 * (k % 3),
                network_time=k % 10, b=((0.1,) if calls else ()) + (0.05, -0.03)[:reach],
                calls_network=calls, keeps_prediction=calls, saves_base=k % 4 == 0,
                in_scale=1.0 if k % 2 else 0.5, p=0.25 if k % 7 == 2 else 0.0, q=1.0,
            )
        )  # fmt: skip
    return StepTable("by hand", tuple(lines), Level(0.0, 1.0, 0.0), 1.0)


def by_hand(rows, x, first_sample):
    """The same, with lists and no buffers."""
    base, history, states, inputs = x, [], [], []
    for k, line in enumerate(rows.rows):
        base = x if line.saves_base else base
        used = list(history)
        if line.calls_network:
            inputs.append(line.in_scale * x)
            h = line.p * x + line.q * (inputs[-1] * 0.5 + (k % 10) * 0.01)
            used.insert(0, h)
        z = noise.normal(
            len(x), x.shape[1:], seed=SEED, draw=k, first_sample=first_sample, stream=noise.SAMPLER
        ).double()
        x = line.a * x + line.e * base + sum(b * v for b, v in zip(line.b, used)) + line.c * z
        history = used if line.keeps_prediction else history
        states.append(x)
    return states, inputs


def loop_on(rows, operations, x, features=None):
    return runner.Loop(
        rows, operations, torch.empty_like(x), torch.empty_like(x), torch.empty(len(x), dtype=x.dtype), features,
        seed=SEED, check="final",
    )  # fmt: skip


@pytest.mark.parametrize("operations", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("ahead", [False, True])
def test_runs_are_the_loop_by_hand(operations, ahead):
    rows = table(1100)  # more than the rows whose views are made at a time
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, inputs = by_hand(rows, x, 7)
    seen = []

    def network(given, time, features, cond):
        assert cond == "condition"
        assert (features is not None) == ahead
        seen.append(given.clone())
        return given * 0.5 + (features if ahead else time[:, None]) * 0.01, None

    features = torch.tensor([[line.network_time] for line in rows.rows], dtype=torch.float64) if ahead else None
    loop = loop_on(rows, operations, x, features)
    for _ in range(2):  # the buffers serve another run
        seen.clear()
        for k, (ours, theirs) in enumerate(zip(loop.run(network, "condition", 7, x), [x, *expected], strict=True)):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), k
        assert len(seen) == len(inputs) == rows.calls
        for ours, theirs in zip(seen, inputs):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("operations", [cpu, reference], ids=["cpu", "reference"])
def test_a_network_may_return_its_input_or_a_view_of_it(operations):
    # large enough for the next input to be written while other parts of this one are still to be read
    rows, x = table(12), torch.randn(3, 64, 64)
    results = []
    for answer in (lambda v: v, lambda v: v.transpose(1, 2), lambda v: v[:1].expand(v.shape)):
        for copies in (False, True):
            loop = loop_on(rows, operations, x)

            def network(given, *_, answer=answer, copies=copies):
                return answer(given.clone() if copies else given), None

            results.append([state.clone() for state in loop.run(network, None, 0, x)])
        for ours, theirs in zip(*results[-2:]):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("operations", [cpu, reference], ids=["cpu", "reference"])
def test_what_a_network_does_to_its_input_tensor_is_gone_with_the_call(operations):
    rows, x = table(12), torch.randn(3, 4, 6)

    def plain(given, *_):
        return given * -0.5, None

    def replacing(given, *_):
        given.data = given.data * 2
        return given * -0.25, None

    def differentiating(given, *_):
        with torch.enable_grad():
            given.requires_grad_(True)
            (-0.25 * given.square()).sum().backward()
        return given.grad, None

    def reshaping(given, *_):
        return given.unsqueeze_(1).squeeze_(1) * -0.5, None

    results = []
    for network in (plain, replacing, differentiating, reshaping):
        with torch.no_grad():
            results.append([state.clone() for state in loop_on(rows, operations, x).run(network, None, 0)])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("operations", [cpu, reference], ids=["cpu", "reference"])
def test_buffers_go_with_the_loop(operations):
    rows, x = table(12), torch.randn(3, 4, 6)
    gc.disable()
    try:
        loop = loop_on(rows, operations, x)
        for _ in loop.run(lambda given, *_: (given * -0.5, None), None, 0, x):
            pass
        gone = weakref.ref(loop)
        del loop
        assert gone() is None
    finally:
        gc.enable()


def test_a_base_may_be_read_first_several_rows_later():
    lines = [
        Row(Level(1 - k / 12, 1.0, 1.0), "late", a=0.6, e=0.2 if k % 5 == 4 else 0.0, b=(0.1,),
            calls_network=True, network_time=0.0, keeps_prediction=True, saves_base=k % 5 == 0, q=1.0)
        for k in range(12)
    ]  # fmt: skip
    rows, x = StepTable("late", tuple(lines), Level(0.0, 1.0, 0.0), 1.0), torch.randn(3, 4, dtype=torch.float64)
    states, base, y = [], x, x
    for line in lines:
        base = y if line.saves_base else base
        y = line.a * y + line.e * base + 0.1 * (y * 0.5)
        states.append(y)
    loop = loop_on(rows, cpu, x)
    for ours, theirs in zip(loop.run(lambda given, *_: (given * 0.5, None), None, 0, x), [x, *states], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("operations", [cpu, reference], ids=["cpu", "reference"])
def test_a_row_is_given_the_predictions_it_reads(operations):
    """Four are remembered, which only a row without a prediction of its own can take."""
    lines = [
        Row(
            Level(1.0, 1.0, 1.0),
            "calls",
            a=0.5,
            b=(0.3, *(0.1,) * min(k, 1)),
            calls_network=True,
            keeps_prediction=True,
            network_time=1.0,
        )
        for k in range(5)
    ]
    lines.insert(4, Row(Level(1.0, 1.0, 1.0), "does not", a=0.7, b=(0.4, 0.3, -0.2, 0.1)))
    rows, x = StepTable("by hand", tuple(lines), Level(0.0, 1.0, 0.0), 1.0), torch.randn(2, 5, dtype=torch.float64)
    assert [len(plan.history) for plan in runner.plans(rows, False)] == [0, 1, 1, 1, 4, 1]
    y, history = x, []
    for line in lines:
        h = [0.5 * y] if line.calls_network else []
        y, history = line.a * y + sum(b * v for b, v in zip(line.b, h + history)), h + history
    *_, ours = loop_on(rows, operations, x).run(lambda given, *_: (given * 0.5, None), None, 0, x)
    assert torch.allclose(ours, y, rtol=1e-12)


def test_buffers_are_few_and_never_hold_two_things():
    """Each kind of row writes what nobody still needs: followed through by names of contents instead of numbers."""
    measured = [
        Row(
            Level(1, 1, 1),
            "measured",
            1.0,
            b=(0.0,),
            calls_network=True,
            network_time=1.0,
            measure=Measure("sample", 0.1, 1.0),
        ),
        Row(Level(1, 1, 1), "plain", 1.0, b=(0.1,), c=0.1, calls_network=True, network_time=1.0),
    ]
    tables = [table(60), StepTable("measured", tuple(measured * 5), Level(0, 1, 0), 1.0)]
    tables += [fastdiff.plan(sde, steps, sampler=sampler) for sde, sampler, steps in every_run()]
    for rows in tables:
        holds, x, base, history = {0: "start"}, "start", None, []
        for k, (line, plan) in enumerate(zip(rows.rows, runner.plans(rows, True), strict=True)):
            base = x if line.saves_base else base
            assert holds[plan.x] == x
            assert [holds[n] for n in plan.history] == history[: len(line.b) - line.calls_network]
            if line.e != 0:
                assert holds[plan.base] == base
            written = [n for n in (plan.out, plan.pushed, plan.noise) if n is not None]
            assert len(set(written)) == len(written)
            read = {*plan.history, *([plan.base] if plan.base is not None else [])}
            assert not read & set(written)
            assert plan.x not in (plan.pushed, plan.noise)
            assert (plan.noise is not None) == (line.measure is not None)
            holds[plan.out] = x = f"x{k}"
            if plan.pushed is not None:
                holds[plan.pushed] = f"h{k}"
                history = [f"h{k}", *history][: rows.memory]
        assert len(holds) <= 3 + rows.memory
    assert len(set(runner.plans(fastdiff.plan("ve", 100), True))) <= 3


# --- capture safety --------------------------------------------------------------------------------------------------


def score(x, t):
    return x * -1e-3


class Unsafe(AssertionError):
    pass


class Watch(TorchDispatchMode):
    """Refuses, within the loop and outside the network, all that a captured graph could not repeat.

    Allowed are fastdiff's own operations on buffers that a row of the same kind used before, filling the time's buffer,
    and views.
    """

    def __init__(self):
        super().__init__()
        self.buffers, self.kind, self.operations = {}, None, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        out = func(*args, **kwargs)
        if func.namespace == "fastdiff":
            self.operations += 1
            named = {a.name: v for a, v in zip(func._schema.arguments, args)} | kwargs
            held = {k: v for k, v in named.items() if k not in ("cursor", "m", "v", "z")}
            addresses = [v.data_ptr() for v in tree_leaves(held) if isinstance(v, torch.Tensor)]
            if self.buffers.setdefault((self.kind, func._schema.name), addresses) != addresses:
                raise Unsafe(f"{func} works on other buffers than before")
        elif func is not torch.ops.aten.fill_.Scalar:
            for value in tree_leaves(out):
                if not isinstance(value, torch.Tensor):
                    raise Unsafe(f"{func} reads a number")
                if not any(torch._C._is_alias_of(value, v) for v in given):
                    raise Unsafe(f"{func} makes a tensor")
                if func._schema.is_mutable:
                    raise Unsafe(f"{func} is not one of fastdiff's")
        return out


@pytest.fixture
def watched(monkeypatch):
    """sample() with a watch over all rows but the first: [Watch of each run]."""
    run, plain_row, watches = runner.Loop.run, runner.Loop.row, []

    def quiet(network):
        def call(*args):
            with torch.utils._python_dispatch._disable_current_modes():
                return network(*args)

        return call

    def row_of_kind(self, kind, *rest):
        watches[-1].kind = kind
        plain_row(self, kind, *rest)

    def watching(self, network, *rest):
        watches.append(Watch())
        states = run(self, quiet(network), *rest)
        yield next(states)  # the start
        yield next(states)
        for _ in range(len(self.table) - 1):
            with watches[-1]:
                state = next(states)
            yield state
        yield from states

    monkeypatch.setattr(runner.Loop, "run", watching)
    monkeypatch.setattr(runner.Loop, "row", row_of_kind)

    def use(operations):
        monkeypatch.setattr(ops, "backend_module", lambda name: operations)
        return watches

    return use


@pytest.mark.parametrize(("sde", "sampler", "steps"), list(every_run()), ids=str)
def test_no_solver_reads_allocates_or_copies_within_its_loop(watched, sde, sampler, steps):
    watches = watched(dispatched())
    options = {"sde": sde, "steps": steps, "sampler": sampler, "shape": (3, 5), "num_samples": 4}
    x, info = fastdiff.sample(score, return_info=True, **options)
    (watch,) = watches
    rows = info.table.rows[1:]
    assert watch.operations == len(rows) + sum(line.measure is not None for line in rows)
    assert torch.equal(x, fastdiff.sample(score, **options))


def planted(name):
    def step(out, table, cursor, stream, x, *rest, **others):
        if name == "a number read":
            float(x.flatten()[0])
        elif name == "a tensor made from the host":
            x.add_(torch.tensor(0.0))
        elif name == "an allocation":
            torch.empty_like(x)
        elif name == "an operation of another kind":
            x.mul_(1.0)
        elif name == "another buffer":
            x = x.clone()
        torch.ops.fastdiff.step(out, table, cursor, stream, x, *rest, **others)

    return step


@pytest.mark.parametrize(
    "defect",
    ["a number read", "a tensor made from the host", "an allocation", "an operation of another kind", "another buffer"],
)
def test_the_watch_sees_what_is_planted(watched, defect):
    watched(dispatched(step=planted(defect)))
    with pytest.raises(Unsafe):
        fastdiff.sample(score, "vp", 6, shape=(3,), num_samples=2)


def test_noise_that_is_not_used_is_not_drawn(watched):
    drawn = []

    def step(out, table, cursor, stream, *rest, **others):
        drawn.append(stream)
        torch.ops.fastdiff.step(out, table, cursor, stream, *rest, **others)

    watched(dispatched(step=step))
    for sampler in ("ddim", "ode", "heun"):
        fastdiff.sample(score, "vp", 6, shape=(3,), num_samples=2, sampler=sampler)
    assert set(drawn) == {None}
