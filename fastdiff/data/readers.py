"""`load_data`: a Data from arrays, .npy, .npz, IDX files, folders of images, the digits. Never unpickles or downloads."""

from __future__ import annotations

import builtins
import contextlib
import functools
import gzip
import itertools
import math
import os
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from .. import checks, files
from ..errors import ConfigError, DataError, DTypeError, FastdiffError, ShapeError, names_keywords, short, warn
from ..execution.tensor_checks import check_dense
from .data import Data, check_dtype
from .lazy import LazyData, Pictures

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".apng", ".ppm", ".tif", ".tiff", ".webp")
# what Pillow may take a file for, whatever its name: others start programs (PostScript) or read other files
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_NOT_READ = (".avif", ".eps", ".heic", ".heif", ".ico", ".jp2", ".jxl", ".npy", ".npz", ".psd", ".svg", ".tga")
_TEXTS = (".csv", ".tsv", ".txt")
_MOST_PACKED = 1100  # deflate's largest ratio is 1032
# what numpy and zipfile raise over a damaged file
_NUMPY_ERRORS = (
    *(OSError, EOFError, ValueError, TypeError, SyntaxError, RuntimeError, MemoryError, ArithmeticError, LookupError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error, struct.error),
)


@names_keywords
def load_data(
    source: Any,
    *,
    labels: Any = None,
    range: tuple[float, float] | None = None,
    bins: int | None = None,
    channels: int | str | None = None,
    size: tuple[int, int] | None = None,
    cond: Any = None,
    lazy: bool = False,
    workers: int = 0,
    num_classes: int | None = None,
) -> Data | LazyData:
    """A `Data` from an array or a file; `labels` (or a .npy or IDX file of them), `range`, `bins` and `cond` (a condition of each
    sample, or a .npy file of them) replace the source's.

    source:
    - a tensor or numpy array [N, *shape]: uint8, float32 or float64. Its shape is left as it is. Read-only,
      negatively strided and byte-swapped arrays are copied;
    - a `Data`: returned as it is, without options;
    - a `torch.utils.data.Dataset`: becomes a `LazyData`, with `workers` processes that read ahead;
    - "digits": scikit-learn's 1797 digits [1, 8, 8], 17 levels 0 … 16, 10 classes (for a folder of that name give
      Path("digits"));
    - a .npy file, or a .npz: its array "x", "images", "data" or "x_train", else the only one with two axes or more;
      labels from "y", "labels" or "y_train", conditions from "cond"; a warning names the arrays that are left out;
    - an IDX file (MNIST's format), plain or gzipped: [N, H, W] becomes [N, 1, H, W]; int8 and int16 become float32,
      int32 float64; the labels-idx1 file beside an images-idx3 file is its labels;
    - a folder of pictures, at any depth and through links, in the order of their paths; other files and names that begin
      with a dot are skipped. Becomes uint8 [N, C, H, W]. If every picture lies in a subfolder, the first-level subfolders
      are the classes. Each frame of a TIFF stack, a GIF, WebP or PNG animation is a sample. EXIF rotation is applied,
      transparency laid on white; more than 8 bits a channel are refused.

    channels: for arrays "last" moves the last axis to its place after N, "first" says that it is there already (without
        either, uint8 [N, H, W, 1, 3 or 4] is refused), 1 makes [N, H, W] to [N, 1, H, W]. For pictures 1 converts to
        grey, 3 to RGB; by default all must have the same number of channels.
    lazy: for more than memory holds. A .npy file is mapped into memory and read as it is asked for; a folder of pictures becomes
        a `LazyData`, whose pictures are decoded as they are asked for, by `workers` processes ahead, which imply `lazy`.
    size: (H, W) to which every picture is stretched, by Pillow's bicubic filter with antialiasing; by default all
        pictures must have the same size.

    Errors: those of `Data`; DataError for a file that is missing, unreadable, truncated or ambiguous; ImportError where
    a source needs a package that is not installed.
    """
    options = {"labels": labels, "range": range, "bins": bins, "channels": channels, "size": size, "cond": cond}
    lazy, workers = checks.flag("lazy", lazy), checks.integer("workers", workers, 0, 1024)
    if isinstance(source, Dataset):
        for name in ("labels", "channels", "size", "cond"):
            if options[name] is not None:
                raise ConfigError(f"{name} must be None where source is a Dataset: put it into the dataset's items")
        return LazyData(source, range=range, bins=bins, num_classes=num_classes, workers=workers)
    if num_classes is not None:
        raise ConfigError(
            f"num_classes={num_classes} is of a Dataset, got another source: leave it out, or give Data(...)"
        )
    if lazy or workers:
        return _lazy(source, options, workers)
    if isinstance(source, (Data, LazyData)):
        for name, value in options.items():
            if value is not None:
                raise ConfigError(f"{name} must be None where source is a Data: build a new Data from source.x")
        return source
    if isinstance(labels, (str, os.PathLike)):
        labels = _labels(files.path("labels", labels))
    if isinstance(cond, (str, os.PathLike)):
        cond = _conditions(files.path("cond", cond))
    raw = _read(source, labels is not None, channels, size)
    return Data(
        raw.x,
        raw.labels if labels is None else labels,
        raw.range if range is None else range,
        raw.bins if bins is None and range is None else bins,
        class_names=raw.class_names if labels is None else (),
        cond=raw.cond if cond is None else cond,
    )


