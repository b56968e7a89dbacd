"""Models of latents between an encoder and a decoder: laws and posteriors in closed form, draws, modes, precisions, refusals."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import inverse
from fastdiff.errors import ConfigError, ModelOutputError, ModelOutputTypeError, ShapeError
from fastdiff.execution.noise import ENCODINGS

VP = fastdiff.VP()
WEIGHTS = torch.tensor([[1.0, 0.0], [0.5, 2.0], [-1.0, 1.0]])  # of a linear decoder, x = W z + b
SHIFT = torch.tensor([3.0, -1.0, 0.0])


def linear(**options):
    inverse_weights = torch.linalg.pinv(WEIGHTS)
    return fastdiff.Autoencoder(lambda x: (x - SHIFT) @ inverse_weights.T, lambda z: z @ WEIGHTS.T + SHIFT, **options)


def latent_model():
    """The exact model of z ~ N((1, -2), diag(4, 0.25)), standardized."""
    return fastdiff.ScoreModel(lambda x, t: -x, VP, "score", data_shape=(2,), standardize=((1.0, -2.0), (2.0, 0.5)))


MEAN = WEIGHTS @ torch.tensor([1.0, -2.0]) + SHIFT
COVARIANCE = WEIGHTS @ torch.diag(torch.tensor([4.0, 0.25])) @ WEIGHTS.T


def test_decoded_samples_have_the_law_of_the_data():
    autoencoder, count = linear(), 20_000
    x = autoencoder.decode(fastdiff.sample(latent_model(), sampler="dpmpp_2m", steps=20, num_samples=count))
    assert x.shape == (count, 3)
    error = (COVARIANCE.diag() / count).sqrt()
    assert ((x.mean(0) - MEAN).abs() < 5 * error + 1e-2).all()
    assert (torch.cov(x.T) - COVARIANCE).abs().max() < 5 * COVARIANCE.abs().max() * (2 / count) ** 0.5 + 0.05


def test_a_posterior_given_measurements_of_the_data():
    """y = x_2 + noise, by a guidance that takes the decoder as a part of the operator."""
    autoencoder, noise, y = linear(), 0.5, 1.5
    operator = lambda z: autoencoder.decode(z)[:, 1:2]  # noqa: E731
    problem = inverse.Problem(torch.tensor([y]), operator, noise)
    z = fastdiff.sample(
        latent_model(), sampler="ancestral", steps=200, num_samples=4000, guidance=inverse.MMPS(problem, 3)
    )
    x = autoencoder.decode(z)
    row = COVARIANCE[:, 1]
    mean = MEAN + row * (y - MEAN[1]) / (row[1] + noise**2)
    covariance = COVARIANCE - row[:, None] * row[None] / (row[1] + noise**2)
    std = covariance.diag().sqrt()
    assert ((x.mean(0) - mean) / std).abs().max() < 0.1
    assert (x.std(0) / std - 1).abs().max() < 0.1


def test_reconstruction_and_gradients():
    autoencoder = linear()
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    x = autoencoder.decode(z)
    assert not x.requires_grad
    torch.testing.assert_close(autoencoder(x), x)
    z.requires_grad_()
    (slope,) = torch.autograd.grad(autoencoder.decode(z)[:, 0].sum(), z)
    assert torch.equal(slope, WEIGHTS[0].expand(5, 2))
    with torch.no_grad():
        assert not autoencoder.decode(z).requires_grad


def test_draws_of_a_gaussian_encoder_are_of_their_seed_and_number_alone():
    encoder = lambda x: (2 * x, 0.5 * torch.ones_like(x))  # noqa: E731
    x = torch.linspace(-1, 1, 33 * 6).view(33, 6)
    one = fastdiff.Autoencoder(encoder, lambda z: z, batch_size=64)
    few = fastdiff.Autoencoder(encoder, lambda z: z, batch_size=7)
    assert torch.equal(one.encode(x), 2 * x)
    drawn = one.encode(x, seed=3)
    normals = fastdiff.normal(33, (6,), seed=3, stream=ENCODINGS)
    torch.testing.assert_close(drawn, 2 * x + 0.5 * normals)
    assert torch.equal(few.encode(x, seed=3), drawn)
    assert torch.equal(few.encode(x[20:], seed=3, first_sample=20), drawn[20:])
    assert not torch.equal(few.encode(x, seed=4), drawn)


class Halves(nn.Module):
    """A variational autoencoder with dropout, whose methods are its two halves."""

    def __init__(self):
        super().__init__()
        self.drop, self.inside = nn.Dropout(0.5), nn.Linear(4, 4)

    def encode(self, x):
        return self.drop(self.inside(x))

    def decode(self, z):
        return self.drop(self.inside(z))

    forward = encode


@pytest.mark.parametrize("kind", ["module", "methods", "functions", "partial"])
def test_all_modules_that_are_reached_run_in_evaluation_mode(kind):
    halves = Halves().bfloat16()
    pair = {
        "module": (halves, halves),
        "methods": (halves.encode, halves.decode),
        "functions": (lambda x: halves.encode(x), lambda z: halves.decode(z)),
        "partial": (functools.partial(halves.encode), functools.partial(halves.decode)),
    }[kind]
    autoencoder = fastdiff.Autoencoder(*pair)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.linear(x.bfloat16(), halves.inside.weight, halves.inside.bias).float()
    for out in (autoencoder.encode(x), autoencoder.decode(x)):
        assert out.dtype is torch.float32
        assert torch.equal(out, expected)
    assert halves.training
    assert halves.drop.training


def test_an_encoder_that_is_replaced_runs_in_evaluation_mode_too():
    autoencoder = fastdiff.Autoencoder(Halves(), Halves())
    x = torch.randn(3, 4)
    before = autoencoder.encode(x)
    autoencoder.encoder = Halves()
    assert not torch.equal(autoencoder.encode(x), before)
    assert torch.equal(autoencoder.encode(x), autoencoder.encode(x))


def test_autoencoders_of_diffusers_as_they_are():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    options = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kl, vq = diffusers.AutoencoderKL(**options), diffusers.VQModel(**options)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        gaussian, latents = kl.eval().encode(x).latent_dist, vq.eval().encode(x).latents
        decoded = kl.decode(gaussian.mean).sample, vq.decode(latents).sample
    one, other = (fastdiff.Autoencoder(each.encode, each.decode, batch_size=8) for each in (kl, vq))
    assert torch.equal(one.encode(x), gaussian.mean)
    normals = fastdiff.normal(3, gaussian.mean.shape[1:], seed=0, stream=ENCODINGS)
    torch.testing.assert_close(one.encode(x, seed=0), gaussian.mean + gaussian.std * normals)
    assert torch.equal(one.decode(gaussian.mean), decoded[0])
    assert torch.equal(other.encode(x), latents)
    assert torch.equal(other.decode(latents), decoded[1])


def test_a_training_on_latents():
    autoencoder = linear()
    x = MEAN + torch.randn(512, 2, generator=torch.Generator().manual_seed(0)) @ (WEIGHTS * torch.tensor([2, 0.5])).T
    latents = autoencoder.encode(x)
    model = fastdiff.ScoreModel(fastdiff.networks.MLP((2,)), "vp", "edm", data_shape=(2,))
    fastdiff.train(model, latents, steps=2, batch_size=16, progress=False)
    assert torch.allclose(torch.from_numpy(model.standardize[0]).float(), latents.mean(0), atol=1e-5)
    assert autoencoder.decode(fastdiff.sample(model, steps=3, num_samples=2)).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: fastdiff.Autoencoder(None, abs), ConfigError, "encoder must be callable"),
        (lambda: fastdiff.Autoencoder(abs, 3), ConfigError, "decoder must be callable"),
        (lambda: linear(batch_size=0), ConfigError, "batch_size must be"),
        (lambda: linear().encode(torch.zeros(2, 3), seed=1), ConfigError, "seed=1 is of encoders that return"),
        (lambda: linear().encode(torch.zeros(2, 3), seed=-1), ConfigError, "seed must be"),
        (lambda: linear().encode(torch.zeros(())), ShapeError, "x must be samples"),
        (lambda: linear().decode(torch.full((2, 2), 1)), TypeError, "z must"),
        (lambda: linear().encode(torch.full((2, 3), torch.nan)), ModelOutputError, "those of sample 0 are not"),
        (
            lambda: fastdiff.Autoencoder(lambda x: (x, -x.abs() - 1), abs).encode(torch.ones(2, 3)),
            ModelOutputError,
            "of a log variance std is",
        ),
        (
            lambda: fastdiff.Autoencoder(lambda x: (x, x.abs()), abs).encode(torch.full((2, 3), torch.nan)),
            ModelOutputError,
            "those of sample 0 are not",
        ),
        (lambda: fastdiff.Autoencoder(lambda x: 3, abs).encode(torch.ones(2, 3)), ModelOutputTypeError, "got 3"),
        (
            lambda: fastdiff.Autoencoder(abs, lambda z: z[:1]).decode(torch.ones(2, 3)),
            ModelOutputError,
            "an entry for each of 2 samples",
        ),
    ],
)
def test_refusals(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_no_samples_have_no_latents():
    assert linear().encode(torch.zeros(0, 3)).shape == (0, 2)
