"""Training on labels, vectors and fields: what reaches the network, what a model remembers of it, and what it then answers."""

from __future__ import annotations

import importlib
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import losses
from fastdiff.cli.commands import main
from fastdiff.errors import ConfigError, DataError, DeviceError, DTypeError, MissingConditionError, ShapeError
from fastdiff.execution import noise, ops
from fastdiff.execution.conditions import takes
from fastdiff.networks import MLP, UNet, build, describe
from fastdiff.training import Data, checkpoint
from fastdiff.training.batches import Batches
from fastdiff.training.objective import Objective

NAN = math.nan
QUICK = {"batch_size": 8, "lr": 1e-2, "warmup": 0, "progress": False}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(count=40, labels=False, cond=(3,), samples=(2,)):
    """Data with vectors of columns of scales 1, 1000 and 1e-3, or with fields."""
    values = torch.randn(count, *cond, generator=generator(), dtype=torch.float64)
    if len(cond) == 1:
        values = values * torch.tensor([1.0, 1000.0, 1e-3])[: cond[0]] + torch.tensor([0.0, 5e6, 7.0])[: cond[0]]
    x = torch.randn(count, *samples, generator=generator(1)).clamp(-3, 3)
    return Data(x, torch.arange(count) % 3 if labels else None, range=(-3.0, 3.0), cond=values)


def small(shape=(2,), **options):
    torch.manual_seed(0)
    if len(shape) == 1:
        return MLP(shape, hidden=8, layers=2, **options)
    return UNet(shape, channels=4, multipliers=(1, 2), blocks=1, **options)


def model_of(net, **options):
    return fastdiff.ScoreModel(net, "vp", data_shape=net.shape, data_range=(-1.0, 1.0), **options)


