"""sample(): names become objects, objects a table, the table a run."""

from __future__ import annotations

import contextlib
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import grids, ops, processes, runner, samplers
from .errors import ConfigError, DataError, DeviceError, DTypeError, ShapeError, choose
from .model import ScoreModel, call, check_output, check_same_device, single_tensor
from .ops import check_integer, check_shape
from .plan import check_steps, default_time_input, plan
from .reference import noise as fdn1
from .table import StepTable

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class SampleInfo:
    """What a run was: the seed that repeats it, its network calls and rows, its time, what ran it and why."""

    seed: int
    network_calls: int
    rows: int
    seconds: float
    backend: str
    engine: str
    why: str
    table: StepTable


def sample(
    model: Any,
    sde: Any = None,
    steps: int | None = None,
    *,
    sampler: Any = None,
    num_samples: int = 16,
    shape: Sequence[int] | None = None,
    prediction: str | None = None,
    time_input: str | None = None,
    cond: Any = None,
    seed: int | None = 0,
    first_sample: int = 0,
    batch_size: int | None = None,
    x_init: Tensor | None = None,
    noise: Tensor | Callable[[int], Tensor] | None = None,
    grid: Any = None,
    t_min: float | None = None,
    clip: tuple[float, float] | None = None,
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
) -> Any:
    """Draw samples [num_samples, *shape] from a score-based model, in the units of its `data_range` (not clamped to it).

    model         a ScoreModel, or any callable (x [B, *shape], t [B]) -> [B, *shape]: then `sde` and `shape` are needed,
                  `prediction` is "score" and t the process time unless said otherwise
    sde           "ve", "vp", "subvp", "ddpm", "ncsn", "edm", "ou" or a process; default the model's own. A discrete
                  chain whose levels lie on the model's path (DDPM on VP, NCSN on VE) runs on it
    steps         predictor steps (annealed Langevin: levels × steps per level); default 1000, all steps of a chain, or
                  what an explicit grid says
    sampler       a name or an object of fastdiff.samplers; default the process's own
    seed          0 … 2**64 − 1, None for a fresh one (`return_info` tells it). Sample i is a function of (seed,
                  first_sample + i) alone: the same bits for any batch_size, machine or thread count
    batch_size    samples in one network call; None: all
    x_init, noise the start [num_samples, *shape]; the noise [rows, num_samples, *shape], or a callable row -> [num_samples,
                  *shape] that is called once for each row that draws, in order
    grid, t_min   where the steps stand and end: "uniform" "quadratic" "logsnr" "karras" "trained" "score_sde", decreasing
                  times, or fastdiff.grids.sigmas([...])
    clip          (lo, hi) for the predicted x0
    denoise       leave out the last predictor row's noise; annealed Langevin adds x + σ² score
    cond          a tensor or a dict of tensors with a leading num_samples axis, passed to the model
    dtype         of the result; the run is float32, or float64 when that is asked for
    check         "final", "every" row or "off": where a run that is not finite is refused with NonFiniteError
    callback      (row, t, x) after each row, once for each batch; x is a copy, t its process time
    trajectory    k > 0 adds k states [k, num_samples, *shape], evenly spaced from the start to the end
    return_info   adds a SampleInfo

    Returns x, or a tuple x[, states][, info]. Inputs, the model's mode and every global state are left as they were.
    """
    began = time.perf_counter()
    choose("check", check, runner.CHECKS)
    if guidance is not None:
        raise ConfigError("guidance is not built in this version: wrap the model instead, or leave guidance=None")
    used_backend, used_engine, why = ops.resolve(backend, engine)
    seed = secrets.randbits(64) if seed is None else check_integer("seed", seed, 0, 2**64 - 1)
    first_sample = check_integer("first_sample", first_sample, 0, 2**32 - 1)
    num_samples = check_integer("num_samples", num_samples, 0, 2**32 - first_sample)
    batch = num_samples if batch_size is None else check_integer("batch_size", batch_size, 1, 2**32)
    trajectory = check_integer("trajectory", trajectory, 0, 10**7)

    subject = _subject(model, sde, shape, prediction, time_input)
    table, own_steps = _table(subject, sde, steps, sampler, grid, t_min, clip, denoise)
    if table.couples_batch and batch < num_samples:
        raise ConfigError(
            f"batch_size={batch} < num_samples={num_samples} would change the samples: norm='batch' takes its step from "
            "the whole batch; use norm='sample', corrector='ald' or one batch"
        )
    dtype, state_dtype = _dtypes(dtype, x_init)
    place = _place(device, x_init, subject.net)
    full = (num_samples, *subject.shape)
    if x_init is not None:
        _check_tensor("x_init", x_init, full, place, check)
    if isinstance(noise, Tensor):
        _check_tensor("noise", noise, (len(table), *full), place, check)
    elif noise is not None and not callable(noise):
        raise DTypeError(f"noise must be a tensor or a callable row -> tensor, got {type(noise).__name__}")
    _check_cond(cond, num_samples, place, check)

    result = torch.empty(full, dtype=state_dtype, device=place)
    states = torch.empty((trajectory, *full), dtype=state_dtype, device=place) if trajectory else None
    if result.numel():
        run = _Run(subject, table, seed, first_sample, noise, cond, x_init, state_dtype, place, check, full)
        keep = _kept_rows(trajectory, len(table))
        lockstep = callable(noise)  # a noise callable is asked once a row, so all batches walk the rows together
        bounds = [(lo, min(lo + batch, num_samples)) for lo in range(0, num_samples, batch)]
        groups = [bounds] if lockstep else [[bound] for bound in bounds]
        with _quiet(subject.net), torch.no_grad(), _bar(progress, len(table) * len(bounds), own_steps) as bar:
            for group in groups:
                chains = [run.chain(lo, hi) for lo, hi in group]
                for k, states_now in enumerate(zip(*chains), start=-1):
                    for (lo, hi), x in zip(group, states_now):
                        if states is not None:
                            for slot in keep.get(k, ()):
                                states[slot, lo:hi] = x
                        if k >= 0 and callback is not None:
                            following = table.rows[k + 1].level if k + 1 < len(table) else table.end
                            callback(k, following.t, x.clone())
                        if k == len(table) - 1:
                            result[lo:hi] = x
                    if k >= 0:
                        bar.update(len(group))
    x = _like_input(result.to(dtype), x_init)
    if states is None and not return_info:
        return x
    info = SampleInfo(
        seed, table.calls * -(-num_samples // max(batch, 1)) if result.numel() else 0, len(table),
        time.perf_counter() - began, used_backend, used_engine, why, table,
    )  # fmt: skip
    return (x, *([] if states is None else [states.to(dtype)]), *([info] if return_info else []))


@dataclass(frozen=True)
class _Subject:
    """A network and what its numbers mean, whether a ScoreModel said so or the caller did."""

    net: Any
    process: processes.Process
    prediction: str
    time_input: str
    shape: tuple[int, ...]
    variance: str | None


def _subject(model: Any, sde: Any, shape: Any, prediction: str | None, time_input: str | None) -> _Subject:
    if isinstance(model, ScoreModel):
        own = {"prediction": model.prediction, "time_input": model.time_input, "shape": model.data_shape}
        given = {"prediction": prediction, "time_input": time_input, "shape": shape and check_shape(shape)}
        for name, value in given.items():
            if value is not None and value != own[name]:
                raise ConfigError(f"{name}={value!r} contradicts the model's own {own[name]!r}: leave it out")
        return _Subject(
            model.net, model.process, model.prediction, model.time_input, model.data_shape, model.variance
        )
    if not callable(model):
        raise ConfigError(f"model must be a ScoreModel or a callable (x, t) -> tensor, got {type(model).__name__}")
    if sde is None:
        raise ConfigError(f"sde must be given with a plain callable: one of {', '.join(processes.PROCESSES)}")
    if shape is None:
        raise ConfigError("shape must be given with a plain callable: one sample's shape, such as shape=(2,)")
    kind = prediction or "score"
    return _Subject(
        model, processes.get(sde), kind, time_input or default_time_input(kind), check_shape(shape), None
    )


def _table(
    subject: _Subject, sde: Any, steps: int | None, sampler: Any, grid: Any, t_min: Any, clip: Any, denoise: bool
) -> tuple[StepTable, str]:
    """The plan of the run, and a short name for its progress bar."""
    process, chosen = _process_and_sampler(subject, sde, steps, sampler)
    if isinstance(chosen, samplers.Ancestral) and chosen.variance is None and subject.variance is not None:
        chosen = replace(chosen, variance=subject.variance)
    table = plan(
        process, steps, sampler=chosen, prediction=subject.prediction, grid=grid, t_min=t_min, clip=clip,
        denoise=denoise, time_input=subject.time_input, clock=subject.process,
    )  # fmt: skip
    return table, f"{process.name} {chosen.name}"


def _process_and_sampler(
    subject: _Subject, sde: Any, steps: int | None, sampler: Any
) -> tuple[processes.Process, samplers.Sampler]:
    """The process to run on the model's path, by the rules of `sample`'s `sde`."""
    own = subject.process
    process = own if sde is None or sde == own.name else sde
    if isinstance(process, str):
        choose("sde", process, processes.PROCESSES)
        trial = samplers.get(sampler, processes.get(process))
        count = trial.default_steps(own) if steps is None else check_steps(steps)
        if process == "ncsn":
            # a ladder of the model's own range; a sampler of plain steps descends one level a step
            count = trial.intervals(own, count) + 1
        process = grids.chain_on(own, process, count if process == "ncsn" else max(count, 1000))
    elif not isinstance(process, processes.Process):
        raise ConfigError(f"sde must be a name or a process such as fastdiff.VP(), got {type(process).__name__}")
    if process != own and not _same_path(process, own):
        raise ConfigError(
            f"sde={process!r:.60} is not the process of this model, {own!r:.60}: leave sde out, or use sde={own.name!r}"
        )
    return process, samplers.get(sampler, process)


def _same_path(process: processes.Process, own: processes.Process) -> bool:
    """Whether `process` is a chain of levels of `own`: as made by grids.chain_on, or by chance."""
    return grids.on_path(process, own)


@dataclass(frozen=True)
class _Run:
    """All that the batches of one run share."""

    subject: _Subject
    table: StepTable
    seed: int
    first_sample: int
    noise: Tensor | Callable[[int], Tensor] | None
    cond: Any
    x_init: Tensor | None
    dtype: torch.dtype
    device: torch.device
    check: str
    full: tuple[int, ...]

    def __post_init__(self) -> None:
        times = torch.from_numpy(self.table.columns["time"])
        index = self.subject.time_input == "index"
        times = times.nan_to_num().round().to(torch.int64) if index else times.to(self.dtype)
        variance = "learned_range" if self.table.learned_variance else self.subject.variance
        parameter = next((p for p in _parameters(self.subject.net) if p.is_floating_point()), None)
        object.__setattr__(self, "times", times.to(self.device))
        object.__setattr__(self, "variance", variance)
        object.__setattr__(self, "net_dtype", self.dtype if parameter is None else parameter.dtype)
        object.__setattr__(self, "asked", {})

    def chain(self, lo: int, hi: int) -> Iterator[Tensor]:
        """The states of samples lo … hi−1: the start, then one after each row."""
        shape, count, first = self.full[1:], hi - lo, self.first_sample + lo
        if self.x_init is not None:
            x = self.x_init[lo:hi].detach().to(self.dtype).contiguous()
        else:
            x = fdn1.normal(count, shape, seed=self.seed, first_sample=first, device=self.device, stream=fdn1.PRIOR)
            x = ops.step(x.to(self.dtype), a=self.table.prior_std)
        yield x
        cond = _slice(self.cond, lo, hi)

        def network(k: int, x_in: Tensor) -> tuple[Tensor, Tensor | None]:
            times = self.times[k].expand(count).clone()  # type: ignore[attr-defined]
            given = x_in.to(self.net_dtype)  # type: ignore[attr-defined]
            output = single_tensor(call(self.subject.net, given, times, cond)).detach()
            m, v = check_output(output, given, self.variance)  # type: ignore[attr-defined]
            # fastdiff's own copy: a network may hand out the same buffer again
            return m.to(self.dtype, copy=True), None if v is None else v.to(self.dtype, copy=True)

        yield from runner.run(self.table, network, x, lambda k: self.draw(k, lo, hi), self.check, first)

    def draw(self, k: int, lo: int, hi: int) -> Tensor:
        """The noise of row k for samples lo … hi−1."""
        if self.noise is None:
            return fdn1.normal(
                hi - lo, self.full[1:], seed=self.seed, draw=k, first_sample=self.first_sample + lo,
                stream=fdn1.SAMPLER, device=self.device,
            ).to(self.dtype)  # fmt: skip
        if isinstance(self.noise, Tensor):
            return self.noise[k, lo:hi].to(self.dtype)
        asked: dict[int, Tensor] = self.asked  # type: ignore[attr-defined]
        if k not in asked:
            given = self.noise(k)
            _check_tensor(f"noise({k})", given, self.full, self.device, self.check)
            asked.clear()
            asked[k] = given
        return asked[k][lo:hi].to(self.dtype)


def _parameters(net: Any) -> Iterator[Tensor]:
    return net.parameters() if isinstance(net, nn.Module) else iter(())


def _dtypes(dtype: torch.dtype | None, x_init: Any) -> tuple[torch.dtype, torch.dtype]:
    """The result's dtype and the state's."""
    if x_init is not None and not isinstance(x_init, Tensor):
        raise DTypeError(f"x_init must be a tensor, got {type(x_init).__name__}: use torch.as_tensor")
    if x_init is not None and x_init.dtype not in _DTYPES:
        raise DTypeError(f"x_init must be floating, float16 to float64, got {x_init.dtype}: convert it with .float()")
    asked = dtype if dtype is not None else torch.float32 if x_init is None else x_init.dtype
    if asked not in _DTYPES:
        raise DTypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype!r}")
    return asked, torch.float64 if asked == torch.float64 else torch.float32


