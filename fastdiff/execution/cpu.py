"""The compiled library of csrc/: loaded, and called with the arguments that fastdiff.execution.reference describes.

The functions assume that all tensors are on the CPU and that no view is conjugated or negated, as any operator's
implementation may (torch's dispatcher, execution.ops and execution.loop ensure it). A call packs addresses, dtypes and
strides into one array of int64 for the library, and ctypes releases Python's lock while it runs. The library works on
torch's threads, through `torch_parallel_for`, so torch.set_num_threads governs both.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DeviceError, DTypeError, ShapeError, choose
from ..table import COLUMNS, MAX_HISTORY

# measure_langevin keeps the noise that it draws for the step that follows, which else would draw it again.
KEEPS_NOISE = True
MAX_STAGES = MAX_DIMS = 16
HEADER = 4  # numbers of a call before its scalars (csrc/tiles.h)

# The operations in the order of csrc/fastdiff.h, and each one's tensors in the order of its slots there (a test compares
# them); history and stages, the last of theirs, take as many slots as they have tensors.
OPERATIONS = {
    "normal": ("out", "cursor"),
    "rademacher": ("out", "cursor"),
    "words": ("out", "cursor"),
    "step": (
        "out", "table", "cursor", "x", "m", "net_input", "first_bad", "measured", "pushed", "guide", "v", "base", "z",
        "known", "mask", "history",
    ),
    "measure_langevin": ("measured", "table", "cursor", "x", "m", "guide", "z", "kept"),
    "perturb": ("out", "x0", "alpha", "sigma", "cursor"),
    "dsm_loss": ("loss", "error", "output", "x0", "r", "w", "weight", "cursor"),
    "dsm_loss_backward": ("out", "error", "grad", "weight"),
    "timestep_embedding": ("out", "t", "frequencies"),
    "probe_dot": ("total", "value", "cursor", "probe"),
    "rk_error": ("after", "norm", "x", "h", "stages"),
}  # fmt: skip
# Those on lists of tensors (csrc/update.h), with their lists
LISTS = {
    "sum_of_squares": ("tensors",),
    "adam": ("weights", "gradients", "first", "second", "average"),
}
# Those of networks' layers (csrc/layers.h), whose arguments are sizes and addresses
LAYERS = ("winograd_weights", "winograd", "group_norm_silu")
_NUMBERS = {name: number for number, name in enumerate([*OPERATIONS, *LISTS, *LAYERS])}

# FASTDIFF_LIBRARY names another build of the same sources, such as that of `make sanitize`
PACKAGED = Path(__file__).parent.parent / "libfastdiff.so"
NAMED = os.environ.get("FASTDIFF_LIBRARY")
LIBRARY = Path(NAMED).expanduser().resolve() if NAMED else PACKAGED
INSTRUCTION_SETS = ("plain", "avx2", "avx512")


class _Codes(dict[torch.dtype, int]):
    def __missing__(self, dtype: torch.dtype) -> int:
        raise DTypeError(f"operands must be float16, bfloat16, float32 or float64, got {dtype}")


_CODES = _Codes()
for _code, _dtype in enumerate((torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64)):
    _CODES[_dtype] = _code << 8
_CURSOR = "cursor must be contiguous int64 [3]: make it with fastdiff.execution.ops.cursor"
# By the numbers of csrc/fastdiff.h's Result
_FAULTS = {
    1: (ConfigError, "cursor[0] must be a row of the table, >= 0 and < len(table)"),
    2: (DTypeError, "operands must be float16, bfloat16, float32 or float64, and a mask bool"),
    3: (ShapeError, _CURSOR),
    4: (DTypeError, "table must be contiguous and have the state's dtype"),
    5: (MemoryError, "there is no memory for the buffers of a fused operation: use a smaller batch_size"),
    6: (RuntimeError, "torch's loop over threads failed in a fused operation: backend='reference' does without it"),
}
_ORDERS = {"sin_cos": 0, "cos_sin": 1, "interleaved": 2}


_SET = "FASTDIFF_INSTRUCTION_SET"
_NAMED = f"FASTDIFF_LIBRARY={str(LIBRARY)!r:.100}"


def _load() -> tuple[Any, str, str]:
    """The library, the name of its instruction set, and why there is none (None, "", why)."""
    wanted = os.environ.get(_SET) or None
    if wanted is not None and wanted not in INSTRUCTION_SETS:
        return None, "", f"{_SET} must be one of {', '.join(INSTRUCTION_SETS)}, or unset, got {wanted!r:.40}"
    if NAMED and not LIBRARY.is_file():
        return None, "", f"{_NAMED} {'is no file' if LIBRARY.exists() else 'does not exist'}"
    if not LIBRARY.exists():
        missing = f"{LIBRARY} does not exist: fastdiff was installed without a C++ compiler, or the compiler failed"
        return None, "", missing
    untrusted = _untrusted(LIBRARY) if NAMED else ""
    if untrusted:
        return None, "", untrusted
    try:
        library = _opened(LIBRARY)
        library.fastdiff_start.restype = ctypes.c_char_p
        library.fastdiff_sources.restype = ctypes.c_char_p
        library.fastdiff_run.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
        library.fastdiff_lacks.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return None, "", f"{_NAMED if NAMED else LIBRARY.name} cannot be loaded: {error}"
    if NAMED and library.fastdiff_sources() != (_sources() or _installed()):
        return None, "", f"{_NAMED} was built from other sources"
    lacking = library.fastdiff_lacks()
    if lacking is not None:
        return None, "", f"{LIBRARY.name} was compiled for processors with {lacking.decode()}, which this one lacks"
    try:
        name = _start(library, wanted)
    except (OSError, AttributeError) as error:
        return None, "", f"torch_parallel_for is missing from libtorch_cpu.so (it needs torch >= 2.10): {error}"
    if name is None:
        return None, "", f"{_SET}={wanted} names what this processor lacks"
    return library, name, ""


def _opened(path: Path) -> ctypes.CDLL:
    """The library, without what -ffast-math links into it: code that makes the thread which loads it flush subnormal numbers."""
    flushed = flushes_subnormals()
    library = ctypes.CDLL(str(path))
    if flushes_subnormals() and not flushed:
        torch.set_flush_denormal(False)
    return library


def flushes_subnormals() -> bool:
    """Whether this thread takes subnormal numbers for 0."""
    return sys.float_info.min / 2 == 0.0


def _untrusted(path: Path) -> str:
    """Why a library that a variable names must not be loaded: others than this user and root may change it; or ""."""
    if not hasattr(os, "getuid"):
        return ""
    trusted = (0, os.getuid())
    for place in (path, *path.parents):
        status = place.stat()
        # a folder such as /tmp lets nobody replace what is another's; but the library itself is not to lie in one
        shared = status.st_mode & 0o022 and not (status.st_mode & 0o1000 and place not in (path, path.parent))
        if status.st_uid not in trusted or (
            shared and (status.st_mode & 0o002 or status.st_gid not in (0, os.getgid()))
        ):
            return f"{_NAMED} is not loaded, as others may write {str(place)!r:.100}"
    return ""


def _sources() -> bytes | None:
    """The hash of csrc/ as it is now; None where it does not lie beside the package."""
    folder = Path(__file__).parents[2] / "csrc"
    if not folder.is_dir():
        return None
    content = b"".join(path.read_bytes() for path in sorted(folder.glob("*.[ch]*")))
    return hashlib.sha256(content).hexdigest()[:16].encode()


def _installed() -> bytes | None:
    """The hash of the sources of the package's own library."""
    try:
        own = _opened(PACKAGED)
        own.fastdiff_sources.restype = ctypes.c_char_p
        return own.fastdiff_sources()  # type: ignore[no-any-return]
    except (OSError, AttributeError):
        return None


