"""Denoising diffusion restoration: steps in the coordinates in which the operator is diagonal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .. import checks
from ..errors import ConfigError
from ..guidance.base import together
from .operators import product
from .own_steps import Drawn, OwnSteps, Steps
from .problem import Measurement, Problem

LARGEST = 4096  # numbers of a sample, whose operator is made as a matrix and decomposed


@dataclass(frozen=True, eq=False)
class DDRM(OwnSteps):
    """DDRM (Kawar et al. 2022, eq. 7 and 8). With A = U Σ Vᵀ, x̄ = Vᵀ x/α, ȳ = Σ⁺ Uᵀ y and σ̂ = σ/α, a step to σ̂ gives

        singular value s = 0       x̄θ + √(1 − η²) σ̂ (x̄_t − x̄θ)/σ̂_t + η σ̂ z
        s with σ̂ < σ_y/s           x̄θ + √(1 − η²) σ̂ (ȳ − x̄θ) s/σ_y + η σ̂ z
        s with σ̂ ≥ σ_y/s           (1 − η_b) x̄θ + η_b ȳ + √(σ̂² − η_b² σ_y²/s²) z

    where x̄θ = Vᵀ x̂0. One call of the network a step, no product with its Jacobian. Samples of up to 4096 numbers.
    """

    problem: Problem
    eta: float = 0.85
    eta_b: float = 1.0

    def run(self, steps: Steps) -> Drawn:
        eta, eta_b = checks.number("eta", self.eta, 0, 1), checks.number("eta_b", self.eta_b, 0, 1)
        setting, table = steps.setting, steps.table
        count, shape = setting.count, setting.model.data_shape
        measured, numbers = Measurement(self.problem, setting).needs_linear("inverse.DDRM"), math.prod(shape)
        if numbers > LARGEST:
            raise ConfigError(
                f"inverse.DDRM decomposes the operator as a matrix, for samples of at most {LARGEST} numbers, got {numbers}: use "
                "inverse.MMPS or inverse.DiffPIR"
            )
        unit = torch.eye(numbers, dtype=setting.dtype, device=setting.device).view(numbers, *shape)
        matrix = measured.forward(unit).double().flatten(1).T  # [m, D]
        u, s, vt = torch.linalg.svd(matrix, full_matrices=True)
        s = torch.where(s > 1e-9 * s.max(), s, 0.0)
        s = torch.cat([s, s.new_zeros(numbers - len(s))])
        seen = s > 0
        zero = measured.of(torch.zeros((1, *shape), dtype=setting.dtype, device=setting.device))  # of a mean too
        y = (measured.each - zero).double()
        projected = product(y.flatten(1), u)
        clean = torch.zeros(count, numbers, dtype=torch.float64, device=setting.device)
        width = min(projected.shape[1], numbers)
        clean[:, :width] = projected[:, :width] / s[:width].where(seen[:width], 1.0) * seen[:width]
        noise = measured.noise_std / s.where(seen, 1.0)

        parts = together(setting.cond, [])
        ladder = steps.ladder()
        alpha, sigma = ladder[0]
        start = steps.start(count, setting.first_sample).double().flatten(1) / alpha
        spread = (sigma**2 - noise**2).clamp(min=0).sqrt()
        state = torch.where(seen & (sigma >= noise), clean + spread * (start / sigma), start)
        for k, row in steps.rows():
            (alpha, sigma), (below, after) = ladder[k : k + 2]
            x = (alpha * product(state, vt)).to(setting.dtype).view(count, *shape)
            x0 = steps.prediction(x, row.network_time, parts)
            mean = product(x0.double().flatten(1), vt.T)
            z = steps.normal(count, setting.first_sample, k).double().flatten(1)
            kept = math.sqrt(1 - eta**2) * after
            hidden = mean + kept * (state - mean) / sigma + eta * after * z
            faint = mean + kept * (clean - mean) / noise.clamp(min=1e-300) + eta * after * z
            clear = (1 - eta_b) * mean + eta_b * clean + (after**2 - (eta_b * noise) ** 2).clamp(min=0).sqrt() * z
            state = torch.where(seen, torch.where(after < noise, faint, clear), hidden)
            steps.notice(k, state)
        calls = len(table) * math.ceil(count / steps.batch)
        return Drawn((below * product(state, vt)).to(setting.dtype).view(count, *shape), calls)
