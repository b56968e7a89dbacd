"""Classifier-free guidance: a conditional and an unconditional prediction of one network, extrapolated.

    x̂0 = x̂0(x, ∅) + scale·(x̂0(x, c) − x̂0(x, ∅))        (Ho & Salimans 2022, eq. 6)

The same weights hold for ε, v, the score and every other prediction, as each is an affine function of x̂0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, DTypeError, MissingConditionError, ShapeError, short
from ..execution import tensor_checks
from ..execution.calls import answer, like, takes_features, time_features
from ..execution.conditions import LABELS, are_labels
from ..execution.loop import Condition
from ..model import ScoreModel
from ..table import StepTable
from .base import Bound, Guidance, Moment, Setting, flat, joined
from .weights import Extrapolated, check_interval, check_scale, holds, part, weighed


@dataclass(frozen=True, eq=False)
class ClassifierFree(Guidance):
    """Classifier-free guidance towards `sample(cond=)`, of a model that answers with a condition and without.

        m = m(x, ∅) + scale·(m(x, c) − m(x, ∅))

    scale     1: none, the conditional model; 0: the unconditional one; negative: away from the condition. A number, or a tensor
              [num_samples]. Ho & Salimans's w is scale − 1: they write (1 + w)·m(x, c) − w·m(x, ∅); diffusers' guidance_scale,
              OpenAI's and DiT's is this scale
    interval  (lo, hi): only where lo < σ/α ≤ hi, the noise ratio, and no guidance elsewhere (Kynkäänniemi et al. 2024, eq. 5)
    rescale   φ in [0, 1] of Lin et al. 2023, §3.4: m times φ·std(m(x, c))/std(m) + 1 − φ, of each sample, against the growth of
              its contrast; 0: none, 0.7 in the paper
    null      what means "no condition": a tensor or a dict of tensors in the form of cond, one for all samples or one for each;
              what it leaves out of a dict stays as in cond. Default the model's own, of a training with cond_dropout. Another
              condition guides away from that ("negative prompt")

    Both outputs come of one pass of the network on [2B] samples, none of the second where the scale is 1. In the rows of a table
    the weight is a column of the table, so guidance adds nothing to the time outside the network; in a list of guidances, with a
    `rescale`, with scales for each sample and with samplers that choose their steps it is computed in torch.
    """

    scale: float | Tensor = 3.0
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    null: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", check_scale(self.scale))
        object.__setattr__(self, "interval", check_interval(self.interval))
        object.__setattr__(self, "rescale", checks.number("rescale", self.rescale, 0, 1))

    def bind(self, setting: Setting) -> Bound:
        return OfOneNetwork(self, setting)

    def guide(self, setting: Setting) -> Any:
        if isinstance(self.scale, Tensor) or self.rescale:
            return None
        return BothAtOnce(self, setting)


class OfOneNetwork(Extrapolated):
    """Computed in torch, on predictions of x̂0."""

    def __init__(self, guidance: ClassifierFree, setting: Setting) -> None:
        super().__init__(guidance.scale, guidance.interval, setting)
        model, self.rescale = setting.model, guidance.rescale
        null = null_of(model, setting.cond, setting.count, guidance.null)
        model.condition(null, setting.count, looks=True)
        if self.rescale and math.prod(model.data_shape) < 2:
            raise ConfigError(
                "rescale needs samples of two numbers or more, which have a standard deviation: leave it out"
            )
        self.form = type(null)
        self.parts |= flat(null=null)

    def beside(self, model: ScoreModel, t: Tensor, cond: Condition, parts: dict[str, Tensor]) -> Condition:
        # where the host can see it, a call that no sample is guided in is left as it is
        seen = self.interval is not None and t.device.type == "cpu"
        if seen and not bool(holds(self.interval, model.process.sigma_hat(t.double())).any()):
            return None
        return part(parts, "null", self.form)

    def other(self, moment: Moment) -> Tensor | None:
        output = moment.others.get(self)
        return None if output is None else moment.clean(moment.model, output)

    def __call__(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        guided = super().__call__(moment, parts)
        if not self.rescale or self not in moment.others:
            return guided
        output = moment.output + moment.slope * (guided - moment.base)
        spread = output.flatten(1).std(1)
        factor = self.rescale * moment.output.flatten(1).std(1) / torch.where(spread > 0, spread, 1) + 1 - self.rescale
        rescaled = moment.clean(moment.model, like(factor, output) * output)
        return torch.where(like(self.weight(moment, parts), guided) == 1, guided, rescaled)


class BothAtOnce:
    """The two outputs of a row, with the condition and without, by one pass of the network (fastdiff.runs.Guide)."""

    def __init__(self, guidance: ClassifierFree, setting: Setting) -> None:
        model = setting.model
        self.model, self.net, self.guidance = model, model.net, guidance
        self.null = model.condition(
            null_of(model, setting.cond, setting.count, guidance.null), setting.count, looks=True
        )
        self.form = type(self.null)
        self.key = "classifier-free", self.form

    def weighed(self, table: StepTable) -> StepTable:
        return weighed(table, self.guidance.scale, self.guidance.interval)  # type: ignore[arg-type]

    def conditions(self, cond: Condition) -> dict[str, Tensor]:
        """Both conditions in one dict, which is cut with the batch."""
        return flat(cond=cond, null=self.null)

    def features(self, times: Tensor, rows: int, most: int) -> Tensor | None:
        return time_features(self.net, times, rows, most) if takes_features(self.net) else None

    def __call__(
        self, x: Tensor, time: Tensor, features: Tensor | None, parts: dict[str, Tensor], guides: bool = False
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
        cond = part(parts, "cond", self.form)
        if not guides:
            return answer(self.net, self.model.variance, x, time, features, cond)
        both = joined(cond, part(parts, "null", self.form))
        twice = features if features is None or len(features) == 1 else features.repeat(2, *[1] * (features.ndim - 1))
        m, v = answer(self.net, self.model.variance, torch.cat((x, x)), time.repeat(2), twice, both)
        return m[: len(x)], None if v is None else v[: len(x)], m[len(x) :]


def null_of(model: ScoreModel, cond: Any, count: int, given: Any) -> Condition:
    """What the model is to be asked with instead of cond of `count` samples, in its form: `given`, or the model's own "none"."""
    if cond is None and model.takes.classes == 0 and model.takes.shape == ():
        raise ConfigError(
            "guidance.ClassifierFree needs a model of labels or conditions, and this one's network takes none: leave guidance "
            "out, or build it with num_classes= or cond_shape= and train it with cond_dropout=0.1"
        )
    if cond is None:
        raise MissingConditionError(
            "cond must be given with guidance.ClassifierFree, which weighs the model with it against the model without: give "
            "cond=, or leave guidance out"
        )
    if given is not None:
        return _given(cond, given, count)
    if not model.num_classes and not model.cond_shape:
        raise ConfigError(
            "null must be given, as the model does not say what stands for no condition: ClassifierFree(scale, null=tensor), "
            "like one sample's cond"
        )
    if not model.cond_dropout:
        raise ConfigError(
            "guidance.ClassifierFree needs a model that was also trained without conditions, and this one was not: "
            "train(cond_dropout=0.1), ScoreModel(cond_dropout=) if it was elsewhere, or null="
        )
    if isinstance(cond, dict):
        return type(cond)({key: _none(model, key, value) for key, value in cond.items()})
    return _none(model, None, cond)


