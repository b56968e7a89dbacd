"""The public face: what `sample` promises about numbers, shapes, noise, batches, callbacks and the caller's state."""

from __future__ import annotations

import functools
import itertools
import linecache
import math
import pickle
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from runs import CHOOSE_THEIR_STEPS, OPTIONS, every_run
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiff
from fastdiff.errors import ConfigError, DataError, FastdiffError, NonFiniteError, ShapeError
from fastdiff.execution import modes
from fastdiff.execution.modes import evaluating, stepping
from fastdiff.planning.processes import PROCESSES
from fastdiff.planning.samplers import SAMPLERS, ULA, Adaptive, AdaptiveSDE, Ancestral, Heun, PredictorCorrector


def score(x, t):
    """Pointwise in x, its t-dependence in float64: the exact VP score of N(0, ¼) data."""
    t = t.double()
    vp = fastdiff.VP()
    variance = 0.25 * vp.alpha(t) ** 2 + vp.sigma(t) ** 2
    return -x / variance.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def draw(**options):
    options = {"model": score, "sde": "vp", "steps": 12, "shape": (5,), "num_samples": 8, **options}
    if isinstance(options.get("sampler"), Adaptive | AdaptiveSDE):
        del options["steps"]
    return fastdiff.sample(**options)


def test_the_samplers_without_a_table_are_those_that_choose_their_steps():
    refused = {}
    for sde, sampler in itertools.product(PROCESSES, SAMPLERS):
        try:
            fastdiff.plan(sde, 10, sampler=sampler)
        except ConfigError as error:
            refused[sde, sampler] = str(error)
    assert set(refused) == set(itertools.product(PROCESSES, CHOOSE_THEIR_STEPS))
    assert all("has no table" in message for message in refused.values())


# in turn, so that each sampler meets them all
KINDS = itertools.cycle([(torch.float32, (3, 5)), (torch.float32, (1025,)), (torch.float64, (7,))])


@pytest.mark.parametrize(
    ("sde", "sampler", "steps", "dtype", "shape"), [(*run, *kind) for run, kind in zip(every_run(), KINDS)], ids=str
)
def test_the_compiled_backend_is_the_reference_to_the_bit(sde, sampler, steps, dtype, shape):
    options = {
        "model": lambda x, t: -torch.tanh(x),
        "sde": sde,
        "sampler": sampler,
        "steps": steps,
        "shape": shape,
        "num_samples": 3,
        "dtype": dtype,
    }
    assert torch.equal(draw(**options, backend="cpu"), draw(**options, backend="reference"))


def test_clips_conversions_and_learned_variances_are_the_same_bits_on_both_backends():
    def learning(x, t):
        return torch.cat((torch.tanh(x), torch.sin(3 * x)), 1)

    learned = {"sde": "ddpm", "model": learning, "sampler": Ancestral(variance="learned_range"), "prediction": "eps"}
    for options in ({"clip": (-0.5, 0.7)}, {"clip": (-0.5, 0.7), "sampler": "heun"}, {"prediction": "v"}, learned):
        options = {"steps": 8, "shape": (2, 70), "num_samples": 3, **options}
        assert torch.equal(draw(**options, backend="cpu"), draw(**options, backend="reference"))


