"""Every operation of the compiled library against the reference, bit for bit, on every instruction set of this machine."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from step_cases import CURSOR, PLAIN, STEP, copied, cursor, laid, pairwise, step_case, table_of

from fastdiff.errors import ConfigError, DeviceError, DTypeError, ShapeError
from fastdiff.execution import cpu, noise, ops, reference
from fastdiff.table import COLUMNS

CHOSEN = cpu.instruction_set  # FASTDIFF_INSTRUCTION_SET's, which all other tests run on
SETS = [name for name in cpu.INSTRUCTION_SETS if cpu.use(name)]
cpu.use(CHOSEN)


@pytest.fixture(params=SETS)
def instructions(request):
    cpu.use(request.param)
    yield request.param
    cpu.use(CHOSEN)


def same(a, b):
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) and torch.equal(a.isnan(), b.isnan())


def test_the_library_is_built_from_these_sources():
    assert cpu.available, cpu.why
    assert cpu.is_fresh(), "csrc/ has changed: pip install -e . again"
    assert "plain" in SETS


CSRC = Path(__file__).parent.parent / "csrc"


def snake(names):
    """The names of a C++ enum's members, kOneName, …, as Python has them."""
    return tuple(
        re.sub(r"(?<!^)([A-Z])", r"_\1", name.removeprefix("k")).lower() for name in re.findall(r"\bk\w+", names)
    )


def test_operations_slots_and_columns_are_numbered_alike_on_both_sides():
    """cpu.py and csrc/ name the same operations, tensors and columns in the same order."""
    face = (CSRC / "fastdiff.h").read_text()
    assert snake(re.search(r"enum Operation \{(.*?)\}", face, re.S)[1]) == (*cpu.OPERATIONS, *cpu.LISTS, *cpu.LAYERS)
    results = snake(re.search(r"enum Result \{(.*?)\}", face, re.S)[1])
    assert set(cpu._FAULTS) == set(range(1, len(results)))
    assert int(re.search(r"kMaxStages = (\d+)", face)[1]) == cpu.MAX_STAGES
    source = "".join((CSRC / name).read_text() for name in ("kernels.h", "step.h", "update.h"))
    slots = {
        name: snake(names) for name, names in re.findall(r"namespace (\w+)_slots \{.*?enum \{(.*?)\}", source, re.S)
    }
    fill = slots.pop("fill")
    assert {**slots, "normal": fill, "rademacher": fill, "words": fill} == cpu.OPERATIONS | cpu.LISTS
    row = re.search(r"struct Row \{\s*S (.*?);", source, re.S)[1].replace("b[4]", "b0, b1, b2, b3")
    assert tuple(row.split(", ")) == COLUMNS
    assert set(cpu.OPERATIONS) - {"words"} == set(ops.SCHEMAS)  # which nothing asks of torch's dispatcher


def test_constants_are_those_of_the_definition():
    text = (CSRC / "constants.h").read_text()
    constants = {
        name: tuple(float.fromhex(value) for value in re.findall(r"-?0x[0-9a-f.]+p[+-]?\d+", values))
        for name, values in re.findall(r"\b(k\w+)(?:\[\d+\])? = (\{.*?\}|[^,;]*)", text, re.S)
    }
    assert constants == {
        "kLog": noise._LOG, "kMinusTwoLnTwo": (noise._MINUS_2_LN_2,), "kSin": noise._SIN, "kCos": noise._COS,
        "kQuarters": (reference.QUARTERS,), "kPerLnTwo": (reference._PER_LN_2,), "kLnTwoHigh": (reference._LN_2_HIGH,),
        "kLnTwoLow": (reference._LN_2_LOW,), "kExp": reference._EXP,
        "kPerLnTwoWide": (reference._PER_LN_2_WIDE,), "kLnTwoHighWide": (reference._LN_2_HIGH_WIDE,),
        "kLnTwoLowWide": (reference._LN_2_LOW_WIDE,), "kExpWide": reference._EXP_WIDE,
    }  # fmt: skip


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normal", "rademacher"])
@pytest.mark.parametrize("shape", STEP["shape"], ids=str)
def test_noise_is_the_reference_to_the_bit(instructions, shape, name):
    for seed, draw, first in ((0, 0, 0), (2**64 - 3, 2**32 - 1, 2**32 - 5000), (12345, 999, 17)):
        cursor = ops.cursor(draw, first, seed)
        ours, theirs = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        getattr(cpu, name)(ours, cursor, 1)
        getattr(reference, name)(theirs, cursor, 1)
        assert torch.equal(ours, theirs)
        wide = torch.full(shape, torch.nan, dtype=torch.float64)
        getattr(cpu, name)(wide, cursor, 1)
        assert torch.equal(wide, theirs.double())


