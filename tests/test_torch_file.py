"""Tensors out of other libraries' files: the same as torch.load's, and whatever a file asks for, nothing of it happens."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copyreg
import io
import os
import pickle
import resource
import struct
import sys
import time
import types
import zipfile

import fuzz
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastdiff
from fastdiff.errors import CheckpointError, ConfigError, CorruptCheckpointError, FastdiffError
from fastdiff.training import torch_file

UNTYPED = torch.storage._new_dtypes()
ZIP = [True, False]  # torch.save's formats: an archive, and that of before 1.6


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        plain = [each.detach().clone().contiguous().view(-1) for each in (found[name], value)]
        raw = [each.resolve_conj().resolve_neg().view(torch.uint8) if each.numel() else each for each in plain]
        assert torch.equal(*raw), name


def flat(value, prefix=""):
    """The tensors of nested dicts and lists, written apart from what is tested."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    found = {prefix[:-1]: value} if isinstance(value, torch.Tensor) else {}
    for key, each in pairs:
        found |= flat(each, f"{prefix}{key}.")
    return found


def many():
    base = torch.randn(4, 6)
    torch.manual_seed(0)
    kinds = {
        str(dtype).removeprefix("torch."): (torch.rand(2, 3) * 4).to(dtype) for dtype in torch_file.DTYPES.values()
    }
    return {
        "kinds": kinds,
        "views": [base, base.t(), base[1:3, ::2], base[2], base[0, 0], base[:0], base.expand(3, 4, 6), base.diagonal()],
        "empty": [torch.zeros(0), torch.zeros(3, 0, 2), torch.zeros(())],
        "lazy": [torch.randn(3, dtype=torch.complex64).conj(), torch.randn(3, dtype=torch.complex64).conj().imag],
        "last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base),
        "twice": (base, {3: base, True: base[1]}),
    }


@pytest.mark.parametrize("archive", ZIP)
def test_tensors_are_those_of_torch_load(tmp_path, archive):
    path, value = tmp_path / "a.pt", many()
    torch.save(value, path, _use_new_zipfile_serialization=archive)
    found = fastdiff.load_tensors(path)
    same(found, flat(value))
    if not archive:  # torch reads what it writes of others as archives alone
        value["kinds"] = {name: each for name, each in value["kinds"].items() if each.dtype not in UNTYPED}
        torch.save(value, path, _use_new_zipfile_serialization=archive)
    same(fastdiff.load_tensors(path), flat(torch.load(path, weights_only=True)))
    found = fastdiff.load_tensors(path)
    assert list(found) == list(flat(value))
    assert not any(each.requires_grad or each.is_inference() for each in found.values())
    for name, each in flat(value).items():
        assert name == "lazy.1" or found[name].stride() == each.stride(), name  # a lazy negation is done
    assert found["views.6"].untyped_storage().nbytes() == 4 * 24  # expanded without memory
    found["views.0"].fill_(7)
    assert found["views.1"].eq(7).all()
    assert found["parameter"].eq(7).all()
    assert found["twice.1.3"] is found["twice.0"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_of_tensors_and_arrays(tmp_path, protocol):
    arrays = {
        dtype: (np.arange(6).reshape(2, 3) * 40 % 100).astype(dtype)
        for dtype in ("?", "i1", "<i2", ">i4", "=i8", "u1", ">u2", "u4", "<u8", "f2", ">f4", "<f8", "c8", ">c16")
    }
    x = np.arange(24.0).reshape(4, 6)
    arrays |= {"t": x.T, "f": np.asfortranarray(x), "cut": x[::2, 1:], "0-d": np.array(3.0), "none": np.zeros((0, 2))}
    others = {"text": np.array(["a", "b"]), "number": np.float32(3), "when": np.array(["2024-01-01"], "M8[D]")}
    kinds = flat(many())
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"torch": kinds, "numpy": arrays, **others}, protocol))
    found = fastdiff.load_tensors(path)
    wanted = {name: torch.from_numpy(each.astype(each.dtype.newbyteorder("="))) for name, each in arrays.items()}
    same(found, {f"torch.{name}": each for name, each in kinds.items()} | {f"numpy.{k}": v for k, v in wanted.items()})
    found["numpy.0-d"].fill_(1)  # they are the caller's own


