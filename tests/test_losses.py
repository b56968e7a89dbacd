"""Objectives that need a trace against closed forms, and processes that only a sampler of x_t describes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from oracles import Gaussian
from torch import nn

import fastdiff
from fastdiff import losses
from fastdiff.errors import CheckpointMismatchError, ConfigError, DTypeError, ModelOutputError, ShapeError
from fastdiff.execution import noise
from fastdiff.networks import MLP
from fastdiff.papers import score_based as papers
from fastdiff.planning.processes import Process, lib
from fastdiff.training import Data

F64 = torch.float64
TRACES = ("ism", "ssm", "ssm_vr")


class Still(Process):
    """x_t = x0: the losses are then those of plain score matching on the data."""

    T = 1.0

    def sample(self, x0, t, noise):
        return x0


@dataclass(frozen=True)
class DoubleWell(Process):
    """dx = pull (x − x³) dt + noise dw in every coordinate, simulated by Euler–Maruyama: no transition density is known."""

    pull: float = 2.0
    noise: float = 1.0
    steps: int = 12
    T: ClassVar[float] = 1.0
    t_min: ClassVar[float] = 0.1

    def sample(self, x0, t, noise):
        dt, x = (t / self.steps).view(-1, *[1] * (x0.ndim - 1)).to(x0.dtype), x0
        for k in range(self.steps):
            x = x + self.pull * (x - x**3) * dt + self.noise * dt.sqrt() * noise(k)
        return x

    def law(self, t, std):
        """A grid, and there the density and the score of x_t for x0 ~ N(0, std²): its chain, by quadrature."""
        x = torch.linspace(-4, 4, 1201, dtype=F64)
        width, dt = 8 / 1200, t / self.steps
        density = torch.exp(-0.5 * (x / std) ** 2)
        density, centred = density / density.sum() / width, x[:, None] - (x + self.pull * (x - x**3) * dt)[None]
        var = self.noise**2 * dt
        kernel = torch.exp(-0.5 * centred**2 / var) / math.sqrt(2 * math.pi * var) * width
        for _ in range(self.steps - 1):
            density = kernel @ density
        after = kernel @ density
        return x, after, (-centred / var * kernel) @ density / after


@dataclass(frozen=True)
class Cosine(Process):
    """A linear process that fastdiff does not know: α = cos(πt/2T), σ = b sin(πt/2T)."""

    b: float = 1.0
    T: ClassVar[float] = 1.0

    def alpha(self, t):
        return lib(t).cos(0.5 * math.pi * t / self.T)

    def sigma(self, t):
        return self.b * lib(t).sin(0.5 * math.pi * t / self.T)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def linear(matrix, sde=None):
    """The score −A x of samples [D]."""
    return fastdiff.ScoreModel(lambda x, t: -x @ matrix.T, sde or Still(), "score", data_shape=(len(matrix),))


def probes(n, shape, kind="rademacher"):
    """What the losses draw for the cursor (5, 0, 3)."""
    make = noise.rademacher if kind == "rademacher" else noise.normal
    return make(n, shape, seed=3, draw=5, stream=noise.PROBES).double()


CURSOR = fastdiff.execution.ops.cursor(5, 0, 3)
HALF = torch.tensor([0.5], dtype=F64)


# --- the equations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 1, 3)])
def test_the_losses_are_the_papers_equations(shape):
    """2λ/D times the printed ones, λ = 1 on a process that is not linear, σ² on one that is, for any prediction."""
    x0, t, size = randn(4, *shape), torch.tensor([0.2, 0.5, 0.7, 1.0], dtype=F64), math.prod(shape)

    def net(x, t):
        return torch.sin(x.flatten(1).cumsum(1)).view(x.shape) * (1 + t.view(-1, *[1] * len(shape)))

    for sde, prediction in ((Still(), "score"), ("vp", "score"), ("vp", "eps"), ("subvp", "v"), (Cosine(2.0), "x0")):
        model = fastdiff.ScoreModel(net, sde, prediction, data_shape=shape)
        x = losses.perturb(model.process, x0, t, CURSOR)
        weight = model.process.sigma(t) ** 2 if model.process.linear else torch.ones_like(t)
        for k, (xi, ti) in enumerate(zip(x, t)):

            def score(x, model=model, t=ti):
                return model.score(x, t)

            expected = {"ism": papers.implicit_score_matching(score, xi[None])}
            for kind in losses.PROBE_KINDS:
                v = probes(4, shape, kind)[k : k + 1]
                expected[kind] = papers.sliced_score_matching(score, xi[None], v)
                expected[kind, "vr"] = papers.sliced_score_matching(score, xi[None], v, reduced=True)
            ours = {"ism": losses.per_sample(model, x0, t, CURSOR, "ism")}
            for kind in losses.PROBE_KINDS:
                ours[kind] = losses.per_sample(model, x0, t, CURSOR, "ssm", probe=kind)
                ours[kind, "vr"] = losses.per_sample(model, x0, t, CURSOR, "ssm_vr", probe=kind)
            for name, value in expected.items():
                wanted = 2 * weight[k] / size * value[0]
                assert abs(ours[name][k] - wanted) < 1e-11 * (1 + abs(wanted)), (sde, prediction, name)


def test_the_expectation_over_probes_is_the_exact_trace():
    """Over all 2^D vectors of signs, exactly: E (vᵀs)² = ‖s‖² and E vᵀ∇s v = tr ∇s."""
    x = randn(3, 4)

    def score(x):
        return torch.sin(x.cumsum(1)) - x

    exact = papers.implicit_score_matching(score, x)
    for reduced in (False, True):
        over = [
            papers.sliced_score_matching(score, x, torch.tensor([v] * 3, dtype=F64), reduced)
            for v in itertools.product((-1.0, 1.0), repeat=4)
        ]
        assert (torch.stack(over).mean(0) - exact).abs().max() < 1e-12


def test_the_minimum_of_implicit_score_matching_is_the_exact_score():
    """Points whose mean is 0 and covariance Σ exactly: with s = −A x the loss is (tr AΣAᵀ − 2 tr A)/D and its gradient
    (2AΣ − 2)/D, so that A = Σ⁻¹, the score of N(0, Σ), is the minimum, where the loss is −tr Σ⁻¹/D."""
    n, size = 64, 3
    points, _ = torch.linalg.qr(randn(n, size))
    root = torch.tensor([[1.0, 0, 0], [0.5, 0.8, 0], [-0.2, 0.3, 0.6]], dtype=F64)
    x0, cov = math.sqrt(n) * points @ root.T, root @ root.T
    for matrix in (torch.eye(size, dtype=F64) + 0.3 * randn(size, size, seed=1), torch.linalg.inv(cov)):
        weights = matrix.clone().requires_grad_()
        value = losses.per_sample(linear(weights), x0, HALF.expand(n), CURSOR, "ism").mean()
        (gradient,) = torch.autograd.grad(value, weights)
        expected = ((matrix @ cov @ matrix.T).trace() - 2 * matrix.trace()) / size
        assert abs(value - expected) < 1e-12
        assert (gradient - 2 * (matrix @ cov - torch.eye(size, dtype=F64)) / size).abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12
    assert abs(value + torch.linalg.inv(cov).trace() / size) < 1e-12


@pytest.mark.parametrize("loss", TRACES)
def test_gradients_are_finite_differences(loss):
    x0, first, second = randn(3, 2), randn(2, 4, seed=1), randn(4, 2, seed=2)
    t = torch.tensor([0.3, 0.6, 0.9], dtype=F64)

    def value(first, second, sde="vp", prediction="v"):
        net = lambda x, t: torch.tanh(x @ first + t[:, None]) @ second  # noqa: E731
        return losses.per_sample(
            fastdiff.ScoreModel(net, sde, prediction, data_shape=(2,)), x0, t, CURSOR, loss,
            probe=None if loss == "ism" else "normal",
        )  # fmt: skip

    weights = first.requires_grad_(), second.requires_grad_()
    assert torch.autograd.gradcheck(value, weights)
    assert torch.autograd.gradcheck(lambda *w: value(*w, DoubleWell(), "score"), weights)


LINEAR = ["vp", "ve", "subvp", "ddpm", "ncsn", "edm", "ou", Cosine(1.5)]


@pytest.mark.parametrize("sde", LINEAR, ids=str)
@pytest.mark.parametrize("prediction", ["score", "eps", "x0"])
def test_they_differ_from_denoising_score_matching_by_one(sde, prediction):
    """E[λ‖s + ε/σ‖²/D] = E[λ(2 tr ∇s + ‖s‖²)/D] + 1 at every t, for any network: DSM's constant is λ‖ε/σ‖²/D."""
    n = 20000
    model = fastdiff.ScoreModel(lambda x, t: torch.tanh(0.7 * x - 0.2), sde, prediction, data_shape=(3,))
    t = torch.full((n,), 5.0 if model.process.discrete else 0.6, dtype=F64)
    x0 = Gaussian([0.3, -0.5, 0.0], std=[1.0, 0.5, 0.2]).sample(n, generator=torch.Generator().manual_seed(1))
    dsm = losses.per_sample(model, x0, t, CURSOR, "dsm")
    for loss in TRACES:
        gap = dsm - losses.per_sample(model, x0, t, CURSOR, loss)
        assert abs(gap.mean() - 1) < 5 * gap.std() / math.sqrt(n), loss


