"""Training objectives of a score model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import checks
from ..errors import ConfigError, ModelOutputError, choose, reason, short
from ..execution import ops, reference, tensor_checks
from ..execution.calls import dtype_of, like
from ..execution.loop import Condition
from ..execution.modes import leaves_no_trace, stepping
from ..execution.noise import PERTURBATION, PROBES
from ..model import ScoreModel
from ..planning import predictions
from ..planning.processes import Process, require_linear
from . import weights
from .bound import Levels, chain_step, log_variance, terms
from .weights import Learned, Weight

DENOISING = ("dsm", "dsm_vr", "vlb", "hybrid")
SLICED = ("ssm", "ssm_vr")
BOUNDED = ("vlb", "hybrid")  # which train a learned variance
# former losses that are "dsm" with a weight
PAIRS = {"simple": "target", "likelihood": "g2"}
LOSSES = ("dsm", *PAIRS, "dsm_vr", "vlb", "hybrid", "ism", *SLICED)
PROBE_KINDS = ("rademacher", "normal")

# An exact trace is one backward pass for each number of a sample, and all of them stay for the gradient.
LONGEST_TRACE = 1024
# Draw k of a simulated x_t has the stream PERTURBATION + 256 k: streams with a name of their own are below 256.
DRAWS_APART, MOST_DRAWS = 256, 2**20


def perturb(process: Process, x0: Tensor, t: Tensor, cursor: Tensor) -> Tensor:
    """x_t for x0 [B, *] and times t [B]: α(t) x0 + σ(t) ε, or what the `sample` of a process that is not linear makes.

    ε, and the first draw of `sample`, is the noise that `cursor` names (fastdiff.execution.ops.cursor).
    """
    if not torch.compiler.is_compiling():
        tensor_checks.check_samples("x0", x0)
    if process.linear:
        return ops.perturb(x0, process.alpha(t), process.sigma(t), cursor, PERTURBATION)

    def noise(k: int) -> Tensor:
        stream = PERTURBATION + DRAWS_APART * checks.integer("k", k, 0, MOST_DRAWS - 1)
        out = torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)
        torch.ops.fastdiff.normal(out, cursor, stream)
        return out

    with torch.no_grad():
        x: Tensor = process.sample(x0.detach().clone(), t, noise)
    tensor_checks.check_tensor(
        f"{type(process).__name__}.sample(x0, t, noise)", x, tuple(x0.shape), x0.device, finite=False
    )
    return x.to(x0.dtype)


def pair(loss: str, weight: Any = None) -> tuple[str, Weight | None]:
    """The loss and its weight: "simple" is "dsm" with weight "target", "likelihood" with "g2"; "vlb" has none but its own."""
    choose("loss", loss, LOSSES)
    if loss in PAIRS:
        if weight is not None:
            raise ConfigError(
                f"loss={loss!r} is loss='dsm' with weight={PAIRS[loss]!r}: to give another, use loss='dsm'"
            )
        return "dsm", weights.get(PAIRS[loss])
    if loss == "vlb":
        if weight is not None:
            raise ConfigError(
                f"weight={short(weight)} does not go with loss='vlb', whose terms have their own: leave it out"
            )
        return loss, None
    chosen = weights.get({"hybrid": "target"}.get(loss, "sigma2") if weight is None else weight)
    if loss == "hybrid" and isinstance(chosen, Learned):
        raise ConfigError(
            "weight='learned' does not go with loss='hybrid', whose bound is no part of the uncertainty: use weight='edm'"
        )
    return loss, chosen


def check(model: ScoreModel, loss: str, probe: str | None = None, weight: Any = None) -> str:
    """The kind of probe, or a ConfigError: loss and weight must suit the model and the size of a sample."""
    loss, chosen = pair(loss, weight)
    kind = choose("probe", "rademacher" if probe is None else probe, PROBE_KINDS)
    if probe is not None and loss not in SLICED:
        raise ConfigError(
            f"probe={short(probe)} belongs to the losses 'ssm' and 'ssm_vr', not to {loss!r}: leave it out"
        )
    if loss in DENOISING:
        require_linear(model.process, f"loss={loss!r}", "use loss='ssm_vr'")
    elif chosen is not None and chosen.name != "sigma2":
        require_linear(model.process, f"weight={chosen.name!r}", "leave it out")
    _check_variance(model, loss)
    numbers = math.prod(model.data_shape)
    if loss == "ism" and numbers > LONGEST_TRACE:
        raise ConfigError(
            f"loss='ism' takes a backward pass through the network for each number of a sample and keeps them all, "
            f"at most {LONGEST_TRACE}, got {numbers}: use loss='ssm_vr'"
        )
    return kind


def _check_variance(model: ScoreModel, loss: str) -> None:
    if model.variance is not None and not model.process.discrete:
        raise ConfigError(
            f"variance={model.variance!r} is of the steps of a chain, and {model.process.name!r} is continuous: use 'ddpm', or "
            "leave it out"
        )
    if loss in BOUNDED and not model.process.discrete:
        raise ConfigError(
            f"loss={loss!r} is the bound of a chain, and {model.process.name!r} is continuous: use 'ddpm', or the bound of "
            "continuous time, loss='dsm' with weight='g2'"
        )
    if loss == "hybrid" and model.variance is None:
        raise ConfigError(
            "loss='hybrid' trains a learned variance, and the model has none: build it with variance='learned_range' and a "
            "network of twice the channels, or use loss='simple'"
        )
    if model.variance is not None and loss not in BOUNDED:
        raise ConfigError(
            f"loss={loss!r} does not train the model's variance={model.variance!r}: use loss='hybrid' or 'vlb', or build the "
            "ScoreModel without it"
        )


def per_sample(
    model: ScoreModel,
    x0: Tensor,
    t: Tensor,
    cursor: Tensor | None,
    loss: str,
    cond: Condition = None,
    probe: str | None = None,
    noise: Tensor | None = None,
    weight: Any = None,
    vlb_weight: float = 0.001,
    levels: Levels | None = None,
) -> Tensor:
    """The loss of each sample, [B], for x0 [B, *] and times t [B]; all noise is what `cursor` names (ops.cursor).

    `noise` [B, *] is ε instead, for comparisons with other codes; then `cursor` is needed for probes alone. x0 is in the
    network's units (`ScoreModel.standardized`).

    x_t is made in x0's precision and given to the network in that of its parameters.

    The denoising losses are means over the elements of λ(t) (ε̂ − ε)², whatever the network predicts: with m its output and
    (r, w) what that is (fastdiff.predictions), λ q² (m − r·x0 − w·ε)², so that the target of any prediction is one line; ε is
    never stored. `weight`, a name or object of fastdiff.losses.weights, is λ of it: "sigma2" (default: 1 of ε), "g2", "one",
    "target", "edm", "min_snr", "p2", "learned".

    "dsm"         denoising score matching (Vincent 2011; Song et al. 2021, eq. 7; Ho et al. 2020, eq. 14 for an ε network)
    "simple"      "dsm" with weight "target": the DDPM targets as they stand; for "edm" Karras et al. 2022, eq. 8
    "likelihood"  "dsm" with weight "g2": the bound on the likelihood (Song, Durkan, Murray & Ermon 2021, eq. 7)
    "dsm_vr"      "dsm" less a control variate of mean 0, λ k (‖ε‖² + 2σ ε·score(α x0, t) − D)/D, k = α²/(α² + σ²), without
                  which its variance grows without bound as σ → 0 (Song & Kingma 2021, §3.2; Wang et al. 2020); two calls
                  of the network
    "vlb"         T times the variational bound's term at t, in bits per number (Ho et al. 2020, eq. 5): of means alone, or also
                  of a learned variance; x0 on `levels` (`levels_of`) for a discretised decoder, else a density
    "hybrid"      "dsm" with weight "target" + `vlb_weight` · "vlb", which trains the variance alone, its mean detached
                  (Nichol & Dhariwal 2021, eq. 16)

    The others need no transition density, only x_t (`perturb`), and the network's derivatives: with s the score, D elements,
    λ as above times σ², or 1 on a process that is not linear, and v a probe ("rademacher" ±1, unless "normal"), 2λ/D times

    "ism"         implicit score matching: tr ∇s + ½‖s‖², an exact trace by D products (Hyvärinen 2005, Theorem 1)
    "ssm"         sliced score matching: vᵀ∇s v + ½(vᵀs)² (SSM of Song, Garg, Shi & Ermon 2019)
    "ssm_vr"      its variance-reduced form: vᵀ∇s v + ½‖s‖² (their SSM-VR)

    On a linear process the expectation of each of the three is that of "dsm" less λ, at every t and for every network.

    Raises ConfigError (`check`), ModelOutputError where the network gives no gradient with respect to x.
    """
    kind = check(model, loss, probe, weight)
    loss, chosen = pair(loss, weight)
    _check_noise(model, x0, cursor, loss, noise)
    options = loss, chosen, cond, kind, noise, vlb_weight, levels
    if torch.compiler.is_compiling():
        return _per_sample(model, x0, t, cursor, *options)
    tensor_checks.check_samples("x0", x0)
    return _step(model, x0, t, cursor, *options)


@leaves_no_trace
def _step(model: ScoreModel, *args: Any) -> Tensor:
    with stepping(model.net):
        return _per_sample(model, *args)


def _check_noise(model: ScoreModel, x0: Tensor, cursor: Tensor | None, loss: str, noise: Tensor | None) -> None:
    if noise is not None:
        require_linear(model.process, "noise=", "give a cursor, by which its `sample` draws")
        tensor_checks.check_tensor("noise", noise, tuple(x0.shape), x0.device, finite=False)
    if cursor is None and (noise is None or loss in SLICED):
        raise ConfigError(
            f"cursor must name the noise of loss={loss!r}, got None: fastdiff.execution.ops.cursor(draw, sample, seed)"
        )


def _per_sample(
    model: ScoreModel, x0: Tensor, t: Tensor, cursor: Any, loss: str, weight: Weight | None, cond: Condition, kind: str,
    noise: Tensor | None, vlb_weight: float, levels: Levels | None,
) -> Tensor:  # fmt: skip
    clean = x0 if x0.dtype in (torch.float32, torch.float64) else x0.float()
    dtype = dtype_of(model.net, x0.dtype)
    if loss == "dsm":
        value = _denoising(model, clean, dtype, t, cursor, weight, cond, noise)
    elif loss in DENOISING:
        if noise is None:
            noise = torch.empty(clean.shape, dtype=torch.float32, device=clean.device)
            torch.ops.fastdiff.normal(noise, cursor, PERTURBATION)
        noise = noise.to(clean.dtype)
        if loss == "dsm_vr":
            value = _variance_reduced(model, clean, dtype, t, weight, cond, noise)
        else:
            value = _bound(model, clean, dtype, t, weight, cond, noise, vlb_weight, levels)
    else:
        trained = torch.is_grad_enabled()
        # the derivatives in x are needed whether or not the caller wants those in the parameters
        with torch.inference_mode(False), torch.enable_grad():
            value = _with_trace(
                model, clean, dtype, t.clone(), None if cursor is None else cursor.clone(), loss, weight, cond, kind, trained,
                noise,
            )  # fmt: skip
        value = value if trained else value.detach()
    if isinstance(weight, Learned):
        value = value + weight.uncertainty(model.process, t).to(value.dtype)
    return value


def _denoising(
    model: ScoreModel, clean: Tensor, dtype: torch.dtype, t: Tensor, cursor: Any, weight: Weight | None, cond: Condition,
    noise: Tensor | None,
) -> Tensor:  # fmt: skip
    process = model.process
    alpha, sigma = process.alpha(t), process.sigma(t)
    r, w = predictions.coordinates(model.prediction, process, t, alpha, sigma)
    noisy = (
        ops.perturb(clean, alpha, sigma, cursor, PERTURBATION) if noise is None else _with(noise, clean, alpha, sigma)
    )
    output = model(noisy.to(dtype), t, cond)
    factor = _of_output(model, weight, t, alpha, sigma)
    if noise is None:
        return ops.dsm_loss(output, clean, r, w, factor, cursor, PERTURBATION)[0]
    error = output.to(clean.dtype) - _with(noise, clean, r, w)
    return _mean_square(error, factor).to(clean.dtype)


def _of_output(model: ScoreModel, weight: Weight | None, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What multiplies the squared error of the output, [B]."""
    if isinstance(weight, weights.Target):
        return torch.ones_like(sigma)
    _, q = model.conversion("eps", t, alpha, sigma)  # of the error on the scale of ε
    factor = (weight or weights.Sigma2()).of_output(model.process, t, alpha, sigma, q)
    if isinstance(weight, Learned):
        factor = factor * (-weight.uncertainty(model.process, t)).exp().to(factor.dtype)
    return factor


