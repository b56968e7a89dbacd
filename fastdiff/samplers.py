"""What a user names: sampler objects. Each checks its options and turns a grid into rows by a solver."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from . import checks, schedules, solvers
from .errors import ConfigError, choose
from .grids import Grid, Step
from .processes import Process, require_linear
from .solvers.draft import Draft, Drafts
from .table import Level


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
        drafts = self.predict(process, grid)
        if denoise:
            drop_last_noise(drafts)
        return drafts, grid.steps[-1].next

    def predict(self, process: Process, grid: Grid) -> Drafts:
        """One list of rows for each step of the grid."""
        raise ConfigError(f"sampler {self.name!r} cannot serve as a predictor: use one of {', '.join(PREDICTORS)}")


def _last_noisy(process: Process) -> float:
    """The lowest time at which a network can be asked: a chain's first step where t_min is the data itself."""
    return process.t_min if process.t_min > 0 else 1.0


def drop_last_noise(drafts: Drafts) -> None:
    """Leave out the noise of the last row, if it is a stochastic one that calls the model."""
    last = drafts[-1][-1]
    if last.meaning is not None:
        drafts[-1][-1] = replace(last, c=0.0, log_variance=None)


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
        return _last_noisy(process)

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
        return _last_noisy(process)

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


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Predictor–corrector sampling (Song et al. 2021, Alg. 1), by default in the authors' order, corrector first.

    `predictor`: a name, "none", or any one-step sampler object. `corrector`: "ald" steps by δ = 2α (snr·σ)², a plain row
    that is the same for every sample; "langevin" by 2α (snr·‖z‖/‖score‖)², with `norm="batch"` means (the reference's;
    they couple the samples of a batch, so `batch_size < num_samples` is refused) or `norm="sample"`, each sample's own
    norms, at most twice ald's step. α = 1 (VE) or the step's α_t²/α_s².

    On N(0, 1) data, VE, 200 steps and the exact score, the variance of the samples is 1.01–1.02 with ald and 1.02–1.03
    with batch norms in 1 to 48 dimensions, but with sample norms 1.66, 1.34, 1.08, 1.02 in 1, 2, 8, 48 dimensions: a step
    that depends on x is no longer Langevin dynamics.
    """

    predictor: str | Sampler = "reverse_diffusion"
    corrector: str = "ald"
    snr: float = 0.16
    corrector_steps: int = 1
    norm: str = "batch"
    order: str = "corrector_first"
    name: ClassVar[str] = "pc"
    reference_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.predictor, Sampler):
            choose("predictor", self.predictor, (*PREDICTORS, "none"))
        choose("corrector", self.corrector, ("ald", "langevin", "none"))
        choose("norm", self.norm, ("batch", "sample"))
        choose("order", self.order, ("corrector_first", "predictor_first"))
        checks.number("snr", self.snr, 0, above=True)
        checks.integer("corrector_steps", self.corrector_steps, 0, 10**7)
        if self.predictor == "none" and (self.corrector == "none" or self.corrector_steps == 0):
            raise ConfigError("predictor and corrector must not both be 'none': nothing would run")

    @property
    def predicting(self) -> Sampler | None:
        """The predictor as an object; None: the corrector alone."""
        if isinstance(self.predictor, Sampler):
            return self.predictor
        return None if self.predictor == "none" else SAMPLERS[self.predictor]()

    def default_grid(self, process: Process, steps: int, t_min: float) -> str:
        inner = self.predicting
        return (
            super().default_grid(process, steps, t_min) if inner is None else inner.default_grid(process, steps, t_min)
        )

    def steps_on(self, process: Process, points: int) -> int:
        return points if self.predicting is None else points - 1

    def default_t_min(self, process: Process) -> float:
        asks_at_the_end = self.predicting is None or (self.order == "predictor_first" and self.corrector != "none")
        return _last_noisy(process) if asks_at_the_end else process.t_min

    def intervals(self, process: Process, steps: int) -> int:
        # the corrector alone stands on every level, the last one included
        return steps if self.predicting is not None else max(steps - 1, 1)

    def predict(self, process: Process, grid: Grid) -> Drafts:
        raise ConfigError("predictor must not itself be a predictor-corrector: raise corrector_steps instead")

    def rows(self, process: Process, grid: Grid, steps: int, denoise: bool) -> tuple[Drafts, Level]:
        inner = self.predicting
        if inner is None:
            visits: list[tuple[Level, Step]] = [(step.level, step) for step in grid.steps]
            if len(visits) < steps:
                visits.append((grid.steps[-1].next, grid.steps[-1]))
            return [self._corrections(level, step) for level, step in visits], visits[-1][0]
        predicted = inner.predict(process, grid)
        if denoise:
            drop_last_noise(predicted)
        first = self.order == "corrector_first"
        drafts = []
        for step, rows in zip(grid.steps, predicted):
            corrections = self._corrections(step.level if first else step.next, step)
            drafts.append([*corrections, *rows] if first else [*rows, *corrections])
        return drafts, grid.steps[-1].next

    def _corrections(self, level: Level, step: Step) -> list[Draft]:
        if self.corrector == "none":
            return []
        if level.sigma <= 0:
            raise ConfigError(
                "order='predictor_first' asks the network after the last step, where sigma = 0: "
                "use t_min > 0 or order='corrector_first'"
            )
        return solvers.corrector(self.corrector, level, step, self.snr, self.norm, self.corrector_steps)


PREDICTORS = ("ancestral", "ddim", "euler_maruyama", "reverse_diffusion", "ode", "heun")
SAMPLERS: dict[str, type[Sampler]] = {
    c.name: c
    for c in (
        Ancestral,
        DDIM,
        EulerMaruyama,
        ReverseDiffusion,
        ODE,
        Heun,
        AnnealedLangevin,
        ULA,
        PredictorCorrector,
    )
}
# each process's own sampler; any other's is Euler-Maruyama
DEFAULTS: dict[str, type[Sampler]] = {
    "ve": PredictorCorrector,
    "vp": EulerMaruyama,
    "subvp": EulerMaruyama,
    "ou": EulerMaruyama,
    "ddpm": Ancestral,
    "ncsn": AnnealedLangevin,
    "edm": Heun,
}


def get(sampler: object, process: Process) -> Sampler:
    """A sampler from its name, itself, or None: the process's own."""
    require_linear(process, "sampling", "integrate its reverse SDE on model.score(x, t)")
    if sampler is None:
        return DEFAULTS.get(process.name, EulerMaruyama)()
    if isinstance(sampler, Sampler):
        return sampler
    return SAMPLERS[choose("sampler", sampler, SAMPLERS)]()


def variance_of(sampler: object) -> str | None:
    """ "learned_range" if a sampler, or a predictor-corrector's predictor, asks the network for its variance."""
    if isinstance(sampler, PredictorCorrector):
        return variance_of(sampler.predicting)
    return "learned_range" if isinstance(sampler, Ancestral) and sampler.variance == "learned_range" else None


def with_variance(sampler: Sampler, variance: str) -> Sampler:
    """The sampler with a model's own variance, where it is ancestral and says none itself."""
    if isinstance(sampler, PredictorCorrector) and sampler.predicting is not None:
        return replace(sampler, predictor=with_variance(sampler.predicting, variance))
    return (
        replace(sampler, variance=variance) if isinstance(sampler, Ancestral) and sampler.variance is None else sampler
    )
