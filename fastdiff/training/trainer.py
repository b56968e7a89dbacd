"""train(): Adam with warm-up, clipping and EMA on any loss of fastdiff.losses; every step is a function of the seed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .. import checks, losses
from ..data import Data, load_data
from ..errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    DataError,
    ShapeError,
    choose,
    names_keywords,
)
from ..execution import noise, ops
from ..execution.monitor import bar
from ..execution.torch_private import foreach_lerp_
from ..model import ScoreModel, leaves_no_trace, stepping
from ..planning.schedules import ema_decay
from . import checkpoint as files


@dataclass(frozen=True, eq=False, repr=False)
class Training:
    """One call of `train`: the loss of each of its steps [steps], the number of the last step, its seconds."""

    loss: Tensor
    steps: int
    seconds: float

    def __repr__(self) -> str:
        recent = f", mean loss {self.loss[-100:].mean():.4g} at the end" if len(self.loss) else ""
        return f"Training({len(self.loss)} steps to {self.steps}{recent}, {self.seconds:.1f} s)"


@leaves_no_trace
@names_keywords
def train(
    model: ScoreModel,
    data: Any,
    *,
    steps: int,
    loss: str = "dsm",
    probe: str | None = None,
    batch_size: int = 128,
    lr: float = 2e-4,
    warmup: int = 1000,
    decay: bool = False,
    grad_clip: float | None = 1.0,
    ema: float = 0.999,
    dequantize: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    resume: bool = True,
    progress: bool | None = None,
    callback: Callable[[int, float], object] | None = None,
) -> Training:
    """Train `model` in place up to step `steps`, and leave it with the averaged (EMA) weights, in evaluation mode.

    data          a Data, or a source of fastdiff.load_data: arrays, .npy, .npz, IDX files, folders of images, "digits";
                  scaled from its range to the model's data_range; its labels are used if the network has num_classes
    loss          "dsm", "simple" or "likelihood"; without a transition density "ism", "ssm" or "ssm_vr", the last two with
                  `probe` "rademacher" (default) or "normal" (fastdiff.losses.per_sample)
    lr, warmup    Adam (β 0.9, 0.999, ε 1e-8), linear warm-up over `warmup` steps; `decay`: half a cosine to 0 at `steps`
    ema           θ' ← m θ' + (1 − m) θ with m = min(ema, (1 + n)/(10 + n))
    dequantize    add uniform noise of one bin to discrete data (Theis et al. 2016)
    seed          data, times, noise and dropout of step n are a function of (seed, n) alone, so a resumed run gives the
                  same weights as an uninterrupted one
    checkpoint    a directory, written atomically every `checkpoint_every` steps and at the end; `fastdiff.load(directory)`
                  gives the averaged model
    resume        go on from the checkpoint in that directory, which must have the same model, data and options; False
                  overwrites it
    callback      called with (step, mean loss of the last 100 steps) every 100 steps and at the last one
    """
    options, steps, checkpoint_every = _checked(
        {"loss": loss, "batch_size": batch_size, "lr": lr, "warmup": warmup, "decay": decay, "grad_clip": grad_clip,
         "ema": ema, "dequantize": dequantize, "seed": seed}, steps, checkpoint_every,
    )  # fmt: skip
    checks.function("callback", callback)
    described = files.describe(model)
    source = load_data(data)
    _check_data(source, model, options["dequantize"])
    kind = losses.check(model, options["loss"], probe)
    options |= {"probe": kind} if options["loss"] in losses.SLICED else {}
    state = _State(model.net, options["lr"], options["ema"])
    options |= {"data": source.fingerprint(), "steps": steps if decay else None}  # a decayed rate depends on the end
    if checkpoint is not None:
        files.as_json(described)  # refuse before the first step what could not be saved after it
    folder = _folder(checkpoint)
    if folder is not None and resume and (folder / files.FILE).exists():
        state.read(folder / files.FILE, options, described)
    began, first = time.perf_counter(), state.step
    with stepping(model.net):
        modes = [(module, module.training) for module in model.modules()]
    # networks may draw from torch's generator (dropout): it is seeded anew each step, and given back afterwards
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        bar(progress, steps, "train", "step", first) as shown,
    ):
        try:
            recorded = _loop(state, _Batches(source, model, options), options, steps, model, folder, checkpoint_every,
                             described, shown, callback)  # fmt: skip
            state.average_into(model.net)
        finally:
            with stepping(model.net):
                for module, training in modes:
                    module.training = training
    with stepping(model.net):
        model.eval()
    return Training(recorded.cpu(), max(steps, first), time.perf_counter() - began)


def _loop(
    state: _State,
    batches: _Batches,
    options: dict[str, Any],
    steps: int,
    model: ScoreModel,
    folder: Path | None,
    checkpoint_every: int,
    described: dict[str, Any],
    shown: Any,
    callback: Callable[[int, float], object] | None,
) -> Tensor:
    """Every step from state.step to `steps`; their losses [steps], NaN where a loss or a gradient was not finite."""
    first = state.step
    recorded = torch.zeros(max(steps - first, 0), device=batches.device)
    with stepping(model.net):
        model.net.train()
    for step in range(first, steps):
        torch.manual_seed((options["seed"] * 1_000_003 + step) % 2**63)
        x0, t, cursor, cond = batches(step)
        value = losses.per_sample(model, x0, t, cursor, options["loss"], cond, options.get("probe")).mean()
        with losses.differentiating(options["loss"]):
            norm = state.update(value, _rate(step, steps, options), options["grad_clip"])
        recorded[step - first] = value.detach() + 0 * norm
        last = step + 1 == steps
        save_now = folder is not None and ((step + 1) % checkpoint_every == 0 or last)
        if (step + 1) % 100 == 0 or last or save_now:
            recent = _recent(recorded[: step - first + 1], first)
            shown.set_postfix(loss=f"{recent:.4f}")
            if callback is not None and ((step + 1) % 100 == 0 or last):
                callback(step + 1, recent)
        if save_now:
            state.write(folder / files.FILE, described, options)  # type: ignore[operator]
        shown.update()
    return recorded


class _State:
    """All that a checkpoint of a run holds: the weights, Adam's moments, the averaged weights, the step."""

    def __init__(self, net: nn.Module, lr: float, ema: float) -> None:
        self.net, self.step = net, 0
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("model must have parameters that require gradients: there is nothing to train")
        self.adam = torch.optim.Adam(self.parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8)

        def average(averaged: Any, current: Any, count: Any) -> None:
            foreach_lerp_(averaged, current, 1 - ema_decay(self.step, ema))

        self.averaged = AveragedModel(net, multi_avg_fn=average)

    def update(self, loss: Tensor, rate: float, grad_clip: float | None) -> Tensor:
        """One step of Adam and of the average; returns the norm of the gradient before clipping."""
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if grad_clip is None else grad_clip)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.averaged.update_parameters(self.net)
        self.step += 1
        return norm.detach()

    def average_into(self, net: nn.Module) -> None:
        net.load_state_dict(self.averaged.module.state_dict())

    def write(self, path: Path, described: dict[str, Any], options: dict[str, Any]) -> None:
        """Tensors named net.* are the averaged weights (which `load` reads), raw.* the trained ones, adam.* moments."""
        tensors = {"net." + k: v for k, v in self.averaged.module.state_dict().items()}
        tensors |= {"raw." + k: v for k, v in self.net.state_dict().items()}
        for index, moments in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
        files.write(path, tensors, {"model": described, "step": self.step, "options": options})

    def read(self, path: Path, options: dict[str, Any], described: dict[str, Any]) -> None:
        """Continue from a checkpoint, which must be of the same run."""
        header, averaged = files.read(path, "net.")
        was = {**header.get("model", {}), **header.get("options", {})}
        for name, value in json.loads(json.dumps({**described, **options})).items():
            if was.get(name) != value:
                raise CheckpointMismatchError(
                    f"{path} was trained with {name}={was.get(name)!r:.60}, now {value!r:.60}: choose another directory, "
                    "or give resume=False to overwrite it"
                )
        files.fill(self.net, files.read(path, "raw.")[1], path)
        files.fill(self.averaged.module, averaged, path)
        self.step = int(header["step"])
        self.averaged.n_averaged.fill_(self.step)
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in files.read(path, "adam.")[1].items():
            index, key = name.split(".")
            moments.setdefault(int(index), {})[key] = value
        if moments:
            self.adam.load_state_dict({**self.adam.state_dict(), "state": moments})


