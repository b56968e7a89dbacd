"""The whole path on real data: train three models on handwritten digits, draw samples in seven ways, measure and draw.

`demo_flow` then computes likelihoods and latents of one of them, and compares the solvers on it; `demo_control` draws digits
by their class, and given a part of them.

Work is spread over processes of one thread each: small networks use two cores better by two processes than by two
threads, and the processes do not wait for each other on a busy machine.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from .. import checks, files
from ..metrics import frechet, nearest
from ..model import ScoreModel
from ..networks import UNet
from ..planning import samplers
from ..planning.processes import VE, VP, Process, SubVP
from ..sampling import sample
from ..training import Data, load, save, train
from . import demo_control, demo_flow, pictures

SHAPE = (1, 8, 8)
PICTURED = 100
BATCH = 200
MODELS = ("ve", "vp", "subvp")


@dataclass(frozen=True)
class Job:
    """One of the demo's runs: a title, the name of its model, and the options of `fastdiff.sample`."""

    title: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


JOBS = (
    Job("VE predictor-corrector", "ve", {"sde": "ve", "steps": 1000}),
    Job("VP Euler-Maruyama", "vp", {"sde": "vp", "steps": 1000}),
    Job("sub-VP Euler-Maruyama", "subvp", {"sde": "subvp", "steps": 1000}),
    Job("DDPM ancestral", "vp", {"sde": "ddpm", "steps": 1000}),
    Job("NCSN annealed Langevin", "ve", {"sde": "ncsn", "steps": 1000}),
    Job("DDIM 50", "vp", {"sampler": samplers.DDIM(), "steps": 50}),
    Job("Heun 18", "vp", {"sampler": samplers.Heun(), "steps": 18}),
)


@dataclass(frozen=True)
class Result:
    """The result of a job: samples [N, 64] in [0, 1], network calls of one sample, seconds on one thread."""

    samples: NDArray[np.float64]
    calls: int
    seconds: float