def _start(library: Any, instruction_set: str | None) -> str | None:
    """Give the library torch's threads and an instruction set (None: the best). Its name, or None if this processor lacks it."""
    # exported since torch 2.10, by the library that `import torch` has loaded
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    parallel_for = ctypes.cast(torch_cpu.torch_parallel_for, ctypes.c_void_p)
    name = library.fastdiff_start(parallel_for, None if instruction_set is None else instruction_set.encode())
    return None if name is None else name.decode()


_library, instruction_set, why = _load()
loaded = available = _library is not None  # available: and its answers are right (fastdiff.execution.verify)
way_out = (
    f"unset {_SET}"
    if why.startswith(_SET)
    else "unset FASTDIFF_LIBRARY, or build it anew, without CXXFLAGS and where only you may write"
    if NAMED
    else "install it again with a C++ compiler (g++ or clang++) and without CXXFLAGS"
)
_run: Any = _library.fastdiff_run if loaded else None
forked = False  # whether this process is a child that was forked after the import, and has none of torch's threads


def _be_alone() -> None:
    """After a fork: work on the caller's thread."""
    global forked
    forked = True
    if loaded:
        _library.fastdiff_start(None, instruction_set.encode())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_be_alone)


def refuse(reason: str) -> None:
    """Leave the library alone from here on."""
    global available, why
    available, why = False, reason