@pytest.mark.parametrize("kind", losses.PROBE_KINDS)
def test_variances_are_their_closed_forms_and_the_reduced_one_is_smaller(kind):
    """At one x the losses are vᵀM v/D, M = 2∇s + ssᵀ and 2∇s: their variance over v is 2‖M‖² for normals, less the
    diagonal for signs, which has no part in it (M symmetric)."""
    n, size = 40000, 4
    matrix = torch.eye(size, dtype=F64) + 0.3 * torch.ones(size, size, dtype=F64)
    x = torch.tensor([0.8, -1.0, 0.5, 1.1], dtype=F64)
    s = -matrix @ x
    for loss, m in (("ssm", torch.outer(s, s) - 2 * matrix), ("ssm_vr", -2 * matrix)):
        value = losses.per_sample(linear(matrix), x.expand(n, size), HALF.expand(n), CURSOR, loss, probe=kind)
        off = m - m.diag().diag() if kind == "rademacher" else m
        assert float((size * value).detach().var()) == pytest.approx(2 * float((off**2).sum()), rel=0.06), loss
    # over data too, at the truth, N(0, 1) in four dimensions
    x0 = randn(n, size)
    spread = [
        losses.per_sample(linear(torch.eye(size, dtype=F64)), x0, HALF.expand(n), CURSOR, loss, probe=kind).var()
        for loss in ("ssm", "ssm_vr")
    ]
    assert spread[1] < 0.8 * spread[0]


