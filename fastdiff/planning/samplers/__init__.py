"""Sampler objects: one file a family, with options, equation, paper and rows of each sampler on one page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...errors import ConfigError, choose
from ..processes import Process, require_linear
from .adaptive import Adaptive, AdaptiveSDE
from .ancestral import DDIM, Ancestral
from .base import Sampler
from .dpm_solver import DPMSolver, DPMSolverPP2S, DPMSolverSinglestep
from .langevin import ULA, AnnealedLangevin
from .multistep import DEIS, LMS, DPMSolverPP
from .ode import DPM2, ODE, Heun
from .predictor_corrector import PREDICTORS, PredictorCorrector
from .reverse_sde import EulerMaruyama, ReverseDiffusion
from .unipc_sa import SA, UniPC

__all__ = [
    "DDIM",
    "DEIS",
    "DPM2",
    "LMS",
    "ODE",
    "PREDICTORS",
    "SA",
    "SAMPLERS",
    "ULA",
    "Adaptive",
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "DPMSolver",
    "DPMSolverPP",
    "DPMSolverPP2S",
    "DPMSolverSinglestep",
    "EulerMaruyama",
    "Heun",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "UniPC",
    "get",
    "variance_of",
    "with_variance",
]

SAMPLERS: dict[str, Callable[[], Sampler]] = {
    **PREDICTORS,
    "annealed_langevin": AnnealedLangevin,
    "ula": ULA,
    "pc": PredictorCorrector,
    "dpm_singlestep": DPMSolverSinglestep,
    "unipc": UniPC,
    "sa": SA,
    "rk45": Adaptive,
    "adaptive_sde": AdaptiveSDE,
}


def get(sampler: object, process: Process) -> Sampler:
    """A sampler from its name, itself, or None: the process's default."""
    require_linear(process, "sampling", "integrate its reverse SDE on model.score(x, t)")
    sampler = process.default_sampler if sampler is None else sampler
    if isinstance(sampler, Sampler):
        return sampler
    return SAMPLERS[choose("sampler", sampler, SAMPLERS)]()


def variance_of(sampler: object) -> str | None:
    """ "learned" or "learned_range" if a sampler, or a predictor-corrector's predictor, has the network give its variance."""
    if isinstance(sampler, PredictorCorrector):
        return variance_of(sampler.predicting)
    variance = sampler.variance if isinstance(sampler, Ancestral) else None
    return variance if variance in ("learned", "learned_range") else None


def with_variance(sampler: Sampler, variance: str) -> Sampler:
    """The sampler with the model's `variance`, where it is ancestral and has none; refused where it has another."""
    own = variance_of(sampler)
    if own not in (None, variance):
        raise ConfigError(f"variance={own!r} of the sampler is not what the model learned, {variance!r}: leave it out")
    if isinstance(sampler, PredictorCorrector) and sampler.predicting is not None:
        return replace(sampler, predictor=with_variance(sampler.predicting, variance))
    return (
        replace(sampler, variance=variance) if isinstance(sampler, Ancestral) and sampler.variance is None else sampler
    )
