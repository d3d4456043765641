"""Guided decoding and tools, over HTTP; the random model would never write any of it by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import openai
import pytest
from support import hostile_grammars as hostile
from support.engine_fixtures import MakeEngine, Tiny
from support.server_fixtures import MODEL, Serve, served_by

from aioengine.errors import ConfigError
from aioengine.grammars.schemas import SchemaOptions

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


def with_parameters(parameters: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [named(name) for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": USER, "max_tokens": 350, "seed": 3, **fields}


async def answers(served: Any, stream: bool, **arguments: Any) -> tuple[str, list[Any], str | None]:
    """Text, calls and finish reason of a chat, as the client gathers them."""
    if not stream:
        answer = await served.client.chat.completions.create(**arguments)
        message = answer.choices[0].message
        return message.content or "", message.tool_calls or [], answer.choices[0].finish_reason
    text, calls, reason = "", [], None
    async for chunk in await served.client.chat.completions.create(stream=True, **arguments):
        text += chunk.choices[0].delta.content or ""
        reason, new = chunk.choices[0].finish_reason, chunk.choices[0].delta.tool_calls or []
        assert not (reason and new), "OpenAI's client looks in later parts for the end of a call's arguments"
        calls += new
    assert [call.index for call in calls] == list(range(len(calls)))
    return text, calls, reason


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
async def test_a_schema_is_kept(stream: bool, serve: Serve) -> None:
    format_: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    async with serve(max_model_len=400) as served:
        texts = set()
        for seed in range(4):
            text, _, reason = await answers(served, stream, **chat(response_format=format_, seed=seed))
            value = json.loads(text)
            assert reason == "stop" and set(value) == {"color", "count"}
            assert value["color"] in ("red", "green") and 0 <= value["count"] <= 99
            texts.add(text)
        assert len(texts) > 1


async def test_json_object(serve: Serve) -> None:
    async with serve(max_model_len=400) as served:
        # Quotes and closing braces are likely, and the end, which is a byte too, only where nothing else is.
        bias = {"1": 6, "92": 6, "255": -100}
        answer = await served.client.chat.completions.create(
            **chat(response_format={"type": "json_object"}, logit_bias=bias)
        )
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


WANTED: list[tuple[Any, ...]] = [
    ({"choice": ["yes", "no", 'l"é\n']}, 'yes|no|l"é\n'),
    ({"regex": "[ab]{3}c"}, "[ab]{3}c"),
    ({"grammar": 'start: "x" ("y" | "z") "!"'}, "x[yz]!"),
    ({"json": {"const": 5}}, "5"),
]


@pytest.mark.slow
async def test_structured_outputs(serve: Serve) -> None:
    async with serve(max_model_len=400) as served:
        for wanted, pattern in WANTED:
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


REFUSED: list[tuple[Any, ...]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "no"}},
            }
        },
        "response_format",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f\n"}}]}, "tools[0].function.name"),
    ({"request_id": "x\n"}, "request_id"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "start: ?"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a" * 300_000}}, "structured_outputs"),
    (
        {"tools": [TOOLS[1], with_parameters({"not": {}})], "tool_choice": "required"},
        "tools",
    ),
    (
        {"tools": [with_parameters({"not": {}})], "tool_choice": named("f")},
        "tools[0].function.parameters",
    ),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice.type"),
    ({"tools": TOOLS, "tool_choice": named("f")}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": allowed("auto", "f")}, "tool_choice"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    ({"structured_outputs": {"regex": "a"}, "tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
]


@pytest.mark.slow
async def test_bad_formats_are_refused(serve: Serve) -> None:
    async with serve(max_model_len=400) as served:
        for fields, param in REFUSED:
            with pytest.raises(openai.BadRequestError) as caught:
                await served.client.chat.completions.create(model=MODEL, messages=USER, extra_body=fields)
            assert caught.value.param == param, fields


BOOLEAN = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
async def test_one_call_unless_more_are_asked_for(stream: bool, serve: Serve) -> None:
    # "[" begins a list and "," goes on with it, so that the random model never ends one by itself.
    wanted: Any = chat(tools=[with_parameters(BOOLEAN)], tool_choice="required", logit_bias={"11": 50})
    async with serve(max_model_len=500) as served:
        for parallel in (None, False):
            more = {} if parallel is None else {"parallel_tool_calls": parallel}
            text, calls, reason = await answers(served, stream, **wanted, **more)
            assert (text, len(calls), reason) == ("", 1, "tool_calls")
        wanted["max_tokens"] = 120  # in the middle of one
        text, calls, reason = await answers(served, stream, **wanted, parallel_tool_calls=True)
        assert (text, reason) == ("", "length")
        assert 1 <= len(calls) < 4
        assert all(type(json.loads(call.function.arguments)["x"]) is bool for call in calls)
        wanted["max_tokens"] = 10
        assert await answers(served, stream, **wanted) == ("", [], "length")
        wanted["tool_choice"] = named("f")
        wanted["max_tokens"] = 4
        assert await answers(served, stream, **wanted) == ("", [], "length")


async def test_a_format_of_text_has_no_effect_on_calls(serve: Serve) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "y", "schema": {"const": "text"}}}
    async with serve(max_model_len=400) as served:
        for choice in ("required", named("f")):
            wanted: Any = chat(tools=[with_parameters(None)], tool_choice=choice, response_format=format_)
            text, [call], reason = await answers(served, False, **wanted)
            assert (text, call.function.arguments, reason) == ("", "{}", "tool_calls")
        wanted = chat(tools=[with_parameters(None)], tool_choice="auto", response_format=format_)
        assert await answers(served, False, **wanted) == ('"text"', [], "stop")


@pytest.mark.slow
async def test_undeclared_properties_are_left_out(serve: Serve) -> None:
    """Unless the server is told otherwise, and then not of a schema that is strict."""
    format_: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOOLEAN}}
    strict: Any = {"type": "json_schema", "json_schema": {**format_["json_schema"], "strict": True}}
    tool: Any = {"tools": [with_parameters(BOOLEAN, strict=True)], "tool_choice": "required"}
    comma = {"11": 50}  # asks for another property as soon as there may be one
    for schemas in (SchemaOptions(), SchemaOptions(open_objects=True)):
        async with serve(max_model_len=400, settings={"schemas": schemas}) as served:
            for wanted in ({"response_format": format_}, {"response_format": strict}, tool):
                text, calls, reason = await answers(served, False, **chat(logit_bias=comma, **wanted))
                is_open = schemas.open_objects and wanted == {"response_format": format_}
                assert reason == ("length" if is_open else "tool_calls" if calls else "stop")
                if not is_open:
                    assert set(json.loads(calls[0].function.arguments if calls else text)) == {"x"}


@pytest.mark.slow
async def test_what_is_not_enforced_is_said(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"const": 1}, "maxItems": 2}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {**chat(response_format=format_), "max_tokens": 20}
    for lenient in (True, False):
        settings = {"schemas": SchemaOptions(lenient=lenient)}
        async with serve(max_model_len=400, settings=settings) as served:
            caplog.set_level("INFO", logger="aioengine.server.access")
            answer = await served.http.post("/v1/chat/completions", json=body)
            if lenient:
                assert answer.status_code == 200
                assert answer.headers["x-not-enforced"] == "uniqueItems"
                assert "not_enforced=uniqueItems" in caplog.text
            else:
                assert answer.status_code == 400
                assert "uniqueItems" in answer.json()["error"]["message"]


async def test_a_compile_is_bounded_by_the_requests_time(serve: Serve) -> None:
    body = chat(structured_outputs={"json": json.loads(hostile.multiples(7919, 7907))})
    async with serve(max_model_len=400, settings={"request_timeout": 0.5}) as served:
        answer = await served.http.post("/v1/chat/completions", json=body)
        assert answer.status_code in (408, 504), answer.text


async def test_a_long_list_of_what_is_not_enforced_is_cut(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes into a header, and servers in front have little room for these."""
    fields = {f"f{i}": {"type": "string", "format": f"\r\nx-{i}: \u00e9 {'y' * i}"} for i in range(200)}
    schema = {"type": "object", "properties": fields}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    async with serve(max_model_len=400) as served:
        caplog.set_level("INFO", logger="aioengine.server.access")
        body = {**chat(response_format=format_), "max_tokens": 2}
        answer = await served.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        assert 300 < len(answer.headers["x-not-enforced"]) < 600
        assert answer.headers["x-not-enforced"].endswith(", ...") and "x-1" not in answer.headers
        assert max(map(len, caplog.messages)) < 3000


async def test_history_as_clients_write_it(tiny_text: Tiny, make_engine: MakeEngine, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}"
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.arguments | tojson }}){% endfor %};{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "stop", "arguments": ""}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": None, "refusal": "Never."},
    ]
    async with (
        make_engine(tiny_text, max_model_len=500, chat_template=str(template)) as engine,
        served_by(engine) as served,
    ):
        tokens = await served.http.post("/tokenize", json={"messages": messages, "tools": TOOLS})
        back = await served.http.post("/detokenize", json={"tokens": tokens.json()["tokens"]})
    shown = "paint;stop;user:Hi;assistant:({});tool:ok;assistant:No.;assistant:Never.;"
    assert back.json()["prompt"] == shown


async def test_another_chat_template(tiny_text: Tiny, make_engine: MakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}!")
    async with make_engine(tiny_text, chat_template=str(file)) as engine:
        assert engine.tokenizer is not None
        assert engine.tokenizer.render_chat(USER) == "Hi!"
    for text, reason in (("{% for %}", "is not a Jinja template"), (None, "cannot be read")):
        file.unlink()
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError, match=reason):
            async with make_engine(tiny_text, chat_template=str(file)):
                pass
        file.touch()
