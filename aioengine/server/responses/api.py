"""Request types of ``/v1/responses``. Field names are OpenAI's; additional ones are vLLM's."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from aioengine.server.openai import api


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
    """{"type": "function", "name": ...} or {"type": "allowed_tools", "mode": ..., "tools": [...]}."""

    type: str
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[ResponsesToolChoice], Meta(max_length=api.MAX_TOOLS)] | None = None


class TextFormat(api.Strict, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    name: api.Name | None = None
    schema: api.Schema | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(api.Strict, kw_only=True):
    format: TextFormat | None = None
    verbosity: api.Verbosity | None = None
    """Without effect, as for chats."""


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
