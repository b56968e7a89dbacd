"""MALA and HMC keep their target, and agree with the algorithms as printed, transition by transition."""

from __future__ import annotations

import math

import pytest
import torch

import fastdiff
from fastdiff import mcmc
from fastdiff.errors import ConfigError, DTypeError, ModelOutputError, NonFiniteError, ShapeError
from fastdiff.execution import noise
from fastdiff.papers import score_based as papers


class Banana:
    """A curved density in two dimensions, colder for smaller t."""

    def energy(self, x, t):
        return (0.5 * x[:, 0] ** 2 + 0.5 * (x[:, 1] - 0.7 * x[:, 0] ** 2 + 1) ** 2) / t


def start(n, dtype=torch.float64):
    return fastdiff.normal(n, (2,), seed=9).to(dtype)


def test_mala_is_the_printed_algorithm():
    x = start(50)
    ours = mcmc.mala(Banana(), x, 1.0, steps=3, step_size=0.2, seed=4)
    theirs, accepted = x, torch.zeros(50)
    for k in range(3):
        z = noise.normal(50, (2,), seed=4, draw=k, stream=noise.SAMPLER).double()
        u = noise.uniform(50, (1,), seed=4, draw=k, stream=noise.ACCEPTANCE)[:, 0].double()
        theirs, yes, _ = papers.mala(lambda v: Banana().energy(v, 1.0), theirs, 0.2, z, u)
        accepted += yes
    assert (ours.x - theirs).abs().max() < 1e-12
    assert torch.equal((ours.acceptance * 3).round().float(), accepted)
    assert 0 < accepted.sum() < 150


def test_hmc_is_the_printed_algorithm():
    x = start(50)
    ours = mcmc.hmc(Banana(), x, 1.0, steps=2, step_size=0.4, leapfrogs=5, seed=4)
    theirs = x
    for k in range(2):
        z = noise.normal(50, (2,), seed=4, draw=k, stream=noise.SAMPLER).double()
        u = noise.uniform(50, (1,), seed=4, draw=k, stream=noise.ACCEPTANCE)[:, 0].double()
        theirs, _, _ = papers.hmc(lambda v: Banana().energy(v, 1.0), theirs, 0.4, 5, z, u)
    assert (ours.x - theirs).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("kernel", "options"),
    [(mcmc.mala, {"step_size": 0.35}), (mcmc.hmc, {"step_size": 0.5, "leapfrogs": 4})],
)
def test_the_target_is_kept(kernel, options):
    """x0 and x1 − 0.7 x0² + 1 are independent N(0, 1) under the banana at t = 1: exact draws must stay exact."""
    n = 20_000
    x = start(n)
    x[:, 1] += 0.7 * x[:, 0] ** 2 - 1
    end = kernel(Banana(), x, 1.0, steps=12, seed=1, **options)
    assert 0.3 < end.acceptance.mean() < 0.99
    for value in (end.x[:, 0], end.x[:, 1] - 0.7 * end.x[:, 0] ** 2 + 1):
        assert abs(value.mean()) < 5 / math.sqrt(n)
        assert abs(value.var() - 1) < 5 * math.sqrt(2 / n)


def test_the_step_size_bias_of_ula_is_gone():
    """On N(0, 1) ULA with δ ends at variance 1/(1 − δ/2); MALA at 1."""
    delta, n = 0.5, 20_000
    x = fastdiff.normal(n, (1,), seed=2)
    ula = fastdiff.sample(
        lambda x, t: -x, fastdiff.OU(), 30, sampler=fastdiff.samplers.ULA(delta), shape=(1,), num_samples=n, x_init=x
    )

    class Normal:
        def energy(self, x, t):
            return 0.5 * (x**2).sum(1)

    exact = mcmc.mala(Normal(), x, 0.0, steps=30, step_size=delta)
    biased = 1 / (1 - delta / 2)
    assert abs(ula.var() - biased) < 5 * biased * math.sqrt(2 / n)
    assert abs(exact.x.var() - 1) < 5 * math.sqrt(2 / n)


def test_batch_split_times_and_grad_modes():
    x = start(6, torch.float32)
    t = torch.linspace(0.5, 2.0, 6)
    whole = mcmc.mala(Banana(), x, t, steps=4, step_size=0.2)
    for i in range(6):
        with torch.inference_mode():
            one = mcmc.mala(
                Banana(), x[i : i + 1].clone(), t[i : i + 1].clone(), steps=4, step_size=0.2, first_sample=i
            )
        assert torch.equal(one.x, whole.x[i : i + 1])
    assert whole.x.dtype == torch.float32


def test_a_divergent_trajectory_is_rejected():
    class Steep:
        def energy(self, x, t):
            return (x**4).sum(1)

    x = torch.full((3, 1), 3.0)
    end = mcmc.hmc(Steep(), x, 0.0, steps=2, step_size=1.0, leapfrogs=20)
    assert torch.equal(end.x, x)
    assert (end.acceptance == 0).all()


def test_an_infinite_wall_is_never_crossed():
    class Wall:
        def energy(self, x, t):
            return torch.where(x[:, 0].abs() < 1, 0.5 * x[:, 0] ** 2, torch.inf)

    end = mcmc.mala(Wall(), torch.zeros(200, 1), 0.0, steps=50, step_size=0.5)
    assert end.x.abs().max() < 1
    assert end.acceptance.min() > 0


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"step_size": 0.0}, ConfigError, "step_size"),
        ({"step_size": math.nan}, ConfigError, "step_size"),
        ({"steps": 0}, ConfigError, "steps"),
        ({"leapfrogs": 0}, ConfigError, "leapfrogs"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"x": torch.zeros(2, 2, dtype=torch.int64)}, DTypeError, "x must be floating"),
        ({"model": object()}, ConfigError, "energy"),
        ({"t": math.nan}, ShapeError, "t must be"),
        ({"t": torch.ones(3)}, ShapeError, "t must be"),
        ({"x": torch.tensor(0.0)}, ShapeError, "x must be"),
    ],
)
def test_bad_arguments_are_refused(change, error, match):
    options = {"model": Banana(), "x": torch.zeros(2, 2), "t": 1.0, "steps": 1, "step_size": 0.1, **change}
    with pytest.raises(error, match=match):
        mcmc.hmc(options.pop("model"), options.pop("x"), options.pop("t"), **options)


def test_bad_energies_are_refused():
    class Summed:
        def energy(self, x, t):
            return (x**2).sum()

    class Broken:
        def energy(self, x, t):
            return (x**2).sum(1) * torch.nan

    with pytest.raises(ModelOutputError, match="one number a sample"):
        mcmc.mala(Summed(), torch.zeros(2, 2), 1.0, steps=1, step_size=0.1)
    with pytest.raises(NonFiniteError, match="NaN"):
        mcmc.mala(Broken(), torch.zeros(2, 2), 1.0, steps=1, step_size=0.1)
