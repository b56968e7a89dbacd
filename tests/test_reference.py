"""What each operation means, against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastdiff.execution import noise, ops, reference
from fastdiff.table import COLUMNS, Level, Row, StepTable


def exact_float32(value: Fraction) -> np.float32:
    """The float32 nearest to a rational number, ties to even, found by comparing exact distances."""
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
    ours = reference.fma(*(torch.from_numpy(v) for v in (a, b, c))).numpy()
    for x, y, z, got in zip(a, b, c, ours):
        expected = exact_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        assert got == expected, (x, y, z)


def test_the_cases_above_tell_one_rounding_from_two():
    """p + c with p·2^-70 off a tie: the plain float64 sum, then float32, goes to the even side every time."""
    a = torch.tensor([1 + 2.0**-23])
    b = torch.tensor([2.0**-24 * (1 - 2.0**-23)])  # the product is 2^-24 (1 − 2^-46)
    c = torch.tensor([1 + 2.0**-23])
    twice = (a.double() * b.double() + c.double()).float()
    once = reference.fma(a, b, c)
    assert float(once) == 1 + 2.0**-23
    assert float(twice) == 1 + 2.0**-22  # the tie that float64 made of it goes to even


def table(dtype=torch.float32, rows=1, **columns):
    """Rows that copy x, but for the columns given."""
    values = {"a": 1.0, "q": 1.0, "low": -math.inf, "high": math.inf, "next_scale": 1.0, "guidance": 1.0, **columns}
    return torch.tensor([[values.get(name, 0.0) for name in COLUMNS]] * rows, dtype=dtype)


def stepped(x, k=0, stream=None, operands=(), **columns):
    out = torch.full_like(x, math.nan)
    reference.step(out, table(x.dtype, k + 1, **columns), ops.cursor(k, 0, 0), stream, x, **dict(operands))
    return out


def test_step_is_the_chain_in_its_order():
    g = torch.Generator().manual_seed(0)
    x, base, h0, h1, z = (torch.randn(3, 5, generator=g) for _ in range(5))
    columns = {"a": 0.9, "e": -0.3, "b0": 0.2, "b1": 1.7, "c": 0.4}
    ours = stepped(x, operands={"m": h0, "history": [h1], "base": base, "z": z}, **columns)
    total = x * torch.tensor(0.9)
    for coefficient, value in ((-0.3, base), (0.2, h0), (1.7, h1), (0.4, z)):
        total = reference.fma(value, torch.full_like(x, coefficient), total)
    assert torch.equal(ours, total)
    assert torch.equal(
        stepped(x, operands={"history": [h0, h1], "base": base, "z": z}, **columns), total
    )  # no m: b0 is h_1's
    assert torch.equal(stepped(x, a=0.0), torch.zeros_like(x))
    nan = torch.full_like(x, math.nan)
    absent = stepped(x, operands={"base": nan, "m": nan, "history": [nan], "z": nan})
    assert torch.equal(absent, x)  # a term whose coefficient is 0 is left out, not multiplied


def test_noise_is_the_rows_own_draw():
    x = torch.zeros(2, 6)
    ours = stepped(x, k=3, stream=1, a=0.0, c=2.0)
    assert torch.equal(ours, 2 * noise.normal(2, (6,), seed=0, draw=3, stream=1))
    wide = stepped(x.double(), k=3, stream=1, a=0.0, c=2.0)
    assert torch.equal(wide, ours.double())


def test_prediction_is_converted_clamped_and_keeps_nan():
    x, m = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[3.0, math.nan, 0.25]])
    out = stepped(x, operands={"m": m}, a=0.0, b0=1.0, p=0.5, q=2.0, low=-1.0, high=1.0)
    assert out[0].tolist()[::2] == [1.0, 0.75]
    assert out[0, 1].isnan()
    assert torch.equal(stepped(x, operands={"m": x}, a=0.0, b0=1.0), x)
    pushed = torch.empty_like(x)
    stepped(x, operands={"m": m, "pushed": pushed}, p=0.5, q=2.0, low=-1.0, high=1.0)
    assert torch.equal(pushed.nan_to_num(7), torch.tensor([[1.0, 7.0, 0.75]]))


def test_guidance_weighs_the_two_predictions():
    """(1 + s) m − s m' at s = 2 (Ho & Salimans 2022, eq. 6), which is m' + 3 (m − m')."""
    m, free = torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 3.0]])
    out = stepped(m, operands={"m": m, "guide": free}, a=0.0, b0=1.0, guidance=3.0)
    assert torch.equal(out, 3 * m - 2 * free)


