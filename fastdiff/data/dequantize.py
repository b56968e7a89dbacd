"""Uniform dequantisation of discrete data."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..errors import DataError, ShapeError
from ..execution.noise import AUGMENTATION, uniform


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

    Row i's u is that of (seed, draw, first_sample + i), from the stream that training with dequantize=True draws from.
    """
    low, high = checks.pair("data_range", data_range)
    bins = checks.integer("bins", bins, 2, 2**32)
    if not isinstance(levels, Tensor) or levels.is_floating_point() or levels.dtype == torch.bool:
        kind = levels.dtype if isinstance(levels, Tensor) else type(levels).__name__
        raise DataError(f"levels must be a tensor of integers 0 … {bins - 1}, got {kind}")
    if levels.ndim < 2:
        raise ShapeError(f"levels must have shape [B, *], an axis of samples first, got {tuple(levels.shape)}")
    if levels.numel() and not 0 <= int(levels.min()) <= int(levels.max()) < bins:
        raise DataError(f"levels must lie in 0 … {bins - 1}, got {int(levels.min())} … {int(levels.max())}")
    u = uniform(
        len(levels), levels.shape[1:], seed=checks.integer("seed", seed, 0, 2**64 - 1),
        draw=checks.integer("draw", draw, 0, 2**32 - 1), stream=AUGMENTATION, device=levels.device,
        first_sample=checks.integer("first_sample", first_sample, 0, 2**32 - len(levels)),
    )  # fmt: skip
    return low + (high - low) * ((levels.double() + u) / bins)
