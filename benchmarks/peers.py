"""The other libraries' samplers, each with the options that give fastdiff.sample the same levels and network calls.

Some draw noise that their scheme does not use (DDIM and Heun of some libraries, last steps): that is theirs, and counted.

Used as their documentation says; what a library lacks (a network of another meaning, a schedule of the user's own) is
written as a user of it would. Who is missing is left out. `pip install 'fastdiff[bench]'` brings diffusers and torchsde, `pip
install --no-deps -r benchmarks/peers.txt` the others, without the packages that they import and that no sampler uses.
"""

import functools
import importlib
import importlib.util
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from cases import CHAIN, betas
from torch import Tensor

import fastdiff
from fastdiff import grids, samplers
from fastdiff.papers import score_based as papers

Run = Callable[[], Tensor]
Options = Callable[[int], dict[str, Any]]
Build = Callable[[Any, Tensor, int], Run]


class Peer(NamedTuple):
    """`build(net, start, steps)` makes their run; `options(steps)` are fastdiff's for the same work.

    exact       fed the same noise, the two give the same samples; else the statistics of N(0, 1) data are compared (also where
                roundings grow: LMS's formula multiplies the network's, and diffusers' DEIS has its weights in float32)
    from_prior  they draw the start themselves, and so do not take ours
    roundings   what the coefficients that they make in float32 add to a step's state, in units of 2^-24. diffusers' DDPM has
                ᾱ as a running product and α as ᾱ_t/ᾱ_(t-1), off by three roundings (1 − β, product, quotient), and divides the
                state by √α: 3/2. (What m = σx takes off again, (1 − β)/√α = √α, is off by as much; smaller networks and noise,
                whose signs vary, are within the tolerance.) In float64 nothing remains of it: tests/test_benchmarks.py
    """

    sampler: str
    opponent: str
    kind: str
    options: Options
    build: Build
    exact: bool = True
    from_prior: bool = False
    roundings: float = 0.0


SCORE_SDE, SCORE_SDE_MODULES = "score_sde_pytorch", ("sampling", "sde_lib", "likelihood", "losses", "models.ema")
EDM2, EDM2_NETWORKS = "edm2", "training.networks_edm2"
# module -> the variable that names a checkout of its repository
CHECKOUTS = {**dict.fromkeys(SCORE_SDE_MODULES, "SCORE_SDE_PYTORCH"), EDM2_NETWORKS: "EDM2"}
MODULES = {
    "diffusers": "diffusers", "k-diffusion": "k_diffusion.sampling", "azula": "azula.sample",
    "torchsde": "torchsde", "deepinv": "deepinv.sampling",
    "denoising-diffusion-pytorch": "denoising_diffusion_pytorch.denoising_diffusion_pytorch", SCORE_SDE: "sampling",
    "accelerate": "accelerate", "ema_pytorch": "ema_pytorch", EDM2: EDM2_NETWORKS,
}  # fmt: skip


@functools.cache
def load(name: str) -> Any:
    """A module of a peer. Two of them import at their top much that no sampler uses: what is not installed has stand-ins."""
    path, absent = sys.path, []
    sys.path = [os.environ.get(CHECKOUTS[name], "/nowhere"), *path] if name in CHECKOUTS else path
    try:
        while True:
            try:
                with warnings.catch_warnings(action="ignore"):
                    return importlib.import_module(name)
            except ModuleNotFoundError as error:
                known = name.startswith(("k_diffusion", "denoising", "deepinv")) and error.name not in (
                    *absent,
                    name.split(".")[0],
                )
                if not known:
                    raise
                absent.append(error.name)
                sys.modules[error.name] = mock.MagicMock()
    finally:
        sys.path = path
        for module in absent:
            del sys.modules[module]


def score_sde() -> list[Any]:
    """Its `sampling`, `sde_lib` and `likelihood`, from the checkout that SCORE_SDE_PYTORCH names."""
    return [load(name) for name in SCORE_SDE_MODULES[:3]]


def missing(opponent: str) -> str | None:
    """Why an opponent cannot be measured here, or None."""
    try:
        load(module := MODULES.get(opponent, "torch"))
    except ImportError as error:
        where = f"{CHECKOUTS[module]} names no checkout of it" if module in CHECKOUTS else "it is not installed"
        return f"{opponent}: {where} ({error})"
    return None


