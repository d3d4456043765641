"""``/v1/responses``: a conversation in, the assistant's next messages and calls out. It is converted to a
chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import invalid, needed, unsupported
from aioengine.server.messages.read import function_call, function_tool, named_tool, schema_format
from aioengine.server.openai import api
from aioengine.server.openai.chat import start_chat
from aioengine.server.responses.api import (
    Content,
    Item,
    ResponsesRequest,
    ResponsesTool,
    ResponsesToolChoice,
    TextFormat,
)
from aioengine.server.responses.reply import ResponsesReply

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


async def responses(call: Call, data: ResponsesRequest) -> Annotated[Answer, dict[str, Any]]:
    """Answer, without state."""
    answer, [parser] = await start_chat(call, to_chat(data), prefix="resp_")
    reply = answer.reply = ResponsesReply(answer.id, answer.seed, data, parser)
    answer.kept = reply.kept
    return answer


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
        system.append(content if isinstance(content, str) else "\n".join(part.text or "" for part in content))
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
            name, id_ = needed(item.name, f"{where}.name"), needed(item.call_id, f"{where}.call_id")
            turn.tool_calls = [*(turn.tool_calls or ()), function_call(id_, name, item.arguments or "")]
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
        id_ = needed(item.call_id, f"{where}.call_id")
        return api.Message(role="tool", tool_call_id=id_, content=_content(item.output, f"{where}.output"))
    known = "message, function_call, function_call_output and reasoning"
    raise unsupported(f"{where}.type", f"{item.type[:100]!r} is not supported; only {known} are")


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
    return schema_format(needed(wanted.schema, "text.format.schema"), wanted.name, wanted.strict)


def _tool(tool: ResponsesTool, where: str) -> api.Tool:
    if tool.type != "function":
        raise unsupported(f"{where}.type", f"{tool.type[:100]!r} is not supported: only functions are")
    name = needed(tool.name, f"{where}.name")
    return function_tool(name, tool.description, tool.parameters, tool.strict)


def _choice(choice: str | ResponsesToolChoice | None) -> api.ToolChoice | None:
    if not isinstance(choice, ResponsesToolChoice):
        return choice  # type: ignore[return-value] # one of three texts, as its field says
    if choice.type != "allowed_tools":
        return _named(choice, "tool_choice")
    named = [_named(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(choice.tools or ())]
    if not named or choice.mode is None:
        raise invalid("tool_choice", "needs mode and tools")
    return api.AllowedTools(allowed_tools=api.Allowed(mode=choice.mode, tools=named))


def _named(choice: ResponsesToolChoice, where: str) -> api.NamedTool:
    if choice.type != "function" or choice.name is None:
        raise unsupported(f"{where}.type", f"{choice.type[:100]!r} is not supported: only functions by name")
    return named_tool(choice.name)
