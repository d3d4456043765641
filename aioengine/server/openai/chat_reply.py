"""A chat's outputs in OpenAI's format."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from aioengine.request import RequestOutput
from aioengine.server.openai.api import Usage
from aioengine.server.openai.chat_api import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
    ToolCallDelta,
)
from aioengine.server.openai.completions_api import FinishReason
from aioengine.server.openai.logprobs import TokenBytes, chat_logprobs, new_logprobs
from aioengine.server.openai.tools import Parsed, ToolParser


class _Choice:
    """How far a choice has been told."""

    def __init__(self, parser: ToolParser | None) -> None:
        self.parser = parser
        self.begun = False
        self.logprobs = 0
        self.calls = 0


class ChatReply:
    """``parsers`` has one for each choice, None where calls of tools are not looked for;
    ``token_bytes`` is None if no log-probabilities are wanted."""

    def __init__(
        self,
        completion_id: str,
        model: str,
        *,
        parsers: Sequence[ToolParser | None],
        token_bytes: TokenBytes | None,
        include_usage: bool,
    ) -> None:
        self._id = completion_id
        self._model = model
        self._created = int(time.time())
        self._choices = [_Choice(parser) for parser in parsers]
        self._token_bytes = token_bytes
        self._include_usage = include_usage
        self._encode = msgspec.json.Encoder().encode

    def chunk(self, index: int, output: RequestOutput) -> bytes | None:
        choice = self._choices[index]
        text, calls = _parse(choice.parser, output.text_delta, output.finished)
        logprobs = self._logprobs(choice, output)
        if not (text or calls or output.finished or (logprobs and logprobs.content)):
            return None
        delta = Delta()
        if not choice.begun:
            choice.begun = True
            delta.role, delta.content = "assistant", text
        elif text:
            delta.content = text
        if calls:
            delta.tool_calls = [
                ToolCallDelta(index=choice.calls + i, id=call.id, function=call.function)
                for i, call in enumerate(calls)
            ]
            choice.calls += len(calls)
        told = ChunkChoice(index=index, delta=delta, logprobs=logprobs)
        if output.finished:
            told.finish_reason = _finish_reason(output, choice.calls)
            told.stop_reason = output.stop_reason
        return self._encode(self._chunk([told], None))

    def usage_chunk(self, usage: Usage) -> bytes | None:
        return self._encode(self._chunk([], usage)) if self._include_usage else None

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        choices = [self._whole_choice(index, output) for index, output in enumerate(outputs)]
        return self._encode(
            ChatCompletion(
                id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
            )
        )

    def _whole_choice(self, index: int, output: RequestOutput) -> ChatChoice:
        choice = self._choices[index]
        text, calls = _parse(choice.parser, output.text, True)
        return ChatChoice(
            index=index,
            message=AnswerMessage(
                content=text if text or not calls else None, tool_calls=list(calls) if calls else UNSET
            ),
            logprobs=self._logprobs(choice, output),
            finish_reason=_finish_reason(output, len(calls)),
            stop_reason=output.stop_reason,
        )

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _logprobs(self, choice: _Choice, output: RequestOutput) -> ChatLogprobs | None:
        if self._token_bytes is None:
            return None
        entries = new_logprobs(output, choice.logprobs)
        choice.logprobs += len(entries)
        return chat_logprobs(entries, self._token_bytes)


def _parse(parser: ToolParser | None, text: str, finished: bool) -> Parsed:
    if parser is None:
        return Parsed(text)
    parsed = parser.push(text)
    if not finished:
        return parsed
    rest = parser.finish()
    return Parsed(parsed.text + rest.text, [*parsed.calls, *rest.calls])


def _finish_reason(output: RequestOutput, calls: int) -> FinishReason | None:
    return "tool_calls" if calls and output.finish_reason == "stop" else output.finish_reason