def _vp_rows(steps: int) -> list[tuple[float, float, float, float]]:
    """VP Euler-Maruyama on score_sde's points: (t, a, b, c) of x <- a*x + b*eps + c*z."""
    times = torch.linspace(1, 1e-3, steps, dtype=torch.float64)
    return [
        (t, 1 + b / (2 * steps), -b / (steps * papers.vp(t).sigma), math.sqrt(b / steps) if k < steps - 1 else 0.0)
        for k, (t, b) in enumerate(zip(times.tolist(), (0.1 + 19.9 * times).tolist()))
    ]


def _loop(start: Tensor, rows: Iterable[tuple[Any, ...]], step: Callable[..., Tensor]) -> Run:
    @torch.no_grad()
    def run() -> Tensor:
        x = start.clone()
        for row in rows:
            x = step(x, *row)
        return x

    return run


def eager(net: Any, start: Tensor, steps: int, before: Callable[[], None] = lambda: None) -> Run:
    """A scheduler's loop in plain PyTorch: each step's numbers are Python's, its tensors are new."""

    def step(x: Tensor, t: float, a: float, b: float, c: float) -> Tensor:
        before()
        m = net(x, torch.full((len(x),), t, device=x.device))
        return a * x + b * m + (c * torch.randn_like(x) if c else 0.0)

    return _loop(start, _vp_rows(steps), step)


def in_place(net: Any, start: Tensor, steps: int) -> Run:
    """The loop that a careful user writes: numbers made beforehand, nothing allocated."""
    z, times = torch.empty_like(start), torch.empty(len(start), device=start.device)

    def step(x: Tensor, t: float, a: float, b: float, c: float) -> Tensor:
        m = net(x, times.fill_(t))
        x.mul_(a).add_(m, alpha=b)
        return x.add_(torch.randn(x.shape, out=z), alpha=c) if c else x

    return _loop(start, _vp_rows(steps), step)


