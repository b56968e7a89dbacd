"""Traces of a network's Jacobian J = ∂m/∂x for each sample, from one call of the network: exact, Hutchinson's, Hutch++.

Each is a function (network, x [B, *], samples) -> (m [B, *], estimates [B, K]); the K estimates are independent of each
other given what they share, so that their spread is the standard error of their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import ModelOutputError

Network = Callable[[Tensor], Tensor]


class Reverse:
    """m, and Jᵀv by a backward pass for each v through the one graph."""

    def __init__(self, network: Network, x: Tensor) -> None:
        with torch.enable_grad():
            self.x = x.requires_grad_()
            self.output = network(self.x)
        self.m = self.output.detach()

    def product(self, v: Tensor) -> Tensor:
        found = None
        if self.output.requires_grad:
            (found,) = torch.autograd.grad(self.output, self.x, v, retain_graph=True, allow_unused=True)
        if found is None:
            raise ModelOutputError(
                "the divergence needs gradients through the model, and its output has none with respect to x: look in it "
                "for no_grad, detach, argmax or numpy"
            )
        return found


class Forward:
    """m and Jv together, by a call of the network with tangents for each v: no graph is kept."""

    m: Tensor

    def __init__(self, network: Network, x: Tensor) -> None:
        self.network, self.x = network, x

    def product(self, v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            try:
                output = self.network(forward_ad.make_dual(self.x, v))
            except NotImplementedError as error:
                raise ModelOutputError(
                    f"derivative='forward' needs forward-mode derivatives of all that the model does, and a part of it has "
                    f"none ({str(error).splitlines()[0]:.120}): use derivative='reverse'"
                ) from error
            self.m, tangent = forward_ad.unpack_dual(output)
        if tangent is None:
            raise ModelOutputError(
                "the divergence needs derivatives through the model, and its output has none with respect to x: look in it "
                "for detach, argmax or numpy"
            )
        return tangent


DERIVATIVES: dict[str, type[Reverse] | type[Forward]] = {"reverse": Reverse, "forward": Forward}


@dataclass(frozen=True)
class Exact:
    """tr J by D products, for one estimate."""

    derivative: type[Reverse] | type[Forward]

    def __call__(self, network: Network, x: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        j = self.derivative(network, x)
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for k in range(x[0].numel()):
            unit = torch.zeros_like(x)
            unit.flatten(1)[:, k] = 1
            total += j.product(unit).flatten(1)[:, k]
        return j.m, total[:, None]


@dataclass(frozen=True)
class Hutchinson:
    """⟨v, Jv⟩ for each probe v of `probes` [K, B, *] (Hutchinson 1990; Grathwohl et al. 2019, eq. 7)."""

    derivative: type[Reverse] | type[Forward]
    probes: Tensor

    def __call__(self, network: Network, x: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        j = self.derivative(network, x)
        found = [_dot(v, j.product(v)) for v in _of(self.probes, samples)]
        return j.m, torch.stack(found, 1)


@dataclass(frozen=True)
class HutchPlusPlus:
    """tr(Qᵀ J Q) + ⟨g, P J P g⟩ for each g of `probes` [K, B, *], P = 1 − QQᵀ, Q an orthonormal basis of J S for the sketch
    S [K, B, *] (Meyer et al. 2021, Alg. 1, with J for each sample): 3 K products. Given S each estimate is unbiased.
    """

    derivative: type[Reverse] | type[Forward]
    sketch: Tensor
    probes: Tensor

    def __call__(self, network: Network, x: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        j = self.derivative(network, x)
        seen = torch.stack([j.product(v).flatten(1) for v in _of(self.sketch, samples)], 2)  # [B, D, K]
        basis = torch.linalg.qr(seen).Q
        captured = sum(_dot(q, j.product(q.view_as(x))) for q in basis.unbind(2))
        found = []
        for g in _of(self.probes, samples):
            flat = g.flatten(1)[:, :, None]
            rest = (flat - basis @ (basis.mT @ flat)).view_as(x)
            found.append(captured + _dot(rest, j.product(rest)))
        return j.m, torch.stack(found, 1)


def _of(probes: Tensor, samples: Tensor) -> Tensor:
    return probes if len(samples) == probes.shape[1] else probes[:, samples]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a.flatten(1) * b.flatten(1)).sum(1, dtype=torch.float64)
