"""What torch's dispatcher sees of a piece of code: its operations by name, what a graph could not repeat, a tape to repeat it."""

from __future__ import annotations

from torch import Tensor, ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.execution.torch_private import is_alias_of


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


class Tape(TorchDispatchMode):
    """Records operations, tensors by their memory and numbers by their value; `replay` repeats them without any Python."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (ops.aten._local_scalar_dense.default, ops.aten.nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        out = func(*args, **kwargs)
        made, given = tensors(out), tensors((args, kwargs))
        is_new = not all(any(is_alias_of(v, w) for w in given) for v in made)
        self.calls.append((func, args, kwargs, made, is_new))
        return out

    def replay(self):
        for func, args, kwargs, made, is_new in self.calls:
            again = func(*args, **kwargs)
            if is_new:
                for memory, value in zip(made, tensors(again), strict=True):
                    memory.copy_(value)
