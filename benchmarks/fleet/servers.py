"""``aioengine serve`` in a process of its own, and clients that stream from it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import psutil

from benchmarks.shared.engines import OUTPUT, PROMPT

START_SECONDS = 300


class Server:
    """A server, with ``replicas`` of a fleet or without one."""

    def __init__(self, model: str, *flags: str, replicas: int = 0) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "aioengine", "serve", "--port", "0"]
        command += ["--model", model, "--served-model-name", "m", "--max-model-len", "1024"]
        command += ["--kv-cache-memory", "512MiB", "--no-enable-prefix-caching", *flags]
        command += ["--replicas", str(replicas)] if replicas else []
        began = time.monotonic()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.losses: list[float] = []
        """Times at which the gateway reported the loss of a replica."""
        self.url = self._url(began)
        threading.Thread(target=self._watch, daemon=True).start()
        self.start_seconds = time.monotonic() - began
        self.own = psutil.Process(self.process.pid)

    def _url(self, began: float) -> str:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"serving at (http://\S+)", line):
                return found[1]
            if time.monotonic() - began > START_SECONDS:
                break
        raise RuntimeError("the server did not start")

    def _watch(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if re.search(r"replica \S+ is (lost|silent|hung|dead) ", line):
                self.losses.append(time.monotonic())

    def replicas(self) -> list[psutil.Process]:
        children = self.own.children(recursive=True)
        return [process for process in children if any("EngineReplica" in word for word in process.cmdline())]

    def stop(self) -> float:
        """Return the seconds until none of its processes is left."""
        tree = [self.own, *self.own.children(recursive=True)]
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for process in psutil.wait_procs(tree, timeout=30)[1]:
            process.kill()
        return time.monotonic() - began


@contextlib.contextmanager
def served(model: str, *flags: str, replicas: int = 0) -> Iterator[Server]:
    """Context with a server, which ends with it."""
    server = Server(model, *flags, replicas=replicas)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def used(process: psutil.Process) -> float:
    """Return the processor seconds of all its threads so far."""
    return sum(process.cpu_times()[:2])


async def stream(
    client: httpx.AsyncClient, index: int, tokens: int, at: list[float], model: str = "m"
) -> None:
    """Stream a completion, and append the times of its tokens to ``at``."""
    prompt = [1000 + (index * 131 + i * 7) % 20000 for i in range(PROMPT)]
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    body |= {"return_token_ids": True, "stream": True}  # a part may have no text yet
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            for choice in json.loads(line[6:]).get("choices", ()) if line.startswith("data: {") else ():
                at += [time.monotonic()] * len(choice.get("token_ids") or ())


def client_of(server: Server) -> httpx.AsyncClient:
    """Return a client without a bound on connections."""
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits, trust_env=False)


async def throughput(
    server: Server, streams: int, tokens: int = OUTPUT, models: tuple[str, ...] = ("m",)
) -> dict[str, float]:
    """Return tokens a second, and the microseconds of the server's processes for a token."""
    processes = {"own process": server.own, **dict(zip(("a replica",), server.replicas(), strict=False))}
    before, began = [used(process) for process in processes.values()], time.monotonic()
    async with client_of(server) as client:
        asked = [stream(client, i, tokens, [], models[i % len(models)]) for i in range(streams)]
        await asyncio.gather(*asked)
    seconds, made = time.monotonic() - began, streams * tokens
    costs = {
        f"{name}, us/token": 1e6 * (used(process) - was) / made
        for (name, process), was in zip(processes.items(), before, strict=True)
    }
    return {"output tok/s": made / seconds, **costs}


async def first_token(server: Server) -> dict[str, float]:
    """Return the milliseconds of a request for one token on an idle server."""
    async with client_of(server) as client:
        began = time.perf_counter()
        await stream(client, 0, 1, [])
        return {"first token, ms": 1e3 * (time.perf_counter() - began)}
