"""The times at which a loss is taken.

A process has its own distribution of training times, t(v) with v uniform on [0, 1): uniform on [t_train, T], the steps of a
chain alike, log-normal on EDM's. A rule here chooses v otherwise, with density p(v), and `factor` = 1/p(v) makes up for it, so
that the mean loss is the same integral, estimated with less or more noise. "lognormal" alone is another emphasis.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, choose
from ..planning.processes import Process, require_linear

TRUNCATIONS = ("hard", "soft", "clamp")
TOP = 1 - 2**-24  # the largest float32 below 1


class Drawn(NamedTuple):
    """Times t [B]; 1/p [B] of a rule that makes up for its density, else None; where they stand, v [B]."""

    t: Tensor
    factor: Tensor | None
    v: Tensor

    def of(self, rows: slice) -> Drawn:
        """Those of some of the samples."""
        return Drawn(self.t[rows], None if self.factor is None else self.factor[rows], self.v[rows])

    def to(self, device: torch.device) -> Drawn:
        """On this device."""
        return Drawn(*(None if value is None else value.to(device, non_blocking=True) for value in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Times:
    """A rule."""

    name: ClassVar[str] = ""
    stratified: ClassVar[bool] = True  # one v in each of B equal slices

    def __call__(self, process: Process, u: Tensor, low: float = 0.0) -> Drawn:
        """Times by uniform numbers u [B] in [0, 1), from v = low on."""
        v = u if not low else low + (1 - low) * u
        return Drawn(process.training_times(v.clamp(max=TOP)), None, v)

    def config(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}


class Uniform(Times):
    """Each sample's own, t(u)."""

    name = "uniform"
    stratified = False


class Stratified(Times):
    """One in each of B equal slices of v: uniform for every sample, and a quieter loss (Kingma et al. 2021, §I.1)."""

    name = "stratified"


class _Histogram(Times):
    """A density of v that is constant between edges."""

    def masses(self, process: Process) -> tuple[Tensor, Tensor]:
        """Edges 0 … 1 [n + 1] and the masses between them [n], float64."""
        raise NotImplementedError

    def __call__(self, process: Process, u: Tensor, low: float = 0.0) -> Drawn:
        edges, mass = (value.to(u.device) for value in self.masses(process))
        below = torch.cat([mass.new_zeros(1), (mass / mass.sum()).cumsum(0)])
        below = below / below[-1]
        k = int(torch.searchsorted(edges, low, right=True)) - 1
        start = below[k] + (below[k + 1] - below[k]) * (low - edges[k]) / (edges[k + 1] - edges[k])
        at = (start + (1 - start) * u.double()).clamp(max=1 - 1e-12)
        bin = (torch.searchsorted(below, at, right=True) - 1).clamp(0, len(mass) - 1)
        width, share = edges[bin + 1] - edges[bin], below[bin + 1] - below[bin]
        v = edges[bin] + width * (at - below[bin]) / share
        factor = width / share * (1 - start) / (1 - low)
        return Drawn(process.training_times(v.clamp(max=TOP)).to(u.dtype), factor.to(u.dtype), v.to(u.dtype))


class Importance(_Histogram):
    """p ∝ g²/σ², which is constant in the log-SNR: under the weight "g2" every time counts alike (Song, Durkan, Murray & Ermon
    2021, §5.1). The integral stays what it is."""

    name = "importance"

    def masses(self, process: Process) -> tuple[Tensor, Tensor]:
        require_linear(process, "times='importance'", "use times='stratified'")
        if process.discrete:
            t = torch.arange(1, int(process.T) + 1, dtype=torch.float64)
            edges = torch.linspace(0, 1, len(t) + 1, dtype=torch.float64)
            return edges, (process.diffusion(t) / process.sigma(t)) ** 2
        # fine where v is small, for t may begin at 1e-5, and there g²/σ² goes by 1/t
        edges = torch.cat([torch.linspace(0, 1, 2049), torch.logspace(-8, -0.01, 2048)]).double().unique()
        t = process.training_times(((edges[1:] + edges[:-1]) / 2).clamp(max=TOP))
        return edges, (edges[1:] - edges[:-1]) * (process.diffusion(t) / process.sigma(t)) ** 2


@dataclass(frozen=True)
class LogNormal(Times):
    """ln(σ/α) ~ N(mean, std²), within the process's own ends: EDM's emphasis (Karras et al. 2022, Table 1), not made up for. On a
    chain the nearest step."""

    mean: float = -1.2
    std: float = 1.2
    name: ClassVar[str] = "lognormal"

    def __post_init__(self) -> None:
        checks.number("mean", self.mean)
        checks.number("std", self.std, 0, above=True)

    def __call__(self, process: Process, u: Tensor, low: float = 0.0) -> Drawn:
        require_linear(process, "times='lognormal'", "use times='stratified'")
        level = torch.exp(self.mean + self.std * torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7)))
        first = float(process.training_times(torch.zeros(1, dtype=torch.float64)))
        ends = torch.tensor([first, process.T], dtype=torch.float64, device=u.device)
        lowest, highest = (process.sigma(ends) / process.alpha(ends)).unbind()
        t = process.time(level.clamp(lowest, highest))
        t = (t.round() if process.discrete else t).clamp(*ends.tolist())
        return Drawn(t.to(u.dtype), None, u)


