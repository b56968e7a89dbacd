"""train(): Adam with warm-up, clipping and EMA on any loss of fastdiff.losses; every step is a function of the seed."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import checks, losses, networks
from ..data import Data, load_data
from ..errors import (
    CheckpointError,
    CheckpointMismatchError,
    ConfigError,
    CorruptCheckpointError,
    DataError,
    DeviceError,
    ShapeError,
    choose,
    names_keywords,
    short,
    warn,
)
from ..execution import conditions, modules, noise, ops
from ..execution.modes import leaves_no_trace, stepping
from ..execution.monitor import bar
from ..execution.torch_private import foreach_lerp_, functorch_is_active
from ..files import hold, reason, shown
from ..model import ScoreModel
from ..planning.coverage import misfit
from ..planning.schedules import ema_decay
from . import checkpoint as files

# What may differ from one call to the next of a run; all else says which run it is.
MAY_CHANGE = ("batch_size", "lr", "warmup", "decay", "grad_clip", "ema", "steps", "ema_rule", "warmup_start")
# Options that files of earlier versions do not have, as they were then.
LATER = {"ema_rule": "diffusers", "warmup_start": 1}
EMA_RULES = ("diffusers", "score_sde", "constant")
# Steps in a row without a finite loss and gradient after which a run gives up.
MOST_SKIPPED = 10


@dataclass(frozen=True, eq=False, repr=False)
class Training:
    """One call of `train`: the loss of each of its steps [steps], the number of the last step, its seconds, how many of the steps
    were skipped because their loss (NaN here) or its gradient was not finite."""

    loss: Tensor
    steps: int
    seconds: float
    skipped: int = 0

    def __repr__(self) -> str:
        recent = f", mean loss {self.loss[-100:].nanmean():.4g} at the end" if len(self.loss) else ""
        skipped = f", {self.skipped} of them skipped" if self.skipped else ""
        return f"Training({len(self.loss)} steps to {self.steps}{skipped}{recent}, {self.seconds:.1f} s)"


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
    stop: Callable[[], object] | None = None,
    ema_rule: str = "diffusers",
    warmup_start: int = 1,
) -> Training:
    """Train `model` in place up to step `steps`, and leave it with the averaged (EMA) weights, in evaluation mode.

    data          a Data, or a source of fastdiff.load_data: arrays, .npy, .npz, IDX files, folders of images, "digits";
                  scaled from its range to the model's data_range; vectors without one are standardized, each column by its
                  mean and std, and stay in their own units. Its labels are the condition, as in ScoreModel, of a network
                  that takes one
    loss          "dsm", "simple" or "likelihood"; without a transition density "ism", "ssm" or "ssm_vr", the last two with
                  `probe` "rademacher" (default) or "normal" (fastdiff.losses.per_sample)
    lr, warmup    Adam (β 0.9, 0.999, ε 1e-8), linear warm-up over `warmup` steps, step n = 0, 1, … by
                  lr·min(1, (n + warmup_start)/warmup) (`warmup_start` 0 is score_sde's); `decay`: half a cosine to 0 at `steps`
    ema           θ' ← m θ' + (1 − m) θ at update n = 0, 1, …; `ema_rule` "diffusers": m = min(ema, (1 + n)/(10 + n)), 0 at n = 0;
                  "score_sde": from the initial weights, m = min(ema, (2 + n)/(11 + n)); "constant": from them, m = ema
    dequantize    add uniform noise of one bin to discrete data (Theis et al. 2016)
    seed          data, times, noise and dropout of step n are a function of (seed, n) alone, so a resumed run gives the
                  same weights as an uninterrupted one; torch's generator is as it was after each step
    checkpoint    a directory, written atomically every `checkpoint_every` steps and at the end; `fastdiff.load(directory)`
                  gives the averaged model
    resume        go on from the checkpoint in that directory, which must have the same model, data, loss and seed; the other
                  options may be others, which a warning says; False overwrites it
    callback      called with (step, mean loss of the last 100 steps) every 100 steps and at the last one
    stop          asked after each step; where it says True, the run saves and ends with that step

    A step whose loss or gradient is not finite is skipped, everything as it was before it; the first is said in a warning,
    ten in a row are a DataError. Networks of float16 and bfloat16 are trained by float32 copies of their weights.
    """
    options, steps, checkpoint_every = _checked(
        {"loss": loss, "batch_size": batch_size, "lr": lr, "warmup": warmup, "decay": decay, "grad_clip": grad_clip,
         "ema": ema, "dequantize": dequantize, "seed": seed, "ema_rule": ema_rule, "warmup_start": warmup_start},
        steps, checkpoint_every,
    )  # fmt: skip
    resume = checks.flag("resume", resume)
    checks.function("callback", callback)
    checks.function("stop", stop)
    if functorch_is_active():
        raise ConfigError(
            "train must not be called within torch.func's transforms: call it outside of vmap, grad and jvp"
        )
    files.describe(model)
    _check_tensors([*model.net.parameters(), *model.net.buffers()])
    source = load_data(data)
    _check_data(source, model, options["dequantize"])
    facts = {"num_classes": _classes(source, model), **_units(source, model)}
    fitted = copy.copy(model)
    vars(fitted).update(facts)
    described = files.describe(fitted)
    _check_scale(source, fitted)
    kind = losses.check(model, options["loss"], probe)
    options |= {"probe": kind} if options["loss"] in losses.SLICED else {}
    options |= {"data": source.fingerprint(), "steps": steps if decay else None}  # a decayed rate depends on the end
    if checkpoint is not None:
        files.as_json(described)  # refuse before the first step what could not be saved after it
    with torch.inference_mode(False), torch.enable_grad(), _autocast(model.net), _directory(checkpoint) as folder:
        state = _State(model.net, options["lr"], options["ema"], options["ema_rule"])
        if folder is not None and resume and (folder / files.FILE).exists():
            described = state.read(folder / files.FILE, options, described)
        vars(model).update(facts)
        began, first = time.perf_counter(), state.step
        with stepping(model.net):
            modes = [(module, module.training) for module in model.modules()]
        try:
            with bar(progress, steps, "train", "step", first) as display:
                recorded = _loop(state, _Batches(source, model, options), options, steps, model, folder, checkpoint_every,
                                 described, display, callback, stop)  # fmt: skip
            state.average_into(model.net)
        finally:
            with stepping(model.net):
                for module, training in modes:
                    module.training = training
    with stepping(model.net):
        model.eval()
    skipped = int(recorded.isnan().sum())
    return Training(recorded.cpu(), max(state.step, first), time.perf_counter() - began, skipped)


def _loop(
    state: _State,
    batches: _Batches,
    options: dict[str, Any],
    steps: int,
    model: ScoreModel,
    folder: Path | None,
    checkpoint_every: int,
    described: dict[str, Any],
    display: Any,
    callback: Callable[[int, float], object] | None,
    stop: Callable[[], object] | None,
) -> Tensor:
    """Every step from state.step to `steps`, or to where `stop` says so; their losses, NaN where a step was skipped."""
    first, skipped, said = state.step, 0, False  # skipped: in a row, until now
    recorded = torch.full((max(steps - first, 0),), math.nan, dtype=torch.float32, device=batches.device)
    with stepping(model.net):
        model.net.train()
    for step in range(first, steps):
        x0, t, cursor, cond = batches(step)
        with stepping(model.net), _seeded((options["seed"] * 1_000_003 + step) % 2**63):
            state.keep_buffers()
            value = losses.per_sample(model, x0, t, cursor, options["loss"], cond, options.get("probe")).mean()
            with losses.differentiating(options["loss"]):
                taken = state.update(value, _rate(step, steps, options), options["grad_clip"])
        if taken:
            recorded[step - first], skipped = value.detach(), 0
        else:
            skipped += 1
            if skipped == MOST_SKIPPED or (step + 1 == steps and skipped == steps - first):
                raise _nothing_finite(step, skipped, folder)
            if not said:
                warn(
                    f"the loss or its gradient is not finite at step {step}: it is skipped, and so is any other such step"
                )
            said = True
        stopped = stop is not None and bool(stop())
        last = stopped or step + 1 == steps
        # not in the midst of skipped steps: another lr may do better with those than this one
        save_now = folder is not None and (((step + 1) % checkpoint_every == 0 and taken) or last)
        if (step + 1) % 100 == 0 or last:
            recent = float(recorded[: step + 1 - first][-100:].nanmean())
            display.set_postfix(loss=f"{recent:.4f}")
            if callback is not None:
                callback(step + 1, recent)
        if save_now:
            state.write(folder / files.FILE, described, options)  # type: ignore[operator]
        display.update()
        if stopped:
            break
    return recorded[: max(state.step - first, 0)]


def _nothing_finite(step: int, skipped: int, folder: Path | None) -> DataError:
    """Too many skipped steps in a row, or all of a call."""
    saved = None if folder is None else files.saved_step(folder / files.FILE)
    good = "the model has the weights from before them"
    if saved is not None:
        good = f"the last good checkpoint is {shown(folder / files.FILE)}, of step {saved}"  # type: ignore[operator]
    more = f" and the {skipped - 1} after it" if skipped > 1 else ""
    return DataError(
        f"the loss or its gradient is not finite at step {step + 1 - skipped}{more}: lower lr, or check the data; {good}"
    )


class _State:
    """All that a checkpoint of a run holds: the weights, Adam's moments, the averaged weights, the step.

    Weights of half precision are rounded copies of float32 ones, which are what is trained and averaged: a step of Adam, and
    of an average, is smaller than the spacing of half-precision numbers.
    """

    def __init__(self, net: nn.Module, lr: float, ema: float, ema_rule: str) -> None:
        self.net, self.ema, self.ema_rule, self.step, self.updates = net, ema, ema_rule, 0, 0
        self.parameters = [p for p in net.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("model must have parameters that require gradients: there is nothing to train")
        half = (torch.float16, torch.bfloat16)
        self.weights = [p.detach().float().requires_grad_() if p.dtype in half else p for p in self.parameters]
        self.rounded = [(p, w) for p, w in zip(self.parameters, self.weights) if p is not w]
        self.adam = torch.optim.Adam(self.weights, lr=lr, betas=(0.9, 0.999), eps=1e-8)
        self.averages = [w.detach().clone() for w in self.weights]
        self.groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for average, weight in zip(self.averages, self.weights):
            group = self.groups.setdefault((weight.device, weight.dtype), ([], []))
            group[0].append(average)
            group[1].append(weight.detach())
        self.buffers: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def keep_buffers(self) -> None:
        """Copies of the buffers, such as running statistics, which a step changes before its loss is known."""
        for module in self.net.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    was = self.buffers.get((module, name))
                    if was is None or was[0] is not buffer:
                        self.buffers[module, name] = (buffer, buffer.detach().clone())
                    else:
                        was[1].copy_(buffer.detach())

    def update(self, loss: Tensor, rate: float, grad_clip: float | None) -> bool:
        """One step of Adam and of the average; False, and nothing changed, where the loss or its gradient is not finite."""
        for p in self.parameters:
            p.grad = None
        loss.backward()
        for p in self.parameters:
            if p.grad is not None and p.grad.layout != torch.strided:  # nn.Embedding(sparse=True)
                p.grad = p.grad.to_dense()
        for p, weight in self.rounded:
            weight.grad = None if p.grad is None else p.grad.float()
        norm = nn.utils.clip_grad_norm_(self.weights, math.inf if grad_clip is None else grad_clip)
        self.step += 1
        if not math.isfinite(float(loss.detach() + norm.detach())):
            self._give_buffers_back()
            return False
        self.adam.param_groups[0]["lr"] = rate
        # up to torch 2.11 Adam counts its steps in a tensor of the default device, which may hold no data
        elsewhere = torch.get_default_device().type != "cpu"
        with torch.device("cpu") if elsewhere else contextlib.nullcontext():
            self.adam.step()
        with torch.no_grad():
            for p, weight in self.rounded:
                p.copy_(weight)
            for averages, weights in self.groups.values():
                if self.updates == 0 and self.ema_rule == "diffusers":
                    for average, weight in zip(averages, weights):
                        average.copy_(weight)
                else:
                    foreach_lerp_(averages, weights, 1 - self._kept())
        self.updates += 1
        return True

    def _kept(self) -> float:
        """m of this update."""
        if self.ema_rule == "constant":
            return self.ema
        return ema_decay(self.updates + (self.ema_rule == "score_sde"), self.ema)

    @torch.no_grad()
    def _give_buffers_back(self) -> None:
        for (module, name), (buffer, kept) in self.buffers.items():
            module._buffers[name] = buffer
            buffer.copy_(kept)

    def _tensors(self, of: list[Tensor]) -> dict[str, Tensor]:
        """The network's tensors by name, with `of` in the place of the trained parameters."""
        given = {id(p): value for p, value in zip(self.parameters, of)}
        return {name: given.get(id(value), value) for name, value in modules.state(self.net, keep_vars=True).items()}

    def average_into(self, net: nn.Module) -> None:
        modules.load_state(net, self._tensors(self.averages))

    def write(self, path: Path, described: dict[str, Any], options: dict[str, Any]) -> None:
        """Tensors named net.* are the averaged weights (which `load` reads), raw.* the trained ones, adam.* moments, and ema.*
        averages of a higher precision than the network's."""
        plain, averaged = modules.state(self.net), self._tensors(self.averages)
        tensors = {"net." + k: v.to(plain[k].dtype) for k, v in averaged.items()}
        tensors |= {"raw." + k: v for k, v in self._tensors(self.weights).items()}
        tensors |= {"ema." + k: v for k, v in averaged.items() if v.dtype != plain[k].dtype}
        for index, moments in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in moments.items()}
        skipped = {"skipped": self.step - self.updates} if self.step > self.updates else {}
        files.write(path, tensors, {"model": described, "step": self.step, **skipped, "options": options})

    def read(self, path: Path, options: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
        """Continue from a checkpoint, which must be of the same run; returns its model's description.

        All is checked before anything is changed.
        """
        header, tensors = files.read(path, "")
        step, skipped = header.get("step"), header.get("skipped", 0)
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("net", "raw", "ema", "adam")}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        if step is None or not isinstance(header.get("options"), dict) or not parts["raw"]:
            raise CheckpointMismatchError(
                f"{shown(path)} holds a model and no training to go on with: choose another directory, or give resume=False"
            )
        if not isinstance(header.get("model"), dict) or not all(
            isinstance(n, int) and not isinstance(n, bool) for n in (step, skipped)
        ) or not 0 <= skipped <= step:  # fmt: skip
            raise CorruptCheckpointError(
                f"{shown(path)} does not describe a training: {short(step, 30)} steps, {short(skipped, 30)} skipped"
            )
        net = header["model"].get("net")
        if not getattr(modules.inner(self.net), "scale_given", True) and isinstance(net, dict):
            # a chain's of an earlier version goes on with the time features that it had
            described = {**described, "net": {**described["net"], "time_scale": net.get("time_scale")}}
        if isinstance(net, dict) and net.get("num_classes"):  # an earlier version used labels wherever there were any
            header["model"].setdefault("num_classes", described.get("num_classes"))
        changed = _changed(path, header["model"], header["options"], described, options)
        files.check(self.net, parts["raw"], path)
        files.check(self.net, parts["net"], path)
        target, averaged = modules.state(self.net), {**parts["net"], **parts["ema"]}
        other = [name for name, value in target.items() if parts["net"][name].dtype != value.dtype]
        if other:
            raise CheckpointMismatchError(
                f"{shown(path)} was trained in {parts['net'][other[0]].dtype}, and the network is of {target[other[0]].dtype}: "
                "convert it, or give resume=False"
            )
        moments = self._moments(parts["adam"], path, step > skipped)
        if changed:
            warn(f"{shown(path)} goes on with {', '.join(changed)}")
        networks.adopt(self.net, net)
        modules.load_state(self.net, parts["raw"])
        names = {id(value): name for name, value in modules.state(self.net, keep_vars=True).items()}
        with torch.no_grad():
            for p, weight, average in zip(self.parameters, self.weights, self.averages):
                weight.copy_(parts["raw"][names[id(p)]])
                average.copy_(averaged[names[id(p)]])
        self.adam.load_state_dict({**self.adam.state_dict(), "state": moments})
        self.step, self.updates = step, step - skipped
        return described

    def _moments(self, tensors: dict[str, Tensor], path: Path, needed: bool) -> dict[int, dict[str, Tensor]]:
        """Adam's state by the parameter's number; CheckpointMismatchError where it is missing or another network's."""
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index) if index.isdecimal() else -1, {})[key] = value
        for index, entry in moments.items():
            known = 0 <= index < len(self.weights) and entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
            if not known or any(entry[k].shape != self.weights[index].shape for k in ("exp_avg", "exp_avg_sq")):
                raise CheckpointMismatchError(
                    f"{shown(path)} has a state of the optimiser that is not this network's, adam.{index}: choose another "
                    "directory, or give resume=False"
                )
            bad = [key for key, value in entry.items() if not files.finite(value)]
            if bad:
                raise CheckpointMismatchError(
                    f"{shown(path)} has numbers that are not finite in adam.{index}.{bad[0]}: choose another directory, or "
                    "give resume=False"
                )
        if needed and not moments:
            raise CheckpointMismatchError(
                f"{shown(path)} lacks the state of the optimiser, without which a run cannot go on: choose another directory, or "
                "give resume=False"
            )
        return moments


