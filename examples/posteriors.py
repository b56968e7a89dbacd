"""How far each method's draws are from posteriors that are known exactly.

The priors are mixtures of normals of one covariance, so x̂0(x_t) and the posterior given y = A x0 + noise are in closed form; of
counts, and of noise with outliers, it is a million weighted draws of the prior. What is measured is the bias of the method and of
its steps, not a network's.

    python examples/posteriors.py [--problems vector modes gap hole modes80 ...] [--methods MMPS SMC ...] [--standardize]
    python examples/posteriors.py --picture posteriors.png
    python examples/posteriors.py --coverage 200 [--methods MMPS SMC ...]

The first prints a table for each problem (`--standardize`: of a network whose data have a variance of 1).

    mean             the largest error of a number's mean, in standard deviations of the posterior
    variance         the smallest and largest ratio of a number's variance to the posterior's
    distance         the sliced Wasserstein-1 distance to exact draws by that of two sets of exact draws, means over twenty sets:
                     1 is the best
    calls, backward  of the network with all draws together

These are medians over a few seeds, each of another prior and another y. The last draws so many signals, sums of normal or
Laplace increments, and counts how often intervals that hold 90 % of the draws hold the true value.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from fastdiff import inverse


class Prior:
    """Σ_k w_k N(means_k, covariance): `means` [K, D], `weights` [K]."""

    def __init__(self, means: Tensor, weights: Tensor, covariance: Tensor) -> None:
        self.means, self.covariance = means.double(), covariance.double()
        self.log_weights = (weights.double() / weights.sum()).log()
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    def denoiser(self, process: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """E[x0 | x_t]."""
        along_means = self.means @ self.vectors

        def x0(x: Tensor, t: Tensor) -> Tensor:
            means, values, vectors, log_weights = (
                v.to(x) for v in (along_means, self.values, self.vectors, self.log_weights)
            )
            alpha, sigma = (value.view(-1, 1, 1) for value in (process.alpha(t), process.sigma(t)))
            apart = (x @ vectors)[:, None] - alpha * means
            variance = alpha**2 * values + sigma**2
            share = (log_weights - 0.5 * (apart**2 / variance).sum(2)).softmax(1)
            return (share[..., None] * (means + alpha * values / variance * apart)).sum(1) @ vectors.T

        return x0

    def given(self, matrix: Tensor, y: Tensor, noise_std: float) -> Prior:
        """The distribution of x0 given y = A x0 + noise."""
        inner = matrix @ self.covariance @ matrix.T + noise_std**2 * torch.eye(len(y), dtype=torch.float64)
        gain = torch.linalg.solve(inner, matrix @ self.covariance).T
        residual = y - self.means @ matrix.T
        log_weights = self.log_weights - 0.5 * (residual @ torch.linalg.inv(inner) * residual).sum(1)
        covariance = self.covariance - gain @ matrix @ self.covariance
        return Prior(self.means + residual @ gain.T, log_weights.softmax(0), (covariance + covariance.T) / 2)

    def mean(self) -> Tensor:
        return self.log_weights.exp() @ self.means

    def variance(self) -> Tensor:
        return self.covariance.diagonal() + self.log_weights.exp() @ (self.means - self.mean()) ** 2

    def draw(self, count: int, rng: np.random.Generator) -> Tensor:
        weights = self.log_weights.exp().numpy()
        k = rng.choice(len(weights), size=count, p=weights / weights.sum())
        z = torch.from_numpy(rng.normal(size=(count, len(self.values))))
        return self.means[k] + z * self.values.clamp(min=0).sqrt() @ self.vectors.T


def correlated(rng: np.random.Generator, numbers: int) -> Prior:
    """A normal distribution whose covariance has every entry."""
    root = torch.from_numpy(rng.normal(size=(numbers, numbers))) / numbers**0.5
    covariance = root @ root.T + 0.05 * torch.eye(numbers, dtype=torch.float64)
    return Prior(torch.from_numpy(rng.normal(size=(1, numbers))) / 2, torch.ones(1), covariance)


def modes(rng: np.random.Generator, numbers: int) -> Prior:
    """25 unit normals at (−8i, −8j), repeated, of random weights (Cardoso et al. 2023, §4)."""
    at = [[-8.0 * i, -8.0 * j] * (numbers // 2) for i in range(-2, 3) for j in range(-2, 3)]
    return Prior(torch.tensor(at), torch.from_numpy(rng.uniform(size=25)), torch.eye(numbers))


class Weighted:
    """A posterior as weighted draws of the prior, [N, D] and [N]."""

    def __init__(self, points: Tensor, log_weights: Tensor) -> None:
        self.points, self.weights = points, log_weights.softmax(0)

    def mean(self) -> Tensor:
        return self.weights @ self.points

    def variance(self) -> Tensor:
        return self.weights @ (self.points - self.mean()) ** 2

    def draw(self, count: int, rng: np.random.Generator) -> Tensor:
        weights = self.weights.numpy()
        return self.points[rng.choice(len(weights), size=count, p=weights / weights.sum())]


@dataclass
class Case:
    """One prior and what was measured of a draw of it."""

    prior: Prior
    matrix: Tensor
    y: Tensor
    noise_std: float | None
    mask: Tensor | None = None  # of the numbers that are known exactly
    link: Callable[[Tensor], Tensor] | None = None  # of the measurements' means
    noise: Any = "gaussian"
    log_density: Callable[[Tensor, Tensor], Tensor] | None = None  # of that noise

    def problem(self) -> inverse.Problem:
        operator: Any = self.matrix.float() if self.mask is None else inverse.Mask(self.mask)
        link = self.link
        if link is not None:
            operator = lambda x: link(x @ self.matrix.to(x).T)  # noqa: E731
        return inverse.Problem(self.y.float(), operator, self.noise_std, self.noise)

    def posterior(self) -> Prior | Weighted:
        if self.link is None or self.log_density is None:
            return self.prior.given(self.matrix, self.y, float(self.noise_std or 0.0))
        points = self.prior.draw(1_000_000, np.random.default_rng(2))
        return Weighted(points, self.log_density(self.link(points @ self.matrix.T), self.y))


def measured(prior: Prior, measurements: int, rng: np.random.Generator) -> Case:
    """By a random matrix, with noise (Cardoso et al. 2023, §4)."""
    numbers = len(prior.values)
    left, _ = np.linalg.qr(rng.normal(size=(measurements, measurements)))
    right, _ = np.linalg.qr(rng.normal(size=(numbers, measurements)))
    scale = rng.uniform(size=measurements)
    matrix = torch.from_numpy(left @ np.diag(scale) @ right.T)
    noise_std = float(rng.uniform() * scale.max())
    y = matrix @ prior.draw(1, rng)[0] + noise_std * torch.from_numpy(rng.normal(size=measurements))
    return Case(prior, matrix, y, noise_std)


def known(prior: Prior, count: int, rng: np.random.Generator) -> Case:
    """The first numbers of a draw, exactly."""
    numbers = len(prior.values)
    matrix = torch.eye(numbers, dtype=torch.float64)[:count]
    return Case(prior, matrix, matrix @ prior.draw(1, rng)[0], 0.0, torch.arange(numbers) < count)


def counted(prior: Prior, measurements: int, rng: np.random.Generator) -> Case:
    """Poisson's counts, whose means are 3 exp(A x0)."""
    numbers = len(prior.values)
    matrix = torch.from_numpy(rng.normal(size=(measurements, numbers))) / numbers**0.5

    def link(mean: Tensor) -> Tensor:
        return 3 * mean.exp()

    y = torch.from_numpy(rng.poisson(link(matrix @ prior.draw(1, rng)[0]).numpy())).double()
    return Case(prior, matrix, y, None, None, link, "poisson", lambda mean, y: (y * mean.log() - mean).sum(1))


