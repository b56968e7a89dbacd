"""Noise by itself: `normal`, `rademacher`, and `perturb`, x_t = α_i·x0 + σ_i·ε (Song et al. 2021, eq. 29)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import philox, tiles

# Nothing is gained by compiling a kernel for each alignment of a shape's numbers, or of a cursor, which is a row of a larger
# tensor.
UNSPECIALISED = ["size", "batch", "stream"]
UNALIGNED = ["cursor", "alpha", "sigma"]

# Sixteen elements share a counter of signs: 128 counters, one a thread, make 2048 elements, which are 4 groups of 512.
SIGN_QUADS = 128


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def normal_kernel(
    out,  # [B, D] float32, contiguous, written
    cursor,  # [3] int64: draw, first sample, seed
    stream,  # the stream of the noise
    size,  # D, or D / 4 if WHOLE
    batch,  # B
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,  # tiles.cut
):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    quad, row = tiles.quads_of(at.start, QUADS, SAMPLES)
    tl.store(tiles.pointers(out, at), philox.normals(cursor, quad, row, at.first, stream), mask=at.inside)


def normal(out: Tensor, cursor: Tensor, stream: int) -> None:
    """Fill out [B, *], contiguous, with standard normals (FDN1)."""
    tiles.call(_fill, (out, cursor), stream, normal_kernel)


def _fill(out: Tensor, cursor: Tensor, stream: int, kernel: Any) -> tiles.Prepared:
    tiles.check_state(out, cursor=cursor)
    if out.numel() == 0:
        return tiles.Prepared(lambda out, cursor: None, None)
    count, numel = len(out), out.numel() // len(out)
    tiling = tiles.cut(count, numel) if kernel is normal_kernel else cut_signs(count, numel)
    launch = tiles.Launch(kernel, tiling.grid, ("out", "cursor"), stream=stream, **tiling.arguments)
    return tiles.Prepared(launch, launch)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def rademacher_kernel(
    out,  # [B, D] float32, contiguous, written
    cursor,  # [3] int64: draw, first sample, seed
    stream,  # the stream of the noise
    size,  # D, or D / 4 if WHOLE
    batch,  # B
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,  # tiles.cut
):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    word = philox.sign_words(cursor, at.start, at.first, stream, QUADS, SAMPLES)
    there, remaining = tiles.pointers(out, at), tiles.left(size, at.start, WHOLE)
    for group in tl.static_range(GROUPS):
        exists = at.inside & (at.j + group * (4 * QUADS) < remaining) if group > 0 else at.inside
        tl.store(there + group * (4 * QUADS), philox.signs(word, group), mask=exists)


def rademacher(out: Tensor, cursor: Tensor, stream: int) -> None:
    """Fill out [B, *], contiguous, with ±1."""
    tiles.call(_fill, (out, cursor), stream, rademacher_kernel)


def cut_signs(batch: int, numel: int) -> tiles.Tiling:
    """The programs of a kernel that draws signs: as many groups as a sample fills, up to four."""
    groups = min(4, 1 << (-(-numel // (4 * SIGN_QUADS)) - 1).bit_length())
    return tiles.cut(batch, numel, SIGN_QUADS, groups)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def perturb_kernel(
    out,  # [B, D] float32, contiguous, written
    x0,  # [B, D] float32, contiguous
    alpha,  # [B], any floating dtype, contiguous
    sigma,  # [B], any floating dtype, contiguous
    cursor,  # [3] int64: draw, first sample, seed
    stream,  # the stream of the noise
    size,  # D, or D / 4 if WHOLE
    batch,  # B
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,  # tiles.cut
):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    quad, row = tiles.quads_of(at.start, QUADS, SAMPLES)
    clean = tl.load(tiles.pointers(x0, at), mask=at.inside, other=0.0)
    noise = philox.normals(cursor, quad, row, at.first, stream)
    scaled = clean * tiles.per_sample(alpha, at, batch, 1, SAMPLES)
    noisy = tl.fma(noise, tiles.per_sample(sigma, at, batch, 1, SAMPLES), scaled)
    tl.store(tiles.pointers(out, at), noisy, mask=at.inside)


def perturb(x0: Tensor, alpha: Tensor, sigma: Tensor, cursor: Tensor, stream: int) -> Tensor:
    """x_t = alpha_i·x0 + sigma_i·ε for x0 [B, *] and alpha, sigma [B]."""
    noisy: Tensor = tiles.call(_perturb, (x0, alpha, sigma, cursor), stream)
    return noisy


def _perturb(x0: Tensor, alpha: Tensor, sigma: Tensor, cursor: Tensor, stream: int) -> tiles.Prepared:
    tiles.check_state(x0.new_empty(x0.shape), cursor=cursor)
    tiles.check_column(len(x0), alpha=alpha, sigma=sigma)
    if x0.numel() == 0:
        return tiles.Prepared(lambda x0, *_: x0.new_empty(x0.shape), None)
    tiling = tiles.cut(len(x0), x0.numel() // len(x0))
    slots = "out", "x0", "alpha", "sigma", "cursor"
    launch = tiles.Launch(perturb_kernel, tiling.grid, slots, stream=stream, **tiling.arguments)

    def run(x0: Tensor, alpha: Tensor, sigma: Tensor, cursor: Tensor) -> Tensor:
        out = x0.new_empty(x0.shape)
        launch(out, x0.contiguous(), alpha.contiguous(), sigma.contiguous(), cursor)
        return out

    return tiles.Prepared(run, launch)
