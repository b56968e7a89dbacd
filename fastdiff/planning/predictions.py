"""What a network's output means, and the time that it is given.

Every prediction in use is a fixed combination of the clean data and the noise, m = r·x0 + w·ε, at its level. With
x = α x0 + σ ε that makes any prediction an affine function of x and any other: `convert` solves the 2×2 system.

    score          (0, −1/σ)                       eps    (0, 1)          x0    (1, 0)
    scaled_score   (0, −1), score = m/σ (NCSNv2)   v      (−σ, α)         (Salimans & Ho 2022)
    prev_mean      E[x_{t−1} | x_t, x0], the mean of Ho et al. 2020, eq. 7: (α_{t−1}, α_{t|t−1} σ_{t−1}²/σ_t)
    increment      the noise of the last increment x_t = α_{t|t−1} x_{t−1} + σ_{t|t−1} z given x_t: (0, σ_{t|t−1}/σ_t)
    edm            F of D = c_skip x̂ + c_out F(c_in x̂, ln σ̂/4), x̂ = x/α, σ̂ = σ/α (Karras et al. 2022, eq. 7)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import checks
from ..errors import ConfigError, choose
from .processes import LARGEST, Process, lib, require_linear

Pair = tuple[Any, Any]


def _needs_chain(kind: str, process: Process) -> None:
    if not process.discrete:
        raise ConfigError(
            f"prediction={kind!r} is defined on discrete chains only, and {process.name!r} is continuous: use ddpm or ncsn"
        )


def _previous(process: Process, t: Any) -> Pair:
    """α, σ one step of the chain before t (before NCSN's smallest level there is only the data: σ = 0)."""
    before = t - 1
    inside = before >= process.first_time
    clipped = lib(t).where(inside, before, 0.0 * t + process.first_time)
    return process.alpha(clipped), process.sigma(clipped) * lib(t).where(inside, 0.0 * t + 1, 0.0 * t)


def _prev_mean(process: Process, t: Any, alpha: Any, sigma: Any) -> Pair:
    _needs_chain("prev_mean", process)
    alpha_s, sigma_s = _previous(process, t)
    return alpha_s, alpha / alpha_s * sigma_s**2 / sigma


def _increment(process: Process, t: Any, alpha: Any, sigma: Any) -> Pair:
    _needs_chain("increment", process)
    alpha_s, sigma_s = _previous(process, t)
    return 0.0 * alpha, lib(t).sqrt(sigma**2 - (alpha / alpha_s * sigma_s) ** 2) / sigma


def _edm(process: Process, t: Any, alpha: Any, sigma: Any) -> Pair:
    data = process.sigma_data
    sigma_hat = sigma / alpha
    root = lib(sigma_hat).sqrt(sigma_hat**2 + data**2)
    return sigma_hat / (data * root), -data / root


# name -> (process, t, alpha, sigma) -> (r, w)
PREDICTIONS: dict[str, Callable[[Process, Any, Any, Any], Pair]] = {
    "score": lambda process, t, alpha, sigma: (0.0 * sigma, -1 / sigma),
    "eps": lambda process, t, alpha, sigma: (0.0 * sigma, 0.0 * sigma + 1.0),
    "x0": lambda process, t, alpha, sigma: (0.0 * sigma + 1.0, 0.0 * sigma),
    "v": lambda process, t, alpha, sigma: (-sigma, alpha),
    "scaled_score": lambda process, t, alpha, sigma: (0.0 * sigma, 0.0 * sigma - 1.0),
    "prev_mean": _prev_mean,
    "increment": _increment,
    "edm": _edm,
}


def coordinates(prediction: str, process: Process, t: Any, alpha: Any, sigma: Any) -> Pair:
    """(r, w) of m = r·x0 + w·ε at time t of `process`, where x_t = α x0 + σ ε."""
    return PREDICTIONS[choose("prediction", prediction, PREDICTIONS)](process, t, alpha, sigma)


def convert(source: Pair, target: Pair, alpha: Any, sigma: Any) -> Pair:
    """(p, q) such that target = p·x + q·source, both given by their (r, w): the solution of

    p α + q r_source = r_target,   p σ + q w_source = w_target.
    """
    (r, w), (r_target, w_target) = source, target
    determinant = alpha * w - sigma * r
    return (r_target * w - w_target * r) / determinant, (alpha * w_target - sigma * r_target) / determinant


def input_scale(prediction: str, process: Process, alpha: Any, sigma: Any) -> Any:
    """What multiplies x before the network sees it: EDM's c_in = 1/√(σ̂² + σ_data²) on x/α, else 1."""
    if prediction != "edm":
        return 0.0 * alpha + 1.0
    return 1 / lib(alpha).sqrt(sigma**2 + (alpha * process.sigma_data) ** 2)


def _index(process: Process, t: Any, alpha: Any, sigma: Any) -> Any:
    if not process.discrete:
        raise ConfigError(
            f"time_input='index' needs a discrete process (ddpm, ncsn), and {process.name!r} is continuous: "
            "use 't' or 't*999'"
        )
    whole = lib(t).round(t)
    if bool((abs(t - whole) > 1e-6).any()):
        raise ConfigError(
            "time_input='index' needs whole steps of the chain: use grid='trained', and a sampler without intermediate stages, "
            "such as 'ddim', 'dpmpp_2m' or 'unipc'"
        )
    return process.index(whole)


# name -> (process, t, alpha, sigma) -> the time that the network is given
TIME_INPUTS: dict[str, Callable[[Process, Any, Any, Any], Any]] = {
    "t": lambda process, t, alpha, sigma: 1.0 * t,
    "index": _index,
    "sigma": lambda process, t, alpha, sigma: 1.0 * sigma,
    "log_sigma": lambda process, t, alpha, sigma: lib(sigma).log(sigma),
    "t*999": lambda process, t, alpha, sigma: 999.0 * t,
    "c_noise": lambda process, t, alpha, sigma: lib(sigma).log(sigma / alpha) / 4,
}


def default_time_input(prediction: str) -> str:
    """The default time input: the process time "t", with EDM's preconditioning its "c_noise"."""
    return "c_noise" if choose("prediction", prediction, PREDICTIONS) == "edm" else "t"


def network_time(time_input: str, process: Process, t: Any, alpha: Any, sigma: Any) -> Any:
    """The time that the network is given at process time t, level (α, σ).

    "index" counts a chain's steps from 0 (`Process.index`); "c_noise" is EDM's ln(σ/α)/4.
    """
    return TIME_INPUTS[choose("time_input", time_input, TIME_INPUTS)](process, t, alpha, sigma)


def time_steps(time_input: str, process: Process) -> tuple[float, float] | None:
    """How far a chain's first and last step, and two neighbouring ones, lie apart as a network is told the time;
    None where time is continuous, or is told by the noise."""
    if not process.discrete or time_input not in ("t", "index", "t*999"):
        return None
    first, second, last = (
        float(network_time(time_input, process, t, None, None)) for t in (1.0, 2.0, float(process.T))
    )
    return max(abs(last - first), abs(second - first)), abs(second - first)


def check(prediction: str, time_input: str, process: Process) -> None:
    """Refuse a prediction or time input that the process does not define, and a process without T, or without any x_t."""
    checks.number("T", getattr(process, "T", None), 0, above=True)
    if not process.linear:
        _check_sampled(prediction, time_input, process)
        return
    t = np.array([float(process.T)])
    alpha, sigma = process.alpha(t), process.sigma(t)
    for name, value in (("alpha", float(alpha[0])), ("sigma", float(sigma[0]))):
        if not abs(value) <= LARGEST:
            raise ConfigError(
                f"{name}(T) must be at most {LARGEST:.3g}, so that float32 holds its square, got {value:g} at T = {t[0]:g}: "
                "choose a smaller T"
            )
    coordinates(prediction, process, t, alpha, sigma)
    network_time(time_input, process, t, alpha, sigma)


def _check_sampled(prediction: str, time_input: str, process: Process) -> None:
    """The same for a process that is not linear."""
    choose("prediction", prediction, PREDICTIONS)
    choose("time_input", time_input, TIME_INPUTS)
    if not process.defines("sample"):
        raise ConfigError(
            f"sde must define alpha(t) and sigma(t), or sample(x0, t, noise), and {type(process).__name__} has neither"
        )
    checks.number("t_min", process.t_min, 0, process.T, below=True)
    if prediction != "score":
        require_linear(process, f"prediction={prediction!r}", "use prediction='score'")
    if time_input in ("sigma", "log_sigma", "c_noise"):
        require_linear(process, f"time_input={time_input!r}", "use time_input='t'")
    network_time(time_input, process, np.array([float(process.T)]), None, None)
