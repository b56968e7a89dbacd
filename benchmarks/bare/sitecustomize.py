"""Makes a bare checkout importable: fastdiff from its root, and fastdiff.kernels from the folder kernels/, as setup.py says.

For a machine on which nothing is installed: with this folder in PYTHONPATH it serves a Python and all that it starts.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class _Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        return PathFinder.find_spec(name, [str(ROOT)]) if name == "fastdiff.kernels" else None


sys.path.insert(0, str(ROOT))
sys.meta_path.insert(0, _Finder())  # before those of a fastdiff that is installed
