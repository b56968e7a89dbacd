"""The adaptive runner on equations whose solution is known."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import pytest
import torch
from oracles import measured_order

import fastdiff
from fastdiff.errors import ConfigError, SolverError
from fastdiff.execution import adaptive, ops
from fastdiff.execution.adaptive import integrate
from fastdiff.planning.tableaus import METHODS

KINDS = pytest.mark.parametrize("backend", ["reference", "cpu"])


class Linear:
    """dy/du = −rate_i (y − u²) + 2u: y = u² + y_0 e^{−rate_i u}; the integral is of y's first number.

    Only products and sums, whose bits do not depend on the length of the batch.
    """

    def __init__(self, rates):
        self.rates, self.shapes = torch.as_tensor(rates, dtype=torch.float64), []

    def at(self, u, samples):
        def stage(v):
            def rates(y):
                self.shapes.append(len(y))
                column = [-1, *[1] * (y.ndim - 1)]
                rate, at = (x.view(column).to(y.dtype) for x in (self.rates[samples], v))
                return -rate * (y - at * at) + 2 * at, y.flatten(1)[:, :1]

            return rates

        return [stage(v) for v in u]

    def solution(self, y, u):
        column = [-1, *[1] * (y.ndim - 1)]
        return u**2 + y * torch.exp(-self.rates * u).view(column).to(y.dtype)

    def integral(self, y, end):
        return end**3 / 3 + y.flatten(1)[:, 0] * (1 - torch.exp(-self.rates * end)) / self.rates


def run(field, y, end=3.0, start=0.0, backend="cpu", **options):
    given = {"rtol": 1e-8, "atol": 1e-8, "integrals": 1, **options}
    solver = fastdiff.samplers.Adaptive(
        **{name: given.pop(name) for name in ("method", "rtol", "atol", "couple", "max_nfe") if name in given}
    )
    return integrate(field, y, start, end, solver, operations=ops.backend_module(backend), **given)


Y = torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3)
RATES = [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("method", METHODS)
def test_order_conditions(method):
    """Butcher's, of b to its order and of b̂ to one less, for the trees up to order 5; and each node is its row's sum."""
    t = METHODS[method]
    s = len(t.c)
    a = torch.zeros(s, s, dtype=torch.float64)
    for i, row in enumerate(t.a, start=1):
        a[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    c, b = torch.tensor(t.c, dtype=torch.float64), a[-1]
    assert (a.sum(1) - c).abs().max() < 1e-14
    one = torch.ones_like(c)
    trees = {
        1: [(one, 1)],
        2: [(c, 2)],
        3: [(c**2, 3), (a @ c, 6)],
        4: [(c**3, 4), (c * (a @ c), 8), (a @ c**2, 12), (a @ (a @ c), 24)],
        5: [
            (c**4, 5), (c**2 * (a @ c), 10), ((a @ c) ** 2, 20), (c * (a @ c**2), 15), (a @ c**3, 20),
            (c * (a @ (a @ c)), 30), (a @ (c * (a @ c)), 40), (a @ (a @ c**2), 60), (a @ (a @ (a @ c)), 120),
        ],
    }  # fmt: skip
    embedded = b - torch.tensor(t.e, dtype=torch.float64)
    for weights, order in ((b, t.order), (embedded, t.order - 1)):
        for p in range(1, order + 1):
            for tree, gamma in trees[p]:
                assert float(weights @ tree) == pytest.approx(1 / gamma, abs=1e-12), (p, gamma)
    if t.order < 5:
        assert any(abs(float(b @ tree) - 1 / gamma) > 1e-3 for tree, gamma in trees[t.order + 1])
    assert any(abs(float(embedded @ tree) - 1 / gamma) > 1e-5 for tree, gamma in trees[t.order])


@KINDS
@pytest.mark.parametrize("method", METHODS)
def test_the_solution_its_integral_and_back(method, backend):
    field = Linear(RATES)
    before = Y.clone()
    there = run(field, Y, method=method, backend=backend)
    assert torch.equal(Y, before)
    assert (there.y - field.solution(Y, 3.0)).abs().max() < 1e-6
    assert (there.integrals[:, 0] - field.integral(Y, 3.0)).abs().max() < 1e-6
    back = run(field, there.y, end=0.0, start=3.0, method=method, backend=backend)
    assert (back.y - Y).abs().max() < 2e-5  # the way back amplifies by e^{3 rate}, up to 20
    assert (back.integrals + there.integrals).abs().max() < 1e-5


def test_error_follows_the_tolerance():
    for method, t in METHODS.items():
        field, errors, spent = Linear(RATES), [], []
        for tolerance in (1e-5, 1e-7, 1e-9):
            found = run(field, Y, method=method, rtol=tolerance, atol=tolerance)
            errors.append(float((found.y - field.solution(Y, 3.0)).abs().max()))
            spent.append(int(found.nfe.sum()))
        assert errors[0] > errors[1] > errors[2]
        assert measured_order(errors, spent) > t.order - 1, method


def test_float32_states_keep_float64_integrals():
    found = run(Linear(RATES), Y.float(), rtol=1e-5, atol=1e-5)
    assert found.y.dtype == torch.float32
    assert found.integrals.dtype == torch.float64
    assert (found.y - Linear(RATES).solution(Y, 3.0)).abs().max() < 1e-4


def test_every_sample_runs_as_if_alone():
    """One stiff sample among 64: the others' numbers and evaluations are those of running alone, and it pays for itself."""
    rates = torch.full((64,), 1.0)
    rates[17] = 500.0
    y = torch.linspace(-2, 2, 128, dtype=torch.float64).view(64, 2)
    field = Linear(rates)
    together = run(field, y)
    for i in (0, 16, 17, 63):
        alone = run(Linear(rates[i : i + 1]), y[i : i + 1])
        assert torch.equal(alone.y[0], together.y[i])
        assert torch.equal(alone.integrals[0], together.integrals[i])
        assert alone.nfe[0] == together.nfe[i]
    assert together.nfe[17] > 10 * together.nfe[16]
    assert sum(field.shapes) == together.nfe.sum()  # nobody is evaluated beside it
    coupled = run(Linear(rates), y, couple=True)
    assert coupled.nfe.min() == coupled.nfe.max() > 5 * together.nfe[16]
    assert (coupled.y - field.solution(y, 3.0)).abs().max() < 1e-6


