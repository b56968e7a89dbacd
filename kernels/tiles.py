"""How a state [B, *] is cut into programs, how its elements are addressed, and how kernels are launched.

A program has SAMPLES rows of QUADS quads (four consecutive elements: one counter of the noise, one 128-bit access): one
row, a part of a sample, where samples are long; several whole samples where they are short. So no element's address
needs a division, and short samples leave no lanes idle. Everything of a program's address that could pass 2³¹ is one
64-bit scalar; elements add 32-bit offsets to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Chosen from compiled SASS (128-bit accesses, no spills, about 40 registers: tests/aot.py), not yet measured on a
# GPU: 1024 elements a program, 8 a thread.
QUADS = 256
WARPS = 4

# How many samples the grid's second dimension counts, of the 65,535 that it could: the third goes on from there
SPAN = tl.constexpr(32768)


@triton.jit
def left(size, start, WHOLE: tl.constexpr):
    """How many elements a sample has from `start` on, at least 0 and at most 2³⁰; visibly a multiple of four if WHOLE."""
    if WHOLE:
        return tl.minimum(size - (start >> 2), 1 << 28).to(tl.int32) * 4
    return tl.minimum(size - start, 1 << 30).to(tl.int32)


@triton.jit
def place(size, batch, GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr):
    """Where a program works: (first sample, its first element in the sample, both 64-bit scalars; and for each element
    the row, its place from the first element on, whether it exists, and its offset in a contiguous state in two parts).

    size: elements of a sample, or its quads if WHOLE (a multiple of four: then all offsets are visibly, too);
    GROUPS: how many times 4·QUADS elements a program has of one sample: `place` tells of the first."""
    if SAMPLES == 1:
        block = tl.program_id(0)
        first = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * SPAN
        j = tl.arange(0, 4 * QUADS)
        row = tl.zeros_like(j)
        exists = tl.minimum(tl.maximum(batch - first, 0), 1).to(tl.int32)
    else:
        block = tl.program_id(0) * 0
        first = tl.program_id(0).to(tl.int64) * SAMPLES
        e = tl.arange(0, 4 * QUADS * SAMPLES)
        row, j = e // (4 * QUADS), e % (4 * QUADS)
        exists = 1
    start = block.to(tl.int64) * (4 * QUADS * GROUPS)
    inside = j < left(size, start, WHOLE) * exists
    if WHOLE:
        base = (first * size + block.to(tl.int64) * (QUADS * GROUPS)) * 4
        local = row * (size * 4) + j
    else:
        base = first * size + start
        local = row * size + j
    if SAMPLES == 1:
        local = j
    else:
        inside = inside & (row < tl.minimum(batch - first, SAMPLES).to(tl.int32))
    return first, start, row, j, inside, base, local


@triton.jit
def quads_of(start, QUADS: tl.constexpr, SAMPLES: tl.constexpr):
    """The noise counters of a program's elements: each quad's number in its sample, and its row."""
    q = tl.arange(0, QUADS * SAMPLES)
    if SAMPLES == 1:
        row = q * 0
        quad = q
    else:
        row = q // QUADS
        quad = q % QUADS
    return quad + (start >> 2).to(tl.uint32).to(tl.int32, bitcast=True), row


@triton.jit
def address(at, value, sample, outer, inner, INNER: tl.constexpr, SAMPLES: tl.constexpr):
    """Pointers to a program's elements of an operand with strides as `view` gives them; `at` is what `place` returned."""
    first, start, row, j, _, base, local = at
    if sample is None:
        place = value + base + local
    else:
        place = value + first * sample
        if inner is None:
            place = place + start + j
        else:
            i = (start.to(tl.int32) + j).to(tl.uint32)
            place = place + ((i // INNER).to(tl.int32) * outer + (i % INNER).to(tl.int32) * inner)
        if SAMPLES > 1:
            place = place + row.to(tl.int64) * sample
    return place


@triton.jit
def per_sample(value, at, batch, pitch: tl.constexpr, SAMPLES: tl.constexpr):
    """value[sample · pitch] for each element, float32; one scalar load where a program has one sample."""
    first, _, row, _, inside, _, _ = at
    if SAMPLES == 1:
        # a program beyond the batch, of which the grid may have some, reads the last sample's and stores nothing
        number = tl.load(value + tl.minimum(first, batch - 1) * pitch).to(tl.float32)
        numbers = tl.broadcast_to(number, inside.shape)
    else:
        numbers = tl.load(value + first * pitch + row * pitch, mask=inside, other=0.0).to(tl.float32)
    return numbers


class Tiling(NamedTuple):
    """A state cut into programs: their grid, and the arguments that `place` takes."""

    grid: tuple[int, int, int]
    arguments: dict[str, Any]


def cut(batch: int, numel: int, quads: int | None = None, groups: int = 1) -> Tiling:
    """Cut `batch` samples of `numel` elements each (neither 0), with at most `quads` quads in a program's row."""
    quads = QUADS if quads is None else quads
    needed = -(-numel // 4)
    width = min(quads, 1 << (needed - 1).bit_length())
    samples = quads // width if needed <= width else 1
    blocks, span = -(-needed // (width * groups)), SPAN.value
    whole = numel % 4 == 0
    arguments = {
        "size": needed if whole else numel,
        "batch": batch,
        "GROUPS": groups,
        "QUADS": width,
        "SAMPLES": samples,
        "WHOLE": whole,
    }
    grid = (-(-batch // samples), 1, 1) if samples > 1 else (blocks, min(batch, span), -(-batch // span))
    return Tiling(grid, arguments)


class View(NamedTuple):
    """An operand, and its strides: none if it is contiguous; sample; or sample, outer and inner (for one INNER)."""

    value: Tensor | None
    sample: int | None = None
    outer: int | None = None
    inner: int | None = None


def view(value: Tensor | None, shape: Sequence[int], inner: int | None) -> tuple[View, int | None]:
    """`value` as the kernels address it in a state of this shape, and INNER: the length of the inner of a sample's two
    dimensions, once an operand needs two (channels-last: height × width). What has more, or another INNER, is copied."""
    if value is None or (value.is_contiguous() and value.shape == shape):
        return View(value), inner
    value = value.expand(shape)
    found = _strides(value.shape, value.stride(), inner)
    if found is None:
        return View(value.contiguous()), inner
    strides, inner = found
    return View(value, *strides), inner


@functools.lru_cache(maxsize=256)
def _strides(
    shape: tuple[int, ...], stride: tuple[int, ...], inner: int | None
) -> tuple[tuple[int | None, ...], int | None] | None:
    """The strides of a `View`, and INNER from now on; None if it must be copied."""
    numel = math.prod(shape[1:])
    dims = _collapse(shape[1:], stride[1:])
    sample = stride[0] if shape[0] > 1 else numel
    if not dims or dims == [(numel, 1)]:
        return (None if sample == numel else sample,), inner
    if numel < 2**31 and sum((n - 1) * s for n, s in dims) < 2**31:
        if len(dims) == 1:
            inner = inner or numel
            return (sample, inner * dims[0][1], dims[0][1]), inner
        if len(dims) == 2 and inner in (None, dims[1][0]):
            return (sample, dims[0][1], dims[1][1]), dims[1][0]
    return None


def _collapse(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """(length, stride) of the fewest dimensions that address a sample."""
    dims: list[tuple[int, int]] = []
    for n, stride in zip(shape, strides):
        if n == 1:
            continue
        if dims and dims[-1][1] == n * stride:
            dims[-1] = (dims[-1][0] * n, stride)
        else:
            dims.append((n, stride))
    return dims


def dense(value: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """`value` over a state of this shape, contiguous; copied only if it is not."""
    if value is None or (value.is_contiguous() and value.shape == shape):
        return value
    return value.expand(shape).contiguous()


def check_state(state: Tensor, *others: Tensor) -> None:
    """What a kernel addresses as it stands: float32, contiguous; all on one device."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise TypeError(f"a state must be contiguous float32, got {state.dtype} {tuple(state.shape)} {state.stride()}")
    for other in others:
        if other.device != state.device or not other.is_contiguous():
            raise ValueError(f"expected a contiguous tensor on {state.device}, got {other.stride()} on {other.device}")


def check_same(shape: Sequence[int], **written: Tensor | None) -> None:
    """What is written beside the state has its shape, and no element twice."""
    for name, value in written.items():
        if value is not None and (value.shape != shape or 0 in value.stride()):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)} {value.stride()}")
        if value is not None and name != "net_input" and not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")


def check_column(batch: int, **columns: Tensor | None) -> None:
    """One entry for each sample."""
    for name, value in columns.items():
        if value is not None and (value.ndim == 0 or value.shape[0] != batch):
            raise ValueError(f"{name} must have an entry for each of {batch} samples, got {tuple(value.shape)}")


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **meta: Any) -> None:
    """Run a kernel on the device of `like`, on torch's current stream, without contraction of products and sums."""
    with torch.cuda.device_of(like):
        kernel[grid](*args, **meta, num_warps=WARPS, enable_fp_fusion=False)