@pytest.mark.parametrize("shape", STEP["shape"], ids=str)
def test_uniform_numbers_are_those_of_the_definition(instructions, shape):
    for seed, draw, first in ((0, 0, 0), (2**64 - 3, 2**32 - 1, 2**32 - 5000), (12345, 999, 17)):
        given = {"seed": seed, "draw": draw, "first_sample": first, "stream": noise.TIMES}
        assert torch.equal(ops.uniform(shape[0], shape[1:], **given), noise.uniform(shape[0], shape[1:], **given))


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 50_001])
def test_an_order_is_that_of_the_definition(instructions, n, monkeypatch):
    for seed, draw in ((0, 0), (2**64 - 3, 2**32 - 1)):
        assert torch.equal(ops.permutation(n, seed=seed, draw=draw), noise.permutation(n, seed=seed, draw=draw))
    words = torch.tensor(
        [4, 9, 2, 2, 5, 9, 2, 3, 4, 8], dtype=torch.int32
    )  # keys 2·2³² + 9, 2³² + 2, …, of which two are equal
    monkeypatch.setattr(ops, "_words", lambda *_: words)
    assert ops.permutation(5, seed=0, draw=0).tolist() == [1, 3, 4, 0, 2]


# --- step ------------------------------------------------------------------------------------------------------------

STEPS = list(pairwise(STEP))


def both_steps(case, seed=0, **changed):
    """What the library and the reference write: two dicts."""
    table, stream, read, written = step_case(case, seed)
    read = {"table": table, "cursor": cursor(), "stream": stream, **read, **changed}
    results = []
    for implementation in (cpu, reference):
        to, x = copied(written), read["x"]
        if case["in_place"]:
            x = to["out"].copy_(x)
        implementation.step(**{**read, "x": x}, **to)
        results.append(to)
    return results


def test_step_is_the_reference_to_the_bit(instructions):
    """Every pair of operand, dtype, shape and layout meets in some case."""
    assert 100 < len(STEPS) < 400
    for seed, case in enumerate(STEPS):
        ours, theirs = both_steps(case, seed)
        for name in ours:
            if case["v"] is None or case["dtype"] == torch.float32 or name == "pushed":
                assert same(ours[name], theirs[name]), (name, case)
            else:
                # exp() of two libraries, each within a unit in the last place of its value, which is below e^(0.6·6 − 1.1);
                # times a normal below 6; and a rounding of sums below 100. A 16-bit number may then be the neighbour.
                near = 2**-52 * (2 * 13 * 6 + 2 * 100)
                neighbour = {torch.float16: 2**-10, torch.bfloat16: 2**-7}.get(ours[name].dtype, 0)
                wide = (ours[name].double(), theirs[name].double())
                assert torch.allclose(*wide, rtol=neighbour, atol=near, equal_nan=True), (name, case)


@pytest.mark.parametrize("backend", [cpu, reference], ids=["cpu", "reference"])
def test_a_prepared_step_is_the_step(backend):
    """On other rows and seeds, with a network's outputs of any dtype and layout, and without any."""
    for seed, case in enumerate(STEPS[:: 3 if backend is cpu else 30]):
        table, stream, read, written = step_case(case, seed)
        table[:] = table[CURSOR[0]]
        ours, theirs = copied(written), copied(written)
        m, v, x = read.pop("m", None), read.pop("v", None), read.pop("x")
        outputs = [(m, v), (m, None), (None if m is None else m.contiguous(), None), (None, None), (m, v)]
        prepared = backend.prepare_step(
            ours["out"], table, stream, x, **read, **{k: w for k, w in ours.items() if k != "out"}
        )
        for k, (output, variance) in enumerate(outputs):
            prepared(ops.cursor(k % 4, k, seed), output, variance)
            backend.step(
                **theirs,
                table=table,
                cursor=ops.cursor(k % 4, k, seed),
                stream=stream,
                x=x,
                m=output,
                v=variance,
                **read,
            )
            for name in ours:
                assert same(ours[name], theirs[name]), (name, k, case)


