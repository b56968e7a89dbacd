"""Samples in shards: files of a fixed number of samples in one folder, which any number of processes draw, and a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import files
from ..errors import ConfigError, DataError, short
from ..execution.monitor import bar
from ..training.ranks import Launch

MANIFEST, FORMAT = "manifest.json", 1


class Shards:
    """Shard k holds samples k·size … (k + 1)·size − 1, in one .npy file, whole or not there.

    Processes do not speak to one another: process r of W draws the shards k ≡ r (mod W) that are not there yet, and whoever
    finds all there writes their checksums into the manifest. What a shard holds does not depend on W, nor on what was killed
    before, since the manifest says all that it is a function of: the model, the options, the seed, the samples in one
    call of the network, the threads (a matrix product of few rows may be another in its last bit with more threads).
    """

    def __init__(self, folder: Path, run: dict[str, Any], shape: tuple[int, ...]) -> None:
        self.folder, self.run, self.shape = folder, json.loads(json.dumps(run)), shape
        self.count, self.size, self.first = run["num_samples"], run["shard_size"], run["first_sample"]
        self.spans = [(lo, min(lo + self.size, self.count)) for lo in range(0, self.count, self.size)]

    def name(self, k: int) -> str:
        """Its first and last sample, in so many digits that names sort as the samples do."""
        lo, hi = self.spans[k]
        return f"samples-{self.first + lo:010d}-{self.first + hi - 1:010d}.npy"

    def begin(self) -> dict[str, str]:
        """Make or check the folder and its manifest; returns the checksums of a folder that was finished before, by name."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"out={files.shown(self.folder)} cannot be a folder ({files.reason(error)}): choose another"
            ) from error
        if not (self.folder / MANIFEST).exists():
            if next(self.folder.glob("samples-*.npy"), None) is not None:
                raise ConfigError(
                    f"out={files.shown(self.folder)} holds samples without a {MANIFEST}, so nobody knows of what: choose "
                    "another folder"
                )
            self._write_manifest({})
        return self.checked()

    def checked(self) -> dict[str, str]:
        """The checksums in the manifest; ConfigError where it is of another run."""
        path = self.folder / MANIFEST
        try:
            with files.open_regular(path) as handle:
                manifest = json.loads(handle.read().decode())
            run, sums = manifest["run"], manifest["shards"]
            form, names = manifest["format"], {self.name(k) for k in range(len(self.spans))}
            whole = isinstance(run, dict) and isinstance(sums, dict) and all(isinstance(s, str) for s in sums.values())
            if not whole or type(form) is not int:
                raise ValueError("it does not say what was drawn")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{files.shown(path)} is no manifest of samples ({files.reason(error)}): choose another folder"
            ) from error
        if form > FORMAT:
            raise ConfigError(f"{files.shown(path)} has format {form:.20}: install a newer fastdiff")
        for key in [*self.run, *(run.keys() - self.run.keys())]:
            if run.get(key) != self.run.get(key):
                raise ConfigError(
                    f"out={files.shown(self.folder)} holds samples of {key}={short(run.get(key), 30)}, and this run has "
                    f"{short(self.run.get(key), 30)}: choose another folder"
                )
        return {name: str(sums[name]) for name in names & sums.keys()}

    def draw(self, launch: Launch, sample: Callable[[int, int], np.ndarray[Any, Any]]) -> tuple[int, bool]:
        """Draw what is missing of this process's shards, by `sample` (lo, hi); how many, and whether now all are there."""
        finished, drawn = self.begin(), 0
        mine = range(launch.rank, len(self.spans), launch.world)
        missing = [k for k in mine if not self._is_there(k, finished)]
        with _said(len(missing), launch.rank == 0) as say, _once():
            for k in missing:
                raw = io.BytesIO()
                np.save(raw, sample(*self.spans[k]))
                self.checked()  # another command may have begun in the folder at the same time
                if finished and hashlib.sha256(raw.getbuffer()).hexdigest() != finished.get(self.name(k)):
                    raise DataError(
                        f"{files.shown(self.folder / self.name(k))} was drawn by a machine whose numbers differ from this "
                        "one's, and cannot be drawn again here: draw all of it, in another folder"
                    )
                with files.replacing(self.folder / self.name(k)) as handle:
                    handle.write(raw.getbuffer())
                drawn += 1
                say()
        if finished:
            return drawn, True
        complete = all(self._is_there(k, {}) for k in range(len(self.spans)))
        if complete:
            names = [self.name(k) for k in range(len(self.spans))]
            self._write_manifest({name: _sha256(self.folder / name) for name in names})
        return drawn, complete

    def _is_there(self, k: int, finished: dict[str, str]) -> bool:
        """Whether a shard is whole: by its checksum, or, before there is one, by its shape and length."""
        path, (lo, hi) = self.folder / self.name(k), self.spans[k]
        if not path.exists():
            return False
        if finished:
            return _sha256(path) == finished.get(path.name)
        try:
            with files.open_regular(path) as handle:
                if np.lib.format.read_magic(handle) != (1, 0):
                    return False
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(handle)
                size = os.fstat(handle.fileno()).st_size - handle.tell()
        except ValueError:
            return False
        return (shape, fortran, dtype) == ((hi - lo, *self.shape), False, np.dtype("<f4")) and size == 4 * np.prod(
            shape
        )

    def _write_manifest(self, sums: dict[str, str]) -> None:
        text = json.dumps({"format": FORMAT, "run": self.run, "shards": sums}, indent=1)
        with files.replacing(self.folder / MANIFEST) as handle:
            handle.write(f"{text}\n".encode())


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch; then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sha256(path: Path) -> str:
    try:
        with files.open_regular(path) as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise DataError(f"{files.shown(path)} cannot be read ({files.reason(error)}): remove it") from error


@contextlib.contextmanager
def _said(total: int, speaks: bool) -> Iterator[Callable[[], None]]:
    """A bar of shards, or where there is no terminal a line in ten seconds."""
    done, due = 0, time.monotonic() + 10
    with bar(None if speaks else False, total, "sample", "shard") as display:

        def say() -> None:
            nonlocal done, due
            done += 1
            display.update()
            if speaks and not sys.stderr.isatty() and time.monotonic() >= due:
                due = time.monotonic() + 10
                with contextlib.suppress(OSError):  # nobody reads: no reason to lose the run
                    print(f"shard {done} of {total}", file=sys.stderr, flush=True)

        yield say


@contextlib.contextmanager
def _once() -> Iterator[None]:
    """A warning of a shard is not said again of the next ones, whose numbers in it are others."""
    said, as_before = set(), warnings.showwarning

    def show(message: Warning | str, *rest: Any) -> None:
        kind = re.sub(r"[\d.e+-]+", "", str(message))
        if kind not in said:
            said.add(kind)
            as_before(message, *rest)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