def test_the_last_error_steadies_the_step(monkeypatch):
    """PI control at the limit of stability: where the error alone decides, steps in vain are more frequent."""
    settle, vain = adaptive.AdaptiveRun.settle, []

    def noted(self, accepted, *args):
        vain[-1] += int((self.running & ~accepted).sum())
        settle(self, accepted, *args)

    monkeypatch.setattr(adaptive.AdaptiveRun, "settle", noted)
    for gains in (adaptive.GAINS, (1.0, 0.0)):
        monkeypatch.setattr(adaptive, "GAINS", gains)
        vain.append(0)
        run(Linear([300.0]), Y[:1], rtol=1e-2, atol=1e-2)
    assert vain[0] < 0.2 * vain[1]


@pytest.mark.parametrize("method", METHODS)
def test_asked_times(method):
    field, times = Linear(RATES), [0.0, 0.3, 0.31, 1.7, 3.0]
    found = run(field, Y, method=method, times=times, rtol=1e-7, atol=1e-7)
    for time, state in zip(times, found.states):
        assert (state - field.solution(Y, time)).abs().max() < 2e-5, time
    assert torch.equal(found.states[0], Y)
    assert torch.equal(found.states[-1], found.y)
    assert torch.equal(run(Linear(RATES), Y, method=method, rtol=1e-7, atol=1e-7).y, found.y)


