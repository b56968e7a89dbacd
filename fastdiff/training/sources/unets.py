"""Tensors of others' U-Nets into a PaperUNet: their parts by our names, what follows from shapes, and every tensor used once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...errors import CheckpointMismatchError, ConfigError
from ...networks import PaperUNet
from ...networks.layers import integers
from ...networks.paper_unet import PaperEncoder

Net = TypeVar("Net", bound=PaperEncoder)
Orders = Callable[[Tensor, int], Tensor]  # rows of the weights of q, k and v, and the number of heads, to our order


class Names(NamedTuple):
    """How a source names the parts of a block; of a pair the one that is there."""

    norm: str
    conv: str
    told: str
    norm2: str
    last: str
    skip: tuple[str, ...]
    attention_norm: str
    attention: tuple[tuple[str, ...], ...]  # q, k and v, or all three in one
    project: tuple[str, ...]


class Tensors:
    """A file's tensors, each of which must be used."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self.all, self.source, self.used = dict(tensors), source, set[str]()

    def has(self, prefix: str) -> bool:
        return any(f"{prefix}.{kind}" in self.all for kind in ("weight", "W"))

    def take(self, name: str) -> Tensor:
        if name not in self.all:
            some = ", ".join(list(self.all)[:3])
            raise CheckpointMismatchError(
                f"the file lacks {name!r}, which {self.source} has here (it begins with {some}): give the part of the file "
                "that is the network, or another source"
            )
        self.used.add(name)
        value = self.all[name]
        return value.float() if value.is_floating_point() and value.dtype != torch.float64 else value

    def layer(self, prefix: str) -> tuple[Tensor, Tensor | None]:
        """(weight [outputs, inputs, *], bias) of a layer."""
        if f"{prefix}.W" in self.all:  # of a "network in network", [inputs, outputs]
            return self.take(f"{prefix}.W").T, self.take(f"{prefix}.b")
        bias = self.take(f"{prefix}.bias") if f"{prefix}.bias" in self.all else None
        return self.take(f"{prefix}.weight"), bias

    def first(self, prefix: str, choices: Iterable[str]) -> str | None:
        return next((f"{prefix}.{name}" for name in choices if self.has(f"{prefix}.{name}")), None)

    def finish(self, ignored: Iterable[str] = ()) -> None:
        """Refuse tensors that nothing took, but those whose names begin or end with one that may be ignored."""
        marks = tuple(ignored)
        left = [n for n in self.all if n not in self.used and not n.startswith(marks) and not n.endswith(marks)]
        if left:
            raise CheckpointMismatchError(
                f"the file has {len(left)} tensors for which {self.source}'s network has no place, such as {left[0]!r}: it is "
                "of another network, or of a variant that is not known here"
            )


def fill(net: torch.nn.Module, values: dict[str, Tensor], source: str) -> None:
    """The values become the network's, each of the shape that it has there."""
    state = net.state_dict()
    for name, value in values.items():
        if name not in state or _sizes(value) != _sizes(state[name]):
            found = list(state[name].shape) if name in state else "no such tensor"
            raise CheckpointMismatchError(
                f"{source}'s tensor for {name!r} must have the shape {found}, got {list(value.shape)}: give the facts with "
                "which the network was made, config="
            )
    missing = [name for name in state if name not in values]
    if missing:
        raise CheckpointMismatchError(f"the file lacks what {source}'s network has at {missing[0]!r}")
    net.load_state_dict({name: value.reshape(state[name].shape) for name, value in values.items()})


def _sizes(value: Tensor) -> list[int]:
    """Without axes of length one, which layers of the same numbers have or have not."""
    return [size for size in value.shape if size != 1]


