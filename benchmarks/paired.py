"""Timing by pairs: the systems take turns in one process, and what counts is the median of the ratios of neighbours."""

from __future__ import annotations

import csv
import functools
import gc
import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import Clock, clock

ROOT = Path(__file__).parent
# One row a measurement. `ours` and `theirs` are medians in the unit that `metric` names; the ratios are theirs by ours.
COLUMNS = (
    "device", "threads", "group", "case", "opponent", "n", "metric", "ours", "theirs", "ratio_p20", "ratio_p50", "ratio_p80",
    "rounds", "commit", "torch", "version", "date",
)  # fmt: skip
ROWS: list[dict[str, Any]] = []
Run = Callable[[], object]


def record(
    group: str, case: str, opponent: str, n: int, metric: str, ours: Sequence[float], theirs: Sequence[float]
) -> float:
    """A row of paired measurements; the median of their ratios."""
    ratios = [b / a for a, b in zip(ours, theirs)]
    low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
    middle = statistics.median(ratios)
    note(group, case, opponent, n, metric, statistics.median(ours), statistics.median(theirs))
    ROWS[-1] |= {
        "ratio_p20": round(low, 2),
        "ratio_p50": round(middle, 2),
        "ratio_p80": round(high, 2),
        "rounds": len(ratios),
    }
    return middle


def note(group: str, case: str, opponent: str, n: int, metric: str, ours: float, theirs: float) -> None:
    """A row of two numbers that a ratio would not tell of, such as counts."""
    ROWS.append({
        **dict.fromkeys(COLUMNS, ""), "device": device(), "threads": torch.get_num_threads(), "group": group, "case": case,
        "opponent": opponent, "n": n, "metric": metric, "ours": f"{ours:.5g}", "theirs": f"{theirs:.5g}", "commit": commit(),
        "torch": torch.__version__, "version": version(opponent), "date": date.today().isoformat(),
    })  # fmt: skip


def compare(case: str, n: int, ours: Run, opponents: dict[str, Run], seconds: float = 1.0) -> dict[str, float]:
    """How many times as long each opponent of an operation takes."""
    systems = {"ours": ours, **opponents}
    each, calls = {}, {}
    for name, run in systems.items():
        run()
        began = clock()
        run()
        each[name] = max(clock() - began, 1e-7)
        calls[name] = max(1, int(200e-6 / each[name]))  # the clock is read at most every 0.2 ms
    rounds = min(max(int(seconds / sum(each[name] * calls[name] for name in systems)), 5), 400)
    times: dict[str, list[float]] = {name: [] for name in systems}
    with _no_collection():
        for turn in range(rounds):
            for name in list(systems) if turn % 2 else reversed(list(systems)):
                run, count = systems[name], calls[name]
                began = clock()
                for _ in range(count):
                    run()
                times[name].append((clock() - began) / count * 1e6)
    return {name: record("ops", case, name, n, "us", times["ours"], times[name]) for name in opponents}


def compare_runs(
    group: str,
    case: str,
    opponent: str,
    n: int,
    steps: int,
    systems: Sequence[tuple[Run, Clock | None]],
    seconds: float,
    unit: str = "step",
) -> dict[str, float]:
    """Whole runs, ours and theirs, with the clocks of their networks: a step's time end to end, and outside the network.

    Without a clock the network is within what they compile, and only the whole is compared. Refused where one of them calls
    the network more often than the other (but for a call at an end). `unit`: what `steps` counts.
    """
    for run, _ in systems:
        run()
    asked, theirs = (network.calls if network else None for _, network in systems)
    if theirs is not None and abs(asked - theirs) > 2 + 0.01 * asked:
        raise AssertionError(f"{opponent} calls the network {theirs} times, not {asked}")
    whole, outside = _in_turns(systems, seconds, 1e6 / steps)
    ratios = {"whole": record(group, case, opponent, n, f"us per {unit}", *whole)}
    if all(network for _, network in systems):
        ratios["outside"] = record(group, case, opponent, n, f"us outside the network per {unit}", *outside)
    return ratios


class Solution(NamedTuple):
    """A run of a solver that chooses its steps: at which tolerance, and what it gave and took.

    error        measured, against a much finer solution
    evaluations  of the ODE's right-hand side, the mean over the samples
    calls        of the network
    """

    run: Run
    tolerance: float
    error: float
    evaluations: float
    calls: int


def loosest(solve: Callable[[float], Solution], tolerances: Sequence[float], error: float) -> Solution:
    """Ours at the loosest of the tolerances, tightest first, up to which the measured error is at most `error`."""
    found = solve(tolerances[0])
    for tolerance in tolerances[1:]:
        looser = solve(tolerance)
        if not looser.error <= error:  # one that is looser still would be within it by luck
            break
        found = looser
    return found


