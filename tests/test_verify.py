"""Backends are asked before they are used: the compiled library when it is loaded, the Triton kernels where they first run, and
all of them by `fastdiff doctor --verify`. Kernels with faults are in faulty.py."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from watching import Names

import fastdiff
from fastdiff.cli import commands, verification
from fastdiff.errors import GraphError
from fastdiff.execution import cpu, graphs, ops, questions, reference, verify

sys.path.insert(0, str(Path(__file__).parent.parent))
import setup

ROOT = Path(__file__).parent.parent
CHOSEN = cpu.instruction_set
X86 = platform.machine().lower() in ("x86_64", "amd64")
CPUINFO = Path("/proc/cpuinfo")
FMA4 = not CPUINFO.exists() or "fma4" in CPUINFO.read_text()


def python(code, library=None, **environment):
    """Run Python with another build of the library."""
    named = {} if library is None else {"FASTDIFF_LIBRARY": str(library)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **named, **environment}
    )


class Pointwise(torch.nn.Module):
    def forward(self, x, t):
        return x.clamp(-2, 2) / -2


# --- the compiled library --------------------------------------------------------------------------------------------


def test_the_known_answers_are_the_references_on_every_instruction_set():
    assert verify.checksum(reference) == verify.KNOWN
    for name in cpu.INSTRUCTION_SETS:
        if cpu.use(name):
            assert verify.checksum(cpu) == verify.KNOWN, name
    cpu.use(CHOSEN)
    assert {question.operation for question, _ in verify.known()} == set(ops.SCHEMAS)
    assert not verify.library_fault()


def test_they_are_the_same_whatever_the_caller_is_in():
    """A first import may stand anywhere."""
    with FakeTensorMode():
        assert verify.checksum(cpu) == verify.KNOWN
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu"):
        assert verify.checksum(cpu) == verify.KNOWN
    with Names() as names:
        assert verify.checksum(cpu) == verify.KNOWN
    assert not names.seen
    torch.set_default_dtype(torch.float64)
    try:
        assert verify.checksum(cpu) == verify.KNOWN
    finally:
        torch.set_default_dtype(torch.float32)
    if torch.set_flush_denormal(True):
        try:
            assert verify.checksum(cpu) == verify.KNOWN
            assert cpu.flushes_subnormals()
        finally:
            torch.set_flush_denormal(False)


def nudged(function, result=None):
    """An operation whose first number is one last place off, or whose subnormal numbers are gone."""

    def wrong(*args, **kwargs):
        returned = function(*args, **kwargs)
        value = kwargs["out"] if returned is None else returned
        first = value.view(-1)[:1]
        first.copy_(first.nextafter(torch.full_like(first, 9.0)))
        return returned

    return wrong


@pytest.mark.parametrize(
    "name", ["normal", "rademacher", "step", "perturb", "dsm_loss_backward", "timestep_embedding", "probe_dot"]
)
def test_one_wrong_number_is_found_and_named(monkeypatch, name):
    monkeypatch.setattr(cpu, name, nudged(getattr(cpu, name)))
    told = verify.library_fault()
    assert told.startswith(f"{name}: 1 of ")
    assert "first at [0" in told
    assert "instead of" in told


def test_a_library_that_fails_is_named(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("torch's loop over threads failed")

    monkeypatch.setattr(cpu, "rk_error", fails)
    assert verify.library_fault() == "rk_error fails with RuntimeError: torch's loop over threads failed"


@pytest.fixture(scope="module")
def fast_math(tmp_path_factory):
    """A build with CXXFLAGS=-ffast-math, at -Og, which takes a sixth of the time of -O3."""
    library = tmp_path_factory.mktemp("fast") / "lib" / "libfastdiff.so"
    library.parent.mkdir(mode=0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "LAST", "-Og")
        setup.compile_library(library.parent.parent / "build", library, "-ffast-math")
    return library


@pytest.mark.slow
def test_a_build_with_fast_math_gives_no_samples(fast_math):
    code = """if True:
        import sys, torch
        import fastdiff, fastdiff.cli
        from fastdiff.cli import verification
        verification.SHAPES = ((3, 5, 9), (2, 2053))
        tiny = sys.float_info.min
        x, info = fastdiff.sample(lambda x, t: -x, "vp", 4, shape=(3,), num_samples=2, return_info=True)
        print(info.backend, x.tolist(), tiny / 2 > 0, (torch.tensor(1e-40) * 1).item() > 0)
        print(info.why)
        sys.exit(fastdiff.cli.main(["doctor", "--verify"]))
    """
    done = python(code, fast_math)
    assert done.returncode == 1, done.stderr
    (warned,) = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert "fastdiff runs on plain PyTorch, several times slower: libfastdiff.so gives wrong numbers: " in warned
    assert " numbers of " in warned
    assert " instead of " in warned
    assert "without CXXFLAGS" in warned
    expected = fastdiff.sample(lambda x, t: -x, "vp", 4, shape=(3,), num_samples=2)
    # what gcc links into such a library makes the thread that loads it flush subnormal numbers
    first, why, *report = done.stdout.splitlines()
    assert first == f"reference {expected.tolist()} True True"
    assert "not 'cpu': the compiled library is refused (libfastdiff.so gives wrong numbers" in why
    assert any(line.split() == ["rademacher", *["right"] * len(verification.backends()[0])] for line in report)
    assert any(line.startswith("step ") and "WRONG" in line for line in report)
    assert any(line.startswith(f"WRONG: cpu {CHOSEN}: step: ") for line in report)
    assert "not all is right: " in report[-1]
    assert report[-1].endswith("if that is no cure, please report this")


@pytest.mark.skipif(not X86, reason="names instruction sets of x86")
@pytest.mark.skipif(FMA4, reason="this processor may have FMA4")
def test_a_build_for_another_processor_is_refused_before_it_runs(tmp_path):
    """Of FMA4, which Intel never had and AMD has no more."""
    rest = "".join(
        f"int fastdiff_run_{name}(int, const long*, bool) {{ __builtin_trap(); }}" for name in cpu.INSTRUCTION_SETS
    )
    (tmp_path / "rest.cpp").write_text(rest)
    library = tmp_path / "lib" / "other.so"
    library.parent.mkdir(mode=0o755)
    named = f'-DFASTDIFF_SOURCES="{cpu._sources().decode()}"'
    sources = [str(ROOT / "csrc" / "fastdiff.cpp"), str(tmp_path / "rest.cpp")]
    command = [os.environ.get("CXX", "g++"), "-mfma4", "-shared", "-fPIC", named, *sources, "-o", str(library)]
    subprocess.run(command, check=True)
    done = python("import fastdiff; print(fastdiff.execution.cpu.why)", library)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "other.so was compiled for processors with fma4, which this one lacks"
    assert "fastdiff runs on plain PyTorch" in done.stderr


def test_cxxflags_follow_fastdiffs_own_and_win(tmp_path):
    setup.write_build(tmp_path, tmp_path / "x.so", "g++", "-ffast-math -O0")
    (flags,) = [
        line.split() for line in (tmp_path / "build.ninja").read_text().splitlines() if line.startswith("flags")
    ]
    assert flags.index("-ffast-math") > flags.index("-ffp-contract=off")
    assert flags[-1] == "-O3"  # the library is several times slower without
    assert "-fno-fast-math" not in flags


# --- questions -------------------------------------------------------------------------------------------------------


def test_a_question_has_the_layouts_alignments_and_overlaps_of_the_call():
    x = torch.empty(5, 3, 4, 4)
    half = torch.empty(5, 6, 4, 4, dtype=torch.bfloat16)[:, 3:]
    given = {
        "out": x, "table": torch.empty(7, 19), "cursor": torch.empty(3, dtype=torch.int64), "stream": 1, "x": x, "m": half,
        "history": [torch.empty(1 + x.numel())[1:].view_as(x)], "known": torch.empty(1, 3, 4, 4).expand_as(x),
        "mask": torch.empty(5, 4, 4, 3, dtype=torch.bool).movedim(-1, 1), "first_bad": torch.empty(5, dtype=torch.int64),
    }  # fmt: skip
    question = questions.Question.like("step", given)
    made, plain = question.operands(0, questions.HOST), question.operands(0, None)
    assert made["out"] is made["x"]
    assert made["stream"] == 1
    assert made["table"].shape == (3, 19)
    for ours, theirs in ((made["m"], half), (made["history"][0], given["history"][0]), (made["mask"], given["mask"])):
        assert (ours.dtype, ours.stride(), ours.data_ptr() % 16) == (
            theirs.dtype,
            theirs.stride(),
            theirs.data_ptr() % 16,
        )
    assert made["known"].stride() == given["known"].stride()
    assert made["m"].shape == (question.samples, 3, 4, 4)
    for name in ("x", "m", "known", "mask"):
        assert torch.equal(made[name].contiguous().nan_to_num(7.0), plain[name].nan_to_num(7.0))
        assert plain[name].is_contiguous()
    odd = made["x"][1]
    assert bool(odd.isnan().any())
    assert bool(odd.isinf().any())
    assert bool(((odd != 0) & (odd.abs() < 1e-38)).any())
    assert bool(made["x"][0].isfinite().all())


def test_large_samples_are_compared_in_part():
    cursor = torch.empty(3, dtype=torch.int64)
    shape = (2, questions.PART + 100)
    columns = {"alpha": torch.empty(2), "sigma": torch.empty(2)}
    question = questions.Question.like("perturb", {"x0": torch.empty(shape), **columns, "cursor": cursor, "stream": 0})
    right = questions.right_answers(question)
    assert right[0]["the result"].shape == (2, questions.PART)
    assert questions.difference(question, cpu.perturb, questions.HOST, right) == ""
    assert "1 of 131072" in questions.difference(question, nudged(cpu.perturb), questions.HOST, right)
    too_large = torch.empty(1).expand(1, questions.MOST + 1)
    assert (
        questions.Question.like("probe_dot", {"value": too_large, "cursor": cursor, "stream": 0, "kind": "normal"})
        is None
    )
    assert questions.Question.like("normal", {"out": torch.empty(3, 0), "cursor": cursor, "stream": 0}) is None


@pytest.mark.parametrize(
    ("system", "variables", "folder"),
    [
        ("linux", {"XDG_CACHE_HOME": "/somewhere"}, "/somewhere"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "/home/me/.cache"),
        ("linux", {}, "/home/me/.cache"),
        ("darwin", {}, "/home/me/Library/Caches"),
    ],
)
def test_the_users_cache(monkeypatch, system, variables, folder):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert verify._folder() == Path(folder)


# --- the Triton kernels ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, which is for Linux")
def test_kernels_with_faults(tmp_path):
    if not verify.interpreter_rounds_once():
        pytest.skip("this Triton's interpreter rounds an fma twice: its kernels are not asked")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/faulty.py", "-q", "-p", "no:cacheprovider", "--tb=short"], cwd=ROOT,
        env={**inherited, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout


@pytest.mark.gpu
def test_a_device_is_asked_once(monkeypatch, tmp_path):
    """Compiled kernels where they run: right, remembered, and not asked again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked, difference = [], verify.difference
    monkeypatch.setattr(verify, "difference", lambda *args: asked.append(args) or difference(*args))
    for turn in range(2):
        monkeypatch.setattr(verify, "_right", {})
        verify._memory.cache_clear()
        for chosen in verify._chosen:
            chosen.clear()
        asked.clear()
        options = {"shape": (3, 11), "num_samples": 4, "return_info": True}
        x, info = fastdiff.sample(Pointwise(), "vp", 6, device="cuda", engine="eager", **options)
        assert info.backend == "triton", info.why
        assert torch.equal(x.cpu(), fastdiff.sample(Pointwise(), "vp", 6, backend="reference", **options)[0])
        assert bool(asked) == (turn == 0)
    verify._memory.cache_clear()