@pytest.mark.parametrize("sde", ["ou", "subvp", "edm", Cosine(1.5)], ids=str)
def test_denoising_score_matching_takes_any_linear_process(sde):
    """The exact network has the least loss, the conditional variance of ε; one that is off by δ in ε pays δ² more."""
    data, n = Gaussian([0.5, -0.2], std=[0.6, 0.9]), 20000
    x0 = data.sample(n, generator=torch.Generator().manual_seed(1))
    process = fastdiff.processes.get(sde)
    t = torch.full((n,), 0.4, dtype=F64)
    alpha, sigma = float(process.alpha(t[0])), float(process.sigma(t[0]))
    variance = alpha**2 * torch.tensor([0.6, 0.9], dtype=F64) ** 2
    least = float((variance / (variance + sigma**2)).mean())
    for shift in (0.0, 0.5):
        model = fastdiff.ScoreModel(
            lambda x, t, shift=shift: data.eps(x, alpha, sigma) + shift, process, "eps", data_shape=(2,)
        )
        value = losses.per_sample(model, x0, t, CURSOR, "dsm")
        assert abs(value.mean() - least - shift**2) < 5 * value.std() / math.sqrt(n)


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", TRACES)
@pytest.mark.parametrize("sde", ["vp", DoubleWell()], ids=str)
def test_a_sample_depends_on_its_own_number_alone(loss, sde):
    model = fastdiff.ScoreModel(lambda x, t: torch.sin(x), sde, "score", data_shape=(2, 3))
    x0, t = randn(6, 2, 3, dtype=torch.float32), torch.linspace(0.2, 0.9, 6)
    whole = losses.per_sample(model, x0, t, CURSOR, loss)
    parts = [
        losses.per_sample(model, x0[lo:hi], t[lo:hi], fastdiff.execution.ops.cursor(5, lo, 3), loss)
        for lo, hi in ((0, 1), (1, 4), (4, 6), (6, 6))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(losses.per_sample(model, x0, t, fastdiff.execution.ops.cursor(6, 0, 3), loss), whole)
    assert losses.perturb(model.process, x0, t, CURSOR).dtype == whole.dtype == torch.float32
    wide = losses.per_sample(model, x0.double(), t.double(), CURSOR, loss)
    assert wide.dtype == F64
    assert (wide - whole).abs().max() < 1e-4 * (1 + wide.abs().max())


def test_draws_of_a_sampler_are_apart():
    """noise(0) is the ε of a linear process; other draws, like other streams, share nothing with it."""
    seen = {}

    class Watched(Still):
        def sample(self, x0, t, noise):
            x0.zero_()  # its own copy
            seen.update({k: noise(k) for k in (0, 1, 2**20 - 1)})
            with pytest.raises(ConfigError, match="k must be an integer >= 0"):
                noise(-1)
            return seen[0]

    x0, t = torch.ones(4, 6), torch.full((4,), 0.5)
    x = losses.perturb(Watched(), x0, t, CURSOR)
    assert torch.equal(x, fastdiff.normal(4, (6,), seed=3, draw=5, stream=noise.PERTURBATION))
    assert torch.equal(x0, torch.ones(4, 6))
    for k, z in seen.items():
        assert torch.equal(z, noise.normal(4, (6,), seed=3, draw=5, stream=noise.PERTURBATION + 256 * k))
    for a, b in itertools.combinations(seen.values(), 2):
        assert (a != b).all()


@pytest.mark.parametrize("loss", TRACES)
def test_half_precision_networks(loss):
    """A bfloat16 network sees bfloat16 states; the loss is float32, near that of the float32 network."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
    wide = fastdiff.ScoreModel(lambda x, t: net(x), "vp", "eps", data_shape=(3,))
    x0, t = randn(8, 3, dtype=torch.float32).bfloat16(), torch.linspace(0.2, 0.9, 8)
    expected = losses.per_sample(wide, x0.float(), t, CURSOR, loss).detach()
    net.bfloat16()
    value = losses.per_sample(wide, x0, t, CURSOR, loss)
    value.mean().backward()
    assert value.dtype == torch.float32
    assert (value - expected).abs().max() < 0.05 * (1 + expected.abs().max())
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("loss", TRACES)
def test_a_loss_is_evaluated_in_any_gradient_mode(loss):
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(MLP((2,), hidden=8, layers=1), DoubleWell(), "score", data_shape=(2,))
    nn.init.normal_(model.net.out.weight)
    x0, t = randn(4, 2, dtype=torch.float32), torch.linspace(0.2, 0.9, 4)
    expected = losses.per_sample(model, x0, t, CURSOR, loss)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            value = losses.per_sample(model, x0.clone(), t.clone(), CURSOR.clone(), loss)
        assert not value.requires_grad
        # torch sums a gradient that is differentiated again in another order
        assert torch.allclose(value, expected, rtol=1e-5)


class Heads(nn.Module):
    """Attention over 4 positions in two heads, of which torch has a fused kernel on CPUs too."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 24), nn.Linear(8, 4)

    def forward(self, x, t):
        q, k, v = self.qkv(x).view(len(x), 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).reshape(len(x), 4, 8)) + t[:, None, None] * x


