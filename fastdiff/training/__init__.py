"""Training: data, the trainer, checkpoints."""

from .checkpoint import load, save
from .data import Data
from .readers import load_data
from .trainer import Training, train

__all__ = ["Data", "Training", "load", "load_data", "save", "train"]
