"""Compile every Triton kernel for GPUs that this machine need not have, and read the machine code.

    python tests/aot.py [--out benchmarks/results/aot.csv] [--few]

The kernels are called as the library calls them, on small CPU tensors, but with a driver in place of CUDA's that only says
which GPU it is: so what is compiled is what a launch there would compile. The `step` variants are those of the tables
that the shipped samplers make: the runner runs each, with operations that note what they were given.

Registers and shared memory come from the compiler. instructions_per_element is the number of SASS instructions that a program
runs whose row has the usual coefficients (the fewest from the entry to the EXIT that ends a program: what rows rarely need,
and the IEEE square root's slow path, are branched past), divided by the elements of a thread; on AMD, of all instructions to
s_endpgm. approximations: operations that need not be IEEE's, as PTX or LLVM's flags say. contracted: float operations that may
be fused, as PTX or LLVM's flags say; on sm_80 and sm_90 (later ones pack two operations in one) also what the machine code has
more or less of them than the PTX.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import functools
import itertools
import math
import multiprocessing
import re
import struct
import subprocess
import tempfile
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from compiled import Driver
from triton.backends.compiler import GPUTarget

import fastdiff
from fastdiff import kernels, samplers
from fastdiff.execution import loop as runner
from fastdiff.table import COLUMNS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FIELDS = (
    "kernel", "variant", "target", "registers", "spills", "shared_bytes", "instructions_per_element",
    "loads_128", "stores_128", "loads_32", "stores_32", "shuffles", "barriers", "approximations", "contracted",
)  # fmt: skip
# What rarely runs is compiled for two targets only, to save a quarter of the time
RARE = (
    "batch means", "bf16 network", "given, 5e6 numbers", "usual, unchecked", "usual, 64 numbers", "usual, 1023 numbers",
)  # fmt: skip
RARE_TARGETS = ["sm_90", "gfx942"]
_INSTRUCTION = 16  # bytes
IMAGE = (3, 64, 64)  # a sample: 12 programs, all full
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "aot.csv"


Instruction = tuple[str, str, str, str]  # address, predicate or "", name, operands


class Operands(NamedTuple):
    """Which operands a `step` has; history: how many earlier predictions it can read."""

    m: bool = True
    history: int = 0
    v: bool = False
    base: bool = False
    noise: bool = False
    measured: bool = False
    pushed: bool = False
    net_input: bool = False

    def __str__(self) -> str:
        names = [name for name in self._fields if name != "history" and getattr(self, name)]
        return "+".join([*names, *([f"history{self.history}"] if self.history else [])]) or "x"


def shipped() -> list[Operands]:
    """The operands of every step of every sampler, on each process that takes it."""
    found: set[Operands] = set()

    def step(out, table, cursor, stream, x, m=None, history=None, guide=None, v=None, base=None, z=None, measured=None,
             known=None, mask=None, pushed=None, net_input=None, first_bad=None):  # fmt: skip
        read = len(history or ())
        present = (value is not None for value in (v, base, stream, measured, pushed, net_input))
        found.add(Operands(m is not None, min(read, 3 if m is not None else 4), *present))

    def prepare_step(out, table, stream, x, **operands):
        return lambda cursor, m, v: step(out, table, cursor, stream, x, m, v=v, **operands)

    noting = types.SimpleNamespace(prepare_step=prepare_step, measure_langevin=lambda *args: None, KEEPS_NOISE=False)
    network = lambda x, *_: (x, x)  # noqa: E731
    for process in ("ve", "vp", "subvp", "edm", "ddpm", "ncsn"):
        for sampler in (*samplers.SAMPLERS.values(), *_EXTRA):
            try:
                table = fastdiff.plan(process, 20 if process != "ncsn" else None, sampler=sampler())
            except ValueError:  # a sampler that does not go with the process: plan() says so
                continue
            x = torch.zeros(1, 4)
            loop = runner.Loop(table, noting, x, x.clone(), x[:, 0].clone(), None, seed=0, check="off")
            for _ in loop.run(network, None, 0, x):
                pass
    return sorted(found)


_EXTRA: tuple[Callable[[], Any], ...] = (
    lambda: samplers.Ancestral(variance="learned_range"),
    lambda: samplers.DDIM(eta=1.0),
    lambda: samplers.Heun(s_churn=10.0),
    lambda: samplers.PredictorCorrector(predictor="none"),
    lambda: samplers.PredictorCorrector(predictor="heun"),
    lambda: samplers.PredictorCorrector(corrector="langevin"),
    lambda: samplers.PredictorCorrector(corrector="ald", order="predictor_first"),
)


@functools.cache
def variants() -> dict[tuple[str, str], Callable[[Any], None]]:
    """(operation, variant) -> a call of it; the argument is the module of kernels."""
    table, cursor = torch.zeros(2, len(COLUMNS)), torch.zeros(3, dtype=torch.int64)
    image, like = torch.zeros(2, *IMAGE), torch.zeros_like
    each = torch.ones(2)
    half = image.bfloat16()
    last = half.to(memory_format=torch.channels_last)

    def step(o: Operands, x: torch.Tensor = image, **other: Any) -> Callable[[Any], None]:
        given: dict[str, Any] = {"m": like(x) if o.m else None, "history": [like(x) for _ in range(o.history)]}
        given |= {name: like(x) for name in ("v", "base", "pushed", "net_input") if getattr(o, name)}
        given |= {"measured": torch.zeros(len(x), 2)} if o.measured else {}
        flag = torch.zeros(len(x), dtype=torch.int64)
        return lambda k: k.step(
            like(x), table, cursor, 1 if o.noise else None, x, **{**given, "first_bad": flag, **other}
        )

    usual = Operands(noise=True, net_input=True)
    small, odd, flat = torch.zeros(4096, 2), torch.zeros(2, 3, 11, 31), torch.zeros(64, 64)
    wide = torch.zeros(2, 5_000_000)
    stages = [like(image) for _ in range(7)]
    weights = [35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0]
    error = [71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]
    found = {("step", str(operands)): step(operands) for operands in shipped()}
    return found | {
        ("step", "usual, unchecked"): step(usual, first_bad=None),
        ("step", "usual, bf16 network"): step(usual, m=half, net_input=half.clone()),
        ("step", "usual, bf16 channels-last network"): step(usual, m=last, net_input=last.clone()),
        ("step", "usual, mask and guide"): step(usual, guide=like(image), known=like(image), mask=image > 0),
        ("step", "usual, 2 numbers"): step(usual, small),
        ("step", "usual, 64 numbers"): step(usual, flat),
        ("step", "usual, 1023 numbers"): step(usual, odd),
        ("normal", "image"): lambda k: k.normal(image, cursor, 1),
        ("rademacher", "image"): lambda k: k.rademacher(image, cursor, 3),
        ("perturb", "image"): lambda k: k.perturb(image, each, each, cursor, 2),
        ("measure_langevin", "image"): lambda k: k.measure_langevin(
            torch.zeros(2, 2), table, cursor, 1, False, image, image
        ),
        ("measure_langevin", "batch means"): lambda k: k.measure_langevin(
            torch.zeros(2, 2), table, cursor, 1, True, image, image
        ),
        ("dsm_loss", "image"): lambda k: k.dsm_loss(image, image, each, each, each, cursor, 2),
        ("dsm_loss", "bf16 network"): lambda k: k.dsm_loss(half, image, each, each, each, cursor, 2),
        ("probe_dot", "normal"): lambda k: k.probe_dot(image, cursor, 3, "normal"),
        ("probe_dot", "rademacher"): lambda k: k.probe_dot(image, cursor, 3, "rademacher"),
        ("probe_dot", "given, 5e6 numbers"): lambda k: k.probe_dot(wide, cursor, 3, "normal", wide),
        ("rk_error", "Dormand-Prince"): lambda k: k.rk_error(image, stages, each, weights, error, 1e-3, 1e-3),
        ("timestep_embedding", "128 channels"): lambda k: k.timestep_embedding(
            each, torch.ones(64), 1.0, 128, "sin_cos"
        ),
    } | group_norms()  # fmt: skip


def group_norms() -> dict[tuple[str, str], Callable[[Any], None]]:
    """Of maps of 128 channels in 32 groups: whole groups in a program, and blocks of them, so many that they are merged where
    channels lie side by side."""

    def norm(places: int, dtype: torch.dtype, last: bool) -> Callable[[Any], None]:
        x = torch.zeros(1, 128, places, places, dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if last else x
        each, shared = torch.ones(1, 128, dtype=dtype), torch.ones(128, dtype=dtype)
        return lambda k: k.group_norm(x, 32, each, shared, 1e-6)

    kinds = {
        "bf16 channels-last": (torch.bfloat16, True), "bf16": (torch.bfloat16, False), "float32": (torch.float32, False),
        "float32 channels-last": (torch.float32, True),
    }  # fmt: skip
    return {
        ("group_norm", f"{size}, {kind}"): norm(places, *how)
        for size, places in (("whole", 16), ("blocks", 64))
        for kind, how in kinds.items()
    }


def compile_variants(named: list[tuple[tuple[str, str], list[str]]]) -> list[list[dict[str, Any]]]:
    """Each variant's launches, compiled for its targets and read."""
    launches = [_launches(name, targets) for name, targets in named]
    machine_code: dict[int, list[Instruction]] = {}  # by id of the compiled kernel
    for target, gpu in TARGETS.items():
        here = [compiled for of in launches for label, compiled, _ in of if label["target"] == target]
        if gpu.backend == "cuda" and here:
            code = disassembled([compiled.asm["cubin"] for compiled in here], gpu.arch)
            machine_code.update(zip(map(id, here), code))
    return [
        [
            {**label, **read_sass(compiled, machine_code[id(compiled)], per_thread)}
            if id(compiled) in machine_code
            else {**label, **_read_amd(compiled, per_thread)}
            for label, compiled, per_thread in of
        ]
        for of in launches
    ]


