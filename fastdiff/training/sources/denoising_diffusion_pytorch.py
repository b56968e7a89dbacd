"""denoising-diffusion-pytorch, from 2.0 on: Unet, Unet1D, the Unet of classifier_free_guidance; the chain and the objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks
from ...errors import CheckpointMismatchError, ConfigError, ShapeError, choose
from ...model import ScoreModel
from ...networks.layers import LARGEST
from ...networks.linear_attention_unet import LinearAttentionUNet, time_module
from ...planning import processes
from ..torch_file import load_tensors
from . import unets

SOURCE = "denoising-diffusion-pytorch"
RTOL = 1e-4  # of weights rounded to float32; those of two objectives differ by factors


@torch.inference_mode(False)
def network(
    tensors: Mapping[str, Tensor], shape: Sequence[int], *, attn_heads: int = 4, dropout: float = 0.0,
    sinusoidal_pos_emb_theta: float = 10000, learned_sinusoidal_cond: bool = False, self_condition: bool = False,
) -> LinearAttentionUNet:  # fmt: skip
    """The network of a state dict of `Unet` or `Unet1D`: the names behind "model.model." or "ema.ema_model.model." of a Trainer's
    file.

    shape   one sample's, as the network sees it: (channels, *image_size), (channels, seq_length)
    attn_heads   of the attention below the levels of networks whose attention has no memory (Unet1D, and that with classes);
            the others' tensors tell
    learned_sinusoidal_cond   the frequencies, where the file has any, are trained on; with random_fourier_features they are not
    self_condition   a network that was trained with it takes the former estimate of x_0, as `cond`; else it is what the package's
            network is without one, which sees zeros in its place

    A network with classes takes the last label for the package's null class.
    """
    file = unets.Tensors(tensors, SOURCE)
    _check_version(file)
    net = _skeleton(_config(file, shape, attn_heads, self_condition) | {
        "dropout": dropout, "time_base": sinusoidal_pos_emb_theta, "learned_frequencies": learned_sinusoidal_cond,
    })  # fmt: skip
    values, state = dict(_values(file, net)), net.state_dict()
    for name, value in values.items():
        if value.shape != state[name].shape:
            raise CheckpointMismatchError(
                f"the file's tensor for {name!r} must have the shape {list(state[name].shape)} beside its others, got "
                f"{list(value.shape)}: it is of a variant of {SOURCE} that is not known here"
            )
    unets.fill(net, values, SOURCE)
    file.finish()
    return net


def options(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the buffers of GaussianDiffusion say of it: `betas`, a list; `objective`, "pred_noise", "pred_x0", "pred_v", or None
    where nothing tells; `min_snr_gamma`, None without the weights of Hang et al. 2023.

    tensors   those of its state dict, with the network's behind "model." or without them

    The loss weights are those of x_0's error in the objective's units, with s = ᾱ/(1 − ᾱ) and c = min(s, γ): c/s, c or
    c/(s + 1). Of an objective c = weight · (s, 1, s + 1) must be min(s, max c). It is None where that holds for two, as for the
    weights of a single step, or for none. Of a network with twice its channels, LearnedGaussianDiffusion's, the objective is
    "pred_noise", whatever the weights say; one that predicts both the noise and x_0 has none.
    """
    if "betas" not in tensors:
        raise ConfigError(
            f"tensors must be {SOURCE}'s GaussianDiffusion's, with its betas, got {', '.join(list(tensors)[:3])}: "
            "part='ema.ema_model' or 'model' has them; its other classes have no chain"
        )
    betas = tensors["betas"].double()
    if "alphas_cumprod" in tensors:  # of β near 1, rounded to float32, 1 − β has few digits; a ratio of ᾱ has all
        levels = tensors["alphas_cumprod"].double()
        ratio = levels / F.pad(levels[:-1], (1, 0), value=1.0)
        betas = torch.where((betas > 0.5) & (ratio > 0), 1 - ratio, betas)
    objective, gamma = _objective(betas, tensors)
    ends = [tensors.get(f"model.{name}_conv.weight") for name in ("init", "final")]
    if ends[0] is not None and ends[1] is not None:
        inputs, outputs = ends[0].shape[1], ends[1].shape[0]
        objective = objective if outputs <= inputs else "pred_noise" if outputs == 2 * inputs else None
    return {"betas": betas.tolist(), "objective": objective, "min_snr_gamma": gamma}


