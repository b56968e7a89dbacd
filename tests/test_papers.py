"""The oracle is right: papers/score_based.py and every closed form of oracles.py against other closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from oracles import Gaussian, Mixture, gaussian_chain, measured_order

from fastdiff.papers import score_based

F64 = torch.float64
BETAS = torch.linspace(0.02, 0.3, 8, dtype=F64)
BARS = (1 - BETAS).cumprod(0).tolist()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=rng(seed))


def noise_like(x, seed=100):
    return lambda k: randn(*x.shape, seed=seed + k)


def no_noise(k):
    raise AssertionError(f"update {k} asked for noise")


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=F64), rtol=tolerance, atol=tolerance)


def all_close(a, b, tolerance=1e-12):
    assert len(a) == len(b)
    for one, other in zip(a, b):
        close(one, other, tolerance)


def exact_moments(sampler, updates, mean0, var0):
    """Mean and variance after each update of a sampler that is affine in the scalar start and its noise.

    The batch is (nothing, a unit start, a unit noise at update 0, 1, ...): differences to the first sample are the
    coefficients of the affine map.
    """
    x = torch.zeros(2 + updates, 1, dtype=F64)
    x[1] = 1

    def noise(k):
        z = torch.zeros_like(x)
        z[2 + k] = 1
        return z

    out = torch.stack(sampler(x, noise)).squeeze(2)
    assert len(out) == updates
    gains = out[:, 1:] - out[:, :1]
    return out[:, 0] + gains[:, 0] * mean0, gains[:, 0] ** 2 * var0 + (gains[:, 1:] ** 2).sum(1)


def covariance(d, seed=1):
    root = randn(d, d, seed=seed)
    return root @ root.T / d + 0.1 * torch.eye(d, dtype=F64)


DISTRIBUTIONS = {
    "full": Gaussian(randn(4, seed=2), cov=covariance(4)),
    "diagonal": Gaussian(randn(2, 3, seed=3), std=0.3 + randn(2, 3, seed=4).abs()),
    "isotropic": Gaussian([1.0], std=0.5),
    "mixture": Mixture([1.0, 3.0, 2.0], randn(3, 2, seed=5), [0.3, 0.5, 0.7]),
    "diagonal mixture": Mixture([0.5, 0.5], randn(2, 2, 2, seed=6), 0.3 + randn(2, 2, 2, seed=7).abs()),
}
LEVELS = {"numbers": (0.8, 0.6), "per sample": (torch.linspace(0.2, 1, 5, dtype=F64), torch.linspace(2, 0.1, 5))}


# ---- the closed forms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("data", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_score_is_the_gradient_of_log_prob_and_tweedie_holds(data, level):
    alpha, sigma = level
    x = randn(5, *data.shape).requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_prob(x, alpha, sigma).sum(), x)
    score = data.score(x, alpha, sigma)
    a, s = (torch.as_tensor(v, dtype=F64).reshape(-1, *[1] * len(data.shape)) for v in level)
    close(score, gradient)
    close(data.eps(x, alpha, sigma), -s * score)
    close(data.x0(x, alpha, sigma), (x + s**2 * score) / a, 1e-11)
    assert data.score(x.float(), alpha, sigma).dtype == torch.float32


def test_log_prob_agrees_with_torch_distributions():
    data, x = DISTRIBUTIONS["full"], randn(5, 4)
    marginal = 0.8**2 * covariance(4) + 0.6**2 * torch.eye(4, dtype=F64)
    close(data.log_prob(x, 0.8, 0.6), torch.distributions.MultivariateNormal(0.8 * data.mean, marginal).log_prob(x))
    data, x = DISTRIBUTIONS["mixture"], randn(5, 2)
    densities = [
        torch.distributions.Normal(0.8 * m, math.hypot(0.8 * s, 0.6)) for m, s in zip(data.means, (0.3, 0.5, 0.7))
    ]
    total = sum(w * d.log_prob(x).sum(1).exp() for w, d in zip(data.weights, densities))
    close(data.log_prob(x, 0.8, 0.6), total.log())


@pytest.mark.parametrize("data", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_samples_have_mean_score_zero_and_fisher_identity(data):
    """Under p, E[score] = 0 and E[<score, x - c>] = -D for any c: true of p alone among densities with that score."""
    n, alpha, sigma = 20_000, 0.8, 0.6
    x = data.sample(n, alpha, sigma, rng())
    assert x.shape == (n, *data.shape)
    score = data.score(x, alpha, sigma).flatten(1)
    assert (score.mean(0).abs() < 4.5 * score.std(0) / n**0.5).all()
    stein = (score * x.flatten(1)).sum(1) + score.shape[1]
    assert stein.mean().abs() < 4.5 * stein.std() / n**0.5


@pytest.mark.parametrize("name", ["full", "diagonal", "isotropic"])
def test_ode_map_composes_and_has_the_velocity_of_the_flow(name):
    data = DISTRIBUTIONS[name]
    x = randn(5, *data.shape)
    t, r, s = (score_based.vp(time) for time in (0.9, 0.5, 0.2))
    halfway = data.ode_map(x, t.alpha, t.sigma, r.alpha, r.sigma)
    direct = data.ode_map(x, t.alpha, t.sigma, s.alpha, s.sigma)
    close(data.ode_map(halfway, r.alpha, r.sigma, s.alpha, s.sigma), direct)
    h = 1e-5
    ahead, behind = score_based.vp(0.9 + h), score_based.vp(0.9 - h)
    moved = data.ode_map(x, t.alpha, t.sigma, ahead.alpha, ahead.sigma)
    moved = moved - data.ode_map(x, t.alpha, t.sigma, behind.alpha, behind.sigma)
    close(moved / (2 * h), t.f * x - t.g**2 / 2 * data.score(x, t.alpha, t.sigma), 1e-7)


def test_gaussian_chain_keeps_its_fixed_point_and_measured_order_reads_a_power_law():
    mean, var = gaussian_chain(2.0, 4 / 3, [(0.5, 1.0, 1.0)] * 3)
    assert (mean, var) == pytest.approx((2.0, 4 / 3))
    assert gaussian_chain(1.0, 0.0, [(2.0, 3.0, 4.0), (0.5, 0.0, 0.0)]) == (2.5, 4.0)
    steps = [10, 20, 40]
    assert measured_order([3 * n**-2.0 for n in steps], steps) == pytest.approx(2)


# ---- processes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", [score_based.ve, score_based.vp, score_based.subvp])
def test_kernel_solves_its_moment_equations(sde):
    """alpha' = f alpha and (sigma^2)' = 2 f sigma^2 + g^2."""
    h = 1e-5
    for t in (0.1, 0.5, 0.9):
        now, ahead, behind = sde(t), sde(t + h), sde(t - h)
        assert (ahead.alpha - behind.alpha) / (2 * h) == pytest.approx(now.f * now.alpha, rel=1e-7, abs=1e-9)
        slope = (ahead.sigma**2 - behind.sigma**2) / (2 * h)
        assert slope == pytest.approx(2 * now.f * now.sigma**2 + now.g**2, rel=1e-7)


def test_process_end_points():
    assert (score_based.ve(0).sigma, score_based.ve(1).sigma) == pytest.approx((0.01, 50))
    assert score_based.vp(0)[2:] == score_based.subvp(0)[2:] == (1, 0)
    assert score_based.vp(1).alpha == pytest.approx(math.exp(-(0.1 + 20) / 4))
    assert score_based.subvp(0.3).sigma == pytest.approx(score_based.vp(0.3).sigma ** 2)


def test_transitions_agree_with_betas_and_compose():
    bars = [*reversed(BARS), 1.0]
    general = score_based.transitions([b**0.5 for b in bars], [(1 - b) ** 0.5 for b in bars])
    for one, other in zip(general, score_based.ddpm_transitions(BETAS), strict=True):
        assert one == pytest.approx(other, abs=1e-14)
    first, second = score_based.transitions([1, 1, 1], [3.0, 2.0, 0.0])
    assert first == (1, 5, 2, 3)
    assert second == (1, 4, 0, 2)


# ---- DDPM and DDIM --------------------------------------------------------------------------------------------------


def ddpm_eps(data):
    bars = [1.0, *BARS]
    return lambda x, t: data.eps(x, bars[int(t)] ** 0.5, (1 - bars[int(t)]) ** 0.5)


def test_ddpm_loss_of_exact_models():
    x0, eps, t = randn(4, 2, 3), randn(4, 2, 3, seed=1), torch.tensor([1, 8, 3, 3])
    assert torch.equal(score_based.ddpm_training_loss(lambda x, t: eps, x0, t, eps, BARS), torch.zeros(4, dtype=F64))
    # A model that returns its input leaves (eps - sqrt(ab) x0 - sqrt(1 - ab) eps)^2.
    loss = score_based.ddpm_training_loss(lambda x, t: x, x0, t, eps, torch.tensor(BARS, dtype=F64))
    for i, ti in enumerate(t.tolist()):
        bar = math.prod(1 - b for b in BETAS[:ti].tolist())
        close(loss[i], ((1 - math.sqrt(1 - bar)) * eps[i] - math.sqrt(bar) * x0[i]).square().mean())


def test_ddpm_posterior_variance_keeps_the_marginals_of_a_point_mass():
    point = Gaussian([1.5], std=0.0)
    start = BARS[-1]
    mean, var = exact_moments(
        lambda x, noise: score_based.ddpm_sample(ddpm_eps(point), x, BETAS, noise), 8, 1.5 * start**0.5, 1 - start
    )
    bars = torch.tensor([*reversed(BARS[:-1]), 1.0], dtype=F64)
    close(mean, 1.5 * bars.sqrt())
    close(var, 1 - bars)


def test_ddpm_beta_variance_keeps_unit_gaussian_data():
    unit = Gaussian([0.0], std=1.0)
    mean, var = exact_moments(
        lambda x, noise: score_based.ddpm_sample(ddpm_eps(unit), x, BETAS, noise, variance="beta"), 8, 0.0, 1.0
    )
    close(mean, torch.zeros(8))
    close(var, [1.0] * 7 + [1 - BETAS[0].item()])


@pytest.mark.parametrize(("v", "variance"), [(1.0, "beta"), (-1.0, "posterior")])
def test_learned_range_ends_at_both_variances(v, variance):
    eps, x = ddpm_eps(DISTRIBUTIONS["mixture"]), randn(3, 2)
    learned = score_based.improved_ddpm_sample(lambda x, t: (eps(x, t), torch.full_like(x, v)), x, BETAS, noise_like(x))
    all_close(learned, score_based.ddpm_sample(eps, x, BETAS, noise_like(x), variance))


def test_learned_range_middle_is_the_geometric_mean():
    x, two = torch.zeros(1, 1, dtype=F64), [0.1, 0.2]
    first = score_based.improved_ddpm_sample(lambda x, t: (x, x), x, two, lambda k: torch.ones_like(x))[0]
    tilde = 0.1 / (1 - 0.9 * 0.8) * 0.2
    close(first, [[(0.2 * tilde) ** 0.25]])


def test_ddim_lands_on_a_point_mass_from_any_subsequence():
    x, point = randn(4, 2), Gaussian([1.5, -2.0], std=0.0)
    out = score_based.ddim_sample(ddpm_eps(point), x, [BARS[7], BARS[4], BARS[1], 1.0], [8, 5, 2], no_noise)
    close(out[-1], point.mean.expand(4, 2))
    out = score_based.ddim_sample(
        ddpm_eps(point), x, [BARS[7], BARS[4], BARS[1], 1.0], [8, 5, 2], noise_like(x), eta=1.0
    )
    close(out[-1], point.mean.expand(4, 2))


def test_ddim_with_eta_one_is_ddpm():
    eps, x = ddpm_eps(DISTRIBUTIONS["mixture"]), randn(3, 2)
    ddim = score_based.ddim_sample(eps, x, [*reversed(BARS), 1.0], range(8, 0, -1), noise_like(x), eta=1.0)
    all_close(ddim, score_based.ddpm_sample(eps, x, BETAS, noise_like(x)))


def test_ddim_is_first_order_in_its_own_variable():
    data = DISTRIBUTIONS["diagonal"]
    x, steps, errors = randn(3, 2, 3), [16, 32, 64], []
    start, end = score_based.vp(0.9), score_based.vp(0.1)
    exact = data.ode_map(x, start.alpha, start.sigma, end.alpha, end.sigma)
    for n in steps:
        levels = [score_based.vp(t) for t in torch.linspace(0.9, 0.1, n + 1, dtype=F64).tolist()]
        out = score_based.ddim_sample(
            lambda x, i, levels=levels: data.eps(x, levels[int(i)].alpha, levels[int(i)].sigma),
            x,
            [level.alpha**2 for level in levels],
            range(n),
            no_noise,
        )
        errors.append((out[-1] - exact).norm().item())
    assert measured_order(errors, steps) == pytest.approx(1, abs=0.1)


# ---- Langevin and the SDE samplers ------------------------------------------------------------------------------------


def test_annealed_langevin_is_its_chain_and_denoises_a_point_mass():
    data, sigmas, lr = Gaussian([0.7], std=0.5), [1.0, 0.4], 0.02
    mean, var = exact_moments(
        lambda x, noise: score_based.annealed_langevin(
            lambda x, s: data.score(x, 1.0, s), x, sigmas, 3, lr, noise, denoise=False
        ),
        6,
        0.0,
        1.0,
    )
    rows = []
    for sigma in sigmas:
        alpha, precision = lr * sigma**2 / 0.4**2, 1 / (0.25 + sigma**2)
        rows += [(1 - alpha * precision, alpha * precision * 0.7, (2 * alpha) ** 0.5)] * 3
    assert (mean[-1].item(), var[-1].item()) == pytest.approx(gaussian_chain(0.0, 1.0, rows), rel=1e-12)

    x, point = randn(3, 2), Gaussian([1.0, 2.0], std=0.0)
    out = score_based.annealed_langevin(lambda x, s: point.score(x, 1.0, s), x, sigmas, 3, lr, noise_like(x))
    assert len(out) == 7
    close(out[-1], point.mean.expand(3, 2))


def coefficients(sde):
    return (lambda t: sde(t).f), (lambda t: sde(t).g)


def sde_score(sde, data):
    return lambda x, t: data.score(x, sde(t).alpha, sde(t).sigma)


def test_euler_maruyama_without_noise_is_the_probability_flow():
    x, times = randn(3, 2), [0.9, 0.7, 0.4, 0.1]
    for sde in (score_based.ve, score_based.vp, score_based.subvp):
        score = sde_score(sde, DISTRIBUTIONS["mixture"])
        drift = score_based.euler_maruyama(*coefficients(sde), score, x, times, no_noise, lam=0.0)
        all_close(drift, score_based.probability_flow_euler(*coefficients(sde), score, x, times))


def reverse_time_sampler(name, sde, data, times):
    """The sampler `name` as a function of the start and the noise, without its last denoising."""
    levels, score = [sde(t) for t in times], sde_score(sde, data)
    steps = score_based.transitions([k.alpha for k in levels], [k.sigma for k in levels])
    if name == "reverse_diffusion":
        return lambda x, noise: score_based.reverse_diffusion(score, x, times, steps, noise, denoise=False)
    if name == "probability_flow":
        return lambda x, noise: score_based.reverse_diffusion(score, x, times, steps, noise, probability_flow=True)
    if name.startswith("ancestral"):
        variance = name.removeprefix("ancestral_")
        return lambda x, noise: score_based.ancestral_vp(score, x, times, steps, noise, variance, denoise=False)
    lam = float(name.removeprefix("euler_maruyama_"))
    return lambda x, noise: score_based.euler_maruyama(*coefficients(sde), score, x, times, noise, lam, denoise=False)


@pytest.mark.parametrize("sde", [score_based.ve, score_based.vp, score_based.subvp])
@pytest.mark.parametrize(
    "name",
    [
        "euler_maruyama_0.0",
        "euler_maruyama_0.5",
        "euler_maruyama_1.0",
        "reverse_diffusion",
        "probability_flow",
        "ancestral_beta",
        "ancestral_posterior",
    ],
)
def test_weak_order_is_one(name, sde):
    """Exact mean and variance of the discrete chain on Gaussian data against those of the reverse SDE.

    The span is one where no leading error term happens to cancel.
    """
    data, steps, errors = Gaussian([0.7], std=0.5), [32, 64, 128], []
    start, end = sde(0.6), sde(0.45)
    exact = torch.tensor([0.7 * end.alpha, 0.25 * end.alpha**2 + end.sigma**2], dtype=F64)
    for n in steps:
        times = torch.linspace(0.6, 0.45, n + 1, dtype=F64).tolist()
        mean, var = exact_moments(
            reverse_time_sampler(name, sde, data, times), n, 0.7 * start.alpha, 0.25 * start.alpha**2 + start.sigma**2
        )
        errors.append((torch.stack([mean[-1], var[-1]]) - exact).abs().max().item())
    assert measured_order(errors, steps) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("sde", [score_based.ve, score_based.vp, score_based.subvp])
def test_posterior_ancestral_keeps_the_marginals_of_a_point_mass(sde):
    point, times = Gaussian([1.5], std=0.0), [0.9, 0.6, 0.5, 0.2]
    start, levels = sde(0.9), [sde(t) for t in times[1:]]
    mean, var = exact_moments(
        reverse_time_sampler("ancestral_posterior", sde, point, times), 3, 1.5 * start.alpha, start.sigma**2
    )
    close(mean, [1.5 * k.alpha for k in levels])
    close(var, [k.sigma**2 for k in levels])


def test_the_ancestral_samplers_agree_where_they_meet():
    data, x, sigmas = DISTRIBUTIONS["mixture"], randn(3, 2), [2.0, 1.0, 0.5, 0.0]
    steps = score_based.transitions([1.0] * 4, sigmas)

    def score(x, sigma):
        return data.score(x, 1.0, sigma)

    both = [
        score_based.ancestral_ve(score, x, sigmas[:-1], sigmas, noise_like(x)),
        score_based.ancestral_vp(score, x, sigmas[:-1], steps, noise_like(x), "posterior"),
    ]
    all_close(*both)

    eps, bars = ddpm_eps(data), [1.0, *BARS]
    ancestral = score_based.ancestral_vp(
        lambda x, t: -eps(x, t) / (1 - bars[int(t)]) ** 0.5,
        x,
        range(8, 0, -1),
        score_based.ddpm_transitions(BETAS),
        noise_like(x),
    )
    all_close(ancestral, score_based.ddpm_sample(eps, x, BETAS, noise_like(x), "beta"))


def test_reverse_diffusion_prints_algorithms_2_and_3():
    x, s, z = randn(3, 2), randn(3, 2, seed=1), randn(3, 2, seed=2)
    (step,) = score_based.transitions([1, 1], [2.0, 1.5])
    mean, std = score_based.reverse_diffusion_step(x, s, step)
    close(mean + std * z, x + (4 - 2.25) * s + math.sqrt(4 - 2.25) * z)
    step = score_based.ddpm_transitions(BETAS)[0]
    mean, std = score_based.reverse_diffusion_step(x, s, step)
    close(mean + std * z, (2 - math.sqrt(0.7)) * x + 0.3 * s + math.sqrt(0.3) * z)


def test_langevin_steps():
    x, s, z = randn(4, 2, 3), randn(4, 2, 3, seed=1), randn(4, 2, 3, seed=2)
    for i in range(4):
        one = slice(i, i + 1)
        batch = score_based.langevin_step_batch_norm(x[one], s[one], z[one], 0.16, 0.9)
        close(score_based.langevin_step_sample_norm(x, s, z, 0.16, 0.9)[one], batch)
        # The defining property of the ratio: ||noise part|| * snr = ||score part|| up to alpha.
        score_part = (z[i] * z[i]).sum() / (s[i] * s[i]).sum() * 2 * 0.9 * 0.16**2
        close(batch[0], x[i] + score_part * s[i] + (2 * score_part).sqrt() * z[i])
    norms = [v.flatten(1).norm(dim=1).mean() for v in (z, s)]
    eps = 2 * (0.16 * norms[0] / norms[1]) ** 2
    close(score_based.langevin_step_batch_norm(x, s, z, 0.16), x + eps * s + (2 * eps).sqrt() * z)
    close(score_based.langevin_step_sample_norm(x, s, z, 0.16, cap=1e-3), x + 1e-3 * s + math.sqrt(2e-3) * z)
    assert torch.equal(score_based.langevin_step_sample_norm(x, 0 * s, z, 0.16), x)
    close(score_based.ald_step(x, s, z, 0.1, 3.0, 0.5), x + 0.09 * s + math.sqrt(0.18) * z)


def test_predictor_corrector_orders_and_noise_indices():
    """x counts what was done to it: the predictor writes 10 i + 1, the corrector 10 i + 2, noise adds k / 1000."""

    def run(order, **options):
        out = score_based.predictor_corrector(
            lambda x, i: (x * 0 + 10 * i + 1, 1.0),
            lambda x, i, z: x * 0 + 10 * i + 2 + z,
            torch.zeros(1, dtype=F64),
            2,
            lambda k: torch.tensor([k / 1000], dtype=F64),
            order=order,
            **options,
        )
        return [round(x.item(), 6) for x in out]

    assert run("corrector_first") == [2, 1.001, 12.002, 11]
    assert run("predictor_first") == [1, 12.001, 11, 22.003]
    assert run("predictor_first", final_corrector=False) == [1, 12.001, 11]
    assert run("corrector_first", corrector_steps=2, denoise=False) == [2, 2.001, 1.002, 12.003, 12.004, 11.005]


def ladder_times(n, eps):
    return torch.linspace(1, eps, n, dtype=F64).tolist()


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
def test_score_sde_loop_on_ve_is_its_discrete_chain(predictor):
    n, x = 6, randn(3, 2) * 50
    score = sde_score(score_based.ve, DISTRIBUTIONS["mixture"])
    times, sigmas = ladder_times(n, 1e-5), [*(0.01 * 5000 ** (i / (n - 1)) for i in reversed(range(n))), 0.0]
    steps = score_based.transitions([1.0] * (n + 1), sigmas)
    step_of = {"reverse_diffusion": score_based.reverse_diffusion_step, "ancestral": score_based.ancestral_step}[
        predictor
    ]
    loop = score_based.score_sde_loop("ve", score, x, n, noise_like(x), predictor, "langevin", eps=1e-5)
    printed = score_based.predictor_corrector(
        lambda x, i: step_of(x, score(x, times[i]), steps[i]),
        lambda x, i, z: score_based.langevin_step_batch_norm(x, score(x, times[i]), z, 0.16),
        x,
        n,
        noise_like(x),
    )
    all_close(loop, printed, 1e-10)
    alone = score_based.score_sde_loop("ve", score, x, n, noise_like(x), predictor, eps=1e-5)
    if predictor == "ancestral":
        all_close(alone, score_based.ancestral_ve(score, x, times, sigmas, noise_like(x)), 1e-10)
    else:
        all_close(alone, score_based.reverse_diffusion(score, x, times, steps, noise_like(x)), 1e-10)


def test_score_sde_loop_on_vp_is_its_discrete_chain():
    n, x = 30, randn(3, 2)
    score = sde_score(score_based.vp, DISTRIBUTIONS["mixture"])
    betas = [(0.1 + i / (n - 1) * 19.9) / n for i in range(n)]
    times, steps = ladder_times(n, 1e-3), score_based.ddpm_transitions(betas)
    loop = score_based.score_sde_loop("vp", score, x, n, noise_like(x), "ancestral")
    all_close(loop, score_based.ancestral_vp(score, x, times, steps, noise_like(x)), 1e-11)
    loop = score_based.score_sde_loop("vp", score, x, n, noise_like(x), "none", "ald", corrector_steps=2, snr=0.1)
    x_k = x
    for k, after in enumerate(loop):
        i = k // 2
        alpha = 1 - betas[n - 1 - i]
        x_k = score_based.ald_step(
            x_k, score(x_k, times[i]), noise_like(x)(k), 0.1, score_based.vp(times[i]).sigma, alpha
        )
        close(after, x_k)


@pytest.mark.parametrize("sde", ["vp", "subvp"])
def test_score_sde_loop_euler_maruyama_steps_by_one_over_n(sde):
    """From each of its N points the loop makes euler_maruyama's step from t to t - 1/N, which is not the next point."""
    n, x, process = 5, randn(3, 2), getattr(score_based, sde)
    score = sde_score(process, DISTRIBUTIONS["mixture"])
    loop = score_based.score_sde_loop(sde, score, x, n, noise_like(x), "euler_maruyama")
    for i, (before, after) in enumerate(pairwise([x, *loop])):
        t = ladder_times(n, 1e-3)[i]
        (step,) = score_based.euler_maruyama(
            *coefficients(process),
            score,
            before,
            [t, t - 1 / n],
            lambda _, i=i: noise_like(x)(i),
            denoise=i == n - 1,
        )
        close(after, step)