def test_attention_has_second_derivatives():
    """Fused attention has none on CPUs and GPUs; the losses ask for the plain one."""
    torch.manual_seed(0)
    data = Data(randn(16, 4, 4, dtype=torch.float32).clamp(-1, 1), range=(-1.0, 1.0))
    for loss in TRACES:
        model = fastdiff.ScoreModel(Heads(), "vp", "eps", data_shape=(4, 4))
        assert fastdiff.train(model, data, steps=2, loss=loss, batch_size=4).loss.isfinite().all()


def test_training_times_start_at_the_processs_own_end():
    seen = []

    class Late(Still):
        t_min = 0.3

        def sample(self, x0, t, noise):
            seen.append(float(t.min()))
            return x0 + noise(0)

    assert Late().training_times(torch.zeros(1)) == pytest.approx(0.3)
    x0 = randn(64, 2, dtype=torch.float32)
    t = Late().training_times(torch.linspace(0, 0.999, 64))
    losses.per_sample(small(Late(), "score"), x0, t, CURSOR, "ssm")
    assert min(seen) == pytest.approx(0.3)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["ssm", "ssm_vr"])
def test_the_score_of_a_process_is_learnt_from_its_sampler_alone(loss):
    """A nonlinear SDE in two dimensions, whose score at three times is known by quadrature to this test only."""
    well, std = DoubleWell(), 0.5
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(MLP((2,), hidden=32, layers=2), well, "score", data_shape=(2,), data_range=(-4.0, 4.0))
    x0 = Data(std * randn(8000, 2, seed=1, dtype=torch.float32), range=(-4.0, 4.0))
    fastdiff.train(model, x0, steps=900, loss=loss, batch_size=256, lr=5e-3, warmup=20, decay=True, ema=0.99)
    for t in (0.1, 0.3, 1.0):
        points, density, score = well.law(t, std)
        chosen = torch.multinomial(density, 8000, replacement=True, generator=torch.Generator().manual_seed(2)).view(
            -1, 2
        )
        error = model.score(points[chosen].float(), t).detach() - score[chosen]
        assert (error**2).mean() < 0.1 * (score[chosen] ** 2).mean(), t  # of the Fisher information


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


