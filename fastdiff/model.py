"""ScoreModel: a network together with all that its numbers mean."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .errors import ConfigError, ModelOutputError, ModelOutputTypeError, ShapeError, choose
from .execution import tensor_checks
from .planning import predictions, processes

Condition = Tensor | dict[str, Tensor] | None


class ScoreModel(nn.Module):
    """A network, the process it was trained on, and what its input and output mean.

    net          callable (x [B, *data_shape], time [B], cond) -> [B, *data_shape]
    sde          a process or its name; one known by its sampler alone (fastdiff.processes.Process) takes "score" only
    prediction   "score", "eps", "x0", "v", "scaled_score", "prev_mean", "increment" or "edm" (see fastdiff.predictions)
    time_input   what `time` is: "t", "index", "sigma", "log_sigma", "t*999" or "c_noise" (EDM's, its default)
    data_range   the range of its training data, and so of its samples (which are not clamped to it)
    variance     "learned_range": the network returns twice the channels, the second half for the variance
    """

    def __init__(
        self,
        net: Any,
        sde: processes.Process | str,
        prediction: str = "eps",
        time_input: str | None = None,
        data_shape: Sequence[int] = (),
        data_range: tuple[float, float] = (-1.0, 1.0),
        variance: str | None = None,
    ) -> None:
        super().__init__()
        if not callable(net):
            raise ConfigError(f"net must be callable as net(x, t), got {type(net).__name__}")
        self.net = net
        self.process = processes.get(sde)
        self.prediction = prediction
        self.time_input = predictions.default_time_input(prediction) if time_input is None else time_input
        predictions.check(self.prediction, self.time_input, self.process)
        self.data_shape = tensor_checks.shape_of(tuple(data_shape))
        self.data_range = checks.pair("data_range", data_range)
        self.variance = None if variance is None else choose("variance", variance, ("learned_range",))

    def forward(self, x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """The network's own output at process times t [B] (or one for all), its input scaled and its time converted."""
        t = self.times(t, x)
        alpha, sigma = (self.process.alpha(t), self.process.sigma(t)) if self.process.linear else (None, None)
        if self.prediction == "edm":
            x = like(predictions.input_scale(self.prediction, self.process, alpha, sigma), x) * x
        time = predictions.network_time(self.time_input, self.process, t, alpha, sigma)
        time = time.round().long() if self.time_input == "index" else time
        output = single_tensor(call(self.net, x, time, cond))
        return check_output(output, x.shape, x.device, self.variance)[0]

    def predict(self, kind: str, x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """The network's opinion as "score", "x0", "eps" or any other prediction at process times t [B] (or one)."""
        if not self.process.linear:
            if kind != "score":
                processes.require_linear(self.process, f"a prediction of {kind!r}", "ask for 'score'")
            return self(x, t, cond)
        t = self.times(t, x)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        source, target = (
            predictions.coordinates(name, self.process, t, alpha, sigma) for name in (self.prediction, kind)
        )
        p, q = predictions.convert(source, target, alpha, sigma)
        return like(p, x) * x + like(q, x) * self(x, t, cond)

    def times(self, t: Any, x: Tensor) -> Tensor:
        """t as one process time for each sample of x, inside [0, T], where the network can be asked (σ > 0)."""
        given = torch.as_tensor(t, device=x.device)
        given = given if given.is_floating_point() else given.to(x.dtype)
        if given.ndim > 1 or (given.ndim == 1 and given.shape[0] != 1 and given.shape[0] != x.shape[0]):
            raise ShapeError(f"t must be one time or one for each of {len(x)} samples, got shape {tuple(given.shape)}")
        # on other devices a look at the values would stall them, in a compiled graph it would break it
        if given.device.type == "cpu" and not torch.compiler.is_compiling():
            bad = ~((given >= 0) & (given <= self.process.T * 1.000001))
            if self.process.linear:
                bad |= ~(self.process.sigma(given) > 0)
            if bool(bad.any()):
                value, top = float(given[bad].flatten()[0]), f"{self.process.T:g}]"
                allowed = f"(0, {top}, where sigma > 0" if self.process.linear else f"[0, {top}"
                raise ConfigError(f"t must lie in {allowed}, got {value:g}")
        return given.expand(len(x))

    def score(self, x: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """∇ log p_t(x), [B, *]."""
        return self.predict("score", x, t, cond)


def like(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, …], to multiply x [B, *]."""
    return values.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def call(net: Any, x: Tensor, time: Tensor, cond: Condition, features: Tensor | None = None) -> Any:
    """net(x, time), with a condition as third argument (a tensor) or as keywords (a dict of tensors).

    features  what net.time_features made of the time
    """
    known = {} if features is None else {"features": features}
    if cond is None:
        return net(x, time, **known)
    return net(x, time, **cond, **known) if isinstance(cond, dict) else net(x, time, cond, **known)


def single_tensor(output: Any) -> Tensor:
    """The one tensor of a network's answer: itself, its `.sample`, or the first entry of a tuple."""
    if isinstance(output, Tensor):
        return output
    inner = getattr(output, "sample", None)
    if inner is None and isinstance(output, tuple) and output:
        inner = output[0]
    if not isinstance(inner, Tensor):
        raise ModelOutputTypeError(
            f"the model must return one tensor (or a tuple whose first entry is, or an object with .sample), "
            f"got {type(output).__name__}"
        )
    return inner


def check_output(
    output: Tensor, shape: tuple[int, ...], device: torch.device, variance: str | None
) -> tuple[Tensor, Tensor | None]:
    """The prediction [B, *], and the variance's half of the channels if there is one; nothing is broadcast."""
    if output.layout != torch.strided:
        raise ModelOutputError(f"the model must return a dense strided tensor, got layout {output.layout}")
    if output.device != device:
        raise ModelOutputError(f"the model returned a tensor on {output.device}, its input is on {device}")
    if not output.is_floating_point():
        raise ModelOutputTypeError(f"the model must return floating numbers, got {output.dtype}")
    output = output.resolve_neg()
    if output.shape == shape and variance is None:
        return output, None
    channels = shape[1]
    double = (shape[0], 2 * channels, *shape[2:])
    if output.shape == double:
        if variance is None:
            raise ModelOutputError(
                f"the model returned {2 * channels} channels for {channels}: if half of them are a learned variance, "
                "say ScoreModel(variance='learned_range') or samplers.Ancestral(variance='learned_range')"
            )
        return output[:, :channels], output[:, channels:]
    wanted = tuple(shape) if variance is None else double
    raise ModelOutputError(f"the model returned {tuple(output.shape)}, expected {wanted}")


_lock = threading.Lock()
_borrowed: weakref.WeakKeyDictionary[nn.Module, list[Any]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def evaluating(net: Any) -> Iterator[None]:
    """Evaluation mode for a network, and each submodule's own flag back afterwards; the first thread in sets it, the
    last one out restores it."""
    if not isinstance(net, nn.Module):
        yield
        return
    with _lock:
        entry = _borrowed.setdefault(net, [0, []])
        if entry[0] == 0:
            entry[1] = [module for module in net.modules() if module.training]
            for module in entry[1]:
                module.training = False
        entry[0] += 1
    try:
        yield
    finally:
        with _lock:
            entry[0] -= 1
            if entry[0] == 0:
                for module in entry[1]:
                    module.training = True
                del _borrowed[net]
