"""The reference backend against the algorithms as printed, and its noise against torch's: the baseline that the fused
kernels will be measured from. Each group's times are from one run and one machine; the equality is checked first."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.reference import papers

SHAPES = {"vectors": (4096, (2,)), "images": (64, (3, 32, 32))}
STEPS = 20


def score(x, t):
    """−x/2, whatever the level: cheap enough that the loop around it is what is timed."""
    return x * -0.5


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("runner", ["fastdiff", "papers"])
def test_euler_maruyama(benchmark, size, runner):
    count, shape = SHAPES[size]
    benchmark.group = f"VP Euler-Maruyama, {STEPS} steps, {count}x{shape}"
    times = np.linspace(1, 1e-3, STEPS + 1)
    start = fastdiff.normal(count, shape, seed=0)

    def ours():
        return fastdiff.sample(score, "vp", STEPS, shape=shape, num_samples=count, check="off")

    def theirs(noise):
        return papers.euler_maruyama(lambda t: papers.vp(t).f, lambda t: papers.vp(t).g, score, start, times, noise)[-1]

    same_noise = theirs(lambda k: fastdiff.normal(count, shape, seed=0, draw=k, stream=1))
    assert (ours() - same_noise).abs().max() < 1e-3  # on states of size 1 to 40: float32 rounding, row by row
    benchmark(ours if runner == "fastdiff" else lambda: theirs(lambda k: torch.randn_like(start)))


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("generator", ["fastdiff.normal", "torch.randn"])
def test_normal(benchmark, size, generator):
    count, shape = SHAPES[size]
    benchmark.group = f"normals, {count}x{shape}"
    if generator == "fastdiff.normal":
        benchmark(lambda: fastdiff.normal(count, shape, seed=0))
    else:
        benchmark(lambda: torch.randn(count, *shape))
