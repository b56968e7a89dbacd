"""plan(): a process, a grid, a sampler and a prediction become one StepTable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from ..errors import ConfigError, names_keywords
from ..table import MAX_ROWS, Level, Row, StepTable
from . import grids, predictions, processes, samplers
from .cache import cached
from .processes import Process
from .samplers.base import EPS, X0, Combination, SolverRow

ROWS_CACHED = 50_000  # in all tables together: some 40 MB
MAX_STEPS = 10**6

Clip = tuple[float, float] | None


@names_keywords
def plan(
    sde: Any,
    steps: int | None = None,
    *,
    sampler: Any = None,
    prediction: str = "score",
    grid: Any = None,
    t_min: float | None = None,
    clip: tuple[float, float] | None = None,
    clip_state: tuple[float, float] | None = None,
    denoise: bool = True,
    time_input: predictions.TimeInput | None = None,
    clock: Process | None = None,
) -> StepTable:
    """The table of a run, by the same rules and defaults as `fastdiff.sample`.

    `clock`: the process the network was trained on, where `sde` is a chain on its path (DDPM on VP, NCSN on VE): the
    network is then given the clock's time of each level. `clip_state`: (lo, hi) in which the state is kept after each step, its
    noise included; run the table by sample(..., table=).

        print(fastdiff.plan("vp", 100).explain())
    """
    process = processes.get(sde)
    return make_table(
        process,
        samplers.get(sampler, process),
        steps,
        prediction=prediction,
        time_input=predictions.default_time_input(prediction, clock or process) if time_input is None else time_input,
        clock=process if clock is None else clock,
        grid=grid,
        t_min=t_min,
        clip=clip,
        clip_state=clip_state,
        denoise=denoise,
    )


def make_table(
    process: Process,
    sampler: samplers.Sampler,
    steps: int | None = None,
    *,
    prediction: str,
    time_input: predictions.TimeInput,
    clock: Process,
    grid: Any = None,
    t_min: float | None = None,
    clip: Clip = None,
    clip_state: Clip = None,
    denoise: bool = True,
) -> StepTable:
    """What `plan` does once its names are objects: its arguments checked, and the table, from a cache."""
    steps = None if steps is None else checks.integer("steps", steps, 1, MAX_STEPS)
    make = _make if callable(time_input) else _cached  # a function may mean something else by the next run
    return make(
        process,
        sampler,
        steps,
        prediction,
        time_input,
        clock,
        _checked_grid(process, grid),
        None if t_min is None else checks.number("t_min", t_min),
        None if clip is None else checks.pair("clip", clip),
        None if clip_state is None else checks.pair("clip_state", clip_state),
        checks.flag("denoise", denoise),
    )


def check_table(table: Any, prediction: str, time_input: predictions.TimeInput, process: Process) -> StepTable:
    """Refuse a table that is not for a network of this prediction and time input, trained on `process`."""
    if not isinstance(table, StepTable):
        raise ConfigError(f"table must be a StepTable, such as fastdiff.plan gives, got {type(table).__name__}")
    if len(table) > MAX_ROWS:
        raise ConfigError(f"table has {len(table)} rows, at most {MAX_ROWS}: use fewer steps")
    for name, planned, own in (
        ("prediction", table.prediction, prediction),
        ("time_input", table.time_input, time_input),
    ):
        if planned not in (None, own):
            raise ConfigError(
                f"table was planned for {name}={planned!r:.40}, and the model has {own!r:.40}: plan(..., {name}={own!r:.40})"
            )
    calls = [k for k, row in enumerate(table.rows) if row.calls_network]
    told = np.array([table.rows[k].network_time for k in calls])
    if time_input == "index" and (told != np.round(told)).any():
        bad = calls[int(np.flatnonzero(told != np.round(told))[0])]
        raise ConfigError(
            f"row {bad} of the table tells the network the step {table.rows[bad].network_time:g}, and time_input='index' "
            "takes whole ones: give a table of the chain's own steps, or a model of time_input='fractional_index'"
        )
    if table.time_input is not None and process.linear and calls:
        t, alpha, sigma = (np.array(column) for column in zip(*(table.rows[k].level for k in calls)))
        own_clock = np.allclose(process.alpha(t), alpha, rtol=1e-9) and np.allclose(process.sigma(t), sigma, rtol=1e-9)
        clock_t = t if own_clock else np.minimum(process.time(sigma / alpha), process.T)
        wanted = predictions.network_time(time_input, process, clock_t, alpha, sigma)
        off = np.flatnonzero(~np.isclose(told, wanted, rtol=1e-6, atol=1e-9 * process.T))
        if len(off):
            k = int(off[0])
            raise ConfigError(
                f"row {calls[k]} of the table tells the network the time {told[k]:g}, and for its noise this model takes "
                f"{wanted[k]:g}: plan(..., clock=model.process), or dataclasses.replace(table, time_input=None) if it is meant"
            )
    return table


def _checked_grid(process: Process, grid: Any) -> Any:
    """The grid as constants: a name, noise ratios, or times."""
    if grids.is_respacing(grid):
        if not process.discrete or process.ladder:
            raise ConfigError(f"grid={grid!r} needs a DDPM chain, and the process is {process.name!r}: use steps=")
        grid = grids.timesteps(grid, int(process.T))
    if isinstance(grid, grids.Indices):
        return grids.times_of(grid, process)
    if grid is None or isinstance(grid, (str, grids.Sigmas)):
        return grid
    times = grids.decreasing("grid", grid)
    grids.warn_of_timesteps(process, times)
    return times


def _make(
    process: Process,
    sampler: samplers.Sampler,
    steps: int | None,
    prediction: str,
    time_input: predictions.TimeInput,
    clock: Process,
    grid_spec: Any,
    t_min: float | None,
    clip: Clip,
    clip_state: Clip,
    denoise: bool,
) -> StepTable:
    predictions.check(prediction, time_input, clock)
    with np.errstate(all="ignore"):  # what overflows is refused by name
        grid, steps = _grid(process, steps, sampler, grid_spec, t_min)
        _check_rows(sampler, steps)
        solver_rows, end = sampler.rows(process, grid, steps, denoise)
    flat = [_without_zeros(row) for step in solver_rows for row in step]
    if clip_state is not None and not sampler.stores_state:
        raise ConfigError(
            f"clip_state needs a sampler whose rows store the state, and {sampler.name!r} corrects it later"
        )
    if grid.reference and any(math.isnan(number) for row in flat for number in (row.a, row.c, *row.b)):
        raise ConfigError(
            f"grid='score_sde' has no steps of sampler {sampler.name!r} on {process!r:.80} at steps={steps}: use more "
            "(on VP, more than beta_max) or grid='uniform'"
        )
    title = f"{process!r:.120} | {sampler!r} | {steps} steps, prediction {prediction}"
    rows = _rows(flat, clip, _network_columns(flat, prediction, time_input, process, clock))
    if clip_state is not None:
        ends = np.cumsum([len(step) for step in solver_rows]) - 1
        for k in ends.tolist():
            rows[k] = replace(rows[k], bounds=clip_state)
    if clip is not None and not any(row.clips for row in rows):
        raise ConfigError(f"clip acts on predictions of x0, and sampler {sampler.name!r} makes none: leave clip out")
    return StepTable(title, tuple(rows), end, _start_std(process, grid.steps[0].level), clip, prediction, time_input)


_cached = cached(ROWS_CACHED, len)(_make)


def _check_rows(sampler: samplers.Sampler, steps: int) -> None:
    """Refuse, before rows are made, more than MAX_ROWS."""
    leapfrog = getattr(sampler, "leapfrog", 1) if getattr(sampler, "corrector", None) == "hmc" else 1
    rows = steps * (1 + leapfrog * getattr(sampler, "corrector_steps", 0))
    if rows > MAX_ROWS:
        raise ConfigError(
            f"steps={steps} of sampler {sampler.name!r} are {rows} rows, at most {MAX_ROWS}: use fewer of both"
        )


def _grid(
    process: Process, steps: int | None, sampler: samplers.Sampler, spec: Any, t_min: float | None
) -> tuple[grids.Grid, int]:
    """The grid and the number of steps: the caller's, else the sampler's defaults."""
    if spec is not None and not isinstance(spec, str):
        implied = sampler.steps_on(process, len(spec))
        if not sampler.any_steps and steps not in (None, implied):
            raise ConfigError(f"steps={steps} contradicts a grid of {len(spec)} points ({implied} steps): drop one")
        return grids.build(spec, process, None, t_min), steps or implied
    end = sampler.default_t_min(process) if t_min is None else t_min
    if steps is None:
        steps = sampler.default_steps(process, end)
        if steps < 1 and 0 <= end < process.T:
            raise ConfigError(
                f"t_min={end:g} leaves no step of a chain that ends at {process.T:g}: use {process.T - 1:g} or less"
            )
    spec = sampler.default_grid(process, steps, end) if spec is None else spec
    if spec == "score_sde" and not sampler.reference_grid:
        raise ConfigError(f"grid='score_sde' has no sampler {sampler.name!r}: use grid='uniform'")
    # the reference's grid has as many points as steps; any other has one more, but for samplers that stand on levels
    count = steps if spec == "score_sde" else sampler.intervals(process, steps)
    return grids.build(spec, process, count, end, sampler.in_time, t_min is None, sampler.one_more), steps


def _start_std(process: Process, first: Level) -> float:
    """The standard deviation of the start: the prior's at t_start; below, the level's own σ, Karras et al.'s Alg. 1, as long
    as the data's share of x is small or α = 1; else NaN, and the run needs x_init."""
    if first.t >= process.t_start - 1e-6 * process.T:
        return process.prior_std
    return first.sigma if first.alpha == 1 or first.sigma >= 10 * first.alpha else math.nan


