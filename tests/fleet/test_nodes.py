"""A fleet on two nodes: it grows and shrinks with the work, loses a node, and comes back after the head."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from support.engine_fixtures import Tiny
from support.fleet_process import FleetServer, fleet_server, needs_ray, until
from support.ray_nodes import Nodes, ray_nodes

needs_ray()

TOKENS = 200


REGISTER = """
import ray, sys
from aioengine.fleet.registry import NAMESPACE, Entry, registry_actor
address, registry, path = sys.argv[1:]
ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
ray.get(registry_actor("aioengine", registry).put.remote(Entry("kept", path, 3)))
"""
"""What a door does when an adapter is loaded."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with ray_nodes() as found:
        yield found


@pytest.fixture(scope="module")
def registry(nodes: Nodes, tiny_text: Tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Has "kept", which was loaded before the head was lost."""
    url = f"file://{tmp_path_factory.mktemp('registry')}"
    arguments = [nodes.address, url, str(tiny_text.adapters["a"])]
    subprocess.run([sys.executable, "-c", REGISTER, *arguments], check=True, timeout=60)
    nodes.restart_head()
    nodes.add_second()
    return url


@pytest.fixture(scope="module")
def fleet(nodes: Nodes, registry: str, tiny_text: Tiny) -> Iterator[FleetServer]:
    """One replica at first; another on the other node while work waits."""
    scaling = "waiting_work:least=1,most=2,target=0.02,cool_down=1.5,settle=0"
    flags = [
        "--registry",
        registry,
        "--autoscale",
        scaling,
        "--max-num-seqs",
        "4",
        "--router",
        "least_loaded",
    ]
    with fleet_server(tiny_text.model, *flags, replicas=1, RAY_ADDRESS=nodes.address) as server:
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
    client = openai.AsyncOpenAI(base_url=f"{fleet.url}/v1", api_key="none", max_retries=0, timeout=120)

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


def test_adapters_come_back_after_the_head(fleet: FleetServer, tiny_text: Tiny) -> None:
    prompt = [4, 5, 6]
    found = fleet.complete(prompt, max_tokens=8, ignore_eos=True, model="kept")
    assert found["token_ids"] == tiny_text.expected(prompt, 8, "a")


async def test_grows_onto_the_other_node_and_shrinks(fleet: FleetServer, nodes: Nodes) -> None:
    assert len(nodes.replicas()) == 1
    async with busy(fleet):
        await asyncio.to_thread(until, lambda: fleet.healthy(2), 90)
        assert len(set(nodes.replicas().values())) == 2, "one on each node"
    await asyncio.to_thread(until, lambda: fleet.healthy(1) and len(nodes.replicas()) == 1, 60)
    assert fleet.metric("aioengine_fleet_losses_total") == 0, "it went without losing anything"


async def test_streams_outlive_a_node(fleet: FleetServer, nodes: Nodes) -> None:
    async with busy(fleet) as client:
        expected = await asyncio.gather(*[completion(client, i) for i in range(8)])
        await asyncio.to_thread(until, lambda: fleet.healthy(2), 90)
        again = asyncio.gather(*[completion(client, i) for i in range(8)])
        await asyncio.sleep(0.2)
        nodes.kill_second()
        assert await again == expected
        await asyncio.to_thread(until, lambda: fleet.healthy(1), 30)
