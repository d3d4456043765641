"""The application wholly inside Serve: ``serve build`` writes it down, and ``serve run`` runs that file."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from support.engine_fixtures import Tiny
from support.fleet_process import needs_ray, until
from support.ray_nodes import Nodes

from aioengine.fleet.cluster import TRANSPORT

pytestmark = pytest.mark.slow

needs_ray()


@pytest.fixture
def environment(nodes: Nodes, tiny_text: Tiny, tmp_path: Path) -> dict[str, str]:
    config = tmp_path / "fleet.toml"
    config.write_text(
        f'model = "{tiny_text.model}"\ndtype = "float32"\nmax_model_len = 500\nkv_cache_memory = "32MiB"\n'
        f"[lora]\nmax_loras = 2\n[fleet]\nreplicas = 1\n"
        '[server]\nserved_model_name = ["tiny"]\napi_key = ["alice:sk-1"]\nport = 1\n'
        f'[adapters]\na = "{tiny_text.adapters["a"]}"\n'
    )
    return {**os.environ, **TRANSPORT, "AIOENGINE_CONFIG": str(config), "RAY_ADDRESS": nodes.address}


def test_built_and_run(environment: dict[str, str], tiny_text: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    serve = [sys.executable, "-m", "ray.serve.scripts"]
    build = [*serve, "build", "aioengine.fleet:app", "-o", str(file)]
    subprocess.run(build, check=True, timeout=120, env=environment, capture_output=True)
    built = yaml.safe_load(file.read_text())
    (application,) = built["applications"]
    deployments = {deployment["name"]: deployment for deployment in application["deployments"]}
    assert deployments["EngineReplica"]["num_replicas"] == 1 and "Gateway" in deployments
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    built["proxy_location"], built["http_options"] = "HeadOnly", {"host": "127.0.0.1", "port": port}
    # With a file, the application is made in a process of the cluster.
    application["runtime_env"] = {"env_vars": {"AIOENGINE_CONFIG": environment["AIOENGINE_CONFIG"]}}
    file.write_text(yaml.safe_dump(built))
    run = subprocess.Popen(
        [*serve, "run", str(file)],
        env=environment,
        stderr=subprocess.DEVNULL,
        # What a shell runs in the background ignores SIGINT, and so do its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:

            def ready() -> bool:
                assert run.poll() is None
                try:
                    return client.get("/ready").status_code == 200
                except httpx.TransportError:
                    return False

            until(ready, 120)
            body = {"model": "a", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0}
            more = {"ignore_eos": True, "return_token_ids": True}
            assert client.post("/v1/completions", json=body).status_code == 401
            client.headers["authorization"] = "Bearer sk-1"
            assert "tiny" in [model["id"] for model in client.get("/v1/models").json()["data"]]
            (choice,) = client.post("/v1/completions", json=body | more).json()["choices"]
            assert choice["token_ids"] == tiny_text.expected([5, 6, 7], 6, "a")
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(60)
