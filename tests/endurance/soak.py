"""Mixed load for a long time: swaps, streams, guided decoding, adapters loaded over HTTP, and bad clients.

A server with a tiny model is loaded for ``--minutes``, in rounds. After each round it has time to become
idle, and the resources that it holds are counted. Prints a Markdown table with a row for each round.

    make soak
    make soak ARGS="--minutes 0.25"

The exit status is 1 if anything leaks from the second round on (file descriptors, threads, tasks, processes,
memory, KV blocks, open requests), if an answer is not what it should be, if the log has an error, or if the
server does not end with 0. Needs tests/ on the path.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import re
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import transformers
from support.server_process import Serving, serving
from support.tiny_chat import build_chat_model
from support.tiny_models import build_adapter

ADAPTERS = tuple(f"adapter-{i}" for i in range(6))
FLAGS = ["--max-loras", "2", "--max-cpu-loras", "3", "--max-lora-rank", "8", "--max-num-seqs", "16"]
FLAGS += ["--served-model-name", "tiny"]
CLIENTS = 16
ROUNDS = 6
MEMORY = 24 * 2**20
"""Bytes that the last round may take more than the second; the allocator alone causes about 10 MiB."""
SPARE = {"descriptors": 4, "threads": 2, "tasks": 2, "processes": 0}
"""Allowed differences: a connection that is being closed, a pool's thread that was not needed before."""


class Target(NamedTuple):
    """A running server, a client of it, and its adapters' folders."""

    served: Serving
    http: httpx.AsyncClient
    root: Path

    async def metric(self, name: str) -> float:
        """Return the sum of its samples."""
        text = (await self.http.get("/metrics")).text
        return sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))


@contextlib.asynccontextmanager
async def target_in(folder: Path) -> AsyncIterator[Target]:
    """Run a server whose model and adapters are made in ``folder``. One adapter is broken."""
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    model, root = build_chat_model(folder / "tiny"), folder / "adapters"
    for seed, name in enumerate(ADAPTERS):
        build_adapter(model, root / name, seed=seed, r=8)
    broken = build_adapter(model, root / "broken", r=8) / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    limits = httpx.Limits(max_connections=None)
    async with (
        serving(model, *FLAGS, "--adapter-root", str(root)) as server,
        httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False, limits=limits) as http,
    ):
        yield Target(server, http, root)


class Held(NamedTuple):
    """Resources that an idle server holds."""

    descriptors: int
    threads: int
    tasks: int
    processes: int
    memory: int
    kv_used: float
    open_requests: float


class Client:
    """One of many clients with mixed requests; ``seen`` counts kinds of requests with their answers."""

    def __init__(self, target: Target, seed: int, seen: Counter[tuple[str, object]]) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._seen = seen
        kinds: list[tuple[int, Callable[[], Awaitable[object]]]] = [
            (40, self.stream),
            (20, self.whole),
            (10, self.guided),
            (10, self.leaves),
            (5, self.unknown_model),
            (5, self.broken_adapter),
            (5, self.no_json),
            (3, self.replaces_an_adapter),
            (2, self.scrapes),
        ]
        self._kinds = [kind for _, kind in kinds]
        self._weights = [weight for weight, _ in kinds]

    async def run(self, until: float) -> None:
        while time.monotonic() < until:
            kind = self._random.choices(self._kinds, self._weights)[0]
            try:
                answer = await kind()
            except httpx.HTTPError as error:
                answer = type(error).__name__
            self._seen[getattr(kind, "__name__", ""), answer] += 1

    def _model(self) -> str:
        return self._random.choice(("tiny", *ADAPTERS))

    async def post(self, path: str, **body: object) -> int:
        return (await self._target.http.post(path, json=body)).status_code

    async def stream(self) -> object:
        body = {"model": self._model(), "prompt": "Hi", "max_tokens": self._random.randint(1, 24)}
        async with self._target.http.stream(
            "POST", "/v1/completions", json=body | {"stream": True}
        ) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        return answer.status_code if lines[-1] == "data: [DONE]" else "cut off"

    async def whole(self) -> object:
        messages, n = [{"role": "user", "content": "Hello"}], self._random.randint(1, 3)
        body = {"model": self._model(), "messages": messages, "max_tokens": 8, "n": n}
        return await self.post("/v1/chat/completions", **body)

    async def guided(self) -> object:
        regex = f"[a-{self._random.choice('cdefg')}]{{4}}"
        body = {"model": self._model(), "prompt": "Hi", "structured_outputs": {"regex": regex}}
        return await self.post("/v1/completions", **body)

    async def leaves(self) -> object:
        body = {"model": self._model(), "prompt": "Hi", "max_tokens": 200, "ignore_eos": True, "stream": True}
        async with self._target.http.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        return answer.status_code

    async def unknown_model(self) -> object:
        return await self.post("/v1/completions", model=f"nobody-{self._random.randint(0, 999)}", prompt="Hi")

    async def broken_adapter(self) -> object:
        return await self.post("/v1/completions", model="broken", prompt="Hi")

    async def no_json(self) -> object:
        content, headers = self._random.randbytes(200), {"content-type": "application/json"}
        answer = await self._target.http.post("/v1/completions", content=content, headers=headers)
        return answer.status_code

    async def replaces_an_adapter(self) -> object:
        name = self._random.choice(ADAPTERS)
        path = str(self._target.root / name)
        return await self.post("/v1/load_lora_adapter", lora_name=name, lora_path=path, load_inplace=True)

    async def scrapes(self) -> object:
        return (await self._target.http.get("/metrics")).status_code


