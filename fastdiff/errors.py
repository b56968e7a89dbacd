"""One family of errors. Each is also the builtin a caller would expect, so plain `except ValueError` works.

A message is one sentence: the argument, the value received, the rule, and the way out. Whatever was given, it is one line of
at most 200 characters.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

LONGEST = 200  # characters of a message

# What other libraries and papers call fastdiff's names and keywords, as `_plain` spells it.
SPELLINGS: dict[str, str] = {
    # samplers
    "euler": "ode ddim", "eulera": "euler_ancestral", "eulerdiscrete": "ode ddim",
    "eulerancestraldiscrete": "euler_ancestral", "em": "euler_maruyama", "ddpm": "ancestral", "dpmpp": "dpmpp_2m",
    "dpmsolverpp": "dpmpp_2m", "dpmsolvermultistep": "dpmpp_2m", "dpm2a": "dpm_2_ancestral",
    "dpmsolversinglestep": "dpm_singlestep", "dpmsolversde": "dpmpp_sde", "dpmpp2sa": "dpmpp_2s_ancestral",
    "kdpm2discrete": "dpm_2", "kdpm2ancestraldiscrete": "dpm_2_ancestral", "heundiscrete": "heun",
    "lmsdiscrete": "lms", "unipcmultistep": "unipc", "deismultistep": "deis", "plms": "lms deis",
    "pndm": "lms deis", "ipndm": "lms deis", "predictorcorrector": "pc", "langevin": "ula",
    "ald": "annealed_langevin", "probabilityflow": "ode rk45", "dopri5": "rk45", "adaptive": "rk45 adaptive_sde",
    "sasolver": "sa",
    # processes
    "vpsde": "vp", "variancepreserving": "vp", "vesde": "ve", "varianceexploding": "ve", "subvpsde": "subvp",
    "smld": "ncsn ve", "gaussian": "ddpm", "ornsteinuhlenbeck": "ou",
    "flowmatching": "rectified_flow", "straight": "rectified_flow", "linearflow": "rectified_flow", "fm": "rectified_flow",
    # predictions and times
    "epsilon": "eps", "noise": "eps", "prednoise": "eps", "vprediction": "v", "predv": "v",
    "sample": "x0", "predx0": "x0", "xstart": "x0", "xstartprediction": "x0", "denoised": "x0", "data": "x0",
    "denoiser": "x0 edm", "karras": "edm", "flow": "velocity data_velocity rectified_flow", "flowprediction": "velocity",
    "previousx": "prev_mean", "discrete": "index", "timestep": "index",
    "step": "index", "continuous": "t", "time": "t", "noiselevel": "sigma",
    # grids and schedules
    "exponential": "logsnr", "lambda": "logsnr", "timeuniform": "uniform", "timequadratic": "quadratic", "quad": "quadratic",
    "squaredcoscapv2": "cosine",
    # losses, backends and the rest
    "mse": "simple", "l2": "simple", "denoisingscorematching": "dsm", "slicedscorematching": "ssm",
    "torch": "reference", "pytorch": "reference", "cuda": "triton graph", "gpu": "triton", "cudagraph": "graph",
    "learnedrange": "learned_range", "fixedsmall": "posterior", "fixedlarge": "beta",
    # keywords
    "numinferencesteps": "steps", "nsteps": "steps", "numsteps": "steps", "timesteps": "steps",
    "maxsteps": "steps", "trainsteps": "steps", "iterations": "steps", "niters": "steps", "epochs": "steps",
    "nfe": "steps", "guidancescale": "guidance", "cfgscale": "guidance", "scheduler": "sampler",
    "solver": "sampler", "process": "sde", "schedule": "sde betas", "noiseschedule": "sde betas",
    "predictiontype": "prediction", "parameterization": "prediction", "objective": "prediction",
    "predict": "prediction", "n": "num_samples", "numimages": "num_samples", "nsamples": "num_samples",
    "batch": "batch_size", "bs": "batch_size", "generator": "seed", "randomstate": "seed", "latents": "x_init",
    "xt": "x_init", "init": "x_init", "classlabels": "cond", "labels": "cond", "y": "cond", "condition": "cond",
    "context": "cond", "clipdenoised": "clip", "clipsample": "clip", "thresholding": "clip", "eps": "t_min",
    "tmin": "t_min", "sigmas": "grid", "times": "grid", "spacing": "grid", "timestepspacing": "grid",
    "imagesize": "shape", "size": "shape", "learningrate": "lr", "emadecay": "ema", "emarate": "ema",
    "losstype": "loss", "gradientclip": "grad_clip", "maxgradnorm": "grad_clip", "outputdir": "checkpoint",
    "savedir": "checkpoint", "workdir": "checkpoint", "saveevery": "checkpoint_every", "warmupsteps": "warmup",
    "numprobes": "probes", "hutchinsontype": "probe", "returntrajectory": "trajectory", "verbose": "progress",
    "dataset": "data", "net": "model", "network": "net model", "numtimesteps": "T", "numtraintimesteps": "T",
    "trainedbetas": "betas", "betaschedule": "betas", "betastart": "beta_min", "betaend": "beta_max",
}  # fmt: skip


class FastdiffError(Exception):
    """Any error that fastdiff raises on purpose."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class ConfigError(FastdiffError, ValueError):
    """An argument, or a combination of arguments, that is not allowed."""


