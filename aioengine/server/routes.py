"""The table of routes, the way from the framework to a route's function, and ``/docs/openapi.json``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec

from aioengine import __version__
from aioengine.metrics.page.plumbing import Receive, Scope, respond
from aioengine.server import messages, reports, responses
from aioengine.server.access.gate import Gate
from aioengine.server.access.keys import SCOPES
from aioengine.server.access.keys import Scope as KeyScope
from aioengine.server.access_log import RequestRecord
from aioengine.server.bounds import BODIES, UPLOADS
from aioengine.server.context import Call, Context, sent
from aioengine.server.errors import ApiError, ErrorBody
from aioengine.server.openai import adapters, chat, completions, tokens, vectors
from aioengine.server.transport.body import BoundedBody, check_kind

OPEN: tuple[KeyScope, ...] = ()
GENERATE: tuple[KeyScope, ...] = ("generate",)
MODELS: tuple[KeyScope, ...] = ("generate", "adapters")
ADAPTERS: tuple[KeyScope, ...] = ("adapters",)
ADMIN: tuple[KeyScope, ...] = ("admin",)
METRICS: tuple[KeyScope, ...] = ("metrics",)

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


class Endpoint:
    """An ASGI application: what is sent to one route. Raises ApiError for what is refused."""

    def __init__(self, route: Route, context: Context, gate: Gate) -> None:
        self._route, self._context, self._gate = route, context, gate
        self._takes = route.type_of("data")

    async def __call__(self, scope: Scope, receive: Receive, send: Any) -> None:
        record: RequestRecord = scope["state"]["record"]
        route, context = self._route, self._context
        record.route = "/metrics" if route.scopes == METRICS else route.path
        if route.method == "POST" and context.draining:
            text = "the server is shutting down and accepts no new requests"
            raise ApiError(503, text, code="unavailable", retry_after=DRAIN_RETRY_AFTER, close=True)
        self._gate.admit(route.scopes, scope, record)
        if route.method != "POST":
            await self._run(Call(context, record, scope, receive), send)
            return
        body = self._body(scope, receive, record)
        with context.opened(record):
            try:
                await self._run(Call(context, record, scope, body), send)
            finally:
                body.release()

    async def _run(self, call: Call, send: Any) -> None:
        function = self._route.function
        found = await (function(call) if self._takes is None else function(call, await self._decoded(call)))
        if callable(found):
            await found(call.scope, call.receive, send)
        else:
            body, status, kind = sent(found)
            await respond(send, status, [(b"content-type", kind)], body)

    def _body(self, scope: Scope, receive: Receive, record: RequestRecord) -> BoundedBody:
        context = self._context
        settings, limit = context.settings, context.max_body_bytes
        shares, bound = context.bodies, BODIES
        if self._route.function is adapters.upload and settings.max_upload_bytes is not None:
            shares, bound, limit = context.uploads, UPLOADS, settings.max_upload_bytes
        shares.most = bound.most * limit
        timeout = settings.read_timeout
        return BoundedBody(receive, scope, shares, record.owner, limit=limit, timeout=timeout)

    async def _decoded(self, call: Call) -> Any:
        """Read the body, and decode it as the route's type."""
        check_kind(call.scope)
        assert isinstance(call.receive, BoundedBody)
        content = await call.receive.whole()
        call.record.body_size = len(content)
        decode = self._context.decoder.decode
        if len(content) <= DECODED_AT_ONCE:
            return decode(content, self._takes)
        work = self._context.engine.text_work
        return await work.run(len(content), lambda: decode(content, self._takes), call.record.owner)


def make_document(routes: Iterable[Route], *, with_keys: bool) -> bytes:
    """Make the OpenAPI document, with msgspec's schemas of the types, which have every bound. ``with_keys``:
    requests must carry an API key."""
    shown = [r for r in routes if r.scopes not in (ADMIN, METRICS) and r.function is not reports.openapi]
    types = [route.type_of("return") for route in shown] + [route.type_of("data") or str for route in shown]
    [error, *schemas], components = msgspec.json.schema_components(
        [ErrorBody, *types], ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {}
    for i, route in enumerate(shown):
        taken = types[len(shown) + i]
        content = {"text/plain": {"schema": schemas[i]}} if types[i] is str else _json(schemas[i])
        if "stream" in getattr(taken, "__struct_fields__", ()):
            content["text/event-stream"] = {"schema": {"type": "string"}}
        operation: dict[str, Any] = {
            "summary": inspect.getdoc(route.function),
            "operationId": re.sub(r"\W+", "_", f"{route.method} {route.path}").strip("_"),
            "responses": {
                "200": {"description": "The answer", "content": content},
                "default": {"description": "An error", "content": _json(error)},
            },
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