def use(name: str | None) -> bool:
    """Run on another of INSTRUCTION_SETS (None: the best). False, and nothing changes, if this processor lacks it."""
    global instruction_set
    found = _start(_library, name) if loaded else None
    instruction_set = found or instruction_set
    return found is not None


def is_fresh() -> bool:
    """Whether the library was built from csrc/ as it is now; True where csrc/ does not lie beside the package."""
    now = _sources()
    return not loaded or now is None or bool(_library.fastdiff_sources() == now)


@functools.cache
def _packer(n: int) -> Callable[..., bytes]:
    return struct.Struct(f"{n}q").pack


@functools.cache
def _array(n: int) -> Any:
    return ctypes.c_int64 * n  # making the type takes longer than a step


def _call(
    operation: str, wide: bool, shape: torch.Size, scalars: Sequence[int], tensors: Sequence[Tensor | None]
) -> None:
    """Run an operation, on a float64 state if `wide`. A tensor that is not contiguous must have this shape [B, *]; None is
    an absent one."""
    copies: list[Tensor] = []
    packed = _packed(shape, scalars, tensors, copies)
    _check(_run(_NUMBERS[operation], _packer(len(packed))(*packed), wide))


def _packed(
    shape: torch.Size, scalars: Sequence[int], tensors: Sequence[Tensor | None], copies: list[Tensor]
) -> list[int]:
    """A call's numbers, as csrc/tiles.h reads them. `copies` takes tensors that must live until the library is done."""
    ndim = len(shape)
    if not ndim:
        raise ShapeError("a state must have an axis of samples, got a scalar")
    samples = shape[0]
    packed = [0, samples, shape.numel() // samples if samples else 0, ndim, *scalars]  # the first four: HEADER
    tail: list[int] = []
    for slot, tensor in enumerate(tensors):
        if tensor is None:
            continue
        address = tensor.data_ptr()
        if not address:  # empty; or torch's zero tensor, which has no storage; or on another device
            if not tensor.is_cpu:
                raise DeviceError(f"all tensors must be on the CPU, got one on {tensor.device}: move it with .cpu()")
            tensor = tensor.clone()
            copies.append(tensor)
            address = tensor.data_ptr()
            if not address and tensor.numel():
                raise DTypeError(
                    f"all tensors must have storage, got a {type(tensor).__name__} without: make it a torch.Tensor"
                )
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
    _fill("normal", out, cursor, stream)


def rademacher(out: Tensor, cursor: Tensor, stream: int) -> None:
    _fill("rademacher", out, cursor, stream)


def words(out: Tensor, cursor: Tensor, stream: int) -> None:
    """The counters' words, int32 [B, n], in their order: of numbers that are no normals."""
    _fill("words", out.view(torch.float32), cursor, stream)


def _fill(operation: str, out: Tensor, cursor: Tensor, stream: int) -> None:
    _check_state("out", out)
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
    *,
    run: Callable[..., Any] = _call,
) -> Any:
    """run: what is done with the checked tensors, in the order of OPERATIONS["step"]; prepare_step does something else."""
    _check_state("out", out)
    _check_cursor(cursor)
    dtype, shape = out.dtype, out.shape
    if x.dtype is not dtype:
        raise DTypeError(f"x must have the state's dtype, {dtype}, got {x.dtype}: use x.to({dtype})")
    if x.shape != shape:
        x = x.expand(shape)
    if m is not None and m.shape != shape:
        m = m.expand(shape)
    if net_input is not None and (net_input.shape != shape or 0 in net_input.stride()):
        raise ShapeError(
            f"net_input must have shape {tuple(shape)} and not be expanded, got {tuple(net_input.shape)} with strides "
            f"{net_input.stride()}"
        )
    if first_bad is not None:
        _check_column("first_bad", first_bad, shape[:1], torch.int64)
    tensors: tuple[Tensor | None, ...] = (out, table, cursor, x, m, net_input, first_bad)
    if history is not None or not (guide is v is base is z is measured is mask is pushed is None):
        earlier = [_like(h, shape) for h in history or ()]
        if len(earlier) > MAX_HISTORY - (m is not None):
            raise ShapeError(
                f"a row reads at most {MAX_HISTORY} predictions, m among them: got {len(earlier)} earlier ones"
            )
        if pushed is not None:
            _check_state("pushed", pushed, shape, dtype)
        if measured is not None:
            _check_column("measured", measured, (shape[0], 2), dtype)
        others = [_like(value, shape) for value in (guide, v, base, z, known, mask)]
        tensors = (*tensors, measured, pushed, *others, *earlier)
    return run("step", dtype is torch.float64, shape, (_rows(table), -1 if stream is None else stream), tensors)


