"""The operations of a GPU backend: their bits against a CPU's, their time against the memory's and against eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from gpu_report import OPS, Report, Run, Stopwatch, replayed, turns
from torch import Tensor

import fastdiff
from fastdiff import samplers
from fastdiff.execution import cpu, ops, reference
from fastdiff.execution.noise import PERTURBATION, PROBES, SAMPLER
from fastdiff.table import COLUMNS

SIZES = (8_192, 196_608, 16_777_216, 67_108_864)
QUICK_SIZES = (8_192,)
LAUNCHED = 196_608  # up to here the launch takes longer than the kernel, so that a graph of CALLS is timed, too
CALLS = 20
SAMPLES = 64
EXACT = 2**20  # numbers that the reference can be asked for; for more, the compiled library, which has its bits
COMPILATION = 8  # seconds
A, B, C = 0.9, 0.1, 0.3
# Dormand and Prince's weights, and their difference from the embedded method's
WEIGHTS = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0)
ERRORS = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


class Op(NamedTuple):
    """`moves`: bytes of each number that must be read or written; `theirs` takes the tensors that `given` names."""

    name: str
    moves: int
    ours: Callable[[ModuleType, Tensors], Outputs]
    given: str
    theirs: Callable[..., Any]
    compiles: bool = False


def affine(x: Tensor, m: Tensor) -> Tensor:
    return A * x + B * m + C * torch.randn_like(x)


def affine_mixed(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    after = A * x + B * m.float() + C * torch.randn_like(x)
    return after, after.bfloat16()


def affine_flagged(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    after, narrow = affine_mixed(x, m)
    return after, narrow, after.isfinite().all(1)


def denoising_loss(m: Tensor, x: Tensor, r: Tensor, w: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    error = m - (r[:, None] * x + w[:, None] * torch.randn_like(x))
    return weight * (error**2).mean(1), error


def signed_sum(value: Tensor) -> Tensor:
    return (torch.randint(0, 2, value.shape, dtype=value.dtype, device=value.device).mul_(2).sub_(1) * value).sum(1)


def dormand_prince(x: Tensor, h: Tensor, *stages: Tensor) -> tuple[Tensor, Tensor]:
    after, error = x, torch.zeros_like(x)
    for k, weight, difference in zip(stages, WEIGHTS, ERRORS):
        after = after + (h * weight)[:, None] * k if weight else after
        error = error + (h * difference)[:, None] * k if difference else error
    ratio = error / (1e-5 + 1e-3 * torch.maximum(x.abs(), after.abs()))
    return after, (ratio**2).mean(1).sqrt()


def step(k: ModuleType, t: Tensors, m: str, *written: str) -> Outputs:
    k.step(t["out"], t["table"], t["cursor"], SAMPLER, t["x"], t[m], **{name: t[name] for name in written})
    return (t["out"], *(t[name] for name in written))


def normal(k: ModuleType, t: Tensors) -> Outputs:
    k.normal(t["out"], t["cursor"], SAMPLER)
    return (t["out"],)


def probe_dot(kind: str) -> Callable[[ModuleType, Tensors], Outputs]:
    return lambda k, t: (k.probe_dot(t["x"], t["cursor"], PROBES, kind),)


STAGES = [f"k{j}" for j in range(7)]
ALL = (
    Op("step, fp32", 12, lambda k, t: step(k, t, "m"), "x m", affine, compiles=True),
    Op("step, mixed", 12, lambda k, t: step(k, t, "half", "net_input"), "x half", affine_mixed, compiles=True),
    Op("step, mixed, flagged", 12, lambda k, t: step(k, t, "half", "net_input", "first_bad"), "x half", affine_flagged),
    Op("normal", 4, normal, "out", lambda out: torch.randn(out.shape, out=out)),
    Op("perturb", 8, lambda k, t: (k.perturb(t["x"], t["r"], t["w"], t["cursor"], PERTURBATION),), "x r w",
       lambda x, r, w: r[:, None] * x + w[:, None] * torch.randn_like(x)),
    Op("dsm_loss", 12, lambda k, t: k.dsm_loss(t["m"], t["x"], t["r"], t["w"], t["weight"], t["cursor"], PERTURBATION),
       "m x r w weight", denoising_loss),
    Op("probe_dot, rademacher", 4, probe_dot("rademacher"), "x", signed_sum),
    Op("probe_dot, normal", 4, probe_dot("normal"), "x", lambda x: (torch.randn_like(x) * x).sum(1)),
    # the second stage has no weight
    Op("rk_error", 32, lambda k, t: k.rk_error(t["x"], [t[s] for s in STAGES], t["h"], WEIGHTS, ERRORS, 1e-3, 1e-5),
       " ".join(["x h", *STAGES]), dormand_prince),
)  # fmt: skip


def tensors(n: int, device: torch.device) -> Tensors:
    """n numbers in SAMPLES samples, and all else that the operations read and write."""
    generator = torch.Generator(device).manual_seed(0)
    made = {
        name: torch.randn(SAMPLES, n // SAMPLES, generator=generator, device=device) for name in ("x", "m", *STAGES)
    }
    columns = {
        "a": A, "b0": B, "c": C, "q": 1.0, "low": -math.inf, "high": math.inf, "next_scale": 1.0, "guidance": 1.0
    }  # fmt: skip
    made |= {"half": made["m"].bfloat16(), "out": torch.empty_like(made["x"])}
    made |= {"net_input": torch.empty_like(made["half"]), "cursor": ops.cursor(0, 0, 0, device)}
    made["table"] = torch.tensor([[columns.get(name, 0.0) for name in COLUMNS]], device=device)
    made["first_bad"] = torch.full((SAMPLES,), 9, device=device)
    for name, low, high in (("r", 0.1, 0.9), ("w", 1.1, 1.9), ("weight", 2.1, 2.9), ("h", 0.1, 0.2)):
        made[name] = torch.linspace(low, high, SAMPLES, device=device)
    return made


def roofline(device: torch.device, backend: str, quick: bool, watch: Stopwatch, report: Report) -> None:
    """Each operation by size: microseconds, bytes a second, percent of what a copy reaches, ratios to eager and compiled.

    Small sizes lie in the cache, as they do in a sampler's loop, and may pass what a copy of the memory reaches.
    """
    module = ops.backend_module(backend)
    copied = copy_rate(device, quick, watch, report)
    for n in QUICK_SIZES if quick else SIZES:
        oracle = reference if n <= EXACT else cpu
        if oracle is cpu and not cpu.available:
            report.say(f"left out: n = {n:,}, for want of the compiled library to check it against")
            return
        given = tensors(n, device)
        on_cpu = {name: value.cpu() for name, value in given.items()}
        for op in ALL:
            if not report.has_time(2, f"{op.name}, n = {n:,}"):
                return
            with report.guarded(f"{op.name}, n = {n:,}"):
                if same_bits(op, module, given, oracle, on_cpu, report):
                    measure(op, n, module, given, quick, copied, watch, report)


def copy_rate(device: torch.device, quick: bool, watch: Stopwatch, report: Report) -> float:
    """Bytes that a copy reads and writes in a microsecond."""
    source = torch.randn(2**18 if quick else 2**28, device=device)
    target = torch.empty_like(source)
    times = turns({"copy": watch.batches(lambda: target.copy_(source))}, 0.5)["copy"]
    rates = [2 * source.nbytes / time for time in times]
    return 1e3 * report.row(OPS, "copy_", source.numel(), "GB/s", [rate / 1e3 for rate in rates])


def same_bits(op: Op, module: ModuleType, given: Tensors, oracle: ModuleType, on_cpu: Tensors, report: Report) -> bool:
    for place in (given, on_cpu):
        for name in ("out", "net_input"):
            place[name].fill_(math.nan)
    ours, theirs = op.ours(module, given), op.ours(oracle, on_cpu)
    differ = [int((a.cpu() != b).sum()) for a, b in zip(ours, theirs, strict=True)]
    if any(differ):
        report.fail(
            f"{op.name}, n = {given['x'].numel():,}: of its results {differ} numbers differ from the CPU's: not timed"
        )
    return not any(differ)


def alike(ours: Run, theirs: Run) -> bool:
    """Whether an expression means the same: its result differs by its own noise, which is 0 on the mean."""
    a, b = ((value if isinstance(value, Tensor) else value[0]).double() for value in (ours(), theirs()))
    apart = b - a
    # 5 standard errors; float32's roundings
    return bool(apart.mean().abs() <= 5 * apart.std() / apart.numel() ** 0.5 + 1e-5 * a.abs().mean())


def measure(
    op: Op, n: int, module: ModuleType, given: Tensors, quick: bool, copied: float, watch: Stopwatch, report: Report
) -> None:
    arguments = [given[name] for name in op.given.split()]
    runs: dict[str, Run] = {"ours": lambda: op.ours(module, given), "eager": lambda: op.theirs(*arguments)}
    if op.compiles and quick:
        report.say(f"left out of a quick run: torch.compile of {op.name}")
    elif op.compiles and report.has_time(COMPILATION, f"torch.compile of {op.name}, n = {n:,}"):
        torch.compiler.reset()  # what other sizes have taught it
        compiled = torch.compile(op.theirs, dynamic=False)
        runs["torch.compile"] = lambda: compiled(*arguments)
    for name in list(runs)[1:]:
        if not alike(runs["ours"], runs[name]):
            report.fail(f"{op.name}, n = {n:,}: {name} computes something else: not timed")
            del runs[name]
    kinds = {"us": (runs, 1)}
    if watch.cuda and n <= LAUNCHED:
        kinds["us in a graph"] = ({name: replayed(run, CALLS, given["x"].device) for name, run in runs.items()}, CALLS)
    for metric, (systems, calls) in kinds.items():
        times = turns({name: watch.batches(run, calls) for name, run in systems.items()}, 0.05 if quick else 0.4)
        for name in list(systems)[1:]:
            report.row(OPS, op.name, n, metric, times["ours"], name, times[name])
    # of the last kind, in which launching counts least
    rates = [op.moves * n / time for time in times["ours"]]
    report.row(OPS, op.name, n, "GB/s", [rate / 1e3 for rate in rates])
    report.row(OPS, op.name, n, "percent of copy", [100 * rate / copied for rate in rates])


def pointwise(x: Tensor, t: Tensor) -> Tensor:
    """A network of products alone, whose bits are the same on every device."""
    return x * (0.5 * t + 0.25).view(-1, *[1] * (x.ndim - 1))


RUNS = (
    ("vp", "euler_maruyama"),
    ("ve", samplers.PredictorCorrector(corrector="langevin", norm="sample")),
    ("vp", "heun"),
)


def equality(device: torch.device, backend: str, report: Report) -> None:
    """Noise and whole runs: the numbers in which this device differs from a CPU."""
    what = f"FDN1 normals, {backend}"
    with report.guarded(what):
        ours = fastdiff.normal(1000, (1000,), seed=7, draw=3, backend=backend, device=device).cpu()
        theirs = fastdiff.normal(1000, (1000,), seed=7, draw=3, backend="reference", device="cpu")
        tell_difference(what, ours, theirs, report)
    given = {"shape": (3, 16, 16), "num_samples": 16, "prediction": "x0", "seed": 7, "progress": False}
    for sde, sampler in RUNS:
        theirs = fastdiff.sample(pointwise, sde, 100, sampler=sampler, device="cpu", backend="reference", **given)
        for engine in ("eager", "graph") if device.type == "cuda" else ("eager",):
            what = f"sample(), {sde} {sampler if isinstance(sampler, str) else 'langevin'}, {backend}, {engine}"
            with report.guarded(what):
                ours = fastdiff.sample(pointwise, sde, 100, sampler=sampler, device=device, engine=engine, **given)
                tell_difference(what, ours.cpu(), theirs, report)


def tell_difference(what: str, ours: Tensor, theirs: Tensor, report: Report) -> None:
    differ = int((ours != theirs).sum())
    report.row(OPS, what, ours.numel(), "numbers unlike the reference's", [differ])
    if differ:
        report.fail(
            f"{what}: {differ} of {ours.numel():,} numbers differ, by {float((ours - theirs).abs().max()):.3g} at most"
        )
