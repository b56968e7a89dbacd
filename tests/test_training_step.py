"""A step of training against plain PyTorch: optimisers, rates, clipping, parts, precision, averages; and their resumption."""

from __future__ import annotations

import functools
import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff import losses
from fastdiff.errors import CheckpointError, CheckpointMismatchError, ConfigError, DataError
from fastdiff.networks import MLP, UNet
from fastdiff.training import averages, checkpoint, optimisers
from fastdiff.training.batches import Batches
from fastdiff.training.objective import Objective

# an average that is the last weights
LAST = {"ema": 0.0}
HAS_MUON = hasattr(torch.optim, "Muon")
schedulers = torch.optim.lr_scheduler


def tiny(net=None):
    torch.manual_seed(0)
    return fastdiff.ScoreModel(net or MLP((2,), hidden=16, layers=1), "vp", data_shape=(2,), data_range=(-5, 5))


def points(n=64):
    rng = np.random.default_rng(0)
    return fastdiff.Data(torch.from_numpy(rng.normal(size=(n, 2)).astype(np.float32)), range=(-5.0, 5.0))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.net.parameters()])


def by_hand(model, data, optimizer, *, steps, lr=None, warmup=1, clip=1.0, batch_size=8, after=lambda: None):
    """A plain loop over the same batches; `optimizer(parameters)` gives one of torch's, or several."""
    made = optimizer([p for p in model.net.parameters() if p.requires_grad])
    made = made if isinstance(made, list) else [made]
    objective = Objective.of(model, data, False, "dsm", None, "stratified", "hard", None, 0.001)
    batches = Batches(data, model, objective, {"seed": 0, "batch_size": batch_size, "dequantize": False})
    base = [group["lr"] for one in made for group in one.param_groups]
    for step in range(steps):
        batch = batches(step)
        for p in model.net.parameters():
            p.grad = None
        losses.per_sample(model, batch.x0, batch.drawn.t, batch.cursor, "dsm", batch.cond).mean().backward()
        nn.utils.clip_grad_norm_(model.net.parameters(), clip)
        for rate, group in zip(base, [group for one in made for group in one.param_groups]):
            group["lr"] = (lr or rate) * min(1.0, (step + 1) / warmup)
        for one in made:
            one.step()
        after()
    return model


def muon(parameters):
    matrices = [p for p in parameters if p.ndim == 2]
    return [
        torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in parameters if p.ndim != 2], fused=True),
    ]


def two_groups(parameters):
    matrices, rest = ([p for p in parameters if (p.ndim > 1) == big] for big in (True, False))
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": rest, "weight_decay": 0.0, "lr": 2e-2}], lr=1e-2, betas=(0.8, 0.9)
    )


NAMED = {
    "adam": functools.partial(torch.optim.Adam, fused=True),
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "radam": torch.optim.RAdam,
    "sgd": functools.partial(torch.optim.SGD, fused=True),
    **({"muon": muon} if HAS_MUON else {}),
}
OWN = {
    "a class": torch.optim.NAdam,
    "two groups": two_groups,
    "momentum": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "Adafactor": functools.partial(torch.optim.Adafactor, lr=1e-2),
    "amsgrad": functools.partial(torch.optim.Adam, lr=1e-2, amsgrad=True),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("clip", [1e-7, 0.05, 100.0])
def test_a_named_optimiser_is_torchs(name, clip):
    fastdiff.train(
        model := tiny(), points(), steps=6, batch_size=8, lr=1e-2, warmup=4, grad_clip=clip, optimizer=name, **LAST
    )
    plain = by_hand(tiny(), points(), NAMED[name], steps=6, lr=1e-2, warmup=4, clip=clip)
    if name in ("adam", "adamw"):  # whose pass is fastdiff's own (tests/test_cpu.py), with roundings of its own
        torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(weights(model), weights(plain))


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_an_optimiser_of_ones_own_has_its_options_and_rates(own):
    fastdiff.train(model := tiny(), points(), steps=6, batch_size=8, warmup=4, optimizer=own, **LAST)
    assert torch.equal(weights(model), weights(by_hand(tiny(), points(), own, steps=6, warmup=4)))


def test_fused_adam_is_the_printed_one_but_for_roundings():
    """Kingma & Ba 2015, Algorithm 1, as torch's plain loop has it: six steps of at most 0.01 each, rounded some ten times."""
    fastdiff.train(model := tiny(), points(), steps=6, batch_size=8, lr=1e-2, warmup=1, **LAST)
    plain = by_hand(tiny(), points(), functools.partial(torch.optim.Adam, foreach=False), steps=6, lr=1e-2)
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)


