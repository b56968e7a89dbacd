"""The one list of operations that both devices measure: what fastdiff does, what a user would write instead, its memory.

Their bits are the reference's, and an opponent's numbers mean the same, before anything is timed.
"""

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff.execution.ops as ops
from fastdiff.execution.noise import PERTURBATION, PROBES, SAMPLER
from fastdiff.table import COLUMNS

A, B, C = 0.9, 0.1, 0.3
GAIN = 0.05
# Dormand and Prince's weights, and their difference from the embedded method's
WEIGHTS = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0)
ERRORS = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
STAGES = [f"k{j}" for j in range(7)]

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Ours = Callable[[ModuleType, Tensors], Outputs]  # by a backend's module, of what `tensors` makes


class Op(NamedTuple):
    name: str
    bytes: int  # of memory that must be read and written for each number
    ours: Ours
    given: str  # the names of the tensors that `theirs` takes
    theirs: Callable[..., Any]  # what a user would write instead
    called: str = "eager"  # theirs
    also: dict[str, Ours] = {}  # noqa: RUF012  # further opponents
    compiled: bool = False  # by torch.compile as well
    noiseless: float | None = None  # theirs draws nothing: each of its numbers must be ours, to this tolerance
    oracle: Ours | None = None  # what the reference does for the results of `ours`, if not `ours`

    def eager(self, t: Tensors) -> Callable[[], Any]:
        arguments = [t[name] for name in self.given.split()]
        return lambda: self.theirs(*arguments)

    def torch_compile(self, t: Tensors, **options: Any) -> Callable[[], Any]:
        return self._replace(theirs=torch.compile(self.theirs, dynamic=False, **options)).eager(t)


