"""What a sampler asks of torch in a step, network aside: operations, numbers read on the host, the most memory at once."""

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastdiff.execution import ops

DRAWS = {torch.ops.aten.normal_.default, torch.ops.aten.randn.default, torch.ops.aten.randn_like.default}
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


# large: they touch a tensor of the state's size, on a GPU each is a kernel or more; a host reads a number or a shape, for which
# it waits where that lies on a GPU; draws are tensors of normal numbers
METRICS = ("large operations", "small operations", "host reads", "draws")


class _Counter(TorchDispatchMode):
    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.found = numel, dict.fromkeys(METRICS, 0)
        self.held: dict[int, list[int]] = {}  # address of a storage -> [its tensors, its bytes]
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        made = [v for v in tree_leaves(out) if isinstance(v, torch.Tensor)]
        is_view = bool(made) and not func._schema.is_mutable and all(
            any(torch._C._is_alias_of(v, w) for w in given) for v in made
        )  # fmt: skip
        is_large = any(v.numel() >= self.numel for v in [*given, *made])
        if func in DRAWS or (
            func.namespace == "fastdiff" and args[3] is not None
        ):  # the stream of a step, a measurement
            self.found["draws"] += is_large
        if func in READS:
            self.found["host reads"] += 1
        elif not is_view and not any(word in func._schema.name for word in ("empty", "resize")):
            self.found["large operations" if is_large else "small operations"] += 1
        for value in made:
            self._hold(value)
        return out

    def _hold(self, value: torch.Tensor) -> None:
        address, size = value.untyped_storage().data_ptr(), value.untyped_storage().nbytes()
        if not address:
            return
        entry = self.held.setdefault(address, [0, size])
        self.bytes += 0 if entry[0] else size
        self.peak = max(self.peak, self.bytes)
        entry[0] += 1
        weakref.finalize(value, self._drop, address)

    def _drop(self, address: int) -> None:
        entry = self.held.get(address, [0, 0])
        entry[0] -= 1
        if not entry[0]:
            self.bytes -= self.held.pop(address)[1]


def unseen(net: Any) -> Callable[..., Any]:
    """The network, out of the counter's sight."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            out = net(*args, **kwargs)
        return out.detach()  # in its sight: the answer is held, by whoever asked

    return call


def count(run: Callable[[int], object], numel: int, steps: int) -> dict[str, float]:
    """Per step, what a run of 2·steps asks more than one of steps; and the float32 states that the shorter holds at once."""
    counters = []
    for n in (steps, steps, 2 * steps):  # the first sets up what lasts
        with torch.no_grad(), _Counter(numel) as counter:
            run(n)
        counters.append(counter)
    _, one, two = counters
    found = {f"{name} per step": round((two.found[name] - one.found[name]) / steps) for name in METRICS}
    return {**found, "states held at once": one.peak / (4 * numel)}


def dispatched() -> types.SimpleNamespace:
    """fastdiff's operations as torch's dispatcher sees them; called directly they pass it by."""
    operators = {name: getattr(torch.ops.fastdiff, name) for name in ops.SCHEMAS}

    def prepare_step(out, table, stream, x, **operands):
        return lambda cursor, m, v: operators["step"](out, table, cursor, stream, x, m, v=v, **operands)

    return types.SimpleNamespace(**operators, prepare_step=prepare_step, KEEPS_NOISE=True)
