"""The trace of a network's Jacobian J = ∂m/∂x for each sample, from one call of the network: exact, Hutchinson's, Hutch++.

Each is a function (network, x [B, *], samples) -> (m [B, *], estimates [B, K] of tr J, [B or 1, K or 1] of tr 1). The K
estimates have independent probes, so that their spread gives the standard error of their mean. Each also returns its
estimate of tr 1 by the same probe, D for ±1 and |v|² for normals: the estimate of tr(P·1 + q·J) is then ⟨v, (P·1 + q·J)v⟩,
which has less variance than P·D + q⟨v, Jv⟩.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import files
from ..errors import ModelOutputError

Network = Callable[[Tensor], Tensor]

AT_ONCE = (
    2**11
)  # numbers in one backward pass of many probes; above, a pass for each probe is as fast and needs less memory


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Networks without torch.compile, whose graphs allow one product for each call, and none of forward mode."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and its import takes a second
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


class Reverse:
    """m, and Jᵀv by a backward pass for each v through the one graph: where there are few numbers, for many v at once."""

    def __init__(self, network: Network, x: Tensor) -> None:
        with torch.enable_grad():
            self.x = x.requires_grad_()
            try:
                self.output = network(self.x)
            except RuntimeError as error:  # the network writes to its input, which a leaf does not let it
                if "leaf Variable" not in str(error):
                    raise
                self.output = network(self.x.clone())
        self.m = self.output.detach()

    def products(self, vs: Tensor, last: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """(v, Jᵀv) for vs [n, B, *], as [some, B, *]; `last`: no other call follows."""
        size = max(1, AT_ONCE // max(self.x.numel(), 1))
        if size > 1 and len(vs) > 1:
            try:
                for some in vs.split(size):
                    yield some, self._product(some, True, batched=True)
                return
            except RuntimeError as error:  # a part of the network has no rule for batches of gradients
                if "batching rule" not in str(error).lower():
                    raise
        for k, v in enumerate(vs):
            yield v[None], self._product(v, not last or k + 1 < len(vs))[None]

    def _product(self, v: Tensor, retain: bool, batched: bool = False) -> Tensor:
        gradient = None
        if self.output.requires_grad:
            try:
                (gradient,) = torch.autograd.grad(
                    self.output, self.x, v, retain_graph=retain, allow_unused=True, is_grads_batched=batched
                )
            except RuntimeError as error:
                if "donated" not in str(error):
                    raise
                raise ModelOutputError(
                    "torch.compile freed the graph of the network after one backward pass, and several products need more: "
                    "give the network that is not compiled"
                ) from error
        if gradient is None:
            raise ModelOutputError(
                "the divergence needs gradients through the model, and its output has none with respect to x: look in it "
                "for no_grad, detach, argmax, numpy, or an output that does not depend on x"
            )
        return gradient


class Forward:
    """m and Jv together, by a call of the network with tangents for each v: no graph is kept."""

    m: Tensor

    def __init__(self, network: Network, x: Tensor) -> None:
        self.network, self.x = network, x

    def products(self, vs: Tensor, last: bool = True) -> Iterator[tuple[Tensor, Tensor]]:
        """(v, Jv) for vs [n, B, *], as [1, B, *]."""
        # no generator, which a StopIteration of the network's would end
        return iter([(v[None], self._product(v)[None]) for v in vs])

    def _product(self, v: Tensor) -> Tensor:
        with forward_ad.dual_level():
            try:
                # clones, as the network may write to its input
                output = self.network(forward_ad.make_dual(self.x.clone(), v.clone()))
            except NotImplementedError as error:
                raise ModelOutputError(
                    f"derivative='forward' needs forward-mode derivatives of all that the model does, and a part of it has "
                    f"none ({files.reason(error)}): use derivative='reverse'"
                ) from error
            self.m, tangent = forward_ad.unpack_dual(output)
        if tangent is None:
            raise ModelOutputError(
                "the divergence needs derivatives through the model, and its output has none with respect to x: look in it "
                "for detach, argmax, numpy, or an output that does not depend on x"
            )
        return tangent  # type: ignore[no-any-return]


DERIVATIVES: dict[str, type[Reverse] | type[Forward]] = {"reverse": Reverse, "forward": Forward}


class Probes:
    """Vectors [K, B, *], and those of the samples that still run."""

    def __init__(self, every: Tensor) -> None:
        self.every, self.some = every, every
        self.samples: Tensor | None = None

    def of(self, samples: Tensor) -> Tensor:
        """Those of `samples`, gathered once as long as they are the same."""
        if samples is not self.samples:
            self.samples = samples
            self.some = self.every if len(samples) == self.every.shape[1] else self.every[:, samples]
        return self.some


@dataclass(frozen=True)
class Exact:
    """tr J by D products, for one estimate."""

    derivative: type[Reverse] | type[Forward]

    def __call__(self, network: Network, x: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        j, numbers = self.derivative(network, x), x[0].numel()
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        size = max(1, AT_ONCE // max(x.numel(), 1))
        for first in range(0, numbers, size):
            which = torch.arange(first, min(first + size, numbers), device=x.device)
            units = torch.zeros((len(which), *x.shape), dtype=x.dtype, device=x.device)
            units.flatten(2)[torch.arange(len(which), device=x.device), :, which] = 1
            for unit, product in j.products(units, last=first + size >= numbers):
                total += _dots(unit, product).sum(0)
        return j.m, total[:, None], total.new_full((1, 1), numbers)


@dataclass(frozen=True)
class Hutchinson:
    """⟨v, Jv⟩ for each probe v of `probes` [K, B, *] (Hutchinson 1990; Grathwohl et al. 2019, eq. 7)."""

    derivative: type[Reverse] | type[Forward]
    probes: Probes

    def __call__(self, network: Network, x: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        j = self.derivative(network, x)
        estimates = [_dots(v, product) for v, product in j.products(self.probes.of(samples))]
        return j.m, torch.cat(estimates).T, self.squares.of(samples).T

    @cached_property
    def squares(self) -> Probes:
        """|v|², [K, B]."""
        return Probes(_dots(self.probes.every, self.probes.every))


@dataclass(frozen=True)
class HutchPlusPlus:
    """tr(Qᵀ J Q) + ⟨u, J u⟩ for each normal g of `probes` [K, B, *], Q an orthonormal basis of J S for the normal sketch S
    [K, B, *], u = √(D − K) Pg/|Pg|, P = 1 − QQᵀ (Meyer et al. 2021, Alg. 1, with J for each sample; theirs has Pg itself):
    3 K products. Given S each estimate is unbiased, as u is uniform on its sphere, and the unit matrix's is exact.
    """

    derivative: type[Reverse] | type[Forward]
    sketch: Probes
    probes: Probes

    def __call__(self, network: Network, x: Tensor, samples: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        j, numbers = self.derivative(network, x), x[0].numel()
        images = torch.cat([product for _, product in j.products(self.sketch.of(samples), last=False)])
        seen = images.flatten(2)  # [K, B, D]
        with torch.autocast(x.device.type, enabled=False):
            basis = torch.linalg.qr(seen.permute(1, 2, 0)).Q  # [B, D, K]
            probes = self.probes.of(samples).flatten(2).permute(1, 2, 0)
            rest = probes - basis @ (basis.mT @ probes)
            rest = rest * (math.sqrt(numbers - len(seen)) / torch.linalg.vector_norm(rest, dim=1, keepdim=True))
        vectors = torch.cat((basis, rest), 2).permute(2, 0, 1).reshape(-1, *x.shape)
        captured, remaining = torch.cat([_dots(v, product) for v, product in j.products(vectors)]).split(len(seen))
        return j.m, (captured.sum(0) + remaining).T, captured.new_full((1, 1), numbers)


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ of [n, B, *] for each of n and B, float64."""
    return (a.flatten(2) * b.flatten(2)).sum(2, dtype=torch.float64)
