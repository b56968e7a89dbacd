"""The batches of a training: clean data, times, noise and conditions of each step, a function of the seed and the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data import Data, LazyData
from ..data.augment import Augmentation
from ..execution import noise, ops
from ..execution.calls import picked
from ..execution.loop import Condition
from ..model import ScoreModel
from .objective import Batch, Objective

GOLDEN = (5**0.5 - 1) / 2  # whose multiples lie evenly in [0, 1)
LAST_DRAW = 2**32 - 1  # no training has so many steps

FEW = 2**24  # numbers, 64 MB


class Batches:
    """The clean data, times, noise cursor and conditions of step n: a function of (seed, n)."""

    def __init__(
        self, data: Data | LazyData, model: ScoreModel, objective: Objective, options: dict[str, Any],
        augment: Sequence[Augmentation] = (), rows: slice | None = None,
    ) -> None:  # fmt: skip
        """rows   the positions in each batch that are this process's; None: all"""
        self.data, self.model, self.objective, self.seed = data, model, objective, options["seed"]
        self.size, self.dequantize, self.augment = options["batch_size"], options["dequantize"], augment
        self.rows = slice(0, self.size) if rows is None else rows
        self.device = next(model.net.parameters()).device
        self.places = torch.arange(self.size, device="cpu")
        self.ready: Tensor | None = None  # all clean data as the network sees them, where they are few
        if isinstance(data, Data) and data.x.numel() <= FEW and not self.dequantize:
            every = torch.arange(len(data), device="cpu").split(max(1, 2**20 * len(data) // data.x.numel()))
            self.ready = torch.cat([self._clean(data, some, 0, 0) for some in every])
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64, device="cpu")
        self.ahead: tuple[int, Iterator[Data]] = (-1, iter(()))  # the step that the readers give next

    def __call__(self, step: int) -> Batch:
        # one number for each sample, and one for the step; by the host, as a device takes a hundred small kernels for it
        u = ops.uniform(self.size + 1, (1,), stream=noise.TIMES, seed=self.seed, draw=step)[:, 0]
        u, of_step = u[:-1], u[-1]
        if self.objective.times.stratified:
            u = (self.places + u) / self.size
        drawn = self.objective.draw(u, float(of_step) if self.objective.truncation == "soft" else 0.0).to(self.device)
        if isinstance(self.data, LazyData):
            data, index = self._read(step, self.data), torch.arange(self.rows.stop - self.rows.start, device="cpu")
        else:
            data, index = self.data, self._indices(step)[self.rows]
        first = self.rows.start
        x0 = self._clean(data, index, step, first) if self.ready is None else self.ready.index_select(0, index)
        cond = self._beside(data, index)
        if self.augment:
            x0, cond = self._augmented(x0, cond, step)
        cursor = ops.cursor(step, first, self.seed, self.device)
        x0 = x0.to(self.device, non_blocking=True)  # of memory that is not pinned: it is read before the call returns
        return Batch(x0, cursor, self._conditions(*cond, step), drawn.of(self.rows), drawn)

    def parts(self, step: int, count: int) -> Iterator[Batch]:
        """Batch n in `count` equal parts: the same samples, times and noise."""
        batch = self(step)
        if count == 1:
            yield batch
            return
        size = len(batch.x0) // count
        for first in range(0, len(batch.x0), size):
            part = slice(first, first + size)
            cursor = ops.cursor(step, self.rows.start + first, self.seed, self.device)
            yield Batch(batch.x0[part], cursor, picked(batch.cond, part), batch.drawn.of(part), batch.everyones)

    def _read(self, step: int, data: LazyData) -> Data:
        """The samples of a step, of which those of the next ones are being read."""
        at, parts = self.ahead
        if at != step:
            parts = data.parts(self._indices(k)[self.rows] for k in itertools.count(step))
        part = next(parts)
        self.ahead = step + 1, parts
        return part

    def close(self) -> None:
        """End the readers."""
        self.ahead = (-1, iter(()))

    def whole(self) -> Iterator[Batch]:
        """All of the data once, in order, with times and noise that are the same at every call, and all of their conditions."""
        for start in range(0, len(self.data), self.size):
            index = torch.arange(start, min(start + self.size, len(self.data)), device="cpu")
            u = (index.double() * GOLDEN) % 1  # even, whatever the data's order
            drawn = self.objective.draw(u.float().to(self.device), 0.0)
            x0 = self._clean(self.data, index, LAST_DRAW, start) if self.ready is None else self.ready[index]
            cond = self._beside(self.data, index)
            cursor = ops.cursor(LAST_DRAW, start, self.seed, self.device)
            yield Batch(x0.to(self.device), cursor, self._conditions(*cond, None), drawn, drawn)

    def _clean(self, data: Data, index: Tensor, draw: int, first: int) -> Tensor:
        """Samples in the network's units."""
        own = self.model.standardize is not None  # vectors in their own units
        data_range = data.range if own else self.model.data_range
        if self.dequantize:
            x0 = data.dequantized(index, data_range, seed=self.seed, draw=draw, first_sample=first)
        elif own and data.bins is None:
            x0 = data.raw(index).double()
        else:
            x0 = data.batch(index, data_range)
        return self.model.standardized(x0).float()

    def _beside(self, data: Data, index: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Labels and conditions, where the model takes them."""
        labels = data.labels[index] if self.model.num_classes and data.labels is not None else None
        return labels, data.cond[index] if self.model.cond_shape and data.cond is not None else None

    def _augmented(self, x0: Tensor, beside: tuple[Tensor | None, Tensor | None], step: int) -> Any:
        """Samples after the augmentations, and fields beside them alike."""
        labels, cond = beside
        many = sum(each.numbers for each in self.augment)
        first = self.rows.start
        u = ops.uniform(len(x0), (many,), stream=noise.AUGMENTATION, seed=self.seed, draw=step, first_sample=first)
        for each in self.augment:
            mine, u = u[:, : each.numbers], u[:, each.numbers :]
            x0 = each(x0, mine)
            if cond is not None and cond.ndim > 2:
                cond = each(cond, mine)
        return x0, (labels, cond)

    def _conditions(self, labels: Tensor | None, cond: Tensor | None, step: int | None) -> Condition:
        """Labels and conditions as the network takes them; with `cond_dropout` those of a sample are left out with that
        probability, but in no evaluation (step None)."""
        share = self.model.cond_dropout
        if share and step is not None and (labels is not None or cond is not None):
            u = ops.uniform(self.size, (1,), stream=noise.CONDITIONS, seed=self.seed, draw=step)[self.rows, 0]
            if labels is not None:
                labels = torch.where(u < share, self.model.null_label, labels)
            if cond is not None:
                cond = torch.where((u < share).view(-1, *[1] * (cond.ndim - 1)), math.nan, cond)
        labels, cond = (v if v is None else v.to(self.device, non_blocking=True) for v in (labels, cond))
        return self.model.takes.joined(labels, cond)

    def _indices(self, step: int) -> Tensor:
        """Positions step·B … (step + 1)·B − 1 of an endless sequence of shuffled epochs."""
        start, count = step * self.size, len(self.data)
        stop, pieces = start + self.size, []
        for epoch in range(start // count, (stop - 1) // count + 1):
            if epoch != self.epoch:
                self.epoch, self.order = epoch, ops.permutation(count, seed=self.seed, draw=epoch)
            pieces.append(self.order[max(start - epoch * count, 0) : stop - epoch * count])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
