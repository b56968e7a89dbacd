"""Inverse problems: operators, and each method against posteriors that are known."""

from __future__ import annotations

import functools
import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import guidance, inverse
from fastdiff.errors import ConfigError, DataError, DTypeError, ModelOutputError, NonFiniteError, ShapeError
from fastdiff.execution import noise as noise_streams
from fastdiff.execution import ops
from fastdiff.guidance.base import Setting, guided
from fastdiff.inverse import daps
from fastdiff.inverse.laplace import Likelihood
from fastdiff.inverse.own_steps import Steps
from fastdiff.inverse.problem import Measurement

KERNEL = torch.tensor([[0.1, 0.2, 0.0], [0.3, 0.1, 0.1], [0.0, 0.1, 0.1]], dtype=torch.float64)
OPERATORS = {
    "matrix": (inverse.Matrix(torch.arange(18.0, dtype=torch.float64).sin().view(3, 6)), (2, 3)),
    "mask": (inverse.Mask(torch.tensor([[True, False, True, True]])), (3, 4)),
    "downsampling": (inverse.Downsampling(2), (3, 4, 6)),
    "downsampling of a signal": (inverse.Downsampling(4), (2, 8)),
    "blur": (inverse.Blur(KERNEL), (2, 5, 4)),
    "even blur": (inverse.Blur(KERNEL[:2, :2]), (1, 4, 6)),
    "gaussian blur": (inverse.Blur.gaussian(0.7, 1), (2, 9)),
    "fourier": (inverse.Fourier(torch.arange(20).view(4, 5) % 3 == 0), (2, 4, 5)),
    "fourier of one channel": (inverse.Fourier(torch.arange(24).view(4, 6) % 3 == 0), (1, 4, 6)),
    "grayscale": (inverse.Grayscale(), (3, 4, 4)),
    "weighted": (inverse.Grayscale((0.299, 0.587, 0.114)), (3, 5)),
    "composed": (inverse.Mask(torch.arange(6).view(1, 2, 3) > 1) @ inverse.Downsampling(2) @ inverse.Grayscale(), (3, 4, 6)),
}  # fmt: skip


def dense(operator, shape):
    """The matrix of an operator, [m, D]."""
    numbers = math.prod(shape)
    return operator.A(torch.eye(numbers, dtype=torch.float64).view(numbers, *shape)).flatten(1).T


@pytest.mark.parametrize("name", OPERATORS)
def test_adjoints_are_the_transposed_matrices(name):
    operator, shape = OPERATORS[name]
    matrix = dense(operator, shape)
    y = torch.randn(5, *operator.A(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:], dtype=torch.float64)
    assert torch.allclose(operator.A_adjoint(y).flatten(1), y.flatten(1) @ matrix, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*OPERATORS, "large"])
def test_bits_of_an_operator_do_not_depend_on_the_batch(name, dtype):
    values = torch.from_numpy(np.random.default_rng(3).normal(size=(70, 90)))
    operator, shape = OPERATORS[name] if name != "large" else (inverse.Matrix(values), (90,))
    x = torch.randn(37, *shape, dtype=dtype)
    y = operator.A(x)
    back = operator.A_adjoint(y)
    for k, count in ((0, 1), (5, 1), (1, 2), (4, 15), (20, 17)):
        part = slice(k, k + count)
        assert torch.equal(operator.A(x[part]), y[part])
        assert torch.equal(operator.A_adjoint(y[part]), back[part])


def test_operators_are_what_they_say():
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    assert torch.allclose(inverse.Downsampling(2).A(x), torch.nn.functional.avg_pool2d(x, 2), atol=1e-14)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular")
    weight = KERNEL.flip(0, 1).expand(3, 1, 3, 3)  # torch's is a correlation
    assert torch.allclose(inverse.Blur(KERNEL).A(x), torch.nn.functional.conv2d(padded, weight, groups=3), atol=1e-14)
    assert torch.allclose(inverse.Grayscale().A(x)[:, 0], x.mean(1), atol=1e-15)
    everything = inverse.Fourier(torch.ones(4, 6, dtype=torch.bool))
    assert torch.allclose(everything.A_adjoint(everything.A(x)), x, atol=1e-14)  # orthonormal
    assert float(inverse.Blur.gaussian(1.3).kernel.sum()) == pytest.approx(1)


# --- posteriors of Gaussians -----------------------------------------------------------------------------------------


class Gaussian:
    """Data N(mean, covariance) of samples of this shape, their exact x̂0, and posteriors."""

    def __init__(self, shape, seed=0):
        rng = np.random.default_rng(seed)
        numbers = math.prod(shape)
        root = rng.normal(size=(numbers, numbers)) / numbers**0.5
        self.shape, self.mean = shape, torch.from_numpy(rng.normal(size=numbers)) * 0.5
        self.covariance = torch.from_numpy(root @ root.T) + 0.05 * torch.eye(numbers, dtype=torch.float64)
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    def denoiser(self, process):
        def x0(x, t):
            alpha, sigma = (value[:, None] for value in (process.alpha(t.double()), process.sigma(t.double())))
            along = (x.flatten(1).double() - alpha * self.mean) @ self.vectors
            gain = alpha * self.values / (alpha**2 * self.values + sigma**2)
            return (self.mean + (along * gain) @ self.vectors.T).view(x.shape).to(x.dtype)

        return x0

    def draw(self, count, seed=1):
        z = torch.from_numpy(np.random.default_rng(seed).normal(size=(count, len(self.mean))))
        return (self.mean + z @ (self.vectors * self.values.sqrt()).T).view(count, *self.shape)

    def posterior(self, matrix, y, noise_std):
        """(mean, covariance) of x0 given y."""
        inner = matrix @ self.covariance @ matrix.T + noise_std**2 * torch.eye(len(matrix), dtype=torch.float64)
        gain = self.covariance @ matrix.T @ torch.linalg.inv(inner)
        return self.mean + gain @ (y - matrix @ self.mean), self.covariance - gain @ matrix @ self.covariance


def compared(x, mean, covariance):
    """The largest error of the mean in posterior standard deviations, and the ratios of variances along the axes."""
    x = x.double().flatten(1)
    deviation = covariance.diagonal().sqrt()
    return float(((x.mean(0) - mean) / deviation).abs().max()), x.var(0) / covariance.diagonal()


EXACT = {
    "MMPS": lambda problem: inverse.MMPS(problem, 3),
    "MMPS by default": inverse.MMPS,
    "TMPD": lambda problem: inverse.TMPD(problem, diagonal=False),
    "SMC": inverse.SMC,
    "SMC on PiGDM": lambda problem: inverse.SMC(problem, proposal=inverse.PiGDM(problem)),
}


SETTINGS = {
    "vp vectors": (fastdiff.VP(), (6,)),
    "ve signals": (fastdiff.VE(), (2, 3)),
    "subvp images": (fastdiff.SubVP(), (1, 2, 3)),
}


@pytest.mark.parametrize(
    ("method", "given"),
    # all in one setting, and those that share no code in the others
    [
        (method, given)
        for method in EXACT
        for given in SETTINGS
        if given == "vp vectors" or method in ("MMPS", "TMPD", "SMC")
    ],
)
def test_exact_methods_draw_the_posterior_of_a_gaussian(method, given):
    process, shape = SETTINGS[given]
    gaussian = Gaussian(shape)
    matrix = torch.from_numpy(np.random.default_rng(2).normal(size=(3, math.prod(shape))))
    y = matrix @ gaussian.draw(1).flatten() + 0.3
    problem = inverse.Problem(y.float(), matrix.float(), 0.4)
    x = fastdiff.sample(
        gaussian.denoiser(process), process, 100, sampler="euler_maruyama", grid="fourth_root", shape=shape, prediction="x0",
        num_samples=3000, guidance=EXACT[method](problem),
    )  # fmt: skip
    error, ratios = compared(x, *gaussian.posterior(matrix, y, 0.4))
    assert error < 0.1
    assert float(ratios.min()) > 0.9
    assert float(ratios.max()) < 1.1


