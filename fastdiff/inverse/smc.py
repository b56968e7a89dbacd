"""Sequential Monte Carlo: a method whose draws are of the posterior itself as particles grow, whatever guides them.

Of a table's rows x_s = μ(x_t, x̂0) + c z those with the guided x̂0 propose, and a particle's weight takes what they owe to the
model's own (Wu et al. 2023, Alg. 1 and eq. 10; Cardoso et al. 2023):

    w_s = w_t · ψ_s(x_s)/ψ_t(x_t) · N(x_s; μ(x_t, x̂0), c²)/N(x_s; μ(x_t, x̂0 guided), c²),        ψ_t(x_t) ≈ p(y | x_t)

with ψ the density that the guiding method assumes. It need not be right: what it lacks the weights of later rows put right. Where
weights have grown uneven, particles are drawn anew by them (systematic resampling, by one uniform number for each problem).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, NonFiniteError
from ..execution import monitor, ops
from ..execution.modes import evaluating
from ..execution.noise import ACCEPTANCE, PRIOR, SAMPLER
from ..guidance.base import Guidance, Moment, Setting, taken_apart, together
from ..table import Row, StepTable
from .posterior_mean import MMPS, GaussianBound
from .problem import Problem

STEPS, GRID = 100, "logsnr"  # where the caller names none


@dataclass(frozen=True, eq=False)
class SMC:
    """Draws of p(x0 | y) by particles that are weighted and drawn anew.

    particles  of each problem. y [*m] for all samples: default num_samples, and these are the draws; y [num_samples, *m]: a
               problem for each, of which one particle is drawn; default 64
    proposal   a method of this module that guides the particles, for the same problem; default MMPS
    threshold  particles are drawn anew where their effective number (Σw)²/Σw² is below this share of them

    Particles of one problem depend on each other, so samples are a function of seed, num_samples and particles together; not of
    batch_size, which bounds one call of the network.
    """

    problem: Problem
    particles: int | None = None
    proposal: Guidance | None = None
    threshold: float = 0.5


@dataclass
class Particles:
    """The state of a run of `groups` problems: x [groups · size, *], log weights [groups, size] in float64."""

    x: Tensor
    log_weights: Tensor
    first: int  # problem
    seed: int
    drawn: int = 0
    smallest: float = field(default=math.inf)  # effective number

    def effective(self) -> Tensor:
        """(Σw)²/Σw² of each problem."""
        return 1 / self.log_weights.softmax(1).square().sum(1)

    def chosen(self, row: int, count: int) -> Tensor:
        """Systematic resampling: `count` numbers of particles of each problem, [groups · count]."""
        groups, size = self.log_weights.shape
        u = ops.uniform(groups, (1,), stream=ACCEPTANCE, seed=self.seed, draw=row, first_sample=self.first)
        at = (torch.arange(count, dtype=torch.float64) + u.double()) / count
        below = self.log_weights.softmax(1).cumsum(1).cpu()
        index = torch.searchsorted(below / below[:, -1:], at, right=True).clamp(max=size - 1)
        return (index + torch.arange(groups)[:, None] * size).flatten().to(self.x.device)


def run_smc(
    smc: SMC, setting: Setting, table: StepTable, operations: Any, *, batch: int, progress: bool | None
) -> tuple[Tensor, int]:
    """Samples by the table, which is planned for predictions of x0 at process times, and the network calls."""
    check_rows(table)
    model, count = setting.model, setting.count
    model.condition(setting.cond, count, looks=True)
    bound = _proposal(smc).bind(setting)
    if not isinstance(bound, GaussianBound):
        raise ConfigError(
            f"proposal must be a method that knows p(y | x_t), such as inverse.MMPS, got {type(smc.proposal).__name__}"
        )
    shared = tuple(smc.problem.y.shape) == bound.measured.shape
    size = _size(smc, count, shared)
    groups = 1 if shared else count
    many = groups * size
    first = setting.first_sample if shared else setting.first_sample * size
    if first + many > 2**32:
        raise ConfigError(f"particles={size} of {count} problems are more than 2**32: use fewer")
    parts = {name: _repeated(value, shared, size) for name, value in together(setting.cond, [bound]).items()}
    x = torch.empty((many, *model.data_shape), dtype=setting.dtype, device=setting.device)
    operations.normal(x, ops.cursor(0, first, setting.seed, setting.device), PRIOR)
    x.mul_(table.prior_std)
    state = Particles(x, torch.zeros(groups, size, dtype=torch.float64), first, setting.seed)
    matrix = torch.from_numpy(table.numbers).to(setting.device, setting.dtype)
    before: Tensor | None = None
    with evaluating(model.net), torch.no_grad(), monitor.bar(progress, len(table), "sample", "row") as display:
        for k, row in enumerate(table.rows):
            own, guided, density = _asked(model, bound, state.x, row, parts, batch)
            state.log_weights += (density if before is None else density - before).cpu().view(groups, size)
            _check(state, k, row)
            if float(state.effective().min()) < smc.threshold * size:
                index = state.chosen(k, size)
                # those of problems whose weights are still even stay as they are
                even = (state.effective() >= smc.threshold * size).repeat_interleave(size).to(index.device)
                index = torch.where(even, torch.arange(many, device=index.device), index)
                state.log_weights[~even.cpu().view(groups, size)[:, 0]] = 0.0
                state.drawn += 1
                state.x, own, guided, density = (value[index] for value in (state.x, own, guided, density))
            before = density
            cursor, z = ops.cursor(k, first, setting.seed, setting.device), None
            if row.c != 0:
                z = torch.empty_like(state.x)
                operations.normal(z, cursor, SAMPLER)
                owed = (row.b[0] * row.q / row.c) * (guided - own).double()
                state.log_weights -= (owed * (0.5 * owed + z)).flatten(1).sum(1).cpu().view(groups, size)
            out = torch.empty_like(state.x)
            operations.step(out, matrix, cursor, None, state.x, guided, z=z)
            state.x = out
            display.update()
    chosen = state.chosen(len(table), count if shared else 1)
    return state.x[chosen], len(table) * math.ceil(many / batch)


def _proposal(smc: SMC) -> Guidance:
    if smc.proposal is None:
        return MMPS(smc.problem)
    if getattr(smc.proposal, "problem", None) is not smc.problem:
        raise ConfigError(
            "proposal must be a method for the same Problem object: inverse.SMC(problem, proposal=inverse.TMPD(problem))"
        )
    return smc.proposal


def check_rows(table: StepTable) -> None:
    """ConfigError unless every row is a step of its own with noise, the last one apart."""
    for k, row in enumerate(table.rows):
        plain = row.calls_network and len(row.b) == 1 and row.e == 0 and not row.clips and not row.finishes
        if not plain or row.measure is not None or row.log_variance is not None or (row.c == 0 and k + 1 < len(table)):
            raise ConfigError(
                f"inverse.SMC needs steps that draw noise and stand alone, and row {k} ({row.label}) does not: use "
                "sampler='ancestral', 'euler_maruyama' or 'reverse_diffusion', without clip"
            )


def _size(smc: SMC, count: int, shared: bool) -> int:
    given = smc.particles
    if not shared:
        return 64 if given is None else checks.integer("particles", given, 1, 2**24)
    size = count if given is None else checks.integer("particles", given, 1, 2**32)
    if size < count:
        raise ConfigError(
            f"particles={size} are fewer than num_samples={count}, which are drawn from them: leave it out"
        )
    return size


def _repeated(value: Tensor, shared: bool, size: int) -> Tensor:
    """A tensor [count, *] for each particle."""
    if not shared:
        return value.repeat_interleave(size, 0)
    if not bool((value == value[:1]).all()):
        raise ConfigError(
            "cond must be the same for all samples of one y, whose particles are weighed together: give y for each"
        )
    return value[:1].expand(size, *value.shape[1:])


def _asked(
    model: Any, bound: GaussianBound, x: Tensor, row: Row, parts: dict[str, Tensor], batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x̂0, the guided one, and log ψ(x), [B]."""
    made = []
    for low in range(0, len(x), batch):
        piece = slice(low, low + batch)
        cond, (own,) = taken_apart({name: value[piece] for name, value in parts.items()}, 1)
        state = x[piece]
        with torch.inference_mode(False), torch.enable_grad():
            state = state.detach().clone().requires_grad_(bound.differentiates)
            t = torch.full((len(state),), row.network_time, dtype=x.dtype, device=x.device)
            moment = Moment(model, state, t, cond, bound.differentiates)
            guided, density = bound.with_density(moment, own)
        made.append((moment.base.detach(), guided.detach(), density.detach()))
    own_x0, guided_x0, density = (torch.cat(values) for values in zip(*made))
    return own_x0, guided_x0, density


def _check(state: Particles, k: int, row: Row) -> None:
    weights = state.log_weights
    if not bool((weights.max(1).values > -math.inf).all() & ~weights.isnan().any()):
        raise NonFiniteError(
            f"the particles' weights are not finite at row {k} ({row.label}, t = {row.level.t:g}): look at the network's output "
            "and at y there",
            k, row.level.t, (),
        )  # fmt: skip
    state.smallest = min(state.smallest, float(state.effective().min()))
