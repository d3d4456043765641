"""The ASGI application: what every request passes before and after its route."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
from starlette import routing
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from aioengine.adapters.read_threads import SharedRead
from aioengine.errors import EngineStopped
from aioengine.metrics.asgi import metrics_app
from aioengine.metrics.page.plumbing import (
    PART_BYTES,
    Message,
    Receive,
    Scope,
    Send,
    answer_no_http,
    below_mount,
    in_parts,
    respond,
)
from aioengine.metrics.starting import starting_metrics
from aioengine.runtime.client import EngineClient
from aioengine.server.access.gate import Gate
from aioengine.server.access_log import RequestRecord, log_request
from aioengine.server.bounds import UNREAD, Shares
from aioengine.server.context import Context
from aioengine.server.errors import ApiError, ClientDisconnected
from aioengine.server.routes import METRICS, OPEN, ROUTES, Endpoint, make_document
from aioengine.server.settings import ServerSettings

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._\-]{1,128}")
_PROBES = frozenset(route.path for route in ROUTES if route.scopes == OPEN)
_PAGES = frozenset(("", *(route.path for route in ROUTES if route.scopes == METRICS)))


class ServerApp:
    """An OpenAI-compatible ASGI application that serves ``engine``.

    Mount it under any prefix, or run it by itself. The caller keeps owning the engine, and starts and stops
    it; both must be on the same event loop. Logging is not configured: each request is one record of the
    logger ``aioengine.server.access``, with its details in ``record.fields``.

    With a ``tracer_provider`` (extra ``otel``) each request that is no probe is a span, the child of the one
    that its header ``traceparent`` names. The engine's own spans become its children; they are made by
    :func:`aioengine.metrics.tracing.trace_requests`.

    Raises ConfigError if the engine's ``adapter_root`` is not a folder.
    """

    def __init__(
        self,
        engine: EngineClient,
        settings: ServerSettings | None = None,
        *,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        settings = ServerSettings() if settings is None else settings
        self._gate = Gate(settings, engine.limit_waiting)
        if settings.keys_file is not None:  # it has the limits
            engine.share_limits(self._gate)
        self.context = context = Context(engine, settings)
        context.page = self._page = metrics_app(engine)
        with_keys = not self._gate.is_open
        context.document = SharedRead("aioengine-docs", lambda: make_document(ROUTES, with_keys=with_keys))
        endpoints = [
            # Names of models and files may have slashes.
            routing.Route(r.path.replace("}", ":path}"), Endpoint(r, context, self._gate), methods=[r.method])
            for r in ROUTES
        ]
        self._routes = routing.Router(endpoints, redirect_slashes=False)
        self.unread = Shares(UNREAD)
        self._answer: ASGIApp = self._answer_request
        if settings.allow_origins:
            self._answer = CORSMiddleware(
                self._answer_request,
                allow_origins=settings.allow_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
                expose_headers=("retry-after", "x-not-enforced", "x-request-id"),
            )
        self._spans = None
        if tracer_provider is not None:
            from aioengine.metrics.remote_spans import HttpSpans

            self._spans = HttpSpans(tracer_provider)

    @property
    def active(self) -> int:
        """Accepted requests that have not been answered in full (probes and pages do not count)."""
        return len(self.context.open_requests)

    def change(self, settings: ServerSettings) -> None:
        """Use other limits, timeouts, defaults and names of the base model for requests from now on. Keys,
        hosts and settings about the model's files stay as they are."""
        self.context.change(settings)

    async def drain(self) -> None:
        """Refuse new requests with 503 from now on, and wait until the accepted ones are answered."""
        self.leave()
        self.context.draining = True
        await self.context.idle.wait()

    def leave(self) -> None:
        """Make ``/ready`` answer 503 from now on, but accept everything as before, so that load balancers can
        move their traffic first."""
        self.context.engine.leaving = True

    def open(self) -> None:
        """Begin to watch the keys file, and connect the metrics; the first request does so, too. Needs a
        running loop."""
        with contextlib.suppress(EngineStopped):  # not started yet: the next request does it
            http = self.context.engine.metrics.http
            http.active = lambda: self.active
            self._gate.watch()
            if (keys := self._gate.keys_file) is not None:
                http.loaded["keys"] = lambda: keys.good

    def close(self) -> None:
        """End the live page's streams, which a server that shuts down would wait for."""
        self._page.close()
        self._gate.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await answer_no_http(scope, receive, send, self.close)
        else:
            await self._answer(scope, receive, send)

    async def _answer_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.open()
        path = below_mount(scope)[0]
        asked = next((value for name, value in scope["headers"] if name.lower() == b"x-request-id"), b"")
        # The client's id, if there is one and its form is harmless.
        id_ = asked.decode("latin-1") if _REQUEST_ID.fullmatch(asked) else self.context.new_id()
        record = RequestRecord(request_id=id_, method=scope["method"], path=path[:200])
        spans = None if _is_quiet(path) else self._spans
        with contextlib.nullcontext() if spans is None else spans.request(scope["headers"], record):
            await self._answer_noted(path, record, scope, receive, send)

    async def _answer_noted(
        self, path: str, record: RequestRecord, scope: Scope, receive: Receive, send: Send
    ) -> None:
        sender = _Sender(send, scope, record, self.unread)
        try:
            self._gate.check_site(scope, is_probe=path in _PROBES)
            if path not in _PROBES:
                self._gate.identify(scope, record)
            # Without the mount point, because routes are matched below it.
            state = {"record": record, "outer": scope}
            inner = {**scope, "app": self, "path": path.rstrip("/") or "/", "root_path": "", "state": state}
            await self._routes(inner, receive, sender)
        except asyncio.CancelledError:
            record.status, record.error = 499, "cancelled"
            raise
        except Exception as error:
            refused = self._refused(error, record, path)
            if not record.status:
                with contextlib.suppress(ClientDisconnected):
                    await respond(sender, refused.status, refused.headers, refused.body_for(path))
            elif isinstance(error, ClientDisconnected):
                record.status = refused.status
            else:
                raise
        finally:
            sender.close()
            if record.admission is not None:
                record.admission.end(
                    (record.prompt_tokens or 0) + (record.output_tokens or 0), time.monotonic()
                )
            with contextlib.suppress(EngineStopped):  # not started yet
                http = self.context.engine.metrics.http
                http.responded(record.route, record.status, record.error, record.tenant)
            log_request(record, quiet=record.counted or _is_quiet(path))

    def _refused(self, error: Exception, record: RequestRecord, path: str) -> ApiError:
        if isinstance(error, HTTPException):  # of the routes
            text, code = f"there is no {path[:200]}; see /docs/openapi.json", "not_found"
            if error.status_code != 404:
                text, code = f"{record.method} is not allowed for {path[:200]}", "method_not_allowed"
            error = ApiError(error.status_code, text, code=code)
        return record.refused_by(error, self.context.settings.reword)


