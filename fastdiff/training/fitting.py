"""What a training learns of a model from its data: classes and units; and whether they fit one another."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..data import Data
from ..errors import ConfigError, DataError, ShapeError, warn
from ..execution import conditions
from ..model import ScoreModel
from ..planning.coverage import misfit


def check_data(data: Data, model: ScoreModel, dequantize: bool) -> None:
    if data.shape != model.data_shape:
        raise ShapeError(f"data must have the model's data_shape {model.data_shape}, got samples of {data.shape}")
    if dequantize and data.bins is None:
        raise ConfigError(
            "dequantize=True needs data on discrete levels, got bins=None: give Data(..., bins=) or leave it out"
        )


def classes(data: Data, model: ScoreModel) -> int | None:
    """How many classes a training has: the data's, 0 where it leaves a network that takes labels without, None for one that takes
    none."""
    taken = model.takes
    takes = taken.labels is not None and taken.classes != 0
    if data.labels is None or data.num_classes is None or not takes:
        if data.labels is not None:
            warn(
                f"the data have labels of {data.num_classes} classes, and the network takes none: build it with "
                f"num_classes={data.num_classes}, or drop them, Data(data.x, range=data.range, bins=data.bins)"
            )
        if taken.needs:
            raise ConfigError(f"the network takes {taken.shown:.80}, and train gives labels alone: give labelled data")
        return 0 if takes else None
    if taken.classes and data.num_classes > taken.classes:
        raise DataError(
            f"data must have labels of at most num_classes={taken.classes} of the network, got {data.num_classes} classes: "
            f"build the network with num_classes={data.num_classes}"
        )
    conditions.arranged(taken, data.labels[:1])
    return data.num_classes


def units(data: Data, model: ScoreModel) -> dict[str, Any]:
    """The facts of a model's units that a training sets: standardize and data_range for vectors, unless the model has either."""
    own = {"data_range": data.range, "range_given": True}
    if model.standardize is not None:
        return {} if model.range_given else own
    if len(data.shape) != 1:
        return {"range_given": True}
    if data.bins is not None:  # levels have one scale, which their range says
        low, high = data.range
        mean, std = np.full(data.shape, (low + high) / 2), np.full(data.shape, (high - low) / 2)
    else:
        mean, std = moments(data.x.numpy())
    constant = np.flatnonzero(std == 0)
    vary = std[std > 0]
    apart = f"{vary.min():.3g} to {vary.max():.3g}" if len(vary) and vary.max() > 100 * vary.min() else None
    if model.range_given:
        if apart:
            warn(
                f"the data's columns have standard deviations of {apart}, and one data_range for all leaves the smallest "
                "below the noise: leave data_range out, and each column is standardized"
            )
        return {}
    if apart:
        warn(
            f"the data's columns have standard deviations of {apart}: the network sees each standardized, and samples are in "
            "the data's own units; give the ScoreModel a data_range to scale all columns alike"
        )
    if len(constant) and len(data) > 1:
        warn(
            f"the data's columns {', '.join(map(str, constant[:5]))}{', …' * (len(constant) > 5)} are constant, and "
            "standardized by 1: leave them out of the data"
        )
    std[constant] = 1.0
    return {"standardize": (mean, std), **own}


def check_scale(data: Data, model: ScoreModel) -> None:
    """Say where the process does not suit the data's scale, by up to 1024 of them."""
    own = model.standardize is not None
    some = torch.arange(0, len(data), -(-len(data) // 1024), device="cpu")
    x = model.standardized(data.batch(some, data.range if own else model.data_range))
    columns = x.std(0, correction=0)[x.std(0, correction=0) > 0] if own else x.std(correction=0)
    said = misfit(model.process, float(x.abs().max()), float(columns.min()) if columns.numel() else None)
    if said is not None:
        warn(said)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each column's mean and standard deviation, float64, in an order of additions that no thread count changes."""
    pieces = [slice(start, start + 2**16) for start in range(0, len(x), 2**16)]
    low, high = x.min(0), x.max(0)
    with np.errstate(all="ignore"):
        mean = sum(x[piece].sum(0, dtype=np.float64) for piece in pieces) / len(x)
        mean = np.where(low == high, low.astype(np.float64), mean)
        std = np.sqrt(sum(((x[piece] - mean) ** 2).sum(0) for piece in pieces) / len(x))
    if not (np.isfinite(mean) & np.isfinite(std)).all():
        raise DataError("x must have a mean and a variance that float64 holds: scale the data")
    return mean, std
