"""``/debug/...``: open requests, adapters, and where every thread and task stands. Needs the scope admin."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import time
import traceback
from typing import Any

import msgspec
from litestar import Request, get
from litestar.handlers import HTTPRouteHandler
from litestar.response import Response

from aioengine.info import AdapterInfo, EngineStats
from aioengine.server.access_log import RequestRecord
from aioengine.server.context import Context
from aioengine.server.framework import listing, record_of

MOST_TASKS = 1000
"""Maximum number of tasks whose stacks are written; more would delay the loop."""


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


def debug_routes(context: Context) -> list[HTTPRouteHandler]:
    engine = context.engine
    made = time.monotonic()

    @get("/debug/requests", include_in_schema=False)
    async def requests(request: Request[Any, Any, Any]) -> Response[Now]:
        found = list(context.open_requests)
        now = Now(
            time=time.time(),
            uptime=time.monotonic() - made,
            state="degraded" if engine.degraded else engine.state,
            model=context.model_names[0],
            step_age=engine.step_age(),
            stats=engine.stats(),
            requests=[],
        )

        def described() -> Now:
            now.requests = sorted(map(_open, found), key=lambda request: -request.seconds)
            return now

        return await listing(context, record_of(request), found, described)

    @get("/debug/adapters", include_in_schema=False)
    async def adapters(request: Request[Any, Any, Any]) -> Response[list[AdapterInfo]]:
        found = engine.adapters()
        return await listing(context, record_of(request), found, lambda: found)

    @get("/debug/stacks", include_in_schema=False, sync_to_thread=False, media_type="text/plain")
    def stacks() -> str:
        return _stacks()

    return [requests, adapters, stacks]


def _open(record: RequestRecord) -> OpenRequest:
    return OpenRequest(
        request_id=record.request_id,
        route=record.route,
        seconds=round(time.perf_counter() - record.started, 3),
        tenant=record.tenant,
        adapter=record.adapter,
        stream=record.stream,
        prompt_tokens=record.prompt_tokens,
        output_tokens=record.so_far(),
        status=record.status,
    )


def _stacks() -> str:
    """Return the stacks of all threads, and of all tasks of this loop."""
    text = io.StringIO()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        print(f"thread {names.get(ident, ident)}", file=text)
        traceback.print_stack(frame, file=text)
        print(file=text)
    tasks = sorted(asyncio.all_tasks(), key=lambda task: task.get_name())
    for task in tasks[:MOST_TASKS]:
        print(f"task {task.get_name()}", file=text)
        task.print_stack(file=text)
        print(file=text)
    if len(tasks) > MOST_TASKS:
        print(f"and {len(tasks) - MOST_TASKS} more tasks", file=text)
    return text.getvalue()
