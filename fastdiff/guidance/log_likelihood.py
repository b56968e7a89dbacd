"""Guidance by a gradient: of any log-likelihood of the data, or of a classifier of noisy samples.

E[x0 | x_t, y] = E[x0 | x_t] + σ²/α ∇ log p(y | x_t)        (Tweedie's formula with and without y)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, DeviceError, DTypeError, ShapeError, choose, short
from ..execution import tensor_checks
from ..execution.calls import dtype_of, like, parameters
from ..execution.conditions import INTEGERS
from ..execution.modes import evaluating
from ..planning.processes import Process
from .base import Bound, Guidance, Moment, Setting, units
from .weights import check_scale, each_of, scales

SEED = 0x106  # of the samples that a function is asked with before a run


@dataclass(frozen=True, eq=False)
class LogLikelihood(Guidance):
    """Guidance by any differentiable log p(y | x0), or log p(y | x_t).

        x̂0 ← x̂0 + scale·σ²/α ∇_{x_t} log p(y | x̂0(x_t))            (Chung et al. 2023, eq. 10, with a likelihood of one's own)

    function  of="x0": (x0 [B, *]) -> [B], of the predicted x0 in the data's units; of="x_t": (x_t [B, *], t [B]) -> [B], of the
              state in the network's units and the process time, without a gradient through the network. Up to a constant
    scale     of the gradient; a number, negative allowed, or a tensor [num_samples]

    A call takes one forward pass and one vector-Jacobian product. Each value must depend on its own sample alone, so that each
    gradient does: a function that couples samples is refused, before any work, as is one without a gradient. p(y | x̂0) is not
    p(y | x_t): it leaves out the spread of x0 given x_t, so the samples are narrower than the posterior (docs/control.md).
    """

    function: Callable[..., Tensor]
    scale: float | Tensor = 1.0
    of: str = "x0"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigError(f"function must be callable, function(x0 [B, *]) -> [B], got {short(self.function)}")
        object.__setattr__(self, "scale", check_scale(self.scale))
        choose("of", self.of, ("x0", "x_t"))

    def bind(self, setting: Setting) -> Bound:
        return OfPrediction(self, setting) if self.of == "x0" else OfState(self.function, self.scale, setting)


@dataclass(frozen=True, eq=False)
class Classifier(Guidance):
    """Classifier guidance: the score is shifted by scale·∇ log p(y | x_t) (Song et al. 2021, eq. 14; Dhariwal & Nichol 2021,
    Alg. 2, where ε is by −scale·σ ∇ log p).

    classifier  (x_t [B, *], t [B]) -> logits [B, classes], of noisy samples in the network's units and process times (on a DDPM
                chain 1 … T: one that counts from 0 is `lambda x, t: net(x, t - 1)`), as fastdiff.train_classifier gives
    y           the class to sample: a number for all samples, or integers [num_samples]
    scale       1: p(x | y) of an exact classifier; larger: p(x) p(y | x)^scale at each level; negative allowed. A number, or a
                tensor [num_samples]

    Dhariwal & Nichol's Alg. 1 shifts the mean of an ancestral step by scale·Σ ∇ log p(y | x_t) instead. With x̂0 shifted by
    σ²/α ∇ log p that mean moves by β_t/√(1 − β_t) ∇ log p: the same form, with β_t/√(1 − β_t) in the place of the step's variance
    Σ, which is β_t, β̃_t or learned; for small steps there is no difference. Only the classifier is differentiated.
    """

    classifier: Callable[[Tensor, Tensor], Tensor]
    y: int | Tensor
    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if not callable(self.classifier):
            raise ConfigError(
                f"classifier must be callable, classifier(x_t [B, *], t [B]) -> logits, got {short(self.classifier)}"
            )
        y = torch.tensor(int(self.y)) if isinstance(self.y, Integral) and not isinstance(self.y, bool) else self.y
        if not isinstance(y, Tensor) or y.dtype not in INTEGERS:
            got = y.dtype if isinstance(y, Tensor) else short(y)
            raise DTypeError(f"y must be the number of a class, or integers [num_samples], got {got}")
        object.__setattr__(self, "y", y)
        object.__setattr__(self, "scale", check_scale(self.scale))

    def bind(self, setting: Setting) -> Bound:
        return OfClass(self, setting)


class OfPrediction(Bound):
    """∇ log p(y | x̂0(x_t)), through the network."""

    differentiates = True

    def __init__(self, guidance: LogLikelihood, setting: Setting) -> None:
        super().__init__()
        self.function, self.scale = guidance.function, guidance.scale
        self.modules = modules_of(self.function, setting, "function")
        self.parts |= scales(self.scale, setting)
        for count in sizes(setting):
            x = setting.model.in_data_units(draws(count, setting))
            probe(self.function, x, (), "function", self.function)

    def __call__(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        value = self.function(moment.model.in_data_units(moment.x0))
        slope = moment.gradient(value.sum())
        return moment.x0 + like(each_of(self.scale, parts, moment.sigma), slope) * moment.tweedie * slope


class OfState(Bound):
    """∇ log p(y | x_t) of a function of the state; nothing goes through the network."""

    name = "function"

    def __init__(self, function: Callable[..., Tensor], scale: float | Tensor, setting: Setting) -> None:
        super().__init__()
        self.function, self.scale = function, scale
        self.modules = modules_of(function, setting, self.name)
        self.parts |= scales(scale, setting)
        for count in sizes(setting):
            x = draws(count, setting)
            t = setting.model.process.training_times(torch.full((count,), 0.5, dtype=x.dtype, device=x.device))
            self.ask(x, t)

    def ask(self, x: Tensor, t: Tensor) -> None:
        """Refuse a function that no run can use, by samples and times."""
        probe(self.function, x, (t,), self.name, self.function)

    def value(self, x: Tensor, t: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """log p(y | x_t), [B]."""
        return self.function(x, t)

    def __call__(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        x = moment.x.detach().clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.value(x, moment.t, parts).sum(), x)
        return moment.x0 + like(each_of(self.scale, parts, moment.sigma), slope) * moment.tweedie * slope


class OfClass(OfState):
    """∇ log p(y | x_t) of a classifier's logits."""

    name = "classifier"

    def __init__(self, guidance: Classifier, setting: Setting) -> None:
        check_units(guidance.classifier, setting)
        self.classes = 0
        super().__init__(guidance.classifier, guidance.scale, setting)
        y: Tensor = guidance.y  # type: ignore[assignment]
        if tuple(y.shape) not in ((), (setting.count,)):
            raise ShapeError(
                f"y must be one class for all samples, or one for each of num_samples={setting.count}, got {tuple(y.shape)}"
            )
        if y.numel() and self.classes and not (int(y.min()) >= 0 and int(y.max()) < self.classes):
            raise DataError(
                f"y must hold classes 0 to {self.classes - 1}, as the classifier gives {self.classes} logits, got "
                f"{int(y.min())} to {int(y.max())}"
            )
        self.parts["y"] = y.to(setting.device, torch.int64).expand(setting.count)

    def ask(self, x: Tensor, t: Tensor) -> None:
        def highest(x: Tensor, t: Tensor) -> Tensor:
            logits = self.logits(x, t)
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
                raise ShapeError(
                    f"classifier must return logits [B, classes] of at least two classes, got {short(logits)} of {len(x)} samples"
                )
            self.classes = logits.shape[1]
            return logits.log_softmax(1)[:, 0]

        probe(highest, x, (t,), self.name, self.function)

    def logits(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x.to(dtype_of(self.function, x.dtype)), t)

    def value(self, x: Tensor, t: Tensor, parts: dict[str, Tensor]) -> Tensor:
        return self.logits(x, t).log_softmax(1).gather(1, parts["y"][:, None])[:, 0]


