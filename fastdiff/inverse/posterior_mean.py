"""Methods that guide the prediction: E[x0 | x_t, y] by a Gaussian for x0 given x_t.

With x0 | x_t ~ N(x̂0, C) and y = A x0 + σ_y ε the mean of x0 given both, and p(y | x_t), are in closed form:

    x̂0 + C Aᵀ (A C Aᵀ + σ_y²)⁻¹ (y − A x̂0),        y | x_t ~ N(A x̂0, A C Aᵀ + σ_y²).

The methods differ in C. The covariance is σ²/α ∂x̂0/∂x_t (Tweedie's second formula).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks
from ..execution.calls import like
from ..guidance.base import Bound, Guidance, Moment, Setting
from .laplace import HALVINGS, Likelihood, Mode, lowest, mode
from .problem import Linear, Measurement, Problem, conjugate_gradients, dot

FEW = 16  # measurements whose covariance is made as a matrix, unless the caller says how many iterations to take
ITERATIONS = 5
LOOKS = 2  # at the values on either side of an operator that is not linear, for a mean
OUTER = 2  # steps of Newton's method that are by conjugate gradients, and one more where the operator is not linear


# of log p(y | x_t) up to what is the same for all x_t, [B], float64; most methods need the mean alone
Density = Callable[[], Tensor]


class DensityBound(Bound):
    """A method that knows p(y | x_t), if only nearly."""

    differentiates = True

    def __init__(self, measured: Measurement) -> None:
        super().__init__()
        self.measured, self.parts = measured, {"y": measured.each}

    def __call__(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        return self.with_density(moment, parts)[0]

    def with_density(self, moment: Moment, parts: dict[str, Tensor]) -> tuple[Tensor, Density]:
        """The guided x̂0, and what gives log p(y | x_t)."""
        raise NotImplementedError


class GaussianBound(DensityBound):
    """Of a linear operator and Gaussian noise."""

    def __init__(self, measured: Measurement) -> None:
        super().__init__(measured)
        self.variance = measured.noise_std**2

    def with_density(self, moment: Moment, parts: dict[str, Tensor]) -> tuple[Tensor, Density]:
        residual = parts["y"] - self.measured.of(moment.x0.detach())
        change, density = self.change(moment, residual)
        return moment.x0 + change.detach(), density

    def change(self, moment: Moment, residual: Tensor) -> tuple[Tensor, Density]:
        """C Aᵀ (A C Aᵀ + σ_y²)⁻¹ (y − A x̂0), and what gives log p(y | x_t)."""
        raise NotImplementedError

    def covariance(self, moment: Moment, u: Tensor, last: bool = False) -> Tensor:
        """σ²/α Jᵀ Aᵀ u."""
        return moment.pulled(self.measured.adjoint(like(moment.tweedie, u) * u), last=last)


class Dense(GaussianBound):
    """C by as many products with the Jacobian as there are measurements."""

    def change(self, moment: Moment, residual: Tensor) -> tuple[Tensor, Density]:
        columns, values, vectors, positive = spread(moment, self.measured.part, residual)
        values = values + self.variance
        values = torch.maximum(values, 1e-12 * values.amax(1, keepdim=True) + 1e-300)
        along = (vectors.mT @ residual.double().flatten(1)[..., None])[..., 0]
        weights = (vectors @ torch.where(positive, along / values, 0.0)[..., None])[..., 0]
        return weighed(columns, weights), lambda: -0.5 * ((along**2 / values).sum(1) + values.log().sum(1))


class Laplace(DensityBound):
    """Of any operator and noise (fastdiff.inverse.laplace)."""

    def __init__(self, measured: Measurement, setting: Setting) -> None:
        super().__init__(measured)
        self.likelihood = Likelihood(measured, setting)

    def _measured(self, x0: Tensor) -> Tensor:
        """A(x0) as [B, n]; DataError where it is not finite."""
        mean = self.measured.of(x0).detach()
        self.measured.check("operator", x0, mean)
        return mean.double().flatten(1)


class DenseLaplace(Laplace):
    """S as a matrix; of an operator that is not linear by its values one standard deviation on either side, along each direction
    (Julier & Uhlmann 1997): what these have beside a slope counts as noise. By the Jacobian alone one of several x0 of the same y
    would be taken for certain while x_t is still noise.

    Those are of x0 given x_t; for the mean alone then of x0 given y too, about which the slope is truer (García-Fernández et al.
    2015). A density by these may have too little of another x0, which few particles with large weights would have to make up for.
    """

    def __call__(self, moment: Moment, parts: dict[str, Tensor]) -> Tensor:
        return self.guided(moment, parts, LOOKS)[0]

    def with_density(self, moment: Moment, parts: dict[str, Tensor]) -> tuple[Tensor, Density]:
        return self.guided(moment, parts, 1)

    def guided(self, moment: Moment, parts: dict[str, Tensor], looks: int) -> tuple[Tensor, Density]:
        (made, part), y = self.measured.linearized(moment.x0), parts["y"]
        mean = made.double().flatten(1)
        columns, values, vectors, positive = spread(moment, part, y)
        roots = torch.where(positive, values, 0.0).sqrt()
        # x0 = x̂0 + columns · to · a, m = mean + slopes · a + the rest, of normal numbers a of variance 1
        to, slopes = vectors * torch.where(positive, 1 / roots, 0.0)[:, None], vectors * roots[:, None]
        if part.shared:
            found = mode(self.likelihood, mean, slopes, y)
            a = found.a
        else:
            a, found = self.looked(moment, columns, to, mean, y, looks)
        change = weighed(columns, (to @ a[..., None])[..., 0])
        return moment.x0 + change, lambda: found.value - 0.5 * found.log_det

    def looked(
        self, moment: Moment, columns: list[Tensor], to: Tensor, mean: Tensor, y: Tensor, looks: int
    ) -> tuple[Tensor, Mode]:
        """E[a | y] [B, n], and the likelihood's largest value for m = middle + slopes · a + the rest, of which the last look is
        where the one before has left a."""
        x0, one = moment.x0.detach(), torch.eye(mean.shape[1], dtype=to.dtype, device=to.device)

        def measured(a: Tensor) -> Tensor:
            return self._measured(x0 + weighed(columns, (to @ a[..., None])[..., 0]))

        a, root = torch.zeros_like(mean), one.expand_as(to)
        for k in range(looks):
            sides = [(measured(a + step), measured(a - step)) for step in root.unbind(2)]
            up, down = (torch.stack(side, 2) for side in zip(*sides))
            middle = measured(a) if k else mean
            even, odd = (up + down) / 2 - middle[..., None], (up - down) / 2
            slopes = torch.linalg.solve(root, odd, left=False)
            middle = middle + even.sum(2) - (slopes @ a[..., None])[..., 0]
            values, vectors = torch.linalg.eigh(slopes @ slopes.mT + 2 * even @ even.mT)
            roots = values.clamp(min=0).sqrt()
            found = mode(self.likelihood, middle, vectors * roots[:, None], y)
            gain = torch.where(values > 0, 1 / roots, 0.0)[..., None] * (vectors.mT @ slopes)
            a = (gain.mT @ found.a[..., None])[..., 0]
            told = found.vectors.mT @ gain
            lost = told.mT @ ((found.curvatures / (1 + found.curvatures))[..., None] * told)
            spreads, along = torch.linalg.eigh(one - lost)
            root = along * spreads.clamp(min=1e-12).sqrt()[:, None]
        return a, found


class IteratedLaplace(Laplace):
    """The largest value of log p(y | A(x)) − ½ (x − x̂0)ᵀ C⁻¹ (x − x̂0) by the Gauss–Newton method: A is made linear where each
    step begins, steps are by conjugate gradients, and cut where they lead down. S counts by the sums of its rows in log det, and,
    where A is linear, in a guess of where the first step begins."""

    def __init__(self, measured: Measurement, setting: Setting, iterations: int) -> None:
        super().__init__(measured, setting)
        self.iterations = iterations

    def with_density(self, moment: Moment, parts: dict[str, Tensor]) -> tuple[Tensor, Density]:
        x0, y = moment.x0.detach(), parts["y"]
        made, part = self.measured.linearized(x0)
        mean, linear = made.double().flatten(1), part.shared
        steps = OUTER if linear else OUTER + 1

        def spread(w: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
            """Hᵀ w and C Hᵀ w of w [B, n]."""
            u = part.adjoint(w.view_as(y).to(y.dtype))
            return u, moment.tweedie * moment.pulled(u, last=last).detach()

        def measured(v: Tensor) -> Tensor:
            """H v of v [B, *]."""
            return part.forward(v).double().flatten(1)

        def row_sums(last: bool = False) -> Tensor:
            """Of S = H C Hᵀ."""
            return measured(spread(torch.ones_like(mean), last)[1]).clamp(min=0)

        sums = row_sums()
        least = lowest(torch.maximum(sums, sums.mean(1, keepdim=True)))
        here, best = (torch.zeros_like(x0), torch.zeros_like(x0)), self.likelihood.value(mean, y, least)
        at, shift, log_det = mean, torch.zeros_like(mean), torch.zeros_like(best)
        if linear:
            found = mode(self.likelihood, mean, sums.sqrt(), y)
            shift, log_det = sums.sqrt() * found.a, found.log_det
            at = mean + shift
        for k in range(steps):
            slope, second = self.likelihood.derivatives(at, y, least, True)
            root = second.clamp(min=0).sqrt()
            target = slope + root.square() * shift
            # (1 + Λ S) w = g + Λ δ, with Λ^½ on either side
            z = conjugate_gradients(
                lambda u, root=root: root * measured(spread(root * u)[1]) + u,  # type: ignore[misc]
                root * measured(spread(target)[1]),
                self.iterations,
            )
            there = spread(target - root * z, last=linear and k + 1 == steps)
            here, best = self._cut(x0, y, least, best, here, there)
            if not linear or k + 1 < steps:
                made, part = self.measured.linearized(x0 + here[1])
                at, shift = made.double().flatten(1), measured(here[1])
        if not linear:
            second = self.likelihood.derivatives(at, y, least, True)[1].clamp(min=0)
            log_det = (row_sums(last=True) * second).log1p().sum(1)
        return moment.x0 + here[1], lambda: best - 0.5 * log_det

    def _cut(
        self,
        x0: Tensor,
        y: Tensor,
        least: Tensor,
        best: Tensor,
        here: tuple[Tensor, Tensor],
        there: tuple[Tensor, Tensor],
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The longest of halved steps from here to there, of u and C u, whose value is larger, and that value."""
        size = torch.zeros_like(best)
        for halved in range(HALVINGS):
            if size.device.type == "cpu" and bool((size > 0).all()):
                break
            u, v = (a + (b - a) / 2**halved for a, b in zip(here, there))
            value = self.likelihood.value(self._measured(x0 + v), y, least) - 0.5 * dot(u, v)
            taken = (size == 0) & (value > best)
            size, best = torch.where(taken, 1 / 2**halved, size), torch.where(taken, value, best)
        u, v = (a + like(size, a) * (b - a) for a, b in zip(here, there))
        return (u, v), best


