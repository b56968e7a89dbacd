"""Samplers with an accept/reject step, for a model that offers an energy: p_t(x) ∝ exp(−energy(x, t)).

They are no tables, but they use the same noise: sample i at step k is a function of (seed, first_sample + i, k) alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .errors import ConfigError, ModelOutputError, NonFiniteError, ShapeError, short
from .execution import noise, ops, reference, tensor_checks
from .execution.modes import evaluating, leaves_no_trace

Energy = Callable[[Tensor], Tensor]


class Chains(NamedTuple):
    """The end of the chains [B, *], and how often each accepted, [B] in [0, 1]."""

    x: Tensor
    acceptance: Tensor


class _Point(NamedTuple):
    x: Tensor
    energy: Tensor  # [B], float64
    gradient: Tensor


def mala(
    model: Any, x: Tensor, t: float | Tensor, *, steps: int, step_size: float, seed: int = 0, first_sample: int = 0
) -> Chains:
    """Metropolis-adjusted Langevin (Besag 1994; Roberts & Tweedie 1996), `steps` transitions from x [B, *] at time t:

        x' = x − δ ∇E(x) + √(2δ) z,   accepted with probability min(1, e^{E(x) − E(x')} q(x | x')/q(x' | x)),
        q(y | x) = N(y; x − δ ∇E(x), 2δ)

    `model.energy(x, t [B]) -> [B]` must be differentiable; t is one time or one for each sample.
    """
    delta = checks.number("step_size", step_size, 0, above=True)

    def propose(energy: Energy, here: _Point, z: Tensor) -> tuple[_Point, Tensor]:
        there = _evaluate(energy, here.x - delta * here.gradient + (2 * delta) ** 0.5 * z)
        forth = reference.tree_sum((there.x - here.x + delta * here.gradient).double() ** 2)
        back = reference.tree_sum((here.x - there.x + delta * there.gradient).double() ** 2)
        return there, here.energy - there.energy + (forth - back) / (4 * delta)

    return _run(model, x, t, steps, seed, first_sample, propose)


def hmc(
    model: Any,
    x: Tensor,
    t: float | Tensor,
    *,
    steps: int,
    step_size: float,
    leapfrogs: int = 10,
    seed: int = 0,
    first_sample: int = 0,
) -> Chains:
    """Hamiltonian Monte Carlo (Neal 2011, §5.3.2) with unit mass: momentum p ~ N(0, 1), `leapfrogs` leapfrog steps

        p ← p − ½ε ∇E(x),   x ← x + ε p,   p ← p − ½ε ∇E(x)

    accepted with probability min(1, e^{H(x, p) − H(x', p')}), H = E(x) + ½‖p‖². Arguments as in `mala`.
    """
    size = checks.number("step_size", step_size, 0, above=True)
    count = checks.integer("leapfrogs", leapfrogs, 1, 10**6)

    def propose(energy: Energy, here: _Point, z: Tensor) -> tuple[_Point, Tensor]:
        there, p = here, z
        for _ in range(count):
            p = p - 0.5 * size * there.gradient
            there = _evaluate(energy, there.x + size * p)
            p = p - 0.5 * size * there.gradient
        kinetic = 0.5 * (reference.tree_sum(z.double() ** 2) - reference.tree_sum(p.double() ** 2))
        return there, here.energy - there.energy + kinetic

    return _run(model, x, t, steps, seed, first_sample, propose)


@leaves_no_trace
def _run(
    model: Any,
    x: Tensor,
    t: float | Tensor,
    steps: int,
    seed: int,
    first_sample: int,
    propose: Callable[[Energy, _Point, Tensor], tuple[_Point, Tensor]],
) -> Chains:
    """`steps` transitions of all chains; a proposal of infinite energy is rejected, one that is not a number raises."""
    function = getattr(model, "energy", None) or getattr(getattr(model, "net", None), "energy", None)
    if function is None:
        raise ConfigError(
            f"model must offer energy(x, t) -> [B], which {type(model).__name__} does not: use sampler='ula'"
        )
    steps = checks.integer("steps", steps, 1, 2**32 - 1)
    seed = checks.integer("seed", seed, 0, 2**64 - 1)
    tensor_checks.check_samples("x", x)
    if x.ndim < 2:
        raise ShapeError(f"x must be [B, *shape] with at least one axis after B, got shape {tuple(x.shape)}")
    tensor_checks.check_tensor("x", x, tuple(x.shape), x.device, finite=True)
    first_sample = checks.integer("first_sample", first_sample, 0, 2**32 - len(x))
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    times = torch.as_tensor(tensor_checks.numbers("t", t, x.device), dtype=state, device=x.device)
    if times.shape not in ((), (1,), (len(x),)) or not bool(times.isfinite().all()):
        raise ShapeError(f"t must be one finite time or one for each of {len(x)} samples, got {short(t)}")
    times = times.expand(len(x))

    def energy(at: Tensor) -> Tensor:
        value: Tensor = function(at, times.clone())
        if value.shape != (len(at),):
            raise ModelOutputError(
                f"model.energy returned {tuple(value.shape)}, expected ({len(at)},): one number a sample"
            )
        return value

    with evaluating(model):
        return _chains(energy, x, state, times, steps, seed, first_sample, propose)


def _chains(
    energy: Energy,
    x: Tensor,
    state: torch.dtype,
    times: Tensor,
    steps: int,
    seed: int,
    first_sample: int,
    propose: Callable[[Energy, _Point, Tensor], tuple[_Point, Tensor]],
) -> Chains:
    here = _evaluate(energy, x.detach().to(state))
    accepted = torch.zeros(len(x), dtype=state, device=x.device)
    broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    options: dict[str, Any] = {"seed": seed, "first_sample": first_sample, "device": x.device}
    for k in range(steps):
        z = ops.normal(len(x), x.shape[1:], draw=k, stream=noise.SAMPLER, **options).to(state)
        u = noise.uniform(len(x), (1,), draw=k, stream=noise.ACCEPTANCE, **options)[:, 0].double()
        there, log_ratio = propose(energy, here, z)
        # NaN where x itself has left the finite numbers is a divergent trajectory, and rejected
        broken |= here.energy.isnan() | (there.energy.isnan() & there.x.isfinite().flatten(1).all(1))
        yes = u.log() < log_ratio  # NaN compares false
        here = _Point(*(torch.where(yes.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in zip(there, here)))
        accepted += yes
    if bool(broken.any()):
        samples = tuple((torch.nonzero(broken).flatten() + first_sample).tolist())
        shown = ", ".join(map(str, samples[:5]))
        raise NonFiniteError(
            f"model.energy is NaN in {len(samples)} samples ({shown}): look there", 0, float(times[0]), samples
        )
    return Chains(here.x.to(x.dtype), accepted / steps)


def _evaluate(energy: Energy, x: Tensor) -> _Point:
    """E(x) and ∇E(x), whatever the caller's gradient mode."""
    with torch.inference_mode(False), torch.enable_grad():
        at = x.detach().clone().requires_grad_(True)
        value = energy(at)
        (gradient,) = torch.autograd.grad(value.sum(), at)
    return _Point(at.detach(), value.detach().double(), gradient.detach())