@pytest.mark.parametrize("numel", [7, 300, 4096, 5003])
@pytest.mark.parametrize("noisy", [False, True])
def test_one_number_that_is_not_finite_is_seen_wherever_it_lies(instructions, numel, noisy):
    table = torch.zeros(1, len(COLUMNS))
    for name, value in {"a": 1, "b0": 1, "q": 1, "c": 1, "low": -torch.inf, "high": torch.inf, "next_scale": 1}.items():
        table[0, COLUMNS.index(name)] = value
    for place in {0, 1, numel // 2, numel - 1, min(2047, numel - 1), min(2048, numel - 1)}:
        x, m, first_bad = torch.zeros(3, numel), torch.zeros(3, numel), torch.full((3,), 9)
        m[1, place] = torch.inf
        net_input = torch.empty(3, numel)
        cpu.step(
            torch.empty(3, numel),
            table,
            ops.cursor(0, 0, 0),
            1 if noisy else None,
            x,
            m,
            net_input=net_input,
            first_bad=first_bad,
        )
        assert first_bad.tolist() == [9, 0, 9]


def test_sums_round_once_on_every_instruction_set(instructions):
    """A sum beside a tie of float32 that two roundings get wrong, in the loop that adds noise."""
    x = torch.full((1, 300), 1 + 2.0**-23)
    table = torch.zeros(1, len(COLUMNS))
    values = {"a": 1.0, "b0": 2.0**-24 * (1 - 2.0**-23), "q": 1.0, "c": 1e-30, "low": -torch.inf, "high": torch.inf}
    for name, value in values.items():
        table[0, COLUMNS.index(name)] = value
    out, expected = torch.empty_like(x), torch.empty_like(x)
    cpu.step(out, table, ops.cursor(0, 0, 0), 1, x, x)
    reference.step(expected, table, ops.cursor(0, 0, 0), 1, x, x)
    assert torch.equal(out, expected)
    assert float(out[0, 0]) == 1 + 2.0**-23


SIZES = [(0,), (1,), (7, 3), (1024,), (5, 1000), (40, 33, 31)]


def lists(count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in SIZES] for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_is_torchs(instructions, dtype, decoupled):
    """Twenty steps against torch's plain loop in float64, with decay, clipping and an average; its own arithmetic is float64's
    or float32's, which rounds each number some ten times a step."""
    weights, average, first, second = (
        *lists(2, dtype),
        *([torch.zeros_like(w) for w in lists(1, dtype)[0]] for _ in "12"),
    )
    exact, averages = (
        [w.double().clone().requires_grad_(k == 0) for w in those] for k, those in enumerate((weights, average))
    )
    numbers = {"lr": 3e-3, "eps": 1e-8, "weight_decay": 0.1}
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    opponent = kind(exact, betas=(0.9, 0.99), foreach=False, **numbers)
    for step in range(1, 21):
        (gradients,) = lists(1, dtype, seed=step)
        share, factor = 1 / step, 0.3  # at first from the weights' end
        cpu.adam(
            weights, gradients, first, second, average, step=step, factor=factor, beta1=0.9, beta2=0.99, decoupled=decoupled,
            share=share, **numbers,
        )  # fmt: skip
        for w, g in zip(exact, gradients):
            w.grad = factor * g.double()
        opponent.step()
        averages = [a.lerp(w.detach(), share) for a, w in zip(averages, exact)]
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype is torch.float64 else 2e-5}
    for w, a, m, v, w64, a64 in zip(weights, average, first, second, exact, averages):
        torch.testing.assert_close(w.double(), w64.detach(), **tolerance)
        torch.testing.assert_close(a.double(), a64, **tolerance)
        torch.testing.assert_close(m.double(), opponent.state[w64]["exp_avg"], **tolerance)
        torch.testing.assert_close(v.double(), opponent.state[w64]["exp_avg_sq"], **tolerance)


def updated(threads=1):
    torch.set_num_threads(threads)
    weights, gradients, first, second, average = lists(5, torch.float32)
    numbers = {"lr": 3e-3, "eps": 1e-8, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.99, "decoupled": True}
    second = [v.square() for v in second]
    for step in (1, 2):
        cpu.adam(weights, gradients, first, second, average, step=step, factor=0.7, share=0.01, **numbers)
    return cpu.sum_of_squares(gradients), [*weights, *first, *second, *average]


