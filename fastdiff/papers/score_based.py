"""The algorithms as their papers print them, in plain PyTorch: an oracle for tests and an opponent for benchmarks.

Nothing of fastdiff is imported. A state `x` is `[B, *]` and all arithmetic is in its dtype; schedules are 1-D
tensors or lists of floats, read as Python floats. A model is called with the state and one Python float (the time
or the noise level), except in `ddpm_training_loss`. The perturbation kernel is `x_t = alpha x_0 + sigma eps`.

Every sampler returns the list of states after each update of x: a predictor, a corrector and a churn are one update,
a Heun step is two (the Euler stage, then the corrected state). Where update k (from 0) needs noise it is `noise(k)`,
a tensor like x; not called where its coefficient is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Model = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]
Schedule = Iterable[float]


def _floats(schedule: Schedule) -> list[float]:
    return [float(value) for value in schedule]


def _per_sample(value: Tensor, x: Tensor) -> Tensor:
    """`[B]` as `[B, 1, ...]` in the dtype of x, so that it multiplies x sample by sample."""
    return value.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _add_noise(mean: Tensor, std: float, noise: Noise, k: int) -> Tensor:
    return mean + std * noise(k) if std != 0 else mean


def _alpha_bars(betas: list[float]) -> list[float]:
    """`[1, alpha_bar_1, ..., alpha_bar_T]`: the leading 1 makes the index the paper's t."""
    bars = [1.0]
    for beta in betas:
        bars.append(bars[-1] * (1 - beta))
    return bars


# ---- Ho, Jain & Abbeel 2020, "Denoising diffusion probabilistic models" -------------------------------------------


def ddpm_training_loss(
    eps_model: Callable[[Tensor, Tensor], Tensor], x0: Tensor, t: Tensor, eps: Tensor, alpha_bar: Schedule
) -> Tensor:
    """Algorithm 1, eq. 14: the mean over elements of `(eps - eps_model(sqrt(ab_t) x0 + sqrt(1-ab_t) eps, t))^2`.

    `x0`, `eps` `[B, *]`; `t` `[B]` integers 1..T; `alpha_bar` `[T]`, its first entry is t = 1. Returns `[B]`.
    """
    bar = torch.as_tensor(alpha_bar, dtype=torch.float64, device=x0.device)[t - 1]
    x_t = _per_sample(bar.sqrt(), x0) * x0 + _per_sample((1 - bar).sqrt(), x0) * eps
    return (eps - eps_model(x_t, t)).square().flatten(1).mean(1)


def ddpm_sample(
    eps_model: Model, x: Tensor, betas: Schedule, noise: Noise, variance: str = "posterior"
) -> list[Tensor]:
    """Algorithm 2, for t = T..1 with z = 0 at t = 1; the model sees float(t):

        x_{t-1} = (x_t - beta_t / sqrt(1 - ab_t) eps_model(x_t, t)) / sqrt(alpha_t) + sigma_t z

    sigma_t^2 is beta_t ("beta") or (1 - ab_{t-1}) / (1 - ab_t) beta_t ("posterior"), section 3.2. `betas` `[T]`.
    """
    betas = _floats(betas)
    bars, out = _alpha_bars(betas), []
    for k, t in enumerate(range(len(betas), 0, -1)):
        beta = betas[t - 1]
        mean = (x - beta / math.sqrt(1 - bars[t]) * eps_model(x, float(t))) / math.sqrt(1 - beta)
        sigma2 = {"beta": beta, "posterior": (1 - bars[t - 1]) / (1 - bars[t]) * beta}[variance]
        x = _add_noise(mean, math.sqrt(sigma2) if t > 1 else 0.0, noise, k)
        out.append(x)
    return out


# ---- Nichol & Dhariwal 2021, "Improved denoising diffusion probabilistic models" -----------------------------------