@pytest.mark.parametrize(
    "sampler",
    [
        *(name for name in SAMPLERS if name not in ("annealed_langevin", *CHOOSE_THEIR_STEPS)),
        *OPTIONS,
        Adaptive(),
        AdaptiveSDE(0.3, 0.1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("shape", [(5,), (1,), (2, 3), (1, 7, 9)])
def test_batch_split_and_first_sample_do_not_change_a_bit(sampler, shape):
    whole = draw(sampler=sampler, shape=shape)
    assert whole.shape == (8, *shape)
    single = [draw(sampler=sampler, shape=shape, num_samples=1, first_sample=i) for i in range(8)]
    assert torch.equal(whole, torch.cat(single))
    assert torch.equal(whole, draw(sampler=sampler, shape=shape, batch_size=3))
    assert torch.equal(whole[5:], draw(sampler=sampler, shape=shape, num_samples=3, first_sample=5))


def test_thread_count_does_not_change_a_bit():
    before = torch.get_num_threads()
    options = {"shape": (3, 40, 41), "num_samples": 16, "sampler": PredictorCorrector(corrector="langevin")}
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(draw(**options))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_seeds():
    assert torch.equal(draw(seed=3), draw(seed=np.int64(3)))
    assert not torch.equal(draw(seed=3), draw(seed=4))
    fresh, info = draw(seed=None, return_info=True)
    assert torch.equal(fresh, draw(seed=info.seed))
    assert not torch.equal(fresh, draw(seed=None))
    assert torch.equal(draw(seed=2**64 - 1), draw(seed=2**64 - 1))


def test_global_state_is_left_alone():
    import random

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), torch.is_grad_enabled()
    draw(sampler="pc")
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert states[3] == torch.is_grad_enabled()
    torch.set_default_dtype(torch.float64)
    try:
        other = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(other, draw())


# --- noise and starts ------------------------------------------------------------------------------------------------


def test_noise_as_a_tensor_is_indexed_by_row():
    table = fastdiff.plan("vp", 12)
    built_in = torch.stack([fastdiff.normal(8, (5,), seed=0, draw=k, stream=1) for k in range(len(table))])
    assert torch.equal(draw(), draw(noise=built_in))
    assert torch.equal(draw(), draw(noise=built_in, batch_size=3))
    built_in[-1] = 1e9  # the last row draws none
    assert torch.equal(draw(), draw(noise=built_in))


@pytest.mark.parametrize("batch_size", [None, 3])
def test_noise_as_a_callable_is_asked_once_a_row_in_order_and_never_ahead(batch_size):
    asked, done = [], []

    def noise(row):
        assert sum(k < row for k in done) == len(done)
        asked.append(row)
        return fastdiff.normal(8, (5,), seed=0, draw=row, stream=1)

    x = draw(noise=noise, batch_size=batch_size, sampler=Heun(s_churn=4.0), callback=lambda k, t, x: done.append(k))
    rows = fastdiff.plan("vp", 12, sampler=Heun(s_churn=4.0)).rows
    assert asked == [k for k, row in enumerate(rows) if row.draws]
    assert torch.equal(x, draw(sampler=Heun(s_churn=4.0)))


def test_a_start_and_a_condition_say_how_many_samples():
    def network(x, t, y=None, cond=None):
        return -x if y is None else -x * (1 + y.view(-1, 1))

    def drawn(**options):
        return fastdiff.sample(network, "vp", shape=(2,), steps=3, **options)

    def conditioned(x, t, cond):
        return -x * (1 + cond.flatten(1)[:, :1])

    y = torch.tensor([0, 1, 2, 1, 0])
    assert len(drawn()) == 16
    assert torch.equal(drawn(cond=y), drawn(cond=y, num_samples=5))
    assert torch.equal(drawn(cond={"y": y}), drawn(cond=y))
    assert torch.equal(drawn(x_init=torch.ones(3, 2)), drawn(x_init=torch.ones(3, 2), num_samples=3))
    with pytest.raises(ShapeError, match="num_samples=3"):
        drawn(x_init=torch.ones(3, 2), cond=y)
    with pytest.raises(ShapeError, match="num_samples=16"):  # one for all is said to be one for all
        drawn(cond=torch.tensor(1))
    with pytest.raises(ShapeError, match="num_samples=16"):  # of one sample, or of three: nobody said
        drawn(cond=torch.ones(3, 4))
    with pytest.raises(ShapeError, match=r"x_init must have shape \(16, 2\)"):
        drawn(x_init=torch.ones(2))
    model = fastdiff.ScoreModel(conditioned, "vp", data_shape=(2,), cond_shape=(4,))
    assert len(fastdiff.sample(model, steps=3, cond=torch.ones(3, 4))) == 3
    with pytest.raises(ShapeError, match="num_samples=16 entries first"):
        fastdiff.sample(model, steps=3, cond=torch.ones(4))
    known, mask = torch.zeros(2), torch.tensor([True, False])
    assert len(fastdiff.inpaint(fastdiff.ScoreModel(network, "vp", data_shape=(2,)), known, mask, steps=3, cond=y)) == 5


def test_x_init_is_the_start_and_stays_untouched():
    start = fastdiff.normal(8, (5,), seed=0)
    kept = start.clone()
    assert torch.equal(draw(x_init=start), draw())
    assert torch.equal(start, kept)
    assert torch.equal(draw(x_init=start, batch_size=3), draw())
    leaf = start.clone().requires_grad_()
    x = draw(x_init=leaf)
    assert not x.requires_grad
    assert leaf.grad is None
    with torch.inference_mode():
        assert torch.equal(draw(x_init=start.clone()), draw())


LAYOUTS = {
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "narrowed": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_numbers(layout):
    start = fastdiff.normal(4, (3, 5, 7), seed=1)
    other = LAYOUTS[layout](start)
    assert torch.equal(start, other)
    options = {"shape": (3, 5, 7), "num_samples": 4}
    plain, x = draw(x_init=start, **options), draw(x_init=other, **options)
    assert torch.equal(plain, x)
    assert x.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    table = fastdiff.plan("vp", 12)
    noise = torch.randn(len(table), 1, 3, 1, 7, generator=torch.Generator().manual_seed(0)).expand(-1, 4, 3, 5, 7)
    assert torch.equal(draw(noise=noise, **options), draw(noise=noise.clone(), **options))


def test_dtypes():
    single, double = draw(), draw(dtype=torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert 0 < (single - double).abs().max() < 1e-5
    start = fastdiff.normal(8, (5,), seed=0)
    assert draw(x_init=start.double()).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        half = draw(x_init=start.to(dtype))
        assert half.dtype == dtype
        assert torch.equal(half, draw(x_init=start.to(dtype).float()).to(dtype))  # the state is float32
    # a half-precision start must not overflow a VE run
    ve = fastdiff.VE(0.01, 1348.0)
    options = {"steps": 20, "shape": (4,), "num_samples": 2, "dtype": torch.float16}
    big = fastdiff.sample(lambda x, t: -x / (1 + ve.sigma(t) ** 2)[:, None], ve, **options)
    assert big.abs().max() < 10
    with pytest.raises(fastdiff.errors.DataError, match="float16"):
        fastdiff.sample(lambda x, t: torch.full_like(x, 10.0), ve, **options)


def test_empty_runs_call_nothing():
    def never(x, t):
        raise AssertionError("called")

    assert draw(model=never, num_samples=0).shape == (0, 5)
    assert draw(model=never, shape=(0, 3)).shape == (8, 0, 3)
    _, states, info = draw(model=never, num_samples=0, trajectory=2, return_info=True, batch_size=4)
    assert states.shape == (2, 0, 5)
    assert info.network_calls == 0


# --- what comes back -------------------------------------------------------------------------------------------------


def test_trajectory_and_callback_see_every_state():
    seen = []
    x, states, info = draw(
        trajectory=13, return_info=True, batch_size=3, callback=lambda k, t, x: seen.append((k, t, x.clone()))
    )
    assert torch.equal(states[0], fastdiff.normal(8, (5,), seed=0))
    assert torch.equal(states[-1], x)
    for k in range(12):
        batches = [state for row, _, state in seen if row == k]
        assert torch.equal(torch.cat(batches), states[k + 1])
    table = info.table
    assert [t for _, t, _ in seen[:12]] == [row.level.t for row in table.rows[1:]] + [table.end.t]
    assert torch.equal(draw(trajectory=1)[1][0], x)
    few = draw(trajectory=4)[1]
    assert torch.equal(few, states[[0, 4, 8, 12]])
    assert torch.equal(draw(callback=lambda k, t, x: x.zero_()), x)  # it is a copy


def test_info_counts_truly():
    calls = []

    def counting(x, t):
        calls.append(len(x))
        return score(x, t)

    _, info = draw(model=counting, sampler=PredictorCorrector(corrector_steps=2), batch_size=3, return_info=True)
    assert info.network_calls == len(calls) == 12 * 3 * 3
    assert calls[:1] + calls[-1:] == [3, 2]
    assert (info.rows, info.backend, info.engine, info.seed) == (36, "cpu", "eager", 0)
    assert info.seconds > 0
    calls.clear()
    assert draw(model=counting, sampler=Heun(), return_info=True)[1].network_calls == len(calls) == 23


def test_denoise_leaves_out_the_last_noise():
    table = fastdiff.plan("vp", 12, denoise=False)
    noisy, clean = draw(denoise=False), draw()
    z = fastdiff.normal(8, (5,), seed=0, draw=11, stream=1)
    assert (noisy - clean - table.rows[-1].c * z).abs().max() < 1e-6
    assert torch.equal(draw(sampler="heun"), draw(sampler="heun", denoise=False))
    assert torch.equal(draw(sampler=ULA()), draw(sampler=ULA(), denoise=False))


def test_progress_bar(capsys):
    draw(progress=True)
    assert "row" in capsys.readouterr().err
    draw()
    assert capsys.readouterr().err == ""


# --- models ----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A network with everything that must survive: dropout, batch norm, a frozen flag, float32 weights."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, x, t):
        return self.frozen(self.layer(x)) - x


def test_modes_and_buffers_are_restored():
    torch.manual_seed(0)
    net = Net().train()
    net.frozen.eval()
    flags = [m.training for m in net.modules()]
    buffers = [b.clone() for b in net.buffers()]
    x = draw(model=net, prediction="eps")
    # evaluation mode: no dropout, no batch statistics; only the matrix product may round by batch size
    assert torch.equal(x, draw(model=net, prediction="eps"))
    assert (x / draw(model=net, prediction="eps", batch_size=1) - 1).abs().max() < 1e-4
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(a, b) for a, b in zip(buffers, net.buffers()))

    class Boom(Exception):
        pass

    def raising(k, t, x):
        raise Boom

    with pytest.raises(Boom):
        draw(model=net, prediction="eps", callback=raising)
    assert [m.training for m in net.modules()] == flags
    assert torch.is_grad_enabled()


def test_models_of_every_kind():
    plain = draw()
    assert torch.equal(plain, draw(model=functools.partial(score)))
    assert torch.equal(plain, draw(model=lambda x, t: (score(x, t), "extra")))

    class Output:
        def __init__(self, sample):
            self.sample = sample

    assert torch.equal(plain, draw(model=lambda x, t: Output(score(x, t))))

    def mutating(x, t):
        out = score(x, t)
        x.zero_()
        t.zero_()
        return out

    assert torch.equal(plain, draw(model=mutating))
    buffer = torch.zeros(8, 5)

    def reusing(x, t):
        return buffer.copy_(score(x, t))

    assert torch.equal(plain, draw(model=reusing))
    assert torch.equal(draw(model=lambda x, t: x), draw(model=lambda x, t: x.clone()))
    assert torch.equal(
        draw(model=lambda x, t: x.mean(1, True).expand_as(x)), draw(model=lambda x, t: x.mean(1, True).repeat(1, 5))
    )
    assert (draw(model=lambda x, t: score(x, t).double()) - plain).abs().max() == 0
    assert (draw(model=lambda x, t: score(x, t).bfloat16()) - plain).abs().max() < 0.1


def test_autocast_stays_outside_the_sampler():
    torch.manual_seed(0)
    net = nn.Linear(5, 5)
    seen = []

    def model(x, t):
        out = net(x)
        seen.append(out.dtype)
        return out - x

    with torch.autocast("cpu", torch.bfloat16):
        x = draw(model=model, prediction="eps")
    assert x.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}


def test_half_precision_networks_are_fed_their_own_dtype():
    torch.manual_seed(0)
    seen = []

    class Half(nn.Linear):
        def forward(self, x, t):
            seen.append((x.dtype, t.dtype))
            return super().forward(x)

    x = draw(model=Half(5, 5).bfloat16(), prediction="eps")
    assert x.dtype == torch.float32
    assert set(seen) == {(torch.bfloat16, torch.float32)}


def test_condition_is_passed_batch_by_batch():
    shift = torch.arange(8.0)[:, None]

    def conditional(x, t, c):
        return score(x - c, t)

    whole = draw(model=conditional, cond=shift)
    assert torch.equal(whole, draw(model=conditional, cond=shift, batch_size=3))
    assert torch.equal(whole, draw(model=lambda x, t, c=None: score(x - c, t), cond={"c": shift}, batch_size=5))
    assert not torch.equal(whole, draw())


def test_learned_variance_splits_the_channels():
    def both(x, t):
        return torch.cat([score(x, t), torch.full_like(x, -1.0)], 1)

    low = draw(model=both, sampler=Ancestral("learned_range"))
    assert (low - draw(sampler=Ancestral("posterior"))).abs().max() < 1e-5  # v = −1 is the lower bound, β̃
    net = fastdiff.ScoreModel(both, "vp", "score", data_shape=(5,), variance="learned_range")
    options = {"num_samples": 8, "steps": 12}
    assert torch.equal(fastdiff.sample(net, sampler="ancestral", **options), low)
    assert torch.equal(fastdiff.sample(net, sampler="ddim", **options), draw(sampler="ddim"))


# --- processes -------------------------------------------------------------------------------------------------------


def test_score_models_know_their_process():
    model = fastdiff.ScoreModel(score, "vp", "score", data_shape=(5,))
    options = {"steps": 12, "num_samples": 8}
    for sde in (None, "vp", fastdiff.VP()):
        assert torch.equal(fastdiff.sample(model, sde, **options), draw())
    assert fastdiff.sample(model, "ddpm", steps=50, num_samples=2).shape == (2, 5)


def test_a_chain_on_the_models_path_tells_the_network_its_own_time():
    told = []

    def recording(x, t):
        told.append(float(t[0]))
        return score(x, t)

    model = fastdiff.ScoreModel(recording, "vp", "score", data_shape=(5,))
    fastdiff.sample(model, fastdiff.DDPM(), sampler="ddim", steps=10, num_samples=2)
    chain, vp = fastdiff.DDPM(), fastdiff.VP()
    for t, own in zip(range(1000, 0, -100), told):
        exact = float(vp.time(chain.sigma(float(t)) / chain.alpha(float(t))))
        assert own == pytest.approx(min(exact, 1.0), abs=1e-6)
    told.clear()
    fastdiff.sample(model, "ddpm", steps=1000, num_samples=1)
    np.testing.assert_allclose(told, np.arange(1000, 0, -1) / 1000, atol=1e-6)


def test_ddpm_on_vp_gives_the_data():
    model = fastdiff.ScoreModel(score, "vp", "score", data_shape=(1,))
    x = fastdiff.sample(model, "ddpm", steps=200, num_samples=20_000)
    assert abs(x.var() - 0.25) < 5 * 0.25 * math.sqrt(2 / 20_000) + 0.01  # 0.01: the chain's own bias at 200 steps


def test_ncsn_on_ve_descends_the_models_own_range():
    told = []
    ve = fastdiff.VE(0.1, 10.0)

    def recording(x, sigma):
        told.append(float(sigma[0]))
        return -x / (1 + sigma**2).view(-1, 1)

    model = fastdiff.ScoreModel(recording, ve, "score", "sigma", data_shape=(2,))
    fastdiff.sample(model, "ncsn", steps=50, num_samples=2)
    assert len(told) == 51
    np.testing.assert_allclose(told[:50:5], fastdiff.schedules.geometric(10.0, 0.1, 10), rtol=1e-5)


def test_index_networks_get_whole_numbers():
    told = []

    def recording(x, index):
        assert index.dtype == torch.int64
        told.append(int(index[0]))
        return x * 0.1

    fastdiff.sample(recording, fastdiff.DDPM(), 4, prediction="eps", time_input="index", shape=(2,), num_samples=1)
    assert told == [999, 749, 499, 249]
    told.clear()
    ladder = fastdiff.NCSN([4.0, 2.0, 1.0])
    fastdiff.sample(recording, ladder, 6, time_input="index", shape=(2,), num_samples=1)
    assert told == [0, 0, 1, 1, 2, 2, 2]


def test_every_time_input_reaches_the_network():
    vp = fastdiff.VP()
    expected = {"t": 1.0, "t*999": 999.0, "sigma": float(vp.sigma(1.0)), "log_sigma": math.log(vp.sigma(1.0)),
                "c_noise": math.log(vp.sigma(1.0) / vp.alpha(1.0)) / 4}  # fmt: skip
    for name, value in expected.items():
        told = []

        def recording(x, t, told=told):
            told.append(t)
            return x

        draw(model=recording, time_input=name, steps=1)
        assert told[0].shape == (8,)
        assert told[0][0] == pytest.approx(value, rel=1e-6)


def test_score_models_answer_for_any_kind_of_time():
    process = fastdiff.DDPM()
    model = fastdiff.ScoreModel(lambda x, t: torch.ones_like(x), process, "eps", data_shape=(2,))
    x = torch.zeros(3, 2)
    expected = (-1 / process.sigma(torch.tensor([500.0]))).expand(3, 1).expand(3, 2)
    for t in (500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500.0] * 3), torch.tensor([500] * 3)):
        assert torch.allclose(model.score(x, t), expected)
    for t in (-1, 0, 1001, math.nan, math.inf, torch.tensor([1.0, 2.0, -0.1])):
        with pytest.raises(fastdiff.errors.ConfigError, match="t must lie in"):
            model.score(x, t)
    with pytest.raises(fastdiff.errors.ShapeError, match="t must be one time"):
        model.score(x, torch.ones(2))


