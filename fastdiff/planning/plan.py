"""plan(): a process, a grid, a solver and a prediction become one StepTable."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .. import checks
from ..errors import ConfigError, names_keywords
from ..table import Level, Row, StepTable
from . import grids, predictions, processes, samplers
from .processes import Process
from .samplers.base import X0, Combination, SolverRow, SolverRows

LONGEST_CACHED = 10_000
MAX_STEPS = 10**6  # a longer table would take many gigabytes on the host

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
    denoise: bool = True,
    time_input: str | None = None,
    clock: Process | None = None,
) -> StepTable:
    """The table of a run, by the same rules and defaults as `fastdiff.sample`.

    `clock`: the process the network was trained on, where `sde` is a chain on its path (DDPM on VP, NCSN on VE): the
    network is then told the clock's time of each level.

        print(fastdiff.plan("vp", 100).explain())
    """
    process = processes.get(sde)
    chosen = samplers.get(sampler, process)
    steps = None if steps is None else checks.integer("steps", steps, 1, MAX_STEPS)
    # typed: a grid of times and the same numbers as sigmas are equal tuples. A long table is not worth its memory
    make = _plan if steps is not None and steps > LONGEST_CACHED else _cached
    return make(
        process,
        steps,
        chosen,
        prediction,
        grid if grid is None or isinstance(grid, (str, grids.Sigmas)) else grids.decreasing("grid", grid),
        None if t_min is None else checks.number("t_min", t_min),
        None if clip is None else checks.pair("clip", clip),
        checks.flag("denoise", denoise),
        predictions.default_time_input(prediction) if time_input is None else time_input,
        process if clock is None else clock,
    )


def _plan(
    process: Process,
    steps: int | None,
    sampler: samplers.Sampler,
    prediction: str,
    grid_spec: Any,
    t_min: float | None,
    clip: Clip,
    denoise: bool,
    time_input: str,
    clock: Process,
) -> StepTable:
    predictions.check(prediction, time_input, clock)
    with np.errstate(all="ignore"):  # what overflows is refused by name
        grid, steps = _grid(process, steps, sampler, grid_spec, t_min)
        drafts, end = sampler.rows(process, grid, steps, denoise)
    if grid.reference and any(
        math.isnan(number) for step in drafts for row in step for number in (row.a, row.c, *row.b)
    ):
        raise ConfigError(
            f"grid='score_sde' has no steps of sampler {sampler.name!r} on {process!r:.80} at steps={steps}: use more "
            "(on VP, more than beta_max) or grid='uniform'"
        )
    title = f"{process!r:.120} | {sampler!r} | {steps} steps, prediction {prediction}"
    rows = _rows(drafts, prediction, time_input, clip, process, clock)
    if clip is not None and not any(row.clips for row in rows):
        raise ConfigError(f"clip acts on predictions of x0, and sampler {sampler.name!r} makes none: leave clip out")
    return StepTable(title, tuple(rows), end, _start_std(process, grid.steps[0].level), clip)


_cached = lru_cache(maxsize=64, typed=True)(_plan)


def _grid(
    process: Process, steps: int | None, sampler: samplers.Sampler, spec: Any, t_min: float | None
) -> tuple[grids.Grid, int]:
    """The grid and the number of steps, by the caller's word or by the sampler's defaults."""
    if spec is not None and not isinstance(spec, str):
        meant = sampler.steps_on(process, len(spec))
        if not sampler.any_steps and steps not in (None, meant):
            raise ConfigError(f"steps={steps} contradicts a grid of {len(spec)} points ({meant} steps): drop one")
        return grids.build(spec, process, None, t_min), steps or meant
    end = sampler.default_t_min(process) if t_min is None else t_min
    if steps is None:
        steps = sampler.default_steps(process, end)
    spec = sampler.default_grid(process, steps, end) if spec is None else spec
    if spec == "score_sde" and not sampler.reference_grid:
        raise ConfigError(f"grid='score_sde' has no sampler {sampler.name!r}: use grid='uniform'")
    # the reference's grid has as many points as steps; any other has one more, but for samplers that stand on levels
    return grids.build(spec, process, steps if spec == "score_sde" else sampler.intervals(process, steps), end), steps


def _start_std(process: Process, first: Level) -> float:
    """The standard deviation of the start: the prior's at T; below T the level's own σ, Karras et al.'s Alg. 1, as long
    as the data's share of x is small or α = 1; else NaN, and the run needs x_init."""
    if abs(first.t - process.T) <= 1e-6 * process.T:
        return process.prior_std
    return first.sigma if first.alpha == 1 or first.sigma >= 10 * first.alpha else math.nan