def moved(net):
    """The network with weights that are not at zero anywhere."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator(2)))
    return net


# --- data ------------------------------------------------------------------------------------------------------------


def test_conditions_stay_with_their_samples():
    x = torch.arange(10.0)[:, None].expand(10, 2)
    data = Data(x, cond=torch.stack((x[:, 0], -x[:, 0]), 1))
    for part in data.split(0.5, seed=3):
        assert torch.equal(part.cond, part.x * torch.tensor([1.0, -1.0]))
    assert "conditions of shape [2]" in data.explain()
    others = [
        Data(x),
        Data(x, cond=data.cond + 1),
        Data(x, cond=data.cond.double()),
        Data(x, cond=data.cond[..., None]),
    ]
    assert len({each.fingerprint() for each in (data, *others)}) == 5
    assert Data(x, cond=data.cond.numpy()).fingerprint() == data.fingerprint()
    assert "conditions" not in others[0].explain()


BAD = torch.ones(4, 2)
BAD[2, 1] = NAN


@pytest.mark.parametrize(
    ("cond", "error", "words"),
    [
        (BAD, DataError, r"cond must be finite, got nan at index \[2, 1\]"),
        (torch.ones(4), ShapeError, r"use cond\[:, None\]"), (torch.ones(3, 2), DataError, "length 4, one per sample, got 3"),
        (torch.ones(4, 2).long(), DTypeError, "int64: convert it to float32, or give class numbers as labels="),
        (np.ones((4, 2), np.float16), DTypeError, "float16"), ([[1.0]] * 4, DTypeError, "numpy.asarray"),
        (torch.ones(4, 0), ShapeError, "at least one axis"), ("no such.npy", DataError, "no such file"),
    ],
)  # fmt: skip
def test_conditions_that_are_none_are_refused(cond, error, words):
    with pytest.raises(error, match=words):
        fastdiff.load_data(torch.rand(4, 2), cond=cond)


def test_conditions_come_from_files(tmp_path):
    x, c = np.random.default_rng(0).random((2, 5, 2))
    np.savez(tmp_path / "a.npz", theta=x, cond=c)
    np.save(tmp_path / "c.npy", c[::-1].copy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = fastdiff.load_data(tmp_path / "a.npz")
    assert np.array_equal(data.x, x)
    assert np.array_equal(data.cond, c)
    assert np.array_equal(fastdiff.load_data(tmp_path / "a.npz", cond=tmp_path / "c.npy").cond, c[::-1])
    with pytest.raises(ConfigError, match="cond must be None where source is a Data"):
        fastdiff.load_data(data, cond=c)


# --- networks --------------------------------------------------------------------------------------------------------

TAKING = {
    "film": lambda **o: small(cond_shape=(3,), **o), "concat": lambda **o: small(cond_shape=(3,), cond_mode="concat", **o),
    "flat": lambda **o: small(cond_shape=(3, 2), **o), "unet film": lambda **o: small((2, 5, 4), cond_shape=(3,), **o),
    "field": lambda **o: small((2, 5, 4), cond_shape=(3, 5, 4), **o), "signal": lambda **o: small((1, 7), cond_shape=(2, 7), **o),
}  # fmt: skip


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("name", TAKING)
def test_gradients_reach_the_condition_and_its_null(name, classes):
    net = moved(TAKING[name](num_classes=classes))
    x, t = torch.randn(6, *net.shape), torch.rand(6)
    cond = torch.randn(6, *net.cond_shape)
    y = None if classes is None else torch.tensor([0, 1, 2, 3, 0, 1])
    cond[4:] = NAN
    out = net(x, t, y, cond=cond)
    assert out.isfinite().all()
    out.square().sum().backward()
    for p in net.parameters():
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert (p.grad != 0).any()
    # those without a condition move the null, and all others what embeds it
    for kept, reached, still in ((slice(4, 6), "null", "embed"), (slice(0, 4), "embed", "null")):
        net.zero_grad()
        net(x[kept], t[kept], None if y is None else y[kept], cond=cond[kept]).square().sum().backward()
        for key, p in net.condition.named_parameters():
            assert (p.grad != 0).any() == key.startswith(reached)
            assert not key.startswith(still) or (p.grad == 0).all()
    # NaN for all is None; a condition is its own sample's; and it matters
    with torch.no_grad():
        torch.testing.assert_close(net(x, t, y, cond=cond * NAN), net(x, t, y), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            net(x[:3], t[:3], None if y is None else y[:3], cond=cond[:3]), out[:3], rtol=1e-4, atol=1e-5
        )
        assert (net(x, t, y, cond=cond.flip(0)) - out).flatten(1).abs().amax(1).min() > 1e-4


def test_concatenation_is_what_it_says():
    """One layer on (x, cond), as the sum of one on each."""
    net = moved(small((2, 5, 4), cond_shape=(3, 5, 4)))
    x, cond = torch.randn(3, 2, 5, 4), torch.randn(3, 3, 5, 4)
    enter, beside = net.down[0][0], net.condition.embed
    both = nn.Conv2d(5, 4, 3, 1, 1)
    both.weight.data, both.bias.data = torch.cat((enter.weight, beside.weight), 1).data, enter.bias.data
    seen = []
    net.down[0][1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(x, torch.rand(3), cond=cond)
    torch.testing.assert_close(seen[0], both(torch.cat((x, cond), 1)))
    net = moved(small(cond_shape=(3,), cond_mode="concat"))
    x, t, cond = torch.randn(4, 2), torch.rand(4), torch.randn(4, 3)
    first = torch.cat((net.hidden[0].weight, net.condition.embed[1].weight), 1)
    times = net.conditioning(t, None).chunk(2, 1)
    h = nn.functional.silu(torch.cat((x, cond), 1) @ first.T + net.hidden[0].bias + times[0])
    torch.testing.assert_close(net(x, t, cond=cond), net.out(nn.functional.silu(net.hidden[1](h) + times[1])))


@pytest.mark.parametrize(
    "make",
    [lambda **o: small(num_classes=3, **o), lambda **o: small(**o), lambda **o: small((2, 5, 4), num_classes=3, **o)],
)
@pytest.mark.parametrize("concat", [False, True])
def test_networks_without_conditions_are_as_they_were(make, concat):
    """The same parameters in the same order with the same first weights; conditions come after them, and change none."""
    plain = make()
    options = {"cond_mode": "concat"} if concat and isinstance(plain, MLP) else {}
    more = make(cond_shape=(3,), **options)
    names = list(plain.state_dict())
    assert names == list(more.state_dict())[: len(names)]
    assert all(torch.equal(value, more.state_dict()[name]) for name, value in plain.state_dict().items())
    assert not [key for key in describe(plain) if key.startswith("cond")]
    assert describe(build(json.loads(json.dumps(describe(more))))) == describe(more)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UNet((1, 8, 8), cond_shape=(2, 4, 16)), r"\(n,\), a vector, or \('C', 8, 8\), a field .* got \(2, 4, 16\)"),
        (lambda: UNet((1, 8, 8), cond_shape=(8, 8)), "a field beside"), (lambda: UNet((1, 8), cond_shape=(1, 8, 8)), "a field"),
        (lambda: MLP((2,), cond_shape=()), "at least one axis"), (lambda: MLP((2,), cond_shape=3), "tuple of integers"),
        (lambda: MLP((2,), cond_shape=(0,)), ">= 1"), (lambda: MLP((2,), cond_shape=(1,), cond_mode="cat"), "concat"),
    ],
)  # fmt: skip
def test_conditions_that_a_network_has_no_place_for_are_refused_when_it_is_built(make, words):
    with pytest.raises(fastdiff.errors.FastdiffError, match=words):
        make()


@pytest.mark.parametrize(
    ("cond", "error", "words"),
    [
        (torch.zeros(2, 4), ShapeError, r"shape \[2, 3\], got \[2, 4\]"), (torch.zeros(3, 3), ShapeError, r"got \[3, 3\]"),
        (torch.zeros(2, 3).double(), DTypeError, "use cond.to"), (torch.zeros(2, 3).long(), DTypeError, "int64"),
        ([0.0] * 3, DTypeError, "cond must be a tensor"), (torch.zeros(2, 3, device="meta"), DeviceError, "on x's device"),
    ],
)  # fmt: skip
def test_a_network_checks_its_condition(cond, error, words):
    net = small(cond_shape=(3,))
    with pytest.raises(error, match=words):
        net(torch.zeros(2, 2), torch.zeros(2), cond=cond)
    with pytest.raises(ConfigError, match=r"without cond_shape.*build it with cond_shape=\(3,\)"):
        small()(torch.zeros(2, 2), torch.zeros(2), cond=torch.zeros(2, 3))


@pytest.mark.parametrize("name", TAKING)
@pytest.mark.parametrize("classes", [None, 3])
def test_a_sample_does_not_depend_on_its_batch(name, classes):
    """Also where a run makes the time's features once, and where some samples are without a condition."""
    net = moved(TAKING[name](num_classes=classes))
    model = model_of(net, cond_dropout=0.1)
    cond = torch.randn(5, *net.cond_shape)
    cond[1] = NAN
    y = torch.tensor([0, 3, 2, 1, 0])
    given = cond if classes is None else {"y": y, "cond": cond}
    options = {"steps": 3, "num_samples": 5, "sampler": "ddim"}
    whole = fastdiff.sample(model, cond=given, **options)
    split = fastdiff.sample(model, cond=given, batch_size=2, **options)
    torch.testing.assert_close(whole, split, rtol=1e-4, atol=1e-5)
    assert whole.isfinite().all()


