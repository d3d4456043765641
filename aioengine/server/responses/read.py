"""Converts a request for a response to a chat request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aioengine.server.errors import invalid, unsupported
from aioengine.server.messages.read import function_tool, schema_format
from aioengine.server.openai import api
from aioengine.server.responses.api import (
    Content,
    Item,
    ResponsesRequest,
    ResponsesTool,
    ResponsesToolChoice,
    TextFormat,
)

_TEXTS = frozenset(("input_text", "output_text", "text"))
_SAME = (
    *("model", "adapters", "temperature", "top_p", "top_k", "priority", "cache_salt", "stream"),
    *("chat_template_kwargs", "parallel_tool_calls"),
)
"""Fields that a chat has, too."""
_UNSUPPORTED = {
    "previous_response_id": (None, "responses are not kept here; send the whole conversation as input"),
    "conversation": (None, "conversations are not kept here; send it as input"),
    "prompt": (None, "prompts are not kept here; send it as instructions and input"),
    "background": (False, "responses are not kept here; wait for them, or stream"),
    "truncation": ("disabled", "an input that is too long is refused; shorten it"),
    "top_logprobs": (0, "use /v1/chat/completions for log-probabilities"),
}
"""Fields that are refused unless they are null or have this value, and why."""


def to_chat(data: ResponsesRequest) -> api.ChatRequest:
    """Convert a request to a chat. Raises ApiError for what is not supported."""
    for field, (neutral, why) in _UNSUPPORTED.items():
        if getattr(data, field) not in (None, neutral):
            raise unsupported(field, why)
    return api.ChatRequest(
        messages=list(_messages(data)),
        max_completion_tokens=data.max_output_tokens,
        reasoning_effort=None if data.reasoning is None else data.reasoning.effort,
        response_format=_format(data.text.format) if data.text and data.text.format else None,
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(data.tools)] if data.tools else None,
        tool_choice=_choice(data.tool_choice),
        **{name: getattr(data, name) for name in _SAME},
    )


def _messages(data: ResponsesRequest) -> Iterator[api.Message]:
    """Combine the instructions and the input's leading system messages into one system message, because many
    templates accept only one."""
    items = [Item(role="user", content=data.input)] if isinstance(data.input, str) else data.input
    start = 0
    system = [] if data.instructions is None else [data.instructions]
    while start < len(items) and items[start].role in ("system", "developer"):
        content = _content(items[start].content, f"input[{start}].content")
        parts = [api.ContentPart(type="text", text=content)] if isinstance(content, str) else content
        system.append("\n".join(part.text or "" for part in parts))
        start += 1
    if system:
        yield api.Message(role="system", content="\n\n".join(system))
    yield from _turns(items, start)


def _turns(items: Sequence[Item], start: int) -> Iterator[api.Message]:
    """Group calls with the assistant's message before them, if there is one."""
    turn: api.Message | None = None
    for i in range(start, len(items)):
        item, where = items[i], f"input[{i}]"
        if item.type == "reasoning":
            continue
        is_call = item.type == "function_call"
        if turn is not None and not (is_call and turn.role == "assistant"):
            yield turn
            turn = None
        if is_call:
            turn = turn or api.Message(role="assistant")
            turn.tool_calls = [*(turn.tool_calls or ()), _call(item, where)]
        else:
            turn = _turn(item, where)
    if turn is not None:
        yield turn


def _turn(item: Item, where: str) -> api.Message:
    if item.type == "message":
        if item.role is None:
            raise invalid(f"{where}.role", "is missing")
        return api.Message(role=item.role, content=_content(item.content, f"{where}.content"))
    if item.type == "function_call_output":
        if item.call_id is None:
            raise invalid(f"{where}.call_id", "is missing")
        output = _content(item.output, f"{where}.output")
        return api.Message(role="tool", tool_call_id=item.call_id, content=output)
    raise unsupported(
        f"{where}.type",
        f"{item.type[:100]!r} is not supported; only message, function_call, function_call_output and "
        "reasoning are",
    )


def _call(item: Item, where: str) -> api.ToolCall:
    if item.name is None or item.call_id is None:
        raise invalid(f"{where}.{'name' if item.name is None else 'call_id'}", "is missing")
    function = api.FunctionCall(name=item.name, arguments=item.arguments or "")
    return api.ToolCall(id=item.call_id, function=function)


def _content(content: Content | None, where: str) -> str | list[api.ContentPart]:
    if content is None:
        raise invalid(where, "is missing")
    if isinstance(content, str):
        return content
    parts = []
    for i, part in enumerate(content):
        if part.type not in (*_TEXTS, "refusal"):
            raise unsupported(f"{where}[{i}].type", f"{part.type[:100]!r} is not supported: only texts are")
        kind = "refusal" if part.type == "refusal" else "text"
        parts.append(api.ContentPart(type=kind, text=part.text, refusal=part.refusal))
    return parts


def _format(wanted: TextFormat) -> api.ResponseFormat:
    if wanted.type != "json_schema":
        return api.ResponseFormat(type=wanted.type)
    if wanted.schema is None:
        raise invalid("text.format.schema", "is missing")
    return schema_format(wanted.schema, wanted.name, wanted.strict)


def _tool(tool: ResponsesTool, where: str) -> api.Tool:
    if tool.type != "function":
        raise unsupported(f"{where}.type", f"{tool.type[:100]!r} is not supported: only functions are")
    if tool.name is None:
        raise invalid(f"{where}.name", "is missing")
    return function_tool(tool.name, tool.description, tool.parameters, tool.strict)


def _choice(choice: str | ResponsesToolChoice | None) -> api.ToolChoice | None:
    if not isinstance(choice, ResponsesToolChoice):
        return choice  # type: ignore[return-value] # one of three texts, as its field says
    if choice.type == "allowed_tools":
        named = [_named(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(choice.tools or ())]
        if not named or choice.mode is None:
            raise invalid("tool_choice", "needs mode and tools")
        return api.AllowedTools(allowed_tools=api.Allowed(mode=choice.mode, tools=named))
    return _named(choice, "tool_choice")


def _named(choice: ResponsesToolChoice, where: str) -> api.NamedTool:
    if choice.type != "function" or choice.name is None:
        raise unsupported(f"{where}.type", f"{choice.type[:100]!r} is not supported: only functions by name")
    return api.NamedTool(function=api.FunctionName(name=choice.name))
