"""A fleet on two nodes: it grows and shrinks with the work, loses a node, and comes back after the head."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from support.engine_fixtures import Tiny
from support.fleet_process import FleetServer, fleet_server, needs_ray, until
from support.ray_nodes import Nodes

from aioengine.fleet.registry import AdapterRegistry, Entry
from aioengine.server.access.clients import hash_key

pytestmark = pytest.mark.slow

needs_ray()

TOKENS = 200


@pytest.fixture(scope="module")
def registry(nodes: Nodes, tiny_text: Tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Has "kept", which was loaded before a head was lost: this one has never heard of it."""
    url = f"file://{tmp_path_factory.mktemp('registry')}"
    asyncio.run(AdapterRegistry(url).change("kept", None, Entry("kept", str(tiny_text.adapters["a"]), 3)))
    nodes.add_second()
    return url


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "free" has no limits, "few" has five requests a minute."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    lines = []
    for key, limits in (("free", ""), ("few", "limits = {requests_per_minute = 5}")):
        scopes = 'scopes = ["generate", "metrics"]'
        lines += ["[[keys]]", f'hash = "{hash_key(key)}"', f'tenant = "{key}"', scopes, limits]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def flags(registry: str, keys: Path) -> list[str]:
    """Of every gateway to this fleet."""
    scaling = "waiting_work:least=0,most=2,target=0.02,cool_down=1.5,settle=0"
    found = ["--registry", registry, "--autoscale", scaling, "--max-num-seqs", "4", "--keys", str(keys)]
    return [*found, "--router", "least_loaded"]


@pytest.fixture(scope="module")
def fleet(nodes: Nodes, flags: list[str], tiny_text: Tiny) -> Iterator[FleetServer]:
    """One replica at first; another on the other node while work waits, and none while nothing does."""
    with fleet_server(tiny_text.model, *flags, replicas=1, RAY_ADDRESS=nodes.address) as server:
        server.key = "free"
        yield server


async def completion(client: openai.AsyncOpenAI, index: int, tokens: int = TOKENS) -> list[int]:
    fields: dict[str, Any] = {"extra_body": {"ignore_eos": True, "return_token_ids": True}}
    answer = await client.completions.create(
        model="tiny", prompt=f"prompt {index}", max_tokens=tokens, temperature=0, **fields
    )
    ids: list[int] = answer.choices[0].token_ids  # type: ignore[attr-defined]
    return ids


@asynccontextmanager
async def busy(fleet: FleetServer) -> AsyncIterator[openai.AsyncOpenAI]:
    """More requests than one replica runs at once, all the time."""
    client = openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="free", max_retries=0, timeout=120)

    async def one(index: int) -> None:
        while True:
            await completion(client, index, 50)

    tasks = [asyncio.create_task(one(index)) for index in range(12)]
    try:
        yield client
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in ended} == {asyncio.CancelledError}, "no request failed"


@contextmanager
def awake(fleet: FleetServer) -> Iterator[None]:
    """A request at a time, so that it does not fall asleep; none fails."""
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            fleet.complete("x", max_tokens=20)

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield
        finally:
            over.set()
        asking.result()


def test_adapters_come_back_after_the_head(fleet: FleetServer, tiny_text: Tiny) -> None:
    prompt = [4, 5, 6]
    found = fleet.complete(prompt, max_tokens=8, ignore_eos=True, model="kept")
    assert found["token_ids"] == tiny_text.expected(prompt, 8, "a")


def test_other_gateways_to_the_same_replicas(
    fleet: FleetServer, nodes: Nodes, flags: list[str], tiny_text: Tiny
) -> None:
    """A second one shares the limits; one with another configuration is refused."""

    def ask(gateway: FleetServer) -> int:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        headers = {"Authorization": "Bearer few"}
        with gateway.client() as client:
            return client.post("/v1/completions", json=body, headers=headers).status_code

    def refused() -> None:
        other = [*flags, "--migration-limit", "7"]
        with (
            pytest.raises(AssertionError, match="migration_limit: 3 there, 7 here"),
            fleet_server(tiny_text.model, *other, replicas=1, RAY_ADDRESS=nodes.address),
        ):
            pass

    with (
        ThreadPoolExecutor(1) as pool,
        awake(fleet),
        fleet_server(tiny_text.model, *flags, replicas=1, RAY_ADDRESS=nodes.address) as second,
    ):
        refusing = pool.submit(refused)
        assert [ask(fleet) for _ in range(6)] == [200] * 5 + [429]
        until(lambda: ask(second) == 429)  # what one gateway let in counts at the other
        second.key = "free"
        assert second.complete("x", max_tokens=1)
        refusing.result()
        assert len(nodes.replicas()) == 1
    assert fleet.complete("x", max_tokens=1), "the replicas stay while there is a gateway"


async def test_grows_onto_another_node_loses_it_shrinks_to_nothing_and_wakes(
    fleet: FleetServer, nodes: Nodes
) -> None:
    async with busy(fleet) as client:
        await asyncio.to_thread(until, lambda: fleet.healthy(2), 90)
        assert len(set(nodes.replicas().values())) == 2, "one on each node"
        expected = await asyncio.gather(*[completion(client, i) for i in range(8)])
        again = asyncio.gather(*[completion(client, i) for i in range(8)])
        at_replicas = "aioengine_fleet_replica_requests"  # with the twelve that are always there
        await asyncio.to_thread(until, lambda: fleet.metric(at_replicas) >= 16)
        nodes.kill_second()
        assert await again == expected
        await asyncio.to_thread(until, lambda: fleet.healthy(1), 30)
    lost = fleet.metric("aioengine_fleet_losses_total")
    await asyncio.to_thread(until, lambda: fleet.healthy(0) and not nodes.replicas(), 60)
    assert fleet.metric("aioengine_fleet_losses_total") == lost, "the other one went without losing anything"
    with fleet.client() as client:
        assert client.get("/ready").status_code == 200, "requests are accepted"
    answers = await asyncio.gather(
        *[asyncio.to_thread(fleet.complete, [4, 5], max_tokens=4) for _ in range(4)]
    )
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 1, "the first ones wait for a replica"