def _launches(name: tuple[str, str], targets: list[str]) -> list[tuple[dict[str, Any], Any, float]]:
    """One variant's launches for each target: (what it is, the compiled kernel, elements of a thread)."""
    found: list[tuple[dict[str, Any], Any, float]] = []

    def launch(kernel: Any, grid: tuple[int, ...], like: torch.Tensor, *args: Any, **meta: Any) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta, num_warps=WARPS, enable_fp_fusion=False)
        elements = 4 * meta.get("GROUPS", 1) * meta["QUADS"] * meta["SAMPLES"] if "QUADS" in meta else 0
        elements = elements or math.prod(meta.get(key, 1) for key in ("LENGTH", "ROWS", "PARTS", "WIDTH"))
        threads = WARPS * TARGETS[target].warp_size
        variant = name[1] if name[0] == "step" else ", ".join(name)
        label = {"kernel": kernel.fn.__name__, "variant": variant, "target": target}
        found.append(({**label, "shared_bytes": compiled.metadata.shared}, compiled, elements / threads))

    tiles = kernels.tiles
    WARPS, original = tiles.WARPS, tiles.launch
    tiles.launch = launch
    try:
        call = variants()[name]
        for target in targets:
            triton.runtime.driver.set_active(Driver(TARGETS[target]))
            call(kernels)
    finally:
        tiles.launch = original
    return found


