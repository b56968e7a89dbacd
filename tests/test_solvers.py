"""Solvers against the algorithms as their papers print them, row by row, and against closed forms."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from oracles import Gaussian, Mixture, measured_order

import fastdiff
from fastdiff import predictions, samplers
from fastdiff.errors import ConfigError
from fastdiff.papers import score_based
from fastdiff.planning.grids import sigmas
from fastdiff.planning.processes import PROCESSES, get
from fastdiff.planning.samplers import (
    DDIM,
    DEIS,
    DPM2,
    SA,
    ULA,
    AdaptiveSDE,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ReverseDiffusion,
    UniPC,
)

B, D = 5, 3


def nonlinear(x, t):
    """Some smooth network; t is a float for the papers, a [B] tensor for fastdiff."""
    t = t[:, None] if isinstance(t, torch.Tensor) and t.ndim else t
    return torch.tanh(0.8 * x) - 0.3 * torch.cos(2 * x + 0.1 * t)


def minus(x, t):
    return -nonlinear(x, t)


def states(model, sde, steps=None, **options):
    """Every state after its row, float64 [rows, B, D], with the start and the noise that `case` shares with the score_based."""
    options = {"num_samples": B, "shape": (D,), "x_init": X, "noise": NOISE, "dtype": torch.float64, **options}
    plan_keys = ("sampler", "grid", "t_min", "denoise", "prediction", "clip", "time_input")
    rows = len(fastdiff.plan(sde, steps, **{k: v for k, v in options.items() if k in plan_keys}))
    options["noise"] = options["noise"][:rows]
    return fastdiff.sample(model, sde, steps, trajectory=rows + 1, **options)[1][1:]


GENERATOR = torch.Generator().manual_seed(7)
X = torch.randn(B, D, generator=GENERATOR, dtype=torch.float64)
NOISE = torch.randn(300, B, D, generator=GENERATOR, dtype=torch.float64)


def noise(k):
    return NOISE[k]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for k, (a, b) in enumerate(zip(ours, theirs)):
        scale = 1 + b.abs().max()
        assert ((a - b).abs().max() / scale) <= 1e-12, f"row {k}: {(a - b).abs().max():.3g} on {scale:.3g}"


# --- row by row ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_is_algorithm_2(variance):
    process = fastdiff.DDPM("linear", T=60)
    ours = states(nonlinear, process, sampler=Ancestral(variance), prediction="eps", time_input="t")
    same(ours, score_based.ddpm_sample(nonlinear, X, process.beta_table, noise, variance))


def test_learned_range_is_nichol_and_dhariwals():
    process = fastdiff.DDPM("cosine", T=40)

    def both(x, t):
        return nonlinear(x, t), torch.sin(3 * x)

    ours = states(
        lambda x, t: torch.cat(both(x, t), 1),
        process,
        sampler=Ancestral("learned_range"),
        prediction="eps",
        time_input="t",
    )
    same(ours, score_based.improved_ddpm_sample(both, X, process.beta_table, noise))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_equation_12(eta):
    process = fastdiff.DDPM()
    ours = states(nonlinear, process, 20, sampler=DDIM(eta), prediction="eps", time_input="t")
    times = np.arange(1000, -1, -50.0)
    same(ours, score_based.ddim_sample(nonlinear, X, process.alpha(times) ** 2, times[:-1], noise, eta))


@pytest.mark.parametrize("denoise", [True, False])
def test_annealed_langevin_is_algorithm_1(denoise):
    process = fastdiff.NCSN(fastdiff.schedules.geometric(2.0, 0.1, 6))
    ours = states(
        minus, process, 18, sampler=AnnealedLangevin(step_size=1e-3), denoise=denoise, time_input="sigma"
    )  # fmt: skip
    same(ours, score_based.annealed_langevin(minus, X, process.sigmas, 3, 1e-3, noise, denoise))


def test_ula_is_one_step_repeated():
    process = fastdiff.OU()
    ours = states(minus, process, 7, sampler=ULA(0.05), t_min=0.3)
    same(ours, score_based.ula(lambda x: minus(x, 0.3), X, 0.05, 7, noise))


def scaled(name):
    """A score with the scale and slope of a real one, −n(x/√(1 + σ²))/√(1 + σ²): a step must not amplify rounding."""
    process = get(name)

    def score(x, t):
        sigma = process.sigma(t)
        root = (1 + sigma**2) ** 0.5
        root = root[:, None] if isinstance(root, torch.Tensor) and root.ndim else float(root)
        return -nonlinear(x / root, t) / root

    return score


KERNELS = {"ve": score_based.ve, "vp": score_based.vp, "subvp": score_based.subvp}
N = 12


def song(name):
    """(start, times, levels) of N uniform steps, from the papers' own kernels."""
    kernel = KERNELS[name]
    times = np.linspace(1, 1e-5 if name == "ve" else 1e-3, N + 1).tolist()
    levels = [kernel(t) for t in times]
    start = X * (50.0 if name == "ve" else 1.0)
    return start, times, levels, score_based.transitions([k.alpha for k in levels], [k.sigma for k in levels])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("denoise", [True, False])
