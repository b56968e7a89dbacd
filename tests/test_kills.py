"""A training that is killed goes on by the same command, to the same bits; and what a kill in the midst of a write leaves."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import soak
import torch
from processes import command, started

import fastdiff
from fastdiff import files
from fastdiff.errors import CheckpointError, ConfigError, CorruptCheckpointError
from fastdiff.networks import MLP
from fastdiff.training import checkpoint

OPTIONS = ["--steps", "60"]
RUNS = {"one": (1, OPTIONS), "two": (2, OPTIONS), "shards": (2, [*OPTIONS, "--shard"])}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The checksums of an unbroken run of one process, of two, and of two shards."""
    place = tmp_path_factory.mktemp("unbroken")
    for name, (world, options) in RUNS.items():
        soak.finish(place / name, options, world, place / "log")
    return {name: soak.sums(place / name) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_killed_twice_and_gone_on_with(name, unbroken, tmp_path):
    """Killed as soon as its checkpoint has reached a step, on a machine of any speed; a run that ends before that is another."""
    world, options = RUNS[name]
    chance = random.Random(world)
    for attempt in range(5):
        life = soak.Life(tmp_path / f"run{attempt}", options, world, chance)
        if all(life.killed(lambda life=life, step=step: life.saved() >= step) for step in (5, 25)):
            break
    assert life.kills == 2
    soak.finish(life.folder, options, world, life.log)
    life.check_end(unbroken[name])
    log = [line for line in life.log.read_text().splitlines() if "process" in line]
    assert all(re.search(r"process \d of 2 ended, or hangs, in step \d+", line) for line in log)


@pytest.mark.slow
def test_under_torchrun_a_killed_worker_ends_the_run_and_the_same_command_goes_on(unbroken, tmp_path):
    given = [*soak.TRAIN, *OPTIONS, "--out", str(tmp_path / "run")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "fastdiff", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(torchrun, stderr=subprocess.PIPE, text=True, env=environment) as run:
        while not (tmp_path / "run" / soak.FILE).exists():
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.001)
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(run.pid)], capture_output=True, text=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        said = run.stderr.read()
    assert run.returncode != 0
    assert 0 < checkpoint.saved_step(tmp_path / "run" / soak.FILE) < 60, said
    again = subprocess.run(torchrun, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("step 60") == 1  # one process speaks
    assert soak.sums(tmp_path / "run") == unbroken["two"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_ends_all_with_one_checkpoint(number, unbroken, tmp_path):
    given = [*soak.TRAIN, "--steps", "60", "--out", tmp_path / "run"]
    processes = command(*given, world=2, log=tmp_path / "log")
    while not (tmp_path / "run" / soak.FILE).exists():
        time.sleep(0.001)
    os.kill(processes[1].pid, number)
    os.kill(processes[1].pid, number)  # as a terminal and torchrun both send it
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [143, 128 + number]
    step = checkpoint.saved_step(tmp_path / "run" / soak.FILE)
    assert 0 < step < 60
    assert f"SIGTERM: saved at step {step}; the same command goes on" in (tmp_path / "log").read_text()
    soak.finish(tmp_path / "run", OPTIONS, 2, tmp_path / "log")
    assert soak.sums(tmp_path / "run") == unbroken["two"]


# --- in the midst of a write -----------------------------------------------------------------------------------------

CALLS = ("open", "fsync", "replace", "unlink", "link", "chmod", "close")


def model(value):
    net = MLP((2,), hidden=8)
    for p in net.parameters():
        torch.nn.init.constant_(p, value)
    return fastdiff.ScoreModel(net, "vp", "edm", data_shape=(2,))


def written_until(folder, nth, act):
    """Save, with `act` at the nth call to the system that has to do with files; True where there was none."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:
                act()
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(checkpoint.tensor_file, "_pieces", counted(checkpoint.tensor_file._pieces))  # of each tensor
        fastdiff.save(model(2.0), folder / checkpoint.FILE)
        checkpoint.keep_last(folder, 2, 1)
    return calls < nth


def killed_at(folder, nth):
    raise SystemExit(not written_until(folder, nth, lambda: os.kill(os.getpid(), signal.SIGKILL)))


def weights(path):
    return {float(value) for p in fastdiff.load(path).net.parameters() for value in p.detach().flatten()}


def before(folder):
    folder.mkdir()
    fastdiff.save(model(1.0), folder / checkpoint.FILE)
    checkpoint.keep_last(folder, 1, 1)


def test_a_kill_at_any_call_to_the_system_leaves_a_good_checkpoint(tmp_path):
    for nth in range(1, 100):
        folder = tmp_path / str(nth)
        before(folder)
        process = started(killed_at, folder, nth)
        process.join()
        assert weights(folder) in ({1.0}, {2.0})
        numbered = list(folder.glob("step-*"))
        assert numbered  # the last one goes once the next is safe
        assert all(weights(path) in ({1.0}, {2.0}) for path in numbered)
        files.check_writable("checkpoint", folder / checkpoint.FILE)  # as a training that goes on begins
        assert not list(folder.glob(".*"))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert nth > 15
    assert [path.name for path in folder.glob("step-*")] == ["step-000000002.safetensors"]
    assert weights(folder) == {2.0}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_at_any_call_leaves_a_good_checkpoint(code, tmp_path):
    def fail():
        raise OSError(code, os.strerror(code))

    for nth in range(1, 100):
        folder = tmp_path / str(nth)
        before(folder)
        try:
            done = written_until(folder, nth, fail)
        except CheckpointError:
            done = False
        assert weights(folder) in ({1.0}, {2.0})
        assert list(folder.glob("step-*"))
        if done:
            break
    assert nth > 15


def test_the_order_of_a_write_outlives_a_power_cut(tmp_path, monkeypatch):
    """The file is flushed before it takes the other's place, its folder after."""
    said = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (said.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (said.append("replace"), replace(*paths)))
    fastdiff.save(model(1.0), tmp_path / checkpoint.FILE)
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/\.fastdiff-.*\.tmp", said[0])
    assert said[1:] == ["replace", str(tmp_path)]


# --- the last checkpoints by their steps -----------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False], ids=["by links", "by copies"])
def test_the_last_checkpoints_stay_by_their_steps(links, tmp_path, monkeypatch):
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    data = fastdiff.Data(torch.randn(50, 2).clamp(-4, 4), range=(-4, 4))
    given = {"batch_size": 4, "checkpoint": tmp_path, "checkpoint_every": 2, "progress": False, "warmup": 0}
    fastdiff.train(model(0.1), data, steps=7, keep=3, **given)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == [f"step-{step:09d}.safetensors" for step in (4, 6, 7)]
    assert (tmp_path / names[-1]).read_bytes() == (tmp_path / checkpoint.FILE).read_bytes()
    assert [checkpoint.saved_step(tmp_path / name) for name in names] == [4, 6, 7]
    # from an earlier one by hand: what came after it goes, and comes again as it was
    later = (tmp_path / names[-1]).read_bytes()
    (tmp_path / checkpoint.FILE).write_bytes((tmp_path / names[0]).read_bytes())
    fastdiff.train(model(0.1), data, steps=7, keep=2, **given)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == names[1:]
    assert (tmp_path / names[-1]).read_bytes() == later
    fastdiff.train(model(0.1), data, steps=2, keep=2, resume=False, **given)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000002.safetensors"]
    with pytest.raises(ConfigError, match="keep=2 must have a directory"):
        fastdiff.train(model(0.1), data, steps=7, keep=2)
    with pytest.raises(ConfigError, match="keep must be an integer >= 1"):
        fastdiff.train(model(0.1), data, steps=7, keep=0, checkpoint=tmp_path)


@pytest.mark.parametrize("links", [True, False], ids=["by links", "by copies"])
@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(how, links, tmp_path, monkeypatch):
    """By links the damage is in the last one by its step too."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    data = fastdiff.Data(torch.randn(50, 2).clamp(-4, 4), range=(-4, 4))
    given = {"batch_size": 4, "checkpoint": tmp_path, "checkpoint_every": 2, "progress": False, "warmup": 0}
    fastdiff.train(whole := model(0.1), data, steps=8, **{**given, "checkpoint": tmp_path / "whole"})
    fastdiff.train(model(0.1), data, steps=6, keep=2, **given)
    last = tmp_path / checkpoint.FILE
    content = bytearray(last.read_bytes())
    content[-1] ^= how == "changed"
    last.write_bytes(content[: len(content) // 2] if how == "cut" else content)  # in place, as a disk does
    if how == "missing":
        last.unlink()
    what = "missing" if how == "missing" else "damaged"
    step = 4 if links and how != "missing" else 6
    with pytest.warns(
        UserWarning,
        match=rf"safetensors is {what}, and the run goes on from .*step-0*{step}\.safetensors, of step {step}",
    ):
        fastdiff.train(again := model(0.1), data, steps=8, keep=2, **given)
    assert all(torch.equal(a, b) for a, b in zip(again.net.parameters(), whole.net.parameters()))
    assert [checkpoint.saved_step(path) for path in checkpoint.checkpoints(tmp_path)] == [8, 8, 6]
    for path in checkpoint.checkpoints(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(CorruptCheckpointError, match=re.escape(checkpoint.FILE) + ".*whole: .*give resume=False"):
        fastdiff.train(model(0.1), data, steps=9, keep=2, **given)
