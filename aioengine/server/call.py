"""What a route's function gets of a request, and what it may give back besides an Answer."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any, NamedTuple, TypeVar

import msgspec

from aioengine.metrics.page.plumbing import Receive, Scope
from aioengine.runtime.text_work import EACH
from aioengine.server.access_log import RequestRecord
from aioengine.server.context import Context

T = TypeVar("T")


class Call(NamedTuple):
    """A request on its way to a route's function."""

    context: Context
    record: RequestRecord
    scope: Scope
    receive: Receive


class Sent(NamedTuple):
    """An answer in one piece."""

    body: bytes
    status: int = 200
    kind: bytes = b"application/json"


def sent(value: Any) -> Sent:
    """Return the answer that is ``value``: a text, or what is encoded to JSON."""
    if isinstance(value, Sent):
        return value
    if isinstance(value, str):
        return Sent(value.encode(), kind=b"text/plain; charset=utf-8")
    return Sent(msgspec.json.encode(value))


async def listing(call: Call, found: Sized, make: Callable[[], object]) -> Sent:
    """Answer with ``make()``, a list of what was ``found``, of which there may be thousands: beside the loop,
    in turns with other requests."""
    work = call.context.engine.text_work
    return await work.run(EACH * len(found), lambda: sent(make()), call.record.owner)
