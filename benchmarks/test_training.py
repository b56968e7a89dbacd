"""A step of training against the other libraries' steps: the same network, batch, clipping and averaging, in turns.

Their batches lie ready in memory, while ours are drawn, shuffled and scaled within the time. A step is measured whole, and
outside of the network: without its forward and backward passes, by clocks around both. Set-up and first steps are left out.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import Clock, clock
from peers import SCORE_SDE, load, missing
from recorder import turns
from torch import Tensor, nn

import fastdiff
from fastdiff.networks import MLP, UNet

pytestmark = pytest.mark.usefixtures("kept_memory")

WARM = 3  # steps before the first that counts
MOMENTS, CLIP, EMA, LR = (0.9, 0.999), 1.0, 0.999, 2e-4


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    steps: int  # of one measurement
    seconds: float


CASES = {
    "U-Net 1.0M 16x1x28x28": Case(
        partial(UNet, (1, 28, 28), channels=32, multipliers=(1, 2, 2), blocks=2, attention=(1,)),
        (1, 28, 28),
        16,
        4,
        40.0,
    ),
    "MLP 4096x2": Case(partial(MLP, (2, 1, 1), hidden=128, layers=3), (2, 1, 1), 4096, 20, 8.0),
}


class Passes:
    """A network with the seconds of its forward and backward passes."""

    def __init__(self, net: nn.Module) -> None:
        self.forward, self.backward = Clock(net), 0.0
        self.net = self.forward.net

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward

    def clocked(self) -> Any:
        """A context in which backward passes are this network's."""
        run = torch.autograd.backward

        def timed(*args: Any, **kwargs: Any) -> None:
            began = clock()
            run(*args, **kwargs)
            self.backward += clock() - began

        return mock.patch.object(torch.autograd, "backward", timed)


Step = Callable[[Tensor], object]


def by_hand(net: nn.Module) -> Step:
    """A training loop in plain PyTorch: torch's Adam and clipping, the average by foreach."""
    adam = torch.optim.Adam(net.parameters(), lr=LR, betas=MOMENTS)
    averages = [p.detach().clone() for p in net.parameters()]

    def step(x: Tensor) -> None:
        t = torch.rand(len(x)) * (1 - 1e-5) + 1e-5
        log_alpha = (-0.5 * (9.95 * t + 0.1) * t).view(-1, *[1] * (x.ndim - 1))
        noise = torch.randn_like(x)
        loss = F.mse_loss(net(log_alpha.exp() * x + torch.sqrt(-torch.expm1(2 * log_alpha)) * noise, t), noise)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        adam.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, [p.detach() for p in net.parameters()], 1 - EMA)

    return step


def diffusers(net: nn.Module) -> Step:
    """Its examples/unconditional_image_generation, without accelerate."""
    library = load("diffusers")
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    scheduler = library.DDPMScheduler(1000)
    adam = torch.optim.AdamW(net.parameters(), lr=LR, betas=MOMENTS, weight_decay=1e-6, eps=1e-8)
    rate = get_cosine_schedule_with_warmup(adam, 500, 100_000)
    average = EMAModel(net.parameters(), decay=EMA, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def step(clean: Tensor) -> None:
        noise = torch.randn(clean.shape)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),)).long()
        loss = F.mse_loss(net(scheduler.add_noise(clean, noise, timesteps), timesteps).float(), noise.float())
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        adam.step()
        rate.step()
        adam.zero_grad()
        average.step(net.parameters())
        loss.detach().item()

    return step


def lucidrains(net: nn.Module) -> Step:
    """The body of its Trainer.train, whose average moves each tenth step."""
    module, accelerate = load("denoising_diffusion_pytorch.denoising_diffusion_pytorch"), load("accelerate")
    average = load("ema_pytorch")

    class Model(nn.Module):
        channels = out_dim = 1
        self_condition = False

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor, _: Any = None) -> Tensor:
            return self.net(x, t)  # type: ignore[no-any-return]

    model, accelerator = Model(), accelerate.Accelerator(cpu=True)

    def trained(size: tuple[int, ...]) -> Any:
        model.channels = model.out_dim = size[0]
        return module.GaussianDiffusion(model, image_size=size[1:], timesteps=1000, objective="pred_noise")

    made: dict[str, Any] = {}

    def step(x: Tensor) -> None:
        if not made:
            diffusion = trained(tuple(x.shape[1:]))
            opt = torch.optim.Adam(diffusion.parameters(), lr=LR, betas=(0.9, 0.99))
            made["ema"] = average.EMA(diffusion, beta=0.995, update_every=10)
            made["model"], made["opt"] = accelerator.prepare(diffusion, opt)
        diffusion, opt = made["model"], made["opt"]
        diffusion.train()
        with accelerator.autocast():
            loss = diffusion(x)
            loss.item()
        accelerator.backward(loss)
        accelerator.wait_for_everyone()
        accelerator.clip_grad_norm_(diffusion.parameters(), CLIP)
        opt.step()
        opt.zero_grad()
        accelerator.wait_for_everyone()
        made["ema"].update()

    return step


