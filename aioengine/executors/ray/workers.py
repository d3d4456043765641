"""RayWorkers: the workers of one engine as Ray actors in a placement group, which may span nodes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from secrets import token_bytes
from typing import Any, ClassVar, NamedTuple, cast

from aioengine.errors import ConfigError, EngineDead
from aioengine.executors.process.spawn import WorkerConnection
from aioengine.executors.process.workers import Workers, rank_threads
from aioengine.executors.ray.address import address, check_address, check_installed, first_line
from aioengine.memory_plan import resolve_device

START_SECONDS = 60.0
"""Time for Ray to place the actors, and for each of them to connect."""
JOIN_SECONDS = 3.0
"""Time after which nodes that have just joined are known."""
SECRET_BYTES = 32
"""Length of the secret by which the engine knows each rank's connection."""
_ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_DEDUP_LOGS": "0", "RAY_USAGE_STATS_ENABLED": "0"}


class Place(NamedTuple):
    """Address of an actor."""

    host: str
    """Address of its node."""
    free_port: int
    """A port of that node that was free a moment ago."""
    pid: int


class RankActor:
    """A worker of :mod:`aioengine.executors.process` in the process of a Ray actor, over TCP."""

    def place(self) -> Place:
        import ray

        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as server:
            return Place(host, server.getsockname()[1], os.getpid())

    def run(self, host: str, port: int, greeting: bytes) -> None:
        """Serve the engine that listens at this address, until it is gone; then this process ends."""
        import ray

        from aioengine.executors.process.worker import Worker

        # Ray has done this, unless it was told not to; a rank takes the first GPU that it sees.
        if gpus := ray.get_gpu_ids():
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        connection = socket.create_connection((host, port), timeout=30)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(greeting)
        Worker(connection).run()


class RayWorkers(Workers):
    """Like :class:`~aioengine.executors.process.workers.Workers`, but each worker is a Ray actor, over TCP.
    Each actor has a CPU for every thread of its rank, and a GPU on CUDA. Ray is joined (``RAY_ADDRESS``) or
    started on this machine; it stays until the application ends it. If the start for which that was done
    fails, and no other engine uses it, it ends. In an application that has joined a cluster, the actors are
    there, and ``RAY_ADDRESS`` is not read, as ``ray.init(address)`` does not read it either.

    Messages between the engine and its ranks are neither encrypted nor signed, like those between torch's own
    ranks. So the network between the nodes must be trusted.
    """

    _group: Any = None
    _to_be_ended: ClassVar[bool] = False
    """Whether a start has connected the process to Ray, and none has succeeded since."""
    _rendezvous = ""

    def _meeting(self, folder: str) -> str:
        return self._rendezvous

    async def _spawn(self) -> None:
        _open.add(self)  # before the connection is there: others must not end it
        if await asyncio.to_thread(_connect):
            RayWorkers._to_be_ended = True
        loop = asyncio.get_running_loop()
        actors = await asyncio.to_thread(self._place)
        host = await asyncio.to_thread(_own_address)
        secrets = {token_bytes(SECRET_BYTES): loop.create_future() for _ in actors}
        callers: list[_Caller] = []

        def call() -> _Caller:
            callers.append(_Caller(secrets))
            return callers[-1]

        server = await loop.create_server(call, host, 0, family=socket.AF_INET)
        try:
            port = server.sockets[0].getsockname()[1]
            for secret, actor in zip(secrets, actors, strict=True):
                actor.run(host, port, secret)
            async with asyncio.timeout(START_SECONDS):
                for rank, (actor, came) in enumerate(zip(actors, secrets.values(), strict=True)):
                    await asyncio.wait([came, actor.ended], return_when=asyncio.FIRST_COMPLETED)
                    if not came.done():
                        raise EngineDead(
                            f"the Ray actor of rank {rank} ended before it connected: {actor.why}"
                        )
                    worker = WorkerConnection(rank, actor, self._received, self._ended)
                    self._workers.append(worker)
                    worker.connection_made(await came)
                    (await came).set_protocol(worker)
        except TimeoutError:
            raise EngineDead(f"a Ray actor did not connect within {START_SECONDS:g} s") from None
        finally:
            server.close()
            for caller in callers:
                caller.leave()
            if len(self._workers) < self.size:
                for actor in actors:
                    actor.kill()

    def _place(self) -> list[_Actor]:
        """Make the actors. Blocks. Raises ConfigError if the cluster has no room for them."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        threads = max(1, rank_threads(self.size))
        cuda = resolve_device(self._config.device) == "cuda"
        bundle = {"CPU": float(threads), **({"GPU": 1.0} if cuda else {})}
        needed = {name: count * self.size for name, count in bundle.items()}
        until = time.monotonic() + JOIN_SECONDS
        while missing := [name for name in needed if ray.cluster_resources().get(name, 0) < needed[name]]:
            if time.monotonic() > until:
                name, there = missing[0], ray.cluster_resources().get(missing[0], 0)
                raise ConfigError(
                    f"executor='ray': {self.size} ranks need {needed[name]:g} {name}, and the Ray cluster "
                    f"has {there:g}; lower tensor_parallel_size, or add nodes"
                )
            time.sleep(0.1)
        self._group = placement_group([bundle] * self.size, strategy="PACK")
        if not self._group.wait(START_SECONDS):
            raise ConfigError(
                f"executor='ray': no room for {self.size} ranks of {bundle} became free in the Ray cluster "
                f"within {START_SECONDS:g} s; other programs use it"
            )
        kind = ray.remote(RankActor)
        handles = [
            kind.options(
                num_cpus=threads,
                num_gpus=1 if cuda else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=rank
                ),
                runtime_env={
                    "env_vars": {"OMP_NUM_THREADS": str(threads), "TORCH_NCCL_ENABLE_MONITORING": "0"}
                },
            ).remote()
            for rank in range(self.size)
        ]
        try:
            places = ray.get([handle.place.remote() for handle in handles], timeout=START_SECONDS)
        except Exception as error:
            for handle in handles:
                _if_joined(ray.kill, handle)
            raise EngineDead(f"a Ray actor could not be started: {type(error).__name__}: {error}") from error
        self._rendezvous = f"tcp://{places[0].host}:{places[0].free_port}" if self.size > 1 else ""
        return [_Actor(handle, place.pid) for handle, place in zip(handles, places, strict=True)]

    async def _close(self) -> None:
        await super()._close()
        group, self._group = self._group, None
        if group is not None:
            from ray.util.placement_group import remove_placement_group

            await asyncio.to_thread(_if_joined, remove_placement_group, group)
        _open.discard(self)
        if self.started:
            RayWorkers._to_be_ended = False
        if RayWorkers._to_be_ended and not _open:
            import ray

            RayWorkers._to_be_ended = False
            await asyncio.to_thread(ray.shutdown)


class _Caller(asyncio.Protocol):
    """A connection that says first which rank calls, by the secret that this was given. One that says
    anything else is closed."""

    _transport: asyncio.Transport

    def __init__(self, secrets: Mapping[bytes, asyncio.Future[asyncio.Transport]]) -> None:
        self._secrets = secrets
        self._said = b""
        self._known = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._said += data
        if len(self._said) < SECRET_BYTES:
            return
        came = self._secrets.get(self._said)
        if came is None or came.done():
            self._transport.abort()
        else:
            self._known = True
            came.set_result(self._transport)

    def leave(self) -> None:
        """Close it, unless it is a rank's."""
        if not self._known:
            self._transport.abort()


