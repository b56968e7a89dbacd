"""Solvers as rows: each a pure function of a grid's steps that returns one list of rows for each step.

`own(level, meaning, ...)` in a solver says what h_0 means there, as (r, w) of r·x0 + w·ε; the planner turns that into
the p, q of the network's own prediction.
"""

from __future__ import annotations

from .ancestral import ancestral, ddim
from .draft import Draft
from .heun import euler_ode, heun
from .langevin import annealed_langevin, corrector, denoising, ula
from .reverse_diffusion import euler_maruyama, reverse_diffusion

__all__ = [
    "Draft",
    "ancestral",
    "annealed_langevin",
    "corrector",
    "ddim",
    "denoising",
    "euler_maruyama",
    "euler_ode",
    "heun",
    "reverse_diffusion",
    "ula",
]
