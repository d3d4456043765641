"""A request's body: bounds on its size, its time and the memory of all bodies; and its JSON, read strictly.

Building Python objects holds the interpreter lock, and each list or object brings the garbage collector's
next run nearer, which visits all of them: a megabyte of ``[[],[],...]`` takes as long as a hundred megabytes
of text. So lists and objects are counted in the bytes before anything is built.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import logging
import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect

from aioengine.metrics.page.plumbing import Message, Receive, Scope
from aioengine.server.bounds import Shares
from aioengine.server.errors import ApiError, ClientDisconnected, validation_error

logger = logging.getLogger("aioengine.server")

MIN_RATE = 16 * 1024
"""Minimum rate of a body in bytes a second, after its first ``timeout`` seconds."""
FREE_BYTES = 64 * 1024
"""Bytes of each body that are not counted, so that small requests are accepted whatever large ones hold."""
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
_UNKNOWN = re.compile("Object contains unknown field `([^`]*)`")


class BoundedBody:
    """An ASGI ``receive`` that raises ApiError when the body is too large (413), too slow (408) or one too
    many (503), and ClientDisconnected if it breaks off."""

    def __init__(
        self,
        receive: Receive,
        scope: Scope,
        shares: Shares,
        owner: str | None,
        *,
        limit: int,
        timeout: float,
    ) -> None:
        self._receive, self._shares, self._owner = receive, shares, owner
        self._limit, self._timeout = limit, timeout
        self._begin = asyncio.get_running_loop().time()
        self._size = self._held = 0
        self._complete = False
        for name, value in scope["headers"]:
            # Of a longer number the beginning; what comes is counted all the same.
            if name.lower() == b"content-length" and value.isdigit() and int(value[:20]) > limit:
                raise self._too_large()

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        due = self._begin + self._timeout + self._size / MIN_RATE
        try:
            async with asyncio.timeout_at(min(due, now + self._timeout)):
                message = await self._receive()
        except TimeoutError:
            text = f"nothing for {self._timeout} seconds, or less than {MIN_RATE} bytes a second"
            text = f"the body came too slowly: {text}"
            raise ApiError(408, text, code="request_timeout", close=True) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        self._size += len(message.get("body", b""))
        if self._size > self._limit:
            raise self._too_large()
        self._hold(max(self._size - FREE_BYTES, 0) - self._held)
        self._complete = not message.get("more_body", False)
        return message

    async def whole(self) -> bytes:
        """Return the content."""
        parts: list[bytes] = []
        try:
            while not self._complete:
                parts.append((await self()).get("body", b""))
            return parts[0] if len(parts) == 1 else b"".join(parts)
        finally:
            parts.clear()  # an error that is raised refers to this frame, and lives as long as its answer

    def release(self, kept: int = 0) -> None:
        """Release the body's bytes, but ``kept`` of them, which are still in memory; safe to call again."""
        held = min(self._held, max(kept - FREE_BYTES, 0))
        if held < self._held:
            self._shares.give_back(self._owner, self._held - held)
            self._held = held

    def _hold(self, more: int) -> None:
        if more and not self._shares.take(self._owner, more, alone=self._limit):
            text = "the server is receiving as many large requests, or as many of yours, as it can"
            raise ApiError(503, f"{text}; try again later", code="overloaded", close=True)
        self._held += more

    def _too_large(self) -> ApiError:
        text = f"the body is larger than the {self._limit} bytes that are allowed"
        return ApiError(413, text, code="request_too_large")


def check_kind(scope: Scope) -> None:
    """Raise ApiError unless the body is JSON as it is."""
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        text = "bodies are not decompressed: send the body without content-encoding"
        raise ApiError(415, text, param="content-encoding", code="unsupported_media_type")
    # Browsers send anything else to other sites without asking them first.
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "the body must be application/json", code="unsupported_media_type")


def check_counts(body: bytes, param: str | None = None) -> None:
    """Count lists, objects and strings of JSON, in time linear in its length.

    Call it also for JSON that is a text in a body, before that is decoded: then it counts all values. Raises
    ApiError that names ``param`` if there are too many.
    """
    if _excess(body, with_values=param is not None) is None:
        return
    # There are too many of these characters, but they may be inside texts. So texts are removed first, and
    # before that the escapes, each of which is a backslash and one more character.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    if plain.count(b'"') <= 2 * MAX_STRINGS:
        plain = _STRING.sub(b"", plain)
    if what := _excess(plain, with_values=param is not None):
        where = "the body holds" if param is None else f"{param}: holds"
        text = f"{where} more than {what}, which are not decoded"
        raise ApiError(400, text, param=param, code="invalid_value")


def _excess(text: bytes, *, with_values: bool) -> str | None:
    """Say of what there seems to be too much; None: of nothing."""
    if text.count(b'"') > 2 * MAX_STRINGS:
        return f"{MAX_STRINGS} strings"
    if text.count(b"[") + text.count(b"{") > MAX_CONTAINERS:
        return f"{MAX_CONTAINERS} lists and objects"
    return f"{MAX_VALUES} values" if with_values and text.count(b",") > MAX_VALUES else None


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
        try:
            return _decoder(type_).decode(body)
        except msgspec.ValidationError as error:
            found = _UNKNOWN.match(str(error))
            if found is None:
                raise
            if not self._ignores_unknown:
                refusal = validation_error(error)
                for close in difflib.get_close_matches(found[1][:64], _names(type_), n=1):
                    refusal.detail.message += f" (did you mean {close}?)"
                raise refusal from error
        fields = msgspec.json.decode(body)
        for path in _drop_unknown(fields, _type_info(type_)):
            if path not in self._logged and len(self._logged) < MAX_LOGGED_NAMES:
                self._logged.add(path)
                logger.warning("the unknown field %s is ignored, in this request and in later ones", path)
        return _decoder(type_).decode(msgspec.json.encode(fields))


_type_info = functools.cache(inspect.type_info)  # which takes milliseconds


@functools.cache
def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


@functools.cache
def _names(type_: Any) -> frozenset[str]:
    """Return the names of a request's fields, those within other fields included."""
    known = msgspec.json.schema(type_).get("$defs", {}).values()
    return frozenset(name for struct in known for name in struct.get("properties", ()))


def _drop_unknown(value: Any, kind: inspect.Type, path: str = "") -> Iterator[str]:
    """Remove what objects of this ``kind`` may not have. Yields the paths of the fields, without the indices
    of lists."""
    for one in kind.types if isinstance(kind, inspect.UnionType) else (kind,):
        if isinstance(one, inspect.ListType) and isinstance(value, list):
            for item in value:
                yield from _drop_unknown(item, one.item_type, path)
        elif isinstance(one, inspect.StructType) and isinstance(value, dict):
            fields = {field.encode_name: field.type for field in one.fields}
            for name in list(value):
                if name in fields:
                    yield from _drop_unknown(value[name], fields[name], f"{path}{name}.")
                elif one.forbid_unknown_fields and name != one.tag_field:
                    del value[name]
                    yield f"{path}{name[:64]}"
