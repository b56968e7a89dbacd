"""Files: one safetensors file holds the tensors and, as JSON in its header, all that rebuilds the model. Never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn

from .. import models, processes
from ..errors import CheckpointError, CheckpointMismatchError, CheckpointVersionError, CorruptCheckpointError
from ..model import ScoreModel

FORMAT = 1
SHIPPED = Path(__file__).parent.parent / "checkpoints"
FILE = "checkpoint.safetensors"


def save(model: ScoreModel, path: str | os.PathLike[str]) -> Path:
    """Write a ScoreModel whose network is one of fastdiff.models; the file appears whole or not at all."""
    header = {"model": describe(model)}
    return write(path, {"net." + name: value for name, value in model.net.state_dict().items()}, header)


def load(path_or_name: str | os.PathLike[str], *, net: nn.Module | None = None) -> ScoreModel:
    """The ScoreModel of a file written by `save`, of a training directory (its EMA weights), or of a shipped name.

    `net`: a network to fill, for one that is not of fastdiff.models (the tensors' names must be its own).
    Refused by CorruptCheckpointError, CheckpointVersionError or CheckpointMismatchError; nothing is half-loaded.
    """
    path = _find(path_or_name)
    header, tensors = read(path, "net.")
    config = dict(header["model"])
    network = models.build(config["net"]) if net is None else net
    fill(network, tensors, path)
    return ScoreModel(
        network,
        processes.from_config(config["process"]),
        prediction=config["prediction"],
        time_input=config["time_input"],
        data_shape=tuple(config["data_shape"]),
        data_range=tuple(config["data_range"]),
        variance=config["variance"],
    ).eval()


def describe(model: ScoreModel) -> dict[str, Any]:
    """The JSON that rebuilds a ScoreModel."""
    return {
        "net": models.describe(model.net),
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
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    metadata = {"fastdiff": json.dumps({"format": FORMAT, **header})}
    try:
        # written here and not by safetensors' own save_file, which leaves files that only their owner may read
        with open(temporary, "wb") as handle:
            handle.write(serialize({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{target} could not be written ({error}); what stood there before is untouched"
        ) from error
    return target


def read(path: Path, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header, and the tensors whose names start with `prefix` (which is cut off)."""
    try:
        with safe_open(path, "pt") as handle:
            header = json.loads((handle.metadata() or {})["fastdiff"])
            names = [name for name in handle.keys() if name.startswith(prefix)]  # noqa: SIM118 (a handle, not a dict)
            tensors = {name[len(prefix) :]: handle.get_tensor(name) for name in names}
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptCheckpointError(f"{path} is not a whole file of fastdiff.save: {error!r:.120}") from error
    if header.get("format", 0) > FORMAT:
        raise CheckpointVersionError(f"{path} was written by format {header['format']}, this version reads <= {FORMAT}")
    return header, tensors


def fill(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load the tensors into the network, all or none."""
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]
    for what, names in (("lacks", missing), ("has the unknown", unknown), ("has other shapes for", sorted(wrong))):
        if names:
            shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            raise CheckpointMismatchError(f"{path} {what} {len(names)} tensors of this network: {shown}")
    network.load_state_dict(tensors)


def _find(path_or_name: str | os.PathLike[str]) -> Path:
    path = Path(path_or_name)
    shipped = sorted(file.stem for file in SHIPPED.glob("*.safetensors"))
    candidates = [path, path / FILE, path.with_name(path.name + ".safetensors")]
    if str(path_or_name) in shipped:
        candidates.append(SHIPPED / f"{path_or_name}.safetensors")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"no checkpoint at {path}; the names that ship with fastdiff are {', '.join(shipped)}")
