"""Networks as they come: what wraps them, what a call of them runs beside their class's forward, their tensors by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.optim.swa_utils import AveragedModel


def inner(net: Any) -> Any:
    """The network within torch.compile, DataParallel, DistributedDataParallel and AveragedModel, in whatever order."""
    while (attribute := _wrapped(net)) is not None:
        net = getattr(net, attribute)
    return net


def state(net: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """A network's state dict, with the names that it has where neither it nor a part of it is wrapped.

    keep_vars   the parameters themselves, as torch's state_dict has it
    """
    network = inner(net)
    values, names = network.state_dict(keep_vars=keep_vars), _names(network)
    return {names(name): value for name, value in values.items() if isinstance(value, Tensor)}


def load_state(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of `state` into the network."""
    network = inner(net)
    names = _names(network)
    values = network.state_dict()
    network.load_state_dict({name: tensors.get(names(name), value) for name, value in values.items()})


def _names(network: nn.Module) -> Callable[[str], str]:
    """A name in the network's state dict -> the name that it has where no part is wrapped."""
    parts = network.named_modules(remove_duplicate=False)
    wrapped = [(f"{path}.", attribute) for path, part in parts if (attribute := _wrapped(part)) is not None]

    def plain(name: str) -> str:
        for path, attribute in reversed(wrapped):  # the inmost first
            if name.startswith(f"{path}{attribute}."):
                name = path + name.removeprefix(f"{path}{attribute}.")
        return name

    return plain


def intercepted(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its class's forward: a hook, or a forward of the instance's own."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
        or torch_modules._global_backward_hooks
        or torch_modules._global_backward_pre_hooks
    )


def _wrapped(net: Any) -> str | None:
    """The attribute of a wrapper that holds the network within."""
    if isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
        return "module"
    # torch.compile's, whose class is a second's import
    return "_orig_mod" if isinstance(net, nn.Module) and "_orig_mod" in net._modules else None
