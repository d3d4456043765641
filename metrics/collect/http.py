"""Metrics of the HTTP server's answers, and of usage by tenant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from aioengine import events
from aioengine.metrics.families.definitions import OWN
from aioengine.metrics.families.storage import BoundedLabels, Family, Store, Value, gauge


class Expires(Protocol):
    @property
    def expires(self) -> float:
        """Unix time."""


class HttpMetrics:
    """Counts HTTP answers, and what tenants use. The server that serves the engine reports each answer, on
    the event loop's thread. At most ``max_tenants`` tenants have a label of their own."""

    def __init__(self, max_tenants: int) -> None:
        self._store = Store({n: d for n, d in OWN.items() if n.startswith(("http_", "tenant_"))})
        fold = partial(self._store.fold, "tenant")
        self._tenants = BoundedLabels(max_tenants, fold, nobody="none", kind="tenant")
        self.active: Callable[[], int] = int
        """Function that counts the requests that have not been answered in full; called at each scrape."""
        self.certificate: Expires | None = None
        """The server's TLS certificate, if it has one."""
        self.loaded: dict[str, Callable[[], bool]] = {}
        """Functions that tell whether the server runs with what a file holds now; by what the file is for."""

    def responded(self, route: str, status: int, code: str | None, tenant: str | None) -> None:
        """Count an answer. ``route`` and ``code`` (of an error) are from fixed sets. ``status`` is 499 if the
        client had gone."""
        if tenant is not None:
            self._tenants.used(tenant)
        self._store.inc("http_responses", (route, str(status), code or ""))
        self._store.inc("tenant_http_responses", (self._tenants.of(tenant), str(status)))

    def ended(self, tenant: str, event: events.RequestEnded) -> None:
        """Count a tenant's request."""
        label = self._tenants.of(tenant)
        self._store.inc("tenant_requests", (label, event.reason))
        self._store.inc("tenant_prompt_tokens", (label,), event.prompt_tokens)
        self._store.inc("tenant_generation_tokens", (label,), event.output_tokens)

    def families(self, engine: str) -> Iterator[Family]:
        yield from self._store.families(engine)
        yield gauge(engine, "http_requests_active", self.active())
        expires: Value = {} if self.certificate is None else {(): self.certificate.expires}
        yield gauge(engine, "tls_certificate_expiry_seconds", expires)
        loaded: Value = {(file,): good() for file, good in self.loaded.items()}
        yield gauge(engine, "config_last_reload_successful", loaded)