# --- where a condition goes ------------------------------------------------------------------------------------------


def test_floats_go_past_an_argument_of_labels():
    class Both(nn.Module):
        def forward(self, x, t, y=None, context=None):
            return x

    class Labels(nn.Module):
        def forward(self, x, t, y=None):
            return x

    class Needs(nn.Module):
        def forward(self, x, t, y, cond=None):
            return x

    for net, labels, tensor in (
        (MLP((2,), cond_shape=(3,), num_classes=2), "y", "cond"), (UNet((1, 4, 4), cond_shape=(3,)), "y", "cond"),
        (MLP((2,), num_classes=2), "y", "y"), (MLP((2,)), "y", "cond"), (Both(), "y", "context"), (Labels(), "y", "y"),
        (Needs(), "y", "y"), (nn.DataParallel(MLP((2,), cond_shape=(3,))), "y", "cond"),
    ):  # fmt: skip
        assert (takes(net).labels, takes(net).tensor) == (labels, tensor), net
    assert takes(MLP((2,), cond_shape=(3,))).shape == (3,)
    assert takes(MLP((2,))).shape == ()
    assert takes(Both()).shape is None


# --- a model that was trained with conditions ------------------------------------------------------------------------


def everything(model, cond, count=3):
    """Each way to ask a model."""
    x, t = torch.zeros(count, *model.data_shape), torch.full((count,), 0.5)
    loose = {"rtol": 0.1, "atol": 0.1}
    return [
        lambda: fastdiff.sample(model, steps=2, num_samples=count, cond=cond),
        lambda: fastdiff.sample(model, sampler="rk45", num_samples=count, cond=cond),
        lambda: fastdiff.log_likelihood(model, x, cond=cond, **loose),
        lambda: fastdiff.encode(model, x, cond=cond, **loose),
        lambda: fastdiff.interpolate(model, x, x + 1, [0.5], cond=cond, **loose),
        lambda: model.score(x, t, cond),
        lambda: losses.per_sample(model, x, t, ops.cursor(0, 0, 0, "cpu"), "dsm", cond),
    ]


class Counting(nn.Module):
    """Counts the calls of a network."""

    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0
        self.shape = net.shape

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.net(*args, **kwargs)