def test_the_known_part_is_noised_to_the_rows_end():
    x, known, z = (torch.arange(4.0).view(1, 4) + v for v in (10, 20, 30))
    mask = torch.tensor([[True, False, True, False]])
    out = stepped(x, operands={"known": known, "mask": mask, "z": z}, known_alpha=0.5, known_sigma=2.0)
    assert torch.equal(out, torch.where(mask, 0.5 * known + 2 * z, x))


def test_a_tables_matrix_means_what_its_rows_say():
    """Guidance and the known part through StepTable.matrix: without guidance a row uses m alone, and it noises the known part
    to the level of the next row (or of the end)."""
    levels = Level(1.0, 0.5, 0.8), Level(0.5, 0.25, 2.0)
    rows = tuple(
        Row(level, "by hand", a=0.0, b=(1.0,), calls_network=True, network_time=level.t, q=2.0) for level in levels
    )
    matrix = torch.from_numpy(StepTable("by hand", rows, Level(0.0, 4.0, 0.125), 1.0).numbers)
    x, m, guide, known, z = (torch.randn(2, 4, generator=torch.Generator().manual_seed(s)).double() for s in range(5))
    mask = torch.tensor([[True, False, True, False]]).expand(2, 4)
    for k, (alpha, sigma) in enumerate([(0.25, 2.0), (4.0, 0.125)]):
        out = torch.full_like(x, math.nan)
        reference.step(out, matrix, ops.cursor(k, 0, 0), None, x, m, guide=guide, known=known, mask=mask, z=z)
        expected = torch.where(mask, alpha * known + sigma * z, 2 * m)
        assert torch.allclose(out, expected, rtol=1e-14, atol=1e-14)