def test_reverse_diffusion_is_equation_46(name, denoise):
    score = scaled(name)
    start, times, _, steps = song(name)
    ours = states(score, name, N, sampler="reverse_diffusion", x_init=start, denoise=denoise)
    same(ours, score_based.reverse_diffusion(score, start, times[:-1], steps, noise, denoise=denoise))
    ours = states(score, name, N, sampler=ReverseDiffusion(lam=0.0), x_init=start)
    same(ours, score_based.reverse_diffusion(score, start, times[:-1], steps, noise, probability_flow=True))


@pytest.mark.parametrize("denoise", [True, False])
def test_ancestral_is_equations_4_and_47(denoise):
    score = scaled("ve")
    start, times, levels, _ = song("ve")
    ours = states(score, "ve", N, sampler="ancestral", x_init=start, denoise=denoise)
    same(ours, score_based.ancestral_ve(score, start, times[:-1], [k.sigma for k in levels], noise, denoise=denoise))
    for name in ("vp", "subvp"):
        score = scaled(name)
        start, times, _, steps = song(name)
        for variance in ("beta", "posterior"):
            ours = states(score, name, N, sampler=Ancestral(variance), x_init=start, denoise=denoise)
            same(ours, score_based.ancestral_vp(score, start, times[:-1], steps, noise, variance, denoise=denoise))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("lam", [1.0, 0.6, 0.0])
def test_euler_maruyama_and_the_family_down_to_the_ode(name, lam):
    score = scaled(name)
    start, times, _, _ = song(name)
    kernel = KERNELS[name]
    theirs = score_based.euler_maruyama(lambda t: kernel(t).f, lambda t: kernel(t).g, score, start, times, noise, lam)
    same(states(score, name, N, sampler=EulerMaruyama(lam), x_init=start), theirs)
    if lam == 0:
        same(states(score, name, N, sampler="ode", grid="uniform", x_init=start), theirs)


CORRECTORS = {
    "ald": lambda x, s, z, step, sigma: score_based.ald_step(x, s, z, 0.2, sigma, step.ratio**2),
    "batch": lambda x, s, z, step, sigma: score_based.langevin_step_batch_norm(x, s, z, 0.2, step.ratio**2),
    "sample": lambda x, s, z, step, sigma: score_based.langevin_step_sample_norm(
        x, s, z, 0.2, step.ratio**2, 4 * step.ratio**2 * (0.2 * sigma) ** 2
    ),
}


