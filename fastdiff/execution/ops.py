"""The operations, and which backend runs them on which device.

Each operation of fastdiff.execution.reference is a torch.library operator `torch.ops.fastdiff.<name>` with the same arguments:
the compiled library runs it on CPU tensors, Triton on CUDA tensors, plain PyTorch on all others. `backend_module` returns one
backend's functions, for callers that need neither autograd nor tracing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, DeviceError, choose, names_keywords, warn
from . import autograd, cpu, noise, reference, tensor_checks, torch_private, verify

BACKENDS = ("auto", "reference", "cpu", "triton")
ENGINES = ("auto", "eager", "graph")

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


def resolve(
    backend: str, engine: str, device: torch.device, dtype: torch.dtype, uncaptured: str | None = "no loop is run"
) -> tuple[str, str, str]:
    """The backend and engine that will run a state of this dtype on this device, and a sentence saying why.

    uncaptured  why no loop can be captured on any backend (fastdiff.execution.graphs.obstacle), or None
    """
    choose("backend", backend, BACKENDS)
    choose("engine", engine, ENGINES)
    used, obstacle = _serves(device, dtype)
    requested = "" if backend == "auto" else f"backend={backend!r} was requested"
    if backend == "triton" and verify.refusal(device):  # which has been warned of, in the midst of a run
        used, requested = "reference", f"{requested}, but {obstacle.get(backend, '')}"
    elif backend in obstacle:
        raise ConfigError(
            f"backend={backend!r} cannot run here: {obstacle[backend]}; use backend='auto' or 'reference'"
        )
    elif requested:
        used = backend
    if uncaptured is None:
        unfit = {"reference": "the reference reads its row's number on the host"}
        unfit |= {"triton": "TRITON_INTERPRET=1 runs the kernels on the host"} if INTERPRETED else {}
        uncaptured = unfit.get(used)
    if engine == "graph" and uncaptured is not None:
        raise ConfigError(f"engine='graph' cannot run here: {uncaptured}; use engine='auto' or 'eager'")
    loop = "eager"
    if engine == "eager":
        manner = "engine='eager' was requested"
    elif uncaptured is not None:
        manner = f"its loop runs eagerly: {uncaptured}"
    else:
        loop, manner = "graph", "its loop replays CUDA graphs"
    if requested:
        return used, loop, f"{requested}; {manner}"
    if used == "reference":
        reasons = [f"not {name!r}: {reason}" for name, reason in obstacle.items()]
        return used, loop, "; ".join([*reasons, manner])
    return used, loop, f"{used!r} has fused kernels for {device.type} tensors; {manner}"


def ran(device: torch.device, backend: str, engine: str, why: str) -> tuple[str, str, str]:
    """What `resolve` said before a run; or, where kernels were refused in its midst, that plain PyTorch took their place."""
    refused = verify.refusal(device) if backend == "triton" else ""
    return ("reference", "eager", f"{why}; then plain PyTorch: {refused}") if refused else (backend, engine, why)


def _serves(device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The fastest backend for such a state, and why each of "cpu" and "triton" that cannot run it cannot."""
    obstacle = {}
    if device.type != "cpu":
        obstacle["cpu"] = f"it runs CPU tensors, not {device.type}"
    elif not cpu.available:
        obstacle["cpu"] = f"the compiled library is {'refused' if cpu.loaded else 'not loaded'} ({cpu.why})"
    if not HAS_TRITON:
        obstacle["triton"] = "triton is not installed"
    elif device.type != "cuda" and not INTERPRETED:
        obstacle["triton"] = f"it runs CUDA tensors, not {device.type} (or, for tests, any with TRITON_INTERPRET=1)"
    elif dtype == torch.float64:
        obstacle["triton"] = "its state is float32, not float64"
    elif refusal := verify.refusal(device):
        obstacle["triton"] = refusal
    return next((name for name in ("cpu", "triton") if name not in obstacle), "reference"), obstacle


HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def backend_module(name: str) -> ModuleType:
    """The module that implements every operation for a backend that `resolve` named."""
    return _proving() if name == "triton" else {"reference": reference, "cpu": cpu}[name]


@functools.cache
def _proving() -> ModuleType:
    return verify.proving(kernels())


def kernels() -> ModuleType:
    """The Triton kernels themselves: a folder of their own (setup.py), which needs triton."""
    return importlib.import_module("fastdiff.kernels")


def doctor() -> str:
    """Which backend runs which tensors on this machine, and why, in a few lines."""
    fused = ", ".join(SCHEMAS)
    lines = [f"operations     {fused}", f"reference      plain PyTorch {torch.__version__}: anything, anywhere"]
    if cpu.available:
        stale = "" if cpu.is_fresh() else "; STALE: csrc/ has changed since it was built: pip install -e . again"
        lines.append(
            f"cpu            {cpu.LIBRARY.name}, {cpu.instruction_set}, {torch.get_num_threads()} threads of torch{stale}"
        )
    else:
        lines.append(f"cpu            not available: {cpu.why}")
    here = torch.cuda.is_available()
    if HAS_TRITON:
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("clang", "gcc", "cc")), None)
        lacking = (
            "" if compiler else "; no C compiler found (clang, gcc, cc or CC=), which triton needs to launch kernels"
        )
        found = torch.cuda.get_device_name(0) if here else "no CUDA device here"
        lines.append(f"triton         {importlib.metadata.version('triton')}, {found}{lacking}")
    else:
        lines.append("triton         not available: it is not installed")
    for device, dtype in itertools.product(("cpu", "cuda"), (torch.float32, torch.float64)):
        name, obstacle = _serves(torch.device(device), dtype)
        reasons = [f"not {other!r}: {reason}" for other, reason in obstacle.items()] if name == "reference" else []
        why = "; ".join(reasons) or "every operation has its own kernel there"
        absent = "" if here or device == "cpu" else " (if there were such a device)"
        lines.append(f"{device:4} {str(dtype).removeprefix('torch.'):9} {name}{absent}: {why}")
    captured = "CUDA graphs on CUDA tensors" if here else "CUDA graphs need a CUDA device"
    lines.append(
        f"loops          eager on the CPU; {captured}, and a network that can be captured: return_info=True says why not"
    )
    return "\n".join(lines)


def signed(seed: int) -> int:
    """The 64 bits of a seed as an int64 has them."""
    return seed - 2**64 if seed >= 2**63 else seed


def cursor(draw: int, first_sample: int, seed: int, device: torch.device | None = None) -> Tensor:
    """The operations' `cursor`, int64 [3]: row (or draw), first sample, and the seed's 64 bits as a signed number."""
    return torch.tensor([draw, first_sample, signed(seed)], dtype=torch.int64, device=device)


@names_keywords
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
    place = tensor_checks.device_of(device)
    used, _, _ = resolve(backend, "auto", place, torch.float32)
    given = {"draw": draw, "first_sample": first_sample, "stream": stream}
    counters = {name: checks.integer(name, value, 0, 2**32 - 1) for name, value in given.items()}
    num_samples = checks.integer("num_samples", num_samples, 0, 2**32 - counters["first_sample"])
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    out = torch.empty((num_samples, *tensor_checks.shape_of(shape)), dtype=torch.float32, device=place)
    at = cursor(counters["draw"], counters["first_sample"], seed, place)
    backend_module(used).normal(out, at, counters["stream"])
    return out


