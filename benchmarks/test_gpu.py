"""What a GPU is asked: a CPU's bits, each operation against the memory, whole runs against eager and compiled loops.

Whole runs are VP Euler–Maruyama on the same rows, with the same network object; a network in bfloat16 is called in bfloat16 and
answers to float32 states. Products may use TF32, for all alike. With --quick, small numbers on whatever device. Each test has the
mark of a part of gpu.py. A `promise` that is missed fails nothing, and is in gpu.py's verdict.
"""

import functools
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import nvidia
import operations
import peers
import predictions
import pytest
import torch
import torch.nn.functional as F
import unets
from cases import CPU, Own, Subject
from recorder import Run, Stopwatch, replayed, turns
from torch import Tensor, nn

import fastdiff
from fastdiff import networks, samplers
from fastdiff.errors import GraphError
from fastdiff.execution import cpu, fused, graphs, ops, reference, verify
from fastdiff.execution.noise import PRIOR
from fastdiff.networks import MLP, UNet
from fastdiff.networks.layers import TimeConditioned

pytestmark = pytest.mark.filterwarnings("ignore")  # the opponents', and the compiler's

LARGE = predictions.LARGE
SIZES = (LARGE, 8_192, 196_608, 67_108_864)  # in the order of what they tell
SAMPLES = 64
# up to here a graph of CALLS is timed too: beyond 196,608 numbers, because kernels of a few reads are done before the next
# call is launched; larger ones take longer than any launch
LAUNCHED = LARGE
CALLS = 20  # in one graph, and while the profiler looks
EXACT = 2**20  # numbers that the reference can be asked for; for more, the compiled library, which has its bits
CHECKED = 50  # steps
EAGER, COMPILED, ENGINE = "eager loop", "reduce-overhead loop", "fastdiff's eager engine"
EAGER_STEPS = "fastdiff's eager steps"
WARM = 10  # steps of a training before the first that counts, the capture among them
OURS_COMPILED = "fastdiff, torch.compile(net)"  # in mode "default", captured as any network is
OF_A_COPY, OUTSIDE = (
    90,
    2,
)  # percent: at least, of a copy's speed, by a step; at most, of a large network's run, outside of it
PEERS = [p for p in peers.PEERS if p.sampler == "VP Euler-Maruyama" and p.exact and not p.from_prior]


class Gpu:
    def __init__(self, config: pytest.Config) -> None:
        self.device, self.quick = torch.device(config.getoption("device")), config.getoption("quick")
        self.watch = Stopwatch(self.device)
        self.cuda = self.watch.cuda
        self.calls = 2 if self.quick else CALLS
        # by name: "auto" would go on without the kernels
        wanted = "triton" if self.device.type == "cuda" else "auto"
        self.backend = ops.resolve(wanted, "eager", self.device, torch.float32)[0]
        self.module = ops.backend_module(self.backend)
        if self.device.type == "cuda":
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


@pytest.fixture
def promise(gpu: Gpu, record_property: Callable[[str, str], None]) -> Callable[[bool, str], None]:
    """Note whether a promised speed was held, and a sentence of it; of a quick run the sentence alone."""
    return lambda held, text: record_property("tried" if gpu.quick else "held" if held else "missed", text)


def pointwise(x: Tensor, t: Tensor) -> Tensor:
    """A network of products alone, whose bits are the same on every device."""
    return x * (0.5 * t + 0.25).view(-1, 1, 1, 1)


SAMPLE = functools.partial(
    fastdiff.sample, pointwise, steps=100, shape=(3, 16, 16), num_samples=16, prediction="x0", seed=7, progress=False
)
LANGEVIN = samplers.PredictorCorrector(corrector="langevin", norm="sample")
RUNS = {
    "sample(), vp euler_maruyama": functools.partial(SAMPLE, sde="vp", sampler="euler_maruyama"),
    "sample(), ve langevin": functools.partial(SAMPLE, sde="ve", sampler=LANGEVIN),
    "sample(), vp heun": functools.partial(SAMPLE, sde="vp", sampler="heun"),
}


