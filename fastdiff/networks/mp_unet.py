"""The U-Net of EDM2, whose layers keep the magnitudes of activations and weights (Karras et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..errors import ConfigError, choose, names_keywords
from ..execution import cpu, fused
from ..execution.fused import Keeps
from .layers import (
    LARGEST,
    ConditionEmbedding,
    Constrained,
    TimeConditioned,
    TimeEmbedding,
    check_call,
    check_field,
    common_config,
    condition_config,
    image_shape,
    integers,
    label_rows,
)
from .paper_unet import CONVOLVE, Resample, check_levels, levels_at, multipliers_of, widths_of

EPS = 1e-4  # beside root mean squares
SILU = 1 / 0.596  # over the root mean square of silu(z), z ~ N(0, 1) (eq. 81)
ROOT2 = math.sqrt(2)  # over that of a cosine
SIZES = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}  # channels
MULTIPLIERS = (1, 2, 3, 4)


class MPUNet(TimeConditioned):
    """The magnitude-preserving U-Net: `x` [B, C, *spatial], `t` [B] to [B, out_channels, *spatial].

    Karras et al. 2024 (EDM2), configuration G, appendix B and figure 21. Every layer is `y = (w / rms(w)) x / √n`, of n inputs
    for each output, without a bias, and no layer normalises groups of channels: where the numbers of x have a mean square of 1
    and are uncorrelated, so are those of y. The same holds of

        mp_silu(x)   = silu(x) / 0.596                                                    (eq. 81)
        mp_sum(a, b) = ((1 − s) a + s b) / √((1 − s)² + s²)                               (eq. 88)
        mp_cat(a, b) = √((N_a + N_b) / ((1 − s)² + s²)) [(1 − s) a / √N_a, s b / √N_b]    (eq. 103)

    with s a share below. A one stands beside the sample's channels in the place of biases. Level `l` has
    `channels * multipliers[l]` channels: `blocks` blocks on the way down, and `blocks + 1` on the way up, each joined by
    concatenation to an output of the way down; between levels, and twice at the coarsest, one more block. `edm2` has the paper's
    sizes.

    It is the F of EDM's preconditioning: ScoreModel(net, fastdiff.EDM(sigma_data=0.5), "edm") makes c_in, c_skip and c_out, and
    gives c_noise = ln(σ)/4 as `t`. The log variance u(σ) of the paper's loss (eq. 21) belongs to the training, weight="learned".

    The result does not depend on the magnitudes of the weights (but for an ε of 1e-4 beside them), which grow in a training, and
    slow it. The paper brings them back to 1 before each step (eq. 66), within the forward pass. Here a forward changes no
    weights: fastdiff.train brings them back before its steps, and for any other training `normalize` does.

    shape             one sample's shape, (C, *spatial), with one to three spatial axes, multiples of 2^(levels − 1)
    attention         the levels (0 is the finest) whose blocks end in self-attention, as does the first one on the way up, in
                      heads of at least `head_channels` channels; queries, keys and values have unit magnitude
    taps              the filter of resampling, (1, 1) or (1, 3, 3, 1), as of PaperUNet
    residual_share    s of a block's sum with what it adds
    attention_share   s of the sum with self-attention
    label_share       s of the sums of the time's embedding with the label's, and with a vector condition's
    skip_share        s of the concatenation with an output of the way down
    clip              the largest magnitude of a block's outputs; None for no limit
    num_classes       labels `y` [B] >= 0 and <= num_classes; num_classes means "no label", whose embedding is 0, and so does
                      `y=None` for all samples
    cond_shape        conditions `cond` [B, *cond_shape]: (n,), vectors, by two layers into the embedding, or (C', *spatial),
                      fields, which are further channels of the input (of fewer places: interpolated linearly); NaN in all
                      numbers of a sample, and None, mean "no condition", for which a vector, or one number for each channel, is
                      learned
    time_embedding    "fourier_phases" (the paper's), "fourier", "sinusoidal" or "cos_sin" (see TimeEmbedding), `time_channels`
                      features (default `channels`) and `time_scale` (the paper's is 1)
    embedding_channels  of the sum of the embeddings, default those of the widest level
    dropout           within blocks, in training
    out_channels      channels of the result, where they are not the sample's (a learned variance: 2 C)
    recompute         blocks keep no activations for the backward pass and are run again in it (Chen et al. 2016)

    The last layer has a learned gain that starts at zero, and with it the network's output; so have the layers by which the
    embedding enters each block. `config` holds the arguments as JSON has them.
    """

    @names_keywords
    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 192,
        multipliers: Sequence[float] = MULTIPLIERS,
        blocks: int = 3,
        attention: Sequence[int] = (2, 3),
        head_channels: int = 64,
        taps: Sequence[int] = (1, 1),
        residual_share: float = 0.3,
        attention_share: float = 0.3,
        label_share: float = 0.5,
        skip_share: float = 0.5,
        clip: float | None = 256.0,
        num_classes: int | None = None,
        time_embedding: str = "fourier_phases",
        time_scale: float | None = None,
        time_channels: int | None = None,
        embedding_channels: int | None = None,
        dropout: float = 0.0,
        out_channels: int | None = None,
        cond_shape: Sequence[int] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.scale_given = time_scale is not None
        self.config = config = {
            "shape": list(image_shape(shape)),
            "channels": checks.integer("channels", channels, 2, LARGEST),
            "multipliers": multipliers_of(multipliers),
            "blocks": checks.integer("blocks", blocks, 1, LARGEST),
            "attention": list(integers("attention", attention, 0)),
            "head_channels": checks.integer("head_channels", head_channels, 1, LARGEST),
            "taps": list(integers("taps", taps, 0)),
            "residual_share": checks.number("residual_share", residual_share, 0, 1),
            "attention_share": checks.number("attention_share", attention_share, 0, 1),
            "label_share": checks.number("label_share", label_share, 0, 1),
            "skip_share": checks.number("skip_share", skip_share, 0, 1),
            "clip": None if clip is None else checks.number("clip", clip, 0, above=True),
            "recompute": bool(recompute),
            **common_config(num_classes, time_embedding, time_scale, dropout, out_channels),
            **condition_config(cond_shape),
        }
        check_levels(config)
        widths = widths_of(channels, config["multipliers"])
        config["time_channels"] = checks.integer("time_channels", time_channels or channels, 2, LARGEST)
        config["embedding_channels"] = checks.integer(
            "embedding_channels", embedding_channels or max(widths), 1, LARGEST
        )
        _check_heads(config, widths)
        self.shape, self.num_classes = tuple(config["shape"]), config["num_classes"]
        self.cond_shape = None if cond_shape is None else tuple(config["cond_shape"])
        self.takes_vector = self.cond_shape is not None and len(self.cond_shape) == 1
        rank, width = len(self.shape) - 1, config["embedding_channels"]
        self.conditioning = MPConditioning(  # type: ignore[assignment]
            width,
            self.num_classes,
            time_embedding,
            config["time_scale"],
            config["time_channels"],
            config["label_share"],
        )
        self.condition: ConditionEmbedding | None = None
        fields = 0
        if self.cond_shape is not None and self.takes_vector:
            self.condition = ConditionEmbedding(VectorEmbedding(self.cond_shape[0], width), [width])
        elif self.cond_shape is not None:
            check_field(self.cond_shape, self.shape)
            fields = self.cond_shape[0]
            self.condition = ConditionEmbedding(nn.Identity(), [fields, *[1] * rank], self.shape[1:])
        self.enter = MPLayer(self.shape[0] + 1 + fields, widths[0], rank, 3)
        self._build(widths, rank)
        self.out = MPLayer(widths[0], config["out_channels"] or self.shape[0], rank, 3, gain=None)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.widths = [block.width for block in (*self.down, *self.up)]
        self.modulation = MPLayer(width, sum(self.widths), gain=None)
        self.gains = nn.Parameter(torch.zeros(len(self.widths)))  # of each block's rows of the modulation

    def _build(self, widths: list[int], rank: int) -> None:
        """The blocks at levels of `widths` channels, finest first, in the order in which they run."""
        config, last = self.config, len(widths) - 1
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        inputs, skips = widths[0], [widths[0]]
        for level, width in enumerate(widths):
            attends = level in config["attention"]
            if level:
                self.down.append(MPBlock(config, rank, inputs, inputs, "down", direction="down"))
                skips.append(inputs)
            for _ in range(config["blocks"]):
                self.down.append(MPBlock(config, rank, inputs, width, "down", attends))
                inputs = width
                skips.append(inputs)
        for level, width in reversed(list(enumerate(widths))):
            attends = level in config["attention"]
            if level == last:
                self.up.extend(MPBlock(config, rank, inputs, inputs, "up", attention) for attention in (True, False))
            else:
                self.up.append(MPBlock(config, rank, inputs, inputs, "up", direction="up"))
            for _ in range(config["blocks"] + 1):
                self.up.append(MPBlock(config, rank, inputs, width, "up", attends, skip=skips.pop()))
                inputs = width

    def _is_new(self) -> bool:
        return super()._is_new() or not bool(self.out_gain.any())

    def normalize(self) -> None:
        """The weights of each output of each layer to a mean square of 1 (eq. 66), which leaves every result as it is: for
        trainings other than fastdiff.train, before each step."""
        for module in self.modules():
            if isinstance(module, Constrained):
                module.constrain(module.weight)

    def time_features(self, t: Tensor) -> Tensor:
        hidden = self.conditioning.of_time(t)
        return hidden if self.num_classes is not None or self.takes_vector else self._modulations(hidden)

    def _modulations(self, hidden: Tensor) -> Tensor:
        # one product for all blocks, instead of a small one in each block
        gains = torch.cat([gain.expand(width) for gain, width in zip(self.gains.unbind(), self.widths)])
        return self.modulation(F.silu(hidden), SILU * gains[:, None]) + 1  # type: ignore[no-any-return]

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, features: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        check_call(self, x, t, y, cond)
        if features is None or self.num_classes is not None or self.takes_vector:
            hidden = self.conditioning(t, y, features)
            if self.takes_vector:
                hidden = mp_sum(hidden, self.condition(cond), self.config["label_share"])  # type: ignore[misc]
            features = self._modulations(hidden)
        told = iter(features.split(self.widths, dim=1))
        channels = [x, torch.ones_like(x[:, :1])]
        if self.condition is not None and not self.takes_vector:
            channels.append(self.condition(cond).expand(len(x), -1, *x.shape[2:]))
        h = self.enter(torch.cat(channels, dim=1))
        skips = [h]
        for block in self.down:
            h = self._run(block, h, told)
            skips.append(h)
        for block in self.up:
            if block.joins:
                h = mp_cat(h, skips.pop(), self.config["skip_share"])
            h = self._run(block, h, told)
        return self.out(h, self.out_gain)  # type: ignore[no-any-return]

    def _run(self, block: nn.Module, h: Tensor, told: Iterator[Tensor]) -> Tensor:
        if self.config["recompute"] and torch.is_grad_enabled():
            return checkpoint(block, h, next(told), use_reentrant=False)  # type: ignore[no-any-return]
        return block(h, next(told))  # type: ignore[no-any-return]


class MPLayer(Constrained):
    """`y = gain (w / rms(w)) x / √n`: [B, inputs, *] to [B, outputs, *], a convolution of `kernel` along `rank` axes, or of none
    a matrix, where `rms(w)` is of the n weights of an output (eq. 47).

    The gain is a number, or, with None, a learned one that is given with x: one for all outputs, or for each, [outputs, 1, …].
    Factors of what stands before or behind the layer may be in it, which saves a pass over the activations.
    """

    def __init__(self, inputs: int, outputs: int, rank: int = 0, kernel: int = 1, gain: float | None = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *[kernel] * rank))
        self.root, self.gain = math.sqrt(inputs * kernel**rank), gain

    def scaled(self, gain: float | Tensor) -> Tensor:
        """The weights by which x is multiplied, in float32 or float64."""
        return self.weight * (gain / self._norm(self.weight))

    def constrain(self, weight: Tensor) -> None:
        with torch.no_grad():
            weight.mul_(self.root / self._norm(weight))

    def _norm(self, weight: Tensor) -> Tensor:
        """√n (rms + ε) of each output's."""
        kind = torch.promote_types(weight.dtype, torch.float32)
        axes = tuple(range(1, weight.ndim))
        norm: Tensor = torch.linalg.vector_norm(weight, dim=axes, keepdim=True, dtype=kind)
        return norm + EPS * self.root

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        return self._product(x, self.scaled(self.gain if gain is None else gain).to(x.dtype))  # type: ignore[arg-type]

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if weight.ndim == 2:
            return F.linear(x, weight)
        return CONVOLVE[weight.ndim - 2](x, weight, None, 1, weight.shape[-1] // 2)

    def scaled_once(self) -> type[MPLayer] | None:
        """Its class with weights that are scaled once (see optimize); of a class of one's own there is none."""
        return ScaledOnce if type(self) is MPLayer and self.gain is not None else None


class ScaledOnce(Keeps, MPLayer):
    """An MPLayer for inference on a CPU, whose weights are scaled once, and again where they changed; else as its class."""

    gain: float

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if not self.may_keep():
            return super().forward(x)
        return self._product(x, self.kept(lambda: self.scaled(self.gain).to(x.dtype), (x.dtype, self.gain)))

    def winograd(self) -> type[MPLayer] | None:
        return WinogradMPLayer if type(self) is ScaledOnce and self.weight.shape[2:] == (3, 3) else None


class WinogradMPLayer(ScaledOnce):
    """The same by Winograd's convolution (see WinogradConv2d)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if (
            not fused.fusable(x)
            or x.shape[1] != self.weight.shape[1]
            or not fused.plain(self.weight)
            or not self.may_keep()
        ):
            return super().forward(x)
        weights = self.kept(lambda: cpu.winograd_weights(self.scaled(self.gain)), self.gain)
        return cpu.winograd(x.contiguous(memory_format=torch.channels_last), weights, None, len(self.weight))


class MPLabels(MPLayer):
    """`gain` times the embedding of labels y [B], [B, width], of unit magnitude over all labels; of `classes`, "no label", 0.

    It is an MPLayer's product with √classes times a one in the label's place.
    """

    def __init__(self, classes: int, width: int, gain: float) -> None:
        super().__init__(classes, width, gain=gain)
        self.num_embeddings = classes + 1

    def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
        rows = F.pad(self.scaled(self.gain * self.root).T.to(self.weight.dtype), (0, 0, 0, 1))
        return F.embedding(y, rows)


class MPConditioning(nn.Module):
    """The embedding of the time `t` [B] and the labels `y` [B] in one vector, [B, width]: mp_sum(layer(√2 features(t)), label[y])
    with s = `share`."""

    def __init__(
        self, width: int, num_classes: int | None, kind: str, scale: float, features: int, share: float
    ) -> None:
        super().__init__()
        self.time = TimeEmbedding(features, kind, scale)
        of_time, of_label = shares(share)
        # √2, as the mean square of sines and cosines is ½
        self.layer = MPLayer(features, width, gain=ROOT2 * (1.0 if num_classes is None else of_time))
        self.label = None if num_classes is None else MPLabels(num_classes, width, of_label)

    def of_time(self, t: Tensor) -> Tensor:
        """What depends on the time alone."""
        return self.layer(self.time(t).to(self.layer.weight.dtype))  # type: ignore[no-any-return]

    def forward(self, t: Tensor, y: Tensor | None, features: Tensor | None = None) -> Tensor:
        out = self.of_time(t) if features is None else features
        # "no label" adds 0
        return out if self.label is None or y is None else out + label_rows(self.label, y)  # type: ignore[arg-type]


class VectorEmbedding(nn.Module):
    """Conditions [B, n], and a one for the biases that there are not, by two layers: [B, width]."""

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.first, self.second = MPLayer(numbers + 1, width), MPLayer(width, width, gain=SILU)

    def forward(self, cond: Tensor) -> Tensor:
        h = self.first(F.pad(cond, (0, 1), value=1.0))
        return self.second(F.silu(h))  # type: ignore[no-any-return]


class MPBlock(nn.Module):
    """A residual block, with self-attention behind it: [B, inputs (+ skip), *], [B or 1, width] to [B, outputs, *] (figure 21).

    `mp_sum(x, last(mp_silu(conv(mp_silu(x)) * told)))` of an x that was first resampled, and on the way "down" divided by the
    root mean square of its channels; `told` is of the embedding. Where the channels of inputs and outputs differ, a 1×1
    convolution leads from one to the other: on the way "down" before that division, on the way "up" of the sum's first x.
    """

    def __init__(
        self,
        config: dict[str, Any],
        rank: int,
        inputs: int,
        outputs: int,
        way: str,
        attention: bool = False,
        direction: str | None = None,
        skip: int = 0,
    ) -> None:
        super().__init__()
        self.joins, self.normalizes, self.width, self.clip = bool(skip), way == "down", outputs, config["clip"]
        kept, added = shares(config["residual_share"])
        inputs += skip
        self.resample = None if direction is None else Resample(rank, config["taps"], direction)
        self.skip, self.share = None, kept  # of x in the sum
        if inputs != outputs:
            self.skip = MPLayer(inputs, outputs, rank, 1, gain=1.0 if self.normalizes else kept)
            self.share = kept if self.normalizes else 1.0
        self.conv = MPLayer(outputs if self.normalizes else inputs, outputs, rank, 3, gain=SILU)
        self.dropout = nn.Dropout(config["dropout"]) if config["dropout"] else nn.Identity()
        self.last = MPLayer(outputs, outputs, rank, 3, gain=SILU * added)
        self.attend: nn.Module = nn.Identity()
        if attention:
            self.attend = CosineAttention(outputs, _heads(config, outputs), config["attention_share"])

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        if self.resample is not None:
            x = self.resample(x)
        if self.normalizes:
            x = unit(x if self.skip is None else self.skip(x), 1)
        h = self.conv(F.silu(x))
        h = self.dropout(F.silu(h * told.view(*told.shape, *[1] * (h.ndim - 2))))
        h = self.last(h)
        if not self.normalizes and self.skip is not None:
            x = self.skip(x)
        out: Tensor = self.attend(torch.add(h, x, alpha=self.share))
        return out if self.clip is None else out.clamp(-self.clip, self.clip)


class CosineAttention(nn.Module):
    """`mp_sum(x, project(softmax(q kᵀ / √d) v))` over all positions, [B, C, *] to the same shape, with s = `share`.

    q, k and v of a position, d numbers in each head, are divided by their root mean squares, so that q kᵀ / d is a cosine.
    """

    def __init__(self, channels: int, heads: int, share: float) -> None:
        super().__init__()
        self.heads = heads
        self.share, added = shares(share)
        self.qkv, self.project = MPLayer(channels, 3 * channels), MPLayer(channels, channels, gain=added)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        h = x.flatten(2).transpose(1, 2)  # of one place after the other
        qkv = self.qkv(h).view(batch, h.shape[1], 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = unit(qkv, 4).unbind(0)
        out: Tensor = self.project(fused.attention(q, k, v).transpose(1, 2).flatten(2))
        return torch.add(out.transpose(1, 2).unflatten(2, x.shape[2:]), x, alpha=self.share)


def unit(x: Tensor, axis: int) -> Tensor:
    """x / (rms(x) + ε) along an axis."""
    kind = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=axis, keepdim=True, dtype=kind)
    return x / (norm / math.sqrt(x.shape[axis]) + EPS).to(x.dtype)


def shares(share: float) -> tuple[float, float]:
    """The factors of a and b in mp_sum(a, b)."""
    root = math.hypot(1 - share, share)
    return (1 - share) / root, share / root


def mp_sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """((1 − s) a + s b) / √((1 − s)² + s²) (eq. 88)."""
    of_a, of_b = shares(share)
    return torch.add(a * of_a, b, alpha=of_b)


def mp_cat(a: Tensor, b: Tensor, share: float) -> Tensor:
    """a and b beside each other, with the share of mp_sum whatever their channels (eq. 103)."""
    both = a.shape[1] + b.shape[1]
    of_a, of_b = (factor * math.sqrt(both / part.shape[1]) for factor, part in zip(shares(share), (a, b)))
    return torch.cat([a * of_a, b * of_b], dim=1)


def _heads(config: dict[str, Any], channels: int) -> int:
    return max(1, channels // config["head_channels"])  # type: ignore[no-any-return]


def _check_heads(config: dict[str, Any], widths: list[int]) -> None:
    for level in {*config["attention"], len(widths) - 1}:
        if widths[level] % _heads(config, widths[level]):
            raise ConfigError(
                f"head_channels must give heads of whole channels, got {config['head_channels']} for {widths[level]} channels at "
                f"level {level}, {_heads(config, widths[level])} heads: choose a divisor of {widths[level]}"
            )


def edm2(shape: Sequence[int], size: str = "s", **changes: Any) -> MPUNet:
    """EDM2 (Karras et al. 2024) of the sizes "xs", "s", "m", "l", "xl" and "xxl": attention at 16 and 8, dropout 0.1 from "m" on.
    With num_classes=1000 on (4, 64, 64), latents of ImageNet 512: 125, 280, 498, 777, 1119 and 1523 million parameters. `t` is
    ln(σ)/4. `changes` of MPUNet."""
    channels = SIZES[choose("size", size, SIZES)]
    attention = levels_at(shape, (16, 8), MULTIPLIERS, changes)
    options = {"channels": channels, "attention": attention, "dropout": 0.1 if channels >= SIZES["m"] else 0.0}
    return MPUNet(shape, **{**options, **changes})
