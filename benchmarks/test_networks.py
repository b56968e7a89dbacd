"""A call of a network, and a step of its training, against the libraries that have its weights: at equal weights, in turns."""

import functools
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import clock
from peers import EDM2, EDM2_NETWORKS, SCORE_SDE, load, missing
from recorder import turns
from torch import Tensor, nn
from unets import SHAPE, drawn, of_diffusers

import fastdiff
from fastdiff.networks import MPUNet, PaperUNet
from fastdiff.training.sources import edm2 as from_edm2
from fastdiff.training.sources import score_sde as from_score_sde

pytestmark = pytest.mark.usefixtures("kept_memory")

BATCH = 4


def of_score_sde() -> tuple[nn.Module, PaperUNet]:
    """(its NCSN++ of 62.8 million parameters, ours with the same weights)."""
    make, config = ncsnpp()
    theirs = drawn(make(config))
    return theirs, from_score_sde.network(theirs.state_dict(), SHAPE, centered=False)


def of_edm2() -> tuple[nn.Module, MPUNet]:
    """(EDM2's network of size XS on images, ours with the same weights)."""
    theirs = drawn(load(EDM2_NETWORKS).UNet(SHAPE[1], SHAPE[0], label_dim=0, model_channels=128))
    return theirs, from_edm2.network(theirs.state_dict(), SHAPE)


@functools.cache
def ncsnpp() -> tuple[Any, Any]:
    """(its class, its configuration for CIFAR-10), imported once."""
    root = Path(os.environ["SCORE_SDE_PYTORCH"])
    stand_ins = {"op": types.ModuleType("op"), "ml_collections": types.ModuleType("ml_collections")}
    stand_ins["op"].upfirdn2d = upfirdn2d  # type: ignore[attr-defined]
    stand_ins["ml_collections"].ConfigDict = Config  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, stand_ins), mock.patch.object(sys, "path", [str(root), *sys.path]):
        from configs.ve.cifar10_ncsnpp_continuous import get_config
        from models.ncsnpp import NCSNpp

        return NCSNpp, get_config()


class Config(dict):  # type: ignore[type-arg]
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


def upfirdn2d(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Its extension's function as its own plain PyTorch has it (op/upfirdn2d.py, upfirdn2d_native)."""
    batch, channels, height, width = x.shape
    out = F.pad(x.reshape(-1, height, 1, width, 1, 1), [0, 0, 0, up - 1, 0, 0, 0, up - 1]).view(
        -1, 1, height * up, width * up
    )
    out = F.conv2d(F.pad(out, (*pad, *pad)), kernel.flip(0, 1)[None, None].to(x.dtype))
    return out.view(batch, channels, *out.shape[2:])[:, :, ::down, ::down]


def calls(net: Callable[..., Any], x: Tensor, t: Tensor) -> Callable[[], float]:
    def measure() -> float:
        with torch.inference_mode():
            began = clock()
            net(x, t)
            return 1e3 * (clock() - began)

    return measure


def check(ours: Tensor, theirs: Tensor, most: float) -> None:
    """What is timed is the same."""
    difference = float((ours.float() - theirs).abs().max() / theirs.abs().max())
    assert difference < most, f"{difference:.1e} apart"


# (opponent, the two networks, its call, the time, of ScoreModel: process, prediction and time input)
CASES: dict[str, tuple[Any, ...]] = {
    "U-Net 35.7M 4x3x32x32": (
        "diffusers", of_diffusers, lambda net, x, t: net(x, t).sample, 500.0, "ddpm", "eps", "index",
    ),
    "NCSN++ 62.8M 4x3x32x32": (
        SCORE_SDE, of_score_sde, lambda net, x, t: net(x, t.exp()) * t.exp().view(-1, 1, 1, 1), 3.0, "ve", "scaled_score",
        "log_sigma",
    ),
    "EDM2-XS 118.7M 4x3x32x32": (
        EDM2, of_edm2, lambda net, x, t: net(x, t, None), 0.3, fastdiff.EDM(sigma_data=0.5), "edm", "c_noise",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_call(benchmark, recorder, name, precision):
    """Theirs eagerly in float32, as it comes; ours as `fastdiff.optimize` leaves it, in bfloat16 where that is faster here."""
    opponent, make, call, time, sde, prediction, time_input = CASES[name]
    if reason := missing(opponent):
        pytest.skip(reason)
    theirs, network = make()
    model = fastdiff.ScoreModel(network.eval(), sde, prediction, time_input, SHAPE)
    made = fastdiff.optimize(model, precision=precision, batch_size=BATCH, verbose=False)
    dtype = next(made.net.parameters()).dtype
    x, t = torch.rand(BATCH, *SHAPE), torch.full((BATCH,), time)
    peer = functools.partial(call, theirs.eval())
    with torch.inference_mode():
        check(made.net(x.to(dtype), t), peer(x, t), 1e-4 if dtype is torch.float32 else 0.1)
    benchmark.group = f"networks: {name}"
    systems = {"ours": calls(made.net, x.to(dtype), t), opponent: calls(peer, x, t)}
    ratios = recorder.pairs("networks", f"{name}, {precision}", BATCH, "ms a call", turns(systems, 25.0))
    benchmark.extra_info["ratio"] = ratios[opponent]
    benchmark.pedantic(systems["ours"], rounds=1)


def step(net: nn.Module, clean: Tensor, autocast: bool) -> Callable[[], float]:
    """A step by hand: both networks' are the same around them."""
    adam = torch.optim.AdamW(net.parameters(), lr=2e-4, fused=True)
    generator = torch.Generator().manual_seed(0)

    def measure() -> float:
        began = clock()
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(0, 1000, (len(clean),), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = net(clean + noise, t)
        loss = F.mse_loss((out.sample if hasattr(out, "sample") else out).float(), noise)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return 1e3 * (clock() - began)

    return measure


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_step(benchmark, recorder, precision):
    """A step of the U-Net of 35.7 million parameters, forward and backward passes and Adam; theirs in float32."""
    if reason := missing("diffusers"):
        pytest.skip(reason)
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor multiplies no bfloat16")
    theirs, network = of_diffusers()
    clean = torch.rand(BATCH, *SHAPE)
    benchmark.group = "networks: a step of training"
    systems = {
        "ours": step(network.train(), clean, precision == "bf16"),
        "diffusers": step(theirs.train(), clean, False),
    }
    times = turns(systems, 40.0)
    ratios = recorder.pairs("networks", f"U-Net 35.7M 4x3x32x32, {precision}", BATCH, "ms a step of training", times)
    benchmark.extra_info["ratio"] = ratios["diffusers"]
    benchmark.pedantic(systems["ours"], rounds=1)
