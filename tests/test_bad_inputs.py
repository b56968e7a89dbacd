"""Every wrong argument is refused before the network is called, by one sentence that names it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.errors import (
    ConfigError,
    DataError,
    DeviceError,
    DTypeError,
    FastdiffError,
    ModelOutputError,
    ModelOutputTypeError,
    ShapeError,
)
from fastdiff.planning.samplers import (
    DDIM,
    DEIS,
    DPM2,
    LMS,
    SA,
    ULA,
    Ancestral,
    AnnealedLangevin,
    DPMSolver,
    DPMSolverPP,
    DPMSolverPP2S,
    EulerMaruyama,
    Heun,
    PredictorCorrector,
    ReverseDiffusion,
    UniPC,
)

GOOD = {"sde": "vp", "steps": 3, "shape": (3,), "num_samples": 4}
NAN, INF = math.nan, math.inf


def never(x, t):
    raise AssertionError("the network was called")


# what is given (over GOOD), the error, words of its message
CONFIGURATION = [
    *(({"steps": v}, ConfigError, "steps must be an integer >= 1") for v in (0, -1, 2.5, 3.0, "100", True, NAN, 10**9)),
    ({"seed": -1}, ConfigError, "seed"),
    ({"seed": 2**64}, ConfigError, "seed"),
    ({"seed": 1.5}, ConfigError, "seed"),
    ({"seed": "7"}, ConfigError, "seed"),
    ({"seed": True}, ConfigError, "seed"),
    ({"first_sample": -1}, ConfigError, "first_sample"),
    ({"first_sample": 2**32}, ConfigError, "first_sample"),
    ({"first_sample": 2**32 - 2}, ConfigError, "num_samples"),
    ({"num_samples": -1}, ConfigError, "num_samples"),
    ({"num_samples": 2.0}, ConfigError, "num_samples"),
    ({"batch_size": 0}, ConfigError, "batch_size"),
    ({"batch_size": 1.5}, ConfigError, "batch_size"),
    ({"trajectory": -1}, ConfigError, "trajectory"),
    ({"shape": None}, ConfigError, "shape must be given"),
    ({"shape": ()}, ConfigError, "shape"),
    ({"shape": 3}, ConfigError, "shape"),
    ({"shape": (3, -1)}, ConfigError, "shape"),
    ({"shape": (3, 2.0)}, ConfigError, "shape"),
    ({"sde": None}, ConfigError, "sde must be given"),
    ({"sde": "vpp"}, ConfigError, "did you mean 'vp'"),
    ({"sde": 3}, ConfigError, "sde must be"),
    ({"sampler": "euler"}, ConfigError, "sampler must be one of"),
    ({"sampler": "heum"}, ConfigError, "did you mean 'heun'"),
    ({"sampler": "dpmpp_2n"}, ConfigError, "did you mean 'dpmpp_2"),
    ({"sampler": "unipc", "grid": "score_sde"}, ConfigError, "score_sde"),
    ({"sampler": "lms", "clip": (-1, 1), "steps": 5}, ConfigError, "clip is not defined"),
    ({"sampler": 7}, ConfigError, "sampler must be one of"),
    ({"prediction": "epsilon"}, ConfigError, "prediction must be one of"),
    ({"prediction": "prev_mean"}, ConfigError, "discrete chains only"),
    ({"time_input": "time"}, ConfigError, "time_input must be one of"),
    ({"time_input": "index"}, ConfigError, "continuous"),
    ({"grid": "unifrom"}, ConfigError, "did you mean 'uniform'"),
    ({"grid": "trained"}, ConfigError, "discrete"),
    ({"grid": [1.0, 0.5]}, ConfigError, "contradicts"),
    ({"grid": [0.5, 1.0], "steps": None}, ConfigError, "decreasing"),
    ({"grid": [1.0, NAN], "steps": None}, ConfigError, "finite"),
    ({"grid": [1.0, 0.5], "steps": None, "t_min": 0.1}, ConfigError, "t_min"),
    ({"grid": [2.0, 0.5], "steps": None}, ConfigError, "lie in"),
    ({"t_min": 1.0}, ConfigError, "t_min"),
    ({"t_min": -0.1}, ConfigError, "t_min"),
    ({"t_min": NAN}, ConfigError, "t_min"),
    ({"t_min": "0"}, ConfigError, "t_min"),
    ({"t_min": 0.0, "sampler": "heun", "grid": "karras"}, ConfigError, "t_min"),
    ({"t_min": 0.0, "sampler": "annealed_langevin", "steps": 10}, ConfigError, "sigma = 0"),
    ({"t_min": 0.0, "sampler": "ula"}, ConfigError, "sigma = 0"),
    ({"t_min": 0.0, "sampler": PredictorCorrector(order="predictor_first")}, ConfigError, "sigma = 0"),
    ({"sampler": "heun", "grid": "score_sde"}, ConfigError, "score_sde"),
    ({"sampler": "ancestral", "grid": "score_sde", "steps": 20}, ConfigError, "beta_max"),
    ({"sampler": "annealed_langevin", "steps": 7}, ConfigError, "use 10"),
    ({"sampler": "annealed_langevin", "steps": 8}, ConfigError, "use 10"),
    ({"sde": "ncsn", "steps": 14}, ConfigError, "use 10"),
    ({"sde": "ncsn", "steps": 3}, ConfigError, "use 10"),
    ({"sde": "ddpm", "steps": 1001, "grid": "trained"}, ConfigError, "<= 1000"),
    ({"sde": "ddpm", "time_input": "index", "grid": "uniform", "steps": 7}, ConfigError, "grid='trained'"),
    ({"clip": (1, -1)}, ConfigError, "clip"),
    ({"clip": (0, 0)}, ConfigError, "clip"),
    ({"clip": (0, NAN)}, ConfigError, "clip"),
    ({"clip": 1.0}, ConfigError, "clip"),
    ({"clip": ("0", "1")}, ConfigError, "clip"),
    ({"clip": "01"}, ConfigError, "clip"),
    ({"denoise": "no"}, ConfigError, "denoise must be True or False"),
    ({"callback": 3}, ConfigError, "callback must be callable"),
    ({"sampler": Ancestral}, ConfigError, r"write Ancestral\(\)"),
    ({"sde": fastdiff.VP}, ConfigError, r"write VP\(\)"),
    ({"sde": fastdiff.VP(0.1, 3000.0), "grid": [1.0, 0.5], "steps": None}, ConfigError, "start at t <= 0.11"),
    ({"num_samples": 2**32, "shape": (2**33,)}, ConfigError, "num_samples"),
    ({"clip": (-1, 1), "sampler": "ula"}, ConfigError, "clip acts on predictions"),
    ({"clip": (-1, 1), "sampler": PredictorCorrector("none")}, ConfigError, "clip acts on predictions"),
    ({"clip": (0, 1, 2)}, ConfigError, "clip"),
    ({"check": "always"}, ConfigError, "check must be one of"),
    ({"backend": "cuda"}, ConfigError, "backend must be one of"),
    ({"backend": "cpu", "device": "nowhere"}, DeviceError, "device"),
    ({"backend": "triton"}, ConfigError, "runs CUDA tensors"),
    ({"engine": "graph"}, ConfigError, "CUDA graphs need a CUDA device"),
    ({"engine": "graphs"}, ConfigError, "did you mean 'graph'"),
    ({"guidance": 2.0}, ConfigError, "guidance"),
    ({"dtype": torch.int64}, DTypeError, "dtype"),
    ({"dtype": "float32"}, DTypeError, "dtype"),
    ({"device": "meta"}, DeviceError, "holds no data"),
    ({"device": "nowhere"}, DeviceError, "nowhere"),
    ({"device": 3.5}, DeviceError, "device"),
    ({"model": 3}, ConfigError, "model must be"),
    ({"sampler": PredictorCorrector(corrector="langevin"), "batch_size": 2}, ConfigError, "norm='sample'"),
]

SAMPLER_OPTIONS = [
    (lambda: Ancestral("fixed_small"), "variance"),
    (lambda: DDIM(-0.1), "eta"),
    (lambda: DDIM(1.1), "eta"),
    (lambda: DDIM(NAN), "eta"),
    (lambda: EulerMaruyama(2.0), "lam"),
    (lambda: ReverseDiffusion(-1), "lam"),
    (lambda: Heun(s_churn=-1), "s_churn"),
    (lambda: Heun(s_churn=INF), "s_churn"),
    (lambda: Heun(s_noise=NAN), "s_noise"),
    (lambda: Heun(s_max=-1), "s_max"),
    *((lambda v=v: LMS(v), "order must be an integer >= 1 and <= 4") for v in (0, 5, 2.0, True, "2")),
    (lambda: DEIS(5), "order"),
    (lambda: DEIS(3, "rho"), "variable must be one of 't', 'lambda'"),
    (lambda: DEIS(lower_order_final=1), "lower_order_final must be True or False"),
    (lambda: DPMSolver(4), "order"),
    (lambda: DPMSolverPP(4), "order"),
    (lambda: DPMSolverPP(eta=-0.1), "eta"),
    (lambda: DPMSolverPP(eta=NAN), "eta"),
    (lambda: DPMSolverPP(lower_order_final="no"), "lower_order_final"),
    (lambda: DPMSolverPP2S(eta=1.1), "eta"),
    (lambda: DPMSolverPP2S(sde="yes"), "sde must be True or False"),
    (lambda: DPM2(eta=-1), "eta"),
    (lambda: DPM2(s_churn=-1), "s_churn"),
    (lambda: UniPC(4), "order"),
    (lambda: UniPC(variant="bh3"), "did you mean 'bh[12]'"),
    (lambda: UniPC(predicts="score"), "predicts"),
    (lambda: UniPC(lower_order_final=None), "lower_order_final"),
    (lambda: SA(4), "predictor must be an integer >= 1 and <= 3"),
    (lambda: SA(3, 5), "corrector must be an integer >= 0 and <= 4"),
    (lambda: SA(tau=-1), "tau"),
    (lambda: SA(tau=INF), "tau"),
    (lambda: PredictorCorrector("unipc"), "predictor must be one of"),
    (lambda: fastdiff.plan("vp", 3, sampler=PredictorCorrector(SA())), "'sa' cannot serve as a predictor"),
    (lambda: AnnealedLangevin(step_size=0), "step_size"),
    (lambda: AnnealedLangevin(steps_per_level=0), "steps_per_level"),
    (lambda: ULA(step_size=-1.0), "step_size"),
    (lambda: PredictorCorrector(predictor="rk45"), "predictor"),
    (lambda: PredictorCorrector(corrector="lengevin"), "did you mean 'langevin'"),
    (lambda: PredictorCorrector(snr=0), "snr"),
    (lambda: PredictorCorrector(snr=NAN), "snr"),
    (lambda: PredictorCorrector(corrector_steps=-1), "corrector_steps"),
    (lambda: PredictorCorrector(corrector_steps=1.0), "corrector_steps"),
    (lambda: PredictorCorrector(norm="mean"), "norm"),
    (lambda: PredictorCorrector(order="both"), "order"),
    (lambda: PredictorCorrector("none", "none"), "nothing would run"),
    (lambda: fastdiff.plan("vp", 3, sampler=PredictorCorrector(PredictorCorrector())), "predictor"),
    (lambda: fastdiff.plan("vp", 3, sampler=PredictorCorrector(ULA())), "predictor"),
]

TENSORS = [
    *(({"x_init": torch.zeros(4, 3, dtype=d)}, DTypeError, "x_init must be floating")
      for d in (torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64)),
    ({"x_init": torch.zeros(4, 3).to(torch.float8_e4m3fn)}, DTypeError, "x_init must be floating"),
    ({"x_init": torch.zeros(4, 3).to_sparse()}, ShapeError, "dense"),
    ({"x_init": np.zeros((4, 3))}, DTypeError, "x_init must be a tensor"),
    ({"x_init": [0.0]}, DTypeError, "x_init must be a tensor"),
    ({"x_init": torch.zeros(4, 2)}, ShapeError, r"\(4, 3\)"),
    ({"x_init": torch.zeros(3)}, ShapeError, r"\(4, 3\)"),
    ({"x_init": torch.tensor(0.0)}, ShapeError, r"\(4, 3\)"),
    ({"x_init": torch.zeros(4, 3, device="meta")}, DeviceError, "meta"),
    ({"x_init": torch.full((4, 3), NAN)}, DataError, r"x_init must be finite, got nan at index \(0, 0\)"),
    ({"x_init": torch.tensor([[0.0, 0, 0]] * 3 + [[0.0, INF, 0]])}, DataError, r"index \(3, 1\)"),
    ({"noise": torch.zeros(3, 4, 2)}, ShapeError, r"\(3, 4, 3\)"),
    ({"noise": torch.zeros(2, 4, 3)}, ShapeError, r"\(3, 4, 3\)"),
    ({"noise": torch.full((3, 4, 3), NAN)}, DataError, "noise must be finite"),
    ({"noise": 3.0}, DTypeError, "noise must be"),
    ({"cond": torch.zeros(3, 2)}, ShapeError, "num_samples=4"),
    ({"cond": torch.tensor(1.0)}, ShapeError, "num_samples=4"),
    ({"cond": {"y": torch.zeros(3)}}, ShapeError, r"cond\['y'\]"),
    ({"cond": {"y": 3}}, DTypeError, r"cond\['y'\]"),
    ({"cond": [1, 2]}, DTypeError, "cond must be"),
    ({"cond": {1: torch.zeros(4)}}, DTypeError, "names"),
    ({"cond": torch.zeros(4, 2).to_sparse()}, ShapeError, "dense"),
    ({"cond": torch.full((4,), NAN)}, DataError, "cond must be finite"),
    # names come before tensors
    ({"x_init": torch.zeros(4, 2), "grid": "karass"}, ConfigError, "did you mean 'karras'"),
    *(({"prediction": value}, ConfigError, "prediction must be one of")
      for value in ("", np.zeros(2), torch.zeros(2), ["eps"], 3)),
    ({"sde": "vq"}, ConfigError, "did you mean 'v[ep]'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), CONFIGURATION + TENSORS)
def test_refused_before_any_work(change, error, words):
    options = {"model": never, **GOOD, **change}
    with pytest.raises(error, match=words) as caught:
        fastdiff.sample(**options)
    assert isinstance(caught.value, FastdiffError)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= 260


@pytest.mark.parametrize(("make", "words"), SAMPLER_OPTIONS)
def test_sampler_options_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_finiteness_checks_are_skipped_when_off():
    x = fastdiff.sample(lambda x, t: -x, x_init=torch.full((4, 3), NAN), check="off", **GOOD)
    assert x.isnan().all()
    # the sum of large finite numbers overflows, and that alone is no reason to refuse
    big = torch.full((4, 3), 3e38)
    fastdiff.sample(lambda x, t: 0 * x, x_init=big, check="final", **{**GOOD, "sampler": ULA(1e-9), "t_min": 0.5})


@pytest.mark.parametrize(("bad", "near"), [("stpes", "steps"), ("samplr", "sampler"), ("t_mn", "t_min")])
def test_unknown_keywords_are_named_with_the_nearest(bad, near):
    for call in (lambda **k: fastdiff.sample(never, **GOOD, **k), lambda **k: fastdiff.plan("vp", 3, **k)):
        with pytest.raises(TypeError, match=f"{bad}.*did you mean '{near}'"):
            call(**{bad: 3})
    with pytest.raises(TypeError, match=r"learning.*only model, data, steps"):
        fastdiff.train(None, None, learning=3)


OUTPUTS = [
    (lambda x: x[:, :1], ModelOutputError, r"\(4, 1\), expected \(4, 3\)"),
    (lambda x: x.transpose(0, 1), ModelOutputError, r"\(3, 4\)"),
    (lambda x: x[0], ModelOutputError, r"\(3,\)"),
    (lambda x: x.sum(), ModelOutputError, "expected"),
    (lambda x: torch.cat([x, x], 1), ModelOutputError, "learned_range"),
    (lambda x: None, ModelOutputTypeError, "NoneType"),
    (lambda x: 0.0, ModelOutputTypeError, "float"),
    (lambda x: x.numpy(), ModelOutputTypeError, "ndarray"),
    (lambda x: [x], ModelOutputTypeError, "list"),
    (lambda x: {"sample": x}, ModelOutputTypeError, "dict"),
    (lambda x: (), ModelOutputTypeError, "tuple"),
    (lambda x: (None, x), ModelOutputTypeError, "tuple"),
    (lambda x: x.long(), ModelOutputTypeError, "int64"),
    (lambda x: x.to("meta"), ModelOutputError, "meta"),
    (lambda x: x.to_sparse(), ModelOutputError, "dense"),
]


@pytest.mark.parametrize(("output", "error", "words"), OUTPUTS)
def test_model_outputs_are_never_broadcast(output, error, words):
    calls = []

    def model(x, t):
        calls.append(1)
        return output(x)

    with pytest.raises(error, match=words):
        fastdiff.sample(model, **GOOD)
    assert len(calls) == 1


def test_learned_variance_needs_twice_the_channels():
    with pytest.raises(ModelOutputError, match=r"expected \(4, 6\)"):
        fastdiff.sample(lambda x, t: x, sampler=Ancestral("learned_range"), **GOOD)


def test_a_noise_callable_is_checked_too():
    with pytest.raises(ShapeError, match=r"noise\(0\)"):
        fastdiff.sample(lambda x, t: -x, noise=lambda row: torch.zeros(3, 3), **GOOD)
    with pytest.raises(DTypeError, match=r"noise\(0\)"):
        fastdiff.sample(lambda x, t: -x, noise=lambda row: None, **GOOD)


def model(**change):
    options = {"net": lambda x, t: -x, "sde": "vp", "data_shape": (3,), "prediction": "score", **change}
    return fastdiff.ScoreModel(**options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"net": 3}, "net must be callable"),
        ({"sde": "vpp"}, "did you mean 'vp'"),
        ({"prediction": "noise"}, "prediction must be one of"),
        ({"prediction": "increment"}, "ddpm or ncsn"),
        ({"time_input": "index"}, "continuous"),
        ({"data_shape": ()}, "shape"),
        ({"data_range": (1, -1)}, "data_range"),
        ({"data_range": 1}, "data_range"),
        ({"variance": "learnt"}, "did you mean 'learned'"),
    ],
)
def test_score_models_refuse_what_cannot_be_meant(change, words):
    with pytest.raises(ConfigError, match=words):
        model(**change)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sde": "ve"}, "use sde='vp'"),
        ({"sde": "subvp"}, "use sde='vp'"),
        ({"sde": "ncsn"}, "use sde='vp'"),
        ({"sde": fastdiff.VP(0.1, 10.0)}, "use sde='vp'"),
        ({"sde": fastdiff.DDPM("cosine")}, "use sde='vp'"),
        ({"prediction": "eps"}, "contradicts the model's own 'score'"),
        ({"time_input": "sigma"}, "contradicts"),
        ({"shape": (4,)}, "contradicts"),
    ],
)
def test_contradictions_with_the_model_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        fastdiff.sample(model(), steps=3, num_samples=1, **options)


def test_networks_and_starts_on_different_devices():
    with pytest.raises(DeviceError, match="meta"):
        fastdiff.sample(torch.nn.Linear(3, 3, device="meta"), **GOOD)


PINNED = """model sde steps sampler num_samples shape prediction time_input cond seed first_sample batch_size x_init noise
    grid t_min clip denoise guidance dtype device backend engine check progress callback trajectory return_info
    table"""


def test_pinned_signature():
    """Others rely on these names, in this order."""
    import inspect

    assert list(inspect.signature(fastdiff.sample).parameters) == PINNED.split()


# --- public functions of numbers: each refuses, by name, what its arguments cannot be --------------------------------------

ODD_NUMBERS = (NAN, INF, -1.0, "1", True, None, 10**400, 1j, torch.tensor([1.0, 2.0]))
NUMBERS = {
    "grids.karras sigma_max": (lambda v: fastdiff.grids.karras(v, 0.002, 5), "sigma_max", (*ODD_NUMBERS, 0.0, 0.001)),
    "grids.karras sigma_min": (lambda v: fastdiff.grids.karras(80.0, v, 5), "sigma_min", (*ODD_NUMBERS, 0.0, 80.0)),
    "grids.karras n": (lambda v: fastdiff.grids.karras(80.0, 0.002, v), "n", (*ODD_NUMBERS, 0, -3, 2.5)),
    "grids.karras rho": (lambda v: fastdiff.grids.karras(80.0, 0.002, 5, v), "rho", (*ODD_NUMBERS, 0)),
    "schedules.linear T": (lambda v: fastdiff.schedules.linear(v), "T", (*ODD_NUMBERS, 0, 2.5)),
    "schedules.linear beta_end": (lambda v: fastdiff.schedules.linear(10, 0.1, v), "beta_end", set(ODD_NUMBERS[:-1]) - {None}),
    "schedules.quadratic T": (lambda v: fastdiff.schedules.quadratic(v), "T", (*ODD_NUMBERS, 0, 2.5)),
    "schedules.quadratic beta_start": (
        lambda v: fastdiff.schedules.quadratic(10, v), "beta_start", set(ODD_NUMBERS[:-1]) - {None},
    ),
    "schedules.scaled_linear T": (lambda v: fastdiff.schedules.scaled_linear(v), "T", (*ODD_NUMBERS, 0, 2.5)),
    "schedules.cosine T": (lambda v: fastdiff.schedules.cosine(v), "T", (*ODD_NUMBERS, 0, 2.5)),
    "schedules.cosine s": (lambda v: fastdiff.schedules.cosine(10, v), "s", ODD_NUMBERS),
    "schedules.cosine max_beta": (lambda v: fastdiff.schedules.cosine(10, 0.008, v), "max_beta", (*ODD_NUMBERS, 0, 1)),
    "schedules.sigmoid T": (lambda v: fastdiff.schedules.sigmoid(v), "T", (*ODD_NUMBERS, 0, 2.5)),
    "schedules.sigmoid start": (lambda v: fastdiff.schedules.sigmoid(10, v), "start", set(ODD_NUMBERS[:-1]) - {-1.0} | {3.0}),
    "schedules.sigmoid tau": (lambda v: fastdiff.schedules.sigmoid(10, tau=v), "tau", (*ODD_NUMBERS, 0)),
    "schedules.from_alpha_bar T": (lambda v: fastdiff.schedules.from_alpha_bar(lambda u: 1 - u / 2, v), "T", ODD_NUMBERS),
    "schedules.from_alpha_bar": (lambda v: fastdiff.schedules.from_alpha_bar(v, 10), "alpha_bar", ODD_NUMBERS),
    "schedules.betas T": (lambda v: fastdiff.schedules.betas("linear", v), "T", (*ODD_NUMBERS, 0)),
    "schedules.geometric sigma_max": (lambda v: fastdiff.schedules.geometric(v, 0.01, 5), "sigma_max", (*ODD_NUMBERS, 0.01)),
    "schedules.geometric levels": (lambda v: fastdiff.schedules.geometric(1.0, 0.01, v), "levels", (*ODD_NUMBERS, 0, 1, 2.5)),
    "schedules.overlap gamma": (lambda v: fastdiff.schedules.overlap(v, 4), "gamma", ODD_NUMBERS),
    "schedules.overlap dim": (lambda v: fastdiff.schedules.overlap(1.5, v), "dim", (*ODD_NUMBERS, 0, 2.5)),
    "schedules.erf_ratio dim": (lambda v: fastdiff.schedules.erf_ratio(v), "dim", (*ODD_NUMBERS, 0, 2.5)),
    "schedules.erf_ratio target": (lambda v: fastdiff.schedules.erf_ratio(4, v), "target", (*ODD_NUMBERS, 0, 1)),
    "schedules.erf_levels sigma_max": (lambda v: fastdiff.schedules.erf_levels(v, 0.01, 4), "sigma_max", (*ODD_NUMBERS, 0.01)),
    "schedules.variance_ratio eta": (lambda v: fastdiff.schedules.variance_ratio(v, 1.5, 5), "eta", (*ODD_NUMBERS, 2)),
    "schedules.variance_ratio steps": (
        lambda v: fastdiff.schedules.variance_ratio(0.5, 1.5, v), "steps_per_level", (*ODD_NUMBERS, 0),
    ),
    "schedules.langevin_step sigma_min": (lambda v: fastdiff.schedules.langevin_step(v, 1.5, 5), "sigma_min", ODD_NUMBERS),
    "schedules.langevin_step gamma": (lambda v: fastdiff.schedules.langevin_step(0.01, v, 5), "gamma", ODD_NUMBERS),
    "schedules.langevin_step steps": (
        lambda v: fastdiff.schedules.langevin_step(0.01, 1.5, v), "steps_per_level", (*ODD_NUMBERS, 0),
    ),
    "schedules.ema_decay step": (lambda v: fastdiff.schedules.ema_decay(v), "step", ODD_NUMBERS),
    "schedules.ema_decay decay": (lambda v: fastdiff.schedules.ema_decay(1, v), "decay", (*ODD_NUMBERS, 1.5)),
    "VE sigma_min": (lambda v: fastdiff.VE(sigma_min=v), "sigma_min", (*ODD_NUMBERS, 0, 50)),
    "VP beta_max": (lambda v: fastdiff.VP(beta_max=v), "beta_max", (*ODD_NUMBERS, 0)),
    "OU noise": (lambda v: fastdiff.OU(noise=v), "noise", (*ODD_NUMBERS, 0)),
    "OU T": (lambda v: fastdiff.OU(T=v), "T", (*ODD_NUMBERS, 0)),
    "EDM sigma_data": (lambda v: fastdiff.EDM(sigma_data=v), "sigma_data", (*ODD_NUMBERS, 0)),
    "DDPM T": (lambda v: fastdiff.DDPM(T=v), "T", (*ODD_NUMBERS, 0, 2.5)),
    "normal num_samples": (lambda v: fastdiff.normal(v, (2,), seed=0), "num_samples", (*ODD_NUMBERS, 2.5)),
    "normal draw": (lambda v: fastdiff.normal(1, (2,), seed=0, draw=v), "draw", (*ODD_NUMBERS, 2 ** 32)),
    "normal shape": (lambda v: fastdiff.normal(1, v, seed=0), "shape", (*ODD_NUMBERS[:-1], (-1,), (), (2.5,), (True,))),
    "bits_per_dim bins": (lambda v: fastdiff.bits_per_dim(None, (0, 1), v), "bins", (*ODD_NUMBERS, 1)),
    "dequantize bins": (lambda v: fastdiff.dequantize(torch.zeros(1, 1).long(), (0, 1), v), "bins", (*ODD_NUMBERS, 1)),
    "dequantize seed": (lambda v: fastdiff.dequantize(torch.zeros(1, 1).long(), (0, 1), seed=v), "seed", ODD_NUMBERS),
}  # fmt: skip


@pytest.mark.parametrize(("call", "name", "values"), NUMBERS.values(), ids=NUMBERS)
def test_public_functions_of_numbers_refuse_what_is_none(call, name, values):
    for value in values:
        with pytest.raises(FastdiffError, match=rf"\b{name}\b") as caught:
            call(value)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) <= 200


LEVEL = fastdiff.plan("vp", 2).rows[0].level


@pytest.mark.parametrize("function", ["alpha", "sigma", "drift", "diffusion", "time"])
@pytest.mark.parametrize("sde", ["ve", "vp", "subvp", "ddpm", "ncsn", "edm", "ou"])
def test_a_processs_functions_of_time_take_numbers(sde, function):
    """Floats, whole numbers, numpy's and tensors give the same."""
    process = fastdiff.processes.get(sde)
    ones = (1, 1.0, np.float64(1.0), np.array(1.0), torch.tensor(1.0))
    assert np.ptp([float(getattr(process, function)(one)) for one in ones]) < 1e-5


