"""DiT (Peebles & Xie 2023): the state dicts of facebookresearch/DiT and of diffusers' DiTTransformer2DModel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import CheckpointMismatchError, ConfigError, choose
from ...model import ScoreModel
from ...networks import DiT
from ...networks.transformers import SIZES, positions
from ...planning import processes
from ..torch_file import load_tensors
from . import unets

Layer = tuple[Tensor, Tensor]  # weight and bias


class Names(NamedTuple):
    """How a source names its parts; within a block behind the block's own name."""

    source: str
    enter: str
    position: str
    time: tuple[str, str]
    label: str
    blocks: str
    qkv: tuple[str, ...]
    project: str
    wide: str
    last: str
    told: str
    final: str
    out: str


FACEBOOK = Names(
    source="facebookresearch/DiT", enter="x_embedder.proj", position="pos_embed",
    time=("t_embedder.mlp.0", "t_embedder.mlp.2"), label="y_embedder.embedding_table", blocks="blocks", qkv=("attn.qkv",),
    project="attn.proj", wide="mlp.fc1", last="mlp.fc2", told="adaLN_modulation.1", final="final_layer.adaLN_modulation.1",
    out="final_layer.linear",
)  # fmt: skip
EMBEDDER = "transformer_blocks.0.norm1.emb"
DIFFUSERS = Names(
    source="diffusers' DiTTransformer2DModel", enter="pos_embed.proj", position="pos_embed.pos_embed",
    time=(f"{EMBEDDER}.timestep_embedder.linear_1", f"{EMBEDDER}.timestep_embedder.linear_2"),
    label=f"{EMBEDDER}.class_embedder.embedding_table", blocks="transformer_blocks",
    qkv=("attn1.to_q", "attn1.to_k", "attn1.to_v"), project="attn1.to_out.0", wide="ff.net.0.proj", last="ff.net.2",
    told="norm1.linear", final="proj_out_1", out="proj_out_2",
)  # fmt: skip