def _tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def disassembled(cubins: list[bytes], arch: int) -> list[list[Instruction]]:
    """The instructions of each, of which an address is that in all of them one behind another: starting the disassembler takes
    longer than a kernel."""
    texts = [_text(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(texts))
        file.flush()
        listing = _tool("nvdisasm", "--binary", f"SM{arch}", file.name)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([\w.]+)(.*);", listing, re.MULTILINE)
    ends = itertools.accumulate(len(text) // _INSTRUCTION for text in texts)
    assert len(lines) == sum(map(len, texts)) // _INSTRUCTION
    return [lines[end - len(text) // _INSTRUCTION : end] for end, text in zip(ends, texts)]


def _text(elf: bytes) -> bytes:
    """The machine code of a 64-bit ELF file with one kernel: its section .text.<name>."""
    (table,), (size, count, names) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HHH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    strings = sections[names][4]
    (found,) = [(at, length) for name, *_, at, length in sections if elf.startswith(b".text.", strings + name)]
    return elf[found[0] : found[0] + found[1]]


def read_sass(compiled: Any, lines: list[Instruction], per_thread: float) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    names = [name for _, _, name, _ in lines]
    count = Counter(names)
    # subroutines, if any, stand behind the last EXIT
    main = max(i for i, name in enumerate(names) if name == "EXIT") + 1
    spilled = sum(n for name, n in count.items() if name.startswith(("STL", "LDL")))
    stack = int(re.search(r"STACK:(\d+)", usage)[1])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": spilled + stack,
        "instructions_per_element": round(_fewest(lines) / per_thread, 1),
        "loads_128": _wide(count, "LDG", "128"),
        "stores_128": _wide(count, "STG", "128"),
        "loads_32": sum(n for name, n in count.items() if re.fullmatch(r"LDG\.E(\.CONSTANT)?", name)),
        "stores_32": count["STG.E"],
        "shuffles": sum(n for name, n in count.items() if name.startswith("SHFL")),
        "barriers": sum(n for name, n in count.items() if name.startswith("BAR")),
        "approximations": len(re.findall(r"\.(?:approx|full|ftz)\.", compiled.asm["ptx"])),
        "contracted": _contracted(compiled, Counter(names[:main])),
    }


def _fewest(lines: list[Instruction]) -> int:
    """How many instructions the shortest way from the first to an unconditional EXIT has, without a call."""
    place = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    # from each instruction on; the kernels have no loops: branches go forward only
    left = [math.inf] * (len(lines) + 1)
    for i, (_, predicate, name, operands) in reversed(list(enumerate(lines))):
        if name.startswith("BRA"):
            onward = left[place[int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)]]
            if predicate or re.search(r"\bU?P\d", operands):
                onward = min(onward, left[i + 1])
            left[i] = 1 + onward
        elif name.startswith(("CALL", "RET")):
            left[i] = math.inf
        else:
            left[i] = 1 + (0 if name.startswith("EXIT") and not predicate else left[i + 1])
    return int(left[0])


def _contracted(compiled: Any, count: Counter[str]) -> int:
    code = compiled.asm["ptx"]
    ptx = lambda operation: len(re.findall(rf"\b{operation}\b", code))  # noqa: E731
    unrounded = len(re.findall(r"\b(?:add|sub|mul|mad|fma)\.(?!rn\.)(?:\w+\.)*f(?:32|64)\b", code))
    if compiled.metadata.target.arch >= 100:
        return unrounded
    root, quotient = ptx("sqrt.rn.f32"), ptx("div.rn.f32")  # each a short sequence
    near_quotient, near_power = (
        ptx("div.full.f32"),
        ptx("ex2.approx.f32"),
    )  # scaled, so that nothing over- or underflows
    wide_root, wide_quotient = ptx("sqrt.rn.f64"), ptx("div.rn.f64")
    expected = {
        "FFMA": ptx("fma.rn.f32") + 2 * root + 5 * quotient + wide_quotient,
        "FMUL": ptx("mul.rn.f32") + 2 * root + 5 * near_quotient + 2 * near_power,
        "FADD": ptx("add.rn.f32") + ptx("sub.rn.f32"),
        "DFMA": ptx("fma.rn.f64") + 5 * wide_root + 7 * wide_quotient,
        "DMUL": ptx("mul.rn.f64") + 3 * wide_root + wide_quotient,
        "DADD": sum(ptx(f"{name}.f64") for name in ("add.rn", "sub.rn", "abs", "neg")),  # the last two add 0
    }
    found = {name: sum(n for full, n in count.items() if full.partition(".")[0] == name) for name in expected}
    return unrounded + sum(abs(found[name] - expected[name]) for name in expected)


def _wide(count: Counter[str], name: str, width: str) -> int:
    return sum(n for full, n in count.items() if full.startswith(name) and width in full.split("."))


def _read_amd(compiled: Any, per_thread: float) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    body = text[: text.index("s_endpgm")]
    count = Counter(line.split()[0] for line in body.splitlines() if re.match(r"\t[a-z]\w+(\s|$)", line))
    number = lambda field: int(re.search(rf"\.{field}:\s+(\d+)", text)[1])  # noqa: E731
    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size"),
        "instructions_per_element": round(sum(count.values()) / per_thread, 1),
        "loads_128": count["global_load_dwordx4"] + count["buffer_load_dwordx4"],
        "stores_128": count["global_store_dwordx4"] + count["buffer_store_dwordx4"],
        "loads_32": count["global_load_dword"] + count["buffer_load_dword"],
        "stores_32": count["global_store_dword"] + count["buffer_store_dword"],
        "shuffles": text.count("dpp"),
        "barriers": count["s_barrier"],
        "approximations": len(
            re.findall(r"= f(?:add|sub|mul|div) (?:\w+ )*?(?:fast|afn|arcp|reassoc)\b", compiled.asm["llir"])
        ),
        "contracted": len(re.findall(r"= f(?:add|sub|mul) (?:\w+ )*?(?:fast|contract)\b", compiled.asm["llir"])),
    }


def targets_of(name: tuple[str, str], few: bool) -> list[str]:
    """few: for one GPU of each maker, of which AMD's gets no steps but those with the most operands."""
    operation, variant = name
    if variant in RARE:
        return RARE_TARGETS
    widest = "m+noise+net_input", "m+pushed+net_input+history3", "usual, mask and guide", "blocks, bf16 channels-last"
    if not few:
        return list(TARGETS)
    return ["sm_90"] if operation in ("step", "group_norm") and variant not in widest else RARE_TARGETS


def compile_all(few: bool, processes: int = 2) -> list[dict[str, Any]]:
    """Every variant for its targets: {field: value} in the order of `variants`."""
    named = [(name, targets_of(name, few)) for name in variants()]
    context = multiprocessing.get_context("fork")  # what is loaded here, and no thread has been started
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        parts = list(pool.map(compile_variants, [named[i::processes] for i in range(processes)]))
    return [line for i in range(len(named)) for line in parts[i % processes][i // processes]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--few", action="store_true", help="for sm_90 and gfx942, most steps for sm_90 alone")
    given = parser.parse_args()
    out, lines = given.out, compile_all(given.few)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(lines)
    print(f"{len(lines)} kernels compiled; wrote {out}")


if __name__ == "__main__":
    main()
