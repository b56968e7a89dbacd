"""NVIDIA's own tools, where they are: compute-sanitizer over the kernels' own cases, ncu over a step."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from provenance import ROOT

FOLDERS = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
# every fifth step, and all that adds up what several threads hold
CASES = "test_step[ and (0] or 5]) or sums or langevin or dsm_loss or probe_dot or rk_error"
FINDINGS = 86  # the exit code that stands for them
STEPS = """
import sys, torch, operations
from fastdiff.execution import ops
t = operations.tensors(int(sys.argv[1]), torch.device(sys.argv[2]), 64)
for _ in range(4):
    operations.OPS[0].ours(ops.backend_module("triton"), t)
torch.cuda.synchronize()
"""


class Absent(Exception):
    """Why a tool says nothing here."""


def sanitize(tool: str, device: str, seconds: float) -> None:
    """Raises AssertionError where the kernels touch memory beside their operands (memcheck), or where two threads meet in their
    block's memory (racecheck)."""
    cases = ["tests/kernel_cases.py", "-k", CASES, "-q", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    options = ["--tool", tool, "--error-exitcode", str(FINDINGS)]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []  # torch asks for what there may not be
    # each tensor is an allocation of its own, whose ends the tool sees
    environment = {"FASTDIFF_KERNELS_DEVICE": device, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*options, sys.executable, "-m", "pytest", *cases]
    code, lines = _told("compute-sanitizer", command, seconds, environment)
    if any("Device not supported" in line for line in lines):
        raise Absent("compute-sanitizer does not support this device")
    found = next((line for line in lines if "SUMMARY" in line), "no summary")
    assert code != FINDINGS, f"{tool}: {found}"
    assert code == 0, f"the cases ended with {code}: {lines[-1] if lines else 'nothing was printed'}"


def count(n: int, device: str, seconds: float) -> dict[str, float]:
    """Of one step of n numbers: percent of "Issue Slots Busy" and of "DRAM Throughput"."""
    options = ["--clock-control", "none", "--csv", "--page", "details", "--section", "SpeedOfLight"]
    options += ["--section", "ComputeWorkloadAnalysis", "--kernel-name", "regex:step_kernel", "--launch-skip", "2"]
    options += ["--launch-count", "1", sys.executable, "-c", STEPS, str(n), device]
    paths = os.pathsep.join(filter(None, [str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    code, lines = _told("ncu", options, seconds, {"PYTHONPATH": paths})
    table = csv.DictReader(line for line in lines if line.startswith('"'))
    found = {line.get("Metric Name"): line.get("Metric Value", "") for line in table}
    try:
        return {name: float(found[name].replace(",", "")) for name in ("Issue Slots Busy", "DRAM Throughput")}
    except (KeyError, ValueError):
        said = next((line for line in lines if "ERROR" in line), lines[-1] if lines else f"exit code {code}")
        raise Absent(f"ncu read no such counters: {said.rpartition('== ')[2]}") from None


def _told(name: str, arguments: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int, list[str]]:
    """A tool's exit code, and the lines that it and what it ran printed."""
    tool = shutil.which(name, path=FOLDERS)
    if tool is None:
        raise Absent(f"{name} is not installed")
    with subprocess.Popen(
        [tool, *arguments], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace", process_group=0,
    ) as process:  # fmt: skip
        try:
            output = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            raise Absent(f"{name} took more than {seconds:g} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
    print(output[-4000:])
    return process.returncode, output.strip().splitlines()
