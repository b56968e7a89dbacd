"""`make gpu` without a GPU: each part with a stand-in for the device, and the script around them as it is."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdiff.errors import GraphError

ROOT = Path(__file__).parent.parent
COLUMNS = "device threads group case opponent n metric ours theirs ratio_p20 ratio_p50 ratio_p80 rounds commit torch version date"
OPERATIONS = {
    "step", "step, mixed", "step, bf16 network", "normal", "rademacher", "perturb", "dsm_loss", "perturb + dsm_loss + backward",
    "measured Langevin row", "probe_dot, rademacher", "probe_dot, normal", "rk_error", "timestep_embedding",
    "step, float32 network", "step without noise, bf16 network", "probe_dot alone, normal", "probe_dot alone, rademacher",
    "measure_langevin alone", "step, prepared",
}  # fmt: skip
NETWORKS = {"MLP 256x2x1x1 float32", "MLP 256x2x1x1 bfloat16", "analytic 64x3x32x32 float32"}
NCU = """#!/bin/sh
echo '==PROF== Connected to process 1'
echo '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"'
echo '"0","step_kernel","GPU Speed Of Light Throughput","DRAM Throughput","%","91.25",""'
echo '"0","step_kernel","GPU Speed Of Light Throughput","","","","SOLBottleneck"'
echo '"0","step_kernel","Compute Workload Analysis","Issue Slots Busy","%","52.5",""'
"""
SANITIZER = """#!/bin/sh
case "$*" in
    *memcheck*) echo "346 passed"; echo "========= ERROR SUMMARY: 0 errors" ;;
    *) echo "========= Error: Device not supported. Please refer to the documentation"; exit 1 ;;
