"""Decodes a client's JSON, strictly and with a bound on the objects that are built from it.

Building Python objects holds the interpreter lock, and each list or object brings the garbage collector's
next run nearer, which visits all of them: a megabyte of ``[[],[],...]`` takes as long as a hundred megabytes
of text. So lists and objects are counted in the bytes before anything is built.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

from aioengine.metrics.page.plumbing import Scope
from aioengine.server.errors import ApiError, validation_error

logger = logging.getLogger("aioengine.server")

MAX_CONTAINERS = 2**15
"""Lists and objects in one body. A chat of 2,048 messages in parts has 8,192 of them."""
MAX_STRINGS = 2**17
"""Names of fields included."""
MAX_VALUES = 2**17
"""Values of JSON that is a text in a body, counted by their commas. (Those of a body itself have bounds by
their types.)"""
MAX_LOGGED_NAMES = 64
"""Ignored names that are logged, because clients can invent names."""
_STRING = re.compile(rb'"[^"]*"')
_UNKNOWN = re.compile(
    r"^Object contains unknown field `(?P<name>[^`]*)`(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL
)
_PLACE = re.compile(r"\.([^.\[]+)|\[[^\]]*\]")
_SUCCESSORS = dict.fromkeys(("guided_json", "guided_regex", "guided_choice"), "structured_outputs")
"""Older names that are still accepted, and their current names."""


def check_kind(scope: Scope) -> None:
    """Raise ApiError unless the body is JSON as it is."""
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        text = "bodies are not decompressed: send the body without content-encoding"
        raise ApiError(415, text, param="content-encoding", code="unsupported_media_type")
    # Browsers send anything else to other sites without asking them first.
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "the body must be application/json", code="unsupported_media_type")


class JsonDecoder:
    """Decodes bodies. Unknown fields are refused, with the name that may have been meant, or left out."""

    def __init__(self, *, ignores_unknown: bool) -> None:
        self._ignores_unknown = ignores_unknown
        self._logged: set[str] = set()

    def decode(self, body: bytes, type_: Any) -> Any:
        """Decode ``body`` as a ``type_``, strictly: "1" is not a number. Raises ApiError if it holds too many
        values or an unknown field, and msgspec's errors."""
        if not body:
            raise ApiError(400, "the body is empty; it must be JSON", code="invalid_json")
        check_counts(body)
        decode = _decoder(type_).decode
        try:
            return decode(body)
        except msgspec.ValidationError as error:
            found = _UNKNOWN.match(str(error))
            if found is None:
                raise
            if not self._ignores_unknown:
                raise _refusal(error, type_, found["path"] or "", found["name"]) from error
        dropped: set[str] = set()
        known = _only_known(body, _type_info(type_), "", dropped)
        for name in dropped - self._logged:
            if len(self._logged) < MAX_LOGGED_NAMES:
                self._logged.add(name)
                logger.warning("the unknown field %s is ignored, in this request and in later ones", name)
        return decode(bytes(known))


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
    strings = plain.count(b'"')
    plain = _STRING.sub(b"", plain) if strings <= 2 * MAX_STRINGS else plain
    for is_over, what in (
        (strings > 2 * MAX_STRINGS, f"{MAX_STRINGS} strings"),
        (_containers(plain) > MAX_CONTAINERS, f"{MAX_CONTAINERS} lists and objects"),
        (commas and plain.count(b",") > MAX_VALUES, f"{MAX_VALUES} values"),
    ):
        if is_over:
            where = "the body holds" if param is None else f"{param}: holds"
            text = f"{where} more than {what}, which are not decoded"
            raise ApiError(400, text, param=param, code="invalid_value")


def _containers(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


# Unknown fields


@functools.cache
def _type_info(type_: Any) -> inspect.Type:
    """Return what msgspec knows of a request's type; finding it out takes ten milliseconds."""
    return inspect.type_info(type_)


def _refusal(error: msgspec.ValidationError, type_: Any, path: str, name: str) -> ApiError:
    refusal = validation_error(error)
    names = {field.encode_name for struct in _structs_at(_type_info(type_), path) for field in struct.fields}
    for close in difflib.get_close_matches(name[:64], names, n=1):
        meant = close + (f", today {_SUCCESSORS[close]}" if close in _SUCCESSORS else "")
        refusal.detail.message += f" (did you mean {meant}?)"
    return refusal


def _parts(info: inspect.Type) -> tuple[inspect.Type, ...]:
    """Return the types that a value may have, with unions and constraints resolved."""
    if isinstance(info, inspect.UnionType):
        return tuple(part for member in info.types for part in _parts(member))
    return _parts(info.type) if isinstance(info, inspect.Metadata) else (info,)


def _structs_at(info: inspect.Type, path: str) -> Iterator[inspect.StructType]:
    """Return the structs that msgspec's ``path`` (such as ``.tools[...].function``) may lead to."""
    reached = list(_parts(info))
    for step in _PLACE.finditer(path):
        following: list[inspect.Type] = []
        for part in reached:
            if isinstance(part, inspect.StructType) and step[1] is not None:
                following += [p for f in part.fields if f.encode_name == step[1] for p in _parts(f.type)]
            elif isinstance(part, inspect.ListType) and step[1] is None:
                following += _parts(part.item_type)
        reached = following
    return (part for part in reached if isinstance(part, inspect.StructType))


def _only_known(value: bytes | msgspec.Raw, info: inspect.Type, path: str, dropped: set[str]) -> msgspec.Raw:
    """Remove unknown fields from JSON; values that cannot have any are passed on unchanged."""
    raw = msgspec.Raw(value)
    first = bytes(memoryview(raw)[:64]).lstrip()[:1]
    structs = [part for part in _parts(info) if isinstance(part, inspect.StructType)]
    items = [part.item_type for part in _parts(info) if isinstance(part, inspect.ListType)]
    if first == b"{" and structs and all(s.cls.__struct_config__.forbid_unknown_fields for s in structs):
        fields = {field.encode_name: field.type for struct in structs for field in struct.fields}
        fields |= {struct.tag_field: inspect.AnyType() for struct in structs if struct.tag_field is not None}
        given = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        dropped |= {path + name[:64] for name in given.keys() - fields.keys()}
        known = {
            n: _only_known(v, fields[n], f"{path}{n}.", dropped) for n, v in given.items() if n in fields
        }
        return msgspec.Raw(msgspec.json.encode(known))
    if first == b"[" and items and any(isinstance(part, inspect.StructType) for part in _parts(items[0])):
        given_items = msgspec.json.decode(raw, type=list[msgspec.Raw])
        kept = [_only_known(item, items[0], path, dropped) for item in given_items]
        return msgspec.Raw(msgspec.json.encode(kept))
    return raw
