"""A replica that cannot load its model: the command says why, gives up, and leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support.engine_fixtures import Tiny
from support.fleet_process import SMALL, needs_ray, until
from support.ray_nodes import Nodes

needs_ray()


def test_weights_that_are_broken(nodes: Nodes, tiny_text: Tiny, tmp_path: Path) -> None:
    model = tmp_path / "broken"
    shutil.copytree(tiny_text.model, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    command = [sys.executable, "-m", "aioengine", "serve", "--model", str(model), "--port", "0", *SMALL]
    ended = subprocess.run(
        [*command, "--dtype", "float32", "--replicas", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, "RAY_ADDRESS": nodes.address},
    )
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert "aioengine: the fleet did not start: EngineReplica: " in ended.stderr, last
    assert str(weights) in ended.stderr
    for kind in ("EngineReplica", "ServeController", "AdapterRegistry"):
        until(lambda kind=kind: not nodes.workers(kind))  # type: ignore[misc]
