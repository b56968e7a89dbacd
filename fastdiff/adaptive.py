"""Embedded Runge–Kutta with a step size for each sample: dy/du = field(u, y), each sample on its own way from `start` to `end`.

A step is h_i for sample i, accepted where its own error norm is at most 1; whoever is done idles and is then left out, so
that a stiff sample costs the others nothing. Nothing is read back within a step; who is done is looked up every few steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from . import checks
from .errors import ConfigError, SolverError, choose
from .reference.row import tree_sum

# (y [B, *]) -> dy/du [B, *], and the rates [B, K] of what is only integrated (K = 0: None)
Stage = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Field(Protocol):
    """The right-hand side: what evaluations at u [S, B] share is made at once, for S stages of the samples [B]."""

    def at(self, u: Tensor, samples: Tensor) -> Sequence[Stage]: ...


@dataclass(frozen=True)
class Tableau:
    """An embedded pair whose last stage is the next step's first: nodes c, rows a (the last are the weights b), b − b̂.

    `order` of b; b̂ has one less. `dense`: weights of the fourth-order term of the interpolant (none: cubic Hermite).
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    e: tuple[float, ...]
    dense: tuple[float, ...] = ()


def _exact(*values: str) -> tuple[float, ...]:
    return tuple(float(Fraction(value)) for value in values)