@pytest.mark.bits
@pytest.mark.takes(10)
def test_normals(gpu, recorder):
    """The bits of FDN1."""
    made = []
    for module, device in ((gpu.module, gpu.device), (reference, CPU)):
        made.append(torch.empty(1000, 1000, device=device))
        module.normal(made[-1], ops.cursor(3, 0, 7, device), PRIOR)
    same_bits(recorder, f"FDN1 normals, {gpu.backend}", *made)


@pytest.mark.bits
@pytest.mark.takes(10)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_run(gpu, recorder, name, engine):
    """The bits of whole runs, by the kernels and the engine that are named, and by no others."""
    gpu.only(small=True, cuda=engine == "graph")
    x, info = RUNS[name](device=gpu.device, backend=gpu.backend, engine=engine, return_info=True)
    assert (info.backend, info.engine) == (gpu.backend, engine), info.why
    same_bits(recorder, f"{name}, {gpu.backend}, {engine}", x, RUNS[name](device="cpu", backend="reference"))


def same_bits(recorder, case, x, expected):
    x = x.cpu()
    differ = int((x != expected).sum())
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


ALL = (*operations.OPS, *operations.OTHERS)


@pytest.mark.operations
@pytest.mark.takes(10)
@pytest.mark.parametrize("op", ALL, ids=[op.name for op in ALL])
@pytest.mark.parametrize("n", SIZES)
def test_operation(gpu, recorder, promise, copied, op, n):
    """Microseconds, bytes a second, percent of what a copy reaches, ratios to eager and compiled."""
    gpu.only(small=n == min(SIZES))
    if n > EXACT and not cpu.available:
        pytest.skip("left out, for want of the compiled library to check it against")
    t, on_cpu = tensors(n, gpu.device)
    compiled = {}
    if op.compiled and not gpu.quick:
        torch.compiler.reset()  # what other sizes have taught it
        compiled = {operations.COMPILED: {}}
    oracle = reference if n <= EXACT else cpu
    runs = operations.contestants(op, gpu.module, t, oracle, on_cpu, compiled)
    kinds = {"us": (runs, 1)}
    if gpu.cuda and n <= LAUNCHED and op.oracle is None:  # autograd is not captured
        kinds["us in a graph"] = (in_graphs(runs, gpu.calls, gpu.device), gpu.calls)
    for metric, (systems, calls) in kinds.items():
        clocks = {name: gpu.watch.batches(run, calls) for name, run in systems.items()}
        times = turns(clocks, 0.02 if gpu.quick else 0.4)
        recorder.pairs("gpu ops", op.name, n, metric, times)
    rates = [op.bytes * n / time / 1e3 for time in times["ours"]]  # of the last kind, in which launching counts least
    recorder.row("gpu ops", op.name, n, "GB/s", rates)
    percent = recorder.row("gpu ops", op.name, n, "percent of copy", [100 * rate / copied for rate in rates])
    if (op.name, n) == ("step", LARGE):
        promise(percent >= OF_A_COPY, f"step, {n:,} numbers: {percent:.0f} % of a copy's speed, at least {OF_A_COPY} %")


def in_graphs(runs: dict[str, Run], calls: int, device: torch.device) -> dict[str, Run]:
    """So many calls of each as one graph, but for opponents that cannot be captured."""
    graphs_of = {}
    for name, run in runs.items():
        try:
            graphs_of[name] = replayed(run, calls, device)
        except GraphError as error:
            if name == "ours":
                raise
            print(f"    {name} cannot be captured: {error}")
    return graphs_of