def improved_ddpm_sample(
    model: Callable[[Tensor, float], tuple[Tensor, Tensor]], x: Tensor, betas: Schedule, noise: Noise
) -> list[Tensor]:
    """Equation 15, the learned range: DDPM's mean, and `Sigma = exp(u log beta_t + (1 - u) log beta_tilde_t)`.

    `model(x, t)` returns `(eps, v)`, both like x, v in [-1, 1] and u = (v + 1) / 2, as in the authors' code, which
    also replaces beta_tilde_1 = 0 by beta_tilde_2 before the logarithm. z = 0 at t = 1. `betas` `[T]`, T >= 2.
    """
    betas = _floats(betas)
    bars, out = _alpha_bars(betas), []
    tilde = [(1 - bars[t - 1]) / (1 - bars[t]) * betas[t - 1] for t in range(1, len(betas) + 1)]
    tilde[0] = tilde[1]
    for k, t in enumerate(range(len(betas), 0, -1)):
        beta = betas[t - 1]
        eps, v = model(x, float(t))
        u = (v + 1) / 2
        log_variance = u * math.log(beta) + (1 - u) * math.log(tilde[t - 1])
        x = (x - beta / math.sqrt(1 - bars[t]) * eps) / math.sqrt(1 - beta)
        if t > 1:
            x = x + torch.exp(log_variance / 2) * noise(k)
        out.append(x)
    return out


# ---- Song, Meng & Ermon 2021, "Denoising diffusion implicit models" ------------------------------------------------


def ddim_sample(
    eps_model: Model, x: Tensor, alpha_bars: Schedule, times: Schedule, noise: Noise, eta: float = 0.0
) -> list[Tensor]:
    """Equations 12 and 16, from level t to the next level s of the subsequence tau:

        x_s = sqrt(ab_s) (x_t - sqrt(1 - ab_t) eps) / sqrt(ab_t) + sqrt(1 - ab_s - sigma^2) eps + sigma z
        sigma = eta sqrt((1 - ab_s) / (1 - ab_t)) sqrt(1 - ab_t / ab_s)

    `alpha_bars` `[ab_{tau_S}, ..., ab_{tau_1}, 1]`; `times` `[tau_S, ..., tau_1]`, what `eps_model` sees.
    """
    out = []
    for k, (t, (bar_t, bar_s)) in enumerate(zip(_floats(times), pairwise(_floats(alpha_bars)), strict=True)):
        eps = eps_model(x, t)
        sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
        x0 = (x - math.sqrt(1 - bar_t) * eps) / math.sqrt(bar_t)
        # With eta = 1 the root is zero in exact arithmetic at the last level, and may round to less.
        direction = math.sqrt(max(1 - bar_s - sigma**2, 0.0)) * eps
        x = _add_noise(math.sqrt(bar_s) * x0 + direction, sigma, noise, k)
        out.append(x)
    return out


# ---- Song & Ermon 2019, "Generative modeling by estimating gradients of the data distribution" ---------------------


def annealed_langevin(
    score: Model,
    x: Tensor,
    sigmas: Schedule,
    steps_per_level: int,
    step_size: float,
    noise: Noise,
    denoise: bool = True,
) -> list[Tensor]:
    """Algorithm 1 in the form of the authors' code: for each level, `steps_per_level` times,

        alpha_i = step_size sigma_i^2 / sigma_L^2        x <- x + alpha_i score(x, sigma_i) + sqrt(2 alpha_i) z

    The paper prints `x + alpha_i / 2 score + sqrt(alpha_i) z`, the same chain with twice the step size. `sigmas`
    decreasing, `[L]`. With `denoise`, one more entry: `x + sigma_L^2 score(x, sigma_L)` (Song & Ermon 2020).
    """
    sigmas, out = _floats(sigmas), []
    for sigma in sigmas:
        alpha = step_size * sigma**2 / sigmas[-1] ** 2
        for _ in range(steps_per_level):
            x = x + alpha * score(x, sigma) + math.sqrt(2 * alpha) * noise(len(out))
            out.append(x)
    if denoise:
        out.append(x + sigmas[-1] ** 2 * score(x, sigmas[-1]))
    return out


