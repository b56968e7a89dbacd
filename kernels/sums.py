"""`dsm_loss` (Vincent 2011), `probe_dot` (Hutchinson 1990), `rk_error` (Hairer, Nørsett & Wanner): sums over samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

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
    loss_and_error: tuple[Tensor, Tensor] = tiles.call(_dsm_loss, (output, x0, r, w, weight, cursor), stream)
    return loss_and_error


def _dsm_loss(
    output: Tensor, x0: Tensor, r: Tensor, w: Tensor, weight: Tensor, cursor: Tensor, stream: int
) -> tiles.Prepared:
    shape, count = x0.shape, len(x0)
    tiles.check_state(x0.new_empty(shape), cursor=cursor)
    tiles.check_column(count, r=r, w=w, weight=weight)
    if x0.numel() == 0:
        return tiles.Prepared(lambda _, x0, *rest: (rest[2].to(x0.dtype) * 0, x0.new_empty(shape)), None)
    numel = x0.numel() // count
    tiling, blocks = cut_blocks(count, numel)
    seen, inner = tiles.view(output, shape, None)
    copied = seen.copies(output)
    launch = tiles.Launch(
        dsm_kernel, tiling.grid, ("error", "sums", "output", "x0", "r", "w", "cursor"),
        output=seen._replace(value=None), stream=stream, blocks=blocks, INNER=inner or 1, **tiling.arguments,
    )  # fmt: skip
    finished = finish(count, blocks, LOSS.value, numel)

    def run(output: Tensor, x0: Tensor, r: Tensor, w: Tensor, weight: Tensor, cursor: Tensor) -> tuple[Tensor, Tensor]:
        loss, error = x0.new_empty(count), x0.new_empty(shape)
        sums = x0.new_empty((count, blocks), dtype=torch.float64)
        output = tiles.dense(output, shape) if copied else output
        launch(error, sums, output, x0.contiguous(), r.contiguous(), w.contiguous(), cursor)
        finished.run(sums, loss, weight.contiguous())
        return loss, error

    return tiles.Prepared(run, finished.last)


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
    dots: Tensor = tiles.call(_probe_dot, (value, cursor, probe), stream, kind)
    return dots


def _probe_dot(value: Tensor, cursor: Tensor, probe: Tensor | None, stream: int, kind: str) -> tiles.Prepared:
    if probe is None and kind not in ("rademacher", "normal"):
        raise ValueError(f"kind must be 'rademacher' or 'normal', got {kind!r}")
    shape, count = value.shape, len(value)
    if value.numel() == 0:
        return tiles.Prepared(lambda value, *_: value.new_zeros(count, dtype=torch.float64), None)
    numel = value.numel() // count
    tiling, blocks = cut_blocks(count, numel)
    if probe is None and kind == "rademacher":
        kernel, tiling, slots = signed_sum_kernel, cut_signs(count, numel), ("sums", "value", "cursor")
        launch = tiles.Launch(kernel, tiling.grid, slots, stream=stream, blocks=blocks, **tiling.arguments)
    else:
        slots = "sums", "value", "cursor", "probe"
        launch = tiles.Launch(
            dot_kernel, tiling.grid, slots, probe=None, stream=stream, blocks=blocks, **tiling.arguments
        )
    finished = finish(count, blocks, SUM.value)

    def run(value: Tensor, cursor: Tensor, probe: Tensor | None) -> Tensor:
        sums = value.new_empty((count, blocks), dtype=torch.float64)
        out = value.new_empty(count, dtype=torch.float64)
        launch(sums, value.contiguous(), cursor, tiles.dense(probe, shape))
        finished.run(sums, out)
        return out

    return tiles.Prepared(run, finished.last)


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
    if not len(stages) == len(b) == len(e):
        raise ValueError(f"b and e must have one weight for each of {len(stages)} stages, got {len(b)} and {len(e)}")
    used = [bj != 0 or ej != 0 for bj, ej in zip(b, e)]
    tensors = x, h, *itertools.compress(stages, used)
    weights, errors = tuple(itertools.compress(b, used)), tuple(itertools.compress(e, used))
    after_and_error: tuple[Tensor, Tensor] = tiles.call(_rk_error, tensors, weights, errors, rtol, atol)
    return after_and_error


def _rk_error(x: Tensor, h: Tensor, *stages_and_others: Any) -> tiles.Prepared:
    *stages, weights, errors, rtol, atol = stages_and_others
    shape, count = x.shape, len(x)
    tiles.check_state(x.new_empty(shape))
    tiles.check_column(count, h=h)
    if x.numel() == 0:
        return tiles.Prepared(lambda x, *_: (x.new_empty(shape), x.new_zeros(count)), None)
    numel = x.numel() // count
    tiling, blocks = cut_blocks(count, numel)
    launch = tiles.Launch(
        rk_kernel, tiling.grid, ("after", "sums", "x", "h", "stages"),
        rtol=rtol, atol=atol, blocks=blocks, WEIGHTS=weights, ERRORS=errors, **tiling.arguments,
    )  # fmt: skip
    finished = finish(count, blocks, RMS.value, numel)
    copied = any(tiles.dense(k, shape) is not k for k in stages)

    def run(x: Tensor, h: Tensor, *stages: Tensor) -> tuple[Tensor, Tensor]:
        after, error = x.new_empty(shape), x.new_empty(count)
        sums = x.new_empty((count, blocks), dtype=torch.float64)
        stages = tuple([tiles.dense(k, shape) for k in stages]) if copied else stages
        launch(after, sums, x.contiguous(), h.contiguous(), stages)
        finished.run(sums, error)
        return after, error

    return tiles.Prepared(run, finished.last)
