"""Backward formulas of the operations that are trained through, and the same operations in plain differentiable PyTorch for
what has no use for such formulas: forward mode, torch.func and gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from . import reference


def _wide(value: Tensor, like: Tensor) -> Tensor:
    """value [B], to broadcast over like [B, *]."""
    return value.view(-1, *[1] * (like.ndim - 1))


def _no_gradient(ctx: Any, names: Sequence[str], first: int) -> None:
    """Refuse a gradient for the operation's arguments number `first` and after, of these names."""
    for offset, name in enumerate(names):
        if ctx.needs_input_grad[first + offset]:
            raise ConfigError(
                f"{name} must not require a gradient, only the samples and the network's output may: pass {name}.detach()"
            )


def _perturb_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _no_gradient(ctx, ("alpha", "sigma"), 1)
    ctx.save_for_backward(inputs[1])


def _perturb_backward(ctx: Any, grad: Tensor) -> Any:
    (alpha,) = ctx.saved_tensors
    return grad * _wide(alpha.to(grad.dtype), grad), None, None, None, None


def _dsm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    network, _, r, _, weight, _, _ = inputs
    _no_gradient(ctx, ("r", "w"), 2)
    ctx.save_for_backward(r, weight, output[1])
    ctx.dtype = network.dtype
    ctx.set_materialize_grads(False)


def _dsm_backward(ctx: Any, grad: Tensor | None, grad_error: Tensor | None) -> Any:
    r, weight, error = ctx.saved_tensors
    _, needs_x0, _, _, needs_weight, *_ = ctx.needs_input_grad
    served, total = getattr(ctx, "served", torch.ops.fastdiff), None
    if grad is not None and grad_error is None and not (needs_x0 or needs_weight or torch.is_grad_enabled()):
        return served.dsm_loss_backward(grad, error, weight, ctx.dtype), None, None, None, None, None, None
    if grad is not None and torch.is_grad_enabled():  # create_graph=True: this gradient will be differentiated
        total = error * _wide(2 / max(error[:1].numel(), 1) * weight.to(error.dtype) * grad, error)
    elif grad is not None:
        dtype = error.dtype if needs_x0 else ctx.dtype
        total = served.dsm_loss_backward(grad, error, weight, dtype)
    if grad_error is not None:
        total = grad_error if total is None else total + grad_error
    of_x0 = -_wide(r.to(error.dtype), error) * total if needs_x0 and total is not None else None
    of_weight = grad * error.square().flatten(1).mean(1) if needs_weight and grad is not None else None
    return None if total is None else total.to(ctx.dtype), of_x0, None, None, of_weight, None, None


def _embedding_setup(ctx: Any, inputs: Any, output: Any) -> None:
    t, frequencies, ctx.scale, _, ctx.order = inputs
    ctx.save_for_backward(t, frequencies, output)


def _embedding_backward(ctx: Any, grad: Tensor) -> Any:
    t, frequencies, out = ctx.saved_tensors
    half = len(frequencies)
    if ctx.order == "interleaved":
        (sine, cosine), (of_sine, of_cosine) = ((v[:, 0 : 2 * half : 2], v[:, 1 : 2 * half : 2]) for v in (out, grad))
    else:
        first = 0 if ctx.order == "sin_cos" else half
        (sine, cosine), (of_sine, of_cosine) = (
            (v[:, first : first + half], v[:, half - first : 2 * half - first]) for v in (out, grad)
        )
    angle = of_sine * cosine - of_cosine * sine
    of_t = ctx.scale * (angle * frequencies).sum(1)
    return of_t, (angle * (ctx.scale * t)[:, None]).sum(0), None, None, None


def _probe_setup(ctx: Any, inputs: Any, output: Any) -> None:
    value, cursor, ctx.stream, ctx.kind, probe = inputs
    if probe is not None and ctx.needs_input_grad[4]:
        raise ConfigError("probe must not require a gradient, it is noise: pass probe.detach()")
    ctx.save_for_backward(cursor, probe)
    ctx.of = (value.shape, value.dtype)


def _probe_backward(ctx: Any, grad: Tensor) -> Any:
    cursor, probe = ctx.saved_tensors
    shape, dtype = ctx.of
    if probe is None:
        probe = grad.new_empty(shape, dtype=torch.float32)
        fill = torch.ops.fastdiff.rademacher if ctx.kind == "rademacher" else torch.ops.fastdiff.normal
        fill(probe, cursor, ctx.stream)
    return (_wide(grad, probe) * probe).to(dtype), None, None, None, None


# operation -> (backward, setup_context), as torch.library.register_autograd takes them
FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "perturb": (_perturb_backward, _perturb_setup),
    "dsm_loss": (_dsm_backward, _dsm_setup),
    "timestep_embedding": (_embedding_backward, _embedding_setup),
    "probe_dot": (_probe_backward, _probe_setup),
}


def perturb(x0: Tensor, alpha: Tensor, sigma: Tensor, cursor: Tensor, stream: int) -> Tensor:
    """reference.perturb, up to rounding."""
    return _wide(alpha.to(x0.dtype), x0) * x0 + _wide(sigma.to(x0.dtype), x0) * _noise(x0, cursor, stream, "normal")


def dsm_loss(
    output: Tensor, x0: Tensor, r: Tensor, w: Tensor, weight: Tensor, cursor: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """reference.dsm_loss, up to rounding."""
    error = output.to(x0.dtype) - perturb(x0, r, w, cursor, stream)
    return weight.to(x0.dtype) * error.square().flatten(1).mean(1), error


def timestep_embedding(t: Tensor, frequencies: Tensor, scale: float, channels: int, order: str) -> Tensor:
    """reference.timestep_embedding, up to rounding."""
    angle = (t * scale)[:, None] * frequencies
    return reference.arranged(angle.sin(), angle.cos(), channels, order)


def probe_dot(value: Tensor, cursor: Tensor, stream: int, kind: str, probe: Tensor | None = None) -> Tensor:
    """reference.probe_dot, up to rounding."""
    probe = _noise(value, cursor, stream, kind) if probe is None else probe
    return (value.double() * probe.double()).flatten(1).sum(1)


def _noise(like: Tensor, cursor: Tensor, stream: int, kind: str) -> Tensor:
    out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    (torch.ops.fastdiff.rademacher if kind == "rademacher" else torch.ops.fastdiff.normal)(out, cursor, stream)
    return out.to(like.dtype)
