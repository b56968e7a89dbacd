"""Training objectives of a score model."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, predictions
from .errors import choose
from .model import Condition, ScoreModel
from .processes import Process
from .reference.noise import PERTURBATION

LOSSES = ("dsm", "simple", "likelihood")

# The shortest time that continuous training sees (score_sde: t ~ U[1e-5, 1] for every process).
SHORTEST = 1e-5


def perturb(process: Process, x0: Tensor, t: Tensor, cursor: Tensor) -> Tensor:
    """x_t = α(t) x0 + σ(t) ε for x0 [B, *] and times t [B]; ε is the noise that `cursor` names (fastdiff.ops.cursor)."""
    return ops.perturb(x0, process.alpha(t), process.sigma(t), cursor, PERTURBATION)


def per_sample(model: ScoreModel, x0: Tensor, t: Tensor, cursor: Tensor, loss: str, cond: Condition = None) -> Tensor:
    """The loss of each sample, [B]: the mean over its elements of λ(t) (m − r·x0 − w·ε)², m the network's output.

    (r, w) is what the network predicts (fastdiff.predictions), so the target of any prediction is one line; ε is the noise
    that `cursor` names (fastdiff.ops.cursor), made where it is needed and never stored.

    "dsm"         denoising score matching with λ = σ²: ‖σ·score + ε‖², i.e. ε-matching whatever the network predicts
                  (Song et al. 2021, eq. 7; Ho et al. 2020, eq. 14 for an ε network)
    "simple"      λ = 1 on the network's own target: the DDPM targets as they stand; for "edm" Karras et al. 2022, eq. 8
    "likelihood"  λ = g²: the bound on the likelihood (Song, Durkan, Murray & Ermon 2021, eq. 7)
    """
    choose("loss", loss, LOSSES)
    process = model.process
    alpha, sigma = process.alpha(t), process.sigma(t)
    r, w = predictions.coordinates(model.prediction, process, t, alpha, sigma)
    clean = x0 if x0.dtype in (torch.float32, torch.float64) else x0.float()
    output = model(ops.perturb(clean, alpha, sigma, cursor, PERTURBATION).to(x0.dtype), t, cond)
    weight = torch.ones_like(w)
    if loss != "simple":
        _, q = predictions.convert((r, w), (0.0 * r, 0.0 * w + 1.0), alpha, sigma)  # of the error on the scale of ε
        weight = q**2 if loss == "dsm" else (q * process.diffusion(t) / sigma) ** 2
    return ops.dsm_loss(output, clean, r, w, weight, cursor, PERTURBATION)[0]


def training_times(process: Process, u: Tensor) -> Tensor:
    """Times [B] from uniform numbers u [B] in [0, 1).

    Continuous processes: uniform on [1e-5, T]; chains: uniform on their steps; EDM: ln σ ~ N(−1.2, 1.2²) (Karras et al.
    2022, Table 1).
    """
    if process.name == "edm":
        quantile = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))
        return torch.exp(-1.2 + 1.2 * quantile).to(u.dtype)
    if process.discrete:
        return (u * process.T).floor().clamp(max=process.T - 1) + 1
    return SHORTEST + (process.T - SHORTEST) * u
