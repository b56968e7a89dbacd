"""Runs a step table in place, on buffers made once. Knows tables, operations and tensors; no process, no sampler.

Inside the loop nothing is read back, allocated or copied from the host (but by the network): a row is one `step`, two
operations where it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..table import COLUMNS, Row, StepTable
from . import monitor, ops, torch_private
from .noise import PRIOR, SAMPLER

Condition = Tensor | dict[str, Tensor] | None
# (input already scaled [B, *], time [B], time features that replace it or None, condition)
#     -> prediction [B, *], and the second half of its channels where the variance is learned;
# called with a last argument True, in rows that guide, also the output that guides, [B, *]
Network = Callable[..., tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]]
# (row number) -> noise like the state
Draw = Callable[[int], Tensor]
# (cursor, prediction, variance's half of the channels, and, in rows that guide, the output that guides)
Step = Callable[..., None]

CHECKS = ("final", "every", "off")
KNOWN_PART = [COLUMNS.index("known_alpha"), COLUMNS.index("known_sigma")]
BLOCK = 1024  # rows whose views are made at a time


class Change(NamedTuple):
    """What a run does to its states beside what the rows say.

    known, mask  [B, *]: where the mask is True a row leaves alpha·known + sigma·z at the level it ends on, the last one known
    after        (row, x [B, *]) changes in place the state that the row has left
    """

    known: Tensor | None
    mask: Tensor | None
    after: Callable[[int, Tensor], None] | None


UNCHANGED = Change(None, None, None)


class RowPlan(NamedTuple):
    """The host side of a row. Rows with equal plans differ only in coefficients that the device reads, so one captured graph
    serves them all.

    x, out, base, history, pushed and noise index Loop.buffers; the state starts in buffer 0.
    """

    x: int
    out: int
    base: int | None
    history: tuple[int, ...]
    pushed: int | None  # where the prediction is kept
    noise: int | None  # where a measured row leaves its noise
    calls_network: bool
    guides: bool
    draws: bool
    norm: str | None  # of a measured row
    learned: bool  # the variance
    feeds: bool  # the row writes the next network input


def plans(table: StepTable, keeps_noise: bool, masked: bool = False) -> list[RowPlan]:
    """Each row's plan. The state is updated in place unless a later row still needs it as its base. Beneath a mask all rows but
    the last draw."""
    made: dict[tuple[bool, bool], list[RowPlan]] = vars(table).setdefault("_plans", {})  # a table does not change
    if (keeps_noise, masked) not in made:
        made[keeps_noise, masked] = _plans(table, keeps_noise, masked)
    return made[keeps_noise, masked]


def _plans(table: StepTable, keeps_noise: bool, masked: bool) -> list[RowPlan]:
    rows, reads, needed = table.rows, False, []
    for row in reversed(rows):  # whether rows after this one read the base that it leaves
        needed.append(reads)
        reads = row.e != 0 or (reads and not row.saves_base)
    needed.reverse()
    listed = list[RowPlan]()
    x, base, history = 0, None, tuple[int, ...]()
    for k, row in enumerate(rows):
        base = x if row.saves_base else base
        taken = {x, *history} | ({base} if base is not None and (needed[k] or row.e != 0) else set())

        def spare(taken: set[int] = taken) -> int:
            free = next(n for n in range(len(taken) + 1) if n not in taken)
            taken.add(free)
            return free

        noise = spare() if row.measure is not None and keeps_noise else None
        out = spare() if base == x and (needed[k] or row.e != 0) else x
        pushed = spare() if row.keeps_prediction and table.memory else None
        feeds = k + 1 < len(rows) and rows[k + 1].calls_network
        listed.append(RowPlan(
            x, out, base if row.e != 0 else None, history[: len(row.b) - row.calls_network], pushed, noise,
            row.calls_network, row.guides, row.draws or (masked and k + 1 < len(rows)),
            None if row.measure is None else row.measure.norm,
            row.log_variance is not None, feeds,
        ))  # fmt: skip
        x = out
        if pushed is not None:
            history = (pushed, *history)[: table.memory]
    return listed


class Loop:
    """A table and the buffers to run it on, for states of one shape; one run at a time, as many as you like.

    operations  the module that implements them (ops.backend_module)
    start       the buffer that the state starts in, [B, *]
    net_input   the buffer of the network's input, whose dtype and layout it has
    time        the buffer of the network's time [B], of integers where it counts a chain's steps
    features    [rows, …], or None: what the network makes of the rows' times, instead of from `time` in each call
    masked      whether its runs have a mask
    """

    def __init__(
        self, table: StepTable, operations: ModuleType, start: Tensor, net_input: Tensor, time: Tensor,
        features: Tensor | None, *, seed: int, check: str, masked: bool = False,
    ) -> None:  # fmt: skip
        self.operations, self.net_input, self.time, self.check = operations, net_input, time, check
        self.buffers = [start]
        self.known = torch.empty_like(start) if masked else None
        self.mask = torch.empty_like(start, dtype=torch.bool) if masked else None
        self.measured = start.new_empty((len(start), 2))
        self.first_bad = None if check == "off" else torch.empty(len(start), dtype=torch.int64, device=start.device)
        self.mark = monitor.marker()
        self._measure = self.mark("measure_langevin", operations.measure_langevin)
        self._steps: dict[RowPlan, Step] = {}
        self._hold_input()
        self.load(table, features, seed)

    def load(self, table: StepTable, features: Tensor | None, seed: int) -> None:
        """Set the table, time features and seed of the next runs."""
        self.table, self.seed = table, seed
        self.times = network_times(table, self.time.dtype)
        self._steps.clear()
        self.plans = plans(table, self.operations.KEEPS_NOISE, self.mask is not None)
        numbers = [n for plan in set(self.plans) for n in (plan.x, plan.out, plan.pushed, plan.noise) if n is not None]
        self.buffers += [torch.empty_like(self.start) for _ in range(max(numbers) + 1 - len(self.buffers))]
        matrix = torch.from_numpy(table.numbers)
        if self.mask is not None:
            matrix = matrix.clone()
            matrix[-1, KNOWN_PART] = matrix.new_tensor([1.0, 0.0])
        self.matrix = self.placed("matrix", matrix.to(self.start.dtype))
        self.features = None if features is None else self.placed("features", features)

    def placed(self, name: str, values: Tensor) -> Tensor:
        """The values on the device."""
        return values.to(self.start.device)

    @property
    def start(self) -> Tensor:
        return self.buffers[0]

    def run(
        self, network: Network, cond: Condition, first_sample: int, x_init: Tensor | None = None, noise: Draw | None = None,
        change: Change = UNCHANGED,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield the start, then the state after each row. What is yielded, and the network's input, are overwritten later.

        x_init  the start, instead of the prior's draw
        noise   instead of the counter's
        """
        self.hold(change)
        self.begin(first_sample, x_init)
        yield self.start
        yield from self.rows(0, len(self.table), network, cond, first_sample, noise, change.after)
        if self.first_bad is not None:
            raise_if_bad(self.table, self.first_bad, first_sample)

    def rows(
        self, start: int, stop: int, network: Network, cond: Condition, first_sample: int, noise: Draw | None = None,
        after: Callable[[int, Tensor], None] | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """The state after each of the rows start … stop − 1, from where the rows before have left it."""
        first_bad, every = self.first_bad, self.check == "every"
        network, row = self.mark("network", network), self.mark("row", self.row)
        finishing = self.table.finishing
        numbers = np.zeros((stop - start, 3), dtype=np.int64)
        numbers[:, 0], numbers[:, 1], numbers[:, 2] = np.arange(start, stop), first_sample, ops.signed(self.seed)
        cursors = torch.from_numpy(numbers).to(self.start.device)
        for low in range(start, stop, BLOCK):
            high = min(low + BLOCK, stop)
            ahead = [None] * (high - low) if self.features is None else self.features[low:high].clone().split(1)
            block = cursors[low - start : high - start].unbind()
            for k, (plan, cursor, features) in enumerate(zip(self.plans[low:high], block, ahead), low):
                if features is None and plan.calls_network:
                    self.time.fill_(self.times[k])
                m, guide = row(
                    plan, network, cond, cursor, features, noise(k) if noise is not None and plan.draws else None
                )
                if k in finishing:
                    self.finish(k, plan, m, guide)
                if after is not None:
                    after(k, self.buffers[plan.out])
                    self.notice(k, plan)
                del m, guide  # so that the next output may take its memory, which is still in the cache
                if every and first_bad is not None:
                    raise_if_bad(self.table, first_bad, first_sample)
                yield self.buffers[plan.out]

    def begin(self, first_sample: int, x_init: Tensor | None) -> None:
        """Fill what the first row reads: the start, drawn from the prior or x_init, and the network's input."""
        if x_init is None:
            self.operations.normal(self.start, ops.cursor(0, first_sample, self.seed, self.start.device), PRIOR)
            self.start.mul_(self.table.prior_std)
        else:
            self.start.copy_(x_init)
        self.feed()

    def hold(self, change: Change) -> None:
        """Take the known part and its mask, which the steps read."""
        if self.known is not None and self.mask is not None and change.known is not None and change.mask is not None:
            self.known.copy_(change.known)
            self.mask.copy_(change.mask)

    def feed(self) -> None:
        """Write the first row's network input from the start."""
        first = self.table.rows[0]
        if first.calls_network:
            self.net_input.copy_(self.start if first.in_scale == 1 else self.start * first.in_scale)
        if self.first_bad is not None:
            self.first_bad.fill_(len(self.table))

    def row(
        self,
        plan: RowPlan,
        network: Network,
        cond: Condition,
        cursor: Tensor,
        features: Tensor | None,
        z: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """One row; returns the network's outputs. `cursor`: see fastdiff.execution.reference; z: the caller's noise."""
        m = v = guide = None
        if plan.calls_network:
            # tensors of their own, so that what a network does to them (grad, shape, data) is gone with them
            given = self.net_input.detach(), self.time.detach(), features, cond
            m, v, guide = network(*given, True) if plan.guides else (*network(*given), None)
            m, v = m.detach(), v.detach() if plan.learned and v is not None else None
            guide = None if guide is None else guide.detach()
            storage, address, size = self._held
            if storage.data_ptr() != address or storage.nbytes() != size:
                self.renew_input()
            # a network may return its input, which this row overwrites
            elif plan.feeds and any(
                torch_private.is_alias_of(each, self.net_input) for each in (m, guide) if each is not None
            ):
                m, v, guide = (each if each is None else each.clone() for each in (m, v, guide))
        if plan.norm is not None and m is not None:
            stored = None if plan.noise is None or z is not None else self.buffers[plan.noise]
            stream = SAMPLER if z is None else None
            state = self.buffers[plan.x]
            self._measure(self.measured, self.matrix, cursor, stream, plan.norm == "batch", state, m, guide, z, stored)
        step = self._steps.get(plan) if z is None else self._prepare(plan, z)
        if step is None:
            step = self._steps[plan] = self._prepare(plan, None)
        step(cursor, m, v) if guide is None else step(cursor, m, v, guide)
        return m, guide

    def finish(self, k: int, plan: RowPlan, m: Tensor | None, guide: Tensor | None) -> None:
        """What a row does after its step: x ← clamp(x + raw·m), and the next network input anew."""
        row, x = self.table.rows[k], self.buffers[plan.out]
        known = None if self.mask is None else x.clone()
        if row.raw != 0 and m is not None:
            m = m if guide is None else guide + row.guidance * (m - guide)
            x.add_(m.to(x.dtype), alpha=row.raw)
        if row.bounds is not None:
            x.clamp_(*row.bounds)
        if known is not None and self.mask is not None:
            x.copy_(torch.where(self.mask, known, x))
        self.notice(k, plan)

    def notice(self, k: int, plan: RowPlan) -> None:
        """Once a row's state has changed after its step: the next network input anew, and whether it is finite still."""
        x = self.buffers[plan.out]
        if plan.feeds:
            scale = self.table.rows[k + 1].in_scale
            self.net_input.copy_(x if scale == 1 else x * scale)
        if self.first_bad is not None:
            finite = x.isfinite().flatten(1).all(1)
            self.first_bad.copy_(torch.where(finite, self.first_bad, self.first_bad.clamp(max=k)))

    def _hold_input(self) -> None:
        """Note where the network's input lies, which the steps write by its address."""
        storage = self.net_input.untyped_storage()
        self._held = storage, storage.data_ptr(), storage.nbytes()

    def renew_input(self) -> None:
        """The network moved, shared or resized the memory of its input: it keeps that, and gets its next ones elsewhere."""
        self.net_input, self.time = torch.empty_like(self.net_input), torch.empty_like(self.time)
        self._hold_input()
        self._steps.clear()

    def _prepare(self, plan: RowPlan, z: Tensor | None) -> Step:
        """The `step` of a row's plan, on this loop's buffers."""

        def at(number: int | None) -> Tensor | None:
            return None if number is None else self.buffers[number]

        stored = at(plan.noise) if z is None else None
        stream = SAMPLER if plan.draws and z is None and stored is None else None
        operands = {
            "history": [self.buffers[n] for n in plan.history] or None, "base": at(plan.base),
            "z": z if stored is None else stored, "measured": None if plan.norm is None else self.measured,
            "pushed": at(plan.pushed), "net_input": self.net_input if plan.feeds else None, "first_bad": self.first_bad,
            "known": self.known, "mask": self.mask,
        }  # fmt: skip
        out, x, matrix = self.buffers[plan.out], self.buffers[plan.x], self.matrix
        if z is None and not plan.guides:
            return self.mark("step", self.operations.prepare_step(out, matrix, stream, x, **operands))  # type: ignore[no-any-return]
        # once, with this z: to prepare it would take longer; and what is prepared takes no second output
        step = self.mark("step", self.operations.step)
        return lambda cursor, m, v, guide=None: step(out, matrix, cursor, stream, x, m, guide=guide, v=v, **operands)


def network_times(table: StepTable, dtype: torch.dtype) -> Sequence[float]:
    """Each row's network time, whole numbers for integers; 0 for rows that call no network."""
    return table.times if dtype.is_floating_point else [round(time) for time in table.times]


def raise_if_bad(table: StepTable, first_bad: Tensor, first_sample: int) -> None:
    """The one host read: refuse to go on, or to return, if some sample has left the finite numbers."""
    rows = first_bad.cpu()
    k = int(rows.min()) if len(rows) else len(table)
    if k == len(table):
        return
    samples = tuple((torch.nonzero(rows < len(table)).flatten() + first_sample).tolist())
    row: Row = table.rows[k]
    shown = ", ".join(map(str, samples[:5])) + (", …" if len(samples) > 5 else "")
    raise NonFiniteError(
        f"the run is not finite from row {k} ({row.label}, t = {row.level.t:g}) on, in {len(samples)} samples "
        f"({shown}): look at the network's output there, or take more steps",
        k, row.level.t, samples,
    )  # fmt: skip
