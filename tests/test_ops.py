"""Every operation of the compiled library against the reference, bit for bit, on every instruction set of this machine."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from fastdiff import native, ops
from fastdiff.reference import row
from fastdiff.table import COLUMNS

SETS = [name for name in native.INSTRUCTION_SETS if native.use(name)]
native.use(None)

SHAPES = [
    (1, 1), (3, 1), (37, 2), (4096, 2), (7, 3), (300, 3), (4, 5), (3, 127), (5, 4, 8, 8), (3, 255), (2, 1023), (2, 1024),
    (2, 1025), (2, 2047), (1, 4096), (3, 2, 1031), (2, 5003), (2, 3, 32, 32), (2, 2, 3, 4, 5), (0, 4), (3, 0), (1500, 1),
]  # fmt: skip


@pytest.fixture(params=SETS)
def instructions(request):
    native.use(request.param)
    yield request.param
    native.use(None)


def same(a, b):
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)) and torch.equal(a.isnan(), b.isnan())


def test_the_library_is_built_from_these_sources():
    assert native.available, native.why
    assert "plain" in SETS


# --- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normal", "rademacher"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_is_the_reference_to_the_bit(instructions, shape, name):
    for seed, draw, first in ((0, 0, 0), (2**64 - 3, 2**32 - 1, 2**32 - 5000), (12345, 999, 17)):
        cursor = ops.cursor(draw, first, seed)
        ours, theirs = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        getattr(native, name)(ours, cursor, 1)
        getattr(row, name)(theirs, cursor, 1)
        assert torch.equal(ours, theirs)
        wide = torch.full(shape, torch.nan, dtype=torch.float64)
        getattr(native, name)(wide, cursor, 1)
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
        native.step(**read, **ours)
        row.step(**read, **theirs)
        for name in ours:
            if case["noise"] == "learned" and case["dtype"] == torch.float64:  # exp() of two libraries
                assert torch.allclose(
                    ours[name].double(), theirs[name].double(), rtol=1e-14, atol=1e-14, equal_nan=True
                ), case
            else:
                assert same(ours[name], theirs[name]), (name, case)
