"""Cost of a fleet, and its recovery from a loss: `aioengine serve --replicas` against `aioengine serve`.

    python -m benchmarks.server.fleet [--model smollm2-135m] [--rounds 2] [--streams 8 32] [--kill-streams 64]

First one engine's server and a fleet of one replica, each with one thread, take turns: tokens per second and
the processor time of a token (of the door's process only; with one engine, engine and server are one
process). The time that the door adds to the first token is the median difference between the two for requests
of one token, one after the other. Then, with a fleet of two replicas: the time until it serves, and what
happens when a replica gets SIGKILL, or SIGSTOP (a hang), while it streams: when the door notices, when the
streams continue, and, for comparison, how long a new request waits for its first token beside as many
streams. Last, the time from SIGTERM until no process is left. The client runs on the same machine. It takes
about three minutes on two idle cores; a loss from which streams do not come back is given up after a minute
and a half. Prints; asserts nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import httpx
import psutil

from benchmarks.shared.report import arguments

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
LOSS_TOKENS = 96
"""Tokens of a stream that loses its replica."""
START_SECONDS = 300
LOSS_SECONDS = 90
"""Time after which a loss is given up."""


class Server:
    """``aioengine serve`` in a process of its own. ``program``: what Python runs in its place."""

    def __init__(self, model: str, *flags: str, program: Sequence[str] = ("-m", "aioengine")) -> None:
        began = time.monotonic()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        command = [sys.executable, *program, "serve", "--model", model, "--port", "0"]
        command += ["--max-model-len", "1024", "--kv-cache-memory", "512MiB", "--no-enable-prefix-caching"]
        self.process = subprocess.Popen(
            [*command, *flags],
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )
        self.losses: list[float] = []
        """Times at which the door reported the loss of a replica."""
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
        raise SystemExit("the server did not start")

    def _watch(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if re.search(r"replica \S+ is (lost|silent|hung|dead) ", line):
                self.losses.append(time.monotonic())

    def tree(self) -> list[psutil.Process]:
        return [self.own, *self.own.children(recursive=True)]

    def replicas(self) -> list[psutil.Process]:
        return [p for p in self.tree() if any("EngineReplica" in word for word in p.cmdline())]

    def stop(self) -> float:
        """Return the seconds until none of its processes is left."""
        tree = self.tree()
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        _, left = psutil.wait_procs(tree, timeout=30)
        for process in left:
            print(f"  left behind: {process}")
            process.kill()
        return time.monotonic() - began


@contextlib.contextmanager
def served(model: str, *flags: str) -> Iterator[Server]:
    server = Server(model, *flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


async def stream(client: httpx.AsyncClient, index: int, tokens: int, at: list[float]) -> None:
    """Stream a completion, and append the times of its tokens to ``at``."""
    prompt = [1000 + (index * 131 + i * 7) % 20000 for i in range(PROMPT_TOKENS)]
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    body["return_token_ids"] = True  # a part may have no text yet
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        async for line in answer.aiter_lines():
            for choice in json.loads(line[6:]).get("choices", ()) if line.startswith("data: {") else ():
                at += [time.monotonic()] * len(choice.get("token_ids") or ())


async def load(url: str, streams: int, tokens: int) -> list[list[float]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
        times: list[list[float]] = [[] for _ in range(streams)]
        await asyncio.gather(*[stream(client, i, tokens, times[i]) for i in range(streams)])
    return times


def throughput(server: Server, streams: int) -> tuple[float, float]:
    """Return (tokens per second, microseconds of the server's own process for a token)."""
    before, began = sum(server.own.cpu_times()[:2]), time.monotonic()
    asyncio.run(load(server.url, streams, OUTPUT_TOKENS))
    seconds = time.monotonic() - began
    used = sum(server.own.cpu_times()[:2]) - before
    tokens = streams * OUTPUT_TOKENS
    return tokens / seconds, used / tokens * 1e6


def added_by_the_door(plain: Server, fleet: Server, pairs: int = 50) -> float:
    """Return the seconds of a request for one token on an idle server."""
    body = {"model": "m", "prompt": [1000, 1001], "max_tokens": 1, "temperature": 0}
    differences = []
    with httpx.Client(trust_env=False) as client:
        for _ in range(pairs):
            took = []
            for server in (plain, fleet):
                began = time.monotonic()
                client.post(f"{server.url}/v1/completions", json=body).raise_for_status()
                took.append(time.monotonic() - began)
            differences.append(took[1] - took[0])
    return statistics.median(differences)


async def loss(server: Server, streams: int, number: signal.Signals) -> str:
    """Describe what happens to the streams when one of two replicas gets a signal. The streams on that
    replica are recognized by their pauses: they are the half with the longer ones."""
    async with httpx.AsyncClient(base_url=server.url, timeout=600, trust_env=False) as client:
        times: list[list[float]] = [[] for _ in range(streams)]
        tasks = [asyncio.create_task(stream(client, i, LOSS_TOKENS, times[i])) for i in range(streams)]
        while min(map(len, times)) < 20 and not any(task.done() for task in tasks):  # noqa: ASYNC110 - they append
            await asyncio.sleep(0.01)
        new: list[float] = []
        began = time.monotonic()
        await stream(client, streams, 1, new)
        at, known = time.monotonic(), len(server.losses)
        os.kill(server.replicas()[0].pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*tasks), LOSS_SECONDS)
    pauses = []
    for each in times:
        gaps = [(later - earlier, later - at) for earlier, later in pairwise(each) if later > at]
        pauses.append(max(gaps, default=(0.0, 0.0)))
    moved = sorted(pauses)[streams // 2 :]
    first, last = min(back for _, back in moved), max(back for _, back in moved)
    whole = sum(len(each) == LOSS_TOKENS for each in times)
    noticed = min((lost - at for lost in server.losses[known:]), default=float("nan"))
    usual = new[0] - began
    return (
        f"{whole} of {streams} streams complete; noticed after {noticed:.2f} s; the first that moved goes on "
        f"after {first:.2f} s, the last after {last:.2f} s (a new request's first token: {usual:.2f} s)"
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--kill-streams", type=int, default=64)
    given = parser.parse_args()
    began = time.monotonic()
    names = ("--served-model-name", "m")
    with served(given.model, *names) as plain, served(given.model, *names, "--replicas", "1") as fleet:
        print("| streams | server | tokens/s | us/token of its own process |\n|---|---|---|---|")
        for streams in given.streams:
            found: dict[str, list[tuple[float, float]]] = {"one engine": [], "fleet of one": []}
            for _ in range(given.rounds):
                found["one engine"].append(throughput(plain, streams))
                found["fleet of one"].append(throughput(fleet, streams))
            for name, rows in found.items():
                rate, used = (statistics.median(column) for column in zip(*rows, strict=True))
                print(f"| {streams} | {name} | {rate:.0f} | {used:.0f} |", flush=True)
        print(f"the door adds {1e3 * added_by_the_door(plain, fleet):.1f} ms to the first token", flush=True)
    with served(given.model, *names, "--replicas", "2", "--router", "least_loaded") as fleet:
        print(f"a fleet of two serves after {fleet.start_seconds:.1f} s")
        print("kill -9:", asyncio.run(loss(fleet, given.kill_streams, signal.SIGKILL)), flush=True)
        until = time.monotonic() + LOSS_SECONDS
        while len(fleet.replicas()) < 2 and time.monotonic() < until:
            time.sleep(0.5)
        time.sleep(5)
        print("SIGSTOP:", asyncio.run(loss(fleet, given.kill_streams, signal.SIGSTOP)), flush=True)
        print(f"SIGTERM: no process is left after {fleet.stop():.1f} s")
    print(f"all of it took {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
