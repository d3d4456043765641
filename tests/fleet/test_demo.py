"""The demo on a fleet."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from rich.console import Console
from support.engine_fixtures import Tiny, greedy
from support.fleet_here import fleet_here, small_engine

from aioengine.cli.demo.board import Board
from aioengine.cli.demo.command import Opened, show
from aioengine.cli.demo.jobs import Job
from aioengine.fleet.config import FleetConfig

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")


async def test_it_ends_with_the_replicas_of_its_requests(
    tiny_text: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FleetConfig(engine=small_engine(tiny_text), replicas=2)

    @asynccontextmanager
    async def here() -> AsyncIterator[Opened]:
        async with fleet_here(config, monkeypatch) as fleet:
            yield fleet.client, fleet.client.replica_of

    prompt: list[Any] = [5, 6, 7, 8]
    said: list[str] = []
    board = Board([Job(f"request-{i}", None, "", prompt, None) for i in range(2)], said.append)
    shown = io.StringIO()
    assert await show(here(), board, greedy(6), Console(file=shown)) == 0
    assert {row.replica for row in board.rows.values()} <= {"r0", "r1"}
    assert {row.tokens for row in board.rows.values()} == {6}
    assert "replicas" in shown.getvalue() and "request-1 done" in " ".join(said)
