"""Which GPU each rank has: of those of the machine its own, or the only one that Ray shows it."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import torch
from support.engine_fixtures import Tiny

from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.executors import parts
from aioengine.executors.process import worker
from aioengine.executors.ray.workers import RankActor
from aioengine.model import build as builder
from aioengine.model.parallel.group import Shard


class Group:
    """Ranks that exchange nothing."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard


class Chosen(Exception):
    """Raised instead of building a model."""


@pytest.mark.parametrize(
    ("executor", "seen", "expected"), [("process", 2, 1), ("process", 1, None), ("ray", 1, 0), ("ray", 8, 0)]
)
def test_the_gpu_of_a_rank(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, executor: Any, seen: int, expected: int | None
) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**33, 2**33))

    def build(*_: object, device: str, **__: object) -> None:
        raise Chosen(device)

    monkeypatch.setattr(builder, "build_runner", build)
    config = EngineConfig(
        model=str(tiny.model), device="cuda", dtype="bfloat16", executor=executor, tensor_parallel_size=2
    )
    if expected is None:
        with pytest.raises(ConfigError, match="there are 1 CUDA devices, and every rank needs one"):
            parts.plan_parts(config, Shard(1, 2))
        return
    planned = parts.plan_parts(config, Shard(1, 2))
    assert current == [expected], "memory is measured there, and NCCL takes it"
    with pytest.raises(Chosen, match=f"^cuda:{expected}$"):
        parts.build_parts(config, planned, Group(Shard(1, 2)))  # type: ignore[arg-type]


def test_a_rank_sees_the_gpu_that_ray_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Ray was told to leave CUDA_VISIBLE_DEVICES alone."""
    ray = pytest.importorskip("ray")
    served: list[str] = []

    class Worker:
        def __init__(self, rank: int, connection: socket.socket) -> None:
            self.connection = connection

        def run(self) -> None:
            self.connection.close()
            served.append(os.environ["CUDA_VISIBLE_DEVICES"])

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [2])
    monkeypatch.setattr(worker, "Worker", Worker)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    actor = RankActor()
    where = actor.place()
    with (
        socket.create_connection((where.host, where.port)) as stranger,
        socket.create_connection((where.host, where.port)) as engine,
    ):
        stranger.sendall(b"hullo")
        engine.sendall(b"hello")
        actor.run(1, b"hello")
        assert stranger.recv(1) == b"", "who does not know the secret is turned away"
    assert served == ["2"]
