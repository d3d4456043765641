"""Formats a chat's outputs as a response: a list of messages and calls, whole or as events."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec

from aioengine.runtime.output import RequestOutput
from aioengine.server.errors import ApiError
from aioengine.server.formats.source import AnswerParser
from aioengine.server.messages.reply import ListReply
from aioengine.server.openai.api import ToolCall, Usage

_encode = msgspec.json.Encoder().encode
_NONE: dict[str, Any] = {"logprobs": []}
_KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "text": ("msg", {"type": "message", "role": "assistant"}, "output_text", {"annotations": [], **_NONE}),
    "thinking": ("rs", {"type": "reasoning", "summary": []}, "reasoning_text", {}),
}
"""Of items with a text: the beginning of their ids, their fields, the type of their part, and its fields."""


class ResponsesReply(ListReply):
    """The reply of a response; events are numbered from 0. ``repeated``: what it repeats of the request."""

    def __init__(
        self, response_id: str, seed: int | None, repeated: dict[str, Any], parser: AnswerParser | None
    ) -> None:
        super().__init__(parser)
        self._next = 0
        self._item: dict[str, Any] = {}
        """The item that has begun."""
        self._response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "seed": seed,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "output": self._items,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            **repeated,
        }

    def last_events(self, usage: Usage) -> bytes:
        assert self._last is not None
        response = self._finished(self._last, usage)
        return self._event(f"response.{response['status']}", response=response)

    def failure(self, error: ApiError) -> bytes:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._response["status"] = "failed"
        self._response["error"] = {"code": code, "message": error.detail.message}
        return self._event("response.failed", response=self._response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._next = self._next, self._next + 1
        return super()._event(kind, sequence_number=number, **fields)

    def _of_item(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, output_index=len(self._items), **fields)

    def _of_text(self, kind: str, **fields: Any) -> bytes:
        return self._of_item(kind, item_id=self._item["id"], content_index=0, **fields)

    def _begin(self, output: RequestOutput) -> bytes:
        told = self._event("response.created", response=self._response)
        return told + self._event("response.in_progress", response=self._response)

    def _start(self, kind: str) -> bytes:
        prefix, fields, part, part_fields = _KINDS[kind]
        self._item = {"id": _id(prefix), "status": "in_progress", **fields, "content": []}
        told = self._of_item("response.output_item.added", item=self._item)
        empty = {"type": part, "text": "", **part_fields}
        return told + self._of_text("response.content_part.added", part=empty)

    def _delta(self, kind: str, text: str) -> bytes:
        logprobs = _NONE if kind == "text" else {}
        return self._of_text(f"response.{_KINDS[kind][2]}.delta", delta=text, **logprobs)

    def _end(self, kind: str, text: str, last: RequestOutput | None) -> bytes:
        _, _, type_, part_fields = _KINDS[kind]
        part = {"type": type_, "text": text, **part_fields}
        status = "completed" if last is None else _status(last)
        self._item |= {"status": status, "content": [part]}
        logprobs = _NONE if kind == "text" else {}
        told = self._of_text(f"response.{type_}.done", text=text, **logprobs)
        told += self._of_text("response.content_part.done", part=part)
        return told + self._end_item(self._item)

    def _call(self, call: ToolCall) -> bytes:
        id_, arguments = _id("fc"), call.function.arguments
        item = {"id": id_, "type": "function_call", "status": "completed", "call_id": call.id}
        item |= {"name": call.function.name, "arguments": arguments}
        begun = {**item, "arguments": "", "status": "in_progress"}
        told = self._of_item("response.output_item.added", item=begun)
        told += self._of_item("response.function_call_arguments.delta", item_id=id_, delta=arguments)
        told += self._of_item("response.function_call_arguments.done", item_id=id_, arguments=arguments)
        return told + self._end_item(item)

    def _end_item(self, item: dict[str, Any]) -> bytes:
        told = self._of_item("response.output_item.done", item=item)
        self._items.append(item)
        return told

    def _finished(self, output: RequestOutput, usage: Usage) -> dict[str, Any]:
        response = self._response
        response["status"] = _status(output)
        if output.finish_reason == "stop":
            response["completed_at"] = int(time.time())
        elif output.finish_reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        cached = usage.prompt_tokens_details.cached_tokens
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }
        return response


def _status(output: RequestOutput) -> str:
    return "completed" if output.finish_reason == "stop" else "incomplete"


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
