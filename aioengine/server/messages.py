"""``/v1/messages``, which Anthropic's clients use: a conversation in, the assistant's next message out. It is
converted to a chat. Field names are Anthropic's; additional ones are vLLM's.

Its reply is a list of items, as that of ``/v1/responses``: both are made here from a chat's outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aioengine.runtime.output import RequestOutput
from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import ApiError, needed, unsupported
from aioengine.server.formats.source import AnswerParser
from aioengine.server.openai import api
from aioengine.server.openai.chat import encode_messages, start_chat, text_of, text_of_part
from aioengine.server.openai.form import plan_tools
from aioengine.server.openai.replies import StreamReply, event, parse_output


class Block(api.ContentPart, kw_only=True):
    """A part of a content: "text", a call ("tool_use") or its result ("tool_result"). "thinking" and
    "redacted_thinking" are skipped. Fields beyond these, such as ``cache_control``, are ignored."""

    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Annotated[list[Block], Meta(max_length=api.MAX_PARTS)] | None = None


Content = str | Annotated[list[Block], Meta(max_length=api.MAX_PARTS)]


class MessageParam(api.Strict, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: Content


class MessagesTool(api.Function, kw_only=True, forbid_unknown_fields=False, tag_field="type", tag="custom"):
    """A function. Anthropic's own tools have another ``type`` and are refused."""

    parameters: api.Schema | None = msgspec.field(default=None, name="input_schema")


