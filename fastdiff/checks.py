"""Checks of plain arguments, without torch: each returns the value or raises a ConfigError of one sentence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .errors import ConfigError


def integer(argument: str, value: Any, low: int, high: int) -> int:
    """A whole number in [low, high]: Python's or numpy's; bool and floats are refused even when whole."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if not whole or not low <= value <= high:
        raise ConfigError(f"{argument} must be an integer >= {low} and <= {_power(high)}, got {value!r}")
    return int(value)


def number(
    argument: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """A number in [low, high], bounds left out where `above`, `below` say so or where they are infinite."""
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, (bool, np.bool_))
    above, below = above or math.isinf(low), below or math.isinf(high)
    if not real or not low <= value <= high or (above and value == low) or (below and value == high):
        interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
        raise ConfigError(f"{argument} must be a number in {interval}, got {value!r}")
    return float(value)


def pair(argument: str, value: Any) -> tuple[float, float]:
    """Two finite numbers, the lower first."""
    try:
        low, high = (float(v) for v in value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{argument} must be two numbers (lo, hi), got {value!r:.80}") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{argument} must be finite with lo < hi, got ({low:g}, {high:g})")
    return low, high


def _power(n: int) -> str:
    bits = (n + 1).bit_length() - 1
    return f"2**{bits} - 1" if n + 1 == 1 << bits and bits >= 32 else str(n)
