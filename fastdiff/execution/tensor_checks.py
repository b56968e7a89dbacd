"""Checks of tensors, shapes, dtypes and devices that a caller gives: refused before any work, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks, files
from ..errors import ConfigError, DataError, DeviceError, DTypeError, ShapeError, short
from . import torch_private

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(shape: Any) -> tuple[int, ...]:
    """One sample's shape: at least one axis, lengths >= 0."""
    lengths = () if isinstance(shape, str) or not isinstance(shape, Iterable) else tuple(shape)
    if not lengths:
        raise ConfigError(f"shape must be one sample's shape, a tuple such as (1, 28, 28) or (2,), got {short(shape)}")
    checked = tuple(checks.integer("shape", n, 0, 2**34) for n in lengths)
    if math.prod(checked) > 2**34:  # FDN1 counts a sample's numbers by fours in 32 bits
        raise ConfigError(
            f"shape must be of at most 2**34 numbers, got {short(shape)} of {math.prod(checked)}: use less"
        )
    return checked


def device_of(device: torch.device | str | None) -> torch.device:
    """The device, which must hold data and exist here; "cuda" becomes the current one."""
    try:
        place = torch.device("cpu" if device is None else device)
        if place.type != "meta":
            place = torch.empty(0, device=place).device
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError) as error:
        seen = torch.cuda.device_count()
        here = f"{seen} here: {files.reason(error)}" if seen else "none here"
        raise DeviceError(
            f"device={short(device)} cannot be used here: it must be 'cpu', or 'cuda' where torch sees such a device, of which "
            f"it sees {here}"
        ) from error
    if place.type == "meta":
        raise DeviceError("device='meta' holds no data: use 'cpu' or 'cuda'")
    return place


def check_tensor(name: str, x: Any, shape: tuple[int, ...], device: torch.device, finite: bool) -> None:
    """A dense floating tensor of this shape on this device, finite if `finite`."""
    check_dense(name, x)
    check_floating(name, x)
    if tuple(x.shape) != shape:
        raise ShapeError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    check_device(name, x, device)
    if finite:
        check_finite(name, x)


def resolved(value: Any) -> Any:
    """A tensor, or a dict of tensors, whose numbers stand in memory as they are: no view that is negated or conjugated."""
    if isinstance(value, dict):
        return {key: resolved(entry) for key, entry in value.items()}
    return value.resolve_conj().resolve_neg() if isinstance(value, Tensor) else value


def check_floating(name: str, x: Any) -> None:
    """A tensor of float16, bfloat16, float32 or float64."""
    _check_is_tensor(name, x)
    if x.dtype not in DTYPES:
        raise DTypeError(f"{name} must be floating (float16, bfloat16, float32, float64), got {x.dtype}: use .float()")


def check_dense(name: str, x: Any) -> None:
    """A tensor that holds its numbers one by one: not sparse, nested, quantised, fake or of 8-bit floats."""
    _check_is_tensor(name, x)
    if x.is_nested:
        raise ShapeError(f"{name} must be one dense tensor, got a nested one: use .to_padded_tensor(0.0)")
    if x.layout != torch.strided:
        raise ShapeError(f"{name} must be a dense strided tensor, got layout {x.layout}: use .to_dense()")
    if x.is_quantized:
        raise DTypeError(f"{name} must not be quantised, got {x.dtype}: use .dequantize()")
    if x.dtype.itemsize == 1 and x.is_floating_point():
        raise DTypeError(f"{name} must be of more than 8 bits, got {x.dtype}: use .float()")
    if type(x) is not Tensor and torch_private.is_fake(x):
        raise DTypeError(f"{name} must hold data, got a {type(x).__name__}: make it outside of FakeTensorMode")


def _check_is_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise DTypeError(f"{name} must be a tensor, got {type(x).__name__}: use torch.as_tensor")


def check_samples(name: str, x: Any) -> None:
    """Dense floating samples [B, *]; they may be on the meta device, where only shapes are asked for."""
    _check_is_tensor(name, x)
    if type(x) is not Tensor or x.layout != torch.strided or x.dtype not in DTYPES or x.is_nested:
        if not torch_private.is_fake(x):
            check_dense(name, x)
        check_floating(name, x)
    if x.ndim == 0:
        raise ShapeError(f"{name} must be samples [B, *], got shape []: use {name}[None]")


def numbers(name: str, value: Any, device: torch.device) -> Any:
    """A real number, a list of them, or a dense tensor of them that may be used with others on `device`."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.layout != torch.strided or value.is_quantized or value.is_nested:
            check_dense(name, value)
        if value.is_complex() or value.dtype == torch.bool or (value.dtype.itemsize == 1 and value.is_floating_point()):
            raise DTypeError(f"{name} must hold real numbers, got {value.dtype}: use .float()")
        if value.is_meta and device.type != "meta":
            raise DeviceError(f"{name} is on the meta device, which holds no data")
        return resolved(value)
    array = np.asarray(value) if isinstance(value, (list, tuple)) else value
    if isinstance(array, (np.ndarray, np.generic)) and array.dtype.kind in "iuf":
        return torch.as_tensor(array)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return checks.number(name, value) if isinstance(value, int) else value
    raise DTypeError(f"{name} must be a number or a tensor of numbers, got {short(value)}")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """A tensor on this device."""
    if x.device.type == "meta":
        raise DeviceError(f"{name} is on the meta device, which holds no data")
    if x.device != device:
        raise DeviceError(f"{name} must be on {device}, got a tensor on {x.device}: use .to({str(device)!r})")


def check_finite(name: str, x: Tensor) -> None:
    """One sum, of float32 or wider; the culprit is located only when that fails (a sum of large finite numbers may overflow)."""
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    if x.is_floating_point() and not math.isfinite(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))):
        bad = torch.nonzero(~x.isfinite())
        if len(bad):
            index = tuple(bad[0].tolist())
            raise DataError(f"{name} must be finite, got {x[index].item()} at index {index}")


def check_condition(cond: Any, num_samples: int, device: torch.device, finite: bool) -> None:
    """None, a tensor, or a dict of tensors, each with num_samples entries first."""
    entries = cond if isinstance(cond, dict) else {} if cond is None else {"": cond}
    for key, value in entries.items():
        name = f"cond[{short(key)}]" if key else "cond"
        if not isinstance(value, Tensor):
            raise DTypeError(
                f"{name} must be a tensor (or cond a dict of tensors), got {type(value).__name__}: use torch.as_tensor"
            )
        if not isinstance(key, str):
            raise DTypeError(
                f"cond must be a dict whose keys are names of the model's arguments, got the key {short(key)}"
            )
        check_dense(name, value)
        if value.ndim == 0 or len(value) != num_samples:
            raise ShapeError(
                f"{name} must have num_samples={num_samples} entries first, got shape {tuple(value.shape)}: one for all is "
                f"{name}.expand({num_samples}, …), or ask for num_samples={len(value) if value.ndim else 1}"
            )
        check_device(name, value, device)
        if finite:
            check_finite(name, value)
