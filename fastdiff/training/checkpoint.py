"""Checkpoints: one safetensors file with the tensors and, as JSON in its header, the model's description. No pickle."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from .. import checks, files, networks
from ..errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointVersionError,
    ConfigError,
    CorruptCheckpointError,
    short,
    warn,
)
from ..execution import modules
from ..model import ScoreModel
from ..planning import processes
from . import tensor_file

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "checkpoints"
FILE = "checkpoint.safetensors"
NUMBERED = "step-{:09d}.safetensors"
WRAP = "net.load_state_dict(fastdiff.load_tensors(path, part='...')), then ScoreModel(net, sde, ...)"
OTHER = "read it by its own library, and wrap its network, ScoreModel(net, sde, ...)"
# how files that are no checkpoint begin, what they are, and what to do
FOREIGN = {
    b"PK\3\4": f"a zip of torch.save: source=..., or {WRAP}",
    b"\x80": f"a pickle of torch.save: source=..., or {WRAP}",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull",
    b"<": "an HTML or XML page, not the file itself: download it again",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"GGUF": f"a GGUF file: {OTHER}",
    b"\x89HDF": f"an HDF5 file: {OTHER}",
    b"\x93NUMPY": f"a .npy array: {OTHER}",
}
_TEXT = frozenset(range(32, 127)) | frozenset(b"\t\n\r")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_digest = tensor_file.digest  # what a file must carry as its sha256


def save(model: ScoreModel, path: str | os.PathLike[str]) -> Path:
    """Write a ScoreModel to `path` (.safetensors is added where it lacks); the file appears whole or not at all.

    `load` rebuilds a network of fastdiff.networks; any other must be given to it as `net`.
    """
    header = {"model": describe(model)}
    return write(path, {"net." + name: value for name, value in modules.state(model.net).items()}, header)


def load_saved(
    path_or_name: str | os.PathLike[str], net: nn.Module | None, sde: processes.Process | None, ema: float | None
) -> ScoreModel:
    """The ScoreModel of a file written by `save`, of a training directory, or of a shipped name: see fastdiff.load."""
    path, given = _find(path_or_name), None if sde is None else processes.get(sde)
    header, tensors = read(path, "net." if ema is None else "")
    if ema is not None:
        first = of_part(tensors, "net")
        which = _which_average(header, checks.number("ema", ema, 0, 1, below=True), path)
        chosen = of_part(tensors, f"ema{which}") if which else {}
        tensors = {name: chosen[name].to(value.dtype) if name in chosen else value for name, value in first.items()}
    return model_of(header, tensors, path, net, given)


def of_part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a part's name and a dot, without that."""
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def _which_average(header: dict[str, Any], ema: float, path: Path) -> int:
    """The number of the average of that rate."""
    options = header.get("options")
    rates = options.get("ema") if isinstance(options, dict) else None
    rates = rates if isinstance(rates, list) else [] if rates is None else [rates]
    if ema not in rates:
        held = f"its averages are of {', '.join(map(str, rates))}" if rates else "it is no training's, and has one"
        raise ConfigError(f"ema must be the rate of an average in {files.shown(path)}, got {ema:g}: {held}")
    return rates.index(ema)


def model_of(
    header: dict[str, Any], tensors: dict[str, Tensor], path: Path, net: nn.Module | None, sde: processes.Process | None
) -> ScoreModel:
    """The model that a file's header describes, with these tensors."""
    if "classifier" in header and "model" not in header:
        raise CheckpointMismatchError(f"{files.shown(path)} holds a classifier: read it by TimeClassifier.load")
    try:
        config = header["model"]
        if net is None and config["net"] is None:
            raise CheckpointMismatchError(
                f"{files.shown(path)} holds a network that is not one of fastdiff.networks: give it, net="
            )
        network = _skeleton(config["net"], tensors, path) if net is None else net
        process = _process(config["process"], sde, path)
        networks.adopt(network, config["net"])
        options = {name: config[name] for name in ("prediction", "time_input", "data_shape", "data_range", "variance")}
        options |= {name: config.get(name) for name in ("num_classes", "standardize", "cond_shape", "standardize_cond")}
        options |= {"cond_dropout": config.get("cond_dropout", 0.0)}
        if not config.get("range_given", True):  # the default's numbers say nothing of the data
            del options["data_range"]
        model = ScoreModel(network, process, **options)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CorruptCheckpointError(f"{files.shown(path)} does not describe a model: {short(error)}") from error
    check(network, tensors, path)
    if net is None:  # the file's tensors become the network's own, with their dtypes
        network.load_state_dict({name: value.to(place()) for name, value in tensors.items()}, assign=True)
    else:
        modules.load_state(network, tensors)
    return model.eval()


