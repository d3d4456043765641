"""From the framework to a route's function: who may call it, and its body, decoded."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from starlette import routing
from starlette.datastructures import QueryParams

from aioengine.metrics.page.plumbing import Receive, Scope, respond
from aioengine.server.access.gate import Gate
from aioengine.server.access_log import RequestRecord
from aioengine.server.bounds import BODIES, UPLOADS, Shares
from aioengine.server.call import Call, sent
from aioengine.server.context import Context
from aioengine.server.errors import ApiError
from aioengine.server.openai.uploads import upload
from aioengine.server.routes import METRICS, Route
from aioengine.server.transport.body import BoundedBody
from aioengine.server.transport.json_body import JsonDecoder, check_kind

PAGE_ROUTE = "/metrics"
"""What metrics and the log call all routes of the metrics application."""
DECODED_AT_ONCE = 64 * 1024
"""Size up to which a body is decoded on the loop, in two milliseconds at most."""
DRAIN_RETRY_AFTER = 5
"""Seconds until another replica, or this one after a restart, may be ready."""


class Requests:
    """The requests of one server that have reached their routes."""

    def __init__(self, context: Context, gate: Gate, *, ignores_unknown: bool) -> None:
        self.context, self.gate = context, gate
        self.idle = asyncio.Event()
        """Set while none with a body is open."""
        self.idle.set()
        self.bodies, self.uploads = Shares(BODIES), Shares(UPLOADS)
        self._decode = JsonDecoder(ignores_unknown=ignores_unknown).decode

    async def decoded(self, call: Call, body: BoundedBody, type_: Any) -> Any:
        """Read the body, and decode it as a ``type_``."""
        check_kind(call.scope)
        content = await body.whole()
        call.record.body_size = len(content)
        if len(content) <= DECODED_AT_ONCE:
            return self._decode(content, type_)
        work = self.context.engine.text_work
        return await work.run(len(content), lambda: self._decode(content, type_), call.record.owner)

    def body(self, call: Call, route: Route) -> BoundedBody:
        settings, limit = self.context.settings, self.context.max_body_bytes
        shares, bound = self.bodies, BODIES
        if route.function is upload and settings.max_upload_bytes is not None:
            shares, bound, limit = self.uploads, UPLOADS, settings.max_upload_bytes
        shares.most = bound.most * limit
        timeout, owner = settings.read_timeout, call.record.owner
        return BoundedBody(call.receive, call.scope, shares, owner, limit=limit, timeout=timeout)

    def enter(self, record: RequestRecord) -> None:
        self.context.open_requests.add(record)
        self.idle.clear()

    def leave(self, record: RequestRecord) -> None:
        self.context.open_requests.discard(record)
        record.so_far = int  # the record may live on; its function would keep the answer in memory
        if not self.context.open_requests:
            self.idle.set()


class _Endpoint:
    """An ASGI application: what is sent to one route. Raises ApiError for what is refused."""

    def __init__(self, route: Route, requests: Requests) -> None:
        self._route, self._requests = route, requests
        self._takes, self._query = route.takes, route.query

    async def __call__(self, scope: Scope, receive: Receive, send: Any) -> None:
        record: RequestRecord = scope["state"]["record"]
        route, requests = self._route, self._requests
        record.route = PAGE_ROUTE if route.scopes == METRICS else route.path
        call = Call(requests.context, record, scope, receive)
        if route.method != "POST":
            requests.gate.admit(route.scopes, scope, record)
            await self._run(call, send)
            return
        if requests.context.draining:
            raise ApiError(
                503,
                "the server is shutting down and accepts no new requests",
                type="server_error",
                code="unavailable",
                retry_after=DRAIN_RETRY_AFTER,
                close=True,
            )
        requests.gate.admit(route.scopes, scope, record)
        body = requests.body(call, route)
        requests.enter(record)
        try:
            await self._run(call._replace(receive=body), send)
        finally:
            body.release()
            requests.leave(record)

    async def _run(self, call: Call, send: Any) -> None:
        given: dict[str, Any] = {}
        if self._query is not None:
            query = dict(QueryParams(call.scope.get("query_string", b"")))
            given["query"] = msgspec.convert(query, self._query)
        if self._takes is not None:
            assert isinstance(call.receive, BoundedBody)
            given["data"] = await self._requests.decoded(call, call.receive, self._takes)
        made = self._route.function(call, **given)
        given.clear()  # nothing of the request is kept here while it is answered
        found = await made
        if callable(found):
            await found(call.scope, call.receive, send)
        else:
            body, status, kind = sent(found)
            await respond(send, status, [(b"content-type", kind)], body)


def endpoint(route: Route, requests: Requests) -> routing.Route:
    """Return the route as the framework looks for it."""
    path = route.path.replace("}", ":path}")
    return routing.Route(path, _Endpoint(route, requests), methods=[route.method])
