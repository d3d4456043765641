"""Formats a chat's outputs as a list of texts and calls, whole or as events: as a message, here, and as a
response."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec

from aioengine.runtime.output import RequestOutput
from aioengine.server.errors import ApiError
from aioengine.server.formats.source import AnswerParser
from aioengine.server.openai.api import ToolCall, Usage
from aioengine.server.openai.replies import StreamReply, event, parse_output

_encode = msgspec.json.Encoder().encode


class ListReply(StreamReply):
    """The reply of an answer that is a list of items: reasoning, texts and calls. Each is begun, filled and
    ended before the next one. Methods that write return the events, which are empty unless it is a stream."""

    def __init__(self, parser: AnswerParser | None) -> None:
        self._parser = parser
        self._items: list[dict[str, Any]] = []
        """Items that have ended."""
        self._open: str | None = None
        """Type of the item that has begun: "text" or "thinking"."""
        self._parts: list[str] = []
        """Its text so far."""
        self._last: RequestOutput | None = None

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        told = self._begin(output) if self._last is None else b""
        return told + self._add(output) or None

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        [output] = outputs
        self._is_whole = True
        self._add(output)
        return _encode(self._finished(output, usage))

    def _add(self, output: RequestOutput) -> bytes:
        text, calls, reasoning = parse_output(self._parser, output)
        self._last, told = output, b""
        for kind, part in (("thinking", reasoning), ("text", text)):
            if part:
                told += self._fill(kind, part)
        for call in calls:
            told += self._close() + self._call(call)
        if output.finished:
            if self._open is None and not self._items:
                told += self._fill("text", "")
            told += self._close(output)
        return told

    def _fill(self, kind: str, text: str) -> bytes:
        told = b""
        if self._open != kind:
            told = self._close() + self._start(kind)
            self._open = kind
        self._parts.append(text)
        return told + self._delta(kind, text) if text else told

    def _close(self, last: RequestOutput | None = None) -> bytes:
        if self._open is None:
            return b""
        kind, self._open = self._open, None
        text = "".join(self._parts)
        self._parts.clear()
        return self._end(kind, text, last)

    def _event(self, kind: str, **fields: Any) -> bytes:
        return b"" if self._is_whole else event(_encode({"type": kind, **fields}), kind)

    @abstractmethod
    def _begin(self, output: RequestOutput) -> bytes:
        """Begin the answer."""

    @abstractmethod
    def _start(self, kind: str) -> bytes:
        """Begin an item."""

    @abstractmethod
    def _delta(self, kind: str, text: str) -> bytes: ...
    @abstractmethod
    def _end(self, kind: str, text: str, last: RequestOutput | None) -> bytes:
        """End an item with its ``text``. ``last``: the answer ends with it."""

    @abstractmethod
    def _call(self, call: ToolCall) -> bytes:
        """Add a call, from its beginning to its end."""

    @abstractmethod
    def _finished(self, output: RequestOutput, usage: Usage) -> dict[str, Any]:
        """Return the answer."""


class MessagesReply(ListReply):
    """The reply of a message."""

    def __init__(
        self,
        message_id: str,
        seed: int | None,
        model: str,
        parser: AnswerParser | None,
        stop_sequences: Sequence[str],
    ) -> None:
        super().__init__(parser)
        self._message: dict[str, Any] = {"id": message_id, "type": "message", "role": "assistant"}
        self._message |= {"seed": seed, "model": model}
        self._stop_sequences = frozenset(stop_sequences)

    def last_events(self, usage: Usage) -> bytes:
        assert self._last is not None
        used = self._usage(self._last, usage.completion_tokens)
        told = self._event("message_delta", delta=self._ending(self._last), usage=used)
        return told + self._event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        return event(error.body_for("/v1/messages"), "error")

    def _begin(self, output: RequestOutput) -> bytes:
        empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._message, **empty, "usage": self._usage(output, 0)}
        return self._event("message_start", message=message)

    def _start(self, kind: str) -> bytes:
        return self._event("content_block_start", index=len(self._items), content_block=_block(kind, ""))

    def _delta(self, kind: str, text: str) -> bytes:
        delta = {"type": f"{kind}_delta", kind: text}
        return self._event("content_block_delta", index=len(self._items), delta=delta)

    def _end(self, kind: str, text: str, last: RequestOutput | None) -> bytes:
        self._items.append(_block(kind, text))
        return self._event("content_block_stop", index=len(self._items) - 1)

    def _call(self, call: ToolCall) -> bytes:
        index, arguments = len(self._items), call.function.arguments
        use = {"type": "tool_use", "id": call.id, "name": call.function.name}
        self._items.append({**use, "input": msgspec.Raw(arguments.encode())})
        told = self._event("content_block_start", index=index, content_block={**use, "input": {}})
        delta = {"type": "input_json_delta", "partial_json": arguments}
        told += self._event("content_block_delta", index=index, delta=delta)
        return told + self._event("content_block_stop", index=index)

    def _finished(self, output: RequestOutput, usage: Usage) -> dict[str, Any]:
        used = self._usage(output, usage.completion_tokens)
        return {**self._message, "content": self._items, **self._ending(output), "usage": used}

    def _usage(self, output: RequestOutput, output_tokens: int) -> dict[str, Any]:
        return {
            "input_tokens": output.prompt_tokens - output.cached_tokens,
            "cache_read_input_tokens": output.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": output_tokens,
        }

    def _ending(self, output: RequestOutput) -> dict[str, Any]:
        reason, sequence = "end_turn", None
        if output.finish_reason == "length":
            reason = "max_tokens"
        elif any(item["type"] == "tool_use" for item in self._items):
            reason = "tool_use"
        elif output.stop_reason in self._stop_sequences:
            reason, sequence = "stop_sequence", output.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}


def _block(kind: str, text: str) -> dict[str, str]:
    """Return a block. Reasoning is not signed, because clients may send back any."""
    return {"type": kind, kind: text} | ({"signature": ""} if kind == "thinking" else {})
