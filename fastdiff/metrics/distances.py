"""How far two sets of samples are from one distribution: x are samples, y is data, both [n, *shape] in one unit.

Each takes tensors, arrays or `fastdiff.Data` (by its raw values), works in float64 where x lies, and does not depend on the
order of the rows, but for rounding and where a seed is said to shuffle them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import checks
from ..data import Data
from ..errors import DataError, names_keywords, warn
from ..execution import noise
from .features import Features, Samples, compared

BLOCK = 2**22  # numbers of a matrix of pairs that stand in memory at once
TIE = 1e-12  # of the largest squared norm: squared distances that differ by less are rounding apart


class Estimate(float):
    """A number that also knows its standard error, `stderr`."""

    stderr: float

    def __new__(cls, value: float, stderr: float) -> Estimate:
        self = super().__new__(cls, value)
        self.stderr = float(stderr)
        return self

    def __getnewargs__(self) -> tuple[float, float]:  # type: ignore[override]
        return float(self), self.stderr

    def __repr__(self) -> str:
        return f"{float(self):.6g} ± {self.stderr:.2g}"


class PrecisionRecall(NamedTuple):
    """Shares of two sets that lie within each other's neighbourhoods (`precision_recall`)."""

    precision: float
    recall: float
    density: float
    coverage: float


class Nearest(NamedTuple):
    """Of each sample its nearest of the data: their distances and indices, and the ratios of first to second distance; [n]."""

    distances: Tensor
    indices: Tensor
    ratios: Tensor

    @property
    def memorized(self) -> float:
        """The share of samples three times closer to their nearest than to the second, which are taken for copies."""
        return float((self.ratios < 1 / 3).double().mean())


@names_keywords
def frechet(x: Samples, y: Samples, *, features: Features = "pixels") -> float:
    """Fréchet distance of the Gaussians with the moments of both sets (Dowson & Landau 1982; of features, Heusel et al. 2017):

        |μ_x − μ_y|² + tr(A + B − 2 (A^½ B A^½)^½),   A, B the covariances (n − 1)⁻¹ Σ (x_i − μ_x)(x_i − μ_x)ᵀ

    It is a square, in the features' unit squared. With A = R_xᵀ R_x the last trace is the sum of the singular values of
    R_x R_yᵀ, which asks for no root of a covariance and holds for singular ones. Exact for the sets given, and biased upward as
    an estimate from n samples, by about 1/n: compare only values of one n.

    features  "pixels": the samples' own numbers; "classifier": the last hidden layer of a `classifier` trained on y, a
              labelled `fastdiff.Data`; a function [n, *shape] -> [n, d]; a torch.nn.Module (called in evaluation mode on
              batches); or a name registered with torch-fidelity, for bytes [n, 1 or 3, H, W]. None of it downloads anything

    Errors: ShapeError, DTypeError (bytes beside floats), DataError (too few, not finite), ConfigError. Warns where two sets
    look like two units, and where there are no more samples than numbers.
    """
    a, b = compared(x, y, features, (2, 2))
    fewest, d = min(len(a), len(b)), a.shape[1]
    if fewest <= d:
        warn(
            f"the Fréchet distance of {d} numbers from {fewest} samples rests on a singular covariance, and is biased upward by "
            "much: give more samples, other features, or take kernel()"
        )
    factors = []
    for rows in (a, b):
        centred = (rows - rows.mean(0)) / math.sqrt(len(rows) - 1)
        factors.append(torch.linalg.qr(centred, mode="r").R if len(rows) > d else centred)
    cross = torch.linalg.svdvals(factors[0] @ factors[1].T).sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    spread = factors[0].square().sum() + factors[1].square().sum()
    return max(0.0, float(mean + spread - 2 * cross))


@names_keywords
def kernel(x: Samples, y: Samples, *, features: Features = "pixels") -> Estimate:
    """Kernel distance: the unbiased estimate of MMD² with k(u, v) = (u·v/d + 1)³ (Bińkowski et al. 2018).

        Σ_{i≠j} k(x_i, x_j)/n(n − 1) + Σ_{i≠j} k(y_i, y_j)/m(m − 1) − 2 Σ_{ij} k(x_i, y_j)/nm

    Over all pairs, in blocks. Its expectation does not depend on n, and is 0 for equal distributions, so that estimates fall
    below 0 too. stderr by the jackknife, one sample left out at a time (Efron & Stein 1981), which is at most too large: of
    equal distributions by √2. k grows with the numbers' unit. `features` and errors as of `frechet`.
    """
    a, b = compared(x, y, features, (3, 3))
    n, m = len(a), len(b)
    within_a, within_b = (_kernel_sums(z, z)[0] - _cubic(z.square().sum(1), z) for z in (a, b))
    across_a, across_b = _kernel_sums(a, b)

    def mmd(sum_a: Tensor, sum_b: Tensor, across: Tensor, n: int, m: int) -> Tensor:
        return sum_a / (n * (n - 1)) + sum_b / (m * (m - 1)) - 2 * across / (n * m)

    sum_a, sum_b, across = within_a.sum(), within_b.sum(), across_a.sum()
    without_a = mmd(sum_a - 2 * within_a, sum_b, across - across_a, n - 1, m)
    without_b = mmd(sum_a, sum_b - 2 * within_b, across - across_b, n, m - 1)
    variance = (n - 1) * without_a.var(correction=0) + (m - 1) * without_b.var(correction=0)
    return Estimate(float(mmd(sum_a, sum_b, across, n, m)), math.sqrt(float(variance)))


