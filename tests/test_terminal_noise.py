"""Processes of next to no data at T: α(T) = 0, α(T) = 6e-17 by rounding, a huge σ/α, betas of zero terminal SNR."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import processes, samplers
from fastdiff.errors import ConfigError

VARIANCE = 0.25


class Cosine(processes.Process):
    T, t_min = 1.0, 1e-5

    def alpha(self, t):
        return processes.lib(t).cos(t * (math.pi / 2))

    def sigma(self, t):
        return processes.lib(t).sin(t * (math.pi / 2))


class Straight(processes.Process):
    T, t_min = 1.0, 1e-5

    def alpha(self, t):
        return 1.0 - t

    def sigma(self, t):
        return 1.0 * t


def zero_terminal_snr():
    """Lin et al. 2023, Alg. 1, on the linear schedule."""
    root = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    square = root**2
    return fastdiff.DDPM(tuple((1 - square / np.append(1.0, square[:-1])).tolist()))


def exact(process, prediction):
    """A network of N(0, VARIANCE) data's own prediction."""

    def network(x, t):
        t, double = t.double(), x.double()
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        marginal = VARIANCE * alpha**2 + sigma**2
        x0, eps = VARIANCE * alpha * double / marginal, sigma * double / marginal
        outputs = {
            "score": -double / marginal,
            "scaled_score": -eps,
            "eps": eps,
            "x0": x0,
            "v": alpha * eps - sigma * x0,
        }
        if prediction == "velocity":
            rate, noise_rate = (rate[:, None] for rate in process.rates(t))
            outputs["velocity"] = rate * x0 + noise_rate * eps
        return outputs[prediction].to(x.dtype)

    return network


# their own error at 100 steps is some 5 % of the deviation; the others solve an ODE
OF_THE_SDE = {"ancestral", "euler_maruyama", "reverse_diffusion", "pc", "euler_ancestral",
              "dpm_2_ancestral", "dpmpp_2s_ancestral", "adaptive_sde"}  # fmt: skip


