"""Runs the PTX of compiled Triton kernels on CPU tensors: what a GPU would be given, before there is one.

    Kernel(compiled.asm["ptx"]).run(grid, arguments, tensors, shared_bytes)

The threads of many programs (CTAs) go through the instructions together, one numpy array a register. Every float operation is
one IEEE rounding, fma among them; an operation that ptxas may contract or approximate (`add.f32`, `.approx`, `.ftz`) is
not known here, and so refused. But for those of APPROXIMATE, where the kernel's module declares them: ex2.approx.f32 and
div.full.f32 give the nearest float32, moved by up to the two units in the last place that they may be off.
Registers and shared memory begin as garbage, later programs run before earlier ones, every access must be aligned and lie within
the memory of an argument, and races are refused after each launch (`Accesses.check`).

Left to the hardware: that its square root and division are IEEE's, as their definitions say.
Source: NVIDIA, "Parallel Thread Execution ISA", whose names of instructions and types stand here.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

WARP = 32
PROGRAMS = 64  # that run together
GARBAGE = 0xCD

Array = np.ndarray[Any, Any]
# What the registers of each kind are, and what stands in one that a thread has not written
HOLDS = {"p": np.dtype(bool), "rs": np.dtype("u2"), "r": np.dtype("u4"), "rd": np.dtype("u8")}
UNWRITTEN = {t: np.full(t.itemsize, GARBAGE, np.uint8).view(f"u{t.itemsize}").astype(t) for t in HOLDS.values()}
REGISTER = re.compile(r"%(p|rs|r|rd)\d+")
NUMPY = {"s": "i", "u": "u", "b": "u", "f": "f"}  # kinds of types
NAN32, NAN64 = np.uint32(0x7FFFFFFF), np.uint64(0x7FFFFFFFFFFFFFFF)  # the hardware's


class PtxError(AssertionError):
    """The kernel does what it must not, or what is not known here."""


@functools.cache
def numpy_type(name: str) -> np.dtype[Any]:
    """Of s32, u64, b16, f32, pred; bf16 is its 16 bits."""
    if name == "pred":
        return np.dtype(bool)
    kind, bits = re.fullmatch(r"(bf|[subf])(\d+)", name).groups()  # type: ignore[union-attr]
    return np.dtype(f"{NUMPY.get(kind, 'u')}{int(bits) // 8}")


# --- numbers ---------------------------------------------------------------------------------------------------------


def as_type(bits: Array, name: str) -> Array:
    """A register's bits as a type of at most its width."""
    dtype = numpy_type(name)
    if bits.dtype.itemsize > dtype.itemsize:
        bits = bits.astype(f"u{dtype.itemsize}")
    return bits.view(dtype)


def canonical(values: Array) -> Array:
    """NaN as the hardware gives it: operations lose its payload and sign."""
    if values.dtype.kind == "f":
        unlike = np.isnan(values)
        if unlike.any():
            bits = values.view(f"u{values.itemsize}")
            bits[unlike] = NAN32 if values.itemsize == 4 else NAN64
    return values


def fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c, rounded once. In float64 the product of two float32 is exact, and the sum rounds to the same float32 as the exact
    one unless it lands half way between two of them."""
    if a.dtype != np.float32:
        raise PtxError("fma of float64 is not known here")
    product, addend = np.multiply(a, b, dtype=np.float64), c.astype(np.float64)
    total = np.atleast_1d(product + addend)
    bits = total.view(np.int64)
    doubtful = ((bits & 0x1FFFFFFF) == 0x10000000) | (np.abs(total) < 2.0**-126)
    if doubtful.any():
        p, q, t = (np.broadcast_to(v, total.shape)[doubtful] for v in (product, addend, total))
        apart = t - p  # TwoSum: what the sum has lost
        lost = (p - (t - apart)) + (q - apart)
        inexact = np.isfinite(t) & (lost != 0) & (t.view(np.int64) & 1 == 0)
        odd = np.where((lost > 0) == (t > 0), 1, -1)  # towards what is lost: the last bit says that something is
        total[doubtful] = (t.view(np.int64) + np.where(inexact, odd, 0)).view(np.float64)
    return total.astype(np.float32)


def bf16(values: Array) -> Array:
    """The upper half of float32, rounded to nearest, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(values), np.uint64(0x7FFF), rounded).astype(np.uint16)


