"""Time grids. A grid becomes `Step`s: consecutive levels with the transition kernel between them.

A grid is a name, a strictly decreasing list of process times, `sigmas([...])`, a list of noise ratios σ̂ = σ/α, or
`indices([...])`, the steps of a chain as other libraries count them, from 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import checks
from ..errors import ConfigError, choose, warn
from ..table import Level
from .processes import Process
from .schedules import check_sigmas

Array = NDArray[np.float64]

_SMALLEST = 1e-9  # α from which formulas that divide by it keep half of float64's digits


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
class Indices:
    """A grid of a chain's steps by their index, in the order of a run (see `indices`)."""

    steps: tuple[int, ...]
    end: int | None = None


def indices(timesteps: Sequence[int] | Array, end: int | None = None) -> Indices:
    """A grid given by the timesteps at which a chain's network is called, from 0 as other libraries count them, such as
    diffusers' `scheduler.timesteps`, [980, 960, …, 0].

    The last step leads from the last of them to `end`: None the data (where NCSN's lowest level is), 0 the first step
    (diffusers' set_alpha_to_one=False and final_sigmas_type="sigma_min").
    """
    numbers = np.array(checks.sequence("timesteps", timesteps))
    if not len(numbers):
        raise ConfigError("timesteps must hold at least one step, got none")
    broken = np.flatnonzero(numbers != np.round(numbers))
    if len(broken):
        raise ConfigError(
            f"timesteps must be whole, got {numbers[broken[0]]:g} at index {broken[0]}: give the noise levels between them, "
            "grids.sigmas(scheduler.sigmas)"
        )
    change = np.diff(numbers)
    if not ((change < 0).all() or (change > 0).all()):
        k = int(np.flatnonzero(change * np.sign(change[0] or -1) <= 0)[0]) + 1
        raise ConfigError(
            f"timesteps must all be different and in order, got {numbers[k]:g} after {numbers[k - 1]:g} at index {k}: give "
            "each step once (a solver of stages makes its own)"
        )
    return Indices(
        tuple(int(v) for v in numbers), None if end is None else checks.integer("end", end, 0, int(numbers.max()))
    )


