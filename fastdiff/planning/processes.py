"""Forward processes dx = f(t) x dt + g(t) dw: linear ones by their perturbation kernel x_t = α(t) x_0 + σ(t) ε, any other by a
sampler of x_t alone.

Processes, predictions and the variables of the ODE are generic over numpy and torch: each formula takes its functions from its
argument's own library (`lib`), so that one formula serves floats, arrays and device tensors. `time` is the inverse of the
noise ratio σ̂ = σ/α, which is what different clocks on one path share.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..errors import ConfigError, choose
from . import schedules
from .cache import cached

Array = NDArray[np.float64]
Pair = tuple[Any, Any]

_SHORTEST = 1e-5
# float32 must hold the square of every level
LARGEST = math.sqrt(float(np.finfo(np.float32).max))
_LARGEST_RATIO = 1e4  # of σ/α where runs start, if α is small there


class Process:
    """dx = f(t) x dt + g(t) dw on 0 ≤ t ≤ T: α(t), σ(t), f(t) = `drift`, g(t) = `diffusion`, prior N(0, prior_std²).

    To write another process, subclass this one, best as a frozen dataclass of plain numbers.

    - With `alpha` and `sigma` (of floats, arrays and tensors, see `lib`) it is linear: it trains on every loss and runs with
      every sampler. `drift`, `diffusion` and `time` are then computed numerically; a formula is faster and exact.
    - With `T`, `t_min` and `sample` alone it may be any process, say a simulated nonlinear SDE. It trains a "score" network on
      the losses that need no transition density, "ism", "ssm" and "ssm_vr".

    Whatever differs from one process to another is an attribute or a method here, with a default that a subclass overrides. A
    subclass of VE, EDM or another inherits what that one says here (its sampler, its times of training, where likelihoods
    start), but not the steps of grid="score_sde", which stand on VE's own ladder and VP's own β.
    """

    name: ClassVar[str]
    T: float
    t_min: ClassVar[float] = 1e-5  # where sampling ends
    first_time: ClassVar[float] = 0.0  # the lowest time of any grid
    discrete: ClassVar[bool] = False  # a chain: its whole times are the steps that a network was trained on
    # its whole times 1 … T are also the levels of annealed Langevin dynamics; `index` still counts from t = 1, the lowest noise
    ladder: ClassVar[bool] = False
    default_sampler: ClassVar[Any] = "euler_maruyama"  # a name, or an object of fastdiff.samplers
    # where samplers of many steps stand; those made for few stand on "fourth_root" anyway
    default_grid: ClassVar[str] = "fourth_root"
    sigma_data: float = 0.5  # the data's standard deviation in EDM's preconditioning

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in vars(cls):
            cls.name = cls.__name__.lower()
        # a checkpoint would be loaded as fastdiff's process of that name
        if cls.name in globals().get("PROCESSES", ()):
            raise ConfigError(
                f"process {cls.__name__} must have a name of its own, and {cls.name!r} is fastdiff's: set {cls.__name__}.name"
            )

    def defines(self, method: str) -> bool:
        """Whether this process overrides the method, which in the base class only raises."""
        bound = getattr(self, method, None)
        return callable(bound) and getattr(bound, "__func__", bound) is not getattr(Process, method)

    @property
    def linear(self) -> bool:
        """Whether x_t = α(t) x_0 + σ(t) ε, by `alpha` and `sigma`."""
        return self.defines("alpha") and self.defines("sigma")

    @property
    def prior_std(self) -> float:
        """Standard deviation of the start x_T ~ N(0, prior_std²): σ where runs start (`t_start`), and 1 where there is no σ.

        VP, sub-VP and DDPM say 1, as published: what α(T)² lacks in σ(T)² is the data's, whose variance is about 1.
        """
        return float(self.sigma(float(self.t_start))) if self.linear else 1.0

    @property
    def t_start(self) -> float:
        """Where runs start and likelihoods end: T, or below it, on a continuous process, where σ/α is 10⁴ and α < 10⁻³: from
        there on (x − σ ε)/α has no digits left in float32, and what x holds of the data is a ten-thousandth of its noise."""
        return _start(self)  # type: ignore[no-any-return]

    @property
    def t_train(self) -> float:
        """The shortest time that training draws: 1e-5, as in score_sde; t_min where the process is not linear."""
        return _SHORTEST if self.linear else self.t_min

    @property
    def t_noisy(self) -> float:
        """The lowest time at which a network can be called: a chain's first step where t_min is the data."""
        return self.t_min if self.t_min > 0 else 1.0

    @property
    def t_likelihood(self) -> float:
        """Where likelihoods and encodings start: the lowest noise, on VE, VP, sub-VP and OU 1e-5 (score_sde's)."""
        return self.t_noisy

    def training_times(self, u: Any) -> Any:
        """Times of training, a tensor [B], from uniform numbers u [B] in [0, 1): uniform on [t_train, T] or a chain's steps."""
        if self.discrete:
            return (u * self.T).floor().clamp(max=self.T - 1) + 1
        return self.t_train + (self.T - self.t_train) * u

    def index(self, t: Any) -> Any:
        """The number, from 0, of a chain's step t, which networks of time_input="index" take."""
        return t - 1

    def reference_transitions(self, t: Array) -> tuple[Array, Array, Array]:
        """(α_{t|s}, σ²_{t|s}, the ancestral variance), each [N], of score_sde's own steps from the N times t down, T/N each.

        NaN where the reference has none: Euler's steps (its `SDE.discretize`, sub-VP's too) have no ancestral sampler.
        """
        dt = self.T / len(t)
        return 1 + self.drift(t) * dt, self.diffusion(t) ** 2 * dt, np.full(len(t), np.nan)

    def alpha(self, t: Any) -> Any:
        raise self._missing("alpha(t)")

    def sigma(self, t: Any) -> Any:
        raise self._missing("sigma(t)")

    def log_alpha(self, t: Any) -> Any:
        """log α(t), from which a DDPM chain on this path has its β."""
        return lib(t).log(self.alpha(t))

    def drift(self, t: Any) -> Any:
        """f(t) = d log α/dt; by differences, to 1e-7 (1e-5 at T), unless a process has a formula."""
        low, high = self._around(t)
        library = lib(high)
        return _as(library.log(self.alpha(high) / self.alpha(low)) / (high - low), t)

    def diffusion(self, t: Any) -> Any:
        """g(t), g² = dσ²/dt − 2 f σ² = 2σ² d log(σ/α)/dt; by differences, as `drift`."""
        low, high = self._around(t)
        library, middle = lib(high), 0.5 * (low + high)
        rise = library.log(self.sigma(high) * self.alpha(low) / (self.sigma(low) * self.alpha(high))) / (high - low)
        return _as(self.sigma(middle) * library.sqrt(2 * rise), t)

    def rates(self, t: Any) -> Pair:
        """(dα/dt, dσ/dt): from `drift` and `diffusion` where a process has these formulas, else by differences."""
        if self.defines("drift") and self.defines("diffusion"):
            drift, sigma = self.drift(t), self.sigma(t)
            return drift * self.alpha(t), drift * sigma + self.diffusion(t) ** 2 / (2 * sigma)
        low, high = self._around(t)
        width = high - low
        return tuple(_as((of(high) - of(low)) / width, t) for of in (self.alpha, self.sigma))

    def time(self, sigma_hat: Any) -> Any:
        """The t at which σ(t)/α(t) is `sigma_hat`: by bisection unless a process has a formula; outside [0, T] where none is."""
        wanted = _double(sigma_hat)
        low, high = 0.0 * wanted, 0.0 * wanted + float(self.T)
        first, last = self.sigma_hat(low), self.sigma_hat(high)
        below, above = wanted < first * (1 - 1e-9), wanted > last * (1 + 1e-9)
        where = lib(wanted).where
        for _ in range(60):
            middle = 0.5 * (low + high)
            lower = self.sigma_hat(middle) < wanted
            low, high = where(lower, middle, low), where(lower, high, middle)
        return _as(where(below, -1.0 + low, where(above, 1.0 + 2 * high, 0.5 * (low + high))), sigma_hat)

    def sigma_hat(self, t: Any) -> Any:
        """σ/α, infinite where α is not above 0, as rounding may have it at T."""
        alpha = self.alpha(t)
        where = lib(alpha).where
        return where(alpha > 0, self.sigma(t) / where(alpha > 0, alpha, 0.0 * alpha + 1.0), 0.0 * alpha + math.inf)

    def _around(self, t: Any) -> tuple[Any, Any]:
        """Times about t, within (0, T]."""
        middle = _double(t)
        step = 1e-6 * lib(middle).clip(middle, 1e-9 * self.T, None)
        return middle - step + step * (middle <= step), lib(middle).clip(middle + step, None, float(self.T))

    def _missing(self, method: str) -> ConfigError:
        return ConfigError(f"process {type(self).__name__} must define {method}, which this needs")

    def sample(self, x0: Any, t: Any, noise: Any) -> Any:
        """x_t [B, *] for x0 [B, *] and times t [B] in [t_min, T], on x0's device; processes that are not linear define it.

        `noise(k)` gives the k-th draw of standard normals [B, *], k = 0 … 2**20 − 1; all randomness must come from there,
        so that a seed repeats a run. Gradients are off.
        """
        raise self._missing("sample(x0, t, noise)")

    def config(self) -> dict[str, Any]:
        """What `from_config` needs to build this process again."""
        names: list[str] = [option.name for option in fields(self)] if is_dataclass(self) else []
        return {"name": self.name, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding (Song et al. 2021, eq. 30): α = 1, σ(t) = σ_min (σ_max/σ_min)^t, data usually in [0, 1]."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    name: ClassVar[str] = "ve"
    default_sampler: ClassVar[Any] = "pc"
    default_grid: ClassVar[str] = "uniform"  # as published
    T = 1.0
    t_min: ClassVar[float] = 1e-5

    def __post_init__(self) -> None:
        sigma_min, sigma_max = _checked_sigmas(self.sigma_min, self.sigma_max)
        _keep(self, sigma_min=sigma_min, sigma_max=sigma_max)

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    @property
    def t_likelihood(self) -> float:
        return _SHORTEST

    def alpha(self, t: Any) -> Any:
        return 0.0 * t + 1.0

    def sigma(self, t: Any) -> Any:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def drift(self, t: Any) -> Any:
        return 0.0 * t

    def diffusion(self, t: Any) -> Any:
        return self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def time(self, sigma_hat: Any) -> Any:
        return lib(sigma_hat).log(sigma_hat / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)

    def reference_transitions(self, t: Array) -> tuple[Array, Array, Array]:
        """σ_i the geometric ladder, σ_{−1} = 0, i = trunc(t (N − 1)/T); the ancestral variance is the posterior's."""
        if type(self) is not VE:  # whose σ may be another
            return super().reference_transitions(t)
        ladder = np.append(schedules.geometric(self.sigma_max, self.sigma_min, len(t))[::-1], 0.0)  # [-1] is 0
        index = _truncated(t, self.T)
        high, low = ladder[index], ladder[index - 1]
        var = (high - low) * (high + low)
        return np.ones(len(t)), var, var * (low / high) ** 2


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving (Song et al. 2021, eq. 32–33): β(t) = β_min + t (β_max − β_min), α² + σ² = 1.

    With B(t) = ∫β = ½t²(β_max − β_min) + tβ_min:  α = e^{−B/2},  σ² = 1 − e^{−B},  f = −β/2,  g² = β.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    name: ClassVar[str] = "vp"
    default_grid: ClassVar[str] = "uniform"  # as published
    T = 1.0
    t_min: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        _keep(
            self, beta_min=checks.number("beta_min", self.beta_min), beta_max=checks.number("beta_max", self.beta_max)
        )
        if not 0 <= self.beta_min <= self.beta_max or self.beta_max <= 0:
            raise ConfigError(
                f"beta_min and beta_max must satisfy 0 <= beta_min <= beta_max, beta_max > 0, "
                f"got {self.beta_min} and {self.beta_max}"
            )

    def beta(self, t: Any) -> Any:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integral(self, t: Any) -> Any:
        """B(t) = ∫₀ᵗ β."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    @property
    def t_likelihood(self) -> float:
        return _SHORTEST

    def log_alpha(self, t: Any) -> Any:
        return -0.5 * self.integral(t)

    @property
    def prior_std(self) -> float:
        return 1.0

    def alpha(self, t: Any) -> Any:
        return lib(t).exp(self.log_alpha(t))

    def sigma(self, t: Any) -> Any:
        return lib(t).sqrt(0.0 - lib(t).expm1(-self.integral(t)))

    def drift(self, t: Any) -> Any:
        return -0.5 * self.beta(t)

    def diffusion(self, t: Any) -> Any:
        return lib(t).sqrt(self.beta(t))

    def time(self, sigma_hat: Any) -> Any:
        return self._time_of_integral(lib(sigma_hat).log1p(sigma_hat * sigma_hat))

    def reference_transitions(self, t: Array) -> tuple[Array, Array, Array]:
        """β_i = linspace(β_min/N, β_max/N)[i], i = trunc(t (N − 1)/T): α² = 1 − β_i, σ² = β_i, and so is the ancestral variance.

        NaN where β_i > 1, at N < β_max (Euler–Maruyama's steps do not use them), and no ancestral step where β_i = 1.
        """
        n = len(t)
        if type(self) is not VP:  # whose β may be another
            return super().reference_transitions(t)
        var = np.linspace(self.beta_min / n, self.beta_max / n, n)[_truncated(t, self.T)]
        var = np.where(var <= 1, var, np.nan)
        return np.sqrt(1 - var), var, np.where(var < 1, var, np.nan)

    def _time_of_integral(self, integral: Any) -> Any:
        # the root of ½t²Δ + tβ_min = B, in the form that keeps its digits at small B
        slope = self.beta_max - self.beta_min
        root = self.beta_min + lib(integral).sqrt(self.beta_min**2 + 2 * slope * integral)
        return 2 * integral / (root + (root == 0))


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-variance preserving (Song et al. 2021, eq. 34): VP's α, σ = 1 − e^{−B} (no root), g² = β (1 − e^{−2B})."""

    name: ClassVar[str] = "subvp"

    def sigma(self, t: Any) -> Any:
        return 0.0 - lib(t).expm1(-self.integral(t))

    def diffusion(self, t: Any) -> Any:
        return lib(t).sqrt(-self.beta(t) * lib(t).expm1(-2 * self.integral(t)))

    def time(self, sigma_hat: Any) -> Any:
        # (1 − α²)/α = r has the root α = √(1 + r²/4) − r/2, so B/2 = −log α = asinh(r/2)
        return self._time_of_integral(2 * lib(sigma_hat).arcsinh(sigma_hat / 2))

    def reference_transitions(self, t: Array) -> tuple[Array, Array, Array]:
        return Process.reference_transitions(self, t)


@dataclass(frozen=True)
class OU(Process):
    """Ornstein–Uhlenbeck dx = −rate·x dt + noise·dw: α = e^{−rate·t}, σ² = noise² (1 − e^{−2 rate t})/(2 rate).

    The defaults have the stationary law N(0, 1). `rate` may be 0 (Brownian motion) or negative.
    """

    rate: float = 1.0
    noise: float = math.sqrt(2)
    T: float = 5.0
    name: ClassVar[str] = "ou"
    t_min: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        _keep(
            self,
            rate=checks.number("rate", self.rate),
            noise=checks.number("noise", self.noise, 0, above=True),
            T=checks.number("T", self.T, 0, above=True),
        )

    @property
    def t_likelihood(self) -> float:
        return _SHORTEST

    def alpha(self, t: Any) -> Any:
        return lib(t).exp(-self.rate * t)

    def sigma(self, t: Any) -> Any:
        if self.rate == 0:
            return self.noise * lib(t).sqrt(t)
        return self.noise * lib(t).sqrt(-lib(t).expm1(-2 * self.rate * t) / (2 * self.rate))

    def drift(self, t: Any) -> Any:
        return 0.0 * t - self.rate

    def diffusion(self, t: Any) -> Any:
        return 0.0 * t + self.noise

    def time(self, sigma_hat: Any) -> Any:
        square = (sigma_hat / self.noise) ** 2
        return square if self.rate == 0 else lib(sigma_hat).log1p(2 * self.rate * square) / (2 * self.rate)


@dataclass(frozen=True)
class RectifiedFlow(Process):
    """The straight path of rectified flow and flow matching (Liu et al. 2023; Lipman et al. 2023): α = 1 − t, σ = t.

    Its velocity is ε − x_0. The SDE of the same path, f = −1/(1 − t) and g² = 2t/(1 − t), is infinite at T = 1, which runs start
    below (`t_start`). Where an author's t = 1 is the data, the network is told 1 − t, and its velocity is minus this one.
    """

    name: ClassVar[str] = "rectified_flow"
    default_sampler: ClassVar[Any] = "heun"
    T = 1.0

    def alpha(self, t: Any) -> Any:
        return 1.0 - t

    def sigma(self, t: Any) -> Any:
        return 1.0 * t

    def drift(self, t: Any) -> Any:
        return -1.0 / (1.0 - t)

    def diffusion(self, t: Any) -> Any:
        return lib(t).sqrt(2.0 * t / (1.0 - t))

    def rates(self, t: Any) -> Pair:
        return 0.0 * t - 1.0, 0.0 * t + 1.0

    def time(self, sigma_hat: Any) -> Any:
        where, finite = lib(sigma_hat).where, sigma_hat < math.inf
        return where(finite, sigma_hat / (1.0 + where(finite, sigma_hat, 0.0)), 1.0)


@dataclass(frozen=True)
class EDM(Process):
    """Karras et al. 2022: α = 1 and the time is the noise level itself, σ(t) = t; `sigma_data` scales the network."""

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    name: ClassVar[str] = "edm"
    default_sampler: ClassVar[Any] = "heun"

    def __post_init__(self) -> None:
        sigma_min, sigma_max = _checked_sigmas(self.sigma_min, self.sigma_max)
        _keep(self, sigma_min=sigma_min, sigma_max=sigma_max)
        _keep(self, sigma_data=checks.number("sigma_data", self.sigma_data, 0, above=True))

    @property
    def T(self) -> float:  # type: ignore[override]
        return self.sigma_max

    @property
    def t_min(self) -> float:  # type: ignore[override]
        return self.sigma_min

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def alpha(self, t: Any) -> Any:
        return 0.0 * t + 1.0

    def sigma(self, t: Any) -> Any:
        return 1.0 * t

    def drift(self, t: Any) -> Any:
        return 0.0 * t

    def diffusion(self, t: Any) -> Any:
        return lib(t).sqrt(2.0 * t)

    def time(self, sigma_hat: Any) -> Any:
        return 1.0 * sigma_hat

    def training_times(self, u: Any) -> Any:
        """ln σ ~ N(−1.2, 1.2²) (Karras et al. 2022, Table 1), at most sigma_max, which one in 600,000 would exceed at 80."""
        torch = lib(u)
        quantile = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))
        return torch.exp(-1.2 + 1.2 * quantile).to(u.dtype).clamp(max=self.sigma_max)


