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
    sum_kernel,
)
from .step import CAP, GAIN, HIGH, LOW, WIDTH, clamp, load, prediction


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def measure_kernel(
    sums, table, cursor, stream, x, m, guide, z, kept,
    m_sample, m_outer, m_inner, guide_sample, guide_outer, guide_inner, size, batch, blocks,
    INNER: tl.constexpr, GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """sums [2, B, blocks] ← block sums of z² and of h_0²."""
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    first, start, _, _, inside, near, local = at
    row = table + tl.load(cursor) * WIDTH
    state = load(x + near + local, inside)
    output = load(tiles.address(at, m, m_sample, m_outer, m_inner, INNER, SAMPLES), inside)
    uncond = None
    if guide is not None:
        uncond = load(tiles.address(at, guide, guide_sample, guide_outer, guide_inner, INNER, SAMPLES), inside)
    h = clamp(prediction(row, state, output, uncond), tl.load(row + LOW), tl.load(row + HIGH)).to(tl.float64)
    if z is not None:
        noise = load(z + near + local, inside)
    else:
        quad, quad_row = tiles.quads_of(start, QUADS, SAMPLES)
        noise = philox.normals(cursor, quad, quad_row, first, stream)
    if kept is not None:
        tl.store(kept + near + local, noise, mask=inside)
    noise = noise.to(tl.float64)
    keep_sums(sums, noise * noise, at, batch, blocks, QUADS, SAMPLES)
    keep_sums(sums + batch.to(tl.int64) * blocks, h * h, at, batch, blocks, QUADS, SAMPLES)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def delta_kernel(
    measured, table, cursor, sums, rows, length, half, pitch, divisor,
    ROOT_EACH: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """measured [rows, 2] ← (δ, √(2δ)) from sums of z² (ROOT_EACH) or of norms, and, `half` further on, of h_0's."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, ROWS * LENGTH)
    mine, place = tl.program_id(0).to(tl.int64) * ROWS + e // LENGTH, e % LENGTH
    there, exists = sums + mine * pitch + place, (mine < rows) & (place < length)
    noise = halve(tl.load(there, mask=exists, other=0.0), ROWS, LENGTH)
    score = halve(tl.load(there + half, mask=exists, other=0.0), ROWS, LENGTH)
    if ROOT_EACH:
        noise, score = tl.sqrt(noise), tl.sqrt(score)
    else:
        count = tl.broadcast_to(divisor, noise.shape).to(tl.float64)
        noise, score = noise / count, score / count
    coefficients = table + tl.load(cursor) * WIDTH
    ratio = noise / tl.where(score > 0, score, 1.0)
    delta = tl.broadcast_to(tl.load(coefficients + GAIN).to(tl.float64), ratio.shape) * (ratio * ratio)
    cap = tl.broadcast_to(tl.load(coefficients + CAP).to(tl.float64), ratio.shape)
    delta = tl.where(delta > cap, cap, delta)
    delta = tl.where(score > 0, delta, 0.0)
    tl.store(measured + 2 * row, delta.to(measured.dtype.element_ty), mask=row < rows)
    tl.store(measured + 2 * row + 1, tl.sqrt(2 * delta).to(measured.dtype.element_ty), mask=row < rows)


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
    if z is None and stream is None:
        raise ValueError("measure_langevin needs noise: give z or a stream")
    tiles.check_state(table, cursor, measured)
    tiles.check_column(len(x), measured=measured)
    tiles.check_same(x.shape, kept=kept)
    if x.numel() == 0:
        measured.zero_()
        return
    (of_m, inner), count = tiles.view(m, x.shape, None), len(x)
    of_guide, inner = tiles.view(guide, x.shape, inner)
    tiling, blocks = cut_blocks(count, x.numel() // len(x))
    sums = x.new_empty((2 * count, blocks), dtype=torch.float64)
    tiles.launch(
        measure_kernel, tiling.grid, x, sums, table, cursor, None if z is not None else stream,
        tiles.dense(x, x.shape), of_m.value, of_guide.value, tiles.dense(z, x.shape), kept, *of_m[1:], *of_guide[1:],
        blocks=blocks, INNER=inner or 1, **tiling.arguments,
    )  # fmt: skip
    sums = fold(sums)
    half, pitch = count * sums.shape[1], sums.shape[1]
    if batch:
        norms = finish(sums, sums.new_empty(2 * count), ROOT.value).view(2, count)
        if count > 4 * BLOCK_QUADS:
            parts = norms.new_empty((2, -(-count // (4 * BLOCK_QUADS))))
            tile = {"LENGTH": 4 * BLOCK_QUADS, "ROWS": 1}
            tiles.launch(sum_kernel, parts.shape, parts, norms, parts, None, 2, count, 1, MODE=SUM.value, **tile)
            norms = fold(parts)
        sums, half, pitch = norms, norms.shape[1], 0
    tile = rows_of(sums.shape[1])
    tiles.launch(
        delta_kernel, (-(-count // tile["ROWS"]),), x,
        measured, table, cursor, sums, count, sums.shape[1], half, pitch, count, ROOT_EACH=not batch, **tile,
    )  # fmt: skip
