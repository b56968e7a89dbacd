"""plan(): defaults and explicit grids, one meaning for each way of saying the same."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.errors import ConfigError
from fastdiff.planning import samplers
from fastdiff.planning.cache import cached
from fastdiff.planning.grids import sigmas
from fastdiff.planning.samplers import AnnealedLangevin, PredictorCorrector
from fastdiff.planning.samplers.base import EPS, SolverRow

DEFAULT_ROWS = {"ve": 2000, "vp": 1000, "subvp": 1000, "ou": 1000, "ddpm": 1000, "ncsn": 1001, "edm": 1999}


@pytest.mark.parametrize("name", DEFAULT_ROWS)
def test_defaults_of_every_process(name):
    """1000 steps of the process's own sampler, or all of a chain."""
    table = fastdiff.plan(name)
    assert len(table) == DEFAULT_ROWS[name]
    process = fastdiff.processes.get(name)
    assert table.rows[0].level.t == process.T
    assert table.prior_std == process.prior_std


def test_default_steps_follow_the_chain():
    assert len(fastdiff.plan(fastdiff.DDPM("cosine", T=40))) == 40
    assert len(fastdiff.plan("ddpm", t_min=100)) == 900
    assert fastdiff.plan("ddpm", sampler="ddim", t_min=1).end.t == 1
    assert len(fastdiff.plan("vp", sampler=AnnealedLangevin(steps_per_level=3))) == 601
    assert (
        fastdiff.plan("ddpm", 950, t_min=100).rows[0].level.t == 1000
    )  # between the trained steps where they do not suffice
    assert fastdiff.plan("ddpm", 10, t_min=0.5).end.t == 0.5


def test_times_and_sigmas_are_different_grids():
    """Equal numbers, one after the other, through the cache."""
    numbers = [0.9, 0.5, 0.1]
    times, ratios = (fastdiff.plan("vp", grid=g, sampler="ddim") for g in (numbers, sigmas(numbers)))
    assert [row.level.t for row in times.rows] == [0.9, 0.5]
    np.testing.assert_allclose([row.level.sigma / row.level.alpha for row in ratios.rows], [0.9, 0.5])


def test_an_explicit_grid_says_how_many_steps():
    for grid in ([1.0, 0.5, 0.1], np.array([1.0, 0.5, 0.1]), torch.tensor([1.0, 0.5, 0.1])):
        assert len(fastdiff.plan("vp", grid=grid)) == 2
    assert len(fastdiff.plan("vp", 2, grid=[1.0, 0.5, 0.1])) == 2
    with pytest.raises(ConfigError, match="contradicts a grid of 3 points"):
        fastdiff.plan("vp", 3, grid=[1.0, 0.5, 0.1])
    alone = PredictorCorrector("none")
    assert len(fastdiff.plan("vp", grid=[1.0, 0.5, 0.1], sampler=alone)) == 3
    assert len(fastdiff.plan("vp", 7, grid=[1.0, 0.5], sampler="ula")) == 7
    assert len(fastdiff.plan("vp", grid=[1.0, 0.5, 0.1], sampler="annealed_langevin", denoise=False)) == 15


def test_annealed_langevin_on_part_of_a_ladder():
    whole = fastdiff.plan("ncsn", denoise=False)
    assert len(fastdiff.plan("ncsn", grid=list(range(10, 0, -1)), denoise=False)) == len(whole) == 1000
    part = fastdiff.plan("ncsn", 30, grid=[10, 5, 1], denoise=False)
    assert [row.level.t for row in part.rows] == [10.0] * 10 + [5.0] * 10 + [1.0] * 10
    with pytest.raises(ConfigError, match="use 30"):
        fastdiff.plan("ncsn", 31, grid=[10, 5, 1])
    with pytest.raises(ConfigError, match="must be 6"):
        fastdiff.plan("ncsn", 30, grid=[10, 5, 1], sampler=AnnealedLangevin(steps_per_level=2))


def test_a_run_that_starts_below_T_starts_from_its_own_level():
    assert fastdiff.plan("edm", grid=sigmas([10, 5, 1, 0])).prior_std == 10.0
    assert fastdiff.plan("ve", grid=[0.5, 0.2]).prior_std == pytest.approx(float(fastdiff.VE().sigma(0.5)))
    assert fastdiff.plan("ddpm", grid=[981, 500, 0]).prior_std == pytest.approx(1, abs=1e-3)
    # the data's share of x may be a tenth of the noise, not more
    assert fastdiff.plan("vp", grid=sigmas([10.01, 1]), sampler="ddim").prior_std == pytest.approx(
        10.01 / math.hypot(10.01, 1)
    )
    assert math.isnan(fastdiff.plan("vp", grid=sigmas([9.99, 1]), sampler="ddim").prior_std)
    late = fastdiff.plan("vp", grid=[0.3, 0.1])
    assert math.isnan(late.prior_std)
    assert "starts from x_init" in late.explain()
    options = {"grid": [0.3, 0.1], "shape": (2,), "num_samples": 3}
    with pytest.raises(ConfigError, match="give x_init"):
        fastdiff.sample(lambda x, t: -x, "vp", **options)
    assert fastdiff.sample(lambda x, t: -x, "vp", x_init=torch.zeros(3, 2), **options).shape == (3, 2)

    def score(x, t):
        return -x / (1 + t**2)[:, None]

    x = fastdiff.sample(score, "edm", grid=sigmas([10, 7, 5, 3, 2, 1, 0.5, 0.2, 0.1, 0]), shape=(1,), num_samples=4000)
    assert x.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("name", "grid"),
    [("ve", [100, 1, 0]), ("ve", [50, 1, 0.005, 0]), ("ncsn", [1, 0.1, 0.001]), ("vp", [1e4, 1]), ("edm", [81, 1])],
)
def test_noise_ratios_outside_the_process_are_refused(name, grid):
    with pytest.raises(ConfigError, match="not among the process's levels"):
        fastdiff.plan(name, grid=sigmas(grid), sampler="ddim")


