"""Whether posteriors cover: the true parameters theta [n, d] of n simulations beside L draws [n, L, d] of each one's posterior.

theta_i must be drawn from the prior and draws_i from the posterior given what theta_i simulated. Each answer is a rank among
the L draws, which is uniform on 0 … L for the exact posterior.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import checks, files
from ..errors import ConfigError, DataError, ShapeError, names_keywords, short
from ..execution import noise
from .features import Samples, samples

LEAST = 10  # simulations, five to each of two bins
MOST_BINS = 20


class SBC(NamedTuple):
    """Ranks [n, d] of each parameter among its `draws`, with Pearson's chi-square over `bins` and its p-value, [d] each."""

    ranks: Tensor
    draws: int
    bins: int
    chi_square: Tensor
    p_values: Tensor

    def __repr__(self) -> str:
        values = ", ".join(f"{value:.2g}" for value in self.p_values[:8].tolist())
        more = ", …" * (len(self.p_values) > 8)
        return f"SBC({len(self.ranks)} simulations, {self.draws} draws, {self.bins} bins, p-values {values}{more})"


class TARP(NamedTuple):
    """Expected coverage [L + 1] at each `credibility` [L + 1] from 0 to 1, the ranks [n] behind it, and their p-value."""

    credibility: Tensor
    coverage: Tensor
    ranks: Tensor
    p_value: float

    def __repr__(self) -> str:
        return f"TARP({len(self.ranks)} simulations, {len(self.credibility) - 2} draws, p-value {self.p_value:.2g})"


@names_keywords
def sbc_ranks(theta: Samples, draws: Samples, *, seed: int = 0) -> SBC:
    """Simulation-based calibration (Talts et al. 2018): how many of the L draws are below the true value, by parameter.

    Where the posterior is too narrow the ranks heap at both ends, where it is too wide in the middle, where it is shifted at one
    end. Tested by Pearson's chi-square against the uniform distribution on 0 … L, over 2 to 20 bins, as many as have five
    expected counts each; a p-value is of one parameter, so that of d the least is to be multiplied by d. Ties are broken at
    random, by the seed.

    theta [n, d], draws [n, L, d], n ≥ 10, L ≥ 2. Errors: ShapeError, DTypeError, DataError (too few, not finite).
    """
    a, b = _simulations(theta, draws)
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    ranks = _ranks(a, b, seed)
    bins, chi_square, p_values = _uniformity(ranks, b.shape[1])
    return SBC(ranks, b.shape[1], bins, chi_square, p_values)


@names_keywords
def tarp(theta: Samples, draws: Samples, *, seed: int = 0, references: Samples | None = None) -> TARP:
    """Tests of accuracy with random points (Lemos et al. 2023, algorithm 2): the expected coverage of a joint posterior.

    With a reference point r_i for each simulation, its rank is the number of draws nearer to r_i than theta_i is, and the region
    that holds a share α of the draws covers theta_i where its rank is below α (L + 1); expected coverage is the share of
    simulations that it covers, α itself for the exact posterior. Below α for α > ½ and above it for α < ½, the posterior is too
    narrow; the other way about, too wide; a bend to one side is a bias.

    references  [n, d]; default uniform in the box that theta fills, by the seed. Distances are Euclidean in units of that box.
                A posterior that is the prior passes with references that know nothing of the data: give some that do

    theta [n, d], draws [n, L, d], n ≥ 10, L ≥ 2. The p-value is of Pearson's chi-square of the ranks, as in `sbc_ranks`.
    Errors: ShapeError, DTypeError, DataError (too few, not finite).
    """
    a, b = _simulations(theta, draws)
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    low = a.min(0).values
    width = a.max(0).values - low
    width = torch.where(width > 0, width, torch.ones_like(width))
    if references is None:
        u = noise.uniform(len(a), a.shape[1:], seed=seed, stream=noise.PROBES, device=a.device).double()
    else:
        points = samples("references", references)
        if points.shape != a.shape:
            raise ShapeError(f"references must have theta's shape {list(a.shape)}, got {list(points.shape)}")
        u = (points.to(a.device).double() - low) / width
    far, each = (((z - low) / width - r).norm(dim=-1) for z, r in ((a, u), (b, u[:, None])))
    ranks = _ranks(far[:, None], each[:, :, None], seed)
    count = b.shape[1]
    credibility = torch.arange(count + 2, dtype=torch.float64, device=a.device) / (count + 1)
    below = torch.bincount(ranks[:, 0], minlength=count + 1).cumsum(0).double() / len(a)
    coverage = torch.cat([below.new_zeros(1), below])
    return TARP(credibility, coverage, ranks[:, 0], float(_uniformity(ranks, count)[2][0]))


