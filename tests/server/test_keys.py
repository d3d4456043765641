"""The keys file: what it may say, who may do what with it, what a key may use, and its reading again."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_fixtures import Tiny
from support.hanging_files import hanging
from support.server_fixtures import MODEL, Serve, until

from aioengine.cli.config.checked import ServerFlags
from aioengine.cli.main import main
from aioengine.errors import ConfigError
from aioengine.server.access import gate, keys
from aioengine.server.access.clients import Admission, Bucket, Meter, hash_key
from aioengine.server.access.keys import SCOPES, parse_keys_file
from aioengine.server.errors import ApiError

LOADED = "aioengine_config_last_reload_successful"
OK = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}


def toml(value: Any) -> str:
    """``value`` in TOML; a table is written inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, datetime):
        return value.isoformat()
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def keys_text(*entries: dict[str, Any], **tenants: dict[str, int]) -> str:
    """A keys file; ``KEY`` in an entry is the key itself, of which the file gets the hash."""
    lines = []
    for entry in entries:
        fields = {k: v for k, v in entry.items() if k != "KEY"}
        if "KEY" in entry:
            fields["hash"] = hash_key(entry["KEY"])
        lines += ["[[keys]]", *(f"{name} = {toml(value)}" for name, value in fields.items())]
    for tenant, limits in tenants.items():
        lines += [f"[tenants.{json.dumps(tenant)}]", *(f"{k} = {v}" for k, v in limits.items())]
    return "\n".join(lines) + "\n"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


# What the file may say