def test_euler_maruyama_needs_a_grid_of_times():
    with pytest.raises(ConfigError, match="grid of times"):
        fastdiff.plan("ve", 5, sampler="euler_maruyama", grid="karras")


def test_the_reference_grid_at_few_steps():
    """Its β table is what breaks below beta_max, where β = 1 for ancestral sampling; Euler-Maruyama does not use it."""
    assert len(fastdiff.plan("vp", 5, sampler="euler_maruyama", grid="score_sde")) == 5
    for steps, sampler in ((20, "ancestral"), (19, "ancestral"), (19, "reverse_diffusion"), (19, "pc")):
        with pytest.raises(ConfigError, match="beta_max"):
            fastdiff.plan("vp", steps, sampler=sampler, grid="score_sde")


@pytest.mark.parametrize("process", [fastdiff.OU(), fastdiff.EDM(), fastdiff.NCSN(), fastdiff.VP(0.2, 5)], ids=repr)
def test_the_reference_grid_of_other_processes_is_eulers(process):
    """score_sde's SDE.discretize at its N times: x ← x − (f x − g² score) T/N + g √(T/N) z, whatever the process."""
    n, dt = 7, process.T / 7
    table = fastdiff.plan(process, n, sampler="euler_maruyama", grid="score_sde", denoise=False)
    for row, t in zip(table.rows, np.linspace(process.T, process.t_min, n)):
        f, g = process.drift(t), process.diffusion(t)
        assert (row.level.t, row.a, row.c) == pytest.approx((t, 1 - f * dt, g * math.sqrt(dt)), rel=1e-12)
        assert row.b[0] == pytest.approx(g * g * dt, rel=1e-12)


def test_long_tables_are_not_kept():
    short, long = fastdiff.plan("vp", 50), fastdiff.plan("vp", 10_001)
    assert fastdiff.plan("vp", 50) is short
    assert fastdiff.plan("vp", 10_001) is not long


def test_learned_variance_reaches_a_predictor():
    def both(x, t):
        return torch.cat([-x, torch.ones_like(x)], 1)

    model = fastdiff.ScoreModel(both, "vp", "score", data_shape=(2,), variance="learned_range")
    options = {"steps": 5, "num_samples": 3, "return_info": True}
    _, info = fastdiff.sample(model, sampler=PredictorCorrector("ancestral"), **options)
    assert [row.label for row in info.table.rows if row.log_variance is not None] == ["ancestral"] * 4
    plain = lambda x, t: both(x, t)  # noqa: E731
    x, _ = fastdiff.sample(
        plain, "vp", sampler=fastdiff.samplers.Ancestral("learned_range"), shape=(2,), **{**options, "steps": 1}
    )
    assert x.shape == (3, 2)


def test_noise_in_rows_that_draw_none_may_be_anything():
    noise = torch.zeros(3, 2, 2)
    noise[-1] = math.nan
    assert fastdiff.sample(lambda x, t: -x, "vp", 3, shape=(2,), num_samples=2, noise=noise).isfinite().all()


@pytest.mark.parametrize("predictor", ["dpmpp_2m", "heun", "ddim"])
def test_the_reference_grid_has_the_references_predictors_only(predictor):
    with pytest.raises(ConfigError, match=f"no predictor '{predictor}'"):
        fastdiff.plan("ve", 30, sampler=PredictorCorrector(predictor), grid="score_sde")


class Mine(samplers.Sampler):
    """Rows that a user might write."""

    def __init__(self, make):
        self.make = make

    def predict(self, process, grid):
        return self.make(grid)


