"""Questions for a backend, and its answers, compared bit for bit with those of fastdiff.execution.reference.

A question is a call of an operation on operands made here: irregular numbers, with NaN, infinities and subnormal
numbers in the second sample, and table rows that use all of their coefficients, clamp nothing, or use few. Not compared
are numbers of a sample beyond PART, and sums over samples of more than MOST. Who is asked: fastdiff.execution.verify.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..table import COLUMNS
from . import cpu, reference, torch_private

Operation = Callable[..., Any]

HOST = torch.device("cpu")
ELEMENTWISE = ("normal", "rademacher", "step", "perturb")  # numbers of which depend on no others of their sample
PART = 2**16  # of a longer sample; more than _PERIOD
MOST = 2**22  # of a sample; a sixteenth without the compiled library, where plain PyTorch has the right answers
ENOUGH, ROUNDS = 2048, 12  # numbers, if not in more rounds: one wrong last place in a hundred shows

# --- questions -------------------------------------------------------------------------------------------------------

# operands' numbers, in [-2, 2): of a period that is a prime, so that no tile or block repeats another; the next sample's begin
# _APART further on, those after _ROWS samples anew
_PERIOD, _APART, _ROWS = 4099, 7, 2048
_PLACES = np.arange(2 * _PERIOD + _APART * _ROWS, dtype=np.uint64) % np.uint64(_PERIOD)
_NUMBERS = (_PLACES * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(11)) * 2.0**-51 - 2.0
_ODD = (np.nan, np.inf, -np.inf, 1e-41, -1e-41, 3e38, -0.0, 1e-310)
_USED = {
    "a": 0.93, "e": -0.4, "b0": 0.31, "b1": -1.2, "b2": 0.7, "b3": 0.11, "c": 0.52, "p": 1.3, "q": -0.8, "low": -0.7, "high": 0.9,
    "next_scale": 0.77, "guidance": 2.5, "log_slope": 0.6, "log_mid": -1.1, "known_alpha": 0.8, "known_sigma": 0.6, "gain": 0.05,
    "cap": 0.11,
}  # fmt: skip
_OPEN = {**_USED, "p": 0.0, "q": 1.0, "low": -np.inf, "high": np.inf, "next_scale": 1.0, "guidance": 1.0, "cap": np.inf}
_FEW = {**_OPEN, **dict.fromkeys(("a", "e", "b1", "b3", "c", "log_slope", "known_alpha"), 0.0), "p": -0.55, "q": 0.23}
TABLE = torch.from_numpy(np.array([[row[name] for name in COLUMNS] for row in (_USED, _OPEN, _FEW)]))
_SEED = -(2**62) - 12345
_OF_NO_SAMPLE = ("cursor", "table", "frequencies")  # tensors whose first axis is not the batch


class Question(NamedTuple):
    """A call whose operands `operands` makes, like given ones."""

    operation: str
    given: Mapping[str, Any]  # arguments, of whose tensors only dtypes, shapes, strides and alignments count
    samples: int  # in the question, of so many in the call
    batch: int
    rounds: int  # how often it is asked, with other noise and table rows; the second launch is bound by the first
    part: int | None  # how many numbers of each sample are compared; None: all

    @classmethod
    def like(cls, operation: str, given: Mapping[str, Any]) -> Question | None:
        """The question for a call, or None where nothing can be compared, or not in bounded time."""
        values = [value for name, value in given.items() if name not in _OF_NO_SAMPLE]
        values += [each for value in values if isinstance(value, (list, tuple)) for each in value]
        batched = [value for value in values if isinstance(value, Tensor)]
        if not all(value.ndim for value in batched):
            return None
        numel, count = max((value[:1].numel(), len(value)) for value in batched)
        most = None if operation in ELEMENTWISE else MOST if cpu.available else MOST // 16
        if not numel or (most is not None and numel > most):
            return None
        samples = max(3, ENOUGH // numel) if numel <= PART else min(count, 2)
        if given.get("batch") and count * numel <= MOST:  # a mean over the batch, which a kernel is compiled for
            samples = count
        if not all(_extends(value) for value in batched):
            samples = min(samples, count)
        rounds = max(len(TABLE) if "table" in given else 2, min(ROUNDS, ENOUGH // (samples * numel)))
        return cls(operation, given, samples, count, rounds, PART if most is None and numel > PART else None)

    def operands(self, turn: int, device: torch.device | None) -> dict[str, Any]:
        """Operands of one round on a device, with the strides and alignments of those given; None: contiguous, on the CPU,
        and no more of them than is compared. What shares memory there does so here."""
        made: dict[Any, Tensor] = {}
        place = device or HOST

        def like(name: str, value: Any) -> Any:
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
                return [like(f"{name}[{j}]", each) for j, each in enumerate(value)]
            if not isinstance(value, Tensor):
                return value
            if name == "cursor":
                return torch.from_numpy(np.array((turn % len(TABLE), 7, _SEED + turn))).to(place)
            if name == "table":
                return TABLE.to(place, value.dtype)
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in made:
                made[key] = self._operand(name, turn, value, place, as_given=device is not None)
            return made[key]

        return {name: like(name, value) for name, value in self.given.items()}

    def _operand(self, name: str, turn: int, value: Tensor, device: torch.device, as_given: bool) -> Tensor:
        shape, strides, numel = (self._length(name, value), *value.shape[1:]), value.stride(), value[:1].numel()
        repeats = 0 in strides  # an axis of stride 0 repeats its first entry
        cut = None if as_given or self.part is None or numel <= self.part else self.part
        offset = value.data_ptr() % 16 // value.element_size()
        length = offset + 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
        if _overlap(shape, strides):  # as sliding windows do: the memory has the numbers, not the places
            windows = _numbers(name, turn, 1, length, value.dtype, device).as_strided(shape, strides, offset)
            return windows if as_given else (windows.flatten(1)[:, :cut] if cut else windows).contiguous()
        numbers = _numbers(name, turn, shape[0], numel if cut is None or repeats else cut, value.dtype, device)
        once = tuple(slice(None if stride else 1) for stride in strides)
        if repeats:
            numbers = numbers.view(shape)[once].expand(shape)
        if not as_given:
            return numbers.flatten(1)[:, :cut].contiguous() if cut else numbers.reshape(shape).contiguous()
        if value.is_contiguous() and not offset:
            return numbers.view(shape)
        made = numbers.new_zeros(length).as_strided(shape, strides, offset)
        made[once].copy_(numbers.view(shape)[once])
        return made

    def _length(self, name: str, value: Tensor) -> int:
        """The length of an operand's first axis."""
        return self.samples if name not in _OF_NO_SAMPLE and len(value) == self.batch else len(value)

    def __str__(self) -> str:
        """All that a kernel is compiled for, and how much of each sample is compared. (Strides differ for one sample.)"""

        def said(name: str, value: Any) -> str:
            if isinstance(value, (list, tuple)):
                return f"[{' '.join(said(name, each) for each in value)}]"
            if not isinstance(value, Tensor) or name in ("cursor", "table"):
                return "" if value is None else str(value) if not isinstance(value, Tensor) else str(value.dtype)
            first = len(value) if name in _OF_NO_SAMPLE else "one" if len(value) == 1 else "more"
            return f"{value.dtype} {first} x {tuple(value.shape[1:])} {value.stride()} {value.data_ptr() % 16}"

        given = " ".join(f"{name}={said(name, value)}" for name, value in self.given.items() if value is not None)
        batch = f", {self.samples} samples" if self.given.get("batch") else ""
        return f"{given} of {self.part or 'all'}{batch}".replace("torch.", "")


