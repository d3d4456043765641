"""Pages of other sites: what browsers send for them changes nothing, unless their origin is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from support.server_fixtures import MODEL, Serve

from aioengine.errors import ConfigError
from aioengine.server import ServerSettings
from aioengine.server.routes import METRICS, ROUTES

OK = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}
FRIEND = "https://chat.example"
WRITES = ("POST", "PUT", "PATCH", "DELETE", "OPTIONS")
FOREIGN = (
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "http://localhost:1", "sec-fetch-site": "same-site"},
    {"origin": f"{FRIEND}.evil.example"},
    {"origin": f"{FRIEND}:8443"},
    {"origin": "http://127.0.0.1.evil.example"},
)


async def test_no_route_can_be_used_by_another_site(serve: Serve) -> None:
    async with serve(settings={"allow_origins": [FRIEND], "max_upload_bytes": 2**20}) as served:
        for path in ["/metrics", *(route.path for route in ROUTES if route.scopes != METRICS)]:
            path = path.replace("{model}", "x")
            for headers in FOREIGN:
                for method in WRITES:
                    answer = await served.http.request(method, path, headers=headers)
                    assert (answer.status_code, answer.json()["error"].get("code")) in (
                        (403, "origin_not_allowed"),
                        (403, None),  # the form of errors of /v1/messages has no code
                    ), (method, path, headers)
                    assert "access-control-allow-origin" not in answer.headers
            for method in ("GET", "HEAD"):
                if not (path.startswith("/debug") or path == "/metrics"):  # slow, or not there
                    read = await served.http.request(method, path, headers=FOREIGN[2])
                    assert read.status_code != 403
                    assert "access-control-allow-origin" not in read.headers, "the page cannot see it"


async def test_own_pages_and_programs_are_let_in(serve: Serve) -> None:
    async with serve() as served:
        for headers in (
            {"origin": served.url, "sec-fetch-site": "same-origin"},
            {"origin": served.url.upper().replace("HTTP", "http")},
            {"sec-fetch-site": "none"},
            {},
        ):
            answer = await served.http.post("/v1/completions", json=OK, headers=headers)
            assert answer.status_code == 200 and "vary" not in answer.headers


async def test_an_allowed_site_asks_first_and_reads_answers(serve: Serve) -> None:
    settings = {"allow_origins": [FRIEND], "api_keys": {"sk-one": "alice"}}
    async with serve(settings=settings, key="sk-one") as served:
        site = {"origin": FRIEND, "sec-fetch-site": "cross-site"}
        asks = {
            **site,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-os",
        }
        del served.http.headers["authorization"]  # a browser sends no key with this question
        allowed = await served.http.options("/v1/completions", headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == FRIEND
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
        keyed = {**site, "authorization": "Bearer sk-one"}
        for body in (OK, {**OK, "stream": True}, {**OK, "model": "nobody"}):
            answer = await served.http.post("/v1/completions", json=body, headers=keyed)
            assert answer.status_code == (404 if body["model"] == "nobody" else 200)
            assert answer.headers["access-control-allow-origin"] == FRIEND
            assert answer.headers["vary"] == "Origin"
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in answer.headers
        assert (await served.http.post("/v1/completions", json=OK, headers=site)).status_code == 401


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "chat.example", "https://", f"{FRIEND}/", "https://Chat.example", "https://a b"],
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match="allow_origins"):
        ServerSettings(allow_origins=[origin])


HOSTS: list[tuple[Any, ...]] = [
    ("localhost", 200),
    ("LOCALHOST:80", 200),
    ("[::1]:80", 200),
    ("", 403),
    ("evil.example:80", 403),
    ("localhost.evil.example", 403),
    ("localhost:1@evil.example", 403),
    ("[::1].evil.example", 403),
    ("[::1", 403),
    ("localhost:80:80", 403),
    ("localhost/.evil.example", 403),
    ("localhost:evil", 403),
    ("user@localhost", 403),
]


async def test_a_host_is_checked_whole(serve: Serve) -> None:
    async with serve(settings={"allowed_hosts": ["localhost", "[::1]"]}) as served:
        for host, status in HOSTS:
            answer = await served.http.post("/v1/completions", json=OK, headers={"host": host})
            assert answer.status_code == status, host
            assert (await served.http.get("/metrics", headers={"host": host})).status_code == status
            assert (await served.http.get("/health", headers={"host": host})).status_code == 200
