"""What deterministic solvers make of their network calls, on a mixture whose score is known.

The solvers share their start and their levels: Karras' without the last, 0, from t = 1 to 1e-3. Their error is the distance of
the end states from those of SciPy's eighth-order pair at 1e-10, root mean square over the samples' numbers.
"""

import functools
from typing import Any

import pytest
import torch
from cases import Clock
from cases import ours as run_of
from problems import VECTOR, distance, exact_eps, start_of
from recorder import compare_runs
from torch import Tensor

import fastdiff
from fastdiff import grids, samplers

pytestmark = pytest.mark.usefixtures("kept_memory")

END = 1e-3
COUNT = 256
CALLS = (6, 12, 24, 48, 96)
# name -> (sampler, network calls of a step)
SOLVERS = {
    "ddim": ("ddim", 1), "ode, uniform in t": ("ode", 1), "heun": ("heun", 2), "dpm_2": ("dpm_2", 2),
    "dpm_solver, order 2": (samplers.DPMSolver(2), 2), "dpm_solver, order 3": (samplers.DPMSolver(3), 3),
    "dpmpp_2s": ("dpmpp_2s", 2), "lms": ("lms", 1), "deis": ("deis", 1), "dpmpp_2m": ("dpmpp_2m", 1),
    "dpmpp_3m": ("dpmpp_3m", 1), "unipc": ("unipc", 1), "sa, tau 0": (samplers.SA(tau=0.0), 1),
}  # fmt: skip
FIRST_ORDER = ("ddim", "ode, uniform in t")
# name -> method of a sampler that chooses its steps, one size for all samples
ADAPTIVE = {"rk45": "dopri5", "rk45, bosh3": "bosh3"}
TOLERANCES = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)


@functools.cache
def exact_ends() -> tuple[Tensor, Tensor]:
    """Starts, and where the mixture's probability-flow ODE takes them: dx/dt = −β/2 (x − ε/σ)."""
    from scipy.integrate import solve_ivp

    x = start_of(torch.empty(COUNT, *VECTOR))

    def rates(t: float, y: Any) -> Any:
        state, times = torch.from_numpy(y).view_as(x), torch.full((COUNT,), t, dtype=torch.float64)
        sigma = torch.sqrt(-torch.expm1(-(9.95 * times + 0.1) * times)).view(-1, 1, 1, 1)
        return (-(0.05 + 9.95 * t) * (state - exact_eps(state, times) / sigma)).flatten().numpy()

    found = solve_ivp(rates, (1.0, END), x.double().flatten().numpy(), "DOP853", rtol=1e-10, atol=1e-10)
    return x, torch.from_numpy(found.y[:, -1]).view_as(x)


def options(name: str, count: int) -> dict[str, Any]:
    """Those of a run of so many network calls."""
    sampler, each = SOLVERS[name]
    steps = count // each
    if name == "ode, uniform in t":
        return {"sampler": sampler, "steps": steps, "grid": "uniform", "t_min": END}
    process = fastdiff.VP()
    high, low = (float(process.sigma(t) / process.alpha(t)) for t in torch.tensor([1.0, END], dtype=torch.float64))
    return {"sampler": sampler, "grid": grids.sigmas(grids.karras(high, low, steps + 1)[:-1])}


def adaptive(name: str, tolerance: float) -> dict[str, Any]:
    return {"sampler": samplers.Adaptive(ADAPTIVE[name], tolerance, tolerance, couple=True), "t_min": END}


def solve(given: dict[str, Any]) -> tuple[float, int]:
    """The error of a run, and its network calls."""
    start, ends = exact_ends()
    x, info = run_of("vp", exact_eps, start, sde="vp", **given)(return_info=True)
    return distance(x, ends), info.network_calls


@functools.cache
def errors(name: str) -> dict[int, float]:
    """By network calls; of the adaptive solver the least within them."""
    if name in ADAPTIVE:
        found = [solve(adaptive(name, tolerance)) for tolerance in TOLERANCES]
        return {n: min(reached) for n in CALLS if (reached := [error for error, used in found if used <= n])}
    made = {n: solve(options(name, n)) for n in CALLS}
    if any(used != n for n, (_, used) in made.items()):
        raise AssertionError(f"{name} calls the network {[used for _, used in made.values()]} times, not {CALLS}")
    return {n: error for n, (error, _) in made.items()}


@pytest.mark.parametrize("name", [*SOLVERS, *ADAPTIVE])
def test_solver(benchmark, recorder, name):
    found, last = errors(name), CALLS[-1]
    if not found[last] <= 0.02:
        raise AssertionError(f"{name} is {found[last]:.2g} off after {last} calls: another flow or end")
    half = found.get(last // 2)
    if name not in FIRST_ORDER and half is not None and not found[last] <= 0.35 * half:
        raise AssertionError(f"{name} has {found[last]:.2g} after {last} calls and {half:.2g} after half: of order 1")
    given = adaptive(name, 1e-3) if name in ADAPTIVE else options(name, last)
    _, used = solve(given)
    start, _ = exact_ends()
    clocks = [Clock(exact_eps) for _ in range(2)]
    both = zip(clocks, (given, options("ddim", used)))
    runs = [run_of("vp", clock.net, start, sde="vp", **every) for clock, every in both]
    benchmark.group, n = "solvers", start.numel()
    ratios = compare_runs(recorder, "solvers", name, "ddim", n, used, list(zip(runs, clocks)), 0.5, "call")
    benchmark.extra_info.update(ratios)
    for calls, error in found.items():
        recorder.row("solvers", name, n, f"error of {calls} calls", [error], "ddim", [errors("ddim")[calls]])
    benchmark.pedantic(runs[0], rounds=1)
