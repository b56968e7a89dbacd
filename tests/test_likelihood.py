"""Log-likelihoods and latents against closed forms: with the exact score the flow carries the marginal of t_min to that of T.

So with p_t the marginal and x_T where the flow takes x, log p(x) = log p_{t_min}(x) − log p_T(x_T) + log N(x_T; 0, prior_std²).
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from oracles import Gaussian, Mixture
from scipy.integrate import solve_ivp
from scipy.stats import norm
from torch import nn

import fastdiff
from fastdiff.errors import ConfigError, DataError, DTypeError, ModelOutputError, ShapeError, SolverError
from fastdiff.execution import ops
from fastdiff.execution.divergence import Forward, Reverse
from fastdiff.execution.noise import PROBES
from fastdiff.likelihood import LogLikelihood
from fastdiff.networks import MLP, UNet
from fastdiff.planning.ode_variables import OdeVariables
from fastdiff.planning.processes import PROCESSES, get

VP = fastdiff.VP()
CONTINUOUS = [name for name, kind in PROCESSES.items() if not kind.discrete]


def exact(data, process, kind="score"):
    return lambda x, t: getattr(data, kind)(x, process.alpha(t), process.sigma(t))


def log_prior(z, process):
    std = process.prior_std
    return -0.5 * ((z.double() / std) ** 2 + math.log(2 * math.pi * std**2)).flatten(1).sum(1)


def closed_form(data, process, x, latent, t_min=None):
    t = process.t_likelihood if t_min is None else t_min
    there = data.log_prob(latent.double(), float(process.alpha(process.t_start)), float(process.sigma(process.t_start)))
    return (
        data.log_prob(x.double(), float(process.alpha(t)), float(process.sigma(t))) - there + log_prior(latent, process)
    )


def gaussian(numbers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(numbers, numbers, dtype=torch.float64, generator=generator)
    mean = 0.3 * torch.randn(numbers, dtype=torch.float64, generator=generator)
    return Gaussian(mean, cov=root @ root.T / numbers + 0.1 * torch.eye(numbers))


def mixture(numbers):
    generator = torch.Generator().manual_seed(1)
    return Mixture([0.5, 0.3, 0.2], 0.7 * torch.randn(3, numbers, generator=generator), [0.2, 0.3, 0.4])


def draw(data, n=8):
    return data.sample(n, generator=torch.Generator().manual_seed(2))


# --- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the prior of 'ncsn' does not cover data")
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize(("make", "numbers", "bound"), [(gaussian, 2, 1e-5), (mixture, 2, 1e-5), (mixture, 48, 48e-6)])
def test_closed_forms_in_float64(name, numbers, bound, make):
    process, data = get(name), make(numbers)
    x = draw(data)
    ll = fastdiff.log_likelihood(exact(data, process), x, process, trace="exact", rtol=1e-6, atol=1e-6)
    assert (ll.nats - closed_form(data, process, x, ll.latent)).abs().max() < bound
    assert torch.equal(ll.stderr, torch.zeros(len(x), dtype=torch.float64))
    assert ll.nats.dtype == ll.latent.dtype == torch.float64
    if make is gaussian:
        t = process.t_likelihood
        levels = [
            float(v)
            for v in (
                process.alpha(t),
                process.sigma(t),
                process.alpha(process.t_start),
                process.sigma(process.t_start),
            )
        ]
        assert (ll.latent - data.ode_map(x, *levels)).abs().max() < 1e-5 * process.prior_std


# each variable in each form, and each of them on both processes
IN_TURN = [
    (("vp", "ve")[(i + j) % 2], variable, form)
    for i, variable in enumerate(["t", "sigma", "logsnr", "asinh"])
    for j, form in enumerate(["x", "eps", "x0", "v"])
]


@pytest.mark.parametrize(("name", "variable", "form"), IN_TURN)
def test_all_variables_give_the_same(name, variable, form):
    process, data = get(name), mixture(2)
    x = draw(data)
    options = {"trace": "exact", "rtol": 1e-6, "atol": 1e-6}
    ll = fastdiff.log_likelihood(exact(data, process), x, process, variable=variable, form=form, **options)
    assert (ll.nats - closed_form(data, process, x, ll.latent)).abs().max() < 1e-5


def test_in_one_dimension_the_flow_keeps_quantiles():
    data = Mixture([0.4, 0.6], [[-0.6], [0.5]], [0.1, 0.25])
    x = draw(data)
    z = fastdiff.encode(exact(data, VP), x, VP, rtol=1e-8, atol=1e-8)

    def below(x, t):
        alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
        stds = np.sqrt(alpha**2 * np.array([0.1, 0.25]) ** 2 + sigma**2)
        return norm.cdf((x - alpha * np.array([-0.6, 0.5])) / stds) @ np.array([0.4, 0.6])

    np.testing.assert_allclose(below(z.numpy(), 1.0), below(x.numpy(), 1e-5), atol=1e-6)


def test_an_independent_solver_gives_the_same():
    """SciPy's RK45 on score_sde's drift, [x, log p] in t, with the same probe; a network, not a closed form."""
    torch.manual_seed(0)
    net = MLP((3,), hidden=32, time_scale=1.0).double()
    nn.init.normal_(net.out.weight, std=0.3)
    x = torch.randn(4, 3, dtype=torch.float64)
    model = fastdiff.ScoreModel(net, VP, "eps", data_shape=(3,))
    ll = fastdiff.log_likelihood(model, x, rtol=1e-8, atol=1e-8, seed=5)
    v = torch.empty(4, 3)
    ops.backend_module("reference").rademacher(v, ops.cursor(0, 0, 5), PROBES)

    def rates(t, state):
        y = torch.from_numpy(state[:12].reshape(4, 3)).requires_grad_()
        time = torch.full((4,), t, dtype=torch.float64)
        drift = -0.5 * VP.beta(t) * (y - net(y, time) / VP.sigma(np.float64(t)))
        (product,) = torch.autograd.grad((drift * v).sum(), y)
        return np.concatenate([drift.detach().numpy().ravel(), (product * v).sum(1).numpy()])

    found = solve_ivp(rates, (1e-5, 1.0), np.concatenate([x.numpy().ravel(), np.zeros(4)]), rtol=1e-9, atol=1e-9).y[
        :, -1
    ]
    latent = torch.from_numpy(found[:12].reshape(4, 3))
    assert (ll.latent - latent).abs().max() < 1e-5
    assert (ll.nats - log_prior(latent, VP) - torch.from_numpy(found[12:])).abs().max() < 1e-5


def test_float32_runs_are_as_good_as_float32():
    data = gaussian(6)
    x = draw(data)
    wide = fastdiff.log_likelihood(exact(data, VP), x, VP, trace="exact")
    narrow = fastdiff.log_likelihood(exact(data, VP), x.float(), VP, trace="exact")
    assert narrow.latent.dtype == torch.float32
    assert narrow.nats.dtype == torch.float64
    assert (narrow.nats - wide.nats).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["eps", "x0", "v", "edm", "score"])
def test_predictions(kind):
    data = gaussian(3)

    def model(x, time):
        t = VP.time((4 * time).exp()) if kind == "edm" else time  # c_noise = log(σ/α)/4
        alpha, sigma = VP.alpha(t), VP.sigma(t)
        if kind != "edm":
            levels = (alpha, sigma)
            v = lambda x: alpha[:, None] * data.eps(x, *levels) - sigma[:, None] * data.x0(x, *levels)  # noqa: E731
            return v(x) if kind == "v" else getattr(data, kind)(x, *levels)
        ratio, c = (sigma / alpha)[:, None], 0.5
        clean = x * (ratio**2 + c**2).sqrt()  # the input is scaled by c_in
        d = data.x0(alpha[:, None] * clean, alpha, sigma)
        return (d - c**2 / (ratio**2 + c**2) * clean) * (ratio**2 + c**2).sqrt() / (ratio * c)

    x = draw(data)
    ll = fastdiff.log_likelihood(model, x, VP, prediction=kind, trace="exact", rtol=1e-7, atol=1e-7)
    assert (ll.nats - closed_form(data, VP, x, ll.latent)).abs().max() < 1e-5


# --- traces ----------------------------------------------------------------------------------------------------------


def flow_matrix(data, form):
    """∫ ∂(field)/∂y du of Gaussian data, whose estimator is vᵀ M v: the log of what the flow stretches y = x/s by."""
    variables = OdeVariables(VP, "asinh", form)
    t = np.array([1e-5, 1.0])
    point = variables.point(np.array([variables.of_time(float(v)) for v in t]))
    variances = [float(a) ** 2 * data._variances + float(s) ** 2 for a, s in zip(point.alpha, point.sigma)]
    logs = 0.5 * (variances[1] / variances[0]).log() - math.log(point.scale[1] / point.scale[0])
    return data._basis @ torch.diag(logs) @ data._basis.T


@pytest.mark.parametrize("form", ["v", "eps"])
@pytest.mark.parametrize("probe", ["rademacher", "normal"])
def test_hutchinsons_variance_is_its_formula(probe, form):
    """Var = 2 Σ_{i≠j} M_ij² for ±1 and 2‖M‖² for normals (Avron & Toledo 2011, Lemmas 5 and 6), and stderr is its root by K."""
    data, count = gaussian(5), 4000
    x = draw(data, 1)
    ll = fastdiff.log_likelihood(exact(data, VP), x, VP, probes=count, probe=probe, form=form, rtol=1e-6, atol=1e-6)
    matrix = flow_matrix(data, form)
    square = 2 * (matrix**2).sum() - (2 * (matrix.diag() ** 2).sum() if probe == "rademacher" else 0)
    expected = (square / count).sqrt()
    assert abs(ll.stderr / expected - 1) < 0.1  # a variance of 4000 numbers with heavy tails: about 3 %
    assert abs(ll.nats - closed_form(data, VP, x, ll.latent)) < 4 * expected


def test_the_standard_error_covers_and_seeds_differ():
    data = gaussian(4)
    x = draw(data, 1).expand(200, 4)
    ll = fastdiff.log_likelihood(exact(data, VP), x, VP, probes=100)
    z = (ll.nats - closed_form(data, VP, x, ll.latent)) / ll.stderr
    assert 0.85 < z.std() < 1.15
    assert abs(z.mean()) < 4 * 1.1 / math.sqrt(200)
    one = fastdiff.log_likelihood(exact(data, VP), x, VP)
    assert one.stderr.isnan().all()
    assert not torch.equal(one.nats, fastdiff.log_likelihood(exact(data, VP), x, VP, seed=1).nats)


def test_hutch_plus_plus_is_exact_on_low_rank():
    """x̂0's Jacobian has the data's rank."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    data = Gaussian(torch.zeros(12), cov=root @ root.T)
    x = 0.2 * torch.randn(4, 12, dtype=torch.float64, generator=generator)
    options = {"prediction": "x0", "t_min": 0.01, "rtol": 1e-6, "atol": 1e-6}
    model = exact(data, VP, "x0")
    wanted = fastdiff.log_likelihood(model, x, VP, trace="exact", **options)
    found = fastdiff.log_likelihood(model, x, VP, trace="hutch++", probes=6, **options)
    assert (found.nats - wanted.nats).abs().max() < 1e-5
    assert found.stderr.max() < 1e-6
    rough = fastdiff.log_likelihood(model, x, VP, probes=6, **options)
    assert rough.stderr.min() > 1e-3


