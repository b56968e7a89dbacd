"""One family of errors. Each is also the builtin a caller would expect, so plain `except ValueError` works.

A message is one sentence: the argument, the value received, the rule, and the way out.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class FastdiffError(Exception):
    """Any error that fastdiff raises on purpose."""


class ConfigError(FastdiffError, ValueError):
    """An argument, or a combination of arguments, that is not allowed."""


class ShapeError(FastdiffError, ValueError):
    """A tensor of the wrong shape or layout."""


class DTypeError(FastdiffError, TypeError):
    """A tensor of the wrong dtype, or something that is no tensor."""


class DeviceError(FastdiffError, ValueError):
    """Tensors that live on different devices, or on one that holds no data."""


class DataError(FastdiffError, ValueError):
    """Data that is empty, not finite, or out of its range."""


class ModelOutputError(FastdiffError, ValueError):
    """The network returned a tensor of the wrong shape or device."""


class ModelOutputTypeError(ModelOutputError, TypeError):
    """The network returned something that is not one tensor."""


class GraphError(FastdiffError, RuntimeError):
    """A loop that cannot be captured as a CUDA graph."""


class NonFiniteError(FastdiffError, FloatingPointError):
    """A state became NaN or infinite: its `row`, time `t` and the global indices of the `samples` concerned."""

    def __init__(self, message: str, row: int, t: float, samples: tuple[int, ...]) -> None:
        super().__init__(message)
        self.row, self.t, self.samples = row, t, samples

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, int, float, tuple[int, ...]]]:
        return type(self), (str(self), self.row, self.t, self.samples)  # so that a worker process can raise it


class SolverError(FastdiffError, RuntimeError):
    """An adaptive solver cannot go on: `reason`, the index of the `sample`, its `t`, `nfe` and `last_step`."""

    def __init__(self, reason: str, sample: int, t: float, nfe: int, last_step: float) -> None:
        super().__init__(
            f"{reason} at t = {t:.6g} after {nfe} evaluations of sample {sample} (last step {last_step:.3g})"
        )
        self.reason, self.sample, self.t, self.nfe, self.last_step = reason, sample, t, nfe, last_step

    def __reduce__(self) -> tuple[type[SolverError], tuple[str, int, float, int, float]]:
        return type(self), (self.reason, self.sample, self.t, self.nfe, self.last_step)


class WriteError(FastdiffError, OSError):
    """A result that could not be written; what stood in its place is as it was."""


class CheckpointError(FastdiffError, RuntimeError):
    """A checkpoint that cannot be read or written."""


class CorruptCheckpointError(CheckpointError):
    """The file is not what `fastdiff.save` wrote."""


class CheckpointVersionError(CheckpointError):
    """The file was written by a newer format."""


class CheckpointMismatchError(CheckpointError):
    """The tensors in the file are not those of the network."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the caller's own line: the first outside of fastdiff."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None:
        package = str(frame.f_globals.get("__name__")).split(".")[0]
        if package not in ("fastdiff", "contextlib", "importlib"):
            break
        frame, level = frame.f_back, level + (package != "importlib")  # whose frames `warnings` does not count
    warnings.warn(message, category, stacklevel=level)


def names_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with a TypeError that names the nearest keyword for an unknown one."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f": did you mean {near[0]!r}?" if near else f", only {', '.join(names)}"
                raise TypeError(f"{function.__name__}() takes no keyword {name!r}{hint}")
        return function(*args, **kwargs)

    return checked


def choose(argument: str, value: object, valid: Iterable[str]) -> str:
    """`value` if it is one of `valid`, else a ConfigError that lists them and names the nearest."""
    names = list(valid)
    if isinstance(value, str) and value in names:
        return value
    if isinstance(value, type):
        raise ConfigError(f"{argument} must be an object or a name, got the class itself: write {value.__name__}()")
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)  # names of two letters are half alike
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    shown = names if len(names) <= 12 else difflib.get_close_matches(str(value), names, n=6, cutoff=0.0)
    more = "" if len(shown) == len(names) else f" or {len(names) - len(shown)} others"
    raise ConfigError(f"{argument} must be one of {', '.join(map(repr, shown))}{more}, got {value!r}{hint}")
