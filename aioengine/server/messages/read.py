"""Converts a request for a message to a chat request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from aioengine.server.errors import THREAD_NOT_FOUND, ApiError, unsupported
from aioengine.server.messages import api
from aioengine.server.openai import chat_api
from aioengine.server.openai.api import JsonSchemaFormat, ResponseFormat

C = TypeVar("C", bound=api.CountRequest)

_THINKING = "enable_thinking"
"""What most templates call it."""


def to_chat(data: api.MessagesRequest) -> chat_api.ChatRequest:
    """Convert a request to a chat. Raises ApiError for fields that are not supported."""
    if data.thread is not None and data.thread.type == "continue":
        raise ApiError(
            404,
            "thread: conversations are not kept here; send all messages",
            param="thread",
            code=THREAD_NOT_FOUND,
        )
    chat = prompt_of(data)
    chat.max_completion_tokens = data.max_tokens
    chat.temperature, chat.top_p, chat.top_k = data.temperature, data.top_p, data.top_k
    chat.stop = data.stop_sequences
    chat.stream = data.stream
    chat.priority, chat.cache_salt = data.priority, data.cache_salt
    if data.output_config is not None and data.output_config.format is not None:
        schema = JsonSchemaFormat(name="answer", schema=data.output_config.format.schema)
        chat.response_format = ResponseFormat(type="json_schema", json_schema=schema)
    return chat


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


def prompt_of(data: api.CountRequest) -> chat_api.ChatRequest:
    """Convert the part of a request that determines the prompt. Raises ApiError for what is not supported."""
    choice = data.tool_choice
    parallel = None
    if choice is not None and choice.disable_parallel_tool_use is not None:
        parallel = not choice.disable_parallel_tool_use
    return chat_api.ChatRequest(
        model=data.model,
        adapters=data.adapters,
        messages=list(_messages(data)),
        tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(data.tools)] if data.tools else None,
        tool_choice=None if choice is None else _choice(choice),
        parallel_tool_calls=parallel,
        chat_template_kwargs=data.chat_template_kwargs,
        continue_final_message=_is_begun(data.messages) or None,
    )


def _is_begun(messages: list[api.MessageParam]) -> bool:
    """Whether the client has begun the answer."""
    return bool(messages) and messages[-1].role == "assistant"


def _messages(data: api.CountRequest) -> Iterator[chat_api.Message]:
    if data.system:
        yield chat_api.Message(role="system", content=_text(data.system, "system"))
    for i, message in enumerate(data.messages):
        where = f"messages[{i}].content"
        if message.role == "assistant":
            yield _of_assistant(message.content, where)
        elif isinstance(message.content, str) or message.role == "system":
            yield chat_api.Message(role=message.role, content=_text(message.content, where))
        else:
            yield from _of_user(message.content, where)


def _of_user(blocks: list[api.Block], where: str) -> Iterator[chat_api.Message]:
    """Convert a user's turn. Results of tools become separate messages, in order, between the texts."""
    texts: list[str] = []
    for i, block in enumerate(blocks):
        if block.type != "tool_result":
            texts.append(_block_text(block, f"{where}[{i}]"))
            continue
        if texts:
            yield chat_api.Message(role="user", content="\n".join(texts))
            texts = []
        if block.tool_use_id is None:
            raise _invalid(f"{where}[{i}].tool_use_id", "is missing")
        text = _text(block.content or "", f"{where}[{i}].content")
        yield chat_api.Message(role="tool", tool_call_id=block.tool_use_id, content=text)
    if texts or not blocks:
        yield chat_api.Message(role="user", content="\n".join(texts))


def _of_assistant(content: api.Content, where: str) -> chat_api.Message:
    if isinstance(content, str):
        return chat_api.Message(role="assistant", content=content)
    texts: list[str] = []
    calls: list[chat_api.ToolCall] = []
    for i, block in enumerate(content):
        if block.type in ("thinking", "redacted_thinking"):
            continue
        if block.type != "tool_use":
            texts.append(_block_text(block, f"{where}[{i}]"))
            continue
        if block.id is None or block.name is None:
            raise _invalid(f"{where}[{i}].{'id' if block.id is None else 'name'}", "is missing")
        arguments = msgspec.json.encode(block.input or {}).decode()
        calls.append(
            chat_api.ToolCall(
                id=block.id, function=chat_api.FunctionCall(name=block.name, arguments=arguments)
            )
        )
    return chat_api.Message(role="assistant", content="\n".join(texts), tool_calls=calls or None)


def _text(content: api.Content, where: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_block_text(block, f"{where}[{i}]") for i, block in enumerate(content))


def _block_text(block: api.Block, where: str) -> str:
    if block.type != "text":
        raise unsupported(f"{where}.type", f"{block.type[:100]!r} is not supported here: only texts are")
    if block.text is None:
        raise _invalid(f"{where}.text", "is missing")
    return block.text


def _tool(tool: api.MessagesTool, where: str) -> chat_api.Tool:
    if tool.type not in (None, "custom"):
        raise unsupported(
            f"{where}.type", f"{tool.type[:100]!r} is not supported: only tools with input_schema"
        )
    return chat_api.Tool(
        function=chat_api.Function(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
    )


def _choice(choice: api.MessagesToolChoice) -> chat_api.ToolChoice:
    if choice.type == "any":
        return "required"
    if choice.type != "tool":
        return choice.type
    if choice.name is None:
        raise _invalid("tool_choice.name", "is missing")
    return chat_api.NamedTool(function=chat_api.FunctionName(name=choice.name))


def _invalid(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{param}: {reason}", param=param, code="invalid_value")
