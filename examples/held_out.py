"""Posteriors of real data that a model has never seen, and whether they hold the truth as often as they say.

    python examples/held_out.py era5 era5_uk_t2m.npz [--model era5.safetensors] [--picture era5.png]
    python examples/held_out.py ecg mitbih100.npz [--model ecg.safetensors] [--picture ecg.png]

era5      temperatures of the air over Great Britain, 2 m above the ground, from 25 stations with 0.5 K of noise: a field of
          32 × 48 cells of a quarter degree. The model learns from 456 hours of March 2019; six other days, a day apart from
          them, are held out.
era5-40   the same from 40 cells drawn at random, half of them land.
ecg       an electrocardiogram's lead V5 from its lead MLII with 0.01 mV of noise: heartbeats of 256 samples (0.71 s), each
          lead less its median. One patient; minutes 10 to 15 and from 25 on are held out, but for their one ventricular beat.

It trains a model of the whole field or of both leads, which knows nothing of what will be measured, draws from the posterior of
each held-out sample, and prints, of the numbers that were not measured,

    RMS error     of the posterior's mean
    within 90 %   the share of true values in an interval that holds 90 %: of 19 draws the one from the smallest to the
                  largest, outside of which a truth of the draws' own distribution falls with probability 2/20
    width         of that interval
    CRPS          E|X − truth| − ½ E|X − X'| of independent draws X and X', least for the true distribution (Gneiting &
                  Raftery 2007, eq. 21)

for the model and for a normal distribution with the training set's mean and covariance (low rank and a diagonal), whose posterior
is exact, and which is scored by as many draws.

The data, as .npz files in physical units:

era5_uk_t2m.npz   `fields` [n, 33, 49] in K, `split` [n] (0 to train on, 1 to test, 2 neither), `hours` [n] since the month began,
                  `station_ij` [25, 2], `land` [33, 49] of bool, `attribution`. From `era5-2mt-2019-03-uk.grib` of the repository
                  pydata/xarray-data, by xarray with cfgrib; test days 5, 6, 15, 16, 25 and 26, a day on each side of them unused.
                  Copernicus licence: generated using Copernicus Climate Change Service information 2019; neither the European
                  Commission nor ECMWF is responsible for any use of it.
mitbih100.npz     `beats` [n, 2, 256] in mV with the R wave in the middle, `split` [n], `beat_label`, `beat_sample` of all beats,
                  of which `beat_index` [n] are those, `fs`, `attribution`. Record 100 of the MIT-BIH arrhythmia database (Moody &
                  Mark 2001; PhysioNet; Open Data Commons Attribution License), `sample-data/100.*` of the repository
                  MIT-LCP/wfdb-python, by wfdb.rdrecord and wfdb.rdann.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

import fastdiff
from fastdiff import inverse
from fastdiff.losses.times import LogNormal
from fastdiff.networks import UNet

Array = NDArray[Any]


class Samples(NamedTuple):
    """What an experiment reads.

    train, test   [n, *shape] and [m, *shape], float32
    groups        [m], the part of the held-out data that each is of
    seen          [*shape], True for what is measured
    attribution   what the data's licence asks to be said
    outline       [*shape], for pictures
    """

    train: Array
    test: Array
    groups: Array
    seen: Array
    attribution: str
    outline: Array | None = None


@dataclass(frozen=True)
class Experiment:
    """What is drawn, given what.

    read        of the file's path
    noise_std   of the measurements, in `unit`
    rank        of the normal distribution's covariance
    network     arguments of the UNet; training: of fastdiff.train
    guide       the method of fastdiff.inverse, of a problem; sampling: arguments of fastdiff.sample
    draw        a picture of samples, truth [m, *shape], measurements and draws [m, draws, *shape]
    """

    told: str
    unit: str
    read: Callable[[str], Samples]
    noise_std: float
    rank: int
    network: dict[str, Any]
    guide: Callable[[inverse.Problem], Any]
    draw: Callable[[Samples, Array, Array, Array], Any]
    training: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)


def temperatures(path: str, random: int = 0) -> Samples:
    """Fields [1, 32, 48] in K, by day; seen at the file's stations or at so many random cells, half of them land."""
    with np.load(path) as file:
        x, split, day = file["fields"][:, None, :32, :48], file["split"], file["hours"] // 24 + 1
        land, at, attribution = file["land"][:32, :48], file["station_ij"].astype(int), str(file["attribution"])
    if random:
        rng = np.random.default_rng(0)
        cells = [rng.choice(np.argwhere(kind), random // 2, replace=False) for kind in (land, ~land)]
        at = np.concatenate(cells)
    seen = np.zeros(x.shape[1:], bool)
    seen[0, at[:, 0], at[:, 1]] = True
    groups = np.array([f"{d} March" for d in day])
    return Samples(x[split == 0], x[split == 1], groups[split == 1], seen, attribution, land[None])


def heartbeats(path: str) -> Samples:
    """Beats [2, 256] in mV, each lead less its median, by block of held-out time; MLII is seen."""
    with np.load(path) as file:
        x, split, index = file["beats"], file["split"], file["beat_index"]
        label, minute = file["beat_label"][index], file["beat_sample"][index] / float(file["fs"]) / 60
        attribution = str(file["attribution"])
    x = x - np.median(x, 2, keepdims=True)
    test = (split == 1) & (label != "V")
    groups = np.where(minute < 20, "minutes 10 to 15", "from minute 25")[test]
    return Samples(x[split == 0], x[test], groups, np.repeat([[True], [False]], x.shape[2], 1), attribution)


# --- the two posteriors ----------------------------------------------------------------------------------------------


def trained(e: Experiment, train: Array, steps: int, seed: int) -> fastdiff.ScoreModel:
    """A model whose network sees each number less its mean and by its standard deviation; samples are in the data's units."""
    shape, limits = train.shape[1:], (float(train.min()), float(train.max()))
    torch.manual_seed(seed)
    net = UNet(shape, **e.network)
    model = fastdiff.ScoreModel(
        net, fastdiff.EDM(1.0), "edm", data_shape=shape, data_range=limits, standardize=(train.mean(0), train.std(0))
    )
    data = fastdiff.Data(torch.from_numpy(train), range=limits)
    options = {"loss": "simple", "batch_size": 32, "lr": 2e-3, "warmup": 100, "decay": True, "ema": 0.995} | e.training
    fastdiff.train(model, data, steps=steps, seed=seed, **options)
    return model


def by_model(e: Experiment, model: Any, seen: Array, y: Array, draws: int, calls: int, seed: int) -> Array:
    """Draws [m, draws, *shape] given y [m, k]."""
    each = torch.from_numpy(y).float().repeat_interleave(draws, 0)
    problem = inverse.Problem(each, inverse.Mask(torch.from_numpy(seen)), e.noise_std)
    x = fastdiff.sample(
        model, steps=calls, num_samples=len(each), batch_size=256, seed=seed, guidance=e.guide(problem), **e.sampling
    )
    return x.view(len(y), draws, *seen.shape).numpy()


class Normal:
    """N(mean, F Fᵀ + diag(rest)) with the mean and the variances of samples [n, D], F [D, rank] of their covariance's largest
    eigenvalues."""

    def __init__(self, x: Array, rank: int) -> None:
        self.mean = x.mean(0, dtype=float)
        _, s, v = np.linalg.svd(x - self.mean, full_matrices=False)
        self.factor = v[:rank].T * s[:rank] / (len(x) - 1) ** 0.5
        self.rest = np.maximum(x.var(0, dtype=float, ddof=1) - (self.factor**2).sum(1), 0)

    def draw(self, count: int, rng: np.random.Generator) -> Array:
        z = rng.standard_normal((count, self.factor.shape[1]))
        return self.mean + z @ self.factor.T + self.rest**0.5 * rng.standard_normal((count, len(self.mean)))

    def given(self, seen: Array, y: Array, noise_std: float, draws: int, rng: np.random.Generator) -> Array:
        """Draws [m, draws, D] given y [m, k], the numbers that are `seen` [D] with noise: draws x of the prior, moved by what
        their own measurements lack, x + C Aᵀ (A C Aᵀ + σ²)⁻¹ (y − A x − σ z)."""
        across = self.factor @ self.factor[seen].T  # C Aᵀ, [D, k]
        across[seen, np.arange(seen.sum())] += self.rest[seen]
        gain = np.linalg.solve(across[seen] + noise_std**2 * np.eye(seen.sum()), across.T).T
        x = self.draw(len(y) * draws, rng)
        measured = x[:, seen] + noise_std * rng.standard_normal((len(x), seen.sum()))
        return (x + (np.repeat(y, draws, 0) - measured) @ gain.T).reshape(len(y), draws, -1)


# --- how good they are -----------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Means over samples and numbers, but for rmse, the root of one."""

    rmse: float
    within: float
    width: float
    crps: float


def scored(truth: Array, draws: Array) -> Scores:
    """Of truth [m, k] and draws [m, L, k], L + 1 a multiple of 20."""
    ordered, count = np.sort(draws, 1), draws.shape[1]
    out = (count + 1) // 20  # that is a twentieth of truth and draws on either side
    low, high = ordered[:, out - 1], ordered[:, count - out]
    weights = (2 * np.arange(1, count + 1) - count - 1) / (count * (count - 1))  # half the mean distance of two draws
    crps = np.abs(draws - truth[:, None]).mean(1) - (ordered * weights[:, None]).sum(1)
    within = (truth > low) & (truth < high)
    rmse = ((draws.mean(1) - truth) ** 2).mean() ** 0.5
    return Scores(float(rmse), float(within.mean()), float((high - low).mean()), float(crps.mean()))


def table(unit: str, truth: Array, posteriors: dict[str, Array], groups: Array) -> list[str]:
    """Lines of Markdown: all samples, then each group's."""
    lines = [
        f"| | posterior | RMS error, {unit} | within 90 % | width, {unit} | CRPS, {unit} |",
        "|---|---|---|---|---|---|",
    ]
    for group in ("all", *dict.fromkeys(groups)):
        of = np.ones(len(truth), bool) if group == "all" else groups == group
        for name, draws in posteriors.items():
            s = scored(truth[of], draws[of])
            lines.append(f"| {group} | {name} | {s.rmse:.3g} | {s.within:.3f} | {s.width:.3g} | {s.crps:.3g} |")
    return lines


# --- pictures --------------------------------------------------------------------------------------------------------


def maps(samples: Samples, truth: Array, y: Array, draws: Array) -> Any:
    """Three fields: truth, stations, two draws, the draws' mean and their standard deviation."""
    import matplotlib.pyplot as plt

    chosen = [k * (len(truth) - 1) // 2 for k in range(3)]
    figure, axes = plt.subplots(3, 6, figsize=(13, 5.2), layout="constrained")
    i, j = np.argwhere(samples.seen[0]).T
    spread = draws[chosen].std(1, ddof=1).max()
    for row, k in zip(axes, chosen):
        limits = {"vmin": truth[k].min() - 273.15, "vmax": truth[k].max() - 273.15, "cmap": "coolwarm"}
        fields = [truth[k], None, draws[k, 0], draws[k, 1], draws[k].mean(0)]
        for axis, x in zip(row, fields):
            if x is not None:
                shown = axis.imshow(x[0] - 273.15, **limits)
        row[1].scatter(j, i, c=y[k] - 273.15, s=22, edgecolors="black", linewidths=0.4, **limits)
        row[1].set(xlim=(-0.5, 47.5), ylim=(31.5, -0.5), aspect="equal")
        figure.colorbar(shown, ax=row[:5].tolist(), pad=0.01, label="°C")
        shown = row[5].imshow(draws[k, :, 0].std(0, ddof=1), vmin=0, vmax=spread, cmap="viridis")
        figure.colorbar(shown, ax=row[5], pad=0.02, label="K")
        row[0].set_ylabel(samples.groups[k])
        for axis in row:
            axis.contour(samples.outline[0], [0.5], colors="0.25", linewidths=0.5)
            axis.set(xticks=[], yticks=[])
    titles = ("held-out truth", "measured", "a draw", "another", "mean of the draws", "their standard deviation")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=10)
    return figure


def leads(samples: Samples, truth: Array, y: Array, draws: Array) -> Any:
    """Four beats: MLII as measured; the true V5, three draws, the range of the middle 90 %."""
    import matplotlib.pyplot as plt

    length = truth.shape[2]
    ms = (np.arange(length) - length // 2) / 0.36
    figure, axes = plt.subplots(
        2, 4, figsize=(13, 5.4), sharex=True, sharey="row", layout="constrained", height_ratios=(2, 3)
    )
    for (above, below), k in zip(axes.T, [k * (len(truth) - 1) // 3 for k in range(4)]):
        above.plot(ms, y[k], color="0.4", linewidth=1, label="MLII, measured")
        above.set_title(samples.groups[k], fontsize=10)
        v5 = np.sort(draws[k, :, 1], 0)
        out = (len(v5) + 1) // 20
        below.fill_between(
            ms, v5[out - 1], v5[-out], color="tab:blue", alpha=0.3, linewidth=0, label="90 % of the posterior"
        )
        below.plot(ms, draws[k, :3, 1].T, color="tab:blue", linewidth=0.6, label=["three draws", None, None])
        below.plot(ms, draws[k, :, 1].mean(0), color="tab:red", linewidth=1, label="mean of the draws")
        below.plot(ms, truth[k, 1], color="black", linewidth=0.9, label="V5, held out")
        below.set(xlabel="ms from the R wave")
    for axis in axes[:, 0]:
        axis.set_ylabel("mV")
    lines, names = (a + b for a, b in zip(*(axis.get_legend_handles_labels() for axis in axes[:, 0])))
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), fontsize=9)
    return figure


FIELDS = Experiment(
    told="temperatures from 25 stations", unit="K", read=temperatures, noise_std=0.5, rank=100,
    network={"channels": 16, "multipliers": (1, 2, 4, 4), "blocks": 1}, training={"batch_size": 16, "times": LogNormal(0.0, 1.8)},
    guide=lambda problem: inverse.MMPS(problem, 10), sampling={"sampler": "unipc"}, draw=maps,
)  # fmt: skip
EXPERIMENTS = {
    "era5": FIELDS,
    "era5-40": replace(FIELDS, told="the same from 40 random cells", read=partial(temperatures, random=40)),
    "ecg": Experiment(
        told="V5 from MLII", unit="mV", read=heartbeats, noise_std=0.01, rank=80,
        network={"channels": 32, "multipliers": (1, 1, 2, 2), "blocks": 1}, training={"times": LogNormal(0.0, 1.8)},
        guide=lambda problem: inverse.MMPS(problem, 10), sampling={"sampler": "unipc"}, draw=leads,
    ),
}  # fmt: skip


def run(a: argparse.Namespace) -> list[str]:
    """Lines of the table; a picture and a model's file, where asked for."""
    e = EXPERIMENTS[a.experiment]
    samples = e.read(a.data)
    chosen = np.linspace(0, len(samples.test) - 1, min(a.tests, len(samples.test))).round().astype(int)
    truth, seen, rng = samples.test[chosen], samples.seen, np.random.default_rng(a.seed)
    samples = samples._replace(groups=samples.groups[chosen])
    y = truth[:, seen] + e.noise_std * rng.standard_normal((len(truth), int(seen.sum())))
    began = time.perf_counter()
    if a.model and Path(a.model).exists():
        model = fastdiff.load(a.model)
        if model.data_shape != seen.shape:
            raise SystemExit(
                f"--model {a.model} is of samples of {model.data_shape}, and {a.experiment}'s are of {seen.shape}"
            )
    else:
        model = trained(e, samples.train, a.steps, a.seed)
        if a.model:
            fastdiff.save(model, a.model)
        print(f"trained on {len(samples.train)} samples in {time.perf_counter() - began:.0f} s", flush=True)
    began = time.perf_counter()
    draws = by_model(e, model, seen, y, a.draws, a.calls, a.seed)
    print(f"{a.draws} draws for each of {len(y)} samples in {time.perf_counter() - began:.0f} s", flush=True)
    flat = samples.train.reshape(len(samples.train), -1)
    normal = Normal(flat, e.rank).given(seen.ravel(), y, e.noise_std, a.draws, rng)
    if a.picture:
        import matplotlib

        matplotlib.use("Agg")
        e.draw(samples, truth, y, draws).savefig(a.picture, dpi=90)
    posteriors = {"the model's": draws[:, :, ~seen], "a normal distribution's": normal[:, :, ~seen.ravel()]}
    return [*table(e.unit, truth[:, ~seen], posteriors, samples.groups), "", samples.attribution]


def main() -> None:
    parser = argparse.ArgumentParser(description="Posteriors of real data that were held out.")
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS, help="; ".join(f"{name}: {e.told}" for name, e in EXPERIMENTS.items()))
    add("data", help="its .npz file, of which the docstring tells")
    add("--steps", type=int, default=1500, help="of training (default: 1500)")
    add("--tests", type=int, default=12, help="held-out samples, evenly among them (default: 12)")
    add("--draws", type=int, default=19, help="of each posterior: 19, 39, 59, … (default: 19)")
    add("--calls", type=int, default=12, help="of the network for a draw (default: 12)")
    add("--seed", type=int, default=0, help="of the weights, the training and the draws (default: 0)")
    add("--model", metavar="FILE", help="of the trained model, .safetensors: loaded if it exists, else written")
    add("--picture", metavar="FILE", help="a .png of a few samples and their posteriors")
    a = parser.parse_args()
    if a.draws < 19 or (a.draws + 1) % 20:
        parser.error(f"--draws must be 19, 39, 59, …, so that 90 % lie between two of them, got {a.draws}")
    if a.tests < 1:
        parser.error(f"--tests must be at least 1, got {a.tests}")
    if a.model and Path(a.model).suffix != ".safetensors":
        parser.error(f"--model must end in .safetensors, got {a.model}")
    print("\n".join(run(a)))


if __name__ == "__main__":
    main()
