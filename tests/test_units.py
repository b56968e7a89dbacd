"""The units of a model's data: vectors standardized and back, and samples that leave the data's range."""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.cli.commands import main
from fastdiff.errors import CheckpointMismatchError, ConfigError, CorruptCheckpointError
from fastdiff.networks import MLP, UNet
from fastdiff.training import Data, checkpoint

VP = fastdiff.VP()
MEAN, STD = np.array([5000.0, -3.0, 0.0]), np.array([1000.0, 1.0, 1e-3])  # columns a thousand and a million apart


def exact(x, t):
    """The score of N(0, 1) data, which VP leaves as they are."""
    return -x


def gaussian(n=4000, mean=MEAN, std=STD):
    return (mean + std * np.random.default_rng(0).normal(size=(n, len(mean)))).astype(np.float32)


def known(standardize=(MEAN, STD), **options):
    return fastdiff.ScoreModel(exact, VP, "score", data_shape=(3,), standardize=standardize, **options)


def fit(model, data, **options):
    return fastdiff.train(model, data, **{"steps": 2, "batch_size": 16, "progress": False, **options})


# --- in and out of the network's units -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "rk45", "adaptive_sde"])
def test_samples_are_in_the_datas_units(sampler):
    options = {"sampler": sampler, "num_samples": 500, "steps": None if sampler in ("rk45", "adaptive_sde") else 50}
    x = fastdiff.sample(known(), **options).double()
    assert ((x.mean(0) - torch.from_numpy(MEAN)).abs() < 5 * torch.from_numpy(STD) / math.sqrt(500) + 1e-3).all()
    # 5 standard errors of a standard deviation, and the float32 rounding of 5000
    assert ((x.std(0) / torch.from_numpy(STD) - 1).abs() < 5 / math.sqrt(1000) + 0.01).all()
    plain = fastdiff.sample(known(None), **options).double()
    assert torch.equal(x, (torch.from_numpy(MEAN) + torch.from_numpy(STD) * plain).float().double())


