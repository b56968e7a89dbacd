"""Runs a step table eagerly. Knows tables, operations and tensors; no process, no sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .errors import NonFiniteError
from .reference.noise import SAMPLER
from .table import Row, StepTable

# (row number, input already scaled) -> prediction [B, *], and the second half of its channels where the variance is learned
Network = Callable[[int, Tensor], tuple[Tensor, Tensor | None]]
# (row number) -> noise like the state
Draw = Callable[[int], Tensor]

CHECKS = ("final", "every", "off")


def run(
    table: StepTable,
    operations: ModuleType,
    network: Network,
    x: Tensor,
    net_input: Tensor,
    *,
    seed: int,
    first_sample: int,
    noise: Draw | None,
    check: str,
) -> Iterator[Tensor]:
    """Yield the state after each row, from `x` [B, *] on: one `step` each. What is yielded is overwritten later on.

    operations  the module that implements them (fastdiff.ops.backend_module)
    net_input   the first row's input, whose dtype and layout all inputs have; each row's is a tensor of its own
    noise       instead of the counter's, where given
    check       "final": each row keeps a flag on the device that is read once, after the last; "every": after each row
    """
    matrix = torch.from_numpy(table.matrix).to(x.device, x.dtype)
    first_bad = None if check == "off" else torch.full((len(x),), len(table), device=x.device)
    base: Tensor | None = None
    history: list[Tensor] = []
    pool = [x]

    def spare(*taken: Tensor | None) -> Tensor:
        """A buffer like the state that holds nothing needed any more."""
        used = [x, base, *history, *taken]
        for buffer in pool:
            if not any(buffer is other for other in used):
                return buffer
        pool.append(torch.empty_like(x))
        return pool[-1]

    for (k, row), cursor in zip(enumerate(table.rows), _cursors(table, seed, first_sample, x.device)):
        base = x if row.opens else base
        m, v = network(k, net_input) if row.calls else (None, None)
        z = noise(k) if noise is not None and row.draws else None
        stream = SAMPLER if row.draws and z is None else None
        measured = None
        if row.measure is not None and m is not None:
            measured = x.new_empty((len(x), 2))
            kept = spare() if z is None and operations.KEEPS_NOISE else None
            operations.measure_langevin(
                measured, matrix, cursor, stream, row.measure.norm == "batch", x, m, None, z, kept
            )
            z, stream = (z, stream) if kept is None else (kept, None)
        out = spare(z)
        pushed = spare(z, out) if row.pushes and table.memory else None
        follows = k + 1 < len(table) and table.rows[k + 1].calls
        net_input = torch.empty_like(net_input) if follows else net_input
        operations.step(
            out, matrix, cursor, stream, x, m, history or None, None, v if row.log_variance else None, base, z, measured,
            None, None, pushed, net_input if follows else None, first_bad,
        )  # fmt: skip
        x = out
        if pushed is not None:
            history = [pushed, *history][: table.memory]
        if check == "every" and first_bad is not None:
            _raise_if_bad(table, first_bad, first_sample)
        yield x
    if first_bad is not None:
        _raise_if_bad(table, first_bad, first_sample)


def _cursors(table: StepTable, seed: int, first_sample: int, device: torch.device) -> Iterator[Tensor]:
    """Each row's cursor (see fastdiff.reference.row), from a table on the device."""
    for low in range(0, len(table), 1024):
        rows = np.arange(low, min(low + 1024, len(table)))
        cursors = np.stack(
            (rows, np.full_like(rows, first_sample), np.full_like(rows, np.uint64(seed).astype(np.int64))), 1
        )
        yield from torch.from_numpy(cursors).to(device).unbind()


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