def encoder_config(tensors: Tensors, parts: Mapping[str, str], names: Names) -> dict[str, Any]:
    """What the tensors tell of the way down."""
    levels = 1 + max(int(name.split(".")[1]) for name in parts if name.startswith("down."))
    widths = [tensors.take(f"{parts[f'down.{i}.blocks.0']}.{names.conv}.weight").shape[0] for i in range(levels)]
    told = tensors.first(parts["down.0.blocks.0"], [names.told])
    channels = widths[0] if told is None else tensors.take(f"{told}.weight").shape[1] // 4
    attention = [i for i in range(levels) if f"down.{i}.blocks.0.attend" in parts]
    resampler = parts.get("down.1.resample")
    found: dict[str, Any] = {
        "channels": channels,
        "multipliers": [width / channels for width in widths],
        "blocks": sum(name.startswith("down.0.blocks.") and name.count(".") == 3 for name in parts),
        "attention": attention,
        "scale_shift": told is not None and tensors.take(f"{told}.weight").shape[0] == 2 * widths[0],
    }
    if resampler is not None and _is_block(tensors, resampler, names):
        found |= {"resample": "block", "skip_conv": tensors.first(resampler, names.skip) is not None}
    return found


def paper_unet(
    tensors: Tensors,
    parts: Mapping[str, str],
    names: Names,
    config: dict[str, Any],
    order: Orders | None = None,
    labels: Tensor | None = None,
    more: Mapping[str, Tensor] | None = None,
) -> PaperUNet:
    """The network whose parts, by our names ("down.0.blocks.1"), are theirs of those names.

    config   what no shape tells: shape, heads or head_channels, taps, rescale, …
    labels   the embeddings of labels, [classes + 1, width], the last one where there is none
    more     further tensors, by our names
    """
    found = encoder_config(tensors, parts, names)
    levels, attention = len(found["multipliers"]), found["attention"]
    each = not attention or f"up.{levels - 1 - attention[0]}.blocks.0.attend" in parts
    told = tensors.first(parts["down.0.blocks.0"], [names.told])
    enter, out = tensors.layer(parts["enter"])[0], tensors.layer(parts["out"])[0]
    found |= {
        "attention_up": "each" if each else "last",
        "attention_middle": "middle.0.attend" in parts,
        "time": told is not None,
        "out_channels": out.shape[0],
    }
    if labels is not None:
        found["num_classes"] = len(labels) - 1
    if told is not None:
        found["time_channels"] = tensors.take(f"{parts['time.0']}.weight").shape[1]
    config = {**found, **config}
    shape = tuple(config["shape"])
    if len(shape) != enter.ndim - 1 or shape[0] != enter.shape[1]:
        raise ConfigError(
            f"shape must be one sample's, {enter.shape[1]} channels and {enter.ndim - 2} axes by the file, got {shape}"
        )
    values = dict(more or {})
    if labels is not None:
        values["conditioning.label.weight"] = labels
    return filled(PaperUNet, config, tensors, parts, names, order, values)


