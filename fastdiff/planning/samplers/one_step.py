"""Samplers of one network call a step, on the reverse SDE and its probability-flow ODE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import checks
from ...errors import ConfigError, choose
from .. import solvers
from ..grids import Grid
from ..processes import Process
from ..solvers.draft import Drafts
from .base import Sampler


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Ancestral sampling (Ho et al. 2020, Alg. 2; Song et al. 2021, eq. 47). `variance`: "posterior" β̃ (default),
    "beta", or "learned_range" between them, for a network with twice the channels; None: what the model has."""

    variance: str | None = None
    name: ClassVar[str] = "ancestral"
    reference_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variance is not None:
            choose("variance", self.variance, ("posterior", "beta", "learned_range"))

    def predict(self, process: Process, grid: Grid) -> Drafts:
        if grid.reference and process.name == "subvp":
            raise ConfigError("grid='score_sde' has no ancestral sampler for subvp: use another grid, which has")
        return solvers.ancestral(grid.steps, self.variance or "posterior")


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM (Song, Meng & Ermon 2021); `eta` from 0 (deterministic) to 1 (ancestral)."""

    eta: float = 0.0
    name: ClassVar[str] = "ddim"

    def __post_init__(self) -> None:
        checks.number("eta", self.eta, 0, 1)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        return solvers.ddim(grid.steps, self.eta)


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Euler–Maruyama on the family between the reverse SDE (`lam` = 1) and the probability-flow ODE (`lam` = 0)."""

    lam: float = 1.0
    name: ClassVar[str] = "euler_maruyama"
    reference_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.number("lam", self.lam, 0, 1)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        if grid.in_sigma:
            raise ConfigError(
                "euler_maruyama steps in process time, not in sigma: use a grid of times, or ancestral or ode"
            )
        return solvers.euler_maruyama(grid.steps, self.lam)


@dataclass(frozen=True)
class ReverseDiffusion(Sampler):
    """Reverse diffusion (Song et al. 2021, eq. 46); `lam` as in EulerMaruyama."""

    lam: float = 1.0
    name: ClassVar[str] = "reverse_diffusion"
    reference_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.number("lam", self.lam, 0, 1)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        return solvers.reverse_diffusion(grid.steps, self.lam)


@dataclass(frozen=True)
class ODE(Sampler):
    """Euler's method on the probability-flow ODE, in the grid's own variable."""

    name: ClassVar[str] = "ode"
    reference_grid: ClassVar[bool] = True

    def predict(self, process: Process, grid: Grid) -> Drafts:
        return solvers.euler_ode(grid)
