"""Augmentations: random changes of samples that leave their distribution as it is, made anew at each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, ShapeError, choose, short


@dataclass(frozen=True)
class Augmentation:
    """One of your own is a frozen dataclass of plain numbers with `numbers` and __call__(x [B, *shape], u [B, numbers]), u
    uniform on [0, 1): all of its randomness, a function of the seed, the step and the sample alone. Fields of conditions are
    changed by the same u."""

    numbers: ClassVar[int] = 1
    name: ClassVar[str] = ""

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        raise NotImplementedError

    def check(self, shape: Sequence[int]) -> None:
        """Refuse samples of a shape that it does not suit."""

    def config(self) -> dict[str, Any]:
        return {"name": self.name or type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Flip(Augmentation):
    """Mirror half of the samples along an axis of theirs: -1 left to right, -2 upside down."""

    axis: int = -1
    name: ClassVar[str] = "flip"

    def __post_init__(self) -> None:
        checks.integer("axis", self.axis, -3, -1)

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.where((u < 0.5).view(-1, *[1] * (x.ndim - 1)), x.flip(self.axis), x)

    def check(self, shape: Sequence[int]) -> None:
        _check_spatial(self, shape, -self.axis)


@dataclass(frozen=True)
class Crop(Augmentation):
    """Move samples by up to `padding` places along each of their one or two last axes; what comes in is their mirror image."""

    padding: int = 4
    numbers: ClassVar[int] = 2
    name: ClassVar[str] = "crop"

    def __post_init__(self) -> None:
        checks.integer("padding", self.padding, 1, 2**16)

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        spatial = min(x.ndim - 2, 2)
        for k in range(spatial):
            axis, length = x.ndim - 1 - k, x.shape[x.ndim - 1 - k]
            shift = (u[:, k].double() * (2 * self.padding + 1)).floor().long().view(-1, 1) - self.padding
            at = torch.arange(length, device=x.device) + shift  # [B, length]
            at = at.abs()
            at = torch.where(at >= length, 2 * (length - 1) - at, at)
            index = at.view(len(x), *[1] * (axis - 1), length, *[1] * k).expand(x.shape)
            x = x.gather(axis, index)
        return x

    def check(self, shape: Sequence[int]) -> None:
        _check_spatial(self, shape, 1)
        if self.padding >= min(shape[1:][-2:]):
            raise ShapeError(
                f"augment: Crop(padding={self.padding}) moves samples of shape {tuple(shape)} out of sight: use a smaller one"
            )


def _check_spatial(augmentation: Augmentation, shape: Sequence[int], axes: int) -> None:
    if len(shape) < 1 + axes:
        raise ShapeError(
            f"augment: {augmentation!r} is for samples [C, *spatial] with {axes} spatial axes or more, got {tuple(shape)}"
        )


AUGMENTATIONS: dict[str, Augmentation] = {"flip": Flip(), "flip_vertical": Flip(-2), "crop": Crop()}


def get(augment: Any, shape: Sequence[int]) -> tuple[Augmentation, ...]:
    """Augmentations from None, a name, an object, or a sequence of them."""
    if augment is None:
        return ()
    found = []
    for each in augment if isinstance(augment, (list, tuple)) else [augment]:
        if not isinstance(each, Augmentation):
            if callable(each):
                raise ConfigError(
                    f"augment must be an Augmentation, whose randomness is the training's, got {short(each)}: derive from "
                    "fastdiff.data.augment.Augmentation"
                )
            each = AUGMENTATIONS[choose("augment", each, AUGMENTATIONS)]
        each.check(shape)
        found.append(each)
    return tuple(found)
