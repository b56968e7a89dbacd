"""The tensors of other libraries' files: what torch.save writes and wrote, pickled networks and arrays, safetensors.

A pickle is read as records of what it would do (`pickles`). Of these only what torch and numpy write of a tensor is understood:
where its numbers are in the file, their dtype, shape and strides. So nothing in a file runs, whatever classes it names.
"""

from __future__ import annotations

import io
import math
import os
import sys
import zipfile
from collections.abc import Callable, Iterable
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import files
from ..errors import CheckpointError, ConfigError, CorruptCheckpointError, names_keywords, short
from . import tensor_file
from .checkpoint import foreign, place
from .pickles import OPERATIONS, STORAGE, Record, described

MAGIC = 0x1950A86A20F9469CFC6C  # the number before the pickle in files of torch.save before its version 1.6
NAMES = 1 << 26  # characters of all names, 64 more for each: a million names
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip
DTYPES = {
    str(dtype): dtype for dtype in (*tensor_file.NAMES, torch.complex128, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
}
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
BUFFERS = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")
NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
# what makes bytes of a text, before pickles had them
BYTES = ("_codecs.encode", "builtins.bytes", "builtins.bytearray", "__builtin__.bytes", "__builtin__.bytearray")
OBJECTS = (Record, list, tuple)
LITTLE = sys.byteorder == "little"


@torch.inference_mode(False)
@names_keywords
def load_tensors(path: str | os.PathLike[str], part: str | None = None) -> dict[str, Tensor]:
    """The tensors of a file by their names in it: .pt, .pth, .ckpt, .bin, .pkl or .safetensors of any library. It runs nothing.

    Dicts, lists and objects are flattened with dots, "ema.shadow_params.0"; of a pickled network these are the names of its
    state_dict. Other values are left out. A key that is neither a string nor an integer is "#" and its number; a tensor alone
    has the name "".
    `part`: only the tensors whose names begin with it and a dot, by the names after that. The others' numbers are not read.

    They are where torch's default device is, need no gradient, and share memory where they did. They take no more memory than
    the file has bytes.
    Errors: FileNotFoundError; ConfigError for an unknown part; CheckpointError for tensors that are not dense or of an
    unknown kind; CorruptCheckpointError.
    """
    source = files.path("path", path)
    if part is not None and (not isinstance(part, str) or not part):
        raise ConfigError(f"part must be the beginning of names, got {short(part)}: leave it out for all tensors")
    name = files.shown(source)
    try:
        if source.is_dir():
            raise CheckpointError(f"{name} is a folder: give the path of a file in it")
        with files.open_regular(source) as handle:
            return _read(handle, name, part)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no file at {name}: give the path of a file") from error
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {files.reason(error)}") from error
    except (CheckpointError, ConfigError):
        raise
    except (
        ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, EOFError, RuntimeError, zipfile.BadZipFile
    ) as error:  # fmt: skip
        raise CorruptCheckpointError(f"{name} is not a whole file of tensors: {files.reason(error)}") from error


def _read(handle: IO[bytes], name: str, part: str | None) -> dict[str, Tensor]:
    start, size = handle.read(64), os.fstat(handle.fileno()).st_size
    handle.seek(0)
    if start[4:9] == b"\0\0\0\0{":
        metadata, entries = tensor_file.read_header(handle)
        chosen = _chosen(entries, part, name)
        text = metadata.get("fastdiff")  # its files have a checksum
        if (
            text is not None
            and tensor_file.read(handle, entries, text, set().__contains__)[1] != metadata[tensor_file.SHA]
        ):
            raise ValueError("its checksum does not match")
        return {key: _entry(handle, entries[full]) for key, full in chosen.items()}
    if start.startswith(b"PK"):
        file = _archive(handle, size)
    elif start.startswith(b"\x80"):
        file = _stream(handle, size)
    else:
        raise CorruptCheckpointError(f"{name} is {foreign(start) or 'of no kind that is known to hold tensors'}")
    records, reader = _named(file.root, size), _Reader(file, size, name)
    return {key: reader.tensor(records[full], full) for key, full in _chosen(records, part, name).items()}


def _chosen(names: Iterable[str], part: str | None, file: str) -> dict[str, str]:
    """The names that begin with the part, by what follows it."""
    if not (names := list(names)):
        raise CorruptCheckpointError(f"{file} holds no tensors")
    chosen = {name: name for name in names}
    if part is not None:
        chosen = {name.removeprefix(f"{part}."): name for name in names if name.startswith(f"{part}.")}
    if not chosen:
        tops = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
        raise ConfigError(
            f"part must be the beginning of names in {file}, got {short(part, 30)}: they begin with {tops[:60]}"
        )
    return chosen


class _File(NamedTuple):
    """What a pickle describes, and where the bytes of a storage are: (a handle at their beginning, their number) by its key."""

    root: Any
    opened: Callable[[str], tuple[IO[bytes], int]]


def _archive(handle: IO[bytes], size: int) -> _File:
    """A zip archive of torch.save: FOLDER/data.pkl, and each storage's bytes, as they are, in FOLDER/data/KEY."""
    archive = zipfile.ZipFile(handle)
    entries = {entry.filename: entry for entry in archive.infolist()}
    folder = next((name[:-8] for name in entries if name.endswith("/data.pkl") and name.count("/") == 1), None)
    if folder is None:
        raise ValueError("torch.save did not write this zip archive")

    def opened(name: str) -> tuple[IO[bytes], int]:
        if (entry := entries.get(folder + name)) is None:
            raise ValueError(f"it lacks {name[:40]}")
        if entry.compress_type != zipfile.ZIP_STORED or not entry.compress_size == entry.file_size <= size:
            raise ValueError("its entries are compressed, as torch.save never does")
        if not entry.CRC:  # torch.serialization.set_crc32_options(False); zipfile asks for none where there is none
            del entry.CRC
        return archive.open(entry), entry.file_size

    if folder + "byteorder" in entries and (opened("byteorder")[0].read(9) == b"little") != LITTLE:
        raise ValueError("its numbers have the other byte order")
    text = opened("data.pkl")[0].read()
    return _File(described(io.BytesIO(text), len(text))[0], lambda key: opened(f"data/{key}"))


def _stream(handle: IO[bytes], size: int) -> _File:
    """A pickle; or a file of torch.save before 1.6: number, version, system, pickle, keys, count and bytes of each storage."""
    root, _ = described(handle, size)
    places: dict[str, tuple[int, int]] = {}
    if isinstance(root, int) and root == MAGIC:
        described(handle, size)
        system, _ = described(handle, size)
        if system.get("little_endian") is not LITTLE:
            raise ValueError("its numbers have the other byte order")
        root, storages = described(handle, size)
        types = {key: dtype for key, dtype, _ in (_storage(each) for each in storages if not _is_class(each))}
        keys, _ = described(handle, size)
        at = handle.tell()
        for key in keys:
            handle.seek(at)
            count = int.from_bytes(handle.read(8), sys.byteorder)
            places[key] = at + 8, count * types[_text(key)].itemsize
            at += 8 + places[key][1]
            if at > size:
                raise ValueError("it ends early")

    def opened(key: str) -> tuple[IO[bytes], int]:
        handle.seek(places[key][0])
        return handle, places[key][1]

    return _File(root, opened)


def _is_class(record: Record) -> bool:
    """Whether a record of data outside of the pickle is that of a network's class with its source, as torch once wrote."""
    return bool(record.args) and isinstance(record.args[0], str) and record.args[0] == "module"


def _storage(record: Record) -> tuple[str, torch.dtype, int]:
    """(key, dtype, count) of a storage's record: ("storage", class, key, device, count), in older files also None."""
    if record.name != STORAGE or len(record.args) < 5 or any(each is not None for each in record.args[5:]):
        raise ValueError("it holds a storage of a kind that is not known")
    kind, key, _, count = record.args[1:5]
    if type(count) is not int:
        raise ValueError("it holds a storage without a size")
    return _text(key), STORAGES[kind.name.rpartition(".")[2]], count


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("it holds a name that is no text")
    return value


def _bytes(value: Any) -> bytes:
    """Bytes, as pickles of any protocol have them: themselves, a text of these characters, or a call that makes them of one."""
    if isinstance(value, Record) and value.name in BYTES:
        value = value.args[0] if value.args else b""
    if isinstance(value, str):
        return value.encode("latin-1")
    if not isinstance(value, (bytes, bytearray)):
        raise ValueError("it lacks an array's numbers")
    return value


class _Reader:
    """Tensors of a file's records. Each storage is read once, and no more bytes than the file has."""

    def __init__(self, file: _File, size: int, name: str) -> None:
        self.file, self.left, self.name = file, size, name
        self.storages: dict[str, Tensor] = {}
        self.pickled: dict[int, tuple[Tensor, Record]] = {}
        self.made: dict[int, Tensor] = {}

    def tensor(self, record: Record, name: str) -> Tensor:
        if id(record) not in self.made:
            self.made[id(record)] = self.make(record, name)
        return self.made[id(record)]

    def make(self, record: Record, name: str) -> Tensor:
        for _ in range(3):  # a parameter, of a tensor with attributes, of a tensor
            kind, args = record.name.rpartition(".")[2], record.args
            if kind in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
                record = args[0]
            elif kind in ("_rebuild_from_type", "_rebuild_from_type_v2"):
                record = Record(args[0].name, args[2])
        if record.name in (*ARRAYS, *BUFFERS):
            return self.array(record, name)
        if kind in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            raw, dtype = self.storage(args[0])
        elif kind == "_rebuild_tensor_v3" and args[6].name in DTYPES:
            (raw, _), dtype = self.storage(args[0]), DTYPES[args[6].name]
        else:
            raise self.unknown(name, kind)
        value = _view(raw, dtype, *args[1:4])
        bits = args[-1] if isinstance(args[-1], Record) else Record("dict")  # {"conj": True} where it is lazily so
        value = value.conj() if bits.get("conj") is True else value
        return value.neg() if bits.get("neg") is True else value

    def storage(self, record: Record) -> tuple[Tensor, torch.dtype]:
        """(bytes, dtype) of a storage: in the file, or, of a tensor that was pickled without torch.save, in the pickle."""
        if record.name != "torch.storage._load_from_bytes":
            key, dtype, count = _storage(record)
            if key not in self.storages:
                self.spend(count * dtype.itemsize)
                self.storages[key] = _filled(*self.file.opened(key))
            raw = self.storages[key]
        else:
            if id(record) not in self.pickled:
                text = _bytes(record.args[0])  # a file of torch.save, with nothing but the storage
                self.spend(len(text))
                file = _stream(io.BytesIO(text), len(text))
                self.pickled[id(record)] = _filled(*file.opened(_storage(file.root)[0])), file.root
            raw, root = self.pickled[id(record)]
            _, dtype, count = _storage(root)
        if len(raw) != count * dtype.itemsize:
            raise ValueError("a storage's size is not that of its bytes")
        return raw, dtype

    def array(self, record: Record, name: str) -> Tensor:
        if record.name in ARRAYS:
            _, shape, kind, fortran, text = record.state
            order = "F" if fortran is True else "C"
        else:
            text, kind, shape, order = record.args
        code, ends = _text(kind.args[0]), _text(kind.state[1])
        if code not in NUMBERS or ends not in ("<", ">", "|", "="):
            raise self.unknown(name, f"numbers of {code}")
        value = np.ndarray(_sizes(shape), np.dtype(ends + code), _bytes(text), order=_text(order))
        self.spend(value.nbytes)
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="))).to(place())

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ValueError("its tensors have more bytes than the file")

    def unknown(self, name: str, kind: str) -> CheckpointError:
        return CheckpointError(
            f"{self.name} holds {name[:60]!r}, of a kind that is not read ({kind[:40]}): choose a part= without it"
        )


def _entry(handle: IO[bytes], entry: tensor_file.Entry) -> Tensor:
    """A tensor of a safetensors file."""
    handle.seek(entry.start)
    return _filled(handle, entry.stop - entry.start).view(entry.dtype).view(entry.shape)


def _filled(source: IO[bytes], size: int) -> Tensor:
    """The next bytes, on torch's default device."""
    value = torch.empty(size, dtype=torch.uint8, device="cpu")
    raw = memoryview(value.numpy())
    for start in range(0, size, tensor_file.PIECE):
        piece = raw[start : start + tensor_file.PIECE]
        if source.readinto(piece) != len(piece):  # type: ignore[attr-defined]
            raise ValueError("it ends early")
    return value.to(place())


def _view(raw: Tensor, dtype: torch.dtype, offset: Any, shape: Any, strides: Any) -> Tensor:
    """A tensor within a storage's bytes; ValueError for one that is not."""
    shape, strides, (offset,) = _sizes(shape), _sizes(strides), _sizes((offset,))
    numbers = raw[: len(raw) - len(raw) % dtype.itemsize].view(dtype)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (last if math.prod(shape) else offset - 1) >= len(numbers):
        raise ValueError("a tensor's numbers are outside of its storage")
    return numbers.as_strided(shape, strides, offset)


def _sizes(value: Any) -> tuple[int, ...]:
    value = value.args[0] if isinstance(value, Record) else value  # torch.Size
    if not isinstance(value, tuple) or len(value) > 64 or not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise ValueError("it holds a size that is none")
    if math.prod(n for n in value if n) >= 2**63:
        raise ValueError("it holds a size that is none")
    return value


def _named(root: Any, size: int) -> dict[str, Record]:
    """The tensors by their names, in the file's order; a tensor that is held twice has two.

    The time is bounded by the file, however its objects hold each other: what leads to no tensor is not gone through again, and
    the names of what does are bounded. An object that holds itself ends there.
    """
    if _is_tensor(root):
        return {"": root}
    parts = _leading(root, size)
    found: dict[str, Record] = {}
    room = NAMES
    path, above = [("", id(root), iter(parts.get(id(root), ())))], {id(root)}
    while path:
        prefix, here, rest = path[-1]
        name, node = next(rest, (None, None))
        if node is None:
            path.pop()
            above.discard(here)
            continue
        name = prefix if name is None else f"{prefix}.{name}" if prefix else name
        room -= 64 + len(name)
        if room < 0:
            raise ValueError("its objects hold each other in too many ways")
        if not parts[id(node)]:
            if found.setdefault(name, node) is not node:
                raise ValueError(f"it holds two tensors named {name[:60]!r}")
        elif id(node) not in above:
            path.append((name, id(node), iter(parts[id(node)])))
            above.add(id(node))
    return found


def _leading(root: Any, size: int) -> dict[int, list[tuple[str | None, Any]]]:
    """By its id, the parts of each object that lead to tensors; of a tensor none. Each object is looked at once."""
    room = 2 * (OPERATIONS + size // 16)  # pairs
    parts: dict[int, list[tuple[str | None, Any]]] = {}
    owners: dict[int, list[int]] = {}
    todo, reached = [root], []
    while todo:
        node = todo.pop()
        if id(node) in parts:
            continue
        parts[id(node)] = []
        if _is_tensor(node):
            reached.append(id(node))
            continue
        pairs = _parts(node)
        room -= len(pairs)
        if room < 0:
            raise ValueError("its objects hold each other in too many ways")
        parts[id(node)] = [pair for pair in pairs if isinstance(pair[1], OBJECTS)]
        for _, child in parts[id(node)]:
            owners.setdefault(id(child), []).append(id(node))
            todo.append(child)
    leading = set(reached)
    while reached:
        new = [owner for owner in owners.get(reached.pop(), ()) if owner not in leading]
        leading.update(new)
        reached += new
    return {key: [pair for pair in parts[key] if id(pair[1]) in leading] for key in leading}


def _parts(node: Any) -> list[tuple[str | None, Any]]:
    """(name, value) of what an object holds; None for what adds no name: its state, its only argument.

    What others may hold too, as a tuple of arguments, is one pair, so that all pairs are hardly more than the file has.
    """
    if not isinstance(node, Record):
        return [(str(i), value) for i, value in enumerate(node) if isinstance(value, OBJECTS)]
    buffers, modules, state = node.get("_buffers"), node.get("_modules"), node.get("state")
    if isinstance(buffers, Record) and isinstance(modules, Record):  # of a torch.nn.Module: the names of its state_dict
        left_out = node.get("_non_persistent_buffers_set") or []
        left_out = left_out.args[0] if isinstance(left_out, Record) else left_out  # set([...])
        if len(left_out) > len(buffers.items):
            raise ValueError("it holds a network without some of its buffers")
        names = {name for name in left_out if isinstance(name, str)}
        kept = [(name, None if name in names else value) for name, value in buffers.items if isinstance(name, str)]
        return [(None, node.get("_parameters")), *kept, (None, modules)]
    if state is not None and node.get("module_src") is not None:  # of EDM and StyleGAN: the source, and what it makes
        return [(None, state)]
    # of a key that is there twice, the last
    items = {key if isinstance(key, (str, int)) else (i,): value for i, (key, value) in enumerate(node.items)}
    own = [(f"#{key[0]}" if isinstance(key, tuple) else f"{key}", each) for key, each in items.items()]
    args = node.args[0] if node.args and len(node.args) == 1 else node.args
    slots = isinstance(node.state, tuple) and len(node.state) == 2  # the attributes, and those in slots
    states = node.state if slots else (node.state,)
    return [*(pair for pair in own if isinstance(pair[1], OBJECTS)), (None, args), *((None, each) for each in states)]


def _is_tensor(node: Any) -> bool:
    """Whether a record makes a tensor or an array of numbers; an array of texts or objects is like any other object."""
    if not isinstance(node, Record) or not node.args:
        return False
    if node.name in (*ARRAYS, *BUFFERS):
        fields = node.args[1:2] if node.name in BUFFERS else node.state[2:3] if isinstance(node.state, tuple) else ()
        codes = [each.args[0] for each in fields if isinstance(each, Record) and each.args]
        return any(isinstance(code, str) and code.startswith(("b", "i", "u", "f", "c")) for code in codes)
    return node.name.startswith("torch.") and node.name.rpartition(".")[2].startswith("_rebuild")
