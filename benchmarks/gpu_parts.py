"""What `make gpu` measures: bits against a CPU's, each operation against the memory, whole runs against eager and compiled loops.

Whole runs are VP Euler–Maruyama on the same rows, with the same network object; a network in bfloat16 is called in bfloat16 and
answers to float32 states. Products may use TF32, for all alike.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import operations
import peers
import torch
from cases import CPU, Subject
from operations import OPS, Op, Tensors
from recorder import Recorder, Run, Stopwatch, replayed, shown, turns
from torch import Tensor, nn

import fastdiff
from fastdiff import samplers
from fastdiff.execution import cpu, graphs, ops, reference
from fastdiff.networks.layers import TimeConditioned

SIZES, QUICK_SIZES = (8_192, 196_608, 16_777_216, 67_108_864), (8_192,)
SAMPLES = 64
LAUNCHED = 196_608  # up to here the launch takes longer than the kernel, so that a graph of CALLS is timed, too
CALLS = 20
EXACT = 2**20  # numbers that the reference can be asked for; for more, the compiled library, which has its bits
COMPILATION = 8  # seconds
CHECKED = 50  # steps
# what an opponent is called, and how many times our speed is promised
EAGER, COMPILED, PROMISED = "eager loop", "reduce-overhead loop", {"eager loop": 5.0, "reduce-overhead loop": 1.5}
OUTSIDE = 2.0  # percent of a step: promised of the large network
PEERS = [p for p in peers.PEERS if p.sampler == "VP Euler-Maruyama" and p.exact and not p.from_prior]


class Session(Recorder):
    """A recorder that saves each row as it comes and keeps a log beside them, so that a run that is cut off keeps what it has.

    failures  what makes the exit status nonzero
    """

    def __init__(self, folder: Path, device: torch.device, commit: str, quick: bool, end: float) -> None:
        super().__init__(device, commit)
        self.refuse_unclean(folder)
        self.folder, self.device, self.quick, self.end, self.part_end = folder, device, quick, end, end
        self.failures: list[str] = []
        self.watch = Stopwatch(device)
        self.backend = ops.resolve("auto", "eager", device, torch.float32)[0]
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / f"{self.name}.log").open("w", encoding="utf-8")

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.say(f"FAILED: {text}")

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What breaks here fails, and does not take the numbers after it along."""
        try:
            yield
        except AssertionError as error:  # a check of ours, which says what is wrong
            self.fail(f"{what}: {error}")
        except Exception as error:  # whatever it is
            self.say(traceback.format_exc())
            self.fail(f"{what}: {type(error).__name__}")

    def begin(self, title: str, seconds: float, reserve: float = 0.0) -> bool:
        """Start a part that may take so long, and must leave `reserve` seconds for others; False if there is no time."""
        self.part_end = min(time.monotonic() + seconds, self.end - reserve)
        self.say(f"\n== {title} ({max(self.left(), 0):.0f} s)")
        return self.has_time(3, "this part")

    def left(self) -> float:
        return self.part_end - time.monotonic()

    def has_time(self, seconds: float, what: str) -> bool:
        """Whether there is time for what may take so long; if not, the log says so."""
        if self.left() >= seconds:
            return True
        left = max(self.left(), 0)
        self.say(f"left out for want of time: {what}: it may take {seconds:.0f} s, {left:.0f} s are left")
        return False

    def row(self, *args: Any, **kwargs: Any) -> float:
        value = super().row(*args, **kwargs)
        self.say(shown(self.rows[-1]))
        self.save(self.folder)
        return value


# --- bits ------------------------------------------------------------------------------------------------------------


