"""Networks made faster: the same outputs, what was kept and what not, and layers that know where they may work."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from strangers import close, drawn
from torch import nn
from watching import on_tape

import fastdiff
import fastdiff.errors as errors
from fastdiff import optimization
from fastdiff.execution import cpu, fused
from fastdiff.networks import MLP, MPUNet, PaperUNet, UNet, mp_unet

compiled = pytest.mark.skipif(not cpu.available, reason="the compiled library is not loaded")


def model_of(net: nn.Module, **options: object) -> fastdiff.ScoreModel:
    return fastdiff.ScoreModel(drawn(net), "vp", data_shape=net.shape, **options)


def images(batch: int, channels: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 1000 + channels * 100 + height * 10 + width)
    return torch.randn(batch, channels, height, width, generator=generator).to(memory_format=torch.channels_last)


@compiled
@pytest.mark.parametrize("outputs", [1, 16, 33])
@pytest.mark.parametrize("inputs", [1, 16, 35])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (3, 9), (13, 6), (32, 32)])
@pytest.mark.parametrize("threads", [1, 3])
def test_winograds_convolution_is_the_convolution(inputs, outputs, size, threads):
    """To float32's rounding times what its transforms multiply it by, some hundred."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layer = drawn(nn.Conv2d(inputs, outputs, 3, padding=1, bias=inputs != 16))
        fast = copy.deepcopy(layer)
        fast.__class__ = fused.WinogradConv2d
        x = images(3, inputs, *size)
        with torch.inference_mode():
            ours, exact = fast(x), copy.deepcopy(layer).double()(x.double())
        assert fused.fusable(x) is False
        assert ours.is_contiguous(memory_format=torch.channels_last)
        close(ours.double(), exact, 3e-5)
        one = fast(x[1:2])  # with derivatives, as its class has it
        close(one.detach(), exact[1:2].float(), 3e-5)
    finally:
        torch.set_num_threads(before)


@compiled
def test_winograds_convolution_of_a_sample_does_not_depend_on_the_batch():
    layer = drawn(nn.Conv2d(20, 24, 3, padding=1))
    layer.__class__ = fused.WinogradConv2d
    x = images(7, 20, 10, 10)
    with torch.inference_mode():
        whole = layer(x)
        for i in range(7):
            assert torch.equal(layer(x[i : i + 1].contiguous(memory_format=torch.channels_last)), whole[i : i + 1])


@compiled
def test_nan_stays_in_its_sample_and_weights_that_change_are_seen():
    layer = drawn(nn.Conv2d(8, 8, 3, padding=1))
    layer.__class__ = fused.WinogradConv2d
    x = images(3, 8, 8, 8)
    with torch.inference_mode():
        before = layer(x)
        x[1] = math.nan
        after = layer(x)
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert after[1].isnan().all()
    with torch.no_grad():
        layer.weight.mul_(2)
        close(layer(x)[0] - layer.bias.view(-1, 1, 1), 2 * (before[0] - layer.bias.view(-1, 1, 1)))
        layer.weight.data = layer.weight.data / 2
        close(layer(x)[0], before[0])
    assert "_kept" not in copy.deepcopy(layer).__dict__


@compiled
def test_weights_that_change_behind_torchs_back_are_seen():
    layer = drawn(nn.Conv2d(8, 16, 3, padding=1))
    layer.__class__ = fused.WinogradConv2d
    x = images(1, 8, 8, 8)
    plain = nn.Conv2d(8, 16, 3, padding=1)

    def same() -> None:
        plain.load_state_dict(layer.state_dict())
        with torch.inference_mode():
            close(layer(x), F.conv2d(x, plain.weight, plain.bias, padding=1), 3e-5)

    same()
    layer.weight.data.mul_(2)  # as averages of weights do
    same()
    layer.weight.data.lerp_(torch.randn(16, 8, 3, 3), 0.5)
    same()
    layer.weight.detach().numpy()[...] *= 5
    same()
    for _ in range(20):  # at the same place in memory, with the same version
        layer.weight = None
        layer.weight = nn.Parameter(torch.randn(16, 8, 3, 3))
        same()
    other = {"weight": torch.randn(16, 8, 3, 3), "bias": torch.zeros(16)}
    with torch.inference_mode():
        close(torch.func.functional_call(layer, other, (x,)), F.conv2d(x, other["weight"], padding=1), 3e-5)
    same()