def test_an_update_is_the_same_on_every_instruction_set_and_any_threads(instructions):
    norm, numbers = updated()
    cpu.use("plain")
    plain, as_plain = updated()
    cpu.use(instructions)
    threads = torch.get_num_threads()
    try:
        more, as_more = updated(threads=5)
    finally:
        torch.set_num_threads(threads)
    assert norm == plain == more
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(numbers, as_plain, as_more))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_of_squares_is_exact_to_a_rounding_for_each_halving(instructions, dtype):
    (tensors,) = lists(1, dtype)
    exact = math.fsum(float(v) ** 2 for tensor in tensors for v in tensor.double().flatten())
    assert cpu.sum_of_squares(tensors) == pytest.approx(exact, rel=1e-14)
    assert cpu.sum_of_squares([]) == 0.0
    tensors[-1][3, 2, 1] = torch.inf
    assert cpu.sum_of_squares(tensors) == math.inf
    tensors[2][0, 0] = torch.nan
    assert math.isnan(cpu.sum_of_squares(tensors))


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (torch.zeros(4, 3), ShapeError),
        (torch.zeros(4, 3).t(), ShapeError),
        (torch.zeros(3, 4, dtype=torch.float64), ShapeError),
        (torch.zeros(3, 4, device="meta"), ShapeError),
    ],
    ids=["shape", "strides", "dtype", "device"],
)
def test_lists_that_are_not_alike_are_refused(other, error):
    alike = [torch.zeros(3, 4)]
    options = {
        "step": 1,
        "factor": 1.0,
        "lr": 1.0,
        "eps": 1.0,
        "weight_decay": 0.0,
        "beta1": 0.5,
        "beta2": 0.5,
        "share": 1.0,
    }
    with pytest.raises(error, match="tensors of adam must be on the CPU and all"):
        cpu.adam(alike, alike, alike, [other], alike, decoupled=True, **options)
    with pytest.raises(DTypeError):
        cpu.sum_of_squares([torch.zeros(3, dtype=torch.float16)])


def test_rare_combinations_mean_what_the_reference_says(instructions):
    case, seed = {**PLAIN, "shape": (3, 40), "history": 2}, 0
    nan = torch.full((3, 40), torch.nan)
    for seed in range(4):
        # a measured step looks at no v; without m it scales the newest of the history; at slope 0 nobody looks at v
        for change in (
            {"measured": torch.rand(3, 2), "v": nan},
            {"measured": torch.rand(3, 2), "v": nan, "m": None},
            {"v": nan, "table": table_of(a=0.9, b0=0.3, q=1.0, log_mid=-0.7)},
        ):
            ours, theirs = both_steps(case, seed, **change)
            assert torch.equal(ours["out"], theirs["out"])
            assert not ours["out"].isnan().any()
    far = torch.linspace(-1e4, 1e4, 120).view(3, 40)  # beyond what e^u can hold
    ours, theirs = both_steps(case, v=far)
    assert same(ours["out"], theirs["out"])


def test_a_batch_of_thousands_has_its_mean_from_the_tree(instructions):
    x, m, z = draws((3000, 3), torch.float32), draws((3000, 3), torch.float32, 1), draws((3000, 3), torch.float32, 2)
    table = torch.ones(1, len(COLUMNS))
    results = [torch.empty(3000, 2) for _ in range(2)]
    for implementation, out in zip((cpu, reference), results):
        implementation.measure_langevin(out, table, ops.cursor(0, 0, 0), None, True, x, m, None, z)
    assert torch.equal(*results)


def test_in_place_steps_and_rows_out_of_range(instructions):
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    table, stream, read, written = step_case(PLAIN)
    expected = torch.empty_like(x)
    cpu.step(expected, table, cursor(), stream, **{**read, "x": x})
    cpu.step(x, table, cursor(), stream, **{**read, "x": x})
    assert torch.equal(x, expected)
    for k in (-1, 4):
        with pytest.raises(ConfigError, match="row"):
            cpu.step(table=table, cursor=cursor(k), stream=stream, **read, **written)


