"""What is wrong with a fleet is said before anything of it is started."""

from __future__ import annotations

import math
import os
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from support.certificates import ray_tls
from support.engine_fixtures import Tiny

from aioengine import EngineConfig
from aioengine.cli.main import main
from aioengine.errors import ConfigError
from aioengine.fleet import FleetConfig, cluster, existing
from aioengine.fleet.cluster import check_address
from aioengine.fleet.config import CONFIG_VARIABLE
from aioengine.fleet.deployment import replica_application
from aioengine.server.settings import settings_from


def config(**fields: Any) -> FleetConfig:
    return FleetConfig(**{"engine": EngineConfig(model="tiny"), **fields})


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"replicas": 0}, "replicas=0: must be >= 1"),
        ({"router": "afinity"}, "did you mean 'affinity'"),
        ({"placement": "hrv"}, "did you mean 'hrw'"),
        ({"migration_limit": -1}, "migration_limit=-1"),
        ({"silent_seconds": 0.6}, "two heartbeats"),
        ({"name": ""}, "name='': must not be empty"),
        ({"name": "\udcff"}, r"name='\\udcff': must be UTF-8"),
        ({"registry": ""}, "registry='': must not be empty"),  # it would be the root of the disk
        ({"registry": "a\udcff"}, r"registry='a\\udcff': must be UTF-8"),
        *[
            ({"replica_wait_seconds": value}, f"replica_wait_seconds={value}: must be {what}")
            for value, what in ((-1.0, ">= 0"), (math.nan, "a finite number"), (math.inf, "a finite number"))
        ],
        *[({"adapters": {name: "x"}}, r"adapters\..*a name is 1 to 255") for name in ("", "sql@1", "s q l")],
        ({"adapters": {"sql": ""}}, r"adapters\.'sql'='': .*a path is not empty"),
        ({"engine": "tiny"}, "engine='tiny': must be an EngineConfig"),
        ({"adapters": {"sql": "/a/\udcff"}}, r"adapters\.sql: the path '/a/\\udcff' is no UTF-8"),
        ({"autoscale": "waiting"}, "did you mean 'waiting_work'"),
        ({"autoscale": "waiting_work:most=0"}, "least=1, most=0"),
        ({"autoscale": "waiting_work:most=2", "replicas": 3}, "replicas=3: must be within the bounds"),
    ],
)
def test_fields(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        config(**fields)


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text('model = "m"\nmax_num_seqs = 8\n[fleet]\nreplicas = 3\n[adapters]\nsql = "x/sql"\n')
    found = FleetConfig.from_toml(path)
    assert (found.replicas, found.engine.max_num_seqs, found.adapters) == (3, 8, {"sql": "x/sql"})
    path.write_text('model = "m"\n[fleet]\nreplica = 3\n')
    with pytest.raises(ConfigError, match=r"table fleet: unknown field 'replica'.*replicas"):
        FleetConfig.from_toml(path)
    path.write_text('model = "m"\n[fleet]\nreplicas = 0\n')
    with pytest.raises(ConfigError, match=r"table fleet: replicas=0"):
        FleetConfig.from_toml(path)


def test_one_file_serves_the_engine_the_fleet_and_the_server(tmp_path: Path) -> None:
    path = tmp_path / "all.toml"
    path.write_text(
        'model = "m"\nmax_num_seqs = 8\n[lora]\nmax_loras = 2\n[fleet]\nreplicas = 3\n[adapters]\nsql = "x"\n'
        '[server]\nport = 9000\nmax_choices = 4\notlp_endpoint = "http://collector:4318"\n'
    )
    engine = EngineConfig.from_toml(path)
    fleet = FleetConfig.from_toml(path)
    assert fleet.engine == msgspec.structs.replace(engine, policy="fair") and engine.max_num_seqs == 8
    assert fleet.otlp_endpoint == "http://collector:4318"
    assert settings_from(fleet.server).max_choices == 4
    path.write_text('model = "m"\n[server]\nprt = 9000\n')
    with pytest.raises(ConfigError, match=r"\[server\] has no field 'prt' \(did you mean 'port'\?\)"):
        FleetConfig.from_toml(path)


def test_the_application_needs_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import aioengine.fleet

    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="AIOENGINE_CONFIG is not set"):
        _ = aioengine.fleet.app