def _place(device: Any, x_init: Tensor | None, net: Any) -> torch.device:
    """Where the run happens: what `device`, x_init and the model's parameters agree on."""
    parameter = next(_parameters(net), None)
    known = {"x_init": x_init, "the model": parameter}
    found = next((t.device for t in known.values() if t is not None), None)
    place = ops.check_device(device if device is not None else found)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    for name, tensor in known.items():
        if tensor is not None and tensor.device.type == "meta":
            raise DeviceError(f"{name} is on the meta device, which holds no data")
        if tensor is not None:
            check_same_device(name, tensor, place)
    return place


def _check_tensor(name: str, x: Any, shape: tuple[int, ...], device: torch.device, check: str) -> None:
    """A dense floating tensor of this shape on this device, finite unless `check` is off."""
    if not isinstance(x, Tensor):
        raise DTypeError(f"{name} must be a tensor, got {type(x).__name__}: use torch.as_tensor")
    if x.dtype not in _DTYPES:
        raise DTypeError(f"{name} must be floating, float16 to float64, got {x.dtype}: convert it with .float()")
    if x.layout != torch.strided or x.is_nested:
        raise ShapeError(f"{name} must be a dense strided tensor, got layout {x.layout}: use .to_dense()")
    if tuple(x.shape) != shape:
        raise ShapeError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if x.device.type == "meta":
        raise DeviceError(f"{name} is on the meta device, which holds no data")
    check_same_device(name, x, device)
    if check != "off":
        _check_finite(name, x)


