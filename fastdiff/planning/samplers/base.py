"""What every sampler is: options that check themselves, its defaults, and its rows on a grid.

A sampler writes rows on predictions of its own choice, each a combination h = r·x0 + w·ε; `fastdiff.planning.plan` turns
them into rows on the network's prediction. The letters of this package: a step leads from x at (α, σ) down to x' at (α', σ');
σ̂ = σ/α, λ = log(α/σ), h = λ' − λ > 0; z is standard normal noise. Where σ' = 0, λ' is infinite and a step of order 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ...errors import ConfigError
from ...table import Level, Measure
from ..grids import Grid
from ..processes import Process

# (r, w) of a prediction r·x0 + w·ε
Combination = tuple[float, float]
X0: Combination = (1.0, 0.0)
EPS: Combination = (0.0, 1.0)


def score(level: Level) -> Combination:
    """∇ log p = −ε/σ."""
    return 0.0, -1.0 / level.sigma if level.sigma > 0 else math.nan


def velocity(level: Level, drift: float, diffusion: float) -> Combination:
    """dx/dt = f x − ½ g² score = α̇ x0 + σ̇ ε, with α̇ = f α and σ̇ = f σ + g²/(2σ)."""
    return drift * level.alpha, drift * level.sigma + diffusion**2 / (2 * level.sigma)


@dataclass(frozen=True, slots=True)
class SolverRow:
    """x ← a·x + e·base + b_0·h_0 + b_1·h_1 + … + c·z as in fastdiff.table, with h_0 the combination `h0` (None: the row calls
    no network, and b starts at h_1)."""

    level: Level
    label: str
    a: float
    b: tuple[float, ...] = ()
    h0: Combination | None = None
    e: float = 0.0
    c: float = 0.0
    saves_base: bool = False
    keeps_prediction: bool = True  # a Langevin row does not: its prediction must not shift a multistep history
    clips: bool = True  # nor is its score clipped
    measure: Measure | None = None
    log_variance: tuple[float, float] | None = None
    raw: float = 0.0  # of ε as the network has it, where h0 is clipped


SolverRows = list[list[SolverRow]]  # one list for each step


class Sampler:
    """Base of all samplers. `default_grid` names the grid, `intervals` how many it has for `steps`, `rows` the rows."""

    name: ClassVar[str]
    reference_grid: ClassVar[bool] = False  # whether score_sde's own discretisation has this sampler
    any_steps: ClassVar[bool] = False  # whether `steps` is free on an explicit grid
    one_more: ClassVar[bool] = False  # how diffusers spaces this sampler's timesteps (fastdiff.grids.timesteps)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__.lower()

    @property
    def stores_state(self) -> bool:
        """Whether the x that a step leaves is the state, so that it can be clamped."""
        return True

    @property
    def in_time(self) -> bool:
        """Whether it steps in process time alone, or calls the network where the grid ends."""
        return False

    def default_grid(self, process: Process, steps: int, t_min: float) -> str:
        """The grid where the caller names none: the process's own, of a chain its own times where they suffice."""
        if process.discrete:
            return "trained" if t_min == int(t_min) and steps <= process.T - t_min else "uniform"
        return process.default_grid

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

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[SolverRows, Level]:
        """One list of rows for each step, and the level on which the run ends."""
        rows = self.predict(process, grid)
        if len(rows) != len(grid.steps) or not all(rows):
            raise ConfigError(
                f"{type(self).__name__}.predict must give a list of at least one row for each of {len(grid.steps)} steps, got "
                f"{len(rows)} lists of {sorted({len(step) for step in rows})} rows"
            )
        return finished(rows, grid, denoise)

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        """One list of rows for each step of the grid."""
        if type(self).rows is Sampler.rows:
            raise ConfigError(f"sampler {type(self).__name__} must define predict(process, grid), or rows")
        raise ConfigError(f"sampler {self.name!r} cannot serve as a predictor: use another, such as reverse_diffusion")


class FewSteps(Sampler):
    """Samplers made for few steps: on the grid "fourth_root" unless another is named, or on a chain's own times."""

    def default_grid(self, process: Process, steps: int, t_min: float) -> str:
        return super().default_grid(process, steps, t_min) if process.discrete else "fourth_root"


def finished(rows: SolverRows, grid: Grid, denoise: bool) -> tuple[SolverRows, Level]:
    """The rows, with `denoise` without the last one's noise if it calls the network, and the level on which they end."""
    last = rows[-1][-1]
    if denoise and last.h0 is not None:
        rows[-1][-1] = replace(last, c=0.0, log_variance=None)
    return rows, grid.steps[-1].next


def split_noise(here: Level, there: Level, eta: float) -> tuple[float, float]:
    """(c, σ_↓) of a step down to `there`: DDIM's noise c = η σ' √(1 − σ̂'²/σ̂²), and σ_↓² = σ'² − c²."""
    fall = there.sigma_hat * here.alpha / here.sigma
    c = eta * there.sigma * math.sqrt((1 - fall) * (1 + fall))
    return c, there.sigma * math.hypot(math.sqrt((1 - eta) * (1 + eta)), eta * fall)


def ddim_step(here: Level, there: Level) -> tuple[float, float]:
    """(A, B) of x' = A x + B ε, exact where ε is constant: A = α'/α, B = σ' − α' σ̂ = −σ' (e^h − 1)."""
    return there.alpha / here.alpha, there.sigma - there.alpha * here.sigma / here.alpha
