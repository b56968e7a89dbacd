"""Data and load_data: real files on disk, closed forms for scaling and dequantisation, and every refusal."""

import copy
import gzip
import os
import pickle
import random
import struct
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff.errors import ConfigError, DataError, DeviceError, DTypeError, ShapeError
from fastdiff.execution.noise import AUGMENTATION, uniform
from fastdiff.training import Data, load_data

RANGES = ((-1, 1), (0, 1), (0.1, 0.7), (-3, 0.3))
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


def levels(count: int) -> Data:
    """One sample per level, float32 so that any number of levels fits."""
    return Data(torch.arange(count, dtype=torch.float32)[:, None], range=(0, count - 1), bins=count)


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray, code: int) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def save_picture(path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


# ------------------------------------------------------------------------------------------------ scaling and levels


@pytest.mark.parametrize("data_range", RANGES)
def test_plain_scaling_is_linear_and_meets_both_ends(data_range):
    a, b = (float(np.float32(end)) for end in data_range)
    raw = Data(torch.arange(256, dtype=torch.uint8)[:, None])
    x = raw.batch(range(256), data_range)
    assert x.dtype == torch.float32
    assert (x[0].item(), x[255].item()) == (a, b)
    exact = data_range[0] + (data_range[1] - data_range[0]) * torch.arange(256, dtype=torch.float64)[:, None] / 255
    torch.testing.assert_close(x.double(), exact, rtol=2**-23, atol=2**-24)


def test_continuous_scaling_is_linear_and_inverts():
    x = torch.tensor([[-2.0, 6.0], [0.0, 2.0]])
    data = Data(x)
    assert data.range == (-2.0, 6.0)
    assert data.bins is None
    assert torch.equal(data.batch([0, 1], (-1, 1)), torch.tensor([[-1.0, 1.0], [-0.5, 0.0]]))
    assert torch.equal(data.quantise(data.batch([0, 1], (-1, 1)), (-1, 1)), x)
    assert torch.equal(data.batch([1], (-2, 6)), x[1:])
    assert torch.equal(data.quantise(torch.tensor([[-9.0, 9.0]]), (0, 1)), torch.tensor([[-2.0, 6.0]]))


def test_the_data_range_that_is_the_raw_range_changes_no_bit():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    data = Data(x)
    assert torch.equal(data.batch(range(64), data.range), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_that_the_dtype_cannot_hold_are_still_inside(dtype):
    data = Data(torch.tensor([[0.1], [0.3]], dtype=dtype), range=(0.1, 0.3))
    assert data.range == (0.1, 0.3)
    assert data.batch([0, 1], (-1, 1)).tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize("count", [2, 3, 17, 255, 256, 1000, 65536])
@pytest.mark.parametrize("data_range", RANGES)
def test_quantise_inverts_batch_with_and_without_noise(count, data_range):
    data = levels(count)
    assert torch.equal(data.quantise(data.batch(range(count), data_range), data_range), data.x)
    drawn = torch.rand(count, 1, generator=torch.Generator().manual_seed(count))
    for noise in (torch.zeros(count, 1), drawn, torch.full((count, 1), BELOW_ONE)):
        x = data.batch(range(count), data_range, noise)
        assert x.dtype == torch.float32
        assert (x.double() >= data_range[0]).all()
        assert (x.double() < data_range[1]).all()
        assert torch.equal(data.quantise(x, data_range), data.x)
        exact = data_range[0] + (data_range[1] - data_range[0]) * (data.x.double() + noise.double()) / count
        torch.testing.assert_close(x.double(), exact, rtol=2**-22, atol=2**-22)


@pytest.mark.parametrize("count", [2, 17, 256])
def test_data_and_plain_levels_are_dequantised_with_the_same_noise(count):
    data, k = levels(count), torch.arange(count)[:, None]
    options = {"seed": 3, "first_sample": 5, "draw": 2}
    drawn = data.dequantized(range(count), (-1, 1), **options)
    noise = uniform(count, data.shape, stream=AUGMENTATION, **options)
    assert torch.equal(drawn, data.batch(range(count), (-1, 1), noise))
    plain = fastdiff.dequantize(k, (-1, 1), count, **options)
    # in float32 the lower end of the bin is rounded up (by < 2^-24), noise times width and their sum to nearest (2^-25 each)
    torch.testing.assert_close(drawn.double(), plain, rtol=0, atol=2**-23)
    assert torch.equal(((plain + 1) * count / 2).floor().long(), k)
    rows = [data.dequantized([i], (-1, 1), seed=3, draw=2, first_sample=5 + i) for i in range(min(count, 9))]
    assert torch.equal(torch.cat(rows), drawn[:9])


def test_dequantised_mean_and_variance_are_those_of_a_uniform_bin():
    count, draws, width = 17, 40_000, 2 / 17
    data = Data(torch.tensor([[5]], dtype=torch.uint8), range=(0, 16))
    assert data.bins == count
    noise = torch.rand(draws, 1, generator=torch.Generator().manual_seed(1))
    x = data.batch([0] * draws, (-1, 1), noise).double()
    middle = -1 + (5 + 0.5) * width
    assert abs(x.mean().item() - middle) < 5 * width / np.sqrt(12 * draws)
    # the variance of a uniform is w²/12, its sample variance has standard error w² / sqrt(180 n)
    assert abs(x.var().item() - width**2 / 12) < 5 * width**2 / np.sqrt(180 * draws)


def test_quantise_clamps_and_takes_any_float_dtype():
    data = Data(torch.zeros(1, 2, dtype=torch.uint8))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert data.quantise(torch.tensor([[-7, 7]], dtype=dtype), (-1, 1)).tolist() == [[0, 255]]
    assert data.quantise(torch.tensor([[-1.0, 1.0]]), (-1, 1)).dtype == torch.uint8
    assert data.quantise(torch.zeros(0, 2), (-1, 1)).shape == (0, 2)


def test_levels_need_not_be_one_apart():
    x = torch.linspace(-1, 1, 256)[:, None]
    data = Data(x, range=(-1, 1), bins=256)
    k = torch.arange(256)[:, None]
    assert torch.equal(data.batch(range(256), (0, 255)).round().long(), k)
    torch.testing.assert_close(data.quantise(data.batch(range(256), (0, 1)), (0, 1)), x, rtol=0, atol=2**-23)


@pytest.mark.parametrize(
    "indices", [[2, 0], (2, 0), np.array([2, 0], np.uint8), torch.tensor([2, 0]), range(2, -1, -2)]
)
def test_indices_of_any_kind(indices):
    assert levels(3).batch(indices, (0, 2)).tolist() == [[2.0], [0.0]]


def test_an_empty_batch_has_the_right_shape():
    data = load_data(pictures(4, 3, 2, 2))
    assert data.batch([], (-1, 1)).shape == (0, 3, 2, 2)
    assert data.batch([], (-1, 1), torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)


# ------------------------------------------------------------------------------------------------- Data as an object


def test_defaults_for_uint8():
    data = Data(torch.from_numpy(pictures(5, 3, 4, 4)))
    assert (len(data), data.shape, data.range, data.bins) == (5, (3, 4, 4), (0.0, 255.0), 256)
    assert (data.labels, data.num_classes, data.class_names) == (None, None, ())
    assert Data(torch.tensor([[0], [1]], dtype=torch.uint8), range=(0, 1)).bins == 2
    assert Data(torch.tensor([[0], [4]], dtype=torch.uint8), range=(0, 4), bins=2).bins == 2


def test_explain_says_where_the_range_comes_from():
    x = torch.tensor([[0.25], [0.5]])
    assert Data(x).explain() == (
        "2 samples of shape [1] float32, range 0.25 to 0.5 (the data's minimum and maximum), continuous values, "
        "no labels"
    )
    assert repr(Data(x, [0, 1], range=(0, 1))) == (
        "Data(2 samples of shape [1] float32, range 0 to 1, continuous values, 2 classes)"
    )


def test_large_floats_without_a_range_warn_once():
    x = torch.tensor([[0.0], [255.0]])
    with pytest.warns(UserWarning, match=r"floats from 0 to 255 .* give range=") as caught:
        data = load_data(x)
    assert len(caught) == 1
    assert data.range == (0.0, 255.0)
    assert {warning.filename for warning in caught} == {__file__}
    with pytest.warns(UserWarning, match="floats from -11 to 1"):
        Data(torch.tensor([[-11.0], [1.0]]))
    load_data(x, range=(0, 255))
    load_data(torch.tensor([[-10.0], [10.0]]))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint64])
