"""Every test says itself on how many threads it runs; the comparisons are printed at the end, and saved if that is wished."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch
from recorder import Recorder, Unsaveable, shown

RECORDER = Recorder()


def pytest_addoption(parser):
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/<device>.csv")


def pytest_configure(config):
    if config.getoption("--save-results"):
        try:
            RECORDER.refuse_unclean()
        except Unsaveable as error:  # now, and not after a quarter of an hour
            raise pytest.UsageError(f"--save-results: {error}") from None


@pytest.fixture(scope="session")
def recorder():
    return RECORDER


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kept_memory():
    """glibc gives large blocks back to the kernel and pays for them again, depending on what ran before: here it keeps them,
    for everybody. (For the rest of the process; test_adaptive.py and test_operations.py, which come first, have the default.)"""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not RECORDER.rows:
        return
    terminalreporter.section("fastdiff against its opponents: their time in units of ours, median [p20-p80]")
    terminalreporter.write_line(f"{RECORDER.name}, {RECORDER.commit}, torch {torch.__version__}")
    terminalreporter.write_line("\n".join(map(shown, RECORDER.rows)))
    if config.getoption("--save-results"):
        if exitstatus > 1:  # of a test that failed there is no row
            terminalreporter.write_line("not saved: the run was interrupted")
        else:
            terminalreporter.write_line(f"saved in {RECORDER.save()}")
