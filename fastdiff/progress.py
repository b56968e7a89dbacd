"""Progress bars."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(progress: bool | None, total: int, what: str, unit: str, first: int = 0) -> Any:
    """A bar on stderr; None: if that is a terminal."""
    shown = sys.stderr.isatty() if progress is None else progress
    # n is a fraction where samples are under way together
    form = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    return tqdm(initial=first, total=total, desc=what, unit=unit, disable=not shown, leave=False, bar_format=form)
