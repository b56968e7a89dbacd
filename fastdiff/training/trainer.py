"""train(): Adam with warm-up, clipping and EMA on any loss of fastdiff.losses; every step is a function of the seed."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..data import LazyData
from ..data.augment import get as augment_of
from ..errors import (
    CheckpointError,
    ConfigError,
    CorruptCheckpointError,
    DeviceError,
    choose,
    names_keywords,
    short,
    warn,
)
from ..execution import modules
from ..execution.modes import leaves_no_trace, stepping
from ..execution.modules import compiled
from ..execution.monitor import bar
from ..execution.ops import ENGINES
from ..execution.torch_private import functorch_is_active
from ..files import hold, path, reason, shown
from ..model import ScoreModel
from . import averages, captured, fitting, optimisers
from . import checkpoint as files
from .batches import Batches
from .objective import VLB_WEIGHT, Objective
from .ranks import Ranks
from .run import Run
from .shards import Shards
from .shards import check as check_shards
from .state import PRECISIONS, State
from .watch import Watch, of_validation, writer

EVALUATE_EVERY = 1000  # steps, unless given
WITHOUT_HALF = ("NO AVX", "AVX2")  # processors' instruction sets, as torch names them


@dataclass(frozen=True, eq=False, repr=False)
class Training:
    """One call of `train`: the loss of each of its steps [steps], the number of the last step, its seconds, how many of the steps
    were skipped because their loss (NaN here) or its gradient was not finite, the step of the lowest validation loss, whether
    `stop` ended it, the engine that ran it, "eager" or "graph", and why."""

    loss: Tensor
    steps: int
    seconds: float
    skipped: int = 0
    best_step: int | None = None
    stopped: bool = False
    engine: str = "eager"
    why: str = ""

    def __repr__(self) -> str:
        recent = f", mean loss {self.loss[-100:].nanmean():.4g} at the end" if len(self.loss) else ""
        skipped = f", {self.skipped} of them skipped" if self.skipped else ""
        return f"Training({len(self.loss)} steps to {self.steps}{skipped}{recent}, {self.seconds:.1f} s)"


@leaves_no_trace
@names_keywords
def train(
    model: ScoreModel,
    data: Any,
    *,
    steps: int,
    loss: str = "dsm",
    weight: Any = None,
    times: Any = "stratified",
    truncation: str = "hard",
    vlb_weight: float = VLB_WEIGHT,
    probe: str | None = None,
    batch_size: int = 128,
    lr: float | None = None,
    warmup: int = 1000,
    decay: bool = False,
    grad_clip: float | None = 1.0,
    ema: float | Sequence[float] = 0.999,
    dequantize: bool = False,
    augment: Any = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    keep: int | None = None,
    resume: bool = True,
    progress: bool | None = None,
    callback: Callable[[int, float], object] | None = None,
    stop: Callable[[], object] | None = None,
    validation: Any = None,
    evaluate: Callable[[ScoreModel, int], Mapping[str, float] | None] | None = None,
    evaluate_every: int = EVALUATE_EVERY,
    patience: int | None = None,
    tensorboard: bool = False,
    group: Any = None,
    ema_rule: str = "diffusers",
    warmup_start: int = 1,
    cond_dropout: float = 0.0,
    optimizer: optimisers.Choice = "adam",
    schedule: str | Callable[[Any], Any] = "constant",
    precision: str | None = None,
    compile: bool = False,
    engine: str = "auto",
    accumulate: int = 1,
    posthoc: bool = False,
    bad_step: str = "skip",
    shard: bool = False,
) -> Training:
    """Train `model` in place up to step `steps`, and leave it with the averaged (EMA) weights, in evaluation mode.

    data          a Data, or a source of fastdiff.load_data: arrays, .npy, .npz, IDX files, folders of images, "digits"; for more
                  than memory holds a LazyData or load_data(..., lazy=True);
                  scaled from its range to the model's data_range; vectors without one are standardized, each column by its
                  mean and std, and stay in their own units. Its labels and its `cond` are the condition, as in ScoreModel, of
                  a network that takes them; `cond` is standardized too
    loss          what is matched: "dsm", "dsm_vr", the variational bound "vlb", or "hybrid" for a learned variance, with
                  `vlb_weight` of the bound; "simple" and "likelihood" are "dsm" with weight "target" and "g2"; without a
                  transition density "ism", "ssm" or "ssm_vr", the last two with `probe` "rademacher" (default) or "normal"
                  (fastdiff.losses.per_sample)
    weight        λ(t) of the squared error of ε: "sigma2" (default: 1), "g2", "one", "target", "edm", "min_snr", "p2", "learned",
                  or an object of fastdiff.losses.weights, such as MinSNR(gamma=3)
    times         "stratified" (default), "uniform", "importance" (∝ g²/σ²), "second_moment", "lognormal", or an object of
                  fastdiff.losses.times, such as LogNormal(-0.4, 1.0)
    truncation    near t = 0 of continuous processes: "hard" (default: t ≥ 1e-5), "soft" or "clamp" (fastdiff.losses.times.draw)
    optimizer     "adam" (β 0.9, 0.999, ε 1e-8), "adamw", "radam", "sgd", "muon", or a function of the trained parameters that
                  gives a torch.optim.Optimizer, or a list of them, with their options and rates
    lr, warmup    the rate, 2e-4 unless given, or that of your own optimizer; linear warm-up over `warmup` steps, step
                  n = 0, 1, … by lr·min(1, (n + warmup_start)/warmup) (`warmup_start` 0 is score_sde's)
    schedule      times "constant", "cosine" (half of one to 0 at `steps`, also `decay=True`), "linear" (to 0 at `steps`),
                  "inverse_sqrt" (√(warmup/n) from `warmup` on), or a function of the optimizer that gives one of
                  torch.optim.lr_scheduler
    ema           θ' ← m θ' + (1 − m) θ at update n = 0, 1, …; `ema_rule` "diffusers": m = min(ema, (1 + n)/(10 + n)), 0 at n = 0;
                  "score_sde": from the initial weights, m = min(ema, (2 + n)/(11 + n)); "constant": from them, m = ema.
                  Of several rates the first is the model's, and `fastdiff.load(directory, ema=)` has the others
    posthoc       keep what fastdiff.posthoc_ema makes averages of any width from: a snapshot every `checkpoint_every` steps
    precision     "bf16" or "fp16": autocast of the network and the loss, weights in float32; a float16 loss is scaled, and
                  a step whose scaled gradient overflows is taken with half the factor the next time
    compile       the network by torch.compile, for the training alone
    engine        "eager", "graph", or "auto": steps as CUDA graphs on a CUDA device where they can be captured, with the weights
                  of eager steps (docs/training.md); "graph" is refused where they cannot
    accumulate    the batch goes through the network in so many parts, and is one step
    augment       "flip", "flip_vertical", "crop", or objects of fastdiff.data.augment, in turn: random changes of each sample,
                  made anew at each step
    dequantize    add uniform noise of one bin to discrete data (Theis et al. 2016)
    cond_dropout  the share of samples whose label becomes the model's `null_label` and whose condition becomes NaN, which means
                  "none" to fastdiff's networks: so one network learns the conditional and the unconditional model (Ho &
                  Salimans 2021), and may be asked for either
    seed          data, times, noise and dropout of step n are a function of (seed, n) alone, so a resumed run gives the
                  same weights as an uninterrupted one; torch's generator is as it was after each step
    checkpoint    a directory, written atomically every `checkpoint_every` steps, where those take longer every five minutes, and
                  at the end; `fastdiff.load(directory)` gives the averaged model
    keep          also leave the last `keep` checkpoints by their steps, step-….safetensors, the oldest of which goes once the
                  new one is safe
    resume        go on from the checkpoint in that directory, which must have the same model, data, loss and seed; the other
                  options may be others, which a warning says; False overwrites it
    callback      called with (step, mean loss of the last 100 steps) every 100 steps and at the last one
    stop          asked in each step; where it says True, in any process, the run saves and ends with that step
    validation    data to evaluate the averaged weights on every `evaluate_every` steps, or the share of `data` that is held out
                  for it; a file or an array is read in the range and levels of `data`; times and noise are the same each time
    evaluate      called at each evaluation with (model, step), the model with the averaged weights in evaluation mode; numbers
                  that it returns by name are kept with the others
    patience      evaluations in a row without a lower validation loss after which the run ends
    tensorboard   also write the numbers for TensorBoard, into the directory
    group         the processes of torch.distributed that train together, each with its share of every batch: a process group,
                  None for the default one where there is one, or alone (docs/training.md)
    shard         hold weights, gradients, moments and averages in shards, one in each process of the group (torch's FSDP2): for
                  "dsm", "dsm_vr", "vlb" and "hybrid", by "adam", "adamw", "radam" or "sgd"; the model's own network gets its
                  weights at the end (docs/training.md)

    With `checkpoint` the loss of each 100 steps, the rate and the evaluations are lines of its metrics.csv (step, name, value),
    and the averaged model of the lowest validation loss is its best.safetensors.

    A step whose loss or gradient is not finite is skipped, everything as it was before it; the first is said in a warning,
    ten in a row are a DataError, or with `bad_step="raise"` the first. Networks of float16 and bfloat16 are trained by float32
    copies of their weights.
    """
    options, steps, checkpoint_every = _checked(
        {"batch_size": batch_size, "lr": lr, "warmup": warmup, "decay": decay, "grad_clip": grad_clip,
         "ema": ema, "dequantize": dequantize, "seed": seed, "ema_rule": ema_rule, "warmup_start": warmup_start,
         "schedule": schedule, "precision": precision, "accumulate": accumulate, "posthoc": posthoc, "bad_step": bad_step,
         "optimizer": optimizer, "cond_dropout": cond_dropout},
        steps, checkpoint_every,
    )  # fmt: skip
    resume, compile, shard = (
        checks.flag(name, flag) for name, flag in (("resume", resume), ("compile", compile), ("shard", shard))
    )
    choose("engine", engine, ENGINES)
    checks.function("callback", callback)
    checks.function("stop", stop)
    if functorch_is_active():
        raise ConfigError(
            "train must not be called within torch.func's transforms: call it outside of vmap, grad and jvp"
        )
    files.describe(model)
    _check_tensors([*model.net.parameters(), *model.net.buffers()])
    whole, held_out = fitting.sources(data, validation, model, options["dequantize"])
    source = whole.some if isinstance(whole, LazyData) else whole
    augmentations = augment_of(augment, model.data_shape)
    checks.function("evaluate", evaluate)
    evaluate_every = checks.integer("evaluate_every", evaluate_every, 1, 10**9)
    if evaluate_every != EVALUATE_EVERY and held_out is None and evaluate is None:
        raise ConfigError(
            f"evaluate_every={evaluate_every} has nothing to evaluate: give validation=0.1, or leave it out"
        )
    if patience is not None and held_out is None:
        raise ConfigError(f"patience={patience} needs validation data: give validation=0.1 to hold out a tenth")
    patience = None if patience is None else checks.integer("patience", patience, 1, 10**9)
    if checks.flag("tensorboard", tensorboard) and checkpoint is None:
        raise ConfigError("tensorboard=True needs a directory to write in: give checkpoint=")
    fitted, facts = fitting.fitted(model, source, options["cond_dropout"], bool(augmentations))
    described = files.describe(fitted)
    objective = Objective.of(fitted, source, options["dequantize"], loss, weight, times, truncation, probe, vlb_weight)
    objective.check_balance()
    options |= objective.options()
    options["augment"] = [each.config() for each in augmentations]
    ends = decay or schedule in ("cosine", "linear")  # such a rate depends on the end
    options |= {"data": whole.fingerprint(), "steps": steps if ends else None}
    if keep is not None:
        keep = checks.integer("keep", keep, 1, 10**9)
        if checkpoint is None:
            raise ConfigError(f"keep={keep} must have a directory for its checkpoints: give checkpoint=")
    if posthoc and checkpoint is None:
        raise ConfigError("posthoc=True must have a directory for its snapshots: give checkpoint=")
    if checkpoint is not None:
        files.as_json(described)  # refuse before the first step what could not be saved after it
    device = next(model.net.parameters()).device
    if precision is not None and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in WITHOUT_HALF:
        warn(
            f"precision={precision!r} is emulated by this processor, which has no instructions for it, and takes many times as "
            "long: leave it out"
        )
    ranks = Ranks(group, device)
    rows = ranks.rows(options["batch_size"], options["accumulate"])
    if shard:
        check_shards(model.net, ranks, objective.loss, optimizer, compile)
    used, why = captured.resolve(objective, ranks, options, steps, compile, engine)
    with (
        torch.inference_mode(False), torch.enable_grad(), _autocast(model.net), ranks,
        _current(ranks.device, shard), _directory(checkpoint, ranks.first) as folder,
    ):  # fmt: skip
        ranks.share(modules.state(model.net).values())
        shards = Shards(model.net, ranks) if shard else None
        state = State(model.net, objective, ranks, options, optimizer, schedule, steps, shards)
        options |= state.made
        more = {
            "the last step": steps,
            "checkpoint_every": checkpoint_every,
            "checkpoint": folder is None,
            "resume": resume,
            "evaluate": evaluate is not None,
            "shard": shard,
        }
        ranks.alike({**options, **more, "the model": described}, "start all with the same arguments")
        if folder is not None:
            state.check_saved()
            came_from, found = None, ranks.first and resume and bool(files.checkpoints(folder))
            if ranks.any(found):
                described, came_from = _go_on(state, folder, options, described)
            if options["posthoc"] and ranks.first:
                averages.drop_snapshots(folder, state.step)
            if keep is not None and ranks.first and came_from == folder / files.FILE:  # a kill may have come before it
                files.keep_last(folder, state.step, keep)
        state.check_alike()
        if not ranks.first:  # one process is seen and heard
            callback, progress, tensorboard = None, False, False
            evaluate = None if evaluate is None else lambda model, step: None  # it waits for the first one's
        kept = None if held_out is None else Batches(held_out, fitted, of_validation(objective), options)
        written = writer(folder, state.step) if tensorboard else None
        watch = Watch(model, kept, evaluate_every, patience, evaluate, folder if ranks.first else None, written)
        watch.resume(state.header, state.step)
        if watch.ended:
            warn(f"the run ended early, at step {state.step}: give a larger patience to go on, or resume=False")
            steps = state.step
        vars(model).update(facts)
        began, first = time.perf_counter(), state.step
        with stepping(model.net):
            modes = [(module, module.training) for module in model.modules()]
        try:
            with compiled(model.net, compile), bar(progress, steps, "train", "step", first) as display:
                batches = Batches(whole, model, objective, options, augmentations, rows)
                run = Run(
                    model if shards is None else shards.model(model), state, batches, watch, options, described, steps, folder,
                    checkpoint_every, keep, callback, stop, used, engine, why,
                )  # fmt: skip
                try:
                    run.all(display)
                finally:  # also after an error, whose traceback would keep the readers
                    batches.close()
            state.average_into(model.net)
            ranks.any(False)  # the last checkpoint is there for all
        finally:
            watch.close()
            with stepping(model.net):
                for module, training in modes:
                    module.training = training
    with stepping(model.net):
        model.eval()
    skipped, best = int(run.recorded.isnan().sum()), watch.best_step or None
    seconds = time.perf_counter() - began
    return Training(
        run.recorded.cpu(), max(state.step, first), seconds, skipped, best, run.stopped, run.engine, run.why
    )


def _go_on(
    state: State, folder: Path, options: dict[str, Any], described: dict[str, Any]
) -> tuple[dict[str, Any], Path]:
    """Go on from the latest checkpoint that is not damaged; a warning says so where that is not the last. Returns its model's
    description, and where it is."""
    damaged, last = [], folder / files.FILE
    for place in files.checkpoints(folder):
        try:
            described = state.read(place, options, described)
        except CorruptCheckpointError as error:
            damaged.append(error)
            continue
        if place != last:
            what = "damaged" if damaged else "missing"
            warn(f"{shown(last)} is {what}, and the run goes on from {shown(place)}, of step {state.step}")
        return described, place
    raise CorruptCheckpointError(
        f"{damaged[0]}; no checkpoint of the run is whole: choose another directory, or give resume=False"
    ) from damaged[0]


def _autocast(net: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The caller's autocast without its cache, which would keep the rounded weights of the first step for all others."""
    kind = next((p.device.type for p in net.parameters()), "cpu")
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


def _current(device: torch.device, shard: bool) -> contextlib.AbstractContextManager[Any]:
    """The network's GPU as torch's current one, where FSDP has its streams."""
    return torch.cuda.device(device) if shard and device.type == "cuda" else contextlib.nullcontext()


def _check_tensors(values: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, nn.parameter.UninitializedTensorMixin):
            raise ConfigError("model must have parameters of known shapes, got a lazy one: call the network once first")
        if value.is_meta:
            raise DeviceError(
                "model must hold data, got a parameter or buffer on the meta device: use net.to_empty(device=…)"
            )
        if value.is_inference():
            raise ConfigError(
                "model must not be made within torch.inference_mode, whose tensors cannot be trained: build it outside"
            )


_locks: set[int] = set()  # descriptors of directories that this process holds


def _after_fork() -> None:
    """A child does not hold its parent's directories."""
    for descriptor in _locks:
        os.close(descriptor)
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def _directory(checkpoint: str | os.PathLike[str] | None, writes: bool) -> Iterator[Path | None]:
    """The directory of a run, by the process that writes in it made, tried and held against other runs until this one ends, or
    its process does."""
    if checkpoint is None or not writes:
        yield None if checkpoint is None else path("checkpoint", checkpoint)
        return
    folder = files.directory(checkpoint)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint={shown(folder)} cannot be opened ({reason(error)}): choose another directory"
        ) from error
    _locks.add(descriptor)
    try:
        held = hold(descriptor)
        if held is False:
            raise CheckpointError(
                f"checkpoint={shown(folder)} is in use by another training: wait for its end, or choose another directory"
            )
        if held is None:
            warn(f"checkpoint={shown(folder)} cannot be locked there: see to it that no other training writes in it")
        yield folder
    finally:
        _locks.discard(descriptor)
        with contextlib.suppress(OSError):  # in a forked child it is closed
            os.close(descriptor)