@dataclass(frozen=True)
class DDPM(Process):
    """The chain x_i = √(1 − β_i) x_{i−1} + √β_i z (Ho et al. 2020), time t = 0 … T as in the paper, t = 0 the data.

    `betas`: the name of a schedule, or a sequence of T numbers in (0, 1). "linear", "quadratic" and "scaled_linear" have their
    ends times 1000/T, so that every T reaches the noise (Nichol & Dhariwal 2021); for ends that stay as they are, as in
    diffusers, give fastdiff.schedules.linear(T, 1e-4, 0.02). Between whole times log ᾱ is linear, which is the VP process
    of piecewise constant rate −log(1 − β_i). The network's `index` is t − 1.
    """

    betas: str | Sequence[float] = "linear"
    T: int = 1000
    name: ClassVar[str] = "ddpm"
    default_sampler: ClassVar[Any] = "ancestral"
    t_min: ClassVar[float] = 0.0
    discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.betas, str):
            _keep(self, betas=checks.sequence("betas", self.betas))
            if self.T not in (1000, len(self.betas)):
                raise ConfigError(f"T must be the number of betas, {len(self.betas)}, got {self.T}: leave it out")
            _keep(self, T=len(self.betas))
        _keep(self, T=checks.integer("T", self.T, 1, 10**7))
        values = self.beta_table
        bad = np.flatnonzero(~((values > 0) & (values < 1) | (values == 1) & (np.arange(self.T) == self.T - 1)))
        if len(bad):
            way_out = ": use a larger T" if isinstance(self.betas, str) else ""
            raise ConfigError(
                f"betas must lie in (0, 1), the last in (0, 1], got betas[{bad[0]}] = {values[bad[0]]:g}{way_out}"
            )

    def __repr__(self) -> str:
        betas = repr(self.betas) if isinstance(self.betas, str) else _summary(self.betas)
        return f"{type(self).__name__}(betas={betas}, T={self.T})"

    @cached_property
    def beta_table(self) -> Array:
        """β_1 … β_T."""
        return schedules.betas(self.betas, self.T) if isinstance(self.betas, str) else np.array(self.betas)

    @property
    def prior_std(self) -> float:
        return 1.0

    @cached_property
    def _log_alpha(self) -> Array:
        """log α at t = 0 … T; where β_T = 1 (zero terminal SNR, Lin et al. 2023) α_T is 10⁻⁷ instead of 0, so that formulas may
        divide by it, as they do in float64: x_0 from v is then off by 10⁻⁷ x."""
        betas = self.beta_table
        last = betas[-1:] < 1
        logs = np.log1p(-np.append(betas[:-1], np.where(last, betas[-1:], 0.0)))
        log_alpha = np.concatenate(([0.0], 0.5 * np.cumsum(logs)))
        log_alpha[-1] = log_alpha[-1] if last else min(math.log(1e-7), log_alpha[-1] - math.log(1e3))
        return log_alpha

    def alpha(self, t: Any) -> Any:
        return lib(t).exp(_interpolate(t, self._log_alpha, 0))

    def sigma(self, t: Any) -> Any:
        return lib(t).sqrt(0.0 - lib(t).expm1(2 * _interpolate(t, self._log_alpha, 0)))

    def drift(self, t: Any) -> Any:
        return _slope(t, self._log_alpha, 0)

    def diffusion(self, t: Any) -> Any:
        return lib(t).sqrt(-2 * self.drift(t))

    def time(self, sigma_hat: Any) -> Any:
        return _position(0.5 * lib(sigma_hat).log1p(sigma_hat * sigma_hat), -self._log_alpha, 0)


