"""Answers of chats and completions: their types, and how they are written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from aioengine.runtime.output import RequestOutput
from aioengine.server.errors import ApiError
from aioengine.server.formats.source import AnswerParser, Parsed
from aioengine.server.openai.api import (
    FinishReason,
    FunctionCall,
    GenerationFields,
    PromptTokensDetails,
    StreamOptions,
    Usage,
)
from aioengine.server.openai.logprobs import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    TextOffsets,
    TokenBytes,
    chat_logprobs,
    prompt_logprobs,
)

PromptLogprobs = list[dict[str, PromptLogprob] | None]
DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams of completions."""
_encode = msgspec.json.Encoder().encode


def event(data: bytes, name: str | None = None) -> bytes:
    """Return a server-sent event."""
    return b"data: %b\n\n" % data if name is None else b"event: %b\ndata: %b\n\n" % (name.encode(), data)


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


class AnswerCall(msgspec.Struct, kw_only=True):
    """A call, which is streamed in one piece, and then has an index."""

    index: int | UnsetType = UNSET
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AnswerMessage(msgspec.Struct, kw_only=True):
    """A message, or a part of one when it is streamed."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    """The reasoning before the answer, of models that write one."""
    refusal: UnsetType | None = UNSET
    tool_calls: list[AnswerCall] | UnsetType = UNSET


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


class _Reply:
    """What both kinds of replies have in common. They keep nothing large of the request."""

    def __init__(self, id_: str, seed: int | None, fields: GenerationFields, token_bytes: TokenBytes) -> None:
        wanted = fields.stream_options or StreamOptions()
        self._head: dict[str, Any] = {"id": id_, "created": int(time.time()), "seed": seed}
        self._head["model"] = fields.model
        self._include_usage = bool(wanted.include_usage)
        self._continuous_usage = self._include_usage and bool(wanted.continuous_usage_stats)
        self._with_ids = bool(fields.return_token_ids)
        self._prompt_logprobs = fields.prompt_logprobs
        self._token_bytes = token_bytes

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        part = self._next_part(index, output, self._usage_so_far(output) if self._continuous_usage else None)
        return None if part is None else event(_encode(part))

    def last_events(self, usage: Usage) -> bytes:
        return event(_encode(self._part([], usage))) + DONE if self._include_usage else DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.body_for()) + DONE

    def _next_part(self, index: int, output: RequestOutput, usage: Usage | None) -> Head | None:
        """Make the next part of a stream; None if there is nothing to send."""
        raise NotImplementedError

    def _part(self, choices: list[Any], usage: Usage | None) -> Head:
        raise NotImplementedError

    def _usage_so_far(self, output: RequestOutput) -> Usage:
        prompt, answer = output.prompt_tokens, output.output_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=answer,
            total_tokens=prompt + answer,
            prompt_tokens_details=PromptTokensDetails(output.cached_tokens),
        )

    def _add_prompt(self, to: CompletionChoice | ChatCompletion, output: RequestOutput) -> None:
        """Add what was asked for of the prompt."""
        if self._prompt_logprobs is not None:
            to.prompt_logprobs = prompt_logprobs(output, self._prompt_logprobs, self._token_bytes)
        if self._with_ids:
            to.prompt_token_ids = output.prompt_token_ids


class CompletionReply(_Reply):
    """The reply of a completion of ``count`` choices. ``echoed`` has the prompts' texts if they precede the
    answers; ``logprobs`` is as in the request."""

    def __init__(
        self,
        id_: str,
        seed: int | None,
        fields: GenerationFields,
        count: int,
        *,
        logprobs: int | None,
        echoed: Sequence[str] | None,
        token_bytes: TokenBytes,
    ) -> None:
        super().__init__(id_, seed, fields, token_bytes)
        self._logprobs = logprobs
        texts: Sequence[str | None] = [None] if echoed is None else echoed
        self._echoed = [texts[index * len(texts) // count] for index in range(count)]
        self._offsets = [TextOffsets(begin=len(text or "")) for text in self._echoed]
        self._begun: set[int] = set()

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        choices = [self._choice(i, output, is_whole=True) for i, output in enumerate(outputs)]
        return _encode(self._part(choices, usage))

    def _next_part(self, index: int, output: RequestOutput, usage: Usage | None) -> Completion | None:
        choice = self._choice(index, output, is_whole=False)
        if not choice.text and not output.finished and choice.logprobs is None and not choice.token_ids:
            return None
        return self._part([choice], usage)

    def _part(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(**self._head, choices=choices, usage=usage)

    def _choice(self, index: int, output: RequestOutput, *, is_whole: bool) -> CompletionChoice:
        text = output.text if is_whole else output.text_delta
        choice = CompletionChoice(
            index=index, text=text, finish_reason=output.finish_reason, stop_reason=output.stop_reason
        )
        if self._with_ids:
            choice.token_ids = output.token_ids if is_whole else output.token_ids_delta
        if self._logprobs is not None:
            choice.logprobs = CompletionLogprobs()
        if index not in self._begun:
            self._begun.add(index)
            self._add_prompt(choice, output)
            echoed = self._echoed[index]
            if echoed is not None:
                choice.text = echoed + choice.text
                if choice.logprobs is not None and self._logprobs is not None:
                    choice.logprobs.add_prompt(output, self._logprobs, echoed, self._token_bytes)
        if choice.logprobs is not None:  # that of the token that ends the answer, too
            entries = output.logprobs if is_whole else output.logprobs_delta
            choice.logprobs.add_answer(entries or (), self._token_bytes, self._offsets[index])
        return choice


class ChatReply(_Reply):
    """The reply of a chat. ``parsers`` has one parser for each choice, or None where tool calls are not
    parsed; ``echoed`` precedes every answer."""

    def __init__(
        self,
        id_: str,
        seed: int | None,
        fields: GenerationFields,
        *,
        parsers: Sequence[AnswerParser | None],
        token_bytes: TokenBytes,
        with_logprobs: bool,
        echoed: str = "",
    ) -> None:
        super().__init__(id_, seed, fields, token_bytes)
        self._parsers = parsers
        self._calls: dict[int, int] = {}
        """Number of calls so far of the choices that have begun."""
        self._with_logprobs = with_logprobs
        self._echoed = echoed

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        choices = [self._whole_choice(index, output) for index, output in enumerate(outputs)]
        answer = ChatCompletion(**self._head, choices=choices, usage=usage)
        self._add_prompt(answer, outputs[0])
        return _encode(answer)

    def _next_part(self, index: int, output: RequestOutput, usage: Usage | None) -> ChatCompletion | None:
        text, calls, reasoning = parse_output(self._parsers[index], output.text_delta, output)
        logprobs = self._logprobs(output, output.logprobs_delta)
        has_numbers = (logprobs and logprobs.content) or (self._with_ids and output.token_ids_delta)
        if not (text or reasoning or calls or output.finished or has_numbers):
            return None
        delta = AnswerMessage()
        choice = ChatChoice(index=index, delta=delta, logprobs=logprobs)
        part = self._part([choice], usage)
        count = self._calls.get(index)
        if count is None:
            count = 0
            delta.role, delta.content = "assistant", self._echoed + text
            self._add_prompt(part, output)
        elif text:
            delta.content = text
        if reasoning:
            delta.reasoning_content = reasoning
        if calls:
            delta.tool_calls = [
                AnswerCall(index=count + i, id=call.id, function=call.function)
                for i, call in enumerate(calls)
            ]
        count = self._calls[index] = count + len(calls)
        if output.finished:
            choice.finish_reason, choice.stop_reason = _finish_reason(output, count), output.stop_reason
        if self._with_ids:
            choice.token_ids = output.token_ids_delta
        return part

    def _part(self, choices: list[ChatChoice], usage: Usage | None) -> ChatCompletion:
        return ChatCompletion(**self._head, object="chat.completion.chunk", choices=choices, usage=usage)

    def _whole_choice(self, index: int, output: RequestOutput) -> ChatChoice:
        text, calls, reasoning = parse_output(self._parsers[index], output.text, output)
        text = self._echoed + text
        message = AnswerMessage(
            role="assistant",
            content=text if text or not calls else None,
            reasoning_content=reasoning or UNSET,
            refusal=None,
            tool_calls=[AnswerCall(id=call.id, function=call.function) for call in calls] or UNSET,
        )
        return ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs(output, output.logprobs or ()),
            finish_reason=_finish_reason(output, len(calls)),
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if self._with_ids else UNSET,
        )

    def _logprobs(self, output: RequestOutput, entries: Sequence[Any]) -> ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        if output.finished and isinstance(output.stop_reason, int):  # it is not part of the text
            entries = entries[:-1]
        return chat_logprobs(entries, self._token_bytes)


def parse_output(parser: AnswerParser | None, text: str, output: RequestOutput) -> Parsed:
    """Parse the next ``text`` of an answer, and return the part that has become certain; all of the rest once
    it has ended."""
    if parser is None:
        return Parsed(text)
    parsed = parser.push(text)
    if not output.finished:
        return parsed
    rest = parser.finish(output.stop_reason)
    return Parsed(parsed.text + rest.text, [*parsed.calls, *rest.calls], parsed.reasoning + rest.reasoning)


def _finish_reason(output: RequestOutput, calls: int) -> FinishReason | None:
    return "tool_calls" if calls and output.finish_reason == "stop" else output.finish_reason
