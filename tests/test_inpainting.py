"""What is done to states after a row: known parts, measurements, gradients; inpainting and colorization as verbs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re

import numpy as np
import pytest
import torch
from oracles import Gaussian
from PIL import Image

import fastdiff
from fastdiff import errors, inverse, samplers
from fastdiff.cli import commands
from fastdiff.execution.noise import MEASUREMENTS, PRIOR, SAMPLER
from fastdiff.inverse.jumps import with_jumps
from fastdiff.networks import UNet
from fastdiff.table import Row

NAN = math.nan
COVARIANCE = torch.tensor([[1.0, 0.8, 0.3], [0.8, 1.0, 0.5], [0.3, 0.5, 1.0]], dtype=torch.float64)
VECTOR = Gaussian([0.3, -0.2, 0.5], cov=COVARIANCE)
# of independent pixels: its score is elementwise, so its bits do not depend on the batch
PICTURE = Gaussian(torch.linspace(-0.5, 0.5, 32).view(2, 4, 4), std=0.7)


def score(data, sde):
    process = fastdiff.processes.get(sde)
    return lambda x, t: data.score(x, process.alpha(t.double()), process.sigma(t.double()))


def draw(data, sde, guidance=None, steps=20, **options):
    options = {"num_samples": 6, "sampler": "ancestral", **options}
    return fastdiff.sample(score(data, sde), sde, steps, shape=tuple(data.shape), guidance=guidance, **options)


def exact(data, known):
    """Mean and covariance of what is NaN in a vector, given the rest."""
    have = ~known.isnan()
    gain = data.cov[~have][:, have] @ torch.linalg.inv(data.cov[have][:, have])
    mean = data.mean[~have] + gain @ (known[have].double() - data.mean[have])
    return mean, data.cov[~have][:, ~have] - gain @ data.cov[have][:, ~have]


VECTOR.cov = COVARIANCE
KNOWN = torch.tensor([0.9, NAN, NAN])
PIXELS = torch.linspace(-1, 1, 32).view(2, 4, 4)
MASK = torch.arange(16).view(1, 4, 4) % 3 == 0


# --- replacement -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ["ve", "vp", "subvp"])
def test_replacement_is_the_printed_algorithm(sde):
    """Song et al. 2021, App. I.2 around a corrector and a predictor, in plain torch with the same noise."""
    x = draw(VECTOR, sde, inverse.Replacement((KNOWN, None)), steps=7, sampler="pc", dtype=torch.float64)
    table = fastdiff.plan(sde, 7, sampler="pc")
    net, z = score(VECTOR, sde), functools.partial(fastdiff.normal, 6, (3,), seed=0)
    mine = z(stream=PRIOR).double() * table.prior_std
    for k, row in enumerate(table.rows):
        noise = z(draw=k, stream=SAMPLER).double()
        h = row.p * mine + row.q * net(mine, torch.full((6,), row.network_time, dtype=torch.float64))
        mine = row.a * mine + row.b[0] * h + row.c * noise
        after = table.rows[k + 1].level if k + 1 < len(table) else None
        mine[:, 0] = KNOWN[0] if after is None else after.alpha * KNOWN[0].double() + after.sigma * noise[:, 0]
    torch.testing.assert_close(x, mine, rtol=0, atol=1e-11)


def test_replacement_in_annealed_langevin_dynamics():
    """Song & Ermon 2019, Alg. 2."""
    sde = fastdiff.NCSN(sigmas=[3.0, 1.0, 0.3])
    x = draw(VECTOR, sde, inverse.Replacement((KNOWN, None)), 6, sampler="annealed_langevin", dtype=torch.float64)
    eta = fastdiff.schedules.langevin_step(1.0, math.sqrt(10), 2)
    mine = fastdiff.normal(6, (3,), seed=0).double() * sde.prior_std
    sigmas = [3.0, 3.0, 1.0, 1.0, 0.3, 0.3]
    for k, sigma in enumerate(sigmas):
        z = fastdiff.normal(6, (3,), seed=0, draw=k, stream=SAMPLER).double()
        step = eta * sigma**2
        mine = mine + step * VECTOR.score(mine, 1.0, sigma) + math.sqrt(2 * step) * z
        mine[:, 0] = KNOWN[0].double() + [*sigmas[1:], 0.3][k] * z[:, 0]
    mine = mine + 0.3**2 * VECTOR.score(mine, 1.0, 0.3)
    mine[:, 0] = KNOWN[0]
    torch.testing.assert_close(x, mine, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "heun", "dpmpp_2m", "dpmpp_2s", "unipc", "sa", "dpm_2", "pc"])
@pytest.mark.parametrize("sde", ["ve", "vp", "subvp", "edm"])
def test_after_each_row_the_known_part_is_at_the_rows_level(sampler, sde):
    """Also where a row draws no noise, or goes back to a base; the same bits by plain PyTorch."""
    seen, table = [], fastdiff.plan(sde, 6, sampler=sampler)
    guidance = inverse.Replacement((PIXELS, MASK))
    x = draw(PICTURE, sde, guidance, 6, sampler=sampler, callback=lambda row, t, x: seen.append(x))
    for k, state in enumerate(seen[:-1]):
        level = table.rows[k + 1].level
        z = fastdiff.normal(6, (2, 4, 4), seed=0, draw=k, stream=SAMPLER)
        wanted = level.alpha * PIXELS + level.sigma * z
        torch.testing.assert_close(state[:, MASK.expand(2, 4, 4)], wanted[:, MASK.expand(2, 4, 4)])
    assert torch.equal(seen[-1], x)
    assert torch.equal(x[:, MASK.expand(2, 4, 4)], PIXELS[MASK.expand(2, 4, 4)].expand(6, -1))
    other = draw(PICTURE, sde, guidance, 6, sampler=sampler, backend="reference")
    torch.testing.assert_close(x, other, rtol=0, atol=0)


@pytest.mark.parametrize("sampler", [name for name in samplers.SAMPLERS if name not in ("rk45", "adaptive_sde")])
def test_no_mask_is_no_guidance_and_a_whole_one_gives_the_data(sampler):
    steps = 10 if sampler == "annealed_langevin" else 6
    plain = draw(PICTURE, "vp", None, steps, sampler=sampler)
    none = inverse.Replacement((torch.full((2, 4, 4), NAN), torch.zeros(1, 1, 4, dtype=torch.int64)))
    assert torch.equal(draw(PICTURE, "vp", none, steps, sampler=sampler), plain)
    whole = inverse.Replacement((PIXELS, torch.ones(1)))
    assert torch.equal(draw(PICTURE, "vp", whole, steps, sampler=sampler), PIXELS.expand(6, 2, 4, 4))


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64])
def test_masks_of_every_kind_broadcast(kind):
    wanted = draw(PICTURE, "ve", inverse.Replacement((PIXELS, MASK.expand(6, 2, 4, 4))))
    for mask in (MASK, MASK[0], MASK[None], MASK.expand(6, 1, 4, 4)):
        assert torch.equal(draw(PICTURE, "ve", inverse.Replacement((PIXELS, mask.to(kind)))), wanted)
    hidden = torch.where(MASK, PIXELS, NAN)
    assert torch.equal(draw(PICTURE, "ve", inverse.Replacement((hidden, None))), wanted)
    assert torch.equal(draw(PICTURE, "ve", inverse.Replacement((hidden.expand(6, 2, 4, 4), MASK.to(kind)))), wanted)
    full = MASK.expand(2, 4, 4)
    problem = inverse.Problem(PIXELS[full], inverse.Mask(MASK), 0.0)
    assert torch.equal(draw(PICTURE, "ve", inverse.Replacement(problem)), wanted)


def test_the_known_part_is_the_data_in_their_own_units_and_precision():
    model = fastdiff.ScoreModel(
        score(PICTURE, "ve"),
        "ve",
        "score",
        data_shape=(2, 4, 4),
        standardize=(3.3, torch.linspace(0.1, 7, 32).view(2, 4, 4)),
    )
    for dtype in (torch.float16, torch.float32, torch.float64):
        known = (PIXELS * 20 + 3).to(dtype)
        x = fastdiff.sample(model, steps=6, num_samples=3, guidance=inverse.Replacement((known, MASK)), dtype=dtype)
        full = MASK.expand(3, 2, 4, 4)
        assert torch.equal(x[full], known.expand(3, 2, 4, 4)[full])


def test_operations_after_a_step_leave_the_known_part_alone():
    sampler = samplers.DDIM(clips_eps=False)
    x = draw(PICTURE, "vp", inverse.Replacement((PIXELS, MASK)), 6, sampler=sampler, clip=(-0.1, 0.1))
    assert torch.equal(x[:, MASK.expand(2, 4, 4)], PIXELS[MASK.expand(2, 4, 4)].expand(6, -1))
    table = fastdiff.plan("vp", 6, sampler="ancestral", clip_state=(-0.5, 0.5))
    seen = []
    draw(
        PICTURE, "vp", inverse.Replacement((PIXELS, MASK)), None, sampler=None, table=table,
        callback=lambda row, t, x: seen.append(x),
    )  # fmt: skip
    for k, state in enumerate(seen):
        assert float(state.masked_fill(MASK, 0.0).abs().max()) <= 0.5
        level = table.rows[k + 1].level if k < 5 else None
        z = fastdiff.normal(6, (2, 4, 4), seed=0, draw=k, stream=SAMPLER)
        wanted = PIXELS.expand(6, 2, 4, 4) if level is None else level.alpha * PIXELS + level.sigma * z
        full = MASK.expand(6, 2, 4, 4)
        torch.testing.assert_close(state[full], wanted[full])


def test_a_callers_noise_is_the_known_parts_too():
    noise = torch.stack([fastdiff.normal(6, (2, 4, 4), seed=0, draw=k, stream=SAMPLER) for k in range(6)])
    guidance = inverse.Replacement((PIXELS, MASK))
    wanted = draw(PICTURE, "vp", guidance, 6, sampler="ddim")
    assert torch.equal(draw(PICTURE, "vp", guidance, 6, sampler="ddim", noise=noise), wanted)
    asked = []
    x = draw(PICTURE, "vp", guidance, 6, sampler="ddim", noise=lambda k: asked.append(k) or noise[k], batch_size=4)
    assert torch.equal(x, wanted)
    assert asked == [0, 1, 2, 3, 4]  # the last row's known part is the data
    noise[5] = NAN
    assert torch.equal(draw(PICTURE, "vp", guidance, 6, sampler="ddim", noise=noise), wanted)
    noise[4, 0, 0, 0, 0] = NAN
    with pytest.raises(errors.DataError, match="noise must be finite, got nan at index"):
        draw(PICTURE, "vp", guidance, 6, sampler="ddim", noise=noise)


def test_the_bias_of_replacement_is_the_one_of_its_recursion():
    """On a Gaussian its rows are affine with Gaussian noise: the mean of what is unknown, step by step, which is not the
    posterior's. RePaint is nearer."""
    table = fastdiff.plan("vp", 50, sampler="ancestral")
    mean = torch.zeros(3, dtype=torch.float64)
    for k, row in enumerate(table.rows):
        h = row.p * mean + row.q * VECTOR.score(mean[None], row.level.alpha, row.level.sigma)[0]
        mean = row.a * mean + row.b[0] * h
        mean[0] = KNOWN[0] * (table.rows[k + 1].level.alpha if k < 49 else 1)
    truth, covariance = exact(VECTOR, KNOWN)
    spread = covariance.diag().sqrt()
    off = (mean[1:] - truth) / spread
    assert off[0] < -0.25  # in standard deviations of the posterior
    x = draw(VECTOR, "vp", inverse.Replacement((KNOWN, None)), 50, num_samples=8000)
    assert ((x[:, 1:].double().mean(0) - mean[1:]).abs() < 4 * x[:, 1:].double().std(0) / math.sqrt(8000)).all()
    again = draw(VECTOR, "vp", inverse.RePaint((KNOWN, None), 5, 10), 50, num_samples=8000)
    assert ((again[:, 1:].double().mean(0) - truth) / spread).abs().max() < 0.5 * off.abs().max()


