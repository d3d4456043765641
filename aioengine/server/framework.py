"""Adapts the routes to Litestar: strict decoding, plain ASGI responses, errors in OpenAI's form."""

from __future__ import annotations

import http
from typing import Any

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException, MethodNotAllowedException, ValidationException
from litestar.openapi.datastructures import ResponseSpec
from litestar.response import Response

from aioengine.server.access.gate import Gate
from aioengine.server.access_log import RequestRecord
from aioengine.server.context import Context
from aioengine.server.errors import ApiError, ErrorBody, to_api_error
from aioengine.server.generation import Generation
from aioengine.server.known_fields import UnknownFields
from aioengine.server.settings import ServerSettings
from aioengine.server.streaming import GenerationResponse, Reply, send_error

RECORD = "aioengine_record"
"""Key of the request's RequestRecord in ``scope["state"]``."""
TEXT_WORK = "aioengine_text_work"
"""Key of the engine's TextWork there."""
BODY = "aioengine_body"
"""Key of the BoundedBody of a POST there."""
UNKNOWN_FIELDS = "aioengine_unknown_fields"
"""Key of the UnknownFields in the application's state."""

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
        """The body, until :meth:`json` has decoded it."""
        if self._unread is None:
            self._unread = b"".join([part async for part in self.stream()])
        return self._unread

    async def json(self) -> Any:
        content_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Browsers send anything else to other sites without asking them first.
        if content_type != "application/json":
            raise ApiError(415, "the body must be application/json", code="unsupported_media_type")
        field = self.route_handler.parsed_data_field
        assert field is not None
        body, self._unread = await self.body(), b""
        unknown: UnknownFields = self.app.state[UNKNOWN_FIELDS]
        if len(body) <= DECODED_AT_ONCE:
            return unknown.decode(body, field.annotation)
        work = self.scope["state"][TEXT_WORK]
        owner = self.scope["state"][RECORD].owner
        return await work.run(len(body), lambda: unknown.decode(body, field.annotation), owner)


class Handled(Response[Any]):
    """A response sent by a separate ASGI application: generated output in a route's format."""

    def __init__(
        self,
        context: Context,
        generation: Generation,
        reply: Reply,
        *,
        stream: bool | None,
        record: RequestRecord,
    ) -> None:
        super().__init__(content=None)
        settings = context.settings
        self._app = GenerationResponse(
            generation, reply, stream=bool(stream), settings=settings, record=record
        )

    def to_asgi_response(self, app: Any, request: Request[Any, Any, Any], **_kwargs: Any) -> Any:
        request.scope["state"][BODY].release()  # it has become tokens
        return self._app


def record_of(request: Request[Any, Any, Any]) -> RequestRecord:
    record: RequestRecord = request.scope["state"][RECORD]
    return record


def guard(gate: Gate) -> Any:
    """A guard for all routes. Raises ApiError before the body is read."""

    # A coroutine: Litestar calls a plain function in a thread.
    async def check(connection: ASGIConnection[Any, Any, Any, Any], _handler: Any) -> None:
        scope = connection.scope
        record: RequestRecord = scope["state"][RECORD]
        record.route = scope["path_template"]
        gate.admit(record.route, scope, record)  # type: ignore[arg-type]

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
    "embeddings": "only text generation is served",
    "files": "no files are kept",
    "fine_tuning": "train elsewhere, and load the adapter",
    "fine-tunes": "train elsewhere, and load the adapter",
    "images": "the model reads and writes text",
    "moderations": "only text generation is served",
    "realtime": "use /v1/responses with stream: true",
    "rerank": "only text generation is served",
    "score": "only text generation is served",
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
                405, f"{request.method} is not for {request.url.path}", code="method_not_allowed"
            )
        elif isinstance(error, HTTPException) and error.status_code == 404:
            found = ApiError(404, _not_found(request.scope["path"]), code="not_found")
        elif isinstance(error, ValidationException):  # nothing but the body is validated
            found = ApiError(400, "the body is empty; it must be JSON", code="invalid_json")
        elif isinstance(error, HTTPException) and error.status_code < 500:
            found = ApiError(error.status_code, error.detail)
        else:
            found = to_api_error(error, settings)
        record_of(request).refused(found.detail)
        return ErrorResponse(found)

    return handle
