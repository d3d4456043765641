"""How the program ends when nobody reads what it says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from aioengine.cli.process import EXIT_INTERRUPTED

INTERRUPTED = """
import os, signal
from aioengine.cli.process import process
process.install()
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("full", [True, False])
def test_a_pipe_that_nobody_reads_holds_up_no_end(full: bool) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    while full:
        try:
            os.write(write, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(write, True)
    ended = subprocess.run([sys.executable, "-c", INTERRUPTED], stderr=write, timeout=60, check=False)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read().lstrip(b"x")
    assert ended.returncode == EXIT_INTERRUPTED
    assert said == (b"" if full else b"aioengine: interrupted\n")
