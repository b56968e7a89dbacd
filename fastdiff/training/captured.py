"""A training's step as CUDA graphs. Experimental: no device has run it yet.

The first graph is the passes: forward, loss, backward and the gradient's norm, on a batch in memory that stays where it is. Then
the host reads loss and norm, as it does without graphs, and decides whether the step is taken. The second is the update:
clipping, the one call of Adam's kernel, rounded copies of the weights. Both read on the device what changes from step to step:
the batch, the noise's cursor, the rate, Adam's count. Batches are made outside, and so are averages, one call each, whose decay
torch's kernels take from the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..execution import cuda_graph, graphs, ops
from ..execution.calls import dtype_of
from ..losses import BOUNDED
from ..losses.times import Drawn
from ..losses.weights import Learned
from ..planning.processes import keeping
from . import optimisers
from .objective import Batch, Objective
from .ranks import Ranks
from .state import State

# Steps that a call takes eagerly before the capture: then Adam has its moments, and the network what it keeps.
EAGER_STEPS = 2


class Passes(NamedTuple):
    """What a step's passes leave on the device: the losses of each of its parts [B/parts], its loss, and what State.measure
    gives, or None before it has."""

    values: list[Tensor]
    loss: Tensor
    measured: Tensor | tuple[float, float] | None = None


def resolve(
    objective: Objective, ranks: Ranks, options: dict[str, Any], steps: int, compile: bool, engine: str
) -> tuple[str, str]:
    """The engine that trains, "eager" or "graph", and a sentence saying why; ConfigError where "graph" cannot."""
    net = objective.model.net
    places = {p.device for p in net.parameters()}
    device = next(iter(places))
    reason = graphs.obstacle(net, device, steps, None, engine)
    others = {
        f"the network lies on {len(places)} devices": len(places) > 1,
        f"{ranks.world} processes train it, which exchange gradients within a step": ranks.world > 1,
        "precision='fp16' scales its loss by a number of the host's": options["precision"] == "fp16",
        "compile=True makes kernels of its own, whose capture nobody has tried": compile,
        "weight='learned' looks up a table on the host": isinstance(objective.weight, Learned),
        f"loss={objective.loss!r} asks on the host which samples stand at a chain's last step": objective.loss
        in BOUNDED,
    }
    if reason is None:
        reason = next((text for text, holds in others.items() if holds), None)
    wide = dtype_of(net, torch.float32) == torch.float64
    return ops.resolve("auto", engine, device, torch.float64 if wide else torch.float32, reason)[1:]


class CapturedStep:
    """The graphs of a step, and the memory that they read.

    passes   the passes of a step's parts; returns the losses of each part, and leaves the rest in `state`
    parts    those of a step, by which the memory is made

    Raises GraphError, with network and gradients as an eager step expects them, where the step cannot be captured.
    """

    def __init__(self, state: State, passes: Callable[[Sequence[Batch]], list[Tensor]], parts: Sequence[Batch]) -> None:
        self.state, self.parts = state, [_apart(part) for part in parts]
        device = state.parameters[0].device
        self.device, self.tables = device, dict[Any, Any]()
        # CUDA's fused kernels read a rate of float32, the CPU's one of any precision
        self.lr = torch.zeros((), dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)
        # of the gradients, where they are clipped
        self.factor = torch.zeros((), dtype=state.weights[0].dtype, device=device)
        bodies, factors = [functools.partial(self._pass, passes)], dict[bool, Any]()
        if optimisers.in_one_call(state.optimisers):
            factors = {False: 1.0, True: self.factor} if state.options["grad_clip"] is not None else {False: 1.0}
            bodies += [functools.partial(state.update, factor, self.lr) for factor in factors.values()]
        buffers = [(buffer, buffer.detach().clone()) for buffer in state.net.buffers()]
        try:
            # the warm-up draws, of which the step that follows knows nothing
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                made, _ = graphs.record(state.net, functools.partial(self._calls, bodies[0]), bodies, device)
        finally:
            state.loss = None
            with torch.no_grad():
                for buffer, was in buffers:  # which the passes of the warm-up have changed
                    buffer.copy_(was)
        self.graph, *updates = made
        self.updates = dict(zip(factors, updates))  # by whether gradients are clipped
        self.gradients = [w.grad for w in state.weights]
        self.baked = self._baked()

    def _pass(self, passes: Callable[[Sequence[Batch]], list[Tensor]]) -> None:
        with keeping(self.tables):
            values = passes(self.parts)
            loss = self.state.loss
            self.left = Passes(values, loss, self.state.measure())  # type: ignore[arg-type]

    def _calls(self, body: Callable[[], None]) -> Iterator[None]:
        body()
        yield

    def passes(self, parts: Sequence[Batch]) -> Passes:
        """The passes of a step's parts. What they leave is overwritten by the next step's."""
        for own, part in zip(self.parts, parts):
            for memory, value in zip(_tensors(own), _tensors(part), strict=True):
                memory.copy_(value, non_blocking=True)
        for w, gradient in zip(self.state.weights, self.gradients):  # where others have put theirs in their place
            w.grad = gradient
        self.graph.replay()
        return self.left

    @property
    def update(self) -> Callable[[float], None] | None:
        """The replay of State.update, or None where it was not captured."""
        return self._update if self.updates else None

    def _update(self, factor: float) -> None:
        self.lr.fill_(self.state.optimisers[0].param_groups[0]["lr"])
        self.factor.fill_(factor)
        self.updates[factor != 1].replay()

    def fits(self) -> bool:
        """Whether the network, and the settings that a capture bakes in, are as they were then."""
        return self.baked == self._baked()

    def _baked(self) -> Any:
        flags = [module.training for module in self.state.modules], [p.requires_grad for p in self.state.parameters]
        return graphs.fingerprint_of(self.state.net), flags, cuda_graph.surroundings(self.device)

    def close(self) -> None:
        """Leave no gradients in the memory of the graphs, which then goes with them."""
        for tensor in (*self.state.parameters, *self.state.weights):
            tensor.grad = None
        self.state.gradients.clear()


def failed(error: Exception) -> str:
    """Why there is no capture, in words."""
    return f"the step cannot be captured as CUDA graphs ({cuda_graph.first_line(error)})"


def _apart(batch: Batch) -> Batch:
    """A batch in memory of its own."""
    cond = batch.cond
    if cond is not None:
        cond = {k: v.clone() for k, v in cond.items()} if isinstance(cond, dict) else cond.clone()
    drawn = Drawn(*(None if value is None else value.clone() for value in batch.drawn))  # type: ignore[arg-type]
    return Batch(batch.x0.clone(), batch.cursor.clone(), cond, drawn, drawn)


def _tensors(batch: Batch) -> list[Tensor]:
    """All that the passes read of a batch."""
    cond = batch.cond
    more = [] if cond is None else list(cond.values()) if isinstance(cond, dict) else [cond]
    return [batch.x0, batch.cursor, *more, *(value for value in batch.drawn if value is not None)]