def spread(moment: Moment, part: Linear, y: Tensor) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Of S = A C Aᵀ for as many measurements as y [B, *m] has: the columns of C Aᵀ, each [B, *], by a product with the Jacobian;
    eigenvalues and -vectors, float64; and whether an eigenvalue is positive: along the others nothing is told, as in conjugate
    gradients."""
    many, columns = math.prod(y.shape[1:]), []
    s = y.new_empty((len(y), many, many), dtype=torch.float64)
    for i, unit in enumerate(torch.eye(many, dtype=y.dtype, device=y.device)):
        unit = unit.view(1, *y.shape[1:])
        a = part.adjoint(unit if part.shared else unit.expand_as(y)).expand_as(moment.x)
        columns.append(moment.tweedie * moment.pulled(a, last=i + 1 == many))
        s[:, i] = part.forward(columns[-1]).double().flatten(1)
    # a trained network's Jacobian is no covariance: its symmetric part, in which nothing below the size of the other is known
    values, vectors = torch.linalg.eigh((s + s.mT) / 2)
    # (the Frobenius norm of an antisymmetric matrix is at least √2 times its largest singular value)
    unknown = torch.linalg.matrix_norm((s - s.mT) / 2)[:, None] / math.sqrt(2)
    return columns, torch.maximum(values, unknown), vectors, values > 0


def weighed(columns: list[Tensor], weights: Tensor) -> Tensor:
    """Σ_i weights_i columns_i, [B, *]."""
    total: Tensor = sum(like(weights[:, i], column) * column for i, column in enumerate(columns))  # type: ignore[assignment]
    return total.detach()


@dataclass(frozen=True, eq=False)
class MMPS(Guidance):
    """Moment matching posterior sampling (Rozet et al. 2024, eq. 20 and Alg. 3): C = σ²/α ∂x̂0/∂x_t.

    iterations   of the solver, of conjugate gradients, a product with the Jacobian each and one more; with as many as there are
                 measurements it is exact, and C is made as a matrix. Default: exact up to 16 measurements, else 5

    Of noise that is not Gaussian, and of an operator that is not linear, by Laplace's approximation of p(y | x_t) (Rasmussen and
    Williams 2006, section 3.4); with fewer iterations than measurements by Newton's method, in two steps, by default of 15
    products in all, or where the operator is not linear in three, of 23.
    """

    problem: Problem
    iterations: int | None = None

    def bind(self, setting: Setting) -> Bound:
        measured = Measurement(self.problem, setting)
        many = math.prod(measured.shape)
        iterations = self.iterations
        if iterations is None:
            iterations = many if many <= FEW else ITERATIONS
        iterations = checks.integer("iterations", iterations, 1, 10**6)
        if measured.linear and self.problem.noise == "gaussian":
            return Dense(measured) if iterations >= many else Iterated(measured, iterations)
        return DenseLaplace(measured, setting) if iterations >= many else IteratedLaplace(measured, setting, iterations)


class Iterated(GaussianBound):
    """C by conjugate gradients."""

    def __init__(self, measured: Measurement, iterations: int) -> None:
        super().__init__(measured)
        self.iterations = iterations

    def change(self, moment: Moment, residual: Tensor) -> tuple[Tensor, Density]:
        measured = self.measured

        def apply(u: Tensor) -> Tensor:
            return measured.forward(self.covariance(moment, u)) + self.variance * u

        weights = conjugate_gradients(apply, residual, self.iterations)
        return self.covariance(moment, weights, last=True), lambda: -0.5 * dot(residual, weights)


@dataclass(frozen=True, eq=False)
class TMPD(Guidance):
    """Tweedie moment projected diffusion (Boys et al. 2023, eq. 8 and 9): C as in MMPS.

    diagonal   A C Aᵀ by the sums of its rows, one product with the Jacobian (their eq. 13), instead of one for each measurement;
               default where there are more than 16
    """

    problem: Problem
    diagonal: bool | None = None

    def bind(self, setting: Setting) -> Bound:
        measured = Measurement(self.problem, setting).needs_linear("inverse.TMPD")
        diagonal = math.prod(measured.shape) > FEW if self.diagonal is None else self.diagonal
        return RowSums(measured) if checks.flag("diagonal", diagonal) else Dense(measured)


class RowSums(GaussianBound):
    """A C Aᵀ as a diagonal."""

    def change(self, moment: Moment, residual: Tensor) -> tuple[Tensor, Density]:
        measured = self.measured
        ones = measured.adjoint(torch.ones_like(residual[:1])).expand_as(moment.x)
        sums = like(moment.tweedie, residual) * measured.forward(moment.pulled(ones))
        positive = sums > 0  # of a covariance they need not be, and what is not tells nothing
        sums = (sums.clamp(min=0) + self.variance).clamp(min=torch.finfo(sums.dtype).tiny)
        weights = torch.where(positive, residual / sums, 0.0)
        change = self.covariance(moment, weights, last=True)
        return change, lambda: -0.5 * (dot(residual, weights) + sums.double().log().flatten(1).sum(1))


@dataclass(frozen=True, eq=False)
class PiGDM(Guidance):
    """Pseudoinverse-guided diffusion (Song, Vahdat, Mardani & Kautz 2023, eq. 7 and 8): in p(y | x_t) C = r² = σ̂² s²/(σ̂² + s²).

    data_std   s, the standard deviation of the data in the network's units; 1 in the paper
    """

    problem: Problem
    data_std: float = 1.0

    def bind(self, setting: Setting) -> Bound:
        variance = checks.number("data_std", self.data_std, 0, above=True) ** 2
        measured = Measurement(self.problem, setting).needs_linear("inverse.PiGDM")
        return Isotropic(measured, lambda noise: noise * variance / (noise + variance), through=True)


class Isotropic(GaussianBound):
    """C = r², a function `spread` of σ̂²; `through` the network's Jacobian, as a gradient of log p(y | x_t), or not."""

    def __init__(self, measured: Measurement, spread: Callable[[Tensor], Tensor], through: bool) -> None:
        super().__init__(measured)
        self.spread, self.differentiates, self.solved = spread, through, measured.solver()

    def change(self, moment: Moment, residual: Tensor) -> tuple[Tensor, Density]:
        r2 = self.spread((moment.sigma / moment.alpha) ** 2).to(residual.dtype)
        weights = self.solved(residual, r2, self.variance)
        if self.differentiates:
            change = self.covariance(moment, weights, last=True)
        else:
            change = self.measured.adjoint(like(r2, weights) * weights)
        return change, lambda: -0.5 * dot(residual, weights)