class _Batches:
    """The clean data, times, noise cursor and labels of step n: a function of (seed, n)."""

    def __init__(self, data: Data, model: ScoreModel, options: dict[str, Any]) -> None:
        self.data, self.model, self.seed = data, model, options["seed"]
        self.size, self.dequantize = options["batch_size"], options["dequantize"]
        self.device = next(model.net.parameters()).device
        self.labels = data.labels if model.num_classes else None
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        index, own = self._indices(step), self.model.standardize is not None  # vectors in their own units
        data_range = self.data.range if own else self.model.data_range
        if self.dequantize:
            x0 = self.data.dequantized(index, data_range, seed=self.seed, draw=step)
        elif own and self.data.bins is None:
            x0 = self.data.x.index_select(0, index).double()
        else:
            x0 = self.data.batch(index, data_range)
        x0 = self.model.standardized(x0).float()
        # one time in each of B equal slices: uniform for every sample, and a quieter loss (Kingma et al. 2021, §I.1)
        u = noise.uniform(self.size, (1,), stream=noise.TIMES, device=self.device, seed=self.seed, draw=step)[:, 0]
        u = (torch.arange(self.size, device=self.device) + u) / self.size
        return (
            x0.to(self.device),
            self.model.process.training_times(u.clamp(max=1 - 2**-24)),
            ops.cursor(step, 0, self.seed, self.device),
            None if self.labels is None else self.labels[index].to(self.device),
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
    warmed = (step + options["warmup_start"]) / options["warmup"] if options["warmup"] else 1.0
    rate: float = options["lr"] * min(1.0, warmed)
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps)) if options["decay"] else rate


