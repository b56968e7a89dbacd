"""Whether a backend computes what fastdiff.execution.reference means: who is asked questions, and when.

    The compiled library answers those of `known` when it is loaded, in some milliseconds. It is used if the checksum of
    its answers is the reference's, KNOWN.

    The Triton kernels are asked at the first call of an operation on a device with operands of those dtypes, sample
    shapes, strides and alignments. The question has them too, in ENOUGH numbers: it runs the compiled kernel that the
    call is about to run, and compiles no other. What was right is remembered on disk, for the device, its driver, the
    versions of torch and Triton and the text of the kernels; what was not, until the process ends. No kernel is compiled
    for numbers of samples, streams, cursors and tables, so none of them is a question of its own. Not compared are
    bfloat16 results of Triton's interpreter, which truncates them, and anything of an interpreter before Triton 3.9,
    which rounds an fma twice.

What differs, or does not compile or launch, ends in one warning with the numbers, and in plain PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import files
from ..errors import GraphError, warn
from . import cpu, reference
from .questions import (
    HOST,
    TABLE,
    Operation,
    Question,
    answers,
    difference,
    of_every_operation,
    right_answers,
    undisturbed,
)

# those with a meaning in the reference: the words of a batch are the library's alone
OPERATIONS = tuple(name for name in cpu.OPERATIONS if hasattr(reference, name))
_WRITTEN = ("out", "pushed", "net_input", "first_bad", "measured", "kept")
# what is raised instead of an answer by a kernel that does not compile or launch; it refuses arguments by others
BROKEN = (RuntimeError, OSError, ImportError, AttributeError, LookupError, AssertionError, subprocess.SubprocessError)
LIBRARY_BROKEN = (*BROKEN, ValueError, TypeError, MemoryError)
MANY = 4096  # kinds of calls that an operation keeps in mind

# --- the compiled library --------------------------------------------------------------------------------------------

KNOWN = 0x134DB37B  # the reference's (a test compares)


def known() -> Iterator[tuple[Question, int]]:
    """The questions whose answers are known, and which of its rounds each is asked for."""
    narrow = of_every_operation((3, 2, 13, 41), torch.float32, torch.bfloat16, "channels-last")
    wide = itertools.islice(of_every_operation((3, 11), torch.float64, torch.float16, "sliced"), 2, None, 3)
    for number, question in enumerate(itertools.chain(narrow, wide)):
        yield question._replace(samples=3), number % len(TABLE)


def checksum(module: ModuleType) -> int:
    """Of a backend's answers to them on the HOST, −0 counted as 0 and all NaN as one."""
    total = 0
    with undisturbed():
        for question, turn in known():
            found = answers(getattr(module, question.operation), question.operands(turn, HOST))
            for name, value in found.items():
                if name not in question.given or name in _WRITTEN:
                    numbers = value.double().numpy().ravel() + 0.0
                    numbers[numbers != numbers] = 7.0
                    total = zlib.crc32(numbers.data, total)
    return total


def library_fault() -> str:
    """How the loaded library's answers differ from plain PyTorch's, or ""."""
    try:
        if checksum(cpu) == KNOWN:
            return ""
    except LIBRARY_BROKEN:  # as the difference will say
        pass
    found = (
        difference(question, getattr(cpu, question.operation), HOST, right_answers(question), broken=LIBRARY_BROKEN)
        for question, _ in known()
    )
    return next(filter(None, found), "")


# --- the Triton kernels ----------------------------------------------------------------------------------------------


def proving(kernels: ModuleType) -> ModuleType:
    """The kernels' operations as a module, each of which asks before it runs what it has not asked about, and runs plain
    PyTorch on a device where an answer was wrong."""
    module: Any = ModuleType(kernels.__name__, "The Triton kernels, asked before they run: fastdiff.execution.verify.")
    module.KEEPS_NOISE = kernels.KEEPS_NOISE
    for name in OPERATIONS:
        setattr(module, name, _asked(kernels, name))
    module.prepare_step = _asked_prepare_step(kernels)
    return module  # type: ignore[no-any-return]


def refusal(device: torch.device) -> str:
    """Why no Triton kernel runs on a device in this process, or ""."""
    if _refused and device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _refused.get(device, "")


_lock = threading.RLock()
_refused: dict[torch.device, str] = {}
_chosen: list[dict[Any, Operation]] = []  # of each operation: what runs calls of a kind
_right: dict[torch.device, set[str]] = {}  # the questions, by their text, that were answered rightly


