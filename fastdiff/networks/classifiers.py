"""Classifiers of noisy samples: the networks of classifier guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..errors import ConfigError, ShapeError, choose, names_keywords
from ..execution import fused
from .layers import (
    CONVS,
    LARGEST,
    TIME_SCALES,
    Conditioning,
    ResidualBlock,
    group_norm,
    image_shape,
    integers,
    norm_silu,
    normal_,
)
from .paper_unet import RESAMPLE, PaperEncoder, check_options, levels_at, multipliers_of, norm_of

SCALE = 4.0  # of the Fourier features of a level in [0, 1]
POOL = ("attention", "mean", "spatial")
SPATIAL = 2048  # numbers of the hidden layer behind "spatial"


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
        _check_image(size)
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


class AttentionPool(nn.Module):
    """`project(softmax(q kᵀ / √d) v)` of one query, the mean over all places, to these and itself: [B, C, *] to [B, C].

    Radford et al. 2021 (CLIP), §2.4; `positions` [C, 1 + places], learned, are added first. The projection is left to the layer
    behind it.
    """

    def __init__(self, channels: int, places: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.empty(channels, 1 + places))
        self.qkv = nn.Linear(channels, 3 * channels)
        normal_(self.positions, channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2)
        x = (torch.cat([x.mean(2, keepdim=True), x], dim=2) + self.positions).transpose(1, 2)
        channels = x.shape[2]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, :1], weight[:channels], bias[:channels])  # of the mean alone
        k, v = F.linear(x, weight[channels:], bias[channels:]).chunk(2, dim=2)
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return fused.attention(q, k, v).flatten(1)


class UNetClassifier(PaperEncoder):
    """The half of a U-Net (Dhariwal & Nichol 2021, §4.3): samples `x` [B, C, *spatial] and the noise's level `u` [B] in [0, 1],
    to logits [B, num_classes].

    The way down of ADM's PaperUNet and the blocks below its coarsest level, of which a layer makes the logits. `adm_classifier`
    has the paper's sizes.

    shape           one sample's shape, (C, *spatial), with one to three spatial axes, multiples of 2^(levels − 1)
    channels, multipliers, blocks, attention, head_channels, resample, skip_conv, scale_shift, groups, eps, dropout, recompute
                    as PaperUNet has them
    pool            "attention": of the mean over all places, to them (see AttentionPool), in heads of `head_channels`; "mean":
                    the mean; "spatial": the means of all results on the way down too, through a layer of 2048 and ReLU
    time_scale      of the cos_sin features of u: 1000 unless given, and 1 for a network that is told steps
    """

    norm: nn.GroupNorm | None
    pool: AttentionPool | None

    @names_keywords
    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        *,
        channels: int = 128,
        multipliers: Sequence[float] = (1, 2, 3, 4),
        blocks: int = 2,
        attention: Sequence[int] = (1, 2, 3),
        head_channels: int = 64,
        resample: str = "block",
        skip_conv: bool = False,
        scale_shift: bool = True,
        groups: int | None = None,
        eps: float = 1e-5,
        pool: str = "attention",
        time_scale: float | None = None,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        channels = checks.integer("channels", channels, 4, LARGEST)
        time_scale = TIME_SCALES["cos_sin"] if time_scale is None else time_scale
        self.config = config = {
            **_common(shape, num_classes, dropout),
            "channels": channels,
            "multipliers": multipliers_of(multipliers),
            "blocks": checks.integer("blocks", blocks, 1, LARGEST),
            "attention": list(integers("attention", attention, 0)),
            "head_channels": checks.integer("head_channels", head_channels, 1, LARGEST),
            "resample": choose("resample", resample, RESAMPLE),
            "skip_conv": bool(skip_conv),
            "scale_shift": bool(scale_shift),
            "groups": None if groups is None else checks.integer("groups", groups, 1, LARGEST),
            "eps": checks.number("eps", eps, 0, above=True),
            "pool": choose("pool", pool, POOL),
            "time_scale": checks.number("time_scale", time_scale, 0, above=True),
            "recompute": bool(recompute),
        }
        _check_image(config["shape"])
        whole = {**config, **FIXED, "time_channels": channels}
        check_options(whole, "WideResNet")
        self.shape = tuple(config["shape"])
        width, passed, _ = self._build_down(whole)
        self._build_modulation()
        self.norm = self.pool = None
        if pool == "spatial":
            self.hidden = nn.Linear(sum(passed) + width, SPATIAL)
            width = SPATIAL
        else:
            self.norm = norm_of(whole, width)
            if pool == "attention":
                places = math.prod(size >> (len(config["multipliers"]) - 1) for size in self.shape[1:])
                self.pool = AttentionPool(width, places, width // head_channels)
        self.out = nn.Linear(width, num_classes)
        self._initialise()

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        h, passed = self._descend(x, self._told(self._modulations(self.conditioning(u, None))))
        if self.norm is None:
            means = [part.flatten(2).mean(2) for part in (*passed, h)]
            return self.out(F.relu(self.hidden(torch.cat(means, dim=1))))  # type: ignore[no-any-return]
        h = norm_silu(self.norm, h)
        return self.out(h.flatten(2).mean(2) if self.pool is None else self.pool(h))  # type: ignore[no-any-return]


# what a UNetClassifier has of a PaperUNet's options
FIXED = {
    "heads": 1, "attention_middle": True, "taps": (1, 1), "rescale": False, "progressive_in": "none", "labels_first": False,
    "time": True, "time_embedding": "cos_sin",
}  # fmt: skip
# of the longest axis: multipliers and blocks of Dhariwal & Nichol's classifiers of ImageNet
SIZES = {
    64: ((1, 2, 3, 4), 4), 128: ((1, 1, 2, 3, 4), 2), 256: ((1, 1, 2, 2, 4, 4), 2), 512: ((0.5, 1, 1, 2, 2, 4, 4), 2),
}  # fmt: skip


def adm_classifier(shape: Sequence[int], num_classes: int = 1000, **changes: Any) -> UNetClassifier:
    """The classifier of ADM-G (Dhariwal & Nichol 2021, §4.3, and their published files): attention at 32, 16 and 8, of shapes of
    64, 128, 256 and 512 the depth and widths for these, of others `UNetClassifier`'s. `changes` of UNetClassifier."""
    multipliers, blocks = SIZES.get(max(image_shape(shape)[1:]), ((1, 2, 3, 4), 2))
    attention = levels_at(shape, (32, 16, 8), multipliers, changes)
    return UNetClassifier(
        shape,
        num_classes,
        **{"multipliers": multipliers, "blocks": blocks, "attention": attention, "groups": 32, **changes},
    )


# that a file can name
CLASSIFIERS: dict[str, type[nn.Module]] = {
    "mlp": MLPClassifier, "wide_resnet": WideResNet, "unet_classifier": UNetClassifier,
}  # fmt: skip


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


def _check_image(shape: list[int]) -> None:
    if not 2 <= len(shape) <= 4:
        raise ShapeError(
            f"shape must be (C, *spatial) with one to three spatial axes, got {tuple(shape)}: use MLPClassifier for vectors"
        )