@pytest.mark.parametrize(
    ("sampler", "steps"), [("unipc", 20), ("dpmpp_2m", 40), ("heun", 20), ("rk45", None), ("pc", 100)]
)
def test_any_sampler_carries_a_guided_prediction(sampler, steps):
    gaussian, process = Gaussian((6,)), fastdiff.VP()
    matrix = torch.from_numpy(np.random.default_rng(2).normal(size=(2, 6)))
    y = matrix @ gaussian.draw(1).flatten()
    problem = inverse.Problem(y.float(), matrix.float(), 0.4)
    x = fastdiff.sample(
        gaussian.denoiser(process), process, steps, sampler=sampler, shape=(6,), prediction="x0", num_samples=3000,
        guidance=inverse.MMPS(problem),
    )  # fmt: skip
    error, ratios = compared(x, *gaussian.posterior(matrix, y, 0.4))
    assert error < 0.1
    assert float(ratios.min()) > 0.87
    assert float(ratios.max()) < 1.13


# --- the methods as printed --------------------------------------------------------------------------------------------

METHODS = {
    "MMPS": inverse.MMPS,
    "MMPS, one iteration": lambda problem: inverse.MMPS(problem, 1),
    "TMPD": inverse.TMPD,
    "diagonal TMPD": lambda problem: inverse.TMPD(problem, True),
    "PiGDM": inverse.PiGDM,
    "DiffPIR": inverse.DiffPIR,
    "ScoreALD": inverse.ScoreALD,
    "SMC": inverse.SMC,
    "DDRM": inverse.DDRM,
    "DAPS": inverse.DAPS,
}

FORM = torch.from_numpy(np.random.default_rng(5).normal(size=(5, 4))) / 2
A = torch.from_numpy(np.random.default_rng(6).normal(size=(3, 4)))


def bent(x, t):
    """The gradient of Σ log cosh(Wx): a network whose Jacobian is symmetric and positive, as a covariance is."""
    return torch.tanh(x @ FORM.T) @ FORM


def shift(method, x0, jacobian, x, y, alpha, sigma, noise):
    """What the method adds to x̂0 of one sample, in plain algebra."""
    residual, ratio, c = y - A @ x0, (sigma / alpha) ** 2, sigma**2 / alpha * jacobian
    inner, eye = A @ c @ A.T, torch.eye(3, dtype=torch.float64)
    if method == "MMPS":
        return c @ A.T @ torch.linalg.solve(inner + noise**2 * eye, residual)
    if method == "MMPS, one iteration":
        s = inner + noise**2 * eye
        return c @ A.T @ residual * (residual @ residual) / (residual @ s @ residual)
    if method == "diagonal TMPD":
        return c @ A.T @ (residual / (inner.sum(1) + noise**2))
    if method == "PiGDM":
        spread = ratio / (ratio + 1)
        return c @ A.T @ torch.linalg.solve(spread * A @ A.T + noise**2 * eye, residual)
    if method == "DiffPIR":  # the minimum of ‖y − A v‖²/(2 σ_y²) + ‖v − x̂0‖²/(2 σ̂²)
        normal = A.T @ A / noise**2 + torch.eye(4, dtype=torch.float64) / ratio
        return torch.linalg.solve(normal, A.T @ y / noise**2 + x0 / ratio) - x0
    return sigma**2 / alpha * A.T @ (y - A @ x / alpha) / (noise**2 + ratio) / alpha  # ScoreALD


@pytest.mark.parametrize("method", ["MMPS", "MMPS, one iteration", "diagonal TMPD", "PiGDM", "DiffPIR", "ScoreALD"])
def test_a_guided_prediction_is_its_formula(method):
    process, generator = fastdiff.VP(), torch.Generator().manual_seed(3)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    model = fastdiff.ScoreModel(bent, process, "x0", "t", (4,))
    setting = Setting(model, 5, torch.float64, torch.device("cpu"), 0, 0, None)
    outer, cond, *_ = guided(METHODS[method](inverse.Problem(y, A, 0.3)), setting)
    t = torch.tensor([0.2, 0.4, 0.5, 0.7, 0.9], dtype=torch.float64)
    found = outer.predict("x0", x, t, cond)
    for k in range(5):
        alpha, sigma = process.alpha(t[k]), process.sigma(t[k])
        jacobian = torch.func.jacrev(lambda v: bent(v, None))(x[k])
        x0 = bent(x[k], None)
        expected = x0 + shift(method, x0, jacobian, x[k], y[k], alpha, sigma, 0.3)
        assert (found[k] - expected).abs().max() < 1e-6 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("method", ["MMPS", "MMPS, one iteration", "diagonal TMPD", "PiGDM", "DPS"])
def test_a_method_leaves_the_gradients_to_those_after_it(method):
    """Whose gradient here is 0."""
    given = (METHODS | {"DPS": inverse.DPS})[method](inverse.Problem(torch.tensor([0.3, -1.0, 0.5]), A.float(), 0.2))
    after = guidance.LogLikelihood(lambda x0: 0 * x0.sum(1))
    options = {"shape": (4,), "prediction": "x0", "sampler": "ancestral", "num_samples": 3}
    alone, both, reverse = (
        fastdiff.sample(bent_in_float32, "vp", 4, guidance=each, **options)
        for each in (given, [given, after], [after, given])
    )
    assert torch.equal(both, alone)
    assert torch.equal(reverse, alone)


@pytest.mark.parametrize("process", [fastdiff.VP(), fastdiff.VE()], ids=lambda p: p.name)
def test_ddrm_is_its_steps_as_printed(process):
    """Kawar et al. 2022, eq. 7 and 8, number by number, by the same noise."""
    y, noise, eta, eta_b = torch.tensor([0.4, -0.3], dtype=torch.float64), 0.3, 0.7, 0.9
    matrix = torch.tensor([[1.0, 0.2, 0.0], [0.1, 0.05, 0.3]], dtype=torch.float64)

    def x0(x, t):
        return 0.7 * torch.tanh(x)

    found = fastdiff.sample(
        x0, process, 9, shape=(3,), prediction="x0", num_samples=4, seed=2, dtype=torch.float64,
        guidance=inverse.DDRM(inverse.Problem(y, matrix, noise), eta, eta_b),
    )  # fmt: skip
    table = fastdiff.plan(process, 9, sampler="ancestral", grid="logsnr", prediction="x0")
    levels = [(row.level.alpha, row.level.sigma / row.level.alpha) for row in table.rows] + [(1.0, 0.0)]
    u, values, vt = torch.linalg.svd(matrix, full_matrices=True)
    seen = [y @ u[:, i] / values[i] for i in range(2)]
    first = fastdiff.normal(4, (3,), seed=2).double() * table.prior_std / levels[0][0]
    for n in range(4):
        high = levels[0][1]
        bar = [
            seen[i] + math.sqrt(high**2 - (noise / values[i]) ** 2) * first[n, i] / high if i < 2 else first[n, i]
            for i in range(3)
        ]
        for k in range(9):
            (alpha, high), (_, low) = levels[k : k + 2]
            z = fastdiff.normal(4, (3,), seed=2, draw=k, stream=noise_streams.SAMPLER).double()[n]
            mean = vt @ x0(alpha * (torch.stack(bar) @ vt), None)
            after = []
            for i in range(3):
                if i == 2:  # nothing is measured
                    after.append(mean[i] + math.sqrt(1 - eta**2) * low * (bar[i] - mean[i]) / high + eta * low * z[i])
                elif low < noise / values[i]:
                    pull = (seen[i] - mean[i]) / (noise / values[i])
                    after.append(mean[i] + math.sqrt(1 - eta**2) * low * pull + eta * low * z[i])
                else:
                    left = math.sqrt(low**2 - (eta_b * noise / values[i]) ** 2)
                    after.append((1 - eta_b) * mean[i] + eta_b * seen[i] + left * z[i])
            bar = after
        assert (found[n] - torch.stack(bar) @ vt).abs().max() < 1e-9


