"""Models and classifiers of other libraries from their own files: the network as one of fastdiff's, with its process and time."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ... import files
from ...errors import ConfigError, choose, names_keywords, short
from ...model import ScoreModel, stands_above
from ...planning import processes
from ..checkpoint import load_saved
from . import denoising_diffusion_pytorch, diffusers, dit, edm, edm2, ncsn, openai, score_sde


class Source(NamedTuple):
    """A library whose files are read: (path, part, **facts) -> model, or what a TimeClassifier is made of."""

    model: Callable[..., Any]
    published: Callable[[str], Mapping[str, Any]] | None = None  # the facts of what it published, by its name there
    defaults: Mapping[str, Any] = {}  # facts that are other than the function's
    known: frozenset[str] = (
        frozenset()
    )  # facts of its configurations that the file itself tells, or that no model needs
    told: Callable[[Any], Mapping[str, Any]] | None = None  # of these what the file told
    sections: tuple[str, ...] = ()  # of its configurations, in which the facts stand among what else a training needs


SOURCES = {
    "score_sde_pytorch": Source(score_sde.model, score_sde.published, sections=("training", "data", "model")),
    "guided-diffusion": Source(openai.model, openai.published, known=openai.TOLD, told=openai.told),
    "improved-diffusion": Source(openai.model, openai.published, {"rescale_timesteps": True}, openai.TOLD, openai.told),
    "edm": Source(edm.model, edm.published),
    "edm2": Source(edm2.model, known=edm2.TOLD),
    "diffusers": Source(diffusers.model, known=diffusers.TOLD),
    "ncsn": Source(ncsn.model, sections=("data", "model")),
    "denoising-diffusion-pytorch": Source(denoising_diffusion_pytorch.model),
    "dit": Source(dit.model),
}
CLASSIFIERS = {
    "guided-diffusion": Source(
        openai.classifier, openai.published, known=openai.TOLD_OF_CLASSIFIER, told=openai.told_of_classifier
    ),
}


@stands_above
@torch.inference_mode(False)
@names_keywords
def load(
    path_or_name: str | os.PathLike[str], *, net: nn.Module | None = None, sde: processes.Process | None = None,
    ema: float | None = None, source: str | None = None, config: Mapping[str, Any] | str | None = None, part: str | None = None,
) -> ScoreModel:  # fmt: skip
    """The ScoreModel of a file written by `save`, of a training directory (its EMA weights), or of a shipped name; with `source`,
    of another library's file.

    net     the network to fill, needed for a network of your own; its tensors must have the names in the file
    sde     the process it was trained on, needed for a process of your own; its options must be those in the file
    ema     of a training with several averages, the one of this rate; the first unless given
    source  the library whose file it is: "score_sde_pytorch", "guided-diffusion", "improved-diffusion", "edm", "edm2",
            "diffusers" (the default for its folders), "ncsn" (both versions), "denoising-diffusion-pytorch" or "dit". Its network
            becomes one of fastdiff.networks with the same weights, and the model has the process, prediction, time input and
            range of its training (docs/networks.md)
    config  facts that the file does not hold, by the source's own names: a dict (of score_sde_pytorch and NCSN also a
            training's whole configuration, `get_config().to_dict()`), the path of a JSON file of them, its scripts' flags
            ("--image_size 64 --noise_schedule cosine"), or the name of what was published ("ve/cifar10_ncsnpp_continuous" of
            score_sde_pytorch, "64x64_diffusion" of guided-diffusion)
    part    the network's part of the file, as in load_tensors, where it is not the averaged weights that are wanted

    Errors: FileNotFoundError, ConfigError, CorruptCheckpointError, CheckpointVersionError, CheckpointMismatchError; nothing is
    half-loaded, and nothing of a file runs.
    """
    if source is None and _of_diffusers(path_or_name):
        source = "diffusers"
    if source is None:
        if config is not None or part is not None:
            raise ConfigError(
                f"config and part are of other libraries' files: say whose, source= one of {', '.join(SOURCES)}"
            )
        return _marked(load_saved(path_or_name, net, sde, ema))
    for name, value in (("net", net), ("sde", sde), ("ema", ema)):
        if value is not None:
            raise ConfigError(f"{name} is of fastdiff's own files, got it with source={source!r}: leave it out")
    return _read("path_or_name", path_or_name, SOURCES, source, config, part).eval()  # type: ignore[no-any-return]


@torch.inference_mode(False)
def classifier(
    path: str | os.PathLike[str], source: str, config: Mapping[str, Any] | str | None, part: str | None
) -> dict[str, Any]:
    """What the TimeClassifier of another library's file is made of; its arguments as `load` has them."""
    return _read("path", path, CLASSIFIERS, source, config, part)  # type: ignore[no-any-return]