esac
"""


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def tool(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


def notes_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_part_is_tried_on_a_stand_in(tmp_path, gpu):
    """All that is done for a device but compiling: graphs as tapes, events, memory, NVIDIA's tools."""
    tool(tmp_path, "ncu", NCU)
    tool(tmp_path, "compute-sanitizer", SANITIZER)
    paths = {
        "PYTHONPATH": f"{ROOT / 'benchmarks' / 'bare'}:{ROOT / 'tests'}",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    notes = tmp_path / "notes"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--quick", "-p", "stand_in", "-p", "noted", "--notes", notes,
         "--out", tmp_path, "--commit", "abc", "--minutes", "2", "-k", "not demo and not (diffusers or printed or place)",
         "-v", "-s", "-rs", "-W", "ignore", "-p", "no:cacheprovider"],
        env={**os.environ, **paths, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    rows = list(csv.DictReader((tmp_path / "a-stand-in-quick.csv").read_text().splitlines()))
    assert list(rows[0]) == COLUMNS.split()
    assert {(row["device"], row["commit"], row["threads"]) for row in rows} == {("a-stand-in-quick", "abc", "")}
    assert {row["group"] for row in rows} == {"gpu ops", "gpu loops", "gpu training", "gpu networks"}

    def of(metric, column="ours"):
        return {row["case"]: row[column] for row in rows if row["metric"] == metric}

    assert set(of("numbers unlike the reference's").values()) == {"0"}
    assert len(of("numbers unlike the reference's")) == 7
    assert of("us").keys() == OPERATIONS
    assert of("us in a graph").keys() == OPERATIONS - {"perturb + dsm_loss + backward"}
    assert of("us of the kernels alone (CUPTI)").keys() == {"step, bf16 network", "probe_dot alone, normal", "dsm_loss"}
    for name, speed in of("GB/s").items():
        if name != "copy_":
            copied = 100 * float(speed) / float(of("percent of copy")[name])
            assert math.isclose(copied, float(of("GB/s")["copy_"]), rel_tol=1e-3)
    compiled = {f"{name}, torch.compile(net)" for name in NETWORKS}
    assert of("us per step").keys() == NETWORKS | compiled
    assert {row["opponent"] for row in rows if row["case"] in compiled} == {"reduce-overhead loop"}
    assert of("weights apart, graphs and eager steps") == {"MLP 256x2": "0"}
    assert of("us per training step").keys() == {"MLP 256x2"}
    assert of("us a call").keys() == of("us a call in a graph").keys()
    assert {name.partition(" ")[0] for name in of("us a call")} == {"group_norm", "U-Net"}
    assert of("us outside the network per step").keys() == of("peak MiB").keys() == NETWORKS
    for row in rows:
        if row["theirs"] and row["metric"].startswith("us"):
            assert float(row["ours"]) > 0
            assert float(row["theirs"]) > 0
            assert float(row["ratio_p20"]) <= float(row["ratio_p50"]) <= float(row["ratio_p80"])
    assert of("percent of issue slots busy (ncu)") == {"step": "52.5"}
    assert of("percent of the memory's throughput (ncu)") == {"step": "91.25"}

    known, said = gpu.Outcome(), notes_of(notes)
    known.read(notes)
    assert not known.failed
    assert not known.unreached
    reasons = {reason.partition(":")[0] for reason in known.skipped}
    assert {"left out of a quick run", gpu.OF_TIME, "left out"} == reasons
    assert any("compute-sanitizer does not support this device" in reason for reason in known.skipped)
    tried = [line.partition(",")[0] for line in known.says["tried"]]
    assert len(tried) == 5  # loops of two dtypes, against two opponents, and a training step
    assert tried.count("training") == 1
    assert any(
        line.startswith("MLP") and "predicted elsewhere 22 to 26 (H100)" in line for line in known.says["predicted"]
    )
    assert not any(note.get("says") in ("held", "missed") for note in said)  # numbers that mean nothing
    assert "fastdiff::step" in ran.stdout.partition("test_profile")[2]


def test_a_bare_copy_says_its_verdict(tmp_path):
    """As on a machine that is lent: no repository, nothing installed of fastdiff, results somewhere else."""
    copy, out = tmp_path / "a b" / "copy", tmp_path / "out"
    for name in ("benchmarks", "csrc", "fastdiff", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    ran = subprocess.run(
        [sys.executable, copy / "benchmarks" / "gpu.py", "--device", "cpu", "--quick", "--only", "bits,kernels,tests",
         "--out", out, "--commit", "abc"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, cwd="/", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    (table,) = out.glob("*-quick.csv")
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert {(row["ours"], row["commit"]) for row in rows} == {("0", "abc")}
    assert len(rows) == 4  # none of them by graphs
    assert (out / "gpu.log").read_text() == ran.stdout
    verdict = ran.stdout.partition("VERDICT")[2]
    assert "\nbits        held: 4 held;" in verdict
    assert ", test_run[graph-sample(), vp heun]: left out without a CUDA device" in verdict
    assert "kernels: needs a CUDA device" in verdict
    assert ": needs a CUDA device\n" in verdict.partition("tests: ")[2]
    assert "operations: not among those named" in verdict
    assert "large: only if it is named" in verdict
    assert "VERDICT: HELD (exit code 0)" in verdict
    ask = "import sys; print(sys.meta_path[0].find_spec('fastdiff.kernels').origin)"  # before an installed fastdiff's
    found = subprocess.run(
        [sys.executable, "-c", ask], env={**os.environ, "PYTHONPATH": str(copy / "benchmarks" / "bare")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout.strip() == str(copy / "kernels" / "__init__.py")


class Device:
    """Stands for gpu.run, and for the clock: each part takes `takes` seconds (all it has unless it is named) and leaves notes."""

    def __init__(self, gpu, monkeypatch, notes=None, codes=None, takes=None):
        self.gpu, self.notes, self.codes, self.takes = gpu, notes or {}, codes or {}, takes or {}
        self.now, self.ran, self.commands = 0.0, {}, {}
        monkeypatch.setattr(gpu, "run", self.run)
        monkeypatch.setattr(gpu, "build", lambda say: "built")
        monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: self.now))
        described = SimpleNamespace(returncode=0, stdout="a card, torch 2\n", stderr="")
        monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=lambda *args, **kwargs: described))

    def run(self, command, seconds, say, **environment):
        assert command[3:5] == ["-c", str(ROOT / "pyproject.toml")]
        marks = command[command.index("-m", 3) + 1] if "-m" in command[3:] else "kernels"
        name = "tests" if marks == "gpu" else marks
        self.ran[name], self.commands[name] = seconds, (command, environment)
        self.now += self.takes.get(name, seconds)
        lines = self.notes.get(name, [{"test": f"t::{k}", "outcome": "passed", "why": ""} for k in range(200)])
        (notes,) = (Path(word.partition("=")[2]) for word in command if word.startswith("--notes="))
        notes.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return self.codes.get(name, 0)


def ended(gpu, capsys, folder, *arguments):
    """(exit code, what follows VERDICT)."""
    code = gpu.main(["--out", str(folder), "--commit", "abc", *arguments])
    return code, capsys.readouterr().out.partition("VERDICT")[2]


def test_parts_run_in_their_order_each_within_its_seconds(gpu, monkeypatch, capsys, tmp_path):
    device = Device(gpu, monkeypatch, takes={name: 20 for name in gpu.PARTS})
    code, verdict = ended(gpu, capsys, tmp_path)
    assert code == 0
    assert list(device.ran) == [
        "bits",
        "kernels",
        "tests",
        "operations",
        "profile",
        "training",
        "loops",
        "networks",
        "sanitizer",
        "counters",
        "bf16",
    ]
    assert all(seconds <= gpu.PARTS[name].seconds for name, seconds in device.ran.items())
    assert "a card, torch 2; commit abc; 220 s" in verdict
    assert "VERDICT: HELD (exit code 0)" in verdict
    assert "in another command: make gpu ONLY=large" in verdict
    command, environment = device.commands["kernels"]
    assert command[5] == "tests/kernel_cases.py"
    assert environment["FASTDIFF_KERNELS_DEVICE"] == "cuda"
    for name in ("kernels", "tests"):
        command, _ = device.commands[name]
        assert command[command.index("-n") + 1] == "8"
    command, _ = device.commands["tests"]
    assert command[command.index("--deselect") + 1] == gpu.CASES
    assert {"tests/test_graphs.py", "tests/test_triton.py", "tests/test_device.py"} <= set(command)
    command, _ = device.commands["loops"]
    assert float(command[command.index("--minutes") + 1]) * 60 < device.ran["loops"] - gpu.GRACE


def test_what_there_is_no_time_for_is_named(gpu, monkeypatch, capsys, tmp_path):
    device = Device(gpu, monkeypatch)  # each takes all that it may
    code, verdict = ended(gpu, capsys, tmp_path)
    assert code == 0
    assert device.now <= gpu.SECONDS < 600
    assert list(device.ran) == ["bits", "kernels", "tests", "operations", "profile", "training", "loops"]
    for name in ("networks", "sanitizer", "counters", "bf16"):
        assert f"{name}: left out for want of time" in verdict
    assert "in another command: make gpu ONLY=networks,sanitizer,counters,bf16,large" in verdict


def test_tests_alone_run_the_kernels_cases_themselves(gpu, monkeypatch, capsys, tmp_path):
    device = Device(gpu, monkeypatch)
    assert ended(gpu, capsys, tmp_path, "--only", "large,tests")[0] == 0
    assert list(device.ran) == ["tests", "large"]
    assert "--deselect" not in device.commands["tests"][0]


def note(test, outcome="passed", why=""):
    return {"test": test, "outcome": outcome, "why": why}


MISSED, HELD = {"says": "missed", "text": "U-Net: 0.9 times"}, {"says": "held", "text": "MLP: 5 times"}


def test_the_verdict_and_the_exit_code(gpu, monkeypatch, capsys, tmp_path):
    given = ("--only", "operations,profile,loops")
    notes = {
        "operations": [note("t.py::a"), note("t.py::b", "skipped", "left out for want of time: it may take 9 s, 3 s are left"),
                       note("t.py::c", "skipped", "left out for want of time: it may take 9 s, 2 s are left"), HELD],
        "profile": [note("t.py::d", "skipped", "left out: ncu is not installed")],
        "loops": [note("t.py::e"), MISSED, {"says": "predicted", "text": "MLP 21 within: predicted 20 to 30"}],
    }  # fmt: skip
    Device(gpu, monkeypatch, notes)
    code, verdict = ended(gpu, capsys, tmp_path, *given)
    assert code == 3
    assert "VERDICT: MISSED (exit code 3)" in verdict
    assert "operations  held: 1 held;" in verdict
    assert "loops       missed: 1 held;" in verdict
    assert "Promised and missed:\n    U-Net: 0.9 times\n" in verdict
    assert "Promised and held:\n    MLP: 5 times\n" in verdict
    assert "predictions, which are no measurements:\n    MLP 21 within" in verdict
    assert "operations: b, c: left out for want of time\n" in verdict
    assert "profile: d: left out: ncu is not installed\n" in verdict
    assert "make gpu ONLY=operations,large" in verdict

    notes["operations"] += [
        note("t.py::f", "failed", "AssertionError: 3 of 4096 differ"),
        {"chosen": ["t.py::a", "t.py::z"]},
    ]
    Device(gpu, monkeypatch, notes, codes={"operations": 1})
    code, verdict = ended(gpu, capsys, tmp_path, *given)
    assert code == 1
    assert "operations  FAILED: 1 held, 1 failed, 1 not reached;" in verdict
    assert "    t.py::f: AssertionError: 3 of 4096 differ\n" in verdict
    assert "operations: 1 checks from z on: not reached" in verdict


@pytest.mark.parametrize(
    ("name", "notes", "code", "state"),
    [
        ("bits", [note(f"t::{k}") for k in range(6)], 0, "FAILED 6 checks ran, of at least 7"),
        ("kernels", [], 5, "FAILED 0 checks ran, of at least 200"),
        ("loops", [], 5, "FAILED 0 checks ran, of at least 1"),
        ("loops", [], 1, "FAILED its process ended with 1"),
        ("loops", [note("t::a")], 4, "FAILED its process ended with 4"),
        ("loops", [note("t::a")], -11, "FAILED its process ended with -11"),
        ("loops", [note("t::a")], None, "CUT OFF after 220 s"),
        ("loops", [note("t::a"), note("t::a", "failed", "in its teardown")], 1, "FAILED"),
    ],
)
def test_what_is_no_success(gpu, monkeypatch, capsys, tmp_path, name, notes, code, state):
    Device(gpu, monkeypatch, {name: notes}, {name: code})
    result, verdict = ended(gpu, capsys, tmp_path, "--only", name)
    assert result == 1
    assert f"{name:11} {state}: " in verdict
    assert "VERDICT: FAILED (exit code 1)" in verdict


def test_notes_that_were_cut_off_are_read_as_far_as_they_go(gpu, tmp_path):
    path, outcome = tmp_path / "notes", gpu.Outcome()
    path.write_text('{"chosen": ["a", "b"]}\n{"test": "a", "outcome": "passed", "why": ""}\n{"test": "b", "outc')
    outcome.read(path)
    assert (outcome.passed, outcome.unreached) == (["a"], ["b"])
    gpu.Outcome().read(tmp_path / "none")


def test_what_is_refused_before_anything_runs(gpu, monkeypatch, capsys, tmp_path):
    device = Device(gpu, monkeypatch)
    monkeypatch.setattr(gpu.provenance, "commit", lambda: "")
    changed = ["fastdiff/a.py"]
    monkeypatch.setattr(gpu.provenance, "_changed", lambda: changed)
    for arguments, says in [
        (["--only", "bits,looops"], "--only looops: the parts are bits,kernels,tests,"),
        (["--quick", "--device", "cpu"], "give --out"),
        (["--device", "cpu", "--commit", "abc"], "--device cpu goes with --quick"),
        (["--out", str(tmp_path)], "git knows no commit here.*make: COMMIT=HASH"),
        (["--commit", "abc"], r"fastdiff/a.py differ from the last commit: .*\(--out FOLDER\)"),
    ]:
        with pytest.raises(SystemExit) as refused:
            gpu.main(arguments)
        assert refused.value.code == 2
        assert re.search(says, " ".join(capsys.readouterr().err.split()))
    monkeypatch.setattr(gpu.provenance, "commit", lambda: "def")
    monkeypatch.setattr(gpu.provenance, "_changed", lambda: [])
    monkeypatch.setattr(gpu.provenance, "_git", lambda *arguments: "def" if "HEAD" in arguments else "")
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--commit", "abc"])
    assert refused.value.code == 2
    assert "the sources are those of def, not of abc" in " ".join(capsys.readouterr().err.split())
    absent = SimpleNamespace(returncode=1, stdout="", stderr="a\nRuntimeError: no NVIDIA driver\n")
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=lambda *args, **kwargs: absent))
    with pytest.raises(SystemExit) as refused:
        gpu.main(["--out", str(tmp_path), "--commit", "abc"])
    assert refused.value.code == 2
    assert "--device cuda: RuntimeError: no NVIDIA driver; --device cpu --quick --out FOLDER" in capsys.readouterr().err
    assert not device.ran
    assert not list(tmp_path.iterdir())


