"""The transformers: DiT against its equations, its own code and diffusers'; sets, sequences and vectors; files of DiT."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdiff
from fastdiff import errors
from fastdiff.networks import MODELS, DiT, PaperUNet, Transformer, build, describe, dit
from fastdiff.networks.transformers import patches, positions, unpatched
from fastdiff.training.sources import dit as source

TINY = {"hidden": 16, "layers": 2, "heads": 2}
DIT = Path(os.environ.get("DIT", "")) / "models.py"  # of facebookresearch/DiT
theirs = pytest.mark.skipif(
    not os.environ.get("DIT") or not DIT.is_file(), reason="DIT must name a checkout of facebookresearch/DiT"
)
diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
exactly = {"rtol": 1e-11, "atol": 1e-11}  # float64 sums in another order


def awake(net: nn.Module, std: float = 0.2) -> nn.Module:
    """The network with every number of its parameters drawn at random, those too that start at zero."""
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=std)
    return net


def made(kind: type, shape: tuple[int, ...], **changes: object) -> nn.Module:
    return awake(kind(shape, **{**TINY, **changes})).double().eval()


def inputs(net: nn.Module, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = net.out.weight.dtype
    return torch.randn(batch, *net.shape, dtype=dtype), torch.rand(batch, dtype=dtype)


# every kind of sample and of condition
KINDS = {
    "signal": (DiT, (2, 12), {"patch": 3}),
    "image": (DiT, (3, 4, 8), {"num_classes": 3}),
    "volume": (DiT, (1, 4, 2, 6), {"patch": (2, 1, 3), "out_channels": 2, "hidden": 18}),
    "image beside a field": (DiT, (2, 4, 4), {"cond_shape": (3, 4, 4), "num_classes": 2}),
    "image and a vector": (DiT, (2, 4, 4), {"cond_shape": (5,), "patch": 4}),
    "set": (Transformer, (4, 3), {"num_classes": 3, "out_channels": 8}),
    "set and a set": (Transformer, (4, 3), {"cond_shape": (5, 2)}),
    "set of matrices and a vector": (Transformer, (3, 2, 2), {"cond_shape": (4,)}),
    "sequence and a set": (Transformer, (4, 2), {"tokens": "sequence", "cond_shape": (1, 3), "num_classes": 2}),
    "vector": (Transformer, (5,), {"num_classes": 3, "time_embedding": "cos_sin"}),
    "vector and a set": (Transformer, (5,), {"cond_shape": (2, 3)}),
}
every = pytest.mark.parametrize("name", KINDS)


def of(name: str, **changes: object) -> nn.Module:
    kind, shape, options = KINDS[name]
    return made(kind, shape, **{**options, **changes})


def called(net: nn.Module, batch: int = 3) -> dict[str, torch.Tensor]:
    """All that a call of it may have."""
    x, t = inputs(net, batch)
    y = None if net.num_classes is None else torch.arange(batch) % (net.num_classes + 1)
    cond = None if net.cond_shape is None else torch.randn(batch, *net.cond_shape, dtype=x.dtype)
    return {"x": x, "t": t, "y": y, "cond": cond}


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "millions"), [("S/2", 33), ("B/2", 130), ("L/2", 458), ("XL/2", 675)])
def test_the_papers_sizes_have_the_papers_numbers_of_parameters(size, millions):
    with torch.device("meta"):
        net = dit((4, 32, 32), size, num_classes=1000)
    count = sum(p.numel() for p in net.parameters())
    assert round(count / 1e6) == millions
    if size == "XL/2":  # as its own code counts, with the fixed positions
        assert count + net.position.numel() == 675_129_632
    assert (net.config["out_channels"], net.config["time_scale"], net.config["time_embedding"]) == (8, 1.0, "cos_sin")


def test_sizes_are_refused_by_name():
    with pytest.raises(errors.ConfigError, match="size must be one of"):
        dit((4, 32, 32), "XXL/2")


# --- what holds of every kind ----------------------------------------------------------------------------------------


@every
def test_a_new_network_returns_zeros_of_its_result_s_shape(name):
    kind, shape, options = KINDS[name]
    net = kind(shape, **{**TINY, **options})
    leading = options.get("out_channels", shape[0])
    out = net(**called(net))
    assert torch.equal(out, torch.zeros(3, leading, *shape[1:]))
    empty = {key: None if value is None else value[:0] for key, value in called(net).items()}
    assert net(**empty).shape == (0, leading, *shape[1:])
    assert of(name)(**called(of(name))).ne(0).all()


@every
def test_samples_do_not_see_each_other(name):
    net = of(name)
    call = called(net)
    out = net(**call)
    for i in range(3):
        one = {key: None if value is None else value[i : i + 1] for key, value in call.items()}
        torch.testing.assert_close(net(**one)[0], out[i], **exactly)
    call["x"][1] = math.nan
    torch.testing.assert_close(net(**call)[[0, 2]], out[[0, 2]], **exactly)


@every
def test_features_of_one_time_or_of_each_sample_s_equal_the_times(name):
    net = of(name)
    call = called(net)
    for without in ({}, {"y": None}, {"cond": None}, {"y": None, "cond": None}):
        some = {**call, **without}
        features = net.time_features(some["t"])
        assert features.shape[0] == 3
        torch.testing.assert_close(net(**some, features=features), net(**some), **exactly)
        some["t"] = some["t"][:1].expand(3)
        torch.testing.assert_close(net(**some, features=features[:1]), net(**some), **exactly)


@every
def test_time_label_and_condition_matter_and_none_of_them_has_its_name(name):
    net = of(name)
    call = called(net)
    out = net(**call)
    assert not torch.allclose(net(**{**call, "t": call["t"] + 0.1}), out)
    if net.num_classes is not None:
        assert not torch.allclose(net(**{**call, "y": call["y"].flip(0)})[0], out[0])
        none = torch.full((3,), net.num_classes)
        torch.testing.assert_close(net(**{**call, "y": None}), net(**{**call, "y": none}), **exactly)
    if net.cond_shape is not None:
        cond = call["cond"].clone()
        cond[1] = math.nan
        mixed = net(**{**call, "cond": cond})
        torch.testing.assert_close(mixed[[0, 2]], out[[0, 2]], **exactly)
        torch.testing.assert_close(mixed[1], net(**{**call, "cond": None})[1], **exactly)
        assert not torch.allclose(mixed[1], out[1])


@every
@pytest.mark.parametrize("recompute", [False, True])
def test_every_parameter_gets_a_gradient(name, recompute):
    net = of(name, dropout=0.1, recompute=recompute).train()
    call = called(net)
    if call["cond"] is not None:
        call["cond"][1] = math.nan
    torch.manual_seed(1)
    net(**call).square().sum().backward()
    assert [
        key for key, p in net.named_parameters() if p.grad is None or not (p.grad.any() and p.grad.isfinite().all())
    ] == []
    if recompute:
        plain = type(net)(**{**net.config, "recompute": False}).double().train()
        plain.load_state_dict(net.state_dict())
        torch.manual_seed(1)
        plain(**call).square().sum().backward()
        for ours, other in zip(net.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, other.grad, **exactly)


@pytest.mark.parametrize("name", ["image", "vector"])
def test_dropout_is_of_training_and_of_both_halves_of_a_block(name):
    net, still = of(name, dropout=0.5), of(name)
    still.load_state_dict(net.state_dict())
    call = called(net)
    assert torch.equal(net(**call), still(**call))
    layers, hidden = net.config["layers"], net.config["hidden"]
    with torch.no_grad():
        gates = [
            net.modulation.get_parameter(key).view(6 * layers + 2, hidden, -1)[-2 * layers :]
            for key in ("weight", "bias")
        ]
        for half in range(2):  # of a network in which nothing passes the other half's gate
            kept = [gate[half::2].clone() for gate in gates]
            for gate in gates:
                gate[half::2] = 0
            assert not torch.equal(net.train()(**call), net(**call))
            for gate, part in zip(gates, kept):
                gate[half::2] = part


def test_recomputing_runs_the_blocks_again(monkeypatch):
    net = of("image", recompute=True)
    calls, plain = [], type(net.blocks[0]).forward
    monkeypatch.setattr(type(net.blocks[0]), "forward", lambda self, *a: calls.append(1) or plain(self, *a))
    net(**called(net)).sum().backward()
    assert len(calls) == 2 * len(net.blocks)
    with torch.no_grad():
        net(**called(net))
    assert len(calls) == 3 * len(net.blocks)


@every
def test_configs_round_trip_and_files_too(name, tmp_path):
    net = of(name, dropout=0.1)
    built = build(json.loads(json.dumps(describe(net)))).double().eval()
    assert describe(built) == describe(net)
    assert type(net)(**json.loads(json.dumps(net.config))).config == net.config
    built.load_state_dict(net.state_dict(), strict=True)
    call = called(net)
    assert torch.equal(built(**call), net(**call))
    channels = net(**call).shape[1] // net.shape[0]
    options = {"data_shape": net.shape, "variance": "learned" if channels == 2 else None}
    model = fastdiff.ScoreModel(net, "vp", **options)
    loaded = fastdiff.load(fastdiff.save(model, tmp_path / "model"))
    assert all(torch.equal(value, loaded.net.state_dict()[key]) for key, value in net.state_dict().items())
    assert torch.equal(loaded.net(**call), net(**call))


@every
def test_construction_and_a_call_need_no_numbers(name):
    """On the meta device: nothing reads a value, so that a call can be captured as a CUDA graph."""
    kind, shape, options = KINDS[name]
    with torch.device("meta"):
        net = kind(shape, **{**TINY, **options})
        assert {value.device.type for value in net.state_dict().values()} == {"meta"}
        call = called(net)
        assert net(**call).is_meta
        assert net(**call, features=net.time_features(call["t"])).is_meta
    made = {key for key, _ in net.named_buffers()} - set(net.state_dict())
    assert made <= {"conditioning.time.frequencies"}, "checkpoints make anew none but the time's"


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast(name, dtype):
    net = awake(KINDS[name][0](KINDS[name][1], **{**TINY, **KINDS[name][2]}), 0.1)
    call = called(net)
    expected = net(**call)
    if dtype == torch.bfloat16:
        net = net.to(dtype)
        half = {
            key: v.to(dtype) if v is not None and v.is_floating_point() and key != "t" else v for key, v in call.items()
        }
        out = net(**half)
        assert out.dtype == dtype
        one = net(**{**half, "t": half["t"][:1].expand(3)}, features=net.time_features(half["t"][:1]))
        other = net(**{**half, "t": half["t"][:1].expand(3)})
        assert (one - other).float().norm() < 0.05 * other.float().norm()
    else:
        with torch.autocast("cpu", torch.bfloat16):
            out = net(**call)
            some = {**call, "t": call["t"][:1].expand(3)}
            one, other = net(**some, features=net.time_features(call["t"][:1])), net(**some)
        assert (one - other).float().norm() < 0.05 * other.float().norm()
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["signal", "image", "image and a vector", "set and a set", "vector"])
def test_a_run_asks_the_time_features_once(name, monkeypatch):
    net = of(name).float()
    call = called(net)
    cond = call["cond"] if net.num_classes is None else call["y"]
    model = fastdiff.ScoreModel(net, "vp", data_shape=net.shape, num_classes=net.num_classes and net.num_classes + 1)
    calls, of_time = [], type(net).time_features
    monkeypatch.setattr(type(net).__mro__[1], "time_features", lambda self, t: calls.append(len(t)) or of_time(self, t))
    ours = fastdiff.sample(model, steps=5, num_samples=3, cond=cond)
    assert calls == [1, 5]  # one to see how much room they need
    monkeypatch.undo()
    plain = nn.Module()
    plain.forward = lambda x, t, y=None: net(x, t, **{"y" if net.num_classes is not None else "cond": y})
    other = fastdiff.sample(fastdiff.ScoreModel(plain, "vp", data_shape=net.shape), steps=5, num_samples=3, cond=cond)
    assert torch.allclose(ours, other, atol=1e-3, rtol=1e-3)


# --- DiT is its equations --------------------------------------------------------------------------------------------


def test_patches_are_parts_of_the_sample_row_by_row():
    x = torch.randn(2, 3, 4, 6, 2)
    parts = patches(x, (2, 3, 1))
    assert parts.shape == (2, 8, 18)
    for k, (i, j, m) in enumerate(itertools.product(range(2), range(2), range(2))):
        piece = x[:, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3, m : m + 1]
        assert torch.equal(parts[:, k], piece.flatten(1))
    assert torch.equal(unpatched(parts, (2, 3, 1), (2, 2, 2)), x)
    for shape, patch in (((2, 12), (4,)), ((1, 6, 4), (3, 2))):
        x = torch.randn(3, *shape)
        assert torch.equal(unpatched(patches(x, patch), patch, [n // p for n, p in zip(shape[1:], patch)]), x)


@pytest.mark.parametrize("grid", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("hidden", [24, 28])
def test_positions_are_their_formula(grid, hidden):
    """Of each axis, the last one first, the sines and then the cosines of p / 1e4^(k / half)."""
    half = hidden // (2 * len(grid))
    expected = np.zeros((math.prod(grid), hidden))
    for row, place in enumerate(itertools.product(*map(range, grid))):
        for number, p in enumerate(reversed(place)):
            for k in range(half):
                angle = p / 10000 ** (k / half)
                expected[row, 2 * half * number + k] = math.sin(angle)
                expected[row, 2 * half * number + half + k] = math.cos(angle)
    np.testing.assert_allclose(positions(grid, hidden).numpy(), expected, rtol=0, atol=1e-14)


def norm(h: torch.Tensor, eps: float) -> torch.Tensor:
    h = h - h.mean(-1, keepdim=True)
    return h / (h.square().mean(-1, keepdim=True) + eps).sqrt()


def equation(net: nn.Module, h: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The blocks and the end of a transformer with each modulation a product of its own, and attention written out."""
    layers, hidden, heads = (net.config[key] for key in ("layers", "hidden", "heads"))
    weight, bias = net.modulation.weight.view(-1, hidden, hidden), net.modulation.bias.view(-1, hidden)
    count = 2 * layers + 1
    first, second = net.config["eps"]

    def told(number: int) -> torch.Tensor:
        return (F.silu(c) @ weight[number].T + bias[number])[:, None]

    for i, block in enumerate(net.blocks):
        n = norm(h, first) * (1 + told(2 * i)) + told(count + 2 * i)
        q, k, v = (part.unflatten(-1, (heads, -1)) for part in block.qkv(n).chunk(3, -1))
        weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(hidden // heads), -1)
        h = h + told(2 * count + 2 * i) * block.project(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
        n = block.wide(norm(h, second) * (1 + told(2 * i + 1)) + told(count + 2 * i + 1))
        n = 0.5 * n * (1 + torch.tanh(math.sqrt(2 / math.pi) * (n + 0.044715 * n**3)))
        h = h + told(2 * count + 2 * i + 1) * block.last(n)
    return net.out(norm(h, first) * (1 + told(count - 1)) + told(2 * count - 1))


def embedded(net: nn.Module, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    c = net.conditioning.mlp(net.conditioning.time(t))
    return c if y is None else c + net.conditioning.label.weight[y]


def test_dit_is_its_equation():
    net = made(
        DiT, (3, 4, 6), num_classes=4, layers=3, eps=(1e-3, 1e-2), mlp_ratio=1.5, time_channels=20, cond_shape=(2, 4, 6)
    )
    x, t = inputs(net)
    y, cond = torch.tensor([0, 4, 2]), torch.randn(3, 2, 4, 6, dtype=x.dtype)
    h = F.conv2d(x, net.enter.weight.view(16, 3, 2, 2), net.enter.bias, 2)
    h = h + F.conv2d(cond, net.condition.embed.weight.view(16, 2, 2, 2), None, 2)
    h = h.flatten(2).mT + positions((2, 3), 16)
    out = equation(net, h, embedded(net, t, y)).view(3, 2, 3, 3, 2, 2)
    expected = torch.einsum("bhwcpq->bchpwq", out).reshape(x.shape)
    # a network that was made in float32 has positions of float32
    torch.testing.assert_close(net(x, t, y, cond=cond), expected, rtol=1e-5, atol=1e-6)


def test_the_transformer_is_its_equation():
    net = made(Transformer, (4, 3), tokens="sequence", cond_shape=(2, 5), out_channels=8, layers=3, num_classes=1)
    x, t = inputs(net)
    y, cond = torch.tensor([0, 1, 0]), torch.randn(3, 2, 5, dtype=x.dtype)
    h = x @ net.enter.weight.T + net.enter.bias + net.position
    known = cond @ net.condition.embed.weight.T + net.condition.embed.bias
    out = equation(net, torch.cat([h, known], 1), embedded(net, t, y))[:, :4]
    expected = torch.cat([out[..., :3], out[..., 3:]], 1)  # the variance's half behind the prediction's
    torch.testing.assert_close(net(x, t, y, cond=cond), expected, **exactly)


@pytest.mark.parametrize(("kind", "shape"), [(DiT, (1, 4, 4)), (Transformer, (4, 3))])
def test_blocks_start_as_the_identity(kind, shape):
    """adaLN-zero: of a new network nothing but its ends is seen, whatever the time."""
    net = kind(shape, **TINY).double()
    awake(net.out)
    x, t = inputs(net)
    expected = net._sample(net.out(F.layer_norm(net._tokens(x, None), (16,), eps=1e-6)))
    torch.testing.assert_close(net(x, t), expected, **exactly)


def test_a_field_as_condition_is_further_channels_of_the_input():
    net = of("image beside a field")
    joined = made(DiT, (5, 4, 4), num_classes=2, out_channels=2)
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("condition.")}
    state["enter.weight"] = torch.cat([net.enter.weight, net.condition.embed.weight], 1)
    joined.load_state_dict(state)
    call = called(net)
    expected = joined(torch.cat([call["x"], call["cond"]], 1), call["t"], call["y"])
    torch.testing.assert_close(net(**call), expected, **exactly)


def test_dit_knows_where_a_patch_is():
    net = made(DiT, (2, 6), patch=2)
    x, t = inputs(net)
    order = torch.tensor([2, 0, 1])
    moved = unpatched(patches(x, (2,))[:, order], (2,), (3,))
    assert not torch.allclose(net(moved, t), unpatched(patches(net(x, t), (2,))[:, order], (2,), (3,)), rtol=1e-3)
    with torch.no_grad():
        net.position.zero_()
    torch.testing.assert_close(net(moved, t), unpatched(patches(net(x, t), (2,))[:, order], (2,), (3,)), **exactly)


# --- sets, sequences, vectors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["set", "set and a set", "set of matrices and a vector"])
def test_a_permutation_of_a_set_permutes_the_result(name):
    net = of(name)
    call = called(net)
    out = net(**call).unflatten(1, (-1, net.shape[0]))
    for order in itertools.permutations(range(net.shape[0])):
        moved = net(**{**call, "x": call["x"][:, order]}).unflatten(1, (-1, net.shape[0]))
        torch.testing.assert_close(moved, out[:, :, order], **exactly)
    assert not torch.allclose(out[:, :, 0], out[:, :, 1])


@pytest.mark.parametrize("name", ["set and a set", "vector and a set"])
def test_a_permutation_of_a_set_of_conditions_changes_nothing(name):
    net = of(name)
    call = called(net)
    for order in itertools.islice(itertools.permutations(range(net.cond_shape[0])), 24):
        torch.testing.assert_close(net(**{**call, "cond": call["cond"][:, order]}), net(**call), **exactly)
    other = net(**{**call, "cond": torch.cat([call["cond"][:, :1] + 1, call["cond"][:, 1:]], 1)})
    assert not torch.allclose(other, net(**call)), "each token of the condition counts"


def test_the_parameters_of_a_set_serve_sets_of_any_size():
    """And an element that is there twice is two: the mean over what is attended to does not change where all are doubled."""
    net = of("set and a set")
    twice = Transformer((8, 3), **{**TINY, "cond_shape": (10, 2)}).double()
    twice.load_state_dict(net.state_dict())
    call = called(net)
    doubled = twice(call["x"].repeat(1, 2, 1), call["t"], cond=call["cond"].repeat(1, 2, 1))
    torch.testing.assert_close(doubled, net(**call).repeat(1, 2, 1), **exactly)


def test_places_of_a_sequence_and_numbers_of_a_vector_are_told_apart():
    for net in (made(Transformer, (4, 3), tokens="sequence"), made(Transformer, (4,))):
        x, t = inputs(net)
        assert not torch.allclose(net(x.flip(1), t), net(x, t).flip(1), rtol=1e-3)
        with torch.no_grad():
            net.position.zero_()
        torch.testing.assert_close(net(x.flip(1), t), net(x, t).flip(1), **exactly)


def test_a_vector_is_a_sequence_of_single_numbers():
    vector, sequence = made(Transformer, (4,)), Transformer((4, 1), tokens="sequence", **TINY).double()
    sequence.load_state_dict(vector.state_dict())
    x, t = inputs(vector)
    assert torch.equal(vector(x, t), sequence(x[..., None], t)[..., 0])
    assert (vector.config["tokens"], Transformer((4, 1), **TINY).config["tokens"]) == ("sequence", "set")
    assert Transformer((4,), tokens="set", **TINY).position is None


def test_a_new_transformer_tells_single_numbers_apart():
    """A token is normalised: without a bias of its size, x and 2 x would enter the blocks as the same."""
    for net in (Transformer((1, 1), hidden=64), Transformer((1,), hidden=64)):
        h = F.layer_norm(net._tokens(torch.tensor([[1.0], [2.0]]).view(2, *net.shape), None), (64,))
        assert (h[0] - h[1]).abs().mean() > 0.05
    net = Transformer((2,), hidden=64, cond_shape=(3, 1))
    first, second, none = net._tokens(torch.zeros(1, 2), None)[0, :3]
    assert (first - second).std() > 0.3, "places differ from the beginning"
    assert none.std() > 0.3, "the normalisation of a zero has an endless slope"


def test_a_transformer_learns_what_the_others_of_a_set_say():
    """x0 = ±(1, 1, 1), x_t = α x0 + σ ε: E[x0 | x_t] = tanh(α Σ x_i / σ²); of one element alone nothing but tanh(α x_i / σ²)."""
    torch.manual_seed(0)
    net = Transformer((3, 1), **TINY)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)

    def perturb(batch: int) -> tuple[torch.Tensor, ...]:
        x0, t = (torch.randint(0, 2, (batch, 1, 1)) * 2.0 - 1).expand(-1, 3, -1), torch.rand(batch) * 0.5 + 0.3
        alpha, sigma = torch.cos(t * math.pi / 2)[:, None, None], torch.sin(t * math.pi / 2)[:, None, None]
        x = alpha * x0 + sigma * torch.randn(batch, 3, 1)
        one = alpha * x / sigma**2
        return x0, x, t, torch.tanh(one.sum(1, keepdim=True)), torch.tanh(one)

    for step in range(300):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 300)
        x0, x, t, _, _ = perturb(256)
        optimizer.zero_grad()
        (net(x, t) - x0).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        _, x, t, mean, alone = perturb(4000)
        error, blind = ((each - mean).square().mean().sqrt().item() for each in (net(x, t), alone))
    assert blind > 0.4
    assert error < 0.15


