"""Whole runs on a GPU: rows replayed as CUDA graphs against eager loops, and against one whose network is compiled.

All run VP Euler–Maruyama on the same rows, with the same network object; a network in bfloat16 is asked in bfloat16 and
answers to float32 states. Products may use TF32, for all alike.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import cases
import peers
import torch
from gpu_report import LOOPS, Report, Run, Stopwatch, replayed, turns
from torch import Tensor, nn

import fastdiff
from fastdiff.execution import graphs
from fastdiff.networks.layers import TimeConditioned

CHECKED = 50  # steps
# what an opponent is called, and how many times our speed is promised
EAGER, COMPILED, PROMISED = "eager loop", "reduce-overhead loop", {"eager loop": 5.0, "reduce-overhead loop": 1.5}
OUTSIDE = 2.0  # percent of a step: promised of the large network
SAMPLER = "VP Euler-Maruyama"
PEERS = [peer for peer in peers.PEERS if peer.sampler == SAMPLER and peer.exact and not peer.from_prior]


class Loop(NamedTuple):
    """A case and how to run it here; the seconds that the eager loops may take, and those that a compilation may."""

    case: str
    batch: int
    steps: int
    seconds: float
    compilation: float
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    promised: bool = False  # PROMISED
    large: bool = False


SMALL = (
    Loop("MLP 256x2", 256, 1000, 10, 20, promised=True),
    Loop("demo U-Net 16x1x8x8", 16, 1000, 35, 50, promised=True),
    Loop("analytic 64x3x32x32", 64, 1000, 10, 15, (torch.float32,)),  # which has no dtype of its own
)
FULL = (*SMALL, Loop("U-Net 35.4M 2x3x32x32", 64, 50, 20, 120, large=True))


class Module(nn.Module):
    """A function as a module, whose graphs are kept from one run to the next."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)


class Subject:
    """A loop's network in one dtype, its start, and its runs."""

    def __init__(self, loop: Loop, dtype: torch.dtype, quick: bool, device: torch.device) -> None:
        case = cases.CASES[loop.case]
        net = case.network("vp", cases.CHAIN, device)
        self.net = net.to(dtype) if isinstance(net, nn.Module) else Module(net)
        self.loop, self.dtype, self.quick, self.device = loop, dtype, quick, device
        self.steps = 10 if quick else loop.steps
        generator = torch.Generator(device).manual_seed(0)
        self.start = torch.randn(case.batch if quick else loop.batch, *case.shape, generator=generator, device=device)
        self.name = f"{loop.case.rsplit(' ', 1)[0]} {'x'.join(map(str, self.start.shape))} {str(dtype)[6:]}"

    def ours(self, steps: int, **options: Any) -> Run:
        run = cases.ours("vp", self.net, self.start, **PEERS[0].options(steps))
        return lambda: run(**options)

    def asked(self, x: Tensor, t: Tensor) -> Tensor:
        """The network as a loop of float32 states calls it."""
        return self.net(x.to(self.dtype), t).float()  # type: ignore[no-any-return]

    def eager(self, steps: int, net: Callable[[Tensor, Tensor], Tensor], before: Run = lambda: None) -> Run:
        """A scheduler's loop in plain PyTorch: each step's numbers are Python's, its tensors are new."""
        table = fastdiff.plan("vp", steps, sampler="euler_maruyama", grid="score_sde", prediction="eps")
        rows = [(row.time, row.a + row.b[0] * row.p, row.b[0] * row.q, row.c) for row in table.rows]

        def run() -> Tensor:
            x = self.start
            with torch.no_grad():
                for time, a, b, c in rows:
                    before()
                    m = net(x, torch.full((len(x),), time, device=x.device))
                    x = a * x + b * m + (c * torch.randn_like(x) if c else 0.0)
            return x

        return run

    def opponents(self) -> dict[str, Callable[[int], Run]]:
        """By name: steps -> a run."""
        found = {EAGER: lambda steps: self.eager(steps, self.asked)}
        for peer in PEERS:
            if not peers.missing(peer.opponent):
                found[peer.opponent] = lambda steps, build=peer.build: build(self.asked, self.start, steps)
        return found

    def compiled(self) -> Callable[[int], Run]:
        """The eager loop around a network whose kernels and CUDA graphs are torch.compile's."""
        net = torch.compile(self.asked, mode="reduce-overhead", dynamic=False)
        # an answer is used up before the next call overwrites it, so that no copy is needed
        return lambda steps: self.eager(steps, net, torch.compiler.cudagraph_mark_step_begin)

    def noise(self) -> Iterator[Tensor]:
        generator = torch.Generator(self.device).manual_seed(1)
        while True:
            yield torch.empty_like(self.start).normal_(generator=generator)

    def agrees(self, name: str, build: Callable[[int], Run], report: Report) -> bool:
        """Whether the same noise gives the same samples but for roundings: of float32, or of the networks' products where
        those are in bfloat16 or TF32, which a difference in the last bit of the input can turn."""
        steps, mine = min(CHECKED, self.steps), self.noise()
        x = self.ours(steps, noise=lambda row: next(mine))()
        run = build(steps)
        run()  # compiles, with what noise it likes
        with peers.noise_from(self.noise()):
            y = run().view_as(x)
        rough = self.dtype == torch.bfloat16 or self.device.type == "cuda"
        limit = 2**-8 if rough and not isinstance(self.net, Module) else 1e-5
        error = float((x - y).abs().max() / x.abs().max())
        if not error <= limit:
            report.fail(f"{self.name}: {name} gives other samples, {error:.2g} apart: not timed")
        return error <= limit

    def alone(self, watch: Stopwatch) -> Callable[[], float]:
        """A measurement of the network by itself, as our loop asks it: on a GPU by graphs of several calls."""
        x, t = self.start.to(self.dtype), torch.full((len(self.start),), 0.5, device=self.device)
        known = {}
        if isinstance(self.net, TimeConditioned):
            known["features"] = self.net.time_features(t[:1])

        def call() -> Tensor:
            with torch.no_grad():
                return self.net(x, t, **known)  # type: ignore[no-any-return]

        calls = 2 if self.loop.large else 10
        return watch.batches(replayed(call, calls, self.device), calls) if watch.cuda else watch.batches(call)


