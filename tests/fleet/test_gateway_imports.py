"""A gateway needs no torch: neither two seconds of imports before Ray starts, nor the memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.engine_fixtures import Tiny

from aioengine.memory_plan import _may_have_gpu

PREPARED = """
import sys
from pathlib import Path
from aioengine import EngineConfig
from aioengine.fleet import FleetConfig
from aioengine.fleet.deployment import plan_replica, read_model
config = FleetConfig(engine=EngineConfig(model=sys.argv[1], device=sys.argv[2]), replicas=2)
planned, plan = plan_replica(config, share=2)
_, _, tokenizer = read_model(config, plan)
import aioengine.fleet.gateway.client, aioengine.server.app
assert plan.device == "cpu" and tokenizer is not None
print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
"""What `aioengine serve --replicas` does on its own side before its replicas are there."""


@pytest.mark.parametrize("device", ["cpu", "auto"])
@pytest.mark.slow
def test_a_gateway_needs_no_torch(device: str, tiny_text: Tiny) -> None:
    if device == "auto" and _may_have_gpu():
        pytest.skip("here the plan has to ask torch whether there is a GPU")
    command = [sys.executable, "-c", PREPARED, str(tiny_text.model), device]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
