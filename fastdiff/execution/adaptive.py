"""Adaptive solvers with a step size for each sample: sample i goes from `start` to `end` in steps h_i, accepted where its
own error norm is at most 1. Here is what they share, and embedded Runge–Kutta; adaptive_sde has the other.

Finished samples are dropped from the batch every few steps (POLL), which is the only host read: a stiff sample costs the
others nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, SolverError
from ..table import Tableau
from .reference import tree_sum

# (y [B, *]) -> dy/du [B, *], and the rates [B, K] of what is only integrated (K = 0: None)
Stage = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Field(Protocol):
    """The right-hand side: what evaluations at u [S, B] share is made at once, for S stages of the samples [B].

    u is [S, 1] where all samples are at one place.
    """

    def at(self, u: Tensor, samples: Tensor) -> Sequence[Stage]: ...


class Solver(Protocol):
    """The options of an adaptive solver; max_nfe: evaluations that a sample may spend."""

    @property
    def rtol(self) -> float: ...

    @property
    def atol(self) -> float: ...

    @property
    def max_nfe(self) -> int: ...


class PairSolver(Solver, Protocol):
    """The same of an embedded Runge–Kutta pair."""

    @property
    def tableau(self) -> Tableau: ...

    @property
    def couple(self) -> bool: ...


SAFETY, SLOWEST, FASTEST = 0.9, 0.2, 10.0
# steps between looks at which samples are done, by device type: where a look stalls the device, not each
POLL, POLL_OTHERS = {"cpu": 1}, 4
GAINS = 0.7, 0.4  # of PI control

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Solution:
    """y [B, *] at the end, the integrals [B, K], evaluations [B] of each sample, the states [M, B, *] at the requested times.

    `calls` of the field: as many as the slowest sample has evaluations, or a few more where POLL is above 1.
    """

    y: Tensor
    integrals: Tensor
    nfe: Tensor
    states: Tensor | None
    calls: int


def integrate(
    field: Field,
    y: Tensor,
    start: float,
    end: float,
    solver: PairSolver,
    *,
    operations: ModuleType,
    integrals: int = 0,
    times: Sequence[float] = (),
    progress: Progress | None = None,
) -> Solution:
    """dy/du = field(u, y) from `start` to `end` (in either direction) by an embedded Runge–Kutta pair; y [B, *] is left as it is.

    solver       a step's error is at most atol + rtol·|y|, root mean square over a sample's numbers, and over its integrals;
                 couple: one step size for the whole batch, by the root mean square over it (what other libraries do)
    operations   the backend's (fastdiff.execution.ops.backend_module)
    integrals    K of the rates that the field returns beside dy/du; float64
    times        times from start to end, in any order, at which y is interpolated
    progress     called now and then with how many samples' worth of the way the run has moved

    Raises SolverError where the field is not finite, a step gets too small for float64, or a sample spends max_nfe.
    """
    outside = [time for time in times if not min(start, end) <= time <= max(start, end)]
    if outside:
        raise ConfigError(f"times must lie between {start:g} and {end:g}, got {outside[0]:g}")
    return _RungeKutta(field, y, start, end, solver, operations, progress, integrals, times).solve()


class AdaptiveRun:
    """The samples that still run: where each stands (u, y), its step h, its evaluations; finished ones are left out."""

    carried: ClassVar[tuple[str, ...]] = ("samples", "u", "y", "h", "spent", "strikes", "running")
    cost: int  # evaluations of a step

    def __init__(
        self, y: Tensor, start: float, end: float, solver: Solver, operations: ModuleType, progress: Progress | None
    ) -> None:
        # below this the state's own rounding would be taken for the method's error
        floor = 4 * torch.finfo(y.dtype).eps
        self.rtol, self.atol = checks.number("rtol", solver.rtol, floor), checks.number("atol", solver.atol, floor)
        self.max_nfe = solver.max_nfe
        self.operations, self.start, self.end, self.progress = operations, start, end, progress
        self.span, self.sign = abs(end - start), 1.0 if end >= start else -1.0
        count = len(y)
        self.wide: dict[str, Any] = {"dtype": torch.float64, "device": y.device}
        self.final, self.y = y.clone(), y.clone()
        self.nfe = torch.zeros(count, dtype=torch.int64, device=y.device)
        self.samples = torch.arange(count, device=y.device)
        self.u = torch.full((count,), float(start), **self.wide)
        self.h = torch.full((count,), 0.01 * self.span, **self.wide)
        self.running = torch.ones(count, dtype=torch.bool, device=y.device)
        self.spent, self.strikes = torch.zeros_like(self.nfe), torch.zeros_like(self.nfe)
        self.steps, self.calls, self.reported = 0, 0, 0.0
        self.look = POLL.get(y.device.type, POLL_OTHERS)

    def solve(self) -> Solution:
        if self.start != self.end and self.final.numel():
            self.begin()
            while len(self.samples):
                self.step()
                self.spent += self.cost * self.running_before
                self.steps += 1
                self.calls += self.cost
                if self.steps % self.look == 0:
                    self.poll()
        return self.solution()

    def begin(self) -> None:
        """Before the first step."""

    def step(self) -> None:
        """One trial step of every running sample."""
        raise NotImplementedError

    def solution(self) -> Solution:
        return Solution(self.final, torch.zeros(len(self.final), 0, **self.wide), self.nfe, None, self.calls)

    def trial(self, most: Tensor | float = math.inf) -> tuple[Tensor, Tensor, Tensor]:
        """This step's signed h, |h| up to `most` (0 for a sample that is done), and whether it ends at the end."""
        self.running_before = self.running
        left, h = (self.sign * (self.end - self.u)).clamp(min=0), torch.clamp(self.h, max=most)
        last = self.running & (h >= left * (1 - 1e-10))
        size = torch.where(self.running, torch.where(last, left, h), 0.0)
        return self.sign * size, size, last

    def settle(
        self, accepted: Tensor, finite: Tensor, last: Tensor, reached: Tensor, h: Tensor, new: dict[str, Tensor]
    ) -> None:
        """Move the accepted samples on; `h` is the next step."""
        for name, value in new.items():
            old = getattr(self, name)
            setattr(self, name, torch.where(accepted.view(-1, *[1] * (old.ndim - 1)), value, old))
        self.u = torch.where(accepted, reached, self.u)
        self.strikes = torch.where(finite | ~self.running, 0, self.strikes + 1)
        self.h = torch.where(self.running, h, self.h)
        self.running = self.running & ~(accepted & last)

    def poll(self) -> None:
        """Drop finished samples; refuse to go on where a sample cannot."""
        tiny = 8 * torch.finfo(torch.float64).eps * self.u.abs().clamp(min=self.span)
        troubles = {
            "the field is not finite": self.strikes >= 2,
            "step size underflow": self.running & (self.h < tiny),
            f"max_nfe = {self.max_nfe} is spent": self.running & (self.spent >= self.max_nfe),
        }
        *present, finished = torch.stack([*troubles.values(), ~self.running]).any(1).tolist()
        for (reason, bad), troubled in zip(troubles.items(), present):
            if troubled:
                self.refuse(bad, reason)
        if self.progress is not None:
            way = float((len(self.final) - len(self.u)) + ((self.u - self.start).abs() / self.span).sum())
            self.progress(way - self.reported)
            self.reported = way
        if finished:
            self.leave(torch.nonzero(~self.running).flatten())
            keep = torch.nonzero(self.running).flatten()
            for name in self.carried:
                setattr(self, name, getattr(self, name)[keep])

    def leave(self, done: Tensor) -> None:
        """Store the results of finished samples."""
        places = self.samples[done]
        self.final[places], self.nfe[places] = self.y[done], self.spent[done]

    def refuse(self, bad: Tensor, reason: str) -> None:
        i = int(torch.nonzero(bad)[0])
        raise SolverError(reason, int(self.samples[i]), float(self.u[i]), int(self.spent[i]), float(self.h[i]))


