"""Transformers: DiT on patches of images and fields, and a small one on vectors, sets and sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..errors import ConfigError, ShapeError, choose, names_keywords
from ..execution import fused
from .layers import (
    FEATURES,
    LARGEST,
    ConditionEmbedding,
    Conditioning,
    TimeConditioned,
    check_call,
    check_field,
    common_config,
    condition_config,
    image_shape,
    integers,
    normal_,
    vector_condition,
    zeroed,
)

TOKENS = ("set", "sequence")
# layers, hidden size and heads, Peebles & Xie 2023, table 1
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCHES = (2, 4, 8)
PERIOD = 1e4  # of the slowest position's wave over 2π, Vaswani et al. 2017


class TokenNetwork(TimeConditioned):
    """What the transformers share: tokens [B, n, hidden] through adaLN-zero blocks to numbers [B, n, results].

    A subclass says what a sample's tokens are (`_tokens`) and what sample the numbers make (`_sample`). Conditions that are
    vectors join the time; `condition` embeds others as tokens.
    """

    out: nn.Linear

    def __init__(
        self, config: dict[str, Any], numbers: int, results: int, condition: ConditionEmbedding | None
    ) -> None:
        super().__init__()
        hidden, layers, heads = config["hidden"], config["layers"], config["heads"]
        if hidden % heads:
            raise ConfigError(
                f"hidden must be a multiple of heads, {heads}, got {hidden}: give each head 64, for example"
            )
        self.config, self.num_classes = config, config["num_classes"]
        self.shape: tuple[int, ...] = tuple(config["shape"])
        self.cond_shape = tuple(config["cond_shape"]) if "cond_shape" in config else None
        self.takes_vector = self.cond_shape is not None and len(self.cond_shape) == 1
        kind, scale = config["time_embedding"], config["time_scale"]
        self.conditioning = Conditioning(hidden, hidden, self.num_classes, kind, scale, config["time_channels"])
        self.enter = nn.Linear(numbers, hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(layers))
        # the scales of all normalisations, then their shifts, then the gates
        self.parts = (2 * layers + 1, 2 * layers + 1, 2 * layers)
        self.modulation = nn.Linear(hidden, sum(self.parts) * hidden)
        self.out = nn.Linear(hidden, results)
        self.condition = condition
        if self.cond_shape is not None and self.takes_vector:
            self.condition = vector_condition(self.cond_shape[0], hidden)

    def _initialise(self) -> None:
        """Peebles & Xie 2023, §3.2 and their code: uniform of variance 2 / (inputs + outputs), small embeddings, and zeros
        where the modulation and the result are made, so that each block is the identity and the result is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for part in self.conditioning.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                normal_(part.weight, std=0.02)
        zeroed(self.modulation)
        zeroed(self.out)

    def _tokens(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """[B, *shape] to [B, n, hidden]."""
        raise NotImplementedError

    def _sample(self, h: Tensor) -> Tensor:
        """What `out` made of each token, [B, n, results], as a sample."""
        raise NotImplementedError

    def time_features(self, t: Tensor) -> Tensor:
        hidden = self.conditioning.of_time(t)
        return hidden if self.num_classes is not None or self.takes_vector else self._modulations(hidden)

    def _modulations(self, hidden: Tensor) -> Tensor:
        # one product for all blocks, instead of a small one in each block
        return self.modulation(F.silu(hidden))  # type: ignore[no-any-return]

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, features: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        check_call(self, x, t, y, cond)
        if features is None or self.num_classes is not None or self.takes_vector:
            hidden = self.conditioning(t, y, features)
            features = self._modulations(hidden + self.condition(cond) if self.takes_vector else hidden)  # type: ignore[misc]
        told = features.view(len(features), 1, sum(self.parts), self.config["hidden"]).split(self.parts, 2)
        scales, shifts, gates = (1 + told[0]).unbind(2), told[1].unbind(2), told[2].unbind(2)
        h = self._tokens(x, cond)
        for block, i in zip(self.blocks, range(0, len(gates), 2)):
            parts = (*scales[i : i + 2], *shifts[i : i + 2], *gates[i : i + 2])
            if self.config["recompute"] and torch.is_grad_enabled():
                h = checkpoint(block, h, *parts, use_reentrant=False)
            else:
                h = block(h, *parts)
        return self._sample(self.out(modulated(h, scales[-1], shifts[-1], self.config["eps"][0])))


class Block(nn.Module):
    """A transformer block with adaLN-zero (Peebles & Xie 2023, §3.2), [B, n, hidden] to [B, n, hidden]:

    `h ← h + gate₁ · attention(norm(h) scale₁ + shift₁)`, `h ← h + gate₂ · last(gelu(wide(norm(h) scale₂ + shift₂)))`

    with attention over all n tokens in `heads` heads (Vaswani et al. 2017), GELU by its tanh approximation, and scales, shifts
    and gates [B or 1, 1, hidden] of time and label, which the network makes for all blocks at once.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        hidden, self.heads, self.eps = config["hidden"], config["heads"], config["eps"]
        inner = round(hidden * config["mlp_ratio"])
        self.qkv, self.project = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.wide, self.last = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.dropout = nn.Dropout(config["dropout"]) if config["dropout"] else nn.Identity()

    def forward(
        self, h: Tensor, scale1: Tensor, scale2: Tensor, shift1: Tensor, shift2: Tensor, gate1: Tensor, gate2: Tensor
    ) -> Tensor:
        attended = self.attend(modulated(h, scale1, shift1, self.eps[0]))
        h = torch.addcmul(h, gate1, self.dropout(attended))
        wide = F.gelu(self.wide(modulated(h, scale2, shift2, self.eps[1])), approximate="tanh")
        return torch.addcmul(h, gate2, self.dropout(self.last(wide)))

    def attend(self, h: Tensor) -> Tensor:
        batch, n, hidden = h.shape
        q, k, v = self.qkv(h).view(batch, n, 3, self.heads, hidden // self.heads).transpose(1, 3).unbind(2)
        # heads before tokens, as views whose numbers of one token and head lie together: fused attention takes no others
        mixed = fused.attention(q, k, v)
        return self.project(mixed.transpose(1, 2).reshape(batch, n, hidden))  # type: ignore[no-any-return]


def modulated(h: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`norm(h) * scale + shift`, norm over each token's numbers (Ba et al. 2016): h [B, n, d], the others [B or 1, 1, d]."""
    if len(scale) == 1:  # for all samples the same: in the normalisation's own pass
        return F.layer_norm(h, h.shape[-1:], scale.flatten().to(h.dtype), shift.flatten().to(h.dtype), eps)
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=eps), scale)


