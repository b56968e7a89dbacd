"""Discrete chains on the path of a continuous process: DDPM on VP, NCSN on VE."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..errors import ConfigError
from . import schedules
from .processes import DDPM, NCSN, VE, VP, Process

# the discrete processes whose levels lie on the path of a continuous one
CHAINS: dict[str, type[Process]] = {"ddpm": VP, "ncsn": VE}


@lru_cache(maxsize=16)
def chain_on(process: Process, name: str, levels: int) -> Process:
    """The chain `name` of `levels` levels on the path of `process`: DDPM on VP, NCSN on VE (see CHAINS)."""
    if type(process) is not CHAINS.get(name):
        raise ConfigError(f"sde={name!r} is not on the path of {process.name!r}: use sde={process.name!r}")
    if isinstance(process, VP):
        t = np.arange(levels + 1) / levels
        return DDPM(tuple((-np.expm1(-np.diff(process.integral(t)))).tolist()))
    ladder = schedules.geometric(process.prior_std, float(process.sigma(0.0)), levels)
    return NCSN(tuple(ladder.tolist()))


@lru_cache(maxsize=64)
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
