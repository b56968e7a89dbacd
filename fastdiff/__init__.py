"""fastdiff: score-based diffusion models (DDPM, NCSN, SDE), every sampler one table of affine rows."""

from . import errors, grids, losses, mcmc, models, predictions, processes, samplers, schedules, training
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
    "SampleInfo",
    "ScoreModel",
    "StepTable",
    "SubVP",
    "Training",
    "errors",
    "grids",
    "load",
    "load_data",
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
