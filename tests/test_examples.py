"""The example on real data: its normal distribution and its scores against closed forms, and all of it on small made-up files."""

from __future__ import annotations

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fastdiff


@pytest.fixture
def held_out(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    return importlib.import_module("held_out")


def fields(path):
    """As the file of temperatures: 2 days to train on, a gap, a day to test."""
    rng = np.random.default_rng(0)
    day = np.arange(12) // 3
    x = 281 + 2 * rng.standard_normal((12, 1, 1)) + 0.3 * rng.standard_normal((12, 33, 49))
    station = np.stack([np.arange(25), np.arange(25) + 5], 1).astype(np.int16)
    np.savez(
        path, fields=x.astype(np.float32), split=np.array([0, 0, 2, 1])[day], hours=np.arange(12) * 8, station_ij=station,
        land=rng.uniform(size=(33, 49)) > 0.5, attribution="made up for a test",
    )  # fmt: skip


def beats(path):
    """As the file of heartbeats, 12 of a record's 14; the last of them is ventricular."""
    rng = np.random.default_rng(0)
    wave = np.exp(-0.5 * ((np.arange(256) - 128) / 5) ** 2)
    x = (1 + 0.2 * rng.standard_normal((12, 1, 1))) * wave * [[[1.0], [0.5]]] + 0.02 * rng.standard_normal((12, 2, 256))
    label = np.array(["N"] * 13 + ["V"])
    np.savez(
        path, beats=(x + 0.3).astype(np.float32), split=np.array([0] * 6 + [1] * 6), beat_label=label,
        beat_index=np.arange(2, 14), beat_sample=np.arange(14) * 360 * 60 * 2, fs=360, attribution="made up for a test",
    )  # fmt: skip


def told(held_out, monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["held_out.py", *map(str, words)])
    held_out.main()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("name", "write", "groups"), [("era5", fields, ["4 March"]), ("ecg", beats, ["minutes 10 to 15", "from minute 25"])]
)
def test_an_experiment_on_a_small_file(held_out, monkeypatch, capsys, tmp_path, name, write, groups):
    small = replace(held_out.EXPERIMENTS[name], network={"channels": 4, "multipliers": (1,), "blocks": 1})
    monkeypatch.setitem(held_out.EXPERIMENTS, name, small)
    write(tmp_path / "data.npz")
    words = [
        name,
        tmp_path / "data.npz",
        "--steps",
        2,
        "--tests",
        3,
        "--calls",
        2,
        "--model",
        tmp_path / "a.safetensors",
    ]
    lines = told(held_out, monkeypatch, capsys, *words, "--picture", tmp_path / "a.png")
    assert lines[0].startswith("trained on 6 samples")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[:2] for row in rows[1:]] == [
        [group, who] for group in ["all", *groups] for who in ("the model's", "a normal distribution's")
    ]
    assert all(math.isfinite(float(value)) for row in rows[1:] for value in row[2:])
    assert lines[-1] == "made up for a test"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    # the model of the file gives the same draws, and is not trained again
    again = told(held_out, monkeypatch, capsys, *words)
    assert not again[0].startswith("trained")
    assert [line for line in again if line.startswith("|")] == [line for line in lines if line.startswith("|")]
    assert fastdiff.load(tmp_path / "a.safetensors").standardize is not None


def test_what_the_experiments_read(held_out, tmp_path):
    fields(tmp_path / "fields.npz")
    beats(tmp_path / "beats.npz")
    samples = held_out.temperatures(tmp_path / "fields.npz")
    assert samples.train.shape == (6, 1, 32, 48)
    assert samples.test.shape == (3, 1, 32, 48)
    assert samples.seen.sum() == 25
    assert samples.seen[0, 3, 8]  # the fourth station
    random = held_out.temperatures(tmp_path / "fields.npz", 40)
    assert random.seen.sum() == 40
    assert (random.seen & random.outline).sum() == 20
    samples = held_out.heartbeats(tmp_path / "beats.npz")
    assert samples.test.shape == (5, 2, 256)  # without the ventricular one
    assert samples.seen[0].all()
    assert not samples.seen[1].any()
    assert np.allclose(np.median(samples.train, 2), 0, atol=1e-6)