class _Batches:
    """The clean data, times, noise cursor and labels of step n: a function of (seed, n)."""

    def __init__(self, data: Data, model: ScoreModel, options: dict[str, Any]) -> None:
        self.data, self.model, self.seed = data, model, options["seed"]
        self.size, self.dequantize = options["batch_size"], options["dequantize"]
        self.device = next(model.net.parameters()).device
        self.labels = data.labels if getattr(model.net, "num_classes", None) else None
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]:
        index, data_range = self._indices(step), self.model.data_range
        if self.dequantize:
            x0 = self.data.dequantized(index, data_range, seed=self.seed, draw=step)
        else:
            x0 = self.data.batch(index, data_range)
        # one time in each of B equal slices: uniform for every sample, and a quieter loss (Kingma et al. 2021, §I.1)
        u = noise.uniform(self.size, (1,), stream=noise.TIMES, device=self.device, seed=self.seed, draw=step)[:, 0]
        u = (torch.arange(self.size, device=self.device) + u) / self.size
        return (
            x0.to(self.device),
            self.model.process.training_times(u.clamp(max=1 - 2**-24)),
            ops.cursor(step, 0, self.seed, self.device),
            None if self.labels is None else {"y": self.labels[index].to(self.device)},
        )

    def _indices(self, step: int) -> Tensor:
        """Positions step·B … (step + 1)·B − 1 of an endless sequence of shuffled epochs."""
        start, count = step * self.size, len(self.data)
        stop, pieces = start + self.size, []
        for epoch in range(start // count, (stop - 1) // count + 1):
            if epoch != self.epoch:
                self.epoch, self.order = epoch, noise.permutation(count, seed=self.seed, draw=epoch)
            pieces.append(self.order[max(start - epoch * count, 0) : stop - epoch * count])
        return torch.cat(pieces)


def _rate(step: int, steps: int, options: dict[str, Any]) -> float:
    """The learning rate of a step: linear warm-up, then constant or half a cosine, without a scheduler's state to save."""
    rate: float = options["lr"] * min(1.0, (step + 1) / max(options["warmup"], 1))
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps)) if options["decay"] else rate