@dataclass(frozen=True)
class NCSN(Process):
    """The ladder σ_1 > … > σ_L of Song & Ermon (2019, 2020): α = 1, time t = L (σ_1) down to t = 1 (σ_L).

    Between whole times log σ is linear. The network's `index` is L − t: 0 is the largest level, as in NCSN's own code.
    """

    sigmas: Sequence[float] = tuple(schedules.geometric(1.0, 0.01, 10))
    name: ClassVar[str] = "ncsn"
    default_sampler: ClassVar[Any] = "annealed_langevin"
    t_min: ClassVar[float] = 1.0
    first_time: ClassVar[float] = 1.0
    discrete: ClassVar[bool] = True
    ladder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _keep(self, sigmas=checks.sequence("sigmas", self.sigmas))
        values = np.array(self.sigmas)
        if len(values) < 2:
            raise ConfigError(f"sigmas must hold at least two levels, got {len(values)}")
        bad = np.flatnonzero(~((values > 0) & (values < LARGEST)))
        if len(bad):
            raise ConfigError(f"sigmas must lie in (0, {LARGEST:.3g}), got sigmas[{bad[0]}] = {values[bad[0]]:g}")
        rise = np.flatnonzero(np.diff(values) >= 0)
        if len(rise):
            raise ConfigError(f"sigmas must be strictly decreasing, got sigmas[{rise[0] + 1}] >= sigmas[{rise[0]}]")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sigmas={_summary(self.sigmas)})"

    @property
    def T(self) -> int:  # type: ignore[override]
        return len(self.sigmas)

    @property
    def prior_std(self) -> float:
        return self.sigmas[0]

    @cached_property
    def _log_sigma(self) -> Array:
        """log σ at t = 1 … L."""
        return np.log(self.sigmas)[::-1].copy()

    def alpha(self, t: Any) -> Any:
        return 0.0 * t + 1.0

    def sigma(self, t: Any) -> Any:
        return lib(t).exp(_interpolate(t, self._log_sigma, 1))

    def drift(self, t: Any) -> Any:
        return 0.0 * t

    def diffusion(self, t: Any) -> Any:
        return self.sigma(t) * lib(t).sqrt(2 * _slope(t, self._log_sigma, 1))

    def time(self, sigma_hat: Any) -> Any:
        return _position(lib(sigma_hat).log(sigma_hat), self._log_sigma, 1)

    def index(self, t: Any) -> Any:
        return self.T - t


