"""NVTX ranges: there where a profiler listens, absent where none does."""

from __future__ import annotations

from collections import Counter

import pytest

import fastdiff
from fastdiff.execution import monitor

nvtx = pytest.importorskip("nvtx")  # which is for Linux


@pytest.fixture
def opened(monkeypatch):
    """How many ranges of each name are opened."""
    names, annotate = Counter(), nvtx.annotate

    def noted(message, domain):
        assert domain == "fastdiff"
        names[message] += 1
        return annotate(message, domain=domain)

    monkeypatch.setattr(nvtx, "annotate", noted)
    return names


@pytest.mark.parametrize("variable", ["FASTDIFF_NVTX", "NVTX_INJECTION64_PATH"])
def test_a_profiler_sees_sampler_row_network_and_kernels(opened, monkeypatch, variable):
    options = {"sde": "vp", "steps": 2, "shape": (3,), "num_samples": 2, "return_info": True}
    expected, _ = fastdiff.sample(lambda x, t: -x, **options)
    assert not opened
    monkeypatch.setenv(variable, "1")
    sampler = fastdiff.samplers.PredictorCorrector(corrector="langevin", norm="sample")
    ours, info = fastdiff.sample(lambda x, t: -x, **options)
    assert opened == {"sample": 1, "row": info.rows, "network": info.network_calls, "step": info.rows}
    assert (ours == expected).all()
    opened.clear()
    _, info = fastdiff.sample(lambda x, t: -x, **options, sampler=sampler)
    assert info.rows == 4
    assert opened == {"sample": 1, "row": 4, "network": 4, "step": 4, "measure_langevin": 2}


def test_without_a_listener_a_function_is_itself(monkeypatch):
    monkeypatch.setenv("NVTX_INJECTION64_PATH", "/a/profiler.so")
    monkeypatch.setenv("FASTDIFF_NVTX", "0")
    assert monitor.marker()("step", len) is len
