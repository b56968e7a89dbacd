"""A row as a solver writes it: h_0 in the solver's own meaning, before the network's prediction is known."""

from __future__ import annotations

from dataclasses import dataclass

from ...table import Level, Measure

# What a prediction h means, as (r, w) of h = r·x0 + w·ε.
Meaning = tuple[float, float]
X0: Meaning = (1.0, 0.0)
EPS: Meaning = (0.0, 1.0)


def score(level: Level) -> Meaning:
    """∇ log p = −ε/σ."""
    return (0.0, -1.0 / level.sigma if level.sigma > 0 else float("nan"))


@dataclass(frozen=True, slots=True)
class Draft:
    """x ← a·x + e·base + b_0·h_0 + b_1·h_1 + … + c·z, see fastdiff.table; `meaning` None: the row calls no model."""

    level: Level
    label: str
    a: float
    b: tuple[float, ...] = ()
    meaning: Meaning | None = None
    e: float = 0.0
    c: float = 0.0
    saves_base: bool = False
    keeps_prediction: bool = True  # a Langevin row does not: its prediction must not shift a multistep history
    clips: bool = True  # nor is its score clipped
    measure: Measure | None = None
    log_variance: tuple[float, float] | None = None


Drafts = list[list[Draft]]
