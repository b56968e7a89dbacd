"""The Triton kernels on this machine: tests/kernel_cases.py, in processes of its own.

Once compiled, with what the compiler made run by tests/ptx.py, and a few cases with Triton's interpreter, which has to be asked
for before anything imports triton. On a machine with a CUDA device the same cases run there as well.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
CASES = ROOT / "tests" / "kernel_cases.py"
FEWEST = 200  # cases in all: that none is collected, or a process dies on the way, must not pass
COMPILED = ("-p", "compiled")
# two halves, for two processors: (what, of each function how many where not all, of which every value is in the first 13 steps)
HALVES = {"steps": ("test_step", 13), "all else": ("not test_step", 2)}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux")


def outcomes(folder, *options, **environment):
    """How many cases passed, and {case: failure, error or skipped} of the others. That some ran is looked at by the caller."""
    report = folder / "report.xml"
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST_"))
    }
    paths = {
        "PYTHONPATH": str(ROOT / "tests"),
        "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),
        "XDG_CACHE_HOME": str(folder),
    }
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", str(CASES), "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short",
         "-W", "ignore:fastdiff runs on plain PyTorch:RuntimeWarning", *options],
        cwd=ROOT, env={**inherited, **paths, **environment}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert report.exists(), ran.stdout[-6000:] + ran.stderr[-2000:]
    cases = list(ET.parse(report).iter("testcase"))
    others = {
        case.get("name"): child.tag for case in cases for child in case if child.tag in {"failure", "error", "skipped"}
    }
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    return len(cases) - len(others), others


def test_literals_are_the_constants_of_the_definition():
    """The float32 constants that the kernels hold as decimals, in the order in which their functions use them."""
    from fastdiff.execution import noise, reference

    def literals(file, function):
        (node,) = [
            n for n in ast.parse((ROOT / "kernels" / file).read_text()).body if getattr(n, "name", "") == function
        ]
        signs = {id(n.operand): -1 for n in ast.walk(node) if isinstance(n, ast.UnaryOp)}
        numbers = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, float)]
        return {str(np.float32(n.value * signs.get(id(n), 1))) for n in numbers}

    decimals = lambda *values: {str(np.float32(v)) for v in values}  # noqa: E731
    powers = decimals(2.0, 1.0)
    assert literals("philox.py", "_radius") - powers == decimals(*noise._LOG, noise._MINUS_2_LN_2) - powers
    assert literals("philox.py", "sine_cosine") == decimals(*noise._SIN, *noise._COS)
    rounding = decimals(1.5 * 2**23, -86, 88)
    expected = decimals(*reference._EXP, reference._PER_LN_2, -reference._LN_2_HIGH, -reference._LN_2_LOW)
    assert literals("step.py", "exp") - rounding == expected


@pytest.mark.slow
@pytest.mark.parametrize("half", HALVES)
def test_compiled_kernels_have_the_references_bits(half, tmp_path, request):
    what, few = HALVES[half]
    every = request.config.option.all_kernels
    passed, others = outcomes(tmp_path, *COMPILED, "-k", what, *(() if every else (f"--few={few}",)))
    assert passed >= (FEWEST / 2 if every else few)
    assert others == {}


def test_some_compiled_kernels_have_the_references_bits(tmp_path, request):
    """For `make check`; where all run, this would only repeat."""
    if not request.config.option.markexpr:
        pytest.skip("all cases run")
    passed, others = outcomes(tmp_path, *COMPILED, "--few=3")
    assert passed >= FEWEST / 4
    assert others == {}


def test_interpreted_kernels_have_the_references_bits(tmp_path):
    passed, others = outcomes(tmp_path, "--few=2", TRITON_INTERPRET="1")
    assert passed >= FEWEST / 4
    assert others == {}


@pytest.mark.gpu
def test_compiled_on_the_gpu(tmp_path):
    passed, others = outcomes(tmp_path, FASTDIFF_KERNELS_DEVICE="cuda")
    assert passed >= FEWEST
    assert set(others.values()) <= {"skipped"}  # what is for other machines
