"""Guided decoding and tools, over HTTP; the random model would never write any of it by itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
from support.engine_fixtures import MakeEngine, Tiny
from support.server_fixtures import MODEL, Serve, served_by

SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green"]},
        "count": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["color", "count"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
USER: Any = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": USER, "max_tokens": 350, "seed": 3, **fields}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_schema_is_kept(stream: bool, serve: Serve) -> None:
    format_: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    async with serve(max_model_len=400) as served:
        answers = []
        for seed in range(4):
            arguments = chat(response_format=format_, seed=seed)
            if stream:
                parts = await served.client.chat.completions.create(stream=True, **arguments)
                answers.append("".join([part.choices[0].delta.content or "" async for part in parts]))
            else:
                answer = await served.client.chat.completions.create(**arguments)
                assert answer.choices[0].finish_reason == "stop"
                answers.append(answer.choices[0].message.content or "")
        for text in answers:
            value = json.loads(text)
            assert set(value) == {"color", "count"}
            assert value["color"] in ("red", "green") and 0 <= value["count"] <= 99
        assert len(set(answers)) > 1


async def test_json_object(serve: Serve) -> None:
    async with serve(max_model_len=400) as served:
        answer = await served.client.chat.completions.create(
            **chat(response_format={"type": "json_object"}, temperature=0)
        )
        text = answer.choices[0].message.content or ""
        assert text.startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("wanted", "pattern"),
    [
        ({"choice": ["yes", "no", 'l"é\n']}, 'yes|no|l"é\n'),
        ({"regex": "[ab]{3}c"}, "[ab]{3}c"),
        ({"grammar": 'start: "x" ("y" | "z") "!"'}, "x[yz]!"),
        ({"json": {"const": 5}}, "5"),
    ],
)
async def test_structured_outputs(wanted: dict[str, Any], pattern: str, serve: Serve) -> None:
    async with serve(max_model_len=400) as served:
        answer = await served.client.completions.create(
            model=MODEL,
            prompt="Hi",
            n=5,
            seed=1,
            max_tokens=40,
            extra_body={"structured_outputs": wanted},
        )
        for choice in answer.choices:
            assert re.fullmatch(pattern, choice.text), choice.text
            assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "no"}},
                }
            },
            None,
        ),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "("}}, None),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {"grammar": "start: ?"}}, None),
        ({"structured_outputs": {"regex": "a" * 300_000}}, None),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, None),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
    ],
)
async def test_bad_formats_are_refused(fields: dict[str, Any], param: str | None, serve: Serve) -> None:
    async with serve(max_model_len=400) as served:
        with pytest.raises(openai.BadRequestError) as caught:
            await served.client.chat.completions.create(model=MODEL, messages=USER, extra_body=fields)
        assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
async def test_a_call_can_be_demanded(choice: Any, stream: bool, serve: Serve) -> None:
    async with serve(max_model_len=400) as served:
        arguments = chat(tools=TOOLS, tool_choice=choice, seed=5)
        if stream:
            chunks = [c async for c in await served.client.chat.completions.create(stream=True, **arguments)]
            assert chunks[-1].choices[0].finish_reason == "tool_calls"
            calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
            assert [call.index for call in calls] == list(range(len(calls)))
        else:
            answer = await served.client.chat.completions.create(**arguments)
            assert answer.choices[0].finish_reason == "tool_calls"
            assert answer.choices[0].message.content is None
            calls = answer.choices[0].message.tool_calls or []  # type: ignore[assignment]
        assert calls
        for call in calls:
            assert call.id and call.function is not None
            value = json.loads(call.function.arguments or "")
            if call.function.name == "paint":
                assert value["color"] in ("red", "green")
            else:
                assert (call.function.name, isinstance(value, dict)) == ("stop", True)


@pytest.fixture
def hermes(tiny_text: Tiny, tmp_path: Path) -> Tiny:
    """The tiny model with a chat template that shows tools and asks for tagged calls."""
    model = tmp_path / "model"
    shutil.copytree(tiny_text.model, model)
    (model / "chat_template.jinja").write_text(
        "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.arguments.color }}</tool_call>{% endfor %}"
        "{% endfor %}"
    )
    return tiny_text._replace(model=model)


@pytest.mark.parametrize("stream", [False, True])
async def test_tagged_calls_are_taken_out_of_the_text(
    stream: bool, hermes: Tiny, make_engine: MakeEngine
) -> None:
    call = '<tool_call>\n{"name": "paint", "arguments": {"color": "red", "count": 1}}\n</tool_call>'
    outputs = {"choice": [f"On it.{call}"]}
    async with make_engine(hermes, max_model_len=500) as engine, served_by(engine) as served:
        arguments = chat(tools=TOOLS, extra_body={"structured_outputs": outputs})
        text, calls, reason = "", [], None
        if stream:
            async for chunk in await served.client.chat.completions.create(stream=True, **arguments):
                delta = chunk.choices[0].delta
                text += delta.content or ""
                calls += delta.tool_calls or []
                reason = chunk.choices[0].finish_reason
        else:
            answer = await served.client.chat.completions.create(**arguments)
            message = answer.choices[0].message
            text, calls, reason = (
                message.content or "",
                message.tool_calls or [],
                answer.choices[0].finish_reason,
            )  # type: ignore[assignment]
        assert (text, reason) == ("On it.", "tool_calls")
        [found] = calls
        assert found.function.name == "paint"
        assert json.loads(found.function.arguments) == {"color": "red", "count": 1}

        # and the conversation goes on with it
        assistant = {
            "role": "assistant",
            "content": None,
            "tool_calls": [found.model_dump(exclude={"index"})],
        }
        tool = {"role": "tool", "tool_call_id": found.id, "content": "done"}
        tokens = await served.http.post("/tokenize", json={"messages": [*USER, assistant, tool]})
        back = await served.http.post("/detokenize", json={"tokens": tokens.json()["tokens"]})
        assert back.json()["prompt"] == "user:Hiassistant:<tool_call>red</tool_call>tool:done"
        shown = await served.http.post("/tokenize", json={"messages": USER, "tools": TOOLS})
        back = await served.http.post("/detokenize", json={"tokens": shown.json()["tokens"]})
        assert back.json()["prompt"] == "paint;stop;user:Hi"
