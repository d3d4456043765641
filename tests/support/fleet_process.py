"""``aioengine serve --replicas`` in a process of its own, and Ray with it, in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

START_SECONDS = 150
SMALL = ["--max-model-len", "500", "--kv-cache-memory", "32MiB", "--max-loras", "2", "--max-cpu-loras", "4"]


def needs_ray() -> None:
    """Skips the module where Ray cannot be had."""
    pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")


class FleetServer:
    """``log`` is what it has written so far."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.log = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = ""
        self.name = "aioengine"
        """Of its application."""
        self.key = ""
        """What its client sends, if it asks for one."""

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def wait_until_it_serves(self) -> None:
        until(lambda: "serving at" in self.log or self.process.poll() is not None, START_SECONDS)
        found = re.search(r"serving at (http://\S+)", self.log)
        assert found is not None, self.log
        self.url = found[1]

    @property
    def address(self) -> str:
        """Its Ray cluster's, one of several on this machine."""
        found = re.search(r"runs on Ray at (\S+)", self.log)
        assert found is not None, self.log
        return found[1]

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, headers=headers)

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """The first choice."""
        with self.client() as client:
            body = {"model": "tiny", "prompt": prompt, "temperature": 0, "return_token_ids": True, **fields}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()["choices"][0]
            return found

    def metrics(self, source: str | None = None) -> str:
        """Of all, or of one replica or the gateway."""
        with self.client() as client:
            return client.get("/metrics", params={} if source is None else {"replica": source}).text

    def metric(self, name: str, *, source: str | None = None, **labels: str) -> float:
        """The sum of the samples that have these labels."""
        total = 0.0
        for line in self.metrics(source).splitlines():
            if line.startswith(f"{name}{{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total

    def replicas(self) -> list[psutil.Process]:
        """The processes of replicas that have started, less those that stand still: Serve replaces these."""
        found = [p for p in self.processes() if "EngineReplica" in command_line(p)]
        return [p for p in found if state(p) not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)]

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def healthy(self, count: int = 2) -> bool:
        return self.metric("aioengine_fleet_replica_up") == count


def state(process: psutil.Process) -> str:
    """Its status, also of one that has ended meanwhile."""
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)


def command_line(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about in time"
        time.sleep(0.05)


@contextlib.contextmanager
def fleet_server(model: Path, *flags: str, replicas: int = 2, **environment: str) -> Iterator[FleetServer]:
    """Replicas of ``model``, in float32. All of it is killed at the end if it still runs."""
    command = [sys.executable, "-m", "aioengine", "serve", "--model", str(model), "--port", "0", *SMALL]
    command += ["--dtype", "float32", "--served-model-name", "tiny", "--replicas", str(replicas), *flags]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**clean, **environment})
    started: list[psutil.Process] = []
    server = FleetServer(process)
    try:
        server.wait_until_it_serves()
        started = server.processes()
        yield server
    finally:
        with contextlib.suppress(psutil.Error):
            started += server.processes()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
        process.kill()
        for left in started:
            with contextlib.suppress(psutil.Error):
                left.kill()
