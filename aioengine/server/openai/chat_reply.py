"""Formats a chat's outputs in OpenAI's format."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from aioengine.request import TokenLogprob
from aioengine.runtime.output import RequestOutput
from aioengine.server.errors import ApiError
from aioengine.server.formats.source import AnswerParser, Parsed
from aioengine.server.openai import chat_api
from aioengine.server.openai.api import Usage
from aioengine.server.openai.completions_api import FinishReason
from aioengine.server.openai.logprobs import TokenBytes, chat_logprobs, prompt_logprobs, without_end
from aioengine.server.streaming import DONE, ReplyOptions, event


class _Choice:
    """Progress of a choice's reply."""

    def __init__(self, parser: AnswerParser | None) -> None:
        self.parser = parser
        self.begun = False
        self.calls = 0


class ChatReply:
    """The reply of a chat. ``parsers`` has one parser for each choice, or is None where tool calls are not
    parsed; ``echoed`` precedes every answer."""

    def __init__(
        self,
        completion_id: str,
        seed: int | None,
        options: ReplyOptions,
        *,
        parsers: Sequence[AnswerParser | None],
        token_bytes: TokenBytes,
        with_logprobs: bool,
        echoed: str = "",
    ) -> None:
        self._id = completion_id
        self._seed = seed
        self._options = options
        self._created = int(time.time())
        self._choices = [_Choice(parser) for parser in parsers]
        self._token_bytes = token_bytes
        self._with_logprobs = with_logprobs
        self._echoed = echoed
        self._encode = msgspec.json.Encoder().encode

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        choice = self._choices[index]
        text, calls, reasoning = parse_output(choice.parser, output.text_delta, output)
        logprobs = self._logprobs(output, output.logprobs_delta)
        new_ids = self._options.token_ids and output.token_ids_delta
        has_numbers = (logprobs and logprobs.content) or new_ids
        if not (text or reasoning or calls or output.finished or has_numbers):
            return None
        delta = chat_api.Delta()
        begins = not choice.begun
        if begins:
            choice.begun = True
            delta.role, delta.content = "assistant", self._echoed + text
        elif text:
            delta.content = text
        if reasoning:
            delta.reasoning_content = reasoning
        if calls:
            delta.tool_calls = [
                chat_api.ToolCallDelta(index=choice.calls + i, id=call.id, function=call.function)
                for i, call in enumerate(calls)
            ]
            choice.calls += len(calls)
        told = chat_api.ChunkChoice(index=index, delta=delta, logprobs=logprobs)
        if output.finished:
            told.finish_reason = _finish_reason(output, choice.calls)
            told.stop_reason = output.stop_reason
        chunk = self._chunk([told], self._options.usage_so_far(output))
        if self._options.token_ids:
            told.token_ids = output.token_ids_delta
            if begins:
                chunk.prompt_token_ids = output.prompt_token_ids
        return event(self._encode(chunk))

    def last_events(self, usage: Usage) -> bytes:
        return event(self._encode(self._chunk([], usage))) + DONE if self._options.include_usage else DONE

    def failure(self, error: ApiError) -> bytes:
        return event(error.body) + DONE

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        choices = [self._whole_choice(index, output) for index, output in enumerate(outputs)]
        options = self._options
        answer = chat_api.ChatCompletion(
            id=self._id,
            created=self._created,
            seed=self._seed,
            model=options.model,
            choices=choices,
            usage=usage,
        )
        if options.prompt_logprobs is not None:
            answer.prompt_logprobs = prompt_logprobs(outputs[0], options.prompt_logprobs, self._token_bytes)
        if options.token_ids:
            answer.prompt_token_ids = outputs[0].prompt_token_ids
        return self._encode(answer)

    def _whole_choice(self, index: int, output: RequestOutput) -> chat_api.ChatChoice:
        choice = self._choices[index]
        text, calls, reasoning = parse_output(choice.parser, output.text, output)
        text = self._echoed + text
        return chat_api.ChatChoice(
            index=index,
            message=chat_api.AnswerMessage(
                content=text if text or not calls else None,
                reasoning_content=reasoning or UNSET,
                tool_calls=list(calls) if calls else UNSET,
            ),
            logprobs=self._logprobs(output, output.logprobs or ()),
            finish_reason=_finish_reason(output, len(calls)),
            stop_reason=output.stop_reason,
            token_ids=output.token_ids if self._options.token_ids else UNSET,
        )

    def _chunk(self, choices: list[chat_api.ChunkChoice], usage: Usage | None) -> chat_api.ChatChunk:
        return chat_api.ChatChunk(
            id=self._id,
            created=self._created,
            seed=self._seed,
            model=self._options.model,
            choices=choices,
            usage=usage,
        )

    def _logprobs(
        self, output: RequestOutput, entries: Sequence[TokenLogprob]
    ) -> chat_api.ChatLogprobs | None:
        if not self._with_logprobs:
            return None
        return chat_logprobs(without_end(output, entries), self._token_bytes)


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
