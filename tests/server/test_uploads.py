"""Adapters that are uploaded, and what an upload must not do."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_fixtures import Tiny, greedy
from support.server_fixtures import Serve, Served

from aioengine.server.errors import ApiError
from aioengine.server.openai.adapters import read_form

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMIT = 1 << 20
FORM = "multipart/form-data; boundary=x"


def formed(files: dict[str, bytes]) -> bytes:
    head = 'Content-Disposition: form-data; name="files"; filename="{}"'
    parts = [b"--x\r\n" + head.format(name).encode() + b"\r\n\r\n" + data for name, data in files.items()]
    return b"\r\n".join([*parts, b"--x--\r\n"])


async def upload(served: Served, body: bytes, name: str = "new", **fields: Any) -> tuple[int, Any]:
    found = await served.http.post(
        "/v1/upload_lora_adapter",
        params={"lora_name": name, **fields},
        content=body,
        headers={"content-type": FORM},
    )
    return found.status_code, found.json()


async def test_an_upload_is_the_adapter(serve: Serve, tiny_text: Tiny) -> None:
    folder = tiny_text.adapters["a"]
    body = formed({"README.md": b"x", **{name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}})
    async with serve(settings={"max_upload_bytes": LIMIT}) as served:
        digest = (await served.engine.load_adapter("a")).digest
        expected = (await served.engine.complete("x", greedy(8), adapter="a")).token_ids
        status, answer = await upload(served, body)
        assert (status, answer["digest"], answer["version"]) == (200, digest, 1), answer
        assert (await served.engine.complete("x", greedy(8), adapter="new")).token_ids == expected
        status, answer = await upload(served, body)
        assert status == 400 and "already been loaded" in answer["error"]["message"]
        status, answer = await upload(served, body, load_inplace="true")
        assert (status, answer["version"]) == (200, 2)
        served.engine.check_invariants()


@pytest.mark.slow
async def test_refused(serve: Serve, tiny_text: Tiny) -> None:
    good = {name: (tiny_text.adapters["a"] / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    async with serve() as served:
        status, answer = await upload(served, formed(good))
        assert (status, answer["error"]["code"]) == (403, "adapter_uploads_disabled")
    async with serve(settings={"max_upload_bytes": 300_000}) as served:
        for body, name, words, wanted in [
            (formed(good | {WEIGHTS: good[WEIGHTS][:-8]}), "new", "truncated", 400),
            (formed(good | {CONFIG: b"{}"}), "new", "peft_type", 400),
            (formed(good), "bad name", "lora_name", 400),
            (formed(good), "tiny", "lora_name", 400),
            (b"\0" * 300_001, "new", "larger than the 300000 bytes", 413),
        ]:
            status, answer = await upload(served, body, name)
            assert (status, words in answer["error"]["message"]) == (wanted, True), answer
        assert [info.name for info in served.engine.adapters()] == ["a"]
    keys = {"api_keys": {"user": "t"}, "admin_keys": {"root": "t"}, "max_upload_bytes": LIMIT}
    for key, status in (("user", 403), ("root", 200)):
        async with serve(settings=keys, key=key) as served:
            assert (await upload(served, formed(good)))[0] == status


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"PK\x03\x04", "application/zip", "must be multipart/form-data"),
        (b"x", "multipart/form-data", "damaged"),
        (b"--x\r\nnonsense", FORM, "damaged"),
        (formed({str(i): b"" for i in range(20)}), FORM, "damaged"),
        (formed({CONFIG: b"{}"}), FORM, "must have one"),
        (formed({f"a/{CONFIG}": b"{}", f"b/{CONFIG}": b"{}", WEIGHTS: b""})[:-9], FORM, "damaged"),
        (formed({CONFIG: b"x" * 300_000, WEIGHTS: b""}), FORM, "more than 262144 bytes"),
    ],
    ids=range(7),
)
def test_what_is_no_upload(body: bytes, kind: str, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        read_form(body, kind)


@settings(max_examples=100, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_damaged_bytes_are_refused(data: st.DataObject) -> None:
    """Whatever is wrong with them, or they are read."""
    body = bytearray(formed({CONFIG: b"{}", WEIGHTS: bytes(range(256)) * 20}))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(len(body) - 1, 0)))
        what = data.draw(st.sampled_from(["set", "cut", "repeat"]))
        if what == "set" and body:
            body[at] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del body[at:]
        else:
            body[at:at] = body[at : at + 64]
    with contextlib.suppress(ApiError):
        read_form(bytes(body), FORM)
