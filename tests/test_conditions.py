"""How a condition reaches a network, which are refused before any call, and what a model remembers of its labels."""

from __future__ import annotations

import functools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import losses
from fastdiff.cli.commands import main
from fastdiff.errors import ConfigError, DataError, DTypeError, ShapeError
from fastdiff.execution import ops
from fastdiff.execution.conditions import takes
from fastdiff.networks import MLP, UNet
from fastdiff.training import Data, checkpoint

RUN = {"steps": 2, "num_samples": 3, "progress": False}


class Seen(nn.Module):
    """Networks of the field's signatures, which keep what they are given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def keep(self, x, **given):
        self.seen.append({name: value for name, value in given.items() if value is not None})
        return -self.weight * x


class Plain(Seen):
    def forward(self, x, t):
        return self.keep(x)


class Third(Seen):
    def forward(self, x, t, anything=None):
        return self.keep(x, anything=anything)


class Diffusers(Seen):  # UNet2DModel's order in some versions, and UNet2DConditionModel's beside it
    def forward(self, sample, timestep, return_dict=True, class_labels=None):
        assert return_dict is True
        return self.keep(sample, class_labels=class_labels)


class Latent(Seen):  # latent diffusion's UNetModel
    def forward(self, x, timesteps, context=None, y=None):
        return self.keep(x, context=context, y=y)


class SelfConditioned(Seen):  # lucidrains'
    def forward(self, x, time, x_self_cond=None, classes=None):
        assert x_self_cond is None
        return self.keep(x, classes=classes)


class KeywordOnly(Seen):
    def forward(self, x, t, *, y=None):
        return self.keep(x, y=y)


class Required(Seen):
    def forward(self, x, t, y):
        return self.keep(x, y=y)


class Whole(Seen):
    def forward(self, x, t, cond):
        return self.keep(x, **cond) if isinstance(cond, dict) else self.keep(x, cond=cond)


class Keywords(Seen):
    def forward(self, x, t, **kwargs):
        return self.keep(x, **kwargs)


class Passes(nn.Module):
    """A wrapper that hands on what it gets."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, *args, **kwargs):
        return self.net(*args, **kwargs)


class PassesTheRest(Passes):
    def forward(self, x, t, *args, **kwargs):
        return self.net(x, 1000 * t, *args, **kwargs)


def wrappers(net):
    return {
        "itself": net, "DataParallel": nn.DataParallel(net), "partial": functools.partial(net),
        "passes": Passes(net), "passes the rest": PassesTheRest(net), "both": Passes(nn.DataParallel(net)),
    }  # fmt: skip


def everything(model, cond):
    """Each way to ask a model of vectors of two numbers."""
    x, t = torch.zeros(3, 2), torch.full((3,), 0.5)
    loose = {"rtol": 0.1, "atol": 0.1}
    return [
        lambda: fastdiff.sample(model, cond=cond, **RUN),
        lambda: fastdiff.sample(model, cond=cond, sampler=fastdiff.samplers.Adaptive(**loose), num_samples=3),
        lambda: fastdiff.log_likelihood(model, x, cond=cond, **loose),
        lambda: fastdiff.encode(model, x, cond=cond, **loose),
        lambda: fastdiff.decode(model, x, cond=cond, **loose),
        lambda: fastdiff.interpolate(model, x, x + 1, [0.5], cond=cond, **loose),
        lambda: model.score(x, t, cond),
        lambda: losses.per_sample(model, x, t, ops.cursor(0, 0, 0, "cpu"), "dsm", cond),
    ]


LABELS, VECTOR = torch.tensor([1, 0, 2]), torch.randn(3, 4)
CALLS = [
    (Third, LABELS, "anything"), (Third, VECTOR, "anything"), (Diffusers, LABELS, "class_labels"), (Latent, LABELS, "y"),
    (Latent, VECTOR, "context"), (SelfConditioned, LABELS, "classes"), (KeywordOnly, LABELS, "y"), (Required, LABELS, "y"),
    (Whole, VECTOR, "cond"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "cond", "name"), CALLS)
