"""Averages of the weights during a training, and those reconstructed after it (Karras et al. 2024)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import checks
from ..errors import CheckpointError, CheckpointMismatchError, ConfigError, names_keywords
from ..execution.torch_private import foreach_lerp_
from ..files import path as path_of
from ..files import shown
from ..model import ScoreModel
from ..planning import processes
from ..planning.schedules import ema_decay
from . import checkpoint as files

RULES = ("diffusers", "score_sde", "constant")
# the two widths whose averages a training keeps, from whose snapshots all others are made
SIGMA_REL = (0.05, 0.10)
WIDEST = 0.28867513459481287  # √(1/12): the plain mean, γ = 0
SNAPSHOT = "snapshot-{:010d}.safetensors"
Array = NDArray[np.float64]


class Averages:
    """Exponential moving averages, and beside them, where `power`, those of power functions.

    Of weights θ_1, θ_2, … the average of rule m is θ' ← m θ' + (1 − m) θ; at update n = 0, 1, …

        "diffusers"   m = min(ema, (1 + n)/(10 + n)), 0 at n = 0; "score_sde" m = min(ema, (2 + n)/(11 + n)); "constant" m = ema
        power         m = (1 − 1/(n + 1))^(γ + 1), γ that of σ_rel (Karras et al. 2024, eq. 7 and 127)
    """

    def __init__(self, weights: Sequence[Tensor], rates: Sequence[float], rule: str, power: bool) -> None:
        self.rule = rule
        self.kept: list[Callable[[int], float]] = [lambda n, rate=rate: self._kept(n, rate) for rate in rates]  # type: ignore[misc]
        self.names = ["ema", *(f"ema{k}" for k in range(1, len(rates)))]
        if power:
            gammas = [gamma_of(sigma_rel) for sigma_rel in SIGMA_REL]
            self.kept += [lambda n, gamma=gamma: (n / (n + 1)) ** (gamma + 1) for gamma in gammas]  # type: ignore[misc]
            self.names += [f"power{k}" for k in range(len(gammas))]
        self.tensors = [[w.detach().clone() for w in weights] for _ in self.kept]
        places: dict[Any, list[int]] = {}
        for k, w in enumerate(weights):
            places.setdefault((w.device, w.dtype), []).append(k)
        self._groups = [
            ([weights[k].detach() for k in which], [[average[k] for k in which] for average in self.tensors])
            for which in places.values()
        ]

    def share(self, n: int) -> float:
        """1 − m of the first average at update n."""
        return 1 - self.kept[0](n)

    @torch.no_grad()
    def update(self, n: int, done: int = 0) -> None:
        """Update n = 0, 1, … by the weights as they are, of all averages but the first `done`."""
        for weights, averages in self._groups:
            for kept, average in zip(self.kept[done:], averages[done:]):
                m = kept(n)
                if m == 0:
                    for a, w in zip(average, weights):
                        a.copy_(w)
                else:
                    foreach_lerp_(average, weights, 1 - m)

    def _kept(self, n: int, rate: float) -> float:
        if self.rule == "constant":
            return rate
        if self.rule == "diffusers" and n == 0:
            return 0.0
        return ema_decay(n + (self.rule == "score_sde"), rate)


def gamma_of(sigma_rel: float) -> float:
    """γ of the power function t^γ whose relative width is σ_rel = √((γ + 1)/(γ + 3))/(γ + 2) (Karras et al. 2024, eq. 126)."""
    inverse = float(sigma_rel) ** -2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def combination(t: Array, gamma: Array, at: float, of: float) -> Array:
    """Factors of the averages of updates 1 … t_i with t^γ_i that come nearest to the average of 1 … `at` with t^`of`.

    Least squares over the profiles p_i(τ) = (γ_i + 1) τ^γ_i / t_i^(γ_i + 1) on [0, t_i] (their Algorithm 3):
    A x = b with A_ij = ⟨p_i, p_j⟩, b_i = ⟨p_i, p⟩; their sum is 1, as in the authors' code.
    """
    gram, target = _product(t[:, None], gamma[:, None], t, gamma), _product(t, gamma, at, of)
    size = np.sqrt(np.diag(gram))  # of each profile, which a long training makes very different
    scaled = gram / size[:, None] / size
    factors = np.linalg.lstsq(scaled, target / size, rcond=1e-13)[0] / size
    return factors / factors.sum()  # type: ignore[no-any-return]


def _product(t_a: Any, gamma_a: Any, t_b: Any, gamma_b: Any) -> Array:
    """⟨p_a, p_b⟩ = (γ_a + 1)(γ_b + 1) (t_min/t_max)^γ / ((γ_a + γ_b + 1) t_max), γ that of the longer one."""
    exponent = np.where(t_a < t_b, gamma_b, gamma_a)
    ratio, longest = np.minimum(t_a, t_b) / np.maximum(t_a, t_b), np.maximum(t_a, t_b)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**exponent / ((gamma_a + gamma_b + 1) * longest)  # type: ignore[no-any-return]


def snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots of a directory by their step."""
    found = {}
    for path in folder.iterdir():
        match = re.fullmatch(r"snapshot-(\d{10})\.safetensors", path.name)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def drop_snapshots(folder: Path, after: int) -> None:
    """Those of later steps, which a run that begins, or goes on from there, makes again."""
    for step, path in snapshots(folder).items():
        if step > after:
            path.unlink()


