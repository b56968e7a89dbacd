"""What each operation means, in plain PyTorch: the oracle of the kernels, and the backend that runs anywhere.

In float32 every element is a product and a sequence of fused multiply-adds, each rounded once, and a sum over a sample is a
fixed tree in float64, so that every backend makes the same numbers (as torch.equal compares them: −0 is 0). In float64
products and sums are rounded one by one. Nothing here depends on layout, thread count or batch split.

The operations share a few operands:

    out      written, contiguous, float32 or float64 [B, *]: the state's dtype, in which all arithmetic is done. The other
             results (pushed, kept, measured, first_bad) are contiguous too
    table    the step table's `matrix` in the state's dtype, [rows, len(COLUMNS)]
    cursor   int64 [3]: row (or draw), the first sample's number, the seed (its 64 bits as a signed number)
    stream   what the noise is for (fastdiff.execution.noise), None: none is drawn

Other tensors may have any strides, and any floating dtype where they come from a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import choose
from ..table import COLUMNS
from . import noise

# measure_langevin keeps the noise that it draws for the step that follows, which else would draw it again.
KEEPS_NOISE = True

BLOCK = 1024

# e^u = 2^n e^r with n = round(u / ln 2): 1/ln 2, ln 2 in two parts (the first has 15 bits), and e^r by Taylor's series,
# highest power first (|r| <= ln(2)/2, so the first power left out is below a tenth of the last place)
_PER_LN_2, _LN_2_HIGH, _LN_2_LOW = map(float.fromhex, ("0x1.715476p+0", "0x1.62e3p-1", "0x1.2fefa4p-17"))
_EXP = tuple(map(float.fromhex, (
    "0x1.a01a02p-13", "0x1.6c16c2p-10", "0x1.111112p-7", "0x1.555556p-5", "0x1.555556p-3", "0x1p-1", "0x1p+0", "0x1p+0",
)))  # fmt: skip

# the same for float64, to the 13th power; the first part of ln 2 has 32 bits
_PER_LN_2_WIDE, _LN_2_HIGH_WIDE, _LN_2_LOW_WIDE = map(
    float.fromhex, ("0x1.71547652b82fep+0", "0x1.62e42feep-1", "0x1.a39ef35793c76p-33")
)
_EXP_WIDE = tuple(map(float.fromhex, (
    "0x1.6124613a86d09p-33", "0x1.1eed8eff8d898p-29", "0x1.ae64567f544e4p-26", "0x1.27e4fb7789f5cp-22",
    "0x1.71de3a556c734p-19", "0x1.a01a01a01a01ap-16", "0x1.a01a01a01a01ap-13", "0x1.6c16c16c16c17p-10",
    "0x1.1111111111111p-7", "0x1.5555555555555p-5", "0x1.5555555555555p-3", "0x1p-1", "0x1p+0", "0x1p+0",
)))  # fmt: skip

# A factor: one number, or a tensor that broadcasts over the state.
Factor = float | Tensor


def normal(out: Tensor, cursor: Tensor, stream: int) -> None:
    """Fill out [B, *] with standard normals (FDN1); float64 holds the float32 numbers, widened."""
    out.copy_(noise.normal(len(out), out.shape[1:], **_counter(cursor), stream=stream, device=out.device))


def rademacher(out: Tensor, cursor: Tensor, stream: int) -> None:
    """Fill out [B, *] with ±1: −1 where a bit is set. Element j of a sample has the counter (j>>11)·128 + ((j>>2)&127),
    its word j & 3, bit 31 − ((j>>9)&3), so that sixteen elements share a counter."""
    out.copy_(noise.rademacher(len(out), out.shape[1:], **_counter(cursor), stream=stream, device=out.device))


def step(
    out: Tensor,
    table: Tensor,
    cursor: Tensor,
    stream: int | None,
    x: Tensor,
    m: Tensor | None = None,
    history: Sequence[Tensor] | None = None,
    guide: Tensor | None = None,
    v: Tensor | None = None,
    base: Tensor | None = None,
    z: Tensor | None = None,
    measured: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    pushed: Tensor | None = None,
    net_input: Tensor | None = None,
    first_bad: Tensor | None = None,
) -> None:
    """One row of a table; letters in quotes are its columns.

        m ← guide + `guidance`·(m − guide)                   (Ho & Salimans 2022, classifier-free guidance)
        h_0 = clamp(`p`·x + `q`·m, `low`, `high`)
        out = `a`·x + `e`·base + `b0`·h_0 + `b1`·history[0] + … + `c`·z, in this order (without m, `b0` is history[0]'s)
        out = `known_alpha`·known + `known_sigma`·z where mask  (the known part of x_0, at the level that the row ends on)

    out may be x; nothing else that is written may share memory with an operand.
    A term whose coefficient is 0 is left out, whatever its operand holds. Without z, z is drawn if stream is not None.
    v (learned variance, Nichol & Dhariwal 2021, eq. 15) replaces c by exp(`log_mid` + `log_slope`·v), elementwise;
    measured [B, 2] replaces b0 and c by each sample's own.

    Also written, where they are not None: pushed ← h_0; net_input ← `next_scale`·out, in net_input's dtype and layout;
    first_bad int64 [B] ← min(itself, row) for samples whose out (or unclamped h_0, where it is clamped) is not finite.
    """
    k = int(cursor[0])
    row = dict(zip(COLUMNS, table[k].tolist()))
    h0, bad = None, None
    if m is not None:
        raw = _prediction(x, m, guide, row)
        h0 = raw.clamp(row["low"], row["high"])
        if row["low"] > -torch.inf or row["high"] < torch.inf:
            bad = ~_finite(raw)
    if z is None and stream is not None:
        z = torch.empty_like(out)
        normal(z, cursor, stream)
    b: list[Factor] = [row[f"b{j}"] for j in range(4)]
    c: Factor = (
        row["c"]
        if v is None
        else _exp(_weighted_sum([(1.0, torch.full_like(out, row["log_mid"])), (row["log_slope"], v)], out))
    )
    if measured is not None:
        b[0], c = (_per_sample(column, out) for column in measured.unbind(1))
    used = [*(history or ())] if h0 is None else [h0, *(history or ())]
    total = _weighted_sum([(row["a"], x), (row["e"], base), *zip(b, used), (c, z)], out)
    if mask is not None:
        total = torch.where(mask, _weighted_sum([(row["known_alpha"], known), (row["known_sigma"], z)], out), total)
    if net_input is not None:
        net_input.copy_(total * row["next_scale"])
    if first_bad is not None:
        bad = ~_finite(total) if bad is None else bad | ~_finite(total)
        first_bad.copy_(torch.where(bad, first_bad.clamp(max=k), first_bad))
    if pushed is not None and h0 is not None:
        pushed.copy_(h0)
    out.copy_(total)


def prepare_step(
    out: Tensor, table: Tensor, stream: int | None, x: Tensor, **operands: Any
) -> Callable[[Tensor, Tensor | None, Tensor | None], None]:
    """(cursor, m, v) -> None: `step` with the other operands fixed, for a loop that calls it row after row."""

    def run(cursor: Tensor, m: Tensor | None, v: Tensor | None) -> None:
        step(out, table, cursor, stream, x, m, v=v, **operands)

    return run


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
    """measured [B, 2] ← (δ, √(2δ)), δ = min(`gain`·(‖z‖/‖h_0‖)², `cap`), 0 where h_0 = 0; kept ← z, if it is not None.

    batch=False: each sample's own norms; True: the means over the batch of ‖z‖ and of ‖h_0‖ (Song et al. 2021, Alg. 4).
    """
    row = dict(zip(COLUMNS, table[int(cursor[0])].tolist()))
    h = _prediction(x, m, guide, row).clamp(row["low"], row["high"])
    if z is None and stream is not None:
        z = torch.empty_like(h)
        normal(z, cursor, stream)
    if z is None:
        raise ValueError("measure_langevin needs noise: pass z or a stream, both are None")
    noise_norm, score_norm = (_root(tree_sum(value.double() ** 2)) for value in (z, h))
    if batch:
        mean = [tree_sum(value[None]).div(max(len(value), 1)).expand(len(value)) for value in (noise_norm, score_norm)]
        noise_norm, score_norm = mean
    delta = (row["gain"] * (noise_norm / score_norm) ** 2).clamp(max=row["cap"])
    delta = torch.where(score_norm > 0, delta, 0.0)
    measured.copy_(torch.stack((delta, _root(2 * delta)), 1))
    if kept is not None:
        kept.copy_(z)


def perturb(x0: Tensor, alpha: Tensor, sigma: Tensor, cursor: Tensor, stream: int) -> Tensor:
    """x_t = alpha_i·x0 + sigma_i·ε for x0 [B, *] and alpha, sigma [B]; ε from the counter, contiguous in x0's dtype."""
    z = x0.new_empty(x0.shape)
    normal(z, cursor, stream)
    return _weighted_sum([(_per_sample(alpha, x0), x0), (_per_sample(sigma, x0), z)], x0)


def dsm_loss(
    output: Tensor, x0: Tensor, r: Tensor, w: Tensor, weight: Tensor, cursor: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """Each sample's weight_i · mean (output − r_i·x0 − w_i·ε)², [B], and the error in the brackets, [B, *], which the
    gradient needs; both in x0's dtype, whatever the output's. ε is that of `perturb`. (Vincent 2011, eq. 11.)"""
    z = x0.new_empty(x0.shape)
    normal(z, cursor, stream)
    target = _weighted_sum([(_per_sample(r, x0), x0), (_per_sample(w, x0), z)], x0)
    error = output.to(x0.dtype) - target
    mean = tree_sum(error.double() ** 2) / max(error[:1].numel(), 1)
    return (weight.to(x0.dtype).double() * mean).to(x0.dtype), error.contiguous()


def dsm_loss_backward(grad: Tensor, error: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of `dsm_loss` with respect to the output, of this dtype: 2/n·weight_i·grad_i·error, n elements a sample."""
    wide_weight, wide_grad = (column.to(error.dtype).double() for column in (weight, grad))
    factor = 2.0 * wide_weight * wide_grad / max(error[:1].numel(), 1)
    return _weighted_sum([(_per_sample(factor, error), error)], error).to(dtype)


def timestep_embedding(t: Tensor, frequencies: Tensor, scale: float, channels: int, order: str) -> Tensor:
    """Sines and cosines of (scale·t_i)·frequencies_k, [B, channels] for t [B] and frequencies [channels // 2].

    order: "sin_cos" (Ho et al. 2020), all sines, then all cosines; "cos_sin" (Dhariwal & Nichol 2021), the other way round;
    "interleaved" (Vaswani et al. 2017), sine and cosine by turns. If channels is odd, the last one is 0.
    For float32 times the angle is rounded to float32, its quarter turns are counted in float64, and the sine and cosine of
    what is left are FDN1's polynomials, whose errors are below 4e-9.
    """
    angle = (t * scale)[:, None] * frequencies
    if t.dtype == torch.float64:
        sine, cosine = angle.sin(), angle.cos()
    else:
        quarters = angle.double() * QUARTERS
        turns = quarters.round()
        sine, cosine = noise.quarter_turn((quarters - turns).float(), turns)
    return arranged(sine, cosine, channels, order)


def arranged(sine: Tensor, cosine: Tensor, channels: int, order: str) -> Tensor:
    """The sines and cosines of `timestep_embedding` in their channels."""
    choose("order", order, ("sin_cos", "cos_sin", "interleaved"))
    pair = (cosine, sine) if order == "cos_sin" else (sine, cosine)
    out = torch.stack(pair, -1).flatten(1) if order == "interleaved" else torch.cat(pair, 1)
    return torch.nn.functional.pad(out, (0, channels % 2))


def probe_dot(value: Tensor, cursor: Tensor, stream: int, kind: str, probe: Tensor | None = None) -> Tensor:
    """⟨v, value⟩ of each sample, float64 [B]; v is `probe`, or, if that is None, drawn: kind "rademacher" or "normal"
    (Hutchinson 1990)."""
    if probe is None:
        probe = value.new_empty(value.shape, dtype=torch.float32)
        (rademacher if kind == "rademacher" else normal)(probe, cursor, stream)
    return tree_sum(value.double() * probe.double())


def rk_error(
    x: Tensor, stages: Sequence[Tensor], h: Tensor, b: Sequence[float], e: Sequence[float], rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """x' = x + h_i Σ b_j k_j and each sample's error √mean((h_i Σ e_j k_j / (atol + rtol·max(|x|, |x'|)))²), in x's dtype.

    x [B, *], steps h [B], stages k_j [B, *], weights b and their difference e from the embedded method's (Hairer, Nørsett &
    Wanner, Solving ODEs I, eqs. II.4.10–4.11). A stage whose weight is 0 is left out of that sum.
    """

    def steps(weights: Sequence[float]) -> list[tuple[Factor, Tensor]]:
        rounded = [(torch.tensor(w, dtype=x.dtype, device=x.device), k) for w, k in zip(weights, stages) if w != 0]
        return [(_per_sample(h.to(x.dtype) * w, x), k) for w, k in rounded]

    after = _weighted_sum([(1.0, x), *steps(b)], x)
    error = _weighted_sum(list(steps(e)), x)
    tolerance = torch.tensor((rtol, atol), dtype=x.dtype, device=x.device)
    size = torch.maximum(x.abs(), after.abs())
    ratio = error / fma(size, tolerance[0].expand_as(size), tolerance[1].expand_as(size))
    mean = tree_sum(ratio.double() ** 2) / max(x[:1].numel(), 1)
    return after, _root(mean).to(x.dtype)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a·b + c rounded once (float32), by a float64 sum rounded to odd; in float64 a product and a sum."""
    if a.dtype != torch.float32:
        return a * b + c
    product, c64 = a.double() * b.double(), c.double()  # the product of two float32 is exact
    total = product + c64
    # the error of the sum (Knuth's TwoSum); where it is not 0 and the sum's last bit is even, the odd neighbour on the
    # error's side makes the second rounding, to float32, see on which side of a tie the true value lies
    shadow = total - product
    error = (product - (total - shadow)) + (c64 - shadow)
    inexact = (error != 0) & (total.view(torch.int64) & 1 == 0)
    odd = torch.nextafter(total, torch.copysign(torch.full_like(error, torch.inf), error))
    return torch.where(inexact, odd, total).float()


def tree_sum(values: Tensor) -> Tensor:
    """Sum over all but the first axis, float64 [B]: blocks of 1024 elements in the sample's order, each halved down to
    one number (element i + element i + n/2), then the blocks the same way."""
    flat = values.double().flatten(1)
    # a block's halves that lie beyond a short sample's end are zeros, which change nothing: leave them out
    width = min(BLOCK, 1 << max(flat.shape[1] - 1, 0).bit_length())
    blocks = -(-flat.shape[1] // width)
    flat = torch.nn.functional.pad(flat, (0, blocks * width - flat.shape[1])).view(len(flat), blocks, width)
    return _halve(_halve(flat))


QUARTERS = float.fromhex("0x1.45f306dc9c883p-1")  # quarter turns in a radian, 2/π


def _prediction(x: Tensor, m: Tensor, guide: Tensor | None, row: dict[str, float]) -> Tensor:
    """p·x + q·m in x's dtype, m after guidance."""
    m = m.to(x.dtype)
    if guide is not None:
        guide = guide.to(x.dtype)
        m = fma(m - guide, torch.full_like(m, row["guidance"]), guide)
    return _weighted_sum([(row["p"], x), (row["q"], m)], x)


def _weighted_sum(terms: Sequence[tuple[Factor, Tensor | None]], like: Tensor) -> Tensor:
    """Σ factor·value in order, like `like` but contiguous: one product, then fma by fma; terms of factor 0 are left out."""
    total: Tensor | None = None
    for factor, value in terms:
        if value is None or (not isinstance(factor, Tensor) and factor == 0):
            continue
        factor = torch.as_tensor(factor, dtype=like.dtype, device=like.device).expand(like.shape)
        value = value.to(like.dtype).expand(like.shape)
        total = value * factor if total is None else fma(value, factor, total)
    return like.new_zeros(like.shape) if total is None else total.contiguous()


def _exp(u: Tensor) -> Tensor:
    """e^u by exactly rounded steps alone, for u clamped to [−86, 88], in float64 to [−708, 709]."""
    if u.dtype == torch.float64:
        u, per, high, low, series = u.clamp(-708.0, 709.0), _PER_LN_2_WIDE, _LN_2_HIGH_WIDE, _LN_2_LOW_WIDE, _EXP_WIDE
        whole, bias, place = torch.int64, 1023, 52
    else:
        u, per, high, low, series = u.clamp(-86.0, 88.0), _PER_LN_2, _LN_2_HIGH, _LN_2_LOW, _EXP
        whole, bias, place = torch.int32, 127, 23
    n = (u * per).round()
    r = fma(n, torch.full_like(u, -low), fma(n, torch.full_like(u, -high), u))
    p = torch.full_like(u, series[0])
    for coefficient in series[1:]:
        p = fma(p, r, torch.full_like(u, coefficient))
    return p * ((n.nan_to_num().to(whole) + bias) << place).view(u.dtype)


def _root(value: Tensor) -> Tensor:
    """The square root of float64, correctly rounded; torch's on a CPU is not."""
    if value.device.type == "cpu":
        with np.errstate(invalid="ignore"):
            return torch.from_numpy(np.sqrt(value.numpy()))
    return value.sqrt()


def _finite(x: Tensor) -> Tensor:
    return x.isfinite().flatten(1).all(1)


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """value [B] in like's dtype (rounded once), to broadcast over like [B, *]."""
    return value.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _counter(cursor: Tensor) -> dict[str, int]:
    draw, first_sample, seed = cursor.tolist()
    return {"draw": draw, "first_sample": first_sample, "seed": seed & (2**64 - 1)}


def _halve(values: Tensor) -> Tensor:
    """Sum over the last axis by halves, padded with zeros to a power of two."""
    n = 1 << max(values.shape[-1] - 1, 0).bit_length()
    values = torch.nn.functional.pad(values, (0, n - values.shape[-1]))
    while n > 1:
        n //= 2
        values = values[..., :n] + values[..., n:]
    return values[..., 0]
