"""Training objectives of a score model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import checks, files
from .errors import ConfigError, ModelOutputError, choose, short
from .execution import ops, reference, tensor_checks
from .execution.calls import dtype_of, like
from .execution.loop import Condition
from .execution.modes import leaves_no_trace, stepping
from .execution.noise import PERTURBATION, PROBES
from .model import ScoreModel
from .planning import predictions
from .planning.processes import Process, require_linear

DENOISING = ("dsm", "simple", "likelihood")
SLICED = ("ssm", "ssm_vr")
LOSSES = (*DENOISING, "ism", *SLICED)
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


def check(model: ScoreModel, loss: str, probe: str | None = None) -> str:
    """The kind of probe, or a ConfigError: the loss must suit the process and the size of a sample."""
    choose("loss", loss, LOSSES)
    kind = choose("probe", "rademacher" if probe is None else probe, PROBE_KINDS)
    if probe is not None and loss not in SLICED:
        raise ConfigError(
            f"probe={short(probe)} belongs to the losses 'ssm' and 'ssm_vr', not to {loss!r}: leave it out"
        )
    if loss in DENOISING:
        require_linear(model.process, f"loss={loss!r}", "use loss='ssm_vr'")
    numbers = math.prod(model.data_shape)
    if loss == "ism" and numbers > LONGEST_TRACE:
        raise ConfigError(
            f"loss='ism' takes a backward pass through the network for each number of a sample and keeps them all, "
            f"at most {LONGEST_TRACE}, got {numbers}: use loss='ssm_vr'"
        )
    return kind


def per_sample(
    model: ScoreModel,
    x0: Tensor,
    t: Tensor,
    cursor: Tensor | None,
    loss: str,
    cond: Condition = None,
    probe: str | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """The loss of each sample, [B], for x0 [B, *] and times t [B]; all noise is what `cursor` names (ops.cursor).

    `noise` [B, *] is ε instead, for comparisons with other codes; then `cursor` is needed for probes alone. x0 is in the
    network's units (`ScoreModel.standardized`).

    x_t is made in x0's precision and given to the network in that of its parameters.

    The denoising losses are means over the elements of λ(t) (m − r·x0 − w·ε)², m the network's output and (r, w) what it
    predicts (fastdiff.predictions), so that the target of any prediction is one line; ε is never stored.

    "dsm"         denoising score matching with λ = σ²: ‖σ·score + ε‖², i.e. ε-matching whatever the network predicts
                  (Song et al. 2021, eq. 7; Ho et al. 2020, eq. 14 for an ε network)
    "simple"      λ = 1 on the network's own target: the DDPM targets as they stand; for "edm" Karras et al. 2022, eq. 8
    "likelihood"  λ = g²: the bound on the likelihood (Song, Durkan, Murray & Ermon 2021, eq. 7)

    The others need no transition density, only x_t (`perturb`), and the network's derivatives: with s the score, D elements,
    λ = σ², or 1 on a process that is not linear, and v a probe ("rademacher" ±1, unless "normal"), 2λ/D times

    "ism"         implicit score matching: tr ∇s + ½‖s‖², an exact trace by D products (Hyvärinen 2005, Theorem 1)
    "ssm"         sliced score matching: vᵀ∇s v + ½(vᵀs)² (SSM of Song, Garg, Shi & Ermon 2019)
    "ssm_vr"      its variance-reduced form: vᵀ∇s v + ½‖s‖² (their SSM-VR)

    On a linear process the expectation of each of the three is that of "dsm" less 1, at every t and for every network.

    Raises ConfigError (`check`), ModelOutputError where the network gives no gradient with respect to x.
    """
    kind = check(model, loss, probe)
    _check_noise(model, x0, cursor, loss, noise)
    if torch.compiler.is_compiling():
        return _per_sample(model, x0, t, cursor, loss, cond, kind, noise)
    tensor_checks.check_samples("x0", x0)
    return _step(model, x0, t, cursor, loss, cond, kind, noise)


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
    model: ScoreModel, x0: Tensor, t: Tensor, cursor: Any, loss: str, cond: Condition, kind: str, noise: Tensor | None
) -> Tensor:
    clean = x0 if x0.dtype in (torch.float32, torch.float64) else x0.float()
    dtype = dtype_of(model.net, x0.dtype)
    if loss in DENOISING:
        return _denoising(model, clean, dtype, t, cursor, loss, cond, noise)
    trained = torch.is_grad_enabled()
    # the derivatives in x are needed whether or not the caller wants those in the parameters
    with torch.inference_mode(False), torch.enable_grad():
        value = _with_trace(
            model, clean, dtype, t.clone(), None if cursor is None else cursor.clone(), loss, cond, kind, trained, noise
        )
    return value if trained else value.detach()


def _denoising(
    model: ScoreModel, clean: Tensor, dtype: torch.dtype, t: Tensor, cursor: Any, loss: str, cond: Condition,
    noise: Tensor | None,
) -> Tensor:  # fmt: skip
    process = model.process
    alpha, sigma = process.alpha(t), process.sigma(t)
    r, w = predictions.coordinates(model.prediction, process, t, alpha, sigma)
    noisy = (
        ops.perturb(clean, alpha, sigma, cursor, PERTURBATION) if noise is None else _with(noise, clean, alpha, sigma)
    )
    output = model(noisy.to(dtype), t, cond)
    weight = torch.ones_like(w)
    if loss != "simple":
        _, q = model.conversion("eps", t, alpha, sigma)  # of the error on the scale of ε
        weight = q**2 if loss == "dsm" else (q * process.diffusion(t) / sigma) ** 2
    if noise is None:
        return ops.dsm_loss(output, clean, r, w, weight, cursor, PERTURBATION)[0]
    error = output.to(clean.dtype) - _with(noise, clean, r, w)
    return (weight.double() * reference.tree_sum(error.double() ** 2) / max(clean[:1].numel(), 1)).to(clean.dtype)


def _with(noise: Tensor, clean: Tensor, r: Tensor, w: Tensor) -> Tensor:
    """r x0 + w ε."""
    return like(r, clean) * clean + like(w, clean) * noise.to(clean.dtype)


def _with_trace(
    model: ScoreModel, clean: Tensor, dtype: torch.dtype, t: Tensor, cursor: Any, loss: str, cond: Condition,
    kind: str, trained: bool, noise: Tensor | None,
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
    return ((2 * root * trace + square) / size).to(x.dtype)


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
            f"loss={loss!r} needs second derivatives of the model, and a part has none ({files.reason(error)}): give one "
            "that is not compiled"
        ) from error
