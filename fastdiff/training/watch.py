"""What a training is watched by: the loss on validation data, numbers in a file, an end where nothing improves."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..errors import CheckpointError, ConfigError, short, warn
from ..execution.modes import stepping
from ..losses import times as rules
from ..losses import weights
from ..model import ScoreModel
from . import checkpoint
from .batches import Batches
from .objective import Objective

METRICS, BEST = "metrics.csv", "best.safetensors"


@dataclass
class Watch:
    """Evaluations every `every` steps by the averaged weights, in evaluation mode.

    validation   batches of validation data, whose times and noise are the same at every evaluation
    evaluate   called with (model, step); numbers that it returns by name are kept too
    patience   evaluations in a row without a lower held-out loss after which the training ends
    folder     where metrics.csv is (step, name, value), and best.safetensors, the averaged model of the lowest held-out loss
    writer     TensorBoard's, or None
    """

    model: ScoreModel
    validation: Batches | None
    every: int
    patience: int | None
    evaluate: Callable[[ScoreModel, int], Mapping[str, float] | None] | None
    folder: Path | None
    writer: Any = None
    best: float = math.inf
    best_step: int = 0
    since: int = 0

    def config(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        if self.validation is None:
            return {}
        best = self.best if math.isfinite(self.best) else None
        more = {"best": best, "best_step": self.best_step, "since": self.since}
        return {"watch": {**more, "validation": self._validated}}

    @cached_property
    def _validated(self) -> str:
        """Which validation data they are."""
        return self.validation.data.fingerprint()  # type: ignore[union-attr]

    def resume(self, header: Mapping[str, Any], step: int) -> None:
        """Go on from a checkpoint of `step`: what was noted after it is noted again."""
        was = header.get("watch") or {}
        best = was.get("best")
        if self.validation is not None and was.get("validation", self._validated) != self._validated:
            warn(
                "the validation data are not those of before: the lowest loss is counted anew, and best.safetensors with it"
            )
            was, best = {}, None
        self.best = math.inf if best is None else float(best)
        self.best_step, self.since = int(was.get("best_step", 0)), int(was.get("since", 0))
        if self.folder is None or not (self.folder / METRICS).is_file():
            return
        with open(self.folder / METRICS, newline="") as handle:
            rows = [row for row in csv.reader(handle) if len(row) == 3 and row[0].isdecimal() and int(row[0]) <= step]
        self._write(rows)

    @property
    def ended(self) -> bool:
        """Whether nothing improved for too long."""
        return self.patience is not None and self.since >= self.patience

    def _write(self, rows: list[list[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["step", "name", "value"], *rows])
        with files.replacing(self.folder / METRICS, CheckpointError) as handle:  # type: ignore[operator]
            handle.write(text.getvalue().encode())

    def note(self, step: int, numbers: Mapping[str, float]) -> None:
        """Keep numbers of a step: a line each in metrics.csv."""
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, step)
        if self.folder is None:
            return
        if not (self.folder / METRICS).is_file():
            self._write([])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([step, name, repr(float(v))] for name, v in numbers.items())
        try:
            with open(self.folder / METRICS, "a", newline="") as handle:
                handle.write(text.getvalue())
        except OSError as error:
            raise CheckpointError(
                f"{files.shown(self.folder / METRICS)} cannot be written ({files.reason(error)}): choose another directory"
            ) from error

    def close(self) -> None:
        """Write what TensorBoard's writer still holds, and end its thread."""
        if self.writer is not None:
            self.writer.close()

    def due(self, step: int) -> bool:
        return (self.validation is not None or self.evaluate is not None) and step % self.every == 0

    def look(self, step: int) -> bool:
        """Evaluate the model, which has the averaged weights and is in evaluation mode; True where the training is to end."""
        numbers: dict[str, float] = {}
        if self.validation is not None:
            numbers["validation"] = self.loss()
            better = numbers["validation"] < self.best
            self.since = 0 if better else self.since + 1
            if better:
                self.best, self.best_step = numbers["validation"], step
                if self.folder is not None:
                    checkpoint.save(self.model, self.folder / BEST)
        if self.evaluate is not None:
            numbers |= _numbers(self.evaluate(self.model, step))
        self.note(step, numbers)
        return self.ended

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss of the validation data; of the weight "learned" that of "edm", as its scale changes on the way."""
        total, count = 0.0, 0
        with stepping(self.model.net):
            for batch in self.validation.whole():  # type: ignore[union-attr]
                values = self.validation.objective.per_sample(batch, self.model)  # type: ignore[union-attr]
                total, count = total + float(values.double().sum()), count + len(values)
        return total / count


def of_validation(objective: Objective) -> Objective:
    """The objective of an evaluation: the same integral every time."""
    plain = weights.EDM() if isinstance(objective.weight, weights.Learned) else objective.weight
    return replace(objective, weight=plain, times=rules.Stratified(), truncation="hard")


def _numbers(found: Any) -> dict[str, float]:
    if found is None:
        return {}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"evaluate must return numbers by name, or None, got {short(found)}")
    try:
        return {name: float(value) for name, value in found.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"evaluate must return one number for each name, got {short(found)}: {files.reason(error)}"
        ) from error


def writer(folder: Path | None, step: int) -> Any:
    """A writer of TensorBoard's in the run's folder, which goes on from `step`: numbers of later steps, as of a run that was
    killed after its last checkpoint, are shown no more. ConfigError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard=True needs tensorboard, which is missing: pip install tensorboard") from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
