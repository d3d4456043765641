"""Mixes, scales and versions of adapters over HTTP: the same at every endpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.engine_fixtures import Tiny, greedy
from support.server_fixtures import MODEL, Serve, Served
from support.tiny_models import build_adapter

MIXES: list[dict[str, float]] = [{"a": 0.7, "b": -0.4}, {"a": 0.5}]
TEXT = "a text"
CHAT: list[dict[str, Any]] = [{"role": "user", "content": TEXT}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT, "max_tokens": 6, "temperature": 0, "ignore_eos": True},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 6, "temperature": 0, "ignore_eos": True},
    "/v1/responses": {"input": TEXT, "max_output_tokens": 6, "temperature": 0},
    "/v1/messages": {"messages": CHAT, "max_tokens": 6, "temperature": 0},
    "/v1/embeddings": {"input": TEXT},
    "/rerank": {"query": TEXT, "documents": ["another"]},
}


@pytest.fixture(scope="module")
def b(tiny_text: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_adapter(tiny_text.model, tmp_path_factory.mktemp("b"), seed=7)


@pytest.fixture
async def served(serve: Serve, b: Path) -> AsyncIterator[Served]:
    async with serve(max_cpu_loras=8) as found:
        found.engine.register_adapter("b", b)
        yield found


async def answer(served: Served, path: str, **fields: Any) -> Any:
    found = await served.http.post(path, json={"model": MODEL, **BODIES[path], **fields})
    assert found.status_code == 200, found.text
    return found.json()


def of(path: str, body: Any) -> Any:
    """What an answer says: a text, or numbers."""
    match path:
        case "/v1/completions":
            return body["choices"][0]["text"]
        case "/v1/chat/completions":
            return body["choices"][0]["message"]["content"]
        case "/v1/responses":
            return body["output"][0]["content"][0]["text"]
        case "/v1/messages":
            return body["content"][0]["text"]
        case "/v1/embeddings":
            return body["data"][0]["embedding"]
    return body["results"][0]["relevance_score"]


def same(value: Any) -> Any:
    return value if isinstance(value, str) else pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.slow
async def test_every_endpoint(served: Served, mix: dict[str, float]) -> None:
    engine = served.engine
    chat = (await engine.complete(CHAT, greedy(6), adapter=mix)).text
    text = (await engine.complete(TEXT, greedy(6), adapter=mix)).text
    score = (await engine.score(TEXT, ["another"], mix)).scores[0]
    expected = {
        "/v1/completions": text,
        "/v1/embeddings": (await engine.embed(TEXT, mix)).vector,
        "/rerank": score,
        **dict.fromkeys(("/v1/chat/completions", "/v1/responses", "/v1/messages"), chat),
    }
    for path in BODIES:
        found, plain = (
            of(path, await answer(served, path, adapters=mix)),
            of(path, await answer(served, path)),
        )
        assert found == same(expected[path]) and found != same(plain), path


@pytest.mark.slow
async def test_every_endpoint_refuses_the_same(served: Served) -> None:
    for path in (*BODIES, "/classify", "/v1/messages/count_tokens"):
        await refuses(served, path)


async def refuses(served: Served, path: str) -> None:
    body = {"input": TEXT} if path == "/classify" else BODIES.get(path, {"messages": CHAT})
    wrong: list[tuple[dict[str, Any], int]] = [
        ({"adapters": {}}, 400),
        ({"adapters": {MODEL: 1.0}}, 400),
        ({"adapters": {"a": 101}}, 400),
        ({"adapters": {f"a{i}": 1 for i in range(9)}}, 400),
        ({"model": "a", "adapters": {"b": 0.5}}, 400),
    ]
    if path != "/v1/messages/count_tokens":  # nothing is looked up for it
        wrong.append(({"adapters": {"a": 0.5, "nobody": 0.5}}, 404))
        wrong += [({"model": f"a@{number}"}, 404) for number in ("7", "", "x", "1@2")]
    for fields, status in wrong:
        found = await served.http.post(path, json={"model": MODEL, **body, **fields})
        assert found.status_code == status, (path, fields, found.text)
        if status == 404 and path != "/v1/messages":  # Anthropic's errors name no field
            assert found.json()["error"]["param"] == ("adapters" if "adapters" in fields else "model")


@pytest.mark.slow
async def test_versions(served: Served) -> None:
    for path in BODIES:
        plain = of(path, await answer(served, path, model="a"))
        assert of(path, await answer(served, path, model="a@1")) == same(plain), path
