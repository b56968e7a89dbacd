"""Options whose numbers are another code's: each against its published formula, written here."""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import grids, losses, samplers
from fastdiff.errors import ConfigError, DataError, ShapeError
from fastdiff.execution import ops
from fastdiff.execution.noise import PERTURBATION
from fastdiff.networks import MLP

F64 = torch.float64
VP = fastdiff.VP()
START = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4)))
LADDER = [20.0, 9.0, 5.0, 2.4, 1.1, 0.6, 0.3, 0.1]  # noise ratios of VE-like processes, where α = 1
EDM = fastdiff.EDM()


def denoiser(x, sigma):
    """A nonlinear D(x, σ) of one's own."""
    return torch.tanh(x / (1 + sigma)) + 0.2 * torch.sin(3 * x)


def eps_of(x, sigma):
    return (x - denoiser(x, sigma)) / sigma


def network(x, t):
    """ε of EDM's time, which is σ."""
    return eps_of(x, t[:, None])


def run(sampler, sigmas, **options):
    options = {"prediction": "eps", "shape": (4,), "num_samples": 3, "x_init": sigmas[0] * START, **options}
    return fastdiff.sample(network, EDM, sampler=sampler, grid=grids.sigmas(sigmas), **options)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- tables -----------------------------------------------------------------------------------------------------------


def model_of(sde="vp", prediction="eps", time_input=None):
    return fastdiff.ScoreModel(lambda x, t: 0.3 * x + 0.1 * torch.sin(x), sde, prediction, time_input, (4,))


@pytest.mark.parametrize("sampler", ["euler_maruyama", "heun", "unipc", "pc", "annealed_langevin"])
def test_a_planned_table_runs_as_its_arguments_do(sampler):
    model, steps = model_of(), 20
    table = fastdiff.plan("vp", steps, sampler=sampler, prediction="eps")
    options = {"num_samples": 5, "seed": 3}
    assert torch.equal(
        fastdiff.sample(model, table=table, **options), fastdiff.sample(model, steps=steps, sampler=sampler, **options)
    )
    clipped = fastdiff.plan("vp", steps, sampler="ddim", prediction="eps", clip=(-1, 1), t_min=0.01, grid="quadratic")
    x, info = fastdiff.sample(model, table=clipped, return_info=True, **options)
    assert info.table is clipped
    assert torch.equal(
        x, fastdiff.sample(model, steps=steps, sampler="ddim", clip=(-1, 1), t_min=0.01, grid="quadratic", **options)
    )


def test_a_chains_table_is_planned_with_the_models_clock():
    model = model_of()
    chain = fastdiff.DDPM()
    table = fastdiff.plan(chain, 10, prediction="eps", clock=model.process, time_input="t")
    ours, theirs = (fastdiff.sample(model, num_samples=3, **o) for o in ({"table": table}, {"sde": chain, "steps": 10}))
    assert torch.equal(ours, theirs)
    with pytest.raises(ConfigError, match=r"clock=model.process"):
        fastdiff.sample(model, table=fastdiff.plan(chain, 10, prediction="eps", time_input="t"))


def test_an_edited_table_runs_as_it_is():
    """Half of each row's noise: the table's own recursion, by the noise given."""
    table = fastdiff.plan("vp", 6, prediction="eps")
    rows = tuple(dataclasses.replace(row, c=0.5 * row.c) for row in table.rows)
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 3, 4)))
    net = model_of().net
    x = fastdiff.sample(
        net, "vp", table=dataclasses.replace(table, rows=rows), prediction="eps", shape=(4,), num_samples=3, x_init=START,
        noise=noise,
    )  # fmt: skip
    y = START
    for k, row in enumerate(table.rows):
        y = row.a * y + row.b[0] * (row.p * y + row.q * net(y, None)) + 0.5 * row.c * noise[k]
    close(x, y)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"table": "vp"}, "must be a StepTable"),
        ({"steps": 5}, "steps=5 contradicts table"),
        ({"sampler": "ddim"}, "sampler='ddim' contradicts table"),
        ({"grid": "karras"}, "contradicts table"),
        ({"t_min": 0.1}, "contradicts table"),
        ({"clip": (-1, 1)}, "contradicts table"),
        ({"denoise": False}, "contradicts table"),
        ({"sde": "ve"}, "not the process of this model"),
        ({"table": fastdiff.plan("vp", 5)}, "planned for prediction='score', and the model has 'eps'"),
        ({"table": fastdiff.plan("vp", 5, prediction="eps", time_input="t*999")}, "planned for time_input='t\\*999'"),
        (
            {"table": fastdiff.plan("subvp", prediction="eps", grid=grids.sigmas([20, 1, 0.1]), sampler="ddim")},
            "row 0",
        ),
        ({"table": fastdiff.plan("vp", grid=[0.2, 0.1], prediction="eps")}, "x_init"),
    ],
)
def test_tables_of_another_run_are_refused(options, match):
    called = []
    model = fastdiff.ScoreModel(lambda x, t: called.append(1), "vp", data_shape=(4,))
    with pytest.raises(ConfigError, match=match):
        fastdiff.sample(model, num_samples=2, **{"table": fastdiff.plan("vp", 5, prediction="eps"), **options})
    assert not called


