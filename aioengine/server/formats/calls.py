"""Calls whose arguments are JSON: how families of models write them, and how they are read.

- ``hermes`` (Hermes, Qwen 2.5 and 3): ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any
  number of
  them, with text around.
- ``llama3`` (Llama 3.1 to 3.3): the whole answer is ``{"name": ..., "parameters": {...}}``, or several with
  ";"
  between; ``<|python_tag|>`` may come first.
- ``mistral``: after ``[TOOL_CALLS]`` older models write a list of {"name", "arguments"}, newer ones
  ``name[ARGS]{...}``, also with ``[CALL_ID]...`` before the arguments.
- For models whose own format is not known: a JSON list of {"name", "arguments"}, to which a constraint holds
  the
  answer.

Text that is no such call stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from aioengine.server.formats.source import (
    NO_MARKS,
    Marks,
    Source,
    Steps,
    arguments_call,
    call_of,
)
from aioengine.server.openai.api import ToolCall

MAX_CALLS = 16
"""Bound on the calls of one answer where calls are required and ``parallel_tool_calls`` is true."""
FIRST_ARGUMENTS = 3
"""Number of the grammar's line with the first tool's arguments; each tool has a line of its own."""
TOOL_CALL, END_TOOL_CALL = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_HERMES, _MISTRAL, _ID_END = Marks(TOOL_CALL), Marks(TOOL_CALLS), Marks(ARGUMENTS, "{")
_NAME = re.compile(r"[A-Za-z0-9_.-]*")

Read = Callable[[Source], Steps[None]]
"""A format's generator."""


class CallText(NamedTuple):
    """The text around the arguments of calls, so that a grammar can hold an answer to it."""

    opening: str
    """Text before a call's arguments; ``{}`` stands for its name, and a brace is written twice."""
    closing: str
    begin: str = ""
    """Before the first call."""
    between: str = ""
    end: str = ""
    """After the last call."""
    most: int = MAX_CALLS

    def grammar(
        self, names: Sequence[str], schemas: Sequence[str], tokens: Mapping[str, int], *, parallel: bool
    ) -> str:
        """Return a grammar in Lark's notation: calls of ``names`` whose arguments conform to ``schemas``,
        which are JSON schemas as llguidance reads them. It allows one call, or up to ``most`` if
        ``parallel``.

        ``tokens`` has the ids of texts that are single tokens, because the model writes these as tokens.
        """

        def quoted(text: str) -> str:
            """Write the text as terminals, with a space after each; nothing for an empty text, as Lark
            requires."""
            marks = sorted((token for token in tokens if token in text), key=len, reverse=True)
            parts = re.split(f"({'|'.join(map(re.escape, marks))})", text) if marks else [text]
            known = (f"<[{tokens[part]}]>" if part in marks else json.dumps(part) for part in parts if part)
            return "".join(f"{terminal} " for terminal in known)

        again = f"({quoted(self.between)}call){{0,{self.most - 1}}} " if parallel and self.most > 1 else ""
        start = f"start: {quoted(self.begin)}call {again}{quoted(self.end)}".rstrip()
        rules = [start, "call: " + " | ".join(f"call_{i}" for i in range(len(names)))]
        assert len(rules) + 1 == FIRST_ARGUMENTS
        rules += [f"arguments_{i}: %json {schema}" for i, schema in enumerate(schemas)]
        for i, name in enumerate(names):
            opening, closing = quoted(self.opening.format(name)), quoted(self.closing)
            rules.append(f"call_{i}: {opening}arguments_{i} {closing}".rstrip())
        return "\n".join(rules)


_OBJECT = '{{"name": "{}", "arguments": '
HERMES_TEXT = CallText(f"{TOOL_CALL}\n{_OBJECT}", f"}}\n{END_TOOL_CALL}", between="\n")
LLAMA_TEXT = CallText('{{"name": "{}", "parameters": ', "}", between="; ")
MISTRAL_LIST_TEXT = CallText(_OBJECT, "}", begin=f"{TOOL_CALLS}[", between=", ", end="]")
MISTRAL_TEXT = CallText(f"{TOOL_CALLS}{{}}{ARGUMENTS}", "")
JSON_TEXT = CallText(_OBJECT, "}", begin="[", between=",", end="]")


def hermes(names: frozenset[str]) -> Read:
    def steps(source: Source) -> Steps[None]:
        while (yield from source.until(_HERMES)):
            before = yield from source.blank()
            body, is_complete = yield from source.json_object()
            after = yield from source.blank()
            is_closed = is_complete and (yield from source.literal(END_TOOL_CALL))
            call = call_of(body, names) if is_closed else None
            yield call or TOOL_CALL + before + body + after + (END_TOOL_CALL if is_closed else "")

    return steps


def llama3(names: frozenset[str]) -> Read:
    def steps(source: Source) -> Steps[None]:
        before = yield from source.blank()
        if (yield from source.literal(PYTHON_TAG)):
            before += PYTHON_TAG
        yield from _listed(source, names, before, ";", "")
        yield from source.until(NO_MARKS)

    return steps


def mistral(names: frozenset[str]) -> Read:
    def steps(source: Source) -> Steps[None]:
        while (yield from source.until(_MISTRAL)):
            read = TOOL_CALLS + (yield from source.blank())
            if (yield from source.literal("[")):
                yield from _listed(source, names, read + "[", ",", "]")
            else:
                yield from _named(source, names, read)

    return steps


def json_calls(source: Source) -> Steps[None]:
    """Read an answer that is a list of {"name", "arguments"}. A call that is cut off is left out."""
    yield from source.literal("[")
    yield from _calls_of(_listed(source, None, "", ",", "]"))


def named_call(name: str) -> Read:
    """Read an answer that is the arguments of ``name`` alone."""

    def steps(source: Source) -> Steps[None]:
        yield from source.blank()
        body, _ = yield from source.json_object()
        call = arguments_call(name, body)
        if call is not None:
            yield call

    return steps


def _listed(source: Source, names: frozenset[str] | None, read: str, between: str, end: str) -> Steps[None]:
    """Read calls of ``names``, each an object, up to ``end`` or to what is no call. Without an ``end``,
    nothing has to be between them. ``read`` is the text that was read before."""
    while True:
        read += yield from source.blank()
        body, is_complete = yield from source.json_object()
        call = call_of(body, names) if is_complete else None
        if call is None:
            yield read + body
            return
        yield call
        read = yield from source.blank()
        if end and (yield from source.literal(end)):
            return
        if (yield from source.literal(between)):
            read += between
        elif end:
            yield read
            return


def _named(source: Source, names: frozenset[str], read: str) -> Steps[None]:
    """Read a call whose name stands before its arguments."""
    name = yield from source.matching(_NAME, 64)
    read += name
    if (yield from source.literal(CALL_ID)):
        id_, mark = yield from source.read_until(_ID_END)
        read += CALL_ID + id_ + mark
        if mark == "{":
            yield read
            return
    elif (yield from source.literal(ARGUMENTS)):
        read += ARGUMENTS
    space = yield from source.blank()
    body, is_complete = yield from source.json_object()
    call = arguments_call(name, body) if is_complete and name in names else None
    yield call or read + space + body


def _calls_of(steps: Steps[None]) -> Steps[None]:
    """Leave out what is no call."""
    for piece in steps:
        if piece is None or isinstance(piece, ToolCall):
            yield piece
