"""The garbage collector of a server visits what requests make, and not the engine and its libraries."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from support import collected
from support.engine_fixtures import Tiny
from support.server_process import serving

pytestmark = pytest.mark.slow


async def test_full_collections_visit_little(tiny_text: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "collected.json"
    tests = str(Path(__file__).parents[1])
    flags = {"module": collected.__name__, collected.FILE: str(file), "PYTHONPATH": tests}
    async with (
        serving(tiny_text.model, "--served-model-name", "tiny", **flags) as server,
        httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as http,
    ):
        found = {"frozen": 0, "visited": 0}
        for _ in range(100):
            if found["frozen"]:  # in the first full collection after the start
                break
            body = {"model": "tiny", "prompt": "Hi", "max_tokens": 20, "logprobs": 5, "ignore_eos": True}
            asks = [http.post("/v1/completions", json=body) for _ in range(50)]
            assert {answer.status_code for answer in await asyncio.gather(*asks)} == {200}
            if file.exists():
                found = json.loads(file.read_text())
    assert found["frozen"] > 10 * found["visited"], found
