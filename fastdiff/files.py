"""Paths that a user gives, and files that are written whole or not at all; files are read by one descriptor, never mapped."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from .errors import ConfigError, FastdiffError, WriteError, short
from .errors import reason as reason  # what a message of a file says after its name

try:
    import fcntl
except ImportError:  # where there are no such locks, nobody's temporary files are taken for a dead writer's
    fcntl = None  # type: ignore[assignment]


def path(argument: str, value: Any) -> Path:
    """A user's path, with ~ as the home directory; ConfigError for an empty one and for what is no path."""
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise ConfigError(f"{argument} must be a path, got {short(value)}: give a str or a pathlib.Path")
    if not text or "\0" in text:
        raise ConfigError(f"{argument} must be a path, got {short(text)}: write '.' for the current folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{argument} starts with the home of a user who is not known, got {short(text)}") from error


def shown(path: os.PathLike[str] | str) -> str:
    """A path for a message: on one line, at most 60 characters, its end rather than its beginning."""
    text = os.fspath(path)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 60 else f"…{text[-59:]}"


def open_regular(path: Path) -> IO[bytes]:
    """A file to read; OSError for a pipe, a socket or a device, at which reading would wait."""
    handle = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)), "rb")
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError("it is not a regular file")
    return handle


@contextlib.contextmanager
def replacing(target: Path, failure: type[FastdiffError] = WriteError) -> Iterator[IO[bytes]]:
    """A temporary file beside `target`, which takes its place when the block ends without an error; else `failure`.

    It is flushed to the disk before, and its folder after; an existing file's permissions are kept.
    """
    replaced = False
    try:
        with _temporary(target) as (temporary, handle):
            with contextlib.suppress(OSError):
                if stat.S_ISREG((old := os.lstat(target)).st_mode):
                    os.chmod(temporary, stat.S_IMODE(old.st_mode))
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            os.replace(temporary, target)
            replaced = True
            flush_folder(target.parent)
    except OSError as error:
        state = "it was replaced, but may not outlast a power cut" if replaced else "what stood there is untouched"
        raise failure(f"{shown(target)} could not be written ({reason(error)}): {state}") from error


def check_writable(argument: str, target: Path, failure: type[FastdiffError] = ConfigError) -> None:
    """Refuse a file that `replacing` could not write, by trying; what killed writers of it left behind is removed."""
    if target.is_dir():
        raise failure(f"{argument} must be a file, got the folder {shown(target)}")
    try:
        with _temporary(target):
            pass
    except OSError as error:
        where = shown(target)
        raise failure(
            f"{argument}: no file can be written at {where} ({reason(error)}): choose another folder"
        ) from error


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A new file beside `target`, locked while its writer lives, and gone at the end."""
    # of one length for any name: a name may be as long as the file system allows
    stem = f".fastdiff-{zlib.crc32(os.fsencode(target.name)):08x}-"
    for left in target.parent.glob(f"{stem}*.tmp"):
        _remove_if_dead(left)
    while True:
        temporary = target.with_name(f"{stem}{secrets.token_hex(4)}.tmp")
        with open(temporary, "xb") as handle:
            try:
                if not _lock(handle):
                    continue  # another writer took it for a dead one's before it was locked
                yield temporary, handle
                return
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink()


def _lock(handle: IO[bytes]) -> bool:
    """Lock a file that one has just made; False if another has removed it, or is about to."""
    held = hold(handle.fileno())
    # without locks nobody removes what is another's
    return held is None or (held and os.fstat(handle.fileno()).st_nlink > 0)


def hold(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed: False if another holds it, None where there are no such locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        return None
    return True


def _remove_if_dead(temporary: Path) -> None:
    """Remove a writer's temporary file if the writer no longer holds its lock."""
    with contextlib.suppress(OSError), open_regular(temporary) as handle:
        if hold(handle.fileno()):
            temporary.unlink()


def flush_folder(folder: Path) -> None:
    """Flush a rename to the disk; some file systems, and folders that may be written but not read, cannot."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno == errno.EIO:
            raise
    finally:
        os.close(descriptor)