@torch.inference_mode(False)
@names_keywords
def posthoc_ema(
    directory: str | os.PathLike[str],
    sigma_rel: float,
    *,
    step: int | None = None,
    net: nn.Module | None = None,
    sde: processes.Process | None = None,
) -> ScoreModel:
    """The model of a training's directory with the average of relative width `sigma_rel`, chosen afterwards.

    The training, `train(..., posthoc=True, checkpoint=directory)`, left snapshots of two averages of power functions; a
    least-squares combination of them comes near the power function of any width (Karras et al. 2024, §3.2 and Algorithm 3).

    sigma_rel   the width of the average relative to the training's length, above 0 and below 0.2886; 0.05 and 0.10 are exact
    step        the end of the average, that of a snapshot; the last one unless given
    net, sde    as in `fastdiff.load`

    Errors: CheckpointError where there are no snapshots, those of `fastdiff.load`.
    """
    sigma_rel = checks.number("sigma_rel", sigma_rel, 0, WIDEST, above=True, below=True)
    folder = path_of("directory", directory)
    found = snapshots(folder) if folder.is_dir() else {}
    if not found:
        raise CheckpointError(
            f"{shown(folder)} holds no snapshots of averages: train with posthoc=True and checkpoint={shown(folder)}"
        )
    last = max(found) if step is None else checks.integer("step", step, 1, 10**10)
    if last not in found:
        raise ConfigError(f"step must be that of a snapshot, {_some(found)}, got {last}")
    headers = {k: files.read(path, "none.")[0] for k, path in found.items() if k <= last}
    if any(
        (h.get("model"), h.get("run")) != (headers[last].get("model"), headers[last].get("run"))
        for h in headers.values()
    ):
        raise CheckpointMismatchError(
            f"{shown(folder)} holds snapshots of several trainings: keep those of one of them"
        )
    try:
        places = [(k, number, float(h["updates"]), gamma_of(width)) for k, h in headers.items()
                  for number, width in enumerate(h["sigma_rel"])]  # fmt: skip
        at = float(headers[last]["updates"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{shown(folder)} holds files that are no snapshots of averages") from error
    factors = combination(np.array([p[2] for p in places]), np.array([p[3] for p in places]), at, gamma_of(sigma_rel))
    tensors = files.read(found[last], "net.")[1]
    total: dict[str, Tensor] = {}
    for (k, number, _, _), factor in zip(places, factors.tolist()):
        if factor:
            for name, value in files.read(found[k], f"power{number}.")[1].items():
                total[name] = total.get(name, 0) + factor * value.double()
    tensors |= {name: value.to(tensors[name].dtype) for name, value in total.items()}
    return files.model_of(headers[last], tensors, found[last], net, sde)


def _some(found: dict[int, Path]) -> str:
    steps = list(found)
    return ", ".join(map(str, steps if len(steps) < 6 else [*steps[:3], "…", *steps[-2:]]))
