"""Clients that go away, read slowly or do nothing; draining; mounting."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from support.engine_fixtures import MakeEngine, Tiny
from support.raw_http import HEALTH, POST, StubApp, connected
from support.server_fixtures import MODEL, Serve, until

from aioengine import AsyncEngine
from aioengine.errors import ConfigError
from aioengine.events import RequestEnded, StepFinished
from aioengine.server import ServerSettings, create_app
from aioengine.server.run import ListenSettings, bind, listening

LONG = {"model": MODEL, "prompt": "Hello", "max_tokens": 400, "ignore_eos": True}


def steps_until_freed(engine: AsyncEngine) -> list[str]:
    """Filled with the engine's steps and ends of requests as they happen."""
    seen: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, RequestEnded):
            seen.append(event.reason)
        elif isinstance(event, StepFinished):
            seen.append("step")

    engine.add_listener(listen)
    return seen


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.slow
async def test_a_client_that_goes_away_frees_its_blocks(stream: bool, n: int, serve: Serve) -> None:
    async with serve(max_model_len=500) as served:
        seen = steps_until_freed(served.engine)
        async with httpx.AsyncClient(base_url=served.url, trust_env=False) as leaving:
            request = leaving.build_request(
                "POST", "/v1/completions", json={**LONG, "stream": stream, "n": n}
            )
            sending = asyncio.create_task(leaving.send(request, stream=True))
            if stream:
                response = await sending
                await anext(response.aiter_bytes())
            else:
                await until(lambda: served.engine.stats().output_tokens > 0)
                sending.cancel()
        await until(lambda: served.app.active == 0)
        stats = served.engine.stats()
        assert seen.count("abort") == n
        await until(lambda: served.engine.stats().kv_blocks_free == stats.kv_blocks)
        # What was in the batch when the requests ended is freed with that step; none follows.
        assert seen[seen.index("abort") :].count("step") <= 1
        served.engine.check_invariants()


async def test_a_client_that_goes_away_with_requests_in_line(serve: Serve) -> None:
    """It has sent the next ones before the first was answered."""
    async with serve(max_model_len=500) as served:
        seen = steps_until_freed(served.engine)
        body = json.dumps({**LONG, "stream": True}).encode()
        post = POST + b"content-length: %d\r\n\r\n" % len(body) + body
        reader, writer = await connected(served.url, post + post + HEALTH)
        await reader.readuntil(b"data: ")
        writer.transport.abort()
        await until(lambda: "abort" in seen)
        await until(lambda: served.app.active == 0)
        assert seen.count("abort") == 1 and served.engine.stats().running == 0


async def test_mounted_in_another_application(tiny_text: Tiny, make_engine: MakeEngine) -> None:
    async with make_engine(tiny_text) as engine:
        app = Starlette(
            routes=[Mount("/llm", create_app(engine, ServerSettings(served_model_names=[MODEL])))]
        )
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"model": MODEL, "prompt": "Hello", "max_tokens": 3}
            answer = await client.post("/llm/v1/completions", json=body)
            assert answer.json()["usage"]["completion_tokens"] == 3
            streamed = await client.post("/llm/v1/completions", json={**body, "stream": True})
            assert streamed.text.endswith("data: [DONE]\n\n")
            assert (await client.get("/llm/v1/models/tiny")).json()["id"] == MODEL
            assert (await client.get("/llm/metrics")).status_code == 200
            assert (await client.get("/llm/")).status_code == 200
            assert (await client.get("/llm/docs/openapi.json")).json()["servers"] == [{"url": ".."}]
            assert (await client.get("/v1/models")).status_code == 404
        assert engine.state == "running"


def test_a_port_that_another_takes_after_it_was_bound() -> None:
    """Both may bind it; only one can listen on it."""
    with socket.socket() as rival:
        rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        rival.bind(("127.0.0.1", 0))
        rival.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            bind(ListenSettings(port=rival.getsockname()[1]))


async def test_small_parts_of_an_answer_do_not_wait_for_each_other() -> None:
    """asyncio turns Nagle's algorithm off only for sockets that say that they are TCP's."""
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    with bind(ListenSettings(port=0)) as bound:
        async with await asyncio.start_server(connected, sock=bound):
            _, writer = await asyncio.open_connection(*bound.getsockname())
            assert await accepted
            writer.close()


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("cut", [None, 60, -3, -60])
@pytest.mark.slow
async def test_an_offer_of_another_protocol_is_declined(cut: int | None, chunked: bool, serve: Serve) -> None:
    """As Java's client makes it with every request; the body comes all the same."""
    async with serve() as served:
        body = json.dumps({**LONG, "max_tokens": 2}).encode()
        head = (
            POST
            + b"connection: Upgrade, HTTP2-Settings, close\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
        )
        data = head + b"content-length: %d\r\n\r\n" % len(body) + body
        if chunked:
            chunks = b"10\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (body[:16], len(body) - 16, body[16:])
            data = head + b"transfer-encoding: chunked\r\n\r\n" + chunks
        reader, writer = await connected(served.url)
        for part in (data[:cut], data[cut:] if cut is not None else b""):
            writer.write(part)
            await writer.drain()
            await served.http.get("/health")  # so that they come apart
        answer = await asyncio.wait_for(reader.read(), 60)
        assert answer.startswith(b"HTTP/1.1 200") and b'"completion_tokens":2' in answer
        writer.close()


@pytest.mark.parametrize("in_one_piece", [True, False])
async def test_trailers_are_no_headers(in_one_piece: bool) -> None:
    """They come after the checks of the headers, and proxies may pass them on unseen."""
    seen: list[dict[bytes, bytes]] = []

    class App(StubApp):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.append(dict(scope["headers"]))
            while (await receive()).get("more_body"):
                pass
            seen.append(dict(scope["headers"]))
            await super().__call__(scope, receive, send)

    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    body = b"1\r\nx\r\n0\r\nx-forwarded-for: 9.9.9.9\r\nauthorization: Bearer y\r\n\r\n"
    async with listening(cast(Any, App()), ListenSettings(port=0)) as url:
        reader, writer = await connected(url, head + body if in_one_piece else head)
        if not in_one_piece:
            await until(lambda: bool(seen))
            writer.write(body)
        for _ in range(2):  # and the next request of the connection has its own
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
            assert answer.startswith(b"HTTP/1.1 200")
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nauthorization: Bearer z\r\n\r\n")
        writer.close()
    expected = {b"host": b"x", b"transfer-encoding": b"chunked"}
    assert seen[:2] == [expected, expected] and seen[2][b"authorization"] == b"Bearer z"


CHUNKED = b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n"


ENDLESS: list[Any] = [
    b"a: b\r\n" * 30_000,
    b"a: " + b"b" * 200_000,
    b"a" * 200_000,
    CHUNKED + b"0\r\n" + b"a: b\r\n" * 30_000,
    CHUNKED + b"0\r\na: " + b"b" * 200_000,
    CHUNKED + b"1;" + b"x" * 200_000,
]


@pytest.mark.slow
async def test_no_part_of_a_request_grows_for_ever(serve: Serve) -> None:
    """It never comes to its end."""
    async with serve(listen={"header_timeout": 600}, settings={"read_timeout": 600}) as served:
        for rest in ENDLESS:
            reader, writer = await connected(served.url, POST + rest)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)
            assert answer.startswith(b"HTTP/1.1 431")
            writer.close()