def row(step, b=(1.0,)):
    return SolverRow(step.level, "mine", 1.0, b, EPS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda grid: [], r"Mine.predict must give a list of at least one row for each of 3 steps, got 0 lists"),
        (lambda grid: [[row(step)] for step in grid.steps[:2]], r"each of 3 steps, got 2 lists of \[1\] rows"),
        (lambda grid: [[row(step)] for step in grid.steps[:2]] + [[]], r"got 3 lists of \[0, 1\] rows"),
        (
            lambda grid: [[row(step, (1.0, 0.5))] for step in grid.steps],
            "row 0 reads 1 predictions of earlier rows, and 0",
        ),
        (lambda grid: [[row(step, (1.0, 0.5, 0.5))] for step in grid.steps], "row 0 reads 2 predictions"),
    ],
)
def test_rows_that_a_users_sampler_cannot_mean(make, words):
    with pytest.raises(ConfigError, match=words):
        fastdiff.plan("vp", 3, sampler=Mine(make))


def test_a_users_sampler_needs_a_predict():
    class Without(samplers.Sampler):
        pass

    assert Without.name == "without"
    with pytest.raises(ConfigError, match=r"Without must define predict\(process, grid\), or rows"):
        fastdiff.plan("vp", 3, sampler=Without())


def test_samplers_and_processes_need_not_hash():
    @dataclasses.dataclass
    class Changing(samplers.Sampler):
        lam: float = 1.0

        def predict(self, process, grid):
            return samplers.EulerMaruyama(self.lam).predict(process, grid)

    sampler = Changing()
    noisy = fastdiff.plan("vp", 3, sampler=sampler)
    sampler.lam = 0.0
    assert sum(row.draws for row in noisy.rows) == 2
    assert not any(row.draws for row in fastdiff.plan("vp", 3, sampler=sampler).rows)


def test_a_table_of_too_many_rows_is_refused_before_it_is_made():
    with pytest.raises(ConfigError, match="rows"):
        fastdiff.plan("vp", 10, sampler=fastdiff.samplers.PredictorCorrector(corrector_steps=10**7))
    with pytest.raises(ConfigError, match="rows"):
        fastdiff.plan("ve", grid=[1.0, 0.5, 0.1], sampler=fastdiff.samplers.PredictorCorrector(corrector_steps=10**7))


@pytest.mark.parametrize("sampler", ["ddim", "unipc", "pc", "heun", "sa"])
@pytest.mark.parametrize(("sde", "end"), [("ddpm", 999.5), ("ncsn", 9.5)])
def test_a_chain_without_a_step_left_is_refused(sde, end, sampler):
    with pytest.raises(ConfigError, match="no step"):
        fastdiff.plan(sde, t_min=end, sampler=sampler, grid="uniform")


def test_the_cache_sees_attributes_that_change():
    class Own(fastdiff.VP):
        def sigma(self, t):
            return super().sigma(t) * self.factor

        __hash__ = object.__hash__
        __eq__ = object.__eq__

    process = Own()
    object.__setattr__(process, "factor", 1.0)
    one = fastdiff.plan(process, 5)
    object.__setattr__(process, "factor", 0.5)
    assert fastdiff.plan(process, 5).rows[0].level.sigma == pytest.approx(0.5 * one.rows[0].level.sigma)


class Sampler(fastdiff.samplers.EulerMaruyama):
    """Of a module, so that it can be pickled, and with an attribute that changes."""

    def predict(self, process, grid):
        return [
            [dataclasses.replace(row, a=row.a * self.scale[0]) for row in step]
            for step in super().predict(process, grid)
        ]


def test_the_cache_sees_what_is_within_attributes():
    for make in (lambda s: s, lambda s: fastdiff.samplers.PredictorCorrector(predictor=s, corrector="none")):
        own = Sampler()
        object.__setattr__(own, "scale", [1.0])
        one = fastdiff.plan("vp", 6, sampler=make(own))
        assert fastdiff.plan("vp", 6, sampler=make(own)) is one
        own.scale[0] = 2.0
        assert fastdiff.plan("vp", 6, sampler=make(own)).rows[0].a == 2 * one.rows[0].a


def test_the_cache_is_bounded_in_weight():
    made = []

    @cached(10, len)
    def of(n):
        made.append(n)
        return "x" * n

    for n in (2, 1, 2, 3, 3):
        of(n)
    assert made == [2, 1, 3, 3]  # what takes more than a fifth is not kept
    for n in (2, -1, -2, -3, 1, 1):
        of(n)
    assert made.count(1) == 1


class Holds:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    ("one", "other"),
    [(1.0, 2.0), ([1], [2]), ({"a": 1}, {"a": 2}), (np.zeros(3), np.ones(3)), (torch.zeros(3), torch.ones(3)), ({1}, {2}),
     (Holds(1), Holds(2)), (Holds([Holds(1)]), Holds([Holds(2)])), (1, 1.0), (True, 1), ("1", b"1"), (int, float)],
)  # fmt: skip
def test_the_cache_tells_values_apart_without_pickle(one, other):
    made = []
    of = cached(10)(lambda value: made.append(value) or len(made))
    assert of(Holds(one)) == of(Holds(copy.deepcopy(one)))
    assert of(Holds(other)) != of(Holds(one))
    count = len(made)
    of(Holds(lambda: count)), of(Holds(iter(made))), of(Holds(made.append))  # what cannot be told is made anew
    assert len(made) > count
