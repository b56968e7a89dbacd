"""What messages say: one line, the name that was meant, advice that can be followed."""

from __future__ import annotations

import pickle

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
    ("grid", fastdiff.grids.GRIDS, {"Karras": "karras", "exponential": "logsnr", "unifrom": "uniform", "trailing": "trained"}),
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
    if option == "noise" and callable(value):
        pytest.skip("a callable is noise")
    options = {"sde": "vp", "steps": 3, "shape": (3,), "num_samples": 2, "progress": False, option: value}
    with pytest.raises(FastdiffError) as caught:
        fastdiff.sample(lambda x, t: pytest.fail("the network was called"), **options)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) <= errors.LONGEST
    assert option in said or option == "dtype"
    assert type(pickle.loads(pickle.dumps(caught.value))) is type(caught.value)
