"""Objectives against closed forms, a trainer that is repeatable and resumable, files that are whole or refused."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import Gaussian
from safetensors.torch import save_file
from torch import nn

import fastdiff
from fastdiff import losses
from fastdiff.errors import (
    CheckpointError,
    CheckpointMismatchError,
    CheckpointVersionError,
    ConfigError,
    CorruptCheckpointError,
    DataError,
    DeviceError,
    ShapeError,
)
from fastdiff.networks import MLP, UNet
from fastdiff.papers import score_based as papers
from fastdiff.training import Data, checkpoint, load_data, run, state

PREDICTIONS = ["score", "eps", "x0", "v", "scaled_score", "edm", "prev_mean", "increment"]


def tiny(sde="vp", prediction="eps", shape=(2,), **options):
    torch.manual_seed(0)
    return fastdiff.ScoreModel(MLP(shape, hidden=16, layers=1), sde, prediction, data_shape=shape, **options)


def digits(n=64):
    rng = np.random.default_rng(0)
    return Data(torch.from_numpy(rng.normal(size=(n, 2)).astype(np.float32)), range=(-5.0, 5.0))


def named_noise(n, shape):
    """A cursor, and the noise that the losses make of it."""
    eps = fastdiff.normal(n, shape, seed=3, draw=5, stream=fastdiff.execution.noise.PERTURBATION)
    return fastdiff.execution.ops.cursor(5, 0, 3), eps.double()


# --- objectives ------------------------------------------------------------------------------------------------------


def test_dsm_of_an_eps_network_is_ho_et_als_algorithm_1():
    process = fastdiff.DDPM("linear", T=50)
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(6, 3, generator=g, dtype=torch.float64)
    cursor, eps = named_noise(6, (3,))
    t = torch.tensor([1, 2, 10, 25, 49, 50])

    def net(x, index):
        return torch.tanh(x) * (1 + index.double()[:, None])

    model = fastdiff.ScoreModel(net, process, "eps", "index", data_shape=(3,))
    ours = losses.per_sample(model, x0, t.double(), cursor, "dsm")
    bars = np.cumprod(1 - process.beta_table)
    theirs = papers.ddpm_training_loss(lambda x, t: net(x, t - 1), x0, t, eps, bars)
    assert (ours - theirs).abs().max() < 1e-12
    assert (losses.per_sample(model, x0, t.double(), cursor, "simple") - theirs).abs().max() < 1e-12


def test_weightings_are_their_equations():
    """‖σ s + ε‖² for λ = σ², g² ‖s + ε/σ‖² for λ = g² (Song et al. 2021, eq. 7)."""
    ve = fastdiff.VE()
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(5, 4, generator=g, dtype=torch.float64)
    cursor, eps = named_noise(5, (4,))
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    model = fastdiff.ScoreModel(lambda x, t: torch.sin(x), ve, "score", data_shape=(4,))
    s = torch.sin(losses.perturb(ve, x0, t, cursor))
    sigma, diffusion = ve.sigma(t)[:, None], ve.diffusion(t)[:, None]
    dsm = ((sigma * s + eps) ** 2).mean(1)
    likelihood = (diffusion**2 * (s + eps / sigma) ** 2).mean(1)
    assert (losses.per_sample(model, x0, t, cursor, "dsm") - dsm).abs().max() < 1e-12
    assert ((losses.per_sample(model, x0, t, cursor, "likelihood") - likelihood) / likelihood).abs().max() < 1e-12


TRAINED = [
    (prediction, sde)
    for prediction in PREDICTIONS
    for sde in ("vp", "ve", "ddpm", "ncsn")
    if prediction not in ("prev_mean", "increment") or sde in ("ddpm", "ncsn")  # which have a step before
]


@pytest.mark.parametrize(("prediction", "sde"), TRAINED)
def test_every_prediction_is_trained_towards_the_truth(prediction, sde):
    """The network that knows the data has the least loss any network can have: the conditional variance of ε, for
    "dsm" and any prediction; and a network that is off in x0 by δ pays (α δ/σ)² more, exactly."""
    process = fastdiff.processes.get(sde)
    data = Gaussian([0.5, -0.2], std=[0.6, 0.9])
    n = 4000
    x0 = data.sample(n, generator=torch.Generator().manual_seed(1)).double()
    cursor, _ = named_noise(n, (2,))
    t = torch.full((n,), 7.0 if process.discrete else 0.4, dtype=torch.float64)
    alpha, sigma = process.alpha(t[:1]), process.sigma(t[:1])
    r, w = fastdiff.predictions.coordinates(prediction, process, t[:1], alpha, sigma)
    scale = fastdiff.predictions.input_scale(prediction, process, alpha, sigma)

    def net(x, time, shift=0.0):
        x = x / scale
        clean = data.x0(x, float(alpha), float(sigma)) + shift
        return r * clean + w * (x - alpha * clean) / sigma

    model = fastdiff.ScoreModel(net, process, prediction, data_shape=(2,))
    value = losses.per_sample(model, x0, t, cursor, "dsm")
    variance = float(alpha) ** 2 * torch.tensor([0.6, 0.9], dtype=torch.float64) ** 2
    least = (variance / (variance + sigma**2)).mean()  # Var(ε | x_t) = α²s²/(α²s² + σ²)
    assert abs(value.mean() - least) < 5 * value.std() / math.sqrt(n)
    shifted = fastdiff.ScoreModel(lambda x, t: net(x, t, 0.3), process, prediction, data_shape=(2,))
    extra = losses.per_sample(shifted, x0, t, cursor, "dsm").mean() - value.mean()
    expected = float((0.3 * alpha / sigma) ** 2)
    cross = 2 * 0.3 * float(alpha / sigma) * math.sqrt(float(least) / (2 * n))
    assert abs(extra - expected) < 5 * cross


def test_training_times():
    u = torch.linspace(0, 1 - 2**-24, 1001)
    vp = fastdiff.VP().training_times(u)
    assert vp[0] == pytest.approx(1e-5)
    assert vp[-1] == pytest.approx(1.0)
    chain = fastdiff.DDPM("linear", T=50).training_times(u)
    assert set(chain.tolist()) == set(range(1, 51))
    log_sigma = fastdiff.EDM().training_times(u[1:-1]).log()
    assert log_sigma.mean() == pytest.approx(-1.2, abs=0.01)
    assert log_sigma.std() == pytest.approx(1.2, abs=0.02)
    # the normal's tail lies above the largest level, where a model cannot be asked
    assert fastdiff.EDM(sigma_max=2.0).training_times(u).max() == 2.0
    assert fastdiff.EDM().training_times(u).max() <= 80


# --- the trainer -----------------------------------------------------------------------------------------------------


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


def test_a_run_is_repeatable_and_leaves_the_global_generator_alone():
    results = []
    for seed in (0, 0, 1):
        model = tiny()
        before = torch.get_rng_state()
        done = fastdiff.train(model, digits(), steps=20, batch_size=8, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        results.append((weights(model), done.loss))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][0], results[2][0])


def test_dropout_is_repeatable_too():
    results = []
    for noise in (1, 2):
        torch.manual_seed(0)
        model = fastdiff.ScoreModel(MLP((2,), hidden=16, layers=2, dropout=0.5), "vp", data_shape=(2,))
        torch.manual_seed(noise)  # must not matter
        before = torch.get_rng_state()
        fastdiff.train(model, digits(), steps=10, batch_size=8)
        assert torch.equal(before, torch.get_rng_state())
        results.append(weights(model))
    assert torch.equal(results[0], results[1])


class Recorder(MLP):
    """A network that records the times and the labels of its calls."""

    def forward(self, x, t, y=None):
        self.calls.append((t, y))
        return super().forward(x, t, y)


def recorded(steps, batch_size, samples=10):
    """The times and the labels of each step [steps, B], of data whose labels are their indices."""
    net = Recorder((2,), hidden=4, layers=1, num_classes=samples)
    net.calls = []
    data = Data(torch.zeros(samples, 2), torch.arange(samples), range=(-1.0, 1.0))
    model = fastdiff.ScoreModel(net, "vp", data_shape=(2,), data_range=(-1.0, 1.0))
    fastdiff.train(model, data, steps=steps, batch_size=batch_size, seed=3)
    assert len(net.calls) == steps
    return [torch.stack(values) for values in zip(*net.calls)]


@pytest.mark.parametrize("batch_size", [1, 4, 10, 25])
def test_each_epoch_sees_every_sample_once(batch_size):
    order = recorded(-(-20 // batch_size), batch_size)[1].flatten()
    first, second = order[:10].tolist(), order[10:20].tolist()
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_the_times_of_a_batch_are_stratified():
    """Of B times, uniform in [1e-5, 1], one is in each of B equal slices; its place there is uniform."""
    steps, size = 40, 32
    times = recorded(steps, size)[0].double()
    u = size * (times - 1e-5) / (1 - 1e-5)
    assert torch.equal(u.floor().long(), torch.arange(size).expand(steps, size))
    place = (u - u.floor()).flatten()
    # mean and variance of a uniform, 1/2 and 1/12, within five standard errors
    assert abs(place.mean() - 1 / 2) < 5 / math.sqrt(12 * len(place))
    assert abs(place.var() - 1 / 12) < 5 / math.sqrt(180 * len(place))


@pytest.mark.parametrize("stop", [1, 7, 13])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, stop):
    options = {"batch_size": 8, "warmup": 5, "checkpoint_every": 4}
    whole = tiny()
    fastdiff.train(whole, digits(), steps=16, checkpoint=tmp_path / "whole", **options)
    model = tiny()
    fastdiff.train(model, digits(), steps=stop, checkpoint=tmp_path / "parts", **options)
    other = tiny()
    done = fastdiff.train(other, digits(), steps=16, checkpoint=tmp_path / "parts", **options)
    assert len(done.loss) == 16 - stop
    assert torch.equal(weights(whole), weights(other))
    assert torch.equal(weights(fastdiff.load(tmp_path / "parts")), weights(whole))
    again = fastdiff.train(tiny(), digits(), steps=16, checkpoint=tmp_path / "parts", **options)
    assert len(again.loss) == 0


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(tmp_path):
    options = {"batch_size": 8, "checkpoint_every": 40}
    whole = tiny()
    fastdiff.train(whole, digits(), steps=120, **options)
    model = tiny()
    model.net.train()
    model.net.hidden[0].eval()
    flags = [m.training for m in model.modules()]

    def interrupt(step, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fastdiff.train(model, digits(), steps=120, checkpoint=tmp_path, callback=interrupt, **options)
    assert [m.training for m in model.modules()] == flags
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.safetensors", "metrics.csv"]
    other = tiny()
    assert len(fastdiff.train(other, digits(), steps=120, checkpoint=tmp_path, **options).loss) == 40
    assert torch.equal(weights(whole), weights(other))


def test_plain_numbers_of_any_kind_are_taken(tmp_path):
    model = tiny(fastdiff.VE(np.float32(0.01), np.float64(9.0)))
    options = {"steps": np.int64(3), "seed": np.uint64(2**63 + 5), "lr": np.float32(1e-3), "batch_size": np.int32(4)}
    with torch.no_grad():  # the caller's mode does not matter
        fastdiff.train(model, digits(), decay=True, checkpoint=tmp_path, **options)
    assert fastdiff.load(tmp_path).process == model.process


def test_another_run_in_the_same_directory_is_refused(tmp_path):
    fastdiff.train(tiny(), digits(), steps=2, batch_size=8, checkpoint=tmp_path)
    for other, data, words in (
        (tiny("ve"), digits(), "process="),
        (tiny(prediction="v"), digits(), "prediction='eps', now 'v'"),
        (tiny(), digits(32), "data="),
    ):
        with pytest.raises(CheckpointMismatchError, match=words):
            fastdiff.train(other, data, steps=4, batch_size=8, checkpoint=tmp_path)
    with pytest.raises(CheckpointMismatchError, match="seed=0, now 1"):
        fastdiff.train(tiny(), digits(), steps=4, batch_size=8, checkpoint=tmp_path, seed=1)
    fastdiff.train(tiny(), digits(), steps=4, batch_size=8, checkpoint=tmp_path, seed=1, resume=False)


def test_ema_warm_up_and_clipping_are_their_formulas():
    """One parameter, a quadratic loss: Adam's first steps, and the average, by hand."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0))

        def forward(self, x, t):
            return self.w * x

    model = fastdiff.ScoreModel(One(), "vp", data_shape=(2,))
    seen = []
    handle = model.net.register_forward_hook(lambda *_: seen.append(float(model.net.w.detach())))
    fastdiff.train(model, digits(), steps=3, batch_size=8, lr=0.01, warmup=2, ema=0.9)
    handle.remove()
    # Adam's first update is lr·sign(gradient), here half the rate by warm-up
    assert abs(seen[1] - 1.0) == pytest.approx(0.005, rel=1e-3)
    assert len(seen) == 3
    average = 1.0
    finals = [seen[1], seen[2], None]
    m = [0.1, 2 / 11, 3 / 12]
    average = m[0] * 1.0 + (1 - m[0]) * finals[0]
    average = m[1] * average + (1 - m[1]) * finals[1]
    last = (float(model.net.w.detach()) - m[2] * average) / (1 - m[2])  # what the third update must have been
    assert 0 < abs(last - seen[2]) < 0.0101


