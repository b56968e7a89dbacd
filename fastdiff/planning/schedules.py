"""Noise schedules as float64 arrays: betas of DDPM chains, sigmas of NCSN ladders, NCSNv2's techniques."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..errors import ConfigError, choose, short

Array = NDArray[np.float64]

LONGEST = 10**7  # steps of a chain, levels of a ladder


def linear(T: int, beta_start: float | None = None, beta_end: float | None = None) -> Array:
    """β_i from 1e-4 to 0.02 in equal steps (Ho et al. 2020), both times 1000/T (Nichol & Dhariwal 2021) unless given."""
    lo, hi = _ends(T, beta_start, beta_end, 1e-4, 0.02)
    return np.linspace(lo, hi, T)


def quadratic(T: int, beta_start: float | None = None, beta_end: float | None = None) -> Array:
    """√β_i in equal steps, 1e-4 to 0.02 (the `quad` schedule of Ho et al. 2020), both times 1000/T unless given."""
    lo, hi = _ends(T, beta_start, beta_end, 1e-4, 0.02)
    return np.linspace(math.sqrt(lo), math.sqrt(hi), T) ** 2


def scaled_linear(T: int, beta_start: float | None = None, beta_end: float | None = None) -> Array:
    """√β_i in equal steps, 0.00085 to 0.012 (Rombach et al. 2022), both times 1000/T unless given."""
    return quadratic(T, *_ends(T, beta_start, beta_end, 0.00085, 0.012))


def cosine(T: int, s: float = 0.008, max_beta: float = 0.999) -> Array:
    """ᾱ(u) = cos²((u + s)/(1 + s)·π/2), β_i = min(1 − ᾱ_i/ᾱ_{i−1}, 0.999) (Nichol & Dhariwal 2021, eq. 17)."""
    checks.number("s", s, 0)
    return from_alpha_bar(lambda u: np.cos((u + s) / (1 + s) * math.pi / 2) ** 2, T, max_beta)


def sigmoid(T: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999) -> Array:
    """ᾱ(u) a sigmoid of (u·(end − start) + start)/τ, rescaled to run from 1 to 0 (Jabri et al. 2022, Alg. 1)."""

    checks.number("start", start, high=checks.number("end", end), below=True)
    checks.number("tau", tau, 0, above=True)

    def alpha_bar(u: Array) -> Array:
        lo, hi = (1 / (1 + math.exp(-v / tau)) for v in (start, end))
        return np.asarray((hi - 1 / (1 + np.exp(-(u * (end - start) + start) / tau))) / (hi - lo))

    return from_alpha_bar(alpha_bar, T, max_beta)


def sigmoid_beta(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Array:
    """β_i a sigmoid of numbers from −6 to 6, between `beta_start` and `beta_end` whatever T is (diffusers' "sigmoid")."""
    low, high = checks.number("beta_start", beta_start, 0, 1), checks.number("beta_end", beta_end, 0, 1)
    return 1 / (1 + np.exp(-np.linspace(-6, 6, _count("T", T)))) * (high - low) + low


def from_alpha_bar(alpha_bar: Callable[[Array], Array], T: int, max_beta: float = 0.999) -> Array:
    """β_i = min(1 − ᾱ(i/T)/ᾱ((i−1)/T), max_beta) for a decreasing ᾱ on [0, 1]."""
    if not callable(alpha_bar):
        raise ConfigError(f"alpha_bar must be a function of times in [0, 1], got {short(alpha_bar)}")
    checks.number("max_beta", max_beta, 0, 1, above=True, below=True)
    value = alpha_bar(np.arange(_count("T", T) + 1) / T)
    return np.minimum(1 - value[1:] / value[:-1], max_beta)


BETAS: dict[str, Callable[..., Array]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "quadratic": quadratic,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "sigmoid_beta": sigmoid_beta,
}


def betas(name: str, T: int, **options: Any) -> Array:
    """The named β schedule of T steps."""
    return BETAS[choose("betas", name, BETAS)](T, **options)


def geometric(sigma_max: float, sigma_min: float, levels: int) -> Array:
    """σ_1 > … > σ_L with a constant ratio (Song & Ermon 2019, §4.2), largest first."""
    check_sigmas(sigma_max, sigma_min)
    checks.integer("levels", levels, 2, LONGEST)
    ladder = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), levels))
    ladder[0], ladder[-1] = sigma_max, sigma_min
    return ladder


# --- Song & Ermon 2020, "Improved techniques for training score-based generative models" (NCSNv2) ---------------------


