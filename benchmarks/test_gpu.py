"""What a GPU is asked: a CPU's bits, each operation against the memory, whole runs against eager and compiled loops.

Whole runs are VP Euler–Maruyama on the same rows, with the same network object; a network in bfloat16 is called in bfloat16 and
answers to float32 states. Products may use TF32, for all alike. With --quick, small numbers on whatever device.
"""

import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import operations
import peers
import pytest
import torch
from cases import CPU, Own, Subject
from recorder import Run, Stopwatch, replayed, turns
from torch import Tensor, nn

import fastdiff
from fastdiff import samplers
from fastdiff.execution import cpu, graphs, ops, reference
from fastdiff.networks.layers import TimeConditioned

pytestmark = pytest.mark.filterwarnings("ignore")  # the opponents', and the compiler's

SIZES = (8_192, 196_608, 16_777_216, 67_108_864)
SAMPLES = 64
LAUNCHED = 196_608  # up to here the launch takes longer than the kernel, so that a graph of CALLS is timed, too
CALLS = 20
EXACT = 2**20  # numbers that the reference can be asked for; for more, the compiled library, which has its bits
CHECKED = 50  # steps
EAGER, COMPILED, ENGINE = "eager loop", "reduce-overhead loop", "fastdiff's eager engine"
PROMISED = {EAGER: 5.0, COMPILED: 1.5}  # how many times our speed; of the large network at most 2 % outside of it
PEERS = [p for p in peers.PEERS if p.sampler == "VP Euler-Maruyama" and p.exact and not p.from_prior]


class Gpu:
    def __init__(self, config: pytest.Config) -> None:
        self.device, self.quick = torch.device(config.getoption("device")), config.getoption("quick")
        self.cuda = self.device.type == "cuda"
        self.watch = Stopwatch(self.device)
        self.backend = ops.resolve("auto", "eager", self.device, torch.float32)[0]
        self.module = ops.backend_module(self.backend)
        if self.cuda:
            torch.set_float32_matmul_precision("high")

    def only(self, small: bool, cuda: bool = False) -> None:
        """Skip what is too large for a quick run, or needs a CUDA device."""
        if self.quick and not small:
            pytest.skip("left out of a quick run")
        if cuda and not self.cuda:
            pytest.skip("left out without a CUDA device")


@pytest.fixture(scope="module")
def gpu(request: pytest.FixtureRequest) -> Gpu:
    return Gpu(request.config)


def pointwise(x: Tensor, t: Tensor) -> Tensor:
    """A network of products alone, whose bits are the same on every device."""
    return x * (0.5 * t + 0.25).view(-1, 1, 1, 1)


SAMPLE = functools.partial(
    fastdiff.sample, pointwise, steps=100, shape=(3, 16, 16), num_samples=16, prediction="x0", seed=7, progress=False
)
LANGEVIN = samplers.PredictorCorrector(corrector="langevin", norm="sample")
NUMBERS = {
    "FDN1 normals": functools.partial(fastdiff.normal, 1000, (1000,), seed=7, draw=3),
    "sample(), vp euler_maruyama": functools.partial(SAMPLE, sde="vp", sampler="euler_maruyama"),
    "sample(), ve langevin": functools.partial(SAMPLE, sde="ve", sampler=LANGEVIN),
    "sample(), vp heun": functools.partial(SAMPLE, sde="vp", sampler="heun"),
}


@pytest.mark.takes(10)
@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("name", NUMBERS)
def test_bits(gpu, recorder, name, engine):
    gpu.only(small=True, cuda=engine == "graph")
    given = {} if name == "FDN1 normals" else {"engine": engine}
    x = NUMBERS[name](device=gpu.device, **given).cpu()
    expected = NUMBERS[name](device="cpu", backend="reference")
    differ = int((x != expected).sum())
    case = f"{name}, {', '.join([gpu.backend, *given.values()])}"
    recorder.row("gpu ops", case, x.numel(), "numbers unlike the reference's", [differ])
    assert not differ, f"by {float((x - expected).abs().max()):.3g} at most"


@pytest.fixture(scope="module")
def copied(gpu, recorder) -> float:
    """GB/s of a copy. Small sizes lie in the cache, as they do in a sampler's loop, and may pass it."""
    source = torch.randn(2 ** (18 if gpu.quick else 28)).to(gpu.device)
    target = torch.empty_like(source)
    times = turns({"copy": gpu.watch.batches(lambda: target.copy_(source))}, 0.5)["copy"]
    return recorder.row("gpu ops", "copy_", source.numel(), "GB/s", [2 * source.nbytes / time / 1e3 for time in times])