def test_safetensors_of_others_and_of_fastdiff(tmp_path):
    values = {"a.w": torch.randn(3, 2), "a.b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(True)}
    save_file(values, tmp_path / "a.safetensors", {"format": "pt"})
    same(fastdiff.load_tensors(tmp_path / "a.safetensors"), values)
    same(fastdiff.load_tensors(tmp_path / "a.safetensors", "a"), {"w": values["a.w"], "b": values["a.b"]})
    net = fastdiff.networks.MLP((2,), hidden=4)
    path = fastdiff.save(fastdiff.ScoreModel(net, "vp", data_shape=(2,)), tmp_path / "m")
    same(fastdiff.load_tensors(path, part="net"), net.state_dict())
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        fastdiff.load_tensors(path)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.norm = torch.nn.BatchNorm2d(2)
        self.tied = self.conv
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("dropped", torch.arange(4.0), persistent=False)
        self.register_parameter("nothing", None)
        self.register_buffer("neither", None)
        self.scale = torch.ones(2)  # an attribute, and in no state_dict

    def forward(self, x):
        return self.norm(self.conv(x))


@contextlib.contextmanager
def vanishing(*classes):
    """A module that is there while a file is written, and gone when it is read."""
    module = types.ModuleType("gone_module")
    for each in classes:
        setattr(module, each.__name__, each)
        each.__module__, each.__qualname__ = "gone_module", each.__name__
    sys.modules["gone_module"] = module
    yield
    del sys.modules["gone_module"]


@pytest.mark.parametrize("archive", ZIP)
def test_a_training_checkpoint_of_someone_else(tmp_path, archive):
    """With arguments, an optimizer's state, random states, averages, objects of classes that are gone."""

    class Config(dict):
        def __init__(self, **values):
            super().__init__(values)
            self.__dict__ = self  # holds itself

    class Average:
        __slots__ = ("decay", "shadow")

    net = torch.nn.DataParallel(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    average = Average()
    average.decay, average.shadow = 0.999, [each.detach() * 2 for each in net.parameters()]
    with vanishing(Config, Average):
        saved = {
            "model": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": [each.detach() + 1 for each in net.parameters()]},
            "args": argparse.Namespace(lr=1e-3, betas=(0.9, 0.99), device=torch.device("cuda:1"), size=torch.Size([3])),
            "config": Config(model=Config(channels=[1, 2]), mean=torch.ones(3)),
            "average": average,
            "counts": collections.defaultdict(list, a=[torch.zeros(1)]),
            "by object": {(1, 2): torch.ones(1), None: torch.ones(2), 1.5: 0},
            "random": [torch.get_rng_state(), np.random.get_state()],
            "set": {1, 2}, "best": np.float64(0.5), "step": 10**30, "name": "x\n", "raw": b"123",
        }  # fmt: skip
        torch.save(saved, tmp_path / "a.ckpt", _use_new_zipfile_serialization=archive)
    found = fastdiff.load_tensors(tmp_path / "a.ckpt")
    wanted = flat({key: saved[key] for key in ("model", "optimizer", "ema", "counts")})
    wanted |= {"config.mean": torch.ones(3), **{f"average.shadow.{i}": each for i, each in enumerate(average.shadow)}}
    wanted |= {"by object.#0": torch.ones(1), "by object.#1": torch.ones(2)}
    wanted |= {"random.0": saved["random"][0], "random.1.1": torch.from_numpy(saved["random"][1][1])}
    same(found, wanted)
    same(fastdiff.load_tensors(tmp_path / "a.ckpt", part="model.module"), net.module.state_dict())
    net.module.load_state_dict(fastdiff.load_tensors(tmp_path / "a.ckpt", part="model.module"))
    assert list(fastdiff.load_tensors(tmp_path / "a.ckpt", part="ema.shadow_params")) == ["0", "1", "2", "3"]


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("way", ["archive", "stream", "pickle"])
def test_a_whole_network_whose_class_is_gone(tmp_path, way):
    with vanishing(Net):
        net = Net()
        wanted = net.state_dict()
        if way == "pickle":
            (tmp_path / "a.pth").write_bytes(pickle.dumps({"ema": net}))
        else:
            torch.save({"ema": net}, tmp_path / "a.pth", _use_new_zipfile_serialization=way == "archive")
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        torch.load(tmp_path / "a.pth", weights_only=False)
    same(fastdiff.load_tensors(tmp_path / "a.pth", part="ema"), wanted)
    Net().load_state_dict(fastdiff.load_tensors(tmp_path / "a.pth", part="ema"))


def _reconstruct_persistent_obj(meta):
    raise AssertionError("never called")


def test_a_network_of_edm(tmp_path, monkeypatch):
    """torch_utils/persistence.py of EDM and StyleGAN: classes are kept as their source, with the state beside it."""
    package = types.ModuleType("torch_utils.persistence")
    monkeypatch.setitem(sys.modules, "torch_utils", package)
    package._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setattr(_reconstruct_persistent_obj, "__module__", "torch_utils.persistence")
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", package)

    class EDMPrecond(Net):
        def __reduce__(self):
            fields = list(super().__reduce__())
            meta = {"type": "class", "version": 6, "module_src": "import os", "class_name": "Net", "state": fields[2]}
            return _reconstruct_persistent_obj, (meta,), None

    outer = EDMPrecond()
    outer.model, outer.sigma_data = EDMPrecond(), 0.5
    raw = pickle.dumps({"ema": outer, "dataset_kwargs": {"path": "x"}})
    monkeypatch.delitem(sys.modules, "torch_utils.persistence")
    (tmp_path / "edm.pkl").write_bytes(raw)
    same(fastdiff.load_tensors(tmp_path / "edm.pkl", part="ema"), outer.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_network(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    torch.jit.trace(module, torch.ones(1, 2)).save(tmp_path / "a.pt")
    same(fastdiff.load_tensors(tmp_path / "a.pt"), module.state_dict())


def test_a_file_without_checksums_and_one_with_a_wrong_one(tmp_path):
    path, value = tmp_path / "a.pt", {"a": torch.arange(1000.0)}
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(value, path)
    finally:
        torch.serialization.set_crc32_options(True)
    same(fastdiff.load_tensors(path), value)
    torch.save(value, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(value["a"].numpy().tobytes()) + 17] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpointError, match="CRC"):
        fastdiff.load_tensors(path)


def test_only_the_part_is_read(tmp_path, monkeypatch):
    torch.save({"a": torch.zeros(10), "b": {"c": torch.ones(5), "d": torch.ones(1)}}, tmp_path / "a.pt")
    sizes, filled = [], torch_file._filled
    monkeypatch.setattr(torch_file, "_filled", lambda source, size: sizes.append(size) or filled(source, size))
    assert list(fastdiff.load_tensors(tmp_path / "a.pt", part="b")) == ["c", "d"]
    assert sizes == [20, 4]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_cannot_be_read_is_said_in_words(tmp_path):
    path = tmp_path / "a.pt"
    for part in ("modl", "mod", "model.", "model.a"):
        torch.save({"model": {"a": torch.ones(1)}, "ema": {"b": torch.ones(1)}, "step": 3}, path)
        with pytest.raises(ConfigError, match=r"they begin with model, ema$"):
            fastdiff.load_tensors(path, part)
    for part in ("", 3, ["model"]):
        with pytest.raises(ConfigError, match="leave it out for all tensors"):
            fastdiff.load_tensors(path, part)
    torch.save({"step": 3}, path)
    with pytest.raises(CorruptCheckpointError, match="holds no tensors"):
        fastdiff.load_tensors(path)
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    for odd in (torch.ones(2).to_sparse(), torch.ones(2, device="meta"), quantized):
        torch.save({"net": {"a": torch.ones(1)}, "odd": odd}, path)
        with pytest.raises(CheckpointError, match=r"'odd', of a kind that is not read .*: choose a part= without it"):
            fastdiff.load_tensors(path)
        assert list(fastdiff.load_tensors(path, "net")) == ["a"]
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.ones(2)}}, path)
    with pytest.raises(CorruptCheckpointError, match=r"two tensors named 'a\.b'"):
        fastdiff.load_tensors(path)
    torch.save(torch.ones(3), path)
    same(fastdiff.load_tensors(path), {"": torch.ones(3)})
    with pytest.raises(FileNotFoundError, match="no file at"):
        fastdiff.load_tensors(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="is a folder: give the path of a file in it"):
        fastdiff.load_tensors(tmp_path)
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    for name, content, words in (
        ("a.npz", None, "torch.save did not write this zip archive"), ("h", b"<html>", "HTML"), ("e", b"", "is empty"),
        ("l", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), ("o", bytes(range(1, 70)), "of no kind"),
    ):  # fmt: skip
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match=words):
            fastdiff.load_tensors(tmp_path / name)


