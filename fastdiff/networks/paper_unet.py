"""The U-Nets of the papers: DDPM, DDPM++ and NCSN++, ADM, and all between them, as options of one network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..errors import ConfigError, ShapeError, choose, names_keywords
from ..execution import fused
from .layers import (
    CONVS,
    HALF,
    LARGEST,
    Attention,
    Conditioning,
    TimeConditioned,
    check_call,
    common_config,
    condition_config,
    group_norm,
    image_condition,
    image_shape,
    integers,
    norm_silu,
    zeroed,
)

RESAMPLE = ("conv", "padded_conv", "pool", "block")
ATTENTION_UP = ("each", "last")
PROGRESSIVE = ("none", "skip", "residual")
COMBINE = ("sum", "cat")
POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class PaperEncoder(nn.Module):
    """What the papers' U-Nets share with classifiers: the time's embedding, the first convolution, the way down, and the blocks
    below the coarsest level."""

    config: dict[str, Any]
    shape: tuple[int, ...]
    conditioning: Conditioning
    modulation: nn.Linear | None

    def _build_down(self, config: dict[str, Any], num_classes: int | None = None) -> tuple[int, list[int], int]:
        """These layers, by the options of a PaperUNet with these embeddings of labels; the channels of their result, of what is
        set beside it on a way up, and of a progressive path."""
        hidden, rank, widths = 4 * config["channels"], len(self.shape) - 1, level_widths(config)
        conv, self.half = CONVS[rank], HALF if config["rescale"] else 1.0
        self.conditioning = Conditioning(
            hidden, hidden, num_classes, config["time_embedding"], config["time_scale"], config["time_channels"],
            config["labels_first"],
        ) if config["time"] else None  # type: ignore[assignment]  # fmt: skip
        inputs, skips, pyramid = widths[0], [widths[0]], self.shape[0]
        self.enter = conv(pyramid, inputs, 3, 1, 1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            stage = Stage()
            if level:
                stage.resample = resampling(config, rank, inputs, "down")
                if config["progressive_in"] == "skip":
                    stage.pyramid = Resample(rank, config["taps"], "down")
                    stage.join = conv(pyramid, inputs, 1)
                    inputs *= 2 if config["combine"] == "cat" else 1
                elif config["progressive_in"] == "residual":
                    stage.pyramid = Strided(rank, config["taps"], pyramid, inputs)
                    pyramid = inputs
                skips.append(inputs)
            for _ in range(config["blocks"]):
                stage.blocks.append(Block(config, rank, inputs, width, level in config["attention"]))
                inputs = width
                skips.append(inputs)
            self.down.append(stage)
        attends = config["attention_middle"]
        self.middle = nn.ModuleList(Block(config, rank, inputs, inputs, i == 0 and attends) for i in range(2))
        return inputs, skips, pyramid

    def _build_modulation(self) -> None:
        """What tells all blocks the time, in one product instead of a small one in each block."""
        self.widths = [block.width for block in self.blocks()]
        told = self.conditioning is not None
        self.modulation = nn.Linear(4 * self.config["channels"], sum(self.widths)) if told else None

    def _initialise(self) -> None:
        """The papers' initialisation: uniform of variance 2 / (inputs + outputs), and zeros at the ends of what is added."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, *CONVS.values())):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Block):
                zeroed(module.last)
            elif isinstance(module, Attention):
                zeroed(module.project)

    def blocks(self) -> Iterator[Block]:
        """The residual blocks, in the order in which they run."""
        for stage in self.down:
            yield from (part for part in (stage.resample, *stage.blocks) if isinstance(part, Block))
        yield from self.middle
        for stage in self.up:
            yield from (part for part in (*stage.blocks, stage.resample) if isinstance(part, Block))

    def _modulations(self, hidden: Tensor) -> Tensor:
        return self.modulation(F.silu(hidden))  # type: ignore[misc]

    def _told(self, features: Tensor | None) -> Iterator[Tensor | None]:
        """Of the modulations of all blocks that of each, in the order in which they run."""
        return iter([None] * len(self.widths)) if features is None else iter(features.split(self.widths, dim=1))

    def _descend(
        self, x: Tensor, told: Iterator[Tensor | None], field: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The result of the blocks below the coarsest level, and all results on the way down.

        field   what is added behind the first convolution
        """
        h = self.enter(x)
        if field is not None:
            h = h + field
        passed, pyramid = [h], x
        for level, stage in enumerate(self.down):
            if level:
                h = self._run(stage.resample, h, told)
                if stage.pyramid is not None:
                    pyramid = stage.pyramid(pyramid)
                    if stage.join is None:
                        h = pyramid = (pyramid + h) * self.half
                    else:
                        joined = stage.join(pyramid)
                        h = torch.cat((joined, h), 1) if self.config["combine"] == "cat" else joined + h
                passed.append(h)
            for block in stage.blocks:
                h = self._run(block, h, told)
                passed.append(h)
        for block in self.middle:
            h = self._run(block, h, told)
        return h, passed

    def _run(self, part: nn.Module, h: Tensor, told: Iterator[Tensor | None]) -> Tensor:
        """One layer between or on levels."""
        if not isinstance(part, Block):
            return part(h)  # type: ignore[no-any-return]
        if self.config["recompute"] and torch.is_grad_enabled():
            return checkpoint(part, h, next(told), use_reentrant=False)  # type: ignore[no-any-return]
        return part(h, next(told))  # type: ignore[no-any-return]


class PaperUNet(PaperEncoder, TimeConditioned):
    """A U-Net as the papers have it: `x` [B, C, *spatial], `t` [B] to [B, out_channels, *spatial].

    Level `l` has `channels * multipliers[l]` channels: `blocks` residual blocks on the way down, each joined by concatenation to
    one of `blocks + 1` on the way up, as are the first convolution and each down-sampling. Below the coarsest level a block,
    self-attention and a block. The defaults are Ho et al. 2020, appendix B; `ddpm`, `ddpmpp`, `ncsnpp` and `adm` have each
    paper's.

    shape           one sample's shape, (C, *spatial), with one to three spatial axes, multiples of 2^(levels − 1)
    attention       the levels (0 is the finest) whose blocks end in self-attention; on the way up "each" of them or the "last"
                    of the level (`attention_up`), with `heads` heads or heads of `head_channels` channels; `attention_middle`
                    False leaves out that below the coarsest level
    resample        between levels "conv": strided convolution, padded behind, and nearest interpolation with a convolution;
                    "padded_conv": the same, padded on both sides; "pool": means, and interpolation; "block": a residual block
                    that resamples within (BigGAN, Brock et al. 2019), whose skip has a convolution (`skip_conv`) or not
    taps            the filter of resampling by blocks and along the progressive paths: (1, 1) are means and nearest
                    interpolation, (1, 3, 3, 1) is anti-aliased (FIR, Karras et al. 2020; Song et al. 2021, appendix H)
    scale_shift     time and label enter a block as scale and shift of its second normalisation (Dhariwal & Nichol 2021, §3),
                    else they are added before it
    rescale         the sums of blocks and attention times 1/√2 (Song et al. 2021, appendix H)
    progressive_in  the sample itself, down-sampled, enters each level: "skip", by a 1×1 convolution (added or set beside,
                    `combine`), or "residual", by strided convolutions
    progressive_out the result is a sum over levels: "skip", of one convolution each, or "residual"
    groups, eps     of the normalisations; groups of at least four channels, at most 32, unless given
    num_classes     labels `y` [B] >= 0 and <= num_classes, added to the time's embedding, or, `labels_first`, to its features;
                    num_classes means "no label", and so does `y=None` for all samples
    cond_shape      conditions `cond` [B, *cond_shape]: (n,), vectors, added to the time's embedding, or (C', *spatial), fields,
                    which are further channels of the input (of fewer places: interpolated linearly, as for super-resolution by
                    Dhariwal & Nichol 2021); NaN in all numbers of a sample, and None, mean "no condition"
    time_embedding  "sinusoidal", "cos_sin" or "fourier" (see TimeEmbedding) with `time_channels` features (default `channels`,
                    twice as many for "fourier") and `time_scale`
    time            False: the network is told no time (and no label)
    centered        False: of samples in [0, 1] the network sees 2 x − 1
    out_channels    channels of the result, where they are not the sample's (a learned variance: 2 C)
    recompute       blocks keep no activations for the backward pass and are run again in it (Chen et al. 2016): less memory,
                    more time

    The last convolution starts at zero, and with it the network's output. `config` holds the arguments as JSON has them.
    """

    @names_keywords
    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 128,
        multipliers: Sequence[float] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (1,),
        attention_up: str = "each",
        attention_middle: bool = True,
        heads: int = 1,
        head_channels: int | None = None,
        resample: str = "conv",
        skip_conv: bool = True,
        taps: Sequence[int] = (1, 1),
        scale_shift: bool = False,
        rescale: bool = False,
        progressive_in: str = "none",
        progressive_out: str = "none",
        combine: str = "sum",
        groups: int | None = None,
        eps: float = 1e-6,
        num_classes: int | None = None,
        labels_first: bool = False,
        time: bool = True,
        time_embedding: str = "sinusoidal",
        time_scale: float | None = None,
        time_channels: int | None = None,
        centered: bool = True,
        dropout: float = 0.0,
        out_channels: int | None = None,
        cond_shape: Sequence[int] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.scale_given = time_scale is not None
        channels = checks.integer("channels", channels, 4, LARGEST)
        wide = channels * (2 if time_embedding == "fourier" else 1)
        self.config = config = {
            "shape": list(image_shape(shape)),
            "channels": channels,
            "multipliers": multipliers_of(multipliers),
            "blocks": checks.integer("blocks", blocks, 1, LARGEST),
            "attention": list(integers("attention", attention, 0)),
            "attention_up": choose("attention_up", attention_up, ATTENTION_UP),
            "attention_middle": bool(attention_middle),
            "heads": checks.integer("heads", heads, 1, LARGEST),
            "head_channels": None
            if head_channels is None
            else checks.integer("head_channels", head_channels, 1, LARGEST),
            "resample": choose("resample", resample, RESAMPLE),
            "skip_conv": bool(skip_conv),
            "taps": list(integers("taps", taps, 0)),
            "scale_shift": bool(scale_shift),
            "rescale": bool(rescale),
            "progressive_in": choose("progressive_in", progressive_in, PROGRESSIVE),
            "progressive_out": choose("progressive_out", progressive_out, PROGRESSIVE),
            "combine": choose("combine", combine, COMBINE),
            "groups": None if groups is None else checks.integer("groups", groups, 1, LARGEST),
            "eps": checks.number("eps", eps, 0, above=True),
            "labels_first": bool(labels_first),
            "time": bool(time),
            "time_channels": checks.integer("time_channels", time_channels or wide, 2, LARGEST),
            "centered": bool(centered),
            "recompute": bool(recompute),
            **common_config(num_classes, time_embedding, time_scale, dropout, out_channels),
            **condition_config(cond_shape),
        }
        check_options(config)
        self.shape, self.num_classes = tuple(config["shape"]), config["num_classes"]
        self.cond_shape = None if cond_shape is None else tuple(config["cond_shape"])
        self.takes_vector = self.cond_shape is not None and len(self.cond_shape) == 1
        self._build_up(*self._build_down(config, self.num_classes))
        self._build_modulation()
        self.condition = image_condition(self.cond_shape, self.shape, 4 * channels, self.enter.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        super()._initialise()
        for module in self.modules():
            if isinstance(module, Stage) and self.config["progressive_out"] == "skip" and module.head is not None:
                zeroed(module.head)
        zeroed(self.out)

    def _build_up(self, inputs: int, skips: list[int], pyramid: int) -> None:
        """The way up from so many channels."""
        config, rank, widths = self.config, len(self.shape) - 1, level_widths(self.config)
        conv, last = CONVS[rank], len(widths) - 1
        for level, width in reversed(list(enumerate(widths))):
            stage = Stage()
            for i in range(config["blocks"] + 1):
                attends = level in config["attention"] and (config["attention_up"] == "each" or i == config["blocks"])
                stage.blocks.append(Block(config, rank, inputs + skips.pop(), width, attends))
                inputs = width
            if config["progressive_out"] == "skip":
                stage.pyramid = Resample(rank, config["taps"], "up") if level < last else None
                if level:
                    stage.norm = norm_of(config, width)
                    stage.head = conv(width, self.result, 3, 1, 1)
            elif config["progressive_out"] == "residual":
                if level == last:
                    stage.norm, stage.head = norm_of(config, width), conv(width, width, 3, 1, 1)
                else:
                    stage.pyramid = Interpolated(rank, config["taps"], pyramid, width)
                pyramid = width
            if level:
                stage.resample = resampling(config, rank, inputs, "up")
            self.up.append(stage)
        self.norm = norm_of(config, inputs)
        self.out = conv(inputs, self.result, 3, 1, 1)

    @property
    def result(self) -> int:
        """The result's channels."""
        return self.config["out_channels"] or self.shape[0]  # type: ignore[no-any-return]

    def time_features(self, t: Tensor) -> Tensor:
        if self.conditioning is None:
            return torch.zeros(len(t), 0, dtype=self.out.weight.dtype, device=t.device)
        hidden = self.conditioning.of_time(t)
        return hidden if self.num_classes is not None or self.takes_vector else self._modulations(hidden)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, features: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        check_call(self, x, t, y, cond)
        if self.conditioning is not None and (features is None or self.num_classes is not None or self.takes_vector):
            hidden = self.conditioning(t, y, features)
            features = self._modulations(hidden + self.condition(cond) if self.takes_vector else hidden)
        told = self._told(None if self.modulation is None else features)
        x = x if self.config["centered"] else 2 * x - 1
        field = None if self.condition is None or self.takes_vector else self.condition(cond)
        h, skips = self._descend(x, told, field)
        total = None
        for stage in self.up:
            for block in stage.blocks:
                h = self._run(block, torch.cat((h, skips.pop()), dim=1), told)
            if self.config["progressive_out"] == "skip":
                below = None if total is None else stage.pyramid(total)
                if stage.head is not None:
                    total = stage.head(norm_silu(stage.norm, h))
                    total = total if below is None else below + total
                else:
                    total = below
            elif self.config["progressive_out"] == "residual":
                if total is None:
                    total = stage.head(norm_silu(stage.norm, h))
                else:
                    h = total = (stage.pyramid(total) + h) * self.half
            if stage.resample is not None:
                h = self._run(stage.resample, h, told)
        out = self.out(norm_silu(self.norm, h))
        return out + total if self.config["progressive_out"] == "skip" and total is not None else out


