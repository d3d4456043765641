"""Bodies that are large, deep or odd: a client that streams beside them notices nothing, and nothing of
them is kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import pytest_asyncio
from support.bystander import bystander, memory
from support.engine_fixtures import Tiny
from support.server_process import Serving, serving

SIZE = 8_000_000
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tiny_text: Tiny) -> AsyncIterator[Serving]:
    flags = ("--served-model-name", "tiny", "--max-body-bytes", str(2**23))
    async with serving(tiny_text.model, *flags) as server:
        yield server


def client(url: str) -> httpx.AsyncClient:
    headers = {"content-type": "application/json"}
    return httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=60)


def filled(before: str, part: str, after: str, size: int = SIZE) -> bytes:
    """As many of ``part``, with commas between, as make ``size`` bytes."""
    return f"{before}{','.join([part] * (size // (len(part) + 1)))}{after}".encode()


def bodies() -> Iterator[bytes]:
    """For /v1/completions; each about as large as the server takes."""
    start = '{"model": "tiny", "max_tokens": 2, "prompt": '
    for part in ("[]", "{}", '{"a": [1]}', "[[[[[[]]]]]]", '"a"', '"["', "0", "12345", "1e9", "null"):
        yield filled(start + '"x", "metadata": [', part, "]}")
        yield filled(start + "[", part, "]}")
        for field in ("stop", "stop_token_ids", "logit_bias", "nobody", "tools"):
            yield filled(start + f'"x", "{field}": [', part, "]}", SIZE // 8)
    schema = '"x", "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": ['
    yield filled(start + schema, "{}", "]}}}}")
    yield filled(start + '"x", "logit_bias": {', '"5": 1', "}}")
    yield filled(start + '"x", "metadata": {', '"\\\\\\"[": 1', "}}")
    yield (start + "[" * SIZE).encode()
    yield (start + '"x", "user": ' + "[" * (SIZE // 2) + "]" * (SIZE // 2) + "}").encode()
    yield (start + '"x", "seed": ' + "1" * SIZE + "}").encode()
    yield b"\xff" * SIZE


async def test_bodies_hold_up_nobody(server: Serving) -> None:
    async with client(server.url) as http, bystander(server.url) as seen:
        for body in bodies():
            answer = await http.post("/v1/completions", content=body)
            assert answer.status_code in (200, 400), (body[:200], answer.text)
            assert len(answer.content) < 10_000
    seen.check()


def bodies_with_json_in_texts() -> Iterator[tuple[str, bytes]]:
    """JSON that is a text in JSON, which is decoded when the body has been."""
    start = '{"model": "tiny", "max_tokens": 2, '
    for part in ("[]", "[{}]", '{\\"a\\": []}', '\\"\\"'):
        text = f'"[{",".join([part] * (SIZE // (len(part) + 1)))}]"'
        piece = f'"[{",".join([part] * (SIZE // 100 // (len(part) + 1)))}]"'
        for arguments in ([text], [piece] * 100):
            calls = ",".join(
                f'{{"id": "x", "type": "function", "function": {{"name": "f", "arguments": {one}}}}}'
                for one in arguments
            )
            turn = f'{{"role": "assistant", "content": "", "tool_calls": [{calls}]}}'
            yield "/v1/chat/completions", f'{start}"messages": [{turn}]}}'.encode()
        call = f'{{"type": "function_call", "call_id": "x", "name": "f", "arguments": {text}}}'
        yield "/v1/responses", f'{{"model": "tiny", "input": [{call}]}}'.encode()
        for field in ("prompt", "stop", "cache_salt"):
            rest = "" if field == "prompt" else '"prompt": "x", '
            yield "/v1/completions", f'{start}{rest}"{field}": {text}}}'.encode()


async def test_json_in_texts_holds_up_nobody(server: Serving) -> None:
    async with client(server.url) as http, bystander(server.url) as seen:
        for path, body in bodies_with_json_in_texts():
            answer = await http.post(path, content=body)
            assert answer.status_code == 400, (path, body[:200], answer.text[:300])
            assert len(answer.content) < 3000
    seen.check()


@pytest.mark.slow
async def test_ignored_fields_are_not_kept_while_an_answer_is_streamed(server: Serving) -> None:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 450, "ignore_eos": True, "stream": True}
    start = json.dumps(body)[:-1] + ', "metadata": ['
    sent = filled(start, "{}", "]}", 60_000)
    large = start + '"' + "x" * 1_000_000 + '"]}'
    async with client(server.url) as http:
        first = await http.post("/v1/completions", content=json.dumps({**body, "stream": False}))
        assert first.status_code == 200
        before = memory(server.process.pid)
        streaming, ended = asyncio.Semaphore(0), asyncio.Event()

        async def held(content: bytes | str) -> None:
            async with http.stream("POST", "/v1/completions", content=content) as answer:
                assert answer.status_code == 200
                await anext(answer.aiter_lines())
                streaming.release()
                await ended.wait()

        tasks = [asyncio.create_task(held(content)) for content in [sent, large] * 20]
        for _ in tasks:
            await asyncio.wait_for(streaming.acquire(), 60)
        grown = memory(server.process.pid) - before
        ended.set()
        await asyncio.gather(*tasks)
    assert grown < 40 * 2**20
