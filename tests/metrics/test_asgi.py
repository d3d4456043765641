"""The metrics application at the level of ASGI: what it answers to plain requests, and where."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy, make_engine, prompt_of, tiny, tiny_of  # noqa: F401
from support.page_engine import Client, FakeEngine, scope, serve_page

from aioengine.metrics.asgi import MetricsApp, metrics_app


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def app(engine: FakeEngine) -> MetricsApp:
    return metrics_app(engine)  # type: ignore[arg-type]


@pytest.fixture
async def http(app: MetricsApp) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
        yield client


async def test_metrics_in_both_formats(http: httpx.AsyncClient) -> None:
    plain = await http.get("/metrics", headers={"accept-encoding": "identity"})
    assert plain.status_code == 200 and plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "one 1.0" in plain.text and "# EOF" not in plain.text and "content-encoding" not in plain.headers
    accept = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    openmetrics = await http.get("/metrics", headers={"accept": accept})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert openmetrics.text.endswith("# EOF\n")
    some = await http.get("/metrics?name[]=two")
    assert "two 2.0" in some.text and "one" not in some.text


async def test_one_engine_is_one_target(http: httpx.AsyncClient) -> None:
    answer = await http.get("/metrics/targets")
    assert answer.headers["content-type"] == "application/json"
    labels = {"__scheme__": "http", "__metrics_path__": "/metrics"}
    assert answer.json() == [{"targets": ["engine"], "labels": labels}]
    answer = await http.get("/metrics?replica=door")
    assert answer.status_code == 404 and "there is no replica 'door'" in answer.text


async def test_metrics_compressed(app: MetricsApp) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asked = scope("/metrics", headers=[(b"accept-encoding", b"deflate, gzip;q=0.9")])
    await app(asked, Client().receive, send)
    headers = dict(sent[0]["headers"])
    assert (
        headers[b"content-encoding"] == b"gzip"
        and headers[b"content-length"] == str(len(sent[1]["body"])).encode()
    )
    assert b"one 1.0" in gzip.decompress(sent[1]["body"])


async def test_page_and_everything_that_it_needs(http: httpx.AsyncClient) -> None:
    page = await http.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    assert "'unsafe" not in page.headers["content-security-policy"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name, kind in {
        "page.css": "text/css",
        "page.js": "text/javascript",
        "icon.svg": "image/svg+xml",
    }.items():
        assert f'"assets/{name}"' in page.text  # relative: it works under any mount path
        asset = await http.get(f"/assets/{name}")
        assert asset.status_code == 200 and asset.headers["content-type"].startswith(kind)
        assert asset.headers["x-content-type-options"] == "nosniff"
    assert "//" not in page.text.replace("http://www.w3.org", "")  # nothing from elsewhere


@pytest.mark.parametrize(
    "path", ["/nothing", "/assets/", "/assets/../asgi.py", "/page.js", "/metrics/", "//"]
)
async def test_not_found(app: MetricsApp, path: str) -> None:
    client = Client()
    await app(scope(path), client.receive, client.send)
    assert (await client.sent.get())["status"] == 404


@pytest.mark.parametrize("path", ["/", "/metrics", "/events", "/assets/page.js"])
async def test_methods(http: httpx.AsyncClient, app: MetricsApp, engine: FakeEngine, path: str) -> None:
    for method in ("POST", "PUT", "DELETE"):
        refused = await http.request(method, path)
        assert refused.status_code == 405 and refused.headers["allow"] == "GET, HEAD"
    client = Client()
    await app(scope(path, "HEAD"), client.receive, client.send)
    start, body = client.sent.get_nowait(), client.sent.get_nowait()
    assert start["status"] == 200 and body["body"] == b""
    assert not engine.listeners and not engine.asked
    if path != "/events":
        identity = {"accept-encoding": "identity"}
        head, full = [await http.request(m, path, headers=identity) for m in ("HEAD", "GET")]
        assert head.headers == full.headers and int(head.headers["content-length"]) == len(full.content)


@pytest.mark.parametrize("whole", [True, False], ids=["path with mount", "path without"])
async def test_mounted(app: MetricsApp, whole: bool) -> None:
    for path, status in {"/": 200, "/metrics": 200, "/assets/page.css": 200, "/x": 404}.items():
        client = Client()
        full = f"/a/b{path}" if whole else path
        await app(scope(full, root_path="/a/b"), client.receive, client.send)
        assert (await client.sent.get())["status"] == status, full


async def test_mounted_without_final_slash_leads_to_it(app: MetricsApp) -> None:
    client = Client()
    await app(scope("/a/the page", root_path="/a/the page"), client.receive, client.send)
    answer = await client.sent.get()
    assert answer["status"] == 307 and dict(answer["headers"])[b"location"] == b"./the%20page/"


async def test_engine_that_is_not_started(make_engine: MakeEngine, tiny: Tiny) -> None:  # noqa: F811
    waiting = metrics_app(make_engine(tiny))
    for path in ("/metrics", "/events"):
        client = Client()
        await waiting(scope(path), client.receive, client.send)
        assert (await client.sent.get())["status"] == 503
    assert waiting.watching == 0


async def test_lifespan_and_websocket(app: MetricsApp) -> None:
    asked = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    client = Client()

    async def receive() -> Any:
        return next(asked)

    await app({"type": "lifespan"}, receive, client.send)
    said = [client.sent.get_nowait()["type"] for _ in range(2)]
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]

    async def connect() -> Any:
        return {"type": "websocket.connect"}

    await app({"type": "websocket", "path": "/events"}, connect, client.send)
    assert client.sent.get_nowait()["type"] == "websocket.close"


async def test_served_by_uvicorn(make_engine: MakeEngine, tiny: Tiny) -> None:  # noqa: F811
    pytest.importorskip("uvicorn", reason="uvicorn (extra server) is not installed")
    async with make_engine(tiny) as real:
        real.register_adapter("qv-only", tiny.adapters["qv-only"])
        before = asyncio.all_tasks()
        async with (
            asyncio.timeout(60),
            serve_page(real, port=0) as url,
            httpx.AsyncClient(base_url=url) as http,
            http.stream("GET", "events") as stream,
        ):
            lines = stream.aiter_lines()
            kinds: list[str] = []
            await real.complete(prompt_of(1, 5), greedy(3), adapter="qv-only")
            while "placed" not in kinds:
                line = await anext(lines)
                if line:
                    kinds += [e["kind"] for e in json.loads(line.removeprefix("data: ")).get("log", [])]
            assert kinds == ["loading", "loaded", "placing", "placed"]
            text = (await http.get("metrics")).text
            assert "aioengine_lora_swaps_total{" in text
        assert asyncio.all_tasks() == before