def test_daps_draws_x0_exactly_and_ends_on_exact_data():
    """N(m, s² 1)·N(y; A x, σ²) has the covariance (1/s² + AᵀA/σ²)⁻¹, and the mean that goes with it."""
    model = fastdiff.ScoreModel(bent, "vp", "x0", "t", (4,))
    count, spread, noise = 40_000, 0.8, 0.5
    y, mean = torch.tensor([0.3, -1.0, 0.5]), torch.tensor([0.1, 0.2, -0.4, 0.0])
    setting = Setting(model, count, torch.float32, torch.device("cpu"), 7, 0, None)
    measured = Measurement(inverse.Problem(y, A.float(), noise), setting)
    steps = Steps(setting, fastdiff.plan("vp", 4), ops.backend_module("reference"), count, False)
    x = daps.drawn(steps, measured, measured.solver(), mean.expand(count, 4), spread, 0).double()
    covariance = torch.linalg.inv(torch.eye(4, dtype=torch.float64) / spread**2 + A.T @ A / noise**2)
    expected = covariance @ (mean.double() / spread**2 + A.T @ y.double() / noise**2)
    assert (x.mean(0) - expected).abs().max() < 5 * spread / count**0.5
    assert (x.T.cov() - covariance).abs().max() < 5 * spread**2 * (2 / count) ** 0.5
    exact = inverse.DAPS(inverse.Problem(y, A.float(), 0.0))
    x = fastdiff.sample(bent_in_float32, "vp", 6, shape=(4,), prediction="x0", num_samples=5, guidance=exact)
    assert (x @ A.float().T - y).abs().max() < 1e-4


def bent_in_float32(x, t):
    return bent(x.double(), t).float()


# --- sequential Monte Carlo ------------------------------------------------------------------------------------------


@pytest.fixture
def posteriors(monkeypatch):
    """The example, which has mixtures and their posteriors."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    return importlib.import_module("posteriors")


def test_the_examples_posteriors_are_exact(posteriors):
    """Of one normal, against the formula in other terms; of several in two numbers, against Bayes' rule on a grid."""
    gaussian, matrix = Gaussian((4,)), torch.from_numpy(np.random.default_rng(2).normal(size=(2, 4)))
    y = torch.tensor([0.4, -1.0], dtype=torch.float64)
    mean, covariance = gaussian.posterior(matrix, y, 0.4)
    found = posteriors.Prior(gaussian.mean[None], torch.ones(1), gaussian.covariance).given(matrix, y, 0.4)
    assert torch.allclose(found.means[0], mean)
    assert torch.allclose(found.covariance, covariance)
    assert torch.allclose(found.variance(), covariance.diagonal())
    means, weights = torch.tensor([[-1.0, 0.5], [1.2, -0.3], [0.2, 2.0]]), torch.tensor([1.0, 2.0, 0.7])
    spread, matrix, y = (
        torch.tensor([[0.3, 0.1], [0.1, 0.2]]),
        torch.tensor([[1.0, -0.4]]).double(),
        torch.tensor([0.3]).double(),
    )
    axis = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    apart = grid[:, None] - means
    prior = (weights * torch.exp(-0.5 * ((apart @ torch.linalg.inv(spread).double()) * apart).sum(2))).sum(1)
    density = prior * torch.exp(-0.5 * ((y - grid @ matrix.T)[:, 0] / 0.3) ** 2)
    density /= density.sum()
    found = posteriors.Prior(means, weights, spread).given(matrix, y, 0.3)
    drawn = found.draw(100_000, np.random.default_rng(0))
    for mean, variance in ((found.mean(), found.variance()), (drawn.mean(0), drawn.var(0))):
        assert torch.allclose(mean, density @ grid, atol=0.02)
        assert torch.allclose(variance, density @ (grid - density @ grid) ** 2, rtol=0.02)


@pytest.mark.parametrize(("numbers", "measured"), [(8, 1), (8, 2)])
def test_particles_find_the_modes_of_a_mixture(numbers, measured, posteriors):
    """Within twice the distance of two exact sets, in the median."""
    process, far = fastdiff.VP(), []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        case = posteriors.measured(posteriors.modes(rng, numbers), measured, rng)
        x = fastdiff.sample(
            case.prior.denoiser(process), process, 100, shape=(numbers,), prediction="x0", num_samples=1000, seed=seed,
            guidance=inverse.SMC(case.problem()),
        )  # fmt: skip
        far.append(posteriors.compared(x, case, seed)[-1])
    assert np.median(far) < 2, far


@pytest.mark.parametrize(
    "proposal", [None, lambda problem: inverse.PiGDM(problem, data_std=12.0)], ids=["MMPS", "PiGDM"]
)
def test_many_particles_are_of_the_posterior_whatever_proposes(proposal, posteriors):
    """4000 of them, in 200 steps, near the distance of two exact sets (0.18), where the proposals alone are far off."""
    process, rng = fastdiff.VP(), np.random.default_rng(1)
    case = posteriors.measured(posteriors.modes(rng, 2), 1, rng)
    exact = case.prior.given(case.matrix, case.y, case.noise_std).draw(4000, rng)
    problem = case.problem()
    guide = inverse.MMPS(problem) if proposal is None else proposal(problem)

    def far(guidance):
        x = fastdiff.sample(
            case.prior.denoiser(process), process, 200, sampler="ancestral", grid="logsnr", shape=(2,), prediction="x0",
            num_samples=4000, guidance=guidance,
        )  # fmt: skip
        return posteriors.sliced(x, exact)

    assert far(inverse.SMC(problem, proposal=None if proposal is None else guide)) < 0.6
    assert far(guide) > 1.5


@pytest.mark.parametrize("laplace", [False, True], ids=["normal", "laplace"])
def test_intervals_of_particles_cover_the_truth(laplace, posteriors):
    """Of signals, sums of increments: 90 % intervals hold nine in ten of their numbers; the increments' x̂0 is that of sums over
    a fine grid."""
    signals, process = posteriors.Signals(laplace), fastdiff.VP()
    grid = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    density = torch.exp(-grid.abs() / signals.width) if laplace else torch.exp(-0.5 * (grid / signals.std) ** 2)
    x = torch.tensor([[-1.0], [-0.2], [0.01], [0.5], [2.0]], dtype=torch.float64)
    for t in (1e-3, 0.05, 0.3, 0.9):
        time = torch.full((5,), t, dtype=torch.float64)
        alpha, sigma = process.alpha(time)[:, None], process.sigma(time)[:, None]
        weight = density * torch.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2)
        expected = (weight * grid).sum(1) / weight.sum(1)
        assert torch.allclose(signals.denoiser(process)(x, time)[:, 0], expected, atol=1e-6)
    share, _ = posteriors.coverage(signals, posteriors.METHODS["SMC"], process, 40, 99, 40)
    assert abs(share - 0.9) < 0.05


def test_a_problem_for_each_sample():
    """y [num_samples, *m]: particles of each, one of which is drawn; the mean over many draws is the posterior's."""
    gaussian, process = Gaussian((3,)), fastdiff.VP()
    matrix = torch.tensor([[1.0, 0.5, -0.3]], dtype=torch.float64)
    y = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).repeat_interleave(300)[:, None]
    problem = inverse.Problem(y.float(), matrix.float(), 0.4)
    for method in (inverse.SMC(problem, particles=8), inverse.MMPS(problem)):
        x = fastdiff.sample(
            gaussian.denoiser(process), process, 60, sampler="euler_maruyama", grid="fourth_root", shape=(3,), prediction="x0",
            num_samples=900, guidance=method,
        )  # fmt: skip
        for k in range(3):
            mean, covariance = gaussian.posterior(matrix, y[300 * k], 0.4)
            error, _ = compared(x[300 * k : 300 * (k + 1)], mean, covariance)
            assert error < 4 / 300**0.5


@pytest.mark.filterwarnings("ignore:inverse.SMC's particles")  # few, and a network that knows no prior
def test_particles_of_one_y_share_their_condition():
    """NaN too, which means none."""
    net = nn.Module()
    net.forward = lambda x, t, cond: 0.5 * x + 0.1 * cond.nan_to_num()
    model = fastdiff.ScoreModel(net, "vp", "x0", "t", (4,), cond_shape=(4,), cond_dropout=0.1)
    method = inverse.SMC(inverse.Problem(torch.zeros(2), torch.eye(4)[:2], 0.3))
    none, zero = (
        fastdiff.sample(model, steps=5, num_samples=3, cond=torch.full((3, 4), value), guidance=method)
        for value in (math.nan, 0.0)
    )
    assert torch.equal(none, zero)
    with pytest.raises(ConfigError, match="cond must be the same for all samples of one y"):
        fastdiff.sample(model, steps=5, num_samples=3, cond=torch.arange(12.0).view(3, 4), guidance=method)


