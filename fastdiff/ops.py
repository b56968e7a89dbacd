"""The operations, and the one place where backends and devices differ.

Each operation of fastdiff.reference.row is a torch.library operator `torch.ops.fastdiff.<name>` with the same arguments:
the compiled library serves CPU tensors, Triton CUDA tensors, plain PyTorch all others. `backend_module`
gives the functions of one implementation, for callers that need neither autograd nor tracing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks, inputs, native
from .errors import ConfigError, choose
from .reference import noise, row

BACKENDS = ("auto", "reference", "cpu", "triton")
ENGINES = ("auto", "eager", "graph")

# A forked child has no threads of OpenMP's, and torch would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

SCHEMAS = {
    "normal": "(Tensor(a!) out, Tensor cursor, int stream) -> ()",
    "rademacher": "(Tensor(a!) out, Tensor cursor, int stream) -> ()",
    "step": "(Tensor(a!) out, Tensor table, Tensor cursor, int? stream, Tensor x, Tensor? m=None, Tensor[]? history=None, "
    "Tensor? guide=None, Tensor? v=None, Tensor? base=None, Tensor? z=None, Tensor? measured=None, Tensor? known=None, "
    "Tensor? mask=None, Tensor(b!)? pushed=None, Tensor(c!)? net_input=None, Tensor(d!)? first_bad=None) -> ()",
    "measure_langevin": "(Tensor(a!) measured, Tensor table, Tensor cursor, int? stream, bool batch, Tensor x, Tensor m, "
    "Tensor? guide=None, Tensor? z=None, Tensor(b!)? kept=None) -> ()",
    "perturb": "(Tensor x0, Tensor alpha, Tensor sigma, Tensor cursor, int stream) -> Tensor",
    "dsm_loss": "(Tensor output, Tensor x0, Tensor r, Tensor w, Tensor weight, Tensor cursor, int stream) -> (Tensor, Tensor)",
    "dsm_loss_backward": "(Tensor grad, Tensor error, Tensor weight, ScalarType dtype) -> Tensor",
    "timestep_embedding": "(Tensor t, Tensor frequencies, float scale, int channels, str order) -> Tensor",
    "probe_dot": "(Tensor value, Tensor cursor, int stream, str kind, Tensor? probe=None) -> Tensor",
    "rk_error": "(Tensor x, Tensor[] stages, Tensor h, float[] b, float[] e, float rtol, float atol) -> (Tensor, Tensor)",
}


def resolve(backend: str, engine: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str, str]:
    """The backend and engine that will run a state of this dtype on this device, and a sentence saying why."""
    choose("backend", backend, BACKENDS)
    choose("engine", engine, ENGINES)
    if engine == "graph":
        raise ConfigError("engine='graph' is not built in this version: use 'auto' or 'eager'")
    eager = "loops are not captured in this version"
    fastest, obstacle = _serves(device, dtype)
    if backend in obstacle:
        raise ConfigError(
            f"backend={backend!r} cannot run here: {obstacle[backend]}; use backend='auto' or 'reference'"
        )
    if backend != "auto":
        return backend, "eager", f"backend={backend!r} was asked for; {eager}"
    if fastest == "reference":
        reasons = [f"not {name!r}: {reason}" for name, reason in obstacle.items()]
        return fastest, "eager", "; ".join([*reasons, eager])
    return fastest, "eager", f"{fastest!r} has fused kernels for {device.type} tensors; {eager}"


def _serves(device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The fastest backend for such a state, and why each of the other fused ones cannot run it."""
    obstacle = {}
    if device.type != "cpu":
        obstacle["cpu"] = f"it runs CPU tensors, not {device.type}"
    elif not native.available:
        obstacle["cpu"] = f"the compiled library is missing ({native.why})"
    if not HAS_TRITON:
        obstacle["triton"] = "triton is not installed"
    elif device.type != "cuda" and not INTERPRETED:
        obstacle["triton"] = f"it runs CUDA tensors, not {device.type} (or, for tests, any with TRITON_INTERPRET=1)"
    elif dtype == torch.float64:
        obstacle["triton"] = "its state is float32, not float64"
    return next((name for name in ("cpu", "triton") if name not in obstacle), "reference"), obstacle


HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def backend_module(name: str) -> ModuleType:
    """The module that implements every operation for a backend that `resolve` named."""
    if name == "triton":
        from . import kernels

        return kernels
    return {"reference": row, "cpu": native}[name]


def doctor() -> str:
    """Which backend serves which tensors here, and why, in a few lines."""
    float32, cpu, cuda = torch.float32, torch.device("cpu"), torch.device("cuda", 0)
    fused = ", ".join(SCHEMAS)
    lines = [f"operations     {fused}", f"reference      plain PyTorch {torch.__version__}: anything, anywhere"]
    if native.available:
        stale = "" if native.is_fresh() else "; STALE: csrc/ has changed since it was built, install again"
        lines.append(
            f"cpu            {native.LIBRARY.name}, {native.instruction_set}, {torch.get_num_threads()} threads of torch{stale}"
        )
    else:
        lines.append(f"cpu            not available: {native.why}")
    if HAS_TRITON:
        found = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA device here"
        lines.append(f"triton         {importlib.metadata.version('triton')}, {found}")
    else:
        lines.append("triton         not available: it is not installed")
    for title, device, dtype in (
        ("CPU float32", cpu, float32), ("CPU float64", cpu, torch.float64),
        ("CUDA float32", cuda, float32), ("CUDA float64", cuda, torch.float64),
    ):  # fmt: skip
        name, obstacle = _serves(device, dtype)
        reasons = [f"not {other!r}: {reason}" for other, reason in obstacle.items() if name == "reference"]
        lines.append(f"{title:14} {name}" + "".join(f"; {reason}" for reason in reasons))
    return "\n".join(lines)


def cursor(draw: int, first_sample: int, seed: int, device: torch.device | None = None) -> Tensor:
    """Where noise stands, for the operations: int64 [3]."""
    return torch.tensor([draw, first_sample, seed - 2**64 if seed >= 2**63 else seed], dtype=torch.int64, device=device)


def normal(
    num_samples: int,
    shape: Sequence[int],
    *,
    seed: int,
    draw: int = 0,
    first_sample: int = 0,
    stream: int = noise.PRIOR,
    backend: str = "auto",
    device: torch.device | str | None = None,
) -> Tensor:
    """fastdiff's normals (FDN1), float32 [num_samples, *shape]: a pure function of (seed, stream, sample, draw, element).

    Row i belongs to sample `first_sample + i`. The bits are the same on every machine, backend and batch split.
    """
    place = inputs.device_of(device)
    used, _, _ = resolve(backend, "auto", place, torch.float32)
    given = {"draw": draw, "first_sample": first_sample, "stream": stream}
    counters = {name: checks.integer(name, value, 0, 2**32 - 1) for name, value in given.items()}
    num_samples = checks.integer("num_samples", num_samples, 0, 2**32 - counters["first_sample"])
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    out = torch.empty((num_samples, *inputs.shape_of(shape)), dtype=torch.float32, device=place)
    at = cursor(counters["draw"], counters["first_sample"], seed, place)
    backend_module(used).normal(out, at, counters["stream"])
    return out


def _register() -> torch.library.Library:
    library = torch.library.Library("fastdiff", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, getattr(row, name), "CompositeExplicitAutograd")
        if native.available:
            library.impl(name, getattr(native, name), "CPU")
        if HAS_TRITON:
            library.impl(name, _on_cuda(name), "CUDA")
        torch.library.register_fake(f"fastdiff::{name}", _FAKES.get(name, _writes), lib=library)
    for name, (backward, setup) in _GRADIENTS.items():
        torch.library.register_autograd(f"fastdiff::{name}", backward, setup_context=setup, lib=library)
    return library