def _asked(kernels: ModuleType, name: str) -> Operation:
    kernel, plain, chosen = getattr(kernels, name), _uncaptured(getattr(reference, name)), dict[Any, Operation]()
    _chosen.append(chosen)
    decisive = _DECISIVE.get(name)

    def run(*args: Any, **kwargs: Any) -> Any:
        told = args if decisive is None else [args[i] for i in decisive if i < len(args)]
        kind = (len(args), *_kind(told), *(_kind(kwargs.items()) if kwargs else ()))
        function = chosen.get(kind)
        if function is None:
            if len(chosen) >= MANY:
                chosen.clear()
            may = _may_run(kernels, name, name, kernel, args, kwargs)
            function = plain if may is False else kernel
            if may is not None:
                chosen[kind] = function
        return function(*args, **kwargs)

    return run


# Positions of the arguments that tell an operation's calls apart in one process, as far as its kernels are compiled for them;
# to look at all would take longer than to prepare a launch. Of the operations that are not here all are looked at.
_DECISIVE = {
    "normal": (0,), "rademacher": (0,), "measure_langevin": (3, 4, 5, 6, 7, 8, 9), "perturb": (0,), "dsm_loss": (0, 1),
    "dsm_loss_backward": (1, 3), "timestep_embedding": (1, 3, 4), "probe_dot": (0, 3, 4), "rk_error": (0, 1, 3),
}  # fmt: skip


def _kind(values: Iterable[Any]) -> list[Any]:
    kind: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            kind += (value.device, value.dtype, value.shape, value.stride(), value.data_ptr() % 16 == 0)
        elif isinstance(value, list):
            kind.append(tuple(_kind(value)))
        else:
            kind.append(value)
    return kind


def prepared_step(kernels: ModuleType) -> Operation:
    """`step` by way of prepare_step, as a loop calls it; the second of two calls, as the first binds the launch of all
    that follow."""

    def step(
        out: Tensor, table: Tensor, cursor: Tensor, stream: int | None, x: Tensor, m: Tensor | None = None,
        v: Tensor | None = None, **operands: Any
    ) -> None:  # fmt: skip
        run = kernels.prepare_step(out, table, stream, x, **operands)
        written = [out, *(value for name in _WRITTEN if (value := operands.get(name)) is not None)]
        before = [value.clone() for value in written]
        run(cursor, m, v)
        for value, content in zip(written, before):
            value.copy_(content)
        run(cursor, m, v)

    return step


def _asked_prepare_step(kernels: ModuleType) -> Operation:
    at_once, plain = prepared_step(kernels), _uncaptured(reference.step)

    def prepare_step(out: Tensor, table: Tensor, stream: int | None, x: Tensor, **operands: Any) -> Operation:
        prepared = kernels.prepare_step(out, table, stream, x, **operands)
        asked = set[Any]()  # kinds of outputs that the kernel is right for

        def in_its_place(cursor: Tensor, m: Tensor | None, v: Tensor | None) -> None:
            plain(out, table, cursor, stream, x, m, v=v, **operands)

        def run(cursor: Tensor, m: Tensor | None, v: Tensor | None) -> None:
            if _refused and out.device in _refused:  # by now, for an answer of another operation or output
                in_its_place(cursor, m, v)
                return
            kind = _output(m), _output(v)
            if kind not in asked:
                given = (out, table, cursor, stream, x, m)
                may = _may_run(kernels, "step", "prepare_step", at_once, given, {"v": v, **operands})
                if may is False:
                    in_its_place(cursor, m, v)
                    return
                if may is not None:
                    asked.add(kind)
            prepared(cursor, m, v)

        return run

    return prepare_step


def _output(value: Tensor | None) -> Any:
    """What of a network's output a kernel is compiled for; its shape is the state's."""
    return None if value is None else (value.dtype, value.stride(), value.data_ptr() % 16 == 0)


def _uncaptured(function: Operation) -> Operation:
    """Plain PyTorch in the place of a refused kernel, which a graph would have captured."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if capturing(next(value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))):
            raise GraphError(
                "plain PyTorch, which runs in the place of refused kernels, reads a row's number on the host"
            )
        return function(*args, **kwargs)

    return run


def capturing(device: torch.device) -> bool:
    """Whether what is launched on a device now becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # or it would ask, and wake, the current one
        return torch.cuda.is_current_stream_capturing()