class Laid(nn.Module):
    """Weights that do not lie in memory row by row, one of them with gaps, and gradients that do not lie as they do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(2, 8).t().contiguous().t())
        self.second = nn.Parameter(torch.randn(8, 2, 2)[..., 0])
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x, t):
        return torch.tanh(x @ self.first) @ self.second + self.shift


@pytest.mark.parametrize("gaps", [False, True])
def test_weights_and_gradients_that_lie_otherwise_in_memory(gaps, tmp_path):
    """torch's fused kernels do not look at strides."""

    def made():
        net = Laid()
        if not gaps:
            net.second = nn.Parameter(net.second.detach().clone())
        for p in (net.first, net.second):
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.t().contiguous().t()))
        return tiny(net)

    options = {"batch_size": 8, "lr": 1e-2, "warmup": 1, **LAST}
    fastdiff.train(model := made(), points(), steps=6, **options)
    plain = by_hand(made(), points(), functools.partial(torch.optim.Adam, foreach=False), steps=6, lr=1e-2)
    torch.testing.assert_close(weights(model), weights(plain), rtol=1e-5, atol=1e-6)
    for steps in (3, 6):  # moments come back as they lay
        fastdiff.train(parts := made(), points(), steps=steps, checkpoint=tmp_path, **options)
    assert torch.equal(weights(parts), weights(model))


class Sometimes(MLP):
    """A network whose last layer has a gradient in every second call, and a weight that never has one."""

    def __init__(self):
        super().__init__((2,), hidden=16, layers=1)
        self.calls, self.unused = 0, nn.Parameter(torch.ones(3))

    def forward(self, x, t, y=None):
        self.calls += self.training
        out = super().forward(x, t)
        return out if self.calls % 2 else self.out.weight.detach()[:, :2].sum() * 0 + x * self.hidden[0].bias.mean()


def test_weights_without_a_gradient_stay_as_they_are(tmp_path):
    def made():
        torch.manual_seed(0)
        return tiny(Sometimes())

    options = {"batch_size": 8, "lr": 1e-2, "warmup": 1, **LAST}
    fastdiff.train(model := made(), points(), steps=6, **options)
    plain = by_hand(made().train(), points(), functools.partial(torch.optim.Adam, fused=True), steps=6, lr=1e-2)
    assert torch.equal(weights(model), weights(plain))
    assert torch.equal(model.net.unused, torch.ones(3))
    fastdiff.train(made(), points(), steps=4, checkpoint=tmp_path, **options)
    fastdiff.train(parts := made(), points(), steps=6, checkpoint=tmp_path, **options)
    assert torch.equal(weights(parts), weights(model))


# --- rates -----------------------------------------------------------------------------------------------------------


class Noting(torch.optim.SGD):
    """Notes the rates of its steps."""

    seen: list[float]

    def step(self, closure=None):
        self.seen.append(self.param_groups[0]["lr"])
        return super().step(closure)


def rates(**options):
    seen = Noting.seen = []
    fastdiff.train(tiny(), points(), batch_size=8, optimizer=functools.partial(Noting, lr=0.1), **options)
    return seen


SHAPES = {
    "constant": lambda n: 1.0,
    "cosine": lambda n: 0.5 * (1 + math.cos(math.pi * n / 9)),
    "linear": lambda n: 1 - n / 9,
    "inverse_sqrt": lambda n: 1 / math.sqrt(max(n, 3) / 3),
}