def test_hutch_plus_plus_is_unbiased():
    data = gaussian(6)
    x = draw(data, 1).expand(300, 6)
    ll = fastdiff.log_likelihood(exact(data, VP), x, VP, trace="hutch++", probes=6)
    error = ll.nats - closed_form(data, VP, x, ll.latent)
    assert abs(error.mean()) < 4 * error.std() / math.sqrt(300)
    assert 0.8 < ll.stderr.square().mean().sqrt() / error.std() < 1.25


def test_hutch_plus_plus_pays_where_few_directions_matter():
    root = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    data = Gaussian(torch.zeros(12), cov=root @ root.T + 1e-3 * torch.eye(12))
    x = draw(data, 1).expand(40, 12)
    options = {"prediction": "x0", "probes": 9}
    plain, better = (
        fastdiff.log_likelihood(exact(data, VP, "x0"), x, VP, trace=t, **options) for t in ("hutchinson", "hutch++")
    )
    assert better.nats.std() < 0.25 * plain.nats.std()


def trained(net, seed=0):
    torch.manual_seed(seed)
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.1)
    return net.eval()


NETS = {
    "mlp": (lambda: MLP((5,), hidden=16, time_scale=1.0), (5,)),
    "unet": (lambda: UNet((1, 4, 4), channels=8, multipliers=(1,), blocks=1, attention=()), (1, 4, 4)),
}


