"""fastdiff: score-based diffusion models (DDPM, NCSN, SDE), every sampler one table of affine rows."""

from . import errors, grids, losses, mcmc, models, predictions, processes, samplers, schedules, training
from .likelihood import LogLikelihood, bits_per_dim, decode, dequantize, encode, interpolate, log_likelihood
from .model import ScoreModel
from .ops import normal
from .plan import plan
from .processes import DDPM, EDM, NCSN, OU, VE, VP, SubVP
from .sampling import SampleInfo, sample
from .table import StepTable
from .training import Data, Training, load, load_data, save, train

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
