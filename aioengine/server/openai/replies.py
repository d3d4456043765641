"""Answers of chats and completions: their types, and how they are written, with log-probabilities in OpenAI's
two formats."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from aioengine.request import TokenLogprob
from aioengine.runtime.output import RequestOutput
from aioengine.server.errors import ApiError
from aioengine.server.formats.source import AnswerParser, Parsed
from aioengine.server.openai.api import (
    ChatRequest,
    CompletionRequest,
    FinishReason,
    GenerationFields,
    StreamOptions,
    ToolCall,
    Usage,
)

DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams of completions."""
_encode = msgspec.json.Encoder().encode
TokenBytes = Callable[[int], bytes]
Scored = tuple[int, TokenLogprob | None]
"""A token, and its log-probability if it has one."""


def event(data: bytes, name: str | None = None) -> bytes:
    """Return a server-sent event."""
    return b"data: %b\n\n" % data if name is None else b"event: %b\ndata: %b\n\n" % (name.encode(), data)


class PromptLogprob(msgspec.Struct, gc=False):
    logprob: float
    rank: int | None
    """1 for the most likely token; null for one that is not among those asked for."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


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

    def add(self, scored: Iterable[Scored], count: int, token_bytes: TokenBytes, offset: int) -> int:
        """Add tokens, each with at most ``count`` of the most likely ones. The first begins at ``offset``;
        returns where the next one does."""
        token_bytes = functools.cache(token_bytes)  # a prompt and what may follow it have few tokens, often
        for token, entry in scored:
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


class Head(msgspec.Struct, kw_only=True):
    """What all answers, and all their parts, begin with."""

    id: str
    created: int
    """Seconds since 1970."""
    seed: int | None
    """Seed of the first choice. A request with this seed gets the same answer."""
    model: str


class Choice(msgspec.Struct, kw_only=True):
    index: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(Choice, kw_only=True):
    text: str
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Head, kw_only=True):
    """An answer, or a part of one when it is streamed."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AnswerMessage(msgspec.Struct, kw_only=True):
    """A message, or a part of one when it is streamed."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    """The reasoning before the answer, of models that write one."""
    refusal: UnsetType | None = UNSET
    tool_calls: Sequence[ToolCall] | UnsetType = UNSET


class ChatChoice(Choice, kw_only=True):
    message: AnswerMessage | UnsetType = UNSET
    """The answer as a whole."""
    delta: AnswerMessage | UnsetType = UNSET
    """What is new of it in a stream."""
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Head, kw_only=True):
    """An answer, or a part of one when it is streamed."""

    object: Literal["chat.completion", "chat.completion.chunk"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage | None = None
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Reply(ABC):
    """The format of an answer at one endpoint. It keeps nothing large of the request but what ``Answer.kept``
    counts."""

    @abstractmethod
    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        """Format the answer in one piece. Each output is new as a whole: its deltas are all of it."""


class StreamReply(Reply):
    """The format of an answer that may also be sent part by part, as server-sent events of JSON."""

    _is_whole = False

    @abstractmethod
    def events(self, index: int, output: RequestOutput) -> bytes | None:
        """Format a choice's next part; None if there is nothing to send. Called in order for each choice."""

    @abstractmethod
    def last_events(self, usage: Usage) -> bytes:
        """Format the end of the stream."""

    @abstractmethod
    def failure(self, error: ApiError) -> bytes:
        """Format the end of a stream that fails."""


class _ChoicesReply(StreamReply):
    """What replies of completions and chats have in common."""

    def __init__(self, head: dict[str, Any], fields: GenerationFields, token_bytes: TokenBytes) -> None:
        wanted = fields.stream_options or StreamOptions()
        self._head = head
        self._include_usage = bool(wanted.include_usage)
        self._continuous_usage = self._include_usage and bool(wanted.continuous_usage_stats)
        self._with_ids = bool(fields.return_token_ids)
        self._prompt_logprobs = fields.prompt_logprobs
        self._token_bytes = token_bytes
        self._begun: set[int] = set()
        """Choices of which something was sent."""

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        told, usage = b"", None
        if self._continuous_usage:
            usage = Usage.of(output.prompt_tokens, output.output_tokens, output.cached_tokens)
        for choice in self._choices(index, output):
            first = None if index in self._begun else output
            self._begun.add(index)
            told += event(_encode(self._part([choice], usage, first)))
        return told or None

    def last_events(self, usage: Usage) -> bytes:
        return event(_encode(self._part([], usage, None))) + DONE if self._include_usage else DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.body_for()) + DONE

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        self._is_whole = True
        choices = [choice for i, output in enumerate(outputs) for choice in self._choices(i, output)]
        return _encode(self._part(choices, usage, outputs[0]))

    @abstractmethod
    def _choices(self, index: int, output: RequestOutput) -> Sequence[Choice]:
        """Make a choice, or the next parts of one; none if there is nothing to send."""

    @abstractmethod
    def _part(self, choices: list[Any], usage: Usage | None, first: RequestOutput | None) -> Head:
        """Make an answer, or a part of one. ``first`` is a choice's first output."""


