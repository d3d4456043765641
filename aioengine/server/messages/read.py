"""Converts a request for a message to a chat request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from aioengine.server.errors import THREAD_NOT_FOUND, ApiError, needed, unsupported
from aioengine.server.messages.api import Block, Content, CountRequest, MessagesRequest
from aioengine.server.openai import api

C = TypeVar("C", bound=CountRequest)

_THINKING = "enable_thinking"
"""What most templates call it."""
_SAME = ("temperature", "top_p", "top_k", "stream", "priority", "cache_salt")
"""Fields that a chat has, too."""
_CHOICES: dict[str, api.ToolChoice] = {"auto": "auto", "none": "none", "any": "required"}


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