PROCESSES: dict[str, type[Process]] = {c.name: c for c in (VE, VP, SubVP, DDPM, NCSN, EDM, OU, RectifiedFlow)}


@cached(64)
def _start(process: Process) -> float:
    """`Process.t_start`."""
    top = float(process.T)
    if process.discrete or not process.linear:
        return top
    alpha, sigma_hat = float(process.alpha(np.float64(top))), float(process.sigma_hat(np.float64(top)))
    return float(process.time(np.float64(_LARGEST_RATIO))) if alpha < 1e-3 and sigma_hat > _LARGEST_RATIO else top


def get(sde: object) -> Process:
    """A process from its name (with its defaults) or itself."""
    if isinstance(sde, Process):
        return sde
    return PROCESSES[choose("sde", sde, PROCESSES)]()


def require_linear(process: Process, what: str, way_out: str) -> None:
    """Refuse what needs α(t) and σ(t) on a process that is not linear."""
    if not process.linear:
        raise ConfigError(
            f"{what} needs a linear process, one that defines alpha(t) and sigma(t), and {type(process).__name__} does not: "
            f"{way_out}"
        )


def from_config(config: dict[str, Any]) -> Process:
    """The process that `Process.config` described."""
    options = dict(config)
    return PROCESSES[choose("sde", options.pop("name", None), PROCESSES)](**options)


