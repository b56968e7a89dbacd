"""EDM (Karras et al. 2022): the networks within its pickles, SongUNet (DDPM++ and NCSN++) and DhariwalUNet (ADM)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointMismatchError, ConfigError, choose, short
from ...model import ScoreModel
from ...networks import PaperUNet
from ...planning import processes
from ..torch_file import load_tensors
from . import unets

SOURCE = "EDM"
NAMES = unets.Names(
    norm="norm0", conv="conv0", told="affine", norm2="norm1", last="conv1", skip=("skip",), attention_norm="norm2",
    attention=(("qkv",),), project=("proj",),
)  # fmt: skip
LAYER = re.compile(r"(enc|dec)\.(\d+)x(\d+)_([a-z0-9_]+)\.")


def published(name: str) -> dict[str, Any]:
    """What the name of a published file says: "edm-cifar10-32x32-cond-vp", "baseline-cifar10-32x32-uncond-ve"."""
    stem = name.removesuffix(".pkl")
    if stem.startswith("edm-"):  # whose last word is of the network
        return {"precond": "edm"}
    if stem.startswith("baseline-") and stem.endswith(("-vp", "-ve")):
        return {"precond": stem[-2:]}
    raise ConfigError(
        f"config must be a dict, or the name of a published file such as 'edm-cifar10-32x32-cond-vp', got {short(name)}"
    )


def network(
    tensors: dict[str, Tensor], shape: tuple[int, ...] | None = None, *, dropout: float = 0.0, shift: float = 0.0
) -> PaperUNet:
    """The network of the tensors of SongUNet or DhariwalUNet.

    shift   to be added to the time that the network is told: −ln 2 for VE's preconditioning
    """
    file = unets.Tensors(tensors, SOURCE)
    parts, side, facts = _parts(file)
    song = "out_norm.weight" not in tensors
    taps = next((v for name, v in tensors.items() if name.endswith("resample_filter")), None)
    line = (1.0, 1.0) if taps is None else taps[0, 0].sum(0).tolist()
    size = tuple(shape) if shape is not None else (tensors[f"{parts['enter']}.weight"].shape[1], side, side)
    labels = None
    if file.has("map_label"):
        weight, bias = file.layer("map_label")  # of labels as vectors, which are 0 where there is none
        none = weight.new_zeros(1, len(weight)) if bias is None else bias[None]
        labels = torch.cat([weight.T * (math.sqrt(weight.shape[1]) if song else 1.0) + none, none])
    fourier = "map_noise.freqs" in tensors
    config: dict[str, Any] = {
        "shape": size, "dropout": dropout, "eps": 1e-6 if song else 1e-5, "rescale": song, "heads": 1, "resample": "block",
        "head_channels": None if song else 64, "taps": [round(tap / line[0]) for tap in line], "labels_first": song,
        "time_scale": 16.0 if fourier else 1.0,
        "time_embedding": "fourier" if fourier else "sinusoidal" if song else "cos_sin", **facts,
    }  # fmt: skip
    net = unets.paper_unet(file, parts, NAMES, config, unets.heads_first(parts_last=True), labels)
    if shift:
        frequencies = net.conditioning.time.weight if fourier else net.conditioning.time.frequencies / (2 * math.pi)
        turned = [net.conditioning.mlp[0].weight.data]
        turned += [net.conditioning.label.weight.data] if net.conditioning.labels_first else []
        for rows in turned:  # labels join the features, so that they turn back as these turn
            rows.copy_(unets.shifted(rows, frequencies, shift))
    file.finish(["map_augment", "resample_filter"])
    return net


def _parts(file: unets.Tensors) -> tuple[dict[str, str], int, dict[str, Any]]:
    """(our names of its modules, the resolution, what the names tell)."""
    names: dict[str, dict[int, set[str]]] = {"enc": {}, "dec": {}}
    for name in file.all:
        if (found := LAYER.match(name)) is not None:
            side, size, _, kind = found.groups()
            names[side].setdefault(int(size), set()).add(kind)
    if not names["enc"] or not names["dec"]:
        raise CheckpointMismatchError(
            f"the file lacks enc or dec, which {SOURCE}'s networks have: part='ema.model' is one's"
        )
    sizes = sorted(names["enc"], reverse=True)
    into, out = "none", "none"
    parts = {"time.0": "map_layer0", "time.1": "map_layer1", "enter": f"enc.{sizes[0]}x{sizes[0]}_conv"}
    if "map_noise.freqs" in file.all:
        parts["frequencies"] = "map_noise.freqs"

    def block(ours: str, theirs: str) -> None:
        parts[ours] = theirs
        if file.has(f"{theirs}.qkv"):
            parts[f"{ours}.attend"] = theirs

    for level, size in enumerate(sizes):
        at, kinds = f"enc.{size}x{size}", names["enc"][size]
        if level:
            block(f"down.{level}.resample", f"{at}_down")
        if "aux_skip" in kinds:
            into, parts[f"down.{level}.join"] = "skip", f"{at}_aux_skip"
        elif "aux_residual" in kinds:
            into, parts[f"down.{level}.pyramid"] = "residual", f"{at}_aux_residual"
        for i in range(sum(kind.startswith("block") for kind in kinds)):
            block(f"down.{level}.blocks.{i}", f"{at}_block{i}")
    for level, size in enumerate(reversed(sizes)):
        at, kinds = f"dec.{size}x{size}", names["dec"][size]
        if not level:
            block("middle.0", f"{at}_in0")
            block("middle.1", f"{at}_in1")
        for i in range(sum(kind.startswith("block") for kind in kinds)):
            block(f"up.{level}.blocks.{i}", f"{at}_block{i}")
        if level < len(sizes) - 1:
            block(f"up.{level}.resample", f"dec.{sizes[-level - 2]}x{sizes[-level - 2]}_up")
            if "aux_conv" in kinds:
                out, parts[f"up.{level}.norm"], parts[f"up.{level}.head"] = "skip", f"{at}_aux_norm", f"{at}_aux_conv"
    last = f"dec.{sizes[0]}x{sizes[0]}_aux"
    song = file.has(f"{last}_conv")
    parts |= {"norm": f"{last}_norm", "out": f"{last}_conv"} if song else {"norm": "out_norm", "out": "out_conv"}
    return parts, sizes[0], {"progressive_in": into, "progressive_out": out}


def model(
    path: Path, part: str | None, *, precond: str = "edm", sigma_data: float = 0.5, sigma_min: float | None = None,
    sigma_max: float | None = None, dropout: float = 0.0,
) -> ScoreModel:  # fmt: skip
    """`precond` "edm", "vp" or "ve": its preconditioning, which the files do not tell."""
    choose("precond", precond, ("edm", "vp", "ve"))
    tensors = load_tensors(path, part or "ema")
    tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    shift = -math.log(2) if precond == "ve" else 0.0  # it is told ln(σ/2)
    net = network(tensors, shift=shift, dropout=dropout)
    if precond == "vp":
        return ScoreModel(net, processes.VP(0.1, 20.0), "eps", "t*999", net.shape, (-1, 1))
    if precond == "ve":
        return ScoreModel(
            net, processes.VE(sigma_min or 0.02, sigma_max or 100.0), "scaled_score", "log_sigma", net.shape, (-1, 1)
        )
    process = processes.EDM(sigma_data, sigma_min or 0.002, sigma_max or 80.0)
    return ScoreModel(net, process, "edm", "c_noise", net.shape, (-1, 1))
