"""sample(): names become objects, objects a table, the table a run."""

from __future__ import annotations

import functools
import math
import numbers
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import checks
from .errors import ConfigError, DataError, DTypeError, choose, names_keywords, short, warn
from .execution import loop, ops, tensor_checks
from .execution.calls import device_of
from .execution.modes import leaves_no_trace
from .guidance import ClassifierFree
from .guidance.base import Setting, guided
from .inverse.inpainting import Task, colorization, inpainting
from .inverse.own_steps import Drawn, OwnSteps, Steps
from .inverse.replacement import Replacement
from .inverse.state import state_changes
from .model import ScoreModel, as_model, check_path, opened
from .planning import chains, processes, samplers
from .planning.coverage import misfit
from .planning.plan import MAX_STEPS, check_table, make_table
from .planning.predictions import TimeInput
from .runs import Request, Result, adaptive_span, run_adaptive, run_table
from .table import StepTable

# states at once of methods with many for a sample, where batch_size says nothing: small networks cost little more
PARTICLES = 512


@dataclass(frozen=True)
class SampleInfo:
    """What a run was: the seed that repeats it, its network calls and rows, its time, what ran it and why.

    A sampler that chooses its steps has no table and no rows, but each sample's own evaluations `nfe` [num_samples]; inverse.SMC
    the effective numbers of particles (Σw)²/Σw² before each row and at the end, `effective` [rows + 1, problems].
    """

    seed: int
    network_calls: int
    rows: int
    seconds: float
    backend: str
    engine: str
    why: str
    table: StepTable | None
    nfe: Tensor | None = None
    effective: Tensor | None = None


MUCH = 0.01  # of the numbers, that clip="data" cuts from more than a width outside of the range, is told


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, left out of what torch.compile traces: of a loop's host code it could make nothing."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class SampleOptions(TypedDict, total=False):
    """The keywords of `sample` that do not change what it returns."""

    sampler: Any
    table: StepTable | None
    num_samples: int | None
    shape: Sequence[int] | None
    prediction: str | None
    time_input: TimeInput | None
    cond: Any
    seed: int | None
    first_sample: int
    batch_size: int | None
    x_init: Tensor | None
    noise: Tensor | Callable[[int], Tensor] | None
    grid: Any
    t_min: float | None
    clip: tuple[float, float] | str | None
    denoise: bool
    guidance: Any
    dtype: torch.dtype | None
    device: torch.device | str | None
    backend: str
    engine: str
    check: str
    progress: bool | None
    callback: Callable[[int, float, Tensor], object] | None


@overload
def sample(
    model: Any, sde: Any = None, steps: int | None = None, *, trajectory: Literal[0] = 0,
    return_info: Literal[False] = False, **options: Unpack[SampleOptions],
) -> Tensor: ...  # fmt: skip


@overload
def sample(
    model: Any, sde: Any = None, steps: int | None = None, *, trajectory: Literal[0] = 0, return_info: Literal[True],
    **options: Unpack[SampleOptions],
) -> tuple[Tensor, SampleInfo]: ...  # fmt: skip


