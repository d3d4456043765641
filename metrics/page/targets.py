"""Scrape targets, in the form of Prometheus' HTTP service discovery."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import msgspec

from aioengine.metrics.page.plumbing import Scope

PARAMETER = "replica"
"""Query parameter of ``/metrics`` that names the replica whose metrics are wanted."""


@runtime_checkable
class ManySources(Protocol):
    """Metrics of several processes, which can be asked for one by one."""

    def sources(self) -> list[str]: ...
    def expose(self, accept: str, source: str | None = None) -> tuple[bytes, str]: ...


def scrape_targets(scope: Scope, root: str, metrics: object) -> bytes:
    """Return one target for each source, all at the address of ``scope``'s request, each with a different
    ``instance``; if there is only one source, the application itself. ``root`` is where it is mounted.
    https://prometheus.io/docs/prometheus/latest/http_sd/ describes the form."""
    address = next(
        (value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"host"), ""
    )
    if not address and scope.get("server"):
        host, port = scope["server"]
        address = f"{host}:{port}"
    common = {"__scheme__": scope.get("scheme", "http"), "__metrics_path__": f"{root}/metrics"}
    if isinstance(metrics, ManySources):
        own = [
            {**common, f"__param_{PARAMETER}": source, "instance": f"{address}/{source}"}
            for source in metrics.sources()
        ]
    else:
        own = [common]
    return msgspec.json.encode([{"targets": [address], "labels": labels} for labels in own])
