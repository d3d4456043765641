"""What is kept of a request while it waits: many may, each for minutes. Its body has become tokens, so all
else of it is gone, or counts as held in the budget of bodies."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from support.held_steps import HeldStep
from support.server_fixtures import MODEL, Serve, until

from aioengine import SamplingParams

pytestmark = pytest.mark.slow

SIZE = 300_000
MOST = 200_000
"""Bytes that a waiting request may take besides those that the budget counts."""
LOOKS = 100
"""How often it is looked for more than that: what is kept is still there after a while."""
NUMBERS = [i + 0.5 for i in range(SIZE // 8)]
TEXT = "some words " * (SIZE // 11)
USER = {"role": "user", "content": "Hi"}
COMMENTED = {"type": "object", "properties": {"a": {"type": "integer"}}, "$comment": NUMBERS}
"""A small schema in a large text."""
FUNCTION = {"name": "f", "description": TEXT, "parameters": COMMENTED}


def requests() -> Iterator[tuple[str, dict[str, Any]]]:
    chat, few = {"messages": [USER]}, {"max_tokens": 2}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": COMMENTED, "strict": True}}
    tool = {"type": "function", "function": FUNCTION}
    for n in (1, 2):
        yield "/v1/chat/completions", {**chat, "response_format": schema, "n": n}
        yield "/v1/completions", {"prompt": "Hi", "structured_outputs": {"json": COMMENTED}, "n": n}
    yield "/v1/chat/completions", {**chat, "tools": [tool], "tool_choice": "required"}
    yield "/v1/chat/completions", {**chat, "tools": [tool], "tool_choice": "none"}
    yield "/v1/chat/completions", {**chat, "chat_template_kwargs": {"x": NUMBERS}}
    yield "/v1/chat/completions", {"messages": [{**USER, "extra": NUMBERS}], "metadata": {"x": NUMBERS}}
    flat = {"type": "function", **FUNCTION}
    for fields in ({"tools": [flat], "tool_choice": "none"}, {"tools": [flat], "tool_choice": "required"}):
        yield "/v1/responses", {"input": "Hi", **fields}
    yield "/v1/responses", {"input": "Hi", "text": {"format": {"type": "text", "schema": COMMENTED}}}
    yield (
        "/v1/responses",
        {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": COMMENTED}}},
    )
    anthropic = {"name": "f", "description": TEXT, "input_schema": COMMENTED}
    for kind in ("none", "any"):
        yield "/v1/messages", {**chat, **few, "tools": [anthropic], "tool_choice": {"type": kind}}
    thought = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": TEXT, "input": {"x": NUMBERS}}],
    }
    yield "/v1/messages", {"messages": [USER, thought, USER], **few}


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, bytes]]:
    return [
        (path, json.dumps({"model": MODEL, **body}, ensure_ascii=False).encode()) for path, body in requests()
    ]


async def test_only_what_counts_is_kept_of_requests_that_wait(
    serve: Serve, cases: list[tuple[str, bytes]]
) -> None:
    headers = {"content-type": "application/json"}
    limits = {"max_body_bytes": 4 * SIZE}
    async with serve(max_num_seqs=1, settings=limits) as served:
        for path, body in cases:  # whatever is made once is there
            answer = await served.http.post(path, content=body, headers=headers)
            assert answer.status_code == 200, (path, body[:200], answer.text[:300])
        held = HeldStep()
        params = SamplingParams(max_tokens=1, constraint=held)
        first = asyncio.create_task(served.engine.complete([1], params))
        await until(held.begun.is_set)
        too_much = []
        tracemalloc.start()
        try:
            for path, body in cases:
                gc.collect()
                counted, before = served.app.context.bodies.held, tracemalloc.get_traced_memory()[0]
                waiting = served.engine.stats().waiting
                sent = asyncio.create_task(served.http.post(path, content=body, headers=headers))
                await until(lambda waiting=waiting: served.engine.stats().waiting > waiting)

                # A thread lets go of what it has worked on only after its result is there, and the processor
                # may be elsewhere then; others of the same body may still be tokenized.
                for _ in range(LOOKS):
                    gc.collect()
                    grown = tracemalloc.get_traced_memory()[0] - before
                    told = served.app.context.bodies.held - counted
                    if grown - told <= MOST:
                        break
                    await asyncio.sleep(0.01)
                else:
                    too_much.append((path, body[:200], grown, told))
                print(f"{path} {body[:90]!r}: {grown} bytes, {told} counted")
                sent.cancel()
                await until(lambda waiting=waiting: served.engine.stats().waiting == waiting)
        finally:
            tracemalloc.stop()
            held.go_on.set()
        await first
        assert not too_much, [(path, *rest[1:]) for path, *rest in too_much]
        await until(lambda: served.app.active == 0)
        assert served.app.context.bodies.held == 0
