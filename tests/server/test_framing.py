"""Requests whose end could be understood in two ways: a proxy in front might understand it in the other."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
from typing import Any

import pytest
from support.raw_http import HEALTH as NEXT
from support.raw_http import POST as HEAD
from support.raw_http import answered, connected
from support.server_fixtures import MODEL, Serve

BODY = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 2}).encode()
STATUS = re.compile(rb"HTTP/1\.1 (\d+) ")
LENGTH, CHUNKED = b"content-length: %d" % len(BODY), b"transfer-encoding: chunked"
AS_CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


async def statuses(url: str, data: bytes) -> list[int]:
    """Return the statuses of all answers to ``data``, until the connection is closed."""
    return [int(status) for status in STATUS.findall(await answered(url, data))]


TWICE = [b"\r\n".join(pair) for pair in itertools.product([LENGTH, CHUNKED, b"content-length: 0"], repeat=2)]
ODD_LENGTHS = [b"+5", b"-1", b"0x5", b"5,5", b"5 5", b"", b"5;", b"5.0", b"1e1", b"\xb2", b"%d" % 2**64]
ODD_CODINGS = [b"identity", b"xchunked", b"chunkedx", b'"chunked"', b"chunked;q=1"]
ODD_CODINGS += [b"gzip, chunked", b"gzip,chunked", b"gzip", b"chunked\t", b"chunked \t"]
ODD_CODINGS += [b"deflate\r\ntransfer-encoding: chunked"]
BAD_CODINGS = [b"chunked, identity", b"chunked\r\ntransfer-encoding: identity", b"chunked, chunked"]
BAD_CODINGS += [b"\x0bchunked", b"", b"chunked,", b", chunked"]
ODD_LINES = [
    b"content-length : 5",
    b" content-length: 5",
    b"x: y\r\n content-length: 5",
    b"content-length\0: 5",
]
ODD_LINES += [b"transfer-encoding : chunked", b"x: y\rtransfer-encoding: chunked", b": 5", b"content-length"]
REFUSED = TWICE + [b"content-length: " + value for value in ODD_LENGTHS]
REFUSED += [b"transfer-encoding: " + value for value in BAD_CODINGS]
REFUSED += ODD_LINES


@pytest.mark.parametrize("body", [AS_CHUNKS, BODY, b""])
@pytest.mark.slow
async def test_a_request_without_a_certain_end_is_the_last(body: bytes, serve: Serve) -> None:
    async with serve() as served:
        for framing in REFUSED:
            found = await statuses(served.url, HEAD + framing + b"\r\n\r\n" + body + NEXT * 3)
            assert found == [400], (framing, found)


@pytest.mark.parametrize("body", [AS_CHUNKS, BODY, b""])
@pytest.mark.slow
async def test_codings_that_nobody_knows_are_refused(body: bytes, serve: Serve) -> None:
    async with serve() as served:
        for coding in ODD_CODINGS:
            for more in (b"", b"connection: upgrade\r\nupgrade: h2c\r\n"):
                head = HEAD + more + b"transfer-encoding: " + coding + b"\r\n\r\n"
                found = await statuses(served.url, head + body + NEXT * 3)
                assert found == [501], (coding, more, found)


HOSTS: list[tuple[Any, ...]] = [
    ([], b"1.1", [400]),
    ([b"x", b"y"], b"1.1", [400]),
    ([b"x", b"x"], b"1.1", [400]),
    ([b"x", b"y"], b"1.0", [400]),
    ([], b"1.0", [200]),
    ([b"x"], b"1.0", [200]),
    ([b"x"], b"1.1", [200] * 4),
]


@pytest.mark.slow
async def test_a_request_has_one_host(serve: Serve) -> None:
    async with serve() as served:
        for hosts, version, found in HOSTS:
            lines = [b"GET /health HTTP/" + version, *(b"hOsT: " + host for host in hosts), b"", b""]
            last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
            assert await statuses(served.url, b"\r\n".join(lines) + NEXT * 2 + last) == found, hosts


SIZES = [
    b"+2",
    b"-2",
    b"0x2",
    b" 2",
    b"2 ",
    b"2 2",
    b"",
    b"g",
    b"2\t",
    b"%x" % 2**64,
    b"f" * 40,
    b"2\n{}\r\n",
]


async def test_a_chunk_without_a_certain_size_is_the_last(serve: Serve) -> None:
    async with serve() as served:
        for size in SIZES:
            data = HEAD + CHUNKED + b"\r\n\r\n" + size + b"\r\n{}\r\n0\r\n\r\n" + NEXT * 3
            found = await statuses(served.url, data)
            assert found == [400], (size, found)


OTHERS = [
    (b"\r\nGET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n", 404),
    (b"HEAD /health HTTP/1.1\r\nhost: x\r\n\r\n", 200),
    (HEAD + b"content-length: 5000\r\n\r\n" + b" " * 5000, 413),
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.slow
async def test_each_request_of_many_ends_where_it_says(seed: int, serve: Serve) -> None:
    """With extensions of chunks, zeros before sizes, trailers, and bodies that look like requests; however
    what is sent is cut."""
    draw = random.Random(seed)
    text = json.dumps({"model": MODEL, "prompt": NEXT.decode(), "max_tokens": 1}).encode() + NEXT

    def made() -> tuple[bytes, int]:
        if draw.random() < 0.2:
            return draw.choice(OTHERS)
        body, status = draw.choice([(BODY, 200), (text, 400)])
        if draw.random() < 0.3:
            return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body, status
        parts, at = [], 0
        while at < len(body):
            part = body[at : at + draw.randint(1, 60)]
            at += len(part)
            size = draw.choice([b"%x", b"%X", b"000%x"]) % len(part)
            extension = draw.choice([b"", b";a", b";a=b", b';a="b;\\"c"'])
            parts.append(size + extension + b"\r\n" + part + b"\r\n")
        end = draw.choice([b"0\r\n\r\n", b"0\r\nx-length: 5\r\n\r\n", b"00;a=b\r\nhost: y\r\n\r\n"])
        return HEAD + draw.choice([CHUNKED, CHUNKED.upper()]) + b"\r\n\r\n" + b"".join(parts) + end, status

    sent = [made() for _ in range(12)]
    last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    data = b"".join(request for request, _ in sent) + last
    cuts = sorted(draw.sample(range(1, len(data)), seed * 30))
    async with serve(settings={"max_body_bytes": 2000}) as served:
        reader, writer = await connected(served.url)
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            writer.write(data[start:end])
            await writer.drain()
            await asyncio.sleep(0)
        answers = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        found = [int(status) for status in STATUS.findall(answers)]
        assert found == [*(status for _, status in sent), 200]
        assert served.app.active == 0


OTHER_PROTOCOLS: list[tuple[Any, ...]] = [
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\4\0\0\0\0\0", (400, 505)),
    (b"GET /health HTTP/2.0\r\n\r\n", (505,)),
    (b"GET /health HTTP/0.9\r\n\r\n", (505,)),
    (b"GET /health HTTP/1.2\r\n\r\n", (400, 505)),
    (b"GET /health HTTP/3\r\n\r\n", (400, 505)),
    (b"CONNECT x:443 HTTP/1.1\r\n\r\n", (400, 404, 405)),
    (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", (414,)),
]


@pytest.mark.slow
async def test_other_protocols_are_refused(serve: Serve) -> None:
    async with serve() as served:
        for data, status in OTHER_PROTOCOLS:
            [found] = await statuses(served.url, data + NEXT * 3)
            assert found in status