@dataclass(frozen=True, eq=False)
class DiffPIR(Guidance):
    """Plug-and-play restoration (Zhu et al. 2023, eq. 10 and Alg. 1): x̂0 ← argmin ‖y − A x‖²/(2 σ_y²) + λ ‖x − x̂0‖²/(2 σ̂²), no
    product with the Jacobian. Their sampler is ddim, with eta for their ζ."""

    problem: Problem
    regularization: float = 1.0

    def bind(self, setting: Setting) -> Bound:
        regularization = checks.number("regularization", self.regularization, 0, above=True)
        measured = Measurement(self.problem, setting).needs_linear("inverse.DiffPIR")
        return Isotropic(measured, lambda noise: noise / regularization, through=False)


@dataclass(frozen=True, eq=False)
class ScoreALD(Guidance):
    """Annealed Langevin posterior sampling (Jalal et al. 2021, eq. 4): the score gets Aᵀ(y − A x_t/α)/(σ_y² + σ̂²)/α."""

    problem: Problem

    def bind(self, setting: Setting) -> Bound:
        return OfState(Measurement(self.problem, setting).needs_linear("inverse.ScoreALD"))


class OfState(GaussianBound):
    """A residual of the noisy state itself."""

    differentiates = False

    def with_density(self, moment: Moment, parts: dict[str, Tensor]) -> tuple[Tensor, Density]:
        measured, x = self.measured, moment.x.detach()
        noise = moment.sigma**2 / moment.alpha**2
        residual = parts["y"] - measured.of(x / like(moment.alpha, x))
        gain = moment.sigma**2 / moment.alpha**2 / (self.variance + noise)
        back = measured.adjoint(like(gain, residual) * residual)
        return moment.x0 + back, lambda: -0.5 * dot(residual, residual) / (self.variance + noise)
