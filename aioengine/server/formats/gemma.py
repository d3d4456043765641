"""Calls as FunctionGemma writes them:
``<start_function_call>call:name{key:<escape>text<escape>,other:[1,true]}<end_function_call>``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from aioengine.server.formats.source import Marks, Source, Steps, arguments_call

OPEN, CLOSE = "<start_function_call>", "<end_function_call>"
_MARKS, _END = Marks(OPEN), Marks(CLOSE)
_CALL = re.compile(r"\s*call:\s*(?P<name>[A-Za-z0-9_.-]{1,64})\s*(?P<arguments>\{.*\})\s*", re.DOTALL)
_TOKEN = re.compile(
    r"\s*(?:<escape>(?P<text>.*?)<escape>|(?P<mark>[{}\[\]:,])|(?P<bare>[^{}\[\]:,<\s]+))(?P<is_key>\s*:)?",
    re.DOTALL,
)
_LITERAL = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null")


def gemma(names: frozenset[str]) -> Callable[[Source], Steps[None]]:
    """Parse calls of ``names``. Text between the marks that is no such call stays text."""

    def steps(source: Source) -> Steps[None]:
        while (yield from source.until(_MARKS)):
            body, mark = yield from source.read_until(_END)
            found = _CALL.fullmatch(body) if mark else None
            call = None
            if found is not None and found["name"] in names:
                call = arguments_call(found["name"], "".join(_as_json(found["arguments"])))
            yield call or OPEN + body + mark

    return steps


def _as_json(text: str) -> Iterator[str]:
    """Write the arguments as JSON: texts and names get their quotes. What is not well formed becomes no
    JSON."""
    at = 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            yield "?"
            return
        at = found.end()
        is_key, bare = found["is_key"] is not None, found["bare"]
        if found["mark"]:
            yield found["mark"]
        elif bare is not None and not is_key and _LITERAL.fullmatch(bare):
            yield bare
        else:
            yield json.dumps(found["text"] if bare is None else bare, ensure_ascii=False)
        if is_key:
            yield ":"