# --- refusals --------------------------------------------------------------------------------------------------------

COMMON = {
    "hidden": [0, 15, 2.5], "layers": [0, True], "heads": [0], "mlp_ratio": [0, "4"], "eps": [1e-6, (1e-6,), (0, 1e-6), "ab"],
    "time_channels": [1], "recompute": ["no"], "num_classes": [0], "dropout": [1.0], "time_embedding": ["furier"],
    "time_scale": [0],
}  # fmt: skip
BAD = {
    DiT: COMMON
    | {"shape": [(2, 0)], "patch": [0, (2, 2, 2), (2,), "22"], "out_channels": [0], "cond_shape": [(), "5"]},
    Transformer: COMMON | {"shape": [(), "2"], "tokens": ["sets"], "out_channels": [0, 3], "cond_shape": [(0,)]},
}
CASES = [(kind, name, value) for kind, table in BAD.items() for name, values in table.items() for value in values]


@pytest.mark.parametrize(("kind", "argument", "value"), CASES)
def test_bad_arguments_are_refused(kind, argument, value):
    with pytest.raises(errors.ConfigError, match=rf"^{argument}(\[\d\])? must .*got"):
        kind(**{"shape": (2, 4, 4), **TINY} | {argument: value})


def test_shapes_that_do_not_fit_are_refused():
    for words, make in {
        "shape must have axes that are multiples of the patch": lambda: DiT((1, 4, 5), **TINY),
        "shape must be": lambda: DiT((4,), **TINY),
        "cond_shape must be .* a field beside": lambda: DiT((1, 4, 4), cond_shape=(2, 4, 5), **TINY),
        "cond_shape must be .* a set of m": lambda: Transformer((4, 3), cond_shape=(2, 4, 5), **TINY),
    }.items():
        with pytest.raises(errors.ShapeError, match=words):
            make()
    with pytest.raises(errors.ConfigError, match="hidden must be an integer >= 6"):
        DiT((1, 2, 2, 2), hidden=4, heads=2)
    net = of("set and a set")
    with pytest.raises(errors.ShapeError, match="cond must have shape"):
        net(**{**called(net), "cond": torch.zeros(3, 4, 2, dtype=torch.float64)})


