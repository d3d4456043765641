"""A trace goes on from a client's span to the steps of the engine, and to a collector."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")

import httpx
from support.otlp_collector import Collector, collector

from aioengine.errors import ConfigError
from aioengine.metrics.otlp import end_tracing, otlp_provider, otlp_wanted
from aioengine.metrics.remote_spans import CallSpans, carried
from aioengine.metrics.tracing import trace_requests
from aioengine.server import ServerSettings, create_app
from aioengine.server.run import ListenSettings, listening

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
VARIABLES = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_SDK_DISABLED",
    "OTEL_SERVICE_NAME",
    "OTEL_TRACES_EXPORTER",
)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sent() -> Iterator[Collector]:
    with collector() as found:
        yield found


async def test_from_traceparent_to_the_step(
    tiny_text: Tiny, make_engine: MakeEngine, sent: Collector
) -> None:
    provider = otlp_provider(sent.url)
    assert provider is not None
    async with make_engine(tiny_text) as engine:
        engine.register_adapter("a", tiny_text.adapters["a"])
        trace_requests(engine, provider)
        app = create_app(engine, ServerSettings(served_model_names=["tiny"]), tracer_provider=provider)
        async with (
            listening(app, ListenSettings(port=0)) as url,
            httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as client,
        ):
            body: dict[str, Any] = {"model": "a", "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}
            assert (await client.get("/health", headers=TRACEPARENT)).status_code == 200
            assert (await client.get("/metrics", headers=TRACEPARENT)).status_code == 200
            await client.post("/v1/completions", json=body, headers=TRACEPARENT)
            streamed = {**body, "stream": True, "n": 2}
            await client.post("/v1/completions", json=streamed, headers=TRACEPARENT)
            bad = await client.post("/v1/completions", json={**body, "model": "nobody"}, headers=TRACEPARENT)
            assert bad.status_code == 404
    await end_tracing(provider, within=30)

    assert sent.paths == {"/v1/traces"} and {span.trace for span in sent.spans} == {TRACE}
    assert {span.resource["service.name"] for span in sent.spans} == {"aioengine"}
    one, several, refused = sent.named("POST /v1/completions")
    assert {one.parent, several.parent, refused.parent} == {CALLER}
    assert one.attributes["http.response.status_code"] == 200 and one.attributes["aioengine.adapter"] == "a"
    assert refused.attributes["error.type"] == "model_not_found" and not refused.failed
    requests = sent.named("aioengine.request")
    assert [span.parent for span in requests] == [one.id, several.id, several.id]
    first = [span for span in sent.spans if span.parent == requests[0].id]
    assert [span.name for span in first] == ["adapter_wait", "queue", "prefill", "decode"]
    prefill, decode = first[2].attributes, first[3].attributes
    assert prefill == {"aioengine.first_step": 1, "aioengine.last_step": 1}
    assert decode["aioengine.last_step"] == 4, "one step for each of its tokens"


def test_a_request_that_moves_is_one_trace(sent: Collector) -> None:
    """What a gateway tells a replica makes the replica's spans part of the gateway's trace."""
    provider = otlp_provider(sent.url, resource={"service.instance.id": "gateway"})
    elsewhere = otlp_provider(sent.url, resource={"service.instance.id": "replica"})
    assert provider is not None and elsewhere is not None
    call = CallSpans(provider, "r", "sql")
    for replica, delivered in (("one", 0), ("two", 3)):
        with carried(call.sent(replica, delivered)):
            elsewhere.get_tracer("replica").start_span(f"on {replica}").end()
        if replica == "one":
            call.lost("silent")
    call.end()
    provider.shutdown()
    elsewhere.shutdown()
    (root,) = sent.named("aioengine.fleet.request")
    lost, last = sent.named("aioengine.fleet.attempt")
    assert lost.failed and not last.failed and not root.failed
    assert last.attributes == {"aioengine.replica": "two", "aioengine.delivered_tokens": 3}
    assert {lost.parent, last.parent} == {root.id}
    assert [sent.named(f"on {name}", root.trace)[0].parent for name in ("one", "two")] == [lost.id, last.id]


async def test_a_collector_that_is_gone_holds_nothing_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    began = time.monotonic()
    provider = otlp_provider(f"http://127.0.0.1:{port}")
    assert provider is not None
    provider.get_tracer("test").start_span("lost").end()
    await end_tracing(provider, within=0.2)
    assert time.monotonic() - began < 5, "its own tries go on for ten seconds"


def test_opentelemetrys_variables_say_whether_and_where(
    sent: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not otlp_wanted(None) and otlp_provider() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", sent.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    provider = otlp_provider()
    assert provider is not None
    provider.get_tracer("test").start_span("by variable").end()
    provider.shutdown()
    assert [span.resource["service.name"] for span in sent.named("by variable")] == ["mine"]
    for name, value in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        with monkeypatch.context() as only:
            only.setenv(name, value)
            assert otlp_provider("http://localhost:4318") is None


def test_what_cannot_be_spoken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="must be the URL of a collector, such as http://localhost:4318"):
        otlp_provider("localhost:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL='grpc': only http/protobuf"):
        otlp_provider("http://localhost:4317")
