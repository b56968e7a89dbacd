"""Solvers as rows: each a pure function of a grid's steps that returns one list of rows for each step.

`own(level, meaning, ...)` in a solver says what h_0 means there, as (r, w) of r·x0 + w·ε; the planner turns that into
the p, q of the network's own prediction.
"""

from __future__ import annotations

from .ancestral import ancestral, ddim
from .corrected import sa, unipc
from .draft import Draft
from .heun import Churn, dpm_2, euler_ode, heun
from .langevin import annealed_langevin, corrector, denoising, ula
from .multistep import deis, dpmpp_multistep, lms
from .reverse_diffusion import euler_maruyama, reverse_diffusion
from .singlestep import dpm_solver, dpmpp_2s

__all__ = [
    "Churn",
    "Draft",
    "ancestral",
    "annealed_langevin",
    "corrector",
    "ddim",
    "deis",
    "denoising",
    "dpm_2",
    "dpm_solver",
    "dpmpp_2s",
    "dpmpp_multistep",
    "euler_maruyama",
    "euler_ode",
    "heun",
    "lms",
    "reverse_diffusion",
    "sa",
    "ula",
    "unipc",
]