@names_keywords
def coverage_plot(
    path: str | os.PathLike[str], theta: Samples, draws: Samples, *, names: Sequence[str] | None = None, seed: int = 0
) -> Any:
    """A picture of both: for each parameter how the ranks' distribution function departs from a uniform one's, and the expected
    coverage by credibility. Of an exact posterior each curve stays in the grey band with a probability of 95 %
    (±1.36/√n: Kolmogorov's). `names` are the parameters'. Returns the figure (matplotlib); the file is written whole or not at
    all.

    Errors: those of `sbc_ranks`, ConfigError (`names`, an unknown file type), ImportError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "coverage_plot needs matplotlib, which is missing: pip install 'fastdiff[metrics]'"
        ) from error
    target = files.path("path", path)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    if target.suffix[1:].lower() not in (valid := figure.canvas.get_supported_filetypes()):
        raise ConfigError(f"path must end in one of .{', .'.join(valid)}, got {files.shown(target)}")
    files.check_writable("path", target)
    found, curve = sbc_ranks(theta, draws, seed=seed), tarp(theta, draws, seed=seed)
    count, parameters = found.ranks.shape
    if names is not None and (isinstance(names, str) or not isinstance(names, Sequence)):
        raise ConfigError(f"names must be a list of names, one for each parameter, got {short(names)}")
    labels = [f"θ{k}" for k in range(parameters)] if names is None else [str(name) for name in names]
    if len(labels) != parameters:
        raise ConfigError(f"names must be {parameters}, one for each parameter, got {short(names)}")
    band = 1.36 / math.sqrt(count)
    left, right = figure.subplots(1, 2)
    levels = np.arange(found.draws + 2) / (found.draws + 1)
    left.axhspan(-band, band, color="0.88")
    left.axhline(0, color="0.4", linewidth=1)
    for k, (label, ranks) in enumerate(zip(labels, found.ranks.T.cpu().numpy())):
        below = np.bincount(ranks, minlength=found.draws + 1).cumsum() / count
        shown = f"{label}  p = {float(found.p_values[k]):.2g}" if parameters <= 8 else None
        left.plot(levels, np.concatenate([[0], below]) - levels, linewidth=1.3, label=shown)
    left.set(xlabel="rank of the true value / draws", ylabel="share of ranks below − uniform", xlim=(0, 1))
    left.set_title(f"SBC ranks, {count} simulations, {found.draws} draws", fontsize=10)
    if parameters <= 8:
        left.legend(fontsize=8)
    credibility = curve.credibility.cpu().numpy()
    right.fill_between(
        credibility, np.clip(credibility - band, 0, 1), np.clip(credibility + band, 0, 1), color="0.88", linewidth=0
    )
    right.plot(credibility, credibility, color="0.4", linewidth=1)
    right.plot(credibility, curve.coverage.cpu().numpy(), linewidth=1.6, label=f"TARP  p = {curve.p_value:.2g}")
    right.set(xlabel="credibility", ylabel="expected coverage", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    right.set_title("coverage of the joint posterior", fontsize=10)
    right.legend(fontsize=8, loc="upper left")
    with files.replacing(target) as handle:
        figure.savefig(handle, dpi=110, format=target.suffix[1:].lower())
    return figure


def _simulations(theta: Any, draws: Any) -> tuple[Tensor, Tensor]:
    """theta [n, d] and draws [n, L, d] as float64, on one device."""
    a, b = samples("theta", theta, LEAST), samples("draws", draws)
    if a.ndim != 2 or b.ndim != 3 or (len(b), b.shape[2]) != tuple(a.shape):
        turned = a.ndim == 2 and b.ndim == 3 and tuple(b.shape[1:]) == tuple(a.shape)
        way = "use draws.transpose(0, 1)" if turned else "stack the draws of each posterior along the second axis"
        raise ShapeError(
            f"theta must be [n, d] and draws [n, L, d], L draws for each of n, got {list(a.shape)} and {list(b.shape)}: {way}"
        )
    if b.shape[1] < 2:
        raise DataError(
            "draws must be two or more of each posterior, as the rank among a single one is even whatever its width, got 1: draw "
            "a hundred"
        )
    return a.double(), b.to(a.device).double()


def _ranks(a: Tensor, b: Tensor, seed: int) -> Tensor:
    """How many of b [n, L, d] are below a [n, d], of those equal a random number of them."""
    ties = (b == a[:, None]).sum(1)
    u = noise.uniform(len(a), a.shape[1:], seed=seed, draw=1, stream=noise.PROBES, device=a.device)
    return (b < a[:, None]).sum(1) + (u.double() * (ties + 1)).long()


def _uniformity(ranks: Tensor, count: int) -> tuple[int, Tensor, Tensor]:
    """Pearson's test of ranks [n, d] on 0 … count: bins, chi-square and p-values [d]."""
    n = len(ranks)
    # of ⌊(L + 1)/bins⌋ ranks or one more each, of which the fewest are to be expected five times
    bins = max(b for b in range(2, MOST_BINS + 1) if b == 2 or (count + 1) // b * n >= 5 * (count + 1))
    places = torch.arange(count + 1, device=ranks.device) * bins // (count + 1)
    expected = torch.bincount(places, minlength=bins).double() * (n / (count + 1))
    counts = torch.stack([torch.bincount(places[column], minlength=bins) for column in ranks.T]).double()
    chi_square = ((counts - expected).square() / expected).sum(1)
    freedom = torch.full_like(chi_square, (bins - 1) / 2)
    return bins, chi_square, torch.special.gammaincc(freedom, chi_square / 2)