GOOD = rows().cond[:3]
REFUSED = [
    (None, MissingConditionError, r"the conditions \[3, 3\] that the model was trained with, got none"),
    (GOOD[:, :2], ShapeError, r"conditions \[3, 3\] .*got shape \(3, 2\)"),
    (GOOD.long(), DTypeError, "got torch.int64: use .float()"),
    (torch.tensor([0, 1, 2]), ConfigError, "without num_classes, got labels"),
    (GOOD.index_fill(1, torch.tensor([1]), NAN), DataError, r"got nan at index \(0, 1\): NaN in all numbers"),
    (GOOD.index_fill(1, torch.tensor([1]), math.inf), DataError, r"got inf at index \(0, 1\)"),
    ({"cond": GOOD, "y": torch.tensor([0, 1, 2])}, ConfigError, "without num_classes"),
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_trained_with_vectors_is_not_asked_without(dropout, tmp_path):
    model = model_of(Counting(small(cond_shape=(3,))))
    fastdiff.train(model, rows(), steps=2, cond_dropout=dropout, **QUICK)
    assert (model.num_classes, model.cond_shape, model.cond_dropout) == (None, (3,), dropout)
    assert "cond_shape=(3,)" in repr(model)
    assert ("cond_dropout=0.3" in repr(model)) == bool(dropout)
    fastdiff.save(model, tmp_path / "m")
    again = fastdiff.load(tmp_path / "m.safetensors", net=Counting(small(cond_shape=(3,))))
    none = GOOD * NAN
    refused = list(REFUSED)
    if not dropout:
        refused += [
            (
                none,
                DataError,
                r"NaN in all numbers of a sample means none, which is trained with train\(cond_dropout=\)",
            )
        ]
    for each in (model, again):
        assert (each.cond_shape, each.cond_dropout) == ((3,), dropout)
        each.net.calls = 0
        for cond, error, words in refused:
            for call in everything(each, cond):
                with pytest.raises(error, match=words):
                    call()
        assert each.net.calls == 0
        if dropout:
            with pytest.raises(MissingConditionError, match="or NaN for a sample without"):
                fastdiff.sample(each, steps=2, num_samples=3)
        for cond in (GOOD, GOOD.float(), {"cond": GOOD}, *([none] if dropout else [])):
            for call in everything(each, cond):
                call()
    assert torch.equal(*(fastdiff.sample(each, steps=2, num_samples=3, cond=GOOD) for each in (model, again)))


def test_labels_and_vectors_are_asked_for_together():
    net = Counting(small(cond_shape=(3,), num_classes=4))
    model = model_of(net)
    fastdiff.train(model, rows(labels=True), steps=2, cond_dropout=0.2, **QUICK)
    assert (model.num_classes, model.cond_shape, model.null_label) == (3, (3,), 4)  # the network's own
    net.calls = 0
    y, none = torch.tensor([0, 1, 2]), torch.full((3,), 4)
    for cond, error, words in (
        (None, MissingConditionError, "labels 0 to 2 .* got none.* or 4, which means no label"),
        (GOOD, MissingConditionError, r"labels 0 to 2 .*cond=\{'y': labels, 'cond': …\}"),
        (y, MissingConditionError, r"conditions \[3, 3\].* got none: give cond=\{'y': labels, 'cond': tensor\}"),
        ({"y": torch.tensor([0, 1, 3]), "cond": GOOD}, DataError, "got 0 to 3: give those, or 4 for none"),
        ({"y": none, "cond": GOOD}, DataError, "both label and condition .* index 0: give label 4 with NaN"),
        ({"y": y, "cond": GOOD * NAN}, DataError, "both label and condition"),
    ):
        for call in everything(model, cond):
            with pytest.raises(error, match=words):
                call()
    assert net.calls == 0
    mixed = torch.where(torch.tensor([[False], [True], [False]]), NAN, GOOD)
    for cond in (
        {"y": y, "cond": GOOD},
        {"y": none, "cond": GOOD * NAN},
        {"y": torch.tensor([0, 4, 1]), "cond": mixed},
    ):
        for call in everything(model, cond):
            call()


def test_the_null_of_labels_is_answered_where_it_was_trained(tmp_path):
    data = rows(labels=True)
    data = Data(data.x, data.labels, range=data.range)
    none = torch.full((3,), 3)
    for dropout in (0.0, 0.5):
        model = model_of(small(num_classes=3))
        fastdiff.train(model, data, steps=2, cond_dropout=dropout, **QUICK)
        fastdiff.save(model, tmp_path / "m")
        for each in (model, fastdiff.load(tmp_path / "m.safetensors")):
            assert each.null_label == (3 if dropout else None)
            if dropout:
                assert fastdiff.sample(each, steps=2, num_samples=3, cond=none).isfinite().all()
                with pytest.raises(MissingConditionError, match="or 3, which means no label"):
                    fastdiff.sample(each, steps=2, num_samples=3)
            else:
                with pytest.raises(DataError, match=r"3 means no label, which is trained with train\(cond_dropout=\)"):
                    fastdiff.sample(each, steps=2, num_samples=3, cond=none)


def test_what_a_training_leaves_out_is_not_asked_for():
    """A network of labels and vectors, trained with one kind or none."""
    both = lambda: small(cond_shape=(3,), num_classes=3)  # noqa: E731
    data = rows(labels=True)
    y = torch.tensor([0, 1, 2])
    alone = model_of(both())
    fastdiff.train(alone, Data(data.x, data.labels, range=data.range), steps=2, **QUICK)
    assert (alone.num_classes, alone.cond_shape) == (3, ())
    vectors = model_of(both())
    fastdiff.train(vectors, Data(data.x, range=data.range, cond=data.cond), steps=2, **QUICK)
    assert (vectors.num_classes, vectors.cond_shape) == (0, (3,))
    bare = model_of(both())
    fastdiff.train(bare, Data(data.x, range=data.range), steps=2, **QUICK)
    assert (bare.num_classes, bare.cond_shape) == (0, ())
    for model, good, bad, words in (
        (alone, y, {"y": y, "cond": GOOD}, "hold labels alone, as the model was trained without conditions"),
        (vectors, GOOD, {"y": y, "cond": GOOD}, "hold no labels, as the model was trained without labels"),
        (bare, None, y, "trained without labels"), (bare, None, GOOD, "be None, as the model was trained without conditions"),
    ):  # fmt: skip
        fastdiff.sample(model, steps=2, num_samples=3, cond=good)
        with pytest.raises(ConfigError, match=words):
            fastdiff.sample(model, steps=2, num_samples=3, cond=bad)


class Required(nn.Module):
    """A network of one's own, whose third argument is a vector or a label."""

    shape = (2,)

    def __init__(self):
        super().__init__()
        self.layer, self.label = nn.Linear(5, 2), nn.Embedding(3, 3)

    def forward(self, x, t, c):
        return self.layer(torch.cat((x, c if c.is_floating_point() else self.label(c)), 1))


class Two(nn.Module):
    """One that takes a label and perhaps a vector."""

    shape = (2,)

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(3, 2)

    def forward(self, x, t, context=None, y=None):
        return self.label(y) - x if context is None else context[:, :2] - x


@pytest.mark.parametrize(
    ("net", "data", "options", "words"),
    [
        (small, rows(), {}, r"conditions of shape \(3,\), and the network takes none: build it with cond_shape=\(3,\)"),
        (lambda: small(num_classes=3), rows(), {}, "the network takes none"),
        (lambda: small(cond_shape=(2,)), rows(), {}, r"cond_shape=\(2,\), got \(3,\)"),
        (Required, rows(labels=True), {}, "labels and conditions, and the network takes one, c"),
        (Required, Data(rows().x), {}, "and c is not in the data"),
        (small, Data(rows().x), {"cond_dropout": 0.1}, "there are none: give data with labels or cond"),
        (lambda: small(cond_shape=(3,)), rows(), {"cond_dropout": 1.0}, r"cond_dropout must be a number in \[0, 1\)"),
        (
            Required,
            rows(),
            {"cond_dropout": 0.1},
            "the network NaN where a condition is left out, and it has no finite answer",
        ),
        (
            Required,
            Data(rows().x, rows(labels=True).labels),
            {"cond_dropout": 0.1},
            "the network label 3 where .* no finite",
        ),
    ],
)
def test_data_and_networks_that_do_not_fit_are_refused_before_training(net, data, options, words):
    model = model_of(net())
    before = [p.detach().clone() for p in model.net.parameters()]
    with pytest.raises(fastdiff.errors.FastdiffError, match=words):
        fastdiff.train(model, data, steps=2, **QUICK, **options)
    assert all(torch.equal(p, was) for p, was in zip(model.net.parameters(), before))
    assert model.cond_dropout == 0


def test_a_network_of_ones_own_is_trained_on_vectors():
    model = model_of(Required())
    fastdiff.train(model, rows(), steps=2, **QUICK)
    assert (model.num_classes, model.cond_shape) == (None, (3,))
    fastdiff.sample(model, steps=2, num_samples=3, cond=GOOD)
    with pytest.raises(ShapeError, match="conditions"):
        fastdiff.sample(model, steps=2, num_samples=3, cond=GOOD[:, :2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cond_shape": "ab"}, "cond_shape must be the shape"), ({"cond_shape": (0,)}, "cond_shape must be an integer >= 1"),
        ({"cond_dropout": 1.5}, "cond_dropout must be a number"), ({"cond_dropout": NAN}, "cond_dropout must be a number"),
        ({"standardize_cond": (0, 1)}, "needs a model with conditions"),
        ({"cond_shape": (3,), "standardize_cond": (0, 0)}, "standardize_cond must be finite numbers .* std > 0"),
        ({"cond_shape": (3,), "standardize_cond": ([0, 1], 1)}, r"one for each of \(3,\)"),
    ],
)  # fmt: skip
def test_facts_that_are_none_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        fastdiff.ScoreModel(lambda x, t, cond=None: x, "vp", data_shape=(2,), **options)


# --- standardisation -------------------------------------------------------------------------------------------------


class Seen(nn.Module):
    """Keeps the conditions that it is given."""

    shape = (2,)

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.ones(())), []

    def forward(self, x, t, cond):
        self.seen.append(cond.detach().clone())
        return -self.weight * x


