"""OpenAI's improved-diffusion and guided-diffusion: their U-Nets (ADM), also of super-resolution, and classifiers. A file is the
averaged weights themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointMismatchError, ConfigError, choose, short, warn
from ...model import ScoreModel
from ...networks import PaperUNet
from ...networks.classifiers import UNetClassifier
from ...planning import processes
from ..torch_file import load_tensors
from . import unets

NAMES = unets.Names(
    norm="in_layers.0", conv="in_layers.2", told="emb_layers.1", norm2="out_layers.0", last="out_layers.3",
    skip=("skip_connection",), attention_norm="norm", attention=(("qkv",),), project=("proj_out",),
)  # fmt: skip

SOURCE = "improved and guided diffusion"
POSITIONS = "out.2.positional_embedding"  # of a classifier's pool of attention

# flags of its scripts that the file itself tells, or that no model needs
TOLD = frozenset((
    "attention_resolutions", "batch_size", "clip_denoised", "data_dir", "ema_rate", "fp16_scale_growth", "log_interval", "lr",
    "lr_anneal_steps", "microbatch", "model_path", "num_samples", "resume_checkpoint", "save_interval", "schedule_sampler",
    "use_ddim", "weight_decay", "channel_mult", "class_cond", "learn_sigma", "num_channels", "num_heads_upsample",
    "num_res_blocks", "rescale_learned_sigmas", "resblock_updown", "sigma_small", "timestep_respacing", "use_checkpoint",
    "use_fp16", "use_kl", "use_scale_shift_norm", "base_samples", "classifier_attention_resolutions", "classifier_depth",
    "classifier_path", "classifier_pool", "classifier_resblock_updown", "classifier_scale", "classifier_use_fp16",
    "classifier_use_scale_shift_norm", "classifier_width",
))  # fmt: skip
# of its classifiers also the model's, which the same scripts take, and those of their training
TOLD_OF_CLASSIFIER = TOLD | {
    "anneal_lr", "dropout", "eval_interval", "iterations", "noised", "num_head_channels", "num_heads", "predict_xstart",
    "use_new_attention_order", "val_data_dir",
}  # fmt: skip
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
    "64_256_upsampler": {"large_size": 256, "small_size": 64, "num_heads": 4},
    "128_512_upsampler": {"large_size": 512, "small_size": 128, **_LARGE},
    "64x64_classifier": {"image_size": 64, "noise_schedule": "cosine"},
    **{f"{size}x{size}_classifier": {"image_size": size} for size in (128, 256, 512)},
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
    cond_shape: Sequence[int] | None = None,
) -> PaperUNet:  # fmt: skip
    """The network of a state dict: `input_blocks`, `middle_block`, `output_blocks`.

    cond_shape   of the image of low resolution, which is set behind the sample's channels, interpolated
    """
    more: dict[str, Tensor] = {}
    if cond_shape is not None:
        enter = tensors["input_blocks.0.0.weight"]
        tensors = {**tensors, "input_blocks.0.0.weight": enter[:, : shape[0]]}
        # they have none for no image
        null = enter.new_zeros(len(enter), *[1] * (enter.ndim - 2))
        more = {"condition.embed.weight": enter[:, shape[0] :].float(), "condition.null": null.float()}
    file = unets.Tensors(tensors, SOURCE)
    parts = _parts(file)
    known = file.take("label_emb.weight") if "label_emb.weight" in tensors else None  # they have none for no label
    labels = None if known is None else torch.cat([known, known.new_zeros(1, known.shape[1])])
    config: dict[str, Any] = {
        "shape": shape, "dropout": dropout, "groups": 32, "eps": 1e-5, "heads": num_heads,
        "head_channels": None if num_head_channels == -1 else num_head_channels, "time_embedding": "cos_sin",
        "time_scale": time_scale, "resample": _resample(file, parts),
    }  # fmt: skip
    if cond_shape is not None:
        config["cond_shape"] = cond_shape
    order = None if use_new_attention_order else unets.heads_first(parts_last=False)
    net = unets.paper_unet(file, _with_tensors(file, parts), NAMES, config, order, labels, more)
    file.finish()
    return net


def _resample(file: unets.Tensors, parts: Mapping[str, str]) -> str:
    """What leads from a level to the next."""
    at = parts.get("down.1.resample", "-")
    if any("in_layers" in name for name in file.all if name.startswith(f"{at}.")):
        return "block"
    return "padded_conv" if file.has(at) else "pool"


def _with_tensors(file: unets.Tensors, parts: Mapping[str, str]) -> dict[str, str]:
    """Without layers that have no tensors: means, and interpolation."""
    if _resample(file, parts) != "pool":
        return dict(parts)
    return {ours: theirs for ours, theirs in parts.items() if not ours.endswith(".resample")}


def _parts(file: unets.Tensors) -> dict[str, str]:
    """Our names of a U-Net's modules."""
    into, out = _numbered(file, "input_blocks"), _numbered(file, "output_blocks")
    if into and not out:
        raise CheckpointMismatchError(
            f"the file has input_blocks and no output_blocks, as {file.source}'s classifiers: read one by "
            "fastdiff.TimeClassifier.load, with the same source"
        )
    if not into or not out:
        raise CheckpointMismatchError(f"the file lacks input_blocks or output_blocks, which {file.source}'s U-Net has")
    count = max(into) + 1  # levels * (blocks + 1)
    # between levels a layer stands behind the last block of a level on the way up; where it has no tensors, one is missing
    # on the way down
    ends = [i for i in sorted(out) if any(not file.has(f"output_blocks.{i}.{k}.qkv") for k in out[i] if k)]
    levels = len(ends or _missing(into)) + 1
    blocks = count // levels - 1
    parts = {**_parts_down(file, levels, blocks), "norm": "out.0", "out": "out.2"}
    for number in range(count):
        level, i = divmod(number, blocks + 1)
        at = f"output_blocks.{number}"
        parts[f"up.{level}.blocks.{i}"] = f"{at}.0"
        if file.has(f"{at}.1.qkv"):
            parts[f"up.{level}.blocks.{i}.attend"] = f"{at}.1"
        if i == blocks and level < levels - 1:
            last = f"{at}.{max(out[number])}"
            parts[f"up.{level}.resample"] = f"{last}.conv" if file.has(f"{last}.conv") else last
    return parts


