"""What the README and the pages of docs/ tell a reader to type works as it stands, and what they point at is there."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.cli import main
from fastdiff.inverse import inpainting

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BEGIN, END = "<!-- speeds -->", "<!-- /speeds -->"
# what a page prints about a number -> the number within what, by how much
ABOUT = r"print\((.*)\)  # about ([-\d. and]+)"


def named(pages):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def blocks(page, *languages):
    """(language, text, its first line's number) of the fenced blocks in these languages."""
    text = page.read_text()
    for match in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if match[1] in languages:
            yield match[1], match[2], text.count("\n", 0, match.start(2)) + 1


def prose(page):
    """The text outside fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def run_command(line):
    """A command line as a page has it: fastdiff's run here, others must be those of an installation."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":  # one process makes what several make: tests/test_shards.py, tests/test_ranks.py
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words[1:])
        assert (launch.module, launch.training_script) == (True, "fastdiff")
        words = ["fastdiff", *launch.training_script_args]
    if words[0] == "fastdiff":
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert main(words[1:]) == 0, line
        assert said.getvalue(), line
        for option in ("--out", "--plot"):
            if option in words:
                assert Path(words[words.index(option) + 1]).exists(), line
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name in re.findall(r"\[(.*?)\]", words[-1]):
            assert set(name.split(",")) <= set(extras), line
    else:
        assert words[0] == "make", f"nothing here runs {line!r}"


def a_pipeline(folder):
    """A folder of diffusers, as a reader of the README has downloaded one."""
    diffusers = pytest.importorskip("diffusers")
    small = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    net = diffusers.UNet2DModel(sample_size=16, **small, **kinds)
    diffusers.DDPMPipeline(net, diffusers.DDPMScheduler()).save_pretrained(folder)


@pytest.mark.parametrize("page", named(PAGES))
def test_snippets_and_commands_run(page, tmp_path, monkeypatch):
    """In the page's order, in one folder and one namespace: what a page makes, it may use further on."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # the networks' weights
    if page == PAGES[0]:
        a_pipeline(tmp_path / "pipeline")
    space = {"__name__": "__main__"}
    for language, text, line in blocks(page, "python", "sh"):
        if language == "sh":
            for command in filter(None, (row.split("#")[0].strip() for row in text.splitlines())):
                run_command(command)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile("\n" * (line - 1) + text, page, "exec", dont_inherit=True), space)
        space["said"] = said.getvalue()
        for expression, values in re.findall(ABOUT, text):
            shown = eval(f"({expression},)", space)
            for value, wanted in zip(shown, values.split(" and ")):
                assert float(value) == pytest.approx(float(wanted), abs=0.15), f"{page.name}: {expression}"
    if page == PAGES[0]:
        check_own_array(space["array"], space["new"])
        assert space["theirs"].time_input == "fractional_index"
        assert space["z"].shape == (4, 3, 16, 16)


def check_own_array(array, new):
    """The README's samples have its array's mean and spread, to five standard errors of 500 numbers."""
    assert new.shape == (500, 2)
    assert (abs(new.numpy().mean(0) - array.mean(0)) / array.std(0)).max() < 5 / 500**0.5
    assert abs(np.log(new.numpy().std(0) / array.std(0))).max() < 5 / 1000**0.5


def test_the_tables_printed_are_those_of_the_plan():
    (text,) = [text for _, text, _ in blocks(ROOT / "docs" / "samplers.md", "text")]
    assert text.strip() == fastdiff.plan("vp", 4).explain().strip()


@pytest.mark.parametrize("page", named([*PAGES, *WRITTEN]))
def test_links_lead_somewhere(page):
    def anchors(path):
        titles = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    for link in re.findall(r"\]\((.*?)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", named([*PAGES, *WRITTEN]))
def test_files_and_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    text = page.read_text()
    for target in re.findall(r"`make\s+([a-z]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for file in re.findall(r"`((?:tests|fastdiff|benchmarks|csrc|kernels)/[\w/]+(?:\.\w+|/))`", text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("samplers.md", fastdiff.samplers.SAMPLERS),
        ("samplers.md", fastdiff.grids.GRIDS),
        ("inpainting.md", inpainting.METHODS),
        ("training.md", fastdiff.losses.LOSSES),
        ("training.md", fastdiff.predictions.PREDICTIONS),
        ("training.md", fastdiff.predictions.TIME_INPUTS),
        ("training.md", fastdiff.processes.PROCESSES),
    ],
)
def test_every_name_is_on_its_page(page, names):
    text = (ROOT / "docs" / page).read_text()
    assert [name for name in names if f'"{name}"' not in text] == []


def test_every_public_name_is_in_the_documentation():
    text = "".join(page.read_text() for page in PAGES)
    missing = [name for name in fastdiff.__all__ if not re.search(rf"(fastdiff\.|`){name}\b", text)]
    assert missing == []


def test_the_readme_is_short_and_has_one_table_of_speeds():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    assert text.count(BEGIN) == text.count(END) == 1


def test_the_citation_and_the_changelog_know_the_version():
    assert f"version: {fastdiff.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{fastdiff.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_drawing_of_the_house_is_the_folder():
    """CONTRIBUTING's tree names what `ls fastdiff` shows, and everything in the folders that it opens."""
    tree = next(text for _, text, _ in blocks(ROOT / "CONTRIBUTING.md", "text") if text.startswith("fastdiff/"))
    drawn = {}
    for line in tree.splitlines()[1:]:
        indent, names = re.match(r"( *)((?:\w+(?:\.py|/) ?)+)", line).groups()
        for name in names.split():
            if len(indent) == 2:
                inside = drawn.setdefault(name, set())
            else:
                inside.add(name)

    def listed(folder):
        modules = {path.name for path in folder.glob("*.py")}
        return modules | {
            f"{path.parent.name}/" for path in folder.glob("*/*") if path.suffix in (".py", ".safetensors")
        }

    assert set(drawn) == listed(ROOT / "fastdiff")
    for name, inside in drawn.items():
        assert not inside or inside == listed(ROOT / "fastdiff" / name) - {"__init__.py"}, name


def test_speeds_are_the_recorded_results(monkeypatch):
    """What stands between the marks, in both pages, is what benchmarks/report.py writes there."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import report

    assert (BEGIN, END) == (report.BEGIN, report.END)
    for page, text in (("README.md", report.summary()), ("docs/RESULTS.md", report.results())):
        assert (ROOT / page).read_text().split(BEGIN)[1].split(END)[0].strip() == text
