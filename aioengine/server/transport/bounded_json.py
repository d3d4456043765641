"""Decoding JSON that a client has sent, with a bound on what is made of it.

Making Python objects of a body holds the interpreter, and each list or object that is made brings the
garbage collector's next run nearer, which looks at all of them: a megabyte of ``[[],[],...]`` takes the
time of a hundred megabytes of text. So these are counted in the bytes, before anything is made of them.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import msgspec

from aioengine.server.errors import ApiError

MAX_CONTAINERS = 2**15
"""Lists and objects in one body. A chat of 2,048 messages in parts has 8,192 of them."""
MAX_STRINGS = 2**17
"""Names of fields included."""
_STRING = re.compile(rb'"[^"]*"')


def decode(body: bytes, type_: Any) -> Any:
    """``body`` as a ``type_``, and strictly: "1" is no number.

    Raises ApiError if it holds too many values, and msgspec's errors.
    """
    _check_counts(body)
    return _decoder(type_).decode(body)


@functools.cache
def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


def _check_counts(body: bytes) -> None:
    """In time that is linear in the body's length, and mostly that of a search for a byte."""
    if _containers(body) <= MAX_CONTAINERS and body.count(b'"') <= 2 * MAX_STRINGS:
        return
    # There are as many of these characters, but they may be in texts. A backslash in JSON begins a pair.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 2 * MAX_STRINGS:
        raise _too_many(f"{MAX_STRINGS} strings")
    if _containers(_STRING.sub(b"", plain)) > MAX_CONTAINERS:
        raise _too_many(f"{MAX_CONTAINERS} lists and objects")


def _containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _too_many(what: str) -> ApiError:
    return ApiError(400, f"the body holds more than {what}, which are not decoded", code="invalid_value")