METHODS = {
    # Bogacki & Shampine 1989
    "bosh3": Tableau(
        3,
        _exact("0", "1/2", "3/4", "1"),
        (_exact("1/2"), _exact("0", "3/4"), _exact("2/9", "1/3", "4/9")),
        _exact("-5/72", "1/12", "1/9", "-1/8"),
    ),
    # Dormand & Prince 1980; the interpolant: Hairer, Nørsett & Wanner, Solving ODEs I, II.6, as in their DOPRI5
    "dopri5": Tableau(
        5,
        _exact("0", "1/5", "3/10", "4/5", "8/9", "1", "1"),
        (
            _exact("1/5"),
            _exact("3/40", "9/40"),
            _exact("44/45", "-56/15", "32/9"),
            _exact("19372/6561", "-25360/2187", "64448/6561", "-212/729"),
            _exact("9017/3168", "-355/33", "46732/5247", "49/176", "-5103/18656"),
            _exact("35/384", "0", "500/1113", "125/192", "-2187/6784", "11/84"),
        ),
        _exact("71/57600", "0", "-71/16695", "71/1920", "-17253/339200", "22/525", "-1/40"),
        _exact(
            "-12715105075/11282082432", "0", "87487479700/32700410799", "-10690763975/1880347072",
            "701980252875/199316789632", "-1453857185/822651844", "69997945/29380423",
        ),
    ),
    # Tsitouras 2011
    "tsit5": Tableau(
        5,
        (0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
        (
            (0.161,),
            (-0.008480655492356989, 0.335480655492357),
            (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
            (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
            (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
            (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
        ),
        (
            0.00178001105222577714, 0.0008164344596567469, -0.007880878010261995, 0.1447110071732629,
            -0.5823571654525552, 0.45808210592918697, -0.015151515151515152,
        ),
    ),
}  # fmt: skip

SAFETY, SLOWEST, FASTEST = 0.9, 0.2, 10.0
POLL = 4  # steps between looks at who is done, where a look stalls the device


@dataclass(frozen=True)
class Solution:
    """y [B, *] at the end, the integrals [B, K], evaluations [B] of each sample, the states [M, B, *] at the asked times."""

    y: Tensor
    integrals: Tensor
    nfe: Tensor
    states: Tensor | None


def integrate(
    field: Field,
    y: Tensor,
    start: float,
    end: float,
    *,
    operations: ModuleType,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    couple: bool = False,
    max_nfe: int = 100_000,
    integrals: int = 0,
    times: Sequence[float] = (),
) -> Solution:
    """Integrate from `start` to `end` (in either direction); y [B, *] is left as it is.

    rtol, atol   a step's error is at most atol + rtol·|y|, root mean square over a sample's numbers, and over its integrals
    couple       one step size for the whole batch, by the root mean square over it (what other libraries do)
    integrals    K of the rates that the field returns beside dy/du; float64
    times        asked times from start to end, in any order: there y is interpolated
    operations   the backend's (fastdiff.ops.backend_module)

    Raises SolverError where the field is not finite, a step gets too small for float64, or a sample spends max_nfe.
    """
    choose("method", method, METHODS)
    max_nfe = checks.integer("max_nfe", max_nfe, 1, 2**62)
    # below this the state's own rounding would be taken for the method's error
    floor = 4 * torch.finfo(y.dtype).eps
    rtol, atol = checks.number("rtol", rtol, floor), checks.number("atol", atol, floor)
    outside = [time for time in times if not min(start, end) <= time <= max(start, end)]
    if outside:
        raise ConfigError(f"times must lie between {start:g} and {end:g}, got {outside[0]:g}")
    run = _Run(field, y, start, end, operations, METHODS[method], rtol, atol, couple, max_nfe, integrals, times)
    if start != end and len(y):
        run.begin()
        while len(run.samples):
            run.step()
            run.poll()
    return Solution(run.final, run.totals, run.nfe, run.states if len(times) else None)


class _Run:
    """The samples that still run: where each stands (u, y, first stage k), its step h, its last accepted error."""

    def __init__(
        self, field: Field, y: Tensor, start: float, end: float, operations: ModuleType, tableau: Tableau, rtol: float,
        atol: float, couple: bool, max_nfe: int, integrals: int, times: Sequence[float],
    ) -> None:  # fmt: skip
        self.field, self.operations, self.tableau, self.end, self.max_nfe = field, operations, tableau, end, max_nfe
        self.rtol, self.atol, self.couple, self.times = rtol, atol, couple, times
        count, wide = len(y), {"dtype": torch.float64, "device": y.device}
        self.span, self.sign = abs(end - start), 1.0 if end >= start else -1.0
        self.final, self.y = y.clone(), y.clone()
        self.totals, self.q = torch.zeros(count, integrals, **wide), torch.zeros(count, integrals, **wide)
        self.nfe = torch.zeros(count, dtype=torch.int64, device=y.device)
        self.states = y.new_empty((len(times), *y.shape))
        for m, time in enumerate(times):
            if time == start:
                self.states[m] = y
        self.nodes = torch.tensor(tableau.c[1:], **wide)[:, None]
        self.samples = torch.arange(count, device=y.device)
        self.u = torch.full((count,), float(start), **wide)
        self.before = torch.ones(count, **wide)
        self.running = torch.ones(count, dtype=torch.bool, device=y.device)
        self.strikes = torch.zeros(count, dtype=torch.int64, device=y.device)
        self.steps = 0

    def begin(self) -> None:
        """The first stage, and a first step by Hairer, Nørsett & Wanner, Solving ODEs I, II.4."""
        self.k, self.rate = self._evaluate(self.field.at(self.u[None], self.samples)[0], self.y)
        scale = self.atol + self.rtol * self.y.abs()
        size, slope = self._norm(self.y / scale), self._norm(self.k / scale)
        first = torch.where((size < 1e-5) | (slope < 1e-5), 1e-6 * self.span, 0.01 * size / slope).clamp(max=self.span)
        trial = self._combine(self.y, [self.k], self.sign * first, (1.0,))
        k, _ = self._evaluate(self.field.at((self.u + self.sign * first)[None], self.samples)[0], trial)
        bend = torch.maximum(self._norm((k - self.k) / scale) / first, slope)
        second = torch.where(bend <= 1e-15, (1e-3 * first).clamp(min=1e-6), (0.01 / bend) ** (1 / self.tableau.order))
        second = second.float().double()  # as in _advance
        self.h = torch.minimum(100 * first, second).clamp(max=self.span)
        self.h = self.h.min().expand_as(self.h).clone() if self.couple else self.h
        self._refuse(~(slope + bend).isfinite(), "the field is not finite")

    def step(self) -> None:
        """One trial step of every running sample."""
        t, left = self.tableau, (self.sign * (self.end - self.u)).clamp(min=0)
        last = self.running & (self.h >= left * (1 - 1e-10))
        size = torch.where(self.running, torch.where(last, left, self.h), 0.0)
        h = self.sign * size
        u = torch.where(last & (self.nodes == 1), self.end, self.u + self.nodes * h)
        ks, rates, after, error = [self.k], [self.rate], self.y, self.u
        for i, stage in enumerate(self.field.at(u, self.samples)):
            after = self._combine(self.y, ks, h, t.a[i])
            k, rate = self._evaluate(stage, after)
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
        if self.couple:
            mean = torch.where(self.running, error, 0.0).square().sum() / self.running.sum()
            error = mean.sqrt().expand_as(error)
        self._advance(ks, h, size, last, after, q, rates[-1], error)

    def _advance(
        self,
        ks: list[Tensor],
        h: Tensor,
        size: Tensor,
        last: Tensor,
        after: Tensor,
        q: Tensor,
        rate: Tensor,
        error: Tensor,
    ) -> None:
        """Accept where the error allows, and choose the next step by PI control (Hairer & Wanner, Solving ODEs II, IV.2)."""
        finite, order = error.isfinite(), self.tableau.order
        accepted = self.running & (error <= 1)
        small = error.clamp(min=1e-10)
        # rounded to float32, so that a power's last bit, which depends on the batch's length, is not handed on
        grow = (
            (SAFETY * small ** (-0.7 / order) * self.before ** (0.4 / order)).float().double().clamp(SLOWEST, FASTEST)
        )
        shrink = torch.where(finite, (SAFETY * small ** (-1 / order)).float().double().clamp(SLOWEST, 1.0), 0.1)
        reached = torch.where(last, self.end, self.u + h)
        if len(self.times):
            self._interpolate(ks, h, after, reached, accepted)
        for name, new in (("y", after), ("k", ks[-1]), ("q", q), ("rate", rate)):
            old = getattr(self, name)
            setattr(self, name, torch.where(accepted.view(-1, *[1] * (old.ndim - 1)), new, old))
        self.u = torch.where(accepted, reached, self.u)
        self.before = torch.where(accepted, error.clamp(min=1e-4), self.before)
        self.strikes = torch.where(finite | ~self.running, 0, self.strikes + 1)
        self.h = torch.where(self.running, size * torch.where(accepted, grow, shrink), self.h)
        self.running = self.running & ~(accepted & last)
        self.steps += 1

    def poll(self) -> None:
        """Leave out who is done; refuse to go on where a sample cannot."""
        if self.u.device.type != "cpu" and self.steps % POLL:
            return
        self._refuse(self.strikes >= 2, "the field is not finite")
        tiny = 8 * torch.finfo(torch.float64).eps * torch.maximum(self.u.abs(), torch.full_like(self.u, self.span))
        self._refuse(self.running & (self.h < tiny), "step size underflow")
        self._refuse(self.running & (self.nfe[self.samples] >= self.max_nfe), f"max_nfe = {self.max_nfe} is spent")
        done = torch.nonzero(~self.running).flatten()
        if not len(done):
            return
        self.final[self.samples[done]], self.totals[self.samples[done]] = self.y[done], self.q[done]
        keep = torch.nonzero(self.running).flatten()
        for name in ("samples", "u", "y", "k", "q", "rate", "h", "before", "strikes", "running"):
            setattr(self, name, getattr(self, name)[keep])

    def _interpolate(self, ks: list[Tensor], h: Tensor, after: Tensor, reached: Tensor, accepted: Tensor) -> None:
        """y at the asked times within this step: Hairer, Nørsett & Wanner, Solving ODEs I, eq. II.6.7 and DOPRI5's `contd5`."""
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
            mask = inside.view(shape)
            self.states[m, self.samples] = torch.where(mask, value, self.states[m, self.samples])

    def _evaluate(self, stage: Stage, y: Tensor) -> tuple[Tensor, Tensor]:
        k, rate = stage(y)
        self.nfe[self.samples] += self.running
        return k, self.q.new_empty((len(y), 0)) if rate is None else rate.double()

    def _combine(self, y: Tensor, ks: list[Tensor], h: Tensor, weights: Sequence[float]) -> Tensor:
        """y + h Σ w_j k_j."""
        after: Tensor = self.operations.rk_error(y, ks, h, weights, (0.0,) * len(ks), self.rtol, self.atol)[0]
        return after

    @staticmethod
    def _norm(values: Tensor) -> Tensor:
        return (tree_sum(values.double().square()) / max(values[:1].numel(), 1)).sqrt()

    def _refuse(self, bad: Tensor, reason: str) -> None:
        if bool(bad.any()):
            i = int(torch.nonzero(bad)[0])
            sample, t, step = int(self.samples[i]), float(self.u[i]), float(self.h[i])
            raise SolverError(reason, sample, t, int(self.nfe[sample]), step)


def _weighted(weights: Sequence[float], stages: Tensor) -> Tensor:
    """Σ w_j of stages [S, …], in order."""
    total = stages[0] * weights[0]
    for weight, stage in zip(weights[1:], stages[1:]):
        total = total + weight * stage
    return total
