"""Guidance of the state: what is done to x after each row, beside or instead of a change of the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..errors import ConfigError
from ..execution.loop import Change
from ..guidance.base import Bound
from ..table import Level, Row, StepTable
from .jumps import with_jumps

DATA = Level(0.0, 1.0, 0.0)  # where the last row is taken to end: its state is returned as data


class Arrival(NamedTuple):
    """The end of a row.

    number, row  of the table
    level        on which the row ends, `DATA` for the last
    samples      of the run, those of this batch
    """

    number: int
    row: Row
    level: Level
    samples: slice


class StateBound(Bound):
    """A method that changes the state, made ready for one run."""

    guides, follows = False, True
    jumps: tuple[int, int] | None = None  # RePaint's jump_length and resamplings
    known: tuple[Tensor, Tensor] | None = None  # x0 in the network's units, and the mask where it is; [count, *]

    def retabled(self, table: StepTable) -> StepTable:
        """The table to run, ConfigError where the method has no meaning on some row."""
        return table if self.jumps is None else with_jumps(table, *self.jumps)

    def after(self, arrival: Arrival, x: Tensor) -> None:
        """Change in place the state x [B, *] that a row has left; where `follows` is True."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """The samples [count, *] of samples in the data's units."""
        return x


class StateChanges:
    """All that the guidances of one run do to its states."""

    def __init__(self, bound: Sequence[StateBound]) -> None:
        known = [each.known for each in bound if each.known is not None]
        if len(known) > 1:
            raise ConfigError("guidance must have one method that sets what is known, got two: give one of them")
        self.known = known[0] if known else None
        self.bound, self.following = bound, [each for each in bound if each.follows]
        self.masks = self.known is not None
        self.uncaptured = "the guidance changes the state after each row" if self.following else None

    def retabled(self, table: StepTable) -> StepTable:
        for each in self.bound:
            table = each.retabled(table)
        return table

    def of(self, table: StepTable, lo: int, hi: int) -> Change:
        """For samples lo … hi − 1 of a run."""
        levels = [*(row.level for row in table.rows[1:]), DATA]

        def after(k: int, x: Tensor) -> None:
            for each in self.following:
                each.after(Arrival(k, table.rows[k], levels[k], slice(lo, hi)), x)

        known, mask = (None, None) if self.known is None else (part[lo:hi] for part in self.known)
        return Change(known, mask, after if self.following else None)

    def finish(self, x: Tensor) -> Tensor:
        for each in self.bound:
            x = each.finish(x)
        return x


def state_changes(bound: Sequence[Bound]) -> StateChanges | None:
    """Those of a run, None where its guidances change predictions alone."""
    of_states = [each for each in bound if isinstance(each, StateBound)]
    return StateChanges(of_states) if of_states else None
