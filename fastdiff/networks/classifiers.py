"""Classifiers of noisy samples: the networks of classifier guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..errors import ConfigError, ShapeError, choose
from .layers import CONVS, LARGEST, Conditioning, ResidualBlock, group_norm, integers, norm_silu

SCALE = 4.0  # of the Fourier features of a level in [0, 1]


class MLPClassifier(nn.Module):
    """A perceptron: samples `x` [B, *shape], taken flat, and the noise's level `u` [B] in [0, 1], to logits [B, num_classes].

    `h = dropout(silu(linear(h) + level_i(u)))` at each of `layers` hidden layers, where `level_i` is layer i's part of a
    two-layer perceptron on the level's Fourier features.
    """

    def __init__(
        self, shape: Sequence[int], num_classes: int, *, hidden: int = 128, layers: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.config = {
            **_common(shape, num_classes, dropout),
            "hidden": checks.integer("hidden", hidden, 1, LARGEST),
            "layers": checks.integer("layers", layers, 1, LARGEST),
        }
        self.conditioning = Conditioning(layers * hidden, hidden, None, "fourier", SCALE)
        sizes = [math.prod(self.config["shape"]), *[hidden] * layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.dropout = nn.Dropout(self.config["dropout"])
        self.out = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        h = x.flatten(1)
        for linear, level in zip(self.hidden, self.conditioning(u, None).chunk(len(self.hidden), dim=1)):
            h = self.dropout(F.silu(linear(h) + level))
        return self.out(h)  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """A wide residual network (Zagoruyko & Komodakis 2016): samples `x` [B, C, *spatial] and the noise's level `u` [B] in [0, 1],
    to logits [B, num_classes].

    Level `l` has `channels * multipliers[l]` channels and `blocks` residual blocks, from the second on after a strided
    convolution; then the mean over all places, and a linear layer. Groups take the place of batches in the normalisations, so
    that no sample's logits depend on others, and their scale and shift are of the level (Dhariwal & Nichol 2021, §3).
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        *,
        channels: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.config = config = {
            **_common(shape, num_classes, dropout),
            "channels": checks.integer("channels", channels, 2, LARGEST),
            "multipliers": list(integers("multipliers", multipliers, 1)),
            "blocks": checks.integer("blocks", blocks, 1, LARGEST),
        }
        size = config["shape"]
        if not 2 <= len(size) <= 4:
            raise ShapeError(
                f"shape must be (C, *spatial) with one to three spatial axes, got {tuple(size)}: use MLPClassifier for vectors"
            )
        if not config["multipliers"]:
            raise ConfigError("multipliers must have at least one entry, got (): write (1,) for one resolution")
        rank = len(size) - 1
        widths = [channels * m for m in config["multipliers"]]
        self.enter = nn.ModuleList(
            CONVS[rank](below, width, 3, 2 if level else 1, 1)
            for level, (below, width) in enumerate(pairwise([size[0], *widths]))
        )
        self.levels = nn.ModuleList(
            nn.ModuleList(ResidualBlock(rank, width, width, config["dropout"], False) for _ in range(blocks))
            for width in widths
        )
        self.widths = [2 * width for width in widths for _ in range(blocks)]
        self.conditioning = Conditioning(sum(self.widths), 2 * channels, None, "fourier", SCALE)
        self.norm = group_norm(widths[-1])
        self.out = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        of_level = iter(self.conditioning(u, None).split(self.widths, dim=1))
        h = x
        for enter, blocks in zip(self.enter, self.levels):
            h = enter(h)
            for block in blocks:  # type: ignore[union-attr]
                scale, shift = next(of_level).chunk(2, dim=1)
                h = block(h, 1 + scale, shift)
        return self.out(norm_silu(self.norm, h).flatten(2).mean(2))  # type: ignore[no-any-return]


CLASSIFIERS: dict[str, type[nn.Module]] = {"mlp": MLPClassifier, "wide_resnet": WideResNet}  # that a file can name


def build_classifier(config: dict[str, Any]) -> nn.Module:
    """The classifier of a config such as `{"name": "mlp", "shape": [2], "num_classes": 3}`."""
    arguments = dict(config)
    return CLASSIFIERS[choose("name", arguments.pop("name", None), CLASSIFIERS)](**arguments)


def _common(shape: Sequence[int], num_classes: int, dropout: float) -> dict[str, Any]:
    sizes = integers("shape", shape, 1)
    if not sizes:
        raise ConfigError("shape must have at least one axis, got (): write (1,) for scalar samples")
    return {
        "shape": list(sizes),
        "num_classes": checks.integer("num_classes", num_classes, 2, LARGEST),
        "dropout": checks.number("dropout", dropout, 0, 1, below=True),
    }
