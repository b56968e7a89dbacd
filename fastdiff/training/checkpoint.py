"""Files: one safetensors file holds the tensors and, as JSON in its header, all that rebuilds the model. Never pickle."""

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
from ..model import ScoreModel
from ..planning import processes

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "checkpoints"
FILE = "checkpoint.safetensors"


def save(model: ScoreModel, path: str | os.PathLike[str]) -> Path:
    """Write a ScoreModel whose network is one of fastdiff.models; the file appears whole or not at all."""
    header = {"model": describe(model)}
    return write(path, {"net." + name: value for name, value in model.net.state_dict().items()}, header)


def load(
    path_or_name: str | os.PathLike[str], *, net: nn.Module | None = None, sde: processes.Process | None = None
) -> ScoreModel:
    """The ScoreModel of a file written by `save`, of a training directory (its EMA weights), or of a shipped name.

    `net`: the network to fill, needed for one that is not of fastdiff.models (the tensors' names must be its own).
    `sde`: the process it was trained on, needed for one that is not of fastdiff.processes (its options must be the file's).
    Refused by CorruptCheckpointError, CheckpointVersionError or CheckpointMismatchError; nothing is half-loaded.
    """
    path, own = _find(path_or_name), None if sde is None else processes.get(sde)
    header, tensors = read(path, "net.")
    try:
        config = header["model"]
        if net is None and config["net"] is None:
            raise CheckpointMismatchError(
                f"{path} holds a network that is not of fastdiff.models: give it as load(net=...)"
            )
        network = networks.build(config["net"]) if net is None else net
        process = _process(config["process"], own, path)
        options = {name: config[name] for name in ("prediction", "time_input", "data_shape", "data_range", "variance")}
        model = ScoreModel(network, process, **options)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path} does not describe a model: {error!r:.120}") from error
    fill(network, tensors, path)
    return model.eval()


def _process(config: dict[str, Any], own: processes.Process | None, path: Path) -> processes.Process:
    """The process of a file: fastdiff's by its name, or the caller's own if it is the one described."""
    if own is not None:
        if json.loads(as_json(own.config())) != config:
            raise CheckpointMismatchError(f"{path} was trained on {config!r:.120}, got sde={own!r:.120}: give that one")
        return own
    if config["name"] not in processes.PROCESSES:
        raise CheckpointMismatchError(
            f"{path} was trained on {config['name']!r}, a process that is not of fastdiff.processes: give it as load(sde=...)"
        )
    return processes.from_config(config)


def as_json(header: dict[str, Any]) -> str:
    """The header as JSON, which numbers, strings and lists of them have."""
    try:
        return json.dumps(header)
    except TypeError as error:
        raise ConfigError(
            f"a checkpoint describes its model in JSON, and {error}: make the process a dataclass of plain numbers"
        ) from error


def describe(model: ScoreModel) -> dict[str, Any]:
    """The JSON that rebuilds a ScoreModel; "net" is null for a network that is not of fastdiff.models."""
    if not isinstance(model, ScoreModel):
        raise ConfigError(f"model must be a ScoreModel, got {type(model).__name__}: wrap it, ScoreModel(net, sde, ...)")
    if not isinstance(model.net, nn.Module):
        raise ConfigError(f"net must be a torch.nn.Module to be saved, got {type(model.net).__name__}")
    known = any(type(model.net) is network for network in networks.MODELS.values())
    return {
        "net": networks.describe(model.net) if known else None,
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
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    text = as_json({"format": FORMAT, **header})
    try:
        # written here and not by safetensors' own save_file, which leaves files that only their owner may read
        with open(temporary, "wb") as handle:
            handle.write(serialize(own, {"fastdiff": text, "sha256": _digest(text, own)}))
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
            f"{target} could not be written ({error}); what stood there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return target


def read(path: Path, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header, and the tensors whose names start with `prefix` (which is cut off), as they were written."""
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            text, header = metadata["fastdiff"], json.loads(metadata["fastdiff"])
            found = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (a handle, not a dict)
        form = int(header["format"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CorruptCheckpointError(f"{path} is not a whole file of fastdiff.save: {error!r:.120}") from error
    if form > FORMAT:
        raise CheckpointVersionError(f"{path} was written by format {form}, this version reads <= {FORMAT}")
    if metadata.get("sha256") != _digest(text, found):
        raise CorruptCheckpointError(f"{path} was altered after it was written: its checksum does not fit")
    return header, {name[len(prefix) :]: value for name, value in found.items() if name.startswith(prefix)}


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the header and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def fill(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load the tensors into the network, all or none."""
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    both = own.keys() & tensors.keys()
    wrong = sorted(k for k in both if own[k].shape != tensors[k].shape)
    kinds = sorted(k for k in both if own[k].is_floating_point() != tensors[k].is_floating_point())
    broken = sorted(k for k in both if tensors[k].is_floating_point() and not bool(tensors[k].isfinite().all()))
    problems = {"lacks": missing, "has the unknown": unknown, "has other shapes for": wrong, "has other dtypes for": kinds,
                "has numbers that are not finite in": broken}  # fmt: skip
    for what, names in problems.items():
        if names:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise CheckpointMismatchError(f"{path} {what} {len(names)} tensors of this network: {shown}")
    network.load_state_dict(tensors)


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    path = Path(path_or_name)
    shipped = sorted(file.stem for file in SHIPPED.glob("*.safetensors"))
    candidates = [path, path / FILE, *([path.with_name(path.name + ".safetensors")] if path.name else [])]
    if str(path_or_name) in shipped:
        candidates.append(SHIPPED / f"{path_or_name}.safetensors")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no checkpoint at {path}; the names that ship with fastdiff are {', '.join(shipped)}")
