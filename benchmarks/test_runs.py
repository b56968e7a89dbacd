"""Whole sampling runs against the other libraries: the same network object, levels, network calls and dtype, in turns.

Nothing is timed before its check: fed the same noise, ours and theirs give the same samples but for float32 roundings; the
few whose scheme or generator is another call the network as often and give samples of N(0, 1) data of the same statistics.
Set-up is within the time, theirs and ours, ours with the table that the first run has planned.
"""

from __future__ import annotations

from collections.abc import Iterator

import counting
import pytest
import torch
from cases import CASES, CHAIN, Case, Clock, ours
from paired import compare_runs, note
from peers import PEERS, Peer, missing, noise_from

from fastdiff.execution import ops

CPU = torch.device("cpu")

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


def start_of(case: Case, peer: Peer, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normals, and the start that they make."""
    z = torch.empty(case.batch, *case.shape).normal_(generator=torch.Generator().manual_seed(seed))
    return z, z * {"ve": 50.0, "edm": 80.0}.get(peer.kind, 1.0)


def draws(case: Case, first: torch.Tensor | None) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if first is not None:
        yield first
    while True:
        yield torch.empty(case.batch, *case.shape).normal_(generator=generator)


def network(case: Case, peer: Peer, steps: int) -> object:
    return case.network(peer.kind, steps if peer.sampler == "DDPM" else CHAIN, CPU)


def check_same(case: Case, peer: Peer, steps: int) -> None:
    """The same noise, the same samples. Some fifty roundings of 6e-8, and the levels that they compute in float32."""
    z, start = start_of(case, peer)
    net, mine = network(case, peer, steps), draws(case, None)
    x = ours(peer.kind, net, start)(noise=lambda row: next(mine), **peer.options(steps))
    run = peer.build(net, start, steps)
    with noise_from(draws(case, z if peer.from_prior else None)):
        y = run().view_as(x)
    assert x.dtype == y.dtype
    assert (x - y).abs().max() <= case.tolerance * x.abs().max(), f"{peer.opponent} gives other samples"


def check_statistics(peer: Peer) -> None:
    """Exact scores of N(0, 1) data, 200 steps: both end within 5 % of its standard deviation, and have its mean."""
    case = CASES[STATISTICS]
    net = network(case, peer, case.steps)
    _, start = start_of(case, peer)
    torch.manual_seed(0)
    for x in (ours(peer.kind, net, start)(**peer.options(case.steps)), peer.build(net, start, case.steps)()):
        assert x.dtype == start.dtype
        assert abs(x.std() - 1) < 0.05, f"{peer.opponent}: {x.std()}"
        assert abs(x.mean()) < 5 / x.numel() ** 0.5


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize(("name", "threads", "peer"), list(combinations()))
def test_run(benchmark, monkeypatch, name, threads, peer):
    reason = missing(peer.opponent)
    if reason:
        pytest.skip(reason)
    torch.set_num_threads(threads)
    case = CASES[name]
    steps = case.steps
    if peer.exact:
        check_same(case, peer, steps)
    else:
        check_statistics(peer)
    _, start = start_of(case, peer)
    clocks = [Clock(network(case, peer, steps)) for _ in range(2)]
    # who draws the start within the time is set against a run that does
    given = {"x_init": None} if peer.from_prior else {}
    mine = ours(peer.kind, clocks[0].net, start, **{**peer.options(steps), **given})
    if peer.opponent == "torch.compile":
        systems = [(mine, clocks[0]), (peer.build(network(case, peer, steps), start, steps), None)]
    else:
        systems = [(mine, clocks[0]), (peer.build(clocks[1].net, start, steps), clocks[1])]
    benchmark.group = f"runs: {name}, {peer.sampler}"
    seconds = 4.0 if name.startswith("U-Net") else 0.5
    benchmark.extra_info.update(compare_runs(name, peer.sampler, peer.opponent, case.numel, steps, systems, seconds))
    benchmark.pedantic(mine, rounds=1)
    if name == COUNTED and threads == 1 and peer.opponent != "torch.compile":
        count_operations(monkeypatch, name, peer, start)


def count_operations(monkeypatch: pytest.MonkeyPatch, name: str, peer: Peer, start: torch.Tensor) -> None:
    """What a step asks of torch, and the memory that a run holds."""
    case, steps = CASES[name], 40

    def mine(n: int) -> object:
        return ours(peer.kind, counting.unseen(network(case, peer, n)), start)(**peer.options(n))

    def theirs(n: int) -> object:
        return peer.build(counting.unseen(network(case, peer, n)), start, n)()

    with monkeypatch.context() as patch:
        patch.setattr(ops, "backend_module", lambda name: counting.dispatched())
        ours_found = counting.count(mine, case.numel, steps)
    theirs_found = counting.count(theirs, case.numel, steps)
    for metric in ("large_operations", "small_operations", "host_reads", "draws"):
        a, b = (getattr(found, metric) for found in (ours_found, theirs_found))
        note(name, peer.sampler, peer.opponent, case.numel, f"{metric.replace('_', ' ')} per step", a, b)
    a, b = (found.peak / start.nbytes for found in (ours_found, theirs_found))
    note(name, peer.sampler, peer.opponent, case.numel, "states held at once", a, b)
