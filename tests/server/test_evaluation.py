"""What evaluations and load generators ask for: log-probabilities of prompts, lengths, ids, other fields."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from support.engine_fixtures import Tiny
from support.server_fixtures import MODEL, Serve, Served
from support.tiny_models import reference_logits

from aioengine.server.transport.body import MAX_LOGGED_NAMES

BASE: dict[str, Any] = {"model": MODEL, "temperature": 0, "ignore_eos": True, "max_tokens": 3}
USER = [{"role": "user", "content": "Hi"}]


async def posted(served: Served, path: str = "completions", /, **fields: Any) -> Any:
    answer = await served.http.post(f"/v1/{path}", json={**BASE, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids_of(served: Served, text: str) -> list[int]:
    """One token for each byte."""
    assert served.engine.tokenizer is not None
    return served.engine.tokenizer.encode(text)


async def events(served: Served, path: str = "completions", /, **fields: Any) -> list[Any]:
    answer = await served.http.post(f"/v1/{path}", json={**BASE, "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def expected(tiny: Tiny, ids: list[int], adapter: str | None = None) -> list[float]:
    """The log-probability of each token but the first."""
    table = reference_logits(tiny.model, ids, adapter and tiny.adapters[adapter]).float().log_softmax(-1)
    return [table[i, token].item() for i, token in enumerate(ids[1:])]


@pytest.mark.parametrize("adapter", [None, "a"])
@pytest.mark.slow
async def test_what_lm_eval_sends(adapter: str | None, tiny_text: Tiny, serve: Serve) -> None:
    """Its request for log-likelihoods, and its way of reading the answer."""
    prompts = [[72, 101, 108, 108, 111, 9], [1, 2, 3, 4]]
    async with serve() as served:
        answer = await posted(
            served, model=adapter or MODEL, prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234
        )
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:-1] == pytest.approx(expected(tiny_text, ids, adapter), abs=1e-3)
        assert {len(found[name]) for name in found} == {len(ids) + 1}
        for own, top in zip(found["token_logprobs"][1:], found["top_logprobs"][1:], strict=True):
            assert own <= max(top.values())


async def test_a_token_that_ends_the_answer_is_counted(serve: Serve) -> None:
    """Those who score prompts drop the last entry, whatever was generated."""
    async with serve() as served:
        first = (await posted(served, prompt="Hello", max_tokens=1, return_token_ids=True))["choices"][0]
        ends = {"stop_token_ids": first["token_ids"], "logprobs": 1, "echo": True, "max_tokens": 1}
        [choice] = (await posted(served, prompt="Hello", **ends))["choices"]
    assert choice["text"] == "Hello" and choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == 6


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.slow
async def test_echo(n: int, serve: Serve) -> None:
    prompts = ["Grüße", "abc"]
    async with serve() as served:
        plain = await posted(served, prompt=prompts, n=n, logprobs=2)
        answer = await posted(served, prompt=prompts, n=n, logprobs=2, echo=True)
        only = await posted(served, prompt=prompts, n=n, logprobs=2, echo=True, max_tokens=0)
        ids = await posted(served, prompt=[ids_of(served, text) for text in prompts], n=n, echo=True)
        streamed = await events(served, prompt=prompts, n=n, logprobs=2, echo=True)
    for index, choice in enumerate(answer["choices"]):
        prompt, whole = prompts[index // n], choice["text"]
        assert whole == prompt + plain["choices"][index]["text"] == ids["choices"][index]["text"]
        found = choice["logprobs"]
        size = len(prompt.encode())
        assert found["tokens"][size:] == plain["choices"][index]["logprobs"]["tokens"]
        expected = pytest.approx(plain["choices"][index]["logprobs"]["token_logprobs"], abs=1e-4)
        assert found["token_logprobs"][size:] == expected
        before = itertools.accumulate(map(len, found["tokens"][: size - 1]), initial=0)
        assert found["text_offset"][:size] == list(before)
        assert found["text_offset"][size] == len(prompt)
        assert only["choices"][index]["text"] == prompt
        alone = only["choices"][index]["logprobs"]
        assert all(alone[name] == found[name][:size] for name in ("tokens", "text_offset"))
        assert alone["token_logprobs"][1:] == pytest.approx(found["token_logprobs"][1:size], abs=1e-4)
        parts = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == whole
        joined: dict[str, list[Any]] = {name: [] for name in found}
        for part in parts:
            for name, values in (part["logprobs"] or {}).items():
                joined[name] += values
        scores = joined.pop("token_logprobs"), found.pop("token_logprobs")
        assert scores[0][1:] == pytest.approx(scores[1][1:], abs=1e-4) and joined.keys() == found.keys()
        assert all(joined[name] == found[name] for name in ("tokens", "text_offset"))
    assert only["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.slow
async def test_prompt_logprobs(count: int, tiny_text: Tiny, serve: Serve) -> None:
    async with serve() as served:
        [choice] = (await posted(served, prompt="Hello", prompt_logprobs=count, max_tokens=0))["choices"]
        chat = await posted(served, "chat/completions", messages=USER, prompt_logprobs=count)
        prompts = [ids_of(served, text) for text in ("Hello", "<user>Hi")]
    for ids, found in zip(prompts, (choice["prompt_logprobs"], chat["prompt_logprobs"]), strict=True):
        first, *rest = found
        assert first is None
        for token, value, entry in zip(ids[1:], expected(tiny_text, ids), rest, strict=True):
            own = entry[str(token)]
            assert own["logprob"] == pytest.approx(value, abs=1e-3)
            assert own["decoded_token"] in "Hello<user>i"
            ranked = sorted((e["rank"], -e["logprob"]) for e in entry.values() if e["rank"] is not None)
            assert [rank for rank, _ in ranked] == list(range(1, count + 1)) and ranked == sorted(ranked)


X = {"prompt": "x"}
CHAT = {"messages": USER}


REFUSED: list[tuple[Any, ...]] = [
    ({**X, "max_tokens": 0}, "max_tokens"),
    ({**X, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({**X, "prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt": ["x" * 125] * 128, "prompt_logprobs": 20, "max_tokens": 0}, "prompt"),
    ({**X, "min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"prompt": "x" * 129, "echo": True, "max_tokens": 0}, "prompt"),
    ({**CHAT, "continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
    ({**CHAT, "reasoning_effort": "high"}, "reasoning_effort"),
    ({**CHAT, "max_tokens": 0}, "max_tokens"),
]


@pytest.mark.slow
async def test_refusals(serve: Serve) -> None:
    async with serve() as served:
        for fields, param in REFUSED:
            path = "chat/completions" if "messages" in fields else "completions"
            answer = await served.http.post(f"/v1/{path}", json={**BASE, **fields})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
async def test_an_answer_that_grows_too_large_fails(stream: bool, serve: Serve) -> None:
    """The log-probabilities of an answer count as they come."""
    fields = {"prompt": "Hi", "max_tokens": 20, "ignore_eos": True, "logprobs": 4, "stream": stream}
    async with serve() as served:
        served.app.context.numbers.most = 100
        answer = await served.http.post("/v1/completions", json={**BASE, **fields})
        assert answer.status_code == (200 if stream else 429) and "too many log-prob" in answer.text
        assert stream or answer.headers["retry-after"]
        answer = await served.http.post("/v1/completions", json={**BASE, **fields, "max_tokens": 9})
        assert answer.status_code == 200 and "too many" not in answer.text, "nothing is held any more"
        served.engine.check_invariants()


async def test_usage_in_every_chunk(serve: Serve) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with serve() as served:
        for path, fields in (("completions", {"prompt": "Hello"}), ("chat/completions", {"messages": USER})):
            *parts, last = await events(served, path, **fields, stream_options=options)
            told = [part["usage"]["completion_tokens"] for part in parts]
            assert told == sorted(told) and told[-1] == 3 and all(p["usage"]["prompt_tokens"] for p in parts)
            assert last["choices"] == [] and last["usage"]["completion_tokens"] == 3
            without = await events(served, path, **fields, stream_options={"continuous_usage_stats": True})
            assert not any(part["usage"] for part in without)


async def test_token_ids(serve: Serve) -> None:
    async with serve() as served:
        answer = await posted(served, prompt="Hello", return_token_ids=True)
        [choice] = answer["choices"]
        assert choice["prompt_token_ids"] == ids_of(served, "Hello") and len(choice["token_ids"]) == 3
        parts = [e["choices"][0] for e in await events(served, prompt="Hello", return_token_ids=True)]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert [part.get("prompt_token_ids") for part in parts] == [
            ids_of(served, "Hello"),
            *[None] * (len(parts) - 1),
        ]
        chat = await posted(served, "chat/completions", messages=USER, return_token_ids=True)
        assert (
            chat["prompt_token_ids"] == ids_of(served, "<user>Hi")
            and len(chat["choices"][0]["token_ids"]) == 3
        )
        first, *rest = await events(served, "chat/completions", messages=USER, return_token_ids=True)
        ids = [token for event in (first, *rest) for token in event["choices"][0]["token_ids"]]
        assert (
            first["prompt_token_ids"] == ids_of(served, "<user>Hi") and ids == chat["choices"][0]["token_ids"]
        )
        plain = await posted(served, prompt="Hello")
        assert not {"token_ids", "prompt_token_ids", "prompt_logprobs"} & plain["choices"][0].keys()


async def test_the_last_message_is_continued(serve: Serve) -> None:
    messages = [*USER, {"role": "assistant", "content": "The answer is "}]
    async with serve() as served:
        chat: dict[str, Any] = {
            "messages": messages,
            "continue_final_message": True,
            "return_token_ids": True,
        }
        answer = await posted(served, "chat/completions", **chat)
        assert answer["prompt_token_ids"] == ids_of(served, "<user>Hi<assistant>The answer is ")


async def test_the_clients_own_id(serve: Serve) -> None:
    async with serve() as served:
        both = await asyncio.gather(*(posted(served, prompt="Hello", request_id="mine-1") for _ in range(2)))
        assert {answer["id"] for answer in both} == {"cmpl-mine-1"}


async def test_small_fields(serve: Serve) -> None:
    async with serve() as served:
        kinds = {True: 1, False: None, 2: 2}
        for given, count in kinds.items():
            found = (await posted(served, prompt="Hello", logprobs=given))["choices"][0]["logprobs"]
            assert (found and len(found["top_logprobs"][0]) >= count) == (count and True)
        for fields in (
            {"verbosity": "low"},
            {"reasoning_effort": "none"},
            {"user": "u", "metadata": {"a": "b"}, "store": False, "prompt_cache_options": {"ttl": "30m"}},
        ):
            await posted(served, "chat/completions", messages=USER, **fields)
        least = {"stop": ["\n"], "ignore_eos": False, "min_tokens": 20, "max_tokens": 20}
        assert (await posted(served, prompt="Hello", **least))["usage"]["completion_tokens"] == 20
        info = (await served.http.get("/tokenizer_info")).json()
        assert info["chat_template"].startswith("{% for m in messages %}") and "eos_token" in info


# Unknown fields


@pytest.mark.slow
async def test_unknown_fields_can_be_ignored(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    tool = {"type": "function", "cache_control": {"a": 1}, "function": {"name": "f", "x": [1, {"y": 2}]}}
    extra: dict[str, Any] = {
        "num_ctx": {"deep": [1, 2, {"z": "é"}]},
        "stream_options": {"include_usage": True, "weird": 1},
        "tools": [tool, tool],
    }
    async with serve(settings={"ignore_unknown_fields": True}) as served:
        plain = await posted(served, "chat/completions", messages=USER)
        for _ in range(2):
            answer = await posted(served, "chat/completions", messages=USER, **extra)
            assert answer["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
        wrong = await served.http.post(
            "/v1/chat/completions", json={**BASE, **extra, "messages": USER, "n": "x"}
        )
        assert wrong.json()["error"]["param"] == "n"
        for index in range(MAX_LOGGED_NAMES + 20):
            await posted(served, prompt="x", **{f"made_up_{index}": 1}, max_tokens=1)
    lines = [record.getMessage() for record in caplog.records if "is ignored" in record.getMessage()]
    assert len(lines) == MAX_LOGGED_NAMES == len(set(lines))
    for name in ("num_ctx", "stream_options.weird", "tools.cache_control", "tools.function.x"):
        assert sum(f"field {name} is ignored" in line for line in lines) == 1
