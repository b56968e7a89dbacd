"""A network as a run meets it: where it lives, what it takes, how it is called, what it must return."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DeviceError, ModelOutputError, ModelOutputTypeError
from . import modules, tensor_checks
from .loop import Condition


def parameters(net: Any) -> Iterator[Tensor]:
    """The network's, if it is a module."""
    return net.parameters() if isinstance(net, nn.Module) else iter(())


def dtype_of(net: Any, default: torch.dtype) -> torch.dtype:
    """What a network's inputs must be: the dtype of its first floating parameter, if it has one, and does not say of itself that
    it `takes_states` as they are."""
    if getattr(net, "takes_states", False):
        return default
    return next((p.dtype for p in parameters(net) if p.is_floating_point()), default)


def device_of(device: Any, x_init: Tensor | None, net: Any) -> torch.device:
    """Where the run happens: what `device`, x_init and the model's parameters agree on."""
    tensors = [("x_init", x_init), ("model", next(parameters(net), None))]
    for name, tensor in tensors:
        if tensor is not None and tensor.is_meta:
            raise DeviceError(f"{name} is on the meta device, which holds no data")
    first = next((tensor.device for _, tensor in tensors if tensor is not None), None)
    place = tensor_checks.device_of(device if device is not None else first)
    for name, tensor in tensors:
        if tensor is not None:
            tensor_checks.check_device(name, tensor, place)
    return place


def memory_format_of(net: Any, rank: int) -> torch.memory_format:
    """The memory format that a network's convolutions have, for inputs of this rank."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(rank)
    if wanted is not None:
        for p in parameters(net):
            if p.ndim == rank and p.is_contiguous(memory_format=wanted) and not p.is_contiguous():
                return wanted
    return torch.contiguous_format


def takes_features(net: Any) -> bool:
    """Whether a network has `time_features`, and a call runs the forward that takes them as `features`: no subclass's, no
    instance's, no hook first, and none on any part, which may be told the time of each call or change what comes of it."""
    if not isinstance(net, nn.Module) or not hasattr(net, "time_features"):
        return False
    owner = next(c for c in type(net).__mro__ if "forward" in vars(c))
    if "time_features" not in vars(owner) or any(map(modules.intercepted, net.modules())):
        return False
    return "features" in _parameters_of(vars(owner)["forward"])  # else it is a helper of the network's


@functools.lru_cache(maxsize=64)
def _parameters_of(forward: Any) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def time_features(net: Any, times: Tensor, rows: int, most: int) -> Tensor | None:
    """What the network makes of `times` [n, …] before it looks at x, [n, …, width];
    None where `rows` times would take more than `most` bytes."""
    one = net.time_features(times.flatten()[:1])
    if one.nbytes * rows > most:
        return None
    return net.time_features(times.flatten()).view(*times.shape, *one.shape[1:])  # type: ignore[no-any-return]


# --- how a network is called -----------------------------------------------------------------------------------------


def like(values: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, …], to multiply x [B, *]."""
    return values.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def picked(cond: Condition, which: slice | Tensor) -> Condition:
    """Some samples' entries of a condition: a tensor, a dict of tensors, or None."""
    if isinstance(cond, dict):
        return type(cond)({key: value[which] for key, value in cond.items()})
    return None if cond is None else cond[which]


def moved(cond: Condition, device: torch.device) -> Condition:
    """A condition on this device."""
    if isinstance(cond, dict):
        return type(cond)({key: value.to(device) for key, value in cond.items()})
    return None if cond is None else cond.to(device)


def owned(cond: Condition) -> Condition:
    """A copy of a condition, which a network may change in place; what is expanded stays so, and takes no more memory."""
    if isinstance(cond, dict):
        return type(cond)({key: _copied(value) for key, value in cond.items()})
    return None if cond is None else _copied(cond)


def _copied(value: Tensor) -> Tensor:
    one = value[tuple(slice(None) if stride else slice(1) for stride in value.stride())]
    return one.detach().clone().expand(value.shape)


def answer(
    net: Any, variance: str | None, x: Tensor, time: Tensor, features: Tensor | None, cond: Condition
) -> tuple[Tensor, Tensor | None]:
    """The prediction [B, *] of net(x [B, *], time [B]), and its variance's half of the channels, checked."""
    shape, device = x.shape, x.device  # before the call, in which a network may change its input's
    output = call(net, x, time, cond, features)
    return check_output(output if isinstance(output, Tensor) else single_tensor(output), shape, device, variance)


def call(net: Any, x: Tensor, time: Tensor, cond: Condition, features: Tensor | None = None) -> Any:
    """net(x, time), with a condition (`ScoreModel.condition`) as its third argument or as keywords.

    features  what net.time_features made of the time
    """
    extra = {} if features is None else {"features": features}
    if cond is None:
        return net(x, time, **extra)
    return net(x, time, **cond, **extra) if type(cond) is dict else net(x, time, cond, **extra)


def single_tensor(output: Any) -> Tensor:
    """The one tensor of a network's output that is no tensor: its `.sample`, or the first entry of a tuple."""
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
    if output.is_nested or output.layout != torch.strided:
        got = "a nested one" if output.is_nested else f"layout {output.layout}"
        raise ModelOutputError(f"the model must return a dense strided tensor, got {got}")
    if output.device != device:
        raise ModelOutputError(f"the model returned a tensor on {output.device}, its input is on {device}")
    if output.dtype not in tensor_checks.DTYPES:
        raise ModelOutputTypeError(f"the model must return floating numbers of 16 bits or more, got {output.dtype}")
    output = output.resolve_neg()
    if output.shape == shape and variance is None:
        return output, None
    channels = shape[1]
    double = (shape[0], 2 * channels, *shape[2:])
    if output.shape == double:
        if variance is None:
            raise ModelOutputError(
                f"the model returned {2 * channels} channels for {channels}: if half are a learned variance, say "
                "ScoreModel(variance='learned_range') or samplers.Ancestral(variance='learned_range')"
            )
        return output[:, :channels], output[:, channels:]
    wanted = tuple(shape) if variance is None else double
    raise ModelOutputError(f"the model returned {tuple(output.shape)}, expected {wanted}")
