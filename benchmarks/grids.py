"""The table of docs/samplers.md: how far each solver ends from the flow's own solution, by the grid on which it stands.

    python benchmarks/grids.py [MODEL …]

The error is the root mean square over the numbers of the samples; a figure of the table is its geometric mean over nine models,
with as many network calls as the table says. The flow is followed to where the run ends: to the lowest noise, or, where a grid
ends with 0, to the mean of the data from there, which is next to the flow's own end.
"""

import math
import sys

import torch
from problems import CENTRES, SPREAD, VECTOR, trained

import fastdiff
from fastdiff import samplers

GRIDS = ("fourth_root", "karras", "logsnr", "quadratic", "uniform")
CALLS = (8, 32)
# solver -> network calls of a step
SOLVERS = {
    samplers.DDIM(): 1, samplers.Heun(): 2, samplers.DPM2(): 2, samplers.LMS(): 1, samplers.DEIS(): 1,
    samplers.DPMSolver(): 2, samplers.DPMSolver(order=3): 3, samplers.DPMSolverPP2S(): 2, samplers.DPMSolverPP(): 1,
    samplers.DPMSolverPP(order=3): 1, samplers.UniPC(): 1, samplers.UniPC(order=3): 1, samplers.SA(tau=0.0): 1,
}  # fmt: skip
TRAINED = ("digits-vp", "digits-ve", "digits-subvp")
EXACT = (fastdiff.VP(), fastdiff.VE(), fastdiff.SubVP(), fastdiff.EDM(), fastdiff.OU())


def mixture(process):
    """Eight Gaussians in the plane, with their exact score."""

    def score(x, t):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        variance = (alpha * SPREAD) ** 2 + sigma**2
        away = x[:, None] - alpha[..., None] * CENTRES.to(x)
        share = torch.softmax(-(away**2).sum(2) / (2 * variance), 1)
        return -(share[..., None] * away).sum(1) / variance

    return fastdiff.ScoreModel(score, process, "score", data_shape=(2,))


def errors(model, samples):
    """{(solver, grid, calls): error}, infinite where the run leaves the finite numbers."""
    start = model.process.prior_std * fastdiff.normal(samples, model.data_shape, seed=5)
    options = {"num_samples": samples, "x_init": start, "progress": False}
    wanted = {
        denoised: fastdiff.sample(model, sampler=samplers.Adaptive(rtol=1e-6, atol=1e-6, denoise=denoised), **options)
        for denoised in (False, True)
    }
    found = {}
    for solver, each in SOLVERS.items():
        for grid in GRIDS:
            for calls in CALLS:
                try:
                    x, info = fastdiff.sample(
                        model, steps=calls // each, sampler=solver, grid=grid, return_info=True, **options
                    )
                    end = wanted[info.table.end.sigma == 0]
                    found[solver, grid, calls] = float((x - end).square().mean().sqrt())
                except fastdiff.errors.NonFiniteError:
                    found[solver, grid, calls] = math.inf
    return found


def main():
    models = {name: (fastdiff.load(name), 32) for name in TRAINED}
    net, _ = trained("MLP 256x2, time scale 1")
    models["mlp-vp"] = fastdiff.ScoreModel(net, "vp", data_shape=VECTOR), 256
    models |= {f"mixture-{process.name}": (mixture(process), 256) for process in EXACT}
    every = {}
    for name in sys.argv[1:] or models:
        model, samples = models[name]
        print(name, file=sys.stderr)
        every[name] = errors(model, samples)
    print("| solver | calls | " + " | ".join(f'`"{grid}"`' for grid in GRIDS) + " |")
    print("|---|---|" + "---|" * len(GRIDS))
    for solver in SOLVERS:
        for calls in CALLS:
            means = [math.exp(sum(math.log(found[solver, grid, calls]) for found in every.values()) / len(every))
                     for grid in GRIDS]  # fmt: skip
            shown = [f"**{mean:.2g}**" if mean == min(means) else f"{mean:.2g}" for mean in means]
            order = f" {solver.order}" if hasattr(solver, "order") else ""
            print(f"| {type(solver).__name__}{order} | {calls} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
