"""What a training learns of a model from its data: conditions and units; and whether they fit one another."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Data, LazyData, load_data
from ..data.data import hold_out
from ..data.readers import load_beside
from ..errors import ConfigError, DataError, ShapeError, warn
from ..execution.calls import dtype_of
from ..execution.conditions import Takes, arranged
from ..execution.modes import evaluating
from ..model import ScoreModel
from ..planning.coverage import misfit


def check_data(data: Data, model: ScoreModel, dequantize: bool) -> None:
    if data.shape != model.data_shape:
        raise ShapeError(f"data must have the model's data_shape {model.data_shape}, got samples of {data.shape}")
    if dequantize and data.bins is None:
        raise ConfigError(
            "dequantize=True needs data on discrete levels, and these are continuous: give their number, bins=, or leave it out"
        )


def sources(data: Any, validation: Any, model: ScoreModel, dequantize: bool) -> tuple[Data | LazyData, Data | None]:
    """(the data to train on, the data to evaluate on or None), checked against the model."""
    shape = tuple(getattr(data, "shape", ()))[1:]
    known = isinstance(data, (np.ndarray, Tensor)) and len(shape) > 1 and shape == model.data_shape
    whole = load_data(data, channels="first") if known else load_data(data)
    check_data(whole.some if isinstance(whole, LazyData) else whole, model, dequantize)
    return (whole, None) if validation is None else _held_out(whole, validation, model)


def fitted(model: ScoreModel, data: Data, cond_dropout: float, augmented: bool) -> tuple[ScoreModel, dict[str, Any]]:
    """(a model of the same network with what it learns from the data, those facts), all checked against one another."""
    facts = {**conditions(data, model, cond_dropout), **units(data, model)}
    made = copy.copy(model)
    vars(made).update(facts)
    check_scale(data, made)
    if augmented:
        check_augmented(made)
    if made.cond_dropout:
        check_null(made)
    return made, facts


def _held_out(data: Data | LazyData, validation: Any, model: ScoreModel) -> tuple[Data | LazyData, Data]:
    """(the data to train on, the data to evaluate on): a share of the first, or a source of its own."""
    if isinstance(validation, (int, float)) and not isinstance(validation, bool):
        if isinstance(data, LazyData):
            raise ConfigError(
                f"validation={validation:g} would divide data that are read lazily: give validation data of their own"
            )
        kept, trained = hold_out(data, validation, "validation")
        return trained, kept
    kept = load_beside("validation", validation, data)
    if isinstance(kept, LazyData):
        raise ConfigError("validation must be in memory, got data that are read lazily: give some of them, a Data")
    if kept.shape != data.shape:
        raise ShapeError(f"validation must have samples of the data's shape {data.shape}, got {kept.shape}")
    # vectors as they are, without a range
    plain = model.standardize is not None or (len(data.shape) == 1 and not model.range_given)
    if kept.bins != data.bins or (kept.range != data.range and not (plain and data.bins is None)):
        both = [*data.range, *kept.range]  # type: ignore[misc]
        same = f"range=({min(both)}, {max(both)})" if kept.bins == data.bins else "Data the same range= and bins="
        raise DataError(
            f"validation must have the range and levels of the data, {data.range} and {data.bins}, got {kept.range} and "
            f"{kept.bins}: give both {same}"
        )
    _check_beside(data.some if isinstance(data, LazyData) else data, kept, model)
    return data, kept


def _check_beside(data: Data, kept: Data, model: ScoreModel) -> None:
    """Refuse validation data `kept` without the labels and conditions that the network gets of the data, or with others."""
    to_labels, to_cond = _places(model)
    lacks = "validation must have {0}, as the data have and the network takes: give Data(..., {0}=)"
    if to_labels and data.labels is not None:
        if kept.labels is None:
            raise DataError(lacks.format("labels"))
        if int(kept.labels.max()) >= (data.num_classes or 0):
            raise DataError(
                f"validation must have labels below the data's num_classes={data.num_classes}, got {int(kept.labels.max())}: "
                "give the data num_classes="
            )
    if to_cond and data.cond is not None:
        if kept.cond is None:
            raise DataError(lacks.format("cond"))
        if data.cond.shape[1:] != kept.cond.shape[1:]:
            raise ShapeError(
                f"validation must have conditions of the data's shape {tuple(data.cond.shape[1:])}, got "
                f"{tuple(kept.cond.shape[1:])}"
            )


def conditions(data: Data, model: ScoreModel, cond_dropout: float) -> dict[str, Any]:
    """The facts of a model's conditions that a training sets, and refuses where data and network do not fit.

    num_classes       the data's; 0 where it leaves a network that takes labels without; None for one that takes none
    cond_shape        the data's; () where it leaves a network that takes another condition without; None for one that takes none
    standardize_cond  of the data's conditions, unless the model has it
    cond_dropout      as it is
    """
    taken = model.takes
    to_labels, to_cond = _places(model)
    labels, cond = data.labels if to_labels else None, data.cond
    if data.labels is not None and labels is None:
        warn(
            f"the data have labels of {data.num_classes} classes, and the network takes none: build it with "
            f"num_classes={data.num_classes}, or drop them, Data(data.x, range=data.range, bins=data.bins)"
        )
    if cond is not None:
        _check_conditions(data, taken, to_cond, labels)
    missing = sorted(
        taken.needs - ({to_labels} if labels is not None else set()) - ({to_cond} if cond is not None else set())
    )
    if missing:
        raise ConfigError(
            f"the network takes {taken.shown:.80}, and {missing[0]:.30} is not in the data: give labelled data, or Data(x, cond=)"
        )
    if labels is not None and taken.classes and (data.num_classes or 0) > taken.classes:
        raise DataError(
            f"data must have labels of at most num_classes={taken.classes} of the network, got {data.num_classes} classes: "
            f"build the network with num_classes={data.num_classes}"
        )
    facts: dict[str, Any] = {
        "num_classes": None if to_labels is None or (cond is not None and to_cond == to_labels) else 0,
        "cond_shape": None if to_cond is None or to_cond == to_labels else (),
        "standardize_cond": None,
        "cond_dropout": cond_dropout,
    }
    if cond_dropout and labels is None and cond is None:
        raise ConfigError(
            f"cond_dropout={cond_dropout:g} leaves out conditions, and there are none: give data with labels or cond, or "
            "leave it out"
        )
    for name, what, own, lacks in (
        ("num_classes", "labels", model.num_classes, labels is None),
        ("cond_shape", "conditions", model.cond_shape, cond is None),
    ):
        if model.loaded and own and lacks:
            none = "0" if name == "num_classes" else "()"
            raise ConfigError(
                f"data must have {what}, as the model was loaded with {name}={own}: give them, Data(x, …), or for a model "
                f"without, ScoreModel(model.net, model.process, …, {name}={none})"
            )
    if labels is not None:
        facts["num_classes"] = data.num_classes
    if cond is not None:
        facts |= {
            "cond_shape": tuple(cond.shape[1:]),
            # a network of a file has seen them as they are
            "standardize_cond": model.standardize_cond
            or (None if model.loaded and model.cond_shape else _of_conditions(cond)),
        }
    arranged(taken, taken.joined(None if labels is None else labels[:1], None if cond is None else cond[:1]))
    return facts


def _places(model: ScoreModel) -> tuple[str | None, str | None]:
    """Where the network takes labels and another condition, None where it takes none."""
    taken = model.takes
    return None if taken.classes == 0 else taken.labels, None if taken.shape == () else taken.tensor


def check_augmented(model: ScoreModel) -> None:
    """Refuse augmentation where what stands beside or behind the samples cannot be moved alike."""
    field, shape = model.cond_shape or (), model.data_shape
    if len(field) > 1 and field[1:] != shape[1:]:
        raise ShapeError(
            f"augment changes fields beside samples {shape} as it changes them, and conditions {field} are on another grid: give "
            "them flat, as vectors, or leave augment out"
        )
    if any(
        (value.reshape(shape[0], -1).min(1) != value.reshape(shape[0], -1).max(1)).any()
        for value in model.standardize or ()
    ):
        raise ConfigError(
            "augment moves samples, and the model standardizes each place by another mean or std: give standardize= the same for "
            "all of a channel, or leave augment out"
        )


def check_null(model: ScoreModel) -> None:
    """ConfigError unless the network answers samples without a condition, by finite numbers."""
    place = next(model.net.parameters()).device
    x = torch.zeros((1, *model.data_shape), dtype=dtype_of(model.net, torch.float32), device=place)
    labels = None if model.null_label is None else torch.full((1,), model.null_label, device=place)
    cond = torch.full((1, *model.cond_shape), math.nan, device=place) if model.cond_shape else None
    none = (
        f"label {model.null_label}"
        if cond is None
        else "NaN"
        if labels is None
        else f"label {model.null_label} and NaN"
    )
    cause, finite = None, False
    with evaluating(model.net), torch.no_grad():
        try:
            t = model.process.training_times(torch.full((1,), 0.5, device=place))
            finite = bool(model(x, t, model.takes.joined(labels, cond)).isfinite().all())
        except (IndexError, RuntimeError) as error:
            cause = error
    if not finite:
        raise ConfigError(
            f"cond_dropout gives the network {none} where a condition is left out, and it has no finite answer: make a learned "
            "vector of that in its forward, or use fastdiff.networks"
        ) from cause


def _check_conditions(data: Data, taken: Takes, to_cond: str | None, labels: Tensor | None) -> None:
    shape = tuple(data.cond.shape[1:])  # type: ignore[union-attr]
    without = "Data(x, labels, range=…, bins=…)"
    if to_cond is None:
        raise ConfigError(
            f"the data have conditions of shape {shape}, and the network takes none: build it with cond_shape={shape}, or drop "
            f"them, {without}"
        )
    if taken.shape and taken.shape != shape:
        raise ShapeError(
            f"data must have conditions of the network's cond_shape={taken.shape}, got {shape}: build it with that"
        )
    if labels is not None and taken.labels == to_cond:
        raise ConfigError(
            f"the data have labels and conditions, and the network takes one, {to_cond}: drop one of them, {without} or "
            "Data(x, cond=…)"
        )


def _of_conditions(cond: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) of each number of conditions [N, C], of each channel of fields [N, C, *], 1 for one that is constant."""
    flat = cond.movedim(1, -1).reshape(-1, cond.shape[1]).numpy()
    mean, std = moments("cond", len(flat), flat.__getitem__)
    constant = np.flatnonzero(std == 0)
    if len(constant) and len(cond) > 1:
        warn(
            f"the conditions' columns {', '.join(map(str, constant[:5]))}{', …' * (len(constant) > 5)} are constant, and say "
            "nothing of a sample: leave them out of cond"
        )
    std[constant] = 1.0
    return mean, std


