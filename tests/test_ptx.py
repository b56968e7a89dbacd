"""tests/ptx.py itself, against exact arithmetic: what it says of compiled kernels rests on it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import ptx
import pytest
import torch

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid 128
{
// %bb.0:
	ld.param.b64 %rd1, [kernel_param_0];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mad.lo.s32 %r3, %r2, 128, %r1;
	mul.wide.u32 %rd2, %r3, 4;
	add.s64 %rd3, %rd1, %rd2;
"""


def run(code, out, programs=2, shared=0, approximations=()):
    kernel = ptx.Kernel(HEAD + code + "\tret;\n$L__func_end0:\n}", approximations)
    kernel.run((programs,), [out.data_ptr(), 5], [out], shared)


def bits(generator, count):
    """float32 of any bits, and those next to where rounding turns."""
    words = generator.integers(0, 2**32, count, dtype=np.uint32)
    plain = (generator.standard_normal(count) * 2.0 ** generator.integers(-70, 70, count)).astype(np.float32)
    few = (generator.integers(1, 64, count) * 2.0 ** generator.integers(-30, 30, count)).astype(np.float32)
    return np.concatenate((words.view(np.float32), plain, few))


def rounded(value):
    """The float32 nearest to a fraction, ties to even."""
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = max(math.floor(math.log2(size.numerator) - math.log2(size.denominator)) - 1, -126) - 23
    while size >= Fraction(2) ** (exponent + 24) and exponent < 104:
        exponent += 1
    units = round(size / Fraction(2) ** exponent)  # Python rounds ties to even
    result = units * Fraction(2) ** exponent
    return math.copysign(math.inf if result >= 2**128 else float(result), value)


@pytest.mark.filterwarnings("ignore:(overflow|invalid|underflow|divide)")
def test_fma_is_rounded_once():
    generator = np.random.default_rng(0)
    a, b, c = (generator.permutation(bits(generator, 3000)) for _ in range(3))
    # a sum that is half way between two float32 but for a last bit far below
    a[:500], b[:500] = 1 + 2.0**-12, (1 + 2.0**-12) * 2.0 ** generator.integers(-3, 3, 500)
    c[:500] = generator.choice([-1, 1], 500) * 2.0 ** generator.integers(-90, -25, 500)
    ours = ptx.fma(a, b, c)
    for x, y, z, found in zip(a.tolist(), b.tolist(), c.tolist(), ours.tolist()):
        if all(map(math.isfinite, (x, y, z))):
            assert found == rounded(Fraction(x) * Fraction(y) + Fraction(z)), (x, y, z)
        else:
            assert found == x * y + z or math.isnan(x * y + z) == math.isnan(found)


def test_bfloat16_and_half_are_rounded_as_torch_does():
    values = bits(np.random.default_rng(0), 3000)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    ours = ptx.bf16(values)
    finite = ~np.isnan(values)
    assert np.array_equal(ours[finite], theirs[finite])
    with np.errstate(over="ignore"):
        halves = ptx.convert(values.view(np.uint32), "rn", "f16", "f32").view(np.uint16)
    assert np.array_equal(
        halves[finite], torch.from_numpy(values).half().view(torch.int16).numpy().view(np.uint16)[finite]
    )


@pytest.mark.filterwarnings("ignore:(overflow|invalid|underflow|divide)")
def test_approximations_are_off_by_as_much_as_they_may_be():
    """Two units in the last place at most, both ways, the same for the same operands; and none of 0, infinity and NaN."""
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(5000).astype(np.float32) for _ in range(2))
    quotient, power = a.astype(np.float64) / b, np.exp2(8 * a.astype(np.float64))
    for ours, exact in ((ptx.full_division(a, b), quotient), (ptx.power_of_two(8 * a), power)):
        places = (ours - exact) / np.spacing(exact.astype(np.float32))
        assert -2.6 < places.min() < -2 < 2 < places.max() < 2.6  # half a unit more: of the nearest one
    assert np.array_equal(ptx.full_division(a, b), ptx.full_division(a, b))
    ends = np.array([-np.inf, -200, 0, -0.0, 200, np.inf, np.nan], np.float32)
    assert np.array_equal(
        ptx.power_of_two(ends), np.array([0, 0, 1, 1, np.inf, np.inf, np.nan], np.float32), equal_nan=True
    )
    quotients = ptx.full_division(ends, np.array([np.inf, np.inf, 3, 3, np.inf, 2, 1], np.float32))
    assert np.array_equal(quotients, np.array([np.nan, 0, 0, 0, 0, np.inf, np.nan], np.float32), equal_nan=True)


def test_approximations_are_known_where_they_are_declared():
    out, code = (
        torch.zeros(256, dtype=torch.int32),
        "ex2.approx.f32 %r4, 0f00000000; st.global.b32 [ %rd3 + 0 ], { %r4 };",
    )
    run(code, out, approximations=["ex2.approx.f32"])
    assert bool((out.view(torch.float32) == 1).all())
    for allowed in ((), ("div.full.f32",)):
        with pytest.raises(ptx.PtxError, match="is not known here"):
            run(code, out, approximations=allowed)


