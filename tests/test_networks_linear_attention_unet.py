"""LinearAttentionUNet against its equations and against denoising-diffusion-pytorch, whose files become one.

Tests that run the package are skipped where it is not installed: pip install --no-deps denoising-diffusion-pytorch==2.3.4 einops.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from itertools import product
from unittest import mock

import pytest
import strangers
import torch
import torch.nn.functional as F
from torch import nn

import fastdiff
from fastdiff import errors
from fastdiff.networks import LinearAttentionUNet, build, describe
from fastdiff.networks.linear_attention_unet import Attention, Block, Frequencies, RMSNorm
from fastdiff.training.sources import denoising_diffusion_pytorch as source

STAND_INS = ("accelerate", "ema_pytorch", "torchvision")  # which the package's trainers need, and no network does


@functools.cache
def package(name="denoising_diffusion_pytorch"):
    """A module of the package."""
    absent = [each for each in STAND_INS if each not in sys.modules]
    sys.modules.update({each: mock.MagicMock() for each in absent})
    try:
        return strangers.package(f"denoising_diffusion_pytorch.{name}")
    finally:
        for each in absent:
            del sys.modules[each]


def drawn(net: nn.Module) -> nn.Module:
    """All parameters at random, so that the output depends on each, and is of the order of one."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            size = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(size))
            if parameter.squeeze().ndim == 1:
                parameter += 0.5
    return net


TINY = {"channels": 8, "multipliers": (1, 2), "heads": 2, "head_channels": 4}


def tiny(shape=(2, 4, 6), **changes):
    return drawn(LinearAttentionUNet(shape, **{**TINY, **changes}))