def test_a_tensor_reaches_the_argument_that_is_the_condition(kind, cond, name):
    for wrapped in wrappers(kind()).values():
        net = wrapped
        while not isinstance(net, Seen):
            net = net.func if isinstance(net, functools.partial) else next(net.children())
        for call in everything(fastdiff.ScoreModel(wrapped, "vp", data_shape=(2,)), cond):
            net.seen.clear()
            call()
            assert net.seen
            for given in net.seen:
                assert given.keys() == {name}
                rows = given[name]
                assert len(rows) <= 3
                assert all((cond == row).flatten(1).all(1).any() if cond.ndim > 1 else row in cond for row in rows)


@pytest.mark.parametrize(
    ("kind", "cond", "names"),
    [
        (Latent, {"context": VECTOR, "y": LABELS}, {"context", "y"}), (Keywords, {"low_res": VECTOR}, {"low_res"}),
        (Whole, {"scale": VECTOR, "shift": VECTOR}, {"scale", "shift"}), (Whole, {"cond": VECTOR}, {"cond"}),
        (KeywordOnly, {"y": VECTOR}, {"y"}), (Diffusers, {"class_labels": LABELS}, {"class_labels"}), (Plain, {}, set()),
    ],
)  # fmt: skip
def test_a_dict_is_keywords_or_the_third_argument(kind, cond, names):
    net = kind()
    model = fastdiff.ScoreModel(net, "vp", data_shape=(2,))
    whole = fastdiff.sample(model, cond=cond, **RUN)
    x = torch.randn(3, 2)
    model(x, torch.full((3,), 0.5), cond)
    fastdiff.log_likelihood(model, x, cond=cond, rtol=0.1, atol=0.1)
    assert all(given.keys() == names for given in net.seen)
    assert torch.equal(whole, fastdiff.sample(model, cond=cond, batch_size=2, **RUN))
    assert {len(value) for given in net.seen[-2:] for value in given.values()} <= {1, 2}


@pytest.mark.parametrize(
    ("kind", "cond", "words"),
    [
        (Plain, VECTOR, "no place for it: leave cond out"), (Plain, {"y": LABELS}, r"\(x, t\) know nothing: leave cond out"),
        (Latent, {"y": LABELS, "contxt": VECTOR}, r"contxt, of which .* its keywords are context, y"),
        (Keywords, VECTOR, "give a dict"), (Required, None, "need, and y is missing: give cond=a tensor or a dict with 'y'"),
        (Required, {"z": VECTOR, "y": LABELS}, "z, of which"), (Whole, None, "cond is missing"),
    ],
)  # fmt: skip
def test_what_a_network_does_not_take_is_refused_before_any_call(kind, cond, words):
    net = kind()
    model = fastdiff.ScoreModel(net, "vp", data_shape=(2,))
    x, t = torch.randn(3, 2), torch.full((3,), 0.5)
    for call in (
        lambda: fastdiff.sample(model, cond=cond, **RUN),
        lambda: fastdiff.sample(net, "vp", shape=(2,), cond=cond, **RUN),
        lambda: fastdiff.log_likelihood(model, x, cond=cond),
        lambda: fastdiff.encode(model, x, cond=cond),
        lambda: fastdiff.decode(model, x, cond=cond),
        lambda: model.predict("eps", x, t, cond),
        lambda: losses.per_sample(model, x, t, ops.cursor(0, 0, 0, "cpu"), "dsm", cond),
    ):
        with pytest.raises(ConfigError, match=words):
            call()
    assert not net.seen


def test_functions_and_objects_have_signatures_too():
    seen = []

    class Callable:
        def __call__(self, x, t, mask=None, label=None):
            seen.append((mask, label))
            return -x

    class Bound:
        def net(self, x, t, label):
            seen.append((None, label))
            return -x

    def bound(x, t, scale, label=None):
        seen.append((None, label))
        return -scale * x

    for net in (
        Callable(),
        Bound().net,
        functools.partial(bound, scale=2.0),
        torch.compile(Bound().net, backend="eager"),
    ):
        seen.clear()
        fastdiff.sample(net, "vp", shape=(2,), cond=LABELS, **RUN)
        assert all(mask is None and torch.equal(label, LABELS) for mask, label in seen)
        assert seen
    with pytest.raises(ConfigError, match="its keywords are label, scale"):
        fastdiff.sample(functools.partial(bound, scale=2.0, label=None), "vp", shape=(2,), cond={"z": LABELS}, **RUN)
    model = fastdiff.ScoreModel(Plain(), "vp", data_shape=(2,))
    model.net = Third()  # another network, and another signature
    fastdiff.sample(model, cond=VECTOR, **RUN)
    assert model.net.seen


