"""The operations, and the one place where backends differ. So far there is one: `reference`, plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ConfigError, DeviceError, choose
from .reference import noise, row

BACKENDS = ("auto", "reference", "cpu", "triton")
ENGINES = ("auto", "eager", "graph")

step, convert, measure_langevin, learned_scale = row.step, row.convert, row.measure_langevin, row.learned_scale


def resolve(backend: str, engine: str) -> tuple[str, str, str]:
    """The backend and engine that will run, and a sentence saying why."""
    choose("backend", backend, BACKENDS)
    choose("engine", engine, ENGINES)
    if backend not in ("auto", "reference"):
        raise ConfigError(f"backend={backend!r} is not built in this version: use 'auto' or 'reference'")
    if engine == "graph":
        raise ConfigError("engine='graph' is not built in this version: use 'auto' or 'eager'")
    return "reference", "eager", "this version has no fused kernels and no captured loops"


def normal(
    num_samples: int,
    shape: Sequence[int],
    *,
    seed: int,
    draw: int = 0,
    first_sample: int = 0,
    stream: int = noise.PRIOR,
    backend: str = "auto",
    device: torch.device | str | None = None,
) -> Tensor:
    """fastdiff's normals (FDN1), float32 [num_samples, *shape]: a pure function of (seed, stream, sample, draw, element).

    Row i belongs to sample `first_sample + i`. The bits are the same on every machine, backend and batch split.
    """
    resolve(backend, "auto")
    limits = {"seed": 2**64, "draw": 2**32, "first_sample": 2**32, "stream": 2**32}
    given = {"seed": seed, "draw": draw, "first_sample": first_sample, "stream": stream}
    checked = {name: check_integer(name, value, 0, limits[name] - 1) for name, value in given.items()}
    check_integer("num_samples", num_samples, 0, 2**32 - checked["first_sample"])
    return noise.normal(num_samples, check_shape(shape), device=check_device(device), **checked)


def check_integer(argument: str, value: object, low: int, high: int) -> int:
    """`value` as an int in [low, high]; bool and floats are refused even when whole."""
    whole = hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))
    if not whole or not low <= value.__index__() <= high:  # type: ignore[attr-defined]
        limit = "2**64 - 1" if high == 2**64 - 1 else "2**32 - 1" if high == 2**32 - 1 else str(high)
        raise ConfigError(f"{argument} must be an integer from {low} to {limit}, got {value!r}")
    return value.__index__()  # type: ignore[attr-defined,no-any-return]


def check_shape(shape: object) -> tuple[int, ...]:
    """One sample's shape: at least one axis, lengths >= 0."""
    if isinstance(shape, int) or not isinstance(shape, Sequence) or isinstance(shape, str) or not len(shape):
        raise ConfigError(f"shape must be one sample's shape, a tuple such as (1, 28, 28) or (2,), got {shape!r}")
    return tuple(check_integer("shape", n, 0, 2**34) for n in shape)


def check_device(device: torch.device | str | None) -> torch.device:
    """The device, which must hold data and exist."""
    try:
        found = torch.device("cpu" if device is None else device)
        if found.type != "meta":
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"device={str(device)!r} cannot be used here: {str(error).splitlines()[0]:.100}") from error
    if found.type == "meta":
        raise DeviceError("device='meta' holds no data: use 'cpu' or 'cuda'")
    return found
