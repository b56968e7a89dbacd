"""ScoreModel: a network together with all that its numbers mean."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from . import checks
from .errors import ConfigError, ShapeError, choose, names_keywords, short, warn
from .execution import conditions, modules, tensor_checks
from .execution.calls import answer, dtype_of, like
from .execution.loop import Condition
from .planning import chains, predictions, processes
from .planning.coverage import STANDARDIZED
from .planning.processes import Pair

LEARNED = ("learned", "learned_range")  # variances
R = TypeVar("R")
Array = NDArray[np.float64]


class ScoreModel(nn.Module):
    """A network, the process it was trained on, and what its input and output mean.

    net          callable (x [B, *data_shape], time [B]) -> [B, *data_shape], with a condition as `cond` below
    sde          a process or its name; one without alpha and sigma (see fastdiff.processes.Process) takes "score" only
    prediction   "score", "eps", "x0", "v", "velocity", "data_velocity", "scaled_score", "prev_mean", "increment", "edm" (see
                 fastdiff.predictions)
    time_input   what `time` is: the process time "t", "index", "fractional_index", "index/T", "sigma", "log_sigma", "t*999",
                 "t*1000", "T-t",
                 "c_noise" (EDM's), or a function t [B] -> [B]. Default: "c_noise" for "edm"; on DDPM chains "index", the
                 steps from 0 as published networks count them, but "t" for "score" and for fastdiff's own networks; else "t".
                 A network with a `default_time_input` that is not None has that
    data_range   the range of its training data, and so of its samples (which are not clamped to it), default (−1, 1)
    variance     of ancestral steps: the network returns twice the channels, the second half v for it: "learned" log variance = v;
                 "learned_range" between the bounds log β̃ and log β, share (v + 1)/2 (Nichol & Dhariwal 2021, eq. 15)
    num_classes  it was trained with labels 0 … num_classes − 1, which every call must then give, or, 0, without any; default the
                 network's own `num_classes`, where it has one. `train` sets it to what it trains with
    standardize  (mean, std), each a number or one for each of data_shape: the network sees (x − mean)/std. `sample`, `decode`
                 and likelihoods are in the data's units all the same; latents, x_init, calls of the model and losses in the
                 network's. `train` sets it, and data_range, from data that are vectors, unless the model has either

    cond_shape   it was trained with conditions of this shape, floats [B, *cond_shape] which every call must then give, or, (),
                 without any; default the network's own `cond_shape`, where it has one. `train` sets it
    standardize_cond  (mean, std), each a number or one for each entry of cond_shape's first axis (the numbers of a vector, the
                 channels of a field): the network sees (cond − mean)/std. `train` sets it from the data. Conditions are in the
                 data's units in every call and run
    cond_dropout  the share of its training's samples whose labels and conditions were left out; `train` sets it. Above 0 a label
                 `null_label` and a condition of NaN mean "none", for samples of the unconditional model

    cond, of a call or a run, an entry for each sample: a tensor is the network's third argument, or goes by keyword where its
    forward has a condition's name (y, class_labels, labels, cond, context, …) at another place, class numbers to a label's name
    and other tensors to another; a dict of tensors goes as keywords, or, where the forward has none of its keys, as it is, the
    third argument. Else it is a ConfigError before any call.
    """

    loaded: bool = False  # from a file, so that a training keeps its units and its conditions
    fits_times: ClassVar[bool] = True  # whether a new network of fastdiff's takes the scale of this model's times

    @names_keywords
    def __init__(
        self,
        net: Any,
        sde: processes.Process | str,
        prediction: str = "eps",
        time_input: predictions.TimeInput | None = None,
        data_shape: Sequence[int] = (),
        data_range: tuple[float, float] | None = None,
        variance: str | None = None,
        num_classes: int | None = None,
        standardize: tuple[Any, Any] | None = None,
        cond_shape: Sequence[int] | None = None,
        standardize_cond: tuple[Any, Any] | None = None,
        cond_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not callable(net):
            raise ConfigError(f"net must be callable as net(x, t), got {type(net).__name__}")
        process = processes.get(sde)
        fit_times = getattr(modules.inner(net), "fit_times", None)
        if time_input is None:
            time_input = getattr(modules.inner(net), "default_time_input", None)
        if time_input is None:
            time_input = predictions.default_time_input(prediction, process)
            if time_input == "index" and callable(fit_times):  # it fits itself to process times
                time_input = "t"
        predictions.check(prediction, time_input, process)
        self.net = net
        self.process: processes.Process
        self.prediction: str
        self.time_input: predictions.TimeInput
        self.data_shape: tuple[int, ...]
        self.data_range: tuple[float, float]
        self.range_given: bool  # by the caller, a training or a file
        self.standardize: tuple[Array, Array] | None
        self.variance: str | None
        self.num_classes: int | None
        self.cond_shape: tuple[int, ...] | None
        self.standardize_cond: tuple[Array, Array] | None
        self.cond_dropout: float
        self._taken: tuple[Any, conditions.Takes]
        taken = conditions.takes(net)
        if num_classes is None and taken.labels is not None:
            num_classes = taken.classes or None
        if cond_shape is None:
            cond_shape = taken.shape or None
        vars(self).update(  # past nn.Module's setattr, which is for tensors and modules and takes its time
            process=process, prediction=prediction, time_input=time_input, data_shape=tensor_checks.shape_of(data_shape),
            data_range=(-1.0, 1.0) if data_range is None else checks.pair("data_range", data_range),
            range_given=data_range is not None,
            variance=None if variance is None else choose("variance", variance, LEARNED),
            num_classes=None if num_classes is None else checks.integer("num_classes", num_classes, 0, 2**31 - 1),
            cond_shape=None if cond_shape is None else _shape_of_conditions(cond_shape),
            cond_dropout=checks.number("cond_dropout", cond_dropout, 0, 1, below=True),
            _taken=(net, taken),
        )  # fmt: skip
        vars(self)["standardize"] = (
            None if standardize is None else _moments("standardize", standardize, self.data_shape)
        )
        if standardize_cond is not None and not self.cond_shape:
            raise ConfigError(
                f"standardize_cond={short(standardize_cond, 40)} needs a model with conditions: give cond_shape= too"
            )
        vars(self)["standardize_cond"] = (
            None
            if standardize_cond is None
            else _moments("standardize_cond", standardize_cond, (self.cond_shape or ())[:1])
        )
        if self.fits_times and callable(fit_times):
            fit_times(predictions.time_steps(self.time_input, process))

    def forward(self, x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """The network's output, as it is, at process times t [B] (or one for all), its input scaled and its time converted."""
        return self.outputs(x, t, cond)[0]

    def outputs(self, x: Tensor, t: Tensor, cond: Condition = None) -> tuple[Tensor, Tensor | None]:
        """The network's output, and that for a learned variance, None where there is none."""
        t, cond = self.times(t, x), self.condition(cond, len(x))
        alpha = sigma = None
        if self.process.linear and (self.prediction == "edm" or self.time_input not in predictions.OF_TIME):
            alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        if self.prediction == "edm":
            x = like(predictions.input_scale(self.prediction, self.process, alpha, sigma), x) * x
        time = predictions.network_time(self.time_input, self.process, t, alpha, sigma)
        time = time.round().long() if self.time_input == "index" else time
        return answer(self.net, self.variance, x, time, None, cond)

    def predict(self, kind: str, x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """The network's prediction as "score", "x0", "eps" or any other prediction at process times t [B] (or one)."""
        if not self.process.linear:
            if kind != "score":
                processes.require_linear(self.process, f"a prediction of {kind!r}", "ask for 'score'")
            return self(x, t, cond)  # type: ignore[no-any-return]
        t = self.times(t, x)
        p, q = self.conversion(kind, t, self.process.alpha(t), self.process.sigma(t))
        return like(p, x) * x + like(q, x) * self(x, t, cond)  # type: ignore[no-any-return]

    def conversion(self, target: str | Pair, t: Any, alpha: Any, sigma: Any) -> Pair:
        """(p, q) of target = p·x + q·output at time t, level (α, σ); target is a prediction, or (r, w) of r·x0 + w·ε."""
        if target == self.prediction:
            return 0.0 * alpha, 0.0 * alpha + 1.0
        source = predictions.coordinates(self.prediction, self.process, t, alpha, sigma)
        if isinstance(target, str):
            target = predictions.coordinates(target, self.process, t, alpha, sigma)
        return predictions.convert(source, target, alpha, sigma)

    def times(self, t: Any, x: Tensor) -> Tensor:
        """t as one process time for each sample of x, inside [0, T], where the network can be asked (σ > 0)."""
        if not torch.compiler.is_compiling():
            tensor_checks.check_samples("x", x)
            t = tensor_checks.numbers("t", t, x.device)
        times = torch.as_tensor(t, device=x.device)
        times = times if times.is_floating_point() else times.to(x.dtype)
        if times.ndim > 1 or (times.ndim == 1 and times.shape[0] != 1 and times.shape[0] != x.shape[0]):
            raise ShapeError(f"t must be one time or one for each of {len(x)} samples, got shape {tuple(times.shape)}")
        # on other devices a look at the values would stall them, in a compiled graph it would break it
        if conditions.are_seen(times):
            first, last = self.process.first_time, self.process.T * 1.000001
            low, high = times.aminmax()
            # of the lowest σ, as σ/α grows with t; which time it is only where one is
            inside = float(low) >= first and float(high) <= last
            if not inside or (self.process.linear and not float(self.process.sigma(low)) > 0):
                bad = ~((times >= first) & (times <= last))
                if self.process.linear:
                    bad |= ~(self.process.sigma(times) > 0)
                value, top = float(times[bad].flatten()[0]), f"{self.process.T:g}]"
                open_end = self.process.linear and first == 0
                allowed = f"(0, {top}, where sigma > 0" if open_end else f"[{first:g}, {top}"
                raise ConfigError(f"t must lie in {allowed}, got {value:g}")
        return times.expand(len(x))

    def standardized(self, x: Tensor) -> Tensor:
        """x [B, *data_shape] in the data's units, in the network's: (x − mean)/std."""
        if self.standardize is None:
            return x
        mean, std = (torch.from_numpy(values).to(x.device) for values in self.standardize)
        return ((x.double() - mean) / std).to(x.dtype)

    def in_data_units(self, x: Tensor) -> Tensor:
        """x [B, *data_shape] in the network's units, in the data's: mean + std·x."""
        if self.standardize is None:
            return x
        mean, std = (torch.from_numpy(values).to(x.device) for values in self.standardize)
        return (mean + std * x.double()).to(x.dtype)

    def outside(self, x: Tensor, slack: float = 0.0) -> str | None:
        """How far x in the data's units lies outside of their range, in words, where by more than a width beside `slack`."""
        (low, high), (least, most) = (
            self.data_range,
            (float(end) for end in x.aminmax()) if x.numel() else self.data_range,
        )
        if least >= 2 * low - high - slack and most <= 2 * high - low + slack:
            return None
        return f"from {least:.4g} to {most:.4g}, far outside of data_range ({low:g}, {high:g})"

    def look_at_units(self, name: str, given: Tensor) -> None:
        """Warn where data that a caller gave are far outside of the range that the model was told."""
        far = self.outside(given) if self.range_given else None
        if far is not None:
            warn(f"{name} runs {far}: give it in the units of the samples")

    @property
    def network_range(self) -> tuple[float, float] | None:
        """What most data lie in, in the network's units; None where the model was not told."""
        if self.standardize is not None:
            return STANDARDIZED
        return self.data_range if self.range_given else None

    @property
    def takes(self) -> conditions.Takes:
        """What the network takes beside x and the time."""
        net, taken = self._taken
        if net is not self.net:
            net, taken = self._taken = (self.net, conditions.takes(self.net))
        return taken

    def condition(self, cond: Any, count: int, looks: bool = False) -> Condition:
        """cond of `count` samples as `call` hands it to the network; refused where the network has no place for it, or was
        trained with another kind.

        looks  at the values of labels also where that would stall a device
        """
        taken = self.takes
        if cond is None and not taken.needs and not self.num_classes and not self.cond_shape:
            return None
        given, by_name, null = conditions.arranged(taken, cond), isinstance(cond, dict), self.null_label
        if given is not None and (self.num_classes == 0 or self.cond_shape == ()):
            conditions.check_untrained(taken, given, self.num_classes, self.cond_shape)
        if self.num_classes:
            labels = conditions.check_labels(taken, given, count, self.num_classes, null, looks, by_name)
        if not self.cond_shape:
            return given
        dropped = self.cond_dropout > 0
        value = conditions.check_vectors(taken, given, count, self.cond_shape, dropped, looks, by_name)
        if self.num_classes and null is not None:
            conditions.check_together(labels, value, null, looks)
        value = self._standardized_condition(value)
        return type(given)({**given, str(taken.tensor): value}) if isinstance(given, dict) else value

    @property
    def null_label(self) -> int | None:
        """The label that means none, of a model that was trained with labels and without (`cond_dropout`), else None."""
        return (self.takes.classes or self.num_classes) if self.num_classes and self.cond_dropout else None

    def _standardized_condition(self, cond: Tensor) -> Tensor:
        """cond [B, *cond_shape] in the data's units, in the network's and in its precision: (cond − mean)/std."""
        dtype = dtype_of(self.net, cond.dtype)
        if self.standardize_cond is None:
            return cond.to(dtype)
        per_channel = (-1, *[1] * (cond.ndim - 2))
        mean, std = (processes.placed(v, cond, torch.float64).view(per_channel) for v in self.standardize_cond)
        standardized: Tensor = (cond.double() - mean) / std
        return standardized.to(dtype)

    def __repr__(self) -> str:
        net = modules.inner(self.net)
        extra = "" if self.variance is None else f", variance={self.variance!r}"
        extra += f", num_classes={self.num_classes}" if self.num_classes else ""
        extra += f", cond_shape={self.cond_shape}" if self.cond_shape else ""
        extra += f", cond_dropout={self.cond_dropout:g}" if self.cond_dropout else ""
        extra += "" if self.standardize is None else ", standardized"
        return (
            f"{type(self).__name__.lstrip('_')}({getattr(net, '__name__', type(net).__name__)}, {short(self.process, 90)}, "
            f"prediction={self.prediction!r}, time_input={short(self.time_input)}, data_shape={self.data_shape}, "
            f"data_range={self.data_range}{extra})"
        )

    def score(self, x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """∇ log p_t(x), [B, *]."""
        return self.predict("score", x, t, cond)

    def check(self, data: Any, **options: Any) -> Any:
        """fastdiff.check(model, data, …): whether what is said of the network can be right, by its denoising error on data."""
        return _above["check"](self, data, **options)


class _Described(ScoreModel):
    """A plain callable with what the caller says of it, for one run, which leaves it as it is."""

    fits_times = False


def _shape_of_conditions(cond_shape: Any) -> tuple[int, ...]:
    if isinstance(cond_shape, str) or not isinstance(cond_shape, Iterable):
        raise ConfigError(f"cond_shape must be the shape of one condition, such as (3,), got {short(cond_shape)}")
    return tuple(checks.integer("cond_shape", n, 1, 2**31 - 1) for n in cond_shape)


def _moments(name: str, standardize: Any, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """(mean, std) as float64 arrays of this shape."""
    try:
        mean, std = (np.array(np.broadcast_to(np.asarray(v, np.float64), shape)) for v in standardize)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name} must be (mean, std), each a number or one for each of {shape}, got {standardize!r:.60}"
        ) from error
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ConfigError(f"{name} must be finite numbers (mean, std) with std > 0, got {standardize!r:.60}")
    return mean, std


_above: dict[str, Callable[..., Any]] = {}


def stands_above(function: R) -> R:
    """Register a function that this module calls by its name, of a module that stands above it."""
    _above[function.__name__] = function  # type: ignore[attr-defined, assignment]
    return function


def opened(model: Any) -> Any:
    """The model of a path or a shipped name; anything else as it is."""
    return _above["load"](model) if isinstance(model, (str, os.PathLike)) and "load" in _above else model


def as_model(
    model: Any, sde: Any, shape: Any, prediction: str | None, time_input: predictions.TimeInput | None,
    variance: str | None = None,
) -> ScoreModel:  # fmt: skip
    """The ScoreModel of a run: a ScoreModel as it is, whose facts the caller may repeat; a plain callable by the caller's.

    variance   what the sampler needs where the model says nothing of it
    """
    model = opened(model)
    if isinstance(model, ScoreModel):
        facts = {"prediction": model.prediction, "time_input": model.time_input, "shape": model.data_shape}
        claims = {"prediction": prediction, "time_input": time_input, "shape": shape and tensor_checks.shape_of(shape)}
        for name, value in claims.items():
            if value is not None and (type(value) is not type(facts[name]) or value != facts[name]):
                raise ConfigError(f"{name}={short(value)} contradicts the model's own {facts[name]!r}: leave it out")
        if variance is None or model.variance is not None:
            return model
        other = copy.copy(model)
        other.variance = variance
        return other
    if not callable(model):
        raise ConfigError(f"model must be a ScoreModel or a callable (x, t) -> tensor, got {type(model).__name__}")
    if sde is None:
        raise ConfigError(f"sde must be given with a plain callable: one of {', '.join(processes.PROCESSES)}")
    if shape is None:
        raise ConfigError("shape must be given with a plain callable: one sample's shape, such as shape=(2,)")
    prediction = "score" if prediction is None else prediction
    return _Described(model, sde, prediction, time_input, shape, variance=variance)


def check_path(sde: Any, process: processes.Process) -> None:
    """Refuse a process, or the name of one, that is not on the model's path: its own, or a chain on it."""
    if sde is None or sde in (process, process.name):
        return
    if isinstance(sde, str):
        choose("sde", sde, processes.PROCESSES)
        if chains.has_chain(process, sde):
            return
    elif not isinstance(sde, processes.Process):
        raise ConfigError(f"sde must be a name or a process such as fastdiff.VP(), got {type(sde).__name__}")
    elif chains.on_path(sde, process):
        return
    raise ConfigError(
        f"sde={short(sde)} is not the process of this model, {process!r:.60}: leave sde out, or use sde={process.name!r}"
    )
