"""The fast solvers as their papers, or their authors' codes, print them, in plain PyTorch; see fastdiff.papers.score_based.

Nothing of fastdiff is imported. A `Path` is what a noise-prediction paper presupposes: alpha(t), sigma(t) and the
inverse t(lambda) of lambda = log(alpha/sigma). `times` decrease, `[N + 1]`; models are called with the state and a time.
A sampler returns the states after each update of x, as those of `score_based`: a stage of a singlestep solver is one; a
predictor-corrector of many steps gives the predicted states, at which the network is called, one each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.polynomial import Polynomial
from torch import Tensor

Model = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]


class Path(NamedTuple):
    """alpha(t), sigma(t), and the time at which log(alpha/sigma) is lambda."""

    alpha: Callable[[float], float]
    sigma: Callable[[float], float]
    t: Callable[[float], float]

    def lam(self, t: float) -> float:
        return math.log(self.alpha(t) / self.sigma(t)) if self.sigma(t) > 0 else math.inf


def _vp_time(integral: float, beta_min: float, beta_max: float) -> float:
    return 2 * integral / (math.sqrt(beta_min**2 + 2 * (beta_max - beta_min) * integral) + beta_min)


def vp_path(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """Lu et al. 2022a (linear schedule)."""

    def integral(t: float) -> float:
        return t * beta_min + t**2 * (beta_max - beta_min) / 2

    return Path(
        lambda t: math.exp(-integral(t) / 2),
        lambda t: math.sqrt(-math.expm1(-integral(t))),
        lambda lam: _vp_time(math.log1p(math.exp(-2 * lam)), beta_min, beta_max),
    )


def subvp_path(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """sigma/alpha = e^(B/2) - e^(-B/2) = 2 sinh(B/2), B the integral of beta."""
    vp = vp_path(beta_min, beta_max)
    return Path(
        vp.alpha,
        lambda t: vp.sigma(t) ** 2,
        lambda lam: _vp_time(2 * math.asinh(math.exp(-lam) / 2), beta_min, beta_max),
    )


def ve_path(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Path:
    """sigma = sigma_min (sigma_max/sigma_min)^t, alpha = 1."""
    slope = math.log(sigma_max / sigma_min)
    return Path(
        lambda t: 1.0, lambda t: sigma_min * math.exp(slope * t), lambda lam: (-lam - math.log(sigma_min)) / slope
    )


def _integral(f: Callable[[float], float], low: float, high: float) -> float:
    """Gauss-Legendre with 40 nodes on each of 8 parts."""
    points, weights = np.polynomial.legendre.leggauss(40)
    total, width = 0.0, (high - low) / 8
    for part in range(8):
        for p, w in zip(points.tolist(), weights.tolist()):
            total += width / 2 * w * f(low + width * (part + (p + 1) / 2))
    return total


def _lagrange(u: float, nodes: list[float], j: int) -> float:
    return math.prod((u - v) / (nodes[j] - v) for k, v in enumerate(nodes) if k != j)


# ---- Linear multistep (Katherine Crowson's k-diffusion, sample_lms) ------------------------------------------------


def lms(derivative: Model, x: Tensor, points: Iterable[float], order: int = 4) -> list[Tensor]:
    """Adams-Bashforth for dx/du = derivative(x, u) on any decreasing `points`, `[N + 1]`."""
    points, slopes, out = list(points), [], []
    for i, (u, u_next) in enumerate(pairwise(points)):
        slopes = [derivative(x, u), *slopes][:order]
        nodes = [points[i - j] - u for j in range(len(slopes))]
        for j, slope in enumerate(slopes):
            rest = [v for k, v in enumerate(nodes) if k != j]
            basis = Polynomial.fromroots(rest) if rest else Polynomial([1.0])
            primitive = (basis / math.prod(nodes[j] - v for v in rest)).integ()
            x = x + float(primitive(u_next - u) - primitive(0.0)) * slope
        out.append(x)
    return out


def dpm_2(D: Model, x: Tensor, sigmas: Iterable[float], noise: Noise | None = None, eta: float = 0.0) -> list[Tensor]:
    """k-diffusion's sample_dpm_2 without churn, and sample_dpm_2_ancestral: the middle at sqrt(sigma sigma_down)."""
    out: list[Tensor] = []
    for sigma, sigma_next in pairwise(sigmas):
        up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
        down = math.sqrt(sigma_next**2 - up**2)
        d = (x - D(x, sigma)) / sigma
        if down == 0:
            out.append(x + (down - sigma) * d)
        else:
            middle = math.exp((math.log(sigma) + math.log(down)) / 2)
            out.append(x + (middle - sigma) * d)
            x = x + (down - sigma) * (out[-1] - D(out[-1], middle)) / middle
            out.append(x + up * noise(len(out)) if noise is not None and up > 0 else x)
        x = out[-1]
    return out


