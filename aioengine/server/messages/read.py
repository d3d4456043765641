"""Converts a request for a message to a chat request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from aioengine.server.errors import THREAD_NOT_FOUND, ApiError, invalid, unsupported
from aioengine.server.messages.api import Block, Content, CountRequest, MessagesRequest
from aioengine.server.openai import api

C = TypeVar("C", bound=CountRequest)

_THINKING = "enable_thinking"
"""What most templates call it."""
_SAME = ("temperature", "top_p", "top_k", "stream", "priority", "cache_salt")
"""Fields that a chat has, too."""


def to_chat(data: MessagesRequest) -> api.ChatRequest:
    """Convert a request to a chat. Raises ApiError for fields that are not supported."""
    if data.thread is not None and data.thread.type == "continue":
        text = "thread: conversations are not kept here; send all messages"
        raise ApiError(404, text, param="thread", code=THREAD_NOT_FOUND)
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
        raise unsupported(
            "thinking",
            f"the model's chat template has no variable {_THINKING}; set its own in chat_template_kwargs",
        )
    return msgspec.structs.replace(data, thinking=None, chat_template_kwargs=variables)


def prompt_of(data: CountRequest) -> api.ChatRequest:
    """Convert the part of a request that determines the prompt. Raises ApiError for what is not supported."""
    choice = data.tool_choice
    single = None if choice is None else choice.disable_parallel_tool_use
    for i, tool in enumerate(data.tools or ()):
        if tool.type not in (None, "custom"):
            why = f"{tool.type[:100]!r} is not supported: only tools with input_schema"
            raise unsupported(f"tools[{i}].type", why)
    return api.ChatRequest(
        model=data.model,
        adapters=data.adapters,
        messages=list(_messages(data)),
        tools=[
            function_tool(tool.name, tool.description, tool.input_schema, tool.strict) for tool in data.tools
        ]
        if data.tools
        else None,
        tool_choice=_choice(data),
        parallel_tool_calls=None if single is None else not single,
        chat_template_kwargs=data.chat_template_kwargs,
        # The client has begun the answer.
        continue_final_message=(bool(data.messages) and data.messages[-1].role == "assistant") or None,
    )


def function_tool(
    name: str, description: str | None, parameters: api.Schema | None, strict: bool | None
) -> api.Tool:
    function = api.Function(name=name, description=description, parameters=parameters, strict=strict)
    return api.Tool(function=function)


def _choice(data: CountRequest) -> api.ToolChoice | None:
    choice = data.tool_choice
    if choice is None or choice.type == "any":
        return None if choice is None else "required"
    if choice.type != "tool":
        return choice.type
    if choice.name is None:
        raise invalid("tool_choice.name", "is missing")
    return api.NamedTool(function=api.FunctionName(name=choice.name))


def _messages(data: CountRequest) -> Iterator[api.Message]:
    if data.system:
        yield api.Message(role="system", content=_text(data.system, "system"))
    for i, message in enumerate(data.messages):
        where, content = f"messages[{i}].content", message.content
        if isinstance(content, str) or message.role == "system":
            yield api.Message(role=message.role, content=_text(content, where))
        elif message.role == "assistant":
            yield _of_assistant(content, where)
        else:
            yield from _of_user(content, where)


def _of_user(blocks: list[Block], where: str) -> Iterator[api.Message]:
    """Convert a user's turn. Results of tools become separate messages, in order, between the texts."""
    texts: list[str] = []
    for i, block in enumerate(blocks):
        if block.type != "tool_result":
            texts.append(_block_text(block, f"{where}[{i}]"))
            continue
        if texts:
            yield api.Message(role="user", content="\n".join(texts))
            texts = []
        if block.tool_use_id is None:
            raise invalid(f"{where}[{i}].tool_use_id", "is missing")
        text = _text(block.content or "", f"{where}[{i}].content")
        yield api.Message(role="tool", tool_call_id=block.tool_use_id, content=text)
    if texts or not blocks:
        yield api.Message(role="user", content="\n".join(texts))


def _of_assistant(blocks: list[Block], where: str) -> api.Message:
    texts: list[str] = []
    calls: list[api.ToolCall] = []
    for i, block in enumerate(blocks):
        if block.type in ("thinking", "redacted_thinking"):
            continue
        if block.type != "tool_use":
            texts.append(_block_text(block, f"{where}[{i}]"))
            continue
        if block.id is None or block.name is None:
            raise invalid(f"{where}[{i}].{'id' if block.id is None else 'name'}", "is missing")
        arguments = msgspec.json.encode(block.input or {}).decode()
        function = api.FunctionCall(name=block.name, arguments=arguments)
        calls.append(api.ToolCall(id=block.id, function=function))
    return api.Message(role="assistant", content="\n".join(texts), tool_calls=calls or None)


def _text(content: Content, where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_block_text(block, f"{where}[{i}]") for i, block in enumerate(content))


def _block_text(block: Block, where: str) -> str:
    if block.type != "text":
        raise unsupported(f"{where}.type", f"{block.type[:100]!r} is not supported here: only texts are")
    if block.text is None:
        raise invalid(f"{where}.text", "is missing")
    return block.text
