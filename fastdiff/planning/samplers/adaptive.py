"""Samplers that choose their steps by their error: the probability-flow ODE and the reverse SDE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ... import checks
from ...errors import ConfigError, choose
from ...table import Level, Tableau
from ..grids import Grid
from ..ode_variables import FORMS, VARIABLES, OdeVariables
from ..processes import Process
from ..tableaus import METHODS
from .base import Sampler, SolverRows

# float32 states resolve no less
_FLOOR = 2.0**-50


class StepChoosing(Sampler):
    """Samplers without a table: how many steps there are, and where, depends on the data."""

    def default_t_min(self, process: Process) -> float:
        return process.t_noisy

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[SolverRows, Level]:
        raise ConfigError(f"sampler {self.name!r} chooses its steps as it runs and has no table: call fastdiff.sample")


@dataclass(frozen=True)
class Adaptive(StepChoosing):
    """The probability-flow ODE by an embedded Runge–Kutta pair, each sample with steps of its own.

    method      "dopri5" (Dormand & Prince 1980), "tsit5" (Tsitouras 2011), "bosh3" (Bogacki & Shampine 1989)
    rtol, atol  of a step's error, root mean square over a sample's numbers, in units of y
    variable    what is stepped in: "t", "sigma", "logsnr", "asinh" (fastdiff.planning.ode_variables)
    form        what is integrated: "x", "eps", "x0", "v"; variable="t", form="x" is score_sde's
    couple      one step size for the whole batch, so that samples depend on each other; for comparisons
    max_nfe     evaluations that a sample may spend
    denoise     end in the mean of x0 there (Tweedie's formula), by one evaluation more: score_sde's `denoise`
    """

    name: ClassVar[str] = "rk45"
    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    variable: str = "asinh"
    form: str = "v"
    couple: bool = False
    max_nfe: int = 100_000
    denoise: bool = False

    def __post_init__(self) -> None:
        choose("method", self.method, METHODS)
        _tolerances(self.rtol, self.atol)
        choose("variable", self.variable, VARIABLES)
        choose("form", self.form, FORMS)
        checks.flag("couple", self.couple)
        checks.flag("denoise", self.denoise)
        checks.integer("max_nfe", self.max_nfe, 1, 2**62)

    @property
    def tableau(self) -> Tableau:
        return METHODS[self.method]

    def variables(self, process: Process) -> OdeVariables:
        return OdeVariables(process, self.variable, self.form)


@dataclass(frozen=True)
class AdaptiveSDE(StepChoosing):
    """The reverse SDE with steps chosen by their error (Jolicoeur-Martineau et al. 2021, Alg. 1); ends in the mean of x0.

    rtol, atol  of a step's error; theirs are 0.01 … 0.1 and, for images in [−1, 1] of 256 levels, 0.0078
    """

    name: ClassVar[str] = "adaptive_sde"
    rtol: float = 0.05
    atol: float = 0.0078
    max_nfe: int = 100_000

    def __post_init__(self) -> None:
        _tolerances(self.rtol, self.atol)
        checks.integer("max_nfe", self.max_nfe, 1, 2**62)


def _tolerances(rtol: float, atol: float) -> None:
    checks.number("rtol", rtol, _FLOOR)
    checks.number("atol", atol, _FLOOR)
