"""Wheels with the CPU kernels compiled: ``make wheel``. All else is in pyproject.toml.

``AIOENGINE_PREBUILD_KERNELS`` names the levels to compile, separated by commas, or is "all" for every level
of this machine's architecture. Without it a wheel has the sources alone, and works on any machine. For
another architecture set ``CXX`` to a compiler for it, and ``_PYTHON_HOST_PLATFORM`` ("linux-aarch64"), as
Python's own cross builds do.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

WANTED = os.environ.get("AIOENGINE_PREBUILD_KERNELS", "")
ROOT = Path(__file__).parent


def builder() -> ModuleType:
    """kernels/cpu/build.py, which needs nothing but Python; its package would import torch."""
    spec = importlib.util.spec_from_file_location("kernels_build", ROOT / "kernels" / "cpu" / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildWithKernels(build_py):
    """Compiles the kernels into the package."""

    def run(self) -> None:
        super().run()
        if WANTED and not self.editable_mode:
            names = None if WANTED == "all" else WANTED.split(",")
            folder = Path(self.build_lib) / "aioengine" / "kernels" / "cpu" / "prebuilt"
            shutil.rmtree(folder, ignore_errors=True)  # what an earlier build of other sources has left
            compiling = builder()
            compiling.COMPILE_SECONDS = 3600  # nobody waits to be served, and the machine may be slow
            compiling.prebuild(folder, names, os.environ.get("_PYTHON_HOST_PLATFORM", "").rpartition("-")[2])


class PlatformWheel(bdist_wheel):
    """For one platform and any Python, if it has compiled kernels: they know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if WANTED else (python, abi, platform)


class Platform(Distribution):
    def has_ext_modules(self) -> bool:
        return bool(WANTED) or super().has_ext_modules()


setup(distclass=Platform, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
