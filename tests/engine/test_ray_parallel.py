"""Two ranks as Ray actors on two nodes: the tokens of one, adapters that swap, and deaths as of processes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator

import pytest
from support.engine_fixtures import MakeEngine, Tiny, check_tokens, greedy, prompt_of, refused, register
from support.failure_harness import error_of, until
from support.fleet_process import needs_ray
from support.ray_nodes import Nodes

from aioengine.errors import ConfigError, EngineDead
from aioengine.executors.ray import workers
from aioengine.executors.ray.workers import Place

needs_ray()
pytestmark = [pytest.mark.slow, pytest.mark.timed]  # Ray's processes take what a machine has


@pytest.fixture(scope="module", autouse=True)
def driver(nodes: Nodes) -> Iterator[None]:
    """This process is one, until the module's end."""
    import ray

    nodes.add_second()
    ray.init(nodes.address, log_to_driver=False)
    yield
    ray.shutdown()


async def test_two_ranks_give_the_tokens_of_one_and_are_replaced_when_one_dies(
    nodes: Nodes, tiny: Tiny, make_engine: MakeEngine
) -> None:
    names = ("rank-3", "qv-only", "patterns", "rslora")
    fields = {"executor": "ray", "tensor_parallel_size": 2, "restart": "on-failure", "max_model_len": 500}
    async with make_engine(tiny, **fields) as engine:
        assert len(set(nodes.workers("RankActor").values())) == 2, "one on each node"
        register(engine, tiny, *names)
        asked = [(prompt_of(i, 7), name) for i, name in enumerate((None, *names, None, *names))]
        await check_tokens(engine, tiny, asked, 12)
        assert engine.stats().slot_evictions > 0
        engine.check_invariants()

        # One that is killed takes the other along.
        running = asyncio.create_task(engine.complete([5], greedy(490)))
        tokens = engine.stats().output_tokens
        await until(lambda: engine.stats().output_tokens > tokens + 2)
        pid = next(iter(nodes.workers("RankActor")))
        os.kill(pid, signal.SIGKILL)
        error = await error_of(running)
        assert isinstance(error, EngineDead) and f"(process {pid}) ended: " in str(error)
        await check_tokens(engine, tiny, [([5, 6], None)])  # by two that were started in their place
        assert pid not in nodes.workers("RankActor")
    await until(lambda: not nodes.workers("RankActor"))


async def test_room_that_others_use(
    nodes: Nodes, tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for it is bounded, and nobody waits for it any more after that."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    other = placement_group([{"CPU": 1.0}] * 2)
    try:
        assert await asyncio.to_thread(other.wait, 30)
        before = placement_group_table().keys()
        monkeypatch.setattr(workers, "START_SECONDS", 0.5)
        engine = make_engine(tiny, executor="ray", tensor_parallel_size=2)
        await refused(
            engine, ConfigError, r"no room for 2 ranks .* within 0\.5 s; lower tensor_parallel_size"
        )
        new = placement_group_table().keys() - before
        await until(lambda: all(placement_group_table()[group]["state"] == "REMOVED" for group in new))
        assert new and ray.is_initialized(), "this process was connected before"
    finally:
        remove_placement_group(other)


async def test_an_actor_that_ends_before_it_connects(
    nodes: Nodes, tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reason is said at once, and not after the time that it has to connect."""

    class Broken:  # here, so that it is sent by value
        def place(self) -> Place:
            self.server = socket.create_server(("127.0.0.1", 0))
            return Place("127.0.0.1", self.server.getsockname()[1], 1, os.getpid())

        def run(self, rank: int, secret: bytes) -> None:
            self.server.close()
            raise OSError("no route to host")

    monkeypatch.setattr(workers, "RankActor", Broken)
    engine = make_engine(tiny, executor="ray", tensor_parallel_size=2)
    async with asyncio.timeout(50):
        await refused(engine, EngineDead, r"worker \d .*ended: .*no route to host|rank \d cannot be reached")
    await until(lambda: not nodes.workers("Broken"))


async def test_an_application_that_has_joined_a_cluster(
    nodes: Nodes, tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks are there, whatever RAY_ADDRESS says; and if it leaves Ray first, their end starts none."""
    import ray
    from ray._private import auto_init_hook

    assert auto_init_hook.enable_auto_connect
    engine = make_engine(tiny, executor="ray")
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        await engine.start()
    assert len(nodes.workers("RankActor")) == 1
    try:
        ray.shutdown()
        await engine.stop()
        assert not ray.is_initialized()
    finally:
        ray.init(nodes.address, ignore_reinit_error=True, log_to_driver=False)
    await until(lambda: not nodes.workers("RankActor"))