def test_operands_of_the_wrong_form_are_refused():
    """The library works on raw memory: nothing may reach it that it would misread."""
    table, stream, operands, ours = step_case({**PLAIN, "shape": (2, 6)})
    read = {"table": table, "cursor": cursor(), "stream": stream, **operands}
    out = ours["out"]
    wrong = [
        {"out": out.t().contiguous().t()}, {"out": out.half()}, {"out": out[0]}, {"table": read["table"].double()},
        {"table": read["table"][:, :-1]}, {"cursor": read["cursor"][:2]}, {"cursor": read["cursor"].int()},
        {"first_bad": torch.zeros(3, dtype=torch.int64)}, {"first_bad": torch.zeros(2)}, {"measured": torch.zeros(2)},
        {"pushed": torch.zeros(2, 5)}, {"net_input": torch.zeros(2, 5)}, {"net_input": torch.zeros(1, 6).expand(2, 6)},
        {"history": [out] * 5}, {"m": torch.zeros(2, 6, dtype=torch.complex64)}, {"m": torch.zeros(2, 6, dtype=torch.int32)},
        {"known": out, "mask": torch.zeros(2, 6)}, {"x": torch.zeros(2, 6).double()}, {"table": read["table"][0]},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises((ShapeError, DTypeError)):
            cpu.step(**{**read, **ours, **change})
    x, one = torch.zeros(2, 6), torch.ones(1)
    for call in (
        lambda: cpu.perturb(x, one, one, ops.cursor(0, 0, 0), 1),
        lambda: cpu.dsm_loss(x, x, one, one, one, ops.cursor(0, 0, 0), 1),
        lambda: cpu.dsm_loss_backward(one, x, one, torch.float32),
        lambda: cpu.dsm_loss_backward(torch.ones(2), x.bfloat16(), torch.ones(2), torch.float32),
        lambda: cpu.timestep_embedding(torch.ones(2), torch.ones(9), 1.0, 8, "sin_cos"),
        lambda: cpu.rk_error(x, [x] * 17, torch.ones(2), [1.0] * 17, [1.0] * 17, 1e-3, 1e-3),
        lambda: cpu.measure_langevin(one, read["table"], read["cursor"], 1, False, x, x),
        lambda: cpu.measure_langevin(torch.ones(2, 2), read["table"], read["cursor"], 1, False, x, x, kept=x[:, :5]),
    ):
        with pytest.raises(ShapeError):
            call()
    with pytest.raises(DeviceError, match="meta"):
        cpu.step(**{**read, **ours, "m": torch.zeros(2, 6, device="meta")})
    with pytest.raises(RuntimeError, match="expand"):
        cpu.step(**{**read, **ours, "x": torch.zeros(3, 6)})


# --- the other operations --------------------------------------------------------------------------------------------

OTHERS = [
    (1, 1),
    (3, 1),
    (64, 2),
    (7, 3),
    (9, 4),
    (4, 5),
    (3, 127),
    (2, 1023),
    (2, 1025),
    (1, 4096),
    (3, 5003),
    (2, 2049),  # a last tile of one number
    (2, 4099),
    (3, 3, 17, 16),
    (0, 4),
    (3, 0),
]


SOME = ("contiguous", "strided", "one for all", "channels-last", "odd offset")  # layouts


def draws(shape, dtype, seed=0, layout="contiguous"):
    g = torch.Generator().manual_seed(seed)
    return laid(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype), layout)