# --- RePaint ---------------------------------------------------------------------------------------------------------


def authors_schedule(steps, jump_length, resamplings):
    """Lugmayr et al. 2022, App. B, in levels above the data: T, T − 1, …, with jumps."""
    jumps = {j: resamplings - 1 for j in range(0, steps - jump_length, jump_length)}
    t, times = steps, []
    while t >= 1:
        t -= 1
        times.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            for _ in range(jump_length):
                t += 1
                times.append(t)
    return [each + 1 for each in [*times, -1]]


@pytest.mark.parametrize(("steps", "length", "times"), [(250, 10, 10), (20, 3, 4), (20, 1, 2), (7, 6, 3), (11, 10, 1)])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "pc"])
def test_repaints_rows_are_the_papers_schedule(steps, length, times, sampler):
    plain = fastdiff.plan("ddpm", steps, sampler=sampler, prediction="eps")
    table = with_jumps(plain, length, times)
    ladder = [plain.end, *[row.level for row in plain.rows if row.label != "corrector"][::-1]]
    wanted = authors_schedule(steps, length, times)
    down = [(a, b) for a, b in itertools.pairwise(wanted) if b < a]
    called = [row.level for row in table.rows if row.calls_network and row.label != "corrector"]
    assert called == [ladder[a] for a, _ in down]
    assert table.calls == plain.calls + len(range(1, steps - length + 1, length)) * (times - 1) * length * (
        plain.calls // steps
    )
    ups = [row for row in table.rows if row.label == "jump"]
    starts = [a for a, b in itertools.pairwise(wanted) if b > a]
    assert [row.level for row in ups] == [ladder[a] for a in starts[::length]]
    for row, a in zip(ups, starts[::length]):  # N(α x0, σ²) becomes that of j levels above
        high = ladder[a + length]
        assert math.isclose(row.a * row.level.alpha, high.alpha, rel_tol=1e-12)
        assert math.isclose((row.a * row.level.sigma) ** 2 + row.c**2, high.sigma**2, rel_tol=1e-12)