def lib(t: Any) -> Any:
    """The library of t's functions: numpy, or torch if `t` is a tensor (then torch is loaded; it is not imported here)."""
    return sys.modules["torch"] if hasattr(t, "detach") else np


def _double(t: Any) -> Any:
    """In float64, floats as numpy's."""
    return t.double() if hasattr(t, "detach") else np.asarray(t, dtype=np.float64)


def _as(values: Any, t: Any) -> Any:
    """values in the dtype of t, if that is a tensor of floats."""
    return values.to(t.dtype) if hasattr(t, "detach") and t.is_floating_point() else values


_tables = threading.local()  # .kept: of the thread that is making a CUDA graph


@contextlib.contextmanager
def keeping(tables: dict[Any, Any]) -> Iterator[None]:
    """A block in which `placed` copies a table once and then takes it from `tables`: a CUDA graph can hold no copy from the
    host, and replays read the tables for as long as somebody keeps them."""
    _tables.kept = tables
    try:
        yield
    finally:
        _tables.kept = None


def placed(table: Array, like: Any, dtype: Any = None) -> Any:
    """The table as a tensor, on the device of another one, and in its dtype unless another is given."""
    torch, tables = lib(like), getattr(_tables, "kept", None)
    dtype = like.dtype if dtype is None else dtype
    if tables is None:
        return torch.as_tensor(table, dtype=dtype, device=like.device)
    key = id(table), dtype, like.device
    if key not in tables:  # with the table, so that no other comes to its place
        tables[key] = torch.as_tensor(table, dtype=dtype, device=like.device), table
    return tables[key][0]