def _on_cuda(name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        wide = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in values)
        return getattr(row if wide else backend_module("triton"), name)(*args, **kwargs)

    return run


def _writes(*_: Any, **__: Any) -> None:
    """The fake of an operation that returns nothing."""


_FAKES: dict[str, Callable[..., Any]] = {
    "perturb": lambda x0, *_: x0.new_empty(x0.shape),
    "dsm_loss": lambda output, x0, *_: (x0.new_empty(x0.shape[:1]), x0.new_empty(x0.shape)),
    "dsm_loss_backward": lambda grad, error, weight, dtype: error.new_empty(error.shape, dtype=dtype),
    "timestep_embedding": lambda t, frequencies, scale, channels, order: t.new_empty((t.shape[0], channels)),
    "probe_dot": lambda value, *_: value.new_empty(value.shape[:1], dtype=torch.float64),
    "rk_error": lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape[:1])),
}


def _wide(value: Tensor, like: Tensor) -> Tensor:
    """value [B], to broadcast over like [B, *]."""
    return value.view(-1, *[1] * (like.ndim - 1))


def _no_gradient(ctx: Any, names: Sequence[str], first: int) -> None:
    for offset, name in enumerate(names):
        if ctx.needs_input_grad[first + offset]:
            raise ConfigError(
                f"{name} must not require a gradient: only the samples and the network are trained through"
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
    total = None if grad is None else dsm_loss_backward(grad, error, weight, error.dtype if needs_x0 else ctx.dtype)
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
        raise ConfigError("probe must not require a gradient: it is noise")
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


_GRADIENTS = {
    "perturb": (_perturb_backward, _perturb_setup),
    "dsm_loss": (_dsm_backward, _dsm_setup),
    "timestep_embedding": (_embedding_backward, _embedding_setup),
    "probe_dot": (_probe_backward, _probe_setup),
}

if not native.available:
    warnings.warn(
        f"fastdiff runs on plain PyTorch, several times slower: {native.why}; install it again with a C++ compiler "
        "(g++ or clang++), and see `fastdiff doctor`",
        RuntimeWarning,
        stacklevel=2,
    )
_LIBRARY = _register()


def _operator(name: str) -> Callable[..., Any]:
    """torch.ops.fastdiff.<name>; called on plain tensors, its implementation at once, which costs a tenth."""
    operator = getattr(torch.ops.fastdiff, name)
    backward, setup = _GRADIENTS.get(name, (None, None))

    def forward(*args: Any) -> Any:
        device, dtype = args[0].device, args[0].dtype
        served = _SERVED.get((device.type, dtype)) or _SERVED.setdefault(
            (device.type, dtype), backend_module(_serves(device, dtype)[0])
        )
        return getattr(served, name)(*args)

    def remembering(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup(ctx, args, output)
        return output

    function = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(remembering), "backward": staticmethod(backward)}
    )

    def call(*args: Any) -> Any:
        trained = False
        for value in args:
            if isinstance(value, Tensor):
                if type(value) is not Tensor and type(value) is not torch.nn.Parameter:
                    return operator(*args)
                trained |= value.requires_grad
        if not _is_plain():
            return operator(*args)
        return function.apply(*args) if trained and torch.is_grad_enabled() else forward(*args)

    return call


_SERVED: dict[tuple[str, torch.dtype], ModuleType] = {}


def _is_plain() -> bool:
    """Whether tensors are just numbers here: nothing compiles, exports, transforms or watches the call."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd.forward_ad._current_level >= 0
    )


perturb, dsm_loss, dsm_loss_backward = map(_operator, ("perturb", "dsm_loss", "dsm_loss_backward"))
timestep_embedding, probe_dot = map(_operator, ("timestep_embedding", "probe_dot"))
