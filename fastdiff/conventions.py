"""check(): whether a network's numbers mean what is said of it, by its denoising error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .data import Data, load_data
from .errors import ConfigError, DataError, ShapeError, names_keywords, short, warn
from .execution import ops
from .execution.calls import answer, device_of, dtype_of, moved, picked
from .execution.loop import Condition
from .execution.modes import evaluating, leaves_no_trace
from .execution.monitor import bar
from .execution.noise import PERTURBATION, permutation
from .model import ScoreModel, opened, stands_above
from .planning import coverage, predictions, processes, schedules

RATIOS = (0.1, 0.5, 2.0, 10.0)  # noise ratios σ/α asked about, times the data's deviation, where the process has them
RANGES = ((-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5), (0.0, 255.0))
FITS = 1.5  # times the error of the best linear denoiser: a trained network's is less,
FITS_AT = 2.0  # and at each level less than this
NONLINEAR = 0.95  # below it, a network knows more of the data than their mean and variance
CLEARLY = 0.85  # of the error of what was said, for each change, as more have more luck: below it another is named,
DOUBTFUL = 0.5  # or below this where it knows no more than a linear denoiser
ONE_LEVEL = 1.4  # times its error at one level alone, which names it too
SILENT = 0.9  # times the error of an output of 0: a network that says anything has less
# schedules of other lengths than 1000, by authors who leave their ends as they are
ENDS = (
    (schedules.linear, (1e-4, 0.02)),
    (schedules.quadratic, (1e-4, 0.02)),
    (schedules.scaled_linear, (0.00085, 0.012)),
)
LENGTHS = (100, 200, 500, 1000, 4000)  # of chains
ALIKE = 1.03  # times the least error: no difference, as the levels of two chains are not quite the same
# what a network raises of times that it does not know, such as a table of indices
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
ROUNDS = 3  # what is wrong in three ways is found one after the other,
BREADTH = 8  # going on from so many
VALUES = 8192  # numbers in a batch from which its error is known well enough
MOMENTS = 1024  # of the data, from which the linear denoiser is made


# (mean, std) of a sample's numbers, in order
Moments = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Convention:
    """What a network's numbers mean; each field as in ScoreModel."""

    prediction: str
    time_input: predictions.TimeInput
    data_range: tuple[float, float]
    standardize: Moments | None
    sde: processes.Process

    def __hash__(self) -> int:  # of what is short and hashes: not a process of one's own, nor a table's moments
        return hash((self.prediction, self.data_range, self.sde.name))

    def changes(self, said: Convention) -> dict[str, Any]:
        """The arguments of ScoreModel in which it differs from what was said."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in own.items() if value != getattr(said, name)}


@dataclass(frozen=True)
class Check:
    """Denoising errors, each a ratio to that of the best linear denoiser; `print` shows them.

    said       what the model says;  error  its error over all levels: their geometric mean, 1 standing for levels of others' that
               its process does not reach
    levels     noise ratios σ/α [L];  errors  of what was said there [L]
    tried      each convention with its error over all levels, the least first
    likeliest  the convention of the least error, where what was said is clearly worse; else None
    """

    said: Convention
    error: float
    levels: tuple[float, ...]
    errors: tuple[float, ...]
    tried: tuple[tuple[Convention, float], ...]
    likeliest: Convention | None

    @property
    def changes(self) -> dict[str, Any]:
        """The arguments of ScoreModel that `likeliest` changes; empty where what was said stands."""
        return {} if self.likeliest is None else self.likeliest.changes(self.said)

    @property
    def fits(self) -> bool:
        """Whether what was said can be right: nothing is clearly better, and its errors are a trained network's."""
        return self.likeliest is None and _mean(self.errors) < FITS and max(self.errors) < FITS_AT

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.likeliest is not None:
            error = dict(self.tried)[self.likeliest]
            doubt = (
                "" if error < NONLINEAR else "; as that is no better than linear, perhaps none of those that were tried"
            )
            return (
                f"likelier than what was said, of what was tried: {_shown(self.changes)}, with a denoising error of {error:.2g} "
                f"of the best linear denoiser's, where what was said has {self.error:.2g}{doubt}"
            )
        if self.fits:
            return "what was said fits, and nothing clearly better"
        if _mean(self.errors) < FITS:
            worst = max(range(len(self.errors)), key=lambda k: self.errors[k])
            return (
                f"at noise ratio {self.levels[worst]:.3g} what was said has a denoising error of {self.errors[worst]:.2g} of the "
                "best linear denoiser's, and nothing that was tried is clearly better: the network was trained on other levels "
                "or data, or not long enough"
            )
        return (
            "nothing that was tried fits: the network was trained on other data or in other units, on another process, or not "
            "long enough"
        )

    def __str__(self) -> str:
        lines = ["denoising error, as a ratio to the best linear denoiser's (of a trained network about 1 or below)"]
        lines += ["what was said, by noise ratio sigma/alpha:"]
        lines += [f"  {level:<9.3g} {error:.3g}" for level, error in zip(self.levels, self.errors)]
        lines += ["over all of them:", f"  {self.error:<9.3g} what was said"]
        # those of the same error are the same to this network, such as processes to one that is told the noise
        others = [each for each in self.tried if each[0] != self.said and abs(each[1] / self.error - 1) > 1e-6]
        lines += [f"  {error:<9.3g} {_shown(other.changes(self.said))}" for other, error in others[:8]]
        return "\n".join([*lines, self.verdict])


