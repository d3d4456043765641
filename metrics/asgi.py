"""An ASGI application to mount: ``/metrics`` for Prometheus, ``/`` for people.

It is plain ASGI, so it runs in any ASGI server. Every URL of the page is relative, so it works under any
mount path.
"""

from __future__ import annotations

import asyncio
import gzip
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, quote

from prometheus_client.exposition import choose_encoder, gzip_accepted

from aioengine.errors import EngineStopped
from aioengine.metrics.page import plumbing
from aioengine.metrics.page.feed import Feed, WatchedEngine, Watcher
from aioengine.metrics.page.targets import PARAMETER, ManySources, scrape_targets
from aioengine.tasks import end_tasks

UPDATE_SECONDS = 0.2
"""The shortest time between two updates of one page."""
SEND_SECONDS = 30.0
"""Seconds in which a client has to accept 64 KiB of an update, where the server does not watch it; else it is
disconnected. An open page connects again."""
MAX_STREAMS = 100
"""Maximum number of pages that are served at once; one address may have half of what others leave."""

_SECURITY: plumbing.Headers = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}


class MetricsApp:
    """The application that :func:`metrics_app` makes."""

    def __init__(self, engine: WatchedEngine, interval: float) -> None:
        self._engine = engine
        self._feed = Feed(engine, interval)
        self._streams: set[asyncio.Task[None]] = set()
        self._watching_from: Counter[str] = Counter()
        """Pages by their client's address."""
        self._closed = False
        # A separate thread, because the application may keep the loop's threads busy.
        self._rendering = ThreadPoolExecutor(1, thread_name_prefix="aioengine-metrics")
        self._files = {
            path.name: path.read_bytes() for path in (Path(__file__).parent / "page" / "static").iterdir()
        }

    @property
    def watching(self) -> int:
        """Number of connected pages; while it is 0, the feed does not listen to the engine."""
        return len(self._feed.watchers)

    def close(self) -> None:
        """End the event streams, because a server that shuts down would wait for them, and refuse new
        ones."""
        self._closed = True
        for stream in self._streams:
            stream.cancel()

    async def __call__(self, scope: plumbing.Scope, receive: plumbing.Receive, send: plumbing.Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await plumbing.answer_no_http(scope, receive, send, self.close)

    async def _http(self, scope: plumbing.Scope, receive: plumbing.Receive, send: plumbing.Send) -> None:
        path, root = plumbing.below_mount(scope)
        path = path if root else path or "/"
        head = scope["method"] == "HEAD"
        asset = path.removeprefix("/assets/")
        found = path in ("/", "/metrics", "/metrics/targets", "/events") or (
            asset != path and asset in self._files
        )
        if not path:  # mounted, and requested without the final slash that relative URLs need
            to = f"./{quote(root.rsplit('/', 1)[-1])}/".encode()
            await _text(send, 307, "see /", head, [(b"location", to)])
        elif not found:
            await _text(send, 404, "not found", head)
        elif scope["method"] not in ("GET", "HEAD"):
            await _text(send, 405, "method not allowed", head, [(b"allow", b"GET, HEAD")])
        elif path == "/metrics":
            await self._metrics(scope, send, head)
        elif path == "/metrics/targets":
            body = scrape_targets(scope, root, self._engine.metrics)
            headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store"), *_SECURITY]
            await plumbing.respond(send, 200, headers, body, head=head)
        elif path == "/events":
            await self._events(scope, receive, send, head)
        else:
            name = "page.html" if path == "/" else asset
            headers = [(b"content-type", _TYPES[Path(name).suffix]), (b"cache-control", b"no-cache")]
            await plumbing.respond(send, 200, [*headers, *_SECURITY], self._files[name], head=head)

    async def _metrics(self, scope: plumbing.Scope, send: plumbing.Send, head: bool) -> None:
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        names, source = query.get("name[]"), query.get(PARAMETER, [None])[-1]
        accept = _header(scope, b"accept")
        compress = gzip_accepted(_header(scope, b"accept-encoding"))

        def render() -> tuple[bytes, str]:
            metrics = self._engine.metrics
            if source is not None:
                if not isinstance(metrics, ManySources) or source not in metrics.sources():
                    raise LookupError(f"there is no {PARAMETER} {source!r}; /metrics/targets names them")
                text, content_type = metrics.expose(accept, source)
            elif names:
                encode, content_type = choose_encoder(accept)
                text = encode(metrics.registry.restricted_registry(names))
            else:
                text, content_type = metrics.expose(accept)
            return gzip.compress(text, 1) if compress else text, content_type

        try:  # in a thread: only the snapshot is made on this loop, and the text in the thread
            body, content_type = await asyncio.get_running_loop().run_in_executor(self._rendering, render)
        except LookupError as error:
            await _text(send, 404, str(error.args[0]), head)
            return
        except (EngineStopped, TimeoutError) as error:
            await _text(send, 503, str(error), head)
            return
        headers = [(b"content-type", content_type.encode()), (b"vary", b"accept, accept-encoding")]
        if compress:
            headers.append((b"content-encoding", b"gzip"))
        headers = [*headers, (b"cache-control", b"no-store"), *_SECURITY]
        await plumbing.respond(send, 200, headers, body, head=head)

    async def _events(
        self, scope: plumbing.Scope, receive: plumbing.Receive, send: plumbing.Send, head: bool
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        headers.append((b"x-accel-buffering", b"no"))  # nginx would collect the stream otherwise
        start = {"type": "http.response.start", "status": 200, "headers": [*headers, *_SECURITY]}
        if head:
            await send(start)
            await send({"type": "http.response.body", "body": b""})
            return
        client = (scope.get("client") or ("",))[0]
        own = self._watching_from[client]
        if self._closed or own >= max(1, (MAX_STREAMS - (self.watching - own)) // 2):
            await _text(send, 503, "no more streams", head, [(b"retry-after", b"5")])
            return
        loop = asyncio.get_running_loop()
        try:
            watcher = self._feed.watch(loop.time())
        except EngineStopped as error:
            await _text(send, 503, str(error), head)
            return
        gone = loop.create_task(plumbing.disconnected(receive), name="aioengine-page-client")
        self._streams.add(gone)
        self._watching_from[client] += 1
        try:
            await send(start)
            await self._stream(watcher, send, gone)
            if gone.cancelled():  # by close(); the client is still connected
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:
            pass  # it went away in the middle of a message
        finally:
            self._streams.discard(gone)
            self._watching_from[client] -= 1
            if not self._watching_from[client]:
                del self._watching_from[client]
            watcher.close()
            await end_tasks([gone])

    async def _stream(self, watcher: Watcher, send: plumbing.Send, gone: asyncio.Task[None]) -> None:
        """Send updates until the client is gone, or takes longer than ``SEND_SECONDS`` for a part of one."""
        loop = asyncio.get_running_loop()
        while not gone.done():
            changes = watcher.next(loop.time())
            if changes is not None:
                text = await loop.run_in_executor(self._rendering, changes.written)
                body = b"data: " + text + b"\n\n"
                message = {"type": "http.response.body", "body": body, "more_body": True}
                sending = asyncio.ensure_future(send(message))
                parts = 1 + len(body) // plumbing.PART_BYTES
                try:
                    await asyncio.wait(
                        {sending, gone},
                        timeout=SEND_SECONDS * parts,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    if not sending.done():
                        return
                    sending.result()
                finally:
                    await end_tasks([sending])
            await asyncio.wait({gone}, timeout=self._feed.interval)


def metrics_app(engine: WatchedEngine, *, interval: float = UPDATE_SECONDS) -> MetricsApp:
    """Make an ASGI application that shows ``engine`` (an AsyncEngine, started or not yet).

    ``GET /metrics`` is for Prometheus, ``GET /metrics/targets`` for its service discovery, ``GET /`` the
    live page, ``GET /events`` what feeds it. It must
    run on the engine's event loop. ``interval`` is the shortest time in seconds between two updates of
    a page. It has no access control: mount it where only people who may see the adapters' names can reach it.
    """
    return MetricsApp(engine, interval)


def _header(scope: plumbing.Scope, name: bytes) -> str:
    return ",".join(value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name)


async def _text(
    send: plumbing.Send, status: int, text: str, head: bool, headers: plumbing.Headers = ()
) -> None:
    plain = [(b"content-type", b"text/plain; charset=utf-8"), *headers, *_SECURITY]
    await plumbing.respond(send, status, plain, f"{text}\n".encode(), head=head)
