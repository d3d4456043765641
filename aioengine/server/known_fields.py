"""Handles unknown fields of requests: suggests the field that was meant, or ignores them."""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

from aioengine.server.errors import ApiError, validation_error
from aioengine.server.transport.bounded_json import decode

logger = logging.getLogger("aioengine.server")

MAX_LOGGED_NAMES = 64
"""Maximum number of ignored names that are logged, because clients can invent names."""
_UNKNOWN = re.compile(
    r"^Object contains unknown field `(?P<name>[^`]*)`(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL
)
_PLACE = re.compile(r"\.([^.\[]+)|\[[^\]]*\]")
_SUCCESSORS = dict.fromkeys(("guided_json", "guided_regex", "guided_choice"), "structured_outputs")
"""Older names that are still accepted, and their current names."""


class UnknownFields:
    """Policy for unknown fields: they are refused or, with ``ignore``, left out."""

    def __init__(self, *, ignore: bool) -> None:
        self._ignore = ignore
        self._logged: set[str] = set()

    def decode(self, body: bytes, type_: Any) -> Any:
        """``bounded_json.decode``; for an unknown field it raises ApiError with the name that may have been
        meant."""
        try:
            return decode(body, type_)
        except msgspec.ValidationError as error:
            found = _UNKNOWN.match(str(error))
            if found is None:
                raise
            if not self._ignore:
                raise _refusal(error, type_, found["path"] or "", found["name"]) from error
        dropped: set[str] = set()
        known = _only_known(body, _type_info(type_), "", dropped)
        for name in dropped - self._logged:
            if len(self._logged) < MAX_LOGGED_NAMES:
                self._logged.add(name)
                logger.warning("the unknown field %s is ignored, in this request and in later ones", name)
        return decode(bytes(known), type_)


@functools.cache
def _type_info(type_: Any) -> inspect.Type:
    """Return what msgspec knows of a request's type; finding it out takes ten milliseconds."""
    return inspect.type_info(type_)


def _refusal(error: msgspec.ValidationError, type_: Any, path: str, name: str) -> ApiError:
    refusal = validation_error(error)
    names = {field.encode_name for struct in _structs_at(_type_info(type_), path) for field in struct.fields}
    close = difflib.get_close_matches(name[:64], names, n=1)
    if close:
        meant = close[0] + (f", today {_SUCCESSORS[close[0]]}" if close[0] in _SUCCESSORS else "")
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
    lists = [part for part in _parts(info) if isinstance(part, inspect.ListType)]
    if (
        first == b"{"
        and structs
        and all(struct.cls.__struct_config__.forbid_unknown_fields for struct in structs)
    ):
        fields = {field.encode_name: field.type for struct in structs for field in struct.fields}
        fields |= {struct.tag_field: inspect.AnyType() for struct in structs if struct.tag_field is not None}
        known = {}
        for name, own in msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).items():
            if name in fields:
                known[name] = _only_known(own, fields[name], f"{path}{name}.", dropped)
            else:
                dropped.add(path + name[:64])
        return msgspec.Raw(msgspec.json.encode(known))
    if first == b"[" and lists and _may_drop(lists[0].item_type):
        items = msgspec.json.decode(raw, type=list[msgspec.Raw])
        return msgspec.Raw(
            msgspec.json.encode([_only_known(item, lists[0].item_type, path, dropped) for item in items])
        )
    return raw


def _may_drop(info: inspect.Type) -> bool:
    return any(isinstance(part, inspect.StructType) for part in _parts(info))
