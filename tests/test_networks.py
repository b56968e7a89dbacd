"""The networks: any shape, no cross-talk between samples, a config that rebuilds them, and refusals that help."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdiff
import fastdiff.errors as errors
from fastdiff import networks, probability_flow, runs
from fastdiff.networks import MLP, MODELS, TimeEmbedding, Transformer, UNet, build, describe

SHAPES = [(1, 8), (2, 13), (3, 1), (1, 8, 8), (3, 7, 10), (5, 1, 6), (2, 1, 1), (1, 2, 3, 5), (2, 4, 1, 7)]


def awake(net: nn.Module) -> nn.Module:
    """The network with its zero-initialised layers drawn at random, so that its output depends on everything."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return net


def inputs(shape: tuple[int, ...], batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *shape, generator=generator, dtype=dtype)
    return x, torch.rand(batch, generator=generator, dtype=dtype)


SIZES = {
    "unet": {"channels": 8, "blocks": 1},
    "mlp": {"hidden": 16, "layers": 2},
    "paper_unet": {"channels": 8, "blocks": 1, "multipliers": (1,), "attention": (), "time_channels": 64},
    "dit": {"patch": 1, "hidden": 16, "layers": 2, "heads": 2},
    "transformer": {"hidden": 16, "layers": 2, "heads": 2},
    "linear_attention_unet": {"channels": 8, "multipliers": (1,), "heads": 2, "head_channels": 4, "time_channels": 64},
    "mp_unet": {"channels": 8, "blocks": 1, "multipliers": (1,), "attention": (), "time_channels": 64},
}


def small(name: str, shape: tuple[int, ...] = (2, 5, 4), **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return awake(MODELS[name](shape, **{**SIZES[name], **kwargs}))


both = pytest.mark.parametrize("name", SIZES)  # of which each takes labels, and embeds the time


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multipliers", [(1,), (1, 2, 3)])
def test_unet_returns_the_samples_shape(shape, multipliers):
    torch.manual_seed(0)
    net = awake(UNet(shape, channels=4, multipliers=multipliers, blocks=1, attention=(len(multipliers) - 1,)))
    out = net(*inputs(shape))
    assert out.shape == (3, *shape)
    assert (torch.isfinite(out) & (out != 0)).all()


@pytest.mark.parametrize("shape", [(1,), (7,), *SHAPES])
def test_mlp_returns_the_samples_shape(shape):
    x, t = inputs(shape)
    assert MLP(shape, hidden=8)(x, t).shape == x.shape


def test_a_new_network_returns_zeros_of_as_many_channels_as_asked():
    x, t = inputs((2, 5, 4))
    nets = {2: UNet((2, 5, 4)), 3: UNet((2, 5, 4), out_channels=3), 4: MLP((2, 5, 4), out_channels=4)}
    for channels, net in nets.items():
        assert torch.equal(net(x, t), torch.zeros(3, channels, 5, 4))


@both
def test_an_empty_batch_is_a_batch(name):
    net = small(name, num_classes=2, **({"attention": (0, 1)} if name == "unet" else {}))
    assert net(torch.empty(0, 2, 5, 4), torch.empty(0)).shape == (0, 2, 5, 4)


@both
def test_time_and_labels_matter(name):
    net = small(name, num_classes=3)
    x, t = inputs((2, 5, 4), batch=4)
    out = net(x, t, torch.arange(4))
    assert not torch.allclose(net(x, t + 0.1, torch.arange(4)), out)
    assert torch.equal(net(x, t, torch.full((4,), 3)), net(x, t)), "num_classes and None both mean no label"
    assert torch.equal(net(x, t, torch.arange(4, dtype=torch.uint8)), out)
    same = net(x[:1].expand(4, -1, -1, -1), t[:1].expand(4), torch.arange(4))
    assert all(not torch.allclose(same[i], same[j]) for i in range(4) for j in range(i))


@both
@pytest.mark.parametrize("attention", [(), (0, 1)])
def test_samples_do_not_see_each_other(name, attention):
    net = small(name, num_classes=2, **({"attention": attention} if name == "unet" else {})).double()
    x, t = inputs((2, 5, 4), dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    out = net(x, t, y)
    for i in range(3):
        torch.testing.assert_close(net(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], out[i], rtol=1e-12, atol=1e-12)
    spoilt = x.clone()
    spoilt[1] = math.nan
    torch.testing.assert_close(net(spoilt, t, y)[[0, 2]], out[[0, 2]], rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("kind", ["sinusoidal", "fourier"])
def test_every_parameter_gets_a_gradient(name, kind):
    extra = {"attention": (0,)} if name == "unet" else {}
    net = small(name, num_classes=2, time_embedding=kind, dropout=0.1, **extra)
    x, t = inputs((2, 5, 4))
    net(x, t, torch.tensor([0, 1, 2])).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_attention_is_that_of_the_paper():
    torch.manual_seed(0)
    net = awake(UNet((1, 5), channels=8, multipliers=(1,), blocks=1, attention=(0,))).double()
    layer = net.down[0][1].attend
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    q, k, v = layer.qkv(layer.norm(x)).chunk(3, dim=1)
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / math.sqrt(8), dim=-1)
    expected = (x + layer.project(torch.einsum("bnm,bcm->bcn", weights, v))) / math.sqrt(2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_the_residual_block_is_its_equation():
    torch.manual_seed(0)
    block = awake(UNet((1, 6, 5), channels=12, blocks=1)).double().up[-1][1]
    x, scale, shift = (torch.randn(3, *s, dtype=torch.float64) for s in ((24, 6, 5), (12, 1, 1), (12, 1, 1)))
    norm = nn.functional.group_norm(block.conv(nn.functional.silu(block.norm(x))), 3, eps=1e-6)
    expected = (block.skip(x) + block.last(nn.functional.silu(norm * scale + shift))) / math.sqrt(2)
    torch.testing.assert_close(block(x, scale.flatten(1), shift.flatten(1)), expected, rtol=1e-12, atol=1e-12)
    assert [block.norm.num_groups, block.groups] == [6, 3], "the most groups of at least four channels"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-11)])
