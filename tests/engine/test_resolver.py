"""Adapters that nobody registered: the engine asks its resolver, once, and nobody else waits for it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of
from support.steady_device import Steady

from aioengine import AdapterResolver, AsyncEngine
from aioengine.core import Core
from aioengine.core.state import AdapterEntry
from aioengine.errors import (
    AdapterInvalid,
    AdapterLoadError,
    AdapterNotFound,
    DeadlineExceeded,
    EngineOverloaded,
    EngineStopped,
)
from aioengine.events import AdapterLoading, AdapterRegistered, Event
from aioengine.runtime.loop import EngineLoop
from aioengine.runtime.sources import lookup as resolution
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.testing import LIMITS


class Gated(AdapterResolver):
    """Answers from a table, when its gate is open; a name in ``held`` waits for it."""

    def __init__(self, table: dict[str, Any], held: set[str] | None = None) -> None:
        self.table = table
        self.held = set() if held is None else held
        self.gate = asyncio.Event()
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.reached = asyncio.Event()

    async def resolve(self, name: str) -> Any:
        self.asked.append(name)
        self.reached.set()
        if name in self.held:
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.append(name)
                raise
        found = self.table.get(name)
        if found is None:
            raise AdapterNotFound("not in the table", name=name)
        if isinstance(found, Exception):
            raise found
        return found


async def some_turns() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


MakeResolving = Callable[..., AsyncEngine]


@pytest.fixture
def resolving(tiny: Tiny, make_engine: MakeEngine) -> MakeResolving:
    """``resolving(resolver, **engine fields)``: an engine over the tiny model."""

    def make(resolver: AdapterResolver, **fields: Any) -> AsyncEngine:
        return AsyncEngine(make_engine(tiny, **fields).config, resolver=resolver)

    return make


async def test_a_request_for_an_unknown_name_asks_once(tiny: Tiny, resolving: MakeResolving) -> None:
    resolver = Gated({"r": tiny.adapters["rank-3"]}, held={"r"})
    heard: list[Event] = []
    async with resolving(resolver) as engine:
        engine.add_listener(heard.append, AdapterRegistered, AdapterLoading)
        many = [asyncio.create_task(engine.complete([4, 5 + i], greedy(4), adapter="r")) for i in range(5)]
        load = asyncio.create_task(engine.load_adapter("r"))
        await resolver.reached.wait()
        resolver.gate.set()
        for i, out in enumerate(await asyncio.gather(*many)):
            assert out.token_ids == tiny.expected([4, 5 + i], 4, "rank-3")
        assert (await load).path == str(tiny.adapters["rank-3"])
        await engine.complete([4, 5], greedy(2), adapter="r")
        assert resolver.asked == ["r"]
        assert [type(event) for event in heard] == [AdapterRegistered, AdapterLoading]


async def test_a_deadline_covers_the_search(resolving: MakeResolving) -> None:
    resolver = Gated({}, held={"r"})
    async with resolving(resolver) as engine:
        with pytest.raises(DeadlineExceeded, match=r"for adapter 'r' \(not looked up yet\)"):
            await engine.complete([4], adapter="r", deadline=0.01)
        await some_turns()
        assert resolver.cancelled == ["r"]


@pytest.mark.slow
async def test_a_search_has_a_time_limit(tiny: Tiny, resolving: MakeResolving) -> None:
    """What hangs fails, makes room for others, and is not asked for at every request after that."""
    names = ["a", "b"]
    resolver = Gated({"good": tiny.adapters["rank-3"]}, held=set(names))
    async with resolving(resolver, load_timeout=0.5) as engine:
        for attempt in range(2):
            hung = await asyncio.gather(
                *(engine.complete([4], adapter=name) for name in names), return_exceptions=True
            )
            assert all(isinstance(error, AdapterLoadError) for error in hung)
            assert "load_timeout=0.5" in str(hung[0])
            assert resolver.cancelled == names * (attempt + 1)
        with pytest.raises(AdapterLoadError, match="failed 2 times"):
            await engine.complete([4], adapter="a")
        assert resolver.asked == names * 2
        assert (await engine.load_adapter("good")).location == "cpu"


@pytest.mark.parametrize("name", ["a/../b", "a//b", "a/./b", "..", "/a", "-a", "a b", "a" * 256])
async def test_the_resolver_sees_only_good_names(resolving: MakeResolving, name: str) -> None:
    resolver = Gated({name: "/etc"})
    async with resolving(resolver) as engine:
        with pytest.raises(AdapterNotFound):
            await engine.complete([4], adapter=name)
        with pytest.raises(AdapterNotFound):
            await engine.load_adapter(name)
        assert resolver.asked == []


@pytest.mark.parametrize("answer", [5, b"/x", "", "a\0b", ValueError("broken"), KeyError("x")])
async def test_what_a_resolver_must_not_do_fails_the_request_only(
    tiny: Tiny, resolving: MakeResolving, answer: Any
) -> None:
    resolver = Gated({"r": answer, "good": tiny.adapters["rank-3"]})
    async with resolving(resolver) as engine:
        with pytest.raises(AdapterLoadError, match="'r'"):
            await engine.complete([4], adapter="r")
        assert (await engine.load_adapter("good")).location == "cpu"


async def test_a_search_ends_when_another_tenant_takes_its_place(resolving: MakeResolving) -> None:
    resolver = Gated({}, held={"a", "b", "c"})
    async with resolving(resolver, max_waiting=2) as engine:
        first, second = (
            asyncio.create_task(engine.complete([4], adapter=name, tenant="hog")) for name in ("a", "b")
        )
        await resolver.reached.wait()
        other = asyncio.create_task(engine.complete([4], adapter="c", tenant="other"))
        with pytest.raises(EngineOverloaded, match="'hog' has most") as caught:
            await second
        assert caught.value.bound == "tenant"
        await some_turns()
        assert resolver.cancelled == ["b"]
        with pytest.raises(EngineOverloaded, match="max_waiting=2"):
            await engine.complete([4], adapter="d", tenant="hog")
        resolver.gate.set()
        for task in (first, other):
            with pytest.raises(AdapterNotFound):
                await task


@given(
    st.lists(
        st.tuples(st.sampled_from(["ask", "end", "cancel"]), st.integers(0, 9), st.sampled_from("abcd")),
        max_size=80,
    )
)
def test_lookups_are_bounded_and_shared_and_all_end_whatever_happens(
    ops: list[tuple[str, int, str]],
) -> None:
    class Answers(AdapterResolver):
        def __init__(self) -> None:
            self.open: dict[str, asyncio.Future[str]] = {}

        async def resolve(self, name: str) -> str:
            assert name not in self.open, "one look-up at a time for a name"
            self.open[name] = asyncio.get_running_loop().create_future()
            try:
                return await self.open[name]
            finally:
                del self.open[name]

    async def go() -> None:
        resolver = Answers()
        stepper = EngineLoop(Core(LIMITS, FCFS()), Steady())
        shared = resolution.Lookups(stepper, resolver)
        waiting: list[tuple[str, str, asyncio.Task[AdapterEntry]]] = []
        for kind, number, tenant in ops:
            name = f"n{number}"
            if kind == "ask":
                task = asyncio.create_task(shared.find(name, tenant))
                waiting.append((name, tenant, task))
            elif kind == "end" and resolver.open:
                list(resolver.open.values())[number % len(resolver.open)].set_exception(
                    AdapterNotFound("no", name="n")
                )
            elif kind == "cancel" and waiting:
                waiting[number % len(waiting)][2].cancel()
            await some_turns()
            waiting = [item for item in waiting if not item[2].done()]
            assert set(resolver.open) <= {name for name, _, _ in waiting}
            assert len(resolver.open) <= resolution.MAX_LOOKUPS
            assert resolver.open or not waiting
            pairs = {(name, tenant) for name, tenant, _ in waiting}
            begun = {pair for pair in pairs if pair[0] in resolver.open}
            for tenant in {tenant for _, tenant in pairs - begun}:  # it waits for its own, and for no other
                own = [pair for pair in begun if pair[1] == tenant]
                assert len(own) >= resolution.MAX_OF_A_TENANT or len(begun) >= resolution.MAX_LOOKUPS
        while waiting:
            for future in list(resolver.open.values()):
                future.set_exception(AdapterNotFound("no", name="n"))
            await some_turns()
            waiting = [item for item in waiting if not item[2].done()]
        assert not resolver.open

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolution, "MAX_LOOKUPS", 4)
        patch.setattr(resolution, "MAX_OF_A_TENANT", 2)
        asyncio.run(go())


async def test_a_stop_ends_the_search(resolving: MakeResolving) -> None:
    resolver = Gated({}, held={"r"})
    async with resolving(resolver) as engine:
        request = asyncio.create_task(engine.complete([4], adapter="r"))
        load = asyncio.create_task(engine.load_adapter("r"))
        await resolver.reached.wait()
    for task in (request, load):
        with pytest.raises(EngineStopped):
            await task
    assert resolver.cancelled == ["r"]


async def test_replacing_asks_again(tiny: Tiny, resolving: MakeResolving) -> None:
    resolver = Gated({"r": tiny.adapters["rank-3"]})
    prompt = prompt_of(1, 6)
    async with resolving(resolver) as engine:
        await engine.complete(prompt, greedy(4), adapter="r")
        resolver.table["r"] = tiny.adapters["qv-only"]
        assert (await engine.load_adapter("r")).version == 1, "nothing asked for anything new"
        replaced = await engine.load_adapter("r", replace=True)
        assert (replaced.version, replaced.path) == (2, str(tiny.adapters["qv-only"]))
        out = await engine.complete(prompt, greedy(4), adapter="r")
        assert out.token_ids == tiny.expected(prompt, 4, "qv-only")
        assert resolver.asked == ["r", "r"]


async def test_what_a_resolver_found_and_is_gone_is_looked_for_again(
    tiny: Tiny, resolving: MakeResolving, tmp_path: Path
) -> None:
    """Its copy was deleted, say. A request fails, and the next finds the new one."""
    first = shutil.copytree(tiny.adapters["rank-3"], tmp_path / "first")
    resolver = Gated({"r": first})
    async with resolving(resolver, max_loras=1, max_cpu_loras=1) as engine:
        await engine.complete([4, 5], greedy(2), adapter="r")
        engine.register_adapter("mine", shutil.copytree(first, tmp_path / "mine"))
        await engine.complete([4, 5], greedy(2), adapter="mine")  # takes the only place
        shutil.rmtree(first)
        resolver.table["r"] = tiny.adapters["rank-4"]
        with pytest.raises(AdapterLoadError, match="first"):
            await engine.complete([4, 5], greedy(2), adapter="r")
        out = await engine.complete([4, 5], greedy(8), adapter="r")
        assert out.token_ids == tiny.expected([4, 5], 8, "rank-4")
        assert resolver.asked == ["r", "r"]

        shutil.rmtree(tmp_path / "mine")  # what the application has registered stays registered
        with pytest.raises(AdapterLoadError):
            await engine.complete([4, 5], greedy(2), adapter="mine")
        assert "mine" in [info.name for info in engine.adapters()]


# Paths on the Hub


@pytest.fixture
def hub(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Offline, with a cache that has the adapter org/sql."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--sql"
    snapshot = repo / "snapshots" / ("2" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("2" * 40)
    snapshot.parent.mkdir()
    snapshot.symlink_to(tiny.adapters["rank-3"])
    return snapshot


async def test_a_path_on_the_hub(tiny: Tiny, make_engine: MakeEngine, hub: Path) -> None:
    async with make_engine(tiny) as engine:
        declared = engine.register_adapter("sql", "hf:org/sql")
        assert (declared.path, declared.location, declared.version) == ("hf:org/sql", "disk", 0)
        assert engine.adapters() == [declared] == [engine.register_adapter("sql", "hf:org/sql")]
        with pytest.raises(AdapterInvalid, match="replace=True"):
            engine.register_adapter("sql", hub)
        out = await engine.complete([4, 5], greedy(4), adapter="sql")
        assert out.token_ids == tiny.expected([4, 5], 4, "rank-3")
        assert (await engine.load_adapter("sql", "hf:org/sql")).path == str(hub)
        assert (await engine.load_adapter("sql", "hf:org/sql", replace=True)).version == 2
        assert (await engine.load_adapter("other", "hf:org/sql@main")).location == "cpu"
        await engine.unload_adapter("sql")
        with pytest.raises(AdapterNotFound):
            await engine.complete([4], adapter="sql")


async def test_what_is_declared_and_never_needed(tiny: Tiny, make_engine: MakeEngine, hub: Path) -> None:
    async with make_engine(tiny) as engine:
        engine.register_adapter("none", "hf:org/none")
        with pytest.raises(AdapterNotFound, match="hf:org/none"):
            await engine.complete([4], adapter="none")
        await engine.unload_adapter("none")
        assert engine.adapters() == []
        with pytest.raises(AdapterNotFound):
            await engine.unload_adapter("none")
        with pytest.raises(AdapterInvalid, match="hf:owner/name"):
            engine.register_adapter("bad", "hf:sql")


async def test_a_mix_is_of_the_versions_that_are_current_when_all_parts_are_known(
    tiny: Tiny, resolving: MakeResolving
) -> None:
    """While one part is looked up, another is replaced or unloaded."""
    resolver = Gated(dict.fromkeys("rst", tiny.adapters["rank-3"]), held=set("rst"))
    async with resolving(resolver) as engine:
        for name, wanted in (("r", "a"), ("s", "a@2"), ("t", "a")):
            resolver.reached.clear()
            resolver.gate.clear()
            if name == "r":
                await engine.load_adapter("a", tiny.adapters["rank-3"])
            mix = {wanted: 0.7, name: 0.4}
            task = asyncio.create_task(engine.complete(prompt_of(0, 9), greedy(1), adapter=mix))
            await resolver.reached.wait()
            if name == "t":
                await engine.unload_adapter("a")
            else:
                await engine.load_adapter("a", tiny.adapters["qv-only"], replace=True)
            resolver.gate.set()
            if name == "r":
                assert (await task).adapter == "a@2*0.7+r@1*0.4"
            else:
                with pytest.raises(AdapterNotFound, match="a"):
                    await task
        engine.check_invariants()
