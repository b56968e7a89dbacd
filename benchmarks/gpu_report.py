"""Where `make gpu` leaves its numbers, how it times a device, and how long it may take."""

from __future__ import annotations

import csv
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import paired
import torch

from fastdiff.execution import cuda_graph

Run = Callable[[], object]
OPS, LOOPS = GROUPS = ("gpu ops", "gpu loops")


class Report:
    """A CSV, a row at a time, and a log beside it, so that a run that is cut off keeps what it has.

    failures  what makes the exit status nonzero
    """

    def __init__(self, folder: Path, device: torch.device, commit: str, end: float) -> None:
        of_gpu = device.type == "cuda"
        name = paired.file_name(torch.cuda.get_device_name(device)) if of_gpu else paired.device()
        self.end = self.part_end = end
        self.failures: list[str] = []
        self.fixed = {
            "device": name, "threads": "" if of_gpu else torch.get_num_threads(), "commit": commit,
            "torch": torch.__version__, "date": date.today().isoformat(),
        }  # fmt: skip
        self.path = folder / f"{name}.csv"
        before = paired.read(self.path) if self.path.exists() else []
        if before and tuple(before[0]) != paired.COLUMNS:
            raise SystemExit(f"{self.path} has other columns than {', '.join(paired.COLUMNS)}: move it, or give --out")
        folder.mkdir(parents=True, exist_ok=True)
        self.log = (folder / f"{name}.log").open("w", encoding="utf-8")
        self.file = self.path.open("w", newline="", encoding="utf-8")
        self.rows = csv.DictWriter(self.file, paired.COLUMNS)
        self.rows.writeheader()
        self.rows.writerows(row for row in before if row["group"] not in GROUPS)
        self.file.flush()

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def fail(self, text: str) -> None:
        self.failures.append(text)
        self.say(f"FAILED: {text}")

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """What breaks here fails, and does not take the numbers after it along."""
        try:
            yield
        except Exception as error:  # whatever it is
            self.say(traceback.format_exc())
            self.fail(f"{what}: {type(error).__name__}")

    def begin(self, title: str, seconds: float, reserve: float = 0.0) -> bool:
        """Start a part that may take so long, and must leave `reserve` seconds for others; False if there is no time."""
        now = time.monotonic()
        self.part_end = min(now + seconds, self.end - reserve)
        self.say(f"\n== {title} ({max(self.left(), 0):.0f} s)")
        return self.has_time(3, "this part")

    def left(self) -> float:
        return self.part_end - time.monotonic()

    def has_time(self, seconds: float, what: str) -> bool:
        """Whether there is time for what may take so long; if not, the log says so."""
        if self.left() >= seconds:
            return True
        self.say(
            f"left out for want of time: {what}: it may take {seconds:.0f} s, {max(self.left(), 0):.0f} s are left"
        )
        return False

    def row(
        self, group: str, case: str, n: int, metric: str, ours: Sequence[float], opponent: str = "",
        theirs: Sequence[float] | None = None,
    ) -> float:  # fmt: skip
        """A row of measurements, the two systems' paired; the median of ours, or of the ratios theirs by ours."""
        value = middle = statistics.median(ours)
        told = {"ours": f"{middle:.5g}", "rounds": len(ours)}
        shown = f"{middle:12.5g}"
        if theirs is not None:
            told["theirs"] = f"{statistics.median(theirs):.5g}"
            shown += f" against {told['theirs']}"
        if theirs is not None and len(ours) > 1:
            ratios = [b / a for a, b in zip(ours, theirs)]
            low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive")
            value = statistics.median(ratios)
            told |= {"ratio_p20": round(low, 2), "ratio_p50": round(value, 2), "ratio_p80": round(high, 2)}
            shown += f": {value:.2f}x [{low:.2f}-{high:.2f}]"
        known = {"group": group, "case": case, "opponent": opponent, "n": n, "metric": metric}
        self.rows.writerow({**dict.fromkeys(paired.COLUMNS, ""), **self.fixed, **known, **told})
        self.file.flush()
        self.say(f"{case:40} {n:>11,}  {metric:40} {shown}  {opponent}".rstrip())
        return value


class Stopwatch:
    """Microseconds: batches of calls by the device's own events, whole runs by the clock on the wall."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def batch(self, run: Run, calls: int) -> float:
        """One call's part of a batch, from when the device begins it to when it is done."""
        self.settle()
        if not self.cuda:
            began = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - began) / calls * 1e6
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls * 1e3

    def whole(self, run: Run) -> float:
        self.settle()
        began = time.perf_counter()
        run()
        self.settle()
        return (time.perf_counter() - began) * 1e6

    def batches(self, run: Run, calls_each: int = 1) -> Callable[[], float]:
        """A measurement of `run`, which is `calls_each` calls: batches of about 4 ms, warmed up."""
        self.batch(run, 3)
        calls = max(1, min(400, round(4000 / max(self.batch(run, 5), 1.0))))
        return lambda: self.batch(run, calls) / calls_each


def turns(systems: dict[str, Callable[[], float]], seconds: float, most: int = 40) -> dict[str, list[float]]:
    """What the systems measure of themselves in turns, A B, B A, …: at least four rounds, at most `most`."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    gc.collect()
    gc.disable()  # a collection would fall on whoever is at it
    try:
        began, rounds = time.monotonic(), 0
        while rounds < 4 or (rounds < most and time.monotonic() - began < seconds):
            for name in list(systems) if rounds % 2 else reversed(list(systems)):
                times[name].append(systems[name]())
            rounds += 1
    finally:
        gc.enable()
    return times


def replayed(run: Run, calls: int, device: torch.device) -> Run:
    """So many calls as one CUDA graph: what they cost without being launched one by one."""

    def body() -> None:
        for _ in range(calls):
            run()

    graph, _ = cuda_graph.capture(run, body, device, None)

    def replay() -> None:
        graph.replay()

    replay.keep = run  # type: ignore[attr-defined]  # whose tensors the graph reads
    return replay