def test_score_sde_loop_refuses_what_the_reference_lacks():
    with pytest.raises(NotImplementedError, match="ancestral predictor for subvp"):
        score_based.score_sde_loop("subvp", lambda x, t: -x, randn(2, 2), 3, no_noise, "ancestral")


# ---- EDM --------------------------------------------------------------------------------------------------------------


def test_karras_sigmas_of_the_published_setting():
    published = "80 57.586 40.7856 28.3746 19.3525 12.9101 8.4009 5.3152 3.2568 1.9233 1.0882 .5853 .2964 .1395 .0599"
    published += " .0229 .0075 .002 0"
    assert score_based.karras_sigmas(18) == pytest.approx([float(s) for s in published.split()], abs=5.1e-5)


def test_edm_orders_on_gaussian_data():
    data, steps = DISTRIBUTIONS["full"], [16, 32, 64]
    x = 5 * randn(3, 4)
    exact = data.ode_map(x, 1.0, 5.0, 1.0, 0.2)
    errors = {"heun": [], "euler": []}
    for n in steps:
        sigmas = score_based.karras_sigmas(n + 1, 0.2, 5.0)[:-1]
        heun = score_based.edm_deterministic(lambda x, s: data.x0(x, 1.0, s), x, sigmas)
        assert len(heun) == 2 * n
        euler = score_based.probability_flow_euler(
            lambda t: 0.0, lambda t: math.sqrt(2 * t), lambda x, s: data.score(x, 1.0, s), x, sigmas
        )
        close(heun[0], euler[0])
        for name, out in (("heun", heun), ("euler", euler)):
            errors[name].append((out[-1] - exact).norm().item())
        velocity = score_based.heun_general(lambda x, s: -s * data.score(x, 1.0, s), x, sigmas)
        all_close(heun, velocity, 1e-11)
    assert measured_order(errors["heun"], steps) == pytest.approx(2, abs=0.15)
    assert measured_order(errors["euler"], steps) == pytest.approx(1, abs=0.15)


