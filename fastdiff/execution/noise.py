"""FDN1, fastdiff's random numbers: a pure function of (seed, stream, sample, draw, element), in plain PyTorch.

Words come from Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), normals from the
Box-Muller transform with polynomials whose every step is exactly rounded in float32, so that every backend makes the
same bits. Element `j` of a sample, in row-major order of its shape, belongs to the counter `quad = j >> 2`:

    key = (seed low, seed high)      counter = (quad, draw, sample, stream)      -> words r0 r1 r2 r3
    (z0, z1) from (r0, r1)           (z2, z3) from (r2, r3)

float32 `fma` is emulated in float64: the product of two float32 is exact there and only the sum rounds twice. An
exhaustive run over all 2^31 radius words and 2^32 circle words found no result that the second rounding changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The streams: noise for different purposes, which never share a counter.
(
    PRIOR,
    SAMPLER,
    PERTURBATION,
    PROBES,
    AUGMENTATION,
    DATA_ORDER,
    TIMES,
    ACCEPTANCE,
    CONDITIONS,
    MEASUREMENTS,
    ENCODINGS,
) = range(11)

HOST = torch.device("cpu")  # not the default device, which a user may have set
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# -2 ln(1+f)/f on [-1/3, 1/3), highest power first; -2 ln 2; sin and cos of a quarter turn, highest power first.
_LOG = tuple(map(float.fromhex, (
    "-0x1.1fde88p-2", "0x1.3b751ep-2", "-0x1.1e7792p-2", "0x1.50224cp-2", "-0x1.99d83ap-2", "0x1.00150cp-1",
    "-0x1.5554e6p-1", "0x1.ffffd2p-1", "-0x1p+1",
)))  # fmt: skip
_MINUS_2_LN_2 = float.fromhex("-0x1.62e43p+0")
_SIN = tuple(map(float.fromhex, ("-0x1.2d9302p-8", "0x1.465e92p-4", "-0x1.4abbbap-1", "0x1.921fb6p+0")))
_COS = tuple(map(float.fromhex, ("0x1.d99f54p-11", "-0x1.55c4eap-6", "0x1.03c1dap-2", "-0x1.3bd3ccp+0", "0x1p+0")))


def philox(counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], seed: int) -> list[Tensor]:
    """Philox4x32-10: the four 32-bit words of each counter, as int64 tensors (the counters broadcast)."""
    device = next((c.device for c in counter if isinstance(c, Tensor)), None)
    parts = [torch.as_tensor(c, dtype=torch.int64, device=device) for c in counter]
    c0, c1, c2, c3 = torch.broadcast_tensors(*parts)
    k0, k1 = seed & _WORD, seed >> 32
    for _ in range(10):
        # int64 products wrap, which leaves all 64 bits of the unsigned product in place
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32).bitwise_and_(_WORD).bitwise_xor_(c1).bitwise_xor_(k0),
            p1.bitwise_and_(_WORD),
            (p0 >> 32).bitwise_and_(_WORD).bitwise_xor_(c3).bitwise_xor_(k1),
            p0.bitwise_and_(_WORD),
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


def words(
    num_samples: int, quads: int, *, seed: int, draw: int, first_sample: int, stream: int, device: torch.device | None
) -> list[Tensor]:
    """The words r0 ... r3 of `quads` counters of each sample, each int64 [num_samples, quads]."""
    device = HOST if device is None else device
    quad = torch.arange(quads, dtype=torch.int64, device=device)
    sample = torch.arange(first_sample, first_sample + num_samples, dtype=torch.int64, device=device)[:, None]
    return philox((quad, draw, sample, stream), seed)


def normal(
    num_samples: int,
    shape: Sequence[int],
    *,
    seed: int,
    draw: int = 0,
    first_sample: int = 0,
    stream: int = PRIOR,
    device: torch.device | None = None,
) -> Tensor:
    """Standard normals, float32 [num_samples, *shape]."""
    numel = math.prod(shape)
    r0, r1, r2, r3 = words(
        num_samples, -(-numel // 4), seed=seed, draw=draw, first_sample=first_sample, stream=stream, device=device
    )
    # a sample of one or two numbers needs only the first pair of words of its one counter
    pairs = (r0, r1) if numel <= 2 else (torch.stack((r0, r2), -1), torch.stack((r1, r3), -1))
    radius, (cosine, sine) = _radius(pairs[0]), _circle(pairs[1])
    z = torch.stack((radius * cosine, radius * sine), -1)
    return z.flatten(1)[:, :numel].reshape(num_samples, *shape)


def uniform(
    num_samples: int,
    shape: Sequence[int],
    *,
    seed: int,
    draw: int = 0,
    first_sample: int = 0,
    stream: int,
    device: torch.device | None = None,
) -> Tensor:
    """Uniform numbers in [0, 1), float32 [num_samples, *shape]: the upper 24 bits of word `j & 3` of quad `j >> 2`."""
    numel = math.prod(shape)
    r = torch.stack(
        words(
            num_samples, -(-numel // 4), seed=seed, draw=draw, first_sample=first_sample, stream=stream, device=device
        ),
        -1,
    )
    u = (r >> 8).to(torch.float32) * 2.0**-24
    return u.flatten(1)[:, :numel].reshape(num_samples, *shape)


def rademacher(
    num_samples: int,
    shape: Sequence[int],
    *,
    seed: int,
    draw: int = 0,
    first_sample: int = 0,
    stream: int,
    device: torch.device | None = None,
) -> Tensor:
    """±1 with probability ½, float32 [num_samples, *shape]: −1 where bit 31 − ((j >> 9) & 3) of word j & 3 is set, of the
    counter (j >> 11)·128 + ((j >> 2) & 127)."""
    numel = math.prod(shape)
    blocks = -(-numel // 2048)
    r = torch.stack(
        words(num_samples, 128 * blocks, seed=seed, draw=draw, first_sample=first_sample, stream=stream, device=device),
        -1,
    )
    r = r.view(num_samples, blocks, 1, 512)
    bit = torch.tensor([31, 30, 29, 28], device=r.device)[:, None]
    sign = 1.0 - 2.0 * ((r >> bit) & 1).to(torch.float32)
    return sign.flatten(1)[:, :numel].reshape(num_samples, *shape)


def quarter_turn(t: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine, float32, of t + turns quarter turns, for t float32 in [-1/2, 1/2] and whole numbers `turns`."""
    sine, cosine = _sine_cosine(t)
    quadrant = turns - 4 * (turns / 4).floor()
    swap, minus_sine, minus_cosine = quadrant % 2 == 1, quadrant >= 2, (quadrant == 1) | (quadrant == 2)
    sine, cosine = torch.where(swap, cosine, sine), torch.where(swap, sine, cosine)
    return torch.where(minus_sine, -sine, sine), torch.where(minus_cosine, -cosine, cosine)


