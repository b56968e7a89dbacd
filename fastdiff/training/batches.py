"""The batches of a training: clean data, times, noise and conditions of each step, a function of the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..data import Data
from ..execution import noise, ops
from ..execution.calls import picked
from ..execution.loop import Condition
from ..model import ScoreModel

FEW = 2**24  # numbers, 64 MB


class Batches:
    """The clean data, times, noise cursor and labels of step n: a function of (seed, n)."""

    def __init__(self, data: Data, model: ScoreModel, options: dict[str, Any]) -> None:
        self.data, self.model, self.seed = data, model, options["seed"]
        self.size, self.dequantize = options["batch_size"], options["dequantize"]
        self.device = next(model.net.parameters()).device
        self.labels = data.labels if model.num_classes else None
        self.places = torch.arange(self.size, device=self.device)
        self.ready: Tensor | None = None  # all clean data as the network sees them, where they are few
        if data.x.numel() <= FEW and not self.dequantize:
            every = torch.arange(len(data), device="cpu").split(max(1, 2**20 * len(data) // data.x.numel()))
            self.ready = torch.cat([self._clean(some, 0) for some in every])
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def parts(self, step: int, count: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Condition]]:
        """Batch n in `count` equal parts: the same samples, times and noise."""
        x0, t, cursor, cond = self(step)
        if count == 1:
            yield x0, t, cursor, cond
            return
        size = len(x0) // count
        for first in range(0, len(x0), size):
            part = slice(first, first + size)
            yield x0[part], t[part], ops.cursor(step, first, self.seed, self.device), picked(cond, part)

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        index = self._indices(step)
        x0 = self._clean(index, step) if self.ready is None else self.ready.index_select(0, index)
        # one time in each of B equal slices: uniform for every sample, and a quieter loss (Kingma et al. 2021, §I.1)
        u = ops.uniform(self.size, (1,), stream=noise.TIMES, device=self.device, seed=self.seed, draw=step)[:, 0]
        u = (self.places + u) / self.size
        return (
            x0.to(self.device),
            self.model.process.training_times(u.clamp(max=1 - 2**-24)),
            ops.cursor(step, 0, self.seed, self.device),
            None if self.labels is None else self.labels[index].to(self.device),
        )

    def _clean(self, index: Tensor, step: int) -> Tensor:
        """Those samples as the network sees them, float32 [B, *shape]."""
        own = self.model.standardize is not None  # vectors in their own units
        data_range = self.data.range if own else self.model.data_range
        if self.dequantize:
            x0 = self.data.dequantized(index, data_range, seed=self.seed, draw=step)
        elif own and self.data.bins is None:
            x0 = self.data.x.index_select(0, index).double()
        else:
            x0 = self.data.batch(index, data_range)
        return self.model.standardized(x0).float()

    def _indices(self, step: int) -> Tensor:
        """Positions step·B … (step + 1)·B − 1 of an endless sequence of shuffled epochs."""
        start, count = step * self.size, len(self.data)
        stop, pieces = start + self.size, []
        for epoch in range(start // count, (stop - 1) // count + 1):
            if epoch != self.epoch:
                self.epoch, self.order = epoch, ops.permutation(count, seed=self.seed, draw=epoch)
            pieces.append(self.order[max(start - epoch * count, 0) : stop - epoch * count])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
