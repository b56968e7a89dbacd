"""Langevin dynamics x ← x + δ score + √(2δ) z: down a ladder of levels (annealed), or at one of them (ULA)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ... import checks
from ...errors import ConfigError
from ...table import Level
from .. import schedules
from ..grids import Grid
from ..processes import Process
from .base import Sampler, SolverRow, SolverRows, score


def langevin_row(level: Level, label: str, delta: float) -> SolverRow:
    """x ← x + δ score + √(2δ) z."""
    b, c = (delta,), math.sqrt(2 * delta)
    return SolverRow(level, label, 1.0, b, score(level), c=c, keeps_prediction=False, clips=False)


def hmc_rows(level: Level, label: str, delta: float, leapfrog: int) -> list[SolverRow]:
    """Hamiltonian dynamics of a momentum z from x_0, in `leapfrog` steps of ε = √(2δ) (Neal 2011, eq. 5.18 to 5.20), unadjusted:

        x_n = x_0 + n ε z + ε² (n/2 score_0 + Σ_{0<j<n} (n − j) score_j)

    The first row draws z; from the next on it is what x_n has of it: x_{n+1} = (n+1)/n x_n − x_0/n + ε²/n Σ_{0<j≤n} j score_j.
    One step is a Langevin row.
    """
    first = replace(langevin_row(level, label, delta), saves_base=leapfrog > 1)
    rows = [first]
    for n in range(1, leapfrog):
        b = tuple(2 * delta * j / n for j in range(n, 0, -1))
        kept = n + 1 < leapfrog
        row = SolverRow(level, label, (n + 1) / n, b, score(level), e=-1 / n, keeps_prediction=kept, clips=False)
        rows.append(row)
    return rows


@dataclass(frozen=True)
class _Langevin(Sampler):
    """`step_size` None: the class's own rule."""

    step_size: float | None = None
    any_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.step_size is not None:
            checks.number("step_size", self.step_size, 0, above=True)

    @property
    def in_time(self) -> bool:
        return True

    def default_t_min(self, process: Process) -> float:
        return process.t_noisy


@dataclass(frozen=True)
class AnnealedLangevin(_Langevin):
    """Annealed Langevin dynamics (Song & Ermon 2019, Alg. 1): `steps` = levels × steps per level.

    At σ_i the step is δ_i = η σ_i², i.e. ε σ_i²/σ_L² for ε = η σ_L². (The paper prints ½δ score + √δ z; its authors' code,
    and every step size they publish, means this form.)

    step_size        ε; None: the one of NCSNv2's technique 4
    steps_per_level  None: on a ladder (NCSN) what `steps` leaves for each of its levels, else 5

    `denoise` adds x + σ_L² score at the end, the expected α x_0 (Song & Ermon 2020, §3.3; Jolicoeur-Martineau et al. 2021).
    """

    steps_per_level: int | None = None
    name: ClassVar[str] = "annealed_langevin"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps_per_level is not None:
            checks.integer("steps_per_level", self.steps_per_level, 1, 10**7)

    def default_steps(self, process: Process, t_min: float) -> int:
        return self.steps_on(process, int(process.T) if process.ladder else 200)

    def steps_on(self, process: Process, points: int) -> int:
        """On a ladder with as many steps per level as come near 1000 in all, unless `steps_per_level` says."""
        each = self.steps_per_level or (max(1, round(1000 / points)) if process.ladder else 5)
        return points * each

    def intervals(self, process: Process, steps: int) -> int:
        if process.ladder and self.steps_per_level is None:
            _check_multiple(steps, int(process.T), "levels")
            return int(process.T) - 1
        each = self.steps_per_level or 5
        _check_multiple(steps, each, "steps per level", least=2)
        if steps // each < 2:
            raise ConfigError(f"steps must leave at least two levels of {each} steps each, got {steps}: use {2 * each}")
        return steps // each - 1

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[SolverRows, Level]:
        levels = grid.levels
        _check_multiple(steps, len(levels), "levels")
        each = steps // len(levels)
        if self.steps_per_level not in (None, each):
            raise ConfigError(
                f"steps must be {self.steps_per_level * len(levels)}, {len(levels)} levels of "
                f"{self.steps_per_level} steps, got {steps}"
            )
        lowest = levels[-1]
        if lowest.sigma <= 0:
            raise ConfigError("annealed_langevin calls the network at its last level, where sigma = 0: use t_min > 0")
        eta = (self.step_size or 0.0) / lowest.sigma**2
        if self.step_size is None:
            gamma = (levels[0].sigma / lowest.sigma) ** (1 / (len(levels) - 1))
            eta = schedules.langevin_step(1.0, gamma, each)
        rows = [[langevin_row(level, "langevin", eta * level.sigma**2)] * each for level in levels]
        if denoise:
            rows.append([SolverRow(lowest, "denoise", 1.0, (lowest.sigma**2,), score(lowest))])
        return rows, lowest


def _check_multiple(steps: int, count: int, what: str, least: int = 1) -> None:
    nearest = max(least, round(steps / count)) * count
    if steps % count:
        raise ConfigError(
            f"steps must be a multiple of the {count} {what} of annealed Langevin, got {steps}: use {nearest}"
        )


@dataclass(frozen=True)
class ULA(_Langevin):
    """The unadjusted Langevin algorithm at the grid's end, `t_min`: `steps` rows of one δ (Roberts & Tweedie 1996).

    `step_size` δ; None: 2 (0.16 σ)², the default corrector's step.
    """

    name: ClassVar[str] = "ula"

    def default_grid(self, process: Process, steps: int, t_min: float) -> str:
        return "uniform"

    def steps_on(self, process: Process, points: int) -> int:
        return 1000

    def default_steps(self, process: Process, t_min: float) -> int:
        return 1000

    def intervals(self, process: Process, steps: int) -> int:
        return 1

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[SolverRows, Level]:
        level = grid.steps[-1].next
        if level.sigma <= 0:
            raise ConfigError("ula calls the network at t_min, where sigma = 0: use t_min > 0")
        delta = self.step_size if self.step_size is not None else 2 * (0.16 * level.sigma) ** 2
        return [[langevin_row(level, "ula", delta)]] * steps, level