def test_labels_of_any_integer_dtype(dtype):
    x = pictures(3, 2)
    data = load_data(x, labels=np.array([2, 0, 2], dtype))
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == [2, 0, 2]
    assert data.num_classes == 3
    assert load_data(x, labels=torch.tensor([1, 1, 0], dtype=torch.int32)).labels.tolist() == [1, 1, 0]
    assert Data(torch.from_numpy(x), [0, 0, 1], num_classes=10).num_classes == 10


def test_split_is_a_partition_that_keeps_everything_else():
    n = 103
    data = Data(
        torch.arange(n, dtype=torch.uint8)[:, None], torch.arange(n) % 5, (0, 200), 201, class_names=tuple("abcde")
    )
    first, second = data.split(0.25, seed=7)
    assert (len(first), len(second)) == (26, 77)
    assert sorted(first.x.flatten().tolist() + second.x.flatten().tolist()) == list(range(n))
    for part in (first, second):
        assert torch.equal(part.labels, part.x[:, 0].long() % 5)
        assert (part.range, part.bins, part.num_classes, part.class_names) == ((0.0, 200.0), 201, 5, tuple("abcde"))
    assert torch.equal(data.split(0.25, 7)[0].x, first.x)
    assert not torch.equal(data.split(0.25, 8)[0].x, first.x)
    order = np.random.Generator(np.random.PCG64(7)).permutation(n)
    assert first.x.flatten().tolist() == order[:26].tolist()


def test_split_keeps_the_number_of_classes_where_a_part_lacks_the_last():
    data = Data(torch.zeros(8, 1, dtype=torch.uint8), [0] * 7 + [9])
    assert [part.num_classes for part in data.split(0.5)] == [10, 10]


def test_no_global_state_is_read_or_changed():
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    data = load_data("digits")
    data.split(0.5, 3)[0].batch([0, 1], (-1, 1))
    assert state() == before


def test_default_dtype_and_device_have_no_influence():
    x, noise = torch.from_numpy(pictures(4, 2)), torch.rand(2, 2)
    expected = Data(x).batch([3, 1], (-1, 1), noise)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        data = Data(x, [0, 1, 2, 0])
        got = data.batch([3, 1], (-1, 1), noise)
        back = data.quantise(got, (-1, 1))
        parts = data.split(0.5)
        loaded = load_data(pictures(4, 2))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, expected)
    assert torch.equal(back, x[[3, 1]])
    assert {part.x.device.type for part in (*parts, loaded)} == {"cpu"}


def test_the_callers_tensor_is_shared_and_left_alone():
    x = torch.nn.Parameter(torch.rand(4, 3))
    before = x.detach().clone()
    data = Data(x)
    assert type(data.x) is torch.Tensor
    assert not data.x.requires_grad
    assert data.x.data_ptr() == x.data_ptr()
    data.quantise(data.batch([0, 1], (-1, 1)), (-1, 1))
    assert torch.equal(x, before)
    assert x.requires_grad
    labels = torch.tensor([0, 1, 0, 1])
    kept = Data(x, labels).labels
    labels += 5
    assert kept.tolist() == [0, 1, 0, 1]


def test_copies_and_pickles():
    data = load_data("digits")
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        assert torch.equal(twin.x, data.x)
        assert twin.explain() == data.explain()


# ------------------------------------------------------------------------------------------------------------ arrays


