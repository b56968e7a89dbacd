"""How a chain's network is told the time, and the steps of a chain as other libraries count them."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import grids
from fastdiff.errors import ConfigError
from fastdiff.networks import MLP

F64 = torch.float64


class Recorder(torch.nn.Module):
    """A foreign ε network: a function of x and of ᾱ looked up by the label; keeps the labels it met."""

    def __init__(self, chain):
        super().__init__()
        self.alpha_bar = torch.cumprod(1 - torch.from_numpy(chain.beta_table), 0)
        self.labels = []

    def forward(self, x, t):
        self.labels.append(t.clone())
        bar = self.alpha_bar[t][:, None]  # which no float can index
        return (1 - bar).sqrt() * torch.sin(x) + 0.1 * x


def published_ddim(net, x, timesteps):
    """DDIM as diffusers runs it, over 0-based timesteps; ᾱ = 1 after the last."""
    for now, after in zip(timesteps, [*timesteps[1:], None]):
        bar, bar_after = net.alpha_bar[now], torch.tensor(1.0) if after is None else net.alpha_bar[after]
        eps = net(x, torch.full((len(x),), now))
        x0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
        x = bar_after.sqrt() * x0 + (1 - bar_after).sqrt() * eps
    return x


CHAIN = fastdiff.DDPM("linear", T=1000)
START = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4)))


@pytest.mark.parametrize(
    ("grid", "steps", "timesteps"),
    [
        (None, 1000, list(range(999, -1, -1))),
        ("leading", 50, list(range(980, -1, -20))),
        ("trailing", 50, list(range(999, 18, -20))),
        ("linspace", 4, [999, 666, 333, 0]),
        ("ddim50", None, list(range(980, -1, -20))),
        (grids.indices(range(981, 0, -20)), None, list(range(981, 0, -20))),
        (grids.indices(torch.arange(980, -1, -20)), 50, list(range(980, -1, -20))),
    ],
)
def test_a_chain_calls_a_foreign_network_by_its_timesteps(grid, steps, timesteps):
    ours, theirs = Recorder(CHAIN), Recorder(CHAIN)
    x = fastdiff.sample(
        ours, CHAIN, steps, sampler="ddim", prediction="eps", grid=grid, shape=(4,), x_init=START, num_samples=3
    )
    assert [int(label[0]) for label in ours.labels] == timesteps
    torch.testing.assert_close(x, published_ddim(theirs, START, timesteps), rtol=1e-9, atol=1e-9)


def test_the_end_of_indices_is_a_step_or_the_data():
    """diffusers' set_alpha_to_one=False ends at ᾱ of timestep 0, Stable Diffusion's with steps_offset=1."""
    steps = grids.timesteps("leading", 1000, 50, offset=1).steps
    assert steps == tuple(range(981, 0, -20))
    net = Recorder(CHAIN)
    x = START
    for now, after in zip(steps, [*steps[1:], 0]):
        bar, bar_after = net.alpha_bar[now], net.alpha_bar[after]
        eps = net(x, torch.full((3,), now))
        x = bar_after.sqrt() * (x - (1 - bar).sqrt() * eps) / bar.sqrt() + (1 - bar_after).sqrt() * eps
    ours = fastdiff.sample(
        net, CHAIN, sampler="ddim", prediction="eps", grid=grids.indices(steps, end=0), shape=(4,), x_init=START, num_samples=3
    )  # fmt: skip
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def published_spacing(name, T, S, one_more):
    """set_timesteps of diffusers: DDIM, DDPM, Euler, …, and with `one_more` DPM-Solver, DEIS, UniPC, SA-Solver."""
    if name == "trailing":
        return (np.round(np.arange(T, 0, -T / S)) - 1).tolist()
    more = S + one_more
    if name == "leading":
        return [k * (T // more) for k in range(more)][::-1][:S]
    return [round(float(v)) for v in np.linspace(0, T - 1, more)][::-1][:S]


@pytest.mark.parametrize("name", grids.SPACINGS)
@pytest.mark.parametrize(("sampler", "one_more"), [("ddim", 0), ("ancestral", 0), ("heun", 0), ("dpmpp_2m", 1), ("unipc", 1),
                                                   ("deis", 1), ("sa", 1)])  # fmt: skip
def test_spacings_are_diffusers(name, sampler, one_more):
    for T in (1000, 999, 100, 50):
        for S in (1, 2, 3, 7, 10, 20, 33, 47):
            table = fastdiff.plan(fastdiff.DDPM(T=T), S, sampler=sampler, grid=name, prediction="score")
            starts = list(dict.fromkeys(row.level.t for row in table.rows))
            wanted = [step + 1 for step in published_spacing(name, T, S, one_more)]
            assert [t for t in starts if t > 0] == wanted, (T, S)
            assert table.end.t == 0


def published_respacing(parts, T):
    """improved-diffusion's sections: `count` steps in equal strides over each part of the chain."""
    found, first = [], 0
    for k, count in enumerate(parts):
        size = T // len(parts) + (k < T % len(parts))
        found += [first + round(j * (size - 1) / max(count - 1, 1)) for j in range(count)]
        first += size
    return found[::-1]