@pytest.mark.parametrize("channels", [2, 8, 64, 7])
def test_sinusoidal_embedding_is_its_formula(channels, dtype, tolerance):
    t = np.array([0.0, 1e-5, 0.37, 1.0])
    half = channels // 2
    omega = np.exp(-np.log(1e4) * np.arange(half) / max(half - 1, 1))
    angles = 1000 * t[:, None] * omega
    expected = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((4, channels % 2))], axis=1)
    features = TimeEmbedding(channels, scale=1000)(torch.tensor(t, dtype=dtype))
    assert features.dtype == dtype
    np.testing.assert_allclose(features.numpy(), expected, rtol=0, atol=tolerance)


def test_fourier_embedding_is_its_formula_and_keeps_its_frequencies():
    before = torch.get_rng_state()
    embedding = TimeEmbedding(400, "fourier", scale=3.0)
    assert torch.equal(torch.get_rng_state(), before), "W must not come from the global generator"
    weight = embedding.state_dict()["weight"]
    assert torch.equal(weight, TimeEmbedding(400, "fourier", scale=3.0).weight)
    assert 2.6 < weight.std() < 3.4
    t = np.array([0.0, 0.2, 1.0])
    angles = 2 * np.pi * t[:, None] * weight.double().numpy()
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(embedding(torch.tensor(t)).numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["sinusoidal", "fourier"])
def test_times_of_any_dtype(kind):
    embedding = TimeEmbedding(16, kind, scale=1.0)
    steps = torch.tensor([0, 1, 500, 999])
    assert torch.equal(embedding(steps), embedding(steps.float()))
    features = embedding(steps)
    assert features.dtype == torch.float32
    assert torch.equal(embedding.bfloat16()(steps), features), "the angles of a half-precision network stay float32"


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.05)])
def test_networks_of_any_dtype_and_strided_inputs(name, dtype, tolerance):
    net = small(name, time_embedding="fourier")
    x, t = inputs((2, 5, 4))
    single = net(x, t)
    torch.testing.assert_close(net(x.mT.contiguous().mT, t), single)
    out = net.to(dtype)(x.to(dtype), t)
    assert out.dtype == dtype
    assert (out.float() - single).norm() < tolerance * single.norm()


