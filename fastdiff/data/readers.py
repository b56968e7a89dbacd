"""`load_data`: a Data from arrays, .npy, .npz, IDX files, folders of images, the digits. Never unpickles or downloads."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from .. import checks
from ..errors import ConfigError, DataError, DTypeError, ShapeError
from ..execution.tensor_checks import check_dense
from .data import Data, check_dtype

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# what numpy and zipfile raise over a damaged file
_NUMPY_ERRORS = (
    *(OSError, EOFError, ValueError, SyntaxError, RuntimeError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def load_data(
    source: Any,
    *,
    labels: Any = None,
    range: tuple[float, float] | None = None,
    bins: int | None = None,
    channels: int | str | None = None,
    size: tuple[int, int] | None = None,
) -> Data:
    """A `Data` from an array or a file; `labels`, `range` and `bins` replace those of the source.

    source:
    - a tensor or numpy array [N, *shape]: uint8, float32 or float64. Its shape is left as it is. Read-only,
      negatively strided and byte-swapped arrays are copied;
    - a `Data`: returned as it is, without options;
    - "digits": scikit-learn's 1797 digits [1, 8, 8], 17 levels 0 … 16, 10 classes (for a folder of that name give
      Path("digits"));
    - a .npy file, or a .npz: its array "x", "images", "data" or "x_train", else the only one with two axes or more;
      labels from "y", "labels" or "y_train";
    - an IDX file (MNIST's format), plain or gzipped: [N, H, W] becomes [N, 1, H, W]; int8 and int16 become float32,
      int32 float64; the labels-idx1 file beside an images-idx3 file is its labels;
    - a folder of pictures, at any depth, in the order of their paths; other files and names that begin with a dot
      are skipped. Becomes uint8 [N, C, H, W]. If every picture lies in a subfolder, the first-level subfolders are
      the classes. EXIF rotation is applied, transparency laid on white.

    channels: for arrays "last" moves the last axis to its place after N, "first" says that it is there already (without
        either, uint8 [N, H, W, 1, 3 or 4] is refused), 1 makes [N, H, W] to [N, 1, H, W]. For pictures 1 converts to
        grey, 3 to RGB; by default all must have the same number of channels.
    size: (H, W) to which every picture is stretched, by Pillow's bicubic filter with antialiasing; by default all
        pictures must have the same size.

    Errors: those of `Data`; DataError for a file that is missing, unreadable, truncated or ambiguous; ImportError where
    a source needs a package that is not installed.
    """
    options = {"labels": labels, "range": range, "bins": bins, "channels": channels, "size": size}
    if isinstance(source, Data):
        for name, value in options.items():
            if value is not None:
                raise ConfigError(f"{name} must be None where source is a Data: build a new Data from source.x")
        return source
    raw = _read(source, labels is not None, channels, size)
    return Data(
        raw.x,
        raw.labels if labels is None else labels,
        raw.range if range is None else range,
        raw.bins if bins is None and range is None else bins,
        class_names=raw.class_names if labels is None else (),
    )


class _Raw(NamedTuple):
    x: torch.Tensor
    labels: Any = None
    range: tuple[float, float] | None = None
    bins: int | None = None
    class_names: tuple[str, ...] = ()


def _read(source: Any, has_labels: bool, channels: Any, size: Any) -> _Raw:
    if isinstance(source, (str, os.PathLike)) and source != "digits":
        path = Path(source).expanduser()
        if path.is_dir():
            return _folder(path, channels, size)
        if not path.is_file():
            raise DataError(f'source must be "digits" or the path of a file or folder, got {str(path)!r}: no such file')
    if size is not None:
        raise ConfigError(f"size must be None unless source is a folder of pictures, got {size!r}: leave it out")
    if isinstance(source, torch.Tensor):
        check_dense("source", source)
        return _Raw(_arranged(source, channels))
    if isinstance(source, np.ndarray):
        return _Raw(_arranged(_tensor(source), channels))
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise DTypeError(f"source must be a tensor, numpy array, Data, path or name, got {kind}: use numpy.asarray")
    if source == "digits":
        return _digits(channels)
    if path.suffix.lower() in (".npy", ".npz"):
        array, labels = _numpy_file(path, has_labels)
        return _Raw(_arranged(_tensor(array), channels), labels)
    array = _idx_file(path)
    labels = None if has_labels else _idx_labels(path)
    return _Raw(_arranged(_tensor(array), 1 if array.ndim == 3 and channels is None else channels), labels)


def _arranged(x: torch.Tensor, channels: Any) -> torch.Tensor:
    """x with its channels, if any, right after N."""
    if channels not in (None, "first", "last", 1) or isinstance(channels, bool):
        raise ConfigError(f'channels must be "first", "last" or 1 where source is an array, got {channels!r}')
    if channels == 1:
        if x.ndim != 3:
            raise ShapeError(f"channels=1 needs an array [N, H, W], got {list(x.shape)}: leave it out")
        return x[:, None]
    if channels == "last":
        if x.ndim < 3:
            raise ShapeError(f'channels="last" needs an array [N, …, C], got {list(x.shape)}: leave it out')
        return x.movedim(-1, 1)
    picture = x.ndim == 4 and x.dtype == torch.uint8 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4)
    if channels is None and picture:
        raise ShapeError(
            f'source must not be uint8 [N, H, W, C] without channels=, got {list(x.shape)}: give channels="last" to make it '
            f'[N, C, H, W], or "first" to leave it'
        )
    return x


def _digits(channels: Any) -> _Raw:
    if channels is not None:
        raise ConfigError(
            f'channels must be None for source "digits", which has one channel, got {channels!r}: leave it out'
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('source "digits" needs scikit-learn, which is missing: pip install fastdiff[demo]') from error
    digits = load_digits()
    return _Raw(torch.from_numpy(digits.images.astype(np.uint8)[:, None]), digits.target, (0.0, 16.0), 17)


def _numpy_file(path: Path, has_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            return (loaded, None) if isinstance(loaded, np.ndarray) else _members(path, loaded, has_labels)
    except DataError:
        raise
    except _NUMPY_ERRORS as error:
        raise DataError(
            f"source {path.name} cannot be read as a numpy file without pickle: {_one_line(error)}"
        ) from error


def _members(path: Path, archive: Any, has_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    name = _the_name(path, archive.files, ("x", "images", "data", "x_train"))
    if name is None:
        arrays = [name for name in archive.files if np.ndim(archive[name]) >= 2]
        if len(arrays) != 1:
            names = ", ".join(archive.files) or "nothing"
            raise DataError(
                f"source {path.name} must hold an array named x, or exactly one with two axes or more, got {names}: "
                f"pass the array itself"
            )
        name = arrays[0]
    labels = None if has_labels else _the_name(path, archive.files, ("y", "labels", "y_train"))
    return np.asarray(archive[name]), None if labels is None else np.asarray(archive[labels])


def _the_name(path: Path, names: list[str], candidates: tuple[str, ...]) -> str | None:
    present = [name for name in candidates if name in names]
    if len(present) > 1:
        raise DataError(
            f"source {path.name} must hold only one of {', '.join(candidates)}, got {' and '.join(present)}: "
            f"pass the arrays themselves"
        )
    return present[0] if present else None


def _idx_file(path: Path) -> np.ndarray:
    """The array of an IDX file (LeCun, Cortes & Burges): 0, 0, dtype, rank, big-endian int32 lengths, values."""
    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as stream:
            return _idx_array(path, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"source {path.name} cannot be read: {_one_line(error)}") from error


def _idx_array(path: Path, stream: IO[bytes]) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_DTYPES or not 1 <= magic[3] <= 32:
        raise DataError(
            f"source {path.name} must be a .npy, .npz or IDX file or a folder of pictures, got a file that starts with {magic!r}"
        )
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"source {path.name} is truncated inside its header: download it again")
    shape, dtype = struct.unpack(f">{magic[3]}I", header), np.dtype(_IDX_DTYPES[magic[2]])
    expected, body = math.prod(shape) * dtype.itemsize, bytearray()
    # in pieces, so that a header that announces too much allocates nothing
    while len(body) <= expected and (piece := stream.read(min(expected + 1 - len(body), 1 << 24))):
        body += piece
    if not expected or len(body) != expected:
        what = "has trailing bytes" if len(body) > expected else "is truncated" if expected else "is empty"
        raise DataError(f"source {path.name} {what}, its header {list(shape)} says {expected} bytes: download it again")
    array = np.frombuffer(body, dtype).reshape(shape)
    return array.astype({"i1": "f4", "i2": "f4", "i4": "f8"}.get(dtype.str[1:], dtype.str), copy=False)


def _idx_labels(path: Path) -> np.ndarray | None:
    name = re.sub(r"images([-.])idx3", r"labels\1idx1", path.name.removesuffix(".gz"))
    beside = [path.with_name(name), path.with_name(f"{name}.gz")]
    beside = [file for file in beside if file.is_file()] if "labels" in name and "images" in path.name else []
    return _idx_file(beside[0]) if beside else None


def _folder(root: Path, channels: Any, size: Any) -> _Raw:
    if channels not in (None, 1, 3) or isinstance(channels, bool):
        raise ConfigError(f"channels must be 1 or 3 where source is a folder of pictures, got {channels!r}")
    if size is not None:
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise ConfigError(f"size must be (height, width), got {size!r:.80}")
        size = tuple(checks.integer("size", length, 1, 2**16) for length in size)
    paths = sorted(file.relative_to(root).parts for file in root.rglob("*") if not file.is_dir())
    paths = [parts for parts in paths if Path(parts[-1]).suffix.lower() in _PICTURES]
    paths = [parts for parts in paths if not any(part.startswith(".") for part in parts)]
    if not paths:
        raise DataError(f"source {str(root)!r} holds no picture: the formats are {' '.join(_PICTURES)}")
    first = _picture(root.joinpath(*paths[0]), channels, size)
    x = np.empty((len(paths), *first.shape), np.uint8)
    for i, parts in enumerate(paths):
        picture = _picture(root.joinpath(*parts), channels, size)
        if picture.shape != first.shape:
            option = "size=(H, W)" if picture.shape[1:] != first.shape[1:] else "channels=1 or 3"
            raise ShapeError(
                f"source must hold pictures of one shape, got {list(first.shape)} and {list(picture.shape)} in "
                f"{'/'.join(parts)}: give {option}"
            )
        x[i] = picture
    if any(len(parts) == 1 for parts in paths):
        return _Raw(torch.from_numpy(x))
    names = tuple(sorted({parts[0] for parts in paths}))
    return _Raw(torch.from_numpy(x), [names.index(parts[0]) for parts in paths], class_names=names)


def _picture(file: Path, channels: int | None, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [C, H, W]."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("a folder of pictures needs Pillow, which is missing: pip install fastdiff[demo]") from error
    try:
        with Image.open(file) as opened:
            if opened.mode[0] in "IF":
                raise ValueError(f"mode {opened.mode} has more than 8 bits: load it as a float array")
            image = ImageOps.exif_transpose(opened)
        channels = channels or (1 if image.mode in ("1", "L", "LA") else 3)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
    except (OSError, EOFError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"source holds {file.name}, which cannot be read as a picture: {_one_line(error)}") from error
    if size is not None:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(*image.size[::-1], channels).transpose(2, 0, 1)


def _tensor(array: np.ndarray) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise DataError("x must not be a masked array, as its masked values would be used: fill or drop them")
    check_dtype(array.dtype.name)
    native = array.dtype.newbyteorder("=")
    if not array.flags.writeable or array.dtype != native or any(stride < 0 for stride in array.strides):
        array = np.array(array, dtype=native)
    return torch.from_numpy(array)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
