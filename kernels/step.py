"""`step`: one row of a table, fused: guidance, conversion, clamp, the affine sum, its noise, the next network input.

What it means is fastdiff.execution.reference.step. Only the presence of operands is compiled in; every coefficient is read
from the table's row on the device, so that a captured graph replays with new ones. One instruction a term:
fma(value, factor, total), where a term that is left out becomes fma(0, −0, total), which changes no total at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox, tiles
from .tiles import address

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
UNSPECIALISED = ["size", "batch", "stream"]
UNALIGNED = ["cursor", "table", "measured", "first_bad"]


# Minus zeros are made of bits: Triton 3.6 takes the literal −0.0 for 0.
@triton.jit
def factor(row, column):
    """A coefficient, 0 as −0: then fma(0, −0, total) is total, its sign of zero included."""
    value = tl.load(row + column)
    return (value.to(tl.int32, bitcast=True) | ((value == 0).to(tl.int32) << 31)).to(tl.float32, bitcast=True)


@triton.jit
def used(coefficient, like):
    """Whether a coefficient is not 0, as a mask of the elements of `like`: the interpreter cannot broadcast the truth of
    a scalar float comparison, and the compiler makes one scalar of it."""
    return tl.broadcast_to(coefficient, like.shape) != 0


@triton.jit
def term(total, value, coefficient):
    """total + coefficient·value, left out where the coefficient is 0, whatever the value holds."""
    return tl.fma(tl.where(used(coefficient, value), value, 0.0), coefficient, total)


@triton.jit
def empty_sum(any_term, like):
    """What a chain of terms starts from: −0, to which a first product adds nothing; 0 if there is no term at all."""
    start = (any_term.to(tl.int32) << 31).to(tl.float32, bitcast=True)
    return tl.broadcast_to(start, like.shape)


@triton.jit
def load(pointers, mask):
    """float32 of any floating operand, 0 where the mask is not set."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def prediction(row, x, m, guide):
    """p·x + q·m, m after guidance (guide: None or values)."""
    if guide is not None:
        m = tl.fma(m - guide, tl.zeros_like(m) + tl.load(row + GUIDANCE), guide)
    p, q = factor(row, P), factor(row, Q)
    total = empty_sum((p != 0) | (q != 0), x)
    return term(term(total, x, p), m, q)