def test_a_model_learns_a_mixture():
    """Two well separated points in the plane: after training both are sampled, about half each, and little else."""
    torch.manual_seed(0)
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.5]]).repeat(50, 1)
    model = fastdiff.ScoreModel(MLP((2,), hidden=64, layers=2), "vp", data_shape=(2,))
    done = fastdiff.train(model, Data(points, range=(-1.0, 1.0)), steps=1500, lr=5e-3, warmup=20, decay=True, ema=0.99)
    assert done.loss[-100:].mean() < 0.2 * done.loss[:20].mean()
    x = fastdiff.sample(model, steps=100, num_samples=400)
    assert ((x[:, None] - points[:2]).norm(dim=2).min(1).values < 0.15).double().mean() > 0.9
    assert 0.35 < (x[:, 0] > 0).double().mean() < 0.65


def test_labels_are_used_where_the_network_has_classes():
    data = Data(torch.tensor([[-1.0], [1.0]]).repeat(20, 1), labels=torch.tensor([0, 1]).repeat(20), range=(-1.0, 1.0))
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(MLP((1,), hidden=32, layers=2, num_classes=2), "vp", "edm", data_shape=(1,))
    fastdiff.train(model, data, steps=400, loss="simple", lr=3e-3, warmup=20)
    y = torch.tensor([0, 1] * 20)
    x = fastdiff.sample(model, steps=50, num_samples=40, cond={"y": y})
    assert ((x[:, 0] > 0) == (y == 1)).all()


