"""The U-Net of Ho et al. 2020, for samples of one, two or three spatial axes of any lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..errors import ConfigError, names_keywords
from .layers import (
    CONVS,
    LARGEST,
    Conditioning,
    ResidualBlock,
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


class UNet(TimeConditioned):
    """A convolutional network of the sample's own shape: `x` [B, C, *spatial], `t` [B] to [B, out_channels, *spatial].

    Ho et al. 2020, appendix B, with BigGAN's residual blocks (Song et al. 2021; Dhariwal & Nichol 2021, §3): level `l`
    has `channels * multipliers[l]` channels, `blocks` residual blocks on the way down and as many on the way up, each
    joined to its mirror by concatenation. A strided convolution leads down and nearest interpolation up, to the exact
    lengths of the way down, so that any lengths work: rectangular, odd, one. The coarsest level loses no
    resolution, so its `2 * blocks` blocks follow one another without joins. On a CPU, widths that are multiples of 16 suit
    the convolutions best.

    shape           one sample's shape, (C, *spatial), with one to three spatial axes
    attention       the levels (0 is the finest) whose blocks end in self-attention
    num_classes     labels `y` [B] >= 0 and <= num_classes; num_classes means "no label", and so does `y=None` for all samples
    cond_shape      conditions `cond` [B, *cond_shape]: (n,), vectors, which enter every block's scale and shift with the time and
                    the label (FiLM, Perez et al. 2018), or (C', *spatial), fields, which are further channels of the input (of
                    fewer places: interpolated linearly); NaN in all numbers of a sample means "no condition", which is learned,
                    and so does `cond=None` for all samples
    time_embedding  "sinusoidal", "cos_sin" or "fourier" (see TimeEmbedding), `time_scale` 1000 or 16 unless given; a model of a
                    chain chooses one for its steps (`fit_times`)
    out_channels    channels of the result, where they are not the sample's (a learned variance: 2 C)

    The last convolution starts at zero, and with it the network's output. `config` holds the arguments as JSON has them.
    """

    @names_keywords
    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        num_classes: int | None = None,
        time_embedding: str = "sinusoidal",
        time_scale: float | None = None,
        dropout: float = 0.0,
        out_channels: int | None = None,
        cond_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.scale_given = time_scale is not None
        self.config = config = {
            "shape": list(image_shape(shape)),
            "channels": checks.integer("channels", channels, 2, LARGEST),
            "multipliers": list(integers("multipliers", multipliers, 1)),
            "blocks": checks.integer("blocks", blocks, 1, LARGEST),
            "attention": list(integers("attention", attention, 0)),
            **common_config(num_classes, time_embedding, time_scale, dropout, out_channels),
            **condition_config(cond_shape),
        }
        _check_levels(config["multipliers"], config["attention"])
        self.shape, self.num_classes = tuple(config["shape"]), config["num_classes"]
        self.cond_shape = None if cond_shape is None else tuple(config["cond_shape"])
        self.takes_vector = self.cond_shape is not None and len(self.cond_shape) == 1
        hidden = 2 * config["channels"]
        self.conditioning = Conditioning(hidden, hidden, self.num_classes, time_embedding, config["time_scale"])
        self._build([config["channels"] * m for m in config["multipliers"]])
        self.widths = [block.last.out_channels for block in self.modules() if isinstance(block, ResidualBlock)]
        self.modulation = nn.Linear(hidden, 2 * sum(self.widths))
        self.condition = image_condition(
            self.cond_shape, self.shape, hidden, config["channels"] * config["multipliers"][0]
        )

    def _build(self, widths: list[int]) -> None:
        """The layers at levels of `widths` channels, finest first. Each list opens with what leads to its level."""
        config, rank, last = self.config, len(self.shape) - 1, len(widths) - 1
        conv = CONVS[rank]

        def blocks(level: int, count: int, inputs: int) -> list[ResidualBlock]:
            arguments = rank, inputs, widths[level], config["dropout"], level in config["attention"]
            return [ResidualBlock(*arguments) for _ in range(count)]

        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            enter = conv(widths[level - 1], width, 3, 2, 1) if level else conv(self.shape[0], width, 3, 1, 1)
            count = config["blocks"] if level < last else 2 * config["blocks"]
            self.down.append(nn.ModuleList([enter, *blocks(level, count, width)]))
        self.up = nn.ModuleList()
        for level in reversed(range(last)):
            below, width = widths[level + 1], widths[level]
            enter = nn.Identity() if below == width else conv(below, width, 1)
            self.up.append(nn.ModuleList([enter, *blocks(level, config["blocks"], 2 * width)]))
        self.norm = group_norm(widths[0])
        self.out = zeroed(conv(widths[0], config["out_channels"] or self.shape[0], 3, 1, 1))

    def time_features(self, t: Tensor) -> Tensor:
        hidden = self.conditioning.of_time(t)
        return hidden if self.num_classes is not None or self.takes_vector else self._modulations(hidden)

    def _modulations(self, hidden: Tensor) -> Tensor:
        # one product for the scales and shifts of all blocks, instead of a small one in each block
        return self.modulation(F.silu(hidden))  # type: ignore[no-any-return]

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, features: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        check_call(self, x, t, y, cond)
        if features is None or self.num_classes is not None or self.takes_vector:
            hidden = self.conditioning(t, y, features)
            features = self._modulations(hidden + self.condition(cond) if self.takes_vector else hidden)
        scales, shifts = features.expand(len(x), -1).chunk(2, dim=1)
        modulations = zip((1 + scales).split(self.widths, dim=1), shifts.split(self.widths, dim=1))
        h, levels = x, []
        for level, (enter, *blocks) in enumerate(self.down):
            h, skips = enter(h), []
            if level == 0 and self.cond_shape is not None and not self.takes_vector:
                h = h + self.condition(cond)
            for block in blocks:
                h = block(h, *next(modulations))
                skips.append(h)
            levels.append(skips)
        for (enter, *blocks), skips in zip(self.up, reversed(levels[:-1])):
            h = enter(h)  # before the interpolation, with which it commutes: a quarter of the work
            if h.shape[2:] != skips[0].shape[2:]:
                h = F.interpolate(h, size=skips[0].shape[2:], mode="nearest")
            for block in blocks:
                h = block(torch.cat((h, skips.pop()), dim=1), *next(modulations))
        return self.out(norm_silu(self.norm, h))


def _check_levels(multipliers: list[int], attention: list[int]) -> None:
    if not multipliers:
        raise ConfigError(
            "multipliers must have at least one entry, got (): write (1,) for a network of one resolution"
        )
    if attention and max(attention) >= len(multipliers):
        raise ConfigError(
            f"attention must hold level indices >= 0 and <= {len(multipliers) - 1}, got {tuple(attention)}: "
            f"multipliers has {len(multipliers)} levels and 0 is the finest"
        )
