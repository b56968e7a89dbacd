"""Each private name of torch that fastdiff uses does what it is used for."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.execution import torch_private


def test_is_alias_of():
    x = torch.zeros(4)
    assert torch_private.is_alias_of(x[1:], x.view(2, 2))
    assert not torch_private.is_alias_of(x, x.clone())


def test_functorch_is_active():
    seen = []
    torch.func.vmap(lambda x: seen.append(torch_private.functorch_is_active()) or x)(torch.zeros(2))
    assert seen == [True]
    assert not torch_private.functorch_is_active()


def test_dispatch_modes():
    assert torch_private.dispatch_modes() == 0
    with TorchDispatchMode():
        assert torch_private.dispatch_modes() == 1


def test_forward_mode_is_active():
    assert not torch_private.forward_mode_is_active()
    with forward_ad.dual_level():
        assert torch_private.forward_mode_is_active()


def test_foreach_lerp():
    a, b = [torch.tensor([0.0, 2.0])], [torch.tensor([1.0, 4.0])]
    torch_private.foreach_lerp_(a, b, 0.25)
    assert torch.equal(a[0], torch.tensor([0.25, 2.5]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it imports its compiler
@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, False), ({"mode": "default"}, False), ({"mode": "max-autotune-no-cudagraphs"}, False), ({"backend": "eager"}, False),
        ({"mode": "reduce-overhead"}, True), ({"mode": "max-autotune"}, True), ({"options": {"triton.cudagraphs": True}}, True),
    ],
)  # fmt: skip
def test_compiles_to_graphs_and_uncompiled(options, graphs):
    def function(x):
        return x

    module, compiled = torch.nn.Tanh(), torch.compile(function, **options)
    assert not torch_private.compiles_to_graphs(module)
    assert torch_private.uncompiled(function) is None
    assert torch_private.compiles_to_graphs(torch.compile(module, **options)) == graphs
    module.compile(**options)
    assert torch_private.compiles_to_graphs(module) == graphs
    assert torch_private.compiles_to_graphs(compiled) == graphs
    assert torch_private.uncompiled(compiled) is function


@pytest.mark.gpu
def test_names_of_cuda_builds():
    torch_private.clear_cublas_workspaces()
    assert callable(torch._C._cuda_endAllocateToPool)
    assert callable(torch._C._cuda_releasePool)