GOOD = {"KEY": "k" * 22, "tenant": "t"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "keys"),
        ("keys = []", "has no key"),
        ("key = 1", "did you mean 'keys'"),
        (
            keys_text({**GOOD, "scope": ["generate"]}),
            "keys[0]: unknown field 'scope' (did you mean 'scopes'?)",
        ),
        (
            keys_text({**GOOD, "scopes": ["metric"]}),
            "keys[0].scopes[0]: Invalid enum value 'metric'; there are metrics, generate,",
        ),
        (keys_text({**GOOD, "scopes": []}), "scopes"),
        (keys_text({"hash": "sk-plain", "tenant": "t"}), "aioengine keys new"),
        (keys_text({**GOOD, "key": "sk-plain"}), "keys[0]: unknown field 'key'"),
        (keys_text(GOOD, GOOD), "keys[1].hash"),
        (keys_text({**GOOD, "limits": {"requests_per_minut": 1}}), "did you mean 'requests_per_minute'"),
        (keys_text({**GOOD, "limits": {"requests_per_minute": 0}}), "keys[0].limits.requests_per_minute"),
        (keys_text({**GOOD, "expires": datetime(2030, 1, 1)}), "keys[0].expires"),
        (keys_text({**GOOD, "tenant": "alice"}, alcie={"max_concurrent": 1}), "did you mean 'alice'"),
        ("[[keys]", "not valid TOML"),
    ],
)
def test_errors_say_where_and_what(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys_file(text.encode(), source="the-file")
    said = str(caught.value)
    assert said.startswith("the-file") and says in said
    assert "sk-plain" not in said and hash_key(GOOD["KEY"]) not in said


# Who may do what

GENERATE = """
    POST /v1/completions, POST /v1/completions/, POST /v1/chat/completions, POST /v1/responses,
    POST /v1/messages, POST /v1/messages/count_tokens, POST /v1/embeddings, POST /classify,
    POST /rerank, POST /v1/rerank, POST /v2/rerank, POST /tokenize,
    POST /detokenize, GET /tokenizer_info"""
ADAPTERS = """POST /v1/load_lora_adapter, POST /v1/load_lora_adapter/, POST /v1/unload_lora_adapter,
    POST /v1/upload_lora_adapter"""
NEEDED = {
    "GET /metrics, GET /, GET /assets/page.js, HEAD /metrics": {"metrics"},
    GENERATE: {"generate"},
    "GET /v1/models, GET /v1/models/a": {"generate", "adapters"},
    ADAPTERS: {"adapters"},
    "GET /version, GET /docs/openapi.json": set(SCOPES),
    "GET /debug/requests": set(),
}
ROUTES = [(*route.split(), scopes) for routes, scopes in NEEDED.items() for route in routes.split(",")]


async def test_every_set_of_scopes_on_every_route(serve: Serve, tmp_path: Path) -> None:
    sets = [set(s) for n in range(1, len(SCOPES) + 1) for s in itertools.combinations(SCOPES, n)]
    file = tmp_path / "keys.toml"
    file.write_text(
        keys_text(*({"KEY": f"key-{i}", "tenant": "t", "scopes": sorted(s)} for i, s in enumerate(sets)))
    )
    async with serve(settings={"keys_file": str(file)}) as served:
        described = set(
            (await served.http.get("/docs/openapi.json", headers=bearer("key-0"))).json()["paths"]
        )
        probed = {
            path.replace("/models/a", "/models/{model}")
            for _, path, _ in ROUTES
            if path.startswith(("/v", "/to", "/de", "/po", "/cl", "/sc", "/re"))
        }
        assert described - {"/health", "/ready"} <= probed, "a route that NEEDED or `probed` lacks"
        for (i, scopes), (method, path, needed) in itertools.product(enumerate(sets), ROUTES):
            answer = await served.http.request(method, path, headers=bearer(f"key-{i}"))
            may = bool(needed & scopes) or "admin" in scopes
            # Without a body, what may go through is refused for that: 400 or 415, or 403 for want of a root.
            has_error = answer.status_code == 403 and method != "HEAD"
            code = answer.json()["error"].get("code") if has_error else None
            refused = answer.status_code == 403 and code in (None, "insufficient_scope")
            assert refused is not may, (scopes, method, path, answer.status_code)
        for path in ("/health", "/ready"):
            assert (await served.http.get(path, headers=bearer("nobody"))).status_code == 200
        assert (await served.http.get("/v1/models", headers=bearer("nobody"))).status_code == 401


# What a key may use


async def test_a_key_sees_and_uses_its_models_only(serve: Serve, tiny_text: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        keys_text(
            {"KEY": "all", "tenant": "t"},
            {"KEY": "team", "tenant": "t", "adapters": ["team/*", "a?"], "base_model": False},
            {"KEY": "base", "tenant": "t", "adapters": []},
            {"KEY": "ops", "tenant": "t", "scopes": ["admin"]},
            {"KEY": "loader", "tenant": "t", "scopes": ["adapters"], "adapters": ["team/*"]},
        )
    )
    folders = tmp_path / "root"
    (folders / "team").mkdir(parents=True)
    for name in ("team/y", "late"):
        (folders / name).mkdir()
        for part in tiny_text.adapters["a"].iterdir():
            (folders / name / part.name).write_bytes(part.read_bytes())
    async with serve(settings={"keys_file": str(file)}, adapter_root=str(folders)) as served:
        for name in ("a1", "team/x", "b"):
            served.engine.register_adapter(name, tiny_text.adapters["a"])

        async def listed(key: str) -> dict[str, str]:
            answer = await served.http.get("/v1/models", headers=bearer(key))
            assert (str(tiny_text.model.parent) in answer.text) is (key == "ops")
            return {card["id"]: card["root"] for card in answer.json()["data"]}

        async def ask(key: str, model: str, path: str = "/v1/completions") -> httpx.Response:
            body: dict[str, Any] = (
                {**OK, "model": model} if "completions" in path else {"model": model, "prompt": "x"}
            )
            if "chat" in path:
                body = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
            return await served.http.post(path, json=body, headers=bearer(key))

        assert await listed("all") == {name: name for name in (MODEL, "a", "a1", "team/x", "b")}
        assert await listed("team") == {"a1": "a1", "team/x": "team/x"}
        assert await listed("base") == {MODEL: MODEL}
        assert (await listed("ops"))["b"] == str(tiny_text.adapters["a"])

        for model in ("a1", "team/x", "team/y"):  # the last one is found in the adapter root
            assert (await ask("team", model)).status_code == 200
        for model in (MODEL, "a", "b", "late", "nothing"):
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
                answer = await ask("team", model, path)
                assert answer.status_code == 404, (model, path)
                assert answer.json()["error"] == {
                    "message": f"The model '{model}' does not exist",
                    "type": "invalid_request_error",
                    "param": "model",
                    "code": "model_not_found",
                }
            card = await served.http.get(f"/v1/models/{model}", headers=bearer("team"))
            assert card.status_code == 404
        unknown = await ask("all", "nothing")
        forbidden = await ask("team", "b")
        assert forbidden.text == unknown.text.replace("nothing", "b")
        assert "late" not in [info.name for info in served.engine.adapters()], "it was looked for"
        assert (await ask("all", "late")).status_code == 200

        async def load(name: str, kind: str = "load", path: str = "team/y") -> int:
            body = {"lora_name": name, **({"lora_path": path} if kind == "load" else {})}
            answer = await served.http.post(f"/v1/{kind}_lora_adapter", json=body, headers=bearer("loader"))
            return answer.status_code

        assert [await load("team/z"), await load("z"), await load("b")] == [200, 403, 403]
        # Nor may a key give its own name to another's adapter, nor see whether there is one.
        for path in ("late", "nothing", str(folders / "late"), f"{folders}/team/../late"):
            assert await load("team/w", path=path) == 403
        assert await load("team/w", path="team/../late") == 404
        assert "team/w" not in [info.name for info in served.engine.adapters()]
        assert [await load("team/z", "unload"), await load("b", "unload"), await load("none", "unload")] == [
            200,
            404,
            404,
        ]


async def test_the_models_path_is_not_its_name(serve: Serve, tiny_text: Tiny) -> None:
    async with serve(settings={"served_model_names": []}) as served:
        listed = (await served.http.get("/v1/models")).text
        assert str(tiny_text.model.parent) not in listed and tiny_text.model.name in listed
        for name in (tiny_text.model.name, str(tiny_text.model)):
            assert (await served.http.post("/v1/completions", json={**OK, "model": name})).status_code == 200


# Limits


@given(
    per_minute=st.integers(1, 1000),
    asks=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=60),
)
def test_no_more_than_the_allowance_and_the_wait_is_true(
    per_minute: int, asks: list[tuple[float, int]]
) -> None:
    bucket, now, taken, largest = Bucket(per_minute), 0.0, 0, 0
    for pause, amount in asks:
        now += pause
        wait = bucket.wait(now)
        if wait:
            assert bucket.wait(now + wait + 1e-6) == 0
            continue
        bucket.take(amount, now)
        taken += amount
        largest = max(largest, amount)
        assert taken <= per_minute + now * per_minute / 60 + largest + 1e-6


