"""A pytest plugin: Triton kernels are compiled for sm_90, and their PTX runs on CPU tensors (tests/ptx.py).

    PYTHONPATH=tests python -m pytest -p compiled tests/kernel_cases.py

`Driver` stands where CUDA's would, `launch` where fastdiff.kernels.tiles.launch does; `planted` puts a fault in what is compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ptx
import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from fastdiff import kernels
from fastdiff.execution import ops

tiles = kernels.tiles


class Driver:
    """Stands where the CUDA driver would: it only says which GPU is meant."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class _ToPtx(CUDABackend):  # type: ignore[misc]
    """The compiler without its last stage: machine code would run nowhere here."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def hash(self) -> str:
        """Apart from what the whole compiler leaves in the same cache."""
        return f"{super().hash()}, to PTX"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]


_kernels: dict[tuple[str, str], ptx.Kernel] = {}  # by the compilation's hash and the fault
launches = 0
bits = 0  # how many the cases have compared
_fault = ""


def launch(kernel: Any, grid: tuple[int, ...], like: torch.Tensor, *args: Any, **meta: Any) -> None:
    """As tiles.launch."""
    global launches
    options = {"enable_fp_fusion": _fault == "contraction"}
    compiled = kernel.warmup(*args, grid=grid, **meta, num_warps=tiles.WARPS, **options)
    key = compiled.hash, _fault
    if key not in _kernels:
        code = compiled.asm["ptx"]
        declared = getattr(sys.modules[kernel.fn.__module__], "APPROXIMATIONS", ())
        _kernels[key] = ptx.Kernel(FAULTS[_fault](code if isinstance(code, str) else code.decode()), declared)
    names = [parameter.name for parameter in kernel.params]
    values, signature = {**dict(zip(names, args)), **meta}, compiled.src.signature
    flat = [pair for name in names for pair in _flat(values[name], signature[name])]
    tensors = [value for value, _ in flat if isinstance(value, torch.Tensor)]
    # and the two scratch memories that a launch may ask for
    _kernels[key].run(grid, [*(_bits(*pair) for pair in flat), 0, 0], tensors, compiled.metadata.shared)
    launches += 1


def _flat(value: Any, kind: Any) -> Iterator[tuple[Any, str]]:
    """The arguments that are no constants, tuples' one by one."""
    if isinstance(kind, (tuple, list)):
        for part, of in zip(value, kind):
            yield from _flat(part, of)
    elif kind != "constexpr":
        yield value, kind


def _bits(value: Any, kind: str) -> int:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if kind in ("fp32", "fp64"):
        return int.from_bytes(struct.pack("<f" if kind == "fp32" else "<d", value), "little")
    return int(value)


def _changed(pattern: str, by: str) -> Callable[[str], str]:
    return lambda code: re.sub(pattern, by, code)


_CONSTANT = struct.pack(">f", 0.9999986).hex().upper()
FAULTS: dict[str, Callable[[str], str]] = {
    "": lambda code: code,
    "contraction": lambda code: code,  # an option of the launch
    "a constant of the radius, by a bit": _changed(f"0f{_CONSTANT}", f"0f{int(_CONSTANT, 16) ^ 1:08X}"),
    "a store one element off": _changed(r"(st\.global\.(?:v4\.)?b32) \[ (%rd\d+) \+ 0 \]", r"\1 [ \2 + 4 ]"),
    "stores without their masks": _changed(r"@%p\d+ (st\.global)", r"\1"),
    "loads without their masks": _changed(r"@%p\d+ (ld\.global)", r"\1"),
    "bfloat16 truncated": _changed(r"cvt\.rn\.bf16\.f32\s+(%rs\d+), (%r\d+)", r"mov.b32 {_, \1}, \2"),
    "no barriers": _changed(r"bar\.sync\s+0;", ""),
    "programs on each other's samples": _changed(r"(mov\.u32 \s*(%r\d+), %ctaid\.y;)", r"\1 shr.u32 \2, \2, 1;"),
}  # fmt: skip


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """Kernels have a fault of FAULTS."""
    global _fault
    _fault = fault
    try:
        yield
    finally:
        _fault = ""


def pytest_configure() -> None:
    backends["nvidia"] = dataclasses.replace(backends["nvidia"], compiler=_ToPtx)
    triton.runtime.driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
    ops.INTERPRETED = True  # backend="triton" takes CPU tensors
    launch.__wrapped__ = tiles.launch  # type: ignore[attr-defined]
    tiles.launch = launch


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{len(_kernels)} compiled kernels ran in {launches} launches; {bits} bits compared")