@both
def test_per_sample_jacobians(name):
    """vmap and a second derivative: exact traces and sliced losses need them."""
    net = small(name, shape=(1, 3)).double()
    x, t = inputs((1, 3), batch=2, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x, t: net(x[None], t[None])[0]))(x, t)
    for i in range(2):
        expected = torch.autograd.functional.jacobian(lambda x, i=i: net(x[None], t[i : i + 1])[0], x[i])
        torch.testing.assert_close(jacobians[i], expected, rtol=1e-10, atol=1e-12)
    x.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # as the sliced losses have it
        (slope,) = torch.autograd.grad(net(x, t).sum(), x, create_graph=True)
        assert torch.autograd.grad(slope.square().sum(), x)[0].any()


@both
def test_construction_is_a_function_of_the_global_seed_alone(name):
    plain, fourier = (small(name, time_embedding=kind) for kind in ("sinusoidal", "fourier"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), fourier.parameters(), strict=True))
    assert "conditioning.time.weight" in fourier.state_dict()
    before = torch.get_rng_state()
    fourier(*inputs((2, 5, 4)))
    assert torch.equal(torch.get_rng_state(), before)


@both
def test_configs_round_trip(name):
    extra = {"multipliers": (1, 2, 2), "attention": (2,)} if name == "unet" else {}
    net = small(name, num_classes=3, time_embedding="fourier", dropout=0.1, out_channels=4, **extra).eval()
    assert MODELS[name](**json.loads(json.dumps(net.config))).config == net.config
    built = build(json.loads(json.dumps(describe(net)))).eval()
    assert describe(built) == describe(net)
    built.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(built(*inputs((2, 5, 4))), net(*inputs((2, 5, 4))))


COMMON = {"num_classes": [0, "ten"], "time_embedding": ["furier"], "time_scale": [0, math.inf], "dropout": [1.0, -1]}
BAD = {
    UNet: COMMON
    | {"shape": [(1, 0), 8], "channels": [1, 8.5], "multipliers": [(), (1, 0)], "blocks": [0, True]}
    | {"attention": [(2,), (-1,), 1], "out_channels": [0]},
    MLP: COMMON | {"shape": [(), "2"], "hidden": [0], "layers": [0], "out_channels": [0, 3]},
    TimeEmbedding: {"channels": [1], "kind": ["cosine"], "scale": [-1.0]},
}
PRESETS = [getattr(networks, name) for name in ("ddpm", "ddpmpp", "ncsnpp", "adm", "ncsn", "ncsnv2", "edm2", "dit")]
CASES = [(cls, name, value) for cls, table in BAD.items() for name, values in table.items() for value in values]


@pytest.mark.parametrize(("cls", "argument", "value"), CASES)
def test_bad_arguments_are_refused(cls, argument, value):
    with pytest.raises(errors.ConfigError, match=rf"^{argument}(\[\d\])? must .*got"):
        cls(**({"channels": 8} if cls is TimeEmbedding else {"shape": (2, 4, 4)}) | {argument: value})


@pytest.mark.parametrize("make", [*MODELS.values(), *PRESETS])
def test_of_an_unknown_option_the_nearest_is_named(make):
    shape = (6,) if make is MLP else (4, 6) if make is Transformer else (3, 32, 32)
    option = "hiden" if make in (MLP, networks.DiT, networks.dit, Transformer) else "chanels"
    with pytest.raises(TypeError, match=rf"^\w+\(\) takes no keyword '{option}': did you mean '(hidden|channels)'\?$"):
        make(shape, **{option: 16})
    with pytest.raises(TypeError, match=r"takes no keyword 'zzzzzz', only shape, "):
        make(shape, zzzzzz=16)


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2, 2, 2)])
def test_a_unet_needs_one_to_three_spatial_axes(shape):
    with pytest.raises(errors.ShapeError, match="shape must be"):
        UNet(shape)


