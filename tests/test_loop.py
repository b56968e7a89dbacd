"""The runner on tables written by hand, against a loop in float64 that knows nothing of it; what its loop may do."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from runs import LEARNED, one_of_each_kind
from step_cases import dispatched
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes
from watching import Unsafe, Watch

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


@functools.cache
def by_hand(length, first_sample):
    """(table of this length, its start, states and network inputs), with lists and no buffers."""
    rows = table(length)
    x = start = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
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
    return rows, start, states, inputs


def loop_on(rows, operations, x, features=None):
    return runner.Loop(
        rows, operations, torch.empty_like(x), torch.empty_like(x), torch.empty(len(x), dtype=x.dtype), features,
        seed=SEED, check="final",
    )  # fmt: skip


@pytest.mark.parametrize("operations", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("ahead", [False, True])
def test_runs_are_the_loop_by_hand(operations, ahead):
    rows, x, expected, inputs = by_hand(1100, 7)  # more than the rows whose views are made at a time
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
def test_the_memory_of_a_networks_output_is_free_before_the_next_call(operations):
    rows, x, outputs = table(12), torch.randn(3, 4, 6), []

    def network(given, *_):
        assert all(storage.expired() for storage in outputs)
        output = given * -0.5
        outputs.append(StorageWeakRef(output.untyped_storage()))
        return output, None

    for _ in loop_on(rows, operations, x).run(network, None, 0, x):
        pass
    assert len(outputs) == rows.calls


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


def test_a_row_is_given_the_predictions_it_reads():
    """Four are remembered, which only a row without a prediction of its own can take."""
    lines = [
        Row(
            Level(1.0, 1.0, 1.0), "calls", a=0.5, b=(0.3, *(0.1,) * min(k, 1)), calls_network=True, keeps_prediction=True,
            network_time=1.0,
        )
        for k in range(5)
    ]  # fmt: skip
    lines.insert(4, Row(Level(1.0, 1.0, 1.0), "does not", a=0.7, b=(0.4, 0.3, -0.2, 0.1)))
    rows, x = StepTable("by hand", tuple(lines), Level(0.0, 1.0, 0.0), 1.0), torch.randn(2, 5, dtype=torch.float64)
    passed = []

    def step(*operands, history, **others):
        passed.append(len(history or ()))
        torch.ops.fastdiff.step(*operands, history=history, **others)

    y, history = x, []
    for line in lines:
        h = [0.5 * y] if line.calls_network else []
        y, history = line.a * y + sum(b * v for b, v in zip(line.b, h + history)), h + history
    for operations in (cpu, reference, dispatched(step=step)):
        *_, ours = loop_on(rows, operations, x).run(lambda given, *_: (given * 0.5, None), None, 0, x)
        assert torch.allclose(ours, y, rtol=1e-12)
    assert passed == [len(line.b) - line.calls_network for line in lines] == [0, 1, 1, 1, 4, 1]


def on_new_tensors(rows, x, network):
    """The same operations with a new tensor for all that is written, in lists: no buffer can hold two things."""
    matrix, base, history = torch.from_numpy(rows.numbers).to(x.dtype), x, []
    for k, line in enumerate(rows.rows):
        cursor, m, v, z, measured = ops.cursor(k, 0, SEED), None, None, None, None
        base = x if line.saves_base else base
        if line.calls_network:
            m, v = network(line.in_scale * x, torch.full((len(x),), line.network_time), None, None)
        if line.draws:
            z = noise.normal(len(x), x.shape[1:], seed=SEED, draw=k, stream=noise.SAMPLER)
        if line.measure is not None:
            measured = torch.empty(len(x), 2)
            reference.measure_langevin(measured, matrix, cursor, None, line.measure.norm == "batch", x, m, z=z)
        out, pushed = torch.empty_like(x), torch.empty_like(x) if line.calls_network else None
        reference.step(
            out, matrix, cursor, None, x, m, history[: len(line.b) - line.calls_network], v=v if line.log_variance else None,
            base=base, z=z, measured=measured, pushed=pushed,
        )  # fmt: skip
        x, history = out, [pushed, *history] if line.keeps_prediction else history
        yield x


MEASURED = StepTable(
    "measured",
    (
        Row(
            Level(1, 1, 1), "measured", 1.0, b=(0.0,), calls_network=True, network_time=1.0,
            measure=Measure("sample", 0.1, 1.0),
        ),
        Row(Level(1, 1, 1), "plain", 1.0, b=(0.1,), c=0.1, calls_network=True, network_time=1.0),
    )
    * 5,
    Level(0, 1, 0),
    1.0,
)  # fmt: skip


@pytest.mark.parametrize("operations", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("case", [table(60), MEASURED, LEARNED, *one_of_each_kind()], ids=lambda case: str(case)[:40])
def test_buffers_are_few_and_never_hold_two_things(operations, case):
    def network(given, time, features, cond):
        return torch.tanh(given) * -0.5 + 1e-3 * time[:, None], torch.sin(given)

    rows = case if isinstance(case, StepTable) else fastdiff.plan(case.sde, case.steps, sampler=case.sampler)
    x = torch.randn(3, 5)
    loop = loop_on(rows, operations, x)
    states = loop.run(network, None, 0, x)
    next(states)
    for k, (ours, theirs) in enumerate(zip(states, on_new_tensors(rows, x, network), strict=True)):
        assert torch.equal(ours, theirs), k
    needs_base, measures = any(line.e for line in rows.rows), any(line.measure for line in rows.rows)
    assert len(loop.buffers) <= 1 + (rows.memory + 1 if rows.memory else 0) + needs_base + measures


# --- capture safety --------------------------------------------------------------------------------------------------


def score(x, t):
    return x * -1e-3


@pytest.fixture
def watched(monkeypatch):
    """sample() with a watch over all rows but the first: [Watch of each run]."""
    run, watches = runner.Loop.run, []

    def quiet(network):
        def call(*args):
            with _disable_current_modes():
                return network(*args)

        return call

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

    def use(operations):
        monkeypatch.setattr(ops, "backend_module", lambda name: operations)
        return watches

    return use


@pytest.mark.parametrize(("sde", "sampler", "steps"), one_of_each_kind(), ids=str)
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
        torch.ops.fastdiff.step(out, table, cursor, stream, x, *rest, **others)

    return step


@pytest.mark.parametrize(
    "defect", ["a number read", "a tensor made from the host", "an allocation", "an operation of another kind"]
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
