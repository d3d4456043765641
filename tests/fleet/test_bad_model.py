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
from support.fleet_process import SMALL, command_line, needs_ray, until
from support.ray_nodes import Nodes

pytestmark = pytest.mark.slow

needs_ray()


@pytest.fixture
def broken(tiny_text: Tiny, tmp_path: Path) -> Path:
    """A model whose last weights are missing."""
    model = tmp_path / "broken"
    shutil.copytree(tiny_text.model, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return model


def check_refusal(model: Path, environment: dict[str, str]) -> set[psutil.Process]:
    """Have the command give up. Returns the processes that it has started."""
    command = [sys.executable, "-m", "aioengine", "serve", "--model", str(model), "--port", "0", *SMALL]
    command += ["--dtype", "float32", "--replicas", "1"]
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
    assert "aioengine: the fleet did not start: EngineReplica: " in said
    assert str(model / "model.safetensors") in said
    return started


def test_on_a_cluster(nodes: Nodes, broken: Path) -> None:
    kinds = ("EngineReplica", "ServeController", "AdapterRegistry")
    before = {kind: nodes.workers(kind).keys() for kind in kinds}  # Serve's, where other tests ran it here
    check_refusal(broken, {**os.environ, "RAY_ADDRESS": nodes.address})
    for kind in kinds:
        until(lambda kind=kind: nodes.workers(kind).keys() <= before[kind])  # type: ignore[misc]


def test_with_a_ray_of_its_own(broken: Path) -> None:
    started = check_refusal(broken, {k: v for k, v in os.environ.items() if not k.startswith("RAY_")})
    assert len(started) > 4, "Ray's, and the replica's"
    left = [process for process in started if process.is_running() and process.status() != "zombie"]
    assert [command_line(process) for process in left] == []
