"""Guidance against closed forms: Gaussians and mixtures whose guided scores, flows and chains are known exactly."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import Gaussian, Mixture, gaussian_chain
from runs import LEARNED, one_of_each_kind
from torch import nn

import fastdiff
from fastdiff import samplers
from fastdiff.errors import ConfigError, DataError, DTypeError, FastdiffError, ModelOutputError, ShapeError
from fastdiff.guidance import Auto, Classifier, ClassifierFree, LogLikelihood
from fastdiff.guidance.base import Setting, guided, units
from fastdiff.networks import MLP
from fastdiff.networks.classifiers import MLPClassifier, WideResNet, build_classifier

F64 = torch.float64
VP, VE = fastdiff.VP(), fastdiff.VE()
MEANS = torch.tensor([[1.0, -0.5], [-1.2, 0.3], [0.2, 1.5]], dtype=F64)
STDS = torch.tensor([0.3, 0.5, 0.4], dtype=F64)
ALL = Mixture([0.5, 0.3, 0.2], MEANS, STDS)
EACH = [Gaussian(mean, std=float(std)) for mean, std in zip(MEANS, STDS)]


class Exact(nn.Module):
    """The exact network of the mixture: of class y, or of all where y = 3; counts the samples of each call."""

    num_classes = 3

    def __init__(self, process, prediction="score"):
        super().__init__()
        self.process, self.prediction, self.seen = process, prediction, []

    def forward(self, x, t, y):
        self.seen.append(len(x))
        t = t.double()
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        if self.prediction == "edm":  # which sees c_in x, and is told c_noise
            sigma_hat = (4 * t).exp()
            alpha = self.process.alpha(self.process.time(sigma_hat))
            sigma = alpha * sigma_hat
            x = x * (sigma**2 + (alpha * self.process.sigma_data) ** 2).sqrt()[:, None]
            t = self.process.time(sigma_hat)
        made = torch.stack([each.x0(x, alpha, sigma) for each in (*EACH, ALL)])
        x0 = made.gather(0, y.view(1, -1, 1).expand(1, *x.shape))[0]
        r, w = fastdiff.predictions.coordinates(self.prediction, self.process, t, alpha, sigma)
        eps = (x - alpha[:, None] * x0) / sigma[:, None]
        return (r[:, None] * x0 + w[:, None] * eps).to(x.dtype)


def exact(process=VP, prediction="score", **options):
    options = {"data_shape": (2,), "num_classes": 3, "cond_dropout": 0.1, **options}
    return fastdiff.ScoreModel(Exact(process, prediction), process, prediction, **options)


def labels(count, shift=0):
    return (torch.arange(count) + shift) % 3


def bound(model, given, count, cond=None, dtype=F64):
    """The guided model, and a function of its x̂0 at (x, t)."""
    outer, parts, *_ = guided(given, Setting(model, count, dtype, torch.device("cpu"), 0, 0, cond))
    return lambda kind, x, t: outer.predict(kind, x, t, parts)


PREDICTIONS = ("score", "eps", "x0", "v", "scaled_score", "velocity", "edm")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", [VP, VE, fastdiff.SubVP()], ids=lambda p: p.name)
def test_the_guided_score_is_the_formula(process, prediction):
    """Ho & Salimans 2022, eq. 6, and Karras et al. 2024 with the unconditional model as the weaker one."""
    model, y = exact(process, prediction), labels(12)
    x = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t = torch.linspace(0.02, 0.9, 12, dtype=F64) * process.T
    alpha, sigma = process.alpha(t), process.sigma(t)
    free = ALL.score(x, alpha, sigma)
    cond = torch.stack([EACH[k].score(x, alpha, sigma)[i] for i, k in enumerate(y.tolist())])
    for scale in (3.0, 0.0, -1.5, torch.linspace(-2, 4, 12)):
        column = scale[:, None].double() if isinstance(scale, torch.Tensor) else scale
        wanted = free + column * (cond - free)
        found = bound(model, ClassifierFree(scale), 12, y)("score", x, t)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    weaker = exact(process, "x0")
    asked = bound(model, [ClassifierFree(1.0), Auto(weaker, 2.5)], 12, y)("score", x, t)
    torch.testing.assert_close(asked, cond, rtol=1e-9, atol=1e-9)  # as strong as the model itself
    ratio = sigma / alpha
    low, high = float(ratio[3]), float(ratio[8])
    found = bound(model, ClassifierFree(3.0, interval=(low, high)), 12, y)("score", x, t)
    weight = torch.where((ratio > low) & (ratio <= high), 3.0, 1.0)[:, None]
    torch.testing.assert_close(found, free + weight * (cond - free), rtol=1e-9, atol=1e-9)


def test_rescaled_outputs_are_lin_et_als():
    model, y = exact(prediction="v"), labels(6)
    x, t = torch.randn(6, 2, dtype=F64), torch.full((6,), 0.4, dtype=F64)
    positive, negative = model(x, t, y), model(x, t, torch.full((6,), 3))
    guided_v = negative + 4.0 * (positive - negative)
    factor = 0.7 * positive.std(1, keepdim=True) / guided_v.std(1, keepdim=True) + 0.3
    found = bound(model, ClassifierFree(4.0, rescale=0.7), 6, y)("v", x, t)
    torch.testing.assert_close(found, guided_v * factor, rtol=1e-9, atol=1e-9)


# --- runs ----------------------------------------------------------------------------------------------------------------


def draw(model, given=None, count=6, **options):
    options = {"steps": 8, "num_samples": count, "cond": labels(count), "check": "off", **options}
    return fastdiff.sample(model, guidance=given, **options)


NOTHING = LogLikelihood(
    lambda x, t: 0.0 * x.flatten(1).sum(1), of="x_t"
)  # beside which a guidance is computed in torch


@pytest.mark.parametrize(("sde", "sampler", "steps"), [*one_of_each_kind(), LEARNED], ids=str)
def test_every_kind_of_row_takes_the_weight(sde, sampler, steps):
    """The same as where the guided network is a network of its own; the same bits on both backends."""
    process = fastdiff.processes.get(sde)

    class Net(nn.Module):
        num_classes = 3

        def forward(self, x, t, y):
            m = 0.3 * torch.sin(x + y[:, None]) - 0.1 * x
            return torch.cat((m, m.cos()), 1) if (sde, sampler, steps) == LEARNED else m

    variance = "learned_range" if (sde, sampler, steps) == LEARNED else None
    model = fastdiff.ScoreModel(
        Net(), process, "score", "t", data_shape=(5,), num_classes=3, cond_dropout=0.1, variance=variance
    )
    options = {"sampler": sampler, "steps": steps, "dtype": F64, "grid": None}
    found = draw(model, ClassifierFree(2.5), **options)
    unfused = draw(model, [ClassifierFree(2.5), NOTHING], **options)
    scale = unfused.abs().max()
    assert ((found - unfused).abs().max() / scale if scale.isfinite() else torch.tensor(0.0)) < 1e-9
    plain = draw(model, **options)
    assert torch.equal(draw(model, ClassifierFree(1.0), **options).nan_to_num(), plain.nan_to_num())
    assert not torch.equal(found.nan_to_num(), plain.nan_to_num())
    narrow = options | {"dtype": torch.float32}
    ours, theirs = (draw(model, ClassifierFree(2.5), backend=backend, **narrow) for backend in ("auto", "reference"))
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_clipped_rows_that_use_the_output_as_it_is_use_the_guided_one():
    """DDIM of diffusers, clip_sample=True: x0 is clipped, ε is not."""
    model, options = exact(VP, "eps"), {"sampler": samplers.DDIM(clips_eps=False), "clip": (-0.8, 0.8), "dtype": F64}
    found, info = draw(model, ClassifierFree(2.5), return_info=True, **options)
    assert any(row.raw for row in info.table.rows)
    unfused = draw(model, [ClassifierFree(2.5), NOTHING], **options)
    torch.testing.assert_close(found, unfused, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sampler", ["ddim", "euler_maruyama", "heun", "unipc", "pc", "rk45", "adaptive_sde"])
@pytest.mark.parametrize("prediction", ["eps", "edm"])
def test_scale_one_is_the_conditional_run_and_zero_the_unconditional_one(sampler, prediction):
    model, chooses = exact(VE, prediction), sampler in ("rk45", "adaptive_sde")
    steps, near = ({}, 1e-5) if chooses else ({"steps": 8}, 1e-7)  # chosen steps carry rounding on
    options = {"dtype": F64, "sampler": sampler, "num_samples": 5, "check": "final", **steps}
    for scale, cond in ((1.0, labels(5)), (0.0, torch.full((5,), 3))):
        wanted = fastdiff.sample(model, cond=cond, **options)
        found = fastdiff.sample(model, cond=labels(5), guidance=ClassifierFree(scale), **options)
        torch.testing.assert_close(found, wanted, rtol=near, atol=near)


def test_both_outputs_come_of_one_pass_and_none_is_asked_for_beyond_the_interval():
    model = exact()
    _, info = draw(model, ClassifierFree(3.0, interval=(0.3, 5.0)), sampler="ddim", return_info=True)
    ratios = [row.level.sigma_hat for row in info.table.rows]
    assert model.net.seen == [12 if 0.3 < ratio <= 5 else 6 for ratio in ratios]
    assert 0 < model.net.seen.count(12) < 8
    assert {row.guidance for row in info.table.rows} == {1.0, 3.0}
    assert "guided(x, 3)" in info.table.explain()
    model.net.seen.clear()
    draw(model, [ClassifierFree(3.0, interval=(0.3, 5.0)), NOTHING], sampler="ddim")
    assert model.net.seen == [12 if 0.3 < ratio <= 5 else 6 for ratio in ratios]
    model.net.seen.clear()
    draw(model, ClassifierFree(1.0), sampler="ddim")
    assert model.net.seen == [6] * 8


GUIDANCES = {
    "classifier-free": ClassifierFree(3.0),
    "rescaled": ClassifierFree(3.0, rescale=0.5),
    "in an interval": ClassifierFree(3.0, interval=(0.1, 9.0)),
    "of each sample": ClassifierFree(torch.linspace(0, 3, 7)),
    "auto": Auto(exact(prediction="v"), 2.0),
    "classifier": Classifier(lambda x, t: -((x[:, None] - MEANS.to(x)) ** 2).sum(2), labels(7, 1)),
    "likelihood": LogLikelihood(lambda x: -((x - 1) ** 2).sum(1), 0.5),
    "a list": [ClassifierFree(2.0), LogLikelihood(lambda x, t: -((x - 1) ** 2).sum(1), of="x_t")],
}


# (what is rescaled by the spread of two numbers alone is no smooth field)
@pytest.mark.parametrize(("name", "sampler"), [*((name, "euler_maruyama") for name in GUIDANCES),
                                               *((name, "rk45") for name in GUIDANCES if name != "rescaled")])  # fmt: skip
def test_samples_do_not_depend_on_the_batch(name, sampler):
    options = {"sampler": sampler, "steps": 8}
    if sampler == "rk45":
        options = {"sampler": samplers.Adaptive(rtol=1e-3, atol=1e-3), "steps": None}
    runs = [draw(exact(), GUIDANCES[name], 7, batch_size=size, **options) for size in (None, 1, 3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    assert bool(runs[0].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sde", ["ve", "vp", "subvp", "edm"])
def test_levels_on_the_ends_of_an_interval(sde, dtype):
    """lo < σ/α ≤ hi, whatever the times have been rounded to, and the same in rows and in torch."""
    model = fastdiff.ScoreModel(exact_of_conditions, sde, "x0", "t", (4,), cond_shape=(4,), cond_dropout=0.1)
    ratios = [20.0, 3.0, 1.0, 0.3, 0.1]
    for low, high in [(0.3, 3.0), (0.1, 1.0), (0.3, 20.0)]:
        run = functools.partial(
            fastdiff.sample, model, grid=fastdiff.grids.sigmas([*ratios, 0.01]), sampler="ddim", num_samples=2,
            cond=torch.ones(2, 4), dtype=dtype,
        )  # fmt: skip
        x, info = run(guidance=ClassifierFree(3.0, interval=(low, high)), return_info=True)
        assert [row.guidance for row in info.table.rows] == [3.0 if low < ratio <= high else 1.0 for ratio in ratios]
        each = run(guidance=ClassifierFree(torch.full((2,), 3.0), interval=(low, high)))
        torch.testing.assert_close(each, x, rtol=0, atol=1e-4)


def exact_of_conditions(x, t, cond):
    return torch.tanh(x) + cond.nan_to_num()


def test_weights_stay_in_the_rows_beside_what_changes_the_state():
    """Part of the samples is known, the rest follows the condition: one pass, with the numbers of the guided network's own."""
    problem = fastdiff.inverse.Problem(torch.tensor([0.5]), fastdiff.inverse.Mask(torch.tensor([True, False])), 0.0)
    model = exact()
    both = [ClassifierFree(2.0), fastdiff.inverse.Replacement(problem)]
    found, info = draw(model, both, sampler="euler_maruyama", dtype=F64, return_info=True)
    assert model.net.seen == [12] * 8
    assert info.table.guides
    assert torch.equal(found[:, 0], torch.full((6,), 0.5, dtype=F64))
    unfused = draw(model, [*both, NOTHING], sampler="euler_maruyama", dtype=F64)
    torch.testing.assert_close(found, unfused, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", GUIDANCES)
def test_networks_of_half_precision_guide_states_of_full_precision(name):
    """What is computed of the prediction stands in the state's dtype, and so does the time; no gradient is left of either."""
    torch.manual_seed(0)
    seen, given = [], GUIDANCES[name]

    def classifier(x, t):
        seen.append((x.dtype, t.dtype, x.shape))
        return -((x[:, None] - MEANS.to(x)) ** 2).sum(2)

    net = MLP((2,), num_classes=3, hidden=32)
    nn.init.normal_(net.out.weight, std=0.1)
    model = fastdiff.ScoreModel(net, "vp", "v", data_shape=(2,), cond_dropout=0.1)
    given = Auto(model, 2.0) if name == "auto" else Classifier(classifier, 1) if name == "classifier" else given
    runs = []
    for dtype in (torch.float32, torch.bfloat16):
        net.to(dtype)
        runs.append(draw(model, given, 7, sampler="ddim"))
        with torch.inference_mode():
            assert torch.equal(draw(model, given, 7, sampler="ddim"), runs[-1])
    assert runs[1].dtype == torch.float32
    assert not runs[1].requires_grad
    torch.testing.assert_close(*runs, rtol=0.02, atol=0.02)
    assert {kind[:2] for kind in seen} <= {(torch.float32, torch.float32)}
    if name != "of each sample":
        assert draw(model, given, 0, sampler="ddim").shape == (0, 2)


# --- Gaussians: what the guided process ends in ------------------------------------------------------------------------------

A, B = (1.0, 0.25), (-0.3, 1.0)  # mean and variance with the condition and without


def gaussian(prediction="eps"):
    """Scalar data N(A) where y = 0, N(B) where y = 1, which is the null label."""

    class Net(nn.Module):
        num_classes = 1

        def forward(self, x, t, y):
            alpha, sigma = VP.alpha(t.double())[:, None], VP.sigma(t.double())[:, None]
            mean, var = (torch.tensor(pair, dtype=F64)[y][:, None] for pair in zip(A, B))
            score = (alpha * mean - x.double()) / (alpha**2 * var + sigma**2)
            return (-sigma * score).to(x.dtype)

    return fastdiff.ScoreModel(Net(), VP, prediction, data_shape=(1,), num_classes=1, cond_dropout=0.1)


def guided_line(t, scale):
    """(u, v) of the guided score u·x + v at time t."""
    alpha, sigma = (float(f(np.float64(t))) for f in (VP.alpha, VP.sigma))
    spread = [alpha**2 * var + sigma**2 for _, var in (A, B)]
    weights = scale, 1 - scale
    u = -sum(w / s for w, s in zip(weights, spread))
    return u, sum(w * alpha * mean / s for w, s, (mean, _) in zip(weights, spread, (A, B)))


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 4.0])
def test_the_flow_of_gaussians_is_the_guided_linear_ode(scale):
    """x(t_min) = a·x(T) + b, by Runge–Kutta's method in fine steps on (a, b)."""
    x, t, end = np.array([1.0, 0.0]), 1.0, 1e-3
    # steps even in sqrt(t), as the flow is stiff at the end
    edges = np.linspace(1.0, math.sqrt(end), 4001) ** 2

    def slope(t, y):
        u, v = guided_line(t, scale)
        f, g2 = float(VP.drift(np.float64(t))), float(VP.diffusion(np.float64(t))) ** 2
        return np.array([(f - 0.5 * g2 * u) * y[0], (f - 0.5 * g2 * u) * y[1] - 0.5 * g2 * v])

    for t, after in pairwise(edges):
        h = after - t
        k1 = slope(t, x)
        k2 = slope(t + h / 2, x + h / 2 * k1)
        k3 = slope(t + h / 2, x + h / 2 * k2)
        k4 = slope(after, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    start = torch.linspace(-2, 2, 5, dtype=F64)[:, None]
    options = {"num_samples": 5, "cond": torch.zeros(5, dtype=torch.long), "x_init": start, "t_min": end}
    adaptive = samplers.Adaptive(rtol=1e-10, atol=1e-10)
    for solver, near in ((adaptive, 1e-7), ("heun", 2e-4)):
        steps = {} if solver is adaptive else {"steps": 400}
        found = fastdiff.sample(gaussian(), guidance=ClassifierFree(scale), sampler=solver, **steps, **options)
        torch.testing.assert_close(found, x[0] * start + x[1], rtol=near, atol=near)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("sampler", ["ancestral", "euler_maruyama", "pc"])
def test_the_moments_of_gaussians_are_the_guided_chains(scale, sampler):
    """20,000 draws within five standard errors of the mean and variance that the table's rows make of a linear network."""
    count = 20_000
    x, info = fastdiff.sample(
        gaussian(), steps=60, sampler=sampler, num_samples=count, cond=torch.zeros(count, dtype=torch.long),
        guidance=ClassifierFree(scale), return_info=True,
    )  # fmt: skip
    rows = []
    for row in info.table.rows:
        assert row.guidance == scale
        u, v = guided_line(row.level.t, scale)
        u, v = -row.level.sigma * u, -row.level.sigma * v  # of ε
        b = row.b[0] if row.b else 0.0
        rows.append((row.a + row.e + b * (row.p + row.q * u), b * row.q * v, row.c))
    mean, var = gaussian_chain(0.0, info.table.prior_std**2, rows)
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(var / count)
    assert abs(float(x.var()) / var - 1) < 5 * math.sqrt(2 / count)


# --- classifiers and likelihoods ------------------------------------------------------------------------------------------


class Bayes(nn.Module):
    """The exact classifier of the mixture, from its components' densities."""

    def __init__(self, process):
        super().__init__()
        self.process, self.modes = process, set()

    def forward(self, x, t):
        self.modes.add(self.training)
        t = t.double()
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        density = torch.stack([each.log_prob(x.double(), alpha, sigma) for each in EACH], 1)
        return density + ALL.weights.log()


@pytest.mark.parametrize("process", [VP, VE, fastdiff.SubVP()], ids=lambda p: p.name)
@pytest.mark.parametrize("sampler", ["euler_maruyama", "ode", "rk45"])
def test_the_exact_classifier_makes_the_conditional_run(process, sampler):
    """∇ log p(x_t | y) = ∇ log p(x_t) + ∇ log p(y | x_t)."""
    model, bayes = exact(process), Bayes(process).train()
    options = {"dtype": F64, "sampler": sampler, "steps": None if sampler == "rk45" else 30}
    free = torch.full((6,), 3)
    wanted = draw(model, cond=labels(6), **options)
    torch.testing.assert_close(
        draw(model, Classifier(bayes, labels(6)), cond=free, **options), wanted, rtol=1e-6, atol=1e-6
    )
    one = draw(model, cond=torch.full((6,), 1), **options)
    torch.testing.assert_close(draw(model, Classifier(bayes, 1), cond=free, **options), one, rtol=1e-6, atol=1e-6)
    assert bayes.modes == {False}
    assert bayes.training
    # Dhariwal & Nichol 2021, Alg. 2: ε − s σ ∇ log p(y | x_t)
    x, t = torch.randn(6, 2, dtype=F64), torch.full((6,), 0.3 * process.T, dtype=F64)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(bayes(leaf, t).log_softmax(1)[range(6), labels(6)].sum(), leaf)
    wanted = model.predict("eps", x, t, free) - 1.7 * process.sigma(t)[:, None] * slope
    found = bound(model, Classifier(bayes, labels(6), 1.7), 6, free)("eps", x, t)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_likelihood_of_the_prediction_goes_through_the_network_once():
    """Data N(0, 1) on VP: x̂0 = α x, so the shift is σ²/α·α (y − α x)/τ²; a forward and a backward pass in each call."""
    calls, passes = [], []

    class Net(nn.Module):
        def forward(self, x, t):
            calls.append(x.requires_grad)
            if x.requires_grad:
                x.register_hook(lambda g: passes.append(1))
            return -x

    model = fastdiff.ScoreModel(Net(), VP, "score", data_shape=(3,))
    y, tau = torch.linspace(-1, 1, 4, dtype=F64)[:, None], 0.7
    x, t = torch.randn(4, 3, dtype=F64), torch.linspace(0.1, 0.9, 4, dtype=F64)
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    given = LogLikelihood(lambda x0: -((x0 - y) ** 2).sum(1) / (2 * tau**2), 0.8)
    found = bound(model, given, 4)("x0", x, t)
    assert (calls, passes) == ([True], [1])
    torch.testing.assert_close(found, alpha * x + 0.8 * sigma**2 * (y - alpha * x) / tau**2, rtol=1e-9, atol=1e-9)
    # of the state the network is not asked to differentiate
    given = LogLikelihood(lambda x, t: -((x - y) ** 2).sum(1) / (2 * tau**2), 0.8, of="x_t")
    found = bound(model, given, 4)("x0", x, t)
    assert calls == [True, False]
    torch.testing.assert_close(found, alpha * x + 0.8 * sigma**2 / alpha * (y - x) / tau**2, rtol=1e-9, atol=1e-9)


def test_likelihoods_are_of_the_data_in_their_own_units():
    seen = []
    model = fastdiff.ScoreModel(lambda x, t: -x, VP, "score", data_shape=(2,), standardize=([10.0, -5.0], [2.0, 3.0]))

    def function(x0):
        seen.append(x0.detach())
        return -(x0**2).sum(1)

    x, t = torch.randn(3, 2, dtype=F64), torch.full((3,), 0.2, dtype=F64)
    found = bound(model, LogLikelihood(function), 3)("x0", x, t)
    mean, std = (torch.tensor(v, dtype=F64) for v in ([10.0, -5.0], [2.0, 3.0]))
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    torch.testing.assert_close(seen[-1], mean + std * alpha * x, rtol=1e-9, atol=1e-9)
    wanted = alpha * x - 2 * sigma**2 * std * (mean + std * alpha * x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_list_is_applied_in_order():
    """The likelihood of the prediction sees what classifier-free guidance has left, and its gradient goes through both passes."""
    model, y = exact(), labels(5)
    x, t = torch.randn(5, 2, dtype=F64), torch.full((5,), 0.3, dtype=F64)
    leaf = x.clone().requires_grad_()
    x0 = bound(model, ClassifierFree(2.0), 5, y)("x0", x, t)
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    cond, free = (model.predict("x0", leaf, t, c) for c in (y, torch.full((5,), 3)))
    combined = free + 2.0 * (cond - free)
    (slope,) = torch.autograd.grad(-((combined - 1) ** 2).sum(), leaf)
    torch.testing.assert_close(x0, combined.detach(), rtol=1e-9, atol=1e-9)
    given = [ClassifierFree(2.0), LogLikelihood(lambda x0: -((x0 - 1) ** 2).sum(1))]
    found = bound(model, given, 5, y)("x0", x, t)
    torch.testing.assert_close(found, x0 + sigma**2 / alpha * slope, rtol=1e-8, atol=1e-8)
    other = bound(model, given[::-1], 5, y)("x0", x, t)
    assert not torch.allclose(found, other, rtol=1e-3)


# --- what stands for no condition ----------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """A network of elsewhere, with two conditions of its own names."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, t, context, scale=None):
        self.seen.append((context.clone(), None if scale is None else scale.clone()))
        return -x + context.mean((1, 2))[:, None] + (0 if scale is None else scale[:, None])


def test_a_network_of_elsewhere_is_told_what_means_none():
    net = Foreign()
    context, empty = torch.randn(4, 3, 2), torch.zeros(3, 2)
    options = {"sde": "vp", "steps": 5, "shape": (2,), "num_samples": 4, "sampler": "ddim"}
    found = fastdiff.sample(net, guidance=ClassifierFree(2.0, null=empty), cond=context, **options)
    (both, _), *_ = net.seen
    assert torch.equal(both, torch.cat((context, empty.expand(4, 3, 2))))

    def by_hand(x, t, context):
        free = Foreign()(x, t, empty.expand(len(x), 3, 2))
        return free + 2.0 * (Foreign()(x, t, context) - free)

    torch.testing.assert_close(found, fastdiff.sample(by_hand, cond=context, **options), rtol=1e-4, atol=1e-4)
    # a part of a dict, for each sample: the others stay as they are
    net.seen.clear()
    cond, away = {"context": context, "scale": torch.randn(4)}, torch.randn(4, 3, 2)
    fastdiff.sample(net, guidance=ClassifierFree(2.0, null={"context": away}), cond=cond, batch_size=3, **options)
    assert [len(seen) for seen, _ in net.seen] == [6] * 5 + [2] * 5
    contexts, scales = net.seen[0]
    assert torch.equal(contexts, torch.cat((context[:3], away[:3])))
    assert torch.equal(scales, cond["scale"][:3].repeat(2))


def test_conditions_of_numbers_are_left_out_as_nan():
    """Labels and standardized conditions together, as train(cond_dropout=) leaves them out: both."""
    seen = []

    class Net(nn.Module):
        num_classes, cond_shape = 3, (2,)

        def forward(self, x, t, y=None, cond=None):
            seen.append((y.clone(), cond.clone()))
            return -x + y[:, None] + cond.nan_to_num(5.0).sum(1)[:, None]

    model = fastdiff.ScoreModel(
        Net(), "vp", "score", data_shape=(2,), cond_dropout=0.1, standardize_cond=([1.0, 2.0], [2.0, 4.0])
    )
    cond = {"y": labels(3), "cond": torch.tensor([[3.0, 2.0], [math.nan, math.nan], [1.0, 6.0]])}
    cond["y"][1] = 3  # a sample without is one without both
    options = {"steps": 3, "num_samples": 3, "cond": cond, "sampler": "ddim", "dtype": F64}
    found = fastdiff.sample(model, guidance=ClassifierFree(2.0), **options)
    y, numbers = seen[0]
    assert y.tolist() == [0, 3, 2, 3, 3, 3]
    assert numbers[:3].nan_to_num(9.0).tolist() == [[1.0, 0.0], [9.0, 9.0], [0.0, 1.0]]
    assert bool(numbers[3:].isnan().all())
    unfused = fastdiff.sample(model, guidance=[ClassifierFree(2.0), NOTHING], **options)
    torch.testing.assert_close(found, unfused, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_networks_that_take_time_features_keep_them(kind, monkeypatch):
    """Those of all rows are made once; with a weaker network beside it, those of both."""
    torch.manual_seed(0)

    def made(**options):
        shape = (5,) if kind == "mlp" else (1, 8, 8)
        make = MLP if kind == "mlp" else fastdiff.networks.UNet
        net = make(shape, **options, **({} if kind == "mlp" else {"channels": 16, "multipliers": (1,), "blocks": 1}))
        nn.init.normal_(net.out.weight, std=0.1)
        return fastdiff.ScoreModel(net, "vp", "v", data_shape=shape, cond_dropout=0.1 if options else 0.0)

    model, weaker = made(num_classes=3), made()
    given = {"one": ClassifierFree(2.0), "two": Auto(weaker, 2.0), "torch": [ClassifierFree(2.0), Auto(weaker, 1.5)]}
    of_time, calls = type(model.net.conditioning).of_time, []

    def noted(self, t):
        calls.append((self is model.net.conditioning, len(t)))
        return of_time(self, t)

    monkeypatch.setattr(type(model.net.conditioning), "of_time", noted)
    for name, each in given.items():
        calls.clear()
        ahead = draw(model, each, sampler="ddim")
        assert [n for own, n in calls if own] == [1, 8]  # one, to see how large they are, and those of all rows
        assert [n for own, n in calls if not own] == {"one": [], "two": [1, 8], "torch": [6] * 8}[name]
        # hooks want every call as it is
        hooks = [net.register_forward_hook(lambda *_: None) for net in (model.net, weaker.net)]
        plain = draw(model, each, sampler="ddim")
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(ahead, plain, rtol=1e-4, atol=1e-4)


def test_the_weaker_model_may_have_another_prediction_and_time():
    """And then the run is the one with a weaker model of the same numbers in the model's own prediction."""
    model, y = exact(VP, "eps"), labels(6)
    alike = fastdiff.ScoreModel(Exact(VP, "eps"), VP, "eps", data_shape=(2,), num_classes=3, cond_dropout=0.1)
    other = exact(VP, "v", time_input="t")
    weak = [draw(model, Auto(each, 2.0), cond=y, sampler="heun", dtype=F64) for each in (alike, other)]
    torch.testing.assert_close(weak[0], draw(model, cond=y, sampler="heun", dtype=F64), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(*weak, rtol=1e-8, atol=1e-8)
    free = fastdiff.ScoreModel(
        lambda x, t: ALL.eps(x, VP.alpha(t.double()), VP.sigma(t.double())), VP, "eps", "t", (2,)
    )
    found = draw(model, Auto(free, 3.0), cond=y, dtype=F64)  # which takes no condition
    torch.testing.assert_close(found, draw(model, ClassifierFree(3.0), cond=y, dtype=F64), rtol=1e-7, atol=1e-7)


def test_a_table_keeps_its_weights():
    model = exact()
    x, info = draw(model, ClassifierFree(2.0, interval=(0.2, 4)), return_info=True)
    _, other = draw(model, ClassifierFree(3.0, interval=(0.2, 4)), return_info=True)
    assert [row.guidance for row in other.table.rows] == [1 + 2 * (row.guidance - 1) for row in info.table.rows]
    options = {"steps": None, "table": info.table}
    assert torch.equal(draw(model, ClassifierFree(2.0, interval=(0.2, 4)), **options), x)
    assert torch.equal(draw(model, ClassifierFree(1.0), **options), draw(model))
    with pytest.raises(ConfigError, match=r"guidance=guidance.ClassifierFree\(scale\)"):
        draw(model, **options)
    with pytest.warns(UserWarning, match="holds none of the noise ratios"):
        draw(model, ClassifierFree(2.0, interval=(1e5, math.inf)))


# --- the classifier's training ---------------------------------------------------------------------------------------------


def mixture_data(count=600):
    k = torch.arange(count) % 3
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(0))
    x = MEANS.float()[k] + STDS.float()[k][:, None] * z
    return fastdiff.Data(10 + 5 * x, k, range=(-10, 30))


def test_a_trained_classifier_knows_its_classes_at_every_level(tmp_path):
    data = mixture_data()
    model = fastdiff.ScoreModel(MLP((2,)), "vp", data_shape=(2,), standardize=([10.0, 10.0], [5.0, 5.0]))
    before = torch.random.get_rng_state()
    made = fastdiff.train_classifier(model, data, steps=300, seed=3, lr=5e-3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert isinstance(made.net, MLPClassifier)
    assert not made.training
    x0 = (data.x - 10) / 5
    bayes, equal = Bayes(VP), Mixture([1, 1, 1], MEANS, STDS)
    for t in (0.002, 0.1, 0.3, 0.6, 1.0):
        times = torch.full((len(x0),), t)
        alpha, sigma = VP.alpha(times)[:, None], VP.sigma(times)[:, None]
        x = alpha * x0 + sigma * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
        density = bayes(x, times) - ALL.weights.log() + equal.weights.log()
        best = torch.nn.functional.cross_entropy(density, data.labels)
        found = torch.nn.functional.cross_entropy(made(x, times), data.labels)
        assert found < best + 0.06, (t, float(found), float(best))
    one, again, other = (fastdiff.train_classifier(model, data, steps=4, seed=seed, dropout=0.2) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters()))
    assert torch.equal(one.loss, again.loss)
    assert not torch.equal(one.loss, other.loss)
    path = made.save(tmp_path / "classifier")
    loaded = fastdiff.TimeClassifier.load(path)
    assert torch.equal(loaded(x, times), made(x, times))
    assert repr(loaded) == repr(made)
    x = fastdiff.sample(exact(), steps=20, cond=torch.full((4,), 3), num_samples=4, guidance=Classifier(made, 1))
    assert bool(x.isfinite().all())
    with pytest.raises(fastdiff.errors.CorruptCheckpointError, match="does not describe a classifier"):
        fastdiff.TimeClassifier.load(fastdiff.save(model, tmp_path / "model"))


def test_classifier_guidance_raises_the_probability_of_the_class_on_the_digits():
    """By an independent classifier, trained on other batches by other means."""
    data, model = fastdiff.load_data("digits"), fastdiff.load("digits-vp")
    net = MLPClassifier((1, 8, 8), 10)
    made = fastdiff.train_classifier(model, data, steps=500, lr=3e-3, net=net)
    assert made.net is net
    judge = fastdiff.metrics.classifier(data, steps=300)
    share = []
    for scale in (0.0, 1.0, 3.0):
        x = fastdiff.sample(
            model, steps=24, sampler="ddim", num_samples=30, guidance=Classifier(made, labels(30), scale)
        )
        logits = judge.head(judge.last((x.clamp(-1, 1) + 1) * 8))
        share.append(float(logits.softmax(1)[range(30), labels(30)].mean()))
    assert share[0] < 0.2
    assert share[1] > 0.35
    assert share[2] > 0.55


@pytest.mark.parametrize("make", [MLPClassifier, WideResNet])
def test_the_logits_of_a_sample_depend_on_no_other(make):
    torch.manual_seed(0)
    for shape in [(4,)] if make is MLPClassifier else [(2, 9), (1, 8, 7), (1, 4, 4, 5)]:
        net = make(shape, 5)
        net = build_classifier({"name": "mlp" if make is MLPClassifier else "wide_resnet", **net.config}).eval()
        for parameter in net.parameters():  # blocks begin as the identity
            nn.init.normal_(parameter, std=0.2)
        x, u = torch.randn(6, *shape), torch.rand(6)
        whole = net(x, u)
        assert whole.shape == (6, 5)
        torch.testing.assert_close(whole[2:4], net(x[2:4], u[2:4]), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(whole, net(x, 1 - u), rtol=0.05)


# --- refused before any work -------------------------------------------------------------------------------------------------


def never(x, t, y=None):
    pytest.fail("the network was called")


class Never(nn.Module):
    num_classes = 3

    def forward(self, x, t, y):
        return never(x, t)


def unasked(**options):
    options = {"data_shape": (2,), "num_classes": 3, "cond_dropout": 0.1, **options}
    return fastdiff.ScoreModel(Never(), "vp", "score", **options)


NAN, INF = math.nan, math.inf
MADE = [
    (lambda: ClassifierFree(NAN), ConfigError, "scale"),
    (lambda: ClassifierFree(INF), ConfigError, "scale"),
    (lambda: ClassifierFree("3"), ConfigError, "scale"),
    (lambda: ClassifierFree(None), ConfigError, "scale"),
    (lambda: ClassifierFree(True), ConfigError, "scale"),
    (lambda: ClassifierFree(torch.tensor([1.0, NAN])), DataError, "scale"),
    (lambda: ClassifierFree(torch.ones(2, 2)), ShapeError, "scale"),
    (lambda: ClassifierFree(torch.ones(2, dtype=torch.bool)), DTypeError, "scale"),
    (lambda: ClassifierFree(3.0, interval=(1.0, 0.5)), ConfigError, "interval"),
    (lambda: ClassifierFree(3.0, interval=(-1.0, 0.5)), ConfigError, "interval"),
    (lambda: ClassifierFree(3.0, interval=(NAN, 0.5)), ConfigError, "interval"),
    (lambda: ClassifierFree(3.0, interval=0.5), ConfigError, "interval"),
    (lambda: ClassifierFree(3.0, rescale=1.5), ConfigError, "rescale"),
    (lambda: ClassifierFree(3.0, rescale=NAN), ConfigError, "rescale"),
    (lambda: Auto(never, 2.0), ConfigError, "weaker_model"),
    (lambda: Auto(unasked(), NAN), ConfigError, "scale"),
    (lambda: LogLikelihood(3.0), ConfigError, "function"),
    (lambda: LogLikelihood(never, NAN), ConfigError, "scale"),
    (lambda: LogLikelihood(never, of="x"), ConfigError, "of"),
    (lambda: Classifier(3.0, 1), ConfigError, "classifier"),
    (lambda: Classifier(never, 1.5), DTypeError, "y"),
    (lambda: Classifier(never, torch.ones(3)), DTypeError, "y"),
    (lambda: Classifier(never, 1, -INF), ConfigError, "scale"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "name"), MADE)
def test_a_guidance_that_cannot_be_is_refused_as_it_is_made(make, error, name):
    with pytest.raises(error, match=rf"\b{name}\b") as caught:
        make()
    assert len(str(caught.value)) < 200


def linear(x, t):
    return torch.cat((x, -x), 1)


COND = {"cond": labels(4)}
GIVEN = [
    (unasked(cond_dropout=0.0), ClassifierFree(3.0), COND, ConfigError, r"train\(cond_dropout=0.1\)"),
    (unasked(), ClassifierFree(3.0), {}, ConfigError, "y is missing"),
    (fastdiff.ScoreModel(never, VP, "score", "t", (2,)), ClassifierFree(3.0), {}, ConfigError, "cond must be given"),
    (fastdiff.ScoreModel(MLP((2,)), VP, data_shape=(2,)), ClassifierFree(3.0), {}, ConfigError, "takes none: leave guidance out"),
    (fastdiff.ScoreModel(never, VP, "score", "t", (2,)), ClassifierFree(3.0), COND, ConfigError, "null must be given"),
    (unasked(), ClassifierFree(3.0, null=torch.ones(2).long()), COND, ShapeError, "null must have the shape"),
    (unasked(), ClassifierFree(3.0, null=torch.ones(4)), COND, DTypeError, "null must have cond's dtype"),
    (unasked(), ClassifierFree(3.0, null=7), COND, DataError, "labels 0 to 2"),
    (unasked(), ClassifierFree(3.0, null={"y": 1}), COND, ConfigError, "null must be a tensor"),
    (unasked(), ClassifierFree(3.0, null=1), {"cond": {"y": labels(4)}}, ConfigError, "null must be a dict"),
    (unasked(), ClassifierFree(3.0, null={"z": 1}), {"cond": {"y": labels(4)}}, ConfigError, "null must be a dict"),
    (unasked(), ClassifierFree(torch.ones(3)), COND, ShapeError, "num_samples=4"),
    (unasked(data_shape=(1,)), ClassifierFree(3.0, rescale=0.5), COND, ConfigError, "rescale needs"),
    (unasked(), ClassifierFree(3.0), {"cond": labels(3)}, ShapeError, "num_samples=4"),
    (unasked(), Auto(exact(VE), 2.0), COND, ConfigError, "process of the model"),
    (unasked(), Auto(exact(data_shape=(3,)), 2.0), COND, ConfigError, "data_shape of the model"),
    (unasked(standardize=(0, 1)), Auto(exact(standardize=(0, 2)), 2.0), COND, ConfigError, "units of the model"),
    (unasked(data_range=(0, 1)), Auto(exact(data_range=(-1, 1)), 2.0), COND, ConfigError, "units of the model"),
    (unasked(), LogLikelihood(lambda x: x), COND, ShapeError, "a number for each sample"),
    (unasked(), LogLikelihood(lambda x: x.sum()), COND, ShapeError, "a number for each sample"),
    (unasked(), LogLikelihood(lambda x: x.sum(1).tolist()), COND, DTypeError, "function must return a tensor"),
    (unasked(), LogLikelihood(lambda x: x.detach().sum(1)), COND, ConfigError, "no_grad, detach"),
    (unasked(), LogLikelihood(lambda x: (x - x.mean()).sum(1) ** 2), COND, ConfigError, "depends on others"),
    (unasked(), LogLikelihood(lambda x, t: x, of="x_t"), COND, ShapeError, "a number for each sample"),
    (unasked(), Classifier(linear, 4), COND, DataError, "classes 0 to 3"),
    (unasked(), Classifier(linear, -1), COND, DataError, "classes 0 to 3"),
    (unasked(), Classifier(linear, labels(3)), COND, ShapeError, "num_samples=4"),
    (unasked(), Classifier(lambda x, t: x[:, 0], np.int64(0)), COND, ShapeError, r"logits \[B, classes\]"),
    (unasked(), Classifier(lambda x, t: linear(x, t).detach(), 0), COND, ConfigError, "no_grad, detach"),
    (unasked(), [ClassifierFree(2.0), "3.0"], COND, ConfigError, "or a list of them"),
    (unasked(), [], COND, ConfigError, "or a list of them"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "given", "options", "error", "words"), GIVEN)
@pytest.mark.parametrize("sampler", ["ddim", "rk45"])
def test_what_does_not_go_with_a_run_is_refused_before_any_call(model, given, options, error, words, sampler):
    steps = {"steps": 4} if sampler == "ddim" else {}
    with pytest.raises(error, match=words) as caught:
        fastdiff.sample(model, guidance=given, num_samples=4, sampler=sampler, **steps, **options)
    assert isinstance(caught.value, FastdiffError)
    assert len(str(caught.value)) < 200


def test_a_network_without_a_gradient_is_refused_by_its_name():
    given = LogLikelihood(lambda x: -(x**2).sum(1))
    weight = torch.ones((), requires_grad=True)
    for net in (
        lambda x, t: -x.detach(),
        lambda x, t: -weight * x.detach(),
    ):  # whose x̂0 = (x + σ² score)/α has one all the same
        with pytest.raises(ModelOutputError, match="gradients through the model"):
            fastdiff.sample(net, "vp", 4, shape=(2,), num_samples=3, guidance=given)


def test_a_classifier_of_another_process_or_of_other_units_is_refused():
    data = mixture_data(60)
    made = fastdiff.train_classifier(unasked(data_range=(-1, 1)), data, steps=2)
    for model, words in ((exact(VE), "train_classifier"), (unasked(data_range=(0, 1)), "other units")):
        with pytest.raises(ConfigError, match=words):
            draw(model, Classifier(made, 1))


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        (torch.randn(20, 2), {}, ConfigError, "labels of two classes"),
        (fastdiff.Data(torch.rand(20, 2), labels(20) * 0), {}, ConfigError, "labels of two classes"),
        (fastdiff.Data(torch.rand(20, 3), labels(20)), {}, ShapeError, "data_shape"),
        (mixture_data(30), {"steps": 0}, ConfigError, "steps"),
        (mixture_data(30), {"lr": -1.0}, ConfigError, "lr"),
        (mixture_data(30), {"batch_size": 0}, ConfigError, "batch_size"),
        (mixture_data(30), {"times": "sometimes"}, ConfigError, "times"),
        (mixture_data(30), {"net": never}, ConfigError, "torch.nn.Module"),
        (mixture_data(30), {"net": nn.Linear(2, 3), "dropout": 0.1}, ConfigError, "dropout"),
        (mixture_data(30), {"net": MLPClassifier((2,), 4)}, ShapeError, "one for each class"),
        (mixture_data(30), {"dropout": 1.0}, ConfigError, "dropout"),
        (mixture_data(30), {"seed": -1}, ConfigError, "seed"),
        (mixture_data(30), {"lr": 1e30, "steps": 10}, DataError, "not finite"),
        (mixture_data(30), {"step": 3}, TypeError, "did you mean 'steps'"),
    ],
)
def test_bad_arguments_of_train_classifier(data, options, error, words):
    model = unasked(data_range=(-1, 1))
    with pytest.raises(error, match=words):
        fastdiff.train_classifier(model, data, **{"steps": 3, "progress": False, **options})


def test_a_classifier_of_a_process_alone_takes_the_data_as_they_are():
    data = fastdiff.Data(torch.randn(40, 2), labels(40), range=(-5, 5))
    made = fastdiff.train_classifier("ve", data, steps=3)
    assert made.process == VE
    assert units(made) is None
    with pytest.raises(ConfigError, match="sde"):
        fastdiff.train_classifier(3, data, steps=3)