@both
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3)}, errors.ShapeError, "x must have shape"),
        ({"x": torch.zeros(2, 2, 5, 4, dtype=torch.float64)}, errors.DTypeError, "x must have the network's dtype"),
        ({"x": [[0.0]]}, errors.DTypeError, "x must be a tensor, got list"),
        ({"t": 0.5}, errors.DTypeError, "t must be a tensor, got float"),
        ({"t": torch.tensor(0.5)}, errors.ShapeError, "t must have shape"),
        ({"t": torch.zeros(2, dtype=torch.bool)}, errors.DTypeError, "t must be"),
        ({"t": torch.zeros(2, device="meta")}, errors.DeviceError, "t must be on"),
        ({"y": torch.zeros(2)}, errors.DTypeError, "y must be an integer"),
        ({"y": torch.zeros(3, dtype=torch.long)}, errors.ShapeError, "y must have shape"),
        ({"y": torch.tensor([0, 4])}, errors.DataError, "y must hold labels >= 0 and <= 3 .*got values from 0 to 4"),
        ({"y": torch.tensor([-1, 0])}, errors.DataError, "y must hold labels >= 0 and <= 3"),
    ],
)
def test_bad_inputs_are_refused(name, change, error, words):
    call = {"x": torch.zeros(2, 2, 5, 4), "t": torch.zeros(2)} | change
    with pytest.raises(error, match=words):
        small(name, num_classes=3)(**call)
    with pytest.raises(errors.ConfigError, match=r"y must be None .* num_classes="):
        small(name)(torch.zeros(2, 2, 5, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long))


def test_build_and_describe_refuse():
    image = {"shape": [1, 8]}
    for words, config in {
        "config must be a dict": image,
        "did you mean 'unet'": {"name": "u-net", **image},
        "did you mean 'channels'": {"name": "unet", **image, "chanels": 8},
        "config must have the shape": {"name": "mlp"},
    }.items():
        with pytest.raises(errors.ConfigError, match=words):
            build(config)
    for net in (nn.Linear(2, 2), type("Mine", (MLP,), {})((2,))):
        with pytest.raises(errors.ConfigError, match=f"net must be .*{type(net).__name__}"):
            describe(net)


@pytest.mark.parametrize("kind", ["sinusoidal", "fourier"])
def test_an_mlp_learns_a_posterior_mean(kind):
    """x0 = ±1, x_t = α x0 + σ ε: E[x0 | x_t] = tanh(α x_t / σ²), the minimiser of the squared error."""
    torch.manual_seed(0)
    net = MLP((1,), hidden=32, layers=2, time_embedding=kind, time_scale={"fourier": 1.0}.get(kind))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def perturb(batch: int) -> tuple[torch.Tensor, ...]:
        x0, t = torch.randint(0, 2, (batch, 1)) * 2.0 - 1, torch.rand(batch) * 0.8 + 0.1
        alpha, sigma = torch.cos(t * math.pi / 2)[:, None], torch.sin(t * math.pi / 2)[:, None]
        x = alpha * x0 + sigma * torch.randn(batch, 1)
        return x0, x, t, torch.tanh(alpha * x / sigma**2)

    def error() -> float:
        _, x, t, mean = perturb(4000)
        return (net(x, t) - mean).square().mean().sqrt().item()

    untrained = error()
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 400)
        x0, x, t, _ = perturb(256)
        optimizer.zero_grad()
        (net(x, t) - x0).square().mean().backward()
        optimizer.step()
    assert untrained > 0.5
    assert error() < 0.1, "a network blind to t is left with 0.25"


# --- times evaluated ahead -------------------------------------------------------------------------------------------


def test_a_run_asks_the_time_features_once(monkeypatch):
    """And every kind of call, with one time's features for all samples or one for each, agrees with the plain one."""
    for net in (
        MLP((5,), hidden=16), MLP((5,), hidden=16, num_classes=3), UNet((1, 8, 8), channels=8, multipliers=(1, 2)),
        UNet((1, 8, 8), channels=8, multipliers=(1,), num_classes=3),
    ):  # fmt: skip
        awake(net)
        x, times = torch.randn(4, *net.shape), torch.tensor([0.2, 0.7])
        labels = (None,) if net.num_classes is None else (None, torch.tensor([0, 3, 1, 2]))
        for y in labels:
            features = net.time_features(times)
            for k, t in enumerate(times):
                t = t.expand(4)
                expected = net(x, t, y)
                for given in (features[k : k + 1], features[[k] * 4]):
                    assert torch.allclose(net(x, t, y, features=given), expected, atol=1e-5)
            cond = None if y is None else {"y": y}
            model = fastdiff.ScoreModel(net, "vp", data_shape=net.shape, num_classes=0 if y is None else 4)
            calls, of_time = [], type(net).time_features

            def counted(self, t, calls=calls, of_time=of_time):
                calls.append(len(t))
                return of_time(self, t)

            monkeypatch.setattr(type(net), "time_features", counted)
            ours = fastdiff.sample(model, steps=6, num_samples=4, cond=cond, batch_size=2)
            assert calls == [1, 6]  # one to see how much room they need
            plain = torch.nn.Module()
            plain.forward = lambda x, t, y=None, net=net: net(x, t, y)
            theirs = fastdiff.sample(
                fastdiff.ScoreModel(plain, "vp", data_shape=net.shape), steps=6, num_samples=4, cond=cond
            )
            assert torch.allclose(ours, theirs, atol=1e-3, rtol=1e-3)
            monkeypatch.undo()


