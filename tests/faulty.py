"""Triton kernels that are wrong where they run, in Triton's interpreter; run by test_verify.py in a process of its own.

TRITON_INTERPRET=1 must be set before anything imports triton, so that the kernels run on CPU tensors.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import os
import re
import sys
import warnings

import pytest
import torch
import triton
import triton.errors
import triton.language as tl
from fastdiff.kernels import fill, philox, sums, tiles

import fastdiff
from fastdiff.errors import GraphError
from fastdiff.execution import cpu, noise, ops, questions, reference, verify

step_module = importlib.import_module("fastdiff.kernels.step")
kernels = ops.kernels()


@pytest.fixture(autouse=True)
def new_process(monkeypatch, tmp_path):
    """Nothing has been asked yet, and nothing is remembered. The interpreter's time goes by programs, whatever their size."""
    monkeypatch.setattr(tiles, "QUADS", 1024)
    monkeypatch.setattr(questions, "ENOUGH", 1024)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield
    forget()


def forget(folder=None):
    """As another process begins, with another user's cache if one is named."""
    if folder is not None:
        os.environ["XDG_CACHE_HOME"] = str(folder)
    verify._refused.clear()
    verify._right.clear()
    verify._memory.cache_clear()
    for chosen in verify._chosen:
        chosen.clear()


def edited(function, old, new):
    """A kernel, or a function of one, with other words in its source."""
    text = inspect.getsource(function.fn)
    assert text.count(old) == 1, f"{old!r} does not stand once in\n{text}"
    text, name = text.replace(old, new), f"<{function.fn.__name__}, edited>"
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name  # where Triton looks for it
    scope = dict(vars(sys.modules[function.fn.__module__]))
    exec(compile(text, name, "exec"), scope)
    return scope[function.fn.__name__]


WRONG_RADIUS = edited(philox._radius, "0.9999986", "0.9999987")  # another last place in one coefficient
SHIFTED = edited(fill.normal_kernel, "tiles.pointers(out, at)", "out + at.base + (at.local ^ 1)")
ROUNDED_TWICE = edited(
    step_module.prediction, "tl.fma(kept(m, q), q, kept(x, p) * p)", "kept(m, q) * q + kept(x, p) * p"
)


def fails(error):
    def launch(*args, **kwargs):
        raise error

    return launch


NO_CODE, NO_LAUNCH = triton.errors.TritonError("no such instruction"), RuntimeError("invalid device function")
FAULTS = {
    "a constant": lambda m: m.setattr(philox, "_radius", WRONG_RADIUS),
    "a store": lambda m: m.setattr(fill, "normal_kernel", SHIFTED),
    "a fused product": lambda m: m.setattr(step_module, "prediction", ROUNDED_TWICE),
    "a kernel that does not compile": lambda m: m.setattr(tiles, "launch", fails(NO_CODE)),
    "a kernel that does not launch": lambda m: m.setattr(tiles, "launch", fails(NO_LAUNCH)),
}


def score(x, t):
    return x.clamp(-2, 2) / -2


def draw(backend, **options):
    options = {"sde": "vp", "steps": 3, "shape": (3, 8), "num_samples": 4, **options}
    return fastdiff.sample(score, backend=backend, return_info=True, **options)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_in_one_warning_and_the_right_samples(monkeypatch, fault):
    right, _ = draw("reference")
    FAULTS[fault](monkeypatch)
    with pytest.warns(RuntimeWarning, match="the Triton kernels are not used on cpu") as warned:
        samples, info = draw("triton")
    assert torch.equal(samples, right)
    (warning,) = warned
    assert warning.filename == __file__
    told = str(warning.message)
    if "does not" in fault:
        assert "normal fails with" in told
        assert "no such instruction" in told or "invalid device function" in told
    else:
        numbers = (
            r"(normal|step): \d+ of \d+ numbers of out differ, by up to \S+, first at \[\d+, \d+, \d+\], \S+ instead of"
        )
        assert re.search(numbers, told), told
    assert "plain PyTorch runs there" in told
    assert "`fastdiff doctor --verify`" in told
    assert info.backend == "reference"
    assert info.why.startswith("backend='triton' was requested; ")
    assert "then plain PyTorch: the Triton kernels are not used on cpu" in info.why
    # no second warning, which would be an error: and every other way in
    again, info = draw("triton")
    assert torch.equal(again, right)
    assert info.why.startswith("backend='triton' was requested, but the Triton kernels are not used on cpu")
    assert torch.equal(
        fastdiff.normal(3, (7,), seed=5, backend="triton"), fastdiff.normal(3, (7,), seed=5, backend="reference")
    )
    monkeypatch.setattr(cpu, "available", False)
    assert "not 'triton': the Triton kernels are not used on cpu" in draw("auto")[1].why
    assert "not 'triton': the Triton kernels are not used on cpu" in ops.doctor()