@pytest.mark.profile
@pytest.mark.takes(20)
def test_profile(gpu, recorder):
    """The kernels of a run of the MLP, and some operations' own times, as the device's profiler sees them."""
    from torch.profiler import ProfilerActivity, supported_activities

    wanted = ProfilerActivity.CUDA if gpu.cuda else ProfilerActivity.CPU
    if wanted not in supported_activities():
        pytest.skip(f"left out: this torch's profiler does not see {wanted.name}")
    c, n = Contest(LOOPS[0], torch.float32, gpu), min(SIZES) if gpu.quick else LARGE
    t, _ = tensors(n, gpu.device)
    named = {op.name: op for op in ALL}
    seen_of = {f"{c.name}, {c.steps} rows": (c.run(c.steps), 1)}
    for name in ("step, bf16 network", "probe_dot alone, normal", "dsm_loss"):
        seen_of[name] = (lambda op=named[name]: op.ours(gpu.module, t)), gpu.calls
    for name, (run, calls) in seen_of.items():
        gpu.watch.whole(run)
        with torch.profiler.profile(activities=[wanted]) as seen:
            gpu.watch.whole(run, calls)
        by, events = "self_device_time_total" if gpu.cuda else "self_cpu_time_total", seen.key_averages()
        table = events.table(sort_by=by, row_limit=12, max_name_column_width=60) if events else "nothing was seen"
        print(f"{name}, {calls} times\n{table}")
        if gpu.cuda and events and name in named:
            each = sum(event.self_device_time_total for event in events) / calls
            recorder.row("gpu ops", name, n, predictions.ALONE, [each])


class Loop(NamedTuple):
    """A case and how to run it here.

    seconds, compilation  that an opponent may take, and one that is compiled
    """

    case: str
    batch: int
    steps: int
    seconds: float
    compilation: float
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    large: bool = False


LOOPS = (
    Loop("MLP 256x2", 256, 1000, 4, 30),
    Loop("demo U-Net 16x1x8x8", 16, 1000, 15, 80),
    Loop("analytic 64x3x32x32", 64, 1000, 4, 25, (torch.float32,)),  # which has no dtype of its own
    Loop("U-Net 35.4M 2x3x32x32", 64, 50, 10, 200, large=True),
)
# How many times as fast as an opponent, at least: what was predicted at least, or less. Our graph replays the network's own
# kernels; torch.compile fuses those of a deep network to half as many, and there a graph of the compiled network keeps up.
PROMISED = {
    ("MLP 256x2", EAGER): 4.0, ("MLP 256x2", COMPILED): 2.0,
    ("demo U-Net 16x1x8x8", EAGER): 2.5, ("demo U-Net 16x1x8x8", COMPILED): 1.0,
}  # fmt: skip


class Contest(Subject):
    """A loop's network, start and noise in one dtype, and who runs them."""

    def __init__(self, loop: Loop, dtype: torch.dtype, gpu: Gpu) -> None:
        super().__init__(loop.case, "vp", device=gpu.device, dtype=dtype, batch=None if gpu.quick else loop.batch)
        net = self.network()
        self.net = net if isinstance(net, nn.Module) else Own(net)  # a module's graphs are kept
        self.engine, self.steps = "graph" if gpu.cuda else "eager", 4 if gpu.quick else loop.steps
        self.name = f"{loop.case.rsplit(' ', 1)[0]} {'x'.join(map(str, self.shape))} {str(dtype)[6:]}"
        # of the same samples: float32's roundings, or those of the networks' products where these are in bfloat16 or TF32,
        # which a difference in the last bit of the input can turn
        rough = (dtype == torch.bfloat16 or gpu.cuda) and not isinstance(self.net, Own)
        self.tolerance = 2**-8 if rough else 1e-5

    def run(self, steps: int, engine: str = "", net: Any = None) -> Run:
        return self.ours(self.net if net is None else net, **PEERS[0].options(steps), engine=engine or self.engine)

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
            net = torch.compile(self.call, mode="reduce-overhead", dynamic=False)
            # an answer is used up before the next call overwrites it, so that no copy is needed
            before = torch.compiler.cudagraph_mark_step_begin
            build = functools.partial(peers.eager, net, self.start, before=before)
        else:
            made = {EAGER: peers.eager, **{peer.opponent: peer.build for peer in PEERS}}[opponent]
            build = functools.partial(made, self.call, self.start)
        run = build(few)
        run()  # compiles, with what noise it likes
        self.check_same(opponent, PEERS[0].options(few), run)
        return build(self.steps)

    def ours_compiled(self) -> Run:
        """Our run of the network as torch.compile fuses it, whose samples are those of the network."""
        net, few = torch.compile(self.net, dynamic=False), min(CHECKED, self.steps)
        x, y = self.run(few)(), self.run(few, net=net)()
        apart = float((x - y).abs().max() / x.abs().max())
        assert apart <= self.tolerance, f"{OURS_COMPILED} gives other samples, {apart:.2g} apart: not timed"
        return self.run(self.steps, net=net)

    def check_same(self, opponent: str, options: dict[str, Any], run: Run) -> None:
        apart = self.distance(self.net, options, run)
        assert apart <= self.tolerance, f"{opponent} gives other samples, {apart:.2g} apart: not timed"

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
        compiles = opponent == COMPILED
        part = "large" if compiles and loop.large else "bf16" if dtype == torch.bfloat16 else "loops"
        marks = [pytest.mark.takes(loop.compilation if compiles else loop.seconds), getattr(pytest.mark, part)]
        yield pytest.param(opponent, loop, dtype, marks=marks, id=f"{loop.case}-{str(dtype)[6:]}-{opponent}")


