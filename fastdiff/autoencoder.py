"""Autoencoder: data to latents and back, for models of latents (latent diffusion)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .errors import ConfigError, ModelOutputError, ModelOutputTypeError, names_keywords, short
from .execution import modules, ops, tensor_checks
from .execution.calls import dtype_of, single_tensor
from .execution.modes import evaluating, leaves_no_trace
from .execution.monitor import bar
from .execution.noise import ENCODINGS


def _modules(function: Any) -> list[nn.Module]:
    """Those that a call of it runs, without parts of others: it may be a method of one, or a function that names them."""
    found = [part for _, part in modules.reach(function) if isinstance(part, nn.Module)]
    inside = {id(part) for whole in found for part in whole.modules() if part is not whole}
    return [part for part in found if id(part) not in inside]


class Autoencoder(nn.Module):
    """An encoder and a decoder of any kind around a model of latents z = E(x), whose samples are D(z) (Vahdat et al. 2021;
    Rombach et al. 2022).

        latents = autoencoder.encode(x)                          # once, before the training
        fastdiff.train(model, latents, …)                        # a ScoreModel of z, on any process
        x = autoencoder.decode(fastdiff.sample(model, …))
        fastdiff.sample(model, guidance=inverse.DPS(inverse.Problem(y, lambda z: A(autoencoder.decode(z)), noise_std)))

    encoder     x [B, *] -> z [B, *latent], or (mean, std), each [B, *latent]: then z ~ N(mean, std²), as of a variational one
    decoder     z [B, *latent] -> x [B, *]
    batch_size  samples in one call of either

    Either may be a module, a method of one, or a function that names some: diffusers' AutoencoderKL is `Autoencoder(vae.encode,
    vae.decode)`, whose `vae` is moved and saved by itself, as only modules are parts of this one. They run in evaluation mode and
    in the precision of their parameters; what they return comes back in that of what was given. Gradients go through them where
    the argument requires one. How latents are scaled is the model's own `standardize`: Stable Diffusion's factor 0.18215 is
    standardize=(0, 1 / 0.18215).
    """

    @names_keywords
    def __init__(
        self, encoder: Callable[[Tensor], Any], decoder: Callable[[Tensor], Tensor], *, batch_size: int = 16
    ) -> None:
        super().__init__()
        for name, value in (("encoder", encoder), ("decoder", decoder)):
            if not callable(value):
                raise ConfigError(f"{name} must be callable, as a network is, got {short(value)}")
        self.encoder, self.decoder = encoder, decoder
        self._reached: dict[str, tuple[Any, list[nn.Module]]] = {}
        self.batch_size = checks.integer("batch_size", batch_size, 1, 2**32)

    @leaves_no_trace
    @names_keywords
    def encode(
        self, x: Tensor, *, seed: int | None = None, first_sample: int = 0, progress: bool | None = None
    ) -> Tensor:
        """The latents [B, *latent] of x [B, *].

        seed    of an encoder that returns (mean, std): z = mean + std ε of these draws, sample i a function of (seed,
                first_sample + i) alone; None: the mean. Draws, not means, have the spread that the decoder was trained with

        Raises ConfigError, ShapeError and DTypeError before any work, ModelOutputError on what the encoder returns.
        """
        first = checks.integer("first_sample", first_sample, 0, 2**32 - 1)
        drawn = None if seed is None else (checks.integer("seed", seed, 0, 2**64 - 1), first)
        return self._called("encoder", "x", x, drawn, progress)

    @leaves_no_trace
    @names_keywords
    def decode(self, z: Tensor, *, progress: bool | None = None) -> Tensor:
        """The data [B, *] of latents z [B, *latent]. Errors as in `encode`."""
        return self._called("decoder", "z", z, None, progress)

    def forward(self, x: Tensor) -> Tensor:
        """D(E(x)): what is left of x [B, *], of which no model of its latents can be better."""
        return self.decode(self.encode(x))

    def _called(
        self, which: str, name: str, given: Any, drawn: tuple[int, int] | None, progress: bool | None
    ) -> Tensor:
        tensor_checks.check_samples(name, given)
        function = getattr(self, which)
        if self._reached.get(which, (None,))[0] is not function:  # looked for once, as that takes its time
            self._reached[which] = function, _modules(function)
        reached = self._reached[which][1]
        dtype = dtype_of(reached[0] if reached else None, given.dtype)
        parts = []
        with contextlib.ExitStack() as stack:
            for module in reached:
                stack.enter_context(evaluating(module))
            stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled() and given.requires_grad))
            shown = stack.enter_context(bar(progress, len(given), WORDS[which], "sample"))
            for start in range(0, max(len(given), 1), self.batch_size):
                part = given[start : start + self.batch_size]
                output = function(part.to(dtype))
                if which == "encoder":
                    at = None if drawn is None else (drawn[0], drawn[1] + start)
                    out = _latents(output, at)
                else:
                    out = output if isinstance(output, Tensor) else single_tensor(output)
                if out.ndim < 1 or len(out) != len(part) or not out.is_floating_point():
                    raise ModelOutputError(
                        f"the {which} must return floats with an entry for each of {len(part)} samples, got "
                        f"{tuple(out.shape)} of {out.dtype}"
                    )
                parts.append(out.to(given.dtype))
                shown.update(len(part))
        made = torch.cat(parts)
        if which == "encoder" and not bool(made.isfinite().all()):
            i = int(torch.nonzero(~made.flatten(1).isfinite().all(1))[0])
            raise ModelOutputError(f"the encoder must return finite latents, and those of sample {i} are not")
        return made


WORDS = {"encoder": "encode", "decoder": "decode"}


def _latents(output: Any, drawn: tuple[int, int] | None) -> Tensor:
    """z of what an encoder returns; drawn: (seed, first sample) of draws from its Gaussian, whose mean it is else."""
    given = getattr(output, "latent_dist", output)  # of diffusers' AutoencoderKL
    pair = (given.mean, given.std) if hasattr(given, "std") and not isinstance(given, Tensor) else given
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair):
        mean, std = pair
        if mean.shape != std.shape or bool((std < 0).any()):
            raise ModelOutputError(
                f"the encoder must return (mean, std), alike in shape and std not negative, got {tuple(mean.shape)} and "
                f"{tuple(std.shape)}: of a log variance std is (0.5 * logvar).exp()"
            )
        if drawn is None:
            return mean
        normals = ops.normal(
            len(mean), mean.shape[1:], seed=drawn[0], first_sample=drawn[1], stream=ENCODINGS, device=mean.device
        )
        wide = torch.promote_types(mean.dtype, torch.float32)
        return mean.to(wide) + std.to(wide) * normals.to(wide)
    latents = getattr(output, "latents", output)  # of its VQModel
    if not isinstance(latents, Tensor):
        raise ModelOutputTypeError(f"the encoder must return a tensor or two, (mean, std), got {short(output)}")
    if drawn is not None:
        raise ConfigError(
            f"seed={drawn[0]} is of encoders that return (mean, std), and this one returns one tensor: leave it out"
        )
    return latents
