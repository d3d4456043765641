"""Finds, starts or joins Ray for a fleet, and ends it without leaving processes behind."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
import uuid
from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import msgspec

from aioengine.errors import ConfigError
from aioengine.executors.ray.address import CONNECT_SECONDS, INSTALL, check_installed
from aioengine.executors.ray.address import address as address
from aioengine.executors.ray.address import check_address as check_address
from aioengine.executors.ray.address import first_line as first_line
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.registry import NAMESPACE, config_error_in, registry_actor

logger = logging.getLogger("aioengine.fleet")

TRANSPORT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "5000",
}
"""Variables that Serve reads when it is imported, the same in all processes of a fleet. With them, calls use
gRPC and run on the event loops of the gateway and the replica, and Serve's own metrics, which count calls to
replicas, do not wake these loops ten times a second."""
_LOCAL = {
    "RAY_worker_niceness": "0",  # with Ray's default, workers starve beside other programs
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Ray's settings where it is started here. Without the memory monitor, because when the machine's memory is
95% full, by whatever program, it ends all replicas at once, and Serve's controller and the registry with
them. A replica's memory is planned before it starts, and does not grow much."""
ANSWER_SECONDS = 120.0
"""How long the registry's answer to a new gateway may take. The first one waits for the start of its process,
on whatever machine, and for its checkpoint."""
HANGS_SECONDS = 20.0
"""How long the end of Ray may take until its head counts as hung."""
JOINING: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
"""How Ray is started or joined."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Memory of Ray's object store, which is hardly used."""


def require_ray() -> None:
    """Raise ConfigError, with the command that installs it, if Ray is missing or has another version."""
    check_installed("a fleet")
    # Not find_spec("ray.serve"), because that imports ray, which reads the environment at import.
    if importlib.util.find_spec("starlette") is None:
        raise ConfigError(f"a fleet needs Ray Serve, which is not installed: {INSTALL}")


def check_resources(config: FleetConfig, there: Mapping[str, float] | None = None) -> None:
    """Raise ConfigError if the replicas need more CPUs or GPUs than a cluster has ``there``; None: more CPUs
    than this machine has."""
    where, way_out = "the Ray cluster", "add nodes"
    if there is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        there, where, way_out = {"CPU": cpus, "GPU": inf}, "this machine", "join a cluster (RAY_ADDRESS)"
    most, gpus = config.bounds[1], config.gpus_per_replica
    for kind, each, why, todo in (
        ("CPU", config.cpus_per_replica, f"cpus_per_replica={config.cpus_per_replica}", ""),
        ("GPU", gpus, f"{gpus} for each", ", set device='cpu'"),
    ):
        if most * each > (found := there.get(kind, 0)):
            raise ConfigError(
                f"replicas={most}: {most * each} {kind}s are needed ({why}), but {where} has {found:g}; "
                f"lower replicas{todo}, or {way_out}"
            )


