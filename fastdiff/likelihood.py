"""What the probability-flow ODE gives: log-likelihoods, bits per dimension, latents and what lies between them."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import checks
from .errors import ConfigError, DataError, DTypeError, ShapeError, choose, names_keywords, short, unknown_keyword, warn
from .execution import ops, tensor_checks
from .execution.adaptive import Solution
from .execution.calls import device_of, parameters
from .execution.divergence import DERIVATIVES, Exact, Hutchinson, HutchPlusPlus, Probes, Reverse, uncompiled
from .execution.modes import leaves_no_trace
from .execution.noise import PROBES
from .execution.reference import tree_sum
from .model import ScoreModel, as_model, opened
from .planning.coverage import misfit
from .planning.predictions import TimeInput
from .planning.samplers import Adaptive
from .probability_flow import Trace, end_time
from .runs import Request, follow

LONGEST_TRACE = 4096  # an exact trace takes that many backward passes in each evaluation
MOST_PROBES = 10**6
# numbers of x, and samples, in one pass of the network where the caller does not say: more are no faster, and need memory
PASS, MOST_AT_ONCE = 2**17, 2048
MOST_HELD = 2**27  # numbers of the probes of one batch
TRACES = ("hutchinson", "hutch++", "exact")


@dataclass(frozen=True)
class LogLikelihood:
    """log p(x) of each sample, in nats.

    nats    [B], float64
    stderr  [B], the standard error of nats from the spread of the probes: NaN for a single one, 0 for the exact trace
    latent  [B, *], where the flow takes x, in the network's units: about N(0, prior_std²)
    nfe     [B], evaluations that each sample took
    x       [B, *], the data themselves
    """

    nats: Tensor
    stderr: Tensor
    latent: Tensor = field(repr=False)
    nfe: Tensor
    x: Tensor | None = field(default=None, repr=False)


@leaves_no_trace
@names_keywords
def log_likelihood(
    model: Any,
    x: Tensor,
    sde: Any = None,
    *,
    trace: str = "hutchinson",
    probes: int | Tensor = 1,
    probe: str | None = None,
    derivative: str = "reverse",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    variable: str = "asinh",
    form: str = "v",
    couple: bool = False,
    max_nfe: int = 100_000,
    t_min: float | None = None,
    prediction: str | None = None,
    time_input: TimeInput | None = None,
    cond: Any = None,
    seed: int = 0,
    first_sample: int = 0,
    batch_size: int | None = None,
    backend: str = "auto",
    progress: bool | None = None,
) -> LogLikelihood:
    """log p(x) of data x [B, *shape] under the probability-flow ODE of a model (Song et al. 2021, eqs. 13, 39):

        log p(x) = log N(x_T; 0, prior_std²) + ∫ ∇·(dx/dt) dt  from t_min to T, x_T where the flow takes x

    x is data in the model's units, float32 or float64, which is then the precision of the run (the integral has float64);
    float16 and bfloat16 are widened to float32, and so are latents. For levels such as uint8 there is `dequantize`.
    The density is that of the state at t_min, which is the data up to noise of standard deviation σ(t_min).

    trace         of the Jacobian in the divergence: "hutchinson" (an unbiased estimate), "hutch++" (a third of the `probes`
                  capture the Jacobian's range, a third the rest: for Jacobians of low rank), "exact" (up to 4096 numbers)
    probes        how many; each is one more backward pass in each evaluation, whose spread is the standard error; or the
                  vectors themselves, [K, B, *shape] of mean 0 and covariance 1
    probe         of "hutchinson": "rademacher" (±1, the default) or "normal"; the same
                  probes all along the flow, those of (seed, first_sample + i)
    derivative    "reverse" (one call of the network in each evaluation, for value and all probes) or "forward" (one for each
                  probe, without a graph in memory)
    rtol, atol, method, variable, form, couple, max_nfe    see fastdiff.samplers.Adaptive. For networks that vary fast in t the
                  default costs about 1000 evaluations, 1e-3 about 100, and the spread of the probes is often the larger error
    t_min         default 1e-5 on VE, VP, sub-VP and OU, the lowest noise of others (σ_min of EDM, a chain's first level)
    batch_size    samples in one call of the network; None: 2048, or fewer of more than 64 numbers. It changes no sample's steps
    other arguments as in fastdiff.sample

    Raises ConfigError, ShapeError, DTypeError, DeviceError or DataError before any work, ModelOutputError where the network
    gives no gradient, SolverError where the flow cannot be integrated: nothing half-integrated is returned.
    """
    solver = Adaptive(method, rtol, atol, variable, form, couple, max_nfe)
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    request, state, ends = _request(
        model, x, sde, t_min, prediction, time_input, cond, backend, "x", seed, first_sample
    )
    traces, estimates = _traces(request, trace, probes, probe, derivative)
    # the graphs of torch.compile allow one product, and no forward-mode derivatives
    one = isinstance(probes, int) and probes == 1
    alone = trace == "hutchinson" and one and derivative == "reverse"
    with contextlib.nullcontext() if alone else uncompiled():
        solution = _follow(
            request,
            state,
            ends,
            solver,
            batch_size,
            progress,
            "likelihood",
            traces=traces,
            integrals=estimates,
            columns=estimates if isinstance(probes, Tensor) else probes,
        )
    std, numbers = request.model.process.prior_std, math.prod(request.model.data_shape)
    prior = -0.5 * (tree_sum((solution.y.double() / std) ** 2) + numbers * math.log(2 * math.pi * std**2))
    mean = solution.integrals.mean(1, keepdim=True)
    square = (
        (solution.integrals - mean).square().sum(1) / (estimates - 1)
        if estimates > 1
        else torch.full_like(prior, math.nan)
    )
    stderr = torch.zeros_like(prior) if trace == "exact" else (square / estimates).sqrt()
    nats = prior + mean[:, 0]
    if request.model.standardize is not None:  # of x in the data's units
        nats = nats - float(np.log(request.model.standardize[1]).sum())
    bad = torch.nonzero(~nats.isfinite()).flatten()
    if len(bad):
        i = int(bad[0])
        raise DataError(
            f"x must have a log-likelihood that float64 holds, and that of sample {i} (largest |x| "
            f"{x[i].abs().max():.3g}) is {float(nats[i])}: check the units of x"
        )
    data = state if request.model.standardize is None else x.detach().to(state.dtype, copy=True)
    return LogLikelihood(nats, stderr, solution.y, solution.nfe, data)


@leaves_no_trace
@names_keywords
def encode(
    model: Any, x: Tensor, sde: Any = None, *, rtol: float = 1e-5, atol: float = 1e-5, method: str = "dopri5",
    variable: str = "asinh", form: str = "v", couple: bool = False, max_nfe: int = 100_000, t_min: float | None = None,
    prediction: str | None = None, time_input: TimeInput | None = None, cond: Any = None, batch_size: int | None = None,
    backend: str = "auto", progress: bool | None = None,
) -> Tensor:  # fmt: skip
    """The latent x_T [B, *] of data x [B, *]: where the probability-flow ODE takes it from t_min to T, about N(0, prior_std²).

    Arguments and errors as in `log_likelihood`; `decode` is the way back.
    """
    solver = Adaptive(method, rtol, atol, variable, form, couple, max_nfe)
    request, x, ends = _request(model, x, sde, t_min, prediction, time_input, cond, backend, "x")
    return _follow(request, x, ends, solver, batch_size, progress, "encode").y


@leaves_no_trace
@names_keywords
def decode(
    model: Any, z: Tensor, sde: Any = None, *, temperature: float = 1.0, denoise: bool = False, rtol: float = 1e-5,
    atol: float = 1e-5, method: str = "dopri5", variable: str = "asinh", form: str = "v", couple: bool = False,
    max_nfe: int = 100_000, t_min: float | None = None, prediction: str | None = None, time_input: TimeInput | None = None,
    cond: Any = None, batch_size: int | None = None, backend: str = "auto", progress: bool | None = None,
) -> Tensor:  # fmt: skip
    """Data x [B, *] of a latent z [B, *]: where the probability-flow ODE takes temperature·z from T to t_min.

    temperature   below 1 towards the typical, above 1 towards the rare (Kingma & Dhariwal 2018, §6: of the prior's std)
    denoise       end in the mean of x0 at t_min (Tweedie's formula), by one evaluation more

    Other arguments and errors as in `log_likelihood`.
    """
    heat = checks.number("temperature", temperature, 0)
    solver = Adaptive(method, rtol, atol, variable, form, couple, max_nfe, denoise)
    request, x, ends = _request(model, z, sde, t_min, prediction, time_input, cond, backend, "z")
    decoded = request.model.in_data_units(
        _follow(request, heat * x, ends[::-1], solver, batch_size, progress, "decode").y
    )
    far = request.model.outside(decoded) if request.model.range_given else None
    if far is not None:
        warn(f"the samples run {far}: look at z, or take a smaller rtol and atol")
    return decoded


def interpolate(
    model: Any, xa: Tensor, xb: Tensor, weights: Any, *, mode: str = "spherical", cond: Any = None, **options: Any
) -> Tensor:
    """Data [W, B, *] between xa and xb [B, *], through their latents: W weights from 0 (xa) to 1 (xb).

    mode      "spherical": sin((1−w)Ω)/sin Ω · za + sin(wΩ)/sin Ω · zb, Ω the angle between the latents, so that what lies
              between is as long as they are (Shoemake 1985; Song et al. 2021, appendix D.2); "linear": (1−w) za + w zb
    cond      of both ends, [B, …]
    options   `temperature` and `denoise` of the way back, and all of `encode`

    Raises as `encode`.
    """
    choose("mode", mode, ("spherical", "linear"))
    share = checks.sequence("weights", weights)
    if not share:
        raise ConfigError("weights must hold at least one number, such as torch.linspace(0, 1, 8), got none")
    keywords = [*inspect.signature(encode).parameters, "temperature", "denoise"]
    for name in options:
        if name not in keywords:
            raise unknown_keyword("interpolate", name, [*keywords[2:], "mode"])
    for name, end in (("xa", xa), ("xb", xb)):
        _check_samples(name, end)
        tensor_checks.check_finite(name, end)
    if xa.shape != xb.shape or xa.dtype != xb.dtype:
        raise ShapeError(f"xa and xb must be alike, got {tuple(xa.shape)} {xa.dtype} and {tuple(xb.shape)} {xb.dtype}")
    back = {name: options.pop(name) for name in ("temperature", "denoise") if name in options}
    checks.number("temperature", back.get("temperature", 1.0), 0)
    checks.flag("denoise", back.get("denoise", False))
    za, zb = [encode(model, end, cond=cond, **options) for end in (xa, xb)]
    a, b = za.flatten(1).double(), zb.flatten(1).double()
    w = torch.tensor(share, dtype=torch.float64, device=za.device)[:, None]
    of_a, of_b = 1 - w, w
    if mode == "spherical":
        lengths = a.norm(dim=1) * b.norm(dim=1)
        angle = torch.acos(((a * b).sum(1) / lengths.clamp(min=1e-300)).clamp(-1, 1))[None]
        flat = angle.sin() < 1e-6  # along one line there is no arc
        whole = torch.where(flat, 1.0, angle.sin())
        of_a, of_b = (torch.where(flat, v, (v * angle).sin() / whole) for v in (of_a, of_b))
    mixed = (of_a[..., None] * a + of_b[..., None] * b).to(za.dtype).view(len(share), *za.shape)
    every = {"cond": _repeated(cond, len(share)), **options}
    return decode(model, mixed.flatten(0, 1), **back, **every).view_as(mixed)


def bits_per_dim(ll: LogLikelihood, data_range: tuple[float, float], bins: int = 256) -> Tensor:
    """−log₂ P of discrete data for each of its D numbers, [B], bounded by the density over its bins (Theis et al. 2016, §3.1):

        −nats/(D ln 2) + log₂ bins − log₂(hi − lo)

    for data dequantised uniformly within its `bins` levels, which fill data_range = (lo, hi); 8 bits add 7 in [−1, 1] and 8
    in [0, 1]. `fastdiff.dequantize` makes such data.

    Raises DataError where the data leaves its range; warns once where it still stands on levels (a density at points
    says nothing of bins).
    """
    low, high = checks.pair("data_range", data_range)
    bins = checks.integer("bins", bins, 2, 2**32)
    if not isinstance(ll, LogLikelihood):
        raise ConfigError(f"ll must be what fastdiff.log_likelihood returns, got {type(ll).__name__}")
    numbers = max(math.prod(ll.latent.shape[1:]), 1)
    if ll.x is not None and ll.x.numel():
        _check_bins(ll.x, low, high, bins)
    return -ll.nats / (numbers * math.log(2)) + math.log2(bins) - math.log2(high - low)


def _request(
    model: Any, x: Any, sde: Any, t_min: float | None, prediction: str | None, time_input: TimeInput | None, cond: Any,
    backend: str, name: str, seed: int = 0, first_sample: int = 0,
) -> tuple[Request, Tensor, tuple[float, float]]:  # fmt: skip
    """What the public functions share: their arguments checked, x (called `name`) in the dtype of the state, and (t_min, T)."""
    _check_samples(name, x)
    model = opened(model)
    has_range = isinstance(model, ScoreModel)
    model = as_model(model, sde, None if has_range else tuple(x.shape[1:]), prediction, time_input)
    ends = end_time(model, sde, t_min, model.process.t_likelihood), model.process.t_start
    device = device_of(x.device, x, model.net)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    first = checks.integer("first_sample", first_sample, 0, 2**32 - len(x))
    request = Request(model, len(x), seed, first, cond, x, dtype, device, backend, "eager", "final", start_name=name)
    request.resolved  # noqa: B018 (refuses a backend that is not there)
    with torch.inference_mode(False):
        given = tensor_checks.resolved(x).detach().to(dtype).clone(memory_format=torch.contiguous_format)
        seen = model.standardized(given) if name == "x" else given
    if name == "x" and x.numel():
        (low, high), told = (
            model.data_range,
            has_range and (model.range_given or (model.standardize is None and len(model.data_shape) > 1)),
        )
        far = model.outside(given) if told else None
        if far is not None:
            warn(f"x runs {far}: is it in other units?")
        else:
            known = model.range_given and model.standardize is None and t_min is None
            said = misfit(model.process, float(seen.abs().max()), (high - low) / 8 if known else None, ends[0])
            if said is not None:
                warn(said)
    return request, seen, ends


def _traces(
    request: Request, trace: str, probes: int | Tensor, probe: str | None, derivative: str
) -> tuple[Callable[[int, int], Trace], int]:
    """(lo, hi) -> the trace for samples lo … hi − 1, and how many estimates it makes."""
    choose("trace", trace, TRACES)
    if probe is not None and trace != "hutchinson":
        raise ConfigError(f"probe={short(probe)} belongs to trace='hutchinson', not to {trace!r}: leave it out")
    choose("probe", probe or "rademacher", ("rademacher", "normal"))
    kind = DERIVATIVES[choose("derivative", derivative, DERIVATIVES)]
    if kind is Reverse and any(p.is_inference() for p in parameters(request.model.net)):
        raise ConfigError(
            "model has parameters made under inference_mode, through which there are no gradients: make it outside, or use "
            "derivative='forward'"
        )
    numbers = math.prod(request.model.data_shape)
    if isinstance(probes, Tensor):
        return _given_probes(request, trace, probes, probe, kind)
    count = checks.integer("probes", probes, 1, MOST_PROBES)
    if trace == "exact":
        if numbers > LONGEST_TRACE:
            raise ConfigError(
                f"trace='exact' costs {numbers} backward passes in each evaluation for as many numbers, more than "
                f"{LONGEST_TRACE}: use trace='hutchinson' with as many probes as the standard error asks for"
            )
        return lambda lo, hi: Exact(kind), 1
    if count * numbers > MOST_HELD:
        raise ConfigError(
            f"probes={count} of {numbers} numbers would hold more than {MOST_HELD} numbers for one sample: average the "
            "likelihoods of several seeds"
        )
    if trace == "hutch++" and (count % 3 or count // 3 >= numbers):
        raise ConfigError(
            f"probes must be a multiple of 3, less than 3·{numbers}, with trace='hutch++' on {numbers} numbers, got "
            f"{count}" + ("" if count % 3 else ": use trace='exact'")
        )
    operations = request.operations

    def drawn(probe: str, draw: int, count: int, lo: int, hi: int) -> Probes:
        shape = (hi - lo, count, *request.model.data_shape)
        vectors = torch.empty(shape, dtype=request.dtype, device=request.device)
        cursor = ops.cursor(draw, request.first_sample + lo, request.seed, request.device)
        getattr(operations, probe)(vectors, cursor, PROBES)
        return Probes(vectors.transpose(0, 1).contiguous())

    if trace == "hutchinson":
        return lambda lo, hi: Hutchinson(kind, drawn(probe or "rademacher", 0, count, lo, hi)), count
    third = count // 3

    def hutch_plus_plus(lo: int, hi: int) -> Trace:
        return HutchPlusPlus(kind, drawn("normal", 1, third, lo, hi), drawn("normal", 0, third, lo, hi))

    return hutch_plus_plus, third


def _given_probes(
    request: Request, trace: str, probes: Tensor, probe: str | None, kind: Any
) -> tuple[Callable[[int, int], Trace], int]:
    """Hutchinson's estimate by vectors [K, B, *] of the caller's."""
    if trace != "hutchinson" or probe is not None:
        named = f"probe={probe!r}" if probe is not None else f"trace={trace!r}"
        raise ConfigError(f"probes that are given are those of trace='hutchinson', got {named} too: leave it out")
    shape = request.shape
    if probes.ndim == 0 or not 1 <= len(probes) <= MOST_PROBES:
        raise ShapeError(f"probes must have shape [K, {', '.join(map(str, shape))}], got {tuple(probes.shape)}")
    tensor_checks.check_tensor("probes", probes, (len(probes), *shape), request.device, finite=True)
    vectors = probes.detach().to(request.dtype).resolve_neg()
    return lambda lo, hi: Hutchinson(kind, Probes(vectors[:, lo:hi].contiguous())), len(vectors)


def _follow(
    request: Request, x: Tensor, ends: tuple[float, float], solver: Adaptive, batch_size: int | None,
    progress: bool | None, what: str, columns: int = 1, **options: Any,
) -> Solution:  # fmt: skip
    """x along the flow from the first time of `ends` to the second; `columns` probes a sample."""
    numbers = max(math.prod(request.model.data_shape), 1)
    batch = max(1, min(MOST_AT_ONCE, PASS // numbers, MOST_HELD // (numbers * columns), 2**22 // columns))
    batch = batch if batch_size is None else checks.integer("batch_size", batch_size, 1, 2**32)
    if solver.couple and batch < request.count:
        raise ConfigError(
            f"couple=True takes its step from the whole batch, and batch_size={batch} < {request.count} would change it: "
            f"use couple=False, or batch_size={request.count}"
        )
    with torch.inference_mode(False):
        return follow(request, x, *ends, solver, batch=batch, progress=progress, what=what, **options)


def _check_samples(name: str, x: Any) -> None:
    if isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex():
        raise DTypeError(
            f"{name} must be floating numbers in the model's units, got {x.dtype}: for levels such as 0 … 255 use "
            "fastdiff.dequantize"
        )
    tensor_checks.check_dense(name, x)
    tensor_checks.check_floating(name, x)
    if x.ndim < 2:
        raise ShapeError(f"{name} must have shape [B, *shape], an axis of samples first, got {tuple(x.shape)}")


def _check_bins(x: Tensor, low: float, high: float, bins: int) -> None:
    least, most = (float(end) for end in x.aminmax())
    slack = 1e-4 * (high - low)
    if least < low - slack or most > high + slack:
        raise DataError(
            f"the data must lie in data_range=({low:g}, {high:g}), got {least:g} … {most:g}: scale it, or give its range"
        )
    some = x.flatten()[: 2**16].double()
    # levels are lo + (k + ½)·width or lo + k·width (hi − lo)/(bins − 1): either way few distinct numbers
    if len(some) > 4 * bins and len(some.unique()) <= bins:
        warn(
            f"the data stand on at most {bins} levels: bits per dimension of discrete data need it dequantised "
            "(fastdiff.dequantize), as a density at points says nothing of bins",
        )


def _repeated(cond: Any, times: int) -> Any:
    if isinstance(cond, dict):
        return {key: _repeated(value, times) for key, value in cond.items()}
    return None if cond is None else cond.repeat(times, *[1] * (cond.ndim - 1))
