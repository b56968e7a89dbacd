"""What fastdiff uses of torch's private interface, in one place (torch 2.11 to 2.13 have it all; a test holds each name).

CUDA builds alone have the last three, which are looked up when they are called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

# (a, b) -> whether two tensors share storage
is_alias_of = torch._C._is_alias_of  # type: ignore[attr-defined]
# () -> whether torch.func transforms are active, and how many dispatch modes are
functorch_is_active = torch._C._are_functorch_transforms_active
dispatch_modes = torch._C._len_torch_dispatch_stack
# () -> what torch.jit.trace is making, or None
tracing_state = torch._C._get_tracing_state
# (tensors, others, weight) -> None: each tensor ← tensor + weight·(other − tensor), in one call
foreach_lerp_ = torch._foreach_lerp_
# (weights, gradients, moments, squares, [], steps, lr=, beta1=, …) -> None: a step of Adam, of AdamW, in one call
fused_adam_, fused_adamw_ = torch._fused_adam_, torch._fused_adamw_
# (tensors) -> the 2-norm of each, in one call
foreach_norm = torch._foreach_norm
# (tensors, factor) -> None: each tensor ← factor·tensor, in one call
foreach_mul_ = torch._foreach_mul_


def default_store() -> Any:
    """The store of torch.distributed's default group, by which its processes found one another."""
    from torch.distributed import distributed_c10d  # which some builds of torch lack

    return distributed_c10d._get_default_store()


def forward_mode_is_active() -> bool:
    """Whether the caller is within torch.autograd.forward_ad.dual_level()."""
    return bool(forward_ad._current_level >= 0)


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """A block in which tensors are real ones, whatever modes the caller is within."""
    with torch._C.DisableTorchFunction(), _python_dispatch._disable_current_modes():
        yield


def is_fake(value: Any) -> bool:
    """Whether a tensor is a FakeTensor, or wraps one."""
    return bool(fake_tensor.is_fake(value))


def compiles_to_graphs(part: Any) -> bool:
    """Whether a module or a function is one of torch.compile's, and runs as CUDA graphs of torch's own."""
    for compiled in (part, _held(part, "_compiled_call_impl")):  # the latter is nn.Module.compile's
        config = _held(compiled, "get_compiler_config")
        if config is not None and (config() or {}).get("triton.cudagraphs"):
            return True
    return False


def uncompiled(function: Any) -> Any:
    """What torch.compile made a function of, or None."""
    return _held(function, "_torchdynamo_orig_callable")


def compile_in_place(net: torch.nn.Module) -> Callable[[], None]:
    """torch.compile a module's calls, of the same object; what takes that back."""
    before = _held(net, "_compiled_call_impl")
    net.compile()
    return lambda: setattr(net, "_compiled_call_impl", before)


def _held(part: Any, name: str) -> Any:
    """What an object itself holds, whatever attributes its class makes up."""
    return getattr(part, "__dict__", {}).get(name)


def end_allocate_to_pool(device: int, pool: Any) -> None:
    """End the routing of allocations to a graph's memory pool, which a failed capture leaves on."""
    torch._C._cuda_endAllocateToPool(device, pool)


def release_pool(device: int, pool: Any) -> None:
    """Count one user less of a graph's memory pool, whose memory goes with the last."""
    torch._C._cuda_releasePool(device, pool)


def clear_cublas_workspaces() -> None:
    """Free cuBLAS's workspaces, so that a graph allocates its own."""
    torch._C._cuda_clearCublasWorkspaces()
