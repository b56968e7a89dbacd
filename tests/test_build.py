"""setup.py as a user meets it: a wheel for the machine and any Python; and a machine without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def setup(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_wheel_holds_the_library_and_is_for_any_python(tmp_path):
    quick = tmp_path / "compiler"  # as -O3, which setup.py puts last, takes most of the time and nothing here runs
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")))
    quick.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    quick.chmod(0o755)
    done = setup(
        "bdist_wheel", "--dist-dir", tmp_path, "--bdist-dir", tmp_path / "b", "build", "--build-base", tmp_path / "t",
        CXX=str(quick),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert "none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastdiff/libfastdiff.so" in names
    assert "fastdiff/kernels/__init__.py" in names
    assert not any(name.startswith(("kernels", "tests")) for name in names)


def test_without_a_compiler_the_package_builds_and_says_so(tmp_path):
    done = setup("build", "--build-base", tmp_path / "t", "--build-lib", tmp_path / "l", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "NOT built" in done.stderr
    assert "no-such-compiler" in done.stderr
    assert (tmp_path / "l" / "fastdiff" / "sampling.py").exists()
    assert not list((tmp_path / "l").rglob("*.so"))


def test_a_compiler_that_fails_is_as_loud(tmp_path):
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho 'out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = setup("build", "--build-base", tmp_path / "t", "--build-lib", tmp_path / "l", CXX=str(broken))
    assert done.returncode == 0, done.stderr
    assert "NOT built" in done.stderr
    assert not list((tmp_path / "l").rglob("*.so"))


def test_without_ninja_the_library_is_compiled_all_the_same(tmp_path, monkeypatch):
    """The same files with the same flags, one after another."""
    monkeypatch.syspath_prepend(str(ROOT))
    import setup

    compiler, asked = tmp_path / "compiler", tmp_path / "asked"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    library, found = tmp_path / "lib.so", setup.shutil.which
    setup.compile_library(tmp_path / "with", library, "-g")
    with_ninja = sorted(asked.read_text().splitlines())
    asked.unlink()
    library.unlink()
    monkeypatch.setattr(setup.shutil, "which", lambda name: None if name == "ninja" else found(name))
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    setup.compile_library(tmp_path / "with", library, "-g")
    assert library.exists()
    without = sorted(asked.read_text().splitlines())
    assert len(without) == len(setup.SOURCES) + 1
    kept = [
        " ".join(word for word in line.split() if not word.startswith("-M") and ".o.d" not in word)
        for line in with_ninja
    ]
    assert without == kept