def check_units(classifier: Any, setting: Setting) -> None:
    """Refuse a classifier that says what it was trained on, and was trained on something else than the model."""
    model = setting.model
    process = getattr(classifier, "process", None)
    if isinstance(process, Process) and process != model.process:
        raise ConfigError(
            f"classifier was trained on {short(process, 40)}, and the model on {short(model.process, 40)}: "
            "train_classifier(model, data, …)"
        )
    shape = getattr(classifier, "data_shape", model.data_shape)
    if isinstance(process, Process) and tuple(shape) != model.data_shape:
        raise ShapeError(
            f"classifier is of samples {tuple(shape)}, and the model of {model.data_shape}: train one for it"
        )
    own, wanted = units(classifier), units(model)
    if own is not None and wanted is not None and own != wanted:
        raise ConfigError("classifier was trained in other units than the model: train_classifier(model, data, …)")


def modules_of(function: Any, setting: Setting, name: str) -> tuple[nn.Module, ...]:
    """The function, if it is a network: then on the run's device."""
    if not isinstance(function, nn.Module):
        return ()
    place = next(parameters(function), None)
    if place is not None and place.device != setting.device:
        raise DeviceError(
            f"{name} must be on {setting.device}, got one on {place.device}: use {name}.to({str(setting.device)!r})"
        )
    return (function,)


def sizes(setting: Setting) -> set[int]:
    """The numbers of samples that a run asks with at a time."""
    batch = min(setting.batch or setting.count, setting.count)
    return {size for size in (batch, setting.count % batch if batch else 0) if size}


def draws(count: int, setting: Setting) -> Tensor:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn((count, *setting.model.data_shape), generator=generator, device="cpu")
    return x.to(setting.device, setting.dtype)


def probe(function: Callable[..., Any], x: Tensor, more: tuple[Tensor, ...], name: str, net: Any) -> None:
    """Refuse a function that does not give [B] numbers of [B, *] samples, each with a gradient, and of its own sample alone.

    net   what is asked in evaluation mode, if it is a network
    """
    with evaluating(net), torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        value = function(x, *more)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise DTypeError(f"{name} must return a tensor of real numbers [B], got {got}")
        if value.shape != (len(x),):
            raise ShapeError(
                f"{name} must return a number for each sample, [{len(x)}], got {list(value.shape)}: sum over all axes but one"
            )
        tensor_checks.check_device(f"what {name} returns", value, x.device)
        slope = torch.autograd.grad(value[0], x, allow_unused=True)[0] if value.requires_grad else None
    if slope is None:
        raise ConfigError(
            f"{name} must have a gradient with respect to x, and has none: look in it for no_grad, detach, argmax or numpy"
        )
    if bool((slope[1:].nan_to_num() != 0).any()):
        raise ConfigError(
            f"{name} must give each sample a number of its own, and that of one depends on others: no mean or sum over the batch"
        )