@pytest.mark.parametrize(("opponent", "loop", "dtype"), list(jobs()))
def test_loop(gpu, recorder, promise, opponent, loop, dtype):
    gpu.only(small=not loop.large, cuda=opponent in (ENGINE, COMPILED))
    reason = peers.missing(opponent)
    if reason:
        pytest.skip(f"left out: {reason}")
    if opponent == COMPILED:
        torch.compiler.reset()
    c = contest(loop, dtype, gpu)
    row = functools.partial(recorder.row, "gpu loops", c.name, c.start.numel())
    runs = {"ours": c.run(c.steps), opponent: c.theirs(opponent)}
    if opponent == COMPILED:
        runs[OURS_COMPILED] = c.ours_compiled()
    if opponent == EAGER and gpu.cuda:
        row("peak MiB", [peak(runs["ours"])], EAGER, [peak(runs[EAGER])])
    clocks = {name: lambda run=run: gpu.watch.whole(run) / c.steps for name, run in runs.items()}
    if opponent == EAGER:
        clocks["network"] = c.alone(gpu.watch, 2 if loop.large else 10)
    for run in runs.values():
        run()
    times = turns(clocks, 0.0 if gpu.quick else 3.0 if opponent in (EAGER, COMPILED) else 1.0, most=15)
    ratios = {"ours": row("us per step", times["ours"], opponent, times[opponent])}
    if opponent == COMPILED:
        row("us per step", times["ours"], OURS_COMPILED, times[OURS_COMPILED])
        other = f"{c.name}, torch.compile(net)"
        ratios[OURS_COMPILED] = recorder.row(
            "gpu loops", other, c.start.numel(), "us per step", times[OURS_COMPILED], opponent, times[opponent]
        )
    least = PROMISED.get((loop.case, opponent))
    if least is not None:
        best = max(ratios, key=ratios.get)
        by = "" if best == "ours" else f" by {best}"
        text = f"{c.name}: {ratios[best]:.2f} times as fast as the {opponent}{by}, at least {least:g}"
        promise(ratios[best] >= least, text)
    if opponent == EAGER:
        outside = [whole - network for whole, network in zip(times["ours"], times["network"])]
        row("us of the network alone", times["network"])
        row("us outside the network per step", outside)
        percent = row("percent of a step outside the network", [100 * a / b for a, b in zip(outside, times["ours"])])
        if loop.large:
            promise(percent <= OUTSIDE, f"{c.name}: {percent:.2f} % outside the network, at most {OUTSIDE} %")


