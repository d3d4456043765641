"""``/v1/messages``: a conversation in, the assistant's next message out. It is converted to a chat.

Field names are Anthropic's; additional ones are vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import needed, unsupported
from aioengine.server.messages.reply import MessagesReply
from aioengine.server.openai import api
from aioengine.server.openai.chat import encode_messages, start_chat, text_of, text_of_part
from aioengine.server.openai.form import plan_tools


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
    answer.reply = MessagesReply(answer.id, answer.seed, data.model, parser, data.stop_sequences or ())
    return answer


async def count_tokens(call: Call, data: CountRequest) -> Counted:
    """Tokens of a prompt."""
    call.wanted_adapter(data)
    chat = to_chat(data, call.context.tokenizer.chat_template)
    return Counted(len(await encode_messages(call, chat, plan_tools(chat.tools, chat.tool_choice))))


def to_chat(data: CountRequest, template: str | None) -> api.ChatRequest:
    """Convert the fields that chats have, too; ``template`` is the chat template. Raises ApiError for what is
    not supported."""
    choice, parallel = data.tool_choice, None
    found: api.ToolChoice | None = None
    if choice is not None:
        found = _CHOICES.get(choice.type)
        if found is None:
            name = needed(choice.name, "tool_choice.name")
            found = api.NamedTool(function=api.FunctionName(name=name))
        single = choice.disable_parallel_tool_use
        parallel = None if single is None else not single
    return api.ChatRequest(
        messages=list(_messages(data)),
        tools=[api.Tool(function=tool) for tool in data.tools] if data.tools else None,
        tool_choice=found,
        parallel_tool_calls=parallel,
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