def small(sde, prediction="score"):
    torch.manual_seed(0)
    return fastdiff.ScoreModel(MLP((2,), hidden=16, layers=1), sde, prediction, data_shape=(2,), data_range=(-5.0, 5.0))


DATA = Data(randn(64, 2, dtype=torch.float32), range=(-5.0, 5.0))


@pytest.mark.parametrize("loss", TRACES)
@pytest.mark.parametrize("sde", ["ve", DoubleWell(steps=3)], ids=str)
def test_runs_are_repeated_and_resumed(tmp_path, sde, loss):
    options = {"loss": loss, "batch_size": 8, "warmup": 1, "checkpoint_every": 4}
    whole, again, parts = small(sde), small(sde), small(sde)
    first = fastdiff.train(whole, DATA, steps=9, **options)
    assert torch.equal(fastdiff.train(again, DATA, steps=9, **options).loss, first.loss)
    fastdiff.train(small(sde), DATA, steps=5, checkpoint=tmp_path, **options)
    assert torch.equal(fastdiff.train(parts, DATA, steps=9, checkpoint=tmp_path, **options).loss, first.loss[5:])
    assert torch.equal(weights(whole), weights(parts))
    own = {} if isinstance(sde, str) else {"sde": sde}
    assert torch.equal(weights(fastdiff.load(tmp_path, **own)), weights(whole))
    if loss != "ism":
        with pytest.raises(CheckpointMismatchError, match="probe='rademacher', now 'normal'"):
            fastdiff.train(small(sde), DATA, steps=10, checkpoint=tmp_path, probe="normal", **options)


