"""The step table, which every fixed-step sampler becomes: a list of affine rows. numpy only; knows no SDE, no tensor.

    row:  [saves_base]        base ← x
          [calls_network]     h_0 = P(p·x + q·network(in_scale·x, network_time))   P = identity | clamp to `clip`
                              x ← a·x + e·base + Σ_j b_j·h_j + c·z                z ~ N(0, 1), the draw that the row names
          [raw]               x ← x + raw·network, [bounds] x ← clamp(x): operations of their own, in few tables
          [keeps_prediction]  the history takes h_0

h_1, h_2 … are the predictions that earlier rows kept, newest first. A row that calls no network has no h_0: its b starts at h_1.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import checks, files
from .errors import ConfigError

MAX_HISTORY = 4
MAX_ROWS = 4 * 10**6  # a longer table would take many gigabytes on the host

# The columns of StepTable.matrix, which every backend reads: see fastdiff.execution.reference.step for their use.
COLUMNS = (
    "a", "e", "b0", "b1", "b2", "b3", "c", "p", "q", "low", "high", "next_scale", "guidance", "log_slope", "log_mid",
    "known_alpha", "known_sigma", "gain", "cap",
)  # fmt: skip


class Level(NamedTuple):
    """Where a state stands: its process time and x_t = alpha·x0 + sigma·ε."""

    t: float
    alpha: float
    sigma: float

    @property
    def sigma_hat(self) -> float:
        """The noise ratio σ̂ = σ/α."""
        return self.sigma / self.alpha


@dataclass(frozen=True, slots=True)
class Measure:
    """A Langevin step measured from the data (Song et al. 2021, Alg. 4–5): x + δ h_0 + √(2δ) z.

    δ = gain·(‖z‖/‖h_0‖)², at most `cap`, 0 where h_0 = 0; norms of each sample, or their batch means.
    """

    norm: str
    gain: float
    cap: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. Coefficients are float64; see the module's docstring for what they multiply."""

    level: Level
    label: str
    a: float
    b: tuple[float, ...] = ()
    e: float = 0.0
    c: float = 0.0
    calls_network: bool = False
    saves_base: bool = False
    keeps_prediction: bool = False
    clips: bool = False
    network_time: float = math.nan
    in_scale: float = 1.0
    p: float = 0.0
    q: float = 1.0
    measure: Measure | None = None
    log_variance: tuple[float, float] | None = None  # bounds that the network's second half interpolates; replaces c
    raw: float = 0.0  # of the network's output as it is, where h_0 is clipped
    bounds: tuple[float, float] | None = None  # of the state that the row leaves
    guidance: float = 1.0  # the output is guide + guidance·(output − guide), of a second output; 1: there is none

    @property
    def guides(self) -> bool:
        """Whether the row takes a second output of the network."""
        return self.calls_network and self.guidance != 1

    @property
    def finishes(self) -> bool:
        """Whether the row has operations of its own after the step."""
        return self.raw != 0 or self.bounds is not None

    @property
    def draws(self) -> bool:
        """Whether the row uses noise."""
        return self.c != 0 or self.measure is not None or self.log_variance is not None