def largest_distance(x: Any) -> float:
    """Technique 1: σ_1, the largest Euclidean distance between any two samples of `x` [N, *shape]."""
    flat = np.asarray(x, dtype=np.float64).reshape(len(x), -1)
    square = (flat**2).sum(1)
    largest = 0.0
    for i in range(0, len(flat), 1024):  # blocks keep the memory at 1024·N
        distance = square[i : i + 1024, None] + square - 2 * flat[i : i + 1024] @ flat.T
        largest = max(largest, float(distance.max()))
    return math.sqrt(max(largest, 0.0))


def overlap(gamma: float, dim: int) -> float:
    """Technique 2's probability Φ(√(2D)(γ − 1) + 3γ) − Φ(√(2D)(γ − 1) − 3γ) for the ratio γ = σ_{i−1}/σ_i."""

    checks.number("gamma", gamma, 0)
    _count("dim", dim)

    def phi(v: float) -> float:
        return 0.5 * math.erfc(-v / math.sqrt(2))

    shift = math.sqrt(2 * dim) * (gamma - 1)
    return phi(shift + 3 * gamma) - phi(shift - 3 * gamma)


def erf_ratio(dim: int, target: float = 0.5) -> float:
    """Technique 2: the ratio γ > 1 whose overlap is `target` in `dim` dimensions, by bisection."""
    checks.number("target", target, 0, 0.9973, above=True, below=True)  # the overlap of equal levels
    _count("dim", dim)
    lo, hi = 1.0, 2.0
    # the overlap rises with γ in a few dimensions, where even wide steps overlap: then there is no such ratio
    while overlap(hi, dim) > target:
        hi *= 2
        if hi > 1e6:
            raise ConfigError(f"dim={dim} is too small for technique 2: every ratio overlaps by more than {target}")
    for _ in range(200):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if overlap(mid, dim) > target else (lo, mid)
    return hi


def erf_levels(sigma_max: float, sigma_min: float, dim: int, target: float = 0.5) -> int:
    """Technique 2: how many geometric levels from σ_max to σ_min have the ratio `erf_ratio(dim, target)`, rounded up."""
    check_sigmas(sigma_max, sigma_min)
    return math.ceil(math.log(sigma_max / sigma_min) / math.log(erf_ratio(dim, target))) + 1


def variance_ratio(eta: float, gamma: float, steps_per_level: int) -> float:
    """Technique 4's s_T²/σ_i² = (1 − η)^{2T} (γ² − 2/(2 − η)) + 2/(2 − η), where η = ε/σ_L²."""
    checks.number("eta", eta, 0, 2, below=True)
    checks.number("gamma", gamma, 0)
    _count("steps_per_level", steps_per_level)
    limit = 2 / (2 - eta)
    return float((1 - eta) ** (2 * steps_per_level) * (gamma**2 - limit) + limit)


def langevin_step(sigma_min: float, gamma: float, steps_per_level: int) -> float:
    """Technique 4: the step ε (at σ_L) whose `variance_ratio` after T steps is nearest to 1.

    The ratio exceeds 1 for every η in (0, 1) and has one minimum there: golden section on it.
    """
    checks.number("sigma_min", sigma_min, 0, above=True)
    checks.number("gamma", gamma, 0)
    lo, hi = 0.0, 1.0
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(100):
        left, right = hi - golden * (hi - lo), lo + golden * (hi - lo)
        if variance_ratio(left, gamma, steps_per_level) < variance_ratio(right, gamma, steps_per_level):
            hi = right
        else:
            lo = left
    return (lo + hi) / 2 * sigma_min**2


def ema_decay(step: int, decay: float = 0.999) -> float:
    """Technique 5, θ' ← mθ' + (1 − m)θ, with a warm-up: m = min(decay, (1 + n)/(10 + n)) at update n."""
    step = checks.integer("step", step, 0, 2**62)
    return min(checks.number("decay", decay, 0, 1), (1 + step) / (10 + step))


def _ends(T: int, start: float | None, end: float | None, low: float, high: float) -> tuple[float, float]:
    _count("T", T)
    start = low * 1000 / T if start is None else checks.number("beta_start", start, 0)
    return start, high * 1000 / T if end is None else checks.number("beta_end", end, 0)


def _count(argument: str, value: int) -> int:
    return checks.integer(argument, value, 1, LONGEST)


def check_sigmas(sigma_max: float, sigma_min: float) -> tuple[float, float]:
    """(sigma_min, sigma_max) with 0 < sigma_min < sigma_max < inf."""
    high, low = checks.number("sigma_max", sigma_max), checks.number("sigma_min", sigma_min)
    if not 0 < low < high:
        raise ConfigError(f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < inf, got {low} and {high}")
    return low, high
