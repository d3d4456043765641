"""The time of a request counts from its start, also while its choices wait to begin."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.server_fixtures import MODEL, Serve

TIMEOUT, EACH = 25.0, 0.1


@pytest.mark.parametrize("stream", [False, True])
async def test_waits_before_a_choice_begins_count(
    stream: bool, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One choice is let in at a time, and each takes ``EACH`` seconds."""
    deadlines: list[float] = []
    async with serve(max_waiting_tokens=2, settings={"request_timeout": TIMEOUT}) as served:
        complete, generate = served.engine.complete, served.engine.generate

        async def slow(*given: Any, deadline: float, **options: Any) -> Any:
            deadlines.append(deadline)
            await asyncio.sleep(EACH)
            return await complete(*given, deadline=deadline, **options)

        async def streamed(*given: Any, deadline: float, **options: Any) -> Any:
            deadlines.append(deadline)
            await asyncio.sleep(EACH)
            async for output in generate(*given, deadline=deadline, **options):
                yield output

        monkeypatch.setattr(served.engine, "complete", slow)
        monkeypatch.setattr(served.engine, "generate", streamed)
        body = {"model": MODEL, "prompt": [[5], [6], [7]], "max_tokens": 1, "stream": stream}
        answer = await served.http.post("/v1/completions", json=body)
        assert answer.status_code == 200
    for begun, left in enumerate(deadlines):
        assert TIMEOUT - 20 < left <= TIMEOUT - EACH * begun
    assert len(deadlines) == 3
