"""The other libraries' samplers, each with the options that give fastdiff.sample the same levels and network calls.

Some draw noise that their scheme does not use (DDIM and Heun of some libraries, last steps): that is theirs, and counted.

Used as their documentation says; what a library lacks (a network of another meaning, a schedule of the user's own) is
written as a user of it would. They are not needed to run anything: who is missing is left out. `pip install
'fastdiff[bench]'` brings diffusers and torchsde, `pip install --no-deps -r benchmarks/peers.txt` the others, without the
packages that they import at top level and that no sampler uses (stand-ins take their place).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import math
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import CHAIN, betas
from torch import Tensor

import fastdiff
from fastdiff import grids, samplers
from fastdiff.papers import score_based as papers

Run = Callable[[], Tensor]


class Peer(NamedTuple):
    """`build(net, start, steps)` makes their run; `options(steps)` are fastdiff's for the same work.

    exact       fed the same noise, the two give the same samples; else the statistics of N(0, 1) data are compared (also where
                roundings grow: LMS's formula multiplies the network's, and diffusers' DEIS has its weights in float32)
    from_prior  they draw the start themselves, and so do not take ours
    """

    sampler: str
    opponent: str
    kind: str
    options: Callable[[int], dict[str, Any]]
    build: Callable[[Any, Tensor, int], Run]
    exact: bool = True
    from_prior: bool = False


MODULES = {
    "diffusers": "diffusers", "k-diffusion": "k_diffusion.sampling", "azula": "azula.sample", "torchsde": "torchsde",
    "denoising-diffusion-pytorch": "denoising_diffusion_pytorch.denoising_diffusion_pytorch",
}  # fmt: skip

# --- loading them ----------------------------------------------------------------------------------------------------

# imported at the top by k-diffusion and denoising-diffusion-pytorch, used by no sampler
UNUSED = (
    "accelerate", "cleanfid", "clip", "dctorch", "ema_pytorch", "jsonmerge", "kornia", "pytorch_fid", "skimage",
    "torchdiffeq", "torchvision", "wandb",
)  # fmt: skip


class _StandIn(types.ModuleType):
    """A package that has whatever name is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec: Any) -> Any:
        module = _StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        pass


@functools.cache
def load(name: str) -> Any:
    """A module of a peer."""
    finder, before = _Finder(), set(sys.modules)
    sys.meta_path.append(finder)  # after all others: what is installed is used
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for module in set(sys.modules) - before:
            if isinstance(sys.modules[module], _StandIn):
                del sys.modules[module]


@functools.cache
def score_sde() -> tuple[Any, Any, Any]:
    """Its `sampling`, `sde_lib` and `likelihood`, from the checkout that SCORE_SDE_PYTORCH names."""
    root = os.environ["SCORE_SDE_PYTORCH"]
    sys.path.insert(0, root)
    try:
        sampling, sde_lib, likelihood = map(importlib.import_module, ("sampling", "sde_lib", "likelihood"))
    finally:
        sys.path.remove(root)
    return sampling, sde_lib, likelihood


def missing(opponent: str) -> str | None:
    """Why an opponent cannot be asked here, or None."""
    if opponent == "score_sde_pytorch":
        root = os.environ.get("SCORE_SDE_PYTORCH", "")
        if not (Path(root) / "sde_lib.py").is_file() or not root:
            return "SCORE_SDE_PYTORCH does not name a checkout of score_sde_pytorch"
        return None
    module = MODULES.get(opponent)
    if module is None:
        return None
    try:
        load(module)
    except ImportError as error:
        return f"{opponent} is not installed ({error})"
    return None


@contextlib.contextmanager
def noise_from(draws: Iterator[Tensor]) -> Iterator[None]:
    """torch.randn and torch.randn_like give these instead."""
    before = torch.randn, torch.randn_like
    torch.randn = torch.randn_like = lambda *_, **__: next(draws).clone()  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randn, torch.randn_like = before


# --- by hand, and as printed -----------------------------------------------------------------------------------------