# without a predictor there is no order
ORDERS = [
    *itertools.product(("reverse_diffusion", "ancestral", "euler_maruyama"), ("corrector_first", "predictor_first")),
    ("none", "corrector_first"),
]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize(("predictor", "order"), ORDERS)
def test_predictor_corrector_is_algorithm_1(name, predictor, corrector, order):
    score = scaled(name)
    start, times, levels, steps = song(name)
    count = N + 1 if predictor == "none" else N

    def predict(x, i):
        s = score(x, times[i])
        if predictor == "euler_maruyama":
            level, dt = levels[i], times[i + 1] - times[i]
            return x + (level.f * x - level.g**2 * s) * dt, level.g * math.sqrt(-dt)
        rule = score_based.reverse_diffusion_step if predictor == "reverse_diffusion" else score_based.ancestral_step
        return rule(x, s, steps[i])

    def correct(x, i, z):
        step = steps[min(i, N - 1)] if order == "corrector_first" else steps[i - 1]
        return CORRECTORS[corrector](x, score(x, times[i]), z, step, levels[i].sigma)

    sampler = PredictorCorrector(
        predictor, "ald" if corrector == "ald" else "langevin", snr=0.2, corrector_steps=2, order=order,
        norm="sample" if corrector == "sample" else "batch",
    )  # fmt: skip
    ours = states(score, name, count, sampler=sampler, x_init=start)
    theirs = score_based.predictor_corrector(
        None if predictor == "none" else predict, correct, start, count, noise, corrector_steps=2, order=order
    )
    same(ours, theirs)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("leapfrog", [1, 2, 3, 5])
def test_the_hmc_corrector_is_the_leapfrog_of_a_momentum(name, leapfrog):
    """Half a kick, drifts and kicks (Neal 2011, eq. 5.18 to 5.20), where the rows know positions and scores alone."""
    score = scaled(name)
    start, times, levels, steps = song(name)
    sampler = PredictorCorrector("none", "hmc", snr=0.2, corrector_steps=2, leapfrog=leapfrog)
    ours = states(score, name, N + 1, sampler=sampler, x_init=start)
    x, row = start, 0
    for i in range(N + 1):
        epsilon = math.sqrt(2 * 2 * steps[min(i, N - 1)].ratio ** 2 * (0.2 * levels[i].sigma) ** 2)
        for _ in range(2):
            p = NOISE[row]
            for k in range(leapfrog):
                p = p + (0.5 if k == 0 else 1.0) * epsilon * score(x, times[i])
                x = x + epsilon * p
                assert (ours[row + k] - x).abs().max() < 1e-11 * max(1.0, float(x.abs().max()))
            row += leapfrog


def test_an_hmc_corrector_of_several_steps_is_nearer_than_as_many_of_ald():
    """N(0, 1) data, VE, 200 levels, the exact score and the corrector alone: variance 4.89 by ald, 1.41 by three steps of it
    at each, 1.10 by three leapfrog steps, which are as many calls."""
    process = get("ve")

    def variance(**options):
        sampler = PredictorCorrector("none", **options)
        net = exact("score", process, Gaussian([0.0, 0.0], std=1.0))
        return float(fastdiff.sample(net, process, 200, sampler=sampler, shape=(2,), num_samples=4000).var())

    assert variance(corrector="ald") == pytest.approx(4.89, abs=0.3)
    assert variance(corrector="ald", corrector_steps=3) == pytest.approx(1.41, abs=0.08)
    assert variance(corrector="hmc", leapfrog=3) == pytest.approx(1.10, abs=0.06)
    assert variance(corrector="hmc", leapfrog=5) == pytest.approx(1.03, abs=0.06)


def test_an_hmc_corrector_and_a_multistep_predictor_are_refused():
    with pytest.raises(ConfigError, match="both keep earlier predictions: use a predictor of single steps"):
        fastdiff.plan("vp", 5, sampler=PredictorCorrector("dpmpp_2m", "hmc"))
    fastdiff.plan("vp", 5, sampler=PredictorCorrector("dpmpp_2m", "hmc", leapfrog=2))  # which keeps none


REFERENCE = [
    ("ve", "reverse_diffusion", "langevin"),
    ("ve", "reverse_diffusion", "ald"),
    ("ve", "ancestral", "none"),
    ("ve", "euler_maruyama", "none"),
    ("ve", "none", "ald"),
    ("vp", "euler_maruyama", "none"),
    ("vp", "ancestral", "none"),
    ("vp", "reverse_diffusion", "langevin"),
    ("vp", "none", "langevin"),
    ("subvp", "euler_maruyama", "none"),
    ("subvp", "reverse_diffusion", "none"),
]


