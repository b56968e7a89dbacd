"""Which commit the figures of benchmarks/ belong to. Needs no torch.

Figures are those of commits: nothing is saved in benchmarks/results while the sources differ from their commit.
"""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# what the figures depend on
MEASURED = ("fastdiff", "kernels", "csrc", "setup.py", "benchmarks", ":!benchmarks/results")


class Unsaveable(RuntimeError):
    """These figures belong to no commit."""


def commit() -> str:
    """As git names it, "-dirty" where the sources differ from it; "" where git knows none."""
    return _git("describe", "--always") + ("-dirty" if _changed() else "")


def refuse_unclean(folder: Path, named: str) -> None:
    """Raises Unsaveable where figures of the commit `named` would belong to none in the repository's folder of results."""
    if folder.resolve() != RESULTS:
        return
    says, changed = "benchmarks/results holds figures of commits only, and", _changed()
    if changed:
        names = ", ".join([*changed[:3], *([f"{len(changed) - 3} more"] if len(changed) > 3 else [])])
        raise Unsaveable(f"{says} {names} differ from the last commit: commit them first, or run without saving there")
    if not named:
        raise Unsaveable(f"{says} git knows none here: name --commit")


def refuse_another(folder: Path, named: str) -> None:
    """Raises Unsaveable where git knows that the sources are not those of the commit `named`; for the same folder."""
    here = _git("rev-parse", "HEAD") if folder.resolve() == RESULTS else ""
    if here and _git("rev-parse", "--verify", "--quiet", f"{named}^{{commit}}") != here:
        raise Unsaveable(f"benchmarks/results: the sources are those of {here[:7]}, not of {named}")


def _git(*arguments: str) -> str:
    found = shutil.which("git")
    # a repository around a copy without one of its own is not the copy's
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(ROOT.parent)}
    command = [found, *arguments]
    return (
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout.rstrip()
        if found
        else ""
    )


def _changed() -> list[str]:
    """The files on which figures depend and that differ from the last commit."""
    return [line[3:] for line in _git("status", "--porcelain", "--", *MEASURED).splitlines()]
