"""Loss, weight and times: each against its paper's equation or a closed form, and each pair through `train`."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats

import fastdiff
from fastdiff import losses
from fastdiff.errors import CheckpointMismatchError, ConfigError, DataError, ShapeError
from fastdiff.execution import noise, ops
from fastdiff.losses import times, weights
from fastdiff.networks import MLP
from fastdiff.training import Data, objective

F64 = torch.float64
CURSOR = ops.cursor(5, 0, 3)


def eps_of(n, shape):
    """What the losses draw for CURSOR."""
    return fastdiff.normal(n, shape, seed=3, draw=5, stream=noise.PERTURBATION).double()


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def wave(x, t):
    """Some network."""
    return torch.sin(x.flatten(1).cumsum(1)).view(x.shape) * (1 + t.double().view(-1, *[1] * (x.ndim - 1)) / 10)


def normals(n=256, std=1.0):
    rng = np.random.default_rng(0)
    return Data(torch.from_numpy((std * rng.normal(size=(n, 2))).astype("float32")), range=(-6 * std, 6 * std))


# --- weights ---------------------------------------------------------------------------------------------------------

# of the squared error of x0 or of the score, as the papers print them
OF_X0 = {
    "edm": lambda s, a, d: ((s / a) ** 2 + d**2) / (s / a * d) ** 2,
    "min_snr": lambda s, a, d: np.minimum((a / s) ** 2, 5.0),
}
OF_SCORE = {"sigma2": lambda s, a: s**2, "one": lambda s, a: 1 + 0 * s, "p2": lambda s, a: s**2 / (1 + (a / s) ** 2)}


@pytest.mark.parametrize("sde", ["vp", "ve", "edm", "ddpm"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score", "edm"])
def test_weights_are_their_papers(sde, prediction):
    model = fastdiff.ScoreModel(wave, sde, prediction, "t", data_shape=(3,))
    process, x0 = model.process, randn(5, 3)
    t = torch.tensor([1.0, 20, 300, 700, 999], dtype=F64) * (1 if process.discrete else float(process.T) / 1000)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x = alpha[:, None] * x0 + sigma[:, None] * eps_of(5, (3,))
    of_x0 = ((model.predict("x0", x, t) - x0) ** 2).mean(1)
    of_score = ((model.score(x, t) + eps_of(5, (3,)) / sigma[:, None]) ** 2).mean(1)
    wanted = {k: f(sigma.numpy(), alpha.numpy(), process.sigma_data) * of_x0.numpy() for k, f in OF_X0.items()}
    wanted |= {k: f(sigma.numpy(), alpha.numpy()) * of_score.numpy() for k, f in OF_SCORE.items()}
    wanted["g2"] = (process.diffusion(t) ** 2 * of_score).numpy()
    for name, value in wanted.items():
        ours = losses.per_sample(model, x0, t, CURSOR, "dsm", weight=name)
        np.testing.assert_allclose(ours.numpy(), value, rtol=2e-5, atol=1e-9, err_msg=name)
        given = losses.per_sample(model, x0, t, None, "dsm", weight=name, noise=eps_of(5, (3,)))
        np.testing.assert_allclose(given.numpy(), value, rtol=2e-5, atol=1e-9, err_msg=name)


def test_weights_with_numbers_of_their_own_and_ones_of_ones_own():
    model, x0, t = (
        fastdiff.ScoreModel(wave, "vp", data_shape=(3,)),
        randn(4, 3),
        torch.tensor([0.1, 0.4, 0.7, 1.0]).double(),
    )
    base = losses.per_sample(model, x0, t, CURSOR, "dsm")
    snr = (model.process.alpha(t) / model.process.sigma(t)) ** 2
    soft = losses.per_sample(model, x0, t, CURSOR, "dsm", weight=weights.MinSNR(gamma=1.0))
    torch.testing.assert_close(soft, base * torch.minimum(snr, torch.ones(4, dtype=F64)) / snr)
    strong = losses.per_sample(model, x0, t, CURSOR, "dsm", weight=weights.P2(gamma=0.5, k=2.0))
    torch.testing.assert_close(strong, base / (2 + snr).sqrt())

    class Late(weights.Weight):
        name = "late"

        def of_noise(self, process, t, alpha, sigma):
            return t**2

    torch.testing.assert_close(losses.per_sample(model, x0, t, CURSOR, "dsm", weight=Late()), base * t**2)
    ism = losses.per_sample(model, x0, t, CURSOR, "ism")
    torch.testing.assert_close(losses.per_sample(model, x0, t, CURSOR, "ism", weight=Late()), ism * t**2)


def test_former_names_are_pairs():
    model, x0, t = fastdiff.ScoreModel(wave, "vp", "v", data_shape=(3,)), randn(4, 3), torch.full((4,), 0.4, dtype=F64)
    for old, weight in (("simple", "target"), ("likelihood", "g2")):
        assert torch.equal(
            losses.per_sample(model, x0, t, CURSOR, old), losses.per_sample(model, x0, t, CURSOR, "dsm", weight=weight)
        )
    with pytest.raises(
        ConfigError, match="loss='simple' is loss='dsm' with weight='target': to give another, use loss='dsm'"
    ):
        losses.per_sample(model, x0, t, CURSOR, "simple", weight="p2")


@pytest.mark.parametrize(("prediction", "power"), [("score", 2.0), ("scaled_score", 1.0)])
def test_ladder_losses_of_ncsn_and_ncsnv2(prediction, power):
    """½‖s + ε/σ‖² σ² of each sample (Song & Ermon 2019, eq. 5), NCSNv2's with s = output/σ (2020)."""
    ladder = fastdiff.NCSN()
    model = fastdiff.ScoreModel(wave, ladder, prediction, "index", data_shape=(3,))
    x0, eps, labels = randn(6, 3), eps_of(6, (3,)), torch.tensor([0, 3, 5, 7, 8, 9])
    sigmas = torch.tensor(ladder.sigmas, dtype=F64)[labels][:, None]
    output = wave(x0 + sigmas * eps, labels)
    score = output if prediction == "score" else output / sigmas
    target = -eps / sigmas
    theirs = 0.5 * ((score - target) ** 2).sum(1) * sigmas[:, 0] ** 2
    ours = losses.per_sample(model, x0, (ladder.T - labels).double(), CURSOR, "dsm") * 3 / 2
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_learned_uncertainty_goes_to_the_log_of_the_mean_loss():
    """Kendall's L/eᵘ + u is least at u = ln E L; here L = (1 + c)²·χ²₁ with c the place of the level, so E L = (1 + c)²."""
    process, learned = fastdiff.VP(), weights.Learned()
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([process.t_train, 1.0], dtype=F64)
    low, high = (process.sigma(ends) / process.alpha(ends)).log().tolist()
    for _ in range(3000):
        c = torch.rand(256, generator=generator, dtype=F64)
        t = process.time(torch.exp(low + (high - low) * c))
        learned.observe(process, t, (1 + c) ** 2 * torch.randn(256, generator=generator, dtype=F64) ** 2)
    c = torch.linspace(0.02, 0.98, 20, dtype=F64)
    u = learned.uncertainty(process, process.time(torch.exp(low + (high - low) * c)))
    assert (u - 2 * (1 + c).log()).abs().max() < 0.15
    model = fastdiff.ScoreModel(wave, process, data_shape=(3,))
    t = torch.full((4,), 0.3, dtype=F64)
    plain = losses.per_sample(model, randn(4, 3), t, CURSOR, "dsm", weight="edm")
    ours = losses.per_sample(model, randn(4, 3), t, CURSOR, "dsm", weight=learned)
    u = learned.uncertainty(process, t)
    torch.testing.assert_close(ours, plain / u.exp() + u)


