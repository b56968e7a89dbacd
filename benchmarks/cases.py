"""What the benchmarks sample: networks from next to nothing to 35 million parameters, each for states of one shape.

A network's meaning is the sampler's: KINDS says what its output and its time are. The analytic networks are exact for data
of N(0, 1); the others have random weights, none of them zero, so that a wrong input or a wrong time shows in the samples.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.networks import MLP, UNet

# process -> what the network returns, and what it is told
KINDS = {"ve": ("score", "sigma"), "vp": ("eps", "t"), "ddpm": ("eps", "index"), "edm": ("x0", "sigma")}
CPU = torch.device("cpu")
CHAIN = 1000  # steps of the chain on which DDIM takes a subset


def betas(steps: int) -> list[float]:
    """A chain of so many steps, as long in all as DDPM's of 1000."""
    return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64).tolist()


class Analytic:
    """The exact answer for data of N(0, 1), one product of the state's size."""

    def __init__(self, kind: str, chain: int, device: torch.device) -> None:
        bars = torch.cumprod(1 - torch.tensor(betas(chain), dtype=torch.float64), 0)
        sigmas = (1 - bars).sqrt().float().to(device)
        self.weight: Callable[[Tensor], Tensor] = {
            "ve": lambda t: -1 / (1 + t * t), "edm": lambda t: 1 / (1 + t * t), "ddpm": lambda t: sigmas[t],
            "vp": lambda t: torch.sqrt(-torch.expm1(-(9.95 * t + 0.1) * t)),
        }[kind]  # fmt: skip

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.weight(t).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


Network = Callable[[str, int, torch.device], Any]  # of (kind, steps of the chain, device)


class Case(NamedTuple):
    batch: int
    shape: tuple[int, ...]  # of vectors (2, 1, 1), as some peers take images only
    steps: int  # of the samplers on a CPU
    network: Network
    # of the same samples, relative: a network of many layers turns a last bit of its input into more
    tolerance: float = 1e-5


# standard deviations of the last layer: as large as leaves the states finite
LAST = {"ve": 1e-3, "vp": 0.03, "ddpm": 0.03, "edm": 0.1}


def _seeded(make: Callable[[], Any], wrap: Callable[[Any], Any] = lambda net: net) -> Network:
    def network(kind: str, chain: int, device: torch.device) -> Any:
        torch.manual_seed(0)
        net = make().to(device).eval().requires_grad_(False)
        for p in net.parameters():
            if p.ndim > 1 and not p.any():  # layers that training would open
                nn.init.normal_(p, std=0.02)
        nn.init.normal_(net.out.weight, std=LAST[kind])
        return wrap(net)

    return network


class Own(nn.Module):
    """A network as any user's: it takes (x, t), and fastdiff knows nothing of its time features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)


_TIME = {"time_embedding": "sinusoidal", "time_scale": 1.0}
_MLP = partial(MLP, (2, 1, 1), hidden=128, layers=3, **_TIME)
_DEMO = partial(UNet, (1, 8, 8), channels=32, multipliers=(1, 2), blocks=1, **_TIME)
_CIFAR = partial(UNet, (3, 32, 32), channels=128, multipliers=(1, 2, 2, 2), blocks=3, attention=(1, 2), **_TIME)
CASES = {
    "analytic 64x3x32x32": Case(64, (3, 32, 32), 50, Analytic),
    "analytic 4096x2": Case(4096, (2, 1, 1), 200, Analytic),
    "analytic 1x3x4x4": Case(1, (3, 4, 4), 200, Analytic),
    "MLP 256x2": Case(256, (2, 1, 1), 200, _seeded(_MLP)),
    "own MLP 256x2": Case(256, (2, 1, 1), 200, _seeded(_MLP, Own)),
    "MLP 4096x2": Case(4096, (2, 1, 1), 50, _seeded(_MLP)),
    # DPM-Solver++ with k-diffusion's float32 logarithms of sigma differs by 1.2e-5 here
    "demo U-Net 16x1x8x8": Case(16, (1, 8, 8), 50, _seeded(_DEMO), 3e-5),
    "U-Net 35.4M 2x3x32x32": Case(2, (3, 32, 32), 10, _seeded(_CIFAR), 2e-4),
}


class Clock:
    """A network, called with the time that it takes added up: the rest of a run is the library's."""

    def __init__(self, net: Any) -> None:
        self.seconds, self.calls = 0.0, 0
        self._forward = net.forward if isinstance(net, nn.Module) else net
        self.net: Any = self
        if isinstance(net, nn.Module):
            # still of its class, and of its signature: fastdiff makes its time features ahead
            forward = wraps(type(net).forward)(lambda _, *args, **kwargs: self(*args, **kwargs))
            own: dict[str, Any] = {"forward": forward}
            if hasattr(net, "time_features"):
                own["time_features"] = type(net).time_features
            net.__class__ = type(type(net).__name__, (type(net),), own)
            self.net = net

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        began = clock()
        out = self._forward(*args, **kwargs)
        self.seconds += clock() - began
        self.calls += 1
        return out


def clock() -> float:
    """One thread: its CPU time, which other processes do not lengthen; more: the clock on the wall."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def ours(kind: str, net: Any, start: Tensor, **options: Any) -> Callable[..., Any]:
    """fastdiff's run from this start; further options can be given at each call."""
    prediction, time_input = KINDS[kind]
    given = {"shape": tuple(start.shape[1:]), "num_samples": len(start), "x_init": start, "device": start.device}
    given |= {"prediction": prediction, "time_input": time_input, "progress": False, **options}
    return lambda **more: fastdiff.sample(net, **{**given, **more})


def noise_from(draws: Iterator[Tensor]) -> Any:
    """A context in which torch.randn and torch.randn_like give these instead."""
    draw = lambda *_, **__: next(draws).clone()  # noqa: E731
    return mock.patch.multiple(torch, randn=draw, randn_like=draw)


class Subject:
    """A case's network of one kind, its start and noise, on either device.

    dtype  of the network; its states are float32
    """

    def __init__(
        self, name: str, kind: str, chain: int = CHAIN, device: torch.device = CPU,
        dtype: torch.dtype = torch.float32, batch: int | None = None,
    ) -> None:  # fmt: skip
        self.case, self.kind, self.chain, self.device, self.dtype = CASES[name], kind, chain, device, dtype
        self.shape = (batch or self.case.batch, *self.case.shape)
        self.normals = next(self.noise(0))
        self.start = self.normals * {"ve": 50.0, "edm": 80.0}.get(kind, 1.0)

    def network(self) -> Any:
        net = self.case.network(self.kind, self.chain, self.device)
        return net.to(self.dtype) if isinstance(net, nn.Module) else net

    def ours(self, net: Any, **options: Any) -> Callable[..., Any]:
        return ours(self.kind, net, self.start, **options)

    def noise(self, seed: int = 1) -> Iterator[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        while True:
            # (torch.randn may stand for this)
            yield torch.empty(self.shape, device=self.device).normal_(generator=generator)

    def distance(
        self, net: Any, options: dict[str, Any], theirs: Callable[[], Tensor], from_prior: bool = False
    ) -> float:
        """How far their samples are from ours for the same noise, at most, relative to the largest number of ours."""
        mine, others = self.noise(), self.noise()
        x = self.ours(net, **options)(noise=lambda row: next(mine))
        with noise_from(itertools.chain([self.normals], others) if from_prior else others):
            y = theirs().view_as(x)
        assert x.dtype == y.dtype
        return float((x - y).abs().max() / x.abs().max())