def test_heun_is_second_order_in_time_on_vp():
    data, steps, errors = DISTRIBUTIONS["diagonal"], [16, 32, 64], []
    x, start, end = randn(3, 2, 3), score_based.vp(0.9), score_based.vp(0.1)
    exact = data.ode_map(x, start.alpha, start.sigma, end.alpha, end.sigma)

    def velocity(x, t):
        kernel = score_based.vp(t)
        return kernel.f * x - kernel.g**2 / 2 * data.score(x, kernel.alpha, kernel.sigma)

    for n in steps:
        out = score_based.heun_general(velocity, x, torch.linspace(0.9, 0.1, n + 1, dtype=F64))
        errors.append((out[-1] - exact).norm().item())
    assert measured_order(errors, steps) == pytest.approx(2, abs=0.15)


def test_edm_stochastic_without_churn_is_deterministic_and_both_land_on_a_point_mass():
    x, sigmas = 80 * randn(3, 2), score_based.karras_sigmas(6)
    point = Gaussian([1.0, -1.0], std=0.0)

    def D(x, sigma):
        return point.x0(x, 1.0, sigma)

    plain = score_based.edm_deterministic(D, x, sigmas)
    assert len(plain) == 11
    all_close(score_based.edm_stochastic(D, x, sigmas, no_noise, 0.0), plain)
    all_close(score_based.edm_stochastic(D, x, sigmas, no_noise, 5.0, s_min=100.0), plain)
    churned = score_based.edm_stochastic(D, x, sigmas, noise_like(x), 3.0, 0.05, 50.0, 1.003)
    inside = sum(0.05 <= s <= 50 for s in sigmas[:-1])
    assert len(churned) == 11 + inside
    close(plain[-1], point.mean.expand(3, 2))
    close(churned[-1], point.mean.expand(3, 2))