@pytest.mark.parametrize(("spec", "parts"), [("10,15,20", [10, 15, 20]), ("10, 15,20", [10, 15, 20]), ("250", [250]), ("1", [1]),
                                             ("90,60,60,20,20", [90, 60, 60, 20, 20])])  # fmt: skip
def test_respacings_are_openais(spec, parts):
    for T in (1000, 997):
        assert list(grids.timesteps(spec, T).steps) == published_respacing(parts, T)
    net = Recorder(CHAIN)
    fastdiff.sample(net, CHAIN, prediction="eps", grid=spec, shape=(4,), x_init=START, num_samples=3)
    assert [int(label[0]) for label in net.labels] == published_respacing(parts, 1000)


@pytest.mark.parametrize("count", [1, 2, 25, 50, 100, 250, 1000])
def test_ddim_respacings_have_one_stride(count):
    steps = grids.timesteps(f"ddim{count}", 1000).steps
    assert (len(steps), steps[-1]) == (count, 0)
    assert len(set(np.diff(steps))) <= 1


def test_a_ladder_is_counted_from_its_largest_level():
    chain = fastdiff.NCSN()
    times = [row.level.t for row in fastdiff.plan(chain, sampler="ddim", grid=grids.indices([0, 3, 6, 9])).rows]
    assert times == [10, 7, 4]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: grids.indices([]), "at least one"),
        (lambda: grids.indices([999, 946.4, 0]), "whole"),
        (lambda: grids.indices([999, 946, 946, 0]), "all be different"),
        (lambda: grids.indices([3, 5, 4]), "in order"),
        (lambda: grids.indices(["a"]), "list of numbers"),
        (lambda: grids.timesteps("leadin", 1000, 5), "did you mean 'leading'"),
        (lambda: grids.timesteps("leading", 1000), "steps must be an integer"),
        (lambda: grids.timesteps("ddim300", 1000), "no whole stride in 1000 steps: use 'ddim334' or '300'"),
        (lambda: grids.timesteps("10,0", 1000), "at least 1"),
        (lambda: grids.timesteps("600,10", 1000), "600 of a part of 500"),
        (lambda: grids.timesteps("ddim50", 1000, 20), "leave steps out"),
        (lambda: fastdiff.plan("vp", 20, grid="leading"), "needs a DDPM chain"),
        (lambda: fastdiff.plan("ncsn", 9, sampler="ddim", grid="trailing"), "needs a DDPM chain"),
        (lambda: fastdiff.plan("vp", grid="ddim50"), "needs a DDPM chain"),
        (lambda: fastdiff.plan("vp", grid=grids.indices([5, 0])), "continuous"),
        (lambda: fastdiff.plan("ddpm", grid=grids.indices([1000, 0])), "0 to 999, got 1000"),
        (lambda: fastdiff.plan("ddpm", grid=grids.indices([0, 500])), "down to the data"),
        (lambda: fastdiff.plan("ddpm", grid=grids.indices([500, 20], end=20)), "down to the data"),
        (lambda: fastdiff.plan("ddpm", 20, grid="ddim50"), "contradicts"),
        (lambda: fastdiff.plan("ddpm", 50, grid="leading", t_min=1), "t_min must be below 1"),
        (lambda: fastdiff.plan("ddpm", grid=grids.indices([500, 0]), t_min=0), "contradicts an explicit grid"),
    ],
)
def test_bad_steps_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    "times",
    [
        range(980, -1, -20),
        [999, 666, 333, 0],
        [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
        [950, 500, 1],
        np.array([981, 721, 461, 201, 1]),
        torch.tensor([999.0, 946.5, 0.0]),
    ],
)
def test_timesteps_as_times_are_warned_of(times):
    with pytest.warns(UserWarning, match=r"fastdiff.grids.indices\(timesteps\)") as seen:
        fastdiff.plan("ddpm", grid=times)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastdiff.plan("ddpm", grid=[1000, 500, 0])
        fastdiff.plan("ddpm", grid=[1000, 666, 333, 1])
        fastdiff.plan("ddpm", grid=[800.5, 500, 20.5], sampler="ddim")
        fastdiff.plan("ddpm", grid=[981, 500, 0])
        fastdiff.plan("ddpm", grid=grids.indices([980, 500, 0]))
        fastdiff.plan("vp", grid=[1, 0.5, 0.01])
        fastdiff.plan("ncsn", grid=[9, 5, 1], sampler="ddim")


