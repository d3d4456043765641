"""What a request, or an adapter's folder, that is meant to do harm does to a client that streams beside it.

A real server is started (SmolLM2-135M) and attacked; a bystander streams greedy completions of one prompt all
the while. Printed is a Markdown table: the bystander's largest and 99th percentile gap between two events,
what the attacker was answered, and how much memory the server and its children took; "before" are the
values at commit e05b9fa, before any of this was looked after.

    make attack
    make attack ARGS="--only grammar prompt"

The exit status is 1 if the bystander waited for more than a second, or got another text; or if the server
took more memory than the attack is allowed, or ended. Needs tests/ on the path, for the bystander.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from support import hostile_grammars as hostile
from support.bystander import bystander, memory
from support.server_process import Serving, serving

MODEL = "smollm2-135m"
EXAMPLE = Path(__file__).parent.parent / "examples" / "adapters" / "sql"
LARGEST_GAP = 1.0
"""Seconds."""
AFTERWARDS = 1.0
"""Seconds that are looked at after the attack."""
START = f'{{"model": "{MODEL}", "max_tokens": 2, "prompt": '
FLAGS = {
    "--max-model-len": "8192",
    "--kv-cache-memory": "1GiB",
    "--max-body-bytes": "8388608",  # so that bodies of all sizes get past that bound
    "--max-loras": "4",
    "--max-lora-rank": "64",
    "--dtype": "auto",
}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TYPE = {"content-type": "application/json"}


class Target:
    """A server under attack."""

    def __init__(self, served: Serving, root: Path, http: httpx.AsyncClient) -> None:
        self.served = served
        self.root = root
        """Its adapters' folders."""
        self.http = http

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps({"model": MODEL, **body})
        return await self.http.post(path, content=content, **options)

    async def ask(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2, **fields})

    async def load(self, name: str) -> str:
        """Uses the adapter of that folder; returns the status."""
        answer = await self.ask(model=name)
        return f"{answer.status_code}, {len(answer.content):,} bytes"

    def adapter(self, name: str, **config: Any) -> Path:
        folder = Path(shutil.copytree(EXAMPLE, self.root / name))
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(settings | config))
        return folder


def filled(before: str, part: str, after: str, size: int = 8_000_000) -> bytes:
    """JSON: many ``part``, with commas between, so that they make ``size`` bytes."""
    return f"{before}{','.join([part] * (size // (len(part) + 1)))}{after}".encode()


def statuses(answers: list[Any]) -> str:
    """Statuses, and how often each."""
    seen = [a.status_code if isinstance(a, httpx.Response) else type(a).__name__ for a in answers]
    return ", ".join(f"{s} ({seen.count(s)}x)" if len(seen) > 1 else str(s) for s in dict.fromkeys(seen))


async def guided(target: Target, *outputs: dict[str, Any], **fields: Any) -> str:
    asks = [target.ask(structured_outputs=wanted, **fields) for wanted in outputs]
    return statuses(await asyncio.gather(*asks, return_exceptions=True))


async def deep_schema(target: Target) -> str:
    return await guided(target, {"json": json.loads(hostile.property_chain(1_000))})


async def deep_rules(target: Target) -> str:
    return await guided(target, {"grammar": hostile.rule_chain(3_000)})


async def slow_compiles(target: Target) -> str:
    """Eight whose clients leave after a second; then others ask for what shared a pool with them."""
    schemas = [{"json": json.loads(hostile.multiples(7919 + 2 * i, 7907))} for i in range(8)]
    leaving = [asyncio.create_task(guided(target, schema)) for schema in schemas]
    await asyncio.wait(leaving, timeout=1)
    for task in leaving:
        task.cancel()
    messages = [{"role": "user", "content": "Hi"}]
    others = [
        target.http.get("/metrics"),
        target.post("/v1/chat/completions", {"messages": messages, "max_tokens": 2}),
        target.ask(structured_outputs={"regex": "[0-9]{3}"}),
        target.ask(prompt="word " * 1000),
    ]
    began = time.monotonic()
    answers = await asyncio.gather(*others)
    return f"others: {statuses(answers)} in {time.monotonic() - began:.1f} s"


async def many_properties(target: Target) -> str:
    return await guided(target, {"json": json.loads(hostile.properties(9_000))})


async def ambiguous(target: Target) -> str:
    return await guided(target, {"grammar": hostile.AMBIGUOUS}, max_tokens=300)


async def twenty_ambiguous(target: Target) -> str:
    rule = 'start: e\ne: e e | e e e | e e e e | /[a-z]/ | /[a-z ]/ | /[^\\n]/ | "{}"'
    grammars = [{"grammar": rule.replace("{}", "x" * i)} for i in range(1, 21)]
    return await guided(target, *grammars, max_tokens=100)


