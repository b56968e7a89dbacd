"""The Triton kernels against fastdiff.execution.reference, bit for bit; run by test_triton.py in processes of its own.

The cases are the same for kernels that are compiled for sm_90 and whose PTX runs on CPU tensors (-p compiled, tests/compiled.py),
that Triton interprets on CPU tensors (TRITON_INTERPRET=1, which must be set before anything imports triton), and that run on the
GPU (FASTDIFF_KERNELS_DEVICE=cuda).
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from step_cases import CURSOR, INF, NAN, PLAIN, STEP, copied, cursor, laid, pairwise, step_case, table_of, values_first

import fastdiff
from fastdiff import kernels, samplers, table
from fastdiff.execution import cpu, fused, noise, verify
from fastdiff.execution import reference as row

DEVICE = torch.device(os.environ.get("FASTDIFF_KERNELS_DEVICE", "cpu"))
ON_HOST = DEVICE.type == "cpu"
COMPILED = sys.modules.get("compiled")
INTERPRETED = ON_HOST and COMPILED is None
# Triton 3.6's interpreter rounds an fma twice: its bits are near, not equal
FUSED = not INTERPRETED or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)

reduce, tiles = kernels.reduce, kernels.tiles
# the package's attribute of this name is the function
step_module = importlib.import_module("fastdiff.kernels.step")

# numpy, which the interpreter computes with, warns of infinities and NaN, which some cases are about
np.seterr(all="ignore")


@pytest.fixture(autouse=True)
def _poisoned_scratch(monkeypatch):
    """new_empty returns NaN too (conftest.py's torch.empty does)."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return out.fill_(NAN) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def _large_programs(monkeypatch):
    """The interpreter's time goes by programs, whatever their size."""
    if INTERPRETED:
        monkeypatch.setattr(tiles, "QUADS", 1024)


def same(ours, reference):
    """Equal numbers, NaN equal to NaN; near ones where the interpreter rounds an fma twice or truncates bfloat16."""
    ours = ours.cpu()
    assert ours.dtype == reference.dtype
    assert ours.shape == reference.shape
    if COMPILED:
        COMPILED.bits += 8 * ours.nbytes
    if ours.dtype == torch.bfloat16 and INTERPRETED:
        near = (ours.contiguous().view(torch.int16).int() - reference.contiguous().view(torch.int16).int()).abs() <= 1
        assert bool((near | (ours.isnan() & reference.isnan())).all())
        return
    if not ours.is_floating_point():
        assert torch.equal(ours, reference)
        return
    if not FUSED:
        near = 1e-3 if ours.dtype == torch.float16 else 3e-5
        torch.testing.assert_close(ours, reference, rtol=near, atol=near, equal_nan=True)
        return
    equal = (ours == reference) | (ours.isnan() & reference.isnan())
    assert bool(equal.all()), f"{int((~equal).sum())} of {equal.numel()} differ"


# Less than step_cases.STEP: float32, few shapes and, for what is read as the prediction is, few layouts, since a kernel's
# compilation, or its interpretation, takes a third of a second
LAYOUTS = (None, "contiguous", "channels-last", "sliced channels-last", "permuted", "odd offset", "one for all")
FACTORS = {
    **STEP,
    "dtype": [torch.float32],
    "shape": [
        (3, 1, 1, 1), (3, 2, 1, 1), (2, 3, 1, 1), (5, 3, 1, 1), (3, 1, 1, 127), (3, 1, 28, 28), (1, 3, 11, 31), (3, 3, 11, 31),
        (3, 5, 5, 41), (3, 4, 32, 32),
    ],
    "x": ["contiguous", "odd offset", "permuted", "one for all"],
    "guide": LAYOUTS,
    "mask": (None, *LAYOUTS),
    "others": ["contiguous", "padded rows"],
}  # fmt: skip
COVER = values_first(pairwise(FACTORS, seed=1))


def run_step(case, seed=0):
    """A case by the kernel and by the reference: everything that they write."""
    matrix, stream, read, written = step_case(case, seed)
    ours, moved = copied(written, DEVICE), copied(read, DEVICE)
    row.step(**copied(written | read) | written, table=matrix, cursor=cursor(), stream=stream)
    if case["in_place"]:
        ours["out"] = moved["x"]
    kernels.step(**moved, **ours, table=matrix.to(DEVICE), cursor=cursor().to(DEVICE), stream=stream)
    for name in written:
        same(ours[name], written[name])


def test_the_first_of_the_cover_have_every_value():
    """Of which `make test` compiles no more (test_triton.py)."""
    for name, options in FACTORS.items():
        assert {str(case[name]) for case in COVER[:13]} == {str(option) for option in options}


@pytest.mark.parametrize("seed", range(len(COVER)))
def test_step(seed):
    run_step(COVER[seed], seed)


@pytest.mark.parametrize("shape", [(2, 4, 32, 32), (2, 3, 11, 31)])
def test_step_in_programs_of_the_size_that_runs(shape, monkeypatch):
    monkeypatch.setattr(tiles, "QUADS", 256)
    run_step(PLAIN | {"shape": shape, "base": True, "first_bad": "infinite state", "m": "channels-last"})


@pytest.mark.parametrize(
    "other", [{}, {"v": "sliced channels-last", "base": True}, {"history": 2, "others": "permuted"}]
)
def test_a_prepared_step_is_the_step(other):
    """Row after row: whatever a network answers with, and what the fixed operands hold by then."""
    case = PLAIN | {"shape": (2, 3, 8, 8), "net_input": "channels-last", "first_bad": "finite", **other}
    matrix, stream, read, written = step_case(case)
    fixed, ours = copied(read, DEVICE), copied(written, DEVICE)
    operands = {name: value for name, value in (fixed | ours).items() if name not in ("out", "x", "m", "v")}
    prepared = kernels.prepare_step(ours["out"], matrix.to(DEVICE), stream, fixed["x"], **operands)
    for seed, layout in enumerate(("contiguous", "channels-last", "permuted", "odd offset", "contiguous")):
        _, _, now, _ = step_case(case, seed)
        m, v = laid(now["m"], layout), now.get("v")
        for name in ("x", "base"):
            if now[name] is not None:
                fixed[name].copy_(now[name])
                read[name].copy_(now[name])
        prepared(cursor().to(DEVICE), *on_device(m), *on_device(v))
        row.step(**written, **read | {"m": m, "v": v}, table=matrix, cursor=cursor(), stream=stream)
        for name in written:
            same(ours[name], written[name])


@pytest.mark.parametrize("shape", [(5,), (0, 3), (4, 0), (0,)])
def test_step_of_scalars_and_of_nothing(shape):
    g = torch.Generator().manual_seed(0)
    x, m = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    matrix = table_of(a=0.9, b0=0.2, c=0.3, q=1.0)
    out, ours = torch.full(shape, NAN), torch.full(shape, NAN).to(DEVICE)
    row.step(out, matrix, cursor(), 1, x, m)
    flags = torch.full((shape[0],), 9).to(DEVICE)
    kernels.step(ours, matrix.to(DEVICE), cursor().to(DEVICE), 1, x.to(DEVICE), m.to(DEVICE), first_bad=flags)
    same(ours, out)
    assert flags.tolist() == [9] * shape[0]


def test_the_columns_are_the_tables():
    assert step_module.COLUMNS == table.COLUMNS
    for name in ("A", "E", "B0", "C", "P", "Q", "LOW", "HIGH", "NEXT_SCALE", "GUIDANCE", "LOG_SLOPE", "LOG_MID",
                 "KNOWN_ALPHA", "KNOWN_SIGMA", "GAIN", "CAP"):  # fmt: skip
        assert getattr(step_module, name).value == table.COLUMNS.index(name.lower())


# Noise


SIZES = [(1,), (3,), (127,), (128,), (513,), (1023,), (1025,), (2049,), (4096,), (9000,)]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_noise(kind, shape):
    for batch in (1, 3):
        expected, ours = torch.full((batch, *shape), NAN), torch.full((batch, *shape), NAN).to(DEVICE)
        getattr(row, kind)(expected, cursor(), 5)
        getattr(kernels, kind)(ours, cursor().to(DEVICE), 5)
        same(ours, expected)


def test_noise_of_the_definition():
    """The numbers printed in fastdiff's definition of FDN1, and the extremes of every counter."""
    printed = "3fc3f121 3f3b6075 bf6a3999 bfaa187a bf4f5c2f c0132ffc 3f32316e be890911"
    ours = torch.full((1, 8), NAN).to(DEVICE)
    kernels.normal(ours, cursor(999, 49999, 0x123456789ABCDEF0).to(DEVICE), 1)
    bits = torch.tensor([int(word, 16) for word in printed.split()], dtype=torch.int64).to(torch.int32)
    same(ours, bits.view(torch.float32)[None])
    largest = 2**32 - 1
    for draw, first, seed in ((largest, largest - 1, -1), (0, 0, 0), (0, 0, 2**63 - 1), (1, 0, -(2**63))):
        expected, ours = torch.full((2, 6), NAN), torch.full((2, 6), NAN).to(DEVICE)
        row.normal(expected, cursor(draw, first, seed), 7)
        kernels.normal(ours, cursor(draw, first, seed).to(DEVICE), 7)
        same(ours, expected)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_noise_of_nothing(kind):
    for shape in ((0, 3), (2, 0)):
        getattr(kernels, kind)(torch.empty(shape, device=DEVICE), cursor().to(DEVICE), 1)


# Sums over samples


SEVERAL = (3, 11, 31)  # which is compiled for all there is
SUMS = [((1,), 1), ((3,), 5), ((127,), 2), (SEVERAL, 3), ((5, 5, 41), 2), ((4, 32, 32), 2), ((2053,), 1)]


def operands(shape, batch, count, seed=0, batch_numbers=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn((batch, *shape), generator=g) for _ in range(count)] + [
        torch.randn(batch, generator=g) for _ in range(batch_numbers)
    ]


def on_device(*values):
    return [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in values]


LANGEVIN = {"gain": 0.05, "cap": 0.11, "q": 1.0, "guidance": 1.7}


@pytest.mark.parametrize("noise_from", ["drawn", "given", "kept"])
@pytest.mark.parametrize(("shape", "batch"), SUMS)
def test_measure_langevin(shape, batch, noise_from):
    x, m, guide, z = operands(shape, batch, 4)
    m = m.bfloat16()
    m[-1], guide[-1] = 0, 0
    options = {
        "drawn": {"q": 1.0},
        "given": {"p": 0.2, "low": -1.0, "high": 0.5, "cap": INF},
        "kept": {"p": 0.3, "q": 0.1},
    }[noise_from]
    matrix = table_of(**LANGEVIN | options)
    for batch_means in (False, True) if noise_from == "drawn" or shape == SEVERAL else (False,):
        results = []
        for module, device in ((row, "cpu"), (kernels, DEVICE)):
            # float64 hides no rounding of the tree
            wide = torch.float64 if noise_from == "given" else torch.float32
            written = [torch.full((batch, 2), NAN, device=device, dtype=wide)]
            given = {"z": z.to(device) if noise_from == "given" else None, "kept": None}
            if noise_from == "kept":
                written.append(torch.full((batch, *shape), NAN, device=device))
                given["kept"] = written[1]
            guided = guide.to(device) if noise_from != "drawn" else None
            module.measure_langevin(
                written[0],
                matrix.to(device),
                cursor().to(device),
                1,
                batch_means,
                x.to(device),
                m.to(device),
                guided,
                **given,
            )
            results.append(written)
        for reference, ours in zip(*results):
            same(ours, reference)


def test_measure_langevin_of_nothing_and_of_nan():
    measured = torch.full((2, 2), NAN).to(DEVICE)
    empty = torch.empty((2, 0), device=DEVICE)
    kernels.measure_langevin(measured, table_of().to(DEVICE), cursor().to(DEVICE), 1, False, empty, empty)
    assert measured.tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="needs noise"):
        kernels.measure_langevin(measured, table_of().to(DEVICE), cursor().to(DEVICE), None, False, empty, empty)
    x, m = operands((6,), 2, 2)
    m[0, 1] = NAN
    expected, matrix = torch.full((2, 2), NAN), table_of(**LANGEVIN)
    row.measure_langevin(expected, matrix, cursor(), 1, False, x, m)
    kernels.measure_langevin(measured, matrix.to(DEVICE), cursor().to(DEVICE), 1, False, x.to(DEVICE), m.to(DEVICE))
    same(measured, expected)


