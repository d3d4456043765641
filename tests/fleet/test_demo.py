"""The demo on a fleet: its page shows all replicas while it runs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from rich.console import Console
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here, small_engine

from aioengine.cli.demo.command import Demo, demo_on_fleet
from aioengine.cli.demo.jobs import Job
from aioengine.cli.fleet import started
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway.client import FleetClient

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")


async def test_its_page_shows_both_replicas_while_it_runs(
    tiny_text: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FleetConfig(engine=small_engine(tiny_text), replicas=2)
    seen: list[dict[str, Any]] = []

    @asynccontextmanager
    async def here(*_: Any) -> AsyncIterator[FleetClient]:
        async with fleet_here(config, monkeypatch) as fleet:
            yield fleet.client

    class Looked(Demo):
        """Looks at the page when all requests have been answered."""

        async def run(self, client: Any) -> int:
            found = await super().run(client)
            [url] = re.findall(r"http://\S+", capsys.readouterr().out)
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http:
                assert "<html" in (await http.get("/")).text
                async with http.stream("GET", "/events") as events:
                    async for line in events.aiter_lines():
                        if line.startswith("data:"):
                            seen.append(json.loads(line.removeprefix("data:")))
                            break
            return found

    monkeypatch.setattr(started, "started_fleet", here)
    prompt: list[Any] = [5, 6, 7, 8]
    jobs = [Job(f"request-{i}", None, "", prompt, None) for i in range(2)]
    assert await demo_on_fleet(config, Looked(jobs, greedy(6), Console(file=io.StringIO()))) == 0
    assert {slot["replica"] for slot in seen[0]["slots"]} == {"r0", "r1"}