class PatchEmbedding(nn.Linear):
    """A product with the patches of a field [B, C, *spatial], [B, n, width]."""

    def __init__(self, patch: Sequence[int], numbers: int, width: int) -> None:
        super().__init__(numbers, width, bias=False)
        self.patch = tuple(patch)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(patches(x, self.patch))


class DiT(TokenNetwork):
    """A transformer on patches (Peebles & Xie 2023): `x` [B, C, *spatial], `t` [B] to [B, out_channels, *spatial].

    `h = enter(patches(x)) + position`, `layers` blocks (see Block), and `patches⁻¹(out(norm(h) scale + shift))`: a token for each
    patch, row by row, of which `position` is fixed: sines and cosines of its coordinates. All scales, shifts and gates are one
    product `modulation(silu(c))` of the embedding c of time, label and condition, c = MLP(features(t)) + label[y] + MLP(cond).
    `dit` has the paper's sizes.

    shape           one sample's shape, (C, *spatial), with one to three spatial axes, multiples of the patch
    patch           the patch's length along every axis, or a length for each
    hidden          numbers of a token; a multiple of `heads`. Its perceptron has `round(mlp_ratio * hidden)`
    layers, heads   blocks, and heads of their attention
    eps             added to the variance in the normalisations before attention (and in the last one), and before the perceptrons
    num_classes     labels `y` [B] >= 0 and <= num_classes; num_classes means "no label", and so does `y=None` for all samples
    cond_shape      conditions `cond` [B, *cond_shape]: (k,), vectors, added to the time's embedding, or (C', *spatial), fields,
                    which are further channels of the input (of fewer places: interpolated linearly); NaN in all numbers of a
                    sample, and None, mean "no condition"
    time_embedding  "cos_sin", "sinusoidal" or "fourier" (see TimeEmbedding) with `time_channels` features and `time_scale`, 1000
                    or 16 unless given; a model of a chain chooses one for its steps (`fit_times`)
    dropout         of what attention and perceptrons add
    out_channels    channels of the result, where they are not the sample's (a learned variance: 2 C)
    recompute       blocks keep no activations for the backward pass and are run again in it (Chen et al. 2016): less memory,
                    more time

    The modulation and the last layer start at zero, and with them the network's output. `position` is a buffer of the state dict
    and no parameter. `config` holds the arguments as JSON has them.
    """

    @names_keywords
    def __init__(
        self,
        shape: Sequence[int],
        *,
        patch: int | Sequence[int] = 2,
        hidden: int = 384,
        layers: int = 12,
        heads: int = 6,
        mlp_ratio: float = 4.0,
        eps: Sequence[float] = (1e-6, 1e-6),
        num_classes: int | None = None,
        time_embedding: str = "cos_sin",
        time_scale: float | None = None,
        time_channels: int = 256,
        dropout: float = 0.0,
        out_channels: int | None = None,
        cond_shape: Sequence[int] | None = None,
        recompute: bool = False,
    ) -> None:
        sizes = image_shape(shape)
        steps = _patch(patch, sizes)
        config = {
            "shape": list(sizes),
            "patch": list(steps),
            **_block_config(hidden, layers, heads, mlp_ratio, eps, time_channels, recompute),
            **common_config(num_classes, time_embedding, time_scale, dropout, out_channels),
            **condition_config(cond_shape),
        }
        width, volume = config["hidden"], math.prod(steps)
        if width < 2 * len(steps):
            raise ConfigError(
                f"hidden must be an integer >= {2 * len(steps)}, a sine and a cosine for each axis, got {hidden}"
            )
        condition = None
        if cond_shape is not None and len(cond_shape) > 1:
            check_field(tuple(cond_shape), sizes)
            # a product with the patches of (x, cond) is the sum of one with each
            embed = PatchEmbedding(steps, cond_shape[0] * volume, width)
            condition = ConditionEmbedding(embed, [1, width], sizes[1:])
        super().__init__(config, sizes[0] * volume, (config["out_channels"] or sizes[0]) * volume, condition)
        self.scale_given = time_scale is not None
        self.patch, self.grid = steps, tuple(size // step for size, step in zip(sizes[1:], steps))
        self.register_buffer("position", positions(self.grid, width).to(torch.get_default_dtype()))
        self._initialise()

    def _tokens(self, x: Tensor, cond: Tensor | None) -> Tensor:
        h = self.enter(patches(x, self.patch)) + self.position
        if self.condition is None or self.takes_vector:
            return h  # type: ignore[no-any-return]
        return h + self.condition(cond)  # type: ignore[no-any-return]

    def _sample(self, h: Tensor) -> Tensor:
        return unpatched(h, self.patch, self.grid)


class Transformer(TokenNetwork):
    """A transformer on vectors, sets and sequences: `x` [B, *shape], `t` [B] to [B, *shape].

    A sample [n, d] is n tokens of d numbers: `h = enter(x) (+ position)`, `layers` blocks of attention over all tokens and a
    perceptron of each (see Block, Peebles & Xie 2023), and `out(norm(h) scale + shift)`. A vector [d] is d tokens of one number,
    each with a learned identity (as Gloeckler et al. 2024 make tokens of parameters and data): columns of a table, parameters of
    a posterior. Time, label and condition enter as in DiT.

    shape           one sample's shape, (d,) or (n, *token), at best of numbers of order one
    tokens          "set": a permutation of the tokens permutes the result, and the parameters serve sets of any size; "sequence":
                    each place has learned numbers of its own. Default "sequence" for vectors, else "set"
    hidden          numbers of a token; a multiple of `heads`. Its perceptron has `round(mlp_ratio * hidden)`
    layers, heads   blocks, and heads of their attention
    eps             added to the variance in the normalisations before attention (and in the last one), and before the perceptrons
    num_classes     labels `y` [B] >= 0 and <= num_classes; num_classes means "no label", and so does `y=None` for all samples
    cond_shape      conditions `cond` [B, *cond_shape]: (k,), vectors, added to the time's embedding, or (m, e), sets of m tokens
                    of e numbers, which join the sample's tokens in every block, in whatever order; NaN in all numbers of a
                    sample, and None, mean "no condition"
    time_embedding  "fourier", "sinusoidal" or "cos_sin" (see TimeEmbedding) with `time_channels` features and `time_scale`, 16
                    or 1000 unless given; a model of a chain chooses one for its steps (`fit_times`)
    dropout         of what attention and perceptrons add
    out_channels    replaces the leading axis of the result by a multiple of it (a learned variance: 2 * shape[0])
    recompute       blocks keep no activations for the backward pass and are run again in it (Chen et al. 2016): less memory,
                    more time

    The modulation and the last layer start at zero, and with them the network's output. `config` holds the arguments as JSON has
    them.
    """

    @names_keywords
    def __init__(
        self,
        shape: Sequence[int],
        *,
        tokens: str | None = None,
        hidden: int = 128,
        layers: int = 4,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        eps: Sequence[float] = (1e-6, 1e-6),
        num_classes: int | None = None,
        time_embedding: str = "fourier",
        time_scale: float | None = None,
        time_channels: int = FEATURES,
        dropout: float = 0.0,
        out_channels: int | None = None,
        cond_shape: Sequence[int] | None = None,
        recompute: bool = False,
    ) -> None:
        sizes = integers("shape", shape, 1)
        if not sizes:
            raise ConfigError("shape must have at least one axis, got (): write (1,) for scalar samples")
        tokens = ("sequence" if len(sizes) == 1 else "set") if tokens is None else tokens
        config = {
            "shape": list(sizes),
            "tokens": choose("tokens", tokens, TOKENS),
            **_block_config(hidden, layers, heads, mlp_ratio, eps, time_channels, recompute),
            **common_config(num_classes, time_embedding, time_scale, dropout, out_channels),
            **condition_config(cond_shape),
        }
        leading = config["out_channels"] or sizes[0]
        if leading % sizes[0]:
            raise ConfigError(
                f"out_channels must be None or a multiple of the sample's leading axis, {sizes[0]}, got {out_channels}"
            )
        condition = embed = None
        if cond_shape is not None and len(cond_shape) > 1:
            if len(cond_shape) > 2:
                raise ShapeError(
                    f"cond_shape must be (k,), a vector, or (m, e), a set of m tokens of e numbers, got {tuple(cond_shape)}: "
                    "flatten a token's axes"
                )
            embed = nn.Linear(cond_shape[1], config["hidden"])
            condition = ConditionEmbedding(embed, [1, config["hidden"]])
        times, numbers = leading // sizes[0], math.prod(sizes[1:])
        super().__init__(config, numbers, times * numbers, condition)
        self.scale_given, self.times = time_scale is not None, times
        self._initialise()
        # a token has few numbers, and each token is normalised: without a bias of their own size nothing would be left of a
        # single number but its sign
        self.enter.reset_parameters()
        if condition is not None and embed is not None:
            embed.reset_parameters()
            normal_(condition.null, std=0.5)
        self.register_parameter("position", None)
        if tokens == "sequence":
            self.position = nn.Parameter(torch.empty(sizes[0], config["hidden"]))
            normal_(self.position, std=0.5)

    def _tokens(self, x: Tensor, cond: Tensor | None) -> Tensor:
        h: Tensor = self.enter(x.flatten(2) if x.ndim > 2 else x[..., None])
        if self.position is not None:
            h = h + self.position
        if self.condition is None or self.takes_vector:
            return h
        # joined, rather than attended to by layers of their own: so the blocks are DiT's, and the conditions' tokens attend to
        # each other and to the sample
        known: Tensor = self.condition(cond).expand(len(h), self.cond_shape[0], -1)  # type: ignore[index]
        return torch.cat([h, known], dim=1)

    def _sample(self, h: Tensor) -> Tensor:
        n = self.shape[0]
        out: Tensor = h[:, :n].unflatten(2, (self.times, -1)).transpose(1, 2)
        return out.reshape(len(h), self.times * n, *self.shape[1:])


def patches(x: Tensor, patch: Sequence[int]) -> Tensor:
    """The patches of x [B, C, *spatial], row by row, [B, n, C * volume]; the numbers of each as in x."""
    rank = len(patch)
    for axis, length in enumerate(patch):
        x = x.unflatten(2 * axis + 2, (x.shape[2 * axis + 2] // length, length))
    inside = range(3, 2 * rank + 2, 2)
    return x.permute(0, *range(2, 2 * rank + 2, 2), 1, *inside).flatten(rank + 1).flatten(1, rank)


def unpatched(h: Tensor, patch: Sequence[int], grid: Sequence[int]) -> Tensor:
    """[B, C, *spatial] of its patches [B, n, C * volume], the inverse of `patches`."""
    rank = len(patch)
    h = h.reshape(len(h), *grid, h.shape[2] // math.prod(patch), *patch)
    pairs = (axis for i in range(rank) for axis in (1 + i, rank + 2 + i))
    h = h.permute(0, rank + 1, *pairs)
    return h.reshape(*h.shape[:2], *(count * length for count, length in zip(grid, patch)))


def positions(grid: Sequence[int], hidden: int) -> Tensor:
    """Sines and cosines of the coordinates of a grid's points, row by row, [n, hidden] (Vaswani et al. 2017; Peebles & Xie 2023).

    Of each of the r axes, the last one first, `[sin(ω p), cos(ω p)]` at places p = 0, 1, … with `ω_k = 1e4^(-k / half)`,
    k < half = hidden // (2 r); zeros behind them where hidden is no multiple of 2 r.
    """
    half = hidden // (2 * len(grid))
    frequencies = PERIOD ** (np.arange(half) / -half)  # in numpy: torch's own on the meta device import its compiler
    parts = []
    for axis in reversed(range(len(grid))):
        angles = np.arange(grid[axis])[:, None] * frequencies
        waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)
        waves = waves.reshape(*[-1 if i == axis else 1 for i in range(len(grid))], 2 * half)
        parts.append(np.broadcast_to(waves, (*grid, 2 * half)))
    rest = np.zeros((*grid, hidden - 2 * half * len(grid)))
    made = np.concatenate([*parts, rest], -1).reshape(-1, hidden)
    return torch.from_numpy(made).to(torch.get_default_device())


def _patch(patch: int | Sequence[int], shape: tuple[int, ...]) -> tuple[int, ...]:
    rank = len(shape) - 1
    sizes = integers("patch", patch if isinstance(patch, Sequence) else [patch] * rank, 1)
    if len(sizes) != rank:
        raise ConfigError(
            f"patch must be one length or {rank}, one for each spatial axis of the shape {shape}, got {sizes}"
        )
    if any(size % length for size, length in zip(shape[1:], sizes)):
        raise ShapeError(
            f"shape must have axes that are multiples of the patch, {sizes}, got {shape}: pad the samples, or give another patch"
        )
    return sizes


def _block_config(
    hidden: int, layers: int, heads: int, mlp_ratio: float, eps: Sequence[float], time_channels: int, recompute: bool
) -> dict[str, Any]:
    """The arguments that both transformers take, checked."""
    hidden = checks.integer("hidden", hidden, 1, LARGEST)
    if isinstance(eps, (str, int, float)) or len(eps) != 2:
        raise ConfigError(f"eps must be two numbers, before attention and before the perceptrons, got {eps!r}")
    return {
        "hidden": hidden,
        "layers": checks.integer("layers", layers, 1, LARGEST),
        "heads": checks.integer("heads", heads, 1, LARGEST),
        "mlp_ratio": checks.number("mlp_ratio", mlp_ratio, 1 / hidden, LARGEST // hidden),
        "eps": [checks.number(f"eps[{i}]", value, 0, above=True) for i, value in enumerate(eps)],
        "time_channels": checks.integer("time_channels", time_channels, 2, LARGEST),
        "recompute": checks.flag("recompute", recompute),
    }


def dit(shape: Sequence[int], size: str = "XL/2", **changes: Any) -> DiT:
    """DiT of a size of the paper, "S/8" … "XL/2" (Peebles & Xie 2023, table 1; the number is the patch's length), with a learned
    variance. "XL/2" has 675 million parameters on latents (4, 32, 32) with 1000 classes. `t` is the step, 0 … 999. `changes` of
    DiT."""
    name, _, patch = choose("size", size, [f"{name}/{patch}" for name in SIZES for patch in PATCHES]).partition("/")
    layers, hidden, heads = SIZES[name]
    options = {"patch": int(patch), "layers": layers, "hidden": hidden, "heads": heads, "time_scale": 1.0}
    return DiT(shape, **{**options, "out_channels": 2 * shape[0], **changes})
