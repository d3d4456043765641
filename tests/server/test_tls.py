"""HTTPS: a certificate that is renewed while connections are open, and files that are no good."""

from __future__ import annotations

import asyncio
import signal
import ssl
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from support.certificates import self_signed
from support.engine_fixtures import Tiny
from support.server_process import serving

from aioengine.errors import ConfigError
from aioengine.server.transport.tls import Certificate


async def subject_at(port: int) -> str:
    """The name in the certificate that a new connection is shown."""
    anything = ssl.create_default_context()
    anything.check_hostname, anything.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=anything)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(shown).subject.rfc4514_string()


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
        body = {"model": "tiny", "prompt": "x", "max_tokens": 300, "stream": True, "ignore_eos": True}
        async with (
            httpx.AsyncClient(base_url=server.url, verify=trusted, trust_env=False, timeout=60) as http,
            http.stream("POST", "/v1/completions", json=body) as stream,
        ):
            lines = stream.aiter_lines()
            await anext(lines)
            key.write_text("no key")
            await told("the configuration stays as it was: tls_cert=")
            assert await subject_at(port) == "CN=first"
            self_signed(tmp_path, "second")
            await told("changed: the TLS certificate")
            assert await subject_at(port) == "CN=second"
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        with pytest.raises(httpx.TransportError):  # plain HTTP is not answered
            await httpx.AsyncClient(trust_env=False).get(f"http://127.0.0.1:{port}/health")
        server.process.send_signal(signal.SIGTERM)
        assert await server.end() == 0


async def test_a_handshake_that_does_not_come_is_not_waited_for(tiny_text: Tiny, tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "one")
    flags = ["--tls-cert", str(cert), "--tls-key", str(key), "--header-timeout", "0.5"]
    async with serving(tiny_text.model, *flags) as server:
        reader, writer = await asyncio.open_connection(*server.address)
        async with asyncio.timeout(50):  # other libraries' own limit is 60 s
            assert await reader.read() == b""
        writer.close()


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
