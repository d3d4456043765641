"""Calls as Llama 3.1 to 3.3 write them: the whole answer is ``{"name": ..., "parameters": {...}}``, or
several with ";" between; ``<|python_tag|>`` may come first."""

from __future__ import annotations

from collections.abc import Callable

from aioengine.server.formats.call_text import CallText
from aioengine.server.formats.source import NO_MARKS, Source, Steps, call_of

TAG = "<|python_tag|>"


def llama3(names: frozenset[str]) -> Callable[[Source], Steps[None]]:
    """Parse calls of ``names``; anything else stays text."""

    def steps(source: Source) -> Steps[None]:
        before = yield from source.blank()
        if (yield from source.literal(TAG)):
            before += TAG + (yield from source.blank())
        while True:
            body, is_complete = yield from source.json_object()
            call = call_of(body, names) if is_complete else None
            if call is None:
                yield before + body
                break
            yield call
            before = yield from source.blank()
            if (yield from source.literal(";")):
                before += ";" + (yield from source.blank())
        yield from source.until(NO_MARKS)

    return steps


WRITTEN = CallText(opening='{{"name": "{}", "parameters": ', closing="}", between="; ")
