"""FDN1 on the GPU: Philox4x32-10 words, Box–Muller normals and ±1 signs, bit for bit those of fastdiff.execution.noise.

Sources: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Box & Muller 1958. Every float step is exactly
rounded (an explicit fma, a product that feeds no sum, an IEEE square root), so the bits cannot depend on the compiler;
launches switch contraction off all the same (`enable_fp_fusion=False`).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Polynomials' coefficients stand in the functions as literals: Triton compares every global that a kernel uses, at every
# launch, and sixty of them would take longer than all the rest of it. They are those of fastdiff.execution.noise and
# .reference in the shortest decimals that name the same float32, str(numpy.float32(c)) (tests/test_triton.py compares them).


@triton.jit
def words(cursor, quad, row, first, stream):
    """The four words of each counter: `quad` of sample `row` after the program's `first`; draw and seed from the cursor."""
    draw = tl.load(cursor)
    sample = tl.load(cursor + 1) + first + row
    seed = tl.load(cursor + 2).to(tl.uint64, bitcast=True)
    low, high = seed & 0xFFFFFFFF, seed >> 32
    c0 = quad.to(tl.uint32)
    c1 = tl.zeros_like(c0) + draw.to(tl.uint32)
    c2 = tl.zeros_like(c0) + sample.to(tl.uint32)
    c3 = tl.zeros_like(c0) + stream.to(tl.uint32)
    for i in tl.static_range(10):
        # 64-bit products: one IMAD.WIDE gives both halves. Keys are summed in 64 bits too: no scalar overflows (which
        # the interpreter's numpy would warn of), and the compiler narrows the sum.
        k0, k1 = (low + i * 0x9E3779B9).to(tl.uint32), (high + i * 0xBB67AE85).to(tl.uint32)
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _radius(r):
    """√(−2 ln u), u = (r/2 + 1/2) 2⁻³¹ in (0, 1]."""
    u = tl.fma((r >> 1).to(tl.int32).to(tl.float32), 2.0**-31, 2.0**-32)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, -0.28112233, 0.30806395)
    p = tl.fma(p, f, -0.279753)
    p = tl.fma(p, f, 0.32825583)
    p = tl.fma(p, f, -0.4002389)
    p = tl.fma(p, f, 0.5001606)
    p = tl.fma(p, f, -0.66666335)
    p = tl.fma(p, f, 0.9999986)
    p = tl.fma(p, f, -2.0)
    return tl.sqrt_rn(tl.fma(exponent.to(tl.float32), -1.3862944, p * f))


@triton.jit
def sine_cosine(t):
    """Sine and cosine of t quarter turns, t float32 in [−1/2, 1/2]."""
    s = t * t
    sine = tl.fma(s, -0.004601658, 0.07968003)
    sine = tl.fma(sine, s, -0.6459635)
    sine = tl.fma(sine, s, 1.5707964) * t
    cosine = tl.fma(s, 0.000903363, -0.020859936)
    cosine = tl.fma(cosine, s, 0.25366917)
    cosine = tl.fma(cosine, s, -1.2337005)
    cosine = tl.fma(cosine, s, 1.0)
    return sine, cosine


@triton.jit
def _pair(r, angle):
    """Two normals from a radius word and a circle word (bit 0: the cosine's sign, bit 1: a swap)."""
    radius = _radius(r)
    sine, cosine = sine_cosine(angle.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32)
    cosine = (cosine.to(tl.uint32, bitcast=True) ^ (angle << 31)).to(tl.float32, bitcast=True)
    swap = (angle & 2) != 0
    return radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def interleave(v0, v1, v2, v3):
    """[n] × 4 → [4n], element 4i + k from v_k[i]; each thread keeps its own four, so that loads stay 128 bits wide."""
    return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), [4 * v0.shape[0]])


@triton.jit
def normals(cursor, quad, row, first, stream):
    """Four normals for each quad, in the order of their elements: float32 [4 · quads]."""
    r0, r1, r2, r3 = words(cursor, quad, row, first, stream)
    z0, z1 = _pair(r0, r1)
    z2, z3 = _pair(r2, r3)
    return interleave(z0, z1, z2, z3)


@triton.jit
def sign_words(cursor, start, first, stream, QUADS: tl.constexpr, SAMPLES: tl.constexpr):
    """The words of a program's signs, in the order of its elements: group g of 512 takes bit 31 − g of the same word."""
    q = tl.arange(0, QUADS * SAMPLES)
    row = q // QUADS if SAMPLES > 1 else q * 0
    quad = q % QUADS + (start >> 11).to(tl.int32) * 128
    r0, r1, r2, r3 = words(cursor, quad, row, first, stream)
    return interleave(r0, r1, r2, r3)


@triton.jit
def signs(word, group: tl.constexpr):
    """−1 where the word's bit 31 − group is set, else 1."""
    return (((word << group) & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)
