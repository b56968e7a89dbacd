"""RePaint's jumps as rows of a table."""

from __future__ import annotations

import math
from dataclasses import replace

from ..errors import ConfigError
from ..table import MAX_ROWS, Level, Row, StepTable


def with_jumps(table: StepTable, jump_length: int, resamplings: int) -> StepTable:
    """The table with jumps back to the noise (Lugmayr et al. 2022, Alg. 1 and App. B): from each of the levels 1, 1 + j, 1 + 2j,
    … above the end that has j = jump_length levels above it, resamplings − 1 times up by j levels, in one row

        x ← a x + c z,      a = α_t/α_s,      c² = σ_t² − a² σ_s²

    that calls no network, and down again by the table's own rows.
    """
    steps = _steps(table)
    count = len(steps)
    if jump_length >= count:
        raise ConfigError(
            f"jump_length={jump_length} must be less than the steps of the run, {count}: take more steps, or a shorter jump"
        )
    from_levels = range(1, count - jump_length + 1, jump_length)
    size = max(map(len, steps))
    if (count + len(from_levels) * (resamplings - 1) * (jump_length + 1)) * size > MAX_ROWS:
        raise ConfigError(
            f"resamplings={resamplings} of {count} steps are more than {MAX_ROWS} rows: take fewer of both"
        )
    levels = [table.end, *(step[0].level for step in reversed(steps))]  # by their number above the end
    left = dict.fromkeys(from_levels, resamplings - 1)
    rows, at = list[Row](), count
    while at > 0:
        rows += steps[count - at]
        at -= 1
        if left.get(at, 0) > 0:
            left[at] -= 1
            rows.append(_jump(levels[at], levels[at + jump_length]))
            at += jump_length
    return replace(table, title=f"{table.title} | jumps of {jump_length}, {resamplings} passes", rows=tuple(rows))


def _steps(table: StepTable) -> list[list[Row]]:
    """The rows from each level down to the next; what stands on the end's level belongs to the last step."""
    steps = list[list[Row]]()
    for k, row in enumerate(table.rows):
        if row.e != 0 or len(row.b) > row.calls_network:
            raise ConfigError(
                f"inverse.RePaint jumps back to noisier levels, and row {k} ({row.label}) needs what rows before it have kept: "
                "use a sampler whose steps stand alone, such as ancestral, euler_maruyama, ddim or pc"
            )
        lower = not steps or row.level.sigma_hat < steps[-1][0].level.sigma_hat
        if lower and not (steps and row.level == table.end):
            steps.append([row])
        else:
            steps[-1].append(row)
    return steps


def _jump(low: Level, high: Level) -> Row:
    a = high.alpha / low.alpha
    return Row(low, "jump", a, c=math.sqrt(high.sigma**2 - (a * low.sigma) ** 2))