def units(data: Data, model: ScoreModel) -> dict[str, Any]:
    """The facts of a model's units that a training sets: standardize and data_range for vectors, unless the model has either."""
    own = {"data_range": data.range, "range_given": True}
    if model.standardize is not None:
        return {} if model.range_given else own
    if len(data.shape) != 1:
        return {"range_given": True}
    if model.loaded and not model.range_given:  # whose network has seen vectors as they are
        return {"standardize": (np.zeros(data.shape), np.ones(data.shape)), **own}
    if data.bins is not None:  # levels have one scale, which their range says
        low, high = data.range
        mean, std = np.full(data.shape, (low + high) / 2), np.full(data.shape, (high - low) / 2)
    else:
        mean, std = moments("x", len(data), lambda piece: data.raw(piece).numpy())
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


def moments(name: str, count: int, rows: Callable[[slice], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Each column's mean and standard deviation over the rows, float64, in an order of additions that no thread count changes."""
    pieces = [slice(start, start + 2**16) for start in range(0, count, 2**16)]
    low = np.min([rows(piece).min(0) for piece in pieces], 0)
    high = np.max([rows(piece).max(0) for piece in pieces], 0)
    with np.errstate(all="ignore"):
        mean = sum(rows(piece).sum(0, dtype=np.float64) for piece in pieces) / count
        mean = np.where(low == high, low.astype(np.float64), mean)
        std = np.sqrt(sum(((rows(piece) - mean) ** 2).sum(0) for piece in pieces) / count)
    if not (np.isfinite(mean) & np.isfinite(std)).all():
        raise DataError(f"{name} must have a mean and a variance that float64 holds: scale the data")
    return mean, std
