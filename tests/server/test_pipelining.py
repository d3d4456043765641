"""Answers to those who still send, or who speak an older or another HTTP."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from support.raw_http import POST as HEAD
from support.raw_http import answered, connected
from support.server_fixtures import MODEL, Serve

BODY = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 2}).encode()
STATUS = re.compile(rb"HTTP/1\.1 (\d+) ")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.slow
async def test_http_1_0_gets_no_chunks(stream: bool, serve: Serve) -> None:
    body = json.dumps({"model": MODEL, "prompt": "Hello", "max_tokens": 3, "stream": stream}).encode()
    head = b"POST /v1/completions HTTP/1.0\r\nhost: x\r\ncontent-type: application/json\r\n"
    async with serve() as served:
        answer = await answered(served.url, head + b"content-length: %d\r\n\r\n" % len(body) + body)
    headers, _, rest = answer.partition(b"\r\n\r\n")
    assert b" 200 " in headers and b"\r\nconnection: close" in headers
    assert b"transfer-encoding" not in headers and (b"content-length" in headers) != stream
    if stream:
        assert rest.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")
    else:
        assert rest.startswith(b"{") and rest.endswith(b"}")


async def test_an_answer_in_one_piece_is_written_in_one(serve: Serve) -> None:
    async with serve() as served:
        reader, writer = await connected(served.url)
        for request in (b"GET", b"HEAD"):
            writer.write(request + b" /health HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(2**16), 60)
            headers, _, rest = answer.partition(b"\r\n\r\n")
            assert headers.startswith(b"HTTP/1.1 200") and bool(rest) == (request == b"GET")
        writer.close()


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("length", [b"content-length: 9000000", b"transfer-encoding: chunked"])
@pytest.mark.slow
async def test_413_reaches_who_sends_the_whole_body_first(close: bool, length: bytes, serve: Serve) -> None:
    async with serve(settings={"max_body_bytes": 1000}) as served:
        reader, writer = await connected(served.url)
        writer.write(HEAD + length + (b"\r\nconnection: close" if close else b"") + b"\r\n\r\n")
        for _ in range(90):
            part = b" " * 100_000
            writer.write(b"%x\r\n%b\r\n" % (len(part), part) if length.startswith(b"t") else part)
            await asyncio.wait_for(writer.drain(), 60)
        if length.startswith(b"t"):
            writer.write(b"0\r\n\r\n")
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        assert head.startswith(b"HTTP/1.1 413")
        assert (b"connection: close" in head) == close
        if not close:  # and the connection goes on
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        rest = await asyncio.wait_for(reader.read(), 60)
        assert (b"HTTP/1.1 200" in rest) != close
        writer.close()


@pytest.mark.parametrize(("size", "status"), [(9_000_000, b"413"), (len(BODY), b"100")])
@pytest.mark.slow
async def test_who_asks_before_sending_is_told(size: int, status: bytes, serve: Serve) -> None:
    async with serve(settings={"max_body_bytes": 1000}) as served:
        reader, writer = await connected(served.url)
        writer.write(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % size)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        assert head.startswith(b"HTTP/1.1 " + status)
        if status == b"413":  # the body does not come, so what follows could not be told from it
            assert b"connection: close" in head
            assert await asyncio.wait_for(reader.read(), 60)
        else:
            writer.write(BODY)
            assert (await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_lines_that_end_in_another_way_get_one_answer_at_most(serve: Serve) -> None:
    async with serve(listen={"header_timeout": 0.2}) as served:
        answer = await answered(served.url, b"GET /health HTTP/1.1\nhost: x\n\n" * 1000)
        assert len(STATUS.findall(answer)) <= 1
