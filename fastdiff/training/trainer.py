"""train(): Adam with warm-up, clipping and EMA on any loss of fastdiff.losses, repeatable step by step."""

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
from ..model import ScoreModel
from ..planning.schedules import ema_decay
from . import checkpoint as files


@dataclass(frozen=True, eq=False)
class Training:
    """What a training run was: the loss of each step [steps], the last step, the seconds of this call."""

    loss: Tensor
    steps: int
    seconds: float


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
    """Train `model` in place, up to step `steps`; it ends with the averaged (EMA) weights, in evaluation mode.

    data          a Data, or what fastdiff.training.load_data takes: arrays, .npy, .npz, IDX files, folders of images,
                  "digits"; scaled from its own range to the model's data_range; labels are used if the network has classes
    loss          "dsm", "simple" or "likelihood"; without a transition density "ism", "ssm" or "ssm_vr", the last two with
                  `probe` "rademacher" (default) or "normal" (fastdiff.losses.per_sample)
    lr, warmup    Adam (β 0.9, 0.999, ε 1e-8), linear warm-up over `warmup` steps; `decay`: half a cosine to 0 at `steps`
    ema           θ' ← m θ' + (1 − m) θ with m = min(ema, (1 + n)/(10 + n))
    dequantize    add uniform noise of one bin to discrete data (Theis et al. 2016)
    seed          step n's data, times, noise and dropout are a function of (seed, n) alone: a resumed run is the same run
    checkpoint    a directory: written every `checkpoint_every` steps and at the end, atomically; with `resume` a run goes
                  on from what is there, which must be of the same model, data and options;
                  `fastdiff.load(directory)` gives the averaged model
    callback      (step, loss) each 100 steps
    """
    options, steps, checkpoint_every = _checked(
        {"loss": loss, "batch_size": batch_size, "lr": lr, "warmup": warmup, "decay": decay, "grad_clip": grad_clip,
         "ema": ema, "dequantize": dequantize, "seed": seed}, steps, checkpoint_every,
    )  # fmt: skip
    checks.function("callback", callback)
    described = files.describe(model)
    source = load_data(data)
    _check_data(source, model)
    kind = losses.check(model, options["loss"], probe)
    options |= {"probe": kind} if options["loss"] in losses.SLICED else {}
    state = _State(model.net, options["lr"], options["ema"])
    options |= {"data": source.fingerprint(), "steps": steps if decay else None}  # a decayed rate depends on the end
    if checkpoint is not None:
        files.as_json(described)  # what cannot be written is refused before any step
    folder = _folder(checkpoint)
    if folder is not None and resume and (folder / files.FILE).exists():
        state.read(folder / files.FILE, options, described)
    began, first = time.perf_counter(), state.step
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
            for module, training in modes:
                module.training = training
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
    """All steps from the state's on; returns their losses, [steps], NaN where a loss or a gradient was not finite."""
    first = state.step
    recorded = torch.zeros(max(steps - first, 0), device=batches.device)
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
    """What a resumed run needs: the weights, Adam's moments, the averaged weights, the step."""

    def __init__(self, net: nn.Module, lr: float, ema: float) -> None:
        self.net, self.step = net, 0
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("model must have parameters that require gradients: there is nothing to train")
        self.adam = torch.optim.Adam(self.parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8)

        def average(averaged: Any, current: Any, count: Any) -> None:
            torch._foreach_lerp_(averaged, current, 1 - ema_decay(self.step, ema))

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
        """`net.` the averaged weights (what `load` reads), `raw.` the trained ones, `adam.` its moments."""
        tensors = {"net." + k: v for k, v in self.averaged.module.state_dict().items()}
        tensors |= {"raw." + k: v for k, v in self.net.state_dict().items()}
        for index, moments in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
        files.write(path, tensors, {"model": described, "step": self.step, "options": options})

    def read(self, path: Path, options: dict[str, Any], described: dict[str, Any]) -> None:
        """Go on from a checkpoint, which must be of the same run."""
        header, averaged = files.read(path, "net.")
        was = {**header.get("model", {}), **header.get("options", {})}
        for name, value in json.loads(json.dumps({**described, **options})).items():
            if was.get(name) != value:
                raise CheckpointMismatchError(
                    f"{path} was trained with {name}={was.get(name)!r:.60}, now {value!r:.60}: take another directory, "
                    "or resume=False to overwrite it"
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
    """Step n's clean data, times, cursor of the noise and labels: a function of (seed, n)."""

    def __init__(self, data: Data, model: ScoreModel, options: dict[str, Any]) -> None:
        self.data, self.model, self.seed = data, model, options["seed"]
        self.size, self.dequantize = options["batch_size"], options["dequantize"]
        self.device = next(model.net.parameters()).device
        self.labelled = data.labels is not None and bool(getattr(model.net, "num_classes", None))
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor] | None]:
        options: dict[str, Any] = {"seed": self.seed, "draw": step}
        index = self._indices(step)
        shape = self.data.shape
        bins = noise.uniform(self.size, shape, stream=noise.AUGMENTATION, **options) if self.dequantize else None
        x0 = self.data.batch(index, self.model.data_range, bins).to(self.device)
        # one time in each of B equal slices: uniform for every sample, and a quieter loss (Kingma et al. 2021, §I.1)
        u = noise.uniform(self.size, (1,), stream=noise.TIMES, device=self.device, **options)[:, 0]
        u = (torch.arange(self.size, device=self.device) + u) / self.size
        cond = {"y": self.data.labels[index].to(self.device)} if self.labelled else None  # type: ignore[index]
        return (
            x0,
            losses.training_times(self.model.process, u.clamp(max=1 - 2**-24)),
            ops.cursor(step, 0, self.seed, self.device),
            cond,
        )

    def _indices(self, step: int) -> Tensor:
        """Positions step·B … of an endless sequence of shuffled epochs."""
        chosen = []
        for position in range(step * self.size, (step + 1) * self.size):
            epoch, offset = divmod(position, len(self.data))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, noise.permutation(len(self.data), seed=self.seed, draw=epoch)
            chosen.append(self.order[offset])
        return torch.stack(chosen)


def _rate(step: int, steps: int, options: dict[str, Any]) -> float:
    """The learning rate of a step: a linear warm-up, then constant or half a cosine."""
    rate = float(options["lr"]) * min(1.0, (step + 1) / max(options["warmup"], 1))
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps)) if options["decay"] else rate


def _recent(recorded: Tensor, first: int) -> float:
    """The mean loss of the last 100 steps; one that is not finite stops the run before anything more is saved."""
    value = float(recorded[-100:].mean())
    if not math.isfinite(value):
        step = first + int(torch.nonzero(~recorded.isfinite())[0])
        raise DataError(f"the loss or its gradient is not finite at step {step}: lower lr, or look at the data")
    return value


def _check_data(data: Data, model: ScoreModel) -> None:
    if data.shape != model.data_shape:
        raise ShapeError(f"data must have the model's data_shape {model.data_shape}, got samples of {data.shape}")
    if model.variance is not None:
        raise ConfigError("variance='learned_range' has no training objective in this version: train variance=None")
    classes = getattr(model.net, "num_classes", None)
    if classes and data.num_classes and data.num_classes > classes:
        raise DataError(
            f"data has labels of {data.num_classes} classes, the network num_classes={classes}: build a larger one"
        )


def _folder(checkpoint: str | os.PathLike[str] | None) -> Path | None:
    if checkpoint is None:
        return None
    folder = Path(checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint={folder} cannot be a directory: {error}") from error
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
