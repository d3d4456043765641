"""What the server says of itself: its models, its state for probes, and its insides for administrators."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

import msgspec
from starlette.types import ASGIApp

from aioengine import __version__
from aioengine.info import AdapterInfo, EngineStats
from aioengine.server.access_log import RequestRecord
from aioengine.server.context import Call, Sent, listing, sent
from aioengine.server.errors import model_not_found


class Health(msgspec.Struct, omit_defaults=True):
    status: str
    """The engine's state; "degraded" while lost processes are started again; "stuck" if a step has run for
    longer than ``stuck_step_seconds``."""
    cause: str | None = None
    """Name of the error that made it dead or degraded: DeviceOutOfMemory, EngineDead, ..."""


async def health(call: Call) -> Annotated[Sent, Health]:
    """200 while the engine works, 503 when it is dead or stuck."""
    state = "stuck" if call.context.stuck else call.context.engine.state
    return _state(call, state, is_good=state not in ("stuck", "dead", "stopping", "stopped"))


async def ready(call: Call) -> Annotated[Sent, Health]:
    """200 while requests are accepted, 503 otherwise."""
    engine = call.context.engine
    return _state(call, "degraded" if engine.degraded else engine.state, is_good=engine.state == "running")


def _state(call: Call, state: str, *, is_good: bool) -> Sent:
    failure = call.context.engine.failure
    cause = None if failure is None else type(failure).__name__
    return sent(Health(state, cause))._replace(status=200 if is_good else 503)


class Version(msgspec.Struct):
    version: str


async def version(call: Call) -> Version:
    """The server's version."""
    return Version(__version__)


class ModelCard(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    """Seconds since 1970."""
    owned_by: str = "aioengine"
    root: str
    """Name; for keys with the scope "admin" the place that it was loaded from."""
    parent: str | None = None
    """An adapter's base model."""
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def _cards(call: Call, adapters: Iterable[AdapterInfo]) -> Iterator[ModelCard]:
    """Yield the names of the base model, and those of ``adapters`` that the key may use."""
    context, record = call.context, call.record
    base, place = context.model_names[0], context.engine.config.model
    found: list[tuple[str, str, str | None]] = []
    if record.may_use(None):
        found += [(name, place, None) for name in context.model_names]
    found += [(info.name, info.path, base) for info in adapters if record.may_use(info.name)]
    shows_paths, created, most = "admin" in record.identity.scopes, context.created, context.max_model_len
    for name, path, parent in found:
        root = path if shows_paths else name
        yield ModelCard(id=name, created=created, root=root, parent=parent, max_model_len=most)


async def models(call: Call) -> Annotated[Sent, ModelList]:
    """The base model and the adapters."""
    adapters = call.context.engine.adapters()
    return await listing(call, adapters, lambda: ModelList(data=list(_cards(call, adapters))))


async def model(call: Call) -> ModelCard:
    """One of them."""
    name: str = call.scope["path_params"]["model"]
    found = call.context.engine.find_adapter(name)
    for card in _cards(call, () if found is None else (found,)):
        if card.id == name:
            return card
    raise model_not_found(name)


class OpenRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An open request."""

    request_id: str
    route: str
    seconds: float
    """Since its arrival."""
    tenant: str | None = None
    adapter: str | None = None
    stream: bool = False
    prompt_tokens: int | None = None
    output_tokens: int = 0
    status: int = 0
    """HTTP status; 0 if nothing has been sent yet."""


def _open_request(record: RequestRecord) -> OpenRequest:
    fields = {name: getattr(record, name) for name in OpenRequest.__struct_fields__}
    fields["seconds"] = round(time.perf_counter() - record.started, 3)
    fields["output_tokens"] = record.so_far()
    return OpenRequest(**fields)


class Now(msgspec.Struct, kw_only=True):
    """The server at one moment."""

    time: float
    """Unix time."""
    uptime: float
    """Seconds since the server was made, by a clock that never jumps."""
    state: str
    model: str
    step_age: float
    """Seconds since the running step began; 0 if none runs."""
    stats: EngineStats
    requests: list[OpenRequest]
    """The oldest first."""


async def debug_requests(call: Call) -> Annotated[Sent, Now]:
    """Open requests, and the engine's state."""
    context, engine = call.context, call.context.engine
    found = list(context.open_requests)
    now = Now(
        time=time.time(),
        uptime=time.monotonic() - context.made,
        state="degraded" if engine.degraded else engine.state,
        model=context.model_names[0],
        step_age=engine.step_age(),
        stats=engine.stats(),
        requests=[],
    )

    def described() -> Now:
        now.requests = sorted(map(_open_request, found), key=lambda request: -request.seconds)
        return now

    return await listing(call, found, described)


async def openapi(call: Call) -> Annotated[Sent, dict[str, Any]]:
    """The description of the API."""
    return Sent(await call.context.document.result())


async def page(call: Call) -> ASGIApp:
    """Metrics, and the live page."""

    # Not in the scope in which the route was found: the page's own URLs are below the mount point.
    return lambda scope, receive, send: call.context.page(scope["state"]["outer"], receive, send)
