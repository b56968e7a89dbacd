"""What likelihoods and solvers are measured on: a mixture whose score is known, and networks trained for seconds.

Trained, as an adaptive solver's steps are as long as what the network has learnt lets them be. Vectors have the shape
(2, 1, 1), as score_sde_pytorch takes images only.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdiff
from fastdiff.networks import MLP, TimeEmbedding

VECTOR, IMAGE = (2, 1, 1), (1, 28, 28)
# the mixture: eight centres on a circle, each with this standard deviation
ANGLES = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
CENTRES, SPREAD = 0.7 * torch.stack((ANGLES.cos(), ANGLES.sin()), 1), 0.1


def mixture(count: int, seed: int) -> Tensor:
    """Draws of the mixture, [count, 2, 1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 2, generator=generator)
    which = torch.randint(len(CENTRES), (count,), generator=generator)
    return (CENTRES[which].float() + SPREAD * noise).view(-1, *VECTOR)


def exact_eps(x: Tensor, t: Tensor) -> Tensor:
    """E[ε | x] of the mixture under VP, x [B, 2, 1, 1], t [B]."""
    log_alpha = (-0.5 * (9.95 * t + 0.1) * t)[:, None]
    square = -torch.expm1(2 * log_alpha)
    variance = (SPREAD * log_alpha.exp()) ** 2 + square
    apart = x.view(-1, 1, 2) - log_alpha.exp()[..., None] * CENTRES.to(x.dtype)
    weights = torch.softmax(apart.square().sum(2) / (-2 * variance), 1)
    return (square.sqrt() / variance * torch.einsum("bk,bki->bi", weights, apart)).view_as(x)


class Convolutional(nn.Module):
    """Four convolutions, three of them told the time: a user's own network."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        embedding = TimeEmbedding(64, "fourier", 1.0)
        self.time = nn.Sequential(embedding, nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 3 * width))
        self.layers = nn.ModuleList(nn.Conv2d(inputs, width, 3, padding=1) for inputs in (1, width, width))
        self.out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for layer, shift in zip(self.layers, self.time(t)[:, :, None, None].chunk(3, 1)):
            x = F.silu(layer(x) + shift)
        return self.out(x)


def digits() -> Tensor:
    """scikit-learn's digits enlarged to 28×28, dequantised from 256 levels to [-1, 1], in a random order."""
    small = fastdiff.load_data("digits").x.float() / 16
    levels = (255 * F.interpolate(small, IMAGE[1:], mode="bilinear")).round().long()
    order = torch.randperm(len(small), generator=torch.Generator().manual_seed(0))
    return fastdiff.dequantize(levels, (-1, 1)).float()[order]


class Problem(NamedTuple):
    make: Callable[[], nn.Module]  # under VP: it returns ε and is told t
    data: Callable[[], Tensor]
    count: int  # it is asked about so many of the data, and trained on the rest
    steps: int
    batch: int


_MLP = functools.partial(MLP, VECTOR, hidden=128, layers=3)
_DRAWS = functools.partial(mixture, 8192, 0)
# MLP's Fourier features are of scale 16 by default, and then rough in t
PROBLEMS = {
    "MLP 256x2, time scale 16": Problem(functools.partial(_MLP, time_scale=16.0), _DRAWS, 256, 2000, 128),
    "MLP 256x2, time scale 1": Problem(functools.partial(_MLP, time_scale=1.0), _DRAWS, 256, 2000, 128),
    "convolutional 16x1x28x28": Problem(Convolutional, digits, 16, 300, 16),
}


@functools.cache
def trained(name: str) -> tuple[nn.Module, Tensor]:
    """The network of a problem and the data that it is asked about."""
    problem = PROBLEMS[name]
    data = problem.data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = problem.make()
    high = max(1.0, float(data.abs().max()))
    model = fastdiff.ScoreModel(net, "vp", data_shape=tuple(data.shape[1:]), data_range=(-high, high))
    how = {"lr": 2e-3, "warmup": 50, "decay": True, "ema": 0.99, "progress": False}
    rest = fastdiff.Data(data[problem.count :], range=(-high, high))
    fastdiff.train(model, rest, steps=problem.steps, batch_size=problem.batch, **how)
    return net.eval().requires_grad_(False), data[: problem.count]


def start_of(x: Tensor) -> Tensor:
    return torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(2))


def distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).square().mean().sqrt())