def test_effective_numbers_of_particles_are_told():
    """Of one y and of several: all of them where y says nothing, fewer where it does, and where they are few there is a warning,
    also of one problem in three, and of a handful of particles."""
    gaussian, process, matrix = Gaussian((3,)), fastdiff.VP(), torch.tensor([[1.0, 0.5, -0.3]])

    def effective(y, noise_std, count=40, particles=None, operator=matrix):
        method = inverse.SMC(inverse.Problem(y, operator, noise_std), particles=particles)
        _, info = fastdiff.sample(
            gaussian.denoiser(process), process, 20, sampler="ancestral", shape=(3,), prediction="x0", num_samples=count,
            guidance=method, return_info=True,
        )  # fmt: skip
        assert info.effective.shape == (info.rows + 1, 1 if y.ndim == 1 else count)
        return info.effective

    assert torch.allclose(effective(torch.tensor([0.3]), 1e6), torch.tensor(40.0, dtype=torch.float64))
    told = effective(torch.tensor([0.3]), 0.1)
    assert bool(((told > 20) & (told < 40)).any())
    assert bool((effective(torch.zeros(6, 1), 1e6, 6, 5) > 4.999).all())
    bent = lambda x: (5 * x[:, :1]).sin()  # noqa: E731
    with pytest.warns(UserWarning, match=r"particles fell to an effective number of 1(\.\d*)? of 8, at row \d+, and"):
        effective(torch.tensor([1.5]), 0.05, 8, operator=bent)
    with pytest.warns(UserWarning, match=r"particles of 1 of 3 problems fell to an effective number"):
        effective(torch.tensor([[0.0], [0.0], [1.5]]), 0.05, 3, 40, bent)
    _, info = fastdiff.sample(gaussian.denoiser(process), process, 2, shape=(3,), prediction="x0", return_info=True)
    assert info.effective is None


@pytest.mark.parametrize("name", ["a matrix", "a picture", "standardized", "signed"])
def test_measurements_in_other_units_are_warned_of(name):
    """As a picture's bytes for a model of [−1, 1]; not those of the model's own extremes."""
    shape, operator, options = {
        "a matrix": ((6,), torch.full((2, 6), 0.5), {"data_range": (0.0, 1.0)}),
        "a picture": ((1, 4, 4), inverse.Downsampling(2), {"data_range": (-1.0, 1.0)}),
        "standardized": ((4,), inverse.Mask(torch.arange(4) < 2), {"standardize": (10.0, 2.0)}),
        "signed": ((1, 4, 4), inverse.Fourier(torch.arange(16).view(4, 4) % 2 == 0), {"data_range": (-1.0, 1.0)}),
    }[name]
    model = fastdiff.ScoreModel(lambda x, t: 0.5 * x, "vp", "x0", "t", shape, **options)
    middle, half = (10.0, 6.0) if name == "standardized" else (sum(model.data_range) / 2, np.ptp(model.data_range) / 2)
    setting = Setting(model, 2, torch.float32, torch.device("cpu"), 0, 0, None)
    forward = inverse.Matrix(operator).A if isinstance(operator, torch.Tensor) else operator.A
    for x in (middle + half, middle - half):
        y = forward(torch.full((1, *shape), x))[0]
        Measurement(inverse.Problem(y, operator, 0.1), setting)
    for k in range(20):  # of a measurement that is noise, nearly
        noisy = inverse.Problem(
            100 * torch.randn(2, 1, generator=torch.Generator().manual_seed(k)), torch.eye(math.prod(shape))[:1], 100.0
        )
        Measurement(noisy, setting)
    Measurement(inverse.Problem(torch.ones(1), torch.zeros(1, math.prod(shape)), 0.0), setting)
    y = 128 * forward(torch.full((1, *shape), middle + half))[0]
    with pytest.warns(UserWarning, match="y runs from .* times as far as the operator takes data in the model's range"):
        Measurement(inverse.Problem(y, operator, 0.1), setting)


NOISES = {
    "poisson": (lambda x: x.exp(), "poisson", lambda mean, y: y * mean.log() - mean, 3.0),
    "a function": (lambda x: x, lambda mean, y: -(mean - y).abs().flatten(1).sum(1), lambda mean, y: -(mean - y).abs(), 1.5),
    "an operator that is not linear": (lambda x: x**2, "gaussian", lambda mean, y: -0.5 * ((mean - y) / 0.5) ** 2, 1.2),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISES)
def test_particles_of_any_noise_and_operator(name):
    """One number x0 ~ N(0.3, 1): mean and spread of |x0| and x0 against sums over a fine grid."""
    operator, noise, log_density, y = NOISES[name]
    process = fastdiff.VP()

    def x0(x, t):
        alpha, sigma = (value[:, None] for value in (process.alpha(t), process.sigma(t)))
        return 0.3 + alpha / (alpha**2 + sigma**2) * (x - 0.3 * alpha)

    problem = inverse.Problem(torch.tensor([y]), operator, 0.5 if noise == "gaussian" else None, noise)
    x = fastdiff.sample(
        x0, process, 100, sampler="euler_maruyama", shape=(1,), prediction="x0", num_samples=4000, guidance=inverse.SMC(problem)
    ).double()[:, 0]  # fmt: skip
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    weight = (log_density(operator(grid), y) - 0.5 * (grid - 0.3) ** 2).softmax(0)
    for value in (lambda v: v, abs, lambda v: v**2):
        assert float(value(x).mean()) == pytest.approx(float(weight @ value(grid)), abs=0.08)


def t_density(mean, y):
    """Of Student's t with two degrees of freedom and a scale of 0.2; not concave."""
    return -1.5 * torch.log1p(((y - mean) / 0.2) ** 2 / 2).flatten(1).sum(1)


def related(mean, y):
    """Of a normal noise, related between measurements."""
    r = y - mean
    return -0.5 * ((r / 0.3).square().flatten(1).sum(1) + (r.flatten(1).sum(1) / 0.4).square())


MANY = {
    "poisson": (lambda m: 3 * m.exp(), "poisson", lambda mean, y: (y * mean.log() - mean).sum(1), [2.0, 7.0, 1.0]),
    "heavy tails": (lambda m: m, t_density, t_density, [0.5, -0.4, 2.5]),
    "related": (lambda m: m, related, related, [0.5, -0.4, 1.0]),
    "a sine": (lambda m: m.sin(), 0.2, lambda mean, y: -0.5 * ((y - mean) / 0.2).square().sum(1), [0.5, -0.4, 0.8]),
}  # fmt: skip


@pytest.mark.parametrize("name", MANY)
def test_posteriors_of_any_noise_and_operator(name):
    """Six numbers of a normal prior, three measurements: mean and variance against a million weighted draws of the prior."""
    link, noise, log_density, y = MANY[name]
    gaussian, process, y = Gaussian((6,), seed=2), fastdiff.VP(), torch.tensor(y)
    matrix = torch.from_numpy(np.random.default_rng(4).normal(size=(3, 6))) / 6**0.5
    draws = gaussian.draw(1_000_000)
    weight = log_density(link(draws @ matrix.T), y).softmax(0)
    mean = weight @ draws
    covariance = torch.einsum("k,ki,kj->ij", weight, draws - mean, draws - mean)
    std, noise = (noise, "gaussian") if isinstance(noise, float) else (None, noise)
    problem = inverse.Problem(y, lambda x: link(x @ matrix.to(x).T), std, noise)
    x = fastdiff.sample(
        gaussian.denoiser(process), process, 60, sampler="euler_maruyama", grid="fourth_root", shape=(6,), prediction="x0",
        num_samples=2000, guidance=inverse.SMC(problem),
    )  # fmt: skip
    error, ratios = compared(x, mean, covariance)
    assert error < 0.12  # two standard errors of 500 draws are 0.09
    assert (ratios - 1).abs().max() < 0.25
    if name == "poisson":  # which MMPS alone knows nearly, by two looks at the operator's values
        x = fastdiff.sample(
            gaussian.denoiser(process), process, 20, sampler="unipc", shape=(6,), prediction="x0", num_samples=2000,
            guidance=inverse.MMPS(problem),
        )  # fmt: skip
        error, ratios = compared(x, mean, covariance)
        assert error < 0.1
        assert (ratios - 1).abs().max() < 0.2