EXPECTED = {
    "unknown_model": {404},
    "broken_adapter": {400},
    "no_json": {400},
    "replaces_an_adapter": {200, 409},
}
"""Expected statuses by kind of request, if not 200. 409: two clients replace an adapter at the same time."""


async def held(target: Target) -> Held:
    """Wait until the server is idle, at most half a minute, and count."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if not await target.metric("aioengine_requests_waiting") + await target.metric(
            "aioengine_requests_running"
        ):
            break
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.3)
    own = psutil.Process(target.served.process.pid)
    found = [own, *own.children(recursive=True)]
    return Held(
        sum(process.num_fds() for process in found),
        sum(process.num_threads() for process in found),
        int(await target.metric("aioengine_event_loop_tasks")),
        len(found),
        sum(_memory(process) for process in found),
        await target.metric("aioengine_kv_cache_usage_ratio"),
        await target.metric("aioengine_requests_running") + await target.metric("aioengine_requests_waiting"),
    )


def _memory(process: psutil.Process) -> int:
    return int(process.memory_full_info().uss)


def leaks(rounds: list[Held]) -> list[str]:
    """Return what leaks after the first round, in which pools and caches fill."""
    if len(rounds) < 3:
        return []
    first, last = rounds[1], rounds[-1]
    found = [
        f"{name}: {getattr(first, name)} after the second round, {getattr(last, name)} after the last"
        for name, spare in SPARE.items()
        if getattr(last, name) > getattr(first, name) + spare
    ]
    if last.memory > first.memory + MEMORY:
        found.append(
            f"memory: {(last.memory - first.memory) / 2**20:.0f} MiB more than after the second round"
        )
    if last.kv_used or last.open_requests:
        found.append(
            f"{last.open_requests:.0f} requests are open, and {last.kv_used:.1%} of the KV cache is used"
        )
    return found


async def soak(seconds: float, seed: int) -> list[str]:
    """Return what is wrong."""
    wrong: list[str] = []
    seen: Counter[tuple[str, object]] = Counter()
    rounds: list[Held] = []
    print(
        "| round | answers | fds | threads | tasks | processes | memory, MiB |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        async with target_in(Path(folder)) as target:
            for number in range(ROUNDS):
                until = time.monotonic() + seconds / ROUNDS
                clients = [Client(target, seed + number * CLIENTS + i, seen) for i in range(CLIENTS)]
                await asyncio.gather(*[client.run(until) for client in clients])
                now = await held(target)
                rounds.append(now)
                cells = (number + 1, sum(seen.values()), *now[:4], f"{now.memory / 2**20:.0f}")
                print(f"| {' | '.join(map(str, cells))} |", flush=True)
            wrong += leaks(rounds)
            errors = [line["message"] for line in target.served.lines if line.get("level") == "error"]
            wrong += [f"the log has an error: {message}" for message in errors]
            target.served.process.send_signal(signal.SIGTERM)
            code = await target.served.end()
            if code != 0:
                wrong.append(f"the server ended with {code}")
    print("\n| request | answers |\n|---|---|")
    for kind in sorted({kind for kind, _ in seen}):
        answers = {answer: count for (asked, answer), count in seen.items() if asked == kind}
        print(f"| {kind} | {', '.join(f'{answer}: {count}' for answer, count in answers.items())} |")
        unexpected = answers.keys() - EXPECTED.get(kind, {200})
        if unexpected:
            wrong.append(f"{kind} was answered {', '.join(map(str, unexpected))}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    wrong = asyncio.run(soak(arguments.minutes * 60, arguments.seed))
    print(*wrong, sep="\n", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