def untrained(model: ScoreModel, weight: Weight | None, t: Tensor) -> Tensor:
    """The denoising loss at times t [B] of a network whose output is 0, [B], for data of the process's sigma_data: λ q² times its
    target's mean square r² σ_d² + w²."""
    process = model.process
    alpha, sigma = process.alpha(t), process.sigma(t)
    r, w = predictions.coordinates(model.prediction, process, t, alpha, sigma)
    target = (r.double() * process.sigma_data) ** 2 + w.double() ** 2
    value: Tensor = _of_output(model, weight, t, alpha, sigma).double() * target
    return value


def _mean_square(error: Tensor, factor: Tensor) -> Tensor:
    total: Tensor = factor.double() * reference.tree_sum(error.double() ** 2)
    return total / max(error[:1].numel(), 1)


def _variance_reduced(
    model: ScoreModel,
    clean: Tensor,
    dtype: torch.dtype,
    t: Tensor,
    weight: Weight | None,
    cond: Condition,
    noise: Tensor,
) -> Tensor:
    process = model.process
    alpha, sigma = process.alpha(t), process.sigma(t)
    p, q = model.conversion("eps", t, alpha, sigma)
    factor = _of_output(model, weight, t, alpha, sigma) / q**2

    def predicted(x: Tensor) -> Tensor:
        output: Tensor = model(x.to(dtype), t, cond)
        return like(p, x) * x + like(q, x) * output.to(x.dtype)

    error = predicted(_with(noise, clean, alpha, sigma)) - noise
    without = predicted(like(alpha, clean) * clean)  # ε̂ = −σ score where there is no noise
    k = alpha**2 / (alpha**2 + sigma**2)
    control = reference.tree_sum((noise * (noise - 2 * without) - 1).double()) / max(clean[:1].numel(), 1)
    value: Tensor = _mean_square(error, factor) - factor.double() * k.double() * control
    return value.to(clean.dtype)