def test_all_that_comes_out_of_a_run_is_in_the_datas_units():
    seen = []
    x, states = fastdiff.sample(
        known(), steps=5, num_samples=4, trajectory=3, callback=lambda row, t, x: seen.append(x), dtype=torch.float64
    )
    assert torch.equal(states[-1], x)
    assert torch.equal(seen[-1], x)
    assert (states[0] - torch.from_numpy(MEAN)).abs().max() > 100  # the prior, in those units
    start = torch.randn(4, 3)
    ends = [fastdiff.sample(known(units), steps=5, num_samples=4, x_init=start) for units in (None, (MEAN, STD))]
    assert torch.equal(ends[1], known().in_data_units(ends[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("units", [(5000.0, 1000.0), (MEAN, STD), (0.0, [1000.0, 1.0, 1.0])])
def test_likelihoods_are_of_the_datas_units(units, dtype):
    mean, std = (torch.as_tensor(v, dtype=torch.float64).expand(3) for v in units)
    x = (mean + std * torch.randn(6, 3, dtype=torch.float64)).to(dtype)
    z = (x.double() - mean) / std
    density = -0.5 * (z**2).sum(1) - std.log().sum() - 1.5 * math.log(2 * math.pi)
    ll = fastdiff.log_likelihood(known(units), x, trace="exact", rtol=1e-6, atol=1e-6)
    assert (ll.nats - density).abs().max() < 1e-3
    assert (ll.latent - z).abs().max() < 1e-2
    assert torch.equal(ll.x, x)
    back = fastdiff.decode(known(units), fastdiff.encode(known(units), x, rtol=1e-6, atol=1e-6), rtol=1e-6, atol=1e-6)
    assert ((back.double() - x.double()).abs() < 1e-3 * std + 1e-6 * mean.abs()).all()
    between = fastdiff.interpolate(known(units), x, x.flip(0), [0.0, 1.0], rtol=1e-6, atol=1e-6)
    assert ((between[1].double() - x.flip(0).double()).abs() < 1e-3 * std + 1e-6 * mean.abs()).all()


def test_bits_are_those_of_levels_of_the_datas_units():
    """Of uniform levels 0 … 255 they are the density's over a bin of width 256/255·… whatever the network's units."""
    data = Data(torch.randint(0, 256, (50, 3), dtype=torch.uint8))
    model = fastdiff.ScoreModel(MLP((3,), hidden=8, layers=1), "vp", data_shape=(3,))
    fit(model, data, dequantize=True)
    assert model.data_range == (0.0, 255.0)
    x = data.dequantized(range(8), model.data_range)
    ll = fastdiff.log_likelihood(model, x, trace="exact", rtol=1e-5, atol=1e-5)
    bits = fastdiff.bits_per_dim(ll, model.data_range, 256)
    plain = fastdiff.ScoreModel(model.net, "vp", data_shape=(3,), data_range=(-1.0, 1.0))
    y = data.dequantized(range(8), (-1.0, 1.0))
    other = fastdiff.bits_per_dim(
        fastdiff.log_likelihood(plain, y, trace="exact", rtol=1e-5, atol=1e-5), (-1.0, 1.0), 256
    )
    assert (bits - other).abs().max() < 1e-3
    assert (ll.nats / (-3 * math.log(2)) + 8 - math.log2(255) - bits).abs().max() < 1e-9


@pytest.mark.parametrize(
    "units", [1.0, (0.0,), (0.0, 0.0), (0.0, [1.0, 1.0]), (math.nan, 1.0), (0.0, [1.0, -1.0, 1.0]), ("a", 1.0), (0.0, math.inf)]
)  # fmt: skip
def test_units_that_are_none_are_refused(units):
    with pytest.raises(ConfigError, match="standardize must be"):
        known(units)


# --- what train makes of vectors -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the prior of .ve. does not cover")
def test_vectors_are_standardized_by_column(tmp_path):
    x = gaussian()
    seen = []

    class Net(MLP):
        def forward(self, x, t):
            seen.append(x.detach())
            return super().forward(x, t)

    model = fastdiff.ScoreModel(Net((3,), hidden=8, layers=1), fastdiff.VE(1e-3, 2e-3), data_shape=(3,))
    data = Data(torch.from_numpy(x), range=(float(x.min()), float(x.max())))
    with pytest.warns(UserWarning, match=r"columns have standard deviations of 0\.000997 to 1\.02e\+03"):
        fit(model, data, steps=20, batch_size=200)
    mean, std = model.standardize
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(std, x.astype(np.float64).std(0), rtol=1e-12)
    given = torch.cat(seen).double()  # an epoch, with hardly any noise
    assert given.mean(0).abs().max() < 1e-2
    assert (given.std(0) - 1).abs().max() < 1e-2
    assert model.data_range == (float(x.min()), float(x.max()))
    fastdiff.save(model, tmp_path / "m")
    loaded = fastdiff.load(tmp_path / "m.safetensors", net=Net((3,), hidden=8, layers=1))
    assert all(np.array_equal(a, b) for a, b in zip(loaded.standardize, model.standardize))
    assert torch.equal(*(fastdiff.sample(m, steps=3, num_samples=2) for m in (model, loaded)))
    # what is trained on stays in its units, and so does the way of before
    z = fastdiff.sample(model, steps=3, num_samples=2)
    assert np.allclose(data.quantise(z, model.data_range), z.clamp(*model.data_range), rtol=1e-5)


def test_columns_far_apart_come_back():
    x = gaussian(2000, MEAN[:2], STD[:2])
    torch.manual_seed(0)
    model = fastdiff.ScoreModel(MLP((2,), hidden=32, layers=2), "vp", "edm", data_shape=(2,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(model, x, steps=150, loss="simple", lr=2e-3, warmup=20, batch_size=128)
    s = fastdiff.sample(model, sampler="heun", steps=15, num_samples=500).numpy()
    assert (np.abs(s.std(0) / x.std(0) - 1) < 0.3).all()
    assert (np.abs(s.mean(0) - x.mean(0)) < 0.3 * x.std(0)).all()


def test_what_is_not_standardized():
    vectors = Data(torch.randn(20, 3), range=(-5.0, 5.0))
    ranged = fastdiff.ScoreModel(MLP((3,), hidden=4, layers=1), "vp", data_shape=(3,), data_range=(-1.0, 1.0))
    fit(ranged, vectors)
    assert ranged.standardize is None
    given = fastdiff.ScoreModel(MLP((3,), hidden=4, layers=1), "vp", data_shape=(3,), standardize=(1.0, 2.0))
    fit(given, vectors)
    assert [v.tolist() for v in given.standardize] == [[1.0] * 3, [2.0] * 3]
    assert given.data_range == (-5.0, 5.0)
    image = fastdiff.ScoreModel(UNet((1, 4, 4), channels=4, multipliers=(1,), blocks=1), "vp", data_shape=(1, 4, 4))
    fit(image, Data(torch.randn(20, 1, 4, 4), range=(-5.0, 5.0)))
    assert image.standardize is None
    assert image.data_range == (-1.0, 1.0)
    other = fastdiff.ScoreModel(MLP((3,), hidden=4, layers=1), "vp", data_shape=(3,), data_range=(-1.0, 1.0))
    x = gaussian()
    data = Data(torch.from_numpy(x), range=(float(x.min()), float(x.max())))
    with pytest.warns(UserWarning, match="columns .* one data_range for all .* leave data_range out"):
        fit(other, data)


def test_a_second_training_keeps_the_units_of_the_first():
    model = fastdiff.ScoreModel(MLP((3,), hidden=4, layers=1), "vp", data_shape=(3,))
    fit(model, Data(torch.randn(20, 3), range=(-5.0, 5.0)))
    units = model.standardize
    fit(model, Data(torch.randn(20, 3) + 2, range=(-5.0, 15.0)))
    assert model.standardize is units


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9])
def test_constant_columns(value):
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    x[:, 1] = value
    model = fastdiff.ScoreModel(MLP((3,), hidden=4, layers=1), "vp", data_shape=(3,))
    with pytest.warns(UserWarning, match="columns 1 are constant"):
        fit(model, Data(torch.from_numpy(x), range=(float(x.min()), float(x.max()))))
    assert model.standardize[1][1] == 1.0
    assert model.standardize[0][1] == float(np.float32(value))


def test_moments_are_the_same_for_any_number_of_threads():
    x, found, before = torch.randn(70000, 3) * 2 + 3, [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            model = fastdiff.ScoreModel(MLP((3,), hidden=4, layers=1), "vp", data_shape=(3,))
            fit(model, Data(x, range=(-20.0, 20.0)), steps=1)
            found.append([v.tolist() for v in model.standardize])
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_run_goes_on_in_its_units(tmp_path):
    data = Data(torch.randn(40, 3) * torch.tensor([1.0, 5.0, 9.0]), range=(-50.0, 50.0))

    def model():
        torch.manual_seed(0)
        return fastdiff.ScoreModel(MLP((3,), hidden=4, layers=1), "vp", data_shape=(3,))

    whole, cut, again = model(), model(), model()
    fit(whole, data, steps=4)
    fit(cut, data, steps=2, checkpoint=tmp_path)
    fit(again, data, steps=4, checkpoint=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.net.parameters(), again.net.parameters()))
    other = model()
    vars(other).update(standardize=(np.zeros(3), np.ones(3)))
    with pytest.raises(CheckpointMismatchError, match="standardize="):
        fit(other, data, steps=5, checkpoint=tmp_path)
    assert other.standardize[1].tolist() == [1.0] * 3
    header, tensors = checkpoint.read(tmp_path / checkpoint.FILE, "")
    header["model"]["standardize"][1][0] = -1.0
    checkpoint.write(tmp_path / "bad", tensors, header)
    with pytest.raises(CorruptCheckpointError, match="standardize"):
        fastdiff.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(("mean", "std"), [(5000.0, 1000.0), (0.0, 1e-3)])
@pytest.mark.parametrize("levels", [False, True])
def test_the_command_line_in_any_units(mean, std, levels, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x = (mean + std * np.random.default_rng(0).normal(size=(500, 2))).astype(np.float32)
    if levels:
        x = np.random.default_rng(0).integers(0, 256, (500, 2)).astype(np.uint8)
    np.save("x.npy", x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["train", "x.npy", "--out", "m", "--steps", "120", "--batch-size", "64", "--lr", "3e-3"]) == 0
    assert main(["sample", "m", "--out", "s.npy", "--sampler", "heun", "--steps", "12", "-n", "300"]) == 0
    s = np.load("s.npy")
    assert 0.5 < s.std(0).mean() / x.std(0).mean() < 2
    assert abs(s.mean() - x.mean(dtype=np.float64)) < x.std()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = [
            "likelihood",
            "m",
            "--data",
            "x.npy",
            "-n",
            "20",
            "--trace",
            "exact",
            "--rtol",
            "1e-3",
            "--atol",
            "1e-3",
        ]
        assert main([*words, "--out", "ll.npz"]) == 0
    nats = np.load("ll.npz")["nats"].mean()
    entropy = 2 * math.log(256 if levels else std * math.sqrt(2 * math.pi * math.e))
    assert abs(nats + entropy) < 1.5  # a network of few steps, beside units that are ten nats apart


# --- samples outside of the data's range -----------------------------------------------------------------------------


class Wide(nn.Module):
    """A network whose samples are some hundred wide."""

    def forward(self, x, t):
        return -1e-6 * x


def wide(**options):
    return fastdiff.ScoreModel(Wide(), fastdiff.VE(0.01, 400.0), "score", data_shape=(2,), **options)


def said(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    caught = [
        w for w in caught if "prior of 've' does not cover" not in str(w.message)
    ]  # the range of 400 is as wide as it
    assert {str(w.message)[:20] for w in caught} <= {"the samples run from"}
    assert all(w.filename == __file__ for w in caught)
    return result, len(caught)


def test_samples_far_outside_of_the_range_are_said_once():
    run = {"steps": 8, "num_samples": 40}
    for options, count in (({"data_range": (-1.0, 1.0)}, 1), ({}, 0), ({"data_range": (-400.0, 400.0)}, 0)):
        for more in ({}, {"batch_size": 3}, {"sampler": "heun"}, {"trajectory": 3}, {"return_info": True}):
            assert said(lambda: fastdiff.sample(wide(**options), **run, **more))[1] == count  # noqa: B023
        assert said(lambda: fastdiff.sample(wide(**options), sampler="rk45", num_samples=40))[1] == count  # noqa: B023
        z = 400 * torch.randn(40, 2)
        assert said(lambda: fastdiff.decode(wide(**options), z))[1] == count  # noqa: B023
    known_range = {"data_range": (-1.0, 1.0)}
    assert said(lambda: fastdiff.sample(Wide(), fastdiff.VE(), shape=(2,), **run))[1] == 0
    assert said(lambda: fastdiff.sample(wide(**known_range), t_min=0.5, **run))[1] == 0
    assert said(lambda: fastdiff.sample(wide(**known_range), check="off", **run))[1] == 0
    assert said(lambda: fastdiff.sample(wide(**known_range), steps=2, num_samples=0))[1] == 0
    noisy = fastdiff.ScoreModel(lambda x, t: -x / (1 + fastdiff.VE().sigma(t)[:, None] ** 2), fastdiff.VE(), "score",
                                data_shape=(2,), **known_range)  # fmt: skip
    assert said(lambda: fastdiff.sample(noisy, grid=np.linspace(1, 0.8, 20), num_samples=40))[1] == 0
    right = fastdiff.ScoreModel(exact, VP, "score", data_shape=(2,), data_range=(-3.0, 3.0))
    assert said(lambda: fastdiff.sample(right, steps=20, num_samples=100))[1] == 0


def test_a_trained_model_knows_its_range(tmp_path):
    model = wide()
    model.net.weight = nn.Parameter(torch.zeros(()))
    model.net.forward = lambda x, t: -1e-6 * x + 0 * model.net.weight
    image = fastdiff.ScoreModel(model.net, fastdiff.VE(), "score", data_shape=(1, 2, 2))
    run = {"steps": 8, "num_samples": 40}
    assert said(lambda: fastdiff.sample(image, **run))[1] == 0
    fit(image, Data(torch.rand(10, 1, 2, 2), range=(0.0, 1.0)))
    assert said(lambda: fastdiff.sample(image, **run))[1] == 1


def test_clip_data_clamps_the_samples():
    model = wide(data_range=(-1.0, 2.0))
    run = {"steps": 8, "num_samples": 40}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free = fastdiff.sample(model, **run)
    for more in ({}, {"sampler": "rk45", "steps": None}, {"sampler": "heun"}, {"dtype": torch.float64}):
        with pytest.warns(UserWarning, match="^clip='data' cut samples, .*% of their numbers from far outside"):
            x = fastdiff.sample(model, **{**run, **more}, clip="data")
        assert float(x.min()) == -1.0
        assert float(x.max()) == 2.0
    with pytest.warns(UserWarning, match="^clip='data' cut"):
        assert torch.equal(fastdiff.sample(model, **run, clip="data"), free.clamp(-1.0, 2.0))
    for wrong in ("date", "", "(-1, 1)"):
        with pytest.raises(ConfigError, match="clip must be"):
            fastdiff.sample(model, **run, clip=wrong)
    with pytest.raises(ConfigError, match="'data' with a ScoreModel"):
        fastdiff.sample(Wide(), fastdiff.VE(), shape=(2,), clip="data", **run)


def test_clip_of_a_standardized_model():
    run = {"steps": 8, "num_samples": 40}
    model = known(data_range=(-10.0, 6000.0))
    x = fastdiff.sample(model, clip="data", **run)
    assert float(x.max()) == 6000.0
    with pytest.raises(ConfigError, match="use clip='data'"):
        fastdiff.sample(model, clip=(-1.0, 1.0), **run)
    alike = fastdiff.sample(known((10.0, 5.0)), clip=(5.0, 15.0), **run)
    plain = fastdiff.sample(known(None), clip=(-1.0, 1.0), **run)
    assert torch.allclose(alike, 10 + 5 * plain)


def test_the_command_line_clips(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "digits-vp", "--steps", "30", "-n", "2", "--clip", "data", "--out", "s.npy"]) == 0
    s = np.load("s.npy")
    assert s.min() >= -1
    assert s.max() <= 1
    assert main(["sample", "digits-vp", "--steps", "3", "-n", "2", "--clip=-0.5,1", "--out", "s.npy"]) == 0
    expected = fastdiff.sample(fastdiff.load("digits-vp"), steps=3, num_samples=2, clip=(-0.5, 1.0))
    np.testing.assert_array_equal(np.load("s.npy"), expected)
    for wrong in ("date", "1", "1,2,3", "", "2,1"):
        assert main(["sample", "digits-vp", "--steps", "3", f"--clip={wrong}"]) == 2
        assert "clip must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        (gaussian(500, [1000.0] * 3, [300.0] * 3), {"standardize": (0.0, 1.0)}, "does not cover data as large as"),
        (
            gaussian(500, [1.0] * 3, [0.3] * 3),
            {"standardize": (1000.0, 300.0)},
            "is above the data's standard deviation",
        ),
        (np.arange(1500).reshape(500, 3).astype(np.uint8) % 2, {}, "is above the data's standard deviation"),
    ],
    ids=["not standardized by what was given", "standardized as other data were", "bytes of two levels"],
)
def test_a_training_sees_the_scale_of_what_the_network_sees(data, options, says):
    """Whoever gave the units: the caller, a training before this one, or the range of the levels."""
    model = fastdiff.ScoreModel(MLP((3,)), VP, data_shape=(3,), **options)
    data = Data(
        torch.from_numpy(data), range=None if data.dtype == np.uint8 else (float(data.min()), float(data.max()))
    )
    with pytest.warns(UserWarning, match=says):
        fit(model, data)


@pytest.mark.parametrize("share", [0.005, 0.5])
def test_samples_that_are_cut_much_are_told_of(share):
    """A network that is wrong for a part of the numbers, which a clamp at the end would hide."""
    wrong = (torch.arange(200) < 200 * share).float() * 100
    model = fastdiff.ScoreModel(lambda x, t: wrong.expand_as(x), VP, "x0", data_shape=(200,), data_range=(-1, 1))
    options = {"steps": 5, "num_samples": 2, "sampler": "ddim", "clip": "data"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = fastdiff.sample(model, **options)
    assert x.max() == 1
    said = [str(w.message) for w in caught]
    if share > 0.01:
        assert len(said) == 1
        assert re.match(
            r"clip='data' cut samples, 50% of their numbers from far outside: they ran from .*: take clip=\(-1, 1\), which",
            said[0],
        )
        assert fastdiff.sample(model, **options | {"clip": (-1, 1)}).max() <= 1.001  # the way out
    else:
        assert said == []
