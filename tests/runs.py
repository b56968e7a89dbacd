"""The runs that several tests repeat: every sampler of fixed steps on every process, and one for each kind of table."""

from __future__ import annotations

from typing import NamedTuple

import fastdiff
from fastdiff.execution import loop
from fastdiff.planning.processes import PROCESSES
from fastdiff.planning.samplers import DDIM, SAMPLERS, Ancestral, AnnealedLangevin, Heun, PredictorCorrector

CHOOSE_THEIR_STEPS = ("rk45", "adaptive_sde")
OPTIONS = (
    AnnealedLangevin(steps_per_level=3),
    DDIM(0.5),
    Heun(s_churn=3.0),
    PredictorCorrector(corrector="langevin", norm="sample"),
    PredictorCorrector("none", order="predictor_first"),
)
COUPLED = PredictorCorrector(corrector="langevin", norm="batch")


class Case(NamedTuple):
    sde: str
    sampler: object
    steps: int


LEARNED = Case("ddpm", Ancestral(variance="learned_range"), 8)  # its network has twice the channels


def every_run():
    """Each process with each sampler that has a table, in about eight rows."""
    for sde in PROCESSES:
        for sampler in (*SAMPLERS, *OPTIONS, COUPLED):
            if sampler not in CHOOSE_THEIR_STEPS:  # no other is left out: one that refuses a process fails its tests
                steps = 9 if isinstance(sampler, AnnealedLangevin) else 10 if sampler == "annealed_langevin" else 8
                yield Case(sde, sampler, steps)


def one_of_each_kind():
    """Of `every_run` the first of those whose rows differ only in coefficients, which the loop and the graphs do not see."""
    first = {}
    for case in every_run():
        table = fastdiff.plan(case.sde, case.steps, sampler=case.sampler)
        first.setdefault(tuple(loop.plans(table, True)), case)
    return list(first.values())
