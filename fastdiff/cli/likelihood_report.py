"""`fastdiff likelihood`: data as a model wants them, and what their likelihoods come to."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import checks
from ..errors import ConfigError, DataError, ShapeError
from ..execution import noise
from ..likelihood import LogLikelihood, bits_per_dim, log_likelihood
from ..model import ScoreModel
from ..training import Data


@dataclass(frozen=True)
class Likelihood:
    """The likelihoods of some samples of a data set; `bits` [B] is None for continuous data."""

    found: LogLikelihood
    bits: Tensor | None
    which: range
    how: str
    estimates: str
    seconds: float

    def __str__(self) -> str:
        """The means with their standard errors, and what they cost."""
        found, numbers = self.found, math.prod(self.found.latent.shape[1:])
        lines = [
            f"samples {self.which[0]} to {self.which[-1]}, {self.how}",
            f"log-likelihood  {_mean(found.nats, 2)} nats, {_mean(found.nats / numbers, 4)} nats/dim",
            "bits/dim        " + ("none" if self.bits is None else _mean(self.bits, 4)),
            f"of one sample   {self.estimates}",
            f"evaluations     {found.nfe.double().mean():.0f} in the mean, at most {found.nfe.max()}",
            f"seconds         {self.seconds:.1f}",
        ]
        if self.bits is None:
            lines[2] += ": the data are continuous, and bits count the levels of discrete data"
        return "\n".join(lines)

    def save(self, path: Path) -> None:
        """Every sample's numbers as arrays: nats, stderr, latent, nfe, and bits_per_dim of discrete data."""
        arrays = {name: getattr(self.found, name).numpy() for name in ("nats", "stderr", "latent", "nfe")}
        if self.bits is not None:
            arrays["bits_per_dim"] = self.bits.numpy()
        np.savez(path, **arrays)


def likelihood(
    model: ScoreModel, data: Data, num_samples: int, *, first_sample: int, seed: int, trace: str, probes: int, **options: Any
) -> Likelihood:  # fmt: skip
    """log p of at most `num_samples` of the data, from `first_sample` on; sample i's noise is that of (seed, i)."""
    began = time.perf_counter()
    if data.shape != model.data_shape:
        raise ShapeError(
            f"data must have the model's shape {list(model.data_shape)}, got {list(data.shape)}: give data like those it was "
            "trained on"
        )
    first = checks.integer("first_sample", first_sample, 0, len(data) - 1)
    which = range(first, first + min(checks.integer("num_samples", num_samples, 1, 2**32 - 1), len(data) - first))
    x, how = _in_model_units(data, model, which, checks.integer("seed", seed, 0, 2**64 - 1))
    found = log_likelihood(
        model, x, trace=trace, probes=probes, cond=_labels(data, model, which), seed=seed, first_sample=first, **options
    )
    bits = None if data.bins is None else bits_per_dim(found, model.data_range, data.bins)
    if trace == "exact":
        estimates = "exact: no probes"
    elif bool(found.stderr.isnan().any()):
        estimates = f"no standard error with probes={probes}: give more"
    else:
        # of the root mean square, as the median of a few probes' spreads is too small
        error = float(found.stderr.square().mean().sqrt())
        estimates = f"{error:.2f} nats standard error of the trace's estimate (root mean square), {probes} probes"
    return Likelihood(found, bits, which, how, estimates, time.perf_counter() - began)


def _in_model_units(data: Data, model: ScoreModel, which: range, seed: int) -> tuple[Tensor, str]:
    """The samples and how they were treated: continuous data as `fastdiff train` has them, discrete ones dequantised."""
    low, high = model.data_range
    if data.bins is not None:
        u = noise.uniform(len(which), data.shape, seed=seed, first_sample=which[0], stream=noise.AUGMENTATION)
        how = f"dequantised uniformly within {data.bins} levels, in the model's data_range {low:g} to {high:g}"
        return data.batch(which, model.data_range, u), how
    if len(data.shape) > 1:
        return data.batch(which, model.data_range), f"scaled to the model's data_range {low:g} to {high:g}"
    lowest, highest = data.range
    if lowest < 2 * low - high or highest > 2 * high - low:  # new data may exceed the old; other units do by far
        raise DataError(
            f"data must be in the model's units, where its own ran from {low:g} to {high:g}, and got {lowest:g} to "
            f"{highest:g}: scale them as its training data were"
        )
    return data.batch(which, data.range), "in their own units"


def _labels(data: Data, model: ScoreModel, which: range) -> dict[str, Tensor] | None:
    """The labels, for a network that was trained with them."""
    classes = getattr(model.net, "num_classes", None)
    if classes is None:
        return None
    if data.labels is None or data.num_classes > classes:
        has = "no labels" if data.labels is None else f"{data.num_classes} classes"
        raise ConfigError(f"data must have labels of the model's {classes} classes, got {has}: give labelled data")
    return {"y": data.labels[which[0] : which[-1] + 1]}


def _mean(values: Tensor, digits: int) -> str:
    error = f" ± {values.std() / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{error}"