# --- threads and processes -------------------------------------------------------------------------------------------


def test_many_threads_on_one_model_in_training_mode():
    torch.manual_seed(0)
    net = Net().train()
    flags = [m.training for m in net.modules()]
    serial = [draw(model=net, prediction="eps", seed=i, steps=40) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(lambda i: draw(model=net, prediction="eps", seed=i, steps=40), range(8)))
    assert all(torch.equal(a, b) for a, b in zip(serial, threaded))
    assert [m.training for m in net.modules()] == flags


def test_a_forked_child_can_sample():
    code = """
import os, torch, fastdiff
torch.set_num_threads(2)
draw = lambda: fastdiff.sample(lambda x, t: -x, "vp", 3, shape=(3, 128, 128), num_samples=2)
x = draw()
pid = os.fork()
if pid == 0:
    kept = torch.get_num_threads() == 2  # until the first call
    os._exit(0 if torch.equal(draw(), x) and kept else 1)  # of so many numbers, torch's own would wait for other threads
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.stdout.strip() == "0", shown.stderr


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(NonFiniteError("words", 3, 0.5, (1, 2))))
    assert (str(error), error.row, error.t, error.samples) == ("words", 3, 0.5, (1, 2))


# --- runs that go wrong ----------------------------------------------------------------------------------------------


def poisoned(row, samples, value):
    calls = []

    def model(x, t):
        out = score(x, t)
        if len(calls) == row:
            out[samples] = value
        calls.append(1)
        return out

    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"clip": (-1, 1)}, {"check": "every"}, {"sampler": "heun"}])
def test_a_run_that_is_not_finite_names_row_and_samples(value, options):
    with pytest.raises(NonFiniteError, match="row 4") as caught:
        draw(model=poisoned(4, [2, 6], value), first_sample=100, **options)
    if options.get("check") != "every":  # in batches the samples keep their own numbers
        with pytest.raises(NonFiniteError) as second:
            draw(model=lambda x, t: torch.full_like(x, value), first_sample=100, batch_size=3)
        assert second.value.samples == (100, 101, 102)
    table = fastdiff.plan("vp", 12, sampler=options.get("sampler"))
    assert (caught.value.row, caught.value.samples, caught.value.t) == (4, (102, 106), table.rows[4].level.t)
    assert isinstance(caught.value, FloatingPointError)


def test_check_every_stops_at_once_and_off_returns():
    calls = []

    def model(x, t):
        calls.append(1)
        return x * math.nan

    with pytest.raises(NonFiniteError):
        draw(model=model, check="every")
    assert len(calls) == 1
    assert draw(model=model, check="off").isnan().all()
    with pytest.raises(NonFiniteError):
        draw(model=lambda x, t: torch.full_like(x, 1e38) * 1e3)


def test_a_zero_score_is_no_step():
    for norm in ("batch", "sample"):
        sampler = PredictorCorrector("none", "langevin", norm=norm)
        x = draw(model=lambda x, t: torch.zeros_like(x), sampler=sampler, steps=3)
        assert torch.equal(x, fastdiff.normal(8, (5,), seed=0))


def test_a_models_own_error_passes_through():
    class Own(Exception):
        pass

    def model(x, t):
        raise Own("mine")

    with pytest.raises(Own, match="mine"):
        draw(model=model)


def test_every_batch_is_checked_when_the_noise_is_a_callable():
    def network(x, t):
        return torch.where(x.new_tensor(seen.append(1) or len(seen) % 2 == 0, dtype=torch.bool), torch.nan, -x)

    seen = []
    with pytest.raises(fastdiff.errors.NonFiniteError, match="4 samples"):
        fastdiff.sample(
            network,
            "vp",
            6,
            shape=(3,),
            num_samples=8,
            batch_size=4,
            noise=lambda row: torch.zeros(8, 3),
            check="final",
        )


# --- memory, modes and endings ---------------------------------------------------------------------------------------


def timed(x, t):
    return -x * (1 + t.view(-1, 1, 1))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("sampler", [None, "pc", "heun", "unipc"])
@pytest.mark.parametrize("deed", ["share", "empty", "shrink", "grow", "share output"])
def test_a_network_may_move_the_memory_of_its_input(deed, sampler, backend):
    calls = []

    def net(x, t):
        out = timed(x, t)
        calls.append(1)
        if len(calls) % 3 == 2:
            storage = x.untyped_storage()
            if deed == "share":
                x.share_memory_()
                t.share_memory_()
            elif deed == "share output":
                out.share_memory_()
            else:
                storage.resize_({"empty": 0, "shrink": 4, "grow": 2 * storage.nbytes()}[deed])
        return out

    options = {"sampler": sampler, "shape": (5, 7), "num_samples": 3, "batch_size": 2, "backend": backend}
    twin = fastdiff.sample(timed, "vp", 9, **options)
    assert torch.equal(fastdiff.sample(net, "vp", 9, **options), twin)


@pytest.mark.parametrize("sampler", [None, "rk45", "adaptive_sde"])
@pytest.mark.parametrize("kind", ["plain", "expanded", "strided", "dict"])
def test_a_network_may_change_its_condition(kind, sampler):
    base = torch.ones(4, 3)
    y = {"plain": base, "expanded": base[:1].expand(4, 3), "strided": torch.ones(4, 6)[:, ::2], "dict": base}[kind]

    def net(x, t, y):
        out = -x + y
        y[0].add_(1.0)
        return out

    options = {"shape": (3,), "num_samples": 4, "sampler": sampler}
    steps = {} if sampler else {"steps": 5}
    fastdiff.sample(net, "vp", cond={"y": y} if kind == "dict" else y, **options, **steps)
    assert torch.equal(y, torch.ones(4, 3))


def test_time_features_of_the_next_batch_are_as_they_were():
    class Net(torch.nn.Module):
        def time_features(self, t):
            return t[:, None].repeat(1, 3)

        def forward(self, x, t, features=None):
            out = -x * (1 + features)
            if features.shape[0] == 1:
                features.add_(1.0)
            return out

    one, two = (fastdiff.sample(Net(), "vp", 5, shape=(3,), num_samples=4, batch_size=n) for n in (4, 2))
    assert torch.equal(one, two)


def test_a_network_or_noise_that_raises_stop_iteration_is_named():
    def ended(*_):
        raise StopIteration

    for sampler in (None, "rk45"):
        with pytest.raises(StopIteration):
            fastdiff.sample(ended, "vp", sampler=sampler, shape=(3,), num_samples=2)
    with pytest.raises(DataError, match="StopIteration"):
        fastdiff.sample(lambda x, t: -x, "vp", 3, shape=(3,), num_samples=2, noise=ended)


def kinds_of_tensors():
    x = torch.ones(4, 6)
    with FakeTensorMode():
        fake = torch.zeros(4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.zeros(6)] * 4)
        quantised = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    jagged = torch.nested.nested_tensor([torch.zeros(6)] * 4, layout=torch.jagged)
    return {
        "fake": fake, "nested": nested, "jagged": jagged, "quantised": quantised, "meta": x.to("meta"),
        "float8": x.to(torch.float8_e4m3fn), "sparse": x.to_sparse(),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["fake", "nested", "jagged", "quantised", "meta", "float8", "sparse"])
def test_tensors_without_plain_numbers_are_refused(kind):
    value = kinds_of_tensors()[kind]
    options = {"shape": (6,), "num_samples": 4}
    net = lambda x, t, cond=None: -x  # noqa: E731
    for run in (
        lambda: fastdiff.sample(net, "vp", 2, x_init=value, **options),
        lambda: fastdiff.sample(net, "vp", 2, cond=value, **options),
        lambda: fastdiff.sample(net, "vp", 2, cond={"cond": value}, **options),
        lambda: fastdiff.sample(net, "vp", 2, noise=lambda k: value, **options),
        lambda: fastdiff.encode(net, value, "vp"),
        lambda: fastdiff.log_likelihood(net, value, "vp"),
    ):
        with pytest.raises(FastdiffError) as caught:
            run()
        assert "\n" not in str(caught.value)
    if kind != "fake":
        with pytest.raises(FastdiffError):
            fastdiff.sample(lambda x, t: value, "vp", 2, **options)


@pytest.mark.parametrize("sampler", [None, "rk45", "adaptive_sde"])
def test_lazily_negated_tensors_are_what_they_show(sampler):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    steps = {} if sampler else {"steps": 4}
    runs = [
        fastdiff.sample(
            lambda x, t, c: c - x, "vp", x_init=v, cond=v, shape=(6,), num_samples=4, sampler=sampler, **steps
        )
        for v in (-x, torch._neg_view(x))
    ]
    assert torch.equal(*runs)


def test_an_evaluation_waits_for_another_threads_step():
    net = torch.nn.Dropout(0.5)
    entered, go, seen = threading.Event(), threading.Event(), []

    def step():
        with stepping(net):
            entered.set()
            go.wait(10)
            seen.append(net.training)

    def look():
        with evaluating(net):
            seen.append(net.training)

    threads = [threading.Thread(target=step), threading.Thread(target=look)]
    threads[0].start()
    assert entered.wait(10)
    threads[1].start()
    time.sleep(0.05)
    go.set()
    for thread in threads:
        thread.join(10)
    assert seen == [True, False]
    assert net.training
    with stepping(net), evaluating(net):  # a thread never waits for itself
        assert not net.training
    with evaluating(net), stepping(net), evaluating(net):
        assert not net.training
    assert net.training


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as a generator is freed
@pytest.mark.parametrize("what", ["sample", "rk45", "adaptive_sde", "likelihood", "mala", "loss", "sliced loss"])
def test_an_interrupt_at_any_line_leaves_modes_and_gradients(what):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5))
    model = fastdiff.ScoreModel(lambda x, t: net(x), "vp", data_shape=(3,))
    model.net = type("Net", (torch.nn.Module,), {"forward": lambda self, x, t: self.inner(x)})()
    model.net.inner = net
    model.net.energy = lambda x, t: model.net(x, t).square().sum(1)
    x = torch.linspace(-1, 1, 3)[None]
    cursor = fastdiff.execution.ops.cursor(1, 0, 5)
    loose = {"rtol": 1.0, "atol": 1.0}
    run, stride = {
        "sample": (lambda: fastdiff.sample(model, steps=1, num_samples=1), 3),
        "rk45": (lambda: fastdiff.sample(model, sampler=fastdiff.samplers.Adaptive(**loose), num_samples=1), 47),
        "adaptive_sde": (
            lambda: fastdiff.sample(model, sampler=fastdiff.samplers.AdaptiveSDE(**loose), num_samples=1),
            47,
        ),
        "likelihood": (lambda: fastdiff.log_likelihood(model, x, **loose), 47),
        "mala": (lambda: fastdiff.mcmc.mala(model, x, 0.5, steps=1, step_size=0.1), 3),
        "loss": (lambda: fastdiff.losses.per_sample(model, x, torch.full((1,), 0.5), cursor, "dsm"), 2),
        "sliced loss": (lambda: fastdiff.losses.per_sample(model, x, torch.full((1,), 0.5), cursor, "ssm"), 2),
    }[what]
    run()
    left = [0]

    def trace(frame, event, _):
        name = frame.f_code.co_filename
        if not ("fastdiff" in name or "contextlib" in name or "grad_mode" in name):
            return None
        left[0] -= 1
        # Python looks for no signal between a block's end and the release of its lock, which a trace may interrupt all the same
        if left[0] <= 0 and linecache.getline(name, frame.f_lineno).strip().startswith("with _lock:"):
            return trace
        if left[0] <= 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    for at in range(1, 20_000, stride):
        left[0] = at
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            run()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert torch.is_grad_enabled(), at
        assert all(module.training for module in model.net.modules()), at
        assert not modes._users, at
        assert not modes._lock.locked(), at
        if left[0] > 0:  # the run has no line of this number
            break
    assert left[0] > 0
