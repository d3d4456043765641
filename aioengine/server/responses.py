"""``/v1/responses``: a conversation in, the assistant's next messages and calls out. It is converted to a
chat. Field names are OpenAI's; additional ones are vLLM's."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aioengine.runtime.output import RequestOutput
from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import ApiError, needed, unsupported
from aioengine.server.formats.source import AnswerParser
from aioengine.server.messages import Event, ListReply, written
from aioengine.server.openai import api
from aioengine.server.openai.chat import start_chat, text_of

MetadataText = Annotated[str, Meta(max_length=512)]


class Item(msgspec.Struct, kw_only=True):
    """A message, a call ("function_call") or its result ("function_call_output"). "reasoning" is skipped.
    Fields beyond these, as in answers that clients send back, are ignored."""

    type: str = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: api.Content | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: api.Content | None = None


class ResponsesTool(
    api.Function, kw_only=True, forbid_unknown_fields=False, tag_field="type", tag="function"
):
    """A function. All other tools have another ``type`` and are refused."""


class ResponsesToolChoice(api.FunctionName, kw_only=True, tag_field="type", tag="function"):
    """{"type": "function", "name": ...}."""


class TextFormat(api.JsonSchemaFormat, kw_only=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: api.Name = "answer"


class TextOptions(api.Strict, kw_only=True):
    format: TextFormat | None = None
    verbosity: api.Ignored = api.IGNORED


class Reasoning(msgspec.Struct, kw_only=True):
    effort: str | None = None
    """As ``reasoning_effort`` of a chat: for templates that have this variable."""


class ResponsesRequest(api.SharedFields, kw_only=True):
    input: str | Annotated[list[Item], Meta(min_length=1, max_length=api.MAX_MESSAGES)]
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: api.Positive | None = None
    tools: Annotated[list[ResponsesTool], Meta(max_length=api.MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    stream_options: api.StreamOptions | None = None
    metadata: Annotated[dict[api.Name, MetadataText], Meta(max_length=16)] | None = None
    """Returned unchanged in the answer."""

    chat_template_kwargs: dict[str, Any] | None = None
    """vLLM's: variables for the chat template."""

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


_TEXTS = ("input_text", "output_text", "text", "refusal")
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
    same = ("model", "instructions", "max_output_tokens", "temperature", "top_p")
    repeated = {name: getattr(data, name) for name in same} | {
        "metadata": data.metadata or {},
        "parallel_tool_calls": data.parallel_tool_calls is not False,
        "text": {"format": (data.text and data.text.format) or {"type": "text"}},
        "tool_choice": "auto" if data.tool_choice is None else data.tool_choice,
        "tools": data.tools or [],
    }
    # As JSON, which takes less room than what it was decoded to.
    as_json = {name: msgspec.json.encode(part) for name, part in repeated.items()}
    answer.kept = sum(map(len, as_json.values()))
    repeated = {name: msgspec.Raw(part) for name, part in as_json.items()}
    answer.reply = ResponsesReply(answer.head, repeated, parser)
    return answer


def to_chat(data: ResponsesRequest) -> api.ChatRequest:
    """Convert a request to a chat. Raises ApiError for what is not supported."""
    for field, (neutral, why) in _UNSUPPORTED.items():
        if getattr(data, field) not in (None, neutral):
            raise unsupported(field, why)
    format_, wanted = data.text.format if data.text else None, data.tool_choice
    choice = api.NamedTool(function=wanted) if isinstance(wanted, ResponsesToolChoice) else wanted
    form = None if format_ is None else api.ResponseFormat(type=format_.type, json_schema=format_)
    return api.ChatRequest(
        messages=_messages(data),
        max_completion_tokens=data.max_output_tokens,
        reasoning_effort=None if data.reasoning is None else data.reasoning.effort,
        response_format=form,
        tools=api.Tool.all_of(data.tools),
        tool_choice=choice,
        parallel_tool_calls=data.parallel_tool_calls,
        chat_template_kwargs=data.chat_template_kwargs,
        **data.shared(),
    )


