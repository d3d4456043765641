"""Odd numbers, texts and shapes in every field of every request: refused or harmless."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.server_fixtures import MODEL, Serve

from aioengine.server.messages import CountRequest, MessagesRequest
from aioengine.server.openai.adapters import LoadRequest, UnloadRequest
from aioengine.server.openai.api import ChatRequest, CompletionRequest
from aioengine.server.openai.tokens import DetokenizeRequest, TokenizeRequest
from aioengine.server.responses import ResponsesRequest

MESSAGES = [{"role": "user", "content": "Hi"}]
REQUESTS: dict[str, tuple[type[msgspec.Struct], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, {"model": MODEL, "messages": MESSAGES, "max_tokens": 2}),
    "/v1/completions": (CompletionRequest, {"model": MODEL, "prompt": "Hi", "max_tokens": 2}),
    "/v1/responses": (ResponsesRequest, {"model": MODEL, "input": "Hi", "max_output_tokens": 2}),
    "/v1/messages": (MessagesRequest, {"model": MODEL, "messages": MESSAGES, "max_tokens": 2}),
    "/v1/messages/count_tokens": (CountRequest, {"model": MODEL, "messages": MESSAGES}),
    "/tokenize": (TokenizeRequest, {"prompt": "Hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
    "/v1/load_lora_adapter": (LoadRequest, {"lora_name": "x", "lora_path": "x"}),
    "/v1/unload_lora_adapter": (UnloadRequest, {"lora_name": "x"}),
}
TEXTS = [
    *("", ".", "..", "a/../..", "/", "//", "a" * 5000, "\0", "\ud800", "\n", "%2e%2e", "~"),
    *("hf:a/b", "s3://a/b"),
]
ODD = [
    *map(str, (2**62, -(2**62), 2**63, 2**64, -(2**64), 2**31, -1, -(10**300))),
    "9" * 5000,
    *("1e308", "-1e308", "1e400", "5e-324", "-0.0", "0.1", "NaN", "Infinity", "-Infinity", '"NaN"', '"1"'),
    *("true", "[]", "{}", "[null]", "[1e308]", '{"1": 1e400}', '{"-1": 0}', "[" * 2000 + "null" + "]" * 2000),
]


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.slow
async def test_odd_values_are_refused_or_harmless(path: str, serve: Serve, tmp_path: Path) -> None:
    struct, base = REQUESTS[path]
    values = [*ODD, *map(json.dumps, TEXTS)] if "lora" in path else ODD
    async with serve(adapter_root=str(tmp_path)) as served:
        headers = {"content-type": "application/json"}
        for field, odd in itertools.product(msgspec.structs.fields(struct), values):
            rest = msgspec.json.encode({k: v for k, v in base.items() if k != field.encode_name}).decode()
            body = f'{rest[:-1]}{"," if len(rest) > 2 else ""}"{field.encode_name}":{odd}}}'
            began = time.thread_time()
            answer = await served.http.post(path, content=body, headers=headers)
            assert answer.status_code in (200, 400, 404), (body[:300], answer.status_code, answer.text[:300])
            assert time.thread_time() - began < 1.0, body[:300]
            if answer.status_code != 200:
                assert len(answer.content) < 3000 and answer.json()["error"]["message"], body[:300]
                assert str(tmp_path) not in answer.text, body[:300]
        assert served.app.active == 0
        served.engine.check_invariants()
        answer = await served.http.post(path, json=base)
        assert answer.status_code == (404 if "lora" in path else 200)
