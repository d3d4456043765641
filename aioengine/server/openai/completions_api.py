"""Request and response types of ``/v1/completions``."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from aioengine.server.openai.api import GenerationFields, Logprobs, PromptLogprob, ResponseFormat, Usage

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class CompletionRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    """A text, several texts, token ids, or several lists of token ids."""
    logprobs: Logprobs | bool | None = None
    """Log-probabilities of each token and of this many most likely ones; true is 1, false is null."""
    response_format: ResponseFormat | None = None
    echo: bool | None = None
    """Whether the prompt precedes the answer, in the text and in the log-probabilities."""
    add_special_tokens: bool | None = None
    """Whether special tokens are added to text prompts; true if not given."""
    suffix: str | None = None
    """Only null or empty."""


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for a prompt's first token."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Offset of each token in the choice's text."""

    def followed_by(self, other: CompletionLogprobs) -> CompletionLogprobs:
        return CompletionLogprobs(
            self.tokens + other.tokens,
            self.token_logprobs + other.token_logprobs,
            self.top_logprobs + other.top_logprobs,
            self.text_offset + other.text_offset,
        )


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """An answer, or a part of one when it is streamed."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    seed: int | None
    """Seed of the first choice. A request with this seed gets the same answer."""
    """Seconds since 1970."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