def test_a_request_counts_on_all_meters_or_on_none() -> None:
    file = parse_keys_file(
        keys_text(
            {**GOOD, "limits": {"max_concurrent": 1, "tokens_per_minute": 100}}, t={"requests_per_minute": 2}
        ).encode(),
        source="x",
    )
    own, shared = Meter("this API key", file.keys[0].limits), Meter("tenant 't'", file.tenants["t"])
    first = Admission([own, shared], 0.0)
    with pytest.raises(ApiError, match="this API key may have 1 requests at once"):
        Admission([own, shared], 0.0)
    first.charge_prompt(60, 0.0)
    first.end(130, 1.0)
    with pytest.raises(ApiError, match="100 tokens per minute; try again in 18 s") as caught:
        Admission([own, shared], 1.0)
    assert (caught.value.status, caught.value.retry_after) == (429, 18)
    Admission([own, shared], 19.0).end(0, 19.0)  # so neither refusal took one of the two requests
    with pytest.raises(ApiError, match="tenant 't' may have 2 requests per minute"):
        Admission([own, shared], 19.0)


async def test_limits_at_the_door(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        keys_text(
            {"KEY": "old", "tenant": "alice"},
            {"KEY": "new", "tenant": "alice"},
            {"KEY": "few", "tenant": "bob", "limits": {"tokens_per_minute": 8}},
            {"KEY": "free", "tenant": "carol"},
            {"KEY": "one", "tenant": "dave", "limits": {"max_concurrent": 1}},
            alice={"requests_per_minute": 3},
        )
    )
    async with serve(settings={"keys_file": str(file)}) as served:

        async def ask(key: str, **fields: Any) -> httpx.Response:
            return await served.http.post("/v1/completions", json={**OK, **fields}, headers=bearer(key))

        statuses = [(await ask(key)).status_code for key in ("old", "new", "old", "new", "old", "free")]
        assert statuses == [200, 200, 200, 429, 429, 200], "all keys of a tenant share its limits"
        refused = await ask("new")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 15 <= int(refused.headers["retry-after"]) <= 20
        assert (await served.http.get("/v1/models", headers=bearer("new"))).status_code == 200

        assert (await ask("few", max_tokens=20, ignore_eos=True)).status_code == 200
        refused = await ask("few")
        assert (refused.status_code, "8 tokens per minute" in refused.text) == (429, True)
        assert int(refused.headers["retry-after"]) > 60, "the debt of the first has to be paid"

        body = {**OK, "max_tokens": 100, "stream": True, "ignore_eos": True}
        async with served.http.stream("POST", "/v1/completions", json=body, headers=bearer("one")) as stream:
            await anext(stream.aiter_bytes())
            assert (await ask("one")).status_code == 429
        await until(lambda: served.app.active == 0)
        assert (await ask("one")).status_code == 200


