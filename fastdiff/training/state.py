"""All that a training changes: the weights, the optimiser's moments, the averages, the step; and its file."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, networks
from ..errors import CheckpointMismatchError, ConfigError, CorruptCheckpointError, short, warn
from ..execution import modules
from ..execution.torch_private import foreach_lerp_
from ..files import shown
from ..planning.schedules import ema_decay
from . import checkpoint as files
from . import tensor_file
from .objective import Objective
from .ranks import Ranks

# What may differ from one call to the next of a run; all else says which run it is.
MAY_CHANGE = ("batch_size", "lr", "warmup", "decay", "grad_clip", "ema", "steps", "ema_rule", "warmup_start")
# Options that files of earlier versions do not have, as they were then.
LATER = {
    "ema_rule": "diffusers", "warmup_start": 1, "cond_dropout": 0.0, "times": {"name": "stratified"}, "truncation": "hard",
}  # fmt: skip
EMA_RULES = ("diffusers", "score_sde", "constant")


class State:
    """All that a checkpoint of a run holds: the weights, Adam's moments, the averaged weights, the step.

    Weights of half precision are rounded copies of float32 ones, which are what is trained and averaged: a step of Adam, and
    of an average, is smaller than the spacing of half-precision numbers.
    """

    def __init__(
        self, net: nn.Module, objective: Objective, lr: float, ema: float, ema_rule: str, ranks: Ranks
    ) -> None:
        self.objective = objective
        self.ranks = ranks
        self.header: dict[str, Any] = {}  # of the checkpoint that it goes on from
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
        self.modules = list(net.modules())
        self.buffers: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def keep_buffers(self) -> None:
        """Copies of the buffers, such as running statistics, which a step changes before its loss is known."""
        for module in self.modules:
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    was = self.buffers.get((module, name))
                    if was is None or was[0] is not buffer:
                        self.buffers[module, name] = (buffer, buffer.detach().clone())
                    else:
                        was[1].copy_(buffer.detach())

    def _exchange(self, told: Tensor) -> Tensor:
        """The gradients and `told` of all processes, the buffers of the first, in place; returns a sum that is finite if all are."""
        now = [(module._buffers[name], kept) for (module, name), (_, kept) in self.buffers.items()]
        changed = not all(buffer is not None and torch.equal(buffer, kept) for buffer, kept in now)
        buffers = [buffer for buffer, _ in now if buffer is not None]
        told.copy_(self.ranks.exchange(self.weights, told, buffers, changed))
        return told.sum()

    def update(self, loss: Tensor, rate: float, grad_clip: float | None, told: Tensor | None = None) -> bool:
        """One step of Adam and of the average; False, and nothing changed, where the loss or its gradient is not finite.

        told   what this process tells the others (Ranks.tell), and then what all of them did; None where it is alone
        """
        for p in self.parameters:
            p.grad = None
        loss.backward()
        for p in self.parameters:
            if p.grad is not None and p.grad.layout != torch.strided:  # nn.Embedding(sparse=True)
                p.grad = p.grad.to_dense()
        for p, weight in self.rounded:
            weight.grad = None if p.grad is None else p.grad.float()
        if told is not None:
            loss = self._exchange(told)
        norm = nn.utils.get_total_norm([w.grad for w in self.weights if w.grad is not None])
        self.step += 1
        total = float(loss.detach() + norm)  # one wait for the device
        if not math.isfinite(total):
            self._give_buffers_back()
            return False
        if grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self.weights, grad_clip, norm)
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

    @contextlib.contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged weights, in evaluation mode; then as it was."""
        trained = {name: value.detach().clone() for name, value in modules.state(self.net).items()}
        modes = [(module, module.training) for module in model.modules()]
        self.average_into(self.net)
        model.eval()
        try:
            yield
        finally:
            modules.load_state(self.net, trained)
            for module, training in modes:
                module.training = training

    def _saved(self) -> dict[str, Tensor]:
        """Tensors named net.* are the averaged weights (which `load` reads), raw.* the trained ones, adam.* moments, and ema.*
        averages of a higher precision than the network's."""
        plain, averaged = modules.state(self.net), self._tensors(self.averages)
        tensors = {"net." + k: v.to(plain[k].dtype) for k, v in averaged.items()}
        tensors |= {"raw." + k: v for k, v in self._tensors(self.weights).items()}
        tensors |= {"ema." + k: v for k, v in averaged.items() if v.dtype != plain[k].dtype}
        for index, moments in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{k}": v for k, v in moments.items()}
        return tensors | {"objective." + k: v for k, v in self.objective.tensors().items()}

    def check_alike(self) -> None:
        """RankError unless all processes have the same state, bit for bit."""
        if self.ranks.world > 1:
            advice = (
                "a network that draws numbers of its own, or other machines, make them differ; do not go on from here"
            )
            self.ranks.alike({"weights or their averages": self.digest()}, advice, shows=False)

    def digest(self) -> str:
        """A checksum of all that a checkpoint would hold, and of the step."""
        return tensor_file.digest(str(self.step), {name: value.detach().cpu() for name, value in self._saved().items()})

    def write(self, path: Path, described: dict[str, Any], options: dict[str, Any], more: dict[str, Any]) -> None:
        """All of it in one file."""
        skipped = {"skipped": self.step - self.updates} if self.step > self.updates else {}
        files.write(path, self._saved(), {"model": described, "step": self.step, **skipped, **more, "options": options})

    def read(self, path: Path, options: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
        """Continue from a checkpoint, which must be of the same run; returns its model's description.

        All is checked before anything is changed.
        """
        header, tensors = files.read(path, "")
        step, skipped = header.get("step"), header.get("skipped", 0)
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("net", "raw", "ema", "adam", "objective")}
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
        self.objective.load(parts["objective"], shown(path))
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
        self.step, self.updates, self.header = step, step - skipped, header
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


def rate(step: int, steps: int, options: dict[str, Any]) -> float:
    """The learning rate of a step: linear warm-up, then constant or half a cosine, without a scheduler's state to save."""
    warmed = (step + options["warmup_start"]) / options["warmup"] if options["warmup"] else 1.0
    rate: float = options["lr"] * min(1.0, warmed)
    return rate * 0.5 * (1 + math.cos(math.pi * step / steps)) if options["decay"] else rate


def _changed(
    path: Path, model: dict[str, Any], was: dict[str, Any], described: dict[str, Any], options: dict[str, Any]
) -> list[str]:
    """What a run goes on with that was otherwise before; CheckpointMismatchError where it is another run."""
    before, now = {**LATER, **model, **was}, json.loads(json.dumps({**options, **described}))
    if "weight" not in was and isinstance(was.get("loss"), str):  # which was then in the name of the loss
        before["loss"], weight = losses.pair(was["loss"])
        before["weight"] = None if weight is None else weight.config()
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
