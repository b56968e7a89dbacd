"""Changes of variables of the probability-flow ODE: the variables' inverses, and the slopes against differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.errors import ConfigError
from fastdiff.planning.ode_variables import FORMS, VARIABLES, OdeVariables
from fastdiff.planning.processes import PROCESSES, get

EVERY = [(name, variable, form) for name in PROCESSES for variable in VARIABLES for form in FORMS]


def times(process):
    """Some inside, none at a chain's whole step, where log α has a corner."""
    if process.discrete:
        return np.array([1.4, 2.7, 0.53 * process.T + 0.21, process.T - 0.3])
    return np.array([max(process.t_min, 1e-3), 0.03, 0.3, 0.9]) * (process.T if process.name == "edm" else 1)


@pytest.mark.parametrize(("name", "variable", "form"), EVERY)
def test_point(name, variable, form):
    """t, α, σ and s are the process's at u(t), and the slopes those of α/s and σ/s; arrays and tensors alike."""
    process = get(name)
    variables = OdeVariables(process, variable, form)
    t = times(process)
    u = np.array([variables.of_time(float(value)) for value in t])
    assert (np.diff(u) > 0).all() or (np.diff(u) < 0).all()
    point = variables.point(u)
    alpha, sigma = process.alpha(t), process.sigma(t)
    root = np.sqrt(alpha**2 + sigma**2 / variables.c**2)
    scale = {"x": np.ones(4), "eps": alpha, "x0": sigma, "v": root}[form]
    for found, wanted in zip(point[:4], (t, alpha, sigma, scale)):
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
    h = 1e-6 * np.maximum(np.abs(u), 1e-3)
    there, back = variables.point(u + h), variables.point(u - h)
    for slope, of in zip(point.slopes, ("alpha", "sigma")):
        difference = (getattr(there, of) / there.scale - getattr(back, of) / back.scale) / (2 * h)
        size = np.abs(point.slopes).max(0)
        assert (np.abs(slope - difference) < 1e-6 * size + 1e-9).all()
    tensors = variables.point(torch.from_numpy(u))
    for found, wanted in zip((*tensors[:4], *tensors.slopes), (*point[:4], *point.slopes)):
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-12, atol=1e-300)


def test_the_v_form_at_the_data_is_the_data():
    variables = OdeVariables(fastdiff.VP(), "asinh", "v")
    assert variables.of_time(0.0) == 0
    point = variables.point(np.array([0.0]))
    assert (point.t, point.alpha, point.scale) == (0, 1, 1)


@pytest.mark.parametrize("name", ["ddpm", "ncsn"])
def test_a_chains_time_of_a_ratio_on_tensors(name):
    process = get(name)
    t = np.concatenate([np.arange(1.0, process.T + 1), [1.5, process.T - 0.25]])
    ratio = process.sigma(t) / process.alpha(t)
    np.testing.assert_allclose(process.time(ratio), t, rtol=1e-9)
    np.testing.assert_allclose(process.time(torch.from_numpy(ratio)).numpy(), t, rtol=1e-9)
    # beyond the ends the end intervals go on
    outside = np.array([ratio.max() * 1.1])
    assert process.time(outside) > process.T
    np.testing.assert_allclose(process.time(torch.from_numpy(outside)).numpy(), process.time(outside), rtol=1e-12)


def test_names_are_refused():
    with pytest.raises(ConfigError, match="variable must be one of"):
        OdeVariables(fastdiff.VP(), "lambda", "v")
    with pytest.raises(ConfigError, match="form must be one of"):
        OdeVariables(fastdiff.VP(), "t", "score")
