"""What the compilers make of the Triton kernels, for GPUs that need not be here: tests/aot.py, and its bounds.

In a process of its own: there triton must not be an interpreter.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FEW = ("sm_90", "gfx942")  # targets of `make test`
TARGETS = ("sm_80", "sm_100", *FEW)
CACHE = ROOT / "build" / "triton"  # by the sources and the compiler: what neither changed is compiled once
IMAGE_STEPS = 25  # the operands of the shipped samplers' steps: a new sampler may add one

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux"),
]


def python(*arguments):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    environment = {**inherited, "TRITON_CACHE_DIR": str(CACHE), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-6000:]
    return ran.stdout


SCRIPT = """
import sys
sys.path.insert(0, "tests")
import torch, triton, aot
from fastdiff import kernels
if __name__ == "__main__":
    aot.main()
    triton.runtime.driver.set_active(aot.Driver(aot.TARGETS["sm_90"]))
    out, cursor = torch.zeros(4096), torch.zeros(3, dtype=torch.int64)
    code = kernels.fill.normal_kernel.warmup(
        out, cursor, 1, 1024, 1, GROUPS=1, QUADS=1024, SAMPLES=1, WHOLE=True,
        grid=(1,), num_warps=1, maxnreg=32, enable_fp_fusion=False)
    print(aot.read_sass(code, *aot.disassembled([code.asm["cubin"]], 90), 128)["spills"])
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, pytestconfig):
    """(what is compiled once, what a kernel spills that is left 32 registers)"""
    folder = tmp_path_factory.mktemp("aot")
    script, few = folder / "script.py", () if pytestconfig.option.all_kernels else ("--few",)
    script.write_text(SCRIPT)
    said = python("-W", "ignore", str(script), "--out", str(folder / "aot.csv"), *few)
    with (folder / "aot.csv").open() as file:
        text = {"kernel", "variant", "target"}
        lines = [{k: v if k in text else float(v) for k, v in line.items()} for line in csv.DictReader(file)]
    return lines, int(said.splitlines()[-1])


@pytest.fixture(scope="module")
def lines(compiled):
    return compiled[0]


@pytest.fixture(scope="module")
def targets(pytestconfig):
    return TARGETS if pytestconfig.option.all_kernels else FEW


def of(lines, **wanted):
    found = [line for line in lines if all(line[key] == value for key, value in wanted.items())]
    assert found, wanted
    return found


def image_steps(lines, target):
    """The steps of float32 images, with the operands that they read and write."""
    for line in of(lines, kernel="step_kernel", target=target):
        names = line["variant"].split("+")
        if not line["variant"].startswith("usual"):
            earlier = sum(int(name.removeprefix("history")) for name in names if name.startswith("history"))
            read = 1 + earlier + sum(name in names for name in ("m", "v", "base"))
            written = 1 + sum(name in names for name in ("pushed", "net_input"))
            yield line, read, written


def test_every_kernel_compiles_for_every_target(lines, targets):
    compiled = {(line["kernel"], line["target"]) for line in lines}
    source = "\n".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    launched = {name for name in source.replace("(", " ").split() if name.endswith("_kernel")}
    rare = {"fold_kernel"}
    assert {(name, target) for name in launched - rare for target in targets} <= compiled
    assert {(name, target) for name in rare for target in ("sm_90", "gfx942")} <= compiled


def test_nothing_spills(lines):
    assert [line for line in lines if line["spills"] != 0] == []


def test_every_float_operation_is_ieees(lines):
    """No approximate square root or division, no flushing of subnormal numbers, which the interpreter could not show; but for
    the power and the quotient of SiLU, one of each for each of a thread's elements."""
    for line in lines:
        silu = line["kernel"] == "group_norm_kernel" and line["stores_128"] > 0 and line["target"] != "gfx942"
        elements = line["stores_128"] * (4 if "float32" in line["variant"] else 8)
        assert line["approximations"] == (2 * elements if silu else 0), line


def test_nothing_is_contracted(lines):
    """A product and a sum are rounded one by one."""
    assert [line for line in lines if line["contracted"] != 0] == []


def test_few_steps_serve_all_samplers(lines):
    """Histories of no, one, two or three predictions, with what a row draws, opens and pushes."""
    assert len(list(image_steps(lines, "sm_90"))) <= 26
    assert len(list(image_steps(lines, "sm_90"))) >= IMAGE_STEPS