@pytest.mark.parametrize(
    ("name", "predictor", "corrector", "count"),
    # at N = β_max = 20 VP's β reaches 1, by whose complement its ancestral sampling divides
    [(*case, n) for n in (25, 20) for case in REFERENCE if n > 20 or case[:2] != ("vp", "ancestral")],
)
@pytest.mark.parametrize("denoise", [True, False])
def test_the_score_sde_grid_is_its_loop(name, predictor, corrector, count, denoise):
    score = scaled(name)
    start = song(name)[0]
    eps = 1e-5 if name == "ve" else 1e-3
    sampler = PredictorCorrector(predictor, corrector)
    ours = states(score, name, count, sampler=sampler, x_init=start, grid="score_sde", denoise=denoise)
    same(
        ours,
        score_based.score_sde_loop(name, score, start, count, noise, predictor, corrector, eps=eps, denoise=denoise),
    )


def denoiser(x, sigma):
    sigma = sigma[:, None] if isinstance(sigma, torch.Tensor) and sigma.ndim else sigma
    return torch.tanh(x / (1 + sigma)) + 0.1 * torch.sin(x)


def test_heun_is_karras_algorithm_1():
    grid = score_based.karras_sigmas(9)
    ours = states(denoiser, "edm", 9, grid="karras", x_init=80 * X, prediction="x0")
    same(ours, score_based.edm_deterministic(denoiser, 80 * X, grid))


GRID = score_based.karras_sigmas(9)


@pytest.mark.parametrize(
    ("s_churn", "s_max", "rows"), [(12.0, 50.0, 23), (2.0, 50.0, 23), (2.0, GRID[3], 22), (0.5, 1.0, 20)]
)
def test_heun_with_churn_is_karras_algorithm_2(s_churn, s_max, rows):
    """By the cap √2 − 1, by S_churn/N, and with a level that stands on S_max itself."""
    sampler = Heun(s_churn, 0.05, s_max, 1.003)
    ours = states(denoiser, "edm", 9, sampler=sampler, grid="karras", x_init=80 * X, prediction="x0")
    theirs = score_based.edm_stochastic(denoiser, 80 * X, GRID, noise, s_churn, 0.05, s_max, 1.003)
    same(ours, theirs)
    assert len(ours) == 17 + sum(0.05 <= sigma <= s_max for sigma in GRID)


def test_churn_on_vp_is_the_same_algorithm_on_x_over_alpha():
    vp = fastdiff.VP()

    def clean(x, t):  # of the VP state at time t
        return denoiser(x, t)

    def rescaled(x, ratio):  # the same network on x/α at σ̂
        t = float(vp.time(np.array([ratio]))[0])
        return clean(float(vp.alpha(t)) * x, t)

    ratios = [level.sigma / level.alpha for level in fastdiff.grids.build("karras", vp, 9, None).levels]
    start = ratios[0] * X
    theirs = score_based.edm_stochastic(rescaled, start, ratios, noise, 2.0, 0.02, 50.0, 1.01)
    sampler = Heun(2.0, 0.02, 50.0, 1.01)
    ours = states(clean, vp, 9, sampler=sampler, grid="karras", x_init=float(vp.alpha(1.0)) * start, prediction="x0")
    assert len(ours) == len(theirs) > 20
    assert (ours[-1] - theirs[-1]).abs().max() < 1e-9  # at σ = 0, where α = 1


def test_churn_never_asks_beyond_T():
    for name in ("edm", "vp", "ve", "ncsn"):
        process = get(name)
        table = fastdiff.plan(name, 9, sampler=Heun(s_churn=9.0), grid="karras")
        assert max(row.level.t for row in table.rows) <= process.T * (1 + 1e-9)
        assert sum(row.label == "churn" for row in table.rows) >= 8 - (name == "ncsn")


def test_edm_preconditioning_is_equation_7():
    def network(x, c_noise):
        c_noise = c_noise[:, None] if c_noise.ndim else c_noise
        return torch.tanh(x) + 0.2 * torch.sin(c_noise * x)

    theirs = score_based.edm_deterministic(
        score_based.edm_precondition(network, 0.7), 80 * X, score_based.karras_sigmas(9)
    )
    same(states(network, fastdiff.EDM(sigma_data=0.7), 9, grid="karras", x_init=80 * X, prediction="edm"), theirs)