def outlying(prior: Prior, measurements: int, rng: np.random.Generator) -> Case:
    """With a noise of Student's t, of two degrees of freedom, and so with outliers: its logarithm is not concave."""
    numbers = len(prior.values)
    matrix = torch.from_numpy(rng.normal(size=(measurements, numbers))) / numbers**0.5

    def log_density(mean: Tensor, y: Tensor) -> Tensor:
        return -1.5 * torch.log1p(((y - mean) / 0.2) ** 2 / 2).sum(1)

    y = matrix @ prior.draw(1, rng)[0] + 0.2 * torch.from_numpy(rng.standard_t(2, size=measurements))
    return Case(prior, matrix, y, None, None, lambda mean: mean, log_density, log_density)


@dataclass
class Kind:
    """Problems of one kind: how they are told, how many seeds, how one is made, and its measurements' noise: "normal", "none" or
    "other"."""

    told: str
    seeds: int
    make: Callable[[np.random.Generator], Case]
    noise: str = "normal"


PROBLEMS = {
    "vector": Kind("6 numbers of a correlated normal, 3 noisy measurements", 3, lambda r: measured(correlated(r, 6), 3, r)),
    "modes": Kind("25 modes in 8 numbers, 1 noisy measurement", 5, lambda r: measured(modes(r, 8), 1, r)),
    "gap": Kind("3 numbers of a correlated normal, 1 known exactly", 3, lambda r: known(correlated(r, 3), 1, r), "none"),
    "hole": Kind("25 modes in 8 numbers, 2 known exactly", 5, lambda r: known(modes(r, 8), 2, r), "none"),
    "modes2": Kind("25 modes in 8 numbers, 2 noisy measurements", 5, lambda r: measured(modes(r, 8), 2, r)),
    "modes4": Kind("25 modes in 8 numbers, 4 noisy measurements", 5, lambda r: measured(modes(r, 8), 4, r)),
    "modes80": Kind("25 modes in 80 numbers, 1 noisy measurement", 5, lambda r: measured(modes(r, 80), 1, r)),
    "counts": Kind("6 numbers of a correlated normal, 3 counts", 5, lambda r: counted(correlated(r, 6), 3, r), "other"),
    "tails": Kind("6 numbers, 3 measurements with outliers", 5, lambda r: outlying(correlated(r, 6), 3, r), "other"),
}  # fmt: skip


