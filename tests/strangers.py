"""Other libraries' code, run as it is beside ours: packages, or checkouts that environment variables name. Where one is not
there, its tests are skipped."""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

# repository -> the variable that names a checkout of it
CHECKOUTS = {
    "yang-song/score_sde_pytorch": "SCORE_SDE_PYTORCH",
    "ermongroup/ncsn": "NCSN",
    "ermongroup/ncsnv2": "NCSNV2",
    "openai/guided-diffusion": "GUIDED_DIFFUSION",
    "openai/improved-diffusion": "IMPROVED_DIFFUSION",
    "NVlabs/edm": "EDM",
    "NVlabs/edm2": "EDM2",
}


def checkout(repository: str) -> Path:
    variable = CHECKOUTS[repository]
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout of {repository}")
    return Path(os.environ[variable])


def package(name: str) -> types.ModuleType:
    with warnings.catch_warnings(action="ignore"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not installed ({error})")


@contextmanager
def modules_of(repository: str, **stand_ins: types.ModuleType):
    """Imports from a checkout, and stand-ins for what it imports and no network uses; nothing of it stays."""
    root, before = checkout(repository), dict(sys.modules)
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(root))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield root
    finally:
        sys.path.remove(str(root))
        for name in set(sys.modules) - set(before):
            if (
                name in stand_ins
                or getattr(sys.modules[name], "__file__", None) is None
                or str(root) in str(sys.modules[name].__file__)
            ):
                del sys.modules[name]


def stand_in(name: str, **members: object) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(members)
    return module


def upfirdn2d(x, kernel, up=1, down=1, pad=(0, 0)):
    """What the extension of score_sde_pytorch does: zeros between, zeros around, the filter, every down-th."""
    batch, channels, height, width = x.shape
    spread = x.new_zeros(batch, channels, height * up, width * up)
    spread[:, :, ::up, ::up] = x
    spread = F.pad(spread, (pad[0], pad[1], pad[0], pad[1]))
    kernel = kernel.flip(0, 1)[None, None].expand(channels, 1, *kernel.shape).to(x.dtype)
    return F.conv2d(spread, kernel, groups=channels)[:, :, ::down, ::down]


class Config(dict):
    """In the place of ml_collections' ConfigDict."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def score_sde_stand_ins() -> dict[str, types.ModuleType]:
    return {
        "op": stand_in("op", upfirdn2d=upfirdn2d),
        "ml_collections": stand_in("ml_collections", ConfigDict=Config),
    }


def drawn(net: nn.Module) -> nn.Module:
    """The network with all its parameters drawn, also those that start at zero or one, so that each counts."""
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        if parameter.requires_grad:
            scale = 0.05 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor, most: float = 1e-5) -> None:
    """Equal within `most` of the largest number."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= most * float(theirs.abs().max())
