"""A replica that cannot load its model: the command says why, gives up, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.engine_fixtures import Tiny
from support.fleet_process import SMALL, command_line, needs_ray

pytestmark = pytest.mark.slow

needs_ray()


def test_it_says_why_and_leaves_no_process(tiny_text: Tiny, tmp_path: Path) -> None:
    """Neither its own nor Ray's. The model's last weights are missing."""
    weights = Path(shutil.copytree(tiny_text.model, tmp_path / "broken")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    command = [
        sys.executable,
        "-m",
        "aioengine",
        "serve",
        "--model",
        str(weights.parent),
        "--port",
        "0",
        *SMALL,
    ]
    command += ["--dtype", "float32", "--replicas", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    started: set[psutil.Process] = set()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                started.update(psutil.Process(process.pid).children(recursive=True))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 2, said
    assert "aioengine: the fleet did not start: EngineReplica: " in said and str(weights) in said
    assert len(started) > 4, "Ray's, and the replica's"
    left = [process for process in started if process.is_running() and process.status() != "zombie"]
    assert [command_line(process) for process in left] == []