@pytest.mark.parametrize("batch", [3, 5, 6, 7, 9, 10, 11, 13, 1030])
def test_measure_langevin_of_a_batch(batch):
    x, m = operands((2,), batch, 2)
    # into float64, which hides no rounding of the tree
    matrix, expected = table_of(**LANGEVIN), torch.full((batch, 2), NAN, dtype=torch.float64)
    ours = expected.clone().to(DEVICE)
    row.measure_langevin(expected, matrix, cursor(), 1, True, x, m)
    kernels.measure_langevin(ours, matrix.to(DEVICE), cursor().to(DEVICE), 1, True, x.to(DEVICE), m.to(DEVICE))
    same(ours, expected)


@pytest.mark.parametrize("length", [17, 4097, 9001])
def test_sums_of_very_many_blocks(length, monkeypatch):
    """The tree over block sums, which few tests have a sample long enough for."""
    monkeypatch.setattr(reduce, "MOST_SUMS", 256 if length < 5000 else 4096)
    values = torch.randn((2, length), dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    out = torch.full((2,), NAN, dtype=torch.float64, device=DEVICE)
    reduce.finish(*values.shape, reduce.SUM.value).run(values.to(DEVICE), out)
    same(out, row._halve(values))


@pytest.mark.parametrize(("shape", "batch"), SUMS)
def test_perturb_and_dsm_loss(shape, batch):
    x0, output, first, second, weight = operands(shape, batch, 2, batch_numbers=3)
    same(
        kernels.perturb(*on_device(x0, first, second, cursor()), 2),
        row.perturb(x0, first, second, cursor(), 2),
    )
    output = output.bfloat16() if batch == 2 else output
    expected = row.dsm_loss(output, x0, first, second, weight, cursor(), 2)
    grads = (first, expected[1], weight, torch.float32)
    on_the_device = (*on_device(*grads[:3]), torch.float32)
    same(kernels.dsm_loss_backward(*on_the_device), row.dsm_loss_backward(*grads))
    for layout in ("contiguous", "channels-last") if len(shape) == 3 else ("contiguous",):
        seen = copied(laid(output, layout), DEVICE)
        ours = kernels.dsm_loss(seen, *on_device(x0, first, second, weight, cursor()), 2)
        for mine, theirs in zip(ours, expected):
            same(mine, theirs)


@pytest.mark.parametrize("kind", ["normal", "rademacher", "given"])
@pytest.mark.parametrize(("shape", "batch"), [*SUMS, ((600,), 2), ((1500,), 2), ((9000,), 1)])
def test_probe_dot(shape, batch, kind):
    value, probe = operands(shape, batch, 2)
    value = value.half() if batch == 3 else value
    given = probe if kind == "given" else None
    expected = row.probe_dot(value, cursor(), 3, kind, given)
    same(kernels.probe_dot(*on_device(value, cursor()), 3, kind, *on_device(given)), expected)


@pytest.mark.parametrize(("shape", "batch"), SUMS)
def test_rk_error(shape, batch):
    x, *stages, h = operands(shape, batch, 8, batch_numbers=1)
    for count in (1, 4, 7) if shape == SEVERAL else (7,):
        b = [0.1, 0.0, 0.25, -0.3, 0.0, 0.55, 0.2][:count]
        e = [0.0, 0.0, 0.02, 0.1, 0.03, -0.04, 1e-3][:count]
        expected = row.rk_error(x, stages[:count], h, b, e, 1e-3, 1e-5)
        ours = kernels.rk_error(*on_device(x), on_device(*stages[:count]), *on_device(h), b, e, 1e-3, 1e-5)
        for mine, theirs in zip(ours, expected):
            same(mine, theirs)


def test_sums_of_nothing():
    """Of no samples, and of samples without elements."""
    for shape in ((0, 3), (2, 0)):
        x, each = torch.empty(shape, device=DEVICE), torch.ones(shape[0], device=DEVICE)
        loss, error = kernels.dsm_loss(x, x, each, each, each, cursor().to(DEVICE), 2)
        same(loss, torch.zeros(shape[0]))
        assert error.shape == x.shape
        same(kernels.probe_dot(x, cursor().to(DEVICE), 3, "normal"), torch.zeros(shape[0], dtype=torch.float64))
        same(kernels.rk_error(x, [x], each, [1.0], [1.0], 1e-3, 1e-3)[1], torch.zeros(shape[0]))
        assert kernels.perturb(x, each, each, cursor().to(DEVICE), 2).shape == x.shape
    assert kernels.timestep_embedding(x[:0, 0:1].flatten(), torch.ones(2, device=DEVICE), 1.0, 4, "sin_cos").shape == (
        0,
        4,
    )


# Embeddings


# between 2⁵² and 2⁵³ quarter turns, where every float64 is whole but not every one is even
EDGES = [sign * 4.2e15 * (1 + k / 50) for k in range(8) for sign in (1, -1)]


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin", "interleaved"])
@pytest.mark.parametrize("channels", [1, 2, 7, 128, 321])
def test_timestep_embedding(order, channels):
    g = torch.Generator().manual_seed(channels)
    t = torch.cat((torch.rand(9, generator=g) * 1000, torch.tensor([0.0, -3.7, 1e30, 5e14, INF, NAN, *EDGES])))
    frequencies = torch.exp(-torch.rand(channels // 2, generator=g) * 9)
    frequencies[:1] = 1.0
    expected = row.timestep_embedding(t, frequencies, 1.7, channels, order)
    same(kernels.timestep_embedding(t.to(DEVICE), frequencies.to(DEVICE), 1.7, channels, order), expected)


# Group normalisation


norms = importlib.import_module("fastdiff.kernels.group_norm")


class Norm(NamedTuple):
    shape: tuple[int, ...]
    groups: int
    last: bool = False  # channels side by side
    dtype: torch.dtype = torch.float32
    weight: str = "each"  # [B, C], part of a wider tensor; "all": [C]; "none"
    silu: bool = True
    mean: float = 0.0  # of numbers whose deviation is 1
    eps: float = 1e-5

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        g = torch.Generator().manual_seed(len(self.shape))
        x, batch, channels = torch.randn(self.shape, generator=g) + self.mean, *self.shape[:2]
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if self.last else x
        both = torch.randn(batch, 2 * channels, generator=g)
        weight, bias = both.chunk(2, 1) if self.weight == "each" else (both[0, :channels], both[0, channels:])
        return x.to(self.dtype), *((None, None) if self.weight == "none" else (weight, bias))

    def exact(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        """In float64, and by differences from the mean: torch's own is not exact where the mean is large."""
        wide = x.double().reshape(len(x), self.groups, -1)
        apart = wide - wide.mean(-1, keepdim=True)
        out = (apart / (apart.square().mean(-1, keepdim=True) + self.eps).sqrt()).reshape(x.shape)
        if weight is not None:
            weight, bias = (v.double().view(-1, x.shape[1], *[1] * (x.ndim - 2)) for v in (weight, bias))
            out = out * weight + bias
        return torch.nn.functional.silu(out) if self.silu else out


NORMS = [
    Norm((2, 32, 24, 24), 2, last=True, dtype=torch.bfloat16),  # blocks, of which the last is partly filled
    Norm((3, 16, 5, 7), 4, mean=1e3),  # several groups in a program
    Norm((1, 6, 64, 64), 2, weight="all", mean=1e3),  # blocks, places apart
    Norm((2, 48, 8, 8), 4, last=True, weight="all", silu=False),  # 12 channels a group
    Norm((2, 64, 8, 8), 16, last=True, dtype=torch.float16, mean=30.0),  # several groups, side by side
    Norm((1, 24, 32, 40), 2, last=True, weight="all", mean=1e5),
    Norm((2, 10, 7, 9), 5, last=True, weight="none"),
    Norm((2, 5, 37), 5, dtype=torch.bfloat16, weight="none", silu=False),
    Norm((2, 12, 3, 4, 6), 3, last=True),
    Norm((2, 12, 3, 4, 6), 3, weight="all", dtype=torch.float16),
    Norm((4, 64), 16, dtype=torch.bfloat16),
    Norm((3, 6, 1, 1), 6, silu=False),  # groups of one number
    Norm((2, 7, 4, 4), 1, last=True, eps=1e-2),
]


def near(case: Norm, ours: torch.Tensor, exact: torch.Tensor) -> None:
    """float32: a sum's roundings, some units of 2⁻²⁴, beside those of exp and a division, two of 2⁻²³ each; then x's dtype, to
    which the interpreter truncates."""
    assert ours.dtype == case.dtype
    rounding = 0.0 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps / (1 if INTERPRETED else 2)
    apart = (ours.cpu().double() - exact).abs() - rounding * exact.abs()
    assert float(apart.max()) <= 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize("case", NORMS)
def test_group_norm(case):
    """Near the exact numbers, in x's layout; a sample's bits are the same without the others, and the second time."""
    given = case.operands()
    x, weight, bias = on_device(*given)
    ours = kernels.group_norm(x, case.groups, weight, bias, case.eps, case.silu)
    assert ours.stride() == x.stride()
    near(case, ours, case.exact(*given))
    for i in range(len(x)):
        mine = [v if v is None or v.ndim == 1 else v[i : i + 1] for v in (weight, bias)]
        assert torch.equal(kernels.group_norm(x[i : i + 1], case.groups, *mine, case.eps, case.silu), ours[i : i + 1])


@pytest.mark.parametrize("last", [True, False])
def test_group_norm_of_very_many_blocks(last, monkeypatch):
    """Whose moments are merged before they are applied, and merged again."""
    monkeypatch.setattr(norms, "TILE", 64)
    monkeypatch.setattr(norms, "MOST_BLOCKS", 1)
    monkeypatch.setattr(norms, "MERGED", 4)
    monkeypatch.setattr(tiles, "_PREPARED", {})
    case = Norm((1, 8, 5, 16), 2, last=last, mean=100.0)
    given = case.operands()
    assert norms.cut(8, 5 * 16, 2, last).blocks > 4
    x, weight, bias = on_device(*given)
    near(case, kernels.group_norm(x, 2, weight, bias, case.eps), case.exact(*given))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("wrong", ["", "is 1.[0-9]e-01 off", "fails: out of registers"])
def test_networks_layer_is_the_kernel_for_plain_numbers(wrong, monkeypatch):
    """And what torch makes of it everywhere else, and where the kernel's answer was wrong."""
    case = Norm((2, 16, 6, 6), 4, last=True, dtype=torch.bfloat16)
    x, *both = on_device(*case.operands())
    arguments = case.groups, *(v.to(x.dtype) for v in both), case.eps
    monkeypatch.setattr(fused, "_prepared", {})
    monkeypatch.setattr(verify, "_refused", {})
    kernel, plain = kernels.group_norm, fused._group_norm(x, *arguments, True)
    ours = kernel(x, *arguments)
    assert not torch.equal(plain, ours)
    if wrong:

        def broken(*given):
            if "fails" in wrong:
                raise RuntimeError("out of registers")
            return kernel(*given).float() + 0.1

        monkeypatch.setattr(kernels, "group_norm", broken)
        with (
            torch.no_grad(),
            pytest.warns(RuntimeWarning, match=f"not used on .*group_norm of torch.bfloat16 .* {wrong}"),
        ):
            assert torch.equal(fused.group_norm(x, *arguments), plain)
        with torch.no_grad():
            assert torch.equal(fused.group_norm(x, *arguments), plain)  # without asking again
        return
    gaps = x[:, :, ::2]
    with torch.no_grad():
        for each in (x, x[[1, 0]].contiguous(memory_format=torch.channels_last)):  # of one kind
            assert torch.equal(fused.group_norm(each, *arguments), kernel(each, *arguments))
        assert len(fused._prepared) == 1
        assert torch.equal(fused.group_norm(gaps, *arguments), fused._group_norm(gaps, *arguments, True))
        with torch.autocast(x.device.type, torch.bfloat16):
            assert torch.equal(fused.group_norm(x, *arguments), plain)
        assert "group_norm" in str(torch.jit.trace(lambda x: fused.group_norm(x, *arguments), x).graph)
    assert torch.equal(fused.group_norm(x, *arguments), plain)  # of which somebody may want a derivative


@pytest.mark.parametrize("name", ["UNet", "ddpmpp", "adm"])
def test_whole_networks_are_what_torch_makes_of_them(name, monkeypatch):
    """Of three samples without labels, whose scales and shifts are one row expanded."""
    options = {"channels": 16, "multipliers": (1, 2), "attention": ()}
    options |= {"head_channels": 16, "groups": 8, "out_channels": None} if name == "adm" else {}
    torch.manual_seed(0)
    net = getattr(fastdiff.networks, name)((3, 8, 8), **options).eval().to(DEVICE)
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, 0.1) if p.ndim < 2 or not p.any() else None
    model = fastdiff.ScoreModel(net, "vp", "eps", data_shape=(3, 8, 8))
    monkeypatch.setattr(fused, "_prepared", {})
    x = torch.randn(3, 3, 8, 8, device=DEVICE)
    with torch.no_grad():
        ours = model(x, torch.tensor(0.5, device=DEVICE))
        assert any(fused._prepared.values())  # some were asked, and are used
        monkeypatch.setattr(
            fused, "group_norm", lambda x, g, w, b, eps, silu=True: fused._group_norm(x, g, w, b, eps, silu)
        )
        plain = model(x, torch.tensor(0.5, device=DEVICE))
    assert not torch.equal(ours, plain)  # as one is the kernel's
    assert (ours - plain).abs().max() < 1e-4 * plain.abs().max()


if not ON_HOST:

    def test_group_norm_is_captured():
        """And a graph's second run is of the numbers that x has by then."""
        for case in NORMS[:2]:
            x, weight, bias = on_device(*case.operands())
            run = lambda: kernels.group_norm(x, case.groups, weight, bias, case.eps)  # noqa: B023, E731
            run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run()
            x.copy_(x.flip(0) + 1)
            graph.replay()
            assert torch.equal(out, run())


@pytest.fixture
def narrow_grid(monkeypatch):
    """The grid's second dimension counts only two samples, but on a device, which has the time for more."""

    def forget():  # Triton refuses a kernel whose constants have changed
        for name in sys.modules if ON_HOST else ():
            for function in vars(sys.modules[name]).values() if name.startswith("fastdiff.kernels.") else ():
                if isinstance(function, triton.runtime.JITFunction):
                    function.hash, function.used_global_vals = None, {}
                    function.device_caches.clear()

    forget()
    with monkeypatch.context() as patch:
        if ON_HOST:
            patch.setattr(tiles, "SPAN", tl.constexpr(2))
        yield
    forget()


@pytest.mark.usefixtures("narrow_grid")
def test_a_batch_that_fills_the_grid():
    """More samples than a grid's second dimension counts, of which the last is not finite, and programs beyond them."""
    # of the 33 million numbers of a device's grid, plain PyTorch would take half a minute; the library has its bits
    oracle = row if ON_HOST or not cpu.available else cpu
    batch = tiles.SPAN.value + 1
    x, m, first, second, weight = operands((1025,), batch, 2, batch_numbers=3)
    measured = torch.stack((first, second), 1)
    measured[-1, 1] = NAN
    matrix, out = table_of(a=0.9, q=1.0), torch.full_like(x, NAN)
    flags, ours = torch.full((2 * batch,), 9), torch.full_like(x, NAN).to(DEVICE)
    mine = flags.clone().to(DEVICE)
    oracle.step(out, matrix, cursor(), 1, x, m, measured=measured, first_bad=flags[:batch])
    kernels.step(
        ours, *on_device(matrix, cursor()), 1, *on_device(x, m), measured=measured.to(DEVICE), first_bad=mine[:batch]
    )
    same(ours, out)
    same(mine, flags)
    assert flags[batch - 1] == CURSOR[0]
    noisy = on_device(x, first, second, cursor())
    same(kernels.perturb(*noisy, 2), oracle.perturb(x, first, second, cursor(), 2))
    expected = oracle.dsm_loss(m, x, first, second, weight, cursor(), 2)
    for a, b in zip(kernels.dsm_loss(*on_device(m, x, first, second, weight, cursor()), 2), expected):
        same(a, b)


# Addresses beyond 2³¹


@triton.jit
def where(out, size, batch, GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr):
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    program = tl.program_id(0) + tl.num_programs(0) * tl.program_id(1)
    tl.store(out + 4 * program, at.first)
    tl.store(out + 4 * program + 1, at.start)
    there = tiles.pointers(out, at).to(tl.int64) - out.to(tl.int64)
    tl.store(out + 4 * program + 2, tl.max(there, axis=0) // 8)
    tl.store(out + 4 * program + 3, tl.sum(at.inside.to(tl.int32), axis=0).to(tl.int64))


@pytest.mark.parametrize("numel", [2**31 + 64, 2**31 + 67, 2**30 + 64, 2**30 + 67])
def test_offsets_pass_two_to_the_31(numel):
    """Without the memory: GROUPS only says how far the next program's elements are."""
    groups, whole = 2**20, numel % 4 == 0
    out = torch.zeros((3, 3, 4), dtype=torch.int64, device=DEVICE)
    size = numel // 4 if whole else numel
    tiles.launch(where, (3, 3), out, out, size, 3, GROUPS=groups, QUADS=256, SAMPLES=1, WHOLE=whole)
    for sample, block in itertools.product(range(3), range(3)):
        start = block * groups * 1024
        left = max(0, min(1024, numel - start))
        assert out[sample, block].tolist() == [sample, start, sample * numel + start + 1023, left]


@pytest.mark.parametrize("layout", ["rows", "channels-last"])
def test_an_operand_whose_samples_are_2_to_the_30_apart(tmp_path: Path, layout):
    apart, length = 2**30 + 16, 2**31 + 64
    if ON_HOST:  # a sparse file: no memory
        path = tmp_path / "m"
        with path.open("wb") as file:
            file.truncate(2 * length)
        storage = torch.from_file(str(path), shared=True, size=length, dtype=torch.bfloat16)
    else:
        storage = torch.zeros(length, dtype=torch.bfloat16, device=DEVICE)
    inner = (4, 2, 1) if layout == "rows" else (1, 6, 3)
    shape = (3, 3, 2, 2)
    m = storage.as_strided(shape, (apart, *inner))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    m.copy_(values)
    matrix = table_of(a=1.0, b0=1.0, q=1.0)
    x = torch.zeros(shape).to(DEVICE)
    out = torch.full_like(x, NAN)
    kernels.step(out, matrix.to(DEVICE), cursor().to(DEVICE), None, x, m)
    same(out, values.float())


# Alignment, and reading nothing that is not asked for


def test_signatures_are_the_references():
    for name in kernels.__all__:
        if name in ("KEEPS_NOISE", "group_norm_fits", "prepare_group_norm"):
            continue
        meant = fused if name == "group_norm" else row
        ours, theirs = inspect.signature(getattr(kernels, name)), inspect.signature(getattr(meant, name))
        assert str(ours) == str(theirs), name


@pytest.mark.parametrize("k", [-1, 4, 2**40])
def test_a_row_that_the_table_lacks_leaves_nan(k):
    """It is not read: what lies before and behind the table is finite."""
    room = torch.ones((6, len(table.COLUMNS)), device=DEVICE)
    x = torch.randn(2, 300, device=DEVICE)
    out, measured = torch.zeros_like(x), torch.zeros((2, 2), device=DEVICE)
    kernels.step(out, room[1:5], cursor(k).to(DEVICE), 1, x, x)
    assert bool(out.isnan().all())
    kernels.measure_langevin(measured, room[1:5], cursor(k).to(DEVICE), 1, False, x, x)
    assert bool(measured.isnan().all())


def test_streams_are_apart():
    """A sample's noise depends on stream, draw, sample and seed, and on nothing else of the batch."""
    whole, part = torch.full((4, 5), NAN).to(DEVICE), torch.full((2, 5), NAN).to(DEVICE)
    kernels.normal(whole, cursor(1, 10, 3).to(DEVICE), noise.SAMPLER)
    kernels.normal(part, cursor(1, 12, 3).to(DEVICE), noise.SAMPLER)
    assert torch.equal(whole[2:], part)
    kernels.normal(part, cursor(1, 12, 3).to(DEVICE), noise.PRIOR)
    assert not torch.equal(whole[2:], part)


# --- operands of any strides, operands that are refused -----------------------------------------------------------------


def calls():
    """One call of each operation but those that only fill: (name, tensors that are read, the rest)."""
    x, m, z, base = operands((3, 4, 5), 3, 4)[:4]
    a, b, c = (torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in range(3))
    coefficients = table_of(a=0.5, e=0.3, b0=0.2, b1=0.7, c=0.4, q=1.0, gain=0.05, cap=INF)

    yield (
        "step",
        (x, m, z, base, z, torch.stack((a, b), 1)),
        lambda ops, out, x, m, h, base, z, measured: ops.step(
            out, coefficients, cursor(), None, x, m, [h], None, None, base, z, measured
        ),
    )
    yield (
        "measure",
        (x, m, z),
        lambda ops, out, x, m, z: ops.measure_langevin(out, coefficients, cursor(), None, False, x, m, None, z),
    )
    yield "perturb", (x, a, b), lambda ops, x, a, b: ops.perturb(x, a, b, cursor(), 2)
    yield "dsm_loss", (m, x, a, b, c), lambda ops, m, x, a, b, c: ops.dsm_loss(m, x, a, b, c, cursor(), 2)[0]
    yield "probe_dot", (x, z), lambda ops, x, z: ops.probe_dot(x, cursor(), 3, "normal", z)
    yield (
        "rk_error",
        (x, m, z, a),
        lambda ops, x, m, z, a: ops.rk_error(x, [m, z], a, [0.4, 0.6], [0.1, -0.1], 1e-3, 1e-3)[1],
    )
    yield "embedding", (a, b), lambda ops, a, b: ops.timestep_embedding(a, b, 3.0, 6, "sin_cos")


def turned(value):
    """The same numbers, the axes in memory in the opposite order, from an odd place on."""
    axes = range(value.ndim - 1, -1, -1)
    room = value.new_full((value.numel() * 2 + 1,), NAN)[1::2]
    return room.view([value.shape[i] for i in axes]).permute(*axes).copy_(value)


@pytest.mark.skipif(not ON_HOST, reason="builds its operands on the CPU")
@pytest.mark.parametrize(("name", "read", "run"), list(calls()), ids=lambda v: v if isinstance(v, str) else "")
def test_operands_have_any_strides(name, read, run):
    wrote = {"step": lambda: torch.full((3, 3, 4, 5), NAN), "measure": lambda: torch.full((3, 2), NAN)}.get(name)

    def result(ops, values):
        if wrote is None:
            return run(ops, *values)
        out = wrote()
        run(ops, out, *values)
        return out

    expected = result(row, read)
    same(result(kernels, [turned(value) for value in read]), expected)


def test_flags_end_with_the_batch():
    """Programs of several samples draw noise beyond the batch too, here so large that it is infinite."""
    x, flags = torch.zeros(3, 2, device=DEVICE), torch.full((8,), 9, device=DEVICE)
    for seed in range(8):
        out = torch.empty_like(x)
        coefficients = table_of(a=1.0, c=3e38, q=1.0).to(DEVICE)
        kernels.step(out, coefficients, cursor(seed=seed).to(DEVICE), 1, x, first_bad=flags[:3])
    assert bool((flags[3:] == 9).all())
    assert bool((flags[:3] < 9).any())


def test_what_would_be_misread_is_refused():
    x, one = torch.zeros(3, 8, device=DEVICE), torch.ones(1, device=DEVICE)
    at, coefficients = cursor().to(DEVICE), table_of(a=1.0).to(DEVICE)
    refused = [
        lambda: kernels.normal(torch.zeros(8, 3, device=DEVICE).T, at, 1),
        lambda: kernels.normal(x.double(), at, 1),
        lambda: kernels.perturb(x, one, one, at, 2),
        lambda: kernels.dsm_loss(x, x, one, one, one, at, 2),
        lambda: kernels.rk_error(x, [x], one.expand(3), [1.0, 2.0], [1.0], 1e-3, 1e-3),
        lambda: kernels.rk_error(x, [x], one, [1.0], [1.0], 1e-3, 1e-3),
        lambda: kernels.timestep_embedding(one, torch.ones(8, device=DEVICE), 1.0, 8, "sin_cos"),
        lambda: kernels.timestep_embedding(one, torch.ones(4, device=DEVICE), 1.0, 8, "foo"),
        lambda: kernels.probe_dot(x, at, 3, "gaussian"),
        lambda: kernels.step(x.clone(), coefficients, at, None, x, net_input=x[:, :1]),
        lambda: kernels.step(x.clone(), coefficients, at, None, x, x, pushed=torch.zeros(8, 3, device=DEVICE).T),
        lambda: kernels.step(x.clone(), coefficients, at, None, x, known=x, mask=x),
        lambda: kernels.step(x.clone(), coefficients, at, None, x, first_bad=torch.zeros(2, device=DEVICE)),
        lambda: kernels.group_norm(x[:, ::2], 2, None, None, 1e-5),
        lambda: kernels.group_norm(x, 3, None, None, 1e-5),
        lambda: kernels.group_norm(x.double(), 2, None, None, 1e-5),
        lambda: kernels.group_norm(x, 2, x[:2], None, 1e-5),
        lambda: kernels.group_norm(x, 2, None, torch.ones(8, device="meta"), 1e-5),
    ]
    for call in refused:
        with pytest.raises((TypeError, ValueError)):
            call()


def test_products_and_sums_are_never_contracted():
    """The launch option that keeps a compiler from fusing them."""
    seen = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.update(options)

    inspect.unwrap(tiles.launch)(Kernel(), (1,), torch.zeros(1))
    assert seen["enable_fp_fusion"] is False


if COMPILED:

    @pytest.mark.parametrize("fault", [*COMPILED.FAULTS][1:])
    def test_planted_faults_are_found(fault):
        """What a compiler or a slip could do; unplanted, the same calls pass."""
        many = {
            "shape": (5, 3, 31, 12),
            "m": "channels-last",
            "net_input": "contiguous",
            "first_bad": "finite",
            "clip": (-0.7, 0.9),
        }
        half = {"m_dtype": torch.bfloat16, "net_dtype": torch.bfloat16}
        x0, first, second, weight = operands((3, 11, 31), 4, 1, batch_numbers=3)

        def calls():
            run_step({**PLAIN, **many})
            run_step({**PLAIN, **many, **half, "shape": (4, 130)})
            expected = row.dsm_loss(x0, x0, first, second, weight, cursor(), 2)
            for mine, theirs in zip(kernels.dsm_loss(x0, x0, first, second, weight, cursor(), 2), expected):
                same(mine, theirs)

        calls()
        with COMPILED.planted(fault), pytest.raises(AssertionError):
            calls()

    def test_what_has_no_machine_code_is_apart_in_the_cache():
        """A launch on a device of the same kind, which shares Triton's cache, would find no code to load."""
        without = triton.compiler.make_backend(triton.runtime.driver.active.get_current_target())
        assert without.hash() != super(type(without), without).hash()


# --- whole runs ------------------------------------------------------------------------------------------------------

RUNS = [
    ("vp", "euler_maruyama", 8), ("vp", "reverse_diffusion", 8), ("vp", "ode", 8), ("vp", "heun", 4), ("vp", "ddim", 8),
    ("vp", samplers.Heun(s_churn=3.0), 3), ("ve", "pc", 4), ("ddpm", "ancestral", 8), ("ve", "ula", 8),
    ("ncsn", samplers.AnnealedLangevin(steps_per_level=4), 8),
    ("ve", samplers.PredictorCorrector(corrector="langevin", norm="sample"), 4),
    ("subvp", samplers.PredictorCorrector(corrector="langevin", norm="batch"), 4),
    ("edm", "lms", 6), ("vp", samplers.SA(3, 4), 6), ("vp", samplers.DPMSolver(3), 3), ("ve", "dpmpp_sde", 4),
]  # fmt: skip


@pytest.mark.parametrize(("sde", "sampler", "steps"), RUNS, ids=str)
def test_every_solver_runs_to_the_bit(sde, sampler, steps):
    """About eight rows of each, from names to samples, clamped predictions and a learned variance among them."""
    cases = [{"prediction": "score"}]
    if sampler == "ancestral":
        learned = samplers.Ancestral(variance="learned_range")
        cases = [{"prediction": "eps", "clip": (-0.5, 0.5)}, {"prediction": "eps", "sampler": learned}]
    for options in cases:
        double = isinstance(options.get("sampler"), samplers.Ancestral)

        def model(x, t, double=double):
            x = x.clamp(-2, 2) / -2  # exactly the same on every device
            return torch.cat((x, x), 1) if double else x

        options = {"sde": sde, "sampler": sampler, "steps": steps, "shape": (3, 50), "num_samples": 3, **options}
        expected = fastdiff.sample(model, backend="reference", **options)
        ours = fastdiff.sample(model, backend="triton", device=DEVICE, **options)
        same(ours, expected)
