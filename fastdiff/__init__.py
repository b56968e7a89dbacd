"""fastdiff: score-based diffusion models (DDPM, NCSN, SDE), every sampler one table of affine rows."""

from . import errors, grids, mcmc, samplers, schedules
from .model import ScoreModel
from .ops import normal
from .plan import plan
from .processes import DDPM, EDM, NCSN, OU, VE, VP, SubVP
from .sampling import SampleInfo, sample
from .table import StepTable

__version__ = "0.1.0"

__all__ = [
    "DDPM",
    "EDM",
    "NCSN",
    "OU",
    "VE",
    "VP",
    "SampleInfo",
    "ScoreModel",
    "StepTable",
    "SubVP",
    "errors",
    "grids",
    "mcmc",
    "normal",
    "plan",
    "sample",
    "samplers",
    "schedules",
]