def faulty_kernels():
    """The compiled library in the place of kernels, one number of a step off."""
    kernels = ModuleType("kernels")
    kernels.KEEPS_NOISE, kernels.__file__ = True, verify.__file__
    for name in verify.OPERATIONS:
        setattr(kernels, name, getattr(cpu, name))
    kernels.step = nudged(cpu.step)
    kernels.prepare_step = lambda out, table, stream, x, **operands: (
        lambda cursor, m, v: kernels.step(out=out, table=table, cursor=cursor, stream=stream, x=x, m=m, v=v, **operands)
    )
    return kernels


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing has been asked or remembered; the kernels of these tests are Python, whatever Triton's interpreter rounds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(verify, "interpreter_rounds_once", lambda: True)
    for name, value in (("_refused", {}), ("_right", {}), ("_chosen", [])):
        monkeypatch.setattr(verify, name, value)
    verify._memory.cache_clear()
    yield
    verify._memory.cache_clear()


def test_each_kind_of_output_is_asked_about_once(fresh, monkeypatch):
    """A kernel is compiled for layouts and alignments, which a network may change in the midst of a run."""
    asked = []

    def noting(kernels, name, called, kernel, args, kwargs):
        m = args[5] if name == "step" else args[0]
        asked.append((called, m.dtype, m.stride(), m.data_ptr() % 16))
        return True

    monkeypatch.setattr(verify, "_may_run", noting)
    module = verify.proving(faulty_kernels())
    x, m = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    outputs = (
        m, m.to(memory_format=torch.channels_last), torch.ones(1 + m.numel())[1:].view_as(m), m.bfloat16(),
    )  # fmt: skip
    step = module.prepare_step(x, torch.zeros(1, 19), None, x)
    for _ in range(2):
        for output in outputs:
            step(torch.tensor([0, 0, 0]), output, None)
            module.probe_dot(output, torch.tensor([0, 0, 0]), 3, "normal")
    assert len(asked) == len(set(asked)) == 2 * len(outputs)


