"""What every guidance is: a change of the prediction x̂0 = E[x0 | x_t], which any sampler then takes for the network's own.

    E[x0 | x_t, y] = E[x0 | x_t] + (σ²/α) ∇ log p(y | x_t)        (Tweedie's formula with and without y)

So a guided network is a network, and every table, solver and engine runs it as it stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelOutputError, short
from ..execution import tensor_checks
from ..execution.calls import answer, dtype_of, like, takes_features
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
    batch                 samples in one call; None: all
    """

    model: ScoreModel
    count: int
    dtype: torch.dtype
    device: torch.device
    seed: int
    first_sample: int
    cond: Condition
    batch: int | None = None


class Levels(NamedTuple):
    """What a call takes of the times, each [B] or [1], float64: process times, α and σ, what the network is told and its input's
    scale, x̂0 = p x + q m of its output m = r x0 + w ε, slope = r − w α/σ; and the network's own time features, or None."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    time: Tensor
    scale: Tensor
    p: Tensor
    q: Tensor
    slope: Tensor
    features: Tensor | None = None

    @classmethod
    def at(cls, model: ScoreModel, t: Tensor) -> Levels:
        """Those of process times t [n]."""
        process, t = model.process, t.double()
        alpha, sigma = process.alpha(t), process.sigma(t)
        p, q = model.conversion("x0", t, alpha, sigma)
        r, w = predictions.coordinates(model.prediction, process, t, alpha, sigma)
        time = predictions.network_time(model.time_input, process, t, alpha, sigma)
        time = time.round() if model.time_input == "index" else time
        scale = predictions.input_scale(model.prediction, process, alpha, sigma)
        return cls(t, alpha, sigma, time, scale, p, q, r - w * alpha / sigma)

    def told(self, model: ScoreModel, dtype: torch.dtype) -> Tensor:
        """The time as the network takes it."""
        return self.time.long() if model.time_input == "index" else self.time.to(dtype)


class Moment:
    """One call of the network: the state x [B, *] at process times t [B], levels alpha and sigma [B], and the prediction x0
    [B, *] that the guidances before have left.

    beside   further conditions that the same pass of the network answers, by who asks for them; `others` has the outputs
    levels   of the times; None: made here
    """

    def __init__(
        self, model: ScoreModel, x: Tensor, t: Tensor, cond: Condition, differentiates: bool,
        beside: dict[Bound, Condition] | None = None, levels: Levels | None = None,
    ) -> None:  # fmt: skip
        self.model, self.x, self.cond = model, x, cond
        self.levels = levels = Levels.at(model, t) if levels is None else levels
        count = len(x)
        self.t, self.alpha, self.sigma = (column.expand(count) for column in (levels.t.to(x.dtype), *levels[1:3]))
        beside = beside or {}
        many = 1 + len(beside)
        self.seen = x.view_as(x) if differentiates else x  # by the network
        state = self.seen if model.prediction != "edm" else like(levels.scale, x) * self.seen
        time, features = levels.told(model, x.dtype).expand(count), levels.features
        if beside:
            state, time, cond = (
                state.repeat(many, *[1] * (x.ndim - 1)),
                time.repeat(many),
                joined(cond, *beside.values()),
            )
            if features is not None and len(features) > 1:
                features = features.repeat(many, 1)
        state, cond = state.to(dtype_of(model.net, x.dtype)), model.condition(cond, len(state))
        output, variance = answer(model.net, model.variance, state, time, features, cond)
        self.output, *others = output.to(x.dtype).chunk(many)
        self.others = dict(zip(beside, others))
        self.variance = None if variance is None else variance[:count]
        self.x0 = self.base = self.clean(model, self.output)
        self.followed = False  # by a guidance that asks for products of its own

    def clean(self, model: ScoreModel, output: Tensor) -> Tensor:
        """x̂0 by what a model of the same process has predicted."""
        if model.prediction == "x0":
            return output
        p, q = self.levels.p, self.levels.q
        if model is not self.model:
            p, q = model.conversion("x0", self.t.double(), self.alpha, self.sigma)
        return like(p, self.x) * self.x + like(q, self.x) * output

    def predicted(self, model: ScoreModel, cond: Condition) -> Tensor:
        """x̂0 of another model, or under another condition."""
        x = self.seen.to(dtype_of(model.net, self.x.dtype))
        return self.clean(model, model.outputs(x, self.t, cond)[0].to(self.x.dtype))

    @property
    def slope(self) -> Tensor:
        """What a change of x̂0 is in the network's output m = r x0 + w ε: r − w α/σ, [B, 1, …]."""
        return like(self.levels.slope, self.x)

    @property
    def tweedie(self) -> Tensor:
        """σ²/α, [B, 1, …]: what turns a gradient in x_t of a log probability into a change of x̂0."""
        return like(self.sigma**2 / self.alpha, self.x)

    def pulled(self, v: Tensor, last: bool = False) -> Tensor:
        """Jᵀ v with the Jacobian J = ∂x̂0/∂x_t of the prediction as it stands, [B, *]; J σ²/α is the covariance of x0 given x_t.

        last   this guidance asks for no further product
        """
        return self.gradient(self.x0, v, last)

    def gradient(self, value: Tensor, v: Tensor | None = None, last: bool = True) -> Tensor:
        """∂⟨value, v⟩/∂x_t of what was made of the prediction, [B, *], `last` as in `pulled`; a ModelOutputError where autograd
        does not see that by way of the network."""
        if value.requires_grad:
            inputs = (self.x, self.seen)
            product, by_network = torch.autograd.grad(
                value, inputs, v, retain_graph=self.followed or not last, allow_unused=True
            )
            if product is not None and by_network is not None:
                return product
        raise ModelOutputError(
            "this guidance needs gradients through the model, and its output has none with respect to x: look in it for no_grad, "
            "detach, argmax or numpy"
        )


