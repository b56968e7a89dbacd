"""Whole runs on a network that costs next to nothing, so that the loop around it is what is timed: fastdiff against the
algorithm as printed with torch.randn, and against its own reference backend. Equality is checked first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paired import compare

import fastdiff
from fastdiff.reference import papers

SHAPES = {"one small image": (1, (3, 4, 4)), "vectors": (4096, (2,)), "images": (64, (3, 32, 32))}
STEPS = 20


def score(x, t):
    """−x/2, whatever the level."""
    return x * -0.5


@pytest.mark.parametrize("size", SHAPES)
def test_euler_maruyama(benchmark, size):
    count, shape = SHAPES[size]
    times = np.linspace(1, 1e-3, STEPS + 1)
    start = fastdiff.normal(count, shape, seed=0)

    def ours(backend="auto"):
        return fastdiff.sample(score, "vp", STEPS, shape=shape, num_samples=count, backend=backend)

    def theirs(noise):
        return papers.euler_maruyama(lambda t: papers.vp(t).f, lambda t: papers.vp(t).g, score, start, times, noise)[-1]

    assert torch.equal(ours(), ours("reference"))
    same_noise = theirs(lambda k: fastdiff.normal(count, shape, seed=0, draw=k, stream=1))
    assert (ours() - same_noise).abs().max() < 1e-3  # on states of size 1 to 40: float32 rounding, row by row
    benchmark.group = f"VP Euler-Maruyama, {STEPS} steps, {count}x{shape}"
    benchmark(ours)
    opponents = {
        "as printed, torch.randn": lambda: theirs(lambda k: torch.randn_like(start)),
        "backend='reference'": lambda: ours("reference"),
    }
    numel = count * int(np.prod(shape))
    benchmark.extra_info.update(compare(f"VP Euler-Maruyama x{STEPS}", numel, ours, opponents))
