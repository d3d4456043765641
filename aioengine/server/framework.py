"""Adapts the routes to Litestar: strict decoding, plain ASGI responses, errors in OpenAI's form."""

from __future__ import annotations

import http
from collections.abc import Callable, Sized
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import msgspec
from litestar import MediaType, Request
from litestar.exceptions import HTTPException, MethodNotAllowedException, ValidationException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.response import Response

from aioengine.metrics.page.plumbing import Receive, Send
from aioengine.runtime.text_work import EACH
from aioengine.server.access.gate import Gate
from aioengine.server.access_log import RequestRecord
from aioengine.server.context import Context
from aioengine.server.errors import ApiError, ErrorBody
from aioengine.server.generation import Generation
from aioengine.server.known_fields import UnknownFields
from aioengine.server.settings import ServerSettings
from aioengine.server.streaming import GenerationResponse, Reply, send_error
from aioengine.server.transport.body import BoundedBody

T = TypeVar("T")

RECORD = "aioengine_record"
"""Key of the request's RequestRecord in ``scope["state"]``."""
TEXT_WORK = "aioengine_text_work"
"""Key of the engine's TextWork there."""
BODY = "aioengine_body"
"""Key of the BoundedBody of a POST there."""
UNKNOWN_FIELDS = "aioengine_unknown_fields"
"""Key of the application's UnknownFields there."""

DECODED_AT_ONCE = 64 * 1024
"""Size up to which a body is decoded on the loop, in two milliseconds at most."""

_STATUSES = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
RESPONSES: dict[int, ResponseSpec] = {
    status: ResponseSpec(ErrorBody, description=http.HTTPStatus(status).phrase, generate_examples=False)
    for status in _STATUSES
}


class JsonRequest(Request[Any, Any, Any]):
    """Request that decodes its body straight into the type of the handler's ``data`` and keeps neither,
    because an answer may take minutes and many may be open."""

    _unread: bytes | None = None

    async def body(self) -> bytes:
        """Return the body, until :meth:`json` has decoded it."""
        if self._unread is None:
            self._unread = await _body(self.receive)
        return self._unread

    async def json(self) -> Any:
        field = self.route_handler.parsed_data_field
        assert field is not None
        _check_type(self.scope)
        body, self._unread = await self.body(), b""
        return await _decoded(self.scope, body, field.annotation)


GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


class DirectRoute:
    """An ASGI application that calls a route's function as Litestar does, with less work per request. The
    routes that generate use it, because they get many requests. Litestar still has their paths and schemas.

    The function takes ``data`` and ``request``, and returns :class:`Handled`. It may use only the request's
    scope. Raises what the function and the gate raise.
    """

    def __init__(self, route: HTTPRouteHandler, path: str, gate: Gate) -> None:
        field = route.parsed_data_field
        assert field is not None
        self._type = field.annotation
        self._function = route.fn
        self._path = path
        self._gate = gate

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        record: RequestRecord = scope["state"][RECORD]
        record.route = self._path
        self._gate.admit(self._path, scope, record)
        _check_type(scope)
        body = await _body(receive)
        if not body:
            raise empty_body()
        request: Any = SimpleNamespace(scope=scope)
        data = await _decoded(scope, body, self._type)
        del body
        made = self._function(data=data, request=request)
        del data
        answer: Handled = await made
        await answer.to_asgi_response(None, request)(scope, receive, send)


async def _body(receive: Any) -> bytes:
    """Collect the content of a BoundedBody, which raises if anything is wrong."""
    message = await receive()
    if not message.get("more_body", False):
        return bytes(message["body"])
    parts = [message["body"]]
    try:
        while message.get("more_body", False):
            message = await receive()
            parts.append(message["body"])
        return b"".join(parts)
    finally:
        parts.clear()  # an error that is raised refers to this frame, and lives as long as its answer


def _check_type(scope: Any) -> None:
    headers = dict(scope["headers"])
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        text = "bodies are not decompressed: send the body without content-encoding"
        raise ApiError(415, text, param="content-encoding", code="unsupported_media_type")
    given = headers.get(b"content-type", b"")
    # Browsers send anything else to other sites without asking them first.
    if given.partition(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "the body must be application/json", code="unsupported_media_type")


async def _decoded(scope: Any, body: bytes, type_: Any) -> Any:
    state = scope["state"]
    unknown: UnknownFields = state[UNKNOWN_FIELDS]
    record: RequestRecord = state[RECORD]
    record.body_size = len(body)
    if len(body) <= DECODED_AT_ONCE:
        return unknown.decode(body, type_)
    return await state[TEXT_WORK].run(len(body), lambda: unknown.decode(body, type_), record.owner)