def test_a_table_of_a_learned_variance_needs_its_network():
    table = fastdiff.plan("ddpm", 4, sampler=samplers.Ancestral("learned_range"), prediction="eps")
    both = lambda x, t: torch.cat([0.1 * x, 0 * x], 1)  # noqa: E731
    options = {"prediction": "eps", "shape": (4,), "num_samples": 2}
    x = fastdiff.sample(both, "ddpm", table=table, **options)
    expected = fastdiff.sample(both, "ddpm", 4, sampler=samplers.Ancestral("learned_range"), **options)
    assert torch.equal(x, expected)
    rows = (dataclasses.replace(table.rows[0], network_time=998.5), *table.rows[1:])
    with pytest.raises(ConfigError, match="whole ones"):
        fastdiff.sample(both, "ddpm", table=dataclasses.replace(table, rows=rows), **options)


# --- denoising --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "edm", "ve"])
def test_rk45_and_decode_may_end_in_the_mean_of_x0(name):
    model = model_of(name)
    options = {"num_samples": 4, "t_min": model.process.t_noisy or 1e-3}
    solver = samplers.Adaptive(rtol=1e-3, atol=1e-3)
    x, info = fastdiff.sample(model, sampler=solver, return_info=True, **options)
    mean, more = fastdiff.sample(model, sampler=dataclasses.replace(solver, denoise=True), return_info=True, **options)
    t = torch.tensor(options["t_min"])
    expected = (x - model.process.sigma(t) * model(x, t)) / model.process.alpha(t)
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(more.nfe, info.nfe + 1)
    assert more.network_calls == info.network_calls + 1
    _, states = fastdiff.sample(model, sampler=dataclasses.replace(solver, denoise=True), trajectory=3, **options)
    assert torch.equal(states[-1], mean)
    z = model.process.prior_std * START
    flow = {"rtol": 1e-6, "atol": 1e-6, "t_min": options["t_min"], "batch_size": 2}
    at_end = fastdiff.decode(model, z, **flow)
    close(
        fastdiff.decode(model, z, denoise=True, **flow),
        (at_end - model.process.sigma(t.double()) * model(at_end, t)) / model.process.alpha(t.double()),
    )
    a, b = (fastdiff.interpolate(model, 0.1 * START, 0.2 * START, [0.0], denoise=d, rtol=1e-3, atol=1e-3)
            for d in (False, True))  # fmt: skip
    assert not torch.equal(a, b)


# --- losses by given noise --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dsm", "simple", "likelihood", "ism", "ssm_vr"])
def test_losses_by_given_noise_are_those_of_the_same_draw(loss):
    torch.manual_seed(0)
    net = MLP((4,), hidden=8, layers=1).double()
    torch.nn.init.normal_(net.out.weight)
    model = fastdiff.ScoreModel(net, "vp", "v", data_shape=(4,))
    t, cursor = torch.tensor([0.1, 0.5, 0.9], dtype=F64), ops.cursor(2, 0, 7)
    noise = fastdiff.normal(3, (4,), seed=7, draw=2, stream=PERTURBATION).double()
    drawn = losses.per_sample(model, START.float(), t, cursor, loss)
    given = losses.per_sample(model, START.float(), t, cursor, loss, noise=noise)
    torch.testing.assert_close(given, drawn, rtol=2e-5, atol=1e-6)  # x_t is rounded to float32 once or twice
    given.sum().backward()
    gradient = net.out.weight.grad.clone()
    net.zero_grad()
    losses.per_sample(model, START.float(), t, cursor, loss).sum().backward()
    torch.testing.assert_close(gradient, net.out.weight.grad, rtol=1e-4, atol=1e-6)


