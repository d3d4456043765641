"""Formats a chat's outputs as a response: a list of messages and calls, whole or as events."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from sys import getsizeof
from typing import Any, NamedTuple

import msgspec

from aioengine.runtime.output import RequestOutput
from aioengine.server.errors import ApiError
from aioengine.server.formats.source import AnswerParser
from aioengine.server.openai.api import ToolCall, Usage
from aioengine.server.openai.replies import event, parse_output
from aioengine.server.responses.api import ResponsesRequest

_encode = msgspec.json.Encoder().encode


class _Kind(NamedTuple):
    """A kind of items with a text."""

    type: str
    prefix: str
    """Beginning of ids."""
    part: str
    """Type of its part."""
    fields: dict[str, Any]
    part_fields: dict[str, Any]
    logprobs: dict[str, Any]
    """A field of its events."""

    def item(self, text: str, status: str) -> dict[str, Any]:
        part = {"type": self.part, "text": text, **self.part_fields}
        id_ = f"{self.prefix}_{uuid.uuid4().hex}"
        return {"id": id_, "type": self.type, "status": status, **self.fields, "content": [part]}


_NONE: dict[str, Any] = {"logprobs": []}
_MESSAGE = _Kind("message", "msg", "output_text", {"role": "assistant"}, {"annotations": [], **_NONE}, _NONE)
_REASONING = _Kind("reasoning", "rs", "reasoning_text", {"summary": []}, {}, {})


class ResponsesReply:
    """The reply of a response. Events are numbered from 0. Every item is started, filled and ended before the
    next one."""

    def __init__(
        self, response_id: str, seed: int | None, request: ResponsesRequest, parser: AnswerParser | None
    ) -> None:
        self._parser = parser
        self._next = 0
        self._items: list[dict[str, Any]] = []
        """Items that have ended."""
        self._open: tuple[_Kind, dict[str, Any]] | None = None
        """The message, or the reasoning, that has begun."""
        self._parts: list[str] = []
        """Its text so far."""
        self._ended: str | None = None
        """Why the answer ended."""
        wanted = request.text.format if request.text and request.text.format else {"type": "text"}
        choice = "auto" if request.tool_choice is None else request.tool_choice
        # As JSON, which takes less room than what it was decoded to.
        as_json = {
            "text": msgspec.Raw(_encode({"format": wanted})),
            "tool_choice": msgspec.Raw(_encode(choice)),
            "tools": msgspec.Raw(_encode(request.tools or [])),
        }
        self.kept = sum(len(memoryview(raw)) for raw in as_json.values())
        """Bytes of what is kept of the request, because answers repeat it."""
        self.kept += getsizeof(request.instructions or "")
        self._response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "seed": seed,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": self._items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            **as_json,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
        }

    def events(self, index: int, output: RequestOutput) -> bytes | None:
        text, calls, reasoning = parse_output(self._parser, output.text_delta, output)
        told = b""
        if self._next == 0:
            told = self._event("response.created", response=self._response)
            told += self._event("response.in_progress", response=self._response)
        for kind, part in ((_REASONING, reasoning), (_MESSAGE, text)):
            if part:
                told += self._text(kind, part)
        for call in calls:
            told += self._end_text("completed") + self._call(call)
        if output.finished:
            self._ended = output.finish_reason
            if not self._items and self._open is None:
                told += self._text(_MESSAGE, "")
            told += self._end_text(self._status)
        return told or None

    def last_events(self, usage: Usage) -> bytes:
        self._finish(usage)
        return self._event(f"response.{self._response['status']}", response=self._response)

    def failure(self, error: ApiError) -> bytes:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._response["status"] = "failed"
        self._response["error"] = {"code": code, "message": error.detail.message}
        return self._event("response.failed", response=self._response)

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> bytes:
        [output] = outputs
        text, calls, reasoning = parse_output(self._parser, output.text, output)
        self._ended = output.finish_reason
        if reasoning:
            self._items.append(_REASONING.item(reasoning, self._status))
        if text or not (calls or reasoning):
            self._items.append(_MESSAGE.item(text, self._status))
        self._items += [_call_item(call) for call in calls]
        self._finish(usage)
        return _encode(self._response)

    @property
    def _status(self) -> str:
        return "completed" if self._ended == "stop" else "incomplete"

    def _finish(self, usage: Usage) -> None:
        response = self._response
        response["status"] = self._status
        if self._ended == "stop":
            response["completed_at"] = int(time.time())
        elif self._ended == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        cached = usage.prompt_tokens_details.cached_tokens
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }

    def _text(self, kind: _Kind, text: str) -> bytes:
        told = b""
        if self._open is None or self._open[0] is not kind:
            told = self._end_text("completed")
            item = kind.item("", "in_progress")
            self._open = kind, item
            told += self._item_event("response.output_item.added", item={**item, "content": []})
            told += self._of_text("response.content_part.added", item, part=item["content"][0])
        self._parts.append(text)
        if text:
            told += self._of_text(f"response.{kind.part}.delta", self._open[1], delta=text, **kind.logprobs)
        return told

    def _end_text(self, status: str) -> bytes:
        if self._open is None:
            return b""
        (kind, item), self._open = self._open, None
        [part] = item["content"]
        item["status"], part["text"] = status, "".join(self._parts)
        self._parts.clear()
        told = self._of_text(f"response.{kind.part}.done", item, text=part["text"], **kind.logprobs)
        told += self._of_text("response.content_part.done", item, part=part)
        return told + self._end_item(item)

    def _call(self, call: ToolCall) -> bytes:
        item = _call_item(call)
        id_, arguments = item["id"], item["arguments"]
        begun = {**item, "arguments": "", "status": "in_progress"}
        told = self._item_event("response.output_item.added", item=begun)
        told += self._item_event("response.function_call_arguments.delta", item_id=id_, delta=arguments)
        told += self._item_event("response.function_call_arguments.done", item_id=id_, arguments=arguments)
        return told + self._end_item(item)

    def _end_item(self, item: dict[str, Any]) -> bytes:
        told = self._item_event("response.output_item.done", item=item)
        self._items.append(item)
        return told

    def _of_text(self, kind: str, item: dict[str, Any], **fields: Any) -> bytes:
        return self._item_event(kind, item_id=item["id"], content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, output_index=len(self._items), **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": self._next, **fields}
        self._next += 1
        return event(_encode(data), kind)


def _call_item(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"fc_{uuid.uuid4().hex}",
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.function.name,
        "arguments": call.function.arguments,
    }