def tensors(n: int, device: torch.device, samples: int) -> Tensors:
    """n numbers in so many samples, and all else that the operations read and write."""
    generator, each = torch.Generator(device).manual_seed(0), n // samples
    drawn = ("x", "m", "trained", *STAGES)
    t = {name: torch.randn(samples, each, generator=generator, device=device) for name in drawn}
    t["trained"].requires_grad_()
    t |= {name: torch.empty_like(t["x"]) for name in ("out", "noise", "theirs")} | {"half": t["m"].bfloat16()}
    t |= {"net_input": torch.empty_like(t["half"]), "wide_input": torch.empty_like(t["x"])}
    t["cursor"] = ops.cursor(0, 0, 0, device)
    usual = {"q": 1.0, "low": -math.inf, "high": math.inf, "next_scale": 1.0, "guidance": 1.0}
    rows = {"table": {"a": A, "b0": B, "c": C}, "noiseless": {"a": A, "b0": B}}
    rows["langevin"] = {"a": 1.0, "gain": GAIN, "cap": math.inf}
    for name, columns in rows.items():
        t[name] = torch.tensor([[{**usual, **columns}.get(column, 0.0) for column in COLUMNS]], device=device)
    t |= {"measured": torch.empty(samples, 2, device=device), "first_bad": torch.full((samples,), 9, device=device)}
    for name, low, high in (("r", 0.1, 0.9), ("w", 1.1, 1.9), ("weight", 2.1, 2.9), ("h", 0.1, 0.2)):
        t[name] = torch.linspace(low, high, samples, device=device)
    t |= {"none": torch.zeros(samples, device=device), "all": torch.ones(samples, device=device)}
    t["times"] = torch.linspace(0, 1, max(n // 128, 1), device=device)
    t["frequencies"] = torch.logspace(0, -4, 64, device=device)
    return t


def step(m: str, *written: str, noise: bool = True, net_input: str = "net_input") -> Ours:
    def ours(k: ModuleType, t: Tensors) -> Outputs:
        table, stream = (t["table"], SAMPLER) if noise else (t["noiseless"], None)
        results = {name: t[net_input if name == "net_input" else name] for name in written}
        k.step(t["out"], table, t["cursor"], stream, t["x"], t[m], **results)
        return (t["out"], *results.values())

    return ours


@functools.lru_cache(maxsize=2)
def _prepared(k: ModuleType, *operands: Any) -> Callable[..., None]:
    return k.prepare_step(*operands)  # type: ignore[no-any-return]


def prepared(k: ModuleType, t: Tensors) -> Outputs:
    """As the loop asks for it: all that does not change from row to row is checked once."""
    _prepared(k, t["out"], t["table"], SAMPLER, t["x"])(t["cursor"], t["m"], None)
    return (t["out"],)


def affine(x: Tensor, m: Tensor) -> Tensor:
    return A * x + B * m + C * torch.randn_like(x)


def affine_mixed(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    after = affine(x, m.float())
    return after, after.bfloat16()


def affine_flagged(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    after, narrow = affine_mixed(x, m)
    return after, narrow, after.isfinite().all(1)


def affine_wide(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    after = affine(x, m)
    return after, after.clone(), after.isfinite().all(1)


def affine_noiseless(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    after = A * x + B * m.float()
    return after, after.bfloat16(), after.isfinite().all(1)


def preallocated(k: ModuleType, t: Tensors) -> Outputs:
    scaled = torch.mul(t["x"], A, out=t["theirs"])
    return (scaled.add_(t["m"], alpha=B).add_(t["noise"].normal_(), alpha=C),)


def add(k: ModuleType, t: Tensors) -> Outputs:
    return (torch.add(t["x"], t["m"], alpha=B, out=t["theirs"]),)


def fill(name: str, stream: int) -> Ours:
    def ours(k: ModuleType, t: Tensors) -> Outputs:
        getattr(k, name)(t["out"], t["cursor"], stream)
        return (t["out"],)

    return ours


def signs(x: Tensor) -> Tensor:
    return torch.randint(0, 2, x.shape, dtype=x.dtype, device=x.device).mul_(2).sub_(1)


def noisy(x: Tensor, r: Tensor, w: Tensor) -> Tensor:
    return r[:, None] * x + w[:, None] * torch.randn_like(x)


def denoising_loss(m: Tensor, x: Tensor, r: Tensor, w: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    error = m - noisy(x, r, w)
    return weight * (error**2).mean(1), error


def training(k: ModuleType, t: Tensors) -> Outputs:
    """Of a network that predicts the noise, whose output stands ready; through torch's autograd."""
    t["trained"].grad = None
    x_t = torch.ops.fastdiff.perturb(t["x"], t["r"], t["w"], t["cursor"], PERTURBATION)
    loss, _ = torch.ops.fastdiff.dsm_loss(
        t["trained"], t["x"], t["none"], t["all"], t["weight"], t["cursor"], PERTURBATION
    )
    loss.mean().backward()
    return x_t, t["trained"].grad


def training_by_hand(k: ModuleType, t: Tensors) -> Outputs:
    x_t = k.perturb(t["x"], t["r"], t["w"], t["cursor"], PERTURBATION)
    output = t["trained"].detach()
    _, error = k.dsm_loss(output, t["x"], t["none"], t["all"], t["weight"], t["cursor"], PERTURBATION)
    return x_t, k.dsm_loss_backward(torch.full_like(t["weight"], 1 / len(output)), error, t["weight"], output.dtype)


def eager_training(m: Tensor, x: Tensor, r: Tensor, w: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    m.grad, eps = None, torch.randn_like(x)
    x_t = r[:, None] * x + w[:, None] * eps
    (weight * ((m - eps) ** 2).mean(1)).mean().backward()
    return x_t, m.grad


def langevin(k: ModuleType, t: Tensors) -> Outputs:
    """The measurement and the step that it scales, with one noise for both: kept, or drawn a second time."""
    kept, stream = (t["noise"], None) if k.KEEPS_NOISE else (None, SAMPLER)
    k.measure_langevin(t["measured"], t["langevin"], t["cursor"], SAMPLER, True, t["x"], t["m"], kept=kept)
    k.step(t["out"], t["langevin"], t["cursor"], stream, t["x"], t["m"], z=kept, measured=t["measured"])
    return t["out"], t["measured"]


def eager_langevin(x: Tensor, m: Tensor) -> Tensor:
    z = torch.randn_like(x)
    delta = GAIN * (z.norm(dim=1).mean() / m.norm(dim=1).mean()) ** 2
    return x + delta * m + (2 * delta).sqrt() * z


def measure(k: ModuleType, t: Tensors) -> Outputs:
    k.measure_langevin(t["measured"], t["langevin"], t["cursor"], SAMPLER, False, t["x"], t["m"])
    return (t["measured"],)


def eager_measure(m: Tensor) -> Tensor:
    delta = GAIN * (torch.randn_like(m).norm(dim=1) / m.norm(dim=1)) ** 2
    return torch.stack((delta, (2 * delta).sqrt()), 1)


def probe_dot(kind: str, again: bool = False) -> Ours:
    """⟨v, Jv⟩ of a probe that the network's product, which lies between the two, needs in memory anyhow."""

    def ours(k: ModuleType, t: Tensors) -> Outputs:
        getattr(k, kind)(t["noise"], t["cursor"], PROBES)
        return (k.probe_dot(t["x"], t["cursor"], PROBES, kind, None if again else t["noise"]),)

    return ours


def dot(kind: str) -> Ours:
    return lambda k, t: (k.probe_dot(t["x"], t["cursor"], PROBES, kind),)


def dormand_prince(x: Tensor, h: Tensor, *stages: Tensor) -> tuple[Tensor, Tensor]:
    after, error = x, torch.zeros_like(x)
    for k, weight, difference in zip(stages, WEIGHTS, ERRORS):
        after = after + (h * weight)[:, None] * k if weight else after
        error = error + (h * difference)[:, None] * k if difference else error
    ratio = error / (1e-5 + 1e-3 * torch.maximum(x.abs(), after.abs()))
    return after, (ratio**2).mean(1).sqrt()


def embedding(times: Tensor, frequencies: Tensor) -> Tensor:
    angle = (1000.0 * times)[:, None] * frequencies
    return torch.cat((angle.sin(), angle.cos()), 1)


COMPILED = "torch.compile of eager"
# parts of a step, below which it cannot be: what reads and writes as much without the noise, and the noise alone
FLOOR, NOISE = "memory floor (torch.add)", "noise floor (normal)"
OPS = (
    Op("step", 12, step("m"), "x m", affine, compiled=True, also={
        "eager, preallocated": preallocated,
        FLOOR: add,
        "through torch.ops": lambda k, t: step("m")(torch.ops.fastdiff, t),
    }),
    Op("step, mixed", 12, step("half", "net_input"), "x half", affine_mixed, compiled=True),
    # what the loop asks of a row: the state, the network's next input, the flag of what is not finite
    Op("step, bf16 network", 12, step("half", "net_input", "first_bad"), "x half", affine_flagged),
    Op("step, prepared", 12, prepared, "x m", affine, also={
        "eager, preallocated": preallocated, FLOOR: add, NOISE: fill("normal", SAMPLER),
    }),
    Op("normal", 4, fill("normal", SAMPLER), "theirs", lambda out: torch.randn(out.shape, out=out), "torch.randn"),
    Op("rademacher", 4, fill("rademacher", PROBES), "x", signs),
    Op("perturb", 8, lambda k, t: (k.perturb(t["x"], t["r"], t["w"], t["cursor"], PERTURBATION),), "x r w", noisy),
    Op("dsm_loss", 12, lambda k, t: k.dsm_loss(t["m"], t["x"], t["r"], t["w"], t["weight"], t["cursor"], PERTURBATION),
       "m x r w weight", denoising_loss),
    Op("perturb + dsm_loss + backward", 28, training, "trained x r w weight", eager_training, oracle=training_by_hand),
    Op("measured Langevin row", 24, langevin, "x m", eager_langevin),
    Op("probe_dot, rademacher", 12, probe_dot("rademacher"), "x", lambda x: (signs(x) * x).sum(1),
       also={"probe made a second time": probe_dot("rademacher", again=True)}),
    Op("probe_dot, normal", 12, probe_dot("normal"), "x", lambda x: (torch.randn_like(x) * x).sum(1),
       also={"probe made a second time": probe_dot("normal", again=True)}),
    # the second stage has no weight
    Op("rk_error", 32, lambda k, t: k.rk_error(t["x"], [t[s] for s in STAGES], t["h"], WEIGHTS, ERRORS, 1e-3, 1e-5),
       " ".join(["x h", *STAGES]), dormand_prince, noiseless=1e-5),
    Op("timestep_embedding", 4, lambda k, t: (k.timestep_embedding(t["times"], t["frequencies"], 1000.0, 128, "sin_cos"),),
       "times frequencies", embedding, noiseless=1e-6),
)  # fmt: skip
# what else was predicted of a GPU (predictions.py)
OTHERS = (
    Op("step, float32 network", 16, step("m", "net_input", "first_bad", net_input="wide_input"), "x m", affine_wide),
    Op("step without noise, bf16 network", 12, step("half", "net_input", "first_bad", noise=False), "x half",
       affine_noiseless, noiseless=1e-6),
    Op("probe_dot alone, normal", 4, dot("normal"), "x", lambda x: (torch.randn_like(x) * x).sum(1)),
    Op("probe_dot alone, rademacher", 4, dot("rademacher"), "x", lambda x: (signs(x) * x).sum(1)),
    Op("measure_langevin alone", 8, measure, "m", eager_measure),
)  # fmt: skip


def check_bits(op: Op, module: ModuleType, t: Tensors, oracle: ModuleType, on_cpu: Tensors) -> None:
    """Refuse the operation a number unless its results are the oracle's to the bit; the tensors may be the same."""

    def results(run: Ours, k: ModuleType, where: Tensors) -> list[Tensor]:
        for name in ("out", "net_input", "wide_input", "noise", "measured"):
            where[name].fill_(math.nan)
        return [value.to("cpu", copy=True) for value in run(k, where)]

    pairs = zip(results(op.ours, module, t), results(op.oracle or op.ours, oracle, on_cpu), strict=True)
    differ = [int((a != b).sum()) for a, b in pairs]
    if any(differ):
        raise AssertionError(f"{op.name}: of its results {differ} numbers differ from the reference's: not timed")


def first(results: Tensor | Outputs) -> Tensor:
    return (results if isinstance(results, Tensor) else results[0]).detach()


def check_meaning(op: Op, ours: Callable[[], Any], name: str, theirs: Callable[[], Any]) -> None:
    """Refuse an opponent a number that computes something else: its result differs by its own noise, which is 0 on the mean."""
    mine = first(ours())
    a = mine.double().clone()
    mine.fill_(math.nan)  # so that theirs, which may be in the same memory, is not ours again
    b = first(theirs()).double()
    apart = b - a
    # 5 standard errors; float32's roundings
    alike = apart.mean().abs() <= 5 * apart.std() / apart.numel() ** 0.5 + 1e-5 * a.abs().mean()
    if op.noiseless is not None:
        alike = torch.allclose(a, b, rtol=op.noiseless, atol=op.noiseless)
    if not alike:
        raise AssertionError(f"{op.name}: {name} computes something else: not timed")


def contestants(
    op: Op, module: ModuleType, t: Tensors, oracle: ModuleType, on_cpu: Tensors, compiled: dict[str, dict[str, Any]]
) -> dict[str, Callable[[], Any]]:
    """Ours and the opponents, all checked; `compiled`: what torch.compile's of theirs are called, with its options."""
    check_bits(op, module, t, oracle, on_cpu)
    runs = {"ours": lambda: op.ours(module, t), op.called: op.eager(t)}
    runs |= {name: (lambda run=run: run(module, t)) for name, run in op.also.items()}
    runs |= {name: op.torch_compile(t, **options) for name, options in compiled.items()}
    for name, run in runs.items():
        if name not in (FLOOR, NOISE):
            check_meaning(op, runs["ours"], name, run)
    return runs
