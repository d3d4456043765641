"""The router that Serve makes in the gateway."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

from support.fleet_process import needs_ray

needs_ray()

from aioengine.fleet.gateway.obey import ObeyingRouter  # noqa: E402


class Id(NamedTuple):
    unique_id: str


async def test_serve_pauses_before_it_asks_again() -> None:
    """Serve's own loop would ask again at once, and for ever, while the replica that it got is of no use."""
    pending: Any = SimpleNamespace(kwargs={"to": "a"}, routing_context=SimpleNamespace(should_backoff=False))
    paused = []

    async def pause(attempt: int) -> None:
        paused.append(attempt)

    router: Any = object.__new__(ObeyingRouter)
    replicas = [SimpleNamespace(replica_id=Id(name)) for name in "ba"]
    router._backoff, router._replicas, router._replicas_list = pause, replicas, replicas
    router.num_routing_tasks_in_backoff = 0
    router.num_routing_tasks_in_backoff_gauge = SimpleNamespace(set=lambda value: None)
    chosen = router._choose_replicas_with_backoff(pending)
    for _ in range(4):
        assert [replica.replica_id.unique_id for replica in await anext(chosen)] == ["a"]
    await chosen.aclose()
    assert paused == [0, 1]
