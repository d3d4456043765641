"""RankActor: a worker of :mod:`aioengine.executors.process` in the process of a Ray actor, over TCP."""

from __future__ import annotations

import os
import socket
from typing import NamedTuple


class Place(NamedTuple):
    """Address of an actor."""

    host: str
    """Address of its node."""
    free_port: int
    """A port of that node that was free a moment ago."""
    pid: int


class RankActor:
    """The actor's class."""

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
