"""Checks of plain arguments, without torch: each returns the value or raises a ConfigError of one sentence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .errors import ConfigError, short


def integer(argument: str, value: Any, low: int, high: int) -> int:
    """A whole number in [low, high]: Python's or numpy's; bool and floats are refused even when whole."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if not whole or not low <= value <= high:
        raise ConfigError(f"{argument} must be an integer >= {low} and <= {_power(high)}, got {short(value)}")
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
    if real and isinstance(value, (int, np.integer)) and abs(int(value)) >= 2**1024:  # which no float holds
        real = False
    above, below = above or math.isinf(low), below or math.isinf(high)
    if not real or not low <= value <= high or (above and value == low) or (below and value == high):
        interval = f"{'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}"
        raise ConfigError(f"{argument} must be a number in {interval}, got {short(value)}")
    return float(value)


def pair(argument: str, value: Any, dtype: str = "float64") -> tuple[float, float]:
    """Two finite numbers, the lower first, which stay apart and finite as numbers of `dtype`."""
    try:
        lo, hi = sequence(argument, value)
    except ValueError:  # not two, or refused by `sequence`
        lo = hi = math.nan
    with np.errstate(over="ignore"):
        width = float(np.diff(np.array((lo, hi)).astype(dtype).astype(np.float64))[0])
    if not 0 < width < math.inf:
        where = "" if dtype == "float64" else f" in {dtype}"
        raise ConfigError(f"{argument} must be two finite numbers (lo, hi) with lo < hi{where}, got {short(value)}")
    return lo, hi


def sequence(argument: str, value: Any) -> tuple[float, ...]:
    """Finite numbers from a list, a tuple, an array or a tensor of one axis."""
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
    ) as error:  # RuntimeError: a tensor that holds no numbers
        raise ConfigError(f"{argument} must be a list of numbers, got {short(value)}") from error
    mixed = isinstance(value, (list, tuple)) and any(isinstance(number, (bool, np.bool_)) for number in value)
    if array.ndim != 1 or mixed or (array.dtype.kind not in "iuf" and array.size):
        raise ConfigError(f"{argument} must be a list of numbers, got {short(value)}")
    bad = np.flatnonzero(~np.isfinite(array.astype(np.float64)))
    if len(bad):
        raise ConfigError(f"{argument} must be finite, got {array[bad[0]]} at index {bad[0]}")
    return tuple(array.astype(np.float64).tolist())


def flag(argument: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ConfigError(f"{argument} must be True or False, got {short(value)}")
    return bool(value)


def function(argument: str, value: Any) -> Any:
    """None or something that can be called."""
    if value is not None and not callable(value):
        raise ConfigError(f"{argument} must be callable or None, got {short(value)}")
    return value


def _power(n: int) -> str:
    bits = (n + 1).bit_length() - 1
    return f"2**{bits} - 1" if n + 1 == 1 << bits and bits >= 32 else str(n)
