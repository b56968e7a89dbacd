"""Samplers that stand on levels: annealed Langevin dynamics, and the unadjusted Langevin algorithm at one of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import checks
from ...errors import ConfigError
from ...table import Level
from .. import schedules, solvers
from ..grids import Grid
from ..processes import Process
from ..solvers.draft import Drafts
from .base import Sampler


@dataclass(frozen=True)
class AnnealedLangevin(Sampler):
    """Annealed Langevin dynamics (Song & Ermon 2019, Alg. 1): `steps` = levels × steps per level.

    A step at σ_i is step_size·σ_i²/σ_L². `step_size` None: the one of NCSNv2's technique 4. `steps_per_level` None: on a
    ladder (NCSN) what `steps` leaves for each of its levels, else 5. `denoise` adds x + σ_L² score at the end.
    """

    step_size: float | None = None
    steps_per_level: int | None = None
    name: ClassVar[str] = "annealed_langevin"
    any_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.step_size is not None:
            checks.number("step_size", self.step_size, 0, above=True)
        if self.steps_per_level is not None:
            checks.integer("steps_per_level", self.steps_per_level, 1, 10**7)

    def default_t_min(self, process: Process) -> float:
        return process.t_noisy

    def default_steps(self, process: Process, t_min: float) -> int:
        points = int(process.T) if process.name == "ncsn" else 200
        return points * self._each(process, points)

    def steps_on(self, process: Process, points: int) -> int:
        return points * self._each(process, points)

    def _each(self, process: Process, points: int) -> int:
        """Steps per level where only the levels are known: on a ladder what comes near 1000 steps in all."""
        return self.steps_per_level or (max(1, round(1000 / points)) if process.name == "ncsn" else 5)

    def intervals(self, process: Process, steps: int) -> int:
        return self._levels(process, steps) - 1

    def _levels(self, process: Process, steps: int) -> int:
        """How many levels `steps` has; they must divide it."""
        if process.name == "ncsn" and self.steps_per_level is None:
            return int(process.T) if self._divides("levels", int(process.T), steps) else 0
        each = self.steps_per_level or 5
        self._divides("steps per level", each, steps)
        if steps // each < 2:
            raise ConfigError(f"steps must leave at least two levels of {each} steps each, got {steps}: use {2 * each}")
        return steps // each

    @staticmethod
    def _divides(what: str, count: int, steps: int) -> bool:
        nearest = max(1, round(steps / count)) * count
        if steps != nearest:
            raise ConfigError(
                f"steps must be a multiple of the {count} {what} of annealed Langevin, got {steps}: use {nearest}"
            )
        return True

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[Drafts, Level]:
        levels = grid.levels
        self._divides("levels", len(levels), steps)
        each = steps // len(levels)
        if self.steps_per_level not in (None, each):
            raise ConfigError(
                f"steps must be {self.steps_per_level * len(levels)}, {len(levels)} levels of "
                f"{self.steps_per_level} steps, got {steps}"
            )
        lowest = levels[-1]
        if lowest.sigma <= 0:
            raise ConfigError("annealed_langevin asks the network at its last level, where sigma = 0: use t_min > 0")
        eta = (self.step_size or 0.0) / lowest.sigma**2
        if self.step_size is None:
            gamma = (levels[0].sigma / lowest.sigma) ** (1 / (len(levels) - 1))
            eta = schedules.langevin_step(1.0, gamma, each)
        drafts = solvers.annealed_langevin(levels, each, eta)
        if denoise:
            drafts.append([solvers.denoising(lowest)])
        return drafts, lowest


@dataclass(frozen=True)
class ULA(Sampler):
    """The unadjusted Langevin algorithm at the grid's end, `t_min`: every row x + δ score + √(2δ) z with one δ.

    `step_size` None: 2 (0.16 σ)², the default corrector's step.
    """

    step_size: float | None = None
    name: ClassVar[str] = "ula"
    any_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.step_size is not None:
            checks.number("step_size", self.step_size, 0, above=True)

    def default_grid(self, process: Process, steps: int, t_min: float) -> str:
        return "uniform"

    def steps_on(self, process: Process, points: int) -> int:
        return 1000

    def default_t_min(self, process: Process) -> float:
        return process.t_noisy

    def default_steps(self, process: Process, t_min: float) -> int:
        return 1000

    def intervals(self, process: Process, steps: int) -> int:
        return 1

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[Drafts, Level]:
        level = grid.steps[-1].next
        if level.sigma <= 0:
            raise ConfigError("ula asks the network at t_min, where sigma = 0: use t_min > 0")
        delta = self.step_size if self.step_size is not None else 2 * (0.16 * level.sigma) ** 2
        return solvers.ula(level, delta, steps), level
