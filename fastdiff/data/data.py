"""Data sets in memory: raw values with their range, levels and labels (fastdiff.data.readers makes them).

Raw values v in [lo, hi] reach a network in its own `data_range` [a, b]. Plain scaling is linear, lo → a and hi → b.
Values that lie on K levels may instead be dequantised (Theis et al. 2016, §3.1): level k with u ~ U[0, 1) becomes

    x = a + (b − a) (k + u)/K  in [a, b),

so that a density over x bounds the likelihood of the levels. Both keep x inside bin k, whose inverse is `quantise`.
"""

from __future__ import annotations

import math
import numbers
import reprlib
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, DataError, DeviceError, DTypeError, ShapeError

_MOST_BINS = 65536


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

    def fingerprint(self) -> str:
        """A checksum of the values, their range and the labels: whether two sets are the same."""
        text = f"{tuple(self.x.shape)} {self.x.dtype} {self.range} {self.bins}"
        crc = zlib.crc32(self.x.contiguous().numpy().tobytes(), zlib.crc32(text.encode()))
        return f"{crc if self.labels is None else zlib.crc32(self.labels.numpy().tobytes(), crc):08x}"

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