def of_net(name):
    """(network in float64, x [3, *], the relative rounding of a derivative of its).

    A derivative is a sum over paths through the layers. A path is within one sum of n terms for each layer that it meets,
    and each term rounds it by 2⁻⁵³ at most. Two ways to add up are apart by some √Σn of these 2⁻⁵³, which leaves as much
    again for paths that cancel: measured 13 of Σn = 465 for the U-Net, 9 of 133 for the MLP.
    """
    make, shape = NETS[name]
    net = trained(make()).double()
    x = 0.5 * torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return net, x, sum(p[0].numel() for p in net.parameters() if p.ndim > 1) * 2.0**-53


@pytest.mark.parametrize("name", NETS)
def test_forward_and_reverse_derivatives_are_one_matrix(name):
    """Its columns by the one, its rows by the other."""
    net, x, rounding = of_net(name)
    numbers = x[0].numel()
    units = torch.eye(numbers, dtype=torch.float64).view(numbers, 1, *x.shape[1:]).expand(numbers, *x.shape)
    for t in (0.1, 0.5, 1.0):

        def network(x, t=t):
            return net(x, torch.full((len(x),), t, dtype=torch.float64))

        rows, columns = (
            torch.cat([product for _, product in kind(network, x.clone()).products(units)]).flatten(2).transpose(0, 1)
            for kind in (Reverse, Forward)
        )
        size = rows.abs().amax((1, 2))
        assert ((rows - columns.mT).abs().amax((1, 2)) <= rounding * size).all()
        assert ((rows - columns).abs().amax((1, 2)) > 0.1 * size).all()  # it is not symmetric


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("trace", ["hutchinson", "exact"])  # Hutch++ has other bases of J than of its transpose
def test_forward_and_reverse_likelihoods_are_the_same(name, trace):
    """In steps of one sequence of lengths, so that both are one weighted sum of traces.

    The tolerance is one that every step meets by far, and each is then ten times the last. Where the error decides, so does
    rounding: a step's error is a difference of traces, 1e-13 of which is rounding at rtol=1e-3; step lengths take over a
    seventh of it, and it grows by about half in each step: 1e-13 to 2e-9 of the nats after 20 steps, by processor.
    """
    net, x, rounding = of_net(name)
    model = fastdiff.ScoreModel(net, VP, "eps", data_shape=x.shape[1:])
    options = {"trace": trace, "probes": 3, "t_min": 0.1, "rtol": 1e15, "atol": 1e15}
    a, b = (fastdiff.log_likelihood(model, x, derivative=kind, **options) for kind in ("reverse", "forward"))
    prior = log_prior(a.latent, VP)  # nats is this and the integral
    assert ((a.nats - b.nats).abs() <= rounding * (prior.abs() + (a.nats - prior).abs())).all()
    assert torch.equal(a.nfe, b.nfe)


