"""Data sets: arrays and files of any shape, scaled to a model's units."""

from .data import Data
from .dequantize import dequantize
from .lazy import LazyData
from .readers import load_data

__all__ = ["Data", "LazyData", "dequantize", "load_data"]
