"""Every prediction is an affine function of x and any other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_terminal_noise import Straight

import fastdiff
from fastdiff import predictions
from fastdiff.errors import ConfigError

T = np.array([3.0, 40.0, 80.0, 100.0])
RNG = np.random.default_rng(0)
X0, EPS = RNG.normal(size=4), RNG.normal(size=4)


def case(kind):
    """A process that carries the prediction, its times, levels, x_t and the prediction of (x0, ε) by its own formula."""
    process = fastdiff.EDM(sigma_data=0.7) if kind == "edm" else fastdiff.DDPM("linear", T=100)
    alpha, sigma = process.alpha(T), process.sigma(T)
    x = alpha * X0 + sigma * EPS
    if kind == "edm":
        c_skip, c_out = 0.49 / (sigma**2 + 0.49), sigma * 0.7 / np.sqrt(sigma**2 + 0.49)  # Karras et al., Table 1
        return process, alpha, sigma, x, (X0 - c_skip * x) / c_out
    beta = process.beta_table[T.astype(int) - 1]
    alpha_bar, before = alpha**2, process.alpha(T - 1) ** 2
    mean = np.sqrt(before) * beta / (1 - alpha_bar) * X0 + np.sqrt(1 - beta) * (1 - before) / (1 - alpha_bar) * x
    formulas = {
        "score": -(x - alpha * X0) / sigma**2,
        "eps": EPS,
        "x0": X0,
        "v": alpha * EPS - sigma * X0,
        "scaled_score": -(x - alpha * X0) / sigma,
        # dx/dt of log α linear within a step, with α² + σ² = 1
        "velocity": 0.5 * np.log(1 - beta) * (alpha * X0 - alpha**2 / sigma * EPS),
        "data_velocity": 0.5 * np.log(1 - beta) * (alpha**2 / sigma * EPS - alpha * X0),
        "prev_mean": mean,  # Ho et al. 2020, eq. 7
        "increment": np.sqrt(beta) * EPS / sigma,  # E[z | x_t, x_0] of x_t = √(1−β) x_{t−1} + √β z
    }
    return process, alpha, sigma, x, formulas[kind]


@pytest.mark.parametrize("kind", predictions.PREDICTIONS)
def test_coordinates_are_the_published_formula(kind):
    process, alpha, sigma, _, expected = case(kind)
    r, w = predictions.coordinates(kind, process, T, alpha, sigma)
    np.testing.assert_allclose(r * X0 + w * EPS, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(predictions.PREDICTIONS, 2)))
def test_every_conversion(source, target):
    process = fastdiff.DDPM("linear", T=100)
    alpha, sigma = process.alpha(T), process.sigma(T)
    x = alpha * X0 + sigma * EPS
    pairs = [predictions.coordinates(kind, process, T, alpha, sigma) for kind in (source, target)]
    given, wanted = (r * X0 + w * EPS for r, w in pairs)
    p, q = predictions.convert(*pairs, alpha, sigma)
    scale = 1 + np.abs(p * x) + np.abs(q * given)
    assert (np.abs(p * x + q * given - wanted) / scale).max() < 1e-12


def test_noise_like_predictions_convert_without_x():
    process = fastdiff.VP()
    t = np.array([1e-3, 0.5, 1.0])
    alpha, sigma = process.alpha(t), process.sigma(t)
    pairs = [predictions.coordinates(kind, process, t, alpha, sigma) for kind in ("eps", "score")]
    p, q = predictions.convert(*pairs, alpha, sigma)
    assert (p == 0).all()
    np.testing.assert_allclose(q, -1 / sigma, rtol=1e-15)


def test_increments_noise_is_the_score_of_the_marginal():
    """E[z_t | x_t] = −√β ∇log p(x_t), by brute force on 1-D Gaussian data of variance s²."""
    process, t, s = fastdiff.DDPM("linear", T=100), 40.0, 0.8
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    beta = process.beta_table[39]
    before = float(process.alpha(t - 1)) ** 2 * s**2 + float(process.sigma(t - 1)) ** 2
    variance = alpha**2 * s**2 + sigma**2
    assert (1 - beta) * before + beta == pytest.approx(variance)
    regression = np.sqrt(beta) / variance  # Cov(z, x_t)/Var(x_t), as x_t = √(1−β) x_{t−1} + √β z
    r, w = predictions.coordinates("increment", process, np.array([t]), np.array([alpha]), np.array([sigma]))
    score = np.array([-1 / variance])  # per unit of x_t
    eps = -sigma * score
    assert r[0] == 0
    assert (w * eps)[0] == pytest.approx(regression)


@pytest.mark.parametrize("name", predictions.TIME_INPUTS)
def test_times_of_a_device_are_not_read(name):
    """Which would stall it, and end a capture."""
    process, t = fastdiff.DDPM(), torch.tensor([1.0, 3.0], device="meta")
    time = predictions.network_time(name, process, t, process.alpha(t), process.sigma(t))
    assert time.is_meta
    assert time.shape == (2,)


def test_time_inputs():
    ddpm, ncsn, vp = fastdiff.DDPM(), fastdiff.NCSN(), fastdiff.VP()
    t = np.array([1.0, 3.0])
    np.testing.assert_array_equal(predictions.network_time("index", ddpm, t, 1.0, ddpm.sigma(t)), [0, 2])
    np.testing.assert_array_equal(
        predictions.network_time("index", ncsn, t, 1.0, ncsn.sigma(t)), [9, 7]
    )  # 0 is the largest
    half = np.array([0.5])
    sigma = vp.sigma(half)
    expected = {
        "t": half,
        "t*999": 499.5,
        "sigma": sigma,
        "log_sigma": np.log(sigma),
        "c_noise": np.log(sigma / vp.alpha(half)) / 4,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(predictions.network_time(name, vp, half, vp.alpha(half), sigma), value)


@pytest.mark.parametrize(
    ("prediction", "time_input", "process", "match"),
    [
        ("epsilon", "t", fastdiff.VP(), "prediction must be one of"),
        ("eps", "time", fastdiff.VP(), "time_input must be one of"),
        ("prev_mean", "t", fastdiff.VP(), "ddpm or ncsn"),
        ("increment", "t", fastdiff.VE(), "ddpm or ncsn"),
        ("eps", "index", fastdiff.VP(), "continuous"),
        ("eps", "index/T", fastdiff.VP(), "time_input='index/T' needs a discrete process"),
        ("eps", "fractional_index", fastdiff.EDM(), "time_input='fractional_index' needs a discrete process"),
    ],
)
def test_bad_combinations_are_refused(prediction, time_input, process, match):
    with pytest.raises(ConfigError, match=match):
        predictions.check(prediction, time_input, process)


@pytest.mark.parametrize(("process", "within"), [(Straight(), 1e-9), (fastdiff.VP(), 1e-8), (fastdiff.VE(), 1e-8)])
def test_velocity_is_the_paths_derivative(process, within):
    t = np.array([0.1, 0.5, 0.9]) * process.T
    r, w = predictions.coordinates("velocity", process, t, process.alpha(t), process.sigma(t))
    h = 1e-5 * process.T
    np.testing.assert_allclose(r, (process.alpha(t + h) - process.alpha(t - h)) / (2 * h), rtol=within, atol=1e-9)
    np.testing.assert_allclose(w, (process.sigma(t + h) - process.sigma(t - h)) / (2 * h), rtol=within, atol=1e-9)
    if process.name == "straight":  # ε − x0, up to T itself
        r, w = process.rates(np.array([1e-5, 0.5, 1.0]))
        np.testing.assert_allclose([r, w], [[-1.0] * 3, [1.0] * 3], rtol=2e-7)
