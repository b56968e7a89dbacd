"""Checkpoints as files: what is no checkpoint, what is hostile, what happens meanwhile; and whole-or-nothing writing."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import struct
import warnings

import fuzz
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff import files
from fastdiff.errors import CheckpointError, ConfigError, CorruptCheckpointError, WriteError
from fastdiff.networks import MLP, UNet
from fastdiff.training import checkpoint

MODEL = {
    "net": {"name": "mlp", "shape": [2], "hidden": 16, "layers": 1}, "process": {"name": "vp"}, "prediction": "eps",
    "time_input": "t", "data_shape": [2], "data_range": [-1, 1], "variance": None,
}  # fmt: skip


def model(net=None):
    return fastdiff.ScoreModel(
        MLP((2,), hidden=16) if net is None else net, "vp", data_shape=net.shape if net else (2,)
    )


def hostile(path, header, tensors=None):
    """A file with any header and a checksum that fits."""
    text = header if isinstance(header, str) else json.dumps(header)
    tensors = {"net.a": torch.zeros(1)} if tensors is None else tensors
    save_file(tensors, path, {"fastdiff": text, "sha256": checkpoint._digest(text, tensors)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "net", [MLP((2,), hidden=16), MLP((3,), time_embedding="sinusoidal"), UNet((1, 4, 4), channels=16)]
)
def test_a_model_comes_back_bit_for_bit_in_its_dtype_and_draws_nothing(tmp_path, net, dtype):
    net = net.to(dtype)
    path, state = fastdiff.save(model(net), tmp_path / "m"), torch.random.get_rng_state()
    got = fastdiff.load(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in net.state_dict().items():
        assert torch.equal(got.net.state_dict()[name], value)
        assert got.net.state_dict()[name].dtype == value.dtype
    x, t = torch.randn(2, *net.shape, dtype=dtype), torch.tensor([0.1, 0.7], dtype=dtype)
    assert torch.equal(got.net(x, t), net.eval()(x, t))
    assert all(p.requires_grad for p in got.net.parameters())
    assert load_file(path).keys() == {f"net.{name}" for name in net.state_dict()}  # the format is safetensors' own


def test_load_in_inference_mode_gives_weights_that_can_be_trained(tmp_path):
    path = fastdiff.save(model(), tmp_path / "m")
    with torch.inference_mode():
        got = fastdiff.load(path)
    assert not any(p.is_inference() for p in got.net.parameters())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"PK\3\4" + bytes(60), r"zip of torch\.save: .*fastdiff\.load_tensors"),
        (b"\x80\2}q\0." + bytes(60), "a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"\n <!DOCTYPE html><html></html>", "HTML"),
        (b"GGUF" + bytes(60), "GGUF"),
        (b"", "empty"),
        (b" \n", "empty"),
        (b'{"a": 1}', "a text file"),
        (b"lr: 1\nema: 0.999\n" * 10, "a text file"),
        (struct.pack("<Q", 2**60) + b"{}", "longer than the file"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, content, words):
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=words):
        fastdiff.load(tmp_path / "m.pth")


def test_safetensors_and_folders_of_other_libraries_are_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {"format": "pt"})
    with pytest.raises(CorruptCheckpointError, match=r"not of fastdiff\.save: .*fastdiff\.load_tensors"):
        fastdiff.load(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"but a\.safetensors: give the path of a file"):
        fastdiff.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="diffusers or another library"):
        fastdiff.load(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000 + "]" * 100_000, '{"format": Infinity}', '{"format": NaN}', '{"format": 0}', '{"format": true}',
     '{"format": ' + "9" * 5000 + "}", "[]", "null", '{"format": 1}', '{"format": 1, "model": []}'],
)  # fmt: skip
def test_hostile_descriptions_are_refused(tmp_path, text):
    hostile(tmp_path / "h.safetensors", text)
    with pytest.raises(CorruptCheckpointError):
        fastdiff.load(tmp_path / "h.safetensors")


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": ENTRY | {"shape": [2**60], "data_offsets": [0, 2**62]}},
        {"a": ENTRY | {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, "b": ENTRY},
        {"a": ENTRY | {"data_offsets": [-8, 0]}},
        {"a": ENTRY | {"shape": [True, 2]}},
        {"a": ENTRY | {"shape": [2.0]}},
        {"a": ENTRY | {"dtype": "F13"}},
        {"a": ENTRY | {"dtype": []}},
        {"a": ENTRY | {"shape": None}},
        {"a": ENTRY | {"more": 1}},
        {"a": ENTRY, "b": ENTRY},
        {"a": 3},
        {"__metadata__": [], "a": ENTRY},
        {"__metadata__": {"fastdiff": 3}, "a": ENTRY},
    ],
)
def test_hostile_headers_are_refused(tmp_path, entries):
    raw = json.dumps({"__metadata__": {"fastdiff": "{}"}, **entries}).encode()
    (tmp_path / "h.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(CorruptCheckpointError, match="not a whole checkpoint"):
        fastdiff.load(tmp_path / "h.safetensors")


@pytest.mark.parametrize(
    "net",
    [
        {"hidden": 100_000, "layers": 1}, {"hidden": 1, "layers": 2**31 - 1}, {"shape": [2**31 - 1] * 2},
        {"name": "unet", "shape": [1, 8, 8], "channels": 2**31 - 1}, {"name": "unet", "shape": [1, 8, 8], "blocks": 10**9},
        {"name": "unet", "shape": [1, 8, 8], "multipliers": [1] * 1000, "blocks": 1},
    ],
)  # fmt: skip
def test_a_file_costs_what_it_holds_whatever_it_asks_for(tmp_path, net):
    base = {k: v for k, v in MODEL["net"].items() if net.get("name", "mlp") == "mlp"}
    hostile(tmp_path / "bomb.safetensors", {"format": 1, "model": MODEL | {"net": base | net}})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        fastdiff.load(tmp_path / "bomb.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # of kilobytes


@pytest.mark.parametrize("save", [True, False])
def test_a_file_that_is_replaced_meanwhile_is_read_as_it_was(tmp_path, monkeypatch, save):
    path = fastdiff.save(model(), tmp_path / "m")
    other = model()
    torch.nn.init.ones_(other.net.out.weight)
    read_header = checkpoint.tensor_file.read_header

    def replaced(handle):
        found = read_header(handle)
        if save:
            fastdiff.save(other, path)  # another file takes its name
        else:
            path.write_bytes(path.read_bytes()[:1000])  # cp, rsync --inplace
        return found

    monkeypatch.setattr(checkpoint.tensor_file, "read_header", replaced)
    if save:
        assert not fastdiff.load(path).net.out.weight.any()
    else:
        with pytest.raises(CorruptCheckpointError, match="shorter"):
            fastdiff.load(path)


def test_writing_and_reading_take_no_memory_beside_the_tensors(tmp_path, monkeypatch):
    """Every piece that is hashed, written or read is a view of a tensor's own memory."""
    pieces = checkpoint.tensor_file._pieces
    seen = []
    monkeypatch.setattr(checkpoint.tensor_file, "_pieces", lambda value: seen.append(value.data_ptr()) or pieces(value))
    kept = model()
    path = fastdiff.save(kept, tmp_path / "m")
    assert set(seen) == {value.data_ptr() for value in kept.net.state_dict().values()}
    seen.clear()
    got = fastdiff.load(path)
    assert set(seen) == {value.data_ptr() for value in got.net.state_dict().values()}


