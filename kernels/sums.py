"""`dsm_loss` (Vincent 2011), `probe_dot` (Hutchinson 1990), `rk_error` (Hairer, Nørsett & Wanner): sums over samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox, tiles
from .fill import cut_signs
from .reduce import LOSS, RMS, SUM, UNALIGNED, UNSPECIALISED, cut_blocks, finish, halve, keep_sums, squares
from .step import load


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def dsm_kernel(
    error,  # [B, D] float32, contiguous, written: output − r·x0 − w·ε
    sums,  # [B, blocks] float64, written: block sums of its square
    output,  # View of [B, D], any floating dtype: the network's
    x0,  # [B, D] float32, contiguous
    r,  # [B], any floating dtype, contiguous
    w,  # [B], any floating dtype, contiguous
    cursor,  # [3] int64: draw, first sample, seed
    stream,  # the stream of the noise
    size,  # D, or D / 4 if WHOLE
    batch,  # B
    blocks,  # of 1024 elements in a sample
    INNER: tl.constexpr,  # of the View (tiles.view)
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,  # tiles.cut
):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    clean = load(tiles.pointers(x0, at), at.inside)
    prediction = load(tiles.addresses(output, at, INNER, SAMPLES), at.inside)
    quad, row = tiles.quads_of(at.start, QUADS, SAMPLES)
    noise = philox.normals(cursor, quad, row, at.first, stream)
    scaled = clean * tiles.per_sample(r, at, batch, 1, SAMPLES)
    difference = prediction - tl.fma(noise, tiles.per_sample(w, at, batch, 1, SAMPLES), scaled)
    tl.store(tiles.pointers(error, at), difference, mask=at.inside)
    keep_sums(sums, squares(difference, at.inside), at, batch, blocks, 1, QUADS, SAMPLES)


def dsm_loss(
    output: Tensor, x0: Tensor, r: Tensor, w: Tensor, weight: Tensor, cursor: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """Each sample's weighted mean squared error, and the error itself (fastdiff.execution.reference.dsm_loss)."""
    loss, error = x0.new_empty(x0.shape[:1]), x0.new_empty(x0.shape)
    tiles.check_state(error, cursor=cursor)
    tiles.check_column(len(x0), r=r, w=w, weight=weight)
    if x0.numel() == 0:
        return weight.to(x0.dtype) * 0, error
    numel = x0.numel() // len(x0)
    tiling, blocks = cut_blocks(len(x0), numel)
    of_output, inner = tiles.view(output, x0.shape, None)
    sums = x0.new_empty((len(x0), blocks), dtype=torch.float64)
    tiles.launch(
        dsm_kernel, tiling.grid, x0, error, sums, of_output, tiles.dense(x0, x0.shape), r.contiguous(), w.contiguous(),
        cursor, stream, blocks=blocks, INNER=inner or 1, **tiling.arguments,
    )  # fmt: skip
    return finish(sums, loss, LOSS.value, weight.contiguous(), numel), error


