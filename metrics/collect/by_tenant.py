"""Metrics of the HTTP server's answers, and of usage by tenant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from aioengine import events
from aioengine.metrics.collect.snapshot import gauge
from aioengine.metrics.families import definitions as d
from aioengine.metrics.families.labels import OTHER, TenantLabels
from aioengine.metrics.families.storage import Counters, Family


class TenantMetrics:
    """Metrics by tenant. A tenant that loses its label is added to "other", so sums over ``tenant`` never go
    down."""

    def __init__(self, max_labels: int) -> None:
        self._labels = TenantLabels(max_labels, self._fold)
        self._requests = Counters(d.TENANT_REQUESTS)
        self._prompt = Counters(d.TENANT_PROMPT_TOKENS)
        self._generation = Counters(d.TENANT_GENERATION_TOKENS)
        self._responses = Counters(d.TENANT_RESPONSES)
        self.metrics = (self._requests, self._prompt, self._generation, self._responses)

    def _fold(self, label: str) -> None:
        for metric in self.metrics:
            metric.fold(label, OTHER)

    def ended(self, event: events.RequestEnded) -> None:
        if event.tenant is None:
            return
        label = self._labels.of(event.tenant)
        self._requests.inc((label, event.reason))
        self._prompt.inc((label,), event.prompt_tokens)
        self._generation.inc((label,), event.output_tokens)

    def responded(self, tenant: str | None, status: int) -> None:
        if tenant is not None:
            self._labels.used(tenant)
        self._responses.inc((self._labels.of(tenant), str(status)))


class Expires(Protocol):
    @property
    def expires(self) -> float:
        """Unix time."""


class HttpMetrics:
    """Counts HTTP answers. The server that serves the engine reports each, on the event loop's thread."""

    def __init__(self, tenants: TenantMetrics) -> None:
        self._tenants = tenants
        self._responses = Counters(d.HTTP_RESPONSES)
        self.active: Callable[[], int] = int
        """Function that counts the requests that have not been answered in full; called at each scrape."""
        self.certificate: Expires | None = None
        """The server's TLS certificate, if it has one."""
        self.loaded: dict[str, Callable[[], bool]] = {}
        """Functions that tell whether the server runs with what a file holds now; by what the file is for."""

    def responded(self, route: str, status: int, code: str | None, tenant: str | None) -> None:
        """Count an answer. ``route`` and ``code`` (of an error) are from fixed sets. ``status`` is 499 if the
        client had gone."""
        self._responses.inc((route, str(status), code or ""))
        self._tenants.responded(tenant, status)

    def families(self, engine: str) -> Iterator[Family]:
        yield self._responses.family(engine)
        yield gauge(engine, d.HTTP_ACTIVE, ((), self.active()))
        expires = [] if self.certificate is None else [((), self.certificate.expires)]
        yield gauge(engine, d.TLS_EXPIRES, *expires)
        yield gauge(engine, d.CONFIG_LOADED, *(((file,), good()) for file, good in self.loaded.items()))