def test_repaint_of_one_pass_is_replacement():
    pair = (PIXELS, MASK)
    assert torch.equal(draw(PICTURE, "vp", inverse.RePaint(pair, 3, 1)), draw(PICTURE, "vp", inverse.Replacement(pair)))
    x, info = draw(PICTURE, "ve", inverse.RePaint(pair, 4, 3), 20, return_info=True)
    assert info.network_calls == 20 + 4 * 4 * 2
    assert torch.equal(x[:, MASK.expand(2, 4, 4)], PIXELS[MASK.expand(2, 4, 4)].expand(6, -1))


# --- projections and gradients ---------------------------------------------------------------------------------------

GRAY = inverse.Problem(torch.full((1, 4, 4), 0.25), inverse.Grayscale(), 0.0)
BLOCKS = inverse.Problem(torch.linspace(-1, 1, 8).view(2, 2, 2), inverse.Downsampling(2), 0.0)
SKEW = inverse.Problem(torch.tensor([0.4, -0.2]), torch.tensor([[1.0, 0.5, 0.0], [0.2, 1.0, -1.0]]), 0.0)


@pytest.mark.parametrize("sde", ["ve", "vp"])
def test_grey_values_are_replaced_in_the_papers_orthonormal_basis(sde):
    """Song et al. 2021, App. I.3: x M has the grey value, but for √3, as its first channel."""
    basis = torch.tensor([[0.577, -0.816, 0.0], [0.577, 0.408, 0.707], [0.577, 0.408, -0.707]], dtype=torch.float64)
    basis = torch.linalg.qr(basis)[0]
    basis = basis * torch.where(basis[0, 0] < 0, -1.0, 1.0)
    data = Gaussian(torch.linspace(-0.5, 0.5, 12).view(3, 2, 2), std=torch.linspace(0.3, 0.9, 12).view(3, 2, 2))
    gray = torch.linspace(-0.4, 0.8, 4, dtype=torch.float64).view(1, 2, 2)
    x = draw(data, sde, inverse.Replacement(inverse.Problem(gray, inverse.Grayscale(), 0.0)), 8, dtype=torch.float64)
    table, net = fastdiff.plan(sde, 8, sampler="ancestral"), score(data, sde)
    z = functools.partial(fastdiff.normal, 6, (3, 2, 2), seed=0)
    mine = z(stream=PRIOR).double() * table.prior_std
    for k, row in enumerate(table.rows):
        h = row.p * mine + row.q * net(mine, torch.full((6,), row.network_time, dtype=torch.float64))
        mine = row.a * mine + row.b[0] * h + row.c * z(draw=k, stream=SAMPLER).double()
        decoupled = torch.einsum("bchw,cd->bdhw", mine, basis)
        decoupled[:, 0] = math.sqrt(3) * gray[0]
        if k < 7:
            level = table.rows[k + 1].level
            noise = torch.einsum("bchw,cd->bdhw", z(draw=k, stream=MEASUREMENTS).double(), basis)
            decoupled[:, 0] = level.alpha * decoupled[:, 0] + level.sigma * noise[:, 0]
        mine = torch.einsum("bdhw,cd->bchw", decoupled, basis)
    torch.testing.assert_close(x, mine, rtol=0, atol=1e-10)
    torch.testing.assert_close(x.mean(1, keepdim=True), gray.expand(6, 1, 2, 2), rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", [inverse.Replacement, inverse.ILVR, inverse.NoisedMeasurement])
@pytest.mark.parametrize(("problem", "data"), [(GRAY, PICTURE), (BLOCKS, PICTURE), (SKEW, VECTOR)])
def test_the_samples_of_a_projection_have_what_was_measured(method, problem, data):
    """Also where A Aᵀ is not a multiple of 1, by conjugate gradients."""
    x = draw(data, "vp", method(problem), dtype=torch.float64)
    y = problem.operator.A(x)
    torch.testing.assert_close(y, problem.y.double().expand_as(y), rtol=0, atol=1e-6)
    assert x.std(0).mean() > 0.2


def test_a_projection_onto_known_numbers_is_replacement():
    """Not to the bit: their noise is of other streams, as is what rounding does."""
    operator = inverse.Mask(MASK)
    problem = inverse.Problem(operator.A(PIXELS[None])[0], operator, 0.0)
    x = draw(PICTURE, "vp", inverse.ILVR(problem), num_samples=4000)
    other = draw(PICTURE, "vp", inverse.Replacement(problem), num_samples=4000, seed=1)
    spread = other.std(0) / math.sqrt(2000)
    assert ((x.mean(0) - other.mean(0)).abs() <= 4.5 * spread + 1e-5).all()
    assert ((x.std(0) / other.std(0).clamp(min=1e-5)).sub(1).abs() < 0.06)[~MASK.expand(2, 4, 4)].all()


def test_ilvr_ends_where_it_is_told():
    """Below `until` the rows are those of the unguided sampler."""
    states = []
    draw(PICTURE, "vp", inverse.ILVR(GRAY, until=0.5), callback=lambda row, t, x: states.append((t, x)))
    table, net = fastdiff.plan("vp", 20, sampler="ancestral"), score(PICTURE, "vp")
    below = [k for k, (t, _) in enumerate(states) if t < 0.5]
    assert 5 < len(below) < 15
    for k in below[1:]:
        row, x = table.rows[k], states[k - 1][1].double()
        h = row.p * x + row.q * net(x, torch.full((6,), row.network_time, dtype=torch.float64))
        z = fastdiff.normal(6, (2, 4, 4), seed=0, draw=k, stream=SAMPLER).double()
        torch.testing.assert_close(states[k][1].double(), row.a * x + row.b[0] * h + row.c * z, rtol=0, atol=2e-5)


def test_noised_measurements_weigh_their_noise():
    assert torch.equal(draw(PICTURE, "vp", inverse.NoisedMeasurement(GRAY, weight=0)), draw(PICTURE, "vp"))
    operator = torch.tensor([[1.0, 0.0, 0.0]])
    spread = []
    for noise_std in (0.1, 0.5, 50.0):
        problem = inverse.Problem(torch.tensor([0.9]), operator, noise_std)
        x = draw(VECTOR, "ve", inverse.NoisedMeasurement(problem), 50, num_samples=4000, grid="logsnr").double()
        gain = COVARIANCE[:, 0] / (1 + noise_std**2)
        mean, sd = VECTOR.mean + gain * 0.6, (COVARIANCE.diag() - gain * COVARIANCE[:, 0]).sqrt()
        assert ((x.mean(0) - mean) / sd).abs().max() < 0.4  # the method's bias, some 0.3 where noise is little
        spread.append(float(x[:, 0].std() / sd[0]))
    assert 0.5 < spread[0] < 0.8  # another: y_t is drawn anew at each row
    assert 0.6 < spread[1] < 0.9
    free = draw(VECTOR, "ve", None, 50, num_samples=4000, grid="logsnr")[:, 0].std()  # noise that says nothing
    assert abs(spread[2] - float(free)) < 0.02


def test_dps_is_the_printed_algorithm_and_takes_each_sample_alone():
    """Chung et al. 2023, Alg. 1, in plain torch; of a function that is not linear too."""

    def operator(x):
        return (x[:, :2] ** 2).sum(1, keepdim=True) + x[:, 2:]

    y = torch.tensor([0.7])
    x = draw(VECTOR, "vp", inverse.DPS(inverse.Problem(y, operator, 0.0), 0.3), 9, dtype=torch.float64)
    table, net = fastdiff.plan("vp", 9, sampler="ancestral"), score(VECTOR, "vp")
    mine = fastdiff.normal(6, (3,), seed=0).double()
    for k, row in enumerate(table.rows):
        state = mine.clone().requires_grad_()
        s = net(state, torch.full((6,), row.network_time, dtype=torch.float64))
        clean = (state + row.level.sigma**2 * s) / row.level.alpha
        after = []
        for i in range(6):
            misfit = torch.linalg.norm(y.double() - operator(clean[i : i + 1]))
            after.append(torch.autograd.grad(misfit, state, retain_graph=True)[0][i])
        z = fastdiff.normal(6, (3,), seed=0, draw=k, stream=SAMPLER).double()
        mine = row.a * mine + row.b[0] * s.detach() + row.c * z - 0.3 * torch.stack(after)
    torch.testing.assert_close(x, mine, rtol=0, atol=1e-10)


def test_dps_beneath_rows_without_a_call_and_where_nothing_is_off():
    flat = inverse.Problem(torch.zeros(1), lambda x: 0 * x.flatten(1)[:, :1], 0.0)
    assert torch.equal(draw(PICTURE, "vp", inverse.DPS(flat)), draw(PICTURE, "vp"))
    table = fastdiff.plan("vp", 6, sampler="ancestral")
    extra = dataclasses.replace(table, rows=(table.rows[0], Row(table.rows[1].level, "wait", 1.0), *table.rows[1:]))
    assert torch.equal(
        *(
            draw(
                PICTURE,
                "vp",
                inverse.DPS(GRAY),
                None,
                sampler=None,
                table=each,
                noise=torch.zeros(7, 6, 2, 4, 4)[: len(each)],
            )
            for each in (table, extra)
        )
    )


METHODS = {
    "replacement": inverse.Replacement((PIXELS, MASK)),
    "of grey": inverse.Replacement(GRAY),
    "repaint": inverse.RePaint((PIXELS, MASK), 4, 2),
    "ilvr": inverse.ILVR(BLOCKS),
    "noised": inverse.NoisedMeasurement(inverse.Problem(BLOCKS.y, BLOCKS.operator, 0.3)),
    "dps": inverse.DPS(BLOCKS, 0.1),
    "both": [inverse.PiGDM(BLOCKS), inverse.Replacement((PIXELS, MASK))],
}


@pytest.mark.parametrize("name", METHODS)
def test_samples_do_not_depend_on_the_batch_or_on_where_it_begins(name):
    whole = draw(PICTURE, "vp", METHODS[name])
    assert torch.equal(draw(PICTURE, "vp", METHODS[name], batch_size=4), whole)
    assert torch.equal(draw(PICTURE, "vp", METHODS[name], num_samples=3, first_sample=3), whole[3:])
    assert torch.equal(draw(PICTURE, "vp", METHODS[name], backend="reference"), whole)
    assert not torch.equal(whole, draw(PICTURE, "vp"))


def test_what_is_measured_for_each_sample_goes_with_it():
    y = torch.linspace(-1, 1, 48).view(6, 2, 2, 2)
    for method in (inverse.Replacement, inverse.DPS):
        whole = draw(PICTURE, "vp", method(inverse.Problem(y, inverse.Downsampling(2), 0.0)), batch_size=4)
        part = inverse.Problem(y[3:], inverse.Downsampling(2), 0.0)
        assert torch.equal(draw(PICTURE, "vp", method(part), num_samples=3, first_sample=3), whole[3:])


# --- the verbs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde", ["ve", "vp"])
def test_inpainted_vectors_have_the_exact_conditional(sde):
    """By default; with a pattern of NaN of each row's own."""
    patterns = torch.tensor([[0.9, NAN, NAN], [NAN, -1.0, 0.4]])
    known = patterns.repeat(2000, 1)
    x = fastdiff.inpaint(score(VECTOR, sde), known, sde=sde, steps=200, sampler="ancestral", grid="logsnr", shape=(3,))
    assert x.shape == (4000, 3)
    assert torch.equal(x[~known.isnan()], known[~known.isnan()])
    for k, pattern in enumerate(patterns):
        mean, covariance = exact(VECTOR, pattern)
        drawn = x[k::2][:, pattern.isnan()].double()
        assert ((drawn.mean(0) - mean) / covariance.diag().sqrt()).abs().max() < 0.1
        ratio = drawn.var(0) / covariance.diag()
        assert (ratio - 1).abs().max() < 0.1
    one = fastdiff.inpaint(score(VECTOR, sde), patterns[0], sde=sde, shape=(3,), num_samples=2000)
    mean, covariance = exact(VECTOR, patterns[0])
    assert ((one[:, 1:].double().mean(0) - mean) / covariance.diag().sqrt()).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore:inverse.SMC's particles fell")  # five of them
@pytest.mark.parametrize("method", ["mmps", "replacement", "repaint", "tmpd", "pigdm", "diffpir", "dps", "ilvr", "noised",
                                    "score_ald", "ddrm", "daps", "smc"])  # fmt: skip
def test_every_method_keeps_what_is_known(method):
    x, info = fastdiff.inpaint(
        score(PICTURE, "vp"), PIXELS, MASK, "vp", 15, method=method, shape=(2, 4, 4), num_samples=5, return_info=True
    )
    full = MASK.expand(5, 2, 4, 4)
    assert torch.equal(x[full], PIXELS.expand(5, 2, 4, 4)[full])
    assert x[~full].isfinite().all()
    assert info.network_calls >= 15


def test_a_method_may_be_a_function_of_the_problem():
    given = dict(sde="vp", steps=10, shape=(2, 4, 4), num_samples=3)
    mine = fastdiff.inpaint(score(PICTURE, "vp"), PIXELS, MASK, method=lambda p: inverse.MMPS(p, 2), **given)
    operator = inverse.Mask(MASK)
    problem = inverse.Problem(operator.A(PIXELS[None])[0], operator, 0.0)
    plain = draw(PICTURE, "vp", inverse.MMPS(problem, 2), 10, grid="logsnr", num_samples=3)
    assert torch.equal(mine, torch.where(MASK, PIXELS, plain))
    with pytest.warns(UserWarning, match="mask is True nowhere: the samples are the model's own"):
        nothing = fastdiff.inpaint(score(PICTURE, "vp"), PIXELS, torch.zeros(1), **given)
    assert torch.equal(nothing, draw(PICTURE, "vp", None, 10, grid="logsnr", num_samples=3))
    with pytest.warns(UserWarning, match="mask is True everywhere: nothing is drawn"):
        everything = fastdiff.inpaint(score(PICTURE, "vp"), PIXELS, torch.ones(1), **given)
    assert torch.equal(everything, PIXELS.expand(3, 2, 4, 4))


def test_steps_say_how_many_and_change_no_sampler():
    options = {"shape": (3,), "num_samples": 4, "seed": 2}
    x = fastdiff.inpaint(score(VECTOR, "vp"), KNOWN, None, "vp", 7, **options)
    same = fastdiff.inpaint(score(VECTOR, "vp"), KNOWN, None, "vp", 7, sampler="ancestral", grid="logsnr", **options)
    assert torch.equal(x, same)


def test_a_chain_is_inpainted_by_its_own_steps():
    model = fastdiff.ScoreModel(
        lambda x, t: PICTURE.eps(x, fastdiff.DDPM().alpha(t.double() + 1), fastdiff.DDPM().sigma(t.double() + 1)), "ddpm",
        data_shape=(2, 4, 4),
    )  # fmt: skip
    x, info = fastdiff.inpaint(model, PIXELS, MASK, num_samples=2, return_info=True)
    assert (info.network_calls, info.table.rows[0].level.t) == (100, 1000)
    assert x.isfinite().all()


@pytest.mark.parametrize("weights", [None, (0.7, 0.3)])
@pytest.mark.parametrize("method", ["mmps", "replacement", "diffpir"])
def test_colorized_samples_have_their_grey_values(method, weights):
    gray = torch.linspace(-0.5, 0.5, 16).view(1, 4, 4)
    options = dict(sde="vp", steps=15, shape=(2, 4, 4), method=method, weights=weights)
    x = fastdiff.colorize(score(PICTURE, "vp"), gray.expand(3, 1, 4, 4), **options)
    assert x.shape == (3, 2, 4, 4)
    column = torch.tensor(weights or (0.5, 0.5)).view(2, 1, 1)
    torch.testing.assert_close((x * column).sum(1, keepdim=True), gray.expand(3, 1, 4, 4), rtol=0, atol=1e-6)
    for same in (gray, gray[0]):
        assert torch.equal(fastdiff.colorize(score(PICTURE, "vp"), same, num_samples=3, **options), x)


def test_exact_data_on_a_trained_network():
    """Whose Jacobian is no covariance; a run that trusts it ends in thousands."""
    digits = fastdiff.load_data("digits").x[-2:].float() / 8 - 1
    for problem in (
        inverse.Problem(inverse.Downsampling(2).A(digits), inverse.Downsampling(2), 0.0),  # as a matrix
        inverse.Problem(inverse.Mask(torch.arange(8) < 4).A(digits), inverse.Mask(torch.arange(8) < 4), 0.0),  # by CG
    ):
        x = fastdiff.sample("digits-vp", steps=8, sampler="ancestral", grid="logsnr", num_samples=2,
                            guidance=inverse.MMPS(problem))  # fmt: skip
        assert x.abs().max() < 1.6
        assert (problem.operator.A(x) - problem.y).square().mean().sqrt() < 0.05


# --- what is refused -------------------------------------------------------------------------------------------------

PAIR = (PIXELS, MASK)
BAD = {
    "known must have the shape": inverse.Replacement((PIXELS[:, :2], MASK)),
    "known must be a tensor": inverse.Replacement((PIXELS.numpy(), MASK)),
    "known must be floating": inverse.Replacement((PIXELS.int(), MASK)),
    r"known must be finite where it is known, got nan at index \(0, 1, 3, 3\)": inverse.Replacement(
        (torch.where(torch.arange(32).view(2, 4, 4) == 31, NAN, PIXELS), torch.ones(1))
    ),
    "known must be finite where it is known, got -inf": inverse.Replacement((PIXELS / 0, None)),
    "mask must hold 1 where known has the data and 0 elsewhere, got 0.5": inverse.Replacement((PIXELS, MASK * 0.5)),
    "mask must hold 1 where known has the data and 0 elsewhere, got nan": inverse.Replacement((PIXELS, MASK * NAN)),
    "mask must be of bool, or of numbers 0 and 1, got torch.complex64": inverse.Replacement((PIXELS, MASK * 1j)),
    "mask must broadcast to known": inverse.Replacement((PIXELS, MASK[:, :3])),
    "mask must be a tensor": inverse.Replacement((PIXELS, [1])),
    "takes an inverse.Problem, or a pair": inverse.Replacement(PIXELS),
    "takes y as it is, and noise_std=0.3": inverse.Replacement(inverse.Problem(GRAY.y, GRAY.operator, 0.3)),
    "Replacement is for a linear operator": inverse.Replacement(inverse.Problem(torch.zeros(2, 4, 4), torch.sin, 0.0)),
    "Replacement is for Gaussian noise": inverse.Replacement(inverse.Problem(GRAY.y + 1, GRAY.operator, noise="poisson")),
    "jump_length must be an integer": inverse.RePaint(PAIR, 0),
    "resamplings must be an integer": inverse.RePaint(PAIR, 3, 2.5),
    "jump_length=20 must be less than the steps of the run, 20": inverse.RePaint(PAIR, 20),
    "until must be a number": inverse.ILVR(GRAY, until=2.0),
    "weight must be a number": inverse.NoisedMeasurement(GRAY, weight=1.5),
    "scale must be a number": inverse.DPS(GRAY, NAN),
    "DPS measures the misfit by its norm, got noise='poisson'": inverse.DPS(
        inverse.Problem(GRAY.y + 1, GRAY.operator, noise="poisson")
    ),
    "one method that sets what is known, got two": [inverse.Replacement(PAIR), inverse.RePaint(PAIR)],
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_what_cannot_be_done_is_said_before_any_work(said):
    def net(x, t):
        raise AssertionError("the network is called")

    with pytest.raises(errors.FastdiffError, match=said) as caught:
        fastdiff.sample(
            net, "vp", 20, sampler="ancestral", shape=(2, 4, 4), num_samples=2, guidance=BAD[said], progress=False
        )
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= errors.LONGEST


@pytest.mark.parametrize("sampler", ["rk45", "adaptive_sde"])
@pytest.mark.parametrize("name", METHODS)
def test_samplers_that_choose_their_steps_are_refused(sampler, name):
    with pytest.raises(
        errors.ConfigError, match=f"guidance changes the state after each row, and sampler '{sampler}' has"
    ):
        draw(PICTURE, "vp", METHODS[name], None, sampler=sampler)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "unipc", "dpm_2", "sa"])