def test_models_of_ones_own_process_are_saved_and_loaded(tmp_path):
    model = small(Cosine(1.5), "eps")
    before = fastdiff.train(
        model, DATA, steps=300, loss="dsm", batch_size=32, lr=3e-3, warmup=1, checkpoint=tmp_path
    ).loss
    assert before[-50:].mean() < before[:5].mean()
    loaded = fastdiff.load(tmp_path, sde=Cosine(1.5))
    assert torch.equal(weights(loaded), weights(model))
    assert loaded.process == Cosine(1.5)
    with pytest.raises(CheckpointMismatchError, match="give it as sde="):
        fastdiff.load(tmp_path)
    with pytest.raises(CheckpointMismatchError, match="trained on"):
        fastdiff.load(tmp_path, sde=Cosine(2.0))
    with pytest.raises(ConfigError, match="sde must be one of"):
        fastdiff.load(tmp_path, sde="cosine")

    @dataclass(frozen=True)
    class Odd(Still):
        force: object = math.sin

    with pytest.raises(ConfigError, match="dataclass of plain numbers"):
        fastdiff.train(small(Odd()), DATA, steps=1, loss="ssm", checkpoint=tmp_path / "odd")
    assert not (tmp_path / "odd").exists()
    assert fastdiff.train(small(Odd()), DATA, steps=1, loss="ssm").loss.isfinite().all()


def test_labels_pass_through():
    torch.manual_seed(0)
    net = MLP((2,), hidden=16, layers=1, num_classes=3)
    data = Data(DATA.x, labels=torch.arange(64) % 3, range=(-5.0, 5.0))
    model = fastdiff.ScoreModel(net, DoubleWell(), "score", data_shape=(2,), data_range=(-5.0, 5.0))
    assert fastdiff.train(model, data, steps=3, loss="ssm_vr", batch_size=8).loss.isfinite().all()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", losses.DENOISING)
def test_denoising_losses_need_a_linear_process(loss):
    with pytest.raises(
        ConfigError, match=f"loss='{loss}' needs a linear process.*DoubleWell does not: use loss='ssm_vr'"
    ):
        fastdiff.train(small(DoubleWell()), DATA, steps=1, loss=loss)


def test_what_a_sampler_alone_cannot_do_is_refused():
    for options, words in (
        ({"prediction": "eps"}, "prediction='eps' needs a linear process"),
        ({"prediction": "score", "time_input": "sigma"}, "time_input='sigma' needs a linear process"),
        ({"prediction": "score", "time_input": "index"}, "continuous"),
        ({"prediction": "epsilon"}, "prediction must be one of"),
    ):
        with pytest.raises(ConfigError, match=words):
            fastdiff.ScoreModel(lambda x, t: x, DoubleWell(), data_shape=(2,), **options)
    model = small(DoubleWell())
    x, t = randn(3, 2, dtype=torch.float32), torch.tensor(0.5)
    assert torch.equal(model.score(x, t), model(x, t))
    assert torch.equal(model.predict("score", x, 0.0), model(x, 0.0))
    with pytest.raises(ConfigError, match="a prediction of 'x0' needs a linear process"):
        model.predict("x0", x, t)
    with pytest.raises(ConfigError, match=r"t must lie in \[0, 1\], got 2"):
        model.score(x, 2.0)
    for sampler in (None, "heun"):
        with pytest.raises(ConfigError, match="sampling needs a linear process"):
            fastdiff.sample(model, steps=3, sampler=sampler)
        with pytest.raises(ConfigError, match="sampling needs a linear process"):
            fastdiff.plan(DoubleWell(), 3, sampler=sampler)


