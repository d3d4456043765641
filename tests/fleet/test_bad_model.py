"""A replica that cannot load its model: the command says why, gives up, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
from support.engine_fixtures import Tiny
from support.fleet_process import SMALL, needs_ray, until

needs_ray()


def processes_with(mark: str) -> list[psutil.Process]:
    """Processes that have inherited the variable ``MARK`` with this value."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark:
                found.append(process)
        except psutil.Error:  # it is another user's, or has ended
            continue
    return found


def test_weights_that_are_broken(tiny_text: Tiny, tmp_path: Path) -> None:
    model = tmp_path / "broken"
    shutil.copytree(tiny_text.model, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "aioengine", "serve", "--model", str(model), "--port", "0", *SMALL]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    ended = subprocess.run(
        [*command, "--dtype", "float32", "--replicas", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**clean, "MARK": mark},
    )
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert "aioengine: the fleet did not start: EngineReplica: " in ended.stderr, last
    assert str(weights) in ended.stderr
    until(lambda: not processes_with(mark), 60)