class _Actor:
    """An actor with the methods of a :class:`~aioengine.executors.process.spawn.WorkerProcess`."""

    def __init__(self, handle: Any, pid: int) -> None:
        self.handle = handle
        self.pid = pid
        self.ended: asyncio.Future[Any]
        """Done when the actor has ended; set by :meth:`run`."""

    def run(self, host: str, port: int, greeting: bytes) -> None:
        self.ended = asyncio.wrap_future(self.handle.run.remote(host, port, greeting).future())
        self.ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    @property
    def why(self) -> str:
        """Why it has ended."""
        error = None if self.ended.cancelled() else self.ended.exception()
        return "it has ended by itself" if error is None else f"{type(error).__name__}: {first_line(error)}"

    async def wait(self) -> int | None:
        await asyncio.wait([self.ended])
        return None

    def kill(self) -> None:
        import ray

        _if_joined(ray.kill, self.handle)


_open: set[RayWorkers] = set()
"""Those of this process that have begun to start and are not closed. They share one connection to Ray."""


def _connect() -> bool:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine. Returns whether this process was
    not connected before. Raises ConfigError."""
    check_installed("executor='ray'")
    import ray

    if ray.is_initialized():
        return False
    where = address()
    if where is not None:  # Ray itself would try for a minute
        check_address(where)
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    options: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "namespace": "aioengine",
    }
    try:
        if where is None:
            ray.init(address="local", include_dashboard=False, **options)
        else:
            ray.init(address=where, **options)
    except Exception as error:
        ray.shutdown()
        what = f"RAY_ADDRESS={where}: the cluster cannot be joined" if where else "Ray cannot be started"
        raise ConfigError(f"executor='ray': {what}: {first_line(error)}") from error
    return True


def _if_joined(end: Callable[[Any], None], what: Any) -> None:
    """Do ``end(what)``, unless the application has left Ray: Ray's functions would then start a new Ray on
    this machine, or join another one."""
    import ray

    if ray.is_initialized():
        with contextlib.suppress(Exception):  # Ray itself may be gone
            end(what)


def _own_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())