def _messages(data: ResponsesRequest) -> list[api.Message]:
    """Combine the instructions and the input's leading system messages into one system message, because many
    templates accept only one; and calls with the assistant's message before them, if there is one."""
    items = [Item(role="user", content=data.input)] if isinstance(data.input, str) else data.input
    start = 0
    system = [] if data.instructions is None else [data.instructions]
    while start < len(items) and items[start].role in ("system", "developer"):
        system.append(text_of(items[start].content, f"input[{start}].content", _TEXTS))
        start += 1
    turns = [api.Message(role="system", content="\n\n".join(system))] if system else []
    for i in range(start, len(items)):
        item, where = items[i], f"input[{i}]"
        if item.type == "function_call":
            if not turns or turns[-1].role != "assistant":
                turns.append(api.Message(role="assistant"))
            name, id_ = needed(item.name, f"{where}.name"), needed(item.call_id, f"{where}.call_id")
            call = api.ToolCall.of(id_, name, item.arguments or "")
            turns[-1].tool_calls = [*(turns[-1].tool_calls or ()), call]
        elif item.type == "function_call_output":
            id_ = needed(item.call_id, f"{where}.call_id")
            content = text_of(item.output, f"{where}.output", _TEXTS)
            turns.append(api.Message(role="tool", tool_call_id=id_, content=content))
        elif item.type == "message":
            content = text_of(item.content, f"{where}.content", _TEXTS)
            turns.append(api.Message(role=needed(item.role, f"{where}.role"), content=content))
        elif item.type != "reasoning":
            known = "message, function_call, function_call_output and reasoning"
            raise unsupported(f"{where}.type", f"{item.type[:100]!r} is not supported; only {known} are")
    return turns


# The reply

_NONE: dict[str, Any] = {"logprobs": []}
_KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "text": ("msg", {"type": "message", "role": "assistant"}, "output_text", {"annotations": [], **_NONE}),
    "thinking": ("rs", {"type": "reasoning", "summary": []}, "reasoning_text", {}),
}
"""Of items with a text: the beginning of their ids, their fields, the type of their part, and its fields."""


class ResponsesReply(ListReply):
    """The reply of a response; events are numbered from 0. ``repeated``: what it repeats of the request."""

    def __init__(self, head: dict[str, Any], repeated: dict[str, Any], parser: AnswerParser | None) -> None:
        super().__init__(parser)
        self._next = 0
        self._item: dict[str, Any] = {}
        """The item that has begun."""
        self._response: dict[str, Any] = {
            "id": head["id"],
            "object": "response",
            "created_at": head["created"],
            "seed": head["seed"],
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "output": self._items,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            **repeated,
        }

    def last_events(self, usage: api.Usage) -> bytes:
        assert self._last is not None
        response = self._finished(self._last, usage)
        return written([self._event(response["status"], response=response)])

    def failure(self, error: ApiError) -> bytes:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._response["status"] = "failed"
        self._response["error"] = {"code": code, "message": error.detail.message}
        return written([self._event("failed", response=self._response)])

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._next = self._next, self._next + 1
        return {"type": f"response.{kind}", "sequence_number": number, **fields}

    def _of_item(self, kind: str, **fields: Any) -> Event:
        return self._event(kind, output_index=len(self._items), **fields)

    def _of_text(self, kind: str, **fields: Any) -> Event:
        return self._of_item(kind, item_id=self._item["id"], content_index=0, **fields)

    def _begin(self, output: RequestOutput) -> Iterator[Event]:
        yield self._event("created", response=self._response)
        yield self._event("in_progress", response=self._response)

    def _start(self, kind: str) -> Iterator[Event]:
        prefix, fields, part, part_fields = _KINDS[kind]
        self._item = {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **fields, "content": []}
        yield self._of_item("output_item.added", item=self._item)
        yield self._of_text("content_part.added", part={"type": part, "text": "", **part_fields})

    def _delta(self, kind: str, text: str) -> Event:
        logprobs = _NONE if kind == "text" else {}
        return self._of_text(f"{_KINDS[kind][2]}.delta", delta=text, **logprobs)

    def _end(self, kind: str, text: str, last: RequestOutput | None) -> Iterator[Event]:
        _, _, type_, part_fields = _KINDS[kind]
        part = {"type": type_, "text": text, **part_fields}
        status = "completed" if last is None else _status(last)
        self._item |= {"status": status, "content": [part]}
        logprobs = _NONE if kind == "text" else {}
        yield self._of_text(f"{type_}.done", text=text, **logprobs)
        yield self._of_text("content_part.done", part=part)
        yield self._of_item("output_item.done", item=self._item)
        self._items.append(self._item)

    def _call(self, call: api.ToolCall) -> Iterator[Event]:
        id_, arguments = f"fc_{uuid.uuid4().hex}", call.function.arguments
        item = {"id": id_, "type": "function_call", "status": "completed", "call_id": call.id}
        item |= {"name": call.function.name, "arguments": arguments}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._of_item("output_item.added", item=begun)
        yield self._of_item("function_call_arguments.delta", item_id=id_, delta=arguments)
        yield self._of_item("function_call_arguments.done", item_id=id_, arguments=arguments)
        yield self._of_item("output_item.done", item=item)
        self._items.append(item)

    def _finished(self, output: RequestOutput, usage: api.Usage) -> dict[str, Any]:
        response = self._response
        response["status"] = _status(output)
        if output.finish_reason == "stop":
            response["completed_at"] = int(time.time())
        elif output.finish_reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        cached = usage.prompt_tokens_details.cached_tokens
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }
        return response


def _status(output: RequestOutput) -> str:
    return "completed" if output.finish_reason == "stop" else "incomplete"
