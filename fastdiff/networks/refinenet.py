"""The RefineNets of NCSN and NCSNv2: the noise level enters through the normalisations, or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..errors import ConfigError, DataError, choose, names_keywords
from ..execution import fused
from .layers import CONVS, LARGEST, LINEAR, TimeConditioned, check_call, image_shape, integers
from .paper_unet import POOLS

NORMS = {
    "instance++": ("gain", "mean", "shift"),
    "instance": ("gain", "shift"),
    "variance": ("gain",),
    "affine": ("gain", "shift"),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "relu": F.relu,
    "leaky_relu": functools.partial(F.leaky_relu, negative_slope=0.2),
    "silu": F.silu,
}
MAXIMA: dict[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
POOLING = ("average", "max")
WINDOW = 5  # of the refine blocks' pooling
EPS = 1e-5  # of variances


class RefineNet(TimeConditioned):
    """A RefineNet (Lin et al. 2017) as NCSN and NCSNv2 have it: `x` [B, C, *spatial], `t` [B] to [B, out_channels, *spatial].

    `h_s = stage_s(h_{s−1})` of two residual blocks each, from `h_0 = conv(x)`; then from the last stage S to the first
    `r_s = refine_s(h_s, r_{s+1})`, of h_S alone at first; the result is `conv(f(norm(r_1)))`. Stage s has
    `channels * multipliers[s]` channels. Behind the first, a stage of dilation 1 halves the resolution by means, and one of
    dilation d > 1 keeps it and has dilated convolutions. Convolutions start as PyTorch's do, as in both papers' code. The
    defaults are Song & Ermon 2019, appendix A; see `ncsn` and `ncsnv2`.

    shape        one sample's shape, (C, *spatial), with one to three spatial axes of any lengths
    dilations    one for each of the multipliers
    levels       the number of noise levels: `t` [B] counts them from 0, the largest σ, as NCSN's code does (the model's
                 time_input "index"), and chooses the row of a table with the numbers of every normalisation; floats are
                 rounded. None: the network is told no noise level (Song & Ermon 2020)
    norm         "instance++": γ (n(x) + α m) + β, with n the instance normalisation of each channel, and m the channels'
                 means, standardised over the channels (Song & Ermon 2019, appendix A.1); "instance": γ n(x) + β; "variance":
                 γ x / std(x); "affine": γ x + β
    norm_bias    whether there is β
    refine_norm  whether the convolutions of the refine blocks, and their pooling, have normalisations before them
    pooling      "average" or "max" of windows of 5, in the refine blocks
    activation   f: "elu", "relu", "leaky_relu" (of slope 0.2) or "silu"
    centered     False: of samples in [0, 1] the network sees 2 x − 1
    out_channels channels of the result, where they are not the sample's (a learned variance: 2 C)
    recompute    blocks keep no activations for the backward pass and are run again in it (Chen et al. 2016): less memory,
                 more time

    It takes no labels and no conditions. `config` holds the arguments as JSON has them.
    """

    @names_keywords
    def __init__(
        self,
        shape: Sequence[int],
        *,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 2, 4),
        levels: int | None = 10,
        norm: str = "instance++",
        norm_bias: bool = True,
        refine_norm: bool = True,
        pooling: str = "average",
        activation: str = "elu",
        centered: bool = True,
        out_channels: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        config: dict[str, Any] = {
            "shape": list(image_shape(shape)),
            "channels": checks.integer("channels", channels, 2, LARGEST),
            "multipliers": list(integers("multipliers", multipliers, 1)),
            "dilations": list(integers("dilations", dilations, 1)),
            "levels": None if levels is None else checks.integer("levels", levels, 1, LARGEST),
            "norm": choose("norm", norm, NORMS),
            "norm_bias": checks.flag("norm_bias", norm_bias),
            "refine_norm": checks.flag("refine_norm", refine_norm),
            "pooling": choose("pooling", pooling, POOLING),
            "activation": choose("activation", activation, ACTIVATIONS),
            "centered": checks.flag("centered", centered),
            "out_channels": None if out_channels is None else checks.integer("out_channels", out_channels, 1, LARGEST),
            "recompute": checks.flag("recompute", recompute),
        }
        self.config = config
        if not config["multipliers"]:
            raise ConfigError("multipliers must have at least one entry, got (): write (1,) for a network of one stage")
        if len(config["dilations"]) != len(config["multipliers"]):
            raise ConfigError(
                f"dilations must have one entry for each of the multipliers, {len(config['multipliers'])}, got "
                f"{tuple(config['dilations'])}: write 1 for a stage that halves the resolution"
            )
        self.shape, self.num_classes, self.cond_shape = tuple(config["shape"]), None, None
        rank = len(self.shape) - 1
        widths = [config["channels"] * m for m in config["multipliers"]]
        self.enter = CONVS[rank](self.shape[0], widths[0], 3, 1, 1)
        self.stages = nn.ModuleList()
        for stage, (inputs, outputs) in enumerate(pairwise([widths[0], *widths])):
            dilation = config["dilations"][stage]
            first = Block(config, rank, inputs, outputs, dilation, stage > 0)
            self.stages.append(nn.ModuleList([first, Block(config, rank, outputs, outputs, dilation, False)]))
        self.refine, taken = nn.ModuleList(), widths[-1:]
        for stage, width in reversed(list(enumerate(widths))):
            # those of the stage that the next block takes too; a block of one input keeps its own
            outputs = widths[max(stage - 1, 0)] if len(taken) > 1 else width
            self.refine.append(Refine(config, rank, taken, outputs, stage == 0))
            taken = [widths[max(stage - 1, 0)], outputs]
        self.norm = Norm(config, outputs)
        self.out = CONVS[rank](outputs, config["out_channels"] or self.shape[0], 3, 1, 1)
        self.widths = [sum(widths_of(part)) for part in self.parts()]
        self.table: nn.Embedding = nn.Embedding.from_pretrained(self._numbers(config["levels"] or 1), freeze=False)

    def _numbers(self, rows: int) -> Tensor:
        """The papers' initial numbers of the normalisations, [rows, width]."""
        numbers = torch.empty(rows, sum(self.widths))
        if numbers.is_meta:  # where PyTorch takes seconds over what makes normal numbers
            return numbers
        if self.config["norm"] in ("instance++", "variance"):
            numbers.normal_(1, 0.02)
        else:
            numbers.uniform_()
        norms = list(self.norms())
        for norm, own in zip(norms, numbers.split([norm.width for norm in norms], dim=1)):
            if "shift" in norm.names:
                own[:, -norm.channels :].zero_()
        return numbers

    def parts(self) -> Iterator[nn.Module]:
        """What has normalisations, in the order in which it runs."""
        for stage in self.stages:
            yield from stage  # type: ignore[misc]
        yield from self.refine
        yield self.norm

    def norms(self) -> Iterator[Norm]:
        """The normalisations, in the order of their numbers in the table."""
        for part in self.parts():
            yield from (module for module in part.modules() if isinstance(module, Norm) and module.names)

    @property
    def conditioning(self) -> nn.Embedding | None:  # type: ignore[override]
        """The numbers of every normalisation at each level; None where the network is told no level."""
        return None if self.config["levels"] is None else self.table

    @property
    def default_time_input(self) -> str | None:
        """What a ScoreModel gives the network as the time, unless told: the index of the level."""
        return None if self.config["levels"] is None else "index"

    def time_features(self, t: Tensor) -> Tensor:
        if self.config["levels"] is None:
            return self.table.weight.new_zeros(len(t), 0, device=t.device)
        try:
            return self.table(t.round().long() if t.is_floating_point() else t.long())  # type: ignore[no-any-return]
        except IndexError as error:  # checked by the look-up itself, on the CPU only, without another read
            raise DataError(
                f"t must hold indices of noise levels >= 0 and <= {self.config['levels'] - 1}, got values from "
                f"{float(t.min()):g} to {float(t.max()):g}: give the model time_input='index', or the network more levels="
            ) from error

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, features: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        check_call(self, x, t, y, cond)
        if self.config["levels"] is None:
            features = self.table.weight
        elif features is None:
            features = self.time_features(t)
        told = iter(features.split(self.widths, dim=1))
        h = self.enter(x if self.config["centered"] else 2 * x - 1)
        held = []
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                h = self._run(block, next(told), h)
            held.append(h)
        below: tuple[Tensor, ...] = ()
        for block in self.refine:
            below = (self._run(block, next(told), held.pop(), *below),)
        h = self.norm(*below, next(told))
        return self.out(ACTIVATIONS[self.config["activation"]](h))  # type: ignore[no-any-return]

    def _run(self, part: nn.Module, told: Tensor, *inputs: Tensor) -> Tensor:
        if self.config["recompute"] and torch.is_grad_enabled():
            # nothing here draws a number
            return checkpoint(part, told, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return part(told, *inputs)  # type: ignore[no-any-return]


class Norm(nn.Module):
    """`γ (n(x) + α m) + β`, or another of RefineNet's: [B, C, *] and (γ, α, β) [B or 1, width] to [B, C, *].

    n(x) = (x − μ) / √(v + ε) with the mean μ and the variance v of each channel of each sample, and
    m = (μ − mean(μ)) / √(var(μ) + ε) with the mean and the unbiased variance of a sample's C means. Its numbers are the
    network's, which has those of all normalisations in one table. Without `present` it is the identity.
    """

    def __init__(self, config: dict[str, Any], channels: int, present: bool = True) -> None:
        super().__init__()
        self.channels, self.kind = channels, config["norm"]
        names = NORMS[self.kind] if present else ()
        self.names = [name for name in names if name != "shift" or config["norm_bias"]]
        self.width = channels * len(self.names)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        if not self.names:
            return x
        numbers = dict(zip(self.names, told.expand(len(x), -1).split(self.channels, dim=1)))
        gain = numbers["gain"]
        shift = numbers["shift"] if "shift" in numbers else torch.zeros_like(gain)
        precise = torch.promote_types(x.dtype, torch.float32)
        if "mean" in numbers:
            means, variance = _centred(x.flatten(2).mean(2, dtype=precise))
            shift = shift + gain * numbers["mean"] * (means * (variance + EPS).rsqrt()).to(gain.dtype)
        if self.kind.startswith("instance"):
            return fused.group_norm(x, self.channels, gain, shift, EPS, silu=False)
        if self.kind == "variance":
            variance = _centred(x.flatten(2).to(precise))[1].squeeze(2)
            gain = gain * (variance + EPS).rsqrt().to(gain.dtype)
        ones = [1] * (x.ndim - 2)
        return torch.addcmul(shift.view(*shift.shape, *ones), x, gain.view(*gain.shape, *ones))


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """x less its mean along the last axis, and its unbiased variance there, of a single value 0."""
    x = x - x.mean(-1, keepdim=True)
    return x, x.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)