def test_dequantised_images_train(tmp_path):
    images = Data(torch.randint(0, 256, (32, 1, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(UNet((1, 5, 6), channels=8, blocks=1), "vp", data_shape=(1, 5, 6))
    done = fastdiff.train(model, images, steps=3, batch_size=4, dequantize=True)
    assert done.loss.isfinite().all()
    assert fastdiff.sample(model, steps=3, num_samples=2).shape == (2, 1, 5, 6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"steps": 0}, ConfigError, "steps"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"batch_size": 2.0}, ConfigError, "batch_size"),
        ({"lr": 0}, ConfigError, "lr"),
        ({"lr": math.nan}, ConfigError, "lr"),
        ({"warmup": -1}, ConfigError, "warmup"),
        ({"grad_clip": 0}, ConfigError, "grad_clip"),
        ({"ema": -0.1}, ConfigError, "ema"),
        ({"ema": 1.0}, ConfigError, "ema"),
        ({"ema": math.nan}, ConfigError, "ema"),
        ({"loss": "mse"}, ConfigError, "loss must be one of"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"checkpoint_every": 0}, ConfigError, "checkpoint_every"),
        ({"data": torch.arange(9.0).view(3, 3)}, ShapeError, "data_shape"),
        ({"dequantize": True}, ConfigError, "bins"),
    ],
)
def test_bad_training_arguments_are_refused(change, error, words):
    options = {"data": digits(), "steps": 1, **change}
    with pytest.raises((error, DataError), match=words):
        fastdiff.train(tiny(), options.pop("data"), **options)


