"""Replicas that die or hang while they stream, and at last the fleet's own end."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from support.fleet_process import FleetServer, command_line, needs_ray, until

pytestmark = pytest.mark.slow

needs_ray()

STREAMS = 32
TOKENS = 200


def request(index: int) -> dict[str, Any]:
    """Greedy, drawn, with penalties, with log-probabilities, with an adapter: in turns."""
    sampling: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "top_p": 0.9, "seed": index},
        {"temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.3, "seed": index},
        {"temperature": 0, "logprobs": 1},
    ]
    return {
        "model": "a" if index % 3 == 0 else "tiny",
        "prompt": f"prompt {index}",
        "max_tokens": TOKENS,
        **sampling[index % 4],
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }


async def streamed(client: openai.AsyncOpenAI, index: int, seen: list[int]) -> list[int]:
    tokens: list[int] = []
    async for part in await client.completions.create(**request(index), stream=True):
        if part.choices:
            tokens += part.choices[0].token_ids or []  # type: ignore[attr-defined]
            seen[index] = len(tokens)
    return tokens


@asynccontextmanager
async def client_of(fleet: FleetServer) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{fleet.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(shared_fleet: FleetServer) -> list[list[int]]:
    """The tokens of all streams when nothing happens."""

    async def streams() -> list[list[int]]:
        async with client_of(shared_fleet) as client:
            return await asyncio.gather(*[streamed(client, i, [0] * STREAMS) for i in range(STREAMS)])

    found = asyncio.run(streams())
    assert {len(tokens) for tokens in found} == {TOKENS}
    return found


async def disturbed(
    fleet: FleetServer, pid: int, number: signal.Signals, meanwhile: Callable[[], None] = lambda: None
) -> list[list[int]]:
    """The tokens of all streams with a signal for one replica in the middle, after which ``meanwhile`` is
    called."""
    migrations = fleet.metric("aioengine_fleet_migrations_total")
    seen = [0] * STREAMS
    async with client_of(fleet) as client:
        streams = asyncio.gather(*[streamed(client, i, seen) for i in range(STREAMS)])
        while sum(number > 0 for number in seen) < STREAMS / 4:
            await asyncio.sleep(0.001)
            assert not streams.done()
        os.kill(pid, number)
        await asyncio.to_thread(meanwhile)
        found = await streams
    assert fleet.metric("aioengine_fleet_migrations_total") - migrations >= STREAMS / 8
    return found


def test_processes_speak_tls_to_each_other(fleet: FleetServer, tls: dict[str, str]) -> None:
    context = ssl.create_default_context(cafile=tls["RAY_TLS_CA_CERT"])
    context.load_cert_chain(tls["RAY_TLS_SERVER_CERT"], tls["RAY_TLS_SERVER_KEY"])
    context.set_alpn_protocols(["h2"])
    (replica, *_) = fleet.replicas()
    ports = {c.laddr.port for c in replica.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    host, _, head = fleet.address.rpartition(":")
    assert len(ports) >= 2, "Ray's, and Serve's, where the tokens come from"
    for port in (int(head), *ports):
        with (
            socket.create_connection((host, port), timeout=10) as connection,
            context.wrap_socket(connection, server_hostname=host) as wrapped,
        ):
            assert wrapped.version() == "TLSv1.3", port


async def test_kill_9_in_the_middle_of_streams(fleet: FleetServer, undisturbed: list[list[int]]) -> None:
    """Streams go on and new requests are answered; what the replica had pinned is computed elsewhere, and
    kept there from then on."""
    system = "Do as you are told. " * 8

    def pinned() -> dict[str, float]:
        names = re.findall(r'^aioengine_fleet_replica_up\{.*replica="(\w+)"', fleet.metrics(), re.MULTILINE)
        return {name: fleet.metric("aioengine_kv_blocks_pinned", replica=name) for name in names}

    def short_requests() -> None:
        for index in range(20):
            assert fleet.complete(f"short {index}", max_tokens=2)["finish_reason"]

    before = pinned()
    kept = fleet.message(system, "Who are you?")["cache_creation_input_tokens"]
    assert kept > 100
    [holder] = [name for name, blocks in pinned().items() if blocks > before[name]]
    assert await disturbed(fleet, fleet.pid_of(holder), signal.SIGKILL, short_requests) == undisturbed
    moved, again = fleet.message(system, "How are you?"), fleet.message(system, "And who am I?")
    assert moved["cache_creation_input_tokens"] >= kept > moved["cache_read_input_tokens"]
    assert again["cache_read_input_tokens"] >= kept and not again["cache_creation_input_tokens"]


async def test_a_hung_replica(fleet: FleetServer, undisturbed: list[list[int]]) -> None:
    """Nothing raises: only the silence tells. There is no CPU for another replica until this one is gone."""
    pid = fleet.replicas()[0].pid
    assert await disturbed(fleet, pid, signal.SIGSTOP) == undisturbed
    await asyncio.to_thread(until, lambda: not psutil.pid_exists(pid), 60)


async def test_replicas_are_replaced_one_after_the_other(
    fleet: FleetServer, undisturbed: list[list[int]], tls: dict[str, str]
) -> None:
    """There is no CPU for a new one until an old one is gone. No request fails meanwhile."""
    before = {process.pid for process in fleet.replicas()}
    environment = {"RAY_ADDRESS": fleet.address, "RAY_AUTH_MODE": "token", **tls}
    program = Path(__file__).parents[1] / "support" / "replaced_replicas.py"
    rolling = await asyncio.create_subprocess_exec(
        sys.executable, str(program), fleet.name, env={**os.environ, **environment}, stderr=subprocess.PIPE
    )
    waiting, ended = asyncio.create_task(rolling.communicate()), False
    async with client_of(fleet) as client:
        while not ended:
            ended = waiting.done() and fleet.healthy()
            streams = [streamed(client, index, [0] * STREAMS) for index in range(8)]
            assert await asyncio.gather(*streams) == undisturbed[:8]
    assert rolling.returncode == 0, (await waiting)[1]
    assert not before & {process.pid for process in fleet.replicas()}


def test_sigterm_leaves_no_process(shared_fleet: FleetServer) -> None:
    """The last test of this fleet, which is just starting a replica."""
    fleet = shared_fleet
    processes = [psutil.Process(fleet.process.pid), *fleet.processes()]
    assert any("EngineReplica" in command_line(process) for process in processes)
    fleet.process.send_signal(signal.SIGTERM)
    fleet.process.wait(60)
    assert fleet.process.returncode == 0, fleet.log
    left = [process for process in processes if process.is_running() and process.status() != "zombie"]
    assert [command_line(process) for process in left] == []
    assert "Traceback" not in fleet.log