EVERY = ("normal", "none", "other")
EXACT = 20  # sets of exact draws that distances are means over


@dataclass
class Method:
    """of: the guidance for a problem. options: of `sample`, beside those of main(). noises: of problems that it is for."""

    of: Callable[[inverse.Problem], Any]
    options: dict[str, Any] = field(default_factory=dict)
    noises: tuple[str, ...] = ("normal", "none")


METHODS = {
    "MMPS": Method(inverse.MMPS, noises=EVERY),
    "MMPS, UniPC, 20 steps": Method(inverse.MMPS, {"sampler": "unipc", "steps": 20}, EVERY),
    "MMPS, Euler–Maruyama": Method(inverse.MMPS, {"sampler": "euler_maruyama", "grid": "fourth_root"}, EVERY),
    "SMC": Method(inverse.SMC, noises=EVERY),
    "SMC, Euler–Maruyama": Method(inverse.SMC, {"sampler": "euler_maruyama", "grid": "fourth_root"}, EVERY),
    "TMPD, diagonal": Method(lambda problem: inverse.TMPD(problem, diagonal=True)),
    "PiGDM": Method(inverse.PiGDM),
    "DPS": Method(inverse.DPS),
    "DiffPIR": Method(inverse.DiffPIR),
    "ScoreALD": Method(inverse.ScoreALD),
    "NoisedMeasurement": Method(inverse.NoisedMeasurement),
    "DDRM": Method(inverse.DDRM),
    "DAPS": Method(inverse.DAPS),
    "RePaint": Method(inverse.RePaint, noises=("none",)),
    "ILVR": Method(inverse.ILVR, noises=("none",)),
    "Replacement": Method(inverse.Replacement, noises=("none",)),
}


class Counted(torch.autograd.Function):
    """The network's output; its gradients are counted."""

    backwards = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        Counted.backwards += 1
        return grad


def sliced(a: Tensor, b: Tensor) -> float:
    """The sliced Wasserstein-1 distance of two sets of as many points, by a hundred directions."""
    direction = torch.from_numpy(np.random.default_rng(9).normal(size=(a.shape[1], 100)))
    direction /= direction.norm(dim=0)
    return float(((a.double() @ direction).sort(0).values - (b.double() @ direction).sort(0).values).abs().mean())


