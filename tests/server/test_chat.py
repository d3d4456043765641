"""/v1/chat/completions with the official client."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest
from support.engine_fixtures import greedy
from support.server_fixtures import MODEL, Serve

MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
NO_EOS = {"ignore_eos": True}


async def test_streaming_adds_up(serve: Serve) -> None:
    async with serve() as served:
        expected = await served.engine.complete(MESSAGES, greedy(12))
        stream = await served.client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=NO_EOS,
        )
        *parts, last = [chunk async for chunk in stream]
        assert parts[0].choices[0].delta.role == "assistant"
        assert {part.choices[0].delta.role for part in parts[1:]} <= {None}
        assert "".join(part.choices[0].delta.content or "" for part in parts) == expected.text
        assert [p.choices[0].finish_reason for p in parts] == [None] * (len(parts) - 1) + ["length"]
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
async def test_logprobs(stream: bool, serve: Serve) -> None:
    async with serve() as served:
        expected = await served.engine.complete(MESSAGES, greedy(8))
        arguments: dict[str, Any] = {
            "model": MODEL,
            "messages": MESSAGES,
            "max_tokens": 8,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 2,
            "extra_body": NO_EOS,
        }
        entries = []
        if stream:
            async for chunk in await served.client.chat.completions.create(stream=True, **arguments):
                found = chunk.choices[0].logprobs
                entries += (found.content or []) if found else []
        else:
            answer = await served.client.chat.completions.create(**arguments)
            assert answer.choices[0].logprobs is not None
            entries = answer.choices[0].logprobs.content or []
        assert len(entries) == 8
        assert (
            b"".join(bytes(entry.bytes or []) for entry in entries).decode(errors="replace") == expected.text
        )
        for entry in entries:
            assert len(entry.top_logprobs) == 2
            assert entry.logprob == entry.top_logprobs[0].logprob
            assert sum(math.exp(top.logprob) for top in entry.top_logprobs) < 1


async def test_content_may_come_in_parts(serve: Serve) -> None:
    async with serve() as served:
        parts: Any = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]}]
        joined: Any = [{"role": "user", "content": "one\ntwo"}]
        answers = [
            await served.client.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=8, temperature=0, extra_body=NO_EOS
            )
            for messages in (parts, joined)
        ]
        assert answers[0].choices[0].message == answers[1].choices[0].message


async def test_without_max_tokens_the_context_is_the_bound(serve: Serve) -> None:
    async with serve(max_model_len=64) as served:
        answer = await served.client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, extra_body=NO_EOS
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.total_tokens == 64


REFUSED: list[tuple[Any, ...]] = [
    ({"functions": []}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"audio": {}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities[1]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"chat_template_kwargs": {"messages": []}}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
]


@pytest.mark.slow
async def test_what_would_change_the_answer_is_refused(serve: Serve) -> None:
    async with serve() as served:
        for fields, param in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                await served.client.chat.completions.create(
                    model=MODEL, messages=MESSAGES, max_tokens=2, extra_body=fields
                )
            assert caught.value.param == param, fields


async def test_any_name_may_be_a_templates_variable(serve: Serve) -> None:
    async with serve() as served:
        for name in ("self", "func", "model", "tokenizer"):
            body = {"messages": MESSAGES, "chat_template_kwargs": {name: 1}}
            for path, more in (
                ("/v1/chat/completions", {"model": MODEL, "max_tokens": 1}),
                ("/tokenize", {}),
            ):
                answer = await served.http.post(path, json={**body, **more})
                assert (answer.status_code, name) == (200, name)
