"""Where the steps stand, and the transitions between them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import grids
from fastdiff.errors import ConfigError
from fastdiff.planning import chains
from fastdiff.planning.processes import PROCESSES, get


def times(spec, process, n, t_min=None):
    return np.array([level.t for level in grids.build(spec, process, n, t_min).levels])


def test_karras_grid_is_the_published_one():
    published = [
        80, 57.586, 40.7856, 28.3746, 19.3525, 12.9101, 8.4009, 5.3152, 3.2568, 1.9233, 1.0882, 0.5853, 0.2964, 0.1395,
        0.0599, 0.0229, 0.0075, 0.002, 0,
    ]  # fmt: skip
    grid = grids.build("karras", fastdiff.EDM(), 18, None)
    assert grid.in_sigma
    np.testing.assert_allclose([level.sigma for level in grid.levels], published, atol=6e-5)


def test_karras_on_vp_stands_on_the_noise_ratio():
    grid = grids.build("karras", fastdiff.VP(), 5, None)
    ratios = [level.sigma / level.alpha for level in grid.levels]
    assert ratios[0] == pytest.approx(152.17, rel=1e-4)  # the VP range of Karras et al.'s code
    assert ratios[-2] == pytest.approx(0.010486, rel=1e-4)
    assert (grid.levels[-1].t, ratios[-1]) == (0.0, 0.0)


def test_named_grids_run_from_T_to_t_min():
    vp = fastdiff.VP()
    np.testing.assert_allclose(times("uniform", vp, 4), np.linspace(1, 1e-3, 5))
    np.testing.assert_allclose(np.diff(np.sqrt(times("quadratic", vp, 4))), (math.sqrt(1e-3) - 1) / 4)
    log_ratio = np.log([level.sigma / level.alpha for level in grids.build("logsnr", vp, 4, None).levels])
    assert np.ptp(np.diff(log_ratio)) < 1e-9
    np.testing.assert_array_equal(times("trained", fastdiff.DDPM(), 4), [1000, 750, 500, 250, 0])
    np.testing.assert_array_equal(times("trained", fastdiff.NCSN(), 9), np.arange(10, 0, -1))
    np.testing.assert_array_equal(
        times("trained", fastdiff.DDPM("cosine", T=10), 4), [10, 8, 5, 3, 0]
    )  # to the nearest
    assert times("uniform", vp, 3, t_min=0.0)[-1] == 0.0


def test_explicit_grids():
    vp = fastdiff.VP()
    for values in ([1.0, 0.5, 0.0], np.array([1.0, 0.5, 0.0]), torch.tensor([1.0, 0.5, 0.0])):
        np.testing.assert_array_equal(times(values, vp, None), [1.0, 0.5, 0.0])
    grid = grids.build(grids.sigmas([3.0, 1.0, 0.0]), vp, None, None)
    np.testing.assert_allclose([level.sigma / level.alpha for level in grid.levels], [3.0, 1.0, 0.0])


@pytest.mark.parametrize("name", PROCESSES)
def test_steps_compose_to_the_kernel(name):
    """x_t = ratio·x_s + √var·z for every step: chained from the end up they give α and σ of the start."""
    process = get(name)
    grid = grids.build("uniform", process, 6, None)
    alpha, square = grid.levels[-1].alpha, grid.levels[-1].sigma ** 2
    for step in reversed(grid.steps):
        alpha, square = step.ratio * alpha, step.ratio**2 * square + step.var
        assert alpha == pytest.approx(step.level.alpha, rel=1e-12)
        assert square == pytest.approx(step.level.sigma**2, rel=1e-10)
        # the posterior of x_s given x_t and x_0, by Gaussian conditioning
        exact = step.next.sigma**2 - step.ratio**2 * step.next.sigma**4 / step.level.sigma**2
        assert step.posterior == pytest.approx(exact, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("n", "t_min"), [(1000, 1e-3), (1000, 1e-5), (2000, 1e-5), (37, 1e-3)])
def test_reference_grid_truncates_its_ladder_as_the_reference_does(n, t_min):
    t = torch.linspace(1, t_min, n)
    index = (t * (n - 1) / 1).long()
    sigmas = torch.exp(torch.linspace(math.log(0.01), math.log(50.0), n, dtype=torch.float64))
    previous = torch.where(index == 0, torch.zeros(n, dtype=torch.float64), sigmas[index - 1])
    steps = grids.build("score_sde", fastdiff.VE(), n, t_min).steps
    ours = np.array([step.var for step in steps])
    expected = (sigmas[index] ** 2 - previous**2).numpy()
    assert np.mean(~np.isclose(ours, expected, rtol=1e-9)) <= 2 / n  # float32 linspace may land across a whole number
    assert all(step.dt == -1 / n for step in steps)
    betas = np.linspace(0.1 / n, 20 / n, n)
    steps = grids.build("score_sde", fastdiff.VP(), n, t_min).steps
    if n > 20:
        assert np.mean(~np.isclose([step.var for step in steps], betas[index.numpy()], rtol=1e-9)) <= 2 / n


def test_chains_on_a_path():
    vp = fastdiff.VP()
    chain = chains.chain_on(vp, "ddpm", 50)
    t = np.arange(1, 51)
    np.testing.assert_allclose(chain.alpha(t * 1.0), vp.alpha(t / 50), rtol=1e-12)
    assert chains.on_path(chain, vp)
    assert chains.on_path(fastdiff.DDPM(), vp)  # Ho et al.'s betas end 0.3 % beyond
    assert not chains.on_path(fastdiff.DDPM("cosine"), vp)
    assert not chains.on_path(fastdiff.DDPM(), fastdiff.SubVP())
    assert not chains.on_path(fastdiff.DDPM(), fastdiff.VE())
    ladder = chains.chain_on(fastdiff.VE(), "ncsn", 20)
    assert (ladder.sigmas[0], ladder.sigmas[-1], ladder.T) == (50.0, 0.01, 20)
    assert chains.on_path(ladder, fastdiff.VE())
    assert not chains.on_path(fastdiff.NCSN([100.0, 1.0]), fastdiff.VE())
    with pytest.raises(ConfigError, match="path"):
        chains.chain_on(fastdiff.SubVP(), "ddpm", 10)


def test_chains_on_the_path_of_any_process_that_has_them():
    class Slow(fastdiff.processes.Process):
        """A user's own, which may change and so has no hash: α = e^{−t}, σ² = 1 − α²."""

        T, __hash__ = 3.0, None

        def alpha(self, t):
            return fastdiff.processes.lib(t).exp(-t)

        def sigma(self, t):
            return fastdiff.processes.lib(t).sqrt(-fastdiff.processes.lib(t).expm1(-2 * t))

    for process in (fastdiff.OU(), Slow()):
        chain = chains.chain_on(process, "ddpm", 50)
        np.testing.assert_allclose(chain.beta_table, -np.expm1(-2 * process.T / 50), rtol=1e-12)
    ladder = chains.chain_on(fastdiff.EDM(), "ncsn", 20)
    np.testing.assert_allclose(ladder.sigmas, np.geomspace(80, 0.002, 20), rtol=1e-12)
    for process, name in ((fastdiff.EDM(), "ddpm"), (fastdiff.OU(rate=0.5), "ddpm"), (fastdiff.OU(), "ncsn")):
        with pytest.raises(ConfigError, match=f"'{name}' is not on the path of '{process.name}'"):
            chains.chain_on(process, name, 10)
    score = lambda x, t: -x  # noqa: E731 (of N(0, 1) data on both)
    model = fastdiff.ScoreModel(score, Slow(), "score", data_shape=(1,))
    # x' = √(1−β) x + √β z keeps the variance; the start has σ(T)² = 1 − e^{−6}, and the steps take e^{−6} of what it lacks
    beta = fastdiff.samplers.Ancestral(variance="beta")
    x = fastdiff.sample(model, "ddpm", steps=200, sampler=beta, denoise=False, num_samples=20_000)
    assert abs(float(x.var()) - 1) < 4 * (2 / 20_000) ** 0.5