def test_lazily_negated_weights_and_odd_layouts_are_saved_as_their_values(tmp_path):
    net = torch.nn.Module()
    net.register_buffer("a", torch.randn(3, dtype=torch.complex64).conj().imag)  # a lazy negation
    net.register_buffer("b", torch.arange(6.0).view(2, 3).t())
    assert net.a.is_neg()
    path = checkpoint.write(tmp_path / "m", net.state_dict(), {})
    got = checkpoint.read(path, "")[1]
    assert torch.equal(got["a"], net.a.resolve_neg())
    assert torch.equal(got["b"], net.b)
    for wrong in (torch.zeros(2, device="meta"), torch.eye(2).to_sparse(), 3, torch.zeros(2, dtype=torch.complex128)):
        with pytest.raises(ConfigError, match="dense tensors of plain numbers"):
            checkpoint.write(tmp_path / "n", {"a": wrong}, {})
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_paths_of_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    fastdiff.save(model(), "~/m")
    assert (tmp_path / "m.safetensors").exists()
    fastdiff.load("~/m")
    fastdiff.plan("vp", 3).plot("~/table.png")
    data = torch.linspace(-1, 1, 32).view(16, 2)
    fastdiff.train(model(), data, steps=1, batch_size=4, checkpoint="~/run")
    assert {"m.safetensors", "run", "table.png"} <= set(os.listdir(tmp_path))
    assert "~" not in os.listdir(tmp_path)
    calls = [fastdiff.load, lambda p: fastdiff.save(model(), p), lambda p: fastdiff.plan("vp", 3).plot(p),
             lambda p: fastdiff.train(model(), data, steps=1, checkpoint=p)]  # fmt: skip
    for call in calls:
        for wrong in ("", "a\0b", 3, b"x", "~nobody-at-all"):
            with pytest.raises(ConfigError, match=r"must be a path|not known"):
                call(wrong)
    with pytest.raises(CheckpointError, match="too long"):
        fastdiff.load("x" * 5000)
    odd = os.fsdecode(b"\xff\xfe")
    fastdiff.train(model(), data, steps=1, batch_size=4, checkpoint=odd)
    fastdiff.load(odd)


