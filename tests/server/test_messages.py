"""/v1/messages with Anthropic's client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from support.engine_fixtures import MakeEngine, Tiny
from support.server_fixtures import MODEL, Serve, Served, served_by

USER: Any = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"color": {"enum": ["red", "green"]}}, "required": ["color"]}
PAINT: Any = {"name": "paint", "description": "Paints.", "input_schema": SCHEMA}
GREEDY: Any = {"temperature": 0}
SAME_AS_CHAT: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "One moment.",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "paint", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "done"},
    {"role": "user", "content": "And?"},
]
MESSAGES: list[Any] = [
    {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "...", "signature": "s"},
            {"type": "text", "text": "One moment."},
            {"type": "tool_use", "id": "1", "name": "paint", "input": {}},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "done"}]},
            {"type": "text", "text": "And?"},
        ],
    },
]


@contextlib.asynccontextmanager
async def client_of(served: Served, key: str = "none") -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=served.url, api_key=key, max_retries=0) as client:
        yield client


async def test_equals_the_chat(serve: Serve) -> None:
    async with serve() as served, client_of(served) as client:
        chat = await served.client.chat.completions.create(
            model="a", messages=SAME_AS_CHAT, max_tokens=12, temperature=0
        )
        answer = await client.messages.create(
            model="a", system="Be brief.", messages=MESSAGES, max_tokens=12, extra_body=GREEDY
        )
        [block] = answer.content
        assert block.type == "text"
        assert block.text == chat.choices[0].message.content
        assert (answer.stop_reason, answer.role) == ("max_tokens", "assistant")
        assert chat.usage is not None
        read = answer.usage.cache_read_input_tokens or 0
        assert answer.usage.input_tokens + read == chat.usage.prompt_tokens
        counted = await client.messages.count_tokens(model="a", system="Be brief.", messages=MESSAGES)
        assert counted.input_tokens == chat.usage.prompt_tokens


async def test_events_of_a_text(serve: Serve) -> None:
    async with serve() as served, client_of(served) as client:
        fields: Any = {"model": MODEL, "messages": USER, "max_tokens": 9, "extra_body": GREEDY}
        events = [event async for event in await client.messages.create(stream=True, **fields)]
        deltas = sum(event.type == "content_block_delta" for event in events)
        assert deltas > 1
        assert [event.type for event in events] == [
            "message_start",
            "content_block_start",
            *["content_block_delta"] * deltas,
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        async with client.messages.stream(**fields) as stream:
            streamed = await stream.get_final_message()
        whole = await client.messages.create(**fields)
        assert [b.type == "text" and b.text for b in streamed.content] == [
            b.type == "text" and b.text for b in whole.content
        ]
        assert streamed.stop_reason == whole.stop_reason == "max_tokens"
        assert streamed.usage.output_tokens == whole.usage.output_tokens == 9


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "paint"}])
@pytest.mark.slow
async def test_calls(choice: Any, serve: Serve) -> None:
    async with serve(max_model_len=500) as served, client_of(served) as client:
        fields: Any = {"model": MODEL, "messages": USER, "max_tokens": 300}
        fields |= {"tools": [PAINT], "tool_choice": choice}
        events = [event async for event in await client.messages.create(stream=True, **fields)]
        assert [event.type for event in events] == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        async with client.messages.stream(**fields) as stream:
            streamed = await stream.get_final_message()
        for answer in (streamed, await client.messages.create(**fields)):
            [block] = answer.content
            assert block.type == "tool_use"
            assert (block.name, answer.stop_reason) == ("paint", "tool_use")
            assert block.input in ({"color": "red"}, {"color": "green"})


@pytest.mark.slow
async def test_stop_sequences_and_formats(serve: Serve) -> None:
    async with serve(max_model_len=500) as served, client_of(served) as client:
        free = await client.messages.create(model=MODEL, messages=USER, max_tokens=20, extra_body=GREEDY)
        [block] = free.content
        assert block.type == "text"
        stop = next(text for text in block.text[3:] if text.isprintable() and not text.isspace())
        answer = await client.messages.create(
            model=MODEL, messages=USER, max_tokens=20, stop_sequences=[stop], extra_body=GREEDY
        )
        assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
        format_ = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
        answer = await client.messages.create(model=MODEL, messages=USER, max_tokens=99, extra_body=format_)
        [block] = answer.content
        assert block.type == "text"
        assert block.text.replace(" ", "") in ('{"color":"red"}', '{"color":"green"}')


async def test_threads_are_not_kept(serve: Serve) -> None:
    """Anthropic's ``tool_runner`` wants one, and sends whole conversations after this very error."""
    async with serve() as served:
        ask: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 4}
        refused = await served.http.post("/v1/messages", json={**ask, "thread": {"type": "create"}})
        assert refused.status_code == 400
        assert refused.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}
        made = await served.http.post("/v1/messages", json={**ask, "thread": None})
        assert made.status_code == 200


