"""Calls as FunctionGemma writes them:
``<start_function_call>call:name{key:<escape>text<escape>,other:[1,true]}<end_function_call>``."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from aioengine.server.formats.source import Marks, Source, Steps, decoded, tool_call

OPEN, CLOSE = "<start_function_call>", "<end_function_call>"
_MARKS, _END = Marks(OPEN), Marks(CLOSE)
_CALL = re.compile(r"\s*call:\s*(?P<name>[A-Za-z0-9_.-]{1,64})\s*(?P<arguments>\{.*\})\s*", re.DOTALL)
_TOKEN = re.compile(
    r"\s*(?:<escape>(?P<text>.*?)<escape>|(?P<mark>[{}\[\]:,])|(?P<bare>[^{}\[\]:,<\s]+))", re.DOTALL
)
_BARE = {"true": True, "false": False, "null": None}
MAX_DEPTH = 64


def gemma(names: frozenset[str]) -> Callable[[Source], Steps[None]]:
    """Parse calls of ``names``. Text between the marks that is no such call stays text."""

    def steps(source: Source) -> Steps[None]:
        while (yield from source.until(_MARKS)):
            body, mark = yield from source.read_until(_END)
            found = _CALL.fullmatch(body) if mark else None
            try:
                arguments = None if found is None else _value(found["arguments"])
            except ValueError:
                found = None
            if found is not None and found["name"] in names and isinstance(arguments, dict):
                yield tool_call(found["name"], arguments)
            else:
                yield OPEN + body + mark

    return steps


def _value(text: str) -> Any:
    """Read a value. Raises ValueError if there is none."""
    tokens = []
    at = 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"no value at {at}")
        tokens.append(found)
        at = found.end()
    tokens.reverse()
    value = _read(tokens, 0)
    if tokens:
        raise ValueError("more than a value")
    return value


def _read(tokens: list[re.Match[str]], depth: int) -> Any:
    if not tokens or depth > MAX_DEPTH:
        raise ValueError("no value")
    token = tokens.pop()
    if token["text"] is not None:
        return token["text"]
    if token["bare"] is not None:
        return _bare(token["bare"])
    if token["mark"] == "{":
        return dict(_items(tokens, "}", lambda: _pair(tokens, depth)))
    if token["mark"] == "[":
        return list(_items(tokens, "]", lambda: _read(tokens, depth + 1)))
    raise ValueError(f"{token['mark']} in place of a value")


def _items(tokens: list[re.Match[str]], end: str, read: Callable[[], Any]) -> list[Any]:
    found: list[Any] = []
    while tokens and tokens[-1]["mark"] != end:
        if found and tokens.pop()["mark"] != ",":
            raise ValueError("no comma")
        found.append(read())
    if not tokens:
        raise ValueError(f"no {end}")
    tokens.pop()
    return found


def _pair(tokens: list[re.Match[str]], depth: int) -> tuple[str, Any]:
    key = tokens.pop()
    name = key["bare"] if key["text"] is None else key["text"]
    if name is None or not tokens or tokens.pop()["mark"] != ":":
        raise ValueError("no key")
    return name, _read(tokens, depth + 1)


def _bare(text: str) -> Any:
    if text in _BARE:
        return _BARE[text]
    number = decoded(text) if len(text) <= 40 else None
    return number if isinstance(number, (int, float)) else text
