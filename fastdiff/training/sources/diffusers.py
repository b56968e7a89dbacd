"""diffusers: folders of a pipeline, or of a UNet2DModel or DiTTransformer2DModel, with the scheduler that belongs to it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import files
from ...errors import CheckpointError, CheckpointMismatchError, ConfigError, choose
from ...model import ScoreModel
from ...networks import PaperUNet
from ...planning import processes, schedules
from ..torch_file import load_tensors
from . import dit, unets

SOURCE = "diffusers"
NAMES = unets.Names(
    norm="norm1", conv="conv1", told="time_emb_proj", norm2="norm2", last="conv2", skip=("conv_shortcut",),
    attention_norm="group_norm", attention=(("to_q", "to_k", "to_v"), ("query", "key", "value")),
    project=("to_out.0", "proj_attn"),
)  # fmt: skip
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# of a scheduler_config.json: how it steps, which is not the model's
TOLD = frozenset((
    "clip_sample", "clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "set_alpha_to_one", "steps_offset",
    "thresholding", "timestep_spacing", "_class_name", "_diffusers_version",
))  # fmt: skip
# schedulers of a chain of β, whatever their steps are: the steps are fastdiff's
CHAINS = (
    "DDPM",
    "DDIM",
    "PNDM",
    "DPMSolver",
    "UniPC",
    "Euler",
    "Heun",
    "LMS",
    "KDPM2",
    "DEIS",
    "IPNDM",
    "SASolver",
    "LCM",
)


def network(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> PaperUNet:
    """The network of a UNet2DModel's state dict and config.json."""
    facts = {**DEFAULTS, **config}
    file = unets.Tensors(tensors, "diffusers' UNet2DModel")
    _check(facts)
    levels = {len(facts[name]) for name in ("down_block_types", "up_block_types", "block_out_channels")}
    if len(levels) > 1:
        raise CheckpointMismatchError(
            "config.json must have as many block_out_channels as down_block_types and up_block_types"
        )
    skips = any("Skip" in kind for kind in facts["down_block_types"])
    widths, layers = facts["block_out_channels"], facts["layers_per_block"]
    between = _between(facts)
    parts = {"enter": "conv_in", "time.0": "time_embedding.linear_1", "time.1": "time_embedding.linear_2"}
    for level, kind in enumerate(facts["down_block_types"]):
        at = f"down_blocks.{level}"
        if level:
            below = f"down_blocks.{level - 1}"
            inside = {"conv": ".conv", "padded_conv": ".conv", "block": ""}[between]
            parts[f"down.{level}.resample"] = f"{below}.resnet_down" if skips else f"{below}.downsamplers.0{inside}"
            if skips:
                parts[f"down.{level}.join"] = f"{below}.skip_conv"
        for i in range(layers):
            parts[f"down.{level}.blocks.{i}"] = f"{at}.resnets.{i}"
            if "Attn" in kind:
                parts[f"down.{level}.blocks.{i}.attend"] = f"{at}.attentions.{i}"
    parts |= {"middle.0": "mid_block.resnets.0", "middle.1": "mid_block.resnets.1"}
    if facts["add_attention"]:
        parts["middle.0.attend"] = "mid_block.attentions.0"
    for level, kind in enumerate(facts["up_block_types"]):
        at = f"up_blocks.{level}"
        for i in range(layers + 1):
            parts[f"up.{level}.blocks.{i}"] = f"{at}.resnets.{i}"
            if "Attn" in kind and (not skips or i == layers):
                parts[f"up.{level}.blocks.{i}.attend"] = f"{at}.attentions.{0 if skips else i}"
        if level < len(widths) - 1:
            inside = "" if between == "block" else ".conv"
            parts[f"up.{level}.resample"] = f"{at}.resnet_up" if skips else f"{at}.upsamplers.0{inside}"
            if skips:
                parts |= {f"up.{level}.norm": f"{at}.skip_norm", f"up.{level}.head": f"{at}.skip_conv"}
    parts |= {"norm": "conv_norm_out", "out": "conv_out"}
    fourier = facts["time_embedding_type"] == "fourier"
    if fourier:
        parts["frequencies"] = next(
            (n for n in ("time_proj.weight", "time_proj.W") if n in file.all), "time_proj.weight"
        )
    labels = None
    if facts["num_class_embeds"] is not None:
        known = file.take("class_embedding.weight")
        labels = torch.cat([known, known.new_zeros(1, known.shape[1])])
    head = facts["attention_head_dim"]
    swapped = facts["flip_sin_to_cos"] != (facts["freq_shift"] == 0) and not fourier
    options: dict[str, Any] = {
        "shape": (facts["in_channels"], *unets.sizes(facts["sample_size"])), "dropout": facts["dropout"],
        "eps": facts["norm_eps"],
        "groups": None if skips else facts["norm_num_groups"], "heads": 1, "head_channels": head, "rescale": skips,
        "taps": (1, 3, 3, 1) if skips else (1, 1), "progressive_in": "skip" if skips else "none",
        "progressive_out": "skip" if skips else "none", "resample": "block" if skips else between,
        "centered": not facts["center_input_sample"], "time_scale": 16.0 if fourier else 1.0,
        "time_embedding": "fourier" if fourier else "cos_sin" if facts["freq_shift"] == 0 else "sinusoidal",
    }  # fmt: skip
    net = unets.paper_unet(file, parts, NAMES, options, None, labels)
    if swapped:  # the sine where we have the cosine
        first = net.conditioning.mlp[0].weight.data
        first.copy_(torch.cat(first.chunk(2, dim=1)[::-1], dim=1))
    file.finish()
    return net


