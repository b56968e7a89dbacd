"""How a state [B, *] is cut into programs, how its elements are addressed, and how kernels are launched.

A quad is four consecutive elements of a sample: one counter of the noise, one 128-bit access. A program works on SAMPLES
rows of QUADS quads: on one row, a part of a sample, where samples are long; on several whole samples where they are short.
So no element's address needs a division, and short samples leave no lanes idle. Whatever part of an address could pass 2³¹
is a 64-bit scalar of the program; elements add 32-bit offsets to it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Chosen from compiled SASS (128-bit accesses, no spills, some 80 registers: tests/aot.py), not yet measured on a GPU: 1024
# elements a program, 16 a thread of a GPU whose warps have 32. With 8 a thread a step has a sixth more instructions, a sum a
# quarter, and as many elements' loads are under way.
QUADS = 256
WARPS = 2

# How many samples the grid's second dimension counts, of the 65,535 that it could: the third goes on from there
SPAN = tl.constexpr(32768)


class Place(NamedTuple):
    """Where a program works, in a state [B, D] of B samples of D elements each. Two 64-bit scalars lead to its first
    element, and 32-bit numbers, one for each of its elements, from there on."""

    first: Any  # int64 scalar: its first sample
    start: Any  # int64 scalar: its first element in that sample
    base: Any  # int64 scalar: first·D + start
    row: Any  # int32 [elements]: which of its samples
    j: Any  # int32 [elements]: the element's number in its sample, less start
    local: Any  # int32 [elements]: row·D + j, so that base + local is the element's number in a contiguous state
    inside: Any  # bool [elements]: whether there is such an element


@triton.jit
def left(size, start, WHOLE: tl.constexpr):
    """How many elements a sample has from `start` on, at least 0 and at most 2³⁰. If WHOLE it is written as 4·k, so that
    Triton proves it divisible by four and emits 128-bit accesses."""
    if WHOLE:
        return tl.minimum(size - (start >> 2), 1 << 28).to(tl.int32) * 4
    return tl.minimum(size - start, 1 << 30).to(tl.int32)


@triton.jit
def place(size, batch, GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr, WHOLE: tl.constexpr):
    """This program's Place.

    size: D, or D / 4 if WHOLE, where D is a multiple of four: then all offsets are written as 4·k (see `left`);
    batch: B; GROUPS: how many times 4·QUADS elements a program has of one sample: the Place is that of the first."""
    if SAMPLES == 1:
        block = tl.program_id(0)
        first = tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * SPAN
        j = tl.arange(0, 4 * QUADS)
        row = tl.zeros_like(j)
        exists = tl.minimum(tl.maximum(batch - first, 0), 1).to(tl.int32)
    else:
        block = tl.program_id(0) * 0
        first = tl.program_id(0).to(tl.int64) * SAMPLES
        e = tl.arange(0, 4 * QUADS * SAMPLES)
        row, j = e // (4 * QUADS), e % (4 * QUADS)
        exists = 1
    start = block.to(tl.int64) * (4 * QUADS * GROUPS)
    inside = j < left(size, start, WHOLE) * exists
    if WHOLE:
        base = (first * size + block.to(tl.int64) * (QUADS * GROUPS)) * 4
        local = row * (size * 4) + j
    else:
        base = first * size + start
        local = row * size + j
    if SAMPLES == 1:
        local = j
    else:
        inside = inside & (row < tl.minimum(batch - first, SAMPLES).to(tl.int32))
    return Place(first, start, base, row, j, local, inside)


@triton.jit
def quads_of(start, QUADS: tl.constexpr, SAMPLES: tl.constexpr):
    """The noise counters of a program's elements: each quad's number in its sample, and its row."""
    q = tl.arange(0, QUADS * SAMPLES)
    if SAMPLES == 1:
        row = q * 0
        quad = q
    else:
        row = q // QUADS
        quad = q % QUADS
    return quad + (start >> 2).to(tl.uint32).to(tl.int32, bitcast=True), row


@triton.jit
def pointers(value, at):
    """Pointers to the elements of a Place in a contiguous tensor [B, D]."""
    return value + at.base + at.local


@triton.jit
def addresses(view, at, INNER: tl.constexpr, SAMPLES: tl.constexpr):
    """Pointers to the elements of a Place in a View."""
    if view.sample is None:
        there = pointers(view.value, at)
    else:
        there = view.value + at.first * view.sample
        if view.inner is None:
            there = there + at.start + at.j
        else:
            # the remainder i % INNER is i − (i // INNER)·INNER
            i = at.start.to(tl.int32) + at.j
            whole = (i.to(tl.uint32) // INNER).to(tl.int32)
            there = there + (i * view.inner + whole * (view.outer - INNER * view.inner))
        if SAMPLES > 1:
            there = there + at.row.to(tl.int64) * view.sample
    return there


@triton.jit
def per_sample(value, at, batch, pitch: tl.constexpr, SAMPLES: tl.constexpr):
    """value[sample · pitch] for each element of a Place, float32; one scalar load where a program has one sample."""
    if SAMPLES == 1:
        # a program beyond the batch, of which the grid may have some, reads the last sample's and stores nothing
        number = tl.load(value + tl.minimum(at.first, batch - 1) * pitch).to(tl.float32)
        numbers = tl.broadcast_to(number, at.inside.shape)
    else:
        numbers = tl.load(value + at.first * pitch + at.row * pitch, mask=at.inside, other=0.0).to(tl.float32)
    return numbers


class Tiling(NamedTuple):
    """A state cut into programs: their grid, and the arguments that `place` takes."""

    grid: tuple[int, int, int]
    arguments: dict[str, Any]


def cut(batch: int, numel: int, quads: int | None = None, groups: int = 1) -> Tiling:
    """Cut `batch` samples of `numel` elements each (neither 0), with at most `quads` quads in a program's row."""
    quads = QUADS if quads is None else quads
    needed = -(-numel // 4)
    width = min(quads, 1 << (needed - 1).bit_length())
    samples = quads // width if needed <= width else 1
    blocks, span = -(-needed // (width * groups)), SPAN.value
    whole = numel % 4 == 0
    arguments = {
        "size": needed if whole else numel,
        "batch": batch,
        "GROUPS": groups,
        "QUADS": width,
        "SAMPLES": samples,
        "WHOLE": whole,
    }
    grid = (-(-batch // samples), 1, 1) if samples > 1 else (blocks, min(batch, span), -(-batch // span))
    return Tiling(grid, arguments)


class View(NamedTuple):
    """An operand [B, D] as the kernels address it. Element j of sample i stands at

    i·D + j                                               if it is contiguous (no strides)
    i·sample + j                                          if its samples are (only `sample`)
    i·sample + (j // INNER)·outer + (j % INNER)·inner     otherwise, with one INNER for all of a kernel's Views
    """

    value: Tensor | None
    sample: int | None = None
    outer: int | None = None
    inner: int | None = None

    def copies(self, operand: Tensor | None) -> bool:
        """Whether what is addressed is a copy of the operand."""
        return self.value is not None and operand is not None and self.value.data_ptr() != operand.data_ptr()


def view(value: Tensor | None, shape: Sequence[int], inner: int | None) -> tuple[View, int | None]:
    """The View of `value` in a state of this shape, and INNER: once an operand needs two dimensions for a sample, the length
    of the inner one (channels-last: height × width). An operand that needs more, or another INNER, is copied."""
    if value is None or (value.is_contiguous() and value.shape == shape):
        return View(value), inner
    value = value.expand(shape)
    found = _strides(value.shape, value.stride(), inner)
    if found is None:
        return View(value.contiguous()), inner
    strides, inner = found
    return View(value, *strides), inner


@functools.lru_cache(maxsize=256)
def _strides(
    shape: tuple[int, ...], stride: tuple[int, ...], inner: int | None
) -> tuple[tuple[int | None, ...], int | None] | None:
    """The strides of a View and its INNER (or, if it needs none, the INNER passed); None if it must be copied."""
    numel = math.prod(shape[1:])
    dims = _collapse(shape[1:], stride[1:])
    sample = stride[0] if shape[0] > 1 else numel
    if not dims or dims == [(numel, 1)]:
        return (None if sample == numel else sample,), inner
    if numel < 2**31 and sum((n - 1) * s for n, s in dims) < 2**31:
        if len(dims) == 1:
            inner = inner or numel
            return (sample, inner * dims[0][1], dims[0][1]), inner
        if len(dims) == 2 and inner in (None, dims[1][0]):
            return (sample, dims[0][1], dims[1][1]), dims[1][0]
    return None


def _collapse(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """(length, stride) of the fewest dimensions that address a sample."""
    dims: list[tuple[int, int]] = []
    for n, stride in zip(shape, strides):
        if n == 1:
            continue
        if dims and dims[-1][1] == n * stride:
            dims[-1] = (dims[-1][0] * n, stride)
        else:
            dims.append((n, stride))
    return dims


def dense(value: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """`value` over a state of this shape, contiguous; copied only if it is not."""
    if value is None or (value.is_contiguous() and value.shape == shape):
        return value
    return value.expand(shape).contiguous()


def check_state(state: Tensor, **others: Tensor) -> None:
    """The state is contiguous float32; the others, by their names, are contiguous and on its device."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise TypeError(
            f"a state must be contiguous float32 (other dtypes: backend='reference'), got {state.dtype} "
            f"{tuple(state.shape)} with strides {state.stride()}"
        )
    for name, other in others.items():
        if other.device != state.device:
            raise ValueError(f"{name} must be on the state's device, {state.device}, got {other.device}")
        if not other.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got {tuple(other.shape)} with strides {other.stride()}")


def check_same(shape: Sequence[int], **written: Tensor | None) -> None:
    """What is written beside the state has its shape, and each element its own memory."""
    for name, value in written.items():
        if value is not None and (value.shape != shape or 0 in value.stride()):
            raise ValueError(
                f"{name} must have shape {tuple(shape)} and not be expanded, got {tuple(value.shape)} with strides "
                f"{value.stride()}"
            )
        if value is not None and name != "net_input" and not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {value.stride()}")


def check_column(batch: int, **columns: Tensor | None) -> None:
    """Each column's first axis has the length of the batch."""
    for name, value in columns.items():
        if value is not None and (value.ndim == 0 or value.shape[0] != batch):
            raise ValueError(f"{name} must have one entry for each of {batch} samples, got shape {tuple(value.shape)}")


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **meta: Any) -> Any:
    """Run a kernel on the device of `like`, on torch's current stream; returns what Triton compiled for it, or None: then the
    next launch goes through this function, too. enable_fp_fusion=False: the compiler must not fuse a product and a sum, which
    would round once where the reference rounds twice."""
    with torch.cuda.device_of(like):
        return kernel[grid](*args, **meta, num_warps=WARPS, enable_fp_fusion=False)


class Launch:
    """A launch that is made again and again: only the tensors of its `slots` change, and of them nothing that `facts` tells.

    The first goes through `launch`. If that answers with a compiled kernel (Triton's interpreter has none), the next put the
    tensors' addresses among the arguments and start it: Triton does not look at the arguments and their types again, which
    takes longer than most kernels run.

    slots: the arguments that tensors are given for, in their order; None: what is given there is not used.
    arguments: the others, by name; a View without its tensor, or None, for slots that may be given None."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], slots: Sequence[str | None], **arguments: Any) -> None:
        self.kernel, self.grid, self.slots, self.arguments = kernel, grid, slots, arguments
        self.start: Callable[..., None] | None = None  # the compiled kernel

    def __call__(self, *tensors: Any) -> None:
        """Launch on these tensors, one (or a tuple of them) for each slot, all on the device of the first."""
        if self.start is None:
            self._first(tensors)
            return
        values, device, driver = self._filled(tensors), self.device, triton.runtime.driver.active
        if driver.get_current_device() == device:
            self.start(*values, stream=driver.get_current_stream(device))
        else:
            with torch.cuda.device(device):
                self.start(*values, stream=driver.get_current_stream(device))

    def fixed(self, slots: Sequence[str], tensors: Sequence[Any]) -> Launch:
        """A started launch on these tensors, of which those of the slots still change. What the others hold may change, too,
        but not where they are."""
        fewer = copy.copy(self)
        fewer.values, fewer.slots = self._filled(tensors), slots
        fewer.kept = [tensor for slot, tensor in zip(self.slots, tensors) if slot not in slots]
        place = {slot: pair for slot, *pair in zip(self.slots, self.places, self.strides)}
        fewer.places, fewer.strides = zip(*(place.get(slot, (None, None)) for slot in slots))
        return fewer

    def _first(self, tensors: Sequence[Any]) -> None:
        names, filled = list(self.kernel.arg_names), dict(self.arguments)
        given = {slot: tensor for slot, tensor in zip(self.slots, tensors) if slot is not None and tensor is not None}
        views = {slot: filled[slot] for slot in given if isinstance(filled.get(slot), View)}
        filled |= given | {slot: view._replace(value=given[slot]) for slot, view in views.items()}
        meta = {name: filled[name] for name in names if name.isupper()}
        compiled = launch(self.kernel, self.grid, tensors[0], *(filled[n] for n in names if n not in meta), **meta)
        if hasattr(compiled, "__getitem__"):
            self.device, self.values = tensors[0].get_device(), [_address(filled[name]) for name in names]
            self.places = [names.index(slot) if slot in given else None for slot in self.slots]
            # of a View; () of a tuple of tensors
            strides = {slot: () if isinstance(given[slot], tuple) else None for slot in given}
            strides |= {slot: view[1:] for slot, view in views.items()}
            self.strides = [strides.get(slot) for slot in self.slots]
            # called with all arguments in their order, it also calls the hooks of profilers
            self.start = compiled[(*self.grid, 1, 1)[:3]]

    def _filled(self, tensors: Sequence[Any]) -> list[Any]:
        """The kernel's arguments with these tensors' addresses."""
        values = self.values.copy()
        for place, strides, value in zip(self.places, self.strides, tensors):
            if place is not None:
                if strides is None:
                    values[place] = value.data_ptr()
                elif strides:
                    values[place] = (value.data_ptr(), *strides)
                else:
                    values[place] = _address(value)
        return values


def _address(value: Any) -> Any:
    """An argument as a compiled kernel takes it: in a tensor's place its address."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(map(_address, value)) if isinstance(value, tuple) else value


def facts(value: Tensor | None) -> Any:
    """What a launch is prepared and compiled for of a tensor: all but its address, and whether that allows wide accesses."""
    if value is None:
        return None
    strides = value.is_contiguous() or value.stride()
    return value.dtype, value.shape, strides, value.get_device(), value.data_ptr() & 15 == 0


class Prepared(NamedTuple):
    """An operation for tensors of certain facts. It keeps none of them, or is not to be kept itself (no `last`)."""

    run: Callable[..., Any]
    last: Launch | None  # of its launches


_PREPARED: dict[Any, Prepared] = {}
MOST_PREPARED = 256


def call(prepare: Callable[..., Prepared], tensors: Sequence[Tensor | None], *others: Any) -> Any:
    """prepare(*tensors, *others).run(*tensors), prepared once for all tensors of the same facts: if its launches go past
    Triton's own look at their arguments. Else it is prepared anew."""
    key = prepare, others, *map(facts, tensors)
    prepared = _PREPARED.get(key)
    if prepared is None or prepared.last is None or prepared.last.start is None:
        prepared = prepare(*tensors, *others)
        if len(_PREPARED) >= MOST_PREPARED:
            _PREPARED.clear()
        if prepared.last is not None:
            _PREPARED[key] = prepared
    return prepared.run(*tensors)
