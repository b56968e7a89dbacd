"""Posteriors: a call of the guided network against the other libraries', and what the calls buy where the truth is known.

The same network, operator, levels, iterations of the solver, and draws: 2×2 pixels' means are measured, along a ladder of
EDM. A call is measured whole, and outside of the network: without its forward pass and vector-Jacobian products, by clocks
around both. The errors are those of examples/posteriors.py: distances to exact draws, in those of two exact sets.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Clock, Subject, clock, noise_from
from peers import Run, load, missing
from recorder import turns
from torch import Tensor

import fastdiff
from fastdiff import grids, guidance, inverse

pytestmark = pytest.mark.usefixtures("kept_memory")

CASES = {"analytic 64x3x32x32": 6.0, "demo U-Net 16x1x8x8": 12.0}  # seconds
STEPS, HIGH, LOW, NOISE = 20, 80.0, 0.02, 0.1
LEVELS = torch.logspace(*np.log10([HIGH, LOW]), STEPS + 1, dtype=torch.float64).tolist()


def operator(x: Tensor) -> Tensor:
    """Means of 2×2 pixels, in a row, as azula's solvers have it."""
    return F.avg_pool2d(x, 2).flatten(1)


def azula(net: Any, start: Tensor, y: Tensor, name: str, **options: Any) -> Run:
    """One of its guided denoisers, or of its samplers, on a schedule of its own with the ladder's levels."""
    sample, denoise, noise, guide = (load(f"azula.{part}") for part in ("sample", "denoise", "noise", "guidance"))

    class Denoiser(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = noise.VESchedule(LOW, HIGH)

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return denoise.DiracPosterior(mean=net(x, self.schedule(t)[1].expand(len(x))))

    how, denoiser = {"start": 1.0, "stop": 0.0, "steps": STEPS, "silent": True}, Denoiser()
    if name.endswith("Sampler"):
        run = getattr(guide, name)(denoiser, y=y, A=operator, **options, **how)
    else:
        run = sample.DDPMSampler(getattr(guide, name)(denoiser, y=y, A=operator, **options), **how)
    return lambda: run(start)


def deepinv(net: Any, start: Tensor, y: Tensor, name: str, **options: Any) -> Run:
    """Its posterior diffusion with one of its data terms and its ancestral sampler, in float64, which is its default."""
    sampling, physics = load("deepinv.sampling"), load("deepinv.physics")

    class Denoiser(torch.nn.Module):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return net(x, sigma.flatten().expand(len(x)))

    sde = sampling.EDMDiffusionSDE(
        sigma_t=lambda t: t, sigma_prime_t=torch.ones_like, variance_exploding=True, alpha=1.0, T=HIGH,
        denoiser=Denoiser(), minus_one_one=False,
    )  # fmt: skip
    run = sampling.PosteriorDiffusion(
        getattr(sampling, name)(denoiser=Denoiser(), **options), Denoiser(), sde,
        sampling.DDPMSolver(timesteps=torch.tensor(LEVELS)), minus_one_one=False,
    )  # fmt: skip
    measured = physics.LinearPhysics(
        A=lambda x, **_: F.avg_pool2d(x, 2), A_adjoint=lambda v, **_: F.interpolate(v, scale_factor=2) / 4,
        noise_model=physics.GaussianNoise(NOISE),
    )  # fmt: skip
    shaped = y.view(1, start.shape[1], start.shape[2] // 2, -1).expand(len(start), -1, -1, -1)
    return lambda: run(shaped, measured, x_init=start, denoise_output=False)


class Method(NamedTuple):
    """A method by each library; `exact`: for the same noise their samples are ours."""

    ours: Callable[[inverse.Problem], guidance.Guidance]
    opponent: str
    build: Callable[..., Run]  # of network, start and y
    exact: bool = True


def _variance(v: Tensor) -> Tensor:
    return NOISE**2 * v


METHODS = {
    **{
        f"MMPS, {n} iteration{'s' * (n > 1)}": Method(
            partial(inverse.MMPS, iterations=n), "azula",
            partial(azula, name="MMPSDenoiser", cov_y=_variance, solver="cg", iterations=n),
        )
        for n in (1, 3)
    },
    "TMPD, diagonal": Method(
        partial(inverse.TMPD, diagonal=True), "azula", partial(azula, name="TMPDenoiser", var_y=NOISE**2)
    ),
    "DiffPIR": Method(
        partial(inverse.DiffPIR, regularization=10.0), "azula", partial(azula, name="DiffPIRDenoiser", var_y=NOISE**2)
    ),
    # whose norm is one of the whole batch
    "DPS": Method(inverse.DPS, "azula", partial(azula, name="DPSSampler"), exact=False),
    "MMPS, 3 iterations, deepinv's": Method(
        partial(inverse.MMPS, iterations=3), "deepinv", partial(deepinv, name="MomentMatchingDataFidelity", cg_max_iter=3)
    ),
    "PiGDM": Method(inverse.PiGDM, "deepinv", partial(deepinv, name="PiGDMDataFidelity")),
}  # fmt: skip


class Passes:
    """A network with the seconds of its forward passes and of all vector-Jacobian products."""

    def __init__(self, net: Any) -> None:
        self.forward, self.backward = Clock(net), 0.0
        self.net = self.forward.net

    def timed(self, run: Run) -> tuple[float, float]:
        """Microseconds of a call, whole and outside of the passes."""
        grad = torch.autograd.grad

        def product(*args: Any, **kwargs: Any) -> Any:
            began = clock()
            made = grad(*args, **kwargs)
            self.backward += clock() - began
            return made

        before, began = self.forward.seconds + self.backward, clock()
        with mock.patch.object(torch.autograd, "grad", product):
            run()
        whole = clock() - began
        return 1e6 * whole / STEPS, 1e6 * (whole - (self.forward.seconds + self.backward - before)) / STEPS


def _distance(ours: Callable[..., Tensor], theirs: Run, noise: Iterator[Tensor]) -> float:
    """How far their samples are from ours for the same noise, relative to the largest number of ours."""
    drawn = list(itertools.islice(noise, STEPS))
    mine = iter(drawn)
    x = ours(noise=lambda row: next(mine))
    # deepinv fills a tensor by its own method
    with noise_from(iter(drawn)), mock.patch.object(Tensor, "normal_", lambda self, **_: torch.randn_like(self)):
        y = theirs()
    return float((x - y).abs().max() / x.abs().max())


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_call(benchmark, recorder, name, method):
    known = METHODS[method]
    if reason := missing(known.opponent):
        pytest.skip(reason)
    subject = Subject(name, "edm")
    y = 0.5 * operator(subject.normals[:1])
    passes = [Passes(subject.network()) for _ in range(2)]
    shape = (subject.shape[1], subject.shape[2] // 2, subject.shape[3] // 2)
    problem = inverse.Problem(y.view(shape), inverse.Downsampling(2), NOISE)
    ours = subject.ours(
        passes[0].net,
        sde="edm",
        sampler="ancestral",
        grid=grids.sigmas(LEVELS),
        denoise=False,
        guidance=known.ours(problem),
    )
    theirs = known.build(passes[1].net, subject.start, y)
    apart = _distance(ours, theirs, subject.noise())
    # (a random network's Jacobian is no covariance: rounding errors grow in what is solved with it)
    if known.exact and name.startswith("analytic") and not apart <= 20 * subject.case.tolerance:
        raise AssertionError(f"{method}: {known.opponent}'s samples differ by {apart:.2g}")
    calls = [each.forward.calls for each in passes]
    if calls != [STEPS, STEPS]:
        raise AssertionError(f"{method}: calls of the network {calls}, not {STEPS}")
    benchmark.group, n = f"inverse problems: {name}", subject.normals.numel()
    systems = {"ours": lambda: passes[0].timed(ours), known.opponent: lambda: passes[1].timed(theirs)}
    times = turns(systems, CASES[name], least=5)
    for k, metric in enumerate(("us a call", "us a call outside forward and backward")):
        each = {system: [value[k] for value in values] for system, values in times.items()}
        benchmark.extra_info[metric] = recorder.pairs("inverse problems", f"{name}, {method}", n, metric, each)[
            known.opponent
        ]
    benchmark.pedantic(ours, rounds=1)


# --- what the calls buy ----------------------------------------------------------------------------------------------

DRAWS = 1000
Sampled = tuple[Tensor, int]  # the draws, and the calls of the network


@pytest.fixture
def posteriors(monkeypatch):
    """The example, which has priors whose posteriors are known."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    return importlib.import_module("posteriors")


def azula_draws(case: Any, seed: int, name: str, **options: Any) -> Sampled:
    """Its guided denoiser beneath its DDPM sampler, 100 steps of its own schedule, the exact x̂0."""
    sample, denoise, noise, guide = (load(f"azula.{part}") for part in ("sample", "denoise", "noise", "guidance"))
    schedule, calls = noise.VPSchedule(), []

    class Denoiser(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule
            self.x0 = case.prior.denoiser(
                SimpleNamespace(alpha=lambda t: schedule(t)[0], sigma=lambda t: schedule(t)[1])
            )

        def forward(self, x: Tensor, t: Tensor) -> Any:
            calls.append(len(x))
            return denoise.DiracPosterior(mean=self.x0(x, t.expand(len(x))))

    matrix, y = case.matrix.float(), case.y.float()
    made = getattr(guide, name)(Denoiser(), y=y, A=lambda x: x @ matrix.T, **options)
    sampler = sample.DDPMSampler(made, start=1.0, stop=0.0, steps=100, silent=True)
    torch.manual_seed(seed)
    return sampler(sampler.init((DRAWS, matrix.shape[1]))), len(calls)


def deepinv_draws(case: Any, seed: int) -> Sampled:
    """Its moment matching beneath its DDPM sampler, 100 steps on its VP diffusion, the exact x̂0."""
    sampling, physics = load("deepinv.sampling"), load("deepinv.physics")
    x0 = case.prior.denoiser(SimpleNamespace(alpha=torch.ones_like, sigma=lambda sigma: sigma))
    matrix, calls = case.matrix.float(), []

    class Denoiser(torch.nn.Module):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            calls.append(len(x))
            return x0(x.flatten(1), sigma.flatten().expand(len(x))).view_as(x)

    sde = sampling.VariancePreservingDiffusion(denoiser=Denoiser(), alpha=1.0, minus_one_one=False)
    many, numbers = matrix.shape
    run = sampling.PosteriorDiffusion(
        sampling.MomentMatchingDataFidelity(denoiser=Denoiser(), cg_max_iter=many), Denoiser(), sde,
        sampling.DDPMSolver(
            timesteps=torch.linspace(1, 1e-3, 101), rng=torch.Generator().manual_seed(seed)
        ), minus_one_one=False,
    )  # fmt: skip
    measured = physics.LinearPhysics(
        A=lambda x, **_: (x.flatten(1) @ matrix.T.to(x.dtype))[..., None, None],
        A_adjoint=lambda v, **_: (v.flatten(1) @ matrix.to(v.dtype))[..., None, None],
        noise_model=physics.GaussianNoise(case.noise_std),
    )  # fmt: skip
    y = case.y.float().view(1, many, 1, 1).expand(DRAWS, -1, -1, -1)
    drawn = run(y, measured, x_init=(DRAWS, numbers, 1, 1), denoise_output=False)
    return drawn.flatten(1).float(), len(calls)


def _azula_mmps(case: Any, seed: int) -> Sampled:
    return azula_draws(
        case, seed, "MMPSDenoiser", cov_y=lambda v: case.noise_std**2 * v, solver="cg", iterations=len(case.y)
    )


# what they call it -> the library, and draws of a case by a seed
OTHERS: dict[str, tuple[str, Callable[[Any, int], Sampled]]] = {
    "MMPS, exact": ("azula", _azula_mmps),
    "TMPD": ("azula", lambda case, seed: azula_draws(case, seed, "TMPDenoiser", var_y=case.noise_std**2)),
    "moment matching": ("deepinv", deepinv_draws),
}


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("theirs", OTHERS)
@pytest.mark.parametrize("ours", ["MMPS, UniPC, 20 steps", "SMC"])
@pytest.mark.parametrize("problem", ["vector", "modes"])
def test_error(benchmark, recorder, posteriors, problem, ours, theirs):
    library, draw = OTHERS[theirs]
    if reason := missing(library):
        pytest.skip(reason)
    kind, method, process = posteriors.PROBLEMS[problem], posteriors.METHODS[ours], fastdiff.VP()
    errors, calls = [], []
    for seed in range(kind.seeds):
        case = kind.make(np.random.default_rng(seed))
        mine, used, _ = posteriors.drawn(case, method, process, 100, DRAWS, seed)
        other, others = draw(case, seed)
        errors.append([posteriors.compared(x, case, seed)[-1] for x in (mine, other)])
        calls.append([used, others])
    benchmark.group = f"posteriors: {problem}"
    for metric, found in (("distance in that of two exact sets", errors), ("calls of the network", calls)):
        pair = [list(map(float, each)) for each in zip(*found)]
        benchmark.extra_info[metric] = recorder.row(
            "posteriors", f"{problem}, {ours}; theirs: {theirs}", DRAWS, metric, pair[0], library, pair[1]
        )
    benchmark.pedantic(lambda: posteriors.drawn(case, method, process, 100, DRAWS, 0), rounds=1)