async def test_an_answer_that_was_begun_goes_on(serve: Serve) -> None:
    async with serve() as served, client_of(served) as client:
        begun: Any = [*USER, {"role": "assistant", "content": "Well"}]
        answer = await client.messages.create(model=MODEL, messages=begun, max_tokens=6, extra_body=GREEDY)
        chat = await served.client.chat.completions.create(
            model=MODEL,
            messages=begun,
            max_tokens=6,
            temperature=0,
            extra_body={"continue_final_message": True},
        )
        [block] = answer.content
        assert block.type == "text"
        assert block.text == chat.choices[0].message.content


async def test_thinking_is_a_variable_of_the_template(
    tiny_text: Tiny, make_engine: MakeEngine, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}" + "Hi")
    lengths: dict[str, int] = {}
    async with (
        make_engine(tiny_text, chat_template=str(template)) as engine,
        served_by(engine) as served,
        client_of(served) as client,
    ):
        for kind in ("enabled", "adaptive", "disabled", ""):
            thinking: Any = {"thinking": {"type": kind, "budget_tokens": 1024}} if kind else {}
            made = await client.messages.create(model=MODEL, max_tokens=1, messages=USER, extra_body=thinking)
            counted = await client.messages.count_tokens(model=MODEL, messages=USER, extra_body=thinking)
            lengths[kind] = counted.input_tokens
            assert counted.input_tokens == made.usage.input_tokens + (made.usage.cache_read_input_tokens or 0)
        own = {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": "x" * 9}}
        counted = await client.messages.count_tokens(model=MODEL, messages=USER, extra_body=own)
        lengths["own"] = counted.input_tokens
    without = lengths.pop("")
    assert {kind: n - without for kind, n in lengths.items()} == {
        "enabled": len("True"),
        "adaptive": len("True"),
        "disabled": len("False"),
        "own": 9,
    }


async def test_a_failure_is_the_last_event(serve: Serve) -> None:
    async with serve(max_model_len=500) as served, client_of(served) as client:
        stream = await client.messages.create(
            model=MODEL, messages=USER, max_tokens=480, extra_body=GREEDY, stream=True
        )
        assert (await anext(stream)).type == "message_start"
        await served.engine.stop()
        with pytest.raises(anthropic.APIStatusError, match="stopp"):
            [event async for event in stream]


REFUSED: list[tuple[Any, ...]] = [
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "only texts"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}]}, "name"),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "template"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
    ({"tools": [PAINT], "tool_choice": {"type": "tool"}}, "name"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"unknown": 1}, "unknown"),
]


@pytest.mark.slow
async def test_what_is_not_supported_is_refused(serve: Serve) -> None:
    async with serve() as served, client_of(served) as client:
        for fields, text in REFUSED:
            with pytest.raises(anthropic.BadRequestError, match=text) as caught:
                await client.messages.create(model=MODEL, max_tokens=5, messages=USER, extra_body=fields)
            assert caught.value.body["type"] == "error"  # type: ignore[index]
            assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]


async def test_keys_and_other_errors(serve: Serve) -> None:
    async with serve(settings={"api_keys": {"secret": "t"}}, key="secret") as served:
        fields: Any = {"max_tokens": 2, "messages": USER}
        async with client_of(served, "secret") as client:
            await client.messages.create(model=MODEL, **fields)
            with pytest.raises(anthropic.NotFoundError):
                await client.messages.create(model="no", **fields)
        async with client_of(served, "wrong") as client:
            with pytest.raises(anthropic.AuthenticationError) as caught:
                await client.messages.create(model=MODEL, **fields)
            assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
