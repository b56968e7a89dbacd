"""Cases of the operations that the tests of several backends share: operands of `step` in every combination, dtype and layout;
and the operations as torch's dispatcher sees them."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace

import torch

from fastdiff.execution import ops
from fastdiff.table import COLUMNS

CURSOR = (2, 7, -(2**62) - 12345)  # row, first sample, seed
INF, NAN = math.inf, math.nan


def cursor(draw=CURSOR[0], first=CURSOR[1], seed=CURSOR[2]):
    return torch.tensor([draw, first, seed])


def table_of(dtype=torch.float32, **columns):
    """A table of which the cursor's row has these coefficients, and the other rows are NaN."""
    matrix = torch.full((4, len(COLUMNS)), NAN, dtype=dtype)
    line = {**dict.fromkeys(COLUMNS, 0.0), "low": -INF, "high": INF, "next_scale": 1.0, "guidance": 1.0, **columns}
    matrix[CURSOR[0]] = torch.tensor([line[name] for name in COLUMNS], dtype=torch.float64)
    return matrix


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


def values_first(cases):
    """The same cases, those first that have values which none before them has."""
    left, seen, ordered = list(cases), set(), []
    while left:
        best = max(left, key=lambda case: sum((name, str(value)) not in seen for name, value in case.items()))
        left.remove(best)
        seen |= {(name, str(value)) for name, value in best.items()}
        ordered.append(best)
    return ordered


LAYOUTS = (
    "contiguous", "channels-last", "sliced", "sliced channels-last", "permuted", "padded rows", "strided", "odd offset",
    "one for all", "one for all pixels", "one for all channels",
)  # fmt: skip


def laid(values, layout):
    """The same numbers [B, *] in other memory, of which what lies between them is NaN (True); "one for all …" repeats the
    first of them. What a shape does not have stays contiguous."""
    poison = torch.full_like(values, True if values.dtype == torch.bool else NAN)
    many_axes = values.ndim > 2
    if layout == "channels-last" and many_axes:
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":  # the first half of the channels of a larger output, as with learned variance
        return torch.cat((values, poison), 1)[:, : values.shape[1]]
    if layout == "sliced channels-last" and many_axes:
        return laid(torch.cat((poison, values), 1), "channels-last")[:, values.shape[1] :]
    if layout == "permuted":
        axes = tuple(range(values.ndim))[::-1]
        return values.permute(axes).contiguous().permute(axes)
    if layout == "padded rows":
        return torch.cat((values, poison), -1)[..., : values.shape[-1]]
    if layout == "strided":
        return torch.stack((poison, values), -1)[..., 1]
    if layout == "odd offset":
        return torch.cat((poison.new_ones(1), values.flatten()))[1:].view(values.shape)
    if layout == "one for all":  # samples
        return values[:1].expand(values.shape)
    if layout == "one for all pixels" and many_axes:
        return values[(slice(None), slice(None), *[slice(0, 1)] * (values.ndim - 2))].expand(values.shape)
    if layout == "one for all channels":
        return values[:, :1].expand(values.shape)
    return values.contiguous()


SPREAD = ("contiguous", "channels-last", "permuted", "sliced", "padded rows", "strided")  # each element has its memory

# What a step may be asked to do; a backend's tests replace what it has less of, or is slow at.
STEP = {
    "dtype": (torch.float32, torch.float64),
    "shape": (
        (1, 1), (3, 1), (37, 2), (4096, 2), (7, 3), (300, 3), (4, 5), (3, 127), (5, 4, 8, 8), (3, 255), (2, 1023), (2, 1024),
        (2, 1025), (2, 2047), (1, 4096), (3, 2, 1031), (2, 5003), (2, 3, 32, 32), (2, 2, 3, 4, 5), (0, 4), (3, 0), (1500, 1),
    ),
    "x": LAYOUTS,
    "m": (None, *LAYOUTS),
    "m_dtype": ("state", torch.bfloat16, torch.float16),
    "guide": (None, *LAYOUTS),
    "history": (0, 1, 2, 3, 4),
    "base": (False, True),
    "others": LAYOUTS,  # of base, history and z
    "clip": (None, (-0.7, 0.9)),
    "convert": (False, True),
    "noise": ("drawn", "given", None),
    "v": (None, None, "contiguous", "sliced channels-last"),
    "measured": (False, False, True),
    "mask": (None, None, *LAYOUTS),
    "pushed": (False, True),
    "net_input": (None, *SPREAD),
    "net_dtype": ("state", torch.bfloat16, torch.float16),
    "first_bad": (None, "finite", "infinite prediction", "NaN prediction", "infinite state"),
    "zero": ("none", "a", "b", "c", "a p known", "e history", "q", "all"),
    "in_place": (False, True),
}  # fmt: skip
# a case without anything special, to be changed: {**PLAIN, "history": 2}
PLAIN = {
    "dtype": torch.float32, "shape": (2, 300), "x": "contiguous", "m": "contiguous", "m_dtype": "state", "guide": None,
    "history": 0, "base": False, "others": "contiguous", "clip": None, "convert": False, "noise": "drawn", "v": None,
    "measured": False, "mask": None, "pushed": False, "net_input": None, "net_dtype": "state", "first_bad": None,
    "zero": "none", "in_place": False,
}  # fmt: skip
_ZERO = {
    "none": (), "a": ("a",), "b": ("b0",), "c": ("c", "log_slope", "known_sigma"), "a p known": ("a", "p", "known_alpha"),
    "e history": ("e", "b1", "b2", "b3"), "q": ("q",),
}  # fmt: skip