def test_nothing_to_train_is_refused():
    model = tiny()
    for p in model.net.parameters():
        p.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        fastdiff.train(model, digits(), steps=1)


def test_a_loss_that_is_not_finite_saves_nothing(tmp_path):
    class Broken(MLP):
        def forward(self, x, t, y=None):
            return super().forward(x, t) * math.nan

    torch.manual_seed(0)
    model = fastdiff.ScoreModel(Broken((2,), hidden=8, layers=1), "vp", data_shape=(2,))
    with pytest.raises(DataError, match="not finite at step 0"):
        fastdiff.train(model, digits(), steps=1, checkpoint=tmp_path)
    assert os.listdir(tmp_path) == []
    model = tiny()
    model.net.out.weight.register_hook(lambda gradient: gradient * math.nan)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(DataError, match="not finite at step 0 and the 4 after"),
    ):
        fastdiff.train(model, digits(), steps=5, checkpoint=tmp_path)
    assert os.listdir(tmp_path) == []


class Falters(nn.Module):
    """Running statistics, weights, and a loss or a gradient that is not finite in some of its calls."""

    def __init__(self, bad=(), where="loss"):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(2), nn.Linear(2, 2)
        self.bad, self.where, self.calls = bad, where, 0

    def forward(self, x, t):
        out = self.linear(self.norm(x))
        if self.training and self.calls in self.bad:
            if self.where == "loss":
                out = out * math.inf
            else:
                out.register_hook(lambda gradient: gradient * math.nan)
        self.calls += self.training
        return out


def faltering(*args):
    torch.manual_seed(0)
    return fastdiff.ScoreModel(Falters(*args), "vp", data_shape=(2,))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(where, tmp_path):
    """Three steps of which the third is bad are two steps: weights, moments, averages, running statistics, all counters."""
    options = {"batch_size": 8, "lr": 1e-2, "warmup": 1}
    fastdiff.train(faltering(), digits(), steps=2, checkpoint=tmp_path / "two", **options)
    with pytest.warns(UserWarning, match="not finite at step 2: it is skipped") as said:
        done = fastdiff.train(faltering((2,), where), digits(), steps=3, checkpoint=tmp_path / "three", **options)
    assert len(said) == 1
    assert done.skipped == 1
    assert done.loss.isfinite().tolist() == [True, True, False]
    assert "1 of them skipped" in repr(done)
    (two, expected), (three, found) = (checkpoint.read(tmp_path / k / checkpoint.FILE, "") for k in ("two", "three"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in found)
    assert (two["step"], three["step"], three["skipped"]) == (2, 3, 1)


def test_a_run_with_skipped_steps_is_resumed_as_itself(tmp_path):
    options = {"batch_size": 8, "lr": 1e-2, "warmup": 1, "checkpoint_every": 4}
    whole, parts = faltering((1, 5)), faltering((1, 5))
    with pytest.warns(UserWarning, match="at step 1:") as said:
        fastdiff.train(whole, digits(), steps=9, **options)
    assert len(said) == 1  # of two
    with pytest.warns(UserWarning, match="at step 1:"):
        fastdiff.train(parts, digits(), steps=4, checkpoint=tmp_path, **options)
    with pytest.warns(UserWarning, match="at step 5:"):
        fastdiff.train(parts, digits(), steps=9, checkpoint=tmp_path, **options)
    assert torch.equal(weights(whole), weights(parts))


def test_many_bad_steps_in_a_row_end_the_run_and_a_lower_rate_goes_on(tmp_path):
    model = faltering(range(55, 1000))
    options = {"batch_size": 8, "checkpoint": tmp_path, "checkpoint_every": 10}
    match = rf"at step 55 and the 9 after it: lower lr.*{tmp_path.name}/checkpoint.safetensors, of step 50"
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(DataError, match=match):
        fastdiff.train(model, digits(), steps=1000, **options)
    assert model.net.calls == 65
    assert weights(model).isfinite().all()
    with pytest.warns(UserWarning, match=r"goes on with lr=0.0001, which was 0.0002$"):
        assert len(fastdiff.train(faltering(), digits(), steps=60, lr=1e-4, **options).loss) == 10


def test_slow_steps_are_saved_between_the_checkpoints_that_were_asked_for(tmp_path, monkeypatch):
    """By a clock on which each step takes a minute, so that 60 of them would be lost an hour on: every five minutes, at tens."""
    clock, saves = [0.0], []
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    write = state.State.write

    def noted(self, *args):
        saves.append(self.step)
        write(self, *args)

    monkeypatch.setattr(state.State, "write", noted)

    def minute():
        clock[0] += 60.0
        return False

    model, whole = tiny(), tiny()
    fastdiff.train(
        model, digits(), steps=34, batch_size=8, checkpoint=tmp_path, checkpoint_every=25, keep=2, stop=minute
    )
    assert saves == [10, 20, 25, 30, 34]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-000000025.safetensors", "step-000000034.safetensors",
    ]  # fmt: skip
    fastdiff.train(whole, digits(), steps=34, batch_size=8)
    assert torch.equal(weights(model), weights(whole))