def test_the_learned_uncertainty_of_a_loss_without_the_constant_is_that_with_it():
    """ "ssm_vr" is "dsm" less λ in the mean, so below 0 for a good network: u is the log of the mean of "dsm"."""
    process, c = fastdiff.VP(), 0.05
    of = objective.Objective.of(
        small("vp", "dsm"), normals(), False, "ssm_vr", "learned", "stratified", "hard", None, 0.001
    )
    learned = of.weight
    for _ in range(1500):
        drawn = of.draw((torch.arange(256, dtype=F64) + 0.5) / 256, 0.0)
        rate = weights.EDM().of_noise(process, drawn.t, process.alpha(drawn.t), process.sigma(drawn.t))
        u = learned.uncertainty(process, drawn.t)
        of.observe([(drawn, (c - rate) * (-u).exp() + u)])
    seen = learned.uncertainty(process, of.draw(torch.linspace(0.1, 0.9, 20, dtype=F64), 0.0).t)
    assert (seen - math.log(c)).abs().max() < 0.05


# --- the control variate ---------------------------------------------------------------------------------------------


def test_variance_reduced_matching_has_the_same_mean_and_less_variance_at_small_noise():
    """Over many draws of ε: the same loss and gradient as "dsm"; at σ = 0.002 a thousandth of its gradient's variance."""
    shift = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    model = fastdiff.ScoreModel(lambda x, t: -(x - shift) / 2, "ve", "score", data_shape=(2,))
    n, x0 = 20_000, randn(2).repeat(20_000, 1)
    found = {}
    for sigma in (0.02, 1.0, 10.0):
        t = model.process.time(torch.full((n,), sigma, dtype=F64))
        for loss in ("dsm", "dsm_vr"):
            values = losses.per_sample(model, x0, t, CURSOR, loss)
            pieces = [torch.autograd.grad(v.mean(), shift, retain_graph=True)[0] for v in values.split(500)]
            found[sigma, loss] = values.detach(), torch.stack(pieces)
        (a, da), (b, db) = found[sigma, "dsm"], found[sigma, "dsm_vr"]
        assert (a.mean() - b.mean()).abs() < 4 * ((a.var() + b.var()) / n).sqrt()
        assert ((da.mean(0) - db.mean(0)).abs() < 4 * ((da.var(0) + db.var(0)) / len(da)).sqrt() + 1e-12).all()
    (a, da), (b, db) = found[0.02, "dsm"], found[0.02, "dsm_vr"]
    assert b.var() < 1e-3 * a.var()
    assert db.var(0).sum() < 2e-3 * da.var(0).sum()
    assert found[10.0, "dsm_vr"][1].var(0).sum() < 1.5 * found[10.0, "dsm"][1].var(0).sum()


