"""The steps of a training, from the one that it goes on from to its last."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..errors import DataError, GraphError, warn
from ..execution import verify
from ..execution.modes import stepping
from ..files import shown
from ..model import ScoreModel
from . import checkpoint as files
from .batches import Batches
from .captured import EAGER_STEPS, CapturedStep, Passes, failed
from .objective import Batch
from .state import State
from .watch import Watch

# Steps in a row without a finite loss and gradient after which a run gives up.
MOST_SKIPPED = 10
# Between the seeds of two processes' dropout: so far apart that no step of one has that of another's.
APART = 0x4F1BBCDCBFA53E0B
# Seconds after which slow steps are saved between the checkpoints that were asked for; each of so many steps looks at the clock.
LONGEST, LOOKS = 300.0, 10


@dataclass(eq=False, repr=False)
class Run:
    """What a training's steps need, and what they leave: `recorded`, the loss of each, NaN where it was skipped, and `stopped`,
    whether `stop` ended the run.

    model      the one that is called in training, whose network is in shards or the caller's
    options    those that a checkpoint stores; described, the model's description, which it stores too
    engine     "eager" or "graph", for the reason `why`; asked, as the caller named it
    """

    model: ScoreModel
    state: State
    batches: Batches
    watch: Watch
    options: dict[str, Any]
    described: dict[str, Any]
    steps: int
    folder: Path | None
    checkpoint_every: int
    keep: int | None
    callback: Callable[[int, float], object] | None
    stop: Callable[[], object] | None
    engine: str = "eager"
    asked: str = "auto"
    why: str = ""
    stopped: bool = False

    def __post_init__(self) -> None:
        self.first = self.state.step
        self.recorded = torch.full(
            (max(self.steps - self.first, 0),), math.nan, dtype=torch.float32, device=self.batches.device
        )
        self.taken = 0  # steps of this call
        self.graphs: CapturedStep | None = None
        self.skipped, self.said = 0, False  # steps skipped in a row, until now; whether one was spoken of
        self.saved = time.monotonic()  # when, or when the run began

    def all(self, display: Any) -> None:
        """Every step to the last, or to where `stop` or the watch ends the run."""
        with stepping(self.model.net):
            self.model.net.train()
        for step in range(self.first, self.steps):
            taken = self._step(step)
            self._judge(step, taken)
            ended = self._look(step + 1)
            last = self.stopped or ended or step + 1 == self.steps
            if (step + 1) % 100 == 0 or last:
                self._tell(step, display)
            # not in the midst of skipped steps: another lr may do better with those than this one
            asked = last or (step + 1) % self.checkpoint_every == 0
            if self.folder is not None and (last or (taken and (asked or self._late(step + 1)))):
                self._save(self.folder, step + 1, asked)
            display.update()
            if last:
                break
        self._release()
        self.recorded = self.recorded[: max(self.state.step - self.first, 0)]

    def _step(self, step: int) -> bool:
        """Forward, backward, and the optimiser's step; whether it was taken."""
        state, ranks, batches, objective = self.state, self.state.ranks, self.batches, self.batches.objective
        ranks.step = step
        with stepping(self.model.net), _seeded((self.options["seed"] * 1_000_003 + step + ranks.rank * APART) % 2**63):
            parts = list(batches.parts(step, self.options["accumulate"]))
            state.constrain()
            captured = self._captured(parts)
            made = Passes(self._passes(parts), state.loss) if captured is None else captured.passes(parts)  # type: ignore[arg-type]
            seen, value = [(batch.drawn, values) for batch, values in zip(parts, made.values)], made.loss
            self.stopped = self.stop is not None and bool(self.stop())
            told = ranks.tell(made.values, batches.rows, self.stopped)
            measured = state.measure(told) if made.measured is None else made.measured
            taken = state.take(measured, None if captured is None else captured.update)
            if told is not None:  # of the whole batch
                seen, self.stopped = [(parts[0].everyones, told[:-1])], bool(told[-1])
                value = objective.mean(told[:-1], parts[0].everyones)
        if taken:
            self.taken += 1
            self.recorded[step - self.first] = value
            if objective.learns:
                objective.observe(seen)
        return taken

    def _passes(self, parts: Sequence[Batch]) -> list[Tensor]:
        """Forward, loss and backward of a step's parts; the losses of each. The step's own is then `state.loss`."""
        state, objective = self.state, self.batches.objective
        losses_of = []
        state.keep_buffers()
        for batch in parts:
            with state.computing():
                values = objective.per_sample(batch, self.model)
                value = objective.mean(values, batch.drawn)
            with losses.differentiating(self.options["loss"]):
                state.add(value / len(parts) if len(parts) > 1 else value)
            losses_of.append(values.detach())
        return losses_of

    def _captured(self, parts: Sequence[Batch]) -> CapturedStep | None:
        """The step as CUDA graphs, where the engine is of them, and once the first steps were taken."""
        if self.engine == "graph" and self.graphs is None and self.taken >= EAGER_STEPS:
            try:
                self.graphs = CapturedStep(self.state, self._passes, parts)
            except (GraphError, torch.OutOfMemoryError) as error:
                self._fall_back(error)
        return self.graphs

    def _fall_back(self, error: Exception) -> None:
        """From here on eager steps."""
        refused = verify.refusal(self.batches.device)  # of which a warning has been given
        reason = refused or failed(error)
        if self.asked == "graph":
            raise GraphError(f"{reason}: use engine='auto' or 'eager'") from error
        self.engine, self.why = "eager", f"its loop runs eagerly: {reason}"
        if not refused:
            warn(
                f"{reason}, so it runs eagerly, slower where the network is small; engine='eager' does so without this warning",
                RuntimeWarning,
            )

    def _release(self) -> None:
        """Forget the graphs."""
        if self.graphs is not None:
            self.graphs.close()
            self.graphs = None

    def _look_again(self) -> None:
        """After code of the caller's, which may have changed what a capture bakes in: then the next step is captured anew."""
        if self.graphs is not None and not self.graphs.fits():
            self._release()

    def _judge(self, step: int, taken: bool) -> None:
        """Warn of the first step that was skipped; a DataError where there are too many."""
        self.skipped = 0 if taken else self.skipped + 1
        if taken:
            return
        most = 1 if self.options["bad_step"] == "raise" else MOST_SKIPPED
        if self.skipped == most or (step + 1 == self.steps and self.skipped == self.steps - self.first):
            self.state.give_back()
            raise _nothing_finite(step, self.skipped, self.folder)
        if not self.said:
            warn(f"the loss or its gradient is not finite at step {step}: it is skipped, and so is any other such step")
        self.said = True

    def _look(self, step: int) -> bool:
        """The evaluation that is due after `step` steps; whether it ends the run, in any process."""
        if not self.watch.due(step):
            return False
        with self.state.averaged(self.watch.model):
            ended = self.watch.look(step)
        self._look_again()
        return self.state.ranks.any(ended)

    def _tell(self, step: int, display: Any) -> None:
        """The mean of the last hundred losses, to all who ask."""
        recent = float(self.recorded[: step + 1 - self.first][-100:].nanmean())
        display.set_postfix(loss=f"{recent:.4f}")
        self.watch.note(step + 1, {"loss": recent, "lr": self.state.rate(step, self.state.rate.base[0])})
        if self.callback is not None:
            self.callback(step + 1, recent)
            self._look_again()

    def _late(self, step: int) -> bool:
        """Whether the last checkpoint was long ago, by the first process's clock."""
        ranks = self.state.ranks
        return step % LOOKS == 0 and ranks.any(ranks.first and time.monotonic() - self.saved >= LONGEST)

    def _save(self, folder: Path, step: int, asked: bool) -> None:
        """asked   whether it is one of those that the caller named, which `keep` counts"""
        self.state.check_alike()
        if self.options["posthoc"] and (step % self.checkpoint_every == 0 or step == self.steps):
            self.state.write_snapshot(folder, self.described, self.options)
        # last, so that all of the step that a run goes on from is there
        self.state.write(folder / files.FILE, self.described, self.options, self.watch.config())
        if self.keep is not None and self.state.ranks.first and asked:
            files.keep_last(folder, self.state.step, self.keep)
        self.saved = time.monotonic()


def _nothing_finite(step: int, skipped: int, folder: Path | None) -> DataError:
    """Too many skipped steps in a row, or all of a call."""
    saved = None if folder is None else files.saved_step(folder / files.FILE)
    good = "the model has the weights from before them"
    if saved is not None:
        good = f"the last good checkpoint is {shown(folder / files.FILE)}, of step {saved}"  # type: ignore[operator]
    more = f" and the {skipped - 1} after it" if skipped > 1 else ""
    return DataError(
        f"the loss or its gradient is not finite at step {step + 1 - skipped}{more}: lower lr, or check the data; {good}"
    )


_generators = threading.Lock()


def _after_fork() -> None:
    """A child holds not its parent's generators."""
    global _generators
    _generators = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _seeded(number: int) -> Iterator[None]:
    """torch's generators, of which there is one for all threads and from which networks draw (dropout), seeded for one step and
    given back after it; one training at a time."""
    with _generators, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        if torch.accelerator.is_available():
            torch.manual_seed(number)
        else:  # which without a device spends a hundred times as long on notes for later devices
            torch.default_generator.manual_seed(number)
        yield