DEFAULTS: dict[str, Any] = {
    "sample_size": None, "in_channels": 3, "out_channels": 3, "center_input_sample": False, "time_embedding_type": "positional",
    "freq_shift": 0, "flip_sin_to_cos": True, "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    "mid_block_type": "UNetMidBlock2D", "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2, "mid_block_scale_factor": 1, "downsample_padding": 1,
    "downsample_type": "conv", "upsample_type": "conv", "dropout": 0.0, "act_fn": "silu", "attention_head_dim": 8,
    "norm_num_groups": 32, "attn_norm_num_groups": None, "norm_eps": 1e-5, "resnet_time_scale_shift": "default",
    "add_attention": True, "class_embed_type": None, "num_class_embeds": None, "time_embedding_dim": None,
}  # fmt: skip


def _between(facts: Mapping[str, Any]) -> str:
    """What leads from a level to the next; the same everywhere."""
    kinds = set()
    for down, up in zip(facts["down_block_types"][:-1], facts["up_block_types"][:-1]):
        for kind, chosen in ((down, facts["downsample_type"]), (up, facts["upsample_type"])):
            residual = "Resnet" in kind or "Skip" in kind or ("Attn" in kind and chosen == "resnet")
            kinds.add("block" if residual else "conv")
    if len(kinds) > 1:
        raise CheckpointMismatchError(
            "the file's network resamples by convolutions at some levels and by residual blocks at others, which is not known "
            "here: wrap the network of diffusers, ScoreModel(net, …)"
        )
    kind = kinds.pop() if kinds else "conv"
    return "padded_conv" if kind == "conv" and facts["downsample_padding"] == 1 else kind


