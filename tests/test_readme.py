"""What the README tells a newcomer to type works as it stands."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("fastdiff")
]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_snippets_run(snippet, tmp_path):
    done = subprocess.run([sys.executable, "-W", "error", "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_example_says_what_it_prints():
    shown = subprocess.run([sys.executable, "-c", SNIPPETS[0]], capture_output=True, text=True, check=True).stdout
    variance = float(re.search(r"tensor\(([\d.]+)\)", shown).group(1))
    assert variance == pytest.approx(1, abs=0.15)
    assert "euler_maruyama" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path):
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff.cli", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if "--out" in arguments:
        assert (tmp_path / arguments[arguments.index("--out") + 1]).stat().st_size > 1000


def test_pictures_exist():
    for link in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / link).is_file(), link


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_speeds_are_the_recorded_results():
    path = ROOT / "benchmarks" / "report.py"
    spec = importlib.util.spec_from_file_location("report", path)
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert report.summary() in README
    assert report.results() == (ROOT / "benchmarks" / "RESULTS.md").read_text()


def test_anchors_exist():
    titles = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in re.findall(r"\]\(#(.*?)\)", README):
        assert link in anchors, link