@pytest.mark.parametrize(
    ("process", "prediction"),
    [
        (Cosine(), "score"),
        (Cosine(), "x0"),
        (Straight(), "velocity"),
        (Straight(), "v"),
        (fastdiff.VP(0.1, 200.0), "eps"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_sampler_starts_where_float32_can(process, prediction):
    """But for Langevin dynamics alone, which needs more than 100 steps to settle."""
    network = exact(process, prediction)
    for sampler in set(samplers.SAMPLERS) - {"ula", "annealed_langevin"}:
        steps = {} if sampler in ("rk45", "adaptive_sde") else {"steps": 100}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x = fastdiff.sample(
                network, process, sampler=sampler, shape=(3,), num_samples=1500, prediction=prediction, **steps
            )
        # 4500 numbers know their deviation to 1 %
        assert abs(float(x.std()) - 0.5) < (0.09 if sampler in OF_THE_SDE else 0.02), sampler


def test_likelihoods_and_latents_end_where_float32_can():
    x = torch.tensor([[0.3, -0.4], [1.0, 0.1]])
    wanted = -0.5 * (x.double() ** 2 / VARIANCE + math.log(2 * math.pi * VARIANCE)).sum(1)
    for process in (Cosine(), Straight()):
        network = exact(process, "v")
        options = {"prediction": "v", "rtol": 1e-6, "atol": 1e-6}
        nats = fastdiff.log_likelihood(network, x, process, **options).nats
        assert (nats - wanted).abs().max() < 1e-3
        latent = fastdiff.encode(network, x, process, **options)
        assert (latent - 2 * x).abs().max() < 1e-3  # of N(0, 0.25) to N(0, 1)
        assert (fastdiff.decode(network, latent, process, **options) - x).abs().max() < 1e-4


def test_chains_of_zero_terminal_snr_step_as_with_alpha_0():
    """DDIM from T, where x0 = −v and ε = x, on any whole step s: x_s = −α_s v + σ_s x."""
    chain = zero_terminal_snr()
    assert chain.beta_table[-1] == 1
    x, v = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    for s in (999.0, 500.0, 1.0):
        options = {"grid": [1000.0, s], "sampler": "ddim", "shape": (3,), "num_samples": 4, "x_init": x}
        alpha, sigma = float(chain.alpha(s)), float(chain.sigma(s))
        found = fastdiff.sample(lambda x, t: v, chain, prediction="v", **options)
        assert (found - (sigma * x - alpha * v)).abs().max() < 1e-6
        found = fastdiff.sample(lambda x, t: v, chain, prediction="x0", **options)
        assert (found - (sigma * x + alpha * v)).abs().max() < 1e-6
    for sampler in ("ddim", "ancestral", "dpmpp_2m", "unipc", "heun"):
        x = fastdiff.sample(
            exact(chain, "v"), chain, 100, sampler=sampler, prediction="v", time_input="t", shape=(3,), num_samples=1500
        )
        assert abs(float(x.std()) - 0.5) < (0.09 if sampler in OF_THE_SDE else 0.02), sampler


@pytest.mark.parametrize("prediction", ["eps", "score", "scaled_score"])
def test_noise_says_nothing_of_the_data_where_there_is_none(prediction):
    chain = zero_terminal_snr()

    def never(x, t):
        raise AssertionError("asked")

    options = {"prediction": prediction, "shape": (3,), "num_samples": 2}
    for sampler in ("ddim", "ancestral", "dpmpp_2m", "rk45"):
        with pytest.raises(ConfigError, match=r"says nothing of the data at t = 1000.*'v' or 'x0'"):
            fastdiff.sample(never, chain, sampler=sampler, **options)
    with pytest.raises(ConfigError, match="says nothing of the data"):
        fastdiff.log_likelihood(never, torch.zeros(2, 3), chain, prediction=prediction)
    # the way out
    x = fastdiff.sample(
        exact(chain, prediction), chain, grid=fastdiff.grids.indices(range(989, -1, -10)), sampler="ddim", **options
    )
    assert x.isfinite().all()
    with pytest.raises(ConfigError, match=r"alpha\(1\) = 0 .*start at t <= 0.9999"):
        fastdiff.sample(never, Straight(), grid=[1.0, 0.5], sampler="ddim", **options)
    start = Straight().t_start
    fastdiff.sample(exact(Straight(), prediction), Straight(), grid=[start, 0.5], sampler="ddim", **options)


@pytest.mark.parametrize(
    ("process", "said"),
    [
        (fastdiff.OU(T=0.1), r"prior of 'ou' does not cover data as large as 1, .* is 0\.47"),
        (fastdiff.VE(0.5, 50.0), "lowest noise of 've', .*0.5, is above"),
        (fastdiff.OU(), None),
        (fastdiff.VE(), None),
    ],
)
@pytest.mark.filterwarnings("ignore:the samples run from")
def test_data_that_the_process_does_not_cover_are_said(process, said):
    """σ/α at the start against the largest number, at the end against the deviation: in runs, trainings and likelihoods."""
    model = fastdiff.ScoreModel(Timed(torch.nn.Linear(2, 2)), process, "eps", data_shape=(2,), data_range=(-1, 1))
    spread = 1.0 if process.name == "ou" else 0.1
    data = fastdiff.Data(torch.linspace(-spread, spread, 64).view(32, 2), range=(-1, 1))
    x = torch.tensor([[-1.0, 1.0]])
    for call in (
        lambda: fastdiff.sample(model, steps=3, num_samples=2),
        lambda: fastdiff.log_likelihood(model, x, rtol=0.1, atol=0.1),
        lambda: fastdiff.encode(model, x, rtol=0.1, atol=0.1),
        lambda: fastdiff.train(model, data, steps=1, batch_size=2),
    ):
        if said is None:
            call()
        else:
            with pytest.warns(UserWarning, match=said) as caught:
                call()
            assert caught[0].filename == __file__


class Timed(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x)


def test_processes_that_cover_the_data_start_at_T():
    for process in (
        fastdiff.VP(),
        fastdiff.VE(0.01, 1e6),
        fastdiff.SubVP(),
        fastdiff.EDM(),
        fastdiff.OU(),
        fastdiff.DDPM(),
    ):
        assert process.t_start == process.T
