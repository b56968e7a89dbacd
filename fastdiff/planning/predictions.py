"""What a network's output means, and the time that it is given.

Every prediction in use is a fixed combination of the clean data and the noise, m = r·x0 + w·ε, at its level. With
x = α x0 + σ ε that makes any prediction an affine function of x and any other: `convert` solves the 2×2 system.

    score          (0, −1/σ)                       eps    (0, 1)          x0    (1, 0)
    scaled_score   (0, −1), score = m/σ (NCSNv2)   v      (−σ, α)         (Salimans & Ho 2022)
    prev_mean      E[x_{t−1} | x_t, x0], the mean of Ho et al. 2020, eq. 7: (α_{t−1}, α_{t|t−1} σ_{t−1}²/σ_t)
    increment      the noise of the last increment x_t = α_{t|t−1} x_{t−1} + σ_{t|t−1} z given x_t: (0, σ_{t|t−1}/σ_t)
    velocity       dx/dt = α̇ x0 + σ̇ ε of the path, ε − x0 on the straight one (Liu et al. 2023)
    data_velocity  −dx/dt, of those whose time runs to the data: x0 − ε on the straight one (Lipman et al. 2023)
    edm            F of D = c_skip x̂ + c_out F(c_in x̂, ln σ̂/4), x̂ = x/α, σ̂ = σ/α (Karras et al. 2022, eq. 7)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import checks
from ..errors import ConfigError, choose
from .cache import cached
from .processes import LARGEST, Pair, Process, lib, require_linear

# a name of TIME_INPUTS, or a function of the process times [B]
TimeInput = str | Callable[[Any], Any]
_NEXT_TO_DATA = 0.05  # how far α may be from 1 where a run ends


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
    "velocity": lambda process, t, alpha, sigma: process.rates(t),
    "data_velocity": lambda process, t, alpha, sigma: tuple(-rate for rate in process.rates(t)),
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


def check_determined(prediction: str, pair: Pair, t: Any, alpha: Any, sigma: Any) -> None:
    """Refuse levels where a prediction (r, w) says nothing of x0: ε and the score, where α is next to 0."""
    r, w = pair
    lost = np.flatnonzero((alpha < 1e-5) & (abs(alpha * w - sigma * r) < 1e-5 * np.hypot(r, w)))
    if len(lost):
        k = lost[0]
        raise ConfigError(
            f"prediction={prediction!r} says nothing of the data at t = {t[k]:g}, where alpha = {alpha[k]:.1g}: use a network of "
            "prediction='v' or 'x0', or a sampler of fixed steps with a grid that starts at a lower t"
        )


def input_scale(prediction: str, process: Process, alpha: Any, sigma: Any) -> Any:
    """What multiplies x before the network sees it: EDM's c_in = 1/√(σ̂² + σ_data²) on x/α, else 1."""
    if prediction != "edm":
        return 0.0 * alpha + 1.0
    return 1 / lib(alpha).sqrt(sigma**2 + (alpha * process.sigma_data) ** 2)


def _check_counted(name: str, process: Process) -> None:
    if not process.discrete:
        raise ConfigError(
            f"time_input={name!r} needs a discrete process (ddpm, ncsn), and {process.name!r} is continuous: "
            "use 't' or 't*999'"
        )


def _index(process: Process, t: Any, alpha: Any, sigma: Any) -> Any:
    _check_counted("index", process)
    whole = lib(t).round(t)
    if _are_seen(t) and bool((abs(t - whole) > 1e-6).any()):
        raise ConfigError(
            "time_input='index' needs whole steps of the chain: use grid='trained' and a sampler without stages, such as "
            "'ddim' or 'unipc', or time_input='fractional_index'"
        )
    return process.index(whole)


def _are_seen(t: Any) -> bool:
    """Whether times may be looked at: on a device that would stall it, in what torch.compile traces it would break the graph."""
    return not hasattr(t, "detach") or (t.device.type == "cpu" and not sys.modules["torch"].compiler.is_compiling())


def _share_of_index(process: Process, t: Any, alpha: Any, sigma: Any) -> Any:
    _check_counted("index/T", process)
    return _fractional_index(process, t, alpha, sigma) / process.T


def _fractional_index(process: Process, t: Any, alpha: Any, sigma: Any) -> Any:
    """The index where t is a step; between two steps linear in log σ̂, below the first that of the first (as k-diffusion's
    DiscreteSchedule and diffusers)."""
    _check_counted("fractional_index", process)
    library, t = lib(t), t.double() if hasattr(t, "detach") else np.asarray(t, dtype=np.float64)
    t = library.clip(t, 1.0, float(process.T))
    low = library.clip(library.floor(t), 1.0, max(process.T - 1.0, 1.0))
    high = library.clip(low + 1, 1.0, float(process.T))
    at_low, here, at_high = (library.log(process.sigma(v) / process.alpha(v)) for v in (low, t, high))
    share = (here - at_low) / (at_high - at_low + (at_high == at_low))  # a chain of one step has no other
    return process.index(low) + share * (process.index(high) - process.index(low))


