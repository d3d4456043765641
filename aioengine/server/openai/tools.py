"""Calls of tools in an answer.

Two forms are well defined, and only they are taken for calls. With ``tool_choice`` "required" or a named
function, a constraint makes the answer JSON of a known shape. With "auto", models whose chat template
says so write ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` (the format of the Hermes and
Qwen models). Anything else is left as text.

A call is given when it is complete, whatever becomes of the rest of the answer; one that is cut off is not
given, because its arguments are no JSON.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from aioengine.errors import RequestInvalid
from aioengine.grammars.schemas import PreparedSchema, SchemaOptions, arguments_schema, prepare_schema
from aioengine.request import SamplingParams
from aioengine.server.errors import ApiError
from aioengine.server.openai.chat_api import (
    AllowedTools,
    CustomTool,
    FunctionCall,
    NamedCustomTool,
    NamedTool,
    Tool,
    ToolCall,
    ToolChoice,
)

MAX_CALLS = 16
"""Bound on the calls of one answer where calls are required and ``parallel_tool_calls`` is true."""
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Parsed(NamedTuple):
    text: str
    calls: Sequence[ToolCall] = ()


class ToolParser(Protocol):
    """Takes an answer apart as it comes."""

    def push(self, text: str) -> Parsed:
        """Take in text, and return the parts that have become certain."""

    def finish(self, stopped_by: str | int | None = None) -> Parsed:
        """The rest. ``stopped_by`` is the stop string or token, not in the text, that ended the answer."""


class TaggedCalls:
    """Calls between ``<tool_call>`` and ``</tool_call>``; text around them stays text, and so does what
    stands between the tags if it is no call of one of ``names``. White space alone before, between and
    after calls is dropped. How the text is cut makes no difference.

    Args:
        names: Functions that may be called.
        single: Nothing is taken after the first call.
    """

    def __init__(self, names: frozenset[str], *, single: bool = False) -> None:
        self._names = names
        self._single = single
        self._held = ""
        """Text that may belong to a tag or a call."""
        self._space = ""
        """Text since the last call, as long as it is white space alone."""
        self._in_text = False
        self._called = False

    def push(self, text: str) -> Parsed:
        self._held += text
        certain = ""
        calls: list[ToolCall] = []
        while not (self._single and (calls or self._called)):
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
        self._held = ""
        return Parsed(certain, calls)

    def finish(self, stopped_by: str | int | None = None) -> Parsed:
        last = self.push(_CLOSE) if stopped_by == _CLOSE and self._held.startswith(_OPEN) else Parsed("")
        text = last.text + self._text(self._held)
        self._held = ""
        return Parsed(text if self._called else text + self._space, last.calls)

    def _text(self, text: str) -> str:
        """Return the part of the text that can be sent now."""
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


class NamedCall:
    """The whole answer is one function's arguments."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._text = ""

    def push(self, text: str) -> Parsed:
        self._text += text
        return Parsed("")

    def finish(self, stopped_by: str | int | None = None) -> Parsed:
        try:
            return Parsed("", [_tool_call(self._name, msgspec.json.decode(self._text))])
        except msgspec.DecodeError:  # cut off
            return Parsed("")


_MARKS = re.compile(r'[\\"{}\[\]]')


class ListedCalls:
    """The whole answer is a list of {"name", "arguments"}. How the text is cut makes no difference."""

    def __init__(self) -> None:
        self._held = ""
        """From the end of the last call."""
        self._seen = 0
        """Number of characters of ``_held`` that have been examined."""
        self._begin = self._depth = 0
        self._in_text = False

    def push(self, text: str) -> Parsed:
        self._held += text
        calls: list[ToolCall] = []
        while mark := _MARKS.search(self._held, self._seen):
            self._seen = mark.end()
            found = mark[0]
            if self._in_text:
                if found == "\\":  # whatever comes next, in the next piece perhaps
                    self._seen += 1
                self._in_text = found != '"'
            elif found == '"':
                self._in_text = True
            elif found in "{[":
                self._depth += 1
                if self._depth == 2:
                    self._begin = mark.start()
            elif found in "}]":
                self._depth -= 1
                if self._depth == 1:
                    call = msgspec.json.decode(self._held[self._begin : self._seen])
                    calls.append(_tool_call(call["name"], call["arguments"]))
                    self._held, self._seen = self._held[self._seen :], 0
            if self._seen >= len(self._held):
                break
        else:
            self._seen = len(self._held)
        return Parsed("", calls)

    def finish(self, stopped_by: str | int | None = None) -> Parsed:
        return Parsed("")


_FIRST_ARGUMENTS = 3
"""Line of the grammar that has the arguments of the first tool; each has a line of its own."""
_LINE = re.compile(r"\bat (\d+)\(\d+\)")