@pytest.mark.parametrize("shape", OTHERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measured_steps_are_the_reference_to_the_bit(instructions, shape, dtype):
    for number, (batch, layout, given, guided) in enumerate(
        itertools.product((False, True), SOME, (False, True), (False, True))
    ):
        table = torch.rand(3, len(COLUMNS), generator=torch.Generator().manual_seed(number), dtype=torch.float64).to(
            dtype
        )
        table[:, COLUMNS.index("low")] = -0.5
        x, m, guide, z = (draws(shape, dtype, seed, layout) for seed in range(4))
        if len(m) > 1 and layout == "contiguous" and not guided:
            table[1, COLUMNS.index("p")], m[1] = 0, 0
        results = []
        for implementation in (cpu, reference):
            measured, kept = torch.full((len(x), 2), torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype)
            implementation.measure_langevin(
                measured, table, ops.cursor(1, 5, 6), None if given else 1, batch, x, m, guide if guided else None,
                z if given else None, kept,
            )  # fmt: skip
            results.append((measured, kept))
        assert same(results[0][0], results[1][0]), (batch, layout, given, guided)
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("shape", OTHERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_operations_are_the_reference_to_the_bit(instructions, shape, dtype):
    for layout, output in itertools.product(SOME, (dtype, torch.bfloat16, torch.float16)):
        x0, m = draws(shape, dtype, 0, layout), draws(shape, output, 1, layout)
        alpha, sigma, weight = (torch.rand(shape[0], generator=torch.Generator().manual_seed(s)) for s in range(3))
        cursor = ops.cursor(2**31, 7, 3)
        assert torch.equal(cpu.perturb(x0, alpha, sigma, cursor, 2), reference.perturb(x0, alpha, sigma, cursor, 2))
        ours, theirs = (f.dsm_loss(m, x0, alpha, sigma, weight, cursor, 2) for f in (cpu, reference))
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        grad = alpha[:1].expand(shape[0]) if shape[0] else alpha
        error = draws(shape, dtype, 5, layout)
        ours, theirs = (f.dsm_loss_backward(grad, error, weight, output) for f in (cpu, reference))
        assert ours.dtype == output
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", OTHERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probe_dots_are_the_reference_to_the_bit(instructions, shape, dtype):
    for layout, kind, given in itertools.product(SOME, ("rademacher", "normal"), (False, True)):
        value = draws(shape, dtype, 0, layout)
        for width in (torch.float32, torch.float64) if given else (torch.float32,):
            probe = draws(shape, width, 1, layout) if given else None
            ours, theirs = (f.probe_dot(value, ops.cursor(1, 2, 3), 3, kind, probe) for f in (cpu, reference))
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", OTHERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embedded_errors_are_the_reference_to_the_bit(instructions, shape, dtype):
    for layout, stages in itertools.product(SOME, (1, 4, 7)):
        x, h = draws(shape, dtype, 0, layout), torch.rand(shape[0], generator=torch.Generator().manual_seed(1))
        k = [draws(shape, dtype, 2 + j, layout) for j in range(stages)]
        b, e = ([round(float(v), 3) for v in draws((stages,), torch.float64, s)] for s in (10, 11))
        b[0] = 0.0
        if stages > 1:
            e[0] = 0.0
        ours, theirs = (f.rk_error(x, k, h, b, e, 1e-3, 1e-5) for f in (cpu, reference))
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin", "interleaved"])
def test_timestep_embeddings_are_the_reference(instructions, order):
    for n, channels in itertools.product((0, 1, 7, 100), (1, 2, 5, 64)):
        t = torch.linspace(-3, 1000, n)
        frequencies = torch.logspace(0, -4, channels // 2)
        for scale in (1.0, 1000.0, 6.2831853):
            ours, theirs = (f.timestep_embedding(t, frequencies, scale, channels, order) for f in (cpu, reference))
            assert torch.equal(ours, theirs)
            ours, theirs = (
                f.timestep_embedding(t.double(), frequencies.double(), scale, channels, order) for f in (cpu, reference)
            )
            # sin() and cos() of two libraries, each within a unit in the last place of 1
            assert torch.allclose(ours, theirs, rtol=0, atol=2 * 2**-52)
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert cpu.timestep_embedding(special, torch.ones(1), 1.0, 2, order).isnan().all()


def test_tensors_of_very_many_axes():
    shape = (2,) + (1,) * 12 + (2,) * 8
    x, m = draws(shape, torch.float32), draws(shape, torch.float32, 1)
    stages = [draws(shape, torch.float32, s, "strided") for s in range(16)]
    for transposed in (False, True):  # sixteen axes and fewer may have any strides
        few = [v.reshape(2, *(2,) * 8).movedim(1, -1) if transposed else v for v in (x, m)]
        out, expected = torch.full(few[0].shape, torch.nan), torch.full(few[0].shape, torch.nan)
        table = torch.rand(1, len(COLUMNS), generator=torch.Generator().manual_seed(0))
        for implementation, to in ((cpu, out), (reference, expected)):
            implementation.step(to, table, ops.cursor(0, 0, 0), 1, *few)
        assert torch.equal(out, expected)
    with pytest.raises(ShapeError, match="more than 16 axes"):
        cpu.rk_error(x, stages, torch.ones(2), [1.0] * 16, [1.0] * 16, 1e-3, 1e-3)


THREADS = """
import os, torch
from fastdiff.execution import cpu, ops

def threads():
    return len(os.listdir("/proc/self/task"))

z, cursor = torch.empty(8, 65536), ops.cursor(0, 0, 0)
torch.set_num_threads(1)
cpu.normal(z, cursor, 1)
alone = threads()
torch.set_num_threads(3)
cpu.normal(z, cursor, 1)
print(threads() - alone)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_work_is_shared_with_torchs_threads():
    ran = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, timeout=120)
    assert ran.stdout.strip() == "2", ran.stdout + ran.stderr


# --- large -----------------------------------------------------------------------------------------------------------


def test_strides_beyond_32_bits(instructions):
    span = 2**31 + 2**12
    memory = torch.ones((), dtype=torch.bfloat16).new_empty(span + 600)  # all but two pages are never touched
    far = memory.as_strided((2, 300), (span, 1))
    far.copy_(draws((2, 300), torch.bfloat16))
    ours, theirs = both_steps(PLAIN, m=far)
    assert torch.equal(ours["out"], theirs["out"])
    table, stream, read, written = step_case(PLAIN)
    cpu.step(table=table, cursor=cursor(), stream=stream, **read, **written, net_input=far)
    assert torch.equal(far, (written["out"] * table[CURSOR[0], COLUMNS.index("next_scale")]).bfloat16())


def test_elements_beyond_32_bits():
    """One sample of 2^31 + 2048 ones, which need no memory: the signs of its last block are their own."""
    one, cursor = torch.ones(1, 1), ops.cursor(3, 4, 5)
    sums = [cpu.probe_dot(one.expand(1, n), cursor, 3, "rademacher") for n in (2**31, 2**31 + 2048)]
    quad = torch.arange(2**31 // 2048 * 128, 2**31 // 2048 * 128 + 128)
    words = torch.stack(noise.philox((quad, 3, 4, 3), 5))
    signs = [1 - 2 * (words >> bit & 1) for bit in (31, 30, 29, 28)]
    assert float(sums[1] - sums[0]) == float(torch.stack(signs).sum())


@pytest.mark.slow
def test_normals_are_normal():
    """10^8 of them: Kolmogorov-Smirnov, four moments and the tails, each within five standard errors."""
    from scipy import special, stats

    n, chunk, edges = 10**8, 2**18, torch.linspace(-7, 7, 14_001, dtype=torch.float64)
    counts = torch.zeros(len(edges) - 1, dtype=torch.float64)
    moments, pairs, beyond, seen = [0.0] * 5, 0.0, dict.fromkeys((4.0, 5.0, 6.0), 0), 0
    z = torch.empty(1, chunk)
    for k in range(n // chunk + 1):
        cpu.normal(z, ops.cursor(k, 0, 20261122), 1)
        values = z[0, : min(chunk, n - seen)]
        seen += len(values)
        counts += torch.histc(values, len(counts), -7, 7).double()
        power = torch.ones_like(values)
        for order in range(1, 5):
            power = power * values
            moments[order] += float(power.sum(dtype=torch.float64))
        pairs += float((values[:-1] * values[1:]).sum(dtype=torch.float64))
        size = values.abs()
        for edge in beyond:
            beyond[edge] += int((size > edge).sum())
    assert seen == n == int(counts.sum())
    distance = float((counts.cumsum(0) / n - torch.special.ndtr(edges[1:])).abs().max())
    assert stats.kstwobign.sf(distance * n**0.5) > 1e-4
    for order, (expected, variance) in enumerate(((0, 1), (1, 2), (0, 15), (3, 96)), start=1):
        assert abs(moments[order] / n - expected) < 5 * (variance / n) ** 0.5, order
    assert abs(pairs / n) < 5 / n**0.5
    for edge, count in beyond.items():
        expected = n * special.erfc(edge / 2**0.5)
        assert abs(count - expected) < 5 * expected**0.5 + 1, edge


# --- memory, threads, builds -----------------------------------------------------------------------------------------


def test_small_stacks_are_enough():
    code = """
import threading, torch, fastdiff
net = lambda x, t: -x.flip(1).flip(1)
def run():
    for dtype in (torch.float32, torch.float64):
        given = {"shape": (5000,), "num_samples": 2, "dtype": dtype}
        for sampler in (None, "pc", "rk45"):
            fastdiff.sample(net, "vp", None if sampler == "rk45" else 3, sampler=sampler, **given)
        fastdiff.log_likelihood(net, torch.randn(2, 5000, dtype=dtype), "vp", rtol=1e-2, atol=1e-2)
run()
threading.stack_size(128 * 1024)
thread = threading.Thread(target=run)
thread.start(); thread.join()
print("done")
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip() == "done", (shown.returncode, shown.stderr[-500:])


def test_a_fork_leaves_torchs_threads():
    code = """
import os, torch
torch.set_num_threads(3)
import fastdiff
pid = os.fork()
if pid == 0:
    os._exit(torch.get_num_threads())
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "3"


def test_exponentials_of_float64_are_the_references():
    v = torch.linspace(-3000, 3000, 60_001, dtype=torch.float64)[None]
    v[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    table = torch.zeros(1, len(COLUMNS), dtype=torch.float64)
    table[0, COLUMNS.index("log_slope")], table[0, COLUMNS.index("high")] = 0.37, torch.inf
    table[0, COLUMNS.index("low")], table[0, COLUMNS.index("log_mid")] = -torch.inf, -1.1
    results = []
    for module in (cpu, reference):
        out = torch.zeros_like(v)
        module.step(out, table, ops.cursor(0, 0, 0), None, out, z=torch.ones_like(v), v=v)
        results.append(out)
    assert torch.equal(results[0].nan_to_num(7.0), results[1].nan_to_num(7.0))
    exact = (v * 0.37 - 1.1)[0, 3:].clamp(-708, 709).exp()
    assert ((results[0][0, 3:] - exact).abs() <= 4e-16 * exact).all()


def copy(tmp_path, change=lambda path: None):
    path = tmp_path / "lib" / "other.so"
    path.parent.mkdir(mode=0o755)
    path.write_bytes(cpu.PACKAGED.read_bytes())
    path.chmod(0o755)
    change(path)
    return path


def loaded_by_another_process(path):
    code = "import fastdiff.execution.cpu as cpu; print(cpu.available, cpu.why)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "FASTDIFF_LIBRARY": str(path)}
    )


def other_sources(path):
    hashed = re.search(rb"[0-9a-f]{16}\0", path.read_bytes())[0]
    built = cpu._library.fastdiff_sources()
    path.write_bytes(path.read_bytes().replace(built, b"0" * 16))
    assert hashed


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda path: path.chmod(0o777), "others may write"),
        (lambda path: path.parent.chmod(0o777), "others may write"),
        (lambda path: path.parent.chmod(0o1777), "others may write"),
        (other_sources, "other sources"),
        (lambda path: path.write_bytes(b"no library"), "cannot be loaded"),
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: (path.unlink(), path.mkdir()), "is no file"),
        (
            lambda path: path.write_bytes(Path(torch.__file__).parent.joinpath("lib/libc10.so").read_bytes()),
            "cannot be",
        ),
    ],
    ids=["writable", "folder", "sticky", "sources", "text", "absent", "a folder", "stranger"],
)
def test_a_named_library_that_cannot_be_trusted_is_left_out(tmp_path, change, word, monkeypatch):
    path = copy(tmp_path, change)
    for name, value in (("NAMED", str(path)), ("LIBRARY", path), ("_NAMED", f"FASTDIFF_LIBRARY={str(path)!r}")):
        monkeypatch.setattr(cpu, name, value)
    library, chosen, why = cpu._load()
    assert (library, chosen) == (None, "")
    assert word in why


def test_a_process_whose_named_library_is_left_out_says_so(tmp_path):
    shown = loaded_by_another_process(copy(tmp_path, lambda path: path.chmod(0o777)))
    assert shown.stdout.startswith("False"), shown
    assert "others may write" in shown.stdout
    assert "RuntimeWarning" in shown.stderr


@pytest.mark.parametrize(
    ("name", "why"), [("avx1024", "must be one of plain, avx2, avx512"), ("avx512", "names what this processor lacks")]
)
def test_a_wrong_instruction_set_is_a_warning_and_plain_pytorch(name, why):
    if cpu.use(name):
        cpu.use(CHOSEN)
        pytest.skip(f"this processor has {name}")
    code = "import fastdiff; from fastdiff.execution import cpu; print(cpu.available)"
    environment = {**os.environ, "FASTDIFF_INSTRUCTION_SET": name}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert shown.stdout == "False\n", shown
    assert re.search(
        f"RuntimeWarning: .*FASTDIFF_INSTRUCTION_SET.*{why}.*; unset FASTDIFF_INSTRUCTION_SET", shown.stderr
    )


def test_a_named_library_of_the_same_sources_is_taken(tmp_path):
    assert loaded_by_another_process(copy(tmp_path)).stdout.startswith("True")


def test_devices_must_agree():
    out = torch.zeros(2, 3)
    with pytest.raises(DeviceError):
        torch.ops.fastdiff.normal(out, ops.cursor(0, 0, 0).to("meta"), 0)
    with pytest.raises(DeviceError):
        torch.ops.fastdiff.perturb(out, torch.ones(2, device="meta"), torch.ones(2), ops.cursor(0, 0, 0), 0)