def _cubic(product: Tensor, rows: Tensor) -> Tensor:
    return (product / rows.shape[1] + 1) ** 3


def _kernel_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j k(a_i, b_j) [n] and Σ_i k(a_i, b_j) [m]."""
    by_a, by_b = [], a.new_zeros(len(b))
    for piece in a.split(max(1, BLOCK // len(b))):
        block = _cubic(piece @ b.T, a)
        by_a.append(block.sum(1))
        by_b += block.sum(0)
    return torch.cat(by_a), by_b


@names_keywords
def precision_recall(x: Samples, y: Samples, *, k: int = 3, features: Features = "pixels") -> PrecisionRecall:
    """Precision and recall of Kynkäänniemi et al. (2019), density and coverage of Naeem et al. (2020).

    A ball stands about each point of a set, as wide as the distance to its k-th neighbour there, rim and ties included:
    precision is the share of x in a ball of y, recall the share of y in a ball of x, density the mean number of balls of y
    that hold a sample, over k, and coverage the share of y whose ball holds a sample. All depend on n, m and k: compare with
    as many of the data. Errors: those of `frechet`, ConfigError (k ≥ n or m).
    """
    a, b = compared(x, y, features, (2, 2))
    k = checks.integer("k", k, 1, min(len(a), len(b)) - 1)
    centre = b.mean(0)
    a, b = a - centre, b - centre
    radius_a, radius_b = _radii(a, k), _radii(b, k)
    inside_b, inside_a = [], a.new_zeros(len(b), dtype=torch.bool)
    covered = torch.zeros_like(inside_a)
    for _, block in _squares(a, b):
        held = block <= radius_b
        inside_b.append(held.sum(1))
        covered |= held.any(0)
    for rows, block in _squares(b, a):
        inside_a[rows] = (block <= radius_a).any(1)
    balls = torch.cat(inside_b).double()
    shares = float((balls > 0).double().mean()), float(inside_a.double().mean())
    return PrecisionRecall(*shares, float(balls.mean()) / k, float(covered.double().mean()))


def _squares(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a and their |a_i − b_j|², by products; a and b are centred, so that little cancels."""
    norms = b.square().sum(1)
    size = max(1, BLOCK // len(b))
    for start in range(0, len(a), size):
        rows = slice(start, start + size)
        piece = a[rows]
        yield rows, torch.addmm(piece.square().sum(1)[:, None] + norms, piece, b.T, alpha=-2).clamp_(min=0)


def _radii(rows: Tensor, k: int) -> Tensor:
    """The squared distance of each to its k-th neighbour among the others, widened by what rounding may take."""
    found = []
    for piece, block in _squares(rows, rows):
        itself = torch.arange(len(block), device=rows.device)
        block[itself, itself + piece.start] = math.inf
        found.append(block.kthvalue(k).values)
    return torch.cat(found) + TIE * rows.square().sum(1).max()


@names_keywords
def nearest(x: Samples, data: Samples, *, features: Features = "pixels") -> Nearest:
    """The nearest of the training data to each sample, by Euclidean distance: whether a model gives back what it was shown.

    `.memorized` is the share of samples whose nearest is three times closer than their second nearest (Yoon et al. 2023): of
    held-out data it says how much of that is chance. A sample that equals one of the data has ratio 0, also where the data
    hold it twice. Copies beside copies in the data hide what was copied from both. Errors: those of `frechet`.
    """
    a, b = compared(x, data, features, (1, 2), ("x", "data"))
    centre = b.mean(0)
    squares, index = [], []
    for _, block in _squares(a - centre, b - centre):
        found = block.topk(2, largest=False)
        index.append(found.indices)
        squares.append(found.values)
    both = torch.cat(index)
    # of the two by their own differences, as products leave half of the digits of a short distance
    distance = torch.stack([(a - b[both[:, place]]).square().sum(1).sqrt() for place in (0, 1)], 1)
    order = distance.argsort(stable=True, dim=1)
    first, second = distance.gather(1, order).unbind(1)
    return Nearest(first, both.gather(1, order)[:, 0], torch.where(first > 0, first / second, 0.0))


@names_keywords
def sliced_wasserstein(
    x: Samples, y: Samples, *, projections: int = 500, seed: int = 0, features: Features = "pixels"
) -> Estimate:
    """Sliced Wasserstein distance, the root of the mean of W₂²(⟨v, x⟩, ⟨v, y⟩) over unit vectors v (Bonneel et al. 2015).

    Along a line W₂ is exact, also of sets of unequal size: it couples their quantiles. The vectors are a function of the seed.
    In the features' unit; a set moved by s is |s|/√d away. stderr is that of the mean over vectors alone. Biased upward for
    few samples: compare with as many of the data. Errors: those of `frechet`.
    """
    a, b = compared(x, y, features, (1, 1))
    count, seed = checks.integer("projections", projections, 2, 10**7), checks.integer("seed", seed, 0, 2**64 - 1)
    pairs = None if len(a) == len(b) else _coupling(len(a), len(b), a.device)
    squares = []
    for start in range(0, count, size := max(1, BLOCK // (len(a) + len(b)))):
        drawn = min(size, count - start)
        v = noise.normal(
            drawn, (a.shape[1],), seed=seed, first_sample=start, stream=noise.PROBES, device=a.device
        ).double()
        v = (v / v.norm(dim=1, keepdim=True)).T
        u, w = (a @ v).sort(0).values, (b @ v).sort(0).values
        if pairs is None:
            squares.append((u - w).square().mean(0))
        else:
            first, second, weight = pairs
            squares.append(weight @ (u[first] - w[second]).square())
    square = torch.cat(squares)
    distance = math.sqrt(float(square.mean()))
    spread = float(square.std()) / math.sqrt(count)
    return Estimate(distance, spread / (2 * distance) if distance > 0 else 0.0)


def _coupling(n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which of n and of m sorted numbers share a piece of quantiles, and its width: the pieces end at each i/n and j/m."""
    ends = torch.cat([torch.arange(n + 1, device=device) * m, torch.arange(m + 1, device=device) * n]).unique()
    return ends[:-1] // m, ends[:-1] // n, ends.diff().double() / (n * m)


@names_keywords
def c2st(x: Samples, y: Samples, *, features: Features = "pixels", seed: int = 1, folds: int = 5) -> Estimate:
    """Classifier two-sample test (Lopez-Paz & Oquab 2017): the accuracy with which a network tells x from y on data that it was
    not trained on, ½ where it cannot, 1 where it always can.

    By the settings of the benchmark of simulation-based inference (Lueckmann et al. 2021, sbibm), and so with its numbers:
    both scaled by x's means and deviations; scikit-learn's MLPClassifier of two layers of 10 d units, ReLU, Adam, seed 1; the
    mean of five shuffled folds. float32 where both sets are. A column that is constant in x is scaled by 1. Time grows as d²,
    so that hundreds of numbers want `features`. stderr is binomial, √(a (1 − a)/2n).

    Errors: DataError (not as many of x as of y: chance would not be ½), those of `frechet`; ImportError without scikit-learn.
    """
    seed = checks.integer("seed", seed, 0, 2**32 - 1)
    folds = checks.integer("folds", folds, 2, 10**6)
    a, b = compared(x, y, features, (folds, folds))
    if len(a) != len(b):
        raise DataError(
            f"x and y must be as many for c2st, whose ½ is chance, got {len(a)} and {len(b)}: take {min(len(a), len(b))} of each"
        )
    if _single(x) and _single(y):
        a, b = a.float(), b.float()
    try:
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ImportError as error:
        raise ImportError("c2st needs scikit-learn, which is missing: pip install 'fastdiff[metrics]'") from error
    mean, std = a.mean(0), a.std(0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    both = torch.cat([(a - mean) / std, (b - mean) / std]).cpu().numpy()
    whose = np.repeat([0.0, 1.0], len(a))
    width = 10 * both.shape[1]
    network = MLPClassifier((width, width), activation="relu", solver="adam", max_iter=10000, random_state=seed)
    scores = cross_val_score(network, both, whose, cv=KFold(folds, shuffle=True, random_state=seed))
    accuracy = float(np.mean(scores))
    return Estimate(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(both)))


def _single(x: Samples) -> bool:
    return str((x.x if isinstance(x, Data) else x).dtype).removeprefix("torch.") in ("float32", "float16", "bfloat16")
