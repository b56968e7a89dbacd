"""Inverse problems y = A x0 + noise: posterior samples from an unconditional model."""

from .daps import DAPS
from .ddrm import DDRM
from .dps import DPS
from .operators import Blur, Downsampling, Fourier, Grayscale, Mask, Matrix
from .posterior_mean import MMPS, TMPD, DiffPIR, PiGDM, ScoreALD
from .problem import Problem
from .projection import ILVR, NoisedMeasurement
from .replacement import RePaint, Replacement
from .smc import SMC

__all__ = [
    "DAPS",
    "DDRM",
    "DPS",
    "ILVR",
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
    "NoisedMeasurement",
    "PiGDM",
    "Problem",
    "RePaint",
    "Replacement",
    "ScoreALD",
]
