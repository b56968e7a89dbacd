"""`timestep_embedding`: sines and cosines of times (Vaswani et al. 2017; Ho et al. 2020; Dhariwal & Nichol 2021)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import philox, tiles

ORDERS = ("sin_cos", "cos_sin", "interleaved")
_SIN_COS, _COS_SIN, _INTERLEAVED = (tl.constexpr(i) for i in range(3))

_QUARTERS = tl.constexpr(float.fromhex("0x1.45f306dc9c883p-1"))  # quarter turns in a radian, 2/π
_ROUND = tl.constexpr(2.0**52)  # adding it to a smaller float64 and subtracting it again rounds that to a whole number

# Frequencies of a program, and times: chosen like tiles.QUADS.
FREQUENCIES = 128
TIMES = 4


@triton.jit(do_not_specialize=["count", "half"], do_not_specialize_on_alignment=["t", "frequencies"])
def embedding_kernel(
    out,  # [B, 2·half + ODD] float32, contiguous, written
    t,  # [B] float32, contiguous
    frequencies,  # [half] float32, contiguous
    scale,  # of t
    count,  # B
    half,
    ORDER: tl.constexpr,  # a number of ORDERS
    ODD: tl.constexpr,  # 1 if a last channel of zeros follows, else 0
    WIDTH: tl.constexpr, ROWS: tl.constexpr,  # a program's frequencies and times
):  # fmt: skip
    e = tl.arange(0, ROWS * WIDTH)
    row, k = tl.program_id(0) * ROWS + e // WIDTH, tl.program_id(1) * WIDTH + e % WIDTH
    inside = (row < count) & (k < half)
    time = tl.load(t + row, mask=row < count, other=0.0)
    angle = (time * scale) * tl.load(frequencies + k, mask=k < half, other=0.0)

    quarters = angle.to(tl.float64) * _QUARTERS
    size = tl.abs(quarters)
    turns = tl.where(size < _ROUND, (size + _ROUND) - _ROUND, size)
    turns = turns * tl.where(quarters < 0, -1.0, 1.0)
    sine, cosine = philox.sine_cosine((quarters - turns).to(tl.float32))
    quadrant = turns - 4 * tl.floor(turns * 0.25)
    swap = (quadrant == 1) | (quadrant == 3)
    sine, cosine = tl.where(swap, cosine, sine), tl.where(swap, sine, cosine)
    sine = sine * tl.where(quadrant >= 2, -1.0, 1.0)
    cosine = cosine * tl.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0)

    line = out + row.to(tl.int64) * (2 * half + ODD)
    if ORDER == _INTERLEAVED:
        tl.store(line + 2 * k, sine, mask=inside)
        tl.store(line + 2 * k + 1, cosine, mask=inside)
    elif ORDER == _SIN_COS:
        tl.store(line + k, sine, mask=inside)
        tl.store(line + half + k, cosine, mask=inside)
    else:
        tl.store(line + k, cosine, mask=inside)
        tl.store(line + half + k, sine, mask=inside)
    if ODD:
        tl.store(line + 2 * half, tl.zeros_like(angle), mask=(row < count) & (k == 0))


def timestep_embedding(t: Tensor, frequencies: Tensor, scale: float, channels: int, order: str) -> Tensor:
    """Sines and cosines of (scale·t_i)·frequencies_k, [B, channels] (fastdiff.execution.reference.timestep_embedding)."""
    features: Tensor = tiles.call(_embedding, (t, frequencies), scale, channels, order)
    return features


def _embedding(t: Tensor, frequencies: Tensor, scale: float, channels: int, order: str) -> tiles.Prepared:
    half, count = channels // 2, len(t)
    if frequencies.shape != (half,) or order not in ORDERS:
        raise ValueError(
            f"frequencies must be [{half}] and order one of {ORDERS}, got {tuple(frequencies.shape)} and {order!r}"
        )
    tiles.check_column(count, t=t)
    if count == 0 or half == 0:
        return tiles.Prepared(lambda t, frequencies: t.new_zeros((count, channels)), None)
    width = min(FREQUENCIES, 1 << (half - 1).bit_length())
    rows = TIMES * FREQUENCIES // width
    launch = tiles.Launch(
        embedding_kernel, (-(-count // rows), -(-half // width)), ("out", "t", "frequencies"),
        scale=scale, count=count, half=half, ORDER=ORDERS.index(order), ODD=channels % 2, WIDTH=width, ROWS=rows,
    )  # fmt: skip

    def run(t: Tensor, frequencies: Tensor) -> Tensor:
        out = t.new_empty((count, channels))
        launch(out, t.contiguous(), frequencies.contiguous())
        return out

    return tiles.Prepared(run, launch)
