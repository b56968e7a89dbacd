"""The safetensors format: a header of JSON, then the tensors' bytes. Read by one descriptor in pieces, never mapped.

    8 bytes, the header's length, little-endian | {"__metadata__": {…}, name: {"dtype", "shape", "data_offsets"}, …} | bytes

Both ways take no memory beside the tensors. A SHA-256 in the metadata covers the description and every tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 1 << 24  # as Python's objects some ten times as much; a network of a thousand tensors has 0.1 MB
PIECE = 1 << 24
SHA = "sha256"


class Entry(NamedTuple):
    """Where a tensor's bytes are in the file, and what they mean."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def write(handle: IO[bytes], tensors: dict[str, Tensor], metadata: dict[str, str], text: str) -> None:
    """The tensors in the format; `text`, the description, is covered by the checksum. Tied tensors are written twice."""
    header: dict[str, Any] = {"__metadata__": {**metadata, SHA: "0" * 64}}
    end = 0
    # the widest first, so that every tensor is aligned
    for name in sorted(tensors, key=lambda name: (-_storable(name, tensors[name]).itemsize, name)):
        value = tensors[name]
        start, end = end, end + value.numel() * value.dtype.itemsize
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    raw = _encoded(header)
    if len(raw) > MAX_HEADER:
        raise ConfigError(
            f"a checkpoint holds descriptions of at most {MAX_HEADER} bytes, got {len(raw)}: too many tensors"
        )
    handle.write(len(raw).to_bytes(8, "little") + raw)
    digest, first = hashlib.sha256(text.encode()), handle.tell()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()
        handle.seek(first + header[name]["data_offsets"][0])
        _announce(digest, name, value.dtype, tuple(value.shape))
        for piece in _pieces(value):
            digest.update(piece)
            handle.write(piece)
    header["__metadata__"][SHA] = digest.hexdigest()  # of the bytes that were written, whatever changed meanwhile
    handle.seek(8)
    handle.write(_encoded(header))


def read_header(handle: IO[bytes]) -> tuple[dict[str, str], dict[str, Entry]]:
    """(metadata, entries); ValueError where the file is not whole or not in the format."""
    size, length = os.fstat(handle.fileno()).st_size, int.from_bytes(handle.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise ValueError("its header is longer than the file or than any of fastdiff's")
    try:
        header = json.loads(handle.read(length).decode(), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("its header is nested too deep") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header is not one of safetensors")
    entries = {name: _entry(fields, 8 + length) for name, fields in header.items()}
    end = 8 + length
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != end:
            raise ValueError("its tensors overlap or leave a hole")
        end = entry.stop
    if end != size:
        raise ValueError(f"it has {size} bytes and its header describes {end}")
    return metadata, entries


def read(
    handle: IO[bytes], entries: dict[str, Entry], text: str, wanted: Callable[[str], bool]
) -> tuple[dict[str, Tensor], str]:
    """(the wanted tensors, the checksum of `text` and of all); ValueError where the file ends early."""
    tensors, digest = {}, hashlib.sha256(text.encode())
    for name in sorted(entries):
        entry = entries[name]
        _announce(digest, name, entry.dtype, entry.shape)
        with torch.inference_mode(False):
            value = torch.empty(entry.shape, dtype=entry.dtype, device="cpu") if wanted(name) else None
        if value is not None:
            tensors[name] = value
        handle.seek(entry.start)
        for piece in _pieces(value) if value is not None else _spare(entry.stop - entry.start):
            if handle.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise ValueError("it became shorter while it was read")
            digest.update(piece)
    return tensors, digest.hexdigest()


def digest(text: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the description and of every tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        _announce(sha, name, value.dtype, tuple(value.shape))
        for piece in _pieces(value):
            sha.update(piece)
    return sha.hexdigest()


def _announce(digest: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    digest.update(f"{name} {dtype} {shape}".encode(errors="surrogatepass"))


def _pieces(value: Tensor) -> list[memoryview]:
    """The bytes of a contiguous CPU tensor, in place, in pieces."""
    if not value.numel():
        return []
    raw = memoryview(value.view(-1).view(torch.uint8).numpy())
    return [raw[start : start + PIECE] for start in range(0, len(raw), PIECE)]


def _spare(size: int) -> list[memoryview]:
    """Room for `size` bytes that nobody keeps: pieces of the same memory."""
    room = memoryview(bytearray(min(size, PIECE)))
    return [room[: min(PIECE, size - start)] for start in range(0, size, PIECE)]


def _storable(name: str, value: Any) -> torch.dtype:
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.dtype not in NAMES:
        kind = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(
            f"a checkpoint holds dense tensors of plain numbers, got {name[:60]!r}, {kind}: convert it first"
        )
    return value.dtype


def _encoded(header: dict[str, Any]) -> bytes:
    raw = json.dumps(header, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("its header names something twice")
    return found


def _entry(fields: Any, offset: int) -> Entry:
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its header does not describe tensors")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= 64 and len(offsets) == 2
    if not lists or not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError("its header describes a tensor of a kind that is not known")
    if not all(type(n) is int and 0 <= n < 2**63 for n in [*shape, *offsets]):
        raise ValueError("its header holds a size that is none")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError("a tensor's shape is not that of its bytes")
    if math.prod(n for n in shape if n) >= 2**63:  # an empty tensor's strides, which must be numbers too
        raise ValueError("its header holds a size that is none")
    return Entry(DTYPES[dtype], tuple(shape), offset + offsets[0], offset + offsets[1])