@pytest.mark.parametrize("where", ["head", ":6379", "head:", "head:ray", "head:70000"])
def test_an_address_that_is_none(where: str) -> None:
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS={where}: must be HOST:PORT"):
        check_address(where)


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.slow
def test_an_address_of_something_else(tls: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray would try for a minute, and end the process."""
    pytest.importorskip("grpc")
    monkeypatch.setattr("aioengine.executors.ray.address.CONNECT_SECONDS", 0.3)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    for name, value in (ray_tls(tmp_path) if tls else {}).items():
        monkeypatch.setenv(name, value)
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS={where}: no head of Ray answers.*DEADLINE"):
            check_address(where)
        if tls:
            monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(tmp_path / "nothing"))
            with pytest.raises(ConfigError, match=r"certificate cannot be read.*nothing"):
                check_address(where)


def join(monkeypatch: pytest.MonkeyPatch, fleets: list[str] | None) -> list[str]:
    """Have a Ray cluster on this machine that has these fleets; None: it refuses to be joined. Returns a list
    of the addresses of clusters that are joined."""
    ray, serve = pytest.importorskip("ray"), pytest.importorskip("ray.serve")
    joined: list[str] = []

    def init(address: str, **options: Any) -> None:
        if fleets is None:
            raise ConnectionError("wrong token\nand more")
        joined.append(address)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "current_address", lambda: "here:1")
    monkeypatch.setattr(existing, "fleets_of_cluster", lambda: fleets)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", joined.clear)
    monkeypatch.setattr(serve, "get_deployment_handle", lambda *names: names)
    monkeypatch.setattr(os, "environ", {**os.environ})
    return joined


def test_the_cluster_of_this_machine_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = join(monkeypatch, ["other", "aioengine"])
    assert existing.existing_fleet("aioengine") == ("EngineReplica", "aioengine")
    assert joined == ["auto"]


@pytest.mark.parametrize("command", [["status"], ["drain", "r0"]], ids=str)
@pytest.mark.parametrize(
    "error", [KeyError("Deployment(...) does not exist."), TimeoutError(), RuntimeError("dead\nand more")]
)
def test_a_fleet_that_starts_or_ends_is_looked_at(
    command: list[str],
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its registry is there, but not its replicas."""

    class Handle:
        def broadcast(self, method: str) -> None:
            raise error

    join(monkeypatch, ["aioengine"])
    monkeypatch.setattr("ray.serve.get_deployment_handle", lambda *names: Handle())
    assert main(["fleet", *command]) == 1
    said = capsys.readouterr().err
    assert said.startswith("aioengine: fleet 'aioengine' does not answer (") and "try again" in said
    assert "unexpected" not in said and "and more" not in said


@pytest.mark.parametrize(
    ("fleets", "why"),
    [
        (["a", "b"], "the cluster at here:1 has a, b"),
        ([], "the cluster at here:1 has none"),
        (None, r"'sql' \(wrong token\)"),
    ],
)
def test_no_cluster_that_has_the_fleet(
    fleets: list[str] | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = join(monkeypatch, fleets)
    with pytest.raises(ConfigError, match=why):
        existing.existing_fleet("sql")
    assert not joined


@pytest.mark.parametrize(
    ("device", "found", "ranks", "gpus"),
    [
        ("cpu", True, 1, 0),
        ("auto", False, 1, 0),
        ("auto", True, 1, 1),
        ("auto", True, 4, 4),
        ("cuda", True, 2, 2),
    ],
)
def test_replicas_ask_for_their_gpus(
    monkeypatch: pytest.MonkeyPatch, device: Any, found: bool, ranks: int, gpus: int
) -> None:
    """Ray hides the others, also from a replica that has not asked for any."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    engine = EngineConfig(model="tiny", device=device, executor="process", tensor_parallel_size=ranks)
    fleet = FleetConfig(engine=engine, replicas=2)
    options = replica_application(fleet)._bound_deployment.ray_actor_options
    assert options.get("num_gpus", 0) == gpus
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    if gpus:
        needed = rf"replicas=2: {2 * gpus} GPUs are needed \({gpus} for each\), but the Ray cluster has 1; "
        with pytest.raises(ConfigError, match=needed):
            cluster.open_gateway(fleet, lambda: None)


@pytest.mark.slow
def test_the_command_refuses(
    tiny_text: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    model = str(tiny_text.model)
    before = dict(os.environ)

    def refused(*flags: str) -> str:
        assert main(["serve", "--model", model, "--port", "0", "--max-model-len", "100", *flags]) == 2
        return capsys.readouterr().err

    assert "must be >= 1" in refused("--replicas", "0")
    assert "did you mean 'affinity'" in refused("--replicas", "1", "--router", "afinity")
    assert "--router: needs a fleet; add --replicas" in refused("--router", "affinity")
    assert "CPUs are needed" in refused("--replicas", "4000")
    memory = refused("--replicas", "1", "--kv-cache-memory", "900000GiB")
    assert "too little" in memory
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert "RAY_ADDRESS=127.0.0.1:1: no head of Ray answers there" in refused("--replicas", "1")
    assert {k for k in os.environ if k.startswith("RAY_")} - set(before) <= {"RAY_ADDRESS"}