def convert(bits: Array, rounding: str, to: str, source: str) -> Array:
    """cvt.<rounding>.<to>.<source>"""
    wide = as_type(bits, source)
    values = (wide.astype(np.uint32) << np.uint32(16)).view(np.float32) if source == "bf16" else wide
    floats = to[0] in "bf", source[0] in "bf"
    narrower = floats == (True, True) and int(to.strip("bf")) < int(source.strip("bf"))
    exact = floats in {(False, False), (True, True)} and not narrower
    if rounding != ("" if exact else "rn") and (rounding, to, source) != ("rmi", "f64", "f64"):
        raise PtxError(f"cvt {rounding} from {source} to {to} is not known here")
    if floats == (False, True) or (to, source) == ("bf16", "f64"):  # by way of float32 it would be rounded twice
        raise PtxError(f"cvt from {source} to {to} is not known here")
    if rounding == "rmi":
        values = np.floor(values)
    return bf16(values.astype(np.float32)) if to == "bf16" else canonical(values.astype(numpy_type(to)))


def shift(left: bool) -> Callable[[Array, Array], Array]:
    """By the register's width or more: 0, or the sign."""

    def shifted(value: Array, by: Array) -> Array:
        most = 8 * value.itemsize
        amount = np.minimum(by.astype(np.int64), most - 1).astype(value.dtype)
        moved = value << amount if left else value >> amount
        return np.asarray(moved) if value.dtype.kind == "i" else np.where(by >= most, value.dtype.type(0), moved)

    return shifted


