"""What messages say: one line, the name that was meant, advice that can be followed."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import errors, processes, samplers
from fastdiff.errors import ConfigError, FastdiffError

MEANT = [
    ("sampler", samplers.SAMPLERS, {
        "DDIM": "ddim", "Heun": "heun", "UniPC": "unipc", "LMS": "lms", "euler": "ode", "Euler a": "euler_ancestral",
        "euler_a": "euler_ancestral", "k_euler_ancestral": "euler_ancestral", "dpm++2m": "dpmpp_2m",
        "DPM++ 2M Karras": "dpmpp_2m", "sample_dpmpp_2m_sde": "dpmpp_2m_sde", "DDIMScheduler": "ddim",
        "DPMSolverMultistepScheduler": "dpmpp_2m",
        "Euler-Maruyama": "euler_maruyama", "heum": "heun", "RK45": "rk45", "ReverseDiffusion": "reverse_diffusion",
    }),
    ("sde", processes.PROCESSES, {"VP": "vp", "sub-VP": "subvp", "VESDE": "ve", "vpp": "vp", "EDM": "edm"}),
    ("prediction", fastdiff.predictions.PREDICTIONS, {
        "epsilon": "eps", "v_prediction": "v", "sample": "x0", "pred_x0": "x0", "noise": "eps", "Score": "score", "x_start": "x0",
    }),
    ("time_input", fastdiff.predictions.TIME_INPUTS, {"timestep": "index", "log sigma": "log_sigma", "T": "t"}),
    ("grid", fastdiff.grids.GRIDS, {"Karras": "karras", "exponential": "logsnr", "unifrom": "uniform", "traind": "trained"}),
    ("betas", fastdiff.schedules.BETAS, {"squaredcos_cap_v2": "cosine", "scaled-linear": "scaled_linear"}),
    ("loss", fastdiff.losses.LOSSES, {"MSE": "simple", "DSM": "dsm"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "valid", "given", "meant"),
    [(argument, valid, *pair) for argument, valid, pairs in MEANT for pair in pairs.items()],
)
def test_a_name_in_another_spelling_is_answered_by_the_right_one(argument, valid, given, meant):
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'") as caught:
        errors.choose(argument, given, valid)
    assert len(str(caught.value)) <= errors.LONGEST


def test_every_spelling_answers_for_a_name_that_there_is():
    """A table of words that lead nowhere would be advice in vain."""
    names = {name for _, valid, _ in MEANT for name in valid} | {"reference", "triton", "graph", "learned_range"}
    names |= {"posterior", "beta", "net"}
    for function in (fastdiff.sample, fastdiff.train, fastdiff.log_likelihood, fastdiff.DDPM, fastdiff.VP):
        names |= set(__import__("inspect").signature(function).parameters)
    assert {each for meant in errors.SPELLINGS.values() for each in meant.split()} <= names
    assert all(word == errors._plain(word) for word in errors.SPELLINGS)


def interpolate(**options):
    return fastdiff.interpolate(None, torch.zeros(1, 1), torch.zeros(1, 1), [0.5], **options)


KEYWORDS = [
    (fastdiff.sample, {"num_inference_steps": "steps", "guidance_scale": "guidance", "scheduler": "sampler", "step": "steps",
                       "n_samples": "num_samples", "generator": "seed", "class_labels": "cond", "latents": "x_init"}),
    (fastdiff.train, {"learning_rate": "lr", "epochs": "steps", "batchsize": "batch_size", "ema_decay": "ema"}),
    (fastdiff.log_likelihood, {"num_probes": "probes", "labels": "cond"}),
    (interpolate, {"condition": "cond", "rtool": "rtol"}),
    (fastdiff.plan, {"num_steps": "steps", "schedule": "sde"}),
    (fastdiff.load, {"network": "net"}),
    (fastdiff.load_data, {"bin": "bins"}),
    (fastdiff.normal, {"generator": "seed"}),
    (fastdiff.ScoreModel, {"prediction_type": "prediction", "shape": "data_shape"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "given", "meant"), [(function, *pair) for function, pairs in KEYWORDS for pair in pairs.items()]
)
def test_a_keyword_of_another_library_is_answered_by_the_right_one(function, given, meant):
    with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
        function(**{given: 1})


ODD = {
    "a long name": "x" * 10_000, "lines": "a\nb\r\x1b[31mc", "not UTF-8": "a\udcff", "an integer of 5000 digits": 10**5000,
    "a list of it": [10**5000], "a tensor": torch.zeros(300, 300), "tensors": [torch.zeros(30, 30)] * 20,
    "meta": torch.zeros(3, device="meta"), "an array": np.zeros((100, 100)), "a long list": list(range(10**5)),
    "a dict": {"a" * 500: "b\n" * 500}, "bytes": b"\xff" * 1000, "a callable": lambda: None, "nan": float("nan"),
}  # fmt: skip


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


@pytest.mark.parametrize("value", [*ODD.values(), Unprintable()], ids=[*ODD, "without repr"])
@pytest.mark.parametrize("option", [
    "sde", "sampler", "steps", "prediction", "time_input", "grid", "t_min", "clip", "dtype", "device", "backend", "engine",
    "check", "seed", "num_samples", "first_sample", "batch_size", "trajectory", "cond", "x_init", "noise", "guidance", "denoise",
])  # fmt: skip
def test_a_message_is_one_short_line_whatever_was_given(option, value):
    if option in ("noise", "time_input") and callable(value):
        pytest.skip("a callable is noise, or a time input")
    options = {"sde": "vp", "steps": 3, "shape": (3,), "num_samples": 2, "progress": False, option: value}
    with pytest.raises(FastdiffError) as caught:
        fastdiff.sample(lambda x, t: pytest.fail("the network was called"), **options)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) <= errors.LONGEST
    assert option in said or option == "dtype"
    assert type(pickle.loads(pickle.dumps(caught.value))) is type(caught.value)


# --- advice is followed -----------------------------------------------------------------------------------------------------


def net(x, t, cond=None):
    return -x


def compiled():
    return torch.compile(net, backend="aot_eager")


GOOD = {"sde": "vp", "steps": 3, "shape": (3,), "num_samples": 4, "progress": False}
X = torch.linspace(-1, 1, 12).view(4, 3)
LIKELY = {"x": X, "sde": "vp", "rtol": 0.1, "atol": 0.1}
LEARNED = samplers.Ancestral(variance="learned_range")


def sampled(**options):
    return fastdiff.sample(options.pop("model", net), **{**GOOD, **options})


def likely(**options):
    return fastdiff.log_likelihood(options.pop("model", net), **{**LIKELY, **options})


def tiny(**options):
    torch.manual_seed(0)
    return fastdiff.ScoreModel(fastdiff.networks.MLP((3,), hidden=8, layers=1, **options), "vp", "eps", data_shape=(3,))


# a call, what it is given and refused for, and what its own message says instead (None: without it)
ADVICE = [
    (sampled, {"sampler": "annealed_langevin", "steps": 3}, {"steps": 10}, "use 10"),
    (sampled, {"sampler": "annealed_langevin", "steps": 5}, {"steps": 10}, "use 10"),
    (sampled, {"sampler": "annealed_langevin", "steps": 8}, {"steps": 10}, "use 10"),
    (sampled, {"sampler": "annealed_langevin", "steps": 51}, {"steps": 50}, "use 50"),
    (sampled, {"sde": "ncsn", "steps": 14}, {"steps": 10}, "use 10"),
    (sampled, {"sde": "ddpm", "steps": 1001, "grid": "trained"}, {"grid": "uniform"}, "grid='uniform'"),
    (sampled, {"sde": "ddpm", "time_input": "index", "grid": "uniform", "steps": 7}, {"grid": "trained"}, "grid='trained'"),
    (sampled, {"time_input": "index"}, {"time_input": "t"}, "'t' or"),
    (sampled, {"prediction": "prev_mean"}, {"sde": "ddpm"}, "use ddpm"),
    (sampled, {"grid": "trained"}, {"sde": "ddpm"}, "ddpm, ncsn"),
    (sampled, {"sampler": "ancestral", "grid": "score_sde", "steps": 20}, {"grid": "uniform"}, "grid='uniform'"),
    (sampled, {"sampler": "ancestral", "grid": "score_sde", "steps": 20}, {"steps": 21}, "more than beta_max"),
    (sampled, {"sampler": "unipc", "grid": "score_sde"}, {"grid": "uniform"}, "grid='uniform'"),
    (sampled, {"sampler": "lms", "clip": (-1, 1), "steps": 5}, {"clip": None}, "leave clip out"),
    (sampled, {"sampler": "ula", "clip": (-1, 1)}, {"clip": None}, "leave clip out"),
    (sampled, {"sampler": "rk45"}, {"steps": None}, "leave it out"),
    (sampled, {"sampler": "rk45", "steps": None, "clip": (-1, 1)}, {"clip": None}, "leave it out"),
    (sampled, {"sampler": "adaptive_sde", "steps": None, "trajectory": 3}, {"trajectory": 0}, "leave it out"),
    (sampled, {"grid": [1.0, 0.5], "steps": None, "t_min": 0.1}, {"t_min": None}, "drop t_min"),
    (sampled, {"backend": "triton"}, {"backend": "auto"}, "backend='auto'"),
    (sampled, {"engine": "graph"}, {"engine": "eager"}, "eager"),
    (sampled, {"guidance": "strong"}, {"guidance": None}, "guidance=None"),
    (sampled, {"dtype": torch.int64}, {"dtype": torch.float64}, "float64"),
    (sampled, {"x_init": torch.zeros(4, 3).long()}, {"x_init": torch.zeros(4, 3).long().float()}, ".float()"),
    (sampled, {"cond": torch.zeros(1, 2)}, {"cond": torch.zeros(1, 2).expand(4, 2)}, "expand"),
    (sampled, {"sampler": samplers.PredictorCorrector(corrector="langevin"), "batch_size": 2},
     {"sampler": samplers.PredictorCorrector(corrector="langevin", norm="sample")}, "norm='sample'"),
    (sampled, {"sampler": samplers.PredictorCorrector(corrector="langevin"), "batch_size": 2},
     {"batch_size": None}, "or one batch"),
    (sampled, {"model": lambda x, t: torch.cat((x, x), 1)}, {"sde": "ddpm", "sampler": LEARNED}, "learned_range"),
    (sampled, {"model": tiny(), "prediction": "v", "sde": None, "shape": None}, {"prediction": None}, "leave it out"),
    (sampled, {"model": tiny(), "sde": "ve", "shape": None}, {"sde": "vp"}, "use sde='vp'"),
    (sampled, {"model": tiny(), "sde": "ve", "shape": None}, {"sde": None}, "leave sde out"),
    (likely, {"model": tiny(), "sde": "ve"}, {"sde": None}, "leave sde out"),
    (likely, {"trace": "hutch++", "probes": 2}, {"probes": 3}, "multiple of 3"),
    (likely, {"trace": "hutch++", "probes": 9}, {"trace": "exact"}, "trace='exact'"),
    (likely, {"trace": "exact", "probe": "normal"}, {"probe": None}, "leave it out"),
    (likely, {"couple": True, "batch_size": 2}, {"couple": False}, "couple=False"),
    (likely, {"couple": True, "batch_size": 2}, {"batch_size": 4}, "batch_size=4"),
    (likely, {"x": torch.zeros(4, 3).int()}, {"x": fastdiff.dequantize(torch.zeros(4, 3).int(), (-1, 1))}, "dequantize"),
    (likely, {"x": X.to_sparse()}, {"x": X.to_sparse().to_dense()}, "to_dense"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "given", "advised", "words"), ADVICE)
def test_advice_that_is_followed_is_not_refused(call, given, advised, words):
    with pytest.raises(FastdiffError) as caught:
        call(**given)
    assert words in str(caught.value)
    result = call(**{**given, **advised})
    assert bool((result if isinstance(result, torch.Tensor) else result.nats).isfinite().all())


@pytest.mark.parametrize(
    "more", [{"probes": 2}, {"probes": 2, "derivative": "forward"}, {"trace": "exact"}, {"derivative": "forward"}]
)
def test_compiled_networks_have_likelihoods_and_no_circle_of_advice(more):
    wanted, found = likely(**more), likely(model=compiled(), **more)
    assert (wanted.nats - found.nats).abs().max() < 1e-4


# --- what describes itself ----------------------------------------------------------------------------------------------------


def test_a_name_or_path_is_a_model(tmp_path):
    path = fastdiff.save(tiny(), tmp_path / "m")
    options = {"steps": 2, "num_samples": 2}
    named = fastdiff.sample("digits-vp", **options)
    assert torch.equal(named, fastdiff.sample(fastdiff.load("digits-vp"), **options))
    for each in (path, str(path)):
        assert torch.equal(fastdiff.sample(each, **options), fastdiff.sample(fastdiff.load(path), **options))
        found = fastdiff.log_likelihood(each, X, rtol=0.1, atol=0.1)
        assert torch.equal(found.nats, fastdiff.log_likelihood(fastdiff.load(path), X, rtol=0.1, atol=0.1).nats)
    fastdiff.interpolate(str(path), X, X + 1, [0.5], rtol=0.1, atol=0.1)
    with pytest.raises(FileNotFoundError, match="digits-vp"):
        fastdiff.sample("digits-vpp")


@pytest.mark.parametrize("count", [1, 2, 7, 1000, 10_000])
def test_a_description_is_one_short_line(count):
    betas = np.linspace(1e-4, 2e-2, count)
    chain = fastdiff.DDPM(betas)
    ladder = fastdiff.NCSN(np.linspace(1, 0.01, max(count, 2)))
    for process in (chain, ladder, fastdiff.DDPM("cosine"), fastdiff.VP(), processes.OU()):
        assert len(repr(process)) < 100
        assert repr(process).isprintable()
    model = fastdiff.ScoreModel(
        fastdiff.networks.MLP((3,), num_classes=4), chain, "v", data_shape=(3,), data_range=(0, 1)
    )
    for word in ("MLP", "DDPM", "prediction='v'", "time_input='t'", "data_shape=(3,)", "data_range=(0.0, 1.0)"):
        assert word in repr(model)
    assert repr(model).isprintable()
    assert len(repr(model)) <= 200
    assert re.match(r"ScoreModel\(net, VE", repr(fastdiff.ScoreModel(net, "ve", data_shape=(3,))))
