"""A fleet in this process: a gateway, and replicas with an engine each, without Ray's processes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from support.engine_fixtures import Tiny
from support.registry_actor import RegistryActor

from aioengine import EngineConfig, LoRAConfig
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.gateway import client as gateway_client
from aioengine.fleet.gateway import discovery
from aioengine.fleet.gateway.client import FleetClient
from aioengine.fleet.replica import EngineReplica
from aioengine.fleet.wire import Hello


class ReplicaHere(EngineReplica):
    """Is ended by the test, where Serve would await its ``__del__``."""

    name = "own"

    def _hello(self) -> Hello:
        return msgspec.structs.replace(super()._hello(), replica=self.name)

    def __del__(self) -> None:  # type: ignore[override]
        pass


class Stream:
    """What Ray gives for a method that yields."""

    def __init__(self, items: AsyncIterator[bytes]) -> None:
        self._items = items

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._items

    def cancel(self) -> None:
        pass


class _Handle:
    """Serve's handle of the replicas."""

    def __init__(self, made: dict[str, ReplicaHere]) -> None:
        self._made = made

    def options(self, *, method_name: str, stream: bool = False) -> Any:
        def remote(*arguments: Any, to: str | None = None) -> Any:
            replica = self._made[to or next(iter(self._made))]
            if stream:
                return Stream(replica.channel(*arguments))
            if method_name == "adapter":
                action, values = arguments
                return replica.adapter(action, dict(values))
            return getattr(replica, method_name)(*arguments)

        return SimpleNamespace(remote=remote)


class FleetHere:
    """``client`` is the gateway's, ``replicas`` are by name."""

    def __init__(self, client: FleetClient, made: dict[str, ReplicaHere]) -> None:
        self.client = client
        self.replicas = made


def small_engine(tiny: Tiny, **fields: Any) -> EngineConfig:
    """Return the configuration of a replica's engine with two slots."""
    usual = {
        "model": str(tiny.model),
        "dtype": "float32",
        "max_model_len": 64,
        "kv_cache_memory": "4MiB",
        "lora": LoRAConfig(max_loras=2, max_cpu_loras=4),
    }
    return EngineConfig(**{**usual, **fields})


def serve_names(names: set[str], patch: pytest.MonkeyPatch) -> None:
    """Have Serve tell each gateway at once that these are the replicas."""

    def watch(_application: str, told: Any) -> Any:
        told(names)
        return lambda: None

    patch.setattr(discovery, "watch_replicas", watch)


@asynccontextmanager
async def fleet_here(config: FleetConfig, patch: pytest.MonkeyPatch) -> AsyncIterator[FleetHere]:
    names = {f"r{number}" for number in range(config.replicas)}
    registry = RegistryActor()
    patch.setattr(gateway_client, "registry_actor", lambda *_: registry)

    serve_names(names, patch)
    made: dict[str, ReplicaHere] = {}
    try:
        for name in sorted(names):
            replica = made[name] = ReplicaHere.__new__(ReplicaHere)
            await replica.__init__(config)  # type: ignore[misc] # Serve does it so
            replica.name = name
        plan: Any = SimpleNamespace(max_model_len=config.engine.max_model_len)
        client = FleetClient(config, _Handle(made), plan, None, None)
        await client.start(30)
        try:
            yield FleetHere(client, made)
        finally:
            await client.stop()
    finally:
        for replica in made.values():
            await replica.stop()