# --- what a network is told ------------------------------------------------------------------------------------------


def k_diffusions_index(sigma, sigmas):
    """DiscreteSchedule.sigma_to_t: linear in log σ between the neighbours, within the table."""
    logs = torch.log(sigmas)
    low = int((torch.log(sigma) - logs >= 0).long().cumsum(0).argmax().clamp(max=len(logs) - 2))
    w = ((logs[low] - torch.log(sigma)) / (logs[low] - logs[low + 1])).clamp(0, 1)
    return float((1 - w) * low + w * (low + 1))


@pytest.mark.parametrize("betas", ["linear", "cosine", "scaled_linear"])
def test_fractional_index_is_k_diffusions(betas):
    chain = fastdiff.DDPM(betas, T=100)
    sigmas = torch.from_numpy(chain.sigma(np.arange(1.0, 101)) / chain.alpha(np.arange(1.0, 101)))
    top, low = float(sigmas[-1]), float(sigmas[0])
    asked = np.geomspace(min(top, 1e3), low * 0.5, 40)
    levels = [row.level for row in fastdiff.plan(chain, sampler="ddim", grid=grids.sigmas(asked)).rows]
    table = fastdiff.plan(chain, sampler="ddim", grid=grids.sigmas(asked), time_input="fractional_index")
    wanted = [k_diffusions_index(torch.tensor(level.sigma_hat, dtype=F64), sigmas) for level in levels]
    np.testing.assert_allclose([row.network_time for row in table.rows], wanted, atol=1e-7)
    model = fastdiff.ScoreModel(lambda x, t: 0 * x + t[:, None], chain, "eps", "fractional_index", (1,))
    t = torch.tensor([level.t for level in levels], dtype=F64)
    np.testing.assert_allclose(model(torch.zeros(len(t), 1, dtype=F64), t)[:, 0], wanted, atol=1e-7)


def test_fractional_index_is_the_index_at_steps():
    for chain in (CHAIN, fastdiff.NCSN(), fastdiff.DDPM([0.5])):
        t = np.arange(1.0, chain.T + 1)
        for values in (t, torch.from_numpy(t), torch.from_numpy(t).float()):
            time = fastdiff.predictions.network_time("fractional_index", chain, values, None, None)
            assert np.array_equal(np.asarray(time), chain.index(t))
        share = fastdiff.predictions.network_time("index/T", chain, t, None, None)
        np.testing.assert_allclose(share, chain.index(t) / chain.T, rtol=1e-15)


def test_fractional_index_serves_solvers_between_steps():
    """Where the index refuses: with a network exact for N(0, 1) data, x stays N(0, 1)."""
    sigma_hat = CHAIN.sigma(np.arange(1.0, 1001)) / CHAIN.alpha(np.arange(1.0, 1001))

    def eps(x, t):  # σ x at the level whose log σ̂ lies between those of the steps
        assert 0 <= t.min() <= t.max() <= 999
        ratio = np.exp(np.interp(t.numpy(), np.arange(1000), np.log(sigma_hat)))
        return torch.from_numpy(ratio / np.sqrt(1 + ratio**2))[:, None].to(x) * x

    options = {"prediction": "eps", "shape": (2,), "num_samples": 4000}
    for sampler, steps, grid in (("heun", 15, "quadratic"), ("dpm_2", 15, None), ("rk45", None, None)):
        options |= {"sampler": sampler, "grid": grid}
        x = fastdiff.sample(eps, CHAIN, steps, time_input="fractional_index", **options)
        assert abs(float(x.var()) - 1) < 5 * math.sqrt(2 / 8000)
        with pytest.raises(ConfigError, match="fractional_index"):
            fastdiff.sample(eps, CHAIN, steps, time_input="index", **options)