def test_options_may_change_on_the_way_and_what_the_run_is_may_not(tmp_path):
    fastdiff.train(tiny(), digits(), steps=2, batch_size=8, checkpoint=tmp_path)
    changed = {"batch_size": 4, "lr": 1e-3, "warmup": 3, "decay": True, "grad_clip": None, "ema": 0.9}
    with pytest.warns(UserWarning, match="goes on with") as said:
        fastdiff.train(tiny(), digits(), steps=4, checkpoint=tmp_path, **changed)
    assert all(f"{name}={value!r}, which was" in str(said[0].message) for name, value in changed.items())
    with pytest.warns(UserWarning, match=r"goes on with steps=6, which was 4$"):  # the end of the decay
        fastdiff.train(tiny(), digits(), steps=6, checkpoint=tmp_path, **changed)
    for other in ({"loss": "simple"}, {"seed": 1}, {"loss": "ssm"}):
        with pytest.raises(CheckpointMismatchError, match="was trained with"):
            fastdiff.train(tiny(), digits(), steps=8, checkpoint=tmp_path, **changed, **other)


def rewritten(path, change):
    header, tensors = checkpoint.read(path, "")
    checkpoint.write(path, change(tensors), {k: v for k, v in header.items() if k != "format"})


WITHOUT = {
    "a moment that is not finite": lambda tensors: (
        tensors | {"optimizer.0.exp_avg": tensors["optimizer.0.exp_avg"] * math.nan}
    ),
    "no optimiser": lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("optimizer.")},
    "half an optimiser": lambda tensors: {k: v for k, v in tensors.items() if k != "optimizer.1.exp_avg_sq"},
    "another's optimiser": lambda tensors: tensors | {"optimizer.0.exp_avg": torch.zeros(3)},
    "no averages": lambda tensors: {k: v for k, v in tensors.items() if k != "net.out.bias"},
    "no weights": lambda tensors: {k: v for k, v in tensors.items() if not k.startswith("raw.")},
    "another precision": lambda tensors: {k: v.double() if k.startswith("net.") else v for k, v in tensors.items()},
}


@pytest.mark.parametrize("what", WITHOUT)
def test_a_refused_resume_leaves_the_model_as_it_was(what, tmp_path):
    fastdiff.train(tiny(), digits(), steps=2, batch_size=8, lr=1.0, checkpoint=tmp_path)
    rewritten(tmp_path / checkpoint.FILE, WITHOUT[what])
    model = tiny()
    before = weights(model)
    with pytest.raises(CheckpointMismatchError, match=r"checkpoint.safetensors"):
        fastdiff.train(model, digits(), steps=4, batch_size=8, lr=1.0, checkpoint=tmp_path)
    assert torch.equal(weights(model), before)
    fastdiff.train(model, digits(), steps=4, batch_size=8, lr=1.0, checkpoint=tmp_path, resume=False)