def drawn(
    case: Case, method: Method, process: Any, steps: int, count: int, seed: int, standardize: bool = False
) -> tuple[Tensor, int, int]:
    """Samples, and calls of the network and of its gradient; `standardize`: the network's data have a variance of 1."""
    prior, numbers = case.prior, len(case.prior.values)
    std = float(prior.variance().mean().sqrt()) if standardize else 1.0
    net = Prior(prior.means / std, prior.log_weights.exp(), prior.covariance / std**2).denoiser(process)
    model = fastdiff.ScoreModel(
        lambda x, t: Counted.apply(net(x, t)), process, "x0", "t", (numbers,),
        standardize=(np.zeros(numbers), np.full(numbers, std)) if standardize else None,
    )  # fmt: skip
    Counted.backwards = 0
    options = {"steps": steps, **(method.options or {"sampler": "ancestral", "grid": "logsnr"})}
    x, info = fastdiff.sample(
        model, num_samples=count, batch_size=count, seed=seed, guidance=method.of(case.problem()), return_info=True,
        progress=False, **options,
    )  # fmt: skip
    return x, info.network_calls, Counted.backwards


def compared(x: Tensor, case: Case, seed: int) -> tuple[float, float, float, float]:
    """mean, smallest and largest variance ratio, distance: of the numbers that are not known."""
    posterior = case.posterior()
    free = torch.ones(x.shape[1], dtype=torch.bool) if case.mask is None else ~case.mask
    rng = np.random.default_rng([seed, 1])
    exact = [posterior.draw(len(x), rng)[:, free] for _ in range(EXACT)]
    x, mean, variance = x.double()[:, free], posterior.mean()[free], posterior.variance()[free]
    ratios = x.var(0) / variance
    far = np.mean([sliced(x, other) for other in exact])
    floor = np.mean([sliced(*pair) for pair in zip(exact[::2], exact[1::2])])
    return (
        float(((x.mean(0) - mean) / variance.sqrt()).abs().max()),
        float(ratios.min()),
        float(ratios.max()),
        float(far / floor),
    )


def _log_mills(z: Tensor) -> Tensor:
    """log φ(z)/Φ(z), also where both vanish."""
    low = -torch.special.erfcx(-z.clamp(max=0) / 2**0.5).log()
    high = -0.5 * z.square() - torch.special.log_ndtr(z.clamp(min=0)) - math.log(2)
    return torch.where(z < 0, low, high) + 0.5 * math.log(2 / math.pi)


