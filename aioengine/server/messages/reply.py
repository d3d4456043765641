"""Formats a chat's outputs as a message: a list of texts and calls, whole or as events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from aioengine.request import RequestOutput
from aioengine.server.errors import ApiError
from aioengine.server.openai.api import Usage
from aioengine.server.openai.chat_api import ToolCall
from aioengine.server.openai.chat_reply import parse_output
from aioengine.server.openai.tools import ToolParser
from aioengine.server.streaming import event

_encode = msgspec.json.Encoder().encode


class MessagesReply:
    """The reply of a message. Every block is started, filled and stopped before the next one."""

    def __init__(
        self, message_id: str, model: str, parser: ToolParser | None, stop_sequences: Sequence[str]
    ) -> None:
        self._id = message_id
        self._model = model
        self._parser = parser
        self._stop_sequences = frozenset(stop_sequences)
        self._blocks = 0
        """Number of blocks that have ended."""
        self._begun = self._in_text = self._called = False
        self._last: RequestOutput | None = None

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        text, calls = parse_output(self._parser, output.text_delta, output)
        self._last = output
        told = b""
        if not self._begun:
            self._begun = True
            usage = _usage(len(output.prompt_token_ids), output.cached_tokens, 0)
            told = _event("message_start", message=self._message([], usage))
        if text:
            if not self._in_text:
                self._in_text = True
                told += self._start({"type": "text", "text": ""})
            told += self._delta({"type": "text_delta", "text": text})
        for call in calls:
            self._called = True
            told += self._end_text() + self._start(_tool_use(call, b"{}"))
            told += self._delta({"type": "input_json_delta", "partial_json": call.function.arguments})
            told += self._stop()
        if output.finished:
            told += self._end_text()
        return told or None

    def last_events(self, usage: Usage) -> bytes:
        assert self._last is not None
        delta = self._ending(self._last, self._called)
        told = _event("message_delta", delta=delta, usage=_usage_of(usage))
        return told + _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return event(error.body_for("/v1/messages"), "error")

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        [output] = outputs
        text, calls = parse_output(self._parser, output.text, output)
        content: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not calls else []
        content += [_tool_use(call, call.function.arguments.encode()) for call in calls]
        return _encode({**self._message(content, _usage_of(usage)), **self._ending(output, bool(calls))})

    def _message(self, content: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }

    def _ending(self, output: RequestOutput, called: bool) -> dict[str, Any]:
        if output.finish_reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if called:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        if output.stop_reason in self._stop_sequences:
            return {"stop_reason": "stop_sequence", "stop_sequence": output.stop_reason}
        return {"stop_reason": "end_turn", "stop_sequence": None}

    def _start(self, block: dict[str, Any]) -> bytes:
        return _event("content_block_start", index=self._blocks, content_block=block)

    def _delta(self, delta: dict[str, str]) -> bytes:
        return _event("content_block_delta", index=self._blocks, delta=delta)

    def _stop(self) -> bytes:
        self._blocks += 1
        return _event("content_block_stop", index=self._blocks - 1)

    def _end_text(self) -> bytes:
        if not self._in_text:
            return b""
        self._in_text = False
        return self._stop()


def _event(kind: str, **fields: Any) -> bytes:
    return event(_encode({"type": kind, **fields}), kind)


def _tool_use(call: ToolCall, arguments: bytes) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.function.name, "input": msgspec.Raw(arguments)}


def _usage(prompt: int, cached: int, output: int) -> dict[str, int]:
    """Build the usage. ``input_tokens`` counts those that were not in the cache."""
    return {
        "input_tokens": prompt - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": output,
    }


def _usage_of(usage: Usage) -> dict[str, int]:
    cached = usage.prompt_tokens_details.cached_tokens
    return _usage(usage.prompt_tokens, cached, usage.completion_tokens)
