"""Checkpoints: one safetensors file with the tensors and, as JSON in its header, the model's description. No pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .. import networks
from ..errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointVersionError,
    ConfigError,
    CorruptCheckpointError,
)
from ..execution import modules
from ..model import ScoreModel
from ..planning import processes

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "checkpoints"
FILE = "checkpoint.safetensors"


def save(model: ScoreModel, path: str | os.PathLike[str]) -> Path:
    """Write a ScoreModel to `path` (.safetensors is added where it lacks); the file appears whole or not at all.

    `load` rebuilds a network of fastdiff.networks; any other must be given to it as `net`.
    """
    header = {"model": describe(model)}
    return write(path, {"net." + name: value for name, value in modules.state(model.net).items()}, header)


def load(
    path_or_name: str | os.PathLike[str], *, net: nn.Module | None = None, sde: processes.Process | None = None
) -> ScoreModel:
    """The ScoreModel of a file written by `save`, of a training directory (its EMA weights), or of a shipped name.

    `net`: the network to fill, needed for a network of your own; its tensors must have the names in the file.
    `sde`: the process it was trained on, needed for a process of your own; its options must be those in the file.
    Errors: FileNotFoundError, CorruptCheckpointError, CheckpointVersionError, CheckpointMismatchError; nothing is
    half-loaded.
    """
    path, given = _find(path_or_name), None if sde is None else processes.get(sde)
    header, tensors = read(path, "net.")
    try:
        config = header["model"]
        if net is None and config["net"] is None:
            raise CheckpointMismatchError(
                f"{path} holds a network that is not one of fastdiff.networks: give it as load(..., net=)"
            )
        network = networks.build(config["net"]) if net is None else net
        process = _process(config["process"], given, path)
        networks.adopt(network, config["net"])
        options = {name: config[name] for name in ("prediction", "time_input", "data_shape", "data_range", "variance")}
        model = ScoreModel(network, process, **options)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path} does not describe a model: {error!r:.120}") from error
    check(network, tensors, path)
    if net is None:
        _take_dtypes(network, tensors)
    modules.load_state(network, tensors)
    return model.eval()


def _take_dtypes(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The precision of the file, where the network was built for it."""
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(tensors[name].dtype)


def _process(config: dict[str, Any], sde: processes.Process | None, path: Path) -> processes.Process:
    """The process of a file: fastdiff's of that name, or the caller's `sde` where its description is the file's."""
    if sde is not None:
        if json.loads(as_json(sde.config())) != config:
            raise CheckpointMismatchError(
                f"{path} was trained on {config!r:.120}, got sde={sde!r:.120}: give the process it was trained on"
            )
        return sde
    if config["name"] not in processes.PROCESSES:
        raise CheckpointMismatchError(
            f"{path} was trained on {config['name']!r}, which is not one of fastdiff.processes: give it as load(..., sde=)"
        )
    return processes.from_config(config)


def as_json(header: dict[str, Any]) -> str:
    """The header as JSON; ConfigError where it holds anything but numbers, strings and lists and dicts of them."""
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
        "variance": model.variance,
    }


def write(path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Write atomically: a temporary file beside the target, flushed to the disk, then renamed over it."""
    target = Path(path)
    if target.suffix != ".safetensors":
        target = target.with_name(target.name + ".safetensors")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    # clones: tied weights are written twice, which safetensors would refuse as shared memory
    copies = {name: v.detach().cpu().clone(memory_format=torch.contiguous_format) for name, v in tensors.items()}
    text = as_json({"format": FORMAT, **header})
    try:
        # written here and not by safetensors' own save_file, which leaves files that only their owner may read
        with open(temporary, "wb") as handle:
            handle.write(serialize(copies, {"fastdiff": text, "sha256": _digest(text, copies)}))
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target} could not be written ({error}): a file that stood there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return target


def read(path: Path, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header, and the tensors whose names start with `prefix`, without that prefix."""
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            text, header = metadata["fastdiff"], json.loads(metadata["fastdiff"])
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (a handle, not a dict)
        form = int(header["format"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CorruptCheckpointError(f"{path} is not a whole checkpoint of fastdiff: {error!r:.120}") from error
    if form > FORMAT:
        raise CheckpointVersionError(
            f"{path} has format {form}, and this version of fastdiff reads formats <= {FORMAT}: install a newer fastdiff"
        )
    if metadata.get("sha256") != _digest(text, tensors):
        raise CorruptCheckpointError(f"{path} was changed after it was written: its checksum does not match")
    return header, {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def saved_step(path: Path) -> int | None:
    """The step of a training's checkpoint, None where there is none."""
    try:
        return int(read(path, "raw.")[0]["step"])
    except (CheckpointError, KeyError, TypeError, ValueError, OSError):
        return None


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the header and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def check(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """CheckpointMismatchError unless the tensors are those that the network takes, all finite."""
    target = modules.state(network)
    shared = sorted(target.keys() & tensors.keys())
    problems = {
        "lacks": sorted(target.keys() - tensors.keys()),
        "has the unknown": sorted(tensors.keys() - target.keys()),
        "has other shapes for": [k for k in shared if target[k].shape != tensors[k].shape],
        "has other dtypes for": [k for k in shared if target[k].is_floating_point() != tensors[k].is_floating_point()],
        "has numbers that are not finite in": [k for k in shared if not bool(tensors[k].isfinite().all())],
    }
    for problem, names in problems.items():
        if names:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise CheckpointMismatchError(f"{path} {problem} {len(names)} tensors of this network: {shown}")


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    path = Path(path_or_name)
    shipped = sorted(file.stem for file in SHIPPED.glob("*.safetensors"))
    candidates = [path, path / FILE, *([path.with_name(path.name + ".safetensors")] if path.name else [])]
    if str(path_or_name) in shipped:
        candidates.append(SHIPPED / f"{path_or_name}.safetensors")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"no checkpoint at {path}: give a path, or a name that ships with it ({', '.join(shipped)})"
    )
