"""Samples in shards: the same files for any number of processes, and whatever was killed before."""

from __future__ import annotations

import hashlib
import json
import time

import numpy as np
import pytest
import torch
from processes import command

import fastdiff
from fastdiff.cli import commands
from fastdiff.networks import MLP, UNet

GIVEN = [
    "sample",
    "digits-vp",
    "--sampler",
    "ddim",
    "--steps",
    "2",
    "--num-samples",
    "50",
    "--shard-size",
    "16",
    "--clip",
    "data",
]


def call(*given, rank=0, world=1):
    with pytest.MonkeyPatch.context() as patch:
        if world > 1:
            for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", rank)):
                patch.setenv(name, str(value))
        return commands.main([str(word) for word in given])


def contents(folder):
    assert not list(folder.glob(".*"))  # no temporary files
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder that one process draws."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert call(*GIVEN, "--out", folder) == 0
    return folder


def test_one_process_draws_what_sample_draws(alone):
    names = sorted(path.name for path in alone.glob("samples-*.npy"))
    assert [name[19:29] for name in names] == ["0000000015", "0000000031", "0000000047", "0000000049"]
    model = fastdiff.load("digits-vp")
    for name, lo in zip(names, range(0, 50, 16)):
        x = fastdiff.sample(
            model, steps=2, sampler="ddim", first_sample=lo, num_samples=min(16, 50 - lo), clip="data"
        ).numpy()
        np.testing.assert_array_equal(np.load(alone / name), x)
    manifest = json.loads((alone / "manifest.json").read_text())
    assert list(manifest["shards"]) == names
    for name, sha in manifest["shards"].items():
        assert hashlib.sha256((alone / name).read_bytes()).hexdigest() == sha
    assert manifest["run"]["seed"] == 0
    assert manifest["run"]["batch_size"] == 16


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_processes_makes_the_same_files(world, alone, tmp_path, capsys):
    for rank in reversed(range(world)):
        assert call(*GIVEN, "--out", tmp_path / "out", rank=rank, world=world) == 0
    assert contents(tmp_path / "out") == contents(alone)
    said = capsys.readouterr().out.splitlines()
    assert sum("all are there" in line for line in said) >= 1
    assert sum(int(line.split(": ")[1].split(" of ")[0]) for line in said) == 4  # each shard once


def test_threads_of_the_caller_do_not_matter(alone, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert call(*GIVEN, "--out", tmp_path / "out") == 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "out") == contents(alone)


def test_killed_in_the_midst_and_gone_on_with_by_one(tmp_path):
    """One of two processes dies by SIGKILL, then the other; one alone draws the rest."""
    given = [word if word != "50" else "640" for word in GIVEN]
    out = tmp_path / "out"
    processes = command(*given, "--out", out, world=2)
    for process, count in zip(processes, (4, 8)):
        while len(list(out.glob("samples-*"))) < count:
            assert any(p.is_alive() for p in processes)
            time.sleep(0.002)
        process.kill()
        process.join()
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("samples-*.npy")}
    assert 8 <= len(there) < 40
    assert json.loads((out / "manifest.json").read_text())["shards"] == {}
    assert call(*given, "--out", out) == 0
    assert all((out / name).stat().st_mtime_ns == when for name, when in there.items())  # what was there stays
    assert call(*given, "--out", tmp_path / "alone") == 0
    assert contents(out) == contents(tmp_path / "alone")


def test_what_is_missing_or_damaged_is_drawn_again(alone, tmp_path):
    out = tmp_path / "out"
    assert call(*GIVEN, "--out", out, rank=0, world=2) == 0  # shards 0 and 2, no checksums yet
    first, third = sorted(out.glob("samples-*.npy"))
    first.write_bytes(first.read_bytes()[:-4])
    third.write_bytes(b"")
    assert call(*GIVEN, "--out", out) == 0
    assert contents(out) == contents(alone)
    raw = bytearray(first.read_bytes())
    raw[-1] ^= 1
    first.write_bytes(raw)
    third.unlink()
    assert call(*GIVEN, "--out", out) == 0
    assert contents(out) == contents(alone)


