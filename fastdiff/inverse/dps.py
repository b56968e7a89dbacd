"""Diffusion posterior sampling: the gradient of the misfit, taken off the state after a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, short
from ..guidance.base import Guidance, Moment, Setting
from ..table import StepTable
from .problem import Measurement, Problem
from .state import Arrival, StateBound


@dataclass(frozen=True, eq=False)
class DPS(Guidance):
    """Diffusion posterior sampling (Chung et al. 2023, Alg. 1): after a row from x_t to x

        x ← x − scale ∇_{x_t} ‖y − A x̂0(x_t)‖

    with the norm of each sample alone (its authors' code takes one over the batch, and so couples its samples). Any operator that
    autograd sees through, linear or not. One product with the network's Jacobian a row.

    scale   ζ', which the paper tunes for each task, 0.3 to 1 for pictures in [−1, 1] and 1000 steps. The noise of y is not in
            it: y is fitted as closely as the scale has it
    """

    problem: Problem
    scale: float = 1.0

    def bind(self, setting: Setting) -> StateBound:
        measured, scale = Measurement(self.problem, setting), checks.number("scale", self.scale)
        if self.problem.noise != "gaussian":
            raise ConfigError(
                f"inverse.DPS measures the misfit by its norm, got noise={short(self.problem.noise)}: use "
                "guidance.LogLikelihood or inverse.SMC"
            )
        return Misfit(measured.needs_gradient("inverse.DPS"), scale)


class Misfit(StateBound):
    """The gradient of the last call, held until its row has ended."""

    guides, differentiates = True, True

    def __init__(self, measured: Measurement, scale: float) -> None:
        super().__init__()
        self.measured, self.scale = measured, scale
        self.parts = {"y": measured.each}
        self.held: Tensor | None = None

    def retabled(self, table: StepTable) -> StepTable:
        for k, row in enumerate(table.rows):
            if row.e != 0:
                raise ConfigError(
                    f"inverse.DPS changes the state that a row leaves, and row {k} ({row.label}) goes back to one before: use a "
                    "sampler without, such as ancestral, ddim or dpmpp_2m"
                )
        return table

    def __call__(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        misfit = parts["y"] - self.measured.of(moment.x0)
        norms = torch.linalg.vector_norm(misfit.flatten(1), dim=1)  # whose gradient at 0 is 0
        self.held = moment.gradient(norms.sum())
        return moment.x0

    def after(self, arrival: Arrival, x: Tensor) -> None:
        if self.held is not None:  # else the row has called no network
            x.sub_(self.held.to(x.dtype), alpha=self.scale)
            self.held = None
