"""The operations, and the one place where backends differ. So far there is one: `reference`, plain PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, inputs
from .errors import ConfigError, choose
from .reference import noise, row

BACKENDS = ("auto", "reference", "cpu", "triton")
ENGINES = ("auto", "eager", "graph")

# A forked child has no threads of OpenMP's, and torch would wait for them for ever.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

draw_normal = noise.normal
step, convert, measure_langevin, learned_scale = row.step, row.convert, row.measure_langevin, row.learned_scale


def resolve(backend: str, engine: str) -> tuple[str, str, str]:
    """The backend and engine that will run, and a sentence saying why."""
    choose("backend", backend, BACKENDS)
    choose("engine", engine, ENGINES)
    if backend not in ("auto", "reference"):
        raise ConfigError(f"backend={backend!r} is not built in this version: use 'auto' or 'reference'")
    if engine == "graph":
        raise ConfigError("engine='graph' is not built in this version: use 'auto' or 'eager'")
    return "reference", "eager", "this version has no fused kernels and no captured loops"


def normal(
    num_samples: int,
    shape: Sequence[int],
    *,
    seed: int,
    draw: int = 0,
    first_sample: int = 0,
    stream: int = noise.PRIOR,
    backend: str = "auto",
    device: torch.device | str | None = None,
) -> Tensor:
    """fastdiff's normals (FDN1), float32 [num_samples, *shape]: a pure function of (seed, stream, sample, draw, element).

    Row i belongs to sample `first_sample + i`. The bits are the same on every machine, backend and batch split.
    """
    resolve(backend, "auto")
    given = {"draw": draw, "first_sample": first_sample, "stream": stream}
    counters = {name: checks.integer(name, value, 0, 2**32 - 1) for name, value in given.items()}
    checks.integer("num_samples", num_samples, 0, 2**32 - counters["first_sample"])
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    return noise.normal(num_samples, inputs.shape_of(shape), seed=seed, device=inputs.device_of(device), **counters)
