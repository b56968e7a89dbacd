"""`make gpu`: the GPU's tests and benchmarks in one command and under ten minutes, from a bare checkout.

Needs a Python with torch, triton, numpy, pytest, tqdm and safetensors, and installs nothing. Leaves one CSV,
benchmarks/results/<device>.csv, written as it goes. Exits with 1 if a test or a check failed or was cut off; what there was no
time for is skipped and named. `--device cpu --quick --out FOLDER` goes through the same motions on small numbers.
"""

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT, LIBRARY = HERE.parent, HERE.parent / "fastdiff" / "libfastdiff.so"
SECONDS = 580  # after which whatever runs is cut off
WARMING, TESTS = 60, 160  # at most


def build() -> str:
    """Compile csrc/ in its place, unless that was done; a line that says what became of it."""
    content = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").glob("*.[ch]*")))
    # the library holds it as text (setup.py)
    if LIBRARY.exists() and hashlib.sha256(content).hexdigest()[:16].encode() in LIBRARY.read_bytes():
        return f"{LIBRARY.name}: there, of these sources"
    sys.path.insert(0, str(ROOT))
    try:
        importlib.import_module("setup").compile_library(ROOT / "build" / "gpu", LIBRARY)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        LIBRARY.unlink(missing_ok=True)  # an older build must not pass for this one
        return f"WARNING: the CPU library was not built ({error}): large sizes have nothing to be checked against"
    return f"{LIBRARY.name}: built"


def pytest(title: str, seconds: float, *arguments: str, **environment: str) -> bool:
    """Whether these tests passed within their time."""
    print(f"\n== {title} ({seconds:.0f} s)", flush=True)
    command = [
        "timeout", "--signal=KILL", f"{seconds:.0f}", sys.executable, "-m", "pytest", *arguments, "--tb=short",
        "-p", "no:cacheprovider", "-W", "ignore:fastdiff runs on plain PyTorch:RuntimeWarning",
    ]  # fmt: skip
    # not an option of pytest's: a test starts a Python of its own
    paths = os.pathsep.join(filter(None, [str(HERE / "bare"), os.environ.get("PYTHONPATH")]))
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, **environment}).returncode
    ended = {0: "passed", 5: "nothing to run", -9: "FAILED: cut off", 137: "FAILED: cut off"}.get(code, "FAILED")
    print(f"-- {title}: {ended}", flush=True)
    return code in (0, 5)


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small numbers, to try the script")
    given, options = parser.parse_known_args()  # the others are those of benchmarks/conftest.py
    if given.quick and not any(option.startswith("--out") for option in options):
        parser.error("--quick only tries the script: give --out, as its numbers are no results")
    print(build())
    if given.device.startswith("cuda") and importlib.util.find_spec("xdist"):
        # one of the tests runs these cases, in a process that would compile their 270 kernels one after another
        cases = ["tests/kernel_cases.py", "-n", "8", "-q", "-p", "no:benchmark"]
        pytest("the kernels' own cases, so that they are compiled", WARMING, *cases, FASTDIFF_KERNELS_DEVICE="cuda")
    tests = "tests/test_graphs.py" if given.quick else "tests"
    passed = pytest("tests marked gpu", TESTS, tests, "-m", "gpu", "-q", "-rfE", "--continue-on-collection-errors")
    left = SECONDS - (time.monotonic() - began)
    options += ["--device", given.device, "--minutes", f"{(left - 20) / 60:.2f}", *(["--quick"] if given.quick else [])]
    passed &= pytest("benchmarks", left, "benchmarks", "-v", "-s", "-rs", "-W", "ignore", "--save-results", *options)
    print(f"\n{time.monotonic() - began:.0f} seconds")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