def _recent(recorded: Tensor, first: int) -> float:
    """The mean loss of the last 100 steps; DataError where it is not finite, before the weights are saved."""
    value = float(recorded[-100:].mean())
    if not math.isfinite(value):
        step = first + int(torch.nonzero(~recorded.isfinite())[0])
        raise DataError(f"the loss or its gradient is not finite at step {step}: lower lr, or check the data")
    return value


def _check_data(data: Data, model: ScoreModel, dequantize: bool) -> None:
    if data.shape != model.data_shape:
        raise ShapeError(f"data must have the model's data_shape {model.data_shape}, got samples of {data.shape}")
    if dequantize and data.bins is None:
        raise ConfigError(
            "dequantize=True needs data on discrete levels, got bins=None: give Data(..., bins=) or leave it out"
        )
    if model.variance is not None:
        raise ConfigError(
            f"variance must be None to train in this version, got a model with variance={model.variance!r}: build the "
            "ScoreModel without it"
        )
    classes = getattr(model.net, "num_classes", None)
    if classes and data.num_classes and data.num_classes > classes:
        raise DataError(
            f"data must have labels of at most num_classes={classes} of the network, got {data.num_classes} classes: "
            f"build the network with num_classes={data.num_classes}"
        )


def _folder(checkpoint: str | os.PathLike[str] | None) -> Path | None:
    if checkpoint is None:
        return None
    folder = Path(checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint={folder} cannot be a directory ({error}): choose another") from error
    return folder


def _checked(options: dict[str, Any], steps: Any, checkpoint_every: Any) -> tuple[dict[str, Any], int, int]:
    """The options as plain numbers, the steps, the interval; or a ConfigError."""
    grad_clip = options["grad_clip"]
    checked = {
        "loss": choose("loss", options["loss"], losses.LOSSES),
        "batch_size": checks.integer("batch_size", options["batch_size"], 1, 10**7),
        "lr": checks.number("lr", options["lr"], 0, 1e6, above=True),
        "warmup": checks.integer("warmup", options["warmup"], 0, 10**9),
        "decay": checks.flag("decay", options["decay"]),
        "grad_clip": None if grad_clip is None else checks.number("grad_clip", grad_clip, 0, above=True),
        "ema": checks.number("ema", options["ema"], 0, 1, below=True),
        "dequantize": checks.flag("dequantize", options["dequantize"]),
        "seed": checks.integer("seed", options["seed"], 0, 2**64 - 1),
    }
    return (
        checked,
        checks.integer("steps", steps, 1, 10**9),
        checks.integer("checkpoint_every", checkpoint_every, 1, 10**9),
    )
