"""The ASGI application: the steps that every request passes before and after its route."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import TYPE_CHECKING

import msgspec
from litestar import Litestar
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from aioengine import __version__
from aioengine.errors import EngineStopped
from aioengine.metrics.asgi import metrics_app
from aioengine.metrics.page.plumbing import (
    Message,
    Receive,
    Scope,
    Send,
    answer_no_http,
    below_mount,
    in_parts,
    respond,
    watch_of,
)
from aioengine.runtime.client import EngineClient, SharesLimits
from aioengine.server import framework
from aioengine.server.access.browsers import BrowserRules
from aioengine.server.access.gate import Gate
from aioengine.server.access.scopes import PAGE_ROUTE, check_routes
from aioengine.server.access_log import RequestRecord, log_request
from aioengine.server.context import Context
from aioengine.server.debug.routes import debug_routes
from aioengine.server.errors import ApiError
from aioengine.server.health import health_routes
from aioengine.server.known_fields import UnknownFields
from aioengine.server.messages.routes import messages_routes
from aioengine.server.openai.adapters import adapter_routes
from aioengine.server.openai.chat import chat_routes
from aioengine.server.openai.completions import completion_routes
from aioengine.server.openai.models import model_routes
from aioengine.server.openai.tokens import token_routes
from aioengine.server.openai.uploads import upload_routes
from aioengine.server.openapi import make_documents, openapi_config
from aioengine.server.pace import Pace
from aioengine.server.responses.routes import responses_routes
from aioengine.server.settings import ServerSettings
from aioengine.server.streaming import send_error
from aioengine.server.transport.answers import UnreadAnswers, size_of
from aioengine.server.transport.body import BodyBudget, BoundedBody
from aioengine.server.transport.departures import until_ended
from aioengine.server.vectors.routes import vector_routes

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from aioengine.metrics.remote_spans import HttpSpans

_REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
_UPLOAD = "/v1/upload_lora_adapter"
UPLOADS_AT_ONCE = 2
"""Number of uploads of the largest size that fit into memory at once."""
_PROBES = frozenset({"/health", "/ready"})
_PAGE = frozenset({"", "/", "/metrics", "/metrics/targets", "/events"})
DRAIN_RETRY_AFTER = 5
"""Seconds until another replica, or this one after a restart, may be ready."""


class ServerApp:
    """The application that :func:`create_app` makes."""

    def __init__(
        self, engine: EngineClient, settings: ServerSettings, tracer_provider: TracerProvider | None = None
    ) -> None:
        self._gate = Gate(settings, engine.limit_waiting)
        self._browsers = BrowserRules(settings.allowed_hosts, settings.allow_origins)
        if isinstance(engine, SharesLimits) and settings.keys_file is not None:  # it has the limits
            engine.share_limits(self._gate)
        # From here on no key is held, only their hashes.
        settings = msgspec.structs.replace(settings, api_keys={}, admin_keys={})
        self.context = context = Context(engine, settings)
        self._settings = settings
        self._metrics = metrics_app(engine)
        self._bodies = BodyBudget()
        self._uploads = BodyBudget(UPLOADS_AT_ONCE)
        self._answers = UnreadAnswers()
        self._pace = Pace(settings.retry_after)
        self._spans = None if tracer_provider is None else _http_spans(tracer_provider)
        self._active = 0
        self._tells_active = False
        """Whether the metrics know where to ask for ``active``."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._documents: asyncio.Future[None] | None = None
        """The making of the API's description, on first use."""
        self._unknown_fields = UnknownFields(ignore=settings.ignore_unknown_fields)
        self._routes = Litestar(
            route_handlers=[
                *completion_routes(context),
                *chat_routes(context),
                *responses_routes(context),
                *messages_routes(context),
                *model_routes(context),
                *adapter_routes(context),
                *upload_routes(context),
                *token_routes(context),
                *vector_routes(context),
                *health_routes(context),
                *debug_routes(context),
            ],
            request_class=framework.JsonRequest,
            before_request=framework.admission(self._gate),
            exception_handlers={Exception: framework.exception_handler(settings)},
            openapi_config=openapi_config(__version__, with_keys=not self._gate.is_open),
            request_max_body_size=None,  # BoundedBody has the bound
            logging_config=None,
        )
        check_routes(route.path_format for route in self._routes.routes)
        self._direct = {
            path: framework.DirectRoute(self._post_route(path), path, self._gate)
            for path in framework.GENERATING
        }

    @property
    def active(self) -> int:
        """Accepted requests that have not been answered in full (probes and pages do not count)."""
        return self._active

    def change(self, settings: ServerSettings) -> None:
        """Use other limits, timeouts, defaults and names of the base model for requests from now on. Keys,
        hosts and settings about the model's files stay as they are."""
        self._settings = msgspec.structs.replace(settings, api_keys={}, admin_keys={})
        self.context.change(self._settings)

    async def drain(self) -> None:
        """Refuse new requests with 503 from now on, and wait until the accepted ones are answered."""
        self.leave()
        self.context.draining = True
        await self._idle.wait()

    def leave(self) -> None:
        """Make ``/ready`` answer 503 from now on, but accept everything as before, so that load balancers can
        move their traffic first."""
        self.context.engine.leaving = True

    def open(self) -> None:
        """Start to watch the keys file; the first request does so too. Needs a running loop."""
        self._gate.watch()
        if self._tells_active:
            return
        with contextlib.suppress(EngineStopped):  # not started yet: the next request does it
            http = self.context.engine.metrics.http
            http.active = lambda: self._active
            if (keys := self._gate.keys_file) is not None:
                http.loaded["keys"] = lambda: keys.good
            self._tells_active = True

    def close(self) -> None:
        """End the live page's streams, which a server that shuts down would wait for."""
        self._metrics.close()
        self._gate.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.open()
            path, _ = below_mount(scope)
            if watch := watch_of(scope):
                watch.within(self._settings.send_timeout)
            request_id = _request_id(scope) or self.context.new_id()
            record = RequestRecord(request_id=request_id, method=scope["method"], path=path[:200])
            with self._span(path, scope, record):
                await self._http(path, record, scope, receive, send)
        else:
            await answer_no_http(scope, receive, send, self.close)

    def _span(
        self, path: str, scope: Scope, record: RequestRecord
    ) -> contextlib.AbstractContextManager[None]:
        if self._spans is None or path in _PROBES or _is_page(path):
            return contextlib.nullcontext()
        return self._spans.request(scope["headers"], record)

    async def _http(
        self, path: str, record: RequestRecord, scope: Scope, receive: Receive, send: Send
    ) -> None:
        started = is_replaced = False
        size = 0

        async def tagged_send(message: Message) -> None:
            nonlocal started, size, is_replaced
            if is_replaced:
                return
            if message["type"] == "http.response.start":
                if large := size_of(message["headers"]):
                    try:
                        await self._answers.hold(record.owner, large)
                    except ApiError as error:  # a framework would take its own answer for begun
                        record.refused(error)
                        await send_error(tagged_send, error, path)
                        is_replaced = True
                        return
                    size = large
                started = True
                record.status = message["status"]
                tags = [(b"x-request-id", record.request_id.encode())]
                headers = message["headers"]
                if record.error in ("engine_overloaded", "request_rejected"):
                    headers = [*(h for h in headers if h[0] != b"retry-after"), self._come_back(record)]
                if record.not_enforced is not None:
                    tags.append((b"x-not-enforced", record.not_enforced.encode("ascii", "replace")))
                if record.status >= 400 and _asks_first(scope):
                    tags.append((b"connection", b"close"))
                tags += self._browsers.permission(scope)
                message = {**message, "headers": [*headers, *tags]}
                await send(message)
            else:
                for part in in_parts(message):
                    await send(part)

        try:
            await self._answer(path, scope, receive, tagged_send, record)
        except asyncio.CancelledError:
            record.status, record.error = 499, "cancelled"
            raise
        except Exception as error:
            if started:
                raise
            api_error = record.refused_by(error, self._settings)
            await send_error(tagged_send, api_error, path)
        finally:
            if size:
                self._answers.release(record.owner, size)
            self._gate.leave(record, time.monotonic())
            self._count(record)
            log_request(record, quiet=record.counted or path in _PROBES or _is_page(path))

    async def _answer(
        self, path: str, scope: Scope, receive: Receive, send: Send, record: RequestRecord
    ) -> None:
        self._browsers.check(scope, is_probe=path in _PROBES)
        if (preflight := self._browsers.preflight(scope)) is not None:
            await respond(send, 200, preflight, b"")
            return
        if path not in _PROBES:
            self._gate.identify(scope, record)
        if _is_page(path):
            record.route = PAGE_ROUTE
            self._gate.admit(PAGE_ROUTE, scope, record)
            await until_ended(self._metrics(scope, receive, send), record.ended)
            return
        if path.startswith("/docs"):
            await self._described()
        # Without the mount point, because routes are matched below it.
        inner = {**scope, "path": path, "root_path": "", "state": {framework.RECORD: record}}
        if scope["method"] == "HEAD":
            inner["method"], send = "GET", _without_body(send)
        if scope["method"] != "POST":
            await self._routes(inner, receive, send)  # type: ignore[arg-type] # Litestar's types of ASGI
            return
        if self.context.draining:
            raise ApiError(
                503,
                "the server is shutting down and accepts no new requests",
                type="server_error",
                code="unavailable",
                retry_after=DRAIN_RETRY_AFTER,
                close=True,
            )
        upload = self._settings.max_upload_bytes if path.rstrip("/") == _UPLOAD else None
        body = BoundedBody(
            receive,
            scope["headers"],
            self._bodies if upload is None else self._uploads,
            owner=record.owner,
            limit=self.context.max_body_bytes if upload is None else upload,
            timeout=self._settings.read_timeout,
        )
        inner["state"] |= {
            framework.BODY: body,
            framework.TEXT_WORK: self.context.engine.text_work,
            framework.UNKNOWN_FIELDS: self._unknown_fields,
        }
        self.context.open_requests.add(record)
        self._active += 1
        self._idle.clear()
        try:
            await self._direct.get(path, self._routes)(inner, body, send)  # type: ignore[arg-type] # as above
        finally:
            body.release()
            self.context.open_requests.discard(record)
            record.so_far = int  # the record may live on; its function would keep the answer in memory
            self._active -= 1
            if self._active == 0:
                self._idle.set()

    async def _described(self) -> None:
        """Wait until the API's description is made, in a thread."""
        made = self._documents
        if made is None or (made.done() and (made.cancelled() or made.exception() is not None)):
            made = asyncio.ensure_future(asyncio.to_thread(make_documents, self._routes))
            self._documents = made
        await asyncio.shield(made)

    def _post_route(self, path: str) -> HTTPRouteHandler:
        [route] = (r for r in self._routes.routes if isinstance(r, HTTPRoute) and r.path == path)
        return route.route_handler_map["POST"][0]

    def _come_back(self, record: RequestRecord) -> tuple[bytes, bytes]:
        now, queue = time.monotonic(), record.queue
        if queue is None:
            seconds = self._pace.retry_after(self.context.engine.stats().waiting, now)
        else:
            name = record.owner if queue.bound == "tenant" else queue.adapter
            seconds = self._pace.retry_after(queue.waiting, now, (queue.bound, name))
        return b"retry-after", str(seconds).encode()

    def _count(self, record: RequestRecord) -> None:
        if record.output_tokens is not None and record.status == 200:
            adapters = (("adapter", name) for name in dict.fromkeys(record.wanted))
            self._pace.answered(time.monotonic(), ("tenant", record.owner), *adapters)
        with contextlib.suppress(EngineStopped):  # not started yet
            http = self.context.engine.metrics.http
            http.responded(record.route, record.status, record.error, record.tenant)


