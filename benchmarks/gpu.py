"""`make gpu`: tests and benchmarks on a CUDA device in one command, under ten minutes, from a bare checkout, with a verdict.

Parts run in the order of their value, each in a process of its own and within its seconds: one that hangs or breaks the device
costs itself alone. `--only` names those that are wanted; the last, "large", runs only if it is named. Leaves <device>.csv,
written as it goes and with the rows of parts that did not run now, and gpu.log in --out (benchmarks/results). Ends, also when
it is cut off, with what held, what was missed, and what was not run and why. Installs nothing: needs a Python with torch,
triton, numpy, pytest, pytest-benchmark, tqdm and safetensors; pytest-xdist makes it quicker.

Exit code: 0 all that ran held; 1 a check failed or was cut off; 2 refused before anything ran; 3 a promised speed was missed.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import provenance

HERE = Path(__file__).resolve().parent
ROOT, LIBRARY = HERE.parent, HERE.parent / "fastdiff" / "libfastdiff.so"
SECONDS = 570.0  # after which whatever runs is cut off
GRACE = 5.0  # from the request to end until the end
LEAST = 15.0  # seconds that a part is begun with
BUILDING = 90.0  # seconds, at most
PROCESSES = 8
OF_TIME = "left out for want of time"
CASES = "tests/test_triton.py::test_compiled_on_the_gpu"  # which runs again what the part "kernels" runs


class Part(NamedTuple):
    title: str
    seconds: float  # at most
    least: int = 1  # checks: fewer are a failure, on a device
    small: bool = True  # whether it is tried without a device


PARTS = {
    "bits": Part("FDN1's bits and those of whole runs, eager and as graphs", 45, least=7),
    "kernels": Part("the kernels' own cases, compiled", 120, least=200, small=False),
    "tests": Part("the tests marked gpu", 110, least=40),
    "operations": Part("operations against memory and eager PyTorch", 170),
    "profile": Part("the kernels' own times", 40),
    "training": Part("training steps as graphs against eager ones", 50),
    "loops": Part("whole runs against eager and compiled loops, float32", 220),
    "networks": Part("group normalisation and a U-Net's call, against PyTorch and diffusers", 90),
    "sanitizer": Part("memory and races, by compute-sanitizer", 100),
    "counters": Part("what the device counts in a step, by ncu", 40),
    "bf16": Part("whole runs in bfloat16", 200),
    "large": Part("a compiled network of 35 million parameters", 540),
}
USUAL = tuple(name for name in PARTS if name != "large")


class CutOff(BaseException):
    """Somebody asked this process to end."""


@dataclass
class Outcome:
    """What became of a part: `state` in a word or two, `why` in a sentence."""

    state: str = "not run"
    why: str = ""
    seconds: float = 0.0
    chosen: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason: tests
    says: dict[str, list[str]] = field(default_factory=lambda: {"held": [], "missed": [], "tried": [], "predicted": []})

    def read(self, notes: Path) -> None:
        """What bare/noted.py wrote, its last line perhaps in part."""
        for line in notes.read_text(encoding="utf-8").splitlines() if notes.exists() else ():
            with contextlib.suppress(ValueError):
                note = json.loads(line)
                if "chosen" in note:
                    self.chosen = list(dict.fromkeys([*self.chosen, *note["chosen"]]))
                elif "says" in note:
                    self.says.setdefault(note["says"], []).append(note["text"])
                elif note["outcome"] == "passed":
                    self.passed.append(note["test"])
                elif note["outcome"] == "failed":
                    self.failed[note["test"]] = note["why"]
                else:
                    # how much time was left is another number for each
                    reason = OF_TIME if note["why"].startswith(OF_TIME) else note["why"]
                    self.skipped.setdefault(reason, []).append(note["test"])
        self.passed = [test for test in self.passed if test not in self.failed]

    @property
    def unreached(self) -> list[str]:
        reached = {*self.passed, *self.failed, *(test for tests in self.skipped.values() for test in tests)}
        return [test for test in self.chosen if test not in reached]

    def judge(self, code: int | None, least: int) -> None:
        """`code`: the exit code, None where it was cut off; `least`: checks that must have passed."""
        if code is None:
            self.state, self.why = "CUT OFF", f"after {self.seconds:.0f} s"
        elif code not in (0, 1, 5):
            self.state, self.why = "FAILED", f"its process ended with {code}"
        elif code == 1 or self.failed:
            self.state, self.why = "FAILED", "" if self.failed else f"its process ended with {code}"
        elif len(self.passed) < least and not (least == 1 and self.skipped):
            self.state, self.why = "FAILED", f"{len(self.passed)} checks ran, of at least {least}"
        elif self.passed:
            self.state = "missed" if self.says["missed"] else "held"


class Session:
    """One call of the script: what it runs, what it prints, and until when."""

    def __init__(self, folder: Path, given: argparse.Namespace, options: Sequence[str], began: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.given, self.options, self.began = folder, given, list(options), began
        self.log = (folder / "gpu.log").open("w", encoding="utf-8", buffering=1)
        self.outcomes = {name: Outcome() for name in PARTS}
        self.cuda = given.device.startswith("cuda")

    def say(self, text: str) -> None:
        self.log.write(text + "\n")
        with contextlib.suppress(OSError, UnicodeError):  # a terminal that went, or has no such letters
            print(text, flush=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def part(self, name: str) -> None:
        """Run a part, unless there is no time for it, and note what became of it."""
        part, outcome, began = PARTS[name], self.outcomes[name], time.monotonic()
        seconds = min(part.seconds, SECONDS - self.elapsed)
        if not (self.cuda or part.small):
            outcome.why = "needs a CUDA device"
        elif seconds < LEAST:
            outcome.why = OF_TIME
        if outcome.why:
            return
        self.say(f"\n== {name}: {part.title} (at most {seconds:.0f} s)")
        arguments, environment = self.arguments(name, seconds)
        code = None
        with tempfile.TemporaryDirectory() as scratch:
            notes = Path(scratch) / "notes"
            command = [
                sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), *arguments, "--tb=short",
                "-p", "noted", f"--notes={notes}", "-p", "no:cacheprovider",
                "-W", "ignore:fastdiff runs on plain PyTorch:RuntimeWarning",
            ]  # fmt: skip
            try:
                code = run(command, seconds, self.say, **environment)
            finally:
                outcome.seconds = time.monotonic() - began
                outcome.read(notes)
                outcome.judge(code, part.least if self.cuda else 1)
        self.say(f"-- {name}: {outcome.state} {outcome.why}".rstrip())

    def arguments(self, name: str, seconds: float) -> tuple[list[str], dict[str, str]]:
        """What pytest is told for a part, and its environment."""
        if name in ("kernels", "tests"):
            # of pytest-benchmark, which warns beside xdist; a test that hangs shows where
            common = ["-q", "-rfE", "-p", "no:benchmark", "-o", "faulthandler_timeout=45"]
            if self.cuda and importlib.util.find_spec("xdist"):
                common += ["-n", str(PROCESSES)]
            if name == "kernels":
                return ["tests/kernel_cases.py", *common], {"FASTDIFF_KERNELS_DEVICE": self.given.device}
            marked = [
                path for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
            ]
            files = ["tests/test_device.py"] if self.given.quick else sorted(f"tests/{path.name}" for path in marked)
            twice = ["--deselect", CASES] if "kernels" in self.given.only else []
            return [*files, "-m", "gpu", *twice, "--continue-on-collection-errors", *common], {}
        # (pytest looks for its configuration around all that follows an option of ours and is a path)
        options = [*self.options, "--device", self.given.device, f"--out={self.folder.resolve()}"]
        options += ["--commit", self.given.commit, "--minutes", f"{(seconds - GRACE - 3) / 60:.3f}"]
        options += ["--quick"] if self.given.quick else []
        return ["benchmarks", "-m", name, "-v", "-s", "-rs", "-W", "ignore", *options], {}

    def verdict(self, ended: str) -> int:
        """Print it; the exit code. `ended`: why the parts that did not run did not, if somebody ended this."""
        found, say = self.outcomes, self.say
        say(
            f"\n{'=' * 30} VERDICT {'=' * 30}\n{self.given.where}; commit {self.given.commit or '-'}; {self.elapsed:.0f} s"
        )
        for name, outcome in found.items():
            if outcome.state == "not run":
                continue
            counts = {"held": len(outcome.passed), "failed": len(outcome.failed), "not reached": len(outcome.unreached)}
            told = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "held")
            say(f"{name:11} {outcome.state} {outcome.why}".rstrip() + f": {told}; {outcome.seconds:.0f} s")
            for test, why in [*outcome.failed.items()][:12]:
                say(f"    {test}: {why[:200]}")
        titles = {
            "missed": "Promised and missed",
            "held": "Promised and held",
            "tried": "Promised, of small numbers that mean nothing",
            "predicted": "Measured beside predictions, which are no measurements",
        }
        for kind, title in titles.items():
            lines = [line for outcome in found.values() for line in outcome.says[kind]]
            if lines:
                say("\n".join([f"\n{title}:", *(f"    {line}" for line in lines)]))
        say("\nNot run:")
        for line in self.missing(ended):
            say(f"    {line}")
        states = {outcome.state for outcome in found.values()}
        code = (
            1 if ended or {"FAILED", "CUT OFF"} & states else 3 if any(o.says["missed"] for o in found.values()) else 0
        )
        word = {0: "HELD" if {"held"} & states else "NOTHING RAN", 1: "FAILED", 3: "MISSED"}[code]
        say(f"\nVERDICT: {word} (exit code {code}). Results and log: {self.folder}")
        return code

    def missing(self, ended: str) -> Iterator[str]:
        """What was not run, and why, a line each."""
        again = []
        for name, outcome in self.outcomes.items():
            if outcome.state == "not run" and not outcome.skipped:
                left_out = "only if it is named" if name not in USUAL else "not among those named"
                reason = outcome.why or (left_out if name not in self.given.only else ended)
                yield f"{name}: {reason}"
            for reason, tests in outcome.skipped.items():
                names = ", ".join(test.rpartition("::")[2] for test in tests[:3])
                more = f" and {len(tests) - 3} more" if len(tests) > 3 else ""
                yield f"{name}: {names}{more}: {reason}"
            unreached = outcome.unreached
            if unreached:
                yield f"{name}: {len(unreached)} checks from {unreached[0].rpartition('::')[2]} on: not reached"
            if outcome.why == OF_TIME or OF_TIME in outcome.skipped or unreached:
                again.append(name)
        again += [name for name in PARTS if name not in USUAL and name not in self.given.only]
        if again:
            yield f"in another command: make gpu ONLY={','.join(again)}"


def run(command: Sequence[str], seconds: float, say: Callable[[str], None], **environment: str) -> int | None:
    """The command's exit code, or None where it was cut off. Its lines are said as they come; what it started ends with it."""
    # not an option of pytest's: a test starts a Python of its own
    paths = os.pathsep.join(filter(None, [str(HERE / "bare"), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        process_group=0,
    )  # fmt: skip
    reader = threading.Thread(target=lambda: [say(line.rstrip("\n")) for line in process.stdout], daemon=True)
    reader.start()
    try:
        return process.wait(seconds - GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # whereupon pytest tells what failed
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE - 1)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits within a driver is left behind
            process.wait(GRACE)
        reader.join(1)
        if not reader.is_alive():  # else something that left the group still has the pipe
            process.stdout.close()


COMPILE = "import pathlib, setup, sys; setup.compile_library(*map(pathlib.Path, sys.argv[1:]))"


def build(say: Callable[[str], None]) -> str:
    """Compile csrc/ in its place, unless that was done; a line that says what became of it."""
    content = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").glob("*.[ch]*")))
    # the library holds it as text (setup.py)
    if LIBRARY.exists() and hashlib.sha256(content).hexdigest()[:16].encode() in LIBRARY.read_bytes():
        return f"{LIBRARY.name}: there, of these sources"
    if run([sys.executable, "-c", COMPILE, str(ROOT / "build" / "gpu"), str(LIBRARY)], BUILDING, say) == 0:
        return f"{LIBRARY.name}: built"
    LIBRARY.unlink(missing_ok=True)  # an older build must not pass for this one
    return "WARNING: the CPU library was not built: large sizes have nothing to be checked against"


DESCRIBED = """
import platform, sys, numpy, pytest, pytest_benchmark, safetensors, tqdm, torch, triton
print(torch.cuda.get_device_name(sys.argv[1]), f"torch {torch.__version__}", f"triton {triton.__version__}", sep=", ", end="")
print(f", Python {platform.python_version()}")
"""


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The script's own arguments, and those that it does not know: they are for benchmarks/conftest.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small numbers, to try the script without a device")
    parser.add_argument("--only", default=",".join(USUAL), help=f"some of {','.join(PARTS)}")
    parser.add_argument(
        "--out",
        type=lambda given: Path(given).expanduser(),
        help="the folder of <device>.csv and gpu.log (benchmarks/results)",
    )
    parser.add_argument("--commit", default="", help="of the sources, where git cannot tell it")
    given, options = parser.parse_known_args(arguments)
    unknown = sorted({*given.only.split(",")} - {*PARTS})
    if unknown:
        parser.error(f"--only {','.join(unknown)}: the parts are {','.join(PARTS)}")
    given.only = [name for name in PARTS if name in given.only.split(",")]
    given.where = "small numbers, to try the script"
    given.commit = given.commit or provenance.commit()
    if given.quick:
        if given.out is None:
            parser.error("--quick only tries the script: give --out, as its numbers are no results")
        return given, options
    if not given.device.startswith("cuda"):
        parser.error(f"--device {given.device} goes with --quick: the script measures CUDA devices")
    if not given.commit:
        parser.error(
            "git knows no commit here, and figures are those of commits: name it, --commit HASH (make: COMMIT=HASH)"
        )
    try:
        provenance.refuse_unclean(given.out or provenance.RESULTS, given.commit)
        provenance.refuse_another(given.out or provenance.RESULTS, given.commit)
    except provenance.Unsaveable as error:
        parser.error(f"{error} (--out FOLDER)")
    asked = subprocess.run([sys.executable, "-c", DESCRIBED, given.device], capture_output=True, text=True)
    if asked.returncode:
        reason = (asked.stderr.strip().splitlines() or ["?"])[-1]
        if reason.startswith(("ModuleNotFoundError", "ImportError")):
            parser.error(f"{sys.executable}: {reason}; another Python: make gpu PYTHON=.venv/bin/python")
        parser.error(
            f"--device {given.device}: {reason}; --device cpu --quick --out FOLDER tries the script on a CPU, for no figures"
        )
    given.where = asked.stdout.strip()
    return given, options


def main(arguments: Sequence[str] | None = None) -> int:
    signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

    def end(number: int, frame: object) -> None:
        for each in signals:  # make and timeout both pass theirs on
            signal.signal(each, signal.SIG_IGN)
        raise CutOff(f"ended by {signal.Signals(number).name}")

    began, ended = time.monotonic(), ""
    given, options = parsed(arguments)
    session = Session(given.out or provenance.RESULTS, given, options, began)
    before = {number: signal.signal(number, end) for number in signals}
    try:
        session.say(given.where)
        session.say(build(session.say))
        for name in given.only:
            session.part(name)
    except CutOff as error:
        ended = str(error)
    code = session.verdict(ended)
    session.log.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    return code


if __name__ == "__main__":
    sys.exit(main())
