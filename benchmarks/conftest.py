"""Every test says itself on how many threads it runs; the comparisons are printed at the end, and saved if asked."""

from __future__ import annotations

import ctypes
import sys

import paired
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--save-results", action="store_true", help="write benchmarks/results/<device>.csv")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kept_memory():
    """glibc gives large blocks back to the kernel and pays for them again, depending on what ran before: here it keeps them,
    for everybody. (For the rest of the process; test_likelihood.py and test_ops_speed.py, which come first, have the default.)"""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    if not paired.ROWS:
        return
    terminalreporter.section("fastdiff against its opponents: their time in units of ours, median [p20-p80], our time")
    terminalreporter.write_line(f"{paired.device()}, {paired.commit()}, torch {torch.__version__}")
    for of_operations in (True, False):
        if any((row["group"] == "ops") == of_operations for row in paired.ROWS):
            terminalreporter.write_line(paired.table(of_operations))
    if config.getoption("--save-results"):
        if exitstatus > 1:  # of a test that failed there is no row
            terminalreporter.write_line("not saved: the run was interrupted")
        else:
            terminalreporter.write_line(f"saved in {paired.save()}")
