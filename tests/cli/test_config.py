"""One file for everything: ``[server]``, the environment, flags; what can be read again; and ``config``."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import signal
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from support.engine_fixtures import Tiny, tiny_text
from support.hanging_files import hanging
from support.server_process import Serving, serving
from support.tiny_models import build_adapter

from aioengine.cli.config import reload as reloads
from aioengine.cli.config.checked import ServerFlags, check_all, server_config
from aioengine.cli.flags import EngineFlags
from aioengine.cli.main import main
from aioengine.errors import ConfigError
from aioengine.fleet.config import FleetConfig
from aioengine.server.settings import SERVER_FIELDS, ServerSettings, settings_from

__all__ = ["tiny_text"]

LOADED = 'aioengine_config_last_reload_successful{engine="default",file="config"}'


@pytest.fixture
def file(tmp_path: Path, tiny_text: Tiny) -> Path:
    path = tmp_path / "server.toml"
    path.write_text(
        f'model = "{tiny_text.model}"\nmax_num_seqs = 3\n[lora]\nmax_loras = 2\n'
        '[server]\nport = 1234\nkeep_dead = true\nserved_model_name = ["tiny"]\n'
    )
    return path


def shown(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["config", "check", *flags]) == 0
    said = capsys.readouterr()
    assert "good" in said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def test_flags_go_before_variables_and_those_before_the_file(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOENGINE_MAX_NUM_SEQS", "5")
    monkeypatch.setenv("AIOENGINE_PORT", "2345")
    monkeypatch.setenv("AIOENGINE_GRACE_SECONDS", "7")
    found = shown(capsys, "--config", str(file), "--port", "3456", "--api-key", "a:sk-not-shown")
    server, engine = found["server"], found["engine"]
    assert (server["port"], server["grace_seconds"], server["keep_dead"]) == (3456, 7.0, True)
    assert server["served_model_name"] == ["tiny"] and server["api_key"] is None
    assert (engine["max_num_seqs"], engine["lora"]["max_loras"], engine["block_size"]) == (5, 2, 16)
    monkeypatch.setenv("AIOENGINE_CONFIG", str(file))
    assert shown(capsys)["server"]["port"] == 2345


def test_mistyped_variables_are_named(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no effect, and nothing else would say so."""
    names = [
        f"AIOENGINE_{flag.upper()}" for flag in (*SERVER_FIELDS, "max_num_seqs", "max_loras", "replicas")
    ]
    for name in names:
        monkeypatch.setenv(f"{name}X", "1")
    monkeypatch.setenv("AIOENGINE_KERNELS", "torch")
    monkeypatch.setenv("AIOENGINE_UNKNOWN", "1")
    assert main(["config", "check", "--config", str(file)]) == 0
    said = capsys.readouterr().err
    assert "AIOENGINE_UNKNOWN: no flag" in said, "a parameter of the command, and no flag"
    for name in names:
        assert f"{name}X: no flag has this variable (did you mean '{name}'?)" in said
    assert "AIOENGINE_KERNELS" not in said


def test_a_variable_that_kubernetes_makes_of_a_service_is_named_unless_the_flag_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOENGINE_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("AIOENGINE_PORT_80_TCP_PORT", "80")
    assert main(["serve"]) == 2
    assert "Invalid value for AIOENGINE_PORT" in capsys.readouterr().err
    assert shown(capsys, "--port", "2345")["server"]["port"] == 2345