class Stage(nn.Module):
    """One level on the way down or up: its blocks, what leads to the next level, and its part of a progressive path."""

    def __init__(self) -> None:
        super().__init__()
        self.resample: nn.Module | None = None
        self.blocks = nn.ModuleList()
        self.pyramid: nn.Module | None = None
        self.join: nn.Module | None = None
        self.norm: nn.Module | None = None
        self.head: nn.Module | None = None


class Block(nn.Module):
    """A residual block, with self-attention behind it: [B, inputs, *], [B or 1, width] to [B, outputs, *].

    `(skip(r(x)) + last(silu(norm2(conv(r(silu(norm(x)))) + told)))) * scale`, with `r` up- or down-sampling or nothing, and
    `told` of the time and the label (He et al. 2016; Brock et al. 2019; Ho et al. 2020); with `scale_shift` told is (γ, β) and
    enters as `norm2(·) (1 + γ) + β` (Dhariwal & Nichol 2021, §3).
    """

    def __init__(
        self,
        config: dict[str, Any],
        rank: int,
        inputs: int,
        outputs: int,
        attention: bool,
        direction: str | None = None,
    ) -> None:
        super().__init__()
        conv = CONVS[rank]
        self.scale_shift, self.scale = config["scale_shift"], HALF if config["rescale"] else 1.0
        self.width = outputs * (2 if self.scale_shift else 1)
        self.resample = None if direction is None else Resample(rank, config["taps"], direction)
        self.norm, self.conv = norm_of(config, inputs), conv(inputs, outputs, 3, 1, 1)
        self.norm2, self.last = norm_of(config, outputs), conv(outputs, outputs, 3, 1, 1)
        self.dropout = nn.Dropout(config["dropout"]) if config["dropout"] else nn.Identity()
        projects = inputs != outputs or (direction is not None and config["skip_conv"])
        self.skip = conv(inputs, outputs, 1) if projects else nn.Identity()
        self.attend: nn.Module = nn.Identity()
        if attention:
            heads = outputs // config["head_channels"] if config["head_channels"] else config["heads"]
            self.attend = Attention(outputs, heads, self.scale, norm_of(config, outputs))

    def forward(self, x: Tensor, told: Tensor | None) -> Tensor:
        h = norm_silu(self.norm, x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv(h)
        if told is None:
            h = norm_silu(self.norm2, h)
        elif self.scale_shift:
            gain, shift = told.expand(len(h), -1).chunk(2, dim=1)
            gain = 1 + gain
            norm = self.norm2
            shift = torch.addcmul(shift, norm.bias, gain)
            h = fused.group_norm(h, norm.num_groups, norm.weight * gain, shift, norm.eps)
        else:
            h = norm_silu(self.norm2, h + told.view(*told.shape, *[1] * (h.ndim - 2)))
        h = self.skip(x) + self.last(self.dropout(h))
        return self.attend(h if self.scale == 1 else h.mul_(self.scale))  # type: ignore[no-any-return]


class Resample(nn.Module):
    """Half or twice the resolution, through a filter of two taps or four, whose weights add up to 1: [B, C, *] to [B, C, *].

    Down: y_i = Σ_k f_k x_{2i+k−p}, p = (taps − 2) / 2; up, twice the filter over x with zeros between its numbers; x is 0 beyond
    its ends (Karras et al. 2020). (1, 1) are means of two and nearest interpolation.
    """

    def __init__(self, rank: int, taps: Sequence[int], direction: str) -> None:
        super().__init__()
        self.rank, self.taps, self.direction = rank, tuple(tap / sum(taps) for tap in taps), direction

    def forward(self, x: Tensor) -> Tensor:
        if len(self.taps) == 2:
            return (
                POOLS[self.rank](x, 2) if self.direction == "down" else F.interpolate(x, scale_factor=2, mode="nearest")
            )
        return filtered(x, self.taps, 1, 2) if self.direction == "down" else filtered_up(x, self.taps, 1)


class Strided(nn.Module):
    """Half the resolution by a convolution of stride 2 behind the filter, x being 0 beyond its ends before both."""

    def __init__(self, rank: int, taps: Sequence[int], inputs: int, outputs: int) -> None:
        super().__init__()
        self.taps, self.rank = tuple(tap / sum(taps) for tap in taps), rank
        self.conv = CONVS[rank](inputs, outputs, 3, 2, 0)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.taps) == 2:  # the convolution alone, padded behind as TensorFlow's "SAME" does
            return self.conv(F.pad(x, (0, 1) * self.rank))  # type: ignore[no-any-return]
        return self.conv(filtered(x, self.taps, 2, 1))  # type: ignore[no-any-return]