class MissingConditionError(ConfigError, TypeError):
    """A condition that the network's arguments need and the call does not give."""


class ShapeError(FastdiffError, ValueError):
    """A tensor of the wrong shape or layout."""


class DTypeError(FastdiffError, TypeError):
    """A tensor of the wrong dtype, or something that is no tensor."""


class DeviceError(FastdiffError, ValueError):
    """Tensors that live on different devices, or on one that holds no data."""


class DataError(FastdiffError, ValueError):
    """Data that is empty, not finite, or out of its range."""


class ModelOutputError(FastdiffError, ValueError):
    """The network returned a tensor of the wrong shape or device."""


class ModelOutputTypeError(ModelOutputError, TypeError):
    """The network returned something that is not one tensor."""


class GraphError(FastdiffError, RuntimeError):
    """A loop that cannot be captured as a CUDA graph."""


class NonFiniteError(FastdiffError, FloatingPointError):
    """A state became NaN or infinite: its `row`, time `t` and the global indices of the `samples` concerned."""

    def __init__(self, message: str, row: int, t: float, samples: tuple[int, ...]) -> None:
        super().__init__(message)
        self.row, self.t, self.samples = row, t, samples

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, int, float, tuple[int, ...]]]:
        return type(self), (str(self), self.row, self.t, self.samples)  # so that a worker process can raise it


class SolverError(FastdiffError, RuntimeError):
    """An adaptive solver cannot go on: `reason`, the index of the `sample`, its `t`, `nfe` and `last_step`."""

    def __init__(self, reason: str, sample: int, t: float, nfe: int, last_step: float) -> None:
        super().__init__(
            f"{reason} at t = {t:.6g} after {nfe} evaluations of sample {sample} (last step {last_step:.3g})"
        )
        self.reason, self.sample, self.t, self.nfe, self.last_step = reason, sample, t, nfe, last_step

    def __reduce__(self) -> tuple[type[SolverError], tuple[str, int, float, int, float]]:
        return type(self), (self.reason, self.sample, self.t, self.nfe, self.last_step)


class WriteError(FastdiffError, OSError):
    """A result that could not be written; what stood in its place is as it was."""


class CheckpointError(FastdiffError, RuntimeError):
    """A checkpoint that cannot be read or written."""


class CorruptCheckpointError(CheckpointError):
    """The file is not what `fastdiff.save` wrote."""


class CheckpointVersionError(CheckpointError):
    """The file was written by a newer format."""


class CheckpointMismatchError(CheckpointError):
    """The tensors in the file are not those of the network."""


