"""The access log: one line for each request."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from operator import attrgetter

import msgspec

from aioengine.errors import AioEngineError
from aioengine.server.access.clients import Admission, Identity
from aioengine.server.errors import ApiError, to_api_error

logger = logging.getLogger("aioengine.server.access")
_LONGEST_LIST = 500
"""Characters of a list whose items a client has chosen, in a header and in a line of the log."""


class RequestRecord(msgspec.Struct, kw_only=True, eq=False):
    """Record of one request, filled in while it is handled. Holds neither prompts, answers nor keys."""

    request_id: str
    method: str
    path: str
    status: int = 0
    """499: the client went away before the answer was complete."""
    tenant: str | None = None
    adapter: str | None = None
    stream: bool = False
    trace_id: str | None = None
    """Trace id of its span, where requests are traced."""
    completion_id: str | None = None
    """The answer's id, which is the engine's request id too unless the client has chosen it."""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    ttft: float | None = None
    """Seconds from arrival to the first token."""
    finish_reason: str | None = None
    not_enforced: str | None = None
    """Requirements of the answer's JSON schema that are not enforced."""
    error: str | None = None
    param: str | None = None
    """The field that caused a refusal."""
    reason: str | None = None
    """Why the request was refused, as the client was told, in at most 200 characters."""
    seconds: float = 0.0

    # What the log does not have
    started: float = msgspec.field(default_factory=time.perf_counter)
    owner: str | None = None
    """The owner whose shares it counts on: the tenant or, without keys, the client's address."""
    named_in: str = "model"
    """The field of its body that names the adapters."""
    identity: Identity = Identity()
    admission: Admission | None = None
    """Set if its key has limits."""
    body_size: int = 0
    """Bytes of its JSON, by which its work on long texts is shared out."""
    route: str = "other"
    """The route, as named in the metrics."""
    so_far: Callable[[], int] = int
    """Returns the number of the answer's tokens so far."""
    counted: bool = False
    """Whether it was refused for its key: such requests are counted and logged together."""

    def may_use(self, adapter: str | None) -> bool:
        """Whether its key may use an adapter of this name; None: the base model."""
        models = self.identity.models
        return models is None or models.allow(adapter)

    def refused_by(self, error: BaseException, reword: Callable[[str], str] | None) -> ApiError:
        """Note and return the client's error that an exception becomes; ``reword`` rewrites the engine's
        messages."""
        found = to_api_error(error, self.named_in, may_load="adapters" in self.identity.scopes)
        detail = found.detail
        if reword is not None and isinstance(error, AioEngineError):
            detail.message = reword(detail.message)
        self.error = detail.code or detail.type
        self.param = None if detail.param is None else detail.param[:100]
        self.reason = detail.message[:200]
        return found

    def left_out(self, requirements: Iterable[str]) -> None:
        """Note what of the answer's schema is not enforced; of a long list its beginning."""
        text = ", ".join(requirements)
        if len(text) > _LONGEST_LIST:
            text = f"{text[:_LONGEST_LIST].rpartition(', ')[0]}, ..."
        self.not_enforced = text or None


_LOGGED = RequestRecord.__struct_fields__[: RequestRecord.__struct_fields__.index("started")]
_logged = attrgetter(*_LOGGED)


def log_request(record: RequestRecord, *, quiet: bool = False) -> None:
    """Log it at level INFO; ``quiet`` (probes, scrapes, refusals that are counted): DEBUG. The record's
    fields are in the log record's ``fields``."""
    level = logging.DEBUG if quiet else logging.INFO
    if not logger.isEnabledFor(level):
        return
    record.seconds = time.perf_counter() - record.started
    fields = {
        name: round(value, 6) if type(value) is float else value
        for name, value in zip(_LOGGED, _logged(record), strict=True)
        if value is not None and value is not False
    }
    line = [record.method, _plain(record.path), str(record.status)]
    line += [f"{k}={_plain(v)}" for k, v in fields.items() if k not in ("method", "path", "status")]
    # Not Logger.log, which looks for the caller's place each time.
    name, text = logger.name, " ".join(line)
    made = logger.makeRecord(name, level, __file__, 0, "%s", (text,), None, extra={"fields": fields})
    logger.handle(made)


def _plain(value: object) -> str:
    """Return the value as one word on one line, whatever a client has put into it."""
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)