def test_whole_numbers():
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 2**64, 500, dtype=np.uint64) for _ in range(2))
    assert ptx.upper_product(a, b).tolist() == [x * y >> 64 for x, y in zip(a.tolist(), b.tolist())]
    words, by = a.astype(np.uint32), np.array([0, 1, 31, 32, 33, 200] * 80, np.uint32)
    for left in (True, False):
        shifted = [x << n if left else x >> n for x, n in zip(words[:480].tolist(), by.tolist())]
        assert ptx.shift(left)(words[:480], by).tolist() == [value % 2**32 for value in shifted]
    signed = words[:480].view(np.int32)
    assert ptx.shift(False)(signed, by).tolist() == [x >> n for x, n in zip(signed.tolist(), by.tolist())]
    five, seven = np.array([5], np.uint32), np.array([7], np.uint32)
    assert ptx.extract(words, five, seven).tolist() == [(x >> 5) % 128 for x in words.tolist()]
    assert ptx.extract(signed, five, seven).tolist() == [((x >> 5) % 128 ^ 64) - 64 for x in signed.tolist()]
    picked = ptx.permute(
        np.array([0x33221180], np.uint32), np.array([0x77665544], np.uint32), np.array([0x8705], np.uint32)
    )
    assert picked.tolist() == [0xFF778055]


def test_a_program_runs_and_is_masked():
    """Threads under 100 write their number and five more, the others leave by the branch."""
    out = torch.full((256,), -1, dtype=torch.int32)
    run("""
	ld.param.b32 %r9, [kernel_param_1];
	setp.ge.u32 %p1, %r1, 100;
	@%p1 bra $L__BB0_2;
	add.s32 %r4, %r3, %r9;
	@!%p1 st.global.b32 [ %rd3 + 0 ], { %r4 };
$L__BB0_2:
""", out)  # fmt: skip
    expected = torch.arange(256, dtype=torch.int32) + 5
    expected[100:128] = expected[228:] = -1
    assert torch.equal(out, expected)


def test_threads_exchange_through_shared_memory_and_warps():
    out = torch.zeros(256, dtype=torch.int32)
    code = """
	shl.b32 %r5, %r1, 2;
	st.shared.b32 [%r5], %r3;
	bar.sync 0;
	xor.b32 %r6, %r5, 508;
	ld.shared.b32 %r7, [%r6];
	shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1;
	st.global.b32 [ %rd3 + 0 ], { %r8 };
"""
    run(code, out, shared=512)
    assert out.tolist() == [128 * program + ((127 - thread) ^ 1) for program in range(2) for thread in range(128)]
    leave = "setp.eq.u32 %p1, %r2, 1; @%p1 bra $L__BB0_1; bar.sync 0; $L__BB0_1:"  # one program, before its barrier
    for barrier in ("", leave):
        with pytest.raises(ptx.PtxError, match="a race: two groups of threads, with no barrier"):
            run(code.replace("bar.sync 0;", barrier), out, shared=512)


def test_a_register_that_is_not_written_is_garbage():
    out = torch.zeros(256, dtype=torch.int32)
    run("setp.lt.u32 %p1, %r1, 100; @%p1 mov.b32 %r4, 7; st.global.b32 [ %rd3 + 0 ], { %r4 };", out)
    assert set(out[:100].tolist()) == {7}
    assert 0 not in out


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("add.f32 %r4, 0f3F800000, 0f3F800000;", "is not known here"),  # which ptxas may contract
        ("sqrt.approx.ftz.f32 %r4, 0f3F800000;", "is not known here"),
        ("ld.global.s8 { %rs1 }, [ %rd1 + 0 ];", "is not known here"),  # which widens with the sign
        ("cvt.rn.bf16.f64 %rs1, 0d3FF0000000000000;", "is not known here"),
        ("st.global.b32 [ %rd3 + 4 ], { %r1 };", "outside of every argument's memory"),
        ("st.global.b32 [ %rd3 + 2 ], { %r1 };", "is not aligned"),
        ("ld.global.v4.b32 { %r4, %r5, %r6, %r7 }, [ %rd3 + 0 ];", "is not aligned"),
        ("st.global.b32 [ %rd1 + 0 ], { %r2 };", "a race: two programs"),
        (
            "mad.wide.u32 %rd5, %r2, 4, %rd1; st.global.b32 [ %rd5 + 0 ], { %r1 };",
            "a race: two groups of threads",
        ),
        ("setp.eq.u32 %p1, %r1, 3; @%p1 bra $L__BB0_1; bar.sync 0; $L__BB0_1:", "a barrier that some"),
        (
            "setp.eq.u32 %p1, %r1, 3; @%p1 bra $L__BB0_1; redux.sync.max.s32 %r4, %r1, -1; $L__BB0_1:",
            "a warp's threads",
        ),
        ("$L__BB0_1: setp.eq.u32 %p1, %r1, 3; @%p1 bra $L__BB0_1;", "branches back"),
    ],
)
def test_what_a_kernel_must_not_do_is_refused(code, reason):
    with pytest.raises(ptx.PtxError, match=reason):
        run(code, torch.zeros(256, dtype=torch.int32))


def test_programs_may_share_what_they_only_read_and_lower_what_is_atomic():
    out = torch.full((256,), 7, dtype=torch.int64)
    run(
        "cvt.u64.u32 %rd5, %r3; red.global.gpu.relaxed.min.s64 [ %rd1 + 8 ], %rd5; ld.global.b32 { %r4 }, [ %rd1 + 0 ];",
        out,
    )
    assert out.tolist() == [7, 0, *[7] * 254]
    with pytest.raises(ptx.PtxError, match="a race"):
        run(
            "mov.b64 %rd5, 1; red.global.gpu.relaxed.min.s64 [ %rd1 + 8 ], %rd5; ld.global.b32 { %r4 }, [ %rd1 + 8 ];",
            out,
        )
