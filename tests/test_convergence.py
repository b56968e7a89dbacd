"""Errors fall with the steps, for every deterministic solver and order on its own grid, on a flow whose score is exact."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import fastdiff
from fastdiff import samplers

ANGLES = torch.arange(8, dtype=torch.float64) * (2 * math.pi / 8)
CENTRES, SPREAD = torch.stack([ANGLES.cos(), ANGLES.sin()], 1), 0.1
PROCESSES = {process.name: process for process in (fastdiff.VP(), fastdiff.VE(), fastdiff.SubVP(), fastdiff.EDM())}
STEPS = (8, 16, 32, 64)
SOLVERS = [
    samplers.DDIM(),
    samplers.ODE(),
    samplers.Heun(),
    samplers.DPM2(),
    samplers.EulerMaruyama(lam=0.0),
    samplers.ReverseDiffusion(lam=0.0),
    samplers.DPMSolverPP2S(),
    *(samplers.LMS(order=order) for order in (1, 2, 3, 4)),
    *(samplers.DEIS(order=order) for order in (1, 2, 3)),
    *(samplers.DPMSolver(order=order) for order in (1, 2, 3)),
    *(samplers.DPMSolverPP(order=order) for order in (1, 2, 3)),
    *(samplers.DPMSolverPP(order=3, third=third) for third in ("authors", "k_diffusion")),
    *(samplers.DPMSolverSinglestep(order=order) for order in (2, 3)),
    *(samplers.UniPC(order=order, variant=variant) for order in (1, 2, 3) for variant in ("bh1", "bh2")),
    *(samplers.UniPC(order=order, corrector=False) for order in (2, 3)),
    samplers.UniPC(predicts="eps"),
    samplers.SA(tau=0.0),
]


def mixture(process):
    """Eight Gaussians on a circle."""

    def score(x, t):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        variance = (alpha * SPREAD) ** 2 + sigma**2
        away = x[:, None] - alpha[..., None] * CENTRES.to(x)
        share = torch.softmax(-(away**2).sum(2) / (2 * variance), 1)
        return -(share[..., None] * away).sum(1) / variance

    return fastdiff.ScoreModel(score, process, "score", data_shape=(2,))


@pytest.fixture(scope="module", params=PROCESSES)
def flow(request):
    """(model, start, the flow's end at no noise by SciPy in y = x/α over σ̂ = σ/α, how far two ends at the lowest noise are)."""
    process = PROCESSES[request.param]
    model = mixture(process)
    start = process.prior_std * fastdiff.normal(64, (2,), seed=5).double()
    first, last = (float(process.sigma_hat(np.array(t))) for t in (process.t_start, process.t_min))

    def slope(log_ratio, y):  # dy/d ln σ̂ = σ̂ ε = −σ̂ σ score
        ratio = math.exp(log_ratio)
        t = torch.full((64,), float(process.time(np.array(ratio))), dtype=torch.float64)
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return (-ratio * sigma * model.net(alpha * torch.from_numpy(y).view(64, 2), t)).flatten().numpy()

    y = start / process.alpha(np.array(process.t_start))
    solved = solve_ivp(
        slope,
        (math.log(first), math.log(1e-7)),
        y.flatten().numpy(),
        "DOP853",
        [math.log(last), math.log(1e-7)],
        rtol=1e-10,
        atol=1e-10,
    )
    noisy, end = (torch.from_numpy(solved.y[:, k]).view(64, 2) for k in (0, 1))
    t = torch.full((64,), process.t_min, dtype=torch.float64)
    denoised = model.predict("x0", noisy * process.alpha(np.array(process.t_min)), t)
    return model, start, end, rms(denoised - end), rms(noisy - end)


def rms(x):
    return float(x.square().mean().sqrt())


def errors(flow, solver, steps):
    model, start, end, *_ = flow
    options = {"sampler": solver, "x_init": start, "num_samples": 64, "progress": False}
    return [rms(fastdiff.sample(model, steps=n, **options) - end) for n in steps]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_errors_fall_with_the_steps(flow, solver):
    """Until only what lies below the lowest noise is left: a run ends there, or steps over it at once."""
    found = errors(flow, solver, STEPS)
    *_, over, below = flow
    floor = 2 * max(over, below)
    for earlier, later in itertools.pairwise(found):
        assert later < earlier or later < floor, found
    assert found[-1] < max(0.2 * found[0], floor)


@functools.cache
def converged():
    """The digits' model, a run's options, and where its flow ends."""
    model = fastdiff.load("digits-vp")
    options = {"x_init": fastdiff.normal(16, model.data_shape, seed=5), "num_samples": 16, "progress": False}
    return (
        model,
        options,
        fastdiff.sample(model, sampler=samplers.Adaptive(rtol=1e-5, atol=1e-5, denoise=True), **options),
    )


@pytest.mark.parametrize("solver", [samplers.UniPC(order=3), samplers.DPMSolverPP(order=3)], ids=str)
def test_third_orders_gain_by_few_steps_on_a_trained_network(solver):
    """They were worse at 8 steps than at 5, on levels that were even in t."""
    model, options, end = converged()
    found = [rms(fastdiff.sample(model, sampler=solver, steps=n, **options) - end) for n in (5, 8, 12, 20)]
    assert found == sorted(found, reverse=True)
    assert found[1] < 0.05