def _vp(steps: int) -> Any:
    """score_sde's points and coefficients of VP: (times, β, σ)."""
    times = torch.linspace(1, 1e-3, steps, dtype=torch.float64)
    return times.tolist(), (0.1 + 19.9 * times).tolist(), papers.vp


def in_place(net: Any, start: Tensor, steps: int) -> Run:
    """The loop that a careful user writes: numbers made beforehand, nothing allocated."""
    times, rates, level = _vp(steps)
    rows = [
        (1 + b / (2 * steps), -b / (steps * level(t).sigma), math.sqrt(b / steps) if k < steps - 1 else 0.0)
        for k, (t, b) in enumerate(zip(times, rates))
    ]

    def run() -> Tensor:
        x, z, t = start.clone(), torch.empty_like(start), torch.empty(len(start), device=start.device)
        with torch.no_grad():
            for time, (a, b, c) in zip(times, rows):
                m = net(x, t.fill_(time))
                x.mul_(a).add_(m, alpha=b)
                if c:
                    x.add_(torch.randn(start.shape, out=z), alpha=c)
        return x

    return run


def compiled(net: Any, start: Tensor, steps: int) -> Run:
    """The same, network and noise within torch.compile; the noise torch's own, as the compiler's is ten times slower."""
    times, rates, level = _vp(steps)
    columns = zip(*(
        (t, 1 + b / (2 * steps), -b / (steps * level(t).sigma), math.sqrt(b / steps) if k < steps - 1 else 0.0)
        for k, (t, b) in enumerate(zip(times, rates))
    ))  # fmt: skip
    rows = [torch.tensor(column, device=start.device) for column in columns]

    @torch.compile(options={"fallback_random": True})
    def step(x: Tensor, t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a * x + b * net(x, t.expand(len(x))) + c * torch.randn_like(x)  # type: ignore[no-any-return]

    def run() -> Tensor:
        x = start
        with torch.no_grad():
            for k in range(steps):
                x = step(x, *(column[k] for column in rows))
        return x

    return run


def _printed(net: Any, start: Tensor, kind: str) -> tuple[Callable[[Tensor, float], Tensor], Callable[[int], Tensor]]:
    """The network as the papers' functions call it, their noise."""

    def call(x: Tensor, t: float) -> Tensor:
        return net(x, torch.full((len(x),), t, device=x.device))  # type: ignore[no-any-return]

    def score(x: Tensor, t: float) -> Tensor:
        return call(x, t) * (-1 / papers.vp(t).sigma)

    ve = lambda x, t: call(x, papers.ve(t).sigma)  # noqa: E731
    index = lambda x, t: net(x, torch.full((len(x),), int(t) - 1, device=x.device))  # noqa: E731
    network = {"vp": score, "ve": ve, "edm": call, "ddpm": index}[kind]
    return network, lambda k: torch.randn_like(start)


def printed(kind: str, loop: Callable[..., list[Tensor]]) -> Callable[[Any, Tensor, int], Run]:
    """An algorithm of papers.py; `loop(network, start, steps, noise)`."""

    def build(net: Any, start: Tensor, steps: int) -> Run:
        network, noise = _printed(net, start, kind)

        def run() -> Tensor:
            with torch.no_grad():
                return loop(network, start, steps, noise)[-1]

        return run

    return build


def _score_sde_as_printed(sde: str, predictor: str, corrector: str, eps: float) -> Callable[[Any, Tensor, int], Run]:
    return printed(
        sde,
        lambda network, start, steps, noise: papers.score_sde_loop(
            sde, network, start, steps, noise, predictor, corrector, eps=eps
        ),
    )


def _ddim_times(steps: int) -> list[int]:
    """diffusers' "leading" subset of a chain, as process times (its index + 1), without the last, 0."""
    return [k * (CHAIN // steps) + 1 for k in reversed(range(steps))]


def _linspace_times(steps: int) -> list[int]:
    """diffusers' "linspace" subset of a chain, as process times, without its end."""
    return [round((CHAIN - 1) * k / steps) + 1 for k in range(steps, 0, -1)]


def _ddim_as_printed(network: Any, start: Tensor, steps: int, noise: Any) -> list[Tensor]:
    bars = torch.cumprod(1 - torch.tensor(betas(CHAIN), dtype=torch.float64), 0).tolist()
    times = _ddim_times(steps)
    return papers.ddim_sample(network, start, [*(bars[t - 1] for t in times), 1.0], times, noise)


# --- score_sde_pytorch -----------------------------------------------------------------------------------------------


class Labelled:
    """A network as score_sde_pytorch calls it, whose VP networks get t·999 for the time."""

    def __init__(self, net: Any, sde: str = "vp") -> None:
        self.net, self.sde = net, sde

    def eval(self) -> None: ...

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.net(x, labels if self.sde == "ve" else labels / 999)  # type: ignore[no-any-return]


def score_sde_flow(
    net: Any, x: Tensor, start: float, end: float, probe: Tensor | None = None, tolerance: float = 1e-8
) -> tuple[Tensor, Tensor]:
    """Its VP flow from x [B, *], float64, by SciPy's eighth-order pair: the end, and its divergence's integral [B]."""
    from scipy.integrate import solve_ivp

    _, sde_lib, likelihood = score_sde()
    sde = sde_lib.VPSDE()
    score = likelihood.mutils.get_score_fn(sde, Labelled(net), train=False, continuous=True)
    flow = sde.reverse(score, probability_flow=True)

    def rates(t: float, y: Any) -> Any:
        state, times = torch.from_numpy(y[: x.numel()]).view_as(x), x.new_full((len(x),), t)
        moved = [flow.sde(state, times)[0].flatten()]
        if probe is not None:
            moved.append(likelihood.get_div_fn(lambda state, times: flow.sde(state, times)[0])(state, times, probe))
        return torch.cat(moved).numpy()

    given = torch.cat((x.flatten(), x.new_zeros(0 if probe is None else len(x))))
    with torch.no_grad():
        found = solve_ivp(rates, (start, end), given.numpy(), "DOP853", rtol=tolerance, atol=tolerance).y[:, -1]
    return torch.from_numpy(found[: x.numel()]).view_as(x), torch.from_numpy(found[x.numel() :])


def reference(sde: str, predictor: str, corrector: str, eps: float) -> Callable[[Any, Tensor, int], Run]:
    def build(net: Any, start: Tensor, steps: int) -> Run:
        sampling, sde_lib, _ = score_sde()
        process = {"ve": sde_lib.VESDE, "vp": sde_lib.VPSDE}[sde](N=steps)
        sampler = sampling.get_pc_sampler(
            process, tuple(start.shape), sampling.get_predictor(predictor), sampling.get_corrector(corrector),
            lambda x: x, 0.16, continuous=True, eps=eps, device=start.device,
        )  # fmt: skip
        model = Labelled(net, sde)
        return lambda: sampler(model)[0]

    return build


# --- diffusers -------------------------------------------------------------------------------------------------------


def diffusers_ve(correct: bool) -> Callable[[Any, Tensor, int], Run]:
    """Its ScoreSdeVePipeline, without the conversion to pictures."""

    def build(net: Any, start: Tensor, steps: int) -> Run:
        scheduler = load("diffusers").ScoreSdeVeScheduler(
            num_train_timesteps=steps, snr=0.16, sigma_min=0.01, sigma_max=50.0
        )

        def run() -> Tensor:
            scheduler.set_timesteps(steps)
            scheduler.set_sigmas(steps)
            x = mean = start
            with torch.no_grad():
                for i, t in enumerate(scheduler.timesteps):
                    sigma = scheduler.sigmas[i] * torch.ones(len(x), device=x.device)
                    if correct:
                        x = scheduler.step_correct(net(x, sigma), x).prev_sample
                    out = scheduler.step_pred(net(x, sigma), t, x)
                    x, mean = out.prev_sample, out.prev_sample_mean
            return mean

        return run

    return build


def diffusers_vp(net: Any, start: Tensor, steps: int) -> Run:
    scheduler = load("diffusers.schedulers.deprecated.scheduling_sde_vp").ScoreSdeVpScheduler(num_train_timesteps=steps)

    def run() -> Tensor:
        scheduler.set_timesteps(steps, device=start.device)
        x = mean = start
        with torch.no_grad():
            for t in scheduler.timesteps:
                x, mean = scheduler.step_pred(net(x, t.expand(len(x))), x, t)
        return mean

    return run


def diffusers_chain(name: str, chain: int | None, **options: Any) -> Callable[[Any, Tensor, int], Run]:
    """A scheduler of diffusers on a chain (None: one of as many steps as the run)."""

    def build(net: Any, start: Tensor, steps: int) -> Run:
        length = chain or steps
        scheduler = getattr(load("diffusers"), name)(
            num_train_timesteps=length, trained_betas=betas(length), prediction_type="epsilon", **options
        )

        def run() -> Tensor:
            scheduler.set_timesteps(steps, device=start.device)
            x = start
            with torch.no_grad():
                for t in scheduler.timesteps:
                    x = scheduler.step(net(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x).prev_sample
            return x

        return run

    return build


# --- k-diffusion, denoising-diffusion-pytorch ------------------------------------------------------------------------


def k_diffusion(name: str) -> Callable[[Any, Tensor, int], Run]:
    def build(net: Any, start: Tensor, steps: int) -> Run:
        sampling = load("k_diffusion.sampling")
        return lambda: getattr(sampling, f"sample_{name}")(
            net, start, sampling.get_sigmas_karras(steps, 0.002, 80.0, device=start.device), disable=True
        )

    return build


def lucidrains(subset: bool) -> Callable[[Any, Tensor, int], Run]:
    def build(net: Any, start: Tensor, steps: int) -> Run:
        module = load("denoising_diffusion_pytorch.denoising_diffusion_pytorch")

        class Model(torch.nn.Module):
            channels = out_dim = start.shape[1]
            self_condition = False

            def forward(self, x: Tensor, t: Tensor, _: Any) -> Tensor:
                return net(x, t)  # type: ignore[no-any-return]

        module.tqdm = lambda values, **_: values  # its bar cannot be turned off
        diffusion = module.GaussianDiffusion(
            Model(), image_size=tuple(start.shape[2:]), timesteps=CHAIN if subset else steps,
            sampling_timesteps=steps, objective="pred_noise", beta_schedule="linear", auto_normalize=False,
        ).to(start.device)  # fmt: skip
        sample = diffusion.ddim_sample if subset else diffusion.p_sample_loop
        return lambda: sample(tuple(start.shape))

    return build


def _lucidrains_times(steps: int) -> list[float]:
    times = torch.linspace(-1, CHAIN - 1, steps + 1).int().tolist()
    return [t + 1 for t in reversed(times)]


# --- azula -----------------------------------------------------------------------------------------------------------


def azula(name: str, kind: str, **options: Any) -> Callable[[Any, Tensor, int], Run]:
    """A sampler of azula, with the process as its schedule and the network as its denoiser."""

    def build(net: Any, start: Tensor, steps: int) -> Run:
        sample, denoise, noise = (load(f"azula.{part}") for part in ("sample", "denoise", "noise"))

        class VP(noise.Schedule):  # type: ignore[misc, name-defined]
            def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
                log_alpha = -0.5 * (9.95 * t + 0.1) * t
                return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))

        class Denoiser(denoise.Denoiser):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.schedule = VP() if kind == "vp" else noise.VESchedule(0.01, 50.0)

            def forward(self, x: Tensor, t: Tensor) -> Any:
                alpha, sigma = self.schedule(t)
                if kind == "vp":
                    mean = (x - sigma * net(x, t.expand(len(x)))) / alpha
                else:
                    mean = x + sigma**2 * net(x, sigma.expand(len(x)))
                return denoise.DiracPosterior(mean=mean)

        stop = 1e-3 if kind == "vp" else 1e-5
        sampler = getattr(sample, name)(
            Denoiser(), start=1.0, stop=stop, steps=steps, silent=True, device=start.device, **options
        )
        return lambda: sampler(start)

    return build


# --- torchsde --------------------------------------------------------------------------------------------------------


def torchsde(net: Any, start: Tensor, steps: int) -> Run:
    """Euler-Maruyama on the reverse SDE in s = 1 − t."""
    library = load("torchsde")
    shape = start.shape

    class Reverse(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, s: Tensor, y: Tensor) -> Tensor:
            t = 1 - s
            beta = 0.1 + 19.9 * t
            sigma = torch.sqrt(-torch.expm1(-(9.95 * t + 0.1) * t))
            eps = net(y.view(shape), t.expand(len(y))).flatten(1)
            return 0.5 * beta * y - beta / sigma * eps  # type: ignore[no-any-return]

        def g(self, s: Tensor, y: Tensor) -> Tensor:
            return torch.sqrt(0.1 + 19.9 * (1 - s)).expand_as(y)

    reverse, ends = Reverse(), torch.tensor([0.0, 1 - 1e-3], device=start.device)

    def run() -> Tensor:
        with torch.no_grad():
            return library.sdeint(reverse, start.flatten(1), ends, method="euler", dt=(1 - 1e-3) / steps)[-1]  # type: ignore[no-any-return]

    return run


# --- the table -------------------------------------------------------------------------------------------------------


def _named(**fixed: Any) -> Callable[[int], dict[str, Any]]:
    return lambda steps: {"steps": steps, **fixed}


_VE = _named(sde="ve", sampler="reverse_diffusion", grid="score_sde")
_BATCH = samplers.PredictorCorrector(corrector="langevin", norm="batch")
_PC = _named(sde="ve", sampler=_BATCH, grid="score_sde")
_ALD = _named(sde="ve", sampler="pc", grid="score_sde")
_VP = _named(sde="vp", sampler="euler_maruyama", grid="score_sde")
_UNIFORM = _named(sde="vp", sampler="euler_maruyama", denoise=False)
_HEUN = _named(sde="edm", sampler="heun")


def _chain(**fixed: Any) -> Callable[[int], dict[str, Any]]:
    return lambda steps: {"sde": fastdiff.DDPM(betas(steps)), "steps": steps, "sampler": "ancestral", **fixed}


def _subset(times: Callable[[int], list[Any]], **fixed: Any) -> Callable[[int], dict[str, Any]]:
    return lambda steps: {"sde": fastdiff.DDPM(betas(CHAIN)), "sampler": "ddim", "grid": times(steps), **fixed}


def _ve_heun(steps: int) -> dict[str, Any]:
    """azula's levels: uniform in t from 1 to 1e-5."""
    times = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64).tolist()
    return {"sde": "ve", "sampler": "heun", "grid": grids.sigmas([papers.ve(t).sigma for t in times])}


PRINTED = "as printed (papers.py)"
PEERS = [
    Peer("VE reverse diffusion", PRINTED, "ve", _VE, _score_sde_as_printed("ve", "reverse_diffusion", "none", 1e-5)),
    Peer("VE reverse diffusion", "diffusers", "ve", _VE, diffusers_ve(False)),
    Peer("VE reverse diffusion", "score_sde_pytorch", "ve", _VE,
         reference("ve", "reverse_diffusion", "none", 1e-5), from_prior=True),
    Peer("VE predictor-corrector", PRINTED, "ve", _PC, _score_sde_as_printed("ve", "reverse_diffusion", "langevin", 1e-5)),
    Peer("VE predictor-corrector", "diffusers", "ve", _PC, diffusers_ve(True)),
    Peer("VE predictor-corrector", "score_sde_pytorch", "ve", _PC,
         reference("ve", "reverse_diffusion", "langevin", 1e-5), from_prior=True),
    Peer("VE predictor-corrector, ald", "score_sde_pytorch", "ve", _ALD,
         reference("ve", "reverse_diffusion", "ald", 1e-5), from_prior=True),
    Peer("VE predictor-corrector, azula's", "azula", "ve", _ALD, azula("PCSampler", "ve"), exact=False),
    Peer("VP Euler-Maruyama", "in place, by hand", "vp", _VP, in_place),
    Peer("VP Euler-Maruyama", "torch.compile", "vp", _VP, compiled, exact=False),
    Peer("VP Euler-Maruyama", PRINTED, "vp", _VP, _score_sde_as_printed("vp", "euler_maruyama", "none", 1e-3)),
    Peer("VP Euler-Maruyama", "diffusers", "vp", _VP, diffusers_vp),
    Peer("VP Euler-Maruyama", "score_sde_pytorch", "vp", _VP,
         reference("vp", "euler_maruyama", "none", 1e-3), from_prior=True),
    Peer("VP Euler-Maruyama", "torchsde", "vp", _UNIFORM, torchsde, exact=False),
    Peer("DDPM", PRINTED, "ddpm", _chain(),
         printed("ddpm", lambda net, start, steps, noise: papers.ddpm_sample(net, start, betas(steps), noise))),
    Peer("DDPM", "diffusers", "ddpm", _chain(), diffusers_chain("DDPMScheduler", None, clip_sample=False)),
    Peer("DDPM", "denoising-diffusion-pytorch", "ddpm", _chain(clip=(-1, 1)), lucidrains(False), from_prior=True),
    Peer("VP ancestral", "azula", "vp", _named(sde="vp", sampler="ancestral", denoise=False), azula("DDPMSampler", "vp")),
    Peer("DDIM", PRINTED, "ddpm", _subset(lambda n: [*_ddim_times(n), 0]), printed("ddpm", _ddim_as_printed)),
    Peer("DDIM", "diffusers", "ddpm", _subset(lambda n: [*_ddim_times(n), 0]),
         diffusers_chain("DDIMScheduler", CHAIN, clip_sample=False)),
    Peer("DDIM", "denoising-diffusion-pytorch", "ddpm", _subset(_lucidrains_times, clip=(-1, 1)), lucidrains(True),
         from_prior=True),
    Peer("DDIM", "azula", "vp", _named(sde="vp", sampler="ddim"), azula("DDIMSampler", "vp")),
    Peer("Heun", PRINTED, "edm", _HEUN,
         printed("edm", lambda net, start, steps, noise: papers.edm_deterministic(net, start, papers.karras_sigmas(steps)))),
    Peer("Heun", "k-diffusion", "edm", _HEUN, k_diffusion("heun")),
    Peer("Heun", "azula", "ve", _ve_heun, azula("HeunSampler", "ve")),
    Peer("DPM-2", "k-diffusion", "edm", _named(sde="edm", sampler="dpm_2"), k_diffusion("dpm_2")),
    Peer("LMS", "k-diffusion", "edm", _named(sde="edm", sampler="lms"), k_diffusion("lms"), exact=False),
    Peer("DPM-Solver++(2M)", "k-diffusion", "edm",
         _named(sde="edm", sampler=samplers.DPMSolverPP(lower_order_final=False)), k_diffusion("dpmpp_2m")),
    Peer("DPM-Solver++(2M)", "diffusers", "ddpm", _subset(lambda n: [*_linspace_times(n), 0], sampler="dpmpp_2m"),
         diffusers_chain("DPMSolverMultistepScheduler", CHAIN)),
    Peer("UniPC", "diffusers", "ddpm", _subset(lambda n: [*_linspace_times(n), 0], sampler="unipc"),
         diffusers_chain("UniPCMultistepScheduler", CHAIN)),
    Peer("DEIS", "diffusers", "ddpm", _subset(lambda n: [*_linspace_times(n), 1], sampler=samplers.DEIS(2, "lambda")),
         diffusers_chain("DEISMultistepScheduler", CHAIN), exact=False),
]  # fmt: skip
