"""/v1/responses with the official client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import ResponseFunctionToolCall
from support.server_fixtures import MODEL, Serve

SCHEMA = {"type": "object", "properties": {"color": {"enum": ["red", "green"]}}, "required": ["color"]}
PAINT: Any = {"type": "function", "name": "paint", "description": "Paints.", "parameters": SCHEMA}
STOP: Any = {"type": "function", "name": "stop"}
CHOICE: Any = {"type": "function", "name": "paint"}
SAME_AS_CHAT: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "One moment.",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "stop", "arguments": "{}"}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "done"},
]
INPUT: list[Any] = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
    {"type": "reasoning", "id": "r", "summary": []},
    {
        "type": "message",
        "id": "m",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "One moment.", "annotations": []}],
    },
    {"type": "function_call", "id": "f", "call_id": "1", "name": "stop", "arguments": ""},
    {"type": "function_call_output", "call_id": "1", "output": "done"},
]


@pytest.mark.slow
async def test_equals_the_chat(serve: Serve) -> None:
    async with serve() as served:
        chat = await served.client.chat.completions.create(
            model="a", messages=SAME_AS_CHAT, max_tokens=12, temperature=0
        )
        answer = await served.client.responses.create(
            model="a",
            instructions="Be brief.",
            input=INPUT,
            max_output_tokens=12,
            temperature=0,
            metadata={"k": "v"},
        )
        assert answer.output_text == chat.choices[0].message.content
        assert (answer.status, answer.metadata, answer.model) == ("incomplete", {"k": "v"}, "a")
        assert answer.incomplete_details is not None
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert answer.usage is not None and chat.usage is not None
        assert answer.usage.input_tokens == chat.usage.prompt_tokens
        assert answer.usage.output_tokens == 12


async def streamed(served: Any, **fields: Any) -> tuple[list[Any], Any]:
    events = [e async for e in await served.client.responses.create(stream=True, model=MODEL, **fields)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return [event.type for event in events], events[-1].response


async def test_events_of_a_text(serve: Serve) -> None:
    async with serve() as served:
        fields: Any = {"input": "Hi", "max_output_tokens": 9, "temperature": 0}
        kinds, last = await streamed(served, **fields)
        deltas = kinds.count("response.output_text.delta")
        assert deltas > 1
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            *["response.output_text.delta"] * deltas,
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        whole = await served.client.responses.create(model=MODEL, **fields)
        assert last.output_text == whole.output_text
        assert last.usage.total_tokens == whole.usage.total_tokens == last.usage.input_tokens + 9
        assert [item.type for item in last.output] == [item.type for item in whole.output] == ["message"]


async def test_events_of_calls(serve: Serve) -> None:
    async with serve(max_model_len=500) as served:
        kinds, last = await streamed(
            served, input="Hi", tools=[PAINT, STOP], tool_choice=CHOICE, max_output_tokens=300
        )
        assert kinds == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]
        [call] = last.output
        assert isinstance(call, ResponseFunctionToolCall)
        assert call.name == CHOICE["name"]
        assert isinstance(json.loads(call.arguments), dict)


async def test_a_format_is_kept(serve: Serve) -> None:
    async with serve(max_model_len=500) as served:
        answer = await served.client.responses.create(
            model=MODEL,
            input="Hi",
            text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}},
        )
        assert set(json.loads(answer.output_text)) == {"color"}


@pytest.mark.slow
async def test_a_failure_is_the_last_event(serve: Serve) -> None:
    async with serve(max_model_len=500) as served:
        stream = await served.client.responses.create(
            model=MODEL, input="Hi", max_output_tokens=480, temperature=0, stream=True
        )
        kinds: list[str] = []
        async for event in stream:
            if not kinds:
                await served.engine.stop()
            kinds.append(event.type)
        assert kinds[-1] == "response.failed"
        assert event.type == "response.failed"
        assert event.response.status == "failed"
        assert event.response.error is not None
        assert event.response.error.code == "server_error"


REFUSED: list[tuple[Any, ...]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [{**PAINT, "parameters": {"not": {}}}], "tool_choice": "required"}, "tools[0].parameters"),
    ({"tools": [PAINT], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice"),
    ({"tools": [PAINT], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "no"}}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": "x" * 5000}, "input"),
    ({"unknown": 1}, "unknown"),
]


@pytest.mark.slow
async def test_what_is_not_supported_is_refused(serve: Serve) -> None:
    async with serve(max_model_len=400) as served:
        for fields, param in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                await served.client.responses.create(model=MODEL, input="Hi", extra_body=fields)
            assert caught.value.param == param, fields


async def test_effort_is_a_variable_of_templates_that_have_it(serve: Serve, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}|{{ reasoning_effort }}|")
    async with serve(chat_template=str(template)) as served:

        async def shown(**fields: Any) -> str:
            ask = {"model": MODEL, "max_tokens": 1, "return_token_ids": True, **fields}
            answer = await served.http.post(
                "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], **ask}
            )
            tokens = answer.json()["prompt_token_ids"]
            text = await served.http.post("/detokenize", json={"tokens": tokens})
            return str(text.json()["prompt"])

        assert "|high|" in await shown(reasoning_effort="high")
        assert "||" in await shown(reasoning_effort="none")
        kwargs = {"reasoning_effort": "low"}
        assert "|low|" in await shown(reasoning_effort="high", chat_template_kwargs=kwargs)
        made = {"model": MODEL, "input": "x", "max_output_tokens": 1}
        counts = [
            (await served.http.post("/v1/responses", json={**made, "reasoning": {"effort": effort}})).json()
            for effort in ("none", "high")
        ]
        few, many = (count["usage"]["input_tokens"] for count in counts)
        assert many > few