def _objective(betas: Tensor, tensors: Mapping[str, Tensor]) -> tuple[str | None, float | None]:
    if "loss_weight" not in tensors:  # before version 1.5, whose weights do not depend on it
        return None, None
    weight = tensors["loss_weight"].double()
    snr = 1 / torch.expm1(-torch.log1p(-betas).cumsum(0))
    told = weight.isfinite() & snr.isfinite() & (snr > 0)
    if not told.any():
        return None, None
    weight, snr = weight[told], snr[told]
    found = []
    for objective, unit in {"pred_noise": snr, "pred_x0": torch.ones_like(snr), "pred_v": snr + 1}.items():
        clipped = weight * unit
        gamma = clipped.max()
        if torch.allclose(clipped, snr.clamp(max=gamma), rtol=RTOL, atol=0):
            found.append((objective, float(gamma) if gamma < snr.max() * (1 - RTOL) else None))
    return found[0] if len(found) == 1 else (None, None)


def _check_version(file: unets.Tensors) -> None:
    if "mid_block1.block1.norm.weight" in file.all:
        raise CheckpointMismatchError(
            f"the file's 'mid_block1.block1.norm.weight' is of {SOURCE} before 2.0, whose blocks have group normalisation: "
            "wrap that version's own network, ScoreModel(net, ...)"
        )
    if (
        "mid_attn.fn.norm.g" in file.all
        and "classes_emb.weight" not in file.all
        and file.take("init_conv.weight").ndim == 4
    ):
        raise CheckpointMismatchError(
            f"the file is of {SOURCE}'s guided_diffusion, whose norms depend on the image's width: wrap its own network, "
            "ScoreModel(net, ...)"
        )


