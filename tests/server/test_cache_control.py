"""``cache_control`` of ``/v1/messages``, with Anthropic's client: what is kept, and what ``usage`` says."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.server_fixtures import MODEL, Serve, Served

from aioengine.server.errors import ApiError
from aioengine.server.messages.api import MessagesRequest
from aioengine.server.messages.cache_control import breakpoints, common

KEEP: Any = {"type": "ephemeral"}
FIELDS: Any = {"model": MODEL, "max_tokens": 2, "extra_body": {"temperature": 0}}
TOOL: Any = {"name": "paint", "description": "Paints.", "input_schema": {"type": "object"}}
WITH_TOOLS = (
    "{% if not messages %}{{ raise_exception('no messages') }}{% endif %}"
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
"""A template with tools first that takes no empty chat. One token is one byte."""


def text(content: str, control: Any = None) -> dict[str, Any]:
    block = {"type": "text", "text": content}
    return block if control is None else {**block, "cache_control": control}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


@contextlib.asynccontextmanager
async def client_of(served: Served, key: str = "none") -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with anthropic.AsyncAnthropic(base_url=served.url, api_key=key, max_retries=0) as client:
        yield client


def counts(usage: Any) -> tuple[int, int, int]:
    by_time = usage.cache_creation
    both = by_time.ephemeral_5m_input_tokens + by_time.ephemeral_1h_input_tokens
    assert both == usage.cache_creation_input_tokens
    return usage.cache_creation_input_tokens, usage.cache_read_input_tokens, usage.input_tokens


async def test_usage_says_what_is_kept_and_what_was_found(serve: Serve) -> None:
    async with serve() as served, client_of(served) as client:
        system: Any = [text("You are brief and kind.", KEEP)]
        ask: Any = [user(text("Who are you?"))]
        kept = len("<system>You are brief and kind.") // 4 * 4
        total = len("<system>You are brief and kind.<user>Who are you?")
        first = await client.messages.create(system=system, messages=ask, **FIELDS)
        assert counts(first.usage) == (kept, 0, total - kept)
        assert served.engine.stats().kv_blocks_pinned == kept // 4
        other: Any = [user(text("How are you?"))]
        again = await client.messages.create(system=system, messages=other, **FIELDS)
        found = len("<system>You are brief and kind.<user>") // 4 * 4
        assert counts(again.usage) == (0, found, total - found), "what is not kept may be there, too"
        page = (await served.http.get("/metrics")).text
        assert f'aioengine_kv_blocks_pinned{{engine="default"}} {kept // 4}' in page


async def test_a_conversation_keeps_its_growing_beginning(serve: Serve) -> None:
    """Each turn has its breakpoint on the last block, as agents do it."""
    async with serve() as served, client_of(served) as client:
        turns: list[Any] = []
        before = 0
        for turn in ("What is the weather in Berlin?", "And the one in Paris?", "Thanks."):
            turns.append(user(text(turn, KEEP)))
            async with client.messages.stream(messages=turns, **FIELDS) as stream:
                events = [event async for event in stream]
                answer = await stream.get_final_message()
            [start] = [event for event in events if event.type == "message_start"]
            assert counts(start.message.usage) == counts(answer.usage), "known with the first token"
            created, read, rest = counts(answer.usage)
            assert read == before and created > 0 and (created + read) % 4 == 0 and rest < 4
            before = created + read
            for block in turns[-1]["content"]:
                block.pop("cache_control")
            turns.append({"role": "assistant", "content": "Fine."})


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({"tools": [{**TOOL, "cache_control": KEEP}], "system": "Be brief."}, "[paint]<"),
        ({"tools": [TOOL], "system": [text("Be brief.", KEEP), text("Please.")]}, "[paint]<system>Be brief."),
        ({"messages": [user(text("One moment.", KEEP), text("Now."))]}, "<user>One moment."),
        ({"messages": [user(text("One moment."), text("Now.", KEEP))]}, "<user>One moment.\nNow."),
        ({"cache_control": KEEP}, "<user>Hello there."),
        (
            {
                "messages": [
                    user(text("Hello there.")),
                    {"role": "assistant", "content": [{**text("I was"), "cache_control": KEEP}]},
                ]
            },
            "<user>Hello there.<assistant>I was",
        ),
        (
            {
                "messages": [
                    user(text("Hi")),
                    {
                        "role": "assistant",
                        "content": [{"type": "tool_use", "id": "1", "name": "paint", "input": {}}],
                    },
                    user(
                        {"type": "tool_result", "tool_use_id": "1", "content": "done", "cache_control": KEEP}
                    ),
                ]
            },
            "<user>Hi<assistant><tool>done",
        ),
        ({"system": [text("Be brief.", None)]}, ""),
    ],
)
@pytest.mark.slow
async def test_the_prompt_up_to_the_breakpoint_is_kept_and_no_more(
    fields: dict[str, Any], prefix: str, serve: Serve, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(WITH_TOOLS)
    async with serve(chat_template=str(template)) as served, client_of(served) as client:
        asked = {"messages": [user(text("Hello there."))], **fields}
        body = {**FIELDS["extra_body"], **asked}
        answer = await client.messages.create(
            model=MODEL, max_tokens=2, messages=asked["messages"], extra_body=body
        )
        created, read, _ = counts(answer.usage)
        assert (created, read) == (len(prefix) // 4 * 4, 0)
        assert served.engine.stats().kv_blocks_pinned == len(prefix) // 4


@pytest.mark.slow
async def test_tenants_keep_their_own_within_their_bounds(serve: Serve) -> None:
    keys = {"sk-one": "alice", "sk-two": "bob"}
    async with serve(settings={"api_keys": keys}, max_prefix_pins_per_tenant=0.01) as served:
        most = int(served.engine.plan.num_blocks * 0.01)
        ask: Any = [user(text("x" * 100, KEEP))]
        assert 0 < most < 24
        for pinned, key in enumerate(keys, 1):
            async with client_of(served, key) as client:
                answer = await client.messages.create(messages=ask, **FIELDS)
                assert counts(answer.usage)[:2] == (most * 4, 0)
                assert served.engine.stats().kv_blocks_pinned == most * pinned
    async with serve(max_prefix_pins=0) as served, client_of(served) as client:
        answer = await client.messages.create(messages=ask, **FIELDS)
        assert counts(answer.usage)[:2] == (0, 0)


@pytest.mark.slow
async def test_usage_says_what_is_kept_for_an_hour(serve: Serve) -> None:
    system: Any = [text("You are kind.", {**KEEP, "ttl": "1h"}), text("Very.", KEEP)]
    ask: Any = [user(text("Who are you?"))]
    kept = len("<system>You are kind.") // 4 * 4
    async with serve() as served, client_of(served) as client:
        for new in (kept, 0):
            answer = await client.messages.create(system=system, messages=ask, **FIELDS)
            assert answer.usage.cache_creation is not None
            assert answer.usage.cache_creation.ephemeral_1h_input_tokens == new
            assert counts(answer.usage)[0] >= new + 4 * bool(new), "the rest for 5 minutes"


@pytest.mark.parametrize(
    ("control", "reason"),
    [
        ({"type": "forever"}, "type"),
        ({"type": "ephemeral", "ttl": "2h"}, "ttl"),
        ({}, "type"),
        (1, "cache_control"),
    ],
)
@pytest.mark.slow
async def test_bad_breakpoints_are_refused(control: Any, reason: str, serve: Serve) -> None:
    async with serve() as served, client_of(served) as client:
        ask: Any = [user(text("Hi", control))]
        with pytest.raises(anthropic.BadRequestError, match=reason):
            await client.messages.create(messages=ask, **FIELDS)
        many: Any = [user(*(text("Hi", KEEP) for _ in range(5)))]
        with pytest.raises(anthropic.BadRequestError, match="at most 4"):
            await client.messages.create(messages=many, **FIELDS)


def test_too_many_breakpoints_are_refused_before_they_are_all_looked_at() -> None:
    many = [text("Hi", KEEP)] * 2000
    data = msgspec.convert({"model": MODEL, "max_tokens": 1, "messages": [user(*many)]}, MessagesRequest)
    tracemalloc.start()
    try:
        with pytest.raises(ApiError, match="at most 4"):
            breakpoints(data)
        assert tracemalloc.get_traced_memory()[1] < 10**6, "2000 copies of up to 2000 blocks take 16 MB"
    finally:
        tracemalloc.stop()


def test_breakpoints_come_in_order_with_their_times() -> None:
    data = msgspec.convert(
        {
            "model": MODEL,
            "max_tokens": 1,
            "tools": [TOOL, {**TOOL, "cache_control": {**KEEP, "ttl": "1h"}}],
            "system": [text("a", {**KEEP, "ttl": "5m"}), text("b")],
            "messages": [user(text("c")), user(text("d", KEEP), text("e"))],
            "cache_control": {**KEEP, "ttl": None},
        },
        MessagesRequest,
    )
    found = breakpoints(data)
    assert [point.seconds for point in found] == [3600.0, 300.0, 300.0, 300.0]
    sizes = [
        (len(p.tools or ()), len(p.system or ()), [len(m.content) for m in p.messages]) for p, _ in found
    ]
    assert sizes == [(2, 0, []), (2, 1, []), (2, 2, [1, 1]), (2, 2, [1, 2])]


@given(st.text("ab", max_size=12), st.text("ab", max_size=12))
def test_common_prefixes(first: str, second: str) -> None:
    length = common(first, second)
    assert first[:length] == second[:length]
    assert first[length : length + 1] != second[length : length + 1] or length == len(first) == len(second)
