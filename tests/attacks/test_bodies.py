"""Bodies that are large, deep or odd: a client that streams beside them notices nothing."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
from attacks.table.target import TYPE, filled
from support.bystander import bystander
from support.engine_fixtures import Tiny
from support.server_process import serving

SIZE = 8_000_000


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


async def test_bodies_hold_up_nobody(tiny_text: Tiny) -> None:
    flags = ("--served-model-name", "tiny", "--max-body-bytes", str(2**23))
    async with (
        serving(tiny_text.model, *flags) as server,
        httpx.AsyncClient(base_url=server.url, headers=TYPE, trust_env=False, timeout=60) as http,
        bystander(server.url) as seen,
    ):
        for body in bodies():
            answer = await http.post("/v1/completions", content=body)
            assert answer.status_code in (200, 400), (body[:200], answer.text)
            assert len(answer.content) < 10_000
    seen.check()