@compiled
def test_what_the_kernel_does_not_take_is_torchs_and_its_refusals_too():
    layer = drawn(nn.Conv2d(8, 16, 3, padding=1))
    layer.__class__ = fused.WinogradConv2d
    with torch.inference_mode(), pytest.raises(RuntimeError, match="channels"):
        layer(images(1, 7, 8, 8))
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with torch.inference_mode():
                x = images(1, 8, 8, 8).float()
                close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), 3e-5)
        finally:
            torch.set_default_dtype(torch.float32)
    layer.stride = (2, 2)
    with torch.inference_mode():
        assert layer(images(1, 8, 8, 8)).shape == (1, 16, 4, 4)
    layer.stride, layer.bias = (1, 1), nn.Parameter(torch.randn(32)[::2])
    with torch.inference_mode():
        x = images(1, 8, 8, 8)
        close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1), 3e-5)


@compiled
@pytest.mark.parametrize("mean", [0.0, 10.0, 1e3, 1e5])
def test_large_means_cost_no_digits(mean):
    x = images(2, 64, 12, 12) + mean
    gain, shift = torch.ones(64), torch.zeros(64)
    with torch.inference_mode():
        ours = fused.group_norm(x, 16, gain, shift, 1e-5, silu=False)
    groups = x.double().contiguous().view(2, 16, -1)  # torch's own, in float64 too, loses digits here
    apart = groups - groups.mean(-1, keepdim=True)
    exact = (apart / (apart.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(x.shape)
    close(ours.double(), exact, 1e-6)


@compiled
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(
    ("channels", "groups", "size"), [(8, 2, (1, 1)), (20, 5, (5, 7)), (96, 32, (9, 3)), (256, 1, (4, 4))]
)
def test_group_normalisation_in_one_pass_is_that_of_torch(channels, groups, size, each, silu):
    x = 3 * images(3, channels, *size) + 2
    generator = torch.Generator().manual_seed(4)
    gain, shift = torch.randn(2, *((3, channels) if each else (channels,)), generator=generator)
    with torch.inference_mode():
        ours = fused.group_norm(x, groups, gain, shift, 1e-5, silu)
    exact = F.group_norm(x.double(), groups, eps=1e-5)
    columns = (gain.double()[:, :, None, None], shift.double()[:, :, None, None]) if each else (
        gain.double().view(-1, 1, 1), shift.double().view(-1, 1, 1))  # fmt: skip
    exact = exact * columns[0] + columns[1]
    close(ours.double(), F.silu(exact) if silu else exact, 2e-6)
    with_derivative = fused.group_norm(x.clone().requires_grad_(), groups, gain, shift, 1e-5, silu)
    close(with_derivative.detach().double(), F.silu(exact) if silu else exact, 2e-5)


@compiled
def test_where_numbers_are_not_plain_torchs_own_layers_work():
    layer = drawn(nn.Conv2d(4, 4, 3, padding=1))
    fast = copy.deepcopy(layer)
    fast.__class__ = fused.WinogradConv2d
    x = images(2, 4, 8, 8)
    with torch.no_grad():
        assert fused.fusable(x)
        for other in (x.double(), x[..., 0], x.to("meta"), x[:0]):
            assert not fused.fusable(other)
        for other in (x.to("meta"), x[:0]):
            assert not fused.fusable(other, "triton")
        mapped = torch.func.vmap(lambda x: fast(x[None])[0])(x)
        torch.testing.assert_close(mapped, layer(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert not fused.fusable(x)
            assert fast(x).dtype == torch.bfloat16
        _, slope = torch.func.jvp(fast, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(slope, torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1])
        torch.testing.assert_close(torch.compile(fast, backend="eager", fullgraph=True)(x), layer(x))


def test_a_product_of_matrices_is_the_convolution_of_one_by_one():
    layer = drawn(nn.Conv2d(5, 7, 1))
    fast = copy.deepcopy(layer)
    fast.__class__ = fused.PointwiseConv2d
    x = images(2, 5, 4, 6)
    torch.testing.assert_close(fast(x), layer(x))
    assert not fused.PointwiseConv2d.fits(nn.Conv2d(5, 7, 1, stride=2))


NETWORKS = {
    "EDM2": lambda: MPUNet(
        (2, 16, 16), channels=32, multipliers=(1, 2), blocks=1, attention=(1,), head_channels=32, num_classes=3
    ),
    "U-Net": lambda: PaperUNet((3, 16, 16), channels=32, multipliers=(1, 2), blocks=1, num_classes=3),
    "its own": lambda: UNet((2, 12, 10), channels=16, attention=(1,), cond_shape=(2, 12, 10)),
    "signal": lambda: UNet((2, 16), channels=8),
    "vectors": lambda: MLP((4,), num_classes=3, cond_shape=(2,)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_an_optimized_model_gives_the_same_and_says_what_it_did(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("fastdiff.optimization.SECONDS", 0.0)
    model = model_of(NETWORKS[name]())
    faster = fastdiff.optimize(model, precision="fp32", batch_size=2)
    shown = capsys.readouterr().out
    assert shown == faster.optimized + "\n"
    assert "as it was, float32" in shown
    assert "largest difference" in shown
    assert "bfloat16" not in shown
    assert float(shown.split("largest difference ")[1].split()[0]) < 1e-4
    x, cond = torch.randn(2, *model.data_shape), {}
    if model.num_classes:
        cond["y"] = torch.tensor([0, 2])
    if model.cond_shape:
        cond["cond"] = torch.randn(2, *model.cond_shape)
    with torch.inference_mode():
        close(faster(x, torch.tensor([0.1, 0.7]), cond or None), model(x, torch.tensor([0.1, 0.7]), cond or None), 1e-4)
    assert faster.net is not model.net
    assert not any(isinstance(layer, fused.WinogradConv2d) for layer in model.net.modules())
    loaded = fastdiff.load(fastdiff.save(faster, tmp_path / "faster"))
    with torch.inference_mode():
        close(loaded(x, torch.tensor([0.1, 0.7]), cond or None), model(x, torch.tensor([0.1, 0.7]), cond or None), 1e-4)


def test_an_optimized_model_has_likelihoods_and_takes_weights_again():
    model = model_of(PaperUNet((1, 8, 8), channels=16, multipliers=(1, 2), blocks=1))
    faster = fastdiff.optimize(model, precision="fp32", batch_size=2, verbose=False)
    x = torch.rand(1, 1, 8, 8)
    ours, before = (fastdiff.log_likelihood(m, x, probes=1, rtol=1e-2, atol=1e-2).nats for m in (faster, model))
    torch.testing.assert_close(ours, before, rtol=1e-3, atol=1e-3)
    other = {name: value * 0.9 for name, value in model.net.state_dict().items()}
    faster.net.load_state_dict(other)
    model.net.load_state_dict(other)
    with torch.inference_mode():
        close(faster(x, torch.tensor([0.4])), model(x, torch.tensor([0.4])), 1e-4)


def test_a_change_that_the_network_does_not_bear_is_left_out():
    class Flat(nn.Module):  # whose view does not fit channels that lie side by side
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * 16, 2 * 16)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(x).view(len(x), -1)).view(len(x), 2, 4, 4)

    model = fastdiff.ScoreModel(Flat(), "vp", data_shape=(2, 4, 4))
    faster = fastdiff.optimize(model, batch_size=2, verbose=False)
    assert "channels_last: not kept, view size is not compatible" in faster.optimized


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_gpu_a_network_is_timed_as_a_graph(fails, monkeypatch):
    """Its whole call, without what the model does around it; eagerly where it cannot be captured."""
    monkeypatch.setattr(optimization, "capture", on_tape)
    model = fastdiff.ScoreModel(
        PaperUNet((3, 8, 8), channels=16, multipliers=(1, 2), blocks=1), "ddpm", data_shape=(3, 8, 8)
    )
    net, answers = drawn(model.net), []
    trial = optimization._Trial(model, torch.device("cpu"), 2, None)
    own = trial.call(net)

    def call():
        answers.append(own())
        if fails and len(answers) > 1:
            raise RuntimeError("not in a capture")

    replay = optimization._replayed(call, torch.device("cuda"))
    assert len(answers) == 2
    assert torch.equal(answers[0], trial.output(net))
    if fails:
        assert replay is call
        return
    trial.x.copy_(trial.x.flip(0))
    replay()
    assert len(answers) == 2  # none of the network's Python
    close(answers[1], answers[0].flip(0))


def test_of_a_new_network_nothing_is_known():
    model = fastdiff.ScoreModel(MLP((2,)), "vp", data_shape=(2,))
    assert "the outputs are all 0" in fastdiff.optimize(model, verbose=False).optimized


@compiled
def test_layers_that_become_winograds_leave_the_samples(monkeypatch):
    monkeypatch.setattr("fastdiff.optimization.PAYS", 1e9)  # whatever it takes: what is faster is for benchmarks/
    model = model_of(PaperUNet((3, 32, 32), channels=64, multipliers=(1, 2), blocks=1, attention=()))
    faster = fastdiff.optimize(model, precision="fp32", batch_size=4, verbose=False)
    kinds = [type(layer) for layer in faster.net.modules()]
    assert fused.WinogradConv2d in kinds
    ours, before = (fastdiff.sample(m, steps=3, num_samples=2, seed=1, sampler="ddim") for m in (faster, model))
    close(ours, before, 1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_each_call_scales_are_scaled_once(precision, monkeypatch, tmp_path):
    """And again where they change; the weights themselves are those of the model, also in its file."""
    monkeypatch.setattr("fastdiff.optimization.PAYS", 1e9)
    model = model_of(NETWORKS["EDM2"]())
    faster = fastdiff.optimize(model, precision=precision, batch_size=2, verbose=False)
    layers = [layer for layer in faster.net.modules() if isinstance(layer, mp_unet.MPLayer)]
    once = [layer for layer in layers if isinstance(layer, mp_unet.ScaledOnce)]
    by_winograd = [layer for layer in once if isinstance(layer, mp_unet.WinogradMPLayer)]
    assert len(once) == len(layers) - 3  # but the labels, and what has a learned gain
    assert bool(by_winograd) == cpu.available
    calls = []
    whole = mp_unet.MPLayer.scaled
    monkeypatch.setattr(mp_unet.MPLayer, "scaled", lambda self, gain: calls.append(self) or whole(self, gain))
    x, t, y = torch.randn(2, 2, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])
    near, dtype = (1e-5, torch.float32) if precision == "fp32" else (0.05, torch.bfloat16)

    def same() -> int:
        calls.clear()
        with torch.inference_mode():
            ours = faster(x.to(dtype), t, y)
            count = len(calls)
            close(ours.float(), model(x, t, y), near)
        return count

    same()
    assert same() == 3
    with torch.no_grad():
        for net in (model.net, faster.net):
            for name, weight in net.named_parameters():
                weight.mul_(1.5).add_(0.125) if "conv" in name else None
    assert same() > 3
    if precision == "bf16":
        return
    loaded = fastdiff.load(fastdiff.save(faster, tmp_path / "faster"))
    assert all(torch.equal(v, loaded.net.state_dict()[name]) for name, v in model.net.state_dict().items())
    x.requires_grad_()
    faster(x, t, y).square().sum().backward()  # with derivatives, as its class
    ours, x.grad = x.grad, None
    model(x, t, y).square().sum().backward()
    close(ours, x.grad, near)


@pytest.mark.parametrize("kind", [nn.Conv2d, mp_unet.MPLayer])
def test_what_is_kept_of_weights_is_of_these_weights_and_this_call(kind):
    """Not of a version before, of another parameter with the same numbers where it is looked at, or of another precision."""
    layer = drawn(kind(32, 48, 3, padding=1) if kind is nn.Conv2d else kind(32, 48, 2, 3))
    fast = copy.deepcopy(layer)
    fast.__class__ = fused.WinogradConv2d if kind is nn.Conv2d else mp_unet.ScaledOnce
    x = images(2, 32, 6, 5)

    def same(near: float = 3e-5, **changes: torch.Tensor) -> None:
        with torch.no_grad():
            theirs = torch.func.functional_call(layer, changes, (x,))
            ours = torch.func.functional_call(fast, changes, (x,)) if changes else fast(x)
            close(ours.float(), theirs.float(), near)

    same()
    if kind is mp_unet.MPLayer:
        x = x.bfloat16()
        same(0.02)
        x = x.float()
        layer.gain = fast.gain = 3.0
        same()
    for place in [(0, 1, 0, 1), (45, 7, 2, 2), (3, 24, 1, 0)]:
        with torch.no_grad():
            layer.weight[place] += 5
            fast.weight[place] += 5
        same()
        for net in (layer, fast):
            weight = net.weight.detach().clone()
            weight[place] -= 9
            net.weight = nn.Parameter(weight)
        same()
        same(weight=layer.weight.detach() * torch.linspace(1, 2, 32)[:, None, None])
        same()
    other = fast.to(memory_format=torch.channels_last)
    assert other is fast
    same()
    with torch.inference_mode():  # whose numbers have no version: what is looked at is spread over channels and places
        for net in (layer, fast):
            net.weight = nn.Parameter(net.weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
        fast(x)
        for net in (layer, fast):
            net.weight[:, 3] *= 2
        close(fast(x), layer(x), 3e-5)
        for net in (layer, fast):
            net.weight[..., 1:, 2] *= 2
        close(fast(x), layer(x), 3e-5)


def test_layers_of_ones_own_stay_what_they_are(monkeypatch):
    class Adapted(mp_unet.MPLayer):  # by a product of low rank, which starts at 0 (Hu et al. 2021)
        def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x, gain) + self.up * x.mean()

    monkeypatch.setattr("fastdiff.optimization.PAYS", 1e9)
    model = model_of(NETWORKS["EDM2"]())
    adapted = model.net.down[0].conv
    adapted.__class__ = Adapted
    adapted.up = nn.Parameter(torch.zeros(()))
    nn.utils.parametrizations.weight_norm(model.net.down[0].last)
    faster = fastdiff.optimize(model, precision="fp32", batch_size=2, verbose=False)
    assert type(faster.net.down[0].conv) is Adapted
    assert isinstance(faster.net.enter, mp_unet.ScaledOnce)
    x, t, y = torch.randn(2, 2, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])
    with torch.no_grad():
        close(faster(x, t, y), model(x, t, y))
        for net in (model.net, faster.net):
            net.down[0].conv.up.fill_(1.0)
            net.down[0].last.parametrizations.weight.original1[0] *= 3
        close(faster(x, t, y), model(x, t, y))


def test_a_layer_that_is_given_its_input_by_name():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.conv(input=x)

    faster = fastdiff.optimize(fastdiff.ScoreModel(Named(), "vp", data_shape=(2, 4, 4)), "fp32", verbose=False)
    assert type(faster.net.conv) is nn.Conv2d


def test_a_model_in_bfloat16_samples_in_float32(monkeypatch):
    monkeypatch.setattr("fastdiff.optimization.PAYS", 1e9)  # whatever it takes
    faster = fastdiff.optimize(model_of(NETWORKS["its own"](), cond_shape=()), batch_size=2, verbose=False)
    assert {p.dtype for p in faster.net.parameters()} == {torch.bfloat16}
    assert "bfloat16" in faster.optimized
    x = fastdiff.sample(faster, steps=4, num_samples=2)
    assert x.dtype == torch.float32
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(1, 1), {}, "model must be a ScoreModel, got Linear"),
        (
            fastdiff.ScoreModel(lambda x, t: x, "vp", data_shape=(2,)),
            {},
            "model must have a network that is a torch.nn.Module, got function",
        ),
        (fastdiff.ScoreModel(MLP((2,)), "vp", data_shape=(2,)), {"precision": "fp8"}, "precision must be one of"),
        (fastdiff.ScoreModel(MLP((2,)), "vp", data_shape=(2,)), {"batch_size": 0}, "batch_size must be"),
    ],
)
def test_what_cannot_be_optimized_is_refused(model, options, message):
    with pytest.raises(errors.ConfigError, match=message):
        fastdiff.optimize(model, **options)