def score_sde(net: nn.Module) -> Step:
    """Its losses.get_step_fn, with its optimiser and average."""
    losses, sde_lib, ema = (load(name) for name in ("losses", "sde_lib", "models.ema"))
    options = {
        "optimizer": "Adam",
        "lr": LR,
        "beta1": 0.9,
        "eps": 1e-8,
        "weight_decay": 0,
        "warmup": 5000,
        "grad_clip": CLIP,
    }
    config = SimpleNamespace(optim=SimpleNamespace(**options))
    state = {
        "optimizer": losses.get_optimizer(config, net.parameters()), "model": net, "step": 0,
        "ema": ema.ExponentialMovingAverage(net.parameters(), decay=EMA),
    }  # fmt: skip
    run = losses.get_step_fn(sde_lib.VPSDE(), True, losses.optimization_manager(config), reduce_mean=True)
    return lambda x: run(state, x)


def k_diffusion(net: nn.Module) -> Step:
    """The body of its train.py, which does not clip."""
    layers, utils = load("k_diffusion.layers"), load("k_diffusion.utils")
    model = layers.Denoiser(net, sigma_data=0.5)
    averaged = copy.deepcopy(model)
    adam = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    rate = torch.optim.lr_scheduler.LambdaLR(adam, lambda _: 1.0)  # its own does not run with torch's of today
    warmup = utils.EMAWarmup(power=0.6667, max_value=EMA)
    density = partial(utils.rand_log_normal, loc=-1.2, scale=1.2)

    def step(x: Tensor) -> None:
        noise = torch.randn_like(x)
        model.loss(x, noise, density([len(x)])).mean().backward()
        adam.step()
        rate.step()
        adam.zero_grad()
        with torch.no_grad():
            utils.ema_update(model, averaged, warmup.get_value())
        warmup.step()

    return step


PEERS: dict[str, tuple[Callable[[nn.Module], Step], tuple[str, ...]]] = {
    "by hand": (by_hand, ()),
    "diffusers": (diffusers, ("diffusers",)),
    "denoising-diffusion-pytorch": (lucidrains, ("denoising-diffusion-pytorch", "accelerate", "ema_pytorch")),
    SCORE_SDE: (score_sde, (SCORE_SDE,)),
    "k-diffusion, without clipping": (k_diffusion, ("k-diffusion",)),
}


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make()


def theirs(case: Case, build: Callable[[nn.Module], Step]) -> Callable[[], tuple[float, float]]:
    """(seconds of a step, those outside of the passes) of one measurement."""
    passes = Passes(made(case).train())
    step, batches = build(passes.net), endless(case)

    def measure() -> tuple[float, float]:
        with passes.clocked():
            for _ in range(WARM):
                step(next(batches))
            began, before = clock(), passes.seconds
            for _ in range(case.steps):
                step(next(batches))
            whole = clock() - began
        return whole / case.steps, (whole - (passes.seconds - before)) / case.steps

    return measure


def endless(case: Case) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    ready = [torch.rand((case.batch, *case.shape), generator=generator) for _ in range(8)]
    while True:
        yield from ready


def ours(case: Case, **options: Any) -> Callable[[], tuple[float, float]]:
    passes = Passes(made(case))
    model = fastdiff.ScoreModel(passes.net, "vp", data_shape=case.shape, data_range=(0, 1))
    data = fastdiff.Data(torch.rand((8 * case.batch, *case.shape)), range=(0, 1))

    def measure() -> tuple[float, float]:
        marks = []
        with passes.clocked():
            fastdiff.train(
                model, data, steps=WARM + case.steps, batch_size=case.batch, lr=LR, grad_clip=CLIP, ema=EMA, progress=False,
                stop=lambda: marks.append((clock(), passes.seconds)), **options,
            )  # fmt: skip
        (began, before), (ended, after) = marks[WARM - 1], marks[-1]
        whole = ended - began
        return whole / case.steps, (whole - (after - before)) / case.steps

    return measure


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("opponent", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_step(benchmark, recorder, name, opponent):
    case, (build, packages) = CASES[name], PEERS[opponent]
    for package in packages:
        if reason := missing(package):
            pytest.skip(reason)
    benchmark.group = f"training: {name}"
    systems = {"ours": ours(case), opponent: theirs(case, build)}
    times = turns(systems, case.seconds, least=5)
    for k, metric in enumerate(("ms a step", "ms a step outside forward and backward")):
        ratio = recorder.pairs(
            "training", name, case.batch, metric, {n: [1e3 * v[k] for v in t] for n, t in times.items()}
        )
        benchmark.extra_info[metric] = ratio[opponent]
    benchmark.pedantic(systems["ours"], rounds=1)