def _skeleton(config: Any, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """The network of a configuration, to be filled with the file's: its tensors are shapes without memory.

    So a file costs no more than it holds, whatever it asks for, and no random number is drawn.
    """
    depth = config.get("layers", 1) * config.get("blocks", 1) * len(config.get("multipliers", (1,)))
    if depth > len(tensors):  # each layer and each block has a tensor
        raise CheckpointMismatchError(
            f"{files.shown(path)} lacks tensors: it holds {len(tensors)} and asks for {depth!s:.20} layers or more"
        )
    try:
        with torch.inference_mode(False), torch.device("meta"):
            network = networks.build(config)
    except RuntimeError as error:  # sizes that torch cannot multiply
        raise CheckpointMismatchError(
            f"{files.shown(path)} asks for a network that is too large: {files.reason(error)}"
        ) from error
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, networks.TimeEmbedding):  # holds numbers of its own, which no file has
                with torch.device(place()):
                    setattr(module, name, networks.TimeEmbedding(child.channels, child.kind, child.scale, child.base))
    return network


def place() -> torch.device:
    """Where a network is made: torch's default device, unless that drops all numbers."""
    place = torch.get_default_device()
    return torch.device("cpu") if place.type == "meta" else place


def _process(config: dict[str, Any], sde: processes.Process | None, path: Path) -> processes.Process:
    """The process of a file: fastdiff's of that name, or the caller's `sde` where its description is the file's."""
    if sde is not None:
        if json.loads(as_json(sde.config())) != config:
            raise CheckpointMismatchError(
                f"{files.shown(path)} was trained on {short(config, 30)}, got sde={short(sde, 30)}: give that process"
            )
        return sde
    if config["name"] not in processes.PROCESSES:
        raise CheckpointMismatchError(
            f"{files.shown(path)} was trained on {config['name']!r:.40}, which is not one of fastdiff.processes: give it "
            f"as sde="
        )
    return processes.from_config(config)


def as_json(header: dict[str, Any]) -> str:
    """The header as JSON; ConfigError where it holds anything but numbers, strings and lists and dicts of them."""
    model = header.get("model")
    if callable((model if isinstance(model, dict) else header).get("time_input")):
        raise ConfigError(
            "time_input must be a name to be saved, got a function, which no file holds: call it in the network's forward, "
            "with time_input='t'"
        )
    try:
        return json.dumps(header)
    except TypeError as error:
        raise ConfigError(
            f"a checkpoint stores its model's options as JSON ({error}): make the process a dataclass of plain numbers"
        ) from error


def describe(model: ScoreModel) -> dict[str, Any]:
    """A ScoreModel's options as JSON has them; "net" is None for a network that is not one of fastdiff.networks."""
    if not isinstance(model, ScoreModel):
        raise ConfigError(f"model must be a ScoreModel, got {type(model).__name__}: wrap it, ScoreModel(net, sde, ...)")
    if not isinstance(model.net, nn.Module):
        raise ConfigError(f"net must be a torch.nn.Module to be saved, got {type(model.net).__name__}")
    return {
        "net": networks.describe(model.net) if type(modules.inner(model.net)) in networks.MODELS.values() else None,
        "process": model.process.config(),
        "prediction": model.prediction,
        "time_input": model.time_input,
        "data_shape": list(model.data_shape),
        "data_range": list(model.data_range),
        **({} if model.range_given else {"range_given": False}),
        "variance": model.variance,
        **({} if model.num_classes is None else {"num_classes": model.num_classes}),
        **({} if model.standardize is None else {"standardize": [values.tolist() for values in model.standardize]}),
        **({} if model.cond_shape is None else {"cond_shape": list(model.cond_shape)}),
        **(
            {}
            if model.standardize_cond is None
            else {"standardize_cond": [values.tolist() for values in model.standardize_cond]}
        ),
        **({"cond_dropout": model.cond_dropout} if model.cond_dropout else {}),
    }