def inputs(shape=(2, 4, 6), batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(batch, generator=generator, dtype=torch.float64).to(dtype)


VARIANTS = {
    "plain": {},
    "labels": {"num_classes": 3},
    "vectors": {"cond_shape": (4,), "num_classes": 3},
    "fields": {"cond_shape": (2, 4, 6)},
    "fourier": {"time_embedding": "fourier", "learned_frequencies": True},
    "no memory": {"memory": 0, "down_kernel": 4, "full_attention": ()},
    "each its own": {"heads": (1, 2, 3), "head_channels": (5, 4, 6), "full_attention": (0,), "first_channels": 12},
    "recompute": {"recompute": True, "dropout": 0.1},
}
variants = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def told(net, batch=3):
    """A label and a condition for each sample, the last of which has none, where the network takes them."""
    more = {}
    if net.num_classes is not None:
        more["y"] = torch.arange(batch) % net.num_classes
        more["y"][-1] = net.num_classes
    if net.cond_shape is not None:
        cond = torch.randn(batch, *net.cond_shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        cond[-1] = math.nan
        more["cond"] = cond.to(net.out.weight.dtype)
    return more


# --- the equations ---------------------------------------------------------------------------------------------------


def test_the_norm_is_that_of_root_mean_squares():
    norm = drawn(RMSNorm(5)).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    expected = x / x.square().mean(1, keepdim=True).sqrt() * norm.weight.view(5, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(norm(torch.zeros_like(x)), torch.zeros_like(x))


@pytest.mark.parametrize("inputs", [6, 4])
def test_the_block_is_its_equation(inputs):
    block = drawn(Block(2, inputs, 6, 0.0)).double()
    x, gain, shift = (torch.randn(3, *s, dtype=torch.float64) for s in ((inputs, 5, 4), (6, 1, 1), (6, 1, 1)))
    h = F.silu(block.norm(block.conv(x)) * (1 + gain) + shift)
    expected = block.skip(x) + F.silu(block.norm2(block.last(h)))
    found = block(x, torch.cat((gain, shift), 1).flatten(1))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert isinstance(block.skip, nn.Identity) == (inputs == 6)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("memory", [0, 3])
def test_attention_is_its_equation(linear, memory):
    layer = drawn(Attention(6, 2, 4, memory, linear)).double()
    x = torch.randn(3, 6, 5, 2, dtype=torch.float64)
    qkv = torch.einsum("oc,bcn->bon", layer.qkv.weight[:, :, 0], layer.norm(x).flatten(2))
    out = []
    for head in range(2):
        q, k, v = (part[:, 4 * head : 4 * head + 4].mT for part in qkv.chunk(3, dim=1))  # [B, positions, channels]
        if memory:
            kept = layer.memory[:, head].expand(3, -1, -1, -1).transpose(0, 1)
            k, v = torch.cat((kept[0], k), 1), torch.cat((kept[1], v), 1)
        if linear:
            weights = torch.softmax(q, 2) / math.sqrt(4) @ torch.softmax(k, 1).mT
        else:
            weights = torch.softmax(q @ k.mT / math.sqrt(4), 2)
        out.append((weights @ v).mT)
    h = layer.project(torch.cat(out, 1)).view(x.shape)
    expected = x + (layer.norm2(h) if linear else h)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_frequencies_are_their_formula_and_stay_float32():
    module = Frequencies(8, 0.5, learned=False)
    t = torch.tensor([-3.0, 0.0, 2.5], dtype=torch.float64)
    angle = 2 * math.pi * 0.5 * t[:, None] * module.weight.double()
    expected = torch.cat((0.5 * t[:, None], angle.sin(), angle.cos(), torch.zeros(3, 1)), 1)  # 1 + 3 + 3 + 1
    torch.testing.assert_close(module(t), expected, rtol=1e-12, atol=1e-12)
    for learned in (False, True):
        module = Frequencies(17, 1.0, learned)
        assert isinstance(module.weight, nn.Parameter) == learned
        before = module.weight.detach().clone()
        assert torch.equal(module.to(torch.bfloat16).weight, before), "half precision would turn angles by radians"
        assert module(torch.tensor([3])).dtype == torch.float32
    assert 0.7 < Frequencies(801, 1.0, False).weight.std() < 1.3


def test_the_base_of_sinusoidal_features():
    t = torch.tensor([3.0, 777.0], dtype=torch.float64)
    net = LinearAttentionUNet((1, 4), channels=8, multipliers=(1,), time_base=100.0, time_scale=1.0)
    angle = t[:, None] * 100.0 ** (-torch.arange(4, dtype=torch.float64) / 3)
    torch.testing.assert_close(
        net.conditioning.time(t), torch.cat((angle.sin(), angle.cos()), 1), rtol=1e-11, atol=1e-11
    )


def test_the_time_the_label_and_the_condition_enter_as_in_the_equation():
    """γ and β of all blocks: linear in the silu of two-layer GELU perceptrons."""
    net, seen = tiny(num_classes=3, cond_shape=(4,)).double(), []
    for block in net.blocks():
        block.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    x, t = inputs(dtype=torch.float64)
    y, cond = torch.tensor([2, 3, 0]), torch.randn(3, 4, dtype=torch.float64)
    net(x, t, y, cond=cond)

    def perceptron(mlp, h):
        return F.silu(mlp[2](F.gelu(mlp[0](h))))

    expected = net.modulation(perceptron(net.conditioning.mlp, net.conditioning.time(t)))
    expected = expected + net.label_modulation(perceptron(net.label_mlp, net.label.weight[y]))
    expected = expected + net.condition_modulation(F.silu(net.condition.embed(cond)))
    torch.testing.assert_close(torch.cat(seen, 1), expected, rtol=1e-12, atol=1e-12)


def test_a_kernel_of_two_is_pixel_unshuffle_and_a_convolution():
    leave = tiny((1, 4, 6)).double().down[0].leave
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    expected = F.conv2d(F.pixel_unshuffle(x, 2), leave.weight.flatten(1)[:, :, None, None], leave.bias)
    torch.testing.assert_close(leave(x), expected, rtol=1e-12, atol=1e-12)


def test_levels_attend_as_told():
    net = tiny(
        multipliers=(1, 2, 1), shape=(1, 8), full_attention=(0, 2), heads=(1, 2, 3, 4), head_channels=(2, 4, 6, 8)
    )
    attention = [level.attend for level in (*net.down, net.middle, *reversed(net.up))]
    assert [a.norm2 is None for a in attention] == [True, False, True, True, True, False, True]
    assert [(a.heads, a.wide) for a in attention] == [(1, 2), (2, 4), (3, 6), (4, 8), (1, 2), (2, 4), (3, 6)]
    default = LinearAttentionUNet((1, 8), channels=4, multipliers=(1, 1, 1))
    assert [level.attend.norm2 is None for level in default.down] == [False, False, True]


@pytest.mark.parametrize(
    ("shape", "options", "count"),
    [
        ((3, 32, 32), {}, 35_711_491),  # Unet(64)
        ((3, 32, 32), {"out_channels": 6}, 35_711_686),
        ((3, 64), {"memory": 0, "down_kernel": 4, "full_attention": ()}, 14_854_531),  # Unet1D(64)
    ],
)
def test_as_many_parameters_as_the_package_has(shape, options, count):
    with torch.device("meta"):
        net = LinearAttentionUNet(shape, **options)
    assert sum(p.numel() for p in net.parameters()) == count


# --- the contract of all networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8), (2, 12, 4), (3, 4, 4, 8)])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2, 1)])
@pytest.mark.parametrize("down_kernel", [2, 4])
def test_the_samples_shape_in_one_to_three_dimensions(shape, multipliers, down_kernel):
    net = tiny(shape, multipliers=multipliers, down_kernel=down_kernel, out_channels=5)
    out = net(*inputs(shape))
    assert out.shape == (3, 5, *shape[1:])
    assert (torch.isfinite(out) & (out != 0)).all()
    assert net(torch.empty(0, *shape), torch.empty(0)).shape == (0, 5, *shape[1:])


def test_a_new_network_returns_zeros():
    net = LinearAttentionUNet((2, 4, 6), **TINY)
    assert torch.equal(net(*inputs()), torch.zeros(3, 2, 4, 6))


@variants
def test_every_parameter_gets_a_gradient(variant):
    net = tiny(**variant)
    net(*inputs(), **told(net)).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@variants
def test_samples_do_not_see_each_other(variant):
    net = tiny(**variant).double().eval()
    x, t = inputs(dtype=torch.float64)
    more = told(net)
    out = net(x, t, **more)
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in more.items()}
        torch.testing.assert_close(net(x[i : i + 1], t[i : i + 1], **one)[0], out[i], rtol=1e-11, atol=1e-11)
        assert not any(torch.allclose(out[i], out[j]) for j in range(i))
    x[1] = math.nan
    torch.testing.assert_close(net(x, t, **more)[[0, 2]], out[[0, 2]], rtol=1e-11, atol=1e-11)
    assert net(x, t, **more)[1].isnan().all()


@variants
def test_features_made_ahead(variant):
    net = tiny(**variant).double().eval()
    x, _ = inputs(dtype=torch.float64)
    times = torch.tensor([0.2, 0.7], dtype=torch.float64)
    features = net.time_features(times)
    for more in ({}, told(net)):
        for k, t in enumerate(times):
            expected = net(x, t.expand(3), **more)
            for given in (features[k : k + 1], features[[k] * 3]):
                out = net(x, torch.full((3,), math.nan, dtype=t.dtype), **more, features=given)
                torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(net(x, times[:1].expand(3), **more), net(x, times[1:].expand(3), **more))


def test_no_label_and_no_condition():
    x, t = inputs()
    net = tiny(num_classes=3)
    assert torch.equal(net(x, t, torch.full((3,), 3)), net(x, t))
    same = net(x[:1].expand(4, -1, -1, -1), t[:1].expand(4), torch.arange(4))
    assert not any(torch.allclose(same[i], same[j], atol=1e-3) for i in range(4) for j in range(i))
    with pytest.raises(errors.DataError, match=r"y must hold labels >= 0 and <= 3 .*got values from 0 to 4"):
        net(x, t, torch.tensor([0, 1, 4]))
    for shape in ((4,), (5, 4, 6)):
        net = tiny(cond_shape=shape)
        none = net(x, t)
        assert torch.equal(net(x, t, cond=torch.full((3, *shape), math.nan)), none)
        cond = torch.randn(3, *shape)
        assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(net(x, t, cond=cond), none))
    with pytest.raises(errors.ShapeError, match="cond_shape must be"):
        tiny(cond_shape=(5, 8, 6))


@variants
def test_configs_and_files_round_trip(variant, tmp_path):
    net = tiny(**variant).eval()
    x, t = inputs()
    assert LinearAttentionUNet(**json.loads(json.dumps(net.config))).config == net.config
    built = build(json.loads(json.dumps(describe(net)))).eval()
    built.load_state_dict(net.state_dict(), strict=True)
    options = {key: net.config.get(key) for key in ("num_classes", "cond_shape")}
    model = fastdiff.ScoreModel(net, "vp", data_shape=net.shape, **options)
    loaded = fastdiff.load(fastdiff.save(model, tmp_path / "model")).net
    expected = net(x, t, **told(net))
    for same in (built, loaded):
        assert describe(same) == describe(net)
        assert torch.equal(same(x, t, **told(net)), expected)


def test_a_file_keeps_the_base_of_its_time_features(tmp_path):
    net = tiny(time_base=50.0)
    model = fastdiff.ScoreModel(net, "vp", data_shape=net.shape)
    loaded = fastdiff.load(fastdiff.save(model, tmp_path / "model")).net
    assert torch.equal(loaded(*inputs()), net(*inputs()))
    assert not torch.allclose(tiny()(*inputs()), net(*inputs()))


@variants
def test_nothing_is_read_from_the_device(variant):
    """On the meta device, which holds no numbers, a call that reads one fails."""
    with torch.device("meta"):
        net = LinearAttentionUNet((2, 4, 6), **{**TINY, **variant})
        more = {key: value.to("meta") for key, value in told(net).items()}
        assert net(torch.empty(3, 2, 4, 6), torch.empty(3), **more).shape == (3, 2, 4, 6)


@variants
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.06)])
def test_any_dtype(variant, dtype, tolerance):
    net = tiny(**variant).eval()
    x, t = inputs()
    more = told(net)
    single = net(x, t, **more)
    net = net.to(dtype)
    assert next(net.parameters()).dtype == dtype, "which runs take for the network's"
    if "cond" in more:
        more["cond"] = more["cond"].to(dtype)
    out = net(x.to(dtype), t, **more)
    assert out.dtype == dtype
    assert (out.float() - single).norm() < tolerance * single.norm()


