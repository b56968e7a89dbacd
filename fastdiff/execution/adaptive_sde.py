"""The adaptive SDE solver: a step size for each sample, and noise that no rejected step loses."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from .adaptive import AdaptiveRun, Field, Progress, Solution, Solver, power
from .reference import tree_sum

GROWTH = 5.0  # of a step to the next, at most


class NoisyField(Field, Protocol):
    """The same with a noise term g(u) dw: g [S, B], and standard normals [B, *], those of attempt k of each sample."""

    def diffusion(self, u: Tensor) -> Tensor: ...

    def noise(self, attempt: int, samples: Tensor) -> Tensor: ...


def integrate_sde(
    field: NoisyField,
    y: Tensor,
    start: float,
    end: float,
    solver: Solver,
    *,
    operations: ModuleType,
    progress: Progress | None = None,
) -> Solution:
    """dy = field(u, y) du + g(u) dw from `start` to `end` (Jolicoeur-Martineau et al. 2021, Alg. 1, with extrapolation):

        y' = y + h f(u, y) + √|h| g(u) z,   ỹ = y + h f(u + h, y') + √|h| g(u + h) z,   y'' = (y' + ỹ)/2

    accepted where √mean(((y' − y'')/δ)²) = E ≤ 1, δ = max(atol, rtol·max(|y'|, |y'_before|)); h ← 0.9 h E^{−0.9}, here at most
    GROWTH times the step that was wanted before. Theirs draws anew for each attempt; here the noise that a rejected step has seen
    stays (see _Stochastic). Raises as `integrate`.
    """
    return _Stochastic(field, y, start, end, solver, operations, progress).solve()


class _Stochastic(AdaptiveRun):
    """Also carried: y' of the last accepted step, and the pieces of the Brownian path ahead that rejected steps have drawn.

    An attempt that is rejected has seen its noise, and drawing anew until a step passes would choose the noise: of few
    numbers, whose error has luck, far too large a variance. So what was drawn stays (Rackauckas & Nie 2017, RSwM1): the
    path ahead is a stack of pieces (length, increment), of which a shorter step takes a part by a Brownian bridge.
    """

    carried = (*AdaptiveRun.carried, "before", "lengths", "pieces", "depth")
    cost = 2

    def __init__(self, field: NoisyField, y: Tensor, *args: Any) -> None:
        super().__init__(y, *args)
        self.field, self.before = field, self.y
        self.depth = torch.zeros_like(self.nfe)
        self.lengths, self.pieces = torch.zeros(len(y), 0, **self.wide), y.new_zeros(len(y), 0, *y.shape[1:])

    def step(self) -> None:
        bridged, every = self.depth > 0, torch.arange(len(self.u), device=self.u.device)
        self._make_room()
        top = (self.depth - 1).clamp(min=0)
        length, piece = self.lengths[every, top], self.pieces[every, top]
        h, size, last = self.trial(torch.where(bridged, length, torch.inf))
        shape = (-1, *[1] * (self.y.ndim - 1))
        part = torch.where(bridged, size / torch.where(bridged, length, 1.0), 0.0)
        spread = torch.where(bridged, size * (1 - part).clamp(min=0), size).sqrt()
        z = self.field.noise(self.steps, self.samples)
        wiener = part.to(z.dtype).view(shape) * piece + spread.to(z.dtype).view(shape) * z
        split = bridged & (size < length)
        self.lengths[every, top] = torch.where(split, length - size, size)
        self.pieces[every, top] = torch.where(split.view(shape), piece - wiener, wiener)
        place = torch.where(split, self.depth, top)
        self.lengths[every, place] = size
        self.pieces[every, place] = wiener
        self.depth = torch.where(self.running, place + 1, self.depth)

        reached = torch.where(last, self.end, self.u + h)
        ends = torch.stack((self.u, reached))
        first, second = self.field.at(ends, self.samples)
        step = h.to(self.y.dtype).view(shape)
        kicks = [g.to(z.dtype).view(shape) * wiener for g in self.field.diffusion(ends)]
        trial = self.y + step * first(self.y)[0] + kicks[0]
        after = 0.5 * (trial + (self.y + step * second(trial)[0] + kicks[1]))
        tolerance = (self.rtol * torch.maximum(trial.abs(), self.before.abs())).clamp(min=self.atol)
        error = (tree_sum(((trial - after) / tolerance).double().square()) / max(after[:1].numel(), 1)).sqrt()
        finite, accepted = error.isfinite(), self.running & (error <= 1)
        factor = 0.9 * power(error.clamp(min=1e-10), -0.9)
        # theirs grows without bound: after the rest of a piece, or by luck, a step over all that is left would look right
        next_h = torch.minimum(size * torch.where(finite, factor, 0.1), GROWTH * self.h)
        self.settle(accepted, finite, last, reached, next_h.clamp(max=self.span), {"y": after, "before": trial})
        self.depth = self.depth - accepted.long()

    def _make_room(self) -> None:
        """For the pieces of the steps until the next look."""
        if self.steps % self.look:
            return
        more = int(self.depth.max()) + self.look + 1 - self.lengths.shape[1]
        if more > 0:
            self.lengths = torch.cat((self.lengths, self.lengths.new_zeros(len(self.u), more)), 1)
            self.pieces = torch.cat((self.pieces, self.pieces.new_zeros(len(self.u), more, *self.y.shape[1:])), 1)
