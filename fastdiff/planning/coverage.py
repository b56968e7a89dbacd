"""Whether a process suits data of some scale: its prior must cover them, and its lowest noise must not."""

from __future__ import annotations

import numpy as np

from .cache import cached
from .processes import Process

STANDARDIZED = (-3.0, 3.0)  # what numbers of mean 0 and deviation 1 take up


@cached(64)
def misfit(process: Process, largest: float, spread: float | None, t_min: float | None = None) -> str | None:
    """Why data do not suit the process, and the way out; None where they do.

    The start N(0, prior_std²) stands for x = α x_0 + σ ε at t_start, so α |x_0| must not exceed σ there; a run ends with noise
    σ̂ = σ/α at `t_min` (None: the process's), in which data of smaller deviation drown.

    largest  of |x_0|;  spread  the data's standard deviation, or the least of them; None: not known, or where the run ends
    """
    if not process.linear:
        return None
    t = np.array([process.t_start, process.t_noisy if t_min is None else t_min])
    alpha, sigma = process.alpha(t), process.sigma(t)
    top = max(float(sigma[0]), process.prior_std)
    if alpha[0] * largest > 1.000001 * top:
        return (
            f"the prior of {process.name!r} does not cover data as large as {largest:.3g}, as sigma(T)/alpha(T) is "
            f"{top / alpha[0]:.3g}: scale the data to [-1, 1], or use a process of more noise"
        )
    if spread and sigma[1] > 1.000001 * spread * alpha[1]:
        return (
            f"the lowest noise of {process.name!r}, sigma/alpha = {sigma[1] / alpha[1]:.3g}, is above the data's standard "
            f"deviation {spread:.3g}: scale the data to [-1, 1], or use a process of less noise"
        )
    return None