@pytest.mark.parametrize(("churn", "gamma"), [(0.4, 0.1), (100.0, math.sqrt(2) - 1)])
def test_churn_raises_the_variance_to_the_new_level(churn, gamma):
    data, sigmas = Gaussian([0.7], std=0.5), [3.0, 2.0, 1.5, 1.0, 0.5]
    mean, var = exact_moments(
        lambda x, noise: score_based.edm_stochastic(lambda x, s: data.x0(x, 1.0, s), x, sigmas, noise, churn),
        12,
        0.7,
        0.25 + 9.0,
    )
    close(mean, [0.7] * 12)
    close(var[0], 0.25 + (3 * (1 + gamma)) ** 2)
    x = randn(3, 1)
    out = score_based.edm_stochastic(lambda x, s: data.x0(x, 1.0, s), x, sigmas, noise_like(x), churn)
    all_close(out[1:3], score_based.edm_deterministic(lambda x, s: data.x0(x, 1.0, s), out[0], [3 * (1 + gamma), 2.0]))
    louder = score_based.edm_stochastic(
        lambda x, s: x, torch.zeros(1, 1, dtype=F64), sigmas, lambda k: torch.ones(1, 1, dtype=F64), churn, s_noise=1.5
    )
    close(louder[0], [[1.5 * 3 * math.sqrt((1 + gamma) ** 2 - 1)]])