class Interpolated(nn.Module):
    """Twice the resolution through the filter, and a convolution, x being 0 beyond its ends before both."""

    def __init__(self, rank: int, taps: Sequence[int], inputs: int, outputs: int) -> None:
        super().__init__()
        self.taps = tuple(tap / sum(taps) for tap in taps)
        self.conv = CONVS[rank](inputs, outputs, 3, 1, 1 if len(taps) == 2 else 0)

    def forward(self, x: Tensor) -> Tensor:
        nearest = len(self.taps) == 2
        up = F.interpolate(x, scale_factor=2, mode="nearest") if nearest else filtered_up(x, self.taps, 0)
        return self.conv(up)  # type: ignore[no-any-return]


def _kernel(x: Tensor, taps: Sequence[float], gain: float) -> Tensor:
    """The filter of every channel along every axis, [C, 1, taps, …]."""
    # no tensor of a list, whose copy to a device cannot be captured in a CUDA graph
    line = torch.stack([x.new_full((), tap * gain) for tap in taps])
    kernel = line
    for _ in range(x.ndim - 3):
        kernel = kernel[..., None] * line
    return kernel.expand(x.shape[1], 1, *kernel.shape)


def filtered(x: Tensor, taps: Sequence[float], padding: int, stride: int) -> Tensor:
    return CONVOLVE[x.ndim - 2](x, _kernel(x, taps, 1), None, stride, padding, 1, x.shape[1])