class MessagesToolChoice(api.Strict, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None
    """True: at most one call. False: up to 16 calls where a call is required (by default one)."""


class OutputFormat(api.JsonSchemaFormat, kw_only=True):
    type: Literal["json_schema"]
    name: api.Name = "answer"
    schema: api.Schema


class OutputConfig(api.Strict, kw_only=True):
    format: OutputFormat | None = None
    effort: api.Ignored = api.IGNORED


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model reasons first, where its chat template has a variable for that. How long it reasons
    is up to the model."""

    type: Literal["enabled", "adaptive", "disabled"]


class CountRequest(api.SharedFields, kw_only=True, forbid_unknown_fields=False):
    """The fields that determine a prompt. Other fields are ignored."""

    messages: Annotated[list[MessageParam], Meta(min_length=1, max_length=api.MAX_MESSAGES)]
    system: Content | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=api.MAX_TOOLS)] | None = None
    thinking: Thinking | None = None
    tool_choice: MessagesToolChoice | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """vLLM's: variables for the chat template."""


class MessagesRequest(CountRequest, kw_only=True, forbid_unknown_fields=True):
    max_tokens: api.Positive
    stop_sequences: api.StopStrings | None = None
    output_config: OutputConfig | None = None
    """A JSON schema that the answer must conform to."""
    thread: api.Ignored = api.IGNORED
    """Refused in the way that makes clients send whole conversations: none are kept."""

    # Accepted, and without effect on the answer
    metadata: api.Ignored = api.IGNORED
    cache_control: api.Ignored = api.IGNORED
    """All prompts are cached, as far as there is room."""


_THINKING = "enable_thinking"
"""What most templates call it."""
_CHOICES: dict[str, api.ToolChoice] = {"auto": "auto", "none": "none", "any": "required"}


class Counted(msgspec.Struct):
    input_tokens: int


async def messages(call: Call, data: MessagesRequest) -> Annotated[Answer, dict[str, Any]]:
    """Answer, as Anthropic's API."""
    if bytes(data.thread) not in (b"", b"null"):
        raise unsupported("thread", "conversations are not kept here; send all messages")
    wanted = None if data.output_config is None else data.output_config.format
    chat = msgspec.structs.replace(
        to_chat(data, call.context.tokenizer.chat_template),
        max_completion_tokens=data.max_tokens,
        stop=data.stop_sequences,
        response_format=None if wanted is None else api.ResponseFormat(type=wanted.type, json_schema=wanted),
    )
    answer, [parser] = await start_chat(call, chat, prefix="msg_")
    answer.reply = MessagesReply(answer.head, parser, data.stop_sequences or ())
    return answer


async def count_tokens(call: Call, data: CountRequest) -> Counted:
    """Tokens of a prompt."""
    call.wanted_adapter(data)
    chat = to_chat(data, call.context.tokenizer.chat_template)
    return Counted(len(await encode_messages(call, chat, plan_tools(chat.tools, chat.tool_choice).tools)))


def to_chat(data: CountRequest, template: str | None) -> api.ChatRequest:
    """Convert the fields that chats have, too; ``template`` is the chat template. Raises ApiError for what is
    not supported."""
    choice = data.tool_choice or MessagesToolChoice(type="auto")
    found = _CHOICES.get(choice.type)
    if found is None:
        name = needed(choice.name, "tool_choice.name")
        found = api.NamedTool(function=api.FunctionName(name=name))
    single = choice.disable_parallel_tool_use
    return api.ChatRequest(
        messages=list(_messages(data)),
        tools=api.Tool.all_of(data.tools),
        tool_choice=found,
        parallel_tool_calls=None if single is None else not single,
        chat_template_kwargs=_variables(data, template),
        # The client has begun the answer.
        continue_final_message=data.messages[-1].role == "assistant" or None,
        **data.shared(),
    )


def _variables(data: CountRequest, template: str | None) -> dict[str, Any] | None:
    """Return the variables of the chat template, ``thinking`` among them. Raises ApiError if the template has
    none for it."""
    if data.thinking is None:
        return data.chat_template_kwargs
    wanted = data.thinking.type != "disabled"
    if _THINKING in (template or ""):
        return {_THINKING: wanted, **(data.chat_template_kwargs or {})}
    if wanted:
        why = f"the model's chat template has no variable {_THINKING}; set its own in chat_template_kwargs"
        raise unsupported("thinking", why)
    return data.chat_template_kwargs


def _messages(data: CountRequest) -> Iterator[api.Message]:
    """Convert the turns. Results of tools become separate messages, in order, between a user's texts."""
    if data.system:
        yield api.Message(role="system", content=text_of(data.system, "system"))
    for i, message in enumerate(data.messages):
        role, content, where = message.role, message.content, f"messages[{i}].content"
        if isinstance(content, str) or role == "system":
            yield api.Message(role=role, content=text_of(content, where))
            continue
        texts: list[str] = []
        calls: list[api.ToolCall] = []
        for j, block in enumerate(content):
            at = f"{where}[{j}]"
            if role == "assistant" and block.type in ("thinking", "redacted_thinking"):
                continue
            if role == "assistant" and block.type == "tool_use":
                id_, name = needed(block.id, f"{at}.id"), needed(block.name, f"{at}.name")
                arguments = msgspec.json.encode(block.input or {}).decode()
                calls.append(api.ToolCall.of(id_, name, arguments))
            elif role == "user" and block.type == "tool_result":
                if texts:
                    yield api.Message(role="user", content="\n".join(texts))
                    texts = []
                id_ = needed(block.tool_use_id, f"{at}.tool_use_id")
                result = text_of(block.content or "", f"{at}.content")
                yield api.Message(role="tool", tool_call_id=id_, content=result)
            else:
                texts.append(text_of_part(block, at))
        if texts or role == "assistant" or not content:
            yield api.Message(role=role, content="\n".join(texts), tool_calls=calls or None)


# Replies

Event = dict[str, Any]


class ListReply(StreamReply):
    """The reply of an answer that is a list of items: reasoning, texts and calls. Each is begun, filled and
    ended before the next one. An answer in one piece is what the events of its only part leave behind."""

    def __init__(self, parser: AnswerParser | None) -> None:
        self._parser = parser
        self._items: list[dict[str, Any]] = []
        """Items that have ended."""
        self._open: str | None = None
        """Type of the item that has begun: "text" or "thinking"."""
        self._parts: list[str] = []
        """Its text so far."""
        self._last: RequestOutput | None = None

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        return written(self._events(output)) or None

    def whole(self, outputs: Sequence[RequestOutput], usage: api.Usage) -> bytes:
        [output] = outputs
        for _ in self._events(output):
            pass
        return msgspec.json.encode(self._finished(output, usage))

    def _events(self, output: RequestOutput) -> Iterator[Event]:
        if self._last is None:
            yield from self._begin(output)
        self._last = output
        text, calls, reasoning = parse_output(self._parser, output)
        for kind, part in (("thinking", reasoning), ("text", text)):
            if part:
                yield from self._fill(kind, part)
        for call in calls:
            yield from self._close()
            yield from self._call(call)
        if output.finished:
            if self._open is None and not self._items:
                yield from self._fill("text", "")
            yield from self._close(output)

    def _fill(self, kind: str, text: str) -> Iterator[Event]:
        if self._open != kind:
            yield from self._close()
            self._open = kind
            yield from self._start(kind)
        self._parts.append(text)
        if text:
            yield self._delta(kind, text)

    def _close(self, last: RequestOutput | None = None) -> Iterator[Event]:
        if self._open is not None:
            kind, self._open = self._open, None
            text = "".join(self._parts)
            self._parts.clear()
            yield from self._end(kind, text, last)

    # The events of the answer's beginning, of an item's, of more of its text and of its end (``last``: the
    # answer ends with it), and of a call from its beginning to its end; and the answer

    @abstractmethod
    def _begin(self, output: RequestOutput) -> Iterator[Event]: ...
    @abstractmethod
    def _start(self, kind: str) -> Iterator[Event]: ...
    @abstractmethod
    def _delta(self, kind: str, text: str) -> Event: ...
    @abstractmethod
    def _end(self, kind: str, text: str, last: RequestOutput | None) -> Iterator[Event]: ...
    @abstractmethod
    def _call(self, call: api.ToolCall) -> Iterator[Event]: ...
    @abstractmethod
    def _finished(self, output: RequestOutput, usage: api.Usage) -> dict[str, Any]: ...


def written(events: Iterable[Event]) -> bytes:
    """Write each event as it comes: what it refers to changes with the next one."""
    return b"".join(event(msgspec.json.encode(each), each["type"]) for each in events)


class MessagesReply(ListReply):
    """The reply of a message."""

    def __init__(
        self, head: dict[str, Any], parser: AnswerParser | None, stop_sequences: Sequence[str]
    ) -> None:
        super().__init__(parser)
        self._message = {name: head[name] for name in ("id", "seed", "model")}
        self._message |= {"type": "message", "role": "assistant"}
        self._stop_sequences = frozenset(stop_sequences)

    def last_events(self, usage: api.Usage) -> bytes:
        assert self._last is not None
        used = _usage(self._last, usage.completion_tokens)
        delta = {"type": "message_delta", "delta": self._ending(self._last), "usage": used}
        return written((delta, {"type": "message_stop"}))

    def failure(self, error: ApiError) -> bytes:
        return event(error.body_for("/v1/messages"), "error")

    def _begin(self, output: RequestOutput) -> Iterator[Event]:
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._message, **empty, "usage": _usage(output, 0)}
        yield {"type": "message_start", "message": message}

    def _start(self, kind: str) -> Iterator[Event]:
        yield self._of_block("start", content_block=_block(kind, ""))

    def _delta(self, kind: str, text: str) -> Event:
        return self._of_block("delta", delta={"type": f"{kind}_delta", kind: text})

    def _end(self, kind: str, text: str, last: RequestOutput | None) -> Iterator[Event]:
        yield self._of_block("stop")
        self._items.append(_block(kind, text))

    def _call(self, call: api.ToolCall) -> Iterator[Event]:
        arguments = call.function.arguments
        use = {"type": "tool_use", "id": call.id, "name": call.function.name}
        yield self._of_block("start", content_block={**use, "input": {}})
        yield self._of_block("delta", delta={"type": "input_json_delta", "partial_json": arguments})
        yield self._of_block("stop")
        self._items.append({**use, "input": msgspec.Raw(arguments.encode())})

    def _of_block(self, what: str, **fields: Any) -> Event:
        return {"type": f"content_block_{what}", "index": len(self._items), **fields}

    def _finished(self, output: RequestOutput, usage: api.Usage) -> dict[str, Any]:
        used = _usage(output, usage.completion_tokens)
        return {**self._message, "content": self._items, **self._ending(output), "usage": used}

    def _ending(self, output: RequestOutput) -> dict[str, Any]:
        reason, sequence = "end_turn", None
        if output.finish_reason == "length":
            reason = "max_tokens"
        elif any(item["type"] == "tool_use" for item in self._items):
            reason = "tool_use"
        elif output.stop_reason in self._stop_sequences:
            reason, sequence = "stop_sequence", output.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(output: RequestOutput, output_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": output.prompt_tokens - output.cached_tokens,
        "cache_read_input_tokens": output.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": output_tokens,
    }


def _block(kind: str, text: str) -> dict[str, str]:
    """Return a block. Reasoning is not signed, because clients may send back any."""
    return {"type": kind, kind: text} | ({"signature": ""} if kind == "thinking" else {})
