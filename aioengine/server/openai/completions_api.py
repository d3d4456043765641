"""What ``/v1/completions`` takes and gives."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from aioengine.server.openai.api import GenerationFields, ResponseFormat, Usage

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class CompletionRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    """A text, several texts, token ids, or several lists of token ids."""
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """Log-probabilities of each token and of this many most likely ones."""
    response_format: ResponseFormat | None = None
    echo: bool | None = None
    """Only false."""
    best_of: int | None = None
    """Only what ``n`` is."""
    suffix: str | None = None
    """Only null or empty."""


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Of each token in the answer's text."""


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class Completion(msgspec.Struct, kw_only=True):
    """An answer, or a part of one when it is streamed."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Seconds since 1970."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
