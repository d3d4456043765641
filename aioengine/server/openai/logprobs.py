"""Log-probabilities in OpenAI's two formats, and in vLLM's for prompts."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from aioengine.request import TokenLogprob
from aioengine.runtime.output import RequestOutput

_encode = msgspec.json.Encoder().encode
TokenBytes = Callable[[int], bytes]


class PromptLogprob(msgspec.Struct, gc=False):
    logprob: float
    rank: int | None
    """1 for the most likely token; null for one that is not among those asked for."""
    decoded_token: str


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatTokenLogprob]
    refusal: None = None


class TextOffsets:
    """Offsets of tokens in their text: in ``text`` if it is known, else in the decoded tokens.

    A known text may lack what a tokenizer adds: a token at the beginning, or a space before the first word. A
    character of several tokens belongs to the last of them.
    """

    def __init__(self, text: str | None = None, begin: int = 0) -> None:
        self._text = text
        self._end = begin

    @functools.cached_property
    def _decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, data: bytes) -> int:
        """Return the offset of the next token, whose bytes are given."""
        begin, new = self._end, self._decoder.decode(data)
        if self._text is None or self._text.startswith(new, begin):
            self._end += len(new)
        elif new[0] == " " and self._text.startswith(new[1:], begin):
            self._end += len(new) - 1
        return begin


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    """Null for a prompt's first token."""
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []
    """Offset of each token in the choice's text."""

    def add_answer(
        self, entries: Sequence[TokenLogprob], token_bytes: TokenBytes, offsets: TextOffsets
    ) -> None:
        """Add the answer's tokens; ``offsets`` has consumed the tokens before them."""
        for entry in entries:
            self._add(entry.token_id, entry, len(entry.top), token_bytes, offsets)

    def add_prompt(self, output: RequestOutput, count: int, text: str, token_bytes: TokenBytes) -> None:
        """Add the tokens of the prompt with this text, each with at most ``count`` of the most likely."""
        offsets = TextOffsets(text)
        token_bytes = functools.cache(token_bytes)  # a prompt and what may follow it have few tokens, often
        entries = output.prompt_logprobs or [None] * len(output.prompt_token_ids)
        for token, entry in zip(output.prompt_token_ids, entries, strict=True):
            self._add(token, entry, count, token_bytes, offsets)

    def _add(
        self,
        token: int,
        entry: TokenLogprob | None,
        count: int,
        token_bytes: TokenBytes,
        offsets: TextOffsets,
    ) -> None:
        data = token_bytes(token)
        text = _text(data)
        self.tokens.append(text)
        self.text_offset.append(offsets.take(data))
        if entry is None:
            self.token_logprobs.append(None)
            self.top_logprobs.append(None)
            return
        self.token_logprobs.append(_finite(entry.logprob))
        top = {_text(token_bytes(best)): _finite(logprob) for best, logprob in reversed(entry.top[:count])}
        top.setdefault(text, _finite(entry.logprob))
        self.top_logprobs.append(_encoded(top))


def prompt_logprobs(
    output: RequestOutput, count: int, token_bytes: TokenBytes
) -> list[dict[str, PromptLogprob] | None]:
    """Format the prompt's log-probabilities as vLLM does: for each token but the first, itself and the
    ``count`` most likely ones, by token id."""
    token_bytes = functools.cache(token_bytes)

    def ranked(entry: TokenLogprob) -> dict[str, PromptLogprob]:
        found = {
            str(token): PromptLogprob(_finite(logprob), rank, _text(token_bytes(token)))
            for rank, (token, logprob) in enumerate(entry.top[:count], start=1)
        }
        own = PromptLogprob(_finite(entry.logprob), None, _text(token_bytes(entry.token_id)))
        found.setdefault(str(entry.token_id), own)
        return found

    entries = output.prompt_logprobs or ()
    return [None if entry is None else _encoded(ranked(entry)) for entry in entries]


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