# --- the variational bound -------------------------------------------------------------------------------------------


def openai_terms(process, x0, x_t, t, x0_hat, log_var, bins):
    """The terms of Nichol & Dhariwal's code, in nats per number: their posterior mean, KL of normals, and discretised likelihood
    by scipy's normal distribution; t from 1."""
    betas = process.beta_table
    bars = np.cumprod(1 - betas)
    before = np.append(1.0, bars[:-1])
    variance = betas * (1 - before) / (1 - bars)
    clipped = np.log(np.append(variance[1], variance[1:]))
    first, second = betas * np.sqrt(before) / (1 - bars), (1 - before) * np.sqrt(1 - betas) / (1 - bars)
    i = t - 1
    true, model = first[i] * x0 + second[i] * x_t, first[i] * x0_hat + second[i] * x_t
    if t > 1:
        gap = clipped[i] - log_var
        return 0.5 * (-1 - gap + np.exp(gap) + (true - model) ** 2 * np.exp(-log_var))
    std, half = np.exp(0.5 * log_var), 1 / (bins - 1)
    upper, lower = stats.norm.cdf((x0 + half - model) / std), stats.norm.cdf((x0 - half - model) / std)
    upper, lower = np.where(x0 > 0.999, 1.0, upper), np.where(x0 < -0.999, 0.0, lower)
    return -np.log(upper - lower)


@pytest.mark.parametrize("variance", ["posterior", "beta", "learned", "learned_range"])
def test_the_terms_of_the_bound_are_openais(variance):
    process, bins = fastdiff.DDPM("cosine", T=20), 17
    rng = np.random.default_rng(0)
    x0 = torch.from_numpy(rng.integers(0, bins, (6, 3)) / (bins - 1) * 2 - 1)
    twice = variance.startswith("learned")

    def net(x, t):
        out = 0.3 * torch.tanh(x) + 0.02 * t.double()[:, None]
        return torch.cat([out, torch.sin(3 * x) - (3 if variance == "learned" else 0)], 1) if twice else out

    model = fastdiff.ScoreModel(net, process, "eps", data_shape=(3,), variance=variance if twice else None)
    found = fastdiff.vlb(model, x0, bins=bins, seed=4, variance=variance)
    assert found.times.tolist() == list(range(20, 0, -1))
    betas = process.beta_table
    bars = np.cumprod(1 - betas)
    floor = betas * (1 - np.append(1.0, bars[:-1])) / (1 - bars)
    floor[0] = floor[1]
    for t in range(1, 21):
        eps = fastdiff.normal(6, (3,), seed=4, draw=t, stream=noise.PERTURBATION).double().numpy()
        x_t = np.sqrt(bars[t - 1]) * x0.numpy() + np.sqrt(1 - bars[t - 1]) * eps
        out = net(torch.from_numpy(x_t.astype("float32")), torch.full((6,), t - 1.0)).numpy()
        x0_hat = (x_t - np.sqrt(1 - bars[t - 1]) * out[:, :3]) / np.sqrt(bars[t - 1])
        log_var = np.log(floor[t - 1] if variance == "posterior" or t == 1 else betas[t - 1])
        if variance == "learned":
            log_var = out[:, 3:]
        elif variance == "learned_range":
            share = (out[:, 3:] + 1) / 2
            log_var = share * np.log(betas[t - 1]) + (1 - share) * np.log(floor[t - 1])
        wanted = openai_terms(process, x0.numpy(), x_t, t, x0_hat, log_var, bins).sum(1)
        np.testing.assert_allclose(found.terms[:, 20 - t].numpy(), wanted, rtol=1e-5, atol=1e-6)
    mean, var = np.sqrt(bars[-1]) * x0.numpy(), 1 - bars[-1]
    prior = 0.5 * (mean**2 + var - 1 - np.log(var)).sum(1)
    np.testing.assert_allclose(found.prior.numpy(), prior, rtol=1e-6, atol=1e-12)
    total = (prior + found.terms.sum(1).numpy()) / (3 * np.log(2))
    np.testing.assert_allclose(found.bits_per_dim.numpy(), total, rtol=1e-12)