def test_conditions_are_standardized_once_wherever_they_enter():
    data, model = rows(), model_of(Seen())
    fastdiff.train(model, data, steps=3, **QUICK)
    wanted = ((data.cond - data.cond.mean(0)) / data.cond.std(0, correction=0)).float()
    for got in model.net.seen:  # in training
        assert all((wanted - row).abs().amax(1).min() < 1e-5 for row in got)
    np.testing.assert_allclose(model.standardize_cond[1], [1, 1000, 1e-3], rtol=0.5)
    for call in everything(model, GOOD):
        model.net.seen.clear()
        call()
        assert model.net.seen
        for got in model.net.seen:
            assert got.dtype == torch.float32
            assert all((wanted[:3] - row).abs().amax(1).min() < 1e-5 for row in got)
    model.net.seen.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastdiff.check(model, data, num_samples=8)
    assert all((wanted - row).abs().amax(1).min() < 1e-5 for got in model.net.seen for row in got)


def test_fields_are_standardized_by_channel_and_ones_own_numbers_stay():
    fields = torch.randn(20, 2, 5, 4, generator=generator()) * torch.tensor([3.0, 50.0])[:, None, None] + 7
    x = torch.rand(20, 1, 5, 4, generator=generator())
    model = model_of(small((1, 5, 4), cond_shape=(2, 5, 4)))
    fastdiff.train(model, Data(x, cond=fields), steps=1, **QUICK)
    mean, std = model.standardize_cond
    np.testing.assert_allclose(mean, fields.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, fields.std((0, 2, 3), correction=0), rtol=1e-5)
    given = model_of(small((1, 5, 4), cond_shape=(2, 5, 4)), standardize_cond=(0, [1, 2]))
    fastdiff.train(given, Data(x, cond=fields), steps=1, **QUICK)
    assert [values.tolist() for values in given.standardize_cond] == [[0, 0], [1, 2]]
    constant = Data(x, cond=torch.cat((fields[:, :1], torch.ones(20, 1, 5, 4)), 1))
    with pytest.warns(UserWarning, match="columns 1 are constant"):
        fastdiff.train(model_of(small((1, 5, 4), cond_shape=(2, 5, 4))), constant, steps=1, **QUICK)


def test_the_conditional_model_of_a_linear_gaussian_is_learned():
    """x | c ~ N(W c + b, s² I), columns of c at scales 1000 apart, c ~ N(m, diag(d²)): the learned score is that of x_t | c, and
    with dropout that of x_t without c, N(W m + b, W diag(d²) Wᵀ + s² I); draws have the posterior's mean, in the data's units."""
    count, s = 4096, 0.5
    d, m = torch.tensor([1.0, 1000.0, 1e-3]).double(), torch.tensor([0.0, 3000.0, 1.0]).double()
    weights, b = torch.tensor([[1.0, 1e-3, 0.0], [0.0, -1e-3, 800.0]]).double(), torch.tensor([2.0, -800.0]).double()
    c = m + d * torch.randn(count, 3, generator=generator(), dtype=torch.float64)
    x = c @ weights.T + b + s * torch.randn(count, 2, generator=generator(1), dtype=torch.float64)
    torch.manual_seed(0)
    net = MLP((2,), hidden=64, layers=2, cond_shape=(3,))
    model = fastdiff.ScoreModel(net, "vp", "edm", data_shape=(2,))
    options = {"batch_size": 256, "lr": 5e-3, "warmup": 20, "decay": True, "ema": 0.99, "progress": False}
    fastdiff.train(
        model, Data(x.float(), range=(-20.0, 20.0), cond=c), steps=500, loss="simple", cond_dropout=0.3, **options
    )
    mean, std = (torch.from_numpy(values) for values in model.standardize)
    far = m + d * torch.tensor([[1.0, 0.5, -1.0], [-1.0, 1.0, 0.5]]).double()
    cases = [(row, weights @ row + b, s**2 * torch.eye(2).double()) for row in far]
    cases += [(far[0] * NAN, weights @ m + b, weights @ torch.diag(d**2) @ weights.T + s**2 * torch.eye(2).double())]
    process, n = model.process, 400
    for row, mu, covariance in cases:
        mu, covariance = (mu - mean) / std, covariance / std[:, None] / std[None]  # as the network sees them
        root = torch.linalg.cholesky(covariance)
        for time in (0.1, 0.4):
            t = torch.full((n,), time)
            alpha, sigma = float(process.alpha(t[:1])), float(process.sigma(t[:1]))
            x0 = mu + torch.randn(n, 2, generator=generator(3), dtype=torch.float64) @ root.T
            xt = alpha * x0 + sigma * torch.randn(n, 2, generator=generator(4), dtype=torch.float64)
            exact = torch.linalg.solve(alpha**2 * covariance + sigma**2 * torch.eye(2), (alpha * mu - xt).T).T
            found = model.score(xt.float(), t, row.expand(n, 3)).detach()
            # the share of the score that is missed; without c the model misses some half of that of x | c at time 0.1
            assert float((found - exact).square().sum() / exact.square().sum()) < 0.1
    draws = fastdiff.sample(model, sampler="heun", steps=15, num_samples=n, cond=far[0].expand(n, 3))
    wanted = weights @ far[0] + b
    assert ((draws.double().mean(0) - wanted).abs() < 5 * s / math.sqrt(n) + 0.1 * s).all()
    assert (draws.std(0) / s - 1).abs().max() < 0.2


