"""What one tenant has sent cannot be told from another's ``cached_tokens``."""

from __future__ import annotations

from typing import Any

import pytest
from support.server_fixtures import MODEL, Serve, Served

from aioengine.cli.config.checked import ServerFlags

KEYS = {"sk-one": "alice", "sk-two": "bob", "sk-three": "bob"}
PROMPT = "The account number is 4711 0815."
FULL = 28
"""Of its 32 tokens, in blocks of 4: one block is always computed, for its last token's logits."""


async def cached(served: Served, key: str, prompt: str = PROMPT, **fields: Any) -> int:
    answer = await served.http.post(
        "/v1/completions",
        json={"model": MODEL, "prompt": prompt, "max_tokens": 1, **fields},
        headers={"authorization": f"Bearer {key}"},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


async def test_a_tenant_shares_with_itself_alone(serve: Serve) -> None:
    async with serve(settings={"api_keys": KEYS}) as served:
        assert await cached(served, "sk-two") == 0
        assert await cached(served, "sk-one") == 0
        assert await cached(served, "sk-three") == FULL, "another key of the same tenant"
        assert await cached(served, "sk-one") == FULL
        assert await cached(served, "sk-one", model="a") == 0, "an adapter's KV is another"
        assert await cached(served, "sk-one", model="a") == FULL


SALTS = (None, "alice", "bob", "x", '["bob",null]', '"bob"', 'bob","x', "0:", "3:bobx", "null", "[null,null]")


@pytest.mark.slow
async def test_no_salt_reaches_another_tenants_blocks(serve: Serve) -> None:
    # Admin keys alone: whoever shows none is let in, and has no tenant.
    async with serve(settings={"admin_keys": {"sk-one": "alice", "sk-two": "bob"}}) as served:
        pairs = [(key, salt) for key in ("sk-one", "sk-two", "none") for salt in SALTS]
        for key, salt in pairs:
            assert await cached(served, key, cache_salt=salt) == 0, (key, salt)
        for key, salt in pairs:
            assert await cached(served, key, cache_salt=salt) == FULL, (key, salt)


async def test_tenants_share_where_that_is_asked_for(serve: Serve) -> None:
    assert ServerFlags(share_prefix_cache=True).settings().share_prefix_cache
    async with serve(settings={"api_keys": KEYS, "share_prefix_cache": True}) as served:
        assert await cached(served, "sk-two") == 0
        assert await cached(served, "sk-one") == FULL
        assert await cached(served, "sk-one", cache_salt="x") == 0
        assert await cached(served, "sk-two", cache_salt="x") == FULL


async def test_without_keys_all_share(serve: Serve) -> None:
    async with serve() as served:
        assert await cached(served, "any") == 0
        assert await cached(served, "other") == FULL
