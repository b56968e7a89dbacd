"""Log-likelihoods of trained networks against score_sde_pytorch's: the same network object and probe, at equal measured error.

Both stand against our solution in float64 at a tolerance of 1e-8, which SciPy's eighth-order pair on score_sde_pytorch's own
flow must confirm to a hundredth of what it measures. Theirs has its default tolerance, 1e-5; ours the loosest of TOLERANCES
up to which the mean error in nats is not above theirs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from paired import Solution, compare_solutions, loosest
from peers import Labelled, missing, score_sde, score_sde_flow
from problems import PROBLEMS, counted, double, trained
from torch import Tensor

import fastdiff
from fastdiff.execution import ops
from fastdiff.execution.noise import PROBES

PEER = "score_sde_pytorch"
START = 1e-5
TOLERANCES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
STEPS = {"each sample's steps": False, "couple=True": True}


def probe(x: Tensor) -> Tensor:
    """What fastdiff.log_likelihood draws."""
    drawn = torch.empty_like(x)
    torch.ops.fastdiff.rademacher(drawn, ops.cursor(0, 0, 0), PROBES)
    return drawn


def ours(net: Any, x: Tensor, tolerance: float, couple: bool = False) -> fastdiff.LogLikelihood:
    return fastdiff.log_likelihood(
        net, x, "vp", prediction="eps", t_min=START, rtol=tolerance, atol=tolerance, couple=couple, progress=False
    )


def theirs(x: Tensor) -> Callable[[Any], tuple[Tensor, int]]:
    """net -> nats and evaluations."""
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


@functools.cache
def reference(name: str) -> Tensor:
    net, x = trained(name)
    return ours(double(net), x.double(), 1e-8).nats


def error(name: str, nats: Tensor) -> float:
    return float((nats - reference(name)).abs().mean())


def check_reference(name: str, largest: float) -> None:
    """A few samples' log-likelihoods by another solver, in another variable, on another library's flow."""
    net, x = trained(name)
    x = x[:2].double()
    with torch.no_grad():
        end, integral = score_sde_flow(double(net), x, START, 1.0, probe(x))
    prior = -0.5 * (end.square() + math.log(2 * math.pi)).flatten(1).sum(1)
    apart = float((prior + integral - reference(name)[:2]).abs().max())
    if not apart <= largest:
        raise AssertionError(f"{name}: the reference is {apart:.2g} nats off, more than {largest:.2g}")


@functools.cache
def their_solution(name: str) -> Solution:
    net, x = trained(name)
    run, copied = theirs(x), counted(net)
    nats, evaluations = run(copied.net)
    found = error(name, nats)
    if not found <= 0.1:
        raise AssertionError(f"{name}: {PEER} is {found:.2g} nats off: another probe, time or flow")
    check_reference(name, found / 100)
    return Solution(lambda: run(net), 1e-5, found, evaluations, copied.calls)


def our_solution(name: str, couple: bool) -> Callable[[float], Solution]:
    def solve(tolerance: float) -> Solution:
        net, x = trained(name)
        copied = counted(net)
        found = ours(copied.net, x, tolerance, couple)
        run = lambda: ours(net, x, tolerance, couple)  # noqa: E731
        return Solution(run, tolerance, error(name, found.nats), float(found.nfe.double().mean()), copied.calls)

    return solve


@pytest.mark.filterwarnings("ignore")  # the peer's own
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_log_likelihood(benchmark, name, steps):
    reason = missing(PEER)
    if reason:
        pytest.skip(reason)
    their = their_solution(name)
    mine = loosest(our_solution(name, STEPS[steps]), TOLERANCES, their.error)
    benchmark.group = f"likelihood: {name}"
    numbers = trained(name)[1].numel()
    benchmark.extra_info["whole"] = compare_solutions("likelihood", f"{name}; {steps}", PEER, numbers, mine, their, 2.0)
    benchmark.pedantic(mine.run, rounds=1)
