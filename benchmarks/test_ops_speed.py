"""Each operation against what a user would write instead, sizes from a small batch of vectors to beyond every cache.

A case's results are compared with the reference's before anything is timed. The floor is the memory's own: the same arrays
read and written, without noise.
"""

from __future__ import annotations

import math

import pytest
import torch
from paired import compare

from fastdiff.execution import cpu, ops, reference
from fastdiff.table import COLUMNS

SIZES = (8_192, 196_608, 16_777_216)
A, B, C = 0.9, 0.1, 0.3


def row_of(**columns):
    values = {"a": 1.0, "q": 1.0, "low": -math.inf, "high": math.inf, "next_scale": 1.0, "guidance": 1.0, **columns}
    return torch.tensor([[values.get(name, 0.0) for name in COLUMNS]])


def same(ours, theirs):
    assert torch.equal(ours, theirs)


def batch(n, seed=0):
    """n numbers in eight samples."""
    return torch.randn(8, n // 8, generator=torch.Generator().manual_seed(seed))


def run(benchmark, case, n, ours, opponents):
    """Time `ours` for pytest-benchmark's own table, then in turns with the opponents."""
    benchmark.group = f"ops: {case}"
    benchmark.pedantic(ours, rounds=5 if n > 10**6 else 30, iterations=1, warmup_rounds=1)
    benchmark.extra_info.update(compare(case, n, ours, opponents))


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    torch.set_num_threads(request.param)
    return request.param


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("n", SIZES)
def test_step(benchmark, threads, n):
    x, m, out, z = batch(n), batch(n, 1), torch.empty(8, n // 8), torch.empty(8, n // 8)
    table, cursor, theirs = row_of(a=A, b0=B, c=C), ops.cursor(0, 0, 0), torch.empty(8, n // 8)

    def ours():
        cpu.step(out, table, cursor, 1, x, m)

    def preallocated():
        z.normal_()
        torch.mul(x, A, out=theirs)
        theirs.add_(m, alpha=B)
        theirs.add_(z, alpha=C)

    expression = lambda x, m: A * x + B * m + C * torch.randn_like(x)  # noqa: E731
    ours()
    reference.step(theirs, table, cursor, 1, x, m)
    same(out, theirs)
    opponents = {
        "eager": lambda: expression(x, m),
        "eager, preallocated": preallocated,
        "memory floor (torch.add)": lambda: torch.add(x, m, alpha=B, out=theirs),
        "through torch.ops": lambda: torch.ops.fastdiff.step(out, table, cursor, 1, x, m),
    }
    if threads == 1:  # its randn is a scalar call for each element, whatever the threads
        compiled = torch.compile(expression)
        opponents["torch.compile of eager"] = lambda: compiled(x, m)
        with_torchs_noise = torch.compile(expression, options={"fallback_random": True})
        opponents["torch.compile, fallback_random"] = lambda: with_torchs_noise(x, m)
    run(benchmark, "step", n, ours, opponents)


@pytest.mark.parametrize("n", SIZES[:2])
def test_step_of_vectors(benchmark, n):
    """Two numbers a sample: a counter of the noise for each, of which half is not used."""
    x, m, out, theirs = (torch.zeros(n // 2, 2) + s for s in range(4))
    table, cursor = row_of(a=A, b0=B, c=C), ops.cursor(0, 0, 0)
    ours = lambda: cpu.step(out, table, cursor, 1, x, m)  # noqa: E731
    ours()
    reference.step(theirs, table, cursor, 1, x, m)
    same(out, theirs)
    run(benchmark, "step, 2 numbers a sample", n, ours, {"eager": lambda: A * x + B * m + C * torch.randn_like(x)})


@pytest.mark.parametrize("n", SIZES)
def test_whole_row(benchmark, threads, n):
    """What the loop asks of a row: the state, the network's next input in bfloat16, the flag of what is not finite."""
    x, m, out, theirs = batch(n), batch(n, 1), torch.empty(8, n // 8), torch.empty(8, n // 8)
    table, cursor = row_of(a=A, b0=B, c=C, next_scale=0.5), ops.cursor(0, 0, 0)
    net_input, first_bad = torch.empty(8, n // 8, dtype=torch.bfloat16), torch.full((8,), 9)
    half = m.bfloat16()

    def ours():
        cpu.step(out, table, cursor, 1, x, half, None, net_input=net_input, first_bad=first_bad)

    def eager():
        after = A * x + B * half.float() + C * torch.randn_like(x)
        return (0.5 * after).bfloat16(), after.isfinite().flatten(1).all(1)

    ours()
    reference.step(theirs, table, cursor, 1, x, half)
    same(out, theirs)
    run(benchmark, "step, bf16 network", n, ours, {"eager": eager})


@pytest.mark.parametrize("n", SIZES)
def test_normal(benchmark, threads, n):
    out, theirs, cursor = torch.empty(8, n // 8), torch.empty(8, n // 8), ops.cursor(0, 0, 0)
    cpu.normal(out, cursor, 1)
    reference.normal(theirs, cursor, 1)
    same(out, theirs)
    run(
        benchmark,
        "normal",
        n,
        lambda: cpu.normal(out, cursor, 1),
        {"torch.randn": lambda: torch.randn(8, n // 8, out=theirs)},
    )


@pytest.mark.parametrize("n", SIZES)
def test_rademacher(benchmark, threads, n):
    out, theirs, cursor = torch.empty(8, n // 8), torch.empty(8, n // 8), ops.cursor(0, 0, 0)
    cpu.rademacher(out, cursor, 3)
    reference.rademacher(theirs, cursor, 3)
    same(out, theirs)
    eager = lambda: torch.randint(0, 2, (8, n // 8), dtype=torch.float32).mul_(2).sub_(1)  # noqa: E731
    run(benchmark, "rademacher", n, lambda: cpu.rademacher(out, cursor, 3), {"eager": eager})


@pytest.mark.parametrize("n", SIZES)
def test_training(benchmark, threads, n):
    """perturb, dsm_loss and its backward for a network that predicts the noise; its output stands ready."""
    x0, m, cursor = batch(n), batch(n, 1).requires_grad_(), ops.cursor(0, 0, 0)
    alpha, sigma, weight = (torch.linspace(0.1 + s, 0.9 + s, 8) for s in range(3))
    wide, none, all_of_it = [v[:, None] for v in (alpha, sigma)], torch.zeros(8), torch.ones(8)

    def ours():
        m.grad = None
        noisy = ops.perturb(x0, alpha, sigma, cursor, 2)
        ops.dsm_loss(m, x0, none, all_of_it, weight, cursor, 2)[0].mean().backward()
        return noisy

    def eager():
        m.grad = None
        eps = torch.randn_like(x0)
        noisy = wide[0] * x0 + wide[1] * eps
        error = m - eps
        (weight * (error**2).mean(1)).mean().backward()
        return noisy

    same(ours(), reference.perturb(x0, alpha, sigma, cursor, 2))
    eps = torch.empty_like(x0)
    reference.normal(eps, cursor, 2)
    expected = 2 / n * weight[:, None] * (m.detach() - eps)
    assert torch.allclose(m.grad, expected, rtol=1e-3, atol=1e-4 / n)
    run(benchmark, "perturb + dsm_loss + backward", n, ours, {"eager": eager})


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("n", SIZES)
def test_probe_dot(benchmark, threads, n, kind):
    value, probe, cursor = batch(n), torch.empty(8, n // 8), ops.cursor(0, 0, 0)

    def ours():  # the network's product with the probe, which lies between the two, needs it in memory anyhow
        getattr(cpu, kind)(probe, cursor, 3)
        return cpu.probe_dot(value, cursor, 3, kind, probe)

    def again():
        getattr(cpu, kind)(probe, cursor, 3)
        return cpu.probe_dot(value, cursor, 3, kind)

    def eager():
        if kind == "normal":
            return (torch.randn_like(value) * value).sum(1)
        return (torch.randint(0, 2, value.shape, dtype=torch.float32).mul_(2).sub_(1) * value).sum(1)

    same(ours(), reference.probe_dot(value, cursor, 3, kind))
    opponents = {"eager": eager, "probe made a second time": again}
    run(benchmark, f"probe_dot, {kind}", n, ours, opponents)


@pytest.mark.parametrize("n", SIZES)
def test_measure_langevin(benchmark, threads, n):
    """The measurement and the step that it scales, with one noise for both."""
    x, m = batch(n), batch(n, 1)
    out, kept, theirs = (torch.empty(8, n // 8) for _ in range(3))
    measured, cursor = torch.empty(8, 2), ops.cursor(0, 0, 0)
    table = row_of(gain=0.05, cap=math.inf)

    def ours():
        cpu.measure_langevin(measured, table, cursor, 1, True, x, m, None, None, kept)
        cpu.step(out, table, cursor, None, x, m, None, None, None, None, kept, measured)

    def eager():
        z = torch.randn_like(x)
        delta = 0.05 * (z.norm(dim=1).mean() / m.norm(dim=1).mean()) ** 2
        return x + delta * m + (2 * delta).sqrt() * z

    ours()
    reference.measure_langevin(measured, table, cursor, 1, True, x, m, None, None, kept)
    reference.step(theirs, table, cursor, None, x, m, None, None, None, None, kept, measured)
    same(out, theirs)
    run(benchmark, "measured Langevin row", n, ours, {"eager": eager})


@pytest.mark.parametrize("n", SIZES)
def test_rk_error(benchmark, threads, n):
    """The seven stages of Dormand and Prince."""
    x, h = batch(n), torch.linspace(0.1, 0.2, 8)
    stages = [batch(n, s) for s in range(1, 8)]
    b = [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0]
    e = [71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40]

    def eager():
        after, error = x, torch.zeros_like(x)
        for k, weight, difference in zip(stages, b, e):
            after = after + (h * weight)[:, None] * k if weight else after
            error = error + (h * difference)[:, None] * k if difference else error
        ratio = error / (1e-5 + 1e-3 * torch.maximum(x.abs(), after.abs()))
        return after, (ratio**2).mean(1).sqrt()

    ours = lambda: cpu.rk_error(x, stages, h, b, e, 1e-3, 1e-5)  # noqa: E731
    same(ours()[0], reference.rk_error(x, stages, h, b, e, 1e-3, 1e-5)[0])
    run(benchmark, "rk_error", n, ours, {"eager": eager})


@pytest.mark.parametrize("n", [128, 8_192, 196_608])
def test_timestep_embedding(benchmark, n):
    t, frequencies = torch.linspace(0, 1, n // 128), torch.logspace(0, -4, 64)

    def eager():
        angle = (1000.0 * t)[:, None] * frequencies
        return torch.cat((angle.sin(), angle.cos()), 1)

    ours = lambda: cpu.timestep_embedding(t, frequencies, 1000.0, 128, "sin_cos")  # noqa: E731
    same(ours(), reference.timestep_embedding(t, frequencies, 1000.0, 128, "sin_cos"))
    assert torch.allclose(ours(), eager(), atol=1e-6)
    run(benchmark, "timestep_embedding", n, ours, {"eager": eager})


def test_call_overhead(benchmark):
    """64 numbers: what a call costs before it does anything."""
    x, m, out = batch(64), batch(64, 1), torch.empty(8, 8)
    table, cursor = row_of(a=A, b0=B, c=C), ops.cursor(0, 0, 0)
    ours = lambda: cpu.step(out, table, cursor, 1, x, m)  # noqa: E731
    opponents = {
        "through torch.ops": lambda: torch.ops.fastdiff.step(out, table, cursor, 1, x, m),
        "fastdiff's normal": lambda: cpu.normal(out, cursor, 1),
        "torch.add": lambda: torch.add(x, m, alpha=B, out=out),
        "eager": lambda: A * x + B * m + C * torch.randn_like(x),
    }
    run(benchmark, "step, call overhead", 64, ours, opponents)
