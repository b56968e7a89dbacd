"""What every sampler answers: its defaults, and its rows on a grid."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from ...errors import ConfigError
from ...table import Level
from ..grids import Grid
from ..processes import Process
from ..solvers.draft import Drafts


class Sampler:
    """Base of all samplers. `default_grid` names the grid, `intervals` how many it has for `steps`, `rows` the rows."""

    name: ClassVar[str]
    reference_grid: ClassVar[bool] = False  # whether score_sde's own discretisation has this sampler
    any_steps: ClassVar[bool] = False  # whether `steps` is free on an explicit grid

    def default_grid(self, process: Process, steps: int, t_min: float) -> str:
        """The grid where the caller names none: a chain's own times where they suffice."""
        return "trained" if process.discrete and t_min == int(t_min) and steps <= process.T - t_min else "uniform"

    def default_steps(self, process: Process, t_min: float) -> int:
        """`steps` where neither the caller nor a grid says: 1000, or all of a discrete process."""
        return int(process.T - t_min) if process.discrete else 1000

    def steps_on(self, process: Process, points: int) -> int:
        """How many steps an explicit grid of `points` means; with `any_steps` only if the caller does not say."""
        return points - 1

    def default_t_min(self, process: Process) -> float:
        """Where the run ends if the caller does not say: the process's own end."""
        return process.t_min

    def intervals(self, process: Process, steps: int) -> int:
        """Intervals of the grid; `steps` of them, unless levels and steps are different things."""
        return steps

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[Drafts, Level]:
        """One list of rows for each step, and the level on which the run ends."""
        return finished(self.predict(process, grid), grid, denoise)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        """One list of rows for each step of the grid."""
        raise ConfigError(f"sampler {self.name!r} cannot serve as a predictor: use another, such as reverse_diffusion")


class FewSteps(Sampler):
    """Samplers made for few steps: on the Karras grid unless another is named, or on a chain's own times."""

    def default_grid(self, process: Process, steps: int, t_min: float) -> str:
        return super().default_grid(process, steps, t_min) if process.discrete else "karras"


def finished(drafts: Drafts, grid: Grid, denoise: bool) -> tuple[Drafts, Level]:
    """The rows, with `denoise` without the last one's noise, and the level on which they end."""
    if denoise:
        drop_last_noise(drafts)
    return drafts, grid.steps[-1].next


def drop_last_noise(drafts: Drafts) -> None:
    """Leave out the noise of the last row, if it is a stochastic one that calls the model."""
    last = drafts[-1][-1]
    if last.meaning is not None:
        drafts[-1][-1] = replace(last, c=0.0, log_variance=None)
