"""The commands, as real processes; and the demo, made small, to its pictures and report."""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import math
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff import files
from fastdiff.cli import commands, demo, demo_control, demo_flow
from fastdiff.execution import cpu
from fastdiff.networks import MLP


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fastdiff.cli", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def call(*arguments, cwd):
    """The same within this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = commands.main([str(argument) for argument in arguments])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def test_train_sample_and_plan(tmp_path):
    data = np.random.default_rng(0).uniform(-1, 1, (40, 2)).astype(np.float32)
    np.save(tmp_path / "data.npy", data)
    first = run("train", "data.npy", "--out", "run", "--steps", 5, "--batch-size", 8, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "step 5" in first.stdout
    again = call("train", "data.npy", "--out", "run", "--steps", 8, "--batch-size", 8, cwd=tmp_path)
    assert "step 8" in again.stdout
    drawn = run("sample", "run", "--steps", 4, "-n", 3, "--out", "x.npy", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    model = fastdiff.load(tmp_path / "run")
    assert model.data_range == (float(data.min()), float(data.max()))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), fastdiff.sample(model, steps=4, num_samples=3).numpy())
    planned = call("plan", "vp", 5, "--plot", "plan.png", cwd=tmp_path)
    assert planned.stdout.strip() == fastdiff.plan("vp", 5).explain()
    assert (tmp_path / "plan.png").stat().st_size > 10_000


@pytest.mark.parametrize("command", ["sample", "train", "likelihood", "check"])
def test_an_unknown_device_is_refused(command, tmp_path, capsys):
    pairs(tmp_path)
    of = (
        ["digits-vp"]
        if command == "sample"
        else [tmp_path / "data.npy"]
        if command == "train"
        else ["digits-vp", "--data", "digits"]
    )
    more = ["--out", tmp_path / "run", "--steps", 2] if command == "train" else []
    assert commands.main([command, *map(str, [*of, *more]), "--device", "gpu"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"fastdiff {command}: --device gpu cannot be used here: it must be 'cpu', or 'cuda' where torch sees"
    )
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_warning_is_a_line_without_code(tmp_path):
    done = run("sample", "digits-vp", "--steps", 3, "-n", 2, "--out", tmp_path / "x.npy")
    assert done.returncode == 0
    assert re.fullmatch(r"fastdiff sample: the samples run from .*: take --clip=-1,1, .* or --clip data\n", done.stderr)


def pairs(folder):
    np.save(folder / "data.npy", np.random.default_rng(0).uniform(-1, 1, (40, 2)).astype(np.float32))


def test_the_seed_reaches_the_first_weights(tmp_path):
    pairs(tmp_path)
    before, found = torch.get_rng_state(), []
    for k, seed in enumerate((3, 3, 4)):
        torch.manual_seed(k)
        given = [
            "train",
            str(tmp_path / "data.npy"),
            "--out",
            str(tmp_path / str(k)),
            "--steps",
            "1",
            "--seed",
            str(seed),
        ]
        state = torch.get_rng_state()
        assert commands.main(given) == 0
        assert torch.equal(torch.get_rng_state(), state)
        net = fastdiff.load(tmp_path / str(k)).net
        found.append(torch.cat([p.flatten() for p in net.parameters()]))
    torch.set_rng_state(before)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_training_without_a_terminal_prints_its_loss(tmp_path):
    pairs(tmp_path)
    done = run("train", "data.npy", "--out", "run", "--steps", 250, "--batch-size", 4, cwd=tmp_path)
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"step 100 of 250: loss \d+\.\d{4}", lines[0])
    assert re.fullmatch(r"step 250 of 250: loss \d+\.\d{4}", lines[-1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_training_with_its_last_step_saved(number, code, tmp_path):
    pairs(tmp_path)
    given = ["train", "data.npy", "--out", "run", "--batch-size", "4", "--steps"]
    command = [sys.executable, "-m", "fastdiff.cli", *given, "1000000"]
    heard = [
        sys.executable,
        "-c",
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])",
    ]  # jobs in the background ignore SIGINT, and so do their children
    with subprocess.Popen(
        heard + command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert "step 100 " in process.stderr.readline()
        process.send_signal(number)
        printed, said = process.communicate()
    assert process.returncode == code
    step = int(re.search(rf"{number.name}: saved at step (\d+)", said)[1])
    assert f"step {step} after" in printed
    assert 100 <= step < 1_000_000
    again = call(*given, step + 1, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"step {step + 1} after" in again.stdout


def test_signal_handlers_are_given_back_and_a_second_signal_is_the_callers(tmp_path, monkeypatch, request):
    pairs(tmp_path)
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    given = ["train", str(tmp_path / "data.npy"), "--out", str(tmp_path / "run"), "--steps", "200"]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def twice(steps):
        return lambda step, loss: [signal.raise_signal(signal.SIGINT) for _ in range(2)]

    monkeypatch.setattr(commands, "_said", twice)
    assert commands.main(given) == 130
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()  # step 100 was under way


def vectors(folder, **options):
    """A saved model of pairs of numbers, and such pairs."""
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(
        MLP((2,), hidden=16, layers=1, **options), "vp", data_shape=(2,), data_range=(-1.0, 1.0)
    )
    fastdiff.save(model, folder / "model")
    x = np.random.default_rng(1).uniform(-1, 1, (9, 2)).astype(np.float32)
    np.save(folder / "x.npy", x)
    return model.eval(), x


def test_likelihood_of_continuous_data(tmp_path, monkeypatch):
    model, x = vectors(tmp_path)
    done = call("likelihood", "model", "--data", "x.npy", "--out", "ll.npz", "--t-min", 1e-3, "--seed", 4, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    monkeypatch.chdir(tmp_path)
    given = ["likelihood", "model", "--data", "x.npy", "--t-min", "1e-3", "--seed", "4", "-n", "4"]
    for first in ("0", "4", "8"):
        assert commands.main([*given, "--out", f"{first}.npz", "--first-sample", first]) == 0
    expected = fastdiff.log_likelihood(model, torch.from_numpy(x), probes=2, t_min=1e-3, seed=4)
    found = np.load(tmp_path / "ll.npz")
    assert sorted(found) == ["latent", "nats", "nfe", "stderr"]
    for name in found:
        np.testing.assert_allclose(found[name], getattr(expected, name).numpy(), rtol=1e-9)
        parts = np.concatenate([np.load(tmp_path / f"{first}.npz")[name] for first in (0, 4, 8)])
        # the network's float32 rounding differs with the batch, and the probes' spread may be as small as that
        np.testing.assert_allclose(parts, found[name], rtol=1e-3, atol=1e-3)
    mean, error = expected.nats.mean(), expected.nats.std() / 3
    for words in (
        "samples 0 to 8, in their own units",
        f"{mean:.2f} ± {error:.2f} nats, {mean / 2:.4f} ± {error / 2:.4f} nats/dim",
        "bits/dim        none: the data are continuous",
        f"{expected.stderr.square().mean().sqrt():.2f} nats standard error",
        f"{expected.nfe.double().mean():.0f} in the mean, at most {expected.nfe.max()}",
    ):
        assert words in done.stdout


def test_likelihood_of_discrete_data(tmp_path):
    few = ["likelihood", "digits-vp", "--data", "digits", "--rtol", 1e-2, "--atol", 1e-2]
    done = call(*few, "-n", 3, "--first-sample", 1795, "--seed", 5, "--out", "ll.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model, data = fastdiff.load("digits-vp"), fastdiff.load_data("digits")
    x = fastdiff.dequantize(data.x[1795:].long(), (-1, 1), 17, seed=5, first_sample=1795).float()
    nats = fastdiff.log_likelihood(model, x, probes=2, rtol=1e-2, atol=1e-2, seed=5, first_sample=1795).nats
    found = np.load(tmp_path / "ll.npz")
    # the two round x differently, and a step refused for that moves a likelihood by hundredths at this tolerance; other
    # probes move it by nats
    np.testing.assert_allclose(found["nats"], nats, atol=0.1)
    bits = (-found["nats"] / math.log(2) + 64 * math.log2(17 / 2)) / 64
    np.testing.assert_allclose(found["bits_per_dim"], bits, rtol=1e-12)
    assert f"{bits.mean():.4f} ± {abs(bits[0] - bits[1]) / 2:.4f}\n" in done.stdout  # of two, as many as there are
    assert (
        "samples 1795 to 1796, dequantised uniformly within 17 levels, in the model's data_range -1 to 1" in done.stdout
    )


def test_likelihood_given_the_labels(tmp_path):
    model, x = vectors(tmp_path, num_classes=3)
    y = torch.arange(9) % 3
    np.savez(tmp_path / "xy.npz", x=x, y=y.numpy())
    given = ["--t-min", 1e-2, "--trace", "exact"]
    done = call("likelihood", "model", "--data", "xy.npz", "--out", "ll.npz", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = fastdiff.log_likelihood(model, torch.from_numpy(x), trace="exact", t_min=1e-2, cond={"y": y}).nats
    np.testing.assert_allclose(np.load(tmp_path / "ll.npz")["nats"], expected, rtol=1e-9)
    assert "exact: no probes" in done.stdout
    refused = call("likelihood", "model", "--data", "x.npy", cwd=tmp_path)
    assert "data must have labels of the model's 3 classes, got no labels" in refused.stderr


def test_a_progress_bar_on_a_terminal_alone(tmp_path):
    vectors(tmp_path)
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    command = [sys.executable, "-m", "fastdiff.cli", "likelihood", "model", "--data", "x.npy", "--t-min", "0.01"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=end) as process:
        shown = os.read(terminal, 4096).decode()
        printed = process.stdout.read().decode()
    os.close(end)
    os.close(terminal)
    assert process.returncode == 0
    assert "likelihood:   0%" in shown
    assert "/9 [" in shown
    assert "likelihood:" not in printed
    assert "\r" not in printed


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros((5, 3), np.float32), "data must have the model's shape [2], got [3]"),
        (np.zeros((5, 2, 2), np.float32), "data must have the model's shape [2], got [2, 2]"),
        (np.linspace(0, 8, 10, dtype=np.float32).reshape(5, 2), "ran from -1 to 1, got 0 to 8"),
        (np.full((5, 2), np.nan, np.float32), "x must be finite"),
    ],
)
def test_likelihood_refuses_data_that_do_not_fit(data, words, tmp_path, capsys):
    vectors(tmp_path)
    np.save(tmp_path / "other.npy", data + np.linspace(0, 1e-3, data.size).reshape(data.shape).astype(np.float32))
    given = ["likelihood", str(tmp_path / "model"), "--data", str(tmp_path / "other.npy")]
    assert commands.main([*given, "--out", str(tmp_path / "ll.npz")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "ll.npz").exists()


@pytest.mark.parametrize(
    "options",
    [
        *(f"--loss {loss}" for loss in fastdiff.losses.LOSSES if loss not in fastdiff.losses.BOUNDED),
        *("--loss vlb --sde ddpm", "--sde ddpm --variance learned", "--sde ddpm --loss vlb --variance learned_range"),
        *(f"--weight {weight}" for weight in fastdiff.losses.weights.WEIGHTS),
        *(f"--times {rule}" for rule in fastdiff.losses.times.TIMES),
        *(f"--truncation {name}" for name in fastdiff.losses.times.TRUNCATIONS),
    ],
)
def test_every_objective_is_trained_by_its_name(options, tmp_path, capsys):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).uniform(-1, 1, (40, 2)))
    data, out = str(tmp_path / "data.npy"), str(tmp_path / "run")
    assert commands.main(["train", data, "--out", out, "--steps", "2", "--batch-size", "8", *options.split()]) == 0
    assert "step 2" in capsys.readouterr().out


def test_data_to_train_on_are_named_once(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--steps", "1", "--network", "mlp", "--batch-size", "4"]
    assert commands.main(["train", "--data", "digits", *arguments]) == 0
    capsys.readouterr()
    for wrong in (["train"], ["train", "digits", "--data", "digits"]):
        assert commands.main([*wrong, *arguments]) == 2
        assert "--data must be given once, as in fastdiff train --data digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("--wieght p2", "did you mean --weight"),
        ("--weight p-2", "did you mean 'p2'"),
        ("--loss hybird", "did you mean 'hybrid'"),
        ("--times importence", "did you mean 'importance'"),
        ("--variance learned_rang --sde ddpm", "did you mean 'learned_range'"),
        ("--variance learned_range", "is of the steps of a chain, and 'vp' is continuous: use 'ddpm'"),
    ],
)
def test_a_wrong_flag_says_what_is_near(wrong, near, tmp_path, capsys):
    arguments = ["train", "digits", "--out", str(tmp_path / "run"), "--steps", "1", "--network", "mlp", *wrong.split()]
    assert commands.main(arguments) == 2
    assert near in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_doctor_says_which_backend_serves_what():
    shown = run("doctor").stdout
    for words in (
        "cpu  float32   cpu: every",
        "cpu  float64   cpu: every",
        "cuda float64   reference",
        "dsm_loss",
        cpu.instruction_set,
        "CUDA graphs need a CUDA device" if not torch.cuda.is_available() else "CUDA graphs on CUDA tensors",
    ):
        assert words in shown
    assert "STALE" not in shown
    assert len(shown.splitlines()) < 12


def without_a_library(code, tmp_path, **environment):
    """Run Python with a fastdiff whose library is missing."""
    environment = {**os.environ, "FASTDIFF_LIBRARY": str(tmp_path / "nothing.so"), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_without_the_library_everything_runs_on_plain_pytorch_and_says_so_once(tmp_path):
    code = (
        "import fastdiff, fastdiff.cli; "
        "x, info = fastdiff.sample(lambda x, t: -x, 'vp', 4, shape=(3,), num_samples=2, return_info=True); "
        "print(info.backend, x.tolist()); fastdiff.cli.main(['doctor'])"
    )
    done = without_a_library(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert re.search(r"FASTDIFF_LIBRARY='.*nothing.so' does not exist; unset FASTDIFF_LIBRARY", done.stderr)
    expected = fastdiff.sample(lambda x, t: -x, "vp", 4, shape=(3,), num_samples=2)
    assert done.stdout.startswith(f"reference {expected.tolist()}")
    assert "cpu            not available" in done.stdout
    refused = without_a_library("import fastdiff; fastdiff.normal(2, (3,), seed=0, backend='cpu')", tmp_path)
    assert "backend='cpu' cannot run here: the compiled library is not loaded" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "digits-v"], "digits-ve"),
        (["sample", "digits-ve", "--sde", "vp"], "use --sde ve"),
        (["sample", "digits-ve", "--out", "x.txt"], "--out must end in .npy or .png"),
        (["sample", "digits-ve", "--out", "nowhere/x.npy"], "existing folder"),
        (["plan", "vpp"], "did you mean 'vp'"),
        (["plan", "vp", "3", "--plot", "x.foo"], "--plot must end in"),
        (["sample", "digits-ve", "-n", "0", "--out", "x.png"], "a picture needs samples"),
        (["demo", "--samples", "900"], "samples must be an integer"),
        (["demo", "--samples", "1"], "samples must be an integer"),
        (["demo", "--workers", "-1"], "workers must be an integer"),
        (["train", "digits", "--out", "/dev/null/x", "--steps", "1"], "cannot be a directory"),
        (["train", "nothing.npy", "--out", "run", "--steps", "1"], "nothing.npy"),
        (["train", "digits", "--out", "run", "--steps", "1", "--loss", "sms"], "did you mean 'ssm'"),
        (["likelihood", "digits-v", "--data", "digits"], "digits-ve"),
        *(
            (["likelihood", "digits-vp", "--data", *given], words)
            for given, words in [
                (["nothing.npy"], "nothing.npy"),
                (["digits", "--out", "ll.npy"], "--out must end in .npz"),
                (["digits", "--out", "nowhere/ll.npz"], "existing folder"),
                (["digits", "-n", "0"], "num_samples must be an integer >= 1"),
                (["digits", "--first-sample", "1797"], "first_sample must be an integer >= 0 and <= 1796"),
                (["digits", "--probes", "0"], "probes must be an integer >= 1"),
                (["digits", "--trace", "exakt"], "did you mean 'exact'"),
                (["digits", "--rtol", "1e-12"], "rtol must be a number in"),
                (["digits", "--atol", "0"], "atol must be a number in"),
                (["digits", "--t-min", "2"], "t_min must be a number in (0, 1]"),
                (["digits", "--seed", "-1"], "seed must be an integer"),
            ]
        ),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert commands.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_made_small(tmp_path):
    done = run(
        "demo",
        "--out",
        tmp_path / "out",
        "--train-steps",
        20,
        "--samples",
        70,
        "--steps",
        50,
        "--digits",
        16,
        "--control",
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    report = (out / "report.md").read_text()
    calls = {"VE predictor-corrector": 100, "VP Euler-Maruyama": 50, "sub-VP Euler-Maruyama": 50,
             "DDPM ancestral": 50, "NCSN annealed Langevin": 51, "DDIM 50": 50, "Heun 18": 35}  # fmt: skip
    for job in demo.JOBS:
        cells = next(line for line in report.splitlines() if line.startswith(f"| {job.title} ")).split("|")
        assert int(cells[2]) == calls[job.title]
        assert float(cells[4]) > 0
    assert (
        len(
            re.findall(
                r"^\| (?:digits|the same, their pixels shuffled) \|(?: -?\d+\.\d+ ± \d+\.\d+ \|){2}$", report, re.M
            )
        )
        == 2
    )
    for name in demo_flow.FIXED:
        cells = next(line for line in report.splitlines() if line.startswith(f"| {name} |")).split("|")
        assert float(cells[-2]) < float(cells[2])  # 48 calls come closer than 6
    for title in demo_control.TASKS:
        cells = next(line for line in report.splitlines() if line.startswith(f"| {title} |")).split("|")
        # in ten steps of a network that has hardly learnt, what is blurred says more than a half
        off, within = {"the upper half": (0.5, 0.2), "blurred": (0.25, 0.6)}[title]
        assert 0 < float(cells[2]) < off
        assert within < float(cells[3].strip(" %")) / 100 <= 1
    pictures = [f"{demo.slug(job)}" for job in demo.JOBS] + ["trajectory", "loss", "nearest", "classes"]
    pictures += [demo_control.slug(title) for title in demo_control.TASKS]
    for name in [f"{name}.png" for name in [*pictures, "likelihood", "interpolation", "solvers"]]:
        assert f"({name})" in report
        with Image.open(out / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10  # not blank
    assert fastdiff.load(out / "digits-vp").process == fastdiff.VP()


def test_shuffled_digits_have_their_own_pixels_in_orders_of_their_own():
    x = torch.arange(3 * 64.0).view(3, 1, 8, 8)
    y = demo_flow.shuffled(x)
    assert torch.equal(y.flatten(1).sort(1).values, x.flatten(1))
    orders = y.flatten(1) - x[:, :1, :1, :1].flatten(1)
    assert all(not torch.equal(orders[i], orders[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def parsers():
    """(command, parser) of all commands."""
    found = commands._parser()
    (sub,) = [action for action in found._actions if action.dest == "command"]
    return sub.choices.items()


@pytest.mark.parametrize(("command", "parser"), parsers())
def test_every_option_says_what_it_is_and_what_holds_without_it(command, parser):
    for action in parser._actions:
        assert action.help, f"{command} {action.dest}"
        if action.option_strings and not action.required and action.nargs != 0:
            assert "default" in action.help or action.default is None, f"{command} {action.dest}"
            if action.default not in (None, ""):
                assert (
                    f"{action.default:g}" if isinstance(action.default, float) else str(action.default) in action.help
                )


def test_output_that_is_not_utf_8():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for arguments, status in ((["plan", "vp", "5"], 0), (["plan", "σ", "5"], 2)):
        done = subprocess.run([sys.executable, "-m", "fastdiff", *arguments], capture_output=True, env=environment)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr
        assert rb"\u03c3" in done.stdout + done.stderr or status == 0
        (done.stdout + done.stderr).decode("ascii")


def test_a_reader_that_goes_away_is_no_error():
    command = [sys.executable, "-m", "fastdiff", "plan", "vp", "3000", "--all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        started.stdout.close()
        assert started.stderr.read() == b""
        assert started.wait() == 128 + signal.SIGPIPE


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """A command run in this process, within tmp_path: (exit status, what it said)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = commands.main([str(each) for each in arguments])
        return status, "".join(capsys.readouterr())

    return call


