"""Closed forms to test against: data distributions whose score, marginals and probability-flow map are known exactly.

`x` is `[B, *shape]`; a perturbation kernel is `x = alpha x_0 + sigma eps` with `alpha`, `sigma` floats or `[B]`.
Everything is computed in float64 and returned in the dtype of x. Nothing of fastdiff is imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Level = float | Tensor


def _column(level: Level, x: Tensor, dim: int = 2) -> Level:
    """`[B]` as `[B, 1, ...]` of `dim` axes, so that it broadcasts over the rest; a number stays one."""
    return level.to(x.device, torch.float64).reshape(-1, *[1] * (dim - 1)) if isinstance(level, Tensor) else level


def _noised(x0: Tensor, alpha: float, sigma: float, generator: torch.Generator | None) -> Tensor:
    return alpha * x0 + sigma * torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)


class Gaussian:
    """N(mean, cov) with `mean` `[*shape]` and `cov` `[D, D]` (D = number of elements), or `std` a number or `[*shape]`.

    `std=0` is a point mass; its `eps` and `x0` are exact too.
    """

    def __init__(self, mean: Tensor | Sequence, cov: Tensor | None = None, std: float | Tensor | None = None) -> None:
        if (cov is None) == (std is None):
            raise ValueError("give either cov or std")
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.shape = self.mean.shape
        if cov is not None:
            eigenvalues, self._basis = torch.linalg.eigh(cov.to(self.mean))
            # Rounding may turn the zero eigenvalues of a singular covariance negative.
            self._variances = eigenvalues.clamp(min=0)
        else:
            self._basis = None
            self._variances = torch.as_tensor(std, dtype=torch.float64).expand(self.shape).reshape(-1) ** 2

    def _centred(self, x: Tensor, alpha: Level) -> Tensor:
        """`x - alpha mean` in the eigenbasis of the covariance, `[B, D]`."""
        y = x.double().flatten(1) - alpha * self.mean.reshape(1, -1)
        return y if self._basis is None else y @ self._basis

    def _restored(self, y: Tensor, alpha: Level, x: Tensor) -> Tensor:
        y = y if self._basis is None else y @ self._basis.T
        return (y + alpha * self.mean.reshape(1, -1)).reshape(x.shape).to(x.dtype)

    def score(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """`grad log p(x)` of the marginal."""
        alpha, sigma = _column(alpha, x), _column(sigma, x)
        return self._restored(-self._centred(x, alpha) / (alpha**2 * self._variances + sigma**2), 0.0, x)

    def eps(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """`E[eps | x] = -sigma score`."""
        alpha, sigma = _column(alpha, x), _column(sigma, x)
        return self._restored(sigma * self._centred(x, alpha) / (alpha**2 * self._variances + sigma**2), 0.0, x)

    def x0(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """`E[x_0 | x]`."""
        alpha, sigma = _column(alpha, x), _column(sigma, x)
        gain = alpha * self._variances / (alpha**2 * self._variances + sigma**2)
        return self._restored(gain * self._centred(x, alpha), 1.0, x)

    def log_prob(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """`log p(x)` of the marginal in nats, `[B]`."""
        alpha, sigma = _column(alpha, x), _column(sigma, x)
        variances = alpha**2 * self._variances + sigma**2
        return -0.5 * (self._centred(x, alpha) ** 2 / variances + (2 * math.pi * variances).log()).sum(1).to(x.dtype)

    def sample(
        self, n: int, alpha: float = 1.0, sigma: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """`n` draws of the marginal, `[n, *shape]`, float64."""
        z = torch.empty(n, self.mean.numel(), dtype=torch.float64, device=self.mean.device).normal_(generator=generator)
        x0 = self._restored(z * self._variances.sqrt(), 1.0, z).reshape(n, *self.shape)
        return _noised(x0, alpha, sigma, generator)

    def ode_map(self, x: Tensor, alpha_t: Level, sigma_t: Level, alpha_s: Level, sigma_s: Level) -> Tensor:
        """Where the probability-flow ODE of any linear process takes x from level t to level s.

        The flow keeps each eigendirection's standard score: `(x_s - alpha_s m) / std_s = (x_t - alpha_t m) / std_t`.
        """
        alpha_t, sigma_t = _column(alpha_t, x), _column(sigma_t, x)
        alpha_s, sigma_s = _column(alpha_s, x), _column(sigma_s, x)
        ratio = (alpha_s**2 * self._variances + sigma_s**2) / (alpha_t**2 * self._variances + sigma_t**2)
        return self._restored(ratio**0.5 * self._centred(x, alpha_t), alpha_s, x)


class Mixture:
    """`sum_k weights_k N(means_k, stds_k^2)`: `weights` `[K]`, `means` `[K, *shape]`, `stds` `[K]` or `[K, *shape]`."""

    def __init__(self, weights: Tensor | Sequence, means: Tensor | Sequence, stds: Tensor | Sequence) -> None:
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.weights = self.weights / self.weights.sum()
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.shape = self.means.shape[1:]
        flat = self.means.flatten(1)
        self._variances = torch.as_tensor(stds, dtype=torch.float64).reshape(len(flat), -1).expand_as(flat) ** 2

    def _components(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Per component k: `log(weights_k p_k(x))` `[B, K]`, `x - alpha means_k` and the variances (`[B, K, D]`)."""
        centred = x.double().flatten(1)[:, None] - alpha * self.means.flatten(1)[None]
        variances = alpha**2 * self._variances[None] + sigma**2
        log_density = -0.5 * (centred**2 / variances + (2 * math.pi * variances).log()).sum(2)
        return self.weights.log() + log_density, centred, variances

    def _mean_over_components(self, log_joint: Tensor, values: Tensor, x: Tensor) -> Tensor:
        responsibilities = torch.softmax(log_joint, dim=1)
        return (responsibilities[:, :, None] * values).sum(1).reshape(x.shape).to(x.dtype)

    def score(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """`grad log p(x)` of the marginal."""
        log_joint, centred, variances = self._components(x, _column(alpha, x, 3), _column(sigma, x, 3))
        return self._mean_over_components(log_joint, -centred / variances, x)

    def eps(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """`E[eps | x] = -sigma score`."""
        alpha, sigma = _column(alpha, x, 3), _column(sigma, x, 3)
        log_joint, centred, variances = self._components(x, alpha, sigma)
        return self._mean_over_components(log_joint, sigma * centred / variances, x)

    def x0(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """`E[x_0 | x]`."""
        alpha, sigma = _column(alpha, x, 3), _column(sigma, x, 3)
        log_joint, centred, variances = self._components(x, alpha, sigma)
        gain = alpha * self._variances / variances
        return self._mean_over_components(log_joint, self.means.flatten(1) + gain * centred, x)

    def log_prob(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """`log p(x)` of the marginal in nats, `[B]`."""
        log_joint, _, _ = self._components(x, _column(alpha, x, 3), _column(sigma, x, 3))
        return torch.logsumexp(log_joint, dim=1).to(x.dtype)

    def sample(
        self, n: int, alpha: float = 1.0, sigma: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """`n` draws of the marginal, `[n, *shape]`, float64."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        std = self._variances.sqrt().reshape(self.means.shape)[k]
        means = self.means[k]
        z = torch.empty_like(means).normal_(generator=generator)
        return _noised(means + std * z, alpha, sigma, generator)


def gaussian_chain(mean0: float, var0: float, rows: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """Mean and variance at the end of the scalar chain `x <- A x + B + C z`, z ~ N(0, 1) anew in each row (A, B, C)."""
    mean, var = mean0, var0
    for a, b, c in rows:
        mean, var = a * mean + b, a**2 * var + c**2
    return mean, var


def measured_order(errors: Sequence[float], steps: Sequence[int]) -> float:
    """The p of `error ~ steps^-p`: minus the least-squares slope of log error against log step count."""
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).log()
    x = x - x.mean()
    return -float((x * y).sum() / (x * x).sum())
