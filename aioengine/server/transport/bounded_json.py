"""Decodes a client's JSON with a bound on the objects that are built from it.

Building Python objects holds the interpreter lock, and each list or object brings the garbage collector's
next run nearer, which visits all of them: a megabyte of ``[[],[],...]`` takes as long as a hundred megabytes
of text. So lists and objects are counted in the bytes before anything is built.
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
MAX_VALUES = 2**17
"""Values of JSON that is a text in a body, counted by their commas. (Those of a body itself have bounds by
their types.)"""
_STRING = re.compile(rb'"[^"]*"')


def decode(body: bytes, type_: Any) -> Any:
    """Decode ``body`` as a ``type_``, strictly: "1" is not a number.

    Raises ApiError if it holds too many values, and msgspec's errors.
    """
    check_counts(body)
    return _decoder(type_).decode(body)


@functools.cache
def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


def check_counts(body: bytes, param: str | None = None) -> None:
    """Count lists, objects and strings of JSON, in time linear in its length.

    Call it also for JSON that is a text in a body, before that is decoded: then it counts all values. Raises
    ApiError that names ``param`` if there are too many.
    """
    commas = 0 if param is None else body.count(b",")
    if _containers(body) <= MAX_CONTAINERS and body.count(b'"') <= 2 * MAX_STRINGS and commas <= MAX_VALUES:
        return
    # There are too many of these characters, but they may be inside texts. So texts are removed first, and
    # before that the escapes, each of which is a backslash and one more character.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') > 2 * MAX_STRINGS:
        raise _too_many(f"{MAX_STRINGS} strings", param)
    plain = _STRING.sub(b"", plain)
    if _containers(plain) > MAX_CONTAINERS:
        raise _too_many(f"{MAX_CONTAINERS} lists and objects", param)
    if commas and plain.count(b",") > MAX_VALUES:
        raise _too_many(f"{MAX_VALUES} values", param)


def _containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _too_many(what: str, param: str | None) -> ApiError:
    where = "the body holds" if param is None else f"{param}: holds"
    text = f"{where} more than {what}, which are not decoded"
    return ApiError(400, text, param=param, code="invalid_value")