def _checked(options: dict[str, Any], steps: Any, checkpoint_every: Any) -> tuple[dict[str, Any], int, int]:
    """The options as plain numbers, the steps, the interval; or a ConfigError."""
    grad_clip = options["grad_clip"]
    checked = {
        "batch_size": checks.integer("batch_size", options["batch_size"], 1, 10**7),
        "lr": _lr(options["lr"], options["optimizer"]),
        "warmup": checks.integer("warmup", options["warmup"], 0, 10**9),
        "decay": checks.flag("decay", options["decay"]),
        "grad_clip": None if grad_clip is None else checks.number("grad_clip", grad_clip, 0, above=True),
        "ema": _ema(options["ema"]),
        "ema_rule": choose("ema_rule", options["ema_rule"], averages.RULES),
        "warmup_start": checks.integer("warmup_start", options["warmup_start"], 0, 1),
        "dequantize": checks.flag("dequantize", options["dequantize"]),
        "cond_dropout": checks.number("cond_dropout", options["cond_dropout"], 0, 1, below=True),
        "seed": checks.integer("seed", options["seed"], 0, 2**64 - 1),
        "schedule": _named("schedule", options["schedule"], optimisers.SCHEDULES),
        "precision": None if options["precision"] is None else choose("precision", options["precision"], PRECISIONS),
        "accumulate": checks.integer("accumulate", options["accumulate"], 1, 10**7),
        "posthoc": checks.flag("posthoc", options["posthoc"]),
        "bad_step": choose("bad_step", options["bad_step"], ("skip", "raise")),
        "optimizer": _named("optimizer", options["optimizer"], optimisers.OPTIMIZERS),
    }
    if checked["batch_size"] % checked["accumulate"]:
        raise ConfigError(
            f"batch_size must be a multiple of accumulate={checked['accumulate']}, the number of its parts, got "
            f"{checked['batch_size']}"
        )
    if checked["decay"] and checked["schedule"] != "constant":
        raise ConfigError(f"decay=True is schedule='cosine', got schedule={checked['schedule']!r} too: leave decay out")
    return (
        checked,
        checks.integer("steps", steps, 1, 10**9),
        checks.integer("checkpoint_every", checkpoint_every, 1, 10**9),
    )


def _lr(lr: Any, optimizer: Any) -> float | None:
    """The rate, None where the caller's own optimiser has its."""
    if not callable(optimizer):
        return checks.number("lr", 2e-4 if lr is None else lr, 0, 1e6, above=True)
    if lr is not None:
        raise ConfigError(f"lr={short(lr)} must be left out with an optimizer of your own: give it that rate")
    return None


def _ema(ema: Any) -> float | list[float]:
    """The rates of the averages, the model's first."""
    rates = list(ema) if isinstance(ema, (list, tuple)) else [ema]
    checked = [checks.number("ema", rate, 0, 1, below=True) for rate in rates]
    if not checked or len(set(checked)) < len(checked):
        raise ConfigError(f"ema must be a number, or several that differ, got {short(ema)}")
    return checked if len(checked) > 1 else checked[0]


def _named(argument: str, value: Any, known: tuple[str, ...]) -> str:
    """A name of those that are known, or a function, by its own."""
    return str(getattr(value, "__name__", "")) if callable(value) else choose(argument, value, known)