def bits(session: Session) -> None:
    """Noise and whole runs: the numbers in which this device differs from a CPU."""

    def compare(what: str, ours: Callable[[], Tensor], theirs: Tensor) -> None:
        with session.guarded(what):
            x = ours().cpu()
            differ = int((x != theirs).sum())
            session.row("gpu ops", what, x.numel(), "numbers unlike the reference's", [differ])
            apart = float((x - theirs).abs().max())
            assert not differ, f"{differ} of {x.numel():,} numbers differ, by {apart:.3g} at most"

    normal = functools.partial(fastdiff.normal, 1000, (1000,), seed=7, draw=3)
    ours = functools.partial(normal, backend=session.backend, device=session.device)
    compare(f"FDN1 normals, {session.backend}", ours, normal(backend="reference", device="cpu"))
    given = {"shape": (3, 16, 16), "num_samples": 16, "prediction": "x0", "seed": 7, "progress": False}
    # a network of products alone, whose bits are the same on every device
    pointwise = lambda x, t: x * (0.5 * t + 0.25).view(-1, 1, 1, 1)  # noqa: E731
    langevin = samplers.PredictorCorrector(corrector="langevin", norm="sample")
    for sde, name, sampler in (("vp", *["euler_maruyama"] * 2), ("ve", "langevin", langevin), ("vp", *["heun"] * 2)):
        run = functools.partial(fastdiff.sample, pointwise, sde, 100, sampler=sampler, **given)
        theirs = run(device="cpu", backend="reference")
        for engine in ("eager", "graph") if session.cuda else ("eager",):
            ours = functools.partial(run, device=session.device, engine=engine)
            compare(f"sample(), {sde} {name}, {session.backend}, {engine}", ours, theirs)


# --- operations ------------------------------------------------------------------------------------------------------


def roofline(session: Session) -> None:
    """Each operation by size: microseconds, bytes a second, percent of what a copy reaches, ratios to eager and compiled.

    Small sizes lie in the cache, as they do in a sampler's loop, and may pass what a copy of the memory reaches.
    """
    module, source = (
        ops.backend_module(session.backend),
        torch.randn(2 ** (18 if session.quick else 28)).to(session.device),
    )
    target = torch.empty_like(source)
    times = turns({"copy": session.watch.batches(lambda: target.copy_(source))}, 0.5)["copy"]
    copied = session.row("gpu ops", "copy_", source.numel(), "GB/s", [2 * source.nbytes / time / 1e3 for time in times])
    for n in QUICK_SIZES if session.quick else SIZES:
        oracle = reference if n <= EXACT else cpu
        if oracle is cpu and not cpu.available:
            session.say(f"left out: n = {n:,}, for want of the compiled library to check it against")
            return
        t = operations.tensors(n, session.device, SAMPLES)
        on_cpu = {name: value.detach().to(CPU, copy=True) for name, value in t.items()}
        for op in OPS:
            if not session.has_time(2, f"{op.name}, n = {n:,}"):
                return
            with session.guarded(f"n = {n:,}"):
                operations.check_bits(op, module, t, oracle, on_cpu)
                measure(op, n, module, t, copied, session)


def measure(op: Op, n: int, module: ModuleType, t: Tensors, copied: float, session: Session) -> None:
    runs: dict[str, Run] = {"ours": lambda: op.ours(module, t), op.called: op.eager(t)}
    if op.compiled and session.quick:
        session.say(f"left out of a quick run: torch.compile of {op.name}")
    elif op.compiled and session.has_time(COMPILATION, f"torch.compile of {op.name}, n = {n:,}"):
        torch.compiler.reset()  # what other sizes have taught it
        runs["torch.compile of eager"] = op.torch_compile(t)
    for name in list(runs)[1:]:
        with session.guarded(f"n = {n:,}"):
            operations.check_meaning(op, runs["ours"], name, runs[name])
            continue
        del runs[name]
    kinds = {"us": (runs, 1)}
    if session.cuda and n <= LAUNCHED and op.oracle is None:  # autograd is not captured
        graph = {name: replayed(run, CALLS, session.device) for name, run in runs.items()}
        kinds["us in a graph"] = (graph, CALLS)
    for metric, (systems, calls) in kinds.items():
        clocks = {name: session.watch.batches(run, calls) for name, run in systems.items()}
        times = turns(clocks, 0.05 if session.quick else 0.4)
        for name in list(systems)[1:]:
            session.row("gpu ops", op.name, n, metric, times["ours"], name, times[name])
    rates = [op.bytes * n / time / 1e3 for time in times["ours"]]  # of the last kind, in which launching counts least
    session.row("gpu ops", op.name, n, "GB/s", rates)
    session.row("gpu ops", op.name, n, "percent of copy", [100 * rate / copied for rate in rates])