def test_without_a_fault_the_kernels_run():
    right, _ = draw("reference")
    samples, info = draw("triton")
    assert torch.equal(samples, right)
    assert info.backend == "triton"
    assert not verify.refusal(questions.HOST)


def test_a_fault_in_an_adaptive_run_and_in_a_likelihood(monkeypatch):
    """What a solver that chooses its steps runs: rk_error, and the probes' signs."""
    options = {"sampler": "rk45", "steps": None, "shape": (2,)}
    right, _ = draw("reference", **options)
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0))
    likely = {"sde": "vp", "prediction": "score", "rtol": 0.1, "atol": 0.1, "seed": 3, "probes": 1}
    expected = fastdiff.log_likelihood(score, x, backend="reference", **likely)
    monkeypatch.setattr(sums, "rk_kernel", kernel_of_nothing)
    with pytest.warns(RuntimeWarning, match="rk_error: "):
        samples, info = draw("triton", **options)
    assert torch.equal(samples, right)
    assert info.backend == "reference"
    forget()
    with pytest.warns(RuntimeWarning, match="rk_error: "):
        found = fastdiff.log_likelihood(score, x, backend="triton", **likely)
    assert torch.equal(found.nats, expected.nats)


@triton.jit
def kernel_of_nothing(after, sums, x, h, stages, rtol, atol, size, batch, blocks, WEIGHTS: tl.constexpr,
                      ERRORS: tl.constexpr, GROUPS: tl.constexpr, QUADS: tl.constexpr, SAMPLES: tl.constexpr,
                      WHOLE: tl.constexpr):  # fmt: skip
    at = tiles.place(size, batch, GROUPS, QUADS, SAMPLES, WHOLE)
    tl.store(tiles.pointers(after, at), tl.load(tiles.pointers(x, at), mask=at.inside), mask=at.inside)


def test_a_fault_in_a_training_step(monkeypatch, tmp_path):
    """A loss on a device calls the operations by themselves: perturb, dsm_loss and its gradient."""
    x0, t = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), torch.rand(4) * 0.9 + 0.05

    def loss():
        net = fastdiff.networks.MLP((6,), hidden=8, layers=1)
        model = fastdiff.ScoreModel(net, "vp", prediction="eps", data_shape=(6,))
        value = fastdiff.losses.per_sample(model, x0, t, ops.cursor(1, 0, 5), "dsm")
        value.sum().backward()
        return value.detach(), *[p.grad for p in net.parameters()]

    torch.manual_seed(1)
    right = loss()
    monkeypatch.setitem(ops._SERVED, ("cpu", False), ops.backend_module("triton"))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(loss(), right))
    assert {text.partition(" ")[0] for text in verify._right[questions.HOST]} >= {
        "perturb",
        "dsm_loss",
        "dsm_loss_backward",
    }
    forget(tmp_path / "another")
    monkeypatch.setattr(philox, "_radius", WRONG_RADIUS)
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match="the Triton kernels are not used on cpu"):
        found = loss()
    assert all(torch.equal(a, b) for a, b in zip(found, right))


# --- what a question compiles ----------------------------------------------------------------------------------------


