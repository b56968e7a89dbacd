"""Networks as they come: what wraps them, what a call of them runs beside their class's forward, their tensors by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.optim.swa_utils import AveragedModel

from . import torch_private


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


def part_with_graphs(net: Any) -> str | None:
    """The part of a network that torch.compile gave CUDA graphs of its own, in words, or None. Looks at its modules, at what
    they, their classes and other objects hold, and at what functions close over and name."""
    todo, seen = [("", net, 0)], set[int]()
    while todo:
        path, part, hops = todo.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if torch_private.compiles_to_graphs(part):
            return f"its part {path!r}" if path else "the network"
        is_function = isinstance(part, FunctionType)
        if hops < 3 or not is_function:  # functions name functions that name functions
            at = "" if is_function else path
            found = [(name, value) for name, value in _parts(part) if callable(value)]
            todo += [(".".join(filter(None, (at, name))), value, hops + is_function) for name, value in found]
    return None


def _parts(part: Any) -> list[tuple[str, Any]]:
    """What a call of a module, function or object may call, by name; of torch's own, only what modules hold."""
    if not isinstance(part, nn.Module) and torch_private.uncompiled(part) is not None:
        return [("", torch_private.uncompiled(part))]
    if isinstance(part, MethodType):
        return [(part.__name__, part.__func__), ("", part.__self__)]
    if isinstance(part, functools.partial):
        return [("", part.func), *part.keywords.items(), *((str(n), value) for n, value in enumerate(part.args))]
    if isinstance(part, type) or _is_torchs(part if isinstance(part, FunctionType) else type(part)):
        return list(part._modules.items()) if isinstance(part, nn.Module) else []
    if isinstance(part, FunctionType):
        code, globals_, cells = part.__code__, part.__globals__, zip(part.__code__.co_freevars, part.__closure__ or ())
        named = [(name, globals_[name]) for name in code.co_names if name in globals_]
        held = [(name, cell.cell_contents) for name, cell in cells if cell != CellType()]
        defaults = (*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values())
        return [*named, *held, *(("", value) for value in defaults)]
    methods = [
        (name, value) for kind in type(part).__mro__ if not _is_torchs(kind) for name, value in vars(kind).items()
    ]
    held = [*getattr(part, "__dict__", {}).items(), *(part._modules.items() if isinstance(part, nn.Module) else ())]
    return [(name, value) for name, value in methods if isinstance(value, FunctionType)] + held


def _is_torchs(thing: Any) -> bool:
    return str(thing.__module__).startswith("torch.")


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
