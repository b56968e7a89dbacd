"""What torch's dispatcher sees of a piece of code: its operations by name, what a graph could not repeat, a tape to repeat it."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdiff.errors import GraphError
from fastdiff.execution.torch_private import is_alias_of

# what CUDA says of what no capture can hold
NOT_WHILE_CAPTURING = "CUDA error: operation not permitted when stream is capturing"


class Unsafe(AssertionError):
    pass


def tensors(tree):
    return [value for value in tree_leaves(tree) if isinstance(value, Tensor)]


class Names(TorchDispatchMode):
    """The operations' names, in `.seen`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Refuses what no captured graph could repeat: all but fastdiff's own operations, filling a tensor with a number, views."""

    def __init__(self):
        super().__init__()
        self.operations = 0  # fastdiff's

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fastdiff":
            self.operations += 1
        elif func is not ops.aten.fill_.Scalar:
            if len(tensors(out)) < len(tree_leaves(out)):
                raise Unsafe(f"{func} reads a number")
            if not all(any(is_alias_of(v, w) for w in tensors((args, kwargs))) for v in tensors(out)):
                raise Unsafe(f"{func} makes a tensor")
            if func._schema.is_mutable:
                raise Unsafe(f"{func} is not one of fastdiff's")
        return out


# what reads a number on the host, or brings some from there
FROM_OR_TO_THE_HOST = (
    ops.aten._local_scalar_dense.default, ops.aten.nonzero.default, ops.aten.equal.default, ops.aten.lift_fresh.default,
)  # fmt: skip


class Tape(TorchDispatchMode):
    """Records operations, tensors by their memory and numbers by their value; `replay` repeats them without any Python.

    As a device's, a capture executes nothing: at its end what was there before is as it was, and what it made is NaN.
    """

    capturing = threading.local()  # .now: whether this thread records

    def __init__(self):
        super().__init__()
        self.calls = []

    def __enter__(self):
        self.before, self.capturing.now = {}, True
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.capturing.now = False
        for memory, value in self.before.values():
            memory.copy_(value)
        for *_, made, is_new in self.calls:
            for memory in made if is_new else ():
                memory.fill_(float("nan") if memory.is_floating_point() else 113)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FROM_OR_TO_THE_HOST:
            raise RuntimeError(f"{NOT_WHILE_CAPTURING}\nSearch for `cudaErrorStreamCaptureUnsupported' and more lines")
        for memory in written(func, args, kwargs):
            whole = torch.empty(0, dtype=memory.dtype).set_(memory.untyped_storage())
            self.before.setdefault(memory.untyped_storage().data_ptr(), (whole, whole.clone()))
        out = func(*args, **kwargs)
        made, given = tensors(out), tensors((args, kwargs))
        is_new = not all(any(is_alias_of(v, w) for w in given) for v in made)
        # the memory alone: the tensors themselves become parts of autograd's graph
        self.calls.append((func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs, made)), is_new))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, made, is_new in self.calls:
            again = func(*args, **kwargs)
            if is_new:
                for memory, value in zip(made, tensors(again), strict=True):
                    memory.copy_(value)


def on_tape(warm, bodies, device):
    """cuda_graph.capture, on tapes."""
    warm()
    tapes = [Tape() for _ in bodies]
    try:
        for tape, body in zip(tapes, bodies):
            with tape:
                body()
    except Exception as error:
        raise GraphError(str(error).partition("\n")[0]) from error
    return tapes


def written(func, args, kwargs):
    """The tensors that an operation writes."""
    for n, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors(args[n] if n < len(args) and not argument.kwarg_only else kwargs.get(argument.name))