def exact(process, std, variance):
    """A network that knows N(0, std²) data: x̂0 = E[x0|x_t], and log of the reverse step's own variance."""

    def net(x, t):
        t = t.double()
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        ahead = process.alpha(t - 1)[:, None], process.sigma(t - 1)[:, None]
        total = alpha**2 * std**2 + sigma**2
        clean = alpha * std**2 / total * x.double()
        ratio = alpha / ahead[0]
        beta = sigma**2 - ratio**2 * ahead[1] ** 2
        left = std**2 * sigma**2 / total  # of x0 given x_t
        reverse = beta * ahead[1] ** 2 / sigma**2 + (ahead[0] * beta / sigma**2) ** 2 * left
        return torch.cat([clean, reverse.log().expand_as(x)], 1) if variance else clean

    return net


def test_the_bound_is_tight_where_the_reverse_chain_is_exact():
    """Over the data its mean is then the entropy + KL(q(x_T) ‖ p(x_T)); with a fixed variance it is larger."""
    process, std, n = fastdiff.DDPM("linear", T=30), 0.5, 20_000
    x0 = std * randn(n, 1)
    last = process.alpha(np.float64(30)) ** 2 * std**2 + process.sigma(np.float64(30)) ** 2
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2) + 0.5 * (last - 1 - math.log(last))
    bound = {}
    for variance in ("learned", None):
        model = fastdiff.ScoreModel(
            exact(process, std, variance), process, "x0", "t", data_shape=(1,), variance=variance
        )
        bound[variance] = fastdiff.vlb(model, x0)
    nats = bound["learned"].nats
    assert abs(float(nats.mean()) - entropy) < 4 * float(nats.std()) / n**0.5
    # of each sample: E over the noise is −log p(x0), to what one draw of the noise shows
    true = 0.5 * (math.log(2 * math.pi * std**2) + (x0[:, 0] / std) ** 2)
    assert abs(float(np.corrcoef(nats, true)[0, 1])) > 0.5
    gap = bound[None].nats - nats
    assert float(gap.mean()) > 10 * float(gap.std()) / n**0.5
    assert "bits/dim of 20000 samples" in repr(bound["learned"])


