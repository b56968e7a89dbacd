"""train_classifier(): a classifier of noisy samples, for classifier guidance."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..data import LazyData, load_data
from ..errors import ConfigError, CorruptCheckpointError, DataError, ShapeError, choose, names_keywords, short
from ..execution import ops, tensor_checks
from ..execution.calls import parameters
from ..execution.modes import leaves_no_trace
from ..execution.monitor import bar
from ..execution.noise import PERTURBATION
from ..model import ScoreModel, opened
from ..networks.classifiers import CLASSIFIERS, MLPClassifier, WideResNet, build_classifier
from ..planning import predictions, processes
from ..planning.processes import Process, require_linear
from . import checkpoint as files
from . import fitting, sources
from .batches import Batches
from .objective import VLB_WEIGHT, Objective

MOST = 1e4  # the noise ratio of the highest level: there is nothing to see beyond


class TimeClassifier(nn.Module):
    """A classifier of noisy samples: (x_t [B, *data_shape], process times t [B]) -> logits [B, num_classes].

    net          (x_t, u [B]) -> logits, u = 0 … 1 where log σ/α stands between its ends on the process
    process      that of the samples; data_shape, data_range and standardize as a ScoreModel has them
    time_input   what the network is told in u's place, by a ScoreModel's name of it, such as "index"; "level" is u
    loss         of each step of its training
    """

    def __init__(
        self, net: nn.Module, process: Process, num_classes: int, data_shape: tuple[int, ...], data_range: tuple[float, float],
        range_given: bool = True, standardize: Any = None, time_input: str = "level",
    ) -> None:  # fmt: skip
        super().__init__()
        self.time_input = choose("time_input", time_input, ("level", *predictions.TIME_INPUTS))
        self.net, self.process, self.num_classes = net, process, num_classes
        self.data_shape, self.data_range, self.range_given = tuple(data_shape), tuple(data_range), range_given
        self.standardize = standardize
        self.loss = torch.empty(0)
        ends = process.training_times(torch.tensor([0.0, 1 - 2**-24], dtype=torch.float64))
        self.low, self.high = process.sigma_hat(ends).clamp(1e-12, MOST).log().tolist()
        self._told(ends, torch.float32)  # refuses a time input that the process does not define

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.data_shape:
            raise ShapeError(f"x must be samples [B, {', '.join(map(str, self.data_shape))}], got {tuple(x.shape)}")
        dtype = next(self.net.parameters()).dtype
        return self.net(x.to(dtype), self._told(t.double(), dtype).expand(len(x)))  # type: ignore[no-any-return]

    def _told(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The time that a network of this dtype is told."""
        if self.time_input == "level":
            level = self.process.sigma_hat(t).clamp(1e-12, MOST).log()
            return ((level - self.low) / (self.high - self.low)).clamp(0, 1).to(dtype)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        time: Tensor = predictions.network_time(self.time_input, self.process, t, alpha, sigma)
        # half precision does not hold a thousand steps
        return time.round().long() if self.time_input == "index" else time.to(torch.promote_types(dtype, torch.float32))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to `path` (.safetensors is added where it lacks), whole or not at all."""
        name = next((name for name, kind in CLASSIFIERS.items() if type(self.net) is kind), None)
        if name is None:
            raise ConfigError(
                f"net must be one of {', '.join(kind.__name__ for kind in CLASSIFIERS.values())} to be saved, got "
                f"{type(self.net).__name__}: save its state_dict"
            )
        described = {
            "net": {"name": name, **self.net.config},
            "process": self.process.config(),
            "num_classes": self.num_classes,
            "data_shape": list(self.data_shape),
            "data_range": list(self.data_range),
            "range_given": self.range_given,
            "standardize": None if self.standardize is None else [values.tolist() for values in self.standardize],
            "time_input": self.time_input,
        }
        tensors = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        return files.write(path, tensors, {"classifier": described})

    @classmethod
    @names_keywords
    def load(
        cls, path: str | os.PathLike[str], *, sde: Process | None = None, source: str | None = None,
        config: Mapping[str, Any] | str | None = None, part: str | None = None,
    ) -> TimeClassifier:  # fmt: skip
        """The classifier of a file that `save` wrote; with `source`, of another library's file.

        sde     the process, where it is one of your own
        source  "guided-diffusion": a classifier of OpenAI's, as a UNetClassifier that is told the steps of its chain
        config, part   as in fastdiff.load; what was published is known by its name, "64x64_classifier"

        Errors: those of fastdiff.load.
        """
        if source is not None:
            if sde is not None:
                raise ConfigError(f"sde is of fastdiff's own files, got it with source={source!r}: leave it out")
            return cls(**sources.classifier(path, source, config, part)).requires_grad_(False).eval()
        if config is not None or part is not None:
            raise ConfigError(
                f"config and part are of other libraries' files: say whose, source= one of {', '.join(sources.CLASSIFIERS)}"
            )
        return cls._load(path, sde)

    @classmethod
    def _load(cls, path: str | os.PathLike[str], sde: Process | None) -> TimeClassifier:
        source = files.files.path("path", path)
        header, tensors = files.read(source, "net.")
        shown = files.files.shown(source)
        try:
            config = dict(header["classifier"])
            process = files._process(config.pop("process"), sde, source)
            net = build_classifier(config.pop("net"))
            moments = config.pop("standardize")
            moments = None if moments is None else tuple(np.array(values, dtype=np.float64) for values in moments)
            made = cls(net, process, standardize=moments, **config)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptCheckpointError(f"{shown} does not describe a classifier: {short(error)}") from error
        files.check(net, tensors, source)
        net.load_state_dict(tensors)
        return made.requires_grad_(False).eval()

    def __repr__(self) -> str:
        return (
            f"TimeClassifier({type(self.net).__name__}, {short(self.process, 90)}, num_classes={self.num_classes}, "
            f"data_shape={self.data_shape})"
        )


@leaves_no_trace
@names_keywords
def train_classifier(
    model_or_sde: Any,
    data: Any,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    times: Any = "stratified",
    dropout: float = 0.0,
    net: nn.Module | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> TimeClassifier:
    """Train a classifier of noisy samples, p(y | x_t) at every t, for `guidance.Classifier`.

        min E_t E −log p(y | α_t x0 + σ_t ε, t)            a mixture of cross-entropies over times (Song et al. 2021, appendix I)

    model_or_sde  the ScoreModel that it is to guide, or the path or name of one: the classifier sees its units; or a process or
                  its name: then the data are taken as they are
    data          a Data with labels, or a source of fastdiff.load_data that has them
    lr            of Adam, falling to 0 as a half cosine
    times         a rule of fastdiff.losses.times, as in `train`
    net           a network of your own, (x_t [B, *], u [B]) -> logits [B, classes], trained in place, where u = 0 … 1 is the
                  level of the noise, log σ/α between its ends. Default an MLPClassifier for vectors, a WideResNet for samples
                  with one to three axes beside their channels (fastdiff.networks.classifiers), with `dropout`
    seed          weights, order, times, noise and dropout are a function of it; no global generator is touched
    device        where it is trained; default the model's

    Returns the TimeClassifier in evaluation mode, without gradients of its weights. Errors: ConfigError, ShapeError and DataError
    before any work; DataError where the loss is not finite.
    """
    steps, seed = checks.integer("steps", steps, 1, 10**9), checks.integer("seed", seed, 0, 2**64 - 1)
    batch_size, lr = checks.integer("batch_size", batch_size, 1, 10**9), checks.number("lr", lr, 0, above=True)
    whole = load_data(data)
    source = whole.some if isinstance(whole, LazyData) else whole
    if source.labels is None or source.num_classes is None or source.num_classes < 2:
        raise ConfigError(f"data must have labels of two classes or more, got {short(source, 80)}: Data(x, labels)")
    model = (
        opened(model_or_sde)
        if isinstance(model_or_sde, (str, os.PathLike)) and model_or_sde not in processes.PROCESSES
        else model_or_sde
    )
    place = _place(model, net, device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), torch.device("cpu"):
        torch.manual_seed(seed)
        made = _made(model, source, net, dropout, place)
        batches = _batches(made, whole, source, times, {"batch_size": batch_size, "seed": seed, "dequantize": False})
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            bar(progress, steps, "train_classifier", "step") as display,
        ):
            made.loss = _trained(made, batches, steps, lr, display)
    return made.requires_grad_(False).eval()


def _place(model: Any, net: nn.Module | None, device: Any) -> torch.device:
    own = next(parameters(net if net is not None else getattr(model, "net", None)), None)
    return tensor_checks.device_of(own.device if device is None and own is not None else device)


def _made(model: Any, data: Any, net: nn.Module | None, dropout: float, place: torch.device) -> TimeClassifier:
    """The classifier before its training."""
    if isinstance(model, ScoreModel):
        process, shape = model.process, model.data_shape
    else:
        process, shape = processes.get(model), data.shape
    require_linear(process, "train_classifier", "use VE, VP or another process with alpha and sigma")
    if data.shape != shape:
        raise ShapeError(f"data must have the model's data_shape {shape}, got samples of {data.shape}")
    if net is None:
        kind = WideResNet if 2 <= len(shape) <= 4 else MLPClassifier
        net = kind(shape, data.num_classes, dropout=dropout)
    elif not isinstance(net, nn.Module) or next(net.parameters(), None) is None:
        raise ConfigError(f"net must be a torch.nn.Module with parameters, got {short(net)}")
    elif dropout:
        raise ConfigError(f"dropout={dropout:g} is of fastdiff's own networks: leave it out, and put one into net")
    given = isinstance(model, ScoreModel) and model.range_given
    scaled = model.data_range if given else data.range
    return TimeClassifier(
        net.to(place), process, data.num_classes, shape, scaled, given, getattr(model, "standardize", None)
    )


def _batches(made: TimeClassifier, whole: Any, source: Any, times: Any, options: dict[str, Any]) -> Batches:
    """Clean data in the classifier's units, labels, times and noise of each step."""
    model = ScoreModel(
        made.net, made.process, "x0", "t", made.data_shape, made.data_range, num_classes=made.num_classes,
        standardize=made.standardize,
    )  # fmt: skip
    fitting.check_scale(source, model)
    objective = Objective.of(model, source, False, "dsm", None, times, "hard", None, VLB_WEIGHT)
    return Batches(whole, model, objective, options)