def load_beside(name: str, source: Any, data: Data | LazyData, **options: Any) -> Data | LazyData:
    """A source in the units of `data`: with their range and levels, and their numbers of the classes that folders name.

    Values beyond that range get the range that holds both. A `Data`, a `LazyData` and a Dataset say their own, and stay as they
    are. name is the argument's, options are load_data's. Errors: those of `load_data`.
    """
    if isinstance(source, (Data, LazyData, Dataset)):
        return load_data(source, **options)
    try:
        with warnings.catch_warnings():  # of a range that is not taken
            warnings.filterwarnings("ignore", message="x holds floats", category=UserWarning)
            found = load_data(source, **options)
    except (DataError, ShapeError, DTypeError) as error:
        raise type(error)(f"{name}: {error}") from error
    if isinstance(found, LazyData):
        return found
    (low, high), ends = data.range, [end.item() for end in found.x.aminmax()]  # type: ignore[misc]
    classes = {}
    known = data.some.class_names if isinstance(data, LazyData) else data.class_names
    if found.labels is not None and known and found.class_names:
        new = [each for each in found.class_names if each not in known]
        if new:
            raise DataError(
                f"{name} must have the classes of the data, {', '.join(known):.60}, got "
                f"{files.shown(new[0])}: move that folder away"
            )
        number = torch.tensor([known.index(each) for each in found.class_names])
        classes = {"labels": number[found.labels], "class_names": known, "num_classes": len(known)}
    try:
        return replace(found, range=(min(low, ends[0]), max(high, ends[1])), bins=data.bins, **classes)
    except DataError as error:
        raise DataError(f"{name}, in the units of the data: {error}") from error


def _lazy(source: Any, options: dict[str, Any], workers: int) -> Data | LazyData:
    """load_data(lazy=True)."""
    path = Path(source) if isinstance(source, (str, os.PathLike)) else None
    if path is not None and path.is_dir():
        if options["labels"] is not None or options["cond"] is not None:
            raise ConfigError(
                "labels and cond must be None for a folder that is read lazily: sort it in a folder for each class"
            )
        return _lazy_folder(path, options["channels"], options["size"], options["range"], options["bins"], workers)
    if workers and not isinstance(source, LazyData):
        raise ConfigError(
            f"workers={workers} read a folder of pictures or a torch.utils.data.Dataset ahead, got {short(source)}: leave it out"
        )
    if path is None or path.suffix.lower() != ".npy":
        raise ConfigError(
            f"lazy=True is for a .npy file, a folder of pictures and a torch.utils.data.Dataset, got {short(source)}: leave "
            "it out, or write a .npy file"
        )
    with _opened(path, " as a .npy file without pickle") as stream:
        shape, fortran, dtype = _npy_header(stream)
        offset = stream.tell()
        if dtype.hasobject or offset + math.prod(shape) * dtype.itemsize != os.fstat(stream.fileno()).st_size:
            raise ValueError("it holds Python objects, or is not as long as its header says")
    check_dtype(dtype.newbyteorder("=").name)
    if not dtype.isnative:
        raise DTypeError(
            f"source {files.shown(path)} has the byte order of other machines, which cannot be mapped: write it again with "
            f"numpy's astype({dtype.newbyteorder('=').name!r})"
        )
    if fortran:
        raise DataError(
            f"source {files.shown(path)} is in Fortran's order, which cannot be mapped: write it in C order"
        )
    # copy-on-write, so that nothing can be written to the file
    mapped = np.memmap(path, dtype, "c", offset, shape)
    return load_data(torch.from_numpy(mapped), **options)


