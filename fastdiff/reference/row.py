"""What each operation means, in plain PyTorch: the oracle of the kernels, and the backend that runs anywhere.

In float32 a row is one product and a chain of fused multiply-adds, each rounded once, so that every backend makes the
same bits; reductions are a fixed tree in float64. Nothing here depends on layout, thread count or batch split.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1024

# A coefficient: one number, or one for each sample [B].
Coefficient = float | Tensor


def step(
    x: Tensor,
    *,
    a: Coefficient,
    e: Coefficient = 0.0,
    b: Sequence[Coefficient] = (),
    c: Coefficient | Tensor = 0.0,
    base: Tensor | None = None,
    history: Sequence[Tensor] = (),
    z: Tensor | None = None,
) -> Tensor:
    """One row, a·x + e·base + Σ b_j·h_j + c·z in this order, absent terms (coefficient 0) left out; x [B, *].

    float32: one product, then fma by fma. float64: a product and a sum each. `c` may have x's shape (learned variance).
    """
    terms: list[tuple[Coefficient, Tensor | None]] = [(a, x), (e, base), *zip(b, history), (c, z)]
    total: Tensor | None = None
    for coefficient, value in terms:
        if value is None or (not isinstance(coefficient, Tensor) and coefficient == 0):
            continue
        factor = _factor(coefficient, x)
        total = value.to(x.dtype) * factor if total is None else fma(value.to(x.dtype), factor, total)
    return torch.zeros_like(x) if total is None else total


def convert(x: Tensor, m: Tensor, p: float, q: float, clip: tuple[float, float] | None) -> Tensor:
    """h = P(p·x + q·m), P the identity or the clamp to `clip`; NaN stays NaN."""
    h = m if (p, q) == (0.0, 1.0) else step(x, a=p, b=(q,), history=(m,))
    return h if clip is None else h.clamp(*clip)


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
    # in a shorter sample the halves beyond its end are zeros, which change nothing: leave them out
    width = min(BLOCK, 1 << max(flat.shape[1] - 1, 0).bit_length())
    blocks = -(-flat.shape[1] // width)
    flat = torch.nn.functional.pad(flat, (0, blocks * width - flat.shape[1])).view(len(flat), blocks, width)
    return _halve(_halve(flat))


def measure_langevin(h: Tensor, z: Tensor, *, norm: str, gain: float, cap: float) -> tuple[Tensor, Tensor]:
    """δ and √(2δ) of a measured Langevin step, in h's dtype, [B] each: δ = min(gain·(‖z‖/‖h‖)², cap), 0 where h = 0.

    norm="sample": each sample's own norms; "batch": the means over the batch of ‖z‖ and of ‖h‖ (Song et al. 2021).
    """
    noise, score = tree_sum(z.double() ** 2).sqrt(), tree_sum(h.double() ** 2).sqrt()
    if norm == "batch":
        noise, score = (tree_sum(v[None]).div(len(v)).expand(len(v)) for v in (noise, score))
    delta = (gain * (noise / score) ** 2).clamp(max=cap)
    delta = torch.where(score > 0, delta, 0.0)
    return delta.to(h.dtype), (2 * delta).sqrt().to(h.dtype)


def learned_scale(v: Tensor, low: float, high: float) -> Tensor:
    """The noise scale exp(½ (frac·high + (1 − frac)·low)), frac = (v + 1)/2 (Nichol & Dhariwal 2021, eq. 15)."""
    fraction = (v.double() + 1) / 2
    return (0.5 * (fraction * high + (1 - fraction) * low)).exp()


def _halve(values: Tensor) -> Tensor:
    """Sum over the last axis by halves, padded with zeros to a power of two."""
    n = 1 << (values.shape[-1] - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, n - values.shape[-1]))
    while n > 1:
        n //= 2
        values = values[..., :n] + values[..., n:]
    return values[..., 0]


def _factor(coefficient: Coefficient, x: Tensor) -> Tensor:
    """A coefficient as a tensor of x's dtype that broadcasts over x (rounded once from float64)."""
    if not isinstance(coefficient, Tensor):
        return torch.tensor(coefficient, dtype=x.dtype, device=x.device)
    coefficient = coefficient.to(x.dtype)
    return coefficient if coefficient.ndim == x.ndim else coefficient.view(-1, *[1] * (x.ndim - 1))
