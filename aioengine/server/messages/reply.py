"""Formats a chat's outputs as a message: a list of texts and calls, whole or as events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from aioengine.runtime.output import RequestOutput
from aioengine.server.errors import ApiError
from aioengine.server.formats.source import AnswerParser
from aioengine.server.openai.api import ToolCall, Usage
from aioengine.server.openai.replies import event, parse_output

_encode = msgspec.json.Encoder().encode
_BLOCKS: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}
"""Blocks before they are filled. Reasoning is not signed, because clients may send back any."""


class MessagesReply:
    """The reply of a message. Every block is started, filled and stopped before the next one.

    Args:
        hour_tokens: Number of tokens of the prompt, from the first on, that are to be kept for an hour; other
            tokens are kept for 5 minutes.
    """

    def __init__(
        self,
        message_id: str,
        seed: int | None,
        model: str,
        parser: AnswerParser | None,
        stop_sequences: Sequence[str],
        *,
        hour_tokens: int = 0,
    ) -> None:
        self._message: dict[str, Any] = {"id": message_id, "type": "message", "role": "assistant"}
        self._message["seed"] = seed
        self._message["model"] = model
        self._hour_tokens = hour_tokens
        self._parser = parser
        self._stop_sequences = frozenset(stop_sequences)
        self._blocks = 0
        """Number of blocks that have ended."""
        self._called = False
        self._open: str | None = None
        """Type of the block that has begun: "text" or "thinking"."""
        self._last: RequestOutput | None = None

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        text, calls, reasoning = parse_output(self._parser, output.text_delta, output)
        told = b""
        if self._last is None:
            usage = self._usage(output, 0)
            begun: dict[str, Any] = {
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": usage,
            }
            told = _event("message_start", message={**self._message, **begun})
        self._last = output
        for kind, part in (("thinking", reasoning), ("text", text)):
            if part:
                told += self._begin(kind) + self._delta({"type": f"{kind}_delta", kind: part})
        for call in calls:
            self._called = True
            told += self._end() + self._start(_tool_use(call, b"{}"))
            told += self._delta({"type": "input_json_delta", "partial_json": call.function.arguments})
            told += self._stop()
        if output.finished:
            told += self._end()
        return told or None

    def last_events(self, usage: Usage) -> bytes:
        assert self._last is not None
        delta = self._ending(self._last, self._called)
        told = _event("message_delta", delta=delta, usage=self._usage(self._last, usage.completion_tokens))
        return told + _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return event(error.body_for("/v1/messages"), "error")

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        [output] = outputs
        text, calls, reasoning = parse_output(self._parser, output.text, output)
        content = [{**_BLOCKS["thinking"], "thinking": reasoning}] if reasoning else []
        content += [{**_BLOCKS["text"], "text": text}] if text or not (calls or reasoning) else []
        content += [_tool_use(call, call.function.arguments.encode()) for call in calls]
        ending = self._ending(output, bool(calls))
        told = {**self._message, "content": content, **ending}
        return _encode({**told, "usage": self._usage(output, usage.completion_tokens)})

    def _usage(self, output: RequestOutput, output_tokens: int) -> dict[str, Any]:
        """Build the usage. ``input_tokens`` counts the tokens of the prompt that were neither in the cache
        nor are now kept there for a breakpoint."""
        cached = output.cached_tokens
        created = max(0, output.pinned_tokens - cached)
        for_an_hour = max(0, min(output.pinned_tokens, self._hour_tokens) - cached)
        return {
            "input_tokens": output.prompt_tokens - cached - created,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": created,
            "cache_creation": {
                "ephemeral_5m_input_tokens": created - for_an_hour,
                "ephemeral_1h_input_tokens": for_an_hour,
            },
            "output_tokens": output_tokens,
        }

    def _ending(self, output: RequestOutput, called: bool) -> dict[str, Any]:
        reason = "end_turn"
        sequence: str | int | None = None
        if output.finish_reason == "length":
            reason = "max_tokens"
        elif called:
            reason = "tool_use"
        elif output.stop_reason in self._stop_sequences:
            reason, sequence = "stop_sequence", output.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _start(self, block: dict[str, Any]) -> bytes:
        return _event("content_block_start", index=self._blocks, content_block=block)

    def _delta(self, delta: dict[str, str]) -> bytes:
        return _event("content_block_delta", index=self._blocks, delta=delta)

    def _stop(self) -> bytes:
        self._blocks += 1
        return _event("content_block_stop", index=self._blocks - 1)

    def _begin(self, kind: str) -> bytes:
        """Begin a block of this type, unless it has begun."""
        if self._open == kind:
            return b""
        told = self._end()
        self._open = kind
        return told + self._start(_BLOCKS[kind])

    def _end(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return self._stop()


def _event(kind: str, **fields: Any) -> bytes:
    return event(_encode({"type": kind, **fields}), kind)


def _tool_use(call: ToolCall, arguments: bytes) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.function.name, "input": msgspec.Raw(arguments)}