class SecondMoment(_Histogram):
    """p ∝ √E[L²] by the last ten losses of each bin, with a thousandth uniform, once each bin has ten (Nichol & Dhariwal 2021,
    eq. 18): what varies most is asked most. The integral stays what it is. The bins are a chain's steps, or BINS equal ones."""

    name = "second_moment"
    BINS: ClassVar[int] = 64
    MOST: ClassVar[int] = 1000
    HISTORY: ClassVar[int] = 10
    UNIFORM: ClassVar[float] = 0.001

    squares: Tensor  # of the last losses in each bin [n, 10]
    seen: Tensor  # how many each bin had [n]

    def __init__(self, process: Process) -> None:
        count = min(int(process.T), self.MOST) if process.discrete else self.BINS
        object.__setattr__(self, "squares", torch.zeros(count, self.HISTORY, dtype=torch.float64))
        object.__setattr__(self, "seen", torch.zeros(count, dtype=torch.int64))

    def masses(self, process: Process) -> tuple[Tensor, Tensor]:
        count = len(self.seen)
        mass = torch.full((count,), 1 / count, dtype=torch.float64)
        if bool((self.seen >= self.HISTORY).all()):
            root = self.squares.mean(1).sqrt()
            if float(root.sum()) > 0:
                mass = (1 - self.UNIFORM) * root / root.sum() + self.UNIFORM / count
        return torch.linspace(0, 1, count + 1, dtype=torch.float64), mass

    def observe(self, v: Tensor, losses: Tensor) -> None:
        """Keep the losses [B] of times that stand at v [B], without `factor`."""
        bins = (v.double().cpu() * len(self.seen)).long().clamp(0, len(self.seen) - 1)
        for bin, square in zip(bins.tolist(), losses.detach().double().square().cpu().tolist()):
            self.squares[bin, int(self.seen[bin]) % self.HISTORY] = square
            self.seen[bin] += 1


TIMES: dict[str, Any] = {r.name: r for r in (Uniform, Stratified, Importance, LogNormal, SecondMoment)}


def get(times: object, process: Process) -> Times:
    """A rule from its name, or itself."""
    if isinstance(times, Times):
        return times
    rule = TIMES[choose("times", times, TIMES)]
    made: Times = rule(process) if rule is SecondMoment else rule()
    return made


def check(times: Times, truncation: str, process: Process) -> None:
    """ConfigError unless the rule and the truncation suit one another and the process."""
    choose("truncation", truncation, TRUNCATIONS)
    if isinstance(times, (Importance, LogNormal)):
        require_linear(process, f"times={times.name!r}", "use times='stratified'")
    if truncation == "hard":
        return
    if process.discrete or process.t_train <= 0 or not _has_uniform_times(process):
        raise ConfigError(
            f"truncation={truncation!r} is of training times that are uniform from near 0, and those of {process.name!r} are "
            "not: use truncation='hard'"
        )
    if isinstance(times, LogNormal) or (truncation == "clamp" and isinstance(times, _Histogram)):
        raise ConfigError(
            f"truncation={truncation!r} does not go with times={times.name!r}: use times='stratified', or truncation='hard'"
        )


def _has_uniform_times(process: Process) -> bool:
    v = torch.tensor([0.0, 0.5], dtype=torch.float64)
    first, middle = process.training_times(v).tolist()
    return math.isclose(first, process.t_train) and math.isclose(middle, (process.t_train + process.T) / 2)


def draw(times: Times, truncation: str, process: Process, u: Tensor, of_step: float) -> Drawn:
    """Times by uniform numbers u [B] and one more for the step; near t = 0, where the loss has no bound or none of use:

    "hard"   t ≥ t_train, the process's own (Song et al. 2021, §C: ε = 1e-5)
    "soft"   t ≥ τ, another τ in each step, log-uniform on [t_train, T] (Kim et al. 2022, eq. 12 with k = 1)
    "clamp"  t uniform on [0, T], what lies below t_train at t_train, which so gets the weight of all of [0, t_train]
    """
    if truncation == "soft":
        start = process.t_train * (process.T / process.t_train) ** of_step
        return times(process, u, (start - process.t_train) / (process.T - process.t_train))
    if truncation == "clamp":
        t = (process.T * u).clamp(min=process.t_train)
        return Drawn(t, None, ((t - process.t_train) / (process.T - process.t_train)).clamp(0, TOP))
    return times(process, u)
