"""optimize(): a model whose network does the same faster, by what is measured best on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .errors import ConfigError, GraphError, choose, names_keywords, one_line
from .execution import cpu, fused, modules
from .execution.calls import dtype_of
from .execution.cuda_graph import capture
from .model import ScoreModel

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXACT, TF32 = 1e-4, 2.0**-8  # of the largest output, at most: float32's roundings, and those of a GPU's products
PAYS = 0.97  # of the time before: what is kept takes less
SECONDS = 0.3  # to measure a layer or a network for, at most; three calls at least


@names_keywords
def optimize(
    model: ScoreModel, precision: str = "bf16", compile: bool = False, *, batch_size: int = 16, cond: Any = None,
    verbose: bool = True,
) -> ScoreModel:  # fmt: skip
    """A copy of the model whose network is as fast as it was measured to get here, for sampling; the model itself stays as it is.

    Tried in this order, each kept where it takes less time than what was before: on a CPU, weights that each call scales (MPUNet)
    scaled once, beside the weights themselves; channels side by side in memory (channels_last); 1×1 convolutions as products of
    matrices; Winograd's convolution, for each layer by itself, on a CPU in float32 (four times the memory of those weights);
    with precision "bf16" the whole network in bfloat16, where the processor has it; with `compile`, torch.compile. It prints each
    with its time, and how far the outputs of one batch are from those of the network as it was: some 1e-5 of the largest in
    "fp32", some 1e-2 in "bf16"; what is further than 1e-4 and 0.1 is not kept (on a GPU, where torch may round products to TF32,
    4e-3 and 0.1). The same text is `optimized`. Its weights need no gradient: to train, take the model itself. On a GPU the times
    are those of the network as a CUDA graph, as runs replay it, or, where it cannot be captured, of eager calls. No GPU has run
    it yet.

    precision   "bf16", where that is faster, or "fp32"
    batch_size  samples of a call, as in the runs to come
    cond        a condition of one batch, where the network must have one: labels 0 and conditions of zeros unless given

    For training use `precision="bf16"` of `fastdiff.train`. Errors: ConfigError.
    """
    if not isinstance(model, ScoreModel):
        raise ConfigError(f"model must be a ScoreModel, got {type(model).__name__}: wrap it, ScoreModel(net, sde, …)")
    if not isinstance(model.net, nn.Module):
        raise ConfigError(
            f"model must have a network that is a torch.nn.Module, got {type(model.net).__name__}: write it as the forward of one"
        )
    choose("precision", precision, PRECISIONS)
    batch_size = checks.integer("batch_size", batch_size, 1, 2**31 - 1)
    net = copy.deepcopy(modules.inner(model.net)).eval().requires_grad_(False)
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    trial = _Trial(model, device, batch_size, cond)
    expected, trained = trial.output(net), str(dtype_of(net, torch.float32)).removeprefix("torch.")
    largest = float(expected.abs().max())
    report = [f"batches of {batch_size} on {device}, ms a call:"]
    best, took, error = net, trial.seconds(net), 0.0
    report.append(f"{1e3 * took:9.2f}  as it was, {trained}")
    for name, change, most in _changes(trial, precision, compile):
        try:
            candidate = change(best)
            if candidate is None:
                continue
            difference = float((trial.output(candidate) - expected).abs().max()) / (largest or 1.0)
            seconds = trial.seconds(candidate)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as reason:  # of what the network does inside
            report.append(f"           {name}: not kept, {one_line(str(reason))[:90]}")
            continue
        right = difference <= most  # NaN is not
        kept = right and seconds < PAYS * took
        why = "" if kept else ": not kept" if right else f": not kept, the outputs are {difference:.1e} apart"
        report.append(f"{1e3 * seconds:9.2f}  {name}{why}")
        if kept:
            best, took, error = candidate, seconds, difference
    report.append(
        f"largest difference {error:.1e} of the largest output"
        if largest
        else "the outputs are all 0, as of a new network: nothing is known of their differences"
    )
    made = _twin(model)
    made.net = best
    made.optimized = "\n".join(report)
    if verbose:
        print(made.optimized)
    return made


def _twin(model: ScoreModel) -> ScoreModel:
    """The same model, to be given another network: a copy has its parts in the same dict."""
    made = copy.copy(model)
    vars(made)["_modules"] = dict(model._modules)
    return made


class _Trial:
    """One batch, and how long a network takes for it."""

    def __init__(self, model: ScoreModel, device: torch.device, count: int, cond: Any) -> None:
        self.model, self.device = _twin(model), device
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, *model.data_shape, generator=generator).to(device)
        process = model.process
        middle = float(round(0.5 * process.T)) if process.discrete else 0.5 * process.T
        self.t = torch.full((count,), max(middle, process.first_time), device=device)
        self.cond = self._cond(count) if cond is None else cond

    def _cond(self, count: int) -> Any:
        given = {}
        if self.model.num_classes:
            given["y"] = torch.zeros(count, dtype=torch.long, device=self.device)
        if self.model.cond_shape:
            given["cond"] = torch.zeros(count, *self.model.cond_shape, device=self.device)
        return given or None if len(given) != 1 else next(iter(given.values()))

    @torch.inference_mode()
    def output(self, net: nn.Module) -> Tensor:
        self.model.net = net
        return self.model(self.x.to(dtype_of(net, torch.float32)), self.t, self.cond).float()

    def seconds(self, net: nn.Module) -> float:
        if self.device.type == "cuda":
            return _seconds(_replayed(self.call(net), self.device), self.device)
        return _seconds(lambda: self.output(net), self.device)

    def call(self, net: nn.Module) -> Callable[[], object]:
        """The network's call within the model's, which may copy the times of a chain from the host, as no graph can."""
        given: list[Any] = []
        hook = net.register_forward_pre_hook(lambda _, *call: given.append(call), with_kwargs=True)
        try:
            self.output(net)
        finally:
            hook.remove()
        args, kwargs = given[0]
        return torch.no_grad()(lambda: net(*args, **kwargs))


def _replayed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The call as a CUDA graph, whose time is the device's alone; itself where it cannot be captured."""
    try:
        (graph,) = capture(call, [call], device)
    except GraphError:
        return call
    return graph.replay  # type: ignore[no-any-return]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The least of several calls, after one that warms up."""
    best, began = float("inf"), time.perf_counter()
    for turn in range(100):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            best = min(best, time.perf_counter() - start)
        if turn >= 3 and time.perf_counter() - began > SECONDS:
            break
    return best


