"""OpenAI's improved-diffusion and guided-diffusion: their U-Nets (ADM), whose files are the averaged weights themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

NAMES = unets.Names(
    norm="in_layers.0", conv="in_layers.2", told="emb_layers.1", norm2="out_layers.0", last="out_layers.3",
    skip=("skip_connection",), attention_norm="norm", attention=(("qkv",),), project=("proj_out",),
)  # fmt: skip

# flags of its scripts that the file itself tells, or that no model needs
TOLD = frozenset((
    "attention_resolutions", "batch_size", "clip_denoised", "data_dir", "ema_rate", "fp16_scale_growth", "log_interval", "lr",
    "lr_anneal_steps", "microbatch", "model_path", "num_samples", "resume_checkpoint", "save_interval", "schedule_sampler",
    "use_ddim", "weight_decay", "channel_mult", "class_cond", "learn_sigma", "num_channels", "num_heads_upsample",
    "num_res_blocks", "rescale_learned_sigmas", "resblock_updown", "sigma_small", "timestep_respacing", "use_checkpoint",
    "use_fp16", "use_kl", "use_scale_shift_norm",
))  # fmt: skip
_LARGE = {"num_head_channels": 64}
_LONG = {"noise_schedule": "cosine", "diffusion_steps": 4000, "rescale_timesteps": True, "num_heads": 4}
_BEDROOM = {"image_size": 256, "num_heads": 1, "rescale_timesteps": False}
# the files that were published, by their names, with the flags of the READMEs
PUBLISHED: dict[str, Mapping[str, Any]] = {
    "64x64_diffusion": {"image_size": 64, "noise_schedule": "cosine", "use_new_attention_order": True, **_LARGE},
    "128x128_diffusion": {"image_size": 128, "num_heads": 4},
    **{name: {"image_size": 256, **_LARGE} for name in (
        "256x256_diffusion", "256x256_diffusion_uncond", "lsun_bedroom", "lsun_cat", "lsun_horse", "lsun_horse_nodropout",
    )},
    "512x512_diffusion": {"image_size": 512, **_LARGE},
    **{name: {"image_size": 64, **_LONG} for name in ("imagenet64_uncond_100M_1500K", "imagenet64_uncond_vlb_100M_1500K")},
    **{name: {"image_size": 32, **_LONG} for name in ("cifar10_uncond_50M_500K", "cifar10_uncond_vlb_50M_500K")},
    "imagenet64_cond_270M_250K": {"image_size": 64, **_LONG, "rescale_timesteps": False},
    **{name: _BEDROOM for name in ("lsun_uncond_100M_1200K_bs128", "lsun_uncond_100M_2400K_bs64")},
}  # fmt: skip


def published(name: str) -> Mapping[str, Any]:
    """The flags of a published file."""
    known = name.removesuffix(".pt")
    if known not in PUBLISHED:
        raise ConfigError(
            f"config must be a dict, flags, or the name of a published file such as '64x64_diffusion', got {short(name)}"
        )
    return PUBLISHED[known]


def network(
    tensors: dict[str, Tensor], shape: Sequence[int], *, num_heads: int = 4, num_head_channels: int = -1,
    use_new_attention_order: bool = False, dropout: float = 0.0, time_scale: float = 1.0,
) -> PaperUNet:  # fmt: skip
    """The network of a state dict: `input_blocks`, `middle_block`, `output_blocks`."""
    source = "improved and guided diffusion"
    file = unets.Tensors(tensors, source)
    parts = _parts(file)
    block = any("in_layers" in name for name in tensors if name.startswith(f"{parts.get('down.1.resample', '-')}."))
    strided = file.has(f"{parts.get('down.1.resample')}")
    known = file.take("label_emb.weight") if "label_emb.weight" in tensors else None  # they have none for no label
    labels = None if known is None else torch.cat([known, known.new_zeros(1, known.shape[1])])
    config: dict[str, Any] = {
        "shape": shape, "dropout": dropout, "groups": 32, "eps": 1e-5, "heads": num_heads,
        "head_channels": None if num_head_channels == -1 else num_head_channels, "time_embedding": "cos_sin",
        "time_scale": time_scale, "resample": "block" if block else "padded_conv" if strided else "pool",
    }  # fmt: skip
    if not block and not strided:
        parts = {ours: theirs for ours, theirs in parts.items() if not ours.endswith(".resample")}
    order = None if use_new_attention_order else unets.heads_first(parts_last=False)
    net = unets.paper_unet(file, parts, NAMES, config, order, labels)
    file.finish()
    return net


def _parts(file: unets.Tensors) -> dict[str, str]:
    """Our names of its modules."""
    layers: dict[str, dict[int, set[int]]] = {"input_blocks": {}, "output_blocks": {}}
    for name in file.all:
        first, *numbers = name.split(".")[:3]
        if first in layers:
            layers[first].setdefault(int(numbers[0]), set()).add(int(numbers[1]))
    into, out = layers["input_blocks"], layers["output_blocks"]
    if not into or not out:
        raise CheckpointMismatchError(f"the file lacks input_blocks or output_blocks, which {file.source}'s U-Net has")

    def attends(at: str) -> bool:
        return file.has(f"{at}.qkv")

    count = max(into) + 1  # levels * (blocks + 1)
    # between levels a layer stands behind the last block of a level on the way up; where it has no tensors, one is missing
    # on the way down
    ends = [i for i in sorted(out) if any(not attends(f"output_blocks.{i}.{k}") for k in out[i] if k)]
    missing = [i for i in range(count) if i not in into]
    levels = len(ends or missing) + 1
    blocks = count // levels - 1
    parts = {
        "time.0": "time_embed.0",
        "time.1": "time_embed.2",
        "enter": "input_blocks.0.0",
        "norm": "out.0",
        "out": "out.2",
    }
    number = 0
    for level in range(levels):
        if level:
            number += 1
            at = f"input_blocks.{number}.0"
            parts[f"down.{level}.resample"] = f"{at}.op" if file.has(f"{at}.op") else at
        for i in range(blocks):
            number += 1
            parts[f"down.{level}.blocks.{i}"] = f"input_blocks.{number}.0"
            if attends(f"input_blocks.{number}.1"):
                parts[f"down.{level}.blocks.{i}.attend"] = f"input_blocks.{number}.1"
    parts |= {"middle.0": "middle_block.0", "middle.0.attend": "middle_block.1", "middle.1": "middle_block.2"}
    for number in range(count):
        level, i = divmod(number, blocks + 1)
        at = f"output_blocks.{number}"
        parts[f"up.{level}.blocks.{i}"] = f"{at}.0"
        if attends(f"{at}.1"):
            parts[f"up.{level}.blocks.{i}.attend"] = f"{at}.1"
        if i == blocks and level < levels - 1:
            last = f"{at}.{max(out[number])}"
            parts[f"up.{level}.resample"] = f"{last}.conv" if file.has(f"{last}.conv") else last
    return parts


def in_double(tensors: dict[str, Tensor]) -> bool:
    """Whether the network returns a variance too: twice the channels."""
    return bool(tensors["out.2.weight"].shape[0] == 2 * tensors["input_blocks.0.0.weight"].shape[1])


def model(
    path: Path, part: str | None, *, image_size: int | Sequence[int], noise_schedule: str = "linear", diffusion_steps: int = 1000,
    rescale_timesteps: bool = False, predict_xstart: bool = False, num_heads: int | None = None, num_head_channels: int = -1,
    use_new_attention_order: bool = False, dropout: float = 0.0,
) -> ScoreModel:  # fmt: skip
    """The flags of its scripts: `image_size`, `noise_schedule`, `diffusion_steps`, `num_heads`, `num_head_channels`, …; widths,
    attention, labels and the learned variance are in the file."""
    tensors = unets.unwrapped(load_tensors(path, part))
    scale = 1000 / diffusion_steps if rescale_timesteps else 1.0
    channels = unets.Tensors(tensors, "improved and guided diffusion").take("input_blocks.0.0.weight").shape[1]
    if num_heads is None and num_head_channels == -1:
        raise ConfigError(
            "config must have 'num_heads' or 'num_head_channels', which the file does not say: the scripts' default is "
            "{'num_heads': 4}"
        )
    net = network(
        tensors,
        (channels, *unets.sizes(image_size)),
        time_scale=scale,
        num_heads=num_heads or 1,
        num_head_channels=num_head_channels,
        use_new_attention_order=use_new_attention_order,
        dropout=dropout,
    )
    process = processes.DDPM(choose("noise_schedule", noise_schedule, ("linear", "cosine")), diffusion_steps)
    return ScoreModel(
        net, process, "x0" if predict_xstart else "eps", "index", net.shape, (-1, 1),
        "learned_range" if in_double(tensors) else None,
    )  # fmt: skip


def told(model: ScoreModel) -> dict[str, Any]:
    """What the file itself tells of the flags."""
    config = model.net.config
    return {
        "num_channels": config["channels"], "num_res_blocks": config["blocks"], "learn_sigma": model.variance is not None,
        "class_cond": config["num_classes"] is not None, "use_scale_shift_norm": config["scale_shift"],
        "resblock_updown": config["resample"] == "block",
    }  # fmt: skip
