"""How good samples are: distances of two sets, copies of training data, and the coverage of posteriors."""

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
    "Estimate",
    "Nearest",
    "PrecisionRecall",
    "c2st",
    "classifier",
    "frechet",
    "kernel",
    "nearest",
    "precision_recall",
    "sliced_wasserstein",
]
