"""The router that Serve makes in the gateway: the gateway goes on while Ray's head does not answer it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fleet_process import needs_ray
from support.waiting import SECONDS, until

needs_ray()

from ray.serve.request_router import RequestRouter  # noqa: E402

from aioengine.fleet.gateway import obey  # noqa: E402


class Head:
    """Ray's head: says what it knows of a replica, once it answers."""

    def __init__(self) -> None:
        self.answers = threading.Event()
        self.silent: set[str] | None = None
        """Replicas of which it says nothing until ``answers`` is set; None: of none of them."""
        self.failing: set[str] = set()
        self.gone: set[str] = set()
        self.fails = 0
        self.asked: list[str] = []

    def wrapper(self, info: Any) -> Any:
        self.asked.append(info.replica_id.unique_id)
        if info.replica_id.unique_id in self.failing:
            raise TimeoutError("no answer for this one")
        if self.silent is None or info.replica_id.unique_id in self.silent:
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
    return router_of(head, monkeypatch)


def router_of(head: Head, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A router that knows "a" already."""
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


IDS = {name: Id(name) for name in "abcdef"}


def infos(names: str) -> list[Any]:
    return [SimpleNamespace(replica_id=IDS[name]) for name in names]


def known(router: Any) -> str:
    return "".join(sorted(replica.unique_id for replica in router._replicas))


async def test_the_loop_goes_on_and_the_last_word_counts(router: Any, head: Head) -> None:
    router._update_running_replicas(infos("ab"))
    await until(lambda: bool(head.asked))
    assert known(router) == "a", "and this loop has not waited for the head"
    router._update_running_replicas(infos("abc"))
    assert known(router) == "a"
    router._update_running_replicas(infos("bc"))
    assert known(router) == "", "what is gone does not wait for what is new"
    head.answers.set()
    await until(lambda: known(router) == "bc")
    assert head.asked == ["b", "c"]


async def test_serve_pauses_before_it_asks_again(router: Any) -> None:
    """Serve's own loop would ask again at once, and for ever, while the replica that it got is of no use."""
    pending: Any = SimpleNamespace(kwargs={"to": "a"}, routing_context=SimpleNamespace(should_backoff=False))
    paused = []

    async def pause(attempt: int) -> None:
        paused.append(attempt)

    router._backoff, router._replicas_list = pause, list(router._replicas.values())
    router.num_routing_tasks_in_backoff = 0
    router.num_routing_tasks_in_backoff_gauge = SimpleNamespace(set=lambda value: None)
    chosen = router._choose_replicas_with_backoff(pending)
    for _ in range(4):
        assert [replica.replica_id.unique_id for replica in await anext(chosen)] == ["a"]
    await chosen.aclose()
    assert paused == [0, 1]


async def test_what_is_known_is_taken_at_once(router: Any, head: Head) -> None:
    router._update_running_replicas([])
    assert known(router) == "" and not head.asked


async def test_a_head_that_fails_is_asked_again_and_the_dead_are_left_out(router: Any, head: Head) -> None:
    head.fails, head.gone = 2, {"c"}
    head.answers.set()
    router._update_running_replicas(infos("abcd"))
    await until(lambda: known(router) == "abd")
    assert sorted(head.asked[:3]) == ["b", "c", "d"] and len(head.asked) == 5


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sets(st.sampled_from("abcdef")), max_size=5), st.sets(st.sampled_from("bcdef")), st.data())
def test_who_is_not_found_holds_up_nobody(said: list[set[str]], lost: set[str], data: st.DataObject) -> None:
    """Whatever Serve says, what goes is gone at once, and what is found is there. For those that are lost the
    head fails, or has no answer."""
    silent = set(data.draw(st.permutations(sorted(lost)))[: data.draw(st.integers(0, obey.THREADS - 1))])

    async def main() -> None:
        head = Head()
        router = router_of(head, patch)
        head.silent, head.failing = silent, lost - silent
        for names in said:
            before = known(router)
            router._update_running_replicas(infos("".join(sorted(names))))
            assert set(known(router)) == set(before) & names
            await until(lambda names=names: set(known(router)) == names - lost)  # type: ignore[misc]
        head.answers.set()
        router._update_running_replicas([])
        assert known(router) == ""
        await until(lambda: not router._asking)

    with pytest.MonkeyPatch.context() as patch:
        asyncio.run(main())