def compare_solutions(
    group: str, case: str, opponent: str, n: int, ours: Solution, theirs: Solution, seconds: float
) -> float:
    """Whole runs of solvers that each choose their steps; refused where our measured error is above theirs."""
    if not ours.error <= theirs.error:
        raise AssertionError(f"{case}: the error is {ours.error:.3g}, above {opponent}'s {theirs.error:.3g}")
    for run in (ours.run, theirs.run):
        run()
    whole, _ = _in_turns([(ours.run, None), (theirs.run, None)], seconds, 1e3)
    ratio = record(group, case, opponent, n, "ms", *whole)
    for metric in ("error", "tolerance", "evaluations", "calls"):
        note(group, case, opponent, n, metric, getattr(ours, metric), getattr(theirs, metric))
    return ratio


def _in_turns(
    systems: Sequence[tuple[Run, Clock | None]], seconds: float, scale: float
) -> tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]]:
    """The times of both, `scale` units to a second: whole, and outside their networks."""
    outside: tuple[list[float], list[float]] = ([], [])
    whole: tuple[list[float], list[float]] = ([], [])
    spent = 0.0
    with _no_collection():
        while len(whole[0]) < (7 if seconds < 3 else 3) or (spent < seconds and len(whole[0]) < 40):
            order = (0, 1) if len(whole[0]) % 2 else (1, 0)
            for which in order:
                run, network = systems[which]
                before, began = network.seconds if network else 0.0, clock()
                run()
                took = clock() - began
                spent += took
                whole[which].append(took * scale)
                outside[which].append((took - (network.seconds if network else 0.0) + before) * scale)
    return whole, outside


@contextmanager
def _no_collection() -> Iterator[None]:
    """As timeit does: a collection would fall on whoever is at it."""
    gc.collect()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the opponents'
            yield
    finally:
        gc.enable()


def table(of_operations: bool) -> str:
    """ROWS of the operations as text, a column for each size; or of the loops, a line for each measurement."""
    rows = [r for r in ROWS if (r["group"] == "ops") == of_operations]
    if not of_operations:
        head = f"{'case':24} {'sampler':28} {'threads':>7}  {'against':28} {'metric':30} {'ours':>10} {'theirs':>10}  ratio"
        return "\n".join([head, *map(_loop_line, rows)])
    sizes = sorted({r["n"] for r in rows})
    lines = [f"{'case':28} {'threads':>7}  {'against':30}" + "".join(f"{'n = ' + format(n, ','):>30}" for n in sizes)]
    for case, threads, opponent in dict.fromkeys((r["case"], r["threads"], r["opponent"]) for r in rows):
        line = f"{case:28} {threads:>7}  {opponent:30}"
        for n in sizes:
            found = [
                r for r in rows if (r["case"], r["threads"], r["opponent"], r["n"]) == (case, threads, opponent, n)
            ]
            line += f"{_ratio(found[0]) + ' ' + found[0]['ours'] + ' us' if found else '':>30}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _loop_line(row: dict[str, Any]) -> str:
    return (
        f"{row['group']:24} {row['case']:28} {row['threads']:>7}  {row['opponent']:28} {row['metric']:30} "
        f"{row['ours']:>10} {row['theirs']:>10}  {_ratio(row)}"
    ).rstrip()


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio_p50']:.2f}x [{row['ratio_p20']:.1f}-{row['ratio_p80']:.1f}]" if row["rounds"] else ""


def save() -> Path:
    """ROWS in benchmarks/results/<device>.csv, in the place of what the file had of the same measurements."""
    path = ROOT / "results" / f"{device()}.csv"
    path.parent.mkdir(exist_ok=True)
    names = ("group", "case", "opponent", "threads", "n", "metric")
    rows = {tuple(str(row[name]) for name in names): row for row in [*(read(path) if path.exists() else []), *ROWS]}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows.values())
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file."""
    return list(csv.DictReader(path.read_text().splitlines()))


@functools.cache
def device() -> str:
    """The processor, as a file name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return file_name(name)


def file_name(device: str) -> str:
    """A device's name without what a file's may not hold."""
    return re.sub(r"[^\w.-]+", "-", device)


@functools.cache
def commit() -> str:
    if not shutil.which("git"):
        return ""
    shown = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return shown.stdout.strip()


def version(opponent: str) -> str:
    """The opponent's, where it is a package; else the machine's Python and cores."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(opponent)
    return f"Python {platform.python_version()}, {os.cpu_count()} cores"
