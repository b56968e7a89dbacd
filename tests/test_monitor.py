"""NVTX ranges: there where a profiler listens, absent where none does."""

from __future__ import annotations

import pytest

import fastdiff
from fastdiff.execution import monitor

nvtx = pytest.importorskip("nvtx")  # which is for Linux


@pytest.fixture
def opened(monkeypatch):
    """The names of the ranges that are opened, in order."""
    names, annotate = [], nvtx.annotate

    def noted(message, domain):
        assert domain == "fastdiff"
        names.append(message)
        return annotate(message, domain=domain)

    monkeypatch.setattr(nvtx, "annotate", noted)
    return names


@pytest.mark.parametrize("variable", ["FASTDIFF_NVTX", "NVTX_INJECTION64_PATH"])
def test_a_profiler_sees_sampler_row_network_and_kernels(opened, monkeypatch, variable):
    expected = fastdiff.sample(lambda x, t: -x, "vp", 2, shape=(3,), num_samples=2)
    assert opened == []
    monkeypatch.setenv(variable, "1")
    sampler = fastdiff.samplers.PredictorCorrector(corrector="langevin", norm="sample")
    ours = fastdiff.sample(lambda x, t: -x, "vp", 2, shape=(3,), num_samples=2)
    assert opened == ["sample", *["row", "network", "step"] * 2]
    assert (ours == expected).all()
    opened.clear()
    fastdiff.sample(lambda x, t: -x, "vp", 1, shape=(3,), num_samples=2, sampler=sampler)
    assert opened == ["sample", "row", "network", "measure_langevin", "step", "row", "network", "step"]


def test_without_a_listener_a_function_is_itself(monkeypatch):
    monkeypatch.setenv("NVTX_INJECTION64_PATH", "/a/profiler.so")
    monkeypatch.setenv("FASTDIFF_NVTX", "0")
    assert monitor.marker()("step", len) is len
