"""The RefineNets of NCSN and NCSNv2: their equations, their facts, and the sources' own code on the same weights."""

from __future__ import annotations

import functools
import importlib
import json
import math
import types

import numpy as np
import pytest
import torch
from strangers import modules_of, score_sde_stand_ins
from torch import nn

import fastdiff
import fastdiff.errors as errors
from fastdiff.networks import build, describe
from fastdiff.networks.refinenet import ACTIVATIONS, NORMS, Block, Norm, Refine, RefineNet, ncsn, ncsnv2
from fastdiff.training.sources import ncsn as importer

SHAPES = [(1, 8), (2, 13), (3, 1), (1, 8, 8), (3, 7, 10), (5, 1, 6), (2, 1, 1), (1, 2, 3, 5), (2, 4, 1, 7)]
SMALL = {"channels": 4, "levels": 3, "multipliers": (1, 2, 2), "dilations": (1, 1, 2)}
PRESETS = {"ncsn": ncsn, "ncsnv2": ncsnv2}


def random(net: nn.Module) -> nn.Module:
    """Numbers that keep the size of what runs through, and depend on everything."""
    for name, p in net.named_parameters():
        fan = p[0].numel() if p.ndim > 2 else 1
        nn.init.normal_(p, 0.0, fan**-0.5 if "embed" not in name and "table" not in name else 1.0)
    return net


def small(shape: tuple[int, ...] = (2, 6, 4), **changes: object) -> RefineNet:
    torch.manual_seed(0)
    return random(RefineNet(shape, **{**SMALL, **changes}))


def unconditional(shape: tuple[int, ...] = (2, 6, 4), **changes: object) -> RefineNet:
    return small(shape, **{"levels": None, "refine_norm": False, "pooling": "max", **changes})


def inputs(shape: tuple[int, ...] = (2, 6, 4), batch: int = 3, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *shape, generator=generator, dtype=dtype), torch.arange(batch) % 3


both = pytest.mark.parametrize("make", [small, unconditional])


# --- equations -------------------------------------------------------------------------------------------------------