def test_edm_preconditioning_is_exact_for_gaussian_data_and_scales_to_unit_variance():
    """For N(0, sigma_data^2) the best F is 0, F's input has unit variance, and c_out^2 is the posterior variance."""
    data, sd = Gaussian([0.0, 0.0], std=0.7), 0.7
    x, sigma = randn(3, 2), torch.tensor([0.1, 1.0, 5.0], dtype=F64)
    seen = []

    def zero(x, c_noise):
        seen.append((x, c_noise))
        return 0 * x

    for level in (0.3, sigma):
        close(score_based.edm_precondition(zero, sd)(x, level), data.x0(x, 1.0, level))
    close(seen[1][0], x / (sigma**2 + sd**2).sqrt()[:, None])
    close(seen[0][1], math.log(0.3) / 4)
    close(seen[1][1], sigma.log() / 4)
    one = score_based.edm_precondition(lambda x, c: torch.ones_like(x), sd)(x, sigma) - data.x0(x, 1.0, sigma)
    posterior = 1 / (1 / sigma**2 + 1 / sd**2)
    close(one.square(), posterior[:, None].expand(3, 2))


# ---- Markov chain Monte Carlo -------------------------------------------------------------------------------------------


def test_ula_is_its_chain():
    mean, var = exact_moments(
        lambda x, noise: score_based.ula(lambda x: (0.7 - x) / 0.25, x, 0.1, 4, noise), 4, 0.0, 1.0
    )
    expected = gaussian_chain(0.0, 1.0, [(1 - 0.4, 0.4 * 0.7, math.sqrt(0.2))] * 4)
    assert (mean[-1].item(), var[-1].item()) == pytest.approx(expected, rel=1e-12)