def step_case(case, seed=0):
    """(table, stream, operands, written) of a case: `operands` are read, those of `written` are to be written, NaN now.

    An operand is NaN if the coefficients that multiply it are all 0: then nobody may look at it.
    """
    g = torch.Generator().manual_seed(seed)
    dtype, shape, has_m = case["dtype"], case["shape"], case["m"] is not None
    of = lambda kind: dtype if kind == "state" else kind  # noqa: E731
    low, high = case["clip"] or (-INF, INF)
    columns = {
        "a": 0.93, "e": -0.4, "b0": 0.31, "b1": -1.2, "b2": 0.7, "b3": 0.11, "c": 0.52, "p": 1.3 if case["convert"] else 0.0,
        "q": -0.8 if case["convert"] else 1.0, "low": low, "high": high, "next_scale": 0.77, "guidance": 2.5,
        "log_slope": 0.6, "log_mid": -1.1, "known_alpha": 0.8, "known_sigma": 0.6,
    }  # fmt: skip
    kept = ("low", "high", "next_scale")
    zero = _ZERO.get(case["zero"], [name for name in columns if name not in kept])
    columns |= dict.fromkeys(zero, 0.0)

    def operand(*coefficients, dtype=dtype):
        values = torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        return torch.full_like(values, NAN) if set(coefficients) <= set(zero) else values

    x = operand("a", "p") if has_m else operand("a")
    read = {}
    if has_m:
        m = operand("q", dtype=of(case["m_dtype"]))
        if m.numel() and case["first_bad"] == "infinite prediction":
            m.view(-1)[-1] = -INF
        if m.numel() and case["first_bad"] == "NaN prediction":
            m.view(-1)[0] = NAN
        read["m"] = laid(m, case["m"])
        if case["guide"] is not None:
            read["guide"] = laid(operand("q", dtype=of(case["m_dtype"])), case["guide"])
    if len(x) and x[0].numel() and case["first_bad"] == "infinite state":
        x[-1].view(-1)[0] = INF
    read["x"] = laid(x, "contiguous" if case["in_place"] else case["x"])
    history = range(has_m, min(case["history"] + has_m, 4))
    read["history"] = [laid(operand(f"b{j}"), case["others"]) for j in history]
    read["base"] = laid(operand("e"), case["others"]) if case["base"] else None
    if case["noise"] == "given":
        read["z"] = laid(operand(), case["others"])
    if case["v"] is not None:
        read["v"] = laid(operand("log_slope", dtype=of(case["m_dtype"])), case["v"])
    if case["measured"]:
        read["measured"] = torch.rand((len(x), 2), generator=g, dtype=torch.float64).to(dtype)
    if case["mask"] is not None:
        read["mask"] = laid(torch.rand(shape, generator=g) < 0.5, case["mask"])
        read["known"] = laid(operand("known_alpha"), case["mask"])
    written = {"out": torch.full(shape, NAN, dtype=dtype)}
    if case["pushed"] and has_m:
        written["pushed"] = torch.full(shape, NAN, dtype=dtype)
    if case["net_input"] is not None:
        written["net_input"] = laid(torch.full(shape, NAN, dtype=of(case["net_dtype"])), case["net_input"])
    if case["first_bad"] is not None:
        written["first_bad"] = torch.full((len(x),), 9)
        written["first_bad"][:1] = 1
    return table_of(dtype, **columns), 1 if case["noise"] == "drawn" else None, read, written


def copied(tensors, device="cpu"):
    """The same tensors, or lists of them, in new memory of the same layout."""
    if isinstance(tensors, dict):
        return {name: copied(value, device) for name, value in tensors.items()}
    if isinstance(tensors, list):
        return [copied(value, device) for value in tensors]
    if not isinstance(tensors, torch.Tensor):
        return tensors
    # all the memory behind a view, the gaps between its elements included
    size = tensors.untyped_storage().nbytes() // tensors.element_size()
    whole = tensors.as_strided((size,), (1,), 0).to(device, copy=True)
    return whole.as_strided(tensors.shape, tensors.stride(), tensors.storage_offset())


def preparing(step):
    """A backend's prepare_step, made of its step."""

    def prepare_step(out, table, stream, x, **operands):
        return lambda cursor, m, v: step(out, table, cursor, stream, x, m, v=v, **operands)

    return prepare_step


def dispatched(**replaced):
    """The operations as torch's dispatcher, and so a dispatch mode, sees them; backends call them past it."""
    names = {name: getattr(torch.ops.fastdiff, name) for name in ops.SCHEMAS} | replaced
    return SimpleNamespace(**{"KEEPS_NOISE": True, "prepare_step": preparing(names["step"]), **names})