@pytest.fixture(params=["sm_80", "sm_90", "sm_100"])
def target(request, targets):
    """NVIDIA's."""
    if request.param not in targets:
        pytest.skip("compiled by `make kernels`")
    return request.param


def test_a_state_is_moved_128_bits_at_a_time(lines, target):
    """Sixteen float32 of each operand are four loads, or four stores; what is read 32 bits wide is the table, once."""
    for line, read, written in image_steps(lines, target):
        assert line["loads_128"] == 4 * read, line
        assert line["stores_128"] == 4 * written, line
        assert line["stores_32"] == 0, line
        earlier = int(line["variant"].partition("history")[2] or 0)
        assert line["loads_32"] <= 13 + max(earlier, 1), line  # each has its weight in the table
    for name, read, written in (
        ("normal_kernel", 0, 1),
        ("perturb_kernel", 1, 1),
        ("dsm_kernel", 2, 1),
        ("rk_kernel", 7, 1),
    ):
        line = of(lines, kernel=name, target=target)[0]
        assert (line["loads_128"], line["stores_128"], line["stores_32"]) == (4 * read, 4 * written, 0), line
    line = of(lines, kernel="rademacher_kernel", target=target)[0]
    assert (line["stores_128"], line["stores_32"]) == (8, 0)  # 32 elements a thread
    line = of(lines, kernel="signed_sum_kernel", target=target)[0]
    assert line["loads_128"] == 8


def test_group_normalisation_moves_128_bits_at_a_time(lines, target):
    """In both layouts: what a program reads of x, and writes; beside it only moments, weights and a group's first element."""
    normed = of(lines, kernel="group_norm_kernel", target=target)
    for line in normed:
        measures = line["stores_128"] == 0
        assert line["loads_128"] in ((2, 4, 8, 16) if measures else (line["stores_128"],)), line
        assert line["stores_32"] <= 2 * measures, line
        assert line["loads_32"] <= 9, line
    assert {line["stores_128"] == 0 for line in normed} == {True, False}


def test_amd_moves_128_bits_at_a_time(lines):
    """Eight elements a thread: 64 threads are a warp."""
    for line, read, written in image_steps(lines, "gfx942"):
        assert (line["loads_128"], line["stores_128"], line["stores_32"]) == (2 * read, 2 * written, 0), line


def test_instructions_and_registers_stay_what_they_were_measured_to_be(lines):
    """On an H100 a step of 16 bytes an element has 158 instructions' time (benchmarks: 3 TB/s, 29.6e12 a second)."""
    bounds = {
        "normal_kernel": 40, "rademacher_kernel": 9, "perturb_kernel": 46, "measure_kernel": 65, "dsm_kernel": 60,
        "dot_kernel": 50, "signed_sum_kernel": 17, "rk_kernel": 49,
    }  # fmt: skip
    for line in of(lines, kernel="group_norm_kernel", target="sm_90"):
        assert line["instructions_per_element"] <= (45 if line["stores_128"] else 15), line
        assert line["registers"] <= 150, line
    for name, most in bounds.items():
        assert of(lines, kernel=name, target="sm_90")[0]["instructions_per_element"] <= most, name
    steps = {
        "usual, unchecked": 51, "usual, bf16 network": 57, "m+noise+net_input": 56, "m+net_input": 19,
        "usual, bf16 channels-last network": 73, "usual, 1023 numbers": 70,
    }  # fmt: skip
    for variant, most in steps.items():
        assert of(lines, variant=variant, target="sm_90")[0]["instructions_per_element"] <= most, variant
    # 128 registers leave room for 512 threads, of sixteen elements each: the loads of 8192 elements are under way
    assert max(line["registers"] for line, _, _ in image_steps(lines, "sm_90")) <= 128


def test_sums_exchange_halves(lines):
    """A block of 1024 numbers: one exchange through shared memory (Triton 3.6: two or three), then five sums of 64 bits by
    shuffles, each for one number of a thread."""
    for name, sums, barriers in (("dot_kernel", 1, 1), ("dsm_kernel", 1, 7), ("measure_kernel", 2, 1)):
        line = of(lines, kernel=name, target="sm_90")[0]
        assert line["shuffles"] <= 10 * sums, line
        assert line["barriers"] <= barriers, line


def test_a_spill_would_be_seen(compiled):
    assert compiled[1] > 0