def test_a_traced_network_keeps_its_arguments():
    class Scale(nn.Module):
        def forward(self, x, t, y):
            return -x * y[:, None]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Scale(), (torch.ones(3, 2), torch.ones(3), torch.ones(3)))
    assert takes(traced).third == "y"
    with pytest.raises(ConfigError, match="y is missing"):
        fastdiff.sample(traced, "vp", shape=(2,), **RUN)
    y = torch.rand(3)
    assert torch.equal(
        fastdiff.sample(traced, "vp", shape=(2,), cond=y, **RUN),
        fastdiff.sample(Scale(), "vp", shape=(2,), cond=y, **RUN),
    )


# --- labels ----------------------------------------------------------------------------------------------------------


def labelled(n=40, classes=3, labels=True):
    y = torch.arange(n) % classes
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).clamp(-3, 3) + y[:, None]
    return Data(x, y if labels else None, range=(-6.0, 6.0))


def model_of(net):
    return fastdiff.ScoreModel(net, "vp", data_shape=(2,), data_range=(-1.0, 1.0))


def trained(net, data):
    model = model_of(net)
    fastdiff.train(model, data, steps=2, batch_size=8, lr=1e-2, warmup=0, progress=False)
    return model


NETWORKS = {
    "MLP": lambda: MLP((2,), hidden=8, layers=1, num_classes=4),
    "wrapped": lambda: nn.DataParallel(MLP((2,), hidden=8, layers=1, num_classes=4)),
    "passed on": lambda: PassesTheRest(MLP((2,), hidden=8, layers=1, num_classes=4)),
    "required": Required, "optional": Latent, "by keyword": KeywordOnly, "third": Third, "diffusers": Diffusers,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reloaded", [False, True])
def test_a_model_trained_with_labels_is_not_asked_without(name, reloaded, tmp_path):
    net = NETWORKS[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = trained(net, labelled())
    assert model.num_classes == 3
    if reloaded:
        fastdiff.save(model, tmp_path / "model")
        model = fastdiff.load(tmp_path / "model.safetensors", net=NETWORKS[name]())
        assert model.num_classes == 3
    calls = getattr(model.net, "seen", [])
    calls.clear()
    refusals = {
        None: (ConfigError, "labels 0 to 2 that the model was trained with, got none|y is missing"),
        torch.tensor([0, 1, 3]): (DataError, "labels 0 to 2 .* got 0 to 3"),
        torch.tensor([0, -1, 2]): (DataError, "got -1 to 2"),
        torch.tensor([0.0, 1.0, 2.0]): (DTypeError, "float32"),
        torch.tensor([True, False, True]): (DTypeError, "bool"),
        torch.zeros(3, 1, dtype=torch.int64): (ShapeError, r"one for each of 3 samples, got shape \(3, 1\)"),
    }
    for cond, (kind, words) in refusals.items():
        if name == "optional" and cond is not None and kind is not DataError:
            continue  # what is no vector of integers is its context
        for call in everything(model, cond):
            with pytest.raises(kind, match=words):
                call()
    assert not calls
    for cond in (LABELS, {takes(model.net).labels: LABELS.int()} if takes(model.net).third != "rest" else LABELS):
        for call in everything(model, cond):
            call()


def test_fastdiffs_networks_ask_for_labels_untrained_too():
    for net in (MLP((2,), num_classes=3), nn.DataParallel(MLP((2,), num_classes=3)), Passes(MLP((2,), num_classes=3))):
        for call in (
            lambda: fastdiff.sample(net, "vp", shape=(2,), **RUN),  # noqa: B023
            lambda: fastdiff.sample(fastdiff.ScoreModel(net, "vp", data_shape=(2,)), **RUN),  # noqa: B023
        ):
            with pytest.raises(ConfigError, match="labels 0 to 2"):
                call()
    with pytest.raises(ConfigError, match="without num_classes, got labels: build it with num_classes="):
        fastdiff.sample(MLP((2,)), "vp", shape=(2,), cond=LABELS, **RUN)
    assert fastdiff.ScoreModel(MLP((2,)), "vp", data_shape=(2,)).num_classes is None
    # a classifier's number of outputs is no condition of a network that takes none
    net = Plain()
    net.num_classes = 1000
    fastdiff.sample(net, "vp", shape=(2,), **RUN)


def test_the_label_that_means_none_is_one_that_the_caller_trained():
    """A loop of one's own that leaves labels out now and then says so by a class more."""
    net = MLP((2,), num_classes=3)
    none = torch.full((3,), 3)
    with pytest.raises(DataError, match="got 3 to 3"):
        fastdiff.sample(fastdiff.ScoreModel(net, "vp", data_shape=(2,)), cond=none, **RUN)
    fastdiff.sample(fastdiff.ScoreModel(net, "vp", data_shape=(2,), num_classes=4), cond=none, **RUN)


def test_a_sampler_with_a_learned_variance_keeps_the_facts():
    net = UNet((1, 4, 4), channels=4, multipliers=(1,), blocks=1, num_classes=2, out_channels=2)
    model = fastdiff.ScoreModel(net, "ddpm", data_shape=(1, 4, 4), data_range=(0.0, 1.0))
    solver = fastdiff.samplers.Ancestral(variance="learned_range")
    with pytest.raises(ConfigError, match="labels 0 to 1"):
        fastdiff.sample(model, steps=3, num_samples=2, sampler=solver)
    assert model.variance is None
    x = fastdiff.sample(model, steps=3, num_samples=2, sampler=solver, cond=torch.tensor([0, 1]))
    assert x.shape == (2, 1, 4, 4)


def test_a_model_trained_without_labels_is_not_asked_with(tmp_path):
    for make in (lambda: MLP((2,), hidden=8, layers=1, num_classes=4), Latent):
        model = trained(make(), labelled(labels=False))
        fastdiff.save(model, tmp_path / "model")
        for each in (model, fastdiff.load(tmp_path / "model.safetensors", net=make())):
            for call in everything(each, LABELS):
                with pytest.raises(ConfigError, match="was trained without labels: leave cond out"):
                    call()
            for call in everything(each, None):
                call()
    with pytest.raises(ConfigError, match="give labelled data"):
        trained(Required(), labelled(labels=False))
    assert trained(Plain(), labelled(labels=False)).num_classes is None


@pytest.mark.parametrize("make", [Plain, lambda: MLP((2,))])
def test_labels_that_no_network_takes_are_said_once(make):
    data = labelled()
    with pytest.warns(UserWarning, match="labels of 3 classes, and the network takes none") as said:
        model = trained(make(), data)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert model.num_classes is None
    fastdiff.sample(model, **RUN)
    with warnings.catch_warnings():  # the way out
        warnings.simplefilter("error")
        trained(make(), Data(data.x, range=data.range, bins=data.bins))


def test_labels_move_the_weights_of_a_network_by_any_name():
    for forward in ("y", "class_labels=None", "cond=None", "r=None, labels=None", "*, label=None", "*rest"):
        name = forward.split(",")[-1].strip(" *").split("=")[0]
        scope = {}
        value = "rest[0]" if name == "rest" else name
        exec(f"def forward(self, x, t, {forward}): return self.out(x) + self.label({value})", scope)
        net = type("Net", (nn.Module,), {"forward": scope["forward"]})()
        net.out, net.label = nn.Linear(2, 2), nn.Embedding(4, 2)
        before = net.label.weight.detach().clone()
        trained(net, labelled())
        assert (net.label.weight != before).any(1).tolist() == [True, True, True, False], forward


def test_labels_are_a_fact_of_a_run(tmp_path):
    """A resumed run has the labels of before; a file of an earlier version, which did not name them, goes on."""
    net, data = MLP((2,), hidden=8, layers=1, num_classes=3), labelled()
    options = {"batch_size": 8, "progress": False, "checkpoint": tmp_path}
    fastdiff.train(model_of(net), data, steps=2, **options)
    header, tensors = checkpoint.read(tmp_path / checkpoint.FILE, "")
    assert header["model"].pop("num_classes") == 3
    checkpoint.write(tmp_path / checkpoint.FILE, tensors, header)
    model = model_of(MLP((2,), hidden=8, layers=1, num_classes=3))
    fastdiff.train(model, data, steps=3, **options)
    assert json.loads(json.dumps(checkpoint.read(tmp_path / checkpoint.FILE, "")[0]))["model"]["num_classes"] == 3
    assert fastdiff.load(tmp_path).num_classes == 3


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = labelled()
    np.savez("xy.npz", x=data.x.numpy(), y=data.labels.numpy())
    np.save("x.npy", data.x.numpy())
    return tmp_path


def command(capsys, *words):
    code = main([str(word) for word in words])
    return code, capsys.readouterr()


def test_the_command_line_asks_a_labelled_model_with_labels(folder, capsys):
    train = ["train", "xy.npz", "--out", "m", "--steps", 2, "--batch-size", 8]
    assert command(capsys, *train, "--classes")[0] == 0
    model = fastdiff.load("m")
    code, said = command(capsys, "sample", "m", "--steps", 3, "-n", 2)
    assert code == 2
    assert "--labels, and not --cond, must say the labels from 0 to 2" in said.err
    for text, y in (("2", [2, 2, 2, 2]), ("0,1,2", [0, 1, 2, 0])):
        assert command(capsys, "sample", "m", "--steps", 3, "-n", 4, "--labels", text, "--out", "s.npy")[0] == 0
        expected = fastdiff.sample(model, steps=3, num_samples=4, cond=torch.tensor(y))
        np.testing.assert_array_equal(np.load("s.npy"), expected)
    for wrong in ("3", "-1", "a", "", "1,,2", "1.0", "99999999999999999999"):
        code, said = command(capsys, "sample", "m", "--steps", 3, f"--labels={wrong}")
        assert code == 2, wrong
        assert "--labels must be whole numbers from 0 to 2" in said.err
    ask = ["likelihood", "m", "--rtol", 1e-2, "--atol", 1e-2, "--trace", "exact", "-n", 4, "--out", "ll.npz", "--data"]
    loose = {"rtol": 1e-2, "atol": 1e-2, "trace": "exact"}
    x, y = torch.from_numpy(np.load("x.npy"))[:4], torch.arange(4) % 3
    for words, cond in (
        (["xy.npz"], y),
        (["xy.npz", "--labels", 1], y * 0 + 1),
        (["x.npy", "--labels", "2,0"], 2 - 2 * (y % 2)),
    ):
        assert command(capsys, *ask, *words)[0] == 0
        cond = torch.tensor([2, 0, 2, 0]) if words[0] == "x.npy" else cond
        expected = fastdiff.log_likelihood(model, x, cond=cond, **loose).nats
        np.testing.assert_allclose(np.load("ll.npz")["nats"], expected, rtol=1e-9)
    code, said = command(capsys, *ask, "x.npy")
    assert code == 2
    assert "give labelled data, or --labels" in said.err


def test_the_command_line_guides_a_model_trained_with_dropout(folder, capsys):
    train = ["train", "xy.npz", "--steps", 2, "--batch-size", 8, "--classes"]
    assert command(capsys, *train, "--out", "m", "--cond-dropout", 0.5)[0] == 0
    assert command(capsys, *train, "--out", "undropped")[0] == 0
    model, y, guide = fastdiff.load("m"), torch.tensor([0, 1, 0, 1]), fastdiff.guidance.ClassifierFree(2.5)
    draw = ["--steps", 3, "-n", 4, "--labels", "0,1", "--guidance", 2.5]
    assert command(capsys, "sample", "m", *draw)[0] == 0
    guided = fastdiff.sample(model, steps=3, num_samples=4, cond=y, guidance=guide)
    np.testing.assert_array_equal(np.load("samples.npy"), guided)
    assert not torch.equal(guided, fastdiff.sample(model, steps=3, num_samples=4, cond=y))
    for same in (2.5, [2.5], np.float32(2.5)):
        assert torch.equal(guided, fastdiff.sample(model, steps=3, num_samples=4, cond=y, guidance=same))
    np.save("gaps.npy", np.float32([0.5, math.nan]))
    assert command(capsys, "inpaint", "m", "gaps.npy", *draw)[0] == 0
    known = torch.tensor([0.5, math.nan])
    painted = fastdiff.inpaint(model, known, steps=3, num_samples=4, cond=y, guidance=guide)
    np.testing.assert_array_equal(np.load("inpainted.npy"), painted)
    assert command(capsys, "sample", "m", *draw, "--shard-size", 2, "--out", "shards")[0] == 0
    code, said = command(capsys, "sample", "m", *draw[:-1], 3, "--shard-size", 2, "--out", "shards")
    assert code == 2
    assert "holds samples of --guidance 2.5, and this run has 3.0" in said.err
    for words, why in (
        (["undropped", *draw], "was not: train(cond_dropout=0.1)"),
        (["m", *draw[:-1], "nan"], "must be a number"),
    ):
        code, said = command(capsys, "sample", *words)
        assert code == 2
        assert why in said.err


def test_the_command_line_without_labels(folder, capsys):
    code, said = command(capsys, "train", "xy.npz", "--out", "m", "--steps", 2, "--batch-size", 8)
    assert code == 0
    assert "the labels of xy.npz are not used: --classes conditions on them" in said.err
    assert command(capsys, "sample", "m", "--steps", 3, "-n", 2)[0] == 0
    for words in (["sample", "m", "--steps", 3, "--labels", 1], ["likelihood", "m", "--data", "xy.npz", "--labels", 1]):
        code, said = command(capsys, *words)
        assert code == 2
        assert "--labels needs a model that was trained with labels" in said.err


def test_the_command_line_hands_over_arrays(folder, capsys, monkeypatch):
    net = Latent()
    model = fastdiff.ScoreModel(net, "vp", data_shape=(2,), data_range=(-4.0, 6.0))
    monkeypatch.setattr("fastdiff.training.load", lambda name, net=None, ema=None: model)
    context = np.random.default_rng(0).normal(size=(40, 4))
    np.save("context.npy", context)
    assert command(capsys, "sample", "m", "--steps", 2, "--cond", "context.npy")[0] == 0
    assert np.load("samples.npy").shape == (40, 2)
    assert torch.equal(net.seen[0]["context"], torch.from_numpy(context).float())
    ask = ["likelihood", "m", "--data", "x.npy", "--rtol", 0.1, "--atol", 0.1]
    net.seen.clear()
    code, said = command(capsys, *ask, "--first-sample", 7, "-n", 5, "--cond", "context.npy")
    assert code == 0, said.err
    assert torch.equal(net.seen[0]["context"], torch.from_numpy(context).float()[7:12])
    code, said = command(capsys, *ask, "--cond", "short.npy")
    assert code == 2
    np.save("short.npy", context[:3])
    code, said = command(capsys, *ask, "--cond", "short.npy")
    assert code == 2
    assert "--cond must have 40 entries" in said.err
    (folder / "words.npy").write_text("no array")
    for words in (["sample", "m", "--cond", "words.npy"], ["sample", "m", "-n", 7, "--cond", "short.npy"]):
        assert command(capsys, *words)[0] == 2


def test_what_is_missing_and_what_is_wrong_are_named():
    """A missing argument is a TypeError too, as it is where the network is called by hand; labels in a dict have their key."""
    needs = lambda x, t, y: x  # noqa: E731
    with pytest.raises(TypeError, match="y is missing") as caught:
        fastdiff.sample(needs, "vp", 2, shape=(3,), num_samples=2)
    assert isinstance(caught.value, ConfigError)
    model = fastdiff.ScoreModel(needs, "vp", data_shape=(3,), num_classes=3)
    for cond, said in (({"y": torch.tensor([0.0, 1.0])}, r"cond\['y'\] must"), (torch.tensor([0, 3]), "^cond must")):
        with pytest.raises((fastdiff.errors.DTypeError, fastdiff.errors.DataError), match=said):
            fastdiff.sample(model, steps=2, num_samples=2, cond=cond)
