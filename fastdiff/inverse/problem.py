"""An inverse problem y = A x0 + noise, and its operator as the methods meet it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, DataError, DTypeError, ShapeError, short, warn
from ..execution import tensor_checks
from ..execution.calls import like
from ..execution.modes import evaluating
from ..guidance.base import Setting
from .operators import Matrix

NOISES = ("gaussian", "poisson")
SEED = 0x0D07  # of the vectors that an operator is asked with
POWERS = 10  # iterations for a norm
ITERATIONS = 100  # of conjugate gradients at the most, where they call no network


@dataclass(frozen=True, eq=False)
class Problem:
    """y = A x0 + noise_std ε, or another noise, of data x0 in the units of the model's samples.

    y          [*m], for all samples, or [num_samples, *m]
    operator   A, batched: an object of this module, a matrix [m, D] on the flattened data, an object with `A` and `A_adjoint`
               (deepinv's Physics as they are), or a function [B, *data_shape] -> [B, *m], whose adjoint autograd finds
    noise_std  standard deviation of the noise, in the units of y, 0 for exact data; default the operator's
               `noise_model.sigma`
    noise      "gaussian"; "poisson": y counts of mean A x0; or a function (A x0 [B, *m], y [B, *m]) -> log p(y | x0) [B], up to
               a constant, of any number of samples, and finite also of what A makes of predictions of noisy samples: where
               that may leave its domain, as a mean of counts below 0, let it go on there
    """

    y: Tensor
    operator: Any
    noise_std: float | None = None
    noise: str | Callable[[Tensor, Tensor], Tensor] = "gaussian"
    looked: ClassVar[bool] = False  # whether the units of y were looked at

    def __post_init__(self) -> None:
        tensor_checks.check_dense("y", self.y)
        tensor_checks.check_floating("y", self.y)
        tensor_checks.check_finite("y", self.y)
        if isinstance(self.operator, Tensor):
            object.__setattr__(self, "operator", Matrix(self.operator))
        operator = self.operator
        has_both = callable(getattr(operator, "A", None)) and callable(getattr(operator, "A_adjoint", None))
        if not has_both and not callable(operator):
            raise ConfigError(
                "operator must be a matrix as a tensor [m, D], a function of x, or have A(x) and A_adjoint(y), got "
                f"{short(operator)}" + (": use torch.as_tensor" if hasattr(operator, "__array__") else "")
            )
        if not callable(self.noise) and self.noise not in NOISES:
            raise ConfigError(
                f"noise must be 'gaussian', 'poisson' or a function (A x0, y) -> log p(y | x0), got {short(self.noise)}"
            )
        if self.noise == "gaussian":
            object.__setattr__(self, "noise_std", self._noise_std())
        elif self.noise == "poisson" and bool((self.y < 0).any()):
            raise DataError(f"y must be counts, none below 0, for noise='poisson', got {float(self.y.min()):g}")
        if self.noise != "gaussian" and self.noise_std is not None:
            raise ConfigError(f"noise_std={short(self.noise_std)} is of Gaussian noise: leave it out")

    def _noise_std(self) -> float:
        given = None if self.noise_std is None else checks.number("noise_std", self.noise_std, 0)
        model = getattr(self.operator, "noise_model", None)
        own = getattr(model, "sigma", None)
        own = (
            float(own)
            if isinstance(own, (int, float, Tensor)) and (not isinstance(own, Tensor) or own.numel() == 1)
            else None
        )
        if given is None and own is None:
            raise ConfigError(
                "noise_std must be given, in the units of y, 0 for exact data: Problem(y, operator, 0.05)"
            )
        if given is not None and own is not None and not math.isclose(given, own, rel_tol=1e-6):
            raise ConfigError(
                f"noise_std={short(given)} contradicts the operator's own noise_model.sigma={own:g}: leave it out"
            )
        return checks.number("the operator's noise_model.sigma", own, 0) if given is None else given


class Linear(NamedTuple):
    """A linear operator and its adjoint; `shared`: the same of each sample."""

    forward: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor]
    shared: bool


class Measurement:
    """A problem at the shape, dtype and device of a run, checked; A, its linear part and adjoint are of the network's units."""

    def __init__(self, problem: Problem, setting: Setting) -> None:
        if not isinstance(problem, Problem):
            raise ConfigError(f"problem must be an inverse.Problem(y, operator, noise_std), got {short(problem)}")
        self.problem, self.model = problem, setting.model
        self.dtype, self.device = setting.dtype, setting.device
        self.noise_std = float(problem.noise_std or 0.0)
        shape = setting.model.data_shape
        generator = torch.Generator().manual_seed(SEED)
        u, v = (torch.randn((2, *shape), generator=generator).to(self.device, self.dtype) for _ in range(2))
        with torch.no_grad():
            forward = self._checked(self._raw(u), 2)
            self.shape = tuple(forward.shape[1:])
            self._check_y(problem.y, setting.count)
            alone = self._checked(self._raw(u[:1]), 1)
            zero = self._raw(torch.zeros_like(u))
            other, both = self._raw(v), self._raw(u - 2 * v)
        scale = float((forward.abs() + 2 * other.abs()).max()) or 1.0
        tolerance = 1e-9 if self.dtype == torch.float64 else 1e-3
        if not bool((alone - forward[:1]).abs().max() <= tolerance * scale):
            raise DataError(
                "operator must measure each sample by itself, and what it gives of one depends on others: no mean or sum over "
                "the first axis"
            )
        self.linear = bool(((both - zero) - ((forward - zero) - 2 * (other - zero))).abs().max() <= tolerance * scale)
        self.offset = zero[:1] if float(zero.abs().max()) > 0 else None
        if self.linear:
            self._check_adjoint(u, forward - zero, generator, tolerance)
            with torch.no_grad():
                self._warn_of_units(u[:1])

    def _check_y(self, y: Tensor, count: int) -> None:
        tensor_checks.check_device("y", y, self.device)
        if tuple(y.shape) not in (self.shape, (count, *self.shape)):
            raise ShapeError(
                f"y must have the shape {self.shape} that the operator gives of one sample, or {(count, *self.shape)} for "
                f"num_samples={count}, got {tuple(y.shape)}"
            )
        self.each = y.to(self.dtype).expand(count, *self.shape)

    def _warn_of_units(self, u: Tensor) -> None:
        """Warn where a y of Gaussian noise is much farther from A of the middle of the data's range than A takes any data in it;
        ‖A‖₂ by power iteration from u [1, *], as long as y is not explained."""
        within, y = self.model.network_range, self.each
        y = y[:1] if tuple(self.problem.y.shape) == self.shape else y
        if within is None or self.problem.looked or self.problem.noise != "gaussian" or len(y) == 0:
            return
        (low, high), noise = within, math.sqrt(math.prod(self.shape)) + math.sqrt(2 * math.log(len(y))) + 5
        far = float((y - self.of(torch.full_like(u, (low + high) / 2))).flatten(1).norm(dim=1).max())
        most = 0.0
        for _ in range(POWERS):
            u = self.adjoint(self.forward(u / u.norm()))
            size = math.sqrt(float(u.norm()) * math.prod(self.model.data_shape)) * (high - low) / 2
            most = max(most, 2 * size + noise * self.noise_std)
            if far <= most or size == 0:
                return
        warn(
            f"y runs from {float(y.min()):.4g} to {float(y.max()):.4g}, {2 * far / most:.3g} times as far as the "
            "operator takes data in the model's range: give it in the units of what the operator makes of samples"
        )

    def _check_adjoint(self, x: Tensor, forward: Tensor, generator: torch.Generator, tolerance: float) -> None:
        """⟨A x, y⟩ = ⟨x, Aᵀ y⟩."""
        y = torch.randn((2, *self.shape), generator=generator).to(self.device, self.dtype)
        back = self._adjoint(y)
        if back.shape != x.shape:
            raise ShapeError(
                f"operator.A_adjoint must return {tuple(x.shape)} of y {tuple(y.shape)}, got {tuple(back.shape)}"
            )
        left, right = (forward.double() * y).sum().item(), (x.double() * back).sum().item()
        size = float(forward.double().norm() * y.double().norm()) or 1.0
        if not abs(left - right) <= tolerance * size:
            way = (
                "correct one of them, or give A alone as a function, whose adjoint is found by autograd"
                if hasattr(self.problem.operator, "A_adjoint")
                else "autograd has another gradient of it than its own: look in it for detach or no_grad"
            )
            raise DataError(
                f"operator.A_adjoint is not the adjoint of A: <A x, y> = {left:.6g} and <x, A_adjoint y> = {right:.6g} for "
                f"random x and y: {way}"
            )

    def _checked(self, out: Any, count: int) -> Tensor:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            got = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise DTypeError(
                f"operator must return a tensor of real numbers, got {got}: complex ones by torch.view_as_real"
            )
        if out.ndim == 0 or len(out) != count:
            raise ShapeError(
                f"operator must be batched, [B, *] -> [B, *m], and gave {tuple(out.shape)} of {count} samples"
            )
        if out.ndim == 1 or out.numel() == 0:
            raise ShapeError(
                f"operator must give an axis of measurements beside the batch's, one at the least, [B, m], and gave "
                f"{list(out.shape)}: for one number keep its axis, as by keepdim=True, in y too"
            )
        tensor_checks.check_device("what the operator returns", out, self.device)
        tensor_checks.check_finite("what the operator returns", out)
        return out.to(self.dtype)

    def _raw(self, x: Tensor) -> Tensor:
        """A of data in their own units."""
        operator = self.problem.operator
        forward = getattr(operator, "A", None)
        with evaluating(operator):
            out: Tensor = forward(x) if callable(forward) else operator(x)
        return out

    def _adjoint(self, y: Tensor) -> Tensor:
        operator = self.problem.operator
        given = getattr(operator, "A_adjoint", None)
        if callable(given):
            out: Tensor = given(y)
            return out
        with torch.inference_mode(False), torch.enable_grad():
            zero = torch.zeros((len(y), *self.model.data_shape), dtype=y.dtype, device=y.device, requires_grad=True)
            out = self._differentiable(
                zero, "its adjoint is found by autograd: give an object with A(x) and A_adjoint(y)"
            )
            return torch.autograd.grad(out, zero, y)[0]

    def _differentiable(self, x: Tensor, why: str) -> Tensor:
        """A x of data that require a gradient; ConfigError, with the reason for one and a way out, where it has none."""
        try:
            out = self._raw(x)
        except RuntimeError as error:  # as numpy() raises it
            raise ConfigError(f"operator fails on an x that requires a gradient ({error}), and {why}") from error
        if not out.requires_grad:
            raise ConfigError(
                f"operator has no gradient with respect to x (look in it for no_grad, detach or numpy), and {why}"
            )
        return out

    def of(self, x0: Tensor) -> Tensor:
        """A x0 [B, *m] of x0 [B, *] in the network's units."""
        return self._raw(self.model.in_data_units(x0)).to(x0.dtype)

    def forward(self, v: Tensor) -> Tensor:
        """The linear part of `of`, of a difference v of states."""
        out = self._raw(self._scaled(v)).to(v.dtype)
        return out if self.offset is None else out - self.offset.to(v.dtype)

    def adjoint(self, u: Tensor) -> Tensor:
        """Its adjoint."""
        return self._scaled(self._adjoint(u)).to(u.dtype)

    def _scaled(self, v: Tensor) -> Tensor:
        if self.model.standardize is None:
            return v
        return v * torch.from_numpy(self.model.standardize[1]).to(v.device, v.dtype)

    def needs_linear(self, method: str) -> Measurement:
        """Itself; ConfigError where the operator is not linear, or the noise not Gaussian."""
        if self.problem.noise != "gaussian":
            raise ConfigError(
                f"{method} is for Gaussian noise, got noise={short(self.problem.noise)}: use inverse.SMC or "
                "inverse.MMPS"
            )
        if not self.linear:
            raise ConfigError(
                f"{method} is for a linear operator, and this one is not: use inverse.SMC or inverse.MMPS"
            )
        return self

    def needs_gradient(self, method: str, twice: bool = False) -> Measurement:
        """Itself; ConfigError where autograd does not see through the operator, or not through its gradient."""
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.zeros((2, *self.model.data_shape), dtype=self.dtype, device=self.device, requires_grad=True)
            other = ", or give one with A_adjoint to inverse.MMPS" if self.linear else ""
            why = f"{method} takes it: write it in torch{other}"
            out = self._differentiable(x, why)
            try:
                u = torch.ones_like(out, requires_grad=True)
                (back,) = torch.autograd.grad(out, x, u, create_graph=twice)
                if twice:
                    torch.autograd.grad(back, u, torch.ones_like(x))
            except RuntimeError as error:
                raise ConfigError(
                    f"operator's gradient fails ({error}), and {why}, without in-place operations"
                ) from error
        return self

    def solver(self) -> Callable[[Tensor, Any, float], Tensor]:
        """(residual [B, *m], gain, noise) -> (gain A Aᵀ + noise)⁻¹ residual; gain a number, or one for each sample [B].

        Where A Aᵀ = c 1, as random vectors say, it is a division; else by conjugate gradients, which call no network.
        """
        generator = torch.Generator().manual_seed(SEED)
        u = torch.randn((2, *self.shape), generator=generator).to(self.device, self.dtype)
        normal = self.forward(self.adjoint(u)).detach()
        scale = float(dot(u, normal).sum() / dot(u, u).sum())
        tolerance = 1e-10 if self.dtype == torch.float64 else 1e-5
        divides = scale > 0 and bool(((normal - scale * u).abs() <= tolerance * scale).all())
        most = min(ITERATIONS, math.prod(self.shape))

        def solved(residual: Tensor, gain: Any, noise: float) -> Tensor:
            gain = like(gain, residual) if isinstance(gain, Tensor) else gain
            if divides:
                return residual / (gain * scale + noise)
            return conjugate_gradients(lambda u: gain * self.forward(self.adjoint(u)) + noise * u, residual, most)

        return solved

    def log_density(self, mean: Tensor, y: Tensor, least: Tensor) -> Tensor:
        """log p(y | x0), [B], up to a constant, of mean = A x0 [B, *m]; `least` as in `poisson`."""
        noise = self.problem.noise
        if callable(noise):
            with evaluating(noise):
                value: Tensor = noise(mean, y)
            if isinstance(value, Tensor) and value.shape != (len(y),):
                raise ShapeError(
                    f"noise must return a number for each sample, [{len(y)}], got {list(value.shape)}: it is asked with any "
                    "number of samples, and what differs between them belongs in y"
                )
            return value
        if noise == "poisson":
            return poisson(mean.double(), y.double(), least).flatten(1).sum(1)
        return -0.5 * ((y - mean).double() / self.noise_std).square().flatten(1).sum(1)

    def check(self, name: str, given: Tensor, made: Tensor) -> None:
        """DataError where what was made of finite numbers is not finite."""
        if made.device.type == "cpu" and bool(given.isfinite().all()) and not bool(made.isfinite().all()):
            raise DataError(
                f"{name} gives {made[~made.isfinite()][0].item()} of predictions of noisy samples, {given.min():g} to "
                f"{given.max():g}, which may lie outside of its domain: let it be finite and go on there"
            )

    @property
    def part(self) -> Linear:
        """The linear part of `of`."""
        return Linear(self.forward, self.adjoint, True)

    def linearized(self, x0: Tensor) -> tuple[Tensor, Linear]:
        """A x0 [B, *m] of x0 [B, *] in the network's units, and its Jacobian there."""
        if self.linear:
            return self.of(x0.detach()), self.part
        at = x0.detach().clone().requires_grad_()
        with torch.enable_grad():
            mean = self.of(at)
            self.check("operator", x0, mean)
            u = torch.zeros_like(mean, requires_grad=True)
            (back,) = torch.autograd.grad(
                mean, at, u, create_graph=True
            )  # linear in u, so that its adjoint is the Jacobian

        def forward(v: Tensor) -> Tensor:
            return torch.autograd.grad(back, u, v, retain_graph=True)[0]

        def adjoint(u: Tensor) -> Tensor:
            return torch.autograd.grad(mean, at, u, retain_graph=True)[0]

        return mean.detach(), Linear(forward, adjoint, False)


def poisson(mean: Tensor, y: Tensor, least: Tensor) -> Tensor:
    """y log(mean/y) − mean + y, below `least` by the logarithm's second-order Taylor polynomial there and a parabola: predictions
    of noisy samples may be negative, where it must be finite and have a slope upwards."""
    below = (least - mean).clamp(min=0) / least
    log = torch.maximum(mean, least).log() - y.clamp(min=1e-300).log() - below - 0.5 * below.square()
    return y * log - mean + y - 0.5 * least * below.square()


def dot(u: Tensor, v: Tensor) -> Tensor:
    """⟨u, v⟩ of each sample, [B], float64."""
    return (u.double() * v.double()).flatten(1).sum(1)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], b: Tensor, iterations: int, tolerance: float = 1e-6
) -> Tensor:
    """S⁻¹ b [B, *] for a symmetric positive definite S, each sample by its own steps (Hestenes & Stiefel 1952); a sample whose
    residual is below `tolerance` of b, or whose S is not positive along the step, stands still. Returned is the iterate of the
    least residual: a trained network's Jacobian is not symmetric, and the later ones may diverge."""
    x, r = torch.zeros_like(b), b
    p, rr = r, dot(r, r)
    least, best, lowest = tolerance**2 * rr, x, rr
    for k in range(iterations):
        sp = apply(p)
        curvature = dot(p, sp)
        going = (rr > least) & (curvature > 0)
        if k + 1 < iterations and b.device.type == "cpu" and not bool(going.any()):
            break
        step = torch.where(going, rr / curvature.where(going, 1.0), 0.0)
        x = x + like(step, b) * p
        r = r - like(step, b) * sp
        after = dot(r, r)
        best = torch.where((after < lowest).view(-1, *[1] * (b.ndim - 1)), x, best)
        if k + 1 < iterations:
            lowest = torch.minimum(after, lowest)
            p = r + like(torch.where(going, after / rr.where(going, 1.0), 0.0), b) * p
            rr = torch.where(going, after, rr)
    return best
