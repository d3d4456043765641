"""Requests of very many small parts: tools, properties, constants, alternatives, references.

Each is answered, or refused with a reason, within a few seconds; a client that streams beside them notices
nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
from support.bystander import bystander, forget_peak, memory
from support.engine_fixtures import Tiny
from support.server_process import Serving, serving

pytestmark = pytest.mark.slow

SECONDS = 75.0
"""The longest that one answer may take: it may wait for a compile before its own, and each has 30 s (5.5 s of
processor time)."""
INTEGER = {"type": "integer"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
Ask = tuple[str, str, dict[str, Any]]


@pytest_asyncio.fixture
async def served(tiny_text: Tiny) -> Any:
    flags = ("--served-model-name", "tiny", "--max-body-bytes", str(2**24), "--adapter-root")
    async with serving(tiny_text.model, *flags, str(tiny_text.adapters["a"].parent)) as served:
        yield served


def functions(count: int, parameters: Any = None) -> list[dict[str, Any]]:
    schema = parameters or {"type": "object", "properties": {}}
    return [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(count)]


def with_tools() -> Iterator[Ask]:
    wide = {"type": "object", "properties": {f"p{i}": INTEGER for i in range(20)}}
    for count in (128, 10_000):
        names = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(count)]
        calls = [{"id": "x", **one, "function": {"name": "f", "arguments": "{}"}} for one in names]
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}}
        for fields in (
            {"tools": functions(count)},
            {"tools": functions(count), "tool_choice": allowed},
            {"tools": functions(count, wide), "tool_choice": "required"},
            {"messages": [*CHAT["messages"], turn, *CHAT["messages"]]},  # type: ignore[misc]
        ):
            yield f"{count} {list(fields)[-1]}", "/v1/chat/completions", {**CHAT, **fields}
        tools = [{"type": "function", "name": f"f{i}", "parameters": wide} for i in range(count)]
        yield f"{count} functions", "/v1/responses", {"input": "Hi", "max_output_tokens": 1, "tools": tools}
        tools = [{"name": f"f{i}", "input_schema": wide} for i in range(count)]
        yield f"{count} tools of messages", "/v1/messages", {**CHAT, "tools": tools}
    large = {"large": {"enum": [f"{i:08d}" for i in range(500)]}}
    many = {"allOf": [{"$ref": "#/$defs/large"}] * 300}
    yield (
        "references in tools",
        "/v1/chat/completions",
        {
            **CHAT,
            "tools": functions(128, {"type": "object", "properties": {"a": many}, "$defs": large}),
            "tool_choice": "required",
        },
    )


def schemas() -> Iterator[tuple[str, Any]]:
    def properties(count: int) -> dict[str, Any]:
        return {f"p{i}": INTEGER for i in range(count)}

    for count in (500, 2_001, 30_000):
        yield f"{count} properties", {"type": "object", "properties": properties(count)}
        yield f"{count} patterns", {"patternProperties": {f"^p{i}$": INTEGER for i in range(count)}}
        yield f"{count} required", {"properties": {}, "required": [f"p{i}" for i in range(count)]}
    for count in (5_000, 100_000):
        yield f"enum of {count}", {"enum": list(range(count))}
        yield f"{count} items", {"type": "array", "prefixItems": [True] * min(count, 30_000)}
    for keyword in ("allOf", "anyOf", "oneOf"):
        for count in (90, 30_000):
            yield f"{keyword} of {count}", {keyword: [{"const": i} for i in range(count)]}
        chosen = [{"properties": {f"p{i}": INTEGER}, "required": [f"p{i}"]} for i in range(1_000)]
        yield f"{keyword} of objects", {keyword: chosen}
        reference = {"$ref": "#/$defs/large"}
        large = {"enum": [f"{i:08d}" for i in range(10_000)]}
        yield f"{keyword} of references", {keyword: [reference] * 9_000, "$defs": {"large": large}}
    required = [f"p{i}" for i in range(1_000)]
    told = [{"properties": {"p999": {"const": i}}, "required": required} for i in range(90)]
    yield "told apart by the last", {"oneOf": [{"type": "object", **one} for one in told]}
    for count in (500, 9_000):
        definitions = {str(i): {"properties": {"n": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(count)}
        yield f"chain of {count}", {"$ref": "#/$defs/0", "$defs": {**definitions, str(count): {}}}


def others() -> Iterator[Ask]:
    for count in (1_000, 10_001):
        outputs: dict[str, Any] = {"choice": [f"number {i}" for i in range(count)]}
        yield f"{count} choices", "/v1/completions", {"structured_outputs": outputs}
        outputs = {"regex": "|".join(str(i) for i in range(count))}
        yield f"pattern of {count}", "/v1/completions", {"structured_outputs": outputs}
        outputs = {"grammar": "start: " + " | ".join(f'"{i}"' for i in range(count))}
        yield f"rule of {count}", "/v1/completions", {"structured_outputs": outputs}
    for count in (2_048, 100_000):
        yield f"{count} documents", "/rerank", {"query": "q" * 400, "documents": ["d"] * count}
        yield f"{count} adapters", "/v1/completions", {"adapters": {f"a{i}": 1 for i in range(count)}}
        yield f"{count} stop strings", "/v1/completions", {"stop": [str(i) for i in range(count)]}
        yield f"{count} biases", "/v1/completions", {"logit_bias": {str(i): 1 for i in range(count)}}


def requests() -> Iterator[Ask]:
    yield from with_tools()
    for name, schema in schemas():
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        yield name, "/v1/completions", {"response_format": wanted}
    yield from others()


async def test_many_parts_are_answered_or_refused_in_time(served: Serving) -> None:
    process = psutil.Process(served.process.pid)
    async with (
        httpx.AsyncClient(base_url=served.url, trust_env=False, timeout=60) as http,
        bystander(served.url) as seen,
    ):
        turns = asyncio.Semaphore(2)

        async def ask(name: str, path: str, body: dict[str, Any]) -> int:
            if path == "/v1/completions":
                body = {"prompt": "Hi", "max_tokens": 1, **body}
            async with turns:
                began = time.monotonic()
                answer = await http.post(path, json={"model": "tiny", **body})
                took = time.monotonic() - began
            assert answer.status_code in (200, 400), (name, answer.status_code, answer.text[:500])
            if answer.status_code == 400:
                assert answer.json()["error"]["message"] and len(answer.content) < 3_000, name
            assert took < SECONDS, (name, took)
            return answer.status_code

        forget_peak(process.pid)
        before = memory(process.pid)
        found = await asyncio.gather(*(ask(*one) for one in requests()))
        grown = memory(process.pid, "VmHWM") - before
    seen.check()
    assert {200, 400} <= set(found)
    assert grown < 200 * 2**20