class CompletionReply(_ChoicesReply):
    """The reply of a completion. ``echoed`` has the prompts' texts if they precede the answers."""

    def __init__(
        self,
        head: dict[str, Any],
        fields: CompletionRequest,
        token_bytes: TokenBytes,
        echoed: Sequence[str] | None,
    ) -> None:
        super().__init__(head, fields, token_bytes)
        self._logprobs, self._echoed, self._n = fields.most_likely, echoed, fields.n or 1
        self._offsets = Counter[int]()
        """Where the next token of each choice starts in its text."""

    def _part(self, choices: list[Any], usage: Usage | None, first: RequestOutput | None) -> Completion:
        return Completion(**self._head, choices=choices, usage=usage)

    def _choices(self, index: int, output: RequestOutput) -> Sequence[CompletionChoice]:
        text = output.text_delta
        choice = CompletionChoice(
            index=index, text=text, finish_reason=output.finish_reason, stop_reason=output.stop_reason
        )
        is_first, offset = index not in self._begun, self._offsets[index]
        if self._with_ids:
            choice.token_ids = output.token_ids_delta
            choice.prompt_token_ids = output.prompt_token_ids if is_first else UNSET
        if self._prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(output, self._prompt_logprobs, self._token_bytes)
        if is_first and self._echoed is not None:
            choice.text = self._echoed[index // self._n] + text
        if self._logprobs is not None:
            choice.logprobs = logprobs = CompletionLogprobs()
            most, token_bytes = self._logprobs, self._token_bytes
            if is_first and self._echoed is not None:
                prompt = output.prompt_token_ids
                entries = output.prompt_logprobs or [None] * len(prompt)
                logprobs.add(zip(prompt, entries, strict=True), most, token_bytes, offset)
                offset = len(choice.text) - len(text)
            # That of the token that ends the answer, too.
            new = ((entry.token_id, entry) for entry in output.logprobs_delta)
            self._offsets[index] = logprobs.add(new, most, token_bytes, offset)
        has_more = choice.text or output.finished or choice.logprobs is not None or choice.token_ids
        return [choice] if has_more else []


class ChatReply(_ChoicesReply):
    """The reply of a chat. ``parsers`` has one parser for each choice, or None where tool calls are not
    parsed."""

    def __init__(
        self,
        head: dict[str, Any],
        fields: ChatRequest,
        token_bytes: TokenBytes,
        parsers: Sequence[AnswerParser | None],
    ) -> None:
        super().__init__(head, fields, token_bytes)
        self._parsers, self._with_logprobs = parsers, bool(fields.logprobs)
        self._calls = Counter[int]()
        """Number of calls so far, by choice."""

    def _part(self, choices: list[Any], usage: Usage | None, first: RequestOutput | None) -> ChatCompletion:
        part = ChatCompletion(**self._head, choices=choices, usage=usage)
        if not self._is_whole:
            part.object = "chat.completion.chunk"
        if self._with_ids and first is not None:
            part.prompt_token_ids = first.prompt_token_ids
        if self._prompt_logprobs is not None and first is not None:
            part.prompt_logprobs = prompt_logprobs(first, self._prompt_logprobs, self._token_bytes)
        return part

    def _choices(self, index: int, output: RequestOutput) -> Sequence[ChatChoice]:
        text, calls, reasoning = parse_output(self._parsers[index], output)
        ids, entries = output.token_ids_delta, output.logprobs_delta
        if output.finished and isinstance(output.stop_reason, int):  # it is not part of the text
            entries = entries[:-1]
        has_numbers = (self._with_logprobs and entries) or (self._with_ids and ids)
        if not (text or reasoning or calls or output.finished or has_numbers):
            return []
        message = AnswerMessage(content=text or UNSET, reasoning_content=reasoning or UNSET)
        if index not in self._begun:
            message.role, message.content = "assistant", text
        if calls:
            message.tool_calls = calls
            for number, call in enumerate(calls, start=self._calls[index]):
                call.index = UNSET if self._is_whole else number
            self._calls[index] += len(calls)
        choice = last = ChatChoice(index=index)
        if self._is_whole:
            message.refusal, message.content = None, text if text or not calls else None
            choice.message = message
        else:
            choice.delta = message
            if calls and output.finished:  # OpenAI's client looks in later parts for the end of a call
                last = ChatChoice(index=index, delta=AnswerMessage())
        if self._with_logprobs:
            choice.logprobs = chat_logprobs(entries, self._token_bytes)
        if self._with_ids:
            choice.token_ids = ids
        if output.finished:
            has_called = self._calls[index] and output.finish_reason == "stop"
            last.finish_reason = "tool_calls" if has_called else output.finish_reason
            last.stop_reason = output.stop_reason
        return [choice] if last is choice else [choice, last]


def parse_output(parser: AnswerParser | None, output: RequestOutput) -> Parsed:
    """Parse what is new of an answer's text, and return the part that has become certain; all of the rest
    once it has ended."""
    text = output.text_delta
    return Parsed(text) if parser is None else parser.push(text, is_last=output.finished)


def prompt_logprobs(output: RequestOutput, count: int, token_bytes: TokenBytes) -> PromptLogprobs:
    """Format the prompt's log-probabilities as vLLM does: for each token but the first, itself and the
    ``count`` most likely ones, by token id."""
    token_bytes, found = functools.cache(token_bytes), PromptLogprobs()
    for entry in output.prompt_logprobs or ():
        if entry is None:
            found.append(None)
            continue
        best: dict[int, tuple[float, int | None]]
        best = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top[:count], start=1)}
        best.setdefault(entry.token_id, (entry.logprob, None))
        ranked = {
            str(token): PromptLogprob(_finite(logprob), rank, _text(token_bytes(token)))
            for token, (logprob, rank) in best.items()
        }
        found.append(_encoded(ranked))
    return found


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
