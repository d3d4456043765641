"""Gateways that come and go while others start or serve; without Ray's processes."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from support.fleet_process import needs_ray
from support.registry_actor import RegistryActor

from aioengine import EngineConfig
from aioengine.errors import ConfigError
from aioengine.fleet import FleetConfig, cluster, registry
from aioengine.fleet.cluster import Gateway, open_gateway, why_it_failed
from aioengine.fleet.gateway import client as gateway_client
from aioengine.fleet.gateway.client import FleetClient
from aioengine.fleet.usage import GATEWAY_SECONDS
from aioengine.lab.simulation.clock import run_in_virtual_time

needs_ray()

CONFIG = FleetConfig(engine=EngineConfig(model="tiny"))


class Ray:
    """Stands for Ray and Serve in this process. ``answer``: what the registry's actor answers, or how it
    fails; None instead of the applications: Serve was ended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, applications: dict[str, Any] | None) -> None:
        import ray
        from ray import serve

        self.ended: list[str] = []
        self.answer: object = None
        self._applications = applications
        self.registry = SimpleNamespace(
            configure=SimpleNamespace(remote=lambda config: None),
            leave=SimpleNamespace(remote=lambda gateway: None),
        )
        monkeypatch.setattr(ray, "get", self._get)
        monkeypatch.setattr(ray, "kill", lambda actor: self.ended.append("registry"))
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
        monkeypatch.setattr(serve, "start", lambda **options: None)
        monkeypatch.setattr(serve, "status", self._status)
        monkeypatch.setattr(serve, "shutdown", lambda: self.ended.append("Serve"))
        monkeypatch.setattr(serve, "delete", self.ended.append)
        monkeypatch.setattr(cluster, "registry_actor", lambda *_: self.registry)

    def _get(self, call: object, timeout: float) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def _status(self) -> Any:
        from ray.exceptions import ActorDiedError

        if self._applications is None:
            raise ActorDiedError
        return SimpleNamespace(applications=self._applications, proxies={})


@pytest.mark.parametrize(
    ("applications", "ended"), [({}, ["Serve", "registry"]), ({CONFIG.name: "runs"}, [])]
)
def test_a_registry_that_fails(
    applications: dict[str, str], ended: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that does not open leaves nothing behind, and ends nothing that another gateway uses."""
    from ray.exceptions import GetTimeoutError

    failed = ConfigError("registry='s3://lora': cannot be read")
    for answer, said in ((failed, "cannot be read"), (GetTimeoutError(), "'aioengine' has not answered for")):
        ray = Ray(monkeypatch, applications)
        ray.answer = answer
        with pytest.raises(ConfigError, match=said):
            open_gateway(CONFIG, lambda: pytest.fail("it must not be started"))
        assert ray.ended == ended


@pytest.mark.parametrize("applications", [{}, None])
def test_a_fleet_that_another_gateway_has_ended(
    applications: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import ActorDiedError

    ray = Ray(monkeypatch, applications)
    why = why_it_failed(CONFIG.name)
    assert why is not None and "has removed the application 'aioengine'" in why
    ray.answer = ActorDiedError()
    Gateway(CONFIG.name, None, ray.registry).close()
    assert ray.ended == []


def test_a_fleet_that_still_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ApplicationStatus

    status = SimpleNamespace(status=ApplicationStatus.DEPLOYING)
    Ray(monkeypatch, {CONFIG.name: status})
    assert why_it_failed(CONFIG.name) is None


def test_a_gateway_that_waits_for_its_replicas_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a second gateway must not end the fleet under it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(registry, "time", SimpleNamespace(monotonic=loop.time))
        actor = RegistryActor()
        monkeypatch.setattr(gateway_client, "registry_actor", lambda *_: actor)
        for gateway in ("first", "second"):
            await actor.join.remote(gateway, b"")
        never = SimpleNamespace(remote=asyncio.Event().wait)
        handle: Any = SimpleNamespace(options=lambda **_: never)
        plan: Any = None
        first = FleetClient(CONFIG, handle, plan, None, None, gateway="first")
        starting = asyncio.ensure_future(first.start(within=None))
        await asyncio.sleep(3 * GATEWAY_SECONDS)
        assert not starting.done()
        assert await actor.leave.remote("second") == 1
        starting.cancel()
        await asyncio.wait([starting])
        await first.stop()
        await asyncio.sleep(3 * GATEWAY_SECONDS)
        assert await actor.leave.remote("second") == 0, "and it is not when it has stopped"

    run_in_virtual_time(main())
