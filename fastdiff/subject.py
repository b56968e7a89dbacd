"""What a run is about: a network and what its numbers mean, where it lives and how it wants its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, choose
from .execution import tensor_checks
from .model import ScoreModel
from .planning import chains, predictions, processes


@dataclass(frozen=True)
class Subject:
    """A network and what its numbers mean, whether a ScoreModel said so or the caller did."""

    net: Any
    process: processes.Process
    prediction: str
    time_input: str
    shape: tuple[int, ...]
    variance: str | None


def subject_of(
    model: Any, sde: Any, shape: Any, prediction: str | None, time_input: str | None, variance: str | None
) -> Subject:
    """A ScoreModel's own word on what its numbers mean, which the caller may repeat; a plain callable's is the caller's."""
    if isinstance(model, ScoreModel):
        own = {"prediction": model.prediction, "time_input": model.time_input, "shape": model.data_shape}
        given = {"prediction": prediction, "time_input": time_input, "shape": shape and tensor_checks.shape_of(shape)}
        for name, value in given.items():
            if value is not None and value != own[name]:
                raise ConfigError(f"{name}={value!r} contradicts the model's own {own[name]!r}: leave it out")
        return Subject(
            model.net, model.process, model.prediction, model.time_input, model.data_shape, model.variance or variance
        )
    if not callable(model):
        raise ConfigError(f"model must be a ScoreModel or a callable (x, t) -> tensor, got {type(model).__name__}")
    if sde is None:
        raise ConfigError(f"sde must be given with a plain callable: one of {', '.join(processes.PROCESSES)}")
    if shape is None:
        raise ConfigError("shape must be given with a plain callable: one sample's shape, such as shape=(2,)")
    kind = prediction or "score"
    return Subject(
        model,
        processes.get(sde),
        kind,
        time_input or predictions.default_time_input(kind),
        tensor_checks.shape_of(shape),
        variance,
    )


def takes_features(net: Any) -> bool:
    """Whether the network has `time_features`, and a call runs the forward that belongs to them: no subclass's, no instance's, no
    hook first."""
    if not isinstance(net, nn.Module) or not hasattr(net, "time_features"):
        return False
    owner = next(c for c in type(net).__mro__ if "forward" in vars(c))
    hooked = net._forward_hooks or net._forward_pre_hooks
    return "time_features" in vars(owner) and "forward" not in vars(net) and not hooked


def layout_of(net: Any, rank: int) -> torch.memory_format:
    """The memory format that a network's convolutions have, for inputs of this rank."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(rank)
    if wanted is not None:
        for p in parameters(net):
            if p.ndim == rank and p.is_contiguous(memory_format=wanted) and not p.is_contiguous():
                return wanted
    return torch.contiguous_format


def parameters(net: Any) -> Iterator[Tensor]:
    """The network's, if it is a module."""
    return net.parameters() if isinstance(net, nn.Module) else iter(())


def dtype_of(net: Any, otherwise: torch.dtype) -> torch.dtype:
    """What a network's inputs must be: the dtype of its first floating parameter, if it has one."""
    return next((p.dtype for p in parameters(net) if p.is_floating_point()), otherwise)


def place_of(device: Any, x_init: Tensor | None, net: Any) -> torch.device:
    """Where the run happens: what `device`, x_init and the model's parameters agree on."""
    known = [("x_init", x_init), ("model", next(parameters(net), None))]
    found = next((tensor.device for _, tensor in known if tensor is not None), None)
    place = tensor_checks.device_of(device if device is not None else found)
    for name, tensor in known:
        if tensor is not None:
            tensor_checks.check_device(name, tensor, place)
    return place


def picked(cond: Any, which: slice | Tensor) -> Any:
    """Some samples' entries of a condition: a tensor, a dict of tensors, or None."""
    if isinstance(cond, dict):
        return {key: value[which] for key, value in cond.items()}
    return None if cond is None else cond[which]


def check_path(process: Any, own: processes.Process) -> None:
    """Refuse a process, or the name of one, that is not on the model's path: its own, or a chain on it."""
    if process is None or process in (own, own.name):
        return
    if isinstance(process, str):
        choose("sde", process, processes.PROCESSES)
        if type(own) is chains.CHAINS.get(process):
            return
    elif not isinstance(process, processes.Process):
        raise ConfigError(f"sde must be a name or a process such as fastdiff.VP(), got {type(process).__name__}")
    elif chains.on_path(process, own):
        return
    raise ConfigError(
        f"sde={process!r:.60} is not the process of this model, {own!r:.60}: leave sde out, or use sde={own.name!r}"
    )