def compare(device: torch.device, quick: bool, watch: Stopwatch, report: Report) -> None:
    """Each case against the eager loops and the compiled one, which takes long to compile."""
    if watch.cuda:
        torch.set_float32_matmul_precision("high")
        report.say(f"float32 products as TF32: cuBLAS yes, cuDNN {'yes' if torch.backends.cudnn.allow_tf32 else 'no'}")
    for reason in filter(None, (peers.missing(peer.opponent) for peer in PEERS)):
        report.say(f"left out: {reason}")
    kinds = [against_eager, against_compiled]
    if quick or not watch.cuda:
        kinds.remove(against_compiled)
        report.say("left out of a quick run, and without a GPU: the compiled loops, and the large network if quick")
    jobs = [
        (kind, loop, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for kind in kinds
        for loop in (SMALL if quick else FULL)
        if dtype in loop.dtypes
    ]
    jobs.sort(key=lambda job: job[0] is against_compiled and job[1].large)  # last what takes longest
    for kind, loop, dtype in jobs:
        what = f"{loop.case}, {str(dtype)[6:]}" + (f", {COMPILED}" if kind is against_compiled else "")
        if report.has_time(loop.compilation if kind is against_compiled else loop.seconds, what):
            with report.guarded(what):
                kind(Subject(loop, dtype, quick, device), watch, report)


def against_eager(subject: Subject, watch: Stopwatch, report: Report) -> None:
    case, n, steps = subject.name, subject.start.numel(), subject.steps
    engine, builds = "eager", {}
    if watch.cuda:
        engine = "graph"
        a, b, c = (subject.ours(min(CHECKED, steps), engine=name)() for name in ("graph", "eager", "eager"))
        if not torch.equal(a, b):
            report.fail(
                f"{case}: the graph engine's samples are {float((a - b).abs().max()):.3g} apart from the eager engine's (which "
                f"{'repeats' if torch.equal(b, c) else 'does not repeat'} its own): not timed"
            )
            return
        builds["fastdiff's eager engine"] = lambda steps: subject.ours(steps, engine="eager")
    for name, build in subject.opponents().items():
        if subject.agrees(name, build, report):
            builds[name] = build
    runs = {"ours": subject.ours(steps, engine=engine), **{name: build(steps) for name, build in builds.items()}}
    if watch.cuda:
        held = [[peak(runs[name])] for name in ("ours", EAGER) if name in runs]
        report.row(LOOPS, case, n, "peak MiB", held[0], *((EAGER, held[1]) if len(held) > 1 else ()))
    for run in runs.values():
        run()
    clocks = {name: lambda run=run: watch.whole(run) / steps for name, run in runs.items()}
    times = turns({**clocks, "network": subject.alone(watch)}, 0.0 if subject.quick else 6.0, most=15)
    for name in builds:
        ratio = report.row(LOOPS, case, n, "us per step", times["ours"], name, times[name])
        tell_promise(subject, name, ratio, report)
    outside = [whole - network for whole, network in zip(times["ours"], times["network"])]
    report.row(LOOPS, case, n, "us of the network alone", times["network"])
    report.row(LOOPS, case, n, "us outside the network per step", outside)
    share = [100 * part / whole for part, whole in zip(outside, times["ours"])]
    report.row(LOOPS, case, n, "percent of a step outside the network", share)
    if subject.loop.large and watch.cuda:
        middle = statistics.median(share)
        report.say(
            f"    promised: at most {OUTSIDE:g} % outside the network: {'kept' if middle <= OUTSIDE else 'MISSED'}"
        )


def against_compiled(subject: Subject, watch: Stopwatch, report: Report) -> None:
    torch.compiler.reset()
    build = subject.compiled()
    if not subject.agrees(COMPILED, build, report):
        return
    runs = {"ours": subject.ours(subject.steps, engine="graph"), COMPILED: build(subject.steps)}
    for run in runs.values():
        run()
    clocks = {name: lambda run=run: watch.whole(run) / subject.steps for name, run in runs.items()}
    times = turns(clocks, 3.0, most=15)
    ratio = report.row(
        LOOPS, subject.name, subject.start.numel(), "us per step", times["ours"], COMPILED, times[COMPILED]
    )
    tell_promise(subject, COMPILED, ratio, report)


def tell_promise(subject: Subject, opponent: str, ratio: float, report: Report) -> None:
    if subject.loop.promised and opponent in PROMISED and subject.device.type == "cuda":
        least = PROMISED[opponent]
        report.say(f"    promised: at least {least:g}x: {'kept' if ratio >= least else 'MISSED'}")


def peak(run: Run) -> float:
    """MiB that a first run, captures included, holds at once beyond what was held before."""
    graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
