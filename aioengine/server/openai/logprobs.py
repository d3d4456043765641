"""Log-probabilities in OpenAI's two formats."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from aioengine.request import TokenLogprob

_encode = msgspec.json.Encoder().encode
TokenBytes = Callable[[int], bytes]


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    """Null for a prompt's first token."""
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    """Offset of each token in the texts of all tokens before it."""

    def add(
        self,
        tokens: Sequence[int],
        entries: Sequence[TokenLogprob | None],
        count: int,
        token_bytes: TokenBytes,
        offset: int,
    ) -> int:
        """Add tokens, each with at most ``count`` of the most likely ones. The first begins at ``offset``;
        returns where the next one does."""
        token_bytes = functools.cache(token_bytes)  # a prompt and what may follow it have few tokens, often
        for token, entry in zip(tokens, entries, strict=True):
            text = _text(token_bytes(token))
            self.tokens.append(text)
            self.text_offset.append(offset)
            offset += len(text)
            if entry is None:
                self.token_logprobs.append(None)
                self.top_logprobs.append(None)
                continue
            self.token_logprobs.append(_finite(entry.logprob))
            best = reversed(entry.top[:count])
            top = {_text(token_bytes(other)): _finite(logprob) for other, logprob in best}
            top.setdefault(text, _finite(entry.logprob))
            self.top_logprobs.append(_encoded(top))
        return offset


def chat_logprobs(entries: Sequence[TokenLogprob], token_bytes: TokenBytes) -> ChatLogprobs:
    def top(token: int, logprob: float) -> TopLogprob:
        data = token_bytes(token)
        return TopLogprob(_text(data), _finite(logprob), list(data))

    content = []
    for entry in entries:
        own = top(entry.token_id, entry.logprob)
        best = [top(token, logprob) for token, logprob in entry.top]
        content.append(_encoded(ChatTokenLogprob(own.token, own.logprob, own.bytes, best)))
    return ChatLogprobs(content)


def _encoded(value: Any) -> Any:
    """Encode each value to JSON by itself, because there may be very many, and objects for all of them would
    occupy the interpreter and the garbage collector."""
    return msgspec.Raw(_encode(value))


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


def _finite(logprob: float) -> float:
    """Replace infinity, which JSON lacks, by -9999 as OpenAI's API does."""
    return max(logprob, -9999.0)
