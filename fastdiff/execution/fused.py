"""Layers of networks, fused, for inference: on a CPU by the compiled library, in float32, where an image's channels lie side by
side (torch's channels_last); group normalisation on a GPU by a Triton kernel, in float32, bfloat16 and float16. Everywhere else
they are what torch makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import one_line, warn
from . import cpu, ops, torch_private, verify


def fusable(x: Tensor, backend: str = "cpu") -> bool:
    """Whether layers of a backend ("cpu" or "triton") may work on x: plain numbers, of which nobody wants a derivative."""
    return (
        _unwatched()
        and _takes(x, backend)
        and not torch.is_autocast_enabled(x.device.type)
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > 0
    )


def _unwatched() -> bool:
    """Whether nobody wants a derivative of what is computed, or a record of it."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not torch_private.functorch_is_active()
        and not torch_private.forward_mode_is_active()
        and torch_private.dispatch_modes() == 0
        and torch_private.tracing_state() is None
    )


def _takes(x: Tensor, backend: str) -> bool:
    if backend == "cpu":
        return x.dtype is torch.float32 and x.ndim == 4 and x.device.type == "cpu" and cpu.available
    return ops.HAS_TRITON and (x.device.type == "cuda" or (x.device.type == "cpu" and ops.INTERPRETED))


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool = True
) -> Tensor:
    """silu(group_norm(x) * weight + bias): Wu & He 2018; Elfwing et al. 2017. x [B, C, *], weight and bias [C], or [B, C], one of
    each for every sample (FiLM, Perez et al. 2018)."""
    if (
        weight is not None
        and bias is not None
        and weight.ndim == bias.ndim
        and fusable(x)
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return cpu.group_norm(x, groups, weight, bias, eps, silu)
    if fusable(x, "triton"):
        kernel = _kernel(x, weight, bias, groups, eps, silu)
        if kernel is not None:
            return kernel(x, weight, bias)  # type: ignore[no-any-return]
    return _group_norm(x, groups, weight, bias, eps, silu)


def _group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    if any(v is not None and v.ndim == 2 for v in (weight, bias)):
        # the samples are viewed as channels of a single sample, so that PyTorch's fused kernel applies scale and shift, and its
        # fused backward reduces their gradients
        one = x.reshape(1, -1, *x.shape[2:])
        w, b = (None if v is None else v.expand(len(x), -1).reshape(-1) for v in (weight, bias))
        out = torch.group_norm(one, max(len(x) * groups, 1), w, b, eps).view(x.shape)
    else:
        out = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(out) if silu else out


SMALL = 2**22  # numbers of which a kernel is asked in double precision
_prepared: dict[Any, Callable[..., Any] | None] = {}  # what runs operands of a kind: a kernel's launches, or torch


def _kernel(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, silu: bool
) -> Callable[..., Any] | None:
    """The kernel's launches for operands like these, after it has given what torch does in float64, which it is asked once; None
    where it takes no such operands, or none on their device. One that gives other numbers, or does not compile, is the end of
    all Triton kernels on its device, with a warning."""
    if verify.refusal(x.device):
        return None
    kernels = ops.kernels()
    facts = kernels.tiles.facts
    kind = groups, eps, silu, facts(x), facts(weight), facts(bias)
    if kind not in _prepared and not verify.capturing(x.device):
        if len(_prepared) >= verify.MANY:
            _prepared.clear()
        fits = kernels.group_norm_fits(x, groups)
        try:
            wrong = _fault(kernels, x, weight, bias, groups, eps, silu) if fits else ""
        except torch.OutOfMemoryError:  # of what asks, where there is room for the run alone
            fits, wrong = False, ""
            warn(
                f"no memory to ask the kernel of a group_norm of {list(x.shape)}: PyTorch's runs instead",
                RuntimeWarning,
            )
        if wrong:
            verify.refuse(x.device, wrong)
        _prepared[kind] = kernels.prepare_group_norm(x, groups, weight, bias, eps, silu) if fits and not wrong else None
    return _prepared.get(kind)


def _fault(
    kernels: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, silu: bool
) -> str:
    """How the kernel differs from torch in float64, or in float32 where they are many, on other numbers of this kind, or why it
    does not run; or ""."""
    rows = 1 if x[:1].numel() > SMALL else 2
    x, weight, bias = (_irregular(v, rows) for v in (x, weight, bias))
    wide = torch.float64 if x.numel() <= SMALL else torch.float32
    asked = f"group_norm of {x.dtype} {list(x.shape)}"
    try:
        made = kernels.group_norm(x, groups, weight, bias, eps, silu)
        w, b = (None if v is None else v.to(wide) for v in (weight, bias))
        exact = _group_norm(x.to(wide), groups, w, b, eps, silu)
        apart, largest = float((made - exact).abs().max()), float(exact.abs().max())
    except torch.OutOfMemoryError:
        raise
    except verify.kernels_break() as error:
        return f"{asked} fails: {one_line(str(error))}"
    most = max(torch.finfo(x.dtype).eps, 1e-6 if wide is torch.float64 else 1e-5) * max(1.0, largest)
    return "" if apart <= most else f"{asked} is {apart:.1e} off"  # NaN is more


def _irregular(like: Tensor | None, rows: int) -> Any:
    """Other numbers in [-1.5, 2.5), of the same dtype, device and strides; of so many rows at most."""
    if like is None:
        return None
    once = like = like[:rows] if like.ndim > 1 else like
    for axis, step in enumerate(like.stride()):
        once = once.narrow(axis, 0, 1) if step == 0 else once  # whose numbers are in one place
    numbers = torch.arange(once.numel(), dtype=torch.int32, device=once.device) * 40503 % 65536 / 16384 - 1.5
    return once.new_empty_strided(once.shape, once.stride()).copy_(numbers.view(once.shape)).expand(like.shape)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v (Vaswani et al. 2017)."""
    if torch_private.functorch_is_active():  # whose vmap takes torch's fused attention sample by sample, and warns
        return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def plain(part: Tensor) -> bool:
    """Whether a layer's numbers are float32, and lie on the CPU without gaps."""
    return part.dtype is torch.float32 and _dense(part)


def _dense(part: Tensor) -> bool:
    dense = part.is_contiguous() or (part.ndim == 4 and part.is_contiguous(memory_format=torch.channels_last))
    return part.device.type == "cpu" and dense


class Keeps(nn.Module):
    """A layer for inference that keeps what it made of its weights, until they are others: another parameter, another version of
    it, or other ones among some 256 of its numbers, which only a change behind torch's back can leave as they were."""

    weight: Tensor
    # kind, weights, their version, some of them, what was made
    _kept: tuple[object, Tensor, int, Tensor, Tensor] | None = None

    def winograd(self) -> type[nn.Module] | None:
        """Its class with Winograd's convolution, where there is one."""
        return None

    def may_keep(self) -> bool:
        """Whether it may: on a CPU, where nobody wants a derivative or a record of the call, and of a parameter, as what else
        stands for one is new in each call."""
        return type(self.weight) is nn.Parameter and _unwatched() and _dense(self.weight)

    def kept(self, make: Callable[[], Tensor], kind: object = None) -> Tensor:
        """What `make` made of the weights, of that kind."""
        weight = self.weight
        count, step = weight.numel(), max(1, weight.numel() // 256)
        while math.gcd(step, count) > 1:  # else it would meet one input channel, or one place of the kernel, alone
            step += 1
        some = weight.detach().as_strided(((count - 1) // step + 1,), (step,))  # in whatever order they lie
        version = -1 if weight.is_inference() else weight._version
        known = self._kept
        if (
            known is None
            or known[0] != kind
            or known[1] is not weight
            or known[2] != version
            or not torch.equal(known[3], some)
        ):
            known = self._kept = (kind, weight, version, some.clone(), make())
        return known[4]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}


class WinogradConv2d(Keeps, nn.Conv2d):
    """A convolution of 3×3, in a quarter of the multiplications (Lavin & Gray 2016, F(4×4, 3×3)), to some 1e-5 of the largest
    output.

    For inference in float32 on a CPU; else as its class. Its transformed weights take four times the memory of its weights.
    """

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether a layer is such a convolution."""
        return (
            isinstance(layer, nn.Conv2d)
            and layer.kernel_size == (3, 3)
            and layer.stride == (1, 1)
            and layer.padding == (1, 1)
            and layer.dilation == (1, 1)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
            and plain(layer.weight)
            and (layer.bias is None or plain(layer.bias))
        )

    def forward(self, x: Tensor) -> Tensor:
        if not fusable(x) or x.shape[1] != self.in_channels or not self.fits(self) or not self.may_keep():
            return super().forward(x)
        weights = self.kept(lambda: cpu.winograd_weights(self.weight))
        return cpu.winograd(x.contiguous(memory_format=torch.channels_last), weights, self.bias, self.out_channels)


class PointwiseConv2d(nn.Conv2d):
    """A convolution of 1×1 as a product of matrices over the channels, which lie side by side."""

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        return (
            isinstance(layer, nn.Conv2d)
            and layer.kernel_size == (1, 1)
            and layer.stride == (1, 1)
            and layer.padding == (0, 0)
            and layer.dilation == (1, 1)
            and layer.groups == 1
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
