"""Schedules against published numbers and their own definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fastdiff import schedules
from fastdiff.errors import ConfigError


def test_linear_is_ddpms():
    betas = schedules.linear(1000)
    assert betas[0] == pytest.approx(1e-4)
    assert betas[-1] == pytest.approx(0.02)
    assert np.prod(1 - betas) == pytest.approx(4.035830e-5, rel=1e-6)  # Ho et al.'s prior term rests on this number
    assert (schedules.linear(100)[0], schedules.linear(100)[-1]) == (pytest.approx(1e-3), pytest.approx(0.2))


def test_cosine_clips_one_of_a_thousand():
    betas = schedules.cosine(1000)
    assert (betas == 0.999).sum() == 1
    assert np.prod(1 - betas) == pytest.approx(2.43e-9, rel=2e-3)
    alpha_bar = np.cumprod(1 - betas)
    u = np.arange(1, 1000) / 1000
    exact = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 / np.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(alpha_bar[:-1], exact, rtol=1e-9)


def test_sigmoid_follows_its_alpha_bar():
    betas = schedules.sigmoid(1000)
    assert np.prod(1 - betas) == pytest.approx(3.0e-7, rel=0.02)
    u = np.arange(1, 1000) / 1000
    exact = (stats.logistic.cdf(3) - stats.logistic.cdf(6 * u - 3)) / (stats.logistic.cdf(3) - stats.logistic.cdf(-3))
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], exact, rtol=1e-9)


def test_quadratic_and_scaled_linear_are_linear_in_the_root():
    for betas, ends in (
        (schedules.quadratic(50, 1e-4, 0.02), (1e-4, 0.02)),
        (schedules.scaled_linear(1000), (0.00085, 0.012)),
    ):
        assert (betas[0], betas[-1]) == (pytest.approx(ends[0]), pytest.approx(ends[1]))
        assert np.ptp(np.diff(np.sqrt(betas))) < 1e-15


@pytest.mark.parametrize("name", schedules.BETAS)
@pytest.mark.parametrize("T", [50, 1000])
def test_every_beta_schedule_stays_inside_the_unit_interval(name, T):
    betas = schedules.betas(name, T)
    assert betas.shape == (T,)
    assert betas.dtype == np.float64
    assert ((betas > 0) & (betas < 1)).all()


def test_geometric_has_one_ratio_and_its_ends():
    ladder = schedules.geometric(50.0, 0.01, 232)
    assert (ladder[0], ladder[-1], len(ladder)) == (50.0, 0.01, 232)
    assert np.ptp(ladder[1:] / ladder[:-1]) < 1e-13


def test_technique_1_is_the_largest_distance():
    x = np.random.default_rng(0).normal(size=(200, 3, 4))
    flat = x.reshape(200, 12)
    brute = max(np.linalg.norm(a - b) for a in flat for b in flat)
    assert schedules.largest_distance(x) == pytest.approx(brute)


def test_technique_2_is_its_equation():
    gamma = schedules.erf_ratio(3072)
    shift = math.sqrt(2 * 3072) * (gamma - 1)
    assert stats.norm.cdf(shift + 3 * gamma) - stats.norm.cdf(shift - 3 * gamma) == pytest.approx(0.5, abs=1e-12)
    # NCSNv2's CIFAR-10 ladder of 232 levels from 50 to 0.01 has the overlap 0.567
    assert schedules.overlap((50 / 0.01) ** (1 / 231), 3072) == pytest.approx(0.567, abs=2e-3)


def test_technique_2s_levels_reach_from_end_to_end():
    gamma = schedules.erf_ratio(64)
    levels = schedules.erf_levels(5.0, 0.01, 64)
    assert gamma ** (levels - 1) >= 500 > gamma ** (levels - 2)


@pytest.mark.parametrize(
    ("sigma_max", "levels", "steps", "published"),
    [(50, 232, 5, 6.2e-6), (90, 500, 5, 3.3e-6), (190, 1086, 3, 1.8e-6), (348, 2311, 3, 9e-7)],
)
def test_technique_4_gives_the_published_step_sizes(sigma_max, levels, steps, published):
    step = schedules.langevin_step(0.01, (sigma_max / 0.01) ** (1 / (levels - 1)), steps)
    assert step == pytest.approx(published, rel=0.02)


def test_technique_4s_ratio_is_the_variance_of_its_chain():
    """s_T² of x ← x + α s + √(2α) z from variance γ²σ² with the exact score −x/σ²."""
    eta, gamma, sigma, variance = 0.1, 1.3, 0.7, (1.3 * 0.7) ** 2
    for _ in range(5):
        variance = (1 - eta) ** 2 * variance + 2 * eta * sigma**2
    assert schedules.variance_ratio(eta, gamma, 5) == pytest.approx(variance / sigma**2)


def test_technique_5():
    assert [schedules.ema_decay(n, 0.999) for n in (0, 90, 10**6)] == [0.1, 0.91, 0.999]


def test_bad_schedules_are_refused():
    with pytest.raises(ConfigError, match="betas"):
        schedules.betas("lineal", 10)
    with pytest.raises(ConfigError, match="sigma_min"):
        schedules.geometric(0.01, 50.0, 10)
    with pytest.raises(ConfigError, match="levels"):
        schedules.geometric(50.0, 0.01, 1)
    with pytest.raises(ConfigError, match="dim=1"):
        schedules.erf_ratio(1, 0.9)