def _config(file: unets.Tensors, shape: Sequence[int], attn_heads: int, self_condition: bool) -> dict[str, Any]:
    """What the tensors tell."""
    enter, out = file.take("init_conv.weight"), file.take("final_conv.weight")
    shape, taken = tuple(shape), enter.shape[1]
    if len(shape) != enter.ndim - 1 or taken not in (shape[0], 2 * shape[0]):
        raise ShapeError(
            f"shape must be one sample's, by the file {enter.ndim - 2} axes behind {taken} channels, or half as many with "
            f"self_condition, got {shape}"
        )
    levels = max(len({name.split(".")[1] for name in file.all if name.startswith("downs.")}), 1)
    hidden, features = file.take("time_mlp.1.weight").shape
    strided = levels > 1 and "downs.0.3.weight" in file.all
    widths = [
        file.take(f"downs.{level}.3{'' if strided or level == levels - 1 else '.1'}.weight").shape[0]
        for level in range(levels)
    ]
    attention = [
        _attention(file, at, attn_heads) for at in (*(f"downs.{level}.2" for level in range(levels)), "mid_attn")
    ]
    heads, wide, memory, full = zip(*attention)
    config = {
        "shape": shape, "channels": hidden // 4, "first_channels": enter.shape[0],
        "multipliers": [width * 4 // hidden for width in widths], "full_attention": [i for i in range(levels) if full[i]],
        "heads": heads[0] if len(set(heads)) == 1 else heads, "head_channels": wide[0] if len(set(wide)) == 1 else wide,
        "memory": memory[0], "down_kernel": 4 if strided else 2, "time_channels": features, "time_scale": 1.0,
        "time_embedding": "fourier" if "time_mlp.0.weights" in file.all else "sinusoidal",
        "out_channels": None if out.shape[0] == shape[0] else out.shape[0],
    }  # fmt: skip
    if self_condition and taken == shape[0]:
        raise ConfigError(
            f"self_condition must be False for a network that takes {taken} channels by the file, got True"
        )
    if self_condition:
        config["cond_shape"] = shape
    if "classes_emb.weight" in file.all:
        config["num_classes"] = len(file.take("classes_emb.weight"))
    return config


def _attention(file: unets.Tensors, at: str, attn_heads: int) -> tuple[int, int, int, bool]:
    """(heads, channels of each, learned keys, whether it is full) of a level's attention, or that below them."""
    full = not any(f"{at}.{inner}to_out.0.weight" in file.all for inner in ("", "fn.fn."))
    if f"{at}.mem_kv" in file.all:
        heads, *sizes = file.take(f"{at}.mem_kv").shape[1:]
        return heads, sizes[full], sizes[not full], full
    inner = file.take(f"{at}.fn.fn.to_qkv.weight").shape[0] // 3
    if at != "mid_attn":
        return 4, inner // 4, 0, full  # whatever the package is told
    if inner % checks.integer("attn_heads", attn_heads, 1, LARGEST):
        raise ConfigError(
            f"attn_heads must divide the {inner} channels that the attention has by the file, got {attn_heads}"
        )
    return attn_heads, inner // attn_heads, 0, full


def _skeleton(config: dict[str, Any]) -> LinearAttentionUNet:
    """The network, to be filled: no random number is drawn."""
    with torch.device("meta"):
        net = LinearAttentionUNet(**config)
    net = net.to_empty(device="cpu")
    with torch.device("cpu"):
        net.conditioning.time = time_module(net.config)  # which has numbers of its own
    return net


def _values(file: unets.Tensors, net: LinearAttentionUNet) -> Iterator[tuple[str, Tensor]]:
    """Our tensors' names, and theirs in our shapes."""
    levels = len(net.down)

    def layer(ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", file.take(f"{theirs}.{kind}")

    enter = file.take("init_conv.weight")
    own = enter.shape[1] - net.shape[0]  # the former estimate's channels come first
    yield "enter.weight", enter[:, own:]
    yield "enter.bias", file.take("init_conv.bias")
    if net.cond_shape is not None:
        yield "condition.embed.weight", enter[:, :own]
        yield "condition.null", enter.new_zeros(len(enter), *[1] * (enter.ndim - 2))
    yield from layer("conditioning.mlp.0", "time_mlp.1")
    yield from layer("conditioning.mlp.2", "time_mlp.3")
    yield from layer("out", "final_conv")
    if net.config["time_embedding"] == "fourier":
        yield "conditioning.time.weight", file.take("time_mlp.0.weights")
    places = {"middle.first": "mid_block1", "middle.second": "mid_block2", "last": "final_res_block"}
    attention = {"middle.attend": "mid_attn"}
    for side in ("down", "up"):
        for i in range(levels):
            ours, theirs = f"{side}.{i}", f"{side}s.{i}"
            places |= {f"{ours}.first": f"{theirs}.0", f"{ours}.second": f"{theirs}.1"}
            attention[f"{ours}.attend"] = f"{theirs}.2"
            between = i < levels - 1
            if side == "up":
                yield from layer(f"{ours}.leave{'.conv' * between}", f"{theirs}.3{'.1' * between}")
            elif between and net.config["down_kernel"] == 2:
                weight = file.take(f"{theirs}.3.1.weight")  # on channels, each in the order of its pixels
                pixels = [2] * (weight.ndim - 2)
                yield f"{ours}.leave.weight", weight.reshape(len(weight), -1, *pixels)
                yield f"{ours}.leave.bias", file.take(f"{theirs}.3.1.bias")
            else:
                yield from layer(f"{ours}.leave", f"{theirs}.3")
    for ours, theirs in places.items():
        yield from layer(f"{ours}.conv", f"{theirs}.block1.proj")
        yield from layer(f"{ours}.last", f"{theirs}.block2.proj")
        yield f"{ours}.norm.weight", file.take(f"{theirs}.block1.norm.g").flatten()
        yield f"{ours}.norm2.weight", file.take(f"{theirs}.block2.norm.g").flatten()
        if f"{ours}.skip.weight" in net.state_dict():
            yield from layer(f"{ours}.skip", f"{theirs}.res_conv")
    for ours, theirs in attention.items():
        yield from _attention_values(file, ours, theirs)
    names = {module: name for name, module in net.named_modules()}
    products = [f"{places[names[block]]}.mlp.1" for block in net.blocks()]
    weight = torch.cat([file.take(f"{name}.weight") for name in products])
    yield "modulation.bias", torch.cat([file.take(f"{name}.bias") for name in products])
    hidden = 4 * net.config["channels"]
    yield "modulation.weight", weight[:, :hidden]
    if net.num_classes is not None:
        yield "label_modulation.weight", weight[:, hidden:]
        yield "label.weight", torch.cat([file.take("classes_emb.weight"), file.take("null_classes_emb")[None]])
        for i in (0, 2):
            yield from layer(f"label_mlp.{i}", f"classes_mlp.{i}")


def _attention_values(file: unets.Tensors, ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    inner = theirs if f"{theirs}.to_qkv.weight" in file.all else f"{theirs}.fn.fn"
    full = f"{inner}.to_out.weight" in file.all
    yield f"{ours}.norm.weight", file.take(f"{inner.removesuffix('.fn')}.norm.g").flatten()
    yield f"{ours}.qkv.weight", file.take(f"{inner}.to_qkv.weight").flatten(2)
    project = f"{inner}.to_out{'' if full else '.0'}"
    yield f"{ours}.project.weight", file.take(f"{project}.weight").flatten(2)
    yield f"{ours}.project.bias", file.take(f"{project}.bias")
    if not full:
        yield f"{ours}.norm2.weight", file.take(f"{inner}.to_out.1.g").flatten()
    if f"{inner}.mem_kv" in file.all:
        memory = file.take(f"{inner}.mem_kv")
        yield f"{ours}.memory", memory if full else memory.mT


def model(
    path: Path, part: str | None, *, image_size: int | Sequence[int] | None = None, seq_length: int | None = None,
    objective: str | None = None, auto_normalize: bool = True, attn_heads: int = 4, dropout: float = 0.0,
    sinusoidal_pos_emb_theta: float = 10000, learned_sinusoidal_cond: bool = False,
) -> ScoreModel:  # fmt: skip
    """Of a Trainer's file, or of the state dict of a GaussianDiffusion, in which chain and objective are. `image_size` or, of
    signals, `seq_length`; `auto_normalize` as the diffusion was made."""
    everything = load_tensors(path)
    part = part or next((p for p in ("ema.ema_model", "model") if f"{p}.betas" in everything), None)
    tensors = (
        everything
        if part is None
        else {n[len(part) + 1 :]: v for n, v in everything.items() if n.startswith(f"{part}.")}
    )
    told = options(tensors)
    known = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}
    wanted = told["objective"] or objective
    if wanted is None:
        raise ConfigError(
            "config must have 'objective' for this file, which does not tell it: 'pred_noise', 'pred_x0' or 'pred_v'"
        )
    if objective is not None and objective != wanted:
        raise ConfigError(f"objective must be {wanted!r} by the file's loss weights, got {objective!r}: leave it out")
    inside = {n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")}
    if (image_size is None) == (seq_length is None):
        raise ConfigError(
            f"config must have 'image_size', or 'seq_length' of signals, for {SOURCE}, whose files do not say it"
        )
    size = (seq_length,) if image_size is None else unets.sizes(image_size)
    # a first convolution of twice the channels was trained with self-conditioning; without its estimate they see zeros
    channels = unets.Tensors(inside, SOURCE).take("final_conv.weight").shape[0]
    inputs = inside["init_conv.weight"].shape[1]
    channels = inputs if channels % inputs == 0 else inputs // 2
    net = network(
        inside, (channels, *size), attn_heads=attn_heads, dropout=dropout,
        sinusoidal_pos_emb_theta=sinusoidal_pos_emb_theta, learned_sinusoidal_cond=learned_sinusoidal_cond,
    )  # fmt: skip
    double = (net.config["out_channels"] or channels) == 2 * channels
    return ScoreModel(
        net, processes.DDPM(told["betas"]), known[choose("objective", wanted, known)], "fractional_index", net.shape,
        (-1, 1) if auto_normalize else (0, 1), "learned_range" if double else None,
        cond_dropout=0.5 if net.num_classes else 0.0,
    )  # fmt: skip
