"""``/v1/messages``: a conversation in, the assistant's next message out. It is converted to a chat.

Field names are Anthropic's; additional ones are vLLM's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from aioengine.server.answer import Answer
from aioengine.server.context import Call
from aioengine.server.errors import needed, unsupported
from aioengine.server.messages.reply import MessagesReply
from aioengine.server.openai import api
from aioengine.server.openai.chat import encode_messages, start_chat
from aioengine.server.openai.form import plan_tools


class Block(msgspec.Struct, kw_only=True):
    """A part of a content: "text", a call ("tool_use") or its result ("tool_result"). "thinking" and
    "redacted_thinking" are skipped. Fields beyond these, such as ``cache_control``, are ignored."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Annotated[list[Block], Meta(max_length=api.MAX_PARTS)] | None = None


Content = str | Annotated[list[Block], Meta(max_length=api.MAX_PARTS)]


class MessageParam(api.Strict, kw_only=True):
    role: Literal["user", "assistant", "system"]
    content: Content


class MessagesTool(msgspec.Struct, kw_only=True):
    """A function. Anthropic's own tools have another ``type`` and are refused."""

    name: api.FunctionText
    type: str | None = None
    description: str | None = None
    input_schema: api.Schema | None = None
    strict: bool | None = None


class MessagesToolChoice(api.Strict, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None
    """True: at most one call. False: up to 16 calls where a call is required (by default one)."""


class OutputFormat(api.Strict, kw_only=True):
    type: Literal["json_schema"]
    schema: api.Schema


class OutputConfig(api.Strict, kw_only=True):
    format: OutputFormat | None = None
    effort: api.Ignored = api.IGNORED


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model reasons first, where its chat template has a variable for that. How long it reasons
    is up to the model."""

    type: Literal["enabled", "adaptive", "disabled"]


class CountRequest(api.ModelFields, kw_only=True, forbid_unknown_fields=False):
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
    temperature: api.Temperature | None = None
    top_p: api.Probability | None = None
    top_k: api.Whole | None = None
    stop_sequences: api.StopStrings | None = None
    stream: bool | None = None
    output_config: OutputConfig | None = None
    """A JSON schema that the answer must conform to."""
    thread: api.Ignored = api.IGNORED
    """Refused in the way that makes clients send whole conversations: none are kept."""

    # vLLM's
    priority: api.Priority | None = None
    cache_salt: api.Salt | None = None

    # Accepted, and without effect on the answer
    metadata: api.Ignored = api.IGNORED
    service_tier: api.Ignored = api.IGNORED
    cache_control: api.Ignored = api.IGNORED
    """All prompts are cached, as far as there is room."""


C = TypeVar("C", bound=CountRequest)

_THINKING = "enable_thinking"
"""What most templates call it."""
_SAME = ("temperature", "top_p", "top_k", "stream", "priority", "cache_salt")
"""Fields that a chat has, too."""
_CHOICES: dict[str, api.ToolChoice] = {"auto": "auto", "none": "none", "any": "required"}


class Counted(msgspec.Struct):
    input_tokens: int


async def messages(call: Call, data: MessagesRequest) -> Annotated[Answer, dict[str, Any]]:
    """Answer, as Anthropic's API."""
    data = with_thinking(data, call.context.tokenizer.chat_template)
    answer, [parser] = await start_chat(call, to_chat(data), prefix="msg_")
    answer.reply = MessagesReply(answer.id, answer.seed, data.model, parser, data.stop_sequences or ())
    return answer


async def count_tokens(call: Call, data: CountRequest) -> Counted:
    """Tokens of a prompt."""
    call.wanted_adapter(data)
    chat = prompt_of(with_thinking(data, call.context.tokenizer.chat_template))
    return Counted(len(await encode_messages(call, chat, plan_tools(chat.tools, chat.tool_choice))))


def to_chat(data: MessagesRequest) -> api.ChatRequest:
    """Convert a request to a chat. Raises ApiError for fields that are not supported."""
    if bytes(data.thread) not in (b"", b"null"):
        raise unsupported("thread", "conversations are not kept here; send all messages")
    wanted = None if data.output_config is None else data.output_config.format
    return msgspec.structs.replace(
        prompt_of(data),
        max_completion_tokens=data.max_tokens,
        stop=data.stop_sequences,
        response_format=None if wanted is None else schema_format(wanted.schema),
        **{name: getattr(data, name) for name in _SAME},
    )


def schema_format(
    schema: api.Schema, name: str | None = None, strict: bool | None = None
) -> api.ResponseFormat:
    """Return the form of a chat's answer that conforms to a JSON schema."""
    wanted = api.JsonSchemaFormat(name=name or "answer", schema=schema, strict=strict)
    return api.ResponseFormat(type="json_schema", json_schema=wanted)


def function_tool(
    name: str, description: str | None, parameters: api.Schema | None, strict: bool | None
) -> api.Tool:
    function = api.Function(name=name, description=description, parameters=parameters, strict=strict)
    return api.Tool(function=function)


def function_call(id_: str, name: str, arguments: str) -> api.ToolCall:
    return api.ToolCall(id=id_, function=api.FunctionCall(name=name, arguments=arguments))


def named_tool(name: str) -> api.NamedTool:
    return api.NamedTool(function=api.FunctionName(name=name))


def with_thinking(data: C, template: str | None) -> C:
    """Return the request with ``thinking`` as a variable of the chat template. Raises ApiError if the
    template has none for it."""
    if data.thinking is None:
        return data
    wanted = data.thinking.type != "disabled"
    variables = data.chat_template_kwargs or {}
    if _THINKING in (template or ""):
        variables = {_THINKING: wanted, **variables}
    elif wanted:
        why = f"the model's chat template has no variable {_THINKING}; set its own in chat_template_kwargs"
        raise unsupported("thinking", why)
    return msgspec.structs.replace(data, thinking=None, chat_template_kwargs=variables)


def prompt_of(data: CountRequest) -> api.ChatRequest:
    """Convert the part of a request that determines the prompt. Raises ApiError for what is not supported."""
    for i, tool in enumerate(data.tools or ()):
        if tool.type not in (None, "custom"):
            why = f"{tool.type[:100]!r} is not supported: only tools with input_schema"
            raise unsupported(f"tools[{i}].type", why)
    tools = [function_tool(t.name, t.description, t.input_schema, t.strict) for t in data.tools or ()]
    choice, parallel = data.tool_choice, None
    found: api.ToolChoice | None = None
    if choice is not None:
        is_named = choice.type == "tool"
        found = named_tool(needed(choice.name, "tool_choice.name")) if is_named else _CHOICES[choice.type]
        single = choice.disable_parallel_tool_use
        parallel = None if single is None else not single
    return api.ChatRequest(
        model=data.model,
        adapters=data.adapters,
        messages=list(_messages(data)),
        tools=tools or None,
        tool_choice=found,
        parallel_tool_calls=parallel,
        chat_template_kwargs=data.chat_template_kwargs,
        # The client has begun the answer.
        continue_final_message=(bool(data.messages) and data.messages[-1].role == "assistant") or None,
    )


def _messages(data: CountRequest) -> Iterator[api.Message]:
    """Convert the turns. Results of tools become separate messages, in order, between a user's texts."""
    if data.system:
        yield api.Message(role="system", content=_text(data.system, "system"))
    for i, message in enumerate(data.messages):
        role, content, where = message.role, message.content, f"messages[{i}].content"
        if isinstance(content, str) or role == "system":
            yield api.Message(role=role, content=_text(content, where))
            continue
        texts: list[str] = []
        calls: list[api.ToolCall] = []
        for j, block in enumerate(content):
            at = f"{where}[{j}]"
            if role == "assistant" and block.type in ("thinking", "redacted_thinking"):
                continue
            if role == "assistant" and block.type == "tool_use":
                id_, name = needed(block.id, f"{at}.id"), needed(block.name, f"{at}.name")
                calls.append(function_call(id_, name, msgspec.json.encode(block.input or {}).decode()))
            elif role == "user" and block.type == "tool_result":
                if texts:
                    yield api.Message(role="user", content="\n".join(texts))
                    texts = []
                id_ = needed(block.tool_use_id, f"{at}.tool_use_id")
                result = _text(block.content or "", f"{at}.content")
                yield api.Message(role="tool", tool_call_id=id_, content=result)
            else:
                texts.append(_block_text(block, at))
        if texts or role == "assistant" or not content:
            yield api.Message(role=role, content="\n".join(texts), tool_calls=calls or None)


def _text(content: Content, where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_block_text(block, f"{where}[{i}]") for i, block in enumerate(content))


def _block_text(block: Block, where: str) -> str:
    if block.type != "text":
        raise unsupported(f"{where}.type", f"{block.type[:100]!r} is not supported here: only texts are")
    return needed(block.text, f"{where}.text")