def test_load_names_the_way(tmp_path):
    """Its messages can be followed as they stand."""
    net = torch.nn.Linear(2, 2)
    torch.save({"model": net.state_dict()}, tmp_path / "a.pt")
    torch.save({"model": net.state_dict()}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    save_file({f"model.{name}": each for name, each in net.state_dict().items()}, tmp_path / "c.safetensors")
    for name in ("a.pt", "b.pt", "c.safetensors"):
        long = tmp_path / ("x" * 100) / name
        long.parent.mkdir(exist_ok=True)
        os.replace(tmp_path / name, long)
        words = r"net\.load_state_dict\(fastdiff\.load_tensors\(path, part='...'\)\), then ScoreModel\(net, sde, ...\)$"
        with pytest.raises(CorruptCheckpointError, match=words):
            fastdiff.load(long)
        other = torch.nn.Linear(2, 2)
        other.load_state_dict(fastdiff.load_tensors(long, part="model"))
        assert torch.equal(other.weight, net.weight)


def test_tensors_come_where_torch_makes_them(tmp_path):
    torch.save(many(), tmp_path / "a.pt")
    with torch.device("meta"), torch.inference_mode():
        found = fastdiff.load_tensors(tmp_path / "a.pt")
    assert {each.device.type for each in found.values()} == {"cpu"}
    assert not any(each.is_inference() for each in found.values())


@pytest.mark.gpu
def test_tensors_come_to_the_default_device(tmp_path):
    torch.save(many(), tmp_path / "a.pt")
    with torch.device("cuda"):
        found = fastdiff.load_tensors(tmp_path / "a.pt")
    assert {each.device.type for each in found.values()} == {"cuda"}
    same({name: each.cpu() for name, each in found.items()}, flat(many()))


# --- files that ask for something ---------------------------------------------------------------------------------------------


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def imported(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def raw(value):
    return b"B" + struct.pack("<I", len(value)) + value


TENSOR = pickle.dumps(np.ones(2, "f4"), 2)[2:-1]


def archive(path, pickled, storages=(), method=zipfile.ZIP_STORED, **more):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("a/data.pkl", pickled)
        for name, content in {**{f"data/{i}": each for i, each in enumerate(storages)}, **more}.items():
            file.writestr(f"a/{name}", content)


def stream(pickled, keys=b"]", storages=b""):
    system = b"\x80\x02}" + text("little_endian") + b"\x88s."
    return (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
        + b"\x80\x02M\xe9\x03."
        + system
        + pickled
        + b"\x80\x02"
        + keys
        + b"."
        + storages
    )


def nested(pickled):
    """A storage pickled without torch.save: bytes that torch.load would be given."""
    return imported("torch.storage", "_load_from_bytes") + raw(stream(b"\x80\x02" + pickled + b".")) + b"\x85R"


class Trap:
    """Everything that unpickling calls leaves a file behind."""

    def __new__(cls, *args, **kwargs):
        _sprung()
        return super().__new__(cls)

    def __setstate__(self, state):
        _sprung()

    def __call__(self, *args):
        _sprung()

    append = extend = add = update = __setitem__ = __hash__ = __eq__ = __call__


def _sprung(*args):
    open(Trap.file, "w").close()


SYSTEM = imported("os", "system")
TOUCH = text("touch sprung")
SELF = "test_torch_file"
ASKS = {
    "REDUCE": SYSTEM + TOUCH + b"\x85R",
    "eval": imported("__builtin__", "eval") + text("__import__('os').system('touch sprung')") + b"\x85R",
    "STACK_GLOBAL": text("os") + text("system") + b"\x93" + TOUCH + b"\x85R",
    "INST": b"(" + TOUCH + b"ios\nsystem\n",
    "OBJ": b"(" + SYSTEM + TOUCH + b"o",
    "NEWOBJ": imported(SELF, "Trap") + b")\x81",
    "NEWOBJ_EX": imported(SELF, "Trap") + b")}\x92",
    "BUILD": imported(SELF, "Trap") + b")\x81}b",
    "APPEND": imported(SELF, "Trap") + b")\x81K\1a",
    "SETITEM": imported(SELF, "Trap") + b")\x81K\1K\2s",
    "a key": b"}" + imported(SELF, "Trap") + b")\x81K\2s",
    "in a set": b"\x8f(" + imported(SELF, "Trap") + b")\x81\x90",
    "a call's result": imported("functools", "partial") + SYSTEM + TOUCH + b"\x86R)R",
    "getattr": imported("__builtin__", "getattr") + imported("__builtin__", "__import__") + text("os") + b"\x85R"
    + text("system") + b"\x86R" + TOUCH + b"\x85R",
    "_rebuild_from_type": imported("torch._tensor", "_rebuild_from_type_v2") + b"(" + SYSTEM + SYSTEM + TOUCH + b"\x85NtR",
    "_rebuild_tensor_v2": imported("torch._utils", "_rebuild_tensor_v2") + b"(" + SYSTEM + TOUCH + b"\x85RK\0)))NtR",
    "torch.load": imported("torch.serialization", "load") + b"(" + text("sprung.pt") + b"NNt\x88\x86R",
    "_load_from_bytes": nested(SYSTEM + TOUCH + b"\x85R"),
    "EXT1": b"\x82\xf0" + TOUCH + b"\x85R",
    "EXT2": b"\x83\xf0\0" + TOUCH + b"\x85R",
    "EXT4": b"\x84\xf0\0\0\0" + TOUCH + b"\x85R",
    "persistent id": b"P" + b"sprung\n",
    "persistent object": b"(" + text("storage") + SYSTEM + TOUCH + b"\x85R" + text("0") + text("cpu") + b"K\1tQ",
    "Python's code": imported("marshal", "loads") + raw(b"\xe3") + b"\x85R",
}  # fmt: skip

REFUSED = {"EXT1", "EXT2", "EXT4", "persistent id"}
# not of pickle alone; that of torch.load holds weights only
UNREAL = {"persistent id", "persistent object", "Python's code", "_load_from_bytes", "torch.load"}


@pytest.fixture
def trapped(tmp_path, monkeypatch):
    """The folder in which whatever happens leaves a file, and the events that Python reports meanwhile."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    monkeypatch.setitem(sys.modules, SELF, sys.modules[__name__])
    monkeypatch.setattr(Trap, "file", str(tmp_path / "sprung"), raising=False)
    copyreg.add_extension("os", "system", 0xF0)
    copyreg._extension_cache[0xF0] = os.system
    (tmp_path / "sprung.pt").write_bytes(b"\x80\x02" + ASKS["REDUCE"] + b".")
    yield tmp_path
    copyreg.remove_extension("os", "system", 0xF0)


HEARD: list[tuple[str, object]] = []
LISTENING = [False]


def _listen(event, args):
    if LISTENING[0]:
        HEARD.append((event, args[0] if args else None))


sys.addaudithook(_listen)
EVENTS = {"open", "import", "exec", "compile", "os.system", "pickle.find_class", "marshal.loads", "subprocess.Popen"}


@contextlib.contextmanager
def heard(path):
    """Nothing is called, imported or opened but the file itself."""
    HEARD.clear()
    LISTENING[0] = True
    try:
        yield
    finally:
        LISTENING[0] = False
    # and again by its descriptor
    assert [each for each in HEARD if each[0] in EVENTS and not isinstance(each[1], int)] == [("open", str(path))]


@pytest.mark.parametrize("name", ASKS)
def test_nothing_that_a_file_asks_for_happens(trapped, name):
    ask, sprung = ASKS[name], trapped / "sprung"
    fastdiff.load_tensors(fuzz.seeds(trapped / "seeds")[0])  # what is imported on first use
    for before, after in ((b"", b""), (b"}" + text("a"), b"s"), (b"(", b"l"), (TENSOR + b"(", b"tb")):
        good = text("good") + b"}" + text("x") + TENSOR + b"s"
        body = b"\x80\x02}(" + good + text("bad") + before + ask + after + b"u."
        (trapped / "plain.pkl").write_bytes(body)
        (trapped / "stream.pth").write_bytes(stream(body))
        archive(trapped / "archive.pt", body, [bytes(4)])
        for file in ("plain.pkl", "stream.pth", "archive.pt"):
            with heard(trapped / file), contextlib.suppress(FastdiffError):
                fastdiff.load_tensors(trapped / file)
            with heard(trapped / file):
                if name in REFUSED or (name, file) == ("persistent object", "stream.pth"):
                    with pytest.raises(CorruptCheckpointError):
                        fastdiff.load_tensors(trapped / file, "good")
                else:
                    same(fastdiff.load_tensors(trapped / file, "good"), {"x": torch.ones(2)})
            assert not sprung.exists(), (name, file)


@pytest.mark.parametrize("name", sorted(ASKS.keys() - UNREAL))
def test_the_traps_are_real(trapped, name):
    """What the test above loads springs where it is unpickled."""
    with contextlib.suppress(Exception):
        pickle.loads(b"\x80\x02" + ASKS[name] + b".")
    assert (trapped / "sprung").exists()


# --- files that want too much -------------------------------------------------------------------------------------------------


def tensor(key="0", kind="FloatStorage", count=4, offset=0, shape=(2, 2), strides=(2, 1), more=b""):
    """The call that makes a tensor, with any numbers."""
    values = [pickle.dumps(each, 2)[2:-1] for each in (offset, shape, strides)]
    storage = b"(" + text("storage") + imported("torch", kind) + text(key) + text("cpu")
    storage += pickle.dumps(count, 2)[2:-1] + b"tQ"
    return imported("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"".join(values) + b"\x89Nt" + b"R" + more


BAD = {
    "beyond its storage": tensor(shape=(2, 3)),
    "at a far offset": tensor(offset=1),
    "before its storage": tensor(offset=-1),
    "by strides": tensor(strides=(3, 1)),
    "by negative strides": tensor(offset=3, strides=(-2, -1)),
    "of an empty tensor": tensor(offset=5, shape=(0,), strides=(1,)),
    "of more sizes than strides": tensor(shape=(2, 2, 1)),
    "by a wrap-around": tensor(shape=(2, 2), strides=(2**62, 2**62)),
    "by more numbers than there are": tensor(shape=(2**40, 2**40), strides=(0, 0)),
    "by 10**30": tensor(offset=10**30),
    "by a size that is no number": tensor(shape=("2", 2)),
    "by a size of True": tensor(shape=(True, 2)),
    "with a storage beyond its entry": tensor(count=5),
    "with 2**60 numbers": tensor(count=2**60, shape=(2**60,), strides=(1,)),
    "with a negative storage": tensor(count=-4),
    "with another dtype": tensor(kind="DoubleStorage"),
    "with an unknown dtype": tensor(kind="QInt8Storage"),
    "without its storage": tensor(key="1"),
    "out of the archive": tensor(key="../data.pkl"),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_outside_of_their_storages_are_refused(tmp_path, name):
    archive(tmp_path / "a.pt", b"\x80\x02" + tensor() + b".", [np.arange(4, dtype="f4").tobytes()])
    same(fastdiff.load_tensors(tmp_path / "a.pt"), {"": torch.arange(4.0).view(2, 2)})
    archive(tmp_path / "a.pt", b"\x80\x02" + BAD[name] + b".", [bytes(16)])
    with pytest.raises(CorruptCheckpointError):
        fastdiff.load_tensors(tmp_path / "a.pt")
    body = stream(b"\x80\x02" + BAD[name] + b".", b"]" + text("0") + b"a", struct.pack("<q", 4) + bytes(16))
    (tmp_path / "b.pt").write_bytes(body)
    with pytest.raises(CorruptCheckpointError):
        fastdiff.load_tensors(tmp_path / "b.pt")


def put(number):
    return b"r" + struct.pack("<I", number)


def got(number):
    return b"j" + struct.pack("<I", number)


def laughs(levels, wide, last):
    """Lists of lists, `wide` times the same in each, `levels` deep: as many paths as wide**levels."""
    body = last + put(0)
    for level in range(levels):
        body += b"](" + got(level) * wide + b"e" + put(level + 1)
    return body


DEEP = 100_000
ARRAYS = b"](" + (imported("numpy.core.multiarray", "_reconstruct") + imported("numpy", "ndarray") + b"K\0\x85" + text("b")
    + b"\x87R(K\1J\x40\x42\x0f\0\x85" + imported("numpy", "dtype") + text("u1") + b"\x89\x88\x87R(K\3" + text("|")
    + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89" + got(7) + b"tb") * 2000 + b"e"  # fmt: skip
BOMBS = {
    "a place in the memo": b"]r\xff\xff\xff\x7f",
    "a text of 4 GB": b"X\xff\xff\xff\xff",
    "bytes of 2**62": b"\x8e" + struct.pack("<Q", 2**62),
    "a frame of 2**62": b"\x95" + struct.pack("<Q", 2**62) + b"N",
    "an integer of 2 GB": b"\x8b\xff\xff\xff\x7f",
    "deep lists": b"]" * DEEP + b"a" * (DEEP - 1),
    "deep tuples": b")" + b"\x85" * DEEP,
    "a deep key": b"}" + b")" + b"\x85" * 3 * DEEP + b"K\1s",
    "a deep set": b"\x8f()" + b"\x85" * 3 * DEEP + b"\x90",
    "a deep tensor": TENSOR + b"\x85" * DEEP,
    "deep states": (imported("a", "B") + b")\x81") * DEEP + b"b" * (DEEP - 1),
    "deep parameters": imported("torch._utils", "_rebuild_parameter") * 9000 + TENSOR + b"\x85R" * 9000,
    "a key of many": b"}" + laughs(60, 10, b"N") + b"K\1s",
    "laughs": laughs(100, 10, b"N"),
    "laughs of tuples": b")" + b"0N" + b"2\x86" * 300,
    "laughs at a tensor": laughs(100, 10, TENSOR),
    "long names": laughs(1, 1, b"}" + text("x" * 10**6) + TENSOR + b"s") + (b"q\0}" + text("x" * 10**4) + b"h\0s") * 9000,
    "a million lists": b"(" + b"]" * 1_300_000 + b"l",
    "a list that holds itself": b"]" + put(0) + got(0) + b"a" + TENSOR + b"a",
    "all lists hold each other": b"".join(b"]" + put(i) for i in range(40))
    + b"".join(got(i) + b"(" + b"".join(got(j) for j in range(40)) + TENSOR + b"e" for i in range(40)),
    "one array 2000 times": raw(bytes(10**6)) + put(7) + ARRAYS,
    "arguments of many": b"(" + b"]" * 30_000 + b"t" + put(3) + b"0](" + (imported("a", "b") + got(3) + b"R") * 30_000 + b"e",
    "an integer of many digits": b"L" + b"9" * 10**6 + b"L\n",
    "nested files": nested(nested(nested(b"N"))),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_takes_no_more_than_it_holds(tmp_path, name):
    """Neither memory nor time, whatever it nests or names; and never the interpreter with it."""
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04(" + TENSOR + BOMBS[name] + b"t.")
    with open("/proc/self/status") as status:
        size = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmSize"))
    limits, start = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 30), limits[1]))
        with contextlib.suppress(FastdiffError):
            fastdiff.load_tensors(tmp_path / "a.pkl")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - start < 30


def test_packed_and_overlapping_archives_are_refused(tmp_path):
    path, zeros = tmp_path / "a.pt", bytes(4 * 10**7)
    big = tensor(count=10**7, shape=(10**7,), strides=(1,))
    archive(path, b"\x80\x02" + big + b".", [zeros], zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    with pytest.raises(CorruptCheckpointError, match="compressed"):
        fastdiff.load_tensors(path)
    # a hundred names of one storage's bytes: the same entry again and again in the directory
    many = b"(" + b"".join(tensor(f"{i:02}", count=10**5, shape=(10**5,), strides=(1,)) for i in range(100)) + b"t."
    archive(path, b"\x80\x02" + many, **{f"data/{i:02}": b"" for i in range(1, 100)}, **{"data/00": bytes(4 * 10**5)})
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        whole = next(entry for entry in entries if entry.filename == "a/data/00")
    body = bytearray(path.read_bytes())
    directory = body.index(b"PK\1\2")
    for entry in entries:
        at = body.index(entry.filename.encode(), directory) - 46
        if "data/" in entry.filename:
            body[at + 16 : at + 28] = struct.pack("<3I", whole.CRC, whole.file_size, whole.file_size)
            body[at + 42 : at + 46] = struct.pack("<I", whole.header_offset)
    path.write_bytes(body)
    with pytest.raises(CorruptCheckpointError):
        fastdiff.load_tensors(path)


@pytest.mark.parametrize("order", ["archive", "stream"])
def test_the_other_byte_order_is_refused(tmp_path, order):
    other = "big" if sys.byteorder == "little" else "little"
    if order == "archive":
        archive(tmp_path / "a.pt", b"\x80\x02" + tensor() + b".", [bytes(16)], byteorder=other)
    else:
        whole = io.BytesIO()
        torch.save(torch.ones(2), whole, _use_new_zipfile_serialization=False)
        turned = whole.getvalue().replace(b"little_endianq\2\x88", b"little_endianq\2\x89")
        assert turned != whole.getvalue()
        (tmp_path / "a.pt").write_bytes(turned)
    with pytest.raises(CorruptCheckpointError, match="byte order"):
        fastdiff.load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("way", ["archive", "stream", "pickle"])
def test_truncated_files_are_refused(tmp_path, way):
    value = {"a": torch.arange(5.0), "b": {"c": torch.ones(2, 3), "d": np.arange(3)}, "e": argparse.Namespace(f=3)}
    path = tmp_path / "a.pt"
    if way == "pickle":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=way == "archive")
    whole = path.read_bytes()
    for end in range(0, len(whole), 3 if way != "archive" else 17):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            fastdiff.load_tensors(path)