@stands_above
@leaves_no_trace
@names_keywords
def check(
    model: Any, data: Any, *, num_samples: int | None = None, seed: int = 0, cond: Condition = None,
    batch_size: int | None = None, progress: bool | None = None,
) -> Check:  # fmt: skip
    """Whether prediction, time_input, data_range, standardize and sde of `model` can be right, by its denoising error on data.

    At noise ratios σ/α about the data's deviation, x_t = α x_0 + σ ε is made of the data and the network asked. What it then
    says of x_0 is compared with x_0: Σ|x̂_0 − x_0|² over that of the best linear denoiser of each coordinate,

        x̂ = μ + α s² (x_t − α μ)/(α² s² + σ²),   error s² σ²/(α² s² + σ²),   of mean μ and variance s²,

    which a trained network does not exceed by much, and one that is misunderstood does by far. The same is asked of every
    other prediction, of other time inputs, units and processes, and of what follows from the best of these.

    model        a ScoreModel, or its path or name
    data         as in `train`, in the shape of the model; they stay as they are for a model with `standardize`, and vectors
                 for one without data_range
    num_samples  how many of the data, 2 or more; default enough for 8192 numbers, at least 16
    seed         of their choice and of the noise
    cond         for all of the data, where the network takes one; default the data's labels and conditions
    batch_size   samples in one network call, default chosen by size

    Asks the network some 70 times where what was said fits, else some 300 times.
    Returns a Check; warns where another convention is likelier, or none fits.
    Raises ConfigError, DataError, ShapeError before any work, and what the network raises if it answers to no convention.
    """
    model = opened(model)
    if not isinstance(model, ScoreModel):
        raise ConfigError(
            f"model must be a ScoreModel or its path, got {type(model).__name__}: fastdiff.ScoreModel(net, sde, data_shape=...)"
        )
    processes.require_linear(model.process, "a denoising error", "check() has no use for it")
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    source = load_data(data)
    if source.shape != model.data_shape:
        raise ShapeError(f"data must have the model's data_shape {model.data_shape}, got samples of {source.shape}")
    if num_samples is None:
        num_samples = max(16, -(-VALUES // math.prod(source.shape)))
    count = min(checks.integer("num_samples", num_samples, 2, 2**20), len(source))
    if not bool((source.x[1:] != source.x[:1]).any()):
        raise DataError(f"data must hold two samples or more that differ, got {len(source)} alike: give more of them")
    batch = (
        max(16, 2**22 // math.prod(source.shape))
        if batch_size is None
        else checks.integer("batch_size", batch_size, 1, 2**20)
    )
    own_units = model.standardize is not None or (len(source.shape) == 1 and not model.range_given)
    moments = None if model.standardize is None else _moments(*model.standardize)
    data_range = source.range if own_units else model.data_range
    said = Convention(model.prediction, model.time_input, data_range, moments, model.process)
    denoising = _Denoising(model, source, count, batch, seed, cond)
    with torch.no_grad(), evaluating(model.net):
        best = _search(denoising, said, progress)
    found = sorted(denoising.found.items(), key=lambda item: item[1])
    likelier = best != said and denoising.clearly_better(best, said)
    error = denoising.error(said)
    there = [(t, e) for t, e in zip(denoising.times(said), denoising.errors(said)) if not math.isnan(t)]
    levels = tuple(float(said.sde.sigma(t) / said.sde.alpha(t)) for t, _ in there)
    result = Check(said, error, levels, tuple(e for _, e in there), tuple(found), best if likelier else None)
    if not result.fits:
        warn(result.verdict)
    elif (unsuited := coverage.misfit(said.sde, *denoising.scale(said))) is not None:
        warn(unsuited)
    return result


def _search(denoising: _Denoising, said: Convention, progress: bool | None) -> Convention:
    """The best convention: of all that differ in one way from what was said, and then from the best of these."""
    asked: list[Convention] = []
    start = [said]
    for number in range(ROUNDS):
        asked += start
        new = dict.fromkeys(other for each in start for other in denoising.others(each) if other not in denoising.found)
        with bar(progress, len(new), f"check, round {number + 1} of at most {ROUNDS}", "convention") as shown:
            for other in new:
                denoising.error(other)
                shown.update()
        least = min(denoising.found.values())
        if least == math.inf and denoising.failure is not None:
            raise denoising.failure
        # of those that are alike, such as all processes to a network that is told the noise, the one nearest to what was said
        alike = [each for each, error in denoising.found.items() if error <= ALIKE * least]
        best = min(alike, key=lambda each: (*_far(each, said), denoising.found[each]))
        if best in asked and least < FITS:
            break
        # what is wrong in two ways may look no better in one: the best of each way goes on, not the best of all
        leading: dict[Any, Convention] = {}
        before = set(asked)  # the others in the order in which they were found, as some have equal errors
        found = [each for each in denoising.found if each not in before]
        for each in sorted(found, key=lambda each: denoising.found[each]):
            leading.setdefault((each.prediction == "edm", frozenset(each.changes(said))), each)
        start = sorted(leading.values(), key=lambda each: denoising.found[each])[:BREADTH]
    return best


def _far(other: Convention, said: Convention) -> tuple[int, bool, bool]:
    """In how many ways it differs, and whether in those that are less often mistaken."""
    usual = predictions.default_time_input(other.prediction, other.sde)
    return len(other.changes(said)), other.sde != said.sde, other.time_input != usual


class _Denoising:
    """Errors of conventions; those that differ in what the output means share the network's calls."""

    def __init__(self, model: ScoreModel, data: Data, count: int, batch: int, seed: int, cond: Condition) -> None:
        self.model, self.data, self.batch, self.seed = model, data, batch, seed
        # drawn, as neighbours may be alike, and every second sample of one class
        order = permutation(len(data), seed=seed, draw=0)
        self.index, self.some = order[:count], order[: max(count, MOMENTS)]
        if cond is None:
            taken = model.takes
            labels = None if taken.labels is None or taken.classes == 0 else data.labels
            cond = taken.joined(labels, data.cond if model.cond_shape else None)
        for value in cond.values() if isinstance(cond, dict) else (() if cond is None else (cond,)):
            if not isinstance(value, Tensor) or value.ndim < 1 or len(value) != len(data):
                raise ShapeError(
                    f"cond must have an entry for each of the {len(data)} data, got "
                    f"{tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}"
                )
        self.cond = model.condition(picked(cond, self.index), count, looks=True)
        self.device, self.dtype = device_of(None, None, model.net), dtype_of(model.net, torch.float32)
        self.cond = moved(self.cond, self.device)
        self.found: dict[Convention, float] = {}
        self.failure: Exception | None = None  # of what was said, if the network raised
        self._asked: dict[Convention, dict[str, tuple[list[float], list[float]]]] = {}
        self._variances: dict[Any, Tensor] = {}
        self._noise: dict[int, Tensor] = {}
        self._processes: dict[int, list[processes.Process]] = {}  # to be tried beside one, by its id
        self._known: list[processes.Process] = [model.process]
        self._possible: dict[tuple[str, Any, int], bool] = {}

    def error(self, of: Convention) -> float:
        """Over all levels."""
        if of not in self.found:
            # a process that lacks a level counts there as a linear denoiser
            self.found[of] = _mean([1.0 if math.isnan(error) else error for error in self.errors(of)])
        return self.found[of]

    def errors(self, of: Convention) -> list[float]:
        """At each of RATIOS, NaN where the process does not have it."""
        return self._answers(of)[0]

    def answers(self, of: Convention) -> bool:
        """Whether the network does more than one that returns 0, which in EDM's preconditioning is the linear denoiser."""
        errors, silent = self._answers(of)
        return _mean(errors) < SILENT * _mean(silent)

    def clearly_better(self, other: Convention, said: Convention) -> bool:
        """Whether the other is to be named: one that no trained network would have by luck."""
        both = [(a, b) for a, b in zip(self.errors(said), self.errors(other)) if not (math.isnan(a) or math.isnan(b))]
        error, least = (_mean(errors) for errors in zip(*both)) if both else (self.error(said), self.error(other))
        changed = len(other.changes(said))
        if least >= FITS or not self.answers(other):
            return False
        if least >= NONLINEAR:  # as the errors of many conventions are
            return changed == 1 and least < DOUBTFUL * error
        one_level = changed == 1 and least < error / ALIKE and any(a > ONE_LEVEL * b for a, b in both)
        return least < CLEARLY**changed * error or one_level

    def _answers(self, of: Convention) -> tuple[list[float], list[float]]:
        key = replace(of, prediction="edm" if of.prediction == "edm" else "eps")
        if key not in self._asked:
            try:
                self._asked[key] = self._ask(of)
            except REFUSALS as error:
                self.failure = self.failure or error
                self._asked[key] = {}
        return self._asked[key].get(of.prediction, ([math.inf] * len(RATIOS),) * 2)

    def times(self, of: Convention) -> list[float]:
        """Process times of RATIOS, NaN where the process does not have them, or has its only step there already."""
        t = of.sde.time(np.array(RATIOS) * math.sqrt(float(self.variances(of).mean())))
        inside = (t >= of.sde.t_noisy) & (t <= of.sde.t_start)
        if not inside.any():  # as where units are quite wrong, or a chain has one step: what is next to them
            t, inside = np.clip(t, of.sde.t_noisy, of.sde.t_start), np.full(len(t), True)
        if of.sde.discrete:
            t = np.round(t)
        inside &= np.append(True, np.diff(t) != 0)
        return np.where(inside, t, math.nan).tolist()  # type: ignore[no-any-return]

    def variances(self, of: Convention) -> Tensor:
        """Of the data's numbers, as the network sees them."""
        key = (of.data_range, of.standardize)
        if key not in self._variances:
            self._variances[key] = self.seen(self.some, of).var(0, correction=0)
        return self._variances[key]

    def scale(self, of: Convention) -> tuple[float, float]:
        """(the largest of the data's numbers, their deviation) as the network sees them."""
        return float(self.seen(self.some, of).abs().max()), math.sqrt(float(self.variances(of).mean()))

    def seen(self, index: Tensor, of: Convention) -> Tensor:
        """The data of these numbers as the network sees them, in double precision."""
        if of.standardize is None:
            return self.data.batch(index, of.data_range).double()
        mean, std = (torch.tensor(values, dtype=torch.float64).view(self.data.shape) for values in of.standardize)
        return (self.data.batch(index, self.data.range).double() - mean) / std

    def others(self, best: Convention) -> Iterator[Convention]:
        """What differs from it in one way, and can be."""
        alone: list[dict[str, Any]] = [{"prediction": name} for name in predictions.PREDICTIONS]
        alone += [{"prediction": "edm", "time_input": "c_noise"}]  # which are one convention
        # 1000 t is as 999 t to a network
        alone += [
            {"time_input": name}
            for name in predictions.TIME_INPUTS
            if name != "t*1000" or isinstance(best.sde, processes.RectifiedFlow)
        ]
        alone += [{"data_range": pair, "standardize": None} for pair in (*RANGES, self.data.range)]
        if len(self.data.shape) == 1:
            alone += [{"standardize": self.moments, "data_range": self.data.range}]
        *beside, flow = self.processes(best.sde)
        alone += [{"sde": process} for process in beside]
        alone += [{"sde": flow, "time_input": name} for name in ("t", "T-t")]  # as their authors have them
        for changes in alone:
            other = replace(best, **changes)
            if not self.can_be(other) and "sde" in changes:  # which counts its time in another way
                other = replace(other, time_input=predictions.default_time_input(other.prediction, other.sde))
            # whatever the output of these calls means
            for name in predictions.PREDICTIONS if self.can_be(other) else ():
                each = replace(other, prediction=name)
                if self.can_be(each) and (name == "edm") == (other.prediction == "edm"):
                    yield each

    def processes(self, said: processes.Process) -> list[processes.Process]:
        """Those beside it, the rectified flow last; equal ones are one object, which is kept, as conventions name them."""
        if id(said) not in self._processes:
            beside = self._processes[id(said)] = []
            for process in (*_processes(said), processes.RectifiedFlow()):
                known = next((each for each in self._known if each == process), None)
                if known is None:
                    self._known.append(process)
                beside.append(process if known is None else known)
        return self._processes[id(said)]

    def can_be(self, what: Convention) -> bool:
        """Whether the process defines the prediction and the time, which thousands of conventions ask again."""
        time_input = what.time_input if isinstance(what.time_input, str) else id(what.time_input)
        key = what.prediction, time_input, id(what.sde)
        if key not in self._possible:
            self._possible[key] = _can_be(what)
        return self._possible[key]

    @cached_property
    def moments(self) -> Moments:
        """Of the data's columns, in their own units."""
        x = self.data.batch(torch.arange(len(self.data), device="cpu"), self.data.range).double()
        std = x.std(0, correction=0)
        return _moments(x.mean(0).numpy(), torch.where(std > 0, std, 1.0).numpy())

    def _ask(self, of: Convention) -> dict[str, tuple[list[float], list[float]]]:
        """prediction -> (its error, that of an output of 0) at each level, of all predictions that share the network's input."""
        kinds = ["edm"] if of.prediction == "edm" else [name for name in predictions.PREDICTIONS if name != "edm"]
        times = self.times(of)
        levels = [k for k, time in enumerate(times) if not math.isnan(time)]
        t = torch.tensor([times[k] for k in levels], dtype=torch.float64, device=self.device)
        alpha, sigma = of.sde.alpha(t), of.sde.sigma(t)
        label = predictions.network_time(of.time_input, of.sde, t, alpha, sigma)
        label = label.round().long() if of.time_input == "index" else label.to(self.dtype)
        scale = predictions.input_scale(of.prediction, of.sde, alpha, sigma).tolist()
        weights = {}  # of x and of the output in x̂0
        for kind in kinds:
            try:
                source = predictions.coordinates(kind, of.sde, t, alpha, sigma)
            except ConfigError:  # of chains alone
                continue
            p, q = predictions.convert(source, (1.0, 0.0), alpha, sigma)
            weights[kind] = p.tolist(), q.tolist()
        found: dict[str, tuple[list[float], list[float]]] = {
            kind: ([math.nan] * len(times), [math.nan] * len(times)) for kind in weights
        }
        x0 = self.seen(self.index, of).to(self.device, self.dtype)
        exact, variances = x0.double(), self.variances(of)
        for j, (k, a, s) in enumerate(zip(levels, alpha.tolist(), sigma.tolist())):
            x = a * x0 + s * self.noise(k, x0.shape)
            output, x = self._output(scale[j] * x, label[j]).double(), x.double()
            linear = float((variances * s**2 / (a**2 * variances + s**2)).mean())
            for kind, (p, q) in weights.items():
                silent = p[j] * x - exact
                for errors, off in zip(found[kind], (silent + q[j] * output, silent)):
                    errors[k] = float(off.square().mean()) / linear if linear > 0 else math.inf
        return found

    def noise(self, level: int, shape: Sequence[int]) -> Tensor:
        """The same for all conventions."""
        if level not in self._noise:
            z = ops.normal(shape[0], shape[1:], seed=self.seed, draw=level, stream=PERTURBATION, device=self.device)
            self._noise[level] = z.to(self.dtype)
        return self._noise[level]

    def _output(self, x: Tensor, label: Tensor) -> Tensor:
        """The network's at one level, as networks that look at one time of a call are asked by a sampler."""
        labels = label.expand(len(x))
        return torch.cat([
            answer(self.model.net, self.model.variance, x[part], labels[part], None, picked(self.cond, part))[0]
            for part in (slice(k, k + self.batch) for k in range(0, len(x), self.batch))
        ])  # fmt: skip


def _mean(errors: Sequence[float]) -> float:
    """Geometric, so that no level stands for all, of those that are not NaN; infinite where none is."""
    there = [error for error in errors if not math.isnan(error)]
    if not there or not all(map(math.isfinite, there)):
        return math.inf
    return math.exp(sum(math.log(max(error, 1e-12)) for error in there) / len(there))


def _processes(said: processes.Process) -> Iterator[processes.Process]:
    """fastdiff's own, and for a chain those of other schedules and lengths, their ends times 1000/T or as they are."""
    yield from (processes.get(name) for name in ("vp", "ve", "subvp", "edm", "ddpm", "rectified_flow"))
    if said.discrete and not said.ladder:
        for steps in {int(said.T), *LENGTHS}:
            for name in schedules.BETAS if steps == said.T else ("linear", "cosine"):
                try:
                    yield processes.DDPM(name, T=steps)
                except ConfigError:  # a schedule that has no so few steps
                    continue
            for make, ends in ENDS if steps == said.T else ENDS[:1]:
                if steps != 1000:
                    yield processes.DDPM(make(steps, *ends))


def _moments(mean: Any, std: Any) -> Moments:
    return tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())


def _can_be(what: Convention) -> bool:
    try:
        with np.errstate(all="ignore"):  # of predictions that are infinite where α is 0
            predictions.check(what.prediction, what.time_input, what.sde)
    except ConfigError:
        return False
    return True


def _shown(changes: dict[str, Any]) -> str:
    """As they are written in a call."""
    shown = {name: short(value, 60) for name, value in changes.items()}
    if "sde" in changes:
        shown["sde"] = _written(changes["sde"])
    if shown.get("standardize", "None") != "None":
        shown["standardize"] = "(mean, std) of the data"
        shown.pop("data_range", None)  # which is then without meaning
    return ", ".join(f"{name}={value}" for name, value in shown.items())


def _written(process: processes.Process) -> str:
    if process == processes.PROCESSES.get(process.name, type(process))():
        return repr(process.name)
    for make, ends in ENDS if isinstance(process, processes.DDPM) else ():
        if process == processes.DDPM(make(int(process.T), *ends)):
            return f"DDPM(schedules.{make.__name__}({process.T}, {ends[0]:g}, {ends[1]:g}))"
    return short(process, 60)