def test_mala_log_ratio_is_antisymmetric():
    """Going back from the proposal with the noise that leads back has minus the log ratio: detailed balance."""
    data, x, tau = DISTRIBUTIONS["mixture"], randn(6, 2), 0.2
    z, ones = randn(6, 2, seed=1), torch.full((6,), 1e-300, dtype=F64)

    def energy(x):
        return -data.log_prob(x)

    new, accept, there = score_based.mala(energy, x, tau, z, ones)
    assert accept.all()
    back_noise = (x - new - tau * data.score(new)) / math.sqrt(2 * tau)
    again, _, back = score_based.mala(energy, new, tau, back_noise, ones)
    close(again, x)
    close(back, -there, 1e-10)
    # An independent form: the joint density of (x, x') one way over the other.
    forward = torch.distributions.Normal(x + tau * data.score(x), math.sqrt(2 * tau)).log_prob(new).sum(1)
    backward = torch.distributions.Normal(new + tau * data.score(new), math.sqrt(2 * tau)).log_prob(x).sum(1)
    close(there, data.log_prob(new) + backward - data.log_prob(x) - forward, 1e-10)


def test_hmc_is_the_leapfrog_matrix_and_its_energy_error_is_second_order():
    def energy(x):
        return x.square().flatten(1).sum(1) / 2

    x, z, zeros = randn(6, 1, 2), randn(6, 1, 2, seed=1), torch.full((6,), 1e-300, dtype=F64)
    e = 0.3
    half, drift = torch.tensor([[1, 0], [-e / 2, 1]], dtype=F64), torch.tensor([[1, e], [0, 1]], dtype=F64)
    q, p = torch.einsum("ij,jb...->ib...", torch.linalg.matrix_power(half @ drift @ half, 3), torch.stack([x, z]))
    new, accept, log_ratio = score_based.hmc(energy, x, e, 3, z, zeros)
    assert accept.all()
    close(new, q)
    close(log_ratio, energy(x) + energy(z) - energy(q) - energy(p))
    steps = [8, 16, 32]
    errors = [score_based.hmc(energy, x, 1 / n, n, z, zeros)[2].norm().item() for n in steps]
    assert measured_order(errors, steps) == pytest.approx(2, abs=0.1)