# ---- Song, Sohl-Dickstein, Kingma, Kumar, Ermon & Poole 2021, "Score-based generative modeling through SDEs" --------


class Kernel(NamedTuple):
    """One time of `dx = f x dt + g dw`: its coefficients, and its perturbation kernel N(alpha x_0, sigma^2)."""

    f: float
    g: float
    alpha: float
    sigma: float


def ve(t: float, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Kernel:
    """Appendix C: f = 0, sigma = sigma_min (sigma_max / sigma_min)^t, g = sigma sqrt(2 ln(sigma_max / sigma_min))."""
    sigma = sigma_min * (sigma_max / sigma_min) ** t
    return Kernel(0.0, sigma * math.sqrt(2 * math.log(sigma_max / sigma_min)), 1.0, sigma)


def _beta_and_integral(t: float, beta_min: float, beta_max: float) -> tuple[float, float]:
    return beta_min + t * (beta_max - beta_min), t * beta_min + t**2 * (beta_max - beta_min) / 2


def vp(t: float, beta_min: float = 0.1, beta_max: float = 20.0) -> Kernel:
    """Appendix C: f = -beta / 2, g = sqrt(beta), alpha = e^(-int beta / 2), sigma^2 = 1 - e^(-int beta)."""
    beta, integral = _beta_and_integral(t, beta_min, beta_max)
    return Kernel(-beta / 2, math.sqrt(beta), math.exp(-integral / 2), math.sqrt(-math.expm1(-integral)))


def subvp(t: float, beta_min: float = 0.1, beta_max: float = 20.0) -> Kernel:
    """Appendices B and C: VP's f and alpha, g^2 = beta (1 - e^(-2 int beta)), sigma = 1 - e^(-int beta)."""
    beta, integral = _beta_and_integral(t, beta_min, beta_max)
    g = math.sqrt(-beta * math.expm1(-2 * integral))
    return Kernel(-beta / 2, g, math.exp(-integral / 2), -math.expm1(-integral))


class Transition(NamedTuple):
    """The kernel from level s to the noisier t: x_t = ratio x_s + sqrt(var) z, and the sigma of either end."""

    ratio: float
    var: float
    sigma_s: float
    sigma_t: float


def transitions(alphas: Schedule, sigmas: Schedule) -> list[Transition]:
    """Levels from the noisiest down, `[N + 1]`, to N steps: ratio = alpha_t / alpha_s and
    var = sigma_t^2 - ratio^2 sigma_s^2, which is sigma_t^2 - sigma_s^2 for VE and beta for VP.
    """
    levels = zip(_floats(alphas), _floats(sigmas), strict=True)
    return [
        Transition(alpha_t / alpha_s, sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2, sigma_s, sigma_t)
        for (alpha_t, sigma_t), (alpha_s, sigma_s) in pairwise(levels)
    ]


def ddpm_transitions(betas: Schedule) -> list[Transition]:
    """Steps t = T..1 of a discrete VP chain: ratio = sqrt(1 - beta_t), var = beta_t, sigma_t^2 = 1 - alpha_bar_t."""
    betas = _floats(betas)
    sigmas = [math.sqrt(1 - bar) for bar in _alpha_bars(betas)]
    return [
        Transition(math.sqrt(1 - betas[t - 1]), betas[t - 1], sigmas[t - 1], sigmas[t])
        for t in range(len(betas), 0, -1)
    ]


# A predictor's step returns the mean of the new state and the standard deviation of the noise it adds.
Step = tuple[Tensor, float]


def reverse_diffusion_step(x: Tensor, s: Tensor, step: Transition, probability_flow: bool = False) -> Step:
    """Equation 46 with f(x) = (ratio - 1) x and G^2 = var: x - f(x) + G^2 s + G z (algorithms 2 and 3).

    With `probability_flow`, x - f(x) + G^2 s / 2 without noise (appendix D.3).
    """
    f = (step.ratio - 1) * x
    if probability_flow:
        return x - f + step.var / 2 * s, 0.0
    return x - f + step.var * s, math.sqrt(step.var)


def ancestral_step(x: Tensor, s: Tensor, step: Transition, variance: str = "posterior") -> Step:
    """Equations 4 and 47: (x + var s) / ratio + std z, std^2 = var ("beta") or var sigma_s^2 / sigma_t^2 ("posterior").

    The paper takes "beta" for VP (ratio^2 = 1 - beta) and "posterior" for VE (ratio = 1).
    """
    std2 = {"beta": step.var, "posterior": step.var * step.sigma_s**2 / step.sigma_t**2}[variance]
    return (x + step.var * s) / step.ratio, math.sqrt(std2)


def predictor_corrector(
    predictor: Callable[[Tensor, int], Step] | None,
    corrector: Callable[[Tensor, int, Tensor], Tensor] | None,
    x: Tensor,
    N: int,
    noise: Noise,
    corrector_steps: int = 1,
    order: str = "corrector_first",
    final_corrector: bool = True,
    denoise: bool = True,
) -> list[Tensor]:
    """Algorithm 1 over levels 0 (noisiest) to N: `predictor(x, i)` goes from level i to i + 1 and returns
    `(mean, std)`; `corrector(x, i, z)` stays at level i.

    "predictor_first" is the order printed: predict from i, then correct at i + 1 (the correction at level N can be
    left out, since sigma may be zero there). "corrector_first" is the order of the authors' code: correct at i, then
    predict from i. `denoise`: the last predictor update adds no noise.
    """
    out: list[Tensor] = []

    def correct(x: Tensor, i: int) -> Tensor:
        for _ in range(corrector_steps if corrector is not None else 0):
            x = corrector(x, i, noise(len(out)))
            out.append(x)
        return x

    for i in range(N):
        if order == "corrector_first":
            x = correct(x, i)
        if predictor is not None:
            mean, std = predictor(x, i)
            x = _add_noise(mean, 0.0 if denoise and i == N - 1 else std, noise, len(out))
            out.append(x)
        if order == "predictor_first" and (final_corrector or i < N - 1):
            x = correct(x, i + 1)
    return out


def reverse_diffusion(
    score: Model,
    x: Tensor,
    times: Schedule,
    steps: list[Transition],
    noise: Noise,
    probability_flow: bool = False,
    denoise: bool = True,
) -> list[Tensor]:
    """Appendix E, eq. 46. `steps` from the noisiest down; `times[i]` is what the score sees before `steps[i]`."""
    times = _floats(times)

    def predictor(x: Tensor, i: int) -> Step:
        return reverse_diffusion_step(x, score(x, times[i]), steps[i], probability_flow)

    return predictor_corrector(predictor, None, x, len(steps), noise, denoise=denoise)


def ancestral_ve(
    score: Model, x: Tensor, times: Schedule, sigmas: Schedule, noise: Noise, denoise: bool = True
) -> list[Tensor]:
    """Appendix F, eq. 47, from sigma_t to the next smaller sigma_s:

        x + (sigma_t^2 - sigma_s^2) s + sqrt(sigma_s^2 (sigma_t^2 - sigma_s^2) / sigma_t^2) z

    `sigmas` decreasing, `[N + 1]` (the last may be 0); `times[i]` is what the score sees at `sigmas[i]`.
    """
    times, sigmas = _floats(times), _floats(sigmas)

    def predictor(x: Tensor, i: int) -> Step:
        var = sigmas[i] ** 2 - sigmas[i + 1] ** 2
        return x + var * score(x, times[i]), math.sqrt(sigmas[i + 1] ** 2 * var / sigmas[i] ** 2)

    return predictor_corrector(predictor, None, x, len(sigmas) - 1, noise, denoise=denoise)


def ancestral_vp(
    score: Model,
    x: Tensor,
    times: Schedule,
    steps: list[Transition],
    noise: Noise,
    variance: str = "beta",
    denoise: bool = True,
) -> list[Tensor]:
    """Equation 4: (x + beta s) / sqrt(1 - beta) + sqrt(beta) z; "posterior" has the variance of q(x_s | x_t, x_0)."""
    times = _floats(times)

    def predictor(x: Tensor, i: int) -> Step:
        return ancestral_step(x, score(x, times[i]), steps[i], variance)

    return predictor_corrector(predictor, None, x, len(steps), noise, denoise=denoise)


def euler_maruyama(
    f: Callable[[float], float],
    g: Callable[[float], float],
    score: Model,
    x: Tensor,
    times: Schedule,
    noise: Noise,
    lam: float = 1.0,
    denoise: bool = True,
) -> list[Tensor]:
    """Euler-Maruyama for `dx = [f x - (1 + lam^2) / 2 g^2 s] dt + lam g dw`, t decreasing along `times` `[N + 1]`.

    lam = 1 is the reverse SDE (eq. 6), lam = 0 the probability-flow ODE (eq. 13); every lam has the same marginals.
    """
    times = _floats(times)

    def predictor(x: Tensor, i: int) -> Step:
        t, dt = times[i], times[i + 1] - times[i]
        drift = f(t) * x - (1 + lam**2) / 2 * g(t) ** 2 * score(x, t)
        return x + drift * dt, lam * g(t) * math.sqrt(-dt)

    return predictor_corrector(predictor, None, x, len(times) - 1, noise, denoise=denoise)


def probability_flow_euler(
    f: Callable[[float], float], g: Callable[[float], float], score: Model, x: Tensor, times: Schedule
) -> list[Tensor]:
    """Euler's method for the probability-flow ODE, eq. 13: dx = [f x - g^2 s / 2] dt. `times` `[N + 1]`."""
    out = []
    for t, t_next in pairwise(_floats(times)):
        x = x + (t_next - t) * (f(t) * x - g(t) ** 2 / 2 * score(x, t))
        out.append(x)
    return out


def _langevin(x: Tensor, s: Tensor, z: Tensor, eps: float | Tensor) -> Tensor:
    root = torch.sqrt(2 * eps) if isinstance(eps, Tensor) else math.sqrt(2 * eps)
    return x + eps * s + root * z


def langevin_step_batch_norm(x: Tensor, s: Tensor, z: Tensor, snr: float, alpha: float = 1.0) -> Tensor:
    """Algorithms 4 (VE, alpha = 1) and 5 (VP): x + eps s + sqrt(2 eps) z, eps = 2 alpha (snr ||z|| / ||s||)^2.

    Both norms are means over the batch, as in the authors' code, so that one step serves all samples.
    """
    return _langevin(x, s, z, 2 * alpha * (snr * _norms(z).mean() / _norms(s).mean()) ** 2)


def langevin_step_sample_norm(
    x: Tensor, s: Tensor, z: Tensor, snr: float, alpha: float = 1.0, cap: float = math.inf
) -> Tensor:
    """Algorithms 4 and 5 with each sample's own norms; eps is at most `cap`, and 0 where the score is zero."""
    norm = _norms(s)
    eps = (2 * alpha * (snr * _norms(z) / norm) ** 2).clamp(max=cap)
    return _langevin(x, s, z, _per_sample(torch.where(norm > 0, eps, 0.0), x))


def ald_step(x: Tensor, s: Tensor, z: Tensor, snr: float, sigma: float, alpha: float = 1.0) -> Tensor:
    """The authors' annealed Langevin corrector: x + eps s + sqrt(2 eps) z, eps = 2 alpha (snr sigma)^2."""
    return _langevin(x, s, z, 2 * alpha * (snr * sigma) ** 2)


def _score_sde_predictor(
    sde: str, predictor: str, x: Tensor, s: Tensor, t: float, N: int, low: float, high: float
) -> Step:
    kernel = {"ve": ve, "vp": vp, "subvp": subvp}[sde](t, low, high)
    # sub-VP has no discretisation of its own there: Euler-Maruyama's serves.
    if predictor == "euler_maruyama" or (sde, predictor) == ("subvp", "reverse_diffusion"):
        return x - (kernel.f * x - kernel.g**2 * s) / N, kernel.g / math.sqrt(N)
    if predictor not in ("reverse_diffusion", "ancestral") or sde == "subvp":
        raise NotImplementedError(f"the reference has no {predictor} predictor for {sde}")
    index = int(t * (N - 1))
    if sde == "ve":
        ladder = torch.linspace(math.log(low), math.log(high), N, dtype=torch.float64).exp().tolist()
        sigma, below = ladder[index], ladder[index - 1] if index > 0 else 0.0
        step, variance = Transition(1.0, sigma**2 - below**2, below, sigma), "posterior"
    else:
        beta = torch.linspace(low / N, high / N, N, dtype=torch.float64)[index].item()
        step, variance = Transition(math.sqrt(1 - beta), beta, math.nan, math.nan), "beta"
    if predictor == "reverse_diffusion":
        return reverse_diffusion_step(x, s, step)
    return ancestral_step(x, s, step, variance)


def _score_sde_corrector(
    sde: str, corrector: str, x: Tensor, s: Tensor, z: Tensor, t: float, N: int, low: float, high: float, snr: float
) -> Tensor:
    index = int(t * (N - 1))
    alpha = 1.0 if sde == "ve" else 1 - torch.linspace(low / N, high / N, N, dtype=torch.float64)[index].item()
    if corrector == "langevin":
        return langevin_step_batch_norm(x, s, z, snr, alpha)
    if corrector == "ald":
        sigma = {"ve": ve, "vp": vp, "subvp": subvp}[sde](t, low, high).sigma
        return ald_step(x, s, z, snr, sigma, alpha)
    raise NotImplementedError(f"the reference has no {corrector} corrector")


def score_sde_loop(
    sde: str,
    score: Model,
    x: Tensor,
    N: int,
    noise: Noise,
    predictor: str,
    corrector: str = "none",
    snr: float = 0.16,
    corrector_steps: int = 1,
    eps: float = 1e-3,
    denoise: bool = True,
    bounds: tuple[float, float] | None = None,
) -> list[Tensor]:
    """The loop of the authors' code, get_pc_sampler: N points linspace(1, eps, N), at each the corrector, then the
    predictor, `score(x, t)` anew for either.

    `sde` "ve", "vp", "subvp" with `bounds` (sigma_min, sigma_max) or (beta_min, beta_max); `predictor`
    "euler_maruyama" (dt = -1/N), "reverse_diffusion", "ancestral", "none"; `corrector` "langevin" (batch means),
    "ald", "none", with alpha_i = 1 - beta_i except for VE. Ladders exp(linspace(ln sigma_min, ln sigma_max, N)) and
    linspace(beta_min/N, beta_max/N, N) are indexed by int(t (N - 1)). `denoise`: the last predictor adds no noise.
    sub-VP correctors take VP's ladder: the reference raises AttributeError there.
    """
    low, high = bounds if bounds is not None else {"ve": (0.01, 50.0)}.get(sde, (0.1, 20.0))
    times = torch.linspace(1, eps, N, dtype=torch.float64).tolist()

    def predict(x: Tensor, i: int) -> Step:
        return _score_sde_predictor(sde, predictor, x, score(x, times[i]), times[i], N, low, high)

    def correct(x: Tensor, i: int, z: Tensor) -> Tensor:
        return _score_sde_corrector(sde, corrector, x, score(x, times[i]), z, times[i], N, low, high, snr)

    return predictor_corrector(
        None if predictor == "none" else predict,
        None if corrector == "none" else correct,
        x,
        N,
        noise,
        corrector_steps,
        denoise=denoise,
    )


# ---- Karras, Aittala, Aila & Laine 2022, "Elucidating the design space of diffusion-based generative models" -------


def karras_sigmas(N: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> list[float]:
    """Equation 5: (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho for i < N, then 0: `[N + 1]`, N >= 2."""
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(top + i / (N - 1) * (bottom - top)) ** rho for i in range(N)] + [0.0]


def edm_precondition(
    F: Callable[[Tensor, Tensor], Tensor], sigma_data: float = 0.5
) -> Callable[[Tensor, float | Tensor], Tensor]:
    """Equation 7 and table 1: D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), with

        c_skip = sd^2 / (sigma^2 + sd^2)        c_out = sigma sd / sqrt(sigma^2 + sd^2)
        c_in = 1 / sqrt(sigma^2 + sd^2)         c_noise = ln(sigma) / 4

    `sigma` a float or `[B]`; F sees c_noise as a tensor, a scalar or `[B]` alike.
    """

    def D(x: Tensor, sigma: float | Tensor) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        s = _per_sample(level, x)
        total = s**2 + sigma_data**2
        out = F(x / total.sqrt(), level.log() / 4)
        return sigma_data**2 / total * x + s * sigma_data / total.sqrt() * out

    return D


def _edm_heun_step(D: Model, x: Tensor, t: float, t_next: float) -> list[Tensor]:
    d = (x - D(x, t)) / t
    euler = x + (t_next - t) * d
    if t_next == 0:
        return [euler]
    d_next = (euler - D(euler, t_next)) / t_next
    return [euler, x + (t_next - t) * (d / 2 + d_next / 2)]


def edm_deterministic(D: Model, x: Tensor, sigmas: Schedule) -> list[Tensor]:
    """Algorithm 1 with sigma(t) = t, s(t) = 1: Heun's method for dx/dt = (x - D(x, t)) / t, Euler's into t = 0.

    `sigmas` decreasing, `[N + 1]`. Two entries a step (Euler stage, corrected state), one for a step into 0.
    """
    out: list[Tensor] = []
    for t, t_next in pairwise(_floats(sigmas)):
        out += _edm_heun_step(D, x, t, t_next)
        x = out[-1]
    return out


def edm_stochastic(
    D: Model,
    x: Tensor,
    sigmas: Schedule,
    noise: Noise,
    s_churn: float,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> list[Tensor]:
    """Algorithm 2: churn from t to t_hat = (1 + gamma) t, then algorithm 1's step from t_hat:

        gamma = min(s_churn / N, sqrt(2) - 1) if s_min <= t <= s_max else 0
        x_hat = x + sqrt(t_hat^2 - t^2) s_noise z

    Three entries a step (x_hat, Euler stage, corrected state); no x_hat where gamma = 0, no correction into t = 0.
    """
    sigmas, out = _floats(sigmas), []
    for t, t_next in pairwise(sigmas):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            x = x + math.sqrt(t_hat**2 - t**2) * s_noise * noise(len(out))
            out.append(x)
        out += _edm_heun_step(D, x, t_hat, t_next)
        x = out[-1]
    return out


def heun_general(velocity: Model, x: Tensor, times: Schedule) -> list[Tensor]:
    """Heun's second-order method for dx/dt = velocity(x, t) along `times` `[N + 1]`; two entries a step."""
    out = []
    for t, t_next in pairwise(_floats(times)):
        d = velocity(x, t)
        euler = x + (t_next - t) * d
        x = x + (t_next - t) / 2 * (d + velocity(euler, t_next))
        out += [euler, x]
    return out


# ---- Score matching without a transition density ---------------------------------------------------------------------


def _jacobians(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobian of each sample's score, `[B, D, D]`, for a score that keeps samples apart."""
    jacobian = [torch.autograd.functional.jacobian(score, one[None]).reshape(one.numel(), -1) for one in x]
    return torch.stack(jacobian)


def implicit_score_matching(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Hyvarinen 2005, Theorem 1: `sum_i (d_i s_i(x) + s_i(x)^2 / 2)`. `x` `[B, *]`, returns `[B]`."""
    return _jacobians(score, x).diagonal(dim1=1, dim2=2).sum(1) + score(x).square().flatten(1).sum(1) / 2


def sliced_score_matching(score: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, reduced: bool = False) -> Tensor:
    """Song, Garg, Shi & Ermon 2019, eqs. 7 and (`reduced`) 8: `v' ds v + (v' s)^2 / 2`, `v' ds v + |s|^2 / 2`.

    `x`, `v` `[B, *]`; returns `[B]`.
    """
    v, s = v.flatten(1), score(x).flatten(1)
    square = s.square().sum(1) if reduced else (v * s).sum(1).square()
    return torch.einsum("bi,bij,bj->b", v, _jacobians(score, x), v) + square / 2


# ---- Markov chain Monte Carlo on a density proportional to exp(-energy) --------------------------------------------


def ula(score: Callable[[Tensor], Tensor], x: Tensor, step_size: float, n: int, noise: Noise) -> list[Tensor]:
    """The unadjusted Langevin algorithm (Roberts & Tweedie 1996): x + tau score(x) + sqrt(2 tau) z, n times."""
    out = []
    for k in range(n):
        x = x + step_size * score(x) + math.sqrt(2 * step_size) * noise(k)
        out.append(x)
    return out


def _energy_and_gradient(energy: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = energy(x)
        (gradient,) = torch.autograd.grad(u.sum(), x)
    return u.detach(), gradient


def _accept(x: Tensor, proposal: Tensor, log_ratio: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    accept = uniforms.log() < log_ratio
    return torch.where(accept.reshape(-1, *[1] * (x.dim() - 1)), proposal, x), accept, log_ratio


def mala(
    energy: Callable[[Tensor], Tensor], x: Tensor, step_size: float, noise: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One transition of the Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996), U = energy:

        x' = x - tau grad U(x) + sqrt(2 tau) z        log q(b | a) = -||b - a + tau grad U(a)||^2 / (4 tau)
        log ratio = U(x) - U(x') + log q(x | x') - log q(x' | x);  accept where ln(uniform) < log ratio

    `energy` returns `[B]`; `noise` is one tensor like x, `uniforms` `[B]`. Returns (new x, accepted, log ratio).
    """
    u, gradient = _energy_and_gradient(energy, x)
    proposal = x - step_size * gradient + math.sqrt(2 * step_size) * noise
    u_new, gradient_new = _energy_and_gradient(energy, proposal)
    forward = -(_norms(proposal - x + step_size * gradient) ** 2) / (4 * step_size)
    backward = -(_norms(x - proposal + step_size * gradient_new) ** 2) / (4 * step_size)
    return _accept(x, proposal, u - u_new + backward - forward, uniforms)


def hmc(
    energy: Callable[[Tensor], Tensor], x: Tensor, step_size: float, leapfrogs: int, noise: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One transition of Hamiltonian Monte Carlo with unit mass (Duane et al. 1987; Neal 2011, section 5.3), U = energy:

        p <- p - e/2 grad U(q);  q <- q + e p;  p <- p - e/2 grad U(q)        `leapfrogs` times, from p = z, q = x
        log ratio = U(x) + ||z||^2 / 2 - U(q) - ||p||^2 / 2;  accept where ln(uniform) < log ratio

    Arguments and results as for `mala`.
    """
    u, gradient = _energy_and_gradient(energy, x)
    q, p, u_new = x, noise, u
    for _ in range(leapfrogs):
        p = p - step_size / 2 * gradient
        q = q + step_size * p
        u_new, gradient = _energy_and_gradient(energy, q)
        p = p - step_size / 2 * gradient
    return _accept(x, q, u + _norms(noise) ** 2 / 2 - u_new - _norms(p) ** 2 / 2, uniforms)
