"""EDM2's U-Net: the paper's equations and sizes, weights that a training brings back, and the source's own numbers."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from strangers import checkout, close, modules_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
import fastdiff.errors as errors
from fastdiff.networks import TimeEmbedding, build, describe
from fastdiff.networks import edm2 as edm2_network
from fastdiff.networks import mp_unet as module
from fastdiff.networks.layers import TIME_SCALES
from fastdiff.networks.mp_unet import EPS, SIZES, MPBlock, MPConditioning, MPLayer, MPUNet, mp_cat, mp_sum
from fastdiff.training.sources import edm2 as edm2_source

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,), "head_channels": 8}
SHAPES = [(2, 8), (2, 4, 6), (1, 2, 4, 2)]
KINDS = {
    "plain": {},
    "labels": {"num_classes": 3},
    "vector": {"cond_shape": (5,)},
    "both": {"num_classes": 3, "cond_shape": (5,)},
    "field": {"cond_shape": (3, 4, 6)},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def small(shape=(2, 4, 6), **changes):
    """A small network whose gains are drawn too, so that its output depends on everything."""
    torch.manual_seed(0)
    net = MPUNet(shape, **{**SMALL, **changes})
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    return net


def inputs(net, batch=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, t = (torch.randn(batch, *s, generator=generator, dtype=dtype) for s in (net.shape, ()))
    more = {}
    if net.num_classes is not None:
        more["y"] = torch.arange(batch) % (net.num_classes + 1)
    if net.cond_shape is not None:
        more["cond"] = torch.randn(batch, *net.cond_shape, generator=generator, dtype=dtype)
    return x, t, more


# --- sizes, shapes, arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"), [("xs", 125), ("s", 280), ("m", 498), ("l", 777), ("xl", 1119), ("xxl", 1523)]
)
def test_the_papers_sizes(name, millions):
    with torch.device("meta"):
        net = edm2_network((4, 64, 64), name, num_classes=1000)
    count = sum(p.numel() for p in net.parameters())
    assert round(count / 1e6) == millions
    assert f"{name.upper()} {count:,}" in (Path(__file__).parent.parent / "docs" / "networks.md").read_text()
    assert (net.config["channels"], net.config["attention"], net.num_classes) == (SIZES[name], [2, 3], 1000)
    assert net.config["dropout"] == (0.0 if name in ("xs", "s") else 0.1)


def test_presets_take_changes():
    net = edm2_network((1, 32, 16), "xs", channels=8, multipliers=(1, 1), head_channels=4, dropout=0.2, blocks=1)
    assert (net.config["attention"], net.config["channels"], net.config["dropout"]) == ([1], 8, 0.2)
    assert [type(b.attend).__name__ != "Identity" for b in net.up] == [True, False, True, True, False, False, False]
    assert edm2_network((1, 32), "xs", channels=8, head_channels=4).config["attention"] == [1, 2]
    with pytest.raises(errors.ConfigError, match=r"size must be one of 'xs'.*did you mean 'xs'"):
        edm2_network((4, 64, 64), "XS")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_it_returns_the_samples_shape(shape, taps):
    net = small(shape, taps=taps, num_classes=2)
    x, t, more = inputs(net)
    out = net(x, t, **more)
    assert out.shape == x.shape
    assert (torch.isfinite(out) & (out != 0)).all()
    assert small(shape, out_channels=5)(x, t).shape == (3, 5, *shape[1:])
    assert net(x[:0], t[:0], more["y"][:0]).shape == (0, *shape)


def test_a_new_network_returns_zeros_and_knows_no_time():
    net = MPUNet((2, 4, 6), **SMALL)
    x, t, _ = inputs(net)
    assert torch.equal(net(x, t), torch.zeros(3, 2, 4, 6))
    nn.init.ones_(net.out_gain)
    assert net(x, t).abs().min() > 0
    assert torch.equal(net(x, t + 1), net(x, t))
    nn.init.ones_(net.gains)
    assert not torch.allclose(net(x, t + 1), net(x, t))


@kinds
@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_gets_a_gradient(kind, recompute):
    net = small(**KINDS[kind], dropout=0.1, recompute=recompute)
    x, t, more = inputs(net, batch=4)
    if "cond" in more:
        more["cond"][0] = math.nan
    net(x, t, **more).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in net.parameters())


@kinds
def test_samples_do_not_see_each_other(kind):
    net = small(**KINDS[kind]).double()
    x, t, more = inputs(net, dtype=torch.float64)
    out = net(x, t, **more)
    for i in range(3):
        alone = net(x[i : i + 1], t[i : i + 1], **{name: value[i : i + 1] for name, value in more.items()})[0]
        torch.testing.assert_close(alone, out[i], rtol=1e-12, atol=1e-12)
    assert all(not torch.allclose(out[i], out[j]) for i in range(3) for j in range(i))
    spoilt = x.clone()
    spoilt[1] = math.nan
    torch.testing.assert_close(net(spoilt, t, **more)[[0, 2]], out[[0, 2]], rtol=1e-12, atol=1e-12)


@kinds
@pytest.mark.parametrize("time_embedding", ["fourier_phases", "cos_sin"])
def test_features_made_ahead_give_the_same(kind, time_embedding):
    net = small(**KINDS[kind], time_embedding=time_embedding).double()
    x, _, more = inputs(net, dtype=torch.float64)
    times = torch.tensor([-1.2, 0.7], dtype=torch.float64)
    features = net.time_features(times)
    for k, t in enumerate(times):
        for some in (more, {}, {name: value for name, value in more.items() if name == "y"}):
            expected = net(x, t.expand(3), **some)
            for given in (features[k : k + 1], features[[k] * 3]):
                wrong = torch.full((3,), math.nan, dtype=torch.float64)  # whose values are not read
                torch.testing.assert_close(net(x, wrong, **some, features=given), expected, rtol=1e-12, atol=1e-12)


@kinds
def test_configs_and_files_round_trip(kind, tmp_path):
    net = small(**KINDS[kind], dropout=0.1, clip=None, taps=(1, 3, 3, 1), embedding_channels=12).eval()
    assert MPUNet(**json.loads(json.dumps(net.config))).config == net.config
    built = build(json.loads(json.dumps(describe(net)))).eval()
    built.load_state_dict(net.state_dict(), strict=True)
    x, t, more = inputs(net)
    assert torch.equal(built(x, t, **more), net(x, t, **more))
    model = fastdiff.ScoreModel(net, fastdiff.EDM(), "edm", data_shape=net.shape)
    net.conditioning.time.phases += 1  # of a source: no seed's
    for name, value in {"a": net, "b": net.bfloat16()}.items():
        loaded = fastdiff.load(fastdiff.save(model, tmp_path / name))
        assert describe(loaded.net) == describe(net)
        some = {key: each.to(next(net.parameters()).dtype) if key == "cond" else each for key, each in more.items()}
        x = x.to(next(net.parameters()).dtype)
        assert torch.equal(loaded.net(x, t, **some), value(x, t, **some))


def test_no_label_has_an_embedding_of_zero():
    net = small(num_classes=3)
    x, t, _ = inputs(net)
    none = net(x, t)
    assert torch.equal(net(x, t, torch.full((3,), 3)), none)
    assert not torch.allclose(net(x, t, torch.tensor([0, 1, 2])), none)
    nn.init.normal_(net.conditioning.label.weight)
    assert torch.equal(net(x, t), none), "no weight of the labels has a part in it"
    with pytest.raises(errors.DataError, match=r"y must hold labels >= 0 and <= 3 .*got values from 0 to 4"):
        net(x, t, torch.tensor([0, 4, 1]))


@pytest.mark.parametrize("kind", ["vector", "both", "field"])
def test_no_condition_is_learned_and_marked_by_nan(kind):
    net = small(**KINDS[kind])
    x, t, more = inputs(net)
    more["cond"][1] = math.nan
    out = net(x, t, **more)
    without = {name: value for name, value in more.items() if name != "cond"}
    none = net(x, t, **without)
    torch.testing.assert_close(out[1], none[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out[0], none[0], atol=1e-2)
    nn.init.constant_(net.condition.null, 2.0)
    assert not torch.allclose(net(x, t, **without), none, atol=1e-2)
    torch.testing.assert_close(net(x, t, **more)[[0, 2]], out[[0, 2]])


def test_recomputed_blocks_give_the_same():
    gradients, calls = [], []
    for recompute in (False, True):
        net = small(recompute=recompute, dropout=0.2, num_classes=2).double()
        x, t, more = inputs(net, dtype=torch.float64)
        torch.manual_seed(3)
        counted = [0]
        for block in (*net.down, *net.up):
            block.register_forward_pre_hook(lambda *_, counted=counted: counted.__setitem__(0, counted[0] + 1))
        net(x, t, **more).square().sum().backward()
        calls.append(counted[0] / len(net.widths))
        gradients.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert calls == [1, 2]


def test_dropout_is_of_the_training_alone():
    net = small(dropout=0.5)
    x, t, _ = inputs(net)
    assert not torch.allclose(net(x, t), net(x, t), atol=1e-2)
    plain = small()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(x, t), plain(x, t))


BAD = {
    "shape": [(1, 0), 8],
    "channels": [1, 8.5],
    "multipliers": [(), (1, 0), (1, 0.01)],
    "blocks": [0, True],
    "attention": [(2,), (-1,), 1],
    "head_channels": [0, 5],
    "taps": [(1, 2, 1), (0, 0)],
    "residual_share": [1.5, -0.1, "a"],
    "attention_share": [2],
    "label_share": [math.nan],
    "skip_share": [-1],
    "clip": [0, math.inf],
    "num_classes": [0, "ten"],
    "time_embedding": ["furier"],
    "time_scale": [0, math.inf],
    "time_channels": [1],
    "embedding_channels": [-1],
    "dropout": [1.0, -1],
    "out_channels": [0],
    "cond_shape": [()],
}


@pytest.mark.parametrize(("argument", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_arguments_are_refused(argument, value):
    with pytest.raises(errors.ConfigError, match=rf"^{argument}(\[\d\])? must .*got"):
        MPUNet(**{"shape": (2, 4, 4), **SMALL, argument: value})


@pytest.mark.parametrize("change", [{"shape": (3,)}, {"shape": (2, 5, 4)}, {"cond_shape": (3, 2, 5)}])
def test_shapes_that_do_not_fit_are_refused(change):
    with pytest.raises(errors.ShapeError, match=f"^{next(iter(change))} must"):
        MPUNet(**{"shape": (2, 4, 4), **SMALL, **change})


# --- the paper's equations -------------------------------------------------------------------------------------------


def rms(x):
    return x.square().mean().sqrt()


def test_parts_keep_the_mean_square_of_one():
    """Of independent standard normal numbers: with 2^16 of them a mean square is 1 ± 0.03 (five standard deviations); 0.596 has
    three digits."""
    a, b = torch.randn(2, 64, 1024).double(), torch.randn(2, 192, 1024).double()
    for share in (0.0, 0.3, 0.5, 1.0):
        assert abs(mp_sum(a, b[:, :64], share).square().mean() - 1) < 0.03
        both = mp_cat(a, b, share)
        assert abs(both.square().mean() - 1) < 0.03
        # the share is that of the sums of squares, whatever the numbers of channels
        parts = [part.square().sum() for part in both.split([64, 192], 1)]
        assert abs(float(parts[1] / (parts[0] + parts[1])) - share**2 / ((1 - share) ** 2 + share**2)) < 0.01
    assert abs((F.silu(b) * module.SILU).square().mean() - 1) < 0.01
    for rank, shape in ((0, (512, 256)), (1, (8, 256, 128)), (2, (4, 256, 12, 12))):
        layer = MPLayer(256, 128, rank, 3).double()
        layer.weight.data *= torch.rand(128, *[1] * (layer.weight.ndim - 1)) * 9 + 1
        y = layer(torch.randn(shape).double())
        inner = y[(slice(None), slice(None), *[slice(1, -1)] * rank)]  # away from the ends, beyond which x is 0
        assert abs(inner.square().mean() - 1) < 0.05, rank


def test_the_activations_of_a_new_network_keep_their_magnitude():
    """Those of each block are near 1, where the U-Nets of other papers let them grow."""
    torch.manual_seed(0)
    net = MPUNet((4, 16, 16), channels=32, multipliers=(1, 2, 3), blocks=2, attention=(1,), head_channels=32)
    seen = []
    for block in net.modules():
        if isinstance(block, MPBlock):
            block.register_forward_hook(lambda module, args, out: seen.append(float(rms(out.detach()))))
    net(torch.randn(8, 4, 16, 16), torch.randn(8))
    assert len(seen) == len(net.widths)
    assert min(seen) > 0.75, seen
    assert max(seen) < 1.25, seen


def written_out(block, x, told, share=0.3, attention_share=0.3, clip=256.0):
    """A block as the paper has it, of its weights: each operation by itself."""

    def unit(v, axes):
        return v / (v.square().mean(axes, keepdim=True).sqrt() + EPS)

    def conv(layer, v):
        w = unit(layer.weight, tuple(range(1, layer.weight.ndim)))
        w = w / math.sqrt(w[0].numel())
        return F.conv2d(v, w, padding=w.shape[-1] // 2)

    def silu(v):
        return v * torch.sigmoid(v) / 0.596

    def add(a, b, s):
        return ((1 - s) * a + s * b) / math.sqrt((1 - s) ** 2 + s**2)

    if block.normalizes:
        x = unit(x if block.skip is None else conv(block.skip, x), (1,))
    y = conv(block.last, silu(conv(block.conv, silu(x)) * told[:, :, None, None]))
    x = x if block.normalizes or block.skip is None else conv(block.skip, x)
    x = add(x, y, share)
    if not isinstance(block.attend, nn.Identity):
        attend, (n, c, *sides) = block.attend, x.shape
        w = unit(attend.qkv.weight, (1,)) / math.sqrt(c)
        q, k, v = unit(
            torch.einsum("oi,bin->bon", w, x.flatten(2)).view(n, 3, attend.heads, -1, x[0, 0].numel()), (3,)
        ).unbind(1)
        weights = torch.softmax(torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(q.shape[2]), dim=-1)
        y = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(n, c, -1)
        w = unit(attend.project.weight, (1,)) / math.sqrt(c)
        x = add(x, torch.einsum("oi,bin->bon", w, y).view(n, c, *sides), attention_share)
    return x.clamp(-clip, clip)


@pytest.mark.parametrize(("way", "skip"), [("down", 0), ("up", 0), ("up", 6)])
@pytest.mark.parametrize("outputs", [12, 20])
def test_a_block_is_its_equation(way, outputs, skip):
    shares = {"residual_share": 0.2, "attention_share": 0.6}
    net = MPUNet((2, 4, 4), **SMALL, **shares, clip=1.5)
    block = MPBlock({**net.config, "head_channels": 4}, 2, 12, outputs, way, attention=True, skip=skip).double()
    assert block.attend.heads == outputs // 4
    x, told = torch.randn(3, 12 + skip, 5, 4).double(), torch.randn(3, outputs).double()
    expected = written_out(block, x, told, 0.2, 0.6, 1.5)
    assert (expected.abs() == 1.5).any()
    torch.testing.assert_close(block(x, told), expected, rtol=1e-12, atol=1e-12)


def test_the_network_is_its_blocks():
    """Its embedding, its blocks in order, the ones beside the sample, and what is joined, written out."""
    net = small(num_classes=3, label_share=0.2, skip_share=0.7).double()
    x, t, more = inputs(net, dtype=torch.float64)

    def layer(v, weight):
        w = weight / (weight.square().mean(1, keepdim=True).sqrt() + EPS) / math.sqrt(weight.shape[1])
        return v @ w.T

    time = net.conditioning.time
    features = math.sqrt(2) * torch.cos(t[:, None] * time.weight.double() + time.phases.double())
    ones = F.one_hot(more["y"], 4)[:, :3].double() * math.sqrt(3)
    emb = 0.8 * layer(features, net.conditioning.layer.weight) + 0.2 * layer(ones, net.conditioning.label.weight)
    emb = F.silu(emb / math.sqrt(0.8**2 + 0.2**2)) / 0.596
    told = [
        layer(emb, w) * gain + 1
        for w, gain in zip(net.modulation.weight.split([b.width for b in (*net.down, *net.up)]), net.gains)
    ]
    h = net.enter(torch.cat([x, torch.ones(3, 1, 4, 6).double()], 1))
    skips = [h]
    for block in net.down:
        h = F.avg_pool2d(h, 2) if block.resample is not None else h
        h = written_out(block, h, told.pop(0))
        skips.append(h)
    for i, block in enumerate(net.up):
        h = F.interpolate(h, scale_factor=2) if block.resample is not None else h
        if i not in (0, 1, 4):
            other = skips.pop()
            root = math.sqrt((h.shape[1] + other.shape[1]) / (0.3**2 + 0.7**2))
            h = torch.cat([0.3 * root / math.sqrt(h.shape[1]) * h, 0.7 * root / math.sqrt(other.shape[1]) * other], 1)
        h = written_out(block, h, told.pop(0))
    assert not skips
    assert not told
    torch.testing.assert_close(net(x, t, **more), net.out(h, torch.ones(())) * net.out_gain, rtol=1e-11, atol=1e-11)


def test_a_vector_joins_the_embedding():
    net = small(cond_shape=(5,), num_classes=3, label_share=0.2).double()
    x, t, more = inputs(net, dtype=torch.float64)
    told = []
    net.modulation.register_forward_pre_hook(lambda layer, args: told.append(args[0]))
    net(x, t, **more)

    def layer(v, weight):
        w = weight / (weight.square().mean(1, keepdim=True).sqrt() + EPS) / math.sqrt(weight.shape[1])
        return v @ w.T

    of = net.condition.embed
    hidden = layer(torch.cat([more["cond"], torch.ones(3, 1).double()], 1), of.first.weight)
    vector = layer(F.silu(hidden) / 0.596, of.second.weight)
    both = 0.8 * net.conditioning(t, more["y"]) + 0.2 * vector
    torch.testing.assert_close(told[0], F.silu(both / math.sqrt(0.8**2 + 0.2**2)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", TIME_SCALES)
def test_the_times_embedding_has_unit_magnitude(kind):
    """Of features of any kind, whose mean square is ½."""
    t = torch.rand(64) * 2 - 1
    assert abs(TimeEmbedding(512, kind)(t).square().mean() - 0.5) < 0.02
    conditioning = MPConditioning(256, None, kind, TIME_SCALES[kind], 512, 0.5)
    assert abs(rms(conditioning(t, None).detach()) - 1) < 0.1


def test_random_phases_are_their_formula():
    before = torch.get_rng_state()
    embedding = TimeEmbedding(400, "fourier_phases", scale=3.0)
    assert torch.equal(torch.get_rng_state(), before), "the numbers must not come from the global generator"
    assert set(embedding.state_dict()) == {"weight", "phases"}
    assert torch.equal(embedding.weight, TimeEmbedding(400, "fourier_phases", scale=3.0).weight)
    assert 2.6 < embedding.weight.std() / (2 * math.pi) < 3.4
    assert 0 <= embedding.phases.min() < 0.1
    assert 6.1 < embedding.phases.max() <= 2 * math.pi
    t = np.array([0.0, -0.2, 1.1])
    expected = np.cos(t[:, None] * embedding.weight.double().numpy() + embedding.phases.double().numpy())
    np.testing.assert_allclose(embedding(torch.tensor(t)).numpy(), expected, rtol=0, atol=1e-12)
    features = embedding(torch.tensor(t).float())
    assert features.dtype == torch.float32
    assert torch.equal(embedding.bfloat16()(torch.tensor(t).float()), features), "angles stay float32"
    embedding.rescale(1.5)
    assert torch.allclose(embedding.weight, TimeEmbedding(400, "fourier_phases", scale=1.5).weight)


@pytest.mark.parametrize("steps", [3, 10, 1000])
def test_neighbouring_steps_of_a_chain_have_features_that_are_alike(steps):
    net = MPUNet((1, 4), **SMALL, time_channels=64)
    fastdiff.ScoreModel(net, fastdiff.DDPM(torch.full((steps,), 0.01).tolist()), data_shape=(1, 4))

    def alike(first, second):
        features = net.conditioning.time(torch.tensor([float(first), float(second)]))
        return float(F.cosine_similarity(*features[:, None], dim=1))

    assert alike(steps // 2, steps // 2 + 1) > 0.8
    assert alike(1, steps) < alike(1, 2) - 0.05
    trained = small((1, 4))
    with pytest.warns(UserWarning, match="time features"):
        fastdiff.ScoreModel(trained, "ddpm", data_shape=(1, 4))
    fastdiff.ScoreModel(net, "ddpm", data_shape=(1, 4)) if steps == 1000 else None
    edm = MPUNet((1, 4), **SMALL)
    fastdiff.ScoreModel(edm, fastdiff.EDM(), "edm", data_shape=(1, 4))
    assert edm.config["time_scale"] == edm.conditioning.time.scale == 1.0


# --- weights of any magnitude ----------------------------------------------------------------------------------------


def layers(net):
    return [m for m in net.modules() if isinstance(m, MPLayer)]


def magnitudes(weight):
    return weight.detach().float().flatten(1).square().mean(1).sqrt()


@pytest.mark.parametrize("kind", ["both", "field"])
def test_the_magnitude_of_an_outputs_weights_means_nothing(kind, monkeypatch):
    net = small(**KINDS[kind]).double()
    x, t, more = inputs(net, dtype=torch.float64)
    monkeypatch.setattr(module, "EPS", 0.0)  # then it holds exactly
    out = net(x, t, **more)
    assert sum(layer.weight.numel() for layer in layers(net)) > 0.99 * sum(p.numel() for p in net.parameters())
    for layer in layers(net):
        layer.weight.data *= torch.rand(len(layer.weight), *[1] * (layer.weight.ndim - 1)).double() * 20 + 0.1
    torch.testing.assert_close(net(x, t, **more), out, rtol=1e-10, atol=1e-10)
    net.normalize()
    torch.testing.assert_close(net(x, t, **more), out, rtol=1e-10, atol=1e-10)
    for layer in layers(net):
        torch.testing.assert_close(magnitudes(layer.weight), torch.ones(len(layer.weight)))


def test_a_forward_changes_no_weights():
    net = small(num_classes=2).train()
    before = copy.deepcopy(net.state_dict())
    x, t, more = inputs(net)
    net(x, t, **more).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.normalize()
    assert all(
        not torch.equal(layer.weight, before[f"{name}.weight"])
        for name, layer in net.named_modules()
        if layer in layers(net)
    )
    assert torch.equal(net.gains, before["gains"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_brings_the_weights_back_before_each_step(dtype, accumulate):
    torch.manual_seed(0)
    net = MPUNet((1, 4, 4), **SMALL).to(dtype)
    for layer in layers(net):
        layer.weight.data *= 5
    model = fastdiff.ScoreModel(net, fastdiff.EDM(), "edm", data_shape=(1, 4, 4))
    seen = []
    for layer in layers(net):
        layer.register_forward_pre_hook(lambda layer, args: seen.append(magnitudes(layer.weight)))
    weight = layers(net)[0].weight.detach().clone()
    fastdiff.train(model, torch.randn(8, 1, 4, 4), steps=3, batch_size=4, lr=0.1, accumulate=accumulate)
    assert len(seen) == 3 * accumulate * len(layers(net))
    most = 1e-3 if dtype == torch.float32 else 4e-3  # ε, and the rounding of weights to eight bits
    assert max(float((each - 1).abs().max()) for each in seen) < most
    assert not torch.allclose(layers(net)[0].weight.float(), weight.float() / 5, atol=0.01)


def test_it_learns():
    """Of two equally likely points ±a and noise of σ = 3: E[x0 | x] = a tanh(a·x/σ²)."""
    torch.manual_seed(0)
    net = MPUNet((1, 8), channels=16, multipliers=(1,), blocks=1, attention=())
    model = fastdiff.ScoreModel(net, fastdiff.EDM(), "edm", data_shape=(1, 8))
    a = torch.tensor([1.0, -1.0] * 4).view(1, 1, 8)
    x = a * torch.tensor([1.0, -1.0] * 100).view(-1, 1, 1) + 3 * torch.randn(200, 1, 8)
    mean = a * torch.tanh((a * x).sum((1, 2), keepdim=True) / 9)

    def error():
        with torch.no_grad():
            return float(rms(model.predict("x0", x, torch.full((200,), 3.0)) - mean))

    untrained = error()
    options = {"steps": 120, "batch_size": 64, "lr": 0.02, "warmup": 10, "ema": 0.9, "loss": "simple"}
    fastdiff.train(model, torch.cat([a, -a]).repeat(32, 1, 1), **options)
    assert untrained > 0.6
    assert error() < 0.3


# --- nothing that a device would have to wait for --------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """The names of what runs beneath autograd."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@kinds
@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_a_call_reads_nothing_back_and_copies_nothing_from_the_host(kind, taps):
    """So that it can be captured in a CUDA graph; and it can be built and called where tensors are shapes alone."""
    net = small(**KINDS[kind], taps=taps)
    x, t, more = inputs(net)
    with Operations() as operations:
        net(x, t, **more)
    assert operations.names & {"convolution", "cos"} == {"convolution", "cos"}
    assert not operations.names & {"lift_fresh", "_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}
    with torch.device("meta"):
        shapes = MPUNet(**net.config)
    x, t, *rest = (v.to("meta") for v in (x, t, *more.values()))
    assert shapes(x, t, **dict(zip(more, rest))).shape == x.shape


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_channels_side_by_side_give_the_same(shape):
    net = small(shape, num_classes=3)
    x, t, more = inputs(net)
    out = net(x, t, **more)
    order = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    lying = net.to(memory_format=order)(x.contiguous(memory_format=order), t, **more)
    torch.testing.assert_close(lying, out, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(net(x.contiguous(memory_format=order), t, **more), out, rtol=1e-5, atol=1e-5)


def test_samples_are_those_of_the_network_without_features_made_ahead():
    net = small((1, 8))
    options = {"steps": 4, "num_samples": 2, "seed": 3}
    ours = fastdiff.sample(fastdiff.ScoreModel(net, fastdiff.EDM(), "edm", data_shape=(1, 8)), **options)
    plain = fastdiff.ScoreModel(lambda x, t: net(x, t), fastdiff.EDM(), "edm", data_shape=(1, 8))
    torch.testing.assert_close(ours, fastdiff.sample(plain, **options), rtol=1e-4, atol=1e-5)


# --- the source's files ----------------------------------------------------------------------------------------------

THEIRS = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8}
BALANCES = {"res_balance": 0.4, "attn_balance": 0.8, "label_balance": 0.2, "concat_balance": 0.7}


def theirs(labels=5, channels=4):
    """Tensors of EDM2's Precond(8, channels, labels, **THEIRS), by the names and shapes of its state dict."""
    shapes = {"out_gain": (), "emb_fourier.freqs": (8,), "emb_fourier.phases": (8,), "emb_noise.weight": (16, 8)}
    shapes |= {"emb_label.weight": (16, labels)} if labels else {}
    shapes |= {"enc.8x8_conv.weight": (8, channels + 1, 3, 3), "out_conv.weight": (channels, 8, 3, 3)}
    blocks = {  # inputs, outputs, attention
        "enc.8x8_block0": (8, 8, False), "enc.4x4_down": (8, 8, False), "enc.4x4_block0": (8, 16, True),
        "dec.4x4_in0": (16, 16, True), "dec.4x4_in1": (16, 16, False), "dec.4x4_block0": (32, 16, True),
        "dec.4x4_block1": (24, 16, True), "dec.8x8_up": (16, 16, False), "dec.8x8_block0": (24, 8, False),
        "dec.8x8_block1": (16, 8, False),
    }  # fmt: skip
    for name, (inputs, outputs, attention) in blocks.items():
        first = outputs if name.startswith("enc") else inputs
        shapes |= {f"{name}.emb_gain": (), f"{name}.emb_linear.weight": (outputs, 16)}
        shapes |= {
            f"{name}.conv_res0.weight": (outputs, first, 3, 3),
            f"{name}.conv_res1.weight": (outputs, outputs, 3, 3),
        }
        shapes |= {f"{name}.conv_skip.weight": (outputs, inputs, 1, 1)} if inputs != outputs else {}
        if attention:
            shapes |= {f"{name}.attn_qkv.weight": (3 * outputs, outputs, 1, 1)}
            shapes |= {f"{name}.attn_proj.weight": (outputs, outputs, 1, 1)}
    shapes = {f"unet.{name}": shape for name, shape in shapes.items()}
    shapes |= {"logvar_fourier.freqs": (128,), "logvar_fourier.phases": (128,), "logvar_linear.weight": (1, 128)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("labels", [0, 5])
def test_a_files_tensors_say_what_network_it_is(labels):
    tensors = {name: value.half() for name, value in theirs(labels).items()}
    net = edm2_source.network(tensors, channels_per_head=8, dropout=0.1, **BALANCES)
    expected = MPUNet(
        (4, 8, 8), channels=8, multipliers=(1, 2), blocks=1, attention=(1,), head_channels=8, num_classes=labels or None,
        dropout=0.1, residual_share=0.4, attention_share=0.8, label_share=0.2, skip_share=0.7, time_scale=1.0,
    )  # fmt: skip
    assert net.config == expected.config
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(p.isfinite().all() and p.requires_grad for p in net.parameters())
    inner = {name.removeprefix("unet."): value for name, value in tensors.items() if name.startswith("unet.")}
    alone = edm2_source.network(inner, (4, 8, 8), channels_per_head=8, dropout=0.1, **BALANCES)
    assert all(torch.equal(alone.state_dict()[name], value) for name, value in net.state_dict().items())
    # their rows are of heads, channels, (q, k, v)
    rows = net.up[0].attend.qkv.weight.view(3, 2, 8, 16)
    theirs_rows = tensors["unet.dec.4x4_in0.attn_qkv.weight"].float().view(2, 8, 3, 16)
    assert all(torch.equal(rows[i], theirs_rows[:, :, i]) for i in range(3))
    used = sum(value.numel() for value in inner.values())
    assert sum(value.numel() for value in net.state_dict().values()) == used


@pytest.mark.parametrize("channels", [3, 4])
def test_a_file_becomes_a_model(channels, tmp_path):
    """Of colours their range is known, of latents it is not."""
    torch.save({"ema": theirs(channels=channels), "encoder": {"scale": torch.ones(4)}}, tmp_path / "a.pt")
    model = fastdiff.load(tmp_path / "a.pt", source="edm2", config={"channels_per_head": 8, "model_channels": 8})
    assert (model.prediction, model.time_input, model.process) == ("edm", "c_noise", fastdiff.EDM(0.5, 0.002, 80.0))
    assert (model.data_shape, model.num_classes, model.range_given) == ((channels, 8, 8), 5, channels == 3)
    assert model.data_range == (-1, 1)
    torch.save(theirs(0), tmp_path / "b.pt")  # the network alone
    facts = {"sigma_data": 1.0, "channels_per_head": 8, "res_balance": 0.4}
    model = fastdiff.load(tmp_path / "b.pt", source="edm2", part="unet", config=facts)
    assert (model.process.sigma_data, model.net.config["residual_share"], model.num_classes) == (1.0, 0.4, None)


def test_files_that_do_not_fit_are_refused():
    tensors = theirs()
    read = edm2_source.network
    with pytest.raises(errors.ConfigError, match=r"shape must be \(4, 8, 8\).*got \(3, 8, 8\)"):
        read(tensors, (3, 8, 8), channels_per_head=8)
    with pytest.raises(errors.CheckpointMismatchError, match="part='ema'"):
        read({f"ema.{name}": value for name, value in tensors.items()})
    for name in tensors:
        lacks = {key: value for key, value in tensors.items() if key != name}
        if name.startswith("logvar") or name == "unet.emb_label.weight":  # one without labels has none
            assert read(lacks, channels_per_head=8).num_classes == (5 if name.startswith("logvar") else None)
        else:
            with pytest.raises(errors.CheckpointMismatchError):
                read(lacks, channels_per_head=8)
    for name in (
        "unet.enc.8x8_block0.attn_qkv.weight",
        "unet.map_noise.freqs",
        "unet.dec.8x8_up.bias",
        "encoder.scale",
    ):
        with pytest.raises(errors.CheckpointMismatchError, match=r"no place|lacks"):
            read({**tensors, name: torch.randn(24, 8, 1, 1)}, channels_per_head=8)
    with pytest.raises(errors.CheckpointMismatchError, match=r"'down.1.last.weight' must have the shape"):
        read({**tensors, "unet.enc.4x4_down.conv_res1.weight": torch.randn(8, 9, 3, 3)}, channels_per_head=8)


# --- the source itself -----------------------------------------------------------------------------------------------


@pytest.fixture
def networks_edm2():
    with modules_of("NVlabs/edm2"):
        from training import networks_edm2

        yield networks_edm2


def hot(y, count):
    """Labels as the source has them: a one in their place, and none for no label."""
    return None if count is None else F.one_hot(y, count + 1)[:, :count].float()


def their_network(networks_edm2, labels=5, res=8, channels=4, **changes):
    """One with every number drawn, also those that start at zero, and rows of weights of any magnitude."""
    torch.manual_seed(0)
    net = networks_edm2.Precond(res, channels, labels, **{**THEIRS, **changes}).eval()
    for p in net.parameters():
        nn.init.normal_(p)
        p.data *= torch.rand(len(p), *[1] * (p.ndim - 1)) * 3 if p.ndim else 1
    return net


OPTIONS = {
    "labels": ({}, {}),
    "no labels": ({"labels": 0}, {}),
    "levels": ({"channel_mult": [1, 1, 2], "num_blocks": 2, "attn_resolutions": [8, 2]}, {}),
    "heads": ({"channel_mult": [2, 3], "attn_resolutions": [8, 4]}, {"channels_per_head": 4}),
    "one level": ({"channel_mult": [2], "attn_resolutions": [], "channels": 1}, {}),
    "filter": ({}, {"resample_filter": [1, 3, 3, 1]}),
    "balances": ({}, BALANCES),
    "clip": ({}, {"clip_act": 0.5}),
    "no clip": ({}, {"clip_act": None}),
    "widths": ({"channel_mult_noise": 3, "channel_mult_emb": 1}, {}),
    "resolution": ({"res": 16, "attn_resolutions": [16, 8]}, {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_its_numbers_are_the_sources(name, networks_edm2):
    inferred, given = OPTIONS[name]
    original = their_network(networks_edm2, **{**inferred, **given})
    net = edm2_source.network(original.state_dict(), **{"channels_per_head": 8, **given}).eval()
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in original.unet.parameters())
    count = net.num_classes
    x, t = torch.randn(4, *net.shape), torch.tensor([-1.55, -0.3, 0.0, 1.09])
    y = None if count is None else torch.tensor([0, 3, count, 1])
    with torch.no_grad():
        close(net(x, t, y), original.unet(x, t, hot(y, count)))
        # with EDM's preconditioning
        model = fastdiff.ScoreModel(net, fastdiff.EDM(0.5), "edm", data_shape=net.shape, cond_dropout=0.1)
        sigma = torch.tensor([0.002, 0.7, 3.0, 80.0])
        noisy = x * sigma.view(-1, 1, 1, 1)
        close(model.predict("x0", noisy, sigma, y), original(noisy, sigma, hot(y, count)))
        if count is not None:
            close(net(x, t), original.unet(x, t, torch.zeros(1, count)))


def test_the_tables_names_are_the_sources(networks_edm2):
    for labels in (0, 5):
        state = their_network(networks_edm2, labels).state_dict()
        assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in theirs(labels).items()}


@pytest.mark.parametrize("channels", [3, 4])
def test_its_pickles_are_read(networks_edm2, channels, tmp_path):
    """As its training writes them: float16, the classes' source beside them, an encoder with numbers of its own."""
    import dnnlib
    from training import encoders

    original = their_network(networks_edm2, channels=channels).requires_grad_(False)
    encoder = encoders.StandardRGBEncoder() if channels == 3 else encoders.StabilityVAEEncoder()
    data = dnnlib.EasyDict(encoder=encoder, dataset_kwargs={"path": "x"}, loss_fn=None)
    data.ema = copy.deepcopy(original).to(torch.float16)
    path = tmp_path / "snapshot.pkl"
    path.write_bytes(pickle.dumps(data))
    beside = [name for name in fastdiff.load_tensors(path) if not name.startswith("ema.")]
    assert beside == ([] if channels == 3 else ["encoder.scale", "encoder.bias"])
    tensors, state = fastdiff.load_tensors(path, part="ema"), data.ema.state_dict()
    assert list(tensors) == list(state)
    assert all(torch.equal(tensors[name], value) for name, value in state.items())

    model = fastdiff.load(path, source="edm2", config={"channels_per_head": 8, "model_channels": 8})
    assert (model.num_classes, model.prediction, model.time_input, model.process) == (
        5,
        "edm",
        "c_noise",
        fastdiff.EDM(),
    )
    assert model.range_given == (channels == 3)
    x, t, y = torch.randn(3, channels, 8, 8), torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0, 4, 2])
    with torch.no_grad():
        # theirs divides its gains in half precision
        close(model.predict("x0", x, t, y), data.ema(x, t, hot(y, 5)), 2**-11)
        close(model.predict("x0", x, t, y), data.ema.float()(x, t, hot(y, 5)))

    state = {"state": {"cur_nimg": 3}, "net": original.state_dict(), "loss_fn": None}
    torch.save(state, tmp_path / "training-state.pt")
    again = fastdiff.load(tmp_path / "training-state.pt", source="edm2", part="net", config={"channels_per_head": 8})
    with torch.no_grad():
        close(again.predict("x0", x, t, y), original(x, t, hot(y, 5)))


def test_samples_are_those_of_the_sources_sampler(networks_edm2):
    code = (checkout("NVlabs/edm2") / "generate_images.py").read_text()
    code = code[code.index("def edm_sampler(") : code.index("#----", code.index("def edm_sampler("))]
    names = {"np": np, "torch": torch}
    exec(code, names)
    original = their_network(networks_edm2)
    net = edm2_source.network(original.state_dict(), channels_per_head=8).eval()
    model = fastdiff.ScoreModel(net, fastdiff.EDM(), "edm", data_shape=net.shape)
    z, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 3])
    with torch.no_grad():
        expected = names["edm_sampler"](original, z, hot(y, 5), num_steps=12)
    ours = fastdiff.sample(model, x_init=80 * z, num_samples=2, steps=12, sampler="heun", grid="karras", cond=y)
    close(ours, expected, 1e-4)


def test_a_training_takes_the_sources_steps(networks_edm2):
    """Theirs brings the weights back within the forward pass, here `normalize` does before it: the same steps of Adam."""
    original = their_network(networks_edm2).unet.train()
    net = edm2_source.network(original.state_dict(), channels_per_head=8).train()
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0, 4, 2])
    target = torch.randn(3, 4, 8, 8)
    calls = [(original, lambda: original(x, t, hot(y, 5))), (net, lambda: (net.normalize(), net(x, t, y))[1])]
    lost = []
    for trained, call in calls:
        optimiser = torch.optim.Adam(trained.parameters(), lr=0.05, betas=(0.9, 0.99), eps=1e-4)
        for _ in range(4):
            optimiser.zero_grad()
            loss = (call() - target).square().mean()
            loss.backward()
            optimiser.step()
            lost.append(float(loss.detach()))
    assert lost[3] < 0.9 * lost[0]
    np.testing.assert_allclose(lost[4:], lost[:4], rtol=1e-4)
    expected = edm2_source.network(original.state_dict(), channels_per_head=8)
    for name, value in expected.state_dict().items():
        close(net.state_dict()[name], value, 2e-3)  # a step of Adam is ±lr also where a gradient is little but rounding
