"""A training that is watched: validation, numbers in a file, early stop, pictures; none of it changes a weight."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import re
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.cli import commands, pictures
from fastdiff.data import LazyData
from fastdiff.data.readers import load_beside
from fastdiff.errors import ConfigError, DataError, ShapeError
from fastdiff.execution import ops
from fastdiff.networks import MLP
from fastdiff.training import Data, checkpoint

OPTIONS = {"batch_size": 32, "lr": 2e-3, "warmup": 10, "loss": "simple"}


def data(n=120, seed=0, **options):
    rng = np.random.default_rng(seed)
    return Data(torch.from_numpy(rng.normal(size=(n, 2)).astype("float32")), **{"range": (-6.0, 6.0), **options})


def tiny(dropout=0.0):
    torch.manual_seed(0)
    return fastdiff.ScoreModel(MLP((2,), hidden=16, layers=1, dropout=dropout), "vp", "edm", data_shape=(2,))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, i):
        return np.full(2, i / 50, "float32")


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b)))


def lines(folder):
    with open(folder / "metrics.csv", newline="") as handle:
        return list(csv.DictReader(handle))


def test_the_validation_loss_is_that_of_the_averaged_weights_on_fixed_noise(tmp_path):
    """By hand: every sample once, times the golden ratio's multiples, noise of the last draw."""
    model, kept, seen = tiny(), data(50, seed=1), {}

    def evaluate(model, step):
        assert not model.training
        x0, at = model.standardized(kept.x.double()).float(), torch.arange(50)
        t = model.process.training_times((at.double() * (5**0.5 - 1) / 2 % 1).float())
        cursor = ops.cursor(2**32 - 1, 0, 0)
        with torch.no_grad():
            seen[step] = float(fastdiff.losses.per_sample(model, x0, t, cursor, "simple").mean())
        return {"copy": seen[step]}

    options = {**OPTIONS, "validation": kept, "evaluate_every": 20, "evaluate": evaluate}
    fastdiff.train(model, data(), steps=40, checkpoint=tmp_path, **options)
    assert sorted(seen) == [20, 40]
    values = {(int(row["step"]), row["name"]): float(row["value"]) for row in lines(tmp_path)}
    for step in (20, 40):
        assert values[step, "validation"] == pytest.approx(seen[step], rel=1e-6)
        assert values[step, "copy"] == seen[step]
    averaged = tiny()
    fastdiff.train(averaged, data(), steps=20, **OPTIONS)  # whose weights are the averaged ones of step 20
    evaluate(averaged, 0)
    assert seen[0] == seen[20]


