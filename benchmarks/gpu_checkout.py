"""Makes a bare checkout importable: fastdiff from its root, and fastdiff.kernels from the folder kernels/, as setup.py says.

For a machine on which nothing is installed. `import gpu_checkout` serves this process; under the name sitecustomize.py in a
folder of PYTHONPATH the file serves a Python and all that it starts.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name == "fastdiff.kernels" else None


sys.path.insert(0, str(ROOT))
sys.meta_path.append(_Finder())
