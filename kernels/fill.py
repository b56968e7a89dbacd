"""Noise by itself: `normal`, `rademacher`, and `perturb`, x_t = α_i·x0 + σ_i·ε (Song et al. 2021, eq. 29)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import philox, tiles

# Numbers of a state's shape, and a cursor that is a row of a larger tensor: nothing is gained by compiling a kernel for
# each of their alignments.
UNSPECIALISED = ["size", "batch", "stream"]
UNALIGNED = ["cursor", "alpha", "sigma"]

# Sixteen elements share a counter of signs: 128 counters, one a thread, make 2048 elements, which are 4 groups of 512.
SIGN_QUADS = 128


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def normal_kernel(
    out, cursor, stream, size, batch,
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    first, start, _, _, inside, base, local = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    quad, row = tiles.quads_of(start, QUADS, SAMPLES)
    tl.store(out + base + local, philox.normals(cursor, quad, row, first, stream), mask=inside)


def normal(out: Tensor, cursor: Tensor, stream: int) -> None:
    """Fill out [B, *], contiguous, with standard normals (FDN1)."""
    tiles.check_state(out, cursor)
    if out.numel() == 0:
        return
    tiling = tiles.cut(len(out), out.numel() // len(out))
    tiles.launch(normal_kernel, tiling.grid, out, out, cursor, stream, **tiling.arguments)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def rademacher_kernel(
    out, cursor, stream, size, batch,
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    first, start, _, j, inside, base, local = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    word = philox.sign_words(cursor, start, first, stream, QUADS, SAMPLES)
    there = out + base + local
    for group in tl.static_range(GROUPS):
        exists = inside & (j + group * (4 * QUADS) < tiles.left(size, start, WHOLE)) if group > 0 else inside
        tl.store(there + group * (4 * QUADS), philox.signs(word, group), mask=exists)


def rademacher(out: Tensor, cursor: Tensor, stream: int) -> None:
    """Fill out [B, *], contiguous, with ±1."""
    tiles.check_state(out, cursor)
    if out.numel() == 0:
        return
    tiling = cut_signs(len(out), out.numel() // len(out))
    tiles.launch(rademacher_kernel, tiling.grid, out, out, cursor, stream, **tiling.arguments)


def cut_signs(batch: int, numel: int) -> tiles.Tiling:
    """The programs of a kernel that draws signs: as many groups as a sample fills, up to four."""
    groups = min(4, 1 << (-(-numel // (4 * SIGN_QUADS)) - 1).bit_length())
    return tiles.cut(batch, numel, SIGN_QUADS, groups)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def perturb_kernel(
    out, x0, alpha, sigma, cursor, stream, size, batch,
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    first, start, _, _, inside, base, local = at
    quad, row = tiles.quads_of(start, QUADS, SAMPLES)
    clean = tl.load(x0 + base + local, mask=inside, other=0.0)
    noise = philox.normals(cursor, quad, row, first, stream)
    scaled = clean * tiles.per_sample(alpha, at, batch, 1, SAMPLES)
    tl.store(out + base + local, tl.fma(noise, tiles.per_sample(sigma, at, batch, 1, SAMPLES), scaled), mask=inside)


def perturb(x0: Tensor, alpha: Tensor, sigma: Tensor, cursor: Tensor, stream: int) -> Tensor:
    """x_t = alpha_i·x0 + sigma_i·ε for x0 [B, *] and alpha, sigma [B]."""
    out = x0.new_empty(x0.shape)
    tiles.check_state(out, cursor)
    tiles.check_column(len(x0), alpha=alpha, sigma=sigma)
    if out.numel() == 0:
        return out
    tiling = tiles.cut(len(out), out.numel() // len(out))
    x0, alpha, sigma = (value.contiguous() for value in (x0, alpha, sigma))
    tiles.launch(perturb_kernel, tiling.grid, out, out, x0, alpha, sigma, cursor, stream, **tiling.arguments)
    return out
