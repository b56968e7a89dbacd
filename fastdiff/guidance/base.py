"""What every guidance is: a change of the prediction x̂0 = E[x0 | x_t], which any sampler then takes for the network's own.

    E[x0 | x_t, y] = E[x0 | x_t] + (σ²/α) ∇ log p(y | x_t)        (Tweedie's formula with and without y)

So a guided network is a network, and every table, solver and engine runs it as it stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelOutputError, short
from ..execution.calls import like
from ..execution.loop import Condition
from ..model import ScoreModel
from ..planning import predictions
from ..planning.processes import require_linear

OWN = "cond"  # the caller's own condition among the tensors that are cut with the batch


@dataclass(frozen=True)
class Setting:
    """The run that a guidance is made ready for.

    count, dtype, device  of the states [count, *model.data_shape]
    seed, first_sample    of its noise
    cond                  the caller's, as it was given
    """

    model: ScoreModel
    count: int
    dtype: torch.dtype
    device: torch.device
    seed: int
    first_sample: int
    cond: Condition


class Moment:
    """One call of the network: the state x [B, *] at process times t [B], levels alpha and sigma [B, 1, …], and the prediction
    x0 [B, *] that the guidances before have left."""

    def __init__(self, model: ScoreModel, x: Tensor, t: Tensor, cond: Condition, differentiates: bool) -> None:
        self.model, self.x, self.t, self.cond = model, x, t, cond
        wide = t.double()
        self.alpha, self.sigma = model.process.alpha(wide), model.process.sigma(wide)
        self.differentiates = differentiates
        self.output, self.variance = self._called(model, cond)
        self.x0 = self.base = self.clean(model, self.output)

    def _called(self, model: ScoreModel, cond: Condition) -> tuple[Tensor, Tensor | None]:
        output, variance = model.outputs(self.x, self.t, cond)
        return output.to(self.x.dtype), variance

    def clean(self, model: ScoreModel, output: Tensor) -> Tensor:
        """x̂0 by what a model of the same process has predicted."""
        p, q = model.conversion("x0", self.t.double(), self.alpha, self.sigma)
        return like(p, self.x) * self.x + like(q, self.x) * output

    def predicted(self, model: ScoreModel, cond: Condition) -> Tensor:
        """x̂0 of another model, or under another condition."""
        return self.clean(model, self._called(model, cond)[0])

    @property
    def tweedie(self) -> Tensor:
        """σ²/α, [B, 1, …]: what turns a gradient in x_t of a log probability into a change of x̂0."""
        return like(self.sigma**2 / self.alpha, self.x)

    def pulled(self, v: Tensor, last: bool = False) -> Tensor:
        """Jᵀ v with the Jacobian J = ∂x̂0/∂x_t of the prediction as it stands, [B, *]; J σ²/α is the covariance of x0 given x_t.

        last   no further product is asked for
        """
        if self.x0 is not self.base:
            return gradient(self.x0, self.x, v, retain=not last)
        p, q = (like(part, self.x) for part in self.model.conversion("x0", self.t.double(), self.alpha, self.sigma))
        return p * v + gradient(self.output, self.x, q * v, retain=not last)


def gradient(value: Tensor, x: Tensor, v: Tensor | None = None, retain: bool = False) -> Tensor:
    """∂⟨value, v⟩/∂x; a ModelOutputError where the value is no function of x that autograd knows."""
    if value.requires_grad:
        product: Tensor | None = torch.autograd.grad(value, x, v, retain_graph=retain, allow_unused=True)[0]
        if product is not None:
            return product
    raise ModelOutputError(
        "this guidance needs gradients through the model, and its output has none with respect to x: look in it for no_grad, "
        "detach, argmax or numpy"
    )


class Bound:
    """A guidance made ready for one run; `parts` are its tensors [count, *], which are cut with the batch."""

    differentiates = False  # whether it asks for products with the network's Jacobian
    guides = True  # whether it changes the prediction, or looks at it

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def __call__(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        """The guided x̂0, [B, *]."""
        raise NotImplementedError


class Guidance:
    """Base of what `sample(guidance=)` takes."""

    def bind(self, setting: Setting) -> Bound:
        """Checked against the run, before any work."""
        raise NotImplementedError


class Guided(nn.Module):
    """The network of a guided model, (x [B, *], t [B], …) -> the output that stands for the guided x̂0.

    With m = r x0 + w ε what the model predicts, a change Δ of x̂0 is one of (r − w α/σ) Δ of m.
    """

    def __init__(self, model: ScoreModel, bound: Sequence[Bound]) -> None:
        super().__init__()
        self.model, self.bound = model, tuple(bound)
        self.prediction = "x0" if model.prediction == "edm" else model.prediction
        self.differentiates = any(each.differentiates for each in bound)

    def forward(self, x: Tensor, t: Tensor, **parts: Tensor) -> Tensor:
        cond, own = taken_apart(parts, len(self.bound))
        with _differentiable(self.differentiates):
            state = x.detach().clone().requires_grad_() if self.differentiates else x
            moment = Moment(self.model, state, t, cond, self.differentiates)
            for each, mine in zip(self.bound, own):
                moment.x0 = each(moment, mine)
        change = (moment.x0 - moment.base).detach()
        if self.prediction == "x0":
            output = moment.base.detach() + change
        else:
            pair = predictions.coordinates(self.prediction, self.model.process, t.double(), moment.alpha, moment.sigma)
            output = moment.output.detach() + like(pair[0] - pair[1] * moment.alpha / moment.sigma, x) * change
        if moment.variance is None:
            return output
        return torch.cat([output, moment.variance.detach().to(output.dtype)], 1)


@contextlib.contextmanager
def _differentiable(wanted: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad() if wanted else torch.no_grad():
        yield


def together(cond: Condition, bound: Sequence[Bound]) -> dict[str, Tensor]:
    """The caller's condition and the guidances' tensors in one dict, which is cut with the batch."""
    parts = {f"{OWN}.{key}": value for key, value in cond.items()} if isinstance(cond, dict) else {}
    if isinstance(cond, Tensor):
        parts[OWN] = cond
    for k, each in enumerate(bound):
        parts |= {f"{k}.{name}": value for name, value in each.parts.items()}
    return parts


def taken_apart(parts: dict[str, Tensor], count: int) -> tuple[Condition, list[dict[str, Tensor]]]:
    own: list[dict[str, Tensor]] = [{} for _ in range(count)]
    cond: dict[str, Tensor] = {}
    for name, value in parts.items():
        whose, _, rest = name.partition(".")
        (cond if whose == OWN else own[int(whose)])[rest] = value
    return (cond.get("", cond or None) if "" in cond else cond or None), own


def guided(guidance: Any, setting: Setting) -> tuple[ScoreModel, Condition, list[Bound]]:
    """The model of a guided run, its condition, and the guidances as they are bound to it."""
    each = guidance if isinstance(guidance, (list, tuple)) else [guidance]
    for one in each:
        if not isinstance(one, Guidance):
            raise ConfigError(
                "guidance must be an object of fastdiff.guidance or fastdiff.inverse, or a list of them, got "
                f"{short(one)}: for none use guidance=None"
            )
    model = setting.model
    require_linear(model.process, "guidance", "use VE, VP or another process with alpha and sigma")
    model.condition(setting.cond, setting.count, looks=True)
    every = [one.bind(setting) for one in each]
    bound = [one for one in every if one.guides]
    if not bound:
        return model, setting.cond, every
    net = Guided(model, bound)
    outer = ScoreModel(
        net, model.process, net.prediction, "t", model.data_shape,
        model.data_range if model.range_given else None, model.variance, standardize=model.standardize,
    )  # fmt: skip
    return outer, together(setting.cond, bound) or None, every
