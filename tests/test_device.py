"""What only a device shows: threads that capture at the same time, memory after a capture that failed, the commands' --device.

Each test runs on a CPU too, eagerly, where it shows that it asks for what it means.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.cli import commands
from fastdiff.execution import graphs
from fastdiff.networks import MLP, UNet

THREADS = 8


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    graphs.clear()
    yield torch.device(request.param)
    graphs.clear()


def opened(net, device):
    """The network with no layer of zeros, which training would open."""
    for p in net.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.02)
    return net.to(device).eval().requires_grad_(False)


class Products(nn.Module):
    """Whose bits are the same however it is run."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(-0.3))

    def forward(self, x, t):
        return x * self.weight + 0.1 * t.view(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("kind", ["products", "U-Net"])
def test_eight_threads_sample_from_one_model(device, kind):
    """All capture at once, on streams of their own; a second run finds the graphs of the first."""
    net = opened(Products() if kind == "products" else UNet((1, 8, 8), channels=8, blocks=1), device)
    model = fastdiff.ScoreModel(net, "vp", data_shape=(1, 8, 8))
    engine, together = "graph" if device.type == "cuda" else "eager", threading.Barrier(THREADS, timeout=60)
    # which a new thread does not take over, and by which a convolution may round (AVX2)
    share = torch.get_num_threads()

    def draw(seed, engine):
        return fastdiff.sample(model, steps=10, num_samples=2 + seed % 2, seed=seed, engine=engine, device=device)

    def work(seed):
        torch.set_num_threads(share)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream):
            together.wait()
            drawn = [draw(seed, engine) for _ in range(3)]
            if stream is not None:
                stream.synchronize()
        return drawn

    with ThreadPoolExecutor(THREADS) as threads:
        found = list(threads.map(work, range(THREADS)))
    for seed, drawn in enumerate(found):
        alone = draw(seed, "eager")
        for x in drawn:
            if kind == "products" or device.type == "cpu":
                assert torch.equal(x, alone), seed
            else:  # a stream's convolutions may be others, with TF32's roundings
                assert (x - alone).abs().max() <= 2**-8 * alone.abs().max(), seed


class Called:
    """A graph that calls what it would repeat."""

    def __init__(self, body):
        self.replay = body


def called(warm, bodies, device):
    warm()
    return [Called(body) for body in bodies]


def test_a_compiled_network_is_captured_as_it_is_compiled(device, monkeypatch):
    """And stays so: what looks into a warm-up must not make torch.compile step aside, which it does for good."""
    ran = []

    def backend(module, inputs):
        def run(*args):
            ran.append(torch.is_grad_enabled())
            return module(*args)

        return run

    if device.type == "cpu":
        monkeypatch.setattr(graphs, "capture", called)
        monkeypatch.setattr(graphs, "obstacle", lambda *args: None)
    net = opened(Products(), device)
    compiled = torch.compile(net, backend=backend, dynamic=False)
    options = {"steps": 10, "shape": (3, 5), "num_samples": 4, "device": device}
    x, info = fastdiff.sample(compiled, "vp", engine="graph", return_info=True, **options)
    assert info.engine == "graph"
    assert torch.equal(x, fastdiff.sample(net, "vp", engine="eager", **options))
    seen = len(ran)
    assert seen >= 3  # in the warm-ups and the capture
    with torch.no_grad():
        compiled(x, torch.ones(4, device=device))
    assert len(ran) == seen + 1


class Reading(nn.Module):
    """A network that reads a number of its answer on the host, as no capture can."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        out = self.net(x, t)
        return out if out.flatten()[0].item() < 1e9 else -out


def reserved(device):
    """Bytes that torch holds of the device, without what it could give back."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def test_a_large_network_that_cannot_be_captured_leaves_no_memory(device):
    """35 million parameters, whose capture holds a gigabyte of activations when it fails."""
    large = {"channels": 128, "multipliers": (1, 2, 2, 2), "blocks": 3, "attention": (1, 2)}
    size, batch = (large, 64) if device.type == "cuda" else ({"channels": 8, "blocks": 1}, 2)
    net = Reading(opened(UNet((3, 32, 32), **size), device))

    def draw(**options):
        return fastdiff.sample(
            net, "vp", 3, shape=(3, 32, 32), num_samples=batch, prediction="eps", check="off", device=device, **options
        )

    eager = draw(engine="eager")
    before = reserved(device)
    warned = pytest.warns(RuntimeWarning, match="cannot be captured as CUDA graphs")
    with warned if device.type == "cuda" else contextlib.nullcontext():
        x, info = draw(return_info=True)
    assert info.engine == "eager"
    # convolutions may be others after the capture's warm-up, with TF32's roundings
    assert torch.allclose(x, eager, atol=float(2**-8 * eager.abs().max()), rtol=0)
    del x
    graphs.clear()
    assert reserved(device) <= before + 2**25


def test_commands_run_on_the_device(device, tmp_path):
    """What they make there is near what Python makes here, where the network's sums are in another order."""
    model = fastdiff.ScoreModel(opened(MLP((2,)), torch.device("cpu")), "vp", data_shape=(2,), data_range=(-1.0, 1.0))
    fastdiff.save(model, tmp_path / "m.safetensors")
    x = fastdiff.sample(model, steps=20, num_samples=4)
    data, drawn, measured = tmp_path / "data.npy", tmp_path / "x.npy", tmp_path / "x.npz"
    some = torch.linspace(-0.9, 0.9, 8).view(4, 2)
    np.save(data, some.numpy())
    of = [str(tmp_path / "m.safetensors"), "--device", str(device)]
    assert commands.main(["sample", *of, "--steps", "20", "-n", "4", "--out", str(drawn)]) == 0
    np.testing.assert_allclose(np.load(drawn), x, rtol=1e-3, atol=1e-3)
    to_file = ["--range", "-1", "1", "--trace", "exact", "--out", str(measured)]
    assert commands.main(["likelihood", *of, "--data", str(data), *to_file]) == 0
    expected = fastdiff.log_likelihood(model, some, trace="exact")
    np.testing.assert_allclose(np.load(measured)["nats"], expected.nats, rtol=1e-3, atol=1e-3)
    run = ["--steps", "2", "--batch-size", "4", "--out", str(tmp_path / "run"), *of[1:]]
    assert commands.main(["train", str(data), *run]) == 0
    assert fastdiff.load(tmp_path / "run").data_shape == (2,)
