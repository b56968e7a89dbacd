"""What is seen of a run: progress bars, and NVTX ranges (sampler, row, network, kernel), free where nobody listens."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from tqdm import tqdm

from .. import checks

F = TypeVar("F", bound=Callable[..., Any])

# set by the profilers that listen (NVTX's own protocol)
_INJECTED = ("NVTX_INJECTION64_PATH", "NVTX_INJECTION32_PATH")


def listening() -> bool:
    """Whether a profiler listens to this process, or FASTDIFF_NVTX=1 says so."""
    variable = os.environ.get("FASTDIFF_NVTX", "")
    wanted = any(map(os.environ.get, _INJECTED)) if variable == "" else variable != "0"
    return wanted and importlib.util.find_spec("nvtx") is not None


def range(name: str) -> contextlib.AbstractContextManager[Any]:
    """A range for a `with` block."""
    if not listening():
        return contextlib.nullcontext()
    import nvtx

    return nvtx.annotate(name, domain="fastdiff")  # type: ignore[no-any-return]


def marker() -> Callable[[str, F], F]:
    """(name, function) -> the function within a range of that name; itself if no profiler listens now."""
    return _marked if listening() else lambda name, function: function


def _marked(name: str, function: F) -> F:
    @functools.wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        with range(name):
            return function(*args, **kwargs)

    return within  # type: ignore[return-value]


class NoBar(contextlib.nullcontext[Any]):
    """A bar that nobody sees: tqdm's disabled one takes as long to make as a tenth of a small run."""

    def __enter__(self) -> NoBar:
        return self

    def update(self, n: float = 1) -> None: ...

    def set_postfix(self, **values: object) -> None: ...


def bar(progress: bool | None, total: int, what: str, unit: str, first: int = 0) -> Any:
    """A bar on stderr; None: if that is a terminal."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not (terminal if progress is None else checks.flag("progress", progress)):
        return NoBar()
    # n is a fraction where samples are under way together
    form = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return tqdm(initial=first, total=total, desc=what, unit=unit, leave=False, bar_format=form)