def test_a_file_cannot_ask_for_more_layers_than_it_has_tensors(tmp_path):
    from fastdiff.training import checkpoint

    config = {"name": "dit", **DiT((1, 4, 4), **TINY).config, "layers": 2**31 - 1}
    with pytest.raises(errors.CheckpointMismatchError, match="lacks tensors"):
        checkpoint._skeleton(config, {}, tmp_path)


def test_both_are_models():
    assert (MODELS["dit"], MODELS["transformer"]) == (DiT, Transformer)


# --- DiT's own code --------------------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Has the parts and the meaning that DiT's code asks of timm's."""

    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias):
        super().__init__()
        self.patch_size, self.num_patches = (patch_size, patch_size), (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x):
        return self.proj(x).flatten(2).mT


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias):
        super().__init__()
        self.heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (each.unflatten(-1, (self.heads, -1)) for each in self.qkv(x).chunk(3, -1))
        weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1]), -1)
        return self.proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features, act_layer, drop):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(in_features, hidden_features), nn.Linear(hidden_features, in_features)
        self.act = act_layer()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def their_dit(monkeypatch, **options):
    """A network of facebookresearch/DiT, all its numbers drawn at random."""
    parts = {"PatchEmbed": PatchEmbed, "Attention": Attention, "Mlp": Mlp}
    for name in ("timm", "timm.models", "timm.models.vision_transformer"):
        module = types.ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("their_dit", DIT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net = module.DiT(**{"hidden_size": 24, "depth": 3, "num_heads": 4, "input_size": 8, "num_classes": 5, **options})
    return awake(net, 0.1).eval()


def compared(ours, expected, tolerance=1e-5):
    assert ours.shape == expected.shape
    error = ((ours - expected).abs().max() / expected.abs().max()).item()
    assert expected.std() > 0.05, "a network that is not asleep"
    assert error < tolerance, error
    return error


@theirs
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": 4, "in_channels": 3, "learn_sigma": False},
        {"patch_size": 1, "input_size": 4, "num_heads": 2, "depth": 1},
        {"mlp_ratio": 2.7, "class_dropout_prob": 0.0, "hidden_size": 40},
    ],
    ids=str,
)
def test_dit_equals_its_own_code(options, monkeypatch, tmp_path, record_property):
    net = their_dit(monkeypatch, **options)
    torch.save(net.state_dict(), tmp_path / "theirs.pt")
    facts = {key: options[key] for key in ("class_dropout_prob", "num_heads") if key in options}
    ours = source.network(fastdiff.load_tensors(tmp_path / "theirs.pt"), **{"num_heads": 4, **facts}).eval()
    size = options.get("input_size", 8)
    x, y = torch.randn(4, options.get("in_channels", 4), size, size), torch.tensor([0, 4, 5, 2])
    y = y % 5 if "class_dropout_prob" in options else y
    with torch.no_grad():
        # an angle of 999 is rounded by 6e-5 in float32, theirs and ours
        for t, tolerance in ((torch.tensor([0, 3, 17, 31]), 1e-5), (torch.tensor([99, 500, 800, 999]), 5e-5)):
            record_property("error", compared(ours(x, t, y), net(x, t, y), tolerance))
    assert ours.config["mlp_ratio"] == pytest.approx(options.get("mlp_ratio", 4), abs=0.05)
    if "class_dropout_prob" in options:
        assert not ours.conditioning.label.weight[-1].any()