class _Kept(NamedTuple):
    """A prediction in the history: what it is stored as, what its solver meant, and where x stood."""

    stored: Combination
    meaning: Combination
    level: Level
    base: int  # which opening of the base register held that x; 0: none did


def _rows(
    drafts: SolverRows, prediction: str, time_input: str, clip: Clip, process: Process, clock: Process
) -> list[Row]:
    """Turn the solver's meanings into the network's prediction, and fold what can be folded on the host.

    A prediction that only its own row reads is used as the network gives it (p = 0, q = 1) with the conversion in a
    and b; one that later rows read, or that is clipped, is converted by p and q.
    """
    flat = [_without_zeros(draft) for step in drafts for draft in step]
    read = _read_later(flat)
    asked = [draft.level for draft in flat if draft.h0 is not None]
    told = dict(zip(asked, _network_columns(asked, prediction, time_input, process, clock)))
    rows, history = [], list[_Kept]()
    openings, base = 0, 0
    for k, draft in enumerate(flat):
        if draft.saves_base:
            openings += 1
            base = openings
        a, e, b = draft.a, draft.e, list(draft.b)
        row = Row(
            draft.level, draft.label, a, e=e, c=draft.c, saves_base=draft.saves_base, log_variance=draft.log_variance
        )
        if draft.h0 is None:
            b = _from_history(b, history, base, 0)[0]
            rows.append(replace(row, b=tuple(b)))
            continue
        time, in_scale, source = told[draft.level]
        clips = clip is not None and draft.clips
        keep = draft.keeps_prediction and k in read
        stored = X0 if clips else draft.h0 if keep or draft.measure is not None else source
        p, q = _convert(source, stored, draft.level)
        u, v = _convert(stored, draft.h0, draft.level)
        own = b[0] if b else 0.0
        older, shift = _from_history(b[1:], history, base, k)
        row = replace(
            row, a=a + own * u, e=e + shift, b=(own * v, *older), calls_network=True, keeps_prediction=keep, clips=clips,
            network_time=time, in_scale=in_scale, p=p, q=q, measure=draft.measure,
        )  # fmt: skip
        rows.append(row)
        if keep:
            history.append(_Kept(stored, draft.h0, draft.level, base if draft.saves_base else 0))
    return rows


def _without_zeros(draft: SolverRow) -> SolverRow:
    """The draft without zero weights on its oldest predictions."""
    b = draft.b
    while len(b) > (draft.h0 is not None) and b[-1] == 0:
        b = b[:-1]
    return draft if b is draft.b else replace(draft, b=b)


def _read_later(flat: list[SolverRow]) -> set[int]:
    """Which drafts' predictions some later draft reads, or are between those and it: a history has no gaps."""
    pushed, read = list[int](), set[int]()
    for k, draft in enumerate(flat):
        older = draft.b if draft.h0 is None else draft.b[1:]
        read.update(pushed[len(pushed) - len(older) :])
        if draft.h0 is not None and draft.keeps_prediction:
            pushed.append(k)
    return read


def _from_history(b: Any, history: list[_Kept], base: int, k: int) -> tuple[list[float], float]:
    """Coefficients on stored predictions, and what they add to the base's, for coefficients on meant ones."""
    converted, shift = [], 0.0
    for j, value in enumerate(b):
        kept = history[-1 - j]
        u, v = _convert(kept.stored, kept.meaning, kept.level)
        if u != 0 and value != 0:
            if kept.base == 0 or kept.base != base:
                raise ConfigError(
                    f"clip is not defined for this sampler: row {k} reuses a prediction from another state"
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
    levels: list[Level], prediction: str, time_input: str, process: Process, clock: Process
) -> list[tuple[float, float, Combination]]:
    """For each level that asks the network: what it is told, its input's scale, what it answers."""
    if not levels:
        return []
    t, alpha, sigma = (np.array(column, dtype=np.float64) for column in zip(*levels))
    if (sigma <= 0).any():
        at = t[int(np.argmin(sigma))]
        raise ConfigError(f"the network would be asked at t = {at:g}, where sigma = 0: use a larger t_min")
    own = t if clock == process else np.minimum(clock.time(sigma / alpha), clock.T)
    told = predictions.network_time(time_input, clock, own, alpha, sigma)
    r, w = predictions.coordinates(prediction, clock, own, alpha, sigma)
    scale = predictions.input_scale(prediction, clock, alpha, sigma)
    columns = np.stack(np.broadcast_arrays(told, scale, r, w), 1).tolist()
    return [(time, in_scale, (r, w)) for time, in_scale, r, w in columns]