@triton.jit
def clamp(value, low, high):
    """Between low and high; NaN stays, and so does the sign of a zero, which the hardware's maximum would order."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def exp(u):
    """e^u by exactly rounded steps, u clamped to [−86, 88]."""
    u = clamp(u, -86.0, 88.0)
    shifted = u * 1.442695 + 12582912.0  # two roundings: the one place that contraction would change
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
def note_bad(first_bad, first, batch, k, extreme, QUADS: tl.constexpr, SAMPLES: tl.constexpr):
    """first_bad ← min(itself, k) for the samples where `extreme` ≥ 0 is infinite or NaN: the largest bits tell."""
    bits = extreme.to(tl.int32, bitcast=True)
    if SAMPLES == 1:
        worst = tl.max(bits, axis=0)
        if (worst >= 0x7F800000) & (first < batch):
            tl.atomic_min(first_bad + first, k, sem="relaxed")
    else:
        worst = tl.max(tl.reshape(bits, [SAMPLES, 4 * QUADS]), axis=1)
        sample = first + tl.arange(0, SAMPLES)
        rows = tl.broadcast_to(k, worst.shape)
        there = (worst >= 0x7F800000) & (sample < batch)
        tl.atomic_min(first_bad + sample, rows, mask=there, sem="relaxed")


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def step_kernel(
    out, table, cursor, stream, x, m, guide, v, base, z, h0, h1, h2, h3, measured, known, mask, pushed, net_input, first_bad,
    m_sample, m_outer, m_inner, guide_sample, guide_outer, guide_inner, v_sample, v_outer, v_inner,
    known_sample, known_outer, known_inner, mask_sample, mask_outer, mask_inner, net_sample, net_outer, net_inner,
    size, batch,
    INNER: tl.constexpr, GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    first, start, _, _, inside, near, local = at
    k = tl.load(cursor)
    row = table + k * WIDTH

    # x and m are read at once, without waiting for the table: a row that uses neither is rare
    state = load(x + near + local, inside)
    if m is not None:
        output = load(address(at, m, m_sample, m_outer, m_inner, INNER, SAMPLES), inside)
        uncond = None
        if guide is not None:
            uncond = load(address(at, guide, guide_sample, guide_outer, guide_inner, INNER, SAMPLES), inside)

    noise = None
    if z is not None:
        noise = load(z + near + local, inside)
    elif stream is not None:
        quad, quad_row = tiles.quads_of(start, QUADS, SAMPLES)
        noise = philox.normals(cursor, quad, quad_row, first, stream)

    a = factor(row, A)
    any_term = a != 0
    if base is not None:
        e = factor(row, E)
        any_term = any_term | (e != 0)
    if (m is not None) | (h0 is not None):
        any_term = any_term | (tl.load(row + B0) != 0)
    if h1 is not None:
        any_term = any_term | (tl.load(row + B0 + 1) != 0)
    if h2 is not None:
        any_term = any_term | (tl.load(row + B0 + 2) != 0)
    if h3 is not None:
        any_term = any_term | (tl.load(row + B0 + 3) != 0)
    if noise is not None:
        any_term = any_term | (tl.load(row + C) != 0)
    # a sample's own factors count as terms, whatever their value
    if (measured is not None) | (v is not None):
        any_term = any_term | (noise is not None)
    if (measured is not None) & ((m is not None) | (h0 is not None)):
        any_term = any_term | (measured is not None)

    total = term(empty_sum(any_term, state), state, a)
    if base is not None:
        total = tl.fma(load(base + near + local, inside & used(e, state)), e, total)

    if measured is not None:
        measured_b = tiles.per_sample(measured, at, batch, 2, SAMPLES)
        measured_c = tiles.per_sample(measured + 1, at, batch, 2, SAMPLES)

    if m is not None:
        raw = prediction(row, state, output, uncond)
        low, high = tl.load(row + LOW), tl.load(row + HIGH)
        clipped = clamp(raw, low, high)
        if first_bad is not None:
            # where it is clamped, what it was before
            lower, upper = tl.broadcast_to(low, raw.shape), tl.broadcast_to(high, raw.shape)
            extreme = tl.where((lower > float("-inf")) | (upper < float("inf")), tl.abs(raw), 0.0)
        if pushed is not None:
            tl.store(pushed + near + local, clipped, mask=inside)
        # a sample's own factor counts even if it is 0
        total = tl.fma(clipped, measured_b, total) if measured is not None else term(total, clipped, factor(row, B0))
    elif h0 is not None:
        if measured is not None:
            total = tl.fma(load(h0 + near + local, inside), measured_b, total)
        else:
            b = factor(row, B0)
            total = tl.fma(load(h0 + near + local, inside & used(b, state)), b, total)
    if h1 is not None:
        b = factor(row, B0 + 1)
        total = tl.fma(load(h1 + near + local, inside & used(b, state)), b, total)
    if h2 is not None:
        b = factor(row, B0 + 2)
        total = tl.fma(load(h2 + near + local, inside & used(b, state)), b, total)
    if h3 is not None:
        b = factor(row, B0 + 3)
        total = tl.fma(load(h3 + near + local, inside & used(b, state)), b, total)

    if noise is not None:
        if measured is not None:
            total = tl.fma(noise, measured_c, total)
        elif v is not None:
            slope = factor(row, LOG_SLOPE)
            fraction = load(address(at, v, v_sample, v_outer, v_inner, INNER, SAMPLES), inside & used(slope, state))
            total = tl.fma(noise, exp(tl.fma(fraction, slope, tl.load(row + LOG_MID))), total)
        else:
            total = term(total, noise, factor(row, C))

    if mask is not None:
        there = address(at, mask, mask_sample, mask_outer, mask_inner, INNER, SAMPLES)
        given = tl.load(there, mask=inside, other=0) != 0
        alpha, sigma = factor(row, KNOWN_ALPHA), factor(row, KNOWN_SIGMA)
        any_known = alpha != 0
        if noise is not None:
            any_known = any_known | (sigma != 0)
        there = address(at, known, known_sample, known_outer, known_inner, INNER, SAMPLES)
        # not only where the mask is set: 128-bit loads are per four elements
        level = tl.fma(load(there, inside & used(alpha, state)), alpha, empty_sum(any_known, total))
        if noise is not None:
            level = term(level, noise, sigma)
        total = tl.where(given, level, total)

    if first_bad is not None:
        size_of = tl.abs(total)
        if m is not None:
            size_of = tl.maximum(size_of, extreme, propagate_nan=tl.PropagateNan.ALL)
        note_bad(first_bad, first, batch, k, size_of, QUADS, SAMPLES)
    if net_input is not None:
        there = address(at, net_input, net_sample, net_outer, net_inner, INNER, SAMPLES)
        scaled = total * tl.load(row + NEXT_SCALE)
        tl.store(there, scaled.to(net_input.dtype.element_ty), mask=inside)
    tl.store(out + near + local, total, mask=inside)


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
    if out.numel() == 0:
        return
    shape, inner = out.shape, None
    tiles.check_state(out, table, cursor)
    tiles.check_same(shape, pushed=pushed, net_input=net_input)
    tiles.check_column(len(out), measured=measured, first_bad=first_bad)
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    # operands without a use are left out, so that no kernel is compiled for them
    guide = guide if m is not None else None
    pushed = pushed if m is not None else None
    v = v if measured is None and (z is not None or stream is not None) else None
    known = known if mask is not None else None
    earlier = [tiles.dense(h, shape) for h in (history or ())]
    slots = [*([None] if m is not None else []), *earlier, None, None, None, None][:4]

    views = []
    for value in (m, guide, v, known, mask, net_input):
        seen, inner = tiles.view(value, shape, inner)
        views.append(seen)
    # what the kernel cannot address it writes densely
    target = views[-1].value
    tiling = tiles.cut(len(out), out.numel() // len(out))
    tiles.launch(
        step_kernel, tiling.grid, out,
        out, table, cursor, None if z is not None else stream, tiles.dense(x, shape),
        views[0].value, views[1].value, views[2].value, tiles.dense(base, shape), tiles.dense(z, shape), *slots,
        None if measured is None else measured.contiguous(), views[3].value, views[4].value, pushed, target, first_bad,
        *(stride for seen in views for stride in seen[1:]),
        INNER=inner or 1, **tiling.arguments,
    )  # fmt: skip
    if net_input is not None and target is not None and target.data_ptr() != net_input.data_ptr():
        net_input.copy_(target)
