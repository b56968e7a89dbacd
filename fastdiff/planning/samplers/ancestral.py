"""Samplers that draw x_s given x_t and the predicted x_0, with α_{t|s} = α_t/α_s and σ²_{t|s} = σ_t² − α²_{t|s} σ_s²."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ... import checks
from ...errors import ConfigError, choose
from ..grids import Grid
from ..processes import Process
from .base import EPS, X0, FewSteps, Sampler, SolverRow, SolverRows, score


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Ancestral sampling on any process (Ho et al. 2020, Alg. 2, where σ²_{t|s} = β; Song et al. 2021, eq. 47 for VE):

        x_s = (x_t + σ²_{t|s} score)/α_{t|s} + c z

    variance  c²: "posterior" β̃ = σ²_{t|s} σ_s²/σ_t², "beta" σ²_{t|s}, or by a network with twice the channels "learned", or
              "learned_range" between the two (Nichol & Dhariwal 2021, eq. 15), whose lower bound at σ_s = 0 is that of the
              step before; None: the model's own, else "posterior"
    """

    variance: str | None = None
    name: ClassVar[str] = "ancestral"
    reference_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variance is not None:
            choose("variance", self.variance, ("posterior", "beta", "learned", "learned_range"))

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        if all(math.isnan(step.posterior) and not math.isnan(step.var) for step in grid.steps):
            raise ConfigError(f"grid='score_sde' has no ancestral sampler for {process.name!r}: use another grid")
        if self.variance == "learned" and not (process.discrete and all(s.level.t - s.next.t == 1 for s in grid.steps)):
            raise ConfigError(
                "variance='learned' is that of a chain's own steps: take all of them, or train with variance='learned_range', "
                "or give the sampler variance='posterior'"
            )
        rows: SolverRows = []
        low = -math.inf
        for step in grid.steps:
            c, bounds = 0.0, None
            if self.variance == "learned":
                bounds = (-1.0, 1.0)  # between which share (v + 1)/2 is v itself
            elif self.variance == "learned_range":
                low = math.log(step.posterior) if step.posterior > 0 else low
                bounds = (low, math.log(step.var)) if low > -math.inf else None
            else:
                c = math.sqrt(step.var if self.variance == "beta" else step.posterior)
            a, b = (1 / step.ratio, step.var / step.ratio) if step.ratio > 0 else (math.nan, math.nan)
            rows.append([SolverRow(step.level, "ancestral", a, (b,), score(step.level), c=c, log_variance=bounds)])
        return rows


@dataclass(frozen=True)
class DDIM(FewSteps):
    """DDIM on any process (Song, Meng & Ermon 2021, eq. 12 and 16):

        x_s = α_s x̂_0 + √(σ_s² − c²) ε + c z,     c = η √(σ²_{t|s} σ_s²/σ_t²)

    `eta` from 0 (deterministic) to 1 (ancestral sampling with the posterior variance). With `clip`, ε is that of the clipped
    x̂_0 (OpenAI's code); with `clips_eps` False the network's own (diffusers' default, use_clipped_model_output=False).
    """

    eta: float = 0.0
    clips_eps: bool = True
    name: ClassVar[str] = "ddim"

    def __post_init__(self) -> None:
        checks.number("eta", self.eta, 0, 1)
        checks.flag("clips_eps", self.clips_eps)

    def predict(self, process: Process, grid: Grid) -> SolverRows:
        rows: SolverRows = []
        for step in grid.steps:
            c = self.eta * math.sqrt(step.posterior)
            a = step.next.alpha / step.level.alpha
            down = math.sqrt(max(step.next.sigma**2 - c * c, 0.0))
            row = SolverRow(step.level, "ddim", a, (down - a * step.level.sigma,), EPS, c=c)
            if not self.clips_eps:
                row = SolverRow(step.level, "ddim", 0.0, (step.next.alpha,), X0, c=c, raw=down)
            rows.append([row])
        return rows