@pytest.mark.parametrize(
    ("spec", "process", "n", "t_min", "match"),
    [
        ("unifrom", "vp", 5, None, "did you mean 'uniform'"),
        ("uniform", "vp", 5, 1.0, "t_min"),
        ("uniform", "vp", 5, -0.1, "t_min"),
        ("logsnr", "vp", 5, 0.0, "sigma > 0"),
        ("karras", "vp", 5, 0.0, "sigma > 0"),
        ("trained", "vp", 5, None, "discrete"),
        ("trained", "ddpm", 1001, None, "steps must be <= 1000"),
        ("uniform", "ncsn", 5, 0.5, "smallest level"),
        ("score_sde", "ve", 1, None, "steps must be >= 2"),
        ("score_sde", "ddpm", 5, None, "sigma > 0"),
        ("trained", "ddpm", 5, 0.5, "whole step"),
        ([1.0], "vp", None, None, "at least two"),
        ([], "vp", None, None, "at least two"),
        ([0.5, 1.0], "vp", None, None, "index 1"),
        ([1.0, 0.5, 0.5], "vp", None, None, "index 2"),
        ([1.0, math.nan], "vp", None, None, "finite"),
        ([1.5, 0.5], "vp", None, None, r"\[0, 1\]"),
        ([1.0, -0.1], "vp", None, None, r"\[0, 1\]"),
        ([5.0, 0.5], "ncsn", None, None, r"\[1, 10\]"),
        ([1.0, 0.5], "vp", None, 0.1, "contradicts"),
        (3.0, "vp", None, None, "list of numbers"),
        (["a", "b"], "vp", None, None, "list of numbers"),
        ([True, False], "vp", None, None, "list of numbers"),
        ([1.0, 0.5], "vast", None, None, "leave nothing of the data.*start at t <= 0.11"),
    ],
)
def test_bad_grids_are_refused(spec, process, n, t_min, match):
    with pytest.raises(ConfigError, match=match):
        grids.build(spec, fastdiff.VP(0.1, 3000.0) if process == "vast" else get(process), n, t_min)