# --- tensors that are not what they seem, at every door ---------------------------------------------------------------------

QUICK = {"sde": "vp", "rtol": 1e-1, "atol": 1e-1}


def linear(x, t, cond=None):
    return -x if cond is None else -x * cond


def model_of(shape=(3,), net=linear, **options):
    return fastdiff.ScoreModel(net, "vp", "score", data_shape=shape, **options)


class Energy:
    def energy(self, x, t):
        return 0.5 * x.square().flatten(1).sum(1)


def per_sample(x0, t=None, loss="dsm"):
    model = model_of(tuple(x0.shape[1:]) if not x0.is_nested else (3,))
    t = torch.full((4,), 0.5) if t is None else t
    return fastdiff.losses.per_sample(model, x0, t, fastdiff.execution.ops.cursor(1, 0, 5), loss)


Z = torch.linspace(-1, 1, 36).view(3, 4, 3)
DOORS = {
    "x_init": lambda x: fastdiff.sample(linear, x_init=x, **GOOD),
    "x_init of rk45": lambda x: fastdiff.sample(linear, x_init=x, **{**GOOD, "steps": None}, sampler="rk45"),
    "noise": lambda x: fastdiff.sample(linear, noise=x.expand(3, 4, 3), **GOOD),
    "noise of a callable": lambda x: fastdiff.sample(linear, noise=lambda k: x, **GOOD),
    "cond": lambda x: fastdiff.sample(linear, cond=x, **GOOD),
    "cond of a dict": lambda x: fastdiff.sample(linear, cond={"cond": x}, **GOOD),
    "log_likelihood": lambda x: fastdiff.log_likelihood(linear, x, **QUICK).nats,
    "encode": lambda x: fastdiff.encode(linear, x, **QUICK),
    "decode": lambda x: fastdiff.decode(linear, x, **QUICK),
    "interpolate": lambda x: fastdiff.interpolate(linear, x, x.clone() + 1, [0.5], **QUICK),
    "score": lambda x: model_of().score(x, torch.tensor(0.5)),
    "predict": lambda x: model_of().predict("x0", x, torch.tensor(0.5)),
    "per_sample": per_sample,
    "perturb": lambda x: fastdiff.losses.perturb(
        fastdiff.VP(), x, torch.full((4,), 0.5), fastdiff.execution.ops.cursor(1, 0, 5)
    ),
    "mala": lambda x: fastdiff.mcmc.mala(Energy(), x, 0.5, steps=2, step_size=0.1).x,
    "hmc": lambda x: fastdiff.mcmc.hmc(Energy(), x, 0.5, steps=2, step_size=0.1).x,
    "data": lambda x: fastdiff.load_data(x, range=(-2, 2)).batch([0, 1], (-1, 1)),
    "quantise": lambda x: fastdiff.Data(torch.linspace(-1, 1, 12).view(4, 3)).quantise(x, (-1, 1)),
}
NOT_DENSE = {
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "complex": lambda x: x.to(torch.complex64),
    "mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_lazily_negated_tensor_is_the_tensor(door):
    x = Z[0].clone()
    for dtype in (torch.float32, torch.float64):
        wanted, found = DOORS[door](x.to(dtype)), DOORS[door]((-x.to(dtype))._neg_view())
        assert torch.equal(wanted, found)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("door", DOORS)
def test_tensors_that_do_not_hold_numbers_one_by_one_are_refused(door, kind):
    if door in ("cond", "cond of a dict") and kind == "complex":
        pytest.skip("a network may take complex conditions")
    if door == "interpolate":
        call = lambda x: fastdiff.interpolate(linear, x, x, [0.5], **QUICK)  # noqa: E731
    elif door == "noise":
        call = lambda x: fastdiff.sample(linear, noise=x, **GOOD)  # noqa: E731
    else:
        call = DOORS[door]
    with pytest.raises(FastdiffError) as caught:
        call(NOT_DENSE[kind](Z[0].clone()))
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize("t", ["0.5", None, True, 0.5 + 0j, [0.5, "1"], torch.tensor(True), torch.tensor(0.5 + 0j), {}])
def test_times_that_are_no_numbers_are_refused(t):
    x = torch.zeros(2, 3)
    calls = (model_of().score, lambda x, t: model_of().predict("eps", x, t), lambda x, t: model_of()(x, t),
             lambda x, t: fastdiff.mcmc.mala(Energy(), x, t, steps=1, step_size=0.1))  # fmt: skip
    for call in calls:
        with pytest.raises(FastdiffError, match=r"\bt must"):
            call(x, t)
    with pytest.raises(DeviceError, match="meta"):
        model_of().score(x, torch.tensor(0.5, device="meta"))


@pytest.mark.parametrize("sde", ["ve", "vp", "subvp", "ddpm", "ncsn", "edm", "ou"])
def test_times_below_the_first_level_are_refused(sde):
    process = fastdiff.processes.get(sde)
    model = fastdiff.ScoreModel(linear, process, "score", data_shape=(3,))
    first = process.first_time
    for t in (-1e-3, first - 0.5, first - 1e-3, process.T * 1.01):
        with pytest.raises(ConfigError, match="t must lie in"):
            model.score(torch.zeros(2, 3), torch.tensor(float(t)))


class Stops(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.weight, self.error, self.calls = torch.nn.Parameter(torch.ones(())), error, 0

    def forward(self, x, t):
        self.calls += 1
        if self.calls > 1:
            raise self.error
        return -self.weight * x


@pytest.mark.parametrize("error", [StopIteration("mine"), GeneratorExit(), KeyboardInterrupt(), ValueError("x")])
def test_what_a_network_raises_comes_out_as_the_same_object(error):
    x = torch.linspace(-1, 1, 12).view(4, 3)
    calls = {
        "sample": lambda net: fastdiff.sample(net, **GOOD),
        "batches": lambda net: fastdiff.sample(net, batch_size=2, **GOOD),
        "noise": lambda net: fastdiff.sample(net, noise=lambda k: torch.zeros(4, 3), batch_size=2, **GOOD),
        "rk45": lambda net: fastdiff.sample(net, "vp", sampler="rk45", shape=(3,), num_samples=4),
        "adaptive_sde": lambda net: fastdiff.sample(net, "vp", sampler="adaptive_sde", shape=(3,), num_samples=4),
        "encode": lambda net: fastdiff.encode(net, x, **QUICK),
        "interpolate": lambda net: fastdiff.interpolate(net, x, x + 1, [0.5], **QUICK),
        "train": lambda net: fastdiff.train(model_of(net=net), x, steps=3, batch_size=2),
        **{
            f"{trace} {derivative}": lambda net, trace=trace, derivative=derivative: fastdiff.log_likelihood(
                net, x, trace=trace, probes=3, derivative=derivative, **QUICK
            )
            for trace in ("hutchinson", "hutch++", "exact")
            for derivative in ("reverse", "forward")
            if trace != "hutch++"
        },
    }
    for name, call in calls.items():
        net = Stops(error).train()
        with pytest.raises(type(error)) as caught:
            call(net)
        assert caught.value is error, name
        assert net.training, name
        assert torch.is_grad_enabled(), name


# --- flags and numbers that are another kind ------------------------------------------------------------------------------------

NO_FLAGS = (1, 0, "no", "False", 1.0, [], torch.tensor(True))
NO_NUMBERS = (True, "1", NAN, INF, [1], 10**400, 1j)
TOY = torch.linspace(-1, 1, 24).view(8, 3)


def trained(**options):
    model = fastdiff.ScoreModel(fastdiff.networks.MLP((3,), hidden=4, layers=1), "vp", "eps", data_shape=(3,))
    return fastdiff.train(model, TOY, **{"steps": 1, "batch_size": 2, "progress": False, **options})


def untouched(**options):
    return fastdiff.sample(never, **{**GOOD, "progress": False, **options})


def likely(**options):
    return fastdiff.log_likelihood(never, TOY, **{**QUICK, "progress": False, **options})


KINDS = [
    *((untouched, name, NO_FLAGS) for name in ("denoise", "return_info", "progress")),
    *((untouched, name, (*NO_NUMBERS, 1.5)) for name in ("steps", "num_samples", "first_sample", "batch_size", "seed")),
    (untouched, "trajectory", (*NO_NUMBERS, 1.5)),
    (untouched, "t_min", NO_NUMBERS), (untouched, "clip", NO_NUMBERS),
    *((likely, name, NO_FLAGS) for name in ("couple", "progress")),
    *((likely, name, NO_NUMBERS) for name in ("rtol", "atol", "t_min")),
    *((likely, name, (*NO_NUMBERS, 1.5)) for name in ("probes", "max_nfe", "first_sample", "seed", "batch_size")),
    *((trained, name, NO_FLAGS) for name in ("decay", "dequantize", "resume", "progress")),
    *((trained, name, NO_NUMBERS) for name in ("lr", "ema", "grad_clip")),
    *((trained, name, (*NO_NUMBERS, 1.5)) for name in ("steps", "batch_size", "warmup", "seed", "checkpoint_every")),
    *((trained, name, (1, "x", True)) for name in ("callback", "stop")),
    (lambda limit: fastdiff.plan("vp", 5).explain(limit), "limit", (*NO_NUMBERS, 1.5, 0, -1)),
]  # fmt: skip


@pytest.mark.parametrize(("call", "name", "values"), KINDS)
def test_flags_are_flags_and_numbers_are_numbers(call, name, values):
    for value in values:
        with pytest.raises(FastdiffError, match=rf"\b{name}\b"):
            call(**{name: value})


def test_a_run_without_stderr(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    fastdiff.sample(linear, **GOOD)