@functools.lru_cache(maxsize=1)
def tensors(n: int, device: torch.device) -> tuple[operations.Tensors, operations.Tensors]:
    """What the operations read and write, there and on the CPU."""
    t = operations.tensors(n, device, SAMPLES)
    return t, {name: value.detach().to(CPU, copy=True) for name, value in t.items()}


@pytest.mark.takes(10)
@pytest.mark.parametrize("op", operations.OPS, ids=[op.name for op in operations.OPS])
@pytest.mark.parametrize("n", SIZES)
def test_operation(gpu, recorder, copied, op, n):
    """Microseconds, bytes a second, percent of what a copy reaches, ratios to eager and compiled."""
    gpu.only(small=n == SIZES[0])
    if n > EXACT and not cpu.available:
        pytest.skip("left out, for want of the compiled library to check it against")
    t, on_cpu = tensors(n, gpu.device)
    torch.compiler.reset()  # what other sizes have taught it
    compiled = {operations.COMPILED: {}} if op.compiled and not gpu.quick else {}
    oracle = reference if n <= EXACT else cpu
    runs = operations.contestants(op, gpu.module, t, oracle, on_cpu, compiled)
    kinds = {"us": (runs, 1)}
    if gpu.cuda and n <= LAUNCHED and op.oracle is None:  # autograd is not captured
        kinds["us in a graph"] = ({name: replayed(run, CALLS, gpu.device) for name, run in runs.items()}, CALLS)
    for metric, (systems, calls) in kinds.items():
        clocks = {name: gpu.watch.batches(run, calls) for name, run in systems.items()}
        times = turns(clocks, 0.05 if gpu.quick else 0.4)
        recorder.pairs("gpu ops", op.name, n, metric, times)
    rates = [op.bytes * n / time / 1e3 for time in times["ours"]]  # of the last kind, in which launching counts least
    recorder.row("gpu ops", op.name, n, "GB/s", rates)
    recorder.row("gpu ops", op.name, n, "percent of copy", [100 * rate / copied for rate in rates])


@pytest.mark.takes(20)
def test_profile(gpu, recorder):
    """The kernels of a run of the MLP, and the step's own time, as the device's profiler sees them."""
    from torch.profiler import ProfilerActivity, supported_activities

    wanted = ProfilerActivity.CUDA if gpu.cuda else ProfilerActivity.CPU
    if wanted not in supported_activities():
        pytest.skip(f"left out: this torch's profiler does not see {wanted.name}")
    c, n, op = Contest(LOOPS[0], torch.float32, gpu), SIZES[0 if gpu.quick else 2], operations.OPS[2]
    t, _ = tensors(n, gpu.device)

    for name, run, times in (
        (f"{c.name}, 100 rows", c.run(100), 1), (f"{op.name}, 20 times", lambda: op.ours(gpu.module, t), 20),
    ):  # fmt: skip
        gpu.watch.whole(run)
        with torch.profiler.profile(activities=[wanted]) as seen:
            gpu.watch.whole(run, times)
        by = "self_device_time_total" if gpu.cuda else "self_cpu_time_total"
        table = seen.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=60)
        print(f"{name}\n{table if seen.key_averages() else 'the profiler saw nothing of it'}")
    for event in seen.key_averages():
        if "step_kernel" in event.key:
            each = event.self_device_time_total / event.count
            recorder.row("gpu ops", op.name, n, "us of the kernel alone (CUPTI)", [each])


class Loop(NamedTuple):
    """A case and how to run it here."""

    case: str
    batch: int
    steps: int
    seconds: float  # that an opponent may take
    compilation: float  # the same where it is compiled
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    large: bool = False


LOOPS = (
    Loop("MLP 256x2", 256, 1000, 4, 20),
    Loop("demo U-Net 16x1x8x8", 16, 1000, 15, 50),
    Loop("analytic 64x3x32x32", 64, 1000, 4, 15, (torch.float32,)),  # which has no dtype of its own
    Loop("U-Net 35.4M 2x3x32x32", 64, 50, 10, 120, large=True),
)


