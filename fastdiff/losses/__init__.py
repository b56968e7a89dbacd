"""Training objectives: a loss (what is matched), a weight (how much each time counts), times (which are drawn)."""

from . import bound, times, weights
from .bound import Levels, VariationalBound, levels_of, vlb
from .objectives import (
    BOUNDED,
    DENOISING,
    LOSSES,
    PROBE_KINDS,
    SLICED,
    check,
    differentiating,
    pair,
    per_sample,
    perturb,
)

__all__ = [
    "BOUNDED",
    "DENOISING",
    "LOSSES",
    "PROBE_KINDS",
    "SLICED",
    "Levels",
    "VariationalBound",
    "bound",
    "check",
    "differentiating",
    "levels_of",
    "pair",
    "per_sample",
    "perturb",
    "times",
    "vlb",
    "weights",
]
