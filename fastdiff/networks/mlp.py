"""A perceptron for samples of any shape: vectors, tables, toys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..errors import ConfigError, choose, names_keywords
from ..execution.modules import intercepted
from .layers import (
    LARGEST,
    ConditionEmbedding,
    Conditioning,
    TimeConditioned,
    check_call,
    common_config,
    condition_config,
    integers,
    zeroed,
)

COND_MODES = ("film", "concat")


class MLP(TimeConditioned):
    """A perceptron on the flattened sample: `x` [B, *shape], `t` [B] to [B, *shape].

    `h ← dropout(silu(linear(h) + time_i(t)))` at each of `layers` hidden layers, where `time_i` is layer i's part of a
    two-layer perceptron on the time's features (and, with `num_classes`, a vector for the label).

    shape           one sample's shape, any rank from one up
    num_classes     labels `y` [B] >= 0 and <= num_classes; num_classes means "no label", and so does `y=None` for all samples
    cond_shape      conditions `cond` [B, *cond_shape], of any rank from one up and taken flat; NaN in all numbers of a sample
                    means "no condition", for which a vector is learned, and so does `cond=None` for all samples
    cond_mode       "film": a scale and a shift of each layer, (1 + γ_i)(linear(h) + time_i(t)) + β_i, where γ and β are a
                    two-layer perceptron of the condition (FiLM, Perez et al. 2018); "concat": beside x at the first layer,
                    cheaper and slower to learn
    time_embedding  "fourier", "sinusoidal" or "cos_sin" (see TimeEmbedding), `time_scale` 16 or 1000 unless given; a model of a
                    chain chooses one for its steps (`fit_times`)
    out_channels    replaces the leading axis of the result by a multiple of it (a learned variance: 2 * shape[0])

    The last layer starts at zero, and with it the network's output. `config` holds the arguments as JSON has them.
    """

    @names_keywords
    def __init__(
        self,
        shape: Sequence[int],
        *,
        hidden: int = 128,
        layers: int = 3,
        num_classes: int | None = None,
        time_embedding: str = "fourier",
        time_scale: float | None = None,
        dropout: float = 0.0,
        out_channels: int | None = None,
        cond_shape: Sequence[int] | None = None,
        cond_mode: str = "film",
    ) -> None:
        super().__init__()
        self.scale_given = time_scale is not None
        self.shape = integers("shape", shape, 1)
        if not self.shape:
            raise ConfigError("shape must have at least one axis, got (): write (1,) for scalar samples")
        self.config = {
            "shape": list(self.shape),
            "hidden": checks.integer("hidden", hidden, 1, LARGEST),
            "layers": checks.integer("layers", layers, 1, LARGEST),
            **common_config(num_classes, time_embedding, time_scale, dropout, out_channels),
            **condition_config(cond_shape),
        }
        choose("cond_mode", cond_mode, COND_MODES)
        if cond_shape is not None:
            self.config["cond_mode"] = cond_mode
        leading = self.config["out_channels"] or self.shape[0]
        if leading % self.shape[0]:
            raise ConfigError(
                f"out_channels must be None or a multiple of the sample's leading axis, {self.shape[0]}, got {out_channels}"
            )
        self.out_shape = (leading, *self.shape[1:])
        self.num_classes, self.cond_mode = self.config["num_classes"], cond_mode
        self.cond_shape = None if cond_shape is None else tuple(self.config["cond_shape"])
        width, depth, scale = self.config["hidden"], self.config["layers"], self.config["time_scale"]
        # one product gives the time's part of every hidden layer, so it is as wide as all of them together
        self.conditioning = Conditioning(depth * width, width, self.num_classes, time_embedding, scale)
        sizes = [math.prod(self.shape), *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.dropout = nn.Dropout(self.config["dropout"]) if dropout else nn.Identity()
        self.out = zeroed(nn.Linear(width, math.prod(self.out_shape)))
        if self.cond_shape is None:
            return
        numbers = math.prod(self.cond_shape)
        if cond_mode == "concat":  # a product with (x, cond) is the sum of one with each
            self.condition = ConditionEmbedding(nn.Sequential(nn.Flatten(), nn.Linear(numbers, width, False)), [width])
        else:
            layers_of = nn.Flatten(), nn.Linear(numbers, width), nn.SiLU(), nn.Linear(width, 2 * depth * width)
            self.condition = ConditionEmbedding(nn.Sequential(*layers_of), [2 * depth * width])

    def time_features(self, t: Tensor) -> Tensor:
        return self.conditioning.of_time(t)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, features: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        check_call(self, x, t, y, cond)
        h, depth = x.flatten(1), len(self.hidden)
        times = list(self.conditioning(t, y, features).chunk(depth, dim=1))
        film: Sequence[Tensor | None] = [None] * depth
        if self.cond_shape is not None and self.cond_mode == "film":
            film = self.condition(cond).chunk(depth, dim=1)
        elif self.cond_shape is not None:
            times[0] = times[0] + self.condition(cond)
        # the same time, and no label, for all samples
        is_bias = features is not None and len(features) == 1 and y is None
        for layer, (linear, time, scale_shift) in enumerate(zip(self.hidden, times, film)):
            plain = is_bias and (layer > 0 or cond is None) and type(linear) is nn.Linear and not intercepted(linear)
            h = F.linear(h, linear.weight, linear.bias + time[0]) if plain else linear(h) + time
            if scale_shift is not None:
                scale, shift = scale_shift.chunk(2, dim=1)
                h = torch.addcmul(shift, h, 1 + scale)
            h = self.dropout(F.silu(h, inplace=not torch.is_grad_enabled()))
        return self.out(h).view(len(x), *self.out_shape)