@pytest.mark.parametrize("told", ["by the operator", "by the noise"])
def test_posteriors_of_many_counts(told):
    """Twenty of them, of means 3 exp(A x), by conjugate gradients: against draws of the normal distribution about the largest
    value of the posterior, weighted to be of the posterior itself."""
    gaussian, process, rng = Gaussian((24,), seed=2), fastdiff.VP(), np.random.default_rng(4)
    matrix = torch.from_numpy(rng.normal(size=(20, 24))) / 24**0.5
    y = torch.from_numpy(rng.poisson((3 * (matrix @ gaussian.draw(1)[0]).exp()).numpy())).double()
    precision = torch.linalg.inv(gaussian.covariance)

    def log_density(x):
        apart, m = x - gaussian.mean, x @ matrix.T
        return (y * m - 3 * m.exp()).sum(-1) - 0.5 * ((apart @ precision) * apart).sum(-1)

    top = gaussian.mean.clone()
    for _ in range(30):
        curvature = -torch.autograd.functional.hessian(log_density, top)
        top = top + torch.linalg.solve(curvature, torch.autograd.functional.jacobian(log_density, top))
    z = torch.from_numpy(np.random.default_rng(3).normal(size=(100_000, 24)))
    draws = top + z @ torch.linalg.cholesky(1.2 * torch.linalg.inv(curvature)).T
    weight = (log_density(draws) + 0.5 * z.square().sum(1)).softmax(0)
    assert float(1 / weight.square().sum()) > 30_000
    mean = weight @ draws
    covariance = torch.einsum("k,ki,kj->ij", weight, draws - mean, draws - mean)
    problem = {
        "by the operator": inverse.Problem(y.float(), lambda x: 3 * (x @ matrix.to(x).T).exp(), noise="poisson"),
        "by the noise": inverse.Problem(y.float(), matrix.float(), noise=lambda m, y: (y * m - 3 * m.exp()).sum(1)),
    }[told]
    x, info = fastdiff.sample(
        gaussian.denoiser(process), process, 60, sampler="euler_maruyama", grid="fourth_root", shape=(24,), prediction="x0",
        num_samples=1500, guidance=inverse.SMC(problem), return_info=True,
    )  # fmt: skip
    error, ratios = compared(x, mean, covariance)
    assert float(info.effective.min()) > 300
    assert error < 0.15  # of 24 numbers, by particles that are worth 500 draws
    assert (ratios - 1).abs().max() < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curvatures_of_likelihoods_are_those_of_autograd(dtype):
    """Of measurements that are on their own, that are tied, and that are tied in some samples alone; and the bits of a sample do
    not depend on the others."""

    def either(mean, y):
        return torch.where(y[:, 0] > 0, t_density(mean, y), related(mean, y))

    precise = torch.block_diag(torch.tensor([[1e6]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.tensor([[2.0]]))

    def beside_a_precise_one(mean, y):
        r = mean - y
        return -0.5 * ((r[:, :, None] * precise.to(r)).sum(1) * r).sum(1)

    for noise in (t_density, related, either, beside_a_precise_one):
        setting = Setting(
            fastdiff.ScoreModel(lambda x, t: x, "vp", "x0", "t", (4,)), 6, dtype, torch.device("cpu"), 0, 0, None
        )
        likelihood = Likelihood(
            Measurement(inverse.Problem(torch.zeros(4), torch.eye(4), noise=noise), setting), setting
        )
        rng = np.random.default_rng(8)
        mean, y = (torch.from_numpy(rng.normal(size=(6, 4))) for _ in range(2))
        slope, second = likelihood.derivatives(mean, y.to(dtype), torch.ones(6, 4), False)
        for k in range(6):

            def of(m, k=k, noise=noise, y=y):
                return noise(m[None], y[k : k + 1])[0]

            tolerance = 1e-4 if dtype == torch.float32 else 1e-12
            expected = torch.autograd.functional.hessian(of, mean[k])
            scale = expected.diagonal().abs().sqrt()  # of each row and column by itself
            torch.testing.assert_close(
                second[k] / scale / scale[:, None], -expected / scale / scale[:, None], atol=tolerance, rtol=tolerance
            )
            alone = likelihood.derivatives(mean[k : k + 1], y[k : k + 1].to(dtype), torch.ones(1, 4), False)
            assert torch.equal(alone[0][0], slope[k])
            assert torch.equal(alone[1][0], second[k])


def test_a_normal_noise_told_as_a_function_is_no_other():
    """And an operator that only looks as if it were not linear."""
    gaussian, process, y = Gaussian((3,)), fastdiff.VP(), torch.tensor([0.4, -1.0, 0.3])
    matrix = torch.tensor([[1.0, 0.5, -0.3], [0.2, 1.0, 0.0], [0.0, 0.4, 0.8]])
    told = (
        inverse.Problem(y, matrix, 0.3),
        inverse.Problem(y, matrix, noise=lambda mean, y: -0.5 * ((y - mean) / 0.3).square().sum(1)),
        inverse.Problem(y, lambda x: x @ matrix.to(x).T + (x > 1e4).to(x) * x, 0.3),
    )
    x, by_function, bent = (
        fastdiff.sample(
            gaussian.denoiser(process), process, 10, sampler="ddim", shape=(3,), prediction="x0", num_samples=5,
            guidance=inverse.MMPS(problem),
        )
        for problem in told
    )  # fmt: skip
    torch.testing.assert_close(by_function, x, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bent, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("constant", [0.0, 1e3, -1e6])
def test_a_constant_in_log_p_changes_nothing(constant):
    """But for rounding: the value's, of float32."""
    gaussian, matrix = Gaussian((3,)), torch.tensor([[1.0, 0.5, -0.3]])

    def log_p(mean, y):
        return constant - 0.5 * ((y - mean) / 0.1).square().sum(1)

    x, plain = (
        fastdiff.sample(
            gaussian.denoiser(fastdiff.VP()), "vp", 20, sampler="ddim", shape=(3,), prediction="x0", num_samples=5,
            guidance=inverse.MMPS(problem),
        )
        for problem in (
            inverse.Problem(torch.ones(1), matrix, noise=log_p),
            inverse.Problem(torch.ones(1), matrix, 0.1),
        )
    )  # fmt: skip
    torch.testing.assert_close(x, plain, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("gain", [2e-4, 1.0, 1e3])
def test_counts_of_any_rate(gain):
    """Of one number N(5, 1): by sums over a fine grid. MMPS too, where the counts are many."""
    process, y = fastdiff.VP(), round(5.5 * gain) or 1

    def x0(x, t):
        alpha, sigma = (value[:, None] for value in (process.alpha(t), process.sigma(t)))
        return 5 + alpha / (alpha**2 + sigma**2) * (x - 5 * alpha)

    grid = torch.linspace(1e-3, 12, 200_001, dtype=torch.float64)
    weight = (y * (gain * grid).log() - gain * grid - 0.5 * (grid - 5) ** 2).softmax(0)
    mean = float(weight @ grid)
    std = float(weight @ (grid - mean) ** 2) ** 0.5
    problem = inverse.Problem(torch.tensor([float(y)]), lambda x: gain * x, noise="poisson")
    for method in (inverse.SMC, inverse.MMPS):
        x = fastdiff.sample(
            x0, process, 60, sampler="euler_maruyama", grid="fourth_root", shape=(1,), prediction="x0", num_samples=1000,
            guidance=method(problem),
        ).double()  # fmt: skip
        assert abs(float(x.mean()) - mean) < 0.15 * std
        assert float(x.std()) == pytest.approx(std, rel=0.15)


def test_many_counts_stay_finite():
    """Twenty counts, of 24 related numbers: five iterations and as many as there are agree nearly."""
    gaussian, rng = Gaussian((24,), seed=2), np.random.default_rng(3)
    matrix = torch.from_numpy(rng.normal(size=(20, 24))).float() / 24**0.5
    y = torch.from_numpy(rng.poisson((3 * (matrix @ gaussian.draw(1)[0].float()).exp()).numpy())).float()
    problem = inverse.Problem(y, lambda x: 3 * (x @ matrix.to(x).T).exp(), noise="poisson")
    few, exact = (
        fastdiff.sample(
            gaussian.denoiser(fastdiff.VP()), "vp", 20, sampler="unipc", shape=(24,), prediction="x0", num_samples=100,
            guidance=inverse.MMPS(problem, iterations),
        )
        for iterations in (None, 20)
    )  # fmt: skip
    assert ((few.mean(0) - exact.mean(0)).abs() / exact.std(0)).max() < 0.6
    assert few.abs().max() < 1.3 * exact.abs().max()


class Dropping(nn.Module):
    """A network as operator or noise, in training mode, whose flag is kept."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x, y=None):
        return self.drop(x) if y is None else -self.drop((x - y).square()).sum(1)


@pytest.mark.parametrize("part", ["operator", "noise"])
def test_networks_as_operator_or_noise_are_evaluated(part):
    net = Dropping()
    operator, noise = (net, "gaussian") if part == "operator" else (torch.eye(3), net)
    problem = inverse.Problem(torch.ones(3), operator, 0.3 if part == "operator" else None, noise)
    x, same = (
        fastdiff.sample(
            lambda x, t: x.sin(), "vp", 4, shape=(3,), prediction="x0", num_samples=2, guidance=inverse.MMPS(problem)
        )
        for _ in range(2)
    )
    assert torch.equal(x, same)
    assert net.drop.training


def logistic(mean, y):
    return torch.nn.functional.logsigmoid((mean - y) / 0.3).flatten(1).sum(1) + torch.nn.functional.logsigmoid(
        (y - mean) / 0.3
    ).flatten(1).sum(1)


@pytest.mark.parametrize("noise", ["poisson", logistic])
def test_fewer_iterations_find_what_all_do_where_measurements_are_apart(noise):
    """Seventeen numbers N(5, 1), each measured by itself: what the sums of the covariance's rows say is then all."""
    process = fastdiff.VP()

    def x0(x, t):
        alpha, sigma = (value[:, None] for value in (process.alpha(t), process.sigma(t)))
        return 5 + alpha / (alpha**2 + sigma**2) * (x - 5 * alpha)

    problem = inverse.Problem(torch.arange(17.0), torch.eye(17), None, noise)
    few, exact = (
        fastdiff.sample(
            x0, process, 10, sampler="ddim", shape=(17,), prediction="x0", num_samples=5,
            guidance=inverse.MMPS(problem, iterations),
        )
        for iterations in (16, 17)
    )  # fmt: skip
    torch.testing.assert_close(few, exact, atol=5e-3, rtol=5e-3)
    assert exact.mean(0)[-3:].mean() - exact.mean(0)[:3].mean() > 2  # y tells something


@pytest.mark.parametrize("method", METHODS)
def test_bits_do_not_depend_on_the_batch(method):
    """And, but for particles, sample i is a function of the seed and i alone."""
    gaussian, process = Gaussian((1, 4)), fastdiff.VE()
    problem = inverse.Problem(torch.tensor([0.3, -0.2]), torch.randn(2, 4), 0.3)

    def x0(x, t):  # of which no sum over samples has another order in another batch
        alpha, sigma = (value[:, None, None] for value in (process.alpha(t), process.sigma(t)))
        return alpha / (alpha**2 + sigma**2) * x.sin() * gaussian.mean[0].float()

    options = {"shape": (1, 4), "prediction": "x0", "guidance": METHODS[method](problem), "seed": 5}
    whole = fastdiff.sample(x0, process, 8, num_samples=7, **options)
    assert torch.equal(whole, fastdiff.sample(x0, process, 8, num_samples=7, batch_size=3, **options))
    if method != "SMC":
        part = fastdiff.sample(x0, process, 8, num_samples=3, first_sample=4, **options)
        assert torch.equal(whole[4:], part)


@pytest.mark.parametrize("iterations", [None, 2])
@pytest.mark.parametrize("noise", ["gaussian", "poisson", t_density])
def test_bits_of_many_measurements_do_not_depend_on_the_batch(noise, iterations):
    problem = inverse.Problem(torch.arange(16.0), torch.randn(16, 20), 0.3 if noise == "gaussian" else None, noise)
    options = {"shape": (20,), "prediction": "x0", "guidance": inverse.MMPS(problem, iterations), "seed": 5}
    whole, parts = (
        fastdiff.sample(lambda x, t: x.sin(), fastdiff.VE(), 6, num_samples=7, batch_size=size, **options)
        for size in (7, 3)
    )
    assert torch.equal(whole, parts)


@pytest.mark.filterwarnings("ignore:inverse.SMC's particles")  # few, and a network that knows no prior
def test_particles_of_a_y_for_each_sample_go_with_its_number():
    y, matrix = torch.randn(5, 1), torch.eye(4)[:1]
    options = {"sde": "vp", "steps": 8, "shape": (4,), "prediction": "x0", "seed": 5}

    def drawn_from(k):
        method = inverse.SMC(inverse.Problem(y[k:], matrix, 0.1), 16)
        return fastdiff.sample(
            lambda x, t: 0.5 * x.sin(), num_samples=5 - k, first_sample=k, guidance=method, **options
        )

    assert torch.equal(drawn_from(0)[2:], drawn_from(2))


@pytest.mark.parametrize("method", METHODS)
def test_samples_have_no_gradients(method):
    """Whatever y and the operator have."""
    y, matrix = torch.zeros(1, requires_grad=True), torch.ones(1, 4, requires_grad=True)
    guidance = METHODS[method](inverse.Problem(y, matrix, 0.1))
    x = fastdiff.sample(lambda x, t: x.tanh(), "vp", 4, shape=(4,), prediction="x0", num_samples=2, guidance=guidance)
    assert not x.requires_grad


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("method", ["MMPS", "MMPS, one iteration", "TMPD", "diagonal TMPD"])
def test_a_jacobian_that_is_no_covariance_tells_nothing(method, noise):
    """Along numbers whose variance it has negative, also beside others."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    problem = inverse.Problem(torch.tensor([0.3, 0.5]), torch.eye(4)[:2], noise)
    run = functools.partial(
        fastdiff.sample, lambda x, t: 0.5 * signs * x, "vp", 20, sampler="ancestral", shape=(4,), prediction="x0", num_samples=3
    )  # fmt: skip
    free, x = run(), run(guidance=METHODS[method](problem))
    assert x.isfinite().all()
    if method != "MMPS, one iteration":
        torch.testing.assert_close(x[:, 1:], free[:, 1:])
        assert (x[:, 0] - 0.3).abs().max() < 0.1


@pytest.mark.parametrize("method", ["DDRM", "DAPS", "SMC"])
def test_networks_that_know_the_steps_of_a_chain_alone(method):
    """Are asked at those, as the chain's own noise has it, by default too: x̂0 is that of the process times."""
    gaussian, process, asked = Gaussian((3,)), fastdiff.planning.processes.get("ddpm"), []
    matrix = torch.tensor([[1.0, 0.5, -0.3]])
    x0 = gaussian.denoiser(process)

    def counting(x, t):
        asked.append(t.dtype)
        return x0(x, t.double() + 1)

    options = {"num_samples": 2, "seed": 3, "guidance": METHODS[method](inverse.Problem(torch.ones(1), matrix, 0.3))}
    for steps in (None, 50):
        by_index, by_time = (
            fastdiff.sample(
                fastdiff.ScoreModel(net, process, "x0", time_input, (3,)), steps=steps, return_info=True, **options
            )
            for net, time_input in ((counting, "index"), (x0, "t"))
        )
        assert set(asked) == {torch.int64}
        assert by_index[1].rows == (steps or 100)
        assert by_index[1].network_calls == len(asked)
        asked.clear()
        torch.testing.assert_close(by_index[0], by_time[0], rtol=0, atol=0.05 if method == "DAPS" else 1e-4)


# --- operators as they come, and units ---------------------------------------------------------------------------------


class Physics:
    """As deepinv's: A, A_adjoint and a noise model with sigma."""

    class noise_model:
        sigma = torch.tensor(0.3)

    def A(self, x):
        return x[..., ::2]

    def A_adjoint(self, y):
        out = y.new_zeros((*y.shape[:-1], 2 * y.shape[-1]))
        out[..., ::2] = y
        return out


def test_operators_in_all_their_forms_draw_the_same_samples():
    y = torch.tensor([[0.5, -0.2]])
    given = {
        "physics": inverse.Problem(y, Physics()),
        "function": inverse.Problem(y, lambda x: x[..., ::2], 0.3),
        "matrix": inverse.Problem(y[0], torch.eye(4)[::2], 0.3),
        "mask": inverse.Problem(y[0], inverse.Mask(torch.tensor([[True, False, True, False]])), 0.3),
    }
    net, samples = nn.Conv1d(1, 1, 3, padding=1), {}
    for name, problem in given.items():
        samples[name] = fastdiff.sample(
            lambda x, t: net(x), "vp", 10, shape=(1, 4), prediction="eps", num_samples=4, guidance=inverse.MMPS(problem)
        )
    for name in given:
        assert torch.allclose(samples[name], samples["matrix"], atol=1e-4), name


def test_measurements_are_in_the_units_of_the_data():
    """Of a model that standardizes, y is what the operator gives of samples."""
    gaussian, process = Gaussian((3,)), fastdiff.VP()
    mean, std = np.array([10.0, -5.0, 2.0]), np.array([3.0, 0.5, 1.0])
    model = fastdiff.ScoreModel(gaussian.denoiser(process), process, "x0", "t", (3,), standardize=(mean, std))
    wide = torch.from_numpy(std)
    matrix = torch.tensor([[0.2, 1.0, 0.3], [0.0, 1.0, -1.0]], dtype=torch.float64)
    y = matrix @ (torch.from_numpy(mean) + wide * gaussian.draw(1)[0])
    x = fastdiff.sample(
        model,
        steps=100,
        sampler="euler_maruyama",
        num_samples=4000,
        guidance=inverse.MMPS(inverse.Problem(y.float(), matrix.float(), 0.2)),
    )
    posterior, covariance = gaussian.posterior(matrix * wide, y - matrix @ torch.from_numpy(mean), 0.2)
    error, ratios = compared(x, torch.from_numpy(mean) + wide * posterior, wide[:, None] * covariance * wide)
    assert error < 0.1
    assert float(ratios.min()) > 0.88
    assert float(ratios.max()) < 1.12


@pytest.mark.parametrize("offset", [0.0, 7.0])
@pytest.mark.parametrize("method", ["DDRM", "DAPS", "NoisedMeasurement", "ILVR", "MMPS", "DiffPIR"])
def test_exact_data_of_a_standardized_model(method, offset):
    """Whose mean the operator measures too, beside an offset of its own."""
    mean, std = np.array([10.0, -5.0, 2.0]), np.array([3.0, 0.5, 1.0])
    model = fastdiff.ScoreModel(Gaussian((3,)).denoiser(fastdiff.VP()), "vp", "x0", "t", (3,), standardize=(mean, std))
    matrix = torch.tensor([[0.2, 1.0, 0.3], [0.0, 1.0, -1.0]])
    y = matrix @ torch.tensor([12.0, -4.8, 2.5]) + offset
    problem = inverse.Problem(y, lambda x: x @ matrix.T + offset, 0.0)
    options = {"steps": 30, "sampler": "ancestral", "num_samples": 4}
    x = fastdiff.sample(model, guidance=getattr(inverse, method)(problem), **options)
    assert (problem.operator(x) - y).abs().max() < 0.01


# --- what is refused -----------------------------------------------------------------------------------------------------


class WrongAdjoint(Physics):
    def A_adjoint(self, y):
        return 2 * super().A_adjoint(y)


def in_numpy(x):
    return torch.from_numpy(x.numpy()[..., :2])


def drawn(guidance, num_samples=2, steps=4, **options):
    return fastdiff.sample(
        lambda x, t: 0.5 * x, "vp", steps, shape=(1, 4), prediction="x0", num_samples=num_samples, guidance=guidance, **options
    )  # fmt: skip


Y = torch.zeros(1, 2)


class Once(torch.autograd.Function):
    """x², without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_dps_needs_no_second_derivative():
    assert drawn(inverse.DPS(inverse.Problem(Y, lambda x: Once.apply(x)[..., :2], 0.3))).isfinite().all()


REFUSED = [
    (lambda: inverse.Problem(torch.full((2,), math.nan), Physics()), DataError, r"y must be finite, got nan at index \(0,\)"),
    (lambda: inverse.Problem([0.0], Physics()), DTypeError, "y must be a tensor, got list"),
    (lambda: inverse.Problem(Y, 3.0, 0.1), ConfigError, r"operator must be a matrix as a tensor \[m, D\], a function"),
    (lambda: inverse.Problem(Y, np.ones((2, 4)), 0.1), ConfigError, "float64: use torch.as_tensor"),
    (lambda: inverse.Problem(Y, lambda x: x), ConfigError, "noise_std must be given, in the units of y"),
    (lambda: inverse.Problem(Y, Physics(), 0.5), ConfigError, "contradicts the operator's own noise_model.sigma=0.3"),
    (lambda: inverse.Problem(Y, lambda x: x, -1.0), ConfigError, "noise_std must be a number in"),
    (lambda: inverse.Problem(Y, lambda x: x, 0.1, "laplace"), ConfigError, "noise must be 'gaussian', 'poisson' or a function"),
    (lambda: inverse.Problem(Y, lambda x: x, 0.1, "poisson"), ConfigError, "is of Gaussian noise: leave it out"),
    (lambda: inverse.Mask(torch.ones(4)), DTypeError, "mask must be a tensor of bool"),
    (lambda: inverse.Mask(torch.zeros(4, dtype=torch.bool)), ConfigError, "mask must be True somewhere"),
    (lambda: inverse.Grayscale((0.5, 0.1)), ConfigError, "weights must sum to 1"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y, WrongAdjoint(), 0.3))), DataError, "A_adjoint is not the adjoint of A"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y[0], Physics(), 0.3))), ShapeError, r"y must have the shape \(1, 2\)"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(torch.zeros(3, 1, 2), Physics()))), ShapeError, r"or \(2, 1, 2\) for num"),
    (lambda: drawn(inverse.TMPD(inverse.Problem(Y, lambda x: x[..., :2] ** 2, 0.3))), ConfigError, "is for a linear operator"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y, lambda x: x[..., :2] ** 2, 0.0))), ConfigError, "noise_std=0 gives p"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y, lambda x: x[..., :2].detach() ** 2, 0.3))), ConfigError, "has no gradient"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y, lambda x: (x - x.mean(0))[..., :2], 0.3))), DataError, "each sample by"),
    (lambda: inverse.Problem(-Y - 1, lambda x: x, noise="poisson"), DataError, "y must be counts, none below 0"),
    (
        lambda: drawn(inverse.MMPS(inverse.Problem(Y, lambda x: x[..., :2], noise=lambda m, y: m.log().flatten(1).sum(1)))),
        DataError, "noise gives nan of a prediction of noisy samples",
    ),
    (
        lambda: drawn(inverse.MMPS(inverse.Problem(Y, lambda x: (x[..., :2] + 5).log(), 0.3))),
        DataError, "operator gives nan of predictions",
    ),
    (
        lambda: drawn(inverse.MMPS(inverse.Problem(Y[0, 0], lambda x: x.sum((1, 2)), 0.3))),
        ShapeError, "operator must give an axis",
    ),
    (
        lambda: drawn(inverse.MMPS(inverse.Problem(Y, lambda x: x[..., :2], noise=lambda m, y: 0.5))),
        DTypeError, "noise must return a tensor of real numbers",
    ),
    (
        lambda: drawn(inverse.MMPS(inverse.Problem(Y, lambda x: Once.apply(x)[..., :2], 0.3))),
        ConfigError, "operator's gradient fails",
    ),
    (
        lambda: drawn(inverse.SMC(inverse.Problem(Y, lambda x: x[..., :2], noise=lambda m, y: -m.sub_(y).flatten(1).sum(1)))),
        ConfigError, "noise fails on two samples .* do nothing in place",
    ),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y, lambda x: x[0], 0.3))), ShapeError, "operator must be batched"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y, lambda x: x / 0, 0.3))), DataError, "the operator returns must be finite"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y, torch.fft.fft, 0.3))), DTypeError, "complex ones by torch"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y[0], torch.ones(2, 5), 0.3))), ShapeError, "operator has 5 columns"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y, Physics()), 0)), ConfigError, "iterations must be an integer >= 1"),
    (lambda: drawn(inverse.PiGDM(inverse.Problem(Y, Physics()), 0.0)), ConfigError, "data_std must be a number in"),
    (lambda: drawn(inverse.SMC(inverse.Problem(Y, Physics()), 1)), ConfigError, "particles=1 are fewer than num"),
    (lambda: drawn(inverse.SMC(inverse.Problem(Y, Physics())), sampler="ddim"), ConfigError, "needs steps that draw noise"),
    (lambda: drawn(inverse.SMC(inverse.Problem(Y, Physics())), trajectory=3), ConfigError, "trajectory has no place"),
    (
        lambda: drawn(inverse.SMC(inverse.Problem(Y, Physics()), proposal=inverse.MMPS(inverse.Problem(Y, Physics())))),
        ConfigError, "proposal must be a method for the same Problem",
    ),
    (
        lambda: drawn(inverse.SMC(inverse.Problem(Y, lambda x: x[..., :2], noise=lambda mean, y: -(mean - y).abs().sum()))),
        ShapeError, "noise must return a number for each sample",
    ),
    (lambda: inverse.Mask(np.ones(4, dtype=bool)), DTypeError, "mask must be a tensor, got ndarray: use torch.as_tensor"),
    (lambda: inverse.Blur.gaussian(1.0, 1).A(Y), ShapeError, "take a smaller one"),
    *(
        (lambda method=method: drawn(method(torch.ones(2, 4))), ConfigError, r"problem must be an inverse.Problem\(y, operator")
        for method in (inverse.MMPS, inverse.DPS, inverse.DDRM, inverse.SMC)
    ),
    (lambda: inverse.Problem(Y, Physics(), "0.3"), ConfigError, "noise_std must be a number in"),
    (lambda: inverse.Problem(Y, Physics(), torch.tensor([0.3, 0.1])), ConfigError, "noise_std must be a number in"),
    (lambda: inverse.Downsampling(2) @ torch.eye(4), ConfigError, r"A_adjoint\(y\), got Tensor.*: use inverse.Matrix\(values\)"),
    (lambda: abs @ inverse.Downsampling(2), ConfigError, "or one function of x for both"),
    (lambda: inverse.Grayscale().A_adjoint(Y[:, None]), ShapeError, r"from A\(x\): call that first, or give weights"),
    (lambda: drawn(inverse.MMPS(inverse.Problem(Y, in_numpy, 0.3))), ConfigError, "fails on an x that .*: give an object with A"),
    (
        lambda: drawn(inverse.DiffPIR(inverse.Problem(Y, lambda x: x.detach()[..., :2], 0.3))),
        ConfigError, "operator has no gradient .*: give an object with A",
    ),
    (
        lambda: drawn(inverse.DPS(inverse.Problem(Y, lambda x: x.detach()[..., :2] ** 2, 0.3))),
        ConfigError, "operator has no gradient .*inverse.DPS takes it: write it in torch",
    ),
    (lambda: drawn(inverse.SMC(inverse.Problem(Y, lambda x: x[..., :2] ** 2, 0.0))), ConfigError, "give the noise that y has"),
    (lambda: drawn(inverse.DDRM(inverse.Problem(Y, Physics())), steps=None, sampler="rk45"), ConfigError, "or use 'ancestral'"),
    (lambda: drawn("mmps"), ConfigError, "guidance must be an object of fastdiff.guidance or fastdiff.inverse"),
    (lambda: drawn(inverse.Problem(Y, Physics())), ConfigError, "guidance must be an object of fastdiff.guidance"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "said"), REFUSED, ids=[said[:30] for _, _, said in REFUSED])
def test_what_cannot_be_is_refused_in_one_sentence(call, kind, said):
    with pytest.raises(kind, match=said):
        call()


@pytest.mark.parametrize("method", [inverse.MMPS, inverse.PiGDM, inverse.DPS, inverse.SMC])
def test_a_network_without_gradients_is_named(method):
    """Also where x itself has a part in the prediction, so that there is a gradient, of that part alone."""

    def detached(x, t):
        return 0.5 * x.detach()

    for prediction in ("x0", "eps"):
        with pytest.raises(ModelOutputError, match="needs gradients through the model"):
            fastdiff.sample(
                detached, "vp", 4, sampler="ancestral", shape=(1, 4), prediction=prediction, num_samples=2,
                guidance=method(inverse.Problem(Y, Physics())),
            )  # fmt: skip


@pytest.mark.parametrize("method", ["DDRM", "DAPS", "SMC"])
def test_a_run_that_is_not_finite_is_refused(method):
    """Also of methods with steps of their own: the row and the samples are named."""

    def broken(x, t):
        return torch.where((t < 0.5)[:, None, None] & (x[:, :1, :1] == x[1:2, :1, :1]), torch.nan, 0.5 * x)

    run = functools.partial(
        fastdiff.sample, broken, "vp", 9, shape=(1, 4), prediction="x0", num_samples=3, first_sample=5,
        guidance=METHODS[method](inverse.Problem(Y, Physics())),
    )  # fmt: skip
    for check in ("final", "every"):
        with pytest.raises(NonFiniteError, match="not finite") as raised:
            run(check=check)
        assert (raised.value.row > 0) == (method != "DAPS")  # whose first row goes down to the data
        assert raised.value.samples == (() if method == "SMC" else (6,))


@pytest.mark.parametrize("method", [inverse.PiGDM, inverse.DiffPIR, inverse.NoisedMeasurement])
def test_an_operator_that_measures_nothing_changes_nothing(method):
    nothing = inverse.Problem(torch.zeros(1), torch.zeros(1, 4), 0.0)
    assert torch.isfinite(drawn(method(nothing))).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_samples_are_no_samples(method):
    problem = inverse.Problem(Y, Physics())
    assert drawn(METHODS[method](problem), num_samples=0).shape == (0, 1, 4)


def test_a_method_with_steps_of_its_own_stands_alone():
    """In a list of itself too; as one of several it is refused by its name."""
    problem = inverse.Problem(Y, Physics())
    assert torch.equal(drawn([inverse.DDRM(problem)]), drawn(inverse.DDRM(problem)))
    with pytest.raises(ConfigError, match=r"guidance has inverse\.SMC, which has steps of its own, beside others"):
        drawn([inverse.MMPS(problem), inverse.SMC(problem)])
    known = torch.arange(8) < 4
    with pytest.raises(ConfigError, match=r"no place beside inverse\.DAPS, .*: leave it out, or use method='mmps'"):
        fastdiff.inpaint("digits-vp", torch.zeros(1, 8, 8), known, method="daps", guidance=2.0, steps=2)


def test_a_table_for_a_guided_run_tells_process_times():
    model = fastdiff.ScoreModel(lambda x, t: 0.5 * x, "ddpm", "x0", "index", (1, 4))
    guidance = inverse.MMPS(inverse.Problem(Y, Physics()))
    table = fastdiff.plan("ddpm", 10, sampler="ddim", prediction="x0", time_input="index")
    with pytest.raises(ConfigError, match="planned for time_input='index', and the model has 't'"):
        fastdiff.sample(model, table=table, num_samples=2, guidance=guidance)
    table = fastdiff.plan("ddpm", 10, sampler="ddim", prediction="x0", time_input="t")
    one = fastdiff.sample(model, table=table, num_samples=2, guidance=guidance)
    assert torch.equal(one, fastdiff.sample(model, steps=10, sampler="ddim", num_samples=2, guidance=guidance))
