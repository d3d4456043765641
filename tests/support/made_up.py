"""Sends made-up requests to a server, badly.

Bodies are cut off, cut in pieces, sent slowly or with another length than they say; connections are closed at
any point, and answers are read slowly or not at all. It runs in a process of its own, so that it does not
share the server's interpreter:

    python -m support.made_up URL MODEL --seconds 20 --seed 0

A request and the way in which it is sent depend on the seed and the request's number alone. It prints a
report as JSON: how often each status came, and each answer that no server should give, with the request's
number. ``--only 7 8`` sends these numbers again, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from support.made_requests import Made, Maker

PATIENCE = 60.0
"""Seconds until an answer has to be complete."""
AFTERWARDS = 5.0
"""Seconds after the time is over in which answers are still waited for. Then the clients leave."""
REFUSED_LATER = (503, 504)
"""Statuses from 500 on with which a server may refuse what it would answer at another time."""
LONGEST_REFUSAL = 8_000
WAYS = {"plain": 60, "pieces": 8, "chunked": 8, "half": 6, "leave": 8, "slow": 4, "length": 3, "twice": 3}
"""Ways to send a request, and how often each is drawn."""


def fault(made: Made, way: str, status: int, head: bytes, body: bytes) -> str | None:
    """Return what is wrong with an answer that came as a whole."""
    if status >= 500 and status not in REFUSED_LATER:
        return "a fault of the server"
    if len(body) > LONGEST_REFUSAL and status >= 400:
        return "a long refusal"
    if status >= 400 and way == "plain" and made.method != "HEAD":  # the protocol's own refusals are plain
        with contextlib.suppress(ValueError, LookupError, TypeError):
            if json.loads(body)["error"]["message"]:
                return None
        return "a refusal without a reason"
    if status == 200 and b"text/event-stream" in head and not body.rstrip().endswith((b"[DONE]", b"}")):
        return "a stream without its end"
    return None


class Sender:
    """Sends requests, and notes the answers."""

    def __init__(self, url: str, maker: Maker, seed: int, key: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port or 80
        self._maker = maker
        self._seed = seed
        self._key = key
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def send(self, number: int) -> None:
        draw = random.Random(f"{self._seed} {number}")
        made = self._maker.request(draw)
        [way] = draw.choices(list(WAYS), list(WAYS.values()))
        why: str | None = None
        try:
            async with asyncio.timeout(PATIENCE):
                why = await self._exchange(made, way, draw)
        except asyncio.CancelledError:
            self.statuses["left"] += 1
            raise
        except TimeoutError:
            why = None if way == "slow" else f"no whole answer in {PATIENCE:g} s"
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            self.statuses["closed"] += 1
            why = f"no answer: {error!r}" if way == "plain" else None
        if why is not None and len(self.wrong) < 50:
            request = f"{made.method} {made.path[:300]} ({made.kind}) {made.body[:500]!r}"
            self.wrong.append(f"number {number}, {way}, {request}: {why}")

    async def _exchange(self, made: Made, way: str, draw: random.Random) -> str | None:
        reader, writer = await asyncio.open_connection(*self._address, limit=2**16)
        data = self._bytes(made, way, draw)
        sending = asyncio.ensure_future(_write(writer, data, draw.randint(2, 30) if way == "pieces" else 1))
        try:
            if way in ("half", "length", "leave"):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(2 * draw.random()):
                        await reader.read(draw.randrange(1, 2000))
                        await asyncio.sleep(1 if way == "half" else 0)
                return None
            head = await reader.readuntil(b"\r\n\r\n")
            body = b"".join([part async for part in _parts(reader, slowly=way == "slow")])
        finally:
            sending.cancel()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await sending
            writer.transport.abort()
        self.statuses[head[9:12].decode()] += 1
        if b"transfer-encoding: chunked" in head.lower():
            body = b"".join(_unchunked(body))
        why = None if way == "twice" else fault(made, way, int(head[9:12]), head, body)
        return why and f"{why}: {head[9:12].decode()} {body[:300]!r}"

    def _bytes(self, made: Made, way: str, draw: random.Random) -> bytes:
        length = len(made.body) + (draw.choice([-3, 5, 10**6]) if way == "length" else 0)
        lines = [
            f"{made.method} {made.path} HTTP/1.1",
            "host: localhost",
            "connection: close",
            f"authorization: Bearer {self._key}",
            "transfer-encoding: chunked" if way == "chunked" else f"content-length: {max(0, length)}",
            *([f"content-type: {made.kind}"] if made.kind else []),
        ]
        body = b"".join(_chunked(made.body, draw)) if way == "chunked" else made.body
        data = "\r\n".join([*lines, "\r\n"]).encode() + body
        if way == "half":
            return data[: draw.randrange(1, len(data) + 1)]
        return data * 2 if way == "twice" else data


async def _write(writer: asyncio.StreamWriter, data: bytes, pieces: int) -> None:
    size = max(1, len(data) // pieces)
    for begin in range(0, len(data), size):
        writer.write(data[begin : begin + size])
        await writer.drain()
        await asyncio.sleep(0.01)


async def _parts(reader: asyncio.StreamReader, *, slowly: bool) -> AsyncIterator[bytes]:
    while part := await reader.read(300 if slowly else 2**16):
        yield part
        if slowly:
            await asyncio.sleep(0.02)


def _chunked(body: bytes, draw: random.Random) -> Iterator[bytes]:
    size = draw.choice([1, 100, 4096]) if len(body) < 5_000 else 65_536
    for begin in range(0, len(body), size):
        part = body[begin : begin + size]
        yield b"%x\r\n%b\r\n" % (len(part), part)
    yield b"0\r\n\r\n"


def _unchunked(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        end = data.index(b"\r\n", at)
        size = int(data[at:end], 16)
        yield data[end + 2 : end + 2 + size]
        at = end + 4 + size


async def attack(sender: Sender, numbers: Iterable[int], *, seconds: float, clients: int) -> None:
    """Send requests of these numbers, from ``clients`` clients side by side, until the time is over. Requests
    that ask for much may be open then; their clients leave."""
    until, left = time.monotonic() + seconds, iter(numbers)

    async def client() -> None:
        for number in left:
            await sender.send(number)
            if time.monotonic() > until:
                return

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    await asyncio.wait(tasks, timeout=seconds + AFTERWARDS)
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended


def document_of(url: str, key: str) -> Any:
    ask = urllib.request.Request(f"{url}/docs/openapi.json", headers={"authorization": f"Bearer {key}"})
    with urllib.request.urlopen(ask, timeout=PATIENCE) as answer:
        return json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--key", default="none")
    parser.add_argument("--count", type=int, help="send no more requests than this")
    parser.add_argument("--only", type=int, nargs="+", help="send the requests of these numbers only")
    asked = parser.parse_args()
    maker = Maker(document_of(asked.url, asked.key), asked.model)
    sender = Sender(asked.url, maker, asked.seed, asked.key)
    numbers = asked.only or itertools.islice(itertools.count(), asked.count)
    clients = 1 if asked.only else asked.clients
    asyncio.run(attack(sender, numbers, seconds=asked.seconds, clients=clients))
    json.dump({"statuses": sender.statuses, "wrong": sender.wrong}, sys.stdout)


if __name__ == "__main__":
    main()
