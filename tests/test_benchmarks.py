"""The benchmarks' own honesty: what they compare is the same work, and a result that differs gets no number."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff.networks import MLP

ROOT = Path(__file__).parent.parent
SMALL = ("analytic 1x3x4x4", "MLP 256x2")


@pytest.fixture
def bench(monkeypatch):
    """The modules of benchmarks/, as pytest there imports them."""
    pytest.importorskip("pytest_benchmark")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cases
    import counting
    import peers
    import provenance
    import recorder
    import test_runs

    return SimpleNamespace(
        cases=cases, counting=counting, peers=peers, provenance=provenance, recorder=recorder, runs=test_runs
    )


@pytest.fixture
def rows(bench):
    """A recorder of rows."""
    return bench.recorder.Recorder(commit="abc")


def own(bench):
    """The opponents that need no package."""
    return [p for p in bench.peers.PEERS if p.exact and p.opponent in (bench.peers.PRINTED, "in place, by hand")]


def test_the_printed_algorithms_are_the_same_work(bench):
    assert len(own(bench)) >= 7
    for name in SMALL:
        for peer in own(bench):
            bench.runs.check_same(name, peer, 50)


@pytest.mark.parametrize("name", ["MLP 256x2", "own MLP 256x2"])
def test_a_timed_network_is_run_as_it_is_untimed(bench, name, monkeypatch):
    """With its time features made once for all rows where it has them; "own" is a module of which fastdiff knows nothing."""
    calls, features = [], MLP.time_features

    def recorded(net, t):
        calls.append(len(t))
        return features(net, t)

    monkeypatch.setattr(MLP, "time_features", recorded)
    timed = bench.cases.Clock(bench.cases.CASES[name].network("vp", 1000, bench.cases.CPU))
    fastdiff.sample(timed.net, "vp", 20, shape=(2, 1, 1), num_samples=3, prediction="eps")
    assert timed.calls == 20
    assert calls == ([1, 20] if name == "MLP 256x2" else [])


def test_another_result_gets_no_number(bench, rows, monkeypatch):
    for peer in own(bench):
        for wrong in (  # a factor; half the steps
            peer._replace(build=lambda *args, right=peer.build: lambda: 1.001 * right(*args)()),
            peer._replace(build=lambda net, start, steps, right=peer.build: right(net, start, steps // 2)),
        ):
            with pytest.raises(AssertionError, match="gives other samples"):
                bench.runs.test_run(None, monkeypatch, rows, SMALL[0], 1, wrong)
    network = bench.cases.Subject.network
    for peer in own(bench):  # the network's own time, and what is made of it beforehand
        frozen = peer._replace(build=lambda net, *args, right=peer.build: right(lambda x, t: net(x, t * 0), *args))
        with pytest.raises(AssertionError, match="gives other samples"):
            bench.runs.check_same("MLP 256x2", frozen, 50)

        def features_of_the_first_row(subject):
            net = network(subject)
            net.time_features = lambda t, right=net.time_features: right(t[:1]).expand(len(t), -1)
            return net

        with monkeypatch.context() as patch:
            patch.setattr(bench.cases.Subject, "network", features_of_the_first_row)
            with pytest.raises(AssertionError, match="gives other samples"):
                bench.runs.check_same("MLP 256x2", peer, 50)
    biased = own(bench)[0]._replace(exact=False, build=lambda net, start, steps: lambda: start)
    with pytest.raises(AssertionError):
        bench.runs.test_run(None, monkeypatch, rows, SMALL[0], 1, biased)
    assert not rows.rows


def test_ddpm_of_diffusers_is_off_by_its_float32_product_alone(bench):
    """States of float64: nothing remains with a product of float64, and with theirs no more than is allowed for it."""
    diffusers, steps = pytest.importorskip("diffusers"), 200
    peer = next(p for p in bench.peers.PEERS if p.roundings)
    assert (peer.sampler, peer.opponent) == ("DDPM", "diffusers")
    alphas = 1 - torch.tensor(bench.cases.betas(steps), dtype=torch.float64)

    class Exact(diffusers.DDPMScheduler):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.alphas_cumprod, self.one = torch.cumprod(alphas, 0), torch.ones((), dtype=torch.float64)

    for name in SMALL:
        s = bench.cases.Subject(name, "ddpm", steps)
        net = s.network()
        net = net.double() if isinstance(net, torch.nn.Module) else net
        s.start, noise = s.start.double(), s.noise
        s.noise = lambda noise=noise: (z.double() for z in noise())
        found = {}
        for scheduler in (diffusers.DDPMScheduler, Exact):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(bench.peers.load("diffusers"), "DDPMScheduler", scheduler)
                options = {**peer.options(steps), "dtype": torch.float64, "backend": "reference"}
                found[scheduler] = s.distance(net, options, peer.build(net, s.start, steps))
        assert found[Exact] <= 1e-12
        assert 1e-6 <= found[diffusers.DDPMScheduler] <= peer.roundings * steps * 2**-24


def test_an_operation_of_other_bits_or_meaning_gets_no_number(bench):
    import operations

    from fastdiff.execution import reference

    for op in (*operations.OPS, *operations.OTHERS):
        t = operations.tensors(1024, torch.device("cpu"), 8)
        operations.check_bits(op, reference, t, reference, t)
        ours = lambda op=op, t=t: op.ours(reference, t)  # noqa: E731
        operations.check_meaning(op, ours, "eager", op.eager(t))

        def off_by_a_bit(k, t, op=op):
            first, *others = op.ours(k, t)
            first = first.detach().clone()
            first.flatten()[-1:].copy_(torch.nextafter(first.flatten()[-1], torch.tensor(99.0, dtype=first.dtype)))
            return first, *others

        wrong = op._replace(ours=off_by_a_bit, oracle=op.oracle or op.ours)
        with pytest.raises(AssertionError, match="not timed"):
            operations.check_bits(wrong, reference, t, reference, t)
        if op.name in ("step", "normal"):  # what another run left in its place is not its result
            with pytest.raises(AssertionError, match="not timed"):
                operations.check_bits(wrong._replace(ours=lambda k, t: (t["out"],)), reference, t, reference, t)
        with pytest.raises(AssertionError, match="computes something else"):
            operations.check_meaning(op, ours, "eager", lambda ours=ours: operations.first(ours()) + 1.0)
        if op.name in ("step", "normal"):  # nor is what ours left there the opponent's
            with pytest.raises(AssertionError, match="computes something else"):
                operations.check_meaning(op, ours, "eager", lambda t=t: t["out"])


def test_operations_reads_and_memory_are_counted(bench):
    def run(n):
        x, kept = torch.zeros(10, 100), []
        for _ in range(n):
            x.mul_(2)
            y = x + 1
            kept.append(y[:, :1].clone())
            float(y[0, 0])
        return x

    found = bench.counting.count(run, 1000, 5)
    assert found["large operations per step"] == 2
    assert found["small operations per step"] == 1  # of a column
    assert found["host reads per step"] == 1
    assert 2 <= found["states held at once"] <= 3 + 5 * 40 / 4000


def test_more_network_calls_get_no_number(bench, rows):
    compare = bench.recorder.compare_runs

    class Twice:
        def __init__(self, count):
            self.clock = bench.cases.Clock(lambda x: x)
            self.count = count

        def __call__(self):
            for _ in range(self.count):
                self.clock(0)

    one, two = Twice(100), Twice(200)
    with pytest.raises(AssertionError, match="calls the network 200 times"):
        compare(rows, "g", "c", "o", 1, 100, [(one, one.clock), (two, two.clock)], 0.1)
    assert not rows.rows
    compare(rows, "g", "c", "o", 1, 100, [(one, one.clock), (one, one.clock)], 0.1)
    assert {row["metric"] for row in rows.rows} == {"us per step", "us outside the network per step"}


def test_a_larger_error_gets_no_number(bench, rows):
    recorder = bench.recorder

    def solution(tolerance, error):
        return recorder.Solution(lambda: None, tolerance, error, 10, 10)

    for error in (2e-3, float("nan")):
        with pytest.raises(AssertionError, match="the error is"):
            recorder.compare_solutions(rows, "g", "c", "o", 1, solution(1e-3, error), solution(1e-5, 1e-3), 0.1)
    assert not rows.rows
    recorder.compare_solutions(rows, "g", "c", "o", 1, solution(1e-3, 1e-3), solution(1e-5, 1e-3), 0.001)
    assert [row["metric"] for row in rows.rows] == ["ms", "error", "tolerance", "evaluations", "calls"]
    errors = {1e-5: 0.1, 1e-4: 0.2, 1e-3: 0.9, 1e-2: 0.3}  # the last is within 0.5 by luck
    assert recorder.loosest(lambda t: solution(t, errors[t]), list(errors), 0.5).tolerance == 1e-4


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


def test_results_of_other_measurements_are_kept(bench, rows, tmp_path, monkeypatch):
    """Those of the same file, or else of the repository's: a run of some parts into an empty folder loses no others."""
    committed, elsewhere = tmp_path / "results", tmp_path / "elsewhere"
    monkeypatch.setattr(bench.provenance, "RESULTS", committed)
    rows.row("ops", "step", 8, "us", [1.0, 2.0, 4.0], "eager", [2.0, 6.0, 4.0])
    path = rows.save(tmp_path)
    later = bench.recorder.Recorder(commit="abc")
    later.row("a case", "DDIM", 8, "host reads per step", [0], "somebody", [13])
    later.save(tmp_path)
    found = [(r["group"], r["ours"], r["theirs"], r["ratio_p50"]) for r in bench.recorder.read(path)]
    assert found == [("ops", "2", "4", "2.0"), ("a case", "0", "13", "")]
    committed.mkdir()
    path.rename(committed / path.name)
    latest = bench.recorder.Recorder(commit="def")
    latest.row("ops", "step", 8, "us", [1.0, 1.0], "eager", [3.0, 3.0])
    path = latest.save(elsewhere)
    found = [(r["group"], r["ratio_p50"], r["commit"]) for r in bench.recorder.read(path)]
    assert found == [("ops", "3.0", "def"), ("a case", "", "abc")]
    assert len(bench.recorder.read(committed / path.name)) == 2
    quick = bench.recorder.Recorder(commit="def", quick=True)  # numbers that mean nothing stand among no results
    quick.row("ops", "step", 8, "us", [9.0])
    assert quick.save(elsewhere) != path
    assert [r["ours"] for r in bench.recorder.read(quick.save(elsewhere))] == ["9"]


