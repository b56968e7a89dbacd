"""Linear operators y = A x of batches [B, *data_shape], with their adjoints: few, and each one line of algebra."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, DTypeError, ShapeError, short
from ..execution import tensor_checks

ROWS = 16  # of a product with a matrix that BLAS is given at a time


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix, each row the same bits among any others: BLAS sums in another order for another number of rows, and alone for
    one batch, so it is given batches of as many rows, two at the least."""
    blocks = max(2, -(-len(x) // ROWS))
    rows = torch.nn.functional.pad(x, (0, 0, 0, blocks * ROWS - len(x))).view(blocks, ROWS, -1)
    return torch.bmm(rows, matrix.expand(blocks, *matrix.shape)).flatten(0, 1)[: len(x)]


class Operator:
    """Base: `A(x)` [B, *] -> [B, *m] and `A_adjoint(y)`; `second @ first` is the one after the other."""

    def A(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def A_adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        return self.A(x)

    def __matmul__(self, first: Any) -> Composed:
        return Composed(self, first)

    def __rmatmul__(self, second: Any) -> Composed:
        return Composed(second, self)


class Composed(Operator):
    """A x = second(first(x))."""

    def __init__(self, second: Any, first: Any) -> None:
        for operator in (second, first):
            if not callable(getattr(operator, "A", None)) or not callable(getattr(operator, "A_adjoint", None)):
                raise ConfigError(
                    f"second @ first is of objects with A(x) and A_adjoint(y), got {short(operator)}: use "
                    "inverse.Matrix(values), or one function of x for both"
                )
        self.second, self.first = second, first

    def A(self, x: Tensor) -> Tensor:
        return self.second.A(self.first.A(x))  # type: ignore[no-any-return]

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self.first.A_adjoint(self.second.A_adjoint(y))  # type: ignore[no-any-return]


class Matrix(Operator):
    """A matrix [m, D] on the D numbers of each sample."""

    def __init__(self, values: Tensor, shape: Sequence[int] | None = None) -> None:
        """shape   of a sample, where it has more than one axis: D is their product"""
        tensor_checks.check_dense("operator", values)
        tensor_checks.check_floating("operator", values)
        if values.ndim != 2:
            raise ShapeError(f"operator must be a matrix [m, D], got shape {tuple(values.shape)}")
        tensor_checks.check_finite("operator", values)
        self.values, self.shape = values, (values.shape[1],) if shape is None else tuple(shape)
        if math.prod(self.shape) != values.shape[1]:
            raise ShapeError(
                f"operator has {values.shape[1]} columns, and a sample of shape {self.shape} has {math.prod(self.shape)} numbers"
            )

    def A(self, x: Tensor) -> Tensor:
        if x[:1].numel() != self.values.shape[1]:
            raise ShapeError(
                f"operator has {self.values.shape[1]} columns, and a sample of shape {tuple(x.shape[1:])} has {x[:1].numel()} "
                "numbers"
            )
        self.shape = tuple(x.shape[1:])
        return product(x.flatten(1), self.values.to(x).T)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return product(y, self.values.to(y)).view(len(y), *self.shape)


class Mask(Operator):
    """The numbers of a sample where `mask` is True, [B, k]; the mask may broadcast over a sample, such as [1, H, W]."""

    def __init__(self, mask: Tensor) -> None:
        tensor_checks.check_dense("mask", mask)
        if mask.dtype != torch.bool:
            raise DTypeError(
                f"mask must be a tensor of bool, True where y knows the data, got {mask.dtype}: use mask > 0"
            )
        if not bool(mask.any()):
            raise ConfigError("mask must be True somewhere: with nothing known, sample without guidance")
        self.mask = mask
        self.shape: tuple[int, ...] = tuple(mask.shape)

    def A(self, x: Tensor) -> Tensor:
        self.shape = tuple(x.shape[1:])
        return x[:, self._expanded(x)]

    def A_adjoint(self, y: Tensor) -> Tensor:
        out = y.new_zeros((len(y), *self.shape))
        out[:, self._expanded(out)] = y
        return out

    def _expanded(self, x: Tensor) -> Tensor:
        try:
            return self.mask.to(x.device).expand(x.shape[1:])
        except RuntimeError as error:
            raise ShapeError(
                f"mask must broadcast to one sample of shape {tuple(x.shape[1:])}, got shape {tuple(self.mask.shape)}"
            ) from error


class Downsampling(Operator):
    """Means of blocks of factor × … × factor over all axes after the first of a sample [C, *], whose lengths it must divide."""

    def __init__(self, factor: int) -> None:
        self.factor = checks.integer("factor", factor, 1, 2**16)

    def A(self, x: Tensor) -> Tensor:
        if x.ndim < 3:
            raise ShapeError(f"Downsampling is of samples [C, L, …], got shape {tuple(x.shape[1:])}: use unsqueeze")
        if any(length % self.factor for length in x.shape[2:]):
            raise ShapeError(
                f"factor={self.factor} must divide the lengths of a sample's axes, got {tuple(x.shape[1:])}"
            )
        for axis in range(2, x.ndim):
            blocks = x.unflatten(axis, (-1, self.factor))
            # torch adds the few numbers of a block one block after another
            few = self.factor <= 16
            x = functools.reduce(torch.add, blocks.unbind(axis + 1)) if few else blocks.sum(axis + 1)
        return x / self.factor ** (x.ndim - 2)

    def A_adjoint(self, y: Tensor) -> Tensor:
        out = y / self.factor ** (y.ndim - 2)
        for axis in range(2, y.ndim):
            out = torch.stack([out] * self.factor, axis + 1).flatten(axis, axis + 1)
        return out


class Blur(Operator):
    """Convolution of every channel with a kernel [k, …] around its middle over a sample's last axes, periodic at the ends."""

    def __init__(self, kernel: Tensor) -> None:
        tensor_checks.check_floating("kernel", kernel)
        tensor_checks.check_finite("kernel", kernel)
        if kernel.ndim == 0:
            raise ShapeError("kernel must have an axis for each that it blurs, got one number")
        self.kernel = kernel

    @classmethod
    def gaussian(cls, sigma: float, axes: int = 2) -> Blur:
        """A normal density of standard deviation `sigma` samples, cut at three of them, of sum 1."""
        reach = math.ceil(3 * checks.number("sigma", sigma, 0, above=True))
        line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
        kernel = line
        for _ in range(checks.integer("axes", axes, 1, 8) - 1):
            kernel = kernel[..., None] * line
        return cls(kernel / kernel.sum())

    def A(self, x: Tensor) -> Tensor:
        return self._filtered(x, False)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self._filtered(y, True)

    def _filtered(self, x: Tensor, conjugated: bool) -> Tensor:
        axes = tuple(range(-self.kernel.ndim, 0))
        lengths = tuple(x.shape[axis] for axis in axes)
        if x.ndim < self.kernel.ndim + 1 or any(k > n for k, n in zip(self.kernel.shape, lengths)):
            raise ShapeError(
                f"kernel {tuple(self.kernel.shape)} must fit into a sample's last axes {tuple(x.shape[1:])}: take a smaller "
                "one, as of Blur.gaussian(sigma, axes)"
            )
        if math.prod(x.shape[: -self.kernel.ndim]) == 1:  # of which alone the transform back rounds in another way
            return self._filtered(torch.cat((x, x)), conjugated)[:1]
        wide = x.new_zeros(lengths)
        wide[tuple(slice(k) for k in self.kernel.shape)] = self.kernel.to(x)
        middle = tuple(-(k // 2) for k in self.kernel.shape)
        a, b = torch.fft.rfftn(torch.roll(wide, middle, axes), dim=axes), torch.fft.rfftn(x, dim=axes)
        imaginary = -a.imag if conjugated else a.imag
        # a product of complex tensors rounds the last few numbers of a batch in another way than the others
        both = torch.complex(a.real * b.real - imaginary * b.imag, a.real * b.imag + imaginary * b.real)
        return torch.fft.irfftn(both, s=lengths, dim=axes)


class Fourier(Operator):
    """Frequencies of the orthonormal discrete Fourier transform over the axes of `mask` [k, …], True where they are measured:
    real and imaginary parts, [B, *, n, 2], of every channel."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = Mask(mask).mask

    def A(self, x: Tensor) -> Tensor:
        axes = tuple(range(-self.mask.ndim, 0))
        if tuple(x.shape[x.ndim - self.mask.ndim :]) != tuple(self.mask.shape) or x.ndim < self.mask.ndim + 1:
            raise ShapeError(
                f"mask {tuple(self.mask.shape)} must have the lengths of a sample's last axes {tuple(x.shape[1:])}"
            )
        return torch.view_as_real(torch.fft.fftn(x, dim=axes, norm="ortho")[..., self.mask.to(x.device)])

    def A_adjoint(self, y: Tensor) -> Tensor:
        values = torch.view_as_complex(y.contiguous())
        full = values.new_zeros((*values.shape[:-1], *self.mask.shape))
        full[..., self.mask.to(y.device)] = values
        return torch.fft.ifftn(full, dim=tuple(range(-self.mask.ndim, 0)), norm="ortho").real


class Grayscale(Operator):
    """A weighted mean of a sample's channels, [B, 1, *]; `weights` one for each, of sum 1: equal, unless given."""

    def __init__(self, weights: Sequence[float] | None = None) -> None:
        self.weights = None if weights is None else checks.sequence("weights", weights)
        self.channels = 0 if self.weights is None else len(self.weights)
        if self.weights is not None and not math.isclose(math.fsum(self.weights), 1, rel_tol=1e-3):
            raise ConfigError(f"weights must sum to 1, got {short(self.weights)}: divide them by their sum")

    def A(self, x: Tensor) -> Tensor:
        self.channels = x.shape[1]
        return (x * self._weights(x)).sum(1, keepdim=True)

    def A_adjoint(self, y: Tensor) -> Tensor:
        if self.channels == 0:
            raise ShapeError("Grayscale() knows the number of channels from A(x): call that first, or give weights")
        return y * self._weights(y)

    def _weights(self, x: Tensor) -> Tensor:
        weights = self.weights or [1 / self.channels] * self.channels
        if len(weights) != self.channels:
            raise ShapeError(f"weights must be one for each of {self.channels} channels, got {len(weights)}")
        return x.new_tensor(weights).view(-1, *[1] * (x.ndim - 2))
