"""API keys, tenants, request ids, the log, and bounds on what a client may send."""

from __future__ import annotations

import base64
import logging
from typing import Any

import pytest
from support.raw_http import answered
from support.server_fixtures import MODEL, Serve, until

from aioengine.cli.config.checked import ServerFlags
from aioengine.errors import ConfigError
from aioengine.events import RequestAdded
from aioengine.server import parse_keys

KEYS = {"sk-one": "alice", "sk-two": "bob"}
ADMINS = {"sk-admin": "ops"}
OK = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}


async def test_a_key_lets_in_and_names_the_tenant(serve: Serve) -> None:
    async with serve(settings={"api_keys": KEYS, "admin_keys": ADMINS}, key="sk-two") as served:
        tenants: list[str | None] = []
        served.engine.add_listener(
            lambda event: tenants.append(event.tenant) if isinstance(event, RequestAdded) else None
        )
        await served.client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        basic = base64.b64encode(b"anybody:sk-one").decode()
        answer = await served.http.post(
            "/v1/completions", json=OK, headers={"authorization": f"Basic {basic}"}
        )
        assert answer.status_code == 200
        await served.http.post("/v1/completions", json=OK, headers={"authorization": "Bearer sk-admin"})
        assert tenants == ["bob", "alice", "ops"]


NO_KEYS: list[Any] = [None, "", "Bearer", "Bearer sk-on", "Bearer sk-one2", "sk-one", "Basic x", "Basic !!"]


@pytest.mark.slow
async def test_everything_else_is_kept_out(serve: Serve) -> None:
    async with serve(settings={"api_keys": KEYS}) as served:
        del served.http.headers["authorization"]
        for header in NO_KEYS:
            headers = {} if header is None else {"authorization": header}
            for method, path in (
                ("POST", "/v1/completions"),
                ("GET", "/v1/models"),
                ("GET", "/metrics"),
                ("GET", "/"),
                ("GET", "/docs/openapi.json"),
                ("POST", "/v1/load_lora_adapter"),
            ):
                answer = await served.http.request(method, path, headers=headers)
                assert (answer.status_code, path, header) == (401, path, header)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"].startswith("Bearer")
            for path in ("/health", "/ready"):
                assert (await served.http.get(path, headers=headers)).status_code == 200


def test_admin_keys_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIOENGINE_ADMIN_KEYS", "sk-env")
    settings = ServerFlags(admin_key=["root:sk-flag"]).settings()
    assert settings.admin_keys.keys() == {"sk-flag", "sk-env"}
    assert (settings.admin_keys["sk-flag"], settings.api_keys) == ("root", {})
    assert "localhost" in settings.allowed_hosts, "without API keys the page is open"


@pytest.mark.parametrize(
    ("flags", "allowed"),
    [
        ({}, {"localhost", "127.0.0.1", "[::1]"}),
        ({"host": "127.0.0.2"}, {"localhost", "127.0.0.1", "[::1]", "127.0.0.2"}),
        ({"api_key": ["sk"]}, set()),
        ({"host": "0.0.0.0"}, set()),
        ({"allowed_host": ["*"]}, set()),
        ({"allowed_host": ["a.example"], "host": "0.0.0.0"}, {"a.example"}),
    ],
)
def test_hosts_that_the_command_allows(flags: dict[str, Any], allowed: set[str]) -> None:
    assert set(ServerFlags(**flags).settings().allowed_hosts) == allowed


def test_keys_and_tenants() -> None:
    assert parse_keys(["alice:sk-1", " team:a:sk-2 "], source="x") == {"sk-1": "alice", "sk-2": "team:a"}
    [tenant] = parse_keys(["sk-3"], source="x").values()
    assert tenant.startswith("key-") and "sk-3" not in tenant
    for bad in ("", "alice:", ":sk-1", "a:sk 1"):
        with pytest.raises(ConfigError, match="--api-key"):
            parse_keys([bad], source="--api-key")
    with pytest.raises(ConfigError) as caught:
        parse_keys(["a:sk-secret", "b:sk-secret"], source="x")
    assert "sk-secret" not in str(caught.value)


async def test_request_ids_are_kept_if_harmless(serve: Serve) -> None:
    async with serve() as served:
        for sent, kept in (("abc-1.2_3", True), ("a" * 129, False), ("a b", False), ("a;b", False)):
            answer = await served.http.post("/v1/completions", json=OK, headers={"x-request-id": sent})
            assert (answer.headers["x-request-id"] == sent) is kept
        made_up = [(await served.http.get("/nothing")).headers["x-request-id"] for _ in range(2)]
        assert made_up[0] != made_up[1]


async def test_each_request_is_one_record(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aioengine.server.access")
    async with serve(settings={"api_keys": KEYS}, key="sk-one") as served:
        answer = await served.http.post(
            "/v1/completions", json={**OK, "model": "a", "n": 2}, headers={"x-request-id": "mine"}
        )
        await until(lambda: len(caplog.records) == 1)  # written when the answer is under way already
        await served.http.post("/v1/completions", json={**OK, "model": "no\nbody"})
        await until(lambda: len(caplog.records) == 2)
        await served.http.get("/health")
        await until(lambda: len(caplog.records) == 3)
    done, refused, probe = caplog.records
    fields: dict[str, Any] = done.fields  # type: ignore[attr-defined]
    assert fields["completion_id"] == answer.json()["id"]
    assert {**fields, "ttft": 0, "seconds": 0, "completion_id": ""} == {
        "request_id": "mine",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "tenant": "alice",
        "adapter": "a",
        "completion_id": "",
        "prompt_tokens": 5,
        "output_tokens": 4,
        "ttft": 0,
        "finish_reason": "length",
        "seconds": 0,
    }
    assert 0 < fields["ttft"] <= fields["seconds"]
    assert "\n" not in refused.getMessage()
    assert refused.fields["error"] == "model_not_found"  # type: ignore[attr-defined]
    assert 'param=model reason="' in refused.getMessage()
    assert (done.levelno, probe.levelno) == (logging.INFO, logging.DEBUG)
    for record in caplog.records:
        assert "sk-one" not in record.getMessage() and "Hello" not in record.getMessage()


async def test_headers_that_do_not_come_close_the_connection(serve: Serve) -> None:
    async with serve(listen={"header_timeout": 0.05}) as served:
        for data in (b"", b"GET /health HTTP/1.1\r\nhost: x\r\nx-slow: "):
            assert await answered(served.url, data) == b""


@pytest.mark.parametrize(
    ("flags", "fine"),
    [
        ({"api_key": ["a:sk-1"]}, True),
        ({"api_key": ["a:sk-1", "a:sk-2"]}, True),
        ({"api_key": ["a:sk-1", "b:sk-2"]}, False),
        ({"api_key": ["sk-1", "sk-2"]}, False),
        ({"api_key": ["a:sk-1", "b:sk-2"], "admin_key": ["sk-3"]}, True),
    ],
)
def test_several_tenants_need_an_admin(flags: dict[str, Any], fine: bool) -> None:
    """Else each could replace the others' adapters."""
    if fine:
        ServerFlags(**flags).settings()
    else:
        with pytest.raises(ConfigError, match="--admin-key"):
            ServerFlags(**flags).settings()