def midpoint(velocity: Model, x: Tensor, times: Iterable[float]) -> list[Tensor]:
    """The midpoint method (Runge 1895) for dx/dt = velocity(x, t); two entries a step."""
    out: list[Tensor] = []
    for t, t_next in pairwise(times):
        out.append(x + (t_next - t) / 2 * velocity(x, t))
        x = x + (t_next - t) * velocity(out[-1], (t + t_next) / 2)
        out.append(x)
    return out


# ---- Zhang & Chen 2023, "Fast sampling of diffusion models with exponential integrator" ----------------------------


def deis(
    eps_model: Model, x: Tensor, path: Path, g2: Callable[[float], float], times: list[float], order: int, final: bool
) -> list[Tensor]:
    """tAB-DEIS, eq. 14-15, with Psi(s, t) = alpha_s/alpha_t, L_t = sigma_t and `order` predictions:

        x_s = Psi(s, t) x_t + sum_j C_j eps_j
        C_j = int_t^s -1/2 Psi(s, tau) ... , d(sigma/alpha)/dtau = g^2/(2 alpha sigma), of the Lagrange polynomials in tau

    `final`: orders ..., 2, 1 at the end.
    """
    predictions: list[Tensor] = []
    out = []
    for i, (t, s) in enumerate(pairwise(times)):
        predictions = [eps_model(x, t), *predictions]
        k = min(order, i + 1, len(times) - 1 - i if final else order)
        nodes = [times[i - j] for j in range(k)]
        x = path.alpha(s) / path.alpha(t) * x
        for j in range(k):

            def integrand(tau: float, j: int = j, nodes: list[float] = nodes, s: float = s) -> float:
                psi = path.alpha(s) / path.alpha(tau)
                return psi * g2(tau) / (2 * path.sigma(tau)) * _lagrange(tau, nodes, j)

            x = x + _integral(integrand, t, s) * predictions[j]
        out.append(x)
    return out


# ---- Lu, Zhou, Bao, Chen, Li & Zhu 2022a, "DPM-Solver" -------------------------------------------------------------


def dpm_solver(eps_model: Model, x: Tensor, path: Path, times: list[float], order: int) -> list[Tensor]:
    """Equation 3.7, algorithm 1 (r1 = 1/2) and algorithm 2 (r1 = 1/3, r2 = 2/3), the same order in every step."""
    out: list[Tensor] = []
    alpha, sigma = path.alpha, path.sigma
    for t, s in pairwise(times):
        h = path.lam(s) - path.lam(t)
        eps = eps_model(x, t)

        def first(x: Tensor, t: float, s: float, h: float, eps: Tensor) -> Tensor:
            return alpha(s) / alpha(t) * x - sigma(s) * math.expm1(h) * eps

        if order == 1:
            out.append(first(x, t, s, h, eps))
        elif order == 2:
            r1 = 0.5
            s1 = path.t(path.lam(t) + r1 * h)
            u = first(x, t, s1, r1 * h, eps)
            d = eps_model(u, s1) - eps
            out += [u, first(x, t, s, h, eps) - sigma(s) / (2 * r1) * math.expm1(h) * d]
        else:
            r1, r2 = 1 / 3, 2 / 3
            s1, s2 = path.t(path.lam(t) + r1 * h), path.t(path.lam(t) + r2 * h)
            u1 = first(x, t, s1, r1 * h, eps)
            d1 = eps_model(u1, s1) - eps
            u2 = first(x, t, s2, r2 * h, eps) - sigma(s2) * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
            d2 = eps_model(u2, s2) - eps
            out += [u1, u2, first(x, t, s, h, eps) - sigma(s) / r2 * (math.expm1(h) / h - 1) * d2]
        x = out[-1]
    return out


