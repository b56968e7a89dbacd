"""The variational bound on −log p(x0) of a chain (Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, §2 and §3.1):

    L = KL(q(x_T|x0) ‖ p(x_T)) + Σ_{t ≥ 2} E KL(q(x_s|x_t, x0) ‖ p(x_s|x_t)) + E[−log p(x0|x_1)],   s = t − 1

with Gaussian q(x_s|x_t, x0) of mean μ̃ = c x0 + d x_t and variance β̃, c = α_s σ²_{t|s}/σ_t², and p of the same mean at the
predicted x̂0, so that the means differ by c (x0 − x̂0), and of a variance that is β̃, β = σ²_{t|s} or learned. For data on levels
p(x0|x_1) is the Gaussian's mass in x0's bin, the outermost bins without an end (Ho et al., eq. 13).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..data import Data
from ..errors import ConfigError, DataError, DTypeError, ShapeError, choose, names_keywords
from ..execution import ops, tensor_checks
from ..execution.calls import device_of, dtype_of, like, moved, picked
from ..execution.modes import leaves_no_trace, stepping
from ..execution.monitor import bar
from ..execution.noise import PERTURBATION
from ..execution.reference import tree_sum
from ..model import ScoreModel, opened
from ..planning.predictions import coordinates
from ..planning.processes import Process, require_linear

FIXED = ("posterior", "beta")
PASS = 2**18  # numbers of samples in one call of the network


class Levels(NamedTuple):
    """Data on equally spaced levels, in the network's units: the ends, and half the distance of two, each [*shape] or one."""

    low: Tensor
    high: Tensor
    half: Tensor


class Step(NamedTuple):
    """Of the step from t to s, each [B], float64: c, log β̃, log β, and whether s is the data.

    Where s is the data β̃ is 0, and what stands for it is that of the step before (Nichol & Dhariwal 2021, §3.1).
    """

    c: Tensor
    log_posterior: Tensor
    log_beta: Tensor
    last: Tensor


def chain_step(process: Process, t: Tensor) -> Step:
    """The step from a chain's t [B] to t − 1."""
    t = t.double()
    last = t <= 1
    before = (t - 1).clamp(min=process.first_time)
    alpha_s, sigma_s = process.alpha(before), process.sigma(before) * ~last
    c, posterior, beta = _transition(process, t, alpha_s, sigma_s)
    if bool(last.any()):
        second = torch.full_like(t[:1], min(2, process.T))
        earlier = _transition(process, second, process.alpha(second - 1), process.sigma(second - 1))[1]
        earlier = earlier if process.T > 1 else beta  # a chain of one step has no step before
        posterior = torch.where(last, earlier, posterior)
    return Step(c, posterior.log(), beta.log(), last)