def test_defaults_of_what_a_network_is_told():
    of = lambda net, sde, kind: fastdiff.ScoreModel(net, sde, kind, data_shape=(2,)).time_input  # noqa: E731
    net = torch.nn.Linear(2, 2)
    assert [of(net, "ddpm", kind) for kind in ("eps", "x0", "v", "prev_mean")] == ["index"] * 4
    assert of(net, "ncsn", "eps") == "t"
    assert of(net, "ddpm", "edm") == of(MLP((2,)), "ddpm", "edm") == "c_noise"
    # a score is a function of the process time, and fastdiff's networks fit themselves to it
    assert of(net, "ddpm", "score") == of(net, "vp", "eps") == of(MLP((2,)), "ddpm", "eps") == "t"
    assert fastdiff.plan("ddpm", 4, prediction="eps").rows[0].network_time == 999
    assert fastdiff.plan("ddpm", 4).rows[0].network_time == 1000


@pytest.mark.parametrize("name", ["vp", "ddpm"])
def test_a_function_says_what_a_network_is_told(name, tmp_path):
    """In a run, a solver that chooses its steps, a training's forward: the same numbers, in the state's dtype."""
    process = fastdiff.processes.get(name)
    met = []

    def net(x, t):
        met.append(t.clone())
        return -x

    given = lambda t: torch.log1p(t) * 3  # noqa: E731
    table = fastdiff.plan(process, 5, sampler="heun", time_input=given)
    np.testing.assert_allclose(table.rows[1].network_time, 3 * np.log1p(table.rows[1].level.t), rtol=1e-15)
    options = {"shape": (2,), "num_samples": 2, "time_input": given, "dtype": F64}
    fastdiff.sample(net, process, 5, sampler="heun", **options)
    assert [float(t[0]) for t in met] == [row.network_time for row in table.rows if row.calls_network]
    assert all(t.dtype == F64 and t.shape == (2,) for t in met)
    met.clear()
    fastdiff.sample(net, process, sampler=fastdiff.samplers.Adaptive(rtol=1e-2, atol=1e-2), **options)
    assert float(met[0][0]) == pytest.approx(3 * math.log1p(process.T))
    model = fastdiff.ScoreModel(torch.nn.Identity(), process, "eps", given, (2,))
    model.net.forward = net
    met.clear()
    t = torch.tensor([0.5, 1.0])
    model(torch.zeros(2, 2), t)
    torch.testing.assert_close(met[0], 3 * torch.log1p(t))
    with pytest.raises(ConfigError, match="time_input must be a name to be saved"):
        fastdiff.save(model, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_function_is_asked_anew():
    """A function may read what changes between two runs."""
    scale = [1.0]
    given = lambda t: scale[0] * t  # noqa: E731
    assert fastdiff.plan("vp", 3, time_input=given).rows[0].network_time == 1
    scale[0] = 2.0
    assert fastdiff.plan("vp", 3, time_input=given).rows[0].network_time == 2


@pytest.mark.parametrize("given", [lambda t: 1.0, lambda t: t[:0], lambda t: t[:, None].expand(-1, 2), lambda t: None])
def test_functions_that_give_something_else_are_refused(given):
    with pytest.raises(ConfigError, match=r"time_input\(t\) must return one number"):
        fastdiff.ScoreModel(torch.nn.Identity(), "vp", "eps", given, (2,))


def test_training_by_a_function_is_refused_only_where_it_is_saved(tmp_path):
    model = fastdiff.ScoreModel(MLP((2,), hidden=8, layers=1), "vp", "eps", lambda t: 100 * t, (2,))
    data = np.random.default_rng(0).normal(size=(64, 2)).clip(-0.9, 0.9)
    with pytest.raises(ConfigError, match="time_input must be a name to be saved"):
        fastdiff.train(model, data, steps=2, checkpoint=tmp_path / "run")
    assert len(fastdiff.train(model, data, steps=2).loss) == 2


# --- betas -----------------------------------------------------------------------------------------------------------


def test_betas_of_short_chains_are_scaled_unless_their_ends_are_given():
    """Nichol & Dhariwal's rule, 1000/T; and diffusers', which takes β from beta_start to beta_end whatever T is."""
    np.testing.assert_allclose(fastdiff.DDPM("linear", T=50).beta_table, np.linspace(0.002, 0.4, 50))
    as_given = fastdiff.schedules.linear(50, beta_start=1e-4, beta_end=0.02)
    np.testing.assert_allclose(fastdiff.DDPM(as_given).beta_table, np.linspace(1e-4, 0.02, 50))
    roots = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 50) ** 2
    np.testing.assert_allclose(fastdiff.schedules.scaled_linear(50, 0.00085, 0.012), roots)
