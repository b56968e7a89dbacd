"""`group_norm`: group normalisation with scale, shift and SiLU (Wu & He 2018; Perez et al. 2018; Elfwing et al. 2017).

    out = silu((x − mean) / √(variance + eps) · weight + bias)

Mean and variance are those of a group of C / groups channels, in float32 whatever x's dtype is. A program has a tile
[ROWS, WIDTH] of a sample: of whole groups where they are small, and that is all; else of a block of each, whose mean and squared
deviations it leaves for a second launch, which puts the blocks together (Chan, Golub & LeVeque 1979) and applies them. So x is
read once or twice and written once: two or three times its bytes, of which the second reading finds in the cache what fits there.
What is summed are differences from a group's first element, and squares of differences from a block's mean: a mean that is large
beside the deviation costs no digits. The order of the sums depends on a sample's shape alone, never on the batch.

Unlike the other kernels', the bits are not the reference's: sums are of float32, and exp and the division of SiLU are the
hardware's approximations, 2 units in the last place each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .step import load

# Elements of a program, 64 a thread; channels side by side, 128 bytes in 16 bits, and fewest of them, a sector of 32 bytes.
# Chosen from compiled SASS (no spills: tests/aot.py), not yet measured on a GPU.
TILE = 4096
WIDE, NARROW = 64, 16
SMALL = 1024  # elements of a program of several groups whose channels lie apart
MOST_BLOCKS = 256  # whose moments a program reads; more are merged before
MERGED = 64  # into one
GRID = 65_535  # programs in the grid's second and third dimension, at most
# What a launch computes by the hardware's approximations: those of SiLU. tests/ptx.py refuses all others.
APPROXIMATIONS = ("ex2.approx.f32", "div.full.f32")

UNSPECIALISED = ["places", "width", "groups", "items", "blocks", "length", "step", "weight_pitch", "bias_pitch", "eps"]
UNALIGNED = ["means", "squares", "new_means", "new_squares", "weight", "bias"]


@triton.jit
def over_groups(values, GROUPS: tl.constexpr, LAST: tl.constexpr):
    """[ROWS, WIDTH] → [GROUPS]: the sum over each group's elements of a tile."""
    lines = tl.sum(values, axis=0 if LAST else 1)
    return tl.sum(tl.reshape(lines, [GROUPS, lines.shape[0] // GROUPS]), axis=1)


@triton.jit
def spread(values, EACH: tl.constexpr):
    """[GROUPS] → [GROUPS · EACH]: each number for all lines of its group."""
    wide = tl.broadcast_to(tl.expand_dims(values, 1), [values.shape[0], EACH])
    return tl.reshape(wide, [values.shape[0] * EACH])


@triton.jit
def across(line, LAST: tl.constexpr):
    """What one line of a tile has, to be broadcast over its elements."""
    return tl.expand_dims(line, 0 if LAST else 1)


@triton.jit
def merged(
    means, squares, sample, first_block, first, groups, blocks, length, step, GROUPS: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Mean and squared deviations, [GROUPS] each, of BLOCKS blocks' elements, as far as there are so many."""
    block = first_block + tl.arange(0, BLOCKS)
    at = sample * blocks * groups + (block * groups)[:, None] + (first + tl.arange(0, GROUPS))[None, :]
    there = tl.broadcast_to(
        (block < blocks)[:, None] & (first + tl.arange(0, GROUPS) < groups)[None, :], [BLOCKS, GROUPS]
    )
    count = tl.expand_dims(tl.minimum(tl.maximum(length - block * step, 0), step).to(tl.float32), 1)
    total = tl.minimum(length - first_block * step, BLOCKS * step).to(tl.float32)
    theirs = load(means + at, there)
    weighed = tl.sum(theirs * count, axis=0)
    mean = tl.div_rn(weighed, tl.zeros_like(weighed) + total)
    apart = theirs - tl.expand_dims(mean, 0)
    return mean, tl.sum(tl.fma(apart * count, apart, load(squares + at, there)), axis=0)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def group_norm_kernel(
    out,  # like x, written; None: only its moments are
    means,  # [B, blocks, groups] float32, contiguous: of x less its group's first element; None: programs have whole groups
    squares,  # the same: squared deviations from the means; both are written where there is no out, else read
    x,  # [B, C, *], without gaps, channels last if LAST
    weight,  # [B, C] or [C], any floating dtype; None: 1
    bias,  # the same; None: 0
    weight_pitch,  # from one sample's weights to the next one's, 0 for [C]
    bias_pitch,
    eps,
    places,  # of a channel
    width,  # C / UNIT
    groups,
    items,  # a group's lines: D channels if LAST, else D·PIECES rows of WIDTH elements
    blocks,  # of a group
    length,  # elements of a group
    step,  # elements of a block that is no group's last
    D: tl.constexpr,  # channels of a group
    UNIT: tl.constexpr,  # a power of two that divides C, so that Triton proves where accesses are wide
    PIECES: tl.constexpr,  # rows of a channel; 1 if LAST
    SILU: tl.constexpr,
    LAST: tl.constexpr,  # whether a tile's rows are places and its columns channels; else rows are pieces of channels
    GROUPS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,  # Tiling
):  # fmt: skip
    LINES: tl.constexpr = WIDTH if LAST else ROWS
    EACH: tl.constexpr = LINES // GROUPS
    first, block = tl.program_id(0) * GROUPS, tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    line = tl.arange(0, LINES)
    group, item = first + line // EACH, line % EACH
    if LAST:
        place = block * ROWS + tl.arange(0, ROWS)
        if EACH == D:
            channel = first * D + line
            inside = tl.broadcast_to((place < places)[:, None], [ROWS, WIDTH])
        else:
            channel = group * D + item
            inside = (place < places)[:, None] & (item < D)[None, :]
        there = place[:, None] * (width * UNIT) + channel[None, :]
        start = sample * places * width * UNIT
        leading = group * D
    else:
        item = item + block * EACH
        channel = group * D + (item.to(tl.uint32) // PIECES).to(tl.int32)
        inside = tl.broadcast_to((item < items)[:, None], [ROWS, WIDTH])
        there = (group * items + item)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        start = sample * groups * items * WIDTH
        leading = group * items * WIDTH
    has = channel < width * UNIT
    values = load(x + start + there, inside) - across(tl.load(x + start + leading).to(tl.float32), LAST)

    if means is None or out is None:
        count = tl.minimum(length - block * step, step).to(tl.float32)
        counts = tl.zeros([GROUPS], tl.float32) + count
        mean = tl.div_rn(over_groups(tl.where(inside, values, 0.0), GROUPS, LAST), counts)
        values = values - across(spread(mean, EACH), LAST)
        masked = tl.where(inside, values, 0.0)
        square = over_groups(masked * masked, GROUPS, LAST)
        if out is None:
            at = (sample * blocks + block) * groups + first + tl.arange(0, GROUPS)
            tl.store(means + at, mean)
            tl.store(squares + at, square)
    else:
        mean, square = merged(means, squares, sample, 0, first, groups, blocks, length, step, GROUPS, BLOCKS)
        values = values - across(spread(mean, EACH), LAST)

    if out is not None:
        variance = tl.div_rn(square, tl.zeros_like(square) + length.to(tl.float32))
        scale = spread(tl.div_rn(tl.zeros_like(square) + 1.0, tl.sqrt_rn(variance + eps)), EACH)
        if weight is not None:
            scale = scale * load(weight + sample * weight_pitch + channel, has)
        if bias is not None:
            result = tl.fma(values, across(scale, LAST), across(load(bias + sample * bias_pitch + channel, has), LAST))
        else:
            result = values * across(scale, LAST)
        if SILU:
            result = result / (1.0 + tl.exp(-result))
        tl.store(out + start + there, result.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def merge_kernel(
    new_means,  # [B, blocks / ROWS, groups] float32, contiguous, written: of ROWS blocks each
    new_squares,  # the same
    means,  # [B, blocks, groups] float32, contiguous
    squares,  # the same
    groups,
    blocks,
    length,  # elements of a group
    step,  # elements of a block that is no group's last
    ROWS: tl.constexpr, WIDTH: tl.constexpr,  # a program's blocks, and groups
):  # fmt: skip
    first, block, sample = tl.program_id(0) * WIDTH, tl.program_id(1), tl.program_id(2).to(tl.int64)
    mean, square = merged(means, squares, sample, block * ROWS, first, groups, blocks, length, step, WIDTH, ROWS)
    group = first + tl.arange(0, WIDTH)
    at = (sample * tl.num_programs(1) + block) * groups + group
    tl.store(new_means + at, mean, mask=group < groups)
    tl.store(new_squares + at, square, mask=group < groups)


class Tiling(NamedTuple):
    """How samples [C, places] in `groups` groups are cut."""

    tiles: int  # of a sample, beside each other: of other groups
    blocks: int  # of a group
    step: int  # elements of a block
    arguments: dict[str, int]


def power(number: int) -> int:
    """The least power of two that is at least so large."""
    return 1 << (number - 1).bit_length()


def cut(channels: int, places: int, groups: int, last: bool) -> Tiling:
    """Tiles of samples whose channels lie side by side (`last`), or apart."""
    depth = channels // groups
    together = groups & -groups  # so many at most: no program has groups that do not exist
    if last:
        each, rows, pieces = power(depth), power(places), 1
        wanted = WIDE if rows > TILE // NARROW else min(WIDE, TILE // rows)
        together = min(together, max(1, wanted // each))
        width = together * each
        rows = min(rows, max(1, TILE // width))
        items, blocks, step = depth, -(-places // rows), rows * depth
    else:
        width = min(places & -places, TILE)
        pieces = places // width
        items = depth * pieces
        each = min(power(items), TILE // width)
        together = min(together, max(1, SMALL // (each * width)))
        rows = together * each
        blocks, step = -(-items // each), each * width
    arguments = {"items": items, "D": depth, "PIECES": pieces, "GROUPS": together, "ROWS": rows, "WIDTH": width}
    return Tiling(groups // together, blocks, step, arguments)


def channels_last(x: Tensor) -> bool | None:
    """Whether the channels of [B, C, *] lie side by side, or each one's places; None where there are gaps or another order."""
    if x.is_contiguous():
        return False
    return True if x.movedim(1, -1).is_contiguous() else None


def fits(x: Tensor, groups: int) -> bool:
    """Whether group_norm takes x: [B, C, *] of 16 or 32 bits, without gaps, its channels or its places side by side."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.ndim < 2 or x.numel() == 0:
        return False
    last, (samples, channels) = channels_last(x), x.shape[:2]
    numel = x.numel() // samples
    if last is None or channels % groups or numel >= 2**29 or samples > GRID or channels // groups > TILE:
        return False
    return cut(channels, numel // channels, groups, last).blocks <= GRID


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = True
) -> Tensor:
    """silu(group_norm(x) · weight + bias) of x that `fits`, in x's dtype and layout; weight and bias [C], or [B, C] for each
    sample, or None. Errors: ValueError, TypeError."""
    normed: Tensor = tiles.call(_group_norm, (x, weight, bias), groups, eps, silu)
    return normed


def prepare_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = True
) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """group_norm of operands of which tiles.facts are these, as a function of (x, weight, bias)."""
    return _group_norm(x, weight, bias, groups, eps, silu).run


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, silu: bool
) -> tiles.Prepared:
    if not fits(x, groups):
        raise TypeError(
            f"x must be [B, C, *] of 16 or 32 bits without gaps, C a multiple of {groups}, got {x.dtype} {tuple(x.shape)} with "
            f"strides {x.stride()}"
        )
    samples, channels = x.shape[:2]
    places = x.numel() // (samples * channels)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape not in ((channels,), (samples, channels)):
            raise ValueError(f"{name} must be {[channels]} or {[samples, channels]}, got {list(value.shape)}")
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} must be on x's device, {x.device}, got {value.device}")
    last = bool(channels_last(x))
    tiling, length = cut(channels, places, groups, last), channels * places // groups
    blocks, step = tiling.blocks, tiling.step
    axes = tuple(range(x.ndim))
    dense = (samples, *x.shape[2:], channels) if last else x.shape  # of the output, which lies so
    order = (0, x.ndim - 1, *axes[1:-1]) if last else axes
    unit = min(channels & -channels, 16)
    shared = {
        "out": None, "means": None, "squares": None, "weight": None, "bias": None, "eps": eps, "places": places,
        "weight_pitch": _pitch(weight), "bias_pitch": _pitch(bias), "width": channels // unit, "groups": groups,
        "length": length, "UNIT": unit, "SILU": silu, "LAST": last, **tiling.arguments,
    }  # fmt: skip

    def tiled(blocks: int, step: int, *slots: str, programs: int = 1) -> tiles.Launch:
        grid = tiling.tiles, programs, samples
        return tiles.Launch(
            group_norm_kernel,
            grid,
            slots,
            **shared,
            blocks=blocks,
            step=step,
            BLOCKS=power(blocks) if "out" in slots else 1,
        )

    if blocks == 1:
        whole = tiled(1, length, "out", "x", "weight", "bias")

        def run(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            out = x.new_empty(dense).permute(order)
            whole(out, x, _dense(weight), _dense(bias))
            return out

        return tiles.Prepared(run, whole)

    measure = tiled(blocks, step, "means", "squares", "x", programs=blocks)
    merges = []
    while blocks > max(1, MOST_BLOCKS // tiling.arguments["GROUPS"]):
        fewer, wide = -(-blocks // MERGED), min(power(groups), 16)
        launch = tiles.Launch(
            merge_kernel, (-(-groups // wide), fewer, samples), ("new_means", "new_squares", "means", "squares"),
            groups=groups, blocks=blocks, length=length, step=step, ROWS=MERGED, WIDTH=wide,
        )  # fmt: skip
        merges.append((launch, fewer))
        blocks, step = fewer, step * MERGED
    apply = tiled(blocks, step, "out", "means", "squares", "x", "weight", "bias", programs=tiling.blocks)

    def run_apart(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        moments = x.new_empty((2, samples, tiling.blocks, groups), dtype=torch.float32)
        measure(*moments, x)
        for launch, fewer in merges:
            blocked, moments = moments, x.new_empty((2, samples, fewer, groups), dtype=torch.float32)
            launch(*moments, *blocked)
        out = x.new_empty(dense).permute(order)
        apply(out, *moments, x, _dense(weight), _dense(bias))
        return out

    return tiles.Prepared(run_apart, apply)


def _pitch(value: Tensor | None) -> int:
    return 0 if value is None or value.ndim == 1 else value.shape[1] if _copied(value) else value.stride(0)


def _copied(value: Tensor) -> bool:
    return value.stride(-1) != 1 and value.shape[-1] > 1


def _dense(value: Tensor | None) -> Tensor | None:
    """With its channels side by side; a part of a wider tensor stays where it is."""
    return value.contiguous() if value is not None and _copied(value) else value
