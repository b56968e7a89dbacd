"""NCSN and NCSNv2 (Song & Ermon 2019, 2020): the RefineNets of their repositories, and those of score_sde_pytorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...errors import CheckpointMismatchError, ConfigError, choose
from ...model import ScoreModel
from ...networks.refinenet import NORMS, RefineNet
from ...planning import processes, schedules
from ..torch_file import load_tensors
from . import unets

SOURCE = "NCSN"
STAGES = ("1", "2", "3", "31", "4", "5")  # as it numbers what it has of them, in the order in which they run
REFINES = ("1", "2", "31", "3", "4", "5")
NORMALIZATIONS = {
    "InstanceNorm++": "instance++",
    "InstanceNorm": "instance",
    "VarianceNorm": "variance",
    "NoneNorm": "affine",
}
NONLINEARITIES = {"elu": "elu", "relu": "relu", "lrelu": "leaky_relu", "swish": "silu"}
# its names of a normalisation's numbers where there is no noise level, in the order of NORMS
UNCONDITIONAL = {"InstanceNorm++": ("gamma", "alpha", "beta"), "VarianceNorm": ("alpha",), "NoneNorm": ()}


def network(
    tensors: dict[str, Tensor], shape: Sequence[int], *, normalization: str | None = None, nonlinearity: str = "elu",
    logit_transform: bool = False, rescaled: bool = False, centered: bool = False,
) -> RefineNet:  # fmt: skip
    """The network of a state dict: `begin_conv`, `res1` …, `refine1` …, `normalizer`, `end_conv`. NCSNv2's code divides what
    this one returns by σ.

    normalization  "InstanceNorm++", "InstanceNorm", "VarianceNorm" or "NoneNorm", needed where the shapes do not tell
    logit_transform, rescaled, centered  whether the data are not in [0, 1], so that the network sees x and not 2 x − 1
    """
    file = unets.Tensors({name.removeprefix("module."): value for name, value in tensors.items()}, SOURCE)
    stages = [name for name in STAGES if file.has(f"res{name}.0.conv1")]
    refines = [name for name in REFINES if file.has(f"refine{name}.crp.convs.0")]
    enter, out = file.take("begin_conv.weight"), file.take("end_conv.weight")
    channels = enter.shape[0]
    if len(shape) != enter.ndim - 1 or shape[0] != enter.shape[1]:
        raise ConfigError(
            f"shape must be one sample's, {enter.shape[1]} channels and {enter.ndim - 2} axes by the file, got {tuple(shape)}"
        )
    if len(stages) < 2 or len(stages) != len(refines):
        raise CheckpointMismatchError(
            f"the file must have as many of res1, res2, … as of refine1, refine2, …, got {len(stages)} and {len(refines)}: it is "
            f"of a network that is not {SOURCE}'s"
        )
    kind = _normalization(file, channels, normalization)
    normed = any(".adapt_convs.0.1_1_norm." in name for name in file.all)
    halved = [file.has(f"res{name}.0.shortcut.conv") for name in stages[1:]]
    with torch.device("meta"):
        net = RefineNet(
            shape,
            channels=channels,
            # of a stage's second block, as the first one has the channels of the stage before
            multipliers=[file.take(f"res{name}.1.conv1.weight").shape[0] // channels for name in stages],
            dilations=[1, *(1 if half else 2 ** halved[: i + 1].count(False) for i, half in enumerate(halved))],
            levels=len(file.take("normalizer.embed.weight")) if file.has("normalizer.embed") else None,
            norm=NORMALIZATIONS[kind],
            refine_norm=normed,
            pooling="average" if normed else "max",  # which go together in its code
            activation=NONLINEARITIES[choose("nonlinearity", nonlinearity, NONLINEARITIES)],
            centered=logit_transform or rescaled or centered,
            out_channels=None if out.shape[0] == shape[0] else out.shape[0],
        )
    state, values = net.state_dict(), dict[str, Tensor]()
    for ours, theirs in _layers(stages, refines, halved):
        for part, value in zip(("weight", "bias"), file.layer(theirs)):
            if value is not None:
                _check(f"{theirs}.{part}", value, state.get(f"{ours}.{part}"))
                values[f"{ours}.{part}"] = value
    numbers = []
    for norm, theirs in zip(net.norms(), _norms(stages, refines, normed), strict=True):
        numbers.append(_numbers(file, theirs, kind, norm.channels))
        _check(theirs, numbers[-1], net.table.weight[:, : norm.width])
    file.finish(["sigmas"])  # the noise levels, which are the process's
    net = net.to_empty(device="cpu")
    unets.fill(net, {**values, "table.weight": torch.cat(numbers, 1)}, SOURCE)
    return net


def _check(name: str, value: Tensor, ours: Tensor | None) -> None:
    if ours is None or value.shape != ours.shape:
        raise CheckpointMismatchError(
            f"the file's {name!r} must {'not be there' if ours is None else f'have the shape {list(ours.shape)}'}, got "
            f"{list(value.shape)}: it is of a network that is not {SOURCE}'s"
        )


def _normalization(file: unets.Tensors, channels: int, given: str | None) -> str:
    """Its name of the normalisations, by what they hold."""
    is_told = file.has("normalizer.embed")
    if is_told:
        parts = file.take("normalizer.embed.weight").shape[1] // channels
        found = [name for name, kind in NORMALIZATIONS.items() if len(NORMS[kind]) == parts]
        found = found or ["InstanceNorm++"]  # whose shape is refused then
    elif "normalizer.alpha" in file.all:
        found = ["InstanceNorm++" if "normalizer.gamma" in file.all else "VarianceNorm"]
    else:
        found = ["InstanceNorm", "NoneNorm"]
    if given is not None:
        choose("normalization", given, NORMALIZATIONS)
    name = given or (found[0] if len(found) == 1 else None)
    if name not in found:
        raise ConfigError(
            f"normalization must be {' or '.join(map(repr, found))} by the file's shapes, got {given!r}: give that of the "
            "network's configuration"
        )
    if name == "InstanceNorm" and not is_told:
        raise ConfigError(
            "normalization must not be 'InstanceNorm' without noise levels, got it: its code takes their number for the last "
            "one's ε, and no such network is known here"
        )
    return name


def _numbers(file: unets.Tensors, prefix: str, kind: str, channels: int) -> Tensor:
    """The numbers of a normalisation, [levels or 1, width]."""
    if file.has(f"{prefix}.embed"):
        return file.take(f"{prefix}.embed.weight")
    if kind == "NoneNorm":  # which is nothing at all there
        return torch.cat([torch.ones(1, channels), torch.zeros(1, channels)], 1)
    return torch.cat([file.take(f"{prefix}.{name}") for name in UNCONDITIONAL[kind]])[None]


def _layers(stages: list[str], refines: list[str], halved: list[bool]) -> Iterator[tuple[str, str]]:
    """Our name and its name of each convolution."""
    yield "enter", "begin_conv"
    for i, name in enumerate(stages):
        inner = ".conv" if i and halved[i - 1] else ""  # the layer within one that takes means
        for block in range(2):
            ours, theirs, last = f"stages.{i}.{block}", f"res{name}.{block}", "" if block else inner
            yield f"{ours}.conv", f"{theirs}.conv1"
            yield f"{ours}.last", f"{theirs}.conv2{last}"
        if i:
            yield f"stages.{i}.0.skip", f"res{name}.0.shortcut{inner}"
    for i, name in enumerate(refines):
        for number in range(2 if i else 1):
            yield from _residual(f"refine.{i}.adapt.{number}", f"refine{name}.adapt_convs.{number}", 2)
            if i:
                yield f"refine.{i}.fuse.{number}", f"refine{name}.msf.convs.{number}"
        for number in range(2):
            yield f"refine.{i}.chain.{number}", f"refine{name}.crp.convs.{number}"
        yield from _residual(f"refine.{i}.output", f"refine{name}.output_convs", 3 if name == refines[-1] else 1)
    yield "out", "end_conv"


def _residual(ours: str, theirs: str, blocks: int) -> Iterator[tuple[str, str]]:
    for i in range(2 * blocks):
        yield f"{ours}.convs.{i}", f"{theirs}.{i // 2 + 1}_{i % 2 + 1}_conv"


def _norms(stages: list[str], refines: list[str], normed: bool) -> Iterator[str]:
    """Its names of the normalisations, in the order in which they run."""
    for name in stages:
        yield from (f"res{name}.{block}.normalize{number}" for block in range(2) for number in (1, 2))
    for i, name in enumerate(refines if normed else ()):
        inputs = range(2 if i else 1)
        for number in inputs:
            yield from (f"refine{name}.adapt_convs.{number}.{block}_{k}_norm" for block in (1, 2) for k in (1, 2))
        if i:
            yield from (f"refine{name}.msf.norms.{number}" for number in inputs)
        yield from (f"refine{name}.crp.norms.{number}" for number in range(2))
        for block in range(3 if name == refines[-1] else 1):
            yield from (f"refine{name}.output_convs.{block + 1}_{k}_norm" for k in (1, 2))
    yield "normalizer"


def model(
    path: Path, part: str | None, *, image_size: int | Sequence[int], sigma_begin: float | None = None, sigma_end: float = 0.01,
    normalization: str | None = None, nonlinearity: str = "elu", logit_transform: bool = False, rescaled: bool = False,
) -> ScoreModel:  # fmt: skip
    """The options are those of its .yml files, under data and model; levels and widths are in the file. Of NCSNv2 the averaged
    weights, where the file has them, and its levels; of NCSN levels from `sigma_begin` (1) to `sigma_end`."""
    everything = load_tensors(path)
    if part is None and not any(name.startswith("begin_conv.") for name in unets.unwrapped(everything)):
        part = (
            "4" if any(name.startswith("4.") for name in everything) else "0"
        )  # its list: network, optimiser, …, averages
    own = (
        everything
        if part is None
        else {n[len(part) + 1 :]: v for n, v in everything.items() if n.startswith(f"{part}.")}
    )
    tensors = unets.unwrapped(own or load_tensors(path, part))
    if "sigmas" not in tensors:  # a table beside the weights, which averages lack
        table = [name for name in everything if name.split(".")[-1] == "sigmas"]
        tensors |= {"sigmas": everything[table[0]]} if table else {}
    channels = unets.Tensors(tensors, SOURCE).take("begin_conv.weight").shape[1]
    centered = logit_transform or rescaled
    net = network(
        tensors,
        (channels, *unets.sizes(image_size)),
        normalization=normalization,
        nonlinearity=nonlinearity,
        centered=centered,
    )
    if "sigmas" in tensors:  # NCSNv2, which divides by σ
        levels, prediction = [float(f"{value:.6g}") for value in tensors["sigmas"].tolist()], "scaled_score"
    else:
        levels = schedules.geometric(sigma_begin or 1.0, sigma_end, net.config["levels"] or 1).tolist()
        prediction = "score"
    return ScoreModel(net, processes.NCSN(levels), prediction, "index", net.shape, (-1, 1) if rescaled else (0, 1))