def network(
    tensors: Mapping[str, Tensor], shape: Sequence[int] | None = None, *, input_size: int | None = None,
    sample_size: int | None = None, num_heads: int | None = None, num_attention_heads: int | None = None,
    class_dropout_prob: float = 0.1, norm_eps: float = 1e-5, activation_fn: str = "gelu-approximate",
) -> DiT:  # fmt: skip
    """The network of a state dict, in float32: of facebookresearch/DiT (`x_embedder.proj`, …) or of diffusers
    (`pos_embed.proj`, …). `t` is the step, 0 … 999; labels are as there, of which the last is none.

    shape, input_size, sample_size   the samples' shape (C, size, size), or the size as either source calls it; default that of
                        `pos_embed` where the file has it, else 32
    num_heads, num_attention_heads   heads, as either source calls them; default 16 for a hidden size of 1152, else hidden / 64
    class_dropout_prob  0 says that the file has no label for "none" (facebookresearch/DiT); the time alone stands for it then
    norm_eps            of diffusers' normalisations before the perceptrons; all others have 1e-6
    activation_fn       of diffusers' perceptrons
    """
    diffusers = any(name.startswith(DIFFUSERS.blocks) for name in tensors)
    names = DIFFUSERS if diffusers else FACEBOOK
    file = unets.Tensors(tensors, names.source)
    choose("activation_fn", activation_fn, ["gelu-approximate"])
    enter = file.take(f"{names.enter}.weight")
    if enter.ndim != 4 or enter.shape[2] != enter.shape[3]:
        raise _misfit(f"{names.enter}.weight", enter, "[hidden, C, patch, patch]")
    hidden, channels, patch, _ = enter.shape
    numbers = {name.split(".")[1] for name in tensors if name.startswith(f"{names.blocks}.")}
    labels = _taken(file, f"{names.label}.weight", None, hidden)
    if not class_dropout_prob and not diffusers:
        labels = torch.cat([labels, labels.new_zeros(1, hidden)])
    width = file.take(f"{names.time[0]}.weight").shape[-1]
    inner = len(file.take(f"{names.blocks}.0.{names.wide}.weight"))
    results = len(file.take(f"{names.out}.weight"))
    if results % patch**2:
        raise _misfit(f"{names.out}.weight", file.take(f"{names.out}.weight"), f"a multiple of {patch**2} rows")
    size = _size(file, names, (channels, patch), shape, sample_size if input_size is None else input_size)
    with torch.device("meta"):
        net = DiT(
            (channels, size, size), patch=patch, hidden=hidden, layers=max(len(numbers), 1),
            heads=_heads(hidden, num_attention_heads if num_heads is None else num_heads), mlp_ratio=inner / hidden,
            eps=(1e-6, norm_eps if diffusers else 1e-6), num_classes=len(labels) - 1, time_scale=1.0, time_channels=width,
            time_embedding="sinusoidal" if diffusers else "cos_sin", out_channels=results // patch**2,
        )  # fmt: skip
    net = net.to_empty(device="cpu")
    net.conditioning.time = type(net.conditioning.time)(width, net.conditioning.time.kind, 1.0)  # numbers of its own
    values = {"conditioning.label.weight": labels, "enter.weight": enter.flatten(1)}
    values["enter.bias"] = _taken(file, f"{names.enter}.bias", hidden)
    if names.position in tensors:
        values["position"] = _taken(file, names.position, 1, math.prod(net.grid), hidden)[0]
    else:
        values["position"] = positions(net.grid, hidden).float()

    def put(ours: str, layer: Layer) -> None:
        values[f"{ours}.weight"], values[f"{ours}.bias"] = layer

    first, second = _layer(file, names.time[0], hidden, width), _layer(file, names.time[1], hidden, hidden)
    if diffusers:  # whose frequencies are Ho et al.'s, and its cosines before the sines
        first = first[0].roll(width // 2, 1), first[1]
    put("conditioning.mlp.0", first)
    put("conditioning.mlp.2", second)
    for i in range(len(net.blocks)):
        at = f"{names.blocks}.{i}"
        rows = 3 * hidden // len(names.qkv)
        parts = [_layer(file, f"{at}.{name}", rows, hidden) for name in names.qkv]
        put(f"blocks.{i}.qkv", (torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])))
        put(f"blocks.{i}.project", _layer(file, f"{at}.{names.project}", hidden, hidden))
        put(f"blocks.{i}.wide", _layer(file, f"{at}.{names.wide}", inner, hidden))
        put(f"blocks.{i}.last", _layer(file, f"{at}.{names.last}", hidden, inner))
    put("modulation", _modulation(file, names, len(net.blocks), hidden))
    # their numbers of a patch have the channel last, ours first
    put("out", tuple(_channels_first(each, patch) for each in _layer(file, names.out, results, hidden)))  # type: ignore[arg-type]
    if diffusers:
        _check_embedders(file, len(net.blocks))
    file.finish()
    unets.fill(net, values, names.source)
    return net


def _taken(file: unets.Tensors, name: str, *shape: int | None) -> Tensor:
    """A tensor of the file that must have this shape."""
    value = file.take(name)
    if value.ndim != len(shape) or any(size not in (None, found) for size, found in zip(shape, value.shape)):
        raise _misfit(name, value, "the shape " + str(list(shape)).replace("None", "any"))
    return value


def _layer(file: unets.Tensors, prefix: str, outputs: int, inputs: int) -> Layer:
    """A layer's weight, and its bias, or zeros where it has none."""
    weight = _taken(file, f"{prefix}.weight", outputs, inputs)
    bias = _taken(file, f"{prefix}.bias", outputs) if f"{prefix}.bias" in file.all else weight.new_zeros(outputs)
    return weight, bias


def _misfit(name: str, value: Tensor, wanted: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"the file's {name} must have {wanted}, got {list(value.shape)}: it is of another network than DiT"
    )