def _numbered(file: unets.Tensors, part: str) -> dict[int, set[int]]:
    """The numbers of its blocks, and of the layers in each, that have tensors."""
    numbers: dict[int, set[int]] = {}
    for name in file.all:
        first, *rest = name.split(".")[:3]
        if first == part and len(rest) == 2 and all(number.isdigit() for number in rest):
            numbers.setdefault(int(rest[0]), set()).add(int(rest[1]))
    return numbers


def _missing(into: Mapping[int, set[int]]) -> list[int]:
    """The numbers of layers between levels that have no tensors."""
    return [i for i in range(max(into)) if i not in into]


def _parts_down(file: unets.Tensors, levels: int, blocks: int) -> dict[str, str]:
    """Our names of what a U-Net and a classifier have."""
    parts = {"time.0": "time_embed.0", "time.1": "time_embed.2", "enter": "input_blocks.0.0"}
    number = 0
    for level in range(levels):
        if level:
            number += 1
            at = f"input_blocks.{number}.0"
            parts[f"down.{level}.resample"] = f"{at}.op" if file.has(f"{at}.op") else at
        for i in range(blocks):
            number += 1
            parts[f"down.{level}.blocks.{i}"] = f"input_blocks.{number}.0"
            if file.has(f"input_blocks.{number}.1.qkv"):
                parts[f"down.{level}.blocks.{i}.attend"] = f"input_blocks.{number}.1"
    return parts | {"middle.0": "middle_block.0", "middle.0.attend": "middle_block.1", "middle.1": "middle_block.2"}