def normalised(x: np.ndarray, kind: str, gain: np.ndarray, alpha: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """As the papers have it, sample by sample and channel by channel."""
    out = np.empty_like(x)
    for b, sample in enumerate(x):
        means = np.array([channel.mean() for channel in sample])
        m = (means - means.mean()) / np.sqrt(means.var(ddof=1) + 1e-5)
        for c, channel in enumerate(sample):
            if kind == "instance++":
                n = (channel - means[c]) / np.sqrt(channel.var() + 1e-5) + alpha[b, c] * m[c]
            elif kind == "instance":
                n = (channel - means[c]) / np.sqrt(channel.var() + 1e-5)
            elif kind == "variance":
                n = channel / np.sqrt(channel.var(ddof=1) + 1e-5)
            else:
                n = channel
            out[b, c] = gain[b, c] * n + shift[b, c]
    return out


@pytest.mark.parametrize("size", [(7,), (3, 5), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", NORMS)
def test_normalisations_are_their_equations(kind, bias, size):
    x = torch.randn(2, 4, *size, dtype=torch.float64) + 3 * torch.randn(2, 4, *[1] * len(size), dtype=torch.float64)
    values = {name: torch.randn(2, 4, dtype=torch.float64) for name in ("gain", "mean", "shift")}
    used = [name for name in NORMS[kind] if bias or name != "shift"]
    told = torch.cat([values[name] for name in used], 1)
    norm = Norm({"norm": kind, "norm_bias": bias}, 4)
    expected = normalised(x.numpy(), kind, *(values[n].numpy() * (n in used) for n in ("gain", "mean", "shift")))
    assert norm.width == told.shape[1]
    np.testing.assert_allclose(norm(x, told).numpy(), expected, rtol=1e-9, atol=1e-9)
    one = told[:1].expand(2, -1)
    torch.testing.assert_close(norm(x, told[:1]), norm(x, one), rtol=0, atol=0)


def config(**changes: object) -> dict:
    return {**RefineNet((1, 4), channels=2).config, **changes}


def numbers(module: nn.Module) -> torch.Tensor:
    return torch.randn(2, sum(module.widths), dtype=torch.float64)


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("down", [True, False])
def test_a_block_is_its_equation(down, dilation):
    outputs = 6 if down else 4
    block = random(Block(config(), 2, 4, outputs, dilation, down)).double()
    told, x = numbers(block), torch.randn(2, 4, 6, 8, dtype=torch.float64)
    pads = {"padding": dilation, "dilation": dilation}
    conv = nn.functional.conv2d
    h = conv(nn.functional.elu(block.norm(x, told[:, :12])), block.conv.weight, block.conv.bias, **pads)
    h = conv(nn.functional.elu(block.norm2(h, told[:, 12:])), block.last.weight, block.last.bias, **pads)
    if down and dilation == 1:  # the mean of every second place and its neighbours
        skip = conv(x, block.skip.weight, block.skip.bias)
        h, skip = (
            (v[..., ::2, ::2] + v[..., 1::2, ::2] + v[..., ::2, 1::2] + v[..., 1::2, 1::2]) / 4 for v in (h, skip)
        )
    else:
        skip = conv(x, block.skip.weight, block.skip.bias, **pads) if down else x
    torch.testing.assert_close(block(told, x), skip + h, rtol=1e-12, atol=1e-12)


def test_the_last_of_an_odd_axis_is_a_mean_by_itself():
    block = Block(config(norm="affine", norm_bias=False), 1, 2, 2, 1, True)
    for layer in (block.conv, block.last):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.dirac_(block.skip.weight)
    nn.init.zeros_(block.skip.bias)
    x = torch.arange(10.0).view(1, 2, 5)
    assert block(torch.ones(1, 4), x).tolist() == [[[0.5, 2.5, 4.0], [5.5, 7.5, 9.0]]]


def between_corners(n: int, size: int) -> torch.Tensor:
    """The matrix [size, n] of linear interpolation of n values to `size`, both ends kept."""
    at = np.linspace(0, n - 1, size)
    return torch.from_numpy(np.stack([np.interp(at, np.arange(n), row) for row in np.eye(n)], 1))


def windows(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The mean or the maximum of the 25 places around each, by shifts."""
    fill = 0.0 if kind == "average" else -math.inf
    padded = nn.functional.pad(x, [2] * 4, value=fill)
    height, width = x.shape[2:]
    shifted = torch.stack([padded[..., i : i + height, j : j + width] for i in range(5) for j in range(5)])
    return shifted.mean(0) if kind == "average" else shifted.amax(0)


@pytest.mark.parametrize("pooling", ["average", "max"])
@pytest.mark.parametrize("refine_norm", [True, False])
@pytest.mark.parametrize("inputs", [[4], [6, 4]], ids=str)
def test_a_refine_block_is_its_equation(inputs, refine_norm, pooling):
    outputs = 4 if len(inputs) == 1 else 3
    options = config(refine_norm=refine_norm, pooling=pooling, activation="silu")
    block = random(Refine(options, 2, inputs, outputs, last=True)).double()
    told = numbers(block)
    xs = [torch.randn(2, c, *size, dtype=torch.float64) for c, size in zip(inputs, ((6, 5), (3, 4)))]
    norms = [module for module in block.modules() if isinstance(module, Norm) and module.width]
    parts, f = iter(zip(norms, told.split([norm.width for norm in norms], 1))), nn.functional.silu
    assert len(norms) == (refine_norm and 4 * len(inputs) + 6 + 2 + (len(inputs) if len(inputs) > 1 else 0))

    def norm(x):
        if not refine_norm:
            return x
        module, values = next(parts)
        return module(x, values)

    def residual(x, convs):
        for first, second in zip(convs[::2], convs[1::2]):
            h = nn.functional.conv2d(f(norm(x)), first.weight, padding=1)
            x = x + nn.functional.conv2d(f(norm(h)), second.weight, padding=1)
        return x

    hs = [residual(x, adapt.convs) for x, adapt in zip(xs, block.adapt)]
    if len(inputs) > 1:
        hs = [nn.functional.conv2d(norm(h), c.weight, c.bias, padding=1) for h, c in zip(hs, block.fuse)]
        hs[1] = torch.einsum("bchw,Hh,Ww->bcHW", hs[1], between_corners(3, 6), between_corners(4, 5))
    h = path = f(sum(hs))
    for conv in block.chain:
        path = nn.functional.conv2d(windows(norm(path), pooling), conv.weight, padding=1)
        h = h + path
    assert len(block.output.convs) == 6
    torch.testing.assert_close(block(told, *xs), residual(h, block.output.convs), rtol=1e-12, atol=1e-12)


def test_averages_in_three_dimensions_are_those_of_zeros_beyond_the_ends():
    block = Refine(config(refine_norm=False, activation="relu"), 3, [1], 1, last=False)
    for name, p in block.named_parameters():
        nn.init.zeros_(p) if "chain" not in name else nn.init.dirac_(p)
    x = torch.rand(1, 1, 2, 7, 3, dtype=torch.float64)
    ones = torch.ones(1, 1, 5, 5, 5, dtype=torch.float64) / 125
    first = nn.functional.conv3d(x, ones, padding=2)
    expected = x + first + nn.functional.conv3d(first, ones, padding=2)
    torch.testing.assert_close(block.double()(torch.ones(1, 0), x), expected, rtol=1e-12, atol=1e-12)


# --- facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_of_any_rank_and_lengths(preset, shape):
    net = PRESETS[preset](shape, channels=4, out_channels=5)
    for batch in (3, 0):
        out = net(torch.randn(batch, *shape), torch.zeros(batch))
        assert out.shape == (batch, 5, *shape[1:])
        assert out.isfinite().all()


# of the sources' own networks, of CIFAR-10, MNIST, and NCSNv2 up to 64, 128 and 256 pixels (a test below counts them)
COUNTS = [
    ("ncsn", (3, 32, 32), {}, 30_117_635),
    ("ncsn", (1, 28, 28), {"channels": 64}, 7_638_657),
    ("ncsnv2", (3, 32, 32), {}, 29_694_083),
    ("ncsnv2", (3, 64, 64), {}, 29_694_083),
    ("ncsnv2", (3, 96, 96), {}, 83_445_379),
    ("ncsnv2", (3, 128, 128), {}, 83_445_379),
    ("ncsnv2", (3, 256, 256), {}, 94_132_611),
]


@pytest.mark.parametrize(("preset", "shape", "changes", "count"), COUNTS)
def test_sizes_are_the_papers_and_no_memory_is_needed_to_say_so(preset, shape, changes, count):
    with torch.device("meta"):
        net = PRESETS[preset](shape, **changes)
    assert sum(p.numel() for p in net.parameters()) == count
    assert not list(net.buffers())


@pytest.mark.parametrize("kind", NORMS)
def test_a_new_network_has_the_papers_numbers(kind):
    net = RefineNet((1, 8, 8), channels=16, norm=kind)
    parts = {name: [] for name in NORMS[kind]}
    start = 0
    for norm in net.norms():
        for name in norm.names:
            parts[name].append(net.table.weight[:, start : start + norm.channels])
            start += norm.channels
    assert start == net.table.weight.shape[1]
    for name, values in parts.items():
        values = torch.cat(values, 1)
        assert values.numel() > 10_000
        if name == "shift":
            assert not values.any()
        elif kind in ("instance++", "variance"):
            assert abs(values.mean() - 1) < 0.001
            assert abs(values.std() - 0.02) < 0.001
        else:
            assert values.min() >= 0
            assert values.max() <= 1
            assert abs(values.mean() - 0.5) < 0.02


@both
@pytest.mark.parametrize("kind", NORMS)
def test_every_parameter_gets_a_gradient(make, kind):
    net = make(norm=kind)
    x, t = inputs()
    net(x, t).square().sum().backward()
    assert [name for name, p in net.named_parameters() if not p.grad.any()] == []
    # each number of each normalisation too; no affine map is left out
    assert (net.table.weight.grad != 0).float().mean() > 0.9


def test_a_level_is_its_row_and_no_other():
    net = small()
    x, t = inputs()
    out = net(x, t)
    assert torch.equal(net(x, t.double()), out)
    assert torch.equal(net(x, t + 0.4), out)
    assert torch.equal(net(x, t - 0.4), out)
    assert torch.equal(net(x, t.to(torch.uint8)), out)
    same = net(x[:1].expand(3, -1, -1, -1), t)
    assert all(not torch.allclose(same[i], same[j]) for i in range(3) for j in range(i))
    net(x, torch.full((3,), 1)).sum().backward()
    assert net.table.weight.grad.any(1).tolist() == [False, True, False]
    changed = net(x, t)
    with torch.no_grad():
        net.table.weight[2] += 1
    assert torch.equal(net(x, t)[:2], changed[:2])
    assert not torch.allclose(net(x, t)[2], changed[2])


def test_an_unconditional_network_is_told_nothing():
    net = unconditional()
    x, t = inputs()
    assert net.conditioning is None
    assert torch.equal(net(x, t), net(x, t * 1000.0))
    assert net.time_features(t).shape == (3, 0)


@pytest.mark.parametrize("t", [[3], [-1], [0.0, 2.6], [math.nan]])
def test_levels_that_there_are_not_are_refused(t):
    with pytest.raises(errors.DataError, match=r"t must hold indices of noise levels >= 0 and <= 2, got values from"):
        small()(torch.zeros(len(t), 2, 6, 4), torch.tensor(t))


@both
def test_samples_do_not_see_each_other(make):
    net = make().double()
    x, t = inputs(dtype=torch.float64)
    out = net(x, t)
    for i in range(3):
        torch.testing.assert_close(net(x[i : i + 1], t[i : i + 1])[0], out[i], rtol=1e-11, atol=1e-11)
    spoilt = x.clone()
    spoilt[1] = math.nan
    after = net(spoilt, t)
    torch.testing.assert_close(after[[0, 2]], out[[0, 2]], rtol=1e-11, atol=1e-11)
    assert after[1].isnan().all()


@both
def test_features_made_ahead_give_the_same(make):
    net = make()
    x, t = inputs()
    features = net.time_features(t)
    torch.testing.assert_close(net(x, t, features=features), net(x, t), rtol=0, atol=0)
    for k in range(3):
        out = net(x, t[k].expand(3), features=features[k : k + 1])
        torch.testing.assert_close(out, net(x, t[k].expand(3)), rtol=1e-5, atol=1e-5)


@both
def test_uncentered_samples_are_seen_twice_less_one(make):
    net, other = make(centered=False), make()
    other.load_state_dict(net.state_dict())
    x, t = inputs()
    assert torch.equal(net(x, t), other(2 * x - 1, t))
    assert not torch.allclose(net(x, t), other(x, t))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_the_sources(activation):
    x = torch.linspace(-2, 2, 9)
    expected = {
        "elu": torch.where(x > 0, x, x.exp() - 1),
        "relu": x.clamp(min=0),
        "leaky_relu": torch.where(x > 0, x, 0.2 * x),
        "silu": x / (1 + (-x).exp()),
    }
    torch.testing.assert_close(ACTIVATIONS[activation](x), expected[activation])
    net, elu = (small(activation=name) for name in (activation, "elu"))
    x, t = inputs()
    assert torch.allclose(net(x, t), elu(x, t)) == (activation == "elu")


@both
def test_blocks_that_keep_nothing_have_the_same_gradients(make):
    x, t = inputs()
    found, saved = [], []
    for recompute in (False, True):
        net = make(recompute=recompute)
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = net(x, t)
        saved.append(count)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in net.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert saved[1] < saved[0] / 2


@both
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.1)])
def test_any_dtype_and_strided_inputs(make, dtype, tolerance):
    net = make(norm="instance++")
    x, t = inputs()
    single = net(x, t)
    torch.testing.assert_close(net(x.mT.contiguous().mT, t), single)
    out = net.to(dtype)(x.to(dtype), t)
    assert out.dtype == dtype
    assert (out.float() - single).norm() < tolerance * single.norm()


def test_channels_last_and_autocast():
    net = small()
    x, t = inputs()
    single = net(x, t)
    net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x, t), single, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # where the compiled library normalises
        torch.testing.assert_close(net(x, t), single, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t)
    assert (out.float() - single).norm() < 0.1 * single.norm()


@pytest.mark.parametrize("kind", NORMS)
def test_derivatives_are_those_of_differences_for_each_sample(kind):
    """To second order, and under vmap: exact traces and sliced losses need them."""
    net = small((1, 6), norm=kind, multipliers=(1, 2), dilations=(1, 1), activation="silu").double()
    x, t = inputs((1, 6), 2, torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda x, t: net(x[None], t[None])[0]))(x, t)
    for i in range(2):
        expected = torch.autograd.functional.jacobian(lambda x, i=i: net(x[None], t[i : i + 1])[0], x[i])
        torch.testing.assert_close(jacobians[i], expected, rtol=1e-10, atol=1e-12)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x, t), x)
    assert torch.autograd.gradgradcheck(lambda x: net(x, t).square().sum(), x)


@pytest.mark.parametrize(
    "changes",
    [{}, {"levels": None, "refine_norm": False, "pooling": "max", "activation": "silu"},
     {"norm": "instance", "norm_bias": False, "centered": False, "out_channels": 4, "recompute": True}],
    ids=str,
)  # fmt: skip
def test_configs_round_trip(changes):
    net = small(**changes)
    assert {name: net.config[name] for name in changes} == changes
    assert RefineNet(**json.loads(json.dumps(net.config))).config == net.config
    built = build(json.loads(json.dumps(describe(net))))
    assert describe(built) == describe(net)
    assert describe(net)["name"] == "refinenet"
    built.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(built(*inputs()), net(*inputs()))


@both
def test_models_are_saved_and_loaded(make, tmp_path):
    net = make()
    kind = "score" if make is small else "scaled_score"
    model = fastdiff.ScoreModel(net, fastdiff.NCSN([1.0, 0.3, 0.1]), kind, data_shape=net.shape)
    loaded = fastdiff.load(fastdiff.save(model, tmp_path / "model"))
    x, t = torch.randn(3, 2, 6, 4), torch.tensor([3.0, 2.0, 1.0])
    assert loaded.net.config == net.config
    assert loaded.time_input == model.time_input
    assert torch.equal(loaded(x, t), model(x, t))


def test_a_model_gives_the_index_of_the_level():
    """Process times run from 1, the smallest level, to L; the network counts from 0, the largest."""
    net = small()
    sigmas = [1.0, 0.3, 0.1]
    model = fastdiff.ScoreModel(net, fastdiff.NCSN(sigmas), "score", data_shape=net.shape)
    assert model.time_input == "index"
    x, _ = inputs()
    assert torch.equal(model(x, torch.tensor([3.0, 2.0, 1.0])), net(x, torch.tensor([0, 1, 2])))
    with pytest.raises(errors.ConfigError, match="index"):
        fastdiff.ScoreModel(net, "ve", "score", data_shape=net.shape)
    told = fastdiff.ScoreModel(net, fastdiff.NCSN(sigmas), "score", "t", net.shape)
    with pytest.raises(errors.DataError, match="time_input='index'"):
        told(x, torch.tensor([3.0, 2.0, 1.0]))
    free = fastdiff.ScoreModel(unconditional(), "ve", "scaled_score", data_shape=net.shape)
    assert free.time_input == "t"


@both
def test_a_run_asks_the_levels_once_and_samples_the_same(make, monkeypatch):
    net = make()
    nn.init.zeros_(net.out.weight)  # a score of numbers of any size would leave for infinity
    nn.init.normal_(net.out.bias)
    nn.init.normal_(net.out.weight, std=1e-3)
    options = {"num_samples": 3, "steps": 6, "progress": False}
    process = fastdiff.NCSN([1.0, 0.3, 0.1])
    model = fastdiff.ScoreModel(net, process, "score", data_shape=net.shape)
    calls, of_time = [], RefineNet.time_features
    monkeypatch.setattr(RefineNet, "time_features", lambda self, t: calls.append(len(t)) or of_time(self, t))
    ours = fastdiff.sample(model, **options)
    assert calls in ([1, 6], [1, 7])  # the last step removes what noise is left
    monkeypatch.undo()
    plain = nn.Module()
    plain.forward = lambda x, t: net(x, t)
    index = "index" if make is small else "t"
    theirs = fastdiff.sample(fastdiff.ScoreModel(plain, process, "score", index, net.shape), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert ours.std() > 0.01


@both
def test_a_model_is_trained(make, tmp_path):
    net = make((1, 4, 4))
    kind = "score" if make is small else "scaled_score"
    model = fastdiff.ScoreModel(net, fastdiff.NCSN([1.0, 0.3, 0.1]), kind, data_shape=net.shape)
    before = {name: p.clone() for name, p in net.named_parameters()}
    fastdiff.train(model, torch.rand(32, 1, 4, 4) * 2 - 1, steps=3, batch_size=16, checkpoint=tmp_path, progress=False)
    assert [name for name, p in net.named_parameters() if torch.equal(p, before[name])] == []


BAD = {
    "shape": [8, (1, 0)], "channels": [1, 8.5], "multipliers": [(), (1, 0), (1, 2)], "dilations": [(1, 1), (1, 1, 0)],
    "levels": [0, 1.5, "ten"], "norm": ["batch"], "norm_bias": [1], "refine_norm": [None], "pooling": ["mean"],
    "activation": ["gelu"], "centered": ["no"], "out_channels": [0], "recompute": [2],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_arguments_are_refused(name, value):
    with pytest.raises(errors.ConfigError, match=r"^(dilations|" + name + r")(\[\d\])? must .*got"):
        small(**{name: value})


def test_bad_calls_are_refused():
    net = small()
    with pytest.raises(errors.ShapeError, match="shape must be"):
        RefineNet((3,))
    with pytest.raises(errors.ShapeError, match="x must have shape"):
        net(torch.zeros(2, 2, 4, 6), torch.zeros(2))
    with pytest.raises(errors.DTypeError, match="x must have the network's dtype"):
        net(torch.zeros(2, 2, 6, 4).double(), torch.zeros(2))
    with pytest.raises(errors.ConfigError, match="y must be None"):
        net(torch.zeros(2, 2, 6, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(errors.ConfigError, match="cond must be None"):
        net(torch.zeros(2, 2, 6, 4), torch.zeros(2), cond=torch.zeros(2, 1))


# --- files of the sources --------------------------------------------------------------------------------------------


def file_of(net: RefineNet) -> dict[str, torch.Tensor]:
    """A state dict as NCSN's code would write it of our network."""
    stages, refines = {
        4: (["1", "2", "3", "4"], ["1", "2", "3", "4"]),
        6: (["1", "2", "3", "31", "4", "5"], ["1", "2", "31", "3", "4", "5"]),
    }[len(net.stages)]
    halved = [dilation == 1 for dilation in net.config["dilations"][1:]]
    layers = dict(importer._layers(stages, refines, halved))
    file = {}
    for name, value in net.state_dict().items():
        ours, _, part = name.rpartition(".")
        if ours != "table":
            file[f"{layers[ours]}.{part}"] = value
    rows = net.table.weight.detach().split([norm.width for norm in net.norms()], 1)
    for name, values in zip(importer._norms(stages, refines, net.config["refine_norm"]), rows, strict=True):
        if net.config["levels"] is not None:
            file[f"{name}.embed.weight"] = values.clone()
        else:
            parts = values[0].chunk(3)
            file |= {f"{name}.{part}": v.clone() for part, v in zip(("gamma", "alpha", "beta"), parts)}
    return file


def of_four_stages(levels: int | None, **changes: object) -> RefineNet:
    preset = ncsnv2 if levels is None else functools.partial(ncsn, levels=levels)
    return random(preset((2, 8, 8), channels=4, centered=False, **changes))


SIX = {"multipliers": (1, 2, 2, 2, 4, 4), "dilations": (1, 1, 1, 1, 2, 4)}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("changes", [{}, SIX], ids=["four", "six"])
@pytest.mark.parametrize("levels", [None, 3])
def test_a_file_is_the_network_that_wrote_it(levels, changes, prefix):
    net = of_four_stages(levels, **changes)
    file = {f"{prefix}{name}": value for name, value in file_of(net).items()}
    file[f"{prefix}sigmas"] = torch.ones(3)
    read = importer.network(file, net.shape)
    assert read.config == net.config
    for name, value in read.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_what_a_file_does_not_hold_is_told():
    net = of_four_stages(3)
    for name in ("logit_transform", "rescaled", "centered"):
        assert importer.network(file_of(net), net.shape, **{name: True}).config == {**net.config, "centered": True}
    for theirs, ours in {"elu": "elu", "relu": "relu", "lrelu": "leaky_relu", "swish": "silu"}.items():
        assert importer.network(file_of(net), net.shape, nonlinearity=theirs).config["activation"] == ours
    with pytest.raises(errors.ConfigError, match="nonlinearity must be one of"):
        importer.network(file_of(net), net.shape, nonlinearity="gelu")


@pytest.mark.parametrize("levels", [None, 3])
def test_a_file_that_is_not_the_networks_is_refused_and_the_tensor_named(levels):
    net = of_four_stages(levels)
    whole = file_of(net)
    for name in [*whole][::7]:
        rest = {other: value for other, value in whole.items() if other != name}
        with pytest.raises((errors.CheckpointMismatchError, errors.ConfigError)):
            importer.network(rest, net.shape)
        with pytest.raises((errors.CheckpointMismatchError, errors.ConfigError)):
            importer.network({**whole, name: torch.cat([whole[name]] * 2)}, net.shape)
    for name in ("refine2.msf.convs.1.bias", "res3.0.shortcut.weight", "end_conv.bias"):
        with pytest.raises(
            errors.CheckpointMismatchError, match=name.replace(".", r"\.") + "|refine.1.fuse.1|stages.2.0.skip|out"
        ):
            importer.network({other: value for other, value in whole.items() if other != name}, net.shape)
    with pytest.raises(errors.CheckpointMismatchError, match="'extra'"):
        importer.network({**whole, "extra": torch.ones(1)}, net.shape)
    turned = whole["refine3.msf.convs.0.weight"].transpose(0, 1)  # of as many numbers
    with pytest.raises(errors.CheckpointMismatchError, match=r"refine3\.msf\.convs\.0\.weight"):
        importer.network({**whole, "refine3.msf.convs.0.weight": turned}, net.shape)
    for shape in ((3, 8, 8), (2, 8)):
        with pytest.raises(errors.ConfigError, match="shape must be"):
            importer.network(whole, shape)
    with pytest.raises(errors.ConfigError, match=r"normalization must be 'InstanceNorm\+\+'"):
        importer.network(whole, net.shape, normalization="NoneNorm")


def test_normalisations_that_shapes_do_not_tell_are_asked_for():
    for kind, named in (("instance", "InstanceNorm"), ("affine", "NoneNorm")):
        net = of_four_stages(3, norm=kind)
        with pytest.raises(errors.ConfigError, match="'InstanceNorm' or 'NoneNorm'"):
            importer.network(file_of(net), net.shape)
        assert importer.network(file_of(net), net.shape, normalization=named).config == net.config
    net = of_four_stages(3, norm="variance")
    assert importer.network(file_of(net), net.shape).config == net.config
    net = of_four_stages(None)
    bare = {name: value for name, value in file_of(net).items() if not name.endswith(("alpha", "beta", "gamma"))}
    for given in (None, "InstanceNorm"):  # of which one has nothing in a file, and an ε that is not known
        with pytest.raises(errors.ConfigError, match=r"^normalization must"):
            importer.network(bare, net.shape, normalization=given)
    read = importer.network(bare, net.shape, normalization="NoneNorm")
    assert read.config == {**net.config, "norm": "affine"}
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(read.norm(x, read.table.weight[:, -8:]), x)


# --- the sources' own code -------------------------------------------------------------------------------------------


@functools.cache
def models_of(repository: str, file: str) -> types.ModuleType:
    """A module of `models/` of a repository, from the checkout that its variable names (strangers.CHECKOUTS)."""
    with modules_of(repository, **score_sde_stand_ins()):
        return importlib.import_module(f"models.{file}")


def options_of(size: int, **changes: object) -> types.SimpleNamespace:
    """A configuration as all three read it."""
    values = {
        "channels": 2, "image_size": size, "logit_transform": False, "rescaled": False, "centered": False, "ngf": 4, "nf": 4,
        "num_classes": 5, "num_scales": 5, "normalization": "InstanceNorm++", "nonlinearity": "elu", "spec_norm": False,
        "sigma_dist": "geometric", "sigma_begin": 20.0, "sigma_max": 20.0, "sigma_end": 0.01, "sigma_min": 0.01, **changes,
    }  # fmt: skip
    both = types.SimpleNamespace(**values)
    return types.SimpleNamespace(data=both, model=both, device="cpu")


def score_sde(name: str) -> type:
    """score_sde_pytorch's network, with what keeps it from being built and run put right: convolutions without a bias have
    none to scale; dilated ones are padded by their dilation; its NCSN has conditional normalisations, and a dilation of 1."""
    with modules_of("yang-song/score_sde_pytorch", **score_sde_stand_ins()):
        module, layers, norms = (
            importlib.import_module(f"models.{file}") for file in ("ncsnv2", "layers", "normalization")
        )

    def conv3x3(inputs, outputs, stride=1, bias=True, dilation=1):
        return nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=bias)

    layers.ncsn_conv3x3 = conv3x3
    if name == "NCSN":
        module.get_normalization = lambda config: norms.ConditionalInstanceNorm2dPlus
        module.ConditionalResidualBlock = functools.partial(layers.ConditionalResidualBlock, dilation=1)
    return getattr(module, name)


NCSN = ("ermongroup/ncsn", "cond_refinenet_dilated")
BASELINE = ("ermongroup/ncsn", "refinenet_dilated_baseline")
V2, CONDITIONAL = ("ermongroup/ncsnv2", "ncsnv2"), ("ermongroup/ncsnv2", "ncsn")
SDE = ("yang-song/score_sde_pytorch", "ncsnv2")
ORACLES = [
    (NCSN, "CondRefineNetDilated", 8, {}),
    (NCSN, "CondRefineNetDilated", 28, {"channels": 1}),  # whose padding for 28 is never reached
    (NCSN, "CondRefineNetDilated", 12, {"logit_transform": True}),
    (NCSN, "CondRefineNetDeeperDilated", 16, {"normalization": "InstanceNorm"}),
    (BASELINE, "RefineNetDilated", 8, {}),
    (V2, "NCSNv2", 8, {}),
    (V2, "NCSNv2", 28, {"channels": 1}),
    (V2, "NCSNv2", 12, {"rescaled": True, "nonlinearity": "swish"}),
    (V2, "NCSNv2", 8, {"normalization": "VarianceNorm", "nonlinearity": "lrelu"}),
    (V2, "NCSNv2", 8, {"normalization": "NoneNorm", "nonlinearity": "relu"}),
    (V2, "NCSNv2Deeper", 16, {"channels": 3}),
    (V2, "NCSNv2Deepest", 32, {"logit_transform": True}),
    (CONDITIONAL, "NCSN", 8, {}),
    (CONDITIONAL, "NCSN", 8, {"normalization": "InstanceNorm", "nonlinearity": "lrelu"}),
    (CONDITIONAL, "NCSN", 8, {"normalization": "NoneNorm"}),
    (CONDITIONAL, "NCSN", 8, {"normalization": "VarianceNorm", "nonlinearity": "swish"}),
    (CONDITIONAL, "NCSNdeeper", 16, {"rescaled": True, "nonlinearity": "relu"}),
    (SDE, "NCSN", 8, {}),
    (SDE, "NCSNv2", 8, {"centered": True}),
    (SDE, "NCSNv2", 12, {"normalization": "VarianceNorm", "nonlinearity": "swish"}),
    (SDE, "NCSNv2_128", 16, {"nonlinearity": "lrelu"}),
    (SDE, "NCSNv2_256", 32, {}),
]


def made(module: tuple[str, str], name: str, size: int, changes: dict) -> nn.Module:
    kind = score_sde(name) if module is SDE else getattr(models_of(*module), name)
    return kind(options_of(size, **changes))


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a sample, by the sample's largest number."""
    return ((out - expected).abs().amax((1, 2, 3)) / expected.abs().amax((1, 2, 3))).max().item()


@pytest.mark.parametrize(("module", "name", "size", "changes"), ORACLES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_network_is_its_source(module, name, size, changes, dtype, tolerance):
    """By all parameters at random, to rounding; and a model of it gives the source's scores at the source's levels."""
    theirs = random(made(module, name, size, changes)).eval()
    options = options_of(size, **changes)
    data = options.data
    shape = (data.channels, size, size)
    facts = {key: getattr(data, key) for key in ("nonlinearity", "logit_transform", "rescaled", "centered")}
    ours = importer.network(theirs.state_dict(), shape, normalization=data.normalization, **facts)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + (
        ours.table.weight.numel() if ours.config["levels"] is None and data.normalization == "NoneNorm" else 0
    )
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x, level = torch.randn(5, *shape, dtype=dtype) * 2, torch.tensor([3, 0, 4, 1, 2])
    divided = hasattr(theirs, "sigmas")
    sigmas = np.geomspace(20.0, 0.01, 5)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # of the sums that their code begins with zeros
    try:
        with torch.no_grad():
            expected = theirs(x) if module is BASELINE else theirs(x, level)
    finally:
        torch.set_default_dtype(before)
    kind = "scaled_score" if divided else "score"
    model = fastdiff.ScoreModel(ours, fastdiff.NCSN(sigmas.tolist()), kind, data_shape=shape)
    with torch.no_grad():
        out = ours(x, level)
        score = model.predict("score", x, 5.0 - level.to(dtype))
    scale = theirs.sigmas[level].view(-1, 1, 1, 1) if divided else 1.0
    error = relative(out, expected * scale)
    assert error < tolerance
    assert relative(score, expected) < tolerance + 1e-6  # whose levels are float32


@pytest.mark.parametrize(
    ("module", "name", "changes", "preset"),
    [
        (NCSN, "CondRefineNetDilated", {"ngf": 128, "num_classes": 10, "channels": 3}, ncsn),
        (
            NCSN,
            "CondRefineNetDilated",
            {"ngf": 64, "num_classes": 10, "channels": 1},
            functools.partial(ncsn, channels=64),
        ),
        (CONDITIONAL, "NCSN", {"ngf": 128, "num_classes": 10, "channels": 3}, ncsn),
        (V2, "NCSNv2", {"ngf": 128, "channels": 3}, ncsnv2),
        (V2, "NCSNv2Deeper", {"ngf": 128, "channels": 3, "image_size": 128}, ncsnv2),
        (V2, "NCSNv2Deepest", {"ngf": 128, "channels": 3, "image_size": 256}, ncsnv2),
    ],
)
def test_the_presets_have_the_sources_sizes(module, name, changes, preset):
    size = changes.get("image_size", 32)
    with torch.device("meta"):
        ours = preset((changes["channels"], size, size))
    theirs = made(module, name, size, changes)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