async def long_text(target: Target) -> str:
    return statuses([await target.ask(prompt="a " * 3_500_000)])


async def many_messages(target: Target) -> str:
    messages = [{"role": "user", "content": ""}] * 270_000
    return statuses([await target.post("/v1/chat/completions", {"messages": messages})])


async def detokenize(target: Target) -> str:
    return statuses([await target.post("/detokenize", {"tokens": [65] * 2_000_000})])


async def nested_metadata(target: Target) -> str:
    body = filled(START + '"x", "metadata": [', "[]", "]}")
    return statuses([await target.post("/v1/completions", body)])


async def nested_schema(target: Target) -> str:
    start = (
        START
        + '"x", "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": ['
    )
    return statuses([await target.post("/v1/completions", filled(start, "[]", "]}}}}"))])


async def many_ids(target: Target) -> str:
    return statuses([await target.post("/v1/completions", filled(START + "[", "1", "]}"))])


async def ignored_fields(target: Target) -> str:
    start = START.replace("2,", "150,") + '"x", "ignore_eos": true, "stream": true, "metadata": ['
    body = filled(start, "{}", "]}", 3_000_000)
    return statuses(await asyncio.gather(*(target.post("/v1/completions", body) for _ in range(10))))


async def pipelined(target: Target) -> str:
    async def flood() -> None:
        reader, writer = await asyncio.open_connection(*target.served.address)
        with contextlib.suppress(OSError):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * 13_900)
            while await reader.read(2**18):
                pass

    floods = [asyncio.create_task(flood()) for _ in range(30)]
    await asyncio.sleep(1)
    began = time.monotonic()
    status = statuses([await target.http.get("/health")])
    took = time.monotonic() - began
    await asyncio.wait(floods, timeout=3)
    for task in floods:
        task.cancel()
    return f"/health {status} in {took:.2f} s"


async def bodies_in_flight(target: Target) -> str:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"

    async def stop_short() -> str:
        reader, writer = await asyncio.open_connection(*target.served.address)
        try:
            async with asyncio.timeout(8):
                writer.write(head + b"content-length: 8000000\r\n\r\n{" + b" " * 7_900_000)
                await writer.drain()
                return (await reader.readuntil(b"\r\n"))[9:12].decode()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            return "held" if isinstance(error, TimeoutError) else "closed"
        finally:
            writer.transport.abort()

    seen = await asyncio.gather(*(stop_short() for _ in range(150)))
    return ", ".join(f"{word} ({seen.count(word)}x)" for word in sorted(set(seen)))


async def long_prompt(target: Target) -> str:
    ids = random.Random(0).choices(range(100, 40_000), k=8_000)
    return statuses([await target.ask(prompt=ids, max_tokens=1)])


async def tenant_flood(target: Target) -> str:
    """1,500 requests of tenant a; who streams is tenant b."""
    body = {"max_tokens": 200, "ignore_eos": True}
    asks = [target.post("/v1/completions", {**body, "prompt": f"Number {i}"}) for i in range(1_500)]
    flood = [asyncio.create_task(ask) for ask in asks]
    await asyncio.sleep(6)
    began = time.monotonic()
    answer = await target.post("/v1/completions", body | {"prompt": "b", "max_tokens": 2}, headers=key("b"))
    took = time.monotonic() - began
    done = [task.result().status_code for task in flood if task.done() and task.exception() is None]
    for task in flood:
        task.cancel()
    await asyncio.wait(flood)
    return f"a: 429 ({done.count(429)}x); b: {answer.status_code} in {took:.1f} s"