@pytest.mark.parametrize("name", KERNELS)
def test_heun_in_process_time(name):
    score = scaled(name)
    start, times, _, _ = song(name)
    kernel = KERNELS[name]

    def velocity(x, t):
        return kernel(t).f * x - 0.5 * kernel(t).g ** 2 * score(x, t)

    ours = states(score, name, N, sampler="heun", grid="uniform", x_init=start)
    same(ours, score_based.heun_general(velocity, start, times))


def test_ode_on_noise_ratios_is_ddim():
    ratios = [20.0, 5.0, 1.0, 0.2, 0.0]
    ours = states(nonlinear, "vp", sampler="ode", grid=sigmas(ratios), prediction="eps")
    bars = [1 / (1 + r * r) for r in ratios]
    times = fastdiff.VP().time(np.array(ratios[:-1]))
    same(ours, score_based.ddim_sample(nonlinear, X, bars, times, noise))


def test_the_last_learned_variance_is_bounded_by_the_one_before():
    """Without denoise the last row keeps its noise; its lower bound β̃ = 0 is replaced by that of the step before."""
    process = fastdiff.DDPM("linear", T=30)

    def lowest(x, t):
        return torch.cat([0.1 * x, torch.full_like(x, -1.0)], 1)

    options = {"sampler": Ancestral("learned_range"), "prediction": "eps"}
    noisy, clean = (states(lowest, process, denoise=denoise, **options)[-1] for denoise in (False, True))
    bars = np.cumprod(1 - process.beta_table)
    before = process.beta_table[1] * (1 - bars[0]) / (1 - bars[1])
    assert (noisy - clean - math.sqrt(before) * noise(29)).abs().max() < 1e-12
    one = fastdiff.sample(
        lowest, process, 1, shape=(3,), num_samples=2, **options
    )  # denoise leaves no variance to learn
    assert one.shape == (2, 3)


def test_default_langevin_steps():
    """NCSNv2's technique 4 from the ladder's mean ratio and its steps per level; ULA takes the corrector's step."""
    ladder = fastdiff.NCSN(fastdiff.schedules.geometric(2.0, 0.1, 6))
    row = fastdiff.plan(ladder, 24).rows[0]
    eta = fastdiff.schedules.langevin_step(1.0, 20.0 ** (1 / 5), 4)
    assert row.b[0] == pytest.approx(eta * 4.0, rel=1e-12)
    assert row.c == pytest.approx(math.sqrt(2 * eta * 4.0), rel=1e-12)
    sigma = float(fastdiff.VP().sigma(0.3))
    assert fastdiff.plan("vp", 5, sampler="ula", t_min=0.3).rows[0].b[0] == pytest.approx(2 * (0.16 * sigma) ** 2)


# --- closed forms ----------------------------------------------------------------------------------------------------

DATA = Gaussian(torch.tensor([0.5, -1.0], dtype=torch.float64), std=torch.tensor([0.7, 1.2], dtype=torch.float64))


def exact(kind, process, data=DATA):
    """A network that knows the data: the prediction of this kind, from the exact x0 and ε at its time."""

    def model(x, t):
        t = t.double()
        if kind == "edm":  # told ln σ/4, given c_in x
            ratio = torch.exp(4 * t)
            t = torch.as_tensor(process.time(ratio.numpy()))
            x = x * (process.sigma(t) ** 2 + (process.alpha(t) * process.sigma_data) ** 2).sqrt()[:, None]
        alpha, sigma = process.alpha(t), process.sigma(t)
        r, w = predictions.coordinates(kind, process, t, alpha, sigma)
        x0 = data.x0(x.double(), alpha, sigma)
        eps = (x.double() - alpha[:, None] * x0) / sigma[:, None]
        return (r[:, None] * x0 + w[:, None] * eps).to(x.dtype)

    return model


def end_of_ode(name, sampler, steps, **options):
    process = get(name)
    start = options.pop("start")
    x = fastdiff.sample(
        exact("score", process),
        process,
        steps,
        sampler=sampler,
        shape=(2,),
        num_samples=len(start),
        x_init=start,
        **options,
    )
    return process, x