@dataclass
class Signals:
    """Sums x of independent increments u of mean 0: Laplace's of scale `width`, or normal ones of as great a mean magnitude.

    A few numbers of x are measured with noise. The model is of u, whose exact x̂0 is in closed form one number at a time.
    """

    laplace: bool
    length: int = 8
    width: float = 0.25
    measured: tuple[int, ...] = (3, 7)
    noise_std: float = 0.2

    @property
    def std(self) -> float:
        """Of the normal ones."""
        return self.width * (math.pi / 2) ** 0.5

    def denoiser(self, process: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """E[u | u_t]."""

        def x0(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = (value.double()[:, None] for value in (process.alpha(t), process.sigma(t)))
            if not self.laplace:
                return (alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * x).to(x.dtype)
            # given u_t a normal of mean r ∓ s²/width on either side of 0, each with its part above 0 as φ/Φ tells
            r, s = x.double() / alpha, sigma / alpha
            up, down = r / s - s / self.width, -r / s - s / self.width
            above, below = _log_mills(up), _log_mills(down)
            share = torch.sigmoid(below - above)
            return (s * (share * (up + above.exp()) - (1 - share) * (down + below.exp()))).to(x.dtype)

        return x0

    def case(self, rng: np.random.Generator) -> tuple[Tensor, inverse.Problem]:
        """A signal [length] and what was measured of it."""
        u = rng.laplace(0, self.width, self.length) if self.laplace else rng.normal(0, self.std, self.length)
        matrix = torch.tril(torch.ones(self.length, self.length, dtype=torch.float64))[list(self.measured)]
        y = matrix @ torch.from_numpy(u) + self.noise_std * torch.from_numpy(rng.normal(size=len(matrix)))
        return torch.from_numpy(u).cumsum(0), inverse.Problem(y.float(), matrix.float(), self.noise_std)


def coverage(
    signals: Signals, method: Method, process: Any, steps: int, count: int, problems: int
) -> tuple[float, float]:
    """The share of numbers that lie in the middle 90 % of `count` draws, and its standard error."""
    truths, draws, net = [], [], signals.denoiser(process)
    options = {"steps": steps, **(method.options or {"sampler": "euler_maruyama", "grid": "fourth_root"})}
    for seed in range(problems):
        truth, problem = signals.case(np.random.default_rng(seed))
        u = fastdiff.sample(
            net, process, shape=(signals.length,), prediction="x0", num_samples=count, seed=seed,
            guidance=method.of(problem), progress=False, **options,
        )  # fmt: skip
        truths.append(truth)
        draws.append(u.double().cumsum(1))
    ranks = fastdiff.metrics.sbc_ranks(torch.stack(truths), torch.stack(draws)).ranks
    inside = ((ranks >= 0.05 * (count + 1)) & (ranks < 0.95 * (count + 1))).double().mean(1)
    return float(inside.mean()), float(inside.std() / problems**0.5)


def picture(path: str, methods: list[str], process: Any, steps: int, count: int) -> None:
    """Two of eight numbers of which one noisy combination is measured: exact draws and those of each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    case = PROBLEMS["modes"].make(np.random.default_rng(1))
    exact = case.posterior().draw(count, np.random.default_rng([1, 1]))
    panels = {"exact": exact} | {name: drawn(case, METHODS[name], process, steps, count, 1)[0] for name in methods}
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.1 * len(panels), 2.3), sharex=True, sharey=True, squeeze=False
    )
    for axis, (name, x) in zip(axes[0], panels.items()):
        axis.scatter(*case.prior.means[:, :2].T, s=60, color="0.9", zorder=0)
        axis.scatter(*x[:, :2].T, s=2, color="tab:blue" if name != "exact" else "black", alpha=0.4, linewidths=0)
        axis.set(title=name, xlim=(-21, 21), ylim=(-21, 21), xticks=[], yticks=[], aspect="equal")
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    processes = {"vp": fastdiff.VP(), "ve": fastdiff.VE(), "subvp": fastdiff.SubVP()}
    parser = argparse.ArgumentParser(description="How far each method's draws are from posteriors that are known.")
    add = parser.add_argument
    add("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS)[:4], metavar="NAME", help=", ".join(PROBLEMS))
    add("--methods", nargs="+", choices=METHODS, metavar="NAME", help="; ".join(METHODS))
    add("--sde", choices=processes, default="vp", help="(default: vp)")
    add("--sigma-max", type=float, metavar="S", help="of ve (default: 50)")
    add("--steps", type=int, default=100, help="where the method does not say (default: 100)")
    add("--draws", type=int, default=1000, help="of each posterior (default: 1000)")
    add("--seeds", type=int, help="problems of each kind (default: 3 normal ones, 5 of modes)")
    add("--standardize", action="store_true", help="the network's data have a variance of 1")
    add("--coverage", type=int, metavar="N", help="of N signals of each kind, instead of tables")
    add("--picture", metavar="FILE", help="draws of --methods on one problem of modes, instead of tables")
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.sigma_max is not None:
        processes["ve"] = fastdiff.VE(sigma_max=a.sigma_max)
    if a.picture:
        few = ["SMC", "MMPS", "PiGDM", "DPS", "DiffPIR"]
        picture(a.picture, a.methods or few, processes[a.sde], a.steps, a.draws)
        return
    if a.coverage:
        print("| method | normal increments | Laplace increments |\n|---|---|---|")
        for label in a.methods or ("SMC", "MMPS", "PiGDM", "DiffPIR", "DPS"):
            both = [
                coverage(Signals(laplace), METHODS[label], processes[a.sde], a.steps, a.draws, a.coverage)
                for laplace in (False, True)
            ]
            print(
                f"| {label} | "
                + " | ".join(f"{100 * share:.0f} ± {100 * error:.0f} %" for share, error in both)
                + " |",
                flush=True,
            )
        return
    for kind in (PROBLEMS[name] for name in a.problems):
        print(f"\n{kind.told}; {a.sde}\n")
        print("| method | mean | variance | distance | calls | backward |\n|---|---|---|---|---|---|")
        for label in a.methods or METHODS:
            method, found = METHODS[label], []
            if kind.noise not in method.noises:
                continue
            for seed in range(a.seeds or kind.seeds):
                case = kind.make(np.random.default_rng(seed))
                x, calls, backwards = drawn(case, method, processes[a.sde], a.steps, a.draws, seed, a.standardize)
                found.append(compared(x, case, seed))
            mean, low, high, far = np.median(found, 0)
            print(f"| {label} | {mean:.2f} | {low:.2f} – {high:.2f} | {far:.1f} | {calls} | {backwards} |", flush=True)


if __name__ == "__main__":
    main()