WRAPPED = {
    "torch.compile": lambda net: torch.compile(net, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "compiled parts": lambda net: net.hidden.__setitem__(0, torch.compile(net.hidden[0], backend="eager")) or net,
    "compiled in place": lambda net: net.compile(backend="eager") or net,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_checkpoint_holds_the_network_not_its_wrapper(wrap, tmp_path):
    def model(wrapped):
        model = tiny()
        model.net = wrap(model.net) if wrapped else model.net
        return model

    options = {"batch_size": 8, "lr": 1e-2, "warmup": 1}
    fastdiff.train(whole := tiny(), digits(), steps=6, **options)
    for k, kinds in enumerate([(True, False), (False, True)]):  # resumed across
        for wrapped, steps in zip(kinds, (3, 6)):
            fastdiff.train(model(wrapped), digits(), steps=steps, checkpoint=tmp_path / str(k), **options)
        assert torch.equal(weights(fastdiff.load(tmp_path / str(k))), weights(whole))
    filled = fastdiff.load(tmp_path / "0", net=wrap(tiny().net))
    saved = fastdiff.load(fastdiff.save(filled, tmp_path / "saved"))
    assert type(saved.net) is MLP
    for same in (filled, saved):
        assert torch.equal(weights(same), weights(whole))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["dsm", "ssm_vr"])
def test_networks_of_other_precisions_train_resume_and_load(dtype, loss, tmp_path):
    def model():
        model = tiny()
        model.net = model.net.to(dtype)
        return model

    options = {"loss": loss, "batch_size": 8, "lr": 1e-2, "warmup": 1}
    fastdiff.train(single := tiny(), digits(), steps=40, **options)
    fastdiff.train(whole := model(), digits(), steps=40, **options)
    # Adam's steps of 0.01 are far above the rounding of a weight, and the average of their sum moves with them
    moved = weights(single) - weights(tiny())
    assert (weights(whole).float() - weights(single)).norm() < 0.1 * moved.norm()
    for steps in (15, 40):
        fastdiff.train(parts := model(), digits(), steps=steps, checkpoint=tmp_path, **options)
    loaded = fastdiff.load(tmp_path)
    assert {p.dtype for p in loaded.net.parameters()} == {dtype}
    for same in (parts, loaded):
        assert torch.equal(weights(same), weights(whole))


def test_networks_that_cannot_be_copied_train():
    class Locked(MLP):
        def __init__(self):
            super().__init__((2,), hidden=16, layers=1)
            self.lock, self.stream = threading.Lock(), (k for k in range(3))

    torch.manual_seed(0)
    model = fastdiff.ScoreModel(Locked(), "vp", data_shape=(2,))
    fastdiff.train(model, digits(), steps=5, batch_size=8)
    fastdiff.train(plain := tiny(), digits(), steps=5, batch_size=8)
    assert torch.equal(weights(model), weights(plain))


@contextlib.contextmanager
def setting(set_, value, back):
    set_(value)
    try:
        yield
    finally:
        set_(back)


AROUND = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "another device": lambda: torch.device("meta"),
    "float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: setting(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
@pytest.mark.parametrize("loss", ["dsm", "ism"])
def test_what_is_set_around_a_training_does_not_matter(around, loss, tmp_path):
    fastdiff.train(whole := tiny(), digits(), steps=5, loss=loss, batch_size=8)
    model, data = tiny(), digits()
    with around():
        fastdiff.train(model, data, steps=3, loss=loss, batch_size=8, checkpoint=tmp_path)
        fastdiff.train(model, data, steps=5, loss=loss, batch_size=8, checkpoint=tmp_path)
    assert torch.equal(weights(model), weights(whole))


def test_autocast_sees_the_weights_of_each_step():
    """Its cache would keep those of the first: a training in bfloat16 is near the one in float32, and far from the start."""
    options = {"steps": 60, "batch_size": 8, "lr": 1e-2, "warmup": 1}
    fastdiff.train(single := tiny(), digits(), **options)
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fastdiff.train(model, digits(), **options)
    moved = weights(single) - weights(tiny())
    assert (weights(model) - weights(single)).norm() < 0.1 * moved.norm()


def test_networks_that_cannot_be_trained_as_they_are_are_refused():
    with torch.inference_mode():
        made = tiny()
        loaded = fastdiff.load("digits-vp")
    with pytest.raises(ConfigError, match="inference_mode"):
        fastdiff.train(made, digits(), steps=1)
    pictures = fastdiff.load_data("digits")
    pictures = Data(pictures.x, range=pictures.range, bins=pictures.bins)
    fastdiff.train(loaded, pictures, steps=1, batch_size=2)
    lazy = fastdiff.ScoreModel(nn.LazyLinear(2), "vp", data_shape=(2,))
    with pytest.raises(ConfigError, match="lazy"):
        fastdiff.train(lazy, digits(), steps=1)
    with pytest.raises(DeviceError, match="meta"):
        fastdiff.train(tiny().to("meta"), digits(), steps=1)
    with pytest.raises(ConfigError, match=r"torch\.func"):
        torch.func.vmap(lambda x: fastdiff.train(loaded, pictures, steps=1) or x)(torch.zeros(2))


@pytest.mark.parametrize("trainings", [2, 3])
def test_trainings_in_threads_are_those_alone(trainings):
    def model(seed):
        torch.manual_seed(seed)
        return fastdiff.ScoreModel(MLP((2,), hidden=16, layers=2, dropout=0.5), "vp", data_shape=(2,))

    alone, together = ([model(seed) for seed in range(trainings)] for _ in range(2))

    def train(model, seed):
        fastdiff.train(model, digits(), steps=40, batch_size=8, seed=seed)

    for seed, each in enumerate(alone):
        train(each, seed)
    before = torch.get_rng_state()
    threads = [threading.Thread(target=train, args=(each, seed)) for seed, each in enumerate(together)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights(a), weights(b)) for a, b in zip(alone, together))


def test_a_directory_is_held_against_a_second_training(tmp_path):
    model = tiny()
    before = weights(model)

    def second(step, loss):
        with pytest.raises(CheckpointError, match="in use by another training"):
            fastdiff.train(model, digits(), steps=1, checkpoint=tmp_path)

    fastdiff.train(tiny(), digits(), steps=2, batch_size=8, checkpoint=tmp_path, callback=second)
    assert torch.equal(weights(model), before)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.safetensors", "metrics.csv"]


