"""A cache of results that serves processes and samplers without a hash too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def cached(maxsize: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """functools.lru_cache, by type and value; a call whose arguments do not hash, such as a user's own process that may change,
    is made anew."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        kept = functools.lru_cache(maxsize=maxsize, typed=True)(function)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            try:
                return kept(*args)
            except TypeError:
                if _hash(args):
                    raise
                return function(*args)

        call.cache_info, call.cache_clear = kept.cache_info, kept.cache_clear  # type: ignore[attr-defined]
        return call

    return decorate


def _hash(args: tuple[Any, ...]) -> bool:
    """Whether all of them hash."""
    try:
        hash(args)
    except TypeError:
        return False
    return True
