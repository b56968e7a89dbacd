"""In which variable the probability-flow ODE is integrated, and what of x is integrated: equal error for fewer evaluations.

Along the flow x = α x̂0 + σ ε̂ with the network's opinions x̂0, ε̂, dx = x̂0 dα + ε̂ dσ (Song et al. 2021, eq. 13). So
y = x/s moves by

    dy/du = (α/s)' x̂0 + (σ/s)' ε̂ ,   log p_x = log p_y − D log s,

for any scale s. With the noise ratio r = σ/α and a scale c of the data, the forms are

    x    s = 1                  as the ODE stands
    eps  s = α                  dy = ε̂ dr: x̂0's part is exact (Karras et al. 2022, eq. 1; Lu et al. 2022a, eq. 3.4)
    x0   s = σ                  dy = x̂0 d(1/r): ε̂'s part is exact (Lu et al. 2022b, eq. 8)
    v    s = √(α² + σ²/c²)      dy = (cos θ c ε̂ − sin θ x̂0) dθ, tan θ = r/c: both parts stay of the data's size
                                (Salimans & Ho 2022, appendix D)

and the variables t, sigma: u = r, logsnr: u = −log r (half the log-SNR), asinh: u = asinh(r/c), which is r where noise is
small and log r where it is large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import choose
from .predictions import Pair, sigma_data
from .processes import Process, lib


class Ratio(NamedTuple):
    """A variable that is a function of the ratio alone, all of (value, c): u(r), r(u), dr/du as a function of r."""

    of: Callable[[Any, float], Any]
    ratio: Callable[[Any, float], Any]
    slope: Callable[[Any, float], Any]


RATIOS = {
    "sigma": Ratio(lambda r, c: r, lambda u, c: 1.0 * u, lambda r, c: 0.0 * r + 1.0),
    "logsnr": Ratio(lambda r, c: -math.log(r), lambda u, c: lib(u).exp(-u), lambda r, c: -r),
    "asinh": Ratio(
        lambda r, c: math.asinh(r / c), lambda u, c: c * lib(u).sinh(u), lambda r, c: lib(r).sqrt(r * r + c * c)
    ),
}
VARIABLES = ("t", *RATIOS)
FORMS = ("x", "eps", "x0", "v")


class Place(NamedTuple):
    """Where the flow is at u: time t, level (α, σ), scale s, and the slopes ((α/s)', (σ/s)')."""

    t: Any
    alpha: Any
    sigma: Any
    scale: Any
    slopes: Pair


@dataclass(frozen=True)
class Chart:
    """The variable u and the form y = x/s of the flow of `process`."""

    process: Process
    variable: str
    form: str

    def __post_init__(self) -> None:
        choose("variable", self.variable, VARIABLES)
        choose("form", self.form, FORMS)

    @property
    def c(self) -> float:
        """The data's scale: EDM's sigma_data, 0.5 on other processes."""
        return sigma_data(self.process)

    def of_time(self, t: float) -> float:
        """u at process time t."""
        if self.variable == "t":
            return t
        wide = np.float64(t)
        return float(RATIOS[self.variable].of(float(self.process.sigma(wide) / self.process.alpha(wide)), self.c))

    def place(self, u: Any) -> Place:
        """The flow at u: floats, arrays or tensors."""
        process, c = self.process, self.c
        if self.variable == "t":
            t, alpha, sigma = 1.0 * u, process.alpha(u), process.sigma(u)
            ratio = sigma / alpha
            slope = process.diffusion(u) ** 2 / (2 * sigma * alpha)
        else:
            ratio, slope = self._of_ratio(u)
            t = process.time(ratio)
            alpha = process.alpha(t)
            sigma = ratio * alpha
        if self.form == "x":
            change = process.drift(t) * alpha
            if self.variable != "t":
                change = change * slope / (process.diffusion(t) ** 2 / (2 * sigma * alpha))
            return Place(t, alpha, sigma, 0.0 * t + 1.0, (change, slope * alpha + ratio * change))
        if self.form == "eps":
            return Place(t, alpha, sigma, alpha, (0.0 * slope, slope))
        if self.form == "x0":
            return Place(t, alpha, sigma, sigma, (-slope / ratio**2, 0.0 * slope))
        square = 1 + (ratio / c) ** 2
        root = lib(square).sqrt(square)
        turn = slope / (square * root)  # cos θ dθ/du, times c
        return Place(t, alpha, sigma, alpha * root, (-(ratio / c**2) * turn, turn))

    def _of_ratio(self, u: Any) -> Pair:
        ratio = RATIOS[self.variable].ratio(u, self.c)
        return ratio, RATIOS[self.variable].slope(ratio, self.c)
