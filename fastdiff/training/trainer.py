"""train(): Adam with warm-up, clipping and EMA on any loss of fastdiff.losses, repeatable step by step."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from .. import checks, losses
from ..errors import CheckpointMismatchError, ConfigError, DataError, ShapeError, choose
from ..model import ScoreModel
from ..reference import noise
from ..schedules import ema_decay
from . import checkpoint as files
from .data import Data
from .readers import load_data


@dataclass(frozen=True)
class Training:
    """What a training run was: the loss of each step [steps], the last step, the seconds of this call."""

    loss: Tensor
    steps: int
    seconds: float


def train(
    model: ScoreModel,
    data: Any,
    *,
    steps: int,
    loss: str = "dsm",
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
    loss          "dsm", "simple" or "likelihood" (fastdiff.losses)
    lr, warmup    Adam (β 0.9, 0.999, ε 1e-8), linear warm-up over `warmup` steps; `decay`: half a cosine to 0 at `steps`
    ema           θ' ← m θ' + (1 − m) θ with m = min(ema, (1 + n)/(10 + n))
    dequantize    add uniform noise of one bin to discrete data (Theis et al. 2016)
    seed          step n's data, times and noise are a function of (seed, n) alone: a resumed run is the same run
    checkpoint    a directory: written every `checkpoint_every` steps and at the end, atomically; with `resume` a run goes
                  on from what is there. `fastdiff.load(directory)` gives the averaged model
    callback      (step, loss) each 100 steps
    """
    options = {"loss": choose("loss", loss, losses.LOSSES), "batch_size": batch_size, "lr": lr, "warmup": warmup,
               "decay": decay and steps, "grad_clip": grad_clip, "ema": ema, "dequantize": dequantize, "seed": seed}  # fmt: skip
    _check(options, steps, checkpoint_every)
    source = load_data(data)
    if source.shape != model.data_shape:
        raise ShapeError(f"data must have the model's data_shape {model.data_shape}, got samples of {source.shape}")
    parameters = [p for p in model.net.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("model must have parameters that require gradients: there is nothing to train")
    state = _State(model.net, parameters, lr, ema)
    folder = _folder(checkpoint)
    if folder is not None and resume and (folder / files.FILE).exists():
        state.read(folder / files.FILE, options)
    began, first = time.perf_counter(), state.step
    batches = _Batches(source, model, seed, batch_size, dequantize)
    recorded = torch.zeros(max(steps - first, 0), device=parameters[0].device)
    model.net.train()
    # networks with dropout draw from torch's generator: seeded anew each step, and given back afterwards
    with torch.random.fork_rng(enabled=_has_dropout(model.net)), _bar(progress, first, steps) as bar:
        for step in range(first, steps):
            if _has_dropout(model.net):
                torch.manual_seed(seed * 1_000_003 + step)
            x0, t, eps, cond = batches(step)
            value = losses.per_sample(model, x0, t, eps, loss, cond).mean()
            state.update(value, _rate(step, steps, lr, warmup, decay), grad_clip)
            recorded[step - first] = value.detach()
            if (step + 1) % 100 == 0 or step + 1 == steps:
                recent = _recent(recorded, step - first, step)
                bar.set_postfix(loss=f"{recent:.4f}")
                if callback is not None:
                    callback(step + 1, recent)
            if folder is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                _recent(recorded, step - first, step)
                state.write(folder / files.FILE, model, options)
            bar.update()
    state.average_into(model.net)
    model.eval()
    return Training(recorded.cpu(), max(steps, first), time.perf_counter() - began)


class _State:
    """What a resumed run needs: the weights, Adam's moments, the averaged weights, the step."""

    def __init__(self, net: nn.Module, parameters: list[nn.Parameter], lr: float, ema: float) -> None:
        self.net, self.parameters, self.step = net, parameters, 0
        self.adam = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8)

        def average(averaged: Any, current: Any, count: Any) -> None:
            torch._foreach_lerp_(averaged, current, 1 - ema_decay(self.step, ema))

        self.averaged = AveragedModel(net, multi_avg_fn=average)

    def update(self, loss: Tensor, rate: float, grad_clip: float | None) -> None:
        """One step of Adam and of the average."""
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, grad_clip)
        self.adam.param_groups[0]["lr"] = rate
        self.adam.step()
        self.averaged.update_parameters(self.net)
        self.step += 1

    def average_into(self, net: nn.Module) -> None:
        net.load_state_dict(self.averaged.module.state_dict())

    def write(self, path: Path, model: ScoreModel, options: dict[str, Any]) -> None:
        """`net.` the averaged weights (what `load` reads), `raw.` the trained ones, `adam.` its moments."""
        tensors = {"net." + k: v for k, v in self.averaged.module.state_dict().items()}
        tensors |= {"raw." + k: v for k, v in self.net.state_dict().items()}
        for index, moments in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": torch.as_tensor(v) for k, v in moments.items()}
        files.write(path, tensors, {"model": files.describe(model), "step": self.step, "options": options})

    def read(self, path: Path, options: dict[str, Any]) -> None:
        """Go on from a checkpoint, which must be of the same run."""
        header, averaged = files.read(path, "net.")
        found = header.get("options", {})
        for name, value in options.items():
            if found.get(name) != value:
                raise CheckpointMismatchError(
                    f"{path} was trained with {name}={found.get(name)!r}, now {value!r}: take another directory, "
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
    """Step n's clean data, times, noise and labels: a function of (seed, n)."""

    def __init__(self, data: Data, model: ScoreModel, seed: int, batch_size: int, dequantize: bool) -> None:
        self.data, self.model, self.seed, self.size, self.dequantize = data, model, seed, batch_size, dequantize
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
        eps = noise.normal(self.size, shape, stream=noise.PERTURBATION, device=self.device, **options)
        cond = {"y": self.data.labels[index].to(self.device)} if self.labelled else None  # type: ignore[index]
        return x0, losses.training_times(self.model.process, u.clamp(max=1 - 2**-24)), eps, cond

    def _indices(self, step: int) -> Tensor:
        """Positions step·B … of an endless sequence of shuffled epochs."""
        chosen = []
        for position in range(step * self.size, (step + 1) * self.size):
            epoch, offset = divmod(position, len(self.data))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, noise.permutation(len(self.data), seed=self.seed, draw=epoch)
            chosen.append(self.order[offset])
        return torch.stack(chosen)


def _rate(step: int, steps: int, lr: float, warmup: int, decay: bool) -> float:
    rate = lr * min(1.0, (step + 1) / warmup) if warmup else lr
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps)) if decay else rate


