"""Methods with steps of their own: no guided prediction within a sampler's rows, but a loop over a table's levels."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..execution import monitor, ops
from ..execution.loop import raise_if_bad
from ..execution.modes import evaluating
from ..execution.noise import PRIOR, SAMPLER
from ..guidance.base import Moment, Setting, taken_apart
from ..table import Row, StepTable


class OwnSteps:
    """Base of such methods. Their table is one of predictions of x0 at process times, by `sampler` on `grid`, or on a chain's
    own steps, unless the caller names others."""

    sampler: ClassVar[str] = "ancestral"
    grid: ClassVar[str] = "logsnr"
    steps: ClassVar[int] = 100

    @abstractmethod
    def run(self, steps: Steps) -> Drawn:
        """The samples."""


class Drawn(NamedTuple):
    """The samples [count, *], the calls of the network, and SMC's effective numbers of particles [rows, problems]."""

    x: Tensor
    calls: int
    effective: Tensor | None = None


@dataclass
class Steps:
    """What such a method runs on: the setting, its table and operations, the most states in one call of the network, and where
    states that are not finite are refused (`check` of fastdiff.sample)."""

    setting: Setting
    table: StepTable
    operations: Any
    batch: int
    progress: bool | None
    check: str = "final"
    first_bad: Tensor = field(init=False)  # the row after which a sample was not finite, [count]

    def __post_init__(self) -> None:
        self.first_bad = torch.full((self.setting.count,), len(self.table), device=self.setting.device)

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The rows by number, in evaluation mode, beneath a progress bar; NonFiniteError at their end by what was noticed."""
        model = self.setting.model
        with (
            evaluating(model.net),
            monitor.bar(self.progress, len(self.table), "sample", "row") as bar,
        ):
            for k, row in enumerate(self.table.rows):
                yield k, row
                bar.update()
        raise_if_bad(self.table, self.first_bad, self.setting.first_sample)

    def notice(self, k: int, x: Tensor) -> None:
        """Whether the states [count, *] after row k are finite."""
        if self.check == "off":
            return
        finite = x.isfinite().flatten(1).all(1)
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=k))
        if self.check == "every":
            raise_if_bad(self.table, self.first_bad, self.setting.first_sample)

    def ladder(self) -> list[tuple[float, float]]:
        """(α, σ̂) where each row starts and where the last one ends: (1, 0), the data, where that draws no noise."""
        last = self.table.rows[-1]
        end = (self.table.end.alpha, self.table.end.sigma_hat) if last.c != 0 else (1.0, 0.0)
        return [*((row.level.alpha, row.level.sigma_hat) for row in self.table.rows), end]

    def start(self, many: int, first: int) -> Tensor:
        """The prior's draws [many, *] of the samples from number `first` on."""
        if math.isnan(self.table.prior_std):
            raise ConfigError(
                f"grid starts at t = {self.table.rows[0].level.t:g}, where the data still show, and this method takes no x_init: "
                "start at T"
            )
        return self.normal(many, first, 0, PRIOR) * self.table.prior_std

    def normal(self, many: int, first: int, draw: int, stream: int = SAMPLER) -> Tensor:
        """Standard normals [many, *] of one draw."""
        s = self.setting
        z = torch.empty((many, *s.model.data_shape), dtype=s.dtype, device=s.device)
        self.operations.normal(z, ops.cursor(draw, first, s.seed, s.device), stream)
        return z

    def ask(
        self, x: Tensor, time: float, parts: dict[str, Tensor], asked: Callable[[Moment, dict[str, Tensor]], tuple[Tensor, ...]],
        differentiates: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """What `asked` makes of the network's calls at x [many, *], in pieces of `batch`."""
        made = []
        for low in range(0, len(x), self.batch):
            cond, (own,) = taken_apart({name: value[low : low + self.batch] for name, value in parts.items()}, 1)
            with torch.inference_mode(False), torch.enable_grad():
                state = x[low : low + self.batch].detach().clone().requires_grad_(differentiates)
                t = torch.full((len(state),), time, dtype=x.dtype, device=x.device)
                values = asked(Moment(self.setting.model, state, t, cond, differentiates), own)
            made.append(tuple(value.detach() for value in values))
        return tuple(torch.cat(values) for values in zip(*made))

    def prediction(self, x: Tensor, time: float, parts: dict[str, Tensor]) -> Tensor:
        """x̂0 at x [many, *]."""
        return self.ask(x, time, parts, lambda moment, own: (moment.x0,), False)[0]
