"""What the program must not say: warnings of libraries about what it does not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
sys.modules["numpy"] = None  # as if it were not installed
sys.argv = ["aioengine", "generate", "--help"]
import runpy
try:
    {run}
finally:
    import torch
"""


def warned(run: str) -> bool:
    command = [sys.executable, "-c", PROGRAM.format(run=run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return "Failed to initialize NumPy" in done.stderr


@pytest.mark.slow
def test_the_program_is_silent_where_numpy_is_missing() -> None:
    assert not warned('runpy.run_module("aioengine", run_name="__main__", alter_sys=True)')


@pytest.mark.slow
def test_the_library_leaves_warnings_as_they_are() -> None:
    assert warned("import aioengine")
