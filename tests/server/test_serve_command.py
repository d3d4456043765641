"""``aioengine serve`` as a process: its signals, its log, its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from support.engine_fixtures import Tiny
from support.ports import held_port
from support.server_process import SMALL, serving

from aioengine.cli.main import main


@pytest.mark.slow
async def test_sigterm_finishes_what_was_accepted(tiny_text: Tiny) -> None:
    flags = ["--api-key", "team:sk-secret", "--served-model-name", "tiny", "--lora-modules"]
    flags += [f"a={tiny_text.adapters['a']}"]
    async with serving(tiny_text.model, *flags, AIOENGINE_API_KEYS="team:sk-other") as server:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sk-secret", max_retries=0)
        stream = await client.completions.create(
            model="a", prompt="Hello", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        server.process.send_signal(signal.SIGTERM)
        headers = {"authorization": "Bearer sk-other"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False) as http:
            async with asyncio.timeout(60):
                while (await http.get("/ready")).status_code != 503:
                    await asyncio.sleep(0.001)
            refused = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
            assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        await client.close()
        assert await server.end() == 0
    done = next(line for line in server.lines if line.get("finish_reason"))
    assert done["tenant"] == "team" and done["adapter"] == "a" and done["output_tokens"] == 400
    assert {"time", "level", "logger", "request_id", "ttft", "seconds", "status"} <= set(done)
    assert "sk-" not in json.dumps(server.lines)


@pytest.mark.slow
async def test_a_second_signal_gives_up(tiny_text: Tiny) -> None:
    async with serving(tiny_text.model, "--served-model-name", "tiny") as server:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        streams = [
            await client.completions.create(
                model="tiny", prompt=f"{i}", max_tokens=490, stream=True, extra_body={"ignore_eos": True}
            )
            for i in range(8)
        ]
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGINT)
        assert await server.end() == 1
        for stream in streams:
            await stream.close()
        await client.close()


@pytest.mark.slow
async def test_the_grace_has_an_end(tiny_text: Tiny) -> None:
    async with serving(tiny_text.model, "--served-model-name", "tiny", "--grace-seconds", "0.01") as server:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = await client.completions.create(
            model="tiny", prompt="x", n=8, max_tokens=490, stream=True, extra_body={"ignore_eos": True}
        )
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopped"):
            async for _ in stream:
                pass
        assert await server.end() == 1
        await client.close()
    assert not any("exception" in line for line in server.lines)
    assert [line["error"] for line in server.lines if line["message"] == "request"] == ["unavailable"]


@pytest.mark.slow
def test_what_is_refused_is_refused_before_the_model_is_loaded(
    tiny_text: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioengine.cli.serve.configure_logging", lambda *given: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, what in (
            (["--port", port], port),
            (["--port", "99999"], "99999"),
            (["--api-key", "a b"], "--api-key"),
            (["--max-body-bytes", "0"], "max_body_bytes"),
            (["--grace-seconds", "-1"], "grace"),
            (["--max-connections", "0"], "max_connections"),
            (["--header-timeout", "nan"], "header_timeout"),
            (["--keep-alive", "-1"], "keep_alive"),
            (["--admin-key", "ops:"], "--admin-key"),
            (["--lora-modules", "a=/nowhere"], "a=/nowhere"),
            (["--served-model-name", "a", "--lora-modules", f"a={tiny_text.adapters['a']}"], "'a'"),
        ):
            assert main(["serve", "--model", str(tiny_text.model), *SMALL, *flags]) == 2
            assert what in capsys.readouterr().err


@pytest.fixture
def port() -> Iterator[int]:
    with held_port() as found:
        yield found


def handles_hangups(pid: int) -> bool:
    """Whether the process handles SIGHUP by now, as Linux says; Python itself takes a moment to start."""
    [caught] = re.findall(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)


@pytest.mark.slow
async def test_probes_are_answered_while_the_engine_starts(
    tiny_text: Tiny, tmp_path: Path, port: int
) -> None:
    """The kernels' compiler waits for a file, so that the start lasts for as long as the test looks at it."""
    go_on, compiler = tmp_path / "go-on", tmp_path / "c++"
    wait = f"while [ ! -e {go_on} ]; do sleep 0.05; done"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || {wait}\nexit 1\n')
    compiler.chmod(0o755)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aioengine", "serve", "--model", str(tiny_text.model), *SMALL),
        *("--port", str(port), "--served-model-name", "tiny"),
        env={**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(60):
            while not handles_hangups(process.pid):
                await asyncio.sleep(0.001)
        process.send_signal(signal.SIGHUP)  # in the middle of its imports
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:

            async def get(path: str) -> httpx.Response:
                async with asyncio.timeout(60):
                    while True:
                        try:
                            return await http.get(path)
                        except httpx.ConnectError:
                            await asyncio.sleep(0.01)

            while "kernels" not in (ready := await get("/ready")).text:
                assert (ready.status_code, ready.json()["status"]) == (503, "starting")
            assert (await get("/health")).status_code == 200
            refused = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "starting")
            assert "retry-after" in refused.headers
            process.send_signal(signal.SIGHUP)  # is for when it has started, and does not end it
            assert (await get("/health")).status_code == 200
            go_on.touch()  # the compilers fail now, and plain torch is used
            async with asyncio.timeout(60):
                while (await get("/ready")).status_code != 200:
                    await asyncio.sleep(0.01)
            done = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1})
            assert done.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
