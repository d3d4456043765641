"""Request and response types of ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from aioengine.server.openai.api import (
    Count,
    GenerationFields,
    Logprobs,
    PromptLogprob,
    ResponseFormat,
    Usage,
)
from aioengine.server.openai.completions_api import FinishReason

MAX_MESSAGES = 2048
MAX_PARTS = 2048
"""Maximum parts of one message."""
MAX_TOOLS = 128
"""Maximum tools, and calls in one message. These three are OpenAI's bounds; a template's work grows with
each."""


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    """Only "text"; in an assistant's turn also "refusal"."""
    text: str | None = None
    refusal: str | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str
    """JSON; an empty text in a request means {}."""


class ToolCall(msgspec.Struct, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(msgspec.Struct, kw_only=True):
    """One turn. Fields beyond these, as in answers that clients send back, are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Meta(max_length=MAX_PARTS)] | None = None
    refusal: str | None = None
    """The assistant's refusal, instead of content."""
    reasoning_content: str | None = None
    """The assistant's reasoning in an earlier answer, for templates that show it."""
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=MAX_TOOLS)] | None = None
    tool_call_id: str | None = None


FunctionText = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$(?!\n)")]
"""A function's name."""


class Function(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: FunctionText
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: Function


class CustomTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="custom"):
    """Refused, because its input is free text, which the server does not parse."""

    custom: Any = None


class FunctionName(msgspec.Struct, kw_only=True):
    name: str


class NamedTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"):
    function: FunctionName


class NamedCustomTool(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="custom"
):
    """Refused."""

    custom: Any = None


class Allowed(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    """Restricts the tools by name; the model sees no others."""

    allowed_tools: Allowed


ToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedTools | NamedCustomTool


class ChatRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    """Takes precedence over ``max_tokens``."""
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool | CustomTool], Meta(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    """False: at most one call. True: up to 16 calls where a call is required (by default one)."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, such as ``enable_thinking``."""
    add_generation_prompt: bool | None = None
    """Whether the opening of the assistant's next turn follows the messages; true if it is not given."""
    continue_final_message: bool | None = None
    """Whether the answer continues the last message instead of opening a new turn."""
    echo: bool | None = None
    """Whether the answer's content begins with the last message, if that is the assistant's."""
    verbosity: Literal["low", "medium", "high"] | None = None
    """Has no effect."""
    reasoning_effort: Any = None
    """The variable ``reasoning_effort`` of chat templates that have it; otherwise only "none"."""

    # Refused unless null: they would change the answer
    functions: Any = None
    function_call: Any = None
    audio: Any = None
    modalities: Any = None
    prediction: Any = None
    web_search_options: Any = None


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class AnswerMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    """The reasoning before the answer, of models that write one."""
    refusal: None = None
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Seconds since 1970."""
    seed: int | None
    """Seed of the first choice. A request with this seed gets the same answer."""
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ToolCallDelta(msgspec.Struct, kw_only=True):
    """A call is streamed in one piece."""

    index: int
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Delta(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    seed: int | None
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | UnsetType = UNSET