def _changed(
    path: Path, model: dict[str, Any], was: dict[str, Any], described: dict[str, Any], options: dict[str, Any]
) -> list[str]:
    """What a run goes on with that was otherwise before; CheckpointMismatchError where it is another run."""
    before, now = {**LATER, **model, **was}, json.loads(json.dumps({**options, **described}))
    for name, value in now.items():
        if name not in MAY_CHANGE and before.get(name) != value:
            raise CheckpointMismatchError(
                f"{shown(path)} was trained with {name}={short(before.get(name), 30)}, now {short(value, 30)}: choose another "
                "directory, or give resume=False"
            )
    names = [name for name in MAY_CHANGE if before.get(name) != now[name]]
    if "decay" in names and "steps" in names:
        names.remove("steps")
    return [f"{name}={short(now[name])}, which was {short(before.get(name))}" for name in names]


_generators = threading.Lock()
_locks: set[int] = set()  # descriptors of directories that this process holds


def _after_fork() -> None:
    """A child holds neither its parent's directories nor its generators."""
    global _generators
    _generators = threading.Lock()
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _seeded(number: int) -> Iterator[None]:
    """torch's generators, of which there is one for all threads and from which networks draw (dropout), seeded for one step and
    given back after it; one training at a time."""
    with _generators, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(number)
        yield