@theirs
def test_a_new_dit_has_the_positions_and_the_number_of_parameters_of_its_own_code(monkeypatch):
    net = their_dit(monkeypatch, input_size=16, hidden_size=32)
    count = sum(p.numel() for p in net.parameters())
    ours = DiT((4, 16, 16), hidden=32, layers=3, heads=4, num_classes=5, out_channels=8)
    assert count == sum(p.numel() for p in ours.parameters()) + ours.position.numel()
    net.initialize_weights()
    torch.testing.assert_close(ours.position, net.pos_embed[0].detach(), rtol=0, atol=1e-7)


# --- diffusers -------------------------------------------------------------------------------------------------------


def of_diffusers(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import DiTTransformer2DModel

        net = DiTTransformer2DModel(**{
            "num_attention_heads": 4, "attention_head_dim": 6, "in_channels": 4, "num_layers": 3, "sample_size": 8,
            "num_embeds_ada_norm": 5, **options,
        })  # fmt: skip
    awake(net, 0.1)
    state = net.state_dict()
    for name in [name for name in state if ".norm1.emb." in name]:
        state[name] = state["transformer_blocks.0." + name.split(".", 2)[2]].clone()
    net.load_state_dict(state)
    return net.eval(), state


@diffusers
@pytest.mark.parametrize(
    "options",
    [
        {"out_channels": 8},
        {"patch_size": 4, "in_channels": 3, "norm_eps": 1e-2},
        {"norm_elementwise_affine": True, "attention_bias": False, "num_layers": 2},
        {"patch_size": 1, "sample_size": 4, "num_attention_heads": 2, "attention_head_dim": 10},
    ],
    ids=str,
)
def test_dit_equals_diffusers(options, record_property):
    net, tensors = of_diffusers(**options)
    facts = {key: options[key] for key in ("norm_eps", "num_attention_heads") if key in options}
    ours = source.network(
        tensors, sample_size=options.get("sample_size", 8), **{"num_attention_heads": 4, **facts}
    ).eval()
    x, y = torch.randn(4, *ours.shape), torch.tensor([0, 4, 5, 2])
    with torch.no_grad():
        for t, tolerance in ((torch.tensor([0, 3, 17, 31]), 1e-5), (torch.tensor([99, 500, 800, 999]), 5e-5)):
            record_property("error", compared(ours(x, t, y), net(x, t, y).sample, tolerance))


# --- files -----------------------------------------------------------------------------------------------------------


def published(hidden: int = 64, depth: int = 2, patch: int = 2) -> dict[str, torch.Tensor]:
    """Tensors by the names and in the shapes of facebookresearch/DiT's files."""
    h = hidden
    shapes = {
        "pos_embed": (1, 16, h), "x_embedder.proj.weight": (h, 4, patch, patch), "x_embedder.proj.bias": (h,),
        "t_embedder.mlp.0.weight": (h, 256), "t_embedder.mlp.0.bias": (h,), "t_embedder.mlp.2.weight": (h, h),
        "t_embedder.mlp.2.bias": (h,), "y_embedder.embedding_table.weight": (11, h),
        "final_layer.linear.weight": (patch**2 * 8, h), "final_layer.linear.bias": (patch**2 * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * h, h), "final_layer.adaLN_modulation.1.bias": (2 * h,),
    }  # fmt: skip
    for i in range(depth):
        layers = {
            "attn.qkv": (3, 1),
            "attn.proj": (1, 1),
            "mlp.fc1": (4, 1),
            "mlp.fc2": (1, 4),
            "adaLN_modulation.1": (6, 1),
        }
        for name, (outputs, inside) in layers.items():
            shapes[f"blocks.{i}.{name}.weight"] = (outputs * h, inside * h)
            shapes[f"blocks.{i}.{name}.bias"] = (outputs * h,)
    return {name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}


def test_what_a_file_says_is_inferred():
    tensors = published()
    net = source.network(tensors)
    assert {key: net.config[key] for key in ("shape", "patch", "hidden", "layers", "heads", "num_classes", "out_channels")} == {
        "shape": [4, 8, 8], "patch": [2, 2], "hidden": 64, "layers": 2, "heads": 1, "num_classes": 10, "out_channels": 8,
    }  # fmt: skip
    assert (net.config["time_scale"], net.config["time_embedding"], net.scale_given) == (1.0, "cos_sin", True)
    assert source.network(tensors, (4, 8, 8), num_heads=8).config["heads"] == 8
    assert source._heads(1152, None) == 16
    assert [source._heads(hidden, None) for hidden in (384, 768, 1024, 512)] == [6, 12, 16, 8]
    without = {name: value for name, value in tensors.items() if name != "pos_embed"}
    assert source.network(without).shape == (4, 32, 32)
    assert source.network(without, input_size=8).shape == source.network(without, (4, 8, 8)).shape == (4, 8, 8)
    torch.testing.assert_close(source.network(without, input_size=8).position, positions((4, 4), 64).float())
    half = source.network({name: value.half() for name, value in tensors.items()})
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    model = fastdiff.ScoreModel(net, "ddpm", data_shape=net.shape, variance="learned_range")
    assert fastdiff.sample(model, steps=2, num_samples=1, cond=torch.tensor([3])).isfinite().all()


@pytest.mark.parametrize("name", [*published(depth=1)])
def test_every_tensor_of_a_file_is_used(name):
    """One that is missing, has another shape, or other numbers, is seen."""
    tensors = published(depth=1)
    net = source.network(tensors)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 31]), torch.tensor([1, 2])
    out = net(x, t, y)
    changed = source.network({**tensors, name: tensors[name] + 0.1 * torch.randn(tensors[name].shape)})
    assert not torch.allclose(changed(x, t, y), out, atol=1e-4)
    if name != "pos_embed" and not name.endswith("bias"):
        with pytest.raises(errors.CheckpointMismatchError, match=name.replace(".", r"\.")):
            source.network({key: value for key, value in tensors.items() if key != name})
    if name.endswith("weight"):
        with pytest.raises((errors.CheckpointMismatchError, errors.ConfigError), match=r"must|lacks"):
            source.network({**tensors, name: tensors[name].flatten()})