def timesteps(spacing: str, T: int, steps: int | None = None, *, offset: int = 0, one_more: bool = False) -> Indices:
    """diffusers' `timesteps` of T training steps and `steps` inference steps, or OpenAI's respaced ones, as a grid.

    spacing    diffusers' timestep_spacing "leading", "trailing" or "linspace"; or OpenAI's timestep_respacing, "ddim50" (50
               with a whole stride) or "10,15,20" (so many of each third of the chain, the lowest first)
    offset     diffusers' steps_offset, added to "leading"
    one_more   spaced over one more step, and without the lowest, as diffusers' DPM-Solver, DEIS, UniPC and SA-Solver are
    """
    T = checks.integer("T", T, 1, 10**7)
    if is_respacing(spacing):
        found = _respaced(spacing, T)
        if steps not in (None, len(found)):
            raise ConfigError(f"steps={steps} contradicts {spacing!r}, which has {len(found)} steps: leave steps out")
        return indices(found)
    choose("spacing", spacing, SPACINGS)
    count = checks.integer("steps", steps, 1, T - one_more)
    if spacing == "trailing":
        return indices(np.round(np.arange(T, 0, -T / count))[:count] - 1)
    if spacing == "linspace":
        spaced = np.round(np.linspace(0, T - 1, count + one_more))
    else:
        offset = checks.integer("offset", offset, 0, T - 1)
        spaced = np.arange(count + one_more, dtype=np.float64) * (T // (count + one_more)) + offset
    return indices(spaced[::-1][:count])


SPACINGS = ("leading", "trailing", "linspace")


def is_respacing(spec: object) -> bool:
    """Whether a grid is one of OpenAI's strings."""
    return isinstance(spec, str) and re.fullmatch(r"ddim\d{1,8}|\d{1,8}(,\s*\d{1,8})*", spec.strip()) is not None


def _respaced(spec: str, T: int) -> list[int]:
    """The steps, from the noise down, of T: improved-diffusion's rule (Nichol & Dhariwal 2021, §4)."""
    if spec.strip().startswith("ddim"):
        wanted = int(spec.strip()[4:])
        stride = next((i for i in range(1, T + 1) if -(-T // i) == wanted), None)
        if stride is None:
            near = min({-(-T // i) for i in range(1, T + 1)}, key=lambda n: abs(n - wanted))
            raise ConfigError(f"{spec!r} has no whole stride in {T} steps: use 'ddim{near}' or '{wanted}'")
        return list(range(0, T, stride))[::-1]
    counts = [int(part) for part in spec.split(",")]
    if min(counts) < 1:
        raise ConfigError(f"each part of {spec!r} must have at least 1 step")
    found, first = list[int](), 0
    for k, count in enumerate(counts):
        size = T // len(counts) + (k < T % len(counts))
        if count > size:
            raise ConfigError(f"{spec!r} asks for {count} of a part of {size} steps, of {T} in {len(counts)} parts")
        apart, position = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            found.append(first + round(position))
            position += apart
        first += size
    return found[::-1]


def times_of(grid: Indices, process: Process) -> tuple[float, ...]:
    """The process times of a chain's steps, and of the end."""
    if not process.discrete:
        raise ConfigError(f"the grid counts a chain's steps, and {process.name!r} is continuous: use ddpm or ncsn")
    steps = np.arange(1, int(process.T) + 1)
    of_index = dict(zip(np.asarray(process.index(steps)).tolist(), steps.tolist()))
    asked = grid.steps if grid.end is None else (*grid.steps, grid.end)
    unknown = [index for index in asked if index not in of_index]
    if unknown:
        raise ConfigError(f"timesteps must be steps of the chain, 0 to {len(steps) - 1}, got {unknown[0]}")
    times = [float(of_index[index]) for index in asked]
    if grid.end is None and times[-1] > process.t_min:
        times.append(float(process.t_min))
    if len(times) < 2 or min(-np.diff(times)) <= 0:
        raise ConfigError(f"timesteps must lead from the noise down to the data, got {list(grid.steps)!r:.60}")
    return tuple(times)


def warn_of_timesteps(process: Process, times: Sequence[float]) -> None:
    """Warn where a list of times on a DDPM chain may be timesteps, which count from 0 and so are one off: it starts at the
    last of those, or holds whole numbers below T which end before the data or are evenly spaced."""
    if not process.discrete or process.ladder or times[0] >= process.T:
        return
    whole = all(t == int(t) for t in times)
    even = len(times) > 3 and np.ptp(np.diff(times)) <= 1
    if times[0] == process.T - 1 or (whole and (times[-1] > 0 or even)):
        warn(
            f"grid starts at {times[0]:g}, below T = {process.T:g}, as timesteps do that count from 0, and is taken as process "
            "times, which count from 1: for timesteps give fastdiff.grids.indices(timesteps)"
        )


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
    return np.linspace(process.t_start, t_min, n + 1)


def _quadratic(process: Process, n: int, t_min: float) -> Array:
    return np.linspace(math.sqrt(process.t_start), math.sqrt(t_min), n + 1) ** 2


def _logsnr(process: Process, n: int, t_min: float) -> Array:
    high, low = _ends(process, t_min, "logsnr")
    over = process.discrete and t_min == 0  # a chain's last step leads from its first level to the data
    times: Array = process.time(np.exp(np.linspace(math.log(high), math.log(low), n + 1 - over)))
    if over:
        times = np.append(times, 0.0)
    times[0], times[-1] = process.t_start, t_min
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
GRIDS = (*TIMES, "fourth_root", "karras", "score_sde", *SPACINGS)


def karras(sigma_max: float, sigma_min: float, n: int, rho: float = 7.0) -> Array:
    """σ_i = (σ_max^{1/ρ} + i/(n − 1)(σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, then 0 (Karras et al. 2022, eq. 5): n + 1 numbers."""
    sigma_min, sigma_max = check_sigmas(sigma_max, sigma_min)
    n, rho = checks.integer("n", n, 1, 10**7), checks.number("rho", rho, 0, above=True)
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n) ** rho if n > 1 else np.array([sigma_max])
    return np.append(ramp, 0.0)


def polyexponential(sigma_max: float, sigma_min: float, n: int, rho: float = 1.0) -> Array:
    """log σ_i = log σ_min + (1 − i/(n − 1))^ρ log(σ_max/σ_min), then 0: n + 1 numbers for `sigmas` (k-diffusion's
    get_sigmas_polyexponential; ρ = 1 its get_sigmas_exponential)."""
    high, low = (checks.number(f"sigma_{end}", v, 0, above=True) for end, v in (("max", sigma_max), ("min", sigma_min)))
    ramp = np.linspace(1, 0, checks.integer("n", n, 1, 10**7)) ** checks.number("rho", rho, 0, above=True)
    return np.append(np.exp(ramp * math.log(high / low) + math.log(low)), 0.0)


def fourth_root(sigma_max: float, sigma_min: float, n: int, sigma_data: float = 0.5) -> Array:
    """n + 1 noise ratios, even in (log(1 + (σ̂/σ_data)²))^{1/4} from `sigma_max` to `sigma_min`.

    log(1 + (σ̂/σ_data)²) is ∫β of the VP process whose noise ratio is σ̂/σ_data, about ½ t² (β_max − β_min) of linear β: these
    are the levels even in √t there, for every process, whatever its clock. docs/samplers.md compares them with other grids.
    """
    high, low = (math.log1p((sigma_hat / sigma_data) ** 2) ** 0.25 for sigma_hat in (sigma_max, sigma_min))
    levels: Array = sigma_data * np.sqrt(np.expm1(np.linspace(high, low, n + 1) ** 4))
    levels[0], levels[-1] = sigma_max, sigma_min
    return levels


def build(
    spec: object,
    process: Process,
    n: int | None,
    t_min: float | None,
    in_time: bool = False,
    to_data: bool = True,
    one_more: bool = False,
) -> Grid:
    """The grid of `n` steps that ends at `t_min` (None: the process's); an explicit `spec` has both, and takes neither.

    in_time   of "fourth_root": whether it is a grid of times
    to_data   of "fourth_root": whether its last level is the data instead of t_min
    one_more  of "leading" and "linspace": see `timesteps`
    """
    if isinstance(spec, str):
        choose("grid", spec, GRIDS)
        if n is None:
            raise ConfigError(f"steps= is needed with grid={spec!r}")
        end = process.t_min if t_min is None else t_min
        if not 0 <= end < process.t_start:
            raise ConfigError(f"t_min must satisfy 0 <= t_min < T = {process.t_start:g}, got {end:g}")
        if end < process.first_time:
            raise ConfigError(
                f"t_min must be >= {process.first_time:g}, the smallest level of {process.name!r}, got {end:g}"
            )
        if spec in SPACINGS:
            return build(_spaced(spec, process, n, end, one_more), process, None, None)
        if spec == "score_sde":
            return Grid(_reference_steps(process, n, end), reference=True)
        if spec == "fourth_root":
            high, low = _ends(process, end, spec)
            levels = fourth_root(high, low, n, process.sigma_data)
            if to_data and not in_time:
                return Grid(_steps(process, _levels_of_sigma_hat(process, np.append(levels[:-1], 0.0))), True)
            times = process.time(levels)
            times[0], times[-1] = process.t_start, end
            return Grid(_steps(process, _levels_of_times(process, times)), not in_time)
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


def _spaced(spec: str, process: Process, n: int, t_min: float, one_more: bool) -> tuple[float, ...]:
    if not process.discrete or process.ladder:
        raise ConfigError(f"grid={spec!r} needs a DDPM chain, and the process is {process.name!r}: use grid='uniform'")
    times = times_of(timesteps(spec, int(process.T), n, one_more=one_more), process)[:n]
    if t_min >= times[-1]:
        raise ConfigError(
            f"t_min must be below {times[-1]:g}, where the last step of grid={spec!r} starts, got {t_min:g}: give 0"
        )
    return (*times, t_min)


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
    """σ̂ at the start and at t_min, on a chain at its first step if that is the data."""
    t = np.array([process.t_start, process.t_noisy if process.discrete and t_min == 0 else t_min])
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
        low, high = (float(process.sigma_hat(v)) for v in (first, float(process.T)))
        raise ConfigError(
            f"sigma/alpha = {sigma_hat[outside[0]]:g} is not among the process's levels, {low:g} to {high:g}: stay inside"
        )
    t = np.clip(t, first if sigma_hat.min() > 0 else 0.0, process.T)
    alpha = np.where(sigma_hat > 0, process.alpha(t), 1.0)
    return [Level(*row) for row in np.stack([t, alpha, sigma_hat * alpha], 1).tolist()]


def _steps(process: Process, levels: list[Level]) -> tuple[Step, ...]:
    t, alpha, sigma = (np.array(column) for column in zip(*levels))
    if not (alpha.min() > _SMALLEST and np.isfinite(sigma).all()):
        k = int(np.where(np.isfinite(sigma), alpha, -1).argmin())
        raise ConfigError(
            f"alpha({t[k]:g}) = {alpha[k]:.3g} and sigma = {sigma[k]:.3g} leave nothing of the data in x_t, so that no step can "
            f"begin there: start at t <= {process.t_start:g}"
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
    t = np.linspace(process.t_start, t_min, n)
    levels = _levels_of_times(process, t)
    if levels[-1].sigma <= 0:  # where the last step calls the network
        raise ConfigError(f"t_min must have sigma > 0 with grid='score_sde', got t_min={t_min:g}: give a larger one")
    transitions = process.reference_transitions(t)
    columns = (np.full(n, -process.T / n), *transitions, process.drift(t), process.diffusion(t))
    following = [*levels[1:], levels[-1]]
    return tuple(Step(levels[k], following[k], *row) for k, row in enumerate(np.stack(columns, 1).tolist()))