def create_app(
    engine: EngineClient,
    settings: ServerSettings | None = None,
    *,
    tracer_provider: TracerProvider | None = None,
) -> ServerApp:
    """Return an OpenAI-compatible ASGI application that serves ``engine``.

    Mount it under any prefix, or run it by itself. The caller keeps owning the engine, and starts and stops
    it; both must be on the same event loop. Logging is not configured: each request is one record of the
    logger ``aioengine.server.access``, with its details in ``record.fields``.

    With a ``tracer_provider`` (extra ``otel``) each request that is no probe is a span, the child of the one
    that its header ``traceparent`` names. The engine's own spans become its children; they are made by
    :func:`aioengine.metrics.tracing.trace_requests`.

    Raises ConfigError if the engine's ``adapter_root`` is not a folder.
    """
    return ServerApp(engine, ServerSettings() if settings is None else settings, tracer_provider)


def _http_spans(provider: TracerProvider) -> HttpSpans:
    from aioengine.metrics.remote_spans import HttpSpans

    return HttpSpans(provider)


def _without_body(send: Send) -> Send:
    async def headers_only(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return headers_only


def _is_page(path: str) -> bool:
    """Whether the metrics application answers requests for this path."""
    return path in _PAGE or path.startswith("/assets/")


def _request_id(scope: Scope) -> str | None:
    """Return the client's id if there is one and its form is harmless."""
    for name, value in scope["headers"]:
        if name.lower() == b"x-request-id":
            text: str = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(text):
                return text
    return None


def _asks_first(scope: Scope) -> bool:
    """Whether the client sent ``Expect: 100-continue``. If such a client is refused it sends no body, and its
    next request could be mistaken for the body."""
    return any(name == b"expect" for name, _ in scope["headers"])