def _may_run(
    kernels: ModuleType, name: str, called: str, kernel: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool | None:
    """Whether a kernel may run a call, after the question about it; None: that cannot be asked, or not now.

    name, called  the operation, and the function that the caller called for it
    """
    try:
        given = _signature(name).bind(*args, **kwargs).arguments
    except TypeError:  # as the kernel will say
        return None
    device = next(value.device for value in given.values() if isinstance(value, Tensor))
    with _lock:
        if device in _refused:
            return False
        if capturing(device) or (device.type == "cpu" and not interpreter_rounds_once()):
            return None
        question = Question.like(name, given)
        if question is None:
            return True
        text, right = f"{called} {question}", _remembered(kernels, device)
        if text in right:
            return True
        wrong = _wrong(question, kernel, device)
        if wrong is None:
            return None
        if not wrong:
            _remember(kernels, device, text)
            return True
        refuse(device, wrong)
        return False


def refuse(device: torch.device, wrong: str) -> None:
    """Run no Triton kernel on a device in this process, and say why in a warning."""
    where = f"{device} ({hardware(device).partition(',')[0]})"
    with _lock:
        _refused[device] = reason = f"the Triton kernels are not used on {where}: {wrong}"
        for chosen in _chosen:
            chosen.clear()
    warn(
        f"{reason}; plain PyTorch runs there until this process ends, several times slower: please report what "
        "`fastdiff doctor --verify` prints",
        RuntimeWarning,
    )


@functools.cache
def _signature(name: str) -> inspect.Signature:
    return inspect.signature(getattr(reference, name))


@functools.cache
def interpreter_rounds_once() -> bool:
    """Whether an fma of the interpreter of this Triton is one."""
    return tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 9)


def _wrong(question: Question, kernel: Operation, device: torch.device) -> str | None:
    """How a kernel answers wrongly, "" if rightly; None if the arguments are refused, as the call will say."""
    try:
        right = right_answers(question, cpu if cpu.available else reference)
        return difference(question, kernel, device, right, left_out(device), kernels_break())
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, LookupError):
        return None


def left_out(device: torch.device) -> torch.dtype | None:
    """What of a kernel's results cannot be compared: Triton's interpreter truncates where bfloat16 is rounded."""
    return torch.bfloat16 if device.type == "cpu" else None


def kernels_break() -> tuple[type[Exception], ...]:
    """What is raised by a kernel that does not compile or launch."""
    return (importlib.import_module("triton.errors").TritonError, *BROKEN)


# --- what was right, on disk -----------------------------------------------------------------------------------------


def _remembered(kernels: ModuleType, device: torch.device) -> set[str]:
    if device not in _right:
        _right[device] = set(_read(*_memory(kernels, device)))
    return _right[device]


def _remember(kernels: ModuleType, device: torch.device, text: str) -> None:
    """Note a right answer, on disk too if that can be written. What another process writes at the same moment may be lost:
    then its questions are asked again."""
    path, environment = _memory(kernels, device)
    _right[device] |= {text, *_read(path, environment)}
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as file:
                file.write("\n".join([environment, *sorted(_right[device]), ""]).encode())


def _read(path: Path | None, environment: str) -> list[str]:
    """The questions that a file holds; none if it cannot be read, or is another environment's."""
    if path is None:
        return []
    try:
        with files.open_regular(path) as file:
            first, *rest = file.read(2**22).decode(errors="replace").split("\n")
    except OSError:
        return []
    return rest[:-1] if first == environment else []


@functools.cache
def _memory(kernels: ModuleType, device: torch.device) -> tuple[Path | None, str]:
    """The file for a device and all that its kernels come from; and those, in words."""
    text = hashlib.sha256()
    for source in sorted(Path(str(kernels.__file__)).parent.glob("*.py")):
        text.update(source.read_bytes())
    settings = [
        f"{name}={value!r}" for name, value in sorted(os.environ.items())
        if name.startswith("TRITON_") and name not in ("TRITON_CACHE_DIR", "TRITON_HOME")  # a job may have its own
    ]  # fmt: skip
    environment = "; ".join([f"fastdiff's kernels {text.hexdigest()[:16]}", *software(), hardware(device), *settings])
    name = f"kernels-{hashlib.sha256(environment.encode()).hexdigest()[:16]}.txt"
    folder = _folder()
    return None if folder is None else folder / "fastdiff" / name, environment


def _folder() -> Path | None:
    """The user's cache."""
    given = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if given and Path(given).is_absolute():
        return Path(given)
    try:
        return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    except RuntimeError:  # the process of a user who has no home
        return None


def software() -> list[str]:
    """The versions that compiled kernels depend on."""
    found = [f"torch {torch.__version__}", f"triton {_version('triton') or 'not installed'}"]
    kind = "HIP" if torch.version.hip else "CUDA"
    return [*found, f"{kind} {torch.version.hip or torch.version.cuda or 'not in this build of torch'}"]


def hardware(device: torch.device) -> str:
    """A device, its capability and its driver."""
    if device.type != "cuda":
        return "Triton's interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    driver = ""
    with contextlib.suppress(OSError):
        driver = Path("/proc/driver/nvidia/version").read_text().partition("\n")[0].strip()
    return f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}, driver {driver or 'unknown'}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