def test_labels_and_a_vector_move_the_draws_together():
    """x = 2 y + c + noise: neither alone says where x is."""
    y, c = torch.arange(2000) % 3, torch.randn(2000, 1, generator=generator())
    x = 2.0 * y[:, None] + c + 0.1 * torch.randn(2000, 1, generator=generator(1))
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(
        MLP((1,), hidden=64, layers=2, num_classes=3, cond_shape=(1,)), "vp", "edm", data_shape=(1,)
    )
    options = {"batch_size": 256, "lr": 5e-3, "warmup": 20, "decay": True, "ema": 0.98, "progress": False}
    fastdiff.train(model, Data(x, y, cond=c), steps=300, loss="simple", **options)
    y, c = (
        torch.tensor([0, 2, 1]).repeat_interleave(100),
        torch.tensor([1.0, -1.0, 0.5]).repeat_interleave(100)[:, None],
    )
    draws = fastdiff.sample(model, sampler="heun", steps=12, num_samples=300, cond={"y": y, "cond": c})
    assert (draws.view(3, 100).mean(1) - torch.tensor([1.0, 3.0, 2.5])).abs().max() < 0.2


def test_a_field_is_seen_by_every_place():
    """x = field + noise: the draws follow the field, point by point."""
    field = torch.randn(600, 1, 6, generator=generator())
    x = 0.5 * field + 0.05 * torch.randn(600, 1, 6, generator=generator(1))
    torch.manual_seed(0)
    net = UNet((1, 6), channels=8, multipliers=(1,), blocks=1, cond_shape=(1, 6))
    model = fastdiff.ScoreModel(net, "vp", "edm", data_shape=(1, 6))
    options = {"batch_size": 64, "lr": 5e-3, "warmup": 20, "decay": True, "ema": 0.98, "progress": False}
    fastdiff.train(model, Data(x, cond=field, range=(-2.5, 2.5)), steps=400, loss="simple", **options)
    asked = torch.randn(50, 1, 6, generator=generator(2))
    draws = fastdiff.sample(model, sampler="heun", steps=10, num_samples=50, cond=asked) * 2.5
    assert (draws - 0.5 * asked).square().mean().sqrt() < 0.15  # of 0.5 where the field is not seen


# --- dropout ---------------------------------------------------------------------------------------------------------


def batches(data, dropout, size, seed=0, net=None):
    model = model_of(small(cond_shape=(3,), num_classes=3) if net is None else net)
    facts = {"num_classes": data.num_classes, "cond_shape": (3,), "cond_dropout": dropout}
    vars(model).update(facts)
    objective = Objective.of(model, data, False, "dsm", None, "stratified", "hard", None, 0.001)
    return Batches(data, model, objective, {"seed": seed, "batch_size": size, "dequantize": False})


def test_dropout_leaves_out_a_share_of_the_samples_and_nothing_else():
    data = rows(400, labels=True)
    kept, dropped = batches(data, 0.0, 400), batches(data, 0.25, 400)
    left_out = []
    for step in range(10):
        a, b = kept(step), dropped(step)
        for one, other in ((a.x0, b.x0), (a.drawn.t, b.drawn.t), (a.cursor, b.cursor)):
            assert torch.equal(one, other)
        whole, part = a.cond, b.cond
        none = part["cond"].isnan().all(1)
        assert torch.equal(part["cond"].isnan().any(1), none)
        assert torch.equal(part["y"] == 3, none)  # both or neither
        for key in ("y", "cond"):
            assert torch.equal(part[key][~none], whole[key][~none])
        left_out.append(none)
        u = noise.uniform(400, (1,), stream=noise.CONDITIONS, seed=0, draw=step)[:, 0]
        assert torch.equal(none, u < 0.25)
    share = torch.stack(left_out).double()
    assert abs(float(share.mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    assert abs(float((share[:-1] * share[1:]).mean()) - 0.25**2) < 5 * 0.25 / math.sqrt(
        3600
    )  # steps know nothing of each other
    # the row of a step decides, whatever the batch's size
    for size in (1, 7, 64):
        assert torch.equal(batches(data, 0.25, size)(3).cond["y"] == 3, left_out[3][:size])
    assert not torch.equal(batches(data, 0.25, 400, seed=1)(0).cond["y"] == 3, left_out[0])


@pytest.mark.parametrize("labels", [False, True])
def test_a_run_that_is_cut_goes_on_bit_for_bit_with_dropout(labels, tmp_path):
    data = rows(labels=labels)
    make = lambda: model_of(small(cond_shape=(3,), num_classes=3 if labels else None))  # noqa: E731
    options = {**QUICK, "cond_dropout": 0.3, "checkpoint": tmp_path}
    whole, parts = make(), make()
    fastdiff.train(whole, data, steps=9, **{**options, "checkpoint": None})
    fastdiff.train(make(), data, steps=4, **options)
    fastdiff.train(parts, data, steps=9, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), parts.net.parameters()))
    loaded = fastdiff.load(tmp_path)
    assert (loaded.cond_shape, loaded.cond_dropout) == ((3,), 0.3)
    assert all(np.array_equal(a, b) for a, b in zip(loaded.standardize_cond, whole.standardize_cond))
    with pytest.raises(fastdiff.errors.CheckpointMismatchError, match=r"cond_dropout=0\.3, now 0\.0"):
        fastdiff.train(make(), data, steps=10, **{**options, "cond_dropout": 0.0})
    other = Data(data.x, data.labels, range=data.range, cond=data.cond + 1)
    with pytest.raises(fastdiff.errors.CheckpointMismatchError, match="data="):
        fastdiff.train(make(), other, steps=10, **options)


