"""Solvers that choose their steps against score_sde_pytorch's, at equal measured error: log-likelihoods, and samples by rk45.

The same trained network, start and probe. Both stand against our solution in float64 at a tolerance of 1e-8, which SciPy's
eighth-order pair on score_sde_pytorch's own flow must confirm. Theirs has its default tolerance, 1e-5; ours the loosest up to
which the mean error in nats, or the samples' root mean square distance, is not above theirs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from cases import ours as run_of
from peers import Labelled, missing, score_sde, score_sde_flow
from problems import PROBLEMS, counted, distance, double, start_of, trained
from recorder import Solution, compare_solutions, loosest
from torch import Tensor

import fastdiff
from fastdiff import samplers
from fastdiff.execution import ops
from fastdiff.execution.noise import PROBES

PEER = "score_sde_pytorch"
STEPS = {"each sample's steps": False, "couple=True": True}
Theirs = Callable[[Any], tuple[Tensor, int]]  # network -> values and evaluations


class Question(NamedTuple):
    """What is asked of a trained network.

    data       problem -> what ours and theirs start from
    ours       (network, data, tolerance, couple) -> values, mean evaluations
    error      of values against the reference's
    most       that theirs may be off, or it has another probe, time or flow
    confirm    (network in float64, data in float64) -> a few of the values by SciPy's pair on their flow
    apart      the least distance from those that refutes the reference, by their error
    """

    data: Callable[[str], Tensor]
    ours: Callable[..., tuple[Tensor, float]]
    theirs: Callable[[Tensor], Theirs]
    error: Callable[[Tensor, Tensor], float]
    most: float
    confirm: Callable[[Any, Tensor], Tensor]
    apart: Callable[[float], float]
    tolerances: tuple[float, ...]
    seconds: float


# --- log-likelihoods, t from 1e-5 to 1 -------------------------------------------------------------------------------


def probe(x: Tensor) -> Tensor:
    """What fastdiff.log_likelihood draws."""
    drawn = torch.empty_like(x)
    torch.ops.fastdiff.rademacher(drawn, ops.cursor(0, 0, 0), PROBES)
    return drawn


def our_nats(net: Any, x: Tensor, tolerance: float, couple: bool = False) -> tuple[Tensor, float]:
    found = fastdiff.log_likelihood(
        net, x, "vp", prediction="eps", t_min=1e-5, rtol=tolerance, atol=tolerance, couple=couple, progress=False
    )
    return found.nats, float(found.nfe.double().mean())


def their_nats(x: Tensor) -> Theirs:
    _, sde_lib, likelihood = score_sde()
    function = likelihood.get_likelihood_fn(sde_lib.VPSDE(), lambda x: x)
    to_nats = -x[0].numel() * math.log(2)

    def run(net: Any) -> tuple[Tensor, int]:
        before = torch.randint_like
        torch.randint_like = lambda *_, **__: (probe(x) + 1) / 2  # type: ignore[assignment]
        try:
            bits, _, evaluations = function(Labelled(net), x)
        finally:
            torch.randint_like = before
        return to_nats * (bits.double() - 8), evaluations  # of images in [-1, 1]; ours are as they stand

    return run


def confirmed_nats(net: Any, x: Tensor) -> Tensor:
    end, integral = score_sde_flow(net, x[:2], 1e-5, 1.0, probe(x[:2]))
    return integral - 0.5 * (end.square() + math.log(2 * math.pi)).flatten(1).sum(1)


# --- samples, t from 1 to 1e-3 ---------------------------------------------------------------------------------------


def our_samples(net: Any, start: Tensor, tolerance: float, couple: bool = False) -> tuple[Tensor, float]:
    sampler = samplers.Adaptive(rtol=tolerance, atol=tolerance, couple=couple)
    x, info = run_of("vp", net, start, sde="vp", sampler=sampler, t_min=1e-3)(return_info=True, dtype=start.dtype)
    return x, float(info.nfe.double().mean())


def their_samples(start: Tensor) -> Theirs:
    sampling, sde_lib, _ = score_sde()
    sampler = sampling.get_ode_sampler(sde_lib.VPSDE(), tuple(start.shape), lambda x: x, eps=1e-3, device=start.device)
    return lambda net: sampler(Labelled(net), start)


QUESTIONS = {
    "likelihood": Question(
        lambda name: trained(name)[1], our_nats, their_nats, lambda a, b: float((a - b).abs().mean()), 0.1,
        confirmed_nats, lambda error: error / 100, (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2), 2.0,
    ),
    "rk45": Question(
        lambda name: start_of(trained(name)[1]), our_samples, their_samples, distance, 0.01,
        lambda net, start: score_sde_flow(net, start[:4], 1.0, 1e-3)[0], lambda error: 1e-6,
        (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5), 1.0,
    ),
}  # fmt: skip


@functools.cache
def reference(group: str, name: str) -> Tensor:
    question = QUESTIONS[group]
    return question.ours(double(trained(name)[0]), question.data(name).double(), 1e-8)[0]


@functools.cache
def their_solution(group: str, name: str) -> Solution:
    question, net = QUESTIONS[group], trained(name)[0]
    run, copied = question.theirs(question.data(name)), counted(net)
    values, evaluations = run(copied.net)
    error = question.error(values, reference(group, name))
    if not error <= question.most:
        raise AssertionError(f"{name}: {PEER} is {error:.2g} off: another probe, time or flow")
    few = question.confirm(double(net), question.data(name).double())
    apart, most = float((few - reference(group, name)[: len(few)]).abs().max()), question.apart(error)
    if not apart <= most:
        raise AssertionError(f"{name}: the reference is {apart:.2g} off, more than {most:.2g}")
    return Solution(lambda: run(net), 1e-5, error, evaluations, copied.calls)


def our_solution(group: str, name: str, couple: bool, tolerance: float) -> Solution:
    question, net = QUESTIONS[group], trained(name)[0]
    copied, data = counted(net), question.data(name)
    values, evaluations = question.ours(copied.net, data, tolerance, couple)
    error = question.error(values, reference(group, name))
    return Solution(lambda: question.ours(net, data, tolerance, couple), tolerance, error, evaluations, copied.calls)


@pytest.mark.filterwarnings("ignore")  # the peer's own
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("group", QUESTIONS)
def test_equal_error(benchmark, recorder, group, name, steps):
    reason = missing(PEER)
    if reason:
        pytest.skip(reason)
    question, theirs = QUESTIONS[group], their_solution(group, name)
    ours = loosest(functools.partial(our_solution, group, name, STEPS[steps]), question.tolerances, theirs.error)
    benchmark.group = f"{group}: {name}"
    numbers = trained(name)[1].numel()
    case = f"{name}; {steps}"
    benchmark.extra_info["whole"] = compare_solutions(
        recorder, group, case, PEER, numbers, ours, theirs, question.seconds
    )
    benchmark.pedantic(ours.run, rounds=1)