def uniform(
    num_samples: int, shape: Sequence[int], *, seed: int, draw: int = 0, first_sample: int = 0, stream: int,
    device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    """fastdiff.execution.noise.uniform, on a CPU by the compiled library."""
    given = {"seed": seed, "draw": draw, "first_sample": first_sample}
    if not cpu.available or (device is not None and device.type != "cpu"):
        return noise.uniform(num_samples, shape, **given, stream=stream, device=device)
    words = _words(num_samples, math.prod(shape), cursor(**given, device=noise.HOST), stream).numpy().view(np.uint32)
    return torch.from_numpy((words >> 8).astype(np.float32) * np.float32(2.0**-24)).view(num_samples, *shape)


def permutation(n: int, *, seed: int, draw: int, stream: int = noise.DATA_ORDER) -> Tensor:
    """fastdiff.execution.noise.permutation, by the compiled library and numpy's sort, a fifth of the time."""
    if not cpu.available:
        return noise.permutation(n, seed=seed, draw=draw, stream=stream)
    words = _words(1, 2 * n, cursor(draw, 0, seed, noise.HOST), stream).numpy().view(np.uint32).reshape(n, 2)
    keys = (words[:, 0] >> 1).astype(np.int64) << 32 | words[:, 1]
    order = np.argsort(keys)
    if (np.diff(keys[order]) == 0).any():  # an order of equal keys is a stable sort's alone
        order = np.argsort(keys, kind="stable")
    return torch.from_numpy(order)


def _words(num_samples: int, numel: int, at: Tensor, stream: int) -> Tensor:
    out = torch.empty((num_samples, numel), dtype=torch.int32, device=noise.HOST)
    cpu.words(out, at, stream)
    return out


def _register() -> Any:
    library: Any = torch.library.Library("fastdiff", "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
        library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        if cpu.available:
            library.impl(name, getattr(cpu, name), "CPU")
        if HAS_TRITON:
            library.impl(name, _on_cuda(name), "CUDA")
        torch.library.register_fake(f"fastdiff::{name}", _faked(_FAKES.get(name, _writes)), lib=library)
    for name, (backward, setup) in autograd.FORMULAS.items():
        torch.library.register_autograd(f"fastdiff::{name}", backward, setup_context=setup, lib=library)
    return library


def _on_cuda(name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: getattr(_serving([*args, *kwargs.values()]), name)(*args, **kwargs)


def _serving(args: Sequence[Any]) -> ModuleType:
    """The backend for these arguments, by their device, and by whether any is float64."""
    tensors = _tensors(args)
    return _served(tensors[0].device, any(value.dtype is torch.float64 for value in tensors))


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments, which must be on one device."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    for values in args:
        if isinstance(values, (list, tuple)):
            tensors += [value for value in values if isinstance(value, Tensor)]
    place = tensors[0].device
    for value in tensors:
        if value.device != place:
            raise _elsewhere(place, value)
    return tensors


def _elsewhere(place: torch.device, value: Tensor) -> DeviceError:
    return DeviceError(f"all tensors must be on {place}, got one on {value.device}: use .to({str(place)!r})")


def _served(device: torch.device, wide: bool) -> ModuleType:
    key = (device.type, wide)
    if key not in _SERVED:
        _SERVED[key] = backend_module(_serves(device, torch.float64 if wide else torch.float32)[0])
    return _SERVED[key]


_SERVED: dict[tuple[str, bool], ModuleType] = {}


def _writes(*args: Any, **kwargs: Any) -> None:
    """The fake of an operation that returns nothing."""


def _faked(fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake that refuses tensors on different devices, some of which may be meta."""

    def of(*args: Any, **kwargs: Any) -> Any:
        _tensors([*args, *kwargs.values()])
        return fake(*args, **kwargs)

    return of


_FAKES: dict[str, Callable[..., Any]] = {
    "perturb": lambda x0, *_: x0.new_empty(x0.shape),
    "dsm_loss": lambda output, x0, *_: (x0.new_empty(x0.shape[:1]), x0.new_empty(x0.shape)),
    "dsm_loss_backward": lambda grad, error, weight, dtype: error.new_empty(error.shape, dtype=dtype),
    "timestep_embedding": lambda t, frequencies, scale, channels, order: t.new_empty((t.shape[0], channels)),
    "probe_dot": lambda value, *_: value.new_empty(value.shape[:1], dtype=torch.float64),
    "rk_error": lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape[:1])),
}


if cpu.available and (fault := verify.library_fault()):
    cpu.refuse(f"{cpu.LIBRARY.name} gives wrong numbers: {fault}")
if not cpu.available:
    warn(
        f"fastdiff runs on plain PyTorch, several times slower: {cpu.why}; {cpu.way_out}, and see `fastdiff doctor --verify`",
        RuntimeWarning,
    )
elif not cpu.is_fresh():
    warn(
        f"csrc/ has changed since {cpu.LIBRARY.name} was built: install fastdiff again (pip install -e .)",
        RuntimeWarning,
    )
_LIBRARY = _register()


def _function(name: str) -> Any:
    """The operation as an autograd function of its arguments and the backend's module, which it calls directly."""
    backward, setup = autograd.FORMULAS[name]

    def forward(ctx: Any, *args_and_module: Any) -> Any:
        *args, ctx.served = args_and_module
        output = getattr(ctx.served, name)(*args)
        setup(ctx, args, output)
        return output

    def also_none(ctx: Any, *grads: Any) -> Any:
        return *backward(ctx, *grads), None

    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(also_none)}
    )


_FUNCTIONS = {name: _function(name) for name in autograd.FORMULAS}


_TENSORS = (Tensor, torch.nn.Parameter)


def _run(name: str, *args: Any) -> Any:
    """torch.ops.fastdiff.<name>; for plain tensors past the dispatcher, which takes longer than a small operation."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.fastdiff, name)(*args)
    if torch_private.tracing_state() is not None or type(args[0]) not in _TENSORS:
        return getattr(torch.ops.fastdiff, name)(*args)  # torch.jit.trace and torch.fx record the operation
    if torch_private.functorch_is_active() or torch_private.forward_mode_is_active():
        return getattr(autograd, name)(*args)
    place = args[0].device
    trained, wide, plain = False, False, not torch_private.dispatch_modes()
    for value in args:
        if isinstance(value, Tensor):
            if value.device != place:
                raise _elsewhere(place, value)
            # subclasses and negated views are left to the dispatcher
            plain = plain and type(value) in _TENSORS and not value.is_neg()
            trained = trained or value.requires_grad
            wide = wide or value.dtype is torch.float64
    if not plain:
        return getattr(torch.ops.fastdiff, name)(*args)
    served = _served(place, wide)
    if trained and torch.is_grad_enabled():
        return _FUNCTIONS[name].apply(*args, served)
    return getattr(served, name)(*args)


def perturb(x0: Tensor, alpha: Tensor, sigma: Tensor, cursor: Tensor, stream: int) -> Tensor:
    """x_t = alpha_i·x0 + sigma_i·ε, [B, *]; see fastdiff.execution.reference.perturb."""
    noisy: Tensor = _run("perturb", x0, alpha, sigma, cursor, stream)
    return noisy


def dsm_loss(
    output: Tensor, x0: Tensor, r: Tensor, w: Tensor, weight: Tensor, cursor: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """Each sample's weighted mean squared error, [B], and the error, [B, *]; see fastdiff.execution.reference.dsm_loss."""
    loss_and_error: tuple[Tensor, Tensor] = _run("dsm_loss", output, x0, r, w, weight, cursor, stream)
    return loss_and_error


def timestep_embedding(t: Tensor, frequencies: Tensor, scale: float, channels: int, order: str) -> Tensor:
    """Sines and cosines of (scale·t)·frequencies, [B, channels]; see fastdiff.execution.reference.timestep_embedding."""
    features: Tensor = _run("timestep_embedding", t, frequencies, scale, channels, order)
    return features


def probe_dot(value: Tensor, cursor: Tensor, stream: int, kind: str, probe: Tensor | None = None) -> Tensor:
    """⟨v, value⟩ of each sample, float64 [B]; see fastdiff.execution.reference.probe_dot."""
    dots: Tensor = _run("probe_dot", value, cursor, stream, kind, probe)
    return dots
