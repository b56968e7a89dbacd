"""Mutants of files and odd arguments of calls: `python tests/fuzz.py [COUNT] [SEED]`, or `make fuzz`.

Whatever a file holds and whatever a caller gives, fastdiff answers or raises one of its own errors. Each mutant is a function of
(seed, number), so a failure's two numbers repeat it; those that failed once are in KEPT and run first. The address space is
bounded, so that a file that asks for more than it explains ends in a MemoryError, which is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import math
import pickle
import resource
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import fastdiff
from fastdiff.errors import FastdiffError
from fastdiff.networks import MLP

KEPT: list[tuple[int, int]] = []  # (seed, number) of files that once failed
TOKENS = [
    b"",
    b"\0" * 8,
    b"\xff" * 8,
    b"{",
    b"[" * 3000,
    b"NaN",
    b"1e999",
    b"-1",
    str(2**60).encode(),
    b"99999999",
    b"../",
    b"\n",
]


def seeds(folder: Path) -> list[Path]:
    """One valid file of each kind that is read."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng, made = np.random.default_rng(0), []
    made.append(fastdiff.save(fastdiff.ScoreModel(MLP((2,), hidden=4, layers=1), "vp", data_shape=(2,)), folder / "m"))
    made += others(folder)
    x = rng.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    np.save(folder / "a.npy", x)
    np.savez_compressed(folder / "a.npz", x=x, y=np.arange(3))
    (folder / "a.idx").write_bytes(b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in x.shape) + x.tobytes())
    made += [folder / name for name in ("a.npy", "a.npz", "a.idx")]
    frames = [Image.fromarray(np.repeat(frame[..., None], 3, 2)) for frame in x]
    for name in ("p.png", "p.gif", "p.tif", "p.webp", "p.bmp", "p.ppm", "p.jpg"):
        many = {"save_all": True, "append_images": frames[1:]} if name[2:] in ("png", "gif", "tif", "webp") else {}
        frames[0].save(folder / name, **many)
        made.append(folder / name)
    return made


def others(folder: Path) -> list[Path]:
    """Checkpoints of other libraries: an archive of torch.save, its former format, a pickle, safetensors."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    saved = {
        "net": net.state_dict(),
        "ema": [each.detach() for each in net.parameters()],
        "x": np.arange(6.0).reshape(2, 3).T,
    }
    saved |= {"args": argparse.Namespace(lr=1e-3), "module": net, "half": torch.ones(3, dtype=torch.bfloat16)[::2]}
    try:
        torch.serialization.set_crc32_options(False)  # or no mutant's pickle would be read
        torch.save(saved, folder / "t.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(saved, folder / "t.pth", _use_new_zipfile_serialization=False)
    (folder / "t.pkl").write_bytes(pickle.dumps(saved))
    save_file(net.state_dict(), folder / "t.safetensors")
    return [folder / name for name in ("t.pt", "t.pth", "t.pkl", "t.safetensors")]


def mutant(raw: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes: bits, bytes, pieces repeated, removed or replaced, the end cut; half of them near the start."""
    data = bytearray(raw)
    for _ in range(rng.integers(1, 5)):
        size = len(data)
        at = int(rng.integers(0, max(1, min(size, 400) if rng.random() < 0.5 else size)))
        length = int(rng.integers(1, 20))
        kind = rng.integers(6)
        if kind == 0 and size:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at : at + length] = rng.bytes(length)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length] * int(rng.integers(1, 50))
        elif kind == 4:
            data[at : at + length] = TOKENS[rng.integers(len(TOKENS))]
        else:
            del data[at:]
    return bytes(data)


def files(seed: int, count: int, folder: Path, numbers: list[int] | None = None) -> list[str]:
    """Read `count` mutants; the failures, one line each."""
    sources = [(path, path.read_bytes()) for path in seeds(folder / "seeds")]
    target, failures = folder / "mutant", []
    target.mkdir(exist_ok=True)
    for number in range(count) if numbers is None else numbers:
        rng = np.random.default_rng((seed, number))
        path, raw = sources[number % len(sources)]
        file = target / path.name
        file.write_bytes(mutant(raw, rng))
        picture = path.name.startswith("p.")
        call = {"m": fastdiff.load, "t": fastdiff.load_tensors}.get(path.stem, fastdiff.load_data)
        if text := _failure(call, target if picture else file):
            failures.append(f"file ({seed}, {number}), {path.name}: {text}")
        file.unlink()
    return failures


VALUES = [
    None,
    True,
    0,
    1,
    -1,
    2,
    3,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    10**30,
    "",
    "vp",
    "ddim",
    "x" * 10_000,
    "\x1b[2J\n",
    b"x",
    [],
    [1, 2],
    (0,),
    (3,),
    {},
    object(),
    np.float32(2),
    np.array([1.0, 2.0]),
    torch.zeros(2, 3),
    torch.full((2, 3), math.nan),
    torch.zeros(0),
    int,
    print,
]
RUN = {"sde": "vp", "steps": 3, "shape": (3,), "num_samples": 2, "progress": False}
CALLS = {
    "sample": (
        lambda **o: fastdiff.sample(lambda x, t: -x, **{**RUN, **o}),
        (
            "sde",
            "steps",
            "shape",
            "num_samples",
            "sampler",
            "grid",
            "seed",
            "prediction",
            "time_input",
            "clip",
            "t_min",
            "batch_size",
            "x_init",
        ),
    ),
    "plan": (
        lambda **o: fastdiff.plan(**{"sde": "vp", "steps": 3, **o}),
        ("sde", "steps", "sampler", "prediction", "grid", "t_min"),
    ),
    "load": (lambda path: fastdiff.load(path), ("path",)),
    "load_tensors": (lambda **o: fastdiff.load_tensors(**{"path": "none.pt", **o}), ("path", "part")),
    "load_data": (
        lambda **o: fastdiff.load_data(**{"source": np.zeros((2, 3, 4), np.uint8), **o}),
        ("source", "labels", "range", "bins", "channels", "size"),
    ),
}


def calls(seed: int, count: int, names: tuple[str, ...] = tuple(CALLS)) -> list[str]:
    """Call with one or two odd arguments, `count` times; the failures, one line each."""
    failures = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        name = names[rng.integers(len(names))]
        function, arguments = CALLS[name]
        chosen = rng.choice(arguments, size=min(int(rng.integers(1, 3)), len(arguments)), replace=False)
        options = {str(key): VALUES[rng.integers(len(VALUES))] for key in chosen}
        if text := _failure(lambda function=function, options=options: function(**options)):
            failures.append(f"call ({seed}, {number}), {name}({str(options)[:100]}): {text}")
    return failures


def _failure(call, *arguments) -> str:
    """What a call raised that is no error of fastdiff's, in one line; empty where all is well."""
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
        try:
            call(*arguments)
        except (FastdiffError, FileNotFoundError):
            return ""
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{type(error).__name__}: {error}".replace("\n", " ")[:150]
    return ""


def main(count: int = 100_000, seed: int = 0) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        failures = [text for s, numbers in itertools.groupby(sorted(KEPT), lambda pair: pair[0])
                    for text in files(s, 0, Path(folder), [number for _, number in numbers])]  # fmt: skip
        failures += files(seed, count, Path(folder))
    failures += calls(seed, count // 10)
    print(*failures, f"{count} files and {count // 10} calls of seed {seed}: {len(failures)} failures", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3])))
