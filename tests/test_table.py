"""The waist: a table validates itself, and reads well."""

from __future__ import annotations

import math

import numpy as np
import pytest

import fastdiff
from fastdiff.errors import ConfigError
from fastdiff.table import Level, Measure, Row, StepTable

LEVEL = Level(0.5, 0.8, 0.6)


def table(*rows, clip=None):
    return StepTable("test", rows, LEVEL, 1.0, clip)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "at least one row"),
        ([Row(LEVEL, "r", math.nan)], "not finite"),
        ([Row(LEVEL, "r", 1.0, calls_network=True)], "not finite"),  # no network time
        ([Row(LEVEL, "r", 1.0, e=1.0)], "base"),
        ([Row(LEVEL, "r", 1.0, b=(1.0,))], "reads 1 predictions, 0 exist"),
        ([Row(LEVEL, "r", 1.0, b=(1.0, 1.0), calls_network=True, network_time=0.0)], "reads 2 predictions, 1 exist"),
        ([Row(LEVEL, "r", 1.0, keeps_prediction=True)], "does not call"),
        ([Row(LEVEL, "r", 1.0, measure=Measure("batch", 1.0, 1.0))], "measures"),
        ([Row(LEVEL, "r", 1.0, b=(1.0,), calls_network=True, clips=True, network_time=0.0)], "no range"),
        ([Row(LEVEL, "r", 1.0, b=(1.0,), calls_network=True, keeps_prediction=True, network_time=0.0)] * 5
         + [Row(LEVEL, "r", 1.0, b=(1.0,) * 5)], "at most 4"),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused(rows, match):
    with pytest.raises(ConfigError, match=match):
        table(*rows)


def test_facts_are_derived():
    first = Row(
        LEVEL, "one", 1.0, b=(0.5,), calls_network=True, keeps_prediction=True, saves_base=True, network_time=1.0
    )
    second = Row(LEVEL, "two", 0.0, b=(0.5, 0.5), e=1.0, c=0.1, calls_network=True, network_time=1.0)
    facts = table(first, second)
    assert (facts.calls, facts.history, len(facts), facts.couples_batch) == (2, 2, 2, False)
    np.testing.assert_array_equal(facts.columns["b"], [[0.5, 0.0], [0.5, 0.5]])
    measured = Row(LEVEL, "m", 1.0, b=(0.0,), calls_network=True, network_time=1.0, measure=Measure("batch", 1.0, 1.0))
    assert table(measured).couples_batch


def test_explain_is_readable():
    corrector = fastdiff.samplers.PredictorCorrector(corrector="langevin", norm="sample")
    text = fastdiff.plan("subvp", 100, sampler=corrector, prediction="eps", clip=(-1, 1)).explain()
    lines = text.splitlines()
    assert "200 rows, 200 network calls, 199 draws, x0 clipped to [-1, 1]" in lines[1]
    assert lines[4].split()[:4] == ["row", "label", "t", "sigma"]
    assert len(lines) < 35  # the middle of a long table is left out
    assert "176 rows" in text
    assert "δ = 0.04" in text
    assert "clip(" in text
    assert len(fastdiff.plan("vp", 100).explain(limit=None).splitlines()) == 105
    heun = fastdiff.plan("edm", 2).explain()
    assert "base <- x; push" in heun
    assert "h1" in heun


def test_plot_draws_a_picture(tmp_path):
    figure = fastdiff.plan("vp", 20).plot(str(tmp_path / "table.png"))
    assert (tmp_path / "table.png").stat().st_size > 10_000
    assert len(figure.axes) == 2


def test_planning_is_cached_and_hashable():
    assert fastdiff.plan("vp", 77) is fastdiff.plan("vp", 77)
    assert fastdiff.plan("vp", 77) is fastdiff.plan(fastdiff.VP(), 77)
    assert fastdiff.plan("vp", 77) is not fastdiff.plan("vp", 77, denoise=False)
