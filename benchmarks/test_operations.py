"""Each operation against what a user would write instead, sizes from a small batch of vectors to beyond every cache."""

import operations
import pytest
import torch
from cases import CPU
from operations import OPS
from recorder import Stopwatch, turns

from fastdiff.execution import ops

SIZES = (8_192, 196_608, 16_777_216)
# (operation, n, samples, what the results call it)
OTHERS = [
    ("step", 64, 8, "step, call overhead"),  # what a call costs before it does anything
    # a counter of the noise for each sample, of which half is not used
    ("step", 8_192, 4_096, "step, 2 numbers a sample"),
    ("step", 196_608, 98_304, "step, 2 numbers a sample"),
    ("timestep_embedding", 128, 8, "timestep_embedding"),
]
CASES = [*((op.name, n, 8, op.name) for op in OPS for n in SIZES), *OTHERS]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("threads", [1, 2], ids=["one thread", "two threads"])
@pytest.mark.parametrize(("name", "n", "samples", "case"), CASES, ids=[f"{case}-{n}" for _, n, _, case in CASES])
def test_operation(benchmark, recorder, name, n, samples, case, threads):
    torch.set_num_threads(threads)
    op, module = next(op for op in OPS if op.name == name), ops.backend_module("cpu")
    t = operations.tensors(n, CPU, samples)
    # (the compiler's randn is a scalar call for each element, whatever the threads)
    fallback = {"torch.compile, fallback_random": {"options": {"fallback_random": True}}}
    compiled = {operations.COMPILED: {}, **fallback} if case == "step" and threads == 1 else {}
    runs = operations.contestants(op, module, t, ops.backend_module("reference"), t, compiled)
    benchmark.group = f"ops: {case}"
    benchmark.pedantic(runs["ours"], rounds=5 if n > 10**6 else 30, iterations=1, warmup_rounds=1)
    watch = Stopwatch(CPU)
    times = turns({other: watch.batches(run) for other, run in runs.items()}, 1.0, 5, 400)
    benchmark.extra_info.update(recorder.pairs("ops", case, n, "us", times))
