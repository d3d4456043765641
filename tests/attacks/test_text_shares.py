"""A request's work on texts counts with its size, wherever in the request the texts are."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny
from support.server_fixtures import MODEL, Serve

from aioengine import AsyncEngine
from aioengine.errors import AioEngineError
from aioengine.runtime.text_work import SHORT
from aioengine.server import answer as module

SIZE = 20_000
HIDDEN = "x" * SIZE
USER = {"role": "user", "content": "Hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "description": HIDDEN}}}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": HIDDEN})}}
TURNS = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, USER]
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": [{"b": HIDDEN}]}}

CHATS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [USER], "tools": [FUNCTION]}),
    ("/v1/chat/completions", {"messages": [USER], "chat_template_kwargs": {"documents": [{"a": HIDDEN}]}}),
    ("/v1/chat/completions", {"messages": TURNS}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "reasoning_content": HIDDEN}, USER]}),
    (
        "/v1/responses",
        {"input": "Hi", "tools": [{"type": "function", **FUNCTION["function"]}]},  # type: ignore[dict-item]
    ),
    (
        "/v1/responses",
        {"input": [{"type": "function_call", "call_id": "c", **CALL["function"]}, USER]},  # type: ignore[dict-item]
    ),
    ("/v1/messages", {"messages": [USER], "tools": [{"name": "f", "input_schema": SCHEMA}]}),
    ("/v1/messages", {"messages": [USER, {"role": "assistant", "content": [USE]}, USER]}),
    ("/v1/messages/count_tokens", {"messages": [USER], "tools": [{"name": "f", "input_schema": SCHEMA}]}),
    ("/tokenize", {"messages": [USER], "tools": [FUNCTION]}),
    ("/tokenize", {"messages": TURNS}),
]


def sizes_of(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that work on texts counts with, from now on."""
    sizes: list[int] = []
    run: Callable[..., Awaitable[Any]] = engine.text_work.run

    async def noted(size: int, *args: Any, **kwargs: Any) -> Any:
        sizes.append(size)
        return await run(size, *args, **kwargs)

    monkeypatch.setattr(engine.text_work, "run", noted)
    return sizes


async def test_all_that_a_template_may_write_counts(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve() as served:
        sizes = sizes_of(served.engine, monkeypatch)
        for path, body in CHATS:
            sizes.clear()
            most = {"max_tokens": 1} if path == "/v1/messages" else {}
            await served.http.post(path, json={"model": MODEL, **most, **body})
            assert max(sizes, default=0) > SIZE, (path, body)
        sizes.clear()
        await served.http.post("/v1/embeddings", json={"model": "nobody", "input": ["a"] * 1000})
        assert max(sizes) > 10 * 1000  # each is a call of the tokenizer


@pytest.mark.parametrize("stream", [False, True])
async def test_many_ids_are_written_beside_the_loop(
    stream: bool, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small request may ask for the ids of a long prompt, once for each of 128 choices."""
    if stream:  # each choice's first part has them once, and the tiny model has no longer prompts
        monkeypatch.setattr(module, "FORMED_IN_THREAD", 16)
    body = {"model": MODEL, "prompt": [5] * 400, "n": 16, "max_tokens": 1, "stream": stream}
    async with serve(max_model_len=500) as served:
        await served.http.post("/v1/completions", json={**body, "n": 1})
        sizes = sizes_of(served.engine, monkeypatch)
        for wanted in (False, True):
            sizes.clear()
            answer = await served.http.post("/v1/completions", json={**body, "return_token_ids": wanted})
            assert answer.status_code == 200
            assert any(size > SHORT for size in sizes) == wanted


async def test_what_is_written_counts_once(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream takes as much of a tenant's share as its parts alone, and not each part as much as all."""
    monkeypatch.setattr(module, "FORMED_IN_THREAD", 16)
    prompts = [[5] * 300, [6] * 400]
    body = {"model": MODEL, "max_tokens": 1, "stream": True, "n": 2, "return_token_ids": True}
    async with serve(max_model_len=500) as served:
        await served.http.post("/v1/completions", json={**body, "prompt": "Hi"})
        sizes = sizes_of(served.engine, monkeypatch)

        async def written(prompt: Any) -> list[int]:
            sizes.clear()
            answer = await served.http.post("/v1/completions", json={**body, "prompt": prompt})
            assert answer.status_code == 200 and "[DONE]" in answer.text
            return sorted(size for size in sizes if size > SHORT)

        alone = [size for prompt in prompts for size in await written(prompt)]
        assert len(alone) == 4
        assert await written(prompts) == sorted(alone)


async def test_in_the_engine_too(
    tiny_text: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless: list[Any] = [HIDDEN]
    endless.append(endless)
    async with make_engine(tiny_text) as engine:
        sizes = sizes_of(engine, monkeypatch)
        for extra in ({"tool_calls": [CALL]}, {"a": {HIDDEN: 1}}, {"a": endless}):
            sizes.clear()
            with pytest.raises(AioEngineError):
                async for _ in engine.generate([{**USER, "content": "x" * 9_000, **extra}]):
                    pass
            assert max(sizes) > SIZE
