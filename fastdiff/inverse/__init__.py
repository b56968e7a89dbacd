"""Inverse problems y = A x0 + noise: posterior samples from an unconditional model."""

from .daps import DAPS
from .ddrm import DDRM
from .operators import Blur, Downsampling, Fourier, Grayscale, Mask, Matrix
from .posterior_mean import MMPS, TMPD, DiffPIR, PiGDM, ScoreALD
from .problem import Problem
from .smc import SMC

__all__ = [
    "DAPS",
    "DDRM",
    "MMPS",
    "SMC",
    "TMPD",
    "Blur",
    "DiffPIR",
    "Downsampling",
    "Fourier",
    "Grayscale",
    "Mask",
    "Matrix",
    "PiGDM",
    "Problem",
    "ScoreALD",
]