def test_a_prepared_step_of_refused_kernels_goes_on_in_plain_pytorch(fresh):
    """Its own answers were right; another operation's were not."""
    kernels, stepped = faulty_kernels(), []
    kernels.step = cpu.step
    prepare = kernels.prepare_step

    def prepare_step(*args, **operands):
        run = prepare(*args, **operands)
        return lambda *now: stepped.append(1) or run(*now)

    kernels.prepare_step, kernels.normal = prepare_step, nudged(cpu.normal)
    module = verify.proving(kernels)
    x, cursor = torch.ones(2, 3), torch.tensor([0, 0, 0])
    step = module.prepare_step(x, torch.ones(1, 19), None, x)
    step(cursor, x.clone(), None)
    stepped.clear()
    step(cursor, x.clone(), None)
    assert stepped == [1]
    with pytest.warns(RuntimeWarning, match="the Triton kernels are not used on cpu"):
        module.normal(x, cursor, 1)
    step(cursor, x.clone(), None)
    assert stepped == [1]


def test_what_kernels_are_compiled_for_is_told_apart(fresh, monkeypatch):
    asked = []
    monkeypatch.setattr(verify, "_may_run", lambda kernels, name, *rest: asked.append(name) or True)
    module = verify.proving(faulty_kernels())
    x, column, cursor = torch.zeros(3, 4), torch.ones(3), torch.tensor([0, 0, 0])
    misaligned = torch.zeros(13)[1:].view(3, 4)
    for batch in (False, True):
        module.measure_langevin(torch.zeros(3, 2), torch.zeros(1, 19), cursor, 1, batch, x, x)
    for clean in (x, misaligned):
        module.dsm_loss(x, clean, column, column, column, cursor, 1)
    for stage in (x, x.bfloat16()):
        module.rk_error(x, [x, stage], column, (0.5, 0.5), (0.1, 0.2), 1e-3, 1e-3)
    assert [asked.count(name) for name in ("measure_langevin", "dsm_loss", "rk_error")] == [2, 2, 2]