class RankError(FastdiffError, RuntimeError):
    """A distributed training that cannot go on, because of the processes `ranks`: they failed, ended, hang, or differ."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks

    def __reduce__(self) -> tuple[type[RankError], tuple[str, tuple[int, ...]]]:
        return type(self), (str(self), self.ranks)


def reason(error: BaseException) -> str:
    """Why something failed, on one line, without the path, which the message names already."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:80] or type(error).__name__


def one_line(message: str) -> str:
    """A message on one line of printable characters; a long one without its middle, where what was given stands."""
    message = printable(message)
    return message if len(message) <= LONGEST else f"{message[:110]} … {message[-(LONGEST - 113) :]}"


def printable(text: str) -> str:
    """A text on one line: line ends, colours of terminals and what is not UTF-8 as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def short(value: object, most: int = 60) -> str:
    """A value as messages show it: its repr on one line of at most `most` characters, of an array or tensor what it is."""
    try:
        text = one_line(_Short(most).repr(value))
    except (ValueError, RecursionError):  # a number of more digits than Python writes; a list that holds itself
        text = type(value).__name__
    return text if len(text) <= most else f"{text[: most - 16]} … {text[-13:]}"


class _Short(reprlib.Repr):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = most

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, int) and x.bit_length() > 1000:
            return f"an integer of {x.bit_length()} bits"
        try:
            if len(x.shape) and not isinstance(x, type):
                return f"{type(x).__name__} of shape {list(x.shape)}, {x.dtype}"
        except (AttributeError, TypeError, RuntimeError):  # no array; a nested tensor, which has no shape
            pass
        return super().repr1(x, level)


def nearest(name: object, names: Iterable[str]) -> list[str]:
    """The names that are meant by another spelling of theirs: capitals, hyphens, another library's word, a slip of the key."""
    plain = {_plain(each): each for each in names}
    given = _plain(name)
    if given in plain:
        return [plain[given]]
    known = [each for each in SPELLINGS.get(given, "").split() if each in plain.values()]
    return known or [plain[each] for each in difflib.get_close_matches(given, plain, n=1, cutoff=0.5)]


def _plain(name: object) -> str:
    """A name without capitals, signs and what libraries put around it: "DPM++ 2M Karras", "sample_dpmpp_2m" as "dpmpp2m"."""
    text = name[:60].lower() if isinstance(name, str) else ""
    text = "".join(c for c in text.removeprefix("sample_").removeprefix("k_").replace("+", "p") if c.isalnum())
    for ending in ("sampler", "scheduler", "karras"):
        text = text.removesuffix(ending) or text
    return text


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the caller's own line: the first outside of fastdiff."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None:
        package = str(frame.f_globals.get("__name__")).split(".")[0]
        if package not in ("fastdiff", "contextlib", "importlib"):
            break
        frame, level = frame.f_back, level + (package != "importlib")  # whose frames `warnings` does not count
    warnings.warn(printable(message), category, stacklevel=level)


def names_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with a TypeError that names the nearest keyword for an unknown one."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                raise unknown_keyword(function.__qualname__.removesuffix(".__init__"), name, names)
        return function(*args, **kwargs)

    return checked


def unknown_keyword(function: str, name: str, names: list[str]) -> TypeError:
    """The error of a keyword that a function does not take, which names the nearest that it does."""
    near, all_names = nearest(name, names), ", ".join(names)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else f", only {all_names}"
    return TypeError(one_line(f"{function}() takes no keyword {short(name)}{hint}"))


def choose(argument: str, value: object, valid: Iterable[str]) -> str:
    """`value` if it is one of `valid`, else a ConfigError that lists them and names the nearest."""
    names = list(valid)
    if isinstance(value, str) and value in names:
        return value
    if isinstance(value, type):
        raise ConfigError(f"{argument} must be an object or a name, got the class itself: write {value.__name__}()")
    near = nearest(value, names)
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    shown = names
    if len(names) > 14:
        shown = difflib.get_close_matches(_plain(value), names, n=6, cutoff=0.0)
    more = "" if len(shown) == len(names) else f" or {len(names) - len(shown)} others"
    raise ConfigError(f"{argument} must be one of {', '.join(map(repr, shown))}{more}, got {short(value)}{hint}")