def test_a_loss_by_given_noise_is_the_papers():
    """score_sde's sum over dimensions of (score·std + z)², here a mean, with no cursor at all."""
    model = model_of("subvp", "score")
    z = torch.from_numpy(np.random.default_rng(5).normal(size=(3, 4)))
    t = torch.tensor([0.2, 0.6, 1.0], dtype=F64)
    log_mean = -0.25 * t**2 * 19.9 - 0.05 * t
    std = 1 - torch.exp(2 * log_mean)
    x = torch.exp(log_mean)[:, None] * START + std[:, None] * z
    expected = ((model(x, t) * std[:, None] + z) ** 2).mean(1)
    close(losses.per_sample(model, START, t, None, "dsm", noise=z), expected)
    for change, error in (
        ({"noise": z[:2]}, ShapeError),
        ({"noise": None}, ConfigError),
        ({"loss": "ssm"}, ConfigError),
    ):
        with pytest.raises(error):
            losses.per_sample(model, START, t, None, **{"loss": "dsm", "noise": z, **change})


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_ddim_may_clip_x0_alone(eta, prediction):
    """diffusers' DDIMScheduler.step with clip_sample and use_clipped_model_output=False."""
    chain = fastdiff.DDPM()
    bars = torch.cumprod(1 - torch.from_numpy(chain.beta_table), 0)
    net = lambda x, t: 1.5 * torch.sin(2 * x)  # noqa: E731
    noise = torch.from_numpy(np.random.default_rng(2).normal(size=(10, 3, 4)))
    sampler = samplers.DDIM(eta=eta, clips_eps=False)
    x = fastdiff.sample(
        net, chain, 10, sampler=sampler, prediction=prediction, grid="leading", clip=(-1, 1), shape=(4,), x_init=START,
        num_samples=3, noise=noise, denoise=False,
    )  # fmt: skip
    y, steps = START, list(range(900, -1, -100))
    for k, now in enumerate(steps):
        bar, after = bars[now], bars[steps[k + 1]] if k < 9 else torch.tensor(1.0, dtype=F64)
        m = net(y, now)
        x0 = {"eps": (y - (1 - bar).sqrt() * m) / bar.sqrt(), "v": bar.sqrt() * y - (1 - bar).sqrt() * m, "x0": m}[
            prediction
        ]
        eps = (y - bar.sqrt() * x0) / (1 - bar).sqrt()
        variance = (1 - after) / (1 - bar) * (1 - bar / after)
        y = after.sqrt() * x0.clamp(-1, 1) + (1 - after - eta**2 * variance).clamp(min=0).sqrt() * eps
        y = y + eta * variance.sqrt() * noise[k]
    close(x, y)
    others = [fastdiff.sample(net, chain, 10, sampler=samplers.DDIM(eta=eta, clips_eps=c), prediction=prediction, shape=(4,),
                              num_samples=3) for c in (True, False)]  # fmt: skip
    torch.testing.assert_close(*others, rtol=1e-3, atol=1e-3)  # without clip there is no difference but rounding


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_state_may_be_clamped_after_each_step(backend, dtype):
    table = fastdiff.plan("vp", 8, prediction="eps", sampler="heun", clip_state=(-1.5, 1.0), grid="quadratic")
    free = fastdiff.plan("vp", 8, prediction="eps", sampler="heun", grid="quadratic")
    net = lambda x, t: torch.cos(x)  # noqa: E731
    states = []
    x = fastdiff.sample(
        net, "vp", table=table, prediction="eps", shape=(4,), num_samples=3, x_init=START.to(dtype), backend=backend,
        callback=lambda k, t, x: states.append(x),
    )  # fmt: skip
    y, base, last = START, None, None
    for k, row in enumerate(free.rows):
        base = y if row.saves_base else base
        h = row.p * y + row.q * net(y, None)
        y = row.a * y + (row.e * base if row.e else 0) + row.b[0] * h + (row.b[1] * last if len(row.b) > 1 else 0)
        if k % 2:
            y = y.clamp(-1.5, 1.0)
        last = h
    torch.testing.assert_close(x, y.to(dtype), rtol=1e-5, atol=1e-5)
    assert float(states[-1].min()) == -1.5
    assert "clamp(" in table.explain()
    assert "clamp(" not in free.explain()
    with pytest.raises(ConfigError, match="corrects it later"):
        fastdiff.plan("vp", 8, sampler="unipc", clip_state=(-1, 1))
    assert fastdiff.plan("vp", 8, sampler=samplers.UniPC(corrector=False), clip_state=(-1, 1)).rows[0].bounds == (-1, 1)


