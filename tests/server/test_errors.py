"""Statuses and bodies of what goes wrong."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.engine_fixtures import MakeEngine, Tiny, greedy
from support.server_fixtures import MODEL, Serve, served_by, until

from aioengine.errors import AdapterLoadError, EngineOverloaded
from aioengine.schedulers import Decision, SchedulerView
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.server.errors import to_api_error, without_places

OK = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}
LONG = {"max_model_len": 512}
"""For an engine that is to be busy for a while."""


REFUSED: list[tuple[Any, ...]] = [
    (b"{", 400, None, "invalid_json"),
    (b'"text"', 400, None, "invalid_value"),
    (b'{"model": "\xff"}', 400, None, "invalid_json"),
    (b'{"user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, None, "invalid_value"),
    ({**OK, "max_tokens": 10**400}, 400, "max_tokens", "invalid_value"),
    ({**OK, "top_k": 10**400, "top_p": 0.9}, 400, "top_k", "invalid_value"),
    ({"prompt": "x"}, 400, "model", "invalid_value"),
    ({"model": MODEL}, 400, "prompt", "invalid_value"),
    ({**OK, "max_tokens": "2"}, 400, "max_tokens", "invalid_value"),
    ({**OK, "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({**OK, "temperature": 3}, 400, "temperature", "invalid_value"),
    ({**OK, "max_token": 2}, 400, "max_token", "unknown_parameter"),
    ({**OK, "suffix": "x"}, 400, "suffix", "unknown_parameter"),
    ({**OK, "stream_options": {"x": 1}}, 400, "stream_options.x", "unknown_parameter"),
    ({**OK, "logit_bias": {"5": 101}}, 400, "logit_bias[...]", "invalid_value"),
    ({**OK, "logit_bias": {"x": 1}}, 400, "logit_bias", "invalid_value"),
    ({**OK, "logit_bias": {"9" * 5000: 1}}, 400, "logit_bias", "invalid_value"),
    ({**OK, "stop": [""]}, 400, "stop", "invalid_value"),
    ({**OK, "cache_salt": ""}, 400, "cache_salt", "invalid_value"),
    ({**OK, "stop": ["x"] * 17}, 400, "stop", "invalid_value"),
    ({**OK, "stop": "x" * 257}, 400, "stop", "invalid_value"),
    ({**OK, "logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", "invalid_value"),
    ({**OK, "stop_token_ids": [1] * 1025}, 400, "stop_token_ids", "invalid_value"),
    ({**OK, "prompt": ["x"] * 129}, 400, "prompt", "invalid_value"),
    ({**OK, "n": 100, "prompt": ["a", "b"]}, 400, "n", "invalid_value"),
    ({**OK, "prompt": [1, "a"]}, 400, "prompt", "invalid_value"),
    ({**OK, "prompt": [256]}, 400, None, "invalid_value"),
    ({**OK, "prompt": ""}, 400, None, "invalid_value"),
    ({**OK, "prompt": "x" * 128}, 400, "prompt", "context_length_exceeded"),
    ({**OK, "model": "nobody"}, 404, "model", "model_not_found"),
    (b"", 400, None, "invalid_json"),
    ({**OK, "model": "../etc"}, 404, "model", "model_not_found"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
async def test_refusals(stream: bool, serve: Serve) -> None:
    async with serve() as served:
        for body, status, param, code in REFUSED:
            if isinstance(body, bytes):
                answer = await served.http.post(
                    "/v1/completions", content=body, headers={"content-type": "application/json"}
                )
            else:
                answer = await served.http.post("/v1/completions", json={**body, "stream": stream})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (status, param, code), body
            assert error["type"] == "invalid_request_error"
            assert error["message"]
            # and nothing of it is left
            assert served.engine.stats().running == served.engine.stats().waiting == 0


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
async def test_a_body_in_another_encoding_is_told_which_one_to_use(encoding: str, serve: Serve) -> None:
    async with serve() as served:
        answer = await served.http.post(
            "/v1/completions",
            content=json.dumps(OK).encode(encoding),
            headers={"content-type": "application/json"},
        )
        assert answer.status_code == 400
        assert "must be UTF-8 without a byte order mark" in answer.json()["error"]["message"]


async def test_a_probe_may_ask_for_the_headers_alone(serve: Serve) -> None:
    async with serve() as served:
        for path, status in (("/health", 200), ("/v1/models", 200), ("/nothing", 404), ("/tokenize", 405)):
            answer = await served.http.head(path)
            assert (answer.status_code, answer.content, path) == (status, b"", path)


async def test_a_long_name_is_not_sent_back(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "aioengine.server.access")
    async with serve() as served:
        answer = await served.http.post("/v1/completions", json={**OK, "model": "m" * 100_000})
        assert (answer.status_code, len(answer.content) < 1000) == (404, True)
    assert all(len(record.getMessage()) < 1000 for record in caplog.records)


async def test_a_body_must_be_json(serve: Serve) -> None:
    async with serve() as served:
        form = await served.http.post("/v1/completions", data={"model": MODEL})
        assert form.status_code == 415
        plain = await served.http.post(
            "/v1/completions", content=b"{}", headers={"content-type": "text/plain"}
        )
        assert plain.status_code == 415
        encoded = {"content-type": "application/json", "content-encoding": "gzip"}
        packed = await served.http.post("/v1/completions", content=b"{}", headers=encoded)
        assert packed.status_code == 415 and "not decompressed" in packed.text
        nothing = await served.http.post("/v1/completions", headers={"content-type": "application/json"})
        assert nothing.status_code == 400


class RejectsAll(FCFS):
    """Takes nobody in."""

    def schedule(self, view: SchedulerView) -> Decision:
        return Decision(reject=[(request.request_id, "it would be late") for request in view.waiting])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.slow
async def test_a_request_that_the_policy_rejects_is_told_when_to_come_back(
    tiny_text: Tiny, make_engine: MakeEngine, stream: bool
) -> None:
    async with (
        make_engine(tiny_text, RejectsAll()) as engine,
        served_by(engine) as served,
    ):
        with pytest.raises(openai.RateLimitError, match="it would be late") as caught:
            await served.client.completions.create(model=MODEL, prompt="x", stream=stream)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.code == "request_rejected"


async def test_overload_says_whose_it_is(serve: Serve) -> None:
    bounds = {"max_waiting": 2, "max_waiting_per_tenant": 2, **LONG}
    keys = {"ka": "a", "kb": "b"}
    async with serve(max_num_seqs=1, **bounds, settings={"api_keys": keys}) as served:
        running = served.engine.generate("busy", greedy(500))
        await anext(running)

        def ask(key: str, model: str = MODEL) -> asyncio.Task[httpx.Response]:
            body = {"model": model, "prompt": "x", "max_tokens": 200}
            headers = {"authorization": f"Bearer {key}"}
            return asyncio.create_task(served.http.post("/v1/completions", json=body, headers=headers))

        first = ask("ka")
        await until(lambda: served.engine.stats().waiting == 1)
        second = ask("ka")
        await until(lambda: served.engine.stats().waiting == 2)
        answer = await ask("ka")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        error = answer.json()["error"]
        assert error["code"] == "engine_overloaded" and "of your tenant" in error["message"]
        third = ask("kb")
        answer = await second
        assert answer.status_code == 429 and "of your tenant" in answer.json()["error"]["message"]
        answer = await ask("kb")
        assert answer.status_code == 429 and "the engine is overloaded" in answer.json()["error"]["message"]
        found = (await served.http.get("/metrics", headers={"authorization": "Bearer ka"})).text
        assert 'aioengine_requests_refused_total{bound="tenant"' in found
        for task in (first, third):
            task.cancel()
        await running.aclose()


async def test_the_deadline_is_a_timeout(serve: Serve) -> None:
    async with serve(settings={"request_timeout": 0.001}) as served:
        with pytest.raises(openai.InternalServerError) as caught:
            await served.client.completions.create(model=MODEL, prompt="x" * 100, max_tokens=20)
        assert caught.value.status_code == 504
        assert caught.value.response.headers["x-should-retry"] == "false"


async def test_a_stopped_engine_is_unavailable(serve: Serve) -> None:
    async with serve() as served:
        await served.engine.stop()
        answer = await served.http.post("/v1/completions", json=OK)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert (await served.http.get("/health")).status_code == 503
        assert (await served.http.get("/ready")).status_code == 503


async def test_an_adapter_that_is_gone_is_not_asked_for_again(serve: Serve, tmp_path: Any) -> None:
    async with serve() as served:
        served.engine.register_adapter("gone", tmp_path / "gone")
        answer = await served.http.post("/v1/completions", json={**OK, "model": "gone"})
        assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "false")
        assert answer.json()["error"]["code"] == "adapter_load_error"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("already registered from /srv/models/a b", "already registered from ... b"),
        ("[Errno 24] Too many open files: '/usr/lib/x.py'", "[Errno 24] Too many open files: '...'"),
        ("s3://bucket/key?X-Amz-Signature=1: Forbidden", "... Forbidden"),
        ("not authorized on resource: arn:aws:s3:::bucket/key", "not authorized on resource: ..."),
        ("~/models/a (/x), file:///y", "... (...), ..."),
        ("team-a/sql: rank 64 > 16; 3 / 4, and/or", "team-a/sql: rank 64 > 16; 3 / 4, and/or"),
    ],
)
def test_messages_say_no_places(text: str, shown: str) -> None:
    assert without_places(text) == shown
    error = AdapterLoadError(text, name="a", path="/srv/secret")
    assert shown in to_api_error(error).detail.message


async def test_only_those_who_may_load_are_told_why_a_file_cannot_be_read(
    serve: Serve, tmp_path: Path
) -> None:
    settings = {"api_keys": {"sk-user": "u"}, "admin_keys": {"sk-admin": "ops"}}
    async with serve(settings=settings) as served:
        (tmp_path / "gone").mkdir()
        (tmp_path / "gone" / "adapter_config.json").mkdir()  # not a file
        served.engine.register_adapter("gone", tmp_path / "gone")
        told = []
        for key in ("sk-user", "sk-admin"):
            headers = {"authorization": f"Bearer {key}"}
            answer = await served.http.post("/v1/completions", json={**OK, "model": "gone"}, headers=headers)
            assert answer.status_code == 503
            told.append(answer.json()["error"]["message"])
        user, admin = told
        assert user == "adapter 'gone' cannot be loaded; the server's log says why"
        assert "adapter_config.json" in admin and str(tmp_path) not in admin


def test_adapters_shut_out_by_pinned_ones_name_none_of_them() -> None:
    error = EngineOverloaded("adapter 'a' (/srv/a) cannot get a slot (secret); unpin one", bound="pinned")
    found = to_api_error(error)
    assert found.status == 429 and "secret" not in found.detail.message and "/srv" not in found.detail.message
