"""Discrete chains on the path of a continuous process: DDPM where α² + σ² = 1 (VP), NCSN where α = 1 (VE)."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError
from . import schedules
from .cache import cached
from .processes import DDPM, NCSN, Process

CHAINS = ("ddpm", "ncsn")


@cached(64)
def has_chain(process: Process, name: str) -> bool:
    """Whether the chain `name` can stand on the path of the continuous `process`."""
    if name not in CHAINS or process.discrete or not process.linear:
        return False
    t = np.linspace(process.t_noisy, process.T, 33)
    alpha = process.alpha(t)
    return bool(np.allclose(alpha if name == "ncsn" else alpha**2 + process.sigma(t) ** 2, 1.0, rtol=1e-9))


@cached(16)
def chain_on(process: Process, name: str, levels: int) -> Process:
    """The chain `name` of `levels` levels on the path of `process`: DDPM evenly in t, NCSN geometrically in σ."""
    if has_chain(process, name):
        if name == "ddpm":
            t = process.T * np.arange(levels + 1) / levels
            chain: Process = DDPM(tuple((-np.expm1(2 * np.diff(process.log_alpha(t)))).tolist()))
        else:
            lowest = float(process.sigma(0.0)) or float(process.sigma(process.t_min))
            chain = NCSN(tuple(schedules.geometric(process.prior_std, lowest, levels).tolist()))
        if on_path(chain, process):
            return chain
    raise ConfigError(f"sde={name!r} is not on the path of {process.name!r}: use sde={process.name!r}")


@cached(64)
def on_path(chain: Process, process: Process) -> bool:
    """Whether every level of the discrete `chain` is a level of the continuous `process`, up to 1 % of T beyond its end.

    (DDPM's linear schedule ends 0.3 % beyond VP's T; the network is then given T.)
    """
    if not chain.discrete or process.discrete:
        return False
    steps = np.arange(1.0, chain.T + 1)
    alpha, sigma = chain.alpha(steps), chain.sigma(steps)
    t = process.time(sigma / alpha)
    reached = np.allclose(process.alpha(t), alpha, rtol=1e-9, atol=1e-12)
    return bool(reached and t.max() <= 1.01 * process.T and t.min() >= -1e-9 * process.T)
