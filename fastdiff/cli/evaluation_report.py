"""`fastdiff evaluate`: samples beside data, and data beside as many other data, by every metric; the table and its file."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks, files
from ..data import Data
from ..errors import ConfigError, DataError, ShapeError, choose
from ..execution.calls import device_of, moved
from ..metrics import Estimate, c2st, classifier, frechet, kernel, nearest, precision_recall, sliced_wasserstein
from ..metrics.features import Features, Rows, compared, rows_of, samples
from ..model import ScoreModel
from ..sampling import sample
from .likelihood_report import check_own_units, conditions_of


def _neighbours(x: Tensor, training: Tensor) -> dict[str, float]:
    found = nearest(x, training)
    return {"nearest (median)": float(found.distances.median()), "memorized (share)": found.memorized}


# of features of samples, of as many data, and of the training data
METRICS: dict[str, Callable[[Tensor, Tensor, Tensor], dict[str, float]]] = {
    "frechet": lambda x, y, training: {"frechet": frechet(x, y)},
    "kernel": lambda x, y, training: {"kernel": kernel(x, y)},
    "precision_recall": lambda x, y, training: precision_recall(x, y)._asdict(),
    "sliced_wasserstein": lambda x, y, training: {"sliced_wasserstein": sliced_wasserstein(x, y)},
    "nearest": lambda x, y, training: _neighbours(x, training),
    "c2st": lambda x, y, training: {"c2st": c2st(x, y)},
}
DEFAULT = (
    "frechet,kernel,precision_recall,sliced_wasserstein,nearest"  # c2st needs scikit-learn, and minutes for pictures
)


TWO_UNITS = "x and y are in two units"


@dataclass(frozen=True)
class Evaluation:
    """Each metric of the samples and of the data's other half, with what was compared; `x` and `y` are the two sets."""

    facts: dict[str, Any]
    rows: dict[str, tuple[float, float]]
    x: Tensor
    y: Tensor

    def __str__(self) -> str:
        """What was compared, then a line for each number."""
        facts = self.facts
        width = max(map(len, self.rows)) + 2
        lines = [
            f"{facts['n']} samples of {facts['samples']}, seed {facts['seed']}",
            *([facts["run"]] if facts["run"] else []),
            f"beside {facts['n']} of {facts['data']}, {facts['units']}",
            f"features: {facts['features']}, {facts['dimensions']} numbers; neighbours among {facts['training']}",
            "",
            f"{'metric':{width}}{'samples':24}{'other half of the data':24}",
        ]
        lines += [f"{name:{width}}{_shown(of_x):24}{_shown(of_data):24}" for name, (of_x, of_data) in self.rows.items()]
        return "\n".join(line.rstrip() for line in (*lines, "", f"{facts['seconds']:.1f} s"))

    def save(self, path: Path) -> None:
        """Everything as JSON; a number beside its standard error where it has one."""
        metrics = {
            name: {"samples": _entry(of_x), "data": _entry(of_data)} for name, (of_x, of_data) in self.rows.items()
        }
        with files.replacing(path) as handle:
            handle.write(json.dumps({**self.facts, "metrics": metrics}, indent=2, ensure_ascii=False).encode() + b"\n")


def _shown(value: float) -> str:
    error = f" ± {value.stderr:.2g}" if isinstance(value, Estimate) else ""
    return f"{float(value):.4g}{error}"


def _entry(value: float) -> dict[str, float]:
    return {"value": float(value), **({"stderr": value.stderr} if isinstance(value, Estimate) else {})}


def metric_names(text: str) -> list[str]:
    """The metrics of --metrics."""
    return [choose("metrics", name.strip(), METRICS) for name in text.split(",")]


