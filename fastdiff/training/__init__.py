"""Training and checkpoints (data sets are in fastdiff.data, and here by their former names)."""

from ..data import Data, load_data
from .averages import posthoc_ema
from .checkpoint import save
from .classifier import TimeClassifier, train_classifier
from .sources import load
from .torch_file import load_tensors
from .trainer import Training, train

__all__ = [
    "Data",
    "TimeClassifier",
    "Training",
    "load",
    "load_data",
    "load_tensors",
    "posthoc_ema",
    "save",
    "train",
    "train_classifier",
]
