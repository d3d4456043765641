"""Request types of ``/v1/messages``. Field names are Anthropic's; additional ones are vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aioengine.server.openai import api


class Block(msgspec.Struct, kw_only=True):
    """A part of a content: "text", a call ("tool_use") or its result ("tool_result"). "thinking" and
    "redacted_thinking" are skipped. Fields beyond these are ignored."""

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
    cache_control: dict[str, Any] | None = None


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
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """Has no effect."""


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model reasons first, where its chat template has a variable for that. How long it reasons
    is up to the model."""

    type: Literal["enabled", "adaptive", "disabled"]


class Thread(msgspec.Struct, kw_only=True):
    type: Literal["create", "continue"]
    """"create" has no effect. "continue" is refused in the way that makes clients send the whole
    conversation, because conversations are not kept."""


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
    thread: Thread | None = None
    cache_control: dict[str, Any] | None = None
    """Nothing depends on it, here and in tools: the prefix cache keeps what was used last."""

    # vLLM's
    priority: api.Priority | None = None
    cache_salt: api.Salt | None = None

    # Accepted, and without effect on the answer
    metadata: api.Ignored = api.IGNORED
    service_tier: api.Ignored = api.IGNORED
