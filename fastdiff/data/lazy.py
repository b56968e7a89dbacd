"""Data that are read while a training runs: a `torch.utils.data.Dataset`, a folder of pictures."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import checks
from ..errors import DataError, DTypeError, short
from .data import Data

SOME = 1024  # samples that are read before a training, to know the shape, labels and scale


class LazyData:
    """N samples that a dataset gives one by one, read when they are asked for; `train` takes it like a `Data`.

    dataset     with a length; item i is x, (x, label), (x, label, cond), or a dict with "x" and "label" or "cond": numpy arrays
                or tensors as in `Data`. The same i must give the same item each time: for random changes there is
                train(augment=)
    range, bins, num_classes    as in `Data`: the range is needed for floats, num_classes where there are labels
    workers     processes that read ahead; 0: none, samples are read in the training itself

    `some` is a Data of up to 1024 samples, evenly spaced, by which a training knows the shape and, for vectors and conditions,
    the mean and standard deviation. Each batch is checked as a `Data` is. Errors: DataError, and those of `Data`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        range: tuple[float, float] | None = None,
        bins: int | None = None,
        num_classes: int | None = None,
        class_names: Sequence[str] = (),
        workers: int = 0,
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DTypeError(
                f"dataset must have a length and items, got {type(dataset).__name__}: write a torch.utils.data.Dataset"
            )
        self.dataset, self._length = dataset, len(dataset)
        if not self._length:
            raise DataError("dataset must have at least one item, got none")
        self.workers = checks.integer("workers", workers, 0, 1024)
        self._options = {"range": range, "bins": bins, "num_classes": num_classes, "class_names": tuple(class_names)}
        first = _item(dataset[0])
        if range is None and first[0].is_floating_point():
            raise DataError(
                "range must be given for a dataset of floats, as it is not read as a whole: give range=(lo, hi)"
            )
        if num_classes is None and first[1] is not None and not class_names:
            raise DataError("num_classes must be given for a dataset with labels, as it is not read as a whole")

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"LazyData({self._length} samples, of which {self.some.explain()})"

    @cached_property
    def some(self) -> Data:
        """Up to 1024 samples, evenly spaced."""
        step = -(-self._length // SOME)
        return self._data([_item(self.dataset[i]) for i in range(0, self._length, step)])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.some.shape

    @property
    def range(self) -> tuple[float, float]:
        return self.some.range  # type: ignore[return-value]

    @property
    def bins(self) -> int | None:
        return self.some.bins

    def fingerprint(self) -> str:
        """A checksum of `some` and of the length."""
        return f"{self.some.fingerprint()}-{self._length}"

    def parts(self, order: Iterator[Tensor]) -> Iterator[Data]:
        """The samples of each of the index tensors in `order`, which the workers read ahead."""
        if not self.workers:
            for index in order:
                yield self._data([_item(self.dataset[i]) for i in index.tolist()])
            return
        loader = DataLoader(
            self.dataset, batch_sampler=_Order(order), num_workers=self.workers, collate_fn=_items,
            generator=torch.Generator(),
        )  # fmt: skip
        for items in loader:
            yield self._data(items)

    def _data(self, items: list[tuple[Tensor, Any, Any]]) -> Data:
        shapes = {tuple(x.shape) for x, *_ in items}
        if len(shapes) > 1:
            raise DataError(f"dataset must have items of one shape, got {' and '.join(map(str, sorted(shapes)[:2]))}")
        beside = []
        for k, name in ((1, "labels"), (2, "cond")):
            found = [item[k] for item in items if item[k] is not None]
            if len(found) not in (0, len(items)):
                raise DataError(f"dataset must have {name} at all of its items or at none")
            beside.append(found or None)
        labels, cond = beside
        return Data(
            torch.stack([x for x, *_ in items]),
            None if labels is None else torch.tensor([_class_number(label) for label in labels]),
            cond=None if cond is None else torch.stack([torch.as_tensor(np.asarray(c)) for c in cond]),
            **self._options,
        )


class _Order:
    """Lists of indices, as DataLoader asks for them."""

    def __init__(self, order: Iterator[Tensor]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[int]]:
        return (index.tolist() for index in self.order)


def _items(items: list[Any]) -> list[tuple[Tensor, Any, Any]]:
    return [_item(item) for item in items]


def _item(item: Any) -> tuple[Tensor, Any, Any]:
    """(x, label, cond) of an item."""
    if isinstance(item, Mapping):
        if "x" not in item:
            raise DataError(f'dataset must give "x" in its items, got {", ".join(map(str, item)):.60}')
        x, label, cond = item["x"], item.get("label"), item.get("cond")
    elif isinstance(item, (tuple, list)):
        x, label, cond = (*item, None, None)[:3]
    else:
        x, label, cond = item, None, None
    x = torch.as_tensor(x if isinstance(x, Tensor) else np.asarray(x))
    return x, label, cond


def _class_number(label: Any) -> int:
    try:
        return operator.index(label)
    except TypeError as error:
        raise DTypeError(
            f"dataset must give class numbers as labels, integers, got {short(label, 40)}: convert it with int(), or give "
            'vectors as "cond"'
        ) from error


class Pictures(Dataset):  # type: ignore[type-arg]
    """Pictures of a folder, read and decoded one by one."""

    def __init__(self, read: Any, frames: Sequence[tuple[Any, int, int]], labels: Sequence[int] | None) -> None:
        self.read, self.frames, self.labels = read, frames, labels

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> Any:
        file, frame, count = self.frames[i]
        x = np.array(self.read(file, frame, count))  # Pillow's own cannot be written to
        return x if self.labels is None else (x, self.labels[i])