def checksum(model: ScoreModel) -> str:
    """SHA-256 of the description and of every tensor: what a file of `save` would carry."""
    tensors = {"net." + name: value.detach().cpu() for name, value in modules.state(model.net).items()}
    return tensor_file.digest(as_json({"format": FORMAT, "model": describe(model)}), tensors)


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write the tensors and the header, whole or not at all."""
    target = files.path("path", path)
    if target.suffix != ".safetensors":
        target = target.with_name(target.name + ".safetensors")
    text = as_json({"format": FORMAT, **header})
    with files.replacing(target, CheckpointError) as handle:
        tensor_file.write(handle, tensors, {"fastdiff": text}, text)
    return target


def read(path: Path, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header, and the tensors whose names start with `prefix`, without that prefix."""
    name = files.shown(path)
    try:
        with files.open_regular(path) as handle:
            header, tensors, intact = _parsed(handle, prefix, name)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {files.reason(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"{name} is not a whole checkpoint of fastdiff: {files.reason(error)}") from error
    if not intact:
        raise CorruptCheckpointError(
            f"{name} was changed after it was written, or while it was read: its checksum does not match"
        )
    return header, {name[len(prefix) :]: value for name, value in tensors.items()}


def foreign(start: bytes) -> str | None:
    """What a file is that begins with these bytes, and what to do; None where it can be safetensors, or is not known."""
    if start[8:9] == b"{":  # which the header begins with, after its length
        return None
    for magic, kind in FOREIGN.items():
        if start.lstrip().startswith(magic):
            return kind
    if not start.strip() or all(byte in _TEXT for byte in start):
        what = "a text file" if start.strip() else "empty"
        return f"{what}: give the path of a checkpoint"
    return None


def _parsed(handle: IO[bytes], prefix: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """The description, the tensors with `prefix`, whether the checksum is theirs."""
    start = handle.read(64)
    handle.seek(0)
    if kind := foreign(start):
        raise CorruptCheckpointError(f"{name} is {kind}")
    metadata, entries = tensor_file.read_header(handle)
    if "fastdiff" not in metadata:
        raise CorruptCheckpointError(f"{name} is safetensors, but not of fastdiff.save: {WRAP}")
    text = metadata["fastdiff"]
    header = json.loads(text)
    form = header["format"]
    if type(form) is not int or form < 1:
        raise ValueError(f"format {form!r:.20}")
    if form > FORMAT:
        raise CheckpointVersionError(
            f"{name} has format {form!s:.40}, and this version of fastdiff reads formats <= {FORMAT}: install a newer fastdiff"
        )
    tensors, checksum = tensor_file.read(handle, entries, text, lambda key: key.startswith(prefix))
    return header, tensors, metadata.get(tensor_file.SHA) == checksum


def saved_step(path: Path) -> int | None:
    """The step of a training's checkpoint, None where there is none."""
    try:
        return int(read(path, "raw.")[0]["step"])
    except (CheckpointError, KeyError, TypeError, ValueError, OSError):
        return None


def checkpoints(folder: Path) -> list[Path]:
    """Those of a training in its directory: the last, and then those by their steps that `keep` left, the latest first."""
    last, steps = folder / FILE, _numbered(folder)
    return [last] * last.exists() + [steps[step] for step in sorted(steps, reverse=True)]


def _numbered(folder: Path) -> dict[int, Path]:
    """Those by their steps."""
    names = folder.glob(NUMBERED.format(0).replace("0", "[0-9]"))
    return {int(path.stem.removeprefix("step-")): path for path in names}


def keep_last(folder: Path, step: int, keep: int) -> None:
    """The checkpoint of `step` also by its number, and only then no more than the last `keep` of such; none of later steps.

    It is the same file by another name where the file system has hard links.
    """
    source, number = folder / FILE, folder / NUMBERED.format(step)
    if source.exists() and not (number.exists() and number.samefile(source)):
        try:
            number.unlink(missing_ok=True)
            os.link(source, number)
            files.flush_folder(folder)
        except OSError:
            with files.open_regular(source) as handle, files.replacing(number, CheckpointError) as copy:
                shutil.copyfileobj(handle, copy)
    steps = _numbered(folder)
    kept = sorted(k for k in steps if k <= step)[-keep:]
    try:
        for path in (path for k, path in steps.items() if k not in kept):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{files.shown(folder)}: older checkpoints cannot be removed ({files.reason(error)}): leave out keep="
        ) from error


def check(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """CheckpointMismatchError unless the tensors are those that the network takes, all finite."""
    target = modules.state(network)
    shared = sorted(target.keys() & tensors.keys())
    kinds = {k: (target[k].is_floating_point(), tensors[k].dtype in FLOATS) for k in shared}
    problems = {
        "lacks": sorted(target.keys() - tensors.keys()),
        "has the unknown": sorted(tensors.keys() - target.keys()),
        "has other shapes for": [k for k in shared if target[k].shape != tensors[k].shape],
        "has other dtypes for": [k for k in shared if kinds[k][0] != kinds[k][1]],
        "has numbers that are not finite in": [k for k in shared if not finite(tensors[k])],
    }
    for problem, names in problems.items():
        if names:
            listed = ", ".join(names[:5])
            shown = listed[:90] + ", …" * (len(names) > 5 or len(listed) > 90)
            raise CheckpointMismatchError(
                f"{files.shown(path)} {problem} {len(names)} tensors of this network: {shown}"
            )


def finite(value: Tensor) -> bool:
    """Whether all numbers are, in pieces that take no memory to speak of."""
    return not value.dtype.is_floating_point or all(
        bool(piece.isfinite().all()) for piece in value.flatten().split(1 << 22)
    )


def directory(checkpoint: str | os.PathLike[str]) -> Path:
    """The folder of a training's checkpoints, made if need be, in which a file can be written; else an error."""
    folder = files.path("checkpoint", checkpoint)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint={files.shown(folder)} cannot be a directory ({files.reason(error)}): choose another"
        ) from error
    files.check_writable("checkpoint", folder / FILE, CheckpointError)
    return folder


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    path = files.path("path_or_name", path_or_name)
    shipped = sorted(file.stem for file in SHIPPED.glob("*.safetensors"))
    candidates = [path, path / FILE, *([path.with_name(path.name + ".safetensors")] if path.name else [])]
    name = str(path_or_name)
    try:
        found = next((candidate for candidate in candidates if candidate.is_file()), None)
        if found is None and path.is_dir() and name not in shipped:
            _check_foreign_folder(path)
    except OSError as error:
        raise CheckpointError(f"{files.shown(path)} cannot be read: {files.reason(error)}") from error
    if name in shipped:
        if found is None:
            return SHIPPED / f"{name}.safetensors"
        warn(
            f"{name} is a file here and also a model that ships with fastdiff, and the file is read: write ./{name} for the "
            f"file, or rename it for the model that ships"
        )
    if found is None:
        raise FileNotFoundError(
            f"no checkpoint at {files.shown(path)}: give a path, or a name that ships with it ({', '.join(shipped)})"
        )
    return found


def _check_foreign_folder(folder: Path) -> None:
    """Say so where a folder is a model of diffusers or transformers, or holds files of weights."""
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            raise CheckpointError(
                f"{files.shown(folder)} is a folder of diffusers or another library, with {name}: load its network by that, "
                f"and wrap it, ScoreModel(net, sde, ...)"
            )
    endings = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
    weights = sorted(file.name for file in folder.iterdir() if file.suffix in endings and not file.name.startswith("."))
    if weights:
        raise CheckpointError(
            f"{files.shown(folder)} holds no {FILE}, but {files.shown(weights[-1])}: give the path of a file in it"
        )