def extract(value: Array, position: Array, length: Array) -> Array:
    """bfe: `length` bits from `position` on."""
    width, kept = 8 * value.itemsize, int(length.flat[0])
    if length.size > 1 or position.size > 1 or not 0 < kept + int(position.flat[0]) <= width:
        raise PtxError("bfe of other than constant bits of a word is not known here")
    up = value.dtype.type(width - kept - int(position.flat[0]))
    kept_bits: Array = (value << up) >> value.dtype.type(width - kept)
    return kept_bits


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of the eight of b:a."""
    both, chosen = (b.astype(np.uint64) << np.uint64(32)) | a, int(selector.flat[0])
    out: Array = np.zeros_like(both)
    for i in range(4):
        at = (chosen >> (4 * i)) & 0xF
        byte = (both >> np.uint64(8 * (at & 7))) & np.uint64(0xFF)
        byte = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0)) if at & 8 else byte
        out = out | (byte << np.uint64(8 * i))
    return out.astype(np.uint32)


def maximum_or_nan(a: Array, b: Array) -> Array:
    """max.NaN: +0 is more than −0."""
    return np.where((a == 0) & (b == 0), np.where(np.signbit(a), b, a), np.maximum(a, b))


def select(a: Array, b: Array, chosen: Array) -> Array:
    return np.where(chosen, a, b)


def wide_product(a: Array, b: Array) -> Array:
    double = np.dtype(f"{a.dtype.kind}{2 * a.itemsize}")
    product: Array = a.astype(double) * b.astype(double)
    return product


def product_sum(a: Array, b: Array, c: Array) -> Array:
    return np.asarray(a * b + c)


def wide_sum(a: Array, b: Array, c: Array) -> Array:
    return np.asarray(wide_product(a, b) + c)


def upper_product(a: Array, b: Array) -> Array:
    """mul.hi: of unsigned numbers, by their halves."""
    half, low = a.dtype.type(4 * a.itemsize), a.dtype.type((1 << 4 * a.itemsize) - 1)
    (a0, a1), (b0, b1) = ((v & low, v >> half) for v in (a, b))
    middle = a1 * b0 + ((a0 * b0) >> half)
    return np.asarray(a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & low)) >> half))


def approximately(exact: Array, *operands: Array) -> Array:
    """The float32 nearest to `exact`, moved by -2 to 2 of its units in the last place, which ones the operands' bits say; 0,
    infinity and NaN stay."""
    nearest = np.atleast_1d(exact.astype(np.float32))
    mixed = np.zeros(nearest.shape, np.uint32)
    for operand in operands:
        mixed = (mixed ^ operand.view(np.uint32)) * np.uint32(0x9E3779B1)
    moved = (nearest.view(np.int32) + (mixed >> np.uint32(16)).astype(np.int32) % 5 - 2).view(np.float32)
    alike = np.isfinite(nearest) & np.isfinite(moved) & (nearest != 0) & (np.signbit(nearest) == np.signbit(moved))
    return np.where(alike, moved, nearest)


def power_of_two(a: Array) -> Array:
    """ex2.approx.f32, of which 0 is 1."""
    return np.where(a == 0, np.float32(1), approximately(np.exp2(a.astype(np.float64)), a))


def full_division(a: Array, b: Array) -> Array:
    """div.full.f32"""
    a, b = np.broadcast_arrays(a, b)
    return approximately(a.astype(np.float64) / b.astype(np.float64), np.ascontiguousarray(a), np.ascontiguousarray(b))


def whole(types: str) -> list[str]:
    return [f"{kind}{bits}" for kind in types for bits in (16, 32, 64)]


# Operation -> (function of typed operands, types of the operands after the first; the first's is the last word of its name)
Operation = tuple[Callable[..., Array], tuple[str, ...]]
OPERATIONS: dict[str, Operation] = {
    **{f"{name}.{t}": (f, ()) for t in whole("su") for name, f in (("add", np.add), ("sub", np.subtract))},
    **{f"{name}.{t}": (f, ()) for t in whole("su") for name, f in (("min", np.minimum), ("max", np.maximum))},
    **{f"mul.lo.{t}": (np.multiply, ()) for t in whole("su")},
    **{f"mul.hi.{t}": (upper_product, ()) for t in ("u32", "u64")},
    **{f"mul.wide.{t}": (wide_product, ()) for t in ("s16", "u16", "s32", "u32")},
    **{f"mad.lo.{t}": (product_sum, ()) for t in whole("su")},
    **{f"mad.wide.{t}": (wide_sum, (t, f"{t[0]}64")) for t in ("s32", "u32")},
    **{f"{name}.rn.{t}": (f, ()) for t in ("f32", "f64") for name, f in (
        ("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div", np.divide), ("sqrt", np.sqrt))},
    "fma.rn.f32": (fma, ()),
    **{f"abs.{t}": (np.abs, ()) for t in ("f32", "f64")},
    **{f"neg.{t}": (np.negative, ()) for t in ("f32", "f64", "s32", "s64")},
    "max.NaN.f32": (maximum_or_nan, ()),
    **{f"{name}.{t}": (f, ()) for t in (*whole("b"), "pred") for name, f in (
        ("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor), ("not", np.invert))},
    **{f"shl.{t}": (shift(True), ("u32",)) for t in whole("b")},
    **{f"shr.{t}": (shift(False), ("u32",)) for t in whole("sub")},
    **{f"bfe.{t}": (extract, ("u32", "u32")) for t in ("u32", "s32", "u64", "s64")},
    "prmt.b32": (permute, ()),
    "popc.b32": (lambda a: np.bitwise_count(a).astype(np.uint32), ()),
    **{f"selp.{t}": (select, (t, "pred")) for t in (*whole("bsu"), "f32", "f64")},
    "cvt.rn.bf16x2.f32": (lambda a, b: (bf16(a).astype(np.uint32) << np.uint32(16)) | bf16(b), ()),
    "cvt.rn.f16x2.f32": (lambda a, b: (_half(a) << np.uint32(16)) | _half(b), ()),
}  # fmt: skip

# Not IEEE's: known only where the kernel's module declares it
APPROXIMATE: dict[str, Operation] = {"ex2.approx.f32": (power_of_two, ()), "div.full.f32": (full_division, ())}

COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
    # with a NaN: neu and the others in u are true, ne is not
    "ne": lambda a, b: (a < b) | (a > b), "neu": np.not_equal, "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b), "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b), "nan": lambda a, b: (a != a) | (b != b),
}  # fmt: skip


def _half(values: Array) -> Array:
    return values.astype(np.float16).view(np.uint16).astype(np.uint32)


# --- memory ----------------------------------------------------------------------------------------------------------


class Access(NamedTuple):
    """What some threads did at once."""

    kind: str  # load, store or atomic
    size: int  # bytes of each thread
    first: Array  # of these bytes
    threads: Array
    moments: Array  # how many barriers of its program came before, for each thread
    written: Array | None  # [threads, size] bytes, of a store


class Accesses(list[Access]):
    """What the threads of a launch did in one memory."""

    def check(self, program: int, owner: int) -> None:
        """Refuse a race: memory that one program, of so many threads, writes and another touches, or that two of a program's
        groups of `owner` threads touch with no barrier between, one of them writing. Two may write the same number, and atomic
        operations may meet each other."""
        if all(access.kind == "load" for access in self):
            return
        unit = min(8, *(access.size for access in self))  # bytes; accesses are aligned
        parts: dict[str, list[Array]] = {"load": [], "store": [], "atomic": []}
        for kind, size, first, threads, moments, written in self:
            units = (first[:, None] // unit + np.arange(size // unit)).ravel()
            who, when = np.repeat(threads, size // unit), np.repeat(moments, size // unit)
            what = (
                np.zeros(len(units), np.int64) if written is None else written.view(f"u{unit}").ravel().astype(np.int64)
            )
            parts[kind].append(np.stack((units, who, when, what)))
        loads, stores, atomics = (
            np.concatenate([np.zeros((4, 0), np.int64), *part], axis=1) for part in parts.values()
        )
        for writes, others in ((stores, (stores, loads, atomics)), (atomics, (loads,))):
            for touched in others:
                _refuse_race(writes, touched, program, False)
                _refuse_race(writes, touched, owner, True)


def _refuse_race(writes: Array, touched: Array, owner: int, between_barriers: bool) -> None:
    """What is written is touched by one group of `owner` threads, or is written by others with the same number."""
    (written, writer, when, what), (there, who, then, also) = writes, touched
    if between_barriers:
        moments = 1 + max(when.max(initial=0), then.max(initial=0))
        written, there = written * moments + when, there * moments + then
    written, at = np.unique(written, return_index=True)
    if not len(written):
        return
    place = np.searchsorted(written, there)
    place[place == len(written)] = 0
    raced = (written[place] == there) & (writer[at][place] // owner != who // owner)
    if touched is writes:
        raced &= what[at][place] != also
    if bool(raced.any()):
        groups = "groups of threads, with no barrier between," if between_barriers else "programs"
        raise PtxError(f"a race: two {groups} touch the same memory, and one writes it")


class Memory:
    """The storages of a launch's tensors, by their addresses."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.starts = np.array(sorted(storages), dtype=np.int64)
        self.ends = self.starts + np.array([storages[start] for start in self.starts.tolist()], dtype=np.int64)
        self.bytes = [
            np.ctypeslib.as_array((ctypes.c_uint8 * storages[start]).from_address(start)) if storages[start] else None
            for start in self.starts.tolist()
        ]
        self.accesses = Accesses()

    def elements(self, first: Array, size: int, count: int) -> list[tuple[Array, Array, Array]]:
        """For each storage that these addresses are in: its elements of this size, which of the addresses, and the numbers of
        their `count` elements."""
        if bool((first % (size * count)).any()):
            raise PtxError(f"an access of {count} times {size} bytes is not aligned")
        storage = np.searchsorted(self.starts, first, side="right") - 1
        if bool(((storage < 0) | (first + size * count > self.ends[storage])).any()):
            raise PtxError("an access is outside of every argument's memory")
        parts = []
        for number in np.unique(storage):
            data, mine = self.bytes[number], np.flatnonzero(storage == number)
            assert data is not None
            view = data[: len(data) // size * size].view(f"u{size}")
            parts.append((view, mine, (first[mine] - self.starts[number])[:, None] // size + np.arange(count)))
        return parts


class Threads:
    """The state of programs that run together.

    size    the threads of a program
    first   the first of them, by its number in the grid
    lane    each thread's number in them
    active  the threads that the branches so far have not sent ahead
    passed  how many barriers each program has passed
    """

    def __init__(
        self, memory: Memory, size: int, grid: Sequence[int], first: int, programs: int, shared_bytes: int
    ) -> None:
        self.memory, self.size, self.first, self.programs = memory, size, first, programs
        self.lane = np.arange(programs * size)
        program = first + self.lane // size
        x, y, _ = grid
        self.special = {
            "%tid.x": self.lane % size,
            "%ctaid.x": program % x, "%ctaid.y": program // x % y, "%ctaid.z": program // (x * y),
            **{f"%nctaid.{axis}": np.array([n]) for axis, n in zip("xyz", grid)},
        }  # fmt: skip
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}
        self.registers: dict[str, Array] = {}
        self.active = np.ones(len(self.lane), bool)
        self.ahead: dict[str, Array] = {}  # threads that wait at a label
        self.shared = np.full((programs, -(-shared_bytes // 16) * 16), GARBAGE, np.uint8)
        self.shared_accesses = Accesses()
        self.passed = np.zeros(programs, np.int64)

    def full(self, values: Array) -> Array:
        return np.broadcast_to(values, self.lane.shape)

    def mask(self, guard: Array | None) -> Array | None:
        """Which threads do it; None: all."""
        if self.active.all():
            return guard
        return self.active if guard is None else self.active & guard

    def lanes(self, guard: Array | None) -> Array:
        mask = self.mask(guard)
        return self.lane if mask is None else np.flatnonzero(self.full(mask))

    def write(self, register: str, values: Array, guard: Array | None) -> None:
        if register == "_":
            return
        holds = HOLDS[re.match(r"%([a-z]+)", register)[1]]  # type: ignore[index]
        values = np.atleast_1d(canonical(values))
        if values.dtype.kind == "i":  # widened with its sign
            values = values.astype(f"i{holds.itemsize}").view(holds)
        elif values.dtype.kind == "f":
            values = values.view(f"u{values.itemsize}")
        values = values if values.dtype == holds else values.astype(holds)
        mask = self.mask(guard)
        if mask is not None:
            values = np.where(mask, values, self.registers.get(register, UNWRITTEN[holds]))
        self.registers[register] = values

    def load(self, space: str, first: Array, size: int, count: int, guard: Array | None) -> Array:
        """[threads, count] unsigned; threads that do not load have zeros."""
        lanes = self.lanes(guard)
        one = first.size == 1 and len(lanes) == len(self.lane) and space == "global"
        at = (first if one else self.full(first)[lanes]).astype(np.int64)
        out = np.zeros((1 if one else len(self.lane), count), f"u{size}")
        if not len(lanes):
            return out
        self._note("load", space, size * count, np.broadcast_to(at, lanes.shape), lanes)
        if space == "shared":
            out[lanes] = self._shared_bytes(at, size * count, lanes).view(f"u{size}")
            return out
        for view, mine, numbers in self.memory.elements(at, size, count):
            out[mine if one else lanes[mine]] = view[numbers]
        return out

    def store(self, space: str, first: Array, values: Array, guard: Array | None) -> None:
        """values [threads or 1, count] unsigned"""
        lanes, (_, count), size = self.lanes(guard), values.shape, values.itemsize
        if not len(lanes):
            return
        at = self.full(first)[lanes].astype(np.int64)
        values = np.broadcast_to(values, (len(self.lane), count))[lanes]
        self._note("store", space, size * count, at, lanes, values.view(np.uint8))
        if space == "shared":
            self.shared[self._shared_place(at, size * count, lanes)] = values.view(np.uint8)
            return
        for view, mine, numbers in self.memory.elements(at, size, count):
            view[numbers] = values[mine]

    def atomic_min(self, first: Array, values: Array, guard: Array | None) -> None:
        lanes = self.lanes(guard)
        if len(lanes):
            at = self.full(first)[lanes].astype(np.int64)
            self._note("atomic", "global", 8, at, lanes)
            for view, mine, numbers in self.memory.elements(at, 8, 1):
                np.minimum.at(view.view(np.int64), numbers[:, 0], self.full(values)[lanes][mine])

    def matrices(self, kind: str, first: Array, count: int, written: Array | None = None) -> tuple[Array, Array]:
        """The places in `shared` of each warp's 8×8 matrices of 16 bits, [warps, count, 8 rows, 16 bytes]: a row's bytes stand
        at the address that lane 8·matrix + row gives."""
        lanes = self.lane.reshape(-1, WARP)[:, : 8 * count].ravel()
        at = self.full(first)[lanes].astype(np.int64)
        self._note(kind, "shared", 16, at, lanes, written)
        program, place = self._shared_place(at, 16, lanes)
        shape = (-1, count, 8, 16)
        return np.broadcast_to(program, place.shape).reshape(shape), place.reshape(shape)

    def _note(self, kind: str, space: str, size: int, at: Array, lanes: Array, written: Array | None = None) -> None:
        program = lanes // self.size
        moments = self.passed[program]
        if space == "shared":  # each program has its own
            at = at + program * self.shared.shape[1]
            self.shared_accesses.append(Access(kind, size, at, lanes, moments, written))
        else:
            lanes = lanes + self.first * self.size
            self.memory.accesses.append(Access(kind, size, at, lanes, moments, written))

    def _shared_place(self, at: Array, size: int, lanes: Array) -> tuple[Array, Array]:
        if bool((at % size).any()) or bool((at + size > self.shared.shape[1]).any()):
            raise PtxError(f"an access of {size} bytes of shared memory is not aligned, or outside of it")
        return (lanes // self.size)[:, None], at[:, None] + np.arange(size)

    def _shared_bytes(self, at: Array, size: int, lanes: Array) -> Array:
        return self.shared[self._shared_place(at, size, lanes)]

    def whole_warps(self) -> None:
        """Refuse what all threads of a warp must do together where some are elsewhere."""
        if bool((self.active.reshape(-1, WARP) != self.active[::WARP, None]).any()):
            raise PtxError("a warp's threads exchange values while some of them are elsewhere")

    def barrier(self) -> None:
        there = self.active[:: self.size]
        if bool((self.active.reshape(-1, self.size) != there[:, None]).any()):
            raise PtxError("a barrier that some of a program's threads do not reach")
        self.passed += there


# --- instructions ----------------------------------------------------------------------------------------------------

Step = Callable[[Threads], None]
Source = Callable[[Threads], Array]


def source(text: str, of: str) -> Source:
    """A register, special register or number as a type."""
    if REGISTER.fullmatch(text):
        return lambda threads: as_type(threads.registers[text], of)
    if text.startswith("%"):
        return lambda threads: as_type(threads.special[text], of)
    if text == "global_smem":
        number = np.zeros(1, numpy_type(of))
    elif text.startswith(("0f", "0d")):
        number = np.array([int(text[2:], 16)], "u4" if text[1] == "f" else "u8").view(numpy_type(of))
    else:
        dtype = numpy_type(of)
        value = int(text.rstrip("U"), 0)
        number = np.array([bool(value)]) if dtype.kind == "b" else np.array(
            [value & (2 ** (8 * dtype.itemsize) - 1)], f"u{dtype.itemsize}").view(dtype)  # fmt: skip
    return lambda threads: number


def address(text: str) -> Source:
    """[register + number]"""
    base, _, offset = (part.strip() for part in text.strip("[] ").partition("+"))
    wide = base.startswith("%rd")
    first, more = source(base, "u64" if wide else "u32"), np.array([int(offset or 0)])
    return lambda threads: first(threads).astype(np.int64) + more


def braced(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


def instruction(text: str, approximations: Sequence[str] = ()) -> Step:
    """What one instruction does to the threads. approximations: those of APPROXIMATE that it may be."""
    guarded = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", text, re.DOTALL)
    if guarded is None:
        raise PtxError(f"{text!r} is not known here")
    negated, predicate, name, rest = guarded.groups()
    operands = [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", rest)]

    def guard(threads: Threads) -> Array | None:
        if predicate is None:
            return None
        value = threads.registers[predicate]
        return ~value if negated else value

    made = _memory_instruction(name, operands, guard) or _warp_instruction(name, operands, guard)
    known = OPERATIONS | {allowed: APPROXIMATE[allowed] for allowed in approximations}
    made = made or _plain_instruction(name, operands, guard, known)
    if made is None:
        raise PtxError(f"{text!r} is not known here")
    return made


Guard = Callable[[Threads], Array | None]


def _memory_instruction(name: str, operands: list[str], guard: Guard) -> Step | None:
    # signed numbers that a load would widen with their sign are not known
    moved = re.fullmatch(r"(ld|st)\.(global|shared)(?:\.v([24]))?\.(?:[bu]|[sf](?=32|64))(\d+)", name)
    if moved:
        kind, space, count, size = moved[1], moved[2], int(moved[3] or 1), int(moved[4]) // 8
        names, at = (
            (braced(operands[0]), address(operands[1])) if kind == "ld" else (braced(operands[1]), address(operands[0]))
        )
        if len(names) != count:
            raise PtxError(f"{name} {operands} is not known here")
        if kind == "st":
            values = [source(register, f"b{8 * size}") for register in names]
            return lambda threads: threads.store(
                space,
                at(threads),
                np.stack(np.broadcast_arrays(*(v(threads) for v in values)), axis=-1),
                guard(threads),
            )

        def load(threads: Threads) -> None:
            found = threads.load(space, at(threads), size, count, guard(threads))
            for register, column in zip(names, found.T):
                threads.write(register, column, guard(threads))

        return load
    if re.fullmatch(r"(red|atom)\.global\.gpu\.relaxed\.min\.s64", name):
        place, value = operands[-2:]
        at, least = address(place), source(value, "s64")
        # the old value that atom leaves is not made: no kernel asks for it, and a read of its register would raise KeyError
        return lambda threads: threads.atomic_min(at(threads), least(threads), guard(threads))
    matrices = re.fullmatch(r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16", name)
    if matrices:
        count, turned = int(matrices[2]), bool(matrices[3])
        loads = matrices[1] == "ld"
        names, at = (
            (braced(operands[0]), address(operands[1])) if loads else (braced(operands[1]), address(operands[0]))
        )

        def move(threads: Threads) -> None:
            """Lane l has the elements 2·(l mod 4) and the next of row l div 4; of column l div 4 where it is transposed."""
            threads.whole_warps()
            if loads:
                found = threads.shared[threads.matrices("load", at(threads), count)].view("u2")  # [warps, count, 8, 8]
                found = np.ascontiguousarray(np.swapaxes(found, 2, 3)) if turned else found
                for register, words in zip(names, np.moveaxis(found.view("u4").reshape(-1, count, WARP), 1, 0)):
                    threads.write(register, words.ravel(), None)
                return
            words = np.stack([threads.full(threads.registers[name]).reshape(-1, WARP) for name in names], axis=1)
            halves = words.reshape(-1, count, 8, 4).view("u2")
            rows = np.ascontiguousarray(np.swapaxes(halves, 2, 3) if turned else halves).view(np.uint8)
            threads.shared[threads.matrices("store", at(threads), count, rows.reshape(-1, 16))] = rows

        return move
    return None


REDUCTIONS: dict[str, Callable[..., Array]] = {
    "min": np.min, "max": np.max, "add": lambda values, axis: values.sum(axis, dtype=values.dtype)
}  # fmt: skip


def _warp_instruction(name: str, operands: list[str], guard: Guard) -> Step | None:
    """What threads do together."""
    if name in ("bar.sync", "barrier.sync"):
        return lambda threads: threads.barrier()
    if name == "bar.warp.sync":
        return lambda threads: threads.whole_warps()
    reduced = re.fullmatch(r"redux\.sync\.(min|max|add)\.([su]32)", name)
    shuffled = re.fullmatch(r"shfl\.sync\.(bfly|idx)\.b32", name)
    if shuffled and operands[3] not in ("31", "0x1f"):  # parts of warps
        return None
    if not (reduced or shuffled or name == "vote.sync.ballot.b32"):
        return None
    taken = source(operands[1], reduced[2] if reduced else "b32" if shuffled else "pred")
    which, members = source(operands[2], "u32"), source(operands[-1], "s32")

    def exchange(threads: Threads) -> None:
        threads.whole_warps()
        if bool((members(threads) != -1).any()):
            raise PtxError(f"{name} among some threads of a warp is not known here")
        values = threads.full(taken(threads)).reshape(-1, WARP)
        if reduced:
            out = np.repeat(REDUCTIONS[reduced[1]](values, axis=1), WARP)
        elif shuffled:
            other = threads.full(which(threads)).reshape(-1, WARP).astype(np.int64)
            there = np.arange(WARP) ^ other if shuffled[1] == "bfly" else other % WARP
            out = np.take_along_axis(values, there, axis=1).ravel()
        else:
            out = np.repeat(np.packbits(values, axis=1, bitorder="little").view("u4")[:, 0], WARP)
        threads.write(operands[0], out, guard(threads))

    return exchange


def _plain_instruction(name: str, operands: list[str], guard: Guard, known: dict[str, Operation]) -> Step | None:
    """What each thread does for itself."""
    base, *qualifiers = name.split(".")
    of = qualifiers[-1] if qualifiers else ""
    if base == "mov":
        return _move(of, operands, guard)
    compared = re.fullmatch(r"setp\.(\w+)\.(\w+)", name)
    if compared:
        # for whole numbers ne is plain; for floats it is false with a NaN
        compare, kind = COMPARISONS[compared[1]], compared[2]
        a, b = (source(operand, kind) for operand in operands[1:])
        return lambda threads: threads.write(operands[0], compare(a(threads), b(threads)), guard(threads))
    converted = re.fullmatch(r"cvt\.(?:(rn|rmi)\.)?([bsuf]+\d+)\.([bsuf]+\d+)", name)
    if converted:
        rounding, to, kind = converted[1] or "", converted[2], converted[3]
        value = source(operands[1], f"b{numpy_type(kind).itemsize * 8}" if kind == "bf16" else kind)
        return lambda threads: threads.write(operands[0], convert(value(threads), rounding, to, kind), guard(threads))
    if name not in known:
        return None
    function, later = known[name]
    kinds = [of, *later, *[of] * 3][: len(operands) - 1]
    sources = [source(operand, kind) for operand, kind in zip(operands[1:], kinds)]
    return lambda threads: threads.write(operands[0], function(*(s(threads) for s in sources)), guard(threads))


def _move(of: str, operands: list[str], guard: Guard) -> Step:
    to, what = operands
    if to.startswith("{"):  # the parts of a register
        names = braced(to)
        bits = int(of[1:]) // len(names)
        value = source(what, f"b{of[1:]}")

        def unpack(threads: Threads) -> None:
            parts = np.ascontiguousarray(value(threads)).view(f"u{bits // 8}").reshape(-1, len(names))
            for name, part in zip(names, parts.T):
                threads.write(name, part, guard(threads))

        return unpack
    if what.startswith("{"):
        names = braced(what)
        bits = int(of[1:]) // len(names)
        parts = [source(name, f"b{bits}") for name in names]

        def pack(threads: Threads) -> None:
            columns = np.stack(np.broadcast_arrays(*(part(threads) for part in parts)), axis=-1)
            threads.write(to, np.ascontiguousarray(columns).view(f"u{int(of[1:]) // 8}")[:, 0], guard(threads))

        return pack
    value = source(what, of)
    return lambda threads: threads.write(to, value(threads), guard(threads))


# --- kernels ---------------------------------------------------------------------------------------------------------


class Kernel:
    """A kernel's instructions, from its PTX.

    parameters      each one's type, as declared
    threads         of a program
    approximations  those of APPROXIMATE that it may have
    """

    def __init__(self, ptx: str, approximations: Sequence[str] = ()) -> None:
        self.approximations = approximations
        head, _, body = ptx.partition("// %bb.0:")
        self.threads = int(re.findall(r"^\s*\.reqntid (\d+)", head, re.MULTILINE)[0])
        self.parameters = re.findall(r"^\s*\.param\s+\.(\w+).*_param_\d+", head, re.MULTILINE)
        body = re.sub(
            r"//[^\n]*|^\s*\.loc[^\n]*$|^\$L__(?!BB)\w+:", "", body.partition("$L__func_end0")[0], flags=re.MULTILINE
        )
        self.steps: list[tuple[Step | None, str | None]] = []
        for text in re.findall(r"\$L__BB\w+:|[^;:{}\s](?:[^;{}]|\{[^}]*\})*(?=;)", body):
            self.steps.append(self._step(" ".join(text.split())))

    def _step(self, text: str) -> tuple[Step | None, str | None]:
        """A step and the label it goes to, or a label alone."""
        if text.startswith("$"):
            return None, text[:-1]
        branch = re.fullmatch(r"(?:@(!?)(%p\d+) )?bra(?:\.uni)? (\$\w+)", text)
        if branch:
            negated, predicate, label = branch.groups()

            def leave(threads: Threads) -> None:
                taken = threads.active
                if predicate is not None:
                    value = threads.full(threads.registers[predicate])
                    taken = taken & (~value if negated else value)
                threads.ahead[label] = threads.ahead.get(label, np.zeros_like(taken)) | taken
                threads.active = threads.active & ~taken

            return leave, label
        if text == "ret":
            return self._return, None
        parameter = re.fullmatch(r"ld\.param\.(\w+) (%\w+), ?\[\w+_param_(\d+)\]", text)
        if parameter:
            kind, register, number = parameter.groups()
            read = source(f"%param{number}", kind)
            return lambda threads: threads.write(register, read(threads), None), None
        return instruction(text, self.approximations), None

    @staticmethod
    def _return(threads: Threads) -> None:
        threads.active = np.zeros_like(threads.active)

    def run(
        self, grid: Sequence[int], arguments: Sequence[int], tensors: Sequence[torch.Tensor], shared_bytes: int
    ) -> None:
        """All programs of a grid. arguments: each parameter's bits, the address of tensors."""
        if len(arguments) != len(self.parameters):
            raise PtxError(f"{len(self.parameters)} parameters and {len(arguments)} arguments")
        grid = (*grid, 1, 1)[:3]
        special = {}
        for number, (kind, bits) in enumerate(zip(self.parameters, arguments)):
            size = numpy_type(kind).itemsize
            special[f"%param{number}"] = np.array([bits & (2 ** (8 * size) - 1)], f"u{size}")
        memory, total = Memory(tensors), math.prod(grid)
        with np.errstate(all="ignore"):
            for first in reversed(range(0, total, PROGRAMS)):
                threads = Threads(memory, self.threads, grid, first, min(PROGRAMS, total - first), shared_bytes)
                threads.special |= special
                self._run(threads)
                threads.shared_accesses.check(self.threads, WARP)
        memory.accesses.check(self.threads, 1)

    def _run(self, threads: Threads) -> None:
        for step, label in self.steps:
            if step is not None:
                if threads.active.any():
                    step(threads)
            elif label in threads.ahead:
                threads.active = threads.active | threads.ahead.pop(label)
        if threads.ahead:
            raise PtxError(f"branches back, to {', '.join(threads.ahead)}, are not known here")
