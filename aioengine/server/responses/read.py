"""Converts a request for a response to a chat request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from aioengine.server.errors import ApiError, unsupported
from aioengine.server.openai import chat_api
from aioengine.server.openai.api import JsonSchemaFormat, ResponseFormat
from aioengine.server.responses import api

_TEXTS = frozenset(("input_text", "output_text", "text"))


def to_chat(data: api.ResponsesRequest) -> chat_api.ChatRequest:
    """Convert a request to a chat. Raises ApiError for what is not supported."""
    _refuse_unsupported(data)
    return chat_api.ChatRequest(
        model=data.model,
        adapters=data.adapters,
        messages=list(_messages(data)),
        max_completion_tokens=data.max_output_tokens,
        temperature=data.temperature,
        top_p=data.top_p,
        top_k=data.top_k,
        priority=data.priority,
        cache_salt=data.cache_salt,
        chat_template_kwargs=data.chat_template_kwargs,
        reasoning_effort=None if data.reasoning is None else data.reasoning.effort,
        response_format=_format(data.text.format) if data.text and data.text.format else None,
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(data.tools)] if data.tools else None,
        tool_choice=_choice(data.tool_choice),
        parallel_tool_calls=data.parallel_tool_calls,
        stream=data.stream,
    )


def _refuse_unsupported(data: api.ResponsesRequest) -> None:
    for field, is_given, why in (
        (
            "previous_response_id",
            data.previous_response_id is not None,
            "responses are not kept here; send the whole conversation as input",
        ),
        ("conversation", data.conversation is not None, "conversations are not kept here; send it as input"),
        ("prompt", data.prompt is not None, "prompts are not kept here; send it as instructions and input"),
        ("background", data.background is True, "responses are not kept here; wait for them, or stream"),
        ("truncation", data.truncation == "auto", "an input that is too long is refused; shorten it"),
        ("top_logprobs", bool(data.top_logprobs), "use /v1/chat/completions for log-probabilities"),
    ):
        if is_given:
            raise unsupported(field, why)


def _messages(data: api.ResponsesRequest) -> Iterator[chat_api.Message]:
    """Combine the instructions and the input's leading system messages into one system message, because many
    templates accept only one."""
    items = [api.Item(role="user", content=data.input)] if isinstance(data.input, str) else data.input
    start = 0
    system = [] if data.instructions is None else [data.instructions]
    while start < len(items) and items[start].role in ("system", "developer"):
        system.append(_text(_content(items[start].content, f"input[{start}].content")))
        start += 1
    if system:
        yield chat_api.Message(role="system", content="\n\n".join(system))
    yield from _turns(items, start)


def _turns(items: Sequence[api.Item], start: int) -> Iterator[chat_api.Message]:
    """Group calls with the assistant's message before them, if there is one."""
    turn: chat_api.Message | None = None
    for i in range(start, len(items)):
        item, where = items[i], f"input[{i}]"
        if item.type == "reasoning":
            continue
        if item.type == "function_call":
            if turn is None or turn.role != "assistant":
                if turn is not None:
                    yield turn
                turn = chat_api.Message(role="assistant")
            turn.tool_calls = turn.tool_calls or []
            turn.tool_calls.append(_call(item, where))
            continue
        if turn is not None:
            yield turn
        turn = _turn(item, where)
    if turn is not None:
        yield turn


def _turn(item: api.Item, where: str) -> chat_api.Message:
    if item.type == "message":
        if item.role is None:
            raise _invalid(f"{where}.role", "is missing")
        return chat_api.Message(role=item.role, content=_content(item.content, f"{where}.content"))
    if item.type == "function_call_output":
        if item.call_id is None:
            raise _invalid(f"{where}.call_id", "is missing")
        return chat_api.Message(
            role="tool", tool_call_id=item.call_id, content=_content(item.output, f"{where}.output")
        )
    raise unsupported(
        f"{where}.type",
        f"{item.type[:100]!r} is not supported; only message, function_call, function_call_output and "
        "reasoning are",
    )


def _call(item: api.Item, where: str) -> chat_api.ToolCall:
    if item.name is None or item.call_id is None:
        raise _invalid(f"{where}.{'name' if item.name is None else 'call_id'}", "is missing")
    return chat_api.ToolCall(
        id=item.call_id, function=chat_api.FunctionCall(name=item.name, arguments=item.arguments or "")
    )


def _content(content: api.Content | None, where: str) -> str | list[chat_api.ContentPart]:
    if content is None:
        raise _invalid(where, "is missing")
    if isinstance(content, str):
        return content
    parts = []
    for i, part in enumerate(content):
        if part.type not in (*_TEXTS, "refusal"):
            raise unsupported(f"{where}[{i}].type", f"{part.type[:100]!r} is not supported: only texts are")
        kind = "refusal" if part.type == "refusal" else "text"
        parts.append(chat_api.ContentPart(type=kind, text=part.text, refusal=part.refusal))
    return parts


def _text(content: str | list[chat_api.ContentPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text or "" for part in content)


def _format(wanted: api.TextFormat) -> ResponseFormat:
    if wanted.type != "json_schema":
        return ResponseFormat(type=wanted.type)
    if wanted.schema is None:
        raise _invalid("text.format.schema", "is missing")
    schema = JsonSchemaFormat(name=wanted.name or "answer", schema=wanted.schema, strict=wanted.strict)
    return ResponseFormat(type="json_schema", json_schema=schema)


def _tool(tool: api.ResponsesTool, where: str) -> chat_api.Tool:
    if tool.type != "function":
        raise unsupported(f"{where}.type", f"{tool.type[:100]!r} is not supported: only functions are")
    if tool.name is None:
        raise _invalid(f"{where}.name", "is missing")
    return chat_api.Tool(
        function=chat_api.Function(
            name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
        )
    )


def _choice(
    choice: Literal["none", "auto", "required"] | api.ResponsesToolChoice | None,
) -> chat_api.ToolChoice | None:
    if not isinstance(choice, api.ResponsesToolChoice):
        return choice
    if choice.type == "allowed_tools":
        named = [_named(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(choice.tools or ())]
        if not named or choice.mode is None:
            raise _invalid("tool_choice", "needs mode and tools")
        return chat_api.AllowedTools(allowed_tools=chat_api.Allowed(mode=choice.mode, tools=named))
    return _named(choice, "tool_choice")


def _named(choice: api.ResponsesToolChoice, where: str) -> chat_api.NamedTool:
    if choice.type != "function" or choice.name is None:
        raise unsupported(f"{where}.type", f"{choice.type[:100]!r} is not supported: only functions by name")
    return chat_api.NamedTool(function=chat_api.FunctionName(name=choice.name))


def _invalid(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{param}: {reason}", param=param, code="invalid_value")