@pytest.mark.parametrize("name", SHAPES)
def test_rates_are_their_formulas(name):
    expected = [0.1 * min(1, (n + 1) / 3) * SHAPES[name](n) for n in range(9)]
    assert rates(steps=9, warmup=3, schedule=name) == pytest.approx(expected, rel=1e-12)
    if name == "cosine":
        assert rates(steps=9, warmup=3, decay=True) == rates(steps=9, warmup=3, schedule=name)


def test_a_scheduler_of_torchs_is_followed_and_warmed_up():
    def halving(optimizer):
        return schedulers.StepLR(optimizer, 2, 0.5)

    assert rates(steps=6, warmup=0, schedule=halving) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])
    warmed = [0.1 / 4, 0.1 * 2 / 4, 0.05 * 3 / 4, 0.05, 0.025, 0.025]
    assert rates(steps=6, warmup=4, schedule=halving) == pytest.approx(warmed)


# --- parts of a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_a_batch_in_parts_is_one_batch(parts):
    """The same samples, times and noise: the sums differ by the order of additions."""
    options = {"steps": 5, "batch_size": 12, "lr": 1e-2, "warmup": 1}
    one = fastdiff.train(whole := tiny(), points(), **options)
    many = fastdiff.train(model := tiny(), points(), accumulate=parts, **options)
    torch.testing.assert_close(weights(model), weights(whole), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(many.loss, one.loss, rtol=1e-5, atol=0)


def test_a_bad_part_spoils_the_step_and_nothing_else():
    class Broken(MLP):
        calls = 0

        def forward(self, x, t, y=None):
            self.calls += 1
            return super().forward(x, t) * (math.nan if self.calls == 4 else 1.0)

    torch.manual_seed(0)
    model = tiny(Broken((2,), hidden=16, layers=1))
    with pytest.warns(UserWarning, match="not finite at step 1"):
        done = fastdiff.train(model, points(), steps=3, batch_size=8, accumulate=2)
    assert done.loss.isfinite().tolist() == [True, False, True]
    assert weights(model).isfinite().all()


def test_a_bad_step_may_end_the_run():
    class Broken(MLP):
        calls = 0

        def forward(self, x, t, y=None):
            self.calls += 1
            return super().forward(x, t) * (math.nan if self.calls == 3 else 1.0)

    torch.manual_seed(0)
    model = tiny(Broken((2,), hidden=16, layers=1))
    with pytest.raises(DataError, match="not finite at step 2: lower lr"):
        fastdiff.train(model, points(), steps=9, batch_size=8, bad_step="raise")
    assert weights(model).isfinite().all()


# --- precision -------------------------------------------------------------------------------------------------------


# float16 leaves out the steps by which it finds its factor
@pytest.mark.parametrize(("precision", "apart"), [("bf16", 0.1), ("fp16", 0.2)])
def test_half_precision_trains_float32_weights_towards_the_same(precision, apart):
    seen = set()
    options = {"steps": 60, "batch_size": 8, "lr": 1e-2, "warmup": 1}
    fastdiff.train(single := tiny(), points(), **options)
    model = tiny()
    model.net.hidden[0].register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    fastdiff.train(model, points(), precision=precision, **options)
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    assert {p.dtype for p in model.net.parameters()} == {torch.float32}
    moved = weights(single) - weights(tiny())
    assert (weights(model) - weights(single)).norm() < apart * moved.norm()


@pytest.mark.parametrize(("capability", "count"), [("AVX2", 1), ("AVX512", 0)])
def test_a_processor_that_emulates_half_precision_is_named(monkeypatch, recwarn, capability, count):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    fastdiff.train(tiny(), points(), steps=1, batch_size=8, precision="bf16")
    assert [str(w.message).startswith("precision='bf16' is emulated") for w in recwarn] == [True] * count


def overflowing(bad):
    """A network whose gradient overflows in some of its steps."""
    model = tiny()
    calls = iter(range(1000))
    model.net.out.weight.register_hook(lambda gradient: gradient * math.inf if next(calls) in bad else gradient)
    return model


def test_an_overflow_is_no_bad_step_and_halves_the_factor(tmp_path, recwarn):
    options = {"batch_size": 8, "lr": 1e-2, "warmup": 1, "precision": "fp16", "checkpoint": tmp_path}
    model = overflowing({1, 2})
    before = []
    model.net.register_forward_pre_hook(lambda *_: before.append(weights(model)))
    done = fastdiff.train(model, points(), steps=5, **options)
    assert not [w for w in recwarn if "not finite" in str(w.message)]
    assert (done.skipped, bool(done.loss.isfinite().all())) == (0, True)
    assert torch.equal(before[1], before[2])
    assert torch.equal(before[2], before[3])
    assert not torch.equal(before[3], before[4])
    header, tensors = checkpoint.read(tmp_path / checkpoint.FILE, "optimizer.")
    assert header["scaler"] == {"scale": 2.0**14, "good": 2}
    assert float(tensors["0.step"]) == 3


@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "torch"])
@pytest.mark.parametrize("grad_clip", [1.0, None])
def test_a_gradient_whose_square_overflows_is_skipped(tmp_path, monkeypatch, grad_clip, one_pass):
    """It is finite, and its second moment would be infinite ever after."""
    if not one_pass:
        monkeypatch.setattr(optimisers, "on_cpu_alike", lambda weights: False)
    options = {"batch_size": 8, "lr": 1e-2, "warmup": 1, "grad_clip": grad_clip, "checkpoint": tmp_path}
    model = tiny()
    calls = iter(range(1000))
    model.net.out.weight.register_hook(lambda gradient: gradient * 1e25 if next(calls) == 1 else gradient)
    with pytest.warns(UserWarning, match="not finite at step 1"):
        done = fastdiff.train(model, points(), steps=3, **options)
    assert done.skipped == 1
    assert all(bool(v.isfinite().all()) for v in checkpoint.read(tmp_path / checkpoint.FILE, "")[1].values())
    assert fastdiff.train(tiny(), points(), steps=4, **options).steps == 4


