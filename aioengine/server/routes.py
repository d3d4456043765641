"""The table of routes, the way from the framework to a route's function, and ``/docs/openapi.json``."""

from __future__ import annotations

import asyncio
import http
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec
from starlette import routing

from aioengine import __version__
from aioengine.metrics.page.plumbing import Receive, Scope, respond
from aioengine.server import reports
from aioengine.server.access.gate import Gate
from aioengine.server.access.keys import SCOPES
from aioengine.server.access.keys import Scope as KeyScope
from aioengine.server.access_log import RequestRecord
from aioengine.server.bounds import BODIES, UPLOADS, Shares
from aioengine.server.context import Call, Context, sent
from aioengine.server.errors import ApiError, ErrorBody
from aioengine.server.messages import routes as messages
from aioengine.server.openai import adapters, chat, completions, tokens, vectors
from aioengine.server.responses import routes as responses
from aioengine.server.transport.body import BoundedBody, JsonDecoder, check_kind

OPEN: tuple[KeyScope, ...] = ()
GENERATE: tuple[KeyScope, ...] = ("generate",)
MODELS: tuple[KeyScope, ...] = ("generate", "adapters")
ADAPTERS: tuple[KeyScope, ...] = ("adapters",)
ADMIN: tuple[KeyScope, ...] = ("admin",)
METRICS: tuple[KeyScope, ...] = ("metrics",)

PAGE_ROUTE = "/metrics"
"""What metrics and the log call all routes of the metrics application."""
DECODED_AT_ONCE = 64 * 1024
"""Size up to which a body is decoded on the loop, in two milliseconds at most."""
DRAIN_RETRY_AFTER = 5
"""Seconds until another replica, or this one after a restart, may be ready."""


class Route(NamedTuple):
    """A route. Its description is that of its function: the beginning of the docstring, and the types."""

    method: str
    path: str
    function: Callable[..., Awaitable[Any]]
    """Takes a Call and, if it is to be decoded, the body as ``data``."""
    scopes: tuple[KeyScope, ...]
    """A key needs one of them ("admin" includes all); empty if no key is required."""

    def type_of(self, what: str) -> Any:
        """Type of the body (``data``), or of the answer's JSON (``return``; ``str`` for a text); None if it
        is not decoded."""
        given = get_type_hints(self.function, include_extras=what == "return").get(what)
        return get_args(given)[-1] if what == "return" and get_args(given) else given


ROUTES = (
    Route("POST", "/v1/chat/completions", chat.chat_completions, GENERATE),
    Route("POST", "/v1/completions", completions.completions, GENERATE),
    Route("POST", "/v1/responses", responses.responses, GENERATE),
    Route("POST", "/v1/messages", messages.messages, GENERATE),
    Route("GET", "/health", reports.health, OPEN),
    Route("GET", "/ready", reports.ready, OPEN),
    Route("POST", "/v1/messages/count_tokens", messages.count_tokens, GENERATE),
    Route("POST", "/v1/embeddings", vectors.embeddings, GENERATE),
    Route("POST", "/classify", vectors.classify, GENERATE),
    Route("POST", "/rerank", vectors.rerank, GENERATE),
    Route("POST", "/v1/rerank", vectors.rerank, GENERATE),
    Route("POST", "/v2/rerank", vectors.rerank, GENERATE),
    Route("POST", "/tokenize", tokens.tokenize, GENERATE),
    Route("POST", "/detokenize", tokens.detokenize, GENERATE),
    Route("GET", "/tokenizer_info", tokens.tokenizer_info, GENERATE),
    Route("GET", "/v1/models", reports.models, MODELS),
    Route("GET", "/v1/models/{model}", reports.model, MODELS),
    Route("POST", "/v1/load_lora_adapter", adapters.load, ADAPTERS),
    Route("POST", "/v1/unload_lora_adapter", adapters.unload, ADAPTERS),
    Route("POST", "/v1/upload_lora_adapter", adapters.upload, ADAPTERS),
    Route("GET", "/version", reports.version, SCOPES),
    Route("GET", "/debug/requests", reports.debug_requests, ADMIN),
    Route("GET", "/docs/openapi.json", reports.openapi, SCOPES),
    Route("GET", "/", reports.page, METRICS),
    Route("GET", "/metrics", reports.page, METRICS),
    Route("GET", "/metrics/targets", reports.page, METRICS),
    Route("GET", "/events", reports.page, METRICS),
    Route("GET", "/assets/{file}", reports.page, METRICS),
)
"""In the order in which they are looked for: those that get many requests come first."""