# --- solvers ----------------------------------------------------------------------------------------------------------


def test_unipc_without_corrector_is_the_multistep_midpoint_rule():
    """DPM-Solver++ 2M, and DPM-Solver-2 on ε (diffusers' algorithm_type="dpmsolver", solver_type="midpoint")."""
    x0s = samplers.UniPC(order=2, corrector=False, lower_order_final=False)
    close(run(x0s, LADDER), run(samplers.DPMSolverPP(order=2, lower_order_final=False), LADDER))
    x, last, h_last = LADDER[0] * START, None, None
    for s, u in pairwise(LADDER):
        h, m = math.log(s / u), eps_of(x, s)
        x = x - u * math.expm1(h) * m - (0 if last is None else 0.5 * u * math.expm1(h) * (m - last) * h / h_last)
        last, h_last = m, h
    close(run(dataclasses.replace(x0s, predicts="eps"), LADDER), x)


def test_the_heun_rules_of_two_steps_are_deis_and_sa():
    """diffusers' solver_type="heun" on ε and x0, and k-diffusion's on the SDE: exact integrals of the line."""
    x, y, last, h_last = LADDER[0] * START, LADDER[0] * START, (None, None), None
    for s, u in pairwise(LADDER):
        h, m, d = math.log(s / u), eps_of(x, s), denoiser(y, s)
        x = x - u * math.expm1(h) * m
        y = u / s * y - math.expm1(-h) * d
        if h_last is not None:
            x = x - u * (math.expm1(h) / h - 1) * (m - last[0]) * h / h_last
            y = y + (math.expm1(-h) / h + 1) * (d - last[1]) * h / h_last
        last, h_last = (m, d), h
    close(run(samplers.DEIS(order=2, variable="lambda", lower_order_final=False), LADDER), x)
    close(run(samplers.SA(predictor=2, corrector=0, tau=0.0, lower_order_final=False), LADDER), y)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_third_order_as_k_diffusion_has_it(eta):
    """sample_dpmpp_3m_sde."""
    noise = torch.from_numpy(np.random.default_rng(3).normal(size=(8, 3, 4)))
    sigmas = [*LADDER, 0.0]
    x, d1, d2, h1, h2 = sigmas[0] * START, None, None, None, None
    for k, (s, u) in enumerate(pairwise(sigmas)):
        d = denoiser(x, s)
        if u == 0:
            x = d
            break
        h = math.log(s / u)
        grown = h * (eta + 1)
        x = math.exp(-grown) * x - math.expm1(-grown) * d
        phi2 = math.expm1(-grown) / grown + 1
        if h2 is not None:
            r0, r1 = h1 / h, h2 / h
            d10, d11 = (d - d1) / r0, (d1 - d2) / r1
            x = x + phi2 * (d10 + (d10 - d11) * r0 / (r0 + r1)) - (phi2 / grown - 0.5) * (d10 - d11) / (r0 + r1)
        elif h1 is not None:
            x = x + phi2 * (d - d1) * h / h1
        x = x + noise[k] * u * math.sqrt(-math.expm1(-2 * h * eta))
        d1, d2, h1, h2 = d, d1, h, h1
    sampler = samplers.DPMSolverPP(order=3, eta=eta, third="k_diffusion", lower_order_final=False)
    close(run(sampler, sigmas, noise=noise), x)