def test_the_quartic_interpolant_is_of_order_four():
    """On single steps of falling length, at θ = 0.4: error ~ h^5."""
    errors, sizes = [], (0.2, 0.1, 0.05, 0.025)
    for h in sizes:
        field = Linear([1.0])
        found = run(field, Y[:1], end=h, times=[0.4 * h], rtol=0.5, atol=0.5)
        errors.append(float((found.states[0] - field.solution(Y[:1], 0.4 * h)).abs().max()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(orders) > 4.5, orders


def test_nothing_to_do():
    same = run(Linear(RATES), Y, end=0.0)
    assert torch.equal(same.y, Y)
    assert same.nfe.sum() == 0
    assert run(Linear([]), Y[:0]).y.shape == (0, 3)


class Blowing:
    """dy/du = y²: y = 1/(1 − u) from 1, which ends at u = 1."""

    calls = 0

    def at(self, u, samples):
        def stage(y):
            self.calls += 1
            return y * y, None

        return [stage for _ in u]


def test_a_blow_up_is_a_step_size_underflow():
    with pytest.raises(SolverError, match="step size underflow at t = 1") as caught:
        run(Blowing(), torch.ones(1, 1, dtype=torch.float64), end=2.0, integrals=0)
    assert caught.value.t == pytest.approx(1.0, abs=1e-3)
    assert caught.value.nfe > 0
    assert pickle.loads(pickle.dumps(caught.value)).t == caught.value.t


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("from_u", [0.0, 1.5])
def test_a_field_that_is_not_finite_stops_at_once_and_names_the_sample(value, from_u):
    class Poisoned(Linear):
        def at(self, u, samples):
            def poisoned(stage, v):
                def rates(y):
                    k, rate = stage(y)
                    bad = (samples == 2) & (v >= from_u)
                    return torch.where(bad[:, None], value, k), rate

                return rates

            return [poisoned(stage, v) for stage, v in zip(super().at(u, samples), u)]

    field = Poisoned(RATES)
    with pytest.raises(SolverError, match="not finite") as caught:
        run(field, Y)
    assert caught.value.sample == 2
    assert caught.value.t <= from_u
    assert len(field.shapes) < (3 if from_u == 0 else 1000)


class Walled:
    """dy/du = −0.01 y, from u = 1 on −30 y; not finite where |y| > 4, as a network in half precision overflows."""

    beyond = 0

    def at(self, u, samples):
        def stage(v):
            def rates(y):
                out = y.abs() > 4
                self.beyond += int(out.any())
                return torch.where(out, math.nan, torch.where(v < 1, -0.01, -30.0)[:, None] * y), None

            return rates

        return [stage(v) for v in u]


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_leaves_the_finite_numbers_is_tried_again_at_a_tenth(method):
    """Long steps reach u = 1, and their stages then |y| = 30 h: a tenth is within the field again, nine tenths are not."""
    field = Walled()
    found = run(field, torch.ones(1, 2, dtype=torch.float64), end=1.2, integrals=0, method=method)
    assert field.beyond > 0
    assert (found.y - math.exp(-0.01 - 30 * 0.2)).abs().max() < 1e-6


def test_max_nfe_says_how_far_it_came():
    with pytest.raises(SolverError, match=r"max_nfe = 400 is spent at t = .* of sample 1") as caught:
        run(Linear([1.0, 5000.0]), Y[:2], max_nfe=400)
    assert caught.value.sample == 1
    assert 0 < caught.value.t < 3


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [0.0, -1e-3, math.nan, math.inf, 1e-17])
def test_tolerances_that_cannot_be_met_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        run(Linear(RATES), Y, **{name: value})


@pytest.mark.parametrize("time", [-0.1, 3.1, math.nan])
def test_times_outside_are_refused(time):
    with pytest.raises(ConfigError, match="times must lie between 0 and 3"):
        run(Linear(RATES), Y, times=[1.0, time])


def test_a_time_at_which_a_step_ends_is_met():
    ends = []

    class Recording(Linear):
        def at(self, u, samples):
            ends.append(float(u[-1, 0]))
            return super().at(u, samples)

    run(Recording([1.0]), Y[:1])
    found = run(Linear([1.0]), Y[:1], times=ends)
    for time, state in zip(ends, found.states):
        assert (state - Linear([1.0]).solution(Y[:1], time)).abs().max() < 1e-6


def test_other_options_are_refused():
    with pytest.raises(ConfigError, match="method must be one of"):
        fastdiff.samplers.Adaptive(method="rk4")
    with pytest.raises(ConfigError, match="max_nfe"):
        run(Linear(RATES), Y, max_nfe=0)