# ---- Lu, Zhou, Bao, Chen, Li & Zhu 2022b, "DPM-Solver++", and its stochastic forms in k-diffusion -------------------


def dpmpp_2s(x0_model: Model, x: Tensor, path: Path, times: list[float]) -> list[Tensor]:
    """Algorithm 1 with r = 1/2."""
    out: list[Tensor] = []
    r = 0.5
    for t, s in pairwise(times):
        h = path.lam(s) - path.lam(t)
        middle = path.t(path.lam(t) + r * h)
        x0 = x0_model(x, t)
        u = path.sigma(middle) / path.sigma(t) * x - path.alpha(middle) * math.expm1(-r * h) * x0
        d = (1 - 1 / (2 * r)) * x0 + 1 / (2 * r) * x0_model(u, middle)
        x = path.sigma(s) / path.sigma(t) * x - path.alpha(s) * math.expm1(-h) * d
        out += [u, x]
    return out


def dpmpp_2m(x0_model: Model, x: Tensor, path: Path, times: list[float], final: bool) -> list[Tensor]:
    """Algorithm 2. `final`: the last step of order 1, as in the authors' code with few steps."""
    out: list[Tensor] = []
    previous, h_previous = x, 0.0
    for i, (t, s) in enumerate(pairwise(times)):
        h = path.lam(s) - path.lam(t)
        x0 = d = x0_model(x, t)
        if i > 0 and not (final and i == len(times) - 2):
            r = h_previous / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = path.sigma(s) / path.sigma(t) * x - path.alpha(s) * math.expm1(-h) * d
        previous, h_previous = x0, h
        out.append(x)
    return out


def _ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    up = min(sigma_next, eta * math.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2))
    return math.sqrt(sigma_next**2 - up**2), up


def dpmpp_2s_stochastic(
    D: Model, x: Tensor, sigmas: Iterable[float], noise: Noise, eta: float = 1.0, sde: bool = False
) -> list[Tensor]:
    """k-diffusion's sample_dpmpp_2s_ancestral, or with `sde` its sample_dpmpp_sde (r = 1/2); Euler into sigma = 0."""
    out: list[Tensor] = []
    for sigma, sigma_next in pairwise(sigmas):
        denoised = D(x, sigma)
        down, up = _ancestral(sigma, sigma_next, eta)
        if sigma_next == 0:
            out.append(x - sigma * (x - denoised) / sigma)
            break
        middle = math.exp((math.log(sigma) + math.log(sigma_next if sde else down)) / 2)
        low, high = _ancestral(sigma, middle, eta) if sde else (middle, 0.0)
        x_2 = low / sigma * x - math.expm1(math.log(low / sigma)) * denoised
        out.append(x_2 + high * noise(len(out)) if high > 0 else x_2)
        x = down / sigma * x - math.expm1(math.log(down / sigma)) * D(out[-1], middle)
        out.append(x + up * noise(len(out)) if up > 0 else x)
        x = out[-1]
    return out


def dpmpp_2m_sde(D: Model, x: Tensor, sigmas: Iterable[float], noise: Noise, eta: float = 1.0) -> list[Tensor]:
    """k-diffusion's sample_dpmpp_2m_sde, solver_type "midpoint"."""
    out: list[Tensor] = []
    previous, h_previous = x, 0.0
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = D(x, sigma)
        if sigma_next == 0:
            out.append(denoised)
            break
        h = math.log(sigma) - math.log(sigma_next)
        x = sigma_next / sigma * math.exp(-eta * h) * x - math.expm1(-h - eta * h) * denoised
        if i > 0:
            x = x - 0.5 * math.expm1(-h - eta * h) * h / h_previous * (denoised - previous)
        if eta:
            x = x + noise(i) * sigma_next * math.sqrt(-math.expm1(-2 * eta * h))
        previous, h_previous = denoised, h
        out.append(x)
    return out


