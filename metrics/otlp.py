"""Sending spans to an OpenTelemetry collector (extra ``otel``)."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aioengine.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger("aioengine")

FLUSH_SECONDS = 3.0
"""Maximum seconds to send the last spans, because the collector may be gone."""
SERVICE_NAME = "aioengine"
PROTOCOL = "http/protobuf"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_TRACES_PATH = "/v1/traces"


def check_endpoint(endpoint: str) -> None:
    """Raise ConfigError unless ``endpoint`` is an http or https URL."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"otlp_endpoint={endpoint!r}: must be the URL of a collector, such as http://localhost:4318"
        )


def otlp_wanted(endpoint: str | None) -> bool:
    """Whether spans are to be sent: ``endpoint`` is given, or one of OpenTelemetry's variables names one and
    none of them turns traces off."""
    for name, off in (("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")):
        if os.environ.get(name, "").strip().lower() == off:
            return False
    return endpoint is not None or any(os.environ.get(name) for name in _ENDPOINTS)


def otlp_provider(
    endpoint: str | None = None, *, resource: dict[str, str] | None = None
) -> TracerProvider | None:
    """Make a provider that sends spans to a collector over HTTP, in batches from a thread; None if none are
    wanted. At the end the caller must call :func:`end_tracing`.

    Args:
        endpoint: The collector's URL; the path ``/v1/traces`` is added if it has none. None: the one that
            ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`` or ``OTEL_EXPORTER_OTLP_ENDPOINT`` names. OpenTelemetry's
            other variables (headers, certificates, sampler, sizes of batches, resource) have their effect.
        resource: Attributes of the sender; ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` override
            them.

    Raises:
        ConfigError: The URL is not valid, the protocol is not HTTP, or the packages are missing.
    """
    if not otlp_wanted(endpoint):
        return None
    for name in _PROTOCOLS:
        if os.environ.get(name, PROTOCOL) != PROTOCOL:
            raise ConfigError(
                f"{name}={os.environ[name]!r}: only {PROTOCOL} is supported, usually on port 4318"
            )
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"traces need more packages: pip install 'aioengine[otel]' ({error})") from error
    if endpoint is not None:
        check_endpoint(endpoint)
        if urlsplit(endpoint).path in ("", "/"):
            endpoint = endpoint.rstrip("/") + _TRACES_PATH
    own = Resource.create({"service.name": SERVICE_NAME, **(resource or {})})
    named = OTELResourceDetector().detect()  # by OpenTelemetry's variables, which have precedence
    made = TracerProvider(resource=own.merge(named), shutdown_on_exit=False)
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return made


async def end_tracing(provider: TracerProvider, within: float = FLUSH_SECONDS) -> None:
    """Send the remaining spans, for at most ``within`` seconds."""
    loop, sent = asyncio.get_running_loop(), asyncio.Event()

    def end() -> None:
        provider.shutdown()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(sent.set)

    # A daemon thread, because the exporter's retries cannot be stopped early.
    threading.Thread(target=end, name="aioengine-last-spans", daemon=True).start()
    try:
        async with asyncio.timeout(within):
            await sent.wait()
    except TimeoutError:
        logger.warning("the last spans could not be sent within %g s", within)