def filtered_up(x: Tensor, taps: Sequence[float], cut: int) -> Tensor:
    return TRANSPOSED[x.ndim - 2](x, _kernel(x, taps, 2), None, 2, cut, 0, x.shape[1])


def resampling(config: dict[str, Any], rank: int, channels: int, direction: str) -> nn.Module:
    """What leads from a level to the next."""
    kind, taps = config["resample"], config["taps"]
    if kind == "block":
        return Block(config, rank, channels, channels, False, direction)
    if kind == "pool":
        return Resample(rank, taps, direction)
    if direction == "up":
        return Interpolated(rank, taps, channels, channels)
    return (
        CONVS[rank](channels, channels, 3, 2, 1) if kind == "padded_conv" else Strided(rank, taps, channels, channels)
    )


def norm_of(config: dict[str, Any], channels: int) -> nn.GroupNorm:
    if config["groups"] is None:
        norm = group_norm(channels)
        norm.eps = config["eps"]
        return norm
    return nn.GroupNorm(config["groups"], channels, config["eps"])


def multipliers_of(multipliers: Sequence[float]) -> list[float]:
    if isinstance(multipliers, str) or not isinstance(multipliers, Sequence):
        integers("multipliers", multipliers, 1)
    values = [checks.number(f"multipliers[{i}]", m, 0, above=True) for i, m in enumerate(multipliers)]
    return [int(m) if m == int(m) else m for m in values]


