"""Whole sampling runs against the other libraries: the same network object, levels, network calls and dtype, in turns.

Nothing is timed before its check: fed the same noise, ours and theirs give the same samples but for float32 roundings; the
few whose scheme or generator is another (`exact=False`) call the network as often and give samples of N(0, 1) data of the same
statistics. Set-up is within the time, theirs and ours, ours with the table that the first run has planned.
"""

from collections.abc import Iterator

import counting
import pytest
import torch
from cases import CASES, CHAIN, Clock, Subject
from peers import PEERS, Peer, missing
from recorder import Recorder, compare_runs

from fastdiff.execution import ops

pytestmark = pytest.mark.usefixtures("kept_memory")

STATISTICS = "analytic 4096x2"  # the case for those whose samples are not ours
COMPILED = ("analytic 64x3x32x32", "MLP 256x2", "MLP 4096x2")  # a compilation takes 20 s
# of the large network, which takes a second a step, one sampler for each library
LARGE = {
    ("DDIM", "diffusers"), ("DDIM", "denoising-diffusion-pytorch"), ("DDIM", "azula"), ("Heun", "k-diffusion"),
    ("VP Euler-Maruyama", "score_sde_pytorch"),
}  # fmt: skip
COUNTED = "analytic 64x3x32x32"  # also the one that runs on two threads


def combinations() -> Iterator[object]:
    for name in CASES:
        for threads in (1, 2) if name == COUNTED else (1,):
            for peer in PEERS:
                if peer.opponent == "torch.compile" and (name not in COMPILED or threads > 1):
                    continue
                if name.startswith("U-Net") and (peer.sampler, peer.opponent) not in LARGE:
                    continue
                yield pytest.param(name, threads, peer, id=f"{name}-{threads}-{peer.sampler}-{peer.opponent}")


def subject(name: str, peer: Peer, steps: int) -> Subject:
    return Subject(name, peer.kind, steps if peer.sampler == "DDPM" else CHAIN)


def check_same(name: str, peer: Peer, steps: int) -> None:
    """The same noise, the same samples. Some fifty roundings of 6e-8, and the levels that they compute in float32."""
    s = subject(name, peer, steps)
    net = s.network()
    apart = s.distance(net, peer.options(steps), peer.build(net, s.start, steps), peer.from_prior)
    if not apart <= s.case.tolerance + peer.roundings * steps * 2**-24:
        raise AssertionError(f"{peer.opponent} gives other samples, {apart:.2g} apart")


def check_statistics(peer: Peer) -> None:
    """Exact scores of N(0, 1) data, 200 steps: both end within 5 % of its standard deviation, and have its mean."""
    steps = CASES[STATISTICS].steps
    s = subject(STATISTICS, peer, steps)
    net = s.network()
    torch.manual_seed(0)
    for x in (s.ours(net, **peer.options(steps))(), peer.build(net, s.start, steps)()):
        assert x.dtype == s.start.dtype
        assert abs(x.std() - 1) < 0.05, f"{peer.opponent}: {x.std()}"
        assert abs(x.mean()) < 5 / x.numel() ** 0.5


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize(("name", "threads", "peer"), list(combinations()))
def test_run(benchmark, monkeypatch, recorder, name, threads, peer):
    reason = missing(peer.opponent)
    if reason:
        pytest.skip(reason)
    torch.set_num_threads(threads)
    steps = CASES[name].steps
    check_same(name, peer, steps) if peer.exact else check_statistics(peer)
    s = subject(name, peer, steps)
    clocks = [Clock(s.network()) for _ in range(2)]
    # who draws the start within the time is set against a run that does
    given = {"x_init": None} if peer.from_prior else {}
    ours = s.ours(clocks[0].net, **{**peer.options(steps), **given})
    clock = None if peer.opponent == "torch.compile" else clocks[1]
    theirs = peer.build(clock.net if clock else s.network(), s.start, steps)
    benchmark.group = f"runs: {name}, {peer.sampler}"
    numel, systems = s.start.numel(), [(ours, clocks[0]), (theirs, clock)]
    seconds = 4.0 if name.startswith("U-Net") else 0.5
    ratios = compare_runs(recorder, name, peer.sampler, peer.opponent, numel, steps, systems, seconds)
    benchmark.extra_info.update(ratios)
    benchmark.pedantic(ours, rounds=1)
    if name == COUNTED and threads == 1 and peer.opponent != "torch.compile":
        count_operations(monkeypatch, recorder, name, peer)


def count_operations(monkeypatch: pytest.MonkeyPatch, recorder: Recorder, name: str, peer: Peer) -> None:
    """What a step asks of torch, and the memory that a run holds."""
    subjects = {steps: subject(name, peer, steps) for steps in (40, 80)}
    numel = subjects[40].start.numel()
    network = lambda s: counting.unseen(s.network())  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(ops, "backend_module", lambda name: counting.dispatched())
        ours = counting.count(lambda n: subjects[n].ours(network(subjects[n]), **peer.options(n))(), numel, 40)
    theirs = counting.count(lambda n: peer.build(network(subjects[n]), subjects[n].start, n)(), numel, 40)
    for metric, value in ours.items():
        recorder.row(name, peer.sampler, numel, metric, [value], peer.opponent, [theirs[metric]])
