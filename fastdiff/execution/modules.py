"""Networks as they come: what wraps them, what a call of them runs beside their class's forward, their tensors by name."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType, GeneratorType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
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
    """The part of a network that torch.compile gave CUDA graphs of its own, in words, or None."""
    for path, part in reach(net):
        if not isinstance(part, type) and torch_private.compiles_to_graphs(part):
            return f"its part {path!r}" if path else "the network"
    return None


@contextlib.contextmanager
def compiled(net: Any, wanted: bool) -> Iterator[None]:
    """A block in which calls of a network are compiled, where that is `wanted`."""
    if not wanted:
        yield
        return
    restore = torch_private.compile_in_place(net)
    try:
        yield
    finally:
        restore()


def reach(net: Any) -> Iterator[tuple[str, Any]]:
    """(path, object) of what a call of a network may touch: all its modules, then the nearest first: objects, what they
    and their classes hold, what functions close over and name, and tensors. Gives up on large containers, and after MANY
    objects."""
    parts = net.named_modules() if isinstance(net, nn.Module) else ()
    todo, seen = deque([("", net, 0), *((path, part, 0) for path, part in parts)]), dict[int, Any]()
    while todo and len(seen) < MANY:
        path, part, hops = todo.popleft()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        yield path, part
        if isinstance(part, (FunctionType, type)):
            path, hops = "" if isinstance(part, FunctionType) else path, hops + 1
        if hops <= 4:  # a class has functions that name functions that name functions
            for name, value in _held(part):
                if not isinstance(value, ATOMS) and (
                    type(value) is not OrderedDict or value
                ):  # hooks that nobody has set
                    todo.append((f"{path}.{name}" if path and name else path or name, value, hops))


MANY, LARGE = 50_000, 1_000
ATOMS = (type(None), bool, int, float, complex, str, bytes, ModuleType)
INSIDE = {"_modules", "_parameters", "_buffers"}  # of a module, where its parts have their names
# of the standard library, which hold what a network's author puts there
HOLDERS = (SimpleNamespace, threading.local, UserDict, UserList, weakref.WeakKeyDictionary)


def entries(part: Any) -> dict[Any, Any] | None:
    """What a call may replace in an object, by name, place or identity: in a container, a cell, a class, slots, a
    generator's frame, and of a module's globals those that a function names. None for other objects, whose __dict__ is
    asked by itself."""
    if isinstance(part, dict):
        return dict(part)
    if isinstance(part, (list, deque)):
        return dict(enumerate(tuple(part)))
    if isinstance(part, set):
        return {id(value): value for value in tuple(part)}
    if isinstance(part, CellType):
        return {} if part == CellType() else {"cell_contents": part.cell_contents}
    if isinstance(part, GeneratorType):
        return {} if part.gi_frame is None else dict(part.gi_frame.f_locals)
    if isinstance(part, FunctionType):
        known = {} if _is_foreign(part) else part.__globals__
        return {name: known[name] for name in part.__code__.co_names if name in known}
    if isinstance(part, type):
        return None if _is_foreign(part) else dict(vars(part))
    kinds = [vars(kind) for kind in type(part).__mro__ if "__slots__" in vars(kind) and not _is_foreign(kind)]
    found = {}
    for name, slot in (item for kind in kinds for item in kind.items()):
        if isinstance(slot, MemberDescriptorType):
            with contextlib.suppress(AttributeError):  # nothing is there
                found[name] = slot.__get__(part)
    return found if kinds else None


def put(part: Any, name: Any, values: dict[Any, Any]) -> None:
    """Give an object that entry of `values`, or none where these have none."""
    if isinstance(part, FunctionType):
        part = part.__globals__
    if isinstance(part, dict):
        if name in values:
            part[name] = values[name]
        else:
            part.pop(name, None)
    elif isinstance(part, (list, deque, set)):
        part.clear()
        part.update(values.values()) if isinstance(part, set) else part.extend(values.values())
    elif isinstance(part, GeneratorType):
        pass  # nobody can
    elif name in values:
        setattr(part, name, values[name])
    else:
        delattr(part, name)


def _held(part: Any) -> Iterable[tuple[str, Any]]:
    """What an object holds, by name."""
    if isinstance(part, Tensor):
        return ()
    if isinstance(part, dict):
        items = tuple(part.items()) if len(part) < LARGE else ()  # at once, as other threads may change it
        return [("" if key in INSIDE else str(key), value) for key, value in items]
    if isinstance(part, (list, tuple, set, deque)):
        return [(str(n), value) for n, value in enumerate(tuple(part))] if len(part) < LARGE else ()
    if isinstance(part, (CellType, GeneratorType)):
        return [("", value) for value in (entries(part) or {}).values()]
    if isinstance(part, type):
        return (entries(part) or {}).items()
    if isinstance(part, MethodType):
        return [(part.__name__, part.__func__), ("", part.__self__)]
    if isinstance(part, functools.partial):
        return [("", part.func), ("", part.args), ("", part.keywords)]
    if isinstance(part, FunctionType):
        if torch_private.uncompiled(part) is not None:
            return [("", torch_private.uncompiled(part))]
        cells = () if _is_foreign(part) else zip(part.__code__.co_freevars, part.__closure__ or ())
        return [*(entries(part) or {}).items(), *cells, ("", part.__defaults__), ("", part.__kwdefaults__)]
    if not isinstance(part, (nn.Module, *HOLDERS)) and _is_foreign(type(part)):
        return ()
    kinds = [("", kind) for kind in type(part).__mro__]
    return [("", getattr(part, "__dict__", None)), *(entries(part) or {}).items(), *kinds]


def _is_foreign(thing: Any) -> bool:
    """Whether a function or a class is none of a network's author."""
    package = str(thing.__module__).partition(".")[0]
    return package in sys.stdlib_module_names or package in ("torch", "numpy", "triton", "fastdiff")


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