def _halved(x: Tensor) -> Tensor:
    """Means of two along each axis; the last value of an odd length is a mean by itself."""
    odd = [size % 2 for size in reversed(x.shape[2:])]
    if any(odd):
        x = F.pad(x, [end for extra in odd for end in (0, extra)], mode="replicate")
    return POOLS[x.ndim - 2](x, 2)


def _pooled(x: Tensor, kind: str) -> Tensor:
    """The mean or the maximum of the window around each place, x being 0 or nothing beyond its ends."""
    rank = x.ndim - 2
    if kind == "max":
        return MAXIMA[rank](x, WINDOW, 1, WINDOW // 2)
    if rank == 3:  # whose averages are refused where the window is longer than the axis without its padding
        return POOLS[rank](F.pad(x, [WINDOW // 2] * 6), WINDOW, 1)
    return POOLS[rank](x, WINDOW, 1, WINDOW // 2)


def widths_of(part: nn.Module) -> list[int]:
    """How many numbers each normalisation of a part takes, in the order in which they run."""
    return [module.width for module in part.modules() if isinstance(module, Norm)]


class Block(nn.Module):
    """`skip(x) + last(f(norm2(conv(f(norm(x))))))`: [B, inputs, *] to [B, outputs, *], with `down` and dilation 1 means of
    two along each axis of both, and skip a convolution: of 1 there, else a dilated one of 3 (the identity without `down`)."""

    def __init__(self, config: dict[str, Any], rank: int, inputs: int, outputs: int, dilation: int, down: bool) -> None:
        super().__init__()
        conv = functools.partial(CONVS[rank], kernel_size=3, padding=dilation, dilation=dilation)
        self.norm, self.conv = Norm(config, inputs), conv(inputs, inputs)
        self.norm2, self.last = Norm(config, inputs), conv(inputs, outputs)
        self.halves = halves = down and dilation == 1
        self.skip = CONVS[rank](inputs, outputs, 1) if halves else conv(inputs, outputs) if down else nn.Identity()
        self.act, self.widths = ACTIVATIONS[config["activation"]], widths_of(self)

    def forward(self, told: Tensor, x: Tensor) -> Tensor:
        first, second = told.split(self.widths, dim=1)
        h = self.conv(self.act(self.norm(x, first)))
        h = self.last(self.act(self.norm2(h, second)))
        if self.halves:  # x before its convolution, of 1, with which means commute
            h, x = _halved(h), _halved(x)
        return self.skip(x) + h  # type: ignore[no-any-return]


class Refine(nn.Module):
    """A refine block: one or two inputs, the first of the result's resolution, to [B, outputs, *] (Lin et al. 2017, §3.2).

    `h = Σ up(conv(norm(adapt(x_i))))` over the inputs, where up is linear interpolation between corners (of one input h =
    adapt(x)); then chained pooling, `h = p = f(h)` and twice `p = conv(pool(norm(p)))`, `h = h + p`; then `output(h)`.
    """

    def __init__(self, config: dict[str, Any], rank: int, inputs: Sequence[int], outputs: int, last: bool) -> None:
        super().__init__()
        conv, normed = CONVS[rank], config["refine_norm"]
        joined = inputs if len(inputs) > 1 else ()
        self.adapt = nn.ModuleList(Residual(config, rank, width, 2) for width in inputs)
        self.fuse_norms = nn.ModuleList(Norm(config, width, normed) for width in joined)
        self.fuse = nn.ModuleList(conv(width, outputs, 3, 1, 1) for width in joined)
        self.pool_norms = nn.ModuleList(Norm(config, outputs, normed) for _ in range(2))
        self.chain = nn.ModuleList(conv(outputs, outputs, 3, 1, 1, bias=False) for _ in range(2))
        self.output = Residual(config, rank, outputs, 3 if last else 1)
        self.act, self.pooling = ACTIVATIONS[config["activation"]], config["pooling"]
        self.mode, self.widths = LINEAR[rank], widths_of(self)

    def forward(self, told: Tensor, *inputs: Tensor) -> Tensor:
        numbers = iter(told.split(self.widths, dim=1))
        size = inputs[0].shape[2:]
        adapted = [adapt(x, numbers) for adapt, x in zip(self.adapt, inputs)]
        h = adapted[0]
        if self.fuse:
            parts = [conv(norm(x, next(numbers))) for conv, norm, x in zip(self.fuse, self.fuse_norms, adapted)]
            h = functools.reduce(torch.add, [self._resized(part, size) for part in parts])
        h = path = self.act(h)
        for conv, norm in zip(self.chain, self.pool_norms):
            path = conv(_pooled(norm(path, next(numbers)), self.pooling))
            h = h + path
        return self.output(h, numbers)  # type: ignore[no-any-return]

    def _resized(self, x: Tensor, size: torch.Size) -> Tensor:
        return x if x.shape[2:] == size else F.interpolate(x, size, mode=self.mode, align_corners=True)


class Residual(nn.Module):
    """`x + conv(f(norm(conv(f(norm(x))))))`, `blocks` times, of convolutions without biases: [B, C, *] to the same shape."""

    def __init__(self, config: dict[str, Any], rank: int, channels: int, blocks: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(Norm(config, channels, config["refine_norm"]) for _ in range(2 * blocks))
        self.convs = nn.ModuleList(CONVS[rank](channels, channels, 3, 1, 1, bias=False) for _ in range(2 * blocks))
        self.act = ACTIVATIONS[config["activation"]]

    def forward(self, x: Tensor, numbers: Iterator[Tensor]) -> Tensor:
        h = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            h = conv(self.act(norm(h, next(numbers))))
            if i % 2:
                h = x = x + h
        return h


def ncsn(shape: Sequence[int], levels: int = 10, **changes: Any) -> RefineNet:
    """Song & Ermon 2019, appendix A: 30.1 million parameters on (3, 32, 32); on MNIST channels=64, 7.6 million. `t` is the index
    of the noise level, 0 … levels − 1, from the largest. `changes` of RefineNet."""
    return RefineNet(shape, levels=levels, **changes)


def ncsnv2(shape: Sequence[int], **changes: Any) -> RefineNet:
    """Song & Ermon 2020, appendix B: told no noise level, no normalisations in the refine blocks, and maxima there. 29.7 million
    parameters below 96 pixels; a stage more from there, 83.4 million, and another above 128, 94.1 million. Its output is σ times
    the score: prediction="scaled_score". `changes` of RefineNet."""
    size = max(image_shape(shape)[1:])
    stages: dict[str, Any] = {}
    if size > 128:
        stages = {"multipliers": (1, 2, 2, 2, 4, 4), "dilations": (1, 1, 1, 1, 2, 4)}
    elif size >= 96:
        stages = {"multipliers": (1, 2, 2, 4, 4), "dilations": (1, 1, 1, 2, 4)}
    return RefineNet(shape, **{"levels": None, "refine_norm": False, "pooling": "max", **stages, **changes})