def permutation(n: int, *, seed: int, draw: int, stream: int = DATA_ORDER) -> Tensor:
    """A random order of 0 ... n-1 (int64 [n]): the order of 63-bit keys, ties broken by index."""
    quads = -(-n // 2)
    r0, r1, r2, r3 = words(1, quads, seed=seed, draw=draw, first_sample=0, stream=stream, device=None)
    keys = torch.stack(((r0 >> 1 << 32) | r1, (r2 >> 1 << 32) | r3), -1).reshape(-1)[:n]
    return torch.argsort(keys, stable=True)


def _radius(r: Tensor) -> Tensor:
    """sqrt(-2 ln u), u = (r/2 + 1/2) 2^-31 in (0, 1], float32."""
    u = _fma((r >> 1).to(torch.float32), 2.0**-31, 2.0**-32).to(torch.float32)
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    p = _polynomial(_LOG, f)
    m = _fma(exponent.to(torch.float32), _MINUS_2_LN_2, p * f)
    # torch.sqrt of CPU float32 is not correctly rounded; of float64, then rounded, it is
    return m.double().sqrt_().to(torch.float32)


def _circle(r: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angle that the word `r` names: quarter turns in [-1/2, 1/2], a sign bit, a swap bit."""
    sine, cosine = _sine_cosine(r.to(torch.int32).to(torch.float32) * 2.0**-32)
    cosine = torch.where((r & 1).bool(), -cosine, cosine)
    swap = (r & 2).bool()
    return torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)


def _sine_cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of t quarter turns, t float32 in [-1/2, 1/2]."""
    s = t * t
    return _polynomial(_SIN, s) * t, _polynomial(_COS, s)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Horner's rule by float32 fma, highest power first."""
    p = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        p = _fma(p, x, c)
    return p


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """float32 fma(a, b, c) for operands whose second rounding changes nothing (see the module's docstring)."""
    b = b.double() if isinstance(b, Tensor) else b
    return a.double().mul_(b).add_(c).to(torch.float32)
