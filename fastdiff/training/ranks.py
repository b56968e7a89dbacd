"""The processes of a run: which of them this one is."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..errors import ConfigError, short


class Launch(NamedTuple):
    """What torchrun says to a process: its number among all (rank), how many there are, its number on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def device(self, name: str) -> str:
        """The device of this process: each on a machine has a GPU of its own where `name` is "cuda"."""
        return f"cuda:{self.local}" if name == "cuda" and self.world > 1 else name


def launched() -> Launch:
    """From the variables RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; one process where RANK or WORLD_SIZE lacks."""
    given = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not (given[0] and given[1]):
        return Launch()
    rank, world, local = (
        int(text) if text.isascii() and text.isdecimal() else -1 for text in [*given[:2], given[2] or given[0]]
    )
    if not (0 <= rank < world and local >= 0):
        raise ConfigError(
            f"RANK, WORLD_SIZE and LOCAL_RANK must be 0 <= rank < world size, as torchrun sets them, got "
            f"{', '.join(map(short, given))}: unset them for one process"
        )
    return Launch(rank, world, local)
