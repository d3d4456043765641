"""Running the program, or a script around it, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def run_program(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """``aioengine ARGUMENTS`` in a process of its own."""
    return _run([sys.executable, "-m", "aioengine", *arguments], kwargs)


def run_script(script: str, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """A Python script, with ``arguments`` as its ``sys.argv[1:]``."""
    return _run([sys.executable, "-c", script, *arguments], kwargs)


def run_shell(redirection: str, *arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """``aioengine ARGUMENTS`` under a shell's redirection or pipe, such as ">&-"."""
    command = f'"$0" -m aioengine "$@" {redirection}'
    return _run(["bash", "-o", "pipefail", "-c", command, sys.executable, *arguments], kwargs)


def _run(command: Sequence[str], kwargs: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if "input" not in kwargs:
        streams["stdin"] = subprocess.DEVNULL
    return subprocess.run(command, text=True, check=False, timeout=120, **{**streams, **kwargs})