@pytest.mark.parametrize("change", ["\ufeff{}", "{}"], ids=["byte order mark", "line ends"])
def test_files_of_other_editors_are_read(change: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = change.format(file.read_text().replace("\n", "\r\n"))
    file.write_bytes(text.encode())
    assert shown(capsys, "--config", str(file))["engine"]["max_num_seqs"] == 3


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[server]\nprt = 1", "did you mean 'port'?"),
        ("server = 3", "must be a table [server]"),
        ('[server]\nport = "many"', "[server] of"),
        ('[server]\nkeys = "/nowhere/keys.toml"', "/nowhere/keys.toml"),
        ('[lora]\nadapter_root = "/nowhere/adapters"', "there is no such folder"),
        ("[server]\ngrace_secs = 1", "has no field 'grace_secs'"),
        ("[server]\ngrace_seconds = -1", "--grace-seconds=-1"),
        ("[fleet]\nreplcas = 2", "did you mean 'replicas'?"),
        ("[fleet]\nserved_model_names = ['x']", "set served_model_name in [server]"),
        ("[adapters]\nx = '/nowhere'", "x=/nowhere"),
        ("[adapters]\nx = 'ADAPTER'\n[server]\nserved_model_name = ['x']", "'x' is the base model's name"),
        ("[server]\ntls_cert = '/nowhere.pem'", "--tls-key"),
        ("policy = 'fcs'", "did you mean 'fcfs'"),
        ("chat_template = '/nowhere.jinja'", "/nowhere.jinja: cannot be read"),
        ("kv_cache_memory = '1KiB'", "raise kv_cache_memory"),
        ("[server]\ngeneration_config = '/nowhere'", '"auto", "none"'),
        ("[server]\ntls_cert = '/nowhere.pem'\ntls_key = '/nowhere.pem'", "No such file"),
    ],
)
@pytest.mark.slow
def test_what_is_wrong_is_named(
    line: str, says: str, tmp_path: Path, tiny_text: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(f'model = "{tiny_text.model}"\n{line}\n'.replace("ADAPTER", str(tiny_text.adapters["a"])))
    assert main(["config", "check", "--config", str(path)]) == 2
    assert says in capsys.readouterr().err


def test_the_servers_table_has_the_flags_of_serve() -> None:
    flags = {field.name: field.default for field in dataclasses.fields(ServerFlags)}
    assert flags.keys() == SERVER_FIELDS
    assert settings_from(flags) == settings_from({}) == ServerSettings()


def test_one_text_is_a_list_of_one() -> None:
    found = settings_from(
        {
            "api_key": "alice:sk-1a",
            "allowed_host": "example.com",
            "served_model_name": "m",
            "open_objects": "false",
        }
    )
    assert found.api_keys == {"sk-1a": "alice"} and list(found.allowed_hosts) == ["example.com"]
    assert list(found.served_model_names) == ["m"] and not found.schemas.open_objects
    assert settings_from({"allowed_host": ["*", "x"]}).allowed_hosts == ()
    for table in (
        {"api_key": ["sk-secret", 3]},
        {"admin_key": {"sk-secret": 1}},
        {"keys": 3},
        {"allowed_host": {"a": 1}},
        {"max_choices": "many"},
        {"any_whitespace": "x"},
    ):
        with pytest.raises(ConfigError) as caught:
            settings_from(table)
        assert "sk-secret" not in str(caught.value), "it is logged"


def test_the_table_of_a_fleet_makes_one(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Flags go before it, and without it there is none."""
    assert shown(capsys, "--config", str(file))["fleet"] is None
    file.write_text(file.read_text() + "[fleet]\nreplicas = 2\nsilent_seconds = 4.0\n")
    found = shown(capsys, "--config", str(file), "--router", "p2c")
    fleet = found["fleet"]
    assert (fleet["replicas"], fleet["silent_seconds"], fleet["router"]) == (2, 4.0, "p2c")
    assert main(["serve", "--config", str(file), "--record", "trace.jsonl"]) == 2
    assert "remove --replicas" in capsys.readouterr().err


class Reloaded:
    """A server whose file is written anew; ``said`` are the messages of its log since."""

    def __init__(self, server: Serving, file: Path) -> None:
        self._server = server
        self._file = file

    async def with_(self, text: str, until: str) -> list[str]:
        """What the log says, up to a line with ``until`` in it."""
        await asyncio.to_thread(self._file.write_text, text)
        before = len(self._server.lines)
        self._server.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(60):
            while True:
                said = [line["message"] for line in self._server.lines[before:]]
                if any(until in message for message in said):
                    return said
                await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_sighup_reads_the_file_again(file: Path, tiny_text: Tiny, tmp_path: Path) -> None:
    text = await asyncio.to_thread(file.read_text)
    adapter = tiny_text.adapters["a"]
    other = build_adapter(tiny_text.model, tmp_path / "other", seed=9)
    first = f'{text}[adapters]\nstays = "{adapter}"\nmoves = "{adapter}"\ngoes = "{adapter}"\n'
    await asyncio.to_thread(file.write_text, first)
    async with serving(tiny_text.model, "--config", str(file), "--max-choices", "7") as server:
        reload = Reloaded(server, file).with_
        limit = 'aioengine_requests_waiting_limit{engine="default"} '
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=60) as http:

            async def answers(model: str, **fields: Any) -> httpx.Response:
                body = {"model": model, "prompt": "Hi", "max_tokens": 4, "temperature": 0, **fields}
                return await http.post("/v1/completions", json=body)

            async def text_of(model: str) -> str:
                return str((await answers(model)).json()["choices"][0]["text"])

            assert f"{limit}1024.0" in (await http.get("/metrics")).text
            before = {name: await text_of(name) for name in ("tiny", "stays", "moves", "goes")}
            assert before["stays"] == before["moves"] != before["tiny"]

            changed = (
                "max_waiting = 17\nblock_size = 8\npolicy = 'edf'\n"
                + text.replace("port = 1234", "port = 99").replace(
                    '["tiny"]', '["alias", "tiny"]\nmax_choices = 9'
                )
                + "default_max_tokens = 3\n"
                + f'[adapters]\nstays = "{adapter}"\nmoves = "{other}"\ncomes = "{adapter}"\n'
            )
            said = await reload(changed, "need a restart")
            assert said[-1].endswith("restart: block_size"), "the flag --port goes before the file"
            assert said[-2] == (
                "read the configuration again; changed: max_waiting=17, policy=edf, "
                "[server] served_model_name=['alias', 'tiny'], [server] default_max_tokens=3, "
                "registered comes, replaced moves, unloaded goes"
            ), "the flag --max-choices goes before the file"
            assert f"{limit}17.0" in (await http.get("/metrics")).text
            assert await text_of("alias") == before["tiny"]
            assert (
                await text_of("stays") == await text_of("comes") == before["stays"] != await text_of("moves")
            )
            assert (await answers("goes")).status_code == 404
            assert (await answers("tiny", n=8)).status_code == 400

            # All or nothing, whatever of it is wrong.
            broken = changed.replace(str(other), str(tmp_path / "nowhere"))
            for wrong, why in (
                ("max_waiting = 0\n" + text, "max_waiting"),
                (changed.replace("'edf'", "'efd'").replace("waiting = 17", "waiting = 18"), "efd"),
                (changed.replace("tokens = 3", "tokens = 'x'"), "[default-max-tokens]"),
                (broken.replace("waiting = 17", "waiting = 19"), "there is no such folder"),
                (f'{changed}"no name" = "{adapter}"\n'.replace("waiting = 17", "waiting = 20"), "no name"),
            ):
                said = await reload(wrong, "stays as it was")
                assert why in said[-1]
                text = (await http.get("/metrics")).text
                assert f"{limit}17.0" in text and f"{LOADED} 0.0" in text
            assert (await reload(changed, "need a restart"))[-2].endswith("; changed: nothing")
            assert f"{LOADED} 1.0" in (await http.get("/metrics")).text
            assert (await reload(f"{changed}[fleet]\nreplicas = 2\n", "need a restart"))[-1].endswith(
                "[fleet]"
            )
        server.process.send_signal(signal.SIGTERM)
        assert await server.end() == 0


async def test_a_file_on_a_disk_that_hangs_is_given_up(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reloads, "READ_SECONDS", 0.01)
    flags = EngineFlags(config=file)
    reloader = reloads.Reloader(check_all(engine=flags), lambda: check_all(engine=flags))
    with hanging(file):
        await reloader.reload(cast(Any, object()), app=cast(Any, None))
    assert "stays as it was: its files could not be read within 0.01 s" in caplog.text and not reloader.good


@pytest.mark.parametrize(("given", "policy"), [(None, "fair"), ("fcfs", "fcfs"), ("vtc", "vtc")])
def test_a_server_shares_between_tenants_unless_a_policy_is_given(given: str | None, policy: str) -> None:
    assert server_config(EngineFlags(policy=given)).policy == policy
    values = {} if given is None else {"policy": given}
    assert FleetConfig.from_dict({"model": "m", **values}).engine.policy == policy
