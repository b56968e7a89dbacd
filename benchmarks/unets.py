"""The U-Net of DDPM, as Hugging Face's diffusers builds it and as we do."""

import torch
from peers import load
from torch import nn

from fastdiff.networks import PaperUNet
from fastdiff.training.sources import diffusers as from_diffusers

SHAPE = (3, 32, 32)
# Ho et al. 2020, as google/ddpm-cifar10-32 has it
DDPM = {
    "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2, "downsample_padding": 0,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"), "flip_sin_to_cos": False,
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "freq_shift": 1, "norm_eps": 1e-6,
    "attention_head_dim": None,
}  # fmt: skip


def drawn(net: nn.Module) -> nn.Module:
    """With all its parameters drawn, as if it were trained."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        scale = 0.05 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return net


def of_diffusers() -> tuple[nn.Module, PaperUNet]:
    """(its U-Net of 35.7 million parameters, ours with the same weights)."""
    theirs = drawn(load("diffusers").UNet2DModel(**DDPM))
    return theirs, from_diffusers.network(theirs.state_dict(), dict(theirs.config))