def _transition(process: Process, t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """c, β̃ and β."""
    sigma = process.sigma(t)
    ratio = process.alpha(t) / alpha_s
    beta = sigma**2 - (ratio * sigma_s) ** 2
    return alpha_s * beta / sigma**2, beta * sigma_s**2 / sigma**2, beta


def log_variance(variance: str, step: Step, output: Tensor | None, like_x: Tensor) -> Tensor:
    """log of p's variance: of "posterior" and "beta" [B, 1, …], of a learned one [B, *] by the network's second half."""
    low, high = like(step.log_posterior, like_x), like(step.log_beta, like_x)
    if variance == "beta":  # Ho et al.'s own code has the other at the last step, for a better decoder
        return torch.where(like(step.last.double(), like_x) > 0, low, high)
    if output is None:
        return low
    if variance == "learned":
        return output.to(like_x.dtype)
    share = (output.to(like_x.dtype) + 1) / 2
    return low + share * (high - low)


def terms(step: Step, x0: Tensor, error: Tensor, log_var: Tensor, levels: Levels | None) -> Tensor:
    """The bound's term of each sample in nats, [B], float64, for x0 − x̂0 = `error` [B, *] and p's log variance."""
    log_posterior, difference = like(step.log_posterior, error), like(step.c, error) * error
    kl = 0.5 * (log_var - log_posterior - 1 + torch.exp(log_posterior - log_var) + difference**2 * torch.exp(-log_var))
    value = tree_sum(kl.expand_as(error).double())
    rows = step.last.nonzero()[:, 0]
    if not len(rows):
        return value
    first = _decoder(x0[rows].double(), error[rows].double(), log_var.expand_as(error)[rows].double(), levels)
    total: Tensor = value.index_put((rows,), tree_sum(first))
    return total


def _decoder(x0: Tensor, error: Tensor, log_var: Tensor, levels: Levels | None) -> Tensor:
    """−log p(x0|x_1) of each number, for x0 less the Gaussian's mean."""
    if levels is None:
        return 0.5 * (math.log(2 * math.pi) + log_var + error**2 * torch.exp(-log_var))
    low, high, half = (value.to(x0.device) for value in levels)
    scale = torch.exp(-0.5 * log_var)
    upper = torch.where(x0 > high - half, math.inf, (error + half) * scale)
    lower = torch.where(x0 < low + half, -math.inf, (error - half) * scale)
    # of two tails the one whose numbers are small: log(Φ(u) − Φ(l)) = log(Φ(−l) − Φ(−u))
    swap = lower > 0
    upper, lower = torch.where(swap, -lower, upper), torch.where(swap, -upper, lower)
    # an infinite end has no part in the gradient, which would be nan
    top = torch.special.log_ndtr(upper.clamp(max=40.0))
    open_end = lower == -math.inf
    bottom = torch.where(open_end, -math.inf, torch.special.log_ndtr(torch.where(open_end, 0.0, lower)))
    value: Tensor = -(top + torch.log(-torch.expm1((bottom - top).clamp(max=-1e-12))))
    return value


def levels_of(model: ScoreModel, data_range: tuple[float, float], bins: int) -> Levels:
    """Levels of data in `data_range` (the data's units where the model standardizes), in the network's units."""
    ends = (torch.full(model.data_shape, end, dtype=torch.float64) for end in data_range)
    low, high = (model.standardized(end[None])[0] for end in ends)
    return Levels(low, high, (high - low) / (2 * (bins - 1)))


@dataclass(frozen=True, eq=False, repr=False)
class VariationalBound:
    """A bound on −log p of B samples in nats: `prior` [B] and `terms` [B, N], steps from `times` [N], the last the decoder."""

    prior: Tensor
    terms: Tensor
    times: Tensor
    numbers: int

    @property
    def nats(self) -> Tensor:
        """[B], for data on levels ≥ −log P(x0), else ≥ −log p(x0)."""
        return self.prior + self.terms.sum(1)

    @property
    def bits_per_dim(self) -> Tensor:
        """nats/(D ln 2), [B], of samples of D numbers."""
        return self.nats / (self.numbers * math.log(2))

    def __repr__(self) -> str:
        bits, per = self.bits_per_dim, self.numbers * math.log(2)
        error = float(bits.std(correction=0)) / max(len(bits), 1) ** 0.5
        return (
            f"VariationalBound({float(bits.mean()):.4f} ± {error:.4f} bits/dim of {len(bits)} samples: prior "
            f"{float(self.prior.mean()) / per:.4f}, steps {float(self.terms[:, :-1].sum(1).mean()) / per:.4f}, decoder "
            f"{float(self.terms[:, -1].mean()) / per:.4f})"
        )


@leaves_no_trace
@names_keywords
def vlb(
    model: Any, x: Any, *, variance: str | None = None, steps: int | None = None, bins: int | None = None,
    cond: Any = None, seed: int = 0, first_sample: int = 0, batch_size: int | None = None, progress: bool | None = None,
) -> VariationalBound:  # fmt: skip
    """The variational bound of data under a chain's ancestral sampler, an upper bound of −log p (Ho et al. 2020, eq. 5).

    model       a ScoreModel, or its path or name
    x           data: a Data, on whose levels the decoder is discretised; or a tensor [B, *data_shape] in the model's data_range
                (in the data's units where it standardizes), on `bins` levels that fill it, or, with None, continuous: the bound
                is then of the density, and differs with the scale of x
    variance    of p: "posterior" β̃ (default), "beta"; a model with a learned one has that
    steps       of a continuous process: a chain of so many steps, equal in the log-SNR, from its start to its lowest noise,
                with variance β̃, and then a Gaussian of mean x̂0 and variance σ²/α² (Kingma et al. 2021, eq. 11 to 15);
                default 1000. They cost up to L²/(4 steps) nats a number, L the range of the log-SNR: 19 of "vp", 41 of
                "rectified_flow"
    seed, first_sample    the noise of each step is a function of (seed, step, sample)
    batch_size  samples in a call of the network; there is one call for each step and batch

    Errors: ConfigError, DataError (x outside of its range or between levels), ShapeError, DTypeError, before any call.
    """
    model = opened(model)
    if not isinstance(model, ScoreModel):
        raise ConfigError(f"model must be a ScoreModel, got {type(model).__name__}: wrap it, ScoreModel(net, sde, ...)")
    process = model.process
    require_linear(process, "the variational bound", "use fastdiff.log_likelihood where there is one")
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    kind = _variance(model, variance, process)
    if process.discrete:
        if steps is not None:
            raise ConfigError(
                f"steps={steps} is of continuous processes, and {process.name!r} has its own: leave it out"
            )
    else:
        steps = checks.integer("steps", 1000 if steps is None else steps, 1, 10**6)
    device = device_of(None, None, model.net)
    clean, levels, given = _data(model, x, bins)
    first_sample = checks.integer("first_sample", first_sample, 0, 2**32 - len(clean))
    cond = given if cond is None else cond
    model.condition(cond, len(clean), looks=True)  # refused before any call
    cond = moved(cond, device)
    batch = max(1, PASS // max(math.prod(model.data_shape), 1))
    batch = batch if batch_size is None else checks.integer("batch_size", batch_size, 1, 2**32)
    times = _times(process, steps)
    values = torch.empty((len(clean), len(times)), dtype=torch.float64)
    order = list(enumerate(reversed(list(enumerate(times.tolist())))))
    with torch.no_grad(), stepping(model.net), bar(progress, len(order), "vlb", "step") as display:
        for column, (number, _) in order:
            for start in range(0, len(clean), batch):
                part = slice(start, start + batch)
                x0 = clean[part].to(device)
                cursor = ops.cursor(number + 1, first_sample + start, seed, device)
                t, step = _step(process, times, number, len(x0), device)
                values[part, column] = _terms(
                    model, x0, t, step, cursor, kind, levels, None if cond is None else picked(cond, part)
                ).cpu()
            display.update()
    units = (
        0.0
        if model.standardize is None or levels is not None
        else float(torch.from_numpy(model.standardize[1]).log().sum())
    )
    values[:, -1] += units
    return VariationalBound(_prior(process, clean), values, times.flip(0), math.prod(model.data_shape))


def _variance(model: ScoreModel, variance: str | None, process: Process) -> str:
    if model.variance is not None and not process.discrete:
        raise ConfigError(
            f"a learned variance is of the steps of a chain, and {process.name!r} is continuous: use ddpm"
        )
    if variance is None:
        return model.variance or "posterior"
    kind = choose("variance", variance, (*FIXED, *([model.variance] if model.variance else [])))
    if kind == "beta" and not process.discrete:
        raise ConfigError("variance='beta' is of chains: leave it out")
    return kind


def _data(model: ScoreModel, x: Any, bins: int | None) -> tuple[Tensor, Levels | None, Any]:
    """x in the network's units, its levels, and the condition that it brings."""
    given = None
    if isinstance(x, Data):
        if bins is not None:
            raise ConfigError(f"bins={bins} contradicts the data's own {x.bins}: leave it out")
        if x.shape != model.data_shape:
            raise ShapeError(f"x must have the model's data_shape {model.data_shape}, got samples of {x.shape}")
        own = model.standardize is not None
        data_range, bins = x.range if own else model.data_range, x.bins
        given = model.takes.joined(x.labels if model.num_classes else None, x.cond if model.cond_shape else None)
        values = x.batch(torch.arange(len(x)), data_range)  # type: ignore[arg-type]
    else:
        tensor_checks.check_samples("x", x)
        if not x.is_floating_point():
            raise DTypeError(
                f"x must be floating numbers in the model's units, got {x.dtype}: give a Data, which has both"
            )
        if tuple(x.shape[1:]) != model.data_shape:
            raise ShapeError(f"x must have shape [B, {', '.join(map(str, model.data_shape))}], got {tuple(x.shape)}")
        tensor_checks.check_finite("x", x)
        data_range, values = model.data_range, x.detach().cpu()
    if bins is None:
        return model.standardized(values.double()), None, given
    bins = checks.integer("bins", bins, 2, 65536)
    low, high = data_range  # type: ignore[misc]
    position = (values.double() - low) / (high - low) * (bins - 1)
    off = (position - position.round()).abs().max() if position.numel() else torch.zeros(())
    if off > 0.01 or position.min() < -0.01 or position.max() > bins - 0.99:
        raise DataError(
            f"x must lie on the {bins} levels from {low:g} to {high:g}, got {float(values.min()):g} to {float(values.max()):g}"
            f"{' and values between levels' if off > 0.01 else ''}: give the right bins=, or bins=None for a density"
        )
    return model.standardized(values.double()), levels_of(model, (low, high), bins), given


def _times(process: Process, steps: int | None) -> Tensor:
    """The times from which a step leads down, increasing, float64."""
    if process.discrete:
        return torch.arange(1, int(process.T) + 1, dtype=torch.float64)
    ends = torch.tensor([process.t_noisy, process.t_start], dtype=torch.float64)
    low, high = (process.sigma(ends) / process.alpha(ends)).log().tolist()
    times = torch.as_tensor(process.time(torch.linspace(low, high, (steps or 1) + 1, dtype=torch.float64).exp()))
    return times.clamp(process.t_noisy, process.t_start)


def _step(process: Process, times: Tensor, number: int, count: int, device: torch.device) -> tuple[Tensor, Step]:
    """The times [B], and the step that leads down from there."""
    t = times[number].expand(count).to(device)
    if process.discrete:
        return t, chain_step(process, t)
    if number == 0:
        log_var = 2 * (process.sigma(t) / process.alpha(t)).log()
        return t, Step(torch.ones_like(t), log_var, log_var, torch.ones_like(t, dtype=torch.bool))
    s = times[number - 1].expand(count).to(device)
    c, posterior, beta = _transition(process, t, process.alpha(s), process.sigma(s))
    return t, Step(c, posterior.log(), beta.log(), torch.zeros_like(t, dtype=torch.bool))


def _terms(
    model: ScoreModel, x0: Tensor, t: Tensor, step: Step, cursor: Tensor, kind: str, levels: Levels | None, cond: Any
) -> Tensor:
    """The bound's term of each sample at one step."""
    alpha, sigma = model.process.alpha(t), model.process.sigma(t)
    noise = torch.empty(x0.shape, dtype=torch.float32, device=x0.device)
    torch.ops.fastdiff.normal(noise, cursor, PERTURBATION)
    noise = noise.double()
    x_t = like(alpha, x0) * x0 + like(sigma, x0) * noise
    output, second = model.outputs(x_t.to(dtype_of(model.net, torch.float32)), t.to(torch.float32), cond)
    r, w = coordinates(model.prediction, model.process, t, alpha, sigma)
    _, q = model.conversion("x0", t, alpha, sigma)
    error = like(q, x0) * (like(r, x0) * x0 + like(w, x0) * noise - output.double())
    log_var = log_variance(kind, step, None if kind in FIXED or second is None else second.double(), x0)
    return terms(step, x0, error, log_var, levels)


def _prior(process: Process, x0: Tensor) -> Tensor:
    """KL(q(x_T|x0) ‖ N(0, prior_std²)), [B]."""
    t = torch.tensor([float(process.t_start)], dtype=torch.float64)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    ratio = (sigma / process.prior_std) ** 2
    mean = (alpha / process.prior_std * x0.double()) ** 2
    return 0.5 * tree_sum(mean + (ratio - 1 - math.log(ratio)))
