"""The batches of a training: clean data, times, noise and conditions of each step, a function of the seed and the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..data import Data
from ..execution import noise, ops
from ..execution.loop import Condition
from ..losses.times import Drawn
from ..model import ScoreModel
from .objective import Batch, Objective

GOLDEN = (5**0.5 - 1) / 2  # whose multiples lie evenly in [0, 1)
LAST_DRAW = 2**32 - 1  # no training has so many steps


class Batches:
    """The clean data, times, noise cursor and conditions of step n: a function of (seed, n)."""

    def __init__(
        self, data: Data, model: ScoreModel, objective: Objective, options: dict[str, Any], rows: slice | None = None
    ) -> None:  # fmt: skip
        """rows   the positions in each batch that are this process's; None: all"""
        self.data, self.model, self.objective, self.seed = data, model, objective, options["seed"]
        self.size, self.dequantize = options["batch_size"], options["dequantize"]
        self.rows = slice(0, self.size) if rows is None else rows
        self.device = next(model.net.parameters()).device
        self.labels = data.labels if model.num_classes else None
        self.cond = data.cond if model.cond_shape else None
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def __call__(self, step: int) -> Batch:
        index = self._indices(step)
        # one number for each sample, and one for the step
        u = noise.uniform(self.size + 1, (1,), stream=noise.TIMES, device=self.device, seed=self.seed, draw=step)[:, 0]
        u, of_step = u[:-1], u[-1]
        if self.objective.times.stratified:
            u = (torch.arange(self.size, device=self.device) + u) / self.size
        drawn = self.objective.draw(u, float(of_step) if self.objective.truncation == "soft" else 0.0)
        own = index[self.rows]
        cond = self._conditions(own, step)
        return self._batch(own, step, self.rows.start, drawn.of(self.rows), cond)._replace(everyones=drawn)

    def whole(self) -> Iterator[Batch]:
        """All of the data once, in order, with times and noise that are the same at every call, and all of their conditions."""
        for start in range(0, len(self.data), self.size):
            index = torch.arange(start, min(start + self.size, len(self.data)), device="cpu")
            u = (index.double() * GOLDEN) % 1  # even, whatever the data's order
            drawn = self.objective.draw(u.float().to(self.device), 0.0)
            yield self._batch(index, LAST_DRAW, start, drawn, self._conditions(index, None))

    def _batch(self, index: Tensor, draw: int, first: int, drawn: Drawn, cond: Condition) -> Batch:
        own = self.model.standardize is not None  # vectors in their own units
        data_range = self.data.range if own else self.model.data_range
        if self.dequantize:
            x0 = self.data.dequantized(index, data_range, seed=self.seed, draw=draw, first_sample=first)
        elif own and self.data.bins is None:
            x0 = self.data.x.index_select(0, index).double()
        else:
            x0 = self.data.batch(index, data_range)
        x0 = self.model.standardized(x0).float()
        return Batch(x0.to(self.device), ops.cursor(draw, first, self.seed, self.device), cond, drawn, drawn)

    def _conditions(self, index: Tensor, step: int | None) -> Condition:
        """The labels and conditions of a step; with `cond_dropout` those of a sample are left out with that probability."""
        labels, cond = (None if beside is None else beside[index] for beside in (self.labels, self.cond))
        share = self.model.cond_dropout
        if share and step is not None and (labels is not None or cond is not None):
            u = noise.uniform(self.size, (1,), stream=noise.CONDITIONS, seed=self.seed, draw=step)[self.rows, 0]
            if labels is not None:
                labels = torch.where(u < share, self.model.null_label, labels)
            if cond is not None:
                cond = torch.where((u < share).view(-1, *[1] * (cond.ndim - 1)), math.nan, cond)
        labels, cond = (None if beside is None else beside.to(self.device) for beside in (labels, cond))
        return self.model.takes.joined(labels, cond)

    def _indices(self, step: int) -> Tensor:
        """Positions step·B … (step + 1)·B − 1 of an endless sequence of shuffled epochs."""
        start, count = step * self.size, len(self.data)
        stop, pieces = start + self.size, []
        for epoch in range(start // count, (stop - 1) // count + 1):
            if epoch != self.epoch:
                self.epoch, self.order = epoch, noise.permutation(count, seed=self.seed, draw=epoch)
            pieces.append(self.order[max(start - epoch * count, 0) : stop - epoch * count])
        return torch.cat(pieces)
