"""Autoguidance: a model guided by a weaker one of the same kind, away from what both have wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DeviceError, short
from ..execution.calls import answer, dtype_of, parameters, takes_features, time_features
from ..execution.loop import Condition
from ..model import ScoreModel, opened
from ..table import StepTable
from .base import Bound, Guidance, Moment, Setting, flat, units
from .weights import Extrapolated, Interval, check_interval, check_scale, part, weighed


@dataclass(frozen=True, eq=False)
class Auto(Guidance):
    """Autoguidance (Karras et al. 2024, eq. 4): x̂0 = x̂0_weak + scale·(x̂0 − x̂0_weak).

    weaker_model  a ScoreModel of the same process, data_shape and units, or its path or name: smaller, or trained for less; with
                  any prediction and time_input. It is given the same condition, or none where it takes none
    scale         1: none; 2 to 3 in the paper; negative allowed. A number, or a tensor [num_samples]
    interval      (lo, hi): only where lo < σ/α ≤ hi

    In the rows of a table, with a weaker model of the same prediction and time_input, the weight is a column of the table; else
    it is computed in torch. Captured graphs are kept with this object: make it once for several runs.
    """

    weaker_model: Any
    scale: float | Tensor = 2.0
    interval: Interval = None

    def __post_init__(self) -> None:
        model = opened(self.weaker_model)
        if not isinstance(model, ScoreModel):
            raise ConfigError(f"weaker_model must be a ScoreModel, or the path or name of one, got {short(model)}")
        object.__setattr__(self, "weaker_model", model)
        object.__setattr__(self, "scale", check_scale(self.scale))
        object.__setattr__(self, "interval", check_interval(self.interval))

    def bind(self, setting: Setting) -> Bound:
        return OfTwoNetworks(self, setting)

    def guide(self, setting: Setting) -> Any:
        model, weaker = setting.model, self.weaker_model
        alike = weaker.prediction == model.prediction and weaker.time_input == model.time_input
        if isinstance(self.scale, Tensor) or not alike:
            return None
        made = vars(self).get("_both")
        if made is None or made[0] is not model.net:
            modules = [net for net in (model.net, weaker.net) if isinstance(net, nn.Module)]
            made = model.net, nn.ModuleList(modules)
            object.__setattr__(self, "_both", made)
        return InTurn(self, setting, made[1])


def conditioned(weaker: ScoreModel, setting: Setting) -> Any:
    """The condition of the weaker model: the caller's, or None where it takes none. Refuses a weaker model that does not go with
    the model."""
    model = setting.model
    facts = [(name, getattr(weaker, name), getattr(model, name)) for name in ("process", "data_shape")]
    if None not in (given := (units(weaker), units(model))):
        facts.append(("units", *given))
    for name, its, wanted in facts:
        if its != wanted:
            raise ConfigError(
                f"weaker_model must have the {name} of the model, {short(wanted)}, got {short(its)}: train both alike"
            )
    place = next(parameters(weaker.net), None)
    if place is not None and place.device != setting.device:
        raise DeviceError(
            f"weaker_model must be on {setting.device}, got one on {place.device}: use "
            f"weaker_model.net.to({str(setting.device)!r})"
        )
    taken = weaker.takes
    nowhere = taken.third is None and not taken.names and not taken.any_name
    untrained = (weaker.num_classes or taken.classes) == 0 and (weaker.cond_shape or taken.shape) == ()
    cond = None if nowhere or untrained else setting.cond
    weaker.condition(cond, setting.count, looks=True)
    return cond


class OfTwoNetworks(Extrapolated):
    """Computed in torch, on predictions of x̂0."""

    def __init__(self, guidance: Auto, setting: Setting) -> None:
        super().__init__(guidance.scale, guidance.interval, setting)
        self.weaker = guidance.weaker_model
        self.takes_cond = conditioned(self.weaker, setting) is not None
        self.modules = (self.weaker,)

    def other(self, moment: Moment) -> Tensor:
        return moment.predicted(self.weaker, moment.cond if self.takes_cond else None)


class InTurn:
    """The two outputs of a row, by the model and by the weaker one (fastdiff.runs.Guide).

    net   both networks as one module
    """

    def __init__(self, guidance: Auto, setting: Setting, net: nn.Module) -> None:
        self.guidance, self.model, self.weaker, self.net = guidance, setting.model, guidance.weaker_model, net
        self.cond = self.weaker.condition(conditioned(self.weaker, setting), setting.count, looks=True)
        self.width: int | None = None  # of the model's time features, before the weaker one's
        self.key = ("auto",)

    def weighed(self, table: StepTable) -> StepTable:
        return weighed(table, self.guidance.scale, self.guidance.interval)  # type: ignore[arg-type]

    def conditions(self, cond: Condition) -> dict[str, Tensor]:
        """Both models' conditions in one dict, which is cut with the batch."""
        self.forms = type(cond), type(self.cond)
        return flat(cond=cond, weak=self.cond)

    def features(self, times: Tensor, rows: int, most: int) -> Tensor | None:
        """Those of both networks side by side, where both make them, as [rows, width]."""
        if not (takes_features(self.model.net) and takes_features(self.weaker.net)):
            return None
        own, weak = (time_features(each.net, times, 2 * rows, most) for each in (self.model, self.weaker))
        if own is None or weak is None or not own.ndim == weak.ndim == 2 or own.dtype != weak.dtype:
            return None
        self.width = own.shape[1]
        return torch.cat((own, weak), 1)

    def __call__(
        self, x: Tensor, time: Tensor, features: Tensor | None, parts: dict[str, Tensor], guides: bool = False
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
        own = weak = None
        if features is not None:
            own, weak = features[:, : self.width], features[:, self.width :]
        weak_x = x.to(dtype_of(self.weaker.net, x.dtype), copy=True) if guides else x  # a network may change its input
        m, v = answer(self.model.net, self.model.variance, x, time, own, part(parts, "cond", self.forms[0]))
        if not guides:
            return m, v
        weak_cond = part(parts, "weak", self.forms[1])
        return m, v, answer(self.weaker.net, self.weaker.variance, weak_x, time, weak, weak_cond)[0]
