"""The router that Serve makes in the door: the door goes on while Ray's head does not answer it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from support.fleet_process import needs_ray
from support.waiting import SECONDS, until

needs_ray()

from ray.serve.request_router import RequestRouter  # noqa: E402

from aioengine.fleet.door import obey  # noqa: E402


class Head:
    """Ray's head: says what it knows of a replica, once it answers."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.gone: set[str] = set()
        self.fails = 0
        self.asked: list[str] = []

    def wrapper(self, info: Any) -> Any:
        self.asked.append(info.replica_id.unique_id)
        assert self.answers.wait(SECONDS)
        if self.fails:
            self.fails -= 1
            raise TimeoutError("no answer from the head")
        if info.replica_id.unique_id in self.gone:
            raise ValueError("Failed to look up actor")
        return SimpleNamespace(replica_id=info.replica_id, update_replica_info=lambda info: None)


@pytest.fixture
def head() -> Iterator[Head]:
    head = Head()
    yield head
    head.answers.set()


@pytest.fixture
def router(head: Head, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Knows "a" already."""
    made = object.__new__(obey.ObeyingRouter)
    made._create_replica_wrapper_func = head.wrapper
    made._deployment_id = SimpleNamespace(app_name="app")
    made._replicas = {}

    def update(self: Any, replicas: list[Any]) -> None:
        self._replicas = {replica.replica_id: replica for replica in replicas}

    monkeypatch.setattr(RequestRouter, "update_replicas", update)
    monkeypatch.setattr(obey, "ASK_SECONDS", 0.01)
    monkeypatch.setenv("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")
    made.initialize_state()
    made.update_replicas([SimpleNamespace(replica_id=IDS["a"], update_replica_info=lambda info: None)])
    return made


class Id(NamedTuple):
    unique_id: str


IDS = {name: Id(name) for name in "abcd"}


def infos(names: str) -> list[Any]:
    return [SimpleNamespace(replica_id=IDS[name]) for name in names]


def known(router: Any) -> str:
    return "".join(sorted(replica.unique_id for replica in router._replicas))


async def test_the_loop_goes_on_and_the_last_word_counts(router: Any, head: Head) -> None:
    router._update_running_replicas(infos("ab"))
    await until(lambda: bool(head.asked))
    assert known(router) == "a", "and this loop has not waited for the head"
    router._update_running_replicas(infos("abc"))
    router._update_running_replicas(infos("bc"))
    head.answers.set()
    await until(lambda: known(router) == "bc")
    assert head.asked == ["b", "c"]


async def test_what_is_known_is_taken_at_once(router: Any, head: Head) -> None:
    router._update_running_replicas([])
    assert known(router) == "" and not head.asked


async def test_a_head_that_fails_is_asked_again_and_the_dead_are_left_out(router: Any, head: Head) -> None:
    head.fails, head.gone = 2, {"c"}
    head.answers.set()
    router._update_running_replicas(infos("abcd"))
    await until(lambda: known(router) == "abd")
    assert head.asked == ["b", "b", "b", "c", "d"]
