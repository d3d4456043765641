"""Calls in a JSON format of this server, for models whose own format is not known. A constraint holds the
answer to it."""

from __future__ import annotations

from collections.abc import Callable

from aioengine.server.formats.call_text import CallText
from aioengine.server.formats.source import Source, Steps, arguments_call, call_of


def json_calls(source: Source) -> Steps[None]:
    """Parse an answer that is a list of {"name", "arguments"}. A call that is cut off is left out."""
    yield from source.literal("[")
    while True:
        body, is_complete = yield from source.json_object()
        call = call_of(body, None) if is_complete else None
        if call is None:
            return
        yield call
        if not (yield from source.literal(",")):
            return


def named_call(name: str) -> Callable[[Source], Steps[None]]:
    """Parse an answer that is the arguments of ``name`` alone."""

    def steps(source: Source) -> Steps[None]:
        yield from source.blank()
        body, _ = yield from source.json_object()
        call = arguments_call(name, body)
        if call is not None:
            yield call

    return steps


WRITTEN = CallText(opening='{{"name": "{}", "arguments": ', closing="}", begin="[", between=",", end="]")
