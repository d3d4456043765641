"""``/debug/...``: what a running server is doing."""

from __future__ import annotations

from support.server_fixtures import Serve, until

KEYS = {"api_keys": {"sk-user": "alice"}, "admin_keys": {"sk-root": "ops"}}


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
    async with serve() as served:
        assert (await served.http.get("/debug/requests")).status_code == 401, (
            "without keys nobody is an admin"
        )
