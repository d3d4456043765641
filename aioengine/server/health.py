"""``/health`` for liveness, ``/ready`` for readiness, ``/version``."""

from __future__ import annotations

import msgspec
from litestar import get
from litestar.handlers import HTTPRouteHandler
from litestar.response import Response

from aioengine import __version__
from aioengine.server.context import Context


class Health(msgspec.Struct, omit_defaults=True):
    status: str
    """The engine's state; "degraded" while lost processes are started again; "stuck" if a step has run for
    longer than ``stuck_step_seconds``."""
    cause: str | None = None
    """Name of the error that made it dead or degraded: DeviceOutOfMemory, EngineDead, ..."""


class Version(msgspec.Struct):
    version: str


def _cause(context: Context) -> str | None:
    failure = context.engine.failure
    return None if failure is None else type(failure).__name__


def health_routes(context: Context) -> list[HTTPRouteHandler]:
    @get("/health", summary="200 while the engine works, 503 when it is dead or stuck", sync_to_thread=False)
    def health() -> Response[Health]:
        state = context.engine.state
        if context.stuck:
            return Response(Health("stuck"), status_code=503)
        alive = state not in ("dead", "stopping", "stopped")
        return Response(Health(state, _cause(context)), status_code=200 if alive else 503)

    @get("/ready", summary="200 while requests are accepted, 503 otherwise", sync_to_thread=False)
    def ready() -> Response[Health]:
        state = context.engine.state
        shown = "degraded" if context.engine.degraded else state
        return Response(Health(shown, _cause(context)), status_code=200 if state == "running" else 503)

    @get("/version", summary="The server's version", sync_to_thread=False)
    def version() -> Version:
        return Version(__version__)

    return [health, ready, version]