# --- loops -----------------------------------------------------------------------------------------------------------


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


class Function(nn.Module):
    """A function as a module, whose graphs are kept from one run to the next."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(x, t)


class Contest:
    """A loop's subject in one dtype, and what runs it."""

    def __init__(self, loop: Loop, dtype: torch.dtype, session: Session) -> None:
        self.loop, self.session = loop, session
        batch = None if session.quick else loop.batch
        self.subject = Subject(loop.case, "vp", device=session.device, dtype=dtype, batch=batch)
        net = self.subject.network()
        self.net = net if isinstance(net, nn.Module) else Function(net)
        self.steps = 10 if session.quick else loop.steps
        shape = "x".join(map(str, self.subject.shape))
        self.name, self.n = f"{loop.case.rsplit(' ', 1)[0]} {shape} {str(dtype)[6:]}", self.subject.start.numel()

    def ours(self, steps: int, **options: Any) -> Run:
        return self.subject.ours(self.net, **PEERS[0].options(steps), **options)

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        """The network as a loop of float32 states calls it."""
        return self.net(x.to(self.subject.dtype), t).float()  # type: ignore[no-any-return]

    def eager(
        self, steps: int, net: Callable[[Tensor, Tensor], Tensor] | None = None, before: Run = lambda: None
    ) -> Run:
        """A scheduler's loop in plain PyTorch: each step's numbers are Python's, its tensors are new."""
        net, start = net or self.call, self.subject.start
        table = fastdiff.plan("vp", steps, sampler="euler_maruyama", grid="score_sde", prediction="eps")
        rows = [(row.network_time, row.a + row.b[0] * row.p, row.b[0] * row.q, row.c) for row in table.rows]

        @torch.no_grad()
        def run() -> Tensor:
            x = start
            for t, a, b, c in rows:
                before()
                m = net(x, torch.full((len(x),), t, device=x.device))
                x = a * x + b * m + (c * torch.randn_like(x) if c else 0.0)
            return x

        return run

    def compiled(self) -> Callable[[int], Run]:
        """The eager loop around a network whose kernels and CUDA graphs are torch.compile's."""
        net = torch.compile(self.call, mode="reduce-overhead", dynamic=False)
        # an answer is used up before the next call overwrites it, so that no copy is needed
        return lambda steps: self.eager(steps, net, torch.compiler.cudagraph_mark_step_begin)

    def check(self, name: str, build: Callable[[int], Any]) -> None:
        """The same noise gives the same samples but for roundings: of float32, or of the networks' products where those are in
        bfloat16 or TF32, which a difference in the last bit of the input can turn."""
        steps = min(CHECKED, self.steps)
        run = build(steps)
        run()  # compiles, with what noise it likes
        apart = self.subject.distance(self.net, PEERS[0].options(steps), run)
        rough = self.subject.dtype == torch.bfloat16 or self.session.cuda
        limit = 2**-8 if rough and not isinstance(self.net, Function) else 1e-5
        assert apart <= limit, f"{name} gives other samples, {apart:.2g} apart: not timed"

    def alone(self) -> Callable[[], float]:
        """A measurement of the network by itself, as our loop calls it: on a GPU by graphs of several calls."""
        start = self.subject.start
        x, t = start.to(self.subject.dtype), torch.full((len(start),), 0.5, device=start.device)
        features = {"features": self.net.time_features(t[:1])} if isinstance(self.net, TimeConditioned) else {}
        call = torch.no_grad()(lambda: self.net(x, t, **features))
        calls, watch = 2 if self.loop.large else 10, self.session.watch
        return watch.batches(replayed(call, calls, start.device), calls) if watch.cuda else watch.batches(call)

    def against(self, runs: dict[str, Run], seconds: float, **more: Callable[[], float]) -> dict[str, list[float]]:
        """The runs in turns, ours first, and a row for each opponent."""
        for run in runs.values():
            run()
        clocks = {name: lambda run=run: self.session.watch.whole(run) / self.steps for name, run in runs.items()}
        times = turns({**clocks, **more}, seconds, most=15)
        for name in list(runs)[1:]:
            ratio = self.session.row("gpu loops", self.name, self.n, "us per step", times["ours"], name, times[name])
            if self.loop.promised and name in PROMISED and self.session.cuda:
                kept = "kept" if ratio >= PROMISED[name] else "MISSED"
                self.session.say(f"    promised: at least {PROMISED[name]:g}x: {kept}")
        return times

    def against_eager(self) -> None:
        session, engine, builds = self.session, "eager", {}
        if session.cuda:
            engine = "graph"
            a, b, c = (self.ours(min(CHECKED, self.steps), engine=name)() for name in ("graph", "eager", "eager"))
            repeats = "repeats" if torch.equal(b, c) else "does not repeat"
            apart = float((a - b).abs().max())
            assert torch.equal(a, b), (
                f"the graph engine's samples are {apart:.3g} apart from the eager engine's (which {repeats} its own): not timed"
            )
            builds["fastdiff's eager engine"] = lambda steps: self.ours(steps, engine="eager")
        opponents: dict[str, Callable[[int], Any]] = {EAGER: self.eager}
        for peer in PEERS:
            if not peers.missing(peer.opponent):
                opponents[peer.opponent] = lambda steps, peer=peer: peer.build(self.call, self.subject.start, steps)
        for name, build in opponents.items():
            with session.guarded(self.name):
                self.check(name, build)
                builds[name] = build
        runs = {
            "ours": self.ours(self.steps, engine=engine),
            **{name: build(self.steps) for name, build in builds.items()},
        }
        if session.cuda and EAGER in runs:
            held = [[peak(runs[name])] for name in ("ours", EAGER)]
            session.row("gpu loops", self.name, self.n, "peak MiB", held[0], EAGER, held[1])
        times = self.against(runs, 0.0 if session.quick else 6.0, network=self.alone())
        outside = [whole - network for whole, network in zip(times["ours"], times["network"])]
        share = [100 * part / whole for part, whole in zip(outside, times["ours"])]
        for metric, values in (
            ("us of the network alone", times["network"]), ("us outside the network per step", outside),
            ("percent of a step outside the network", share),
        ):  # fmt: skip
            session.row("gpu loops", self.name, self.n, metric, values)
        if self.loop.large and session.cuda:
            kept = "kept" if statistics.median(share) <= OUTSIDE else "MISSED"
            session.say(f"    promised: at most {OUTSIDE:g} % outside the network: {kept}")

    def against_compiled(self) -> None:
        torch.compiler.reset()
        build = self.compiled()
        self.check(COMPILED, build)
        self.against({"ours": self.ours(self.steps, engine="graph"), COMPILED: build(self.steps)}, 3.0)