def test_a_gradient_that_always_overflows_is_a_bad_one():
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(DataError, match="not finite at step 15 and the 9 after"),
    ):
        fastdiff.train(overflowing(range(1000)), points(), steps=100, batch_size=8, precision="fp16")


def test_the_factor_changes_no_bits():
    """A power of two: gradients are those without it, where nothing is rounded to float16."""

    class Plain(MLP):
        def forward(self, x, t, y=None):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x, t)

    torch.manual_seed(0)
    fastdiff.train(one := tiny(Plain((2,), hidden=16, layers=1)), points(), steps=5, batch_size=8)
    torch.manual_seed(0)
    fastdiff.train(two := tiny(Plain((2,), hidden=16, layers=1)), points(), steps=5, batch_size=8, precision="fp16")
    assert torch.equal(weights(one), weights(two))


def test_a_compiled_training_is_a_plain_one(tmp_path, monkeypatch):
    compiled = []

    def compile(self):
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile)
    fastdiff.train(plain := tiny(), points(), steps=4, batch_size=8)
    fastdiff.train(model := tiny(), points(), steps=4, batch_size=8, compile=True, checkpoint=tmp_path)
    assert compiled == [model.net]
    assert model.net._compiled_call_impl is None
    assert torch.equal(weights(model), weights(plain))
    assert torch.equal(weights(fastdiff.load(tmp_path)), weights(plain))


# --- resumption ------------------------------------------------------------------------------------------------------

RUNS = {
    **{name: {"optimizer": name, "lr": 1e-2} for name in NAMED},
    **{name: {"optimizer": own} for name, own in OWN.items()},
    "scheduler": {"lr": 1e-2, "schedule": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3)},
    "several schedulers": {
        "lr": 1e-2,
        "schedule": lambda o: schedulers.SequentialLR(
            o, [schedulers.LinearLR(o, total_iters=4), schedulers.ExponentialLR(o, 0.9)], [4]
        ),
    },
    "one that moves the moments": {"lr": 1e-2, "schedule": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=20)},
    "linear": {"lr": 1e-2, "schedule": "linear"},
    "accumulation": {"accumulate": 4},
    "float16": {"precision": "fp16", "lr": 1e-2},
    "averages": {"ema": (0.9, 0.5), "posthoc": True, "ema_rule": "constant"},
}