def evaluate(
    source: ScoreModel | Tensor, name: str, data: Data, *, train: Data | None, num_samples: int, seed: int, metrics: list[str],
    features: Features, samples_range: tuple[float, float] | None, quantise: bool, options: dict[str, Any],
) -> Evaluation:  # fmt: skip
    """Samples of a model, or those given, beside half of the data, and the other half beside it.

    Every set has n samples, the least of `num_samples` and half of the data: most metrics change with n, and what a perfect
    model gets is the other half's. A model of classes is asked for the labels of the data that its samples stand beside.

    train    what the nearest neighbours are looked for in; default the half of the data
    options  of `fastdiff.sample`
    """
    began = time.perf_counter()
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    count = min(checks.integer("num_samples", num_samples, 1, 2**32 - 1), len(data) // 2)
    if not isinstance(source, ScoreModel):
        source = samples("samples", source)
        count = min(count, len(source))
    if train is not None and "nearest" not in metrics:
        raise ConfigError(
            f"--train is what the metric nearest looks for copies in, got --metrics {','.join(metrics)}: leave it out"
        )
    for given, whose in ((data, "data"), (train, "train")):
        shape = source.data_shape if isinstance(source, ScoreModel) else tuple(source.shape[1:])
        if given is not None and given.shape != shape:
            raise ShapeError(f"{whose} must have the samples' shape {list(shape)}, got {list(given.shape)}")
    if count < 4:
        raise DataError(f"data must be at least 8, and samples 4, to be compared, got {len(data)} and {num_samples}")
    own, unit, what = _units(source, data, samples_range)
    function, described = _features(features, data, own, unit)
    half, other = (part._part(torch.arange(count)) for part in data.split(0.5, seed))
    run = ""
    if isinstance(source, ScoreModel):
        cond = moved(conditions_of(half, source), device_of(None, None, source.net))
        x, info = sample(source, num_samples=count, seed=seed, cond=cond, return_info=True, **options)
        run = f"{options['sampler'] if info.table is None else info.table.title}: {info.network_calls} network calls"
        x = x.cpu()
    else:
        x = source[:count]
    if quantise and x.is_floating_point():
        x = own(replace(half, x=half.quantise(x, unit), labels=None, num_classes=None, class_names=(), cond=None))
    y = own(half)
    with warnings.catch_warnings():
        if isinstance(source, ScoreModel):  # whose unit is known
            warnings.filterwarnings("ignore", message=TWO_UNITS)
        u, v = compared(x, y, function, (1, 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=TWO_UNITS)  # said of the samples
        w = compared(own(other), y, function, (1, 2))[0]
        training = v if train is None else compared(own(train), y, function, (1, 2))[0]
        rows: dict[str, tuple[float, float]] = {}
        for metric in metrics:
            of_x = METRICS[metric](u, v, training)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said of the samples
                of_data = METRICS[metric](w, v, training)
            rows |= {key: (of_x[key], of_data[key]) for key in of_x}
    facts = {
        "samples": name, "data": data.explain(), "n": count, "seed": seed, "run": run, "units": what, "features": described,
        "dimensions": u.shape[1], "quantised": quantise,
        "training": f"these {count} data" if train is None else f"{len(train)} training data",
        "seconds": time.perf_counter() - began, "fastdiff": metadata.version("fastdiff"), "torch": torch.__version__,
    }  # fmt: skip
    return Evaluation(facts, rows, x, y)


def _units(
    source: ScoreModel | Tensor, data: Data, samples_range: tuple[float, float] | None
) -> tuple[Callable[[Data], Tensor], tuple[float, float], str]:
    """How data come into the samples' unit, which range stands for the data's there, and how that is said."""
    vectors = len(data.shape) == 1
    if isinstance(source, ScoreModel):
        if samples_range is not None:
            raise ConfigError("samples_range belongs to a file of samples, and a model knows its own: leave it out")
        if vectors and data.bins is None:
            check_own_units(data, source)
            return lambda part: part.batch(range(len(part)), part.range), data.range, "in their own units"
        unit = source.data_range
    elif samples_range is not None:
        unit = checks.pair("samples_range", samples_range)
    elif source.dtype == data.x.dtype and (vectors or not source.is_floating_point()):
        return lambda part: part.x, data.range, "in their own units"
    elif vectors and source.is_floating_point() and data.x.is_floating_point():
        return lambda part: part.x.to(source.dtype), data.range, "in their own units"
    else:
        raise ConfigError(
            f"samples_range=(-1, 1) must say which numbers stand for the data's range {data.range[0]:g} to {data.range[1]:g} in "
            f"samples of {source.dtype}: the model's data_range"
        )
    return lambda part: part.batch(range(len(part)), unit), unit, f"scaled to {unit[0]:g} … {unit[1]:g}"


def _features(
    features: Features, data: Data, own: Callable[[Data], Tensor], unit: tuple[float, float]
) -> tuple[Rows, str]:
    """The function of samples in their own unit, and what it is called; a classifier is trained on all of the data."""
    if features == "classifier":
        net = classifier(replace(data, x=own(data).float(), range=unit, bins=None))
        return rows_of(net), f"a classifier of {data.num_classes} classes, {net.accuracy:.1%} right on a held-out tenth"
    if not isinstance(features, str):
        return rows_of(features), f"{getattr(features, '__name__', type(features).__name__)}"
    function = rows_of(features)
    if features == "pixels":
        return function, features
    low, high = unit  # torch-fidelity's take bytes

    def of_bytes(x: Tensor) -> Tensor:
        return function(x if x.dtype == torch.uint8 else _bytes(x, low, high))

    return of_bytes, features


def _bytes(x: Tensor, low: float, high: float) -> Tensor:
    return ((x.double() - low) * (255 / (high - low))).round().clamp(0, 255).byte()


def check_drawable(shape: tuple[int, ...]) -> None:
    """Refuse samples of which --plot has no picture."""
    if len(shape) != 1 and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise ConfigError(
            f"--plot draws vectors and pictures (1 or 3, H, W), and the data are {list(shape)}: leave it out"
        )


def draw(path: Path, found: Evaluation, name: str) -> None:
    """A hundred samples beside a hundred data, or the columns of vectors."""
    from . import pictures

    groups = {name: found.x.double().numpy(), "data": found.y.double().numpy()}
    if found.x.ndim == 2:
        pictures.columns(path, groups)
        return
    low, high = float(np.min(groups["data"])), float(np.max(groups["data"]))
    pictures.beside(path, {key: pictures.unit(x[:100], (low, high)).transpose(0, 2, 3, 1) for key, x in groups.items()})
