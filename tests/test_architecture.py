"""The house: which room may import which, how many there are on how many floors; read off the syntax trees."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastdiff"
# a folder or file of the package -> what of the package it may import; FACE is `fastdiff` itself
FACE = ""
BASE = {"checks", "errors", "files"}
MODEL = BASE | {"execution", "planning", "model"}
RUN = MODEL | {"table", "probability_flow", "runs"}
RULES = {
    "errors": set(),
    "checks": {"errors"},
    "files": {"errors"},
    "table": {"errors", "files", "checks"},
    "planning": BASE | {"table"},
    "execution": BASE | {"table", "kernels"},
    "kernels": set(),
    "papers": set(),
    "networks": BASE | {"execution"},
    "data": BASE | {"execution"},
    "model": MODEL - {"model"},
    "losses": MODEL | {"data"},
    "mcmc": MODEL,
    "autoencoder": BASE - {"files"} | {"execution"},
    "probability_flow": MODEL,
    "runs": RUN - {"runs"},
    "guidance": MODEL | {"table"},
    "inverse": MODEL | {"table", "guidance"},
    "sampling": RUN | {"guidance", "inverse"},
    "likelihood": RUN,
    "conventions": MODEL | {"data"},
    "optimization": MODEL,
    "metrics": BASE | {"execution", "data"},
    "training": MODEL | {"losses", "networks", "data"},
    "cli": MODEL | {"networks", "data", "sampling", "likelihood", "training", "conventions", "metrics"} | {"inverse"},
    FACE: MODEL
    | {
        "autoencoder",
        "guidance",
        "inverse",
        "table",
        "losses",
        "mcmc",
        "metrics",
        "networks",
        "data",
        "sampling",
        "likelihood",
        "training",
        "conventions",
        "optimization",
    },
}
NO_TORCH = {"planning", "table", "checks", "errors", "files"}


def modules():
    """Module name within fastdiff -> its file; kernels/ is fastdiff.kernels."""
    found = {}
    for folder, prefix in ((PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            name = prefix + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix(".__init__").removesuffix("__init__").rstrip(".")] = path
    return found


MODULES = modules()


@functools.cache
def imports(name):
    """(absolute names outside fastdiff, modules of fastdiff) that a module imports anywhere in its file.

    A name that is no module is its package's own: `from . import sample` imports the package.
    """
    package = [part for part in name.split(".") if part]
    if MODULES[name].name != "__init__.py":
        package = package[:-1]
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "fastdiff":
                    inside.add(rest)
                else:
                    outside.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            parts = [part for part in (node.module or "").split(".") if part]
            if node.level:
                parts = [*package[: len(package) - (node.level - 1)], *parts]
            elif parts[0] != "fastdiff":
                outside.add(node.module)
                continue
            else:
                parts = parts[1:]
            for alias in node.names:
                deep = ".".join([*parts, alias.name])
                inside.add(deep if deep in MODULES else ".".join(parts))
    return outside, inside - {name}


def room(name):
    return "cli" if name == "__main__" else name.split(".")[0]  # the command's door


def test_every_room_has_its_rule():
    assert {room(name) for name in MODULES} == RULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_every_room_imports_only_what_lies_below_it(name):
    outside, inside = imports(name)
    assert {room(i) for i in inside} <= RULES[room(name)] | {room(name)}, inside
    if room(name) in NO_TORCH:
        assert not {o.split(".")[0] for o in outside} & {"torch", "importlib"}


def test_planning_works_where_there_is_no_torch():
    """The package's own __init__, which loads both wings, is left out."""
    code = (
        "import sys, types; sys.modules['torch'] = None; package = types.ModuleType('fastdiff'); "
        f"package.__path__ = [{str(PACKAGE)!r}]; sys.modules['fastdiff'] = package; "
        "from fastdiff.planning.plan import plan; print(len(plan('vp', 10)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(shown.stdout) == 10


def test_only_ops_imports_the_kernels():
    for name in MODULES:
        if name != "execution.ops" and not name.startswith("kernels"):
            assert not any(i.startswith("kernels") for i in imports(name)[1]), name


def test_nothing_of_the_library_imports_the_papers():
    assert not [name for name in MODULES if room(name) != "papers" and "papers" in map(room, imports(name)[1])]


def test_no_import_circles():
    """A package's __init__ re-exports its own modules; they may not import it back."""
    TopologicalSorter({name: imports(name)[1] & MODULES.keys() - {""} for name in MODULES if name}).prepare()


def test_the_house_is_small_and_its_arrows_point_down():
    """Rooms are the files and folders at the package's top, arrows who imports whom; a room stands above all that it imports."""
    house = {room(name): set() for name in MODULES}
    for name in MODULES:
        house[room(name)] |= {room(i) for i in imports(name)[1]} - {room(name)}
    floors = {}
    for name in TopologicalSorter(house).static_order():  # a circle, which has an arrow upward, is an error
        floors[name] = 1 + max((floors[below] for below in house[name]), default=0)
    assert len(house) <= 26
    assert max(floors.values()) <= 9, floors
    assert sum(map(len, house.values())) <= 5 * len(house)
    assert floors["planning"] == floors["execution"] == floors["table"] + 1


@pytest.mark.parametrize("folder", [ROOT, Path("/")])
def test_kernels_are_found_from_the_checkout_and_from_elsewhere(folder):
    code = "import fastdiff, fastdiff.kernels; print(fastdiff.kernels.__file__)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert Path(shown.stdout.strip()).parent.name == "kernels"


def test_importing_touches_no_pictures_no_data_and_no_gpu():
    code = (
        "import sys, fastdiff, torch; heavy = ('matplotlib', 'sklearn', 'PIL', 'scipy'); "
        "print([name for name in heavy if name in sys.modules], torch.cuda.is_initialized())"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[] False"


def test_habits():
    """No assert for user errors, no broad except, no unsafe load, no leftover."""
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Assert), f"{name}: assert vanishes under -O"
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{name}: bare except"
                if isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"):
                    # whatever it is, it goes on as an exception
                    assert isinstance(node.body[-1], ast.Raise), name
        text = path.read_text()
        for word in ("weights_only", "pickle.load", "TODO", "FIXME", "XXX"):
            assert word not in text, f"{name}: {word}"