def test_one_call_of_the_network_for_value_and_all_probes():
    data, calls = gaussian(3), []

    def model(x, t):
        calls.append(len(x))
        return data.score(x, VP.alpha(t), VP.sigma(t))

    ll = fastdiff.log_likelihood(model, draw(data), VP, probes=7)
    assert len(calls) == ll.nfe.max()
    assert sum(calls) == ll.nfe.sum()


# --- whatever is beside --------------------------------------------------------------------------------------------------


def separate(x, t, rates):
    """The clean data of independent numbers of variance `rates`: no sum over what is beside."""
    alpha, sigma = (torch.from_numpy(f(t.numpy())) for f in (VP.alpha, VP.sigma))
    gain = alpha * rates / (alpha**2 * rates + sigma**2)
    return gain[:, None] * x


def test_a_stiff_sample_costs_the_others_nothing():
    rates = torch.ones(64, dtype=torch.float64)
    rates[17] = 1e-6
    x = torch.linspace(-1, 1, 128, dtype=torch.float64).view(64, 2) * rates.sqrt()[:, None]
    model = separate
    every = fastdiff.log_likelihood(model, x, VP, prediction="x0", cond={"rates": rates})
    for i in (0, 16, 17, 63):
        alone = fastdiff.log_likelihood(
            model, x[i : i + 1], VP, prediction="x0", cond={"rates": rates[i : i + 1]}, first_sample=i
        )
        assert torch.equal(alone.nfe, every.nfe[i : i + 1])
        assert torch.equal(alone.nats, every.nats[i : i + 1])
        assert torch.equal(alone.latent[0], every.latent[i])
    assert every.nfe[17] > 2 * every.nfe[16]
    coupled = fastdiff.log_likelihood(model, x, VP, prediction="x0", cond={"rates": rates}, couple=True)
    assert coupled.nfe.min() == coupled.nfe.max() > 1.5 * every.nfe[16]
    assert (coupled.nats - every.nats).abs().max() < 1e-2


@pytest.mark.parametrize("trace", ["hutchinson", "hutch++", "exact"])
def test_batches_and_places_change_nothing(trace):
    x = torch.linspace(-1, 1, 30, dtype=torch.float64).view(10, 3)
    options = {"cond": torch.linspace(0.5, 2, 10, dtype=torch.float64), "trace": trace, "probes": 3, "prediction": "x0"}
    model = separate
    whole = fastdiff.log_likelihood(model, x, VP, **options)
    parts = fastdiff.log_likelihood(model, x, VP, batch_size=3, **options)
    tail = fastdiff.log_likelihood(model, x[6:], VP, first_sample=6, **{**options, "cond": options["cond"][6:]})
    assert torch.equal(whole.nats, parts.nats)
    assert torch.equal(whole.latent, parts.latent)
    assert torch.equal(whole.nats[6:], tail.nats)


def test_inputs_modes_and_inference():
    data = gaussian(3)
    net = trained(MLP((3,), hidden=8, dropout=0.5)).train()
    model = fastdiff.ScoreModel(net, VP, "eps", data_shape=(3,))
    x = draw(data).float().requires_grad_()
    before = x.detach().clone()
    first = fastdiff.log_likelihood(model, x)
    assert all(module.training for module in net.modules())
    assert torch.equal(x.detach(), before)
    assert not first.nats.requires_grad
    assert all(p.grad is None for p in net.parameters())
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode:
            again = fastdiff.log_likelihood(model, before.clone())
        assert torch.equal(again.nats, first.nats)
    strided = before.T.contiguous().T
    assert torch.equal(fastdiff.log_likelihood(model, strided).nats, first.nats)


def test_nobody():
    ll = fastdiff.log_likelihood(exact(gaussian(3), VP), torch.zeros(0, 3), VP, probes=2)
    assert ll.nats.shape == ll.stderr.shape == ll.nfe.shape == (0,)
    assert ll.latent.shape == (0, 3)


def test_a_model_of_labels():
    net = trained(MLP((3,), hidden=8, num_classes=4, time_scale=1.0)).double()
    model = fastdiff.ScoreModel(net, VP, "eps", data_shape=(3,), num_classes=5)  # 4, no label, is one of them
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4])
    every = fastdiff.log_likelihood(model, x, cond={"y": y}, rtol=1e-7, atol=1e-7)
    one = fastdiff.log_likelihood(model, x[2:3], cond={"y": y[2:3]}, first_sample=2, rtol=1e-7, atol=1e-7)
    assert (every.nats[2] - one.nats[0]).abs() < 1e-6
    assert (every.nats - fastdiff.log_likelihood(model, x, cond=torch.full((5,), 4)).nats).abs().max() > 1e-3


def test_the_shipped_model_prefers_digits(digits_vp):
    model, x = digits_vp
    shuffled = x.flatten(1)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))].view_as(x)
    real, other = (fastdiff.log_likelihood(model, data, rtol=1e-3, atol=1e-3).nats for data in (x, shuffled))
    assert (real > other + 50).all()