def _bound(
    model: ScoreModel, clean: Tensor, dtype: torch.dtype, t: Tensor, weight: Weight | None, cond: Condition, noise: Tensor,
    vlb_weight: float, levels: Levels | None,
) -> Tensor:  # fmt: skip
    """ "vlb" and, with a weight, "hybrid"."""
    process = model.process
    alpha, sigma = process.alpha(t), process.sigma(t)
    r, w = predictions.coordinates(model.prediction, process, t, alpha, sigma)
    _, q = model.conversion("x0", t, alpha, sigma)
    output, second = model.outputs(_with(noise, clean, alpha, sigma).to(dtype), t, cond)
    error = _with(noise, clean, r, w) - output.to(clean.dtype)
    step = chain_step(process, t)
    log_var = log_variance(model.variance or "posterior", step, second, clean)
    of_mean = error if weight is None else error.detach()
    term = terms(step, clean, like(q, clean) * of_mean, log_var, levels)
    value = term * (float(process.T) / (math.log(2) * max(clean[:1].numel(), 1)))
    if weight is not None:
        value = vlb_weight * value + _mean_square(error, _of_output(model, weight, t, alpha, sigma))
    return value.to(clean.dtype)


def _with(noise: Tensor, clean: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """r x0 + w ε."""
    return like(r, clean) * clean + like(w, clean) * noise.to(clean.dtype)


def _with_trace(
    model: ScoreModel, clean: Tensor, dtype: torch.dtype, t: Tensor, cursor: Any, loss: str, weight: Weight | None,
    cond: Condition, kind: str, trained: bool, noise: Tensor | None,
) -> Tensor:  # fmt: skip
    """ "ism", "ssm" and "ssm_vr" by h = √λ s: 2√λ tr ∇h + ‖h‖² over D, and their slices."""
    process = model.process
    noisy = (
        perturb(process, clean, t, cursor) if noise is None else _with(noise, clean, process.alpha(t), process.sigma(t))
    )
    x = noisy.detach().clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no second derivative
        output = model(x.to(dtype), t, cond).to(x.dtype)
    p, q, root = _scaled_score(model, t)
    part = like(q, x) * output  # what of h passes through the network; the rest is p·x
    h = like(p, x) * x.detach() + part
    size, p, root = max(x[:1].numel(), 1), p.double(), root.double()
    if loss == "ism":
        trace = p * size
        for j in range(x[:1].numel()):
            trace = trace + _gradient(part.flatten(1)[:, j].sum(), x, trained, loss).flatten(1)[:, j]
    else:
        v = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        (torch.ops.fastdiff.rademacher if kind == "rademacher" else torch.ops.fastdiff.normal)(v, cursor, PROBES)

        def along(value: Tensor) -> Tensor:
            return ops.probe_dot(value, cursor, PROBES, kind, v)

        trace = p * along(v) + along(_gradient(along(part).sum(), x, trained, loss))
    square = along(h) ** 2 if loss == "ssm" else reference.tree_sum(h.double() ** 2)
    value = (2 * root * trace + square) / size
    if weight is not None and weight.name != "sigma2":
        alpha, sigma = process.alpha(t), process.sigma(t)
        _, q = model.conversion("eps", t, alpha, sigma)
        value = value * (_of_output(model, weight, t, alpha, sigma) / q**2).double()
    return value.to(x.dtype)


def _scaled_score(model: ScoreModel, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p, q, √λ), each [B], such that √λ·score = p·x + q·output."""
    process = model.process
    if not process.linear:
        return 0.0 * t, 0.0 * t + 1.0, 0.0 * t + 1.0
    alpha, sigma = process.alpha(t), process.sigma(t)
    return *model.conversion("scaled_score", t, alpha, sigma), sigma


def _gradient(value: Tensor, x: Tensor, trained: bool, loss: str) -> Tensor:
    """∂value/∂x, itself differentiable if the network is `trained` on it."""
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, x, create_graph=trained, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise ModelOutputError(
            f"loss={loss!r} needs gradients through the model, and its output has none with respect to x: look in it for "
            "no_grad, detach, argmax or numpy"
        )
    return gradient


@contextlib.contextmanager
def differentiating(loss: str) -> Iterator[None]:
    """Around the backward pass: a network without second derivatives is named as the cause."""
    try:
        yield
    except RuntimeError as error:
        absent = any(words in str(error) for words in ("once_differentiable", "is not implemented", "double backward"))
        if loss in DENOISING or not absent:
            raise
        raise ModelOutputError(
            f"loss={loss!r} needs second derivatives of the model, and a part has none ({reason(error)}): give one "
            "that is not compiled"
        ) from error