class Training(NamedTuple):
    """A network to train, and how many steps one measurement takes."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    steps: int


TRAININGS = {
    "MLP 256x2": Training(functools.partial(MLP, (2,), hidden=128, layers=3), (2,), 256, 200),
    "demo U-Net 64x1x8x8": Training(functools.partial(UNet, (1, 8, 8), channels=32, blocks=1), (1, 8, 8), 64, 100),
    "U-Net 1.0M 64x1x28x28": Training(
        functools.partial(UNet, (1, 28, 28), channels=32, multipliers=(1, 2, 2), blocks=2, attention=(1,)),
        (1, 28, 28), 64, 50,
    ),
}  # fmt: skip


@pytest.mark.training
@pytest.mark.takes(12)
@pytest.mark.parametrize("name", TRAININGS)
def test_training_step(gpu, recorder, promise, name):
    """A step of fastdiff.train as CUDA graphs and eagerly, of equal weights; the capture and the steps before it left out."""
    gpu.only(small=name.startswith("MLP"), cuda=True)
    case = TRAININGS[name]
    batch, steps = (8, 4) if gpu.quick else (case.batch, case.steps)
    data = fastdiff.Data(torch.rand(8 * batch, *case.shape), range=(0, 1))

    def trained(engine: str) -> tuple[float, Tensor]:
        torch.manual_seed(0)
        model = fastdiff.ScoreModel(case.make().to(gpu.device), "vp", data_shape=case.shape, data_range=(0, 1))
        marks = []
        done = fastdiff.train(
            model, data, steps=WARM + steps, batch_size=batch, engine=engine, progress=False,
            stop=lambda: marks.append(time.perf_counter()),
        )  # fmt: skip
        assert done.engine == engine, done.why
        weights = torch.cat([p.detach().flatten() for p in model.net.parameters()])
        return (marks[-1] - marks[WARM - 1]) / steps * 1e6, weights

    apart = float((trained("graph")[1] - trained("eager")[1]).abs().max())
    recorder.row("gpu training", name, batch, "weights apart, graphs and eager steps", [apart])
    systems = {"ours": lambda: trained("graph")[0], EAGER_STEPS: lambda: trained("eager")[0]}
    times = turns(systems, 0.0 if gpu.quick else 3.0, least=3)
    ratio = recorder.pairs("gpu training", name, batch, "us per training step", times)[EAGER_STEPS]
    promise(
        ratio >= 1, f"training, {name}: {ratio:.2f} times as fast as eager steps, at least 1; weights {apart:.2g} apart"
    )


class Norm(NamedTuple):
    """Maps in 32 groups."""

    shape: tuple[int, ...]
    last: bool  # whether channels lie side by side
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        layout = ", channels last" if self.last else ""
        return f"group_norm + SiLU {'x'.join(map(str, self.shape))} {str(self.dtype)[6:]}{layout}"


NORMS = (
    *(
        Norm(shape, last)
        for shape in ((64, 256, 8, 8), (64, 128, 32, 32), (8, 128, 256, 256))
        for last in (True, False)
    ),
    *(Norm((64, 128, 32, 32), last, torch.float32) for last in (True, False)),
)
TORCH, UNOPTIMIZED = "torch's two operations", "the same network, not optimized"


@pytest.mark.networks
@pytest.mark.takes(6)
@pytest.mark.parametrize("case", NORMS, ids=str)
@torch.no_grad()
def test_group_norm(gpu, recorder, copied, case):
    """With scale and shift of each channel; against a copy, which reads each number once too, and writes it."""
    gpu.only(small=case.shape[-1] == 8)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in (case.shape, *[case.shape[1:2]] * 2))
    x, weight, bias = (v.to(gpu.device, case.dtype) for v in (x, weight, bias))
    x = x.to(memory_format=torch.channels_last) if case.last else x
    runs = {
        "ours": lambda: fused.group_norm(x, 32, weight, bias, 1e-6),
        TORCH: lambda: F.silu(F.group_norm(x, 32, weight, bias, 1e-6)),
    }
    exact = F.silu(F.group_norm(x[:2].double(), 32, weight.double(), bias.double(), 1e-6))
    apart = float((runs["ours"]()[:2] - exact).abs().max() / exact.abs().max())
    assert apart <= max(torch.finfo(case.dtype).eps, 1e-6), f"{apart:.2g} apart: not timed"
    if gpu.device.type == "cuda":
        assert fused.fusable(x, "triton")
        assert ops.kernels().group_norm_fits(x, 32)
        assert not verify.refusal(x.device)
    name, n = str(case), x.numel()
    times = turns({label: gpu.watch.batches(run) for label, run in runs.items()}, 0.02 if gpu.quick else 0.4)
    recorder.pairs("gpu networks", name, n, "us a call", times)
    if gpu.cuda:
        calls = in_graphs(runs, gpu.calls, gpu.device)
        clocks = {label: gpu.watch.batches(run, gpu.calls) for label, run in calls.items()}
        times = turns(clocks, 0.02 if gpu.quick else 0.4)
        recorder.pairs("gpu networks", name, n, "us a call in a graph", times)
    moved = 2 * x.nbytes
    recorder.row(
        "gpu networks", name, n, "percent of copy", [100 * moved / time / 1e3 / copied for time in times["ours"]]
    )


@pytest.mark.networks
@pytest.mark.takes(30)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_network(gpu, recorder, precision):
    """A call of DDPM's U-Net as fastdiff.optimize leaves it, against the same network and, where it is installed, diffusers' of
    the same weights, both eagerly and as graphs; of those in float32 with TF32, as ours."""
    gpu.only(small=precision == "fp32")
    batch, theirs = 2 if gpu.quick else 64, None
    if gpu.quick or peers.missing("diffusers"):
        smaller = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (1,)} if gpu.quick else {}
        network = unets.drawn(networks.ddpm(unets.SHAPE, **smaller))
    else:
        theirs, network = unets.of_diffusers()
        theirs = theirs.eval().to(gpu.device)
    model = fastdiff.ScoreModel(network.eval().to(gpu.device), "ddpm", "eps", "index", unets.SHAPE)
    made = fastdiff.optimize(model, precision=precision, batch_size=batch, verbose=False)
    print(made.optimized)
    dtype = next(made.net.parameters()).dtype
    x = torch.randn(batch, *unets.SHAPE, generator=torch.Generator().manual_seed(0)).to(gpu.device)
    narrow, t = x.to(dtype), torch.full((batch,), 500, device=gpu.device)
    runs = {"ours": lambda: made.net(narrow, t), UNOPTIMIZED: lambda: network(x, t)}
    if theirs is not None:
        runs["diffusers"] = lambda: theirs(x, t).sample
    exact = runs[UNOPTIMIZED]()
    for name, run in runs.items():
        apart = float((run().float() - exact).abs().max() / exact.abs().max())
        assert apart <= (0.1 if name == "ours" and dtype == torch.bfloat16 else 2**-8), (
            f"{name}: {apart:.2g} apart: not timed"
        )
    name = f"U-Net {sum(p.numel() for p in network.parameters()) / 1e6:.1f}M {batch}x3x32x32, {precision}"
    kinds = {"us a call": (runs, 1)}
    if gpu.cuda:
        kinds["us a call in a graph"] = in_graphs(runs, 2, gpu.device), 2
    for metric, (systems, calls) in kinds.items():
        clocks = {label: gpu.watch.batches(run, calls) for label, run in systems.items()}
        recorder.pairs("gpu networks", name, batch, metric, turns(clocks, 0.0 if gpu.quick else 2.0))


def peak(run: Run) -> float:
    """MiB that a first run, captures included, holds at once beyond what was held before."""
    graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@pytest.mark.sanitizer
@pytest.mark.takes(50)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(gpu, tool):
    gpu.only(small=True, cuda=True)
    try:
        nvidia.sanitize(tool, str(gpu.device), 45)
    except nvidia.Absent as error:
        pytest.skip(f"left out: {error}")


@pytest.mark.counters
@pytest.mark.takes(30)
def test_counters(gpu, recorder):
    """How busy a step keeps the schedulers and the memory."""
    gpu.only(small=True, cuda=True)
    try:
        counted = nvidia.count(LARGE, str(gpu.device), 28)
    except nvidia.Absent as error:
        pytest.skip(f"left out: {error}")
    for name, metric in (("Issue Slots Busy", predictions.ISSUE), ("DRAM Throughput", predictions.MEMORY)):
        recorder.row("gpu ops", "step", LARGE, metric, [counted[name]])