class ToolPlan(NamedTuple):
    """Plan that follows from a request's ``tools``, ``tool_choice`` and ``parallel_tool_calls``."""

    tools: list[Tool]
    """Tools that may be called; the model is shown no others."""
    places: list[int]
    """Index of each in the request's ``tools``."""
    forced: str | None = None
    """A function that must be called."""
    required: bool = False
    """Some function must be called."""
    parallel: bool | None = None

    @property
    def is_free(self) -> bool:
        """Whether the model may answer with text."""
        return self.forced is None and not self.required

    def place(self, name: str) -> int:
        """Index in the request's ``tools``."""
        return next(p for p, tool in zip(self.places, self.tools, strict=True) if tool.function.name == name)

    def forced_schema(self, options: SchemaOptions) -> tuple[PreparedSchema, Sequence[str]]:
        """Schema of the answer if ``forced``, and what is not enforced. Raises RequestInvalid."""
        tool = next(tool for tool in self.tools if tool.function.name == self.forced)
        prepared = _arguments(tool, options)
        return prepared, prepared.not_enforced

    def grammar(self, options: SchemaOptions) -> tuple[str, Sequence[str]]:
        """Grammar of the answer if ``required``, in Lark's notation, and what is not enforced.

        Raises ApiError that names the tool.
        """
        more = f'("," call){{0,{MAX_CALLS - 1}}} ' if self.parallel else ""
        rules = [f'start: "[" call {more}"]"']
        rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(self.tools))))
        assert len(rules) + 1 == _FIRST_ARGUMENTS
        openings = []
        not_enforced: dict[str, None] = {}
        for i, tool in enumerate(self.tools):
            try:
                prepared = _arguments(tool, options)
            except RequestInvalid as error:
                param = f"tools[{self.places[i]}].function.parameters"
                raise ApiError(400, f"{param}: {error}", param=param, code="invalid_value") from error
            not_enforced.update(dict.fromkeys(prepared.not_enforced))
            rules.append(f"arguments_{i}: %json {prepared.text}")
            opening = f'{{"name": "{tool.function.name}", "arguments": '
            openings.append(f'call_{i}: {json.dumps(opening)} arguments_{i} "}}"')
        return "\n".join(rules + openings), tuple(not_enforced)

    def blame(self, reason: str) -> str | None:
        """The field whose part of the grammar was refused for ``reason``."""
        found = _LINE.search(reason)
        index = int(found[1]) - _FIRST_ARGUMENTS if found else -1
        return f"tools[{self.places[index]}].function.parameters" if 0 <= index < len(self.tools) else None

    def parser(self, chat_template: str | None) -> ToolParser | None:
        """Make the parser for one answer; None if calls are not looked for."""
        if self.forced is not None:
            return NamedCall(self.forced)
        if self.required:
            return ListedCalls()
        if self._are_tagged(chat_template):
            names = frozenset(tool.function.name for tool in self.tools)
            return TaggedCalls(names, single=self.parallel is False)
        return None

    def stopping_after_a_call(self, params: SamplingParams, chat_template: str | None) -> SamplingParams:
        """``params`` under which an answer that is free ends with its first call, if there may be but one."""
        if self.parallel is False and self.is_free and self._are_tagged(chat_template):
            return msgspec.structs.replace(params, stop=(*params.stop, _CLOSE))
        return params

    def _are_tagged(self, chat_template: str | None) -> bool:
        return bool(self.tools) and all(tag in (chat_template or "") for tag in (_OPEN, _CLOSE))


def plan_tools(
    tools: Sequence[Tool | CustomTool] | None,
    choice: ToolChoice | None = None,
    parallel: bool | None = None,
) -> ToolPlan:
    """Raises ApiError for custom tools, and if ``choice`` does not fit ``tools``."""
    functions: list[Tool] = []
    for i, tool in enumerate(tools or ()):
        if isinstance(tool, CustomTool):
            raise ApiError(
                400,
                f"tools[{i}]: type 'custom' is not supported; use a function that takes a text",
                param=f"tools[{i}].type",
                code="unsupported_parameter",
            )
        functions.append(tool)
    if not functions:
        if choice is not None and choice not in ("none", "auto"):
            raise _choice_error("there are no tools to choose from")
        return ToolPlan([], [])
    names = [tool.function.name for tool in functions]
    plan = ToolPlan(functions, list(range(len(functions))), parallel=parallel)
    if isinstance(choice, NamedCustomTool):
        raise _choice_error("tools of type 'custom' are not supported")
    if isinstance(choice, NamedTool):
        _check_known(choice, names)
        return plan._replace(forced=choice.function.name)
    if isinstance(choice, AllowedTools):
        for named in choice.allowed_tools.tools:
            _check_known(named, names)
        wanted = {named.function.name for named in choice.allowed_tools.tools}
        places = [i for i, name in enumerate(names) if name in wanted]
        return plan._replace(
            tools=[functions[i] for i in places],
            places=places,
            required=choice.allowed_tools.mode == "required",
        )
    if choice == "none":
        return ToolPlan([], [])
    return plan._replace(required=choice == "required")


def _check_known(named: NamedTool, names: Sequence[str]) -> None:
    if named.function.name not in names:
        raise _choice_error(f"there is no tool {named.function.name[:100]!r}")


def _choice_error(reason: str) -> ApiError:
    return ApiError(400, f"tool_choice: {reason}", param="tool_choice", code="invalid_value")


def _arguments(tool: Tool, options: SchemaOptions) -> PreparedSchema:
    function = tool.function
    return prepare_schema(arguments_schema(function.parameters), options.for_strict(function.strict))


def _tool_call(name: str, arguments: Any) -> ToolCall:
    text = msgspec.json.encode(arguments).decode()
    return ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=FunctionCall(name=name, arguments=text))


def _beginning_at_end(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``tag``."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
