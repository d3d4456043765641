"""``aioengine serve``: an engine behind an OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from aioengine.checks import format_bytes
from aioengine.cli.config.checked import Checked, FleetFlags, ServerFlags, check_all, is_loopback
from aioengine.cli.config.reload import Reloader
from aioengine.cli.config.sources import LogLevel, ParseAgain
from aioengine.cli.flags import EngineFlags, RecordFlags
from aioengine.cli.fleet.started import started_fleet
from aioengine.cli.loop import run
from aioengine.cli.process import EXIT_FAILED, process
from aioengine.cli.progress import started
from aioengine.cli.serving.background import BackgroundHandler
from aioengine.cli.serving.log import configure_logging
from aioengine.engine import AsyncEngine
from aioengine.errors import ConfigError
from aioengine.fleet.gateway.client import FleetClient
from aioengine.metrics.otlp import end_tracing, otlp_provider
from aioengine.server.transport.tls import expiry

EXPIRES_SOON_SECONDS = 14 * 24 * 3600.0
"""The log warns at the start if the TLS certificate expires within this time."""
logger = logging.getLogger("aioengine.server")


def serve(
    *,
    server: ServerFlags = ServerFlags(),
    engine: EngineFlags = EngineFlags(),
    recording: RecordFlags = RecordFlags(),
    fleet: FleetFlags = FleetFlags(),
    parse_again: ParseAgain = None,
    log_level: LogLevel = None,
) -> int:
    """Serve a model and its adapters over an OpenAI-compatible HTTP API.

    "model" in a request is the name of the base model or of an adapter. SIGTERM lets accepted requests
    finish; a second SIGTERM ends them. With --adapter-root, adapters can be loaded over HTTP.
    """
    checked = check_all(server, engine, fleet)
    if checked.replicas is not None and recording.record is not None:
        raise ConfigError("--record: records one engine's requests; remove --replicas, or --record")

    def read_again() -> Checked:
        found: dict[str, Any] = {} if parse_again is None else parse_again()
        return check_all(**{name: found[name] for name in ("server", "engine", "fleet") if name in found})

    log = BackgroundHandler()
    configure_logging(checked.flags.log_format, log_level or "info", log)
    try:
        return run(_serve(checked, recording.record, log, Reloader(checked, read_again)))
    finally:
        log.close()


async def _serve(checked: Checked, record: Path | None, log: BackgroundHandler, reloader: Reloader) -> int:
    from aioengine.cli.serving.lifetime import serve_to_the_end
    from aioengine.server.app import Entrance, create_app
    from aioengine.server.run import Signals, listening

    config, replicas, flags = checked.config, checked.replicas, checked.flags
    signals = Signals()
    # Before the model is loaded, so that a port in use is reported, and probes are answered.
    entrance = Entrance(config.name)
    async with contextlib.AsyncExitStack() as after_engine, contextlib.AsyncExitStack() as ending:
        instance = f"{platform.node()}-{os.getpid()}"
        resource = {"service.instance.id": instance, "aioengine.engine": config.name}
        traces = otlp_provider(flags.otlp_endpoint, resource=resource)
        if traces is not None:
            logger.info("requests are traced, and their spans are sent by OTLP over HTTP")
            after_engine.push_async_callback(end_tracing, traces)
        ending.enter_context(signals.handled(signal.SIGHUP))
        if process.hung_up:
            signals.reload.set()
        url = await ending.enter_async_context(listening(entrance, checked.listen))
        opened: contextlib.AbstractAsyncContextManager[AsyncEngine | FleetClient]
        if replicas is None:
            opened = started(config, checked.adapters, also=entrance.progress, record=record)
        else:
            opened = started_fleet(replicas, entrance.progress, traces)
        async with opened as client:
            if isinstance(client, AsyncEngine) and traces is not None:
                from aioengine.metrics.tracing import trace_requests  # imports opentelemetry

                trace_requests(client, traces)
            client.metrics.dropped_log_lines = lambda: log.dropped
            client.metrics.export_process()
            if checked.listen.tls is not None:
                client.metrics.http.certificate = checked.listen.tls
            client.metrics.http.loaded["config"] = lambda: reloader.good
            app = create_app(client, checked.settings, tracer_provider=traces)
            await app.context.defaults()
            app.open()
            entrance.app = app
            gc.collect()
            gc.freeze()  # a full collection would visit all of it, in 130 ms in which nobody is answered
            try:
                _log_start(url, checked)
                if isinstance(client, AsyncEngine):
                    _log_engine(client)
                with signals.handled(signal.SIGTERM, signal.SIGINT):
                    finished = await serve_to_the_end(client, app, signals, flags, reloader)
                dead = client.state == "dead"
                if not finished:  # so that each stream that is cut off ends with an error event
                    await client.stop()
            finally:
                await ending.aclose()  # connections end before the engine
    logger.info("stopped")
    if dead:
        logger.error("the engine had failed before")
    return 0 if finished and not dead else EXIT_FAILED


def _log_start(url: str, checked: Checked) -> None:
    settings, host, certificate = checked.settings, checked.flags.host, checked.listen.tls
    logger.info(
        "serving at %s (API: %s/v1, page: %s/, description: %s/docs/openapi.json)", url, url, url, url
    )
    if not settings.api_keys and settings.keys_file is None and not is_loopback(host):
        logger.warning("anybody who reaches %s may use this server: there are no API keys", host)
    if certificate is not None and certificate.expires < time.time() + EXPIRES_SOON_SECONDS:
        logger.warning("%s; renew it, and send SIGHUP", expiry(certificate.expires))


def _log_engine(engine: AsyncEngine) -> None:
    """Log everything that determines the speed of this server: the model, the kernels, memory and limits."""
    threads = os.cpu_count()
    if "torch" in sys.modules:  # not imported just for this, because that takes seconds
        from aioengine.model.parallel.group import rank_threads

        threads = rank_threads(1)
    config, plan = engine.config, engine.plan
    fields: dict[str, object] = {
        "model": engine.model_name,
        **msgspec.structs.asdict(engine.info),
        "device": plan.device,
        "dtype": plan.dtype,
        "threads": threads,
        "executor": config.executor,
        "tensor_parallel_size": config.tensor_parallel_size,
        "policy": config.policy if isinstance(config.policy, str) else type(config.policy).__name__,
        "slots": plan.num_slots,
        "cpu_adapters": 0 if config.lora is None else config.lora.cpu_capacity,
        "kv_tokens": plan.num_blocks * plan.block_size,
        "kv_memory": format_bytes(plan.num_blocks * plan.block_bytes),
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_model_len": plan.max_model_len,
        "prefix_caching": config.enable_prefix_caching,
    }
    line = " ".join(f"{name}={value}" for name, value in fields.items())
    logger.info("engine: %s", line, extra={"data": fields})