def test_recomputing_gives_the_same_gradients():
    x, t = inputs(dtype=torch.float64)
    grads, kept = [], []
    for recompute in (False, True):
        net, saved = tiny(recompute=recompute).double(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, saved=saved: saved.append(v.numel()) or v, lambda v: v):
            out = net(x, t).square().sum()
        out.backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        kept.append(sum(saved))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    assert kept[1] < kept[0] / 2


def test_dropout_is_in_the_blocks():
    x, t = inputs()
    net = tiny(dropout=0.5)
    assert not torch.allclose(net(x, t), net(x, t))
    assert torch.equal(net.eval()(x, t), net(x, t))
    assert torch.equal(net(x, t), tiny().eval()(x, t))


def test_per_sample_jacobians():
    net = tiny((1, 4)).double()
    x, t = inputs((1, 4), batch=2, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x, t: net(x[None], t[None])[0]))(x, t)
    for i in range(2):
        expected = torch.autograd.functional.jacobian(lambda x, i=i: net(x[None], t[i : i + 1])[0], x[i])
        torch.testing.assert_close(jacobians[i], expected, rtol=1e-9, atol=1e-11)


def test_frequencies_fit_a_chains_steps():
    net = LinearAttentionUNet((1, 4), **TINY, time_embedding="fourier")
    before = net.conditioning.time.weight.clone()
    fastdiff.ScoreModel(net, fastdiff.DDPM("cosine", T=200), "eps", "index", (1, 4))
    assert net.config["time_scale"] == net.conditioning.time.scale == pytest.approx(16 / 199, rel=0.02)
    assert torch.equal(net.conditioning.time.weight, before)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"channels": 1}, errors.ConfigError, "channels must"),
        ({"multipliers": ()}, errors.ConfigError, "multipliers must have at least one entry"),
        ({"multipliers": (1, 0)}, errors.ConfigError, r"multipliers\[1\] must"),
        ({"multipliers": (1, 1.5)}, errors.ConfigError, r"multipliers\[1\] must"),
        ({"first_channels": 0}, errors.ConfigError, "first_channels must"),
        ({"full_attention": (2,)}, errors.ConfigError, "full_attention must hold level indices >= 0 and <= 1"),
        ({"full_attention": 1}, errors.ConfigError, "full_attention must"),
        ({"heads": (1, 2)}, errors.ConfigError, "heads must be one number, or 3"),
        ({"heads": 0}, errors.ConfigError, "heads must"),
        ({"head_channels": (1, 2, 0)}, errors.ConfigError, r"head_channels\[2\] must"),
        ({"memory": -1}, errors.ConfigError, "memory must"),
        ({"down_kernel": 3}, errors.ConfigError, "down_kernel must be 2 or 4"),
        ({"time_base": 1.0}, errors.ConfigError, "time_base must"),
        ({"time_channels": 2, "time_embedding": "fourier"}, errors.ConfigError, "time_channels must"),
        ({"learned_frequencies": 1}, errors.ConfigError, "learned_frequencies must"),
        ({"recompute": "yes"}, errors.ConfigError, "recompute must"),
        ({"shape": (1, 5, 4)}, errors.ShapeError, "shape must have axes that are multiples of 2"),
        ({"shape": (1,)}, errors.ShapeError, "shape must be"),
    ],
)
def test_bad_arguments_are_refused(change, error, words):
    with pytest.raises(error, match=f"^{words}.*got"):
        LinearAttentionUNet(**{"shape": (1, 4, 4), **TINY, **change})


