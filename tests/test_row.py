"""What each operation means, against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastdiff.reference import row


def exact_float32(value: Fraction) -> np.float32:
    """The float32 nearest to a rational, ties to even, by comparing exact distances."""
    guess = np.float32(float(value))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    distances = [abs(Fraction(float(v)) - value) for v in near]
    best = min(distances)
    winners = [v for v, d in zip(near, distances) if d == best]
    return min(winners, key=lambda v: int(v.view(np.uint32)) & 1)


def fma_cases():
    rng = np.random.default_rng(0)
    a, b, c = (rng.normal(size=3000).astype(np.float32) for _ in range(3))
    c *= np.float32(2.0) ** rng.integers(-30, 30, 3000).astype(np.float32)
    # sums that land a hair beside a tie of float32, which a rounding to float64 in between would hide:
    # 1 + 2^-24 is a tie; ± 2^-70 decides it and is lost in float64
    tie_a = np.full(8, 2.0**-24, np.float32) * np.array([1, 1, 3, 3, 1, 1, 5, 5], np.float32)
    tie_b = np.float32(1) + np.float32(
        [2.0**-23, -(2.0**-24), 2.0**-23, -(2.0**-24), 0, 2.0**-22, -(2.0**-24), 2.0**-23]
    )
    tie_c = np.float32([1, 1, 1, 1, -1, -1, 3, 3])
    tiny = np.float32([2.0**-45, -(2.0**-45)])
    return (
        np.concatenate([a, tie_a, tiny]),
        np.concatenate([b, tie_b, np.float32([2.0**-25, 2.0**-25])]),
        np.concatenate([c, tie_c, np.float32([1 + 2.0**-23, 1 + 2.0**-23])]),
    )


def test_fma_rounds_once():
    a, b, c = fma_cases()
    ours = row.fma(*(torch.from_numpy(v) for v in (a, b, c))).numpy()
    for x, y, z, got in zip(a, b, c, ours):
        expected = exact_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        assert got == expected, (x, y, z)


def test_the_cases_above_tell_one_rounding_from_two():
    """p + c with p·2^-70 off a tie: the plain float64 sum, then float32, goes to the even side every time."""
    a = torch.tensor([1 + 2.0**-23])
    b = torch.tensor([2.0**-24 * (1 - 2.0**-23)])  # the product is 2^-24 (1 − 2^-46)
    c = torch.tensor([1 + 2.0**-23])
    twice = (a.double() * b.double() + c.double()).float()
    once = row.fma(a, b, c)
    assert float(once) == 1 + 2.0**-23
    assert float(twice) == 1 + 2.0**-22  # the tie that float64 made of it goes to even


def test_step_is_the_chain_in_its_order():
    g = torch.Generator().manual_seed(0)
    x, base, h0, h1, z = (torch.randn(3, 5, generator=g) for _ in range(5))
    ours = row.step(x, a=0.9, e=-0.3, b=(0.2, 1.7), c=0.4, base=base, history=(h0, h1), z=z)
    total = x * torch.tensor(0.9)
    for coefficient, value in ((-0.3, base), (0.2, h0), (1.7, h1), (0.4, z)):
        total = row.fma(value, torch.tensor(coefficient), total)
    assert torch.equal(ours, total)
    assert torch.equal(row.step(x, a=0.0), torch.zeros_like(x))
    nan = torch.full_like(x, math.nan)
    absent = row.step(x, a=1.0, e=0.0, b=(0.0,), c=0.0, base=nan, history=(nan,), z=nan)
    assert torch.equal(absent, x)  # a term whose coefficient is 0 is left out, not multiplied
    each = row.step(x, a=1.0, b=(torch.tensor([0.1, 0.2, 0.3]),), history=(h0,))
    for i, b in enumerate((0.1, 0.2, 0.3)):
        assert torch.equal(each[i], row.step(x[i], a=1.0, b=(b,), history=(h0[i],)))


def test_convert_clamps_and_keeps_nan():
    x, m = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, math.nan]])
    assert row.convert(x, m, 0.0, 1.0, None) is m
    clipped = row.convert(x, m, 0.5, 2.0, (-1.0, 1.0))
    assert clipped[0, 0] == 1.0
    assert clipped[0, 1].isnan()


@pytest.mark.parametrize("n", [1, 2, 3, 1023, 1024, 1025, 5000])
def test_tree_sum_is_a_sum_and_a_fixed_tree(n):
    g = torch.Generator().manual_seed(n)
    values = torch.randn(4, n, generator=g, dtype=torch.float64)
    total = row.tree_sum(values)
    for i in range(4):
        assert float(total[i]) == pytest.approx(math.fsum(values[i].tolist()), abs=1e-12 * n)
        assert torch.equal(total[i], row.tree_sum(values[i : i + 1])[0])
    if n == 3:  # the tree itself: halves of the padded block, (v0 + v2) + v1
        v = values[0].tolist()
        assert float(total[0]) == (v[0] + v[2]) + v[1]


def test_measured_langevin_step():
    g = torch.Generator().manual_seed(0)
    h, z = torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g)
    h[2] = 0
    ratio = (z.double().norm(dim=1) / h.double().norm(dim=1)) ** 2
    delta, root = row.measure_langevin(h, z, norm="sample", gain=0.05, cap=0.06)
    expected = (0.05 * ratio).clamp(max=0.06)
    expected[2] = 0
    assert torch.allclose(delta.double(), expected, rtol=1e-6)
    assert torch.allclose(root.double(), (2 * expected).sqrt(), rtol=1e-6)
    delta, _ = row.measure_langevin(h, z, norm="batch", gain=0.05, cap=math.inf)
    mean = 0.05 * (z.double().norm(dim=1).mean() / h.double().norm(dim=1).mean()) ** 2
    assert torch.allclose(delta.double(), mean.expand(4), rtol=1e-6)


def test_learned_scale_runs_between_its_bounds():
    low, high = math.log(0.01), math.log(0.25)
    scale = row.learned_scale(torch.tensor([-1.0, 0.0, 1.0, 3.0]), low, high)
    assert scale.tolist() == pytest.approx([0.1, math.sqrt(0.1 * 0.5), 0.5, 2.5])  # and beyond them: nothing is clamped
