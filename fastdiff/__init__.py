"""fastdiff: score-based diffusion models (DDPM, NCSN, SDE), every sampler one table of affine rows.

Public is what this module shows; the packages `planning` and `execution` are the two halves behind it.
"""

import sys

from . import errors, losses, mcmc, networks, training
from .data import Data, dequantize, load_data
from .execution.ops import normal
from .likelihood import LogLikelihood, bits_per_dim, decode, encode, interpolate, log_likelihood
from .model import ScoreModel
from .planning import grids, predictions, processes, samplers, schedules
from .planning.plan import plan
from .planning.processes import DDPM, EDM, NCSN, OU, VE, VP, SubVP
from .sampling import SampleInfo, sample
from .table import StepTable
from .training import Training, load, save, train

models = networks  # its former name

# so that `from fastdiff.samplers import DDIM` finds what `fastdiff.samplers.DDIM` does
for _module in (grids, predictions, processes, samplers, schedules):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
sys.modules[f"{__name__}.models"] = networks

__version__ = "0.1.0"

__all__ = [
    "DDPM",
    "EDM",
    "NCSN",
    "OU",
    "VE",
    "VP",
    "Data",
    "LogLikelihood",
    "SampleInfo",
    "ScoreModel",
    "StepTable",
    "SubVP",
    "Training",
    "bits_per_dim",
    "decode",
    "dequantize",
    "encode",
    "errors",
    "grids",
    "interpolate",
    "load",
    "load_data",
    "log_likelihood",
    "losses",
    "mcmc",
    "models",
    "networks",
    "normal",
    "plan",
    "predictions",
    "processes",
    "sample",
    "samplers",
    "save",
    "schedules",
    "train",
    "training",
]
