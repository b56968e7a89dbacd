"""The demo's second half, the probability-flow ODE of its VP model: likelihoods, latents, and how exact each solver is."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..execution import noise
from ..likelihood import bits_per_dim, interpolate, log_likelihood
from ..planning import grids, samplers
from ..sampling import sample
from ..training import Data, load
from . import pictures
from .likelihood_report import mean_and_error

Array = NDArray[np.float64]
Curve = list[tuple[float, float]]

CHUNK = 50  # digits whose likelihoods are computed in one job
PROBES, TOLERANCE = 2, 1e-3  # which changes a likelihood by less than its standard error
PAIRS, STATES, FINE = 8, 12, 1e-4  # digits that are interpolated, how finely, and with which tolerance
STARTS, CONVERGED = 64, 1e-6  # noises for the solvers, at most, and the tolerance of what they are compared with
TOLERANCES = (3e-2, 1e-2, 3e-3, 1e-3, 1e-4)
CALLS = (6, 8, 12, 18, 24, 36, 48)
ONE_CALL: dict[str, samplers.Sampler] = {
    "DDIM": samplers.DDIM(),
    "LMS, order 4": samplers.LMS(),
    "DEIS, order 3": samplers.DEIS(),
    "DPM-Solver++ 2M": samplers.DPMSolverPP(),
    "DPM-Solver++ 3M": samplers.DPMSolverPP(order=3),
    "UniPC, order 2": samplers.UniPC(),
    "SA-Solver, τ = 0": samplers.SA(tau=0.0),
}
SEVERAL_CALLS: dict[str, samplers.Sampler] = {
    "Heun": samplers.Heun(),
    "DPM-2, DPM-Solver-2": samplers.DPMSolver(order=2),  # the same rows on a grid of σ̂
    "DPM-Solver-3": samplers.DPMSolver(order=3),
    "DPM-Solver++ 2S": samplers.DPMSolverPP2S(),
}
FIXED = {**ONE_CALL, **SEVERAL_CALLS}
ADAPTIVE = "rk45"


@dataclass(frozen=True)
class Findings:
    """What was measured, of held-out digits and of the same with shuffled pixels where there are two.

    nats, bits  [digits] each; evaluations: the most that one took
    strip       [PAIRS, STATES, 64], whose ends are `apart` from the digits (RMS of pixels in [0, 1])
    starts      from how many noises the solvers started
    curves      solver -> (network calls, RMS distance of its ends from the converged ones)
    """

    nats: tuple[Array, Array]
    bits: tuple[Array, Array]
    evaluations: int
    strip: Array
    apart: float
    starts: int
    curves: dict[str, Curve]


def jobs(count: int) -> int:
    """What the progress bar counts, with the likelihoods of `count` digits."""
    return 2 * -(-count // CHUNK) + len(FIXED) + 3


def run(pool: Executor, path: Path, digits: Data, count: int, progress: Any) -> Findings:
    """All measurements as jobs of the pool's processes: likelihoods of `count` digits, solvers from as many noises.

    Each puts a 1 into `progress` when it is done.
    """
    model = load(path)
    real = digits.dequantized(range(count), model.data_range)
    starts = min(count, STARTS)
    pairs = digits.batch(range(2 * PAIRS), model.data_range)
    # the longest first
    converged = pool.submit(_solve, path, ADAPTIVE, (CONVERGED,), starts, progress)
    likelihoods = [
        [pool.submit(_likelihoods, path, x[k : k + CHUNK].numpy(), k, digits.bins, progress) for k in range(0, count, CHUNK)]
        for x in (real, shuffled(real))
    ]  # fmt: skip
    solving = {ADAPTIVE: pool.submit(_solve, path, ADAPTIVE, TOLERANCES, starts, progress)}
    solving |= {name: pool.submit(_solve, path, name, CALLS, starts, progress) for name in FIXED}
    between = pool.submit(_between, path, pairs.numpy(), progress)
    likelihood = [np.concatenate([job.result() for job in jobs], 1) for jobs in likelihoods]
    best = converged.result()[0][1]
    strip = pictures.unit(between.result(), model.data_range)
    ends = np.stack([strip[:, 0], strip[:, -1]], 1)
    return Findings(
        nats=(likelihood[0][0], likelihood[1][0]),
        bits=(likelihood[0][1], likelihood[1][1]),
        evaluations=int(max(values[2].max() for values in likelihood)),
        strip=strip,
        apart=_rms(ends, pictures.unit(pairs.numpy(), model.data_range).reshape(ends.shape)),
        starts=starts,
        curves={name: [(calls, _rms(x, best)) for calls, x in job.result()] for name, job in solving.items()},
    )


def shuffled(x: Tensor) -> Tensor:
    """The numbers of each sample [B, *] in a random order, another for each sample."""
    orders = [noise.permutation(x[0].numel(), seed=0, draw=i) for i in range(len(x))]
    return torch.stack([v.flatten()[order].view_as(v) for v, order in zip(x, orders)])


def draw(out: Path, findings: Findings) -> None:
    """The pictures."""
    names = ("held-out digits", "the same, their pixels shuffled")
    pictures.histograms(
        out / "likelihood.png", dict(zip(names, findings.bits)), "bits per dimension", "likelihood under the VP model"
    )
    pictures.strip(
        out / "interpolation.png",
        findings.strip,
        "held-out digits, left and right, and interpolations of their latents",
    )
    panels = {
        title: {name: findings.curves[name] for name in names}
        for title, names in {
            "one network call a step": [*ONE_CALL, ADAPTIVE],
            "several network calls a step": [*SEVERAL_CALLS, "DDIM", ADAPTIVE],
        }.items()
    }
    pictures.convergence(out / "solvers.png", panels, "network calls", "RMS distance from the converged solution")


def report(findings: Findings) -> list[str]:
    """The numbers as lines of Markdown."""
    (real, other), (real_bits, other_bits) = findings.nats, findings.bits
    at = [CALLS.index(calls) for calls in (6, 12, 24, 48)]
    rows = [f"| {name} | " + " | ".join(f"{findings.curves[name][k][1]:.4f}" for k in at) + " |" for name in FIXED]
    adaptive = ", ".join(f"{distance:.4f} after {calls:.0f}" for calls, distance in findings.curves[ADAPTIVE])
    return [
        "## The probability flow of the VP model",
        "",
        f"Likelihoods of {len(real)} held-out digits, dequantised within their 17 levels ({PROBES} probes, tolerance "
        f"{TOLERANCE:g}, at most {findings.evaluations} evaluations), mean ± its standard error:",
        "",
        "| | nats | bits per dimension |",
        "|---|---|---|",
        f"| digits | {mean_and_error(real, 2)} | {mean_and_error(real_bits, 3)} |",
        f"| the same, their pixels shuffled | {mean_and_error(other, 2)} | {mean_and_error(other_bits, 3)} |",
        "",
        f"A digit is likelier than its shuffled pixels in {int((real > other).sum())} cases of {len(real)}. A uniform "
        f"distribution over the 17 levels has log₂ 17 = {np.log2(17):.2f} bits per dimension.",
        "",
        "![likelihood](likelihood.png)",
        "",
        "Spherical interpolation between the latents of held-out digits. The ends return to the digits with an RMS error of "
        f"{findings.apart:.4f} (pixels in [0, 1]).",
        "",
        "![interpolation](interpolation.png)",
        "",
        f"RMS distance of the samples of each solver from the converged solution of the flow (rk45 with tolerance "
        f"{CONVERGED:g}) from the same {findings.starts} starts, numbers in [−1, 1], by network calls. All use Karras's levels "
        "from T to t_min, where `ode` and DPM-Solver-1 equal DDIM:",
        "",
        "| solver | 6 | 12 | 24 | 48 |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"rk45, which chooses the steps of each sample: {adaptive} evaluations in the mean. Samplers that draw noise have no "
        "such solution to converge to; they are measured above.",
        "",
        "![solvers](solvers.png)",
        "",
    ]


def _likelihoods(path: Path, x: Array, first: int, bins: int, progress: Any) -> Array:
    """nats, bits and evaluations of each digit, [3, B] (in a worker process)."""
    model = load(path)
    result = log_likelihood(
        model, torch.from_numpy(x), probes=PROBES, rtol=TOLERANCE, atol=TOLERANCE, first_sample=first, progress=False
    )
    progress.put(1)
    return torch.stack([result.nats, bits_per_dim(result, model.data_range, bins), result.nfe.double()]).numpy()


def _between(path: Path, x: Array, progress: Any) -> Array:
    """From each digit to the next of its pair, [PAIRS, STATES, 64] (in a worker process)."""
    ends, weights = torch.from_numpy(x), torch.linspace(0, 1, STATES)
    states = interpolate(load(path), ends[::2], ends[1::2], weights, rtol=FINE, atol=FINE, progress=False)
    progress.put(1)
    return states.transpose(0, 1).flatten(2).numpy()


def _solve(path: Path, name: str, settings: Sequence[float], starts: int, progress: Any) -> list[tuple[float, Array]]:
    """(network calls, ends [starts, *]) of one solver with so many calls, or such tolerances (in a worker process)."""
    model, ends = load(path), []
    sigma_hats = [
        float(model.process.sigma(t) / model.process.alpha(t)) for t in (model.process.T, model.process.t_min)
    ]
    for setting in settings:
        if name == ADAPTIVE:
            options: dict[str, Any] = {"sampler": samplers.Adaptive(rtol=setting, atol=setting)}
        else:
            a_step = 1 if name in ONE_CALL else 3 if name == "DPM-Solver-3" else 2
            # Karras's grid without its last level, 0: every solver ends where the converged solution does
            levels = grids.sigmas(grids.karras(*sigma_hats, int(setting) // a_step + 1)[:-1])
            options = {"sampler": FIXED[name], "grid": levels}
        x, info = sample(model, num_samples=starts, seed=3, progress=False, return_info=True, **options)
        calls = info.network_calls if info.nfe is None else float(info.nfe.double().mean())
        ends.append((calls, x.numpy()))
    progress.put(1)
    return ends


def _rms(a: Array, b: Array) -> float:
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))