def test_what_python_lacks_is_said_before_anything_runs(gpu, tmp_path):
    for name in ("pytest", "pytest_benchmark", "tqdm", "safetensors", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({f'No module named {name}'!r})")
        asked = subprocess.run(
            [sys.executable, "-c", gpu.DESCRIBED, "cuda"], env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True,
        )  # fmt: skip
        assert asked.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named {name}"
        (tmp_path / f"{name}.py").unlink()


def test_make_passes_its_variables_on():
    for variables, expected in (
        ([], "benchmarks/gpu.py\n"),
        (["OUT=a b", "COMMIT=abc", "ONLY=bits,tests"], 'gpu.py --out "a b" --commit "abc" --only "bits,tests"\n'),
    ):
        environment = {name: value for name, value in os.environ.items() if name not in ("OUT", "COMMIT", "ONLY")}
        shown = subprocess.run(
            ["make", "--no-print-directory", "-n", "gpu", *variables],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stdout.endswith(expected)


def test_the_library_is_built_of_these_sources(gpu, monkeypatch, tmp_path):
    """A library of others must not pass for it, and what the compiler says is said."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text("int a;")
    library, said = tmp_path / "lib.so", []
    (tmp_path / "setup.py").write_text(
        "import hashlib\n\ndef compile_library(folder, library):\n    print('warning: old compiler')\n"
        "    source = (library.parent / 'csrc' / 'a.cpp').read_bytes()\n"
        "    library.write_text(hashlib.sha256(source).hexdigest()[:16])\n"
    )
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "LIBRARY", library)
    assert gpu.build(said.append) == "lib.so: built"
    assert said == ["warning: old compiler"]
    assert gpu.build(said.append) == "lib.so: there, of these sources"
    (tmp_path / "csrc" / "a.cpp").write_text("int b;")
    (tmp_path / "setup.py").write_text("raise OSError('no C++ compiler')\n")
    assert gpu.build(said.append).startswith("WARNING: the CPU library was not built")
    assert said[-1] == "OSError: no C++ compiler"
    assert not library.exists()


def gone(path):
    """Whether the process whose number a file has is over, in a moment."""
    status = Path("/proc") / path.read_text() / "stat"
    for _ in range(100):
        try:
            if status.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def test_who_hangs_is_ended_with_all_that_it_started(gpu, monkeypatch, tmp_path):
    """A child that hears nothing, and a child of its own."""
    monkeypatch.setattr(gpu, "GRACE", 1.2)
    started, said = tmp_path / "pid", []
    code = (
        "import pathlib, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "child = subprocess.Popen(['sleep', '60']); print('here', flush=True); "
        f"pathlib.Path({str(started)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    began = time.monotonic()
    assert gpu.run([sys.executable, "-c", code], 2.2, said.append) is None
    assert time.monotonic() - began < 10
    assert said == ["here"]
    assert gone(started)
    assert gpu.run([sys.executable, "-c", "print('x'); raise SystemExit(7)"], 30, said.append) == 7
    assert said == ["here", "x"]


def test_who_cannot_be_ended_is_left_behind(gpu, monkeypatch):
    """A process that waits within a driver hears no signal."""

    class Stuck:
        pid, stdout = 2**30, io.StringIO()

        def __init__(self, *args, **options):
            pass

        def wait(self, timeout=None):
            assert timeout is not None
            raise subprocess.TimeoutExpired("stuck", timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Stuck)
    monkeypatch.setattr(gpu.os, "killpg", lambda *args: None)
    assert gpu.run(["stuck"], 6.0, print) is None


def test_the_verdict_is_said_by_who_is_told_to_end(tmp_path):
    """Twice, as make and timeout do."""
    reached = tmp_path / "reached"
    tests = "def test_a(): pass\ndef test_b():\n    import pathlib, os, time\n"
    tests += f"    pathlib.Path({str(reached)!r}).write_text(str(os.getpid()))\n    time.sleep(60)\n"
    (tmp_path / "test_slow.py").write_text(tests)
    given = Namespace(device="cuda", quick=False, only=["bits", "kernels"], out=tmp_path, commit="abc", where="a card")
    script = (
        "import gpu, sys; from argparse import Namespace; from pathlib import PosixPath; gpu.build = lambda say: 'built'; "
        f"gpu.parsed = lambda arguments: ({given!r}, []); "
        f"gpu.Session.arguments = lambda *args: ([{str(tmp_path / 'test_slow.py')!r}], dict()); sys.exit(gpu.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT / "benchmarks",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (reached.exists() and reached.read_text()) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1, output
    verdict = output.partition("VERDICT")[2]
    assert "bits        CUT OFF after " in verdict
    assert ": 1 held, 1 not reached;" in verdict
    assert "kernels: ended by SIGTERM" in verdict
    assert "VERDICT: FAILED (exit code 1)" in verdict
    assert (tmp_path / "gpu.log").read_text() == output
    assert gone(reached)


# --- what is measured ---------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """benchmarks/test_gpu.py as a module, whose marks are those of another folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(pytest.mark, "_config", None)
    import test_gpu

    return test_gpu


def test_graphs_are_timed_where_kernels_are_done_before_the_next_is_launched(measured):
    assert measured.SIZES[0] == 16_777_216 <= measured.LAUNCHED


def test_an_opponent_that_cannot_be_captured_is_left_out(measured, monkeypatch, capsys):
    def replayed(run, calls, device):
        if run is None:
            raise GraphError("operation not permitted")
        return run

    monkeypatch.setattr(measured, "replayed", replayed)
    assert measured.in_graphs({"ours": print, "eager": print, "compiled": None}, 2, None).keys() == {"ours", "eager"}
    assert "compiled cannot be captured: operation not permitted" in capsys.readouterr().out
    with pytest.raises(GraphError):
        measured.in_graphs({"ours": None}, 2, None)


@pytest.mark.parametrize(
    ("ours", "compiled", "held", "text"),
    [
        (
            90.0,
            40.0,
            True,
            "1.50 times as fast as the reduce-overhead loop by fastdiff, torch.compile(net), at least 1",
        ),
        (30.0, 40.0, True, "2.00 times as fast as the reduce-overhead loop, at least 1"),
        (
            90.0,
            70.0,
            False,
            "0.86 times as fast as the reduce-overhead loop by fastdiff, torch.compile(net), at least 1",
        ),
    ],
)
def test_against_a_compiled_loop_the_faster_of_ours_counts(measured, monkeypatch, ours, compiled, held, text):
    import recorder

    times, steps = {"ours": ours, "compiled": compiled, "theirs": 60.0}, 10
    runs = {name: (lambda name=name: name) for name in times}
    contest = SimpleNamespace(
        name="demo U-Net", steps=steps, start=torch.zeros(6), run=lambda steps: runs["ours"],
        theirs=lambda opponent: runs["theirs"], ours_compiled=lambda: runs["compiled"],
    )  # fmt: skip
    monkeypatch.setattr(measured, "contest", lambda *args: contest)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    device = SimpleNamespace(only=lambda **needs: None, quick=True, cuda=True)
    device.watch = SimpleNamespace(whole=lambda run: times[run()] * steps)
    rows, promised = recorder.Recorder(commit="abc"), []
    loop = next(loop for loop in measured.LOOPS if loop.case.startswith("demo"))
    measured.test_loop(device, rows, lambda *args: promised.append(args), measured.COMPILED, loop, torch.float32)
    assert promised == [(held, f"demo U-Net: {text}")]
    found = [(row["case"], row["opponent"], float(row["ours"]), float(row["theirs"])) for row in rows.rows]
    assert found == [
        ("demo U-Net", "reduce-overhead loop", ours, 60.0),
        ("demo U-Net", "fastdiff, torch.compile(net)", ours, compiled),
        ("demo U-Net, torch.compile(net)", "reduce-overhead loop", compiled, 60.0),
    ]


# --- NVIDIA's tools ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nvidia(monkeypatch, tmp_path):
    """benchmarks/nvidia.py, with a folder of tools."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import nvidia

    monkeypatch.setattr(nvidia, "FOLDERS", str(tmp_path))
    return nvidia


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("echo 346 passed; echo '========= ERROR SUMMARY: 0 errors'", None),
        ("echo '========= ERROR SUMMARY: 2 errors'; exit 86", "memcheck: ========= ERROR SUMMARY: 2 errors"),
        ("echo 1 failed; exit 1", "the cases ended with 1: 1 failed"),
        ("exit 5", "the cases ended with 5: nothing was printed"),
    ],
)
def test_what_the_sanitizer_finds_is_a_failure(nvidia, tmp_path, text, found):
    tool(tmp_path, "compute-sanitizer", f"#!/bin/sh\n{text}\n")
    if found is None:
        nvidia.sanitize("memcheck", "cuda", 30)
        return
    with pytest.raises(AssertionError, match=found):
        nvidia.sanitize("memcheck", "cuda", 30)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("compute-sanitizer", None, "compute-sanitizer is not installed"),
        (
            "compute-sanitizer",
            "echo '==== Error: Device not supported'; exit 1",
            "compute-sanitizer does not support this device",
        ),
        ("compute-sanitizer", "sleep 60", "compute-sanitizer took more than 0.5 s"),
        ("ncu", None, "ncu is not installed"),
        ("ncu", "echo '==ERROR== ERR_NVGPUCTRPERM'; exit 1", "ncu read no such counters: ERR_NVGPUCTRPERM"),
        ("ncu", "exit 1", "ncu read no such counters: exit code 1"),
    ],
)
def test_a_tool_that_cannot_serve_says_why(nvidia, tmp_path, name, text, reason):
    if text:
        tool(tmp_path, name, f"#!/bin/sh\n{text}\n")
    ask = nvidia.count if name == "ncu" else nvidia.sanitize
    with pytest.raises(nvidia.Absent) as absent:
        ask(8 if name == "ncu" else "racecheck", "cuda", 0.5)
    assert str(absent.value) == reason


def test_the_sanitized_cases_are_there(nvidia):
    cases = (ROOT / "tests" / "kernel_cases.py").read_text()
    for word in nvidia.CASES.replace("test_step[ and (0] or 5])", "test_step(").split(" or "):
        assert re.search(rf"\ndef test_?\w*{re.escape(word.removeprefix('test'))}", cases), word


# --- predictions -------------------------------------------------------------------------------------------------------


def test_predictions_stand_beside_measurements_and_are_none(gpu):
    import operations
    import predictions
    import recorder

    known = {op.name for op in (*operations.OPS, *operations.OTHERS)}
    assert predictions.KERNELS.keys() <= known
    rows = recorder.Recorder(commit="abc")
    large = predictions.LARGE
    rows.row("gpu ops", "step, bf16 network", large, "us in a graph", [72.0], "eager", [300.0])
    rows.row("gpu ops", "step, bf16 network", large, "us in a graph", [72.0], "another", [300.0])
    rows.row("gpu ops", "step, bf16 network", large, "percent of copy", [81.0])
    rows.row("gpu ops", "step", 8192, "us in a graph", [2.0, 2.0], "eager", [9.0, 9.0])
    rows.row("gpu loops", predictions.UNET, 1024, "us per step", [200.0, 200.0], "eager loop", [900.0, 900.0])
    recorded = list(rows.rows)

    def found(device):
        return [" ".join(line.split()) for line in predictions.beside(device, rows.rows).values()]

    assert found("NVIDIA-H100-80GB-HBM3") == [
        f"step, bf16 network {large:,} us in a graph 72 within: predicted 70 to 73 (H100)",
        f"step, bf16 network {large:,} percent of copy 81 below: predicted 92 to 96 (H100)",
        "step 8,192 us in a graph 2 below: predicted 2.3 to 3.2 (H100)",
        "demo U-Net 16x1x8x8 float32 1,024 x as fast as the eager loop 4.5 above: predicted 3 to 4 (H100)",
    ]
    assert found("NVIDIA-H200") == [
        f"step, bf16 network {large:,} percent of copy 81 below: predicted 89 to 95 (H200)",
        "step 8,192 us in a graph 2 below: predicted 2.3 to 3.2 (H200)",
    ]
    for other, card in (("NVIDIA-H100-PCIe", "H100"), ("NVIDIA-GH200-480GB", "H100"), ("NVIDIA-H200-NVL", "H200")):
        assert all("predicted elsewhere" in line and f"({card})" in line for line in found(other))
    assert all("predicted elsewhere" in line for line in found("Tesla"))
    assert rows.rows == recorded


def test_predictions_are_of_the_present_kernels(gpu):
    """benchmarks/results/aot.csv has the instructions of ten of the thirteen."""
    import predictions

    with (ROOT / "benchmarks" / "results" / "aot.csv").open() as file:
        rows = csv.DictReader(file)
        counted = {row["variant"]: float(row["instructions_per_element"]) for row in reversed(list(rows))
                   if row["target"] == "sm_90"}  # fmt: skip
    variants = {
        "step, bf16 network": "usual, bf16 network", "step, float32 network": "m+noise+net_input",
        "normal": "normal, image", "rademacher": "rademacher, image", "perturb": "perturb, image",
        "dsm_loss": "dsm_loss, image", "rk_error": "rk_error, Dormand-Prince",
        "probe_dot alone, normal": "probe_dot, normal", "probe_dot alone, rademacher": "probe_dot, rademacher",
        "measure_langevin alone": "measure_langevin, image",
    }  # fmt: skip
    for name, variant in variants.items():
        assert math.isclose(predictions.KERNELS[name].instructions, counted[variant], rel_tol=0.03), name


def test_predicted_shares_fall_with_the_load(gpu):
    import predictions

    loads = [k / 20 for k in range(60)]
    shares = [predictions.share(load) for load in loads]
    assert shares == sorted(shares, reverse=True)
    assert {load: predictions.share(load) for load in predictions.SHARES} == predictions.SHARES
    assert predictions.share(0.0) == predictions.SHARES[0.2]
    light, heavy = (predictions.Kernel(count, 12).predicted("H100") for count in (48.2, 150.0))
    assert light == ((70, 73), (93, 97))  # of 67 µs
    assert heavy[1][1] < light[1][0]
