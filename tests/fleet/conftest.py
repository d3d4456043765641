"""Fixtures of the fleet's tests. All that want two replicas on this machine share one fleet, and its Ray."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import ray_tls
from support.engine_fixtures import Tiny, tiny_of, tiny_text
from support.fleet_process import FleetServer, fleet_server, until
from support.otlp_collector import Collector, collector
from support.tiny_models import build_adapter

__all__ = ["tiny_of", "tiny_text"]

OWN_NAME = f"fleet-{os.getpid()}"
"""Of the shared fleet: other clusters of this machine may have fleets, too."""
MAX_RUNNING = 8
"""Requests that a replica runs at once."""


@pytest.fixture(autouse=True)
def without_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas in this process do not ask Serve who they are: Ray would start for that, and stay."""
    from aioengine.fleet import replica

    monkeypatch.setattr(replica, "_own_id", lambda: "own")


@pytest.fixture(scope="package")
def adapters(tiny_text: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter root with "a", "b", and "broken"."""
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(tiny_text.adapters["a"], root / "a")
    build_adapter(tiny_text.model, root / "b", seed=5)
    shutil.copytree(root / "b", root / "broken")
    (root / "broken" / "adapter_model.safetensors").write_bytes(b"not this")
    return root


@pytest.fixture(scope="package")
def traces() -> Iterator[Collector]:
    with collector() as found:
        yield found


@pytest.fixture(scope="package")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ray's variables for TLS between its processes."""
    return ray_tls(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="package")
def shared_fleet(
    tiny_text: Tiny,
    adapters: Path,
    traces: Collector,
    tls: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[FleetServer]:
    flags = ["--adapter-root", str(adapters), "--otlp-endpoint", traces.url]
    flags += ["--registry", str(tmp_path_factory.mktemp("registry")), "--max-upload-bytes", "1000000"]
    flags += ["--max-num-seqs", str(MAX_RUNNING), "--app-name", OWN_NAME]
    with fleet_server(tiny_text.model, *flags, OTEL_BSP_SCHEDULE_DELAY="200", **tls) as server:
        server.name = OWN_NAME
        yield server


@pytest.fixture
def fleet(shared_fleet: FleetServer) -> FleetServer:
    """The fleet, with both replicas as long as it runs, whatever was done to them before."""
    if shared_fleet.process.poll() is None:
        until(shared_fleet.healthy, 120)
    return shared_fleet
