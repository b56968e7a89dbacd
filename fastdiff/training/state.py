"""All that a training changes: the weights, the optimiser's state, the averages, the step; and its file."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, networks
from ..errors import CheckpointMismatchError, ConfigError, CorruptCheckpointError, short, warn
from ..execution import cpu, modules
from ..execution.torch_private import foreach_mul_, foreach_norm
from ..files import shown
from ..networks.layers import Constrained
from . import averages, optimisers, tensor_file
from . import checkpoint as files
from .objective import Objective
from .ranks import Ranks
from .shards import Shards

# What may differ from one call to the next of a run; all else says which run it is.
MAY_CHANGE = (
    "batch_size", "lr", "warmup", "decay", "grad_clip", "ema", "steps", "ema_rule", "warmup_start", "precision", "accumulate",
    "bad_step",
)  # fmt: skip
# Options that files of earlier versions do not have, as they were then.
LATER = {
    "ema_rule": "diffusers", "warmup_start": 1, "optimizer": "adam", "schedule": "constant", "posthoc": False, "precision": None,
    "accumulate": 1, "bad_step": "skip", "cond_dropout": 0.0, "times": {"name": "stratified"}, "truncation": "hard",
    "augment": [],
}  # fmt: skip
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class State:
    """All that a checkpoint of a run holds: the weights, the optimiser's state, the averaged weights, the step.

    Weights of half precision are rounded copies of float32 ones, which are what is trained and averaged: a step of Adam, and
    of an average, is smaller than the spacing of half-precision numbers.
    """

    def __init__(
        self, net: nn.Module, objective: Objective, ranks: Ranks, options: dict[str, Any],
        optimizer: optimisers.Choice = "adam", schedule: Any = "constant", steps: int = 1, shards: Shards | None = None,
    ) -> None:  # fmt: skip
        """shards   those of the network, where each process is to hold its own; everything of the weights is then of these"""
        self.net, self.objective, self.options, self.step, self.updates = net, objective, options, 0, 0
        self.ranks, self.shards = ranks, shards
        self.header: dict[str, Any] = {}  # of the checkpoint that it goes on from
        self.named = [p for p in net.parameters() if p.requires_grad]
        if not self.named:
            raise ConfigError("model must have parameters that require gradients: there is nothing to train")
        self.rounded: list[tuple[Tensor, Tensor]] = []
        if shards is None:
            half = (torch.float16, torch.bfloat16)
            self.parameters = self.named  # which get the gradients
            self.weights = [p.detach().float().requires_grad_() if p.dtype in half else p for p in self.parameters]
            self.rounded = [(p, w) for p, w in zip(self.parameters, self.weights) if p is not w]
            self.exchanged = self.weights  # whose gradients are to be exchanged after the backward pass
        else:
            self.parameters, self.weights, self.exchanged = shards.parameters, shards.weights, shards.whole
        self.optimisers = optimisers.build(optimizer, list(self.weights), options["lr"])
        self.groups = optimisers.settings(self.optimisers)  # a scheduler may change them on the way
        self.rate = optimisers.Rate(self.optimisers, schedule, options, steps)
        # what a checkpoint says of both, whether a name or a function made them
        self.made = {"optimizer": optimisers.names(self.optimisers), "schedule": optimisers.names(self.rate.schedulers)}
        self.made["schedule"] = self.made["schedule"] or self.rate.name
        rates = options["ema"] if isinstance(options["ema"], list) else [options["ema"]]
        self.averages = averages.Averages(self.weights, rates, options["ema_rule"], options["posthoc"])
        self.scaler = Scaler() if options["precision"] == "fp16" else None
        # norm, clipping, Adam and the average by the compiled library; torch's schedulers want to see the optimiser's `step`
        self.one_pass = (
            cpu.available
            and isinstance(self.optimisers[0], optimisers.Fused)
            and not self.rate.schedulers
            and optimisers.on_cpu_alike(self.weights)
        )
        # up to torch 2.11 Adam counts its steps in a tensor of the default device, which may hold no data
        self.elsewhere = torch.get_default_device().type != "cpu"
        self.modules = list((net if shards is None else shards.net).modules())
        weights = {id(p): weight for p, weight in zip(self.parameters, self.weights)}
        constrained = [module for module in self.modules if isinstance(module, Constrained)]
        self.constraints = [(m.constrain, weights[id(m.weight)]) for m in constrained if id(m.weight) in weights]
        self.buffers: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}
        self.loss: Tensor | None = None
        self.gradients: list[Tensor] = []

    def check_saved(self) -> None:
        """Refuse before the first step what a checkpoint could not hold after it."""
        self.groups = optimisers.as_json("optimizer", "a group", self.groups)
        self.rate.state()

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """Around the forward pass and the loss: autocast to the `precision`, if there is one."""
        around = contextlib.ExitStack()
        if self.shards is not None:
            around.enter_context(self.shards.calling())
        if self.options["precision"] is not None:
            kind, dtype = self.parameters[0].device.type, PRECISIONS[self.options["precision"]]
            # without its cache, which would keep weights past the step
            around.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        return around

    def constrain(self) -> None:
        """Before a step's forward pass, bring weights to where their layers want them (networks.layers.Constrained)."""
        for constrain, weight in self.constraints:
            constrain(weight)
        if self.constraints:
            self._round()

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

    def add(self, loss: Tensor) -> None:
        """The backward pass of a step's loss, or of a part of it: gradients add up until `measure`."""
        if self.loss is None:
            for p in self.parameters:
                p.grad = None
        scale = 1.0 if self.scaler is None else self.scaler.scale
        (loss if scale == 1 else loss * scale).backward()
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

    def _exchange(self, told: Tensor) -> Tensor:
        """The gradients and `told` of all processes, the buffers of the first, in place; returns a sum, finite if all is."""
        now = [(module._buffers[name], kept) for (module, name), (_, kept) in self.buffers.items()]
        changed = not all(buffer is not None and torch.equal(buffer, kept) for buffer, kept in now)
        buffers = [buffer for buffer, _ in now if buffer is not None]
        told.copy_(self.ranks.exchange(self.exchanged, told, buffers, changed))
        return told.sum()

    def measure(self, told: Tensor | None = None) -> Tensor | tuple[float, float]:
        """The step's loss and the norm of all its gradients together, [2] on the device or two numbers.

        told   what this process tells the others (Ranks.tell), and then what all of them did; None where it is alone
        """
        loss, self.loss = self.loss, None
        if loss is None:
            raise RuntimeError("measure() follows add()")
        for p, weight in self.rounded:
            weight.grad = None if p.grad is None else p.grad.to_dense().float()
        if self.shards is not None:
            self.shards.take_gradients()
        if told is not None:
            loss = self._exchange(told)
        self.gradients = optimisers.laid_out(self.weights)
        if self.one_pass:
            total = math.sqrt(cpu.sum_of_squares(self.gradients))
            if self.shards is not None:
                total = float(self.shards.norm(torch.tensor(total, dtype=torch.float64, device="cpu")))
            # infinite, as torch has it, where its square is beyond the weights' dtype: second moments would be so ever after
            return float(loss), total if total <= math.sqrt(torch.finfo(self.weights[0].dtype).max) else math.inf
        norm = _norm(self.gradients) if self.gradients else torch.zeros_like(loss)
        norm = norm if self.shards is None else self.shards.norm(norm)
        kind = torch.promote_types(loss.dtype, norm.dtype)
        return torch.stack((loss.to(kind), norm.to(loss.device, kind)))

    def take(self, measured: Tensor | tuple[float, float], update: Callable[[float], None] | None = None) -> bool:
        """One step of the optimiser and of the averages; False, and nothing changed, where the loss or gradient is not finite.

        measured   what `measure` gave
        update     `update`, or its replay
        """
        value, total = measured.tolist() if isinstance(measured, Tensor) else measured  # one wait for the device
        scale = 1.0 if self.scaler is None else self.scaler.scale
        total /= scale
        finite = math.isfinite(value) and math.isfinite(total)
        self.rate.set(self.step)
        self.step += 1
        if finite:
            clip, factor = self.options["grad_clip"], 1.0
            if clip is not None and total + 1e-6 > 0.999 * clip:  # below, it is a product with one
                # rounded as clip_grad_norm_ does
                norm = torch.tensor(total, dtype=self.gradients[0].dtype, device="cpu")
                factor = float((clip / (norm + 1e-6)).clamp(max=1.0))
            fused: Any = self.optimisers[0]
            one_pass = self.one_pass and fused.counts_alike()
            if one_pass:
                fused.update(factor / scale, self.averages.tensors[0], self.averages.share(self.updates))
                self._round()
            else:
                (update or self.update)(factor / scale)
            self.averages.update(self.updates, done=int(one_pass))
            self.updates += 1
        else:
            self._give_buffers_back()
        self.rate.end()
        if self.scaler is not None:
            return self.scaler.after(finite, math.isfinite(value))
        return finite

    def update(self, factor: float | Tensor, lr: Tensor | None = None) -> None:
        """The optimisers' step by `factor` times the gradients.

        factor, lr   where they are tensors the host reads nothing, for a CUDA graph (optimisers.in_one_call)
        """
        if isinstance(factor, Tensor) or factor != 1:
            foreach_mul_(self.gradients, factor)
        with torch.device("cpu") if self.elsewhere else contextlib.nullcontext():
            for optimiser in self.optimisers:
                optimiser.step() if lr is None else optimiser.apply(lr)  # type: ignore[attr-defined]
        self._round()

    @torch.no_grad()
    def _round(self) -> None:
        """The network's weights of half precision, by those that are trained."""
        for p, weight in self.rounded:
            p.copy_(weight)

    @torch.no_grad()
    def _give_buffers_back(self) -> None:
        for (module, name), (buffer, kept) in self.buffers.items():
            module._buffers[name] = buffer
            buffer.copy_(kept)

    def _in_one_piece(self, of: list[Tensor], to_file: bool = False) -> list[Tensor]:
        """What is held of each weight, such as an average, in one piece (Shards.gathered)."""
        return of if self.shards is None else self.shards.gathered(of, to_file=to_file)

    def _tensors(self, of: list[Tensor]) -> dict[str, Tensor]:
        """The network's tensors by name, with `of` in the place of the trained parameters."""
        given = {id(p): value for p, value in zip(self.named, of)}
        return {name: given.get(id(value), value) for name, value in modules.state(self.net, keep_vars=True).items()}

    def _trained(self, of: list[Tensor]) -> dict[str, Tensor]:
        """The trained parameters by name, with their values in `of`."""
        given = {id(p): value for p, value in zip(self.named, of)}
        state = modules.state(self.net, keep_vars=True)
        return {name: given[id(value)] for name, value in state.items() if id(value) in given}

    def average_into(self, net: nn.Module) -> None:
        modules.load_state(net, self._tensors(self._in_one_piece(self.averages.tensors[0])))

    def give_back(self) -> None:
        """The trained weights to the network, which has no others where they are not in shards."""
        if self.shards is not None:
            modules.load_state(self.net, self._tensors(self._in_one_piece(self.weights)))

    @contextlib.contextmanager
    def averaged(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged weights, in evaluation mode; then as it was."""
        averaged = self._in_one_piece(self.averages.tensors[0])  # which also gives the network the buffers of a step
        trained = {name: value.detach().clone() for name, value in modules.state(self.net).items()}
        modes = [(module, module.training) for module in model.modules()]
        modules.load_state(self.net, self._tensors(averaged))
        model.eval()
        try:
            yield
        finally:
            modules.load_state(self.net, trained)
            for module, training in modes:
                module.training = training

    def _saved(self) -> dict[str, Tensor]:
        """Tensors named net.* are the averaged weights (which `load` reads), raw.* the trained ones, optimizer.* the optimiser's,
        ema.* averages of a higher precision than the network's, ema1.*, … and power0.*, … further averages. Of shards all
        processes take part, and the first has them in one piece."""
        averaged = self._tensors(self._in_one_piece(self.averages.tensors[0], to_file=True))
        plain = modules.state(self.net)
        tensors = {"net." + k: v.to(plain[k].dtype) for k, v in averaged.items()}
        tensors |= {"raw." + k: v for k, v in self._tensors(self._in_one_piece(self.weights, to_file=True)).items()}
        tensors |= {"ema." + k: v for k, v in averaged.items() if v.dtype != plain[k].dtype}
        for part, average in zip(self.averages.names[1:], self.averages.tensors[1:]):
            tensors |= {f"{part}.{k}": v for k, v in self._trained(self._in_one_piece(average, to_file=True)).items()}
        moments = optimisers.saved(self.optimisers, self.weights)[0]
        if self.shards is not None:
            numbers = [int(name.partition(".")[0]) for name in moments]
            moments = dict(zip(moments, self.shards.gathered(list(moments.values()), numbers, to_file=True)))
        tensors |= {f"optimizer.{k}": v for k, v in moments.items()}
        return tensors | {"objective." + k: v for k, v in self.objective.tensors().items()}

    def check_alike(self) -> None:
        """RankError unless all processes have the same state, bit for bit, as far as all have it."""
        if self.ranks.world > 1:
            held = self._saved() if self.shards is None else self._beside_shards()
            tensors = {name: value.detach().cpu() for name, value in held.items()}
            advice = (
                "a network that draws numbers of its own, or other machines, make them differ; do not go on from here"
            )
            facts = {"weights or their averages": tensor_file.digest(str(self.step), tensors)}
            self.ranks.alike(facts, advice, shows=False)

    def _beside_shards(self) -> dict[str, Tensor]:
        """What all processes have alike beside their shards."""
        tensors = {"net." + k: v for k, v in modules.state(self.net).items()}
        tensors |= {f"raw.{k}": w for k, w in enumerate(self.exchanged)}
        return tensors | {"objective." + k: v for k, v in self.objective.tensors().items()}

    def write(self, path: Path, described: dict[str, Any], options: dict[str, Any], watched: dict[str, Any]) -> None:
        """All that there is, in one file, by the first process."""
        tensors = self._saved()
        if not self.ranks.first:
            return
        header = optimisers.saved(self.optimisers, self.weights)[1]
        more: dict[str, Any] = {"optimizer": {**header, "groups": self.groups}, "schedule": self.rate.state()}
        more |= watched | ({} if self.scaler is None else {"scaler": vars(self.scaler)})
        skipped = {"skipped": self.step - self.updates} if self.step > self.updates else {}
        files.write(path, tensors, {"model": described, "step": self.step, **skipped, "options": options, **more})

    def write_snapshot(self, folder: Path, described: dict[str, Any], options: dict[str, Any]) -> None:
        """The averages of power functions as they are now (fastdiff.posthoc_ema), by the first process."""
        self.give_back()
        tensors = {f"net.{k}": v for k, v in modules.state(self.net).items()}
        for part, average in zip(self.averages.names, self.averages.tensors):
            if part.startswith("power"):
                tensors |= {
                    f"{part}.{k}": v for k, v in self._trained(self._in_one_piece(average, to_file=True)).items()
                }
        if not self.ranks.first:
            return
        run = {name: value for name, value in options.items() if name not in MAY_CHANGE}
        header = {"model": described, "run": run, "step": self.step, "updates": self.updates}
        files.write(folder / averages.SNAPSHOT.format(self.step), tensors, {**header, "sigma_rel": averages.SIGMA_REL})

    def read(self, path: Path, options: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
        """Continue from a checkpoint, which must be of the same run; returns its model's description.

        All is checked before anything is changed.
        """
        header, tensors = files.read(path, "")
        step, skipped = header.get("step"), header.get("skipped", 0)
        parts: dict[str, dict[str, Tensor]] = {
            part: {} for part in ("net", "raw", "ema", "adam", "optimizer", "objective")
        }
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
        if described.get("cond_shape") == []:  # nor did it name what it left out
            header["model"].setdefault("cond_shape", [])
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
        further = [parts.get(part, {}) for part in self.averages.names[1:]]
        shapes = {name: value.shape for name, value in self._trained(self.named).items()}  # type: ignore[arg-type]
        for part, values in zip(self.averages.names[1:], further):
            if {name: value.shape for name, value in values.items()} != shapes:
                raise CheckpointMismatchError(
                    f"{shown(path)} lacks the average {part}, or has another's: choose another directory, or give resume=False"
                )
        # the moments of earlier versions, whose optimiser was Adam, have its name
        entries = optimisers.checked(
            self.optimisers, self.weights, parts["optimizer"] or parts["adam"], header.get("optimizer"), path, step > skipped,
            self.groups, [p.shape for p in self.named],
        )  # fmt: skip
        if self.rate.schedulers and any(change.startswith("lr=") for change in changed):
            raise CheckpointMismatchError(
                f"{shown(path)} goes on with the rate of its scheduler, and lr is another: give the lr of before, or resume=False"
            )
        self.objective.load(parts["objective"], shown(path))
        self.rate.load(header.get("schedule", []), path)
        if changed:
            warn(f"{shown(path)} goes on with {', '.join(changed)}")
        networks.adopt(self.net, net)
        modules.load_state(self.net, parts["raw"])
        if self.shards is not None:
            self.shards.follow()
            entries = {k: {key: self._part(k, value) for key, value in entry.items()} for k, entry in entries.items()}
        names = {id(value): name for name, value in modules.state(self.net, keep_vars=True).items()}
        with torch.no_grad():
            for k, (p, weight) in enumerate(zip(self.named, self.weights)):
                weight.copy_(self._part(k, parts["raw"][names[id(p)]]))
                for average, values in zip(self.averages.tensors, [averaged, *further]):
                    average[k].copy_(self._part(k, values[names[id(p)]]))
        optimisers.load(self.optimisers, self.weights, entries)
        if self.scaler is not None and isinstance(header.get("scaler"), dict):
            self.scaler = Scaler(**header["scaler"])
        self.step, self.updates, self.header = step, step - skipped, header
        return described

    def _part(self, k: int, value: Any) -> Any:
        """What this process holds of a value of weight k."""
        return value if self.shards is None or not isinstance(value, Tensor) else self.shards.part(k, value)


def _by_device(tensors: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of all together, as torch.nn.utils.get_total_norm has it."""
    place = gradients[0].device
    norms = [norm.to(place) for those in _by_device(gradients).values() for norm in foreach_norm(those)]
    return torch.linalg.vector_norm(torch.stack(norms))


class Scaler:
    """The factor of a float16 loss, that small gradients are not 0: halved by a step whose gradient overflows, doubled after
    `PATIENCE` that do not (Micikevicius et al. 2018, §3.2)."""

    PATIENCE = 2000

    def __init__(self, scale: float = 2.0**16, good: int = 0) -> None:
        self.scale, self.good = scale, good  # good: steps since the factor changed

    def after(self, finite: bool, loss_is: bool) -> bool:
        """After a step; whether it was as it should be: one that is skipped to find the factor is no bad one."""
        if finite:
            self.good += 1
            if self.good == self.PATIENCE and self.scale < 2.0**24:
                self.scale, self.good = 2 * self.scale, 0
            return True
        self.good = 0
        self.scale = max(self.scale / 2, 1.0) if loss_is else self.scale
        return loss_is and self.scale > 1


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