class Contest(Subject):
    """A loop's network, start and noise in one dtype, and who runs them."""

    def __init__(self, loop: Loop, dtype: torch.dtype, gpu: Gpu) -> None:
        super().__init__(loop.case, "vp", device=gpu.device, dtype=dtype, batch=None if gpu.quick else loop.batch)
        net = self.network()
        self.net = net if isinstance(net, nn.Module) else Own(net)  # a module's graphs are kept
        self.engine, self.steps = "graph" if gpu.cuda else "eager", 10 if gpu.quick else loop.steps
        self.name = f"{loop.case.rsplit(' ', 1)[0]} {'x'.join(map(str, self.shape))} {str(dtype)[6:]}"
        # of the same samples: float32's roundings, or those of the networks' products where these are in bfloat16 or TF32,
        # which a difference in the last bit of the input can turn
        rough = (dtype == torch.bfloat16 or gpu.cuda) and not isinstance(self.net, Own)
        self.tolerance = 2**-8 if rough else 1e-5

    def run(self, steps: int, engine: str = "") -> Run:
        return self.ours(self.net, **PEERS[0].options(steps), engine=engine or self.engine)

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        """The network as a loop of float32 states calls it."""
        return self.net(x.to(self.dtype), t).float()

    def theirs(self, opponent: str) -> Run:
        """Their run, whose samples of fewer steps are ours."""
        few = min(CHECKED, self.steps)
        if opponent == ENGINE:
            a, b, c = (self.run(few, engine)() for engine in (self.engine, "eager", "eager"))
            apart = f"{float((a - b).abs().max()):.3g} apart, eager and itself {float((b - c).abs().max()):.3g}"
            assert torch.equal(a, b), f"the engines are {apart}: not timed"
            return self.run(self.steps, "eager")
        if opponent == COMPILED:  # the eager loop around a network whose kernels and CUDA graphs are torch.compile's
            torch.compiler.reset()
            net = torch.compile(self.call, mode="reduce-overhead", dynamic=False)
            # an answer is used up before the next call overwrites it, so that no copy is needed
            before = torch.compiler.cudagraph_mark_step_begin
            build = functools.partial(peers.eager, net, self.start, before=before)
        else:
            made = {EAGER: peers.eager, **{peer.opponent: peer.build for peer in PEERS}}[opponent]
            build = functools.partial(made, self.call, self.start)
        run = build(few)
        run()  # compiles, with what noise it likes
        apart = self.distance(self.net, PEERS[0].options(few), run)
        assert apart <= self.tolerance, f"{opponent} gives other samples, {apart:.2g} apart: not timed"
        return build(self.steps)

    def alone(self, watch: Stopwatch, calls: int) -> Callable[[], float]:
        """A measurement of the network by itself, as our loop calls it: on a GPU by graphs of several calls."""
        x, t = self.start.to(self.dtype), torch.full((len(self.start),), 0.5, device=self.device)
        features = {"features": self.net.time_features(t[:1])} if isinstance(self.net, TimeConditioned) else {}
        call = torch.no_grad()(lambda: self.net(x, t, **features))
        return watch.batches(replayed(call, calls, x.device), calls) if watch.cuda else watch.batches(call)


contest = functools.lru_cache(maxsize=1)(Contest)


def jobs() -> Iterator[Any]:
    """One opponent after another, first all that compile nothing; last what takes longest."""
    opponents = [ENGINE, EAGER, *(peer.opponent for peer in PEERS), COMPILED]
    found = [(o, loop, dtype) for loop in LOOPS for dtype in loop.dtypes for o in opponents]
    for opponent, loop, dtype in sorted(found, key=lambda job: (job[0] == COMPILED, job[1].large)):
        takes = pytest.mark.takes(loop.compilation if opponent == COMPILED else loop.seconds)
        yield pytest.param(opponent, loop, dtype, marks=takes, id=f"{loop.case}-{str(dtype)[6:]}-{opponent}")


@pytest.mark.parametrize(("opponent", "loop", "dtype"), list(jobs()))
def test_loop(gpu, recorder, opponent, loop, dtype):
    gpu.only(small=not loop.large, cuda=opponent in (ENGINE, COMPILED))
    reason = peers.missing(opponent)
    if reason:
        pytest.skip(f"left out: {reason}")
    c = contest(loop, dtype, gpu)
    row = functools.partial(recorder.row, "gpu loops", c.name, c.start.numel())
    runs = {"ours": c.run(c.steps), opponent: c.theirs(opponent)}
    if opponent == EAGER and gpu.cuda:
        row("peak MiB", [peak(runs["ours"])], EAGER, [peak(runs[EAGER])])
    clocks = {name: lambda run=run: gpu.watch.whole(run) / c.steps for name, run in runs.items()}
    if opponent == EAGER:
        clocks["network"] = c.alone(gpu.watch, 2 if loop.large else 10)
    for run in runs.values():
        run()
    times = turns(clocks, 0.0 if gpu.quick else 3.0 if opponent in (EAGER, COMPILED) else 1.0, most=15)
    ratio = row("us per step", times["ours"], opponent, times[opponent])
    if opponent in PROMISED:
        print(f"    {ratio:.2f}x, promised of small networks: at least {PROMISED[opponent]:g}x")
    if opponent == EAGER:
        outside = [whole - network for whole, network in zip(times["ours"], times["network"])]
        row("us of the network alone", times["network"])
        row("us outside the network per step", outside)
        row("percent of a step outside the network", [100 * a / b for a, b in zip(outside, times["ours"])])


def peak(run: Run) -> float:
    """MiB that a first run, captures included, holds at once beyond what was held before."""
    graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