def test_bad_sigmas_are_refused():
    with pytest.raises(ConfigError, match=">= 0"):
        grids.sigmas([1.0, -1.0])
    with pytest.raises(ConfigError, match="not among the process's levels"):
        grids.build(grids.sigmas([1e6, 1.0, 0.0]), fastdiff.DDPM(), None, None)


@pytest.mark.parametrize("grid", ["fourth_root", "karras", "logsnr"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_levels_of_a_chain_end_at_its_first_step_and_then_the_data(grid, steps):
    """As diffusers' use_karras_sigmas: the levels are those of the chain, whose lowest is step 1, not the data at t = 0."""
    table = fastdiff.plan("ddpm", steps, sampler="ddim", grid=grid, prediction="eps", time_input="fractional_index")
    times = [row.level.t for row in table.rows]
    assert (len(times), table.end.t, table.end.sigma) == (steps, 0, 0)
    assert times == sorted(set(times), reverse=True)
    assert times[0] == pytest.approx(1000)
    assert times[-1] >= 1 - 1e-9
    if steps > 1 and grid != "fourth_root":
        assert times[-1] == pytest.approx(1)
    if grid == "karras" and steps == 10:
        alpha = fastdiff.DDPM().alpha(np.array([1.0, 1000.0]))
        low, high = np.sqrt(1 / alpha**2 - 1) ** (1 / 7)
        wanted = np.linspace(high, low, 10) ** 7
        assert [row.level.sigma_hat for row in table.rows] == pytest.approx(wanted)


@pytest.mark.parametrize("grid", ["fourth_root", "logsnr", "uniform"])
@pytest.mark.parametrize(("sde", "end"), [("vp", 0.2), ("ve", 0.3), ("ddpm", 200)])
def test_a_grid_ends_where_it_is_told_to(grid, sde, end):
    table = fastdiff.plan(sde, 10, sampler="ddim", grid=grid, prediction="eps", time_input="t", t_min=end)
    assert table.end.t == pytest.approx(end)
    assert len(table.rows) == 10


def test_karras_levels_end_at_t_min_and_then_the_data():
    """As published: t_min is the lowest noise, σ_min of eq. 5, from which the last step leads to 0."""
    table = fastdiff.plan("edm", 10, sampler="ddim", grid="karras", t_min=0.3)
    assert table.rows[-1].level.t == pytest.approx(0.3)
    assert table.end.sigma == 0