def _lazy_folder(
    root: Path, channels: Any, size: Any, range: tuple[float, float] | None, bins: int | None, workers: int
) -> LazyData:
    channels, size = _picture_options(channels, size)
    paths = _pictures_in(root)
    counts = [_frames(root.joinpath(*parts)) for parts in paths]
    frames = [(root.joinpath(*parts), k, count) for parts, count in zip(paths, counts) for k in builtins.range(count)]
    names, numbers = _classes_of(paths, counts)
    reader = functools.partial(_picture, channels=channels, size=size)
    return LazyData(Pictures(reader, frames, numbers), range=range, bins=bins, class_names=names, workers=workers)


def _picture(file: Path, frame: int, count: int, channels: int | None, size: tuple[int, int] | None) -> np.ndarray:
    """One frame of a file."""
    return next(itertools.islice(_pictures(file, count, channels, size), frame, None))


class _Raw(NamedTuple):
    x: torch.Tensor
    labels: Any = None
    range: tuple[float, float] | None = None
    bins: int | None = None
    class_names: tuple[str, ...] = ()
    cond: np.ndarray | None = None


def _read(source: Any, has_labels: bool, channels: Any, size: Any) -> _Raw:
    if isinstance(source, (str, os.PathLike)) and source != "digits":
        path = files.path("source", source)
        try:
            if path.is_dir():
                return _folder(path, channels, size)
            if not path.exists():
                raise DataError(
                    f'source must be "digits" or the path of a file or folder, got {files.shown(path)!r}: no such file'
                )
        except OSError as error:
            raise DataError(f"source {files.shown(path)} cannot be read: {files.reason(error)}") from error
    if size is not None:
        raise ConfigError(f"size must be None unless source is a folder of pictures, got {short(size)}: leave it out")
    if isinstance(source, torch.Tensor):
        check_dense("source", source)
        return _Raw(_arranged(source, channels))
    if isinstance(source, np.ndarray):
        return _Raw(_arranged(_tensor(source), channels))
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise DTypeError(f"source must be a tensor, numpy array, Data, path or name, got {kind}: use numpy.asarray")
    if source == "digits":
        if os.path.exists("digits"):
            warn(
                "source 'digits' is scikit-learn's, and there is also a file or folder digits here: write ./digits for that"
            )
        return _digits(channels)
    if path.suffix.lower() in (".npy", ".npz"):
        array, labels, cond = _numpy_file(path, has_labels)
        return _Raw(_arranged(_tensor(array), channels), labels, cond=cond)
    array = _idx_file(path)
    labels = None if has_labels else _idx_labels(path)
    return _Raw(_arranged(_tensor(array), 1 if array.ndim == 3 and channels is None else channels), labels)


def _labels(path: Path) -> np.ndarray:
    """The class numbers [N] in a .npy or IDX file."""
    if not os.path.isfile(path):  # False too for a name that no file can have
        raise DataError(
            f"labels must be class numbers, or a .npy or IDX file of them, got {files.shown(path)}: no such file"
        )
    return _numpy_file(path, True)[0] if path.suffix.lower() == ".npy" else _idx_file(path, "labels")


def _conditions(path: Path) -> np.ndarray:
    """The conditions [N, *cond_shape] in a .npy file."""
    if not os.path.isfile(path):
        raise DataError(f"cond must be an array or a .npy file of one, got {files.shown(path)}: no such file")
    return read_array(path)


def _one_of(value: Any, valid: tuple[Any, ...]) -> bool:
    """Whether a value is one of these, and no array or tensor, whose equality is many."""
    return (value is None or isinstance(value, (str, int))) and not isinstance(value, bool) and value in valid


def _arranged(x: torch.Tensor, channels: Any) -> torch.Tensor:
    """x with its channels, if any, right after N."""
    if not _one_of(channels, (None, "first", "last", 1)):
        raise ConfigError(f'channels must be "first", "last" or 1 where source is an array, got {short(channels)}')
    if channels == 1:
        if x.ndim != 3:
            raise ShapeError(f"channels=1 needs an array [N, H, W], got {list(x.shape)}: leave it out")
        return x[:, None]
    if channels == "last":
        if x.ndim < 3:
            raise ShapeError(f'channels="last" needs an array [N, …, C], got {list(x.shape)}: leave it out')
        return x.movedim(-1, 1)
    picture = x.ndim == 4 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4)
    if channels is None and picture and x.dtype != torch.uint8:
        warn(
            f'source {list(x.shape)} is taken as samples of {x.shape[1]} channels: give channels="last" if these are '
            f'pictures [N, H, W, C], or "first" if they are not'
        )
    elif channels is None and picture:
        raise ShapeError(
            f'source must not be uint8 [N, H, W, C] without channels=, got {list(x.shape)}: give channels="last" to make it '
            f'[N, C, H, W], or "first" to leave it'
        )
    if channels is None and x.ndim == 3 and min(x.shape[1:]) > 4:
        warn(
            f"source {list(x.shape)} is taken as signals of {x.shape[1]} channels: give channels=1 if these are pictures "
            f'[N, H, W], or "first" if they are not'
        )
    return x


