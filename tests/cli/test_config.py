"""One file for everything: ``[server]``, the environment, flags; what can be read again; and ``config``."""

from __future__ import annotations

import asyncio
import json
import signal
import tomllib
from pathlib import Path

import httpx
import jsonschema
import pytest
from support.engine_fixtures import Tiny, tiny_text
from support.server_process import serving

from aioengine.cli.config.commands import file_schema
from aioengine.cli.main import main

__all__ = ["tiny_text"]


@pytest.fixture
def file(tmp_path: Path, tiny_text: Tiny) -> Path:
    path = tmp_path / "server.toml"
    path.write_text(
        f'model = "{tiny_text.model}"\nmax_num_seqs = 3\n[lora]\nmax_loras = 2\n'
        '[server]\nport = 1234\nkeep_dead = true\nserved_model_name = ["tiny"]\n'
    )
    return path


def shown(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, object]:
    assert main(["config", "show", *flags]) == 0
    return tomllib.loads(capsys.readouterr().out)


def test_flags_go_before_variables_and_those_before_the_file(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOENGINE_MAX_NUM_SEQS", "5")
    monkeypatch.setenv("AIOENGINE_PORT", "2345")
    monkeypatch.setenv("AIOENGINE_GRACE_SECONDS", "7")
    found = shown(capsys, "--config", str(file), "--port", "3456")
    assert found["server"] == {
        "port": 3456,
        "grace_seconds": 7.0,
        "keep_dead": True,
        "served_model_name": ["tiny"],
    }
    assert found["max_num_seqs"] == 5 and found["lora"] == {"max_loras": 2, "max_cpu_loras": 2}
    monkeypatch.setenv("AIOENGINE_CONFIG", str(file))
    assert shown(capsys)["server"]["port"] == 2345  # type: ignore[index]


def test_keys_are_not_shown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--config", str(file), "--api-key", "a:sk-secret"]) == 0
    assert "sk-secret" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[server]\nprt = 1", "did you mean 'port'?"),
        ("server = 3", "must be a table [server]"),
        ('[server]\nport = "many"', "[server] of"),
        ('[server]\nkeys = "/nowhere/keys.toml"', "/nowhere/keys.toml"),
        ('[lora]\nadapter_root = "/nowhere/adapters"', "there is no such folder"),
        ("[server]\ngrace_secs = 1", "has no field 'grace_secs'"),
    ],
)
def test_what_is_wrong_is_named(
    line: str, says: str, tmp_path: Path, tiny_text: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(f'model = "{tiny_text.model}"\n{line}\n')
    assert main(["config", "check", "--config", str(path)]) == 2
    assert says in capsys.readouterr().err


def test_a_good_file_is_good(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "--config", str(file)]) == 0
    assert "good" in capsys.readouterr().out
    jsonschema.validate(tomllib.loads(file.read_text()), file_schema())


def test_the_schema_refuses_what_the_program_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    for wrong in ({"server": {"prt": 1}}, {"max_nm_seqs": 1}, {"dtype": "int3"}, {"lora": {"max_lora": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"model": "m", **wrong}, schema)


async def test_sighup_reads_the_file_again(file: Path, tiny_text: Tiny) -> None:
    text = await asyncio.to_thread(file.read_text)
    async with serving(tiny_text.model, "--config", str(file)) as server:
        limit = 'aioengine_requests_waiting_limit{engine="default"} '
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as http:
            assert f"{limit}1024.0" in (await http.get("/metrics")).text

            async def reload(new: str, until: str) -> None:
                await asyncio.to_thread(file.write_text, new)
                server.process.send_signal(signal.SIGHUP)
                async with asyncio.timeout(60):
                    while not any(until in line["message"] for line in server.lines):
                        await asyncio.sleep(0.01)

            await reload("max_waiting = 17\nblock_size = 8\n" + text.replace("1234", "99"), "take a restart")
            assert f"{limit}17.0" in (await http.get("/metrics")).text
            await reload("max_waiting = 0\n" + text, "stays as it was")
            assert f"{limit}17.0" in (await http.get("/metrics")).text
        server.process.send_signal(signal.SIGTERM)
        assert await server.end() == 0
    said = [line["message"] for line in server.lines]
    [kept] = [line for line in said if "take a restart" in line]
    assert kept.endswith("block_size, [server] port")
    assert any("changed: max_waiting=17" in line for line in said)
