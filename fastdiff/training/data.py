"""Data sets in memory: raw values with their range, levels and labels, and the readers that make them.

Raw values v in [lo, hi] reach a network in its own `data_range` [a, b]. Plain scaling is linear, lo → a and hi → b.
Values that lie on K levels may instead be dequantised (Theis et al. 2016, §3.1): level k with u ~ U[0, 1) becomes

    x = a + (b − a) (k + u)/K  in [a, b),

so that a density over x bounds the likelihood of the levels. Both keep x inside bin k, whose inverse is `quantise`.
No reader unpickles or downloads anything.
"""

from __future__ import annotations

import gzip
import math
import numbers
import os
import re
import reprlib
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from ..errors import ConfigError, DataError, DeviceError, DTypeError, ShapeError

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_MOST_BINS = 65536
# what numpy and zipfile raise over a damaged file
_NUMPY_ERRORS = (
    *(OSError, EOFError, ValueError, SyntaxError, RuntimeError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """N samples in memory: `x` [N, *shape] in its raw dtype, and what its numbers mean.

    x: dense CPU tensor, uint8, float32 or float64, finite, at least one axis after N. Shared with the caller where it
        is contiguous, never written to.
    labels: None or N class numbers 0 … num_classes − 1 of any integer dtype; kept as int64 [N].
    range: the raw values' own (lo, hi). Default for uint8 (0, 255). Default for floats the data's own minimum and
        maximum, with a warning where they exceed 10: give it where two sets must share one scale, as train and test do.
    bins: the number K of equally spaced levels lo … hi that the values lie on (checked), None if they are continuous.
        Default for uint8 one level per integer, for floats None.
    num_classes: default the largest label + 1; `split` hands it on.
    class_names: one name per class, or empty.

    Errors: DataError (empty, not finite, out of range, between levels, a label out of range), ShapeError, DTypeError,
    DeviceError, ConfigError (`range`, `bins`, `num_classes`).
    """

    x: torch.Tensor
    labels: torch.Tensor | None = None
    range: tuple[float, float] | None = None
    bins: int | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _dense("x", self.x)
        _check_dtype(str(self.x.dtype).removeprefix("torch."))
        if self.x.ndim < 2:
            raise ShapeError(
                f"x must have shape [N, *shape] with an axis after N, got {list(self.x.shape)}; use x[:, None]"
            )
        if self.x.numel() == 0:
            raise DataError(f"x must hold at least one value, got shape {list(self.x.shape)}")
        self._set("x", self.x.detach().as_subclass(torch.Tensor).contiguous())
        self._set("range", self._own_range() if self.range is None else self._checked_range())
        self._set("bins", self._checked_bins())
        if self.labels is not None:
            self._set("labels", _checked_labels(self.labels, len(self)))
        self._set("num_classes", self._checked_classes())

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @cached_property
    def _extremes(self) -> tuple[float, float]:
        # one pass that also finds NaN and inf: both reach the extremes
        lo, hi = (end.item() for end in self.x.aminmax())
        if not (math.isfinite(lo) and math.isfinite(hi)):
            raise _not_finite(self.x)
        return lo, hi

    @property
    def _ends(self) -> tuple[float, float]:
        """`range` as the raw dtype holds it: a float32 0.3 is above 0.3."""
        return _rounded(self.range, self._real)

    @property
    def _real(self) -> torch.dtype:
        return self.x.dtype if self.x.is_floating_point() else torch.float64

    def _own_range(self) -> tuple[float, float]:
        lo, hi = self._extremes
        if not self.x.is_floating_point():
            return 0.0, 255.0
        if not (lo < hi and math.isfinite(hi - lo)):
            raise DataError(f"x runs from {lo:g} to {hi:g}, which is no range to scale by; give range=(lo, hi)")
        if max(-lo, hi) > 10:
            given = f"x holds floats from {lo:g} to {hi:g} and its range is not given"
            fix = "these ends are taken; give range=(lo, hi), or uint8 data for pictures"
            warnings.warn(f"{given}: {fix}", UserWarning, stacklevel=4)
        return lo, hi

    def _checked_range(self) -> tuple[float, float]:
        lowest, highest = self._extremes
        chosen = _interval("range", self.range, self._real)
        lo, hi = _rounded(chosen, self._real)
        if lowest < lo or highest > hi:
            index = _first((self.x < lo) | (self.x > hi))
            raise DataError(
                f"x must lie in its range ({lo:g}, {hi:g}), got {self.x[index].item():g} at index {list(index)}; "
                f"it runs from {lowest:g} to {highest:g}: give a range= that holds it"
            )
        return chosen

    def _place(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw values in steps of one level above lo, float64."""
        lo, hi = self._ends
        return (raw.double() - lo) * ((self.bins - 1) / (hi - lo))

    def _checked_bins(self) -> int | None:
        lo, hi = self._ends
        integers = self.x.dtype == torch.uint8 and lo.is_integer() and hi.is_integer() and hi - lo < _MOST_BINS
        if self.bins is None:
            return int(hi - lo) + 1 if integers else None
        bins = _integer("bins", self.bins, 2, _MOST_BINS)
        if integers and bins == hi - lo + 1:
            return bins
        for start in range(0, len(self), 1024):
            place = self._place(self.x[start : start + 1024])
            off = (place - place.round()).abs() > 0.01
            if off.any():
                i, *rest = _first(off)
                value, index = self.x[(start + i, *rest)].item(), [start + i, *rest]
                raise DataError(
                    f"x must lie on its {bins} levels from {lo:g} to {hi:g}, got {value:g} at index {index}; "
                    f"give the right range= and bins=, or convert continuous data to float32"
                )
        return bins

    def _checked_classes(self) -> int | None:
        if self.labels is None:
            if self.num_classes is not None or self.class_names:
                raise ConfigError("num_classes and class_names need labels, and labels is None; give labels=")
            return None
        largest, names = int(self.labels.max()), len(self.class_names)
        count = self.num_classes if self.num_classes is not None else names or largest + 1
        count = _integer("num_classes", count, 1, 2**31)
        if names not in (0, count):
            raise ConfigError(f"class_names must name all {count} classes, got {names} names")
        if largest >= count:
            raise DataError(
                f"labels must lie in 0..{count - 1}, got {largest} at index {int(self.labels.argmax())}; "
                f"give the right num_classes="
            )
        return count

    def __len__(self) -> int:
        return self.x.shape[0]

    def __repr__(self) -> str:
        return f"Data({self.explain()})"

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample's shape."""
        return tuple(self.x.shape[1:])

    def explain(self) -> str:
        """One line: how many samples, their shape and dtype, the range and where it comes from, levels, classes."""
        lo, hi = self.range
        own = " (the data's own minimum and maximum)" * (self.x.is_floating_point() and self.range == self._extremes)
        levels = "continuous values" if self.bins is None else f"{self.bins} levels"
        classes = "no labels" if self.labels is None else f"{self.num_classes} classes"
        dtype = str(self.x.dtype).removeprefix("torch.")
        return (
            f"{len(self)} samples of shape {list(self.shape)} {dtype}, range {lo:g} to {hi:g}{own}, {levels}, {classes}"
        )

    def batch(
        self, indices: Sequence[int], data_range: tuple[float, float], noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Samples `indices` [B] as the network sees them: float32 [B, *shape] in `data_range` (a, b).

        Without noise x = a + (b − a)(v − lo)/(hi − lo), with both ends met exactly. With noise u in [0, 1), float32
        [B, *shape], x = a + (b − a)(k + u)/K, uniform dequantisation (Theis et al. 2016, §3.1): float32 rounding never
        leaves bin k, so x lies in [a, b). Errors: ConfigError (noise for continuous data), DataError (an index or a
        noise out of range), ShapeError, DTypeError.
        """
        a, b = _interval("data_range", data_range, torch.float32)
        raw = self.x.index_select(0, _checked_indices(indices, len(self)))
        if noise is not None:
            self._check_noise(noise, raw)
        if self.bins is None:
            return _linear(raw, self._ends, (a, b)).float()
        level, low, high = map(torch.from_numpy, _bins(self.bins, a, b))
        k = self._place(raw).round().long()
        if noise is None:
            return level[k]
        return torch.minimum(low[k] + noise * ((b - a) / self.bins), high[k])

    def _check_noise(self, noise: torch.Tensor, raw: torch.Tensor) -> None:
        if self.bins is None:
            raise ConfigError(
                "noise dequantises data on discrete levels, and bins is None; give bins=, or leave it out"
            )
        _dense("noise", noise)
        if noise.dtype != torch.float32:
            raise DTypeError(f"noise must be float32, got {noise.dtype}; use noise.float()")
        if noise.shape != raw.shape:
            raise ShapeError(f"noise must have the batch's shape {list(raw.shape)}, got {list(noise.shape)}")
        lowest, highest = map(float, noise.aminmax()) if noise.numel() else (0.0, 0.0)
        if not (lowest >= 0 and highest < 1):
            raise DataError(f"noise must lie in [0, 1), got values from {lowest:g} to {highest:g}; use torch.rand")

    def quantise(self, x: torch.Tensor, data_range: tuple[float, float]) -> torch.Tensor:
        """Floats x [B, *shape] in `data_range` (a, b), on any device, back to raw values and the raw dtype.

        With K levels: level k = ⌊K (x − a)/(b − a)⌋ clamped to 0 … K − 1, the inverse of `batch` with or without
        noise, exactly. Continuous: v = lo + (hi − lo)(x − a)/(b − a), clamped to the range. Errors: DataError where x
        is not finite, ShapeError, DTypeError.
        """
        a, b = _interval("data_range", data_range, torch.float32)
        if not (isinstance(x, torch.Tensor) and x.is_floating_point()):
            raise DTypeError(f"x must be a floating tensor of samples, got {getattr(x, 'dtype', type(x).__name__)}")
        if tuple(x.shape[1:]) != self.shape or x.ndim == 0:
            raise ShapeError(f"x must have shape [B, {str(list(self.shape))[1:-1]}], got {list(x.shape)}")
        if not x.isfinite().all():
            raise _not_finite(x)
        x, (lo, hi) = x.detach(), self._ends
        if self.bins is None:
            return _linear(x.clamp(a, b), (a, b), (lo, hi)).clamp(lo, hi).to(self.x.dtype)
        edges = torch.from_numpy(_bins(self.bins, a, b)[1][1:]).to(x.device)
        value = torch.bucketize(x.float(), edges, right=True).double() * ((hi - lo) / (self.bins - 1)) + lo
        return (value if self.x.is_floating_point() else value.round()).to(self.x.dtype)

    def split(self, fraction: float, seed: int = 0) -> tuple[Data, Data]:
        """Two shuffled parts, the first with round(fraction · N) samples, both of the same range, bins and classes.

        The order comes from numpy's PCG64(seed) alone: no global generator is read or advanced. Both parts are
        copies. Errors: ConfigError, or DataError where a part would be empty.
        """
        if isinstance(fraction, bool) or not isinstance(fraction, numbers.Real) or not 0 < fraction < 1:
            raise ConfigError(f"fraction must be a number between 0 and 1, got {fraction!r}")
        order = np.random.Generator(np.random.PCG64(_integer("seed", seed, 0, 2**64 - 1))).permutation(len(self))
        cut = round(float(fraction) * len(self))
        if not 0 < cut < len(self):
            raise DataError(f"fraction {fraction!r} of {len(self)} samples leaves one part empty; choose another")
        parts = map(torch.from_numpy, (order[:cut], order[cut:]))
        return tuple(
            replace(self, x=self.x[part], labels=None if self.labels is None else self.labels[part]) for part in parts
        )


@lru_cache(maxsize=32)
def _bins(bins: int, a: float, b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 (level, low, high), each [bins]: the place of level k on a … b; the first and the last float of bin k."""
    edges = np.linspace(a, b, bins + 1)
    low = edges.astype(np.float32)
    low = np.where(low < edges, np.nextafter(low, np.float32(np.inf)), low)
    high = np.nextafter(low[1:], np.float32(-np.inf))
    if (high < low[:-1]).any():
        raise ConfigError(f"data_range ({a:g}, {b:g}) is too narrow for {bins} bins in float32; widen it")
    level = np.linspace(a, b, bins).astype(np.float32)
    level[1:-1] = level[1:-1].clip(low[1:-2], high[1:-1])
    return level, low[:-1], high


def _linear(x: torch.Tensor, source: tuple[float, float], target: tuple[float, float]) -> torch.Tensor:
    """x from `source` to `target` in float64, both ends exact."""
    if source == target:
        return x
    w = (x.double() - source[0]) / (source[1] - source[0])
    return target[0] * (1 - w) + target[1] * w


def _check_dtype(name: str) -> None:
    if name in ("uint8", "float32", "float64"):
        return
    hint = "convert it to float32"
    if name == "bool":
        hint = "convert it to uint8 and give range=(0, 1)"
    elif name.startswith(("int", "uint")):
        hint = "convert it to uint8 if it holds 0..255, else to float32, and give range= and bins="
    elif name.startswith("complex"):
        hint = "stack its real and imaginary parts along an axis"
    raise DTypeError(f"x must be uint8, float32 or float64, got {name}; {hint}")


def _dense(argument: str, tensor: Any) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise DTypeError(f"{argument} must be a torch tensor, got {type(tensor).__name__}; load_data takes arrays")
    if tensor.layout != torch.strided or tensor.is_nested:
        raise ShapeError(f"{argument} must be a dense strided tensor, got {tensor.layout}; use {argument}.to_dense()")
    if tensor.device.type != "cpu":
        fix = "meta tensors hold no data" if tensor.is_meta else f"use {argument}.cpu()"
        raise DeviceError(f"{argument} must be in CPU memory, got {tensor.device}; {fix}")


def _integers(argument: str, value: Any) -> torch.Tensor:
    """An int64 copy of a tensor, an array or a sequence of integers, [K]."""
    if isinstance(value, torch.Tensor):
        _dense(argument, value)
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        found, kind = value.detach(), value.dtype
    else:
        try:
            array = np.array(value)
        except ValueError as error:
            raise DTypeError(f"{argument} must be one flat sequence of integers: {_line(error)}") from error
        whole, kind = array.dtype.kind in "iu" or array.shape == (0,), array.dtype
        found = torch.from_numpy(array.astype(np.int64)) if whole else None
    if not whole:
        raise DTypeError(f"{argument} must be integers, got {kind}; convert them to int64")
    if found.ndim != 1:
        raise ShapeError(f"{argument} must have one axis, got shape {list(found.shape)}")
    return found.to(torch.int64, copy=True).contiguous()


def _checked_labels(labels: Any, count: int) -> torch.Tensor:
    found = _integers("labels", labels)
    if len(found) != count:
        raise DataError(f"labels must have length {count}, one per sample, got {len(found)}")
    if (lowest := int(found.min())) < 0:
        raise DataError(f"labels must not be negative, got {lowest} at index {int(found.argmin())}")
    return found


def _checked_indices(indices: Any, count: int) -> torch.Tensor:
    found = _integers("indices", indices)
    outside = (found < 0) | (found >= count)
    if outside.any():
        raise DataError(f"indices must lie in 0..{count - 1}, got {int(found[_first(outside)])}")
    return found


def _interval(argument: str, value: Any, dtype: torch.dtype) -> tuple[float, float]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else ()
    if (
        len(pair) == 2
        and all(isinstance(end, numbers.Real) and abs(end) < 1e308 for end in pair)
        and bool not in map(type, pair)
    ):
        lo, hi = _rounded(pair, dtype)
        if lo < hi and math.isfinite(hi - lo):
            return float(pair[0]), float(pair[1])
    name = str(dtype).removeprefix("torch.")
    raise ConfigError(
        f"{argument} must be two finite numbers (lo, hi) with lo < hi in {name}, got {reprlib.repr(value)}"
    )


def _rounded(pair: Sequence[float], dtype: torch.dtype) -> tuple[float, float]:
    lo, hi = torch.tensor([float(end) for end in pair], dtype=dtype, device="cpu").tolist()
    return lo, hi


def _integer(argument: str, value: Any, lo: int, hi: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not lo <= value <= hi:
        raise ConfigError(f"{argument} must be an integer in {lo}..{hi}, got {reprlib.repr(value)}")
    return int(value)


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    """Index of the first True."""
    place = int(mask.contiguous().view(torch.uint8).flatten().argmax())
    return tuple(int(i) for i in np.unravel_index(place, tuple(mask.shape)))


def _not_finite(x: torch.Tensor) -> DataError:
    index = _first(~x.isfinite())
    return DataError(f"x must be finite, got {x[index].item()} at index {list(index)}; drop that sample")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def load_data(
    source: Any,
    *,
    labels: Any = None,
    range: tuple[float, float] | None = None,
    bins: int | None = None,
    channels: int | str | None = None,
    size: tuple[int, int] | None = None,
) -> Data:
    """A `Data` from nearly anything on this machine; `labels`, `range` and `bins` override what the source says.

    source:
    - a tensor or numpy array [N, *shape]: uint8, float32 or float64. Its shape is taken as it stands. Read-only,
      negatively strided and byte-swapped arrays are copied;
    - a `Data`: returned as it is, without options;
    - "digits": scikit-learn's 1797 digits [1, 8, 8], 17 levels 0 … 16, 10 classes (a folder so named: Path("digits"));
    - a .npy file, or a .npz: its array "x", "images", "data" or "x_train", else the only one with two axes or more;
      labels from "y", "labels" or "y_train";
    - an IDX file (MNIST's format), plain or gzipped: [N, H, W] becomes [N, 1, H, W]; int8 and int16 become float32,
      int32 float64; the labels-idx1 file beside an images-idx3 file is its labels;
    - a folder of pictures, at any depth, in the order of their paths; other files and names that begin with a dot
      are passed over. Becomes uint8 [N, C, H, W]. If every picture lies in a subfolder, the first-level subfolders are
      the classes. EXIF rotation is applied, transparency laid on white.

    channels: for arrays "last" moves the last axis to its place after N, "first" says that it is there already (uint8
        [N, H, W, 1, 3 or 4] is refused without a word), 1 puts the missing axis into [N, H, W]. For pictures 1 or 3
        converts; default: what they have, which must be the same for all.
    size: (H, W) that every picture is stretched to, by Pillow's bicubic filter with antialiasing; default: as they are,
        which must be the same for all.

    Errors: those of `Data`; DataError for a file that is missing, unreadable, truncated or ambiguous; ImportError where
    a source needs a package that is not installed.
    """
    options = {"labels": labels, "range": range, "bins": bins, "channels": channels, "size": size}
    if isinstance(source, Data):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]} cannot change a source that is a Data; build it anew from source.x")
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
        raise ConfigError(f"size resizes a folder of pictures, got size={size!r} for another source; leave it out")
    if isinstance(source, torch.Tensor):
        _dense("source", source)
        return _Raw(_arranged(source, channels))
    if isinstance(source, np.ndarray):
        return _Raw(_arranged(_tensor(source), channels))
    if not isinstance(source, (str, os.PathLike)):
        kind = type(source).__name__
        raise DTypeError(f"source must be a tensor, numpy array, Data, path or name, got {kind}; use numpy.asarray")
    if source == "digits":
        return _digits(channels)
    if path.suffix.lower() in (".npy", ".npz"):
        array, found = _numpy_file(path, has_labels)
        return _Raw(_arranged(_tensor(array), channels), found)
    array = _idx_file(path)
    found = None if has_labels else _idx_labels(path)
    return _Raw(_arranged(_tensor(array), 1 if array.ndim == 3 and channels is None else channels), found)


def _arranged(x: torch.Tensor, channels: Any) -> torch.Tensor:
    """x with its channels, if any, right after N."""
    if channels not in (None, "first", "last", 1) or isinstance(channels, bool):
        raise ConfigError(f'channels must be "first", "last" or 1 where source is an array, got {channels!r}')
    if channels == 1:
        if x.ndim != 3:
            raise ShapeError(f"channels=1 puts the missing axis into [N, H, W], got {list(x.shape)}; leave it out")
        return x[:, None]
    if channels == "last":
        if x.ndim < 3:
            raise ShapeError(f'channels="last" needs [N, …, C], got {list(x.shape)}; leave it out')
        return x.movedim(-1, 1)
    picture = x.ndim == 4 and x.dtype == torch.uint8 and x.shape[-1] in (1, 3, 4) and x.shape[1] not in (1, 3, 4)
    if channels is None and picture:
        raise ShapeError(
            f'source looks like pictures with channels last, shape {list(x.shape)}; give channels="last" to move them, '
            f'or "first" to keep the shape'
        )
    return x


def _digits(channels: Any) -> _Raw:
    if channels is not None:
        raise ConfigError(f'channels has no meaning for source "digits" (one channel), got {channels!r}; leave it out')
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('source "digits" needs scikit-learn; run: pip install fastdiff[demo]') from error
    found = load_digits()
    return _Raw(torch.from_numpy(found.images.astype(np.uint8)[:, None]), found.target, (0.0, 16.0), 17)


def _numpy_file(path: Path, has_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            return (loaded, None) if isinstance(loaded, np.ndarray) else _members(path, loaded, has_labels)
    except DataError:
        raise
    except _NUMPY_ERRORS as error:
        raise DataError(f"source {path.name} cannot be read as a numpy file without pickle: {_line(error)}") from error


def _members(path: Path, archive: Any, has_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    name = _the_name(path, archive.files, ("x", "images", "data", "x_train"))
    if name is None:
        arrays = [name for name in archive.files if np.ndim(archive[name]) >= 2]
        if len(arrays) != 1:
            names = ", ".join(archive.files) or "nothing"
            raise DataError(
                f"source {path.name} must hold an array x, or only one with two axes or more, got {names}; "
                f"pass the array itself"
            )
        name = arrays[0]
    labels = None if has_labels else _the_name(path, archive.files, ("y", "labels", "y_train"))
    return np.asarray(archive[name]), None if labels is None else np.asarray(archive[labels])


def _the_name(path: Path, names: list[str], wanted: tuple[str, ...]) -> str | None:
    found = [name for name in wanted if name in names]
    if len(found) > 1:
        raise DataError(f"source {path.name} is ambiguous, it holds {' and '.join(found)}; pass the arrays themselves")
    return found[0] if found else None


def _idx_file(path: Path) -> np.ndarray:
    """The array of an IDX file (LeCun, Cortes & Burges): 0, 0, dtype, rank, big-endian int32 lengths, values."""
    try:
        with path.open("rb") as plain:
            zipped = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as stream:
            return _idx_array(path, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"source {path.name} cannot be read: {_line(error)}") from error


def _idx_array(path: Path, stream: IO[bytes]) -> np.ndarray:
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_DTYPES or not 1 <= magic[3] <= 32:
        raise DataError(
            f"source {path.name} must be a .npy, .npz or IDX file or a folder of pictures; it starts with {magic!r}"
        )
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"source {path.name} is truncated inside its header; fetch it again")
    shape, dtype = struct.unpack(f">{magic[3]}I", header), np.dtype(_IDX_DTYPES[magic[2]])
    promised, body = math.prod(shape) * dtype.itemsize, bytearray()
    # in pieces, so that a header that promises too much allocates nothing
    while len(body) <= promised and (piece := stream.read(min(promised + 1 - len(body), 1 << 24))):
        body += piece
    if not promised or len(body) != promised:
        what = "has trailing bytes" if len(body) > promised else "is truncated" if promised else "is empty"
        raise DataError(f"source {path.name} {what}: header {list(shape)} promises {promised} bytes; fetch it again")
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
            raise ConfigError(f"size must be (height, width), got {size!r}")
        size = tuple(_integer("size", length, 1, 2**16) for length in size)
    paths = sorted(file.relative_to(root).parts for file in root.rglob("*") if not file.is_dir())
    paths = [parts for parts in paths if Path(parts[-1]).suffix.lower() in _PICTURES]
    paths = [parts for parts in paths if not any(part.startswith(".") for part in parts)]
    if not paths:
        raise DataError(f"source {str(root)!r} holds no picture; these are read: {' '.join(_PICTURES)}")
    first = _picture(root.joinpath(*paths[0]), channels, size)
    x = np.empty((len(paths), *first.shape), np.uint8)
    for i, parts in enumerate(paths):
        picture = _picture(root.joinpath(*parts), channels, size)
        if picture.shape != first.shape:
            option = "size=(H, W)" if picture.shape[1:] != first.shape[1:] else "channels=1 or 3"
            raise ShapeError(
                f"source must hold pictures of one shape, got {list(first.shape)} and {list(picture.shape)} in "
                f"{'/'.join(parts)}; give {option}"
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
        raise ImportError("a folder of pictures needs Pillow; run: pip install fastdiff[demo]") from error
    try:
        with Image.open(file) as opened:
            if opened.mode[0] in "IF":
                raise ValueError(f"mode {opened.mode} has more than 8 bits, load it as a float array instead")
            image = ImageOps.exif_transpose(opened)
        channels = channels or (1 if image.mode in ("1", "L", "LA") else 3)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
    except (OSError, EOFError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"source holds {file.name}, which cannot be read as a picture: {_line(error)}") from error
    if size is not None:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(*image.size[::-1], channels).transpose(2, 0, 1)


def _tensor(array: np.ndarray) -> torch.Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise DataError("x must not be a masked array, its hidden values would be data; fill or drop them")
    _check_dtype(array.dtype.name)
    native = array.dtype.newbyteorder("=")
    if not array.flags.writeable or array.dtype != native or any(stride < 0 for stride in array.strides):
        array = np.array(array, dtype=native)
    return torch.from_numpy(array)