def _read(
    argument: str, path_or_name: Any, sources: Mapping[str, Source], source: str, config: Mapping[str, Any] | str | None,
    part: str | None,
) -> Any:  # fmt: skip
    """What a source's reader makes of a file and its facts."""
    path = files.path(argument, path_or_name)
    if not path.exists():
        raise FileNotFoundError(f"no file at {files.shown(path)}: give the path of a file of {source}")
    origin = sources[choose("source", source, sources)]
    known = inspect.signature(origin.model).parameters
    options = [name for name, parameter in known.items() if parameter.kind is parameter.KEYWORD_ONLY]
    facts = {**origin.defaults, **_flat(_facts(config, source, origin.published, path), origin.sections, options)}
    for name in facts:
        choose(f"config's names for {source}", name, {*options, *origin.known})
    missing = [name for name in options if known[name].default is inspect.Parameter.empty and name not in facts]
    if missing:
        raise ConfigError(
            f"config must have {missing[0]!r} for {source}, whose files do not say it: config={{{missing[0]!r}: …}}"
        )
    given = {name: _typed(name, facts[name], str(known[name].annotation)) for name in options if name in facts}
    made = origin.model(path, part, **given)
    for name, told in (origin.told(made) if origin.told is not None else {}).items():
        if name in facts and _typed(name, facts[name], type(told).__name__) != told:
            raise ConfigError(
                f"{name} must be {told!r} by the file, got {short(facts[name])}: these are the facts of another file"
            )
    return _marked(made)


def _marked(model: Any) -> Any:
    """As loaded, if it is a ScoreModel."""
    if isinstance(model, ScoreModel):
        model.loaded = True
    return model


def _typed(name: str, value: Any, wanted: str) -> Any:
    """A fact, of a type that its reader's annotation names; words of flags as booleans."""
    kinds = {part.strip().partition("[")[0] for part in wanted.split("|")}
    if value is None and "None" in kinds:
        return None
    if "bool" in kinds:
        word = str(value).lower()
        if isinstance(value, bool) or word in WORDS:
            return WORDS[word]
    elif "int" in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif "float" in kinds and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif ("str" in kinds and isinstance(value, str)) or (
        "Sequence" in kinds and isinstance(value, Sequence) and not isinstance(value, str)
    ):
        return value
    kind = " or ".join(sorted(kinds - {"None"})).replace("bool", "True or False")
    raise ConfigError(f"config's {name} must be of type {kind}, got {short(value)}")


WORDS = {
    "true": True,
    "yes": True,
    "t": True,
    "y": True,
    "1": True,
    "false": False,
    "no": False,
    "f": False,
    "n": False,
    "0": False,
}


def _of_diffusers(path: Any) -> bool:
    """Whether it is a folder that diffusers wrote."""
    if not isinstance(path, (str, os.PathLike)):
        return False
    index, config, unet = (
        os.path.join(path, *name) for name in (("model_index.json",), ("config.json",), ("unet", "config.json"))
    )
    return (
        os.path.isfile(index)
        or os.path.isfile(unet)
        or (
            os.path.isfile(config)
            and str(diffusers.read_json(Path(config)).get("_class_name")) in ("UNet2DModel", "DiTTransformer2DModel")
        )
    )


def _facts(
    config: Mapping[str, Any] | str | None,
    source: str,
    published: Callable[[str], Mapping[str, Any]] | None,
    path: Path,
) -> dict[str, Any]:
    """The facts of `config`, besides those of the published file that has the path's name."""
    known = _of_name(published, path.stem)
    if config is None:
        return known
    if isinstance(config, Mapping):
        return {**known, **config}
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError(
            f"config must be a dict, the path of a JSON file, flags or a published name, got {short(config)}"
        )
    text = str(config).strip()
    if text.endswith(".json"):
        return {**known, **diffusers.read_json(files.path("config", text))}
    if text.startswith("--"):  # as they stand in a script
        return {**known, **_flags(text)}
    if text.startswith("{"):
        value = _value(text)
        if isinstance(value, dict):
            return {**known, **value}
        raise ConfigError(f"config must be a JSON object, got {short(text)}")
    if published is None:
        raise ConfigError(f"config must be a dict or a JSON file of one for {source}, got {short(text)}")
    return dict(published(text))


def _flat(facts: dict[str, Any], sections: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    """The facts among those of a whole configuration, whose sections hold them; others as they are."""
    held = [facts[name] for name in sections if name in facts]
    if not held:
        return facts
    for name in sections:
        if not isinstance(facts.get(name, {}), Mapping):
            raise ConfigError(
                f"config's {name} must be a dict, as in a whole configuration, got {short(facts[name])}: give vars() of it, or "
                "its to_dict()"
            )
    alone = [name for name, value in facts.items() if not isinstance(value, Mapping) and name not in options]
    for name in alone:  # beside seed, device and others of a training, which are passed over
        if difflib.get_close_matches(name, options, n=1, cutoff=0.8):
            choose("config's names", name, options)
    return {name: value for part in (*held, facts) for name, value in part.items() if name in options}


def _flags(text: str) -> dict[str, Any]:
    """{name: value} of "--name value --other=value"."""
    try:
        words = [
            part for word in shlex.split(text) for part in (word.split("=", 1) if word.startswith("--") else [word])
        ]
    except ValueError as error:
        raise ConfigError(f"config must be flags as a shell reads them, got {short(text)}: {error}") from error
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise ConfigError(f"config must be flags, each with its value, '--image_size 64 …', got {short(text)}")
    return {name[2:]: _value(value) for name, value in zip(words[::2], words[1::2])}


def _of_name(published: Callable[[str], Mapping[str, Any]] | None, stem: str) -> dict[str, Any]:
    """The facts of the published file of that name, where there is one."""
    try:
        return {} if published is None else dict(published(stem))
    except ConfigError:
        return {}


def _value(text: str) -> Any:
    try:
        return {"True": True, "False": False}[text] if text in ("True", "False") else json.loads(text)
    except ValueError:
        return text