def main(
    out: Path,
    train_steps: int = 2000,
    samples: int = 400,
    steps: int = 1000,
    digits: int = 200,
    workers: int | None = None,
    control: bool = False,
) -> None:
    """Train, sample, measure and draw into `out`; ends with `out/report.md`.

    steps    of a sampler, at most, and a fifth of them for the posteriors; digits: whose likelihoods are computed, and the most
             noises that solvers start from
    control  whether also digits are drawn by their class, and given a part or a blurred picture of them
    """
    began = time.perf_counter()
    training, held_out = halves()
    checks.integer("train_steps", train_steps, 1, 10**6)
    # enough for a covariance of 64 pixels, and no more than there are real digits to put beside them
    checks.integer("samples", samples, 70, len(training))
    checks.integer("steps", steps, 50, 10**6)
    checks.integer("digits", digits, 2 * demo_flow.PAIRS, len(held_out))
    jobs = [replace(job, options={**job.options, "steps": min(steps, job.options["steps"])}) for job in JOBS]
    workers = checks.integer("workers", workers or _cores(), 1, 1024)
    out.mkdir(parents=True, exist_ok=True)
    files.check_writable("out", out / "report.md")
    real, unseen = (pixels(data.batch(range(len(data)), (0.0, 1.0)), (0.0, 1.0)) for data in (training, held_out))
    print(f"fastdiff demo: {len(training)} digits to train on, {len(held_out)} held out, {workers} processes")
    models, controlled = (*MODELS, *[demo_control.MODEL] * control), None
    # every model needs the same time: as many processes as models keep all cores busy to the end
    with _workers(max(len(models), workers)) as (pool, progress):
        with _bar(progress, "training", train_steps * len(models)):
            futures = {name: pool.submit(_train, name, train_steps, out, progress) for name in models}
            losses = {name: future.result() for name, future in futures.items()}
        with _bar(progress, "sampling", sum(_calls(job) for job in jobs) * -(-samples // BATCH)):
            runs = [pool.submit(_sample, job, samples, out, progress) for job in jobs]
            results = [run.result() for run in runs]
        with _bar(progress, "probability flow", demo_flow.jobs(digits)):
            flow = demo_flow.run(pool, out / "digits-vp.safetensors", held_out, digits, progress)
        if control:
            with _bar(progress, "control", demo_control.JOBS):
                controlled = demo_control.run(pool, out, steps // 5, progress)
    print("drawing")
    for job, result in zip(JOBS, results):
        pictures.grids(out / f"{slug(job)}.png", unseen[:PICTURED], result.samples[:PICTURED], job.title)
    pictures.losses(out / "loss.png", losses)
    pictures.banner(out / "trajectory.png", trajectory(load(out / "digits-vp.safetensors")))
    pictures.neighbours(out / "nearest.png", results[0].samples[:10], real)
    demo_flow.draw(out, flow)
    sections = demo_flow.report(flow)
    if controlled is not None:
        demo_control.draw(out, controlled)
        sections += demo_control.report(controlled)
    seconds = time.perf_counter() - began
    text = "\n".join([report(results, real, unseen, len(models), train_steps, seconds), *sections])
    with files.replacing(out / "report.md") as handle:
        handle.write(text.encode())
    print(text)
    print(f"pictures and report in {files.shown(out)}/, {seconds:.0f} seconds")


def model_for(name: str) -> ScoreModel:
    """A small U-Net for the digits with EDM's preconditioning; data_range [0, 1] for VE, else [−1, 1]."""
    process: Process = {"ve": VE(), "subvp": SubVP()}.get(name, VP())
    torch.manual_seed(0)
    net = UNet(SHAPE, channels=32, multipliers=(1, 2), blocks=1, num_classes=10 if name == demo_control.MODEL else None)
    return ScoreModel(net, process, "edm", data_shape=SHAPE, data_range=(0.0, 1.0) if name == "ve" else (-1.0, 1.0))


def halves() -> tuple[Data, Data]:
    """The digits in two random halves: one to train on, one held out; without their labels."""
    training, held_out = (Data(half.x, range=half.range, bins=half.bins) for half in demo_control.halves())
    return training, held_out


def pixels(x: Tensor, data_range: tuple[float, float]) -> NDArray[np.float64]:
    """Samples or data in their range as rows of 64 numbers in [0, 1]."""
    return pictures.unit(x.flatten(1).double().numpy(), data_range)


def slug(job: Job) -> str:
    """The job's title as a file name."""
    return job.title.lower().replace(" ", "-")


def trajectory(model: ScoreModel) -> NDArray[np.float64]:
    """From noise to digits: [4 digits, 15 states, 64] of one run's second half, each scaled to its own level for the eye.

    docs/pictures/trajectory.png is `pictures.banner(path, demo.trajectory(fastdiff.load("digits-vp")))`.
    """
    _, states = sample(model, steps=500, num_samples=4, seed=2, first_sample=7, trajectory=29, progress=False)
    low, high = model.data_range
    flat = (states[-15:].flatten(2).double().numpy().transpose(1, 0, 2) - low) / (high - low)
    share = np.minimum(0.35 / flat.std(axis=2, keepdims=True), 1.0)  # noise is turned down to be seen, about grey
    return np.asarray(np.clip(share * flat + (1 - share) * 0.5, 0, 1))


def report(
    results: list[Result],
    real: NDArray[np.float64],
    unseen: NDArray[np.float64],
    models: int,
    train_steps: int,
    seconds: float,
) -> str:
    """The numbers as Markdown."""
    between = frechet(real, unseen)
    count = len(results[0].samples)
    rng = np.random.default_rng(0)
    equal = float(np.mean([frechet(real[rng.choice(len(real), count, replace=False)], unseen) for _ in range(20)]))
    usual = float(nearest(unseen, real).distances.median())
    lines = [
        "# fastdiff demo: 8×8 handwritten digits",
        "",
        f"{models} U-Nets trained for {train_steps} steps on {len(real)} digits; {count} samples from each sampler; "
        f"{seconds:.0f} seconds in all.",
        "",
        f"Fréchet distances are in pixel space (64-d) to the {len(unseen)} held-out digits. The two halves of the real "
        f"digits are {between:.4f} apart. {count} real digits from the training half are at {equal:.4f}, a ratio of "
        f"{equal / between:.2f}: that much is due to the number of samples alone, so no sampler can be expected to do better.",
        "",
        "| sampler | network calls | seconds (one thread) | Fréchet distance | ratio to two real halves | "
        "ratio to as many real digits | distance to the nearest training digit |",
        "|---|---|---|---|---|---|---|",
    ]
    for job, result in zip(JOBS, results):
        distance = frechet(result.samples, unseen)
        lines.append(
            f"| {job.title} | {result.calls} | {result.seconds:.1f} | {distance:.4f} | {distance / between:.2f} | "
            f"{distance / equal:.2f} | {float(nearest(result.samples, real).distances.median()):.2f} |"
        )
    lines += [
        "",
        f"The last column is a median; for held-out digits it is {usual:.2f}. A model that copied its training digits "
        "would be near 0 there. `nearest.png` shows ten samples above their nearest training digits.",
        "",
        *(f"![{job.title}]({slug(job)}.png)" for job in JOBS),
        "![from noise to digits](trajectory.png)",
        "![loss](loss.png)",
        "![nearest training digits](nearest.png)",
        "",
    ]
    return "\n".join(lines)


def _train(name: str, steps: int, out: Path, progress: Any) -> NDArray[np.float64]:
    """Train one model, save it to `out`, and return its losses (in a worker process)."""
    model, seen = model_for(name), 0
    labelled = name == demo_control.MODEL

    def advance(step: int, loss: float) -> None:
        nonlocal seen
        progress.put(step - seen)
        seen = step

    done = train(
        model, (demo_control.halves() if labelled else halves())[0], steps=steps, loss="simple", lr=2e-3, warmup=100,
        decay=True, cond_dropout=0.1 * labelled, progress=False, callback=advance,
    )  # fmt: skip
    save(model, out / f"digits-{name}")
    return np.asarray(done.loss.numpy())


def _sample(job: Job, count: int, out: Path, progress: Any) -> Result:
    """Draw one job's samples (in a worker process)."""
    model = load(out / f"digits-{job.model}.safetensors")
    began, rows = time.thread_time(), 0

    def advance(row: int, t: float, x: Tensor) -> None:
        nonlocal rows
        rows += 1
        if rows % 20 == 0:
            progress.put(20)

    x, info = sample(
        model,
        num_samples=count,
        seed=1,
        batch_size=BATCH,
        progress=False,
        callback=advance,
        return_info=True,
        **job.options,
    )
    return Result(pixels(x, model.data_range), info.table.calls, time.thread_time() - began)


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _calls(job: Job) -> int:
    """About how many rows a job has, for the progress bar."""
    return int(job.options["steps"]) * (2 if job.options.get("sde") == "ve" or job.title.startswith("Heun") else 1)


@contextmanager
def _workers(count: int) -> Iterator[tuple[ProcessPoolExecutor, Any]]:
    """Processes of one thread each, and a queue for how far they are."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(count, context, torch.set_num_threads, (1,)) as pool:
        yield pool, manager.Queue()


@contextmanager
def _bar(progress: Any, title: str, total: int) -> Iterator[None]:
    """A progress bar that the queue's numbers move."""
    with tqdm(total=total, desc=title) as bar:
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.5):
                while not progress.empty():
                    bar.update(progress.get())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
            while not progress.empty():
                bar.update(progress.get())