def pictures(folder, *shapes):
    folder.mkdir()
    for k, shape in enumerate(shapes):
        Image.fromarray(np.full(shape, 40 * k, np.uint8)).save(folder / f"{k}.png")


ARRAYS = {"last": (8, 6, 6, 3), "grey": (8, 6, 6)}


@pytest.mark.parametrize(
    ("source", "options"),
    [("sizes", ["--size", 6, 6]), ("greys", ["--channels", 1]), ("greys", ["--channels", 3]),
     *((f"{name}.{dtype}.npy", ["--channels", how]) for dtype in ("uint8", "float32")
       for name, how in (("last", "last"), ("last", "first"), ("grey", 1), ("grey", "first")))],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:x holds floats")
def test_the_command_takes_the_options_that_its_refusals_name(tmp_path, command, source, options):
    pictures(tmp_path / "sizes", (6, 5, 3), (7, 5, 3), (6, 6, 3))
    pictures(tmp_path / "greys", (6, 5, 3), (6, 5))
    for name, shape in ARRAYS.items():
        for dtype in ("uint8", "float32"):
            np.save(tmp_path / f"{name}.{dtype}.npy", (np.random.default_rng(0).random(shape) * 200).astype(dtype))
    start = ["train", source, "--out", "m", "--steps", 1, "--batch-size", 2]
    status, said = command(*start)
    assert status == 2
    assert options[0] in said
    assert not (tmp_path / "m").exists()
    status, said = command(*start, *options)
    assert status == 0, said
    if options[-1] != "first":
        assert command("sample", "m", "--steps", 1, "-n", 2, "--out", "s.png")[0] == 0


FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, t, y=None):
        return self.layer(x)