def test_arrays_as_they_stand():
    x = pictures(4, 6, 5)
    with pytest.warns(UserWarning, match="signals of 6 channels: give channels=1"):
        assert load_data(x).shape == (6, 5)
    assert load_data(x, channels=1).shape == (1, 6, 5)
    assert torch.equal(load_data(torch.from_numpy(x), channels="first").x, torch.from_numpy(x))
    assert load_data(x[:, :3]).shape == (3, 5)  # few channels, many times: a signal without doubt
    assert load_data(np.linspace(0, 1, 6, dtype=np.float64).reshape(3, 2)).x.dtype == torch.float64


@pytest.mark.parametrize(
    "kind", ["read-only", "negative strides", "every second", "transposed", "byte-swapped", "expanded"]
)
def test_awkward_arrays_hold_the_same_values(kind):
    x = np.random.default_rng(0).random((6, 4), dtype=np.float32)
    array = {
        "read-only": x.copy(),
        "negative strides": x[::-1, ::-1],
        "every second": x[::2],
        "transposed": x.T,
        "byte-swapped": x.astype(">f4"),
        "expanded": np.broadcast_to(x[:1], (3, 4)),
    }[kind]
    if kind == "read-only":
        array.setflags(write=False)
    data = load_data(array)
    assert data.x.is_contiguous()
    assert np.array_equal(data.x.numpy(), array)


def test_channels_last():
    x = pictures(4, 6, 5, 3)
    data = load_data(x, channels="last")
    assert data.shape == (3, 6, 5)
    assert np.array_equal(data.x.numpy(), x.transpose(0, 3, 1, 2))
    assert load_data(x, channels="first").shape == (6, 5, 3)
    with pytest.warns(UserWarning, match='give channels="last"'):
        assert load_data(x / np.float32(255)).shape == (6, 5, 3)
    assert load_data(x / np.float32(255), channels="first").shape == (6, 5, 3)
    assert load_data(pictures(4, 3, 5, 3)).shape == (3, 5, 3)


def test_a_data_is_returned_as_it_is():
    data = levels(3)
    assert load_data(data) is data


def test_digits_facts():
    data = load_data("digits")
    assert (len(data), data.shape, data.range, data.bins) == (1797, (1, 8, 8), (0.0, 16.0), 17)
    assert data.x.dtype == torch.uint8
    assert (int(data.x.min()), int(data.x.max())) == (0, 16)
    assert data.num_classes == 10
    assert data.labels.unique().tolist() == list(range(10))
    x = data.batch(range(1797), (-1, 1))
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    assert torch.equal(data.quantise(x, (-1, 1)), data.x)
    assert data.explain() == "1797 samples of shape [1, 8, 8] uint8, range 0 to 16, 17 levels, 10 classes"


# ------------------------------------------------------------------------------------------------------------- files


