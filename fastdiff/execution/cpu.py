"""The compiled CPU library: found, started, and its operations called with the arguments of fastdiff.execution.reference.

Like any operator's implementation, these functions take it that all tensors are on their device and that views are
resolved (torch's dispatcher, execution.ops and the runner see to both). A call packs addresses, dtypes and strides into one
array of int64 and hands it over (ctypes lets go of Python's lock while it runs). The library's threads are torch's own,
through `torch_parallel_for`, so torch.set_num_threads governs both.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DeviceError, DTypeError, ShapeError, choose
from ..table import COLUMNS

# As fastdiff.execution.reference has it: noise made for a measurement is kept for the step.
KEEPS_NOISE = True
MAX_STAGES = MAX_DIMS = 16

# another build of the same sources, such as the one of `make sanitize`, can be named
LIBRARY = Path(os.environ.get("FASTDIFF_LIBRARY") or Path(__file__).parent.parent / "libfastdiff.so")
INSTRUCTION_SETS = ("plain", "avx2", "avx512")


class _Codes(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        raise DTypeError(f"operands must be float16, bfloat16, float32 or float64, got {dtype}")


_CODES = _Codes()
for _code, _dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64)):
    _CODES[_dtype] = _code << 8
_CURSOR = "cursor must be int64 [3]: use fastdiff.execution.ops.cursor"
_FAULTS = {
    1: (ConfigError, "cursor names a row that the table does not have"),
    2: (DTypeError, "operands must be float16, bfloat16, float32 or float64, and a mask bool"),
    3: (ShapeError, _CURSOR),
    4: (DTypeError, "table must be contiguous and of the state's dtype"),
}
_ORDERS = {"sin_cos": 0, "cos_sin": 1, "interleaved": 2}


def _load() -> tuple[Any, str, str]:
    """The library, the instruction set it runs on, and, if there is none, why."""
    asked = os.environ.get("FASTDIFF_INSTRUCTION_SET") or None
    if asked is not None and asked not in INSTRUCTION_SETS:
        raise ConfigError(f"FASTDIFF_INSTRUCTION_SET={asked!r} must be one of {', '.join(INSTRUCTION_SETS)}, or unset")
    if not LIBRARY.exists():
        return None, "", f"{LIBRARY} does not exist: it was built without a C++ compiler, or the compiler failed"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, "", f"{LIBRARY.name} does not load: {error}"
    library.fastdiff_start.restype = ctypes.c_char_p
    library.fastdiff_sources.restype = ctypes.c_char_p
    library.fastdiff_run.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
    try:
        name = _start(library, asked)
    except (OSError, AttributeError) as error:
        return None, "", f"torch's own threads are out of its reach: {error}"
    if name is None:
        raise ConfigError(f"FASTDIFF_INSTRUCTION_SET={asked!r} is not one of this machine's: unset it")
    return library, name, ""


def _start(library: Any, instruction_set: str | None) -> str | None:
    """Give the library torch's threads and an instruction set (None: the best here); its name, None if it is not here."""
    # exported since torch 2.10, by the library that `import torch` has loaded
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    parallel_for = ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p)
    name = library.fastdiff_start(parallel_for, None if instruction_set is None else instruction_set.encode())
    return None if name is None else name.decode()


_library, instruction_set, why = _load()
available = _library is not None
_run = _library.fastdiff_run if available else None


def use(name: str | None) -> bool:
    """Run on another instruction set of INSTRUCTION_SETS (None: the best); False, and nothing changes, if it is not here."""
    global instruction_set
    found = _start(_library, name) if available else None
    instruction_set = found or instruction_set
    return found is not None


def is_fresh() -> bool:
    """Whether the library was built from csrc/ as it lies beside the package; True where it does not."""
    folder = Path(__file__).parents[2] / "csrc"
    if not available or not folder.is_dir():
        return True
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.[ch]*")))
    return bool(_library.fastdiff_sources().decode() == hashlib.sha256(content).hexdigest()[:16])


@functools.cache
def _packer(n: int) -> Callable[..., bytes]:
    return struct.Struct(f"{n}q").pack


def _call(operation: int, wide: bool, shape: torch.Size, scalars: Sequence[int], tensors: Any) -> None:
    """Run an operation on tensors of this shape [B, *] (those of others must be contiguous), absent ones None."""
    own: list[Tensor] = []
    packed = _packed(shape, scalars, tensors, own)
    _check(_run(operation, _packer(len(packed))(*packed), wide))