@pytest.fixture(scope="module")
def digits_vp():
    data = fastdiff.load_data("digits")
    return fastdiff.load("digits-vp"), fastdiff.dequantize(data.x[:6].long(), (-1, 1), data.bins).float()


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_range", "bins", "offset"), [((-1, 1), 256, 7), ((0, 1), 256, 8), ((-1, 1), 17, None)])
def test_bits_per_dim(data_range, bins, offset):
    nats = torch.tensor([-3.0, 5.0], dtype=torch.float64)
    ll = LogLikelihood(nats, nats * 0, torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    offset = math.log2(bins) - math.log2(data_range[1] - data_range[0]) if offset is None else offset
    assert torch.allclose(fastdiff.bits_per_dim(ll, data_range, bins), -nats / (16 * math.log(2)) + offset)


def test_densities_over_bins_are_probabilities():
    """E_u[p(x_k + u)]·width = P(level k), here of a normal density: so the bits bound −log₂ P."""
    data, bins, many = Gaussian([0.1], std=0.3), 16, 500
    levels = torch.arange(bins).repeat_interleave(many)[:, None]
    x = fastdiff.dequantize(levels, (-1, 1), bins, seed=3)
    place = (x[:, 0] + 1) * bins / 2
    assert torch.equal(place.floor().long(), levels[:, 0])
    assert abs((place - place.floor()).mean() - 0.5) < 5 / math.sqrt(12 * len(x))
    ll = fastdiff.log_likelihood(exact(data, VP), x, VP, trace="exact", t_min=1e-5)
    bits = fastdiff.bits_per_dim(ll, (-1, 1), bins)
    mass = (2.0**-bits).view(bins, many)
    edges = norm.cdf((np.linspace(-1, 1, bins + 1) - 0.1) / 0.3)
    assert (np.abs(mass.mean(1).numpy() - np.diff(edges)) < 5 * mass.std(1).numpy() / math.sqrt(many) + 1e-4).all()
    rows = bits.view(bins, many)
    slack = 5 * rows.std(1).numpy() / math.sqrt(many)
    assert (rows.mean(1).numpy() >= -np.log2(np.diff(edges)) - slack).all()


def test_dequantize_is_the_seeds():
    levels = torch.tensor([[0, 255], [17, 3]])
    x = fastdiff.dequantize(levels, (0, 1), seed=4)
    assert torch.equal(x, fastdiff.dequantize(levels.byte(), (0, 1), seed=4))
    assert torch.equal(x[1:], fastdiff.dequantize(levels[1:], (0, 1), seed=4, first_sample=1))
    assert not torch.equal(x, fastdiff.dequantize(levels, (0, 1), seed=4, draw=1))
    assert (x * 256).floor().long().equal(levels)


# --- latents ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_round_trip(name):
    process, data = get(name), mixture(2)
    x, model = draw(data), exact(data, process)
    z = fastdiff.encode(model, x, process, rtol=1e-6, atol=1e-6)
    back = fastdiff.decode(model, z, process, rtol=1e-6, atol=1e-6)
    assert (back - x).abs().max() < 1e-4


def test_round_trip_of_digits(digits_vp):
    model, x = digits_vp[0], digits_vp[1][:2]
    z = fastdiff.encode(model, x, rtol=1e-5, atol=1e-5)
    assert (fastdiff.decode(model, z, rtol=1e-5, atol=1e-5) - x).abs().max() < 4e-3  # in float32, through a network


def test_the_latent_of_a_likelihood_is_that_of_encode_to_the_tolerance():
    data = mixture(3)
    x, model = draw(data), exact(data, VP)
    assert (fastdiff.log_likelihood(model, x, VP).latent - fastdiff.encode(model, x, VP)).abs().max() < 1e-3


def test_temperature():
    data = Gaussian([0.2, -0.1], std=0.5)
    z = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = exact(data, VP)
    cold = fastdiff.decode(model, z, VP, temperature=0.0)
    assert (cold - cold[0]).abs().max() == 0
    half = fastdiff.decode(model, z, VP, temperature=0.5, rtol=1e-8, atol=1e-8)
    whole = fastdiff.decode(model, 0.5 * z, VP, rtol=1e-8, atol=1e-8)
    assert torch.equal(half, whole)


def test_interpolation():
    data = Gaussian(torch.zeros(8), std=0.5)
    model, x = exact(data, VP), draw(data)
    xa, xb = x[:3], x[3:6]
    options = {"sde": VP, "rtol": 1e-8, "atol": 1e-8}
    weights = [0.0, 0.25, 0.5, 1.0]
    arc = fastdiff.interpolate(model, xa, xb, weights, **options)
    line = fastdiff.interpolate(model, xa, xb, torch.tensor(weights), mode="linear", **options)
    assert arc.shape == line.shape == (4, 3, 8)
    for path in (arc, line):
        assert (path[0] - xa).abs().max() < 1e-5
        assert (path[-1] - xb).abs().max() < 1e-5
    # this flow is a scaling, so that what holds of latents holds of data: the line, and lengths along the arc
    assert (line[1] - (0.75 * xa + 0.25 * xb)).abs().max() < 1e-5
    lengths = arc.flatten(2).norm(dim=2)
    middle, ends = lengths[2], (lengths[0] + lengths[-1]) / 2
    assert ((middle - ends).abs() < 0.1 * ends).all()
    assert (line[2].norm(dim=1) < 0.95 * ends).all()
    same = fastdiff.interpolate(model, xa, xa, [0.5], **options)  # no arc between a point and itself
    assert (same[0] - xa).abs().max() < 1e-5
    cold = fastdiff.interpolate(model, xa, xb, [0.5], temperature=0.5, **options)
    assert (cold - 0.5 * arc[2]).abs().max() < 1e-4


def test_interpolation_keeps_the_condition():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)
    rates = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
    between = fastdiff.interpolate(
        separate, x, x.flip(1), [0.0, 1.0], sde=VP, cond=rates, prediction="x0", rtol=1e-8, atol=1e-8
    )
    assert (between[0] - x).abs().max() < 1e-6
    assert (between[1] - x.flip(1)).abs().max() < 1e-6


