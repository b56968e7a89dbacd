"""One rule for what a machine can run, one thread, one state of the generators, and NaN in uninitialised memory."""

from __future__ import annotations

import os
import random
from collections import Counter

import numpy as np
import pytest
import torch

# the tests' tensors are small, and OpenMP threads that wait for each other crawl on a busy machine
torch.set_num_threads(int(os.environ.get("FASTDIFF_TEST_THREADS", "1")))

with torch.device("meta"):  # which looks up once what makes tensors, and must find torch.empty itself, not `poisoned`
    torch.empty(0)


def pytest_addoption(parser):
    parser.addoption("--few", type=int, help="only so many cases of each test function")
    parser.addoption(
        "--all-kernels", action="store_true", help="every case and target of the compiled kernels (make kernels)"
    )


def pytest_collection_modifyitems(config, items):
    few = config.getoption("few")
    if few is not None:
        count = Counter()
        for item in list(items):
            count[item.originalname] += 1
            if count[item.originalname] > few:
                items.remove(item)
    items.sort(
        key=lambda item: item.get_closest_marker("slow") is None
    )  # first, and so their files, so that no process ends with a long one
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded_generators():
    """A test draws the same numbers alone, in any order and beside other processes."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """torch.empty and new_empty return NaN, so that an element nobody wrote shows up in the results."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and out.device.type != "meta" else out

    monkeypatch.setattr(torch, "empty", poisoned)
    new_empty = torch.Tensor.new_empty

    def new_poisoned(self, *args, **kwargs):
        out = new_empty(self, *args, **kwargs)
        return (
            out.fill_(float("nan"))
            if type(out) is torch.Tensor and out.is_floating_point() and out.numel() < 10**9
            else out
        )

    monkeypatch.setattr(torch.Tensor, "new_empty", new_poisoned)
