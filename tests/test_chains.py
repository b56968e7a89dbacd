"""The discretised chains in law: on one-dimensional Gaussian data each is an affine chain whose mean and variance are
known exactly, and fastdiff's own noise must give them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import gaussian_chain

import fastdiff
from fastdiff.papers import score_based
from fastdiff.planning.samplers import DDIM, Ancestral, EulerMaruyama, PredictorCorrector

SAMPLES = 200_000
MEAN, STD = 0.7, 0.5
KERNELS = {"ve": score_based.ve, "vp": score_based.vp, "subvp": score_based.subvp}


def score_of(process):
    """∇ log p_t of data N(MEAN, STD²), computed in float64."""

    def score(x, t):
        t = t.double()
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return (-(x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)).to(x.dtype)

    return score


def chain(name, rule, steps, **options):
    """(A, B, C) of x ← A x + B + C z for each step of the papers' formulas with that score, last noise left out."""
    kernel = KERNELS[name]
    times = np.linspace(1, 1e-5 if name == "ve" else 1e-3, steps + 1)
    levels = [kernel(t) for t in times]
    rows = []
    for here, there, step, dt in zip(
        levels,
        levels[1:],
        score_based.transitions([k.alpha for k in levels], [k.sigma for k in levels]),
        np.diff(times),
    ):
        slope = -1 / ((here.alpha * STD) ** 2 + here.sigma**2)  # score = slope·(x − αm)
        if rule == "euler_maruyama":
            lam = options.get("lam", 1.0)
            gain = 0.5 * (1 + lam**2) * here.g**2 * -dt
            a, c = 1 + here.f * dt, lam * here.g * math.sqrt(-dt)
        elif rule == "reverse_diffusion":
            gain, a, c = step.var, 2 - step.ratio, math.sqrt(step.var)
        elif rule == "ancestral":
            gain, a = step.var / step.ratio, 1 / step.ratio
            c = math.sqrt(step.var * (step.sigma_s / step.sigma_t) ** 2)
        elif rule == "beta":
            gain, a, c = step.var / step.ratio, 1 / step.ratio, math.sqrt(step.var)
        else:  # DDIM with ε = −σ·score
            c = options["eta"] * math.sqrt(step.var) * step.sigma_s / step.sigma_t
            a = there.alpha / here.alpha
            gain = -here.sigma * (math.sqrt(there.sigma**2 - c**2) - a * here.sigma)
        rows.append((a + gain * slope, -gain * slope * here.alpha * MEAN, c))
    rows[-1] = (*rows[-1][:2], 0.0)
    return rows


CASES = [
    ("ve", "euler_maruyama", {}, "euler_maruyama", 100),
    ("vp", "euler_maruyama", {}, "euler_maruyama", 100),
    ("vp", EulerMaruyama(0.5), {"lam": 0.5}, "euler_maruyama", 40),
    ("subvp", "euler_maruyama", {}, "euler_maruyama", 100),
    ("ve", "reverse_diffusion", {}, "reverse_diffusion", 100),
    ("vp", "reverse_diffusion", {}, "reverse_diffusion", 60),
    ("subvp", "reverse_diffusion", {}, "reverse_diffusion", 60),
    ("ve", "ancestral", {}, "ancestral", 100),
    ("vp", "ancestral", {}, "ancestral", 60),
    ("vp", Ancestral("beta"), {}, "beta", 60),
    ("subvp", "ancestral", {}, "ancestral", 60),
    ("vp", "ddim", {"eta": 0.0}, "ddim", 60),
    ("vp", DDIM(0.7), {"eta": 0.7}, "ddim", 60),
    ("ve", DDIM(0.7), {"eta": 0.7}, "ddim", 60),
]


@pytest.mark.parametrize(("name", "sampler", "options", "rule", "steps"), CASES)
def test_mean_and_variance_of_the_chain(name, sampler, options, rule, steps):
    process = fastdiff.processes.get(name)
    mean, variance = gaussian_chain(0.0, process.prior_std**2, chain(name, rule, steps, **options))
    x = fastdiff.sample(
        score_of(process), name, steps, sampler=sampler, shape=(1,), num_samples=SAMPLES, seed=1, batch_size=15_000,
        grid="uniform" if rule == "ddim" else None,
    ).double()  # fmt: skip
    assert abs(x.mean() - mean) < 5 * math.sqrt(variance / SAMPLES)
    assert abs(x.var() - variance) < 5 * variance * math.sqrt(2 / SAMPLES)