def _interpolate(t: Any, table: Array, first: int) -> Any:
    """Piecewise linear through table[k] at t = first + k, in t's own library."""
    if lib(t) is np:
        return np.interp(t, np.arange(first, first + len(table)), table)
    t = t if t.is_floating_point() else t.double()
    values = placed(table, t)
    k = (t - first).floor().long().clamp(0, len(table) - 2)
    return values[k] + (t - first - k) * (values[k + 1] - values[k])


def _position(value: Any, table: Array, first: int) -> Any:
    """The inverse of `_interpolate` for a rising table, whose end intervals go on beyond it: so that the caller sees by how
    much a level overshoots."""
    library = lib(value)
    values = table if library is np else placed(table, value)
    k = library.searchsorted(values, value).clip(1, len(table) - 1)
    return first + k - 1 + (value - values[k - 1]) / (values[k] - values[k - 1])


def _summary(values: Sequence[float]) -> str:
    """A list of numbers in a few words."""
    listed = ", ".join(f"{value:g}" for value in values[:6])
    return (
        f"[{listed}]"
        if len(values) <= 6
        else f"[{values[0]:g}, {values[1]:g}, … {len(values)} in all …, {values[-1]:g}]"
    )


def _truncated(t: Array, T: float) -> NDArray[np.int64]:
    """score_sde's index i = trunc(t (N − 1)/T) of N times."""
    return (t * (len(t) - 1) / T).astype(int)


def _slope(t: Any, table: Array, first: int) -> Any:
    """The slope of that line on the interval that ends at or contains t."""
    if lib(t) is np:
        return np.diff(table)[np.clip(np.ceil(np.asarray(t) - first).astype(int) - 1, 0, len(table) - 2)]
    t = t if t.is_floating_point() else t.double()
    k = ((t - first).ceil().long() - 1).clamp(0, len(table) - 2)
    values = placed(table, t, lib(t).float64)  # whose differences are rounded once
    return (values[k + 1] - values[k]).to(t.dtype)


def _checked_sigmas(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    low, high = schedules.check_sigmas(sigma_max, sigma_min)
    if high > LARGEST:
        raise ConfigError(f"sigma_max must be at most {LARGEST:.3g}, so that float32 holds its square, got {high}")
    return low, high


def _keep(process: Process, **values: Any) -> None:
    """Set checked values on a frozen dataclass: plain numbers, whatever kind of number was given."""
    for name, value in values.items():
        object.__setattr__(process, name, value)