def _extends(value: Tensor) -> bool:
    """Whether more samples could follow in memory, for which the same kernel would be compiled."""
    if value.is_contiguous():
        return True
    apart, span = value.stride(0), 1 + sum((n - 1) * stride for n, stride in zip(value.shape[1:], value.stride()[1:]))
    return (apart == 0 or apart >= span) if len(value) > 1 else apart == span == value[:1].numel()


def _overlap(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether entries share memory, but for those that an axis of stride 0 repeats."""
    span = 1
    for stride, n in sorted((stride, n) for stride, n in zip(strides, shape) if stride and n > 1):
        if stride < span:
            return True
        span += (n - 1) * stride
    return False


def _numbers(name: str, turn: int, count: int, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An operand's numbers in one round, [count, numel] of the dtype."""
    start, rows, width = zlib.crc32(name.encode()) + turn, min(count, _ROWS), min(numel, _PERIOD)
    numbers = _pattern(dtype).as_strided((rows, width), (_APART, 1), start % _PERIOD).clone()
    if dtype.is_floating_point and count > 1 and width >= len(_ODD):
        at = start % (width - len(_ODD) + 1)
        numbers[1, at : at + len(_ODD)] = _odd(dtype)
    numbers = numbers.to(device)
    if (rows, width) == (count, numel):
        return numbers
    return numbers.repeat(-(-count // rows), -(-numel // width))[:count, :numel].contiguous()


@functools.cache
def _pattern(dtype: torch.dtype) -> Tensor:
    if dtype == torch.int64:
        return torch.full((len(_NUMBERS),), 9, device="cpu")
    numbers = torch.from_numpy(_NUMBERS)
    return numbers > 0 if dtype == torch.bool else numbers.to(dtype)


@functools.cache
def _odd(dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.array(_ODD)).to(dtype)


# --- answers ---------------------------------------------------------------------------------------------------------


def answers(function: Operation, operands: Mapping[str, Any]) -> dict[str, Tensor]:
    """All that a call returns, and its operands after it, by name."""
    returned = function(**operands)
    results = returned if isinstance(returned, tuple) else (returned,)
    found: dict[str, Any] = {
        f"result {j}" if len(results) > 1 else "the result": value for j, value in enumerate(results)
    }
    for name, value in operands.items():
        found |= {f"{name}[{j}]": each for j, each in enumerate(value)} if isinstance(value, list) else {name: value}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def right_answers(question: Question, judge: ModuleType = reference) -> list[dict[str, Tensor]]:
    """The judge's, in each round."""
    with undisturbed():
        return [
            answers(getattr(judge, question.operation), question.operands(turn, None))
            for turn in range(question.rounds)
        ]


def difference(
    question: Question,
    function: Operation,
    device: torch.device,
    right: Sequence[dict[str, Tensor]],
    leave: torch.dtype | None = None,
    broken: tuple[type[Exception], ...] = (),
) -> str:
    """How a function's answers on a device differ from the right ones; "" if they do not.

    leave   the dtype of results that are not compared
    broken  what the function may raise instead of an answer
    """
    with undisturbed():
        for turn, expected in enumerate(right):
            operands = question.operands(turn, device)
            try:
                ours = {name: value.cpu() for name, value in answers(function, operands).items()}
            except torch.OutOfMemoryError:
                raise
            except broken as error:
                return f"{question.operation} fails with {type(error).__name__}: {files.reason(error)}"
            for name, value in expected.items():
                if value.dtype != leave and (found := _compared(ours[name], value)):
                    return f"{question.operation}: {found.format(name)}"
    return ""


def _compared(ours: Tensor, right: Tensor) -> str:
    if ours.shape != right.shape:  # of which a part is compared
        ours = ours.flatten(1)[:, : right.shape[1]]
    wrong = ~((ours == right) | (ours.isnan() & right.isnan()))
    if not wrong.any():
        return ""
    places = wrong.nonzero()
    first = tuple(places[0].tolist())
    apart = float((ours.double() - right.double())[wrong].abs().nan_to_num(0.0, 0.0, 0.0).max())
    largest, digits = f"by up to {apart:.3g}, " if apart else "", 17 if right.dtype == torch.float64 else 9
    return (
        f"{len(places)} of {wrong.numel()} numbers of {{}} differ, {largest}first at {list(first)}, "
        f"{float(ours[first]):.{digits}g} instead of {float(right[first]):.{digits}g}"
    )


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Real tensors and IEEE 754's subnormal numbers, whatever modes the caller is in and torch.set_flush_denormal was told."""
    flushed = cpu.flushes_subnormals()
    if flushed:
        torch.set_flush_denormal(False)
    try:
        with torch_private.no_modes(), torch.no_grad(), np.errstate(all="ignore"):
            yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)


# --- questions about every operation ---------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "channels-last", "sliced", "one for all")


def of_every_operation(
    shape: tuple[int, ...], dtype: torch.dtype, network: torch.dtype, layout: str
) -> Iterator[Question]:
    """Some for every operation, for states [B, *] of a dtype and network outputs of another, in one of LAYOUTS."""

    def state(of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="cpu")

    def output(of: torch.dtype = network) -> Tensor:
        if layout == "channels-last" and len(shape) > 2:
            return torch.empty((shape[0], *shape[2:], shape[1]), dtype=of, device="cpu").movedim(-1, 1)
        if layout == "sliced":  # half of the channels, as with a learned variance
            return torch.empty((shape[0], 2 * shape[1], *shape[2:]), dtype=of, device="cpu")[:, shape[1] :]
        if layout == "one for all":
            return torch.empty((1, *shape[1:]), dtype=of, device="cpu").expand(shape)
        return state(of)

    def columns(names: str) -> dict[str, Tensor]:
        return {name: torch.empty(shape[0], dtype=dtype, device="cpu") for name in names.split()}

    cursor = {"cursor": torch.empty(3, dtype=torch.int64, device="cpu")}
    drawn = {**cursor, "stream": 1}
    row = {"table": torch.empty(1, len(COLUMNS), dtype=dtype, device="cpu"), **cursor}
    flags = torch.empty(shape[0], dtype=torch.int64, device="cpu")
    measured = torch.empty(shape[0], 2, dtype=dtype, device="cpu")
    written = output() if layout != "one for all" else state(network)
    x = state()
    steps: list[dict[str, Any]] = [
        {"out": x, "stream": 1, "m": output(), "net_input": written, "first_bad": flags},  # in place
        {"stream": 1, "m": output(), "history": [state(), state(), state()], "base": state(), "pushed": state()},
        {"stream": 1, "m": output(), "guide": output(), "v": output()},
        {"stream": None, "m": output(), "measured": measured, "z": state(), "first_bad": flags},
        {"stream": 1, "m": output(), "known": output(dtype), "mask": output(torch.bool)},
        {"stream": None, "history": [state(), state()]},
    ]
    langevin: list[dict[str, Any]] = [
        {"stream": 1, "batch": False},
        {"stream": None, "batch": True, "guide": output(), "z": state()},
        {"stream": 1, "batch": True, "kept": state()},
    ]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("normal", {"out": state(), **drawn}),
        ("rademacher", {"out": state(), **drawn}),
        *(("step", {"out": state(), **row, "x": x, **operands}) for operands in steps),
        *(("measure_langevin", {"measured": measured, **row, "x": x, "m": output(), **how}) for how in langevin),
        ("perturb", {"x0": x, **columns("alpha sigma"), **drawn}),
        ("dsm_loss", {"output": output(), "x0": x, **columns("r w weight"), **drawn}),
        ("dsm_loss_backward", {**columns("grad"), "error": x, **columns("weight"), "dtype": network}),
        *(("probe_dot", {"value": output(), **drawn, "kind": kind}) for kind in ("normal", "rademacher")),
        ("probe_dot", {"value": output(), **drawn, "kind": "normal", "probe": state()}),
        ("rk_error", {"x": x, "stages": [output(), state(), state(), state()], **columns("h"), "b": (0.1, 0.0, 0.25, -0.3),
                      "e": (0.0, 0.02, 0.1, 0.03), "rtol": 1e-3, "atol": 1e-5}),
    ]  # fmt: skip
    if dtype == torch.float32:  # in float64 sines are the platform's, and not the same everywhere
        times = {
            "t": columns("t")["t"],
            "frequencies": torch.empty(8, device="cpu", dtype=dtype),
            "scale": 500.0,
            "channels": 17,
        }
        calls += [("timestep_embedding", {**times, "order": order}) for order in ("sin_cos", "cos_sin", "interleaved")]
    for operation, given in calls:
        question = Question.like(operation, given)
        if question is not None:
            yield question