def _heads(hidden: int, given: int | None) -> int:
    published = {width: heads for _, width, heads in SIZES.values()}
    if given is not None:
        return given
    if hidden not in published and hidden % 64:
        raise ConfigError(
            f"num_heads must be given for a hidden size of {hidden}, which the paper does not have, got None"
        )
    return published.get(hidden, hidden // 64)


def _size(
    file: unets.Tensors, names: Names, patches: tuple[int, int], shape: Sequence[int] | None, given: int | None
) -> int:
    """The samples' length along both axes."""
    channels, patch = patches
    size = 32 if given is None else given
    if names.position in file.all:
        count = file.take(names.position).shape[1:2].numel()
        held = math.isqrt(count) * patch
        if given not in (None, held):
            raise ConfigError(f"input_size must be {held}, by the file's {names.position}, got {given}: leave it out")
        size = held
    elif shape is not None and given is None:
        size = shape[-1]
    if shape is not None and tuple(shape) != (channels, size, size):
        raise ConfigError(f"shape must be {(channels, size, size)} by the file, got {tuple(shape)}: leave it out")
    return size


def _modulation(file: unets.Tensors, names: Names, layers: int, hidden: int) -> Layer:
    """One layer of theirs, of each block (shift, scale, gate) twice and of the end (shift, scale): all scales, shifts, gates."""
    scales, shifts, gates = list[Layer](), list[Layer](), list[Layer]()
    for i in range(layers):
        at = f"{names.blocks}.{i}"
        weight, bias = _layer(file, f"{at}.{names.told}", 6 * hidden, hidden)
        parts = list(zip(weight.chunk(6), bias.chunk(6)))
        if f"{at}.norm3.weight" in file.all:  # (norm a + b) (1 + scale) + shift is norm (1 + scale') + shift'
            a, b = _taken(file, f"{at}.norm3.weight", hidden), _taken(file, f"{at}.norm3.bias", hidden)
            (shift, shift0), (scale, scale0) = parts[3], parts[4]
            parts[3] = shift + b[:, None] * scale, shift0 + b * (1 + scale0)
            parts[4] = a[:, None] * scale, a * (1 + scale0) - 1
        scales += [parts[1], parts[4]]
        shifts += [parts[0], parts[3]]
        gates += [parts[2], parts[5]]
    weight, bias = _layer(file, names.final, 2 * hidden, hidden)
    last = list(zip(weight.chunk(2), bias.chunk(2)))
    every = [*scales, last[1], *shifts, last[0], *gates]
    return torch.cat([layer[0] for layer in every]), torch.cat([layer[1] for layer in every])


def _channels_first(rows: Tensor, patch: int) -> Tensor:
    """Rows of (patch, patch, C), [patch² C, *], in the order of (C, patch, patch)."""
    return rows.view(patch**2, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _check_embedders(file: unets.Tensors, layers: int) -> None:
    """Refuse blocks that embed time and label each in its own way: diffusers has an embedder in each, all alike in its files."""
    first = [name for name in file.all if name.startswith(f"{EMBEDDER}.")]
    for i in range(1, layers):
        for name in first:
            other = name.replace("transformer_blocks.0.", f"transformer_blocks.{i}.", 1)
            if not torch.equal(file.take(other), file.take(name)):
                raise CheckpointMismatchError(
                    f"the file's {name.partition('.norm1.')[2]} must be alike in all blocks, got another in block {i}: "
                    "its blocks were trained apart, which is another network"
                )


def model(
    path: Path, part: str | None, *, input_size: int | None = None, num_heads: int | None = None,
    class_dropout_prob: float = 0.1,
) -> ScoreModel:  # fmt: skip
    """Of facebookresearch/DiT: published files, and the averaged weights of its trainings. ε and a learned variance, on a linear
    chain of 1000 steps, of latents (its autoencoder's times 0.18215), whose range is not known."""
    everything = unets.unwrapped(load_tensors(path, part))
    if part is None and any(name.startswith("ema.") for name in everything):
        everything = unets.unwrapped({n.removeprefix("ema."): v for n, v in everything.items() if n.startswith("ema.")})
    net = network(everything, input_size=input_size, num_heads=num_heads, class_dropout_prob=class_dropout_prob)
    double = net.config["out_channels"] == 2 * net.shape[0]
    return ScoreModel(
        net, processes.DDPM("linear"), "eps", "fractional_index", net.shape, variance="learned_range" if double else None,
        cond_dropout=class_dropout_prob,
    )  # fmt: skip
