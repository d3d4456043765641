"""``/v1/responses``: a conversation in, the assistant's next messages and calls out. It is converted to a
chat. Field names are OpenAI's; additional ones are vLLM's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from sys import getsizeof
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import invalid, needed, unsupported
from aioengine.server.messages.routes import function_call, function_tool, named_tool, schema_format
from aioengine.server.openai import api
from aioengine.server.openai.chat import start_chat
from aioengine.server.responses.reply import ResponsesReply


class Part(msgspec.Struct, kw_only=True):
    """A part of a content; only texts ("input_text", "output_text", "text") and an assistant's "refusal"."""

    type: str
    text: str | None = None
    refusal: str | None = None


Content = str | Annotated[list[Part], Meta(max_length=api.MAX_PARTS)]


class Item(msgspec.Struct, kw_only=True):
    """A message, a call ("function_call") or its result ("function_call_output"). "reasoning" is skipped.
    Fields beyond these, as in answers that clients send back, are ignored."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: Content | None = None


class ResponsesTool(msgspec.Struct, kw_only=True):
    """Only "function". The fields of other tools are ignored, so that the error can say which they are."""

    type: str
    name: api.FunctionText | None = None
    description: str | None = None
    parameters: api.Schema | None = None
    strict: bool | None = None


class ResponsesToolChoice(msgspec.Struct, kw_only=True):
    """{"type": "function", "name": ...}."""

    type: str
    name: str | None = None


class TextFormat(api.Strict, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    name: api.Name | None = None
    schema: api.Schema | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(api.Strict, kw_only=True):
    format: TextFormat | None = None
    verbosity: api.Ignored = api.IGNORED


class Reasoning(msgspec.Struct, kw_only=True):
    effort: str | None = None
    """As ``reasoning_effort`` of a chat: for templates that have this variable."""


class ResponsesRequest(api.IgnoredFields, kw_only=True):
    input: str | Annotated[list[Item], Meta(min_length=1, max_length=api.MAX_MESSAGES)]
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: api.Positive | None = None
    temperature: api.Temperature | None = None
    top_p: api.Probability | None = None
    tools: Annotated[list[ResponsesTool], Meta(max_length=api.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream: bool | None = None
    stream_options: api.StreamOptions | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=16),
        ]
        | None
    ) = None
    """Returned unchanged in the answer."""

    # vLLM's
    top_k: api.Whole | None = None
    priority: api.Priority | None = None
    cache_salt: api.Salt | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Refused unless they have their neutral value
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    reasoning: Reasoning | None = None
    top_logprobs: int | None = None

    # Accepted, and without effect on the answer
    include: api.Ignored = api.IGNORED
    max_tool_calls: api.Ignored = api.IGNORED
    """Limit for tools that run in the server; there are none, so it has no effect."""


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
    parts = {
        "text": {"format": data.text.format if data.text and data.text.format else {"type": "text"}},
        "tool_choice": "auto" if data.tool_choice is None else data.tool_choice,
        "tools": data.tools or [],
    }
    # As JSON, which takes less room than what it was decoded to.
    as_json = {name: msgspec.json.encode(part) for name, part in parts.items()}
    answer.kept = sum(map(len, as_json.values())) + getsizeof(data.instructions or "")
    same = ("model", "instructions", "max_output_tokens", "temperature", "top_p")
    repeated = {name: getattr(data, name) for name in same}
    repeated |= {name: msgspec.Raw(part) for name, part in as_json.items()}
    repeated["metadata"] = data.metadata or {}
    repeated["parallel_tool_calls"] = data.parallel_tool_calls is not False
    answer.reply = ResponsesReply(answer.id, answer.seed, repeated, parser)
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


def _choice(choice: Any) -> api.ToolChoice | None:
    if not isinstance(choice, ResponsesToolChoice):
        return choice  # type: ignore[no-any-return] # one of three texts, as its field says
    if choice.type != "function" or choice.name is None:
        why = f"{choice.type[:100]!r} is not supported: only functions by name"
        raise unsupported("tool_choice.type", why)
    return named_tool(choice.name)