def dsm_loss_backward(grad: Tensor, error: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of `dsm_loss` in the output (execution.reference.dsm_loss_backward): one product an element, for which
    torch's own kernel is as good as any."""
    wide_weight, wide_grad = (column.to(error.dtype).double() for column in (weight, grad))
    factor = (2.0 * wide_weight * wide_grad / max(error[:1].numel(), 1)).to(error.dtype)
    factor = factor.view(-1, *[1] * (error.ndim - 1))
    return torch.mul(error, factor, out=error.new_empty(error.shape, dtype=dtype))


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def dot_kernel(
    sums,  # [B, blocks] float64, written: block sums of v·value
    value,  # [B, D], any floating dtype, contiguous
    probe,  # [B, D], any floating dtype, contiguous: v; None: normals of the stream
    cursor,  # [3] int64: draw, first sample, seed
    stream,  # the stream of the noise
    size,  # D, or D / 4 if WHOLE
    batch,  # B
    blocks,  # of 1024 elements in a sample
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,  # tiles.cut
):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    u = load(tiles.pointers(value, at), at.inside)
    if probe is not None:
        v = load(tiles.pointers(probe, at), at.inside)
    else:
        quad, row = tiles.quads_of(at.start, QUADS, SAMPLES)
        v = philox.normals(cursor, quad, row, at.first, stream)
    keep_sums(sums, u.to(tl.float64) * v.to(tl.float64), at, batch, blocks, 1, QUADS, SAMPLES)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def signed_sum_kernel(
    sums,  # [B, blocks] float64, written: block sums of v·value, v = ±1 of the stream
    value,  # [B, D], any floating dtype, contiguous
    cursor,  # [3] int64: draw, first sample, seed
    stream,  # the stream of the signs
    size,  # D, or D / 4 if WHOLE
    batch,  # B
    blocks,  # of 1024 elements in a sample
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,  # tiles.cut
):  # fmt: skip
    """Groups 0 and 1 of a program's elements are the halves of a block of the tree, 2 and 3 those of the next."""
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    word = philox.sign_words(cursor, at.start, at.first, stream, QUADS, SAMPLES)
    remaining = tiles.left(size, at.start, WHOLE)
    sample = tl.arange(0, SAMPLES)
    exists = sample < tl.minimum(batch - at.first, SAMPLES).to(tl.int32)
    for pair in tl.static_range((GROUPS + 1) // 2):
        total = _signed(value, word, at, remaining, 2 * pair, QUADS)
        if GROUPS > 1:
            total += _signed(value, word, at, remaining, 2 * pair + 1, QUADS)
        total = halve(total, SAMPLES, 4 * QUADS)
        block = (at.start >> 10) + pair
        tl.store(sums + at.first * blocks + sample * blocks + block, total, mask=exists & (sample * 0 + block < blocks))


@triton.jit
def _signed(value, word, at, remaining, group: tl.constexpr, QUADS: tl.constexpr):
    """±value of the elements of one group, 0 beyond the sample."""
    exists = at.inside & (at.j + group * (4 * QUADS) < remaining)
    value = load(tiles.pointers(value, at) + group * (4 * QUADS), exists)
    return (value * philox.signs(word, group)).to(tl.float64)


def probe_dot(value: Tensor, cursor: Tensor, stream: int, kind: str, probe: Tensor | None = None) -> Tensor:
    """⟨v, value⟩ of each sample, float64 [B]: v is `probe`, or drawn anew (fastdiff.execution.reference.probe_dot)."""
    out = value.new_empty(value.shape[:1], dtype=torch.float64)
    if probe is None and kind not in ("rademacher", "normal"):
        raise ValueError(f"kind must be 'rademacher' or 'normal', got {kind!r}")
    if value.numel() == 0:
        return out.zero_()
    numel = value.numel() // len(value)
    tiling, blocks = cut_blocks(len(value), numel)
    value, probe = value.contiguous(), tiles.dense(probe, value.shape)
    sums = out.new_empty((len(value), blocks))
    if probe is None and kind == "rademacher":
        tiling = cut_signs(len(value), numel)
        tiles.launch(
            signed_sum_kernel, tiling.grid, value, sums, value, cursor, stream, blocks=blocks, **tiling.arguments
        )
    else:
        tiles.launch(
            dot_kernel, tiling.grid, value,
            sums, value, probe, cursor, stream, blocks=blocks, **tiling.arguments,
        )  # fmt: skip
    return finish(sums, out, SUM.value)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def rk_kernel(
    after,  # [B, D] float32, contiguous, written: x'
    sums,  # [B, blocks] float64, written: block sums of its squared relative error
    x,  # [B, D] float32, contiguous
    h,  # [B], any floating dtype, contiguous: step sizes
    stages,  # a tuple of [B, D], any floating dtype, contiguous: k_j
    rtol,
    atol,
    size,  # D, or D / 4 if WHOLE
    batch,  # B
    blocks,  # of 1024 elements in a sample
    WEIGHTS: tl.constexpr, ERRORS: tl.constexpr,  # tuples: b_j and e_j of each stage, not both 0
    GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr,  # tiles.cut
):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    before = load(tiles.pointers(x, at), at.inside)
    step = tiles.per_sample(h, at, batch, 1, SAMPLES)
    new = before
    error = tl.zeros_like(before)
    for i in tl.static_range(len(stages)):
        k = load(tiles.pointers(stages[i], at), at.inside)
        if WEIGHTS[i] != 0:
            new = tl.fma(k, step * WEIGHTS[i], new)
        if ERRORS[i] != 0:
            error = tl.fma(k, step * ERRORS[i], error)
    tl.store(tiles.pointers(after, at), new, mask=at.inside)
    size_of = tl.maximum(tl.abs(before), tl.abs(new), propagate_nan=tl.PropagateNan.ALL)
    tolerance = tl.fma(size_of, rtol, atol)
    ratio = tl.div_rn(error, tolerance)
    keep_sums(sums, squares(ratio, at.inside), at, batch, blocks, 1, QUADS, SAMPLES)


def rk_error(
    x: Tensor, stages: Sequence[Tensor], h: Tensor, b: Sequence[float], e: Sequence[float], rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """The Runge–Kutta combination and each sample's error (fastdiff.execution.reference.rk_error)."""
    after, error = x.new_empty(x.shape), x.new_empty(x.shape[:1])
    tiles.check_state(after)
    tiles.check_column(len(x), h=h)
    if not len(stages) == len(b) == len(e):
        raise ValueError(f"b and e must have one weight for each of {len(stages)} stages, got {len(b)} and {len(e)}")
    if x.numel() == 0:
        return after, error.zero_()
    numel = x.numel() // len(x)
    tiling, blocks = cut_blocks(len(x), numel)
    sums = x.new_empty((len(x), blocks), dtype=torch.float64)
    used = [(k, bj, ej) for k, bj, ej in zip(stages, b, e) if bj != 0 or ej != 0]
    weights, errors = tuple(bj for _, bj, _ in used), tuple(ej for _, _, ej in used)
    tiles.launch(
        rk_kernel, tiling.grid, x, after, sums, tiles.dense(x, x.shape), h.contiguous(),
        tuple(tiles.dense(k, x.shape) for k, _, _ in used), rtol, atol,
        blocks=blocks, WEIGHTS=weights, ERRORS=errors, **tiling.arguments,
    )  # fmt: skip
    return after, finish(sums, error, RMS.value, None, numel)
