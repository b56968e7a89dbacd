"""`measure_langevin`: the step size of a Langevin corrector, from norms (Song et al. 2021, Algorithms 4 and 5)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox, tiles
from .reduce import (
    BLOCK_QUADS,
    ROOT,
    SUM,
    UNALIGNED,
    UNSPECIALISED,
    cut_blocks,
    finish,
    fold,
    halve,
    keep_sums,
    rows_of,
    squares,
    sum_kernel,
)
from .step import CAP, GAIN, load, prediction, row_of


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def measure_kernel(
    sums,  # [2, B, blocks] float64, written: block sums of z² and of h_0²
    table,  # [rows, WIDTH] float32, contiguous
    rows,
    cursor,  # [3] int64: the row, the first sample's number, the seed
    stream,  # the stream of the noise; None if z is given
    x,  # [B, D] float32, contiguous: the state
    m,  # View of [B, D], any floating dtype: the network's output
    guide,  # View of [B, D], any floating dtype: its output without the condition
    z,  # [B, D] float32, contiguous: noise to use instead of the stream's; or None
    kept,  # [B, D] float32, contiguous, written: the noise; or None
    size,  # D, or D / 4 if WHOLE
    batch,  # B
    blocks,  # of 1024 elements in a sample
    INNER: tl.constexpr,  # of the Views (tiles.view)
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,  # tiles.cut
):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    row, _, _ = row_of(table, cursor, rows)
    state = load(tiles.pointers(x, at), at.inside)
    output = load(tiles.addresses(m, at, INNER, SAMPLES), at.inside)
    uncond = None
    if guide.value is not None:
        uncond = load(tiles.addresses(guide, at, INNER, SAMPLES), at.inside)
    h, _, _ = prediction(row, state, output, uncond)
    if z is not None:
        noise = load(tiles.pointers(z, at), at.inside)
    else:
        quad, quad_row = tiles.quads_of(at.start, QUADS, SAMPLES)
        noise = philox.normals(cursor, quad, quad_row, at.first, stream)
    if kept is not None:
        tl.store(tiles.pointers(kept, at), noise, mask=at.inside)
    # both sums at once, side by side: they share what the exchanges between threads cost
    both = tl.permute(tl.join(squares(noise, at.inside), squares(h, at.inside)), (1, 0))
    keep_sums(sums, tl.reshape(both, [8 * QUADS * SAMPLES]), at, batch, blocks, 2, QUADS, SAMPLES)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def delta_kernel(
    measured,  # [B, 2] float32 or float64, contiguous, written: (δ, √(2δ))
    table,  # [rows, WIDTH] float32, contiguous
    rows,
    cursor,  # [3] int64: the row, the first sample's number, the seed
    sums,  # float64: partial sums of z² or of its norms at [sample · pitch + i], those of h_0 `half` numbers further on
    batch,  # B
    length,  # how many partial sums make one sum
    half,  # see sums
    pitch,  # from one sample's partial sums to the next one's; 0: all samples share them
    divisor,  # B, by which sums of norms are divided
    ROOT_EACH: tl.constexpr,  # whether they are sums of squares, of which the root is taken, or sums of norms
    LENGTH: tl.constexpr, ROWS: tl.constexpr,  # a program's sums and the width of each (reduce.rows_of)
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, ROWS * LENGTH)
    mine, place = tl.program_id(0).to(tl.int64) * ROWS + e // LENGTH, e % LENGTH
    there, exists = sums + mine * pitch + place, (mine < batch) & (place < length)
    noise = halve(tl.load(there, mask=exists, other=0.0), ROWS, LENGTH)
    score = halve(tl.load(there + half, mask=exists, other=0.0), ROWS, LENGTH)
    if ROOT_EACH:
        noise, score = tl.sqrt(noise), tl.sqrt(score)
    else:
        count = tl.broadcast_to(divisor, noise.shape).to(tl.float64)
        noise, score = noise / count, score / count
    coefficients, _, exists = row_of(table, cursor, rows)
    gain = tl.where(exists, tl.load(coefficients + GAIN), float("nan"))
    ratio = noise / tl.where(score > 0, score, 1.0)
    delta = tl.broadcast_to(gain.to(tl.float64), ratio.shape) * (ratio * ratio)
    cap = tl.broadcast_to(tl.load(coefficients + CAP).to(tl.float64), ratio.shape)
    delta = tl.where(delta > cap, cap, delta)
    delta = tl.where(score > 0, delta, 0.0)
    tl.store(measured + 2 * row, delta.to(measured.dtype.element_ty), mask=row < batch)
    tl.store(measured + 2 * row + 1, tl.sqrt(2 * delta).to(measured.dtype.element_ty), mask=row < batch)


def measure_langevin(
    measured: Tensor,
    table: Tensor,
    cursor: Tensor,
    stream: int | None,
    batch: bool,
    x: Tensor,
    m: Tensor,
    guide: Tensor | None = None,
    z: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """measured [B, 2] ← (δ, √(2δ)) (fastdiff.execution.reference.measure_langevin)."""
    tiles.call(_measure_langevin, (measured, table, cursor, x, m, guide, z, kept), stream, batch)


def _measure_langevin(
    measured: Tensor,
    table: Tensor,
    cursor: Tensor,
    x: Tensor,
    m: Tensor,
    guide: Tensor | None,
    z: Tensor | None,
    kept: Tensor | None,
    stream: int | None,
    batch: bool,
) -> tiles.Prepared:
    if z is None and stream is None:
        raise ValueError("measure_langevin needs noise: pass z or a stream, both are None")
    tiles.check_state(table, cursor=cursor, measured=measured)
    tiles.check_column(len(x), measured=measured)
    tiles.check_same(x.shape, kept=kept)
    if x.numel() == 0:
        return tiles.Prepared(lambda measured, *_: measured.zero_(), None)
    shape, count = x.shape, len(x)
    seen, inner = tiles.view(m, shape, None)
    seen_guide, inner = tiles.view(guide, shape, inner)
    copied, copied_guide = seen.copies(m), seen_guide.copies(guide)
    tiling, blocks = cut_blocks(count, x.numel() // count)
    measure = tiles.Launch(
        measure_kernel, tiling.grid, ("sums", "table", "cursor", "x", "m", "guide", "z", "kept"),
        rows=len(table), stream=None if z is not None else stream, m=seen._replace(value=None),
        guide=seen_guide._replace(value=None), z=None, kept=None, blocks=blocks, INNER=inner or 1, **tiling.arguments,
    )  # fmt: skip
    folded, length = fold(2 * count, blocks)
    half, pitch = count * length, length
    if batch:
        norms_of = finish(2 * count, length, ROOT.value)
        half, pitch, means = count, 0, None
        if count > 4 * BLOCK_QUADS:
            half = -(-count // (4 * BLOCK_QUADS))
            means = tiles.Launch(
                sum_kernel, (2, half), ("values", "out"),
                weight=None, rows=2, length=count, numel=1, MODE=SUM.value, LENGTH=4 * BLOCK_QUADS, ROWS=1,
            )  # fmt: skip
        folded_norms, half = fold(2, half)
        length = half
    tile = rows_of(length)
    delta = tiles.Launch(
        delta_kernel, (-(-count // tile["ROWS"]),), ("measured", "table", "cursor", "sums"),
        rows=len(table), batch=count, length=length, half=half, pitch=pitch, divisor=count, ROOT_EACH=not batch, **tile,
    )  # fmt: skip

    def run(
        measured: Tensor, table: Tensor, cursor: Tensor, x: Tensor, m: Tensor, guide: Tensor | None, z: Tensor | None,
        kept: Tensor | None,
    ) -> None:  # fmt: skip
        sums = x.new_empty((2 * count, blocks), dtype=torch.float64)
        m = tiles.dense(m, shape) if copied else m
        guide = tiles.dense(guide, shape) if copied_guide else guide
        measure(sums, table, cursor, x.contiguous(), m, guide, tiles.dense(z, shape), kept)
        sums = folded(sums)
        if batch:
            norms = sums.new_empty((2, count))
            norms_of.run(sums, norms)
            if means is not None:
                parts = norms.new_empty(means.grid)
                means(norms, parts)
                norms = parts
            sums = folded_norms(norms)
        delta(measured, table, cursor, sums)

    return tiles.Prepared(run, delta)