def model(
    path: Path, part: str | None, *, image_size: int | Sequence[int] | None = None, noise_schedule: str = "linear",
    diffusion_steps: int = 1000, rescale_timesteps: bool = False, predict_xstart: bool = False, num_heads: int | None = None,
    num_head_channels: int = -1, use_new_attention_order: bool = False, dropout: float = 0.0,
    large_size: int | Sequence[int] | None = None, small_size: int | Sequence[int] | None = None,
) -> ScoreModel:  # fmt: skip
    """The flags of its scripts: `image_size`, or `large_size` and `small_size` of super-resolution, `noise_schedule`,
    `diffusion_steps`, `num_heads`, `num_head_channels`, …; widths, attention, labels and the learned variance are in the file."""
    upscales = large_size is not None or small_size is not None
    if image_size is None and not upscales:
        raise ConfigError(
            "config must have 'image_size', or 'large_size' and 'small_size' of super-resolution, which the file does not say: "
            "config={'image_size': …}"
        )
    if upscales and (large_size is None or small_size is None or image_size is not None):
        raise ConfigError(
            f"config must have both large_size and small_size of super-resolution, and no image_size, got {short(large_size)}, "
            f"{short(small_size)} and {short(image_size)}"
        )
    tensors = unets.unwrapped(load_tensors(path, part))
    file = unets.Tensors(tensors, SOURCE)
    _parts(file)  # refuses what is no U-Net
    outputs, inputs = file.take("out.2.weight").shape[0], file.take("input_blocks.0.0.weight").shape[1]
    channels = inputs // 2 if upscales else inputs
    if outputs not in (channels, 2 * channels):
        raise CheckpointMismatchError(
            f"the file's network takes {inputs} channels and gives {outputs}, which is none of one image: if it is for "
            "super-resolution, give large_size and small_size instead of image_size, else leave them out"
        )
    if not upscales and channels == outputs and channels in (2, 6):
        warn(
            f"the file's network takes and gives {channels} channels, and is read as one of images of so many: if it is for "
            "super-resolution, give large_size and small_size instead of image_size"
        )
    if num_heads is None and num_head_channels == -1:
        raise ConfigError(
            "config must have 'num_heads' or 'num_head_channels', which the file does not say: the scripts' default is "
            "{'num_heads': 4}"
        )
    net = network(
        tensors,
        (channels, *unets.sizes(large_size if upscales else image_size)),
        time_scale=_time_scale(diffusion_steps, rescale_timesteps),
        num_heads=num_heads or 1,
        num_head_channels=num_head_channels,
        use_new_attention_order=use_new_attention_order,
        dropout=dropout,
        cond_shape=(channels, *unets.sizes(small_size)) if upscales else None,
    )
    return ScoreModel(
        net, _process(noise_schedule, diffusion_steps), "x0" if predict_xstart else "eps", "fractional_index", net.shape, (-1, 1),
        "learned_range" if outputs == 2 * channels else None,
    )  # fmt: skip


def _process(noise_schedule: str, diffusion_steps: int) -> processes.DDPM:
    return processes.DDPM(choose("noise_schedule", noise_schedule, ("linear", "cosine")), diffusion_steps)


def _time_scale(diffusion_steps: int, rescale_timesteps: bool) -> float:
    return 1000 / diffusion_steps if rescale_timesteps else 1.0


def told(model: ScoreModel) -> dict[str, Any]:
    """What the file itself tells of the flags."""
    config = model.net.config
    return {
        "num_channels": config["channels"], "num_res_blocks": config["blocks"], "learn_sigma": model.variance is not None,
        "class_cond": config["num_classes"] is not None, "use_scale_shift_norm": config["scale_shift"],
        "resblock_updown": config["resample"] == "block",
    }  # fmt: skip


