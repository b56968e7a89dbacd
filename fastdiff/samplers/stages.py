"""Samplers of several network calls a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .. import checks, solvers
from ..grids import Grid
from ..processes import Process
from ..solvers.draft import Drafts
from .base import Sampler


@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method with churn (Karras et al. 2022, Alg. 1–2), on the Karras grid unless another is named."""

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    name: ClassVar[str] = "heun"

    def __post_init__(self) -> None:
        for argument in ("s_churn", "s_min", "s_noise"):
            checks.number(argument, getattr(self, argument), 0)
        if self.s_max != math.inf:
            checks.number("s_max", self.s_max, 0)

    def default_grid(self, process: Process, steps: int, t_min: float) -> str:
        return super().default_grid(process, steps, t_min) if process.discrete else "karras"

    def predict(self, process: Process, grid: Grid) -> Drafts:
        return solvers.heun(process, grid, self.s_churn, self.s_min, self.s_max, self.s_noise)