def compiled(net: Any, start: Tensor, steps: int) -> Run:
    """The same, network and noise within torch.compile; the noise torch's own, as the compiler's is ten times slower."""

    @torch.compile(options={"fallback_random": True})
    def step(x: Tensor, t: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a * x + b * net(x, t.expand(len(x))) + c * torch.randn_like(x)

    return _loop(start, [row.unbind() for row in torch.tensor(_vp_rows(steps), device=start.device)], step)


def printed(kind: str, loop: Callable[..., list[Tensor]]) -> Build:
    """An algorithm of fastdiff.papers; `loop(network, start, steps, noise)`."""

    def build(net: Any, start: Tensor, steps: int) -> Run:
        def call(x: Tensor, t: float) -> Tensor:
            return net(x, torch.full((len(x),), t, device=x.device))

        network = {
            "vp": lambda x, t: call(x, t) * (-1 / papers.vp(t).sigma), "ve": lambda x, t: call(x, papers.ve(t).sigma),
            "edm": call, "ddpm": lambda x, t: call(x, int(t) - 1),
        }[kind]  # fmt: skip
        return torch.no_grad()(lambda: loop(network, start, steps, lambda k: torch.randn_like(start))[-1])

    return build


# subsets of a chain as process times (the index + 1), without the last: diffusers' "leading" and "linspace", lucidrains'
def _leading(steps: int) -> list[int]:
    return [k * (CHAIN // steps) + 1 for k in reversed(range(steps))]


def _linspace(steps: int) -> list[int]:
    return [round((CHAIN - 1) * k / steps) + 1 for k in range(steps, 0, -1)]


def _lucidrains(steps: int) -> list[int]:
    return [t + 1 for t in reversed(torch.linspace(-1, CHAIN - 1, steps + 1).int().tolist()[1:])]


def _ddim_as_printed(network: Any, start: Tensor, steps: int, noise: Any) -> list[Tensor]:
    bars = torch.cumprod(1 - torch.tensor(betas(CHAIN), dtype=torch.float64), 0).tolist()
    times = _leading(steps)
    return papers.ddim_sample(network, start, [*(bars[t - 1] for t in times), 1.0], times, noise)


class Labelled:
    """A network as score_sde_pytorch calls it, whose VP networks get t·999 for the time."""

    def __init__(self, net: Any, sde: str = "vp") -> None:
        self.net, self.sde = net, sde

    def eval(self) -> None: ...

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.net(x, labels if self.sde == "ve" else labels / 999)


@torch.no_grad()
def score_sde_flow(net: Any, x: Tensor, start: float, end: float, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Its VP flow from x [B, *], float64, by SciPy's eighth-order pair: the end, and its divergence's integral [B]."""
    from scipy.integrate import solve_ivp

    _, sde_lib, likelihood = score_sde()
    sde, n = sde_lib.VPSDE(), x.numel()
    score = likelihood.mutils.get_score_fn(sde, Labelled(net), train=False, continuous=True)
    flow = sde.reverse(score, probability_flow=True)
    drift = lambda state, times: flow.sde(state, times)[0]  # noqa: E731

    def rates(t: float, y: Any) -> Any:
        given = torch.from_numpy(y[:n]).view_as(x), x.new_full((len(x),), t)
        return torch.cat((drift(*given).flatten(), likelihood.get_div_fn(drift)(*given, probe))).numpy()

    given = torch.cat((x.flatten(), x.new_zeros(len(x)))).numpy()
    found = torch.from_numpy(solve_ivp(rates, (start, end), given, "DOP853", rtol=1e-8, atol=1e-8).y[:, -1])
    return found[:n].view_as(x), found[n:]


def _as_printed(sde: str, predictor: str, corrector: str, eps: float) -> Build:
    """The loop of fastdiff.papers that has the same rows as score_sde_pytorch's predictor-corrector sampler."""
    loop = partial(papers.score_sde_loop, sde)
    return printed(sde, lambda *given: loop(*given, predictor, corrector, eps=eps))


def _score_sde(sde: str, predictor: str, corrector: str, eps: float) -> Build:
    def build(net: Any, start: Tensor, steps: int) -> Run:
        sampling, sde_lib, _ = score_sde()
        sampler = sampling.get_pc_sampler(
            {"ve": sde_lib.VESDE, "vp": sde_lib.VPSDE}[sde](N=steps), tuple(start.shape),
            sampling.get_predictor(predictor), sampling.get_corrector(corrector),
            lambda x: x, 0.16, continuous=True, eps=eps, device=start.device,
        )  # fmt: skip
        return lambda: sampler(Labelled(net, sde))[0]

    return build


def _scheduled(
    scheduler: Any, start: Tensor, steps: int, step: Callable[[int, Tensor, Tensor], Any], **given: Any
) -> Run:
    """A pipeline's loop without the conversion to pictures; `step(i, t, x)` gives a scheduler's answer."""

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(steps, **given)
        if hasattr(scheduler, "set_sigmas"):
            scheduler.set_sigmas(steps)
        out = (start,)
        for i, t in enumerate(scheduler.timesteps):
            out = step(i, t, out[0])
        return out[-1]

    return run


def diffusers_ve(net: Any, start: Tensor, steps: int, correct: bool) -> Run:
    scheduler = load("diffusers").ScoreSdeVeScheduler(steps, snr=0.16, sigma_min=0.01, sigma_max=50.0)

    def step(i: int, t: Tensor, x: Tensor) -> Any:
        sigma = scheduler.sigmas[i] * torch.ones(len(x), device=x.device)
        if correct:
            x = scheduler.step_correct(net(x, sigma), x).prev_sample
        out = scheduler.step_pred(net(x, sigma), t, x)
        return out.prev_sample, out.prev_sample_mean

    return _scheduled(scheduler, start, steps, step)


def diffusers_vp(net: Any, start: Tensor, steps: int) -> Run:
    scheduler = load("diffusers.schedulers.deprecated.scheduling_sde_vp").ScoreSdeVpScheduler(steps)
    step = lambda i, t, x: scheduler.step_pred(net(x, t.expand(len(x))), x, t)  # noqa: E731
    return _scheduled(scheduler, start, steps, step, device=start.device)


def diffusers_chain(net: Any, start: Tensor, steps: int, name: str, chain: int = CHAIN, **options: Any) -> Run:
    """A scheduler of diffusers on a chain (0: one of as many steps as the run)."""
    length, given = chain or steps, {"prediction_type": "epsilon", **options}
    scheduler = getattr(load("diffusers"), name)(length, trained_betas=betas(length), **given)

    def step(i: int, t: Tensor, x: Tensor) -> Any:
        return (scheduler.step(net(scheduler.scale_model_input(x, t), t.expand(len(x))), t, x).prev_sample,)

    return _scheduled(scheduler, start, steps, step, device=start.device)


def k_diffusion(net: Any, start: Tensor, steps: int, name: str) -> Run:
    sampling = load("k_diffusion.sampling")
    return lambda: getattr(sampling, f"sample_{name}")(
        net, start, sampling.get_sigmas_karras(steps, 0.002, 80.0, device=start.device), disable=True
    )


def lucidrains(net: Any, start: Tensor, steps: int, subset: bool) -> Run:
    module = load("denoising_diffusion_pytorch.denoising_diffusion_pytorch")

    class Model(torch.nn.Module):
        channels = out_dim = start.shape[1]
        self_condition = False

        def forward(self, x: Tensor, t: Tensor, _: Any) -> Tensor:
            return net(x, t)

    module.tqdm = lambda values, **_: values  # its bar cannot be turned off
    diffusion = module.GaussianDiffusion(
        Model(), image_size=tuple(start.shape[2:]), timesteps=CHAIN if subset else steps,
        sampling_timesteps=steps, objective="pred_noise", beta_schedule="linear", auto_normalize=False,
    ).to(start.device)  # fmt: skip
    sample = diffusion.ddim_sample if subset else diffusion.p_sample_loop
    return lambda: sample(tuple(start.shape))


def azula(net: Any, start: Tensor, steps: int, name: str, kind: str) -> Run:
    """A sampler of azula, with the process as its schedule and the network as its denoiser."""
    sample, denoise, noise = (load(f"azula.{part}") for part in ("sample", "denoise", "noise"))

    class VP(noise.Schedule):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            log_alpha = -0.5 * (9.95 * t + 0.1) * t
            return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))

    class Denoiser(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = VP() if kind == "vp" else noise.VESchedule(0.01, 50.0)

        def forward(self, x: Tensor, t: Tensor) -> Any:
            alpha, sigma = self.schedule(t)
            m = net(x, (t if kind == "vp" else sigma).expand(len(x)))
            return denoise.DiracPosterior(mean=(x - sigma * m) / alpha if kind == "vp" else x + sigma**2 * m)

    stop = 1e-3 if kind == "vp" else 1e-5
    sampler = getattr(sample, name)(Denoiser(), start=1.0, stop=stop, steps=steps, silent=True, device=start.device)
    return lambda: sampler(start)


def torchsde(net: Any, start: Tensor, steps: int) -> Run:
    """Euler-Maruyama on the reverse SDE in s = 1 − t."""
    library = load("torchsde")

    class Reverse(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, s: Tensor, y: Tensor) -> Tensor:
            t = 1 - s
            beta, sigma = 0.1 + 19.9 * t, torch.sqrt(-torch.expm1(-(9.95 * t + 0.1) * t))
            return 0.5 * beta * y - beta / sigma * net(y.view(start.shape), t.expand(len(y))).flatten(1)

        def g(self, s: Tensor, y: Tensor) -> Tensor:
            return torch.sqrt(0.1 + 19.9 * (1 - s)).expand_as(y)

    reverse, ends = Reverse(), torch.tensor([0.0, 1 - 1e-3], device=start.device)
    given = {"method": "euler", "dt": (1 - 1e-3) / steps}
    return torch.no_grad()(lambda: library.sdeint(reverse, start.flatten(1), ends, **given)[-1])


def _of(sde: str, sampler: Any, **fixed: Any) -> Options:
    return lambda steps: {"sde": sde, "steps": steps, "sampler": sampler, **fixed}


def _chain(**fixed: Any) -> Options:
    return lambda steps: {"sde": fastdiff.DDPM(betas(steps)), "steps": steps, "sampler": "ancestral", **fixed}


def _subset(times: Callable[[int], list[int]], end: int = 0, **fixed: Any) -> Options:
    chain = fastdiff.DDPM(betas(CHAIN))
    last = end - 1 if end else None
    return lambda steps: {
        "sde": chain, "sampler": "ddim", "grid": grids.indices([t - 1 for t in times(steps)], last), **fixed
    }  # fmt: skip


def _ve_heun(steps: int) -> dict[str, Any]:
    """azula's levels: uniform in t from 1 to 1e-5."""
    times = torch.linspace(1, 1e-5, steps + 1, dtype=torch.float64).tolist()
    return {"sde": "ve", "sampler": "heun", "grid": grids.sigmas([papers.ve(t).sigma for t in times])}


_VE = _of("ve", "reverse_diffusion", grid="score_sde")
_PC = _of("ve", samplers.PredictorCorrector(corrector="langevin", norm="batch"), grid="score_sde")
_ALD = _of("ve", "pc", grid="score_sde")
_VP = _of("vp", "euler_maruyama", grid="score_sde")
_HEUN = _of("edm", "heun", grid="karras")
_PP2M = samplers.DPMSolverPP(lower_order_final=False)
PRINTED = "as printed (papers.py)"
PEERS = [
    Peer("VE reverse diffusion", PRINTED, "ve", _VE, _as_printed("ve", "reverse_diffusion", "none", 1e-5)),
    Peer("VE reverse diffusion", "diffusers", "ve", _VE, partial(diffusers_ve, correct=False)),
    Peer("VE reverse diffusion", SCORE_SDE, "ve", _VE, _score_sde("ve", "reverse_diffusion", "none", 1e-5), from_prior=True),
    Peer("VE predictor-corrector", PRINTED, "ve", _PC, _as_printed("ve", "reverse_diffusion", "langevin", 1e-5)),
    Peer("VE predictor-corrector", "diffusers", "ve", _PC, partial(diffusers_ve, correct=True)),
    Peer("VE predictor-corrector", SCORE_SDE, "ve", _PC,
         _score_sde("ve", "reverse_diffusion", "langevin", 1e-5), from_prior=True),
    Peer("VE predictor-corrector, ald", SCORE_SDE, "ve", _ALD,
         _score_sde("ve", "reverse_diffusion", "ald", 1e-5), from_prior=True),
    Peer("VE predictor-corrector, azula's", "azula", "ve", _ALD, partial(azula, name="PCSampler", kind="ve"), exact=False),
    Peer("VP Euler-Maruyama", "in place, by hand", "vp", _VP, in_place),
    Peer("VP Euler-Maruyama", "torch.compile", "vp", _VP, compiled, exact=False),
    Peer("VP Euler-Maruyama", PRINTED, "vp", _VP, _as_printed("vp", "euler_maruyama", "none", 1e-3)),
    Peer("VP Euler-Maruyama", "diffusers", "vp", _VP, diffusers_vp),
    Peer("VP Euler-Maruyama", SCORE_SDE, "vp", _VP, _score_sde("vp", "euler_maruyama", "none", 1e-3), from_prior=True),
    Peer("VP Euler-Maruyama", "torchsde", "vp", _of("vp", "euler_maruyama", denoise=False), torchsde, exact=False),
    Peer("DDPM", PRINTED, "ddpm", _chain(),
         printed("ddpm", lambda net, start, steps, noise: papers.ddpm_sample(net, start, betas(steps), noise))),
    Peer("DDPM", "diffusers", "ddpm", _chain(),
         partial(diffusers_chain, name="DDPMScheduler", chain=0, clip_sample=False), roundings=1.5),
    Peer("DDPM", "denoising-diffusion-pytorch", "ddpm", _chain(clip=(-1, 1)), partial(lucidrains, subset=False), from_prior=True),
    Peer("VP ancestral", "azula", "vp", _of("vp", "ancestral", denoise=False), partial(azula, name="DDPMSampler", kind="vp")),
    Peer("DDIM", PRINTED, "ddpm", _subset(_leading), printed("ddpm", _ddim_as_printed)),
    Peer("DDIM", "diffusers", "ddpm", _subset(_leading), partial(diffusers_chain, name="DDIMScheduler", clip_sample=False)),
    Peer("DDIM", "denoising-diffusion-pytorch", "ddpm", _subset(_lucidrains, clip=(-1, 1)),
         partial(lucidrains, subset=True), from_prior=True),
    Peer("DDIM", "azula", "vp", _of("vp", "ddim", grid="uniform"), partial(azula, name="DDIMSampler", kind="vp")),
    Peer("Heun", PRINTED, "edm", _HEUN,
         printed("edm", lambda net, start, steps, noise: papers.edm_deterministic(net, start, papers.karras_sigmas(steps)))),
    Peer("Heun", "k-diffusion", "edm", _HEUN, partial(k_diffusion, name="heun")),
    Peer("Heun", "azula", "ve", _ve_heun, partial(azula, name="HeunSampler", kind="ve")),
    Peer("DPM-2", "k-diffusion", "edm", _of("edm", "dpm_2", grid="karras"), partial(k_diffusion, name="dpm_2")),
    Peer("LMS", "k-diffusion", "edm", _of("edm", "lms", grid="karras"), partial(k_diffusion, name="lms"), exact=False),
    Peer("DPM-Solver++(2M)", "k-diffusion", "edm", _of("edm", _PP2M, grid="karras"), partial(k_diffusion, name="dpmpp_2m")),
    Peer("DPM-Solver++(2M)", "diffusers", "ddpm", _subset(_linspace, sampler="dpmpp_2m"),
         partial(diffusers_chain, name="DPMSolverMultistepScheduler")),
    Peer("UniPC", "diffusers", "ddpm", _subset(_linspace, sampler="unipc"),
         partial(diffusers_chain, name="UniPCMultistepScheduler")),
    Peer("DEIS", "diffusers", "ddpm", _subset(_linspace, end=1, sampler=samplers.DEIS(2, "lambda")),
         partial(diffusers_chain, name="DEISMultistepScheduler"), exact=False),
]  # fmt: skip
