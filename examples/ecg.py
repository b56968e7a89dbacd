"""An electrocardiogram's missing lead: V5 of a heartbeat given MLII, by a model that was trained on both together.

    python examples/ecg.py beats.npz [--steps 1500] [--picture ecg.png]

beats.npz holds `beats` [n, 2, 256] in mV (MLII and V5, 360 Hz, the R wave in the middle) and `split` [n], 0 to train on and
1 to test. The figures of docs/control.md are of record 100 of the MIT-BIH arrhythmia database (Moody & Mark 2001; Open Data
Commons Attribution License; files 100.dat, 100.hea and 100.atr), one patient, minutes 10 to 15 and from 25 on held out. Each
window and lead is taken less its median, and MLII with 0.01 mV of noise.

It prints, for the model and for a normal distribution with the training beats' mean and covariance (rank 80), whose posterior
is exact, of V5's numbers: the RMS error of the posterior's mean, the share within its central 90 % interval, the interval's
mean width, and the mean CRPS.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import fastdiff
from fastdiff import inverse
from fastdiff.networks import UNet

Array = NDArray[np.float64]
NOISE = 0.01  # mV
RANK = 80
LEVELS = (0.05, 0.95)


def beats(path: str) -> tuple[Array, Array]:
    """To train on and to test, [n, 2, 256] in mV, each window and lead less its median."""
    with np.load(path) as file:
        x, split = file["beats"].astype(float), file["split"]
    x = x - np.median(x, 2, keepdims=True)
    return x[split == 0], x[split == 1]


def trained(x: Array, steps: int, seed: int) -> fastdiff.ScoreModel:
    """A model of both leads, in mV."""
    torch.manual_seed(seed)
    net = UNet((2, 256), channels=32, multipliers=(1, 1, 2, 2), blocks=1)
    model = fastdiff.ScoreModel(net, fastdiff.EDM(0.17), "edm", data_shape=(2, 256), data_range=(-1.0, 2.0))
    data = fastdiff.Data(torch.from_numpy(x).float(), range=(-1.0, 2.0))
    fastdiff.train(
        model, data, steps=steps, loss="simple", batch_size=64, lr=2e-3, warmup=100, decay=True, ema=0.999, seed=seed
    )
    return model


def by_model(model: fastdiff.ScoreModel, y: Array, draws: int, steps: int) -> Array:
    """Draws of V5 given MLII [n, 256], [n, draws, 256]."""
    mask = torch.tensor([[True], [False]]).expand(2, 256)
    each = torch.from_numpy(y).float().repeat_interleave(draws, 0)
    guide = inverse.MMPS(inverse.Problem(each, inverse.Mask(mask), NOISE))
    x = fastdiff.sample(
        model, steps=steps, sampler="unipc", num_samples=len(each), batch_size=512, seed=1, guidance=guide
    )  # fmt: skip
    return x[:, 1].view(len(y), draws, 256).double().numpy()


def by_normal(train: Array, y: Array) -> tuple[Array, Array]:
    """Mean [n, 256] and standard deviation [256] of V5 given MLII, of the normal distribution with the beats' covariance."""
    x = train.reshape(len(train), -1)
    mean = x.mean(0)
    _, s, v = np.linalg.svd(x - mean, full_matrices=False)
    factor = v[:RANK].T * s[:RANK] / math.sqrt(len(x) - 1)
    covariance = factor @ factor.T
    covariance[np.diag_indices(512)] = x.var(0, ddof=1)
    gain = np.linalg.solve(covariance[:256, :256] + NOISE**2 * np.eye(256), covariance[:256, 256:]).T
    left = covariance[256:, 256:] - gain @ covariance[:256, 256:]
    return mean[256:] + (y - mean[:256]) @ gain.T, np.sqrt(left.diagonal())


def scored(truth: Array, draws: Array) -> tuple[float, float, float, float]:
    """RMS error of the mean, share within the central 90 %, its width, CRPS (of draws: Gneiting & Raftery 2007, eq. 21)."""
    low, high = np.quantile(draws, LEVELS, axis=1)
    ordered, count = np.sort(draws, 1), draws.shape[1]
    weights = (2 * np.arange(1, count + 1) - count - 1) / (count * (count - 1))  # half the mean distance of two draws
    crps = np.abs(draws - truth[:, None]).mean(1) - (ordered * weights[:, None]).sum(1)
    rmse = math.sqrt(float(((draws.mean(1) - truth) ** 2).mean()))
    return rmse, float(((truth >= low) & (truth <= high)).mean()), float((high - low).mean()), float(crps.mean())


def picture(path: str, truth: Array, y: Array, draws: Array) -> None:
    """Four beats: MLII as measured, the true V5, and the draws' middle 90 %."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ms = (np.arange(256) - 128) / 0.36
    figure, axes = plt.subplots(1, 4, figsize=(13, 2.8), sharex=True, sharey=True)
    for k, axis in enumerate(axes):
        at = k * (len(truth) - 1) // 3
        axis.plot(ms, y[at], color="0.6", linewidth=1, label="MLII, measured")
        axis.fill_between(
            ms,
            *np.quantile(draws[at], LEVELS, axis=0),
            color="tab:blue",
            alpha=0.35,
            linewidth=0,
            label="V5, 90 % of the draws",
        )
        axis.plot(ms, truth[at], color="black", linewidth=1, label="V5, held out")
        axis.set(xlabel="ms from the R wave")
    axes[0].set_ylabel("mV")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="An electrocardiogram's missing lead.")
    parser.add_argument("data", help="a .npz of beats and split")
    parser.add_argument("--steps", type=int, default=1500, help="of training (default: 1500)")
    parser.add_argument("--tests", type=int, default=60, help="beats, evenly among those held out (default: 60)")
    parser.add_argument("--draws", type=int, default=20, help="of each (default: 20)")
    parser.add_argument("--calls", type=int, default=20, help="of the network for a draw (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and training (default: 0)")
    parser.add_argument("--picture", metavar="FILE")
    a = parser.parse_args()
    began = time.perf_counter()
    train, test = beats(a.data)
    test = test[np.linspace(0, len(test) - 1, a.tests).round().astype(int)]
    y, truth = test[:, 0] + NOISE * np.random.default_rng(0).standard_normal((len(test), 256)), test[:, 1]
    model = trained(train, a.steps, a.seed)
    print(f"trained on {len(train)} beats in {time.perf_counter() - began:.0f} s: {Path(a.data).name}", flush=True)
    mean, deviation = by_normal(train, y)
    normal = mean[:, None] + deviation * np.random.default_rng(1).standard_normal((len(y), a.draws, 256))
    draws = by_model(model, y, a.draws, a.calls)
    print("| posterior of V5 | RMS error, mV | within 90 % | width, mV | CRPS, mV |\n|---|---|---|---|---|")
    for name, each in (("a normal distribution's", normal), (f"the model's, MMPS, {a.calls} calls", draws)):
        print("| {} | {:.4f} | {:.3f} | {:.3f} | {:.4f} |".format(name, *scored(truth, each)))
    print(f"{time.perf_counter() - began:.0f} s in all")
    if a.picture:
        picture(a.picture, truth, y, draws)


if __name__ == "__main__":
    main()
