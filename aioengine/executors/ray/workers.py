"""RayWorkers: the workers of one engine as Ray actors in a placement group, which may span nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from aioengine.errors import ConfigError, EngineDead
from aioengine.executors.process.spawn import WorkerConnection
from aioengine.executors.process.workers import Workers
from aioengine.executors.ray.address import address, check_address, check_installed, first_line
from aioengine.memory_plan import resolve_device

START_SECONDS = 60.0
"""Time for Ray to place the actors, and for the engine to connect to each of them."""
GREETING_SECONDS = 5.0
"""Time in which a caller has to say the actor's secret."""
SECRET_BYTES = 32
_ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class Place(NamedTuple):
    """Address of an actor."""

    host: str
    """Address of its node."""
    port: int
    """Port at which it waits for the engine."""
    free_port: int
    """A port of that node that was free a moment ago."""
    pid: int


class RankActor:
    """A worker of :mod:`aioengine.executors.process` in the process of a Ray actor, over TCP."""

    def place(self) -> Place:
        import ray

        host = ray.util.get_node_ip_address()
        self._server = socket.create_server((host, 0))
        with socket.create_server((host, 0)) as other:
            return Place(host, self._server.getsockname()[1], other.getsockname()[1], os.getpid())

    def run(self, rank: int, secret: bytes) -> None:
        """Serve the engine, which says this secret first, until it is gone; then this process ends."""
        import ray

        from aioengine.executors.process.worker import Worker

        # Ray has done this, unless it was told not to; a rank takes the first GPU that it sees.
        if gpus := ray.get_gpu_ids():
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        with self._server:
            self._server.settimeout(START_SECONDS)
            connection = _accept(self._server, secret)
        Worker(rank, connection).run()


def _accept(server: socket.socket, secret: bytes) -> socket.socket:
    """Return the connection of the first caller that says the secret; those of others are closed."""
    while True:
        connection, _ = server.accept()
        connection.settimeout(GREETING_SECONDS)
        said = b""
        with contextlib.suppress(OSError):
            while len(said) < len(secret) and (more := connection.recv(len(secret) - len(said))):
                said += more
        if secrets.compare_digest(said, secret):
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection.close()


class RayWorkers(Workers):
    """Like :class:`~aioengine.executors.process.workers.Workers`, but each worker is a Ray actor, over TCP.
    Each actor has a CPU for every thread of its rank, and a GPU on CUDA. Ray is joined (``RAY_ADDRESS``) or
    started on this machine; it stays until the application ends it. In an application that has joined a
    cluster, the actors are there, and ``RAY_ADDRESS`` is not read, as ``ray.init(address)`` does not read it
    either.

    Messages between the engine and its ranks are neither encrypted nor signed, like those between torch's own
    ranks. So the network between the nodes must be trusted.
    """

    _group: Any = None

    async def _spawn(self, folder: str) -> str:
        await asyncio.to_thread(_connect)
        actors = await asyncio.to_thread(self._place)
        loop = asyncio.get_running_loop()
        try:
            for rank, actor in enumerate(actors):
                worker = WorkerConnection(rank, actor, self._received, self._ended)
                secret = secrets.token_bytes(SECRET_BYTES)
                actor.run(rank, secret)
                async with asyncio.timeout(START_SECONDS):
                    place = actor.place
                    # The lambda is called before the next rank's turn.
                    await loop.create_connection(lambda: worker, place.host, place.port)  # noqa: B023
                worker.transport.write(secret)
                self._workers.append(worker)
        except OSError as error:  # a TimeoutError, too
            raise EngineDead(
                f"the Ray actor of rank {rank} cannot be reached: {error or 'timeout'}"
            ) from error
        finally:
            for actor in actors[len(self._workers) :]:
                actor.kill()
        first = actors[0].place
        return f"tcp://{first.host}:{first.free_port}" if self.size > 1 else ""

    def _place(self) -> list[_Actor]:
        """Make the actors. Blocks. Raises ConfigError if the cluster has no room for them."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from aioengine.model.parallel.group import rank_threads  # imports torch

        threads = rank_threads(self.size)
        cuda = resolve_device(self._config.device) == "cuda"
        bundle = {"CPU": float(threads), **({"GPU": 1.0} if cuda else {})}
        self._group = placement_group([bundle] * self.size, strategy="PACK")
        if not self._group.wait(START_SECONDS):
            raise ConfigError(
                f"executor='ray': no room for {self.size} ranks of {bundle} became free in the Ray cluster "
                f"within {START_SECONDS:g} s; lower tensor_parallel_size, add nodes, or end other programs"
            )
        variables = {"OMP_NUM_THREADS": str(threads), "TORCH_NCCL_ENABLE_MONITORING": "0"}
        handles = [
            ray.remote(RankActor)
            .options(
                num_cpus=threads,
                num_gpus=1 if cuda else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=rank
                ),
                runtime_env={"env_vars": variables},
            )
            .remote()
            for rank in range(self.size)
        ]
        try:
            places = ray.get([handle.place.remote() for handle in handles], timeout=START_SECONDS)
        except Exception as error:  # the end of the group ends them
            raise EngineDead(f"a Ray actor could not be started: {type(error).__name__}: {error}") from error
        return [_Actor(handle, place) for handle, place in zip(handles, places, strict=True)]

    async def _close(self) -> None:
        await super()._close()
        group, self._group = self._group, None
        if group is not None:
            from ray.util.placement_group import remove_placement_group

            await asyncio.to_thread(_if_joined, remove_placement_group, group)


class _Actor:
    """An actor with the methods of a :class:`~aioengine.executors.process.spawn.WorkerProcess`."""

    def __init__(self, handle: Any, place: Place) -> None:
        self._handle = handle
        self.place = place
        self.pid = place.pid
        self._ended: asyncio.Future[Any]

    def run(self, rank: int, secret: bytes) -> None:
        self._ended = asyncio.wrap_future(self._handle.run.remote(rank, secret).future())
        self._ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def wait(self) -> str:
        await asyncio.wait([self._ended])
        error: Any = None if self._ended.cancelled() else self._ended.exception()
        error = getattr(error, "cause", None) or error  # Ray's own text begins with where it was raised
        return "ended" if error is None else f"ended: {type(error).__name__}: {first_line(error)}"

    def kill(self) -> None:
        import ray

        _if_joined(ray.kill, self._handle)


def _connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine, unless the process is connected.
    Raises ConfigError."""
    check_installed("executor='ray'")
    import ray

    if ray.is_initialized():
        return
    where = address()
    if where is not None:  # Ray itself would try for a minute
        check_address(where)
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    target: dict[str, Any] = {"address": "local", "include_dashboard": False}
    try:
        ray.init(
            **(target if where is None else {"address": where}),
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="aioengine",
        )
    except Exception as error:
        ray.shutdown()
        what = f"RAY_ADDRESS={where}: the cluster cannot be joined" if where else "Ray cannot be started"
        raise ConfigError(f"executor='ray': {what}: {first_line(error)}") from error


def _if_joined(end: Callable[[Any], None], what: Any) -> None:
    """Do ``end(what)``, unless the application has left Ray: Ray's functions would then start a new Ray on
    this machine, or join another one."""
    import ray

    if ray.is_initialized():
        with contextlib.suppress(Exception):  # Ray itself may be gone
            end(what)