def contents(folder):
    return {path.name: checkpoint.read(path, "") for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    """Of every file the description and all tensors."""
    options = {"batch_size": 8, "warmup": 3, "checkpoint_every": 4, **run}
    fastdiff.train(tiny(), points(), steps=8, checkpoint=tmp_path / "whole", **options)
    answers = iter([False, False, True])
    model = overflowing(()) if "precision" in run else tiny()
    fastdiff.train(model, points(), steps=8, checkpoint=tmp_path / "parts", stop=lambda: next(answers), **options)
    fastdiff.train(tiny(), points(), steps=8, checkpoint=tmp_path / "parts", **options)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for (header, tensors), (other, others) in zip(whole.values(), parts.values()):
        assert header == other
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)


CHANGED = {
    "optimizer='adamw'": {"optimizer": "adamw"},
    "optimizer='nadam'": {"optimizer": torch.optim.NAdam, "lr": None},
    "another betas": {"optimizer": functools.partial(optimisers.Adam, betas=(0.5, 0.9), fused=True), "lr": None},
    "schedule='linear'": {"schedule": "linear"},
    "lacks the average ema1": {"ema": (0.999, 0.9)},
    "posthoc=True": {"posthoc": True},
}


@pytest.mark.parametrize("words", CHANGED)
def test_a_resume_with_another_optimiser_is_refused(words, tmp_path):
    options = {"batch_size": 8, "lr": 1e-2, "checkpoint": tmp_path}
    fastdiff.train(tiny(), points(), steps=2, **options)
    model = tiny()
    before = weights(model)
    match = words if words.startswith(("lacks", "another")) else f"now {words.partition('=')[2]}"
    with pytest.raises(CheckpointMismatchError, match=match):
        fastdiff.train(model, points(), steps=4, **{**options, **CHANGED[words]})
    assert torch.equal(weights(model), before)


class Global(torch.optim.SGD):
    def step(self, closure=None):
        self.state["all"] = {"n": 1}
        return super().step(closure)


