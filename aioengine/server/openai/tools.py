"""Calls of tools in an answer.

Two forms are well defined, and only they are taken for calls. With ``tool_choice`` "required" or a named
function, a constraint makes the answer JSON of a known shape. With "auto", models whose chat template
says so write ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (the format of the Hermes and
Qwen models). Anything else is left as text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from aioengine.guided import Guide
from aioengine.request import TokenConstraint
from aioengine.server.openai.chat_api import ChatRequest, FunctionCall, NamedTool, Tool, ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Parsed(NamedTuple):
    text: str
    calls: Sequence[ToolCall] = ()


class ToolParser(Protocol):
    """Takes an answer apart as it comes."""

    def push(self, text: str) -> Parsed:
        """What has become certain."""

    def finish(self) -> Parsed:
        """The rest."""


class TaggedCalls:
    """Calls between ``<tool_call>`` and ``</tool_call>``; text around them stays text, and so does what
    stands between the tags if it is no call of one of ``names``. White space alone before, between and
    after calls is dropped. How the text is cut makes no difference.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._held = ""
        """What may belong to a tag or a call."""
        self._space = ""
        """Text since the last call, as long as it is white space alone."""
        self._in_text = False
        self._called = False

    def push(self, text: str) -> Parsed:
        self._held += text
        certain = ""
        calls: list[ToolCall] = []
        while True:
            before, tag, rest = self._held.partition(_OPEN)
            if not tag:
                keep = len(before) - _beginning_at_end(before, _OPEN)
                self._held = before[keep:]
                return Parsed(certain + self._text(before[:keep]), calls)
            certain += self._text(before)
            body, end, after = rest.partition(_CLOSE)
            if not end:
                self._held = tag + rest
                return Parsed(certain, calls)
            call = self._call(body)
            if call is None:
                certain += self._text(tag + body + end)
            else:
                calls.append(call)
                self._space, self._in_text, self._called = "", False, True
            self._held = after

    def finish(self) -> Parsed:
        text = self._text(self._held)
        self._held = ""
        return Parsed(text if self._called else text + self._space)

    def _text(self, text: str) -> str:
        """What of the text is to be told now."""
        if self._in_text:
            return text
        self._space += text
        if not self._space.strip():
            return ""
        told, self._space, self._in_text = self._space, "", True
        return told

    def _call(self, body: str) -> ToolCall | None:
        try:
            value = msgspec.json.decode(body)
        except msgspec.DecodeError:
            return None
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        return _tool_call(value["name"], arguments) if isinstance(arguments, dict) else None


class ForcedCalls:
    """The whole answer is calls: one function's arguments, or a list of {"name", "arguments"}."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._text = ""

    def push(self, text: str) -> Parsed:
        self._text += text
        return Parsed("")

    def finish(self) -> Parsed:
        try:
            value = msgspec.json.decode(self._text)
        except msgspec.DecodeError:  # cut off at max_tokens
            return Parsed(self._text)
        if self._name is not None:
            return Parsed("", [_tool_call(self._name, value)])
        return Parsed("", [_tool_call(call["name"], call["arguments"]) for call in value])


class ToolPlan(NamedTuple):
    """What a request's ``tools`` and ``tool_choice`` come to."""

    tools: list[Tool]
    """Shown to the model."""
    forced: str | None = None
    """A function that must be called."""
    required: bool = False
    """Some function must be called."""

    @property
    def is_free(self) -> bool:
        """Whether the model may answer with text."""
        return self.forced is None and not self.required

    async def constraint(self, guide: Guide) -> TokenConstraint:
        """What holds an answer that is not free to its form."""
        if self.forced is not None:
            tool = next(tool for tool in self.tools if tool.function.name == self.forced)
            return await guide.json_schema(_parameters(tool))
        rules = ['start: "[" call ("," call)* "]"']
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(self.tools))))
        for i, tool in enumerate(self.tools):
            opening = f'{{"name": "{tool.function.name}", "arguments": '
            rules.append(f'call_{i}: {json.dumps(opening)} arguments_{i} "}}"')
            rules.append(f"arguments_{i}: %json {json.dumps(_parameters(tool))}")
        return await guide.lark("\n".join(rules))

    def parser(self, chat_template: str | None) -> ToolParser | None:
        if not self.is_free:
            return ForcedCalls(self.forced)
        if self.tools and chat_template is not None and _OPEN in chat_template and _CLOSE in chat_template:
            return TaggedCalls(frozenset(tool.function.name for tool in self.tools))
        return None


def plan_tools(request: ChatRequest) -> ToolPlan:
    """Raises ValueError if ``tool_choice`` does not fit ``tools``."""
    tools = request.tools or []
    choice = request.tool_choice
    if not tools:
        if choice is not None and choice not in ("none", "auto"):
            raise ValueError("there are no tools to choose from")
        return ToolPlan([])
    if isinstance(choice, NamedTool):
        if all(tool.function.name != choice.function.name for tool in tools):
            raise ValueError(f"there is no tool {choice.function.name!r}")
        return ToolPlan(tools, forced=choice.function.name)
    if choice == "none":
        return ToolPlan([])
    return ToolPlan(tools, required=choice == "required")


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object"}


def _tool_call(name: str, arguments: Any) -> ToolCall:
    text = msgspec.json.encode(arguments).decode()
    return ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=FunctionCall(name=name, arguments=text))


def _beginning_at_end(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
