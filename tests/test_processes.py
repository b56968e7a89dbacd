"""Each process is one consistent set of formulas, the same for floats, arrays and tensors."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import processes
from fastdiff.errors import ConfigError

CONTINUOUS = [
    fastdiff.VE(),
    fastdiff.VP(),
    fastdiff.VP(2.0, 2.0),
    fastdiff.SubVP(),
    fastdiff.EDM(),
    fastdiff.OU(),
    fastdiff.RectifiedFlow(),
    fastdiff.OU(rate=0.0, noise=1.0, T=1.0),
    fastdiff.OU(rate=-0.5, noise=0.3, T=2.0),
]
DISCRETE = [fastdiff.DDPM(), fastdiff.DDPM("cosine", T=200), fastdiff.DDPM([0.1, 0.2, 0.4]), fastdiff.NCSN()]


def inside(process):
    return np.linspace(0.02 * process.T if process.t_min < 1 else 1.01, 0.98 * process.T, 23)


@pytest.mark.parametrize("process", CONTINUOUS + DISCRETE, ids=repr)
def test_drift_and_diffusion_are_the_derivatives_of_the_kernel(process):
    t = inside(process)
    if process.discrete:
        t = np.floor(t) + 0.5  # off the corners
        t = t[t < process.T]
    h = 1e-5 * min(process.T, 1.0)
    d_log_alpha = (np.log(process.alpha(t + h)) - np.log(process.alpha(t - h))) / (2 * h)
    d_square = (process.sigma(t + h) ** 2 - process.sigma(t - h) ** 2) / (2 * h)
    np.testing.assert_allclose(process.drift(t), d_log_alpha, rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(
        process.diffusion(t) ** 2, d_square - 2 * process.drift(t) * process.sigma(t) ** 2, rtol=2e-5, atol=1e-9
    )


@pytest.mark.parametrize("process", CONTINUOUS + DISCRETE, ids=repr)
def test_time_inverts_the_noise_ratio(process):
    t = np.append(inside(process), process.T)
    np.testing.assert_allclose(process.time(process.sigma_hat(t)), t, rtol=1e-9)
    np.testing.assert_allclose(process.sigma_hat(t[:-1]), process.sigma(t[:-1]) / process.alpha(t[:-1]), rtol=1e-14)


@pytest.mark.parametrize("process", CONTINUOUS + DISCRETE, ids=repr)
def test_arrays_tensors_and_floats_agree(process):
    t = inside(process)
    for name in ("alpha", "sigma", "drift", "diffusion"):
        array = getattr(process, name)(t)
        tensor = getattr(process, name)(torch.from_numpy(t))
        assert tensor.dtype == torch.float64
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-13)
        assert float(getattr(process, name)(float(t[3]))) == pytest.approx(float(array[3]), rel=1e-14)


@pytest.mark.parametrize("process", DISCRETE, ids=repr)
def test_whole_times_may_be_integers(process):
    t = torch.arange(1, process.T + 1)
    for name in ("alpha", "sigma", "drift", "diffusion"):
        exact = getattr(process, name)(t.double()).expand(len(t))
        assert torch.allclose(getattr(process, name)(t).double().expand(len(t)), exact, rtol=1e-12)
    ratio = process.sigma(t.double()) / process.alpha(t.double())
    assert torch.allclose(process.time(ratio), t.double(), rtol=1e-9)


@pytest.mark.parametrize("process", CONTINUOUS + DISCRETE, ids=repr)
def test_signal_to_noise_falls_and_t_min_is_inside(process):
    t = np.linspace(max(process.t_min, 1e-6 * process.T), process.T, 500)
    assert (np.diff(process.sigma_hat(t)) > 0).all()
    assert 0 <= process.t_min < process.T


@pytest.mark.parametrize("process", CONTINUOUS + DISCRETE, ids=repr)
def test_config_round_trip_and_pickle(process):
    import json

    config = json.loads(json.dumps(process.config()))
    assert processes.from_config(config) == process
    assert pickle.loads(pickle.dumps(process)) == process
    assert hash(processes.from_config(config)) == hash(process)


def test_formulas_of_song_et_al():
    t = np.linspace(0.01, 1, 9)
    ve, vp, sub = fastdiff.VE(), fastdiff.VP(), fastdiff.SubVP()
    np.testing.assert_allclose(ve.sigma(t), 0.01 * 5000**t)
    log_mean = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1  # eq. 33 as the reference writes it
    np.testing.assert_allclose(vp.alpha(t), np.exp(log_mean))
    np.testing.assert_allclose(vp.sigma(t), np.sqrt(1 - np.exp(2 * log_mean)))
    np.testing.assert_allclose(sub.sigma(t), 1 - np.exp(2 * log_mean))  # no square root
    assert (ve.prior_std, vp.prior_std, sub.prior_std) == (50.0, 1.0, 1.0)
    assert (ve.t_min, vp.t_min, sub.t_min) == (1e-5, 1e-3, 1e-3)


def test_vp_keeps_its_digits_near_zero():
    t = 1e-12
    assert fastdiff.VP().sigma(t) == pytest.approx(math.sqrt(0.1 * t), rel=1e-9)
    assert fastdiff.SubVP().sigma(t) == pytest.approx(0.1 * t, rel=1e-9)


def test_ddpm_is_its_products():
    betas = np.array([0.1, 0.2, 0.4])
    process = fastdiff.DDPM(betas)
    alpha_bar = np.cumprod(1 - betas)
    t = np.arange(1.0, 4)
    np.testing.assert_allclose(process.alpha(t) ** 2, alpha_bar)
    np.testing.assert_allclose(process.sigma(t) ** 2, 1 - alpha_bar)
    assert (float(process.alpha(0.0)), float(process.sigma(0.0)), process.T) == (1.0, 0.0, 3)


def test_ou_is_its_closed_form():
    process, t = fastdiff.OU(rate=0.7, noise=1.3, T=4.0), 1.7
    assert process.alpha(t) == pytest.approx(math.exp(-0.7 * t))
    assert process.sigma(t) ** 2 == pytest.approx(1.3**2 * (1 - math.exp(-2 * 0.7 * t)) / 1.4)


def test_ncsn_stands_on_its_ladder():
    process = fastdiff.NCSN([5.0, 1.0, 0.1])
    np.testing.assert_allclose(process.sigma(np.array([1.0, 2.0, 3.0])), [0.1, 1.0, 5.0])
    assert process.prior_std == 5.0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: fastdiff.VE(1.0, 1.0), "sigma_min"),
        (lambda: fastdiff.VE(50, 0.01), "sigma_min"),
        (lambda: fastdiff.VE(0.0, 1.0), "sigma_min"),
        (lambda: fastdiff.VE(-1.0, 1.0), "sigma_min"),
        (lambda: fastdiff.VE(math.nan, 1.0), "sigma_min"),
        (lambda: fastdiff.VE(0.1, math.inf), "sigma_max"),
        (lambda: fastdiff.VE(0.1, 1e30), "float32"),
        (lambda: fastdiff.VE(True, 2.0), "sigma_min"),
        (lambda: fastdiff.VE("0.1", 2.0), "sigma_min"),
        (lambda: fastdiff.VP(20, 0.1), "beta_min"),
        (lambda: fastdiff.VP(-1, 2), "beta_min"),
        (lambda: fastdiff.VP(0, 0), "beta_max"),
        (lambda: fastdiff.DDPM([1.0, 0.1]), r"betas\[0\] = 1"),
        (lambda: fastdiff.DDPM([0.1, 0.0]), r"betas\[1\] = 0"),
        (lambda: fastdiff.DDPM([0.1], T=7), "T must be"),
        (lambda: fastdiff.DDPM("linear", T=10), "larger T"),
        (lambda: fastdiff.DDPM("linear", T=0), "T must be"),
        (lambda: fastdiff.DDPM("linear", T=10.0), "T must be"),
        (lambda: fastdiff.DDPM("linaer"), "did you mean 'linear'"),
        *((lambda v=v: fastdiff.DDPM(v), "betas must be a list of numbers") for v in (3, None, 0.02, ["a"], [[0.1]])),
        *((lambda v=v: fastdiff.NCSN(v), "sigmas must be a list of numbers") for v in (1.0, None, "abc")),
        (lambda: processes.get(fastdiff.VP), r"write VP\(\)"),
        (lambda: fastdiff.NCSN([1.0]), "two levels"),
        (lambda: fastdiff.NCSN([1.0, 2.0]), "decreasing"),
        (lambda: fastdiff.NCSN([1.0, 1.0]), "decreasing"),
        (lambda: fastdiff.NCSN([1.0, 0.0]), r"sigmas\[1\]"),
        (lambda: fastdiff.EDM(sigma_data=0), "sigma_data"),
        (lambda: fastdiff.OU(noise=0), "noise"),
        (lambda: fastdiff.OU(T=-1), "T must"),
        (lambda: fastdiff.VP(beta_mn=1), "beta_mn"),
        (lambda: processes.get("vpp"), "did you mean 'vp'"),
        (lambda: processes.get(3), "sde must be one of"),
    ],
)
def test_bad_processes_are_refused(make, match):
    with pytest.raises((ConfigError, TypeError), match=match):
        make()


def bare(process):
    """The same α and σ, and nothing else."""

    class Bare(processes.Process):
        T, t_min = float(process.T), process.t_min
        prior_std = process.prior_std  # of VP 1, as published, and not σ(T)

        def alpha(self, t):
            return process.alpha(t)

        def sigma(self, t):
            return process.sigma(t)

    return Bare()


@pytest.mark.parametrize("process", CONTINUOUS, ids=repr)
@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_what_a_process_has_no_formula_for_is_found_by_numbers(process, kind):
    top = process.T if process.alpha(process.T) > 0 else 0.99 * process.T  # there a drift is infinite
    t = np.concatenate([[1e-5 * process.T, top], inside(process)])
    ratio = process.sigma(t) / process.alpha(t)
    for name, given, tolerance in (("drift", t, 1e-7), ("diffusion", t, 1e-7), ("time", ratio, 1e-9)):
        found, wanted = np.asarray(getattr(bare(process), name)(kind(given))), getattr(process, name)(given)
        np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)  # at T, from one side
        np.testing.assert_allclose(np.delete(found, 1), np.delete(wanted, 1), rtol=tolerance, atol=1e-5)
    assert top < process.T or bare(process).time(np.array([2 * ratio[1]])) > process.T
    narrow = bare(process).time(torch.tensor([float(ratio[5])]))
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize(
    ("sampler", "grid"),
    [
        (sampler, grid)
        for sampler in fastdiff.samplers.SAMPLERS
        for grid in (None, "uniform", "karras")
        if grid is None or sampler not in ("rk45", "adaptive_sde")  # which take no grid
    ],
)
def test_every_sampler_runs_on_alpha_and_sigma_alone(sampler, grid):
    options = {"shape": (2,), "num_samples": 2, "dtype": torch.float64, "sampler": sampler}
    if sampler not in ("rk45", "adaptive_sde"):
        # the grid that a process of one's own has by default: VP's is another
        default = fastdiff.samplers.SAMPLERS[sampler]().default_grid(bare(fastdiff.VP()), 10, 1e-3)
        options |= {"steps": 10, "grid": default if grid is None else grid}
    score = lambda x, t: -x  # noqa: E731
    refused = {"euler_maruyama": "process time", "annealed_langevin": "sigma = 0", "ula": "sigma = 0"}
    if grid == "karras" and sampler in refused:
        with pytest.raises(ConfigError, match=refused[sampler]):
            fastdiff.sample(score, bare(fastdiff.VP()), **options)
        return
    wanted = fastdiff.sample(score, fastdiff.VP(), **options)
    found = fastdiff.sample(score, bare(fastdiff.VP()), **options)
    assert found.isfinite().all()
    if sampler != "adaptive_sde":  # a last bit decides otherwise on a step
        assert (found - wanted).abs().max() < 1e-5 * (1 + wanted.abs().max())


def test_names_of_fastdiffs_own_are_not_given_twice():
    class Mild(fastdiff.VP):
        def beta(self, t):
            return 0.5 * super().beta(t)

    assert Mild().name == Mild().config()["name"] == "mild"
    for make in (
        lambda: type("vE", (processes.Process,), {}),
        lambda: type("Mine", (fastdiff.VP,), {"name": "vp"}),
    ):
        with pytest.raises(ConfigError, match="must have a name of its own"):
            make()


class Rungs(processes.Process):
    """The ladder σ = 2^{t−6}, t = 1 … 5, which overrides whatever a process may."""

    T, t_min, first_time, discrete, ladder = 5, 1.0, 1.0, True, True
    default_sampler, sigma_data = "annealed_langevin", 0.25

    def alpha(self, t):
        return 0.0 * t + 1.0

    def sigma(self, t):
        return 2.0 ** (t - 6.0)

    def index(self, t):
        return 10 * t

    def training_times(self, u):
        return 0.0 * u + 3.0

    def reference_transitions(self, t):
        return 0.0 * t + 0.5, 0.0 * t + 0.25, 0.0 * t + 0.125


def test_a_users_process_gives_its_own_times_and_defaults():
    process = Rungs()
    table = fastdiff.plan(process, denoise=False)
    assert [(row.label, row.level.t) for row in table.rows[::200]] == [
        ("langevin", t) for t in (5.0, 4.0, 3.0, 2.0, 1.0)
    ]
    assert len(table) == 1000
    chain = fastdiff.plan(process, 4, sampler="ddim", prediction="eps", time_input="index")
    assert [row.network_time for row in chain.rows] == [50.0, 40.0, 30.0, 20.0]
    before_the_smallest = fastdiff.predictions.coordinates("prev_mean", process, np.array([2.0, 1.0]), 1.0, 1.0)
    np.testing.assert_array_equal(before_the_smallest[1], [process.sigma(1.0) ** 2, 0.0])
    for options, match in (
        ({"grid": [5.0, 0.5]}, r"\[1, 5\]"),
        ({"steps": 5, "t_min": 0.5}, "smallest level of 'rungs'"),
    ):
        with pytest.raises(ConfigError, match=match):
            fastdiff.plan(process, sampler="ddim", **options)
    assert process.training_times(torch.rand(3)).tolist() == [3.0] * 3
    reference = fastdiff.plan(process, 4, sampler="reverse_diffusion", grid="score_sde", denoise=False)
    assert {(row.a, row.c) for row in reference.rows} == {(1.5, 0.5)}
    edm = fastdiff.plan(process, 4, sampler="ddim", prediction="edm")
    assert edm.rows[0].in_scale == pytest.approx(1 / math.hypot(process.sigma(5.0), 0.25))


@pytest.mark.parametrize("base", [c for c in processes.PROCESSES.values()], ids=lambda c: c.name)
def test_a_subclass_inherits_all_but_the_references_grid(base):
    mine = dataclasses.dataclass(frozen=True)(type("Mine", (base,), {}))()
    theirs = base()
    for name in (
        "T",
        "t_min",
        "t_train",
        "t_noisy",
        "t_likelihood",
        "prior_std",
        "default_sampler",
        "discrete",
        "ladder",
    ):
        assert getattr(mine, name) == getattr(theirs, name), name
    u = torch.linspace(0, 0.99, 7)
    assert torch.equal(mine.training_times(u), theirs.training_times(u))
    t = np.array([mine.t_start, 0.5 * (mine.T + mine.t_noisy)])
    if base is fastdiff.SubVP or base.__name__ not in ("VE", "VP"):
        np.testing.assert_array_equal(mine.reference_transitions(t), theirs.reference_transitions(t))
    ratio, variance, ancestral = mine.reference_transitions(t)
    np.testing.assert_array_equal(ratio, 1 + mine.drift(t) * mine.T / 2)
    np.testing.assert_array_equal(variance, mine.diffusion(t) ** 2 * mine.T / 2)
    assert np.isnan(ancestral).all()


def test_the_prior_is_the_level_at_T():
    """Of Song's tutorial process σ(1) = 9.845; of VP and its like 1, as published."""

    class Tutorial(processes.Process):
        T = 1.0

        def alpha(self, t):
            return processes.lib(t).ones_like(t)

        def sigma(self, t):
            return processes.lib(t).sqrt((25.0 ** (2 * t) - 1) / (2 * math.log(25.0)))

    process = Tutorial()
    assert process.prior_std == pytest.approx(9.845, abs=1e-3)
    assert (fastdiff.VP().prior_std, fastdiff.SubVP().prior_std, fastdiff.DDPM().prior_std) == (1.0, 1.0, 1.0)
    std = 0.3
    score = lambda x, t: -x / (std**2 + process.sigma(t)[:, None] ** 2)  # noqa: E731
    x = fastdiff.sample(score, process, sampler="ddim", steps=200, shape=(4,), num_samples=4000)
    wanted = process.sigma(1.0)
    levels = fastdiff.plan(process, 200, sampler="ddim").rows
    noise = [row.level.sigma for row in levels] + [float(process.sigma(process.t_min))]
    for high, low in itertools.pairwise(noise):  # DDIM, x' = x + (σ' − σ) ε, with ε = σ x/(s² + σ²) of N(0, s²) data
        wanted *= 1 + (low - high) * high / (std**2 + high**2)
    assert abs(float(x.std()) / wanted - 1) < 4 / math.sqrt(2 * 16_000)  # standard errors of 16,000 numbers
    data = std * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    ll = fastdiff.log_likelihood(score, data, process, trace="exact", rtol=1e-6, atol=1e-6, t_min=1e-3)

    def log_prob(deviation, of):
        return torch.distributions.Normal(0.0, float(deviation)).log_prob(of.double()).sum(1)

    exact = log_prob(math.hypot(std, process.sigma(1e-3)), data)
    # the prior leaves out the data's own variance
    exact += log_prob(process.sigma(1.0), ll.latent) - log_prob(math.hypot(std, process.sigma(1.0)), ll.latent)
    assert float((ll.nats - exact).abs().max()) < 1e-4  # of tolerances of 1e-6