def filled(
    kind: Callable[..., Net], config: Mapping[str, Any], tensors: Tensors, parts: Mapping[str, str], names: Names,
    order: Orders | None, values: dict[str, Tensor],
) -> Net:  # fmt: skip
    """The network of a config with the tensors of its parts, and with `values` by our names."""
    with torch.device("meta"):
        net = kind(**config)
    net = net.to_empty(device="cpu")
    if net.conditioning is not None:  # its time holds numbers of its own
        time = net.conditioning.time
        net.conditioning.time = type(time)(time.channels, time.kind, net.config["time_scale"])
    blocks = [ours for ours in parts if not ours.endswith(".attend") and _is_block(tensors, parts[ours], names)]

    def put(ours: str, layer: tuple[Tensor, Tensor | None]) -> None:
        weight, bias = layer
        values[f"{ours}.weight"] = weight
        values[f"{ours}.bias"] = weight.new_zeros(weight.shape[0]) if bias is None else bias

    for ours, theirs in parts.items():
        if ours in blocks:
            _put_block(tensors, put, ours, theirs, names)
        elif ours.endswith(".attend"):
            heads = net.get_submodule(ours).heads
            put(f"{ours}.norm", tensors.layer(f"{theirs}.{names.attention_norm}"))
            three = next(t for t in names.attention if tensors.has(f"{theirs}.{t[0]}"))
            layers = [tensors.layer(f"{theirs}.{name}") for name in three]
            biases = [torch.zeros(len(weight)) if bias is None else bias for weight, bias in layers]
            weight, bias = torch.cat([w.flatten(1) for w, _ in layers]), torch.cat(biases)
            put(f"{ours}.qkv", (order(weight, heads), order(bias[:, None], heads)) if order else (weight, bias))
            put(f"{ours}.project", tensors.layer(str(tensors.first(theirs, names.project))))
        elif ours == "frequencies":
            continue
        elif ours.startswith("time."):
            put(f"conditioning.mlp.{2 * int(ours[-1])}", tensors.layer(theirs))
        else:
            put(ours if net.get_submodule(ours)._parameters else f"{ours}.conv", tensors.layer(theirs))
    if net.conditioning is not None:
        paths = {module: name for name, module in net.named_modules()}
        products = [tensors.layer(f"{parts[paths[block]]}.{names.told}") for block in net.blocks()]
        put("modulation", (torch.cat([w for w, _ in products]), torch.cat([b for _, b in products if b is not None])))
        if net.conditioning.time.kind == "fourier":
            values["conditioning.time.weight"] = tensors.take(parts["frequencies"])
    fill(net, values, tensors.source)
    return net


def _is_block(tensors: Tensors, theirs: str, names: Names) -> bool:
    return tensors.has(f"{theirs}.{names.norm2}") and tensors.has(f"{theirs}.{names.last}")


def _put_block(tensors: Tensors, put: Callable[..., None], ours: str, theirs: str, names: Names) -> None:
    for part in ("norm", "conv", "norm2", "last"):
        put(f"{ours}.{part}", tensors.layer(f"{theirs}.{getattr(names, part)}"))
    skip = tensors.first(theirs, names.skip)
    if skip is not None:
        put(f"{ours}.skip", tensors.layer(skip))


def heads_first(parts_last: bool) -> Orders:
    """Rows in the order heads, (q, k, v), channels, or heads, channels, (q, k, v), to (q, k, v), heads, channels."""

    def order(rows: Tensor, heads: int) -> Tensor:
        width = rows.shape[0] // (3 * heads)
        split = (
            rows.view(heads, width, 3, -1).permute(2, 0, 1, 3)
            if parts_last
            else rows.view(heads, 3, width, -1).transpose(0, 1)
        )
        return split.reshape(rows.shape[0], -1)

    return order


def sizes(size: int | Sequence[int]) -> tuple[int, ...]:
    """The lengths of an image's axes, of one number or of all."""
    lengths = [size, size] if isinstance(size, int) else size
    return integers("image_size", lengths, 1)


def unwrapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names without those of what wraps a network."""
    names = {name: name for name in tensors}
    for name in names:
        while names[name].startswith(("module.", "_orig_mod.")):
            names[name] = names[name].partition(".")[2]
    return {names[name]: value for name, value in tensors.items()}


def shifted(weight: Tensor, frequencies: Tensor, by: float) -> Tensor:
    """The weights [n, 2 k] of a layer on [sin(ω t), cos(ω t)] that does on t what the given does on t + by; ω [k] = 2π W."""
    angle = 2 * math.pi * frequencies.double() * by
    sine, cosine = weight.double().chunk(2, dim=1)
    # sin(a + φ) = sin a cos φ + cos a sin φ, cos(a + φ) = cos a cos φ − sin a sin φ
    turned = torch.cat([sine * angle.cos() - cosine * angle.sin(), sine * angle.sin() + cosine * angle.cos()], 1)
    return turned.to(weight.dtype)
