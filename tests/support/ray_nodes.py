"""Two Ray nodes on this machine, of one CPU each, to which ``aioengine serve --replicas`` is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from support.fleet_process import command_line


class Nodes:
    """``address`` is the head's. Nothing in this process is connected to it."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args=_NODE)
        self._second: Any = None

    def add_second(self) -> None:
        """Unless it is there."""
        if self._second is None:
            self._second = self._cluster.add_node(**_NODE)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def kill_second(self) -> None:
        """Its raylet and all that runs there are gone at once."""
        self._cluster.remove_node(self._second, allow_graceful=False)
        self._second = None

    def shutdown(self) -> None:
        self._cluster.shutdown()

    def replicas(self) -> dict[int, int]:
        """Processes of replicas that have started, and the node of each: the process that started it."""
        return self.workers("EngineReplica")

    def workers(self, kind: str) -> dict[int, int]:
        """The same, of the actors that have ``kind`` in their command line. Other clusters, which other tests
        may have started from this process, have theirs."""
        found: dict[int, int] = {}
        for node in self._cluster.list_all_nodes():
            for raylet in node.all_processes.get("raylet", ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    children = psutil.Process(raylet.process.pid).children(recursive=True)
                    found |= {p.pid: raylet.process.pid for p in children if kind in command_line(p)}
        return found


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    """Shared by all tests that need a cluster, which leave it without drivers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _ENVIRONMENT.items():
            patch.setenv(name, value)
        found = Nodes()
        yield found
        found.shutdown()


_NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it ends all replicas when other programs have filled the memory
}