class Bound:
    """A guidance made ready for one run; `parts` are its tensors [count, *], which are cut with the batch."""

    differentiates = False  # whether it asks for products with the network's Jacobian
    guides = True  # whether it changes the prediction, or looks at it
    modules: tuple[nn.Module, ...] = ()  # networks of its own, which the run sets to evaluation mode

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def beside(self, model: ScoreModel, t: Tensor, cond: Condition, parts: dict[str, Tensor]) -> Condition:
        """Another condition that the network is to answer in the same pass, for `moment.others[self]`; None: none."""
        return None

    def __call__(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        """The guided x̂0, [B, *]."""
        raise NotImplementedError


class Guidance:
    """Base of what `sample(guidance=)` takes."""

    def bind(self, setting: Setting) -> Bound:
        """Checked against the run, before any work."""
        raise NotImplementedError

    def guide(self, setting: Setting) -> Any:
        """The same for the rows of a table, where it is a weight on two outputs of a network (fastdiff.runs.Guide); None where
        it is not."""
        return None


class Guided(nn.Module):
    """The network of a guided model, (x [B, *], t [B], …) -> the output that stands for the guided x̂0, both in the state's dtype.

    With m = r x0 + w ε what the model predicts, a change Δ of x̂0 is one of (r − w α/σ) Δ of m. What depends on the time alone
    is made for all rows of a run beforehand, as its time features.
    """

    takes_states = True  # and makes of them what the model's network takes

    def __init__(self, model: ScoreModel, bound: Sequence[Bound]) -> None:
        super().__init__()
        self.model, self.bound = model, tuple(bound)
        self.more = nn.ModuleList(module for each in bound for module in each.modules)
        self.prediction = "x0" if model.prediction == "edm" else model.prediction
        self.differentiates = any(each.differentiates for each in bound)

    def time_features(self, t: Tensor) -> Tensor:
        """The levels [n, 8] of process times t [n], float64, and beside them what the network makes of its times."""
        levels = Levels.at(self.model, t)
        columns = torch.stack([column.expand(len(t)) for column in levels[:8]], 1)
        if not takes_features(self.model.net):
            return columns
        with torch.no_grad():
            own = self.model.net.time_features(levels.told(self.model, t.dtype))
        self.kind = own.dtype
        return torch.cat((columns, own.double()), 1) if own.ndim == 2 else columns

    def forward(self, x: Tensor, t: Tensor, features: Tensor | None = None, **parts: Tensor) -> Tensor:
        with _differentiable(self.differentiates):
            # autograd takes no tensors of torch.inference_mode, in which the caller may be
            x, t, features = (v.clone() if v is not None and v.is_inference() else v for v in (x, t, features))
            parts = {name: v.clone() if v.is_inference() else v for name, v in parts.items()}
            cond, own = taken_apart(parts, len(self.bound))
            levels = None
            if features is not None:
                levels = Levels(*features[:, :8].unbind(1))
                levels = levels._replace(features=features[:, 8:].to(self.kind) if features.shape[1] > 8 else None)
                t = levels.t.to(x.dtype).expand(len(x))
            state = x.detach().clone().requires_grad_() if self.differentiates else x
            wanted = {each: each.beside(self.model, t, cond, mine) for each, mine in zip(self.bound, own)}
            beside = {each: other for each, other in wanted.items() if other is not None}
            moment = Moment(self.model, state, t, cond, self.differentiates, beside, levels)
            for k, (each, mine) in enumerate(zip(self.bound, own), 1):
                moment.followed = any(later.differentiates for later in self.bound[k:])
                moment.x0 = each(moment, mine)
        output = moment.x0.detach()
        if self.prediction != "x0":
            output = moment.output.detach() + moment.slope * (output - moment.base.detach())
        if moment.variance is None:
            return output
        return torch.cat([output, moment.variance.detach().to(output.dtype)], 1)


class _Outer(ScoreModel):
    """The model of a guided run, whose condition is what `together` makes: the caller's was checked before."""

    fits_times = False

    def condition(self, cond: Any, count: int, looks: bool = False) -> Condition:
        return cond  # type: ignore[no-any-return]


@contextlib.contextmanager
def _differentiable(wanted: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad() if wanted else torch.no_grad():
        yield


def joined(*conds: Condition) -> Condition:
    """Conditions of one form, one after another."""
    first = conds[0]
    if isinstance(first, dict):
        return type(first)({key: torch.cat([each[key] for each in conds]) for key in first})  # type: ignore[index]
    return torch.cat(conds) if isinstance(first, Tensor) else None  # type: ignore[arg-type]


def together(cond: Condition, bound: Sequence[Bound]) -> dict[str, Tensor]:
    """The caller's condition and the guidances' tensors in one dict, which is cut with the batch."""
    return flat(**{OWN: cond}, **{str(k): each.parts for k, each in enumerate(bound)})


def flat(**conds: Condition) -> dict[str, Tensor]:
    """Conditions by name in one dict of tensors, which is cut with the batch."""
    parts: dict[str, Tensor] = {}
    for name, cond in conds.items():
        if isinstance(cond, dict):
            parts |= {f"{name}.{key}": value for key, value in cond.items()}
        elif cond is not None:
            parts[name] = cond
    return parts


def taken_apart(parts: dict[str, Tensor], count: int) -> tuple[Condition, list[dict[str, Tensor]]]:
    own: list[dict[str, Tensor]] = [{} for _ in range(count)]
    cond: dict[str, Tensor] = {}
    for name, value in parts.items():
        whose, _, rest = name.partition(".")
        (cond if whose == OWN else own[int(whose)])[rest] = value
    return (cond.get("", cond or None) if "" in cond else cond or None), own


def units(model: Any) -> Any:
    """What numbers of the data are to a network of a model, or to a classifier: their mean and std, or their range, or None."""
    standardize = getattr(model, "standardize", None)
    if standardize is not None:
        return [values.tolist() for values in standardize]
    return model.data_range if getattr(model, "range_given", False) else None


def guided(guidance: Any, setting: Setting, rows: bool = False) -> tuple[ScoreModel, Condition, list[Bound], Any]:
    """The model of a guided run, its condition, the guidances as they are bound to it, and what guides its rows
    (fastdiff.runs.Guide), or None.

    rows   whether it is a table's: then one guidance alone that is a weight on two outputs of a network guides the rows, and
           model and condition are the caller's
    """
    each, model = list(guidance) if isinstance(guidance, (list, tuple)) and guidance else [guidance], setting.model
    for one in each:
        if isinstance(one, Tensor):
            raise ConfigError(
                f"guidance must be an object, a number or a list, got a tensor {tuple(one.shape)}: scales of each sample are "
                "guidance.ClassifierFree(tensor)"
            )
        if not isinstance(one, Guidance):
            raise ConfigError(
                "guidance must be an object of fastdiff.guidance or fastdiff.inverse, a number, or a list of them, got "
                f"{short(one)}: for none use guidance=None"
            )
    require_linear(model.process, "guidance", "use VE, VP or another process with alpha and sigma")
    tensor_checks.check_condition(setting.cond, setting.count, setting.device, not model.cond_shape)
    model.condition(setting.cond, setting.count, looks=True)
    every = [one.bind(setting) for one in each]
    guiding = [(one, bound) for one, bound in zip(each, every) if bound.guides]
    guide = guiding[0][0].guide(setting) if rows and len(guiding) == 1 else None
    if not guiding or guide is not None:
        return model, setting.cond, every, guide
    bound = [bound for _, bound in guiding]
    net = Guided(model, bound)
    outer = _Outer(
        net, model.process, net.prediction, "t", model.data_shape,
        model.data_range if model.range_given else None, model.variance, standardize=model.standardize,
    )  # fmt: skip
    outer.cond_shape = model.cond_shape  # whose numbers may be NaN, which means none
    return outer, together(setting.cond, bound) or None, every, None