def test_another_machines_numbers_are_not_mixed_in(alone, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(*GIVEN, "--out", out) == 0
    path = out / "manifest.json"
    manifest = json.loads(path.read_text())
    name = min(manifest["shards"])
    manifest["shards"][name] = "0" * 64
    path.write_text(json.dumps(manifest))
    before = contents(out)
    assert call(*GIVEN, "--out", out) == 2
    assert "whose numbers differ from this one's" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--seed", "1"], "holds samples of --seed 0, and this run has 1: choose another folder"),
        (["--steps", "3"], "holds samples of --steps 2, and this run has 3"),
        (["--sampler", "heun"], "holds samples of --sampler ddim, and this run has 'heun'"),
        (["--num-samples", "51"], "holds samples of --num-samples 50, and this run has 51"),
        (["--shard-size", "17"], "holds samples of --shard-size 16"),
        (["--batch-size", "8"], "holds samples of --batch-size 16, and this run has 8"),
        (["--threads", "2"], "holds samples of --threads 1, and this run has 2"),
        (["--first-sample", "1"], "holds samples of --first-sample 0"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(change, said, alone, capsys):
    before = contents(alone)
    assert call(*GIVEN, "--out", alone, *change) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert contents(alone) == before


def test_another_model_in_the_same_folder_is_refused(alone, capsys):
    assert call(*[word.replace("digits-vp", "digits-subvp") for word in GIVEN], "--out", alone) == 2
    assert "holds samples of model_sha256=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--out", "x.npy", "--shard-size", "4"], "--out must be a folder with --shard-size 4, got x.npy"),
        (["--out", "x.txt"], "--out must end in .npy or .png, or be a folder, a name without an ending, got x.txt"),
        (["--out", "new", "-n", "0"], "--num-samples must be an integer >= 1"),
        (["--out", "new", "--sampler", "dimm"], "did you mean 'ddim'?"),
        (["--out", "file"], "--out file cannot be a folder"),
        (["--out", "foreign"], "holds samples without a manifest.json"),
        (["--out", "broken"], "is no manifest of samples"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for name, inside in (("foreign", "samples-0000000000-0000000001.npy"), ("broken", "manifest.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).write_text("{")
    assert call("sample", "digits-vp", "--steps", "2", *given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_several_processes_need_a_folder(tmp_path, capsys):
    assert call("sample", "digits-vp", "--steps", "2", "--out", tmp_path / "x.npy", rank=1, world=2) == 2
    assert "--out must be a folder for 2 processes to draw into" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "world"), [(2, 2), ("one", 2), (0, 0), (-1, 2)])
def test_ranks_that_cannot_be_are_refused(rank, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    assert call(*GIVEN, "--out", tmp_path / "out") == 2
    assert "RANK, WORLD_SIZE and LOCAL_RANK must be" in capsys.readouterr().err


def test_labels_and_conditions_go_with_their_samples(tmp_path):
    torch.manual_seed(0)
    net = UNet((1, 4, 4), channels=8, blocks=1, num_classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    model = fastdiff.ScoreModel(net, "vp", "edm", data_shape=(1, 4, 4), num_classes=3)
    fastdiff.save(model, tmp_path / "model.safetensors")
    given = [
        "sample",
        tmp_path / "model.safetensors",
        "--sampler",
        "ddim",
        "--steps",
        "2",
        "-n",
        "7",
        "--labels",
        "2,0,1",
    ]
    assert call(*given, "--out", tmp_path / "labels", "--shard-size", "4", "--batch-size", "1") == 0
    found = np.concatenate([np.load(path) for path in sorted((tmp_path / "labels").glob("samples-*.npy"))])
    labels = torch.tensor([2, 0, 1, 2, 0, 1, 2])
    wanted = fastdiff.sample(model, steps=2, sampler="ddim", num_samples=7, batch_size=1, cond=labels).numpy()
    np.testing.assert_array_equal(found, wanted)


def test_conditions_of_a_file_go_with_their_samples(tmp_path, capsys):
    torch.manual_seed(0)
    net = MLP((2,), hidden=16, cond_shape=(3,))
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    model = fastdiff.ScoreModel(net, "vp", "edm", data_shape=(2,))
    fastdiff.save(model, tmp_path / "model.safetensors")
    cond = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    np.save(tmp_path / "cond.npy", cond)
    given = [
        "sample",
        tmp_path / "model.safetensors",
        "--steps",
        "2",
        "--sampler",
        "ddim",
        "--cond",
        tmp_path / "cond.npy",
    ]
    given += ["--out", tmp_path / "out", "--shard-size", "4", "--batch-size", "1"]
    assert call(*given) == 0
    found = np.concatenate([np.load(path) for path in sorted((tmp_path / "out").glob("samples-*.npy"))])
    wanted = fastdiff.sample(
        model, steps=2, sampler="ddim", num_samples=7, batch_size=1, cond=torch.from_numpy(cond)
    ).numpy()
    np.testing.assert_array_equal(found, wanted)
    np.save(tmp_path / "cond.npy", cond[::-1].copy())
    assert call(*given) == 2
    assert "holds samples of cond_sha256=" in capsys.readouterr().err
    assert call(*given, "-n", "6") == 2
    assert "cond must have an entry for each of --num-samples 6 samples, got 7" in capsys.readouterr().err


def test_a_process_has_the_gpu_of_its_number(monkeypatch):
    from fastdiff.training.ranks import launched

    assert launched().device("cuda") == "cuda"
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert launched() == (5, 8, 1)
    assert launched().device("cuda") == "cuda:1"
    assert launched().device("cuda:3") == "cuda:3"
    assert launched().device("cpu") == "cpu"
