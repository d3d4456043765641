"""Replicas that die while they stream, and at last the fleet's own end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.fleet_process import FleetServer, command_line, needs_ray, until

pytestmark = pytest.mark.slow

needs_ray()

STREAMS = 32
TOKENS = 400
"""Of each stream: all of them take much longer than this process does to notice that a replica runs some."""
LEAST = 4
"""Streams that a replica runs when it is lost."""


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
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def streamed(fleet: FleetServer, index: int) -> list[int]:
    """Return the tokens of a stream. They are parsed when all are there: meanwhile that would take this
    process longer than it takes the replicas to make them."""
    body = json.dumps({**request(index), "stream": True}).encode()
    host, port = fleet.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.0\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    async with asyncio.timeout(120):
        answer = await reader.read(-1)
    writer.close()
    head, _, text = answer.decode().partition("\r\n\r\n")
    *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert " 200 " in head and done == "[DONE]", answer
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    return [token for choice in choices for token in choice["token_ids"]]


@pytest.fixture(scope="module")
def undisturbed(shared_fleet: FleetServer) -> list[list[int]]:
    """The tokens of all streams when nothing happens."""

    async def streams() -> list[list[int]]:
        return await asyncio.gather(*[streamed(shared_fleet, i) for i in range(STREAMS)])

    found = asyncio.run(streams())
    assert {len(tokens) for tokens in found} == {TOKENS}
    return found


async def test_kill_9_in_the_middle_of_streams(fleet: FleetServer, undisturbed: list[list[int]]) -> None:
    """Streams go on and new requests are answered."""
    pid = fleet.replicas()[0].pid
    [replica] = re.findall(rf"replica (\w+) is there \(process {pid} ", fleet.log)[-1:]
    migrations = fleet.metric("aioengine_fleet_migrations_total")
    made = fleet.metric("aioengine_generation_tokens_total", source=replica)
    streams = asyncio.gather(*[streamed(fleet, i) for i in range(STREAMS)])

    def runs() -> bool:
        """And not only has admitted."""
        assert not streams.done()
        now = fleet.metric("aioengine_generation_tokens_total", source=replica)
        running = fleet.metric("aioengine_requests_running", source=replica)
        return now - made >= TOKENS / 2 and running >= LEAST

    await asyncio.to_thread(until, runs)
    os.kill(pid, signal.SIGKILL)
    for index in range(20):
        answer = await asyncio.to_thread(fleet.complete, f"short {index}", max_tokens=2)
        assert answer["finish_reason"]
    assert await streams == undisturbed
    assert fleet.metric("aioengine_fleet_migrations_total") - migrations >= LEAST


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
    while not ended:
        ended = waiting.done() and fleet.healthy()
        streams = [streamed(fleet, index) for index in range(8)]
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