def widths_of(channels: int, multipliers: Sequence[float]) -> list[int]:
    return [round(channels * m) for m in multipliers]


def level_widths(config: dict[str, Any]) -> list[int]:
    """The channels of each level, finest first."""
    return widths_of(config["channels"], config["multipliers"])


def check_levels(config: dict[str, Any], other: str = "UNet") -> None:
    """Refuse levels, and a filter between them, that no U-Net of this kind has; `other` is one for any lengths."""
    levels = len(config["multipliers"])
    if not levels:
        raise ConfigError(
            "multipliers must have at least one entry, got (): write (1,) for a network of one resolution"
        )
    if min(widths_of(config["channels"], config["multipliers"])) < 1:
        raise ConfigError(
            f"multipliers must give each level a channel, got {tuple(config['multipliers'])} of {config['channels']} channels: "
            "give more channels"
        )
    if config["attention"] and max(config["attention"]) >= levels:
        raise ConfigError(
            f"attention must hold level indices >= 0 and <= {levels - 1}, got {tuple(config['attention'])}: "
            f"multipliers has {levels} levels and 0 is the finest"
        )
    factor = 2 ** (levels - 1)
    if any(size % factor for size in config["shape"][1:]):
        raise ShapeError(
            f"shape must have axes that are multiples of {factor} with {levels} levels, got {tuple(config['shape'])}: pad the "
            f"samples, give fewer multipliers, or take the {other}, which has no such rule"
        )
    if len(config["taps"]) not in (2, 4) or not sum(config["taps"]):
        raise ConfigError(f"taps must be two or four numbers such as (1, 3, 3, 1), got {tuple(config['taps'])}")


