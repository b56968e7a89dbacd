"""Each operation against what a user would write instead, sizes from a small batch of vectors to beyond every cache."""

import importlib.util

import operations
import pytest
import torch
from cases import CPU
from operations import OPS
from recorder import Stopwatch, turns

from fastdiff.execution import ops, verify
from fastdiff.execution.noise import PROBES, SAMPLER

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


def prepared(k, t):
    """A row of a run, whose operands but the network's output stay the same."""
    written = {name: t[name] for name in ("net_input", "first_bad")}
    step = k.prepare_step(t["out"], t["table"], SAMPLER, t["x"], **written)
    return lambda: step(t["cursor"], t["half"], None)


LAUNCHED = {
    "step, prepared": prepared,
    "step": lambda k, t: lambda: operations.step("half", "net_input", "first_bad")(k, t),
    "dsm_loss": lambda k, t: lambda: k.dsm_loss(t["m"], t["x"], t["r"], t["w"], t["weight"], t["cursor"], SAMPLER),
    "probe_dot": lambda k, t: lambda: k.probe_dot(t["x"], t["cursor"], PROBES, "normal"),
    "rk_error": lambda k, t: lambda: next(op for op in OPS if op.name == "rk_error").ours(k, t),
    "measure_langevin": lambda k, t: (
        lambda: k.measure_langevin(t["measured"], t["langevin"], t["cursor"], SAMPLER, False, t["x"], t["m"])
    ),
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux")
@pytest.mark.parametrize("case", LAUNCHED)
def test_launching(benchmark, recorder, monkeypatch, case):
    """What the host does for an operation of the Triton kernels, its allocations among it, up to the call of CUDA, which there
    is none of here; against its launches alone as Triton makes them, which looks at all arguments each time. Kernels that no
    device starts would answer wrongly: so they are not asked, though what looks whether they were is within the time."""
    import triton
    from launching import Driver

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(verify, "_may_run", lambda *call: True)
    kernels, tiles = ops.backend_module("triton"), ops.kernels().tiles
    t, made, launch = operations.tensors(4096, CPU, 64), [], tiles.launch

    def noting(kernel, grid, like, *args, **meta):
        made.append((kernel, grid, like, args, meta))
        return launch(kernel, grid, like, *args, **meta)

    ours = LAUNCHED[case](kernels, t)
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "launch", noting)
        ours()
    options = {"num_warps": tiles.WARPS, "enable_fp_fusion": False}

    def by_triton():
        for kernel, grid, _, args, meta in made:
            kernel[grid](*args, **meta, **options)

    benchmark.group = f"launches: {case}"
    benchmark.pedantic(ours, rounds=200, iterations=10, warmup_rounds=1)
    watch = Stopwatch(CPU)
    runs = {"ours": ours, "JITFunction.run, its launches alone": by_triton}
    times = turns({name: watch.batches(run) for name, run in runs.items()}, 1.0, 5, 400)
    benchmark.extra_info.update(recorder.pairs("launches", case, 4096, "us", times))