def prepare_step(
    out: Tensor, table: Tensor, stream: int | None, x: Tensor, **operands: Any
) -> Callable[[Tensor, Tensor | None, Tensor | None], None]:
    """(cursor, m, v) -> None: `step` with the other operands fixed: checked, and packed for the library, once."""

    def prepare(operation: str, wide: bool, shape: torch.Size, scalars: Sequence[int], tensors: Any) -> Any:
        slots, number, ndim = OPERATIONS[operation], _NUMBERS[operation], len(shape)
        tensors = [*tensors, *[None] * (len(slots) - len(tensors))]
        of_cursor, of_m, of_v = (slots.index(name) for name in ("cursor", "m", "v"))
        tensors[of_m] = tensors[of_v] = x.expand(shape)  # it holds their places
        copies: list[Tensor] = []
        numbers = _packed(shape, scalars, tensors, copies)
        cursor_at, m_at, v_at = (
            HEADER + len(scalars) + 2 * sum(tensor is not None for tensor in tensors[:slot])
            for slot in (of_cursor, of_m, of_v)
        )
        m_strides = len(numbers)
        v_strides = m_strides + ndim
        packed = _array(m_strides + 2 * ndim)(*numbers)
        offset, at = m_strides - packed[0], ctypes.addressof(packed)  # offset: from the shape to m's strides

        def put(tensor: Tensor | None, slot: int, entry: int, strides: int) -> bool:
            """Pack an operand; False if it has another shape, or strides or memory that the library cannot take so."""
            if tensor is None:
                packed[entry] = 0
                return True
            if tensor.shape != shape:
                return False
            slot += _CODES[tensor.dtype]
            if not tensor.is_contiguous():
                if ndim > MAX_DIMS:
                    return False
                packed[strides : strides + ndim] = tensor.stride()
                slot += offset + strides - m_strides << 16
            packed[entry], packed[entry + 1] = tensor.data_ptr(), slot
            return bool(packed[entry])

        def run(cursor: Tensor, m: Tensor | None, v: Tensor | None) -> None:
            packed[cursor_at] = cursor.data_ptr()
            if m is not None and v is None and m.shape == shape and m.is_contiguous():  # nearly always
                address = m.data_ptr()
                if address:
                    packed[m_at], packed[m_at + 1] = address, of_m + _CODES[m.dtype]
                    fault = _run(number, at, wide)
                    if fault:
                        _check(fault)
                    return
            if put(m, of_m, m_at, m_strides) and put(v, of_v, v_at, v_strides):
                fault = _run(number, at, wide)
                packed[v_at] = 0  # as the shorter way above expects
                _check(fault)
            else:
                step(out, table, cursor, stream, x, m, v=v, **operands)

        put(None, of_v, v_at, v_strides)
        run.keep = packed, tensors, copies  # type: ignore[attr-defined]  # the memory behind the addresses
        return run

    cursor = torch.zeros(3, dtype=torch.int64, device="cpu")
    return step(out, table, cursor, stream, x, **operands, run=prepare)  # type: ignore[no-any-return]


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
        raise ConfigError("measure_langevin needs noise: pass z or a stream, both are None")
    if kept is not None:
        _check_state("kept", kept, shape, table.dtype)
    scalars = (_rows(table), -1 if stream is None else stream, int(batch))
    tensors = (measured, table, cursor, x, *(_like(value, shape) for value in (m, guide, z)), kept)
    _call("measure_langevin", table.dtype == torch.float64, shape, scalars, tensors)


