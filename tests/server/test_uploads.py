"""Adapters that are uploaded, and what an upload must not do."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import tarfile
import zipfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_fixtures import Tiny, greedy
from support.server_fixtures import Serve, Served

from aioengine.server.errors import ApiError
from aioengine.server.openai.uploads import unpack

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LIMIT = 1 << 20
FORM = "multipart/form-data; boundary=x"


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(files: dict[str, bytes], mode: Any = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def formed(files: dict[str, bytes]) -> bytes:
    head = 'Content-Disposition: form-data; name="files"; filename="{}"'
    parts = [b"--x\r\n" + head.format(name).encode() + b"\r\n\r\n" + data for name, data in files.items()]
    return b"\r\n".join([*parts, b"--x--\r\n"])


def header(name: str, data: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A member of a tar archive, of any type."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.GNU_FORMAT) + data + b"\0" * (-len(data) % 512)


def zip_with_a_second_directory(entries: int) -> bytes:
    """A zip archive that has one entry by its plain end, and more by its zip64 end."""
    start = b"PK\x03\x04"
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, *[0] * 7, 1, *[0] * 6) + b"a"
    directory = entry * entries
    end64 = struct.pack("<4sQ2H2I2Q", b"PK\x06\x06", 44, 45, 45, 0, 0, entries, entries)
    end64 += struct.pack("<2Q", len(directory), len(start))
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, len(start) + len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), len(start), 0)
    return start + directory + end64 + locator + end


async def upload(served: Served, body: bytes, name: str = "new", **fields: Any) -> tuple[int, Any]:
    headers = {"content-type": fields.pop("kind", "application/octet-stream")}
    found = await served.http.post(
        "/v1/upload_lora_adapter", params={"lora_name": name, **fields}, content=body, headers=headers
    )
    return found.status_code, found.json()


async def test_in_every_form(serve: Serve, tiny_text: Tiny) -> None:
    folder = tiny_text.adapters["a"]
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    beside = {"README.md": b"x", "checkpoint/optimizer.pt": b"y" * 1000}
    inside = {f"sql/{name}": data for name, data in files.items()}
    bodies = {
        "zip": (zipped(files | beside), ""),
        "inner": (zipped(inside), ""),
        "tar": (tarred(inside | beside), ""),
        "gz": (tarred(files, "w:gz"), ""),
        "form": (formed(files), FORM),
    }
    async with serve(settings={"max_upload_bytes": LIMIT}) as served:
        digest = (await served.engine.load_adapter("a")).digest
        expected = (await served.engine.complete("x", greedy(8), adapter="a")).token_ids
        for name, (body, kind) in bodies.items():
            status, answer = await upload(served, body, name, kind=kind or "application/octet-stream")
            assert (status, answer["digest"], answer["version"]) == (200, digest, 1), answer
            output = await served.engine.complete("x", greedy(8), adapter=name)
            assert output.token_ids == expected
        status, answer = await upload(served, bodies["zip"][0], "zip")
        assert status == 400 and "already been loaded" in answer["error"]["message"]
        for given, words in (("false", "already been loaded"), ("yes", "load_inplace")):
            status, answer = await upload(served, bodies["zip"][0], "zip", load_inplace=given)
            assert status == 400 and words in answer["error"]["message"]
        status, answer = await upload(served, bodies["zip"][0], "zip", load_inplace=True)
        assert (status, answer["version"]) == (200, 2)
        served.engine.check_invariants()


@pytest.mark.slow
async def test_refused(serve: Serve, tiny_text: Tiny) -> None:
    good = {name: (tiny_text.adapters["a"] / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    async with serve() as served:
        status, answer = await upload(served, zipped(good))
        assert (status, answer["error"]["code"]) == (403, "adapter_uploads_disabled")
    async with serve(settings={"max_upload_bytes": 300_000}) as served:
        for body, name, words, wanted in [
            (zipped(good | {WEIGHTS: good[WEIGHTS][:-8]}), "new", "truncated", 400),
            (zipped(good | {CONFIG: b"{}"}), "new", "peft_type", 400),
            (zipped(good), "bad name", "lora_name", 400),
            (zipped(good), "tiny", "lora_name", 400),
            (b"\0" * 300_001, "new", "larger than the 300000 bytes", 413),
        ]:
            status, answer = await upload(served, body, name)
            assert (status, words in answer["error"]["message"]) == (wanted, True), answer
        assert [info.name for info in served.engine.adapters()] == ["a"]
    keys = {"api_keys": {"user": "t"}, "admin_keys": {"root": "t"}, "max_upload_bytes": LIMIT}
    async with serve(settings=keys, key="user") as served:
        assert (await upload(served, zipped(good)))[0] == 403
    async with serve(settings=keys, key="root") as served:
        assert (await upload(served, zipped(good)))[0] == 200


BOMB = b"\0" * (LIMIT + (17 << 20))


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"", "", "damaged"),
        (b"PK\x03\x04", "", "damaged"),
        (zipped({CONFIG: b"{}"})[:-30], "", "damaged"),
        (zip_with_a_second_directory(20_000), "", "directory has more"),
        (zipped({WEIGHTS: b"\0" * 100}, zipfile.ZIP_BZIP2), "", "deflated or stored"),
        (header("x", b"2 " * 5000 + b"=\n", tarfile.XHDTYPE), "", "more than 8192 bytes"),
        (header("x", b"2 " * 4000 + b"=\n", tarfile.XHDTYPE), "", "damaged|has no"),
        (header("x", b"9" * 4000, tarfile.XHDTYPE), "", "damaged|has no"),
        (
            header("x", b"22 GNU.sparse.major=1\n", tarfile.XHDTYPE) + header(WEIGHTS, b"x" * 600),
            "",
            "sparse",
        ),
        (header("x", b"", tarfile.GNUTYPE_LONGNAME) * 1001, "", "not supported"),
        (header(WEIGHTS, b"") + gzip.compress(b"") * 1000, "", "has no"),
        (gzip.compress(b"") * 1000, "", "cut off"),
        (zipped({WEIGHTS: BOMB}), "", "more than 1048576 bytes"),
        (tarred({"other": BOMB}, "w:gz"), "", "unpacks to more"),
        (gzip.compress(b"\0" * 100), "", "damaged"),
        (zipped({CONFIG: b"x" * 300_000}), "", "more than 262144 bytes"),
        (zipped({f"{i:060}": b"" for i in range(3000)}), "", "directory has more"),
        (tarred({str(i): b"" for i in range(1001)}), "", "more than 1000 members"),
        (zipped({CONFIG: b"{}"}), "", "has no adapter_model.safetensors"),
        (zipped({f"a/{CONFIG}": b"{}", f"b/{WEIGHTS}": b""}), "", "different folders"),
        (zipped({f"a/{CONFIG}": b"{}", f"b/{CONFIG}": b"{}"}), "", "more than one"),
        (b"--x\r\nnonsense", FORM, "damaged"),
        (formed({str(i): b"" for i in range(20)}), FORM, "damaged"),
        (formed({CONFIG: b"{}"}), FORM, "has no adapter_model.safetensors"),
        (b"x", "multipart/form-data", "damaged"),
    ],
    ids=range(25),
)
def test_what_is_no_upload(body: bytes, kind: str, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        unpack(body, kind, LIMIT)
    assert caught.value.status in (400, 413)


def test_links_are_not_followed() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        link = tarfile.TarInfo(CONFIG)
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(ApiError, match=f"has no {CONFIG}"):
        unpack(out.getvalue(), "", LIMIT)


LONG = "a" * 150 + "/"
SOUND = {f"{LONG}{CONFIG}": b"{}", f"{LONG}{WEIGHTS}": bytes(range(256)) * 20}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_long_names(form: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, data in SOUND.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    assert unpack(out.getvalue(), "", LIMIT) == tuple(SOUND.values())


@settings(max_examples=300, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_damaged_bytes_are_refused(data: st.DataObject) -> None:
    """Whatever is wrong with them, or they are read."""
    sound, kind = data.draw(
        st.sampled_from(
            [(zipped(SOUND), ""), (tarred(SOUND), ""), (tarred(SOUND, "w:gz"), ""), (formed(SOUND), FORM)]
        )
    )
    body = bytearray(sound)
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
        unpack(bytes(body), kind, LIMIT)