def test_reverse_diffusion_of_the_reference_example():
    """VE, 200 steps, on N(0, 1) data: within sampling error of the chain's own mean and variance."""
    times = np.linspace(1, 1e-5, 201)
    sigma = 0.01 * 5000**times
    variance = 50.0**2
    for high, low in itertools.pairwise(sigma):
        step = high**2 - low**2
        variance = (1 - step / (1 + high**2)) ** 2 * variance + step
    variance -= step  # the last row adds no noise

    def score(x, t):
        return -x / (1 + 50.0 ** (2 * t) * 0.01 ** (2 - 2 * t)).view(-1, *[1] * (x.ndim - 1))

    options = {"sde": "ve", "steps": 200, "shape": (2,), "num_samples": 4096, "seed": 0}
    x = fastdiff.sample(score, sampler="reverse_diffusion", **options).double()
    n = x.numel()
    assert abs(x.mean()) < 5 * math.sqrt(variance / n)
    assert abs(x.var() - variance) < 5 * variance * math.sqrt(2 / n)
    assert 1.0 < variance < 1.1  # the bias itself
    assert abs(fastdiff.sample(score, **options).var() - 1) < 0.05


@pytest.mark.parametrize(
    ("corrector", "dim", "low", "high"),
    [("ald", 1, 1.0, 1.03), ("ald", 8, 1.0, 1.03), ("batch", 1, 1.01, 1.04), ("batch", 48, 1.01, 1.04),
     ("sample", 1, 1.5, 1.8), ("sample", 8, 1.05, 1.12), ("sample", 48, 1.0, 1.04)],
)  # fmt: skip
def test_what_the_docs_say_of_langevin_correctors(corrector, dim, low, high):
    """The variance on N(0, 1), VE, 200 steps: a step that depends on x is no longer Langevin dynamics."""
    sampler = PredictorCorrector(corrector="ald" if corrector == "ald" else "langevin",
                                 norm="sample" if corrector == "sample" else "batch")  # fmt: skip
    process = fastdiff.VE()

    def score(x, t):
        return -x / (1 + process.sigma(t.double()) ** 2).to(x.dtype)[:, None]

    x = fastdiff.sample(score, "ve", 200, sampler=sampler, shape=(dim,), num_samples=40_000 // dim, seed=3)
    error = 5 * math.sqrt(2 / x.numel())
    assert low - error < x.var() < high + error


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_every_member_of_the_family_has_the_same_marginal(lam):
    """Weak order one: the error of the chain's variance halves with the step, for each λ, with no sampling at all."""
    errors = []
    for steps in (400, 800, 1600):
        rows = chain("vp", "euler_maruyama", steps, lam=lam)
        _, variance = gaussian_chain(0.0, 1.0, rows)
        end = score_based.vp(1e-3)
        errors.append(abs(variance - ((end.alpha * STD) ** 2 + end.sigma**2)))
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.35)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.25)


def test_annealed_langevin_has_the_variance_of_its_chain():
    process = fastdiff.NCSN([1.0, 0.5, 0.2])
    eta, steps = 0.05, 60
    variance = 1.0
    for sigma in process.sigmas:
        for _ in range(steps // 3):
            delta = eta * sigma**2
            variance = (1 - delta / (STD**2 + sigma**2)) ** 2 * variance + 2 * delta
    variance *= (1 - 0.04 / (STD**2 + 0.04)) ** 2  # the denoising step
    x = fastdiff.sample(
        score_of(process), process, steps, sampler=fastdiff.samplers.AnnealedLangevin(step_size=eta * 0.04),
        shape=(1,), num_samples=SAMPLES, batch_size=15_000,
    ).double()  # fmt: skip
    assert abs(x.var() - variance) < 5 * variance * math.sqrt(2 / SAMPLES)


def test_float32_noise_does_not_drift_from_float64():
    """The same noise in both precisions: the float32 run stays within rounding of the float64 one."""
    options = {"shape": (3,), "num_samples": 64, "seed": 5}
    single = fastdiff.sample(score_of(fastdiff.VP()), "vp", 100, **options)
    double = fastdiff.sample(score_of(fastdiff.VP()), "vp", 100, dtype=torch.float64, **options)
    assert 0 < (single - double).abs().max() < 1e-4
