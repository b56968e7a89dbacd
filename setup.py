"""The one thing pyproject.toml cannot say: the folder kernels/ is the package fastdiff.kernels.

(PyPI's `kernels` owns the bare import name, so the folder must not be installed as a top-level package.)
"""

from setuptools import setup

setup(
    packages=[
        "fastdiff",
        "fastdiff.checkpoints",
        "fastdiff.kernels",
        "fastdiff.models",
        "fastdiff.reference",
        "fastdiff.solvers",
        "fastdiff.training",
    ],
    package_dir={"fastdiff.kernels": "kernels"},
    package_data={"fastdiff.checkpoints": ["*.safetensors"]},
)