def loops(session: Session) -> None:
    """Each case against the eager loops and the compiled one, which takes long to compile."""
    if session.cuda:
        torch.set_float32_matmul_precision("high")
        session.say(f"float32 products as TF32: cuBLAS yes, cuDNN {'yes' if torch.backends.cudnn.allow_tf32 else 'no'}")
    for reason in filter(None, (peers.missing(peer.opponent) for peer in PEERS)):
        session.say(f"left out: {reason}")
    kinds = [Contest.against_eager, Contest.against_compiled]
    if session.quick or not session.cuda:
        kinds.remove(Contest.against_compiled)
        session.say("left out of a quick run, and without a GPU: the compiled loops, and the large network if quick")
    cases: Sequence[Loop] = SMALL if session.quick else FULL
    dtypes = (torch.float32, torch.bfloat16)
    jobs = [(kind, loop, dtype) for dtype in dtypes for kind in kinds for loop in cases if dtype in loop.dtypes]
    compiles = Contest.against_compiled
    jobs.sort(key=lambda job: job[0] is compiles and job[1].large)  # last what takes longest
    for kind, loop, dtype in jobs:
        what = f"{loop.case}, {str(dtype)[6:]}" + (f", {COMPILED}" if kind is compiles else "")
        if session.has_time(loop.compilation if kind is compiles else loop.seconds, what):
            with session.guarded(what):
                kind(Contest(loop, dtype, session))


def peak(run: Run) -> float:
    """MiB that a first run, captures included, holds at once beyond what was held before."""
    graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
