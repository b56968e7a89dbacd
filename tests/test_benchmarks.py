"""The benchmarks' own honesty: what they compare is the same work, and a result that differs gets no number."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import fastdiff

ROOT = Path(__file__).parent.parent
SMALL = ("analytic 1x3x4x4", "MLP 256x2")


@pytest.fixture
def bench(monkeypatch):
    """The modules of benchmarks/, as pytest there imports them."""
    pytest.importorskip("pytest_benchmark")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import counting
    import paired
    import peers
    import test_runs

    monkeypatch.setattr(paired, "ROWS", [])
    return {"counting": counting, "paired": paired, "peers": peers, "runs": test_runs}


def own(bench):
    """The opponents that need no package."""
    return [p for p in bench["peers"].PEERS if p.exact and p.opponent in (bench["peers"].PRINTED, "in place, by hand")]


def test_the_printed_algorithms_are_the_same_work(bench):
    assert len(own(bench)) >= 7
    for name in SMALL:
        for peer in own(bench):
            bench["runs"].check_same(bench["runs"].CASES[name], peer, 50)


def test_another_result_gets_no_number(bench, monkeypatch):
    for peer in own(bench):
        for wrong in (  # a factor; half the steps
            peer._replace(build=lambda *args, right=peer.build: lambda: 1.001 * right(*args)()),
            peer._replace(build=lambda net, start, steps, right=peer.build: right(net, start, steps // 2)),
        ):
            with pytest.raises(AssertionError, match="gives other samples"):
                bench["runs"].test_run(None, monkeypatch, SMALL[0], 1, wrong)
    net_of = bench["runs"].network
    for peer in own(bench):  # the network's own time, and what is made of it beforehand
        frozen = peer._replace(build=lambda net, *args, right=peer.build: right(lambda x, t: net(x, t * 0), *args))
        with pytest.raises(AssertionError, match="gives other samples"):
            bench["runs"].check_same(bench["runs"].CASES["MLP 256x2"], frozen, 50)

        def features_of_the_first_row(*args):
            net = net_of(*args)
            net.time_features = lambda t, right=net.time_features: right(t[:1]).expand(len(t), -1)
            return net

        with monkeypatch.context() as patch:
            patch.setattr(bench["runs"], "network", features_of_the_first_row)
            with pytest.raises(AssertionError, match="gives other samples"):
                bench["runs"].check_same(bench["runs"].CASES["MLP 256x2"], peer, 50)
    biased = own(bench)[0]._replace(exact=False, build=lambda net, start, steps: lambda: start)
    with pytest.raises(AssertionError):
        bench["runs"].test_run(None, monkeypatch, SMALL[0], 1, biased)
    assert not bench["paired"].ROWS


def test_operations_reads_and_memory_are_counted(bench):
    def run(n):
        x, kept = torch.zeros(10, 100), []
        for _ in range(n):
            x.mul_(2)
            y = x + 1
            kept.append(y[:, :1].clone())
            float(y[0, 0])
        return x

    found = bench["counting"].count(run, 1000, 5)
    assert found.large_operations == 2
    assert found.small_operations == 1  # of a column
    assert found.host_reads == 1
    assert 4000 * 2 <= found.peak <= 4000 * 3 + 5 * 40


def test_more_network_calls_get_no_number(bench):
    from cases import Clock

    class Twice:
        def __init__(self, count):
            self.clock = Clock(lambda x: x)
            self.count = count

        def __call__(self):
            for _ in range(self.count):
                self.clock(0)

    one, two = Twice(100), Twice(200)
    with pytest.raises(AssertionError, match="calls the network 200 times"):
        bench["paired"].compare_runs("g", "c", "o", 1, 100, [(one, one.clock), (two, two.clock)], 0.1)
    assert not bench["paired"].ROWS
    bench["paired"].compare_runs("g", "c", "o", 1, 100, [(one, one.clock), (one, one.clock)], 0.1)
    assert {row["metric"] for row in bench["paired"].ROWS} == {"us per step", "us outside the network per step"}


def test_a_larger_error_gets_no_number(bench):
    paired = bench["paired"]

    def solution(tolerance, error):
        return paired.Solution(lambda: None, tolerance, error, 10, 10)

    for error in (2e-3, float("nan")):
        with pytest.raises(AssertionError, match="the error is"):
            paired.compare_solutions("g", "c", "o", 1, solution(1e-3, error), solution(1e-5, 1e-3), 0.1)
    assert not paired.ROWS
    paired.compare_solutions("g", "c", "o", 1, solution(1e-3, 1e-3), solution(1e-5, 1e-3), 0.001)
    assert [row["metric"] for row in paired.ROWS] == ["ms", "error", "tolerance", "evaluations", "calls"]
    errors = {1e-5: 0.1, 1e-4: 0.2, 1e-3: 0.9, 1e-2: 0.3}  # the last is within 0.5 by luck
    assert paired.loosest(lambda t: solution(t, errors[t]), list(errors), 0.5).tolerance == 1e-4


def test_the_mixture_is_exact(bench):
    from oracles import Mixture
    from problems import CENTRES, SPREAD, exact_eps

    x = torch.randn(50, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(1e-3, 1, 50, dtype=torch.float64)
    process = fastdiff.VP()
    alpha, sigma = process.alpha(t), process.sigma(t)
    data = Mixture(torch.ones(8), CENTRES, torch.full((8,), SPREAD, dtype=torch.float64))
    expected = data.eps(x.flatten(1), alpha, sigma).view_as(x)
    assert torch.allclose(exact_eps(x, t), expected, rtol=1e-9, atol=1e-12)


def test_results_of_other_measurements_are_kept(bench, tmp_path, monkeypatch):
    paired = bench["paired"]
    monkeypatch.setattr(paired, "ROOT", tmp_path)
    monkeypatch.setattr(paired, "commit", lambda: "abc")
    paired.record("ops", "step", "eager", 8, "us", [1.0, 2.0, 4.0], [2.0, 6.0, 4.0])
    path = paired.save()
    paired.ROWS.clear()
    paired.note("a case", "DDIM", "somebody", 8, "host reads per step", 0, 13)
    paired.save()
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(r["group"], r["ours"], r["theirs"], r["ratio_p50"]) for r in rows] == [
        ("ops", "2", "4", "2.0"),
        ("a case", "0", "13", ""),
    ]
    paired.ROWS.clear()
    paired.record("ops", "step", "eager", 8, "us", [1.0, 1.0], [3.0, 3.0])
    paired.save()
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(r["group"], r["ratio_p50"]) for r in rows] == [("ops", "3.0"), ("a case", "")]
