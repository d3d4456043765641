"""Attacks by the content of requests."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
from attacks.table.target import MODEL, Target, filled, key, statuses
from support import hostile_grammars as hostile

from aioengine.server.answer import MAX_SCORES

QUADRATIC = """{% for m in messages %}{% for n in messages %}{% if n.role == m.content %}{% endif %}
{% endfor %}{% endfor %}"""
START = f'{{"model": "{MODEL}", "max_tokens": 2, "prompt": '


Run = Callable[[Target], Awaitable[str]]


def sent(path: str, body: Callable[[], Any], times: int = 1) -> Run:
    """An attack that sends one body so often, at once; it is made when the attack begins."""

    async def run(target: Target) -> str:
        content = body()
        return statuses(await asyncio.gather(*(target.post(path, content) for _ in range(times))))

    return run


def completions(body: Callable[[], Any], times: int = 1) -> Run:
    return sent("/v1/completions", body, times)


def guided(*outputs: Callable[[], dict[str, Any]], **fields: Any) -> Run:
    """An attack that asks for each of these formats, at once."""

    async def run(target: Target) -> str:
        asks = [target.ask(structured_outputs=wanted(), **fields) for wanted in outputs]
        return statuses(await asyncio.gather(*asks, return_exceptions=True))

    return run


def asked(times: int = 1, **fields: Any) -> Run:
    """An attack that asks for a completion so often, at once."""

    async def run(target: Target) -> str:
        return statuses(await asyncio.gather(*(target.ask(**fields) for _ in range(times))))

    return run


HI = [{"role": "user", "content": "Hi"}]
SCHEMA = '"x", "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": ['
IGNORED = START.replace("2,", "150,") + '"x", "ignore_eos": true, "stream": true, "metadata": ['
RULE = 'start: e\ne: e e | e e e | e e e e | /[a-z]/ | /[a-z ]/ | /[^\\n]/ | "{}"'

deep_schema = guided(lambda: {"json": json.loads(hostile.property_chain(1_000))})
deep_rules = guided(lambda: {"grammar": hostile.rule_chain(3_000)})
many_properties = guided(lambda: {"json": json.loads(hostile.properties(9_000))})
ambiguous = guided(lambda: {"grammar": hostile.AMBIGUOUS}, max_tokens=300)
twenty_ambiguous = guided(
    *(lambda i=i: {"grammar": RULE.replace("{}", "x" * i)} for i in range(1, 21)), max_tokens=100
)
long_text = asked(prompt="a " * 3_500_000)
many_messages = sent("/v1/chat/completions", lambda: {"messages": [{**HI[0], "content": ""}] * 270_000})
detokenize = sent("/detokenize", lambda: {"tokens": [65] * 2_000_000})
nested_metadata = completions(lambda: filled(START + '"x", "metadata": [', "[]", "]}"))
nested_schema = completions(lambda: filled(START + SCHEMA, "[]", "]}}}}"))
many_ids = completions(lambda: filled(START + "[", "1", "]}"))
ignored_fields = completions(lambda: filled(IGNORED, "{}", "]}", 3_000_000), times=10)
many_logprobs = sent(
    "/v1/chat/completions",
    lambda: {
        "messages": HI,
        "n": 32,
        "max_tokens": 300,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 20,
    },
)
scored_prompts = asked(  # as many log-probabilities of prompts as a request may ask for
    times=2,
    prompt=[[100 + i] * 490 for i in range(MAX_SCORES // (490 * 21))],
    logprobs=20,
    prompt_logprobs=20,
    echo=True,
    max_tokens=0,
)
long_prompt = asked(prompt=random.Random(0).choices(range(100, 40_000), k=8_000), max_tokens=1)
many_vectors = sent(
    "/v1/embeddings",
    lambda: {"input": [[100 + i % 1_000, 200] for i in range(256)], "encoding_format": "float"},
)
many_inputs = sent("/v1/embeddings", lambda: {"input": [[100 + i % 1_000] for i in range(2_048)]}, times=2)
many_documents = sent(
    "/rerank", lambda: {"query": "word " * 100, "documents": [f"document {i}" for i in range(2_048)]}
)
all_fields = asked(
    times=2,
    n=16,
    max_tokens=20,
    logprobs=20,
    repetition_penalty=1.2,
    logit_bias={str(i): 1 for i in range(1_000)},
    stop_token_ids=list(range(40_000, 41_000)),
    stop=["x" * 256] * 16,
)
hot_choices = asked(n=64, max_tokens=4, temperature=2)
quadratic_chat = sent(
    "/v1/chat/completions",
    lambda: {"messages": [{**HI[0], "content": "Hello"}] * 2_048, "max_tokens": 1},
    times=3,
)


def _lists_in_arguments() -> dict[str, Any]:
    function = {"name": "f", "arguments": f"[{','.join(['[]'] * 2_600_000)}]"}
    call = {"id": "x", "type": "function", "function": function}
    return {"messages": [*HI, {"role": "assistant", "content": "", "tool_calls": [call]}], "max_tokens": 2}


lists_in_arguments = sent("/v1/chat/completions", _lists_in_arguments)


async def nothing(_: Target) -> str:
    await asyncio.sleep(1)
    return "none"


async def slow_compiles(target: Target) -> str:
    """Send eight requests whose clients leave after a second, then others whose work shared a pool with
    them."""
    schemas = [{"json": json.loads(hostile.multiples(7919 + 2 * i, 7907))} for i in range(8)]
    leaving = [asyncio.create_task(target.ask(structured_outputs=schema)) for schema in schemas]
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


async def unique_salts(target: Target) -> str:
    """Send 300 requests with one prompt; none may use what was computed for another."""
    asks = (target.ask(prompt="word " * 30, cache_salt=str(i)) for i in range(300))
    return statuses(await asyncio.gather(*asks, return_exceptions=True))


async def tenant_flood(target: Target) -> str:
    """Send 1,500 requests of tenant a; the client that streams is tenant b."""
    others: list[str] = []

    async def of_b() -> None:
        began = time.monotonic()
        answer = await target.post("/v1/completions", {"prompt": "b", "max_tokens": 2}, headers=key("b"))
        others.append(f"b: {answer.status_code} in {time.monotonic() - began:.1f} s")

    return "; ".join([f"a: {await flooded(target, of_b)}", *others])


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
    asks = (target.http.get("/v1/models", headers=key("wrong")) for _ in range(500))
    answers = await asyncio.gather(*asks, return_exceptions=True)
    await asyncio.sleep(0.5)
    lines = sum("401" in str(line) or "key" in str(line) for line in target.served.lines[before:])
    return f"{statuses(answers)}; {lines} lines in the log"


async def log_unread(target: Target) -> str:
    """Send 600 requests, whose log lines are more than a pipe holds, while nobody reads the log."""
    with target.served.unread():
        found = [await target.http.get("/version") for _ in range(600)]
    return statuses(found)


async def address_flood(target: Target) -> str:
    """Send 1,500 requests from one address; the client that streams has another."""
    return await flooded(target, lambda: asyncio.sleep(0.5))


async def flooded(target: Target, meanwhile: Callable[[], Awaitable[None]]) -> str:
    """Send 1,500 requests at once. Returns how many were refused when ``meanwhile`` was over."""
    body = {"max_tokens": 200, "ignore_eos": True}
    flood = [asyncio.create_task(target.ask(**body, prompt=f"Number {i}")) for i in range(1_500)]
    await asyncio.sleep(1)
    await meanwhile()
    done = [task.result().status_code for task in flood if task.done() and task.exception() is None]
    for task in flood:
        task.cancel()
    await asyncio.wait(flood)
    return f"429 ({done.count(429)}x)"


async def odd_bodies(target: Target) -> str:
    """Send bodies full of small values, in fields of each kind, and two of one value, one after the other."""
    bodies: list[bytes] = []
    for part in ('{"a": [1]}', '"["', "12345", "null"):
        bodies += [filled(START + '"x", "metadata": [', part, "]}"), filled(START + "[", part, "]}")]
        for field in ("stop", "stop_token_ids", "logit_bias", "nobody", "tools"):
            bodies.append(filled(START + f'"x", "{field}": [', part, "]}", 1_000_000))
    bodies += [f"{START}{'[' * 8_000_000}".encode(), f'{START}"x", "seed": {"1" * 8_000_000}}}'.encode()]
    return statuses([await target.post("/v1/completions", body) for body in bodies])


def _many_parts() -> Iterator[tuple[str, dict[str, Any]]]:
    """Requests of very many small parts: tools, alternatives, documents, adapters, stop strings."""
    wide = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(20)}}
    chat = {"messages": HI, "max_tokens": 1}
    for count in (128, 10_000):
        functions = [{"name": f"f{i}", "parameters": wide} for i in range(count)]
        tools = [{"type": "function", "function": function} for function in functions]
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": tools}}
        calls = [{"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}] * count
        history = [*HI, {"role": "assistant", "content": "", "tool_calls": calls}, *HI]
        for choice in ("auto", "required", allowed):
            yield "/v1/chat/completions", {**chat, "tools": tools, "tool_choice": choice}
        yield "/v1/chat/completions", {**chat, "messages": history}
        flat = [{"type": "function", **function} for function in functions]
        yield "/v1/responses", {"input": "Hi", "max_output_tokens": 1, "tools": flat}
        flat = [{"name": f"f{i}", "input_schema": wide} for i in range(count)]
        yield "/v1/messages", {**chat, "tools": flat}
        names = [f"{i}" for i in range(count)]
        grammar = "start: " + " | ".join(f'"{name}"' for name in names)
        one_of = {"oneOf": [{"const": name} for name in names]}
        formats = {"choice": names, "regex": "|".join(names), "grammar": grammar, "json": one_of}
        weights = dict.fromkeys(names * 10, 1)
        fields: list[dict[str, Any]] = [
            {"structured_outputs": {name: text}} for name, text in formats.items()
        ]
        fields += [{"adapters": weights}, {"logit_bias": weights}, {"stop": names * 10}]
        for field in fields:
            yield "/v1/completions", {"prompt": "Hi", "max_tokens": 1, **field}
        yield "/rerank", {"query": "q" * 400, "documents": names * 10}


async def many_parts(target: Target) -> str:
    turns = asyncio.Semaphore(2)

    async def ask(path: str, body: dict[str, Any]) -> httpx.Response:
        async with turns:
            return await target.post(path, body)

    return statuses(await asyncio.gather(*(ask(*one) for one in _many_parts())))


async def long_answers(target: Target) -> str:
    """Ask for as many long answers as run at once, from one address, and leave after three seconds."""
    body = {"n": 16, "max_tokens": 4000, "ignore_eos": True}
    asked = [asyncio.create_task(target.ask(**body)) for _ in range(4)]
    await asyncio.wait(asked, timeout=3)
    left = sum(task.cancel() for task in asked)
    await asyncio.wait(asked)
    return f"left ({left}x)"


async def large_integers(target: Target) -> str:
    """Send integers of 6,000 digits in a schema, in tools, and in the history of calls."""
    large = "1" + "0" * 6_000
    start = f'{{"model": "{MODEL}", "max_tokens": 2, "messages": [{{"role": "user", "content": "Hi"}}'
    schema = f'{{"type": "object", "properties": {{"a": {{"type": "integer", "maximum": {large}}}}}}}'
    form = f'"response_format": {{"type": "json_schema", "json_schema": {{"name": "x", "schema": {schema}}}}}'
    tools = f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]'
    use = f'{{"type": "tool_use", "id": "1", "name": "f", "input": {{"a": {large}}}}}'
    chat = "/v1/chat/completions"
    bodies = {
        f"{start}], {form}}}": chat,
        f"{start}], {tools}}}": chat,
        f'{start}], {tools}, "tool_choice": "required"}}': chat,
        f'{start}, {{"role": "assistant", "content": [{use}]}}]}}': "/v1/messages",
    }
    asks = (target.post(path, body.encode()) for body, path in bodies.items())
    return statuses(await asyncio.gather(*asks))


async def many_mixes(target: Target) -> str:
    for name in ("m1", "m2", "m3"):
        target.adapter(name)
    mixes = [{"m1": 0.1 + i / 1_000, "m2": 0.5, "m3": -0.2} for i in range(300)]
    asks = (target.ask(adapters=mix) for mix in mixes)
    return statuses(await asyncio.gather(*asks, return_exceptions=True))