def dpmpp_3m_sde(D: Model, x: Tensor, sigmas: Iterable[float], noise: Noise, eta: float = 1.0) -> list[Tensor]:
    """k-diffusion's sample_dpmpp_3m_sde, its phi_3 doubled: the second difference d2 of x0 in units of h enters as
    int e^(-H (1 - s)) H s^2 ds d2 = (1 - 2 phi_2/H) d2, of which the code has half.
    """
    out: list[Tensor] = []
    older: list[Tensor] = []
    hs: list[float] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = D(x, sigma)
        if sigma_next == 0:
            out.append(denoised)
            break
        h = math.log(sigma) - math.log(sigma_next)
        H = h * (eta + 1)
        x = math.exp(-H) * x - math.expm1(-H) * denoised
        phi_2 = math.expm1(-H) / H + 1
        if i > 1:
            r0, r1 = hs[0] / h, hs[1] / h
            d1_0, d1_1 = (denoised - older[0]) / r0, (older[0] - older[1]) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1)
            phi_3 = phi_2 / H - 0.5
            x = x + phi_2 * d1 - 2 * phi_3 * d2
        elif i > 0:
            x = x + phi_2 * (denoised - older[0]) / (hs[0] / h)
        if eta:
            x = x + noise(i) * sigma_next * math.sqrt(-math.expm1(-2 * h * eta))
        older, hs = [denoised, *older], [h, *hs]
        out.append(x)
    return out


# ---- Zhao, Bai, Rao, Zhou & Lu 2023, "UniPC" -----------------------------------------------------------------------


def _unipc_rhos(rs: list[float], hh: float, B: float, simple: bool) -> list[float]:
    """R rho = b of the authors' code, b_i = i! phi_{i+1}(hh) hh^i... / B; a single unknown is 1/2 where `simple`."""
    if simple:
        return [0.5]
    phi, factorial, rows, b = math.expm1(hh) / hh - 1, 1.0, [], []
    for i in range(1, len(rs) + 1):
        rows.append([r ** (i - 1) for r in rs])
        b.append(phi * factorial / B)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    return np.linalg.solve(np.array(rows), np.array(b)).tolist() if rs else []


def unipc(
    model: Model, x: Tensor, path: Path, times: list[float], order: int, variant: str, predicts: str, final: bool
) -> list[Tensor]:
    """UniPC of many steps as in the authors' code (multistep_uni_pc_bh_update), no corrector after the last step.

    `predicts` "x0" or "eps" says what `model` returns; `final`: orders ..., 2, 1 at the end.
    """
    out: list[Tensor] = []
    outputs: list[Tensor] = []
    lams = [path.lam(t) for t in times]
    data = predicts == "x0"
    x_last, k_last = x, 0

    def update(x: Tensor, i: int, m: list[Tensor], k: int, m_new: Tensor | None) -> Tensor:
        t, s = times[i], times[i + 1]
        h = lams[i + 1] - lams[i]
        hh = -h if data else h
        B = hh if variant == "bh1" else math.expm1(hh)
        rs = [(lams[i - j] - lams[i]) / h for j in range(1, k)]
        differences = [(m[j] - m[0]) / r for j, r in enumerate(rs, 1)]
        if m_new is not None:
            rs, differences = [*rs, 1.0], [*differences, m_new - m[0]]
        # the predictor solves a system of one row less, as its new prediction is missing
        rhos = _unipc_rhos(rs, hh, B, len(rs) == 1)
        scale, ratio = (
            (path.alpha(s), path.sigma(s) / path.sigma(t)) if data else (path.sigma(s), path.alpha(s) / path.alpha(t))
        )
        x = ratio * x - scale * math.expm1(hh) * m[0]
        for rho, difference in zip(rhos, differences):
            x = x - scale * B * rho * difference
        return x

    for i, t in enumerate(times[:-1]):
        m_new = model(x, t)
        if i > 0:
            x = update(x_last, i - 1, outputs, k_last, m_new)
        outputs = [m_new, *outputs]
        k_last = min(order, i + 1, len(times) - 1 - i if final else order)
        x_last = x
        x = update(x, i, outputs, k_last, None)
        out.append(x)
    return out


# ---- Xue, Yi, Luo, Zhang, Sun, Li & Ma 2023, "SA-Solver" -----------------------------------------------------------


