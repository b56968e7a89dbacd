"""Colours for grey pictures, by a model that was trained on coloured ones alone.

    python examples/colors.py emoji32.npz [--model colors.safetensors] [--picture colors.png]

emoji32.npz holds `x` [n, H, W, 3] uint8, pictures of which a tenth, drawn by the seed, is held out. With 3,786 Noto emoji on
white (github.com/googlefonts/noto-emoji, art under the Apache licence 2.0) training takes twenty minutes of a core with
`--precision bf16`. Colours suit what they are on, and some change within it: the model is small, and its own samples are so too.
Some of these pictures differ by skin tone alone, so a held-out one may have its like in the training set.

It trains a small U-Net, gives `fastdiff.colorize` the mean of the channels of held-out pictures, and prints the root mean square
error of colours in [0, 1], for the mean of the draws, one draw and the grey picture itself, and by how much the draws' grey
values differ from what was given.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from fastdiff.networks import UNet


def pictures(path: str, seed: int) -> tuple[Tensor, Tensor]:
    """To train on and held out, [n, 3, H, W] in [0, 1]."""
    with np.load(path) as file:
        x = torch.from_numpy(file["x"]).movedim(-1, 1).float() / 255
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    held_out = len(x) // 10
    return x[order[held_out:]], x[order[:held_out]]


def trained(x: Tensor, steps: int, seed: int, precision: str | None) -> fastdiff.ScoreModel:
    torch.manual_seed(seed)
    # attention where a picture is 8 and 4 pixels wide: parts that are far apart are of one colour
    net = UNet(tuple(x.shape[1:]), channels=32, multipliers=(1, 2, 2, 2), blocks=1, attention=(2, 3))
    model = fastdiff.ScoreModel(net, "vp", "edm", data_shape=tuple(x.shape[1:]), data_range=(0.0, 1.0))
    fastdiff.train(
        model, fastdiff.Data(x, range=(0.0, 1.0)), steps=steps, loss="simple", batch_size=16, lr=2e-3, warmup=100,
        decay=True, ema=0.998, augment="flip", seed=seed, precision=precision,
    )  # fmt: skip
    return model


def rms(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).double().square().mean().sqrt())


def picture(path: str, truth: Tensor, gray: Tensor, draws: Tensor) -> None:
    """A line for each picture: grey, four draws, their mean, the truth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [gray.expand_as(truth), *draws[:, :4].unbind(1), draws.mean(1), truth]
    titles = ("given", *["a draw"] * 4, "mean of the draws", "held-out truth")
    figure, axes = plt.subplots(len(truth), len(columns), figsize=(1.1 * len(columns), 1.1 * len(truth) + 0.2))
    for k, line in enumerate(axes):
        for axis, title, x in zip(line, titles, columns):
            axis.imshow(x[k].clamp(0, 1).movedim(0, -1).numpy())
            axis.set(xticks=[], yticks=[])
            if k == 0:
                axis.set_title(title, fontsize=7)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=110)


def run(a: argparse.Namespace) -> list[str]:
    """Lines of the table; a picture and a model's file, where asked for."""
    train, test = pictures(a.data, a.seed)
    truth = test[: a.tests]
    if a.model and Path(a.model).exists():
        model: Any = fastdiff.load(a.model)
    else:
        began = time.perf_counter()
        model = trained(train, a.steps, a.seed, a.precision)
        print(f"trained on {len(train)} pictures in {time.perf_counter() - began:.0f} s", flush=True)
        if a.model:
            fastdiff.save(model, a.model)
    gray = truth.mean(1, keepdim=True)
    each = gray.repeat_interleave(a.draws, 0)
    x = fastdiff.colorize(model, each, steps=a.calls, method=a.method, sampler="ancestral", seed=a.seed, batch_size=256)
    draws = x.view(len(truth), a.draws, *truth.shape[1:])
    if a.picture:
        picture(a.picture, truth[: a.shown], gray[: a.shown], draws[: a.shown])
    errors = [rms(v, truth) for v in (draws.mean(1), gray)] + [rms(draws, truth[:, None])]
    off = float((draws.mean(2) - gray).abs().max())
    return [
        "| | mean of the draws | grey itself | one draw | grey values off by at most |",
        "|---|---|---|---|---|",
        f"| RMS error of colours in [0, 1] | {errors[0]:.3f} | {errors[1]:.3f} | {errors[2]:.3f} | {off:.1e} |",
    ]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Colours for grey pictures.")
    add = parser.add_argument
    add("data", help="a .npz of pictures x [n, H, W, 3], uint8")
    add("--steps", type=int, default=6000, help="of training (default: 6000)")
    add(
        "--precision",
        choices=("bf16",),
        help="of training, faster where the processor multiplies it (default: float32)",
    )
    add("--tests", type=int, default=24, help="held-out pictures (default: 24)")
    add("--draws", type=int, default=8, help="of each (default: 8)")
    add("--calls", type=int, default=50, help="of the network for a draw (default: 50)")
    add("--method", default="mmps", help="of fastdiff.inpaint (default: mmps)")
    add("--shown", type=int, default=6, help="pictures in the picture (default: 6)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--model", metavar="FILE.safetensors", help="read, or written where it is not yet")
    add("--picture", metavar="FILE")
    a = parser.parse_args(words)
    torch.set_num_threads(1)
    print("\n".join(run(a)))


if __name__ == "__main__":
    main()
