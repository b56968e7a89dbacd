"""p(y | x_t) of any noise and operator, by Laplace's approximation.

With x0 | x_t ~ N(x̂0, C) and the operator's Jacobian H at x̂0 the measurements m are N(m̂, S), m̂ = A(x̂0) and S = H C Hᵀ. About the
largest value, at m̂ + δ, of log p(y | m) + log N(m; m̂, S) (Rasmussen & Williams 2006, section 3.4, with S for their K)

    log p(y | x_t) = log p(y | m̂ + δ) − ½ δᵀ S⁻¹ δ − ½ log det(1 + S Λ),        Λ = −∂² log p(y | m)/∂m²
    E[x0 | x_t, y] = x̂0 + C Hᵀ S⁻¹ δ

Of a linear operator and Gaussian noise both are exact, and MMPS's. Where σ → 0 so does S, and what is left is log p(y | x0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, DataError, FastdiffError, short
from ..guidance.base import Setting
from ..guidance.log_likelihood import draws, probe
from .problem import SEED, Measurement

NEWTON = 20  # steps at the most
HALVINGS = 10  # of each
GAIN = 1e-4  # in log p, that a step must promise
LOWEST = 0.1  # standard deviations of a measurement, above which a count's mean is told by the logarithm itself


class Likelihood:
    """log p(y | m) of measurements m [B, *m], and its derivatives, float64, of each sample alone."""

    def __init__(self, measured: Measurement, setting: Setting) -> None:
        problem = measured.problem
        if problem.noise == "gaussian" and measured.noise_std == 0:
            raise ConfigError(
                "noise_std=0 gives p(y | x0) no density that a method could follow through an operator that is not linear: give "
                "the noise that y has, or a small one"
            )
        self.measured, self.own = measured, callable(problem.noise)
        if not measured.linear:
            measured.needs_gradient("inverse.MMPS", twice=True)
        self.eps = torch.finfo(torch.float64).eps
        if not self.own:
            return
        y = measured.each[:1].repeat(2, *[1] * len(measured.shape))
        mean = measured.of(draws(2, setting)).detach()
        least = torch.ones_like(mean)
        try:
            probe(lambda mean: measured.log_density(mean, y.clone(), least), mean, (), "noise", None)
            self.eps = torch.finfo(measured.log_density(mean.clone(), y.clone(), least).dtype).eps
        except (RuntimeError, ValueError) as error:
            if isinstance(error, FastdiffError):
                raise
            raise ConfigError(
                f"noise fails on two samples of means {float(mean.min()):g} to {float(mean.max()):g} ({short(str(error))}): it "
                "is asked with any number of samples and any means, and must do nothing in place"
            ) from error

    def value(self, mean: Tensor, y: Tensor, least: Tensor) -> Tensor:
        """[B], of mean and least [B, n]."""
        return self._of(mean, y, least).detach().double()

    def _of(self, mean: Tensor, y: Tensor, least: Tensor) -> Tensor:
        mean = mean.to(y.dtype) if self.own else mean
        return self.measured.log_density(mean.view_as(y), y, least.view_as(y))

    def derivatives(self, mean: Tensor, y: Tensor, least: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
        """The gradient [B, n] and Λ [B, n, n], or the sums of its rows [B, n], which are its diagonal where each measurement has
        a noise of its own."""
        at = (mean.to(y.dtype) if self.own else mean.clone()).requires_grad_()
        (slope,) = torch.autograd.grad(self._of(at, y, least).sum(), at, create_graph=True)

        def along(u: Tensor) -> Tensor:
            """Λ u of u [n]."""
            return -self._slope((slope * u).sum(1), at)

        ones = torch.ones_like(at[0])
        second = along(ones)
        if not diagonal:
            second = self._whole(along, second) if self.own else second.diag_embed()
        # at a kink
        return slope.detach().double().nan_to_num(0.0, 0.0, 0.0), second.double().nan_to_num(0.0, 0.0, 0.0)

    def _whole(self, along: Callable[[Tensor], Tensor], sums: Tensor) -> Tensor:
        """Λ [B, n, n] by the sums of its rows [B, n]: by a product for each column only where it is not diagonal, as its product
        with a random vector says, for each sample."""
        n = sums.shape[1]
        u = torch.rand(n, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64).to(sums)
        apart, wanted = along(u), sums * u
        # of each row by itself: beside a precise measurement others are small, and may be tied
        tied = ~((apart - wanted).abs() <= 64 * n * self.eps * wanted.abs()).all(1)
        if n == 1 or (sums.device.type == "cpu" and not bool(tied.any())):
            return sums.diag_embed()
        columns = torch.stack([along(unit) for unit in torch.eye(n, dtype=sums.dtype, device=sums.device)], 1)
        return torch.where(tied[:, None, None], columns, sums.diag_embed())

    @staticmethod
    def _slope(column: Tensor, at: Tensor) -> Tensor:
        if not column.requires_grad:  # of a likelihood that is linear
            return torch.zeros_like(at)
        slope = torch.autograd.grad(column.sum(), at, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(at) if slope is None else slope


class Mode(NamedTuple):
    """The largest value of log p(y | mean + L a) − ½ |a|², S = L Lᵀ: where, a [B, n], and that value [B]; and of Lᵀ Λ L there the
    eigenvalues [B, n] and -vectors [B, n, n] (L itself where S is a diagonal); float64."""

    a: Tensor
    value: Tensor
    curvatures: Tensor
    vectors: Tensor

    @property
    def log_det(self) -> Tensor:
        """log det(1 + S Λ), [B]."""
        return self.curvatures.log1p().sum(1)


def lowest(variance: Tensor) -> Tensor:
    """`least` of `poisson`, of measurements' variances [B, n]: where these vanish so does it, and the density is the true one."""
    return (LOWEST * variance.sqrt()).clamp(min=1e-12)


