"""Simulation-based inference on two moons: the posterior of θ given x, learned from pairs (θ, x) alone.

The task of sbibm (Lueckmann et al. 2021, "Benchmarking simulation-based inference", appendix T.8): θ ~ U(−1, 1)², and

    x = (r cos a + 1/4, r sin a) + (−|θ₁ + θ₂|, −θ₁ + θ₂)/√2,   a ~ U(−π/2, π/2),   r ~ N(0.1, 0.01²).

    python examples/two_moons.py

trains on 10,000 simulations and compares draws of ten posteriors with exact ones by a classifier's accuracy (C2ST: 0.5 where it
cannot tell them apart; published for neural posterior estimation at 10,000 simulations: 0.606).
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch

import fastdiff
from fastdiff.networks import MLP

MOST = 1000  # rounds of proposals


def moon(count: int, rng: np.random.Generator) -> np.ndarray:
    """x at θ = 0, [count, 2]."""
    a, r = rng.uniform(-math.pi / 2, math.pi / 2, count), rng.normal(0.1, 0.01, count)
    return np.stack((r * np.cos(a) + 0.25, r * np.sin(a)), 1)


def simulate(theta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """x [N, 2] of θ [N, 2]."""
    plus, minus = theta.sum(1), theta[:, 1] - theta[:, 0]
    return moon(len(theta), rng) + np.stack((-np.abs(plus), minus), 1) / math.sqrt(2)


def posterior(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Exact draws of θ [count, 2] given one x [2].

    Given x, θ ↦ x − (−|θ₁ + θ₂|, −θ₁ + θ₂)/√2 keeps areas and takes two θ to each point; so with a flat prior these points are
    distributed as a moon, where they have θ in the prior's square, and either sign of θ₁ + θ₂ is as likely. ValueError where
    fewer than one in MOST have.
    """
    found, tries = np.empty((0, 2)), 0
    while len(found) < count:
        if tries == MOST:
            raise ValueError(f"x must be what some θ in the prior's square gives, got {np.asarray(x).tolist()}")
        tries += 1
        plus, minus = ((moon(count, rng) - x) * math.sqrt(2) * [1, -1]).T
        plus, possible = plus * rng.choice([-1, 1], count), plus >= 0
        theta = np.stack((plus - minus, plus + minus), 1) / 2
        found = np.concatenate((found, theta[possible & (np.abs(theta) <= 1).all(1)]))
    return found[:count]


# of sbibm 1.1.0 (MIT), files/num_observation_1 to 10
OBSERVATIONS = np.array([
    (-0.6396706, 0.16234657), (-0.5676688, -0.33194834), (0.0030109584, -0.6457662), (-0.25049388, 0.633055),
    (-0.66463584, -0.42604533), (-0.12940255, 0.3873573), (0.19458583, 1.0400153), (0.13603824, 0.9160449),
    (-0.17962828, -0.5452459), (0.14563406, -1.170141),
])  # fmt: skip


def trained(simulations: int, steps: int, seed: int) -> fastdiff.ScoreModel:
    """The model of θ given x, of as many simulations."""
    rng = np.random.default_rng(seed)
    theta = rng.uniform(-1, 1, (simulations, 2))
    data = fastdiff.load_data(theta, range=(-1, 1), cond=simulate(theta, rng))
    torch.manual_seed(seed)
    model = fastdiff.ScoreModel(MLP((2,), layers=4, cond_shape=(2,)), fastdiff.EDM(1.0), "edm", data_shape=(2,))
    fastdiff.train(
        model, data, steps=steps, loss="simple", batch_size=512, lr=1e-3, warmup=100, decay=True, ema=0.999, seed=seed
    )
    return model


def drawn(model: fastdiff.ScoreModel, x: np.ndarray, count: int) -> np.ndarray:
    """Draws of θ [count, 2] given one x [2], those within the prior's square."""
    found, first = np.empty((0, 2)), 0
    while len(found) < count:
        if first == MOST * count:
            raise ValueError(
                f"the model's draws given x = {x.tolist()} are outside of the prior's square: train it for longer"
            )
        cond = torch.from_numpy(x).expand(count, 2)
        theta = (
            fastdiff.sample(model, sampler="heun", steps=40, num_samples=count, first_sample=first, cond=cond)
            .double()
            .numpy()
        )
        found, first = np.concatenate((found, theta[(np.abs(theta) <= 1).all(1)])), first + count
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description="Posteriors of two moons from simulations alone.")
    parser.add_argument("--simulations", type=int, default=10000, help="pairs of parameters and data (default: 10000)")
    parser.add_argument("--steps", type=int, default=8000, help="of training (default: 8000)")
    parser.add_argument("--draws", type=int, default=10000, help="of each posterior (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of simulations, weights and training (default: 0)")
    a = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    model = trained(a.simulations, a.steps, a.seed)
    print(f"trained on {a.simulations} simulations in {time.perf_counter() - began:.0f} s: {model}", flush=True)
    accuracies = []
    for k, x in enumerate(OBSERVATIONS, start=1):
        exact = posterior(x, a.draws, np.random.default_rng(k))
        accuracies.append(float(fastdiff.metrics.c2st(exact, drawn(model, x, a.draws))))
        print(f"observation {k:2d}: C2ST {accuracies[-1]:.3f}", flush=True)
    print(f"mean C2ST {np.mean(accuracies):.3f} in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