def _recent(recorded: Tensor, last: int, step: int) -> float:
    """The mean loss of the last 100 steps; a loss that is not finite stops the run before anything is saved."""
    value = float(recorded[max(0, last - 99) : last + 1].mean())
    if not math.isfinite(value):
        raise DataError(f"the loss is not finite at step {step}: lower lr, or look at the data")
    return value


def _has_dropout(net: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in net.modules())


def _folder(checkpoint: str | os.PathLike[str] | None) -> Path | None:
    if checkpoint is None:
        return None
    folder = Path(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _bar(progress: bool | None, first: int, steps: int) -> Any:
    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(initial=first, total=steps, desc="train", unit="step", disable=not shown, leave=False)


def _check(options: dict[str, Any], steps: int, checkpoint_every: int) -> None:
    checks.integer("steps", steps, 1, 10**9)
    checks.integer("batch_size", options["batch_size"], 1, 10**7)
    checks.integer("warmup", options["warmup"], 0, 10**9)
    checks.integer("seed", options["seed"], 0, 2**64 - 1)
    checks.integer("checkpoint_every", checkpoint_every, 1, 10**9)
    checks.number("lr", options["lr"], 0, above=True)
    checks.number("ema", options["ema"], 0, 1, below=True)
    if options["grad_clip"] is not None:
        checks.number("grad_clip", options["grad_clip"], 0, above=True)
