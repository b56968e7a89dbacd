"""`make gpu`: the GPU's tests and benchmarks in one command and under ten minutes, from a bare checkout.

Needs a Python with torch, triton, numpy, pytest, tqdm and safetensors, and installs nothing. Leaves one CSV,
benchmarks/results/<device>.csv, and its log, both written as it goes. Exits with 1 if a test or a check failed; what
there was no time for is left out and named, and if something never ends the exit status is 124. `--device cpu --quick` goes
through the same motions on small numbers, without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import gpu_checkout

if TYPE_CHECKING:
    from gpu_parts import Session

HERE, ROOT = Path(__file__).parent, gpu_checkout.ROOT
LIBRARY = ROOT / "fastdiff" / "libfastdiff.so"
SECONDS = 550  # after which nothing is begun
CUT = 580  # after which whatever runs is cut off
# at most, of each part
TESTS, WARMING, BITS, ROOFLINE, PROFILE = 160, 60, 60, 140, 25


def build() -> str:
    """Compile csrc/ in its place, unless that was done; a line that says what became of it."""
    content = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").glob("*.[ch]*")))
    # the library holds it as text (setup.py)
    sources = hashlib.sha256(content).hexdigest()[:16].encode()
    if LIBRARY.exists() and sources in LIBRARY.read_bytes():
        return f"{LIBRARY.name}: there, of these sources"
    try:
        importlib.import_module("setup").compile_library(ROOT / "build" / "gpu", LIBRARY)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        LIBRARY.unlink(missing_ok=True)  # an older build must not pass for this one
        return f"WARNING: the CPU library was not built ({error}): large sizes have nothing to be checked against"
    return f"{LIBRARY.name}: built"


def describe(session: Session) -> None:
    import torch

    versions = [f"Python {sys.version.split()[0]}"]
    for name in ("torch", "triton", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    session.say(", ".join(versions))
    if session.cuda:
        facts = torch.cuda.get_device_properties(session.device)
        session.say(
            f"{facts.name}, {facts.multi_processor_count} multiprocessors, {facts.total_memory / 2**30:.0f} GiB, CUDA "
            f"{torch.version.cuda}"
        )
        if shutil.which("nvidia-smi"):
            asked = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
            shown = subprocess.run(["nvidia-smi", asked, "--format=csv"], capture_output=True, text=True)
            session.say(shown.stdout.strip())


def run_tests(session: Session) -> None:
    """The tests marked gpu, whose output goes to the log."""
    if session.cuda and importlib.util.find_spec("xdist"):
        # one of those tests runs these cases, in a process that would compile their 270 kernels one after another
        session.say("the kernels' own cases, eight at a time, so that their kernels are compiled")
        arguments = ["tests/interpreted.py", "-n", "8", "-p", "no:benchmark"]
        code = pytest(arguments, session, min(session.left(), WARMING), FASTDIFF_KERNELS_DEVICE="cuda")
        session.say(f"they ended with {code}; what failed of them will fail below")
    code = pytest(["tests/test_graphs.py" if session.quick else "tests", "-m", "gpu"], session, max(session.left(), 1))
    session.say(f"tests: {Path(session.log.name).read_text(encoding='utf-8').splitlines()[-1]}")
    if code is None:
        session.fail("the tests ran out of time and were cut off")
    elif code:
        session.fail(f"pytest ended with {code}: see {session.log.name}")


def pytest(arguments: list[str], session: Session, seconds: float, **environment: str) -> int | None:
    """pytest's exit status, None if it was cut off."""
    command = [
        sys.executable, "-m", "pytest", *arguments, "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider",
        "--continue-on-collection-errors", "-W", "ignore:fastdiff runs on plain PyTorch:RuntimeWarning",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        # not an option of pytest's: a test starts a Python of its own
        (Path(folder) / "sitecustomize.py").symlink_to(HERE / "gpu_checkout.py")
        paths = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        ran = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, **environment}, stdout=session.log,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return ran.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if ran.poll() is None:
                os.killpg(ran.pid, signal.SIGKILL)
                ran.wait()


def profile(session: Session) -> None:
    """The kernels of a run of the MLP, and the step's own time, as the device's profiler sees them."""
    import gpu_parts
    import operations
    import torch
    from torch.profiler import ProfilerActivity, supported_activities

    wanted = ProfilerActivity.CUDA if session.cuda else ProfilerActivity.CPU
    if wanted not in supported_activities():
        session.say(f"left out: this torch's profiler does not see {wanted.name}")
        return
    contest = gpu_parts.Contest(gpu_parts.SMALL[0], torch.float32, session)
    n, module = gpu_parts.SIZES[0 if session.quick else 2], gpu_parts.ops.backend_module(session.backend)
    t, op = operations.tensors(n, session.device, gpu_parts.SAMPLES), operations.OPS[2]

    def steps() -> None:
        for _ in range(20):
            op.ours(module, t)

    for name, run in ((f"{contest.name}, 100 rows", contest.ours(100)), (f"{op.name}, 20 times", steps)):
        run()
        session.watch.settle()
        with torch.profiler.profile(activities=[wanted]) as seen:
            run()
            session.watch.settle()
        by = "self_device_time_total" if session.cuda else "self_cpu_time_total"
        table = seen.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=60)
        session.say(f"{name}\n{table if seen.key_averages() else 'the profiler saw nothing of it'}")
    for event in seen.key_averages():
        if "step_kernel" in event.key:
            each = event.self_device_time_total / event.count
            session.row("gpu ops", op.name, n, "us of the kernel alone (CUPTI)", [each])


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the CSV and the log; default benchmarks/results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small numbers, to try the script")
    parser.add_argument("--commit", default="", help="of the sources, where git cannot tell it")
    given = parser.parse_args()
    if given.out is None and not given.device.startswith("cuda"):
        parser.error(f"--device {given.device} only tries the script: give --out, as its numbers are no results")
    built = build()  # before fastdiff is imported, which loads the library
    import gpu_parts
    import recorder
    import torch

    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: there is no CUDA device here; --device cpu --quick tries the script")
    device = torch.empty(0, device=given.device).device
    torch.manual_seed(0)
    try:
        session = gpu_parts.Session(given.out or recorder.RESULTS, device, given.commit, given.quick, began + SECONDS)
    except recorder.Unsaveable as error:
        parser.error(f"{error} (--out FOLDER)")
    cutter = threading.Timer(CUT - (time.monotonic() - began), cut, [session])
    cutter.daemon = True
    cutter.start()
    session.say(built)
    describe(session)
    session.say(f"backend {session.backend}")
    parts = {
        "tests marked gpu": (TESTS, run_tests), "bits": (BITS, gpu_parts.bits), "operations": (ROOFLINE, gpu_parts.roofline),
        "loops": (SECONDS, gpu_parts.loops), "profile": (PROFILE, profile),
    }  # fmt: skip
    for name, (seconds, part) in parts.items():
        if not session.begin(name, seconds, reserve=PROFILE if name != "profile" else 0):
            continue
        started = time.monotonic()
        with session.guarded(name):
            part(session)
        session.say(f"-- {name}: {time.monotonic() - started:.1f} s")
    session.say(f"\nthe rows and their log are in {session.folder}, {time.monotonic() - began:.0f} seconds")
    for failure in session.failures:
        session.say(f"FAILED: {failure}")
    cutter.cancel()
    return 1 if session.failures else 0


def cut(session: Session) -> None:
    session.say(f"CUT OFF after {CUT} seconds; the rows so far are in {session.folder}")
    os._exit(124)


if __name__ == "__main__":
    sys.exit(main())