def test_npy(tmp_path):
    x = np.random.default_rng(0).random((5, 3), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    for path in (tmp_path / "x.npy", str(tmp_path / "x.npy")):
        data = load_data(path, labels=[0, 1, 2, 3, 4], range=(0, 1))
        assert np.array_equal(data.x.numpy(), x)
        assert (data.range, data.num_classes) == ((0.0, 1.0), 5)


@pytest.mark.parametrize("name", ["x", "images", "data", "x_train", "whatever"])
@pytest.mark.parametrize("label", ["y", "labels", "y_train"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, name, label, save):
    x, y = pictures(5, 2, 3), np.arange(5) % 2
    save(tmp_path / "a.npz", **{name: x, label: y, "note": np.array("text")})
    data = load_data(tmp_path / "a.npz", channels=1)
    assert data.shape == (1, 2, 3)
    assert np.array_equal(data.x[:, 0].numpy(), x)
    assert data.labels.tolist() == y.tolist()
    assert load_data(tmp_path / "a.npz", labels=[7] * 5).labels.tolist() == [7] * 5


def test_npz_takes_the_training_part_and_the_named_array(tmp_path):
    parts = {"x_train": pictures(5, 2), "x_test": pictures(3, 2), "y_train": np.arange(5), "y_test": np.arange(3)}
    np.savez(tmp_path / "a.npz", **parts)
    with pytest.warns(UserWarning, match="only x_train and y_train is taken, not x_test, y_test"):
        data = load_data(tmp_path / "a.npz")
    assert np.array_equal(data.x.numpy(), parts["x_train"])
    assert data.num_classes == 5


@pytest.mark.parametrize(
    ("code", "dtype", "kept"),
    [
        (0x08, "u1", torch.uint8),
        (0x09, "i1", torch.float32),
        (0x0B, ">i2", torch.float32),
        (0x0C, ">i4", torch.float64),
        (0x0D, ">f4", torch.float32),
        (0x0E, ">f8", torch.float64),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_of_every_dtype(tmp_path, code, dtype, kept, zipped):
    lowest = 0 if dtype == "u1" else -10
    array = np.random.default_rng(0).integers(lowest, 11, (4, 3, 2)).astype(dtype)
    content = idx(array, code)
    path = tmp_path / ("a.gz" if zipped else "a-idx3")
    path.write_bytes(gzip.compress(content) if zipped else content)
    data = load_data(path)
    assert data.x.dtype == kept
    assert data.shape == (1, 3, 2)
    assert data.labels is None
    assert np.array_equal(data.x[:, 0].numpy(), array.astype(dtype.replace(">", "=")))


def test_idx_of_other_ranks_keeps_its_shape(tmp_path):
    for shape in ((4, 3), (4, 3, 2, 2)):
        (tmp_path / "a").write_bytes(idx(pictures(*shape), 0x08))
        assert load_data(tmp_path / "a").shape == shape[1:]
    (tmp_path / "a").write_bytes(idx(pictures(4, 5, 6, 3), 0x08))
    assert load_data(tmp_path / "a", channels="last").shape == (3, 5, 6)


@pytest.mark.parametrize("images", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_labels_beside_the_images(tmp_path, images, suffix):
    def write(name, content):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    x = pictures(4, 3, 2)
    write(images, idx(x, 0x08))
    assert load_data(tmp_path / images).labels is None
    labels = images.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1") + suffix
    write(labels, idx(np.array([3, 0, 1, 3], np.uint8), 0x08))
    data = load_data(tmp_path / images)
    assert data.labels.tolist() == [3, 0, 1, 3]
    assert np.array_equal(data.x[:, 0].numpy(), x)
    assert load_data(tmp_path / images, labels=[0, 0, 0, 1]).num_classes == 2
    write(labels, idx(np.array([3, 0], np.uint8), 0x08))
    with pytest.raises(DataError, match="labels must have length 4"):
        load_data(tmp_path / images)


# ---------------------------------------------------------------------------------------------- a folder of pictures


def test_a_flat_folder_in_the_order_of_names(tmp_path):
    x = pictures(3, 6, 5, 3)
    for name, array in zip(("b.png", "a.PNG", "c.bmp"), x):
        save_picture(tmp_path / name, array)
    (tmp_path / "readme.txt").write_text("not a picture")
    (tmp_path / "._a.png").write_bytes(b"not a picture either")
    data = load_data(tmp_path)
    assert np.array_equal(data.x.numpy(), x[[1, 0, 2]].transpose(0, 3, 1, 2))
    assert (data.x.dtype, data.range, data.bins, data.labels) == (torch.uint8, (0.0, 255.0), 256, None)
    assert load_data(str(tmp_path), labels=[0, 1, 0]).num_classes == 2


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.webp", "a.gif", "a.tiff", "a.ppm"])
def test_other_formats(tmp_path, name):
    save_picture(tmp_path / name, np.full((8, 8, 3), 77, np.uint8))
    data = load_data(tmp_path)
    assert data.shape == (3, 8, 8)
    assert (data.x.int() - 77).abs().max() <= 2


def test_subfolders_are_classes_only_if_all_pictures_lie_in_them(tmp_path):
    for i, name in enumerate(("dog/1.png", "cat/2.png", "cat/deep/3.png", "ant/4.png")):
        save_picture(tmp_path / name, np.full((2, 2), i, np.uint8))
    (tmp_path / "empty").mkdir()
    data = load_data(tmp_path)
    assert data.shape == (1, 2, 2)
    assert data.class_names == ("ant", "cat", "dog")
    assert data.x[:, 0, 0, 0].tolist() == [3, 1, 2, 0]
    assert data.labels.tolist() == [0, 1, 1, 2]
    assert data.split(0.5)[0].class_names == data.class_names
    assert load_data(tmp_path, labels=[0, 0, 0, 1]).class_names == ()
    save_picture(tmp_path / "0.png", np.zeros((2, 2), np.uint8))
    assert load_data(tmp_path).labels is None


def test_channels_convert_pictures(tmp_path):
    grey, colour = np.full((2, 2), 50, np.uint8), np.full((2, 2, 3), 200, np.uint8)
    save_picture(tmp_path / "a.png", grey)
    save_picture(tmp_path / "b.png", colour)
    assert load_data(tmp_path, channels=1).x[:, :, 0, 0].tolist() == [[50], [200]]
    assert load_data(tmp_path, channels=3).x[:, :, 0, 0].tolist() == [[50] * 3, [200] * 3]
    with pytest.raises(ShapeError, match=r"\[1, 2, 2\] and \[3, 2, 2\] in b\.png: give channels=1 or 3"):
        load_data(tmp_path)


def test_modes_transparency_and_rotation(tmp_path):
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    save_picture(tmp_path / "rgba" / "a.png", clear)
    assert load_data(tmp_path / "rgba").x[0, :, 0].tolist() == [[10, 255], [20, 255], [30, 255]]
    (tmp_path / "bits").mkdir()
    Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1").save(tmp_path / "bits" / "a.png")
    assert load_data(tmp_path / "bits").x.tolist() == [[[[0, 255]]]]
    (tmp_path / "palette").mkdir()
    Image.fromarray(np.full((2, 2, 3), (9, 8, 7), np.uint8)).quantize(2).save(tmp_path / "palette" / "a.png")
    assert load_data(tmp_path / "palette").x[0, :, 0, 0].tolist() == [9, 8, 7]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    save_picture(tmp_path / "turned" / "a.png", pictures(2, 5), exif=exif)
    assert load_data(tmp_path / "turned").shape == (1, 5, 2)


def test_size_stretches_every_picture(tmp_path):
    save_picture(tmp_path / "a.png", np.full((4, 6, 3), 9, np.uint8))
    save_picture(tmp_path / "b.png", np.full((9, 3, 3), 200, np.uint8))
    data = load_data(tmp_path, size=(5, 7))
    assert data.shape == (3, 5, 7)
    assert [int(x.unique()) for x in data.x] == [9, 200]
    assert load_data(tmp_path, size=[1, 2], channels=1).shape == (1, 1, 2)
    with pytest.raises(ShapeError, match=r"\[3, 4, 6\] and \[3, 9, 3\] in b\.png: give size="):
        load_data(tmp_path)


# ---------------------------------------------------------------------------------------------------------- refusals

FLOATS = torch.tensor([[0.0, 0.5], [0.25, 1.0]])
BYTES = torch.tensor([[0, 5], [9, 255]], dtype=torch.uint8)
NAN = torch.tensor([[0.0, 0.5], [float("nan"), 1.0]])

BAD_DATA = {
    "array": (lambda: Data(BYTES.numpy()), DTypeError, r"x must be a tensor, got ndarray: use torch\.as_tensor"),
    "one axis": (lambda: Data(BYTES[0]), ShapeError, r"x must have shape \[N, \*shape\].*got \[2\]"),
    "no axis": (lambda: Data(torch.tensor(1.0)), ShapeError, r"got \[\]"),
    "empty": (lambda: Data(torch.zeros(0, 3)), DataError, r"x must hold at least one value, got shape \[0, 3\]"),
    "empty sample": (lambda: Data(torch.zeros(3, 0)), DataError, r"\[3, 0\]"),
    "nan": (lambda: Data(NAN), DataError, r"x must be finite, got nan at index \[1, 0\]"),
    "inf": (lambda: Data(1 / FLOATS), DataError, r"got inf at index \[0, 0\]"),
    "-inf with range": (lambda: Data(-1 / FLOATS, range=(0, 1)), DataError, r"got -inf at index \[0, 0\]"),
    "bool": (lambda: Data(FLOATS > 0), DTypeError, r"got bool: .* range=\(0, 1\)"),
    "int64": (lambda: Data(BYTES.long()), DTypeError, "got int64: convert it to uint8"),
    "int8": (lambda: Data(BYTES.char()), DTypeError, "got int8"),
    "float16": (lambda: Data(FLOATS.half()), DTypeError, "got float16: convert it to float32"),
    "bfloat16": (lambda: Data(FLOATS.bfloat16()), DTypeError, "got bfloat16"),
    "complex": (lambda: Data(FLOATS.to(torch.complex64)), DTypeError, "got complex64: stack its real"),
    "sparse": (lambda: Data(FLOATS.to_sparse()), ShapeError, r"x must be a dense .* use x\.to_dense\(\)"),
    "meta": (lambda: Data(FLOATS.to("meta")), DeviceError, "x is on the meta device, which holds no data"),
    "constant": (lambda: Data(torch.ones(2, 2)), DataError, r"span a finite range .* got 1 to 1: give range="),
    "overflowing": (
        lambda: Data((FLOATS.double() - 0.5) * 1e308 * 3),
        DataError,
        r"span a finite range .* got -1\.5e\+308 to 1\.5e\+308",
    ),
    "range reversed": (lambda: Data(FLOATS, range=(1, 0)), ConfigError, r"range must be .* got \(1, 0\)"),
    "range empty": (lambda: Data(FLOATS, range=(1, 1)), ConfigError, r"got \(1, 1\)"),
    "range nan": (lambda: Data(FLOATS, range=(0, float("nan"))), ConfigError, r"got \(0, nan\)"),
    "range inf": (lambda: Data(FLOATS, range=(0, float("inf"))), ConfigError, r"got \(0, inf\)"),
    "range float32 overflow": (lambda: Data(FLOATS, range=(0, 1e39)), ConfigError, r"float32, got \(0, 1e\+39\)"),
    "range huge": (lambda: Data(FLOATS, range=(0, 10**400)), ConfigError, "range must be two finite"),
    "range number": (lambda: Data(FLOATS, range=1), ConfigError, "got 1"),
    "range triple": (lambda: Data(FLOATS, range=(0, 1, 2)), ConfigError, r"got \(0, 1, 2\)"),
    "range bool": (lambda: Data(FLOATS, range=(False, True)), ConfigError, "got .False, True"),
    "range one bool": (lambda: Data(FLOATS, range=(False, 1)), ConfigError, r"got \(False, 1\)"),
    "range text": (lambda: Data(FLOATS, range=("0", "1")), ConfigError, "range must be"),
    "above range": (
        lambda: Data(FLOATS, range=(0, 0.9)),
        DataError,
        r"x must be >= 0 and <= 0\.9, .* got 1 at index \[1, 1\]: .* range= .* 0 to 1$",
    ),
    "below range": (lambda: Data(BYTES, range=(5, 255)), DataError, r">= 5 .* got 0 at index \[0, 0\]: .* 0 to 255$"),
    "between levels": (lambda: Data(FLOATS, bins=3), DataError, r"its 3 levels .* got 0.25 at index \[1, 0\]"),
    "uint8 between levels": (lambda: Data(BYTES, bins=2), DataError, r"got 5 at index \[0, 1\]"),
    "bins 1": (lambda: Data(BYTES, bins=1), ConfigError, "bins must be an integer >= 2 and <= 65536, got 1"),
    "bins float": (lambda: Data(BYTES, bins=256.0), ConfigError, "bins must be .* got 256.0"),
    "bins bool": (lambda: Data(BYTES, bins=True), ConfigError, "bins must be .* got True"),
    "bins many": (lambda: Data(BYTES, bins=10**9), ConfigError, "got 1000000000"),
    "labels short": (lambda: Data(BYTES, [1]), DataError, "labels must have length 2, one per sample, got 1"),
    "labels empty": (lambda: Data(BYTES, []), DataError, "labels must have length 2, one per sample, got 0"),
    "labels negative": (lambda: Data(BYTES, [0, -3]), DataError, "labels must be >= 0, got -3 at index 1"),
    "labels float": (
        lambda: Data(BYTES, torch.tensor([0.0, 1.0])),
        DTypeError,
        "labels must be integers, got torch.fl",
    ),
    "labels float list": (lambda: Data(BYTES, [0, 1.5]), DTypeError, "labels must be integers, got float64"),
    "labels bool": (lambda: Data(BYTES, torch.tensor([True, False])), DTypeError, "got torch.bool"),
    "labels names": (lambda: Data(BYTES, ["cat", "dog"]), DTypeError, "labels must be integers, got <U3"),
    "labels text": (lambda: Data(BYTES, "01"), DTypeError, "labels must be integers"),
    "labels ragged": (lambda: Data(BYTES, [[0], [1, 2]]), DTypeError, "labels must be one flat sequence"),
    "labels one-hot": (
        lambda: Data(BYTES, [[0, 1], [1, 0]]),
        ShapeError,
        r"labels must have one axis, got .* \[2, 2\]",
    ),
    "labels huge": (lambda: Data(BYTES, [0, 10**30]), DTypeError, "labels must be integers, got object"),
    "labels meta": (lambda: Data(BYTES, torch.zeros(2, device="meta").long()), DeviceError, "labels is on the meta"),
    "label out of range": (
        lambda: Data(BYTES, [0, 7], num_classes=7),
        DataError,
        "labels must be >= 0 and <= 6, got 7 at index 1: give num_classes=8",
    ),
    "num_classes 0": (lambda: Data(BYTES, [0, 0], num_classes=0), ConfigError, "num_classes must be"),
    "num_classes alone": (lambda: Data(BYTES, num_classes=3), ConfigError, "num_classes and class_names need labels"),
    "names": (
        lambda: Data(BYTES, [0, 1], num_classes=2, class_names=("a",)),
        ConfigError,
        "class_names must hold 2 names, .* got 1",
    ),
}

NOISE = torch.zeros(1, 2)

BAD_CALLS = {
    "index high": (lambda: Data(BYTES).batch([0, 2], (0, 1)), DataError, "indices must be >= 0 and <= 1, got 2"),
    "index negative": (lambda: Data(BYTES).batch([-1], (0, 1)), DataError, r"got -1"),
    "index float": (lambda: Data(BYTES).batch([0.0], (0, 1)), DTypeError, "indices must be integers, got float64"),
    "index mask": (lambda: Data(BYTES).batch(torch.tensor([True, False]), (0, 1)), DTypeError, "got torch.bool"),
    "index scalar": (lambda: Data(BYTES).batch(1, (0, 1)), ShapeError, r"indices must have one axis, got shape \[\]"),
    "index None": (lambda: Data(BYTES).batch(None, (0, 1)), DTypeError, "indices must be integers, got object"),
    "data_range": (lambda: Data(BYTES).batch([0], (1, -1)), ConfigError, r"data_range must be .* got \(1, -1\)"),
    "data_range None": (lambda: Data(BYTES).batch([0], None), ConfigError, "data_range must be .* got None"),
    "data_range narrow": (
        lambda: Data(BYTES).batch([0], (1, 1 + 1e-6)),
        ConfigError,
        r"wide enough for 256 bins .* got \(1, 1\.000001\)",
    ),
    "noise continuous": (
        lambda: Data(FLOATS).batch([0], (0, 1), NOISE),
        ConfigError,
        "dequantisation needs .* bins is None: .* bins=",
    ),
    "dequantised continuous": (
        lambda: Data(FLOATS).dequantized([0], (0, 1)),
        ConfigError,
        "dequantisation needs .* bins=",
    ),
    "dequantised seed": (lambda: Data(BYTES).dequantized([0], (0, 1), seed=-1), ConfigError, "seed must be an integer"),
    "noise float64": (lambda: Data(BYTES).batch([0], (0, 1), NOISE.double()), DTypeError, "noise must be float32, got"),
    "noise array": (
        lambda: Data(BYTES).batch([0], (0, 1), NOISE.numpy()),
        DTypeError,
        "noise must be a tensor, got ndarray",
    ),
    "noise meta": (lambda: Data(BYTES).batch([0], (0, 1), NOISE.to("meta")), DeviceError, "noise is on the meta"),
    "noise shape": (
        lambda: Data(BYTES).batch([0], (0, 1), NOISE[0]),
        ShapeError,
        r"noise must have the shape of the batch, \[1, 2\], got \[2\]",
    ),
    "noise one": (
        lambda: Data(BYTES).batch([0], (0, 1), NOISE + 1),
        DataError,
        "noise must be >= 0 and < 1, got values from 1 to 1",
    ),
    "noise negative": (lambda: Data(BYTES).batch([0], (0, 1), NOISE - 1e-9), DataError, r"got values from -1e-09"),
    "noise nan": (lambda: Data(BYTES).batch([0], (0, 1), NOISE / 0), DataError, r"got values from nan"),
    "quantise ints": (
        lambda: Data(BYTES).quantise(BYTES, (0, 1)),
        DTypeError,
        "x must be floating .* got torch.uint8",
    ),
    "quantise array": (
        lambda: Data(BYTES).quantise(NOISE.numpy(), (0, 1)),
        DTypeError,
        "x must be a tensor, got ndarray",
    ),
    "quantise shape": (lambda: Data(BYTES).quantise(torch.zeros(2, 3), (0, 1)), ShapeError, r"\[B, 2\], got \[2, 3\]"),
    "quantise scalar": (lambda: Data(BYTES).quantise(torch.tensor(1.0), (0, 1)), ShapeError, r"got shape \[\]"),
    "quantise nan": (
        lambda: Data(BYTES).quantise(NAN, (0, 1)),
        DataError,
        r"x must be finite, got nan at index \[1, 0\]",
    ),
    "quantise range": (lambda: Data(BYTES).quantise(NOISE, (0, 0)), ConfigError, "data_range must be"),
    "fraction 0": (lambda: Data(BYTES).split(0), ConfigError, r"fraction must be a number in \(0, 1\), got 0"),
    "fraction nan": (lambda: Data(BYTES).split(float("nan")), ConfigError, "fraction must be .* got nan"),
    "fraction text": (lambda: Data(BYTES).split("0.5"), ConfigError, "fraction must be .* got '0.5'"),
    "fraction small": (
        lambda: Data(BYTES).split(0.01),
        DataError,
        "fraction must leave samples in both parts, got 0.01 of 2",
    ),
    "seed": (lambda: Data(BYTES).split(0.5, -1), ConfigError, "seed must be an integer .* got -1"),
    "seed float": (lambda: Data(BYTES).split(0.5, 1.0), ConfigError, "seed must be an integer .* got 1.0"),
}

BAD_SOURCES = {
    "list": (lambda: load_data([[1.0]]), DTypeError, r"source must be .* got list: use numpy\.asarray"),
    "None": (lambda: load_data(None), DTypeError, "source must be .* got NoneType"),
    "missing": (lambda: load_data("no/such/file"), DataError, "source must be .* got 'no/such/file': no such file"),
    "missing name": (lambda: load_data("digit"), DataError, 'source must be "digits"'),
    "int64": (lambda: load_data(np.zeros((2, 2), int)), DTypeError, "got int64"),
    "bool": (lambda: load_data(np.zeros((2, 2), bool)), DTypeError, "got bool"),
    "complex": (lambda: load_data(np.zeros((2, 2), complex)), DTypeError, "got complex128"),
    "object": (lambda: load_data(np.zeros((2, 2), object)), DTypeError, "got object"),
    "text": (lambda: load_data(np.array([["a"]])), DTypeError, "got str"),
    "masked": (lambda: load_data(np.ma.masked_equal(np.zeros((2, 2)), 0)), DataError, "x must not be a masked array"),
    "sparse": (lambda: load_data(FLOATS.to_sparse(), channels="last"), ShapeError, "source must be a dense"),
    "channels last": (lambda: load_data(pictures(2, 5, 5, 3)), ShapeError, r'got \[2, 5, 5, 3\]: give channels="last"'),
    "channels 3": (lambda: load_data(FLOATS, channels=3), ConfigError, "channels must be .* got 3"),
    "channels True": (lambda: load_data(FLOATS, channels=True), ConfigError, "channels must be .* got True"),
    "channels 1": (lambda: load_data(FLOATS, channels=1), ShapeError, r"channels=1 needs .* got \[2, 2\]"),
    "last of two": (lambda: load_data(FLOATS, channels="last"), ShapeError, r'channels="last" needs .* got \[2, 2\]'),
    "size": (lambda: load_data(FLOATS, size=(2, 2)), ConfigError, r"size must be None .* got \(2, 2\)"),
    "digits channels": (lambda: load_data("digits", channels=1), ConfigError, 'channels must be None .* "digits"'),
    "options of a Data": (
        lambda: load_data(Data(BYTES), range=(0, 255)),
        ConfigError,
        "range must be None where source is a Data",
    ),
}


def table(cases):
    return pytest.mark.parametrize(("call", "error", "match"), cases.values(), ids=cases.keys())


@table(BAD_DATA | BAD_CALLS | BAD_SOURCES)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match) as caught:
        call()
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)


GOOD_IDX = idx(pictures(4, 3, 2), 0x08)
BAD_IDX = {
    "empty file": (b"", r"a must be a \.npy, \.npz or IDX file"),
    "web page": (b"<!DOCTYPE html>", "that starts with b'<!DO'"),
    "dtype": (GOOD_IDX[:2] + b"\x0a" + GOOD_IDX[3:], "that starts with"),
    "rank 0": (b"\0\0\x08\0", "that starts with"),
    "rank 255": (b"\0\0\x08\xff", "that starts with"),
    "header": (GOOD_IDX[:10], "truncated inside its header"),
    "truncated": (GOOD_IDX[:-1], r"is truncated, its header \[4, 3, 2\] says 24 bytes"),
    "trailing": (GOOD_IDX + b"\0", r"has trailing bytes, its header \[4, 3, 2\] says 24 bytes"),
    "no values": (idx(np.zeros((0, 3), np.uint8), 0x08), r"is empty, its header \[0, 3\]"),
    "promises 2^94": (struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3) + bytes(9), "is truncated"),
    "gzip truncated": (gzip.compress(GOOD_IDX)[:-9], "cannot be read"),
    "gzip damaged": (gzip.compress(GOOD_IDX)[:-8] + bytes(8), "cannot be read: CRC"),
    "gzip promises 2^94": (gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, *[2**32 - 1] * 3)), "is truncated"),
}