# --- the package's networks ------------------------------------------------------------------------------------------


def unet(**options):
    return package().Unet(8, **options)


def unet1d(**options):
    return package("denoising_diffusion_pytorch_1d").Unet1D(8, **options)


def labelled(**options):
    return package("classifier_free_guidance").Unet(8, 5, **options)


NETWORKS = {
    "Unet": (unet, {"dim_mults": (1, 2, 4)}, {}),
    "of one level": (unet, {"dim_mults": (2,)}, {}),
    "of one channel, three levels alike": (unet, {"dim_mults": (1, 1, 1), "channels": 1}, {}),
    "heads of each level": (unet, {"dim_mults": (1, 2), "attn_heads": (2, 3), "attn_dim_head": (4, 5)}, {}),
    "heads as many as the memory": (unet, {"dim_mults": (1, 2), "attn_heads": 4, "attn_dim_head": 4}, {}),
    "full attention first": (unet, {"dim_mults": (1, 2), "full_attn": (True, False)}, {}),
    "no full attention": (unet, {"dim_mults": (1, 2), "full_attn": (False, False)}, {}),
    "first channels": (unet, {"dim_mults": (1, 2), "init_dim": 12}, {}),
    "theta": (unet, {"dim_mults": (1, 2), "sinusoidal_pos_emb_theta": 300}, {"sinusoidal_pos_emb_theta": 300}),
    "random frequencies": (unet, {"dim_mults": (1, 2), "random_fourier_features": True}, {}),
    "learned frequencies": (
        unet,
        {"dim_mults": (1, 2), "learned_sinusoidal_cond": True, "learned_sinusoidal_dim": 6},
        {"learned_sinusoidal_cond": True},
    ),
    "learned variance": (unet, {"dim_mults": (1, 2), "learned_variance": True}, {}),
    "out_dim": (unet, {"dim_mults": (1, 2), "out_dim": 8}, {}),
    "self-conditioned": (unet, {"dim_mults": (1, 2), "self_condition": True}, {}),
    "dropout": (unet, {"dim_mults": (1, 2), "dropout": 0.3}, {"dropout": 0.3}),
    "flash": (unet, {"dim_mults": (1, 2), "flash_attn": True}, {}),
    "Unet1D": (unet1d, {"dim_mults": (1, 2, 4)}, {}),
    "Unet1D of one level": (unet1d, {"dim_mults": (2,)}, {}),
    "Unet1D, heads below": (unet1d, {"dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 6}, {"attn_heads": 2}),
    "Unet1D, self-conditioned": (
        unet1d,
        {"dim_mults": (1, 2), "self_condition": True, "learned_variance": True, "init_dim": 6, "dropout": 0.1},
        {"dropout": 0.1},
    ),
    "Unet1D, theta": (
        unet1d,
        {"dim_mults": (1, 2), "sinusoidal_pos_emb_theta": 300},
        {"sinusoidal_pos_emb_theta": 300},
    ),
    "Unet1D, random frequencies": (unet1d, {"dim_mults": (1, 2), "random_fourier_features": True}, {}),
    "labels": (labelled, {"dim_mults": (1, 2, 4)}, {}),
    "labels, heads below": (
        labelled,
        {"dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 6, "init_dim": 6, "learned_variance": True},
        {"attn_heads": 2},
    ),
    "labels, learned frequencies": (labelled, {"dim_mults": (1, 2), "learned_sinusoidal_cond": True}, {}),
}


def pair(make, options, facts):
    """(the package's network, the one of its tensors, one sample's shape)."""
    theirs = drawn(make(**options)).eval()
    channels = options.get("channels", 3)
    shape = (channels, 8) if make is unet1d else (channels, 8, 12)
    return theirs, source.network(theirs.state_dict(), shape, **facts).eval(), shape


def theirs_and_ours(theirs, ours, shape, dtype, times, cond=None):
    """The answers of both to the same question, and, of a network with labels, to that without a label."""
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    x = torch.randn(len(times), *shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    torch.set_default_dtype(dtype)  # in which the package has its frequencies
    try:
        if ours.num_classes is None:
            more = () if cond is None else (cond.to(dtype),)
            return [(theirs(x, times, *more), ours(x, times, cond=None if cond is None else cond.to(dtype)))]
        y = torch.arange(len(times)) % ours.num_classes
        return [(theirs(x, times, y, p), ours(x, times, None if p else y)) for p in (0.0, 1.0)]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", NETWORKS.values(), ids=NETWORKS)
def test_a_network_of_the_package_answers_the_same(case):
    theirs, ours, shape = pair(*case)
    steps = torch.tensor([0, 1, 37, 500, 999])
    fourier = ours.config["time_embedding"] == "fourier"  # which is told log signal-to-noise ratios, or ln(σ) / 4
    times = steps / 100 - 5 if fourier else steps
    sizes = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    fixed = ours.conditioning.time.weight.numel() if fourier and not ours.config["learned_frequencies"] else 0
    assert ours.config["dropout"] == case[1].get("dropout", 0)
    assert ours.config["learned_frequencies"] == case[2].get("learned_sinusoidal_cond", False)
    unseen = theirs.init_conv.weight[:, shape[0] :].numel()
    assert sizes[0] + fixed + unseen == sizes[1]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        with torch.no_grad():
            for a, b in theirs_and_ours(
                theirs, ours, shape, dtype, times.double() if dtype == torch.float64 else times
            ):
                assert (a - b).abs().max() < tolerance * a.abs().max()
                assert 0.01 < a.std() < 100


@pytest.mark.parametrize("name", ["self-conditioned", "Unet1D, self-conditioned"])
def test_self_conditioning_is_a_condition_on_the_samples_grid(name):
    make, options, facts = NETWORKS[name]
    theirs, ours, shape = pair(make, options, {**facts, "self_condition": True})
    assert ours.cond_shape == shape
    sizes = [sum(p.numel() for p in net.parameters()) for net in (ours, theirs)]
    assert sizes[0] - ours.condition.null.numel() == sizes[1]
    cond, times = torch.randn(2, *shape), torch.tensor([3.0, 400.0], dtype=torch.float64)
    ((a, b),) = theirs_and_ours(theirs, ours, shape, torch.float64, times, cond)
    torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    ((c, d),) = theirs_and_ours(theirs, ours, shape, torch.float64, times)
    torch.testing.assert_close(c, d, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a, c, atol=1e-3)


def test_an_import_draws_nothing_and_shares_nothing():
    theirs = drawn(unet(dim_mults=(1, 2), self_condition=True))
    tensors = theirs.state_dict()
    kept = {name: value.clone() for name, value in tensors.items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        ours = source.network(tensors, (3, 8, 8), self_condition=True)
    assert torch.equal(torch.get_rng_state(), state)
    for parameter in ours.parameters():
        assert not parameter.is_inference()
        assert parameter.requires_grad
        nn.init.zeros_(parameter)
    assert all(torch.equal(tensors[name], value) for name, value in kept.items())
    again = source.network({name: value.half() for name, value in kept.items()}, (3, 8, 8))
    assert next(again.parameters()).dtype == torch.float32


def test_files_that_are_not_quite_its_are_refused():
    tensors = unet(dim_mults=(1, 2)).state_dict()
    lacking = {name: value for name, value in tensors.items() if name != "ups.1.2.to_out.1.g"}
    with pytest.raises(errors.CheckpointMismatchError, match=r"lacks 'ups\.1\.2\.to_out\.1\.g'"):
        source.network(lacking, (3, 8, 8))
    with pytest.raises(errors.CheckpointMismatchError, match=r"lacks 'final_conv\.bias'"):
        source.network({name: value for name, value in tensors.items() if name != "final_conv.bias"}, (3, 8, 8))
    with pytest.raises(errors.CheckpointMismatchError, match=r"no place, such as 'ups\.0\.5\.weight'"):
        source.network(tensors | {"ups.0.5.weight": torch.zeros(3)}, (3, 8, 8))
    name = "downs.0.0.block1.proj.weight"
    with pytest.raises(errors.CheckpointMismatchError, match=r"down\.0\.first\.conv\.weight.* must have the shape"):
        source.network(tensors | {name: tensors[name].reshape(8, 8, 1, 9)}, (3, 8, 8))
    with pytest.raises(errors.CheckpointMismatchError, match=r"lacks 'init_conv\.weight'.*give the part"):
        source.network({f"model.{name}": value for name, value in tensors.items()}, (3, 8, 8))
    with pytest.raises(errors.CheckpointMismatchError, match=r"before 2\.0"):
        source.network(tensors | {"mid_block1.block1.norm.weight": torch.ones(16)}, (3, 8, 8))
    with pytest.raises(errors.CheckpointMismatchError, match="guided_diffusion"):
        source.network(package("guided_diffusion").Unet(8, dim_mults=(1, 2)).state_dict(), (3, 8, 8))
    with pytest.raises(errors.ConfigError, match=r"self_condition must be False.*got True"):
        source.network(tensors, (3, 8, 8), self_condition=True)
    one = unet1d(dim_mults=(1, 2)).state_dict()
    for heads in (0, 5):
        with pytest.raises(errors.ConfigError, match=r"attn_heads must.*got"):
            source.network(one, (3, 8), attn_heads=heads)
    for shape in ((4, 8, 8), (3, 8), (3,)):
        with pytest.raises(errors.ShapeError, match=r"shape must be one sample's.*2 axes behind 3 channels"):
            source.network(tensors, shape)


# --- the chain and the objective -------------------------------------------------------------------------------------


class Net(nn.Module):
    """What GaussianDiffusion asks of a network."""

    random_or_learned_sinusoidal_cond = self_condition = False

    def __init__(self, channels=1, out_dim=1):
        super().__init__()
        self.channels, self.out_dim = channels, out_dim
        self.init_conv, self.final_conv = nn.Conv2d(channels, 8, 7), nn.Conv2d(8, out_dim, 1)


def diffusion(steps=1000, objective="pred_v", beta_schedule="sigmoid", **options):
    module = package()
    return module.GaussianDiffusion(
        Net(), image_size=8, timesteps=steps, objective=objective, beta_schedule=beta_schedule, **options
    )


OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
SCHEDULES = ("linear", "cosine", "sigmoid")
STEPS = (25, 100, 1000, 4000)  # of the linear schedule of fewer some betas are more than 1


@pytest.mark.parametrize(("objective", "schedule", "steps"), list(product(OBJECTIVES, SCHEDULES, STEPS)))
def test_the_objective_and_the_chain_follow_from_the_buffers(objective, schedule, steps):
    """For every objective, schedule and length, without and with weights clipped at any signal-to-noise ratio."""
    exact = getattr(package(), f"{schedule}_beta_schedule")(steps)
    for gamma in (None, 1, 5, 20):
        clipped = {} if gamma is None else {"min_snr_loss_weight": True, "min_snr_gamma": gamma}
        found = source.options(diffusion(steps, objective, schedule, **clipped).state_dict())
        assert (found["objective"], found["min_snr_gamma"]) == (objective, gamma and pytest.approx(gamma, rel=1e-5))
        betas = torch.tensor(found["betas"], dtype=torch.float64)
        # each is rounded to float32, and near 1 so is 1 - beta
        assert ((betas - exact).abs() <= 2.5e-7 * torch.minimum(exact, 1 - exact)).all()


@pytest.mark.parametrize(("objective", "schedule"), list(product(OBJECTIVES, ("linear", "cosine"))))
@pytest.mark.parametrize("name", ["denoising_diffusion_pytorch_1d", "classifier_free_guidance"])
def test_the_objective_of_the_other_classes(name, objective, schedule):
    module, options = package(name), {"timesteps": 100, "objective": objective, "beta_schedule": schedule}
    if name.endswith("1d"):
        process = module.GaussianDiffusion1D(unet1d(dim_mults=(1,)), seq_length=8, **options)
    else:
        process = module.GaussianDiffusion(labelled(dim_mults=(1,)), image_size=8, **options)
    assert source.options(process.state_dict())["objective"] == objective


def test_a_learned_variance_goes_with_predicted_noise():
    """LearnedGaussianDiffusion trains and samples a prediction of the noise, whatever its objective says."""
    module = package("learned_gaussian_diffusion")
    process = module.LearnedGaussianDiffusion(Net(1, 2), image_size=8, timesteps=100)
    assert process.objective == "pred_v"
    assert source.options(process.state_dict())["objective"] == "pred_noise"
    module = package("weighted_objective_gaussian_diffusion")
    process = module.WeightedObjectiveGaussianDiffusion(Net(1, 4), image_size=8, timesteps=100)
    assert source.options(process.state_dict())["objective"] is None


def test_an_objective_that_nothing_tells_is_none():
    betas = torch.linspace(1e-3, 0.2, 50)
    levels = (1 - betas).cumprod(0)
    snr = levels / (1 - levels)

    def told(weight, betas=betas):
        return source.options({"betas": betas, "loss_weight": weight})["objective"]

    assert told(torch.ones(50)) == "pred_noise"
    assert told(snr) == "pred_x0"
    assert told(snr / (snr + 1)) == "pred_v"
    assert told(2 * torch.ones(50)) is None  # none of the three
    assert told(snr.clamp(min=5)) is None  # of version 1.5.0, which clips on the wrong side
    assert told(torch.ones(1), betas[:1]) is None  # one step fits each
    assert told(torch.ones(3), 1e-6 * betas[:3]) is None  # without noise "pred_noise" and "pred_v" weigh alike
    assert told(torch.full((50,), math.nan)) is None
    kept = {"betas": betas.double(), "alphas_cumprod": levels.double(), "loss_weight": snr.double()}
    copies = {name: value.clone() for name, value in kept.items()}
    source.options(kept)
    assert all(torch.equal(kept[name], value) for name, value in copies.items())
    found = source.options({"betas": betas, "p2_loss_weight": torch.ones(50)})
    assert found["objective"] is None
    assert found["betas"] == pytest.approx(betas.tolist())
    with pytest.raises(errors.ConfigError, match=r"tensors must be .* with its betas"):
        source.options({"init_conv.weight": torch.zeros(1)})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_trainers_file_becomes_a_model(objective, tmp_path):
    """From the file that its Trainer writes to x_0 as the package has it, at steps that are told by their index."""
    module = package()
    net = drawn(unet(dim_mults=(1, 2))).eval()
    process = module.GaussianDiffusion(net, image_size=8, timesteps=50, objective=objective)
    averaged = {f"ema_model.{name}": value for name, value in process.state_dict().items()}
    shadow = {"initted": torch.tensor(True), "step": torch.tensor(3), **averaged}
    torch.save({"step": 3, "model": {}, "ema": shadow, "version": "2.3.4"}, tmp_path / "model-1.pt")
    tensors = fastdiff.load_tensors(tmp_path / "model-1.pt", part="ema.ema_model")
    facts = source.options(tensors)
    ours = source.network(
        {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}, (3, 8, 8)
    )
    prediction = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}[facts["objective"]]
    model = fastdiff.ScoreModel(ours, fastdiff.DDPM(facts["betas"]), prediction, "index", (3, 8, 8)).eval()
    x, index = torch.randn(3, 3, 8, 8), torch.tensor([0, 20, 49])
    with torch.no_grad():
        expected = process.model_predictions(x, index).pred_x_start
        found = model.predict("x0", x, index + 1.0)
    for a, b in zip(expected, found):  # the last is divided by a small alpha
        assert (a - b).abs().max() < 1e-4 * a.abs().max()
