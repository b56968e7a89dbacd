"""Data sets in memory: raw values with their range, levels and labels (`load_data` makes them from files).

Raw values v in [lo, hi] reach a network in the model's `data_range` [a, b]. `batch` scales linearly, lo → a and hi → b.
`dequantized`, for values on K levels, adds noise (uniform dequantisation, Theis et al. 2016, §3.1): with u ~ U[0, 1)

    x = a + (b − a) (k + u)/K  in [a, b),

so that the density of x gives a lower bound of the log-likelihood of the levels. Both keep x inside bin k, and
`quantise` is their inverse.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .. import checks
from ..errors import ConfigError, DataError, DTypeError, ShapeError, short, warn
from ..execution.tensor_checks import check_dense, check_device, check_samples
from .dequantize import bin_edges, bin_noise

MAX_BINS = 65536
CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """N samples in memory: `x` [N, *shape] in its raw dtype, with the range and levels of its values, labels and conditions.

    x: dense CPU tensor, uint8, float32 or float64, finite, at least one axis after N. Shares memory with the caller's
        tensor where that is contiguous; never written to.
    labels: None, or N class numbers 0 … num_classes − 1 of any integer dtype; stored as int64 [N].
    range: (lo, hi), which the model's data_range stands for. Default for uint8 (0, 255); for floats the minimum and
        maximum of x, with a warning where one exceeds 10 in magnitude. Give it where two sets must share one scale, as
        train and test do.
    bins: the number K of equally spaced levels lo … hi that the values lie on (checked), None for continuous values.
        Default for uint8 one level per integer, for floats None.
    num_classes: default the largest label + 1; `split` passes it on to both parts.
    class_names: one name per class, or empty.
    cond: None, or a condition of each sample, [N, *cond_shape] with at least one axis after N: a tensor or array of float32 or
        float64, finite, in units of its own. Vectors or fields; class numbers are `labels`, and there may be both.

    Errors: DataError (empty, not finite, out of range, between levels, a label out of range), ShapeError, DTypeError,
    DeviceError, ConfigError (`range`, `bins`, `num_classes`).
    """

    x: torch.Tensor
    labels: torch.Tensor | None = None
    range: tuple[float, float] | None = None
    bins: int | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    cond: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check_dense("x", self.x)
        check_device("x", self.x, CPU)
        check_dtype(_name(self.x.dtype))
        if self.x.ndim < 2:
            raise ShapeError(
                f"x must have shape [N, *shape] with at least one axis after N, got {list(self.x.shape)}: use x[:, None]"
            )
        if self.x.numel() == 0:
            raise DataError(f"x must hold at least one value, got shape {list(self.x.shape)}")
        self._set("x", self.x.detach().as_subclass(torch.Tensor).contiguous())
        self._set("range", self._default_range() if self.range is None else self._checked_range())
        self._set("bins", self._checked_bins())
        if self.labels is not None:
            self._set("labels", _checked_labels(self.labels, len(self)))
        self._set("num_classes", self._checked_classes())
        if self.cond is not None:
            self._set("cond", _checked_conditions(self.cond, len(self)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @cached_property
    def _extremes(self) -> tuple[float, float]:
        lo, hi = (end.item() for end in self.x.aminmax())
        if not (math.isfinite(lo) and math.isfinite(hi)):  # aminmax propagates NaN
            _check_finite("x", self.x)
        return lo, hi

    @property
    def _ends(self) -> tuple[float, float]:
        """`range` rounded to the raw dtype: as float32, 0.3 is larger than 0.3."""
        lo, hi = torch.tensor(self.range, dtype=self._real, device=CPU).tolist()
        return lo, hi

    @property
    def _real(self) -> torch.dtype:
        return self.x.dtype if self.x.is_floating_point() else torch.float64

    def _default_range(self) -> tuple[float, float]:
        lo, hi = self._extremes
        if not self.x.is_floating_point():
            return 0.0, 255.0
        if not (lo < hi and math.isfinite(hi - lo)):
            raise DataError(
                f"x must span a finite range of more than one value, got {lo:g} to {hi:g}: give range=(lo, hi)"
            )
        if max(-lo, hi) > 10:
            warn(
                f"x holds floats from {lo:g} to {hi:g} and no range was given, so these two are taken as its range: "
                f"give range=(lo, hi), or uint8 data for pictures",
            )
        return lo, hi

    def _checked_range(self) -> tuple[float, float]:
        lowest, highest = self._extremes
        self._set("range", checks.pair("range", self.range, _name(self._real)))
        lo, hi = self._ends
        if lowest < lo or highest > hi:
            index = _first((self.x < lo) | (self.x > hi))
            raise DataError(
                f"x must be >= {lo:g} and <= {hi:g}, its range, got {self.x[index].item():g} at index {list(index)}: "
                f"give a range= that holds all values, {lowest:g} to {highest:g}"
            )
        return self.range  # type: ignore[return-value]

    def _level(self, raw: torch.Tensor, bins: int) -> torch.Tensor:
        """(v − lo)/(hi − lo) · (bins − 1), float64: whole numbers for values on the levels, up to rounding."""
        lo, hi = self._ends
        return (raw.double() - lo) * ((bins - 1) / (hi - lo))

    def _checked_bins(self) -> int | None:
        lo, hi = self._ends
        integers = self.x.dtype == torch.uint8 and lo.is_integer() and hi.is_integer() and hi - lo < MAX_BINS
        if self.bins is None:
            return int(hi - lo) + 1 if integers else None
        bins = checks.integer("bins", self.bins, 2, MAX_BINS)
        if integers and bins == hi - lo + 1:
            return bins
        for start in range(0, len(self), 1024):
            level = self._level(self.x[start : start + 1024], bins)
            off = (level - level.round()).abs() > 0.01
            if off.any():
                i, *rest = _first(off)
                index = (start + i, *rest)
                raise DataError(
                    f"x must lie on its {bins} levels from {lo:g} to {hi:g}, got {self.x[index].item():g} at index "
                    f"{list(index)}: give the right range= and bins=, or convert continuous data to float32"
                )
        return bins

    def _checked_classes(self) -> int | None:
        if self.labels is None:
            if self.num_classes is not None or self.class_names:
                raise ConfigError("num_classes and class_names need labels, and labels is None: give labels=")
            return None
        largest, names = int(self.labels.max()), len(self.class_names)
        count = self.num_classes if self.num_classes is not None else names or largest + 1
        count = checks.integer("num_classes", count, 1, 2**31)
        if names not in (0, count):
            raise ConfigError(f"class_names must hold {count} names, one for each class, got {names}")
        if largest >= count:
            raise DataError(
                f"labels must be >= 0 and <= {count - 1}, got {largest} at index {int(self.labels.argmax())}: "
                f"give num_classes={largest + 1} or more"
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
        """One line: how many samples, their shape and dtype, the range and where it comes from, levels, classes, conditions."""
        lo, hi = self.range  # type: ignore[misc]
        whence = " (the data's minimum and maximum)" * (self.x.is_floating_point() and self.range == self._extremes)
        levels = "continuous values" if self.bins is None else f"{self.bins} levels"
        classes = "no labels" if self.labels is None else f"{self.num_classes} classes"
        conditions = "" if self.cond is None else f", conditions of shape {list(self.cond.shape[1:])}"
        return (
            f"{len(self)} samples of shape {list(self.shape)} {_name(self.x.dtype)}, range {lo:g} to {hi:g}{whence}, "
            f"{levels}, {classes}{conditions}"
        )

    def fingerprint(self) -> str:
        """A checksum of the values, their range, the labels and the conditions, equal for equal data sets."""
        text = f"{(len(self), *self.shape)} {self.x.dtype} {self.range} {self.bins}"
        crc, step = zlib.crc32(text.encode()), max(1, 2**20 // math.prod(self.shape))
        for start in range(0, len(self), step):  # without a copy of all, which may not fit
            crc = zlib.crc32(self.raw(slice(start, start + step)).numpy(), crc)
        crc = crc if self.labels is None else zlib.crc32(self.labels.numpy().tobytes(), crc)
        if self.cond is not None:
            crc = zlib.crc32(f"cond {tuple(self.cond.shape)} {self.cond.dtype}".encode(), crc)
            crc = zlib.crc32(self.cond.numpy().tobytes(), crc)
        return f"{crc:08x}"

    def raw(self, index: torch.Tensor | slice) -> torch.Tensor:
        """The raw values of samples, by their numbers or a slice of them."""
        return self.x[index] if isinstance(index, slice) else self.x.index_select(0, index)

    def batch(
        self, indices: Sequence[int] | torch.Tensor, data_range: tuple[float, float], noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Samples `indices` [B] in the model's units: float32 [B, *shape] in `data_range` (a, b).

        x = a + (b − a)(v − lo)/(hi − lo), where lo gives a and hi gives b exactly. With noise u in [0, 1), float32
        [B, *shape], x = a + (b − a)(k + u)/K in [a, b), kept inside bin k where rounding would leave it (`dequantized`
        draws the noise). Errors: ConfigError (noise for continuous data), DataError (an index or a noise out of range),
        ShapeError, DTypeError, DeviceError.
        """
        a, b = checks.pair("data_range", data_range, "float32")
        raw = self.raw(_checked_indices(indices, len(self)))
        if noise is not None:
            self._check_noise(noise, raw)
        if self.bins is None:
            return _linear(raw, self._ends, (a, b)).float()
        level, low, high = map(torch.from_numpy, bin_edges(self.bins, a, b))
        k = self._level(raw, self.bins).round().long()
        if noise is None:
            return level[k]
        return torch.minimum(low[k] + noise * ((b - a) / self.bins), high[k])

    def dequantized(
        self,
        indices: Sequence[int] | torch.Tensor,
        data_range: tuple[float, float],
        *,
        seed: int = 0,
        draw: int = 0,
        first_sample: int = 0,
    ) -> torch.Tensor:
        """Samples `indices` [B] in `data_range` (a, b), each number uniform in the bin of its level: float32 [B, *shape].

        x = a + (b − a)(k + u)/K, u ~ U[0, 1) a function of (seed, draw, first_sample + row). The same u as in
        `fastdiff.dequantize`, which takes plain levels and returns float64. Errors: those of `batch`.
        """
        self._check_discrete()
        return self.batch(indices, data_range, bin_noise(len(indices), self.shape, seed, draw, first_sample))

    def _check_discrete(self) -> None:
        if self.bins is None:
            raise ConfigError(
                "dequantisation needs data on discrete levels, and bins is None: build the Data with bins="
            )

    def _check_noise(self, noise: torch.Tensor, raw: torch.Tensor) -> None:
        self._check_discrete()
        check_dense("noise", noise)
        check_device("noise", noise, CPU)
        if noise.dtype != torch.float32:
            raise DTypeError(f"noise must be float32, got {noise.dtype}: use noise.float()")
        if noise.shape != raw.shape:
            raise ShapeError(f"noise must have the shape of the batch, {list(raw.shape)}, got {list(noise.shape)}")
        lowest, highest = map(float, noise.aminmax()) if noise.numel() else (0.0, 0.0)
        if not (lowest >= 0 and highest < 1):
            raise DataError(f"noise must be >= 0 and < 1, got values from {lowest:g} to {highest:g}: use torch.rand")

    def quantise(self, x: torch.Tensor, data_range: tuple[float, float]) -> torch.Tensor:
        """The inverse of `batch`: floats x [B, *shape] in `data_range` (a, b), on any device, to the raw dtype and range.

        With K levels: level k = ⌊K (x − a)/(b − a)⌋ clamped to 0 … K − 1, which inverts `batch` and `dequantized`
        exactly. Continuous: v = lo + (hi − lo)(x − a)/(b − a), clamped to the range. Errors: DataError where x is not
        finite, ShapeError, DTypeError.
        """
        a, b = checks.pair("data_range", data_range, "float32")
        check_samples("x", x)
        if tuple(x.shape[1:]) != self.shape or x.ndim == 0:
            raise ShapeError(f"x must have shape [B, {str(list(self.shape))[1:-1]}], got {list(x.shape)}")
        _check_finite("x", x)
        x, (lo, hi) = x.detach(), self._ends
        if self.bins is None:
            return _linear(x.clamp(a, b), (a, b), (lo, hi)).clamp(lo, hi).to(self.x.dtype)
        edges = torch.from_numpy(bin_edges(self.bins, a, b)[1][1:]).to(x.device)
        value = torch.bucketize(x.float(), edges, right=True).double() * ((hi - lo) / (self.bins - 1)) + lo
        return (value if self.x.is_floating_point() else value.round()).to(self.x.dtype)

    def split(self, fraction: float, seed: int = 0) -> tuple[Data, Data]:
        """Two shuffled parts, the first with round(fraction · N) samples, both with the range, bins and classes of all.

        Labels and conditions stay with their samples. The order comes from numpy's PCG64(seed) alone: no global generator is
        read or advanced. Both parts are copies. Errors: ConfigError, or DataError where a part would be empty.
        """
        first, second = self._shuffled("fraction", fraction, seed)
        return self._part(first), self._part(second)

    def _shuffled(self, name: str, fraction: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        fraction = checks.number(name, fraction, 0, 1, above=True, below=True)
        generator = np.random.Generator(np.random.PCG64(checks.integer("seed", seed, 0, 2**64 - 1)))
        order = torch.from_numpy(generator.permutation(len(self)))
        cut = round(fraction * len(self))
        if not 0 < cut < len(self):
            raise DataError(
                f"{name} must leave samples in both parts, got {fraction:g} of {len(self)}, which gives {cut} and "
                f"{len(self) - cut}: choose another"
            )
        return order[:cut], order[cut:]

    def _part(self, indices: torch.Tensor) -> Data:
        labels, cond = (None if beside is None else beside[indices] for beside in (self.labels, self.cond))
        return replace(self, x=self.x[indices], labels=labels, cond=cond)


def hold_out(data: Data, share: float, name: str) -> tuple[Data, Data]:
    """The parts of `data.split(share)`, of which the second, for a training, reads its values out of `data`, where they stay: in
    a file that is mapped into memory, or in memory that has no room for a copy. name is the argument's."""
    first, second = data._shuffled(name, share, 0)
    return data._part(first), _Rows(data, second)


class _Rows(Data):
    """Some samples of a `Data`, whose `x` are the values of them all: `raw` has its own."""

    def __init__(self, of: Data, rows: torch.Tensor) -> None:
        for name in ("x", "range", "bins", "num_classes", "class_names"):
            self._set(name, getattr(of, name))
        for name in ("labels", "cond"):
            beside = getattr(of, name)
            self._set(name, None if beside is None else beside[rows])
        self._set("_rows", rows)

    _rows: torch.Tensor

    def __len__(self) -> int:
        return len(self._rows)

    def raw(self, index: torch.Tensor | slice) -> torch.Tensor:
        return self.x.index_select(0, self._rows[index])


def _linear(x: torch.Tensor, source: tuple[float, float], target: tuple[float, float]) -> torch.Tensor:
    """x from `source` to `target` in float64, both ends exact."""
    if source == target:
        return x
    w = (x.double() - source[0]) / (source[1] - source[0])
    return target[0] * (1 - w) + target[1] * w


def check_dtype(name: str) -> None:
    """Refuse a dtype, named as torch and numpy name it, whose raw values a Data cannot hold."""
    if name in ("uint8", "float32", "float64"):
        return
    hint = "convert it to float32"
    if name == "bool":
        hint = "convert it to uint8 and give range=(0, 1)"
    elif name.startswith(("int", "uint")):
        hint = "convert it to uint8 if its values are >= 0 and <= 255, else to float32, and give range= and bins="
    elif name.startswith("complex"):
        hint = "stack its real and imaginary parts along an axis"
    raise DTypeError(f"x must be uint8, float32 or float64, got {name}: {hint}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _integers(argument: str, value: Any) -> torch.Tensor:
    """An int64 copy of a tensor, an array or a sequence of integers, [K]."""
    if isinstance(value, torch.Tensor):
        check_dense(argument, value)
        check_device(argument, value, CPU)
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        integers, kind = value.detach(), str(value.dtype)
    else:
        try:
            array = np.array(value)
        except ValueError as error:
            raise DTypeError(f"{argument} must be one flat sequence of integers, got {short(value)}") from error
        whole, kind = array.dtype.kind in "iu" or array.shape == (0,), str(array.dtype)
        integers = torch.from_numpy(array.astype(np.int64) if whole else np.empty(0))
    if not whole:
        raise DTypeError(f"{argument} must be integers, got {kind}: convert them to int64")
    if integers.ndim != 1:
        raise ShapeError(f"{argument} must have one axis, got shape {list(integers.shape)}")
    return integers.to(torch.int64, copy=True).contiguous()


def _checked_labels(labels: Any, count: int) -> torch.Tensor:
    checked = _integers("labels", labels)
    if len(checked) != count:
        raise DataError(f"labels must have length {count}, one per sample, got {len(checked)}")
    if (lowest := int(checked.min())) < 0:
        raise DataError(f"labels must be >= 0, got {lowest} at index {int(checked.argmin())}")
    return checked


def _checked_conditions(cond: Any, count: int) -> torch.Tensor:
    if isinstance(cond, np.ndarray):
        kind = cond.dtype.name
        cond = (
            torch.from_numpy(np.array(cond, cond.dtype.newbyteorder("="))) if kind in ("float32", "float64") else cond
        )
    elif isinstance(cond, torch.Tensor):
        check_dense("cond", cond)
        check_device("cond", cond, CPU)
        kind = _name(cond.dtype)
    else:
        raise DTypeError(f"cond must be a tensor or an array, got {type(cond).__name__}: use numpy.asarray")
    if kind not in ("float32", "float64"):
        raise DTypeError(
            f"cond must be float32 or float64, got {kind}: convert it to float32, or give class numbers as labels="
        )
    if cond.ndim < 2 or cond.numel() == 0:
        raise ShapeError(
            f"cond must have shape [N, *cond_shape] with at least one axis after N, got {list(cond.shape)}: "
            "use cond[:, None]"
        )
    if len(cond) != count:
        raise DataError(f"cond must have length {count}, one per sample, got {len(cond)}")
    _check_finite("cond", cond)
    return cond.detach().as_subclass(torch.Tensor).contiguous()


def _checked_indices(indices: Any, count: int) -> torch.Tensor:
    checked = _integers("indices", indices)
    outside = (checked < 0) | (checked >= count)
    if outside.any():
        raise DataError(f"indices must be >= 0 and <= {count - 1}, got {int(checked[outside][0])}")
    return checked


def _check_finite(argument: str, x: torch.Tensor) -> None:
    finite = x.isfinite()
    if not finite.all():
        index = _first(~finite)
        raise DataError(f"{argument} must be finite, got {x[index].item()} at index {list(index)}: drop that sample")


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    """Index of the first True."""
    return tuple(torch.nonzero(mask)[0].tolist())