@pytest.mark.parametrize(("content", "match"), BAD_IDX.values(), ids=BAD_IDX.keys())
def test_refused_idx_files(tmp_path, content, match):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=match):
        load_data(tmp_path / "a")


def test_a_file_of_labels_is_no_data(tmp_path):
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(4, dtype=np.uint8), 0x08))
    with pytest.raises(ShapeError, match=r"got \[4\]"):
        load_data(tmp_path / "t10k-labels-idx1-ubyte")


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        (
            {"x": pictures(2, 2), "data": pictures(2, 2)},
            "a.npz must hold only one of x, images, data, x_train, got x and data",
        ),
        (
            {"one": pictures(2, 2), "two": pictures(2, 2)},
            "an array named x, or one with two axes or more, got one, two",
        ),
        ({"one": np.arange(3)}, "got one: pass the array itself"),
        ({}, "got nothing"),
        (
            {"x": pictures(2, 2), "y": np.zeros(2), "labels": np.zeros(2)},
            "only one of y, labels, y_train, got y and labels",
        ),
        ({"x": np.array([[None, {}]], object)}, "a.npz cannot be read as a numpy file without pickle"),
        ({"x": pictures(2, 2), "y": np.array([None, {}], object)}, "without pickle"),
    ],
)
def test_refused_npz_files(tmp_path, arrays, match):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=match):
        load_data(tmp_path / "a.npz")


