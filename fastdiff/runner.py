"""Runs a step table eagerly. Knows tables, operations and tensors; no process, no sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import ops
from .errors import NonFiniteError
from .table import Row, StepTable

# (row number, input already scaled) -> prediction [B, *], and the second half of its channels where the variance is learned
Network = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
# (row number) -> noise like the state
Draw = Callable[[int], Tensor]

CHECKS = ("final", "every", "off")


def run(table: StepTable, network: Network, x: Tensor, draw: Draw, check: str, first_sample: int) -> Iterator[Tensor]:
    """Yield the state after each row, from `x` [B, *] on; a state is never changed once it is yielded.

    check="final": each row ORs into a device flag that is read once, after the last; "every": read after each row.
    """
    base: Tensor | None = None
    history: list[Tensor] = []
    first_bad = torch.full((len(x),), len(table), device=x.device)
    for k, row in enumerate(table.rows):
        base = x if row.opens else base
        h, scale, finite = x, row.c, None
        if row.calls:
            m, v = network(k, x.clone() if row.in_scale == 1 else ops.step(x, a=row.in_scale))
            if row.clips and check != "off":
                finite = _finite(m)  # a clamp would hide an infinity
            h = ops.convert(x, m, row.p, row.q, table.clip if row.clips else None)
            if row.log_variance is not None and v is not None:
                scale = ops.learned_scale(v, *row.log_variance)
        z = draw(k) if row.draws else None
        if row.measure is not None and z is not None:
            measure = row.measure
            delta, scale = ops.measure_langevin(h, z, norm=measure.norm, gain=measure.gain, cap=measure.cap)
            b: tuple[float | Tensor, ...] = (delta,)
        else:
            b = row.b
        used = [h, *history] if row.calls else history
        x = ops.step(x, a=row.a, e=row.e, b=b, c=scale, base=base, history=used, z=z)
        if row.pushes:
            history = [h, *history][: table.history]
        if check != "off":
            bad = ~_finite(x) if finite is None else ~(_finite(x) & finite)
            first_bad = torch.where(bad & (first_bad == len(table)), k, first_bad)
            if check == "every":
                _raise_if_bad(table, first_bad, first_sample)
        yield x
    if check == "final":
        _raise_if_bad(table, first_bad, first_sample)


def _finite(x: Tensor) -> Tensor:
    return x.isfinite().flatten(1).all(1)


def _raise_if_bad(table: StepTable, first_bad: Tensor, first_sample: int) -> None:
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