def test_metrics_are_lines_by_step_and_a_resumed_run_has_the_same(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {**OPTIONS, "validation": 0.25, "evaluate_every": 50, "checkpoint_every": 30}
    a, b = tiny(dropout=0.2), tiny(dropout=0.2)
    done = fastdiff.train(a, data(), steps=300, checkpoint=whole, **options)
    stopped = iter(range(10**6))
    fastdiff.train(b, data(), steps=300, checkpoint=parts, stop=lambda: next(stopped) == 199, **options)
    with open(parts / "metrics.csv", "a") as handle:  # as of a run that was killed after its last checkpoint
        handle.write("250,validation,1.0\n300,loss,2.0\n30")
    b = tiny(dropout=0.2)
    fastdiff.train(b, data(), steps=300, checkpoint=parts, **options)
    assert equal(a, b)
    assert lines(whole) == lines(parts)
    values = {(int(row["step"]), row["name"]): float(row["value"]) for row in lines(whole)}
    assert values[100, "loss"] == pytest.approx(float(done.loss[:100].mean()), rel=1e-6)
    assert {step for step, name in values if name == "validation"} == {50, 100, 150, 200, 250, 300}
    best = min((value, step) for (step, name), value in values.items() if name == "validation")
    assert done.best_step == best[1]
    model = fastdiff.load(whole / "best.safetensors")
    again = tiny(dropout=0.2)
    fastdiff.train(again, data().split(0.25)[1], steps=best[1], **OPTIONS)
    assert equal(model, again)
    unwatched = tiny(dropout=0.2)
    fastdiff.train(unwatched, data().split(0.25)[1], steps=300, **OPTIONS)
    assert equal(a, unwatched)
    fastdiff.train(tiny(dropout=0.2), data(), steps=100, checkpoint=parts, resume=False, **options)
    assert {int(row["step"]) for row in lines(parts)} == {50, 100}


def test_a_run_ends_where_nothing_improves_and_stays_ended(tmp_path):
    """A learning rate of next to nothing: the first evaluation is the best, and two more end the run."""
    options = {
        **OPTIONS,
        "lr": 1e-30,
        "ema": 0.0,
        "validation": data(40, seed=1),
        "evaluate_every": 5,
        "checkpoint": tmp_path,
    }
    done = fastdiff.train(tiny(), data(), steps=100, patience=2, **options)
    assert (done.steps, done.best_step) == (15, 5)
    with pytest.warns(UserWarning, match="the run ended early, at step 15: give a larger patience"):
        again = fastdiff.train(tiny(), data(), steps=100, patience=2, **options)
    assert (again.steps, len(again.loss)) == (15, 0)
    longer = fastdiff.train(tiny(), data(), steps=100, patience=4, **options)
    assert longer.steps == 25
    best = fastdiff.load(tmp_path / "best.safetensors")
    assert torch.isfinite(fastdiff.sample(best, steps=2, num_samples=2)).all()


def test_other_validation_data_begin_with_a_best_of_their_own(tmp_path):
    """Those of before had the lower loss; of checkpoints that do not say which they were the best goes on."""
    options = {**OPTIONS, "evaluate_every": 5, "checkpoint": tmp_path}
    held = (
        data(40, seed=1),
        data(40, seed=1, cond=torch.zeros(40, 1)),
        Data(torch.full((40, 2), 6.0), range=(-6.0, 6.0)),
    )
    first = fastdiff.train(tiny(), data(), steps=20, validation=held[0], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = fastdiff.train(tiny(), data(), steps=20, validation=held[0], **options)
    assert again.best_step == first.best_step
    with pytest.warns(UserWarning, match="the validation data are not those of before"):
        other = fastdiff.train(tiny(), data(), steps=30, validation=held[2], **options)
    found = {int(row["step"]): float(row["value"]) for row in lines(tmp_path) if row["name"] == "validation"}
    assert other.best_step == min((25, 30), key=found.get)
    assert min(found[25], found[30]) > max(found[step] for step in (5, 10, 15, 20))
    header, tensors = checkpoint.read(tmp_path / checkpoint.FILE, "")
    del header["watch"]["validation"]
    checkpoint.write(tmp_path / checkpoint.FILE, tensors, header)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastdiff.train(tiny(), data(), steps=30, validation=held[1], **options).best_step == other.best_step


def test_running_statistics_and_modes_are_given_back():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.BatchNorm1d(2), nn.Linear(2, 2)

        def forward(self, x, t):
            return self.last(self.norm(x))

    def made():
        torch.manual_seed(0)
        return fastdiff.ScoreModel(Net(), "vp", data_shape=(2,))

    a, b = made(), made()
    fastdiff.train(a, data(), steps=30, validation=data(30, seed=1), evaluate_every=10, **OPTIONS)
    fastdiff.train(b, data(), steps=30, **OPTIONS)
    for x, y in zip(a.state_dict().values(), b.state_dict().values()):
        assert torch.equal(x, y)


def test_what_cannot_be_evaluated_is_refused():
    for arguments, error, words in (
        ({"patience": 3}, ConfigError, "patience=3 needs validation data: give validation=0.1"),
        ({"validation": 1.5}, ConfigError, "validation must be"),
        ({"validation": 0.001}, DataError, "validation must leave samples in both parts"),
        (
            {"validation": Data(torch.zeros(9, 2, dtype=torch.uint8))},
            DataError,
            "validation must have the range and levels of the data",
        ),
        (
            {"validation": np.zeros((9, 3), "float32") + [[1], [2], [3]] * 3},
            ShapeError,
            r"validation must have samples of",
        ),
        ({"evaluate": 3}, ConfigError, "evaluate must be"),
        ({"evaluate_every": 0}, ConfigError, "evaluate_every must be"),
        (
            {"evaluate_every": 5},
            ConfigError,
            "evaluate_every=5 has nothing to evaluate: give validation=0.1, or leave it",
        ),
        ({"tensorboard": True}, ConfigError, "tensorboard=True needs a directory to write in: give checkpoint="),
        (
            {"evaluate": lambda model, step: 3.0, "evaluate_every": 1},
            ConfigError,
            "evaluate must return numbers by name",
        ),
        (
            {"evaluate": lambda model, step: {"a": torch.ones(2)}, "evaluate_every": 1},
            ConfigError,
            "evaluate must return one number for each name",
        ),
    ):
        with pytest.raises(error, match=words):
            fastdiff.train(tiny(), **{"data": data(), "steps": 1, **OPTIONS, **arguments})


def conditioned():
    """A network that takes labels of three classes and conditions (3,)."""
    return fastdiff.ScoreModel(MLP((2,), hidden=8, num_classes=3, cond_shape=(3,)), "vp", "edm", data_shape=(2,))


LABELS, COND = torch.arange(120) % 3, torch.rand(120, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("of_data", "of_validation", "error", "words"),
    [
        ({"labels": LABELS}, {}, DataError, "validation must have labels, as the data have and the network takes"),
        (
            {"labels": LABELS, "cond": COND},
            {"labels": LABELS},
            DataError,
            "validation must have cond, as the data have",
        ),
        (
            {"labels": LABELS},
            {"labels": torch.arange(120) % 5},
            DataError,
            "labels below the data's num_classes=3, got 4: give the data num_classes=",
        ),
        ({"cond": COND}, {"cond": COND[:, :2]}, ShapeError, r"conditions of the data's shape \(3,\), got \(2,\)"),
    ],
)
def test_validation_must_have_what_the_network_gets_of_the_data(of_data, of_validation, error, words):
    with pytest.raises(error, match=words):
        fastdiff.train(conditioned(), data(**of_data), steps=1, validation=data(**of_validation), **OPTIONS)


@pytest.mark.filterwarnings("ignore:the data have labels of 3 classes, and the network takes none:UserWarning")
def test_validation_may_have_and_lack_what_the_network_does_not_get(tmp_path):
    """The losses are those without any of it."""
    found = []
    for of_data, of_validation in (({}, {}), ({"labels": LABELS}, {}), ({}, {"labels": LABELS % 2, "cond": COND})):
        folder = tmp_path / str(len(found))
        fastdiff.train(
            tiny(), data(**of_data), steps=4, validation=data(**of_validation), evaluate_every=2, checkpoint=folder,
            **OPTIONS,
        )  # fmt: skip
        found.append(lines(folder))
    assert found[0] == found[1] == found[2]


def validated(folder, model, data, validation):
    options = {**OPTIONS, "batch_size": 8, "evaluate_every": 1, "seed": 3}
    fastdiff.train(model, data, steps=1, validation=validation, checkpoint=folder, **options)
    return lines(folder)


@pytest.mark.filterwarnings("error")
def test_validation_from_a_file_is_in_the_units_of_the_data(tmp_path):
    """Of pictures the data's range, inferred or given, and levels; of vectors the numbers as they are."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0.1, 0.9, (20, 1, 4, 4)), rng.uniform(0.2, 0.8, (20, 1, 4, 4))
    np.save(tmp_path / "y.npy", y)

    def model():
        torch.manual_seed(0)
        return fastdiff.ScoreModel(MLP((1, 4, 4), hidden=8, layers=1), "vp", "edm", data_shape=(1, 4, 4))

    data = fastdiff.load_data(x)
    found = validated(tmp_path / "a", model(), data, tmp_path / "y.npy")
    assert found == validated(tmp_path / "b", model(), data, Data(torch.from_numpy(y), range=data.range))
    with pytest.raises(DataError, match=re.escape(f"give both range=({float(x.min())}, 0.95)")):
        validated(tmp_path / "c", model(), data, np.where(y == y.max(), 0.95, y))
    levels = Data(torch.from_numpy((x * 16).round().astype("uint8")), range=(0.0, 16.0), bins=17)
    of_levels = (y * 16).round()
    found = validated(tmp_path / "d", model(), levels, of_levels.astype("uint8"))
    assert found == validated(tmp_path / "e", model(), levels, of_levels.astype("float32"))
    with pytest.raises(DataError, match="validation, in the units of the data: x must lie on its 17 levels"):
        validated(tmp_path / "f", model(), levels, y.astype("float32"))
    vectors = rng.normal(size=(30, 2)) * 20
    of_vectors = Data(torch.from_numpy(vectors[:20]), range=(-100.0, 100.0))
    found = validated(tmp_path / "g", tiny(), of_vectors, vectors[20:])
    assert found == validated(
        tmp_path / "h", tiny(), of_vectors, Data(torch.from_numpy(vectors[20:]), range=(-99.0, 200.0))
    )


def test_the_classes_of_a_folder_have_the_numbers_of_the_data(tmp_path):
    for k, place in enumerate(("a/x", "a/y", "a/z", "b/z", "c/z", "c/v")):
        (tmp_path / place).mkdir(parents=True)
        pictures.image(tmp_path / place / "0.png", np.full((1, 1, 8, 8), k / 9, "float32"), (0.0, 1.0))
    data = fastdiff.load_data(tmp_path / "a")
    assert load_beside("validation", tmp_path / "b", data).labels.tolist() == [2]
    with pytest.raises(DataError, match="validation must have the classes of the data, x, y, z, got v: move"):
        load_beside("validation", tmp_path / "c", data)


def test_the_command_line_reads_validation_as_the_data(tmp_path, capsys):
    """Layout, range, labels and conditions by options; what is missing is named with the option that gives it."""
    rng = np.random.default_rng(0)
    for name, count in (("x", 20), ("y", 10)):
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 9, (count, 8, 8)).astype("uint8"))
        np.save(tmp_path / f"{name}-labels.npy", np.arange(count) % 3)
        np.save(tmp_path / f"{name}-cond.npy", rng.normal(size=(count, 2)))

    def status(*more):
        start = ["train", str(tmp_path / "x.npy"), "--out", str(tmp_path / "m"), "--fresh", "--steps", "1", "--network", "mlp",
                 "--channels", "1", "--range", "0", "8", "--evaluate-every", "1"]  # fmt: skip
        return commands.main([*start, *(str(tmp_path / word) if word.endswith(".npy") else word for word in more)])

    assert status("--validation", "y.npy") == 0
    of_data = ["--classes", "--labels", "x-labels.npy", "--cond", "x-cond.npy"]
    assert status("--validation", "y.npy", *of_data) == 2
    assert "--validation must have labels, as the data have: give --validation-labels FILE" in capsys.readouterr().err
    of_data += ["--validation-labels", "y-labels.npy"]
    assert status("--validation", "y.npy", *of_data) == 2
    assert "--validation must have cond, as the data have: give --validation-cond FILE" in capsys.readouterr().err
    of_data += ["--validation-cond", "y-cond.npy"]
    assert status("--validation", "y.npy", *of_data) == 0
    assert {row["name"] for row in lines(tmp_path / "m")} == {"validation", "loss", "lr"}
    assert status("--validation", "z.npy") == 2
    assert 'validation: source must be "digits" or the path of a file' in capsys.readouterr().err
    assert status("--validation", "0.2", *of_data) == 2
    said = "--validation-labels is of validation data in a file of their own: give --validation FILE"
    assert said in capsys.readouterr().err


def test_the_training_data_of_an_evaluation_are_in_the_units_of_its_data(tmp_path, capsys):
    """Samples that are copies of training data, whose own ends are others, are found beside them."""
    x = np.random.default_rng(0).uniform(0.2, 0.8, (20, 1, 4, 4)).astype("float32")
    x[0, 0, 0, :2] = 0, 1
    np.save(tmp_path / "data.npy", x)
    np.save(tmp_path / "train.npy", x[1:])
    np.save(tmp_path / "samples.npy", 2 * x[1:9] - 1)
    paths = [str(tmp_path / name) for name in ("samples.npy", "data.npy", "train.npy", "found.json")]
    arguments = ["--metrics", "nearest", "--samples-range", "-1", "1", "--out", paths[3]]
    assert commands.main(["evaluate", paths[0], "--data", paths[1], "--train", paths[2], *arguments]) == 0
    assert commands.main(["evaluate", *paths[:1], "--data", paths[1], "--train", paths[2], "--metrics", "frechet"]) == 2
    assert "--train is what the metric nearest looks for copies in, got --metrics frechet" in capsys.readouterr().err
    nearest = json.loads((tmp_path / "found.json").read_text())["metrics"]["nearest (median)"]
    assert nearest["samples"]["value"] < 1e-5


def test_what_a_run_opened_is_closed_after_an_error(tmp_path, monkeypatch):
    """Even while its traceback is kept: TensorBoard's writer holds numbers back, and readers are processes."""
    said = []

    class Writer:
        def __init__(self, folder, purge_step):
            said.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            said.append((name, step))

        def close(self):
            said.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)

    def evaluate(model, step):
        raise KeyboardInterrupt

    lazy = LazyData(Rows(), range=(-6.0, 6.0), workers=2)
    with pytest.raises(KeyboardInterrupt) as kept:
        fastdiff.train(
            tiny(), lazy, steps=9, evaluate=evaluate, evaluate_every=3, checkpoint=tmp_path, tensorboard=True, **OPTIONS
        )
    assert kept.tb is not None
    assert multiprocessing.active_children() == []
    assert said[0] == (str(tmp_path / "tensorboard"), 1)  # what is shown begins with the first step
    assert said[-1] == "closed"
    fastdiff.train(tiny(), lazy, steps=9, checkpoint=tmp_path, **OPTIONS)  # nor is the directory held


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    options = {**OPTIONS, "validation": 0.25, "evaluate_every": 50, "checkpoint": tmp_path, "tensorboard": True}
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        monkeypatch.setitem(sys.modules, "tensorboard", None)
        with pytest.raises(
            ConfigError, match="tensorboard=True needs tensorboard, which is missing: pip install tensorboard"
        ):
            fastdiff.train(tiny(), data(), steps=100, **options)
        return

    def agree():
        """Each line of metrics.csv once, and no others, by the reader of TensorBoard's own pages."""
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        written = [(e.step, tag, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
        rows = [(int(row["step"]), row["name"], float(row["value"])) for row in lines(tmp_path)]
        assert [line[:2] for line in sorted(written)] == [line[:2] for line in sorted(rows)]
        for (*_, value), (*_, other) in zip(sorted(written), sorted(rows)):
            assert math.isclose(value, other, rel_tol=1e-6)

    def killed(model, step):
        if step == 150:
            raise KeyboardInterrupt

    fastdiff.train(tiny(), data(), steps=100, **options)
    agree()
    with pytest.raises(KeyboardInterrupt):  # after lines of step 125 that no checkpoint has
        fastdiff.train(tiny(), data(), steps=200, **{**options, "evaluate_every": 25, "evaluate": killed})
    fastdiff.train(tiny(), data(), steps=200, **{**options, "evaluate_every": 25})
    agree()
    fastdiff.train(tiny(), data(), steps=100, resume=False, **options)
    agree()


def test_the_command_line_draws_samples_and_writes_the_numbers(tmp_path, capsys):
    arguments = [
        "train", "digits", "--classes", "--out", str(tmp_path), "--steps", "4", "--batch-size", "8", "--evaluate-every", "2",
        "--validation", "0.01", "--samples", "9", "--network", "mlp",
    ]  # fmt: skip
    assert commands.main(arguments) == 0
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == ["samples-00000002.png", "samples-00000004.png"]
    assert {row["name"] for row in lines(tmp_path)} == {"validation", "loss", "lr"}
    assert commands.main([*arguments, "--patience", "0"]) == 2
    assert "patience must be" in capsys.readouterr().err


def test_the_command_line_draws_samples_of_the_first_conditions(tmp_path, capsys):
    fields = np.random.default_rng(0).uniform(-1, 1, (20, 1, 8, 8)).astype("float32")
    np.savez(tmp_path / "data.npz", x=fields[:, :, ::-1].copy(), cond=fields)
    arguments = [
        "train", str(tmp_path / "data.npz"), "--out", str(tmp_path), "--steps", "2", "--batch-size", "8", "--evaluate-every", "2",
        "--samples", "4",
    ]  # fmt: skip
    assert commands.main(arguments) == 0
    x = fastdiff.sample(
        fastdiff.load(tmp_path), steps=50, num_samples=4, cond=torch.from_numpy(fields[:4]), progress=False
    )
    pictures.image(tmp_path / "again.png", x.numpy(), (-1.0, 1.0))
    assert (tmp_path / "samples-00000002.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    np.save(tmp_path / "table.npy", fields.reshape(20, 64))
    refused = ["train", str(tmp_path / "table.npy"), "--out", str(tmp_path / "b"), "--steps", "2", "--samples", "4"]
    assert commands.main(refused) == 2
    assert "--samples draws pictures (1 or 3, H, W), and the data are (64,): leave it out" in capsys.readouterr().err