def test_a_users_default_sampler_may_be_an_object():
    class Halfway(fastdiff.VP):
        default_sampler = fastdiff.samplers.DDIM(eta=0.5)

    assert "DDIM(eta=0.5" in fastdiff.plan(Halfway(), 3).title
    with pytest.raises(ConfigError, match="score_sde"):  # β may be another than VP's: Euler's steps
        fastdiff.plan(Halfway(), 30, sampler="ancestral", grid="score_sde")


def test_a_users_chain_is_on_the_path_of_its_process():
    class Coarse(processes.Process):
        T, t_min, discrete = 50, 0.0, True

        def alpha(self, t):
            return fastdiff.VP().alpha(t / self.T)

        def sigma(self, t):
            return fastdiff.VP().sigma(t / self.T)

    score = lambda x, t: -x / (1 + t[:, None])  # noqa: E731
    model = fastdiff.ScoreModel(score, "vp", "score", data_shape=(2,))
    x, info = fastdiff.sample(model, Coarse(), sampler="ddim", num_samples=2, return_info=True)
    assert len(info.table) == 50
    np.testing.assert_allclose([row.network_time for row in info.table.rows], np.arange(50, 0, -1) / 50, rtol=1e-9)
    assert x.isfinite().all()


@pytest.mark.parametrize("process", [fastdiff.OU(noise=1e30), fastdiff.OU(rate=-20.0), fastdiff.OU(rate=-1.0, T=60.0)])
def test_levels_whose_square_float32_cannot_hold_are_refused(process):
    def never(x, t):
        pytest.fail("the network was called")

    x = torch.zeros(2, 3)
    for call in (
        lambda: fastdiff.sample(never, process, 5, shape=(3,)),
        lambda: fastdiff.sample(never, process, sampler="rk45", shape=(3,)),
        lambda: fastdiff.log_likelihood(never, x, process),
        lambda: fastdiff.plan(process, 5),
        lambda: fastdiff.ScoreModel(never, process, data_shape=(3,)),
    ):
        with pytest.raises(ConfigError, match="float32 holds its square"):
            call()


@pytest.mark.parametrize(
    ("alpha", "sigma", "said"),
    [
        (lambda t: 0.1 * (1 - t), lambda t: 5.0 * t, "alpha must be 1 next to the data, got 0.1"),
        (lambda t: 2.0 - t, lambda t: 3.0 * t, "alpha must be 1 next to the data, got 2"),
        (lambda t: 1.0 * t, lambda t: 1.0 - t, "sigma/alpha must grow with t"),
        (lambda t: 1.0 + 0.0 * t, lambda t: 1.0 + 0.0 * t, "sigma/alpha must grow with t"),
    ],
)
def test_a_process_begins_with_the_data(alpha, sigma, said):
    """Where α(0) is not 1 a run would end with α(0) x_0, and where t = 1 is the data it would begin with them."""

    class Own(processes.Process):
        T = 1.0

    Own.alpha, Own.sigma = lambda self, t: alpha(t), lambda self, t: sigma(t)
    for call in (
        lambda: fastdiff.ScoreModel(lambda x, t: x, Own(), "eps", data_shape=(2,)),
        lambda: fastdiff.sample(lambda x, t: x, Own(), 5, prediction="eps", shape=(2,)),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