def current_address() -> str:
    """Return the address of the cluster that this process has joined, in the form of ``RAY_ADDRESS``."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


class Cluster:
    """A connection to Ray. ``own``: this process has started Ray, and ends it."""

    def __init__(self, own: bool) -> None:
        self.own = own

    def close(self) -> None:
        """End the connection, and also Ray and all its processes, if this process has started it."""
        import ray

        late = threading.Timer(HANGS_SECONDS, self._kill_head)
        late.daemon = True
        late.start()
        try:
            ray.shutdown()
        finally:
            late.cancel()

    def _kill_head(self) -> None:
        """Kill a head that hangs, because Ray waits for its answer for ever."""
        import psutil

        for child in psutil.Process().children() if self.own else ():
            if child.name() == "gcs_server":
                logger.warning("Ray's head does not answer, and is killed")
                child.kill()


def connect(cpus: int | None = None, threads: int = 1) -> Cluster:
    """Start Ray on this machine, with ``cpus`` CPUs for replicas of ``threads`` threads each, or join
    ``RAY_ADDRESS``. Sets Ray's variables in the environment. Blocks.

    Raises ConfigError if that fails; then nothing is left running.
    """
    require_ray()
    where = address()
    os.environ.update(TRANSPORT)
    if where is None:
        os.environ.update({**_LOCAL, "OMP_NUM_THREADS": str(threads)})
    else:
        check_address(where)
    import ray

    if ray.is_initialized():  # by the application
        return Cluster(own=False)
    # Half a second of imports, while Ray's processes start.
    threading.Thread(target=importlib.import_module, args=("ray.serve",), daemon=True).start()
    own: dict[str, Any] = {}
    if where is None:
        own = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    try:
        ray.init(address=where or "local", **own, **JOINING)
    except Exception as error:
        ray.shutdown()
        text = first_line(error)
        what = (
            "Ray cannot be started" if where is None else f"RAY_ADDRESS={where}: the cluster cannot be joined"
        )
        raise ConfigError(f"{what}: {text}") from error
    return Cluster(own=where is None)


class Gateway:
    """A gateway's connection to the replicas that it has deployed or found. ``handle`` is Serve's."""

    def __init__(self, fleet: str, handle: Any, registry: Any) -> None:
        self.handle = handle
        self.name = uuid.uuid4().hex
        self._fleet = fleet
        self._registry = registry

    def close(self) -> None:
        """End the connection, and the replicas, too, if this was the last gateway. Blocks."""
        import ray
        from ray.exceptions import RayError

        try:
            left = ray.get(self._registry.leave.remote(self.name), timeout=CONNECT_SECONDS)
        except RayError:  # another one has taken itself for the last, and ended all, or the head is gone
            return
        if left == 0:
            _remove(self._fleet)
            ray.kill(self._registry)


def _answer(call: Any, fleet: str) -> Any:
    """Return what the registry answers. Blocks. Raises ConfigError: that of the actor, or another one if it
    hangs, because Ray only starts those again that have ended."""
    import ray
    from ray.exceptions import GetTimeoutError

    try:
        return ray.get(call, timeout=ANSWER_SECONDS)
    except GetTimeoutError:
        raise ConfigError(
            f"the registry of the fleet {fleet!r} has not answered for {ANSWER_SECONDS:g} s; look for its "
            "process (ray::AdapterRegistry) on the node of Ray's head, and end it if it hangs: Ray starts it "
            "again, and what was loaded comes back from --registry or from the other gateways"
        ) from None
    except Exception as error:
        raise config_error_in(error) or error from None


def open_gateway(config: FleetConfig, application: Callable[[], Any]) -> Gateway:
    """Have Serve start ``application``, unless it runs already, and do not wait for its replicas. Blocks.

    Raises ConfigError if Serve refuses it; then nothing of the application is left. Also raises it if the
    registry's checkpoint fails, or if replicas of another configuration have this name; what other gateways
    have started goes on.
    """
    import ray
    from ray import serve

    check_resources(config, ray.cluster_resources())
    registry = registry_actor(config.name, config.registry)
    wanted = msgspec.json.encode(config)
    told = registry.configure.remote(wanted)
    # Serve's controller starts while the registry does. Had the fleet another gateway, Serve would run
    # already.
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(proxy_location="Disabled", logging_config=quiet)
    try:
        found = _answer(told, config.name)
    except Exception:
        if config.name not in serve.status().applications:  # else another gateway uses it and the registry
            _remove(config.name)
            ray.kill(registry)
        raise
    if found != wanted:
        differs = _differences(msgspec.json.decode(found), msgspec.json.decode(wanted))
        raise ConfigError(
            f"another gateway runs the fleet {config.name!r} with another configuration ({differs}); give "
            "this one the same, or another name (--app-name)"
        )
    if config.name in serve.status().applications:
        handle = serve.get_deployment_handle("EngineReplica", config.name)
    else:
        try:
            target = serve.RunTarget(application(), name=config.name, route_prefix=None)
            [handle] = serve.run_many([target], wait_for_applications_running=False)
        except Exception as error:
            _remove(config.name)
            ray.kill(registry)
            raise ConfigError(f"the fleet did not start: {error}") from error
    gateway = Gateway(config.name, handle, registry)
    _answer(registry.join.remote(gateway.name, wanted), config.name)
    return gateway


def why_it_failed(name: str) -> str | None:
    """Return why an application that a gateway has started or found will not start: Serve has given up, with
    the last line of each deployment's error, or the application is gone. None: it may still start. Blocks."""
    from ray import serve
    from ray.exceptions import ActorDiedError
    from ray.serve.schema import ApplicationStatus

    try:
        application = serve.status().applications.get(name)
    except ActorDiedError:  # Serve was ended, with all applications
        application = None
    if application is None:
        return f"another gateway or `serve delete` has removed the application {name!r} meanwhile; try again"
    if application.status is not ApplicationStatus.DEPLOY_FAILED:
        return None
    found = []
    for deployment, status in application.deployments.items():
        lines = [line.strip() for line in status.message.splitlines() if line.strip()]
        if lines:
            found.append(f"{deployment}: {lines[-1][:500]}")
    return "; ".join(found) or application.message


def _remove(name: str) -> None:
    """Remove an application, and Serve with it if no other application uses it. Serve keeps the proxy
    settings of its start. If it were left running, a later `serve run` on this cluster would never have a
    proxy. Blocks."""
    from ray import serve

    status = serve.status()
    if set(status.applications) <= {name} and not status.proxies:
        serve.shutdown()
    else:
        serve.delete(name)


def _differences(one: dict[str, Any], other: dict[str, Any], prefix: str = "") -> str:
    """Describe the fields in which two configurations differ, with both values."""
    found = []
    for name, value in one.items():
        new = other.get(name)
        if isinstance(value, dict) and isinstance(new, dict) and name != "adapters":
            inner = _differences(value, new, f"{prefix}{name}.")
            found += [inner] if inner else []
        elif value != new:
            found.append(f"{prefix}{name}: {value!r} there, {new!r} here")
    return ", ".join(found)
