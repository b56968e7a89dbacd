"""score_sde_pytorch (Song et al. 2021): its DDPM, DDPM++ and NCSN++ networks, with the averaged weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import files
from ...errors import CheckpointMismatchError, ConfigError, choose, warn
from ...model import ScoreModel
from ...networks import PaperUNet
from ...planning import processes, schedules
from ..torch_file import load_tensors
from . import unets

SOURCE = "score_sde_pytorch"
SIZES = {"cifar10": 32, "celeba": 64, "bedroom": 256, "church": 256, "celebahq": 1024, "ffhq": 1024}
NAMES = unets.Names(
    norm="GroupNorm_0", conv="Conv_0", told="Dense_0", norm2="GroupNorm_1", last="Conv_1", skip=("NIN_0", "Conv_2"),
    attention_norm="GroupNorm_0", attention=(("NIN_0", "NIN_1", "NIN_2"),), project=("NIN_3",),
)  # fmt: skip


def network(
    tensors: dict[str, Tensor], shape: tuple[int, ...], *, centered: bool = True, fir_kernel: tuple[int, ...] = (1, 3, 3, 1),
    fir: bool | None = None, skip_rescale: bool | None = None, dropout: float = 0.1,
) -> PaperUNet:  # fmt: skip
    """The network of its state dict: `all_modules.N` in the order in which they run."""
    file = unets.Tensors(tensors, SOURCE)
    kinds = _kinds(tensors)
    parts, facts = _parts(tensors, kinds)
    biggan = facts.pop("biggan")
    sine = facts.pop("positional")
    config: dict[str, Any] = {
        "shape": shape, "centered": centered, "dropout": dropout, "heads": 1,
        "rescale": biggan if skip_rescale is None else skip_rescale, **facts,
        "time_embedding": "sinusoidal" if sine else "fourier", "time_scale": 1.0 if sine else 16.0,
    }  # fmt: skip
    held = set(kinds.values())  # a filter has no tensor of its own
    seen = "filtered" in held or ("resample" not in held and (not sine or facts["progressive_in"] != "none"))
    config["taps"] = fir_kernel if (seen if fir is None else fir) else (1, 1)
    if not biggan and facts["progressive_in"] == facts["progressive_out"] == "none":  # its "ddpm"
        config["groups"] = 32
    net = unets.paper_unet(file, parts, NAMES, config)
    file.finish(["sigmas"])
    return net


def _kinds(tensors: dict[str, Tensor]) -> dict[int, str]:
    """What each of its modules is, by the names of its tensors."""
    names: dict[int, set[str]] = {}
    for name in tensors:
        first, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        if first == "all_modules" and number.isdigit():
            names.setdefault(int(number), set()).add(rest)
    kinds = {}
    for number, held in sorted(names.items()):
        rank = tensors[f"all_modules.{number}.weight"].ndim if "weight" in held else 0
        if "GroupNorm_1.weight" in held:
            kinds[number] = "block"
        elif "NIN_3.W" in held:
            kinds[number] = "attention"
        elif "W" in held:
            kinds[number] = "fourier"
        elif rank:
            kinds[number] = {1: "norm", 2: "linear"}.get(rank, "conv")
        elif "Conv2d_0.weight" in held:
            kinds[number] = "filtered"
        elif "Conv_0.weight" in held:
            kinds[number] = "combine" if tensors[f"all_modules.{number}.Conv_0.weight"].shape[2] == 1 else "resample"
        else:
            raise CheckpointMismatchError(f"the file's all_modules.{number} is of no kind that {SOURCE} has")
    return kinds


def _parts(tensors: dict[str, Tensor], kinds: dict[int, str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Our names of its modules, and what their kinds tell."""

    def resamples(number: int) -> bool:  # a block that keeps its channels and has a convolution beside itself
        if kinds[number] != "block" or f"all_modules.{number}.Conv_2.weight" not in tensors:
            return False
        outputs, inputs = tensors[f"all_modules.{number}.Conv_0.weight"].shape[:2]
        return outputs == inputs

    biggan = any(map(resamples, kinds))
    between = sum(resamples(n) if biggan else kinds[n] == "resample" for n in kinds)
    levels = between // 2 + 1
    blocks = ((sum(kind == "block" for kind in kinds.values()) - (between if biggan else 0) - 2) // levels - 1) // 2
    parts, queue = dict[str, str](), list(kinds)
    inner = {"combine": ".Conv_0", "resample": ".Conv_0", "filtered": ".Conv2d_0"}  # a layer within a module of its own

    def next_is(*kind: str) -> bool:
        return bool(queue) and kinds[queue[0]] in kind

    def take(ours: str) -> None:
        if not queue:
            raise CheckpointMismatchError(f"the file ends before {ours} of {SOURCE}'s U-Net")
        number = queue.pop(0)
        parts[ours] = f"all_modules.{number}{inner.get(kinds[number], '')}"

    positional = not next_is("fourier")
    if not positional:
        parts["frequencies"] = f"all_modules.{queue.pop(0)}.W"
    for i in range(2):
        if next_is("linear"):
            take(f"time.{i}")
    take("enter")
    into, out, combine = "none", "none", "sum"
    for level in range(levels):
        if level:
            take(f"down.{level}.resample")
            if next_is("combine"):
                into = "skip"
                # of "cat" the next block has twice the channels
                before = tensors[f"all_modules.{queue[0]}.Conv_0.weight"].shape[0]
                combine = "cat" if tensors[f"all_modules.{queue[1]}.Conv_0.weight"].shape[1] == 2 * before else "sum"
                take(f"down.{level}.join")
            elif next_is("filtered", "resample"):
                into = "residual"
                take(f"down.{level}.pyramid")
        for i in range(blocks):
            take(f"down.{level}.blocks.{i}")
            if next_is("attention"):
                take(f"down.{level}.blocks.{i}.attend")
    take("middle.0")
    take("middle.0.attend")
    take("middle.1")
    for level in range(levels):
        finest = level == levels - 1
        for i in range(blocks + 1):
            take(f"up.{level}.blocks.{i}")
        if next_is("attention"):
            take(f"up.{level}.blocks.{blocks}.attend")
        if not finest and next_is("norm"):  # (of a residual sum its own code cannot run)
            out = "skip"
            take(f"up.{level}.norm")
            take(f"up.{level}.head")
        if not finest:
            take(f"up.{level}.resample")
    take("norm")
    take("out")
    if queue:
        raise CheckpointMismatchError(f"the file's all_modules.{queue[0]} has no place in {SOURCE}'s U-Net")
    facts = {
        "progressive_in": into,
        "progressive_out": out,
        "combine": combine,
        "biggan": biggan,
        "positional": positional,
    }
    return parts, facts


# its configurations of networks that are read here
PUBLISHED = {
    "ve": "bedroom_ncsnpp_continuous celeba_ncsnpp celebahq_256_ncsnpp_continuous celebahq_ncsnpp_continuous "
          "church_ncsnpp_continuous cifar10_ddpm cifar10_ncsnpp cifar10_ncsnpp_continuous cifar10_ncsnpp_deep_continuous "
          "ffhq_256_ncsnpp_continuous ffhq_ncsnpp_continuous",
    "vp": "cifar10_ddpmpp cifar10_ddpmpp_continuous cifar10_ddpmpp_deep_continuous cifar10_ncsnpp cifar10_ncsnpp_continuous "
          "cifar10_ncsnpp_deep_continuous ddpm/bedroom ddpm/celebahq ddpm/church ddpm/cifar10 ddpm/cifar10_continuous "
          "ddpm/cifar10_unconditional",
    "subvp": "cifar10_ddpm_continuous cifar10_ddpmpp_continuous cifar10_ddpmpp_deep_continuous cifar10_ncsnpp_continuous "
             "cifar10_ncsnpp_deep_continuous",
}  # fmt: skip


def published(name: str) -> dict[str, Any]:
    """What a published configuration of score_sde_pytorch says, such as "ve/cifar10_ncsnpp_continuous"."""
    known = [f"{kind}/{rest}" for kind, names in PUBLISHED.items() for rest in names.split()]
    kind, _, rest = choose("config", name.removeprefix("configs/"), known).partition("/")
    data = rest.removeprefix("ddpm/")
    size = SIZES[data.split("_")[0]]
    if "_256" in data or (rest.startswith("ddpm/") and "cifar10" not in data):
        size = 256
    return {
        "sde": f"{kind}sde",
        "continuous": data.endswith("_continuous"),
        "image_size": size,
        "centered": kind != "ve",
    }


def model(
    path: Path, part: str | None, *, sde: str, image_size: int | Sequence[int], continuous: bool = True,
    centered: bool | None = None, beta_min: float = 0.1, beta_max: float = 20.0, num_scales: int = 1000,
    scale_by_sigma: bool | None = None, fir: bool | None = None, fir_kernel: Sequence[int] = (1, 3, 3, 1),
    skip_rescale: bool | None = None, dropout: float = 0.1, nonlinearity: str = "swish",
) -> ScoreModel:  # fmt: skip
    """`sde` "vesde", "vpsde" or "subvpsde", `continuous`, `centered` (data in [−1, 1], not [0, 1]), and more of its configs."""
    kind = choose("sde", sde, ("vesde", "vpsde", "subvpsde"))
    choose("nonlinearity", nonlinearity, ("swish",))
    centered = kind != "vesde" if centered is None else centered
    if kind != "vesde" and scale_by_sigma:
        raise ConfigError(
            "scale_by_sigma must be False for vpsde and subvpsde, as in their configurations, got True: leave it out"
        )
    tensors = _averaged(path) if part is None else unets.unwrapped(load_tensors(path, part))
    fourier = "all_modules.0.W" in tensors and tensors["all_modules.0.W"].ndim == 1
    if fourier != (kind == "vesde" and continuous):
        told = "ln σ, by Fourier features" if fourier else "a step or 999 t, by sines and cosines"
        raise ConfigError(
            f"sde={kind!r} with continuous={continuous} must be of a network that is told otherwise: this file's is told {told}. "
            + ("Say 'vesde' and continuous=True" if fourier else "Say 'vpsde', or continuous=False")
        )
    channels = next(
        (value.shape[1] for name, value in tensors.items() if value.ndim == 4 and name.endswith(".weight")), None
    )
    if channels is None or (kind == "vesde" and "sigmas" not in tensors):
        raise CheckpointMismatchError(
            f"{files.shown(path)} has no {'convolutions' if channels is None else 'sigmas'} in this part: leave part out, or "
            "give 'model.module' or 'model'"
        )
    net = network(
        tensors,
        (channels, *unets.sizes(image_size)),
        centered=centered,
        fir=fir,
        fir_kernel=tuple(fir_kernel),
        skip_rescale=skip_rescale,
        dropout=dropout,
    )
    divided = kind == "vesde" if scale_by_sigma is None else scale_by_sigma
    options: dict[str, Any] = {"prediction": "eps", "data_range": (-1, 1) if centered else (0, 1)}
    process: processes.Process
    if kind == "vesde":
        ladder = tensors["sigmas"]
        high, low = (float(f"{float(ladder[i]):.6g}") for i in (0, -1))  # rounded where they were stored
        options["prediction"] = "scaled_score" if divided else "score"
        if continuous:
            process, options["time_input"] = processes.VE(low, high), "log_sigma"
        else:
            process, options["time_input"] = processes.NCSN(schedules.geometric(high, low, len(ladder))), "index"
    elif kind == "subvpsde":
        process, options["time_input"] = processes.SubVP(beta_min, beta_max), "t*999"
    elif continuous:
        process, options["time_input"] = processes.VP(beta_min, beta_max), "t*999"
    else:
        betas = schedules.linear(num_scales, beta_min / num_scales, beta_max / num_scales)
        process, options["time_input"] = processes.DDPM(betas.tolist()), "fractional_index"
    return ScoreModel(net, process, data_shape=net.shape, **options)


def _averaged(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a training of score_sde_pytorch, which are a list, by the names of what was trained."""
    everything = load_tensors(path)
    tensors = unets.unwrapped(
        {n.removeprefix("model."): v for n, v in everything.items() if n.startswith("model.")} or everything
    )
    averages = {n: v for n, v in everything.items() if n.startswith("ema.shadow_params.")}
    if averages:
        fixed = ("sigmas", "all_modules.0.W")  # a table, and the Fourier features' frequencies, which are not trained
        trained = [name for name in tensors if name not in fixed or (name == fixed[1] and tensors[name].ndim > 1)]
        if len(trained) != len(averages):
            raise ConfigError(
                f"{files.shown(path)} has {len(averages)} averages of {len(trained)} trained tensors: give part='model.module'"
            )
        tensors |= dict(zip(trained, averages.values()))
    else:
        warn(
            f"{files.shown(path)} has no averages of the weights (ema.shadow_params): these are the trained weights themselves"
        )
    return tensors