def test_repaint_refuses_steps_that_do_not_stand_alone(sampler):
    with pytest.raises(
        errors.ConfigError, match=r"RePaint jumps back .* row \d+ \(\w+\) needs what rows before it have kept"
    ):
        draw(PICTURE, "vp", inverse.RePaint(PAIR, 3, 2), sampler=sampler)


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s"])
def test_dps_refuses_rows_that_go_back(sampler):
    with pytest.raises(
        errors.ConfigError, match=r"DPS changes the state that a row leaves, and row 1 \(\w+\) goes back"
    ):
        draw(PICTURE, "vp", inverse.DPS(GRAY), sampler=sampler)


@pytest.mark.parametrize(
    ("said", "call"),
    [
        ("method must be one of", lambda net: fastdiff.inpaint(net, PIXELS, MASK, "vp", shape=(2, 4, 4), method="paint")),
        ("did you mean 'mmps'", lambda net: fastdiff.inpaint(net, PIXELS, MASK, "vp", shape=(2, 4, 4), method="MMPS")),
        ("shape must be given", lambda net: fastdiff.inpaint(net, PIXELS, MASK, "vp")),
        ("known must have the shape", lambda net: fastdiff.inpaint(net, PIXELS[0], MASK, "vp", shape=(2, 4, 4))),
        ("method='DPS' is for one mask of all samples", lambda net: fastdiff.inpaint(
            net, PIXELS.expand(2, 2, 4, 4), torch.eye(2).view(2, 2, 1, 1), "vp", shape=(2, 4, 4), method="dps")),
        ("gray must be one channel", lambda net: fastdiff.colorize(net, PIXELS, "vp", shape=(2, 4, 4))),
        ("weights must sum to 1", lambda net: fastdiff.colorize(net, PIXELS[:1], "vp", shape=(2, 4, 4), weights=(1, 1))),
        ("samples .* with two channels or more", lambda net: fastdiff.colorize(net, PIXELS[:1], "vp", shape=(1, 4, 4))),
        ("gray must be finite", lambda net: fastdiff.colorize(net, PIXELS[:1] / 0, "vp", shape=(2, 4, 4))),
    ],
)  # fmt: skip
def test_verbs_refuse(said, call):
    def net(x, t):
        raise AssertionError("the network is called")

    with pytest.raises((errors.FastdiffError, ValueError), match=said) as caught:
        call(net)
    assert "\n" not in str(caught.value)


