"""Data that do not fit memory, and augmentation: the same weights as with the data in memory, whatever reads them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import fastdiff
from fastdiff.cli import commands
from fastdiff.data import Data, LazyData, augment
from fastdiff.data.data import hold_out
from fastdiff.errors import CheckpointMismatchError, ConfigError, DataError, DTypeError, ShapeError
from fastdiff.networks import MLP, UNet

OPTIONS = {"batch_size": 16, "lr": 2e-3, "warmup": 5, "loss": "simple"}


class Items(Dataset):
    """A dataset of arrays, as its user would write it."""

    def __init__(self, x, labels=None, cond=None):
        self.x, self.labels, self.cond = x, labels, cond

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        item = {"x": self.x[i]}
        if self.labels is not None:
            item["label"] = self.labels[i]
        if self.cond is not None:
            item["cond"] = self.cond[i]
        return item


def arrays(n=50):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, 1, 4, 4), dtype=np.uint8)
    return x, rng.integers(0, 3, n), rng.normal(size=(n, 2)).astype(np.float32)


def unet(**options):
    torch.manual_seed(0)
    net = UNet((1, 4, 4), channels=4, multipliers=(1,), blocks=1, **options)
    return fastdiff.ScoreModel(net, "vp", "edm", data_shape=(1, 4, 4))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_trains_to_the_weights_of_the_same_data_in_memory(workers, tmp_path):
    x, labels, cond = arrays()
    options = {"num_classes": 3, "cond_shape": (2,)}
    known, lazy = unet(**options), unet(**options)
    data = Data(torch.from_numpy(x), torch.from_numpy(labels), cond=torch.from_numpy(cond))
    fastdiff.train(known, data, steps=9, cond_dropout=0.2, **OPTIONS)
    source = LazyData(Items(x, labels, cond), num_classes=3, workers=workers)
    before = torch.get_rng_state()
    fastdiff.train(lazy, source, steps=5, cond_dropout=0.2, checkpoint=tmp_path, **OPTIONS)
    lazy = unet(**options)
    fastdiff.train(lazy, source, steps=9, cond_dropout=0.2, checkpoint=tmp_path, **OPTIONS)
    assert equal(known, lazy)
    assert torch.equal(torch.get_rng_state(), before)
    assert "50 samples of shape [1, 4, 4] uint8" in repr(source)


def test_vectors_are_standardized_by_some_of_the_samples():
    x = np.random.default_rng(0).normal([5, -3], [2, 0.1], (3000, 2)).astype(np.float32)
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(MLP((2,), hidden=8), "vp", "edm", data_shape=(2,))
    source = fastdiff.load_data(Items(x), range=(-10.0, 20.0))
    fastdiff.train(model, source, steps=2, **OPTIONS)
    assert len(source.some) == 1000
    mean, std = model.standardize
    np.testing.assert_allclose(mean, x[::3].mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, x[::3].std(0), rtol=1e-5)


@pytest.mark.parametrize(("options", "most"), [({}, 160), ({"validation": 0.001}, 220)])
def test_a_file_is_mapped_and_never_held_as_a_whole(options, most, tmp_path):
    """A file of 256 MiB, trained on by a process that may have so many MiB more than one that imports fastdiff."""
    path = tmp_path / "large.npy"
    x = np.lib.format.open_memmap(path, "w+", np.uint8, (2**16, 1, 64, 64))
    x[::97] = 7
    del x
    code = (
        "import resource, sys, torch, fastdiff; from fastdiff.networks import MLP\n"
        "torch.set_num_threads(1)\n"
        "held = lambda: int(open('/proc/self/statm').read().split()[2]) and int(open('/proc/self/status').read()"
        ".split('RssAnon:')[1].split()[0]) // 1024\n"
        "model = fastdiff.ScoreModel(MLP((1, 64, 64), hidden=4, layers=1), 'vp', 'edm', data_shape=(1, 64, 64))\n"
        "before = held(); data = fastdiff.load_data(sys.argv[1], lazy=True)\n"
        "most = []\n"
        f"fastdiff.train(model, data, steps=2, batch_size=4, stop=lambda: most.append(held()), **{options})\n"
        "print(max(most) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < most


@pytest.mark.parametrize("kind", ["levels", "vectors"])
def test_what_is_trained_on_beside_a_held_out_share_stays_where_it_is(kind):
    """It is the second part of `split` in every number, and none of its values is copied."""
    rng, labels = np.random.default_rng(0), torch.arange(70) % 4
    x = torch.from_numpy(rng.integers(0, 9, (70, 3)).astype("uint8") if kind == "levels" else rng.normal(size=(70, 3)))
    data = Data(x, labels, bins=None if kind == "vectors" else 9, range=(-9.0, 9.0) if kind == "vectors" else (0.0, 8.0),
                cond=torch.from_numpy(rng.normal(size=(70, 2))))  # fmt: skip
    (kept, rest), (first, second) = hold_out(data, 0.3, "validation"), data.split(0.3)
    assert rest.x.data_ptr() == data.x.data_ptr()
    assert (len(kept), len(rest), repr(rest)) == (21, 49, repr(second))
    assert (kept.fingerprint(), rest.fingerprint()) == (first.fingerprint(), second.fingerprint())
    assert torch.equal(rest.raw(torch.arange(49)), second.x)
    assert torch.equal(rest.labels, second.labels)
    assert torch.equal(rest.cond, second.cond)
    index = torch.tensor([3, 48, 0])
    assert torch.equal(rest.batch(index, (-1, 1)), second.batch(index, (-1, 1)))
    if kind == "levels":
        assert torch.equal(rest.dequantized(index, (-1, 1), seed=3), second.dequantized(index, (-1, 1), seed=3))
    trained = []
    for source in (rest, second):
        torch.manual_seed(0)
        model = fastdiff.ScoreModel(MLP((3,), hidden=8, num_classes=4, cond_shape=(2,)), "vp", "edm", data_shape=(3,))
        fastdiff.train(model, source, steps=9, **OPTIONS)
        trained.append(model)
    assert equal(*trained)
    np.testing.assert_array_equal(trained[0].standardize, trained[1].standardize)


def test_a_folder_of_pictures_is_decoded_as_it_is_asked_for(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(9):
            image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8)).save(
                tmp_path / "pictures" / name / f"{k}.png"
            )
    known, lazy = unet(num_classes=2), unet(num_classes=2)
    fastdiff.train(known, tmp_path / "pictures", steps=6, **OPTIONS)
    source = fastdiff.load_data(tmp_path / "pictures", lazy=True, workers=1)
    assert isinstance(source, LazyData)
    assert source.some.class_names == ("a", "b")
    fastdiff.train(lazy, source, steps=6, **OPTIONS)
    assert equal(known, lazy)
    arguments = [
        "train",
        str(tmp_path / "pictures"),
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--network",
        "mlp",
        "--classes",
    ]
    for out, more in (("x", []), ("y", ["--lazy", "--workers", "1"])):
        assert commands.main([*arguments, "--out", str(tmp_path / out), *more]) == 0
    a, b = (fastdiff.load(tmp_path / out) for out in "xy")
    assert equal(a, b)


def test_what_cannot_be_read_lazily_is_refused(tmp_path):
    x, labels, _ = arrays(8)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(np.zeros((4, 3), np.float32)))
    np.save(tmp_path / "big.npy", x.astype(">f4"))
    np.save(tmp_path / "words.npy", np.array([["a"], ["b"]]))
    np.savez(tmp_path / "x.npz", x=x)
    for call, error, words in (
        (lambda: LazyData(Items(x.astype(np.float32))), DataError, "range must be given for a dataset of floats"),
        (lambda: LazyData(Items(x, labels)), DataError, "num_classes must be given for a dataset with labels"),
        (lambda: LazyData(Items(x[:0])), DataError, "dataset must have at least one item"),
        (lambda: LazyData(3), DTypeError, "dataset must have a length and items, got int"),
        (lambda: LazyData(Items([x[0], x[1][:, :2]])).some, DataError, "dataset must have items of one shape"),
        (lambda: LazyData([{"image": x[0]}]), DataError, 'dataset must give "x" in its items, got image'),
        (
            lambda: LazyData(Items(x, labels + 0.7), num_classes=4).some,
            DTypeError,
            "class numbers as labels, integers, got",
        ),
        (lambda: LazyData(Items(x, np.ones((8, 3))), num_classes=4).some, DTypeError, 'give vectors as "cond"'),
        (lambda: fastdiff.load_data(tmp_path / "big.npy", lazy=True), DTypeError, r"numpy's astype\('float32'\)"),
        (
            lambda: fastdiff.load_data(tmp_path / "words.npy", lazy=True),
            DTypeError,
            "x must be uint8, float32 or float64",
        ),
        (lambda: fastdiff.load_data(tmp_path / "fortran.npy", lazy=True), DataError, "in Fortran's order"),
        (lambda: fastdiff.load_data(tmp_path / "x.npz", lazy=True), ConfigError, "lazy=True is for a .npy file"),
        *(
            (
                lambda source=source, lazy=lazy: fastdiff.load_data(source, workers=2, lazy=lazy),
                ConfigError,
                "workers=2 read a folder of pictures or a torch.utils.data.Dataset ahead, got .*: leave it out",
            )
            for source in (x, tmp_path / "x.npz", tmp_path / "big.npy", "digits")
            for lazy in (False, True)
        ),
        (lambda: fastdiff.load_data(x, num_classes=3), ConfigError, "num_classes=3 is of a Dataset"),
        (lambda: fastdiff.train(unet(), LazyData(Items(x)), steps=1, validation=0.1), ConfigError, "read lazily"),
    ):
        with pytest.raises(error, match=words):
            call()
    broken = Items(np.concatenate([x.astype(np.float32) / 255, np.full((1, 1, 4, 4), np.nan, np.float32)] * 200))
    with pytest.raises(DataError, match="x must be finite"):
        fastdiff.train(unet(), LazyData(broken, range=(0.0, 1.0)), steps=200, **OPTIONS)


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_flips_and_crops_are_what_they_say():
    x = torch.arange(2 * 1 * 3 * 5, dtype=torch.float32).view(2, 1, 3, 5)
    flipped = augment.Flip()(x, torch.tensor([[0.2], [0.7]]))
    assert torch.equal(flipped[0], x[0].flip(-1))
    assert torch.equal(flipped[1], x[1])
    assert torch.equal(augment.Flip(-2)(x, torch.tensor([[0.2], [0.2]])), x.flip(-2))
    crop = augment.Crop(2)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    for across, down in [(a, b) for a in range(5) for b in range(5)]:
        u = torch.tensor([[(across + 0.5) / 5, (down + 0.5) / 5]]).expand(2, 2)
        assert torch.equal(crop(x, u), padded[:, :, down : down + 3, across : across + 5])
    signal = torch.arange(6.0).view(1, 1, 6)
    assert crop(signal, torch.tensor([[0.99, 0.5]])).flatten().tolist() == [2, 3, 4, 5, 4, 3]


def test_augmentation_has_its_own_stream_and_goes_on_bit_for_bit(tmp_path):
    x, _, _ = arrays()
    field = np.random.default_rng(1).normal(size=(50, 1, 4, 4)).astype(np.float32)
    data = Data(torch.from_numpy(x), cond=torch.from_numpy(field))
    options = {**OPTIONS, "augment": ["flip", augment.Crop(1)]}
    whole, parts, plain = (unet(cond_shape=(1, 4, 4)) for _ in range(3))
    done = fastdiff.train(whole, data, steps=9, **options)
    fastdiff.train(parts, data, steps=4, checkpoint=tmp_path, **options)
    parts = unet(cond_shape=(1, 4, 4))
    fastdiff.train(parts, data, steps=9, checkpoint=tmp_path, **options)
    assert equal(whole, parts)
    other = fastdiff.train(plain, data, steps=9, **OPTIONS)
    assert not torch.equal(done.loss, other.loss)
    with pytest.raises(CheckpointMismatchError, match="was trained with augment="):
        fastdiff.train(
            unet(cond_shape=(1, 4, 4)), data, steps=12, checkpoint=tmp_path, **{**options, "augment": "flip"}
        )
    with pytest.raises(CheckpointMismatchError, match=r"was trained with augment=.*, now \[\]"):
        fastdiff.train(unet(cond_shape=(1, 4, 4)), data, steps=12, checkpoint=tmp_path, **OPTIONS)


def test_a_field_beside_a_sample_is_changed_alike():
    """The condition is the sample itself: after any augmentation it still is, so that a network that knows it has no loss."""
    x, _, _ = arrays(8)
    seen = []

    class Net(torch.nn.Module):
        cond_shape = (1, 4, 4)

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, t, cond=None):
            seen.append((x, cond))
            return self.scale * cond

    model = fastdiff.ScoreModel(Net(), fastdiff.VE(), "x0", data_shape=(1, 4, 4), standardize_cond=(0.0, 1.0))
    data = Data(torch.from_numpy(x), cond=torch.from_numpy(x / 127.5 - 1).float())
    done = fastdiff.train(
        model, data, steps=3, batch_size=8, augment=["flip", "flip_vertical", augment.Crop(2)], lr=1e-9
    )
    assert float(done.loss.max()) < 1e-6
    ordered = [sorted(map(tuple, cond.flatten(1).tolist())) for _, cond in seen]
    assert ordered[0] != ordered[1]


def test_augmentations_that_do_not_suit_are_refused():
    vectors = Data(torch.rand(20, 2))
    model = fastdiff.ScoreModel(MLP((2,), hidden=8), "vp", data_shape=(2,))
    for given, error, words in (
        ("flip", ShapeError, r"is for samples \[C, \*spatial\] with 1 spatial axes or more, got \(2,\)"),
        ("flp", ConfigError, "did you mean 'flip'"),
        (lambda x: x, ConfigError, "augment must be an Augmentation, whose randomness is the training's"),
    ):
        with pytest.raises(error, match=words):
            fastdiff.train(model, vectors, steps=1, augment=given, **OPTIONS)
    with pytest.raises(ShapeError, match="out of sight: use a smaller one"):
        fastdiff.train(unet(), Data(torch.zeros(9, 1, 4, 4, dtype=torch.uint8)), steps=1, augment="crop", **OPTIONS)
    x = torch.from_numpy(arrays()[0])
    net, other = MLP((1, 4, 4), hidden=8, cond_shape=(3, 3)), MLP((1, 4, 4), hidden=8, cond_shape=(9,))
    model, cond = fastdiff.ScoreModel(net, "vp", data_shape=(1, 4, 4)), torch.rand(50, 3, 3)
    with pytest.raises(ShapeError, match=r"conditions \(3, 3\) are on another grid: give them flat"):
        fastdiff.train(model, Data(x, cond=cond), steps=1, augment="flip", **OPTIONS)
    model = fastdiff.ScoreModel(other, "vp", data_shape=(1, 4, 4))
    fastdiff.train(model, Data(x, cond=cond.flatten(1)), steps=1, augment="flip", **OPTIONS)
    net, pixels = MLP((1, 4, 4), hidden=8), torch.linspace(1, 2, 16).view(1, 4, 4)
    model = fastdiff.ScoreModel(net, "vp", data_shape=(1, 4, 4), standardize=(100.0, 100 * pixels.numpy()))
    with pytest.raises(ConfigError, match="standardizes each place by another mean or std"):
        fastdiff.train(model, Data(x), steps=1, augment="flip", **OPTIONS)