def test_the_launch_that_is_bound_is_asked(fresh):
    """The second of a prepared step, and of every operation: what is bound by the first is what a run repeats."""
    kernels, right = faulty_kernels(), cpu.prepare_step

    def prepare_step(out, *rest, **operands):
        step, calls = right(out, *rest, **operands), []

        def run(cursor, m, v):
            step(cursor, m, v)
            calls.append(1)
            if len(calls) > 1:
                out.view(-1)[:1].add_(1.0)

        return run

    kernels.prepare_step = prepare_step
    x, m = torch.zeros(2, 3, 40, 40), torch.ones(2, 3, 40, 40)
    with pytest.warns(RuntimeWarning, match="the Triton kernels are not used on cpu .*step: 1 of "):
        verify.proving(kernels).prepare_step(x, torch.zeros(1, 19), 1, x)(torch.tensor([0, 0, 0]), m, None)
    question = questions.Question.like("normal", {"out": x, "cursor": torch.zeros(3, dtype=torch.int64), "stream": 1})
    assert question.rounds >= 2


def test_refused_kernels_are_not_captured(fresh, monkeypatch):
    """They are asked in the warm-up; the capture then fails, and the run goes on eagerly, without a second warning."""
    capturing = []

    def capture(warm, bodies, device):
        warm()
        capturing.append(1)
        try:
            bodies[0]()
        except GraphError as error:
            raise GraphError(str(error)) from error
        finally:
            capturing.clear()

    known, module = graphs.obstacle, verify.proving(faulty_kernels())
    options = {"shape": (3, 5), "num_samples": 4, "return_info": True}
    right, _ = fastdiff.sample(Pointwise(), "vp", 6, backend="reference", **options)
    monkeypatch.setattr(verify, "capturing", lambda device: bool(capturing))
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(graphs, "obstacle", lambda net, device, *rest: known(net, torch.device("cuda"), *rest))
    monkeypatch.setattr(ops, "backend_module", lambda name: module)
    net = Pointwise()
    with pytest.warns(RuntimeWarning, match=r"the Triton kernels are not used on cpu.*step: 1 of ") as warned:
        samples, info = fastdiff.sample(net, "vp", 6, **options)
    assert len(warned) == 1
    assert torch.equal(samples, right)
    assert info.engine == "eager"
    assert "its loop runs eagerly: the Triton kernels are not used on cpu" in info.why
    with pytest.raises(GraphError, match=r"the Triton kernels are not used on cpu.*: use engine='auto' or 'eager'"):
        fastdiff.sample(net, "vp", 6, engine="graph", **options)