def test_refused_options(held_out, monkeypatch, capsys, tmp_path):
    beats(tmp_path / "data.npz")
    for words, message in (
        (("--draws", 20), "--draws must be 19, 39, 59, …"),
        (("--tests", 0), "--tests must be at least 1, got 0"),
        (("--model", "ecg.pt"), "--model must end in .safetensors, got ecg.pt"),
    ):
        with pytest.raises(SystemExit):
            told(held_out, monkeypatch, capsys, "ecg", tmp_path / "data.npz", *words)
        assert message in capsys.readouterr().err
    net = fastdiff.networks.MLP((3,))
    fastdiff.save(fastdiff.ScoreModel(net, "vp", data_shape=(3,)), tmp_path / "other.safetensors")
    with pytest.raises(SystemExit, match=r"is of samples of \(3,\), and ecg's are of \(2, 256\)"):
        told(held_out, monkeypatch, capsys, "ecg", tmp_path / "data.npz", "--model", tmp_path / "other.safetensors")


def test_the_normal_distribution(held_out):
    """Of full rank and of a low one, its draws' moments against the posterior's by the textbook formula."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 4)) @ rng.standard_normal((4, 4)) + [1.0, 2.0, -1.0, 0.0]
    seen, noise_std, y = np.array([True, False, True, False]), 0.4, np.array([[0.3, -0.5], [2.0, 1.0]])
    values, vectors = np.linalg.eigh(np.cov(x.T))
    for rank in (1, 2, 4):
        covariance = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        covariance[np.diag_indices(4)] = x.var(0, ddof=1)
        precision = np.linalg.inv(covariance) + np.diag(seen / noise_std**2)
        exact = np.linalg.inv(precision)
        draws = held_out.Normal(x, rank).given(seen, y, noise_std, 100_000, np.random.default_rng(1))
        for each, measured in zip(draws, y):
            there = np.zeros(4)
            there[seen] = measured / noise_std**2
            mean = exact @ (np.linalg.inv(covariance) @ x.mean(0) + there)
            assert np.allclose(each.mean(0), mean, atol=5 * np.sqrt(exact.diagonal().max() / 100_000))
            assert np.allclose(np.cov(each.T), exact, atol=5 * exact.max() * (2 / 100_000) ** 0.5)


@pytest.mark.parametrize("count", [19, 39])
def test_the_scores(held_out, count):
    """Of a normal truth and normal draws s times as wide: E CRPS = √(1 + s²)·√(2/π) − s/√π; exact draws hold 90 %."""
    rng, n = np.random.default_rng(0), 100_000
    for s in (1.0, 0.5, 2.0):
        truth, draws = rng.standard_normal((n, 1)), s * rng.standard_normal((n, count, 1))
        found = held_out.scored(truth, draws)
        assert found.crps == pytest.approx(((1 + s**2) * 2 / math.pi) ** 0.5 - s / math.pi**0.5, abs=0.008)
        assert found.rmse == pytest.approx((1 + s**2 / count) ** 0.5, abs=0.01)
        order = np.sort(draws[:, :, 0], 1)
        low, high = order[:, (count + 1) // 20 - 1], order[:, -((count + 1) // 20)]
        assert found.width == pytest.approx((high - low).mean())
        if s == 1.0:
            assert found.within == pytest.approx(0.9, abs=5 * (0.09 / n) ** 0.5)
        else:  # the truth's own distribution between the ends
            phi = np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))
            assert found.within == pytest.approx((phi(high) - phi(low)).mean(), abs=5 * (0.25 / n) ** 0.5)
    # of draws of 0 and 2, a truth of 1: the definition, pair by pair
    draws = np.array([0.0] * 10 + [2.0] * 9)
    exact = 1 - 0.5 * np.abs(draws[:, None] - draws).sum() / (19 * 18)
    assert held_out.scored(np.ones((1, 1)), draws[None, :, None]).crps == pytest.approx(exact)


def test_colours_on_a_small_file(monkeypatch, capsys, tmp_path):
    """Pictures of one colour and its shades, whose grey values the draws keep."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    colors = importlib.import_module("colors")
    shade = np.random.default_rng(0).integers(40, 256, (40, 16, 16, 1))
    np.savez(tmp_path / "x.npz", x=(shade * [1.0, 0.5, 0.25]).astype(np.uint8))
    words = ["--steps", "3", "--tests", "2", "--draws", "4", "--calls", "4", "--shown", "2"]
    colors.main(
        [
            str(tmp_path / "x.npz"),
            *words,
            "--model",
            str(tmp_path / "m.safetensors"),
            "--picture",
            str(tmp_path / "p.png"),
        ]
    )
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert [float(cell) > 0 for cell in cells[2:5]] == [True] * 3
    assert float(cells[5]) < 1e-4
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert fastdiff.load(tmp_path / "m.safetensors").data_shape == (3, 16, 16)
