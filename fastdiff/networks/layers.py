"""The parts the networks share: time and label conditioning, residual block, self-attention, argument checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..errors import ConfigError, DataError, DeviceError, DTypeError, ShapeError, choose, short, warn
from ..execution import fused, ops

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}  # interpolation along so many axes
# for times that span 1
TIME_SCALES = {"sinusoidal": 1000.0, "cos_sin": 1000.0, "fourier": 16.0, "fourier_phases": 1.0}
STEP_SCALES = {
    "sinusoidal": 1.0,
    "cos_sin": 1.0,
    "fourier": 0.08,
    "fourier_phases": 0.08,
}  # the most for steps that lie 1 apart: neighbours stay alike
FEATURES = 64  # time features: 32 frequencies cover four decades, in networks of any width
FOURIER_SEED = 0x5EED
DRAWN = ("fourier", "fourier_phases")  # kinds whose frequencies are numbers of the state dict
HALF = math.sqrt(0.5)  # keeps the variance of a sum of two
LARGEST = 2**31 - 1  # of any count in a network's configuration


class TimeEmbedding(nn.Module):
    """Features of the time: `t` [B], float or integer, to [B, channels].

    `"sinusoidal"` (Ho et al. 2020; Vaswani et al. 2017): `[sin(ω s t), cos(ω s t)]` with `s = scale` and
    `ω_k = exp(-ln(base) k / (half - 1))`, `k < half = channels // 2`, `base` 1e4. Their steps run over 0..999, so a scale of
    1000 suits a time in [0, 1] and a scale of 1 an integer step.

    `"cos_sin"` (Dhariwal & Nichol 2021; diffusers' default): `[cos(ω s t), sin(ω s t)]` with `ω_k = exp(-ln(base) k / half)`.

    `"fourier"` (Tancik et al. 2020; Song et al. 2021): `[sin(2π W t), cos(2π W t)]` with `W ~ N(0, scale²)`, a buffer
    drawn from a fixed seed and kept in the state dict.

    `"fourier_phases"` (Rahimi & Recht 2007; Karras et al. 2024, eq. 75): `cos(W t + φ)` with `W ~ N(0, (2π scale)²)` and
    `φ ~ U(0, 2π)`, buffers too.

    An odd number of channels ends in a zero. The result is float64 for float64 times and float32 for all others,
    whatever the dtype of the network: an angle of hundreds of radians means nothing in half precision.
    """

    def __init__(self, channels: int, kind: str = "sinusoidal", scale: float | None = None, base: float = 1e4) -> None:
        super().__init__()
        self.channels, self.base = checks.integer("channels", channels, 2, LARGEST), base
        self.kind = choose("kind", kind, TIME_SCALES)
        self.scale = TIME_SCALES[kind] if scale is None else checks.number("scale", scale, 0, above=True)
        if kind in DRAWN:
            for name, value in self._drawn(self.scale).items():
                self.register_buffer(name, value.to(torch.get_default_device()))
        else:
            self.register_buffer("frequencies", self._frequencies(torch.float32), persistent=False)

    def rescale(self, scale: float) -> None:
        """Become the embedding of another scale."""
        self.scale = scale
        if self.kind in DRAWN:
            with torch.inference_mode(False):
                self.weight = self._drawn(scale)["weight"].to(self.weight.device)

    def _drawn(self, scale: float) -> dict[str, Tensor]:
        generator = torch.Generator(device="cpu").manual_seed(FOURIER_SEED)
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
        if self.kind == "fourier":
            return {"weight": torch.randn(self.channels // 2, **options) * scale}
        weight = torch.randn(self.channels, **options) * (2 * math.pi * scale)
        return {"weight": weight, "phases": torch.rand(self.channels, **options) * (2 * math.pi)}

    def _frequencies(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        # with base 1e4, 10^(-4 k / (half - 1)) is Ho et al.'s frequency, in one operation
        half, power = self.channels // 2, -math.log10(self.base)
        last = power * (half - 1) / half if self.kind == "cos_sin" else power
        return torch.logspace(0, last, half, dtype=dtype, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TimeEmbedding:
        # net.half() would round the frequencies, and so turn angles by a sizeable part of a radian: they move, but stay
        # float32.
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in exact.items():
            if self._buffers[name].dtype != value.dtype:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32) if t.is_floating_point() else torch.float32)
        if self.kind == "fourier_phases":
            return torch.addcmul(self.phases.to(t.dtype), t[:, None], self.weight.to(t.dtype)).cos()
        if self.kind == "fourier":
            frequencies, scale = self.weight.to(t.dtype), 2 * math.pi
        elif t.dtype == self.frequencies.dtype:
            frequencies, scale = self.frequencies, self.scale
        else:
            frequencies, scale = self._frequencies(t.dtype, t.device), self.scale
        order = "cos_sin" if self.kind == "cos_sin" else "sin_cos"
        return ops.timestep_embedding(t, frequencies, scale, self.channels, order)


class TimeConditioned(nn.Module):
    """A network with features of the time that depend on nothing else, so that a run computes them once for all its rows.

    `net(x, t, y, features=net.time_features(times)[k : k + 1])` equals `net(x, times[k].expand(B), y)`, without reading
    the values of t. Runs look for the method `time_features`, so a network need not inherit from this class.
    """

    config: dict[str, Any]
    conditioning: Conditioning
    out: nn.Module
    scale_given = True  # whether the time scale was an argument; else the first model made of the network sets it
    scale_set = False

    def time_features(self, t: Tensor) -> Tensor:
        """The features of times t [n], before x or y enters: [n, width]."""
        raise NotImplementedError

    def fit_times(self, steps: tuple[float, float] | None) -> None:
        """Choose the time scale of a new network for a model's times: a chain's, which span steps[0] and whose neighbours lie
        steps[1] apart, or (None) continuous ones, for which it stays. One that was given stays too."""
        if self.scale_given or self.conditioning is None:
            return
        kind = self.config["time_embedding"]
        wanted = TIME_SCALES[kind] if steps is None else min(TIME_SCALES[kind] / steps[0], STEP_SCALES[kind] / steps[1])
        if wanted != self.config["time_scale"] and (self.scale_set or not self._is_new()):
            warn(
                f"the network's time features have the scale {self.config['time_scale']:g}, of its training or of another "
                f"model, and this model's times want {wanted:g}: build a new network, or give it its time_scale"
            )
            return
        self.set_time_scale(wanted)

    def _is_new(self) -> bool:
        """Whether its output is 0, as before a training."""
        weight = self.out.weight
        return weight.is_meta or not bool(weight.any())

    def set_time_scale(self, scale: float) -> None:
        if scale != self.config["time_scale"]:
            self.config["time_scale"] = scale
            self.conditioning.time.rescale(scale)
        self.scale_set = True


def normal_(weight: Tensor, std: float = 1.0) -> None:
    """Draw from N(0, std²), where there is memory: without any torch would import its compiler for it, for seconds."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        normal_(self.weight)


class Constrained(nn.Module):
    """A layer whose weights a training brings back to where they belong before each of its steps (State.constrain)."""

    weight: Tensor

    def constrain(self, weight: Tensor) -> None:
        """Change `weight` in place: the layer's own, or what is trained in its stead, such as some of its outputs."""
        raise NotImplementedError


class Conditioning(nn.Module):
    """The embedding of the time `t` [B] and the labels `y` [B] in one vector, [B, width].

    `MLP(features(t)) + label[y]` with a two-layer SiLU perceptron (Ho et al. 2020; Dhariwal & Nichol 2021, for the
    labels), or `MLP(features(t) + label[y])` (`labels_first`, Karras et al. 2022). Label `num_classes` stands for "no label", so
    one network serves classifier-free guidance. `time` takes the place of the TimeEmbedding of this kind and scale, `activation`
    that of the SiLU.
    """

    def __init__(
        self, width: int, hidden: int, num_classes: int | None, kind: str, scale: float, features: int = FEATURES,
        labels_first: bool = False, time: nn.Module | None = None, activation: type[nn.Module] = nn.SiLU,
    ) -> None:  # fmt: skip
        super().__init__()
        self.time = TimeEmbedding(features, kind, scale) if time is None else time
        self.mlp = nn.Sequential(nn.Linear(features, hidden), activation(), nn.Linear(hidden, width))
        self.labels_first = labels_first and num_classes is not None
        self.label = None if num_classes is None else Embedding(num_classes + 1, features if labels_first else width)

    def of_time(self, t: Tensor) -> Tensor:
        """What depends on the time alone."""
        features = self.time(t).to(self.mlp[0].weight.dtype)
        return features if self.labels_first else self.mlp(features)

    def forward(self, t: Tensor, y: Tensor | None, features: Tensor | None = None) -> Tensor:
        out = self.of_time(t) if features is None else features
        if self.label is not None:
            out = out + label_rows(self.label, y)
        return self.mlp(out) if self.labels_first else out


def label_rows(label: nn.Embedding, y: Tensor | None) -> Tensor:
    """The rows [B, width] of labels y [B], or the last [width], which means "no label", of all samples where y is None."""
    if y is None:
        return label.weight[-1]
    try:
        return label(y.long())  # type: ignore[no-any-return]
    except IndexError as error:  # checked by the look-up itself, on the CPU only, without another read
        last = label.num_embeddings - 1
        raise DataError(
            f"y must hold labels >= 0 and <= {last} ({last} means no label), got values from {int(y.min())} to "
            f"{int(y.max())}: build the network with a larger num_classes, or renumber the labels"
        ) from error


class ConditionEmbedding(nn.Module):
    """`embed(cond)` of conditions [B, *shape], and a learned `null` of its shape for samples without one: those whose numbers
    are all NaN, and all samples where cond is None ([1, *null]). Fields on another grid than `grid` are first interpolated to it,
    linearly along each axis."""

    def __init__(self, embed: nn.Module, null: Sequence[int], grid: Sequence[int] | None = None) -> None:
        super().__init__()
        self.embed, self.grid = embed, grid if grid is None else tuple(grid)
        self.null = nn.Parameter(torch.zeros(tuple(null)))

    def forward(self, cond: Tensor | None) -> Tensor:
        if cond is None:
            return self.null[None]
        none = cond.isnan().flatten(1).all(1)
        # no NaN enters a product, whose gradient would be one
        cond = torch.where(none.view(-1, *[1] * (cond.ndim - 1)), 0, cond)
        if self.grid is not None and cond.shape[2:] != self.grid:
            cond = F.interpolate(cond, self.grid, mode=LINEAR[len(self.grid)])
        embedded = self.embed(cond)
        return torch.where(none.view(-1, *[1] * (embedded.ndim - 1)), self.null, embedded)


def image_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """(C, *spatial) with one to three spatial axes, checked."""
    sizes = integers("shape", shape, 1)
    if not 2 <= len(sizes) <= 4:
        raise ShapeError(
            f"shape must be (C, *spatial) with one to three spatial axes, got {sizes}: write (1, length) for a signal "
            f"of one channel, or use the MLP for vectors"
        )
    return sizes


def image_condition(
    cond_shape: Sequence[int] | None, shape: tuple[int, ...], vector: int, field: int, kernel: int = 3
) -> ConditionEmbedding | None:
    """The embedding of a convolutional network's conditions: of vectors, to `vector` numbers, which join the time's embedding, or
    of fields, interpolated to the sample's own grid, to `field` channels, which are added behind the first convolution (a
    convolution of (x, cond) is the sum of one of each), by a convolution of that kernel."""
    if cond_shape is None:
        return None
    sizes, rank = tuple(cond_shape), len(shape) - 1
    if len(sizes) == 1:
        return vector_condition(sizes[0], vector)
    check_field(sizes, shape)
    embed = CONVS[rank](sizes[0], field, kernel, 1, kernel // 2, bias=False)
    return ConditionEmbedding(embed, [field, *[1] * rank], shape[1:])


def vector_condition(numbers: int, width: int) -> ConditionEmbedding:
    """The embedding of conditions that are vectors, a two-layer SiLU perceptron: [B, numbers] to [B, width]."""
    return ConditionEmbedding(nn.Sequential(nn.Linear(numbers, width), nn.SiLU(), nn.Linear(width, width)), [width])


def check_field(cond_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Refuse conditions that are no field on the sample's own grid or a coarser one."""
    if len(cond_shape) != len(shape) or any(own > most for own, most in zip(cond_shape[1:], shape[1:])):
        raise ShapeError(
            f"cond_shape must be (n,), a vector, or {('C', *shape[1:])}, a field beside the sample {shape}, of as many places or "
            f"fewer, got {cond_shape}: interpolate the field to the sample's grid, or make it flat"
        )


def group_norm(channels: int) -> nn.GroupNorm:
    """Wu & He 2018: the most groups that divide `channels`, of four channels or more each, at most 32."""
    groups = max(g for g in range(1, max(1, min(channels // 4, 32)) + 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return fused.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


class Attention(nn.Module):
    """`(x + project(softmax(q kᵀ / √d) v)) * scale` over all positions, [B, C, *] to the same shape.

    Vaswani et al. 2017, as placed by Ho et al. 2020; heads of at least 64 channels (Dhariwal & Nichol 2021), unless their number
    is given; `scale` 1/√2 (Song et al. 2021).
    """

    def __init__(
        self, channels: int, heads: int | None = None, scale: float = HALF, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        wide = max(h for h in range(1, max(1, channels // 64) + 1) if channels % h == 0)
        self.heads, self.scale = heads or wide, scale
        self.norm = norm or group_norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.project = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        norm = self.norm
        h = fused.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=False)
        h = h.flatten(2).transpose(1, 2)  # of one place after the other, as they lie where channels lie side by side
        qkv = F.linear(h, self.qkv.weight[:, :, 0], self.qkv.bias)
        qkv = qkv.view(batch, h.shape[1], 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
        h = fused.attention(*qkv).transpose(1, 2).flatten(2)
        h = F.linear(h, self.project.weight[:, :, 0], self.project.bias)
        out = x + h.transpose(1, 2).unflatten(2, x.shape[2:])
        return out if self.scale == 1 else out.mul_(self.scale)


class ResidualBlock(nn.Module):
    """`attend((skip(x) + conv(silu(scale * norm(conv(silu(norm(x)))) + shift))) / √2)`: [B, inputs, *], [B, outputs, *].

    BigGAN's block with adaptive group normalisation (Dhariwal & Nichol 2021, §3) and the 1/√2 of Song et al. 2021,
    appendix H. `scale` and `shift` [B, outputs] come from the network, which computes those of all blocks at once.
    """

    def __init__(self, rank: int, inputs: int, outputs: int, dropout: float, attention: bool) -> None:
        super().__init__()
        self.norm = group_norm(inputs)
        self.conv = CONVS[rank](inputs, outputs, 3, padding=1)
        self.groups = group_norm(outputs).num_groups
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.last = zeroed(CONVS[rank](outputs, outputs, 3, padding=1))
        self.skip = nn.Identity() if inputs == outputs else CONVS[rank](inputs, outputs, 1)
        self.attend = Attention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.conv(norm_silu(self.norm, x))
        h = fused.group_norm(h, self.groups, scale, shift, 1e-6)
        return self.attend((self.skip(x) + self.last(self.dropout(h))).mul_(HALF))


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with its parameters at zero, so that the block it ends starts as the identity (and the network as 0)."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def check_call(net: nn.Module, x: Tensor, t: Tensor, y: Tensor | None, cond: Tensor | None) -> None:
    """Refuse arguments of `net(x, t, y, cond=cond)` by type, shape, dtype and device. Reads no values: no synchronisation."""
    for name, value in (("x", x), ("t", t), ("y", y), ("cond", cond)):
        if not isinstance(value, Tensor) and not (name in ("y", "cond") and value is None):
            raise DTypeError(f"{name} must be a tensor, got {type(value).__name__}: use torch.as_tensor({name})")
    if tuple(x.shape[1:]) != net.shape or x.ndim == 0:
        raise ShapeError(
            f"x must have shape [B, {', '.join(map(str, net.shape))}], got {list(x.shape)}: "
            f"build the network with shape={tuple(x.shape[1:])} for samples of this shape"
        )
    if x.dtype != net.out.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        dtype = net.out.weight.dtype
        raise DTypeError(
            f"x must have the network's dtype, {dtype}, got {x.dtype}: use x.to({dtype}) or net.to({x.dtype})"
        )
    if t.dtype == torch.bool or t.is_complex():
        raise DTypeError(f"t must be a float or integer tensor, got {t.dtype}: convert it with t.float()")
    if y is not None and net.num_classes is None:
        raise ConfigError(
            "y must be None for a network without num_classes, got labels: build it with num_classes=, or leave y out"
        )
    if y is not None and (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool):
        raise DTypeError(f"y must be an integer tensor of labels, got {y.dtype}: convert it with y.long()")
    if cond is not None:
        _check_condition(net, x, cond)
    for name, value in (("t", t), ("y", y)):
        if value is not None and value.shape != x.shape[:1]:
            raise ShapeError(
                f"{name} must have shape [{len(x)}], one entry for each sample of x, got {list(value.shape)}: "
                f"{name}.expand({len(x)}) gives one value to all"
            )
        if value is not None and value.device != x.device:
            raise DeviceError(f"{name} must be on x's device, {x.device}, got {value.device}: use {name}.to(x.device)")


def _check_condition(net: nn.Module, x: Tensor, cond: Tensor) -> None:
    if net.cond_shape is None:
        raise ConfigError(
            f"cond must be None for a network without cond_shape, got {list(cond.shape)}: build it with cond_shape="
            f"{tuple(cond.shape[1:])}, or leave cond out"
        )
    if cond.shape != (len(x), *net.cond_shape):
        raise ShapeError(
            f"cond must have shape [{len(x)}, {', '.join(map(str, net.cond_shape))}], got {list(cond.shape)}: "
            f"one for all samples is cond.expand({len(x)}, …)"
        )
    dtype = net.out.weight.dtype
    if cond.dtype != dtype and not (cond.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
        raise DTypeError(f"cond must have the network's dtype, {dtype}, got {cond.dtype}: use cond.to({dtype})")
    if cond.device != x.device:
        raise DeviceError(f"cond must be on x's device, {x.device}, got {cond.device}: use cond.to({x.device})")


def common_config(
    num_classes: int | None, time_embedding: str, time_scale: float | None, dropout: float, out_channels: int | None
) -> dict[str, Any]:
    """The arguments that every network takes, checked."""
    kind = choose("time_embedding", time_embedding, TIME_SCALES)
    return {
        "num_classes": None if num_classes is None else checks.integer("num_classes", num_classes, 1, LARGEST),
        "time_embedding": kind,
        "time_scale": TIME_SCALES[kind]
        if time_scale is None
        else checks.number("time_scale", time_scale, 0, above=True),
        "dropout": checks.number("dropout", dropout, 0, 1, below=True),
        "out_channels": None if out_channels is None else checks.integer("out_channels", out_channels, 1, LARGEST),
    }


def condition_config(cond_shape: Sequence[int] | None) -> dict[str, Any]:
    """The shape of a network's conditions, checked; nothing where it takes none, as in files of earlier versions."""
    if cond_shape is None:
        return {}
    sizes = integers("cond_shape", cond_shape, 1)
    if not sizes:
        raise ConfigError("cond_shape must have at least one axis, got (): write (1,) for one number, or None for none")
    return {"cond_shape": list(sizes)}


def integers(name: str, value: object, low: int) -> tuple[int, ...]:
    """`value` as a tuple of ints of at least `low`, else a ConfigError."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(
            f"{name} must be a tuple of integers, got {short(value)}: for a single one write a tuple of it"
        )
    return tuple(checks.integer(f"{name}[{i}]", entry, low, LARGEST) for i, entry in enumerate(value))
