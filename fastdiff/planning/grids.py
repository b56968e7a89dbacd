"""Time grids. A grid becomes `Step`s: consecutive levels with the transition kernel between them.

A grid is a name, a strictly decreasing list of process times, or `sigmas([...])`, a list of noise ratios σ̂ = σ/α.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..errors import ConfigError, choose
from ..table import Level
from .processes import Process
from .schedules import check_sigmas

Array = NDArray[np.float64]


class Step(NamedTuple):
    """From `level` down to `next`: x_level = ratio·x_next + √var·z is the forward kernel between them.

    `posterior` = var σ_next²/σ_level² is the variance of x_next given x_level and x_0; `drift` and `diffusion` are f, g
    at `level`; dt < 0.
    """

    level: Level
    next: Level
    dt: float
    ratio: float
    var: float
    posterior: float
    drift: float
    diffusion: float


class Sigmas(tuple[float, ...]):
    """A grid of noise ratios σ̂ = σ/α, strictly decreasing, a last 0 allowed (see `sigmas`)."""

    __slots__ = ()


def sigmas(values: Sequence[float]) -> Sigmas:
    """A grid given by its noise ratios σ̂ = σ/α; ODE solvers then integrate x/α in σ̂ (Karras et al. 2022)."""
    sigma_hats = Sigmas(decreasing("grid", values))
    if sigma_hats[-1] < 0:
        raise ConfigError(f"grid of sigmas must be >= 0, got {sigma_hats[-1]:g} at the end")
    return sigma_hats


@dataclass(frozen=True)
class Grid:
    """Steps, and whether ODE solvers integrate in σ̂ (`in_sigma`) or in process time."""

    steps: tuple[Step, ...]
    in_sigma: bool = False
    reference: bool = False  # score_sde's own discretisation

    @property
    def levels(self) -> list[Level]:
        """The levels from the start to the end, one more than there are steps."""
        return [step.level for step in self.steps] + [self.steps[-1].next]


def decreasing(argument: str, values: Any) -> tuple[float, ...]:
    """`values` (list, array, tensor) as a tuple of at least two strictly decreasing finite numbers."""
    numbers = np.array(checks.sequence(argument, values))
    if len(numbers) < 2:
        raise ConfigError(f"{argument} must hold at least two decreasing numbers, got {len(numbers)}")
    rise = np.flatnonzero(np.diff(numbers) >= 0)
    if len(rise):
        k = int(rise[0]) + 1
        raise ConfigError(
            f"{argument} must be strictly decreasing, got {numbers[k]:g} after {numbers[k - 1]:g} at index {k}"
        )
    return tuple(float(v) for v in numbers)


def _uniform(process: Process, n: int, t_min: float) -> Array:
    return np.linspace(process.T, t_min, n + 1)


def _quadratic(process: Process, n: int, t_min: float) -> Array:
    return np.linspace(math.sqrt(process.T), math.sqrt(t_min), n + 1) ** 2


def _logsnr(process: Process, n: int, t_min: float) -> Array:
    high, low = _ends(process, t_min, "logsnr")
    times: Array = process.time(np.exp(np.linspace(math.log(high), math.log(low), n + 1)))
    times[0], times[-1] = process.T, t_min
    return times


def _trained(process: Process, n: int, t_min: float) -> Array:
    if not process.discrete:
        raise ConfigError(f"grid='trained' needs a discrete process (ddpm, ncsn), {process.name!r} is continuous")
    if t_min != int(t_min):
        raise ConfigError(
            f"t_min must be a whole step of the chain with grid='trained', got {t_min:g}: use grid='uniform'"
        )
    available = int(process.T - t_min)
    if n > available:
        raise ConfigError(
            f"steps must be <= {available}, the trained steps of this {process.name!r}, got {n}: use grid='uniform' "
            "to stand between them"
        )
    return np.floor(np.linspace(process.T, t_min, n + 1) + 0.5)


# name -> (process, number of steps, t_min) -> times, from T down to t_min
TIMES: dict[str, Callable[[Process, int, float], Array]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "logsnr": _logsnr,
    "trained": _trained,
}
GRIDS = (*TIMES, "karras", "score_sde")


def karras(sigma_max: float, sigma_min: float, n: int, rho: float = 7.0) -> Array:
    """σ_i = (σ_max^{1/ρ} + i/(n − 1)(σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, then 0 (Karras et al. 2022, eq. 5): n + 1 numbers."""
    sigma_min, sigma_max = check_sigmas(sigma_max, sigma_min)
    n, rho = checks.integer("n", n, 1, 10**7), checks.number("rho", rho, 0, above=True)
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho if n > 1 else np.array([sigma_max])
    return np.append(ramp, 0.0)


def build(spec: object, process: Process, n: int | None, t_min: float | None) -> Grid:
    """The grid of `n` steps that ends at `t_min` (None: the process's); an explicit `spec` has both, and takes neither."""
    if isinstance(spec, str):
        choose("grid", spec, GRIDS)
        if n is None:
            raise ConfigError(f"steps= is needed with grid={spec!r}")
        end = process.t_min if t_min is None else t_min
        if not 0 <= end < process.T:
            raise ConfigError(f"t_min must satisfy 0 <= t_min < T = {process.T:g}, got {end:g}")
        if end < process.first_time:
            raise ConfigError(
                f"t_min must be >= {process.first_time:g}, the smallest level of {process.name!r}, got {end:g}"
            )
        if spec == "score_sde":
            return Grid(_reference_steps(process, n, end), reference=True)
        if spec == "karras":
            return Grid(_steps(process, _levels_of_sigma_hat(process, karras(*_ends(process, end, spec), n))), True)
        return Grid(_steps(process, _levels_of_times(process, TIMES[spec](process, n, end))))
    in_sigma = isinstance(spec, Sigmas)
    values = np.array(decreasing("grid", spec))
    if t_min is not None:
        raise ConfigError(f"t_min={t_min:g} contradicts an explicit grid, which ends at {values[-1]:g}: drop t_min")
    if in_sigma:
        return Grid(_steps(process, _levels_of_sigma_hat(process, values)), True)
    first = process.first_time
    outside = np.flatnonzero((values < first) | (values > process.T))
    if len(outside):
        raise ConfigError(f"grid times must lie in [{first:g}, {process.T:g}], got {values[outside[0]]:g}")
    return Grid(_steps(process, _levels_of_times(process, values)))


def level_at(process: Process, sigma_hat: float) -> Level:
    """The level of `process` at the noise ratio σ̂ = σ/α."""
    return levels_at(process, np.array([sigma_hat]))[0]


def levels_at(process: Process, sigma_hat: Array) -> list[Level]:
    """The levels of `process` at the noise ratios σ̂ = σ/α [n]."""
    return _levels_of_sigma_hat(process, sigma_hat) if len(sigma_hat) else []


def step_between(process: Process, level: Level, following: Level) -> Step:
    """The step between two levels of `process`."""
    return _steps(process, [level, following])[0]


def _ends(process: Process, t_min: float, name: str) -> tuple[float, float]:
    """σ̂ at T and at t_min."""
    t = np.array([float(process.T), t_min])
    high, low = (process.sigma(t) / process.alpha(t)).tolist()
    if low <= 0:
        raise ConfigError(f"t_min must have sigma > 0 with grid={name!r}, got t_min={t_min:g}: give a larger one")
    return high, low


def _levels_of_times(process: Process, t: Array) -> list[Level]:
    return [Level(*row) for row in np.stack([t, process.alpha(t), process.sigma(t)], 1).tolist()]


def _levels_of_sigma_hat(process: Process, sigma_hat: Array) -> list[Level]:
    # σ̂ = 0 is the data itself, which a process with σ(0) > 0 never reaches: there t = 0 stands for it
    t = np.where(sigma_hat > 0, process.time(np.where(sigma_hat > 0, sigma_hat, 1.0)), 0.0)
    first = process.first_time
    inside = (t >= first - 1e-9) & (t <= process.T * 1.000001)
    outside = np.flatnonzero((sigma_hat > 0) & ~inside)
    if len(outside):
        low, high = (float(process.sigma(v) / process.alpha(v)) for v in (first, float(process.T)))
        raise ConfigError(
            f"sigma/alpha = {sigma_hat[outside[0]]:g} is not among the process's levels, {low:g} to {high:g}: stay inside"
        )
    t = np.clip(t, first if sigma_hat.min() > 0 else 0.0, process.T)
    alpha = np.where(sigma_hat > 0, process.alpha(t), 1.0)
    return [Level(*row) for row in np.stack([t, alpha, sigma_hat * alpha], 1).tolist()]


def _steps(process: Process, levels: list[Level]) -> tuple[Step, ...]:
    t, alpha, sigma = (np.array(column) for column in zip(*levels))
    if not (alpha.min() > 1e-150 and np.isfinite(sigma).all()):
        raise ConfigError(
            f"alpha({t[int(alpha.argmin())]:g}) is 0 to float64 in this process: its rate is too large, lower it"
        )
    ratio = alpha[:-1] / alpha[1:]
    # the difference of two squares, by its factors: neighbouring levels are close
    var = (sigma[:-1] - ratio * sigma[1:]) * (sigma[:-1] + ratio * sigma[1:])
    bad = np.flatnonzero(var <= 0)
    if len(bad):
        raise ConfigError(
            f"the noise must fall along the grid, and does not at t = {t[bad[0]]:g} (sigma {sigma[bad[0]]:g})"
        )
    posterior = var * (sigma[1:] / sigma[:-1]) ** 2
    columns = (np.diff(t), ratio, var, posterior, process.drift(t[:-1]), process.diffusion(t[:-1]))
    numbers = np.stack(np.broadcast_arrays(*columns), 1).tolist()
    return tuple(Step(levels[k], levels[k + 1], *row) for k, row in enumerate(numbers))


def _reference_steps(process: Process, n: int, t_min: float) -> tuple[Step, ...]:
    """score_sde's discretisation (its sde_lib.py): N times from T to t_min, each stepped with T/N and the process's own
    `reference_transitions`."""
    if n < 2:
        raise ConfigError(f"steps must be >= 2 with grid='score_sde', got {n}")
    t = np.linspace(process.T, t_min, n)
    levels = _levels_of_times(process, t)
    if levels[-1].sigma <= 0:  # where the last step calls the network
        raise ConfigError(f"t_min must have sigma > 0 with grid='score_sde', got t_min={t_min:g}: give a larger one")
    transitions = process.reference_transitions(t)
    columns = (np.full(n, -process.T / n), *transitions, process.drift(t), process.diffusion(t))
    following = [*levels[1:], levels[-1]]
    return tuple(Step(levels[k], following[k], *row) for k, row in enumerate(np.stack(columns, 1).tolist()))