@pytest.mark.parametrize(
    ("name", "sampler", "options", "order"),
    [
        ("vp", "ode", {}, 1),
        ("vp", "ode", {"grid": "karras"}, 1),
        ("vp", "ddim", {}, 1),
        ("vp", EulerMaruyama(lam=0.0), {}, 1),
        ("vp", ReverseDiffusion(lam=0.0), {}, 1),
        ("vp", "heun", {"grid": "uniform"}, 2),
        ("vp", "heun", {"grid": "karras"}, 2),
        ("subvp", "ode", {}, 1),
        ("subvp", "heun", {"grid": "uniform", "t_min": 0.05}, 2),
        ("ve", "ode", {}, 1),
        ("ve", ReverseDiffusion(lam=0.0), {}, 1),
        ("ve", "heun", {"grid": "uniform"}, 2),
        ("ou", "ode", {"t_min": 0.1}, 1),
        ("ou", "heun", {"grid": "uniform", "t_min": 0.1}, 2),
        ("edm", "heun", {}, 2),
        ("ddpm", "ddim", {"t_min": 100}, 1),
    ],
)
def test_measured_order(name, sampler, options, order):
    start = DATA.sample(16, generator=torch.Generator().manual_seed(0)).double() * get(name).prior_std
    counts, errors = (40, 80, 160, 320), []
    for steps in counts:
        process, x = end_of_ode(name, sampler, steps, start=start, **options)
        end = fastdiff.plan(process, steps, sampler=sampler, **options).end
        top = np.array([float(process.T)])
        alpha, sigma = float(process.alpha(top)[0]), float(process.sigma(top)[0])
        errors.append(float((x - DATA.ode_map(start, alpha, sigma, end.alpha, end.sigma)).abs().max()))
    assert measured_order(errors, counts) == pytest.approx(order, abs=0.3), errors


@pytest.mark.parametrize("name", ["ve", "vp", "subvp", "ou", "ddpm", "edm"])
@pytest.mark.parametrize("sampler", ["ddim", DDIM(1.0), "ancestral"])
def test_point_mass_is_exact(name, sampler):
    """With the exact x0 of a point mass μ, x_t = αμ + σε keeps α_s μ + σ_s ε': exactly for η = 0, in law for ancestral."""
    process, mu = get(name), 0.3
    eps = fastdiff.normal(20_000, (1,), seed=1).double()
    level = fastdiff.plan(process, 4, sampler=sampler).rows[0].level
    x = fastdiff.sample(
        lambda x, t: torch.full_like(x, mu), process, 4, sampler=sampler, prediction="x0", shape=(1,),
        num_samples=len(eps), x_init=level.alpha * mu + level.sigma * eps, t_min=0.3 * process.T, denoise=False,
    )  # fmt: skip
    end = fastdiff.plan(process, 4, sampler=sampler, t_min=0.3 * process.T).end
    if sampler == "ddim":
        assert (x - end.alpha * mu - end.sigma * eps).abs().max() < 1e-12 * (1 + process.prior_std)
    n = len(eps)
    assert abs(x.mean() - end.alpha * mu) < 5 * end.sigma / math.sqrt(n)
    assert abs(x.var() / end.sigma**2 - 1) < 5 * math.sqrt(2 / n)