def test_processes_that_are_none_are_refused():
    class Empty(Process):
        T = 1.0

    class Timeless(Still):
        T = None

    class Late(Still):
        t_min = 1.0

    for process, words in ((Empty(), "neither"), (Timeless(), "T must be a number"), (Late(), "t_min must be")):
        with pytest.raises(ConfigError, match=words):
            fastdiff.ScoreModel(lambda x, t: x, process, "score", data_shape=(2,))


@pytest.mark.parametrize(
    ("returned", "error"),
    [(lambda x0: x0[:, :1], ShapeError), (lambda x0: x0.long(), DTypeError), (lambda x0: x0.numpy(), DTypeError)],
)
def test_samplers_that_return_something_else_are_refused(returned, error):
    class Wrong(Still):
        def sample(self, x0, t, noise):
            return returned(x0)

    with pytest.raises(error, match=r"Wrong.sample\(x0, t, noise\) must"):
        fastdiff.train(small(Wrong()), DATA, steps=1, loss="ssm")


def test_arguments_of_the_trace_losses():
    model = small("vp")
    for options, words in (
        ({"loss": "ssm", "probe": "gaussian"}, "probe must be one of 'rademacher', 'normal'"),
        ({"loss": "dsm", "probe": "normal"}, "leave it out"),
        ({"loss": "ism", "probe": "normal"}, "leave it out"),
        ({"loss": "sms"}, "did you mean 'ssm'"),
    ):
        with pytest.raises(ConfigError, match=words):
            fastdiff.train(model, DATA, steps=1, **options)
    large = fastdiff.ScoreModel(lambda x, t: x, "vp", data_shape=(1025,))
    with pytest.raises(ConfigError, match="at most 1024, got 1025: use loss='ssm_vr'"):
        losses.per_sample(large, randn(2, 1025), HALF.expand(2), CURSOR, "ism")


class Steps(nn.Module):
    """A network whose output depends on x by steps only, though it has parameters to train."""

    def __init__(self, through):
        super().__init__()
        self.through, self.w = through, nn.Parameter(torch.ones(2))

    def forward(self, x, t):
        return self.through(x) * self.w


class Once(torch.autograd.Function):
    """An operation with a first derivative only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@pytest.mark.parametrize("loss", TRACES)
def test_networks_without_derivatives_are_refused(loss):
    for through in (torch.Tensor.detach, lambda x: nn.functional.one_hot(x.argmax(1), 2).to(x.dtype)):
        model = fastdiff.ScoreModel(Steps(through), DoubleWell(), "score", data_shape=(2,), data_range=(-5.0, 5.0))
        with pytest.raises(
            ModelOutputError, match=f"'{loss}' needs gradients through the model, and its output has none"
        ):
            fastdiff.train(model, DATA, steps=1, loss=loss)
    model = fastdiff.ScoreModel(Steps(Once.apply), DoubleWell(), "score", data_shape=(2,), data_range=(-5.0, 5.0))
    with pytest.raises(ModelOutputError, match=f"'{loss}' needs second derivatives"):
        fastdiff.train(model, DATA, steps=1, loss=loss)
    fixed = fastdiff.ScoreModel(lambda x, t: x.detach(), "vp", "eps", data_shape=(2,))
    with pytest.raises(ModelOutputError, match="needs gradients through the model"):
        losses.per_sample(fixed, randn(2, 2), HALF.expand(2), CURSOR, loss)


def test_what_a_compiled_network_lacks_is_named_and_other_errors_pass():
    for loss, message, error in (
        ("ssm", "torch.compile with aot_autograd does not currently support double backward", ModelOutputError),
        ("ssm", "out of memory", RuntimeError),
        ("dsm", "double backward", RuntimeError),
    ):
        with pytest.raises(error, match=message) as caught, losses.differentiating(loss):
            raise RuntimeError(message)
        assert caught.type is error