def _digits(channels: Any) -> _Raw:
    if channels is not None:
        raise ConfigError(
            f'channels must be None for source "digits", which has one channel, got {short(channels)}: leave it out'
        )
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('source "digits" needs scikit-learn, which is missing: pip install fastdiff[demo]') from error
    digits = load_digits()
    return _Raw(torch.from_numpy(digits.images.astype(np.uint8)[:, None]), digits.target, (0.0, 16.0), 17)


@contextlib.contextmanager
def _opened(path: Path, what: str) -> Iterator[IO[bytes]]:
    """The file, and a DataError for whatever its contents make numpy, zipfile and gzip raise."""
    try:
        with files.open_regular(path) as stream:
            yield stream
    except FastdiffError:
        raise
    except _NUMPY_ERRORS as error:
        raise DataError(f"source {files.shown(path.name)} cannot be read{what}: {files.reason(error)}") from error


def _numpy_file(path: Path, has_labels: bool) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The array of a .npy or .npz file, and its labels and conditions."""
    with _opened(path, " as a numpy file without pickle") as stream:
        if not _packed(stream):
            return _npy(stream, os.fstat(stream.fileno()).st_size), None, None
        with zipfile.ZipFile(stream) as archive:
            return _members(path, archive, has_labels)


def read_array(path: Path) -> np.ndarray:
    """The array of a .npy file of numbers, or of a .npz file that holds one."""
    with _opened(path, " as a numpy file without pickle") as stream:
        array = _only(stream)
        if array.dtype.kind not in "biuf":
            raise ValueError(f"it holds {array.dtype}, not numbers")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _packed(stream: IO[bytes]) -> bool:
    """Whether it is a .npz file."""
    start = stream.read(2)
    stream.seek(0)
    return start == b"PK"


def _only(stream: IO[bytes]) -> np.ndarray:
    if not _packed(stream):
        return _npy(stream, os.fstat(stream.fileno()).st_size)
    with zipfile.ZipFile(stream) as archive:
        names = _names(archive)
        if len(names) != 1:
            listed = ", ".join(names) or "none"
            raise ValueError(f"it must hold one array, and has {listed:.60}: save one alone by numpy.save")
        return _member(archive, names[0])


def read_picture(path: Path, channels: int) -> np.ndarray:
    """A picture as uint8 [C, H, W], grey or RGB."""
    return _picture(path, 0, 1, channels, None)


def _npy(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of a .npy file of `size` bytes, which its header must describe to the byte."""
    shape, fortran, dtype = _npy_header(stream)
    expected = math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if min(shape, default=0) < 0 or stream.tell() + expected != size:
        raise ValueError(f"its header {list(shape)} says {expected} bytes, and {size - stream.tell()} follow")
    body = bytearray(expected)
    view, done = memoryview(body), 0
    while done < expected and (piece := stream.read(min(expected - done, 1 << 24))):
        view[done : done + len(piece)] = piece
        done += len(piece)
    if done != expected or stream.read(1):
        raise ValueError("it is truncated or has trailing bytes")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format is not one that numbers have")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)  # type: ignore[no-untyped-call]
    return tuple(int(length) for length in shape), bool(fortran), dtype


def _member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > _MOST_PACKED * info.compress_size + 1024:
        raise ValueError(f"{name[:40]} announces more than its {info.compress_size} bytes can hold")
    with archive.open(info) as stream:
        return _npy(stream, info.file_size)


def _names(archive: zipfile.ZipFile) -> list[str]:
    """Of the arrays in it."""
    infos = archive.infolist()
    names = [info.filename.removesuffix(".npy") for info in infos if info.filename.endswith(".npy")]
    if len(set(names)) != len(names):
        raise ValueError("it names an array twice")
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in infos):
        raise ValueError("it is packed in a way that numpy does not use")
    return names


