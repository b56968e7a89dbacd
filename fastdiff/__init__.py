"""fastdiff: score-based diffusion models (DDPM, NCSN, SDE), every sampler one table of affine rows.

Public is what this module shows; the packages `planning` and `execution` are the two halves behind it.
"""

import sys as _sys

from . import errors, guidance, inverse, losses, mcmc, metrics, networks, training
from .autoencoder import Autoencoder
from .conventions import Check, check
from .data import Data, dequantize, load_data
from .execution import graphs
from .execution.ops import normal
from .likelihood import LogLikelihood, bits_per_dim, decode, encode, interpolate, log_likelihood
from .losses import VariationalBound, vlb
from .model import ScoreModel
from .optimization import optimize
from .planning import grids, predictions, processes, samplers, schedules
from .planning.plan import plan
from .planning.processes import DDPM, EDM, NCSN, OU, VE, VP, RectifiedFlow, SubVP
from .sampling import SampleInfo, colorize, inpaint, sample
from .table import StepTable
from .training import TimeClassifier, Training, load, load_tensors, posthoc_ema, save, train, train_classifier

models = networks  # its former name

# so that `from fastdiff.samplers import DDIM` finds what `fastdiff.samplers.DDIM` does
for _alias in ("graphs", "grids", "predictions", "processes", "samplers", "schedules", "models"):
    _module = globals()[_alias]
    # with what lies in a package, or an import of that would make a second copy of its classes
    for _name, _part in list(_sys.modules.items()):
        if _name == _module.__name__ or _name.startswith(f"{_module.__name__}."):
            _sys.modules[f"{__name__}.{_alias}{_name.removeprefix(_module.__name__)}"] = _part
del _alias, _module, _name, _part, _sys

__version__ = "0.1.0"

__all__ = [
    "DDPM",
    "EDM",
    "NCSN",
    "OU",
    "VE",
    "VP",
    "Autoencoder",
    "Check",
    "Data",
    "LogLikelihood",
    "RectifiedFlow",
    "SampleInfo",
    "ScoreModel",
    "StepTable",
    "SubVP",
    "TimeClassifier",
    "Training",
    "VariationalBound",
    "bits_per_dim",
    "check",
    "colorize",
    "decode",
    "dequantize",
    "encode",
    "errors",
    "graphs",
    "grids",
    "guidance",
    "inpaint",
    "interpolate",
    "inverse",
    "load",
    "load_data",
    "load_tensors",
    "log_likelihood",
    "losses",
    "mcmc",
    "metrics",
    "models",
    "networks",
    "normal",
    "optimize",
    "plan",
    "posthoc_ema",
    "predictions",
    "processes",
    "sample",
    "samplers",
    "save",
    "schedules",
    "train",
    "train_classifier",
    "training",
    "vlb",
]
