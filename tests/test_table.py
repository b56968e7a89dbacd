"""The waist: a table validates itself, and reads well."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import fastdiff
from fastdiff.errors import ConfigError
from fastdiff.planning.tableaus import METHODS
from fastdiff.table import COLUMNS, Level, Measure, Row, StepTable, Tableau

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
    silent = Row(LEVEL, "three", 1.0, b=(0.25,))
    facts = table(first, second, silent)
    assert (facts.calls, facts.memory, len(facts), facts.couples_batch) == (2, 1, 3, False)
    assert facts.times == (1.0, 1.0, 0.0)
    measured = Row(LEVEL, "m", 1.0, b=(0.0,), calls_network=True, network_time=1.0, measure=Measure("batch", 1.0, 1.0))
    assert table(measured).couples_batch


def test_the_matrix_holds_each_number_in_its_column():
    level, after, clip = Level(1.0, 0.6, 0.8), Level(0.9, 0.7, 0.71), (-1.0, 2.0)
    numbers = {"a": 1.5, "e": 0.3, "b0": 0.1, "b1": 0.2, "c": 0.4, "p": 0.5, "q": 0.6}
    opening = Row(LEVEL, "opens", 1.0, calls_network=True, keeps_prediction=True, saves_base=True, network_time=1.0)
    row = Row(
        level, "all", 1.5, (0.1, 0.2), 0.3, 0.4, calls_network=True, clips=True, network_time=7.0, in_scale=3.0, p=0.5, q=0.6,
        measure=None, log_variance=(-3.0, -1.0),
    )  # fmt: skip
    plain = Row(after, "plain", 1.0, b=(0.9,), in_scale=11.0, calls_network=True, network_time=2.0)
    measured = Row(LEVEL, "m", 1.0, b=(0.0,), calls_network=True, network_time=1.0, measure=Measure("batch", 0.2, 0.8))
    first, second, third, last = (
        dict(zip(COLUMNS, line)) for line in table(opening, row, plain, measured, clip=clip).matrix.tolist()
    )
    assert second == numbers | {
        "b2": 0.0, "b3": 0.0, "low": -1.0, "high": 2.0, "next_scale": 11.0, "guidance": 1.0, "gain": 0.0, "cap": 0.0,
        "log_slope": 0.5, "log_mid": -1.0, "known_alpha": 0.7, "known_sigma": 0.71,
    }  # fmt: skip
    assert (first["next_scale"], first["known_alpha"], first["known_sigma"]) == (3.0, 0.6, 0.8)
    assert (third["low"], third["high"]) == (-math.inf, math.inf)  # a row that does not clip
    assert (last["gain"], last["cap"], last["next_scale"]) == (0.2, 0.8, 1.0)
    assert (last["known_alpha"], last["known_sigma"]) == (LEVEL.alpha, LEVEL.sigma)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"c": (0.0, 0.5, 0.76, 1.0)}, "row 3 of a"),
        ({"c": (0.1, 0.5, 0.75, 1.0)}, "from 0 to 1"),
        ({"c": (0.0, 0.5, 0.75, 0.9)}, "from 0 to 1"),
        ({"c": (0.0, 0.5, 1.0)}, "rows a of 1, 2, … 2 numbers"),
        ({"a": ((0.5,), (0.0, 0.75), (2 / 9, 1 / 3, 4 / 9 + 1e-14))}, "row 4 of a"),
        ({"a": ((0.5,), (0.75,), (2 / 9, 1 / 3, 4 / 9))}, "rows a of"),
        ({"e": (-5 / 72, 1 / 12, 1 / 9, 1 / 8)}, "e of a tableau must sum to 0"),
        ({"e": (-5 / 72, 1 / 12, 1 / 9)}, "as many e"),
        ({"dense": (1.0, -1.0)}, "dense or none"),
        ({"dense": (1.0, -1.0, 0.5, 0.0)}, "dense of a tableau"),
        ({"e": (math.nan, 0.0, 0.0, 0.0)}, "e of a tableau"),
    ],
)
def test_a_wrong_tableau_is_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        replace(METHODS["bosh3"], **change)


def test_the_tableaus_derive_their_order():
    """Σ b c^{k−1} = 1/k for k up to the order, and for one less with b̂ = b − e."""
    for tableau in METHODS.values():
        b, c = np.array([*tableau.a[-1], 0.0]), np.array(tableau.c)
        for weights, order in ((b, tableau.order), (b - tableau.e, tableau.order - 1)):
            for k in range(1, order + 1):
                assert (weights * c ** (k - 1)).sum() == pytest.approx(1 / k, abs=1e-13)
    assert Tableau(1, (0.0, 1.0), ((1.0,),), (0.0, 0.0)).dense == ()


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


def test_arrays_of_a_table_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        fastdiff.plan("vp", 7).matrix[:] = 0.0