def _trained(made: TimeClassifier, batches: Batches, steps: int, lr: float, display: Any) -> Tensor:
    adam = torch.optim.Adam(made.parameters(), lr)
    recorded = torch.empty(steps, device=batches.device)
    made.train()
    try:
        for step in range(steps):
            for group in adam.param_groups:
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = batches(step)
            t = batch.drawn.t
            alpha, sigma = made.process.alpha(t), made.process.sigma(t)
            x = ops.perturb(batch.x0, alpha.to(batch.x0.dtype), sigma.to(batch.x0.dtype), batch.cursor, PERTURBATION)
            values = F.cross_entropy(_logits(made, x, t), batch.cond, reduction="none")  # type: ignore[arg-type]
            loss = batches.objective.mean(values, batch.drawn)
            adam.zero_grad()
            loss.backward()
            adam.step()
            recorded[step] = loss.detach()
            if (step + 1) % 100 == 0 or step + 1 == steps:
                recent = float(recorded[max(step - 99, 0) : step + 1].mean())
                if not math.isfinite(recent):
                    raise DataError(
                        f"the classifier's loss is not finite within steps {max(step - 99, 0)} to {step}: lower lr"
                    )
                display.set_postfix(loss=f"{recent:.4f}")
            display.update()
    finally:
        batches.close()
    return recorded.cpu()


def _logits(made: TimeClassifier, x: Tensor, t: Tensor) -> Tensor:
    logits: Tensor = made(x, t)
    if not isinstance(logits, Tensor) or logits.shape != (len(x), made.num_classes):
        raise ShapeError(
            f"net must return logits [B, {made.num_classes}], one for each class, got {short(logits)} of {len(x)} samples"
        )
    return logits