class _RungeKutta(AdaptiveRun):
    """Also carried: the first stage k with its rates, the integrals q, the last accepted error."""

    carried = (*AdaptiveRun.carried, "k", "rate", "q", "before")

    def __init__(
        self, field: Field, y: Tensor, start: float, end: float, solver: PairSolver, operations: ModuleType,
        progress: Progress | None, integrals: int, times: Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__(y, start, end, solver, operations, progress)
        self.field, self.tableau, self.couple, self.times = field, solver.tableau, solver.couple, times
        tableau = self.tableau
        self.cost = len(tableau.a)
        self.q = torch.zeros(len(y), integrals, **self.wide)
        self.totals = torch.zeros_like(self.q)
        self.states = y.new_empty((len(times), *y.shape))
        for m, time in enumerate(times):
            if time == start:
                self.states[m] = y
        distinct = list(dict.fromkeys(tableau.c[1:]))  # two stages may be at one place
        self.nodes = torch.tensor(distinct, **self.wide)[:, None]
        self.at_node = [distinct.index(c) for c in tableau.c[1:]]
        self.before = torch.ones(len(y), **self.wide)

    def begin(self) -> None:
        """The first stage, and a first step by Hairer, Nørsett & Wanner, Solving ODEs I, II.4."""
        self.k, self.rate = self._evaluate(self._at(self.u[None])[0], self.y)
        scale = self.atol + self.rtol * self.y.abs()
        size, slope = self._norm(self.y / scale), self._norm(self.k / scale)
        first = torch.where((size < 1e-5) | (slope < 1e-5), 1e-6 * self.span, 0.01 * size / slope).clamp(max=self.span)
        first = first.min().expand_as(first) if self.couple else first
        trial = self._combine(self.y, [self.k], self.sign * first, (1.0,))
        k, _ = self._evaluate(self._at((self.u + self.sign * first)[None])[0], trial)
        self.spent += 2
        self.calls += 2
        bend = torch.maximum(self._norm((k - self.k) / scale) / first, slope)
        curved = power(0.01 / bend, 1 / self.tableau.order)
        second = torch.where(bend <= 1e-15, (1e-3 * first).clamp(min=1e-6), curved)
        self.h = torch.minimum(100 * first, second).clamp(max=self.span)
        self.h = self.h.clamp(min=min(self.span, 1e-12 * (abs(self.start) + abs(self.end))))
        # a trial that leaves the finite numbers was too long; a start that is not finite is the end
        self.h = torch.where(bend.isfinite(), self.h, 0.1 * first)
        self.h = self.h.min().expand_as(self.h).clone() if self.couple else self.h
        if not bool(slope.isfinite().all()):
            self.refuse(~slope.isfinite(), "the field is not finite")

    def step(self) -> None:
        t, (h, size, last) = self.tableau, self.trial()
        u = torch.where(last & (self.nodes == 1), self.end, self.u + self.nodes * h)
        ks, rates, after = [self.k], [self.rate], self.y
        stages = self._at(u)
        for i, node in enumerate(self.at_node):
            after = self._combine(self.y, ks, h, t.a[i])
            k, rate = self._evaluate(stages[node], after)
            ks.append(k)
            rates.append(rate)
        b = (*t.a[-1], 0.0)
        after, error = self.operations.rk_error(self.y, ks, h, b, t.e, self.rtol, self.atol)
        error, q = error.double(), self.q
        if q.shape[1]:
            stacked = torch.stack(rates)  # [S, B, K]
            q = self.q + h[:, None] * _weighted(b, stacked)
            tolerance = self.atol + self.rtol * torch.maximum(q.abs(), self.q.abs())
            error = torch.maximum(error, self._norm(h[:, None] * _weighted(t.e, stacked) / tolerance))
        finite = error.isfinite()
        if self.couple:
            mean = torch.where(self.running, error, 0.0).square().sum() / self.running.sum()
            error = mean.sqrt().expand_as(error)
        reached = torch.where(last, self.end, self.u + h)
        accepted = self.running & (error <= 1)
        if len(self.times):
            self._interpolate(ks, h, after, reached, accepted)
        factor = self._factor(error, accepted)
        new = {"y": after, "k": ks[-1], "q": q, "rate": rates[-1], "before": error.clamp(min=1e-4)}
        self.settle(accepted, finite, last, reached, size * factor, new)

    def _factor(self, error: Tensor, accepted: Tensor) -> Tensor:
        """What multiplies h: PI control (Hairer & Wanner, Solving ODEs II, IV.2)."""
        finite, order, small = error.isfinite(), self.tableau.order, error.clamp(min=1e-10)
        grow = SAFETY * power(small, -GAINS[0] / order) * power(self.before, GAINS[1] / order)
        shrink = (SAFETY * power(small, -1 / order)).clamp(SLOWEST, 1.0)
        return torch.where(accepted, grow.clamp(SLOWEST, FASTEST), torch.where(finite, shrink, 0.1))

    def leave(self, done: Tensor) -> None:
        super().leave(done)
        self.totals[self.samples[done]] = self.q[done]

    def solution(self) -> Solution:
        return Solution(self.final, self.totals, self.nfe, self.states if len(self.times) else None, self.calls)

    def _interpolate(self, ks: list[Tensor], h: Tensor, after: Tensor, reached: Tensor, accepted: Tensor) -> None:
        """y at requested times within this step: Hairer, Nørsett & Wanner, Solving ODEs I, eq. II.6.7 and DOPRI5's `contd5`."""
        shape = (-1, *[1] * (after.ndim - 1))
        rise, first = after - self.y, h.to(after.dtype).view(shape) * ks[0]
        end = h.to(after.dtype).view(shape) * ks[-1]
        bend, dense = rise - end - first + rise, self.tableau.dense
        high = self._combine(torch.zeros_like(after), ks, h, dense) if dense else 0.0
        for m, time in enumerate(self.times):
            # by the ends themselves, which are the next step's start: by θ a time at one could fall between two steps
            inside = accepted & (self.sign * (time - self.u) > 0) & (self.sign * (time - reached) <= 0)
            theta = (time - self.u) / torch.where(h == 0, 1.0, h)
            s = theta.to(after.dtype).view(shape)
            value = self.y + s * (rise + (1 - s) * ((first - rise) + s * (bend + (1 - s) * high)))
            value = torch.where((reached == time).view(shape), after, value)
            mask = inside.view(shape)
            self.states[m, self.samples] = torch.where(mask, value, self.states[m, self.samples])

    def _at(self, u: Tensor) -> Sequence[Stage]:
        return self.field.at(u[:, :1] if self.couple else u, self.samples)

    def _evaluate(self, stage: Stage, y: Tensor) -> tuple[Tensor, Tensor]:
        k, rate = stage(y)
        return k, self.q.new_empty((len(y), 0)) if rate is None else rate

    def _combine(self, y: Tensor, ks: list[Tensor], h: Tensor, weights: Sequence[float]) -> Tensor:
        """y + h Σ w_j k_j."""
        after: Tensor = self.operations.rk_error(y, ks, h, weights, (0.0,) * len(ks), self.rtol, self.atol)[0]
        return after

    @staticmethod
    def _norm(values: Tensor) -> Tensor:
        return (tree_sum(values.double().square()) / max(values[:1].numel(), 1)).sqrt()


def power(values: Tensor, exponent: float) -> Tensor:
    """On the host by numpy, whose powers, unlike torch's, have the same bits wherever in a batch a number stands."""
    return torch.from_numpy(np.power(values.numpy(), exponent)) if values.device.type == "cpu" else values**exponent


def _weighted(weights: Sequence[float], stages: Tensor) -> Tensor:
    """Σ w_j of stages [S, …], in order."""
    total = stages[0] * weights[0]
    for weight, stage in zip(weights[1:], stages[1:]):
        total = total + weight * stage
    return total