def _autocast(net: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The caller's autocast without its cache, which would keep the rounded weights of the first step for all others."""
    kind = next((p.device.type for p in net.parameters()), "cpu")
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


def _check_tensors(values: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, nn.parameter.UninitializedTensorMixin):
            raise ConfigError("model must have parameters of known shapes, got a lazy one: call the network once first")
        if value.is_meta:
            raise DeviceError(
                "model must hold data, got a parameter or buffer on the meta device: use net.to_empty(device=…)"
            )
        if value.is_inference():
            raise ConfigError(
                "model must not be made within torch.inference_mode, whose tensors cannot be trained: build it outside"
            )


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


def _classes(data: Data, model: ScoreModel) -> int | None:
    """How many classes a training has: the data's, 0 where it leaves a network that takes labels without, None for one that takes
    none."""
    taken = model.takes
    takes = taken.labels is not None and taken.classes != 0
    if data.labels is None or data.num_classes is None or not takes:
        if data.labels is not None:
            warn(
                f"the data have labels of {data.num_classes} classes, and the network takes none: build it with "
                f"num_classes={data.num_classes}, or drop them, Data(data.x, range=data.range, bins=data.bins)"
            )
        if taken.needs:
            raise ConfigError(f"the network takes {taken.shown:.80}, and train gives labels alone: give labelled data")
        return 0 if takes else None
    if taken.classes and data.num_classes > taken.classes:
        raise DataError(
            f"data must have labels of at most num_classes={taken.classes} of the network, got {data.num_classes} classes: "
            f"build the network with num_classes={data.num_classes}"
        )
    conditions.arranged(taken, data.labels[:1])
    return data.num_classes


def _units(data: Data, model: ScoreModel) -> dict[str, Any]:
    """The facts of a model's units that a training sets: standardize and data_range for vectors, unless the model has either."""
    own = {"data_range": data.range, "range_given": True}
    if model.standardize is not None:
        return {} if model.range_given else own
    if len(data.shape) != 1:
        return {"range_given": True}
    if data.bins is not None:  # levels have one scale, which their range says
        low, high = data.range
        mean, std = np.full(data.shape, (low + high) / 2), np.full(data.shape, (high - low) / 2)
    else:
        mean, std = _moments(data.x.numpy())
    constant = np.flatnonzero(std == 0)
    vary = std[std > 0]
    apart = f"{vary.min():.3g} to {vary.max():.3g}" if len(vary) and vary.max() > 100 * vary.min() else None
    if model.range_given:
        if apart:
            warn(
                f"the data's columns have standard deviations of {apart}, and one data_range for all leaves the smallest "
                "below the noise: leave data_range out, and each column is standardized"
            )
        return {}
    if apart:
        warn(
            f"the data's columns have standard deviations of {apart}: the network sees each standardized, and samples are in "
            "the data's own units; give the ScoreModel a data_range to scale all columns alike"
        )
    if len(constant) and len(data) > 1:
        warn(
            f"the data's columns {', '.join(map(str, constant[:5]))}{', …' * (len(constant) > 5)} are constant, and "
            "standardized by 1: leave them out of the data"
        )
    std[constant] = 1.0
    return {"standardize": (mean, std), **own}


def _check_scale(data: Data, model: ScoreModel) -> None:
    """Say where the process does not suit the data's scale, by up to 1024 of them."""
    own = model.standardize is not None
    some = torch.arange(0, len(data), -(-len(data) // 1024), device="cpu")
    x = model.standardized(data.batch(some, data.range if own else model.data_range))
    columns = x.std(0, correction=0)[x.std(0, correction=0) > 0] if own else x.std(correction=0)
    said = misfit(model.process, float(x.abs().max()), float(columns.min()) if columns.numel() else None)
    if said is not None:
        warn(said)


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each column's mean and standard deviation, float64, in an order of additions that no thread count changes."""
    pieces = [slice(start, start + 2**16) for start in range(0, len(x), 2**16)]
    low, high = x.min(0), x.max(0)
    with np.errstate(all="ignore"):
        mean = sum(x[piece].sum(0, dtype=np.float64) for piece in pieces) / len(x)
        mean = np.where(low == high, low.astype(np.float64), mean)
        std = np.sqrt(sum(((x[piece] - mean) ** 2).sum(0) for piece in pieces) / len(x))
    if not (np.isfinite(mean) & np.isfinite(std)).all():
        raise DataError("x must have a mean and a variance that float64 holds: scale the data")
    return mean, std


@contextlib.contextmanager
def _directory(checkpoint: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    """The directory of a run, made, tried and held against other runs until this one ends, or its process does."""
    if checkpoint is None:
        yield None
        return
    folder = files.directory(checkpoint)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint={shown(folder)} cannot be opened ({reason(error)}): choose another directory"
        ) from error
    _locks.add(descriptor)
    try:
        held = hold(descriptor)
        if held is False:
            raise CheckpointError(
                f"checkpoint={shown(folder)} is in use by another training: wait for its end, or choose another directory"
            )
        if held is None:
            warn(f"checkpoint={shown(folder)} cannot be locked there: see to it that no other training writes in it")
        yield folder
    finally:
        _locks.discard(descriptor)
        with contextlib.suppress(OSError):  # in a forked child it is closed
            os.close(descriptor)


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
        "ema_rule": choose("ema_rule", options["ema_rule"], EMA_RULES),
        "warmup_start": checks.integer("warmup_start", options["warmup_start"], 0, 1),
        "dequantize": checks.flag("dequantize", options["dequantize"]),
        "seed": checks.integer("seed", options["seed"], 0, 2**64 - 1),
    }
    return (
        checked,
        checks.integer("steps", steps, 1, 10**9),
        checks.integer("checkpoint_every", checkpoint_every, 1, 10**9),
    )
