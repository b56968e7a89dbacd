"""Change of variables of the probability-flow ODE: time becomes u(t), the state y = x/s; equal error for fewer evaluations.

Along the flow x = α x̂0 + σ ε̂ with the network's predictions x̂0, ε̂, dx = x̂0 dα + ε̂ dσ (Song et al. 2021, eq. 13). So
y = x/s moves by

    dy/du = (α/s)' x̂0 + (σ/s)' ε̂ ,   log p_x = log p_y − D log s,

for any scale s. With σ̂ = σ/α and a scale c of the data, the forms are

    x    s = 1                  as the ODE stands
    eps  s = α                  dy = ε̂ dσ̂: x̂0's part is exact (Karras et al. 2022, eq. 1; Lu et al. 2022a, eq. 3.4)
    x0   s = σ                  dy = x̂0 d(1/σ̂): ε̂'s part is exact (Lu et al. 2022b, eq. 8)
    v    s = √(α² + σ²/c²)      dy = (cos θ c ε̂ − sin θ x̂0) dθ, tan θ = σ̂/c: both parts stay of the data's size
                                (Salimans & Ho 2022, appendix D)

and the variables t, sigma: u = σ̂, logsnr: u = −log σ̂ (half the log-SNR), asinh: u = asinh(σ̂/c), which is σ̂ where noise is
small and log σ̂ where it is large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import choose
from .processes import Pair, Process, lib


class _OfSigmaHat(NamedTuple):
    """A variable u that is a function of σ̂ alone, each of (value, c): u(σ̂), its inverse σ̂(u), and dσ̂/du as a function of σ̂."""

    forward: Callable[[Any, float], Any]
    inverse: Callable[[Any, float], Any]
    slope: Callable[[Any, float], Any]


_OF_SIGMA_HAT = {
    "sigma": _OfSigmaHat(lambda r, c: r, lambda u, c: 1.0 * u, lambda r, c: 0.0 * r + 1.0),
    "logsnr": _OfSigmaHat(lambda r, c: -math.log(r), lambda u, c: lib(u).exp(-u), lambda r, c: -r),
    "asinh": _OfSigmaHat(
        lambda r, c: math.asinh(r / c), lambda u, c: c * lib(u).sinh(u), lambda r, c: lib(r).sqrt(r * r + c * c)
    ),
}
VARIABLES = ("t", *_OF_SIGMA_HAT)
FORMS = ("x", "eps", "x0", "v")


class OdePoint(NamedTuple):
    """The ODE at u: time t, level (α, σ), scale s, and the slopes ((α/s)', (σ/s)')."""

    t: Any
    alpha: Any
    sigma: Any
    scale: Any
    slopes: Pair


@dataclass(frozen=True)
class OdeVariables:
    """The variable u and the form y = x/s of the probability-flow ODE of `process`."""

    process: Process
    variable: str
    form: str

    def __post_init__(self) -> None:
        choose("variable", self.variable, VARIABLES)
        choose("form", self.form, FORMS)

    @property
    def c(self) -> float:
        """The scale of the data."""
        return self.process.sigma_data

    def of_time(self, t: float) -> float:
        """u at process time t."""
        if self.variable == "t":
            return t
        wide = np.float64(t)
        sigma_hat = float(self.process.sigma(wide) / self.process.alpha(wide))
        return float(_OF_SIGMA_HAT[self.variable].forward(sigma_hat, self.c))

    def point(self, u: Any) -> OdePoint:
        """The ODE at u: floats, arrays or tensors."""
        process, c = self.process, self.c
        if self.variable == "t":
            t, alpha, sigma = 1.0 * u, process.alpha(u), process.sigma(u)
            sigma_hat = sigma / alpha
            slope = process.diffusion(u) ** 2 / (2 * sigma * alpha)  # dσ̂/du
        else:
            sigma_hat = _OF_SIGMA_HAT[self.variable].inverse(u, c)
            slope = _OF_SIGMA_HAT[self.variable].slope(sigma_hat, c)
            t = process.time(sigma_hat)
            alpha = process.alpha(t)
            sigma = sigma_hat * alpha
        if self.form == "x":
            change = process.drift(t) * alpha
            if self.variable != "t":
                change = change * slope / (process.diffusion(t) ** 2 / (2 * sigma * alpha))
            return OdePoint(t, alpha, sigma, 0.0 * t + 1.0, (change, slope * alpha + sigma_hat * change))
        if self.form == "eps":
            return OdePoint(t, alpha, sigma, alpha, (0.0 * slope, slope))
        if self.form == "x0":
            return OdePoint(t, alpha, sigma, sigma, (-slope / sigma_hat**2, 0.0 * slope))
        square = 1 + (sigma_hat / c) ** 2
        root = lib(square).sqrt(square)
        turn = slope / (square * root)  # cos θ dθ/du, times c
        return OdePoint(t, alpha, sigma, alpha * root, (-(sigma_hat / c**2) * turn, turn))
