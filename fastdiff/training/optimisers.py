"""Optimisers by name or by the caller's function, the rate of each step, and both as a checkpoint has them: tensors and JSON."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CheckpointMismatchError, ConfigError, choose, short
from ..execution import cpu
from ..execution.torch_private import fused_adam_, fused_adamw_
from ..files import shown
from . import checkpoint as files

Optimiser = torch.optim.Optimizer
# a name, or a function of the trained parameters that gives a torch.optim.Optimizer, or several that share them
Choice = str | Callable[[list[Tensor]], Any]

OPTIMIZERS = ("adam", "adamw", "radam", "sgd", "muon")
SCHEDULES = ("constant", "cosine", "linear", "inverse_sqrt")
# of a group: who computes it and how, and what a step may change
_FREE = ("params", "lr", "initial_lr", "fused", "foreach", "capturable", "differentiable", "param_names")


def build(choice: Choice, weights: list[Tensor], lr: float) -> list[Optimiser]:
    """The optimisers of the weights, each weight in one group of one of them.

    "adam", "adamw", "radam", "sgd" have torch's defaults; "muon" is torch.optim.Muon for matrices, its steps of the size of
    AdamW's (`adjust_lr_fn="match_rms_adamw"`), and AdamW for the rest.
    """
    if isinstance(choice, str):
        return _named(choose("optimizer", choice, OPTIMIZERS), weights, lr)
    made = choice(weights)
    optimisers = list(made) if isinstance(made, (list, tuple)) else [made]
    for optimiser in optimisers:
        if not isinstance(optimiser, Optimiser):
            raise ConfigError(
                f"optimizer must return a torch.optim.Optimizer, or a list of them, got {short(optimiser, 40)}: "
                "lambda params: torch.optim.AdamW(params, lr=1e-3)"
            )
        closure = inspect.signature(type(optimiser).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"optimizer must step without a closure, got {type(optimiser).__name__}: use 'adam' or another"
            )
    held = [id(w) for optimiser in optimisers for group in optimiser.param_groups for w in group["params"]]
    if sorted(held) != sorted(map(id, weights)):
        raise ConfigError(
            f"optimizer must hold each of the {len(weights)} parameters that it is given once, got {len(held)}: for some that "
            "stay as they are set requires_grad_(False)"
        )
    return optimisers


def _named(name: str, weights: list[Tensor], lr: float) -> list[Optimiser]:
    optim: Any = torch.optim
    if name in ("radam", "sgd"):
        fused = {"fused": True} if name == "sgd" and _fusible(weights) else {}
        return [{"radam": optim.RAdam, "sgd": optim.SGD}[name](weights, lr=lr, **fused)]
    if name == "muon":
        if not hasattr(optim, "Muon"):
            raise ConfigError(
                f"optimizer='muon' needs torch.optim.Muon, which torch {torch.__version__} lacks: use 'adamw'"
            )
        matrices = [w for w in weights if w.ndim == 2]
        rest = [w for w in weights if w.ndim != 2]
        found = [optim.Muon(matrices, lr=lr, adjust_lr_fn="match_rms_adamw")] if matrices else []
        return found + (_named("adamw", rest, lr) if rest else [])
    kind: Any = {"adam": Adam, "adamw": AdamW} if _fusible(weights) else {"adam": optim.Adam, "adamw": optim.AdamW}
    return [kind[name](weights, lr=lr, **({"fused": True} if _fusible(weights) else {}))]


def _fusible(weights: list[Tensor]) -> bool:
    """Whether torch's fused kernels take them: they walk through memory, whatever the strides (see `laid_out`)."""
    return all(w.is_floating_point() and w.device.type in ("cpu", "cuda") and _is_dense(w) for w in weights)


def on_cpu_alike(weights: list[Tensor]) -> bool:
    """Whether the compiled library takes them (execution.cpu.adam): plain tensors there, of one dtype."""
    kinds = {(w.dtype, type(w), w.device.type) for w in weights}
    return len({kind[0] for kind in kinds}) == 1 and all(
        dtype in (torch.float32, torch.float64) and kind in (Tensor, nn.Parameter) and device == "cpu"
        for dtype, kind, device in kinds
    )