def empty_body() -> ApiError:
    return ApiError(400, "the body is empty; it must be JSON", code="invalid_json")


class Handled(Response[Any]):
    """A response sent by a separate ASGI application: generated output in a route's format.

    ``kept`` is the number of bytes that the reply keeps of the request until its end. Nothing else of a
    request's body may be kept once its constraints are built: many requests may wait, each for minutes.
    """

    def __init__(
        self,
        context: Context,
        generation: Generation,
        reply: Reply,
        *,
        stream: bool | None,
        record: RequestRecord,
        kept: int = 0,
    ) -> None:
        # Nothing of Response's own is used.
        settings = context.settings
        self._kept = kept
        self._app = GenerationResponse(
            generation, reply, stream=bool(stream), settings=settings, record=record
        )

    def to_asgi_response(self, app: Any, request: Request[Any, Any, Any], **_kwargs: Any) -> Any:
        body: BoundedBody = request.scope["state"][BODY]
        self._app.prepared = partial(body.release, self._kept)  # it has become tokens
        return self._app


async def listing(
    context: Context, record: RequestRecord, found: Sized, make: Callable[[], T]
) -> Response[T]:
    """Answer with ``make()``, a list of what was ``found``, of which there may be thousands: beside the loop,
    in turns with other requests."""
    body = await context.engine.text_work.run(
        EACH * len(found), lambda: msgspec.json.encode(make()), record.owner
    )
    return Response(cast(T, body), media_type=MediaType.JSON)


def record_of(request: Request[Any, Any, Any]) -> RequestRecord:
    record: RequestRecord = request.scope["state"][RECORD]
    return record


def admission(gate: Gate) -> Any:
    """Check the caller before each route's handler; Litestar calls this. Raises ApiError before the body is
    read."""

    # A coroutine, because Litestar calls a plain function in a thread. Not a guard, because Litestar
    # copies the handler for each guard's call.
    async def check(request: Request[Any, Any, Any]) -> None:
        scope = request.scope
        record: RequestRecord = scope["state"][RECORD]
        record.route = scope["path_template"]
        gate.admit(record.route, scope, record)  # type: ignore[arg-type] # Litestar's type of an ASGI scope

    return check


class ErrorResponse(Response[Any]):
    def __init__(self, error: ApiError) -> None:
        super().__init__(content=None)
        self._error = error

    def to_asgi_response(self, *_args: Any, **_kwargs: Any) -> Any:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send_error(send, self._error, scope["path"])

        return app


_NOT_SERVED = {
    "assistants": "use /v1/chat/completions",
    "audio": "the model reads and writes text",
    "batches": "send the requests themselves, as many at once as you like",
    "containers": "no code is run",
    "conversations": "nothing is kept; send the whole conversation to /v1/responses",
    "files": "no files are kept",
    "fine_tuning": "train elsewhere, and load the adapter",
    "fine-tunes": "train elsewhere, and load the adapter",
    "images": "the model reads and writes text",
    "moderations": "only text generation is served",
    "realtime": "use /v1/responses with stream: true",
    "threads": "nothing is kept; send the whole conversation",
    "uploads": "no files are kept",
    "vector_stores": "no files are kept",
    "videos": "the model reads and writes text",
}
"""Parts of OpenAI's API that this server lacks, and what to do instead."""


def _not_found(path: str) -> str:
    version, _, rest = path.removeprefix("/").partition("/")
    why = _NOT_SERVED.get(rest.partition("/")[0]) if version == "v1" else None
    return f"there is no {path[:200]}" + ("" if why is None else f": {why}")


def exception_handler(settings: ServerSettings) -> Any:
    def handle(request: Request[Any, Any, Any], error: Exception) -> ErrorResponse:
        if isinstance(error, MethodNotAllowedException):
            found = ApiError(
                405, f"{request.method} is not allowed for {request.url.path}", code="method_not_allowed"
            )
        elif isinstance(error, HTTPException) and error.status_code == 404:
            found = ApiError(404, _not_found(request.scope["path"]), code="not_found")
        elif isinstance(error, ValidationException):  # nothing but the body is validated
            found = empty_body()
        elif isinstance(error, HTTPException) and error.status_code < 500:
            found = ApiError(error.status_code, error.detail)
        else:
            found = record_of(request).refused_by(error, settings)
        record_of(request).refused(found)
        return ErrorResponse(found)

    return handle