def classifier_network(
    tensors: dict[str, Tensor],
    shape: Sequence[int],
    *,
    depth: int | None = None,
    head_channels: int = 64,
    time_scale: float = 1.0,
) -> UNetClassifier:
    """The network of a classifier's state dict: `input_blocks`, `middle_block`, `out`.

    depth   its blocks of a level; of a pool of attention the file tells it, by the places at the coarsest level
    """
    file = unets.Tensors(tensors, SOURCE)
    into = _numbered(file, "input_blocks")
    if not into or _numbered(file, "output_blocks"):
        raise CheckpointMismatchError(
            f"the file must have input_blocks and no output_blocks, as {SOURCE}'s classifiers: of a U-Net's take fastdiff.load"
        )
    pool = "attention" if POSITIONS in tensors else "spatial" if file.take("out.0.weight").ndim == 2 else "mean"
    count, levels = max(into) + 1, 0
    between = [i for i in into if file.has(f"input_blocks.{i}.0.op")] or _missing(into)
    if between:
        levels = len(between) + 1
    elif pool == "attention":
        ratio = math.prod(shape[1:]) / max(tensors[POSITIONS].shape[-1] - 1, 1)  # of places
        levels = 1 + round(math.log2(ratio) / (len(shape) - 1)) if ratio >= 1 else 0
    elif depth is not None:
        levels = count // (depth + 1)
    else:
        raise ConfigError(
            "config must have 'classifier_depth', which a file of this classifier_pool does not say: "
            "config={'classifier_depth': …}"
        )
    blocks = count // levels - 1 if levels else 0
    parts = _parts_down(file, levels, blocks)
    attends = [{f"down.{level}.blocks.{i}.attend" in parts for i in range(blocks)} for level in range(levels)]
    if blocks < 1 or count != levels * (blocks + 1) or any(len(each) > 1 for each in attends):
        raise CheckpointMismatchError(
            f"the file's {count} layers are not those of samples {tuple(shape)} with classifier_depth={depth}: give the "
            "image_size and classifier_depth of its training"
        )
    more: dict[str, Tensor] = {}
    if pool == "attention":
        parts |= {"norm": "out.0", "pool.qkv": "out.2.qkv_proj", "out": "out.2.c_proj"}
        more["pool.positions"] = file.take(POSITIONS)
    else:
        parts |= {"hidden": "out.0", "out": "out.2"} if pool == "spatial" else {"norm": "out.0", "out": "out.3"}
    config = {
        "shape": shape, "num_classes": file.layer(parts["out"])[0].shape[0], "head_channels": head_channels, "groups": 32,
        "pool": pool, "time_scale": time_scale, "resample": _resample(file, parts),
        **unets.encoder_config(file, parts, NAMES),
    }  # fmt: skip
    order = unets.heads_first(parts_last=False)
    net = unets.filled(UNetClassifier, config, file, _with_tensors(file, parts), NAMES, order, more)
    file.finish()
    return net


def classifier(
    path: Path, part: str | None, *, image_size: int | Sequence[int], noise_schedule: str = "linear", diffusion_steps: int = 1000,
    rescale_timesteps: bool = False, classifier_depth: int | None = None, classifier_head_channels: int = 64,
) -> dict[str, Any]:  # fmt: skip
    """What a TimeClassifier is made of, by the flags of its scripts: `image_size`, `noise_schedule`, `diffusion_steps`, …; all
    else is in the file. `classifier_head_channels`, of its attention, is 64 in all that its scripts make."""
    tensors = unets.unwrapped(load_tensors(path, part))
    channels = unets.Tensors(tensors, SOURCE).take("input_blocks.0.0.weight").shape[1]
    net = classifier_network(
        tensors,
        (channels, *unets.sizes(image_size)),
        depth=classifier_depth,
        head_channels=classifier_head_channels,
        time_scale=_time_scale(diffusion_steps, rescale_timesteps),
    )
    return {
        "net": net, "process": _process(noise_schedule, diffusion_steps), "num_classes": net.config["num_classes"],
        "data_shape": net.shape, "data_range": (-1.0, 1.0), "time_input": "index",
    }  # fmt: skip


def told_of_classifier(made: Mapping[str, Any]) -> dict[str, Any]:
    """What the file itself tells of the flags."""
    config = made["net"].config
    return {
        "classifier_width": config["channels"], "classifier_depth": config["blocks"],
        "classifier_use_scale_shift_norm": config["scale_shift"], "classifier_resblock_updown": config["resample"] == "block",
        "classifier_pool": "adaptive" if config["pool"] == "mean" else config["pool"],
    }  # fmt: skip
