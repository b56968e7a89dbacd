"""A cache of results for processes and samplers, also of the user's own, which need not hash and may change."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any


def cached(
    room: int, weight: Callable[[Any], int] = lambda result: 1
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Keep a function's latest results, whose weights add up to `room` at most and each to a fifth of it, by the types and
    values of its arguments.

    An object of the user's own counts by its attributes as they are at the call; where they are no plain numbers, names,
    arrays and such objects, the result is made anew.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # No lock, which an interrupt could leave locked for ever: a dict's own operations are whole between threads, and what
        # two of them lose to each other is made anew.
        kept: dict[Any, tuple[Any, int]] = {}

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            try:
                key = _Key(args)
            except (TypeError, RecursionError):
                return function(*args)
            found = kept.pop(key, None)
            if found is not None:
                kept[key] = found  # as the latest
                return found[0]
            result = function(*args)
            heavy = weight(result)
            if heavy * 5 <= room:  # one that is larger would drive out most of the others
                kept[key] = result, heavy
                total = sum(each for _, each in list(kept.values()))
                for oldest in list(kept):
                    if total <= room:
                        break
                    total -= kept.pop(oldest, (None, 0))[1]
            return result

        return call

    return decorate


class _Key:
    """The arguments' types and values, hashed once."""

    __slots__ = ("hashed", "parts")

    def __init__(self, args: tuple[Any, ...]) -> None:
        parts = [arg if type(arg) in _PLAIN or _constant(arg) else _told(arg) for arg in args]
        self.parts = (*parts, *map(type, args))
        self.hashed = hash(self.parts)

    def __hash__(self) -> int:
        return self.hashed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.parts == other.parts


_ATOMS = frozenset((int, float, complex, str, bytes, bool, type(None)))
_PLAIN = _ATOMS | {tuple}


def _constant(arg: Any) -> bool:
    """Whether an argument cannot change: plain values, and fastdiff's own frozen objects of nothing else."""
    kind = type(arg)
    if kind.__module__.partition(".")[0] != "fastdiff":
        return False
    if isinstance(arg, tuple):
        return True
    frozen = getattr(kind, "__dataclass_params__", None)
    if frozen is None or not frozen.frozen:
        return False
    values = [getattr(arg, name) for name in kind.__match_args__]
    return all([type(value) in _PLAIN or _constant(value) for value in values])


def _told(value: Any) -> Any:
    """What a value is now, as something that hashes; TypeError where that cannot be told."""
    kind = type(value)
    if kind in _ATOMS:
        return kind, value
    if kind in (list, tuple):
        return (kind, *map(_told, value))
    if kind is dict:
        return (kind, *((_told(key), _told(entry)) for key, entry in value.items()))
    if isinstance(value, type) or (kind is FunctionType and value.__closure__ is None):
        return value
    if hasattr(value, "detach"):  # a tensor's copy is told by where it lies
        return kind, _told(value.detach().cpu().numpy())
    parts = value.__reduce_ex__(4)  # as a copy of it would be made; of what cannot be copied it raises
    if not isinstance(parts, tuple):
        raise TypeError(f"{kind.__name__} is known by a name alone")
    make, arguments, *state = parts
    return (kind, make, *(_told(list(each) if isinstance(each, Iterator) else each) for each in (arguments, *state)))