Change = Callable[[nn.Module], "nn.Module | None"]


def _changes(trial: _Trial, precision: str, compile: bool) -> list[tuple[str, Change, float]]:
    """What is tried, in words; what makes a changed network of a network, or None where there is nothing to change; and how far
    apart the outputs may be, of the largest."""
    near = EXACT if trial.device.type == "cpu" else TF32
    on_cpu = trial.device.type == "cpu"
    changes: list[tuple[str, Change, float]] = [("weights scaled once", _scaled_once, near)] * on_cpu
    changes += [
        ("channels_last", _channels_last, near),
        ("1×1 convolutions as products of matrices", _pointwise, near),
    ]
    if on_cpu:
        changes += [("Winograd's convolutions, where they are faster", lambda net: _winograd(net, trial), near)]
    if precision == "bf16":
        changes += [("bfloat16", lambda net: _converted(net, torch.bfloat16), 0.1)]
    if compile:
        changes += [("torch.compile", lambda net: torch.compile(copy.deepcopy(net)), 0.1)]  # type: ignore[list-item]
    return changes


def _channels_last(net: nn.Module) -> nn.Module | None:
    if not any(weight.ndim == 4 for weight in net.parameters()):
        return None
    return copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _converted(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In another precision, and with the layers of its class again, which are of float32."""
    made = copy.deepcopy(net)
    for layer in made.modules():
        if type(layer) is fused.WinogradConv2d:
            layer.__class__ = nn.Conv2d
    return made.to(dtype)


def _pointwise(net: nn.Module) -> nn.Module | None:
    fits = fused.PointwiseConv2d.fits
    return _changed(net, lambda layer: fused.PointwiseConv2d if type(layer) is nn.Conv2d and fits(layer) else None)


def _scaled_once(net: nn.Module) -> nn.Module | None:
    return _changed(net, lambda layer: layer.scaled_once() if hasattr(type(layer), "scaled_once") else None)


def _changed(net: nn.Module, faster: Callable[[nn.Module], type[nn.Module] | None]) -> nn.Module | None:
    """A copy whose layers have the classes that `faster` gives for them; None where there is none."""
    kinds = {name: kind for name, layer in net.named_modules() if (kind := faster(layer)) is not None}
    if not kinds:
        return None
    made = copy.deepcopy(net)
    for name, kind in kinds.items():
        made.get_submodule(name).__class__ = kind
    return made


def _by_winograd(layer: nn.Module) -> type[nn.Module] | None:
    """A layer's class with Winograd's convolution."""
    if not cpu.available:
        return None
    if type(layer) is nn.Conv2d:
        return fused.WinogradConv2d if fused.WinogradConv2d.fits(layer) else None
    return layer.winograd() if isinstance(layer, fused.Keeps) else None


def _winograd(net: nn.Module, trial: _Trial) -> nn.Module | None:
    """Each of the layers that are faster so, on what the network gives it."""
    inputs: dict[nn.Module, Tensor] = {}
    layers = [layer for layer in net.modules() if _by_winograd(layer) is not None]

    def see(layer: nn.Module, given: tuple[Any, ...]) -> None:
        if given:
            inputs.setdefault(layer, given[0])

    hooks = [layer.register_forward_pre_hook(see) for layer in layers]
    try:
        trial.output(net)
    finally:
        for hook in hooks:
            hook.remove()
    faster: dict[tuple[object, ...], bool] = {}
    kind_of = lambda layer, x: (type(layer), tuple(x.shape), len(layer.weight), x.stride())  # noqa: E731
    for layer, x in inputs.items():
        kind = kind_of(layer, x)
        if kind not in faster:
            other = copy.deepcopy(layer)
            other.__class__ = _by_winograd(layer)  # type: ignore[assignment]
            with torch.inference_mode():
                pair = [_seconds(lambda f=f, x=x: f(x), trial.device) for f in (other, layer)]  # type: ignore[misc]
            faster[kind] = pair[0] < PAYS * pair[1]
    chosen = {id(layer) for layer, x in inputs.items() if faster[kind_of(layer, x)]}
    return _changed(net, lambda layer: _by_winograd(layer) if id(layer) in chosen else None)
