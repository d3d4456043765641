"""Why an engine with executor="ray" does not start: said at once, and nothing is left."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import socket
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny, refused

from aioengine.errors import ConfigError


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, r"executor='ray' needs Ray, which is not installed: pip install 'aioengine\[fleet\]'"),
        ("2.9.3", r"Ray 2\.9\.3 is installed, but executor='ray' needs 2\.60: pip install"),
    ],
)
async def test_no_ray(
    tiny: Tiny,
    make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    said: str,
) -> None:
    found, installed = importlib.util.find_spec, importlib.metadata.version

    def find_spec(name: str, package: str | None = None) -> Any:
        return (None if version is None else object()) if name == "ray" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "ray" else installed(name)
    )
    engine = make_engine(tiny, executor="ray", tensor_parallel_size=2)
    await refused(engine, ConfigError, said)


@pytest.mark.parametrize(
    ("address", "said"),
    [("127.0.0.1:{free}", "no head of Ray answers there"), ("somewhere", "must be HOST:PORT")],
)
async def test_a_cluster_that_does_not_answer(
    tiny: Tiny, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, address: str, said: str
) -> None:
    """Ray itself would try for a minute, and then end this process."""
    ray = pytest.importorskip("ray", reason="Ray has no wheel for this system or Python")
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", address.format(free=free))
    engine = make_engine(tiny, executor="ray", tensor_parallel_size=2)
    await refused(engine, ConfigError, f"RAY_ADDRESS={address.format(free=free)}: {said}")
    assert not ray.is_initialized()