class _Network(NamedTuple):
    """What a row's network call takes and returns: the time it is given, its input's scale, what it predicts."""

    time: float
    in_scale: float
    predicts: Combination


class _Stored(NamedTuple):
    """A prediction in the history: the combination it is stored as, the one its sampler meant, and where x stood."""

    stored: Combination
    meant: Combination
    level: Level
    base: int  # the number of the row that saved that x as the base; -1: none did


def _rows(flat: Sequence[SolverRow], clip: Clip, networks: dict[Level, _Network]) -> list[Row]:
    """Turn the sampler's combinations into the network's prediction, and fold what can be folded on the host.

    A prediction that only its own row reads is used as the network gives it (p = 0, q = 1) with the conversion in a
    and b; one that later rows read, or that is clipped, is converted by p and q.
    """
    read = _read_later(flat)
    rows, history = [], list[_Stored]()
    base = -1
    for k, solver in enumerate(flat):
        if solver.saves_base:
            base = k
        if solver.h0 is None:
            b, _ = _from_history(solver.b, history, base, k)
            rows.append(Row(
                solver.level, solver.label, solver.a, tuple(b), solver.e, solver.c, saves_base=solver.saves_base,
                measure=solver.measure, log_variance=solver.log_variance,
            ))  # fmt: skip
            continue
        time, in_scale, predicts = networks[solver.level]
        clips = clip is not None and solver.clips
        keeps = solver.keeps_prediction and k in read
        stored = X0 if clips else solver.h0 if keeps or solver.measure is not None else predicts
        p, q = _convert(predicts, stored, solver.level)
        u, v = _convert(stored, solver.h0, solver.level)
        of_x, of_raw = _convert(predicts, EPS, solver.level) if solver.raw != 0 else (0.0, 0.0)
        b0 = solver.b[0] if solver.b else 0.0
        older, shift = _from_history(solver.b[1:], history, base, k)
        rows.append(Row(
            solver.level, solver.label, solver.a + b0 * u + solver.raw * of_x, (b0 * v, *older), solver.e + shift, solver.c,
            calls_network=True, saves_base=solver.saves_base, keeps_prediction=keeps, clips=clips, network_time=time,
            in_scale=in_scale, p=p, q=q, measure=solver.measure, log_variance=solver.log_variance,
            raw=solver.raw * of_raw,
        ))  # fmt: skip
        if keeps:
            history.append(_Stored(stored, solver.h0, solver.level, base if solver.saves_base else -1))
    return rows


