"""`step`: one row of a table, fused: guidance, conversion, clamp, the affine sum, its noise, the next network input.

What it means is fastdiff.execution.reference.step. Only the presence of operands is compiled in; every coefficient is read
from the table's row on the device, so that a captured graph replays with new ones. A term is one fma(value, factor, total);
one whose factor is 0 is left out by reading its value as 0, so that an infinity or NaN there changes nothing.

In the kernels' arguments B is the number of samples and D that of a sample's elements; `View` is tiles.View.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox, tiles

# fastdiff.table.COLUMNS (a test compares them)
COLUMNS = (
    "a", "e", "b0", "b1", "b2", "b3", "c", "p", "q", "low", "high", "next_scale", "guidance", "log_slope", "log_mid",
    "known_alpha", "known_sigma", "gain", "cap",
)  # fmt: skip
A, E, B0, C, P, Q, LOW, HIGH, NEXT_SCALE, GUIDANCE, LOG_SLOPE, LOG_MID, KNOWN_ALPHA, KNOWN_SIGMA, GAIN, CAP = (
    tl.constexpr(COLUMNS.index(name)) for name in COLUMNS if name not in ("b1", "b2", "b3")
)
WIDTH = tl.constexpr(len(COLUMNS))

# Not worth a compilation each: numbers of the state's shape, and rows of larger tensors, whose alignment alternates.
UNSPECIALISED = ["size", "batch", "rows", "stream"]
UNALIGNED = ["cursor", "table", "measured", "first_bad"]


@triton.jit
def row_of(table, cursor, rows):
    """(pointer to the cursor's row, its number, whether the table has it): one that it lacks is not read."""
    k = tl.load(cursor)
    there = tl.minimum(tl.maximum(k, 0), rows - 1)
    return table + there * WIDTH, there, there == k


@triton.jit
def used(coefficient, like):
    """Whether a coefficient is not 0, as a mask of the elements of `like`: the interpreter cannot broadcast the truth of
    a scalar float comparison, and the compiler makes one scalar of it."""
    return tl.broadcast_to(coefficient, like.shape) != 0


@triton.jit
def kept(value, coefficient):
    """The value, or 0 where its coefficient is 0: so a term is left out of a sum, whatever the value holds."""
    return tl.where(used(coefficient, value), value, 0.0)


@triton.jit
def load(pointers, mask):
    """float32 of any floating operand, 0 where the mask is not set."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def clamp(value, low, high):
    """Between low and high; NaN stays."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def prediction(row, x, m, guide):
    """(h_0 = clamp(p·x + q·m, low, high), the same before the clamp, whether there is one), m after guidance (guide: None
    or values). p = 0 and q = 1, which leave m as it is, are the most frequent: a branch passes by the two products."""
    if guide is not None:
        m = tl.fma(m - guide, tl.zeros_like(m) + tl.load(row + GUIDANCE), guide)
    p, q, low, high = tl.load(row + P), tl.load(row + Q), tl.load(row + LOW), tl.load(row + HIGH)
    raw = m
    if (p != 0) | (q != 1):
        raw = tl.fma(kept(m, q), q, kept(x, p) * p)
    h0 = raw
    bounded = (low > float("-inf")) | (high < float("inf"))
    if bounded:
        h0 = clamp(raw, low, high)
    return h0, raw, bounded


@triton.jit
def exp(u):
    """e^u by the exactly rounded steps of fastdiff.execution.reference._exp, u clamped to [−86, 88]."""
    u = clamp(u, -86.0, 88.0)
    # Adding 1.5·2²³ rounds to a whole number. The product must be rounded before it: this is the one place where fusing
    # the two would change bits, and a launch forbids it (test_products_and_sums_are_never_contracted).
    shifted = u * 1.442695 + 12582912.0
    n = shifted - 12582912.0
    r = tl.fma(n, -9.0580015e-06, tl.fma(n, -0.6931381, u))
    e = tl.fma(r, 0.0001984127, 0.0013888889)
    e = tl.fma(e, r, 0.008333334)
    e = tl.fma(e, r, 0.041666668)
    e = tl.fma(e, r, 0.16666667)
    e = tl.fma(e, r, 0.5)
    e = tl.fma(e, r, 1.0)
    e = tl.fma(e, r, 1.0)
    whole = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    return e * ((whole + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def largest(value, QUADS: tl.constexpr, SAMPLES: tl.constexpr):
    """The largest bits of |value|, of a program's one sample or of each: from 0x7F800000 on, one is infinite or NaN."""
    bits = tl.abs(value).to(tl.int32, bitcast=True)
    return tl.max(bits, axis=0) if SAMPLES == 1 else tl.max(tl.reshape(bits, [SAMPLES, 4 * QUADS]), axis=1)


@triton.jit
def note_bad(first_bad, first, batch, k, worst, SAMPLES: tl.constexpr):
    """first_bad ← min(itself, k) for the samples whose largest bits are an infinity's or NaN's."""
    if SAMPLES == 1:
        if (worst >= 0x7F800000) & (first < batch):
            tl.atomic_min(first_bad + first, k, sem="relaxed")
    else:
        sample = first + tl.arange(0, SAMPLES)
        rows = tl.broadcast_to(k, worst.shape)
        there = (worst >= 0x7F800000) & (sample < batch)
        tl.atomic_min(first_bad + sample, rows, mask=there, sem="relaxed")


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def step_kernel(
    out,  # [B, D] float32, contiguous, written: the state after the row; may be x
    table,  # [rows, WIDTH] float32, contiguous
    rows,
    cursor,  # [3] int64: the row, the first sample's number, the seed
    stream,  # the stream of the noise; None: none is drawn
    x,  # [B, D] float32, contiguous: the state before the row
    m,  # View of [B, D], any floating dtype: the network's output
    guide,  # View of [B, D], any floating dtype: its output without the condition
    v,  # View of [B, D], any floating dtype: its output for the variance
    base,  # [B, D] float32, contiguous; or None
    z,  # [B, D] float32, contiguous: noise to use instead of the stream's; or None
    history,  # a tuple of up to four [B, D] float32, contiguous: earlier predictions, newest first
    measured,  # [B, 2] float32, contiguous: each sample's b0 and c; or None
    known,  # View of [B, D], any floating dtype: the known part of x_0
    mask,  # View of [B, D], bool: where it is known
    pushed,  # [B, D] float32, contiguous, written: h_0; or None
    net_input,  # View of [B, D], any floating dtype, written: next_scale·out
    first_bad,  # [B] int64, contiguous, lowered to the row where a sample is not finite; or None
    size,  # D, or D / 4 if WHOLE
    batch,  # B
    INNER: tl.constexpr,  # of the Views (tiles.view)
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,  # tiles.cut
):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    row, k, exists = row_of(table, cursor, rows)

    # x and m are read at once, without waiting for the table: a row that uses neither is rare
    state = load(tiles.pointers(x, at), at.inside)
    if m.value is not None:
        output = load(tiles.addresses(m, at, INNER, SAMPLES), at.inside)
        uncond = None
        if guide.value is not None:
            uncond = load(tiles.addresses(guide, at, INNER, SAMPLES), at.inside)

    noise = None
    if z is not None:
        noise = load(tiles.pointers(z, at), at.inside)
    elif stream is not None:
        quad, quad_row = tiles.quads_of(at.start, QUADS, SAMPLES)
        noise = philox.normals(cursor, quad, quad_row, at.first, stream)

    # The factors. Those that are measured are not compared with 0: they are a sample's, not the row's.
    a = tl.where(exists, tl.load(row + A), float("nan"))
    omits = a == 0
    if measured is not None:
        measured_b = tiles.per_sample(measured, at, batch, 2, SAMPLES)
        measured_c = tiles.per_sample(measured + 1, at, batch, 2, SAMPLES)
    if m.value is not None:
        h0, raw, bounded = prediction(row, state, output, uncond)
        if first_bad is not None:
            unclamped = tl.zeros_like(largest(raw, QUADS, SAMPLES))
            if bounded:
                unclamped = largest(raw, QUADS, SAMPLES)
        if pushed is not None:
            tl.store(tiles.pointers(pushed, at), h0, mask=at.inside)
        if measured is not None:
            b0 = measured_b
        else:
            b0 = tl.load(row + B0)
            omits = omits | (b0 == 0)
    if noise is not None:
        if measured is not None:
            c = measured_c
        elif v.value is not None:
            slope = tl.load(row + LOG_SLOPE)
            fraction = load(tiles.addresses(v, at, INNER, SAMPLES), at.inside & used(slope, state))
            c = exp(tl.fma(fraction, slope, tl.load(row + LOG_MID)))
        else:
            c = tl.load(row + C)
            omits = omits | (c == 0)

    part = state
    drawn = noise
    if omits:
        part = kept(state, a)
        if (m.value is not None) & (measured is None):
            h0 = kept(h0, b0)
        if (noise is not None) & (measured is None) & (v.value is None):
            drawn = kept(noise, c)
    total = part * a
    if base is not None:
        e = tl.load(row + E)
        total = tl.fma(load(tiles.pointers(base, at), at.inside & used(e, state)), e, total)
    if m.value is not None:
        total = tl.fma(h0, b0, total)
    for j in tl.static_range(len(history)):
        earlier = tiles.pointers(history[j], at)
        if (measured is not None) & (m.value is None) & (j == 0):
            total = tl.fma(load(earlier, at.inside), measured_b, total)
        else:
            b = tl.load(row + B0 + j + (m.value is not None))
            total = tl.fma(load(earlier, at.inside & used(b, state)), b, total)
    if noise is not None:
        total = tl.fma(drawn, c, total)

    if mask.value is not None:
        is_known = tl.load(tiles.addresses(mask, at, INNER, SAMPLES), mask=at.inside, other=0) != 0
        alpha = tl.load(row + KNOWN_ALPHA)
        # not only where the mask is set: 128-bit loads are per four elements
        clean = load(tiles.addresses(known, at, INNER, SAMPLES), at.inside & used(alpha, state))
        level = clean * alpha
        if noise is not None:
            sigma = tl.load(row + KNOWN_SIGMA)
            level = tl.fma(kept(noise, sigma), sigma, level)
        total = tl.where(is_known, level, total)

    if first_bad is not None:
        worst = largest(total, QUADS, SAMPLES)
        if m.value is not None:
            worst = tl.maximum(worst, unclamped)
        note_bad(first_bad, at.first, batch, k, worst, SAMPLES)
    if net_input.value is not None:
        scaled = total * tl.load(row + NEXT_SCALE)
        there = tiles.addresses(net_input, at, INNER, SAMPLES)
        tl.store(there, scaled.to(net_input.value.dtype.element_ty), mask=at.inside)
    tl.store(tiles.pointers(out, at), total, mask=at.inside)


def step(
    out: Tensor,
    table: Tensor,
    cursor: Tensor,
    stream: int | None,
    x: Tensor,
    m: Tensor | None = None,
    history: Sequence[Tensor] | None = None,
    guide: Tensor | None = None,
    v: Tensor | None = None,
    base: Tensor | None = None,
    z: Tensor | None = None,
    measured: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    pushed: Tensor | None = None,
    net_input: Tensor | None = None,
    first_bad: Tensor | None = None,
) -> None:
    """One row of a table (fastdiff.execution.reference.step), into `out`, which may be x."""
    tensors = out, table, cursor, x, m, guide, v, base, z, measured, known, mask, pushed, net_input, first_bad
    tiles.call(_step, (*tensors, *(history or ())), stream)


# the kernel's tensors in the order in which `step` gives them; the history follows
SLOTS = (
    "out", "table", "cursor", "x", "m", "guide", "v", "base", "z", "measured", "known", "mask", "pushed", "net_input",
    "first_bad",
)  # fmt: skip
MOST_SUMMED = 4  # predictions, this row's among them: the columns b0, b1, b2, b3


def _step(*tensors_and_stream: Any) -> tiles.Prepared:
    """`step`; on operands that must be copied for the kernel, for this once."""
    *tensors, stream = tensors_and_stream
    given = dict(zip(SLOTS, tensors))
    out, table, m = given["out"], given["table"], given["m"]
    if out.numel() == 0:
        return tiles.Prepared(lambda *_: None, None)
    shape = out.shape
    tiles.check_state(out, table=table, cursor=given["cursor"])
    tiles.check_same(shape, pushed=given["pushed"], net_input=given["net_input"])
    tiles.check_column(len(out), measured=given["measured"], first_bad=given["first_bad"])
    if given["mask"] is not None and given["mask"].dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {given['mask'].dtype}")
    # operands without a use are left out, so that no kernel is compiled for them
    if m is None:
        given |= {"guide": None, "pushed": None}
    if given["measured"] is not None or (given["z"] is None and stream is None):
        given["v"] = None
    if given["mask"] is None:
        given["known"] = None
    history = tuple(tensors[len(SLOTS) : len(SLOTS) + MOST_SUMMED - (m is not None)])

    views, inner, placed = {}, None, dict(given)
    for name in ("m", "guide", "v", "known", "mask", "net_input"):
        view, inner = tiles.view(given[name], shape, inner)
        views[name], placed[name] = view._replace(value=None), view.value
    placed |= {name: tiles.dense(given[name], shape) for name in ("x", "base", "z")}
    placed["measured"] = None if given["measured"] is None else given["measured"].contiguous()
    earlier = tuple(tiles.dense(value, shape) for value in history)

    # many operands would take more registers than a thread has
    read = [given[name] for name in ("x", "m", "guide", "v", "base", "z", "known", "mask")]
    few = len(history) + sum(value is not None for value in read) <= 6
    tiling = tiles.cut(len(out), out.numel() // len(out), tiles.QUADS if few else tiles.QUADS // 2)
    slots = [name if value is not None else None for name, value in given.items()]
    absent = dict.fromkeys(("base", "z", "measured", "pushed", "first_bad"))
    launch = tiles.Launch(
        step_kernel, tiling.grid, [*slots, "history"], **absent, **views, rows=len(table),
        stream=None if given["z"] is not None else stream, INNER=inner or 1, **tiling.arguments,
    )  # fmt: skip
    pairs = [*zip(given.values(), placed.values()), *zip(history, earlier)]
    if all(mine is None or mine.data_ptr() == theirs.data_ptr() for theirs, mine in pairs):
        last = len(SLOTS) + len(history)
        return tiles.Prepared(lambda *now: launch(*now[: len(SLOTS)], now[len(SLOTS) : last]), launch)

    def run(*_: Tensor) -> None:
        launch(*placed.values(), earlier)
        if given["net_input"] is not None and placed["net_input"].data_ptr() != given["net_input"].data_ptr():
            given["net_input"].copy_(placed["net_input"])

    return tiles.Prepared(run, None)


def prepare_step(
    out: Tensor, table: Tensor, stream: int | None, x: Tensor, **operands: Any
) -> Callable[[Tensor, Tensor | None, Tensor | None], None]:
    """(cursor, m, v) -> None: `step` on operands that stay the same (fastdiff.execution.reference.prepare_step)."""
    history = tuple(operands.pop("history", None) or ())
    given = {"out": out, "table": table, "x": x, **operands}
    launches: dict[Any, tiles.Launch] = {}

    def run(cursor: Tensor, m: Tensor | None, v: Tensor | None) -> None:
        key = tiles.facts(cursor), tiles.facts(m), tiles.facts(v)
        launch = launches.get(key)
        if launch is not None:
            launch(cursor, m, v)
            return
        now = {**given, "cursor": cursor, "m": m, "v": v}
        tensors = [now.get(name) for name in SLOTS]
        prepared = _step(*tensors, *history, stream)
        prepared.run(*tensors, *history)
        if prepared.last is not None and prepared.last.start is not None:
            read = history[: MOST_SUMMED - (m is not None)]
            launches[key] = prepared.last.fixed(("cursor", "m", "v"), [*tensors, read])

    return run