def test_rejected_chains_stay():
    x, z = randn(4, 2), randn(4, 2, seed=1)
    for move in (
        lambda u: score_based.mala(lambda x: x.square().sum(1) * 50, x, 2.0, z, u),
        lambda u: score_based.hmc(lambda x: x.square().sum(1) * 50, x, 2.0, 3, z, u),
    ):
        new, accept, log_ratio = move(torch.full((4,), 0.999, dtype=F64))
        assert (log_ratio < -1).all()
        assert not accept.any()
        assert torch.equal(new, x)


@pytest.mark.parametrize("method", ["mala", "hmc"])
def test_metropolis_keeps_a_gaussian_target(method):
    """Chains started from the target stay there, with a step so long that an unadjusted chain would not."""
    chains, data = 4000, Gaussian([0.5, -1.0], cov=torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64))
    x, generator, accepted = data.sample(chains, generator=rng(1)), rng(2), 0

    def energy(x):
        return -data.log_prob(x)

    for _ in range(20):
        z = torch.randn(chains, 2, dtype=F64, generator=generator)
        u = torch.rand(chains, dtype=F64, generator=generator)
        move = score_based.mala(energy, x, 0.4, z, u) if method == "mala" else score_based.hmc(energy, x, 0.9, 3, z, u)
        x, accepted = move[0], accepted + move[1].sum().item() / (20 * chains)
    assert 0.3 < accepted < 0.98
    centred = x - data.mean
    assert (centred.mean(0).abs() < 4.5 * torch.tensor([1.0, 0.5]).sqrt() / chains**0.5).all()
    # The variance of a product of two centred normals is c_ii c_jj + c_ij^2.
    for i, j, c, spread in ((0, 0, 1.0, 2.0), (1, 1, 0.5, 0.5), (0, 1, 0.3, 0.59)):
        assert abs((centred[:, i] * centred[:, j]).mean().item() - c) < 4.5 * (spread / chains) ** 0.5