def perturb(x0: Tensor, alpha: Tensor, sigma: Tensor, cursor: Tensor, stream: int) -> Tensor:
    _check_cursor(cursor)
    wide, shape = _is_wide(x0), x0.shape
    out = x0.new_empty(shape)
    _call("perturb", wide, shape, (stream,), (out, x0, *_columns(x0, alpha, sigma), cursor))
    return out


def dsm_loss(
    output: Tensor, x0: Tensor, r: Tensor, w: Tensor, weight: Tensor, cursor: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    _check_cursor(cursor)
    wide, shape = _is_wide(x0), x0.shape
    loss, error = x0.new_empty(shape[0]), x0.new_empty(shape)
    tensors = (loss, error, _like(output, shape), x0, *_columns(x0, r, w, weight), cursor)
    _call("dsm_loss", wide, shape, (stream,), tensors)
    return loss, error


def dsm_loss_backward(grad: Tensor, error: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    wide, shape = _is_wide(error), error.shape
    out = error.new_empty(shape, dtype=dtype)
    _call("dsm_loss_backward", wide, shape, (), (out, error, *_columns(error, grad, weight)))
    return out


def timestep_embedding(t: Tensor, frequencies: Tensor, scale: float, channels: int, order: str) -> Tensor:
    out = t.new_empty((len(t), channels))
    half = channels // 2
    if t.ndim != 1 or frequencies.shape != (half,):
        raise ShapeError(f"t must be [B] and frequencies [{half}], got {tuple(t.shape)} and {tuple(frequencies.shape)}")
    if frequencies.dtype is not t.dtype or not frequencies.is_contiguous():
        frequencies = frequencies.to(t.dtype).contiguous()
    which = _ORDERS[choose("order", order, _ORDERS)]
    scalars = (channels, half, which, *_bits(scale))
    _call("timestep_embedding", _is_wide(out), out.shape, scalars, (out, t.contiguous(), frequencies))
    return out


def probe_dot(value: Tensor, cursor: Tensor, stream: int, kind: str, probe: Tensor | None = None) -> Tensor:
    _check_cursor(cursor)
    if probe is not None and probe.dtype is torch.float64:
        value = value.double()  # the library reads both in one dtype
    total = value.new_empty(len(value), dtype=torch.float64)
    of_signs = probe is None and choose("kind", kind, ("normal", "rademacher")) == "rademacher"
    tensors = (total, value, cursor, _like(probe, value.shape))
    _call("probe_dot", value.dtype is torch.float64, value.shape, (stream, int(of_signs)), tensors)
    return total


def rk_error(
    x: Tensor, stages: Sequence[Tensor], h: Tensor, b: Sequence[float], e: Sequence[float], rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    if not len(stages) == len(b) == len(e) <= MAX_STAGES:
        raise ShapeError(
            f"stages, b and e must have one length, at most {MAX_STAGES}, got {len(stages)}, {len(b)} and {len(e)}"
        )
    wide, shape = _is_wide(x), x.shape
    after, norm = x.new_empty(shape), x.new_empty(shape[0])
    tensors = (after, norm, x, *_columns(x, h), *(_like(k, shape) for k in stages))
    _call("rk_error", wide, shape, (len(stages), *_bits(*b, *e, rtol, atol)), tensors)
    return after, norm


def sum_of_squares(tensors: Sequence[Tensor]) -> float:
    """Of all elements of all tensors, in float64, as a fixed tree over each block of 1024 and over these."""
    total = ctypes.c_double()
    _call_lists("sum_of_squares", (ctypes.addressof(total),), (tensors,))
    return total.value


def adam(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor],
    average: Sequence[Tensor], *, step: float, factor: float, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, decoupled: bool, share: float,
) -> None:  # fmt: skip
    """Step 1, 2, … of Adam, in place, and the average ← average + share·(weights − average) of the new weights, in one pass.

    g' = factor·g + weight_decay·θ;  m ← β1 m + (1 − β1) g';  v ← β2 v + (1 − β2) g'²  (Kingma & Ba 2015, Algorithm 1)
    θ ← θ − lr · m/(1 − β1^n) / (√(v/(1 − β2^n)) + eps);  `decoupled`: θ ← (1 − lr·weight_decay) θ before, and none of θ in g'
    (Loshchilov & Hutter 2019, Algorithm 2)
    """
    scalars = _bits(
        factor, beta1, beta2, eps, 0.0 if decoupled else weight_decay, 1 - lr * weight_decay if decoupled else 1.0,
        lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, share,
    )  # fmt: skip
    _call_lists("adam", scalars, (weights, gradients, first, second, average))


def _call_lists(operation: str, scalars: Sequence[int], lists: Sequence[Sequence[Tensor]]) -> None:
    """Run an operation on lists of tensors, those at the same place of one shape, one dtype and one layout, without gaps."""
    packed = [len(lists[0]), *scalars]
    dtype = lists[0][0].dtype if lists[0] else torch.float32
    for tensors in zip(*lists, strict=True):
        numel, stride = tensors[0].numel(), tensors[0].stride()
        packed.append(numel)
        for tensor in tensors:
            address = tensor.data_ptr()
            if (
                tensor.dtype is not dtype
                or tensor.stride() != stride
                or tensor.numel() != numel
                or (numel and not address)
            ):
                raise ShapeError(
                    f"tensors of {operation} must be on the CPU and all {dtype} {tuple(tensors[0].shape)} with strides {stride}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)} with {tensor.stride()}"
                )
            packed.append(address)
    if dtype not in _STATES:
        raise DTypeError(f"tensors of {operation} must be float32 or float64, got {dtype}")
    _check(_run(_NUMBERS[operation], _packer(len(packed))(*packed), dtype is torch.float64))


def winograd_weights(weight: Tensor) -> Tensor:
    """The weights [O, C, 3, 3] of a convolution as `winograd` takes them."""
    outputs, inputs = weight.shape[:2]
    columns = 32  # of the widest registers; narrower ones need no more
    packed = torch.empty(36 * inputs * -(-outputs // columns) * columns, dtype=torch.float32, device=weight.device)
    values = weight.detach().contiguous()
    _call_layer("winograd_weights", 0, 0, 0, inputs, outputs, values.data_ptr(), packed.data_ptr())
    return packed


def winograd(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """The convolution of x [B, C, H, W], channels_last, by 3×3 weights of `winograd_weights`, x being 0 beyond its ends."""
    samples, inputs, height, width = x.shape
    out = torch.empty(
        (samples, outputs, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    added = 0 if bias is None else bias.data_ptr()
    _call_layer(
        "winograd", samples, height, width, inputs, outputs, x.data_ptr(), packed.data_ptr(), added, out.data_ptr()
    )
    return out


def group_norm(x: Tensor, groups: int, gain: Tensor, shift: Tensor, eps: float, silu: bool) -> Tensor:
    """(silu of) group_norm(x) gain + shift of x [B, C, H, W], channels_last, gain and shift [C] or [B, C]."""
    samples, channels, height, width = x.shape
    gain, shift = gain.contiguous(), shift.contiguous()
    out, step = torch.empty_like(x), channels if gain.ndim == 2 else 0
    addresses = x.data_ptr(), gain.data_ptr(), shift.data_ptr(), out.data_ptr()
    _call_layer("group_norm_silu", samples, height * width, channels, groups, *_bits(eps), int(silu), step, *addresses)
    return out


def _call_layer(operation: str, *arguments: int) -> None:
    _check(_run(_NUMBERS[operation], _packer(len(arguments))(*arguments), False))


def _bits(*values: float) -> tuple[int, ...]:
    """float64 numbers as the int64 ones of the same bits."""
    return struct.unpack(f"{len(values)}q", struct.pack(f"{len(values)}d", *values))


_STATES = (torch.float32, torch.float64)


def _is_wide(state: Tensor) -> bool:
    dtype = state.dtype
    if dtype not in _STATES or state.ndim < 2:
        raise ShapeError(f"a state must be float32 or float64 [B, *], got {dtype} {tuple(state.shape)}")
    return dtype is torch.float64


def _check_state(name: str, out: Tensor, shape: torch.Size | None = None, dtype: torch.dtype | None = None) -> None:
    """What the library writes without conversion: contiguous, float32 or float64, of at least two axes."""
    if not out.is_contiguous() or out.dtype not in _STATES or out.ndim < 2:
        raise ShapeError(
            f"{name} must be contiguous float32 or float64 [B, *], got {out.dtype} {tuple(out.shape)} with strides {out.stride()}"
        )
    if shape is not None and (out.shape != shape or out.dtype != dtype):
        raise ShapeError(f"{name} must be {dtype} {tuple(shape)} like the state, got {out.dtype} {tuple(out.shape)}")


def _check_cursor(cursor: Tensor) -> None:
    """How many numbers it has; the library checks its dtype and layout."""
    if cursor.numel() != 3:
        raise ShapeError(_CURSOR)


def _rows(table: Tensor) -> int:
    shape = table.shape
    if len(shape) != 2 or shape[1] != len(COLUMNS):
        raise ShapeError(f"table must have shape [rows, {len(COLUMNS)}], got {tuple(shape)}")
    return shape[0]


def _check_column(name: str, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if value is not None and (value.shape != shape or value.dtype != dtype or not value.is_contiguous()):
        raise ShapeError(
            f"{name} must be contiguous {dtype} {tuple(shape)}, got {value.dtype} {tuple(value.shape)} with strides "
            f"{value.stride()}"
        )


def _like(value: Tensor | None, shape: torch.Size) -> Tensor | None:
    return value if value is None or value.shape == shape else value.expand(shape)


def _columns(state: Tensor, *values: Tensor) -> list[Tensor]:
    """Each value [B], contiguous and in the state's dtype (rounded once)."""
    shape, dtype = state.shape[:1], state.dtype
    columns = []
    for value in values:
        if value.shape != shape:
            raise ShapeError(
                f"numbers of the samples must have shape [{shape[0]}], one for each, got {tuple(value.shape)}"
            )
        if value.dtype is not dtype or not value.is_contiguous():
            value = value.to(dtype).contiguous()
        columns.append(value)
    return columns