net = Net()
made = Net
number = 3
"""


def test_a_network_of_ones_own_by_the_command(tmp_path, command, monkeypatch):
    pairs(tmp_path)
    (tmp_path / "net_of_mine.py").write_text(FACTORY)
    (tmp_path / "numpy.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.delitem(sys.modules, "net_of_mine", raising=False)
    start = ["train", "data.npy", "--out", "m", "--steps", 2, "--batch-size", 4, "--prediction", "eps"]
    for name in ("net_of_mine:made", "net_of_mine.py:made", "net_of_mine:net"):
        assert command(*start, "--net", name, "--fresh")[0] == 0
        status, said = command("sample", "m", "--steps", 2, "-n", 3, "--t-min", 0.01, "--net", name)
        assert status == 0, said
        status, said = command(
            "likelihood", "m", "--data", "data.npy", "-n", 2, "--rtol", 0.1, "--atol", 0.1, "--net", name
        )
        assert status == 0, said
    assert os.getcwd() not in sys.path
    assert "--net" in command("sample", "m")[1]
    for name, words in (
        ("net_of_mine", "module:factory"), ("none:made", "imported"), ("net_of_mine:no", "has no no"), (":", "module:factory"),
        ("net_of_mine:number", "int"), ("none.py:made", "a file that there is"),
    ):  # fmt: skip
        status, said = command(*start, "--net", name)
        assert status == 2, name
        assert words in said, name


def test_data_described_by_options(tmp_path, command):
    pairs(tmp_path)
    np.save(tmp_path / "labels.npy", np.arange(40) % 3)
    start = ["train", "data.npy", "--out", "m", "--steps", 2, "--batch-size", 4]
    said = command(*start, "--labels", "labels.npy", "--classes", "--bins", 2)[1]
    assert "--bins" in said  # continuous data stand on no levels
    status, said = command(*start, "--labels", "labels.npy", "--classes", "--range", -2, 2)
    assert status == 0, said
    model = fastdiff.load(tmp_path / "m")
    assert (model.net.num_classes, model.data_range) == (3, (-2.0, 2.0))
    assert command(*start, "--labels", "none.npy")[0] == 2


@pytest.mark.parametrize(
    "words",
    [
        ("sample", "digits-vp", "--out", "LONG.npy"), ("sample", "digits-vp", "--cond", "LONG.npy"), ("sample", "LONG"),
        ("sample", "digits-vp", "--net", "LONG.py:net"), ("check", "digits-vp", "--data", "LONG"), ("demo", "--out", "LONG"),
        ("likelihood", "digits-vp", "--data", "digits", "--out", "LONG.npz"), ("plan", "vp", "5", "--plot", "LONG.png"),
        ("train", "LONG", "--out", "o", "--steps", "1"), ("train", "digits", "--labels", "LONG", "--out", "o", "--steps", "1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_name_that_no_file_can_have_is_one_short_line(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands.main([word.replace("LONG", "x" * 10000) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 260
    assert list(tmp_path.iterdir()) == []


def train_parser():
    parser = commands._parser()
    (commands_of,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return commands_of.choices["train"]


def test_train_has_an_option_of_each_argument_of_train():
    known = {action.dest for action in train_parser()._actions}
    elsewhere = {
        "model", "decay", "checkpoint", "resume", "progress", "callback", "stop", "evaluate", "group",
    }  # the network's options, --schedule cosine, --out, --fresh, and what only Python can say  # fmt: skip
    assert set(inspect.signature(fastdiff.train).parameters) - elsewhere <= known


def test_the_help_of_train_is_in_groups():
    text = train_parser().format_help()
    heads = re.findall(r"^([a-z ]+):$", text, re.MULTILINE)
    assert heads == ["options", "data", "network and process", "objective", "optimisation", "run and watching"]
    assert text[text.index("options:") : text.index("data:")].count("--") == 1  # --help alone
    assert text.startswith("usage: fastdiff train DATA --out DIR --steps N [options]\n")


def test_options_of_the_optimisation_are_those_of_python(tmp_path, capsys):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).uniform(-1, 1, (60, 2)).astype(np.float32))
    arguments = [
        "train", tmp_path / "data.npy", "--out", tmp_path / "a", "--steps", 20, "--batch-size", 8, "--accumulate", 2,
        "--optimizer", "adamw", "--lr", "0.01", "--warmup", 5, "--warmup-start", 0, "--schedule", "cosine", "--grad-clip", "none",
        "--ema", "0.9,0.5", "--ema-rule", "constant", "--posthoc", "--precision", "bf16", "--checkpoint-every", 10,
        "--bad-step", "raise",
    ]  # fmt: skip
    assert commands.main([str(a) for a in arguments]) == 0
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(MLP((2,)), "vp", "edm", data_shape=(2,))
    fastdiff.train(
        model, tmp_path / "data.npy", steps=20, loss="simple", batch_size=8, accumulate=2, optimizer="adamw", lr=0.01, warmup=5,
        warmup_start=0, schedule="cosine", grad_clip=None, ema=(0.9, 0.5), ema_rule="constant", posthoc=True, precision="bf16",
        checkpoint=tmp_path / "b", checkpoint_every=10, bad_step="raise",
    )  # fmt: skip
    for rate in (0.9, 0.5):
        a, b = (fastdiff.load(tmp_path / run, ema=rate).state_dict() for run in "ab")
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert len(list((tmp_path / "a").glob("snapshot-*"))) == 2
    drawn = ["sample", tmp_path / "a", "--ema", "0.5", "--steps", 4, "-n", 3, "--out", tmp_path / "x.npy"]
    assert commands.main([str(a) for a in drawn]) == 0
    x = fastdiff.sample(fastdiff.load(tmp_path / "b", ema=0.5), steps=4, num_samples=3)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), x.numpy())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--ema", "0.9,x"), "must be a number, or several as in 0.999,0.9999, got '0.9,x'"),
        (("--grad-clip", "off"), "must be a number, or none, got 'off'"),
        (("--optimiser", "adam"), "did you mean --optimizer?"),
        (("--optimizer", "adamq"), "did you mean 'adam'"),
        (("--schedule", "cosin"), "did you mean 'cosine'?"),
    ],
)
def test_a_wrong_option_of_train_is_said(given, said, tmp_path, capsys):
    pairs(tmp_path)
    try:
        code = commands.main(["train", f"{tmp_path}/data.npy", "--out", f"{tmp_path}/run", "--steps", "2", *given])
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), 'source table.csv is a table of text: write it as a .npy file, numpy.save("table.npy", numpy.loadtxt('),
        (
            ("table.npy", "--labels", "words.txt"),
            'labels words.txt is a table of text: write it as a .npy file, numpy.save("',
        ),
        (
            ("table.npy", "--dequantize"),
            "--dequantize needs data on discrete levels, and these are continuous: give their",
        ),
        (("table.npy", "--vlb-weight", "0.1"), "--vlb-weight 0.1 is of the bound in --loss hybrid, got --loss simple"),
        (
            ("table.npy", "--evaluate-every", "1"),
            "--evaluate-every 1 has nothing to evaluate: give --validation 0.1, or",
        ),
        (
            ("table.npy", "--workers", "2"),
            "--workers 2 read a folder of pictures or a torch.utils.data.Dataset ahead, got",
        ),
    ],
)
def test_a_newcomers_calls_end_in_what_to_do(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.savetxt("table.csv", np.eye(9), delimiter=",")
    np.savetxt("words.txt", np.arange(9), fmt="%d")
    np.save("table.npy", np.eye(9, dtype="float32"))
    assert commands.main(["train", *(arguments or ("table.csv",)), "--out", "m", "--steps", "1", "--fresh"]) == 2
    said = capsys.readouterr().err
    assert words in said
    if "numpy.save" in said:  # the advice as it stands
        exec("import numpy; " + said[said.index("numpy.save") :])
        assert np.load("table.npy" if "csv" in words else "words.npy").shape in ((9, 9), (9,))


def test_labels_and_conditions_of_data_to_evaluate_by_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.normal(size=(40, 2)).astype("float32"))
    np.save("labels.npy", np.arange(40) % 3)
    np.save("cond.npy", rng.normal(size=(40, 2)))
    files = ["--labels", "labels.npy", "--cond", "cond.npy"]
    assert (
        commands.main(["train", "x.npy", "--classes", *files, "--out", "m", "--steps", "2", "--batch-size", "8"]) == 0
    )
    evaluate = ["evaluate", "m", "--data", "x.npy", "--steps", "2", "--metrics", "frechet"]
    assert commands.main(evaluate) == 2
    assert "give labelled data, or --labels" in capsys.readouterr().err
    assert commands.main([*evaluate, *files[:2]]) == 2
    assert "give --cond" in capsys.readouterr().err
    assert commands.main([*evaluate, *files]) == 0
    assert commands.main(["sample", "m", "--labels", "1", *files[2:], "-n", "0"]) == 2
    assert "--num-samples must be an integer >= 1" in capsys.readouterr().err
    np.save("five.npy", np.zeros((5, 2)))  # which say how many samples there are
    np.save("known.npy", np.array([0.5, np.nan], "float32"))
    few = ["--labels", "1", "--cond", "five.npy", "--steps", "2"]
    assert commands.main(["sample", "m", *few, "--out", "drawn.npy"]) == 0
    assert commands.main(["inpaint", "m", "known.npy", *few, "--out", "filled.npy"]) == 0
    assert np.load("drawn.npy").shape == np.load("filled.npy").shape == (5, 2)
    capsys.readouterr()
    assert commands.main(["sample", "digits-vp", "--clip", "1"]) == 2
    assert " as in --clip=-1,1," in capsys.readouterr().err


def test_a_path_stands_apart_from_its_option(tmp_path, capsys, monkeypatch):
    """A run in a directory that another holds."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "a"
    command = ["train", "digits", "--network", "mlp", "--steps", "2", "--out", "runs/a"]
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        assert files.hold(held)
        assert commands.main(command) == 2
    finally:
        os.close(held)
    assert "--out runs/a is in use by another training" in capsys.readouterr().err