def check_options(config: dict[str, Any], other: str = "UNet") -> None:
    """Refuse options of levels and blocks that do not fit together; `other` is a network for any lengths."""
    check_levels(config, other)
    widths = level_widths(config)
    for level, width in enumerate(widths):
        if config["groups"] and width % config["groups"]:
            raise ConfigError(f"groups must divide every level's channels, got {config['groups']} and {width} channels")
        attends = level in config["attention"] or (level == len(widths) - 1 and config["attention_middle"])
        name = "head_channels" if config["head_channels"] else "heads"
        if attends and width % config[name]:
            raise ConfigError(
                f"{name} must divide the channels of levels with attention, got {config[name]} and {width} channels: give "
                f"{name}= another number, or the network other channels="
            )
    if not config["time"] and (config["num_classes"] is not None or len(config.get("cond_shape", (1, 1))) == 1):
        raise ConfigError(
            "time must be True for a network with labels or conditions that are vectors, which enter with it"
        )


def ddpm(shape: Sequence[int], **changes: Any) -> PaperUNet:
    """Ho et al. 2020, appendix B: 35.7 million parameters on (3, 32, 32). `t` is the step, 0 … T − 1. `changes` of PaperUNet."""
    return PaperUNet(
        shape,
        **{"attention": levels_at(shape, (16,), (1, 2, 2, 2), changes), "time_scale": 1.0, "dropout": 0.1, **changes},
    )


