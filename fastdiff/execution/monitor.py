"""What is seen of a run: progress bars, and NVTX ranges (sampler, row, network, kernel), free where nobody listens."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

# set by the profilers that listen (NVTX's own protocol)
_INJECTED = ("NVTX_INJECTION64_PATH", "NVTX_INJECTION32_PATH")


def listening() -> bool:
    """Whether a profiler listens to this process, or FASTDIFF_NVTX=1 says so."""
    asked = os.environ.get("FASTDIFF_NVTX", "")
    wanted = any(map(os.environ.get, _INJECTED)) if asked == "" else asked != "0"
    return wanted and importlib.util.find_spec("nvtx") is not None


def range(name: str) -> contextlib.AbstractContextManager[Any]:
    """A range for a `with` block."""
    if not listening():
        return contextlib.nullcontext()
    import nvtx

    return nvtx.annotate(name, domain="fastdiff")


def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function within a range of this name if somebody listens, else itself."""
    if not listening():
        return function

    @functools.wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        with range(name):
            return function(*args, **kwargs)

    return within


def bar(progress: bool | None, total: int, what: str, unit: str, first: int = 0) -> Any:
    """A bar on stderr; None: if that is a terminal."""
    shown = sys.stderr.isatty() if progress is None else progress
    # n is a fraction where samples are under way together
    form = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return tqdm(initial=first, total=total, desc=what, unit=unit, disable=not shown, leave=False, bar_format=form)
