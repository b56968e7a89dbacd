"""`fastdiff likelihood`: the log-likelihoods of data in a model's units, and their report."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from .. import checks, files
from ..errors import ConfigError, DataError, ShapeError
from ..execution.calls import device_of, moved, picked
from ..execution.loop import Condition
from ..likelihood import LogLikelihood, bits_per_dim, log_likelihood
from ..model import ScoreModel
from ..training import Data


@dataclass(frozen=True)
class Likelihood:
    """The likelihoods of the samples `indices` of a data set, in `units`; `bits` [B] is None for continuous data."""

    result: LogLikelihood
    bits: Tensor | None
    indices: range
    units: str
    accuracy: str
    seconds: float

    def __str__(self) -> str:
        """The means with their standard errors, and what they cost."""
        nats, nfe = self.result.nats, self.result.nfe
        dimension = math.prod(self.result.latent.shape[1:])
        bits = "none: the data are continuous, and bits are defined for discrete levels"
        return "\n".join(
            [
                f"samples {self.indices[0]} to {self.indices[-1]}, {self.units}",
                f"log-likelihood  {mean_and_error(nats, 2)} nats, {mean_and_error(nats / dimension, 4)} nats/dim",
                f"bits/dim        {bits if self.bits is None else mean_and_error(self.bits, 4)}",
                f"of one sample   {self.accuracy}",
                f"evaluations     {nfe.double().mean():.0f} in the mean, at most {nfe.max()}",
                f"seconds         {self.seconds:.1f}",
            ]
        )

    def save(self, path: Path) -> None:
        """Every sample's numbers as arrays: nats, stderr, latent, nfe, and bits_per_dim of discrete data."""
        arrays = {name: getattr(self.result, name).numpy() for name in ("nats", "stderr", "latent", "nfe")}
        if self.bits is not None:
            arrays["bits_per_dim"] = self.bits.numpy()
        with files.replacing(path) as handle:
            np.savez(handle, **arrays)


def likelihood(
    model: ScoreModel, data: Data, num_samples: int, *, first_sample: int, seed: int, trace: str, probes: int,
    cond: Condition = None, **options: Any,
) -> Likelihood:  # fmt: skip
    """log p of at most `num_samples` of the data, from index `first_sample` on; the noise of sample i is that of (seed, i).

    cond  an entry for each of the data; default the labels and conditions, for a model that was trained with them
    """
    began = time.perf_counter()
    if data.shape != model.data_shape:
        raise ShapeError(
            f"data must have the model's shape {list(model.data_shape)}, got {list(data.shape)}: give data of the shape that "
            "it was trained on"
        )
    first = checks.integer("first_sample", first_sample, 0, len(data) - 1)
    indices = range(first, first + min(checks.integer("num_samples", num_samples, 1, 2**32 - 1), len(data) - first))
    x, units = _in_model_units(data, model, indices, checks.integer("seed", seed, 0, 2**64 - 1))
    device = device_of(None, None, model.net)
    if cond is None:
        cond = conditions_of(data, model)
    for value in cond.values() if isinstance(cond, dict) else () if cond is None else (cond,):
        if value.ndim == 0 or len(value) != len(data):
            raise ShapeError(
                f"--cond must have {len(data)} entries, one for each of the data, got shape {tuple(value.shape)}"
            )
    cond = moved(picked(cond, slice(indices.start, indices.stop)), device)
    result = log_likelihood(
        model, x.to(device), trace=trace, probes=probes, cond=cond, seed=seed, first_sample=first, **options
    )
    result = LogLikelihood(**{each.name: getattr(result, each.name).cpu() for each in fields(LogLikelihood)})
    bits = None if data.bins is None else bits_per_dim(result, model.data_range, data.bins)
    if trace == "exact":
        accuracy = "exact: no probes"
    elif bool(result.stderr.isnan().any()):
        accuracy = f"no standard error with probes={probes}: give more"
    else:
        # of the root mean square, as the median of a few probes' spreads is too small
        error = float(result.stderr.square().mean().sqrt())
        accuracy = f"{error:.2f} nats standard error of the trace's estimate (root mean square), {probes} probes"
    return Likelihood(result, bits, indices, units, accuracy, time.perf_counter() - began)


def mean_and_error(values: ArrayLike, digits: int) -> str:
    """ "mean ± its standard error" of numbers [N]; of a single one, the number."""
    numbers = np.asarray(values, np.float64)
    error = f" ± {numbers.std(ddof=1) / math.sqrt(len(numbers)):.{digits}f}" if len(numbers) > 1 else ""
    return f"{numbers.mean():.{digits}f}{error}"


def _in_model_units(data: Data, model: ScoreModel, indices: range, seed: int) -> tuple[Tensor, str]:
    """The samples and a description of their units: discrete data dequantised, continuous data as `fastdiff train` has it."""
    low, high = model.data_range
    if data.bins is not None:
        x = data.dequantized(indices, model.data_range, seed=seed, first_sample=indices[0])
        return x, f"dequantised uniformly within {data.bins} levels, in the model's data_range {low:g} to {high:g}"
    if len(data.shape) > 1:
        return data.batch(indices, model.data_range), f"scaled to the model's data_range {low:g} to {high:g}"
    check_own_units(data, model)
    return data.batch(indices, data.range), "in their own units"


def check_own_units(data: Data, model: ScoreModel) -> None:
    """Refuse vectors that are clearly in another unit than those that the model was trained on."""
    (low, high), (lowest, highest) = model.data_range, data.range
    if (
        lowest < 2 * low - high or highest > 2 * high - low
    ):  # new data may exceed the old a little; other units do by far
        raise DataError(
            f"data must be in the units of the model's training data, which ran from {low:g} to {high:g}, got {lowest:g} to "
            f"{highest:g}: scale them as the training data were"
        )


def conditions_of(data: Data, model: ScoreModel) -> Condition:
    """The labels and conditions, of the data, that a model was trained with."""
    return model.takes.joined(_labels(data, model), data.cond if model.cond_shape else None)


def _labels(data: Data, model: ScoreModel) -> Tensor | None:
    if not model.num_classes:
        return None
    if data.labels is None or data.num_classes is None or data.num_classes > model.num_classes:
        got = "no labels" if data.labels is None else f"{data.num_classes} classes"
        raise ConfigError(
            f"data must have labels of the model's {model.num_classes} classes, got {got}: give labelled data, or --labels"
        )
    return data.labels
