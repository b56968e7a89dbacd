"""Training and checkpoints (data sets are in fastdiff.data, and here by their former names)."""

from ..data import Data, load_data
from .checkpoint import load, save
from .trainer import Training, train

__all__ = ["Data", "Training", "load", "load_data", "save", "train"]