# name -> (process, t, alpha, sigma) -> the time that the network is given
TIME_INPUTS: dict[str, Callable[[Process, Any, Any, Any], Any]] = {
    "t": lambda process, t, alpha, sigma: 1.0 * t,
    "index": _index,
    "fractional_index": _fractional_index,
    "index/T": _share_of_index,
    "sigma": lambda process, t, alpha, sigma: 1.0 * sigma,
    "log_sigma": lambda process, t, alpha, sigma: lib(sigma).log(sigma),
    "t*999": lambda process, t, alpha, sigma: 999.0 * t,
    "t*1000": lambda process, t, alpha, sigma: 1000.0 * t,
    "T-t": lambda process, t, alpha, sigma: float(process.T) - t,
    "c_noise": lambda process, t, alpha, sigma: lib(sigma).log(sigma / alpha) / 4,
}


OF_TIME = ("t", "t*999", "t*1000", "T-t")  # time inputs that no level enters


def default_time_input(prediction: str, process: Process) -> str:
    """The default: "c_noise" with EDM's preconditioning, on DDPM chains the "index" that published networks take, else the
    process time "t". A score is a function of the process time, also on chains."""
    if choose("prediction", prediction, PREDICTIONS) == "edm":
        return "c_noise"
    return "index" if process.discrete and not process.ladder and prediction != "score" else "t"


def network_time(time_input: TimeInput, process: Process, t: Any, alpha: Any, sigma: Any) -> Any:
    """The time that the network is given at process time t, level (α, σ).

    "index" counts a chain's steps from 0 (`Process.index`); "c_noise" is EDM's ln(σ/α)/4.
    """
    if callable(time_input):
        return _by_function(time_input, t)
    return TIME_INPUTS[choose("time_input", time_input, TIME_INPUTS)](process, t, alpha, sigma)


def _by_function(function: Callable[[Any], Any], t: Any) -> Any:
    """function(t), of a tensor [B] wherever there is torch: a run, a table and a training ask the same function."""
    torch, is_tensor = sys.modules.get("torch"), hasattr(t, "detach")
    values = t if is_tensor else np.atleast_1d(np.asarray(t, dtype=np.float64))
    given = values if is_tensor or torch is None else torch.from_numpy(np.ascontiguousarray(values))
    time = function(given.reshape(-1))
    number = getattr(time, "dtype", None)
    if number is None or tuple(time.shape) != (math.prod(given.shape),) or "complex" in str(number):
        what = f"shape {tuple(time.shape)} of {number}" if hasattr(time, "shape") else type(time).__name__
        raise ConfigError(f"time_input(t) must return one number for each of the times t [B], got {what:.80}")
    if is_tensor:
        return time.reshape(t.shape).to(t.dtype) if t.is_floating_point() else time.reshape(t.shape)
    return np.asarray(time if torch is None else time.detach().cpu(), dtype=np.float64).reshape(np.shape(t))


def time_steps(time_input: TimeInput, process: Process) -> tuple[float, float] | None:
    """How far a chain's first and last step, and two neighbouring ones, lie apart as a network is told the time;
    None where time is continuous, or is told by the noise or by a function."""
    if not process.discrete or time_input not in (*OF_TIME, "index", "fractional_index", "index/T"):
        return None
    first, second, last = (
        float(network_time(time_input, process, t, None, None)) for t in (1.0, 2.0, float(process.T))
    )
    return max(abs(last - first), abs(second - first)), abs(second - first)


def check(prediction: str, time_input: TimeInput, process: Process) -> None:
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
    _check_direction(process)
    start = np.array([process.t_start])  # below T where α(T) = 0, of which σ/α says nothing
    alpha, sigma = process.alpha(start), process.sigma(start)
    coordinates(prediction, process, start, alpha, sigma)
    network_time(time_input, process, start, alpha, sigma)


@cached(64)  # as each run of a plain callable asks
def _check_direction(process: Process) -> None:
    """Refuse a process that does not begin with the data: where α is not 1 at first, or σ/α does not grow."""
    t = np.array([process.t_noisy, 0.5 * (process.t_noisy + process.t_start), process.t_start])
    first, ratio = float(process.alpha(np.array([float(process.t_min)]))[0]), process.sigma_hat(t)
    if t[0] < t[2] and not ratio[0] < ratio[1] < ratio[2]:
        raise ConfigError(
            f"sigma/alpha must grow with t, as t = 0 is the data, got {', '.join(f'{r:.3g}' for r in ratio)} at t = "
            f"{', '.join(f'{each:.3g}' for each in t)}: turn the time round, t -> T - t"
        )
    if abs(first - 1) > _NEXT_TO_DATA:
        raise ConfigError(
            f"alpha must be 1 next to the data, got {first:.3g} at t = {process.t_min:.3g}: divide alpha and sigma by it, which "
            "is the same process in other units"
        )


def _check_sampled(prediction: str, time_input: TimeInput, process: Process) -> None:
    """The same for a process that is not linear."""
    choose("prediction", prediction, PREDICTIONS)
    if not callable(time_input):
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
