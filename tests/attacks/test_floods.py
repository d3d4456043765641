"""A client that floods the server has what the shares of others leave it, and takes no places of theirs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.bystander import bystander
from support.engine_fixtures import Tiny
from support.server_process import Serving, serving

from aioengine.server.access.clients import hash_key

pytestmark = pytest.mark.slow

BOUND = 4.0
"""Times the time alone that a request takes beside the flood, and a step and a read under way: SLACK."""
SLACK = 1.0
FLAGS = (
    *("--served-model-name", "tiny"),
    *("--max-loras", "4", "--max-cpu-loras", "8"),
    *("--kv-cache-memory", "16MiB"),
)


@contextlib.asynccontextmanager
async def flood(
    server: Serving, bodies: Sequence[dict[str, Any]], *, key: str = "none", address: str = ""
) -> AsyncIterator[Counter[int]]:
    """Sends all of them from 900 connections, each another when one is answered. Yields once all are sent;
    tells how they were answered so far."""
    statuses: Counter[int] = Counter()
    unsent = deque(bodies)
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    head += f"authorization: Bearer {key}\r\n"

    async def worker() -> None:
        local = (address, 0) if address else None
        reader, writer = await asyncio.open_connection(*server.address, local_addr=local)
        try:
            while unsent:
                body = unsent.popleft()
                data = json.dumps(
                    {"model": "tiny", "prompt": "Hi", "max_tokens": 200, "ignore_eos": True} | body
                )
                writer.write(f"{head}content-length: {len(data)}\r\n\r\n{data}".encode())
                answer = await reader.readuntil(b"\r\n\r\n")
                statuses[int(answer[9:12])] += 1
                size = int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(size)
        finally:
            writer.transport.abort()

    tasks = [asyncio.create_task(worker()) for _ in range(min(len(bodies), 900))]
    try:
        async with (
            httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as http,
            asyncio.timeout(60),
        ):
            while (await http.get("/ready")).status_code == 200:
                text = (await http.get("/metrics", headers={"authorization": "Bearer m"})).text
                waiting = sum(
                    float(line.rpartition(" ")[2])
                    for line in text.splitlines()
                    if line.startswith("aioengine_requests_waiting{")
                )
                if waiting > 50 and not unsent:
                    break
                await asyncio.sleep(0.1)
        yield statuses
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def seconds_of(server: Serving, key: str, model: str, count: int = 3) -> list[float]:
    """How long requests take, one after the other."""
    found = []
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60, headers=headers) as http:
        for _ in range(count):
            began = time.monotonic()
            body = {"model": model, "prompt": "Hello", "max_tokens": 20, "ignore_eos": True}
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            found.append(time.monotonic() - began)
    return found


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Tenants a and b, each with its name as its key, and m, who scrapes."""
    path = tmp_path / "keys.toml"
    scopes = {"a": ["generate"], "b": ["generate"], "m": ["metrics"]}
    path.write_text(
        "".join(
            f'[[keys]]\nhash = "{hash_key(who.encode())}"\ntenant = "{who}"\nscopes = {json.dumps(may)}\n'
            for who, may in scopes.items()
        )
    )
    return path


def adapter_root(tiny_text: Tiny, tmp_path: Path, count: int) -> Path:
    """A root with the adapters "mine", "a0", "a1", ..."""
    root = tmp_path / "root"
    source = tiny_text.adapters["a"]
    root.mkdir()
    shutil.copytree(source, root / "mine")
    files = os.listdir(source)
    for i in range(count):
        (root / f"a{i}").mkdir()
        for name in files:
            os.link(root / "mine" / name, root / f"a{i}" / name)
    return root


@pytest.mark.parametrize("unique", [False, True])
async def test_a_tenant_that_floods_holds_up_no_other(
    unique: bool, tiny_text: Tiny, keys: Path, tmp_path: Path
) -> None:
    bodies: list[dict[str, Any]] = [{"model": f"a{i}"} for i in range(5000)] if unique else [{}] * 900
    adapters = adapter_root(tiny_text, tmp_path, len(bodies) if unique else 0)
    flags = (*FLAGS, "--max-waiting", "500", "--keys", str(keys), "--adapter-root", str(adapters))
    async with serving(tiny_text.model, *flags) as server:
        alone = await seconds_of(server, "b", "mine")
        async with flood(server, bodies, key="a") as statuses:
            async with bystander(server.url, key="b", max_tokens=30) as seen:
                beside = await seconds_of(server, "b", "mine")
            assert (sum(statuses.values()) > 4000) == unique, "a's own are refused where too many wait"
    assert max(beside) <= BOUND * max(alone) + SLACK
    seen.check()


@pytest.mark.parametrize("address", ["127.0.0.2", ""])
async def test_without_keys_the_address_is_the_tenant(address: str, tiny_text: Tiny) -> None:
    """And many choices of one request, or of several, count as another's than single ones."""
    bodies = [{}] * 900 if address else [{"n": 128}] * 6
    async with serving(tiny_text.model, *FLAGS) as server:
        alone = await seconds_of(server, "none", "tiny")
        async with flood(server, bodies, address=address) as statuses:
            async with bystander(server.url, max_tokens=30) as seen:
                beside = await seconds_of(server, "none", "tiny")
            assert sum(statuses.values()) < 400, "the flood is over"
    assert max(beside) <= BOUND * max(alone) + SLACK
    seen.check()
