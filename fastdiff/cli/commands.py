"""The command line: `fastdiff demo | train | sample | inpaint | colorize | solve | evaluate | check | import | plan | …`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..data import Data, LazyData
    from ..model import ScoreModel

# Threads that wait should sleep: spinning ones stall each other as soon as anything else runs on the machine.
# Read once, when torch is loaded; a user's own setting wins.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def main(argv: list[str] | None = None) -> int:
    """Run one command; a wrong argument ends in one sentence and exit status 2, as does output that nobody reads in 141."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 shows α as an escape
    try:
        try:
            return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`; what is left to write is not to be tried again at the end of Python
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13


def _run(argv: list[str] | None) -> int:
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        sys.stderr.write(_unknown(arguments, unknown))
        return 2
    from .. import files
    from ..errors import FastdiffError, one_line

    as_before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: _said_of(str(message), arguments)  # who types has no line of code
    try:
        return arguments.run(arguments) or 0
    except FastdiffError as error:
        sys.stderr.write(_said_of(str(error), arguments))
        return 2
    except (OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise
        named = isinstance(error, OSError) and isinstance(error.filename, (str, os.PathLike))
        said = f"{files.shown(error.filename)}: {files.reason(error)}" if named else one_line(str(error))
        print(f"fastdiff {arguments.command}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = as_before


def _unknown(arguments: argparse.Namespace, unknown: list[str]) -> str:
    """What to say of arguments that a command does not have."""
    from ..errors import nearest, short

    names = [{"source": "from"}.get(name, name) for name in vars(arguments) if name not in ("run", "command")]
    options = [f"--{name.replace('_', '-')}" for name in names]
    near = nearest(unknown[0].partition("=")[0], options)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"fastdiff {arguments.command}: no such argument, {short(unknown[0])}{hint}: see fastdiff {arguments.command} --help\n"


def _nobody_reads() -> bool:
    """Whether the output is a pipe that was closed at its other end."""
    try:
        poll = select.poll()
        poll.register(sys.stdout, 0)
        return bool(poll.poll(0))
    except (AttributeError, OSError, TypeError, ValueError):  # no poll on this system, no output, no file behind it
        return False


def _said_of(message: str, arguments: argparse.Namespace) -> str:
    rank = os.environ.get("RANK", "") if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    process = f"process {rank}: " if rank else ""
    return f"fastdiff {arguments.command}: {process}{_in_options(message, arguments)}\n"


def _in_options(message: str, arguments: argparse.Namespace) -> str:
    """Advice of the library in the words of the command: "give size=(H, W)" as "give --size H W"."""

    def option(found: re.Match[str]) -> str:
        name, several, one = found.groups()
        if name == "resume" and "fresh" in arguments:
            return "--fresh"
        name = {"checkpoint": "out"}.get(name, name)
        if name not in arguments:
            return found[0]
        name = {"source": "from"}.get(name, name)
        if name == "clip" and several:
            return f"--clip={several.replace(' ', '')}"
        value = several.replace(",", "") if several else (one or "").strip("\"'")
        value = {"True": "", "tensor": "FILE"}.get(value, value)
        apart = " " if message[found.end() : found.end() + 1].strip(" ,.:;)") else ""  # from a value of another form
        return f"--{name.replace('_', '-')} {value}".rstrip() + apart

    return re.sub(r"(?<![-\w])([a-z_]+)=(?:\(([^()]*)\)|(\"\w+\"|'[\w+*.]+'|[\w.+/~-]+)?)", option, message)


def _demo(a: argparse.Namespace) -> None:
    from .. import files
    from . import demo

    demo.main(files.path("--out", a.out), a.train_steps, a.samples, a.steps, a.digits, a.workers, a.control)


def _sample(a: argparse.Namespace) -> None:
    from .. import checks
    from ..execution.calls import device_of, moved, picked
    from ..sampling import sample

    folder = _shards_folder(a)
    model = _model(a)
    given = None if a.cond is None else _array(a.cond, model)
    count = a.num_samples if a.num_samples is not None else 16 if given is None else len(given)
    labels = _labels(a, model, count) if a.labels is not None or model.num_classes else None
    cond, device = model.takes.joined(labels, given), device_of(None, None, model.net)

    def draw(lo: int, hi: int, batch_size: int | None) -> Any:
        of_these = cond if (lo, hi) == (0, count) else picked(cond, slice(lo, hi))
        return sample(
            model, a.sde, a.steps, sampler=a.sampler, num_samples=hi - lo, seed=a.seed, first_sample=a.first_sample + lo,
            batch_size=batch_size, grid=a.grid, clip=_clip(a.clip), t_min=a.t_min, cond=moved(of_these, device),
            guidance=a.guidance, return_info=True, progress=None if folder is None else False,
        )  # fmt: skip

    if folder is not None:
        _sample_shards(a, folder, model, count, given, lambda lo, hi, size: draw(lo, hi, size)[0].cpu().numpy())
        return
    out = _writable("--out", a.out, (".npy", ".png"))
    if out.suffix == ".png":
        from . import pictures

        pictures.check_drawable(count, model.data_shape)
    _write_samples(out, *draw(0, checks.integer("--num-samples", count, 1, 2**32), a.batch_size), model)


def _inpaint(a: argparse.Namespace) -> None:
    from ..sampling import inpaint
    from . import measurements

    out, model = _writable("--out", a.out, (".npy", ".png")), _model(a)
    known = measurements.known(a.file, model)
    mask = None if a.mask is None else measurements.mask(a.mask, model)
    several = len(known) if known.ndim > len(model.data_shape) else None
    count, options = _of_posterior(a, model, out, several)
    device = options["device"]
    drawn = inpaint(
        model, known.to(device), None if mask is None else mask.to(device), steps=a.steps, method=a.method, num_samples=count,
        **options,
    )  # fmt: skip
    _write_samples(out, *drawn, model)


def _colorize(a: argparse.Namespace) -> None:
    from ..sampling import colorize
    from . import measurements

    out, model = _writable("--out", a.out, (".npy", ".png")), _model(a)
    weights = None if a.weights is None else measurements.weights(a.weights)
    gray = measurements.gray(a.file, model, weights)
    several = len(gray) if gray.ndim > len(model.data_shape) else None
    count, options = _of_posterior(a, model, out, several)
    drawn = colorize(
        model, gray.to(options["device"]), steps=a.steps, method=a.method, weights=weights, num_samples=count, **options
    )
    _write_samples(out, *drawn, model)


def _solve(a: argparse.Namespace) -> None:
    import torch

    from .. import inverse
    from ..inverse.inpainting import method_of
    from ..sampling import posterior
    from . import measurements

    out, model = _writable("--out", a.out, (".npy", ".png")), _model(a)
    operator, channels = measurements.operator(a.operator, model)
    y = measurements.values("y", a.file, model, channels)
    several = len(y) if y.ndim > operator.A(torch.zeros((1, *model.data_shape))).ndim - 1 else None
    count, options = _of_posterior(a, model, out, several)
    problem = inverse.Problem(y.to(options["device"]), operator, a.noise_std)
    drawn = posterior(model, method_of(a.method)(problem), steps=a.steps, num_samples=count, **options)
    _write_samples(out, *drawn, model)


def _of_posterior(
    a: argparse.Namespace, model: ScoreModel, out: Path, several: int | None
) -> tuple[int, dict[str, Any]]:
    """How many samples, by default as many as are measured, and the options of their run."""
    from .. import checks
    from ..execution.calls import device_of, moved

    given = None if a.cond is None else _array(a.cond, model)
    known = a.num_samples, several, None if given is None else len(given), 16
    count = checks.integer("--num-samples", next(n for n in known if n is not None), 1, 2**32)
    if out.suffix == ".png":
        from . import pictures

        pictures.check_drawable(count, model.data_shape)
    labels = _labels(a, model, count) if a.labels is not None or model.num_classes else None
    device = device_of(None, None, model.net)
    return count, {
        "sampler": a.sampler, "grid": a.grid, "seed": a.seed, "first_sample": a.first_sample, "batch_size": a.batch_size,
        "clip": _clip(a.clip), "cond": moved(model.takes.joined(labels, given), device), "device": device,
        "guidance": a.guidance, "return_info": True,
    }  # fmt: skip


def _write_samples(out: Path, x: Tensor, info: Any, model: ScoreModel) -> None:
    """The samples as an array or a picture, and a line that says so."""
    import numpy as np

    from .. import files

    if out.suffix == ".npy":
        with files.replacing(out) as handle:
            np.save(handle, x.cpu().numpy())
    else:
        from . import pictures

        pictures.image(out, x.cpu().numpy(), model.data_range)
    print(
        f"{tuple(x.shape)} samples in {files.shown(out)}, {_units(model)}: {info.network_calls} network calls, "
        f"{info.seconds:.1f} s, seed {info.seed}, backend {info.backend}"
    )


def _units(model: ScoreModel) -> str:
    return f"in data_range {model.data_range}" if model.standardize is None else "in the units of the data"


def _shards_folder(a: argparse.Namespace) -> Path | None:
    """The folder of --out, or None where it is a file; refused where the other options ask for the other of them."""
    from .. import files
    from ..errors import ConfigError
    from ..training.ranks import launched

    path, world = files.path("--out", a.out), launched().world
    if path.suffix not in (".npy", ".png"):
        if not path.suffix or path.is_dir():
            return path
        raise ConfigError(
            f"--out must end in .npy or .png, or be a folder, a name without an ending, got {files.shown(path)}"
        )
    given = next((name for name in ("shard_size", "threads") if getattr(a, name) is not None), None)
    if given is not None or world > 1:
        why = f"with {given}={getattr(a, given)}" if given is not None else f"for {world} processes to draw into"
        raise ConfigError(f"--out must be a folder {why}, got {files.shown(path)}: give a name without an ending")
    return None


def _sample_shards(
    a: argparse.Namespace, folder: Path, model: ScoreModel, count: int, given: Tensor | None,
    draw: Callable[[int, int, int], Any],
) -> None:  # fmt: skip
    """The samples as shards in a folder, those of this process; drawn by so many threads as all others take."""
    import torch

    from .. import checks, files
    from ..errors import ConfigError
    from ..training import tensor_file
    from ..training.checkpoint import checksum
    from ..training.ranks import launched
    from . import shards

    first = checks.integer("--first-sample", a.first_sample, 0, 2**32 - 1)
    count = checks.integer("--num-samples", count, 1, 2**32 - first)
    if given is not None and len(given) != count:
        raise ConfigError(f"cond must have an entry for each of num_samples={count} samples, got {len(given)}")
    size = checks.integer("--shard-size", 1024 if a.shard_size is None else a.shard_size, 1, 2**32)
    batch = min(size, checks.integer("--batch-size", size if a.batch_size is None else a.batch_size, 1, 2**32))
    run = {
        "model_sha256": checksum(model),
        **{name: getattr(a, name) for name in ("seed", "sde", "steps", "sampler", "grid", "clip", "t_min", "labels", "guidance")},
        "cond_sha256": None if given is None else tensor_file.digest("", {"cond": given}),
        "num_samples": count, "first_sample": first, "shard_size": size, "batch_size": batch,
        "threads": checks.integer("--threads", 1 if a.threads is None else a.threads, 1, 2**16),
        "device": torch.device(a.device).type, "shape": list(model.data_shape),
        "torch": torch.__version__, "fastdiff": metadata.version("fastdiff"),
    }  # fmt: skip
    launch, began = launched(), time.monotonic()
    with shards.threads(run["threads"]):
        draw(0, 0, batch)  # what is refused is refused before the folder is made
        found = shards.Shards(folder, run, tuple(model.data_shape))
        drawn, complete = found.draw(launch, lambda lo, hi: draw(lo, hi, batch))
    process = f", process {launch.rank} of {launch.world}" * (launch.world > 1)
    whole = "all are there" if complete else "other processes draw the rest"
    print(
        f"{count} samples {tuple(model.data_shape)} in {files.shown(folder)}, {_units(model)}: {drawn} of "
        f"{len(found.spans)} shards drawn in {time.monotonic() - began:.1f} s{process}, {whole}"
    )


def _train_among(a: argparse.Namespace) -> int:
    """This process's part of a training, by torchrun among others; the first of them speaks."""
    from .. import checks
    from ..errors import ConfigError
    from ..training.ranks import joined

    if (a.data is None) == (a.also_data is None):
        raise ConfigError(
            "--data must be given once, as in fastdiff train --data digits --steps 1000 --out runs/digits"
        )
    a.data = a.data or a.also_data
    with warnings.catch_warnings(), joined(checks.number("timeout", a.timeout, 0, 10**9, above=True)) as launch:
        if launch.rank > 0:
            warnings.simplefilter("ignore")
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                return _train(a)
        return _train(a)


def _evaluate(a: argparse.Namespace) -> None:
    from .. import files
    from ..data.readers import load_beside
    from ..errors import ConfigError
    from . import evaluation_report as report

    out = None if a.out is None else _writable("--out", a.out, (".json",))
    picture = None if a.plot is None else _writable("--plot", a.plot, (".png",))
    metrics = report.metric_names(a.metrics)
    run = {name: getattr(a, name) for name in ("sde", "steps", "sampler", "grid", "clip", "batch_size")}
    if a.model.endswith(".npy"):
        for name, value in {**run, "net": a.net, "ema": a.ema}.items():
            if value is not None:
                raise ConfigError(
                    f"{name}={value!r:.40} is of a run, and {files.shown(a.model)} holds samples: leave it out"
                )
        source = _tensor("model", a.model)
    else:
        source = _model(a)
    data = _data(a, labels=a.labels, cond=a.cond)
    train: Any = None if a.train is None else load_beside("train", a.train, data, **_as_read(a))
    if picture is not None:
        report.check_drawable(data.shape)
    features = _made(a.features, "--features") if ":" in a.features else a.features
    found = report.evaluate(
        source, files.shown(a.model), data, train=train,
        num_samples=a.num_samples, seed=a.seed, metrics=metrics, features=features, quantise=a.quantise,
        samples_range=a.samples_range and tuple(a.samples_range), options={**run, "clip": _clip(a.clip)},
    )  # fmt: skip
    if out is not None:
        found.save(out)
    if picture is not None:
        report.draw(picture, found, files.shown(a.model))
    print(found)


def _train(a: argparse.Namespace) -> int:
    import torch

    from .. import checks
    from ..data import LazyData
    from ..errors import ConfigError
    from ..model import ScoreModel
    from ..networks import build
    from ..planning import processes
    from ..training import train
    from ..training.ranks import launched

    device = _device(a)
    with warnings.catch_warnings():  # a guess of what the axes are is no way to begin a training
        warnings.filterwarnings("error", message=r"source \[.* is taken as", category=UserWarning)
        try:
            data = _data(a, labels=a.labels, cond=a.cond, lazy=a.lazy, workers=a.workers)
        except UserWarning as warning:
            raise ConfigError(str(warning)) from None
    some = data.some if isinstance(data, LazyData) else data
    network = a.network or ("mlp" if len(data.shape) == 1 else "unet")
    options: dict[str, Any] = {"name": network, "shape": list(data.shape)}
    if a.net is not None and a.network is not None:
        raise ConfigError(f"--network {a.network} and --net {a.net} are two networks: give one of them")
    if a.classes:
        if some.labels is None:
            raise ConfigError(f"--classes needs labels, and {a.data} has none: leave it out")
        options["num_classes"] = some.num_classes
    elif some.labels is not None:
        if launched().rank == 0:
            print(f"fastdiff train: the labels of {a.data} are not used: --classes conditions on them", file=sys.stderr)
        # of those read lazily, within the context of _train_among
        warnings.filterwarnings("ignore", message="the data have labels of", category=UserWarning)
        if data is some:
            data = replace(data, labels=None, num_classes=None, class_names=())
    if some.cond is not None:
        options["cond_shape"] = list(some.cond.shape[1:])
    if a.variance is not None:
        options["out_channels"] = 2 * data.shape[0]
    with torch.random.fork_rng(devices=[]):  # the first weights are of the seed too
        torch.manual_seed(checks.integer("seed", a.seed, 0, 2**64 - 1))
        net = build(options) if a.net is None else _made(a.net)
    net.to(device)
    # images in the usual ranges; vectors stay in their own units
    data_range = None if len(data.shape) == 1 else (0.0, 1.0) if a.sde == "ve" else (-1.0, 1.0)
    model = ScoreModel(
        net, processes.get(a.sde), a.prediction, data_shape=data.shape, data_range=data_range, variance=a.variance
    )
    loss = a.loss or ("hybrid" if a.variance is not None else "simple" if a.weight is None else "dsm")
    with _signals() as received:
        done = train(
            model, data, steps=a.steps, loss=loss, weight=a.weight, times=a.times, truncation=a.truncation,
            vlb_weight=a.vlb_weight, probe=a.probe, batch_size=a.batch_size, accumulate=a.accumulate, optimizer=a.optimizer,
            lr=a.lr, warmup=a.warmup, warmup_start=a.warmup_start, schedule=a.schedule, grad_clip=a.grad_clip,
            bad_step=a.bad_step, shard=a.shard, ema=a.ema, ema_rule=a.ema_rule, posthoc=a.posthoc, precision=a.precision,
            compile=a.compile, engine=a.engine, seed=a.seed, dequantize=a.dequantize, cond_dropout=a.cond_dropout,
            checkpoint=a.out, resume=not a.fresh, checkpoint_every=a.checkpoint_every, keep=a.keep,
            callback=_said(a.steps), stop=lambda: received, augment=a.augment and a.augment.split(","),
            validation=_validation(a, data),
            evaluate=_drawn(a.out, a.samples, model, some) if a.samples else None, evaluate_every=a.evaluate_every,
            patience=a.patience, tensorboard=a.tensorboard,
        )  # fmt: skip
    print(f"{data!r}: step {done.steps} after {done.seconds:.0f} s; fastdiff.load({a.out!r}) gives the model")
    if not (received or done.stopped):
        return 0
    number = received[0] if received else signal.SIGTERM  # which another process received
    print(f"fastdiff train: {number.name}: saved at step {done.steps}; the same command goes on", file=sys.stderr)
    return 128 + number


def _validation(a: argparse.Namespace, data: Data | LazyData) -> Any:
    """--validation as `train` takes it: a share, or data that are read as the others are, in their units."""
    from ..data import LazyData
    from ..data.readers import load_beside
    from ..errors import ConfigError

    share: float | None = None
    with contextlib.suppress(TypeError, ValueError):
        share = float(a.validation)
    if a.validation is None or share is not None:
        for name in ("labels", "cond"):
            if getattr(a, f"validation_{name}") is not None:
                raise ConfigError(
                    f"--validation-{name} is of validation data in a file of their own: give --validation FILE"
                )
        return share
    beside = {"labels": a.validation_labels, "cond": a.validation_cond}
    kept = load_beside("validation", a.validation, data, **_as_read(a), **beside)
    some = data.some if isinstance(data, LazyData) else data
    for name in beside:
        if getattr(some, name) is not None and getattr(kept, name) is None:
            raise ConfigError(f"--validation must have {name}, as the data have: give --validation-{name} FILE")
    return kept


def _drawn(out: str, count: int, model: ScoreModel, data: Data) -> Callable[[ScoreModel, int], None]:
    """An evaluation that draws samples, always the same ones, and shows them in the run's folder: of all labels in turn, or of
    the first conditions of the data, with their labels."""
    import torch

    from .. import checks
    from ..errors import ConfigError
    from ..execution.calls import device_of, moved
    from ..sampling import sample
    from . import pictures

    count = checks.integer("samples", count, 1, 10_000)
    if len(model.data_shape) != 3 or model.data_shape[0] not in (1, 3):
        raise ConfigError(f"--samples draws pictures (1 or 3, H, W), and the data are {model.data_shape}: leave it out")

    def draw(model: ScoreModel, step: int) -> None:
        rows = torch.arange(count) % len(data)
        labels = torch.arange(count) % model.num_classes if model.num_classes else None
        if model.cond_shape and labels is not None and data.labels is not None:
            labels = data.labels[rows]
        cond = data.cond[rows] if model.cond_shape and data.cond is not None else None
        condition = moved(model.takes.joined(labels, cond), device_of(None, None, model.net))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the samples run from", category=UserWarning)
            x = sample(model, steps=min(50, int(model.process.T)) if model.process.discrete else 50, num_samples=count,
                       cond=condition, progress=False)  # fmt: skip
        pictures.image(Path(out) / f"samples-{step:08d}.png", x.cpu().numpy(), model.data_range)

    return draw


def _made(name: str | None, option: str = "--net") -> Any:
    """The network that `--net module:factory` or `--net file.py:factory` makes; None where there is none."""
    if name is None:
        return None
    import importlib
    import importlib.util

    from torch import nn

    from ..errors import ConfigError, short

    place, _, factory = name.rpartition(":")
    if not place or not factory:
        raise ConfigError(f"{option} must be module:factory or file.py:factory, got {short(name)}")
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, Path(place).expanduser())
        if spec is None or spec.loader is None or not Path(place).expanduser().is_file():
            raise ConfigError(f"{option} must name a file that there is, got {short(place)}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.append(os.getcwd())  # last, so that nothing there stands for an installed module
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not place.startswith(error.name):
                raise
            raise ConfigError(
                f"{option} must name a module that can be imported, got {short(place)}: or file.py:factory"
            ) from error
        finally:
            sys.path.pop()
    found = getattr(module, factory, None)
    net = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(net, nn.Module):
        got = f"{place} has no {factory}" if found is None else f"{factory} gives a {type(net).__name__}"
        raise ConfigError(f"{option} must make a torch.nn.Module, and {got}: write a function that returns the network")
    return net


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """The SIGTERM or SIGINT that asked for an end; a second one ends the process as it would have anyway."""
    from ..training.ranks import launched

    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    among, first = launched().world > 1, 0.0

    def receive(number: int, frame: object) -> None:
        nonlocal first
        received.append(signal.Signals(number))
        first = first or time.monotonic()
        if among and time.monotonic() < first + 2:  # a Ctrl-C comes twice, from the terminal and from torchrun
            return
        for each, handler in before.items():
            signal.signal(each, handler)
        if among:
            signal.raise_signal(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup and the shell's & have it
            signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _said(steps: int) -> Callable[[int, float], None] | None:
    """A callback of `train` that prints the loss where no bar shows it: the first, the last, and one in ten seconds."""
    if sys.stderr is None or sys.stderr.isatty():
        return None
    due = 0.0

    def say(step: int, loss: float) -> None:
        nonlocal due
        if time.monotonic() >= due or step == steps:
            due = time.monotonic() + 10
            with contextlib.suppress(OSError):  # nobody reads: no reason to lose the run
                print(f"step {step} of {steps}: loss {loss:.4f}", file=sys.stderr, flush=True)

    return say


def _likelihood(a: argparse.Namespace) -> None:
    out = None if a.out is None else _writable("--out", a.out, (".npz",))
    from . import likelihood_report

    model, data = _model(a), _data(a)
    if a.labels is not None:
        data = replace(data, labels=_labels(a, model, len(data)), num_classes=None, class_names=())
    data, cond = _with_cond(a, model, data)
    report = likelihood_report.likelihood(
        model, data, a.num_samples, first_sample=a.first_sample, seed=a.seed, trace=a.trace, probes=a.probes, rtol=a.rtol,
        atol=a.atol, t_min=a.t_min, batch_size=a.batch_size, cond=cond,
    )  # fmt: skip
    if out is not None:
        report.save(out)
    print(f"{data!r}\n{report}")


def _check(a: argparse.Namespace) -> int:
    from ..conventions import check

    model = _model(a)
    data, cond = _with_cond(a, model, _data(a))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="likelier than what was said|nothing that was tried|at noise ratio"
        )  # the report says it
        found = check(
            model, data, num_samples=a.num_samples, seed=a.seed, cond=cond, batch_size=a.batch_size,
        )  # fmt: skip
    print(f"{model!r}\n{data!r}\n{found}")
    return 0 if found.fits else 1


def _plan(a: argparse.Namespace) -> None:
    from ..planning.plan import plan

    drawing = None if a.plot is None else _writable("--plot", a.plot, (".png", ".pdf", ".svg"))
    table = plan(a.sde, a.steps, sampler=a.sampler, prediction=a.prediction, grid=a.grid)
    print(table.explain(None if a.all else 24))
    if drawing is not None:
        table.plot(drawing)


def _doctor(a: argparse.Namespace) -> int:
    from ..execution import ops

    if a.verify:
        from .verification import report

        text, right = report()
        print(text)
        return 0 if right else 1
    print(f"fastdiff {metadata.version('fastdiff')}\n{ops.doctor()}")
    return 0


def _data(a: argparse.Namespace, **options: Any) -> Data:
    """The data of a command, read as its options say."""
    from ..data import load_data

    return load_data(a.data, **_as_read(a), **options)


def _as_read(a: argparse.Namespace) -> dict[str, Any]:
    """The options of `_reading`, as `load_data` takes them."""
    ends, size = a.range and tuple(a.range), a.size and tuple(a.size)
    return {"range": ends, "bins": a.bins, "channels": a.channels, "size": size}


def _device(a: argparse.Namespace) -> torch.device:
    """The device of --device; of several processes that torchrun started, each has a GPU of its own."""
    from ..execution import tensor_checks
    from ..training.ranks import launched

    return tensor_checks.device_of(launched().device(a.device))


def _model(a: argparse.Namespace) -> ScoreModel:
    """The trained model, on the device."""
    from ..training import load

    device = _device(a)
    model = load(a.model, net=_made(a.net), ema=a.ema)
    model.net.to(device)
    return model


def _import(a: argparse.Namespace) -> int | None:
    """Another library's file as one of fastdiff's."""
    from .. import files
    from ..training import load, save

    out = _writable("--out", a.out, (".safetensors",))
    model = load(a.file, source=a.source, config=a.config, part=a.part)
    path = save(model, out)
    count = sum(parameter.numel() for parameter in model.net.parameters())
    print(f"wrote {files.shown(path)}: {type(model.net).__name__}, {count:,} parameters")
    facts = ("process", "prediction", "time_input", "data_shape", "data_range", "variance", "num_classes", "cond_shape")
    for name in facts:
        value = getattr(model, name)
        if value is not None:
            print(f"  {name:<11} {value if name == 'process' else repr(value)}")
    print(f"whether that can be right, by data: fastdiff check {files.shown(path)} --data DATA")
    return None


def _labels(a: argparse.Namespace, model: ScoreModel, count: int) -> Tensor:
    """The labels of --labels, in turn, for so many samples."""
    import torch

    from ..errors import ConfigError

    if not model.num_classes:
        raise ConfigError(
            "--labels needs a model that was trained with labels (fastdiff train --classes): leave it out"
        )
    top, none = model.num_classes - 1, model.null_label
    allowed = f"from 0 to {top}, which the model was trained with: {top} for all, or 0,{top} in turn"
    allowed += "" if none is None else f"; {none} is no label"
    if a.labels is None or (a.cond is not None and not model.cond_shape):
        raise ConfigError(f"--labels, and not --cond, must say the labels {allowed}")
    words = [word.strip() for word in a.labels.split(",")]
    whole = all(word.isascii() and word.isdecimal() for word in words)
    if not whole or not all(int(word[:9]) < model.num_classes or int(word[:9]) == none for word in words):
        raise ConfigError(f"--labels must be whole numbers {allowed}, got {a.labels!r:.40}")
    return torch.tensor([int(words[i % len(words)]) for i in range(count)])


def _with_cond(a: argparse.Namespace, model: ScoreModel, data: Data) -> tuple[Data, Tensor | None]:
    """--cond of the data: in them, where the model says what it was trained with, else as it is."""
    cond = None if a.cond is None else _array(a.cond, model)
    if cond is None or not model.cond_shape:
        return data, cond
    return replace(data, cond=cond), None


def _clip(value: str | None) -> Any:
    """--clip as `sample` takes it."""
    from ..errors import ConfigError

    if value in (None, "data"):
        return value
    try:
        low, high = map(float, value.split(","))  # type: ignore[union-attr]
    except ValueError:
        raise ConfigError(f"--clip must be data, or two numbers as in --clip=-1,1, got {value!r:.40}") from None
    return low, high


def _tensor(option: str, value: str) -> Tensor:
    """The array of a .npy or .npz file."""
    import torch

    from .. import files
    from ..data.readers import read_array

    return torch.from_numpy(read_array(files.path(option, value)))


def _array(value: str, model: ScoreModel) -> Tensor:
    """The array of --cond as a tensor, floats in the network's precision."""
    import torch

    from ..execution.calls import dtype_of

    array = _tensor("--cond", value)
    if model.cond_shape or not array.is_floating_point():  # the model itself sees to the precision of its conditions
        return array
    return array.to(dtype_of(model.net, torch.float32))


def _writable(option: str, value: str, suffixes: tuple[str, ...]) -> Path:
    """The path of a result; refused, before any work, where the file could not be written after it."""
    from .. import files
    from ..errors import ConfigError

    path = files.path(option, value)
    if path.suffix not in suffixes:
        raise ConfigError(f"{option} must end in {' or '.join(suffixes)}, got {files.shown(path)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} must be a file in an existing folder, got {files.shown(path)}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ConfigError(f"{option} must be a file that may be written, got {files.shown(path)}: choose another name")
    files.check_writable(option, path)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdiff", description="Train and sample score-based diffusion models.")
    parser.add_argument("--version", action="version", version=f"fastdiff {metadata.version('fastdiff')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(
        name: str, run: Callable[[argparse.Namespace], int | None], about: str, *shared: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, parents=shared)
        sub.set_defaults(run=run)
        return sub

    of_a_model = argparse.ArgumentParser(add_help=False)  # options of the commands that run a trained model
    _add_device(of_a_model.add_argument)
    of_a_model.add_argument("model", help="a shipped name such as digits-ve, a checkpoint file or a training directory")
    net = "module:factory or file.py:factory, which makes a network of your own"
    of_a_model.add_argument("--net", help=f"{net}, for checkpoints of one")
    of_a_model.add_argument(
        "--ema", type=float, help="rate of another average of a training with several (default: the first)"
    )
    of_a_model.add_argument("--seed", type=int, default=0, help="of all random numbers (default: 0)")
    of_a_model.add_argument("--batch-size", type=int, help="samples in one network call (default: chosen by size)")
    of_a_plan = argparse.ArgumentParser(add_help=False)  # options of the commands that choose a sampler and its grid
    of_a_plan.add_argument(
        "--sampler", help="ddim, heun, dpmpp_2m, …; an unknown one names the nearest (default: the process's)"
    )
    of_a_plan.add_argument("--grid", help="where the steps stand: uniform, karras, … (default: the sampler's)")
    of_samples = argparse.ArgumentParser(add_help=False)  # options of the commands that draw samples to keep
    count = "how many samples (default: 16, or as many as --cond or FILE has)"
    of_samples.add_argument("-n", "--num-samples", type=int, help=count)
    of_samples.add_argument("--labels", help="of a model trained with labels: 3 for all samples, or 0,1,2 in turn")
    of_samples.add_argument("--cond", help="a .npy or .npz array of conditions, an entry for each sample")
    free = (
        "classifier-free, of a model trained with --cond-dropout: 1 is the model as it is, 2 or 3 usual (default: none)"
    )
    of_samples.add_argument("--guidance", type=float, metavar="SCALE", help=free)
    of_samples.add_argument("--first-sample", type=int, default=0, help="number of the first sample (default: 0)")
    clip = "data: clamp the samples to the data's range; --clip=-1,1: the predictions of x0"
    of_samples.add_argument("--clip", help=clip)
    of_data = argparse.ArgumentParser(add_help=False)
    _reading(of_data)
    data = ".npy, .npz, IDX (.gz), a folder of images, or digits"

    sub = command(
        "demo", _demo, "Train VE, VP and sub-VP models on handwritten digits, sample them seven ways, report."
    )
    sub.add_argument("--out", default="out", help="folder for pictures, models and report.md (default: out)")
    sub.add_argument("--train-steps", type=int, default=2000, help="training steps of each model (default: 2000)")
    sub.add_argument("--samples", type=int, default=400, help="samples from each sampler (default: 400)")
    sub.add_argument("--steps", type=int, default=1000, help="steps of a sampler, at most (default: 1000)")
    sub.add_argument("--digits", type=int, default=200, help="digits to measure the likelihoods of (default: 200)")
    sub.add_argument("--workers", type=int, help="processes (default: one for each core)")
    more = "also digits by their class, and digits given a part or a blurred picture of them"
    sub.add_argument("--control", action="store_true", help=more)

    sub = command("sample", _sample, "Draw samples from a trained model.", of_a_model, of_a_plan, of_samples)
    sub.add_argument("--sde", help="default: the process that the model was trained on")
    sub.add_argument("--steps", type=int, help="steps of the sampler, 1 to 1000000 (default: 1000, or all of a chain)")
    sub.add_argument("--t-min", type=float, help="where the run ends, 0 <= t_min < T (default: the process's)")
    out = "a .npy array, a .png picture, or a folder of shards, which several processes fill and a killed run goes on with"
    sub.add_argument("--out", default="samples.npy", help=f"{out} (default: samples.npy)")
    sub.add_argument("--shard-size", type=int, help="samples in a file of a folder (default: 1024)")
    sub.add_argument("--threads", type=int, help="of each process that fills a folder (default: 1)")

    of_posterior = (of_a_model, of_a_plan, of_samples)
    sub = command("inpaint", _inpaint, "Draw what is missing of samples, given the rest, which is kept.", *of_posterior)
    sub.add_argument(
        "file", metavar="FILE", help="what is known: a .npy or .npz array in the units of the samples, or a picture"
    )
    mask = "1 or white where FILE is known: a .npy or .npz array or a picture (default: where FILE is not NaN)"
    sub.add_argument("--mask", metavar="MASK", help=mask)
    _posterior_options(sub, "inpainted.npy")

    sub = command("colorize", _colorize, "Draw samples whose grey values are known.", *of_posterior)
    sub.add_argument(
        "file", metavar="FILE", help="the grey values: a .npy or .npz array in the units of the samples, or a picture"
    )
    sub.add_argument(
        "--weights", metavar="W,W,W", help="of the channels in the grey value, of sum 1 (default: equal ones)"
    )
    _posterior_options(sub, "colorized.npy")

    sub = command("solve", _solve, "Draw samples given measurements y = A x + noise of them.", *of_posterior)
    measured = "the measurements y: a .npy or .npz array, in the units of A x of samples x, or a picture"
    sub.add_argument("file", metavar="FILE", help=measured)
    operators = "grayscale[:W,W,W], downsampling:FACTOR, blur:SIGMA, mask:FILE, fourier:FILE or matrix:FILE"
    sub.add_argument("--operator", required=True, metavar="A", help=f"A, one of {operators}")
    sub.add_argument(
        "--noise-std", type=float, default=0.0, help="standard deviation of the noise, in the units of y (default: 0)"
    )
    _posterior_options(sub, "solved.npy")

    _train_options(
        command("train", _train_among, "Train a model on arrays, IDX files, a folder of images, or 'digits'."),
        data,
        net,
    )

    sub = command(
        "evaluate",
        _evaluate,
        "Compare samples of a trained model, or of a .npy file given in its place, with data: Fréchet distance and others.",
        of_a_model,
        of_a_plan,
        of_data,
    )
    sub.add_argument("--data", required=True, help=f"{data}; best what the model was not trained on")
    sub.add_argument("--labels", metavar="FILE", help="class numbers of --data, a .npy or IDX file (default: its own)")
    sub.add_argument("--cond", metavar="FILE", help="conditions of --data, a .npy or .npz array (default: its own)")
    sub.add_argument("--train", help="its training data, to look for copies of (default: half of --data)")
    sub.add_argument(
        "-n", "--num-samples", type=int, default=1000, help="at most, and at most half of the data (default: 1000)"
    )
    metrics = "frechet,kernel,precision_recall,sliced_wasserstein,nearest"
    sub.add_argument("--metrics", default=metrics, help=f"of these and c2st (default: {metrics})")
    features = "classifier (trained on the data's labels), a name registered with torch-fidelity, or module:factory"
    sub.add_argument("--features", default="pixels", help=f"what is compared: pixels (default), {features}")
    sub.add_argument("--sde", help="default: the process that the model was trained on")
    sub.add_argument("--steps", type=int, help="steps of the sampler, 1 to 1000000 (default: 1000, or all of a chain)")
    sub.add_argument("--clip", help="data: clamp the samples to the data's range; --clip=-1,1: the predictions of x0")
    sub.add_argument("--quantise", action="store_true", help="round the samples to the data's levels, as a file would")
    sub.add_argument(
        "--samples-range",
        type=float,
        nargs=2,
        metavar=("LO", "HI"),
        help="of samples from a file: the model's data_range",
    )
    sub.add_argument("--out", help="a .json of all numbers")
    sub.add_argument("--plot", help="a .png of samples beside data")

    sub = command(
        "likelihood",
        _likelihood,
        "Log-likelihood of data under a model, in nats and bits per dimension.",
        of_a_model,
        of_data,
    )
    sub.add_argument("--data", required=True, help=data)
    sub.add_argument("-n", "--num-samples", type=int, default=64, help="at most this many of the data (default: 64)")
    sub.add_argument("--first-sample", type=int, default=0, help="index of the first in the data (default: 0)")
    sub.add_argument("--labels", help="3 for all of the data, or 0,1,2 in turn (default: the data's own)")
    sub.add_argument("--cond", help="a .npy or .npz array of conditions, an entry for each of the data")
    sub.add_argument("--trace", default="hutchinson", help="hutchinson (default), hutch++ or exact")
    sub.add_argument("--probes", type=int, default=2, help="of the trace, for each sample (default: 2)")
    sub.add_argument("--rtol", type=float, default=1e-5, help="relative tolerance of a step (default: 1e-5)")
    sub.add_argument("--atol", type=float, default=1e-5, help="absolute tolerance of a step (default: 1e-5)")
    sub.add_argument("--t-min", type=float, help="where the flow starts (default: 1e-5, or a chain's first level)")
    sub.add_argument("--out", help="a .npz of each sample's nats, stderr, latent, nfe and bits_per_dim")

    sub = command(
        "check",
        _check,
        "Whether what a checkpoint says of its network can be right, by data; 1 if not.",
        of_a_model,
        of_data,
    )
    sub.add_argument("--data", required=True, help=data)
    sub.add_argument("-n", "--num-samples", type=int, help="of the data (default: 16, of small samples more)")
    sub.add_argument("--cond", help="a .npy or .npz array of conditions, an entry for each of the data")

    about = "Another library's weights as a file of fastdiff's, with process, prediction, time input and range."
    sub = command("import", _import, about)
    sub.add_argument("file", metavar="FILE", help="the library's file, or its folder (diffusers)")
    of = (
        "score_sde_pytorch, guided-diffusion, improved-diffusion, edm, edm2, ncsn, denoising-diffusion-pytorch, dit or diffusers "
        "(the default for its folders)"
    )
    sub.add_argument("--from", dest="source", metavar="NAME", help=of)
    facts = "what the file does not say: a .json, its text, or the name of a published configuration"
    sub.add_argument("--config", metavar="CONFIG", help=facts)
    sub.add_argument("--part", help="the network's part of the file (default: the averaged weights)")
    sub.add_argument("--out", default="model.safetensors", help="default: model.safetensors")

    sub = command("plan", _plan, "Print the table of a run: what each row does, with its coefficients.", of_a_plan)
    sub.add_argument("sde", help="ve, vp, subvp, ou, rectified_flow, edm, ddpm or ncsn")
    sub.add_argument("steps", type=int, nargs="?", help="1 to 1000000 (default: 1000, or all of a chain)")
    sub.add_argument("--prediction", default="score", help="what the network returns (default: score)")
    sub.add_argument("--all", action="store_true", help="every row, not the first and last")
    sub.add_argument("--plot", help="also draw the coefficients into this file")

    sub = command("doctor", _doctor, "Say which backend serves which operation on this machine, and why.")
    verify = "compare every backend with plain PyTorch, bit for bit, and print a report; 1 if anything differs"
    sub.add_argument("--verify", action="store_true", help=verify)
    return parser


def _posterior_options(sub: argparse.ArgumentParser, out: str) -> None:
    """The options of the commands that draw samples given a part or measurements of them."""
    methods = "mmps, replacement, repaint, tmpd, pigdm, diffpir, dps, ilvr, noised, score_ald, ddrm, daps or smc"
    sub.add_argument("--method", default="mmps", help=f"{methods} (default: mmps)")
    sub.add_argument("--steps", type=int, help="steps of the sampler, 1 to 1000000 (default: 100, ancestral ones)")
    sub.add_argument("--out", default=out, help=f"a .npy array or a .png picture (default: {out})")


def _reading(options: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Options of how data are read."""
    add = options.add_argument
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="stretch every picture of a folder to this size")
    channels = "1 (grey) or 3 (RGB) of pictures; first, last or 1 of arrays"
    add("--channels", type=_channels, metavar="C", help=channels)
    ends = "of the data (default: 0 255 for bytes, else its ends)"
    add("--range", type=float, nargs=2, metavar=("LO", "HI"), help=ends)
    add("--bins", type=int, metavar="K", help="levels that the data stand on, 2 to 65536 (default: 256 for bytes)")


def _train_options(sub: argparse.ArgumentParser, data: str, net: str) -> None:
    """The options of `fastdiff train`: those of `fastdiff.train`, which has their meaning, and of the model."""
    sub.usage = "fastdiff train DATA --out DIR --steps N [options]"
    sub.epilog = (
        "Each is an option of fastdiff.train, fastdiff.load_data or fastdiff.ScoreModel, where more is said of it."
    )

    add = (of_data := sub.add_argument_group("data")).add_argument
    add("data", metavar="DATA", nargs="?", help=f"{data}; also --data")
    add("--data", dest="also_data", help=argparse.SUPPRESS)  # as the other commands have it
    add("--labels", metavar="FILE", help="a .npy or IDX file of class numbers 0 … (default: the data's own)")
    cond = "a .npy or .npz array of conditions, vectors or fields, an entry for each sample (default: the data's)"
    add("--cond", metavar="FILE", help=cond)
    _reading(of_data)
    add("--lazy", action="store_true", help="read a .npy file or pictures while training, not before")
    workers = "processes that read pictures ahead, and --lazy with them (default: 0)"
    add("--workers", type=int, default=0, metavar="N", help=workers)
    add("--augment", metavar="NAMES", help="flip, flip_vertical or crop, or several, as in flip,crop")
    add("--dequantize", action="store_true", help="uniform dequantisation of discrete data")

    add = sub.add_argument_group("network and process").add_argument
    kinds = "unet or mlp (default: unet for images and signals, mlp for vectors)"
    add("--network", choices=["unet", "mlp"], metavar="NAME", help=kinds)
    add("--net", metavar="FACTORY", help=f"{net}; fastdiff.load then needs it too")
    add("--sde", default="vp", metavar="NAME", help="ve, vp (default), subvp, ou, rectified_flow, edm, ddpm or ncsn")
    prediction = "what the network returns: score, eps, x0, v, … (default: edm)"
    add("--prediction", default="edm", metavar="NAME", help=prediction)
    variance = "learned or learned_range, of a ddpm or ncsn chain (default: fixed)"
    add("--variance", metavar="NAME", help=variance)
    add("--classes", action="store_true", help="condition on the data's labels")

    add = sub.add_argument_group("objective").add_argument
    losses = "dsm, simple, likelihood, dsm_vr, vlb, hybrid, ism, ssm or ssm_vr"
    losses += " (default: simple; dsm with --weight; hybrid with --variance)"
    add("--loss", metavar="NAME", help=losses)
    weights = "λ(t): sigma2, g2, one, target, edm, min_snr, p2 or learned (default: the loss's)"
    add("--weight", metavar="NAME", help=weights)
    times = "stratified (default), uniform, importance, lognormal or second_moment"
    add("--times", default="stratified", metavar="NAME", help=times)
    add("--truncation", default="hard", metavar="NAME", help="near t = 0: hard (default), soft or clamp")
    bound = "of the bound in loss hybrid (default: 0.001)"
    add("--vlb-weight", type=float, default=0.001, metavar="X", help=bound)
    add("--probe", metavar="NAME", help="of ssm and ssm_vr: rademacher (default) or normal")
    dropout = "share of samples trained without labels and conditions (default: 0)"
    add("--cond-dropout", type=float, default=0.0, metavar="X", help=dropout)

    add = sub.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, default=128, metavar="N", help="samples in a step, 1 to 10000000 (default: 128)")
    add(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="parts in which a batch goes through the network (default: 1)",
    )
    add("--optimizer", default="adam", metavar="NAME", help="adam (default), adamw, radam, sgd or muon")
    add("--lr", type=float, default=1e-3, metavar="X", help="the rate after the warm-up, above 0 (default: 0.001)")
    warmup = "steps over which the rate rises linearly, 0 or more (default: 1000)"
    add("--warmup", type=int, default=1000, metavar="N", help=warmup)
    add(
        "--warmup-start",
        type=int,
        default=1,
        metavar="N",
        help="0: the rate rises from 0, 1: from lr/warmup (default: 1)",
    )
    schedule = "of the rate from there: constant (default), cosine, linear or inverse_sqrt"
    add("--schedule", default="constant", metavar="NAME", help=schedule)
    clip = "norm to which gradients are clipped, or none (default: 1)"
    add("--grad-clip", type=_norm, default=1.0, metavar="X", help=clip)
    bad = "a step that is not finite: skip (default; ten in a row raise) or raise"
    add("--bad-step", default="skip", metavar="NAME", help=bad)
    ema = "decay of the averaged weights, 0 to 1, or of several averages, as in 0.999,0.9999; the first is the model's"
    add("--ema", type=_rates, default=0.999, metavar="X,…", help=f"{ema} (default: 0.999)")
    rules = "how an average begins: diffusers (default), score_sde or constant"
    add("--ema-rule", default="diffusers", metavar="NAME", help=rules)
    posthoc = "keep snapshots, of which fastdiff.posthoc_ema makes averages of any width"
    add("--posthoc", action="store_true", help=posthoc)
    add("--precision", metavar="NAME", help="bf16 or fp16: autocast of the network (default: its own)")
    add("--compile", action="store_true", help="the network by torch.compile")
    engine = "steps as CUDA graphs: auto (default), graph or eager"
    add("--engine", default="auto", metavar="NAME", help=engine)

    add = sub.add_argument_group("run and watching").add_argument
    add("--out", required=True, metavar="DIR", help="checkpoint directory; an unfinished run there is resumed")
    add("--steps", type=int, required=True, metavar="N", help="step at which the training ends, 1 to 1000000000")
    add("--seed", type=int, default=0, metavar="N", help="of first weights and all random numbers (default: 0)")
    _add_device(add)
    add("--fresh", action="store_true", help="start anew instead of resuming")
    every = "steps between checkpoints (default: 1000), which are five minutes apart at the most"
    add("--checkpoint-every", type=int, default=1000, metavar="N", help=every)
    add("--keep", type=int, metavar="N", help="also leave the last N checkpoints by their steps (default: none)")
    timeout = "seconds after which a process of torchrun's gives up on others that do not answer (default: 300)"
    add("--timeout", type=float, default=300, metavar="X", help=timeout)
    shards = "hold weights, gradients, moments and averages in shards, one in each process of torchrun's"
    add("--shard", action="store_true", help=shards)
    held_out = "a share of the data, such as 0.1, or other data, to evaluate the loss on"
    add("--validation", metavar="DATA", help=held_out)
    add("--validation-labels", metavar="FILE", help="of --validation, as --labels is of the data (default: its own)")
    add("--validation-cond", metavar="FILE", help="of --validation, as --cond is of the data (default: its own)")
    evaluations = "steps between evaluations (default: 1000)"
    add("--evaluate-every", type=int, default=1000, metavar="N", help=evaluations)
    samples = "draw so many at each evaluation, as a picture; with --cond of its first entries (default: 0)"
    add("--samples", type=int, default=0, metavar="N", help=samples)
    patience = "end after so many evaluations without a lower validation loss"
    add("--patience", type=int, metavar="N", help=patience)
    add("--tensorboard", action="store_true", help="write the numbers for TensorBoard too")


def _add_device(add: Callable[..., object]) -> None:
    add("--device", default="cpu", help="where the network runs: cpu (default), cuda or cuda:1")


def _rates(text: str) -> float | tuple[float, ...]:
    """--ema: a number, or several with commas."""
    try:
        rates = tuple(float(word) for word in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or several as in 0.999,0.9999, got {text!r:.40}") from None
    return rates if len(rates) > 1 else rates[0]


def _norm(text: str) -> float | None:
    """--grad-clip: a number or none."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, or none, got {text!r:.40}") from None


def _channels(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
