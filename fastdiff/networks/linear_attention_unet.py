"""A U-Net with attention at every level, linear in the number of positions where there are many."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..errors import ConfigError, ShapeError, names_keywords, short
from ..execution import fused
from .layers import (
    CONVS,
    FOURIER_SEED,
    LARGEST,
    Conditioning,
    Embedding,
    TimeConditioned,
    TimeEmbedding,
    check_call,
    common_config,
    condition_config,
    image_condition,
    image_shape,
    integers,
    label_rows,
    zeroed,
)
from .paper_unet import Interpolated

DOWN_KERNELS = (2, 4)
FIRST_KERNEL = 7


class LinearAttentionUNet(TimeConditioned):
    """The U-Net of denoising-diffusion-pytorch: `x` [B, C, *spatial], `t` [B] to [B, out_channels, *spatial].

    On the way down level `l` has two residual blocks, attention behind the second, and a convolution to the next level's
    `channels * multipliers[l]` channels, strided on all levels but the last. Below them a block, full attention and a block. On
    the way up each level has the same with nearest interpolation, and its blocks are joined by concatenation to what both blocks
    of the way down returned; the first convolution joins a last block. A block is

        `skip(x) + silu(norm(last(dropout(silu(norm(conv(x)) (1 + γ) + β)))))`,  `norm(x) = g √C x / |x|` over the C channels

    (RMS normalisation, Zhang & Sennrich 2019), where γ and β are linear in the silu of a perceptron of the time's features
    (Dhariwal & Nichol 2021, §3), of one of the label, and of one of the condition. Attention adds to x, with
    q, k, v = W norm(x) of `head_channels` d for each head, and learned keys m and values n (Sukhbaatar et al. 2019),

        full    `project(softmax(q [m, k]ᵀ / √d) [n, v])`  (Vaswani et al. 2017), or
        linear  `norm(project(softmax(q) / √d (softmax([m, k])ᵀ [n, v])))`, the first softmax over channels, the second over
                positions (Shen et al. 2021): its work and memory grow as the number of positions, not as its square.

    The defaults are those of the package's `Unet` in version 2.3.4 (2-D; the same in one and three dimensions).

    shape           one sample's shape, (C, *spatial), with one to three spatial axes, multiples of 2^(levels − 1)
    channels        those that the multipliers multiply; perceptrons are four times as wide
    first_channels  of the first convolution (7 wide) and of the last block, `channels` unless given
    full_attention  the levels (0 is the finest) whose attention is full, the last unless given
    heads           of each attention, and `head_channels` in each of them: one number for all, or one for each level and a last
                    one for the attention below them
    memory          the number of learned keys and values, 0 for none
    down_kernel     of the strided convolutions: 2 (the same as pixel-unshuffle and a 1×1 convolution) or 4
    num_classes     labels `y` [B] >= 0 and <= num_classes; num_classes means "no label", and so does `y=None` for all samples
    cond_shape      conditions `cond` [B, *cond_shape]: (n,), vectors, which enter every block with the time, or (C', *spatial),
                    fields, which are further channels of the input (of fewer places: interpolated linearly); NaN in all
                    numbers of a sample, and None, mean "no condition"
    time_embedding  "sinusoidal" or "cos_sin" of `time_base` (see TimeEmbedding), or "fourier": `[s t, sin(2π W s t),
                    cos(2π W s t)]` with W ~ N(0, 1), which are trained where `learned_frequencies` says so; `time_channels`
                    features (`channels` unless given; 17 for "fourier") with s = `time_scale`
    dropout         in the residual blocks
    out_channels    channels of the result, where they are not the sample's (a learned variance: 2 C)
    recompute       blocks and attention keep no activations for the backward pass and are run again in it (Chen et al. 2016):
                    less memory, more time

    The last convolution starts at zero, unlike the package's, and with it the network's output. `config` holds the arguments as
    JSON has them.
    """

    @names_keywords
    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        first_channels: int | None = None,
        full_attention: Sequence[int] | None = None,
        heads: int | Sequence[int] = 4,
        head_channels: int | Sequence[int] = 32,
        memory: int = 4,
        down_kernel: int = 2,
        num_classes: int | None = None,
        time_embedding: str = "sinusoidal",
        time_scale: float | None = None,
        time_channels: int | None = None,
        time_base: float = 1e4,
        learned_frequencies: bool = False,
        dropout: float = 0.0,
        out_channels: int | None = None,
        cond_shape: Sequence[int] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.scale_given = time_scale is not None
        channels = checks.integer("channels", channels, 2, LARGEST)
        fourier = time_embedding == "fourier"
        features = time_channels if time_channels is not None else 17 if fourier else channels
        multipliers = integers("multipliers", multipliers, 1)
        levels = len(multipliers)
        self.config = config = {
            "shape": list(image_shape(shape)),
            "channels": channels,
            "multipliers": list(multipliers),
            "first_channels": channels
            if first_channels is None
            else checks.integer("first_channels", first_channels, 1, LARGEST),
            "full_attention": [max(levels - 1, 0)]
            if full_attention is None
            else list(integers("full_attention", full_attention, 0)),
            "heads": _numbers("heads", heads, levels),
            "head_channels": _numbers("head_channels", head_channels, levels),
            "memory": checks.integer("memory", memory, 0, LARGEST),
            "down_kernel": checks.integer("down_kernel", down_kernel, 2, 4),
            "time_channels": checks.integer("time_channels", features, 3 if fourier else 2, LARGEST),
            "time_base": checks.number("time_base", time_base, 1, above=True),
            "learned_frequencies": checks.flag("learned_frequencies", learned_frequencies),
            "recompute": checks.flag("recompute", recompute),
            **common_config(num_classes, time_embedding, time_scale, dropout, out_channels),
            **condition_config(cond_shape),
        }
        _check(config)
        self.shape, self.num_classes = tuple(config["shape"]), config["num_classes"]
        self.cond_shape = None if cond_shape is None else tuple(config["cond_shape"])
        self.takes_vector = self.cond_shape is not None and len(self.cond_shape) == 1
        # before the time's frequencies, which stay float32: a network's dtype is that of its first parameter
        self._build([config["first_channels"], *(channels * m for m in config["multipliers"])])
        hidden, self.widths = 4 * channels, [block.width for block in self.blocks()]
        self.conditioning = Conditioning(
            hidden, hidden, None, time_embedding, config["time_scale"], config["time_channels"],
            time=time_module(config), activation=nn.GELU,
        )  # fmt: skip
        self.modulation = nn.Linear(hidden, sum(self.widths))
        if self.num_classes is not None:
            self.label = Embedding(self.num_classes + 1, channels)
            self.label_mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            self.label_modulation = nn.Linear(hidden, sum(self.widths), bias=False)
        self.condition = image_condition(
            self.cond_shape, self.shape, hidden, config["first_channels"], kernel=FIRST_KERNEL
        )
        if self.takes_vector:
            self.condition_modulation = nn.Linear(hidden, sum(self.widths), bias=False)

    def _build(self, widths: list[int]) -> None:
        """The layers; level l leads from widths[l] to widths[l + 1] channels on the way down."""
        config, rank, levels = self.config, len(self.shape) - 1, len(widths) - 1
        conv, dropout, kernel = CONVS[rank], config["dropout"], config["down_kernel"]

        def attention(level: int, width: int) -> Attention:
            heads, wide = (_each(config[name], levels)[level] for name in ("heads", "head_channels"))
            return Attention(
                width, heads, wide, config["memory"], level < levels and level not in config["full_attention"]
            )

        self.enter = conv(self.shape[0], widths[0], FIRST_KERNEL, 1, FIRST_KERNEL // 2)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (width, below) in enumerate(pairwise(widths)):
            strided = level < levels - 1
            leave = conv(width, below, kernel, 2, kernel // 2 - 1) if strided else conv(width, below, 3, 1, 1)
            self.down.append(Level(rank, width, 0, dropout, attention(level, width), leave))
        self.middle = Level(rank, widths[-1], 0, dropout, attention(levels, widths[-1]), nn.Identity())
        for level in reversed(range(levels)):
            above, width = widths[level : level + 2]
            leave = Interpolated(rank, (1, 1), width, above) if level else conv(width, above, 3, 1, 1)
            self.up.append(Level(rank, width, above, dropout, attention(level, width), leave))
        self.last = Block(rank, 2 * widths[0], widths[0], dropout)
        self.out = zeroed(conv(widths[0], config["out_channels"] or self.shape[0], 1))

    def blocks(self) -> Iterator[Block]:
        """The residual blocks, in the order in which they run."""
        for level in (*self.down, self.middle, *self.up):
            yield from (level.first, level.second)
        yield self.last

    def time_features(self, t: Tensor) -> Tensor:
        # one product for all blocks, instead of a small one in each block
        return self.modulation(F.silu(self.conditioning.of_time(t)))  # type: ignore[no-any-return]

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, features: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        check_call(self, x, t, y, cond)
        features = self.time_features(t) if features is None else features
        # a layer on what stands side by side is the sum of one on each; a row for each sample, that None be exactly no label
        if self.num_classes is not None:
            label = self.label_mlp(label_rows(self.label, y).expand(len(x), -1))
            features = features + self.label_modulation(F.silu(label))
        if self.takes_vector:
            features = features + self.condition_modulation(F.silu(self.condition(cond).expand(len(x), -1)))
        told = iter(features.split(self.widths, dim=1))
        h = self.enter(x)
        if self.condition is not None and not self.takes_vector:
            h = h + self.condition(cond)
        skips = [h]
        for level in self.down:
            h = self._run(level.first, h, next(told))
            skips.append(h)
            h = self._run(level.attend, self._run(level.second, h, next(told)))
            skips.append(h)
            h = level.leave(h)
        h = self._run(self.middle.first, h, next(told))
        h = self._run(self.middle.attend, h)
        h = self._run(self.middle.second, h, next(told))
        for level in self.up:
            for part in (level.first, level.second):
                h = self._run(part, torch.cat((h, skips.pop()), dim=1), next(told))
            h = level.leave(self._run(level.attend, h))
        h = self._run(self.last, torch.cat((h, skips.pop()), dim=1), next(told))
        return self.out(h)  # type: ignore[no-any-return]

    def _run(self, part: nn.Module, *args: Tensor) -> Tensor:
        if self.config["recompute"] and torch.is_grad_enabled():
            return checkpoint(part, *args, use_reentrant=False)  # type: ignore[no-any-return]
        return part(*args)  # type: ignore[no-any-return]


class Level(nn.Module):
    """One level on the way down or up: two blocks on `width` channels, joined by `joined` more, attention, and what leads on."""

    def __init__(self, rank: int, width: int, joined: int, dropout: float, attend: nn.Module, leave: nn.Module) -> None:
        super().__init__()
        self.first, self.second = (Block(rank, width + joined, width, dropout) for _ in range(2))
        self.attend, self.leave = attend, leave


class Block(nn.Module):
    """A residual block: [B, inputs, *] and (γ, β) [B or 1, 2 outputs] to [B, outputs, *].

    `skip(x) + silu(norm2(last(dropout(silu(norm(conv(x)) (1 + γ) + β)))))`.
    """

    def __init__(self, rank: int, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        conv = CONVS[rank]
        self.width = 2 * outputs
        self.conv, self.norm = conv(inputs, outputs, 3, 1, 1), RMSNorm(outputs)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.last, self.norm2 = conv(outputs, outputs, 3, 1, 1), RMSNorm(outputs)
        self.skip = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        gain, shift = told.view(*told.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        h = self.dropout(F.silu(self.norm(self.conv(x), gain, shift)))
        return F.silu(self.norm2(self.last(h))) + self.skip(x)  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """`g √C x / |x|` over the C channels at each position, or that times 1 + γ, plus β: [B, C, *] to the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        unit = F.normalize(x, dim=1)
        weight = (self.weight * math.sqrt(len(self.weight))).view(-1, *[1] * (x.ndim - 2))
        return unit * weight if gain is None or shift is None else torch.addcmul(shift, unit, weight * (1 + gain))


class Attention(nn.Module):
    """`x` and attention over all positions of its normalised self and a memory, full or linear: [B, C, *] to the same."""

    def __init__(self, channels: int, heads: int, head_channels: int, memory: int, linear: bool) -> None:
        super().__init__()
        self.heads, self.wide, inner = heads, head_channels, heads * head_channels
        self.norm = RMSNorm(channels)
        self.memory = nn.Parameter(torch.randn(2, heads, memory, head_channels)) if memory else None
        self.qkv = nn.Conv1d(channels, 3 * inner, 1, bias=False)
        self.project = nn.Conv1d(inner, channels, 1)
        self.norm2 = RMSNorm(channels) if linear else None

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        qkv = self.qkv(self.norm(x).flatten(2))
        q, k, v = qkv.view(batch, 3, self.heads, self.wide, qkv.shape[2]).unbind(1)
        if self.memory is not None:
            kept_k, kept_v = self.memory.mT.unsqueeze(1).expand(-1, batch, -1, -1, -1)
            k, v = torch.cat((kept_k, k), dim=3), torch.cat((kept_v, v), dim=3)
        if self.norm2 is None:
            h = fused.attention(q.mT, k.mT, v.mT).mT
        else:  # values × keys first, which is small
            h = v @ k.softmax(3).mT @ (q.softmax(2) / math.sqrt(self.wide))
        h = self.project(h.reshape(batch, self.heads * self.wide, qkv.shape[2]))
        h = h if self.norm2 is None else self.norm2(h)
        return x + h.view(x.shape)  # type: ignore[no-any-return]


class Frequencies(nn.Module):
    """`[s t, sin(2π W s t), cos(2π W s t)]` of times t [B], with s = scale and W ~ N(0, 1), fixed or trained: [B, channels].

    W is drawn from a fixed seed and is in the state dict. An even number of channels ends in a zero. The dtypes are those of
    TimeEmbedding.
    """

    def __init__(self, channels: int, scale: float, learned: bool) -> None:
        super().__init__()
        self.channels, self.scale = channels, scale
        generator = torch.Generator(device="cpu").manual_seed(FOURIER_SEED)
        weight = torch.randn((channels - 1) // 2, generator=generator, dtype=torch.float32, device="cpu")
        weight = weight.to(torch.get_default_device())
        if learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def rescale(self, scale: float) -> None:
        """Become the embedding of another scale."""
        self.scale = scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Frequencies:
        # as in TimeEmbedding: half precision would turn angles by a sizeable part of a radian
        exact = self.weight.detach()
        super()._apply(fn, recurse)
        if self.weight.dtype != exact.dtype:
            self.weight.data = exact.to(self.weight.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32) if t.is_floating_point() else torch.float32) * self.scale
        angle = 2 * math.pi * t[:, None] * self.weight.to(t.dtype)
        features = torch.cat((t[:, None], angle.sin(), angle.cos()), dim=1)
        return F.pad(features, (0, self.channels - features.shape[1]))


def time_module(config: dict[str, Any]) -> TimeEmbedding | Frequencies:
    """The time's features of a configuration."""
    if config["time_embedding"] == "fourier":
        return Frequencies(config["time_channels"], config["time_scale"], config["learned_frequencies"])
    return TimeEmbedding(config["time_channels"], config["time_embedding"], config["time_scale"], config["time_base"])


def _numbers(name: str, value: int | Sequence[int], levels: int) -> int | list[int]:
    """One number for all attention, or one for each level and the last."""
    if not isinstance(value, Sequence):
        return checks.integer(name, value, 1, LARGEST)
    if len(numbers := integers(name, value, 1)) != levels + 1:
        raise ConfigError(
            f"{name} must be one number, or {levels + 1}, one for each of {levels} levels and one for the attention below "
            f"them, got {short(value)}"
        )
    return list(numbers)


def _each(value: int | list[int], levels: int) -> list[int]:
    return [value] * (levels + 1) if isinstance(value, int) else value


def _check(config: dict[str, Any]) -> None:
    levels = len(config["multipliers"])
    if not levels:
        raise ConfigError(
            "multipliers must have at least one entry, got (): write (1,) for a network of one resolution"
        )
    if config["full_attention"] and max(config["full_attention"]) >= levels:
        raise ConfigError(
            f"full_attention must hold level indices >= 0 and <= {levels - 1}, got {tuple(config['full_attention'])}: "
            f"multipliers has {levels} levels and 0 is the finest"
        )
    if config["down_kernel"] not in DOWN_KERNELS:
        raise ConfigError(f"down_kernel must be 2 or 4, got {config['down_kernel']}")
    factor = 2 ** (levels - 1)
    if any(size % factor for size in config["shape"][1:]):
        raise ShapeError(
            f"shape must have axes that are multiples of {factor} with {levels} levels, got {tuple(config['shape'])}: pad the "
            "samples, give fewer multipliers, or take the UNet, which has no such rule"
        )
