"""Trainings that are killed at any instant, and go on: nothing is lost, and the end is that of an unbroken run, bit for bit.

python tests/soak.py [--kills 1000] [--seed 0]    (make soak)

Each training writes a checkpoint in every step, so that most kills meet a writer.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
import time
from pathlib import Path

from processes import command

from fastdiff.training import checkpoint, tensor_file

FILE = checkpoint.FILE
TRAIN = ["train", "--data", "digits", "--sde", "vp", "--network", "mlp", "--batch-size", "8", "--checkpoint-every", "1"]
TRAIN += ["--timeout", "15"]  # also for one that is killed before the others have met it


def sums(folder):
    """SHA-256 of the weights, and of the averages."""
    _, tensors = checkpoint.read(folder / FILE, "")
    return {
        part: hashlib.sha256(
            tensor_file.digest("", {k: v for k, v in tensors.items() if k.startswith(part)}).encode()
        ).hexdigest()
        for part in ("raw.", "net.")
    }


def finish(folder, options, world, log):
    """The command to its end; the options begin with --steps."""
    for process in command(*TRAIN, *options, "--out", folder, world=world, log=log):
        process.join(120)
        assert process.exitcode == 0, (process.exitcode, log.read_text())


class Life:
    """A training that is killed until it is done, by the same command over and over."""

    def __init__(self, folder, options, world, chance):
        self.folder, self.options, self.world, self.chance = folder, options, world, chance
        self.log, self.step, self.kills = folder.with_suffix(".log"), 0, 0

    def killed(self, due):
        """One call of the command, killed as soon as due() is true; False where it ended before that."""
        processes = command(*TRAIN, *self.options, "--out", self.folder, world=self.world, log=self.log)
        while not due() and any(p.is_alive() for p in processes):
            time.sleep(0.0005)
        if not any(p.is_alive() for p in processes):
            assert [p.exitcode for p in processes] == [0] * self.world, self.log.read_text()
            return False
        # all of them, or one, which the others do not outlive
        doomed = self.chance.choice([processes, *([p] for p in processes)])
        for process in doomed:
            process.kill()
        for process in processes:
            process.join(60)
            assert process.exitcode is not None, (
                f"it outlives a process that was killed: {self.log.read_text()[-2000:]}"
            )
            assert process.exitcode != 0 or self.saved() == int(self.options[1])
        self.kills += 1
        self.check()
        return True

    def saved(self):
        return checkpoint.saved_step(self.folder / FILE) if (self.folder / FILE).exists() else 0

    def check(self):
        """After a kill: the checkpoint is whole and no older than before; no more is left than what one writer had begun."""
        if (self.folder / FILE).exists():
            checkpoint.read(self.folder / FILE, "")  # raises where it is not whole
            step = self.saved()
            assert step >= self.step, (step, self.step)
            self.step = step
        else:
            assert self.step == 0
        left = list(self.folder.glob(".*"))
        assert len(left) <= 2, left  # of the checkpoint, of the metrics

    def check_end(self, wanted):
        assert sums(self.folder) == wanted
        assert not list(self.folder.glob(".*")), "temporary files"


def after(seconds):
    """Whether so many seconds have gone by since this call."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() >= deadline


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance, began, kills, lives, idle = random.Random(given.seed), time.monotonic(), 0, 0, 0
    options = ["--steps", "60", "--keep", "2"]
    with tempfile.TemporaryDirectory() as place:
        wanted, seconds = {}, {}
        for process in command("doctor"):  # the server of processes starts
            process.join()
        for world in (1, 2):
            start = time.monotonic()
            folder = Path(place) / f"unbroken{world}"
            finish(folder, options, world, folder.with_suffix(".log"))
            wanted[world], seconds[world] = sums(folder), time.monotonic() - start
        while kills < given.kills:
            world = 2 if lives % 4 == 3 else 1
            life = Life(Path(place) / f"life{lives}", options, world, chance)
            while kills < given.kills and life.killed(after(chance.uniform(0.0, 0.8 * seconds[world]))):
                before, kills = kills, kills + 1
                idle += life.step == 0
                if kills // 100 > before // 100:
                    print(f"{kills} kills, {lives} trainings, {time.monotonic() - began:.0f} s", flush=True)
            finish(life.folder, options, world, life.log)
            life.check_end(wanted[world])
            assert len(list(life.folder.glob("step-*"))) == 2
            lives += 1
    print(
        f"{kills} kills of {lives} trainings ({idle} before the first checkpoint), each of which ended with the weights and "
        f"averages of the unbroken run, in {time.monotonic() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