def test_files_of_earlier_versions_are_read_and_resumed(tmp_path):
    """They have neither the facts nor the option."""
    data = rows(labels=True)
    data = Data(data.x, data.labels, range=data.range)
    fastdiff.train(model_of(small(num_classes=3)), data, steps=2, checkpoint=tmp_path, **QUICK)
    header, tensors = checkpoint.read(tmp_path / checkpoint.FILE, "")
    assert header["options"].pop("cond_dropout") == 0.0
    assert header["model"].pop("cond_shape", None) is None
    assert not [key for key in {**header["model"], **header["model"]["net"]} if "cond" in key]
    checkpoint.write(tmp_path / checkpoint.FILE, tensors, header)
    old = fastdiff.load(tmp_path)
    assert (old.num_classes, old.cond_shape, old.cond_dropout, old.standardize_cond) == (3, None, 0.0, None)
    fastdiff.train(model_of(small(num_classes=3)), data, steps=3, checkpoint=tmp_path, **QUICK)
    # a network of one's own that takes a vector too, which earlier versions did not say
    (tmp_path / "own").mkdir()
    fastdiff.train(model_of(Two()), data, steps=2, checkpoint=tmp_path / "own", **QUICK)
    header, tensors = checkpoint.read(tmp_path / "own" / checkpoint.FILE, "")
    assert header["model"].pop("cond_shape") == []
    checkpoint.write(tmp_path / "own" / checkpoint.FILE, tensors, header)
    fastdiff.train(model_of(Two()), data, steps=3, checkpoint=tmp_path / "own", **QUICK)
    for name in ("digits-vp", "digits-ve", "digits-subvp"):
        assert fastdiff.load(name).cond_shape is None


# --- the command line ------------------------------------------------------------------------------------------------


def command(capsys, *words):
    code = main([str(word) for word in words])
    return code, capsys.readouterr()


def test_the_command_line_trains_on_vectors_and_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = rows(labels=True)
    np.save("x.npy", data.x)
    np.save("c.npy", data.cond)
    np.savez("both.npz", x=data.x, y=data.labels, cond=data.cond)
    quick = ["--steps", 2, "--batch-size", 8]
    code, said = command(capsys, "train", "x.npy", "--cond", "c.npy", "--out", "v", "--cond-dropout", 0.2, *quick)
    assert code == 0, said.err
    assert "conditions of shape [3]" in said.out
    model = fastdiff.load("v")
    assert (model.num_classes, model.cond_shape, model.cond_dropout) == (None, (3,), 0.2)
    assert command(capsys, "sample", "v", "--steps", 2, "--cond", "c.npy")[0] == 0
    np.testing.assert_array_equal(
        np.load("samples.npy"), fastdiff.sample(model, steps=2, num_samples=40, cond=data.cond)
    )
    code, said = command(capsys, "sample", "v", "--steps", 2, "-n", 4)
    assert code == 2
    assert "cond must hold the conditions [4, 3]" in said.err
    loose = ["--rtol", 1e-2, "--atol", 1e-2, "--trace", "exact", "-n", 4, "--first-sample", 2, "--out", "ll.npz"]
    asked = {"rtol": 1e-2, "atol": 1e-2, "trace": "exact"}
    wanted = fastdiff.log_likelihood(model, data.x[2:6], cond=data.cond[2:6], **asked).nats
    code, said = command(capsys, "likelihood", "v", "--data", "x.npy", "--cond", "c.npy", *loose)
    assert code == 0, said.err
    np.testing.assert_allclose(np.load("ll.npz")["nats"], wanted, rtol=1e-9)
    assert command(capsys, "check", "v", "--data", "x.npy", "--cond", "c.npy")[0] in (0, 1)
    code, said = command(capsys, "check", "v", "--data", "x.npy")
    assert code == 2
    assert "cond must hold the conditions" in said.err

    code, said = command(capsys, "train", "both.npz", "--classes", "--out", "b", *quick)
    assert code == 0, said.err
    model = fastdiff.load("b")
    assert (model.num_classes, model.cond_shape) == (3, (3,))
    code, said = command(capsys, "sample", "b", "--steps", 2, "--cond", "c.npy", "--labels", "1,2")
    assert code == 0, said.err
    given = {"y": torch.tensor([1, 2] * 20), "cond": data.cond}
    np.testing.assert_array_equal(np.load("samples.npy"), fastdiff.sample(model, steps=2, num_samples=40, cond=given))
    code, said = command(capsys, "likelihood", "b", "--data", "both.npz", *loose)
    assert code == 0, said.err
    given = {"y": data.labels[2:6], "cond": data.cond[2:6]}
    wanted = fastdiff.log_likelihood(model, data.x[2:6], cond=given, **asked).nats
    np.testing.assert_allclose(np.load("ll.npz")["nats"], wanted, rtol=1e-9)
    np.savez("labels.npz", x=data.x, y=data.labels)
    assert command(capsys, "train", "labels.npz", "--classes", "--cond-dropout", 0.3, "--out", "l", *quick)[0] == 0
    assert command(capsys, "sample", "l", "--steps", 2, "-n", 4, "--labels", "0,3")[0] == 0  # 3 is no label
    wanted = fastdiff.sample(fastdiff.load("l"), steps=2, num_samples=4, cond=torch.tensor([0, 3, 0, 3]))
    np.testing.assert_array_equal(np.load("samples.npy"), wanted)
    code, said = command(capsys, "sample", "l", "--steps", 2, "--labels", 4)
    assert code == 2
    assert "from 0 to 2, which the model was trained with" in said.err
    assert "3 is no label" in said.err
    code, said = command(capsys, "train", "both.npz", "--out", "c", *quick)  # the vectors, and not the labels
    assert code == 0
    assert "--classes conditions on them" in said.err
    assert (fastdiff.load("c").num_classes, fastdiff.load("c").cond_shape) == (None, (3,))


