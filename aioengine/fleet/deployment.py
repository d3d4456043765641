"""The fleet as a Serve application."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from aioengine.checks import format_bytes
from aioengine.errors import ConfigError
from aioengine.executors.parts import plan_parts
from aioengine.fleet.cluster import TRANSPORT, require_ray
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.replica import EngineReplica
from aioengine.memory_plan import MemoryPlan, available_memory, resolve_device
from aioengine.metrics.otlp import end_tracing, otlp_provider

if TYPE_CHECKING:
    from ray.serve import Application

    from aioengine.model.text.tokenizer import Tokenizer

MAX_STREAMS = 10_000
"""Maximum concurrent calls to a replica: one for each gateway, and short ones."""
START_TRIES = 2
"""How often Serve starts a replica that fails; after that the fleet has failed, and reports the reason."""


def fleet_application(config: FleetConfig) -> Application:
    """Make an application of replicas and a gateway that Serve runs behind its proxy. Raises ConfigError."""
    require_ray()
    from ray import serve

    gateway = serve.deployment(
        serve.ingress()(Gateway),  # its ASGI application is made after its start
        name="Gateway",
        num_replicas=1,
        max_ongoing_requests=MAX_STREAMS,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": dict(TRANSPORT)}},
        logging_config=_quiet(),
    )
    return gateway.bind(
        config, replica_application(msgspec.structs.replace(config, server={}))
    )  # keys are the gateway's


def replica_application(config: FleetConfig, *, inherit: bool = False) -> Any:
    """Make an application of replicas alone, for a gateway in another process. ``inherit``: Ray was started
    with the replicas' variables, so that its worker processes have them already."""
    require_ray()
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from aioengine.fleet.gateway.obey import ROUTER_PATH

    options: dict[str, Any] = {"num_cpus": config.cpus_per_replica}
    if not inherit:
        variables = {**TRANSPORT, "OMP_NUM_THREADS": str(config.cpus_per_replica)}
        options["runtime_env"] = {"env_vars": variables}
    if gpus := config.gpus_per_replica:
        options["num_gpus"] = gpus
    number: dict[str, Any] = {"num_replicas": config.replicas}
    if config.autoscale is not None:
        number = {"autoscaling_config": _autoscaling(config)}
    deployment = serve.deployment(
        EngineReplica,
        name="EngineReplica",
        **number,
        max_ongoing_requests=MAX_STREAMS,
        health_check_period_s=1.0,
        health_check_timeout_s=max(5.0, config.silent_seconds),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=30.0,
        ray_actor_options=options,
        max_constructor_retry_count=START_TRIES * config.bounds[1],
        request_router_config=RequestRouterConfig(request_router_class=ROUTER_PATH),
        logging_config=_quiet(),
    )
    return deployment.bind(config)


def _autoscaling(config: FleetConfig) -> Any:
    """Return Serve's settings of autoscaling. Its delays are 0, because the policy has its own."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    from aioengine.fleet.autoscaling import METRICS_SECONDS, POLICY_PATH

    least, most = config.bounds
    return AutoscalingConfig(
        min_replicas=least,
        initial_replicas=config.replicas,
        max_replicas=most,
        metrics_interval_s=METRICS_SECONDS,
        look_back_period_s=2 * METRICS_SECONDS,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function=POLICY_PATH, policy_kwargs={"spec": config.autoscale}),
    )


def _quiet() -> Any:
    """Turn off Serve's log line for each call, because there would be one for each step."""
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(enable_access_log=False, log_level="WARNING")


def plan_replica(config: FleetConfig, *, share: int | None = None) -> tuple[FleetConfig, MemoryPlan]:
    """Return a replica's memory plan, and the configuration with its KV cache set accordingly.

    ``share``: number of replicas on this machine, each of which gets an equal part of the free memory; None:
    one. Raises ConfigError if it does not fit.
    """
    device = resolve_device(config.engine.device)
    free = available_memory(device)
    if share is not None and share > 1 and device == "cpu":
        plan_parts(config.engine, available_bytes=sys.maxsize)  # finds any other error
        try:
            plan = plan_parts(config.engine, available_bytes=free // share).memory
        except ConfigError as error:
            raise ConfigError(
                f"{share} replicas do not fit into the {format_bytes(free)} that are free; for one: {error}"
            ) from error
    else:
        plan = plan_parts(config.engine).memory
    kv_bytes = plan.num_blocks * plan.block_bytes
    engine = msgspec.structs.replace(config.engine, kv_cache_memory=kv_bytes)
    return msgspec.structs.replace(config, engine=engine), plan


def read_model(
    config: FleetConfig, plan: MemoryPlan | None = None
) -> tuple[MemoryPlan, Path, Tokenizer | None]:
    """Return what a gateway's client takes of the model: a replica's memory plan, the model's path, and its
    tokenizer, which is read. Blocks."""
    from aioengine.model.files.resolve import resolve_model
    from aioengine.model.text.tokenizer import Tokenizer

    path = resolve_model(config.engine.model)
    tokenizer = Tokenizer.load(path, config.engine.chat_template)
    return plan_replica(config)[1] if plan is None else plan, path, tokenizer


class Gateway:
    """The server of ``aioengine serve``, run by Serve: the deployment's class."""

    async def __init__(self, config: FleetConfig, replicas: Any) -> None:  # type: ignore[misc] # Serve awaits it
        from ray import serve

        from aioengine.fleet.gateway.client import FleetClient
        from aioengine.server.app import create_app
        from aioengine.server.settings import settings_from

        settings = settings_from(config.server)
        # The application gets its name when it is run; the replicas are found by that name.
        config = msgspec.structs.replace(config, name=serve.get_replica_context().app_name)
        self._traces = otlp_provider(config.otlp_endpoint)
        model = await asyncio.to_thread(read_model, config)
        self._client = FleetClient(config, replicas, *model, self._traces)
        await self._client.start()
        self._app = create_app(self._client, settings, tracer_provider=self._traces)
        await self._app.context.defaults()

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def __del__(self) -> None:
        if hasattr(self, "_app"):
            self._app.close()
            await self._client.stop()
            if self._traces is not None:
                await end_tracing(self._traces)