def compiled_for(kernel, args, meta):
    """What Triton compiles a kernel for: its tensors' dtypes and alignments, integers that are 1 or divisible by 16."""
    free = {
        "size",
        "batch",
        "stream",
        "rows",
        "length",
        "blocks",
        "numel",
        "half",
        "pitch",
        "divisor",
        "apart",
        "count",
    }
    anywhere = {"cursor", "table", "measured", "first_bad", "sums", "values", "weight", "h", "r", "w"}

    def of(name, value):
        if isinstance(value, torch.Tensor):
            return str(value.dtype), name in anywhere or value.data_ptr() % 16 == 0
        if isinstance(value, tuple):
            return tuple(of(name, each) for each in value)
        if isinstance(value, int) and not isinstance(value, bool) and name not in free:
            return value == 1, value % 16 == 0
        return value is None

    names = list(inspect.signature(kernel.fn).parameters)
    constants = {name: value for name, value in meta.items() if name not in free}
    return kernel.fn.__name__, *[of(name, value) for name, value in zip(names, args)], str(constants)


LAYOUTS = {
    "as it comes": lambda out: out,
    "bfloat16 and channels last": lambda out: out.bfloat16().movedim(1, -1).contiguous().movedim(-1, 1),
    "half of the channels, misaligned": lambda out: torch.cat((out[:, :1], out, out), 1)[:, 1 : 1 + out.shape[1]],
    "one for all": lambda out: out[:1].expand(out.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_question_compiles_nothing_that_the_run_does_not_need(monkeypatch, layout):
    norm = "batch" if layout == "as it comes" else "sample"
    if "half" in layout:  # samples of which a part is compared
        monkeypatch.setattr(questions, "PART", 16)
        monkeypatch.setattr(questions, "_PERIOD", 11)
    asked, run, launch = set(), set(), tiles.launch
    asking = []

    def spy(kernel, grid, like, *args, **meta):
        (asked if asking else run).add(compiled_for(kernel, args, meta))
        return launch(kernel, grid, like, *args, **meta)

    def difference(*args, **kwargs):
        asking.append(1)
        try:
            return known(*args, **kwargs)
        finally:
            asking.pop()

    known = verify.difference
    monkeypatch.setattr(tiles, "launch", spy)
    monkeypatch.setattr(verify, "difference", difference)

    def model(x, t):
        return LAYOUTS[layout](score(x, t))

    corrector = fastdiff.samplers.PredictorCorrector(corrector="langevin", norm=norm)
    options = {"sde": "ve", "sampler": corrector, "steps": 2, "shape": (3, 3, 5), "num_samples": 4, "clip": (-1.0, 1.0)}
    ours = fastdiff.sample(model, backend="triton", **options)
    assert asked == run
    assert {name for name, *_ in asked} >= {"normal_kernel", "step_kernel", "measure_kernel"}
    assert torch.equal(ours, fastdiff.sample(model, backend="reference", **options))


def test_windows_that_overlap_are_no_fault(monkeypatch):
    """Outputs whose entries share memory: what a question writes to one of them stands in others."""

    def model(x, t):
        return score(x, t).flatten(1)[:, :11].unfold(1, 8, 1)

    for part, period in ((questions.PART, questions._PERIOD), (16, 11)):  # compared whole, and in part
        monkeypatch.setattr(questions, "PART", part)
        monkeypatch.setattr(questions, "_PERIOD", period)
        options = {"sde": "vp", "steps": 3, "shape": (4, 8), "num_samples": 4}
        samples, info = fastdiff.sample(model, backend="triton", return_info=True, **options)
        assert info.backend == "triton"
        assert torch.equal(samples, fastdiff.sample(model, backend="reference", **options))


def test_arguments_that_are_refused_are_no_fault():
    module = ops.backend_module("triton")
    x, one = torch.zeros(3, 8), torch.ones(1)
    with pytest.raises((TypeError, ValueError)):
        module.perturb(x.double(), torch.ones(3), torch.ones(3), ops.cursor(0, 0, 0), 2)
    with pytest.raises(ValueError, match="one entry for each of 3 samples"):
        module.perturb(x, one, one, ops.cursor(0, 0, 0), 2)
    with pytest.raises(TypeError):
        module.perturb(x)
    assert not verify.refusal(questions.HOST)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The operations that are asked about."""
    seen, known = [], verify.difference
    monkeypatch.setattr(
        verify, "difference", lambda question, *args: seen.append(question.operation) or known(question, *args)
    )
    return seen


def test_what_was_right_is_remembered(asked, tmp_path):
    def normals(samples, dtype=torch.float32):
        forget()  # another process
        asked.clear()
        return fastdiff.normal(samples, (5,), seed=1, backend="triton")

    right = fastdiff.normal(3, (5,), seed=1)
    assert torch.equal(normals(3), right)
    assert asked == ["normal"]
    (path,) = (tmp_path / "cache" / "fastdiff").iterdir()
    first, *lines = path.read_text().splitlines()
    assert "torch " in first
    assert "triton " in first
    assert "interpreter" in first
    assert len(lines) == 1
    for samples in (3, 2, 1000):
        normals(samples)
        assert asked == []
    normals(1)  # strides of one sample may mean nothing
    assert asked == ["normal"]
    assert len(path.read_text().splitlines()) == 3
    for damage in (
        b"",
        b"\xff\xfe\x00",
        path.read_bytes().replace(b"(5,)", b"(4,)"),
        b"another device\n" + b"\n".join(map(str.encode, lines)),
    ):
        path.write_bytes(damage)
        assert torch.equal(normals(3), right)
        assert asked == ["normal"]
        assert lines[0] in path.read_text().splitlines()
    path.unlink()
    path.mkdir()
    assert torch.equal(normals(3), right)
    assert asked == ["normal"]


def test_a_cache_that_cannot_be_written_is_no_error(asked, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where a folder should be")
    for _ in range(2):
        forget()
        fastdiff.normal(3, (5,), seed=1, backend="triton")
        fastdiff.normal(3, (5,), seed=2, backend="triton")
    assert asked == ["normal", "normal"]


def test_what_was_wrong_is_not_remembered(monkeypatch, tmp_path):
    """A mended driver gets a new chance."""
    with monkeypatch.context() as planted:
        FAULTS["a constant"](planted)
        with pytest.warns(RuntimeWarning, match="not used"):
            draw("triton")
    assert draw("triton")[1].backend == "reference"
    forget()
    assert draw("triton")[1].backend == "triton"


def test_other_kernels_or_settings_are_asked_again(monkeypatch, asked):
    path, environment = verify._memory(kernels, questions.HOST)
    for name, value in (("TRITON_DEFAULT_FP_FUSION", "1"), ("TRITON_INTERPRET", "true")):
        verify._memory.cache_clear()
        monkeypatch.setenv(name, value)
        other, words = verify._memory(kernels, questions.HOST)
        assert other != path
        assert words != environment


def test_where_triton_keeps_its_files_is_no_other_setting(monkeypatch):
    path, _ = verify._memory(kernels, questions.HOST)
    verify._memory.cache_clear()
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere/of/this/job")
    assert verify._memory(kernels, questions.HOST)[0] == path


# --- captures --------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_while_a_graph_is_captured(monkeypatch, asked):
    monkeypatch.setattr(verify, "capturing", lambda device: True)
    fastdiff.normal(3, (5,), seed=1, backend="triton")
    assert asked == []
    monkeypatch.setattr(verify, "capturing", lambda device: False)
    fastdiff.normal(3, (5,), seed=1, backend="triton")
    assert asked == ["normal"]


def test_plain_pytorch_in_the_place_of_kernels_is_not_captured(monkeypatch):
    FAULTS["a constant"](monkeypatch)
    out, module = torch.empty(3, 50), ops.backend_module("triton")
    with pytest.warns(RuntimeWarning, match="not used"):
        module.normal(out, ops.cursor(0, 0, 0), noise.PRIOR)
    expected = torch.empty(3, 50)
    reference.normal(expected, ops.cursor(0, 0, 0), noise.PRIOR)
    assert torch.equal(out, expected)
    monkeypatch.setattr(verify, "capturing", lambda device: True)
    with pytest.raises(GraphError, match="in the place of refused kernels"):
        module.normal(out=out, cursor=ops.cursor(0, 0, 0), stream=noise.PRIOR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = module.prepare_step(out, torch.zeros(1, 19), None, out)
        with pytest.raises(GraphError, match="in the place of refused kernels"):
            step(ops.cursor(0, 0, 0), None, None)
