"""What `fastdiff inpaint | colorize | solve` read: known parts, masks, measurements, and operators by their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import files, inverse
from ..data.readers import read_array, read_picture
from ..errors import ConfigError, ShapeError, short
from ..inverse.replacement import as_bool
from ..model import ScoreModel

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def values(name: str, value: str, model: ScoreModel, channels: int | None = None) -> Tensor:
    """Floats in the units of the model's samples: a .npy array as it is, a picture [C, H, W] put into its data_range.

    channels   of a picture, by default the model's
    """
    path = files.path(name, value)
    if path.suffix.lower() not in PICTURES:
        array = torch.from_numpy(read_array(path))
        if not array.is_floating_point():
            raise ConfigError(
                f"{name} must be an array of floats in the units of the model's samples, and {files.shown(path.name)} holds "
                f"{str(array.dtype).removeprefix('torch.')}: convert it, or give a picture"
            )
        return array
    shape = _picture_shape(name, path, model)
    low, high = model.data_range
    levels = torch.tensor(read_picture(path, channels or shape[0])).float() / 255
    return low + (high - low) * levels


def known(value: str, model: ScoreModel) -> Tensor:
    """The known part, of the size of the model's samples."""
    array = values("known", value, model)
    shape = model.data_shape
    if tuple(array.shape[-len(shape) :]) != shape or array.ndim > len(shape) + 1:
        raise ShapeError(
            f"known must be of the model's samples {shape}, or an array of several, and {files.shown(value)} has the shape "
            f"{tuple(array.shape)}"
        )
    return array


def gray(value: str, model: ScoreModel, weights: list[float] | None) -> Tensor:
    """Grey values: those of a picture in colours by the weights."""
    array = values("gray", value, model)
    if files.path("gray", value).suffix.lower() not in PICTURES or len(array) == 1:
        return array
    return inverse.Grayscale(weights).A(array[None])[0]


def mask(value: str, model: ScoreModel) -> Tensor:
    """True where the data are known: 1 or True in an array, white in a picture."""
    path = files.path("mask", value)
    if path.suffix.lower() not in PICTURES:
        return torch.from_numpy(read_array(path))
    shape = _picture_shape("mask", path, model)
    found = torch.tensor(read_picture(path, 1)) >= 128
    if tuple(found.shape[1:]) != shape[1:]:
        raise ShapeError(
            f"mask must have the size of the model's samples, {shape[1:]}, and {files.shown(path.name)} has "
            f"{tuple(found.shape[1:])}"
        )
    return found


def _picture_shape(name: str, path: Path, model: ScoreModel) -> tuple[int, ...]:
    shape = model.data_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ShapeError(
            f"{name} must be a .npy array for a model of samples {shape}, which are no pictures, got {files.shown(path)}"
        )
    return shape


def operator(text: str, model: ScoreModel) -> tuple[Any, int | None]:
    """The operator of --operator NAME or NAME:VALUE, and the channels of a picture of what it measures (None: the model's)."""
    name, _, value = text.partition(":")
    if name not in OPERATORS:
        raise ConfigError(f"operator must be {FORMS}, got {short(text)}")
    make, needs = OPERATORS[name]
    if needs and not value:
        raise ConfigError(f"operator {name} needs a value, {needs}, as in {name}:{needs}")
    return make(value, model), 1 if name == "grayscale" else None


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{what} must be a number, got {short(text)}") from None


def _grayscale(value: str, model: ScoreModel) -> Any:
    return inverse.Grayscale(weights(value) if value else None)


def weights(text: str) -> list[float]:
    """Numbers of "W,W,W"."""
    return [_number(word, "weights") for word in text.split(",")]


def _downsampling(value: str, model: ScoreModel) -> Any:
    return inverse.Downsampling(int(value) if value.isdecimal() else value)  # type: ignore[arg-type]


def _blur(value: str, model: ScoreModel) -> Any:
    return inverse.Blur.gaussian(_number(value, "operator blur's sigma"), axes=len(model.data_shape) - 1)


def _mask(value: str, model: ScoreModel) -> Any:
    return inverse.Mask(as_bool(mask(value, model)))


def _fourier(value: str, model: ScoreModel) -> Any:
    found = as_bool(mask(value, model))
    return inverse.Fourier(found[0] if found.ndim == len(model.data_shape) else found)


def _matrix(value: str, model: ScoreModel) -> Any:
    array = read_array(files.path("operator", value))
    return inverse.Matrix(torch.from_numpy(array.astype(np.result_type(array.dtype, np.float32))), model.data_shape)


# name -> (value, model) -> operator, and what the value is where there must be one
OPERATORS: dict[str, tuple[Callable[[str, ScoreModel], Any], str]] = {
    "grayscale": (_grayscale, ""),
    "downsampling": (_downsampling, "FACTOR"),
    "blur": (_blur, "SIGMA"),
    "mask": (_mask, "FILE"),
    "fourier": (_fourier, "FILE"),
    "matrix": (_matrix, "FILE"),
}
FORMS = "grayscale[:W,W,W], downsampling:FACTOR, blur:SIGMA, mask:FILE, fourier:FILE or matrix:FILE"
