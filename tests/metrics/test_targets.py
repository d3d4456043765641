"""Prometheus finds out what there is to scrape, and scrapes each of several sources by itself."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import choose_encoder
from support.page_engine import FakeEngine, FakeMetrics, served
from support.prometheus_server import MISSING, prometheus

from aioengine.metrics.asgi import metrics_app


class Several(FakeMetrics):
    """Each source has its number of letters as a gauge."""

    def sources(self) -> list[str]:
        return ["door", "k3x9q"]

    def expose(self, accept: str = "", source: str | None = None) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        registry = CollectorRegistry()
        gauge = Gauge("letters", "Letters of its name.", ["replica"], registry=registry)
        for name in self.sources() if source is None else [source]:
            gauge.labels(name).set(len(name))
        return encode(registry), content_type


async def test_one_engine_is_one_target() -> None:
    transport = httpx.ASGITransport(metrics_app(FakeEngine()))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="https://host:8443") as http:
        answer = await http.get("/metrics/targets")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == [
            {"targets": ["host:8443"], "labels": {"__scheme__": "https", "__metrics_path__": "/metrics"}}
        ]
        answer = await http.get("/metrics?replica=door")
        assert answer.status_code == 404 and "there is no replica 'door'" in answer.text


@pytest.mark.skipif(MISSING, reason="needs prometheus, of Debian's package prometheus")
@pytest.mark.slow
async def test_prometheus_scrapes_each_replica(tmp_path: Path) -> None:
    engine = FakeEngine()
    engine.metrics = Several()
    app = metrics_app(engine)  # type: ignore[arg-type]
    async with served(app, app.close) as url:
        address = url.removeprefix("http://").rstrip("/")
        discovery = [{"url": f"http://{address}/metrics/targets", "refresh_interval": "1s"}]
        async with prometheus(tmp_path, http_sd_configs=discovery) as observer:
            await observer.wait("up", lambda found: [value for _, value in found] == [1, 1])
            assert await observer.by("instance", "up") == {f"{address}/door": 1, f"{address}/k3x9q": 1}
            assert await observer.by("replica", "letters") == {"door": 4, "k3x9q": 5}
            assert len(await observer.query("letters")) == 2, "each comes once"