def test_a_results_file_of_other_columns_stops_no_measurement(bench, rows, tmp_path):
    """What it says of columns that there are now is kept; a row that does not say what it measured is not."""
    rows.row("ops", "step", 64, "us", [1.0])
    path = tmp_path / f"{rows.name}.csv"
    path.write_text("group,case,opponent,threads,n,metric,ours,color\nops,normal,,1,64,us,3,red\nops,perturb\n")
    assert rows.save(tmp_path) == path
    found = bench.recorder.read(path)
    assert [(row["case"], row["ours"], row["commit"]) for row in found] == [("normal", "3", ""), ("step", "1", "abc")]


def test_who_is_cut_off_while_it_saves_leaves_the_results_of_before(bench, rows, tmp_path, monkeypatch):
    rows.row("ops", "step", 8, "us", [1.0], "eager")
    before = rows.save(tmp_path).read_text()

    def cut_off(writer, lines):
        writer.writerow(next(iter(lines)))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.recorder.csv.DictWriter, "writerows", cut_off)
    with pytest.raises(KeyboardInterrupt):
        rows.save(tmp_path)
    assert next(tmp_path.glob("*.csv")).read_text() == before


def test_results_come_from_commits_only(bench, tmp_path, monkeypatch):
    """A repository of one file, clean and then not; results alone may have changed."""
    recorder, provenance, root = bench.recorder, bench.provenance, tmp_path / "repository"
    (root / "fastdiff").mkdir(parents=True)
    (root / "fastdiff" / "a.py").write_text("a = 1")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(root)]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(provenance, "ROOT", root)
    monkeypatch.setattr(provenance, "RESULTS", root / "benchmarks" / "results")
    results = provenance.RESULTS
    rows = recorder.Recorder()
    rows.row("ops", "step", 8, "us", [1.0, 2.0], "eager", [2.0, 6.0])
    before = rows.save(results).read_text()
    assert rows.commit
    assert rows.commit in before
    (root / "README.md").write_text("the new table")
    rows.save(results)
    assert not recorder.Recorder().commit.endswith("-dirty")
    (root / "fastdiff" / "a.py").write_text("a = 2")
    assert recorder.Recorder().commit == f"{rows.commit}-dirty"
    with pytest.raises(
        provenance.Unsaveable, match=r"fastdiff/a.py differ.* commit: commit them first, or run without saving"
    ):
        rows.save(results)
    assert rows.save(tmp_path / "elsewhere").exists()
    (root / "fastdiff" / "a.py").write_text("a = 1")
    (root / "fastdiff" / "new.py").write_text("b = 1")  # git does not know it
    with pytest.raises(provenance.Unsaveable, match=r"new\.py"):
        rows.save(results)
    rows.commit = ""
    (root / "fastdiff" / "new.py").unlink()
    with pytest.raises(provenance.Unsaveable, match="name --commit"):
        rows.save(results)
    copy = root / "copy"  # without a repository of its own: that around it is not its commit
    copy.mkdir()
    monkeypatch.setattr(provenance, "ROOT", copy)
    assert recorder.Recorder().commit == ""
    assert recorder.Recorder(commit="abc").commit == "abc"


def test_the_tables_mark_what_is_compared_by_statistics_alone(bench):
    """Of each sampler the fastest rival; every rival that is not fed the same noise has its mark, in both documents."""
    import report

    found = report.best(bench.recorder.read(report.MACHINE), report.IMAGES, report.OUTSIDE)
    assert {"DDIM", "Heun", "LMS", "DEIS"} <= found.keys()
    assert found["DDIM"]["opponent"] == bench.peers.PRINTED
    short, full = report.summary(), report.results()
    for peer in bench.peers.PEERS:
        row = found[peer.sampler]
        assert float(row["ratio_p50"]) > 0
        if peer.opponent == row["opponent"]:
            line = next(line for line in short.splitlines() if line.startswith(f"| {peer.sampler} |"))
            assert ("†" in line.split("|")[3]) is not peer.exact
    assert len([line for line in full.splitlines() if line.startswith("| LMS | ") and "×†" in line]) >= 10
