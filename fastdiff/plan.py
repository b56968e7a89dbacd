"""plan(): a process, a grid, a solver and a prediction become one StepTable."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from . import checks, grids, predictions, processes, samplers
from .errors import ConfigError
from .processes import Process
from .solvers.draft import X0, Draft, Drafts, Meaning
from .table import Level, Row, StepTable

MAX_STEPS = 10**7

Clip = tuple[float, float] | None


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
    return _plan(
        process,
        None if steps is None else checks.integer("steps", steps, 1, MAX_STEPS),
        chosen,
        prediction,
        grid if grid is None or isinstance(grid, (str, grids.Sigmas)) else grids.decreasing("grid", grid),
        None if t_min is None else checks.number("t_min", t_min),
        None if clip is None else checks.pair("clip", clip),
        bool(denoise),
        default_time_input(prediction) if time_input is None else time_input,
        process if clock is None else clock,
    )


def default_time_input(prediction: str) -> str:
    """ "t", except that EDM's preconditioned network is told log(sigma)/4."""
    return "c_noise" if prediction == "edm" else "t"


@lru_cache(maxsize=64)
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
    explicit = not (grid_spec is None or isinstance(grid_spec, str))
    if steps is None:
        steps = _steps_of(grid_spec, sampler, process) if explicit else sampler.default_steps(process)
    if grid_spec is None:
        grid_spec = sampler.default_grid(process, steps)
    if grid_spec == "score_sde" and not sampler.reference_grid:
        raise ConfigError(f"grid='score_sde' has no sampler {sampler.name!r}: use grid='uniform'")
    # the reference's grid has as many points as steps; any other has one more, but for samplers that stand on levels
    n = steps if grid_spec == "score_sde" else sampler.intervals(process, steps)
    end_at = sampler.default_t_min(process) if t_min is None and not explicit else t_min
    grid = grids.build(grid_spec, process, n, end_at)
    drafts, end = sampler.rows(process, grid, steps, denoise)
    title = f"{process!r:.120} | {sampler!r} | {steps} steps, prediction {prediction}"
    rows = _rows(drafts, prediction, time_input, clip, process, clock)
    if clip is not None and not any(row.clips for row in rows):
        raise ConfigError(f"clip acts on predictions of x0, and sampler {sampler.name!r} makes none: leave clip out")
    return StepTable(title, tuple(rows), end, process.prior_std, clip)


def _steps_of(grid_spec: Any, sampler: samplers.Sampler, process: Process) -> int:
    """The steps an explicit grid means for a sampler: the count whose intervals are the grid's."""
    if isinstance(sampler, samplers.ULA):
        return sampler.default_steps(process)
    points = len(grid_spec)
    if isinstance(sampler, samplers.AnnealedLangevin):
        return points * (sampler.steps_per_level or 5)
    alone = isinstance(sampler, samplers.PredictorCorrector) and sampler.predicting is None
    return points if alone else points - 1


class _Kept(NamedTuple):
    """A prediction in the history: what it is stored as, what its solver meant, and where x stood."""

    stored: Meaning
    meaning: Meaning
    level: Level
    base: int  # which opening of the base register held that x; 0: none did


def _rows(drafts: Drafts, prediction: str, time_input: str, clip: Clip, process: Process, clock: Process) -> list[Row]:
    """Turn the solver's meanings into the network's prediction, and fold what can be folded on the host.

    A prediction that only its own row reads is used as the network gives it (p = 0, q = 1) with the conversion in a
    and b; one that later rows read, or that is clipped, is converted by p and q.
    """
    flat = [draft for step in drafts for draft in step]
    read = _read_later(flat)
    asked = [draft.level for draft in flat if draft.meaning is not None]
    told = dict(zip(asked, _network_columns(asked, prediction, time_input, process, clock)))
    rows, history = [], list[_Kept]()
    openings, base = 0, 0
    for k, draft in enumerate(flat):
        if draft.opens:
            openings += 1
            base = openings
        a, e, b = draft.a, draft.e, list(draft.b)
        row = Row(draft.level, draft.label, a, e=e, c=draft.c, opens=draft.opens, log_variance=draft.log_variance)
        if draft.meaning is None:
            b = _from_history(b, history, base, 0)[0]
            rows.append(replace(row, b=tuple(b)))
            continue
        time, in_scale, source = told[draft.level]
        clips = clip is not None and draft.clips
        keep = draft.pushes and k in read
        stored = X0 if clips else draft.meaning if keep or draft.measure is not None else source
        p, q = _convert(source, stored, draft.level)
        u, v = _convert(stored, draft.meaning, draft.level)
        own = b[0] if b else 0.0
        older, shift = _from_history(b[1:], history, base, k)
        row = replace(
            row, a=a + own * u, e=e + shift, b=(own * v, *older), calls=True, pushes=keep, clips=clips,
            time=time, in_scale=in_scale, p=p, q=q, measure=draft.measure,
        )  # fmt: skip
        rows.append(row)
        if keep:
            history.append(_Kept(stored, draft.meaning, draft.level, base if draft.opens else 0))
    return rows


def _read_later(flat: list[Draft]) -> set[int]:
    """Which drafts' predictions some later draft reads."""
    pushed, read = list[int](), set[int]()
    for k, draft in enumerate(flat):
        older = draft.b if draft.meaning is None else draft.b[1:]
        read.update(pushed[-1 - j] for j, b in enumerate(older) if b != 0)
        if draft.meaning is not None and draft.pushes:
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


def _convert(source: Meaning, target: Meaning, level: Level) -> tuple[float, float]:
    if source == target:
        return 0.0, 1.0
    p, q = predictions.convert(source, target, level.alpha, level.sigma)
    return float(p), float(q)


def _network_columns(
    levels: list[Level], prediction: str, time_input: str, process: Process, clock: Process
) -> list[tuple[float, float, Meaning]]:
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
