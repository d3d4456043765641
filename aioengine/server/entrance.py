"""The application of a server whose engine is still starting."""

from __future__ import annotations

import msgspec

from aioengine.metrics.page.plumbing import Receive, Scope, Send, respond
from aioengine.metrics.starting import starting_metrics
from aioengine.server.app import ServerApp
from aioengine.server.errors import ApiError

_JSON = [(b"content-type", b"application/json")]


class Entrance:
    """Answers while the engine starts, and passes requests to ``app`` once it is opened.

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

    def open(self, app: ServerApp) -> None:
        """Pass all requests to ``app`` from now on."""
        app.open()
        self.app = app

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
            await respond(send, status, _JSON, msgspec.json.encode({"status": "starting", **self._stage}))
        elif scope["path"] == "/metrics":  # without a key: it says what the probes say
            kind, body = starting_metrics(self._engine_name)
            await respond(send, 200, [(b"content-type", kind.encode())], body)
        else:
            text = "the engine is still starting: see /ready"
            error = ApiError(503, text, code="starting", retry_after=2, close=True)
            await respond(send, error.status, error.headers, error.body_for(scope["path"]))
