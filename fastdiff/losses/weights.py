"""Weights λ(t) of the denoising losses: what multiplies ‖ε̂ − ε‖², the error of the predicted noise, at time t.

A weight on another error is one on this: ‖score error‖² = ‖ε error‖²/σ², ‖x0 error‖² = ‖ε error‖²/SNR, SNR = α²/σ².
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, choose
from ..planning.processes import Process


@dataclass(frozen=True)
class Weight:
    """A weight; one of your own is a frozen dataclass of plain numbers with `of_noise` and a `name`."""

    name: ClassVar[str] = ""

    def of_noise(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """λ(t), [B], of ‖ε̂ − ε‖²."""
        raise NotImplementedError

    def of_output(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor, q: Tensor) -> Tensor:
        """[B], of the error of the network's output, q times which is that of ε."""
        return q**2 * self.of_noise(process, t, alpha, sigma)

    def config(self) -> dict[str, Any]:
        """Its name and numbers, as a checkpoint stores them."""
        return {"name": self.name, **asdict(self)}


class Sigma2(Weight):
    """σ² of the score's error, 1 of ε's: Song et al. 2021, eq. 7; Ho et al. 2020, eq. 14."""

    name = "sigma2"

    def of_noise(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)

    def of_output(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor, q: Tensor) -> Tensor:
        return q**2


class G2(Weight):
    """g² of the score's error: the bound on the likelihood (Song, Durkan, Murray & Ermon 2021, eq. 7)."""

    name = "g2"

    def of_noise(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (process.diffusion(t) / sigma) ** 2  # type: ignore[no-any-return]

    def of_output(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor, q: Tensor) -> Tensor:
        return (q * process.diffusion(t) / sigma) ** 2  # type: ignore[no-any-return]


class One(Weight):
    """1 of the score's error, where small noise counts most (Song & Ermon 2019, §4.2, before their λ)."""

    name = "one"

    def of_noise(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return 1 / sigma**2


class Target(Weight):
    """1 of the error of the network's own output: DDPM's L_simple for "eps", EDM's eq. 8 for "edm"."""

    name = "target"

    def of_output(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor, q: Tensor) -> Tensor:
        return torch.ones_like(q)


class EDM(Weight):
    """(σ̂² + σ_d²)/(σ̂ σ_d)² of the error of x0, σ̂ = σ/α, σ_d the process's sigma_data (Karras et al. 2022, Table 1)."""

    name = "edm"

    def of_noise(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma / alpha / process.sigma_data) ** 2 + 1


@dataclass(frozen=True)
class MinSNR(Weight):
    """min(SNR, γ) of the error of x0 (Hang et al. 2023, eq. 8)."""

    gamma: float = 5.0
    name: ClassVar[str] = "min_snr"

    def __post_init__(self) -> None:
        checks.number("gamma", self.gamma, 0, above=True)

    def of_noise(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (self.gamma * (sigma / alpha) ** 2).clamp(max=1.0)


@dataclass(frozen=True)
class P2(Weight):
    """1/(k + SNR)^γ of the error of ε (Choi et al. 2022, eq. 8)."""

    gamma: float = 1.0
    k: float = 1.0
    name: ClassVar[str] = "p2"

    def __post_init__(self) -> None:
        checks.number("gamma", self.gamma, 0)
        checks.number("k", self.k, 0, above=True)

    def of_noise(self, process: Process, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (self.k + (alpha / sigma) ** 2) ** -self.gamma


class Learned(EDM):
    """EDM's weight with a learned uncertainty u(ln σ̂): L ← L/eᵘ + u (Kendall et al. 2018; Karras et al. 2024, eq. 14 and 21).

    u is linear between KNOTS levels of ln σ̂. Its loss has the gradient 1 − L/eᵘ, so that eᵘ goes to the mean of L at each
    level, and every level counts alike; `observe` takes one step there, of a size that does not depend on the scale of L.
    """

    name = "learned"
    KNOTS: ClassVar[int] = 32
    RATE: ClassVar[float] = 0.02

    def __init__(self) -> None:
        object.__setattr__(self, "u", torch.zeros(self.KNOTS, dtype=torch.float64))

    u: Tensor

    def _position(self, process: Process, t: Tensor) -> tuple[Tensor, Tensor]:
        """The knot below each time, and how far on the way to the next it stands."""
        ends = torch.tensor([process.t_train if not process.discrete else 1.0, process.T], dtype=torch.float64)
        low, high = (process.sigma(ends) / process.alpha(ends)).log().tolist()
        t = t.detach().double()
        level = (process.sigma(t) / process.alpha(t)).log()
        at = ((level - low) / (high - low) * (self.KNOTS - 1)).clamp(0, self.KNOTS - 1)
        below = at.floor().clamp(max=self.KNOTS - 2)
        return below.long(), at - below

    def uncertainty(self, process: Process, t: Tensor) -> Tensor:
        """u(ln σ̂) at times t [B], float64."""
        below, share = self._position(process, t)
        u = self.u.to(t.device)
        return u[below].lerp(u[below + 1], share)

    def observe(self, process: Process, t: Tensor, losses: Tensor) -> None:
        """One step of u, by the losses L [B], under EDM's weight and without u, at times t [B]."""
        below, share = self._position(process, t)
        pull = losses.detach().double() * (-self.uncertainty(process, t)).exp() - 1
        total, weight = (torch.zeros(self.KNOTS, dtype=torch.float64, device=t.device) for _ in range(2))
        for knot, part in ((below, 1 - share), (below + 1, share)):
            total.index_add_(0, knot, part * pull)
            weight.index_add_(0, knot, part)
        self.u.add_((self.RATE * (total / (weight + 1)).clamp(-1, 1)).to(self.u.device))


WEIGHTS: dict[str, type[Weight]] = {w.name: w for w in (Sigma2, G2, One, Target, EDM, MinSNR, P2, Learned)}


def get(weight: object) -> Weight:
    """A weight from its name, or itself."""
    if isinstance(weight, Weight):
        if not weight.name:
            raise ConfigError(
                f"weight must have a name of its own, got {type(weight).__name__}: set `name` in the class"
            )
        return weight
    return WEIGHTS[choose("weight", weight, WEIGHTS)]()