class Bomb:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return sys.exit, ("unpickled",)


def test_nothing_is_ever_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[Bomb()]], object), allow_pickle=True)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb()))
    np.savez(tmp_path / "c.npz", x=np.array([[Bomb()]], object))
    for name in ("a.npy", "b.npy", "c.npz"):
        with pytest.raises(DataError, match=f"{name} cannot be read as a numpy file without pickle"):
            load_data(tmp_path / name)


def test_damaged_numpy_files(tmp_path):
    np.save(tmp_path / "good.npy", pictures(4, 5))
    np.savez(tmp_path / "good.npz", x=pictures(4, 5))
    for suffix in (".npy", ".npz"):
        content = (tmp_path / f"good{suffix}").read_bytes()
        for length in (0, 1, 9, 60, len(content) // 2, len(content) - 1):
            (tmp_path / f"bad{suffix}").write_bytes(content[:length])
            with pytest.raises(DataError, match=r"source bad\.np[yz] cannot be read"):
                load_data(tmp_path / f"bad{suffix}")
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("x", "no array")
    with pytest.raises(DataError, match="got nothing"):
        load_data(tmp_path / "text.npz")
    with open(tmp_path / "two.npy", "wb") as file:
        np.save(file, pictures(4, 5))
        np.save(file, pictures(4, 5))
    with pytest.raises(DataError, match="says 20 bytes"):
        load_data(tmp_path / "two.npy")


def test_a_packed_file_cannot_announce_more_than_it_holds(tmp_path):
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776, 2), }"
    (tmp_path / "a.npy").write_bytes(header + text.ljust(117) + b"\n")
    with pytest.raises(DataError, match="says 2199023255552 bytes"):
        load_data(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", x=pictures(4, 5))
    raw = (tmp_path / "b.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "b.npz") as archive:
        size = archive.getinfo("x.npy").file_size.to_bytes(4, "little")
    (tmp_path / "b.npz").write_bytes(raw.replace(size, (2**31 - 1).to_bytes(4, "little")))
    with pytest.raises(DataError, match="cannot be read"):
        load_data(tmp_path / "b.npz")


@pytest.mark.parametrize("name", ["stack.tif", "film.gif", "film.png", "film.webp"])
@pytest.mark.parametrize("colour", [False, True])
def test_every_frame_is_a_sample(tmp_path, name, colour):
    values = [(60 * k, 255 - 60 * k, 30) if colour else (60 * k,) * 3 for k in range(4)]
    frames = [Image.fromarray(np.full((6, 5, 3), v, np.uint8)) for v in values]
    frames = frames if colour else [frame.convert("L") for frame in frames]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / "a" / name, save_all=True, append_images=frames[1:], **options)
    frames[1].save(tmp_path / "b" / "one.png")
    data = load_data(tmp_path, channels=3)
    assert data.labels.tolist() == [0, 0, 0, 0, 1]
    got = data.x[:4, :, 0, 0].tolist()
    assert np.abs(np.array(got) - np.array(values)).max() <= (1 if name.endswith("gif") else 0)  # a GIF's palette


def test_frames_of_different_sizes_are_refused(tmp_path):
    frames = [Image.new("L", (8, 8)), Image.new("L", (4, 4))]  # as a TIFF with its thumbnail
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    for size in (None, (4, 4)):
        with pytest.raises(DataError, match="frames differ in size"):
            load_data(tmp_path, size=size)


def png_of_16_bits(colour):
    """A PNG of one pixel row, 16 bits a channel, which Pillow reads and does not write."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    channels = {2: 3, 4: 2, 6: 4}[colour]
    header = (4).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([16, colour, 0, 0, 0])
    body = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + b"\x12\x34" * 4 * channels)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("a.png", png_of_16_bits(colour)) for colour in (2, 4, 6)],
        ("a.ppm", b"P6 2 1 65535 " + bytes(range(12))),
        ("a.ppm", b"P6 2 1 1023 " + bytes(12)),
    ],
)
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_colours_of_16_bits_are_refused_not_rounded(tmp_path, name, content, channels):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="more than 8 bits: load it as a float array"):
        load_data(tmp_path, channels=channels)


def test_bitmaps_of_16_bits_a_pixel_are_read(tmp_path):
    """Five bits a channel are fewer than eight."""
    head = b"BM" + (70).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little")
    info = b"".join(n.to_bytes(4, "little") for n in (40, 2, 2)) + b"\1\0\x10\0" + bytes(24)
    (tmp_path / "a.bmp").write_bytes(head + info + b"\xff\x7f" * 4)
    assert load_data(tmp_path).x.tolist() == [[[[255, 255], [255, 255]]] * 3]


def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "store").mkdir()
    save_picture(tmp_path / "store/1.png", np.zeros((2, 2), np.uint8))
    for name in ("cats", "dogs"):
        (tmp_path / "set" / name).mkdir(parents=True)
        save_picture(tmp_path / "set" / name / "0.png", np.ones((2, 2), np.uint8))
    (tmp_path / "set/dogs/more").symlink_to(tmp_path / "store")
    data = load_data(tmp_path / "set")
    assert (len(data), data.labels.tolist(), data.class_names) == (3, [0, 1, 1], ("cats", "dogs"))
    (tmp_path / "set/loop").symlink_to(tmp_path / "set")
    with pytest.raises(DataError, match="twice, also as loop"):
        load_data(tmp_path / "set")


def test_other_programs_formats_are_refused_and_none_is_started(tmp_path, monkeypatch):
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(DataError, match="no known format"):
        load_data(tmp_path)


def test_pipes_are_refused_at_once(tmp_path):
    for name in ("a.png", "a.npy", "a.idx"):
        os.mkfifo(tmp_path / name)
    for source in (tmp_path, tmp_path / "a.npy", tmp_path / "a.idx"):
        with warnings.catch_warnings(action="ignore"), pytest.raises(DataError, match="not a regular file"):
            load_data(source)  # warns of the .npy in a folder of pictures


def test_pictures_that_are_not_read_are_named(tmp_path):
    save_picture(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    (tmp_path / "b.heic").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"\.heic are not read"):
        assert len(load_data(tmp_path)) == 1


def test_paths_of_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "a.npy", pictures(4, 5))
    assert len(load_data("~/a.npy")) == 4
    for wrong in ("", "a\0b", "~nobody-at-all/x"):
        with pytest.raises(ConfigError, match="source"):
            load_data(wrong)
    with pytest.raises(DataError, match="cannot be read"):
        load_data("x" * 5000)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"text"])
def test_an_unreadable_picture_is_named(tmp_path, content):
    save_picture(tmp_path / "a.png", pictures(2, 2))
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(DataError, match=r"source holds b\.png, which cannot be read as a picture"):
        load_data(tmp_path)


def test_a_truncated_picture_is_named(tmp_path):
    save_picture(tmp_path / "a.png", pictures(32, 32, 3))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"a\.png, which cannot be read"):
        load_data(tmp_path)


def test_a_picture_of_16_bits_is_refused(tmp_path):
    save_picture(tmp_path / "a.png", np.full((2, 2), 60000, np.uint16))
    with pytest.raises(DataError, match=r"a\.png, .* more than 8 bits"):
        load_data(tmp_path, channels=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"channels": 2}, "channels must be 1 or 3 .* got 2"),
        ({"channels": "last"}, "channels must be 1 or 3 .* got 'last'"),
        ({"size": 8}, r"size must be \(height, width\), got 8"),
        ({"size": (8,)}, r"size must be \(height, width\), got \(8,\)"),
        ({"size": (0, 8)}, "size must be an integer .* got 0"),
        ({"size": (8, 8.5)}, "size must be an integer .* got 8.5"),
    ],
)
def test_refused_options_of_a_folder(tmp_path, options, match):
    save_picture(tmp_path / "a.png", pictures(2, 2))
    with pytest.raises(ConfigError, match=match):
        load_data(tmp_path, **options)


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"holds no picture: the formats are \.bmp"):
        load_data(tmp_path)


@pytest.mark.parametrize(("module", "match"), [("sklearn.datasets", "scikit-learn"), ("PIL", "Pillow")])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, module, match):
    save_picture(tmp_path / "a.png", pictures(2, 2))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{match}, which is missing: pip install fastdiff\[demo\]"):
        load_data("digits" if module.startswith("sklearn") else tmp_path)