def test_data_of_other_units_are_warned_of():
    model = fastdiff.ScoreModel(score(PICTURE, "vp"), "vp", "score", data_shape=(2, 4, 4), data_range=(-1, 1))
    with pytest.warns(UserWarning, match="known runs from 0 to 255, far outside of data_range"):
        fastdiff.inpaint(model, 127.5 * (PIXELS + 1), MASK, steps=2)


def test_the_range_of_samples_is_looked_at_with_the_known_part_in_it():
    """Samples that are far off only where the data are known, as of a network that does not know them, are not warned of."""
    model = fastdiff.ScoreModel(
        lambda x, t: torch.full_like(x, 0.5) + 99 * MASK, "vp", "x0", "t", (2, 4, 4), data_range=(-1, 1)
    )
    x = fastdiff.inpaint(model, PIXELS, MASK, steps=3, method="replacement", num_samples=2)
    assert float(x.max()) <= 1
    with pytest.warns(UserWarning, match="the samples run from .* far outside"):
        fastdiff.inpaint(model, PIXELS, ~MASK, steps=3, method="replacement", num_samples=2)
    with pytest.warns(UserWarning, match="known runs from .* far outside of data_range"):
        fastdiff.sample(model, steps=3, num_samples=2, guidance=inverse.Replacement((127 * PIXELS, MASK)))


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Digits as arrays and pictures, and masks of their upper halves."""
    monkeypatch.chdir(tmp_path)
    digits = (fastdiff.load_data("digits").x[-2:].float() / 8 - 1).numpy()
    upper = np.zeros((8, 8), bool)
    upper[:4] = True
    np.save("digits.npy", digits)
    np.save("gaps.npy", np.where(upper, digits, np.nan).astype(np.float32))
    np.savez_compressed("gaps.npz", np.load("gaps.npy"))
    np.savez("two.npz", a=upper, b=upper)
    np.save("mask.npy", upper)
    np.save("narrow.npy", upper[:, :3])
    np.save("low.npy", digits[0].reshape(1, 4, 2, 4, 2).mean((2, 4)))
    np.save("bytes.npy", (digits * 100 + 100).astype(np.uint8))
    Image.fromarray(np.uint8(127.5 * (digits[0, 0] + 1))).save("digit.png")
    Image.fromarray(np.uint8(255 * upper)).save("mask.png")
    return tmp_path


def command(*words):
    return commands.main([str(word) for word in words])


def test_inpaint_and_solve_on_files(folder, capsys):
    quick = ("--steps", 4, "--method", "replacement")
    assert command("inpaint", "digits-vp", "digits.npy", "--mask", "mask.npy", *quick) == 0
    x, digits = np.load("inpainted.npy"), np.load("digits.npy")
    assert x.shape == (2, 1, 8, 8)
    np.testing.assert_array_equal(x[:, :, :4], digits[:, :, :4])
    assert not np.array_equal(x[:, :, 4:], digits[:, :, 4:])
    assert (
        "(2, 1, 8, 8) samples in inpainted.npy, in data_range (-1.0, 1.0): 4 network calls" in capsys.readouterr().out
    )
    assert command("inpaint", "digits-vp", "gaps.npy", *quick, "--out", "same.npy") == 0
    np.testing.assert_array_equal(np.load("same.npy"), x)
    assert command("inpaint", "digits-vp", "gaps.npz", *quick, "--out", "same.npy") == 0
    np.testing.assert_array_equal(np.load("same.npy"), x)
    assert command("inpaint", "digits-vp", "digit.png", "--mask", "mask.png", "-n", 3, *quick, "--out", "x.png") == 0
    with Image.open("x.png") as picture:
        assert picture.size[0] > 8
    assert command("solve", "digits-vp", "low.npy", "--operator", "downsampling:2", "-n", 2, *quick) == 0
    low = inverse.Downsampling(2).A(torch.from_numpy(np.load("solved.npy")))
    np.testing.assert_allclose(low, np.broadcast_to(np.load("low.npy"), (2, 1, 4, 4)), atol=1e-5)
    for operator, measured in (
        ("mask:mask.npy", "known.npy"),
        ("blur:0.7", "digits.npy"),
        ("fourier:mask.png", "k.npy"),
    ):
        np.save("known.npy", digits[..., :4, :].reshape(2, -1))
        np.save("k.npy", inverse.Fourier(torch.from_numpy(np.load("mask.npy"))).A(torch.from_numpy(digits)))
        options = ("--noise-std", 0.1, "--method", "diffpir", "--steps", 3)
        assert command("solve", "digits-vp", measured, "--operator", operator, *options) == 0
        assert np.load("solved.npy").shape == (2, 1, 8, 8)


def test_colorize_on_files(folder):
    """Grey values of a picture or of an array are those of the samples, by the weights that were given."""
    torch.manual_seed(0)
    net = UNet((3, 8, 8), channels=8, multipliers=(1,), blocks=1)
    fastdiff.save(fastdiff.ScoreModel(net, "vp", "eps", "t", (3, 8, 8), (-1.0, 1.0)), "colours.safetensors")
    quick = ("--steps", 3, "--method", "replacement", "-n", 2)
    assert command("colorize", "colours.safetensors", "digit.png", *quick, "--out", "x.npy") == 0
    digit, x = np.asarray(Image.open("digit.png")) / 127.5 - 1, np.load("x.npy")
    assert x.shape == (2, 3, 8, 8)
    assert np.abs(x - x.mean(1, keepdims=True)).max() > 0.01
    np.testing.assert_allclose(x.mean(1), np.broadcast_to(digit, (2, 8, 8)), atol=1e-5)
    Image.fromarray(np.tile(np.uint8([0, 255, 0]), (8, 8, 1))).save("green.png")
    assert command("colorize", "colours.safetensors", "green.png", *quick, "--out", "x.npy") == 0
    np.testing.assert_allclose(
        np.load("x.npy").mean(1), -1 / 3, atol=1e-4
    )  # of an untrained model, whose samples are large
    weights = ("--weights", "0.299,0.587,0.114")
    assert command("colorize", "colours.safetensors", "digits.npy", *weights, *quick, "--out", "x.png") == 0
    assert command("colorize", "colours.safetensors", "digits.npy", *weights, *quick) == 0
    grey = np.einsum("bchw,c->bhw", np.load("colorized.npy"), (0.299, 0.587, 0.114))
    np.testing.assert_allclose(grey, np.load("digits.npy")[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("colorize needs a model of samples [C, *] with two", "colorize digits-vp digits.npy"),
        ("weights must be a number, got 'x'", "colorize digits-vp digits.npy --weights 1,x"),
        ("known must be an array of floats", "inpaint digits-vp bytes.npy"),
        ("mask must hold 1 where known", "inpaint digits-vp digits.npy --mask digits.npy"),
        ("known must be of the model's samples (1, 8, 8)", "inpaint digits-vp low.npy"),
        ("mask must broadcast", "inpaint digits-vp digits.npy --mask narrow.npy"),
        ("source nothing.npy cannot be read", "inpaint digits-vp nothing.npy"),
        ("it must hold one array, and has a, b: save", "inpaint digits-vp digits.npy --mask two.npz"),
        ("--out must end in .npy or .png", "inpaint digits-vp digits.npy --out x.txt"),
        ("operator must be grayscale", "solve digits-vp low.npy --operator blurr:1"),
        ("operator blur needs a value, SIGMA, as in blur:SIGMA", "solve digits-vp low.npy --operator blur"),
        ("operator blur's sigma must be a number, got 'wide'", "solve digits-vp low.npy --operator blur:wide"),
        ("factor must be an integer", "solve digits-vp low.npy --operator downsampling:2.5"),
        ("operator must be a matrix [m, D]", "solve digits-vp low.npy --operator matrix:low.npy"),
        ("y must have the shape", "solve digits-vp low.npy --operator blur:1"),
        ("noise_std must be a number in [0, inf)", "solve digits-vp low.npy --operator downsampling:2 --noise-std -1"),
        ("or --noise-std 0", "solve digits-vp low.npy --operator downsampling:2 --noise-std 1 --method ilvr"),
        ("method must be one of", "solve digits-vp low.npy --operator downsampling:2 --method magic"),
    ],
)
def test_commands_refuse_in_one_line(said, words, folder, capsys):
    known = "--method replacement" if said == "or --noise-std 0" else ""
    assert command(*words.replace("--method ilvr", known).split()) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    assert shown.startswith(f"fastdiff {words.split()[0]}: ")
    assert re.search(r"got|cannot be read|holds|has the shape|needs a value|noise-std", shown)