@pytest.mark.slow
async def test_a_tenants_bound_on_waiting_requests_is_the_engines(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    entries = [{"KEY": "a", "tenant": "alice"}, {"KEY": "b", "tenant": "bob"}]
    file.write_text(keys_text(*entries, alice={"max_waiting": 1}))
    async with serve(settings={"keys_file": str(file)}, max_num_seqs=1) as served:

        async def ask(key: str) -> httpx.Response:
            body = {**OK, "max_tokens": 100, "ignore_eos": True}
            return await served.http.post("/v1/completions", json=body, headers=bearer(key))

        answers = await asyncio.gather(*(ask(key) for key in "aaaabbbb"))
        statuses = [answer.status_code for answer in answers]
        assert 429 in statuses[:4] and 200 in statuses[:4] and statuses[4:] == [200] * 4
        assert {answer.status_code for answer in answers} == {200, 429}


# Reading it again


async def test_changes_are_read_and_broken_files_are_not(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "POLL_SECONDS", 0.005)
    file = tmp_path / "keys.toml"
    old = {"KEY": "old", "tenant": "t"}
    file.write_text(keys_text(old, t={"requests_per_minute": 2}))
    async with serve(settings={"keys_file": str(file)}) as served:

        async def status(key: str) -> int:
            return (await served.http.get("/v1/models", headers=bearer(key))).status_code

        async def becomes(key: str, wanted: int) -> None:
            async with asyncio.timeout(60):
                while await status(key) != wanted:
                    await asyncio.sleep(0.005)

        def loaded() -> bool:
            text = served.engine.metrics.expose()[0].decode()
            return f'{LOADED}{{engine="default",file="keys"}} 1.0' in text

        ask = await served.http.post("/v1/completions", json=OK, headers=bearer("old"))
        assert (ask.status_code, await status("new")) == (200, 401)
        file.write_text(keys_text(old, {"KEY": "new", "tenant": "t"}, t={"requests_per_minute": 2}))
        await becomes("new", 200)
        asks = [await served.http.post("/v1/completions", json=OK, headers=bearer("new")) for _ in range(2)]
        assert [answer.status_code for answer in asks] == [200, 429], "what was used before the change counts"

        file.write_text("[[keys]]\nhash = 'sk-plain'\ntenant = 't'\n")
        await until(lambda: any("stay as they were" in record.getMessage() for record in caplog.records))
        assert await status("old") == 200 and not loaded()
        file.unlink()
        await until(lambda: any("cannot be read" in record.getMessage() for record in caplog.records))
        assert await status("new") == 200
        file.write_text(keys_text({"KEY": "new", "tenant": "t"}))
        await becomes("old", 401)
        assert await status("new") == 200 and loaded()
        past = datetime.now(UTC) - timedelta(seconds=1)
        file.write_text(keys_text({"KEY": "new", "tenant": "t", "expires": past}))
        await becomes("new", 401)
    complaints = [r for r in caplog.records if "stay as they were" in r.getMessage()]
    assert len(complaints) <= 4, "each complaint is logged once, not each time"
    assert not any("sk-plain" in record.getMessage() for record in caplog.records)


async def test_a_disk_that_hangs_is_told_and_leaves_the_keys(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(keys, "SLOW_SECONDS", 0.01)
    file, old = tmp_path / "keys.toml", keys_text({"KEY": "old", "tenant": "t"})
    file.write_text(old)

    def told(text: str) -> bool:
        return any(text in record.getMessage() for record in caplog.records)

    async with serve(settings={"keys_file": str(file)}) as served:
        assert (await served.http.get("/v1/models", headers=bearer("old"))).status_code == 200
        with hanging(file) as disk:
            await until(lambda: told("takes longer than 0.01 s"))
            assert (
                f'{LOADED}{{engine="default",file="keys"}} 0.0' in served.engine.metrics.expose()[0].decode()
            )
            assert (await served.http.get("/v1/models", headers=bearer("old"))).status_code == 200
            await until(disk.is_read)
            fresh = tmp_path / "fresh"
            fresh.write_text(keys_text({"KEY": "new", "tenant": "t"}))
            fresh.replace(file)
            disk.answer(old.encode())
        async with asyncio.timeout(60):
            while (await served.http.get("/v1/models", headers=bearer("new"))).status_code != 200:
                await asyncio.sleep(0.005)


def test_keys_beside_the_file_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="/nowhere"):
        ServerFlags(keys=Path("/nowhere")).settings()
    file = tmp_path / "keys.toml"
    file.write_text(keys_text(GOOD))
    settings = ServerFlags(keys=file).settings()
    assert settings.keys_file == str(file) and not settings.allowed_hosts, "keys are asked for"
    with pytest.raises(ConfigError, match="keys_file names all keys"):
        ServerFlags(keys=file, api_key=["sk"]).settings()


# Refusals are counted


async def test_wrong_keys_are_throttled_and_good_ones_are_not(
    serve: Serve, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "aioengine.server")
    monkeypatch.setattr(gate, "PER_MINUTE", 6)
    async with serve(settings={"api_keys": {"sk-good": "alice"}}, key="sk-wrong") as served:
        answers = [await served.http.get("/v1/models") for _ in range(100)]
        statuses = [answer.status_code for answer in answers]
        assert statuses[:6] == [401] * 6 and statuses[-90:] == [429] * 90
        assert answers[-1].json()["error"]["code"] == "too_many_invalid_keys"
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert (await served.http.get("/v1/models", headers=bearer("sk-good"))).status_code == 200
        # Somebody else's word for where they are counts for nothing.
        forwarded = {"x-forwarded-for": "10.0.0.1"}
        assert (await served.http.get("/v1/models", headers=forwarded)).status_code == 429
    lines = [r.getMessage() for r in caplog.records if "valid API key" in r.getMessage()]
    said = "requests without a valid API key since the last such line; the latest was from 127.0.0.1"
    assert lines == [f"refused 1 {said}"]
    access = [r for r in caplog.records if r.name == "aioengine.server.access"]
    assert [r.fields["status"] for r in access] == [200]  # type: ignore[attr-defined]


async def test_a_trusted_proxy_says_who_the_client_is(serve: Serve) -> None:
    settings = {"api_keys": {"sk-good": "alice"}}
    async with serve(settings=settings, listen={"trusted_proxies": ["127.0.0.0/8"]}, key="x") as served:
        for _ in range(70):
            last = await served.http.get("/v1/models", headers={"x-forwarded-for": "10.0.0.1"})
        assert last.status_code == 429
        other = await served.http.get("/v1/models", headers={"x-forwarded-for": "10.0.0.2"})
        assert other.status_code == 401


# The command


def test_the_command_makes_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.toml"
    with file.open("a") as out:
        for flags in (["--scope", "metrics"], ["--adapter", "team/*", "--adapter", "b"]):
            assert main(["keys", "new", "--tenant", 'al"ice', *flags]) == 0
            made = capsys.readouterr()
            key = made.err.split()[-1]
            assert key not in made.out and len(key) > 40
            out.write(made.out)
    first, second = parse_keys_file(file.read_bytes(), source="x").keys
    assert (first.tenant, first.scopes, second.adapters) == ('al"ice', ("metrics",), ("team/*", "b"))
    assert second.hash == hash_key(key)
    assert main(["keys", "new", "--tenant", "x", "--scope", "generat"]) == 2
    assert "scopes[0]: Invalid enum value 'generat'" in capsys.readouterr().err
    assert tomllib.loads(made.out)["keys"][0]["tenant"] == 'al"ice'
