"""Calls as Hermes, Qwen 2.5 and Qwen 3 write them:
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them, with text around."""

from __future__ import annotations

from collections.abc import Callable

from aioengine.server.formats.call_text import CallText
from aioengine.server.formats.source import Marks, Source, Steps, call_of

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_MARKS = Marks(OPEN)


def hermes(names: frozenset[str]) -> Callable[[Source], Steps[None]]:
    """Parse calls of ``names``. Text between the tags that is no such call stays text."""

    def steps(source: Source) -> Steps[None]:
        while (yield from source.until(_MARKS)):
            before = yield from source.blank()
            body, is_complete = yield from source.json_object()
            after = yield from source.blank()
            is_closed = is_complete and (yield from source.literal(CLOSE))
            call = call_of(body, names) if is_closed else None
            yield call or OPEN + before + body + after + (CLOSE if is_closed else "")

    return steps


WRITTEN = CallText(
    opening=OPEN + '\n{{"name": "{}", "arguments": ',
    closing="}\n" + CLOSE,
    between="\n",
)