def _is_dense(w: Tensor) -> bool:
    return torch.empty_like(w, device="meta").stride() == w.stride()


def laid_out(weights: list[Tensor]) -> list[Tensor]:
    """The gradients, dense and in memory as their weights are, which torch's fused kernels assume and do not look at."""
    gradients = []
    for w in weights:
        gradient = w.grad
        if gradient is None:
            continue
        if gradient.layout != torch.strided:  # nn.Embedding(sparse=True)
            w.grad = gradient = gradient.to_dense()
        if gradient.stride() != w.stride():
            w.grad = gradient = torch.empty_like(w).copy_(gradient)
        gradients.append(gradient)
    return gradients


class Fused(torch.optim.Optimizer):
    """torch.optim.Adam or AdamW with one group, whose step is the one call of torch's fused kernel, with a count of steps that
    all weights share; where some have no gradient it is torch's own, with theirs."""

    kernel: ClassVar[Callable[..., None]]
    decoupled: ClassVar[bool]  # whether the decay of weights is apart from the gradient
    _count: Tensor | None = None

    def counts_alike(self) -> bool:
        """Whether all weights have a gradient, and have taken the same number of steps, not 0: `_count`."""
        weights = self.param_groups[0]["params"]
        if self._count is None and len(self.state) == len(weights):
            counts = [self.state[w]["step"] for w in weights]
            if len({c.device for c in counts}) == 1 and len(torch.stack(counts).unique()) == 1:
                self._count = counts[0]
                self._states = [self.state[w] for w in weights]
                for state in self._states:
                    state["step"] = self._count
        return self._count is not None and all(w.grad is not None for w in weights)

    def _lists(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """(weights, gradients, first moments, second moments)"""
        weights = self.param_groups[0]["params"]
        moments = ([state[name] for state in self._states] for name in ("exp_avg", "exp_avg_sq"))
        return (weights, [w.grad for w in weights], *moments)

    def step(self, closure: Any = None) -> Any:
        (group,) = self.param_groups
        if not self.counts_alike():
            if self._count is not None:
                for state in self._states:
                    state["step"] = self._count.clone()
                self._count = None
            return super().step(closure)
        # a device's kernel reads a rate in its memory, as a CUDA graph has it, as float32: the same without a graph
        self.apply(float(np.float32(group["lr"])) if group["params"][0].is_cuda else group["lr"])
        return None

    def apply(self, lr: float | Tensor) -> None:
        """`step` of weights that `counts_alike`, which reads nothing on the host where the rate is a tensor."""
        (group,) = self.param_groups
        self._count += 1
        beta1, beta2 = group["betas"]
        with torch.no_grad():
            lists = self._lists()
            type(self).kernel(
                *lists, [], [self._count] * len(lists[0]), lr=lr, beta1=beta1, beta2=beta2,
                weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip

    step.hooked = True  # type: ignore[attr-defined]  # by which torch knows steps that it has wrapped for its profiler

    def update(self, factor: float, average: list[Tensor], share: float) -> None:
        """`step` by `factor` times the gradients, and average ← average + share·(weights − average), in one pass over weights on
        the CPU that `counts_alike`."""
        (group,) = self.param_groups
        self._count += 1
        beta1, beta2 = group["betas"]
        cpu.adam(
            *self._lists(), average, step=float(self._count), factor=factor, lr=group["lr"], beta1=beta1, beta2=beta2,
            eps=group["eps"], weight_decay=group["weight_decay"], decoupled=self.decoupled, share=share,
        )  # fmt: skip

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._count = None


class Adam(Fused, torch.optim.Adam):
    kernel, decoupled = staticmethod(fused_adam_), False


class AdamW(Fused, torch.optim.AdamW):
    kernel, decoupled = staticmethod(fused_adamw_), True


def in_one_call(optimisers: list[Optimiser]) -> bool:
    """Whether the step of all is one call (`Fused.apply`)."""
    return len(optimisers) == 1 and isinstance(optimisers[0], Fused) and optimisers[0].counts_alike()


class Rate:
    """The learning rate of each step n: that of each group of the optimisers, by warm-up and schedule.

    lr·min(1, (n + warmup_start)/warmup), times 1 ("constant"), ½(1 + cos πn/steps) ("cosine"), 1 − n/steps ("linear"),
    √(warmup/max(n, warmup)) ("inverse_sqrt", Vaswani et al. 2017), or the rate of a torch scheduler.
    """

    def __init__(self, optimisers: list[Optimiser], schedule: Any, options: dict[str, Any], steps: int) -> None:
        self.optimisers = optimisers
        self.options, self.steps, self.name = options, steps, schedule
        self.schedulers: list[Any] = []
        if not isinstance(schedule, str):
            self.name = "constant"
            self.schedulers = [_scheduler(schedule, optimiser) for optimiser in optimisers]
        self.base = [group["lr"] for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        """Asked anew each time: an optimiser that loads its state has others."""
        return [group for optimiser in self.optimisers for group in optimiser.param_groups]

    def __call__(self, step: int, lr: float) -> float:
        options = self.options
        rate = lr * min(1.0, (step + options["warmup_start"]) / options["warmup"] if options["warmup"] else 1.0)
        if options["decay"] or self.name == "cosine":
            return rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        if self.name == "linear":
            return rate * (1 - step / self.steps)
        if self.name == "inverse_sqrt":
            return rate * math.sqrt(max(options["warmup"], 1) / max(step, options["warmup"], 1))
        return rate

    def set(self, step: int) -> None:
        """Give the optimisers their rates for this step."""
        if self.schedulers:
            self.base = [group["lr"] for group in self._groups()]
        for group, lr in zip(self._groups(), self.base):
            group["lr"] = self(step, lr)

    def end(self) -> None:
        """After the step, taken or skipped: torch's schedulers go on from the rate that they left."""
        if self.schedulers:
            for group, lr in zip(self._groups(), self.base):
                group["lr"] = lr
            for scheduler in self.schedulers:
                scheduler.step()

    def state(self) -> list[Any]:
        """Of torch's schedulers, as JSON has it."""
        states = [
            {
                "state": scheduler.state_dict(),
                "groups": [_of_steps(group) for group in scheduler.optimizer.param_groups],
            }
            for scheduler in self.schedulers
        ]
        return as_json("schedule", "its scheduler's state", states)  # type: ignore[no-any-return]

    def load(self, states: Any, path: Any) -> None:
        """Go on from a checkpoint's."""
        if not isinstance(states, list) or len(states) != len(self.schedulers):
            raise CheckpointMismatchError(
                f"{shown(path)} lacks the state of the schedule: choose another directory, or give resume=False"
            )
        for scheduler, entry in zip(self.schedulers, states):
            for group, values in zip(scheduler.optimizer.param_groups, entry["groups"]):
                group.update({k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
            scheduler.load_state_dict(entry["state"])


def _of_steps(group: dict[str, Any]) -> dict[str, Any]:
    """What a scheduler may change of a group: its rate, and of some its moments' decay."""
    return {k: v for k, v in group.items() if k in ("lr", "initial_lr") or k not in _FREE}


def _scheduler(schedule: Callable[[Optimiser], Any], optimiser: Optimiser) -> Any:
    scheduler = schedule(optimiser)
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler) or scheduler.optimizer is not optimiser:
        raise ConfigError(
            f"schedule must return one of torch.optim.lr_scheduler for the optimiser that it is given, got "
            f"{short(scheduler, 40)}: lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1000)"
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ConfigError("schedule must step without a metric, got ReduceLROnPlateau: use 'cosine' or another")
    return scheduler


def as_json(argument: str, what: str, value: Any) -> Any:
    """The value as JSON has it, or a ConfigError: a checkpoint holds tensors and JSON, and no code."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{argument} must keep its state in tensors, numbers and strings to be saved, and {what} has more ({error}): use "
            "another, or leave checkpoint out"
        ) from error


def names(optimisers: Sequence[Any]) -> str:
    """Their classes, which a checkpoint names: "adam", "muon+adamw"."""
    return "+".join(type(optimiser).__name__.lower() for optimiser in optimisers)


def settings(optimisers: list[Optimiser]) -> list[Any]:
    """The options of every group, without its rate: what says which optimiser it is."""
    return [{k: v for k, v in group.items() if k not in _FREE} for o in optimisers for group in o.param_groups]


def saved(optimisers: list[Optimiser], weights: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the optimisers: tensors by "number of the weight.name", how many, and the rest as JSON has it."""
    number = {id(w): n for n, w in enumerate(weights)}
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for optimiser in optimisers:
        for w, entry in optimiser.state.items():
            if id(w) not in number:
                raise ConfigError(
                    f"optimizer must keep its state by parameter to be saved, got {type(optimiser).__name__} with an entry "
                    f"{short(w, 30)}: use another, or leave checkpoint out"
                )
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{number[id(w)]}.{key}"] = value
                else:
                    others.setdefault(str(number[id(w)]), {})[key] = value
    return tensors, {"tensors": len(tensors), "others": as_json("optimizer", "a state", others)}


def checked(
    optimisers: list[Optimiser], weights: list[Tensor], tensors: dict[str, Tensor], header: Any, path: Any, needed: bool,
    groups: list[Any], shapes: list[torch.Size],
) -> dict[int, dict[str, Any]]:  # fmt: skip
    """The state of a checkpoint by the weight's number; CheckpointMismatchError where it is missing, or another's.

    header   what `saved` gave beside the tensors, and `settings`; None in files of earlier versions, whose optimiser is Adam
    needed   a step was taken
    groups   the `settings` of now, as JSON has them
    shapes   of the weights in one piece, as the tensors are
    """
    way_out = "choose another directory, or give resume=False"
    entries: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index) if index.isdecimal() else -1, {})[key] = value
    keys = {
        id(w): _KEYS.get(type(optimiser))
        for optimiser in optimisers
        for g in optimiser.param_groups
        for w in g["params"]
    }
    for index, entry in entries.items():
        shape = shapes[index] if 0 <= index < len(weights) else None
        known = keys[id(weights[index])] if shape is not None else None
        per_weight = {key: value for key, value in entry.items() if key != "step"}
        if shape is None or (
            known and (not known <= entry.keys() or any(value.shape != shape for value in per_weight.values()))
        ):
            raise CheckpointMismatchError(
                f"{shown(path)} has a state of the optimiser that is not this network's, of number {index}: {way_out}"
            )
        bad = [key for key, value in entry.items() if not files.finite(value)]
        if bad:
            raise CheckpointMismatchError(
                f"{shown(path)} has numbers that are not finite in the optimiser's {index}.{bad[0]}: {way_out}"
            )
    if header is None:
        lacking = needed and not entries
    else:
        was = header.get("groups")
        if was != groups:
            pairs = zip(was, groups) if isinstance(was, list) and len(was) == len(groups) else []
            odd = next((k for a, b in pairs for k in {**a, **b} if a.get(k) != b.get(k)), "its groups")
            raise CheckpointMismatchError(f"{shown(path)} was trained with another {odd} of the optimiser: {way_out}")
        lacking = header.get("tensors") != len(tensors)
        for index, entry in header.get("others", {}).items():
            entries.setdefault(int(index), {}).update(entry)
    if lacking:
        raise CheckpointMismatchError(
            f"{shown(path)} lacks the state of the optimiser, without which a run cannot go on: {way_out}"
        )
    return entries


# The tensors that each of torch's keeps of a weight that it has stepped
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
_KEYS = dict.fromkeys((Adam, AdamW, torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam), _ADAM)


def load(optimisers: list[Optimiser], weights: list[Tensor], entries: dict[int, dict[str, Any]]) -> None:
    """Go on from the state that `checked` gave."""
    number = {id(w): n for n, w in enumerate(weights)}
    for optimiser in optimisers:
        held = [w for group in optimiser.param_groups for w in group["params"]]
        state = {place: entries[number[id(w)]] for place, w in enumerate(held) if number[id(w)] in entries}
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        for w in held:  # in memory as the weights are (`laid_out`)
            for key, value in optimiser.state[w].items() if w in optimiser.state else ():
                if isinstance(value, Tensor) and value.shape == w.shape and value.stride() != w.stride():
                    optimiser.state[w][key] = torch.empty_like(w, dtype=value.dtype).copy_(value)