def test_too_many_time_features_are_made_row_by_row(monkeypatch):
    net = MLP((5,), hidden=16)
    model = fastdiff.ScoreModel(net, "vp", data_shape=(5,))
    ours = fastdiff.sample(model, steps=6, num_samples=4)
    flowing = fastdiff.sample(model, sampler="rk45", num_samples=4)
    for module in (runs, probability_flow):
        monkeypatch.setattr(module, "MAX_FEATURES", 100)
    monkeypatch.setattr(MLP, "forward", lambda self, x, t, y=None: torch.zeros_like(x))  # takes no features
    assert torch.equal(fastdiff.sample(model, steps=6, num_samples=4), ours)  # the last layer starts at zero
    assert torch.equal(fastdiff.sample(model, sampler="rk45", num_samples=4), flowing)


class Changed(MLP):
    def forward(self, x, t, y=None):
        return super().forward(x, t, y) + t.view(-1, 1).to(x.dtype)


def test_networks_that_are_not_quite_ours_get_their_times():
    """A subclass's own forward, one put on the instance, hooks, layers that are not plain: nothing is made ahead of them."""
    torch.manual_seed(0)

    def opened(net):
        torch.nn.init.normal_(net.out.weight, std=0.1)
        return net

    hooked, patched, lora = (opened(MLP((3,), hidden=8, layers=2)) for _ in range(3))
    hooked.register_forward_pre_hook(lambda module, args: (args[0], args[1] * 0.5))
    patched.forward = lambda x, t, right=patched.forward: right(x, t) + t[:, None]

    class Lora(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, h):
            return self.inner(h) * 2

    lora.hidden[1] = Lora(lora.hidden[1])
    for net in (opened(Changed((3,), hidden=8, layers=2)), hooked, patched, lora):
        options = {"sde": "vp", "steps": 6, "shape": (3,), "num_samples": 4}
        ours = fastdiff.sample(net, **options)
        assert torch.allclose(ours, fastdiff.sample(lambda x, t, net=net: net(x, t), **options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "part", ["conditioning", "conditioning.time", "conditioning.mlp.0", "modulation", "hidden.1", "out"]
)
@pytest.mark.parametrize("change", ["hook", "pre-hook", "forward"])
def test_hooks_and_forwards_of_any_part_are_run_at_each_call(part, change):
    """A part that knows which call it is in (here it counts them) may be hooked or replaced: nothing is made ahead of it."""
    unet = part == "modulation"
    net = small("unet", (1, 4)) if unet else awake(MLP((4,), hidden=8, layers=2))
    module, calls = net.get_submodule(part), []
    shape = net.shape
    if change == "hook":
        module.register_forward_hook(lambda m, args, out: calls.append(1) or out * (1 + 0.1 * len(calls)))
    elif change == "pre-hook":
        module.register_forward_pre_hook(
            lambda m, args: calls.append(1) or (args[0] * (1 + 0.1 * len(calls)), *args[1:])
        )
    else:
        plain = module.forward
        module.forward = lambda *args: calls.append(1) or plain(*args) * (1 + 0.1 * len(calls))
    options = {"sde": "vp", "steps": 4, "shape": shape, "num_samples": 2, "sampler": "ddim"}
    ours = fastdiff.sample(net, **options)
    assert len(calls) == 4
    calls.clear()
    assert torch.allclose(ours, fastdiff.sample(lambda x, t: net(x, t), **options), rtol=1e-4, atol=1e-5)


def alike(model, first, second):
    """The cosine between the time features of two times, as the model's network has them."""
    seen = []
    handle = model.net.conditioning.time.register_forward_hook(lambda module, args, out: seen.append(out))
    model(torch.zeros(2, *model.data_shape), torch.tensor([float(first), float(second)]))
    handle.remove()
    return float(nn.functional.cosine_similarity(*seen[-1][:, None], dim=1))


# each of two values with each of the third
FEATURES = [
    (kind, time_input, steps)
    for i, time_input in enumerate(["t", "index", "t*999"])
    for j, steps in enumerate([10, 1000, 4000])
    for kind in [("sinusoidal", "fourier")[(i + j) % 2]]
]


@both
@pytest.mark.parametrize(("kind", "time_input", "steps"), FEATURES)
def test_neighbouring_steps_of_a_chain_have_features_that_are_alike(name, kind, time_input, steps, tmp_path):
    """And the first and the last have not; as the network was saved, so it is loaded."""
    for sde in (
        fastdiff.DDPM(torch.full((steps,), 0.01).tolist()),
        fastdiff.NCSN(np.geomspace(9, 0.1, steps).tolist()),
    ):
        net = small(name, (1, 4), time_embedding=kind)
        nn.init.zeros_(net.out.weight)
        model = fastdiff.ScoreModel(net, sde, "eps", time_input, (1, 4))
        middle = steps // 2
        assert alike(model, middle, middle + 1) > 0.8
        assert alike(model, 1, steps) < alike(model, 1, 2) - 0.05
        awake(net)
        loaded = fastdiff.load(fastdiff.save(model, tmp_path / "model"))
        filled = fastdiff.load(tmp_path / "model", net=MODELS[name](**{**net.config, "time_scale": None}))
        x, t = torch.randn(2, 1, 4), torch.tensor([1.0, float(steps)])
        for same in (loaded, filled):
            assert torch.equal(same(x, t), model(x, t))


@both
def test_a_time_scale_that_was_given_and_continuous_models_are_left_alone(name, tmp_path):
    for sde in ("vp", "ve", "edm", fastdiff.OU()):
        net = MODELS[name]((1, 4), **SIZES[name])
        before = dict(net.config)
        fastdiff.ScoreModel(net, sde, data_shape=(1, 4))
        assert net.config == before
    net = MODELS[name]((1, 4), time_scale=7.0, **SIZES[name])
    old = fastdiff.ScoreModel(net, "ddpm", data_shape=(1, 4))
    assert net.config["time_scale"] == net.conditioning.time.scale == 7.0
    path = fastdiff.save(old, tmp_path / "old")  # so do those of earlier versions have theirs
    for loaded in (fastdiff.load(path), fastdiff.load(path, net=MODELS[name]((1, 4), **SIZES[name]))):
        assert loaded.net.config["time_scale"] == loaded.net.conditioning.time.scale == 7.0
    trained = awake(MODELS[name]((1, 4), **SIZES[name]))
    with pytest.warns(UserWarning, match="time features"):
        fastdiff.ScoreModel(trained, "ddpm", data_shape=(1, 4))
    assert trained.config == before
    shared = MODELS[name]((1, 4), **SIZES[name])
    fastdiff.ScoreModel(shared, "ddpm", data_shape=(1, 4))
    with pytest.warns(UserWarning, match="another model"):
        fastdiff.ScoreModel(shared, "vp", data_shape=(1, 4))


def test_an_unfinished_chain_of_an_earlier_version_goes_on_with_its_features(tmp_path):
    def train(steps, **options):
        torch.manual_seed(0)
        model = fastdiff.ScoreModel(MLP((2,), hidden=8, layers=1, **options), "ddpm", data_shape=(2,))
        fastdiff.train(model, torch.linspace(-1, 1, 16).view(8, 2), steps=steps, batch_size=4, checkpoint=tmp_path)
        return model

    train(3, time_scale=16.0)  # what the default was
    resumed = train(6)
    whole = train(6, time_scale=16.0)
    assert resumed.net.config == whole.net.config
    assert all(torch.equal(a, b) for a, b in zip(resumed.net.state_dict().values(), whole.net.state_dict().values()))


class Helped(torch.nn.Module):
    """Has a helper of that name, and a forward that takes no features."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def time_features(self, t):
        return torch.stack([t.sin(), t.cos()], 1)

    def forward(self, x, t):
        return -x + self.linear(self.time_features(t))


@pytest.mark.parametrize("options", [{"steps": 5, "sampler": "ddim"}, {"sampler": "rk45"}], ids=str)
def test_a_helper_called_time_features_stays_the_networks_own(options):
    net = Helped()
    whole = fastdiff.sample(net, "vp", shape=(2,), num_samples=2, **options)
    assert torch.equal(whole, fastdiff.sample(lambda x, t: net(x, t), "vp", shape=(2,), num_samples=2, **options))


def test_former_paths_lead_to_the_same_classes(tmp_path):
    code = (
        "import sys, fastdiff; from fastdiff.models.mlp import MLP; from fastdiff.models.unet import UNet; "
        "from fastdiff.samplers.multistep import LMS; import fastdiff.samplers.base; "
        "assert MLP is fastdiff.networks.MLP and UNet is fastdiff.networks.UNet and LMS is fastdiff.samplers.LMS; "
        "m = fastdiff.ScoreModel(MLP((3,), hidden=8, layers=1), 'vp', data_shape=(3,)); "
        "fastdiff.save(m, sys.argv[1]); print(type(fastdiff.load(sys.argv[1]).net) is MLP)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.safetensors")], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "True"


def test_a_run_of_a_plain_network_leaves_its_times_as_they_are():
    """Whoever gives a network and no ScoreModel has trained it as it is."""
    net = MLP((3,), hidden=8, layers=1)
    scale = net.config["time_scale"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sde in ("vp", fastdiff.DDPM("cosine", T=20), "ncsn", "vp"):
            fastdiff.sample(net, sde, shape=(3,), num_samples=2, **({} if sde == "ncsn" else {"steps": 5}))
    assert (net.config["time_scale"], net.scale_set) == (scale, False)


IMAGE = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (1,)}
# of every class, and PaperUNet with what its presets differ in: (process, network)
WHOLE_GRAPHS = {
    "ddpm": ("ddpm", lambda: networks.ddpm((3, 8, 8), **IMAGE, num_classes=3)),
    "ncsnpp": ("ve", lambda: networks.ncsnpp((3, 8, 8), **IMAGE)),
    "adm": ("ddpm", lambda: networks.adm((3, 8, 8), **{**IMAGE, "channels": 32}, head_channels=32, num_classes=3)),
    "ncsn": ("ncsn", lambda: networks.ncsn((3, 8, 8), channels=8)),
    "edm2": ("edm", lambda: networks.edm2((3, 8, 8), **IMAGE, num_classes=3)),
    "dit": ("ddpm", lambda: networks.dit((3, 8, 8), patch=4, hidden=16, layers=1, heads=2, num_classes=3)),
    "transformer": ("vp", lambda: networks.Transformer((5, 4), hidden=16, layers=1, heads=2)),
    "linear attention": ("vp", lambda: small("linear_attention_unet", (3, 8, 8))),
    "U-Net": ("vp", lambda: UNet((3, 8, 8), channels=8, blocks=1, attention=(1,), cond_shape=(3, 8, 8), num_classes=3)),
    "MLP": ("vp", lambda: MLP((4,), hidden=8, layers=1, num_classes=3, cond_shape=(2,))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE_GRAPHS)
def test_torch_compile_sees_a_whole_model_at_once(name):
    """fullgraph=True refuses whatever breaks its graph: in the network, and in what a ScoreModel does around it."""
    process, make = WHOLE_GRAPHS[name]
    net = awake(make()).eval()
    learned = "learned_range" if net.config.get("out_channels") == 2 * net.shape[0] else None
    model = fastdiff.ScoreModel(net, process, data_shape=net.shape, variance=learned)
    cond = {}
    if model.num_classes:
        cond["y"] = torch.tensor([0, 2])
    if model.cond_shape:
        cond["cond"] = torch.randn(2, *model.cond_shape)
    x, t = torch.randn(2, *net.shape), torch.tensor([3, 7] if model.process.discrete else [0.3, 0.7])
    torch.compiler.reset()
    with torch.no_grad():
        expected = model(x, t, cond or None)
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x, t, cond or None)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