REFUSED = {
    "optimizer must be one of": {"optimizer": "adagard"},
    "optimizer must return a torch.optim.Optimizer": {"optimizer": lambda params: None},
    "optimizer must hold each of the 8 parameters": {"optimizer": lambda params: torch.optim.SGD(params[1:], lr=0.1)},
    "without a closure": {"optimizer": torch.optim.LBFGS},
    "must be left out with an optimizer of your own": {"optimizer": torch.optim.SGD, "lr": 0.1},
    "schedule must be one of": {"schedule": "cosin"},
    "schedule must return one of torch": {"schedule": lambda optimizer: 3},
    "without a metric": {"schedule": schedulers.ReduceLROnPlateau},
    "is schedule='cosine', got schedule='linear'": {"decay": True, "schedule": "linear"},
    "batch_size must be a multiple of accumulate=3": {"accumulate": 3},
    "precision must be one of": {"precision": "fp8"},
    "bad_step must be one of": {"bad_step": "ignore"},
    "ema must be a number, or several that differ": {"ema": (0.9, 0.9)},
    "posthoc=True must have a directory": {"posthoc": True},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_no_step_could_do_is_refused_before_the_first(words):
    model = tiny()
    model.net.register_forward_hook(lambda *_: pytest.fail("a step was made"))
    with pytest.raises(ConfigError, match=words):
        fastdiff.train(model, points(), steps=2, batch_size=8, **REFUSED[words])


def test_what_no_checkpoint_could_hold_is_refused_before_the_first_step(tmp_path):
    model = tiny()
    model.net.register_forward_hook(lambda *_: pytest.fail("a step was made"))

    def unsaveable(optimizer):
        scheduler = schedulers.StepLR(optimizer, 2)
        scheduler.extra = object()
        return scheduler

    options = {"batch_size": 8, "checkpoint": tmp_path}
    with pytest.raises(ConfigError, match="schedule must keep its state in tensors, numbers and strings"):
        fastdiff.train(model, points(), steps=2, schedule=unsaveable, **options)
    with pytest.raises(ConfigError, match="optimizer must keep its state by parameter"):
        fastdiff.train(tiny(), points(), steps=2, optimizer=functools.partial(Global, lr=0.1), **options)


# --- averages --------------------------------------------------------------------------------------------------------


def trajectory(**options):
    """The weights after each step of a training."""
    model, seen = tiny(), []
    model.net.register_forward_pre_hook(lambda *_: seen.append(weights(model).double()))
    raw = tiny()
    by_hand(
        raw,
        points(),
        NAMED["adam"],
        steps=options["steps"],
        lr=options["lr"],
        after=lambda: seen.append(weights(raw).double()),
    )
    return seen


def test_averages_are_their_recursions(tmp_path):
    options = {"steps": 12, "lr": 1e-2}
    path = trajectory(**options)
    fastdiff.train(
        model := tiny(), points(), batch_size=8, warmup=1, checkpoint=tmp_path, ema=[0.9, 0.6], ema_rule="constant", posthoc=True,
        **options,
    )  # fmt: skip
    for rate in (0.9, 0.6):
        average = weights(tiny()).double()
        for theta in path:
            average = rate * average + (1 - rate) * theta
        loaded = weights(fastdiff.load(tmp_path, ema=rate)).double()
        torch.testing.assert_close(loaded, average, rtol=0, atol=1e-6)
    assert torch.equal(weights(fastdiff.load(tmp_path)), weights(fastdiff.load(tmp_path, ema=0.9)))
    assert torch.equal(weights(model), weights(fastdiff.load(tmp_path)))
    with pytest.raises(ConfigError, match=r"ema must be the rate of an average.*got 0.5: its averages are of 0.9, 0.6"):
        fastdiff.load(tmp_path, ema=0.5)
    # ∫ τ^γ θ by the sum whose weights are those of the recursion m = (1 − 1/t)^(γ + 1): (t/T)^(γ + 1) − ((t − 1)/T)^(γ + 1)
    _, tensors = checkpoint.read(tmp_path / checkpoint.FILE, "")
    for k, width in enumerate(averages.SIGMA_REL):
        edges = (np.arange(13) / 12) ** (averages.gamma_of(width) + 1)
        direct = sum(w * theta for w, theta in zip(np.diff(edges), path))
        part = checkpoint.of_part(tensors, f"power{k}")
        found = torch.cat([part[name].flatten() for name, _ in model.net.named_parameters()]).double()
        torch.testing.assert_close(found, direct, rtol=0, atol=1e-6)


def test_the_width_of_a_power_function_is_its_standard_deviation():
    """Of the density (γ + 1) τ^γ on [0, 1]: mean (γ + 1)/(γ + 2), second moment (γ + 1)/(γ + 3)."""
    for width in (0.02, 0.05, 0.1, 0.25, averages.WIDEST):
        g = averages.gamma_of(width)
        assert math.sqrt((g + 1) / (g + 3) - ((g + 1) / (g + 2)) ** 2) == pytest.approx(width, rel=1e-9)
    assert averages.gamma_of(averages.WIDEST) == pytest.approx(0, abs=1e-6)


def test_inner_products_of_profiles_are_their_integrals():
    tau = (np.arange(200_000) + 0.5) / 200_000 * 7.0
    for t_a, g_a, t_b, g_b in ((3.0, 2.0, 7.0, 5.0), (7.0, 1.5, 3.0, 6.0), (4.0, 3.0, 4.0, 9.0)):
        profiles = [(g + 1) * tau**g / t ** (g + 1) * (tau <= t) for t, g in ((t_a, g_a), (t_b, g_b))]
        assert averages._product(t_a, g_a, t_b, g_b) == pytest.approx((profiles[0] * profiles[1]).mean() * 7, rel=1e-4)


def test_a_combination_is_exact_for_what_it_is_made_of():
    t, gamma = np.repeat(np.arange(1.0, 9) * 500, 2), np.tile([averages.gamma_of(s) for s in averages.SIGMA_REL], 8)
    for k in (0, 5, 15):
        expected = np.zeros(16)
        expected[k] = 1
        assert averages.combination(t, gamma, t[k], gamma[k]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("width", [0.03, 0.07, 0.15, 0.25])
def test_a_combination_comes_near_the_direct_average(width):
    """Of a smooth way with noise of 1 % on it, 4000 steps and 16 snapshots: within 2 % of how far the way goes."""
    steps, rng = 4000, np.random.default_rng(0)
    s = (np.arange(steps) + 1) / steps
    way = np.stack([1 - np.exp(-5 * s), np.sin(6 * s), s**0.5], 1) + 0.01 * rng.normal(size=(steps, 3))

    def direct(end, gamma):
        return np.diff((np.arange(end + 1) / end) ** (gamma + 1)) @ way[:end]

    places = [(end, averages.gamma_of(sigma)) for end in range(250, steps + 1, 250) for sigma in averages.SIGMA_REL]
    t, gamma = (np.array(column, dtype=np.float64) for column in zip(*places))
    factors = averages.combination(t, gamma, steps, averages.gamma_of(width))
    found = factors @ np.stack([direct(int(end), g) for end, g in places])
    assert np.abs(found - direct(steps, averages.gamma_of(width))).max() < 0.02
    assert np.abs(factors).sum() < 100  # roundings of the snapshots are not made much larger


def test_a_run_that_ends_between_a_snapshot_and_its_checkpoint_makes_both_again(tmp_path, monkeypatch):
    """Whichever is written first, a run that goes on has the snapshots of an unbroken one."""
    how = {"batch_size": 8, "warmup": 1, "posthoc": True, "checkpoint_every": 4, "steps": 8}
    fastdiff.train(tiny(), points(), checkpoint=tmp_path / "whole", **how)
    written = checkpoint.write

    for seen in (0, 1):  # files of step 8 that are whole
        count, folder = [0], tmp_path / f"{seen}"

        def killed(path, tensors, header, count=count, seen=seen):
            if header["step"] == 8:
                count[0] += 1
                if count[0] > seen:
                    raise KeyboardInterrupt
            return written(path, tensors, header)

        monkeypatch.setattr(checkpoint, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            fastdiff.train(tiny(), points(), checkpoint=folder, **how)
        monkeypatch.setattr(checkpoint, "write", written)
        fastdiff.train(tiny(), points(), checkpoint=folder, **how)
        assert list(averages.snapshots(folder)) == [4, 8]
        a, b = (weights(fastdiff.posthoc_ema(each, 0.1)) for each in (folder, tmp_path / "whole"))
        assert torch.equal(a, b)


def test_averages_are_chosen_after_the_training(tmp_path):
    options = {"steps": 60, "lr": 1e-2}
    path = trajectory(**options)
    how = {"batch_size": 8, "warmup": 1, "checkpoint": tmp_path, "posthoc": True, **options}
    fastdiff.train(tiny(), points(), checkpoint_every=4, **how)
    _, tensors = checkpoint.read(tmp_path / checkpoint.FILE, "")
    for k, width in enumerate(averages.SIGMA_REL):
        model = fastdiff.posthoc_ema(tmp_path, width)
        part = checkpoint.of_part(tensors, f"power{k}")
        for name, p in model.net.named_parameters():
            torch.testing.assert_close(p.detach(), part[name], rtol=0, atol=1e-5)
    moved = (path[-1] - path[0]).norm()
    for width, end in ((0.07, 60), (0.15, 60), (0.1, 40)):
        direct = sum(w * x for w, x in zip(np.diff((np.arange(end + 1) / end) ** (averages.gamma_of(width) + 1)), path))
        found = weights(fastdiff.posthoc_ema(tmp_path, width, step=end)).double()
        assert (found - direct).norm() < 0.02 * moved
    assert fastdiff.sample(model, steps=3, num_samples=2).isfinite().all()
    with pytest.raises(ConfigError, match="step must be that of a snapshot, 4, 8, 12, …, 56, 60, got 7"):
        fastdiff.posthoc_ema(tmp_path, 0.1, step=7)
    with pytest.raises(ConfigError, match="sigma_rel"):
        fastdiff.posthoc_ema(tmp_path, 0.3)
    fastdiff.train(
        tiny(), points(), **{**how, "steps": 2, "resume": False, "seed": 1}
    )  # another run drops what was of the first
    assert list(averages.snapshots(tmp_path)) == [2]
    with pytest.raises(CheckpointError, match="no snapshots"):
        fastdiff.posthoc_ema(tmp_path / "none", 0.1)


def test_snapshots_of_two_trainings_are_not_mixed(tmp_path):
    how = {"batch_size": 8, "posthoc": True, "checkpoint_every": 2}
    for seed in (0, 1):
        fastdiff.train(tiny(), points(), steps=4, seed=seed, checkpoint=tmp_path / str(seed), **how)
    os.replace(tmp_path / "1" / averages.SNAPSHOT.format(2), tmp_path / "0" / averages.SNAPSHOT.format(2))
    with pytest.raises(CheckpointMismatchError, match="snapshots of several trainings"):
        fastdiff.posthoc_ema(tmp_path / "0", 0.1)


def test_averages_leave_buffers_and_frozen_weights_as_they_are(tmp_path):
    """Running statistics are the last ones', and a frozen weight itself, not a sum of factors of it."""

    def made():
        torch.manual_seed(0)
        net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
        net[1].bias.requires_grad_(False)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.parts = net

            def forward(self, x, t):
                return self.parts(x)

        return Net()

    options = {"batch_size": 8, "posthoc": True, "checkpoint_every": 2, "ema": (0.9, 0.5), "ema_rule": "constant"}
    options |= {"lr": 1e-2, "warmup": 1}
    fastdiff.train(model := tiny(made()), points(), steps=6, checkpoint=tmp_path, **options)
    for other in (fastdiff.posthoc_ema(tmp_path, 0.07, net=made()), fastdiff.load(tmp_path, ema=0.5, net=made())):
        assert torch.equal(other.net.parts[1].bias, model.net.parts[1].bias)
        assert torch.equal(other.net.parts[0].running_var, model.net.parts[0].running_var)
        assert not torch.equal(other.net.parts[1].weight, model.net.parts[1].weight)


def test_half_precision_networks_have_all_of_it(tmp_path):
    """The averages are float32 in the file, the network that is loaded is of its own precision."""

    def made():
        model = tiny()
        model.net = model.net.bfloat16()
        return model

    options = {"batch_size": 8, "lr": 1e-2, "warmup": 1, "ema": (0.9, 0.5), "posthoc": True, "checkpoint_every": 2}
    fastdiff.train(made(), points(), steps=6, checkpoint=tmp_path, **options)
    header, tensors = checkpoint.read(tmp_path / checkpoint.FILE, "ema1.")
    assert json.loads(json.dumps(header["options"]["ema"])) == [0.9, 0.5]
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    for model in (fastdiff.load(tmp_path, ema=0.5), fastdiff.posthoc_ema(tmp_path, 0.1)):
        assert {p.dtype for p in model.net.parameters()} == {torch.bfloat16}


def test_a_network_in_channels_last_trains_as_itself():
    images = fastdiff.Data(torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), range=(0.0, 1.0))

    def made(layout):
        torch.manual_seed(0)
        net = UNet((1, 8, 8), channels=8, blocks=1).to(memory_format=layout)
        return fastdiff.ScoreModel(net, "vp", data_shape=(1, 8, 8))

    options = {"steps": 4, "batch_size": 4, "lr": 1e-3, "warmup": 1}
    fastdiff.train(one := made(torch.contiguous_format), images, **options)
    fastdiff.train(two := made(torch.channels_last), images, **options)
    torch.testing.assert_close(weights(two), weights(one), rtol=1e-3, atol=1e-5)