def _without_zeros(row: SolverRow) -> SolverRow:
    """The row without zero weights on its oldest predictions."""
    b = row.b
    while len(b) > (row.h0 is not None) and b[-1] == 0:
        b = b[:-1]
    return row if b is row.b else replace(row, b=b)


def _read_later(flat: Sequence[SolverRow]) -> set[int]:
    """Which rows' predictions some later row reads, or are between those and it: a history has no gaps."""
    pushed, read = list[int](), set[int]()
    for k, row in enumerate(flat):
        older = row.b if row.h0 is None else row.b[1:]
        read.update(pushed[len(pushed) - len(older) :])
        if row.h0 is not None and row.keeps_prediction:
            pushed.append(k)
    return read


def _from_history(b: Sequence[float], history: list[_Stored], base: int, k: int) -> tuple[list[float], float]:
    """Coefficients on stored predictions, and what they add to the base's, for coefficients on meant ones."""
    converted, shift = [], 0.0
    for j, value in enumerate(b):
        if j >= len(history):
            raise ConfigError(
                f"row {k} reads {len(b)} predictions of earlier rows, and {len(history)} were kept by then"
            )
        entry = history[-1 - j]
        u, v = _convert(entry.stored, entry.meant, entry.level)
        if u != 0 and value != 0:
            if entry.base < 0 or entry.base != base:
                raise ConfigError(
                    f"clip is not defined for this sampler: row {k} reuses a prediction of which x is no longer there, "
                    "so leave clip out"
                )
            shift += value * u
        converted.append(value * v)
    return converted, shift


def _convert(source: Combination, target: Combination, level: Level) -> tuple[float, float]:
    if source == target:
        return 0.0, 1.0
    p, q = predictions.convert(source, target, level.alpha, level.sigma)
    return float(p), float(q)


def _network_columns(
    flat: Sequence[SolverRow], prediction: str, time_input: predictions.TimeInput, process: Process, clock: Process
) -> dict[Level, _Network]:
    """The network's side of a call at each level where there is one."""
    levels = list(dict.fromkeys(row.level for row in flat if row.h0 is not None))
    if not levels:
        return {}
    t, alpha, sigma = (np.array(column, dtype=np.float64) for column in zip(*levels))
    if (sigma <= 0).any():
        at = t[int(np.argmin(sigma))]
        raise ConfigError(f"the network would be called at t = {at:g}, where sigma = 0: use a larger t_min")
    clock_t = t if clock == process else np.minimum(clock.time(sigma / alpha), clock.T)
    time = predictions.network_time(time_input, clock, clock_t, alpha, sigma)
    r, w = predictions.coordinates(prediction, clock, clock_t, alpha, sigma)
    predictions.check_determined(prediction, (r, w), t, alpha, sigma)
    in_scale = predictions.input_scale(prediction, clock, alpha, sigma)
    columns = np.stack(np.broadcast_arrays(time, in_scale, r, w), 1).tolist()
    return {level: _Network(time, in_scale, (r, w)) for level, (time, in_scale, r, w) in zip(levels, columns)}
