"""How ``aioengine serve`` ends: an engine that dies, systemd, a delay for load balancers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

import httpx
import pytest
from support.engine_fixtures import Tiny, tiny_text
from support.hanging_files import hanging
from support.process_harness import worker_pids
from support.server_process import serving
from support.waiting import until

from aioengine.cli.serving.lifetime import LINGER_SECONDS, Systemd
from aioengine.server.access.clients import hash_key

__all__ = ["tiny_text"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


def kill_workers(parent: int) -> None:
    for pid in worker_pids(parent):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
async def test_a_server_whose_engine_is_dead_ends(tiny_text: Tiny) -> None:
    async with serving(tiny_text.model, "--executor", "process") as server:
        kill_workers(server.process.pid)
        async with (
            httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as http,
            asyncio.timeout(60),
        ):
            while (await http.get("/health")).status_code != 503:
                await asyncio.sleep(0.01)
            assert (
                'aioengine_engine_state{engine="default",state="dead"} 1.0'
                in (await http.get("/metrics")).text
            )
        assert await server.end() == 1
    said = [line["message"] for line in server.lines]
    assert any("ending, because the engine is dead" in line for line in said)
    assert any("SIGKILL" in line for line in said)


@pytest.mark.slow
async def test_it_stays_if_it_is_to(tiny_text: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tiny_text.model, "--executor", "process", "--keep-dead") as server:
        kill_workers(server.process.pid)
        async with asyncio.timeout(60):
            while not any("the engine is dead" in line["message"] for line in server.lines):
                await asyncio.sleep(0.01)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(server.process.wait()), LINGER_SECONDS + 1)
        server.process.send_signal(signal.SIGTERM)
        assert await server.end() == 1


@pytest.mark.slow
async def test_systemd_is_told_and_fed(tiny_text: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        receiver.setblocking(False)
        environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "300000"}
        async with serving(tiny_text.model, "--drain-delay", "0.3", **environment) as server:
            loop = asyncio.get_running_loop()

            async def told(what: str) -> None:
                async with asyncio.timeout(60):
                    while what not in (await loop.sock_recv(receiver, 4096)).decode().split("\n"):
                        pass

            await told("READY=1")
            await told("WATCHDOG=1")
            async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as http:
                await http.get("/health")
                server.process.send_signal(signal.SIGTERM)
                await told("STOPPING=1")
                # For a while it is not ready and accepts requests all the same.
                assert (await http.get("/ready")).status_code == 503
                body = {"model": tiny_text.model.name, "prompt": "x", "max_tokens": 1}
                assert (await http.post("/v1/completions", json=body)).status_code == 200
            assert await server.end() == 0


@pytest.mark.slow
async def test_files_on_a_disk_that_hangs_do_not_hold_up_the_end(tiny_text: Tiny, tmp_path: Path) -> None:
    keys, config = tmp_path / "keys.toml", tmp_path / "server.toml"
    key = f'[[keys]]\nhash = "{hash_key("k")}"\ntenant = "t"\n'
    await asyncio.to_thread(keys.write_text, key)
    await asyncio.to_thread(config.write_text, "max_waiting = 5\n")
    async with serving(tiny_text.model, "--keys", str(keys), "--config", str(config)) as server:
        with hanging(keys) as of_keys, hanging(config) as of_config:
            server.process.send_signal(signal.SIGHUP)
            await until(of_keys.is_read)
            await until(of_config.is_read)
            server.process.send_signal(signal.SIGTERM)
            assert await server.end() == 0


async def test_only_progress_feeds_the_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notify"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    monkeypatch.setenv("WATCHDOG_USEC", "3000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        asked: list[bool] = []

        def goes_on() -> bool:
            asked.append(len(asked) < 2)
            return asked[-1]

        feeding = asyncio.ensure_future(Systemd().feed(goes_on))
        while len(asked) < 5:
            await asyncio.sleep(0)
        feeding.cancel()
        receiver.setblocking(False)
        assert [receiver.recv(100) for _ in range(2)] == [b"WATCHDOG=1"] * 2
        with pytest.raises(BlockingIOError):
            receiver.recv(100)
