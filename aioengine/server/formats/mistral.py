"""Calls as Mistral's models write them after ``[TOOL_CALLS]``: older ones a list of {"name", "arguments"},
newer ones ``name[ARGS]{...}``, also with ``[CALL_ID]...`` before the arguments."""

from __future__ import annotations

import re
from collections.abc import Callable

from aioengine.server.formats.call_text import CallText
from aioengine.server.formats.source import Marks, Source, Steps, arguments_call, call_of

OPEN, ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
_CALL_ID = "[CALL_ID]"
_MARKS = Marks(OPEN)
_ID_END = Marks(ARGUMENTS, "{")
_NAME = re.compile(r"[A-Za-z0-9_.-]*")


def mistral(names: frozenset[str]) -> Callable[[Source], Steps[None]]:
    """Parse calls of ``names``. Text after the mark that is no such call stays text."""

    def listed(source: Source, read: str) -> Steps[None]:
        while True:
            read += yield from source.blank()
            body, is_complete = yield from source.json_object()
            call = call_of(body, names) if is_complete else None
            if call is None:
                yield read + body
                return
            yield call
            read = yield from source.blank()
            if (yield from source.literal("]")):
                return
            if not (yield from source.literal(",")):
                yield read
                return
            read += ","

    def named(source: Source, read: str) -> Steps[None]:
        name = yield from source.matching(_NAME, 64)
        read += name
        if (yield from source.literal(_CALL_ID)):
            id_, mark = yield from source.read_until(_ID_END)
            read += _CALL_ID + id_ + mark
            if mark == "{":
                yield read
                return
        elif (yield from source.literal(ARGUMENTS)):
            read += ARGUMENTS
        space = yield from source.blank()
        body, is_complete = yield from source.json_object()
        call = arguments_call(name, body) if is_complete and name in names else None
        yield call or read + space + body

    def steps(source: Source) -> Steps[None]:
        while (yield from source.until(_MARKS)):
            read = OPEN + (yield from source.blank())
            if (yield from source.literal("[")):
                yield from listed(source, read + "[")
            else:
                yield from named(source, read)

    return steps


def written(chat_template: str) -> CallText:
    """Return how the model with this chat template writes calls."""
    if ARGUMENTS in chat_template:
        return CallText(opening=OPEN + "{}" + ARGUMENTS, closing="")
    opening = '{{"name": "{}", "arguments": '
    return CallText(opening=opening, closing="}", begin=OPEN + "[", between=", ", end="]")
