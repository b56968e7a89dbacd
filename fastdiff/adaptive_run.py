"""A run of a sampler that chooses its steps, from the prior to t_min."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import probability_flow
from .errors import ConfigError
from .execution import noise as fdn1
from .execution import ops, tensor_checks
from .planning.samplers import Adaptive, AdaptiveSDE
from .subject import Subject


class AdaptiveRun:
    """What `fastdiff.sample` was asked for, of such a sampler; `calls` and `nfe` are known after `execute`."""

    table = None
    nfe: Tensor | None = None

    def __init__(
        self, subject: Subject, solver: Adaptive | AdaptiveSDE, full: tuple[int, ...], *, seed: int, first_sample: int, cond: Any,
        x_init: Tensor | None, dtype: torch.dtype, device: torch.device, check: str, backend: str, engine: str,
        sde: Any, t_min: float | None, denoise: bool, fixed: dict[str, Any],
    ) -> None:  # fmt: skip
        for name, value in fixed.items():
            if value is not None:
                raise ConfigError(
                    f"{name} belongs to samplers of fixed steps, and {solver.name!r} chooses its own: leave it out"
                    + {"steps": ", its rtol and atol say how finely", "callback": ", or ask for a trajectory"}.get(
                        name, ""
                    )
                )
        end = probability_flow.check(subject, sde, t_min, solver.default_t_min(subject.process))
        if end == subject.process.T:
            raise ConfigError(f"t_min must be below T = {end:g}, where the run starts: give a smaller one")
        self.backend, self.engine, self.why = ops.resolve(
            backend, engine, device, dtype, "a sampler that chooses its steps has no rows to replay"
        )
        if x_init is not None:
            tensor_checks.check_tensor("x_init", x_init, full, device, check != "off")
        tensor_checks.check_condition(cond, full[0], device, check != "off")
        self.subject, self.solver, self.full, self.end, self.denoise = subject, solver, full, end, denoise
        self.seed, self.first_sample, self.cond, self.x_init = seed, first_sample, cond, x_init
        self.dtype, self.device, self.calls = dtype, device, 0

    @property
    def couples_batch(self) -> str | None:
        coupled = isinstance(self.solver, Adaptive) and self.solver.couple
        return "couple=True takes its step from the whole batch; use couple=False" if coupled else None

    def execute(
        self, batch: int, trajectory: int, callback: Any, progress: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """The result and the kept states."""
        if trajectory and isinstance(self.solver, AdaptiveSDE):
            raise ConfigError(
                f"trajectory={trajectory} needs a smooth path, and {self.solver.name!r} has none: leave it out"
            )
        process, operations = self.subject.process, ops.backend_module(self.backend)
        if self.x_init is None:
            x = torch.empty(self.full, dtype=self.dtype, device=self.device)
            operations.normal(x, ops.cursor(0, self.first_sample, self.seed, self.device), fdn1.PRIOR)
            x.mul_(process.prior_std)
        else:
            x = self.x_init.detach().to(self.dtype).contiguous()
        found = probability_flow.follow(
            self.subject, x, float(process.T), self.end, self.solver, operations=operations, cond=self.cond,
            states=trajectory, seed=self.seed, first_sample=self.first_sample, batch=batch, progress=progress,
            what="sample", denoise=self.denoise,
        )  # fmt: skip
        self.nfe, self.calls = found.nfe, found.calls
        return found.y, found.states
