"""HTTPS: a certificate that is renewed while connections are open, and files that are no good."""

from __future__ import annotations

import asyncio
import random
import signal
import ssl
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st
from support.certificates import self_signed
from support.engine_fixtures import Tiny
from support.raw_http import StubApp, loops
from support.server_process import serving

from aioengine.errors import ConfigError
from aioengine.server.run import ListenSettings, listening
from aioengine.server.transport.tls import Certificate


async def subject_at(port: int) -> str:
    """The name in the certificate that a new connection is shown."""
    anything = ssl.create_default_context()
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=anything)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(shown).subject.rfc4514_string()


@pytest.mark.slow
async def test_a_certificate_is_renewed_while_a_stream_goes_on(tiny_text: Tiny, tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "first")
    trusted = ssl.create_default_context(cafile=str(cert))
    flags = ["--tls-cert", str(cert), "--tls-key", str(key), "--served-model-name", "tiny"]
    async with serving(tiny_text.model, *flags) as server:
        port = int(server.url.rpartition(":")[2])

        async def told(what: str) -> None:
            server.process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(60):
                while not any(what in line["message"] for line in server.lines):
                    await asyncio.sleep(0.01)

        assert server.url.startswith("https://127.0.0.1:") and await subject_at(port) == "CN=first"
        assert any("the TLS certificate expires at " in line["message"] for line in server.lines)
        body = {"model": "tiny", "prompt": "x", "max_tokens": 300, "stream": True, "ignore_eos": True}
        async with (
            httpx.AsyncClient(base_url=server.url, verify=trusted, trust_env=False, timeout=60) as http,
            http.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.aiter_lines()
            await anext(lines)
            key.write_text("no key")
            await told("the configuration stays as it was: tls_cert=")
            self_signed(tmp_path, "late", datetime.now(UTC) - timedelta(hours=1))
            await told("the TLS certificate has expired at ")
            assert await subject_at(port) == "CN=first"
            self_signed(tmp_path, "second")
            await told("changed: the TLS certificate")
            assert await subject_at(port) == "CN=second"
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        with pytest.raises(httpx.TransportError):  # plain HTTP is not answered
            await httpx.AsyncClient(trust_env=False).get(f"http://127.0.0.1:{port}/health")
        server.process.send_signal(signal.SIGTERM)
        assert await server.end() == 0


@given(until=st.datetimes(datetime(1970, 1, 1), datetime(2199, 12, 31), timezones=st.just(UTC)))
@settings(max_examples=20)
def test_when_a_certificate_expires(until: datetime, tmp_path_factory: pytest.TempPathFactory) -> None:
    """DER writes the years until 2049 with two digits, and later ones with four."""
    until = until.replace(microsecond=0)
    certificate = Certificate(*map(str, self_signed(tmp_path_factory.mktemp("tls"), "one", until)))
    assert certificate.expires == until.timestamp()


REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\n"


async def stall_after(sent: int, port: int, version: ssl.TLSVersion) -> None:
    """Begin a handshake and the headers of a request, send ``sent`` bytes of them, and no more. Returns once
    the server has closed the connection."""
    anything = ssl.create_default_context()
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE
    anything.maximum_version = version
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = anything.wrap_bio(incoming, outgoing)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with suppress(ConnectionError):
        came, is_done = b"at first", False
        while came and not is_done and sent > 0:
            with suppress(ssl.SSLWantReadError):
                client.do_handshake()
                client.write(REQUEST)
                is_done = True
            data = outgoing.read()
            writer.write(data[:sent])
            sent -= len(data)
            if not is_done and sent > 0:
                came = await reader.read(2**16)
                incoming.write(came)
        await reader.read()
    writer.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("loop", loops())
@pytest.mark.slow
def test_a_client_that_stalls_anywhere_is_let_go(
    loop: Callable[[], asyncio.AbstractEventLoop], version: ssl.TLSVersion, tmp_path: Path
) -> None:
    """In the handshake, in the headers, and when it should say that the connection ends: at 40 places."""
    rng = random.Random(version.name)
    certificate = Certificate(*map(str, self_signed(tmp_path, "one")))

    async def run() -> None:
        limits = ListenSettings(port=0, max_connections=200, header_timeout=0.4, tls=certificate)
        async with asyncio.timeout(20), listening(cast(Any, StubApp()), limits) as url:
            port = int(url.rpartition(":")[2])
            places = [0, 10**6, *(rng.randrange(1, 900) for _ in range(38))]
            await asyncio.gather(*(stall_after(place, port, version) for place in places))

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


@pytest.mark.parametrize("loop", loops())
def test_a_connection_counts_before_its_handshake(
    loop: Callable[[], asyncio.AbstractEventLoop], tmp_path: Path
) -> None:
    """Of four connections, one address may have three."""
    anything = ssl.create_default_context()
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE
    certificate = Certificate(*map(str, self_signed(tmp_path, "one")))

    async def run() -> None:
        limits = ListenSettings(port=0, max_connections=4, tls=certificate)
        async with listening(cast(Any, StubApp()), limits) as url:
            port = int(url.rpartition(":")[2])

            async def silent() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                return await asyncio.open_connection("127.0.0.1", port)

            async def status(address: str) -> bytes:
                """Of a request from there; empty if the connection is closed."""
                try:
                    reader, writer = await asyncio.open_connection(
                        "127.0.0.1", port, ssl=anything, local_addr=(address, 0)
                    )
                    try:
                        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                        return (await reader.readuntil(b"\r\n"))[9:12]
                    finally:
                        writer.transport.abort()
                except (OSError, asyncio.IncompleteReadError):
                    return b""

            async def until_answered() -> None:
                async with asyncio.timeout(60):
                    while await status("127.0.0.1") != b"200":
                        await asyncio.sleep(0.01)

            held = [await silent() for _ in range(3)]
            assert await status("127.0.0.1") == b"", "there is no room for it"
            assert await status("127.0.0.2") == b"200", "another address has room"
            for _, writer in held:
                writer.close()
            await until_answered()  # places of clients that have left are free again
            for _ in range(8):
                reader, writer = await silent()
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")  # no handshake
                await reader.read()
                writer.close()
                await until_answered()
            reader, writer = await silent()
            _, greeted = await silent()
            greeted.write(b"\x16\x03\x01")  # the beginning of one
            await greeted.drain()
        async with asyncio.timeout(60):
            with suppress(ConnectionError):
                assert await reader.read() == b""  # the server does not wait for them
        writer.close()
        greeted.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(run())


def test_files_that_are_no_good_are_named(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "one")
    (tmp_path / "other").mkdir()
    _, other_key = self_signed(tmp_path / "other", "other")
    for one, two, why in (
        (tmp_path / "nowhere", key, "No such file"),
        (cert, other_key, "KEY_VALUES_MISMATCH"),
        (key, cert, "PEM"),
    ):
        with pytest.raises(ConfigError, match=f"tls_cert='{one}', tls_key='{two}': .*{why}.*must be PEM"):
            Certificate(str(one), str(two))