def sa_solver(
    x0_model: Model, x: Tensor, path: Path, times: list[float], noise: Noise, predictor: int, corrector: int, tau: float,
    final: bool,
) -> list[Tensor]:  # fmt: skip
    """Algorithm 1 with constant tau, equations 14-17; orders count the predictions used, the corrector's new one too.

    b_j = e^(-tau^2 lam_s) sigma_s (1 + tau^2) int e^((1 + tau^2) lam) l_j(lam) dlam
    x_s = sigma_s/sigma_t e^(-tau^2 h) x + sum_j b_j x0_j + sigma_s sqrt(1 - e^(-2 tau^2 h)) z
    """
    out: list[Tensor] = []
    outputs: list[Tensor] = []
    lams = [path.lam(t) for t in times]
    N = len(times) - 1

    def update(x: Tensor, i: int, nodes: list[int], predictions: list[Tensor]) -> Tensor:
        t, s = times[i], times[i + 1]
        h = lams[i + 1] - lams[i]
        x = path.sigma(s) / path.sigma(t) * math.exp(-(tau**2) * h) * x
        for j, prediction in enumerate(predictions):

            def integrand(lam: float, j: int = j) -> float:
                # e^((1 + tau^2) lam) relative to its value at s, whose sigma_s e^lam_s is alpha_s
                growth = math.exp((1 + tau**2) * (lam - lams[i + 1]))
                return (1 + tau**2) * growth * _lagrange(lam, [lams[n] for n in nodes], j)

            x = x + path.alpha(s) * _integral(integrand, lams[i], lams[i + 1]) * prediction
        deviation = path.sigma(s) * math.sqrt(-math.expm1(-2 * tau**2 * h))
        return x + deviation * noise(i) if deviation > 0 else x

    x_last = x
    for i in range(N):
        x0 = x0_model(x, times[i])
        reach = min(corrector, i + 1, N - i + 2 if final else corrector)
        if i > 0 and reach > 0:
            x = update(x_last, i - 1, list(range(i, i - reach, -1)), [x0, *outputs][:reach])
        outputs = [x0, *outputs]
        k = min(predictor, i + 1, N - i if final else predictor)
        x_last = x
        x = update(x, i, list(range(i, i - k, -1)), outputs[:k])
        out.append(x)
    return out


# --- Jolicoeur-Martineau, Li, Piche-Taillefer, Kachman & Mitliagkas 2021, "Gotta go fast when generating data with ...": -----


def adaptive_sde(
    drift: Model, diffusion: Callable[[float], float], x: Tensor, start: float, end: float, noise: Noise, eps_rel: float,
    eps_abs: float, h_init: float, memory: bool, r: float = 0.9, theta: float = 0.9, growth: float = math.inf,
) -> tuple[Tensor, int]:  # fmt: skip
    """Algorithm 1 for one sample x [*] of the reverse SDE dx = drift(x, t) dt + g dw, t from start down to end: x'' and attempts.

    x' = x - h drift(x, t) + sqrt(h) g(t) z,   x~ = x - h drift(x', t - h) + sqrt(h) g(t - h) z,   x'' = (x' + x~)/2

    memory: instead of a new z for each attempt, the rejected steps' increments on a stack of futures, bridged (Rackauckas & Nie
    2017, RSwM1).
    growth: the most that a step is of the one that was wanted before; the paper has no bound.
    """
    t, h, before, attempts = start, h_init, x, 0
    future: list[tuple[float, Tensor]] = []
    while t > end:
        z = noise(attempts)
        attempts += 1
        h = wanted = min(h, t - end)
        if future:
            length, piece = future.pop()
            h = min(h, length)
            w = piece
            if h < length:
                w = h / length * piece + math.sqrt(h * (1 - h / length)) * z
                future.append((length - h, piece - w))
        else:
            w = math.sqrt(h) * z
        s = t - h if h < (t - end) * (1 - 1e-10) else end
        first = x - h * drift(x, t) + diffusion(t) * w
        second = x - h * drift(first, s) + diffusion(s) * w
        mean = (first + second) / 2
        delta = (eps_rel * first.abs().maximum(before.abs())).clamp(min=eps_abs)
        error = math.sqrt(float((((first - mean) / delta) ** 2).mean()))
        if error <= 1:
            x, t, before = mean, s, first
        elif memory:
            future.append((h, w))
        h = min(theta * h * error ** (-r), growth * wanted)
    return x, attempts
