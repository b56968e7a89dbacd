"""`fastdiff doctor --verify`: every operation of every backend of this machine against plain PyTorch, as a report to paste."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import FastdiffError
from ..execution import cpu, monitor, ops, reference, verify
from ..execution.questions import HOST, LAYOUTS, Question, difference, of_every_operation, right_answers
from ..sampling import sample

# samples of few numbers, of an odd and an even number, of less and of more than a block, a tile and a counter's signs
SHAPES = ((500, 1), (300, 2), (3, 7), (3, 5, 9), (4, 3, 8, 8), (3, 1, 31, 33), (2, 2053), (3, 4, 32, 32))
# of the runs that are replayed: with noise, without, with norms that a row measures
RUNS = (("vp", "euler_maruyama"), ("vp", "dpmpp_2m"), ("subvp", "pc"))


class Backend(NamedTuple):
    """What is asked: one backend on one device, in one of its forms."""

    name: str
    device: torch.device
    functions: dict[str, Callable[..., Any]]
    wide: bool  # whether it takes float64 states
    left_out: torch.dtype | None
    broken: tuple[type[Exception], ...]
    instruction_set: str | None = None


def backends() -> tuple[list[Backend], list[str]]:
    """Those of this machine, and why there are not more."""
    found, absent = list[Backend](), list[str]()
    library = {name: getattr(cpu, name) for name in verify.OPERATIONS}
    for name in cpu.INSTRUCTION_SETS:
        if cpu.use(name):
            found.append(Backend(f"cpu {name}", HOST, library, True, None, verify.LIBRARY_BROKEN, name))
        elif cpu.loaded:
            absent.append(f"cpu {name}: this processor lacks it")
    if not cpu.loaded:
        absent.append(f"cpu: {cpu.why}")
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not ops.HAS_TRITON:
        absent.append("triton: it is not installed")
    elif ops.INTERPRETED and not verify.interpreter_rounds_once():
        absent.append("triton: the interpreter of this version, before 3.9, rounds an fma twice")
    elif not devices and not ops.INTERPRETED:
        absent.append("triton: there is no CUDA device, and TRITON_INTERPRET=1 is not set")
    else:
        kernels = ops.kernels()
        functions = {name: getattr(kernels, name) for name in verify.OPERATIONS} | {
            "step": verify.prepared_step(kernels)
        }
        for device in [HOST] if ops.INTERPRETED else devices:
            name = "triton interpreted" if ops.INTERPRETED else f"triton {device}"
            left_out = verify.left_out(device)
            found.append(Backend(name, device, functions, False, left_out, verify.kernels_break()))
            if left_out is not None:
                absent.append(f"{name}: bfloat16 results, which the interpreter truncates")
    return found, absent


def questions() -> Iterator[tuple[Question, bool]]:
    """Some for every operation in every dtype and layout, and whether they are of float64 states."""
    for number, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.float64):
            network = (dtype, torch.bfloat16, torch.float16)[number % 3]
            for question in of_every_operation(shape, dtype, network, LAYOUTS[number % len(LAYOUTS)]):
                rounds = 3 if "table" in question.given else 2
                yield question._replace(samples=shape[0], rounds=rounds), dtype == torch.float64


def report() -> tuple[str, bool]:
    """The report, and whether all that could be tried is right."""
    began, used = time.perf_counter(), cpu.instruction_set
    found, absent = backends()
    asked, answered = list(questions()), 0
    wrong: dict[tuple[str, str], str] = {}
    with warnings.catch_warnings(), monitor.bar(None, len(asked), "verify", "question") as bar:
        warnings.simplefilter("ignore")
        for question, wide in asked:
            operation, right = question.operation, right_answers(question)
            for each in found:
                if (wide and not each.wide) or (each.name, operation) in wrong:
                    continue
                if each.instruction_set is not None:
                    cpu.use(each.instruction_set)
                told = difference(question, each.functions[operation], each.device, right, each.left_out, each.broken)
                answered += 1
                if told:
                    wrong[each.name, operation] = told
            bar.update()
        cpu.use(used or None)
        replayed, graphs_wrong = graphs()
    plain_wrong = verify.checksum(reference) != verify.KNOWN
    width = max(map(len, verify.OPERATIONS)) + 2
    table = ["".join([" " * width, *(f"{each.name:20}" for each in found)]).rstrip()] if found else []
    for operation in verify.OPERATIONS if found else ():
        verdicts = ["WRONG" if (each.name, operation) in wrong else "right" for each in found]
        table.append("".join([f"{operation:{width}}", *(f"{verdict:20}" for verdict in verdicts)]).rstrip())
    all_right = not (
        wrong or graphs_wrong or plain_wrong or ((cpu.NAMED or cpu.LIBRARY.exists()) and not cpu.available)
    )
    if not all_right:
        cure = "" if cpu.available else f"{cpu.way_out}, as plain PyTorch runs now; if that is no cure, "
        verdict = f"not all is right: {cure}please report this"
    elif answered:
        verdict = "all that could be tried is right"
    else:
        verdict = f"no kernel could be asked, and plain PyTorch runs: {cpu.way_out}"
    lines = [
        *machine(),
        "",
        ops.doctor(),
        "",
        *([*table, ""] if table else []),
        f"plain PyTorch: {'WRONG: its answers are not those that it gave when fastdiff was written' if plain_wrong else 'right'}",
        f"graphs: {replayed}",
        *(f"WRONG: {name}: {told}" for (name, _), told in wrong.items()),
        *(f"not tried: {reason}" for reason in absent),
        f"{answered} answers in {time.perf_counter() - began:.1f} s: {verdict}",
    ]
    return "\n".join(lines), all_right and answered > 0


def graphs() -> tuple[str, bool]:
    """What is to be said of runs that replay captured graphs, and whether that is a fault."""
    if not torch.cuda.is_available():
        return "not tried, as CUDA graphs need a CUDA device", False
    for device, (sde, sampler) in ((device, run) for device in range(torch.cuda.device_count()) for run in RUNS):
        options: dict[str, Any] = {"sampler": sampler, "shape": (3, 8, 8), "num_samples": 4, "seed": 5}
        right = sample(_score, sde, 12, backend="reference", **options)
        for engine in ("eager", "graph"):
            try:
                x = sample(_score, sde, 12, engine=engine, device=f"cuda:{device}", **options)
            except (FastdiffError, RuntimeError) as error:
                return f"WRONG: {sampler} with engine={engine!r} on cuda:{device} fails: {error}", True
            if not torch.equal(x.cpu(), right):
                far = float((x.cpu() - right).abs().max())
                return (
                    f"WRONG: {sampler} with engine={engine!r} on cuda:{device} is {far:.3g} from the CPU's samples",
                    True,
                )
    return "captured, replayed and equal to eager runs", False


def _score(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x.clamp(-2, 2) / -2  # the same bits on every device


def machine() -> Iterator[str]:
    """Versions and hardware."""
    yield f"fastdiff {metadata.version('fastdiff')}, Python {platform.python_version()}, numpy {metadata.version('numpy')}"
    yield ", ".join(verify.software())
    yield f"{platform.platform()}, {_processor()}, {os.cpu_count()} of them"
    for index in range(torch.cuda.device_count()):
        yield f"cuda:{index}: {verify.hardware(torch.device('cuda', index))}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