# --- refused ---------------------------------------------------------------------------------------------------------

GOOD = {"model": exact(gaussian(3), VP), "x": torch.zeros(2, 3), "sde": "vp"}
BAD = [
    ({"x": torch.zeros(3)}, ShapeError, r"x must have shape \[B, \*shape\]"),
    ({"x": torch.zeros(2, 3, dtype=torch.uint8)}, DTypeError, "x must be floating numbers .*fastdiff.dequantize"),
    ({"x": [[0.0]]}, DTypeError, "x must be a tensor, got list"),
    ({"x": torch.full((2, 3), math.nan)}, DataError, "x must be finite"),
    ({"sde": None}, ConfigError, "sde must be given"),
    ({"sde": "vq"}, ConfigError, "sde must be one of"),
    ({"probes": 0}, ConfigError, "probes must be an integer >= 1"),
    ({"probes": 2.0}, ConfigError, "probes must be an integer"),
    ({"probes": 10**7}, ConfigError, "probes must be an integer .* <= 1000000"),
    ({"x": torch.zeros(1, 1000), "probes": 10**6}, ConfigError, "average the likelihoods of several seeds"),
    ({"trace": "hutch++", "probes": 4}, ConfigError, "probes must be a multiple of 3"),
    ({"trace": "hutch++", "probes": 9}, ConfigError, "use trace='exact'"),
    ({"trace": "exakt"}, ConfigError, "did you mean 'exact'"),
    ({"trace": "exact", "x": torch.zeros(1, 5000)}, ConfigError, "costs 5000 backward passes in each evaluation"),
    ({"probe": "gaussian"}, ConfigError, "probe must be one of"),
    ({"trace": "exact", "probe": "normal"}, ConfigError, "probe='normal' belongs to trace='hutchinson'"),
    ({"derivative": "both"}, ConfigError, "derivative must be one of"),
    ({"method": "rk4"}, ConfigError, "method must be one of"),
    ({"form": "y"}, ConfigError, "form must be one of"),
    ({"variable": "lambda"}, ConfigError, "variable must be one of"),
    ({"rtol": 0.0}, ConfigError, "rtol must be a number in"),
    ({"rtol": math.nan}, ConfigError, "rtol must be a number in"),
    ({"atol": -1e-3}, ConfigError, "atol must be a number in"),
    ({"rtol": 1e-9}, ConfigError, "rtol must be a number in .4.76837e-07"),  # float32
    ({"max_nfe": 0}, ConfigError, "max_nfe must be an integer >= 1"),
    ({"t_min": 0.0}, ConfigError, "t_min must be a number in"),
    ({"t_min": 2.0}, ConfigError, "t_min must be a number in"),
    ({"sde": "ddpm", "t_min": 0.5}, ConfigError, r"t_min must be a number in \[1, 1000\], got 0.5"),
    ({"sde": "ddpm", "time_input": "index"}, ConfigError, "time_input='index' has whole steps only"),
    ({"batch_size": 0}, ConfigError, "batch_size must be an integer >= 1"),
    ({"couple": True, "batch_size": 1}, ConfigError, "couple=True takes its step from the whole batch"),
    ({"backend": "cuda"}, ConfigError, "backend must be one of"),
    ({"cond": torch.zeros(3)}, ShapeError, "cond must have"),
    ({"seed": -1}, ConfigError, "seed must be an integer"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[str(b[0])[:40] for b in BAD])
def test_refused_before_any_work(changed, error, message):
    def model(x, t, *cond):
        raise RuntimeError("the network was called")

    with pytest.raises(error, match=message):
        fastdiff.log_likelihood(**{**GOOD, "model": model, **changed})


def test_an_unknown_keyword_is_named():
    with pytest.raises(TypeError, match="did you mean 'probes'"):
        fastdiff.log_likelihood(**GOOD, num_probes=3)
    with pytest.raises(TypeError, match=r"interpolate\(\) takes no keyword 'probes'"):
        fastdiff.interpolate(GOOD["model"], GOOD["x"], GOOD["x"], [0.5], sde="vp", probes=3)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.detach(),
        lambda s: torch.zeros_like(s) + s.argmax(1)[:, None],
        lambda s: torch.from_numpy(s.detach().numpy()),
    ],
)
@pytest.mark.parametrize("derivative", ["reverse", "forward"])
def test_a_model_without_gradients(spoil, derivative):
    with pytest.raises(ModelOutputError, match=r"the divergence needs (gradients|derivatives) through the model"):
        fastdiff.log_likelihood(lambda x, t: spoil(-x), GOOD["x"], "vp", derivative=derivative)


