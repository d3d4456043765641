"""Errors as OpenAI's API writes them: a status, and ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import re
from typing import TypeVar

import msgspec

from aioengine import errors

logger = logging.getLogger("aioengine.server")

T = TypeVar("T")

_TYPES = {403: "permission_error", 429: "rate_limit_error", 499: "client_error", 504: "timeout_error"}
_MESSAGES_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_RESPONSES_NAMES = {
    r"^messages\b.*": "input",
    r"^response_format(\.json_schema)?\b": "text.format",
    r"^reasoning_effort$": "reasoning.effort",
    r"^(tools\[\d+\])\.function\b": r"\1",
}
"""Fields of a chat -> the same fields in ``/v1/responses``, whose requests are converted to chats."""
_LONGEST = 2000
"""Characters of a message."""


class ErrorDetail(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None = None
    """The request's field that caused it."""
    code: str | None = None


class ErrorBody(msgspec.Struct):
    error: ErrorDetail


class ApiError(Exception):
    """A request that is refused.

    Args:
        retry_after: Seconds after which it may be sent again; by default 1 for 429 and 503.
        retry: False tells OpenAI's client not to retry by itself, as it does on 5xx.
        close: The connection is closed, too.
        challenge: Value of ``WWW-Authenticate``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        retry: bool = True,
        close: bool = False,
        challenge: str | None = None,
    ) -> None:
        message = _shortened(message)
        super().__init__(message)
        if retry_after is None and retry and status in (429, 503):
            retry_after = 1
        self.status, self.retry_after = status, retry_after
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.detail = ErrorDetail(message=message, type=kind, param=param, code=code)
        headers = {
            b"content-type": "application/json",
            b"retry-after": None if retry_after is None else str(retry_after),
            b"x-should-retry": None if retry else "false",
            b"connection": "close" if close else None,
            b"www-authenticate": challenge,
        }
        self.headers = [(name, value.encode()) for name, value in headers.items() if value is not None]

    def body_for(self, path: str = "") -> bytes:
        """Return the body in the form of the API that ``path`` belongs to."""
        detail = self.detail
        if path.startswith("/v1/responses") and detail.param is not None:
            for pattern, own in _RESPONSES_NAMES.items():
                param = re.sub(pattern, own, detail.param)
                message = detail.message.replace(detail.param, param)
                detail = msgspec.structs.replace(detail, message=message, param=param)
        if not path.startswith("/v1/messages"):
            return msgspec.json.encode(ErrorBody(detail))
        kind = _MESSAGES_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        error: dict[str, object] = {"type": kind, "message": self.detail.message}
        if detail.param == "thread":  # Anthropic's client goes on without
            error["details"] = {"error_code": "thread_unsupported_request"}
        return msgspec.json.encode({"type": "error", "error": error})


class ClientDisconnected(Exception):
    """The client went away before its answer was complete."""


def model_not_found(name: str, param: str = "model") -> ApiError:
    return ApiError(404, f"The model {name!r} does not exist", param=param, code="model_not_found")


def invalid(field: str, why: str, code: str = "invalid_value", *, param: str | None = None) -> ApiError:
    """Return the refusal of a field, by its path in the body; ``param`` is another name for programs."""
    return ApiError(400, f"{field}: {why}", param=param or field, code=code)


def unsupported(field: str, why: str) -> ApiError:
    return invalid(field, why, "unsupported_parameter")


def needed(value: T | None, field: str) -> T:
    """Return the value. Raises ApiError if the field is not given."""
    if value is None:
        raise invalid(field, "is missing")
    return value


def _shortened(text: str) -> str:
    """Shorten a long message in the middle, because it may quote what a client has sent."""
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"


_PATH = re.compile(r"^(?P<what>.*?) - at `\$(?P<path>[^`]*)`$", re.DOTALL)
_FIELD = re.compile(r"(?:missing required|contains unknown) field `([^`]*)`")
_KIND = re.compile(r"Invalid value ('.*')", re.DOTALL)
"""Of an object whose "type" is none of those that are supported."""


def validation_error(error: msgspec.ValidationError) -> ApiError:
    """Convert msgspec's error, with the field's path as ``param``."""
    text = _shortened(str(error))
    found = _PATH.match(text)
    what, path = (found["what"], found["path"]) if found else (text, "")
    if field := _FIELD.search(what):
        path = f"{path}.{field[1]}"
    param = path.removeprefix(".") or None
    code = "unknown_parameter" if "unknown field" in what else "invalid_value"
    if kind := _KIND.fullmatch(what):
        what = f"{kind[1]} is not supported here"
    return ApiError(400, f"{param or 'the body'}: {what}", param=param, code=code)


_PLACE = re.compile(r"""(?:\b[a-z][a-z0-9+.-]*://|\barn:|(?<![\w./])~?/)[^\s'",;()]+""")
_NAMED_FIELD = re.compile(r"(\w+)(?:\[[^\]]*\])?(?:=|: )")
_OVERLOADED = {
    "server": "the engine is overloaded: as many requests are waiting as it allows",
    "tenant": "too many requests of your tenant (without keys: address) are waiting; others are served",
    "pinned": "pinned adapters leave no room for this adapter; whoever runs the server can unpin one",
}
"""Messages by the owner of the bound that is reached."""
_KINDS: dict[type[BaseException], tuple[int, str | None]] = {
    errors.RequestInvalid: (400, "invalid_value"),
    errors.ConfigError: (400, None),
    errors.EngineOverloaded: (429, "engine_overloaded"),
    errors.RequestRejected: (429, "request_rejected"),
    errors.DeadlineExceeded: (504, "deadline_exceeded"),
    errors.EngineDead: (503, "unavailable"),
    errors.EngineStopped: (503, "unavailable"),
    errors.AioEngineError: (500, "engine_error"),
}
"""Status and code of the engine's errors; the first that fits holds."""


def to_api_error(error: BaseException, named_in: str = "model", *, may_load: bool = True) -> ApiError:
    """Convert an exception to the client's error; internal errors are logged. ``named_in`` is the field of
    the body that names the adapters. Only clients that may load adapters are told why a file cannot be
    read."""
    match error:
        case ApiError():
            return error
        case ClientDisconnected():
            return ApiError(499, "the client closed the connection")
        case msgspec.ValidationError():
            return validation_error(error)
        case msgspec.DecodeError():
            hint = "; it must be UTF-8 without a byte order mark" if str(error).endswith("(byte 0)") else ""
            return ApiError(400, f"the body is not valid JSON: {error}{hint}", code="invalid_json")
        case UnicodeDecodeError():
            return ApiError(400, f"the body is not UTF-8: {error.reason}", code="invalid_json")
        case RecursionError():  # of what reads the body: nothing else here is recursive
            return ApiError(400, "something in the body is nested too deeply", code="invalid_value")
        case errors.AdapterNotFound():
            return model_not_found(error.name, named_in)
        case errors.AdapterLoadError():
            text = f"adapter {error.name!r}: {without_places(error.reason)}"
            if not may_load:
                text = f"adapter {error.name!r} cannot be loaded; the server's log says why"
            return ApiError(503, text, code="adapter_load_error", retry=error.transient)
        case errors.AdapterError():
            text = f"adapter {error.name!r}: {without_places(error.reason)}"
            return ApiError(400, text, param=named_in, code="adapter_invalid")
    known = next((kind for type_, kind in _KINDS.items() if isinstance(error, type_)), None)
    if known is None:
        logger.error("a request failed unexpectedly", exc_info=error)
        return ApiError(500, "internal error; the server's log says more")
    status, code = known
    named = _NAMED_FIELD.match(str(error)) if isinstance(error, errors.RequestInvalid) else None
    message = "the engine has failed" if isinstance(error, errors.EngineDead) else str(error)
    if isinstance(error, errors.EngineOverloaded) and error.bound is not None:
        message = f"{_OVERLOADED[error.bound]}; try again later"
    return ApiError(status, message, param=named[1] if named else None, code=code, retry=status != 504)


def without_places(text: str) -> str:
    """Remove absolute paths, URLs and names of cloud resources, which clients need not know."""
    return _PLACE.sub("...", text)
