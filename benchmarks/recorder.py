"""What every benchmark does with its measurements: take them in turns, make ratios of neighbours, write a CSV."""

import csv
import functools
import gc
import importlib.metadata
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import provenance
import torch
from cases import CPU, Clock, clock

from fastdiff.execution import cuda_graph

# One row a measurement. `ours` and `theirs` are medians in the unit that `metric` names; the ratios are theirs by ours.
COLUMNS = (
    "device", "threads", "group", "case", "opponent", "n", "metric", "ours", "theirs", "ratio_p20", "ratio_p50", "ratio_p80",
    "rounds", "commit", "torch", "version", "date",
)  # fmt: skip
KEY = ("group", "case", "opponent", "threads", "n", "metric")  # two rows that share it are the same measurement
Row = dict[str, Any]
Run = Callable[[], object]
T = TypeVar("T")


def is_cuda(device: torch.device) -> bool:
    """Whether measurements are a GPU's."""
    return device.type == "cuda"


class Recorder:
    """The rows of one device.

    commit  of the sources, as git names it unless it is given
    quick   the numbers are of a try, and never in the file of the device's results
    """

    def __init__(self, device: torch.device = CPU, commit: str = "", quick: bool = False) -> None:
        self.cuda = is_cuda(device)
        name = torch.cuda.get_device_name(device) if self.cuda else _processor()
        self.name = re.sub(r"[^\w.-]+", "-", name) + ("-quick" if quick else "")
        self.commit = commit or provenance.commit()
        self.rows: list[Row] = []

    def row(
        self, group: str, case: str, n: int, metric: str, ours: Sequence[float], opponent: str = "",
        theirs: Sequence[float] | None = None,
    ) -> float:  # fmt: skip
        """A row of measurements, those of two systems paired; the median of ours, or of the ratios theirs by ours."""
        value = statistics.median(ours)
        row = {
            **dict.fromkeys(COLUMNS, ""), "device": self.name, "threads": "" if self.cuda else torch.get_num_threads(),
            "group": group, "case": case, "opponent": opponent, "n": n, "metric": metric, "ours": f"{value:.5g}",
            "theirs": "" if theirs is None else f"{statistics.median(theirs):.5g}",
            "rounds": len(ours) if len(ours) > 1 else "", "commit": self.commit, "torch": torch.__version__,
            "version": _version(opponent), "date": date.today().isoformat(),
        }  # fmt: skip
        if theirs is not None and len(ours) > 1:
            ratios = [b / a for a, b in zip(ours, theirs)]
            value = statistics.median(ratios)
            low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
            row |= {"ratio_p20": round(low, 2), "ratio_p50": round(value, 2), "ratio_p80": round(high, 2)}
        self.rows.append(row)
        return value

    def pairs(self, group: str, case: str, n: int, metric: str, times: dict[str, list[float]]) -> dict[str, float]:
        """A row for each opponent of "ours", and the ratios."""
        opponents = [name for name in times if name != "ours"]
        return {name: self.row(group, case, n, metric, times["ours"], name, times[name]) for name in opponents}

    def save(self, folder: Path) -> Path:
        """The rows in <folder>/<device>.csv, in the place of what was there of the same measurements, or else in the
        repository's results: rows of what was not measured now are kept, if they say what they measured."""
        provenance.refuse_unclean(folder, self.commit)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.csv"
        known = next((p for p in (path, provenance.RESULTS / path.name) if p.exists()), None)
        before = [row for row in (read(known) if known else []) if None not in map(row.get, KEY)]
        rows = [{name: row.get(name) or "" for name in COLUMNS} for row in before] + self.rows
        latest = {tuple(str(row[name]) for name in KEY): row for row in rows}
        whole = path.with_suffix(".part")  # who is cut off while it writes leaves the file of before
        with whole.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(latest.values())
        whole.replace(path)
        return path


def shown(row: Row) -> str:
    """A row as a line of text."""
    theirs = f" against {row['theirs']:>10}" if row["theirs"] else ""
    if row["ratio_p50"] != "":
        theirs += f" {row['ratio_p50']:7.2f}x [{row['ratio_p20']:.2f}-{row['ratio_p80']:.2f}]"
    what = f"{row['group']:22} {row['case']:32} {row['threads']:>2} {row['n']:>11,}  {row['metric']:36}"
    return f"{what} {row['ours']:>10}{theirs}  {row['opponent']}".rstrip()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*\S)", info.read_text() if info.exists() else "")
    return found[1] if found else platform.machine()


def _version(opponent: str) -> str:
    """The opponent's, where it is a package; else the machine's Python and cores."""
    with suppress(importlib.metadata.PackageNotFoundError, ValueError):
        return importlib.metadata.version(opponent)
    return f"Python {platform.python_version()}, {os.cpu_count()} cores"


