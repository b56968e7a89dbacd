"""Every operation of the compiled library against the reference, bit for bit, on every instruction set of this machine."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff.errors import ConfigError, DeviceError, DTypeError, ShapeError
from fastdiff.execution import cpu, noise, ops, reference
from fastdiff.table import COLUMNS

SETS = [name for name in cpu.INSTRUCTION_SETS if cpu.use(name)]
cpu.use(None)

SHAPES = [
    (1, 1), (3, 1), (37, 2), (4096, 2), (7, 3), (300, 3), (4, 5), (3, 127), (5, 4, 8, 8), (3, 255), (2, 1023), (2, 1024),
    (2, 1025), (2, 2047), (1, 4096), (3, 2, 1031), (2, 5003), (2, 3, 32, 32), (2, 2, 3, 4, 5), (0, 4), (3, 0), (1500, 1),
]  # fmt: skip


@pytest.fixture(params=SETS)
def instructions(request):
    cpu.use(request.param)
    yield request.param
    cpu.use(None)


def same(a, b):
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) and torch.equal(a.isnan(), b.isnan())


def test_the_library_is_built_from_these_sources():
    assert cpu.available, cpu.why
    assert cpu.is_fresh(), "csrc/ has changed: pip install -e . again"
    assert "plain" in SETS


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normal", "rademacher"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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


# --- step ------------------------------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "strided", "expanded", "channels_last", "offset")
CHOICES = {
    "dtype": (torch.float32, torch.float64),
    "shape": tuple(SHAPES),
    "m": (None, "state", torch.bfloat16, torch.float16),
    "layout": LAYOUTS,
    "history": (0, 1, 2, 3, 4),
    "base": (False, True),
    "guide": (False, True),
    "clip": (False, True),
    "convert": (False, True),
    "noise": ("none", "drawn", "given", "measured", "learned", "zero"),
    "mask": (False, True),
    "pushed": (False, True),
    "net_input": (None, "state", torch.bfloat16, torch.float16, "channels_last"),
    "first_bad": (False, True),
    "zeros": (False, True),
}


def pairwise(choices, seed=0):
    """Cases, as dicts, in which every pair of values of two choices meets (greedy, seeded)."""
    rng, names = random.Random(seed), list(choices)
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(names)), 2)
        for a in range(len(choices[names[i]]))
        for b in range(len(choices[names[j]]))
    }
    while missing:
        best, covered = None, set()
        for start in rng.sample(sorted(missing), min(12, len(missing))):
            case = [rng.randrange(len(choices[name])) for name in names]
            case[start[0]], case[start[2]] = start[1], start[3]
            values = list(enumerate(case))
            hits = {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(values, 2)} & missing
            if len(hits) > len(covered):
                best, covered = case, hits
        missing -= covered
        yield {name: choices[name][value] for name, value in zip(names, best)}


def laid_out(values, layout):
    """The same numbers in other memory; what does not exist for a shape stays contiguous."""
    if layout == "strided":
        room = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), torch.nan)
        return room[..., 1::2].copy_(values)
    if layout == "expanded":
        return values[:1].expand(values.shape) if len(values) else values
    if layout == "channels_last" and values.ndim > 2:
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "offset":
        return values.new_full((values.numel() + 1,), torch.nan)[1:].view(values.shape).copy_(values)
    return values


def step_case(case, seed):
    """The arguments of a step, twice: two sets that share what is read and own what is written."""
    g = torch.Generator().manual_seed(seed)
    dtype, shape = case["dtype"], case["shape"]

    def draw(kind=None):
        kind = dtype if kind in (None, "state") else kind
        return laid_out(torch.randn(shape, generator=g, dtype=torch.float64).to(kind), case["layout"])

    rows = 5
    table = torch.randn(rows, len(COLUMNS), generator=g, dtype=torch.float64)
    column = {name: i for i, name in enumerate(COLUMNS)}
    if not case["convert"]:
        table[:, column["p"]], table[:, column["q"]] = 0, 1
    low, high = (-0.7, 0.4) if case["clip"] else (-torch.inf, torch.inf)
    table[:, column["low"]], table[:, column["high"]] = low, high
    if case["noise"] == "none":
        table[:, column["c"]] = 0
    k = seed % rows
    read = {
        "table": table.to(dtype), "cursor": ops.cursor(k, 11, 2**63 + seed), "x": draw(),
        "stream": 1 if case["noise"] in ("drawn", "learned", "zero") else None,
        "m": None if case["m"] is None else draw(case["m"]),
        "history": [draw() for _ in range(min(case["history"], 4 if case["m"] is None else 3))],
    }  # fmt: skip
    if case["base"]:
        read["base"] = draw()
    if case["guide"] and case["m"] is not None:
        read["guide"] = draw(case["m"])
    if case["noise"] in ("given", "measured"):
        read["z"] = draw()
    if case["noise"] == "measured" and case["m"] is not None:
        read["measured"] = torch.rand(shape[0], 2, generator=g, dtype=torch.float64).to(dtype)
    if case["noise"] == "learned":
        read["v"] = draw(case["m"])
    if case["mask"]:
        read["known"] = draw()
        read["mask"] = laid_out(
            torch.rand(shape, generator=g) < 0.5, case["layout"] if case["layout"] != "strided" else ""
        )
    if case["zeros"]:  # operands whose factor is 0 are not looked at
        for name in ("e", "b0", "b1", "known_alpha"):
            table[k, column[name]] = 0
        read["table"] = table.to(dtype)
        if case["base"]:
            read["base"] = torch.full_like(read["base"], torch.nan)
    if case["first_bad"] and shape[0] * shape[-1]:
        read["x"] = read["x"].contiguous().clone()
        read["x"][-1].view(-1)[-1] = torch.inf
        if len(read["x"]) > 2 and read["m"] is not None:
            read["m"] = read["m"].contiguous().clone()
            read["m"][1].view(-1)[0] = torch.nan
    results = []
    for _ in range(2):
        written = {"out": torch.full(shape, torch.nan, dtype=dtype)}
        if case["pushed"] and case["m"] is not None:
            written["pushed"] = torch.full(shape, torch.nan, dtype=dtype)
        if case["net_input"] is not None:
            kind = dtype if isinstance(case["net_input"], str) else case["net_input"]
            layout = "channels_last" if case["net_input"] == "channels_last" else "contiguous"
            written["net_input"] = laid_out(torch.full(shape, torch.nan, dtype=kind), layout)
        if case["first_bad"]:
            written["first_bad"] = torch.full((shape[0],), 3)
        results.append(written)
    return read, *results


STEPS = list(pairwise(CHOICES))


def test_step_is_the_reference_to_the_bit(instructions):
    """Every pair of operand, dtype, shape and layout meets in some case."""
    assert 100 < len(STEPS) < 400
    for seed, case in enumerate(STEPS):
        read, ours, theirs = step_case(case, seed)
        cpu.step(**read, **ours)
        reference.step(**read, **theirs)
        for name in ours:
            if case["noise"] == "learned" and case["dtype"] == torch.float64:  # exp() of two libraries
                assert torch.allclose(
                    ours[name].double(), theirs[name].double(), rtol=1e-14, atol=1e-14, equal_nan=True
                ), case
            else:
                assert same(ours[name], theirs[name]), (name, case)


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


def test_chains_round_once_on_every_instruction_set(instructions):
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


def test_rare_combinations_mean_what_the_reference_says(instructions):
    for seed, noise_kind in itertools.product(range(4), ("measured", "learned")):
        case = {**dict.fromkeys(CHOICES, False), **PLAIN, "shape": (3, 40), "noise": noise_kind, "history": 2}
        read, ours, theirs = step_case(case, seed)
        read["measured"], read["v"] = torch.rand(3, 2), torch.full((3, 40), torch.nan)
        if noise_kind == "learned":
            del read["measured"]
            read["table"][:, COLUMNS.index("log_slope")] = 0  # then v is not looked at
        else:
            read["m"] = None  # then the newest of the history is scaled
        cpu.step(**read, **ours)
        reference.step(**read, **theirs)
        assert same(ours["out"], theirs["out"])
        assert not ours["out"].isnan().any()
    case = {**dict.fromkeys(CHOICES, False), **PLAIN, "shape": (3, 40), "noise": "learned"}
    read, ours, theirs = step_case(case, 1)
    read["v"] = torch.linspace(-1e4, 1e4, 120).view(3, 40)  # far beyond what e^u can hold
    cpu.step(**read, **ours)
    reference.step(**read, **theirs)
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
    read, ours, _ = step_case({**dict.fromkeys(CHOICES, False), **PLAIN, "shape": (2, 300)}, 3)
    expected = torch.empty_like(x)
    cpu.step(expected, **{**read, "x": x})
    cpu.step(x, **{**read, "x": x})
    assert torch.equal(x, expected)
    for k in (-1, 5):
        with pytest.raises(ConfigError, match="row"):
            cpu.step(**{**read, "cursor": ops.cursor(k, 0, 0)}, **ours)


PLAIN = {
    "dtype": torch.float32, "m": "state", "layout": "contiguous", "history": 0, "noise": "drawn", "net_input": None,
}  # fmt: skip


def test_operands_of_the_wrong_form_are_refused():
    """The library works on raw memory: nothing may reach it that it would misread."""
    read, ours, _ = step_case({**dict.fromkeys(CHOICES, False), **PLAIN, "shape": (2, 6)}, 3)
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


def draws(shape, dtype, seed=0, layout="contiguous"):
    g = torch.Generator().manual_seed(seed)
    return laid_out(torch.randn(shape, generator=g, dtype=torch.float64).to(dtype), layout)


@pytest.mark.parametrize("shape", OTHERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measured_steps_are_the_reference_to_the_bit(instructions, shape, dtype):
    for number, (batch, layout, given, guided) in enumerate(
        itertools.product((False, True), LAYOUTS, (False, True), (False, True))
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
    for layout, output in itertools.product(LAYOUTS, (dtype, torch.bfloat16, torch.float16)):
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
    for layout, kind, given in itertools.product(LAYOUTS, ("rademacher", "normal"), (False, True)):
        value = draws(shape, dtype, 0, layout)
        for width in (torch.float32, torch.float64) if given else (torch.float32,):
            probe = draws(shape, width, 1, layout) if given else None
            ours, theirs = (f.probe_dot(value, ops.cursor(1, 2, 3), 3, kind, probe) for f in (cpu, reference))
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", OTHERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embedded_errors_are_the_reference_to_the_bit(instructions, shape, dtype):
    for layout, stages in itertools.product(LAYOUTS, (1, 4, 7)):
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
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-15)  # sin() of two libraries
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
    read, ours, theirs = step_case({**dict.fromkeys(CHOICES, False), **PLAIN, "shape": (2, 300)}, 3)
    cpu.step(**{**read, "m": far}, **ours)
    reference.step(**{**read, "m": far.contiguous()}, **theirs)
    assert torch.equal(ours["out"], theirs["out"])
    cpu.step(**read, **ours, net_input=far)
    assert torch.equal(far, (ours["out"] * read["table"][3, COLUMNS.index("next_scale")]).bfloat16())


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

    n, chunk, edges = 10**8, 2**22, torch.linspace(-7, 7, 14_001, dtype=torch.float64)
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
