"""Discrete levels k = 0 … K − 1 as floats: the bins of a data range, and uniform dequantisation within them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import checks
from ..errors import ConfigError, DataError, DeviceError, ShapeError, short
from ..execution.noise import AUGMENTATION
from ..execution.ops import uniform
from ..execution.tensor_checks import check_dense, resolved

Edges = NDArray[np.float32]


def dequantize(
    levels: Tensor,
    data_range: tuple[float, float],
    bins: int = 256,
    *,
    seed: int = 0,
    draw: int = 0,
    first_sample: int = 0,
) -> Tensor:
    """lo + (hi − lo)(k + u)/bins, u ~ U[0, 1), for levels k = 0 … bins − 1 [B, *] of any integer dtype; float64.

    The u of row i is a function of (seed, draw, first_sample + i). `Data.dequantized` draws the same u for the levels
    of a data set, and returns float32.
    """
    low, high = checks.pair("data_range", data_range)
    bins = checks.integer("bins", bins, 2, 2**32)
    if isinstance(levels, Tensor):
        check_dense("levels", levels)
        if levels.is_meta:
            raise DeviceError("levels is on the meta device, which holds no data")
        levels = resolved(levels)
    if (
        not isinstance(levels, Tensor)
        or levels.is_floating_point()
        or levels.is_complex()
        or levels.dtype == torch.bool
    ):
        kind = levels.dtype if isinstance(levels, Tensor) else short(levels)
        raise DataError(f"levels must be a tensor of integers >= 0 and <= {bins - 1}, got {kind}: use levels.long()")
    if levels.ndim < 2:
        raise ShapeError(
            f"levels must have shape [B, *] with at least one axis after B, got {list(levels.shape)}: "
            f"use levels[:, None] for samples of one number"
        )
    if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < bins:
        raise DataError(
            f"levels must be >= 0 and <= {bins - 1}, got values from {int(levels.min())} to {int(levels.max())}: "
            f"give the right bins="
        )
    u = bin_noise(len(levels), tuple(levels.shape[1:]), seed, draw, first_sample, levels.device)
    return low + (high - low) * ((levels.double() + u) / bins)


def bin_noise(
    count: int, shape: tuple[int, ...], seed: Any, draw: Any, first_sample: Any, device: torch.device | None = None
) -> Tensor:
    """The u ~ U[0, 1) of uniform dequantisation, float32 [count, *shape]: row i is that of (seed, draw, first_sample + i)."""
    return uniform(
        count, shape, seed=checks.integer("seed", seed, 0, 2**64 - 1),
        draw=checks.integer("draw", draw, 0, 2**32 - 1), stream=AUGMENTATION, device=device,
        first_sample=checks.integer("first_sample", first_sample, 0, 2**32 - count),
    )  # fmt: skip


@lru_cache(maxsize=32)
def bin_edges(bins: int, a: float, b: float) -> tuple[Edges, Edges, Edges]:
    """float32 (level, low, high), each [bins]: level k when [a, b] is divided evenly, the first and last float of bin k."""
    edges = np.linspace(a, b, bins + 1)
    low = edges.astype(np.float32)
    low = np.where(low < edges, np.nextafter(low, np.float32(np.inf)), low)
    high = np.nextafter(low[1:], np.float32(-np.inf))
    if (high < low[:-1]).any():
        raise ConfigError(
            f"data_range must be wide enough for {bins} bins in float32, got ({a:.9g}, {b:.9g}): widen it"
        )
    level = np.linspace(a, b, bins).astype(np.float32)
    level[1:-1] = level[1:-1].clip(low[1:-2], high[1:-1])
    return level, low[:-1], high