def test_next_input_is_scaled_and_in_the_networks_dtype_and_layout():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    net_input = torch.empty(2, 3, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    stepped(x, operands={"net_input": net_input}, next_scale=0.3)
    assert torch.equal(net_input, (x * torch.tensor(0.3)).bfloat16())
    assert net_input.is_contiguous(memory_format=torch.channels_last)


def test_first_bad_is_the_first_row_that_is_not_finite():
    x, m = torch.zeros(4, 3), torch.zeros(4, 3)
    x[1, 2], m[2, 0] = math.inf, math.nan
    first_bad = torch.tensor([9, 9, 9, 9])
    stepped(x, k=4, operands={"first_bad": first_bad, "m": m}, b0=1.0)
    assert first_bad.tolist() == [9, 4, 4, 9]
    stepped(x, k=5, operands={"first_bad": first_bad, "m": m}, b0=1.0)
    assert first_bad.tolist() == [9, 4, 4, 9]
    m[2, 0], first_bad = -math.inf, torch.tensor([9, 9, 9, 9])  # the clamp would hide it
    stepped(torch.zeros_like(x), k=6, operands={"first_bad": first_bad, "m": m}, b0=1.0, low=-1.0, high=1.0)
    assert first_bad.tolist() == [9, 9, 6, 9]


def test_learned_variance_runs_between_its_bounds():
    """exp(½ (f·log β + (1 − f)·log β̃)), f = (v + 1)/2 (Nichol & Dhariwal 2021, eq. 15)."""
    low, high = math.log(0.01), math.log(0.25)
    v = torch.tensor([[-1.0, 0.0, 1.0, 3.0]])
    columns = {"a": 0.0, "log_slope": (high - low) / 4, "log_mid": (high + low) / 4}
    for dtype, rtol in ((torch.float32, 3e-7), (torch.float64, 1e-14)):
        z = torch.ones(1, 4, dtype=dtype)
        scale = stepped(z, operands={"v": v.to(dtype), "z": z}, **columns)
        expected = [math.sqrt(0.01), math.sqrt(0.05), math.sqrt(0.25), math.sqrt(0.25 * 25)]
        assert scale[0].tolist() == pytest.approx(expected, rel=rtol * 10 if dtype == torch.float32 else rtol)


def test_exp_is_within_two_units_of_the_last_place():
    u = torch.linspace(-86, 88, 200_001)
    true = u.double().exp()
    spacing = torch.nextafter(true.float(), torch.full_like(u, math.inf)).double() - true.float().double()
    assert ((reference._exp(u).double() - true).abs() / spacing).max() < 2
    assert torch.equal(reference._exp(torch.tensor([0.0, -1e9, 1e9])), reference._exp(torch.tensor([0.0, -86.0, 88.0])))
    assert reference._exp(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("n", [1, 2, 3, 1023, 1024, 1025, 5000])
def test_tree_sum_is_a_sum_and_a_fixed_tree(n):
    g = torch.Generator().manual_seed(n)
    values = torch.randn(4, n, generator=g, dtype=torch.float64)
    total = reference.tree_sum(values)
    for i in range(4):
        assert float(total[i]) == pytest.approx(math.fsum(values[i].tolist()), abs=1e-12 * n)
        assert torch.equal(total[i], reference.tree_sum(values[i : i + 1])[0])
    if n == 3:  # the tree itself: halves of the padded block, (v0 + v2) + v1
        v = values[0].tolist()
        assert float(total[0]) == (v[0] + v[2]) + v[1]


def test_measured_langevin_step():
    g = torch.Generator().manual_seed(0)
    h, z = torch.randn(4, 6, generator=g), torch.randn(4, 6, generator=g)
    h[2] = 0
    ratio = (z.double().norm(dim=1) / h.double().norm(dim=1)) ** 2

    def measured(batch, **columns):
        out = torch.full((4, 2), math.nan)
        reference.measure_langevin(out, table(**columns), ops.cursor(0, 0, 0), None, batch, h, h, None, z)
        return out.double().unbind(1)

    delta, root = measured(False, gain=0.05, cap=0.06)
    expected = (0.05 * ratio).clamp(max=0.06)
    expected[2] = 0
    assert torch.allclose(delta, expected, rtol=1e-6)
    assert torch.allclose(root, (2 * expected).sqrt(), rtol=1e-6)
    delta, _ = measured(True, gain=0.05, cap=math.inf)
    mean = 0.05 * (z.double().norm(dim=1).mean() / h.double().norm(dim=1).mean()) ** 2
    assert torch.allclose(delta, mean.expand(4), rtol=1e-6)


def test_measured_step_replaces_two_factors_of_each_sample():
    x, m, z = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)
    out = stepped(x, operands={"m": m, "z": z, "measured": torch.tensor([[2.0, 10.0], [3.0, 20.0]])}, b0=99.0, c=99.0)
    assert out.tolist() == [[13.0] * 3, [24.0] * 3]


def test_perturb_and_its_loss_share_their_noise():
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(3, 5, generator=g, dtype=torch.float64)
    alpha, sigma, weight = (torch.rand(3, generator=g, dtype=torch.float64) for _ in range(3))
    cursor = ops.cursor(7, 2, 9)
    eps = noise.normal(3, (5,), seed=9, draw=7, first_sample=2, stream=2).double()
    noisy = reference.perturb(x0, alpha, sigma, cursor, 2)
    assert torch.equal(noisy, alpha[:, None] * x0 + sigma[:, None] * eps)
    output = torch.randn(3, 5, generator=g, dtype=torch.float64)
    loss, error = reference.dsm_loss(output, x0, alpha, sigma, weight, cursor, 2)
    assert torch.equal(error, output - noisy)
    assert torch.allclose(loss, weight * ((output - noisy) ** 2).mean(1), rtol=1e-12)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_probe_dot_draws_its_probe_or_takes_it(kind):
    value = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    cursor, v = ops.cursor(1, 4, 6), torch.empty(3, 50)
    getattr(reference, kind)(v, cursor, 3)
    expected = (value.double() * v).sum(1)
    assert torch.allclose(reference.probe_dot(value, cursor, 3, kind), expected, rtol=1e-13)
    assert torch.allclose(reference.probe_dot(value, cursor, 3, kind, v), expected, rtol=1e-13)


def test_rademacher_bits_are_where_the_map_says():
    v = torch.empty(2, 5000)
    reference.rademacher(v, ops.cursor(3, 10, 77), 3)
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    for sample, j in ((0, 0), (0, 511), (0, 512), (1, 1535), (1, 2047), (1, 2048), (0, 4999)):
        words = noise.philox(((j >> 11) * 128 + ((j >> 2) & 127), 3, 10 + sample, 3), 77)
        bit = int(words[j & 3]) >> (31 - ((j >> 9) & 3)) & 1
        assert v[sample, j] == (-1.0 if bit else 1.0)
    many = torch.empty(1, 10**6)
    reference.rademacher(many, ops.cursor(0, 0, 0), 3)
    assert abs(float(many.mean())) < 5e-3  # five standard errors


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin", "interleaved"])
@pytest.mark.parametrize("channels", [6, 7])
def test_timestep_embedding_is_sines_and_cosines(order, channels):
    t = torch.tensor([0.0, 0.3, 1.0, 999.0, -5.5])
    frequencies = torch.tensor([1.0, 0.1, 37.0])
    out = reference.timestep_embedding(t, frequencies, 2.0, channels, order)
    angle = ((t * 2.0)[:, None] * frequencies).double()
    places = {"sin_cos": [0, 1, 2, 3, 4, 5], "cos_sin": [3, 4, 5, 0, 1, 2], "interleaved": [0, 2, 4, 1, 3, 5]}[order]
    expected = torch.zeros(5, channels, dtype=torch.float64)
    expected[:, places] = torch.cat((angle.sin(), angle.cos()), 1)
    assert (
        out.double() - expected
    ).abs().max() < 7e-8  # half a unit in the last place of 1, and the polynomial's error
    wide = reference.timestep_embedding(t.double(), frequencies.double(), 2.0, channels, order)
    assert (wide - expected).abs().max() < 1e-3  # float64 angles, which differ from the rounded ones


def test_rk_error_is_the_embedded_pair():
    """Bogacki & Shampine's 3(2) pair on x' = −x (Hairer, Nørsett & Wanner, eqs. II.4.10–4.11)."""
    x, h = torch.tensor([[1.0, -2.0], [0.5, 4.0]], dtype=torch.float64), torch.tensor([0.1, 0.2], dtype=torch.float64)
    b, low = [2 / 9, 1 / 3, 4 / 9, 0], [7 / 24, 1 / 4, 1 / 3, 1 / 8]
    step = h[:, None]
    k = [-x]
    k += [-(x + step / 2 * k[0])]
    k += [-(x + 3 * step / 4 * k[1])]
    third = x + step * (b[0] * k[0] + b[1] * k[1] + b[2] * k[2])
    k += [-third]
    second = x + step * sum(w * v for w, v in zip(low, k))
    after, norm = reference.rk_error(x, k, h, b, [p - q for p, q in zip(b, low)], 1e-3, 1e-6)
    assert torch.allclose(after, third, rtol=1e-14)
    tolerance = 1e-6 + 1e-3 * torch.maximum(x.abs(), third.abs())
    expected = (((third - second) / tolerance) ** 2).mean(1).sqrt()
    assert torch.allclose(norm, expected, rtol=1e-9)
