"""What pyproject.toml cannot say: that fastdiff.kernels is the folder kernels/, and how csrc/ becomes fastdiff/libfastdiff.so.

The library has a plain C ABI: it needs neither torch nor Python to build, and one build serves every version of both. Each
instruction set is one source file, compiled with flags of its own. ninja compiles them in parallel, and only what changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# -ffp-contract=off: the library's results are those of the reference to the bit, so a product and a sum are fused exactly where
# the source calls fma(); GCC's default would fuse others too, where the instruction set has the instruction.
# -fno-math-errno, -fno-trapping-math: nobody reads errno or floating-point traps, and then sqrt and rint are instructions and
# loops of comparisons become vectors. No number depends on either.
# -fstack-clash-protection: a small stack that runs out ends in a fault, never in another thread's memory.
FLAGS = (
    "-std=c++17 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math -fstack-clash-protection -fvisibility=hidden "
    "-Wall -Wextra"
)
# A user's CXXFLAGS follow and win; if they change numbers (-ffast-math), the library is refused when it is loaded, by its
# answers. Last stands what CXXFLAGS often say without meaning this library, which is several times slower at -O2.
LAST = "-O3"
SOURCES = {"fastdiff": "", "plain": ""}
if platform.machine().lower() in ("x86_64", "amd64"):
    # (gcc calls the undefined lanes of its own AVX-512 headers uninitialised)
    # (prefetchw: a processor that has AVX2 and no such instruction takes it for none)
    SOURCES["avx2"] = "-mavx2 -mfma -mf16c -mprfchw"
    SOURCES["avx512"] = (
        "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -mf16c -mprfchw -mprefer-vector-width=512 "
        "-Wno-maybe-uninitialized -Wno-uninitialized"
    )


def units() -> dict[str, str]:
    """The files of csrc/ that are compiled, with the flags of each; fastdiff.cpp is told which sources these are."""
    files = sorted((ROOT / "csrc").glob("*.[ch]*"))
    sources = hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]
    return {**SOURCES, "fastdiff": f'-DFASTDIFF_SOURCES=\\"{sources}\\"'}


def flags_of(extra: str) -> str:
    """The flags of every file and of the linker."""
    return f"{FLAGS} {extra} {LAST}"  # the later one wins


def write_build(folder: Path, library: Path, compiler: str, extra: str) -> None:
    """A build.ninja that makes `library` from csrc/."""
    escape = lambda path: str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")  # noqa: E731
    lines = [
        f"cxx = {compiler}",
        f"flags = {flags_of(extra)}",
        "rule compile",
        "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $flags -shared $in -o $out -lm",
    ]
    objects = []
    for name, isa in units().items():
        objects.append(escape(folder / f"{name}.o"))
        lines += [f"build {objects[-1]}: compile {escape(ROOT / 'csrc' / name)}.cpp", f"  isa = {isa}"]
    lines += [f"build {escape(library)}: link {' '.join(objects)}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))


def compile_library(folder: Path, library: Path, extra: str = "") -> None:
    """Compile csrc/ in `folder` to `library`, with `extra` flags for the compiler and the linker."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None or not shutil.which(shlex.split(compiler)[0]):
        raise FileNotFoundError(f"no C++ compiler ({compiler or 'g++, clang++ or c++'})")
    write_build(folder, library, compiler, extra)
    found = shutil.which("ninja")
    if found or importlib.util.find_spec("ninja"):
        command = [found] if found else [sys.executable, "-m", "ninja"]
        subprocess.run([*command, "-C", str(folder)], check=True, stdout=sys.stderr)
        return
    flags, objects = shlex.split(f"{compiler} {flags_of(extra)}"), []
    for name, isa in units().items():  # as on a machine where nothing is to be installed (benchmarks/gpu.py)
        objects.append(str(folder / f"{name}.o"))
        source = str(ROOT / "csrc" / f"{name}.cpp")
        subprocess.run([*flags, *shlex.split(isa), "-c", source, "-o", objects[-1]], check=True, stdout=sys.stderr)
    subprocess.run([*flags, "-shared", *objects, "-o", str(library), "-lm"], check=True, stdout=sys.stderr)


class Build(build_ext):
    """Builds the library if there is a compiler; without one the package runs on plain PyTorch, and says so."""

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, extension: Extension) -> None:
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        folder = Path(self.build_temp).resolve() / "csrc"
        library.parent.mkdir(parents=True, exist_ok=True)
        try:
            compile_library(folder, library, os.environ.get("CXXFLAGS", ""))
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            print(
                f"\n*** fastdiff: the fused CPU kernels were NOT built ({error}); fastdiff will run on plain PyTorch, "
                "several times slower. ***\n",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        if os.path.exists(os.path.join(self.build_lib, self.get_ext_filename("fastdiff.libfastdiff"))):
            super().copy_extensions_to_source()
        else:  # an older build must not pass for this one
            (ROOT / "fastdiff" / "libfastdiff.so").unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]


class Wheel(bdist_wheel):
    """The library depends on the machine, not on the Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), "fastdiff.checkpoints", "fastdiff.kernels"],
        package_dir={"fastdiff.kernels": "kernels"},
        package_data={"fastdiff": ["py.typed"], "fastdiff.checkpoints": ["*.safetensors"]},
        ext_modules=[Extension("fastdiff.libfastdiff", sources=[])],
        cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
    )
