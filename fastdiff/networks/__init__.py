"""Networks, each with a `config` from which `build` makes it again."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, choose, short
from ..execution.modules import inner
from .classifiers import adm_classifier
from .layers import TimeEmbedding
from .linear_attention_unet import LinearAttentionUNet
from .mlp import MLP
from .mp_unet import MPUNet, edm2
from .paper_unet import PaperUNet, adm, ddpm, ddpmpp, ncsnpp
from .refinenet import RefineNet, ncsn, ncsnv2
from .transformers import DiT, Transformer, dit
from .unet import UNet

# the networks that a checkpoint can name
MODELS: dict[str, type[nn.Module]] = {
    "unet": UNet, "mlp": MLP, "paper_unet": PaperUNet, "linear_attention_unet": LinearAttentionUNet, "refinenet": RefineNet,
    "dit": DiT, "transformer": Transformer, "mp_unet": MPUNet,
}  # fmt: skip

__all__ = [
    "MLP",
    "MODELS",
    "DiT",
    "LinearAttentionUNet",
    "MPUNet",
    "PaperUNet",
    "RefineNet",
    "TimeEmbedding",
    "Transformer",
    "UNet",
    "adm",
    "adm_classifier",
    "build",
    "ddpm",
    "ddpmpp",
    "describe",
    "dit",
    "edm2",
    "ncsn",
    "ncsnpp",
    "ncsnv2",
]


def build(config: dict[str, Any]) -> nn.Module:
    """The network of a config such as `{"name": "unet", "shape": [1, 8, 8]}`: a name in MODELS, and its arguments."""
    if not isinstance(config, dict) or "name" not in config:
        raise ConfigError(f'config must be a dict with a "name" from {sorted(MODELS)}, got {short(config)}')
    arguments = dict(config)
    network = MODELS[choose("name", arguments.pop("name"), MODELS)]
    valid = inspect.signature(network).parameters
    for key in arguments:
        choose(f"config's keys for {config['name']!r}", key, valid)
    if "shape" not in arguments:
        raise ConfigError(
            f'config must have the shape of one sample, got {short(config)}: add "shape", for example [1, 8, 8]'
        )
    with torch.inference_mode(False):  # whose parameters could not be trained
        return network(**arguments)


def describe(net: nn.Module) -> dict[str, Any]:
    """The config from which `build` makes a network like `net` or like the one that it wraps, as JSON has it."""
    network = inner(net)
    for name, kind in MODELS.items():
        if type(network) is kind:
            return {"name": name, **network.config}
    raise ConfigError(
        f"net must be one of fastdiff.networks.MODELS ({', '.join(MODELS)}), got {type(network).__name__}: add its class "
        "to MODELS with a .config"
    )


def adopt(net: nn.Module, config: Any) -> None:
    """The time scale of a config, as of a file whose tensors the network takes, where the network was given none."""
    network = inner(net)
    if isinstance(config, dict) and type(network) is MODELS.get(config.get("name", "")) and not network.scale_given:
        network.set_time_scale(config["time_scale"])
        network.scale_given = True