def test_third_order_as_its_authors_have_it():
    """multistep_dpm_solver_third_update, after a second one; at the end of few steps orders 2 and 1."""
    x, ms, hs = LADDER[0] * START, [], []
    for k, (s, u) in enumerate(pairwise(LADDER)):
        h, order = math.log(s / u), min(3, k + 1, len(LADDER) - 1 - k)
        ms, hs = [denoiser(x, s), *ms], [h, *hs]
        phi1 = math.expm1(-h)
        phi2 = phi1 / h + 1
        phi3 = phi2 / h - 0.5
        x = u / s * x - phi1 * ms[0]
        if order == 2:
            x = x - 0.5 * phi1 * (ms[0] - ms[1]) * h / hs[1]
        if order == 3:
            r0, r1 = hs[1] / h, hs[2] / h
            d10, d11 = (ms[0] - ms[1]) / r0, (ms[1] - ms[2]) / r1
            x = x + phi2 * (d10 + r0 / (r0 + r1) * (d10 - d11)) - phi3 * (d10 - d11) / (r0 + r1)
    close(run(samplers.DPMSolverPP(order=3, third="authors"), LADDER), x)


@pytest.mark.parametrize("predicts", ["x0", "eps"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("sigmas", [LADDER, LADDER[1:], [*LADDER, 0.0], LADDER[:1] + LADDER[-2:]])
def test_single_steps_on_the_grid_are_diffusers(order, predicts, sigmas):
    """DPMSolverSinglestepScheduler: order_list, and its second and third updates of solver_type "midpoint"."""
    count = len(sigmas) - 1
    if order == 3:
        listed = (
            [1, 2, 3] * (count // 3 - 1) + [1, 2, 1]
            if count % 3 == 0
            else [1, 2, 3] * (count // 3) + [1, 2][: count % 3]
        )
    else:
        listed = [1] * count if order == 1 else [1, 2] * ((count - 1) // 2) + ([1, 1] if count % 2 == 0 else [1])
    if sigmas[-1] == 0:
        listed[-1] = 1
    x, ms, base = sigmas[0] * START, [], START
    for k, (s, u) in enumerate(pairwise(sigmas)):
        base = x if listed[k] == 1 else base
        ms = [denoiser(x, s) if predicts == "x0" else eps_of(x, s), *([] if listed[k] == 1 else ms)]
        first = sigmas[k + 1 - listed[k]]
        if u == 0:
            x = x - s * ms[0] if predicts == "eps" else ms[0]
            break
        h = math.log(first / u)
        phi = math.expm1(-h) if predicts == "x0" else math.expm1(h)
        scale, a = (1.0, u / first) if predicts == "x0" else (u, 1.0)
        x = a * base - scale * phi * ms[-1]
        if listed[k] > 1:
            d = (ms[0] - ms[-1]) * h / math.log(first / s)
            x = (
                x - 0.5 * scale * phi * d
                if listed[k] == 2
                else x + (1 if predicts == "x0" else -1) * scale * (phi / h + (1 if predicts == "x0" else -1)) * d
            )
    close(run(samplers.DPMSolverSinglestep(order=order, predicts=predicts), sigmas), x)


def test_euler_with_churn_is_k_diffusions():
    """sample_euler, but for σ̂ beyond the process's own end, where no network was trained."""
    noise = torch.from_numpy(np.random.default_rng(4).normal(size=(20, 3, 4)))
    sigmas, x, k = [*LADDER, 0.0], LADDER[0] * START, 0
    for s, u in pairwise(sigmas):
        gamma = min(2.0 / 8, 2**0.5 - 1) if 0.4 <= s <= 6 else 0.0
        raised = s * (gamma + 1)
        if gamma > 0:
            x = x + noise[k] * 1.007 * math.sqrt(raised**2 - s**2)
            k += 1
        x = x + (x - denoiser(x, raised)) / raised * (u - raised)
        k += 1
    churned = samplers.ODE(s_churn=2.0, s_min=0.4, s_max=6.0, s_noise=1.007)
    close(run(churned, sigmas, noise=noise[:k]), x)
    with pytest.raises(ConfigError, match="score_sde"):
        fastdiff.plan("vp", 30, sampler=samplers.ODE(s_churn=1.0), grid="score_sde")


# --- schedules, features, training, probes ----------------------------------------------------------------------------


def test_polyexponential_noise_is_k_diffusions():
    ramp = torch.linspace(1, 0, 12, dtype=F64) ** 2.5
    expected = torch.exp(ramp * (math.log(14.6) - math.log(0.03)) + math.log(0.03))
    ours = grids.polyexponential(14.6, 0.03, 12, rho=2.5)
    np.testing.assert_allclose(ours[:-1], expected, rtol=1e-14)
    assert ours[-1] == 0
    np.testing.assert_allclose(grids.polyexponential(14.6, 0.03, 12)[:-1], np.geomspace(14.6, 0.03, 12), rtol=1e-13)
    assert len(fastdiff.plan("edm", sampler="dpmpp_2m", grid=grids.sigmas(ours)).rows) == 12
    with pytest.raises(ConfigError, match="sigma_min"):
        grids.polyexponential(1.0, 0.0, 5)


def test_sigmoid_betas_are_diffusers():
    expected = torch.sigmoid(torch.linspace(-6, 6, 50, dtype=F64)) * (0.02 - 1e-4) + 1e-4
    np.testing.assert_allclose(fastdiff.DDPM("sigmoid_beta", T=50).beta_table, expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_cos_sin_features_are_openais(dtype):
    """timestep_embedding of guided-diffusion, and diffusers' with flip_sin_to_cos, freq_shift=0."""
    t = torch.tensor([0.0, 1.0, 37.5, 999.0], dtype=dtype)
    frequencies = torch.exp(-math.log(10000) * torch.arange(32, dtype=F64) / 32)
    angles = t.double()[:, None] * frequencies
    embedding = fastdiff.networks.TimeEmbedding(64, "cos_sin", scale=1.0)
    expected = torch.cat([angles.cos(), angles.sin()], 1)
    torch.testing.assert_close(embedding(t).double(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-9)
    net = MLP((2,), hidden=8, layers=1, time_embedding="cos_sin")
    fastdiff.ScoreModel(net, "ddpm", "eps", "index", (2,))
    assert net.config["time_scale"] == 1.0  # the scale of a chain's steps, as for "sinusoidal"


def trained(tmp_path=None, **options):
    torch.manual_seed(0)
    net = MLP((2,), hidden=8, layers=1)
    data = np.random.default_rng(0).uniform(-1, 1, (64, 2))
    first = [p.detach().clone() for p in net.parameters()]
    options = {"steps": 3, "batch_size": 16, "warmup": 2, "ema": 0.5, "lr": 0.1, **options}
    fastdiff.train(fastdiff.ScoreModel(net, "vp", data_shape=(2,)), data, checkpoint=tmp_path, **options)
    return first, [p.detach().clone() for p in net.parameters()]


def test_averages_follow_their_rule():
    """By the weights after each step, which ema=0 shows (of "constant": m = 0)."""
    after = [trained(steps=n, ema=0.0, ema_rule="constant")[1] for n in (1, 2, 3)]
    first, _ = trained()
    rules = {
        "diffusers": [0.0, min(0.25, 2 / 11), min(0.25, 3 / 12)],
        "score_sde": [min(0.25, 2 / 11), min(0.25, 3 / 12), min(0.25, 4 / 13)],
        "constant": [0.25] * 3,
    }
    for rule, kept in rules.items():
        average = first
        for m, weights in zip(kept, after):
            average = [m * a + (1 - m) * w for a, w in zip(average, weights)]
        for ours, theirs in zip(trained(ema=0.25, ema_rule=rule)[1], average):
            torch.testing.assert_close(ours, theirs)


def test_warm_up_may_start_at_zero():
    """score_sde's: lr·min(n/W, 1), so that the first step of Adam changes nothing."""
    first, now = trained(steps=1, ema=0.0, ema_rule="constant", warmup_start=0)
    assert all(torch.equal(a, b) for a, b in zip(first, now))
    first, now = trained(steps=1, ema=0.0, ema_rule="constant", warmup_start=0, warmup=0)  # no warm-up at all
    assert not all(torch.equal(a, b) for a, b in zip(first, now))


def test_rules_are_kept_and_may_change_on_resume(tmp_path):
    whole = trained(steps=3, ema_rule="score_sde")[1]
    trained(tmp_path / "a", steps=2, ema_rule="score_sde")
    resumed = trained(tmp_path / "a", steps=3, ema_rule="score_sde")[1]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))
    with pytest.warns(UserWarning, match="ema_rule='constant', which was 'score_sde'"):
        trained(tmp_path / "a", steps=4, ema_rule="constant")
    with pytest.raises(ConfigError, match="ema_rule must be one of"):
        trained(ema_rule="none")


def test_given_probes_are_hutchinsons_vectors():
    """The same vectors given and drawn; and v of one's own, against vᵀ(∂ε)v along a linear flow."""
    model = model_of("vp")
    x = 0.5 * START
    drawn = torch.empty(3, 2, 4, dtype=F64)
    ops.backend_module("reference").rademacher(drawn, ops.cursor(0, 0, 5), fastdiff.execution.noise.PROBES)
    options = {"rtol": 1e-4, "atol": 1e-4}
    given = fastdiff.log_likelihood(model, x, probes=drawn.transpose(0, 1).contiguous(), **options)
    expected = fastdiff.log_likelihood(model, x, probes=2, seed=5, **options)
    assert torch.equal(given.nats, expected.nats)
    assert torch.equal(given.stderr, expected.stderr)
    parts = fastdiff.log_likelihood(model, x, probes=drawn.transpose(0, 1), batch_size=1, **options)
    close(parts.nats, given.nats)
    for change, error in (
        ({"probes": drawn}, ShapeError),
        ({"probes": drawn.transpose(0, 1), "trace": "exact"}, ConfigError),
        ({"probes": drawn.transpose(0, 1), "probe": "normal"}, ConfigError),
        ({"probes": torch.full((1, 3, 4), math.nan)}, DataError),
        ({"probes": torch.tensor(1.0)}, ShapeError),
    ):
        with pytest.raises(error):
            fastdiff.log_likelihood(model, x, **change)


def test_what_the_page_calls_exists():
    """Every call of the page's tables is one: an object, or a keyword that `sample`, `train` or a network takes."""
    page = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
    names = {
        "fastdiff": fastdiff,
        "samplers": samplers,
        "grids": grids,
        "schedules": fastdiff.schedules,
        "torch": torch,
        "guidance": fastdiff.guidance,
    }
    names |= {"timesteps": [980, 500, 20], "empty": torch.zeros(3), "low_res": torch.ones(2, 3)}
    names |= {"classifier": lambda x, t: x, "y": 1}
    chain = fastdiff.DDPM()
    cells = [line.split("|")[2] for line in page.splitlines() if line.startswith("|") and "`" in line.split("|")[2]]
    calls = [call for cell in cells for call in re.findall(r"`([^`]+)`", cell)]
    assert len(calls) > 50
    for call in calls:
        keyword = re.match(r"(\w+)=", call)
        if keyword is None:
            made = eval(call, names)
            assert isinstance(made, samplers.Sampler | fastdiff.DDPM), call
            if isinstance(made, samplers.Sampler) and not isinstance(
                made, samplers.Adaptive | samplers.PredictorCorrector
            ):
                assert len(fastdiff.plan(chain, 12, sampler=made)), call
            continue
        options = eval(f"dict({call})", names)
        kind = keyword[1]
        if kind in ("grid", "clip"):
            sde = "vp" if call == 'grid="score_sde"' else "edm" if "karras" in call or "poly" in call else chain
            sampler = "euler_maruyama" if sde == "vp" else "ddim"
            implied = not isinstance(options.get("grid", "leading"), str) or re.match(r'grid="(ddim)?\d', call)
            assert len(fastdiff.plan(sde, None if implied else 30, sampler=sampler, **options)), call
        elif kind == "time_input":
            sde = "vp" if call in ('time_input="t*999"', 'time_input="sigma"') else chain
            assert fastdiff.ScoreModel(torch.nn.Identity(), sde, "eps", data_shape=(2,), **options), call
        elif kind == "time_embedding":
            assert MLP((2,), hidden=8, layers=1, **options)
        elif kind in ("guidance", "cond"):
            given = {"shape": (3,), "num_samples": 2, "cond": torch.ones(2, 3), **options}
            assert fastdiff.sample(lambda x, t, c: x * c[:, :1], "vp", 2, **given).shape == (2, 3)
        elif kind == "probes":
            model = model_of()
            assert fastdiff.log_likelihood(model, torch.zeros(8, 4), probes=torch.ones(1, 8, 4), rtol=0.1, atol=0.1)
        else:
            trained(steps=1, **options)