def _packed(shape: torch.Size, scalars: Sequence[int], tensors: Any, own: list[Tensor]) -> list[int]:
    """A call's numbers, as csrc/tiles.h reads them. `own` takes copies that must live until the library is done."""
    ndim = len(shape)
    if not ndim:
        raise ShapeError("a state must have an axis of samples, got a scalar")
    samples = shape[0]
    packed = [0, samples, shape.numel() // samples if samples else 0, ndim, *scalars]
    tail: list[int] = []
    for slot, tensor in enumerate(tensors):
        if tensor is None:
            continue
        address = tensor.data_ptr()
        if not address:  # no memory: a tensor that is known to be zero, or one of another device
            if not tensor.is_cpu:
                raise DeviceError(f"all tensors must be on the CPU, got one on {tensor.device}: move it with .cpu()")
            tensor = tensor.clone()
            own.append(tensor)
            address = tensor.data_ptr()
            if not address and tensor.numel():
                raise DTypeError(f"a {type(tensor).__name__} has no memory of its own: make it a plain tensor first")
        slot += _CODES[tensor.dtype]
        if not tensor.is_contiguous():
            if ndim > MAX_DIMS:
                raise ShapeError(f"tensors of more than {MAX_DIMS} axes must be contiguous, got {ndim}")
            slot += ndim + len(tail) << 16
            tail += tensor.stride()
        packed += (address, slot)
    packed[0] = len(packed)
    packed += shape
    packed += tail
    return packed


def _check(fault: int) -> None:
    if fault:
        error, words = _FAULTS[fault]
        raise error(words)


def normal(out: Tensor, cursor: Tensor, stream: int) -> None:
    _fill(0, out, cursor, stream)


def rademacher(out: Tensor, cursor: Tensor, stream: int) -> None:
    _fill(1, out, cursor, stream)


def _fill(operation: int, out: Tensor, cursor: Tensor, stream: int) -> None:
    _check_out(out)
    _check_cursor(cursor)
    _call(operation, False, out.shape, (stream,), (out, cursor))


def step(
    out: Tensor,
    table: Tensor,
    cursor: Tensor,
    stream: int | None,
    x: Tensor,
    m: Tensor | None = None,
    history: Sequence[Tensor] | None = None,
    guide: Tensor | None = None,
    v: Tensor | None = None,
    base: Tensor | None = None,
    z: Tensor | None = None,
    measured: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    pushed: Tensor | None = None,
    net_input: Tensor | None = None,
    first_bad: Tensor | None = None,
) -> None:
    shape = out.shape
    operands = _step_operands(
        out, table, cursor, x, m, history, guide, v, base, z, measured, known, mask, pushed, net_input, first_bad
    )
    _call(2, out.dtype is torch.float64, shape, (_rows(table), -1 if stream is None else stream), operands)


def _step_operands(
    out: Tensor, table: Tensor, cursor: Tensor, x: Tensor, m: Tensor | None, history: Sequence[Tensor] | None,
    guide: Tensor | None, v: Tensor | None, base: Tensor | None, z: Tensor | None, measured: Tensor | None,
    known: Tensor | None, mask: Tensor | None, pushed: Tensor | None, net_input: Tensor | None, first_bad: Tensor | None,
) -> Any:  # fmt: skip
    """A step's tensors, checked, by their slots in csrc/step.h."""
    _check_out(out)
    _check_cursor(cursor)
    dtype, shape = out.dtype, out.shape
    if x.dtype is not dtype:
        raise DTypeError(f"x must have the state's dtype, {dtype}, got {x.dtype}: use x.to({dtype})")
    if x.shape != shape:
        x = x.expand(shape)
    if m is not None and m.shape != shape:
        m = m.expand(shape)
    if net_input is not None and (net_input.shape != shape or 0 in net_input.stride()):
        raise ShapeError(f"net_input must have shape {tuple(shape)}, got {tuple(net_input.shape)} {net_input.stride()}")
    if first_bad is not None:
        _check_column("first_bad", first_bad, shape[:1], torch.int64)
    if history is guide is v is base is z is measured is mask is pushed is None:
        return out, table, cursor, x, m, net_input, first_bad
    h = [_like(value, shape) for value in history or ()]
    if len(h) > 4 - (m is not None):
        raise ShapeError(f"a row reads at most four predictions, got m and {len(h)} earlier ones")
    if pushed is not None:
        _check_out(pushed, shape, dtype)
    if measured is not None:
        _check_column("measured", measured, (shape[0], 2), dtype)
    others = [_like(value, shape) for value in (guide, v, base, z, known, mask)]
    return out, table, cursor, x, m, net_input, first_bad, measured, pushed, *others, *h


def fixed_step(
    out: Tensor, table: Tensor, stream: int | None, x: Tensor, **operands: Any
) -> Callable[[Tensor, Tensor, object], None]:
    """(cursor, m, None) -> None: `step` on tensors that are the same each time but for these two, checked and packed once."""
    cursor = torch.zeros(3, dtype=torch.int64, device="cpu")
    absent = dict.fromkeys(("history", "guide", "v", "base", "z", "measured", "known", "mask", "pushed", "net_input"))
    tensors = _step_operands(out, table, cursor, x, x, **{**absent, "first_bad": None, **operands})
    scalars = (_rows(table), -1 if stream is None else stream)
    shape, wide, own = out.shape, out.dtype is torch.float64, list[Tensor]()
    numbers = _packed(shape, scalars, tensors, own)
    packed = (ctypes.c_int64 * len(numbers))(*numbers)
    at = ctypes.addressof(packed)
    of_cursor, of_m = (4 + len(scalars) + 2 * slot for slot in (2, 4))
    keep = (packed, tensors, own)  # what the addresses stand for

    def run(cursor: Tensor, m: Tensor, _: object = None) -> None:
        address = m.data_ptr()
        if m.shape != shape or not m.is_contiguous() or not address:
            step(out, table, cursor, stream, x, m, **operands)
            return
        packed[of_cursor], packed[of_m], packed[of_m + 1] = cursor.data_ptr(), address, 4 + _CODES[m.dtype]
        _check(_run(2, at, wide))

    run.keep = keep  # type: ignore[attr-defined]
    return run


def measure_langevin(
    measured: Tensor,
    table: Tensor,
    cursor: Tensor,
    stream: int | None,
    batch: bool,
    x: Tensor,
    m: Tensor,
    guide: Tensor | None = None,
    z: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    shape = x.shape
    _check_cursor(cursor)
    _check_column("measured", measured, (len(x), 2), table.dtype)
    if z is None and stream is None:
        raise ConfigError("measure_langevin needs noise: give z or a stream")
    if kept is not None:
        _check_out(kept, shape, table.dtype)
    scalars = (_rows(table), -1 if stream is None else stream, int(batch))
    m, guide, z = (_like(value, shape) for value in (m, guide, z))
    _call(3, table.dtype == torch.float64, shape, scalars, (measured, table, cursor, x, m, guide, z, kept))


def perturb(x0: Tensor, alpha: Tensor, sigma: Tensor, cursor: Tensor, stream: int) -> Tensor:
    _check_cursor(cursor)
    wide, shape = _is_wide(x0), x0.shape
    out = x0.new_empty(shape)
    _call(4, wide, shape, (stream,), (out, x0, *_columns(x0, alpha, sigma), cursor))
    return out


def dsm_loss(
    output: Tensor, x0: Tensor, r: Tensor, w: Tensor, weight: Tensor, cursor: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    _check_cursor(cursor)
    wide, shape = _is_wide(x0), x0.shape
    loss, error = x0.new_empty(shape[0]), x0.new_empty(shape)
    _call(5, wide, shape, (stream,), (loss, error, _like(output, shape), x0, *_columns(x0, r, w, weight), cursor))
    return loss, error


def dsm_loss_backward(grad: Tensor, error: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    wide, shape = _is_wide(error), error.shape
    out = error.new_empty(shape, dtype=dtype)
    _call(9, wide, shape, (), (out, error, *_columns(error, grad, weight)))
    return out


def timestep_embedding(t: Tensor, frequencies: Tensor, scale: float, channels: int, order: str) -> Tensor:
    out = t.new_empty((len(t), channels))
    half = channels // 2
    if t.ndim != 1 or frequencies.shape != (half,):
        raise ShapeError(f"t must be [B] and frequencies [{half}], got {tuple(t.shape)} and {tuple(frequencies.shape)}")
    if frequencies.dtype is not t.dtype or not frequencies.is_contiguous():
        frequencies = frequencies.to(t.dtype).contiguous()
    which = _ORDERS[choose("order", order, _ORDERS)]
    _call(6, _is_wide(out), out.shape, (channels, half, which, *_bits(scale)), (out, t.contiguous(), frequencies))
    return out


def probe_dot(value: Tensor, cursor: Tensor, stream: int, kind: str, probe: Tensor | None = None) -> Tensor:
    _check_cursor(cursor)
    if probe is not None and probe.dtype is torch.float64:
        value = value.double()  # which is what the library reads both as
    total = value.new_empty(len(value), dtype=torch.float64)
    wide = value.dtype is torch.float64
    tensors = (total, value, cursor, _like(probe, value.shape))
    _call(
        7,
        wide,
        value.shape,
        (stream, int(probe is None and choose("kind", kind, ("normal", "rademacher")) == "rademacher")),
        tensors,
    )
    return total


def rk_error(
    x: Tensor, stages: Sequence[Tensor], h: Tensor, b: Sequence[float], e: Sequence[float], rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    if not len(stages) == len(b) == len(e) <= MAX_STAGES:
        raise ShapeError(f"as many stages as weights, at most {MAX_STAGES}: got {len(stages)}, {len(b)}, {len(e)}")
    wide, shape = _is_wide(x), x.shape
    after, norm = x.new_empty(shape), x.new_empty(shape[0])
    tensors = (after, norm, x, *_columns(x, h), *(_like(k, shape) for k in stages))
    _call(8, wide, shape, (len(stages), *_bits(*b, *e, rtol, atol)), tensors)
    return after, norm


def _bits(*values: float) -> tuple[int, ...]:
    """float64 numbers as the int64 ones of the same bits."""
    return struct.unpack(f"{len(values)}q", struct.pack(f"{len(values)}d", *values))


_STATES = (torch.float32, torch.float64)


def _is_wide(state: Tensor) -> bool:
    dtype = state.dtype
    if dtype not in _STATES or state.ndim < 2:
        raise ShapeError(f"a state must be float32 or float64 [B, *], got {dtype} {tuple(state.shape)}")
    return dtype is torch.float64


def _check_out(out: Tensor, shape: Any = None, dtype: Any = None) -> None:
    """What the library writes as it stands: contiguous, float32 or float64, of at least two axes."""
    if not out.is_contiguous() or out.dtype not in _STATES or out.ndim < 2:
        raise ShapeError(
            f"a state must be contiguous float32 or float64 [B, *], got {out.dtype} {tuple(out.shape)} {out.stride()}"
        )
    if (shape is not None and out.shape != shape) or (dtype is not None and out.dtype != dtype):
        raise ShapeError(f"expected {dtype} {tuple(shape)}, got {out.dtype} {tuple(out.shape)}")


def _check_cursor(cursor: Tensor) -> None:
    """Its numbers; the library looks at the rest."""
    if cursor.numel() != 3:
        raise ShapeError(_CURSOR)


def _rows(table: Tensor) -> int:
    shape = table.shape
    if len(shape) != 2 or shape[1] != len(COLUMNS):
        raise ShapeError(f"table must be [rows, {len(COLUMNS)}], got {tuple(shape)}")
    return shape[0]


def _check_column(name: str, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if value is not None and (value.shape != shape or value.dtype != dtype or not value.is_contiguous()):
        raise ShapeError(f"{name} must be contiguous {dtype} {shape}, got {value.dtype} {tuple(value.shape)}")


def _like(value: Tensor | None, shape: torch.Size) -> Tensor | None:
    return value if value is None or value.shape == shape else value.expand(shape)


def _columns(state: Tensor, *values: Tensor) -> list[Tensor]:
    """One number a sample each, in the state's dtype (rounded once)."""
    shape, dtype = state.shape[:1], state.dtype
    columns = []
    for value in values:
        if value.shape != shape:
            raise ShapeError(f"expected one number for each of {shape[0]} samples, got {tuple(value.shape)}")
        if value.dtype is not dtype or not value.is_contiguous():
            value = value.to(dtype).contiguous()
        columns.append(value)
    return columns