SAMPLERS = [
    *samplers.SAMPLERS,
    DDIM(0.5),
    EulerMaruyama(0.5),
    Heun(s_churn=4.0, s_max=20.0),
    PredictorCorrector("ancestral", "langevin", norm="sample", order="predictor_first"),
    PredictorCorrector("heun"),
    PredictorCorrector("none"),
    PredictorCorrector("dpmpp_3m"),
    DEIS(4, "lambda"),
    DPM2(s_churn=4.0, s_max=20.0),
    DPMSolver(3),
    SA(3, 4, 0.5),
    UniPC(3, "bh1", "eps"),
]


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_every_process_sampler_and_prediction_runs_or_is_refused(name, sampler):
    """A network that knows the data gives the same run whatever it predicts, up to rounding: every second prediction in turn, so
    that each meets all processes and all samplers."""
    process = fastdiff.DDPM("linear", T=40) if name == "ddpm" else get(name)
    steps = 10 if "langevin" in str(sampler) or name == "ncsn" else 9
    options = {"sampler": sampler, "shape": (2,), "num_samples": 4, "dtype": torch.float64}
    if sampler in ("rk45", "adaptive_sde"):
        steps = None
        if sampler == "adaptive_sde":
            options["sampler"] = AdaptiveSDE(rtol=0.2, atol=0.1)  # few steps say as much here as many
    elif name == "ncsn" and "langevin" not in str(sampler):
        options["grid"] = "uniform"
    results, turn = {}, SAMPLERS.index(sampler) + list(PROCESSES).index(name)
    for k, kind in enumerate(predictions.PREDICTIONS):
        if kind != "score" and (k + turn) % 2:
            continue
        told = None if kind == "edm" else "t"
        run = functools.partial(
            fastdiff.sample, exact(kind, process), process, steps, prediction=kind, time_input=told, **options
        )
        if kind in ("prev_mean", "increment") and not process.discrete:
            with pytest.raises(ConfigError, match="discrete chains only"):
                run()
        else:
            results[kind] = run()
    for kind, x in results.items():
        assert x.isfinite().all()
        scale = 1 + results["score"].abs().max()
        # its steps follow the difference of two nearly equal states, in which the last bits are large
        assert (x - results["score"]).abs().max() / scale < (1e-3 if sampler == "adaptive_sde" else 1e-7), kind


@pytest.mark.parametrize("name", ["vp", "ve", "ddpm", "edm", "subvp"])
@pytest.mark.parametrize(
    "sampler",
    [
        "ancestral",
        DDIM(0.5),
        "euler_maruyama",
        "reverse_diffusion",
        "heun",
        "ode",
        Heun(s_churn=2.0),
        "dpm_2",
        "dpm_solver",
        DPMSolver(3),
        "dpmpp_sde",
        "dpmpp_2m",
        "dpmpp_3m_sde",
        "unipc",
        SA(3, 4),
    ],
)
def test_clip_is_a_clipped_network(name, sampler):
    """Clipping x0 in the table equals a network that clips its own x0; a corrector's score stays unclipped."""
    process = fastdiff.DDPM("linear", T=40) if name == "ddpm" else get(name)
    if name == "ddpm" and isinstance(sampler, Heun):
        sampler = Heun(s_churn=2.0, s_max=1.0)
    clean = exact("x0", process)

    def clipped(x, t):
        return clean(x, t).clamp(-0.4, 0.4)

    def as_eps(x, t):
        t = t.double()
        return (x - process.alpha(t)[:, None] * clean(x, t)) / process.sigma(t)[:, None]

    options = {"sampler": sampler, "shape": (2,), "num_samples": 6, "dtype": torch.float64, "time_input": "t"}
    expected = fastdiff.sample(clipped, process, 9, prediction="x0", **options)
    ours = fastdiff.sample(as_eps, process, 9, prediction="eps", clip=(-0.4, 0.4), **options)
    plain = fastdiff.sample(as_eps, process, 9, prediction="eps", **options)
    assert (ours - expected).abs().max() < 1e-9
    assert (plain - expected).abs().max() > 1e-3


def test_clip_leaves_correctors_alone():
    table = fastdiff.plan("ve", 5, clip=(0, 1))
    assert {(row.label, row.clips) for row in table.rows} == {("corrector", False), ("reverse_diffusion", True)}


def test_a_corrector_never_enters_the_history():
    table = fastdiff.plan("vp", 4, sampler=PredictorCorrector("heun"))
    assert {row.label for row in table.rows if row.keeps_prediction} == {"euler"}
    assert table.memory == 1


def test_mixture_is_sampled():
    """Two modes of different weight: the share of samples at each, and their spread."""
    data = Mixture([0.3, 0.7], [[-2.0], [2.0]], [[0.3], [0.5]])
    n = 5_000
    x = fastdiff.sample(exact("score", get("vp"), data), "vp", 100, shape=(1,), num_samples=n, seed=1)[:, 0]
    share = (x > 0).double().mean()
    assert abs(share - 0.7) < 5 * math.sqrt(0.21 / n) + 0.01  # the discretisation's own share
    assert x[x > 0].std() == pytest.approx(0.5, abs=0.04)
    assert x[x < 0].std() == pytest.approx(0.3, abs=0.04)
