"""`make gpu`: the GPU's tests and benchmarks in one command and under ten minutes, from a bare checkout.

Needs a Python with torch, triton, numpy, pytest, tqdm and safetensors, and installs nothing. Leaves one CSV,
benchmarks/results/<device>.csv, and its log, both written as it goes. Exits with 1 if a test or a check failed; what
there was no time for is left out and named, and if something never ends the exit status is 124. `--device cpu --quick` goes
through the same motions on small numbers, without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
from typing import TYPE_CHECKING, Any

import gpu_checkout

if TYPE_CHECKING:
    from gpu_report import Report, Stopwatch

HERE, ROOT = Path(__file__).parent, gpu_checkout.ROOT
LIBRARY = ROOT / "fastdiff" / "libfastdiff.so"
SECONDS = 550  # after which nothing is begun
CUT = 580  # after which whatever runs is cut off
# at most, of each part
TESTS, WARMING, EQUALITY, ROOFLINE, PROFILE = 160, 60, 60, 140, 25


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


def describe(device: Any, report: Report) -> None:
    import torch

    versions = [f"Python {sys.version.split()[0]}"]
    for name in ("torch", "triton", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    report.say(", ".join(versions))
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        report.say(
            f"{facts.name}, {facts.multi_processor_count} multiprocessors, {facts.total_memory / 2**30:.0f} GiB, CUDA "
            f"{torch.version.cuda}"
        )
        if shutil.which("nvidia-smi"):
            asked = "--query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
            shown = subprocess.run(["nvidia-smi", asked, "--format=csv"], capture_output=True, text=True)
            report.say(shown.stdout.strip())


def run_tests(device: Any, quick: bool, report: Report) -> None:
    """The tests marked gpu, whose output goes to the log."""
    if device.type == "cuda" and importlib.util.find_spec("xdist"):
        # one of those tests runs these cases, in a process that would compile their 270 kernels one after another
        report.say("the kernels' own cases, eight at a time, so that their kernels are compiled")
        arguments = ["tests/interpreted.py", "-n", "8", "-p", "no:benchmark"]
        code = pytest(arguments, report, min(report.left(), WARMING), FASTDIFF_KERNELS_DEVICE="cuda")
        report.say(f"they ended with {code}; what failed of them will fail below")
    code = pytest(["tests/test_graphs.py" if quick else "tests", "-m", "gpu"], report, max(report.left(), 1))
    report.say(f"tests: {Path(report.log.name).read_text(encoding='utf-8').splitlines()[-1]}")
    if code is None:
        report.fail("the tests ran out of time and were cut off")
    elif code:
        report.fail(f"pytest ended with {code}: see {report.log.name}")


def pytest(arguments: list[str], report: Report, seconds: float, **environment: str) -> int | None:
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
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, **environment}, stdout=report.log,
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


def profile(device: Any, backend: str, quick: bool, watch: Stopwatch, report: Report) -> None:
    """The kernels of a run of the MLP, and the step's own time, as the device's profiler sees them."""
    import gpu_loops
    import gpu_ops
    import torch
    from torch.profiler import ProfilerActivity, supported_activities

    wanted = ProfilerActivity.CUDA if watch.cuda else ProfilerActivity.CPU
    if wanted not in supported_activities():
        report.say(f"left out: this torch's profiler does not see {wanted.name}")
        return
    subject = gpu_loops.Subject(gpu_loops.SMALL[0], torch.float32, quick, device)
    given, module = gpu_ops.tensors(gpu_ops.SIZES[0 if quick else 2], device), gpu_ops.ops.backend_module(backend)
    op = next(op for op in gpu_ops.ALL if op.name == "step, mixed, flagged")

    def steps() -> None:
        for _ in range(20):
            op.ours(module, given)

    for name, run in ((f"{subject.name}, 100 rows", subject.ours(100)), (f"{op.name}, 20 times", steps)):
        run()
        watch.settle()
        with torch.profiler.profile(activities=[wanted]) as seen:
            run()
            watch.settle()
        by = "self_device_time_total" if watch.cuda else "self_cpu_time_total"
        table = seen.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=60)
        report.say(f"{name}\n{table if seen.key_averages() else 'the profiler saw nothing of it'}")
    for event in seen.key_averages():
        if "step_kernel" in event.key:
            each = event.self_device_time_total / event.count
            report.row(gpu_ops.OPS, op.name, given["x"].numel(), "us of the kernel alone (CUPTI)", [each])


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the CSV and the log; default benchmarks/results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small numbers, to try the script")
    parser.add_argument("--commit", help="of the sources, where git cannot tell it")
    asked = parser.parse_args()
    if asked.out is None and not asked.device.startswith("cuda"):
        parser.error(f"--device {asked.device} only tries the script: give --out, as its numbers are no results")
    built = build()  # before fastdiff is imported, which loads the library
    import gpu_loops
    import gpu_ops
    import paired
    import torch
    from gpu_report import Report, Stopwatch

    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {asked.device}: there is no CUDA device here; --device cpu --quick tries the script")
    device = torch.empty(0, device=asked.device).device
    torch.manual_seed(0)
    report = Report(asked.out or HERE / "results", device, asked.commit or paired.commit(), began + SECONDS)
    watch = Stopwatch(device)
    cutter = threading.Timer(CUT - (time.monotonic() - began), cut, [report])
    cutter.daemon = True
    cutter.start()
    report.say(built)
    describe(device, report)
    backend = gpu_ops.ops.resolve("auto", "eager", device, torch.float32)[0]
    report.say(f"backend {backend}")
    parts = {
        "tests marked gpu": (TESTS, functools.partial(run_tests, device, asked.quick, report)),
        "bits": (EQUALITY, functools.partial(gpu_ops.equality, device, backend, report)),
        "operations": (ROOFLINE, functools.partial(gpu_ops.roofline, device, backend, asked.quick, watch, report)),
        "loops": (SECONDS, functools.partial(gpu_loops.compare, device, asked.quick, watch, report)),
        "profile": (PROFILE, functools.partial(profile, device, backend, asked.quick, watch, report)),
    }
    for name, (seconds, part) in parts.items():
        if not report.begin(name, seconds, reserve=PROFILE if name != "profile" else 0):
            continue
        started = time.monotonic()
        with report.guarded(name):
            part()
        report.say(f"-- {name}: {time.monotonic() - started:.1f} s")
    report.say(f"\n{report.path} and its log, {time.monotonic() - began:.0f} seconds")
    for failure in report.failures:
        report.say(f"FAILED: {failure}")
    cutter.cancel()
    return 1 if report.failures else 0


def cut(report: Report) -> None:
    report.say(f"CUT OFF after {CUT} seconds; the rows so far are in {report.path}")
    os._exit(124)


if __name__ == "__main__":
    sys.exit(main())