def test_a_lock_dies_with_its_process(tmp_path):
    """And not with the last of its children, which have copies of its descriptors."""
    code = (
        "import os, sys, time, torch, fastdiff; from fastdiff.networks import MLP; "
        "model = fastdiff.ScoreModel(MLP((2,)), 'vp', data_shape=(2,)); "
        "hold = lambda step, loss: ((child := os.fork()) and print(child, flush=True), time.sleep(60)); "
        "data = torch.linspace(-1, 1, 8).view(4, 2); "
        "fastdiff.train(model, data, steps=100, batch_size=2, checkpoint=sys.argv[1], callback=hold)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(CheckpointError, match="in use"):
            fastdiff.train(tiny(), digits(), steps=1, checkpoint=tmp_path)
        process.kill()
        process.wait()
        fastdiff.train(tiny(), digits(), steps=1, batch_size=2, checkpoint=tmp_path)
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(tmp_path):
    (tmp_path / checkpoint.FILE).mkdir()
    for folder in ("/proc", tmp_path):
        model = tiny()
        model.net.register_forward_hook(lambda *_: pytest.fail("a step was made"))
        with pytest.raises(CheckpointError, match=r"checkpoint.*(no file can be written|must be)"):
            fastdiff.train(model, digits(), steps=1, checkpoint=folder)


def test_a_run_that_is_stopped_saves_that_step(tmp_path):
    options = {"batch_size": 8, "checkpoint_every": 4}
    fastdiff.train(whole := tiny(), digits(), steps=9, **options)
    answers = iter([False, False, True])
    done = fastdiff.train(tiny(), digits(), steps=9, checkpoint=tmp_path, stop=lambda: next(answers), **options)
    assert (done.steps, len(done.loss)) == (3, 3)
    fastdiff.train(parts := tiny(), digits(), steps=9, checkpoint=tmp_path, **options)
    assert torch.equal(weights(whole), weights(parts))


def test_labels_that_the_network_cannot_tell_apart_are_refused():
    data = Data(torch.tensor([[-1.0], [1.0]]).repeat(4, 1), labels=torch.tensor([0, 3]).repeat(4), range=(-1.0, 1.0))
    model = fastdiff.ScoreModel(MLP((1,), hidden=8, layers=1, num_classes=3), "vp", data_shape=(1,))
    with pytest.raises(DataError, match="4 classes"):
        fastdiff.train(model, data, steps=1)
    twice = fastdiff.ScoreModel(MLP((2,), hidden=8, out_channels=4), "vp", data_shape=(2,), variance="learned_range")
    with pytest.raises(ConfigError, match="learned_range"):
        fastdiff.train(twice, digits(), steps=1)


# --- files -----------------------------------------------------------------------------------------------------------


SAVED = [fastdiff.VE(0.02, 7.0), fastdiff.DDPM("cosine", T=20), fastdiff.NCSN([3.0, 0.2]), fastdiff.EDM(0.3)]


@pytest.mark.parametrize("sde", SAVED, ids=repr)
def test_save_and_load_give_the_same_model(tmp_path, sde):
    model = tiny(sde, "edm" if sde.name == "edm" else "eps", data_range=(0.0, 2.0))
    path = fastdiff.save(model, tmp_path / "model")
    assert path.name == "model.safetensors"
    other = fastdiff.load(path)
    assert (other.process, other.prediction, other.time_input, other.data_shape, other.data_range) == (
        model.process, model.prediction, model.time_input, model.data_shape, model.data_range
    )  # fmt: skip
    assert not other.training
    options = {"steps": 6 if sde.name == "ncsn" else 3, "num_samples": 3}
    assert torch.equal(fastdiff.sample(model, **options), fastdiff.sample(other, **options))
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors"]


def test_networks_of_other_kinds_are_given_by_the_caller(tmp_path):
    class Own(nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    model = fastdiff.ScoreModel(Own(2, 2), "vp", data_shape=(2,))
    fastdiff.train(model, digits(), steps=2, batch_size=8, checkpoint=tmp_path / "own")
    with pytest.raises(CheckpointMismatchError, match="give it, net="):
        fastdiff.load(tmp_path / "own")
    assert torch.equal(weights(fastdiff.load(tmp_path / "own", net=Own(2, 2))), weights(model))
    with pytest.raises(ConfigError, match=r"torch.nn.Module"):
        fastdiff.save(fastdiff.ScoreModel(lambda x, t: x, "vp", data_shape=(2,)), tmp_path / "model")
    with pytest.raises(ConfigError, match="ScoreModel"):
        fastdiff.save(Own(2, 2), tmp_path / "model")
    path = fastdiff.save(tiny(), tmp_path / "tiny")
    filled = fastdiff.load(path, net=MLP((2,), hidden=16, layers=1))
    assert torch.equal(weights(filled), weights(tiny()))
    with pytest.raises(CheckpointMismatchError, match=r"lacks|unknown|other shapes"):
        fastdiff.load(path, net=MLP((2,), hidden=32, layers=1))


def test_shipped_names():
    for name, sde in (("digits-ve", "ve"), ("digits-vp", "vp"), ("digits-subvp", "subvp")):
        model = fastdiff.load(name)
        assert (model.process.name, model.data_shape) == (sde, (1, 8, 8))
        assert fastdiff.sample(model, sde=sde, steps=2, num_samples=1).shape == (1, 1, 8, 8)
    size = sum(f.stat().st_size for f in checkpoint.SHIPPED.glob("*.safetensors"))
    assert size < 4_000_000
    with pytest.raises(FileNotFoundError, match="digits-subvp, digits-ve, digits-vp"):
        fastdiff.load("digits-vpp")


def test_a_checkpoint_of_an_earlier_version_is_read_and_resumed(tmp_path):
    """files/training-format-1.safetensors: six of these nine steps, by commit 5bb0823, and what its model returned."""

    def train(**options):
        torch.manual_seed(0)
        model = fastdiff.ScoreModel(
            MLP((2,), hidden=4, layers=1, num_classes=3), fastdiff.VP(beta_max=15.0), "v", data_shape=(2,),
            data_range=(-2.0, 2.0),
        )  # fmt: skip
        data = Data(torch.linspace(-2, 2, 24).view(12, 2), torch.arange(12) % 3, range=(-2.0, 2.0))
        done = fastdiff.train(model, data, steps=9, batch_size=5, lr=1e-2, warmup=3, seed=7, **options)
        return model, len(done.loss)

    shutil.copy(Path(__file__).parent / "files/training-format-1.safetensors", tmp_path / "checkpoint.safetensors")
    old, (whole, _) = fastdiff.load(tmp_path), train()
    resumed, steps = train(checkpoint=tmp_path)
    for name in ("process", "prediction", "time_input", "data_shape", "data_range", "variance"):
        assert getattr(old, name) == getattr(whole, name)
    out = old.net(torch.tensor([[0.5, -1.0]]), torch.tensor([0.3]), torch.tensor([1]))
    # numbers of another processor: nine steps of Adam at 1e-2, whose directions differ by float32 rounding
    torch.testing.assert_close(out, torch.tensor([[-0.013118293, -0.010054389]]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-4, atol=1e-5)
    assert steps == 3


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 200, -1])
def test_truncated_files_are_refused(tmp_path, cut):
    path = fastdiff.save(tiny(), tmp_path / "model")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CorruptCheckpointError, match="not a whole checkpoint" if cut else "is empty"):
        fastdiff.load(path)