@dataclass(frozen=True)
class StepTable:
    """A whole run: rows, the level it ends on, the standard deviation of its start (NaN: it needs x_init). Validates itself.

    `prediction` and `time_input` are those that the rows were planned for; None: no one's, such as rows written by hand.
    """

    title: str
    rows: tuple[Row, ...] = field(repr=False)
    end: Level
    prior_std: float
    clip: tuple[float, float] | None = None
    prediction: str | None = field(default=None, repr=False)
    time_input: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("a table needs at least one row")
        predictions, saved = 0, False
        for k, row in enumerate(self.rows):
            call = (row.network_time, row.in_scale, row.p, row.q, row.guidance) if row.calls_network else ()
            if not all(map(math.isfinite, (row.a, row.e, row.c, row.raw, *row.b, *call))):
                raise ConfigError(f"row {k} ({row.label}, t = {row.level.t:g}) has a coefficient that is not finite")
            saved |= row.saves_base
            if row.e != 0 and not saved:
                raise ConfigError(f"row {k} ({row.label}) reads a base state that no row before it saves")
            if len(row.b) > predictions + row.calls_network:
                raise ConfigError(
                    f"row {k} ({row.label}) reads {len(row.b)} predictions, {predictions + row.calls_network} exist"
                )
            if row.measure is not None and not (row.calls_network and len(row.b) == 1):
                raise ConfigError(f"row {k} ({row.label}) measures its step, which takes a network call and one b")
            needs = row.keeps_prediction or row.clips or row.log_variance is not None or row.raw != 0
            if needs and not row.calls_network:
                raise ConfigError(f"row {k} ({row.label}) needs a prediction but does not call the network")
            if row.bounds is not None and not row.bounds[0] < row.bounds[1]:
                raise ConfigError(f"row {k} ({row.label}) must keep x within (lo, hi) with lo < hi, got {row.bounds}")
            if row.clips and self.clip is None:
                raise ConfigError(f"row {k} ({row.label}) clips x0, and the table has no range clip=(lo, hi)")
            if len(row.b) > MAX_HISTORY:
                raise ConfigError(f"row {k} ({row.label}) reads {len(row.b)} predictions, at most {MAX_HISTORY}")
            predictions += row.keeps_prediction

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def calls(self) -> int:
        """Network evaluations of one run."""
        return sum(row.calls_network for row in self.rows)

    @cached_property
    def memory(self) -> int:
        """The most earlier predictions that a row reads."""
        return max(len(row.b) - row.calls_network for row in self.rows)

    @cached_property
    def couples_batch(self) -> bool:
        """Whether some row's step depends on the whole batch."""
        return any(row.measure is not None and row.measure.norm == "batch" for row in self.rows)

    @cached_property
    def guides(self) -> bool:
        """Whether some row takes a second output of the network."""
        return any(row.guides for row in self.rows)

    @cached_property
    def finishing(self) -> dict[int, Row]:
        """The rows that have operations of their own after the step, by number."""
        return {k: row for k, row in enumerate(self.rows) if row.finishes}

    @cached_property
    def times(self) -> tuple[float, ...]:
        """The time that each row gives the network, 0 where it calls none."""
        return tuple(row.network_time if row.calls_network else 0.0 for row in self.rows)

    @cached_property
    def matrix(self) -> NDArray[np.float64]:
        """The numbers that a step reads, float64 [rows, len(COLUMNS)]; they cannot be written, as later runs read them."""
        matrix = self.numbers.view()
        matrix.flags.writeable = False
        return matrix

    @cached_property
    def numbers(self) -> NDArray[np.float64]:
        """The same as torch takes them, which knows no arrays that cannot be written: for reading."""
        after = [*(row.level for row in self.rows[1:]), self.end]
        scales = [row.in_scale if row.calls_network else 1.0 for row in self.rows[1:]]
        lines = []
        for row, level, scale in zip(self.rows, after, [*scales, 1.0]):
            low, high = self.clip if row.clips and self.clip is not None else (-math.inf, math.inf)
            log_low, log_high = row.log_variance or (0.0, 0.0)
            # ½·(f·log_high + (1 − f)·log_low) with f = (v + 1)/2
            slope, mid = (log_high - log_low) / 4, (log_high + log_low) / 4
            gain, cap = (0.0, 0.0) if row.measure is None else (row.measure.gain, row.measure.cap)
            b = [*row.b, 0.0, 0.0, 0.0, 0.0][:MAX_HISTORY]
            lines.append((
                row.a, row.e, *b, row.c, row.p, row.q, low, high, scale, row.guidance, slope, mid, level.alpha, level.sigma, gain,
                cap,
            ))  # fmt: skip
        return np.array(lines)

    def explain(self, limit: int | None = 24) -> str:
        """The table as text; beyond `limit` rows (None: no limit) the middle is left out."""
        head = ["row", "label", "t", "sigma", "network time", "h0", "x <-"]
        lines = [[str(k), *_describe(row)] for k, row in enumerate(self.rows)]
        limit = len(lines) if limit is None else checks.integer("limit", limit, 1, 10**9)
        if len(lines) > limit:
            top = max(limit - limit // 3, 1)
            lines[top : len(lines) - limit // 3] = [["…", f"{len(lines) - limit} rows", "", "", "", "", ""]]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in [head, *lines]]
        drawn = sum(row.draws for row in self.rows)
        facts = [f"{len(self.rows)} rows", f"{self.calls} network calls", f"{drawn} draws"]
        if self.clip is not None:
            facts.append(f"x0 clipped to [{self.clip[0]:g}, {self.clip[1]:g}]")
        start = "x_init" if math.isnan(self.prior_std) else f"N(0, {self.prior_std:g}²)"
        end = f"starts from {start}, ends at t = {self.end.t:g}, sigma = {self.end.sigma:.4g}"
        return "\n".join([self.title, ", ".join(facts), end, "", *text])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A figure of the noise level and the coefficients by row (matplotlib); saved to `path` if given, whole or not at all."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot() needs matplotlib, which is missing: pip install 'fastdiff[demo]'") from error
        figure = Figure(figsize=(9, 6), layout="constrained")
        target = None if path is None else files.path("path", path)
        if target is not None:
            target = target if target.suffix else target.with_name(target.name + ".png")
            if target.suffix[1:].lower() not in (valid := figure.canvas.get_supported_filetypes()):
                raise ConfigError(f"path must end in one of .{', .'.join(valid)}, got {files.shown(target)}")
        top, bottom = figure.subplots(2, 1, sharex=True)
        columns, k = dict(zip(COLUMNS, self.matrix.T)), np.arange(len(self.rows))
        top.semilogy(k, [row.level.alpha for row in self.rows], label="alpha")
        top.semilogy(k, [row.level.sigma for row in self.rows], label="sigma")
        bottom.plot(k, columns["a"] + columns["e"], label="a + e  (state)")
        bottom.plot(k, sum(columns[f"b{j}"] for j in range(MAX_HISTORY)), label="Σ b  (predictions)")
        bottom.plot(k, columns["c"], label="c  (noise)")
        bottom.set_yscale("symlog", linthresh=1e-3)
        bottom.set_xlabel("row")
        top.set_title(self.title, fontsize=9)
        for axes in (top, bottom):
            axes.legend(fontsize=8)
            axes.grid(alpha=0.3)
        if target is not None:
            with files.replacing(target) as handle:
                figure.savefig(handle, dpi=120, format=target.suffix[1:].lower())
        return figure


def _describe(row: Row) -> list[str]:
    """One row's cells, after its number."""
    h0 = ""
    if row.calls_network:
        scale = "x" if row.in_scale == 1 else f"{row.in_scale:.4g}·x"
        net = f"net({scale})" if not row.guides else f"guided({scale}, {row.guidance:.4g})"
        h0 = _sum([(row.p, "x"), (row.q, net)])
        h0 = f"clip({h0})" if row.clips else h0
    start = 0 if row.calls_network else 1
    terms = [(row.a, "x"), (row.e, "base")] + [(b, f"h{j + start}") for j, b in enumerate(row.b)] + [(row.c, "z")]
    update = _sum(terms)
    if row.measure is not None:
        update = f"{_sum(terms[:2])} + δ·h0 + √(2δ)·z, δ = {row.measure.gain:.4g}·(|z|/|h0|)² per {row.measure.norm}"
    if row.log_variance is not None:
        low, high = (math.exp(v / 2) for v in row.log_variance)
        # between -1 and 1 the network's second half is the log variance itself
        update += " + exp(v/2)·z" if row.log_variance == (-1.0, 1.0) else f" + [{low:.4g} … {high:.4g}]·z"
    if row.raw != 0:
        update += f" {'−' if row.raw < 0 else '+'} {abs(row.raw):.5g}·net"
    if row.bounds is not None:
        update = f"clamp({update})"
    marks = ("; base <- x" if row.saves_base else "") + ("; push" if row.keeps_prediction else "")
    time = f"{row.network_time:.6g}" if row.calls_network else ""
    return [row.label, f"{row.level.t:.6g}", f"{row.level.sigma:.5g}", time, h0, update + marks]


def _sum(terms: list[tuple[float, str]]) -> str:
    """`2·x − 0.5·h0`: the terms that are not zero."""
    text = ""
    for value, name in terms:
        if value != 0:
            sign = (" − " if value < 0 else " + ") if text else ("−" if value < 0 else "")
            size = "" if abs(value) == 1 else f"{abs(value):.5g}·"
            text += f"{sign}{size}{name}"
    return text or "0"


@dataclass(frozen=True)
class Tableau:
    """An embedded Runge–Kutta pair whose last stage is the next step's first. Validates itself.

        k_i = f(t + c_i h, y + h Σ_{j<i} a_ij k_j),     y' = y + h Σ_j b_j k_j,     error = h Σ_j e_j k_j,  e = b − b̂

    c      nodes, s of them, from 0 to 1
    a      the rows i = 2 … s of a, of i − 1 numbers each; the last is b
    order  of b; b̂ has one less
    dense  s weights of the fourth-order term of the interpolant (none: cubic Hermite)
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    e: tuple[float, ...]
    dense: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        stages = len(self.c)
        if [len(row) for row in self.a] != list(range(1, stages)):
            raise ConfigError(
                f"a tableau of {stages} nodes c needs rows a of 1, 2, … {stages - 1} numbers, got {self.a}"
            )
        if len(self.e) != stages or len(self.dense) not in (0, stages):
            raise ConfigError(
                f"a tableau of {stages} nodes c needs as many e, and dense or none, got {self.e}, {self.dense}"
            )
        if (self.c[0], self.c[-1]) != (0, 1):
            raise ConfigError(f"a tableau's nodes c must run from 0 to 1, got {self.c}")
        rows = [*zip((f"row {i} of a" for i in range(2, stages + 1)), self.a, self.c[1:]), ("e", self.e, 0.0)]
        for name, row, total in [*rows, ("dense", self.dense, 0.0)]:
            # numbers of 16 digits, rounded again to float64
            if not abs(math.fsum(row) - total) <= 2**-50 * (math.fsum(map(abs, row)) + total):
                raise ConfigError(f"{name} of a tableau must sum to {total:g}, got {math.fsum(row):.17g} of {row}")
