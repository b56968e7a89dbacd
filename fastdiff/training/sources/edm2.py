"""EDM2 (Karras et al. 2024): the network within its pickles, its U-Net in EDM's preconditioning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointMismatchError, ConfigError
from ...model import ScoreModel
from ...networks import MPUNet
from ...planning import processes
from ..torch_file import load_tensors
from . import unets

SOURCE = "EDM2"
BLOCK = re.compile(r"(?:unet\.)?enc\.(\d+)x\1_block(\d+)\.conv_res1\.weight")
# facts of its training options that a file's tensors tell, or that no model needs
TOLD = frozenset((
    "attn_resolutions", "channel_mult", "channel_mult_emb", "channel_mult_noise", "class_name", "img_channels",
    "img_resolution", "label_dim", "logvar_channels", "model_channels", "num_blocks", "use_fp16",
))  # fmt: skip
IGNORED = ("logvar_fourier.freqs", "logvar_fourier.phases", "logvar_linear.weight")  # of the training's loss


def network(
    tensors: dict[str, Tensor],
    shape: tuple[int, ...] | None = None,
    *,
    channels_per_head: int = 64,
    dropout: float = 0.0,
    res_balance: float = 0.3,
    attn_balance: float = 0.3,
    label_balance: float = 0.5,
    concat_balance: float = 0.5,
    clip_act: float | None = 256,
    resample_filter: tuple[int, ...] = (1, 1),
) -> MPUNet:
    """The network of the tensors of Precond, `unet.` and the log variance's, or of its UNet alone.

    Its files are of float16, and the network of float32, as theirs on a CPU.

    shape   one sample's, which the tensors say: to be checked against them
    """
    inside = "unet." if any(name.startswith("unet.") for name in tensors) else ""
    file = unets.Tensors(tensors, SOURCE)
    found = [(int(match[1]), int(match[2]), name) for name in tensors if (match := BLOCK.fullmatch(name))]
    if not found:
        raise CheckpointMismatchError(
            f"the file lacks enc.64x64_block0 and such, which {SOURCE}'s network has: part='ema' is that of its pickles, "
            "part='net' that of its trainings"
        )
    sizes = sorted({size for size, _, _ in found}, reverse=True)
    blocks = 1 + max(block for _, block, _ in found)
    widths = [file.take(f"{inside}enc.{s}x{s}_block0.conv_res1.weight").shape[0] for s in sizes]
    enter, out = (file.take(inside + name) for name in (f"enc.{sizes[0]}x{sizes[0]}_conv.weight", "out_conv.weight"))
    held = (enter.shape[1] - 1, sizes[0], sizes[0])  # beside the sample's channels there is one of ones
    if shape is not None and tuple(shape) != held:
        raise ConfigError(f"shape must be {held}, that of the file's samples, got {tuple(shape)}: leave it out")
    labels = file.take(f"{inside}emb_label.weight") if file.has(f"{inside}emb_label") else None
    noise = file.take(f"{inside}emb_noise.weight")
    config: dict[str, Any] = {
        "shape": held,
        "channels": widths[0],
        "multipliers": [width / widths[0] for width in widths],
        "blocks": blocks,
        "attention": [i for i, s in enumerate(sizes) if file.has(f"{inside}enc.{s}x{s}_block0.attn_qkv")],
        "head_channels": channels_per_head,
        "taps": resample_filter,
        "residual_share": res_balance,
        "attention_share": attn_balance,
        "label_share": label_balance,
        "skip_share": concat_balance,
        "clip": clip_act,
        "num_classes": None if labels is None else labels.shape[1],
        "time_scale": 1.0,
        "time_channels": noise.shape[1],
        "embedding_channels": noise.shape[0],
        "dropout": dropout,
        "out_channels": None if out.shape[0] == held[0] else out.shape[0],
    }
    with torch.device("meta"):
        net = MPUNet(**config)
    net = net.to_empty(device="cpu")
    values = {
        "conditioning.time.weight": file.take(f"{inside}emb_fourier.freqs"),
        "conditioning.time.phases": file.take(f"{inside}emb_fourier.phases"),
        "conditioning.layer.weight": noise,
        "enter.weight": enter,
        "out.weight": out,
        "out_gain": file.take(f"{inside}out_gain"),
    }
    if labels is not None:
        values["conditioning.label.weight"] = labels
    gains, told = [], []
    parts = dict(net.named_modules())
    for ours, name in _blocks(sizes, blocks).items():
        theirs = inside + name
        values[f"{ours}.conv.weight"] = file.take(f"{theirs}.conv_res0.weight")
        values[f"{ours}.last.weight"] = file.take(f"{theirs}.conv_res1.weight")
        gains.append(file.take(f"{theirs}.emb_gain"))
        told.append(file.take(f"{theirs}.emb_linear.weight"))
        if f"{ours}.skip" in parts:
            values[f"{ours}.skip.weight"] = file.take(f"{theirs}.conv_skip.weight")
        if f"{ours}.attend.qkv" in parts:
            # rows in the order heads, channels, (q, k, v), to (q, k, v), heads, channels
            three = file.take(f"{theirs}.attn_qkv.weight")
            values[f"{ours}.attend.qkv.weight"] = three.reshape(-1, 3, three.shape[1]).transpose(0, 1).flatten(0, 1)
            values[f"{ours}.attend.project.weight"] = file.take(f"{theirs}.attn_proj.weight")
    values |= {"gains": torch.stack(gains), "modulation.weight": torch.cat(told)}
    unets.fill(net, values, SOURCE)
    file.finish(IGNORED)
    return net


def _blocks(sizes: list[int], blocks: int) -> dict[str, str]:
    """Their names of the blocks, by ours, in the order in which they run."""
    down, up = list[str](), list[str]()
    for size in sizes:
        down += [f"enc.{size}x{size}_down"] * (size < sizes[0])
        down += [f"enc.{size}x{size}_block{i}" for i in range(blocks)]
    for size in reversed(sizes):
        up += [f"dec.{size}x{size}_{name}" for name in (("in0", "in1") if size == sizes[-1] else ("up",))]
        up += [f"dec.{size}x{size}_block{i}" for i in range(blocks + 1)]
    both = {"down": down, "up": up}
    return {f"{way}.{i}": name for way, names in both.items() for i, name in enumerate(names)}


def model(
    path: Path,
    part: str | None,
    *,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    channels_per_head: int = 64,
    dropout: float = 0.0,
    res_balance: float = 0.3,
    attn_balance: float = 0.3,
    label_balance: float = 0.5,
    concat_balance: float = 0.5,
    clip_act: float | None = 256,
    resample_filter: tuple[int, ...] = (1, 1),
) -> ScoreModel:
    """Samples of four channels are latents: (x − encoder.bias) / encoder.scale of the file's two vectors is what the autoencoder
    decodes."""
    net = network(
        load_tensors(path, part or "ema"),
        channels_per_head=channels_per_head,
        dropout=dropout,
        res_balance=res_balance,
        attn_balance=attn_balance,
        label_balance=label_balance,
        concat_balance=concat_balance,
        clip_act=clip_act,
        resample_filter=resample_filter,
    )
    range_ = (-1, 1) if net.shape[0] == 3 else None
    return ScoreModel(net, processes.EDM(sigma_data, sigma_min, sigma_max), "edm", "c_noise", net.shape, range_)