@overload
def sample(
    model: Any, sde: Any = None, steps: int | None = None, *, trajectory: int, return_info: Literal[False] = False,
    **options: Unpack[SampleOptions],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def sample(
    model: Any, sde: Any = None, steps: int | None = None, *, trajectory: int, return_info: Literal[True],
    **options: Unpack[SampleOptions],
) -> tuple[Tensor, Tensor, SampleInfo]: ...  # fmt: skip


@_untraced
@leaves_no_trace
@names_keywords
def sample(
    model: Any,
    sde: Any = None,
    steps: int | None = None,
    *,
    sampler: Any = None,
    num_samples: int | None = None,
    shape: Sequence[int] | None = None,
    prediction: str | None = None,
    time_input: TimeInput | None = None,
    cond: Any = None,
    seed: int | None = 0,
    first_sample: int = 0,
    batch_size: int | None = None,
    x_init: Tensor | None = None,
    noise: Tensor | Callable[[int], Tensor] | None = None,
    grid: Any = None,
    t_min: float | None = None,
    clip: tuple[float, float] | str | None = None,
    denoise: bool = True,
    guidance: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
    engine: str = "auto",
    check: str = "final",
    progress: bool | None = None,
    callback: Callable[[int, float, Tensor], object] | None = None,
    trajectory: int = 0,
    return_info: bool = False,
    table: StepTable | None = None,
) -> Any:
    """Draw samples [num_samples, *shape] from a score-based model, in the units of its `data_range` (not clamped to it).

    model         a ScoreModel, the path or name of one (fastdiff.load), or any callable (x [B, *shape], t [B]) -> [B, *shape]:
                  then `sde` and `shape` are needed, `prediction` is "score" and t the process time unless said otherwise (on a
                  DDPM chain the step from 0, "index", of a network that predicts anything but a score). x and t are the run's
                  own buffers, overwritten for the next call: a model that keeps them must clone them
    sde           "ve", "vp", "subvp", "ddpm", "ncsn", "edm", "ou", "rectified_flow" or a process; default the model's own. A
                  discrete chain whose levels lie on the model's path (DDPM where α² + σ² = 1, NCSN where α = 1) runs on it
    steps         predictor steps (annealed Langevin: levels × steps per level); default 1000, all steps of a chain, or
                  what an explicit grid says
    sampler       a name or an object of fastdiff.samplers; default the process's own. "rk45" and "adaptive_sde" choose their
                  steps, and take no steps, grid, clip, noise or callback
    num_samples   default as many as x_init holds, or labels, or conditions of the model's cond_shape; else 16
    seed          0 … 2**64 − 1, None for a fresh one (`return_info` tells it). Sample i is a function of (seed,
                  first_sample + i) alone: for any batch_size, machine or thread count it meets the same noise
    batch_size    samples in one network call; None: all
    x_init, noise the start [num_samples, *shape], in the network's units; the noise [rows, num_samples, *shape], or a callable
                  row -> [num_samples, *shape] that is called once for each row that draws, in order
    grid, t_min   where the steps stand and end: "fourth_root" "uniform" "quadratic" "logsnr" "karras" "trained" "score_sde",
                  diffusers' "leading" "trailing" "linspace", OpenAI's "ddim50" "10,15,20", decreasing times, noise ratios
                  fastdiff.grids.sigmas([...]), or a chain's steps from 0, fastdiff.grids.indices([...])
    clip          (lo, hi) for the predicted x0; "data" clamps the samples to data_range at the end
    denoise       leave out the last predictor row's noise; annealed Langevin adds x + σ² score; "adaptive_sde" ends in the mean
                  of x0
    cond          a tensor or a dict of tensors with a leading num_samples axis, handed to the network as ScoreModel says; a model
                  that was trained with labels must be given them
    guidance      an object of fastdiff.guidance or fastdiff.inverse, or a list, applied in order; a number is ClassifierFree's
                  scale
    dtype         of the result; the run is float32, or float64 when that is asked for
    check         "final", "every" row or "off": where a run that is not finite is refused with NonFiniteError
                  (those that choose their steps look at each, whatever this says)
    callback      (row, t, x) after each row, once for each batch; x is a copy, t its process time
    trajectory    k > 0 adds k states [k, num_samples, *shape], evenly spaced from the start to the end (in rows; with "rk45" in
                  the solver's variable)
    backend       "auto": the device's fused kernels where there are any ("cpu": compiled, "triton": GPU), else "reference",
                  plain PyTorch; all make the same bits. `fastdiff doctor` says what there is
    device        where a callable without parameters runs; a model runs where its parameters are (`model.net.to("cuda")`)
    engine        "eager", "graph", or "auto": rows replay as CUDA graphs where they can be captured and that is faster, which a
                  first run finds out, else run eagerly (`return_info` says why). The samples are the same.
                  Captured graphs are cached for each module. In-place updates of parameters are seen; Python side effects
                  are not replayed: a network that counts its calls wants "eager", and after a change of an attribute call
                  fastdiff.graphs.clear()
    return_info   adds a SampleInfo
    table         a StepTable to run as it is, instead of steps, sampler, grid, t_min, clip and denoise: one of fastdiff.plan for
                  the model's prediction, time_input and process (as its `clock`), or rows changed or written by hand

    Returns x, or a tuple x[, states][, info]. Inputs, the model's mode and every global state are left as they were.

    Raises ConfigError, ShapeError, DTypeError, DeviceError or DataError before any work, ModelOutputError on what a network
    returns, NonFiniteError on a run that leaves the finite numbers, SolverError on steps that cannot go on. The equations and
    papers are in fastdiff.samplers.
    """
    began = time.perf_counter()
    choose("check", check, loop.CHECKS)
    seed = secrets.randbits(64) if seed is None else checks.integer("seed", seed, 0, 2**64 - 1)
    first_sample = checks.integer("first_sample", first_sample, 0, 2**32 - 1)
    trajectory = checks.integer("trajectory", trajectory, 0, 10**7)
    checks.function("callback", callback)
    denoise, return_info = checks.flag("denoise", denoise), checks.flag("return_info", return_info)
    model, guidance = opened(model), _guidances(guidance)
    clamps = isinstance(clip, str)
    if clamps and (clip != "data" or not isinstance(model, ScoreModel)):
        raise ConfigError(
            f"clip must be (lo, hi), or 'data' with a ScoreModel, whose data_range it is, got {clip!r:.40}"
        )
    variance = samplers.variance_of(sampler)
    if table is not None:
        _refuse_planned(
            steps=steps,
            sampler=sampler,
            grid=grid,
            t_min=t_min,
            clip=None if clamps else clip,
            denoise=None if denoise else False,
        )
        learned = any(row.log_variance is not None for row in getattr(table, "rows", ()))
        variance = "learned_range" if learned else None
    model = as_model(model, sde, shape, prediction, time_input, variance)
    count = _held(model, x_init, cond) if num_samples is None else num_samples
    num_samples = checks.integer("num_samples", count, 0, 2**32 - first_sample)
    batch = max(num_samples, 1) if batch_size is None else checks.integer("batch_size", batch_size, 1, 2**32)
    pair = None if clip is None or clamps else _in_network_units(model, checks.pair("clip", clip))
    callback = _in_data_units(model, callback)
    if math.prod((num_samples, *model.data_shape)) >= 2**48:
        raise ConfigError(
            f"num_samples={num_samples} of shape {model.data_shape} need more than 2**48 numbers: ask for fewer"
        )
    dtype, state_dtype = _dtypes(dtype, x_init)
    place, unguided, changes, guide = device_of(device, x_init, model.net), model, None, None
    if table is None:
        process, solver = _process_and_sampler(model, sde, steps, sampler)
    if guidance is not None and not isinstance(guidance, OwnSteps):
        setting = Setting(model, num_samples, state_dtype, place, seed, first_sample, cond, batch)
        fixed = table is not None or not isinstance(solver, (samplers.Adaptive, samplers.AdaptiveSDE))
        model, cond, bound, guide = guided(guidance, setting, rows=fixed)
        changes = state_changes(bound)
    if table is not None:
        check_path(sde, model.process)
        table = check_table(table, model.prediction, model.time_input, model.process)
    if model.network_range is not None and x_init is None and table is None:
        low, high = model.network_range
        spread = (high - low) / 8 if t_min is None and (grid is None or isinstance(grid, str)) else None
        said = misfit(process, max(abs(low), abs(high)), spread)
        if said is not None:
            warn(said)
    # made, and so its tensors looked at, once the rest is known to be right
    request = functools.partial(
        Request, model, num_samples, seed, first_sample, cond, x_init, state_dtype, place, backend, engine, check, guide=guide
    )  # fmt: skip
    if isinstance(guidance, OwnSteps):
        refused = {"x_init": x_init, "noise": noise, "callback": callback, "table": table, "clip": pair}
        _refuse_own(guidance, **refused, trajectory=trajectory or None)
        if sampler is None:
            solver = samplers.get(guidance.sampler, process)
        if isinstance(solver, (samplers.Adaptive, samplers.AdaptiveSDE)):
            raise ConfigError(
                f"sampler {solver.name!r} chooses its steps, and inverse.{type(guidance).__name__} has its own at the levels "
                "of a fixed one's: leave it out, or use 'ancestral'"
            )
        chain = process.discrete  # whose steps are its own, as a network may know no others
        if steps is None and grid is None:
            steps = min(guidance.steps, int(process.T)) if chain else guidance.steps
        table = make_table(
            process, solver, steps, prediction="x0", time_input="t", clock=model.process,
            grid=guidance.grid if grid is None and not chain else grid, t_min=t_min, denoise=denoise,
        )  # fmt: skip
        ran = request().resolve("the method has steps of its own")
        setting = Setting(model, num_samples, state_dtype, place, seed, first_sample, cond)
        at_once = max(batch, PARTICLES) if batch_size is None else batch
        own = Steps(setting, table, ops.backend_module(ran[0]), at_once, progress, check)
        with torch.no_grad():
            drawn = guidance.run(own) if num_samples else Drawn(own.start(0, first_sample), 0)
        result = Result(drawn.x, None, drawn.calls, *ops.ran(place, *ran), table, effective=drawn.effective)
    elif table is None and isinstance(solver, (samplers.Adaptive, samplers.AdaptiveSDE)):
        if changes is not None:
            raise ConfigError(
                f"guidance changes the state after each row, and sampler {solver.name!r} has none: use one of fixed steps, or "
                "inverse.MMPS"
            )
        _refuse_fixed(solver, steps=steps, grid=grid, clip=pair, noise=noise, callback=callback)
        start, end = adaptive_span(unguided, sde, t_min, solver)
        result = run_adaptive(
            request(),
            solver,
            start,
            end,
            batch=batch,
            trajectory=trajectory,
            progress=progress,
            denoise=denoise,
        )
    else:
        if table is None:
            table = make_table(
                process, solver, steps, prediction=model.prediction, time_input=model.time_input, clock=model.process, grid=grid,
                t_min=t_min, clip=pair, denoise=denoise,
            )  # fmt: skip
        table = table if changes is None else changes.retabled(table)
        result = run_table(
            request(), table, noise=noise, batch=batch, trajectory=trajectory, callback=callback, progress=progress,
            changes=changes,
        )  # fmt: skip
    x = model.in_data_units(result.x)
    if check != "off" and (clamps or (t_min is None and model.range_given)):
        left = 0.0 if result.table is None else 5 * result.table.end.sigma
        free = x if changes is None or changes.known is None else x[~changes.known[1]]
        far = model.outside(free, left if model.standardize is None else left * float(model.standardize[1].max()))
        low, high = model.data_range
        cut = clamps and float(((free < 2 * low - high) | (free > 2 * high - low)).float().mean())
        if far is not None and (not clamps or cut > MUCH):
            share = f"clip='data' cut samples, {cut:.0%} of their numbers from far outside: they ran"
            what = share if clamps else "the samples run"
            holds = table is not None and pair is None and model.standardize is None
            held = f"clip=({low:g}, {high:g}), which holds each step's prediction there, " if holds else ""
            way = "or more steps" if clamps else "more steps, or clip='data'"
            warn(f"{what} {far}: take {held}another sampler or grid, {way}")
    if clamps:
        x = x.clamp(*model.data_range)
    x = x if changes is None else changes.finish(x)
    x = _narrowed(x, dtype, check)
    x = _like_start(x, x_init)
    if result.states is None and not return_info:
        return x
    info = SampleInfo(
        seed, result.calls, 0 if result.table is None else len(result.table), time.perf_counter() - began, result.backend,
        result.engine, result.why, result.table, result.nfe, result.effective,
    )  # fmt: skip
    states = [] if result.states is None else [_narrowed(model.in_data_units(result.states), dtype, check)]
    return (x, *states, *([info] if return_info else []))


@leaves_no_trace
def inpaint(
    model: Any, known: Tensor, mask: Tensor | None = None, sde: Any = None, steps: int | None = None, *,
    method: Any = "mmps", **options: Any,
) -> Any:  # fmt: skip
    """Samples of which a part is known, [num_samples, *shape]: the data themselves there, and drawn given them elsewhere.

    known    [*shape], for all samples, or [num_samples, *shape], which then is the default of num_samples; in the units of the
             samples. What it holds where it is not known, NaN included, is not looked at
    mask     True, or 1, where known is known; it may broadcast, such as [1, H, W], and differ between samples. None: where known
             is not NaN
    method   a name ("mmps" "replacement" "repaint" "tmpd" "pigdm" "diffpir" "dps" "ilvr" "noised" "score_ald" "ddrm" "daps"
             "smc"), or a function of an inverse.Problem that gives a guidance, as lambda problem: inverse.MMPS(problem, 3). The
             default is the one whose samples are those of p(x0 | known) where the prior is Gaussian, and near them elsewhere; it
             takes products with the network's Jacobian. "replacement" takes one call a step, and misses how what is known bears
             on the rest; "repaint" mends most of that with ten times the calls (docs/inpainting.md compares them)
    options  those of fastdiff.sample, and sde and steps, see there. Where neither sampler, grid nor table is given: ancestral
             steps, 100 unless steps says how many, evenly spaced in the logarithm of the noise ratio or, on a chain, in its steps
    """
    model = opened(model)
    of = _described(model, sde, options)
    count = _count(options, known, of)
    task = inpainting(known, mask, of.data_shape, count, device_of(options.get("device"), None, of.net), method)
    shown = task.finish(torch.zeros((), dtype=known.dtype, device=known.device).expand(count, *of.data_shape))
    if not isinstance(task.guidance, Replacement):  # which looks itself
        of.look_at_units("known", shown)
    return _finished(task, posterior(model, task.guidance, sde, steps, num_samples=count, **options))


@leaves_no_trace
def colorize(
    model: Any, gray: Tensor, sde: Any = None, steps: int | None = None, *, method: Any = "mmps",
    weights: Sequence[float] | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Samples [num_samples, C, *] whose grey values are known: the mean of their channels is `gray`, but for rounding.

    gray     [1, *] or [*], for all samples, or [num_samples, 1, *], which then is the default of num_samples; in the units of
             the samples
    weights  of the channels in the mean, of sum 1, such as (0.299, 0.587, 0.114); None: equal ones, as in the orthonormal matrix
             of Song et al. 2021, App. I.3, whose method this is with method="replacement"
    method, options  as in fastdiff.inpaint
    """
    model = opened(model)
    of = _described(model, sde, options)
    task = colorization(gray, weights, of.data_shape, method)
    count = _count(options, gray, of)
    of.look_at_units("gray", gray)
    return _finished(task, posterior(model, task.guidance, sde, steps, num_samples=count, **options))


def posterior(model: Any, method: Any, sde: Any = None, steps: int | None = None, **options: Any) -> Any:
    """sample() guided by a method, after the guidance of the options; by ancestral steps, 100 unless `steps` says how many, where
    these say nothing of sampler, grid or table."""
    own = options.pop("guidance", None)
    if own is not None and isinstance(method, OwnSteps):
        raise ConfigError(
            f"guidance has no place beside inverse.{type(method).__name__}, which has steps of its own: leave it out, or use "
            "method='mmps'"
        )
    guidance = method if own is None else [*(own if isinstance(own, (list, tuple)) else [own]), method]
    named = any(options.get(name) is not None for name in ("sampler", "grid", "table"))
    if not named and not isinstance(method, OwnSteps):
        process = _described(model, sde, options).process
        chain = process.discrete or sde not in (None, process, process.name)
        options |= {"sampler": "ancestral", "grid": None if chain else "logsnr"}
        steps = steps if steps is not None else min(100, int(process.T)) if process.discrete else 100
    return sample(model, sde, steps, guidance=guidance, **options)


def _described(model: Any, sde: Any, options: dict[str, Any]) -> ScoreModel:
    return as_model(model, sde, *(options.get(name) for name in ("shape", "prediction", "time_input")))


def _count(options: dict[str, Any], given: Any, model: ScoreModel) -> int:
    """num_samples, by default as many as are given."""
    several = isinstance(given, Tensor) and given.ndim == len(model.data_shape) + 1
    count = options.pop("num_samples", None)
    if count is None:
        count = _held(model, given if several else options.get("x_init"), options.get("cond"))
    return checks.integer("num_samples", count, 0, 2**32)


def _finished(task: Task, drawn: Any) -> Any:
    """What `sample` has returned, its samples finished."""
    return (task.finish(drawn[0]), *drawn[1:]) if isinstance(drawn, tuple) else task.finish(drawn)


def _guidances(guidance: Any) -> Any:
    """Numbers as classifier-free guidance of that scale, and a method with steps of its own in a list of itself as that;
    ConfigError where one is beside another."""
    several = isinstance(guidance, (list, tuple))
    each = list(guidance) if several else [guidance]
    for k, one in enumerate(each):
        if isinstance(one, numbers.Real) and not isinstance(one, bool):
            each[k] = ClassifierFree(checks.number("guidance", one))
    own = next((one for one in each if isinstance(one, OwnSteps)), None)
    if own is not None and len(each) > 1:
        raise ConfigError(
            f"guidance has inverse.{type(own).__name__}, which has steps of its own, beside others: give it alone"
        )
    return each if several and own is None else each[0]


def _refuse_own(method: OwnSteps, **given: Any) -> None:
    """Refuse what a method with steps of its own has no place for."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"{name} has no place in inverse.{type(method).__name__}, which has steps of its own: leave it out"
            )


def _process_and_sampler(
    model: ScoreModel, sde: Any, steps: int | None, sampler: Any
) -> tuple[processes.Process, samplers.Sampler]:
    """The process to run on the model's path, by the rules of `sample`'s `sde`, and the sampler."""
    process = model.process
    check_path(sde, process)
    name = sde if isinstance(sde, str) and sde != process.name else None
    if isinstance(sde, processes.Process):
        process = sde
    solver = samplers.get(sampler, process if name is None else processes.get(name))
    if isinstance(solver, (samplers.Adaptive, samplers.AdaptiveSDE)):
        return model.process, solver
    if name is not None:
        count = (
            solver.default_steps(process, process.t_min)
            if steps is None
            else checks.integer("steps", steps, 1, MAX_STEPS)
        )
        # a ladder has the sampler's own levels; a chain is fine enough for every step to be one of its own
        levels = solver.intervals(process, count) + 1 if processes.get(name).ladder else max(count, 1000)
        process = chains.chain_on(process, name, levels)
    return process, solver if model.variance is None else samplers.with_variance(solver, model.variance)


def _refuse_planned(**options: Any) -> None:
    """Refuse what a table has said already."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"{name}={value!r:.40} contradicts table, whose rows are run as they are: give it to plan"
            )


def _in_network_units(model: ScoreModel, clip: tuple[float, float]) -> tuple[float, float]:
    """A range in the data's units, in the network's."""
    if model.standardize is None:
        return clip
    low, high = ((end - model.standardize[0]) / model.standardize[1] for end in clip)
    if low.min() != low.max() or high.min() != high.max():
        raise ConfigError(
            f"clip={clip!r:.40} is another range for each of the features that the model standardizes: use clip='data'"
        )
    return float(low.min()), float(high.max())


def _in_data_units(model: ScoreModel, callback: Callable[[int, float, Tensor], object] | None) -> Any:
    if model.standardize is None or callback is None:
        return callback
    return lambda row, t, x: callback(row, t, model.in_data_units(x))


def _refuse_fixed(solver: samplers.Sampler, **fixed: Any) -> None:
    """Refuse what only samplers of fixed steps take."""
    ways_out = {"steps": ", its rtol and atol say how finely", "callback": ", or ask for a trajectory"}
    for name, value in fixed.items():
        if value is not None:
            raise ConfigError(
                f"{name} belongs to samplers of fixed steps, and {solver.name!r} chooses its steps: leave it out"
                + ways_out.get(name, "")
            )


def _held(model: ScoreModel, x_init: Any, cond: Any) -> int:
    """How many samples a start, labels or conditions of a known shape are of, else 16."""
    given = [(x_init, len(model.data_shape))]
    for value in cond.values() if isinstance(cond, dict) else [cond]:
        labels = isinstance(value, Tensor) and not value.is_floating_point() and value.ndim == 1
        if labels or model.cond_shape is not None:
            given.append((value, 0 if labels else len(model.cond_shape or ())))
    return next((len(value) for value, axes in given if isinstance(value, Tensor) and value.ndim == axes + 1), 16)


def _dtypes(dtype: torch.dtype | None, x_init: Any) -> tuple[torch.dtype, torch.dtype]:
    """The result's dtype and the state's."""
    if x_init is not None:
        tensor_checks.check_floating("x_init", x_init)
    result = dtype if dtype is not None else torch.float32 if x_init is None else x_init.dtype
    if not any(result is known for known in tensor_checks.DTYPES):
        raise DTypeError(f"dtype must be torch.float16, bfloat16, float32 or float64, got {short(dtype)}")
    return result, torch.float64 if result == torch.float64 else torch.float32


def _narrowed(x: Tensor, dtype: torch.dtype, check: str) -> Tensor:
    """x in the result's dtype, which must be able to hold it."""
    narrow = x.to(dtype)
    if dtype != x.dtype and check != "off" and not bool(narrow.isfinite().all()):
        raise DataError(f"dtype={dtype} cannot hold samples as large as {x.abs().max():.3g}: ask for torch.float32")
    return narrow


def _like_start(x: Tensor, x_init: Tensor | None) -> Tensor:
    """The result in the start's memory format, if that is channels-last."""
    wanted = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if x_init is None or wanted is None or x_init.is_contiguous():
        return x
    return x.contiguous(memory_format=wanted) if x_init.is_contiguous(memory_format=wanted) else x
