"""The operators as torch sees them: schemas, fakes, gradients, compilation; and which backend serves what."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch.library import opcheck
from watching import Names

import fastdiff
from fastdiff import losses
from fastdiff.errors import ConfigError, DeviceError
from fastdiff.execution import cpu, ops, reference
from fastdiff.networks import MLP, UNet
from fastdiff.table import COLUMNS

OPERATORS = torch.ops.fastdiff


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def arguments(grad=False):
    """One call of each operator; inputs that are trained through ask for a gradient if `grad`."""
    cursor = ops.cursor(1, 2, 3)
    x, m, base = (random(2, 3, 5, seed=s) for s in range(3))
    table = torch.rand(4, len(COLUMNS), generator=torch.Generator().manual_seed(0))
    column = torch.rand(2, generator=torch.Generator().manual_seed(1))
    output, clean, jvp = (random(2, 3, 5, seed=s).requires_grad_(grad) for s in range(3, 6))
    return {
        "normal": (torch.empty(2, 5), cursor, 1),
        "rademacher": (torch.empty(2, 5), cursor, 1),
        "step": (torch.empty(2, 3, 5), table, cursor, 1, x, m, [base, x], m, None, base),
        "measure_langevin": (torch.empty(2, 2), table, cursor, 1, True, x, m, None, None, torch.empty(2, 3, 5)),
        "perturb": (clean, column, column + 1, cursor, 2),
        "dsm_loss": (output, clean, column, column + 1, column, cursor, 2),
        "dsm_loss_backward": (column, x, column, torch.bfloat16),
        "timestep_embedding": (random(4).requires_grad_(grad), random(3).requires_grad_(grad), 2.0, 7, "sin_cos"),
        "probe_dot": (jvp, cursor, 3, "rademacher"),
        "rk_error": (x, [m, base], column, [0.5, 0.5], [0.5, -0.5], 1e-3, 1e-6),
    }


def test_every_operation_has_a_case_and_three_implementations():
    assert set(arguments()) == set(ops.SCHEMAS)
    for name in ops.SCHEMAS:
        schema = [argument.name for argument in getattr(OPERATORS, name).default._schema.arguments]
        assert list(inspect.signature(getattr(reference, name)).parameters) == schema
        ours = [
            name for name, p in inspect.signature(getattr(cpu, name)).parameters.items() if p.kind != p.KEYWORD_ONLY
        ]
        assert ours == schema


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_operators_are_registered_as_torch_wants_them(name):
    """Schema, fake implementation, autograd registration, and ahead-of-time dispatch with dynamic shapes."""
    for grad in (False, True):
        opcheck(getattr(OPERATORS, name).default, arguments(grad)[name])


def test_step_with_every_operand_is_registered_as_torch_wants_it():
    out, table, cursor, stream, x, m, history, guide, _, base = arguments()["step"]
    named = {
        "v": m.clone(), "z": random(2, 3, 5, seed=9), "measured": torch.rand(2, 2), "known": x.clone(), "mask": x > 0,
        "pushed": torch.empty_like(x), "net_input": torch.empty(2, 3, 5, dtype=torch.bfloat16), "first_bad": torch.tensor([9, 9]),
    }  # fmt: skip
    opcheck(OPERATORS.step.default, (out, table, cursor, stream, x, m, history, guide), {"base": base, **named})


@pytest.mark.parametrize("order", ["sin_cos", "cos_sin", "interleaved"])
def test_gradients_are_those_of_the_plain_expressions(order):
    cursor, wide = ops.cursor(4, 5, 6), torch.float64
    x0, output = (random(3, 7, seed=s, dtype=wide).requires_grad_() for s in range(2))
    alpha, sigma, weight = (torch.rand(3, dtype=wide, generator=torch.Generator().manual_seed(s)) for s in range(3))
    check = torch.autograd.gradcheck
    assert check(lambda x: OPERATORS.perturb(x, alpha, sigma, cursor, 2), (x0,))
    weight.requires_grad_()
    assert check(lambda m, x, w: OPERATORS.dsm_loss(m, x, alpha, sigma, w, cursor, 2), (output, x0, weight))
    assert check(lambda m, x: OPERATORS.dsm_loss(m, x, alpha, sigma, weight, cursor, 2)[0], (output, x0))
    probe = random(3, 7, dtype=wide)
    for kind, given in (("normal", None), ("rademacher", None), ("normal", probe)):
        assert check(lambda j: OPERATORS.probe_dot(j, cursor, 3, kind, given), (output,))  # noqa: B023
    t, frequencies = random(4, dtype=wide).requires_grad_(), random(3, dtype=wide).requires_grad_()
    assert check(lambda t, f: OPERATORS.timestep_embedding(t, f, 2.0, 7, order), (t, frequencies))


def test_what_has_no_gradient_says_so():
    cursor, x, c = ops.cursor(0, 0, 0), random(2, 3), torch.rand(2, requires_grad=True)
    with pytest.raises(ConfigError, match="alpha must not require a gradient"):
        OPERATORS.perturb(x, c, c, cursor, 2)
    with pytest.raises(ConfigError, match="r must not require a gradient"):
        OPERATORS.dsm_loss(x, x, c, c, c, cursor, 2)
    with pytest.raises(ConfigError, match="probe must not require a gradient"):
        OPERATORS.probe_dot(x, cursor, 3, "normal", x.clone().requires_grad_())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own compiler
def test_training_loss_and_network_compile_without_a_break():
    """fullgraph=True refuses any operation that torch.compile cannot see through; gradients agree with eager ones."""
    torch._dynamo.reset()
    small, large = MLP((2,), hidden=16, layers=1), UNet((1, 8, 8), channels=8, multipliers=(1,), blocks=1)
    for net, shape, backend in ((small, (2,), "inductor"), (large, (1, 8, 8), "aot_eager")):
        model = fastdiff.ScoreModel(net, "vp", prediction="eps", data_shape=shape)
        x0, t = random(4, *shape), torch.tensor([0.1, 0.4, 0.6, 0.9])

        def loss(x0, t, cursor, model=model):
            return losses.per_sample(model, x0, t, cursor, "dsm").mean()

        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        for draw in range(3):
            results = []
            for run in (loss, compiled):
                net.zero_grad()
                value = run(x0, t, ops.cursor(draw, 0, 7))
                value.backward()
                results.append((value.detach(), [p.grad.clone() for p in net.parameters()]))
            assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
            for ours, theirs in zip(results[0][1], results[1][1]):
                assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_export_sees_the_embedding():
    net = MLP((2,), hidden=16, layers=1).eval()
    exported = torch.export.export(net, (random(3, 2), torch.rand(3)))
    assert any("timestep_embedding" in str(node.target) for node in exported.graph.nodes)
    assert torch.allclose(exported.module()(random(3, 2), torch.ones(3)), net(random(3, 2), torch.ones(3)))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch's own decompositions
def test_transformations_see_the_derivatives():
    """Forward mode, torch.func and gradients of gradients, which know no formula of ours, against plain expressions."""
    cursor, wide = ops.cursor(1, 2, 3), torch.float64
    x0, output = (random(3, 5, seed=s, dtype=wide) for s in range(2))
    a, b, weight = (torch.rand(3, dtype=wide, generator=torch.Generator().manual_seed(s)) for s in range(3))
    t, frequencies, tangent = random(3, dtype=wide), random(4, dtype=wide), random(3, 5, seed=7, dtype=wide)
    eps = torch.empty(3, 5)
    cpu.normal(eps, cursor, 2)

    def plain(m, x):
        return (weight * (m - a[:, None] * x - b[:, None] * eps).square().mean(1)).sum()

    def ours(m, x):
        return ops.dsm_loss(m, x, a, b, weight, cursor, 2)[0].sum()

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(transform(ours)(output, x0), transform(plain)(output, x0), rtol=1e-10)
    for f, g in (
        (lambda x: ops.perturb(x, a, b, cursor, 2), lambda x: a[:, None] * x),
        (lambda x: ops.probe_dot(x, cursor, 2, "normal"), lambda x: (x * eps).sum(1)),
        (lambda x: ours(x, x0), lambda x: plain(x, x0)),
    ):
        expected = torch.func.jvp(g, (output,), (tangent,))[1]
        assert torch.allclose(torch.func.jvp(f, (output,), (tangent,))[1], expected)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(output, tangent)
            found = torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
        assert torch.allclose(found, expected)
    embedded = torch.func.jacfwd(lambda t: ops.timestep_embedding(t, frequencies, 2.0, 8, "sin_cos"))(t)
    angle = 2 * t[:, None] * frequencies
    expected = torch.cat((angle.cos(), -angle.sin()), 1) * 2 * frequencies.repeat(2)
    assert torch.allclose(embedded.diagonal(dim1=0, dim2=2).T, expected)
    each = torch.func.vmap(lambda t: ops.timestep_embedding(t[None], frequencies, 2.0, 8, "sin_cos")[0])(t)
    assert torch.allclose(each, ops.timestep_embedding(t, frequencies, 2.0, 8, "sin_cos"))
    m = output.clone().requires_grad_()
    for operator in (ops.dsm_loss, OPERATORS.dsm_loss):
        loss = operator(m, x0, a, b, weight, cursor, 2)[0].sum()
        (first,) = torch.autograd.grad(loss, m, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), m)
        (expected,) = torch.autograd.grad(plain(m, x0), m, create_graph=True)
        (expected,) = torch.autograd.grad(expected.square().sum(), m)
        assert torch.allclose(second, expected, rtol=1e-10)


def test_gradients_by_the_short_way_are_those_of_the_operators():
    """fastdiff.execution.ops leaves the dispatcher out; defaults, keywords and gradients are the same."""
    cursor = ops.cursor(4, 5, 6)
    for name in ("perturb", "dsm_loss", "timestep_embedding", "probe_dot"):
        gradients = []
        for run in (getattr(ops, name), getattr(OPERATORS, name)):
            inputs = arguments(grad=True)[name]
            outputs = run(*inputs)
            first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
            first.square().sum().backward()
            gradients.append([v.grad for v in inputs if isinstance(v, torch.Tensor) and v.requires_grad])
        assert gradients[0]
        for ours, theirs in zip(*gradients):
            assert torch.equal(ours, theirs)
    value = random(2, 9)
    assert torch.equal(
        ops.probe_dot(value=value, cursor=cursor, stream=3, kind="normal"),
        reference.probe_dot(value, cursor, 3, "normal"),
    )
    with pytest.raises(DeviceError, match="all tensors must be on cpu, got one on meta"):
        ops.perturb(value, torch.ones(2, device="meta"), torch.ones(2), cursor, 2)
    negative = torch.complex(value, value).conj().imag
    assert negative.is_neg()
    ones = torch.ones(2)
    assert torch.equal(ops.perturb(negative, ones, ones, cursor, 2), reference.perturb(-value, ones, ones, cursor, 2))
    with pytest.raises(ConfigError, match="order must be one of"):
        ops.timestep_embedding(torch.ones(2), torch.ones(2), 1.0, 4, "foo")


def test_dispatch_modes_see_every_operation():
    with Names() as names, torch.no_grad():
        ops.perturb(random(2, 3), torch.ones(2), torch.ones(2), ops.cursor(0, 0, 0), 2)
    assert "fastdiff.perturb.default" in names.seen


def test_bfloat16_data_train_in_float32():
    net = MLP((2,), hidden=8, layers=1)
    model = fastdiff.ScoreModel(net, "vp", prediction="eps", data_shape=(2,))
    t = torch.tensor([0.2, 0.7])
    wide = losses.per_sample(model, random(2, 2).bfloat16().float(), t, ops.cursor(0, 0, 1), "dsm")
    net.bfloat16()
    narrow = losses.per_sample(model, random(2, 2).bfloat16(), t, ops.cursor(0, 0, 1), "dsm")
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow, wide, rtol=0.1)


# --- which backend serves what ---------------------------------------------------------------------------------------


def test_the_compiled_library_serves_the_cpu():
    assert ops.resolve("auto", "auto", torch.device("cpu"), torch.float32)[0] == "cpu"
    assert ops.backend_module("cpu") is cpu
    assert ops.backend_module("reference") is reference
    out, again = torch.empty(2, 100), torch.empty(2, 100)
    OPERATORS.normal(out, ops.cursor(0, 0, 0), 1)
    cpu.normal(again, ops.cursor(0, 0, 0), 1)
    assert torch.equal(out, again)


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    cuda = torch.device("cuda", 0)
    assert ops.resolve("auto", "auto", cuda, torch.float32)[0] == "triton"
    name, _, why = ops.resolve("auto", "auto", cuda, torch.float64)
    assert name == "reference"
    assert "float32, not float64" in why
    with pytest.raises(ConfigError, match="runs CPU tensors, not cuda"):
        ops.resolve("cpu", "auto", cuda, torch.float32)
    monkeypatch.setattr(cpu, "available", False)
    monkeypatch.setattr(cpu, "why", "no compiler")
    name, _, why = ops.resolve("auto", "auto", torch.device("cpu"), torch.float32)
    assert name == "reference"
    assert "no compiler" in why
    with pytest.raises(ConfigError, match="no compiler"):
        ops.resolve("cpu", "auto", torch.device("cpu"), torch.float32)


def test_cursor_takes_any_seed():
    assert ops.cursor(1, 2, 2**64 - 1).tolist() == [1, 2, -1]
    assert ops.cursor(1, 2, 2**63 - 1).tolist() == [1, 2, 2**63 - 1]
    assert math.prod(ops.cursor(0, 0, 0).shape) == 3