def _check(facts: Mapping[str, Any]) -> None:
    """Refuse what a PaperUNet is not."""
    skips = [("Skip" in kind) for kind in (*facts["down_block_types"], *facts["up_block_types"])]
    middle = math.sqrt(2) if all(skips) else 1.0
    wants_norm = facts["resnet_time_scale_shift"] == "scale_shift" and facts["add_attention"]
    wrong = {
        "down_block_types": any(kind not in DOWN for kind in facts["down_block_types"]),
        "up_block_types": any(kind not in UP for kind in facts["up_block_types"]) or any(skips) != all(skips),
        "time_embedding_type": facts["time_embedding_type"] not in ("positional", "fourier"),
        "freq_shift": facts["freq_shift"] not in (0, 1),
        "mid_block_type": facts["mid_block_type"] != "UNetMidBlock2D",
        "mid_block_scale_factor": abs(facts["mid_block_scale_factor"] - middle) > 1e-3,
        "downsample_padding": facts["downsample_padding"] not in (0, 1),
        "act_fn": facts["act_fn"] not in ("silu", "swish"),
        "attn_norm_num_groups": (wants_norm and facts["attn_norm_num_groups"] is None)
        or facts["attn_norm_num_groups"] not in (None, facts["norm_num_groups"]),
        "norm_num_groups": all(skips) and min(facts["block_out_channels"]) < 128,
        "class_embed_type": facts["class_embed_type"] is not None,
        "sample_size": facts["sample_size"] is None,
        "time_embedding_dim": facts["time_embedding_dim"] not in (None, 4 * facts["block_out_channels"][0]),
        "resnet_time_scale_shift": facts["resnet_time_scale_shift"] not in ("default", "scale_shift"),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise CheckpointMismatchError(
                f"{name}={facts[name]!r} of the file's config.json is not known here: wrap the network of diffusers, "
                "ScoreModel(net, …)"
            )


def process_of(config: Mapping[str, Any]) -> tuple[processes.Process, dict[str, Any]]:
    """(the process, ScoreModel's options) of a scheduler_config.json."""
    kind = str(config.get("_class_name", "DDPMScheduler"))
    if kind.startswith("ScoreSdeVe"):
        sigmas = (float(config.get("sigma_min", 0.01)), float(config.get("sigma_max", 1348.0)))
        return processes.VE(*sigmas), {"prediction": "scaled_score", "time_input": "log_sigma", "data_range": (0, 1)}
    if kind.startswith("EDM"):
        choose("prediction_type", config.get("prediction_type", "epsilon"), ("epsilon",))
        numbers = (config.get("sigma_data", 0.5), config.get("sigma_min", 0.002), config.get("sigma_max", 80.0))
        return processes.EDM(*map(float, numbers)), {"prediction": "edm", "time_input": "c_noise"}
    if (
        kind.startswith("FlowMatch")
        and config.get("num_train_timesteps", 1000) == 1000
        and not config.get("invert_sigmas")
    ):
        return processes.RectifiedFlow(), {"prediction": "velocity", "time_input": "t*1000"}
    if not kind.startswith(CHAINS):
        raise ConfigError(
            f"scheduler must be of a chain of betas, of ScoreSdeVe, of EDM or of a flow in 1000 steps, got {kind}: wrap the "
            "network, ScoreModel(net, …)"
        )
    prediction = PREDICTIONS[choose("prediction_type", config.get("prediction_type", "epsilon"), PREDICTIONS)]
    return processes.DDPM(betas(config)), {"prediction": prediction, "time_input": "fractional_index"}


def betas(config: Mapping[str, Any]) -> list[float] | str:
    """β_1 … β_T of a scheduler's configuration."""
    steps, ends = (
        int(config.get("num_train_timesteps", 1000)),
        (config.get("beta_start", 1e-4), config.get("beta_end", 0.02)),
    )
    name = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        values = np.asarray(config["trained_betas"], np.float64)
    elif name == "squaredcos_cap_v2":
        values = schedules.cosine(steps)
    else:
        made = {"linear": schedules.linear, "scaled_linear": schedules.scaled_linear, "sigmoid": schedules.sigmoid_beta}
        values = made[choose("beta_schedule", name, made)](steps, *ends)
    if config.get("rescale_betas_zero_snr"):  # Lin et al. 2023, algorithm 1
        root = np.sqrt(np.cumprod(1 - values))
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        values = 1 - np.append(root[:1], root[1:] / root[:-1]) ** 2
    return [float(value) for value in values]


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{files.shown(path)} is no JSON file that can be read: {files.reason(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{files.shown(path)} must hold a JSON object, got {type(value).__name__}")
    return value


def folder(path: Path) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """(the weights' file, the network's config, the scheduler's config) of a pipeline's or a network's folder."""
    at = next((path / name for name in ("unet", "transformer") if (path / name / "config.json").exists()), path)
    weights = next((at / name for name in WEIGHTS if (at / name).exists()), None)
    if weights is None or not (at / "config.json").exists():
        raise CheckpointError(
            f"{files.shown(path)} must be a folder of diffusers with config.json and {WEIGHTS[0]}, or with a unet folder that "
            "has them: give the folder that save_pretrained wrote"
        )
    found = [
        path / "scheduler" / "scheduler_config.json",
        path / "scheduler_config.json",
        at.parent / "scheduler" / "scheduler_config.json",
    ]
    scheduler = next((p for p in found if p.exists()), None)
    return weights, read_json(at / "config.json"), {} if scheduler is None else read_json(scheduler)


def model(
    path: Path, part: str | None, *, num_train_timesteps: int | None = None, beta_schedule: str | None = None,
    beta_start: float | None = None, beta_end: float | None = None, trained_betas: Sequence[float] | None = None,
    rescale_betas_zero_snr: bool | None = None, prediction_type: str | None = None, variance_type: str | None = None,
) -> ScoreModel:  # fmt: skip
    """A folder that `save_pretrained` wrote; the options are those of scheduler_config.json, where the folder has none."""
    given = {
        "num_train_timesteps": num_train_timesteps, "beta_schedule": beta_schedule, "beta_start": beta_start,
        "beta_end": beta_end, "trained_betas": trained_betas, "rescale_betas_zero_snr": rescale_betas_zero_snr,
        "prediction_type": prediction_type, "variance_type": variance_type,
    }  # fmt: skip
    facts = {name: value for name, value in given.items() if value is not None}
    weights, config, scheduler = folder(path)
    for name in facts:
        if scheduler.get(name, facts[name]) != facts[name]:
            raise ConfigError(
                f"{name} must be {scheduler[name]!r}, as its scheduler_config.json says, got {facts[name]!r}: leave it out"
            )
    if scheduler.get("timestep_type", "discrete") != "discrete":
        raise ConfigError(
            f"timestep_type must be 'discrete', got {scheduler['timestep_type']!r}: wrap the network, ScoreModel(net, …)"
        )
    if not scheduler and ("prediction_type" not in facts or not facts.keys() & {"beta_schedule", "trained_betas"}):
        raise ConfigError(
            f"{files.shown(path)} has no scheduler_config.json, which says what the network was trained on: give the pipeline's "
            "folder, or config={'beta_schedule': 'linear', 'prediction_type': 'epsilon', …}"
        )
    tensors = load_tensors(weights, part)
    if config.get("_class_name") == "DiTTransformer2DModel":
        heads, eps = config.get("num_attention_heads", 16), config.get("norm_eps", 1e-5)
        net: Any = dit.network(
            tensors, sample_size=config.get("sample_size", 32), num_attention_heads=heads, norm_eps=eps,
            activation_fn=config.get("activation_fn", "gelu-approximate"),
        )  # fmt: skip
    else:
        net = network(tensors, config)
    process, options = process_of(scheduler := {**scheduler, **facts})
    double = net.config["out_channels"] == 2 * net.shape[0]
    if double:
        options["variance"] = "learned" if scheduler.get("variance_type") == "learned" else "learned_range"
    return ScoreModel(net, process, data_shape=net.shape, **{"data_range": (-1, 1), **options})
