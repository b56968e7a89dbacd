"""How good samples are: distances of two sets, copies of training data, and the coverage of posteriors."""

from .calibration import SBC, TARP, coverage_plot, sbc_ranks, tarp
from .distances import (
    Estimate,
    Nearest,
    PrecisionRecall,
    c2st,
    frechet,
    kernel,
    nearest,
    precision_recall,
    sliced_wasserstein,
)
from .features import classifier

__all__ = [
    "SBC",
    "TARP",
    "Estimate",
    "Nearest",
    "PrecisionRecall",
    "c2st",
    "classifier",
    "coverage_plot",
    "frechet",
    "kernel",
    "nearest",
    "precision_recall",
    "sbc_ranks",
    "sliced_wasserstein",
    "tarp",
]
