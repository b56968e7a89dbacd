"""Sums over a sample: the fixed tree of fastdiff.execution.reference.tree_sum, in float64.

A program sums a block of 1024 elements by halves (element i + element i + n/2) and writes it; a second kernel halves the
block sums the same way. No float atomics: the bits depend on neither the number of programs nor their order.
"""

from __future__ import annotations

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .step import UNALIGNED as STEP_UNALIGNED
from .step import UNSPECIALISED as STEP_UNSPECIALISED

# A block of the tree is 256 quads, whatever tiles.QUADS says; a program of the second kernel takes up to 4096 sums.
BLOCK_QUADS = 256
MOST_SUMS = 4096
FOLD = 16

# What becomes of a sum over a sample
SUM, ROOT, LOSS, RMS = (tl.constexpr(i) for i in range(4))

# Not worth a compilation for each of their alignments (see step.py)
UNSPECIALISED = [*STEP_UNSPECIALISED, "length", "blocks", "numel", "half", "pitch", "divisor", "apart"]
UNALIGNED = [*STEP_UNALIGNED, "sums", "values", "weight", "h", "r", "w"]


@triton.jit
def halve(values, ROWS: tl.constexpr, LENGTH: tl.constexpr):
    """[ROWS·LENGTH] → [ROWS]: each row's halves are added until one number is left; each sum has exactly two terms.

    To split a tensor's last axis the compiler brings both halves into one thread, which leaves every thread fewer numbers;
    a sum over an axis leaves copies in all threads that took part. So split while a warp has a number for each lane."""
    n: tl.constexpr = LENGTH.bit_length() - 1
    left = values
    for i in tl.static_range(n):
        left = tl.reshape(left, [ROWS, 2, LENGTH >> (i + 1)])
        if ROWS * (LENGTH >> (i + 1)) >= 32:
            first, second = tl.split(tl.permute(left, (0, 2, 1)))
            left = first + second
        else:
            left = tl.sum(left, axis=1)
    return tl.reshape(left, [ROWS])


@triton.jit
def squares(values, inside):
    """The squares of float32 values in float64, 0 outside."""
    wide = tl.where(inside, values, 0.0).to(tl.float64)
    return wide * wide


@triton.jit
def keep_sums(sums, values, at, batch, blocks, SUMS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr):
    """sums[k, sample, block] ← the tree sum of each of a program's rows; values [SUMS · elements], 0 beyond a sample."""
    total = halve(values, SUMS * SAMPLES, 4 * QUADS)
    e = tl.arange(0, SUMS * SAMPLES)
    sample = e % SAMPLES
    exists = sample < tl.minimum(batch - at.first, SAMPLES).to(tl.int32)
    first = at.first + (e // SAMPLES) * batch.to(tl.int64)
    tl.store(sums + first * blocks + sample * blocks + at.start // (4 * QUADS), total, mask=exists)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def sum_kernel(
    values,  # [rows, length] float64, contiguous
    out,  # [rows, blocks] float64 or float32, contiguous, written: of the tree sum of each LENGTH values, what MODE says
    weight,  # [rows], any floating dtype, contiguous: for LOSS; else None
    rows,
    length,
    numel,  # for LOSS and RMS: by how much the sum is divided
    MODE: tl.constexpr,  # SUM, ROOT, LOSS or RMS
    LENGTH: tl.constexpr, ROWS: tl.constexpr,  # a program's sums and the width of each (rows_of)
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, ROWS * LENGTH)
    block = tl.program_id(1)
    mine = tl.program_id(0).to(tl.int64) * ROWS + e // LENGTH
    place = block * LENGTH + e % LENGTH
    exists = (mine < rows) & (place < length)
    total = halve(tl.load(values + mine * length + place, mask=exists, other=0.0), ROWS, LENGTH)
    if MODE == ROOT:
        total = tl.sqrt(total)
    elif MODE == LOSS:
        total = total / tl.broadcast_to(numel, total.shape).to(tl.float64)
        total = tl.load(weight + row, mask=row < rows, other=0.0).to(tl.float64) * total
    elif MODE == RMS:
        total = tl.sqrt(total / tl.broadcast_to(numel, total.shape).to(tl.float64))
    tl.store(out + row * tl.num_programs(1) + block, total.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def fold_kernel(
    values,  # [rows, length] float64, contiguous
    out,  # [rows, apart] float64, contiguous, written: out[row, i] ← the tree sum of values[row, i + k·apart], k < PARTS
    length,
    apart,
    PARTS: tl.constexpr, LENGTH: tl.constexpr,  # how many values make a sum, and a program's sums
):  # fmt: skip
    """The first halvings of very long rows."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)
    e = tl.arange(0, LENGTH * PARTS)
    place = tl.program_id(0) * LENGTH + e // PARTS + (e % PARTS) * apart
    parts = tl.load(values + row * length + place, mask=place < length, other=0.0)
    tl.store(out + row * apart + i, halve(parts, LENGTH, PARTS), mask=i < apart)


def rows_of(length: int) -> dict[str, int]:
    """The tile of a kernel that halves rows of this length."""
    width = 1 << (length - 1).bit_length()
    return {"LENGTH": width, "ROWS": max(1, 1024 // width)}


def fold(rows: int, length: int) -> tuple[Callable[[Tensor], Tensor], int]:
    """What makes float64 [rows, length] shorter rows with the same tree sums, and their length, at most MOST_SUMS."""
    launches = []
    while length > MOST_SUMS:
        apart = (1 << (length - 1).bit_length()) // FOLD
        width = min(64, apart)
        grid, slots = (apart // width, rows), ("values", "out")
        launch = tiles.Launch(fold_kernel, grid, slots, length=length, apart=apart, PARTS=FOLD, LENGTH=width)
        launches.append((launch, (rows, apart)))
        length = apart

    def run(sums: Tensor) -> Tensor:
        for launch, shape in launches:
            values, sums = sums, sums.new_empty(shape)
            launch(values, sums)
        return sums

    return run, length


def finish(rows: int, length: int, mode: int, numel: int = 1) -> tiles.Prepared:
    """(sums [rows, length], out [rows], weight or None) -> None: out ← what the mode makes of the tree over each row."""
    folded, length = fold(rows, length)
    tile = rows_of(length)
    launch = tiles.Launch(
        sum_kernel, (-(-rows // tile["ROWS"]), 1), ("values", "out", "weight"),
        weight=None, rows=rows, length=length, numel=numel, MODE=mode, **tile,
    )  # fmt: skip

    def run(sums: Tensor, out: Tensor, weight: Tensor | None = None) -> None:
        launch(folded(sums), out, weight)

    return tiles.Prepared(run, launch)


def cut_blocks(batch: int, numel: int) -> tuple[tiles.Tiling, int]:
    """The programs that sum samples of `numel` elements by blocks, and how many blocks each has."""
    return tiles.cut(batch, numel, BLOCK_QUADS), -(-numel // (4 * BLOCK_QUADS))
