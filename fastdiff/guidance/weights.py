"""The weights of guidances that extrapolate from one prediction through another, x̂0 ← x̂0 + (w − 1)(m − m'):
their numbers, where they hold, and how a table's rows or a run's states get them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, DTypeError, ShapeError, short, warn
from ..execution import tensor_checks
from ..execution.calls import like
from ..execution.loop import Condition
from ..table import StepTable
from .base import Bound, Moment, Setting

Interval = tuple[float, float] | None  # of noise ratios, the first excluded
# of a noise ratio by way of a time in float32: a level that stands on an end of an interval is taken to be that end
ROUNDING = 1e-5


def check_scale(scale: Any) -> float | Tensor:
    """A finite number, or finite numbers [n]."""
    if not isinstance(scale, Tensor):
        return checks.number("scale", scale)
    tensor_checks.check_dense("scale", scale)
    if scale.is_complex() or scale.dtype == torch.bool:
        raise DTypeError(f"scale must be a number or a tensor of real numbers, got {scale.dtype}: use .float()")
    if scale.ndim != 1:
        raise ShapeError(f"scale must be a number, or one for each sample, [num_samples], got {tuple(scale.shape)}")
    tensor_checks.check_finite("scale", scale)
    return scale


def scales(scale: float | Tensor, setting: Setting) -> dict[str, Tensor]:
    """The parts of a guidance with this scale: {"scale": float64 [count]} where each sample has its own."""
    if not isinstance(scale, Tensor):
        return {}
    if len(scale) != setting.count:
        raise ShapeError(f"scale must be a number, or one for each of num_samples={setting.count}, got {len(scale)}")
    return {"scale": scale.to(setting.device, torch.float64)}


def each_of(scale: float | Tensor, parts: dict[str, Tensor], like: Tensor) -> Tensor:
    """The scale of each sample, like `like` [B]."""
    return parts["scale"] if "scale" in parts else torch.full_like(like, scale)  # type: ignore[arg-type]


def check_interval(interval: Any) -> Interval:
    """None, or (lo, hi) with 0 ≤ lo < hi ≤ ∞."""
    if interval is None:
        return None
    ends = tuple(interval) if isinstance(interval, (tuple, list)) else ()
    if len(ends) != 2 or not all(isinstance(end, (int, float)) for end in ends) or not 0 <= ends[0] < ends[1]:
        raise ConfigError(
            f"interval must be two noise ratios sigma/alpha (lo, hi) with 0 <= lo < hi, got {short(interval)}: such as (0.3, 3)"
        )
    return float(ends[0]), float(ends[1])


def holds(interval: Interval, ratio: Any) -> Any:
    """Whether the interval holds a noise ratio, or each of a tensor."""
    low, high = interval or (-math.inf, math.inf)
    return (ratio > low * (1 + ROUNDING)) & (ratio <= high * (1 + ROUNDING))


def weighed(table: StepTable, scale: float, interval: Interval) -> StepTable:
    """The table with this weight in the rows that stand within the interval, and 1 in the others."""
    made: dict[Any, StepTable] = vars(table).setdefault("_weighed", {})  # a table does not change
    found = made.get((scale, interval))
    if found is None:
        rows = tuple(
            row
            if row.guidance == (weight := _weight(row, scale, interval))
            else dataclasses.replace(row, guidance=weight)
            for row in table.rows
        )
        found = dataclasses.replace(table, rows=rows)
        made.clear()
        made[scale, interval] = found
    if scale != 1 and not found.guides:
        ratios = [row.level.sigma_hat for row in table.rows if row.calls_network]
        warn(
            f"interval={interval} holds none of the noise ratios sigma/alpha at which the network is called, "
            f"{min(ratios, default=0):.3g} to {max(ratios, default=0):.3g}: the run is without guidance"
        )
    return found


def _weight(row: Any, scale: float, interval: Interval) -> float:
    if not row.calls_network:
        return 1.0
    alpha, sigma = row.level.alpha, row.level.sigma
    ratio = sigma / alpha if alpha > 0 else math.inf
    return scale if holds(interval, ratio) else 1.0


def part(parts: dict[str, Tensor], name: str, form: type) -> Condition:
    """One of them, of the type that it had."""
    if not issubclass(form, dict):
        return parts.get(name)
    start = f"{name}."
    return form({key.removeprefix(start): value for key, value in parts.items() if key.startswith(start)})  # type: ignore[no-any-return]


class Extrapolated(Bound):
    """x̂0 ← x̂0 + (w − 1)(m − m'), m the network's own prediction of x̂0 and m' another one."""

    def __init__(self, scale: float | Tensor, interval: Interval, setting: Setting) -> None:
        super().__init__()
        self.scale, self.interval = scale, interval
        self.parts |= scales(scale, setting)

    def other(self, moment: Moment) -> Tensor | None:
        """The other prediction; None where no weight asks for it."""
        raise NotImplementedError

    def __call__(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        other = self.other(moment)
        if other is None:
            return moment.x0
        weight = self.weight(moment, parts)
        guided = moment.x0 + like(weight - 1, moment.x0) * (moment.base - other)
        if self.interval is None:
            return guided
        return torch.where(like(weight, guided) == 1, moment.x0, guided)  # whatever the other one is there

    def weight(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        """w of each sample, [B], float64."""
        scale = each_of(self.scale, parts, moment.sigma)
        if self.interval is None:
            return scale
        return torch.where(holds(self.interval, moment.sigma / moment.alpha), scale, 1.0)