def mode(likelihood: Likelihood, mean: Tensor, root: Tensor, y: Tensor) -> Mode:
    """By Newton's method, each sample by its own steps.

    mean [B, n]; root: L [B, n, n], or [B, n] where S is diagonal, as Λ then is. Where the likelihood is not concave, Λ counts
    only as far as it is not negative.
    """
    a = torch.zeros_like(mean)
    least = lowest(root.square() if root.ndim == 2 else root.square().sum(2))
    at = _At(likelihood, mean, root, y, least)
    best, which = at.value(a), torch.arange(len(a), device=a.device)
    if a.device.type == "cpu" and bool(mean.isfinite().all()) and not bool(best.isfinite().all()):
        bad = int((~best.isfinite()).nonzero()[0])
        raise DataError(
            f"noise gives {best[bad].item()} of a prediction of noisy samples, whose means are {mean[bad].min():g} to "
            f"{mean[bad].max():g}: log p(y | x0) must be finite and go on also where no data are, as by mean.clamp(min=1e-3)"
        )
    for _ in range(NEWTON):
        some = _At(likelihood, mean[which], root[which], y[which], least[which])
        reached, value, moved = some.newton(a[which], best[which])
        a[which], best[which] = reached, value
        if a.device.type == "cpu":  # a look at a GPU's numbers would wait for it
            which = which[moved]
            if len(which) == 0:
                break
    return Mode(a, best, *at.curved(a)[1:])


class _At(NamedTuple):
    """What `mode` looks at."""

    likelihood: Likelihood
    mean: Tensor
    root: Tensor
    y: Tensor
    least: Tensor

    @property
    def diagonal(self) -> bool:
        return self.root.ndim == 2

    def along(self, a: Tensor) -> Tensor:
        """L a."""
        return self.root * a if self.diagonal else (self.root * a[:, None]).sum(2)

    def value(self, a: Tensor) -> Tensor:
        return self.likelihood.value(self.mean + self.along(a), self.y, self.least) - 0.5 * a.square().sum(1)

    def curved(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The likelihood's gradient, and eigenvalues and -vectors of Lᵀ Λ L, of which none is negative."""
        slope, second = self.likelihood.derivatives(self.mean + self.along(a), self.y, self.least, self.diagonal)
        if self.diagonal:
            return slope, self.root.square() * second.clamp(min=0), self.root
        values, vectors = torch.linalg.eigh(self.root.mT @ (second + second.mT) @ self.root / 2)
        return slope, values.clamp(min=0), vectors

    def newton(self, a: Tensor, best: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step, halved until the value grows, but for rounding: where that leads, its value, and whether there was any."""
        slope, values, vectors = self.curved(a)
        if self.diagonal:
            uphill = self.root * slope - a
            step = uphill / (1 + values)
        else:
            uphill = (self.root * slope[..., None]).sum(1) - a
            step = (vectors * ((vectors * uphill[..., None]).sum(1) / (1 + values))[:, None]).sum(2)
        promised = 0.5 * (uphill * step).sum(1)  # by a parabola
        still = stays = promised <= GAIN
        rounding = 8 * self.likelihood.eps * best.abs()
        for halved in range(HALVINGS):
            if best.device.type == "cpu" and bool(still.all()):
                break
            there = a + step / 2**halved
            value = self.value(there)
            taken = ~still & (value > best + 0.1 * promised / 2**halved - rounding)
            a, best, still = torch.where(taken[:, None], there, a), torch.where(taken, value, best), still | taken
        return a, best, still & ~stays
