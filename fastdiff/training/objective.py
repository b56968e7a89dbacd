"""What a training minimises: a loss, its weight, and the times at which it is taken."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, losses
from ..data import Data
from ..errors import CheckpointMismatchError, ConfigError, warn
from ..execution.loop import Condition
from ..losses import times as rules
from ..losses import weights
from ..losses.objectives import untrained
from ..model import ScoreModel

VLB_WEIGHT = 0.001  # of train, unless given


class Batch(NamedTuple):
    """Of one step: data in the network's units, the noise's cursor, conditions, the times, and those of all processes."""

    x0: Tensor
    cursor: Tensor
    cond: Condition
    drawn: rules.Drawn
    everyones: rules.Drawn


@dataclass(frozen=True, eq=False)
class Objective:
    """The loss of a batch. What a weight or a rule learns on the way is in `tensors`."""

    model: ScoreModel
    loss: str
    weight: weights.Weight | None
    times: rules.Times
    truncation: str
    probe: str
    vlb_weight: float
    levels: losses.Levels | None

    @classmethod
    def of(
        cls, model: ScoreModel, data: Data, dequantize: bool, loss: str, weight: Any, times: Any, truncation: str,
        probe: str | None, vlb_weight: float,
    ) -> Objective:  # fmt: skip
        """Checked against the model and the data."""
        kind, vlb_weight = losses.check(model, loss, probe, weight), checks.number("vlb_weight", vlb_weight, 0)
        if vlb_weight != VLB_WEIGHT and loss != "hybrid":
            raise ConfigError(
                f"vlb_weight={vlb_weight:g} is of the bound in loss='hybrid', got loss={loss!r}: leave it out"
            )
        loss, chosen = losses.pair(loss, weight)
        chosen, rule = copy.deepcopy((chosen, rules.get(times, model.process)))  # the caller's objects learn nothing
        rules.check(rule, truncation, model.process)
        levels = None
        if loss in losses.BOUNDED and data.bins is not None and not dequantize:
            own = model.standardize is not None
            levels = losses.levels_of(model, data.range if own else model.data_range, data.bins)  # type: ignore[arg-type]
        return cls(model, loss, chosen, rule, truncation, kind, vlb_weight, levels)

    def check_balance(self) -> None:
        """Say where a hundredth of the times has nine tenths of an untrained network's loss, and what evens it out."""
        if self.weight is None or self.loss in losses.BOUNDED or not self.model.process.linear:
            return
        share, t = self._crowded()
        if share < 0.9:
            return
        tried: dict[str, Objective] = {}
        if self.weight.name in ("g2", "one"):  # for whose own sake they were chosen
            tried["times='importance', which leaves the integral"] = replace(
                self, times=rules.Importance(), truncation="hard"
            )
        tried[f"loss={self.loss!r} with weight='min_snr'"] = replace(self, weight=weights.MinSNR())
        if self.weight.name in ("edm", "learned"):
            of_v = copy.copy(self.model)
            vars(of_v)["prediction"] = "v"
            tried["prediction='v'"] = replace(self, model=of_v)
        ways = [way for way, other in tried.items() if other._crowded()[0] < 0.5]
        warn(
            f"weight={self.weight.name!r} puts {share:.1%} of the loss of an untrained network of "
            f"prediction={self.model.prediction!r} on a hundredth of the times, t = {t[0]:.4g} to {t[1]:.4g}, so that few "
            "samples count" + f": give {', or '.join(ways)}" * bool(ways)
        )

    def _crowded(self) -> tuple[float, tuple[float, float]]:
        """The share that the largest hundredth has of an untrained network's loss, and its times."""
        u = (torch.arange(4096, dtype=torch.float64, device="cpu") + 0.5) / 4096
        drawn = self.draw(u, 0.0)
        values = untrained(self.model, self.weight, drawn.t)
        values = values if drawn.factor is None else values * drawn.factor.double()
        top = values.topk(41).indices
        ends = drawn.t[top].aminmax()
        return float(values[top].sum() / values.sum()), (float(ends.min), float(ends.max))

    def options(self) -> dict[str, Any]:
        """What says which run this is, as a checkpoint stores it."""
        options: dict[str, Any] = {
            "loss": self.loss,
            "weight": None if self.weight is None else self.weight.config(),
            "times": self.times.config(),
            "truncation": self.truncation,
        }
        options |= {"probe": self.probe} if self.loss in losses.SLICED else {}
        return options | ({"vlb_weight": self.vlb_weight} if self.loss == "hybrid" else {})

    def draw(self, u: Tensor, of_step: float) -> rules.Drawn:
        """The times of a batch by uniform numbers [B], and one of the step."""
        return rules.draw(self.times, self.truncation, self.model.process, u, of_step)

    def per_sample(self, batch: Batch, model: ScoreModel | None = None) -> Tensor:
        """The loss of each sample, [B], without the rule's factor."""
        return losses.per_sample(
            model or self.model, batch.x0, batch.drawn.t, batch.cursor, self.loss, batch.cond,
            self.probe if self.loss in losses.SLICED else None, weight=self.weight, vlb_weight=self.vlb_weight,
            levels=self.levels,
        )  # fmt: skip

    @staticmethod
    def mean(values: Tensor, drawn: rules.Drawn) -> Tensor:
        """The estimate of the integral over all times by the values [B] at those that were drawn."""
        return (values if drawn.factor is None else values * drawn.factor).mean()

    @property
    def learns(self) -> bool:
        """Whether the weight or the rule depends on the losses so far."""
        return isinstance(self.weight, weights.Learned) or isinstance(self.times, rules.SecondMoment)

    def observe(self, seen: Sequence[tuple[rules.Drawn, Tensor]]) -> None:
        """Learn from the times and losses [B] of a step that was taken, or of its parts."""
        t, v = (torch.cat([getattr(drawn, name) for drawn, _ in seen]) for name in ("t", "v"))
        values = torch.cat([each for _, each in seen])
        if isinstance(self.times, rules.SecondMoment):
            self.times.observe(v, values)
        if isinstance(self.weight, weights.Learned):
            process = self.model.process
            u, known = self.weight.uncertainty(process, t), 0.0
            if self.loss not in losses.DENOISING:  # whose mean is less by λ than that of "dsm", which is never negative
                known = self.weight.of_noise(process, t, process.alpha(t), process.sigma(t)).double()
            self.weight.observe(process, t, (values.double() - u) * u.exp() + known)

    def tensors(self) -> dict[str, Tensor]:
        """All that it learned."""
        learned: dict[str, Tensor] = {}
        if isinstance(self.weight, weights.Learned):
            learned["u"] = self.weight.u
        if isinstance(self.times, rules.SecondMoment):
            learned |= {"squares": self.times.squares, "seen": self.times.seen}
        return learned

    def load(self, tensors: dict[str, Tensor], name: str) -> None:
        """Go on with what was learned before; CheckpointMismatchError, and nothing changed, unless it fits."""
        own = self.tensors()
        if own.keys() != tensors.keys() or any(
            own[k].shape != tensors[k].shape or not bool(torch.isfinite(tensors[k]).all()) for k in own
        ):
            raise CheckpointMismatchError(
                f"{name} lacks what the loss had learned, or has another's: choose another directory, or give resume=False"
            )
        for key, value in own.items():
            value.copy_(tensors[key])