SONG = {"blocks": 4, "attention_up": "last", "resample": "block", "rescale": True, "dropout": 0.1}


def ddpmpp(shape: Sequence[int], **changes: Any) -> PaperUNet:
    """DDPM++ (Song et al. 2021, appendix H): four blocks a level, which also resample, and sums times 1/√2; `blocks=8` is the
    deep one. `t` is 999 times the time. `changes` of PaperUNet."""
    attention = levels_at(shape, (16,), (1, 2, 2, 2), changes)
    return PaperUNet(shape, **{**SONG, "attention": attention, "time_scale": 1.0, **changes})


def ncsnpp(shape: Sequence[int], **changes: Any) -> PaperUNet:
    """NCSN++ (Song et al. 2021, appendix H): DDPM++ with anti-aliased resampling, Fourier features of ln σ, and the sample
    itself, down-sampled, at each level; `blocks=8` is the deep one. `t` is ln σ. `changes` of PaperUNet."""
    options = {"taps": (1, 3, 3, 1), "progressive_in": "residual", "time_embedding": "fourier", "time_scale": 16.0}
    attention = levels_at(shape, (16,), (1, 2, 2, 2), changes)
    return PaperUNet(shape, **{**SONG, **options, "attention": attention, **changes})


def adm(shape: Sequence[int], **changes: Any) -> PaperUNet:
    """ADM (Dhariwal & Nichol 2021, table 4, ImageNet 64): heads of 64 channels at 32, 16 and 8, scale and shift, blocks that
    resample, and a learned variance. `t` is the step, 0 … 999. `changes` of PaperUNet."""
    options = {
        "channels": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "head_channels": 64, "resample": "block", "skip_conv": False,
        "scale_shift": True, "groups": 32, "eps": 1e-5, "time_embedding": "cos_sin", "time_scale": 1.0, "dropout": 0.1,
    }  # fmt: skip
    options |= {"out_channels": 2 * shape[0]}
    attention = levels_at(shape, (32, 16, 8), options["multipliers"], changes)
    return PaperUNet(shape, **{**options, "attention": attention, **changes})


def levels_at(shape: Sequence[int], sizes: Sequence[int], multipliers: Any, changes: dict[str, Any]) -> list[int]:
    """The levels whose longest axis has one of the sizes."""
    levels = range(len(changes.get("multipliers", multipliers)))
    return [level for level in levels if max(image_shape(shape)[1:]) >> level in sizes]
