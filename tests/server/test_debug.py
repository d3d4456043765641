"""``/debug/...``: what a running server is doing."""

from __future__ import annotations

import pytest
from support.server_fixtures import Serve, until

KEYS = {"api_keys": {"sk-user": "alice"}, "admin_keys": {"sk-root": "ops"}}


@pytest.mark.slow
async def test_only_admins_see_it(serve: Serve) -> None:
    async with serve(settings=KEYS) as served:
        for key, status in (("sk-user", 403), ("sk-root", 200), ("sk-wrong", 401)):
            headers = {"authorization": f"Bearer {key}"}
            assert (await served.http.get("/debug/requests", headers=headers)).status_code == status
    async with serve() as served:
        assert (await served.http.get("/debug/requests")).status_code == 401  # without keys nobody is one


async def test_open_requests(serve: Serve) -> None:
    async with serve(settings=KEYS, key="sk-root") as served:
        stream = await served.client.completions.create(
            model="a", prompt="abc", max_tokens=120, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        now = (await served.http.get("/debug/requests")).json()
        [one] = now["requests"]
        assert one["adapter"] == "a" and one["tenant"] == "ops" and one["route"] == "/v1/completions"
        assert one["stream"] and one["prompt_tokens"] == 3 and one["output_tokens"] >= 1
        assert one["status"] == 200 and now["state"] == "running" and now["stats"]["running"] == 1
        await stream.close()
        await until(lambda: not served.app.context.open_requests)
        assert (await served.http.get("/debug/requests")).json()["requests"] == []
