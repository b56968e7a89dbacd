"""The Triton kernels on this machine: tests/interpreted.py in a process whose triton is an interpreter from the start.

(TRITON_INTERPRET must be set before anything imports triton, and torch may have done that here.) On a machine with a CUDA
device the same cases run compiled as well.
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
CASES = ROOT / "tests" / "interpreted.py"
NAMES = [
    node.name
    for node in ast.parse(CASES.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]
FEWEST = 200  # cases in all: that none is collected, or a process dies on the way, must not pass

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux")


def outcomes(folder, **environment):
    """{test function: [passed, failure, error or skipped, for each of its cases]}, and the finished process."""
    report = folder / "report.xml"
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INTERPRET", "PYTEST_"))
    }
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", str(CASES), "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short",
         "-W", "ignore:fastdiff runs on plain PyTorch:RuntimeWarning"],
        cwd=ROOT, env={**inherited, "XDG_CACHE_HOME": str(folder), **environment}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    results = {}
    for case in ET.parse(report).iter("testcase") if report.exists() else ():
        verdict = {child.tag for child in case} & {"failure", "error", "skipped"}
        results.setdefault(case.get("name").partition("[")[0], []).append(verdict.pop() if verdict else "passed")
    return results, ran


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    return outcomes(tmp_path_factory.mktemp("interpreted"), TRITON_INTERPRET="1")


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


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(interpreted, name):
    results, ran = interpreted
    assert set(results.get(name, ["missing"])) == {"passed"}, ran.stdout[-6000:] + ran.stderr[-2000:]


def test_every_case_ran(interpreted):
    results, ran = interpreted
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    assert sum(map(len, results.values())) >= FEWEST


@pytest.mark.gpu
def test_compiled_on_the_gpu(tmp_path):
    results, ran = outcomes(tmp_path, FASTDIFF_KERNELS_DEVICE="cuda")
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert sum(map(len, results.values())) >= FEWEST
    assert {verdict for verdicts in results.values() for verdict in verdicts} == {"passed"}