def test_foreign_and_newer_files_are_refused(tmp_path):
    for name, content in (("page", b"<html>no</html>"), ("lfs", b"version https://git-lfs.github.com/spec/v1\n")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        with pytest.raises(CorruptCheckpointError):
            fastdiff.load(tmp_path / name)
    save_file({"w": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CorruptCheckpointError, match="fastdiff"):
        fastdiff.load(tmp_path / "plain")
    save_file({"w": torch.zeros(1)}, tmp_path / "new.safetensors", {"fastdiff": json.dumps({"format": 99})})
    with pytest.raises(CheckpointVersionError, match="format 99"):
        fastdiff.load(tmp_path / "new")
    with pytest.raises(FileNotFoundError):
        fastdiff.load(tmp_path / "nothing")


def test_one_flipped_bit_is_refused(tmp_path):
    path = fastdiff.save(tiny(), tmp_path / "model")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(whole), 200):
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << (place % 8)
        path.write_bytes(broken)
        with pytest.raises((CorruptCheckpointError, CheckpointVersionError)):
            fastdiff.load(path)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    model = tiny()
    with torch.no_grad():
        next(model.net.parameters()).fill_(math.nan)
    with pytest.raises(CheckpointMismatchError, match="not finite"):
        fastdiff.load(fastdiff.save(model, tmp_path / "model"))


def test_tied_weights_are_saved(tmp_path):
    model = tiny()
    model.net.hidden.append(model.net.hidden[0])
    checkpoint.write(tmp_path / "tied", {"a": model.net.hidden[0].weight, "b": model.net.hidden[0].weight}, {})
    assert sorted(checkpoint.read(tmp_path / "tied.safetensors", "")[1]) == ["a", "b"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = fastdiff.save(tiny(), tmp_path / "model")
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match="untouched"):
        fastdiff.save(tiny(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_digits_are_the_real_ones():
    assert load_data("digits").shape == (1, 8, 8)


def test_sparse_gradients_are_the_dense_ones():
    class Net(torch.nn.Module):
        def __init__(self, sparse):
            super().__init__()
            torch.manual_seed(0)
            self.table = torch.nn.Embedding(5, 3, sparse=sparse)
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x, t):
            return self.layer(x) + self.table((5 * t).long().clamp(max=4))

    nets = [Net(sparse) for sparse in (False, True)]
    for net in nets:
        fastdiff.train(
            fastdiff.ScoreModel(net, "vp", data_shape=(3,)), torch.eye(3).repeat(4, 1), steps=4, batch_size=4
        )
    for one, other in zip(*(net.parameters() for net in nets)):
        assert torch.equal(one, other)