# --- the example -----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_moons(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    return importlib.import_module("two_moons")


def test_two_moons_posterior_is_exact(two_moons):
    """Against the simulator's density, N(r; 0.1, 0.01²)/(π r) right of the moon's centre, on a grid of the prior's square."""
    side = np.linspace(-1, 1, 801)[1:] - 1 / 800
    theta = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    shift = np.stack((-np.abs(theta.sum(1)), theta[:, 1] - theta[:, 0]), 1) / math.sqrt(2)
    # the fourth is cut by the square, the last by |θ₁ + θ₂| >= 0
    for x in (*two_moons.OBSERVATIONS[[2, 6, 9]], np.array([0.1, 1.2]), np.array([0.3, 0.02])):
        u, v = (x - shift - [0.25, 0]).T
        r = np.hypot(u, v)
        density = np.exp(-0.5 * ((r - 0.1) / 0.01) ** 2) / r * (u > 0)
        density /= density.sum()
        draws = two_moons.posterior(x, 4000, np.random.default_rng(0))
        for what in (
            lambda t: t[:, 0],
            lambda t: np.abs(t.sum(1)),
            lambda t: t[:, 1] - t[:, 0],
            lambda t: t[:, 0] * t[:, 1],
        ):
            mean = (density * what(theta)).sum()
            deviation = math.sqrt((density * (what(theta) - mean) ** 2).sum())
            assert abs(what(draws).mean() - mean) < 5 * deviation / math.sqrt(4000) + 1e-3
            assert abs(what(draws).std() / deviation - 1) < 0.1


@pytest.mark.parametrize("x", [(5.0, 5.0), (0.6, 0.0), (math.nan, 0.0)])
def test_two_moons_of_an_impossible_observation_end(x, two_moons):
    with pytest.raises(ValueError, match="x must be what some θ in the prior's square gives, got"):
        two_moons.posterior(np.array(x), 10, np.random.default_rng(0))


def test_two_moons_of_a_model_that_never_meets_the_prior_end(two_moons, monkeypatch):
    monkeypatch.setattr(fastdiff, "sample", lambda *_, num_samples, **options: torch.full((num_samples, 2), 7.0))
    with pytest.raises(ValueError, match="are outside of the prior's square: train it for longer"):
        two_moons.drawn(None, np.zeros(2), 10)


def test_two_moons_is_learned(two_moons):
    """By little training: draws lie on both sides, and near the exact ones."""
    model = two_moons.trained(1000, 150, 0)
    x = two_moons.OBSERVATIONS[2]
    draws, exact = two_moons.drawn(model, x, 300), two_moons.posterior(x, 300, np.random.default_rng(0))
    assert 0.3 < (draws.sum(1) > 0).mean() < 0.7
    for what in (lambda t: np.abs(t.sum(1)), lambda t: t[:, 1] - t[:, 0]):
        assert abs(what(draws).mean() - what(exact).mean()) < 0.1  # of a prior 2 wide
    assert 0.45 < fastdiff.metrics.c2st(exact, two_moons.posterior(x, 300, np.random.default_rng(1))) < 0.55


# --- models of files --------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_trained_on_with_its_conditions_and_its_units(tmp_path):
    """Of a network that was trained elsewhere, which has seen data and conditions as they are."""
    torch.manual_seed(0)
    net = fastdiff.networks.MLP((2,), hidden=8, layers=1, num_classes=3, cond_shape=(2,))
    torch.nn.init.normal_(net.out.weight)
    model = fastdiff.ScoreModel(net, "vp", "eps", data_shape=(2,))
    loaded = fastdiff.load(fastdiff.save(model, tmp_path / "model"))
    x, y, cond = 100 + torch.rand(64, 2), torch.arange(64) % 3, 7 + torch.randn(64, 2)
    for data, what in ((Data(x, cond=cond, range=(100, 101)), "labels"), (Data(x, y, range=(100, 101)), "conditions")):
        with pytest.raises(ConfigError, match=f"data must have {what}, as the model was loaded with"):
            fastdiff.train(loaded, data, steps=1, batch_size=8, progress=False)
    given = {"y": torch.tensor([0, 1]), "cond": torch.ones(2, 2)}
    before = loaded.predict("eps", torch.ones(2, 2), torch.tensor(0.5), given)
    fastdiff.train(
        loaded,
        Data(x, y, cond=cond, range=(100, 101)),
        steps=1,
        batch_size=8,
        lr=1e-30,
        warmup=0,
        ema=0.5,
        progress=False,
    )
    assert torch.equal(loaded.predict("eps", torch.ones(2, 2), torch.tensor(0.5), given), before)
    assert loaded.standardize_cond is None
    assert (loaded.standardize[0] == 0).all()
    assert (loaded.standardize[1] == 1).all()