# --- fastdiff doctor --verify ----------------------------------------------------------------------------------------


def test_doctor_verifies_all_that_is_there(capsys):
    assert commands.main(["doctor", "--verify"]) == 0
    assert cpu.instruction_set == CHOSEN
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    for words in (f"fastdiff {fastdiff.__version__}, Python {platform.python_version()}", f"torch {torch.__version__}"):
        assert words in shown
    if torch.cuda.is_available():
        assert "graphs: captured, replayed and equal to eager runs" in lines
        return
    names = [f"cpu {name}" for name in cpu.INSTRUCTION_SETS if cpu.use(name)]
    cpu.use(CHOSEN)
    assert [line for line in lines if line.split() == " ".join(names).split()]
    for name in ops.SCHEMAS:
        assert any(line.split() == [name, *["right"] * len(names)] for line in lines), name
    assert "plain PyTorch: right" in lines
    assert "graphs: not tried, as CUDA graphs need a CUDA device" in lines
    assert "not tried: triton: " in shown
    assert lines[-1].endswith("all that could be tried is right")
    assert not [line for line in lines if "WRONG" in line]


def test_doctor_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(verification, "SHAPES", ((3, 5),))
    monkeypatch.setattr(cpu, "perturb", nudged(cpu.perturb))
    assert commands.main(["doctor", "--verify"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"WRONG: cpu {CHOSEN}: perturb: 1 of" in "\n".join(lines)
    assert any(line.split()[:2] == ["perturb", "WRONG"] for line in lines)
    assert any(line.split()[:2] == ["step", "right"] for line in lines)
    monkeypatch.undo()
    monkeypatch.setattr(verification, "SHAPES", ((3, 5),))
    for name, value in (("available", False), ("why", "libfastdiff.so gives wrong numbers")):
        monkeypatch.setattr(cpu, name, value)
    assert commands.main(["doctor", "--verify"]) == 1  # refused by questions that are not among these
    assert "not all is right" in capsys.readouterr().out


def test_doctor_without_a_library(monkeypatch, capsys):
    monkeypatch.setattr(verification, "SHAPES", ((3, 5),))
    for name, value in (
        ("loaded", False),
        ("available", False),
        ("why", "it is not here"),
        ("LIBRARY", Path("/nowhere")),
    ):
        monkeypatch.setattr(cpu, name, value)
    assert commands.main(["doctor", "--verify"]) == 1
    shown = capsys.readouterr().out
    assert "not tried: cpu: it is not here" in shown
    assert shown.splitlines()[-1].endswith(f"no kernel could be asked, and plain PyTorch runs: {cpu.way_out}")
    monkeypatch.setattr(cpu, "LIBRARY", Path(__file__))  # a library that is there, and cannot be loaded
    assert commands.main(["doctor", "--verify"]) == 1


@pytest.mark.parametrize("fault", [None, "samples", "failure"])
def test_doctor_compares_replayed_runs(monkeypatch, fault):
    """With samples of the CPU in the place of a device's."""

    def sample(*args, engine="auto", device=None, backend="auto", **options):
        assert device in (None, "cuda:0")
        x = fastdiff.sample(*args, engine="eager", **options)
        if engine == "graph" and fault == "failure":
            raise GraphError("operation not permitted")
        return x + 0.5 if engine == "graph" and fault == "samples" else x

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(verification, "sample", sample)
    told, wrong = verification.graphs()
    assert wrong == (fault is not None)
    expected = {None: "captured, replayed and equal", "samples": "is 0.5 from", "failure": "fails: operation not"}[
        fault
    ]
    assert expected in told
    assert ("euler_maruyama with engine='graph' on cuda:0" in told) == wrong
