"""Every test says itself on how many threads it runs; the comparisons are printed at the end, and saved if that is wished."""

import ctypes
import importlib.metadata
import importlib.util
import math
import subprocess
import sys
import time
from pathlib import Path

import gpu
import predictions
import provenance
import pytest
import torch
from recorder import Recorder, shown

BEGAN = time.monotonic()


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cuda: what is measured on a GPU, instead of what is on a CPU")
    parser.addoption("--quick", action="store_true", help="what is measured on a GPU, tried on small numbers")
    parser.addoption("--minutes", type=float, default=math.inf, help="what would not end within them is skipped")
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/<device>.csv")
    parser.addoption("--out", type=Path, help="write <device>.csv in this folder instead")
    parser.addoption("--commit", default="", help="of the sources, where git cannot tell it")


def pytest_configure(config):
    config.addinivalue_line("markers", "takes(seconds): at most, for --minutes")
    for name, part in gpu.PARTS.items():
        config.addinivalue_line("markers", f"{name}: {part.title} (gpu.py)")
    device = torch.device(config.getoption("device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"--device {device}: there is no CUDA device here; --quick tries its benchmarks on a CPU"
        )
    config.gpu = device.type == "cuda" or config.getoption("quick")
    config.recorder = Recorder(device, config.getoption("commit"), config.getoption("quick"))
    config.folder = config.getoption("out") or (provenance.RESULTS if config.getoption("save_results") else None)
    if config.folder:
        try:
            provenance.refuse_unclean(config.folder, config.recorder.commit)
            provenance.refuse_another(config.folder, config.recorder.commit)
        except provenance.Unsaveable as error:  # now, and not after a quarter of an hour
            raise pytest.UsageError(str(error)) from None


def pytest_ignore_collect(collection_path, config):
    name = collection_path.name
    return True if name.startswith("test_") and (name == "test_gpu.py") is not config.gpu else None


def pytest_report_header(config):
    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "is missing"
    lines = [f"torch {torch.__version__}, triton {triton}", f"{config.recorder.name} at {config.recorder.commit}"]
    if config.recorder.cuda:
        asked = "--query-gpu=driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        lines += subprocess.getoutput(f"nvidia-smi {asked} --format=csv").splitlines()
    return lines


def pytest_runtest_setup(item):
    takes, left = item.get_closest_marker("takes"), 60 * item.config.getoption("minutes") + BEGAN - time.monotonic()
    if takes and takes.args[0] > left:
        pytest.skip(f"{gpu.OF_TIME}: it may take {takes.args[0]} s, {max(left, 0):.0f} s are left")


def pytest_runtest_teardown(item):
    if item.config.folder and item.config.recorder.rows:  # a run that is cut off keeps what it has
        item.config.recorder.save(item.config.folder)


@pytest.fixture(scope="session")
def recorder(request):
    return request.config.recorder


@pytest.fixture(autouse=True)
def _compared(request, record_property):
    """What a test is the first to measure of a GPU, beside what was predicted of it (gpu.py prints it)."""
    config, rows = request.config, request.config.recorder.rows
    before = len(rows)
    yield
    if config.gpu:
        known = predictions.beside(config.recorder.name, rows[:before])
        for key, line in predictions.beside(config.recorder.name, rows[before:]).items():
            if key not in known:
                record_property("predicted", line)


@pytest.fixture(autouse=True)
def _one_thread(request):
    before = torch.get_num_threads()
    torch.set_num_threads(before if request.config.gpu else 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kept_memory():
    """glibc gives large blocks back to the kernel and pays for them again, depending on what ran before: here it keeps them,
    for everybody. (For the rest of the process; test_adaptive.py and test_operations.py, which come first, have the default.)"""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pytest_terminal_summary(terminalreporter, config):
    if config.recorder.rows:
        terminalreporter.section("fastdiff against its opponents: their time in units of ours, median [p20-p80]")
        terminalreporter.write_line("\n".join(map(shown, config.recorder.rows)))
        terminalreporter.write_line(f"saved in {config.folder}" if config.folder else "not saved")