def test_a_file_that_shadows_a_shipped_name_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fastdiff.save(model(), "digits-vp")
    with pytest.warns(UserWarning, match=r"write \./digits-vp"):
        assert fastdiff.load("digits-vp").data_shape == (2,)
    fastdiff.load("./digits-vp")


def test_permission_is_called_permission(tmp_path, monkeypatch):
    path = fastdiff.save(model(), tmp_path / "m")

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "open_regular", denied)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        fastdiff.load(path)
    assert not isinstance(caught.value, CorruptCheckpointError)


# ------------------------------------------------------------------------------------------- whole or not at all


def killed(target):
    with files.replacing(target) as handle:
        handle.write(b"half")
        handle.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_killed_writers_leave_goes_and_what_living_ones_write_stays(tmp_path):
    target = tmp_path / ("x" * 240 + ".npy")  # as long a name as there can be
    target.write_text("old")
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=killed, args=(target,))
        process.start()
        process.join()
    assert len(os.listdir(tmp_path)) == 2  # the second removed what the first left
    with files.replacing(target) as outer:
        outer.write(b"outer")
        files.check_writable("out", target)
        with files.replacing(target) as inner:
            inner.write(b"inner")
        assert target.read_text() == "inner"
    assert target.read_text() == "outer"
    assert os.listdir(tmp_path) == [target.name]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch, code):
    target, fsync = tmp_path / "a", os.fsync

    def refused(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refused)
    if code == errno.EIO:
        with pytest.raises(WriteError, match="it was replaced"):
            _written(target)
    else:
        _written(target)
    assert target.read_bytes() == b"new"


def _written(target):
    with files.replacing(target) as handle:
        handle.write(b"new")


def test_a_failed_write_leaves_the_old_file_its_permissions_and_nothing_else(tmp_path):
    target = tmp_path / "a"
    target.write_text("old")
    target.chmod(0o640)

    def fails(error):
        with files.replacing(target) as handle:
            handle.write(b"new")
            raise error

    with pytest.raises(WriteError, match=r"No space left .*untouched"):
        fails(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(KeyboardInterrupt):
        fails(KeyboardInterrupt())
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
    _written(target)
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files, "_temporary", full)
    steps = []
    with pytest.raises(CheckpointError, match="Read-only"):
        fastdiff.train(model(), np.zeros((4, 2), "f4") + np.eye(4, 2, dtype="f4"), steps=200, batch_size=2,
                       checkpoint=tmp_path / "run", callback=lambda *a: steps.append(a))  # fmt: skip
    assert steps == []


def test_mutants_of_files_raise_only_errors_of_fastdiff(tmp_path):
    assert fuzz.files(seed=1, count=150, folder=tmp_path) == []
    assert fuzz.calls(seed=1, count=200, names=("load", "load_tensors", "load_data")) == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("x.npy", ["sample", "digits-ve", "--steps", "2", "-n", "16", "--out"]),
        ("x.png", ["sample", "digits-ve", "--steps", "2", "-n", "16", "--out"]),
        ("x.png", ["plan", "vp", "5", "--plot"]),
    ],
)
def test_a_full_disk_leaves_the_old_result(tmp_path, monkeypatch, capsys, name, arguments):
    from fastdiff.cli import main

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / name).write_text("the old result")
    monkeypatch.setattr(os, "fsync", full)
    assert main([*arguments, str(tmp_path / name)]) == 2
    assert "untouched" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "the old result"
    assert os.listdir(tmp_path) == [name]
    assert main([*arguments, ""]) == 2
    assert "must be a path" in capsys.readouterr().err


def test_a_default_device_without_memory_changes_nothing():
    wanted = fastdiff.sample("digits-vp", steps=2, num_samples=1)
    with torch.device("meta"):
        model = fastdiff.load("digits-vp")
        found = fastdiff.sample(model, steps=2, num_samples=1)
    assert {value.device.type for value in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("given", "warns"), [(None, False), ((-1.0, 1.0), True)])
def test_a_range_that_nobody_gave_is_no_claim_of_a_loaded_model(tmp_path, given, warns):
    """Samples far outside of a range are warned of where the range was said, before a save as after it."""
    torch.manual_seed(0)
    net = fastdiff.networks.MLP((2,))
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(30).add_(1.0)
    model = fastdiff.ScoreModel(net, "vp", data_shape=(2,), data_range=given)
    fastdiff.save(model, tmp_path / "model.safetensors")
    for each in (model, fastdiff.load(tmp_path / "model.safetensors")):
        assert each.range_given is warns
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fastdiff.sample(each, steps=3, num_samples=8)
        assert any("far outside of data_range" in str(w.message) for w in said) is warns
