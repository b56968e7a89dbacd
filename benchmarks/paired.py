"""Timing by pairs: the systems take turns in one process, and what counts is the median of the ratios of neighbours."""

from __future__ import annotations

import csv
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).parent
COLUMNS = (
    "device", "threads", "case", "n", "opponent", "ours_us", "theirs_us", "ratio_p20", "ratio_p50", "ratio_p80", "rounds",
    "commit", "torch", "date",
)  # fmt: skip
ROWS: list[dict[str, object]] = []


def compare(
    case: str, n: int, ours: Callable[[], object], opponents: dict[str, Callable[[], object]], seconds: float = 1.0
) -> dict[str, float]:
    """How many times as long each opponent takes, the median of paired ratios; recorded in ROWS.

    One thread: its CPU time, which other processes do not lengthen; more: the clock on the wall.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
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
    gc.collect()
    gc.disable()  # as timeit does: a collection would fall on whoever is at it
    for turn in range(rounds):
        for name in list(systems) if turn % 2 else reversed(list(systems)):
            run, count = systems[name], calls[name]
            began = clock()
            for _ in range(count):
                run()
            times[name].append((clock() - began) / count)
    gc.enable()
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name in opponents:
        ratios = [theirs / mine for theirs, mine in zip(times[name], times["ours"])]
        low, *_, high = statistics.quantiles(ratios, n=5)
        ROWS.append({
            "device": device(), "threads": torch.get_num_threads(), "case": case, "n": n, "opponent": name,
            "ours_us": round(medians["ours"] * 1e6, 3), "theirs_us": round(medians[name] * 1e6, 3),
            "ratio_p20": round(low, 2), "ratio_p50": round(statistics.median(ratios), 2), "ratio_p80": round(high, 2),
            "rounds": rounds, "commit": commit(), "torch": torch.__version__, "date": date.today().isoformat(),
        })  # fmt: skip
    return {name: statistics.median(a / b for a, b in zip(times[name], times["ours"])) for name in opponents}


def table() -> str:
    """ROWS as text: a line for each case and opponent, a column for each size."""
    lines, keys = [], dict.fromkeys((r["case"], r["threads"], r["opponent"]) for r in ROWS)
    sizes = sorted({r["n"] for r in ROWS})
    head = f"{'case':28} {'threads':>7}  {'against':30}" + "".join(f"{'n = ' + format(n, ','):>30}" for n in sizes)
    for case, threads, opponent in keys:
        line = f"{case:28} {threads:>7}  {opponent:30}"
        for n in sizes:
            found = [
                r for r in ROWS if (r["case"], r["threads"], r["opponent"], r["n"]) == (case, threads, opponent, n)
            ]
            if found:
                r = found[0]
                cell = f"{r['ratio_p50']:.2f}x [{r['ratio_p20']:.1f}-{r['ratio_p80']:.1f}] {r['ours_us']:,.1f} us"
                line += f"{cell:>30}"
            else:
                line += " " * 30
        lines.append(line.rstrip())
    return "\n".join([head, *lines])


def save() -> Path:
    """ROWS as benchmarks/results/<device>.csv."""
    path = ROOT / "results" / f"{device()}.csv"
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def device() -> str:
    """The processor, as a file name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return name.replace(" ", "-")


def commit() -> str:
    shown = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return shown.stdout.strip()