class Requests:
    """The requests of one server that have reached their routes."""

    def __init__(self, context: Context, gate: Gate, *, ignores_unknown: bool) -> None:
        self.context, self.gate = context, gate
        self.idle = asyncio.Event()
        """Set while none with a body is open."""
        self.idle.set()
        self.bodies, self.uploads = Shares(BODIES), Shares(UPLOADS)
        self._decode = JsonDecoder(ignores_unknown=ignores_unknown).decode

    async def decoded(self, call: Call, type_: Any) -> Any:
        """Read the body, and decode it as a ``type_``."""
        check_kind(call.scope)
        assert isinstance(call.receive, BoundedBody)
        content = await call.receive.whole()
        call.record.body_size = len(content)
        if len(content) <= DECODED_AT_ONCE:
            return self._decode(content, type_)
        work = self.context.engine.text_work
        return await work.run(len(content), lambda: self._decode(content, type_), call.record.owner)

    def body(self, call: Call, route: Route) -> BoundedBody:
        settings, limit = self.context.settings, self.context.max_body_bytes
        shares, bound = self.bodies, BODIES
        if route.function is adapters.upload and settings.max_upload_bytes is not None:
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

    def endpoints(self) -> list[routing.Route]:
        """Return the routes as the framework looks for them."""
        return [
            routing.Route(route.path.replace("}", ":path}"), _Endpoint(route, self), methods=[route.method])
            for route in ROUTES
        ]


class _Endpoint:
    """An ASGI application: what is sent to one route. Raises ApiError for what is refused."""

    def __init__(self, route: Route, requests: Requests) -> None:
        self._route, self._requests = route, requests
        self._takes = route.type_of("data")

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
            text = "the server is shutting down and accepts no new requests"
            raise ApiError(503, text, code="unavailable", retry_after=DRAIN_RETRY_AFTER, close=True)
        requests.gate.admit(route.scopes, scope, record)
        body = requests.body(call, route)
        requests.enter(record)
        try:
            await self._run(call._replace(receive=body), send)
        finally:
            body.release()
            requests.leave(record)

    async def _run(self, call: Call, send: Any) -> None:
        function = self._route.function
        if self._takes is None:
            found = await function(call)
        else:
            found = await function(call, await self._requests.decoded(call, self._takes))
        if callable(found):
            await found(call.scope, call.receive, send)
        else:
            body, status, kind = sent(found)
            await respond(send, status, [(b"content-type", kind)], body)


_STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


def make_document(routes: Iterable[Route], *, with_keys: bool) -> bytes:
    """Make the OpenAPI document, with msgspec's schemas of the types, which have every bound. ``with_keys``:
    requests must carry an API key."""
    shown = [r for r in routes if r.scopes not in (ADMIN, METRICS) and r.function is not reports.openapi]
    types = [route.type_of("return") for route in shown] + [route.type_of("data") or str for route in shown]
    [error, *schemas], components = msgspec.json.schema_components(
        [ErrorBody, *types], ref_template="#/components/schemas/{name}"
    )
    errors = {
        str(status): {"description": http.HTTPStatus(status).phrase, "content": _json(error)}
        for status in _STATUSES
    }
    paths: dict[str, Any] = {}
    for i, route in enumerate(shown):
        taken = types[len(shown) + i]
        content = {"text/plain": {"schema": schemas[i]}} if types[i] is str else _json(schemas[i])
        if "stream" in getattr(taken, "__struct_fields__", ()):
            content["text/event-stream"] = {"schema": {"type": "string"}}
        operation: dict[str, Any] = {
            "summary": inspect.getdoc(route.function),
            "operationId": re.sub(r"\W+", "_", f"{route.method} {route.path}").strip("_"),
            "responses": {"200": {"description": "The answer", "content": content}, **errors},
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in re.findall(r"{(\w+)}", route.path)
            ],
        }
        if taken is not str:
            operation["requestBody"] = {"required": True, "content": _json(schemas[len(shown) + i])}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "aioengine", "version": __version__},
        "servers": [{"url": ".."}],  # relative to the document: right under any mount point
        "paths": paths,
        "components": {"schemas": components},
    }
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return msgspec.json.encode(document)


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