def turns(systems: dict[str, Callable[[], T]], seconds: float, least: int = 4, most: int = 40) -> dict[str, list[T]]:
    """What the systems measure of themselves in turns, A B, B A, …, for so long."""
    times: dict[str, list[T]] = {name: [] for name in systems}
    gc.collect()
    gc.disable()  # as timeit does: a collection would fall on whoever is at it
    try:
        with warnings.catch_warnings(action="ignore"):  # the opponents'
            began, rounds = time.monotonic(), 0
            while rounds < least or (rounds < most and time.monotonic() - began < seconds):
                for name in list(systems) if rounds % 2 else reversed(list(systems)):
                    times[name].append(systems[name]())
                rounds += 1
    finally:
        gc.enable()
    return times


class Stopwatch:
    """Microseconds: of a GPU by its own events, of whole runs and of a CPU by `clock`."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = is_cuda(device)
        self.settle = functools.partial(torch.cuda.synchronize, device) if self.cuda else lambda: None

    def whole(self, run: Run, calls: int = 1) -> float:
        self.settle()
        now = time.perf_counter if self.cuda else clock
        began = now()
        for _ in range(calls):
            run()
        self.settle()
        return (now() - began) / calls * 1e6

    def batch(self, run: Run, calls: int) -> float:
        """One call's part of a batch, from when the device begins it to when it is done."""
        if not self.cuda:
            return self.whole(run, calls)
        self.settle()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls * 1e3

    def batches(self, run: Run, calls_each: int = 1) -> Callable[[], float]:
        """A measurement of `run`, which is `calls_each` calls: batches of 4 ms on a GPU, 0.2 ms on a CPU, warmed up."""
        warm, least = (5, 4000.0) if self.cuda else (1, 200.0)
        self.batch(run, warm)
        calls = min(max(1, round(least / max(self.batch(run, warm), 0.1))), 400)
        return lambda: self.batch(run, calls) / calls_each


def replayed(run: Run, calls: int, device: torch.device) -> Run:
    """So many calls as one CUDA graph: what they cost without being launched one by one."""

    def body() -> None:
        for _ in range(calls):
            run()

    (graph,) = cuda_graph.capture(run, [body], device)
    return lambda kept=body: graph.replay()  # with the tensors that the graph reads


def compare_runs(
    recorder: Recorder, group: str, case: str, opponent: str, n: int, steps: int,
    systems: Sequence[tuple[Run, Clock | None]], seconds: float, unit: str = "step",
) -> dict[str, float]:  # fmt: skip
    """Whole runs, ours and theirs, with the clocks of their networks: a step's time end to end, and outside the network.

    Without a clock the network is within what they compile, and only the whole is compared. Refused where one of them calls
    the network more often than the other (but for a call at an end). `unit`: what `steps` counts.
    """
    for run, _ in systems:
        run()
    calls, theirs = (network.calls if network else None for _, network in systems)
    if theirs is not None and abs(calls - theirs) > 2 + 0.01 * calls:
        raise AssertionError(f"{opponent} calls the network {theirs} times, not {calls}")

    def timed(run: Run, network: Clock | None) -> tuple[float, float]:
        before, began = network.seconds if network else 0.0, clock()
        run()
        whole, within = clock() - began, network.seconds - before if network else 0.0
        return whole / steps * 1e6, (whole - within) / steps * 1e6

    measured = {str(k): (lambda system=system: timed(*system)) for k, system in enumerate(systems)}
    wholes, outsides = zip(*(zip(*pairs) for pairs in turns(measured, seconds, 7 if seconds < 3 else 3).values()))
    ratios = {"whole": recorder.row(group, case, n, f"us per {unit}", wholes[0], opponent, wholes[1])}
    if all(network for _, network in systems):
        metric = f"us outside the network per {unit}"
        ratios["outside"] = recorder.row(group, case, n, metric, outsides[0], opponent, outsides[1])
    return ratios


class Solution(NamedTuple):
    """A run of a solver that chooses its steps."""

    run: Run
    tolerance: float
    error: float  # measured, against a much finer solution
    evaluations: float  # of the ODE's right-hand side, the mean over the samples
    calls: int  # of the network


def loosest(solve: Callable[[float], Solution], tolerances: Sequence[float], error: float) -> Solution:
    """Ours at the loosest of the tolerances, tightest first, up to which the measured error is at most `error`."""
    best = solve(tolerances[0])
    for tolerance in tolerances[1:]:
        looser = solve(tolerance)
        if not looser.error <= error:  # one that is looser still would be within it by luck
            break
        best = looser
    return best


def compare_solutions(
    recorder: Recorder, group: str, case: str, opponent: str, n: int, ours: Solution, theirs: Solution, seconds: float
) -> float:
    """Whole runs of solvers that each choose their steps; refused where our measured error is above theirs."""
    if not ours.error <= theirs.error:
        raise AssertionError(f"{case}: the error is {ours.error:.3g}, above {opponent}'s {theirs.error:.3g}")
    runs = {"ours": ours.run, opponent: theirs.run}
    for run in runs.values():
        run()
    watch = Stopwatch(CPU)
    times = turns({name: lambda run=run: watch.whole(run) / 1e3 for name, run in runs.items()}, seconds, 7)
    ratio = recorder.pairs(group, case, n, "ms", times)[opponent]
    for metric in ("error", "tolerance", "evaluations", "calls"):
        recorder.row(group, case, n, metric, [getattr(ours, metric)], opponent, [getattr(theirs, metric)])
    return ratio