def test_a_model_without_gradients_of_its_own_making():
    @torch.no_grad()
    def model(x, t):
        return -x

    with pytest.raises(ModelOutputError, match="no_grad"):
        fastdiff.log_likelihood(model, GOOD["x"], "vp")


def test_a_part_without_forward_derivatives():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return -x

        @staticmethod
        def backward(ctx, g):
            return -g

    assert fastdiff.log_likelihood(lambda x, t: Once.apply(x), GOOD["x"], "vp").nats.isfinite().all()
    with pytest.raises(ModelOutputError, match="use derivative='reverse'"):
        fastdiff.log_likelihood(lambda x, t: Once.apply(x), GOOD["x"], "vp", derivative="forward")


def test_a_network_may_write_to_what_it_is_given():
    """To x, and to t, which two stages of a pair share."""

    def writing(x, t):
        score = exact(data, VP)(x.clone(), t.clone())
        x.mul_(0.5)
        t.mul_(1000.0)
        return score

    data = gaussian(3)
    x = draw(data)
    for method in ("dopri5", "tsit5", "bosh3"):
        for options in ({}, {"couple": True}):
            wanted, found = (
                fastdiff.encode(net, x, VP, method=method, **options) for net in (exact(data, VP), writing)
            )
            assert torch.equal(wanted, found)
    for options in ({"trace": "exact"}, {"derivative": "forward", "probes": 3}, {"trace": "hutch++", "probes": 3}):
        wanted, found = (fastdiff.log_likelihood(net, x, VP, **options).nats for net in (exact(data, VP), writing))
        assert torch.equal(wanted, found)


def test_compiled_networks_and_those_without_batches_of_gradients():
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 12).view(4, 3)
    options = {"sde": VP, "prediction": "eps"}
    plain = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    net = lambda x, t: plain(x) * t[:, None]  # noqa: E731
    compiled = torch.compile(net, backend="aot_eager")
    wanted = fastdiff.log_likelihood(net, x, **options)
    found = fastdiff.log_likelihood(compiled, x, **options)
    assert (wanted.nats - found.nats).abs().max() < 1e-3
    for more in ({"probes": 3}, {"trace": "exact"}, {"trace": "hutch++", "probes": 3}, {"derivative": "forward"}):
        wanted, found = (fastdiff.log_likelihood(each, x, **options, **more) for each in (net, compiled))
        assert (wanted.nats - found.nats).abs().max() < 1e-3, more

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return -0.5 * x

        @staticmethod
        def backward(ctx, g):
            return torch.from_numpy(-0.5 * g.numpy())

    for trace in ("hutchinson", "exact"):
        own, plain = (
            fastdiff.log_likelihood(net, x, VP, trace=trace, probes=3)
            for net in (lambda x, t: Halved.apply(x), lambda x, t: -0.5 * x)
        )
        assert (own.nats - plain.nats).abs().max() < 1e-4


def test_the_defaults_of_torch_change_nothing():
    x = torch.linspace(-1, 1, 12).view(4, 3)
    wanted = fastdiff.log_likelihood(lambda x, t: -x, x, VP)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        found = fastdiff.log_likelihood(lambda x, t: -x, x, VP)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(wanted.nats, found.nats)


def test_the_clock_of_a_chain_is_not_the_models():
    """On a chain that lies on the model's path the run is the model's own; a time of its own would be misread."""
    model = fastdiff.ScoreModel(lambda x, t: -x, VP, "score", data_shape=(3,))
    x = torch.zeros(2, 3)
    assert torch.equal(fastdiff.encode(model, x, "ddpm"), fastdiff.encode(model, x))
    for call in (
        lambda: fastdiff.log_likelihood(model, x, "ddpm", t_min=1),
        lambda: fastdiff.encode(model, x, fastdiff.DDPM(), t_min=1),
        lambda: fastdiff.sample(model, "ddpm", sampler="rk45", t_min=0.9),
    ):
        with pytest.raises(ConfigError, match=r"t_min=.* is a time of the model's own process 'vp'"):
            call()


@pytest.mark.filterwarnings("ignore:the prior of .* does not cover data")
def test_what_is_far_away():
    model = fastdiff.ScoreModel(lambda x, t: -x, VP, "score", data_shape=(3,))
    fastdiff.log_likelihood(model, torch.full((1, 3), 16.0))  # vectors whose range nobody said
    model = fastdiff.ScoreModel(lambda x, t: -x, VP, "score", data_shape=(3,), data_range=(-1, 1))
    with pytest.warns(UserWarning, match="far outside of data_range") as caught:
        fastdiff.log_likelihood(model, torch.full((1, 3), 16.0))
    assert caught[0].filename == __file__
    x = torch.tensor([[0.0], [1e160]], dtype=torch.float64)
    with pytest.raises(DataError, match=r"sample 1 .*1e.160.* is -inf"):
        fastdiff.log_likelihood(lambda x, t: -x, x, VP, trace="exact", form="x")


def test_samples_without_numbers_ask_nothing():
    def model(x, t):
        raise RuntimeError("the network was called")

    assert fastdiff.encode(model, torch.zeros(3, 0), VP).shape == (3, 0)


