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

import torch
from torch import Tensor

from .. import checks
from ..errors import ConfigError, NonFiniteError, warn
from ..execution import ops
from ..execution.noise import ACCEPTANCE
from ..guidance.base import Bound, Guidance, Moment, Setting, together
from ..table import Row, StepTable
from .own_steps import Drawn, OwnSteps, Steps
from .posterior_mean import MMPS, DensityBound
from .problem import Problem

FEW = 0.05  # of particles, whose effective number is warned of


@dataclass(frozen=True, eq=False)
class SMC(OwnSteps):
    """Draws of p(x0 | y) by particles that are weighted and drawn anew.

    particles  of each problem. y [*m] for all samples: default num_samples, and these are the draws; y [num_samples, *m]: a
               problem for each, of which one particle is drawn; default 64
    proposal   a method of this module that guides the particles, for the same problem; default MMPS
    threshold  particles are drawn anew where their effective number (Σw)²/Σw² is below this share of them

    Particles of one problem depend on each other, so those of one y are a function of seed, first_sample, num_samples and
    particles together; sample i of y [num_samples, *m] is one of seed, first_sample + i and particles. None is of batch_size,
    which bounds one call of the network.
    """

    problem: Problem
    particles: int | None = None
    proposal: Guidance | None = None
    threshold: float = 0.5

    def run(self, steps: Steps) -> Drawn:
        setting, table, smallest = steps.setting, steps.table, checks.number("threshold", self.threshold, 0, 1)
        check_rows(table)
        bound = self._bound(setting)
        if not isinstance(bound, DensityBound):
            raise ConfigError(
                f"proposal must be a method that knows p(y | x_t), such as inverse.MMPS, got {type(self.proposal).__name__}"
            )
        shared = tuple(self.problem.y.shape) == bound.measured.shape
        size = self._size(setting.count, shared)
        groups = 1 if shared else setting.count
        many = groups * size
        first = setting.first_sample if shared else setting.first_sample * size
        if first + many > 2**32:
            raise ConfigError(f"particles={size} of {setting.count} problems are more than 2**32: use fewer")
        parts = {name: _repeated(value, shared, size) for name, value in together(setting.cond, [bound]).items()}
        weights = Weights(torch.zeros(groups, size, dtype=torch.float64), setting.first_sample, setting.seed)
        matrix = torch.from_numpy(table.numbers).to(setting.device, setting.dtype)

        def asked(moment: Moment, own: dict[str, Tensor]) -> tuple[Tensor, ...]:
            guided, density = bound.with_density(moment, own)
            return moment.base, guided, density()

        x, before = steps.start(many, first), torch.zeros(many, dtype=torch.float64, device=setting.device)
        for k, row in steps.rows():
            own, guided, density = steps.ask(x, row.network_time, parts, asked, bound.differentiates)
            weights.take(density - before)
            weights.check(k, row)
            index = weights.drawn_anew(k, smallest)
            if index is not None:
                x, own, guided, density = (value[index.to(x.device)] for value in (x, own, guided, density))
            z, before = None, density
            if row.c != 0:
                z = steps.normal(many, first, k)
                owed = (row.b[0] * row.q / row.c) * (guided - own).double()
                weights.take(-(owed * (0.5 * owed + z)).flatten(1).sum(1))
            out = torch.empty_like(x)
            steps.operations.step(out, matrix, ops.cursor(k, first, setting.seed, setting.device), None, x, guided, z=z)
            x = out
        weights.seen.append(weights.effective())
        index = weights.chosen(len(table), setting.count if shared else 1)
        effective = torch.stack(weights.seen)
        self._warn_of_few(effective, size)
        return Drawn(x[index.to(x.device)], len(table) * math.ceil(many / steps.batch), effective)

    def _warn_of_few(self, effective: Tensor, size: int) -> None:
        """Where more than a tenth of the problems had too few for a while."""
        groups, limit = effective.shape[1], max(FEW * size, min(2.0, size / 2))
        least, row = effective.min(0)
        few = int((least < limit).sum())
        if few > groups / 10:
            of = f" of {few} of {groups} problems" if groups > 1 else ""
            worst = int(least.argmin())
            warn(
                f"inverse.SMC's particles{of} fell to an effective number of {float(least[worst]):.3g} of {size}, at row "
                f"{int(row[worst])}, and the samples may stand on few of them: give more particles= (of one y "
                "num_samples=), more steps=, or a nearer proposal="
            )

    def _bound(self, setting: Setting) -> Bound:
        if self.proposal is None:
            return MMPS(self.problem).bind(setting)
        if getattr(self.proposal, "problem", None) is not self.problem:
            raise ConfigError(
                "proposal must be a method for the same Problem object: inverse.SMC(problem, proposal=inverse.TMPD(problem))"
            )
        return self.proposal.bind(setting)

    def _size(self, count: int, shared: bool) -> int:
        given = self.particles
        if not shared:
            return 64 if given is None else checks.integer("particles", given, 1, 2**24)
        size = count if given is None else checks.integer("particles", given, 1, 2**32)
        if size < count:
            raise ConfigError(
                f"particles={size} are fewer than num_samples={count}, which are drawn from them: leave it out"
            )
        return size