create_app = ServerApp


class _Sender:
    """An ASGI ``send`` for one request: it adds headers, and sends large answers in parts, if there is room
    for them among those that are being sent.

    Raises ClientDisconnected for a client that has gone, and ApiError for an answer that is too large or
    finds no room: then nothing has been sent.
    """

    def __init__(self, send: Send, scope: Scope, record: RequestRecord, unread: Shares) -> None:
        self._send, self._scope, self._record = send, scope, record
        self._unread, self._held = unread, 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._hold(message["headers"])
            self._record.status = message["status"]
            message = {**message, "headers": self._headers(message["headers"])}
        try:
            for part in in_parts(message):
                await self._send(part)
        except OSError as error:  # it went away in the middle of a message
            raise ClientDisconnected from error

    def close(self) -> None:
        """Count the answer no longer."""
        if self._held:
            self._unread.give_back(self._record.owner, self._held)

    def _hold(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        size = next((int(value) for name, value in headers if name == b"content-length"), 0)
        if size <= PART_BYTES:
            return
        if size > self._unread.most:
            text = f"the answer has {size} bytes, and may have {self._unread.most}: ask for fewer "
            text += "log-probabilities, choices or tokens, or for a stream"
            raise ApiError(400, text, code="answer_too_large")
        if not self._unread.take(self._record.owner, size, alone=size):
            text = "answers of yours, or of others, wait to be read, and leave no room for this one"
            raise ApiError(503, f"{text}; try again later", code="overloaded")
        self._held = size

    def _headers(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        record = self._record
        found = [*headers, (b"x-request-id", record.request_id.encode())]
        if record.not_enforced is not None:
            found.append((b"x-not-enforced", record.not_enforced.encode("ascii", "replace")))
        # A client that asks first and is refused sends no body: its next request could be mistaken for it.
        if record.status >= 400 and any(name == b"expect" for name, _ in self._scope["headers"]):
            found.append((b"connection", b"close"))
        return found


class Entrance:
    """Answers while the engine starts, and passes requests to ``app`` once that is set.

    Until then ``/health`` answers 200, because the process is well; ``/ready`` answers 503 with the current
    stage; ``/metrics`` has only the state; everything else is refused with 503 and a ``Retry-After``.
    """

    def __init__(self, engine_name: str = "default") -> None:
        self._engine_name = engine_name
        self.app: ServerApp | None = None
        self._stage: dict[str, str | int] = {}

    def progress(self, stage: str, done: int, total: int) -> None:
        """A :class:`~aioengine.info.LoadProgress`; may be called in any thread."""
        self._stage = {"stage": stage, "done": done, "total": total}

    @property
    def active(self) -> int:
        """Accepted requests that have not been answered in full."""
        return 0 if self.app is None else self.app.active

    def close(self) -> None:
        """End the live page's streams, which a server that shuts down would wait for."""
        if self.app is not None:
            self.app.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["path"] in ("/health", "/ready"):
            status = 200 if scope["path"] == "/health" else 503
            body = msgspec.json.encode({"status": "starting", **self._stage})
            await respond(send, status, [(b"content-type", b"application/json")], body)
        elif scope["path"] == "/metrics":  # without a key: it says what the probes say
            kind, body = starting_metrics(self._engine_name)
            await respond(send, 200, [(b"content-type", kind.encode())], body)
        else:
            text = "the engine is still starting: see /ready"
            error = ApiError(503, text, code="starting", retry_after=2, close=True)
            await respond(send, error.status, error.headers, error.body_for(scope["path"]))


def _is_quiet(path: str) -> bool:
    """Whether it is asked for again and again, by programs and pages."""
    return path in _PROBES or path in _PAGES or path.startswith("/assets/")
