"""The commands, as real processes; and the demo, made small, to its pictures and report."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff import cli, demo, native


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fastdiff.cli", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def test_train_sample_and_plan(tmp_path):
    data = np.random.default_rng(0).uniform(-1, 1, (40, 2)).astype(np.float32)
    np.save(tmp_path / "data.npy", data)
    first = run("train", "data.npy", "--out", "run", "--steps", 5, "--batch-size", 8, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "step 5" in first.stdout
    again = run("train", "data.npy", "--out", "run", "--steps", 8, "--batch-size", 8, cwd=tmp_path)
    assert "step 8" in again.stdout
    drawn = run("sample", "run", "--steps", 4, "-n", 3, "--out", "x.npy", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    model = fastdiff.load(tmp_path / "run")
    assert model.data_range == (float(data.min()), float(data.max()))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), fastdiff.sample(model, steps=4, num_samples=3).numpy())
    planned = run("plan", "vp", 5, "--plot", tmp_path / "plan.png")
    assert planned.stdout.strip() == fastdiff.plan("vp", 5).explain()
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize("loss", fastdiff.losses.LOSSES)
def test_every_loss_is_trained(loss, tmp_path, capsys):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).uniform(-1, 1, (40, 2)))
    data, out = str(tmp_path / "data.npy"), str(tmp_path / "run")
    assert cli.main(["train", data, "--out", out, "--steps", "2", "--batch-size", "8", "--loss", loss]) == 0
    assert "step 2" in capsys.readouterr().out


def test_doctor_says_which_backend_serves_what():
    shown = run("doctor").stdout
    for words in (
        "cpu  float32   cpu: every",
        "cpu  float64   cpu: every",
        "cuda float64   reference",
        "dsm_loss",
        native.instruction_set,
        "CUDA graphs need a CUDA device" if not torch.cuda.is_available() else "CUDA graphs on CUDA tensors",
    ):
        assert words in shown
    assert "STALE" not in shown
    assert len(shown.splitlines()) < 12


def without_a_library(code, tmp_path, **environment):
    """Run Python with a fastdiff whose library is missing."""
    environment = {**os.environ, "FASTDIFF_LIBRARY": str(tmp_path / "nothing.so"), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_without_the_library_everything_runs_on_plain_pytorch_and_says_so_once(tmp_path):
    code = (
        "import fastdiff, fastdiff.cli; "
        "x, info = fastdiff.sample(lambda x, t: -x, 'vp', 4, shape=(3,), num_samples=2, return_info=True); "
        "print(info.backend, x.tolist()); fastdiff.cli.main(['doctor'])"
    )
    done = without_a_library(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "without a C++ compiler" in done.stderr
    assert "nothing.so does not exist" in done.stderr
    expected = fastdiff.sample(lambda x, t: -x, "vp", 4, shape=(3,), num_samples=2)
    assert done.stdout.startswith(f"reference {expected.tolist()}")
    assert "cpu            not available" in done.stdout
    refused = without_a_library("import fastdiff; fastdiff.normal(2, (3,), seed=0, backend='cpu')", tmp_path)
    assert "backend='cpu' cannot run here: the compiled library is missing" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "digits-v"], "digits-ve"),
        (["sample", "digits-ve", "--sde", "vp"], "use sde='ve'"),
        (["sample", "digits-ve", "--out", "x.txt"], "--out must end in .npy or .png"),
        (["sample", "digits-ve", "--out", "nowhere/x.npy"], "existing folder"),
        (["plan", "vpp"], "did you mean 'vp'"),
        (["plan", "vp", "3", "--plot", "x.foo"], "--plot must end in"),
        (["sample", "digits-ve", "-n", "0", "--out", "x.png"], "a picture needs samples"),
        (["demo", "--samples", "900"], "samples must be an integer"),
        (["demo", "--samples", "1"], "samples must be an integer"),
        (["demo", "--workers", "-1"], "workers must be an integer"),
        (["train", "digits", "--out", "/dev/null/x", "--steps", "1"], "cannot be a directory"),
        (["train", "nothing.npy", "--out", "run", "--steps", "1"], "nothing.npy"),
        (["train", "digits", "--out", "run", "--steps", "1", "--loss", "sms"], "did you mean 'ssm'"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_made_small(tmp_path):
    done = run("demo", "--out", tmp_path / "out", "--train-steps", 100, "--samples", 100)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    report = (out / "report.md").read_text()
    calls = {"VE predictor-corrector": 2000, "VP Euler-Maruyama": 1000, "sub-VP Euler-Maruyama": 1000,
             "DDPM ancestral": 1000, "NCSN annealed Langevin": 1001, "DDIM 50": 50, "Heun 18": 35}  # fmt: skip
    for job in demo.JOBS:
        cells = next(line for line in report.splitlines() if line.startswith(f"| {job.title} ")).split("|")
        assert int(cells[2]) == calls[job.title]
        assert float(cells[4]) > 0
    pictures = [f"{demo.slug(job)}.png" for job in demo.JOBS] + ["trajectory.png", "loss.png", "nearest.png"]
    for name in pictures:
        assert f"({name})" in report
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10  # not blank
    assert fastdiff.load(out / "digits-vp").process == fastdiff.VP()


def test_frechet_distance_is_the_closed_form():
    rng = np.random.default_rng(0)
    n, shift = 20_000, 0.5
    a, b = rng.normal(size=(n, 3)), rng.normal(size=(n, 3)) * [1.0, 2.0, 0.5] + [shift, 0, 0]
    assert demo.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert demo.frechet(a, b) == pytest.approx(shift**2 + 1.0 + 0.25, rel=0.05)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    assert demo.frechet(a @ rotation, b @ rotation) == pytest.approx(demo.frechet(a, b), rel=1e-9)


def test_nearest_is_brute_force():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 5)), rng.normal(size=(9, 5))
    brute = [min(np.linalg.norm(x - y) for y in b) for x in a]
    np.testing.assert_allclose(demo.nearest(a, b), brute)