def _check_finite(name: str, x: Tensor) -> None:
    """One sum; located only when that fails (a sum of large finite numbers may overflow)."""
    if x.is_floating_point() and not math.isfinite(x.detach().sum(dtype=torch.float64)):
        bad = torch.nonzero(~x.isfinite())
        if len(bad):
            index = tuple(bad[0].tolist())
            raise DataError(f"{name} must be finite, got {x[index].item()} at index {index}")


def _check_cond(cond: Any, num_samples: int, device: torch.device, check: str) -> None:
    entries = cond if isinstance(cond, dict) else {} if cond is None else {"": cond}
    for key, value in entries.items():
        name = f"cond[{key!r}]" if key else "cond"
        if not isinstance(value, Tensor):
            raise DTypeError(f"{name} must be a tensor (or cond a dict of tensors), got {type(value).__name__}")
        if value.ndim == 0 or len(value) != num_samples:
            raise ShapeError(f"{name} must have num_samples={num_samples} entries first, got shape {tuple(value.shape)}")
        check_same_device(name, value, device)
        if check != "off":
            _check_finite(name, value)


def _slice(cond: Any, lo: int, hi: int) -> Any:
    if isinstance(cond, dict):
        return {key: value[lo:hi] for key, value in cond.items()}
    return None if cond is None else cond[lo:hi]


def _kept_rows(count: int, rows: int) -> dict[int, list[int]]:
    """Which states a trajectory of `count` keeps: row number (−1 the start) -> its slots; the end is always kept."""
    kept: dict[int, list[int]] = {}
    for slot in range(count):
        k = rows - 1 if count == 1 else round(slot * rows / (count - 1)) - 1
        kept.setdefault(k, []).append(slot)
    return kept


def _like_input(x: Tensor, x_init: Tensor | None) -> Tensor:
    """The result in the start's memory format, if that is channels-last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(x.ndim)
    if x_init is None or wanted is None or x_init.is_contiguous():
        return x
    return x.contiguous(memory_format=wanted) if x_init.is_contiguous(memory_format=wanted) else x


@contextlib.contextmanager
def _quiet(net: Any) -> Iterator[None]:
    """Evaluation mode, and each submodule's own flag back afterwards."""
    modules = list(net.modules()) if isinstance(net, nn.Module) else []
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _bar(progress: bool | None, total: int, name: str) -> Any:
    from tqdm import tqdm

    shown = sys.stderr.isatty() if progress is None else progress
    return tqdm(total=total, desc=name, unit="row", disable=not shown, leave=False)