async def cache_guesses(target: Target) -> str:
    text = "The password of the database on the third floor of the tower is 'tortoise', said the man. " * 3
    found = 0
    for who in ("b", "a"):
        answer = await target.post("/v1/completions", {"prompt": text, "max_tokens": 1}, headers=key(who))
        found = answer.json()["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return f"cached_tokens {found}"


async def paths_of_models(target: Target) -> str:
    text = (await target.http.get("/v1/models")).text
    return "absolute paths" if str(target.root) in text or '"root":"/' in text else "names"


async def wrong_keys(target: Target) -> str:
    before = len(target.served.lines)
    asks = (target.http.get("/v1/models", headers=key("wrong")) for _ in range(2_000))
    answers = await asyncio.gather(*asks, return_exceptions=True)
    await asyncio.sleep(0.5)
    lines = sum("401" in str(line) or "key" in str(line) for line in target.served.lines[before:])
    return f"{statuses(answers)}; {lines} lines in the log"


def key(who: str) -> dict[str, str]:
    return {"authorization": f"Bearer key-of-{who}", **TYPE}


# An adapter's folder


async def patterns(target: Target) -> str:
    target.adapter("pattern", target_modules="(([a-z._0-9]+)*)*!")
    return await target.load("pattern")


async def many_dimensions(target: Target, count: int = 40_000, size: int = 2**63 - 1) -> str:
    header = {"a": {"dtype": "F32", "shape": [size] * count, "data_offsets": [0, 0]}}
    data = json.dumps(header).encode()
    name = f"dimensions{count}"
    (target.adapter(name) / WEIGHTS).write_bytes(struct.pack("<Q", len(data)) + data)
    return await target.load(name)


async def many_empty_dimensions(target: Target) -> str:
    return await many_dimensions(target, 2_000_001, 0)


async def zip_bomb(target: Target) -> str:
    import torch

    folder = target.adapter("zip")
    (folder / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(10)}, folder / "plain.bin")
    with (
        zipfile.ZipFile(folder / "plain.bin") as plain,
        zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for item in plain.namelist():
            if item.endswith("/data/0"):
                with bomb.open(item, "w", force_zip64=True) as file:
                    for _ in range(128):
                        file.write(bytes(2**24))
            else:
                bomb.writestr(item, plain.read(item))
    return await target.load("zip")


async def sparse_pickle(target: Target) -> str:
    folder = target.adapter("sparse")
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").touch()
    os.truncate(folder / "adapter_model.bin", 2**31)
    return await target.load("sparse")


async def longer_than_its_header(target: Target) -> str:
    await target.load(target.adapter("known").name)
    os.truncate(target.adapter("longer") / WEIGHTS, 2**33)
    return await target.load("longer")


async def half_a_file(target: Target) -> str:
    path = target.adapter("half") / WEIGHTS
    os.truncate(path, path.stat().st_size // 2)
    return await target.load("half")


async def large_config(target: Target) -> str:
    (target.adapter("config") / CONFIG).write_bytes(filled('{"runtime_config": [', "[]", "]}", 4_000_000))
    return await target.load("config")


async def pipe(target: Target) -> str:
    """Swapped with a pipe, again and again, while it is loaded."""
    folder = target.adapter("pipe")
    os.mkfifo(folder / "pipe")
    shutil.copy(folder / WEIGHTS, folder / "file")
    ended = False

    def swap() -> None:
        while not ended:
            os.link(folder / "file", folder / "next")
            os.rename(folder / "next", folder / WEIGHTS)
            os.link(folder / "pipe", folder / "next")
            os.rename(folder / "next", folder / WEIGHTS)

    swapping = asyncio.create_task(asyncio.to_thread(swap))
    began = time.monotonic()
    found = [await target.ask(model="pipe") for _ in range(5)]
    ended = True
    await swapping
    return f"{statuses(found)} in {time.monotonic() - began:.1f} s"


class Attack(NamedTuple):
    name: str
    run: Callable[[Target], Awaitable[str]]
    before: str
    memory: int = 400
    """MiB that it may take."""
    keys: bool = False
    """Whether the server has keys, of tenants a and b."""


ATTACKS = [
    Attack("A1 JSON schema of 1,000 levels (75 KB)", deep_schema, "process ends with SIGSEGV"),
    Attack("A1 Lark grammar, 3,000 rules deep (37 KB)", deep_rules, "process ends with SIGSEGV"),
    Attack(
        "A1 8 automaton products, then chat, /metrics, ...",
        slow_compiles,
        "no answers for minutes, +3.9 GB",
        memory=1100,
    ),
    Attack("A1 JSON schema of 9,000 properties", many_properties, "compiles for 11.5 s"),
    Attack("A2 one ambiguous grammar", ambiguous, "595 ms, p99 474 ms"),
    Attack("A2 twenty worse ones", twenty_ambiguous, "1,485 ms, p99 640 ms", memory=1100),
    Attack("A3 prompt of 7 MB", long_text, "16,276 ms"),
    Attack("A3 chat of 270,000 messages", many_messages, "12,786 ms"),
    Attack("A3 /detokenize of 2 M ids", detokenize, "900 ms"),
    Attack("A4 `metadata` of 2.6 M lists", nested_metadata, "3,337 ms"),
    Attack("A4 the same as a schema", nested_schema, "4,205 ms"),
    Attack("A4 prompt of 4 M ids", many_ids, "870 ms"),
    Attack("A4 10 streams with 1 M ignored objects each", ignored_fields, "+596 MB", memory=200),
    Attack("A5 30 x 13,900 pipelined requests", pipelined, "5,501 ms; /health in 20.6 s"),
    Attack("A6 150 bodies that stop short of 8 MB", bodies_in_flight, "+1,082 MB"),
    Attack("A7 1,500 requests of another tenant", tenant_flood, "429 at once for b, each time", keys=True),
    Attack("A8 prompt of 8,000 tokens", long_prompt, "4,900 ms"),
    Attack("A9 what has another tenant sent?", cache_guesses, "cached_tokens 32", keys=True),
    Attack("A10 where are the adapters?", paths_of_models, "absolute paths"),
    Attack("A10 2,000 wrong keys", wrong_keys, "401 and a log line each", keys=True),
    Attack("B11 backtracking pattern in a config", patterns, "for ever"),
    Attack("B12 tensor of 40,000 dimensions (0.8 MB)", many_dimensions, "5,596 ms"),
    Attack("B13 `.bin` of 2 MB with 2 GB of zeros", zip_bomb, "8,567 ms, +2 GB"),
    Attack("B13 sparse `.bin` of 2 GB", sparse_pickle, "1,795 ms, +4.1 GB"),
    Attack("B14 8 GB behind a known header", longer_than_its_header, "200 after 23.6 s, +8.2 GB"),
    Attack("B14 half of a file with a known header", half_a_file, '503 "unexpected RuntimeError"'),
    Attack("B15 config of 4 MB", large_config, "1,618 ms"),
    Attack("B16 tensor of 2,000,001 dimensions", many_empty_dimensions, "400, 6,000,299 bytes"),
    Attack("B17 file swapped with a pipe", pipe, "no answer"),
]


class Peak:
    """The most that the server and its children held, beyond what they did before."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # begin VmHWM afresh
        self._begin = memory(pid) + self._children()
        self._most = 0

    def _children(self) -> int:
        total = 0
        for child in psutil.Process(self._pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += child.memory_full_info().uss
        return total

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            self._most = max(self._most, memory(self._pid) + self._children())

    def grown(self) -> int:
        return max(self._most, memory(self._pid, "VmHWM") + self._children(), self._begin) - self._begin


async def row(attack: Attack, target: Target) -> tuple[str, str]:
    """Its row of the table, and what is wrong with it."""
    peak = Peak(target.served.process.pid)
    watching = asyncio.create_task(peak.watch())
    wrong = ""
    try:
        async with bystander(target.served.url, model=MODEL, key="key-of-b", max_tokens=40) as seen:
            try:
                async with asyncio.timeout(60):
                    answer = await attack.run(target)
                await asyncio.sleep(AFTERWARDS)
            except (httpx.HTTPError, OSError, TimeoutError) as error:
                answer = wrong = f"no answer: {error!r}"
        seen.check(LARGEST_GAP)
    except (AssertionError, OSError, ValueError) as error:
        wrong = str(error)
    watching.cancel()
    gaps = sorted(seen.gaps) or [math.nan]
    grown = peak.grown() / 2**20
    if grown > attack.memory:
        wrong = f"took {grown:.0f} MiB"
    cells = f"{gaps[-1] * 1e3:,.0f}", f"{gaps[len(gaps) * 99 // 100] * 1e3:,.0f}", answer, f"{grown:,.0f}"
    return f"| {attack.name} | {attack.before} | {' | '.join(cells)} |", wrong


@contextlib.asynccontextmanager
async def target(*flags: str) -> AsyncIterator[Target]:
    words = [word for pair in FLAGS.items() for word in pair]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        async with (
            serving(MODEL, *words, "--adapter-root", folder, *flags) as served,
            httpx.AsyncClient(
                base_url=served.url,
                headers=key("a"),
                timeout=60,
                trust_env=False,
                limits=httpx.Limits(max_connections=None),
            ) as http,
        ):
            yield Target(served, root, http)


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="attacks with one of these words in the name")
    only = parser.parse_args().only
    wanted = [a for a in ATTACKS if any(word.lower() in a.name.lower() for word in only)]
    print("| attack | before | largest gap, ms | p99, ms | answer | memory, MiB |\n|---|---|---|---|---|---|")
    failures = []
    for keys in (False, True):
        flags = ("--api-key", "a:key-of-a", "--api-key", "b:key-of-b") if keys else ()
        attacks = [attack for attack in wanted if attack.keys is keys]
        if not attacks:
            continue
        async with target(*flags) as found:
            await found.ask(structured_outputs={"regex": "warm"})
            for attack in attacks:
                line, wrong = await row(attack, found)
                print(line, flush=True)
                if wrong:
                    failures.append(f"{attack.name}: {wrong}")
                if found.served.process.returncode is not None:
                    failures.append(f"{attack.name}: the server ended")
                    break
    print(*failures, sep="\n", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