def test_a_short_way():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    assert (fastdiff.encode(lambda x, t: -x, x, VP, t_min=1 - 1e-9) - x).abs().max() < 1e-6


def test_parameters_without_gradients_are_refused():
    with torch.inference_mode():
        net = MLP((3,), hidden=8)
    with pytest.raises(ConfigError, match="made under inference_mode"):
        fastdiff.log_likelihood(net, torch.zeros(2, 3), VP)


def test_t_min_at_the_end_is_the_prior():
    x = torch.randn(4, 3, dtype=torch.float64)
    ll = fastdiff.log_likelihood(GOOD["model"], x, "vp", t_min=1.0)
    assert torch.equal(ll.latent, x)
    assert (ll.nats - log_prior(x, VP)).abs().max() < 1e-12
    assert ll.nfe.sum() == 0


def test_a_blow_up_names_the_process_time():
    with pytest.raises(SolverError, match="at t = ") as caught:
        fastdiff.log_likelihood(lambda x, t: -1e4 * x**3, torch.ones(1, 1, dtype=torch.float64), "vp")
    assert 1e-5 < caught.value.t < 1
    assert caught.value.nfe > 0
    with pytest.raises(SolverError, match="max_nfe = 20 is spent at t = "):
        fastdiff.log_likelihood(exact(mixture(3), VP), GOOD["x"], "vp", max_nfe=20)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_bad_sample_is_named(batch_size):
    def model(x, t, bad):
        return torch.where(bad[:, None] > 0, math.nan, -x)

    bad = torch.zeros(64)
    bad[41] = 1
    options = {"cond": bad, "couple": batch_size is None, "batch_size": batch_size or 64}
    with pytest.raises(SolverError, match=r"the field is not finite .* of sample 41") as caught:
        fastdiff.log_likelihood(model, torch.zeros(64, 2), "vp", **options)
    assert caught.value.sample == 41


def test_many_probes_are_chunked():
    matrix = torch.tensor([[1.0, 0.3], [0.3, 1.0]])
    options = {
        "model": lambda x, t: -x @ matrix,
        "x": torch.zeros(1, 2),
        "sde": "vp",
        "t_min": 0.9,
        "rtol": 0.1,
        "atol": 0.1,
        "method": "bosh3",  # of the fewest evaluations
    }
    ll, exact = fastdiff.log_likelihood(probes=10**5, **options), fastdiff.log_likelihood(trace="exact", **options)
    assert 0 < ll.stderr < 3e-2
    assert abs(ll.nats - exact.nats) < 5 * ll.stderr


def test_bits_of_what_is_not_levels():
    ll = fastdiff.log_likelihood(**GOOD)
    far = LogLikelihood(ll.nats, ll.stderr, ll.latent, ll.nfe, torch.full((2, 3), 255.0))
    with pytest.raises(DataError, match=r"the data must lie in data_range=\(-1, 1\), got 255"):
        fastdiff.bits_per_dim(far, (-1, 1))
    levels = torch.randint(0, 4, (40, 3), generator=torch.Generator().manual_seed(0)) / 3
    on = LogLikelihood(torch.zeros(40), torch.zeros(40), levels, torch.zeros(40), levels)
    with pytest.warns(UserWarning, match="at most 4 levels.*fastdiff.dequantize") as caught:
        fastdiff.bits_per_dim(on, (0, 1), 4)
    assert caught[0].filename == __file__
    spread = fastdiff.dequantize((levels * 3).round().long(), (0, 1), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdiff.bits_per_dim(LogLikelihood(*[torch.zeros(40)] * 2, levels, torch.zeros(40), spread), (0, 1), 4)
    for wrong in ((1, -1), (0,), "[-1, 1]"):
        with pytest.raises(ConfigError, match="data_range"):
            fastdiff.bits_per_dim(ll, wrong)
    with pytest.raises(ConfigError, match="bins must be an integer >= 2"):
        fastdiff.bits_per_dim(ll, (-1, 1), 1)
    with pytest.raises(ConfigError, match=r"ll must be what fastdiff.log_likelihood returns, got Tensor"):
        fastdiff.bits_per_dim(ll.nats, (-1, 1))
    for levels, error in (
        (torch.zeros(2, 2), DataError),
        (torch.tensor([[256]]), DataError),
        (torch.tensor([1]), ShapeError),
    ):
        with pytest.raises(error, match="levels must"):
            fastdiff.dequantize(levels, (0, 1))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"weights": []}, ConfigError, "weights must hold at least one number"),
        ({"weights": "half"}, ConfigError, "weights must be a list of numbers"),
        ({"mode": "cubic"}, ConfigError, "mode must be one of"),
        ({"xb": torch.zeros(3, 3)}, ShapeError, "xa and xb must be alike"),
        ({"temperature": -1.0}, ConfigError, "temperature must be a number in"),
    ],
)
def test_interpolations_refused(changed, error, message):
    options = {"xa": GOOD["x"], "xb": GOOD["x"], "weights": [0.5], "sde": "vp", **changed}
    with pytest.raises(error, match=message):
        fastdiff.interpolate(lambda x, t: 1 / 0, **options)