def _members(
    path: Path, archive: zipfile.ZipFile, has_labels: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    names = _names(archive)
    name = _the_name(path, names, ("x", "images", "data", "x_train"))
    axes = {}
    for each in names:
        with archive.open(f"{each}.npy") as stream:
            axes[each] = len(_npy_header(stream)[0])
    if name is None:
        arrays = [each for each in names if axes[each] >= 2]
        arrays = [each for each in arrays if each != "cond"] or arrays
        if len(arrays) != 1:
            listed = ", ".join(names) or "nothing"
            raise DataError(
                f"source {files.shown(path.name)} must hold an array named x, or one with two axes or more, got "
                f"{listed:.60}: pass the array itself"
            )
        name = arrays[0]
    beside = ("y", "labels", "y_train")
    labels = None if has_labels else _the_name(path, names, beside)
    cond = "cond" if "cond" in names and name != "cond" else None
    taken = [each for each in (name, labels, cond) if each is not None]
    rest = [each for each in names if axes[each] >= 1 and each not in (*taken, *(beside if has_labels else ()))]
    if rest:
        listed = ", ".join(rest)
        warn(
            f"source {files.shown(path.name)}: only {' and '.join(taken)} is taken, not {listed:.80}: pass labels= or another "
            "array itself"
        )
    beside_it = [None if each is None else _member(archive, each) for each in (labels, cond)]
    return _member(archive, name), beside_it[0], beside_it[1]


def _the_name(path: Path, names: list[str], candidates: tuple[str, ...]) -> str | None:
    present = [name for name in candidates if name in names]
    if len(present) > 1:
        raise DataError(
            f"source {path.name} must hold only one of {', '.join(candidates)}, got {' and '.join(present)}: "
            f"pass the arrays themselves"
        )
    return present[0] if present else None


def _idx_file(path: Path, argument: str = "source") -> np.ndarray:
    with _opened(path, "") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        if not packed:
            return _idx_array(path, stream, argument)
        with gzip.GzipFile(fileobj=stream) as unpacked:
            return _idx_array(path, unpacked, argument)  # type: ignore[arg-type]


def _idx_array(path: Path, stream: IO[bytes], argument: str) -> np.ndarray:
    magic = stream.read(4)
    if path.suffix.lower() in _TEXTS:
        dtype, comma = (
            "int64" if argument == "labels" else "float32",
            ', delimiter=","' * (path.suffix.lower() == ".csv"),
        )
        raise DataError(
            f"{argument} {files.shown(path.name)} is a table of text: write it as a .npy file, "
            f'numpy.save("{files.shown(path.stem)}.npy", numpy.loadtxt("{files.shown(path.name)}"{comma}, dtype="{dtype}"))'
        )
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_DTYPES or not 1 <= magic[3] <= 32:
        others = argument == "source"
        raise DataError(
            f"{argument} {path.name} must be a .npy{', .npz' * others} or IDX file{' or a folder of pictures' * others}, got a "
            f"file that starts with {magic!r}"
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
    channels, size = _picture_options(channels, size)
    paths = _pictures_in(root)
    frames = [_frames(root.joinpath(*parts)) for parts in paths]
    read = (
        (parts, picture)
        for parts, count in zip(paths, frames)
        for picture in _pictures(root.joinpath(*parts), count, channels, size)
    )
    x = np.empty(0, np.uint8)
    for done, (parts, picture) in enumerate(read):
        if not done:
            x = np.empty((sum(frames), *picture.shape), np.uint8)
        if picture.shape != x.shape[1:]:
            option = "size=(H, W)" if picture.shape[1:] != x.shape[2:] else "channels=1 or 3"
            raise ShapeError(
                f"source must hold pictures of one shape, got {list(x.shape[1:])} and {list(picture.shape)} in "
                f"{files.shown('/'.join(parts))}: give {option}"
            )
        x[done] = picture
    names, labels = _classes_of(paths, frames)
    return _Raw(torch.from_numpy(x), labels, class_names=names)


def _picture_options(channels: Any, size: Any) -> tuple[int | None, tuple[int, int] | None]:
    if not _one_of(channels, (None, 1, 3)):
        raise ConfigError(f"channels must be 1 or 3 where source is a folder of pictures, got {short(channels)}")
    if size is None:
        return channels, None
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise ConfigError(f"size must be (height, width), got {short(size)}")
    height, width = (checks.integer("size", length, 1, 2**16) for length in size)
    return channels, (height, width)


def _classes_of(paths: list[tuple[str, ...]], frames: list[int]) -> tuple[tuple[str, ...], list[int] | None]:
    """The classes' names and each frame's class, where every picture lies in a subfolder; else none."""
    if any(len(parts) == 1 for parts in paths):
        return (), None
    names = tuple(sorted({parts[0] for parts in paths}))
    number = {name: k for k, name in enumerate(names)}
    return names, [number[parts[0]] for parts, count in zip(paths, frames) for _ in range(count)]


def _pictures_in(root: Path) -> list[tuple[str, ...]]:
    """The pictures' paths within the folder, sorted; linked folders are followed, each real one once."""
    paths, skipped, seen = [], set(), {}

    def unreadable(error: OSError) -> None:
        raise DataError(
            f"source holds {files.shown(error.filename)}, which cannot be read: {files.reason(error)}"
        ) from error

    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        at = os.stat(folder)
        where = Path(folder).relative_to(root)
        if (at.st_dev, at.st_ino) in seen:  # also a link to a folder above, which would never end
            before = files.shown(seen[at.st_dev, at.st_ino])
            raise DataError(
                f"source holds the folder {before} twice, also as {files.shown(where)}: remove one of the links"
            )
        seen[at.st_dev, at.st_ino] = where
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in _PICTURES:
                paths.append((*where.parts, name))
            elif suffix in _NOT_READ:
                skipped.add(suffix)
    if not paths:
        raise DataError(f"source {files.shown(root)!r} holds no picture: the formats are {' '.join(_PICTURES)}")
    if skipped:
        warn(
            f"source {files.shown(root)}: files ending in {' '.join(sorted(skipped))} are not read: convert them to .png"
        )
    return sorted(paths)


@contextlib.contextmanager
def _picture_file(file: Path) -> Iterator[Any]:
    """A picture as Pillow opens it, and a DataError for whatever its contents make Pillow raise."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("a folder of pictures needs Pillow, which is missing: pip install fastdiff[demo]") from error
    try:
        with files.open_regular(file) as stream, Image.open(stream, formats=_FORMATS) as opened:
            yield opened
    except FastdiffError:
        raise
    except (*_NUMPY_ERRORS, Image.DecompressionBombError) as error:
        reason = (
            files.reason(error) if not isinstance(error, Image.UnidentifiedImageError) else "it is of no known format"
        )
        raise DataError(
            f"source holds {files.shown(file.name)}, which cannot be read as a picture: {reason}"
        ) from error


def _frames(file: Path) -> int:
    with _picture_file(file) as opened:
        # a camera's second picture in a JPEG is a preview or a map of its brightness, no sample
        return 1 if opened.format == "MPO" else int(getattr(opened, "n_frames", 1))


def _pictures(file: Path, count: int, channels: int | None, size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    """Each frame as uint8 [C, H, W]; all of a file have its first one's size, and colour if one has."""
    from PIL import Image, ImageOps

    with _picture_file(file) as opened:
        grey = all([_mode(opened, k) in ("1", "L", "LA") for k in range(count)])
        channels = channels or (1 if grey else 3)
        first = opened.size
        for k in range(count):
            opened.seek(k)
            if opened.size != first:
                raise DataError(
                    f"source holds {files.shown(file.name)}, whose frames differ in size: save the right one alone"
                )
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            if size is not None:
                image = image.resize(size[::-1], Image.Resampling.BICUBIC)
            yield np.asarray(image).reshape(*image.size[::-1], channels).transpose(2, 0, 1)


def _mode(opened: Any, frame: int) -> str:
    """A frame's mode; ValueError where its numbers have more than 8 bits, which Pillow would drop."""
    opened.seek(frame)
    packing = str(
        [tile[3] for tile in opened.tile]
    )  # how the file's numbers lie: "RGB;16B"; a PPM says its largest number
    largest = max((tile[3][-1] for tile in opened.tile if tile[0].startswith("ppm")), default=0)
    if opened.mode[0] in "IF" or re.search(r"(?<!BGR);16", packing) or largest > 255:
        raise ValueError("it has more than 8 bits: load it as a float array")
    return str(opened.mode)


def _tensor(array: np.ndarray) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise DataError("x must not be a masked array, as its masked values would be used: fill or drop them")
    check_dtype(array.dtype.name)
    native = array.dtype.newbyteorder("=")
    if not array.flags.writeable or array.dtype != native or any(stride < 0 for stride in array.strides):
        array = np.array(array, dtype=native)
    return torch.from_numpy(array)