def test_the_bound_of_a_chain_of_one_step_has_its_beta_as_variance():
    """By hand: KL of the prior, and a Gaussian of mean x̂0 and variance β, for the step before is none."""
    process, x0 = fastdiff.DDPM((0.75,)), 0.5 * randn(500, 1)
    model = fastdiff.ScoreModel(lambda x, t: 0.1 + 0.0 * x, process, "x0", "t", data_shape=(1,))
    prior = 0.5 * (0.25 * x0**2 + 0.75 - 1 - math.log(0.75))
    decoder = 0.5 * (math.log(2 * math.pi * 0.75) + (x0 - 0.1) ** 2 / 0.75)
    nats = (prior + decoder)[:, 0]
    torch.testing.assert_close(fastdiff.vlb(model, x0).nats, nats, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("process", [fastdiff.VP(), fastdiff.processes.RectifiedFlow()], ids=lambda p: p.name)
def test_the_bound_of_a_continuous_process_tends_to_the_likelihood(process):
    """A chain of N steps with the exact score of N(0, ½²): the bound of the density falls to −log p as 1/N, L²/4N at most."""
    std, n = 0.5, 4000
    x0 = std * randn(n, 1)

    def clean(x, t):
        alpha, sigma = process.alpha(t.double())[:, None], process.sigma(t.double())[:, None]
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x.double()

    model = fastdiff.ScoreModel(clean, process, "x0", data_shape=(1,))
    exact = float((0.5 * math.log(2 * math.pi * std**2) + 0.5 * (x0 / std) ** 2).mean())
    ends = torch.tensor([process.t_noisy, process.t_start], dtype=F64)
    low, high = (process.sigma(ends) / process.alpha(ends)).log().tolist()
    span = 2 * (high - low)
    gaps = {steps: float(fastdiff.vlb(model, x0, steps=steps).nats.mean()) - exact for steps in (80, 160, 320)}
    assert all(0 < gap < span**2 / (4 * steps) for steps, gap in gaps.items()), gaps
    assert 1.7 < gaps[80] / gaps[160] < 2.6
    assert 1.7 < gaps[160] / gaps[320] < 2.6
    with pytest.raises(ConfigError, match="steps=20 is of continuous processes"):
        fastdiff.vlb(fastdiff.ScoreModel(wave, "ddpm", data_shape=(1,)), x0, steps=20)


def test_the_decoder_is_a_distribution_over_the_levels():
    """Whatever its mean and variance the masses of all levels add up to 1, also far out in a tail; and gradients are finite."""
    bins, level = 9, torch.linspace(-1, 1, 9, dtype=F64)
    model = fastdiff.ScoreModel(wave, fastdiff.DDPM("cosine", T=5), data_shape=(1,))
    levels = losses.levels_of(model, (-1.0, 1.0), bins)
    step = losses.bound.chain_step(model.process, torch.ones(bins))
    for mean, log_var in itertools.product((-30.0, -0.9, 0.02, 1.0, 5.0), (-9.0, -3.0, 1.0)):
        error = (level - mean)[:, None].requires_grad_()
        scale = torch.full((bins, 1), log_var, dtype=F64, requires_grad=True)
        nats = losses.bound.terms(step, level[:, None], error, scale, levels)
        nats.sum().backward()
        assert torch.isfinite(error.grad).all()
        assert torch.isfinite(scale.grad).all()
        if -2 < mean < 2:
            assert abs(float(torch.exp(-nats.detach()).sum()) - 1) < 1e-9, (mean, log_var)


def test_the_loss_vlb_is_the_bound_term_by_term():
    """Its mean over all steps is the bound less the prior, in bits per number."""
    process = fastdiff.DDPM("cosine", T=12)
    data = Data(torch.randint(0, 17, (5, 3), generator=torch.Generator().manual_seed(0)).byte(), range=(0.0, 16.0))
    model = fastdiff.ScoreModel(wave, process, "v", "t", data_shape=(3,))
    bound = fastdiff.vlb(model, data, seed=7)
    x0, levels = data.batch(torch.arange(5), (-1.0, 1.0)).double(), losses.levels_of(model, (-1.0, 1.0), 17)
    total = 0
    for t in range(1, 13):
        cursor = ops.cursor(t, 0, 7)
        total += losses.per_sample(model, x0, torch.full((5,), float(t)), cursor, "vlb", levels=levels) / 12
    torch.testing.assert_close(total, bound.bits_per_dim - bound.prior / (3 * math.log(2)), rtol=1e-4, atol=1e-5)
    other = fastdiff.vlb(model, data, seed=7, batch_size=2)
    torch.testing.assert_close(other.terms, bound.terms, rtol=1e-9, atol=1e-9)
    tail = fastdiff.vlb(model, x0[3:], bins=17, seed=7, first_sample=3)
    torch.testing.assert_close(tail.nats, bound.nats[3:], rtol=1e-5, atol=1e-5)


def test_the_hybrid_trains_the_mean_by_the_first_part_and_the_variance_by_the_bound():
    process = fastdiff.DDPM("cosine", T=12)
    x0, t = randn(6, 2).clamp(-1, 1), torch.tensor([1.0, 2, 3, 6, 9, 12])
    mean, second = (randn(6, 2, seed=k).requires_grad_() for k in (1, 2))
    model = fastdiff.ScoreModel(
        lambda x, t: torch.cat([mean, second], 1), process, "eps", data_shape=(2,), variance="learned_range"
    )

    def gradients(loss, **options):
        value = losses.per_sample(model, x0, t, CURSOR, loss, **options).sum()
        return torch.autograd.grad(value, (mean, second))

    hybrid, bound = gradients("hybrid", vlb_weight=0.01), gradients("vlb")
    fixed = fastdiff.ScoreModel(lambda x, t: mean, process, "eps", data_shape=(2,))
    (simple,) = torch.autograd.grad(losses.per_sample(fixed, x0, t, CURSOR, "simple").sum(), mean)
    torch.testing.assert_close(hybrid[0], simple)
    torch.testing.assert_close(hybrid[1], 0.01 * bound[1])
    assert not torch.allclose(bound[0], torch.zeros_like(simple))


def test_a_learned_variance_goes_to_that_of_the_reverse_step():
    """Trained on N(0, 1) numbers with "hybrid": log variance within 0.1 of log(β̃ + c² Var[x0|x_t]), between log β̃ and log β."""
    torch.manual_seed(0)
    process = fastdiff.DDPM(list(np.linspace(0.1, 0.5, 10)))
    net = MLP((1,), hidden=32, layers=2, out_channels=2)
    model = fastdiff.ScoreModel(net, process, "eps", data_shape=(1,), variance="learned_range", data_range=(-5.0, 5.0))
    data = Data(torch.randn(4000, 1, generator=torch.Generator().manual_seed(1)).clamp(-5, 5), range=(-5.0, 5.0))
    fastdiff.train(
        model, data, steps=800, loss="hybrid", vlb_weight=1.0, batch_size=256, lr=5e-3, warmup=20, ema=0.99, decay=True
    )
    for t in (2, 4, 7, 10):
        when = torch.full((1,), float(t), dtype=F64)
        step = losses.bound.chain_step(process, when)
        left = process.sigma(when) ** 2  # Var[x0|x_t] of N(0, 1) data on a variance-preserving chain
        wanted = float((step.log_posterior.exp() + step.c**2 * left).log())
        x = torch.linspace(-1.5, 1.5, 7)[:, None]
        ours = losses.bound.log_variance("learned_range", step, model.outputs(x, float(t))[1].detach(), x)
        assert (ours - wanted).abs().max() < 0.1, (t, ours.flatten(), wanted)
    x = fastdiff.sample(model, num_samples=2000)
    assert abs(float(x.std()) - 1) < 0.06


# --- times -----------------------------------------------------------------------------------------------------------


def stratified(n):
    return (torch.arange(n, dtype=F64) + 0.5) / n


@pytest.mark.parametrize("sde", ["vp", "ve", "subvp", "ddpm", "edm"])
def test_importance_keeps_the_integral_and_makes_g2_even(sde):
    process = fastdiff.processes.get(sde)
    base = times.Stratified()(process, stratified(400_000))
    drawn = times.Importance()(process, stratified(200_000))
    for f in (lambda t: 1 + 0 * t, lambda t: torch.cos(3 * t / process.T), lambda t: t / process.T):
        wanted, ours = f(base.t).mean(), (f(drawn.t) * drawn.factor).mean()
        assert abs(float(ours - wanted)) < 2e-3, (ours, wanted)
    even = (process.diffusion(drawn.t) / process.sigma(drawn.t)) ** 2 * drawn.factor
    spread = (even / even.mean() - 1).abs()
    assert float(spread.quantile(0.99) if len(spread) < 1e6 else 0) < 0.05
    if sde in ("vp", "ve", "subvp"):  # −d ln SNR/dt = g²/σ²: ln SNR is uniform
        log_snr = 2 * (process.alpha(drawn.t) / process.sigma(drawn.t)).log()
        share = (log_snr - log_snr.min()) / (log_snr.max() - log_snr.min())
        assert stats.kstest(share.numpy()[::37], "uniform").statistic < 0.01


def test_second_moments_are_asked_where_losses_vary_most():
    """p ∝ √E[L²] by the last ten of each step, and a thousandth uniform; until then uniform; the mean loss stays unbiased."""
    process = fastdiff.DDPM("cosine", T=8)
    rule = times.SecondMoment(process)
    assert (times.get("second_moment", process)(process, stratified(64)).factor == 1).all()
    v = (torch.arange(8) + 0.5) / 8
    for k in range(13):  # the first three are forgotten
        rule.observe(v, torch.arange(1, 9) * (100.0 if k < 3 else 1.0))
    root = np.arange(1, 9.0)
    wanted = 0.999 * root / root.sum() + 0.001 / 8
    _, mass = rule.masses(process)
    np.testing.assert_allclose(mass.numpy(), wanted, rtol=1e-12)
    drawn = rule(process, stratified(80_000))
    shares = np.bincount(drawn.t.long().numpy(), minlength=9)[1:] / 80_000
    np.testing.assert_allclose(shares, wanted, atol=2e-5)
    assert abs(float((drawn.t * drawn.factor).mean()) - 4.5) < 1e-3


def test_lognormal_times():
    for sde in ("ve", "edm", "vp"):
        process = fastdiff.processes.get(sde)
        drawn = times.LogNormal(-0.4, 1.0)(process, stratified(999))
        level = (process.sigma(drawn.t) / process.alpha(drawn.t)).log()
        wanted = stats.norm.ppf(stratified(999).numpy(), -0.4, 1.0)
        inside = np.abs((stratified(999).numpy()) - 0.5) < 0.45
        np.testing.assert_allclose(level.numpy()[inside], wanted[inside], atol=1e-4)
        assert drawn.factor is None
    chain = fastdiff.DDPM()
    t = times.LogNormal()(chain, stratified(999)).t
    assert torch.equal(t, t.round())
    assert 1 <= t.min() <= t.max() <= 1000


def test_three_ways_round_zero():
    vp, u = fastdiff.VP(), stratified(10_000)
    rule = times.Stratified()
    assert float(times.draw(rule, "hard", vp, u, 0.3).t.min()) >= vp.t_train
    soft = times.draw(rule, "soft", vp, u, 0.5).t
    start = vp.t_train**0.5  # half of the way from t_train to 1 on a log scale
    assert abs(float(soft.min()) - start) < 1e-3
    assert abs(float(soft.mean()) - (start + 1) / 2) < 1e-3
    clamp = times.draw(rule, "clamp", vp, stratified(1_000_000), 0.0).t
    assert int((clamp == vp.t_train).sum()) == 10
    both = times.draw(times.Importance(), "soft", vp, u, 0.5)
    t = start + (1 - start) * stratified(100_000)
    assert abs(float((both.t * both.factor).mean() - t.mean())) < 1e-3
    for bad, words in (
        (("stratified", "soft", fastdiff.DDPM()), "truncation='soft' is of training times"),
        (("stratified", "clamp", fastdiff.EDM()), "truncation='clamp' is of training times"),
        (("lognormal", "soft", vp), "truncation='soft' does not go with times='lognormal'"),
        (("stratified", "sof", vp), "did you mean 'soft'"),
    ):
        with pytest.raises(ConfigError, match=words):
            times.check(times.get(bad[0], bad[2]), bad[1], bad[2])


# --- through train ---------------------------------------------------------------------------------------------------


def small(sde, loss, prediction="edm"):
    torch.manual_seed(0)
    variance = "learned_range" if loss == "hybrid" else None
    net = MLP((2,), hidden=16, layers=1, out_channels=4 if variance else None)
    return fastdiff.ScoreModel(net, sde, prediction, data_shape=(2,), variance=variance)


CASES = [
    *((loss, None, "stratified", "hard") for loss in losses.LOSSES),
    *(("dsm", weight, "stratified", "hard") for weight in weights.WEIGHTS),
    *(("ssm_vr", weight, "stratified", "hard") for weight in ("g2", "edm", "learned")),
    *(("dsm", "learned", rule, "hard") for rule in times.TIMES),
    *(("dsm", "g2", "importance", truncation) for truncation in ("hard", "soft")),
    *(("hybrid", "min_snr", rule, "hard") for rule in ("second_moment", "importance")),
    ("dsm_vr", "one", "uniform", "clamp"),
]


@pytest.mark.parametrize(("loss", "weight", "rule", "truncation"), CASES)
def test_every_pair_is_a_call_and_goes_on_bit_for_bit(loss, weight, rule, truncation, tmp_path):
    sde = "ddpm" if loss in losses.BOUNDED else "vp"
    if sde == "ddpm":
        sde = fastdiff.DDPM("cosine", T=6)  # few enough steps for each to have its ten losses
    options = {
        "loss": loss,
        "weight": weight,
        "times": rule,
        "truncation": truncation,
        "batch_size": 32,
        "warmup": 5,
        "lr": 1e-3,
    }
    whole, parts = small(sde, loss), small(sde, loss)
    done = fastdiff.train(whole, normals(), steps=24, **options)
    assert torch.isfinite(done.loss).all()
    fastdiff.train(parts, normals(), steps=17, checkpoint=tmp_path, **options)
    parts = small(sde, loss)
    fastdiff.train(parts, normals(), steps=24, checkpoint=tmp_path, **options)
    for a, b in zip(whole.parameters(), parts.parameters()):
        assert torch.equal(a, b)


def test_an_object_that_learns_is_each_trainings_own():
    learned, rule = weights.Learned(), times.SecondMoment(fastdiff.VP())
    runs = [small("vp", "dsm") for _ in range(2)]
    for model in runs:
        fastdiff.train(model, normals(), steps=6, weight=learned, times=rule, batch_size=16, warmup=2)
    assert not learned.u.any()
    assert not rule.seen.any()
    for a, b in zip(*(model.parameters() for model in runs)):
        assert torch.equal(a, b)


def test_another_loss_weight_or_rule_is_another_run(tmp_path):
    options = {"batch_size": 16, "warmup": 5, "checkpoint": tmp_path}
    fastdiff.train(small("vp", "dsm"), normals(), steps=2, weight=weights.MinSNR(3), **options)
    for other, word in (
        ({"weight": weights.MinSNR(4)}, "weight"),
        ({"weight": weights.MinSNR(3), "times": "uniform"}, "times"),
        ({"weight": weights.MinSNR(3), "truncation": "soft"}, "truncation"),
        ({"loss": "simple"}, "weight"),
    ):
        with pytest.raises(CheckpointMismatchError, match=f"was trained with {word}="):
            fastdiff.train(small("vp", "dsm"), normals(), steps=4, **options, **other)


def test_what_does_not_go_together_is_refused():
    data = normals()
    for arguments, words in (
        ({"loss": "hybrd"}, "did you mean 'hybrid'"),
        ({"weight": "min_sn"}, "did you mean 'min_snr'"),
        ({"times": "importnce"}, "did you mean 'importance'"),
        ({"loss": "vlb"}, "loss='vlb' is the bound of a chain, and 'vp' is continuous"),
        ({"loss": "vlb", "weight": "g2"}, "weight='g2' does not go with loss='vlb'"),
        ({"loss": "hybrid", "weight": "learned"}, "weight='learned' does not go with loss='hybrid'"),
        ({"vlb_weight": -1.0}, "vlb_weight must be"),
        ({"vlb_weight": 0.1}, "vlb_weight=0.1 is of the bound in loss='hybrid', got loss='dsm': leave it out"),
        ({"weight": weights.MinSNR}, "weight must be an object or a name, got the class itself"),
    ):
        with pytest.raises(ConfigError, match=words):
            fastdiff.train(small("vp", "dsm"), data, steps=1, **arguments)
    with pytest.raises(ConfigError, match="loss='hybrid' trains a learned variance, and the model has none"):
        fastdiff.train(small("ddpm", "dsm"), data, steps=1, loss="hybrid")
    with pytest.raises(ConfigError, match="loss='dsm' does not train the model's variance='learned_range'"):
        fastdiff.train(small("ddpm", "hybrid"), data, steps=1)
    learned = small("ddpm", "hybrid")
    with pytest.raises(ConfigError, match="of the sampler is not what the model learned"):
        fastdiff.sample(learned, sampler=fastdiff.samplers.Ancestral(variance="learned"), num_samples=1)
    with pytest.raises(ConfigError, match="variance='learned' is that of a chain's own steps"):
        fastdiff.plan("ddpm", 10, sampler=fastdiff.samplers.Ancestral(variance="learned"))
    model = small("ddpm", "dsm")
    for x, arguments, error, words in (
        (torch.zeros(2, 3), {}, ShapeError, r"x must have shape \[B, 2\]"),
        (torch.full((2, 2), 0.3), {"bins": 5}, DataError, "must lie on the 5 levels from -1 to 1"),
        (torch.zeros(2, 2), {"variance": "learned"}, ConfigError, "variance must be one of"),
        (torch.zeros(2, 2), {"bins": 1}, ConfigError, "bins must be"),
        (torch.zeros(2, 2), {"first_sample": 1.5}, ConfigError, "first_sample must be an integer >= 0"),
        (torch.tensor([[0.0, math.nan]]), {}, DataError, "x"),
    ):
        with pytest.raises(error, match=words):
            fastdiff.vlb(model, x, **arguments)


def test_the_objective_of_a_batch_weighs_by_the_density():
    model = small("vp", "dsm")
    of = objective.Objective.of(model, normals(), False, "dsm", "g2", "importance", "hard", None, 0.001)
    drawn = of.draw(stratified(64).float(), 0.0)
    values = torch.arange(64.0)
    torch.testing.assert_close(of.mean(values, drawn), (values * drawn.factor).mean())
    assert of.options()["times"] == {"name": "importance"}


def crowded(process, prediction, **options):
    """The warnings of a training about few samples that count."""
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(MLP((2,), hidden=4, layers=1), process, prediction, data_shape=(2,))
    data = fastdiff.Data(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), range=(-5.0, 5.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastdiff.train(model, data, steps=2, batch_size=8, **options)
    return [str(each.message) for each in caught if "few samples count" in str(each.message)]


@pytest.mark.parametrize("weight", ["edm", "learned"])
def test_a_weight_that_few_samples_would_carry_is_said_with_ways_out_that_work(weight):
    """EDM's weight of the error of eps is (sigma/alpha)^2 + 1, which a cosine schedule takes to 10^8 and more."""
    chain = fastdiff.DDPM("cosine")
    (said,) = crowded(chain, "eps", weight=weight)
    factor = np.sort((chain.sigma(np.arange(1, 1001.0)) / chain.alpha(np.arange(1, 1001.0))) ** 2 + 1)
    share = factor[-10:].sum() / factor.sum()
    assert share > 0.999
    assert f"weight='{weight}' puts {share:.1%} of the loss" in said
    assert "t = 991 to 1000" in said
    assert said.endswith("give loss='dsm' with weight='min_snr', or prediction='v'")
    assert not crowded(chain, "eps", loss="dsm", weight="min_snr")
    assert not crowded(chain, "v", weight=weight)
    assert not crowded(chain, "edm", weight=weight)  # of whose output the weight is 1 (Karras et al. 2022, eq. 8)


def test_the_bound_of_a_network_that_predicts_the_data_is_even_by_importance():
    (said,) = crowded("vp", "x0", loss="likelihood")
    assert "give times='importance', which leaves the integral, or loss='dsm' with weight='min_snr'" in said
    assert not crowded("vp", "x0", loss="likelihood", times="importance")


@pytest.mark.parametrize("process", ["ve", "vp", "ou", "edm", "ddpm", "ncsn"])
@pytest.mark.parametrize(
    ("prediction", "weight"),
    [("eps", "edm"), ("eps", "g2"), ("eps", "p2"), ("edm", "edm"), ("edm", "g2"), ("v", "learned"), ("x0", "min_snr"),
     ("score", "sigma2"), ("eps", "target")],
)  # fmt: skip
def test_a_weight_that_many_samples_carry_is_not_spoken_of(process, prediction, weight):
    assert not crowded(process, prediction, weight=weight)