def test_files_of_other_networks_are_refused():
    tensors = published()
    for words, change in {
        r"no place, such as 'blocks\.0\.norm\.weight'": {"blocks.0.norm.weight": torch.ones(64)},
        r"blocks\.1\.mlp\.fc2\.weight must have": {"blocks.1.mlp.fc2.weight": torch.ones(256, 64)},
        r"x_embedder\.proj\.weight must have": {"x_embedder.proj.weight": torch.ones(64, 4, 2, 1)},
        r"final_layer\.linear\.weight must have": {"final_layer.linear.weight": torch.ones(31, 64)},
        r"lacks 'blocks\.2": {"blocks.3.attn.proj.bias": torch.ones(64)},
    }.items():
        with pytest.raises(errors.CheckpointMismatchError, match=words):
            source.network({**tensors, **change})
    for words, facts in {
        "shape must be": {"shape": (4, 16, 16)},
        "input_size must be 8": {"input_size": 16},
        "heads": {"num_heads": 7},
        "activation_fn must be one of": {"activation_fn": "geglu"},
    }.items():
        with pytest.raises(errors.ConfigError, match=words):
            source.network(tensors, **facts)
    with pytest.raises(errors.ConfigError, match="num_heads must be given for a hidden size of 40"):
        source.network(published(hidden=40))
    unet = PaperUNet((3, 8, 8), channels=8, multipliers=(1,), attention=())
    with pytest.raises(errors.CheckpointMismatchError, match=r"lacks 'x_embedder"):
        source.network(unet.state_dict())


@diffusers
def test_blocks_of_diffusers_that_embed_the_time_apart_are_refused():
    _, tensors = of_diffusers()
    name = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    with pytest.raises(errors.CheckpointMismatchError, match=r"must be alike in all blocks, .* block 2"):
        source.network({**tensors, name: tensors[name] + 1}, num_heads=4)