def _none(model: ScoreModel, key: str | None, value: Tensor) -> Tensor:
    """The model's "none" in the place of a label or a condition; what is neither, as it is."""
    taken = model.takes
    if are_labels(value) and model.null_label is not None and key in (None, taken.labels, *LABELS):
        return torch.full_like(value[:1], model.null_label).expand(value.shape)
    if value.is_floating_point() and model.cond_shape and key in (None, taken.tensor):
        return torch.full_like(value[:1], math.nan).expand(value.shape)
    return value


def _given(cond: Any, null: Any, count: int) -> Condition:
    if not isinstance(cond, dict):
        if isinstance(null, dict):
            raise ConfigError("null must be a tensor, as cond is, got a dict: give the tensor alone")
        return _fitted("null", null, cond, count)
    if not isinstance(null, dict) or not null or not null.keys() <= cond.keys():
        raise ConfigError(
            f"null must be a dict with some of the keys of cond, {', '.join(map(str, cond)):.60}, got "
            f"{short(list(null) if isinstance(null, dict) else null)}: give a tensor for each key that differs"
        )
    return type(cond)({key: _fitted(f"null[{key!r}]", null[key], value, count) if key in null else value
                       for key, value in cond.items()})  # fmt: skip


def _fitted(name: str, null: Any, value: Tensor, count: int) -> Tensor:
    """A tensor for each sample, of cond's dtype, device and shape."""
    if isinstance(null, (int, float)) and not isinstance(null, bool):
        null = torch.tensor(null)
    tensor_checks.check_dense(name, null)
    if null.is_floating_point() != value.is_floating_point():
        raise DTypeError(f"{name} must have cond's dtype, {value.dtype}, got {null.dtype}")
    if tuple(null.shape) not in (tuple(value.shape), tuple(value.shape[1:])):
        raise ShapeError(
            f"{name} must have the shape of one sample's cond, {tuple(value.shape[1:])}, or {tuple(value.shape)}, got "
            f"{tuple(null.shape)}"
        )
    return null.to(value.device, value.dtype).expand(value.shape)