@dataclass
class Weights:
    """Of the particles of each problem: logarithms [groups, size], float64, on the host.

    first, seed   the number of the first problem and the seed, by which particles are drawn
    """

    log: Tensor
    first: int
    seed: int
    seen: list[Tensor] = field(default_factory=list)  # effective numbers before each row, and of the draws

    def take(self, logs: Tensor) -> None:
        """Multiply by what the steps owe, [groups · size]."""
        self.log += logs.cpu().view_as(self.log)

    def effective(self) -> Tensor:
        """(Σw)²/Σw² of each problem."""
        return 1 / self.log.softmax(1).square().sum(1)

    def drawn_anew(self, row: int, threshold: float) -> Tensor | None:
        """Numbers of the particles that go on, [groups · size], where some problem's weights have grown uneven; its weights are
        then equal."""
        groups, size = self.log.shape
        self.seen.append(self.effective())
        uneven = self.seen[-1] < threshold * size
        if not bool(uneven.any()):
            return None
        index = torch.where(
            uneven[:, None], self.chosen(row, size).view(groups, size), torch.arange(groups * size).view(groups, size)
        )
        self.log[uneven] = 0.0
        return index.flatten()

    def chosen(self, row: int, count: int) -> Tensor:
        """Systematic resampling: the numbers of `count` particles of each problem, [groups · count]."""
        groups, size = self.log.shape
        u = ops.uniform(groups, (1,), stream=ACCEPTANCE, seed=self.seed, draw=row, first_sample=self.first)
        at = (torch.arange(count, dtype=torch.float64) + u.double()) / count
        below = self.log.softmax(1).cumsum(1)
        index = torch.searchsorted(below / below[:, -1:], at, right=True).clamp(max=size - 1)
        return (index + torch.arange(groups)[:, None] * size).flatten()

    def check(self, k: int, row: Row) -> None:
        """NonFiniteError where a problem has no particle of any weight."""
        if bool((self.log.max(1).values > -math.inf).all()) and not bool(self.log.isnan().any()):
            return
        raise NonFiniteError(
            f"the particles' weights are not finite at row {k} ({row.label}, t = {row.level.t:g}): look at the network's output "
            "and at y there",
            k, row.level.t, (),
        )  # fmt: skip


def check_rows(table: StepTable) -> None:
    """ConfigError unless every row is a step of its own with noise, the last one apart."""
    for k, row in enumerate(table.rows):
        plain = row.calls_network and len(row.b) == 1 and row.e == 0 and not row.clips and not row.finishes
        if not plain or row.measure is not None or row.log_variance is not None or (row.c == 0 and k + 1 < len(table)):
            raise ConfigError(
                f"inverse.SMC needs steps that draw noise and stand alone, and row {k} ({row.label}) does not: use "
                "sampler='ancestral', 'euler_maruyama' or 'reverse_diffusion', without clip"
            )


def _repeated(value: Tensor, shared: bool, size: int) -> Tensor:
    """A tensor [count, *] for each particle."""
    if not shared:
        return value.repeat_interleave(size, 0)
    if not bool(((value == value[:1]) | (value.isnan() & value[:1].isnan())).all()):
        raise ConfigError(
            "cond must be the same for all samples of one y, whose particles are weighed together: give y for each"
        )
    return value[:1].expand(size, *value.shape[1:])
